"""EXIF blocks made to fit another picture, in place: every other byte stays where it was.

Maker notes point to places in the block that only their maker knows, so a block that is taken apart
and put together again loses them. Here the few tags that no longer hold are overwritten where they
stand. CIPA DC-008 (EXIF) and TIFF 6.0 define the bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

PREFIX = b"Exif\0\0"

ORIENTATION, EXIF_FOLDER, COLOUR_SPACE = 0x0112, 0x8769, 0xA001
# Of the stored picture, in the main folder and in that of the camera's data.
WIDTHS, HEIGHTS = (0x0100, 0xA002), (0x0101, 0xA003)
THUMBNAIL_START, THUMBNAIL_LENGTH = (0x0201, 0x0111), (0x0202, 0x0117)
SRGB, SHORT, LONG = 1, 3, 4

# What a TIFF file says of its own samples, and copies of the picture: layers, previews.
TIFF_STRUCTURE = {
    254, 255, 256, 257, 258, 259, 262, 263, 264, 265, 266, 273, 277, 278, 279, 280, 281, 284, 288,
    289, 290, 291, 292, 293, 297, 317, 320, 321, 322, 323, 324, 325, 330, 332, 333, 334, 336, 338,
    339, 340, 341, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532, 700, 34377,
    34675, 37724, 50255,
}  # fmt: skip


class Entry(NamedTuple):
    """One tag: where its 12 bytes are, and what they say."""

    position: int
    tag: int
    kind: int
    values: int


class ExifBlock:
    """The bytes of a block, to be overwritten in place.

    Args:
        data: from the TIFF header on; ``Exif\\0\\0`` may stand before it.

    Raises:
        ValueError: there is no such header, or no whole main folder.
    """

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data.removeprefix(PREFIX))
        self.order = {b"II*\0": "<", b"MM\0*": ">"}.get(bytes(self.data[:4]), "")
        if not self.order or len(self.data) < 14:
            raise ValueError("it has no TIFF header")
        self.main_folder = self._number(4, LONG)
        self.next_folder = self.main_folder + 2 + 12 * self._count(self.main_folder)
        if self.main_folder < 8 or self.next_folder + 4 > len(self.data):
            raise ValueError("its main folder is cut short")

    def _number(self, position: int, kind: int) -> int:
        form = "H" if kind == SHORT else "I"
        return struct.unpack_from(self.order + form, self.data, position)[0]

    def _count(self, folder: int) -> int:
        return self._number(folder, SHORT) if folder + 2 <= len(self.data) else 0

    def entries(self, folder: int) -> Iterator[Entry]:
        """The tags of a folder, as far as they lie in the block."""
        for index in range(self._count(folder)):
            position = folder + 2 + 12 * index
            if position + 12 > len(self.data):
                return
            yield Entry(position, *struct.unpack_from(self.order + "HHI", self.data, position))

    def _whole_numbers(self, folder: int) -> dict[int, int]:
        """The tags of a folder that hold one whole number."""
        return {
            entry.tag: self._number(entry.position + 8, entry.kind)
            for entry in self.entries(folder)
            if entry.kind in (SHORT, LONG) and entry.values == 1
        }

    def _set(self, folder: int, tag: int, value: int) -> None:
        """Overwrites a whole number that is there."""
        for entry in self.entries(folder):
            if entry.tag == tag and entry.kind in (SHORT, LONG) and entry.values == 1:
                form = "HH" if entry.kind == SHORT else "I"
                numbers = (min(value, 65535), 0) if entry.kind == SHORT else (value,)
                struct.pack_into(self.order + form, self.data, entry.position + 8, *numbers)

    def set_upright(self) -> None:
        """Says that the picture is stored upright."""
        self._set(self.main_folder, ORIENTATION, 1)

    def set_size(self, width: int, height: int) -> None:
        """Gives the tags of the picture's size, where they are, the size of another one."""
        for folder in self._folders():
            for tag in WIDTHS:
                self._set(folder, tag, width)
            for tag in HEIGHTS:
                self._set(folder, tag, height)

    def set_srgb(self) -> None:
        """Says that the colours are sRGB, where a colour space is named."""
        for folder in self._folders():
            self._set(folder, COLOUR_SPACE, SRGB)

    def _folders(self) -> list[int]:
        camera = self._whole_numbers(self.main_folder).get(EXIF_FOLDER)
        return [self.main_folder] if camera is None else [self.main_folder, camera]

    def remove_thumbnail(self) -> None:
        """Blanks the small picture, which shows what the photograph was, and forgets its folder."""
        folder = self._number(self.next_folder, LONG)
        struct.pack_into(self.order + "I", self.data, self.next_folder, 0)
        if not 8 <= folder <= len(self.data) - 2:
            return
        numbers = self._whole_numbers(folder)
        for start_tag, length_tag in zip(THUMBNAIL_START, THUMBNAIL_LENGTH, strict=True):
            start, length = numbers.get(start_tag, 0), numbers.get(length_tag, 0)
            end = min(start + length, len(self.data))
            overlaps = start < self.next_folder + 4 and end > self.main_folder
            if start < 8 or end <= start or overlaps:  # nothing there, or damaged
                continue
            if end == len(self.data):
                del self.data[start:]
            else:
                self.data[start:end] = bytes(end - start)

    def kept_in_tiff(self) -> dict[int, bytes]:
        """The 12 bytes of each main tag that does not say how a TIFF file stores its samples."""
        return {
            entry.tag: bytes(self.data[entry.position : entry.position + 12])
            for entry in self.entries(self.main_folder)
            if entry.tag not in TIFF_STRUCTURE
        }

    def tobytes(self) -> bytes:
        """The block, with ``Exif\\0\\0`` before it."""
        return PREFIX + bytes(self.data)


def exif_of_tiff(file: Path) -> bytes:
    """Returns an EXIF block with all that a TIFF file says beside its samples; empty if nothing.

    Raises:
        Exception: damaged tags; what Pillow raises of them has no common base.
    """
    exif = Image.Exif()
    with open(file, "rb") as stream:
        exif.load_from_fp(stream)
        for folder in (EXIF_FOLDER, 0x8825):
            exif.get_ifd(folder)
        for tag in TIFF_STRUCTURE & set(exif):
            del exif[tag]
        return exif.tobytes() if len(exif) else b""

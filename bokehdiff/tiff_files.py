"""TIFF files of 8, 16 and 32 bits with colour profile, EXIF and XMP.

The file begins with the EXIF block itself, whose header is that of a TIFF file; the samples and a
new main folder follow. So nothing in the block moves, and maker notes still point to what they
mean. TIFF 6.0 and Adobe's supplements define the bytes.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

from .exif_blocks import ExifBlock

STRIP_BYTES = 2**20
LARGEST_FILE = 2**32 - 1

# Kinds of tag values, and those of compression, prediction and colour that are used here.
SHORT, LONG, UNDEFINED = 3, 4, 7
DEFLATE, DIFFERENCES, NO_PREDICTION = 8, 2, 1
BLACK_IS_ZERO, RGB, UNASSOCIATED_ALPHA = 1, 2, 2
WHOLE_NUMBERS, FLOATS = 1, 3


def encode_tiff(
    samples: np.ndarray,
    icc_profile: bytes | None = None,
    exif: bytes | None = None,
    xmp: bytes | None = None,
) -> bytes:
    """Returns the bytes of a TIFF file, compressed without loss (deflate).

    Args:
        samples: (H, W, C) uint8, uint16 or float32; C is 1 (gray), 2 (with alpha), 3 (colour), 4.
        icc_profile, xmp: stored as they are.
        exif: a whole EXIF block.

    Raises:
        ValueError: the file would be larger than its offsets can say, 4 GiB.
    """
    block = ExifBlock(exif) if exif else None
    order = block.order if block else "<"
    parts = [bytes(block.data) if block else b"II*\0\0\0\0\0"]
    length = len(parts[0])

    def place(data: bytes) -> int:
        """Appends data at an even place, and gives it."""
        nonlocal length
        padding = length % 2
        parts.append(b"\0" * padding + data)
        length += padding + len(data)
        if length > LARGEST_FILE:
            raise ValueError("a TIFF file ends at 4 GiB; write a smaller picture, or PNG")
        return length - len(data)

    height, width, channels = samples.shape
    kind = samples.dtype
    row_bytes = width * channels * kind.itemsize
    rows = min(height, max(1, STRIP_BYTES // row_bytes))
    strips = [_strip(samples[top : top + rows], order) for top in range(0, height, rows)]
    offsets = [place(strip) for strip in strips]
    is_float = kind.kind == "f"
    colours = 1 if channels <= 2 else 3
    tags: dict[int, tuple[int, list[int] | bytes]] = {
        256: (LONG, [width]),
        257: (LONG, [height]),
        258: (SHORT, [8 * kind.itemsize] * channels),
        259: (SHORT, [DEFLATE]),
        262: (SHORT, [BLACK_IS_ZERO if colours == 1 else RGB]),
        273: (LONG, offsets),
        277: (SHORT, [channels]),
        278: (LONG, [rows]),
        279: (LONG, [len(strip) for strip in strips]),
        284: (SHORT, [1]),
        317: (SHORT, [NO_PREDICTION if is_float else DIFFERENCES]),
        339: (SHORT, [FLOATS if is_float else WHOLE_NUMBERS] * channels),
    }
    if channels > colours:
        tags[338] = (SHORT, [UNASSOCIATED_ALPHA])
    for tag, data in ((700, xmp), (34675, icc_profile)):
        if data:
            tags[tag] = (UNDEFINED, data)
    entries = block.kept_in_tiff() if block else {}
    for tag, (value_kind, value) in tags.items():
        form = {SHORT: "H", LONG: "I"}.get(value_kind, "")
        stored = (
            value if isinstance(value, bytes) else struct.pack(f"{order}{len(value)}{form}", *value)
        )
        where = (
            stored.ljust(4, b"\0") if len(stored) <= 4 else struct.pack(order + "I", place(stored))
        )
        entries[tag] = struct.pack(order + "HHI", tag, value_kind, len(value)) + where
    folder = struct.pack(order + "H", len(entries)) + b"".join(
        entries[tag] for tag in sorted(entries)
    )
    main_folder = place(folder + b"\0\0\0\0")
    parts[0] = parts[0][:4] + struct.pack(order + "I", main_folder) + parts[0][8:]
    return b"".join(parts)


def _strip(rows: np.ndarray, order: str) -> bytes:
    """Some rows, compressed; whole numbers as differences to the sample at the left."""
    if rows.dtype.kind != "f":
        differences = rows.copy()
        differences[:, 1:] -= rows[:, :-1]
        rows = differences
    # The grain of photographs repeats nowhere: searching for repeats costs time and saves nothing.
    compressor = zlib.compressobj(strategy=zlib.Z_RLE)
    stored = rows.astype(f"{order}{rows.dtype.kind}{rows.dtype.itemsize}").tobytes()
    return compressor.compress(stored) + compressor.flush()

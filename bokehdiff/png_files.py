"""PNG files of 8 and 16 bits with colour profile, EXIF and XMP (Pillow keeps 8 bits of colour)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np

COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
"""PNG's number for gray, gray with alpha, colour, and colour with alpha, by channels."""

ROWS_AT_ONCE = 64


def encode_png(
    samples: np.ndarray,
    icc_profile: bytes | None = None,
    exif: bytes | None = None,
    xmp: bytes | None = None,
) -> bytes:
    """Returns the bytes of a PNG file.

    Args:
        samples: (H, W, C) uint8 or uint16, C as in ``COLOUR_TYPES``.
        icc_profile, exif, xmp: stored as they are; EXIF from its TIFF header on.
    """
    height, width, channels = samples.shape
    bits = 8 * samples.dtype.itemsize
    header = struct.pack(">IIBBBBB", width, height, bits, COLOUR_TYPES[channels], 0, 0, 0)
    chunks = [b"\x89PNG\r\n\x1a\n", _chunk(b"IHDR", header)]
    if icc_profile:
        chunks.append(_chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc_profile)))
    if exif:
        chunks.append(_chunk(b"eXIf", exif))
    if xmp:
        chunks.append(_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp))
    # The grain of photographs repeats nowhere: searching for repeats costs time and saves nothing.
    compressor = zlib.compressobj(strategy=zlib.Z_RLE)
    for rows in _filtered_rows(samples):
        if data := compressor.compress(rows):
            chunks.append(_chunk(b"IDAT", data))
    chunks += [_chunk(b"IDAT", compressor.flush()), _chunk(b"IEND", b"")]
    return b"".join(chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return (
        struct.pack(">I", len(data))
        + kind
        + data
        + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
    )


def _filtered_rows(samples: np.ndarray) -> Iterator[bytes]:
    """Rows as differences to the neighbour that Paeth's rule foretells best, each with its type."""
    height, width, channels = samples.shape
    step = channels * samples.dtype.itemsize
    above = np.zeros((1, width * step), np.uint8)
    for top in range(0, height, ROWS_AT_ONCE):
        part = samples[top : top + ROWS_AT_ONCE]
        stored = part.astype(part.dtype.newbyteorder(">")).view(np.uint8).reshape(len(part), -1)
        upper = np.concatenate([above, stored[:-1]])
        left, corner = np.zeros_like(stored), np.zeros_like(stored)
        left[:, step:], corner[:, step:] = stored[:, :-step], upper[:, :-step]
        rows = np.empty((len(part), 1 + stored.shape[1]), np.uint8)
        rows[:, 0] = 4
        rows[:, 1:] = stored - _foretold(left, upper, corner)
        above = stored[-1:]
        yield rows.tobytes()


def _foretold(left: np.ndarray, upper: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """Of three bytes the one nearest to left + upper - corner; the first of equals."""
    a, b, c = (part.astype(np.int16) for part in (left, upper, corner))
    to_left, to_upper = np.abs(b - c), np.abs(a - c)
    to_corner = np.abs(a + b - 2 * c)
    other = np.where(to_upper <= to_corner, upper, corner)
    return np.where((to_left <= to_upper) & (to_left <= to_corner), left, other)

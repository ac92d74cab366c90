"""Samples, colour profile, EXIF and XMP made into the bytes of a file, for every format written."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from .exif_blocks import PREFIX
from .linear_images import open_image_io
from .picture_files import note
from .png_files import encode_png
from .stored_pictures import open_pillow_heif
from .tiff_files import encode_tiff

# JPEG keeps EXIF and XMP in one segment each, of 64 KiB less its own words.
LARGEST_JPEG_EXIF, LARGEST_JPEG_XMP = 65533, 65533 - 29


@dataclass(frozen=True)
class PictureFormat:
    """What a format can hold.

    Args:
        name: for people, and Pillow.
        bits: per channel; 32 are floats of linear light.
        alpha, gray: whether it holds opacity, and one channel alone.
        metadata: whether it holds a colour profile, EXIF and XMP.
        options: for Pillow.
    """

    name: str
    bits: tuple[int, ...]
    alpha: bool = True
    gray: bool = True
    metadata: bool = True
    options: tuple[tuple[str, Any], ...] = ()


PNG = PictureFormat("PNG", (8, 16))
TIFF = PictureFormat("TIFF", (8, 16, 32))
JPEG = PictureFormat("JPEG", (8,), alpha=False, options=(("quality", 95), ("subsampling", 0)))
WEBP = PictureFormat("WEBP", (8,), gray=False, options=(("lossless", True),))
AVIF = PictureFormat("AVIF", (8,), gray=False, options=(("quality", 95), ("subsampling", "4:4:4")))
HEIF = PictureFormat("HEIF", (8, 10), gray=False)
OPEN_EXR = PictureFormat("OpenEXR", (32,), metadata=False)
RADIANCE = PictureFormat("Radiance", (32,), alpha=False, gray=False, metadata=False)
NUMPY = PictureFormat("numpy", (32,), gray=False, metadata=False)

FORMATS = {
    ".png": PNG,
    ".jpg": JPEG,
    ".jpeg": JPEG,
    ".tif": TIFF,
    ".tiff": TIFF,
    ".webp": WEBP,
    ".heic": HEIF,
    ".heif": HEIF,
    ".avif": AVIF,
    ".exr": OPEN_EXR,
    ".hdr": RADIANCE,
    ".npy": NUMPY,
}
"""Formats of photographs that are written, by suffix."""


def check_encoder(file: Path) -> None:
    """Checks that what the format of a file needs is installed.

    Raises:
        ValueError: it is not.
    """
    picture_format = FORMATS[file.suffix.lower()]
    if picture_format in (OPEN_EXR, RADIANCE):
        open_image_io(file.name)
    elif picture_format is HEIF:
        open_pillow_heif(file.name)
    elif picture_format is AVIF and not features.check("avif"):
        raise ValueError(
            f"{file.name} needs Pillow 11.3 or later with AVIF: pip install -U pillow, or write "
            "another format."
        )


def encode_picture(
    file: Path,
    samples: np.ndarray,
    icc_profile: bytes | None,
    exif: bytes | None,
    xmp: bytes | None,
) -> bytes:
    """Returns the bytes of a file like `file`, of a format that holds a profile.

    Args:
        file: its suffix is one of ``FORMATS``.
        samples: (H, W, C) uint8 or uint16; float32 for TIFF; C is one that the format holds.
        icc_profile, exif, xmp: what is carried over; EXIF with ``Exif\\0\\0`` before it.

    Raises:
        ValueError: the picture is too large for the format.
    """
    picture_format = FORMATS[file.suffix.lower()]
    try:
        if picture_format is PNG:
            return encode_png(samples, icc_profile, (exif or b"").removeprefix(PREFIX), xmp)
        if picture_format is TIFF:
            return encode_tiff(samples, icc_profile, exif, xmp)
        carried = {"icc_profile": icc_profile, "exif": exif, "xmp": xmp}
        if picture_format is JPEG:
            for key, largest in (("exif", LARGEST_JPEG_EXIF), ("xmp", LARGEST_JPEG_XMP)):
                if len(carried[key] or b"") > largest:
                    note(
                        f"The {key.upper()} data are larger than the 64 KiB that JPEG holds; they "
                        f"were left out of {file.name}. PNG and TIFF keep them."
                    )
                    carried[key] = None
        present = {key: data for key, data in carried.items() if data}
        encoded = io.BytesIO()
        if picture_format is HEIF:
            height, width, channels = samples.shape
            mode = "RGBA"[:channels]
            if samples.dtype == np.uint16:
                mode += ";16"
                # The encoder takes the upper 10 of 16 bits.
                levels = (np.arange(65536) * 1023 + 32767) // 65535 << 6
                samples = levels.astype(np.uint16)[samples]
            open_pillow_heif(file.name).encode(
                mode, (width, height), samples.tobytes(), encoded,
                quality=95, chroma=444, **present,
            )  # fmt: skip
        else:
            pixels = samples[:, :, 0] if samples.shape[2] == 1 else samples
            Image.fromarray(pixels).save(
                encoded, format=picture_format.name, **dict(picture_format.options), **present
            )
        return encoded.getvalue()
    except (ValueError, OSError, RuntimeError) as error:
        height, width = samples.shape[:2]
        raise ValueError(
            f"{file.name} could not be encoded, {width} x {height} pixels as {picture_format.name} "
            f"({error}); write another format."
        ) from None

"""Photographs and disparity maps: reading, checking, padding, writing, and the sRGB curve.

Whatever a person has becomes one of three tensors:

- a photograph, (B, 3, H, W) float32, RGB, **display-encoded sRGB** in [0, 1];
- a photograph with its highlights (HDR), the same shape, in **linear light**: 0 is black, 1 white,
  lamps are brighter;
- a disparity map, (B, 1, H, W) float32, larger is nearer, in [0, 1] (or 1/metres, never negative).

Bad input is refused with a ``ValueError`` that says what came, what was wanted and what to do.
Things that are repaired because there is only one sensible repair (holes in a measured disparity
map, transparency) are announced with an :class:`InputRepairedWarning`.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .disparity_maps import (
    LARGEST_METRIC_DISPARITY,
    RANGE_TOLERANCE,
    as_disparity_batch,
    fill_holes,
    read_disparity,
)
from .linear_images import (
    FLOAT_SUFFIXES,
    LINEAR_LIGHT_SUFFIXES,
    channels_last,
    cut_off_at_white,
    encode_floats,
    open_image_io,
    read_linear_image,
    write_linear_image,
)
from .picture_files import (
    InputRepairedWarning,
    existing_file,
    load_numpy,
    native,
    picture_file_samples,
    picture_samples,
    reading,
    type_name,
)
from .srgb import linear_to_srgb, srgb_to_linear
from .whole_files import PathLike, file_to_write, write_whole

__all__ = [
    "CAMERA_RAW_SUFFIXES",
    "FLOAT_SUFFIXES",
    "ImageInput",
    "InputRepairedWarning",
    "LARGEST_METRIC_DISPARITY",
    "LINEAR_LIGHT_SUFFIXES",
    "PICTURE_FORMATS",
    "RANGE_TOLERANCE",
    "WRITABLE_SUFFIXES",
    "as_disparity_batch",
    "as_image_batch",
    "crop_to",
    "fill_holes",
    "linear_to_srgb",
    "open_image_io",
    "pad_to_multiple",
    "read_disparity",
    "read_image",
    "read_linear_image",
    "srgb_to_linear",
    "write_image",
    "write_linear_image",
]

CAMERA_RAW_SUFFIXES = {
    ".3fr", ".arw", ".cr2", ".cr3", ".dng", ".erf", ".iiq", ".nef", ".nrw", ".orf", ".pef", ".raf",
    ".raw", ".rw2", ".srw",
}  # fmt: skip


ImageInput = PathLike | Image.Image | np.ndarray | torch.Tensor | Sequence[Any]
"""What :func:`as_image_batch` and :func:`as_disparity_batch` take."""


# --- Reading --------------------------------------------------------------------------------------


def read_image(path: PathLike, *, linear: bool = False) -> torch.Tensor:
    """Returns the photograph in a file as (1, 3, H, W) float32, display-encoded sRGB in [0, 1].

    Turned upright by its EXIF orientation. Palette, grayscale, CMYK and 16-bit pictures are
    converted; 16-bit PNG and TIFF keep their precision; an embedded colour profile is converted to
    sRGB. Transparent pixels are laid over white, as viewers and JPEG export do, with a warning.
    ``.npy`` files hold (H, W, 3) or (H, W): uint8, uint16, or floats in [0, 1]. Of OpenEXR and
    Radiance files, which hold linear light, what is brighter than white is cut off, with a warning;
    :func:`read_linear_image` keeps it.

    Args:
        path: the file. Camera raw files have to be developed first.
        linear: the numbers in the file are linear light; they are encoded to sRGB.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a picture, damaged or truncated, or float values outside [0, 1].
    """
    file = existing_file(path, "photograph")
    if file.suffix.lower() in CAMERA_RAW_SUFFIXES:
        raise ValueError(
            f"{file.name} is a camera raw file; wanted a developed photograph: export it as JPEG, "
            "16-bit PNG or TIFF first."
        )
    if file.suffix.lower() in LINEAR_LIGHT_SUFFIXES:
        return cut_off_at_white(read_linear_image(file), file.name)
    if file.suffix.lower() == ".npy":
        samples = load_numpy(file)
    else:
        with reading(file):
            samples = picture_file_samples(file)
    return _samples_to_image(samples, file.name, linear=linear)[None]


def _samples_to_image(samples: np.ndarray, name: str, *, linear: bool = False) -> torch.Tensor:
    """Turns (H, W), (H, W, 1..4) samples into a checked (3, H, W) float32 image."""
    if not isinstance(samples, np.ndarray) or samples.ndim not in (2, 3):
        shape = getattr(samples, "shape", type(samples).__name__)
        raise ValueError(f"{name} has shape {shape}; wanted an image (H, W, 3), or (H, W) gray.")
    if samples.ndim == 2:
        samples = samples[:, :, None]
    if samples.shape[2] not in (1, 2, 3, 4):
        hint = ""
        if samples.shape[0] in (1, 3, 4):
            hint = " Its channels seem to come first: array.transpose(1, 2, 0) moves them last."
        raise ValueError(
            f"{name} has shape {tuple(samples.shape)}; wanted (H, W, 3), or 1, 2 or 4 channels for "
            f"gray, gray with alpha, and colour with alpha.{hint}"
        )
    if 0 in samples.shape:
        raise ValueError(f"{name} has shape {samples.shape}, without a pixel; wanted an image.")
    values = unit_range(torch.from_numpy(native(samples)), name)
    return _three_channels(values.permute(2, 0, 1), name, linear=linear)


def unit_range(values: torch.Tensor, name: str) -> torch.Tensor:
    """Gives float32 in [0, 1]: whole numbers by the largest value of their type, floats checked."""
    if values.dtype == torch.uint8:
        return values.to(torch.float32) / 255
    if values.dtype == torch.uint16:
        return values.to(torch.float32) / 65535
    if not values.is_floating_point():
        raise ValueError(
            f"{name} holds {type_name(values)} values; wanted uint8, uint16, or floats in [0, 1]. "
            "Divide by the value of white and convert to float."
        )
    values = values.to(torch.float32)
    unknown = int((~torch.isfinite(values.detach())).sum())
    if unknown:
        raise ValueError(
            f"{name} has {unknown} NaN or infinite values; wanted finite values in [0, 1]. Repair "
            "the image first (numpy.nan_to_num, or interpolate)."
        )
    low, high = float(values.detach().min()), float(values.detach().max())
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        if low < 0 and low >= -1 - RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE:
            hint = "If it is in [-1, 1], pass (image + 1) / 2."
        elif low >= 0 and high <= 255:
            hint = "If it is in 0..255, pass image / 255, or convert it to uint8."
        elif low >= 0 and high <= 65535:
            hint = "If it is in 0..65535, pass image / 65535, or convert it to uint16."
        else:
            hint = "Scale it so that black is 0 and white is 1."
        if low >= 0:
            hint += (
                " If it is linear light with highlights beyond white, render it with render_bokeh "
                'and highlights="hdr" (--method layered --highlights hdr on the command line).'
            )
        raise ValueError(
            f"{name} has values from {low:.4g} to {high:.4g}; wanted display-encoded values in [0, "
            f"1]. {hint}"
        )
    return values.clamp(0, 1) if low < 0 or high > 1 else values


def _three_channels(image: torch.Tensor, name: str, *, linear: bool = False) -> torch.Tensor:
    """Gives (..., 3, H, W) from 1 to 4 channels in [0, 1]; transparency is laid over white."""
    channels = image.shape[-3]
    colour = image[..., :1, :, :] if channels <= 2 else image[..., :3, :, :]
    if linear:
        colour = linear_to_srgb(colour)
    if channels in (2, 4):
        alpha = image[..., -1:, :, :]
        transparent = float((alpha.detach() < 1).to(torch.float32).mean())
        if transparent > 0:
            warnings.warn(
                f"{name} is transparent in {100 * transparent:.3g} % of its pixels, which were "
                "laid over white. Flatten it over a background of your choice to decide "
                "otherwise.",
                InputRepairedWarning,
                stacklevel=4,
            )
            colour = colour * alpha + (1 - alpha)
    return colour.expand(*colour.shape[:-3], 3, -1, -1).contiguous()


# --- Checking what a caller gives -----------------------------------------------------------------


def as_image_batch(image: Any) -> torch.Tensor:
    """Returns (B, 3, H, W) float32, display-encoded sRGB in [0, 1], from any usual kind of image.

    Args:
        image: a path; a Pillow picture (EXIF orientation is applied); a numpy array (H, W), (H, W,
            C) or (B, H, W, C); a torch tensor (C, H, W) or (B, C, H, W), which keeps device and
            gradient; or a list of these, all of one size. uint8, uint16 or floats in [0, 1]; 1 to 4
            channels, converted as in :func:`read_image`.

    Raises:
        FileNotFoundError: a path leads to no file.
        ValueError: another type, shape or range; NaN; no pixel; images of different sizes.
    """
    if isinstance(image, (list, tuple)):
        if not image:
            raise ValueError("The list of images is empty; wanted at least one image.")
        batches = [as_image_batch(item) for item in image]
        sizes = sorted({tuple(batch.shape[-2:]) for batch in batches})
        if len(sizes) > 1:
            raise ValueError(
                f"The images have different sizes (height, width): {', '.join(map(str, sizes))}; "
                "wanted one size per batch. Render them one by one, or crop them alike."
            )
        return torch.cat(batches)
    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"The image has size {image.size}, without a pixel; wanted an image.")
        with reading(Path(getattr(image, "filename", "") or "The image")):
            samples = picture_samples(image, "The image")
        return _samples_to_image(samples, "The image")[None]
    if isinstance(image, np.ndarray):
        if image.ndim == 4:
            return torch.stack([_samples_to_image(item, "The image") for item in _some(image)])
        return _samples_to_image(image, "The image")[None]
    if isinstance(image, torch.Tensor):
        return _tensor_to_image(image)
    raise ValueError(
        f"The image is of type {type(image).__name__}; wanted a path, a Pillow picture, a numpy "
        "array (H, W, 3), a torch tensor (3, H, W) or (B, 3, H, W), or a list of these."
    )


def _some(batch: np.ndarray) -> np.ndarray:
    if batch.shape[0] == 0:
        raise ValueError(f"The batch of images has shape {batch.shape}; wanted at least one image.")
    return batch


def _tensor_to_image(image: torch.Tensor) -> torch.Tensor:
    shape = tuple(image.shape)
    batch = image[None] if image.ndim == 3 else image
    if batch.ndim != 4 or batch.shape[1] not in (1, 2, 3, 4):
        hint = ""
        if image.ndim in (3, 4) and shape[-1] in (1, 3, 4):
            hint = " Its channels seem to come last: tensor.movedim(-1, -3) moves them first."
        raise ValueError(
            f"The image tensor has shape {shape}; wanted (3, H, W) or (B, 3, H, W).{hint}"
        )
    if 0 in shape:
        raise ValueError(f"The image tensor has shape {shape}, without a pixel; wanted an image.")
    return _three_channels(unit_range(batch, "The image tensor"), "The image tensor")


# --- Padding --------------------------------------------------------------------------------------


def pad_to_multiple(values: torch.Tensor, multiple: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """Returns (padded, (height, width)): sides grown to a multiple, and the size to crop back to.

    The last row and column are repeated at the bottom and right; the top left stays at the top
    left. Any dtype; the gradient of the repeated border goes to the pixels it came from.

    Args:
        values: (..., H, W).
        multiple: at least 1.

    Raises:
        ValueError: the multiple is smaller than 1, or there is no pixel to repeat.
    """
    if multiple < 1:
        raise ValueError(f"multiple is {multiple}; wanted a whole number of at least 1.")
    height, width = values.shape[-2:]
    if height == 0 or width == 0:
        raise ValueError(f"The tensor has shape {tuple(values.shape)}, without a pixel to repeat.")
    below, right = -height % multiple, -width % multiple
    if below:
        last_row = values[..., -1:, :]
        values = torch.cat([values, last_row.expand(*values.shape[:-2], below, width)], dim=-2)
    if right:
        last_column = values[..., -1:]
        values = torch.cat([values, last_column.expand(*values.shape[:-1], right)], dim=-1)
    return values, (height, width)


def crop_to(values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Returns the top left (height, width) of (..., H, W): undoes :func:`pad_to_multiple`.

    Raises:
        ValueError: the tensor is smaller than that.
    """
    height, width = size
    if values.shape[-2] < height or values.shape[-1] < width:
        raise ValueError(
            f"The tensor has shape {tuple(values.shape)}; wanted at least {height} x {width} to "
            "crop."
        )
    return values[..., :height, :width]


# --- Writing --------------------------------------------------------------------------------------

PICTURE_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".tif": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ".tiff": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ".webp": ("WEBP", {"lossless": True}),
}
WRITABLE_SUFFIXES = (*PICTURE_FORMATS, ".npy", *LINEAR_LIGHT_SUFFIXES)


def write_image(path: PathLike, image: Any, overwrite: bool = False) -> Path:
    """Writes one image; returns its path. The suffix decides the format.

    8 bits per channel, rounded to nearest: PNG, TIFF, WebP (lossless), JPEG (quality 95, full
    colour resolution). ``.npy`` holds float32 (H, W, 3). ``.exr`` and ``.hdr`` hold linear light,
    into which the image is decoded. The file appears complete or not at all.

    Args:
        path: where to; its folder has to exist.
        image: one image of any kind :func:`as_image_batch` takes; display-encoded sRGB. Floats may
            overshoot [0, 1] slightly; renderings should be clamped before.
        overwrite: replace a file that is there.

    Raises:
        FileExistsError: the file is there, and `overwrite` is False.
        FileNotFoundError: the folder does not exist.
        ValueError: unknown suffix, or not exactly one valid image.
    """
    file = file_to_write(path, WRITABLE_SUFFIXES, overwrite)
    batch = as_image_batch(image)
    if batch.shape[0] != 1:
        raise ValueError(f"There are {batch.shape[0]} images for one file; wanted one for each.")
    suffix = file.suffix.lower()
    if suffix in LINEAR_LIGHT_SUFFIXES:
        write_whole(file, encode_floats(channels_last(srgb_to_linear(batch)), file))
        return file
    pixels = batch[0].detach().permute(1, 2, 0).cpu()
    encoded = io.BytesIO()
    if suffix == ".npy":
        np.save(encoded, pixels.numpy())
    else:
        picture = Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())
        picture_format, options = PICTURE_FORMATS[suffix]
        picture.save(encoded, format=picture_format, **options)
    write_whole(file, encoded.getvalue())
    return file

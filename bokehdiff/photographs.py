"""Photographs with all they carry: depth of samples, colour profile, EXIF, XMP and transparency.

    photo = read_photograph("IMG_0001.HEIC")
    out = pipe(photo.image, disparity, df, K, output_type="pt").images
    write_photograph("out.tif", out, like=photo)

A photograph keeps the primaries of its file, so no colour is clipped; see
:mod:`bokehdiff.colour_profiles`. Without a change, the same samples are written that were read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .colour_profiles import (
    LINEAR,
    ColourProfile,
    build_profile,
    from_working,
    read_profile,
    to_working,
    working_table,
)
from .exif_blocks import ExifBlock
from .grids import enlarged, filled_from_surroundings, pooled
from .images import CAMERA_RAW_SUFFIXES, as_image_batch, unit_range
from .linear_images import channels_last, cut_off_at_white, encode_floats, repaired_light
from .picture_encoding import (
    FORMATS,
    NUMPY,
    OPEN_EXR,
    RADIANCE,
    TIFF,
    PictureFormat,
    check_encoder,
    encode_picture,
)
from .picture_files import existing_file, native, note, type_name
from .srgb import linear_to_srgb, srgb_to_linear
from .stored_pictures import StoredPicture, read_stored_picture
from .whole_files import PathLike, file_to_write, write_whole
from .xmp_packets import fitted_packet

__all__ = [
    "PHOTOGRAPH_SUFFIXES",
    "Photograph",
    "check_photograph_file",
    "read_photograph",
    "write_photograph",
]

PHOTOGRAPH_SUFFIXES = tuple(FORMATS)
"""Suffixes of the files that :func:`write_photograph` writes."""

ROWS_AT_ONCE = 256

# What cannot be seen is filled in cells of this side, which saves memory; a power of two.
FILL_CELL = 4


@dataclass(frozen=True, eq=False)
class Photograph:
    """A photograph, and what its file carried.

    Args:
        image: (1, 3, H, W) float32, upright, in the primaries of ``icc_profile``. Display-encoded
            with the sRGB curve, in [0, 1]; or ``linear`` light, 0 black, 1 white, lamps brighter.
            What is fully transparent has the colours of its surroundings.
        alpha: (1, 1, H, W) opacity in [0, 1], or None.
        linear: ``image`` is linear light.
        bits: per channel of the file: 8, 16, or 32 for floats.
        gray: the file holds one channel for gray.
        icc_profile: the colour profile of the file; None: sRGB.
        exif: the EXIF block, as Pillow gives it, which says upright and has no thumbnail; or None.
        xmp: the XMP packet, or None.
    """

    image: torch.Tensor
    alpha: torch.Tensor | None = None
    linear: bool = False
    bits: int = 8
    gray: bool = False
    icc_profile: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None

    def display_encoded(self, name: str = "The photograph") -> torch.Tensor:
        """Returns ``image`` for what takes photographs cut off at white: (1, 3, H, W) in [0, 1].

        Of linear light, what is brighter than white is cut off, with a warning, in which the
        photograph is called `name`.
        """
        return cut_off_at_white(self.image, name) if self.linear else self.image


# --- Reading --------------------------------------------------------------------------------------


def read_photograph(path: PathLike, *, linear: bool | None = None) -> Photograph:
    """Returns the photograph in a file, with all that it carries.

    JPEG, PNG, TIFF, WebP, AVIF, OpenEXR, Radiance, numpy, and what else Pillow reads; HEIC with
    ``pip install 'bokehdiff[heic]'``, floats (but numpy's) with ``'bokehdiff[hdr]'``. Turned
    upright by its EXIF orientation. Of several pictures in a file the first is taken. CMYK, and
    profiles that are look-up tables, are converted to sRGB at 8 bits. Warnings say what was not
    kept.

    Args:
        path: the file. Camera raw files have to be developed first.
        linear: whether floats in a TIFF or numpy file are linear light; only the person who made
            them knows. By default they are in TIFF, and are not in numpy files. A TIFF with a
            colour profile says it itself.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a picture, damaged or truncated; NaN or infinite values; display-encoded
            floats outside [0, 1]; whole numbers for ``linear``; a package is missing.
    """
    file = existing_file(path, "photograph")
    if file.suffix.lower() in CAMERA_RAW_SUFFIXES:
        raise ValueError(
            f"{file.name} is a camera raw file; wanted a developed photograph: export it as 16-bit "
            "TIFF or PNG, or as JPEG, first."
        )
    stored = read_stored_picture(file)
    samples = stored.samples
    is_float = samples.dtype.kind == "f"
    if not is_float and samples.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"{file.name} holds {samples.dtype} values; wanted uint8, uint16 or floats. Divide by "
            "the value of white and convert to float."
        )
    if linear and not is_float:
        raise ValueError(
            f"{file.name} holds {samples.dtype} values, which are display-encoded; wanted linear "
            "light as floats. Read it without linear=True (--highlights hdr on the command "
            "line)."
        )
    is_light = is_float and (
        stored.is_light or (file.suffix.lower() != ".npy" if linear is None else linear)
    )
    image, alpha = _image_and_alpha(stored, file.name, is_light)
    return Photograph(
        image=image,
        alpha=alpha,
        linear=is_light,
        bits=32 if is_float else 8 * samples.dtype.itemsize,
        gray=samples.shape[2] <= 2,
        icc_profile=stored.profile_bytes,
        exif=stored.exif,
        xmp=stored.xmp,
    )


def _image_and_alpha(
    stored: StoredPicture, name: str, is_light: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(1, 3, H, W) in the working encoding or linear light, and (1, 1, H, W)."""
    samples = native(stored.samples) if stored.samples.dtype.kind == "f" else stored.samples
    height, width, channels = samples.shape
    planes = np.empty((channels, height, width), np.float32)
    if samples.dtype.kind == "f":
        np.copyto(planes, np.moveaxis(samples, 2, 0))
    else:
        largest = np.iinfo(samples.dtype).max
        tables = _tables(stored.profile, largest, channels)
        for top in range(0, height, ROWS_AT_ONCE):
            for channel, table in enumerate(tables):
                rows = slice(top, top + ROWS_AT_ONCE)
                to_working(samples[rows, :, channel], table, planes[channel, rows])
    values = torch.from_numpy(planes)[None]
    alpha = None
    if channels in (2, 4):
        values, alpha = values[:, :-1], values[:, -1:].clone()
        alpha = unit_range(alpha, f"The opacity of {name}")
    values = repaired_light(values, name) if is_light else unit_range(values, name)
    values = values.expand(-1, 3, -1, -1)
    if alpha is not None:
        values = _filled(values, alpha > 0)
    return values.contiguous(), alpha


def _tables(profile: ColourProfile | None, largest: int, channels: int) -> list[np.ndarray]:
    """The working encoding of the samples of each channel; opacity is as it is."""
    colours = channels - (channels in (2, 4))
    curves = profile.curves if profile is not None else (None,) * colours
    tables = {id(curve): working_table(curve, largest) for curve in curves}
    plain = working_table(None, largest)
    return [tables[id(curve)] for curve in curves] + [plain] * (channels - colours)


def _filled(image: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Colours of the surroundings where nothing can be seen, so that no fringe gets into a blur."""
    if bool(known.all()) or not bool(known.any()):
        return image
    weight = known.to(image.dtype)
    cells = torch.cat([pooled(image * weight, FILL_CELL), pooled(weight, FILL_CELL)], dim=1)
    surroundings = enlarged(filled_from_surroundings(cells)[0], FILL_CELL)
    height, width = image.shape[-2:]
    return torch.where(known, image, surroundings[..., :height, :width])


# --- Writing --------------------------------------------------------------------------------------


def check_photograph_file(path: PathLike, overwrite: bool = False, bits: int | None = None) -> Path:
    """Returns the path if :func:`write_photograph` can write there.

    Raises:
        FileExistsError: the file is there, and `overwrite` is False.
        FileNotFoundError: the folder does not exist.
        ValueError: unknown suffix; the format does not hold so many bits; a package is missing.
    """
    file = file_to_write(path, PHOTOGRAPH_SUFFIXES, overwrite)
    held = FORMATS[file.suffix.lower()].bits
    if bits is not None and bits not in held:
        fitting = [suffix for suffix, other in FORMATS.items() if bits in other.bits]
        raise ValueError(
            f"{file.name} holds {' or '.join(map(str, held))} bits per channel, not {bits}; wanted "
            f"one of {', '.join(fitting)}."
            if fitting
            else f"bits is {bits}; wanted 8, 16 or 32 (floats)."
        )
    check_encoder(file)
    return file


def write_photograph(
    path: PathLike,
    image: Any,
    like: Photograph,
    *,
    linear: bool | None = None,
    bits: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a rendering of a photograph with all that the photograph carries; returns its path.

    The same colour profile, EXIF, XMP, opacity, and depth of samples, as far as the format holds
    them; a warning says what it does not. Samples are rounded to nearest:

    - PNG 8 or 16 bits, TIFF 8, 16 or floats; WebP 8 (these lose nothing); JPEG 8 (quality 95, full
      colour resolution), AVIF 8, HEIC 8 or 10 bits.
    - Floats (TIFF, OpenEXR, Radiance) are linear light. OpenEXR names the primaries, TIFF keeps
      them in a linear profile; Radiance and numpy hold those of sRGB.
    - Numpy files are float32 (H, W, 3), or (H, W, 4) with opacity; display-encoded unless the
      image is linear light.

    The file appears complete or not at all.

    Args:
        path: where to; its folder has to exist; its suffix, one of ``PHOTOGRAPH_SUFFIXES``, decides
            the format.
        image: one image: (1, 3, H, W) or (3, H, W) tensor, or of any other kind that
            :func:`bokehdiff.images.as_image_batch` takes; in the primaries of ``like``.
        like: the photograph that was rendered.
        linear: `image` is linear light, not negative, and may be brighter than white (a tensor);
            else it is display-encoded in [0, 1]. Default: as ``like``.
        bits: per channel; default those of ``like``, or the most that the format holds.
        overwrite: replace a file that is there.

    Raises:
        FileExistsError: the file is there, and `overwrite` is False.
        FileNotFoundError: the folder does not exist.
        ValueError: unknown suffix, not exactly one valid image, another size than the opacity of
            ``like``, or as of :func:`check_photograph_file`.
    """
    file = check_photograph_file(path, overwrite, bits)
    picture_format = FORMATS[file.suffix.lower()]
    linear = like.linear if linear is None else linear
    values = _one_image(image, linear)
    alpha = _fitting_alpha(like, values)
    depth = bits or _depth_held(picture_format, like, file.name)
    if alpha is not None and not picture_format.alpha:
        values, alpha = _laid_over_white(values, alpha, file.name), None
    gray = like.gray and picture_format.gray and _is_gray(values, depth)
    profile_bytes, profile = like.icc_profile, None
    if profile_bytes is not None:
        profile = _usable_profile(profile_bytes)
        if profile.space == "GRAY" and not gray:  # its colours are in the working encoding: sRGB
            profile_bytes, profile = None, None
    if gray:
        values = values[:, :1]
    if not picture_format.metadata and (like.exif or like.xmp):
        note(f"{file.name} holds no EXIF and XMP data; those of the photograph were left out.")
    if depth == 32:
        data = _encode_as_floats(file, values, alpha, linear, profile, like)
    else:
        samples = _whole_numbers(values, alpha, linear, profile, depth, file.name)
        exif, xmp = _fitted(like, *samples.shape[:2])
        data = encode_picture(file, samples, profile_bytes, exif, xmp)
    write_whole(file, data)
    return file


def _one_image(image: Any, linear: bool) -> torch.Tensor:
    """One checked image, (1, 3, H, W) float32 in main memory."""
    if not linear:
        batch = as_image_batch(image)
    else:
        batch = image[None] if isinstance(image, torch.Tensor) and image.ndim == 3 else image
        if (
            not isinstance(batch, torch.Tensor)
            or batch.ndim != 4
            or batch.shape[1] != 3
            or not batch.is_floating_point()
            or 0 in batch.shape
        ):
            came = type(image).__name__
            if isinstance(image, torch.Tensor):
                came = f"{tuple(image.shape)} of {type_name(image)}"
            raise ValueError(
                f"The image is {came}; wanted linear light as a tensor of floats, (1, 3, H, W)."
            )
        if not bool(torch.isfinite(batch).all()) or bool((batch < 0).any()):
            raise ValueError(
                "The image has NaN, infinite or negative values; wanted linear light, finite and "
                "from 0 up."
            )
    if batch.shape[0] != 1:
        raise ValueError(f"There are {batch.shape[0]} images for one file; wanted one for each.")
    return batch.detach().to("cpu", torch.float32)


def _usable_profile(data: bytes) -> ColourProfile:
    try:
        profile = read_profile(data)
    except (ValueError, struct.error) as error:
        raise ValueError(
            f"The icc_profile of the photograph cannot be used ({error}); wanted that of a file "
            "that was read, or None for sRGB."
        ) from None
    if not profile.curves:
        raise ValueError(
            f"The icc_profile of the photograph ({profile.name or profile.space}) is a look-up "
            "table; wanted one with a curve for each channel, or None for sRGB."
        )
    return profile


def _fitting_alpha(like: Photograph, values: torch.Tensor) -> torch.Tensor | None:
    if like.alpha is None:
        return None
    if like.alpha.shape[-2:] != values.shape[-2:]:
        height, width = values.shape[-2:]
        raise ValueError(
            f"The image is {width} x {height} pixels (width x height), the opacity of the "
            f"photograph {like.alpha.shape[-1]} x {like.alpha.shape[-2]}; wanted the same size. "
            "Crop the photograph's alpha alike (dataclasses.replace), or set it to None."
        )
    return like.alpha.detach().to("cpu", torch.float32)


def _depth_held(picture_format: PictureFormat, like: Photograph, name: str) -> int:
    """The bits of the photograph, or the least above them, or the most that the format holds."""
    enough = [bits for bits in picture_format.bits if bits >= like.bits]
    most = max(picture_format.bits)
    if not enough and most < 16:
        note(
            f"{name} holds {most} bits per channel; the {like.bits} of the photograph were rounded "
            "to them. PNG and TIFF hold 16."
        )
    return min(enough) if enough else most


def _laid_over_white(values: torch.Tensor, alpha: torch.Tensor, name: str) -> torch.Tensor:
    transparent = float((alpha < 1).to(torch.float32).mean())
    if transparent == 0:
        return values
    note(
        f"{name} holds no transparency: {100 * transparent:.3g} % of its pixels were laid over "
        "white. PNG, TIFF and WebP keep it."
    )
    return values * alpha + (1 - alpha)


def _is_gray(values: torch.Tensor, depth: int) -> bool:
    """Whether the channels are equal when rounded to this depth."""
    step = 0.0 if depth == 32 else 0.5 / (2**depth - 1)
    red, green, blue = values[0]
    return all(bool(((green - other).abs() <= step).all()) for other in (red, blue))


def _fitted(like: Photograph, height: int, width: int) -> tuple[bytes | None, bytes | None]:
    """EXIF and XMP of a picture of this size."""
    exif = None
    if like.exif is not None:
        try:
            block = ExifBlock(like.exif)
            block.set_size(width, height)
            exif = block.tobytes()
        except (ValueError, struct.error) as error:
            note(f"The EXIF data of the photograph are damaged ({error}) and were left out.")
    return exif, fitted_packet(like.xmp, width, height) if like.xmp is not None else None


def _whole_numbers(
    values: torch.Tensor,
    alpha: torch.Tensor | None,
    linear: bool,
    profile: ColourProfile | None,
    depth: int,
    name: str,
) -> np.ndarray:
    """(H, W, C) uint8 or uint16 samples in the colours of the profile, rounded to nearest."""
    if linear:
        brighter = float((values > 1).any(dim=1).to(torch.float32).mean())
        if brighter > 0:
            note(
                f"{name} holds nothing brighter than white, which {100 * brighter:.3g} % of the "
                "pixels were cut off at. OpenEXR and float TIFF keep them."
            )
    _, colours, height, width = values.shape
    channels = colours + (alpha is not None)
    largest = 255 if depth == 8 else 65535
    tables = _tables(profile, largest, channels)
    samples = np.empty((height, width, channels), np.uint8 if depth == 8 else np.uint16)
    for top in range(0, height, ROWS_AT_ONCE):
        rows = slice(top, top + ROWS_AT_ONCE)
        strip = values[0, :, rows]
        if linear:
            strip = linear_to_srgb(strip.clamp(max=1))
        if alpha is not None:
            strip = torch.cat([strip, alpha[0, :, rows]])
        for channel, table in enumerate(tables):
            samples[rows, :, channel] = from_working(strip[channel].numpy(), table)
    return samples


def _encode_as_floats(
    file: Path,
    values: torch.Tensor,
    alpha: torch.Tensor | None,
    linear: bool,
    profile: ColourProfile | None,
    like: Photograph,
) -> bytes:
    """The bytes of a file of floats: linear light, but for numpy files of display-encoded ones."""
    picture_format = FORMATS[file.suffix.lower()]
    has_primaries = profile is not None and profile.colorants is not None
    light = values if linear else srgb_to_linear(values)
    if picture_format in (RADIANCE, NUMPY):
        if profile is not None and has_primaries:
            light = _in_srgb(light, profile, file.name)
        if picture_format is NUMPY and not linear:
            light = linear_to_srgb(light).clamp(0, 1) if has_primaries else values
    if alpha is not None:
        if picture_format is OPEN_EXR:
            light = light * alpha
        light = torch.cat([light, alpha], dim=1)
    pixels = channels_last(light)
    if picture_format is not TIFF:
        named = profile.chromaticities() if profile is not None and has_primaries else None
        return encode_floats(pixels, file, named)
    profile_bytes = None
    if profile is not None and has_primaries:
        profile_bytes = like.icc_profile
        if any(curve is not LINEAR for curve in profile.curves):
            name = f"{profile.name or 'Primaries of the photograph'}, linear"
            profile_bytes = build_profile(profile.chromaticities(), LINEAR, name)
    exif, xmp = _fitted(like, *pixels.shape[:2])
    return encode_picture(file, pixels, profile_bytes, exif, xmp)


def _in_srgb(light: torch.Tensor, profile: ColourProfile, name: str) -> torch.Tensor:
    """Light in the primaries of sRGB, which do not make all colours of wider ones."""
    matrix = torch.from_numpy(profile.to_srgb()).to(light.dtype)
    light = torch.einsum("ij,bjhw->bihw", matrix, light)
    outside = float((light < -1e-4).any(dim=1).to(torch.float32).mean())
    if outside > 0:
        note(
            f"{name} holds sRGB only: {100 * outside:.3g} % of the pixels have colours beyond it, "
            "which were clipped. PNG, TIFF, JPEG and OpenEXR keep them."
        )
    return light.clamp(min=0)

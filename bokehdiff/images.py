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

import contextlib
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError

Arrays = TypeVar("Arrays", torch.Tensor, np.ndarray)
"""A torch tensor or a numpy array: what comes in is what goes out."""

PathLike = str | os.PathLike[str]


class InputRepairedWarning(UserWarning):
    """Part of a photograph or a disparity map was repaired; the message says what and how much."""


# Rounding of resampled or half-precision values around the ends of a range; clamped, not refused.
RANGE_TOLERANCE = 1e-3

# Nearer than this (1/metres) no photograph focuses: such numbers are millimetres, or stereo pixels.
LARGEST_METRIC_DISPARITY = 100.0

CAMERA_RAW_SUFFIXES = {
    ".3fr", ".arw", ".cr2", ".cr3", ".dng", ".erf", ".iiq", ".nef", ".nrw", ".orf", ".pef", ".raf",
    ".raw", ".rw2", ".srw",
}  # fmt: skip

# OpenEXR and Radiance: these files always hold linear light.
LINEAR_LIGHT_SUFFIXES = (".exr", ".hdr")
# Files that can hold linear light; in the last three, only the person who made them knows.
FLOAT_SUFFIXES = (*LINEAR_LIGHT_SUFFIXES, ".tif", ".tiff", ".npy")

# --- Display and linear light ---------------------------------------------------------------------


def srgb_to_linear(values: Arrays) -> Arrays:
    """Returns linear light from display-encoded sRGB (IEC 61966-2-1), elementwise, same shape.

    Values above 1 follow the power law, values below 0 the straight part. The gradient is finite
    everywhere.
    """
    if isinstance(values, np.ndarray):
        curved = ((np.maximum(values, 0.04045) + 0.055) / 1.055) ** 2.4
        return np.where(values <= 0.04045, values / 12.92, curved).astype(_float_like(values))
    # The clamp keeps the power away from negative bases: their NaN would reach the gradient.
    curved = ((values.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4
    return torch.where(values <= 0.04045, values / 12.92, curved)


def linear_to_srgb(values: Arrays) -> Arrays:
    """Returns display-encoded sRGB from linear light (IEC 61966-2-1), elementwise, same shape.

    Values above 1 follow the power law, values below 0 the straight part. The gradient is finite
    everywhere (12.92 at 0).
    """
    if isinstance(values, np.ndarray):
        curved = 1.055 * np.maximum(values, 0.0031308) ** (1 / 2.4) - 0.055
        return np.where(values <= 0.0031308, values * 12.92, curved).astype(_float_like(values))
    curved = 1.055 * values.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(values <= 0.0031308, values * 12.92, curved)


def _float_like(values: np.ndarray) -> np.dtype:
    return values.dtype if values.dtype.kind == "f" else np.dtype(np.float32)


# --- Reading photographs --------------------------------------------------------------------------


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
    file = _existing_file(path, "photograph")
    if file.suffix.lower() in CAMERA_RAW_SUFFIXES:
        raise ValueError(
            f"{file.name} is a camera raw file; wanted a developed photograph: export it as JPEG, "
            "16-bit PNG or TIFF first."
        )
    if file.suffix.lower() in LINEAR_LIGHT_SUFFIXES:
        return _cut_off_at_white(read_linear_image(file), file.name)
    if file.suffix.lower() == ".npy":
        samples = _load_numpy(file)
    else:
        with _reading(file):
            samples = _picture_file_samples(file)
    return _samples_to_image(samples, file.name, linear=linear)[None]


def _existing_file(path: PathLike, what: str) -> Path:
    file = Path(path).expanduser()
    if not file.exists():
        raise FileNotFoundError(f"There is no file {file}; wanted the {what} to read.")
    if file.is_dir():
        raise ValueError(f"{file} is a folder; wanted one {what} file.")
    if file.stat().st_size == 0:
        raise ValueError(f"{file.name} is empty (0 bytes); wanted a {what}. Copy the file again.")
    return file


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turns what decoders raise on foreign and broken files into one sentence."""
    try:
        yield
    except UnidentifiedImageError:
        raise ValueError(
            f"{file.name} is not a picture that can be read here; wanted PNG, JPEG, TIFF, WebP or "
            "another format Pillow knows: open it in an image editor and export it as PNG."
        ) from None
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{file.name} is larger than Pillow opens by default ({error}). If you trust the file, "
            "set PIL.Image.MAX_IMAGE_PIXELS = None before reading it."
        ) from None
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(
            f"{file.name} is damaged or truncated ({error}); wanted a complete picture. Copy or "
            "export it again."
        ) from None


def _load_numpy(file: Path) -> np.ndarray:
    try:
        loaded = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{file.name} cannot be read as a numpy file ({error}); wanted an array saved with "
            "numpy.save, without Python objects."
        ) from None
    return loaded if isinstance(loaded, np.ndarray) else dict(loaded)  # type: ignore[return-value]


def _picture_file_samples(file: Path) -> np.ndarray:
    """Gives the upright samples of a picture file: (H, W) or (H, W, C), 8 or 16 bit or float."""
    is_tiff = file.suffix.lower() in (".tif", ".tiff")
    try:
        picture: Image.Image = Image.open(file)
    except UnidentifiedImageError:
        if is_tiff:
            return _unusual_tiff_samples(file)
        raise
    with picture:
        tags = getattr(picture, "tag_v2", {})
        if is_tiff and tags.get(284) == 2 and max(tags.get(258, (8,))) > 8:
            return _unusual_tiff_samples(file)
        if picture.mode in ("RGB", "RGBA", "RGBX") and _has_sixteen_bits(picture):
            profile = _foreign_profile_name(picture)
            if profile is None:
                return _sixteen_bit_samples(file)
            warnings.warn(
                f"{file.name} has 16 bits per channel and the colour profile {profile!r}: it was "
                "converted to sRGB at 8 bits. Export it with the sRGB profile to keep all 16.",
                InputRepairedWarning,
                stacklevel=4,
            )
        return _picture_samples(picture, file.name)


def _has_sixteen_bits(picture: Image.Image) -> bool:
    return any(_raw_mode(tile)[-4:-1] == ";16" for tile in getattr(picture, "tile", []))


def _raw_mode(tile: Any) -> str:
    """The sample layout named in one of Pillow's tiles: (decoder, box, offset, arguments)."""
    arguments = tile[3]
    raw_mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return raw_mode if isinstance(raw_mode, str) else ""


def _sixteen_bit_samples(file: Path) -> np.ndarray:
    """Gives all 16 bits of an RGB or RGBA picture, of which Pillow keeps 8.

    Pillow keeps the first byte of a big-endian sample ("16B") and the second of a little-endian one
    ("16L"). Decoding the same file under both names gives both bytes.
    """
    byte_of = {}
    stored_order = ""
    for order in "BL":
        with Image.open(file) as picture:
            tiles = []
            for tile in picture.tile:
                raw_mode = _raw_mode(tile)
                stored_order = raw_mode[-1]
                arguments: Any = raw_mode[:-1] + order
                if isinstance(tile[3], tuple):
                    arguments = (arguments, *tile[3][1:])
                tiles.append(tile._replace(args=arguments))
            picture.tile = tiles
            picture.load()
            byte_of[order] = _upright(np.asarray(picture), picture).astype(np.uint16)
    if stored_order == "N":
        stored_order = "L" if sys.byteorder == "little" else "B"
    high, low = ("B", "L") if stored_order == "B" else ("L", "B")
    return byte_of[high] * 256 + byte_of[low]


def _unusual_tiff_samples(file: Path) -> np.ndarray:
    """Reads the TIFF layouts Pillow lacks: float colour, and 16-bit colour in separate planes."""
    try:
        import tifffile
    except ImportError:
        raise ValueError(
            f"{file.name} is a TIFF with float or plane-by-plane samples, which needs the tifffile "
            "package: pip install 'bokehdiff[data]', or export it as an ordinary 16-bit TIFF."
        ) from None
    try:
        samples = np.asarray(tifffile.imread(file))
    except Exception as error:  # tifffile's errors have no common base
        raise ValueError(
            f"{file.name} cannot be read as TIFF ({error}); wanted a complete picture. Export "
            "it again."
        ) from None
    if samples.ndim == 3 and samples.shape[0] in (3, 4) and samples.shape[2] not in (1, 3, 4):
        samples = np.moveaxis(samples, 0, 2)
    return samples


def _picture_samples(picture: Image.Image, name: str) -> np.ndarray:
    """Gives the upright samples of a Pillow picture, (H, W) or (H, W, C); colour as sRGB."""
    picture.load()
    original = picture
    if picture.mode == "P":
        picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
    elif picture.mode in ("PA", "LA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
    elif picture.mode == "1":
        picture = picture.convert("L")
    if picture.mode.startswith("I;16"):
        samples = np.asarray(picture).astype(np.uint16)
    elif picture.mode == "I":
        samples = np.asarray(picture)
        if samples.size and (samples.min() < 0 or samples.max() > 65535):
            raise ValueError(
                f"{name} holds 32-bit whole numbers up to {samples.max()}, which have no agreed "
                "white; save it with 16 bits or as floats in [0, 1]."
            )
        samples = samples.astype(np.uint16)
    elif picture.mode == "F":
        samples = np.asarray(picture)
    elif picture.mode == "RGBA":
        colours = _to_srgb(picture.convert("RGB"), original, name)
        samples = np.dstack([np.asarray(colours), np.asarray(picture.getchannel("A"))])
    else:
        samples = np.asarray(_to_srgb(picture, original, name))
    return _upright(samples, original)


def _to_srgb(picture: Image.Image, original: Image.Image, name: str) -> Image.Image:
    """Converts to sRGB through the embedded colour profile; without one, only to RGB or gray."""
    if _foreign_profile_name(original) is not None:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(original.info["icc_profile"]))
            converted = ImageCms.profileToProfile(
                picture,
                source,
                ImageCms.createProfile("sRGB"),
                renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
                outputMode="RGB",
                flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
            )
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError):
            warnings.warn(
                f"The colour profile of {name} could not be used; its colours were taken as sRGB.",
                InputRepairedWarning,
                stacklevel=6,
            )
    return picture if picture.mode == "L" else picture.convert("RGB")


def _foreign_profile_name(picture: Image.Image) -> str | None:
    """The name of the embedded colour profile, or None where there is none or it is sRGB."""
    profile = picture.info.get("icc_profile")
    if not profile:
        return None
    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).strip()
    except (ImageCms.PyCMSError, OSError, ValueError):
        return "unknown"
    return None if "srgb" in name.lower() else name


def _upright(samples: np.ndarray, picture: Image.Image) -> np.ndarray:
    """Turns samples (H, W, ...) as the EXIF orientation of the (loaded) picture asks."""
    try:
        orientation = picture.getexif().get(0x0112, 1)
    except (OSError, SyntaxError, ValueError, KeyError):
        orientation = 1
    if orientation in (5, 6, 7, 8):
        samples = samples.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        samples = samples[:, ::-1]
    if orientation in (3, 4, 7, 8):
        samples = samples[::-1]
    return samples


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
    values = _unit_range(torch.from_numpy(_native(samples)), name)
    return _three_channels(values.permute(2, 0, 1), name, linear=linear)


def _native(array: np.ndarray) -> np.ndarray:
    """A contiguous, writable copy in this machine's byte order, which is what torch can take."""
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")


def _unit_range(values: torch.Tensor, name: str) -> torch.Tensor:
    """Gives float32 in [0, 1]: whole numbers by the largest value of their type, floats checked."""
    if values.dtype == torch.uint8:
        return values.to(torch.float32) / 255
    if values.dtype == torch.uint16:
        return values.to(torch.float32) / 65535
    if not values.is_floating_point():
        raise ValueError(
            f"{name} holds {_type_name(values)} values; wanted uint8, uint16, or floats in [0, 1]. "
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


def _type_name(values: torch.Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


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


# --- Reading linear light -------------------------------------------------------------------------


def read_linear_image(path: PathLike) -> torch.Tensor:
    """Returns the photograph in a file as (1, 3, H, W) float32 linear light, not cut off at white.

    0 is black, 1 white, lamps are brighter; primaries are taken to be those of sRGB. Gray becomes
    colour. Of an OpenEXR file the first part is read, and of that the display window. Negative
    values, which no light has, become 0, and transparent pixels are laid over black; both with a
    warning.

    Args:
        path: OpenEXR (``.exr``) and Radiance (``.hdr``); ``.tif``, ``.tiff`` and ``.npy`` with
            floats, which are taken to be linear light. All but ``.npy`` need
            ``pip install 'bokehdiff[hdr]'``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file; whole numbers; damaged; NaN or infinite values; the
            package is missing.
    """
    file = _existing_file(path, "photograph")
    suffix = file.suffix.lower()
    if suffix not in FLOAT_SUFFIXES:
        raise ValueError(
            f"{file.name} has no highlights beyond white; wanted linear light in a file ending in "
            f"{', '.join(FLOAT_SUFFIXES)}. Read it as an ordinary photograph (without --highlights "
            "hdr on the command line)."
        )
    samples = _float_array(file) if suffix == ".npy" else _float_file_samples(file)
    values = torch.from_numpy(_native(samples)).to(torch.float32).permute(2, 0, 1)[None]
    return _repaired_light(values, file.name)


def _float_array(file: Path) -> np.ndarray:
    """Gives the (H, W, 1) or (H, W, 3) floats of a numpy file."""
    samples = _load_numpy(file)
    if not isinstance(samples, np.ndarray) or samples.dtype.kind != "f":
        _refuse_whole_numbers(file.name, getattr(samples, "dtype", "several arrays"))
    if samples.ndim == 2:
        samples = samples[:, :, None]
    if samples.ndim != 3 or samples.shape[2] not in (1, 3) or 0 in samples.shape:
        raise ValueError(
            f"{file.name} has shape {samples.shape}; wanted linear light (H, W, 3), or (H, W) gray."
        )
    return samples


def _refuse_whole_numbers(name: str, came: Any) -> NoReturn:
    raise ValueError(
        f"{name} holds {came} values; wanted linear light as floats. Read whole numbers, which are "
        "display-encoded, as an ordinary photograph (without --highlights hdr on the command line)."
    )


def _float_file_samples(file: Path) -> np.ndarray:
    """Gives the upright samples of an OpenEXR, Radiance or TIFF file, (H, W, C), C = 1, 3 or 4."""
    image_io = open_image_io(file.name)
    buffer = image_io.ImageBuf(str(file))
    if not buffer.read(force=True, convert=image_io.FLOAT):
        reason = buffer.geterror().splitlines()[0]
        raise ValueError(
            f"{file.name} is damaged, truncated or of another format ({reason}); wanted a complete "
            f"{file.suffix.lower()} file. Copy or export it again."
        )
    if buffer.nativespec().format.basetype not in (
        image_io.HALF, image_io.FLOAT, image_io.DOUBLE,
    ):  # fmt: skip
        _refuse_whole_numbers(file.name, buffer.nativespec().format)
    names = list(buffer.spec().channelnames)
    if {"R", "G", "B"} <= set(names):
        wanted = [name for name in "RGBA" if name in names]
    elif "Y" in names or len(names) == 1:
        wanted = ["Y" if "Y" in names else names[0]]
    else:
        raise ValueError(
            f"{file.name} has the channels {', '.join(names)}; wanted R, G and B, or Y. Export the "
            "picture itself."
        )
    buffer = image_io.ImageBufAlgo.reorient(buffer)
    # What lies beyond the display window goes; what is missing in it is black.
    buffer = image_io.ImageBufAlgo.cut(buffer, buffer.roi_full)
    return buffer.get_pixels(image_io.FLOAT)[:, :, [names.index(name) for name in wanted]]


def open_image_io(name: str) -> Any:
    """Returns the OpenImageIO package.

    Raises:
        ValueError: the package is missing; `name` is the file that needs it.
    """
    try:
        import OpenImageIO
    except ImportError:
        raise ValueError(
            f"{name} needs the OpenImageIO package: pip install 'bokehdiff[hdr]'."
        ) from None
    return OpenImageIO


def _repaired_light(values: torch.Tensor, name: str) -> torch.Tensor:
    """Checks (1, 1 | 3 | 4, H, W) linear light; gives three channels, none of them negative."""
    unknown = int((~torch.isfinite(values)).sum())
    if unknown:
        raise ValueError(
            f"{name} has {unknown} NaN or infinite values; wanted finite linear light. Repair the "
            "picture first (numpy.nan_to_num, or interpolate)."
        )
    if values.shape[1] == 4:
        transparent = float((values[:, 3] < 1).to(torch.float32).mean())
        if transparent > 0:
            # The samples of these files come multiplied by their opacity.
            warnings.warn(
                f"{name} is transparent in {100 * transparent:.3g} % of its pixels, which were "
                "laid over black. Flatten it over a background of your choice to decide "
                "otherwise.",
                InputRepairedWarning,
                stacklevel=3,
            )
        values = values[:, :3]
    negative = float((values < 0).any(dim=1).to(torch.float32).mean())
    if negative > 0:
        warnings.warn(
            f"{name} is negative in {100 * negative:.3g} % of its pixels, which no light is; these "
            "values became 0.",
            InputRepairedWarning,
            stacklevel=3,
        )
        values = values.clamp(min=0)
    return values.expand(-1, 3, -1, -1).contiguous()


def _cut_off_at_white(light: torch.Tensor, name: str) -> torch.Tensor:
    """Gives display-encoded sRGB in [0, 1] from linear light."""
    brighter = float((light > 1).any(dim=1).to(torch.float32).mean())
    if brighter > 0:
        warnings.warn(
            f"{name} is brighter than white in {100 * brighter:.3g} % of its pixels, which were "
            'cut off at white. render_bokeh with highlights="hdr" keeps them (--method layered '
            "--highlights hdr on the command line).",
            InputRepairedWarning,
            stacklevel=3,
        )
    return linear_to_srgb(light).clamp(max=1)


# --- Reading disparity maps -----------------------------------------------------------------------


def read_disparity(path: PathLike, *, invalid: float | None = None) -> torch.Tensor:
    """Returns the disparity map in a file as (1, 1, H, W) float32, not yet range-checked.

    8 and 16-bit whole numbers (PNG, TIFF, npy) are divided by the largest value of their type,
    which is how fractions are stored in them; floats (npy, npz, PFM, TIFF) come back as they are. A
    measured map's unknown pixels (NaN, infinity) come back as they are too;
    :func:`as_disparity_batch` fills them.

    Args:
        path: PNG, TIFF, ``.npy``, ``.npz`` (one array, or one named disparity or disp) or ``.pfm``.
        invalid: the number *as stored in the file* that marks unknown pixels (often 0 in stereo
            data); these become NaN.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: damaged, a colour picture, or an array of another shape or type.
    """
    file = _existing_file(path, "disparity map")
    suffix = file.suffix.lower()
    if suffix in (".npy", ".npz"):
        samples = _disparity_array(_load_numpy(file), file.name)
    elif suffix == ".pfm":
        samples = _read_pfm(file)
    else:
        with _reading(file):
            samples = _picture_file_samples(file)
    samples = _one_channel(samples, file.name)
    if samples.dtype.kind not in "uf" or samples.dtype.kind == "u" and samples.dtype.itemsize > 2:
        raise ValueError(
            f"{file.name} holds {samples.dtype} values; wanted uint8 or uint16 (divided by their "
            "largest value) or floats: convert it with array.astype('float32') and scale it to "
            "[0, 1]."
        )
    unknown = samples == invalid if invalid is not None else None
    if samples.dtype.kind == "u":
        values = samples.astype(np.float32) / np.float32(np.iinfo(samples.dtype).max)
    else:
        values = np.array(samples, dtype=np.float32)
    if unknown is not None:
        values[unknown] = np.nan
    return torch.from_numpy(np.ascontiguousarray(values))[None, None]


def _disparity_array(loaded: Any, name: str) -> np.ndarray:
    if isinstance(loaded, np.ndarray):
        return loaded
    for key in ("disparity", "disp"):
        if key in loaded:
            return loaded[key]
    if len(loaded) == 1 and "depth" not in next(iter(loaded)).lower():
        return next(iter(loaded.values()))
    raise ValueError(
        f"{name} holds the arrays {', '.join(sorted(loaded)) or '(none)'}; wanted one array, or "
        "one named disparity (larger is nearer). Depth in metres becomes disparity with "
        "bokehdiff.depth_to_disparity."
    )


def _read_pfm(file: Path) -> np.ndarray:
    """Reads a portable float map: text header, then rows from the bottom up."""
    with open(file, "rb") as stream:
        try:
            kind = stream.readline().strip()
            width, height = (int(word) for word in stream.readline().split())
            scale = float(stream.readline())
        except ValueError:
            kind = b""
        if kind not in (b"Pf", b"PF"):
            raise ValueError(f"{file.name} has no PFM header; wanted a portable float map (Pf).")
        channels = 3 if kind == b"PF" else 1
        data = stream.read()
    if len(data) < width * height * channels * 4:
        raise ValueError(
            f"{file.name} is damaged or truncated: {len(data)} bytes of samples for {width} x "
            f"{height} pixels; wanted a complete file. Copy it again."
        )
    order = "<f4" if scale < 0 else ">f4"
    samples = np.frombuffer(data, dtype=order, count=width * height * channels)
    samples = samples.reshape(height, width, channels)[::-1].astype(np.float32)
    return samples if channels == 3 else samples[:, :, 0]


def _one_channel(samples: np.ndarray, name: str) -> np.ndarray:
    """Gives (H, W) from (H, W), (H, W, 1), (1, H, W), (1, 1, H, W), or gray stored as colour."""
    shape = samples.shape
    if samples.ndim == 3 and shape[2] in (2, 4):
        samples = samples[:, :, : shape[2] - 1]
    if samples.ndim == 3 and samples.shape[2] == 3:
        if not np.array_equal(samples.max(axis=2), samples.min(axis=2), equal_nan=True):
            raise ValueError(
                f"{name} is a colour picture (its channels differ); wanted one disparity per "
                "pixel. A colour-mapped view cannot be turned back: export the map as 16-bit gray "
                "PNG or npy."
            )
        samples = samples[:, :, :1]
    if samples.ndim == 3 and samples.shape[2] == 1:
        samples = samples[:, :, 0]
    while samples.ndim > 2 and samples.shape[0] == 1:
        samples = samples[0]
    if samples.ndim != 2 or 0 in samples.shape:
        raise ValueError(f"{name} has shape {shape}; wanted one disparity per pixel, (H, W).")
    return samples


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
        with _reading(Path(getattr(image, "filename", "") or "The image")):
            samples = _picture_samples(image, "The image")
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
    return _three_channels(_unit_range(batch, "The image tensor"), "The image tensor")


def as_disparity_batch(
    disparity: Any, batch_size: int, height: int, width: int, metric: bool = False
) -> torch.Tensor:
    """Returns (B, 1, H, W) float32 disparity, larger is nearer, checked against the photographs.

    Unknown pixels (NaN, infinity, masked) are filled by :func:`fill_holes`, with a ``UserWarning``
    that says how many they were. One map serves a whole batch.

    Args:
        disparity: a path; a Pillow picture; a numpy array or torch tensor (H, W), (1, H, W), (B, H,
            W) or (B, 1, H, W) (numpy also with the channel last); or a list of these. Floats, or
            uint8 and uint16, which are divided by the largest value of their type.
        batch_size, height, width: of the photographs.
        metric: the map is in 1/metres, and only has to be not negative; else it has to lie in [0,
            1].

    Raises:
        FileNotFoundError: a path leads to no file.
        ValueError: another type, shape, size or range; no known pixel at all.
    """
    values = _stacked_disparity(disparity, (height, width), metric)
    if values.shape[0] not in (1, batch_size):
        raise ValueError(
            f"There are {values.shape[0]} disparity maps for {batch_size} photographs; wanted one "
            "for each, or one for all."
        )
    _check_disparity_size(tuple(values.shape[-2:]), (height, width))
    known = torch.isfinite(values.detach())
    if not bool(known.flatten(1).any(dim=1).all()):
        raise ValueError(
            "This disparity has no known pixel at all (every value is NaN or infinite); wanted a "
            "map in which at least part of the picture is measured."
        )
    _check_disparity_range(values.detach()[known], metric)
    if not bool(known.all()):
        share = 100 * float((~known).to(torch.float64).mean())
        values = fill_holes(values)
        warnings.warn(
            f"{share:.3g} % of the disparity map is unknown (NaN or infinite) and was filled from "
            "the farther side.",
            InputRepairedWarning,
            stacklevel=2,
        )
    values = values.clamp(min=0) if metric else values.clamp(0, 1)
    return values.expand(batch_size, 1, height, width)


def _stacked_disparity(disparity: Any, size: tuple[int, int], metric: bool) -> torch.Tensor:
    """Gives (B, 1, H, W) float32 from every accepted kind, before the values are checked."""
    if isinstance(disparity, (list, tuple)) and disparity and not np.isscalar(disparity[0]):
        maps = [_stacked_disparity(item, size, metric) for item in disparity]
        for item in maps:
            _check_disparity_size(tuple(item.shape[-2:]), size)
        return torch.cat(maps)
    if isinstance(disparity, (str, os.PathLike)):
        return read_disparity(disparity)
    if isinstance(disparity, Image.Image):
        with _reading(Path("The disparity map")):
            samples = _picture_samples(disparity, "The disparity map")
        values = torch.from_numpy(_native(_one_channel(samples, "The disparity map")))
    elif isinstance(disparity, np.ma.MaskedArray):
        scale = np.iinfo(disparity.dtype).max if disparity.dtype in (np.uint8, np.uint16) else 1
        unmasked = np.ma.filled(disparity.astype(np.float32) / scale, np.nan)
        return _stacked_disparity(unmasked, size, metric)
    elif isinstance(disparity, np.ndarray):
        if disparity.dtype.kind not in "uifb":
            raise ValueError(f"The disparity map holds {disparity.dtype} values; wanted floats.")
        values = torch.from_numpy(_native(disparity))
        if values.ndim in (3, 4) and values.shape[-1] == 1 and tuple(values.shape[-3:-1]) == size:
            values = values[..., 0]
    elif isinstance(disparity, torch.Tensor):
        values = disparity
    else:
        raise ValueError(
            f"The disparity map is of type {type(disparity).__name__}; wanted a path, a numpy "
            "array or torch tensor (H, W) or (B, 1, H, W), or a Pillow picture."
        )
    if values.ndim == 2:
        values = values[None, None]
    elif values.ndim == 3:
        if values.shape[-1] == 3 and values.shape[0] != 3:
            raise ValueError(
                f"The disparity map has shape {tuple(values.shape)}, a colour picture; wanted one "
                "disparity per pixel, (H, W)."
            )
        values = values[:, None]
    if values.ndim != 4 or values.shape[1] != 1 or 0 in values.shape:
        raise ValueError(
            f"The disparity map has shape {tuple(disparity.shape)}; wanted (H, W) or (B, 1, H, W), "
            f"here with H, W = {size[0]}, {size[1]}."
        )
    if values.dtype in (torch.uint8, torch.uint16):
        if metric:
            raise ValueError(
                f"The disparity map holds {_type_name(values)} values; wanted floats in 1/metres, "
                "because whole numbers carry no unit. Convert them yourself."
            )
        return values.to(torch.float32) / torch.iinfo(values.dtype).max
    if not values.is_floating_point():
        raise ValueError(
            f"The disparity map holds {_type_name(values)} values; wanted floats in [0, 1], uint8 "
            "or uint16. Convert it to float and scale it."
        )
    return values.to(torch.float32)


def _check_disparity_size(came: tuple[int, ...], wanted: tuple[int, int]) -> None:
    if came == wanted:
        return
    if came == wanted[::-1]:
        hint = (
            "Its sides are swapped: it was probably computed before the photograph was turned "
            "upright (EXIF orientation); turn it by 90 degrees."
        )
    elif abs(came[0] * wanted[1] / (came[1] * wanted[0]) - 1) < 0.02:
        hint = (
            "Resize it to the photograph: torch.nn.functional.interpolate(disparity, "
            f"size=({wanted[0]}, {wanted[1]}), mode='bilinear'); its values stay."
        )
    else:
        hint = "Its shape is different too: it seems to belong to another picture or crop."
    raise ValueError(
        f"The disparity map is {came[1]} x {came[0]} pixels (width x height), the photograph "
        f"{wanted[1]} x {wanted[0]}; wanted the same size. {hint}"
    )


def _check_disparity_range(known: torch.Tensor, metric: bool) -> None:
    # Adding zero turns -0 into 0.
    low, high = float(known.min()) + 0.0, float(known.max()) + 0.0
    came = f"The disparity map has values from {low:.4g} to {high:.4g}"
    if low < -RANGE_TOLERANCE:
        negative = known[known < 0]
        if bool((negative == negative[0]).all()):
            hint = f"If {low:g} marks unknown pixels, set them to NaN and they will be filled."
        else:
            hint = "If it is inverted or shifted, bring it to larger-is-nearer, starting at 0."
        raise ValueError(f"{came}; wanted no negative values: 0 is the farthest. {hint}")
    if metric and high > LARGEST_METRIC_DISPARITY:
        raise ValueError(
            f"{came}; wanted 1/metres, in which {LARGEST_METRIC_DISPARITY:g} is one centimetre "
            "from the lens. If it is depth in millimetres, pass 1000 / depth; if it is stereo "
            "disparity in pixels, bring it to [0, 1] with bokehdiff.normalise_disparity and leave "
            "metric=False."
        )
    if not metric and high > 1 + RANGE_TOLERANCE:
        if high <= 255 and bool((known == known.round()).all()):
            hint = "If it is in 0..255, divide by 255; if "
        else:
            hint = "If "
        raise ValueError(
            f"{came}; wanted [0, 1], larger is nearer. {hint}it is disparity in pixels or any "
            "other unit, use bokehdiff.normalise_disparity (--normalise on the command line); if "
            "it is in 1/metres, say metric=True; if it is depth (metres, millimetres), invert it "
            "first with bokehdiff.depth_to_disparity."
        )


def fill_holes(disparity: torch.Tensor) -> torch.Tensor:
    """Returns the map with every NaN or infinite pixel replaced by the disparity of the farther
    side.

    What a measurement misses is mostly background, hidden from one of its eyes by the thing before
    it. So an unknown pixel takes the **smallest** of the nearest known disparities to its left,
    right, top and bottom. Differentiable in the known pixels.

    Args:
        disparity: (B, 1, H, W), larger is nearer.

    Raises:
        ValueError: an image has no known pixel.
    """
    known = torch.isfinite(disparity.detach())
    if not bool(known.flatten(1).any(dim=1).all()):
        raise ValueError("This disparity has no known pixel to fill from; wanted at least one.")
    # A pixel with nothing known in its whole row and column is reached in the second round.
    while not bool(known.all()):
        farthest = torch.full_like(disparity, torch.inf)
        for axis in (-1, -2):
            for reverse in (False, True):
                farthest = torch.minimum(farthest, _nearest_known(disparity, known, axis, reverse))
        disparity = torch.where(known, disparity, farthest)
        known = torch.isfinite(disparity.detach())
    return disparity


def _nearest_known(
    values: torch.Tensor, known: torch.Tensor, axis: int, reverse: bool
) -> torch.Tensor:
    """The last known value before each pixel along an axis (after it if `reverse`), or inf."""
    if reverse:
        values, known = values.flip(axis), known.flip(axis)
    length = values.shape[axis]
    position = torch.arange(length, device=values.device)
    position = position[:, None] if axis == -2 else position
    last = torch.where(known, position, -1).cummax(dim=axis).values
    nearest = torch.where(known, values, 0).gather(axis, last.clamp(min=0))
    nearest = torch.where(last >= 0, nearest, torch.inf)
    return nearest.flip(axis) if reverse else nearest


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
    file = _file_to_write(path, WRITABLE_SUFFIXES, overwrite)
    batch = as_image_batch(image)
    if batch.shape[0] != 1:
        raise ValueError(f"There are {batch.shape[0]} images for one file; wanted one for each.")
    suffix = file.suffix.lower()
    if suffix in LINEAR_LIGHT_SUFFIXES:
        _write_whole(file, _encode_floats(srgb_to_linear(batch), file))
        return file
    pixels = batch[0].detach().permute(1, 2, 0).cpu()
    encoded = io.BytesIO()
    if suffix == ".npy":
        np.save(encoded, pixels.numpy())
    else:
        picture = Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())
        picture_format, options = PICTURE_FORMATS[suffix]
        picture.save(encoded, format=picture_format, **options)
    _write_whole(file, encoded.getvalue())
    return file


def write_linear_image(path: PathLike, light: torch.Tensor, overwrite: bool = False) -> Path:
    """Writes linear light, highlights and all; returns its path. The suffix decides the format.

    ``.exr``, ``.tif``, ``.tiff`` and ``.npy`` hold float32 and lose nothing; ``.hdr`` keeps 8 bits
    of the brightest channel and a common exponent. All but ``.npy`` need
    ``pip install 'bokehdiff[hdr]'``. The file appears complete or not at all.

    Args:
        path: where to; its folder has to exist.
        light: (1, 3, H, W) or (3, H, W) linear light, finite and not negative.
        overwrite: replace a file that is there.

    Raises:
        FileExistsError: the file is there, and `overwrite` is False.
        FileNotFoundError: the folder does not exist.
        ValueError: unknown suffix, another shape, values that are no light, or the package is
            missing.
    """
    file = _file_to_write(path, FLOAT_SUFFIXES, overwrite)
    batch = light[None] if light.ndim == 3 else light
    if batch.ndim != 4 or batch.shape[:2] != (1, 3) or not batch.is_floating_point():
        raise ValueError(
            f"light is {tuple(light.shape)} of {_type_name(light)}; wanted one picture of floats, "
            "(1, 3, H, W)."
        )
    if not bool(torch.isfinite(batch).all()) or bool((batch < 0).any()):
        raise ValueError(
            "light has NaN, infinite or negative values; wanted finite values from 0 up."
        )
    _write_whole(file, _encode_floats(batch, file))
    return file


def _file_to_write(path: PathLike, suffixes: Sequence[str], overwrite: bool) -> Path:
    """Gives the path if it can be written to with one of these suffixes."""
    file = Path(path).expanduser()
    suffix = file.suffix.lower()
    if suffix not in suffixes:
        raise ValueError(
            f"{file.name} ends in {suffix or 'no suffix'}; wanted one of {', '.join(suffixes)}."
        )
    if not file.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {file.parent}; create it first.")
    if file.exists() and not overwrite:
        raise FileExistsError(
            f"{file} exists already; wanted a new file. Choose another name, or pass "
            "overwrite=True (--force on the command line)."
        )
    return file


def _encode_floats(light: torch.Tensor, file: Path) -> bytes:
    """Gives the bytes of a file like `file` that holds (1, 3, H, W) linear light as float32."""
    pixels = light[0].detach().permute(1, 2, 0).to("cpu", torch.float32).numpy()
    if file.suffix.lower() == ".npy":
        encoded = io.BytesIO()
        np.save(encoded, pixels)
        return encoded.getvalue()
    image_io = open_image_io(file.name)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / f"light{file.suffix.lower()}"
        height, width, channels = pixels.shape
        output = image_io.ImageOutput.create(str(whole))
        description = image_io.ImageSpec(width, height, channels, image_io.FLOAT)
        description["compression"] = "zip"
        complete = (
            output is not None
            and output.open(str(whole), description)
            and output.write_image(np.ascontiguousarray(pixels))
            and output.close()
        )
        if not complete:
            reason = output.geterror() if output is not None else image_io.geterror()
            raise OSError(f"{file.name} could not be encoded ({reason}).")
        return whole.read_bytes()


def _write_whole(file: Path, data: bytes) -> None:
    """Writes beside the target and renames, so that an interrupted write leaves no half a file."""
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem}-")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
        # mkstemp makes files private; results get the permissions any new file would have.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


ImageInput = PathLike | Image.Image | np.ndarray | torch.Tensor | Sequence[Any]
"""What :func:`as_image_batch` and :func:`as_disparity_batch` take."""

"""The samples of picture files, upright: what every reader of pictures shares."""

from __future__ import annotations

import contextlib
import io
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError

from .whole_files import PathLike

TIFF_SUFFIXES = (".tif", ".tiff")
HEIF_SUFFIXES = (".heic", ".heif")


class InputRepairedWarning(UserWarning):
    """Part of a photograph or a disparity map was repaired, or could not be kept; the message says
    what and how much."""


def note(sentence: str) -> None:
    """Warns of what was repaired, or could not be kept."""
    warnings.warn(sentence, InputRepairedWarning, stacklevel=4)


# Rounding of resampled or half-precision values around the ends of a range; clamped, not refused.


def existing_file(path: PathLike, what: str) -> Path:
    file = Path(path).expanduser()
    if not file.exists():
        raise FileNotFoundError(f"There is no file {file}; wanted the {what} to read.")
    if file.is_dir():
        raise ValueError(f"{file} is a folder; wanted one {what} file.")
    if file.stat().st_size == 0:
        raise ValueError(f"{file.name} is empty (0 bytes); wanted a {what}. Copy the file again.")
    return file


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turns what decoders raise on foreign and broken files into one sentence."""
    try:
        yield
    except UnidentifiedImageError:
        if file.suffix.lower() in HEIF_SUFFIXES:
            raise ValueError(
                f"{file.name} is a HEIF picture, which is not read here; read_photograph reads it. "
                "Or export it as JPEG."
            ) from None
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


def load_numpy(file: Path) -> np.ndarray:
    try:
        loaded = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{file.name} cannot be read as a numpy file ({error}); wanted an array saved with "
            "numpy.save, without Python objects."
        ) from None
    return loaded if isinstance(loaded, np.ndarray) else dict(loaded)  # type: ignore[return-value]


def picture_file_samples(file: Path) -> np.ndarray:
    """Gives the upright samples of a picture file: (H, W) or (H, W, C), 8 or 16 bit or float.

    Colours come as sRGB, and with 8 bits where the file has another profile.
    """
    with open_picture(file) as picture:
        if picture is None or is_unusual_tiff(picture):
            return unusual_tiff_samples(file)
        if has_sixteen_bits(picture):
            profile = _foreign_profile_name(picture)
            if profile is None:
                return sixteen_bit_samples(file)[0]
            warnings.warn(
                f"{file.name} has 16 bits per channel and the colour profile {profile!r}: it was "
                "converted to sRGB at 8 bits. read_photograph keeps the profile and all 16.",
                InputRepairedWarning,
                stacklevel=4,
            )
        return picture_samples(picture, file.name)


@contextlib.contextmanager
def open_picture(file: Path) -> Iterator[Image.Image | None]:
    """A picture file, opened by Pillow; None for a TIFF of a layout that Pillow lacks."""
    try:
        picture: Image.Image = Image.open(file)
    except UnidentifiedImageError:
        if file.suffix.lower() not in TIFF_SUFFIXES:
            raise
        yield None
        return
    except TypeError as error:  # a TIFF that does not say its size
        raise SyntaxError(str(error)) from None
    with picture:
        yield picture


def is_unusual_tiff(picture: Image.Image) -> bool:
    """Whether a TIFF has 16-bit samples plane by plane, or multiplied by their opacity."""
    tags = getattr(picture, "tag_v2", {})
    deep = max(tags.get(258, (8,))) > 8
    return deep and (tags.get(284) == 2 or tags.get(338, (0,))[0] == 1)


def has_sixteen_bits(picture: Image.Image) -> bool:
    """Whether a picture in colour or with transparency has 16 bits, of which Pillow keeps 8."""
    tiles = getattr(picture, "tile", [])
    return picture.mode in ("RGB", "RGBA") and any(_raw_mode(t)[-4:-1] == ";16" for t in tiles)


def _raw_mode(tile: Any) -> str:
    """The sample layout named in one of Pillow's tiles: (decoder, box, offset, arguments)."""
    arguments = tile[3]
    raw_mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return raw_mode if isinstance(raw_mode, str) else ""


def sixteen_bit_samples(file: Path) -> tuple[np.ndarray, dict[Any, Any]]:
    """Gives all 16 bits of a colour picture, upright, and what else Pillow finds in the file.

    Pillow keeps the first byte of a big-endian sample ("16B") and the second of a little-endian one
    ("16L"). Decoding the same file under both names gives both bytes.
    """
    data = file.read_bytes()
    if data[12:16] == b"IHDR" and data[24:26] == b"\x10\x04":
        return _sixteen_bit_gray_alpha(data)
    samples = np.empty(0, np.uint16)
    for order in "BL":
        with Image.open(io.BytesIO(data)) as picture:
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
            pixels = np.asarray(picture)
        if not samples.size:
            samples = np.empty((*pixels.shape, 2), np.uint8)
        if stored_order == "N":
            stored_order = "L" if sys.byteorder == "little" else "B"
        # The high byte goes first or last, as this machine has it.
        is_high = order == stored_order
        samples[..., int(is_high == (sys.byteorder == "little"))] = pixels
    samples = samples.view(np.uint16)[..., 0]
    transparent = picture.info.get("transparency")
    if isinstance(transparent, tuple):
        seen = (samples != np.array(transparent, np.uint16)).any(axis=2)
        samples = np.dstack([samples, seen * np.uint16(65535)])
    return _upright(samples, picture), picture.info


def _sixteen_bit_gray_alpha(data: bytes) -> tuple[np.ndarray, dict[Any, Any]]:
    """Gives a PNG of 16-bit gray and opacity, by reading its 4 bytes a pixel as 8-bit colour."""
    header = data[12:24] + b"\x08\x06" + data[26:29]
    checksum = zlib.crc32(header).to_bytes(4, "big")
    with Image.open(io.BytesIO(data[:12] + header + checksum + data[33:])) as picture:
        picture.load()
        pixels = np.asarray(picture)
    return _upright(pixels.view(">u2").astype(np.uint16), picture), picture.info


def unusual_tiff_samples(file: Path) -> np.ndarray:
    """Reads, upright, the TIFF layouts Pillow lacks: float colour, and 16-bit colour in separate
    planes or multiplied by its opacity."""
    try:
        import tifffile
    except ImportError:
        raise ValueError(
            f"{file.name} is a TIFF with float, premultiplied or plane-by-plane samples, which "
            "needs the tifffile package: pip install 'bokehdiff[data]', or export it as an "
            "ordinary 16-bit TIFF."
        ) from None
    try:
        samples = np.asarray(tifffile.imread(file))
        with tifffile.TiffFile(file) as tiff:
            page = tiff.pages[0]
            premultiplied = tuple(page.extrasamples)[:1] == (1,)
            orientation = page.tags.valueof(274, 1)
    except Exception as error:  # tifffile's errors have no common base
        raise ValueError(
            f"{file.name} cannot be read as TIFF ({error}); wanted a complete picture. Export "
            "it again."
        ) from None
    if samples.ndim == 3 and samples.shape[0] in (3, 4) and samples.shape[2] not in (1, 3, 4):
        samples = np.moveaxis(samples, 0, 2)
    if premultiplied and samples.dtype == np.uint16 and samples.ndim == 3:
        opacity = np.maximum(samples[:, :, -1:], 1).astype(np.float32) / 65535
        colours = (samples[:, :, :-1] / opacity + 0.5).clip(0, 65535).astype(np.uint16)
        samples = np.dstack([colours, samples[:, :, -1:]])
    return _turned(samples, orientation)


def picture_samples(picture: Image.Image, name: str, to_srgb: bool = True) -> np.ndarray:
    """Gives the upright samples of a Pillow picture, (H, W) or (H, W, C).

    Colours come as sRGB, or as they are stored (8-bit RGB and gray only).
    """
    picture.load()
    original = picture
    is_deep = picture.mode.startswith("I;16")
    has_key = "transparency" in picture.info and not is_deep
    if picture.mode == "P":
        picture = picture.convert("RGBA" if has_key else "RGB")
    elif picture.mode in ("L", "LA", "La") and not to_srgb:
        picture = picture.convert("LA") if has_key or picture.mode == "La" else picture
    elif picture.mode in ("PA", "LA", "La", "RGBa") or has_key:
        picture = picture.convert("RGBA")
    elif picture.mode == "1":
        picture = picture.convert("L")
    if is_deep:
        samples = np.asarray(picture).astype(np.uint16)
        if "transparency" in picture.info:
            seen = samples != picture.info["transparency"]
            samples = np.dstack([samples, seen * np.uint16(65535)])
        if getattr(original, "tag_v2", {}).get(262) == 0:  # white is zero
            samples = 65535 - samples
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
    elif picture.mode == "RGBA" and to_srgb:
        colours = _to_srgb(picture.convert("RGB"), original, name)
        samples = np.dstack([np.asarray(colours), np.asarray(picture.getchannel("A"))])
    elif to_srgb:
        samples = np.asarray(_to_srgb(picture, original, name))
    else:
        kept = picture.mode in ("L", "LA", "RGB", "RGBA")
        samples = np.asarray(picture if kept else picture.convert("RGB"))
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
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        orientation = 1
    return _turned(samples, orientation)


def _turned(samples: np.ndarray, orientation: int) -> np.ndarray:
    if orientation in (5, 6, 7, 8):
        samples = samples.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        samples = samples[:, ::-1]
    if orientation in (3, 4, 7, 8):
        samples = samples[::-1]
    return samples


def native(array: np.ndarray) -> np.ndarray:
    """A contiguous, writable copy in this machine's byte order, which is what torch can take."""
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")


def type_name(values: torch.Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")

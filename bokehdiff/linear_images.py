"""Photographs in linear light, with highlights beyond white: reading and writing."""

from __future__ import annotations

import io
import tempfile
import warnings
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from .picture_files import InputRepairedWarning, existing_file, load_numpy, native, type_name
from .srgb import linear_to_srgb
from .whole_files import PathLike, file_to_write, write_whole

# OpenEXR and Radiance: these files always hold linear light.
LINEAR_LIGHT_SUFFIXES = (".exr", ".hdr")
# Files that can hold linear light; in the last three, only the person who made them knows.
FLOAT_SUFFIXES = (*LINEAR_LIGHT_SUFFIXES, ".tif", ".tiff", ".npy")


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
    file = existing_file(path, "photograph")
    suffix = file.suffix.lower()
    if suffix not in FLOAT_SUFFIXES:
        raise ValueError(
            f"{file.name} has no highlights beyond white; wanted linear light in a file ending in "
            f"{', '.join(FLOAT_SUFFIXES)}. Read it as an ordinary photograph (without --highlights "
            "hdr on the command line)."
        )
    samples = _float_array(file) if suffix == ".npy" else float_file_samples(file)[0]
    values = torch.from_numpy(native(samples)).to(torch.float32).permute(2, 0, 1)[None]
    return repaired_light(values, file.name)


def _float_array(file: Path) -> np.ndarray:
    """Gives the (H, W, 1) or (H, W, 3) floats of a numpy file."""
    samples = load_numpy(file)
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


def float_file_samples(file: Path) -> tuple[np.ndarray, Any]:
    """Gives the upright samples of an OpenEXR, Radiance or TIFF file, (H, W, C), C = 1 to 4, and
    OpenImageIO's description of the file.

    The last of 2 and 4 channels is the opacity, by which the others are multiplied.
    """
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
        wanted += [name for name in "A" if name in names and len(names) > 1]
    else:
        raise ValueError(
            f"{file.name} has the channels {', '.join(names)}; wanted R, G and B, or Y. Export the "
            "picture itself."
        )
    buffer = image_io.ImageBufAlgo.reorient(buffer)
    # What lies beyond the display window goes; what is missing in it is black.
    buffer = image_io.ImageBufAlgo.cut(buffer, buffer.roi_full)
    samples = buffer.get_pixels(image_io.FLOAT)
    if names != wanted:
        samples = samples[:, :, [names.index(name) for name in wanted]]
    return samples, buffer.spec()


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


def repaired_light(values: torch.Tensor, name: str) -> torch.Tensor:
    """Checks (1, 1 to 4, H, W) linear light; gives three channels, none of them negative."""
    unknown = int((~torch.isfinite(values)).sum())
    if unknown:
        raise ValueError(
            f"{name} has {unknown} NaN or infinite values; wanted finite linear light. Repair the "
            "picture first (numpy.nan_to_num, or interpolate)."
        )
    if values.shape[1] in (2, 4):
        transparent = float((values[:, -1] < 1).to(torch.float32).mean())
        if transparent > 0:
            # The samples of these files come multiplied by their opacity.
            warnings.warn(
                f"{name} is transparent in {100 * transparent:.3g} % of its pixels, which were "
                "laid over black. Flatten it over a background of your choice to decide "
                "otherwise.",
                InputRepairedWarning,
                stacklevel=3,
            )
        values = values[:, :-1]
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


def cut_off_at_white(light: torch.Tensor, name: str) -> torch.Tensor:
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
    file = file_to_write(path, FLOAT_SUFFIXES, overwrite)
    batch = light[None] if light.ndim == 3 else light
    if batch.ndim != 4 or batch.shape[:2] != (1, 3) or not batch.is_floating_point():
        raise ValueError(
            f"light is {tuple(light.shape)} of {type_name(light)}; wanted one picture of floats, "
            "(1, 3, H, W)."
        )
    if not bool(torch.isfinite(batch).all()) or bool((batch < 0).any()):
        raise ValueError(
            "light has NaN, infinite or negative values; wanted finite values from 0 up."
        )
    write_whole(file, encode_floats(channels_last(batch), file))
    return file


def channels_last(light: torch.Tensor) -> np.ndarray:
    """(H, W, C) float32 from one picture (1, C, H, W)."""
    return light[0].detach().permute(1, 2, 0).to("cpu", torch.float32).contiguous().numpy()


def encode_floats(
    pixels: np.ndarray, file: Path, chromaticities: tuple[float, ...] | None = None
) -> bytes:
    """Gives the bytes of a file like `file` that holds (H, W, C) linear light as float32.

    C is 1 (gray), 3, or one more for the opacity, by which the others are multiplied. In OpenEXR
    files the primaries are named, if they are given: x and y of red, green, blue and white.
    """
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
        names = ("Y", "A") if channels <= 2 else ("R", "G", "B", "A")
        description.channelnames = names[:channels]
        if channels in (2, 4):
            description.alpha_channel = channels - 1
        if chromaticities is not None:
            eight_floats = image_io.TypeDesc("float[8]")
            description.attribute("chromaticities", eight_floats, chromaticities)
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

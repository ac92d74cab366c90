"""Disparity maps: reading, checking against photographs, filling what is unknown."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

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
from .whole_files import PathLike

# Rounding of resampled or half-precision values around the ends of a range; clamped, not refused.
RANGE_TOLERANCE = 1e-3

# Nearer than this (1/metres) no photograph focuses: such numbers are millimetres, or stereo pixels.
LARGEST_METRIC_DISPARITY = 100.0


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
    file = existing_file(path, "disparity map")
    suffix = file.suffix.lower()
    if suffix in (".npy", ".npz"):
        samples = _disparity_array(load_numpy(file), file.name)
    elif suffix == ".pfm":
        samples = _read_pfm(file)
    else:
        with reading(file):
            samples = picture_file_samples(file)
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
        with reading(Path("The disparity map")):
            samples = picture_samples(disparity, "The disparity map")
        values = torch.from_numpy(native(_one_channel(samples, "The disparity map")))
    elif isinstance(disparity, np.ma.MaskedArray):
        scale = np.iinfo(disparity.dtype).max if disparity.dtype in (np.uint8, np.uint16) else 1
        unmasked = np.ma.filled(disparity.astype(np.float32) / scale, np.nan)
        return _stacked_disparity(unmasked, size, metric)
    elif isinstance(disparity, np.ndarray):
        if disparity.dtype.kind not in "uifb":
            raise ValueError(f"The disparity map holds {disparity.dtype} values; wanted floats.")
        values = torch.from_numpy(native(disparity))
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
                f"The disparity map holds {type_name(values)} values; wanted floats in 1/metres, "
                "because whole numbers carry no unit. Convert them yourself."
            )
        return values.to(torch.float32) / torch.iinfo(values.dtype).max
    if not values.is_floating_point():
        raise ValueError(
            f"The disparity map holds {type_name(values)} values; wanted floats in [0, 1], uint8 "
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

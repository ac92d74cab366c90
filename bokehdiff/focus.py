"""Which plane, or which range of depth, is in focus: chosen in the picture, answered in disparity.

:func:`find_focus` takes what people point at: a pixel, a box, a mask, ``"auto"`` or ``"sharpest"``.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .autofocus import central_subject, sharpest_disparity
from .picture_files import (
    existing_file,
    load_numpy,
    native,
    picture_file_samples,
    picture_samples,
    reading,
)

__all__ = ["find_focus", "focus_disparity_at"]

KINDS_OF_FOCUS = (
    "a pixel (x, y), a box (x0, y0, x1, y1), a mask as large as the photograph (array, tensor, "
    "Pillow picture or path), 'auto' or 'sharpest'"
)

# What deviates from the median of a box by more belongs to something else: three standard
# deviations, told by the median deviation, which for a normal distribution is 1.4826 times smaller.
LARGEST_DEVIATION = 3 * 1.4826


def find_focus(
    disparity: torch.Tensor,
    focus: Any,
    *,
    image: torch.Tensor | None = None,
    whole: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (low, high), each (B,) float32: the disparities between which all is in focus.

    They are equal for one plane, whose disparity is

    - at a pixel ``(x, y)``: the median of the 5 x 5 pixels around it;
    - in a box ``(x0, y0, x1, y1)``, columns x0 <= x < x1 and rows y0 <= y < y1, or a mask: the
      median;
    - with ``"auto"``: the median of the nearest large connected region near the centre
      (:func:`~bokehdiff.autofocus.central_subject`);
    - with ``"sharpest"``, for a photo that is shallow already: where it is sharp
      (:func:`~bokehdiff.autofocus.sharpest_disparity`).

    With ``whole`` low and high are the ends of the subject in the box, the mask or the region of
    ``"auto"`` (at most an eighth of the depth of the scene): the 5th and the 95th percentile, each
    moved outwards by an eighteenth of what lies between, but not beyond the farthest and nearest
    pixel. That is the whole range of a subject whose depth is spread evenly, such as a table, while
    a twentieth of its pixels may be wrong on either side, which maps are around outlines. In a box,
    what lies beyond three standard deviations (robust: 4.45 median deviations) from the median is
    left out first, as the background beside a face.

    Args:
        disparity: (B, 1, H, W), larger is nearer; unknown pixels (NaN) are left out.
        focus: one of the above for all photos, or a list with one per photo: lists are batches,
            tuples are pixels and boxes. Pixels are columns and rows from 0 at the top left; what of
            a box lies outside the photo is cut off. A mask marks what is more than half of its
            largest value (bool, whole numbers or floats; of a picture with transparency, its
            opacity); (B, 1, H, W) or (B, H, W) is one per photo.
        image: (B, 3, H, W) or one for all, the photos, display sRGB in [0, 1]; for ``"sharpest"``.
        whole: keep all of the subject in focus.

    Raises:
        FileNotFoundError: a path leads to no file.
        ValueError: a focus of another kind; a pixel or box outside the photo, a box with swapped
            corners; a mask of another size or an empty one; no known disparity there; nothing
            textured; ``"sharpest"`` without image; ``whole`` with a pixel or ``"sharpest"``.
    """
    if disparity.ndim != 4 or disparity.shape[1] != 1:
        raise ValueError(f"The disparity has shape {tuple(disparity.shape)}; wanted (B, 1, H, W).")
    batch_size = disparity.shape[0]
    maps = disparity.detach()[:, 0].to("cpu", torch.float32)
    ends = []
    for index, wish in enumerate(_one_per_photo(focus, batch_size)):
        if isinstance(wish, str) and wish == "sharpest":
            _refuse_whole(whole, "where it is sharp")
            plane = sharpest_disparity(maps[index], _photo(image, index, maps))
            ends.append((plane, plane))
        elif isinstance(wish, tuple) and len(wish) == 2:
            _refuse_whole(whole, "on a pixel")
            column, row = _numbers(wish)
            plane = focus_disparity_at(maps[index], column, row)
            ends.append((plane, plane))
        else:
            subject = _subject(maps[index], wish)
            if whole and isinstance(wish, tuple):
                subject = _without_surroundings(subject)
            ends.append(_robust_range(subject) if whole else (float(subject.median()),) * 2)
    low, high = torch.tensor(ends, dtype=torch.float32, device=disparity.device).unbind(dim=1)
    return low, high


def _one_per_photo(focus: Any, batch_size: int) -> list[Any]:
    if isinstance(focus, (np.ndarray, torch.Tensor)) and focus.ndim > 2:
        focus = list(focus) if len(focus) == batch_size > 1 else focus
    if not isinstance(focus, list):
        return [focus] * batch_size
    if len(focus) in (2, 4) and all(isinstance(one, (int, float)) for one in focus):
        raise ValueError(
            f"focus is the list {focus}; lists hold one focus per photograph. A pixel is a tuple "
            "(x, y), a box a tuple (x0, y0, x1, y1)."
        )
    if len(focus) != batch_size:
        raise ValueError(
            f"focus is a list of {len(focus)} for {batch_size} photographs; wanted one for each: "
            f"{KINDS_OF_FOCUS}."
        )
    return focus


def _refuse_whole(whole: bool, where: str) -> None:
    if whole:
        raise ValueError(
            f"A focus {where} is one plane, which has no subject to keep wholly sharp; give a box "
            "or a mask around the subject, or 'auto'."
        )


def _photo(image: torch.Tensor | None, index: int, maps: torch.Tensor) -> torch.Tensor:
    """The photograph (3, H, W) of a map, checked."""
    if image is None:
        raise ValueError(
            "focus='sharpest' looks for what is sharp in the photograph, which did not come: pass "
            "it as image, (B, 3, H, W)."
        )
    if image.ndim != 4 or image.shape[1] != 3 or image.shape[-2:] != maps.shape[-2:]:
        raise ValueError(
            f"image has shape {tuple(image.shape)}; wanted (B, 3, H, W) as large as the disparity, "
            f"{maps.shape[-2]} x {maps.shape[-1]} (height x width)."
        )
    if image.shape[0] not in (1, maps.shape[0]):
        raise ValueError(
            f"There are {image.shape[0]} photographs for {maps.shape[0]} disparity maps; wanted "
            "one for each, or one for all."
        )
    photo = image[index if image.shape[0] > 1 else 0]
    return photo.detach().to("cpu", torch.float32)


def _subject(disparity: torch.Tensor, wish: Any) -> torch.Tensor:
    """The known disparities (n,) of what a box, a mask or "auto" means in a map (H, W)."""
    if isinstance(wish, str) and wish == "auto":
        return central_subject(disparity)
    is_box = isinstance(wish, tuple)
    inside = (
        disparity[_box(wish, *disparity.shape)] if is_box else disparity[_mask(wish, disparity)]
    )
    known = inside[torch.isfinite(inside)]
    if known.numel() == 0:
        raise ValueError(
            f"The disparity within the {'box' if is_box else 'mask'} is unknown; choose a place "
            "with a known disparity, or fill the map first (bokehdiff.images.fill_holes)."
        )
    return known


def _numbers(focus: tuple[Any, ...]) -> tuple[float, ...]:
    is_number = [isinstance(one, (int, float, np.number)) and math.isfinite(one) for one in focus]
    if not all(is_number) or any(isinstance(one, bool) for one in focus):
        raise ValueError(
            f"focus is {focus}; wanted columns and rows of the photograph as numbers: a pixel "
            "(x, y) or a box (x0, y0, x1, y1)."
        )
    return tuple(float(one) for one in focus)


def _box(focus: tuple[Any, ...], height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of a box, as far as it lies in the picture."""
    numbers = _numbers(focus)
    if len(numbers) != 4:
        raise ValueError(
            f"focus is a tuple of {len(numbers)} numbers; wanted {KINDS_OF_FOCUS}, or a list with "
            "one of them per photograph."
        )
    left, top, right, bottom = numbers
    if right <= left or bottom <= top:
        raise ValueError(
            f"The focus box {focus} ends before it begins; wanted (x0, y0, x1, y1), the left top "
            "corner and then the right bottom one. A box of (x, y, width, height) is (x, y, x + "
            "width, y + height)."
        )
    if right - left < 1 or bottom - top < 1:
        raise ValueError(
            f"The focus box {focus} is smaller than a pixel; wanted pixels: multiply shares of the "
            f"picture by its {width} columns and {height} rows."
        )
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        raise ValueError(
            f"The focus box {focus} lies outside the picture of {width} x {height} pixels; wanted "
            "columns and rows of it."
        )
    rows = slice(max(math.floor(top), 0), math.ceil(bottom))
    return rows, slice(max(math.floor(left), 0), math.ceil(right))


def _mask(focus: Any, disparity: torch.Tensor) -> torch.Tensor:
    """The bool mask (H, W) that marks the subject."""
    samples = _mask_samples(focus)
    values = samples
    while values.ndim > 2 and values.shape[0] == 1:
        values = values[0]
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    height, width = disparity.shape
    if values.shape != (height, width):
        shape = tuple(values.shape)
        hint = " Its sides are swapped." if shape == (width, height) else ""
        raise ValueError(
            f"The focus mask has shape {shape}; wanted that of the photograph, {height} x {width} "
            f"(height x width).{hint} Resize it without smoothing."
        )
    if values.dtype.kind not in "buif":
        raise ValueError(f"The focus mask holds {values.dtype} values; wanted bool or numbers.")
    largest = values.max(initial=0, where=~np.isnan(values))
    if not largest > 0:
        raise ValueError(
            "The focus mask is empty: it marks no pixel. Mark the subject with True, 255 or 1."
        )
    return torch.from_numpy(native(values > largest / 2))


def _mask_samples(focus: Any) -> np.ndarray:
    """The numbers of a mask of any kind; (H, W) of pictures."""
    if isinstance(focus, torch.Tensor):
        return focus.detach().cpu().to(torch.float32).numpy()
    if isinstance(focus, np.ndarray):
        return focus
    if isinstance(focus, Image.Image):
        return _one_channel(picture_samples(focus, "The focus mask", to_srgb=False))
    if isinstance(focus, os.PathLike) or isinstance(focus, str) and Path(focus).suffix:
        file = existing_file(focus, "focus mask")
        if file.suffix.lower() == ".npy":
            return load_numpy(file)
        with reading(file):
            return _one_channel(picture_file_samples(file))
    came = repr(focus) if isinstance(focus, (str, int, float)) else f"a {type(focus).__name__}"
    raise ValueError(f"focus is {came}; wanted {KINDS_OF_FOCUS}.")


def _one_channel(samples: np.ndarray) -> np.ndarray:
    """(H, W) of a picture: its opacity if it has one, else its brightest channel."""
    if samples.ndim == 2:
        return samples
    opacity = samples[..., -1] if samples.shape[2] in (2, 4) else None
    if opacity is not None and opacity.min() < opacity.max():
        return opacity
    return samples[..., :3].max(axis=2) if samples.shape[2] > 2 else samples[..., 0]


def _without_surroundings(values: torch.Tensor) -> torch.Tensor:
    """The values (n,) around the median, without what a box holds beside the subject."""
    deviation = (values - values.median()).abs()
    return values[deviation <= LARGEST_DEVIATION * deviation.median()]


def _robust_range(values: torch.Tensor) -> tuple[float, float]:
    """The ends of (n,) values, of which a twentieth on each side may be wrong."""
    low, high = np.quantile(values.numpy(), (0.05, 0.95))
    beyond = (high - low) / 18
    return max(float(low - beyond), float(values.min())), min(
        float(high + beyond), float(values.max())
    )


def focus_disparity_at(disparity: torch.Tensor, x: float, y: float, window: int = 5) -> float:
    """Returns df for focus on a pixel: the median known disparity in a small window around it.

    Args:
        disparity: (1, 1, H, W), (1, H, W) or (H, W).
        x, y: column and row of the pixel, from 0 at the top left.
        window: side of the square window in pixels, cut at the border.

    Raises:
        ValueError: the point lies outside the picture, nothing is known there, or there is more
            than one map.
    """
    if disparity.numel() != disparity.shape[-1] * disparity.shape[-2]:
        raise ValueError(
            f"The disparity has shape {tuple(disparity.shape)}; wanted one map, (1, 1, H, W)."
        )
    height, width = disparity.shape[-2:]
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(
            f"The focus point ({x:g}, {y:g}) lies outside the picture of {width} x {height} "
            f"pixels; wanted x (column) from 0 to {width - 1} and y (row) from 0 to {height - 1}."
        )
    column, row, reach = int(x), int(y), window // 2
    around = disparity.detach().reshape(height, width)[
        max(row - reach, 0) : row + reach + 1, max(column - reach, 0) : column + reach + 1
    ]
    known = around[torch.isfinite(around)]
    if known.numel() == 0:
        raise ValueError(
            f"The disparity at the focus point ({x:g}, {y:g}) is unknown; choose a point with a "
            "known disparity, or fill the map first (bokehdiff.images.fill_holes)."
        )
    return float(known.median())

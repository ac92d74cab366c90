"""What depth from bokeh is asked with: frames, strengths and focus, checked at the door."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..images import ImageInput, as_image_batch
from ..stack_strengths import check_strengths

Strengths = float | Sequence[float] | Sequence[Sequence[float]] | np.ndarray | torch.Tensor
StackInput = ImageInput | Sequence[ImageInput]

__all__ = ["StackInput", "Strengths", "as_stack_batch", "focus_disparities", "strengths_per_photo"]


def as_stack_batch(stack: Any, photos: torch.Tensor) -> torch.Tensor:
    """Returns (B, N, 3, H, W) display-encoded sRGB in [0, 1]: N frames of each photo.

    Args:
        stack: of one photo: a list of N pictures, or anything
            :func:`bokehdiff.images.as_image_batch` takes, (N, 3, H, W). Of B photos: a list of B of
            these. Or a tensor or array of five axes.
        photos: (B, 3, H, W).

    Raises:
        FileNotFoundError: a path leads to no file.
        ValueError: no valid frames, of another size than the photo, or of another number.
    """
    is_array = isinstance(stack, (torch.Tensor, np.ndarray))
    if is_array and stack.ndim == 5 or isinstance(stack, (list, tuple)) and len(photos) > 1:
        if len(stack) != len(photos):
            raise ValueError(
                f"There are {len(stack)} stacks for {len(photos)} photos; wanted a stack for each."
            )
        stacks = [as_stack_batch(one, photos[:1]) for one in stack]
        counts = [one.shape[1] for one in stacks]
        if len(set(counts)) > 1:
            raise ValueError(
                f"The stacks have {', '.join(map(str, counts))} frames; wanted as many for each "
                "photo, or give the photos one by one."
            )
        return torch.cat(stacks)
    if len(photos) > 1:
        raise ValueError(
            f"There is one stack for {len(photos)} photos; wanted a list with a stack for each."
        )
    size = tuple(photos.shape[-2:])
    frames = []
    for number, one in enumerate(stack if isinstance(stack, (list, tuple)) else [stack]):
        pictures = as_image_batch(one)
        if tuple(pictures.shape[-2:]) != size:
            is_path = isinstance(one, (str, os.PathLike))
            name = f"{one}" if is_path else f"Frame {number + 1}"
            raise ValueError(
                f"{name} is {pictures.shape[-1]} x {pictures.shape[-2]} pixels (width x height), "
                f"the photo {size[1]} x {size[0]}; wanted frames of the size of the photo. Resize "
                "or crop them alike, and mind that K of a resized picture is multiplied by the "
                "factor."
            )
        frames.append(pictures.to(photos))
    if not frames:
        raise ValueError("The stack is empty; wanted at least one frame.")
    return torch.cat(frames)[None]


def strengths_per_photo(K: Any, photos: int, frames: int | None = None) -> torch.Tensor:
    """Returns the strengths as (photos, N) float32.

    Args:
        K: N numbers for every photo, or (photos, N) of them.
        photos: how many.
        frames: N; None if K decides it.

    Raises:
        ValueError: none, not finite, below zero, or another number than of frames.
    """
    try:
        several = np.ndim(_in_main_memory(K)) == 2
    except ValueError:  # rows of different lengths
        several = False
    rows = [check_strengths(row) for row in (K if several else [K])]
    if len(rows) not in (1, photos):
        raise ValueError(
            f"K has {len(rows)} rows of strengths for {photos} photos; wanted one row for all "
            "photos, or one for each."
        )
    count = len(rows[0])
    if frames is not None and count != frames:
        raise ValueError(
            f"There are {count} strengths K for {frames} frames; wanted one for each frame, in the "
            "same order, without the photo itself."
        )
    return torch.tensor(rows).expand(photos, count)


def focus_disparities(focus_distance_m: Any, frames: int) -> torch.Tensor:
    """Returns df of each frame in 1/metres, (frames,) float64.

    Args:
        focus_distance_m: metres, infinity included: one number, or one for each frame.
        frames: how many.

    Raises:
        ValueError: not positive, or another number of them.
    """
    wanted = (
        "wanted the metres at which the frames are in focus, above 0: one number, or one for each "
        "frame, for instance focus_distance_m=1.5"
    )
    try:
        distances = np.asarray(_in_main_memory(focus_distance_m), dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"focus_distance_m is {focus_distance_m!r}; {wanted}.") from None
    if distances.ndim > 1 or distances.size not in (1, frames):
        raise ValueError(
            f"focus_distance_m has {distances.size} numbers for {frames} frames; {wanted}."
        )
    if not bool((distances > 0).all()):
        raise ValueError(f"focus_distance_m is {focus_distance_m!r}; {wanted}.")
    return torch.from_numpy(1 / distances.reshape(-1)).expand(frames)


def _in_main_memory(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value

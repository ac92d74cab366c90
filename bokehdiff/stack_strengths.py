"""How strong each picture of a bokeh stack is blurred: numbers, or the f-numbers of a camera."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .camera import Camera, subject_distance_m
from .optics import require_positive


def check_strengths(K: Any) -> list[float]:
    """Returns the blur strengths of a photo as a list of at least one number.

    Raises:
        ValueError: none, not numbers, not finite, or below zero.
    """
    wanted = "wanted one number or a list of them, each 0 or more, for instance [10, 20, 30]"
    values = K.detach().cpu().numpy() if isinstance(K, torch.Tensor) else K
    try:
        numbers = np.asarray(values)
    except ValueError:
        raise ValueError(f"K is {K!r}; {wanted}.") from None
    if numbers.dtype.kind not in "iuf" or numbers.ndim > 1 or numbers.size == 0:
        raise ValueError(f"K is {K!r}; {wanted}.")
    strengths = [float(number) for number in numbers.reshape(-1)]
    if not all(math.isfinite(strength) and strength >= 0 for strength in strengths):
        raise ValueError(f"K is {K!r}; {wanted}.")
    return strengths


def strengths_of_camera(
    photo: Any,
    image_size: tuple[int, int],
    camera: Camera | None = None,
    f_numbers: float | Sequence[float] | None = None,
    focus_distance_m: float | None = None,
) -> list[float]:
    """Returns K for each f-number of a camera, pixels of blur radius per 1/metre of the photo.

    Args:
        photo: what was given as the photo, for its EXIF data.
        image_size: (height, width) of the photo.
        camera: default the one in the EXIF data.
        f_numbers: default the camera's own.
        focus_distance_m: distance of what is in focus; default that in the EXIF data.

    Raises:
        ValueError: something is neither given nor in the EXIF data.
    """
    if f_numbers is None:
        apertures: list[float | None] = [None]
    else:
        apertures = [float(one) for one in np.asarray(f_numbers, dtype=float).reshape(-1)]
        if not apertures:
            raise ValueError("f_numbers is empty; wanted at least one f-number, such as [2.8, 4].")
    has_exif = not isinstance(photo, (torch.Tensor, np.ndarray, list, tuple))
    if camera is None and not has_exif:
        raise ValueError(
            "Neither K nor a camera was given, and a photo that is an array has no EXIF data. Give "
            "K, for instance K=[10, 20, 30], or camera= and focus_distance_m=."
        )
    if focus_distance_m is None:
        focus_distance_m = subject_distance_m(photo) if has_exif else None
    if focus_distance_m is None:
        raise ValueError(
            "Neither K was given, nor the distance of what is in focus, which is not in the EXIF "
            "data of the photo. Give K, for instance K=[10, 20, 30], or focus_distance_m= "
            "(--focus-distance on the command line) with the camera or f-numbers to paint."
        )
    if camera is None:
        camera = Camera.from_photo(photo, f_number=apertures[0])
    require_positive("focus_distance_m", focus_distance_m, "2", infinity_allowed=True)
    cameras = [
        camera if aperture is None else dataclasses.replace(camera, f_number=aperture)
        for aperture in apertures
    ]
    return [one.strength(image_size, 1 / focus_distance_m, metric=True) for one in cameras]

"""How the lens is set for a picture: the plane in focus and the strength of the blur.

People say it in many ways: a disparity, a point, a face, "auto"; a strength K, or a camera.
:func:`choose_lens` turns all of them into one :class:`LensSetting`, which every renderer takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .camera import Camera
from .focus import find_focus
from .optics import (
    PerImage,
    check_focus_and_strength,
    collapse_focus_range,
    signed_defocus,
)

DEFAULT_STRENGTH = 20.0
"""K where neither K nor a camera is given: pixels of blur radius per unit of disparity."""


@dataclass(frozen=True)
class LensSetting:
    """Focus and blur of N pictures.

    Args:
        df: (N,) disparity of the plane in focus, in the unit of the map; where a range is in focus,
            its farther end.
        df_nearer: (N,) the nearer end of the range; equal to ``df`` for a plane.
        K: (N,) pixels of circle-of-confusion radius per unit of disparity.
    """

    df: torch.Tensor
    df_nearer: torch.Tensor
    K: torch.Tensor

    @property
    def count(self) -> int:
        """Number of pictures, N."""
        return self.df.shape[0]

    def to(self, device: torch.device | str) -> LensSetting:
        """The same setting on a device."""
        return LensSetting(*(part.to(device) for part in (self.df, self.df_nearer, self.K)))

    def part(self, first: int, last: int) -> LensSetting:
        """The setting of the pictures ``first`` to ``last - 1``."""
        return LensSetting(self.df[first:last], self.df_nearer[first:last], self.K[first:last])

    def in_one_plane(self, disparity: torch.Tensor) -> torch.Tensor:
        """The map (B, 1, H, W), B = N or 1, with all that is in focus at ``df``; see
        :func:`~bokehdiff.optics.collapse_focus_range`."""
        disparity = disparity.expand(self.count, -1, -1, -1)
        if bool((self.df == self.df_nearer).all()):
            return disparity
        return collapse_focus_range(disparity, self.df, self.df_nearer)

    def signed_defocus(self, disparity: torch.Tensor) -> torch.Tensor:
        """Signed circle-of-confusion radius in pixels, (N, 1, H, W), of a map (N or 1, 1, H, W)."""
        return signed_defocus(self.in_one_plane(disparity), self.df, self.K)


def check_lens_arguments(
    df: Any = None,
    K: Any = None,
    focus: Any = None,
    focus_range: Any = None,
    whole_subject: bool = False,
    camera: Camera | None = None,
    focus_distance_m: float | None = None,
) -> None:
    """Checks which arguments came together, before any work is done.

    Raises:
        ValueError: no focus, more than one, or blur said twice.
    """
    given = [
        name
        for name, value in (("df", df), ("focus", focus), ("focus_range", focus_range))
        if value is not None
    ]
    if len(given) != 1:
        came = f"{' and '.join(given)} were given" if given else "none was given"
        raise ValueError(
            f"What is in focus is said by one of df (a disparity), focus (a pixel (x, y), a box, a "
            f"mask, 'auto' or 'sharpest') and focus_range (disparities from, to); {came}."
        )
    if whole_subject and focus is None:
        raise ValueError(
            "whole_subject goes with focus, a box or a mask around the subject; a range of "
            "disparities is given as focus_range."
        )
    if camera is not None and not isinstance(camera, Camera):
        raise ValueError(
            f"camera is a {type(camera).__name__}; it must be a bokehdiff.Camera, for instance "
            "Camera(f_number=1.8, focal_length_mm=50)."
        )
    if camera is not None and K is not None:
        raise ValueError("K and a camera were both given; the blur is said by one of them.")
    if camera is None and focus_distance_m is not None:
        raise ValueError(
            "focus_distance_m goes with a camera (f_number, focal_length_mm); without one K is the "
            "blur."
        )


def choose_lens(
    disparity: torch.Tensor,
    *,
    df: PerImage | None = None,
    K: PerImage | None = None,
    focus: Any = None,
    focus_range: Sequence[PerImage] | None = None,
    whole_subject: bool = False,
    camera: Camera | None = None,
    focus_distance_m: float | None = None,
    farthest_distance_m: float = math.inf,
    metric: bool = False,
    image: torch.Tensor | None = None,
) -> LensSetting:
    """Focus and blur from what a person says.

    Args:
        disparity: (B, 1, H, W), checked; larger is nearer.
        df: disparity of the plane in focus; one number, or one per picture.
        K: pixels of blur radius per unit of disparity; one number, or one per picture.
        focus: a pixel ``(x, y)``, a box, a mask, ``"auto"`` or ``"sharpest"``, or a list with one
            of them per picture; see :func:`~bokehdiff.focus.find_focus`.
        focus_range: ``(from, to)``, disparities between which all is sharp; each one number, or one
            per picture.
        whole_subject: keep all of the box or mask sharp.
        camera: gives K instead; see :meth:`~bokehdiff.camera.Camera.strength`.
        focus_distance_m, farthest_distance_m: what relative disparity means in metres, for
            ``camera``.
        metric: disparity, df and focus_range are in 1/metres.
        image: (B, 3, H, W) the photos, for ``focus="sharpest"``.

    Returns:
        The setting of N pictures: N = B, or for one photo as many as there are values of focus and
        blur.

    Raises:
        ValueError: arguments that do not go together or cannot be meant.
    """
    check_lens_arguments(df, K, focus, focus_range, whole_subject, camera, focus_distance_m)
    batch_size = disparity.shape[0]
    far: Any
    near: Any
    if focus_range is not None:
        far, near = _ends(focus_range)
    elif focus is not None:
        several = batch_size == 1 and isinstance(focus, list) and len(focus) > 1
        maps = disparity.expand(len(focus), -1, -1, -1) if several else disparity
        far, near = find_focus(maps, focus, image=image, whole=whole_subject)
    else:
        far = near = df
    blur = DEFAULT_STRENGTH if K is None else K
    count = batch_size if batch_size > 1 else max(_number(value) for value in (far, near, blur))
    far, strength = check_focus_and_strength(far, blur, count, metric=metric)
    near, _ = check_focus_and_strength(near, blur, count, metric=metric)
    if bool((near < far).any()):
        raise ValueError(
            f"focus_range is {focus_range}; it goes from the farther to the nearer end, from the "
            "smaller to the larger disparity."
        )
    if camera is not None:
        # The middle of what is in focus is where the lens is set to.
        strength = camera.strength(
            tuple(disparity.shape[-2:]),
            (far + near) / 2,
            metric=metric,
            focus_distance_m=focus_distance_m,
            farthest_distance_m=farthest_distance_m,
        )
    return LensSetting(far, near, strength)


def _ends(focus_range: Sequence[PerImage]) -> tuple[PerImage, PerImage]:
    if (
        not isinstance(focus_range, (list, tuple, np.ndarray, torch.Tensor))
        or len(focus_range) != 2
    ):
        raise ValueError(
            f"focus_range is {focus_range!r}; wanted two disparities, (from, to), for instance "
            "(0.4, 0.6)."
        )
    return focus_range[0], focus_range[1]


def _number(value: PerImage | None) -> int:
    """How many values there are; what is no number is refused later."""
    if isinstance(value, torch.Tensor):
        return max(value.numel(), 1)
    return max(int(np.size(value)), 1) if isinstance(value, (Sequence, np.ndarray)) else 1

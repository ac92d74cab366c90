"""The lens of BokehFlow: what a caller says, as tensors, and what the network is told of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..optics import lens_strength

__all__ = [
    "Lens",
    "PerPhoto",
    "camera_vector",
    "check_camera",
    "nominal_camera",
    "nominal_metres",
    "per_photo",
]

LARGEST_FOCAL_LENGTH_MM = 200.0
LARGEST_F_NUMBER = 22.0
NEAREST_FOCUS_M = 0.3
"""What the camera that the network is told about is measured by."""

NOMINAL_DISPARITIES = (0.1, 1.0)
NOMINAL_FOCAL_LENGTH_MM = 50.0
NOMINAL_SENSOR_WIDTH_MM = 36.0
NOMINAL_F_NUMBERS = (0.5, 64.0)
"""Metres, and a camera, where nobody says any: see :func:`nominal_metres`."""

PerPhoto = float | Sequence[float] | torch.Tensor
"""One number, or one per photo, (B,)."""


class Lens(NamedTuple):
    """Of B photos, (B, 1, 1, 1): df in 1/metres, K in pixels metres, the largest radius in pixels;
    (B, 3) the camera as the network is told; and levels of the pyramid."""

    df: torch.Tensor
    K: torch.Tensor
    largest_radius: torch.Tensor
    camera: torch.Tensor
    levels: int

    def as_row(self) -> torch.Tensor:
        """(B, 5): what has to be equal for two frames to have the same lens."""
        return torch.cat([self.camera, self.df.flatten(1), self.K.flatten(1)], 1)


def nominal_metres(
    disparity: torch.Tensor, df: torch.Tensor, K: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(inverse depth in 1/m, df, K) of relative disparity, as if it reached from 10 m to 1 m.

    ``0.1 + 0.9 d`` and ``K / 0.9``, so that every radius stays what it was.
    """
    far, near = NOMINAL_DISPARITIES
    return far + (near - far) * disparity, far + (near - far) * df, K / (near - far)


def camera_vector(
    f_number: torch.Tensor, focal_length_mm: torch.Tensor, focus_distance_m: torch.Tensor
) -> torch.Tensor:
    """(B, 3): focal length over 200 mm, stops on a logarithmic scale to f/22, focus in dioptres
    over that of 0.3 m."""
    stops = torch.log2(f_number) / math.log2(LARGEST_F_NUMBER)
    dioptres = torch.clamp(1 / focus_distance_m, max=1 / NEAREST_FOCUS_M) * NEAREST_FOCUS_M
    return torch.stack([focal_length_mm / LARGEST_FOCAL_LENGTH_MM, stops, dioptres], 1)


def nominal_camera(df: torch.Tensor, K: torch.Tensor, photo_width: torch.Tensor) -> torch.Tensor:
    """(B, 3) of the full-frame camera with 50 mm that has this df and K, if its f-number exists."""
    focal_length = torch.full_like(K, NOMINAL_FOCAL_LENGTH_MM)
    sensor_width = torch.full_like(K, NOMINAL_SENSOR_WIDTH_MM)
    # A lens cannot focus within its focal length, a disparity map can.
    focus_distance = 1 / df.clamp(max=1 / NEAREST_FOCUS_M)
    wide_open = lens_strength(
        torch.ones_like(K), focal_length, focus_distance, sensor_width, photo_width
    )
    f_number = (wide_open / K.clamp_min(1e-6)).clamp(*NOMINAL_F_NUMBERS)
    return camera_vector(f_number, focal_length, focus_distance)


def per_photo(name: str, value: PerPhoto, batch: int, device: torch.device) -> torch.Tensor:
    """(B,) float32 from one number or one per photo; tensors keep their gradient.

    Raises:
        ValueError: another number of values, or not numbers.
    """
    try:
        values = torch.as_tensor(value, device=device).to(torch.float32).reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} is {value!r}; wanted a number, or one per photo.") from None
    if values.numel() not in (1, batch):
        raise ValueError(
            f"{name} has {values.numel()} values for {batch} photos; wanted 1 or one each."
        )
    return values.expand(batch)


def check_camera(
    f_number: torch.Tensor,
    focal_length_mm: torch.Tensor,
    focus_distance_m: torch.Tensor,
    sensor_width_mm: torch.Tensor,
    photo_width_px: torch.Tensor,
) -> None:
    """Raises ValueError unless these can be cameras; each (B,)."""
    if torch.compiler.is_compiling():
        return
    for name, values, wanted in (
        ("f_number", f_number, "for instance 1.8"),
        ("focal_length_mm", focal_length_mm, "millimetres, for instance 50"),
        ("focus_distance_m", focus_distance_m, "metres, for instance 2.5"),
        ("sensor_width_mm", sensor_width_mm, "millimetres, for instance 36"),
        ("photo_width_px", photo_width_px, "pixels, for instance 1280"),
    ):
        finite = torch.isfinite(values) | (name == "focus_distance_m") & torch.isinf(values)
        if not bool((finite & (values > 0)).all()):
            raise ValueError(f"{name} is {values.tolist()}; wanted more than 0, {wanted}.")
    if bool((1000 * focus_distance_m <= focal_length_mm).any()):
        raise ValueError(
            f"focus_distance_m is {focus_distance_m.tolist()} m and focal_length_mm "
            f"{focal_length_mm.tolist()} mm; no lens forms an image within its focal length. Give "
            "the distance in metres, the focal length in millimetres."
        )

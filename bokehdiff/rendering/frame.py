"""What renderers of signed defocus share: what they accept, and what is beyond the frame."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

__all__ = ["check_blur_arguments", "continued", "frame_margin"]

# The outermost pixels are repeated beyond the frame over this share of the largest radius. Without
# it the border is a one-sided mean of the inside; the full radius would cost time for little.
FRAME_EXTENSION = 0.5
# Radii up to the longer side of the picture are accepted, and up to this in small pictures.
SMALLEST_RADIUS_LIMIT = 512


def frame_margin(signed_defocus: torch.Tensor) -> int:
    """Pixels by which a picture is continued beyond its frame, at most its longer side."""
    largest = float(signed_defocus.detach().abs().max())
    wanted = math.ceil(FRAME_EXTENSION * max(largest - 0.5, 0))
    return min(wanted, max(signed_defocus.shape[-2:]))


def continued(picture: torch.Tensor, margin: int) -> torch.Tensor:
    """(B, C, H, W) with the outermost pixels repeated ``margin`` times on each side."""
    return F.pad(picture, (margin,) * 4, mode="replicate") if margin else picture


def check_blur_arguments(light: torch.Tensor, signed_defocus: torch.Tensor) -> None:
    """Raises ValueError unless these are light (B, C, H, W) and a finite defocus that fits it."""
    if light.dim() != 4 or 0 in light.shape:
        raise ValueError(f"light has shape {tuple(light.shape)}; wanted (B, C, H, W).")
    if light.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"light is {light.dtype}; wanted float32 or float64.")
    wanted = (light.shape[0], 1, *light.shape[2:])
    if signed_defocus.shape != wanted:
        raise ValueError(
            f"signed_defocus has shape {tuple(signed_defocus.shape)}; wanted {wanted} to match "
            "light."
        )
    if not bool(torch.isfinite(signed_defocus).all()):
        raise ValueError("signed_defocus must be finite; fill holes in the disparity first.")
    largest = float(signed_defocus.detach().abs().max())
    limit = max(*light.shape[2:], SMALLEST_RADIUS_LIMIT)
    if largest > limit:
        raise ValueError(
            f"The largest circle of confusion has a radius of {largest:.0f} px, more than the "
            f"{limit} px this picture allows (its longer side, at least {SMALLEST_RADIUS_LIMIT}). "
            "K is pixels of radius per unit of disparity: lower it, or check the disparity's unit."
        )

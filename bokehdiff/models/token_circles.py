"""How wide PISA must spread a token so that what is shown is the disc of a lens."""

from __future__ import annotations

import functools
import math

import torch

from ..attention import PisaConfig
from ..attention.config import COC_UNITS_PER_TOKEN

__all__ = [
    "calibrated_token_radius",
    "pisa_kernel_second_moment",
    "reach_in_tokens",
    "slope_per_token",
]


def pisa_kernel_second_moment(radius_tokens: torch.Tensor, slope: float) -> torch.Tensor:
    """Mean squared distance, in tokens^2, over which PISA with equal logits spreads one token of a
    given radius."""
    reach = math.ceil(float(radius_tokens.max()) + 28.0 / slope)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    squared = (offsets[:, None] ** 2 + offsets[None, :] ** 2).flatten()
    weights = torch.sigmoid(slope * (radius_tokens[:, None].double() - squared.sqrt()))
    return (weights * squared).sum(1) / weights.sum(1)


def slope_per_token(config: PisaConfig) -> float:
    """Slope of the edge of PISA's soft circle, per token of distance."""
    return math.log(config.hardness) * (config.token_spacing or COC_UNITS_PER_TOKEN)


def reach_in_tokens(radius_tokens: float, config: PisaConfig) -> float:
    """Tokens from which on PISA's soft circle of this radius is exactly 0; infinite without cutoff,
    or where the length of a token depends on the size of the grid."""
    slope = math.log(config.hardness)
    if config.token_spacing is None or config.cutoff <= 0 or slope <= 0:
        return math.inf
    beyond = -math.log(config.cutoff) / slope
    return math.ceil((radius_tokens * COC_UNITS_PER_TOKEN + beyond) / config.token_spacing)


@functools.lru_cache(maxsize=8)
def calibration_table(slope: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Radii from 0 to 12 tokens in steps of 0.01, and the second moment PISA gives each of them."""
    radius = torch.arange(0, 12, 0.01, dtype=torch.float64)
    moment = pisa_kernel_second_moment(radius, slope).cummax(0).values
    return radius.to(device), moment.to(device)


def calibrated_token_radius(
    radius_pixels: torch.Tensor, token_size: int, slope: float
) -> torch.Tensor:
    """Radius in tokens whose rendered spread equals that of a uniform disc of ``radius_pixels``.

    A disc has the second moment r^2/2. What is rendered on tokens is wider than PISA's own kernel
    by the spread of :func:`pooled`, (1 - 1/t^2) / 12 tokens^2 on each axis, and of
    :func:`enlarged`, (1 - 1/t^2) / 4. The radius is chosen so that the sum is right.
    """
    table_radius, table_moment = calibration_table(slope, radius_pixels.device)
    wanted = radius_pixels.double() ** 2 / (2 * token_size**2)
    wanted = (wanted - 2 / 3 * (1 - 1 / token_size**2)).clamp_min(0)
    above = torch.searchsorted(table_moment, wanted.contiguous()).clamp(1, len(table_moment) - 1)
    low, high = table_moment[above - 1], table_moment[above]
    fraction = ((wanted - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    inside = table_radius[above - 1] + fraction * 0.01
    wide = (2 * wanted).sqrt()  # a wide token disc is a disc
    return torch.where(wanted > table_moment[-1], wide, inside).to(radius_pixels.dtype)

"""Pixels pooled to coarser grids, grids enlarged again, and holes filled over a pyramid of them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

__all__ = ["enlarged", "filled_from_coarser", "filled_from_surroundings", "pooled"]

# Only against a division by zero: at coarse cells a lone pixel weighs next to nothing, and counts.
SMALLEST_WEIGHT = 1e-30


def pooled(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, ceil(H/s), ceil(W/s)) means over cells of side s; pixels beyond the
    border count as dark and empty."""
    if size == 1:
        return pixels
    height, width = pixels.shape[-2:]
    if height % size or width % size:
        pixels = F.pad(pixels, (0, -width % size, 0, -height % size))
    return F.avg_pool2d(pixels, size)


def enlarged(cells: torch.Tensor, size: int) -> torch.Tensor:
    """(B, C, h, w) -> (B, C, h s, w s) for s a power of two, without creases at the cells.

    Each doubling cuts corners as Chaikin's scheme does, so the result tends to the smooth quadratic
    B-spline; one bilinear enlargement would leave visible facets in a wide blur. It adds a second
    moment of (1 - 1/s^2) / 4 cells^2 on each axis, pooling one of (1 - 1/s^2) / 12.
    """
    while size > 1:
        cells = F.interpolate(cells, scale_factor=2, mode="bilinear", align_corners=False)
        size //= 2
    return cells


def filled_from_surroundings(known: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Spread known values into the unknown around them, over a pyramid of ever coarser grids.

    Args:
        known: (B, C + 1, h, w) values times weight, and the weight as the last channel: 0 where
            nothing is known.

    Returns:
        values: (B, C, h, w), 0 where nothing at all is known.
        distance: (B, 1, h, w) grid steps to what is known, roughly; infinite if there is nothing.
    """
    if known.shape[-2:] == (1, 1):
        weight = known[:, -1:]
        values = known[:, :-1] / weight.clamp_min(SMALLEST_WEIGHT)
        return values, torch.where(weight > 0, 0.0, math.inf)
    return filled_from_coarser(known, *filled_from_surroundings(pooled(known, 2)))


def filled_from_coarser(
    known: torch.Tensor, coarse: torch.Tensor, coarse_distance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of :func:`filled_from_surroundings`, given its result on cells twice as large.

    Args:
        known: as there, (B, C + 1, h, w).
        coarse, coarse_distance: (B, C, ceil(h/2), ceil(w/2)) and (B, 1, ceil(h/2), ceil(w/2)).

    Returns:
        As there. A value depends on the coarse cells next to its own, a distance on the cells next
        to it.
    """
    height, width = known.shape[-2:]
    weight = known[:, -1:]
    values = known[:, :-1] / weight.clamp_min(SMALLEST_WEIGHT)
    distance = torch.where(weight > 0, 0.0, math.inf)
    around = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
    steps = F.interpolate(coarse_distance, scale_factor=2)[..., :height, :width]
    trust = (4 * weight).clamp(max=1)  # a quarter of a cell speaks for the whole cell
    values = torch.lerp(around[..., :height, :width], values, trust)
    distance = torch.minimum(distance, 2 * steps + 1)
    # A neighbour one step away may be known although it belongs to another coarse cell.
    neighbour = -F.max_pool2d(-distance, 3, stride=1, padding=1)
    return values, torch.minimum(distance, neighbour + 1)

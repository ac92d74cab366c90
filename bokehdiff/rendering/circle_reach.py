"""How far light goes: what circles of confusion reach, on a grid of cells.

Within 1, 2, 4, ... cells, everything counts that has a circle of confusion of more than half of
that reach. So nothing that is reached is left out, and nothing counts that is more than twice as
far away as it reaches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

__all__ = ["change_within_reach", "reaching_radius"]


def reaching_radius(radius: torch.Tensor, levels: int, cell: int) -> torch.Tensor:
    """(B, 1, H / cell, W / cell) pixels: the largest of the circles that come to each cell.

    Args:
        radius: (B, 1, H, W) of the circles of confusion in pixels, not negative.
        levels: no radius is larger than ``2^levels`` pixels.
        cell: pixels per side of a cell, a power of two that divides both sides.
    """
    largest = F.max_pool2d(radius, cell)
    reaching = largest
    for _, within, counts in _octaves(largest, levels, cell):
        reaching = torch.maximum(reaching, within * counts)
    return reaching


def change_within_reach(
    change: torch.Tensor, radius: torch.Tensor, levels: int, cell: int
) -> torch.Tensor:
    """(B, 1, H / cell, W / cell): the largest change whose light may come to each cell, or that
    hides from it what it saw.

    The circle that counts is that of what changes, or of what is seen behind it.

    Args:
        change: (B, 1, H / cell, W / cell) of each cell, not negative.
        radius, levels, cell: as of :func:`reaching_radius`.
    """
    reached = changed = change
    largest = F.max_pool2d(radius, cell)
    for step, _, counts in _octaves(largest, levels, cell):
        changed = _grown(changed, step)
        reached = torch.maximum(reached, changed * counts)
    return reached


def _octaves(
    largest: torch.Tensor, levels: int, cell: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """For reaches of 1, 2, 4, ... cells: by how many cells farther than the last one, the largest
    radius (B, 1, H, W) within it, and whether that is more than half of it."""
    reach = 0
    for octave in range(max(levels - int(math.log2(cell)), 0) + 1):
        step = 2**octave - reach
        reach = 2**octave
        largest = _grown(largest, step)
        yield step, largest, largest > (cell * reach / 2 if octave else 0)


def _grown(values: torch.Tensor, reach: int) -> torch.Tensor:
    """The largest of the values (B, 1, H, W) within so many cells, along both axes."""
    values = F.max_pool2d(values, (2 * reach + 1, 1), 1, (reach, 0))
    return F.max_pool2d(values, (1, 2 * reach + 1), 1, (0, reach))

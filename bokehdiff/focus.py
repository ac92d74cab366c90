"""Which plane is in focus: chosen in the picture, answered in disparity."""

from __future__ import annotations

import torch


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

"""Disparity that a network estimated: which way round it is stored, and its range."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from evaluation.datasets.reading import read_json, read_map

__all__ = ["nearest_value", "read_estimated_disparity"]

CONVENTION = "convention.json"


def nearest_value(folder: Path) -> int:
    """1 if large numbers of the maps in a folder are near, 0 if they are far.

    Said by the file ``convention.json`` beside the maps, ``{"nearest": 0}`` or ``{"nearest": 1}``;
    1 where there is none. ValueError if it says anything else.
    """
    file = folder / CONVENTION
    if not file.exists():
        return 1
    nearest = read_json(file).get("nearest")
    if nearest not in (0, 1):
        raise ValueError(
            f'{file} says that the nearest is {nearest!r}; wanted {{"nearest": 1}} for maps in '
            'which larger is nearer, or {"nearest": 0}.'
        )
    return int(nearest)


def read_estimated_disparity(file: Path, nearest: int) -> np.ndarray:
    """(H, W) float32 disparity in [0, 1], larger is nearer.

    ``(d - low) / (high - low)``, clipped to [0, 1], where low and high are the range of the map
    after a 3 x 3 erosion and dilation, so that no speck stretches it; d is negated first if
    ``nearest`` is 0. Raises ValueError for a missing or damaged file, NaN, or a flat map.
    """
    from scipy.ndimage import grey_opening

    disparity = read_map(file)
    if nearest == 0:
        disparity = -disparity
    opened = grey_opening(disparity, size=(3, 3))
    low, high = opened.min(), opened.max()
    if not high > low:
        raise ValueError(f"{file} is {abs(low):g} everywhere but for specks; wanted a depth map.")
    return ((disparity - low) / (high - low)).clip(0, 1).astype(np.float32)

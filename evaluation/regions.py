"""Where a photograph is measured: at depth edges, in focus, blurred, and away from highlights."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import numpy as np

from evaluation.photographs import Photograph

__all__ = [
    "HIGHLIGHT_LEVEL",
    "SMALLEST_REGION_PX",
    "Regions",
    "once_per_photograph",
    "regions_from_radius",
    "regions_of",
]

# A depth edge: neighbouring disparities differ by more than this share of the scene's range.
EDGE_STEP = 0.03
EDGE_DISTANCE_PX = 6.0
# The scene's range leaves out this share of pixels at either end.
RANGE_TAIL = 0.001
IN_FOCUS_RADIUS_PX = 0.75
HIGHLIGHT_LEVEL = 1.5
"""Linear light above which the 8-bit photograph hides how bright a pixel is."""
SMALLEST_REGION_PX = 200
"""Regions with fewer pixels are too small for a figure of their own."""

Regions = dict[str, np.ndarray]
"""Boolean masks (H, W) by name."""

Found = TypeVar("Found")


def once_per_photograph(find: Callable[[Photograph], Found]) -> Callable[[Photograph], Found]:
    """The function, whose result is remembered for as long as the photograph lives."""
    # By identity: a photograph holds arrays, and so has no hash.
    remembered: dict[int, Found] = {}

    @wraps(find)
    def find_once(photograph: Photograph) -> Found:
        key = id(photograph)
        if key not in remembered:
            remembered[key] = find(photograph)
            weakref.finalize(photograph, remembered.pop, key).atexit = False
        return remembered[key]

    return find_once


@once_per_photograph
def regions_of(photograph: Photograph) -> Regions:
    """Masks (H, W) by name: infocus, blurred, edge; nohl, edge_nohl, blurred_nohl.

    - ``edge``: within 6 px of a step between neighbouring disparities of more than 3 % of the
      scene's range, from its 0.1th to its 99.9th percentile.
    - ``infocus``: ``K * |disparity - df|`` below 0.75 px, and not edge.
    - ``blurred``: the rest, so that these three share out the pixels.
    - ``nohl``: pixels that the disc of no highlight (linear light above 1.5) can reach;
      ``edge_nohl`` and ``blurred_nohl`` are the parts of those regions in it.

    The last three are absent without ``photograph.light``, all of them without
    ``photograph.K``. They are found once for each photograph.
    """
    if photograph.K is None:
        return {}
    disparity = photograph.disparity
    low, high = np.quantile(disparity, [RANGE_TAIL, 1 - RANGE_TAIL])
    return regions_from_radius(
        disparity,
        photograph.K * np.abs(disparity - photograph.df),
        photograph.light,
        disparity_step=EDGE_STEP * float(high - low),
    )


def regions_from_radius(
    disparity: np.ndarray, radius: np.ndarray, light: np.ndarray | None, disparity_step: float
) -> Regions:
    """What :func:`regions_of` returns, from arrays.

    disparity (H, W); radius (H, W) of the circle of confusion in pixels; light (H, W, 3) linear,
    unclipped, or None; disparity_step: the smallest step between neighbours that counts as a depth
    edge.
    """
    from scipy.ndimage import distance_transform_edt

    at_edge = np.zeros(disparity.shape, bool)
    across = np.abs(np.diff(disparity, axis=1)) > disparity_step
    down = np.abs(np.diff(disparity, axis=0)) > disparity_step
    at_edge[:, 1:] |= across
    at_edge[:, :-1] |= across
    at_edge[1:] |= down
    at_edge[:-1] |= down
    edge = at_edge
    if at_edge.any():
        edge = distance_transform_edt(~at_edge) <= EDGE_DISTANCE_PX

    sharp = radius < IN_FOCUS_RADIUS_PX
    blurred = ~sharp & ~edge
    regions = {"infocus": sharp & ~edge, "blurred": blurred, "edge": edge}
    if light is None:
        return regions

    highlight = light.max(axis=2) > HIGHLIGHT_LEVEL
    reached = np.zeros(disparity.shape, bool)
    # Highlights of similar radius (within 2 px, rounded up) share one distance transform.
    reach_class = np.ceil(radius / 2).astype(int)
    for reach in np.unique(reach_class[highlight]):
        members = highlight & (reach_class == reach)
        reached |= distance_transform_edt(~members) <= 2 * reach + 1.5
    return {
        **regions,
        "nohl": ~reached,
        "edge_nohl": edge & ~reached,
        "blurred_nohl": blurred & ~reached,
    }

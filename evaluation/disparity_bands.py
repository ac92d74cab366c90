"""The depths of a photograph at which blur can be measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evaluation.photographs import Photograph
from evaluation.regions import regions_of

__all__ = ["Band", "bands_of", "near_middle_and_far"]

# Bands are as wide as a difference of the radius that shows, where that gives so many of them.
WIDTH_PX = 3.0
FEWEST_BANDS, MOST_BANDS = 3, 8
# Standard deviation of luma within 5 x 5 pixels, of 1, from which on blur changes something.
TEXTURE = 0.02
TEXTURE_WINDOW_PX = 5
SMALLEST_BAND_PX = 400
LUMA = np.array([0.2126, 0.7152, 0.0722])


@dataclass(frozen=True)
class Band:
    """Pixels of similar disparity, away from depth edges, enough of them textured.

    Args:
        disparity: their median.
        pixels: (H, W) bool.
        textured: number of them that have texture.
    """

    disparity: float
    pixels: np.ndarray
    textured: int


def bands_of(photograph: Photograph) -> list[Band]:
    """The bands of disparity in which blur can be measured, the farthest first.

    The range of the scene is cut into 3 to 8 bands of equal width, within which the radius of the
    circle of confusion differs by 3 px where possible. A band counts if it holds at least 400
    textured pixels that are no depth edge.
    """
    from scipy.ndimage import uniform_filter

    low, high = photograph.disparity_range
    assert photograph.K is not None
    count = int(np.clip(photograph.K * (high - low) / WIDTH_PX, FEWEST_BANDS, MOST_BANDS))
    number = np.floor((photograph.disparity - low) / (high - low) * count).clip(0, count - 1)
    luma = photograph.image / 255.0 @ LUMA
    mean = uniform_filter(luma, TEXTURE_WINDOW_PX)
    variance = uniform_filter(luma**2, TEXTURE_WINDOW_PX) - mean**2
    textured = variance > TEXTURE**2
    usable = ~regions_of(photograph)["edge"]
    bands = []
    for index in range(count):
        pixels = (number == index) & usable
        enough = int((pixels & textured).sum())
        if enough >= SMALLEST_BAND_PX:
            bands.append(Band(float(np.median(photograph.disparity[pixels])), pixels, enough))
    return bands


def near_middle_and_far(bands: list[Band]) -> list[Band]:
    """The farthest band, the nearest, and the one closest to half-way between; or fewer."""
    if len(bands) < 3:
        return bands
    half_way = (bands[0].disparity + bands[-1].disparity) / 2
    middle = min(bands[1:-1], key=lambda band: abs(band.disparity - half_way))
    return [bands[0], middle, bands[-1]]

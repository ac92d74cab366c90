"""Where blur can be measured, on three planes side by side."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from evaluation.disparity_bands import bands_of, near_middle_and_far
from tests.evaluation.three_planes import PLANES, three_planes


def test_bands_are_the_planes_without_their_edges() -> None:
    bands = bands_of(three_planes())
    assert [band.disparity for band in bands] == pytest.approx(PLANES)
    for index, band in enumerate(bands):
        rows, columns = np.nonzero(band.pixels)
        # 6 px away from the steps, which lie between columns 79 and 80, and 159 and 160.
        assert columns.min() == (0 if index == 0 else 80 * index + 7)
        assert columns.max() == (239 if index == 2 else 80 * index + 72)
        assert set(rows) == set(range(120))
        assert 0.9 * band.pixels.sum() < band.textured <= band.pixels.sum()
    assert near_middle_and_far(bands) == bands


def test_bands_need_texture() -> None:
    photograph = three_planes()
    photograph.image[:, 80:160] = 128
    assert [band.disparity for band in bands_of(photograph)] == pytest.approx([0.2, 0.8])


def test_bands_are_as_wide_as_three_pixels_of_radius() -> None:
    slope = np.linspace(0.2, 0.8, 240, dtype=np.float32)[None].repeat(120, 0)
    for K, expected in ((20.0, 4), (30.0, 6), (400.0, 8), (1.0, 3)):  # radii of 12, 18, 240, 0.6
        bands = bands_of(dataclasses.replace(three_planes(K=K), disparity=slope))
        centres = 0.2 + 0.6 * (np.arange(expected) + 0.5) / expected
        assert [band.disparity for band in bands] == pytest.approx(centres, abs=0.01)
        far, middle, near = near_middle_and_far(bands)
        assert (far, near) == (bands[0], bands[-1])
        assert abs(middle.disparity - 0.5) <= 0.31 / expected, "half a band at most"

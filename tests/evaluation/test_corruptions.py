"""Corrupted disparities, against maps that are worked out by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from evaluation.corruptions import CORRUPTIONS, corrupted
from evaluation.photographs import Photograph

FAR, NEAR = np.float32(0.25), np.float32(0.75)


def photograph_of(disparity: np.ndarray) -> Photograph:
    height, width = disparity.shape
    picture = np.full((height, width, 3), 128, np.uint8)
    return Photograph(
        scene="s", setting="f", image=picture, disparity=disparity.astype(np.float32),
        disparity_range=(0.25, 0.75), df=0.5, K=8.0, truth=picture, labels={"level": 4},
    )  # fmt: skip


def square() -> np.ndarray:
    """A near square of 5 x 5 pixels in the middle of 11 x 11."""
    disparity = np.full((11, 11), FAR)
    disparity[3:8, 3:8] = NEAR
    return disparity


def test_erosion_shrinks_the_near_by_the_element() -> None:
    # An element of side 3 has no corners left out: the ellipse of reach 1 is |x| <= 1 on the
    # middle row, and |x| <= 0 on the others, so a plus. The square loses one pixel on each side.
    expected = np.full((11, 11), FAR)
    expected[4:7, 4:7] = NEAR
    eroded = corrupted(photograph_of(square()), "erode", 1).disparity
    np.testing.assert_array_equal(eroded, expected)
    assert (corrupted(photograph_of(square()), "erode", 3).disparity == FAR).all()


def test_dilation_grows_the_near_by_the_element() -> None:
    expected = np.full((11, 11), FAR)
    expected[3:8, 2:9] = NEAR  # the plus of reach 1 at every pixel of the square
    expected[2:9, 3:8] = NEAR
    dilated = corrupted(photograph_of(square()), "dilate", 1).disparity
    np.testing.assert_array_equal(dilated, expected)


@pytest.mark.parametrize("level", [1, 2, 4])
def test_one_pixel_shows_the_element_of_side_two_e_plus_one(level: int) -> None:
    disparity = np.full((15, 15), FAR)
    disparity[7, 7] = NEAR
    grown = corrupted(photograph_of(disparity), "dilate", level).disparity == NEAR
    widths = [2 * round((level**2 - y**2) ** 0.5) + 1 for y in range(-level, level + 1)]
    np.testing.assert_array_equal(grown.sum(1)[7 - level : 8 + level], widths)
    assert grown.sum() == sum(widths)
    np.testing.assert_array_equal(grown, grown[::-1, ::-1])


def test_erosion_and_dilation_mirror_each_other() -> None:
    disparity = np.random.default_rng(0).uniform(0.25, 0.75, (20, 30)).astype(np.float32)
    turned = photograph_of(1 - disparity)  # near and far exchanged, in the same range
    np.testing.assert_allclose(
        corrupted(photograph_of(disparity), "erode", 2).disparity,
        1 - corrupted(turned, "dilate", 2).disparity,
        atol=2e-7,  # float32 rounding of 1 - x
    )


def test_blur_of_a_step_is_the_error_function() -> None:
    disparity = np.full((3, 61), FAR)
    disparity[:, 31:] = NEAR
    disparity[:, 30] = (FAR + NEAR) / 2
    blurred = corrupted(photograph_of(disparity), "blur", 2).disparity.astype(np.float64)
    offsets = np.arange(-60, 61)
    weights = np.exp(-0.5 * (offsets / 2.0) ** 2)
    padded = np.pad(disparity[1].astype(np.float64), 60, mode="edge")
    expected = np.convolve(padded, weights / weights.sum(), mode="valid")
    # scipy cuts the Gaussian at 4 sigma, beyond which lie 6e-5 of its weight.
    np.testing.assert_allclose(blurred[1], expected, atol=5e-5)
    np.testing.assert_array_equal(blurred[0], blurred[2])


def test_quantised_to_four_levels_are_four_values_of_the_range() -> None:
    disparity = np.linspace(0.25, 0.75, 121).reshape(11, 11)
    values = np.unique(corrupted(photograph_of(disparity), "quantise", 4).disparity)
    np.testing.assert_allclose(values, [0.25, 0.25 + 1 / 6, 0.25 + 2 / 6, 0.75], rtol=1e-6)
    fine = corrupted(photograph_of(disparity), "quantise", 65536).disparity
    np.testing.assert_allclose(fine, disparity, atol=0.5 * 0.5 / 65535 + 1e-7)


@pytest.mark.parametrize("corruption", list(CORRUPTIONS))
def test_only_the_disparity_changes(corruption: str) -> None:
    photograph = photograph_of(square() + np.linspace(0, 0.01, 11))
    before = photograph.disparity.copy()
    changed = corrupted(photograph, corruption, 2)
    np.testing.assert_array_equal(photograph.disparity, before)
    assert changed.disparity.dtype == np.float32
    assert not np.array_equal(changed.disparity, before)
    for field in dataclasses.fields(Photograph):
        if field.name != "disparity":
            assert getattr(changed, field.name) is getattr(photograph, field.name)


@pytest.mark.parametrize(
    ("corruption", "level", "sentence"),
    [
        ("melt", 1, "no corruption 'melt'; wanted one of erode, dilate, blur, quantise"),
        ("erode", 0, "level of erode is 0; wanted a whole number of px from 1"),
        ("blur", 1.5, "level of blur is 1.5"),
        ("quantise", 1, "wanted a whole number of levels from 2 to 65536"),
    ],
)
def test_mistakes_are_explained(corruption: str, level: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        corrupted(photograph_of(square()), corruption, level)

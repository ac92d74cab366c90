"""Named mistakes of disparity maps, and what happens to focus and strength."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from data_synthesis.corruption import (
    CorruptionSettings,
    blurred,
    corrupt_disparity,
    drifted,
    elliptical_element,
    eroded,
    leaked,
    misaligned,
    quantised,
    without_thin_structures,
)

NOTHING = CorruptionSettings(*[0.0] * len(dataclasses.fields(CorruptionSettings)))
NAMES = [field.name for field in dataclasses.fields(CorruptionSettings)]


def square(side: int = 64, near: float = 0.8, far: float = 0.2) -> np.ndarray:
    disparity = np.full((side, side), far, np.float32)
    disparity[16:48, 16:48] = near
    return disparity


def textured(side: int = 64) -> np.ndarray:
    rng = np.random.default_rng(3)
    return rng.uniform(0, 1, (side, side, 3)).astype(np.float32)


def only(name: str) -> CorruptionSettings:
    return dataclasses.replace(NOTHING, **{name: 1.0})


def test_the_element_is_the_ellipse_of_opencv() -> None:
    """cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5)) and (3, 3)."""
    five = ["00100", "11111", "11111", "11111", "00100"]
    assert elliptical_element(2).astype(int).tolist() == [[int(c) for c in row] for row in five]
    assert elliptical_element(1).astype(int).tolist() == [[0, 1, 0], [1, 1, 1], [0, 1, 0]]


@pytest.mark.parametrize("pixels", [1, 2, 5])
def test_erosion_shrinks_and_dilation_grows_by_as_many_pixels(pixels: int) -> None:
    disparity = square()
    smaller, larger = eroded(disparity, pixels), eroded(disparity, -pixels)
    assert (smaller[32] > 0.5).sum() == 32 - 2 * pixels
    assert (larger[32] > 0.5).sum() == 32 + 2 * pixels
    assert np.array_equal(eroded(disparity, 0), disparity)
    # Erosion of near things is dilation of far ones.
    assert np.array_equal(smaller, -eroded(-disparity, -pixels))


def test_thin_structures_vanish_and_broad_ones_stay() -> None:
    disparity = square()
    disparity[:, 5:8] = 0.9  # three pixels wide
    disparity[:, 55:60] = 0.9  # five
    opened = without_thin_structures(disparity, 2)
    assert opened[32, 6] == np.float32(0.2)
    assert opened[32, 57] == np.float32(0.9)
    assert opened[32, 32] == np.float32(0.8)
    assert (opened <= disparity).all()


def test_quantised_values_are_the_nearest_of_their_levels() -> None:
    disparity = np.random.default_rng(0).uniform(0, 1, (32, 32)).astype(np.float32)
    few = quantised(disparity, 33)
    assert np.abs(few * 32 - np.rint(few * 32)).max() < 1e-5
    assert np.abs(few - disparity).max() <= 0.5 / 32 + 1e-6


def test_misalignment_moves_the_map() -> None:
    ramp = np.tile(np.arange(32, dtype=np.float32) / 32, (32, 1))
    moved = misaligned(ramp, 1.5, 0.0)
    assert np.allclose(moved[:, 4:-4], ramp[:, 4:-4] - 1.5 / 32, atol=1e-6)
    assert np.allclose(misaligned(ramp, 0.0, 1.5), ramp, atol=1e-6)
    assert np.allclose(misaligned(ramp.T, 0.0, -2.0)[4:-4], ramp.T[4:-4] + 2 / 32, atol=1e-6)


def test_blurred_keeps_flat_maps_and_the_mean() -> None:
    assert np.allclose(blurred(np.full((16, 16), 0.3, np.float32), 2.0), 0.3, atol=1e-6)
    disparity = square()
    assert abs(blurred(disparity, 2.0).mean() - disparity.mean()) < 1e-4
    assert np.abs(np.diff(blurred(disparity, 2.0))).max() < 0.2


def test_drift_is_smooth_and_as_strong_as_said() -> None:
    disparity = np.tile(np.linspace(0.3, 0.7, 128, dtype=np.float32), (128, 1))
    error = drifted(disparity, 0.05, np.random.default_rng(1)) - disparity
    assert abs(np.abs(error).max() - 0.05 * 0.4) < 1e-5
    # Six waves of amplitude 0.02 across 128 pixels change by 0.006 from pixel to pixel at most.
    assert np.abs(np.diff(error, axis=0)).max() < 0.006


def test_leaking_follows_texture_and_a_blank_picture_only_blurs() -> None:
    disparity = square()
    texture = textured()
    followed = leaked(disparity, texture, 4)
    inside = followed[14:18, 25:39]  # along the upper edge of the square
    luma = (texture @ [0.2126, 0.7152, 0.0722])[14:18, 25:39]
    assert inside.std() > 0.02
    smooth = leaked(disparity, np.full_like(texture, 0.5), 4)[14:18, 25:39]
    residual = inside - smooth
    assert abs(np.corrcoef(residual.ravel(), luma.ravel())[0, 1]) > 0.3
    assert np.abs(np.diff(smooth, axis=1)).max() < 1e-5
    # Away from every edge the disparity is what it was.
    assert np.allclose(followed[28:36, 28:36], 0.8, atol=1e-4)


def test_the_same_seed_makes_the_same_mistakes_and_the_map_is_left_alone() -> None:
    disparity, image = square(), textured()
    before = disparity.copy()
    first, again = (
        corrupt_disparity(disparity, 0.2, 30.0, image, np.random.default_rng(7)) for _ in range(2)
    )
    assert np.array_equal(first.disparity, again.disparity)
    assert first[1:] == again[1:]
    assert np.array_equal(disparity, before)
    other = corrupt_disparity(disparity, 0.2, 30.0, image, np.random.default_rng(8))
    assert other.mistakes != first.mistakes


@pytest.mark.parametrize("name", NAMES)
def test_each_mistake_happens_when_asked_for_and_not_otherwise(name: str) -> None:
    disparity, image = square(near=0.81, far=0.21), textured()
    changed = corrupt_disparity(disparity, 0.2, 30.0, image, np.random.default_rng(1), only(name))
    assert [mistake for mistake, _ in changed.mistakes] == [name]
    assert not np.array_equal(changed.disparity, disparity)
    assert changed.disparity.dtype == np.float32
    assert changed.disparity.min() >= 0 and changed.disparity.max() <= 1
    same = corrupt_disparity(disparity, 0.2, 30.0, image, np.random.default_rng(1), NOTHING)
    assert np.array_equal(same.disparity, disparity) and same[1:] == (0.2, 30.0, [])


def test_rescaling_keeps_every_radius() -> None:
    disparity, image = square(), textured()
    for seed in range(5):
        changed = corrupt_disparity(
            disparity, 0.35, 30.0, image, np.random.default_rng(seed), only("rescaled")
        )
        radii = changed.K * (changed.disparity - changed.df)
        assert np.allclose(radii, 30.0 * (disparity - 0.35), atol=1e-4)


def test_what_was_in_focus_stays_in_focus() -> None:
    """A drifting map, focused on the square: df moves with the square's disparity."""
    disparity, image = square(), textured()
    for seed in range(5):
        changed = corrupt_disparity(
            disparity, 0.8, 100.0, image, np.random.default_rng(seed), only("drifted")
        )
        in_square = np.median((changed.disparity - disparity)[disparity > 0.5])
        assert abs(changed.df - 0.8 - in_square) < 1e-6
    # Nothing is in focus: df stays.
    changed = corrupt_disparity(
        disparity, 0.5, 100.0, image, np.random.default_rng(0), only("drifted")
    )
    assert changed.df == 0.5


def test_mistakes_of_the_caller_are_refused() -> None:
    with pytest.raises(ValueError, match="same size"):
        corrupt_disparity(square(), 0.2, 1.0, textured(32), np.random.default_rng(0))
    with pytest.raises(ValueError, match="blurred is 1.5"):
        CorruptionSettings(blurred=1.5)

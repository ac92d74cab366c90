"""Exposure alignment, by the equation and by what it is for."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.exposure import align_exposure


def test_the_equation() -> None:
    generator = np.random.default_rng(3)
    image = generator.integers(0, 256, (9, 7, 3), np.uint8)
    truth = generator.integers(0, 256, (9, 7, 3), np.uint8)
    truth[..., 0] //= 2
    for channel, found in enumerate(np.moveaxis(align_exposure(image, truth), 2, 0)):
        values = image[..., channel].astype(np.float64) / 255
        mean = max(values.sum() / 63, 1e-6)
        wanted = np.minimum(values * (truth[..., channel].sum() / 63 / 255) / mean, 1) * 255
        assert np.abs(found - wanted).max() <= 0.5 + 1e-9


def test_a_darker_copy_is_undone() -> None:
    truth = np.random.default_rng(1).integers(0, 200, (20, 30, 3), np.uint8)
    darker = (truth * np.array([0.5, 0.8, 1.0])).round().astype(np.uint8)
    # Half levels that the darker copy was rounded by, twice as large.
    assert np.abs(align_exposure(darker, truth).astype(int) - truth).max() <= 2
    assert np.array_equal(align_exposure(truth, truth), truth)


def test_black_stays_black() -> None:
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert np.array_equal(align_exposure(black, white), black)
    assert np.array_equal(align_exposure(white, black), black)


def test_other_arrays_are_refused() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="photograph has shape .* float64; wanted"):
        align_exposure(image / 255, image)
    with pytest.raises(ValueError, match=r"truth has shape \(4, 4\)"):
        align_exposure(image, image[..., 0])

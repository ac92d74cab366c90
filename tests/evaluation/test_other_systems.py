"""Methods of others, as functions that the evaluation calls."""

from __future__ import annotations

import numpy as np

from bokehdiff.images import srgb_to_linear
from evaluation.methods import method_by_name
from evaluation.other_systems import bokehme_scatter


def test_nothing_is_blurred_in_focus_and_light_stays_where_all_is_blurred_alike() -> None:
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (24, 32, 3)).astype(np.uint8)
    disparity = np.full((24, 32), 0.5, np.float32)
    # At radius 0 four neighbours still weigh (1 + tanh(-4)) / 2 beside the pixel's 1 / 2.
    sharp = srgb_to_linear(bokehme_scatter(image, disparity, 0.5, 10.0))
    assert np.abs(sharp - srgb_to_linear(image / 255)).max() < 4 * (1 + np.tanh(-4))
    lamp = np.zeros((41, 41, 3), np.uint8)
    lamp[20, 20] = 255
    blurred = bokehme_scatter(lamp, np.full((41, 41), 1.0, np.float32), 0.0, 5.0)
    light = srgb_to_linear(blurred)
    rows, columns = np.nonzero(light[..., 0] > light.max() / 2)
    assert abs(light[..., 0].sum() - 1) < 0.01
    assert np.hypot(rows - 20, columns - 20).max() <= 5.5


def test_the_evaluation_finds_it_by_its_name() -> None:
    method = method_by_name("evaluation.other_systems:bokehme_scatter")
    assert method.name == "evaluation.other_systems:bokehme_scatter"

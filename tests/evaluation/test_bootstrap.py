"""Intervals by scene: by hand, and the properties that make them honest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from evaluation.bootstrap import (
    DRAWS,
    SEED,
    difference_interval,
    differences,
    mean_interval,
)


def rows(figures: dict[str, list[float | None]]) -> list[dict[str, Any]]:
    """Rows of a metric "psnr" by scene; None for a photograph that has no figure."""
    return [
        {"scene": scene, "setting": f"f{i}", **({} if value is None else {"psnr": value})}
        for scene, values in figures.items()
        for i, value in enumerate(values)
    ]


def width(interval: list[float] | None) -> float:
    assert interval is not None
    return interval[1] - interval[0]


def test_two_scenes_by_hand() -> None:
    # Of two scenes drawn twice a quarter of the draws is 10, 10, a quarter 20, 20, the rest mixed.
    assert mean_interval(rows({"a": [10], "b": [20]}), "psnr") == [10, 20]


def test_the_mean_of_a_draw_is_over_all_images_of_its_scenes() -> None:
    scenes = {"a": [10.0, 11, 12], "b": [20.0], "c": [31.0, 30], "d": [5.0], "e": [40.0] * 9}
    draws = np.random.default_rng(SEED).integers(5, size=(DRAWS, 5))
    figures = list(scenes.values())
    means = [np.mean([v for scene in draw for v in figures[scene]]) for draw in draws]
    found = mean_interval(rows(scenes), "psnr")
    assert found == pytest.approx(list(np.percentile(means, [2.5, 97.5])))
    assert mean_interval(rows(scenes), "psnr") == found, "the same rows, the same interval"


def test_more_images_of_the_same_scenes_make_nothing_surer() -> None:
    few = rows({"a": [10], "b": [20], "c": [30]})
    many = rows({"a": [10] * 50, "b": [20] * 50, "c": [30] * 50})
    assert mean_interval(many, "psnr") == mean_interval(few, "psnr")
    scenes = rows({f"{i}": [10 + 10 * (i % 3)] for i in range(150)})
    assert width(mean_interval(scenes, "psnr")) < width(mean_interval(few, "psnr")) / 4


def test_the_interval_has_the_width_of_the_standard_error() -> None:
    # 200 scenes of 0 and 1: the mean has a standard error of 0.5 / sqrt(200), 1.96 of it each way.
    many = rows({f"s{i}": [i % 2] for i in range(200)})
    assert width(mean_interval(many, "psnr")) == pytest.approx(2 * 1.96 * 0.5 / 200**0.5, rel=0.1)


def test_photographs_without_the_metric_do_not_count() -> None:
    assert mean_interval(rows({"a": [10, None], "b": [20], "c": [None]}), "psnr") == [10, 20]
    assert mean_interval(rows({"a": [10, 20], "b": [None]}), "psnr") is None
    assert mean_interval([], "psnr") is None


def test_a_difference_is_paired_and_so_surer_than_either_mean() -> None:
    hard_and_easy = {"a": [10.0, 12.0], "b": [30.0], "c": [20.0]}
    one = rows(hard_and_easy)
    other = rows({scene: [v + 0.5 for v in values] for scene, values in hard_and_easy.items()})
    assert difference_interval(one, other[::-1], "psnr") == pytest.approx([-0.5, -0.5], abs=1e-12)
    assert width(mean_interval(one, "psnr")) > 10
    assert difference_interval(one[:2], other[:2], "psnr") is None, "one scene"


def test_a_difference_needs_the_metric_in_both() -> None:
    one, other = rows({"a": [10, None], "b": [20]}), rows({"a": [11, 5], "b": [None]})
    assert differences(one, other, "psnr") == {("a", "f0"): -1}


def test_a_difference_of_different_photographs_is_refused() -> None:
    with pytest.raises(ValueError, match="Only one of two methods has the photograph b_f0"):
        difference_interval(rows({"a": [1], "b": [1]}), rows({"a": [1]}), "psnr")

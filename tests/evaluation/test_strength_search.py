"""The search for the best blur strength: on scores that are known, and on pictures whose K is."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from evaluation.datasets import open_dataset
from evaluation.methods import method_by_name
from evaluation.photographs import Photograph
from evaluation.strength_search import (
    TOLERANCE,
    best_common_range_px,
    best_K,
    best_strength,
    disparity_span,
    number_of_evaluations,
    strength_bounds,
)
from tests.evaluation.triples_folder import K as TRUE_K
from tests.evaluation.triples_folder import write_triples


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Photograph]:
    folder = write_triples(tmp_path_factory.mktemp("triples"))
    return list(open_dataset("triples", folder).photographs())


@pytest.mark.parametrize("peak", [0.11, 0.5, 7.0, 39.0, 99.0])
@pytest.mark.parametrize("skew", [1.0, 5.0])
def test_the_peak_of_a_score_is_found(peak: float, skew: float) -> None:
    asked = []

    def score(K: float) -> float:
        asked.append(K)
        if K == 0:
            return -100.0
        off = math.log(K / peak)
        return -abs(off) if off < 0 else -skew * abs(off)

    found = best_strength(score, 0.1, 100)
    assert abs(math.log(found / peak)) <= TOLERANCE
    assert len(asked) == number_of_evaluations(0.1, 100)
    assert asked.count(0) == 1 and len(set(asked)) == len(asked)


def test_the_number_of_evaluations_is_the_one_of_the_golden_ratio() -> None:
    # ln(1000) = 6.91 shrinks to 0.02 by factors of 0.618: ln(345) / 0.481 = 12.1, and two to start
    # with, and K = 0.
    assert number_of_evaluations(0.1, 100) == 13 + 3
    assert number_of_evaluations(1.0, 1.0) == 3
    for width in (500, 2000):  # as the protocol says in words
        assert number_of_evaluations(*strength_bounds(1.0, width)) in (15, 16)


def test_blur_too_weak_to_change_anything_leads_upwards() -> None:
    found = best_strength(lambda K: 0.0 if K < 1 else 1 - abs(math.log(K / 20)) / 4, 0.01, 100)
    assert abs(math.log(found / 20)) <= TOLERANCE


def test_no_blur_wins_where_blur_only_harms_or_changes_nothing() -> None:
    assert best_strength(lambda K: -K, 0.1, 100) == 0
    assert best_strength(lambda K: 3.0, 0.1, 100) == 0


def test_bounds_are_radii_in_the_picture() -> None:
    low, high = strength_bounds(0.5, 400)
    assert low * 0.5 == 0.25 and high * 0.5 == 40
    assert strength_bounds(0.5, 2) == (0.5, 0.5)


def test_the_true_K_of_a_rendered_photograph_is_found(photographs: list[Photograph]) -> None:
    scatter = method_by_name("scatter")
    for photograph in photographs[::2]:
        unknown = dataclasses.replace(photograph, K=None)
        assert best_K(scatter, unknown) == pytest.approx(TRUE_K, rel=0.03)


def test_a_photograph_in_focus_has_no_strength(photographs: list[Photograph]) -> None:
    flat = np.full_like(photographs[0].disparity, 0.3)
    flat_one = dataclasses.replace(
        photographs[0], disparity=flat, df=float(flat[0, 0]), disparity_range=(0.3, 0.3)
    )
    scatter = method_by_name("scatter")
    assert best_K(scatter, flat_one) == 0
    assert best_common_range_px(scatter, lambda: [flat_one]) == 0
    assert disparity_span(flat_one) == 1


def test_one_strength_for_all_is_in_the_unit_that_they_share(photographs: list[Photograph]) -> None:
    far, near = photographs[0], photographs[1]
    # The same lens, whose disparity is in another unit: K times the range is what stays.
    low, high = near.disparity_range
    other_unit = dataclasses.replace(
        near, disparity=10 * near.disparity, df=10 * near.df, disparity_range=(10 * low, 10 * high)
    )
    found = best_common_range_px(method_by_name("scatter"), lambda: [far, other_unit])
    assert found == pytest.approx(TRUE_K * 0.6, rel=0.03)


def test_the_benchmarks_K_is_found(shared_root: Path) -> None:
    data = shared_root / "bench" / "raytraced" / "data"
    if not data.is_dir():
        pytest.skip(f"no ray-traced benchmark at {data}")
    photographs = open_dataset("raytraced", data, ["s06"]).photographs()
    photograph = next(one for one in photographs if one.setting == "f2_r06")
    # The truth is a ray tracer's, and shows surfaces that nobody knows of.
    assert best_K(method_by_name("scatter"), photograph) == pytest.approx(photograph.K, rel=0.03)

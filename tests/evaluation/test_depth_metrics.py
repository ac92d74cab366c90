"""Metrics of metric depth against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evaluation.depth_metrics import DEPTH_METRICS, depth_metrics


def test_metrics_are_their_definitions() -> None:
    depth = np.array([1.0, 2.0, 4.0, 5.0])
    prediction = np.array([1.2, 1.0, 4.0, 8.0])  # ratios 1.2, 2, 1, 1.6
    found = depth_metrics(prediction, depth)
    assert set(found) == set(DEPTH_METRICS)
    assert found["abs_rel"] == pytest.approx((0.2 + 0.5 + 0 + 0.6) / 4)
    # 1.25, 1.5625 and 1.953125
    assert (found["delta1"], found["delta2"], found["delta3"]) == (0.5, 0.5, 0.75)
    assert found["rmse"] == pytest.approx(math.sqrt((0.04 + 1 + 0 + 9) / 4))
    logs = [math.log(1.2), math.log(0.5), 0, math.log(1.6)]
    mean = sum(logs) / 4
    spread = math.sqrt(sum((one - mean) ** 2 for one in logs) / 4)
    assert found["silog"] == pytest.approx(100 * spread)


def test_a_perfect_prediction() -> None:
    depth = np.linspace(0.5, 9, 30).reshape(5, 6)
    assert depth_metrics(depth, depth) == {
        **{"abs_rel": 0.0, "delta1": 1.0, "delta2": 1.0, "delta3": 1.0},
        **{"rmse": 0.0, "silog": 0.0},
    }


def test_no_scale_is_fitted_but_silog_ignores_one() -> None:
    depth = np.linspace(0.5, 9, 30)
    found = depth_metrics(1.2 * depth, depth)
    assert found["abs_rel"] == pytest.approx(0.2)
    assert found["silog"] == pytest.approx(0, abs=1e-6)


def test_only_known_pixels_count() -> None:
    depth = np.array([[1.0, 0.0, np.nan], [np.inf, 2.0, 4.0]])
    prediction = np.array([[1.1, np.nan, 3.0], [2.0, 2.2, 4.4]])
    assert depth_metrics(prediction, depth)["abs_rel"] == pytest.approx(0.1)
    inside = np.array([[True, False, False], [False, False, False]])
    assert depth_metrics(prediction, depth, inside)["rmse"] == pytest.approx(0.1)
    assert depth_metrics(prediction, depth, np.zeros((2, 3), bool)) == {}


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="wanted one shape"):
        depth_metrics(np.ones((2, 3)), np.ones((3, 2)))
    with pytest.raises(ValueError, match="prediction has values that are not finite and above 0"):
        depth_metrics(np.array([0.0, 1.0]), np.ones(2))
    with pytest.raises(ValueError, match="depth has values that are not finite and above 0"):
        depth_metrics(np.ones(2), np.array([0.0, 1.0]), np.ones(2, bool))

"""Metrics of metric depth, as the depth literature has them: AbsRel, delta, RMSE, SILog."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["DEPTH_METRICS", "DepthMetric", "depth_metrics"]


@dataclass(frozen=True)
class DepthMetric:
    """What a metric is: ``better`` is "higher" or "lower", ``unit`` is "" for a share."""

    better: str
    unit: str
    description: str


DEPTH_METRICS = {
    "abs_rel": DepthMetric("lower", "", "mean of |prediction - depth| / depth"),
    "delta1": DepthMetric("higher", "", "share with max(prediction/depth, its inverse) < 1.25"),
    "delta2": DepthMetric("higher", "", "the same below 1.25^2"),
    "delta3": DepthMetric("higher", "", "the same below 1.25^3"),
    "rmse": DepthMetric("lower", "m", "root of the mean of (prediction - depth)^2"),
    "silog": DepthMetric(
        "lower", "", "100 times the standard deviation of log prediction - log depth"
    ),
}
"""By name; all are over the pixels of one picture whose depth is known."""


def depth_metrics(
    prediction: np.ndarray, depth: np.ndarray, valid: np.ndarray | None = None
) -> dict[str, float]:
    """The metrics of `DEPTH_METRICS` of one picture by name; empty without a valid pixel.

    No scale or shift is fitted: metres are compared with metres.

    Args:
        prediction: metres, any shape, finite and above 0 where valid.
        depth: true metres, the same shape.
        valid: bool, the same shape: the pixels that count. None: where the depth is finite and
            above 0.

    Raises:
        ValueError: shapes differ, or a depth that counts is not finite and above 0.
    """
    if valid is None:
        valid = np.isfinite(depth) & (depth > 0)
    if not np.shape(prediction) == np.shape(depth) == np.shape(valid):
        raise ValueError(
            f"prediction, depth and valid have the shapes {np.shape(prediction)}, "
            f"{np.shape(depth)} and {np.shape(valid)}; wanted one shape."
        )
    predicted, true = (np.asarray(one, np.float64)[valid] for one in (prediction, depth))
    for name, values in (("prediction", predicted), ("depth", true)):
        if not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(
                f"{name} has values that are not finite and above 0 where it counts; wanted metres "
                "there, or a mask that leaves them out."
            )
    if true.size == 0:
        return {}
    ratio = np.maximum(predicted / true, true / predicted)
    return {
        "abs_rel": float(np.mean(np.abs(predicted - true) / true)),
        **{f"delta{power}": float(np.mean(ratio < 1.25**power)) for power in (1, 2, 3)},
        "rmse": float(np.sqrt(np.mean((predicted - true) ** 2))),
        "silog": float(100 * np.std(np.log(predicted) - np.log(true))),
    }

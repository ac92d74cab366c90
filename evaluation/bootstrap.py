"""How sure a mean is: intervals that draw scenes again, as the pictures of one scene are alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["PROTOCOL", "difference_interval", "mean_interval"]

DRAWS = 2000
SEED = 0
PERCENTILES = (2.5, 97.5)

PROTOCOL = (
    "Intervals are the middle 95 % when scenes, not images, are drawn again with replacement "
    f"({DRAWS} times, seed {SEED})."
)

Row = Mapping[str, Any]


def mean_interval(rows: Sequence[Row], metric: str) -> list[float] | None:
    """[low, high]: the middle 95 % of the mean of a metric when whole scenes are drawn again.

    With S scenes, each draw takes S of them with replacement, and the mean over all their images.
    The same rows give the same interval.

    Args:
        rows: of results; those without the metric do not count.
        metric: its name.

    Returns:
        None with fewer than two scenes, which have no spread.
    """
    return _interval((row["scene"], row[metric]) for row in rows if row.get(metric) is not None)


def difference_interval(
    rows_a: Sequence[Row], rows_b: Sequence[Row], metric: str
) -> list[float] | None:
    """[low, high]: the middle 95 % of the mean of ``a - b``, image by image, as above.

    Two methods find the same pictures hard, so their difference is surer than either mean: one
    whose interval does not hold 0 is more than the choice of scenes.

    Args:
        rows_a, rows_b: of two methods on the same photographs, in any order; photographs that lack
            the metric in either do not count.
        metric: its name.

    Returns:
        None with fewer than two scenes.

    Raises:
        ValueError: the rows are of different photographs.
    """
    return _interval(
        (scene, difference)
        for (scene, _), difference in differences(rows_a, rows_b, metric).items()
    )


def differences(
    rows_a: Sequence[Row], rows_b: Sequence[Row], metric: str
) -> dict[tuple[str, str], float]:
    """``a - b`` by (scene, setting), where both have the metric; ValueError as above."""
    a, b = ({(row["scene"], row["setting"]): row for row in rows} for rows in (rows_a, rows_b))
    if set(a) != set(b):
        scene, setting = min(set(a) ^ set(b))
        raise ValueError(
            f"Only one of two methods has the photograph {scene}_{setting}; wanted the rows of "
            "both on the same photographs."
        )
    return {
        name: row[metric] - b[name][metric]
        for name, row in a.items()
        if row.get(metric) is not None and b[name].get(metric) is not None
    }


def _interval(figures: Any) -> list[float] | None:
    """The interval of the mean of (scene, figure) pairs."""
    by_scene: dict[str, list[float]] = {}
    for scene, figure in figures:
        by_scene.setdefault(scene, []).append(figure)
    if len(by_scene) < 2:
        return None
    sums = np.array([sum(values) for values in by_scene.values()])
    counts = np.array([len(values) for values in by_scene.values()])
    draws = np.random.default_rng(SEED).integers(len(sums), size=(DRAWS, len(sums)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    return [float(value) for value in np.percentile(means, PERCENTILES)]

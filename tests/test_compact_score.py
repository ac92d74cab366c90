"""The score of the challenge, against the table that it published."""

from __future__ import annotations

import math

import pytest

from bokehdiff.compact_score import compact_score


@pytest.mark.parametrize(
    ("mean_opinion_score", "runtimes_ms", "published", "decimals"),
    [
        (6.5, (19.7, 42.6), 282, 0),
        (6.7, (1826, 2801), 4.8, 1),
        (1.5, (16.6, 38.3), 0.32, 2),
        (1.1, (129, 191), 0.03, 2),
        (1.7, (204053, 179710), 0, 0),
    ],
)
def test_the_published_table(mean_opinion_score, runtimes_ms, published, decimals):
    score = compact_score(mean_opinion_score, runtimes_ms)
    # The opinions of the table are rounded to a tenth, its first score down: 282.8.
    assert math.floor(score) == published if decimals == 0 else round(score, decimals) == published


def test_half_a_point_is_worth_half_the_time():
    assert compact_score(3.0, [8.0]) == 8.0
    assert compact_score(3.5, [20.0]) == pytest.approx(compact_score(3.0, [10.0]))
    assert compact_score(3.0, [5.0, 20.0]) == pytest.approx(compact_score(3.0, [10.0]))


@pytest.mark.parametrize("runtimes", [[], [0.0], [10.0, -1.0], [math.nan], [math.inf]])
def test_runtimes_that_are_none(runtimes):
    with pytest.raises(ValueError, match="wanted the milliseconds of at least one device"):
        compact_score(6.5, runtimes)


def test_an_opinion_that_is_none():
    with pytest.raises(ValueError, match="mean_opinion_score is nan; wanted a finite number"):
        compact_score(math.nan, [10.0])

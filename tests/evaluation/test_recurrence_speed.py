"""What ``speed recurrence`` measures; here on small grids."""

from __future__ import annotations

import pytest
import torch

from evaluation import recurrence_speed
from evaluation.recurrence_speed import BOTH, CHUNKS, FORWARD, LOOP, TUNED_LOOP, Case, Walks


def test_rows_are_what_they_say() -> None:
    rows = recurrence_speed.measure([4, 8], 8, 1, sequences=2, channels=4, device="cpu")
    by_name = {(row.side, row.method, row.direction): row for row in rows}
    assert len(by_name) == len(rows) == 2 * (2 + 2)
    for row in rows:
        assert row.tokens == row.side**2
        assert row.nanoseconds_per_token == pytest.approx(1e6 * row.milliseconds / 2 / row.tokens)
    for direction in (FORWARD, BOTH):
        small, large = by_name[4, CHUNKS, direction], by_name[8, CHUNKS, direction]
        assert small.time_growth is None and small.error is None
        assert large.time_growth == pytest.approx(
            large.nanoseconds_per_token / small.nanoseconds_per_token
        )
        assert large.error is not None and large.error < 1e-5
        for loop in (LOOP, TUNED_LOOP):
            row = by_name[8, loop, direction]
            assert row.times_faster == pytest.approx(row.milliseconds / large.milliseconds)

    heading, *lines = recurrence_speed.table(rows).splitlines()
    assert heading.split()[:2] == ["tokens", "method"]
    assert len(lines) == len(rows)
    assert "2 sequences" in recurrence_speed.protocol(2, 4, 1, "cpu")


def test_all_methods_compute_the_same() -> None:
    walks = Walks(Case(3, sequences=2, channels=4), torch.float64)
    results = [walks.call(method, BOTH) for method in (CHUNKS, LOOP, TUNED_LOOP)]
    for one, other, third in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(third, other, rtol=1e-12, atol=1e-12)

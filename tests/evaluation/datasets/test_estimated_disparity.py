"""Maps by networks: their orientation, their range without specks, and what is in focus."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from evaluation.datasets.estimated_disparity import nearest_value, read_estimated_disparity
from evaluation.datasets.focus_in_pictures import focus_at_common_edges, focus_in_mask


def opened_by_hand(values: np.ndarray) -> np.ndarray:
    """Smallest, then largest of the 3 x 3 pixels around each that lie in the map."""
    for choose in (np.min, np.max):
        values = np.array(
            [
                [
                    choose(values[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2])
                    for x in range(values.shape[1])
                ]
                for y in range(values.shape[0])
            ]
        )
    return values


@pytest.mark.parametrize("nearest", [1, 0])
def test_the_range_is_that_of_the_opened_map(tmp_path: Path, nearest: int) -> None:
    stored = np.random.default_rng(5).normal(3, 2, (12, 17)).astype(np.float32)
    stored[4:8, 6:11] += 10
    stored[2, 14] = 90
    np.save(tmp_path / "map.npy", stored)
    upright = stored if nearest == 1 else -stored
    opened = opened_by_hand(upright.astype(np.float64))
    wanted = ((upright - opened.min()) / (opened.max() - opened.min())).clip(0, 1)
    found = read_estimated_disparity(tmp_path / "map.npy", nearest)
    assert found == pytest.approx(wanted, abs=1e-6)
    assert found[2, 14] == nearest, "the speck is cut off, not the measure of all"


def test_the_convention_is_said_by_a_file(tmp_path: Path) -> None:
    assert nearest_value(tmp_path) == 1
    for content, wanted in (('{"nearest": 0}', 0), ('{"nearest": 1}', 1)):
        (tmp_path / "convention.json").write_text(content)
        assert nearest_value(tmp_path) == wanted
    for content in ('{"nearest": "black"}', '{"nearest": null}', '{"nearest": [0]}', "{}"):
        (tmp_path / "convention.json").write_text(content)
        with pytest.raises(ValueError, match="convention.json says that the nearest is"):
            nearest_value(tmp_path)


def test_focus_in_a_mask() -> None:
    disparity = np.arange(100, dtype=np.float32).reshape(10, 10) / 100
    mask = np.zeros((10, 10), np.float32)
    mask[2, 3:6] = 1
    mask[7] = 0.5
    assert focus_in_mask(disparity, mask) == pytest.approx(0.24)
    # Nowhere above a half: rows and columns 4 and 5, of which 0.44, 0.45, 0.54 and 0.55.
    assert focus_in_mask(disparity, np.minimum(mask, 0.5)) == pytest.approx(0.495)


def striped(*places: tuple[int, int, int, int]) -> np.ndarray:
    """(60, 60, 3) uint8 gray with white rectangles (top, bottom, left, right)."""
    picture = np.full((60, 60, 3), 90, np.uint8)
    for top, bottom, left, right in places:
        picture[top:bottom, left:right] = 250
    return picture


def test_focus_where_both_pictures_have_edges() -> None:
    disparity = np.full((60, 60), 0.2, np.float32)
    disparity[:, 30:] = 0.7
    left, right = (26, 34, 8, 20), (26, 34, 42, 54)
    both = striped(left, right)
    assert focus_at_common_edges(disparity, both, striped(left)) == pytest.approx(0.2)
    assert focus_at_common_edges(disparity, both, striped(right)) == pytest.approx(0.7)
    # In both: what is farther than the mean edge is left out, for maps are unsure at outlines.
    assert focus_at_common_edges(disparity, both, both) == pytest.approx(0.7)
    # Edges in the middle come first.
    middle = striped(right, (28, 32, 24, 27))
    assert focus_at_common_edges(disparity, middle, middle) == pytest.approx(0.2)
    # No edges at all: the central fifth, columns 24 to 35, of which the left half is 0.2.
    assert focus_at_common_edges(disparity, striped(), both) == pytest.approx(0.45)


def test_faint_edges_count_where_there_are_no_strong_ones() -> None:
    disparity = np.full((60, 60), 0.2, np.float32)
    disparity[:, 30:] = 0.7
    faint = striped((26, 34, 38, 50)) // 10 + 100
    assert np.ptp(faint) == 16
    assert focus_at_common_edges(disparity, faint, faint) == pytest.approx(0.7)

"""Control of blur: real renderers have it, and methods that ignore K or df are found out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from evaluation.__main__ import main
from evaluation.controllability import correlation, row_of, summary_of
from evaluation.methods import Method, method_by_name
from evaluation.results import read_results
from tests.evaluation.three_planes import PLANES, three_planes
from tests.evaluation.triples_folder import write_triples


def without(method: Method, **kept: float) -> Method:
    """The method, deaf to what is asked of it."""
    return Method("deaf", "", lambda asked: method.render(dataclasses.replace(asked, **kept)))


@pytest.fixture(scope="module")
def scatter() -> Method:
    return method_by_name("scatter")


def test_a_renderer_follows(scatter: Method) -> None:
    row = row_of(three_planes(), scatter)
    assert row["K_correlation"] > 0.99
    assert row["focus_follows"] == 1.0
    # Far at full K: radius 20 * 0.6. What it measures is that radius, growing from nothing.
    assert row["radius"] == pytest.approx(12)
    assert row["blur_by_K"] == pytest.approx([0, 3, 6, 9, 12], abs=0.6)
    assert row["focus_disparities"] == pytest.approx(PLANES)
    apart = 20 * np.abs(np.subtract.outer(PLANES, PLANES))
    np.testing.assert_allclose(row["blur_by_focus"], apart, atol=1.0)
    assert row["scene"] == "s" and row["setting"] == "f" and row["level"] == 12


def test_who_ignores_the_strength_is_found_out(scatter: Method) -> None:
    row = row_of(three_planes(), without(scatter, K=10.0))
    assert row["K_correlation"] == 0.0
    assert row["focus_follows"] == 1.0


def test_who_ignores_the_focus_is_found_out(scatter: Method) -> None:
    row = row_of(three_planes(), without(scatter, df=0.5))
    assert row["focus_follows"] == 0.0
    assert row["K_correlation"] > 0.99


def test_who_confuses_near_and_far_is_found_out(scatter: Method) -> None:
    turned = Method(
        "turned", "", lambda asked: scatter.render(dataclasses.replace(asked, df=1 - asked.df))
    )
    assert row_of(three_planes(), turned)["focus_follows"] == 0.0


def test_a_photograph_that_cannot_tell_has_no_figures(scatter: Method) -> None:
    flat = dataclasses.replace(three_planes(), image=np.full((120, 240, 3), 128, np.uint8))
    assert not {"K_correlation", "focus_follows"} & set(row_of(flat, scatter))
    sharp = row_of(three_planes(df=0.5, K=1.0), scatter)
    assert "K_correlation" not in sharp, "nothing is blurred by 2 px"


def test_an_unknown_strength_is_refused(scatter: Method) -> None:
    with pytest.raises(ValueError, match="Nobody knows the K of s_f"):
        row_of(three_planes(K=None), scatter)


def test_correlation_by_hand() -> None:
    assert correlation([0, 1, 2], [1, 3, 5]) == pytest.approx(1)
    assert correlation([0, 1, 2], [5, 3, 1]) == pytest.approx(-1)
    assert correlation([0, 1, 2], [0, 1, 0]) == pytest.approx(0)
    assert correlation([0, 1, 2], [0, 0, 1]) == pytest.approx(np.sqrt(3) / 2)
    assert correlation([0, 1, 2], [4, 4, 4]) == 0


def test_summary_by_hand() -> None:
    rows = [
        {"scene": "a", "K_correlation": 1.0, "focus_follows": 1.0},
        {"scene": "a", "K_correlation": 0.5, "focus_follows": 0.0},
        {"scene": "b", "focus_follows": 1.0},
        {"scene": "c", "K_correlation": 0.9},
    ]
    assert summary_of(rows) == {
        "K_correlation": pytest.approx(0.8),
        "K_correlation_minimum": 0.5,
        "focus_follows": 0.5,  # b of a and b
    }
    empty = {"K_correlation": None, "K_correlation_minimum": None, "focus_follows": None}
    assert summary_of([{"scene": "a"}]) == empty


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = write_triples(tmp_path / "triples"), tmp_path / "control.json"
    command = ["controllability", "triples", str(folder), "--method"]
    assert main([*command, "scatter", "--out", str(out)]) == 0
    results = read_results(out)
    assert results["kind"] == "controllability" and results["dataset"]["images"] == 3
    about = results["methods"]["scatter"]
    assert 0.99 < about["K_correlation_minimum"] <= about["K_correlation"] <= 1
    assert about["focus_follows"] == 1.0
    assert [row["setting"] for row in about["rows"]] == ["a_far", "a_near", "b_near"]
    assert "Pearson" in capsys.readouterr().out
    assert main([*command, "scatter", "--predictions", str(tmp_path)]) == 2
    assert "Finished pictures have one K" in capsys.readouterr().err


def test_an_unknown_strength_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_triples(tmp_path / "triples", known_K=False)
    assert main(["controllability", "triples", str(folder), "--method", "scatter"]) == 2
    assert "Nobody knows the K of a_a_far" in capsys.readouterr().err

"""Drops by hand, on rows and on a method whose error counts the pixels that are near."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.__main__ import main
from evaluation.datasets import open_dataset
from evaluation.methods import Method
from evaluation.metrics import Metric, metric_by_name
from evaluation.photographs import Photograph
from evaluation.results import read_results
from evaluation.robustness import drops_of, robustness
from tests.evaluation.triples_folder import NAMES, write_triples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_triples(tmp_path_factory.mktemp("triples") / "triples")


def metric(name: str, better: str) -> Metric:
    return Metric(name, better, "", "", lambda comparison: None)


def test_drops_and_quartiles_by_hand() -> None:
    before = [{"up": 30.0, "down": 0.1} for _ in range(5)]
    after = [{"up": 30.0 - drop, "down": 0.1 + drop} for drop in (10, 1, 3, 2, 4)]
    drops = drops_of(before, after, [metric("up", "higher"), metric("down", "lower")])
    for name in ("up", "down"):
        # Sorted: 1 2 3 4 10.
        assert drops[name] == pytest.approx(
            {"lower_quartile": 2, "median": 3, "upper_quartile": 4, "mean": 4}
        )


def test_what_gets_better_drops_below_zero() -> None:
    drops = drops_of([{"up": 20.0}], [{"up": 21.0}], [metric("up", "higher")])
    assert set(drops["up"].values()) == {-1.0}


def test_only_photographs_that_have_the_metric_count() -> None:
    before, after = [{"up": 5.0}, {"up": 7.0}, {}], [{"up": 4.0}, {}, {"up": 1.0}]
    metrics = [metric("up", "higher"), metric("nowhere", "higher")]
    assert drops_of(before, after, metrics)["up"]["mean"] == 1
    assert "nowhere" not in drops_of(before, after, metrics)


def near_columns(asked: list[Photograph]) -> Method:
    """The truth, too bright by a sixth of a level for each column that is near."""

    def render(photograph: Photograph) -> np.ndarray:
        asked.append(photograph)
        columns = (photograph.disparity > 0.35).sum(1)
        assert np.ptp(columns) == 0
        return (photograph.truth + columns[0] / 6) / 255

    return Method("near", "", render, device="cpu")


def test_a_method_by_hand(folder: Path) -> None:
    asked: list[Photograph] = []
    metrics = [metric_by_name("psnr"), metric_by_name("psnr_edge")]
    corruptions = {"erode": [6], "dilate": [6, 12]}
    dataset = open_dataset("triples", folder)
    results = robustness(dataset, [near_columns(asked)], metrics, corruptions)
    assert results["kind"] == "robustness" and "dilate: near things grown" in results["protocol"]
    assert list(results["methods"]) == ["identity", "near"]
    about = results["methods"]["near"]

    # The near half begins at column 60 of 120. So 60, 54, 66 and 72 columns are near: 10, 9, 11
    # and 12 levels of error everywhere, near edges, too.
    for name in ("psnr", "psnr_edge"):
        assert about["mean"][name] == pytest.approx(20 * math.log10(255 / 10))
        for corruption, level, error in (
            ("erode", "6", 9),
            ("dilate", "6", 11),
            ("dilate", "12", 12),
        ):
            drop = about["drops"][corruption][level][name]
            expected = 20 * math.log10(error / 10)
            assert drop == pytest.approx(dict.fromkeys(drop, expected))
            assert set(drop) == {"lower_quartile", "median", "upper_quartile", "mean"}
    assert list(about["drops"]) == ["erode", "dilate"] and list(about["drops"]["dilate"]) == [
        "6",
        "12",
    ]

    # Each photograph once as it is and once for each level; and one for the memory it takes.
    assert len(asked) == 3 * 4 + 1
    rows = about["rows"]
    assert [(row["corruption"], row["corruption_level"]) for row in rows[::3]] == [
        ("none", 0), ("erode", 6), ("dilate", 6), ("dilate", 12)
    ]  # fmt: skip
    assert [f"{row['scene']}_{row['setting']}" for row in rows] == NAMES * 4
    assert about["seconds_per_image"] is not None


def test_the_identity_loses_nothing(folder: Path) -> None:
    results = robustness(
        open_dataset("triples", folder),
        [near_columns([])],
        [metric_by_name("psnr")],
        {"erode": [2]},
    )
    drop = results["methods"]["identity"]["drops"]["erode"]["2"]["psnr"]
    assert json.dumps(list(drop.values())) == "[0.0, 0.0, 0.0, 0.0]", "nor minus nothing"


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "drops.json"
    options = ["--method", "scatter", "--corruption", "erode", "--corruption", "quantise"]
    options += ["--levels", "1,4", "--quantise-levels", "4,65536", "--metric", "psnr"]
    assert main(["robustness", "triples", str(folder), *options, "--out", str(out)]) == 0
    results: dict[str, Any] = read_results(out)
    assert results["kind"] == "robustness" and results["command"].endswith(str(out))
    drops = results["methods"]["scatter"]["drops"]
    # The truth was made by the scatter itself, so that every error is the corruption's.
    assert drops["erode"]["4"]["psnr"]["median"] > drops["erode"]["1"]["psnr"]["median"] > 3
    assert drops["quantise"]["4"]["psnr"]["median"] > 3
    assert abs(drops["quantise"]["65536"]["psnr"]["median"]) < 0.1
    printed = capsys.readouterr().out
    assert "scatter" in printed and "eroded 4 px" in printed


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--levels", "1,x"], "--levels is '1,x'; wanted whole numbers"),
        (["--levels", "0"], "The level of erode is 0"),
        (["--quantise-levels", "1"], "The level of quantise is 1"),
        (["--corruption", "melt"], "There is no corruption 'melt'"),
        (["--predictions", "."], "Finished pictures were made from one disparity"),
    ],
)
def test_mistakes(
    options: list[str], sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["robustness", "triples", str(folder), "--method", "scatter", *options]
    assert main(command) == 2
    assert sentence in capsys.readouterr().err

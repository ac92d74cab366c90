"""The benchmark of the sweep: on a scene made here, by hand, and what it has to reach."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from evaluation.datasets import open_dataset
from evaluation.sweep import add_arguments, evaluate, figures_of, filled, run, stacks_of
from tests.evaluation.test_raytraced import FAR, NEAR, write_scene

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("sweep")
    write_scene(data / "s01", seed=1)
    return data


def command(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parsed = parser.parse_args(arguments)
    parsed.command_line = "python -m evaluation sweep"
    return parsed


def test_command_measures_a_scene_and_writes_what_it_found(
    benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, pictures = tmp_path / "sweep.json", tmp_path / "pictures"
    options = ["--out", str(out), "--pictures", str(pictures), "--rendered-frames", "1"]
    assert run(command("raytraced", str(benchmark), *options)) == 0
    printed = capsys.readouterr().out
    assert "all scenes" in printed and "8-bit sRGB" in printed

    report = json.loads(out.read_text())
    rows = {(row["scene"], row["protocol"]): row for row in report["rows"]}
    names = ["all", "nearest", "farthest", "rendered"]
    names += [f"{name}, regression" for name in names[1:]]
    assert set(rows) == {(scene, name) for scene in ("s01", "all scenes") for name in names}
    assert rows["s01", "all"]["frames"] == 2 and rows["s01", "nearest"]["frames"] == 1
    # The frames disagree in focus: each surface is blurred in one of them, and sharp in the other.
    assert rows["s01", "all"]["median"] < 0.05
    assert rows["s01", "all"]["reliable_share"] > 0.5
    # A single scene is all scenes.
    figures = ("median", "reliable_share", "filled_within_5_percent")
    for name in names:
        for figure in figures:
            assert rows["s01", name][figure] == rows["all scenes", name][figure]
    drawn = sorted(file.name for file in pictures.iterdir())
    assert len(drawn) == len(names) and "s01_rendered_regression.png" in drawn


def test_stacks_say_what_the_lens_did(benchmark: Path) -> None:
    photographs = list(open_dataset("raytraced", benchmark).photographs())
    stacks = {stack.protocol: stack for stack in stacks_of(photographs, 3)}
    assert stacks["all"].df == [NEAR, FAR] and stacks["all"].side == "both"
    assert stacks["nearest"].df == [NEAR] and stacks["nearest"].side == "farther"
    assert stacks["farthest"].df == [FAR] and stacks["farthest"].side == "nearer"
    rendered = stacks["rendered"]
    assert rendered.side == "farther" and len(rendered.K) == 3 == rendered.frames.shape[1]
    nearest, farthest = float(rendered.truth.max()), float(rendered.truth.min())
    assert rendered.df == [pytest.approx(nearest)] * 3
    assert rendered.K[-1] * (nearest - farthest) == pytest.approx(150 / 12)
    # Frames differ only by rounding from what 8 bits can hold.
    assert float(rendered.frames.max()) <= 1


def test_holes_are_filled_from_the_nearest_that_is_known() -> None:
    values = np.array([[1.0, 9.0, 9.0, 4.0]])
    known = np.array([[True, False, False, True]])
    assert filled(values, known).tolist() == [[1.0, 1.0, 4.0, 4.0]]
    assert filled(values, ~known & False).tolist() == values.tolist()


def test_figures_by_hand() -> None:
    errors = np.array([0.01, 0.07, 0.2, 0.4])
    reliable = np.array([True, True, True, False])
    figures = figures_of(errors, reliable, np.array([0.01, 0.07, 0.2, 0.04]))
    assert figures["reliable_share"] == 0.75 and figures["median"] == pytest.approx(0.07)
    assert figures["within_5_percent"] == pytest.approx(1 / 3)
    assert figures["within_10_percent"] == pytest.approx(2 / 3)
    assert figures["median_everywhere"] == pytest.approx(0.135)
    assert figures["median_filled"] == pytest.approx(0.055)
    assert figures["filled_within_5_percent"] == 0.5
    assert figures_of(errors, reliable & False, errors)["median"] is None


def test_mistakes_are_told(benchmark: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--rendered-frames is -1"):
        run(command("raytraced", str(benchmark), "--rendered-frames", "-1"))
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ValueError, match="a file; wanted a folder"):
        run(command("raytraced", str(benchmark), "--pictures", str(file)))
    assert file.read_text() == "mine"
    with pytest.raises(ValueError, match="no benchmark folder"):
        run(command("raytraced", str(tmp_path / "nowhere")))


@pytest.mark.slow
def test_ray_traced_scenes_are_recovered_within_five_percent(shared_root: Path) -> None:
    """True thin-lens pictures by another renderer: what the sweep has to reach."""
    data = shared_root / "bench" / "raytraced" / "data"
    rows = evaluate(open_dataset("raytraced", data).photographs(), 0)
    for row in rows:
        assert row["median"] <= 0.05, row
        if row["protocol"] == "all":
            assert row["reliable_share"] >= 0.5, row

"""``python -m evaluation speed classical`` times the renderers; here on a small photograph."""

import json
import subprocess
import sys

import pytest
import torch

from bokehdiff.rendering import Aperture
from evaluation import classical_speed
from evaluation.__main__ import main

pytest.importorskip("skimage", reason="the photograph is in scikit-image (pip install '.[data]')")


def test_the_command_writes_table_and_json(tmp_path):
    out = tmp_path / "classical.json"
    command = [sys.executable, "-m", "evaluation", "speed", "classical", "--megapixels", "0.02"]
    command += ["--radius", "2,6", "--method", "scatter", "--repeats", "2", "--cat-eye", "0.4"]
    finished = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, timeout=240
    )
    assert finished.returncode == 0, finished.stderr

    report = json.loads(out.read_text())
    assert report["hardware"]["torch_threads"] == 1
    assert report["aperture"] == {"cat_eye": 0.4}
    small, large = report["classical"]
    for row, radius in ((small, 2), (large, 6)):
        assert row["method"] == "scatter" and row["radius"] == radius
        assert row["width"] * row["height"] == pytest.approx(0.02e6, rel=0.02)
        # Disparity in [0, 1] and a focus in the middle.
        assert row["K"] == pytest.approx(2 * radius, rel=0.1)
        assert 0 < row["seconds"] < 100
        assert 0 <= row["peak_megabytes"] < 1000
    assert small["ratio_to_radius_before"] is None
    assert large["ratio_to_radius_before"] == pytest.approx(large["seconds"] / small["seconds"])

    table, explained = finished.stdout.split("\n\n")
    heading, first, second = table.splitlines()
    assert heading.split()[:3] == ["method", "radius", "seconds"]
    assert first.split()[:2] == ["scatter", "2"] and first.split()[3] == "-"
    assert second.split()[3] == f"{large['ratio_to_radius_before']:.2f}"
    assert "Aperture(cat_eye=0.4)" in explained and "processor time of one thread" in explained


def test_every_method_is_timed_by_default(monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(classical_speed, "peak_bytes", lambda case: 5e6)
    assert main("speed classical --megapixels 0.01 --radius 2 --repeats 1".split()) == 0
    rows = capsys.readouterr().out.split("\n\n")[0].splitlines()[1:]
    assert [row.split()[0] for row in rows] == list(classical_speed.METHODS)
    assert {row.split()[-1] for row in rows} == {"5"}


def test_the_radius_is_that_of_the_largest_circle(monkeypatch):
    given = []

    def record(image, disparity, df, K, **_):
        given.append(float((K * (disparity - df)).abs().max()))

    monkeypatch.setattr(classical_speed, "render_bokeh", record)
    monkeypatch.setattr(classical_speed, "peak_bytes", lambda case: 0)
    classical_speed.measure(["scatter"], [3.0, 7.5], 0.01, 1, Aperture(), "cpu")
    assert given == pytest.approx([3, 3, 7.5, 7.5])


@pytest.mark.slow
def test_memory_is_that_of_one_render():
    """Four times the pixels: a render holds at least its picture, float32, thrice over."""
    small, large = (
        classical_speed.peak_bytes(
            classical_speed.Case("scatter", 4.0, megapixels, Aperture(), "cpu")
        )
        for megapixels in (0.5, 2.0)
    )
    assert large > 2e6 * 3 * 4 * 3
    assert 2 < large / small < 8


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--megapixels 0", "--megapixels must be in [0.01, 100], got 0"),
        ("--repeats 0", "--repeats must be at least 1, got 0"),
        ("--threads 0", "--threads must be at least 1, got 0"),
        ("--radius large", "--radius takes numbers with commas between them, got 'large'"),
        ("--radius 8,4", "each larger than the one before, got 8,4"),
        ("--radius=-1", "--radius takes positive numbers"),
        ("--method abacus", "There is no method 'abacus'; choose from "),
        ("--cat-eye 2", "cat_eye is 2.0; wanted 0 (none) to 1"),
        ("--device abacus", "--device abacus cannot be used here"),
        ("--out no/such/folder/speed.json", "There is no folder no/such/folder"),
    ],
)
def test_mistakes_get_a_sentence(arguments, sentence, capsys):
    assert main(["speed", "classical", *arguments.split()]) == 2
    assert sentence in capsys.readouterr().err

"""The measuring of the tracer's speed: its scene, its opponent, its command."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from bokehdiff.rendering import Aperture
from data_synthesis.planes import trace_planes
from data_synthesis.speed import (
    EXAMPLE_RADIUS,
    compare_with_numpy,
    example_scene,
    main,
    samples_per_second,
    trace_with_numpy,
)


def test_example_is_what_it_says() -> None:
    scene = example_scene(48)
    near, far = scene["planes"]
    assert scene["df"] == far[0]
    assert scene["K"] * (near[0] - scene["df"]) == pytest.approx(EXAMPLE_RADIUS)
    top, left, height, width = scene["window"]
    assert (height, width) == (48, 48)
    alpha = scene["layers"][0, top : top + height, left : left + width, 3]
    # A disc of a third of the side in radius, somewhat ragged.
    assert alpha.mean() == pytest.approx(np.pi / 9, rel=0.05)
    assert scene["layers"][1, ..., 3].min() == 1
    # No ray leaves the canvas: every pixel of light is a full mean.
    assert min(top, left) > EXAMPLE_RADIUS


def test_both_trace_the_same_picture() -> None:
    scene = example_scene(32)
    settings = {"samples_per_side": 9, "aperture": Aperture(blades=6, cat_eye=0.3)}
    compiled = trace_planes(**scene, **settings)
    exact = scene | {"layers": scene["layers"].astype(np.float64)}
    np.testing.assert_allclose(compiled, trace_with_numpy(**exact, **settings), atol=2e-5)


def test_a_part_of_the_lens_samples_is_a_coarser_picture() -> None:
    scene = example_scene(16)
    whole = trace_with_numpy(**scene, samples_per_side=15)
    part = trace_with_numpy(**scene, samples_per_side=15, every=3)
    assert 0 < np.abs(whole - part).mean() < 0.03


def test_numpy_is_extrapolated_from_some_lens_samples() -> None:
    options = argparse.Namespace(
        size=24, samples_per_side=9, aperture={"blades": 5}, count=1, numpy_samples=7
    )
    comparison = compare_with_numpy(options)
    samples = len(Aperture(blades=5).lens_samples(9))
    assert comparison["lens_samples"] == samples
    assert 7 <= comparison["lens_samples_measured_in_numpy"] < samples
    assert comparison["numpy_seconds"] > comparison["compiled_seconds"] > 0
    assert comparison["ratio"] == pytest.approx(
        comparison["numpy_seconds"] / comparison["compiled_seconds"]
    )


@pytest.mark.slow
def test_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.json"
    small = ["--size", "32", "--samples-per-side", "5", "--count", "1", "--numpy-samples", "7"]
    assert main([*small, "--processes", "2", "--aperture", '{"blades": 5}', "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "32 x 32 px, 2 layers" in printed and "Aperture(blades=5)" in printed
    report = json.loads(out.read_text())
    assert report["hardware"]["processor"] in printed
    assert report["settings"]["aperture"] == {"blades": 5}
    for name, speeds in report["samples_per_second"].items():
        assert name in printed
        assert set(speeds) == {"1", "2"} and min(speeds.values()) > 0


@pytest.mark.slow
def test_a_failing_process_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="process failed"):
        samples_per_second("no such work", argparse.Namespace(count=1), 1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--count", "0"], "--count is 0"),
        (["--samples-per-side", "-3"], "--samples-per-side is -3"),
        (["--aperture", '{"blades": 2}'], "blades is 2"),
        (["--aperture", '{"petals": 5}'], "no petals"),
    ],
)
def test_mistakes_are_refused(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert sentence in capsys.readouterr().err


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.json"
    out.write_text("mine")
    with pytest.raises(SystemExit):
        main(["--out", str(out)])
    assert out.read_text() == "mine"
    assert "exists" in capsys.readouterr().err

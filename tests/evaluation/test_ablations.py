"""Variants of a model side by side, on a tiny Stable Diffusion XL."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bokehdiff.checkpoints import write_bokeh_weights
from evaluation.__main__ import main
from evaluation.ablations import ablations
from evaluation.datasets import open_dataset
from evaluation.metrics import metric_by_name
from evaluation.pipeline_rendering import render_with
from evaluation.results import read_results
from tests.evaluation.triples_folder import write_triples
from tests.trained_pipelines import assert_unchanged, base_pipeline, state_of, usual_weights

VARIANTS = ["full", "no query softmax", "no CoC", "no occlusion", "T = 249", "T = 499", "T = 749"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_triples(tmp_path_factory.mktemp("triples") / "triples")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    base_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_bokeh_weights(usual_weights(), folder)
    return folder


def test_changes_are_those_of_the_means(folder: Path, weights: Path, one_thread: None) -> None:
    pipeline = base_pipeline()
    pipeline.load_bokeh_weights(weights, adapter_name="trained")
    before = state_of(pipeline)
    dataset = open_dataset("triples", folder)
    metrics = [metric_by_name("psnr"), metric_by_name("ssim")]
    results = ablations(dataset, pipeline, metrics, weights="trained", description="tiny")
    assert_unchanged(pipeline, before)

    assert results["kind"] == "ablations" and results["against"] == "full"
    found = results["methods"]
    assert list(found) == [*VARIANTS, "fixed encoder", "identity"]
    assert results["missing"] == {}
    assert found["full"]["description"] == "the model as it is: tiny"
    assert "change" not in found["full"]
    for name in [*VARIANTS[1:], "fixed encoder"]:
        for metric in ("psnr", "ssim"):
            change = found[name]["mean"][metric] - found["full"]["mean"][metric]
            assert found[name]["change"][metric] == pytest.approx(change, abs=1e-12) != 0
            # Two scenes, so there is an interval; it holds the mean of the differences.
            low, high = found[name]["difference"][metric]["interval"]
            assert low <= found[name]["change"][metric] <= high
    for row, photograph in zip(found["full"]["rows"], dataset.photographs(), strict=True):
        picture = np.round(render_with(pipeline, photograph).clip(0, 1) * 255) / 255
        assert row["psnr"] == metrics[0].measure(picture, photograph)


def test_command_line(
    folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ablations.json"
    options = ["--model", str(model), "--metric", "psnr", "--scenes", "b", "--out", str(out)]
    assert main(["ablations", "triples", str(folder), *options]) == 0
    results = read_results(out)
    # This one was made for T = 499.
    assert list(results["methods"]) == [*(v for v in VARIANTS if v != "T = 499"), "identity"]
    assert "--bokeh-weights" in results["missing"]["fixed encoder"]
    assert results["methods"]["no CoC"]["difference"]["psnr"]["interval"] is None, "one scene"
    printed = capsys.readouterr().out
    assert "no query softmax" in printed and "nothing is trained again" in printed
    assert "No row fixed encoder" in printed


def test_command_line_with_weights(
    folder: Path, model: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ablations.json"
    options = ["--model", str(model), "--bokeh-weights", str(weights), "--metric", "psnr"]
    options += ["--scenes", "b", "--out", str(out)]
    assert main(["ablations", "triples", str(folder), *options]) == 0
    assert list(read_results(out)["methods"]) == [*VARIANTS, "fixed encoder", "identity"]
    assert str(weights) in capsys.readouterr().out


def test_a_folder_that_holds_no_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ablations", "triples", str(folder), "--model", str(tmp_path)]) == 2
    assert f"--model {tmp_path} holds no model" in capsys.readouterr().err

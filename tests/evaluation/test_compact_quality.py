"""`python -m evaluation compact-quality`: its scores, its regions, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bokehdiff.pipelines.litebokeh import LiteBokehPipeline
from data_synthesis.layer_scenes import LayerScenes
from data_synthesis.writer import write_shards
from evaluation.__main__ import main
from evaluation.compact_quality import (
    IDENTITY,
    METRICS,
    WITHOUT,
    compact_quality,
    inside,
    scores,
)
from tests.tiny_litebokeh import tiny_glass, tiny_unet

SCENES = LayerScenes(
    5, 64, focus={"foreground": 1}, radius=(6, 6), facing_angle=0, stopped_down=0.1125, length=3
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "shards"
    write_shards(SCENES, folder, count=3, num_shards=1)
    return folder


def halves() -> dict[str, torch.Tensor]:
    """The left half is in focus, the right one blurred by 4 px, both with stripes in the truth;
    the photo has twice the contrast on the right."""
    disparity = torch.full((1, 32, 64), 0.8)
    disparity[..., 32:] = 0.4
    target = 0.5 + 0.2 * (torch.arange(64) % 2 * 2 - 1).expand(3, 32, 64)
    image = target.clone()
    image[..., 32:] = 0.5 + 2 * (target[..., 32:] - 0.5)
    return {
        "image": image, "target": target, "disparity": disparity,
        "df": torch.tensor(0.8), "K": torch.tensor(10.0),
    }  # fmt: skip


def test_the_truth_scores_best():
    found = scores(halves()["target"][None], halves())
    assert set(found) == set(METRICS)
    assert found["ssim"] == pytest.approx(1) and found["psnr"] > 80
    assert found["sharpness"] == found["background_contrast"] == 1
    assert found["background_error"] == 0
    assert scores(halves()["image"][None], halves())["background_error"] == 1


def test_each_region_has_its_own_error_and_contrast():
    scene = halves()
    picture = scene["target"][None].clone()
    picture[..., 32:] = 0.5 + 0.5 * (picture[..., 32:] - 0.5)  # half the contrast behind
    found = scores(picture, scene)
    assert found["psnr_background"] == pytest.approx(20, abs=0.01)  # an error of 0.1
    assert found["background_error"] == pytest.approx(0.5, abs=1e-6)  # the photo's is 0.2
    assert found["psnr_subject"] > 80
    assert found["sharpness"] == 1
    assert found["background_contrast"] == pytest.approx(0.5, abs=1e-6)


def test_the_rim_of_the_subject_does_not_count_as_sharp_or_not():
    region = torch.zeros(1, 1, 20, 20, dtype=torch.bool)
    region[..., :10] = True
    assert inside(region)[..., :7].all() and not inside(region)[..., 7:].any()


def test_networks_beside_the_photo():
    networks = {"tiny": tiny_unet(), "glass": tiny_glass()}
    scenes = [SCENES[index] for index in range(2)]
    results = compact_quality(networks, scenes)
    methods = results["methods"]
    names = [IDENTITY, "tiny", "tiny" + WITHOUT, "glass", "glass" + WITHOUT]
    assert list(methods) == names and results["against"] == "tiny"
    for name, enhance in (("tiny", True), ("tiny" + WITHOUT, False)):
        picture = networks["tiny"](scenes[1]["image"][None], enhance=enhance).bokeh
        error = np.square(picture.numpy() - scenes[1]["target"].numpy()).mean()
        assert methods[name]["rows"][1]["psnr"] == pytest.approx(-10 * np.log10(error), rel=1e-5)
    assert "parameters" in methods["glass"]["description"]


def test_the_command(shards, tmp_path, capsys):
    for name, network in (("first", tiny_unet()), ("second", tiny_unet(seed=4))):
        LiteBokehPipeline(network).save_pretrained(tmp_path / name)
    models = [f"--model={name}={tmp_path / name}" for name in ("first", "second")]
    words = ["compact-quality", str(shards), *models, "--count", "2"]
    assert main([*words, "--out", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert "Difference from first" in printed and "second without enhancement" in printed
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["dataset"]["images"] == 2
    again = compact_quality({"first": tiny_unet()}, [SCENES[index] for index in range(2)])
    for metric, value in again["methods"]["first"]["mean"].items():
        assert written["methods"]["first"]["mean"][metric] == pytest.approx(value, abs=1e-3)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "folder"], "wanted NAME=FOLDER"),
        (["--model", "a=nowhere/at/all"], "no folder"),
        (["--count", "0"], "--count is 0"),
    ],
)
def test_mistakes(shards, capsys, words, told):
    assert main(["compact-quality", str(shards), *words]) == 2
    assert told in capsys.readouterr().err

"""Runs of BokehFlow: what they leave, exact resume, from photographs to clips, configurations."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bokehdiff.models.bokehflow import BokehFlowModel
from bokehdiff.pipelines.bokehflow import BokehFlowPipeline
from data_synthesis.clip_files import write_clips
from data_synthesis.clip_scenes import ClipScenes
from tests.training.bokehflow_runs import CLIPS, LINE, TINY, arguments, write_pairs
from tests.training.runs import REPOSITORY, assert_same_tensors, launch, logged
from training import train_bokehflow
from training.bokehflow_task import options_of

WEIGHTS = "model/diffusion_pytorch_model.safetensors"


def train(output_dir: Path, *flags: str, **settings: Any) -> None:
    train_bokehflow.main(train_bokehflow.parse_args(arguments(output_dir, *flags, **settings)))


def photo() -> torch.Tensor:
    return torch.rand(1, 3, 21, 34, generator=torch.Generator().manual_seed(0))


def disparity() -> torch.Tensor:
    return torch.linspace(0, 1, 34).expand(1, 1, 21, 34).contiguous()


def test_a_run_leaves_a_pipeline_a_log_and_a_card(tmp_path: Path) -> None:
    train(tmp_path, validation_scenes=2, validation_steps=1, validation_pictures=1, ema_decay=0.5)
    first = logged(tmp_path, "train")[0]
    assert {"loss", "reconstruction", "ssim", "physics", "depth", "gradient_norm_network"} <= set(
        first
    )
    validations = logged(tmp_path, "validation")
    assert [entry["step"] for entry in validations] == [0, 1, 2]
    assert (tmp_path / "validation" / "step-000002.png").is_file()

    model = BokehFlowModel.from_pretrained(tmp_path, subfolder="model")
    assert model.config.max_coc_radius == 96 and model.config.channels == 8
    pipe = BokehFlowPipeline.from_pretrained(tmp_path)
    lens = {"df": 0.2, "K": 3.0, "preserve_detail": False}
    blurred = pipe(photo(), disparity(), **lens, output_type="pt").images
    assert blurred.shape == (1, 3, 21, 34)
    direct = model.blur(photo(), 0.2, 3.0, disparity=disparity()).bokeh
    assert torch.allclose(blurred, direct, atol=1e-5)

    card = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    assert f"| after training | {validations[-1]['psnr']:.2f} |" in card
    assert "1 x L1 + 1 x (1 - SSIM) + 0.2 x L1 of the physics + 0.1 x SILog" in card


@pytest.mark.parametrize("settings", [{}, CLIPS], ids=["stills", "clips"])
def test_a_run_in_pieces_ends_with_the_weights_of_an_unbroken_one(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings = {**settings, "max_train_steps": 4, "ema_decay": 0.9}
    train(tmp_path / "whole", **settings)
    train(tmp_path / "pieces", checkpoint_steps=2, **settings)
    whole, pieces = (tmp_path / name / WEIGHTS for name in ("whole", "pieces"))
    assert_same_tensors(whole, pieces)
    shutil.rmtree(tmp_path / "pieces" / "checkpoint-4")  # as if it had been killed after step 2
    pieces.unlink()
    train(tmp_path / "pieces", "--resume", "latest", **settings)
    assert_same_tensors(whole, pieces)
    assert [entry["step"] for entry in logged(tmp_path / "pieces", "train")] == [1, 2, 3, 4]


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(ValueError, match="holds a network of other options"):
        train(
            *(tmp_path, "--resume", "latest"),
            **{"model_options": {**TINY, "largest_carry": 0.5}, "max_train_steps": 3},
        )


def test_pairs_of_photographs_are_trained_on(tmp_path: Path) -> None:
    lines = [{**LINE, "disparity": "disparity.png"}, {**LINE, "depth": "depth.npy"}, LINE]
    folder = write_pairs(tmp_path / "pairs", *lines)
    train(
        tmp_path / "out",
        **{"data_kind": "pairs", "data_folder": folder, "max_train_steps": 3},
        **{"validation_folder": folder, "validation_scenes": 3},
    )
    scores = logged(tmp_path / "out", "validation")[-1]
    assert scores["scenes"] == 3 and "psnr_own_depth" in scores and "abs_rel" in scores
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license" not in yaml.safe_load(card.split("---")[1])
    assert "So does that of the photographs" in card


@pytest.mark.slow
def test_the_scripts_train_on_photographs_and_then_on_clips(tmp_path: Path) -> None:
    write_clips(ClipScenes(1, 32, frames=3), tmp_path / "clips", count=3)
    script = "training/train_bokehflow.py"
    done = launch(arguments(tmp_path / "stills"), script=script)
    assert done.returncode == 0, done.stderr
    flags = arguments(
        tmp_path / "film",
        **{"model_variant": None, "model_options": None, "pretrained": tmp_path / "stills"},
        **{"data_kind": "clips", "data_folder": tmp_path / "clips", "validation_scenes": 2},
    )
    done = launch(flags, script=script)
    assert done.returncode == 0, done.stderr
    assert "warping error" in done.stdout + done.stderr

    before, after = (
        BokehFlowPipeline.from_pretrained(tmp_path / name).model for name in ("stills", "film")
    )
    assert options_of(before) == options_of(after)
    # Photographs tell nothing about what is carried over a film.
    untrained = BokehFlowModel(**TINY)
    for name in ("stillness.log_tolerance", "bokeh_carry.gate.bias"):
        assert torch.equal(before.get_parameter(name), untrained.get_parameter(name))
        assert not torch.equal(before.get_parameter(name), after.get_parameter(name))

    out = after(photo(), *[torch.tensor([value]) for value in (2.0, 50.0, 2.0)])
    again = after(photo(), *[torch.tensor([value]) for value in (2.0, 50.0, 2.0)], state=out.state)
    assert torch.isfinite(again.bokeh).all() and again.bokeh.shape == (1, 3, 21, 34)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("bokehflow_nano", "outputs/flow/nano"),
        ("bokehflow_nano_clips", "outputs/flow/nano_clips"),
        ("bokehflow_paper", "outputs/bokehflow_small"),
    ],
)
def test_configurations_are_read(name: str, folder: str) -> None:
    args = train_bokehflow.parse_args(
        ["--config", str(REPOSITORY / f"training/configs/{name}.yaml")]
    )
    assert args.output_dir == folder


def test_the_clips_go_on_where_the_photographs_ended() -> None:
    stills, clips = (
        train_bokehflow.parse_args(["--config", str(REPOSITORY / f"training/configs/{name}.yaml")])
        for name in ("bokehflow_nano", "bokehflow_nano_clips")
    )
    assert clips.pretrained == stills.output_dir and clips.data_kind == "clips"

"""Runs of LiteBokeh: what they leave, exact resume, from one phase to the next, configurations."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from bokehdiff.models.litebokeh import GlassEncNet, TinyUnet
from bokehdiff.pipelines.litebokeh import LiteBokehPipeline
from tests.training.litebokeh_runs import GLASS, arguments
from tests.training.runs import REPOSITORY, assert_same_tensors, launch, logged
from tests.training.test_litebokeh_data import write_pairs
from training import train_litebokeh

WEIGHTS = "model/diffusion_pytorch_model.safetensors"
SCRIPT = "training/train_litebokeh.py"
ENHANCEMENT: dict[str, Any] = {"model_kind": None, "model_options": None, "phase": "enhancement"}


def train(output_dir: Path, *flags: str, **settings: Any) -> None:
    train_litebokeh.main(train_litebokeh.parse_args(arguments(output_dir, *flags, **settings)))


def photo() -> torch.Tensor:
    return torch.rand(1, 3, 21, 34, generator=torch.Generator().manual_seed(0))


def test_a_run_leaves_a_pipeline_a_log_and_a_card(tmp_path: Path) -> None:
    train(tmp_path, validation_scenes=2, validation_steps=1, validation_pictures=1, ema_decay=0.5)
    first = logged(tmp_path, "train")[0]
    assert {"loss", "l1", "ssim", "gradient_norm_network"} <= set(first)
    validations = logged(tmp_path, "validation")
    assert [entry["step"] for entry in validations] == [0, 1, 2]
    assert (tmp_path / "validation" / "step-000002.png").is_file()

    model = TinyUnet.from_pretrained(tmp_path, subfolder="model")
    assert tuple(model.config.channels) == (4, 8, 8)
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        pipe = LiteBokehPipeline.from_pretrained(folder)
        assert pipe(photo(), output_type="pt").images.shape == (1, 3, 21, 34)
    blurred = LiteBokehPipeline.from_pretrained(tmp_path)(photo(), output_type="pt").images
    assert torch.allclose(blurred, model.eval()(photo()).bokeh, atol=1e-6)

    card = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    assert f"| after training | {validations[-1]['psnr']:.2f} |" in card
    assert "10 x L1 + 10 x (1 - SSIM), on sRGB in [0, 1], up to 3 times" in card
    assert "strength of the blur cannot be controlled" in card and "no depth" in card


@pytest.mark.parametrize(
    "settings",
    [{}, GLASS, {"loss_adversarial_weight": "{0: 0, 2: 0.5}", "learning_rate": 0.01}],
    ids=["tiny", "glass", "adversarial"],
)
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
    course = logged(tmp_path / "pieces", "train")
    assert [entry["step"] for entry in course] == [1, 2, 3, 4]
    assert all(math.isfinite(entry["loss"]) for entry in course)
    if "loss_adversarial_weight" in settings:
        # The judges went on from where they were, and they have learned.
        folders = [tmp_path / name / "checkpoint-4/trainer_state" for name in ("whole", "pieces")]
        files = [folder / "discriminator.safetensors" for folder in folders]
        assert_same_tensors(*files)
        early = load_file(
            tmp_path / "pieces" / "checkpoint-2/trainer_state/discriminator.safetensors"
        )
        assert any(
            not torch.equal(value, early[name]) for name, value in load_file(files[0]).items()
        )
        assert {"adversarial", "discriminator", "gradient_norm_discriminator"} <= set(course[0])


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    for settings in ({"model_options": {"channels": [4, 8, 16]}}, GLASS):
        with pytest.raises(ValueError, match="holds a network of other options"):
            train(tmp_path, "--resume", "latest", max_train_steps=3, **settings)
    with pytest.raises(ValueError, match="was saved without a discriminator"):
        train(tmp_path, "--resume", "latest", max_train_steps=3, loss_adversarial_weight=0.1)


def test_another_process_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    settings = {"max_train_steps": 3, "ema_decay": 0.9, "validation_scenes": 1}
    train(tmp_path / "whole", **settings)
    train(tmp_path / "pieces", checkpoint_steps=2, **settings)
    shutil.rmtree(tmp_path / "pieces" / "checkpoint-3")
    (tmp_path / "pieces" / WEIGHTS).unlink()
    done = launch(arguments(tmp_path / "pieces", "--resume", "latest", **settings), script=SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "sharpness of the subject" in done.stdout + done.stderr
    assert_same_tensors(tmp_path / "whole" / WEIGHTS, tmp_path / "pieces" / WEIGHTS)
    scores = [logged(tmp_path / name, "validation")[-1] for name in ("whole", "pieces")]
    assert scores[0]["psnr"] == scores[1]["psnr"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_several_processes_keep_the_statistics_of_the_first(tmp_path: Path) -> None:
    settings = {"max_train_steps": 4, "loss_adversarial_weight": 0.1}
    for name in ("whole", "pieces"):
        done = launch(
            arguments(tmp_path / name, checkpoint_steps=2, **settings), processes=2, script=SCRIPT
        )
        assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "pieces" / "checkpoint-4")
    (tmp_path / "pieces" / WEIGHTS).unlink()
    flags = arguments(tmp_path / "pieces", "--resume", "latest", **settings)
    done = launch(flags, processes=2, script=SCRIPT)
    assert done.returncode == 0, done.stderr
    assert_same_tensors(tmp_path / "whole" / WEIGHTS, tmp_path / "pieces" / WEIGHTS)


def test_the_enhancement_is_trained_on_the_result_and_leaves_it_as_it_is(tmp_path: Path) -> None:
    train(tmp_path / "bokeh")
    base = {"pretrained": tmp_path / "bokeh", "validation_scenes": 2, "ema_decay": 0.5}
    train(tmp_path / "enhanced", **ENHANCEMENT, **base)
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("bokeh", "enhanced"))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and all(name.startswith("enhancement.") for name in changed)
    card = (tmp_path / "enhanced" / "README.md").read_text()
    assert "license" not in yaml.safe_load(card.split("---")[1])
    assert f"The licence of `{tmp_path / 'bokeh'}` holds" in card
    assert "- photographs made worse: " in card and "- the enhancement changes" in card


def test_pairs_of_photographs_are_trained_on(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "pairs")
    pairs = {"data_kind": "pairs", "data_folder": folder, "data_crop_size": 24}
    held_out = {"validation_folder": folder, "validation_scenes": 2}
    train(tmp_path / "out", **pairs, **held_out)
    scores = logged(tmp_path / "out", "validation")[-1]
    assert scores["scenes"] == 2 and "psnr_identity" in scores
    assert "psnr_subject" not in scores  # nobody has said what is in focus
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license" not in yaml.safe_load(card.split("---")[1])
    assert "So does that of the photographs" in card


def test_the_larger_network_is_trained_and_loaded(tmp_path: Path) -> None:
    train(tmp_path, **GLASS)
    assert "first" in logged(tmp_path, "train")[0]
    pipe = LiteBokehPipeline.from_pretrained(tmp_path)
    assert isinstance(pipe.model, GlassEncNet)
    assert "0.5 x the same of the first hourglass" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("litebokeh_tiny", "outputs/litebokeh/tiny"),
        ("litebokeh_tiny_enhancement", "outputs/litebokeh/tiny_enhancement"),
        ("litebokeh_glass", "outputs/litebokeh/glass"),
        ("litebokeh_paper", "outputs/litebokeh/paper"),
    ],
)
def test_configurations_are_read(name: str, folder: str) -> None:
    args = train_litebokeh.parse_args(
        ["--config", str(REPOSITORY / f"training/configs/{name}.yaml")]
    )
    assert args.output_dir == folder


def test_the_enhancement_goes_on_where_the_blur_ended() -> None:
    bokeh, enhancement = (
        train_litebokeh.parse_args(["--config", str(REPOSITORY / f"training/configs/{name}.yaml")])
        for name in ("litebokeh_tiny", "litebokeh_tiny_enhancement")
    )
    assert enhancement.pretrained == bokeh.output_dir and enhancement.phase == "enhancement"

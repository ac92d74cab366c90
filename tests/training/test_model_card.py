"""Model cards: what they say, and that the Hub can read it."""

from __future__ import annotations

import argparse
import ast
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants

from tests.training.runs import REPOSITORY
from training import finetune
from training.bokehdiff_card import bokehdiff_card_text
from training.model_card import CardText, RunReport, model_card, validation_table, versions

PAPER = REPOSITORY / "training" / "configs" / "paper.yaml"

SCORES = {
    "scenes": 24,
    "psnr": 38.571,
    "psnr_blurred": 36.559,
    "psnr_in_focus": 43.96,
    "psnr_identity": 27.44,
    "psnr_blurred_identity": 22.68,
    "psnr_in_focus_identity": 41.5,
    "ssim": 0.98765,
    "ssim_identity": 0.8,
    "control": 0.875,
    "control_correlation": 0.9912,
}
PERCEPTUAL_SCORES = {"lpips": 0.0312, "lpips_identity": 0.2}
LOG = [
    {"kind": "validation", "step": 0, "psnr": 37.98, "psnr_blurred": 36.29, "ssim": 0.97},
    {"kind": "train", "step": 10, "loss": 0.1},
    {"kind": "validation", "step": 10, "psnr": 38.1, "ssim": 0.98},
]


def settings(*flags: str, model: str | None = "{}") -> argparse.Namespace:
    """The settings of a run of the script; `model` are arguments of a network from nothing."""
    source = [] if model is None else ["--model_unet", model]
    return finetune.parse_args(["--output_dir", "outputs/mine", *source, *flags])


def report(args: argparse.Namespace, **changes: Any) -> RunReport:
    values: dict[str, Any] = {
        "args": args,
        "step": 3000,
        "seconds": 5400.0,
        "processes": 2,
        "device": torch.device("cpu"),
        "precision": "bf16",
        "trained_parameters": 1_625_716,
        "scores": SCORES,
        "samples_per_second": 3.14159,
        "log": LOG,
        "pictures": "validation/step-003000.png",
    }
    return RunReport(**{**values, **changes})


def card_of(args: argparse.Namespace, **changes: Any) -> ModelCard:
    run = report(args, **changes)
    return model_card(run, bokehdiff_card_text(args, run.scores, run.log))


def code_of(card: ModelCard) -> str:
    return card.text.split("```python\n")[1].split("```")[0]


def test_a_network_from_nothing() -> None:
    args = settings("--batch_size", "3", "--gradient_accumulation_steps", "4", "--seed", "7")
    card = card_of(args)
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        "tags": ["bokehdiff", "bokeh", "lens-blur", "image-to-image"],
    }
    assert card.text.strip().startswith("# BokehDiff\n")
    headings = [line for line in card.text.splitlines() if line.startswith("## ")]
    assert headings == [
        f"## {title}" for title in ("Intended use", "Limits", "Training", "Validation")
    ]
    for row in (
        "| started from | nothing (the physics it starts at) |",
        "| trained | the UNet |",
        "| data | procedural scenes, 128 x 128 pixels, seed 0 |",
        "| crops | 128 x 128 pixels, mirrored and turned |",
        "| loss | 1 x mse + 1 x multi-scale edge (official), on sRGB in [-1, 1] |",
        "| optimiser | AdamW, learning rate 0.0001, 500 steps of warm-up, cosine to step 10000 |",
        "| samples per step | 24 |",
        "| samples per second | 3.14 |",
        "| optimiser steps | 3000 |",
        "| hours | 1.50 |",
        "| precision | bf16 |",
        "| trained parameters | 1,625,716 |",
        "| seed | 7 |",
    ):
        assert row in card.text
    assert f"```\n{args.command}\n```" in card.text
    assert "--seed 7" in args.command
    assert "`training_config.yaml`" in card.text and "`log.jsonl`" in card.text
    assert "](validation/step-003000.png)" in card.text
    ast.parse(code_of(card))
    assert 'BokehDiffPipeline.from_pretrained("PATH_TO_THIS_FOLDER")' in code_of(card)


def test_the_recipe_of_the_paper() -> None:
    args = settings("--config", str(PAPER), model=None)
    card = card_of(args, scores={**SCORES, **PERCEPTUAL_SCORES})
    base = "stabilityai/stable-diffusion-xl-base-1.0"
    assert card.data.base_model == base
    assert card.data.license is None and f"licence of `{base}` holds" in card.text
    assert card.data.tags[-1] == "lora"
    assert "# BokehDiff, low-rank adapters" in card.text
    for row in (
        f"| started from | `{base}` |",
        "| trained | low-rank adapters of the UNet and the input, middle and output of the VAE "
        "encoder |",
        "| data | layered scenes of cut-outs, 640 x 640 pixels, seed 1 |",
        "| loss | 1 x mse + 5 x LPIPS (VGG-16) + 1 x multi-scale edge (paper) + (0 to step 30000, "
        "then 0.5) x adversarial, on sRGB in [-1, 1] |",
    ):
        assert row in card.text
    code = code_of(card)
    ast.parse(code)
    assert f'from_pretrained("{base}")\npipe.load_bokeh_weights("PATH_TO_THIS_FOLDER")' in code
    assert "except for LPIPS (VGG-16)" in card.text


def test_adapters_of_a_model_in_a_folder_name_no_model_of_the_hub(tmp_path: Path) -> None:
    # The Hub refuses a card whose base model cannot be one of its own.
    for folder in (str(tmp_path), "some/where/else", "outputs/old run"):
        flags = ("--mode", "lora", "--pretrained", folder, "--vae_mode", "lora")
        args = settings(*flags, model=None)
        card = card_of(args)
        assert card.data.base_model is None
        assert f'from_pretrained("{folder}")' in code_of(card)
        assert "and adapters of the input, middle and output of the VAE encoder" in card.text


@pytest.mark.parametrize(
    "flags",
    [
        ("--data_shards", "a|b", "--validation_shards", "held/out"),
        ("--loss_reconstruction_weight", "{0: 0, 1000: 1}", "--loss_edge_weight", "0"),
        ("--ema_decay", "0.998", "--optimizer", "adamw_8bit", "--loss_border", "8"),
    ],
)
def test_nothing_is_left_to_be_filled_in(flags: tuple[str, ...]) -> None:
    for scores in (SCORES, {**SCORES, **PERCEPTUAL_SCORES}, {}):
        card = card_of(settings(*flags), scores=scores, pictures=None, samples_per_second=None)
        assert "TODO" not in str(card) and "None" not in str(card) and "nan" not in card.text
        assert "{" not in card.text.replace(card.text.split("```")[3], "")
        assert not any(line != line.rstrip() for line in card.text.splitlines())
    assert "This run was not validated." in card.text


def test_settings_that_change_what_is_said() -> None:
    card = card_of(settings("--data_shards", "a|b", "--validation_shards", "held/out"))
    assert r"| data | the shards in `a\|b` |" in card.text
    assert "24 held-out scenes (the shards in `held/out`).\n" in card.text
    flags = ("--ema_decay", "0.998", "--optimizer", "adamw_8bit", "--loss_border", "8")
    card = card_of(settings(*flags))
    assert "AdamW with moments in 8 bits, " in card.text
    assert ", weights averaged by 0.998 |" in card.text
    assert "seed 1000003), without 8 pixels at the border." in card.text


def test_a_refiner_trained_alone() -> None:
    flags = (
        "--trained_parts",
        "refiner",
        "--loss_disparity_weight",
        "1",
        "--data_corruption",
        "0.8",
    )
    no_rendering = ("--loss_reconstruction_weight", "0", "--loss_edge_weight", "0")
    scores = {"scenes": 24, "mended_2px": 0.912, "spoilt_2px": 0.0034, "spoilt_exact": 0.00012}
    card = card_of(settings(*flags, *no_rendering), scores=scores, pictures=None)
    for line in (
        "| trained | of the UNet: refiner |",
        "| crops | 128 x 128 pixels, mirrored and turned; 80% with mistakes in the disparity |",
        "| loss | 1 x choice of disparity |",
        "| near things shrunk or grown by | wrong pixels mended | right pixels spoilt |",
        "| 2 px | 91.2% | 0.34% |",
        "| nothing (exact) | | 0.01% |",
    ):
        assert line in card.text.splitlines(), line
    assert "PSNR" not in card.text


def test_a_refiner_trained_beside_the_rendering() -> None:
    card = card_of(settings("--loss_disparity_weight", "2"), scores={**SCORES, "spoilt_exact": 0.0})
    assert ", on sRGB in [-1, 1]; 2 x choice of disparity |" in card.text
    assert "| nothing (exact) | | 0.00% |" in card.text and "| after training | 38.57" in card.text


def test_settings_that_changed_on_the_way() -> None:
    resumed = [
        {"kind": "resume", "step": 5, "changed_settings": {}},
        {"kind": "resume", "step": 20, "changed_settings": {"learning_rate": [0.01, 0.001]}},
    ]
    card = card_of(settings(), log=[*LOG, *resumed])
    assert "| after step 20 | learning_rate 0.001 instead of 0.01 |" in card.text
    assert "after step 5" not in card.text


def test_validation_table() -> None:
    assert (
        validation_table({**SCORES, **PERCEPTUAL_SCORES}, LOG)
        == """\
|  | PSNR | PSNR, blurred | PSNR, in focus | SSIM | LPIPS |
| --- | --- | --- | --- | --- | --- |
| photograph left as it is | 27.44 | 22.68 | 41.50 | 0.8000 | 0.2000 |
| before training | 37.98 | 36.29 |  | 0.9700 |  |
| after training | 38.57 | 36.56 | 43.96 | 0.9877 | 0.0312 |

Control: the blurred region loses contrast each time K grows, from 0 by quarters to all of the
scene's K, in 88% of the scenes. The rank correlation between K and blur is
0.991, where 1 says that more K always gives more blur."""
    )


def test_a_validation_without_blurred_regions_says_nothing_about_control() -> None:
    table = validation_table({"scenes": 1, "psnr": 50.0, "psnr_identity": 60.0}, [])
    assert "Control" not in table and "SSIM" not in table and "before training" not in table
    assert table.splitlines()[0] == "|  | PSNR |"


def test_the_card_survives_being_saved(tmp_path: Path) -> None:
    card = card_of(settings())
    card.save(tmp_path / "README.md")
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.to_dict() == card.data.to_dict() and read.text == card.text


def test_cards_of_other_models() -> None:
    text = CardText(
        title="A depth estimator",
        summary="Disparity from a photograph.",
        usage="estimate(photo)",
        training_rows=[("data", "photographs")],
        scores_section="None yet.",
        intended_use="Disparity.",
        limits="Mirrors.",
        tags=["depth"],
        pipeline_tag="depth-estimation",
        base_model="owner/base",
        license="mit",
    )
    card = model_card(report(settings(), pictures=None), text)
    assert card.data.to_dict() == {
        "license": "mit",
        "base_model": "owner/base",
        "pipeline_tag": "depth-estimation",
        "library_name": "diffusers",
        "tags": ["depth"],
    }
    assert "| data | photographs |" in card.text and "bokeh" not in card.text.split("versions")[0]
    assert "![" not in card.text


@pytest.mark.parametrize("offline", [False, True])
def test_no_network_is_asked(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    def refuse(*arguments: Any, **more: Any) -> None:
        raise AssertionError("A card needs no network.")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    args = settings("--mode", "lora", "--pretrained", "owner/base", model=None)
    assert card_of(args).data.base_model == "owner/base"


def test_versions_of_what_is_installed() -> None:
    assert versions("torch", "no-such-package") == f"torch {torch.__version__.partition('+')[0]}"

"""The refiner of the disparity: trained alone, left alone, or beside the rendering."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bokehdiff import BokehDiffPipeline
from tests.training.runs import UNET_FILE, arguments, assert_same_tensors, logged, train
from training import finetune

WITH_REFINER = "{block_out_channels: [8, 8], refiner_block_out_channels: [8, 8]}"
MODEL = ["--model_unet", WITH_REFINER, "--no-pisa_hardness_by_step"]
ALONE = {
    "loss_reconstruction_weight": 0,
    "loss_edge_weight": 0,
    "loss_disparity_weight": 1,
    "data_corruption": 0.8,
    "data_options": "{imperfect_share: 0}",
}


def changed_parts(before: Path, after: Path) -> set[str]:
    """Parts of the UNet, some weight of which differs."""
    first, second = load_file(before / UNET_FILE), load_file(after / UNET_FILE)
    assert first.keys() == second.keys()
    return {name.split(".")[0] for name in first if not torch.equal(first[name], second[name])}


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a learning rate of zero leaves."""
    folder = tmp_path_factory.mktemp("refiner") / "untrained"
    train(folder, model=MODEL, max_train_steps=1, learning_rate=0)
    return folder


def test_alone_it_is_all_that_is_trained_and_nothing_is_rendered(
    tmp_path: Path, untrained: Path
) -> None:
    train(tmp_path, model=MODEL, **ALONE, trained_parts="refiner", validation_scenes=2)
    for entry in logged(tmp_path, "train"):
        assert entry["loss"] == entry["disparity"]
        assert not {"reconstruction", "edge"} & set(entry)
    assert changed_parts(untrained, tmp_path) == {"refiner"}
    first, last = logged(tmp_path, "validation")
    assert first["spoilt_exact"] == 0 and first["mended_8px"] == 0
    assert "psnr" not in first and 0 <= last["spoilt_exact"] <= 1
    assert not (tmp_path / "validation").exists()
    card = (tmp_path / "README.md").read_text()
    assert "| trained | of the UNet: refiner |" in card and "choice of disparity" in card
    pipe = BokehDiffPipeline.from_pretrained(tmp_path)
    assert pipe.unet.refiner is not None


def test_it_resumes_exactly(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**ALONE, "trained_parts": "refiner", "ema_decay": 0.9}
    train(tmp_path / "whole", model=MODEL, **settings, max_train_steps=4, checkpoint_steps=2)
    resumed = ("--resume", str(tmp_path / "whole" / "checkpoint-2"))
    train(tmp_path / "pieces", *resumed, model=MODEL, **settings, max_train_steps=4)
    assert_same_tensors(tmp_path / "whole" / UNET_FILE, tmp_path / "pieces" / UNET_FILE)


def test_losses_of_the_rendering_leave_it_alone(tmp_path: Path, untrained: Path) -> None:
    train(tmp_path, model=MODEL, data_corruption=0.5)
    changed = changed_parts(untrained, tmp_path)
    assert "correction" in changed and "refiner" not in changed


def test_both_are_trained_together(tmp_path: Path, untrained: Path) -> None:
    settings = {"data_corruption": 0.8, "loss_disparity_weight": 2, "validation_scenes": 1}
    train(tmp_path, model=MODEL, **settings)
    for entry in logged(tmp_path, "train"):
        total = entry["reconstruction"] + entry["edge"] + 2 * entry["disparity"]
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
    assert {"refiner", "correction"} <= changed_parts(untrained, tmp_path)
    assert {"psnr", "spoilt_exact"} <= set(logged(tmp_path, "validation")[-1])


def test_parts_can_be_chosen(tmp_path: Path, untrained: Path) -> None:
    train(tmp_path, model=MODEL, trained_parts="correction")
    assert changed_parts(untrained, tmp_path) == {"correction"}


def test_pictures_of_any_size_are_padded(tmp_path: Path) -> None:
    train(tmp_path, model=MODEL, **ALONE, data_crop_size=30)
    assert len(logged(tmp_path, "train")) == 2


NO_REFINER = ["--model_unet", "{block_out_channels: [8, 8]}"]


@pytest.mark.parametrize(
    ("model", "settings", "complaint"),
    [
        (MODEL, {**ALONE, "trained_parts": "refinr"}, "'refinr', which the UNet does not have"),
        (MODEL, {"trained_parts": "refiner"}, "'refiner', which no loss reaches"),
        (MODEL, {**ALONE, "trained_parts": "refiner,correction"}, "'correction', which no loss"),
        (MODEL, {"loss_disparity_weight": 1, "trained_parts": "correction"}, "leaves it out"),
        (NO_REFINER, ALONE, "this one has none: set model.unet"),
    ],
)
def test_parts_that_cannot_learn_are_refused(
    tmp_path: Path, model: list[str], settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        train(tmp_path, model=model, **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"data_corruption": 1.5}, "data_corruption must be a share from 0 to 1"),
        ({**ALONE, "loss_adversarial_weight": 1}, "Nothing tells the rendering"),
        ({**ALONE, "loss_disparity_weight": 0}, "Nothing tells the rendering"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        finetune.parse_args(arguments(tmp_path, MODEL, **settings))


@pytest.mark.parametrize("flag", [("--trained_parts", "x"), ("--loss_disparity_weight", "1")])
def test_adapters_are_all_that_mode_lora_trains(tmp_path: Path, flag: tuple[str, str]) -> None:
    lora = ["--pretrained", "somewhere", "--mode", "lora"]
    with pytest.raises(ValueError, match="adapters are trained and nothing else"):
        finetune.parse_args([*arguments(tmp_path, lora), *flag])

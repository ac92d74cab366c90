"""The launcher's configurations that come with the recipes: valid, and really sharding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from tests.training.runs import (
    REPOSITORY,
    arguments,
    assert_same_tensors,
    launch,
    logged,
    train,
)
from training import speed
from training.finetune import parse_args

CONFIGS = REPOSITORY / "training" / "configs" / "accelerate"
LORA = ["--mode", "lora", "--vae_mode", "full"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddp", DistributedType.MULTI_GPU),
        ("fsdp", DistributedType.FSDP),
        ("deepspeed", DistributedType.DEEPSPEED),
    ],
)
def test_configurations_are_valid(name: str, kind: DistributedType) -> None:
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == kind
    # The script decides on precision itself, for the UNet alone.
    assert config.mixed_precision == "no"


def test_what_fsdp_shards_one_by_one_is_most_of_sdxl() -> None:
    config = load_config_from_file(str(CONFIGS / "fsdp.yaml"))
    wrapped = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")
    with torch.device("meta"):
        unet = speed.random_pipeline().unet
    inside = sum(
        value.numel()
        for module in unet.modules()
        if type(module).__name__ in wrapped
        for value in module.parameters()
    )
    assert inside > 0.9 * sum(value.numel() for value in unet.parameters())


def test_fsdp_is_for_adapters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="Under FSDP adapters are trained"):
        parse_args(arguments(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_sharded_training_is_that_of_whole_copies_and_resumes_exactly(
    tmp_path: Path, tiny_sdxl: str, judges: dict[str, str], kind: str, precision: str
) -> None:
    if kind == "deepspeed":
        pytest.importorskip("deepspeed")
    model = ["--pretrained", tiny_sdxl, *LORA]
    settings: dict[str, Any] = dict(
        max_train_steps=4,
        checkpoint_steps=2,
        learning_rate=1e-4,
        loss_perceptual_weight=5,
        loss_adversarial_weight=0.5,
        validation_scenes=1,
        mixed_precision=precision,
        # DeepSpeed clips all networks together, and the others each.
        max_gradient_norm=0 if kind == "fsdp" else 1,
        **judges,
    )

    def run(name: str, *flags: str) -> Path:
        result = launch(
            [*arguments(tmp_path / name, model, **settings), "--gradient_checkpointing", *flags],
            script="tests/training/run_sharded_on_cpu.py",
            launcher=["--config_file", str(CONFIGS / f"{kind}.yaml")],
            environment={"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"},
        )
        assert result.returncode == 0, result.stderr
        return tmp_path / name

    whole = run("whole")
    pieces = run("pieces", "--resume", str(whole / "checkpoint-2"))
    for file in ("pytorch_lora_weights.safetensors", "vae_encoder.safetensors"):
        assert_same_tensors(whole / file, pieces / file)
        assert_same_tensors(whole / "checkpoint-4" / file, whole / file)
    losses = [entry["loss"] for entry in logged(whole, "train")]
    assert [entry["loss"] for entry in logged(pieces, "train")] == losses[2:]

    if kind == "fsdp":
        train(tmp_path / "one", model=model, **settings, batch_size=2)
        one = [entry["loss"] for entry in logged(tmp_path / "one", "train")]
        # float32 rounds to 1e-7 and bfloat16 to 4e-3, which judges and normalisations amplify.
        assert losses == pytest.approx(one, rel=5e-5 if precision == "no" else 2e-2)

"""Names and shapes of the authors' files, on the full-size networks without their numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import save_file

from bokehdiff.checkpoints import (
    LORA_FILE,
    OFFICIAL_VAE_FILE,
    UNET_LORA_TARGETS,
    VAE_TRAINED_PARTS,
    adapter_shapes,
    check_adapter,
    check_codec,
    codec_parameters,
    official_settings,
    read_bokeh_weights,
)


@pytest.fixture(scope="module")
def lora(fixtures_root: Path) -> dict[str, Any]:
    return json.loads((fixtures_root / "bokehdiff" / "lora_manifest.json").read_text())


@pytest.fixture(scope="module")
def codec(fixtures_root: Path) -> dict[str, Any]:
    return json.loads((fixtures_root / "bokehdiff" / "vae_manifest.json").read_text())


@pytest.fixture(scope="module")
def unet(lora: dict[str, Any]) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(lora["unet_config"])


@pytest.fixture(scope="module")
def vae(codec: dict[str, Any]) -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL.from_config(codec["vae_config"])


def shapes(manifest: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in manifest["tensors"].items()}


def test_golden_adapters_of_the_full_unet(lora: dict[str, Any], unet: UNet2DConditionModel) -> None:
    assert sorted(UNET_LORA_TARGETS) == sorted(lora["target_modules"])
    config = LoraConfig(r=lora["rank"], target_modules=list(UNET_LORA_TARGETS))
    wanted = adapter_shapes(unet, config)
    assert wanted == shapes(lora)
    assert len(wanted) == lora["num_tensors"] == 1576
    assert sum(math.prod(shape) for shape in wanted.values()) == lora["num_parameters"]


def test_golden_parameters_of_the_full_codec(codec: dict[str, Any], vae: AutoencoderKL) -> None:
    assert sorted(VAE_TRAINED_PARTS) == sorted(codec["trained_modules"])
    found = {name: tuple(value.shape) for name, value in codec_parameters(vae).items()}
    assert found == shapes(codec)
    assert len(found) == codec["num_tensors"] == 30
    assert sum(math.prod(shape) for shape in found.values()) == codec["num_parameters"]


def test_golden_files_of_the_authors_fit_the_full_networks(
    tmp_path: Path,
    lora: dict[str, Any],
    codec: dict[str, Any],
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
) -> None:
    # One byte for each number keeps the files small.
    small = torch.float8_e4m3fn
    unet_lora, encoder = (
        {name: torch.zeros(shape, dtype=small) for name, shape in shapes(one).items()}
        for one in (lora, codec)
    )
    save_file(unet_lora, tmp_path / LORA_FILE, metadata={"format": "pt"})
    torch.save(encoder, tmp_path / OFFICIAL_VAE_FILE)
    read = read_bokeh_weights(tmp_path)
    assert read.settings == official_settings()
    config = check_adapter(read.unet_lora, read.unet_lora_config, unet)
    assert (config.r, config.lora_alpha) == (lora["rank"], lora["lora_alpha"])
    check_codec(read.vae, vae)
    del read.vae["encoder.conv_out.bias"]
    with pytest.raises(ValueError, match="missing: encoder.conv_out.bias"):
        check_codec(read.vae, vae)


LAYER = "up_blocks.0.attentions.2.transformer_blocks.9.ff.net.2"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"

# name: what is done to the tensors, and a part of the sentence.
DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "a tensor less": (lambda it: it.pop(B), f"missing: {B}[.] Load"),
    "a layer less": (lambda it: (it.pop(A), it.pop(B)), f"missing: {A}, {B}[.] Load"),
    "a layer more": (
        lambda it: it.update({"conv_out.lora_A.weight": torch.zeros(8, 320, 3, 3)}),
        "not in the model: conv_out.lora_A.weight[.] Load",
    ),
    "another width": (
        lambda it: it.update({A: torch.zeros(8, 640)}),
        r"of another shape: \S+lora_A.weight \(8, 640\), wanted \(8, 5120\)[.] Load",
    ),
    "another rank of one layer": (
        lambda it: it.update({A: torch.zeros(4, 5120), B: torch.zeros(1280, 4)}),
        r"\(4, 5120\), wanted \(8, 5120\); \S+ \(1280, 4\), wanted \(1280, 8\)[.] Load",
    ),
    "another UNet": (
        lambda it: [it.pop(name) for name in list(it) if "mid_block" in name],
        r"missing: mid_block\S+, mid_block\S+, mid_block\S+ and \d+ more[.] Load",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_golden_adapters_that_are_damaged_are_refused_by_name(
    lora: dict[str, Any], unet: UNet2DConditionModel, damage: str
) -> None:
    spoil, sentence = DAMAGES[damage]
    rank, targets = lora["rank"], list(UNET_LORA_TARGETS)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets).to_dict()
    tensors = {
        name: torch.empty(shape, dtype=torch.float16, device="meta")
        for name, shape in shapes(lora).items()
    }
    check_adapter(tensors, config, unet)
    spoil(tensors)
    with pytest.raises(ValueError, match=sentence):
        check_adapter(tensors, config, unet)


def test_golden_adapters_are_those_peft_makes(
    lora: dict[str, Any], unet: UNet2DConditionModel
) -> None:
    unet.add_adapter(LoraConfig(r=lora["rank"], target_modules=list(UNET_LORA_TARGETS)))
    made = {
        name.replace(".default.", "."): tuple(value.shape)
        for name, value in unet.named_parameters()
        if ".lora_" in name
    }
    assert made == shapes(lora)

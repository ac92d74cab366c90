"""Tiny pipelines with trained weights of BokehDiff in them, and the picture they render, for tests.

Nothing is trained: adapters and codec are filled with random numbers, as large as it takes to see.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from diffusers import DDPMScheduler
from peft import LoraConfig, get_peft_model_state_dict

from bokehdiff import BokehDiffPipeline
from bokehdiff.attention import PisaConfig
from bokehdiff.checkpoints import BOKEH_PROMPT, BokehWeights, codec_parameters
from bokehdiff.models import StoredPrompt
from tests.tiny_models import PROMPT_CHANNELS, photo_and_disparity, tiny_unet, tiny_vae

PISA = PisaConfig.preset("official_weights").to_dict()
SETTINGS: dict[str, Any] = {
    "pisa": PISA,
    "timestep": 399,
    "prompt": BOKEH_PROMPT,
    "pisa_layers": "down_blocks.1.attentions.0,mid_block.attentions.0",
}
# A linear layer of either attention, convolutions, and a projection: peft takes a while for all.
TARGETS = ["to_q", "conv1", "proj_in"]
VAE_TARGETS = ["encoder.conv_in", "encoder.mid_block.attentions.0.to_q", "encoder.conv_out"]


def base_pipeline(**changes: Any) -> BokehDiffPipeline:
    """The untrained tiny SDXL, always the same, without text encoders."""
    generator = torch.Generator().manual_seed(3)
    parts: dict[str, Any] = dict(
        vae=tiny_vae(),
        unet=tiny_unet(),
        scheduler=DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        stored_prompt=StoredPrompt.from_embeddings(
            BOKEH_PROMPT,
            torch.randn(1, 77, 2 * PROMPT_CHANNELS, generator=generator),
            torch.randn(1, PROMPT_CHANNELS, generator=generator),
        ),
    )
    pipe = BokehDiffPipeline(**{**parts, **changes})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def trained_pipeline(vae: str = "full", **lora: Any) -> BokehDiffPipeline:
    """As training leaves it: adapters with random B, a changed codec (or adapters in it)."""
    pipe = base_pipeline(**SETTINGS)
    generator = torch.Generator().manual_seed(5)
    options: dict[str, Any] = dict(r=4, lora_alpha=4, init_lora_weights="gaussian")
    pipe.unet.add_adapter(LoraConfig(**{**options, "target_modules": TARGETS, **lora}))
    if vae == "lora":
        pipe.vae.add_adapter(LoraConfig(**options, target_modules=VAE_TARGETS))
    for model in (pipe.unet, pipe.vae):
        for name, value in model.named_parameters():
            if ".lora_" in name:
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
        model.eval()
    if vae == "full":
        for value in codec_parameters(pipe.vae).values():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return pipe


def weights_of(pipe: BokehDiffPipeline, vae: str = "full") -> BokehWeights:
    weights = BokehWeights(
        unet_lora=get_peft_model_state_dict(pipe.unet),
        vae={},
        vae_lora={},
        unet_lora_config=pipe.unet.peft_config["default"].to_dict(),
        vae_lora_config=None,
        settings=dict(SETTINGS),
    )
    if vae == "full":
        weights.vae = dict(codec_parameters(pipe.vae))
    elif vae == "lora":
        weights.vae_lora = get_peft_model_state_dict(pipe.vae)
        weights.vae_lora_config = pipe.vae.peft_config["default"].to_dict()
    return weights


@functools.cache
def usual_weights(vae: str = "full") -> BokehWeights:
    """Of ``trained_pipeline(vae)``. Not to be changed."""
    return weights_of(trained_pipeline(vae), vae)


PHOTO, DISPARITY = photo_and_disparity(48, 64)


def rendered(pipe: BokehDiffPipeline) -> torch.Tensor:
    """With the codec's losses, since detail put back would hide the codec."""
    return pipe(PHOTO, DISPARITY, 0.8, 20.0, preserve_detail=False, output_type="pt").images


def state_of(pipe: BokehDiffPipeline) -> dict[str, Any]:
    """Everything that loading and switching weights could have changed."""
    tensors = {
        f"{part}.{name}": value.clone()
        for part in ("unet", "vae")
        for name, value in getattr(pipe, part).state_dict().items()
    }
    return {
        "tensors": tensors,
        "config": json.dumps(dict(pipe.config), default=str),
        "processors": {name: id(one) for name, one in pipe.unet.attn_processors.items()},
        "adapters": pipe.get_list_adapters(),
        "pisa": pipe.verify_pisa().config,
    }


def assert_unchanged(pipe: BokehDiffPipeline, before: dict[str, Any]) -> None:
    after = state_of(pipe)
    tensors = before.pop("tensors")
    found = after.pop("tensors")
    assert after == before
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())

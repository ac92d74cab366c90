"""Tiny SDXL models in one file, in the layout of the makers of Stable Diffusion XL, for tests.

The names are those of the original training code (``model.diffusion_model.input_blocks.0.0.weight``
and so on), written from the diffusers parts by the inverse of the map that diffusers reads them by.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.tiny_models import PROMPT_CHANNELS, tiny_sdxl_components, tiny_text_config, tiny_unet

WIDE_PROMPT_CHANNELS = 48
"""Of the second text encoder, which is told from the first by its width."""

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def sdxl_components(folder: Path, **unet: Any) -> dict[str, Any]:
    """The tiny SDXL of ``tiny_models``, with a wider second text encoder as the real one has."""
    parts = tiny_sdxl_components(folder)
    wide = {**tiny_text_config().to_dict(), "num_attention_heads": 4}
    wide |= {"hidden_size": WIDE_PROMPT_CHANNELS, "projection_dim": WIDE_PROMPT_CHANNELS}
    torch.manual_seed(1)
    parts["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**wide)).eval()
    parts["unet"] = tiny_unet(
        cross_attention_dim=PROMPT_CHANNELS + WIDE_PROMPT_CHANNELS,
        projection_class_embeddings_input_dim=6 * 8 + WIDE_PROMPT_CHANNELS,
        **unet,
    )
    return parts


def write_single_file(parts: dict[str, Any], path: Path, **changes: Tensor | None) -> None:
    """Writes all parts into one file; ``changes`` adds tensors, or leaves them out (None)."""
    tensors = {
        **{f"model.diffusion_model.{k}": v for k, v in unet_tensors(parts["unet"]).items()},
        **{f"first_stage_model.{k}": v for k, v in vae_tensors(parts["vae"]).items()},
        **text_tensors(parts["text_encoder"], parts["text_encoder_2"]),
    }
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, path)


def unet_tensors(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """Down, mid and up blocks are numbered through, layer by layer."""
    layers = unet.config.layers_per_block + 1
    tensors = {}
    for name, value in unet.state_dict().items():
        layer, _, kind = name.rpartition(".")
        if layer in UNET_ENDS:
            tensors[f"{UNET_ENDS[layer]}.{kind}"] = value
            continue
        found = re.fullmatch(
            r"(down_blocks\.|up_blocks\.|mid_block)(\d*)\.(\w+?)\.(\d+)\.(.+)", name
        )
        assert found is not None, name
        block, part, index, rest = int(found[2] or 0), found[3], int(found[4]), found[5]
        if part == "resnets":
            resnet, _, kind = rest.rpartition(".")
            rest = f"{RESNET[resnet]}.{kind}"
        if found[1] == "mid_block":
            place = f"middle_block.{2 * index if part == 'resnets' else 1}"
        elif part == "downsamplers":
            place, rest = f"input_blocks.{1 + block * layers + layers - 1}.0", f"op.{kind}"
        elif part == "upsamplers":
            attends = hasattr(unet.up_blocks[block], "attentions")
            place = f"output_blocks.{block * layers + layers - 1}.{2 if attends else 1}"
        else:
            first = "input_blocks" if found[1] == "down_blocks." else "output_blocks"
            number = block * layers + index + (first == "input_blocks")
            place = f"{first}.{number}.{0 if part == 'resnets' else 1}"
        tensors[f"{place}.{rest}"] = value
    return tensors


def vae_tensors(vae: AutoencoderKL) -> dict[str, Tensor]:
    """Up blocks are numbered from the finest; attention is a convolution of 1 x 1."""
    levels = len(vae.config.block_out_channels)
    tensors = {}
    for name, value in vae.state_dict().items():
        old = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        old = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", old)
        old = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", old)
        old = re.sub(r"up_blocks\.(\d+)\.", lambda found: f"up.{levels - 1 - int(found[1])}.", old)
        old = old.replace("resnets", "block").replace("upsamplers.0", "upsample")
        old = re.sub(r"mid_block\.block\.(\d)", lambda it: f"mid.block_{int(it[1]) + 1}", old)
        found = re.fullmatch(r"(.+)\.mid_block\.attentions\.0\.(.+)\.(\w+)", old)
        if found is not None:
            old = f"{found[1]}.mid.attn_1.{ATTENTION[found[2]]}.{found[3]}"
            if value.ndim == 2:
                value = value[:, :, None, None]
        tensors[old] = value
    return tensors


def text_tensors(first: CLIPTextModel, second: CLIPTextModelWithProjection) -> dict[str, Tensor]:
    """The first encoder as transformers names it, the second as OpenCLIP does."""
    tensors = {
        f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}": value
        for name, value in first.state_dict().items()
    }
    names = {
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    inside = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    state = {name.removeprefix("text_model."): one for name, one in second.state_dict().items()}
    opened: dict[str, Tensor] = {"text_projection": state.pop("text_projection.weight").T}
    for name, value in state.items():
        if name in names:
            opened[names[name]] = value
            continue
        found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        assert found is not None, name
        block = f"transformer.resblocks.{found[1]}"
        if found[2] == "self_attn.q_proj":
            three = [name.replace("q_proj", f"{one}_proj") for one in "qkv"]
            opened[f"{block}.attn.in_proj_{found[3]}"] = torch.cat([state[one] for one in three])
        elif found[2] in inside:
            opened[f"{block}.{inside[found[2]]}.{found[3]}"] = value
    return tensors | {f"conditioner.embedders.1.model.{k}": v for k, v in opened.items()}

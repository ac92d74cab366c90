"""A Stable Diffusion XL of a few thousand parameters, made of the real classes, for tests.

Random weights, three UNet blocks as in SDXL (the second holds the PISA layer, the third must stay
stock), a VAE with 8 pixels per latent, two CLIP text encoders over a vocabulary of single letters.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

PROMPT_CHANNELS = 32
"""Hidden channels of each text encoder; the UNet sees both, so twice as many."""


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer that knows single letters only; its vocabulary is written to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=77)


def tiny_text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=64,
        hidden_size=PROMPT_CHANNELS,
        intermediate_size=37,
        projection_dim=PROMPT_CHANNELS,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )


def tiny_vae(**changes: Any) -> AutoencoderKL:
    """An untrained AutoencoderKL of four levels, 8 pixels per latent."""
    torch.manual_seed(0)
    values: dict[str, Any] = dict(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.13025,
    )
    return AutoencoderKL(**{**values, **changes}).eval()


def tiny_unet(**changes: Any) -> UNet2DConditionModel:
    """An untrained SDXL UNet of three blocks with ``down_blocks.1.attentions.0``."""
    torch.manual_seed(0)
    values: dict[str, Any] = dict(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 1),
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=2 * PROMPT_CHANNELS,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + PROMPT_CHANNELS,
        use_linear_projection=True,
    )
    return UNet2DConditionModel(**{**values, **changes}).eval()


def tiny_sdxl_components(folder: Path) -> dict[str, Any]:
    """All parts of a tiny SDXL; ``folder`` receives the vocabulary of its tokenizers."""
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(tiny_text_config()).eval()
    torch.manual_seed(1)
    text_encoder_2 = CLIPTextModelWithProjection(tiny_text_config()).eval()
    return dict(
        vae=tiny_vae(),
        unet=tiny_unet(),
        scheduler=DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tiny_tokenizer(folder / "tokenizer"),
        tokenizer_2=tiny_tokenizer(folder / "tokenizer_2"),
    )


def tiny_stock_pipeline(folder: Path) -> StableDiffusionXLPipeline:
    """diffusers' own pipeline around the tiny parts."""
    return StableDiffusionXLPipeline(**tiny_sdxl_components(folder), add_watermarker=False)


def photo_and_disparity(
    height: int = 64, width: int = 64, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A photo uint8 (H, W, 3) and its disparity float32 (H, W): a near block over a far slope."""
    random = np.random.default_rng(seed)
    photo = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    disparity = np.broadcast_to(np.linspace(0.1, 0.3, height)[:, None], (height, width)).copy()
    disparity[height // 4 : height // 2, width // 4 : width // 2] = 0.8
    return photo, disparity.astype(np.float32)

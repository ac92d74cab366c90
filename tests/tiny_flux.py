"""A FLUX.1-Kontext of some thousand parameters, made of the real classes, for tests.

Random weights, two double and two single blocks of two heads, a VAE with 8 pixels per latent (so 16
per token of the transformer), a CLIP text encoder over single letters and a T5 over single letters
and digits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

from tests.tiny_models import PROMPT_CHANNELS, tiny_text_config, tiny_tokenizer, tiny_vae

LATENT_CHANNELS = 4
T5_CHANNELS = 24
WIDTH = 32
"""Of the transformer: two heads of 16 channels."""

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;()=_-"


def tiny_flux_transformer(**changes: Any) -> FluxTransformer2DModel:
    """An untrained FLUX transformer that takes packed latents of :func:`tiny_flux_vae`."""
    values: dict[str, Any] = dict(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_CHANNELS,
        pooled_projection_dim=PROMPT_CHANNELS,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FluxTransformer2DModel(**{**values, **changes}).eval()


def tiny_flux_inputs(
    transformer: FluxTransformer2DModel,
    batch: int = 2,
    *,
    text_tokens: int = 3,
    grid: tuple[int, int] = (2, 3),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Keyword arguments for one call: a target and a reference of ``grid`` tokens each, Kontext's
    position ids (first component 0 and 1), one guidance and timestep per sample."""
    generator = torch.Generator().manual_seed(seed)
    config = transformer.config

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype)

    rows, columns = grid
    tokens = rows * columns
    ids = torch.zeros(2, rows, columns, 3)
    ids[1, ..., 0] = 1
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)
    return dict(
        hidden_states=normal(batch, 2 * tokens, config.in_channels),
        encoder_hidden_states=normal(batch, text_tokens, config.joint_attention_dim),
        pooled_projections=normal(batch, config.pooled_projection_dim),
        timestep=torch.linspace(0.2, 0.9, batch, dtype=dtype),
        guidance=torch.full((batch,), 7.0, dtype=dtype),
        img_ids=ids.reshape(-1, 3).to(dtype),
        txt_ids=torch.zeros(text_tokens, 3, dtype=dtype),
    )


def tiny_flux_vae(**changes: Any) -> AutoencoderKL:
    """An untrained codec with FLUX's shift and scale, and without its quantisation layers."""
    values: dict[str, Any] = dict(
        latent_channels=LATENT_CHANNELS,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    with torch.random.fork_rng():
        return tiny_vae(**{**values, **changes})


def tiny_t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer of single letters and digits; every space is a token too."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(letter, -3.0) for letter in LETTERS]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)


def tiny_t5() -> T5EncoderModel:
    """An untrained T5 encoder of two layers for :func:`tiny_t5_tokenizer`."""
    config = T5Config(
        vocab_size=len(LETTERS) + 4,
        d_model=T5_CHANNELS,
        d_kv=6,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        dropout_rate=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return T5EncoderModel(config).eval()


def tiny_kontext_components(folder: Path) -> dict[str, Any]:
    """All parts of a tiny Kontext pipeline; ``folder`` receives the vocabulary of CLIP's tokenizer.

    The schedule is FLUX.1's: shifted by the number of target tokens.
    """
    with torch.random.fork_rng():
        torch.manual_seed(1)
        text_encoder = CLIPTextModel(tiny_text_config()).eval()
    return dict(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=tiny_flux_vae(),
        text_encoder=text_encoder,
        tokenizer=tiny_tokenizer(folder / "tokenizer"),
        text_encoder_2=tiny_t5(),
        tokenizer_2=tiny_t5_tokenizer(),
        transformer=tiny_flux_transformer(),
    )

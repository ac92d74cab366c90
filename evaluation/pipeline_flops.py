"""How much arithmetic each stage of the pipeline takes, counted without weights or device.

The networks of Stable Diffusion XL are run on torch's ``meta`` device, where tensors have shapes
and no content, under torch's own counter of floating-point operations. Physics-inspired
self-attention (PISA) is an operator of its own that the counter does not know; it is counted here
by the pairs of tokens that it works on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from bokehdiff.attention import PisaConfig, PisaGeometry, remove_pisa
from bokehdiff.attention.blocks import BlockPlan
from bokehdiff.attention.local import pair_share
from evaluation.pipeline_speed import (
    LayerShape,
    in_words,
    markdown,
    pisa_layer_shapes,
    random_pipeline,
)

PROMPT_TOKENS = 77
SDXL_TEXT_ENCODERS = (
    (
        CLIPTextModel,
        CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        ),
    ),
    (
        CLIPTextModelWithProjection,
        CLIPTextConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            projection_dim=1280,
            hidden_act="gelu",
        ),
    ),
)

FLOPS_PER_RAY_SAMPLE = 30
"""Of one sample of one ray, by hand: 6 for its place and depth, 4 for its jitter, 19 to look up the
scene there (6 for the place in the map, 6 for the weights, 7 to blend), 1 to compare."""

WAYS = {
    "circles": "pairs inside the circles and their soft edge",
    "tiles": "pairs in the tiles of backend local",
    "blocks": "pairs in the blocks of backend triton",
    "dense": "all pairs, the dense formula",
}
"""Pairs of tokens that PISA may work on, and how the table calls them."""


@dataclass(frozen=True)
class PipelineFlops:
    """Floating-point operations of one photo; a multiplication and an addition are two.

    Attributes:
        width, height: of the photo padded to what the pipeline takes, pixels.
        radius: of every circle of confusion, pixels.
        pisa_layers, pisa_tokens: layers with PISA, and the tokens that each of them sees.
        prompt: both text encoders; None for shapes that are not SDXL's.
        encode, decode: of the VAE.
        stock_unet: of one call of the UNet with ordinary attention everywhere.
        ordinary_attention: its part in the layers that PISA takes, without projections.
        pair_share: share of all pairs of tokens that PISA works on, by the names of `WAYS`.
        attention: of PISA in all its layers, without projections.
        rays: of the rays of these pairs, once per picture.
        overhead: of the UNet with PISA and rays over the stock one, as a share of the latter.
        first_picture, refocus: encode, UNet with PISA in blocks, decode, and decode of the codec's
            own picture; and without what is done once per photo.
    """

    width: int
    height: int
    radius: float
    pisa_layers: int
    pisa_tokens: int
    prompt: float | None
    encode: float
    decode: float
    stock_unet: float
    ordinary_attention: float
    pair_share: dict[str, float]
    attention: dict[str, float]
    rays: dict[str, float]
    overhead: dict[str, float]
    first_picture: float
    refocus: float


@torch.no_grad()
def flops_of(work: Callable[[], Any]) -> float:
    """Floating-point operations of matrix products, convolutions and attention while it runs."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def attention_flops(layer: LayerShape, pairs: float) -> float:
    """Of one image: a product of q and k, and one of a weight and v, for each pair and head."""
    return 4.0 * pairs * layer.channels * layer.heads


def pairs_within(radius: float, height: int, width: int) -> int:
    """Ordered pairs of tokens of a grid that are at most `radius` tokens apart."""
    pairs = 0
    for rows in range(-min(height - 1, int(radius)), min(height - 1, int(radius)) + 1):
        widest = min(width - 1, math.isqrt(math.floor(radius**2 - rows**2)))
        along = sum(width - abs(columns) for columns in range(-widest, widest + 1))
        pairs += (height - abs(rows)) * along
    return pairs


def pair_shares(height: int, width: int, radius: float) -> dict[str, float]:
    """Share of the N^2 pairs by the names of `WAYS`, if every circle has this radius in tokens."""
    geometry = PisaGeometry.build(torch.full((1, 1, height, width), radius))
    reach = radius + geometry.margin / geometry.spacing[0]
    all_pairs = (height * width) ** 2
    plan = BlockPlan.make(geometry)
    pairs_of_a_block = math.prod(plan.tile) ** 2
    return {
        "circles": pairs_within(reach, height, width) / all_pairs,
        "tiles": pair_share(geometry),
        "blocks": plan.keys_of_queries.partner.numel() * pairs_of_a_block / all_pairs,
        "dense": 1.0,
    }


def prompt_flops() -> float:
    """Of both text encoders of SDXL."""
    total = 0.0
    for model, config in SDXL_TEXT_ENCODERS:
        with torch.device("meta"):
            encoder, tokens = model(config).eval(), torch.zeros(1, PROMPT_TOKENS, dtype=torch.long)
        total += flops_of(lambda encoder=encoder, tokens=tokens: encoder(tokens))
    return total


def pipeline_flops(shapes: str, height: int, width: int, radius: float) -> PipelineFlops:
    """Count one photo.

    Args:
        shapes: "sdxl" or "tiny", see :mod:`evaluation.pipeline_speed`.
        height, width: of the photo, pixels; padded as the pipeline pads it.
        radius: of every circle of confusion, pixels.
    """
    pipe = random_pipeline(shapes, "meta", torch.float32)
    remove_pisa(pipe.unet)
    multiple, scale = pipe.image_multiple, pipe.vae_scale_factor
    height, width = (-(-side // multiple) * multiple for side in (height, width))
    with torch.device("meta"):
        photo = torch.empty(1, 3, height, width)
        latents = torch.empty(1, pipe.vae.config.latent_channels, height // scale, width // scale)
        time_ids, timestep = torch.empty(1, 6), torch.empty(1)
    prompt, pooled = pipe.stored_prompt()

    def unet() -> None:
        pipe.unet(
            latents,
            timestep,
            encoder_hidden_states=prompt,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
        )

    layers: list[LayerShape] = []
    stock = flops_of(
        lambda: layers.extend(pisa_layer_shapes(pipe.unet, pipe.pisa_layer_names, unet))
    )
    layer, count = layers[0], len(layers)
    pixels_per_token = math.isqrt(height * width // layer.tokens)
    grid = height // pixels_per_token, width // pixels_per_token
    shares = pair_shares(*grid, radius / pixels_per_token)
    pairs = {way: share * layer.tokens**2 for way, share in shares.items()}
    attention = {way: count * attention_flops(layer, number) for way, number in pairs.items()}
    config = PisaConfig.from_dict(dict(pipe.config.pisa))
    per_pair = config.supersampling * config.segments * FLOPS_PER_RAY_SAMPLE
    # Every backend but the dense formula traces rays where light arrives, and nowhere else.
    inside = {way: pairs["dense" if way == "dense" else "circles"] for way in WAYS}
    rays = {way: number * per_pair for way, number in inside.items()}
    ordinary = attention["dense"]
    overhead = {way: (attention[way] - ordinary + rays[way]) / stock for way in WAYS}
    encode = flops_of(lambda: pipe.vae.encode(photo))
    decode = flops_of(lambda: pipe.vae.decode(latents))
    refocus = stock * (1 + overhead["blocks"]) + decode
    return PipelineFlops(
        width=width,
        height=height,
        radius=radius,
        pisa_layers=count,
        pisa_tokens=layer.tokens,
        prompt=prompt_flops() if shapes == "sdxl" else None,
        encode=encode,
        decode=decode,
        stock_unet=stock,
        ordinary_attention=ordinary,
        pair_share=shares,
        attention=attention,
        rays=rays,
        overhead=overhead,
        first_picture=encode + refocus + decode,
        refocus=refocus,
    )


def table(rows: Sequence[PipelineFlops]) -> str:
    """One column for each size, in Markdown."""

    def line(words: str, number: Callable[[PipelineFlops], float | None], form: str) -> list[str]:
        return [words, *(in_words(number(row), form) for row in rows)]

    tera, giga = 1e12, 1e9
    lines = [
        ["", *(f"{row.width} x {row.height}" for row in rows)],
        line("prompt (once), TFLOP", lambda row: row.prompt and row.prompt / tera, ".3f"),
        line("encode, TFLOP", lambda row: row.encode / tera, ".3f"),
        line("stock UNet, TFLOP", lambda row: row.stock_unet / tera, ".3f"),
        line("decode, TFLOP", lambda row: row.decode / tera, ".3f"),
        line("first picture (decodes twice), TFLOP", lambda row: row.first_picture / tera, ".3f"),
        line("refocus, TFLOP", lambda row: row.refocus / tera, ".3f"),
        line("ordinary attention where PISA is, GFLOP",
             lambda row: row.ordinary_attention / giga, ".2f"),
    ]  # fmt: skip
    for way, words in WAYS.items():
        lines += [
            line(f"{words}: share", lambda row, way=way: row.pair_share[way], ".2%"),
            line("... PISA, GFLOP", lambda row, way=way: row.attention[way] / giga, ".2f"),
            line("... rays, GFLOP", lambda row, way=way: row.rays[way] / giga, ".2f"),
            line(
                "... overhead over the stock UNet", lambda row, way=way: row.overhead[way], "+.2%"
            ),
        ]
    return markdown(lines)


def protocol(rows: Sequence[PipelineFlops], shapes: str) -> str:
    """What was counted, and what was assumed."""
    row = rows[0]
    return (
        f"Networks of the shapes {shapes!r} on the meta device, batch 1, counted by "
        "torch.utils.flop_counter: matrix products, convolutions and attention, two operations for "
        "a multiplication and an addition; no normalisation, activation or softmax. The prompt is "
        f"{PROMPT_TOKENS} tokens in both text encoders. PISA by hand: {row.pisa_layers} layers; "
        "4 x channels x heads operations for each pair of tokens, every circle of confusion with a "
        f"radius of {row.radius:g} px; without mask and softmax, as ordinary attention is counted. "
        f"Rays: {FLOPS_PER_RAY_SAMPLE} operations for each sample of each ray of each pair inside "
        "the circles (of all pairs in the dense formula), once per picture, as if none could be "
        "left out. A first picture is encode, UNet with PISA in blocks, decode, and a second "
        "decode that tells what the codec loses; a refocus is UNet and one decode. Operations say "
        "nothing of the memory traffic of the dense formula's tables."
    )

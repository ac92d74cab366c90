"""What a bokeh stack asks of FLUX.1-Kontext, checked: size, strengths, texts, noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..models.bokeh_adapter import LARGEST_STRENGTH, SMALLEST_STRENGTH
from ..optics import rescale_strength

STACK_PROMPT = (
    "Set dof_cond = {K} (stronger background defocus); preserve subject sharpness; keep "
    "composition, lighting, and colors unchanged."
)
"""What the published adapter was trained with; ``{K}`` is the K that the network is told."""

STACK_SEED = 42
"""Of the noise, where no generator is given: that of the authors."""

# K comes back from a change of size and to it again with a few units in the last place.
ROUNDING = 1e-6


def working_size(width: int, height: int, max_area: int, multiple: int) -> tuple[int, int]:
    """Returns (width, height) of the picture on which the network works, before its padding.

    The largest with the shape of the photo, and no larger than it, of which the sides, brought up
    to a multiple, span at most `max_area` pixels. One side is a multiple, so that padding fills up
    the other only; or the photo keeps its size.

    Args:
        width, height: of the photo.
        max_area: pixels, padding included.
        multiple: of the sides with their padding.

    Raises:
        ValueError: an area without room for the photo, however small.
    """

    def padded_area(scale: float) -> int:
        sides = (max(round(side * scale), 1) for side in (width, height))
        return math.prod(-(-side // multiple) * multiple for side in sides)

    scales = [1.0]
    for side in (width, height):
        scales += [one / side for one in range(multiple, side, multiple)]
    fitting = [scale for scale in scales if padded_area(scale) <= max_area]
    if not fitting:
        raise ValueError(
            f"max_area is {max_area}, too small for a photo of {width} x {height}; wanted a number "
            "of pixels such as the default, 1024 * 1024."
        )
    scale = max(fitting)
    return max(round(width * scale), 1), max(round(height * scale), 1)


def network_strengths(
    strengths: Sequence[float], size: tuple[int, int], working: tuple[int, int]
) -> list[float]:
    """Returns what the network is told: K of the picture on which it works.

    Args:
        strengths: K of the photo; 0 stays 0.
        size, working: (width, height) of the photo, and of that picture.

    Raises:
        ValueError: K beyond what the network was trained for.
    """
    width, network_width = size[0], working[0]
    told = [rescale_strength(strength, width, network_width) for strength in strengths]
    low, high = SMALLEST_STRENGTH * (1 - ROUNDING), LARGEST_STRENGTH * (1 + ROUNDING)
    outside = [
        strength
        for strength, number in zip(strengths, told, strict=True)
        if strength > 0 and not low <= number <= high
    ]
    if outside:
        smallest, largest = (
            rescale_strength(limit, network_width, width)
            for limit in (SMALLEST_STRENGTH, LARGEST_STRENGTH)
        )
        raise ValueError(
            f"K is {', '.join(f'{one:.4g}' for one in outside)} for a photo of {width} x "
            f"{size[1]}; wanted {smallest:.4g} to {largest:.4g}, or 0 for no blur. The network "
            f"works on it at {network_width} x {working[1]}, where these are the "
            f"{SMALLEST_STRENGTH:g} to {LARGEST_STRENGTH:g} that it was trained for; max_area "
            "changes that size, and a smaller one allows a larger K."
        )
    return told


def check_prompts(
    prompt: Any, prompt_embeds: Any, pooled_prompt_embeds: Any, told: Sequence[float]
) -> list[str] | None:
    """Returns a text for each K, or None where embeddings were given in its place.

    Args:
        prompt: None, a text, or one for each K.
        prompt_embeds, pooled_prompt_embeds: both or none.
        told: K as the network is told, which takes the place of ``{K}``.

    Raises:
        ValueError: texts and embeddings, one embedding of two, or another number than of K.
    """
    given = [one is not None for one in (prompt_embeds, pooled_prompt_embeds)]
    if any(given):
        if prompt is not None or not all(given):
            raise ValueError(
                "A prompt is given as text (prompt), or as prompt_embeds together with "
                "pooled_prompt_embeds; wanted one of the two ways."
            )
        for name, embeds, axes in (
            ("prompt_embeds", prompt_embeds, 3),
            ("pooled_prompt_embeds", pooled_prompt_embeds, 2),
        ):
            if embeds.ndim != axes or embeds.shape[0] not in (1, len(told)):
                raise ValueError(
                    f"{name} has shape {tuple(embeds.shape)}; wanted {axes} axes, of which the "
                    f"first is 1 or the number of K, {len(told)}."
                )
        return None
    texts = STACK_PROMPT if prompt is None else prompt
    if isinstance(texts, str):
        texts = [texts] * len(told)
    if len(texts) != len(told) or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"prompt is {prompt!r}; wanted one text, or one for each of the {len(told)} K."
        )
    return [text.replace("{K}", f"{one:.2f}") for text, one in zip(texts, told, strict=True)]


def check_generators(generator: Any, count: int) -> list[torch.Generator]:
    """Returns the generator of all pictures, or one for each of `count`.

    Raises:
        ValueError: another number of them, or something else.
    """
    if generator is None:
        return [torch.Generator().manual_seed(STACK_SEED)]
    generators = list(generator) if isinstance(generator, (list, tuple)) else [generator]
    if not all(isinstance(one, torch.Generator) for one in generators) or (
        isinstance(generator, (list, tuple)) and len(generators) != count
    ):
        raise ValueError(
            f"generator is {generator!r}; wanted one torch.Generator for all pictures, or a list "
            f"of one for each of the {count} K."
        )
    return generators

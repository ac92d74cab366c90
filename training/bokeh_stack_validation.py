"""How well a generator of bokeh stacks is trained: its loss on held-out scenes, and its control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch
from torch import Tensor

from bokehdiff.models.bokeh_adapter import LARGEST_STRENGTH
from bokehdiff.optics import circle_of_confusion
from training.bokeh_stack_data import ATTEMPTS, instruction
from training.bokeh_stack_sources import SceneStacks, within
from training.samples import seeded_generator
from training.validation import (
    BLURRED_RADIUS,
    Validation,
    as_picture,
    neighbour_contrast,
    picture_grid,
    psnr,
    spearman_correlation,
)

if TYPE_CHECKING:
    from training.bokeh_stack_task import BokehStackTask

FRAMES = 3
"""Pictures with lens blur of each held-out scene."""
NOISE_SHARES = (0.25, 0.5, 0.75)
"""Shares of noise at which the loss is measured."""
K_EDGES = (1, 10, 20, 30)
"""px*m between which the loss is told apart by K."""


def held_out_scenes(
    seed: int,
    count: int,
    size: int,
    strengths: tuple[float, float],
    options: Mapping[str, Any],
) -> list[dict[str, Tensor]]:
    """Return the first `count` scenes of this seed whose K are all within the range.

    Args:
        seed, size, strengths, options: as of :class:`~training.bokeh_stack_sources.SceneStacks`.
        count: how many.

    Raises:
        ValueError: hardly any scene is.
    """
    scenes = SceneStacks(seed, size, strengths, FRAMES, options).scenes[FRAMES]
    found: list[dict[str, Tensor]] = []
    for index in range(count * ATTEMPTS):
        scene = scenes[index]
        if within(scene["K"], strengths):
            found.append(scene)
        if len(found) == count:
            return found
    raise ValueError(
        f"Of {count * ATTEMPTS} held-out scenes only {len(found)} can be blurred by K within "
        f"{strengths[0]:g} to {strengths[1]:g} px*m. Widen the range, or change data.options."
    )


@torch.no_grad()
def held_out_losses(
    task: BokehStackTask, scenes: Sequence[Mapping[str, Tensor]], seed: int
) -> dict[str, float]:
    """Return means of the loss over scenes, frames and shares of noise, by name.

    The sharp picture is the reference; prompt and adapter say K; the noise is the same for all
    frames of a scene and in every validation.

    - ``loss``: told the K of the frame,
    - ``loss_other_K``: told the K of another frame of the scene, in prompt and adapter. A network
      that follows K loses by that.
    - ``loss_K_1_10``, ``loss_K_10_20``, ``loss_K_20_30``: as ``loss``, of frames whose K is in that
      range; absent where none is.
    """
    losses: list[Tensor] = []
    others: list[Tensor] = []
    strengths: list[Tensor] = []
    for index, scene in enumerate(scenes):
        K = scene["K"].to(task.device)
        target = task.target_latents(scene["stack"].to(task.device))
        reference = scene["image"].to(task.device).expand_as(scene["stack"])
        for number, share in enumerate(NOISE_SHARES):
            drawn = seeded_generator(seed, index, number)
            noise = torch.randn(tuple(target.shape[1:]), generator=drawn).to(target.device)
            for found, told in ((losses, K), (others, K.roll(1))):
                found.append(
                    task.squared_errors(
                        target,
                        noise.expand_as(target),
                        torch.full_like(K, share),
                        told / LARGEST_STRENGTH,
                        [instruction(float(one)) for one in told],
                        reference=reference,
                    ).cpu()
                )
            strengths.append(K.cpu())
    loss, K = torch.cat(losses), torch.cat(strengths)
    scores = {"loss": float(loss.mean()), "loss_other_K": float(torch.cat(others).mean())}
    for low, high in zip(K_EDGES, K_EDGES[1:], strict=False):
        inside = (K >= low) & ((K < high) | (high == K_EDGES[-1]))
        if inside.any():
            scores[f"loss_K_{low}_{high}"] = float(loss[inside].mean())
    return scores


@torch.no_grad()
def sampled_scores(
    task: BokehStackTask, scenes: Sequence[Mapping[str, Tensor]], steps: int, seed: int
) -> Validation:
    """Sample the stacks of held-out scenes, and return how near and how controlled they are.

    - ``psnr``, ``psnr_identity``: dB on display sRGB, of what was sampled and of the sharp picture
      left as it is, against the traced frames,
    - ``control``: share of scenes whose blurred region (a radius above 2 pixels at the largest K)
      loses contrast each time K grows, the sharp picture first,
    - ``control_correlation``: Spearman's rank correlation in [-1, 1] between K and the blur there.

    The last two are absent where no scene has such a region. The picture shows sharp picture,
    sampled and traced frames of each scene in a row.

    Args:
        task: what is scored.
        scenes: of `held_out_scenes`.
        steps: of denoising.
        seed: of the noise, one for each scene and the same for its frames.
    """
    scores: dict[str, list[float]] = {}
    rows: list[dict[str, PIL.Image.Image]] = []
    for index, scene in enumerate(scenes):
        K = scene["K"].tolist()
        # The codec is in float32, whatever the transformer is in.
        with torch.autocast(task.device.type, task.precision, enabled=task.precision is not None):
            pictures: Tensor = task.pipe(
                scene["image"],
                K=K,
                num_inference_steps=steps,
                guidance_scale=task.args.guidance,
                colour_transfer=None,
                max_sequence_length=task.args.prompt_tokens,
                generator=seeded_generator(seed, index),
                batch_size=1,
                output_type="pt",
                return_dict=False,
            )[0]
        sharp = scene["image"][None]
        everywhere = torch.ones_like(scene["depth"][None], dtype=torch.bool)
        for name, given in (("psnr", pictures), ("psnr_identity", sharp.expand_as(pictures))):
            for one, traced in zip(given.split(1), scene["stack"].split(1), strict=True):
                scores.setdefault(name, []).append(psnr(one, traced, everywhere))
        radius = circle_of_confusion(1 / scene["depth"][None], float(scene["df"]), max(K))
        blurred = radius > BLURRED_RADIUS
        if blurred.any():
            blur = [-neighbour_contrast(one, blurred) for one in (sharp, *pictures.split(1))]
            rises = all(one < other for one, other in zip(blur, blur[1:], strict=False))
            scores.setdefault("control", []).append(float(rises))
            correlation = spearman_correlation([0.0, *K], blur)
            scores.setdefault("control_correlation", []).append(correlation)
        rows.append(
            {
                "sharp": as_picture(sharp),
                **{
                    f"{what}, K = {one:.1f}": as_picture(picture)
                    for what, stack in (("sampled", pictures), ("traced", scene["stack"]))
                    for one, picture in zip(K, stack.split(1), strict=True)
                },
            }
        )
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    return Validation(dict(means), picture_grid(rows))

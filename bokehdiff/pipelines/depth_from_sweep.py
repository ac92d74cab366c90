"""Depth of a photo and a real bokeh stack by measuring blur, without a network."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from ..blur_sweep import ALLOWED_SPREAD, Side, disparity_from_sweep, range_to_search
from ..edge_aware_filling import fill_unreliable
from ..edge_aware_upsampling import upsample_to_photo
from ..images import ImageInput, as_image_batch, linear_to_srgb, srgb_to_linear
from ..optics import disparity_to_depth, rescale_strength
from .depth_inputs import (
    StackInput,
    Strengths,
    as_stack_batch,
    focus_disparities,
    strengths_per_photo,
)
from .depth_output import DepthFromBokehOutput, as_output_type, check_output_type

__all__ = ["depth_from_sweep"]

# A sweep takes a minute or two per megapixel and CPU core, and grows faster than the picture.
SWEEP_AREA = 1024 * 1024
# At least one place has to be known to a tenth of its disparity.
LEAST_RELIABILITY = 0.5


@torch.no_grad()
def depth_from_sweep(
    image: ImageInput,
    stack: StackInput,
    K: Strengths,
    focus_distance_m: Any,
    *,
    side: Side | None = None,
    max_area: int = SWEEP_AREA,
    output_type: str = "pt",
) -> DepthFromBokehOutput:
    """Depth of a photo and a **real** stack of it, by measuring how much each place is blurred.

    For each disparity of a list the blur of all frames is foretold, and the disparity that explains
    the frames best is kept (:func:`bokehdiff.blur_sweep.disparity_from_sweep`). Where there is no
    texture nothing can be measured; there values spread from reliable places around, over surfaces
    and up to their edges (:func:`bokehdiff.edge_aware_filling.fill_unreliable`). ``confidence`` is
    the reliability of what was measured, before.

    Photo and frames have to show the same view, pixel for pixel, with the same exposure: a camera
    on a tripod, the photo with the aperture nearly closed.

    Args:
        image: one or more all-in-focus photos, anything
            :func:`bokehdiff.images.as_image_batch` takes.
        stack: the frames of one photo: a list of N pictures of its size, or (N, 3, H, W); of B
            photos a list of B of these, or (B, N, 3, H, W).
        K: blur strength of each frame, pixels of blur radius in the photo per 1/metre: (N,)
            numbers, or (B, N).
        focus_distance_m: metres at which the frames are in focus: one number, or one for each frame
            (a focal stack); ``math.inf`` for infinity.
        side: of the plane in focus on which everything lies: ``"farther"``, ``"nearer"``; or
            ``"both"``, if frames differ in focus. Blur alone does not tell. Default: ``"both"`` if
            they differ, else ``"farther"``, as of a portrait.
        max_area: pixels on which is measured; a larger photo is made smaller, K too, and the
            result larger again.
        output_type: ``"pt"``, ``"np"`` or ``"pil"``.

    Raises:
        FileNotFoundError: a path leads to no file.
        ValueError: an input that cannot be meant, frames of another size, or a stack in which
            nothing can be measured.
    """
    check_output_type(output_type)
    if isinstance(max_area, bool) or not isinstance(max_area, int) or max_area < 1:
        raise ValueError(f"max_area is {max_area!r}; wanted a number of pixels, 1 or more.")
    photos = as_image_batch(image).float()
    frames = as_stack_batch(stack, photos)
    strengths = strengths_per_photo(K, *frames.shape[:2])
    df = focus_disparities(focus_distance_m, frames.shape[1])
    side = chosen_side(focus_distance_m, side)
    light, stack_light = srgb_to_linear(photos), srgb_to_linear(frames)
    height, width = photos.shape[-2:]
    shrink = min(math.sqrt(max_area / (height * width)), 1.0)
    size = (max(round(height * shrink), 1), max(round(width * shrink), 1))
    if size != (height, width):
        light = F.interpolate(light, size, mode="area")
        stack_light = F.interpolate(stack_light.flatten(0, 1), size, mode="area")
        stack_light = stack_light.unflatten(0, frames.shape[:2])
        strengths = rescale_strength(strengths, width, size[1])
    disparities, confidences = [], []
    for one, its_stack, its_K in zip(light.split(1), stack_light.split(1), strengths, strict=True):
        found = disparity_from_sweep(one, its_stack, its_K[None], df, side=side)
        if float(found.reliability.max()) < LEAST_RELIABILITY:
            raise ValueError(
                "Nothing could be measured: no place of the photo is blurred in the stack in a way "
                "that tells its distance. Check K, the focus distance and the side. The photo "
                "needs texture, and blur of at most an eighth of its shorter side in radius."
            )
        blurred = its_K > 0
        searched = range_to_search(its_K[blurred], df[blurred], side, min(size))
        reliability = beyond_guessing(found.disparity, found.reliability, searched)
        disparities.append(fill_unreliable(found.disparity, reliability, linear_to_srgb(one)))
        confidences.append(found.reliability)
    disparity, confidence = torch.cat(disparities), torch.cat(confidences)
    if size != (height, width):
        disparity = torch.cat(
            [
                upsample_to_photo(*one)
                for one in zip(disparity.split(1), photos.split(1), strict=True)
            ]
        )
        confidence = F.interpolate(
            confidence, (height, width), mode="bilinear", align_corners=False
        )
    return DepthFromBokehOutput(
        depth=as_output_type(disparity_to_depth(disparity), "depth", output_type),
        disparity=as_output_type(disparity, "disparity", output_type),
        confidence=as_output_type(confidence, "confidence", output_type),
    )


def beyond_guessing(
    disparity: torch.Tensor, reliability: torch.Tensor, searched: tuple[float, float]
) -> torch.Tensor:
    """(B, 1, H, W) reliability of which that of a mere guess within the range is taken away.

    A reliability of ``1 / (1 + v)`` is the information 1 / v, with the variance v in units of
    ``(0.1 disparity)^2``. All disparities being equally likely has information too, which would
    pull on surfaces without texture. Twice of it is taken, as costs that are nearly even are noise.
    """
    low, high = searched
    variance = (high - low) ** 2 / 12 + ((low + high) / 2 - disparity) ** 2
    guessed = (ALLOWED_SPREAD * disparity) ** 2 / variance
    information = (reliability / (1 - reliability).clamp_min(1e-6) - 2 * guessed).clamp_min(0)
    return information / (1 + information)


def chosen_side(focus_distance_m: Any, side: Side | None = None) -> Side:
    """The side that :func:`depth_from_sweep` takes when none, or one, is given."""
    if side is not None:
        return side
    distances = torch.as_tensor(focus_distance_m).reshape(-1)
    return "farther" if bool((distances == distances[0]).all()) else "both"

"""How good a renderer is on held-out scenes, and whether its controls do what they say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bokehdiff.optics import circle_of_confusion

BLURRED_RADIUS = 2.0
"""Pixels of circle-of-confusion radius above which a pixel counts as blurred."""
IN_FOCUS_RADIUS = 0.5
"""Pixels of circle-of-confusion radius below which a pixel counts as in focus."""
CONTROL_SHARES = (0.0, 0.5, 1.0)
"""Shares of a scene's K that must give more and more blur."""

Renderer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From image in [0, 1], disparity, df and K to an image in [-1, 1]: `finetune.BokehRenderer`."""


@torch.no_grad()
def validate(
    renderer: Renderer, scenes: Sequence[dict[str, Tensor]], border: int, device: torch.device
) -> dict[str, Any]:
    """Render held-out scenes and return their scores.

    Args:
        renderer: what is scored.
        scenes: image (3, H, W), disparity (1, H, W), df (), K () and target (3, H, W) of each.
        border: pixels at the border that count for nothing, because a photograph does not show the
            light that comes from beyond it.
        device: where the renderer computes.

    Returns:
        Means over scenes; PSNR in dB on display-encoded sRGB in [0, 1].

        - ``psnr``, ``psnr_blurred``, ``psnr_in_focus``: everywhere, and where the circle of
          confusion has a radius above 2 pixels or below half a pixel,
        - ``psnr_identity``, ``psnr_blurred_identity``: of the photograph left as it is,
        - ``control``: share of scenes whose blurred region loses contrast each time K grows, from 0
          to half to all of the scene's K,
        - ``scenes``: their number.

        A score that no scene has a region for is absent.
    """
    scores: dict[str, list[float]] = {}
    for scene in scenes:
        image, disparity, target = (
            scene[name][None].to(device) for name in ("image", "disparity", "target")
        )
        df, K = (scene[name].reshape(1).to(device) for name in ("df", "K"))
        renders = [
            renderer(image, disparity, df, K * share).float().div(2).add(0.5).clamp(0, 1)
            for share in CONTROL_SHARES
        ]
        image, target, radius, *renders = (
            without_border(picture, border)
            for picture in (image, target, circle_of_confusion(disparity, df, K), *renders)
        )
        blurred, in_focus = radius > BLURRED_RADIUS, radius < IN_FOCUS_RADIUS
        everywhere = torch.ones_like(blurred)
        for name, picture, region in (
            ("psnr", renders[-1], everywhere),
            ("psnr_blurred", renders[-1], blurred),
            ("psnr_in_focus", renders[-1], in_focus),
            ("psnr_identity", image, everywhere),
            ("psnr_blurred_identity", image, blurred),
        ):
            if region.any():
                scores.setdefault(name, []).append(_psnr(picture, target, region))
        if blurred.any():
            sharp, softer, softest = (_contrast(render, blurred) for render in renders)
            scores.setdefault("control", []).append(float(sharp > softer > softest))
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    return {"scenes": len(scenes), **means}


def without_border(image: Tensor, border: int) -> Tensor:
    """Return `image` (..., H, W) without `border` pixels on each side."""
    height, width = image.shape[-2:]
    return image[..., border : height - border, border : width - border]


def _psnr(picture: Tensor, target: Tensor, region: Tensor) -> float:
    """PSNR in dB of (1, 3, H, W) pictures in [0, 1], over a region (1, 1, H, W)."""
    squares = (picture - target).square().mean(1, keepdim=True)[region]
    return float(-10 * squares.mean().clamp_min(1e-12).log10())


def _contrast(picture: Tensor, region: Tensor) -> float:
    """Mean squared difference of neighbours in (1, 3, H, W), inside a region (1, 1, H, W)."""
    across = (picture[..., :, 1:] - picture[..., :, :-1]).square().mean(1, keepdim=True)
    down = (picture[..., 1:, :] - picture[..., :-1, :]).square().mean(1, keepdim=True)
    return float(torch.cat([across[region[..., 1:]], down[region[..., 1:, :]]]).mean())

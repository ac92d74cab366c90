"""How good the blur of LiteBokeh is on held-out photographs, and what its enhancement does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from bokehdiff.losses import SSIM_WINDOW, structural_similarity_loss
from bokehdiff.models.litebokeh import LiteBokehOutput
from training.photo_degradation import degraded
from training.samples import seeded_generator
from training.validation import Validation, as_picture, neighbour_contrast, picture_grid, psnr


def validate_litebokeh(
    render: Callable[[Tensor], LiteBokehOutput],
    samples: Sequence[dict[str, Tensor]],
    device: torch.device,
    *,
    enhanced: Callable[[Tensor], Tensor] | None = None,
    noise: float = 1.0,
    pictures: int = 0,
) -> Validation:
    """Blur held-out photographs and return their scores, and pictures of the first of them.

    Args:
        render: the network, from (1, 3, H, W) in [0, 1], with its enhancement.
        samples: ``image`` and ``bokeh`` (3, H, W), and where the truth is known ``in_focus``
            (1, H, W) bool; they may differ in size.
        device: where the network computes.
        enhanced: the enhancement block, to be scored by itself too.
        noise: of photographs made worse for that.
        pictures: how many samples the grid shows.

    Returns:
        Means over samples, on display-encoded sRGB in [0, 1].

        - ``psnr``, ``psnr_subject``, ``psnr_background`` in dB: everywhere, in focus, and where
          not; ``ssim``,
        - ``sharpness_subject``: neighbour contrast of what is in focus as a share of the truth's
          (`training.validation.neighbour_contrast`); 1 is as sharp,
        - the same with ``_plain`` added: without the enhancement; with ``_identity``: of the
          photograph left as it is,
        - ``scenes``: the number of samples.

        With `enhanced`:

        - ``psnr_degraded``, ``psnr_enhanced``: of photographs made worse
          (`training.photo_degradation.degraded`), and of the same enhanced; without those that
          the degradation leaves clean. It is the same in every call,
        - ``psnr_clean``: of photographs enhanced that need none,
        - ``background_error_rise``: share by which the mean difference where it is not in focus is
          larger with the enhancement than without.

        A score that no sample has a region for is absent.
    """
    scores: dict[str, list[float]] = {}
    rows: list[dict[str, PIL.Image.Image]] = []
    for number, sample in enumerate(samples):
        image, target = (sample[name][None].to(device) for name in ("image", "bokeh"))
        out = render(image)
        bokeh, plain = out.bokeh.float(), out.rendered.float()
        in_focus = sample["in_focus"][None].to(device) if "in_focus" in sample else None
        found: dict[str, float] = {}
        for suffix, picture in (("", bokeh), ("_plain", plain), ("_identity", image)):
            found |= {
                name + suffix: value for name, value in _likeness(picture, target, in_focus).items()
            }
        if enhanced is not None:
            found["psnr_clean"] = _psnr(enhanced(image), image)
            worse = degraded(sample["image"], seeded_generator(0, number), noise)[None].to(device)
            if not torch.equal(worse, image):
                found["psnr_degraded"] = _psnr(worse, image)
                found["psnr_enhanced"] = _psnr(enhanced(worse), image)
            if in_focus is not None and not in_focus.all():
                before, after = (
                    (picture - target).abs().mean(1, keepdim=True)[~in_focus].mean()
                    for picture in (plain, bokeh)
                )
                found["background_error_rise"] = float(after / before.clamp_min(1e-6)) - 1
        for name, value in found.items():
            scores.setdefault(name, []).append(value)
        if len(rows) < pictures:
            rows.append(
                {
                    "photograph": as_picture(image),
                    f"without enhancement, {found['psnr_plain']:.1f} dB": as_picture(plain),
                    f"rendered, {found['psnr']:.1f} dB": as_picture(bokeh),
                    "ground truth": as_picture(target),
                }
            )
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    return Validation({"scenes": len(samples), **means}, picture_grid(rows) if rows else None)


def _psnr(picture: Tensor, target: Tensor) -> float:
    return psnr(picture, target, torch.ones_like(target[:, :1], dtype=torch.bool))


def _likeness(picture: Tensor, target: Tensor, in_focus: Tensor | None) -> dict[str, float]:
    """Scores of (1, 3, H, W) pictures; of their regions if `in_focus` (1, 1, H, W) is known."""
    scores = {"psnr": _psnr(picture, target)}
    if min(picture.shape[-2:]) >= SSIM_WINDOW and not picture.isnan().any():
        scores["ssim"] = 1 - float(structural_similarity_loss(2 * picture - 1, 2 * target - 1))
    if in_focus is None:
        return scores
    for name, region in (("subject", in_focus), ("background", ~in_focus)):
        if region.any():
            scores[f"psnr_{name}"] = psnr(picture, target, region)
    contrast = neighbour_contrast(target, in_focus)
    if contrast > 0:  # it is NaN where the region is empty
        scores["sharpness_subject"] = neighbour_contrast(picture, in_focus) / contrast
    return scores


def validation_line(scores: Mapping[str, Any]) -> str:
    """Return a line about the `scores` of `validate_litebokeh` for people who watch."""
    parts = [
        f"PSNR {scores['psnr']:.2f} dB (photograph as it is {scores['psnr_identity']:.2f}, without "
        f"enhancement {scores['psnr_plain']:.2f})"
    ]
    if "psnr_subject" in scores:
        parts.append(
            f"subject {scores['psnr_subject']:.2f}, background "
            f"{scores.get('psnr_background', math.nan):.2f}, sharpness of the subject "
            f"{scores.get('sharpness_subject', math.nan):.2f}"
        )
    if "psnr_clean" in scores:
        parts.append(
            f"made worse {scores.get('psnr_degraded', math.nan):.2f}, enhanced "
            f"{scores.get('psnr_enhanced', math.nan):.2f}, background error "
            f"{scores.get('background_error_rise', math.nan):+.1%}"
        )
    return "; ".join(parts)

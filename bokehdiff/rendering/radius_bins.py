"""Lens blur in bins of equal radius: every pixel spreads over its circle, and all light adds up.

A picture is shared out among bins of defocus, every bin is spread over its circle of confusion, and
the sum is divided by what becomes of a white picture. Made for networks that are trained through
it: differentiable everywhere, in light and in defocus. Nothing hides anything here, so that light
of a blurred background spills over a sharp foreground.
"""

from __future__ import annotations

import functools
import math

import torch

from bokehdiff.rendering.aperture import Aperture
from bokehdiff.rendering.defocus_levels import DefocusLevels
from bokehdiff.rendering.frame import check_blur_arguments

__all__ = ["binned_blur"]

SMALLEST_BIN = 0.25


def binned_blur(
    light: torch.Tensor,
    signed_defocus: torch.Tensor,
    *,
    aperture: Aperture | None = None,
    bin_px: float = 2.0,
) -> torch.Tensor:
    """Blurred picture, like ``light``: ``sum_g k_g * (w_g light) / sum_g k_g * w_g``.

    Bins lie at the multiples of ``bin_px``; k_g is the kernel of the opening at this radius, w_g
    the share of a pixel in the bin (:func:`bokehdiff.rendering.defocus_levels.share_of_level`), and
    * the convolution. They are bins of the radius if the opening looks the same in front of the
    focus and behind it, else of signed defocus.

    Args:
        light: (B, C, H, W) linear light, float32 or float64 (kept).
        signed_defocus: (B, 1, H, W) signed radius of the circle of confusion in pixels, positive
            nearer than the plane in focus: ``K * (disparity - df)``.
        aperture: the opening; default disc. Its ``fringe`` is not looked at, because one defocus
            serves all channels.
        bin_px: pixels of radius from one bin to the next, at least 0.25.

    The outermost pixels are repeated beyond the frame. Time grows with the number of bins.

    Raises:
        ValueError: arguments that do not fit, or an opening with a cat-eye.
    """
    check_blur_arguments(light, signed_defocus)
    if not SMALLEST_BIN <= bin_px < math.inf:
        raise ValueError(
            f"bin_px is {bin_px!r}; wanted the pixels of radius from one bin to the next, at least "
            f"{SMALLEST_BIN:g}, for instance 2."
        )
    if aperture is None or aperture.is_symmetric:
        signed_defocus = signed_defocus.abs()
    first = math.floor(float(signed_defocus.detach().min()) / bin_px)
    # Two at least: with one bin alone there is no gradient.
    last = max(math.ceil(float(signed_defocus.detach().max()) / bin_px), first + 1)
    bins = [number * bin_px for number in range(first, last + 1)]
    levels = DefocusLevels(light, signed_defocus, bins, aperture)
    # Transforms are linear: their sum is transformed back once.
    summed = functools.reduce(torch.add, (spectra.sum(1) for spectra in levels.spectra()))
    return levels.divided(levels.picture(summed))

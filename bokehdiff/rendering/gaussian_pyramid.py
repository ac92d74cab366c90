"""Lens blur by a pyramid of Gaussians, from which every pixel takes what its circle needs.

The cheapest renderer, made for networks that correct it: a few small convolutions, whatever the
blur, differentiable everywhere. A uniform disc of radius r has a standard deviation of r/2 along
each axis, and so has the Gaussian that stands for it. Nothing is known of occlusion here: a pixel
sees the colours around it, nearer or farther. Highlights become soft spots, not discs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from bokehdiff.rendering.frame import check_blur_arguments

__all__ = ["gaussian_pyramid_blur", "levels_for"]

POOLING_VARIANCE = 1 / 16
"""In cells^2 of the coarser level: what a mean over 2 x 2 cells of the finer one adds."""


def levels_for(largest_radius_px: float) -> int:
    """How many levels circles of confusion up to this radius, in pixels, need; at least 1."""
    return max(1, math.ceil(math.log2(max(largest_radius_px, 2.0) / 2)) + 1)


def gaussian_pyramid_blur(
    light: torch.Tensor, signed_defocus: torch.Tensor, *, levels: int
) -> torch.Tensor:
    """Blurred picture, like ``light``.

    Level l of the pyramid is the picture under a Gaussian of ``s = 2^(l - 1)`` pixels, l = 1 ...
    ``levels``, computed on cells of s pixels; level 0 is the picture. A pixel with a circle of
    radius r takes the mean of the two levels around ``s = r / 2``, weighed linearly in s^2, so that
    the variance is exact. Larger circles than ``2^levels`` pixels are rendered with that radius.

    Args:
        light: (B, C, H, W) linear light, float32 or float64 (kept).
        signed_defocus: (B, 1, H, W) radius of the circle of confusion in pixels; the sign does not
            matter here.
        levels: Gaussians; see :func:`levels_for`.

    Raises:
        ValueError: arguments that do not fit.
    """
    if not torch.compiler.is_compiling():
        check_blur_arguments(light, signed_defocus)
    if levels < 1:
        raise ValueError(f"levels is {levels}; wanted at least 1 Gaussian.")
    with torch.autocast(light.device.type, enabled=False):
        return blend_levels(light, signed_defocus.to(light.dtype), levels)


def blend_levels(light: torch.Tensor, signed_defocus: torch.Tensor, levels: int) -> torch.Tensor:
    """What :func:`gaussian_pyramid_blur` computes, unchecked: for graphs that are exported."""
    height, width = light.shape[-2:]
    variance = signed_defocus.square() / 4
    level, cells, kept = light, light, 1 / 4
    blurred = light
    for number in range(levels):
        cell = 2**number
        # The variance of the level on its cells, in cells^2, is what bilinear reading leaves of 1.
        wanted = 1 - interpolation_variance(cell)
        if number == 0:
            cells = gaussian(cells, wanted)
        else:
            # At the border only the cells that are there are averaged, as if they were repeated.
            cells = F.avg_pool2d(cells, 2, ceil_mode=True, count_include_pad=False)
            cells = gaussian(cells, wanted - kept / 4 - POOLING_VARIANCE)
        kept = wanted
        finer, level = level, cells
        if cell > 1:
            enlarged = F.interpolate(
                cells, scale_factor=float(cell), mode="bilinear", align_corners=False
            )
            level = enlarged[..., :height, :width]
        below, above = (0.0 if number == 0 else cell**2 / 4), float(cell**2)
        share = ((variance - below) / (above - below)).clamp(0, 1)
        blurred = blurred + share * (level - finer)
    return blurred


def interpolation_variance(cell: int) -> float:
    """Variance, in cells^2, of bilinear reading at the pixels of cells of this side: 0 for 1."""
    between = [((2 * place + 1) / (2 * cell) + 0.5) % 1 for place in range(cell)]
    return sum(share * (1 - share) for share in between) / cell


def gaussian(picture: torch.Tensor, variance: float) -> torch.Tensor:
    """(B, C, H, W) under a Gaussian of this variance, in pixels^2, the border repeated."""
    weights = gaussian_weights(variance)
    half_width = len(weights) // 2
    wide = F.pad(picture, (half_width,) * 4, mode="replicate")
    return weighted_sum(weighted_sum(wide, weights, -2), weights, -1)


def weighted_sum(picture: torch.Tensor, weights: list[float], dim: int) -> torch.Tensor:
    """The picture under a kernel along one axis, shorter by all weights but one.

    Sums of shifted pictures take a tenth of the time of a convolution with so few channels.
    """
    length = picture.shape[dim] - len(weights) + 1
    total = weights[0] * picture.narrow(dim, 0, length)
    for place, weight in enumerate(weights[1:], 1):
        total = total.add(picture.narrow(dim, place, length), alpha=weight)
    return total


def gaussian_weights(variance: float) -> list[float]:
    """Weights at whole pixels, an odd number of them, whose sum is 1 and whose variance is exact.

    Plain numbers, so that a graph that is traced holds them as constants.
    """
    half_width = max(2, math.ceil(4 * math.sqrt(variance)))
    places = range(-half_width, half_width + 1)
    heights = [math.exp(-(place**2) / (2 * variance)) for place in places]
    # Sampling and cutting change the variance a little; so much comes from the middle, or goes.
    spread = math.fsum(height * place**2 for height, place in zip(heights, places, strict=True))
    weights = [height * variance / spread for height in heights]
    weights[half_width] += 1 - math.fsum(weights)
    return weights

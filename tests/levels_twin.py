"""What levels of defocus bring to a picture, pixel by pixel: for tests of renderers of levels."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

import torch

from bokehdiff.rendering import Aperture

OWN_LIGHT = 1e-4


def crossing_case(batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Light (B, 3, 9, 11) and defocus of surfaces on both sides of the focus, with a jump."""
    generator = torch.Generator().manual_seed(0)
    light = torch.rand(batch, 3, 9, 11, generator=generator, dtype=torch.float64)
    light[..., 2, 3] = 30.0
    x, y = torch.arange(11.0).double(), torch.arange(9.0).double()[:, None]
    defocus = (0.37 * x - 0.11 * y - 2.9).expand(batch, 1, 9, 11).clone()
    defocus[..., 3:7, 2:6] = 4.6
    return light, defocus


def scattered(
    light: torch.Tensor, defocus: torch.Tensor, levels: Sequence[float], aperture: Aperture
) -> torch.Tensor:
    """(levels, C + 1, H, W) light and coverage of a picture (C, H, W) with defocus (H, W).

    Every pixel, and its repetitions beyond the frame, spreads over the circles of the two levels
    around it, whose shares have the mean r^2 of its own.
    """
    channels, height, width = light.shape
    kernels = [aperture.kernel(level, dtype=torch.float64) for level in levels]
    far = max(len(kernel) // 2 for kernel in kernels)
    canvas = light.new_zeros(len(levels), channels + 1, height + 4 * far, width + 4 * far)
    for y in range(-far, height + far):
        for x in range(-far, width + far):
            row, column = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
            signed = defocus[row, column]
            value = torch.cat([light[:, row, column], light.new_ones(1)])[:, None, None]
            upper = min(max(bisect.bisect(levels, float(signed.detach())), 1), len(levels) - 1)
            low, high = levels[upper - 1], levels[upper]
            share = (signed.square() - low**2) / (high**2 - low**2)
            for number, weight in ((upper - 1, 1 - share), (upper, share)):
                reach = len(kernels[number]) // 2
                top, left = y + 2 * far - reach, x + 2 * far - reach
                rows, columns = slice(top, top + 2 * reach + 1), slice(left, left + 2 * reach + 1)
                canvas[number, :, rows, columns] += weight * value * kernels[number]
    return canvas[..., 2 * far : 2 * far + height, 2 * far : 2 * far + width]


def divided(sums: torch.Tensor, light: torch.Tensor) -> torch.Tensor:
    """(C, H, W) light from sums (C + 1, H, W) of light and coverage, and a little of its own."""
    return (sums[:-1] + OWN_LIGHT * light) / (sums[-1:] + OWN_LIGHT)


def bins_around(values: torch.Tensor, bin_px: float) -> list[float]:
    """Multiples of ``bin_px`` from below the smallest to above the largest value."""
    first = math.floor(float(values.detach().min()) / bin_px)
    last = math.ceil(float(values.detach().max()) / bin_px)
    return [number * bin_px for number in range(first, max(last, first + 1) + 1)]

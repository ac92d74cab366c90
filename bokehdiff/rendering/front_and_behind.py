"""What lies in front of the plane in focus, and what lies behind it, each blurred on its own.

A renderer that blurs the picture as a whole lets the colours of a sharp thing run into the blurred
background around it, and ends the blur of a near thing at its outline. These two pictures hold what
such a renderer lacks there: the background without what stands before it, and the foreground with
the light that it throws beyond its outline.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from bokehdiff.rendering.circle_reach import reaching_radius
from bokehdiff.rendering.gaussian_pyramid import blend_levels

__all__ = ["FrontAndBehind", "front_and_behind"]

CELL = 2
"""Pixels per side of the cells on which it is computed: these pictures are smooth."""

NO_COVERAGE = 0.05
"""Where so little of a side is seen, its colour is half that of the picture given."""


class FrontAndBehind(NamedTuple):
    """Linear light (B, C, H, W) of both sides, and their coverage (B, 1, H, W) in [0, 1]."""

    front: torch.Tensor
    front_coverage: torch.Tensor
    behind: torch.Tensor
    behind_coverage: torch.Tensor


def front_and_behind(
    light: torch.Tensor, signed_defocus: torch.Tensor, blurred: torch.Tensor, *, levels: int
) -> FrontAndBehind:
    """Both sides of the plane in focus, blurred as :func:`gaussian_pyramid_blur` blurs, on cells of
    2 x 2 pixels.

    A pixel belongs to a side in proportion to its defocus, up to 1 pixel. Where a side is not seen,
    it is blurred with the largest of its circles that come there, and where it is hardly seen even
    then, it takes the colour of ``blurred``.

    Args:
        light: (B, C, H, W) linear light, not blurred; sides are multiples of 4.
        signed_defocus: (B, 1, H, W) pixels, positive in front.
        blurred: (B, C, H, W) the picture blurred as a whole.
        levels: as of :func:`gaussian_pyramid_blur`.
    """
    with torch.autocast(light.device.type, enabled=False):
        around = F.avg_pool2d(blurred, CELL)
        sides = []
        for towards_lens in (1, -1):
            radius = (towards_lens * signed_defocus).clamp_min(0)
            belongs = radius.clamp(max=1)
            seen = F.avg_pool2d(torch.cat([light * belongs, belongs, radius], 1), CELL)
            colour, coverage, own_radius = seen.split([light.shape[1], 1, 1], 1)
            # The mean of radius and not of radius x belongs: that of a pixel in focus is 0 anyway.
            own_radius = own_radius / coverage.clamp_min(1e-3)
            reaching = F.interpolate(
                reaching_radius(radius, levels, 2 * CELL),
                scale_factor=2.0,
                mode="bilinear",
                align_corners=False,
            )
            in_cells = torch.lerp(reaching, own_radius, coverage) / CELL
            spread = blend_levels(torch.cat([colour, coverage], 1), in_cells, max(levels - 1, 1))
            colour, coverage = spread.split([light.shape[1], 1], 1)
            colour = (colour + NO_COVERAGE * around) / (coverage + NO_COVERAGE)
            sides += [_as_pixels(colour), _as_pixels(coverage)]
        return FrontAndBehind(*sides)


def _as_pixels(cells: torch.Tensor) -> torch.Tensor:
    return F.interpolate(cells, scale_factor=float(CELL), mode="bilinear", align_corners=False)

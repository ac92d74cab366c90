"""Clipped highlights: how much light the lamps of an 8-bit photograph may have had.

A camera cuts off what is brighter than white. Blurred as it stands, a lamp fades into its
surroundings; the lens would have shown a bright disc. What was cut off is lost, so this is a guess,
and a careful one: it finds small lamps and glints, and leaves skies, walls, paper and snow alone.
Lamps before a bright wall, and those of a saturated colour such as red tail lights, it misses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bokehdiff.images import srgb_to_linear

__all__ = ["HighlightBoost", "recover_highlights"]

# Half the side of the neighbourhood that is looked at, as a share of the picture's longer side.
NEIGHBOURHOOD = 0.02
SMALLEST_REACH_PX = 2
# A lamp fills less than this share of its neighbourhood; the boost falls to zero there.
LARGEST_AREA = 0.5
# Display-encoded brightness from which a pixel begins to count as bright, and counts in full:
# around half the light of white.
BRIGHT = (0.7, 0.8)
# Share of the bright pixels around that are clipped: no lamp up to the first, surely one from the
# second. A lamp is so bright that there is nothing between it and its dark surroundings; a white
# surface that clips here and there is bright all around.
CLIPPED_OF_BRIGHT = (0.5, 0.75)


@dataclass(frozen=True)
class HighlightBoost:
    """How clipped highlights are given back their light before blurring.

    ``threshold``: display-encoded level, in (0, 1), from which a pixel begins to count as clipped;
    it counts in full halfway to 1. The default spares white paint and paper of an evenly lit scene.
    Lower it to 0.95 for JPEG, whose compression pulls clipped pixels below white, and further for
    photographs with a faded tone curve. ``gain``: how many times as bright as shown a lamp is taken
    to be, at least 1 (1 changes nothing); the default is the best single number on a ray-traced
    benchmark whose lamps are 15 to 120 times as bright as white.
    """

    threshold: float = 0.985
    gain: float = 24.0

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(
                f"threshold is {self.threshold!r}; wanted the display-encoded level from which a "
                "pixel counts as clipped, between 0 and 1, for instance 0.985."
            )
        if not 1 <= self.gain < math.inf:
            raise ValueError(
                f"gain is {self.gain!r}; wanted how many times as bright as shown a clipped lamp "
                "is, 1 or more, for instance 24."
            )


def recover_highlights(photo: torch.Tensor, boost: HighlightBoost) -> torch.Tensor:
    """Returns linear light (B, 3, H, W), above 1 at lamps: ``srgb_to_linear(photo) * factor``.

    photo: (B, 3, H, W) display-encoded sRGB in [0, 1].

    The factor is 1 + (gain - 1) * clipped * small * lone, each of the three in [0, 1]:

    - *clipped*: the second-brightest channel, from ``threshold`` up to halfway to 1. What is much
      brighter than white clips at least two channels, a saturated colour only one.
    - *small*: falls with the share of clipped pixels in the neighbourhood, to zero where half of it
      is clipped, or half of that of a neighbour. The neighbourhood is a square that reaches 2 % of
      the longer side of the picture in every direction, so that the result hardly depends on the
      resolution.
    - *lone*: rises where clipped pixels make up more than half to three quarters of the bright
      pixels of the neighbourhood.

    A lamp keeps the colour it was left with. Differentiable in ``photo``.
    """
    if photo.dim() != 4 or photo.shape[1] != 3:
        raise ValueError(f"photo has shape {tuple(photo.shape)}; wanted (B, 3, H, W).")
    clipped, bright = clipped_and_bright(photo, boost.threshold)
    lamps = clipped * lamp_surroundings(clipped, bright, neighbourhood(*photo.shape[-2:]))
    return srgb_to_linear(photo) * (1 + (boost.gain - 1) * lamps)


def clipped_and_bright(photo: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """How much each pixel (B, 1, H, W) of a photo counts as clipped, and as bright, from 0 to 1."""
    red, green, blue = photo.split(1, dim=1)
    brightness = torch.maximum(
        torch.minimum(red, green), torch.minimum(torch.maximum(red, green), blue)
    )
    clipped = _ramp(brightness, threshold, (1 + threshold) / 2)
    return clipped, torch.maximum(_ramp(brightness, *BRIGHT), clipped)


def neighbourhood(height: int, width: int) -> int:
    """Pixels that the neighbourhood of a pixel reaches in every direction."""
    return max(SMALLEST_REACH_PX, round(NEIGHBOURHOOD * max(height, width)))


def lamp_surroundings(clipped: torch.Tensor, bright: torch.Tensor, reach: int) -> torch.Tensor:
    """(B, 1, H, W) the factors *small* times *lone* of :func:`recover_highlights`.

    clipped, bright: as of :func:`clipped_and_bright`, per pixel or as means over cells; reach: of
    the neighbourhood, in the same unit.
    """
    clipped_share = _mean_around(clipped, reach)
    bright_share = _mean_around(bright, reach)
    # At a corner of a white wall only a quarter is clipped, but not far from it everything.
    small = (1 - _largest_around(clipped_share, reach) / LARGEST_AREA).clamp(0, 1)
    return small * _ramp(clipped_share / bright_share.clamp_min(1e-12), *CLIPPED_OF_BRIGHT)


def _ramp(values: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """0 up to ``low``, 1 from ``high``, straight in between."""
    return ((values - low) / (high - low)).clamp(0, 1)


def _mean_around(values: torch.Tensor, reach: int) -> torch.Tensor:
    """Mean over the square of side 2 reach + 1 around each pixel, as far as it is in the frame."""
    # Running sums keep the cost independent of the reach; Apple GPUs have no float64.
    sums = values.to(torch.float32 if values.device.type == "mps" else torch.float64)
    for axis, padding in ((-1, (reach + 1, reach)), (-2, (0, 0, reach + 1, reach))):
        length = values.shape[axis]
        total = F.pad(sums, padding).cumsum(axis)
        total = total.narrow(axis, 2 * reach + 1, length) - total.narrow(axis, 0, length)
        position = torch.arange(length, device=values.device)
        first, last = (position - reach).clamp_min(0), (position + reach).clamp_max(length - 1)
        count = last - first + 1
        sums = total / (count[:, None] if axis == -2 else count)
    return sums.to(values.dtype)


def _largest_around(values: torch.Tensor, reach: int) -> torch.Tensor:
    """Largest value of the square of side 2 reach + 1 around each pixel."""
    side = 2 * reach + 1
    along_rows = F.max_pool2d(values, (1, side), stride=1, padding=(0, reach))
    return F.max_pool2d(along_rows, (side, 1), stride=1, padding=(reach, 0))

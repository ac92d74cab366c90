"""The block of the convolutional BokehFlow: two wide depthwise convolutions and a gate."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from .convolutional_unet import start_at_zero

__all__ = ["GROUPS", "FilmScaleAndShift", "GatedConvolutionBlock", "modulated"]

GROUPS = 8
"""Of every group normalisation of BokehFlow."""

KERNEL_SIDE = 7
EXPANSION = 3

FilmScaleAndShift = tuple[torch.Tensor, torch.Tensor]
"""Two tensors (B, C, 1, 1) that a camera makes of itself for one block."""


def modulated(features: torch.Tensor, film: FilmScaleAndShift | None) -> torch.Tensor:
    """``features * (1 + scale) + shift`` of features (B, C, H, W); without film, the features."""
    return features if film is None else features * (1 + film[0]) + film[1]


class GatedConvolutionBlock(nn.Module):
    """Mixes tokens over 13 x 13 of them, gated by what stands there.

    ``y = FiLM(norm(x)); x <- x + P(conv(SiLU(conv(y)))) sigmoid(G(y)); x <- x + feed_forward(x)``,
    with depthwise convolutions of side 7. Untrained it changes nothing.

    Args:
        channels: of the tokens, a multiple of 8.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mixing_norm = nn.GroupNorm(GROUPS, channels)
        self.first_mixing, self.second_mixing = (
            nn.Conv2d(channels, channels, KERNEL_SIDE, padding=KERNEL_SIDE // 2, groups=channels)
            for _ in range(2)
        )
        self.mixing_projection = start_at_zero(nn.Conv2d(channels, channels, 1))
        self.gate = nn.Conv2d(channels, channels, 1)
        self.feed_forward_norm = nn.GroupNorm(GROUPS, channels)
        self.expand = nn.Conv2d(channels, EXPANSION * channels, 1)
        self.contract = start_at_zero(nn.Conv2d(EXPANSION * channels, channels, 1))

    def forward(self, x: torch.Tensor, film: FilmScaleAndShift | None = None) -> torch.Tensor:
        """Tokens (B, C, H, W) from tokens; ``film`` is what the camera says to this block."""
        y = modulated(self.mixing_norm(x), film)
        mixed = self.second_mixing(F.silu(self.first_mixing(y)))
        x = x + self.mixing_projection(mixed) * torch.sigmoid(self.gate(y))
        return x + self.contract(F.silu(self.expand(self.feed_forward_norm(x))))

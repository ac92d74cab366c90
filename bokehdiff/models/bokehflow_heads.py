"""The ends of BokehFlow at full resolution, and what its tokens see of the radii."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from .convolutional_unet import start_at_zero
from .gated_convolution import GROUPS

__all__ = [
    "PIXELS_PER_TOKEN",
    "BokehHead",
    "DepthHead",
    "as_pixels",
    "radius_scale",
    "radius_tokens",
]

PIXELS_PER_TOKEN = 4


class DepthHead(nn.Module):
    """One number per pixel from tokens: (B, C, H, W) to (B, 1, 4 H, 4 W)."""

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, head_channels, 3, padding=1)
        self.norm = nn.GroupNorm(GROUPS, head_channels)
        self.answer = nn.Conv2d(head_channels, 1, 3, padding=1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.answer(as_pixels(F.silu(self.norm(self.reduce(tokens)))))


class BokehHead(nn.Module):
    """Shares (B, 3, H, W) of the pictures that correct the rendering: of the photo, and of what is
    in front of the plane in focus and behind it. Untrained 0.

    Seen are tokens (B, C, H/4, W/4) and, of each pixel (B, 9, H, W), the photo, the rendering,
    :func:`radius_scale`, and how much of both sides comes there.
    """

    PIXEL_CHANNELS = 3 + 3 + 1 + 2

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, head_channels, 3, padding=1)
        self.norm = nn.GroupNorm(GROUPS, head_channels)
        self.refine = nn.Conv2d(head_channels + self.PIXEL_CHANNELS, head_channels, 3, padding=1)
        self.answer = start_at_zero(nn.Conv2d(head_channels, 3, 3, padding=1))

    def forward(self, tokens: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        features = as_pixels(F.silu(self.norm(self.reduce(tokens))))
        return self.answer(F.silu(self.refine(torch.cat([features, pixels.to(features)], 1))))


def as_pixels(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens on the grid of pixels, bilinear."""
    return F.interpolate(
        tokens, scale_factor=float(PIXELS_PER_TOKEN), mode="bilinear", align_corners=False
    )


def radius_scale(radius: torch.Tensor, largest_radius: torch.Tensor) -> torch.Tensor:
    """``sign(r) log(1 + |r|) / log(1 + r_max)`` of signed radii in pixels, in [-1, 1]: 1 pixel next
    to 0 has to be seen as well as 40 next to 20."""
    return radius.sign() * torch.log1p(radius.abs()) / torch.log1p(largest_radius)


def radius_tokens(radius: torch.Tensor) -> torch.Tensor:
    """(B, 32, H/4, W/4) of signed radii (B, 1, H, W): of each of the 16 pixels the side on which
    the focus lies, up to 2 pixels, and the logarithm of the radius."""
    side = (radius / 2).clamp(-1, 1)
    size = torch.log1p(radius.abs()) / 4
    return F.pixel_unshuffle(torch.cat([side, side * size], 1), PIXELS_PER_TOKEN)

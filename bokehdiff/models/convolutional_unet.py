"""A plain convolutional U-Net that starts by changing nothing, and works in windows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..windows import Window, in_windows, windows_of

__all__ = ["ConvolutionBlock", "ConvolutionalUNet", "start_at_zero"]

Layer = TypeVar("Layer", bound=nn.Module)


def start_at_zero(layer: Layer) -> Layer:
    """The layer, its output zero until it is trained."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ConvolutionBlock(nn.Module):
    """Two 3x3 convolutions around a residual connection; the second starts at zero, so the block
    starts as identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        start_at_zero(self.conv2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.conv2(F.silu(self.conv1(F.silu(hidden))))


class ConvolutionalUNet(nn.Module):
    """Plain U-Net: one entry of ``channels`` per resolution, ``blocks`` residual blocks on the way
    down and up."""

    def __init__(self, in_channels: int, out_channels: int, channels: tuple[int, ...], blocks: int):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down = nn.ModuleList(
            nn.Sequential(*(ConvolutionBlock(width) for _ in range(blocks))) for width in channels
        )
        self.up = nn.ModuleList(
            nn.Sequential(*(ConvolutionBlock(width) for _ in range(blocks)))
            for width in channels[:-1]
        )
        pairs = list(zip(channels[:-1], channels[1:], strict=True))
        self.downsamplers = nn.ModuleList(nn.Conv2d(4 * fine, coarse, 1) for fine, coarse in pairs)
        self.upsamplers = nn.ModuleList(nn.Conv2d(coarse, 4 * fine, 1) for fine, coarse in pairs)
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)
        start_at_zero(self.conv_out)
        self.reach = 2 * blocks  # pixels of their resolution that the blocks look around

    def forward(
        self,
        evidence: Callable[[Window], torch.Tensor],
        result: Callable[[Window, torch.Tensor], torch.Tensor],
        size: tuple[int, int],
        side: int | None = None,
    ) -> torch.Tensor:
        """What ``result`` makes of the network's output, (B, C, height, width).

        Each resolution is done in windows of its own before the next, so that no margin is wider
        than the reach of its few convolutions.

        Args:
            evidence: the input (B, in_channels, rows, columns) of a window.
            result: of a window and the output (B, out_channels, rows, columns) there.
            size: height and width of the input, multiples of 2 to the number of halvings.
            side: pixels per side of the windows at each resolution; without it, all at once.
        """
        windows = [
            windows_of(size[0] >> level, size[1] >> level, side) for level in range(len(self.down))
        ]

        def down(level: int, finer: torch.Tensor, outer: Window) -> torch.Tensor:
            hidden = F.pixel_unshuffle(outer.scaled(2).crop(finer), 2)
            return self.down[level](self.downsamplers[level - 1](hidden))

        def up(level: int, coarser: torch.Tensor, outer: Window) -> torch.Tensor:
            hidden = F.pixel_shuffle(self.upsamplers[level](outer.crop(coarser, 2)), 2)
            return self.up[level](outer.crop(skips[level]) + hidden)

        hidden = in_windows(
            lambda outer: self.down[0](self.conv_in(evidence(outer))), windows[0], self.reach + 1
        )
        skips = []
        for level in range(1, len(self.down)):
            skips.append(hidden)
            step = functools.partial(down, level, hidden)
            hidden = in_windows(step, windows[level], self.reach)
        for level in reversed(range(1, len(self.up))):
            hidden = in_windows(functools.partial(up, level, hidden), windows[level], self.reach)
            skips.pop()

        def output(window: Window) -> torch.Tensor:
            outer = window.grown(self.reach + 2)  # even, as the coarser pixels are two wide
            finest = up(0, hidden, outer) if skips else outer.crop(hidden)
            return result(window, window.crop(self.conv_out(F.silu(finest)), origin=outer))

        return in_windows(output, windows[0])

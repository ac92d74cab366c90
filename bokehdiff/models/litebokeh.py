"""LiteBokeh: lens blur on phones, from the photo alone, by plain convolutions.

There are two networks. :class:`TinyUnet` is for real time: it goes down to an eighth of the
resolution, through a few residual blocks, and up again. :class:`GlassEncNet` is for quality: two
hourglasses, of which the second sees what the first has made. Behind both comes an
:class:`EnhancementBlock`, trained by itself, which makes the picture clearer.

Neither sees depth or a lens: what is in focus, and how much the rest is blurred, is that of the
photographs a network was trained with. Blur has their size in pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput

from .convolutional_unet import start_at_zero

__all__ = ["VARIANTS", "EnhancementBlock", "GlassEncNet", "LiteBokehOutput", "TinyUnet"]

SMALLEST_SIDE = 16
PIXELS_PER_CELL = 8
"""Sides are padded to multiples of this: the coarsest cells of :class:`TinyUnet`."""

VARIANTS: dict[str, tuple[int, int, int]] = {
    "pico": (8, 16, 32),
    "nano": (12, 24, 48),
    "tiny": (16, 32, 64),
    "wide": (24, 48, 96),
    "large": (32, 64, 128),
}
"""Sizes of :class:`TinyUnet` by name: channels at a half, a quarter and an eighth."""

NORMS = ("batch", "instance", "shift", "none")
SKIPS = ("add", "none")
OUTPUTS = ("paint", "blend")
UP_KERNELS = (3, 4)


@dataclass
class LiteBokehOutput(BaseOutput):
    """What a network makes of B photos.

    Args:
        bokeh: (B, 3, H, W) with lens blur, display-encoded sRGB in [0, 1].
        rendered: (B, 3, H, W) the same before the enhancement.
        first_rendered: (B, 3, H, W) what the first hourglass of a :class:`GlassEncNet` makes; None
            of a :class:`TinyUnet`.
    """

    bokeh: torch.Tensor
    rendered: torch.Tensor
    first_rendered: torch.Tensor | None = None


class EnhancementBlock(nn.Module):
    """``clamp(y + Conv3x3(ReLU(Conv3x3(y))), 0, 1)``: a picture made clearer.

    Untrained it changes nothing. No ReLU comes last, or the correction could only brighten.

    Args:
        width: channels between the convolutions.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.widen = nn.Conv2d(3, width, 3, padding=1)
        self.correct = start_at_zero(nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1]."""
        return (picture + self.correct(F.relu(self.widen(picture)))).clamp(0, 1)


class _LiteBokehModel(ModelMixin, ConfigMixin):
    """What both networks have in common: padding, the enhancement, the output."""

    enhancement: EnhancementBlock

    def render(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``rendered`` and ``first_rendered`` of padded photos."""
        raise NotImplementedError

    def forward(
        self, image: torch.Tensor, enhance: bool = True, return_dict: bool = True
    ) -> LiteBokehOutput | tuple[torch.Tensor, ...]:
        """Photos with lens blur.

        Args:
            image: (B, 3, H, W) display-encoded sRGB in [0, 1], all in focus. Sides that are no
                multiples of 8 are continued by reflection, and the result is cut back.
            enhance: go through the enhancement block.
            return_dict: a :class:`LiteBokehOutput`, or a tuple of what it holds.

        Raises:
            ValueError: another shape, or sides of less than 16 pixels.
        """
        if image.ndim != 4 or image.shape[1] != 3 or min(image.shape[-2:]) < SMALLEST_SIDE:
            raise ValueError(
                f"image has the shape {tuple(image.shape)}; wanted (B, 3, H, W) with sides of at "
                f"least {SMALLEST_SIDE} pixels."
            )
        height, width = image.shape[-2:]
        # Written so that graphs of free sizes are traced fast.
        below, right = (
            (side + PIXELS_PER_CELL - 1) // PIXELS_PER_CELL * PIXELS_PER_CELL - side
            for side in (height, width)
        )
        rendered, first = self.render(F.pad(image, (0, right, 0, below), mode="reflect"))
        bokeh = self.enhancement(rendered) if enhance else rendered
        pictures = [
            None if picture is None else picture[..., :height, :width]
            for picture in (bokeh, rendered, first)
        ]
        output = LiteBokehOutput(*pictures)
        return output if return_dict else output.to_tuple()


class TinyUnet(_LiteBokehModel):
    """Lens blur in real time: 0.37 million parameters, 8.6 thousand multiplications per pixel.

    Three convolutions of stride 2, residual blocks at an eighth of the resolution, three transposed
    convolutions of stride 2, all with ReLU, a last convolution with a sigmoid, the enhancement.
    Each residual block is ``x + ReLU(Conv(Norm(ReLU(Conv(x)))))``.

    Args:
        channels: at a half, a quarter and an eighth of the resolution; ``VARIANTS`` has names.
        residual_blocks: their number.
        norm: ``"batch"``: what a pixel becomes depends on its surroundings alone, so tiles are
            exact; ``"instance"``: on the whole photo; ``"shift"``, one number for each channel:
            what :meth:`fused` leaves of a batch norm; ``"none"``.
        skip: ``"add"``: features on the way down are added on the way up; ``"none"``.
        up_kernel: pixels a side of the transposed convolutions: 4, which every output pixel sees
            an equal number of, or 3.
        output: ``"paint"``: the last convolution paints the picture; ``"blend"``: another one says
            which share of each pixel is the photo as it is, and only the rest is painted. So what
            is in focus keeps its detail, for 145 parameters and 1.7 % more multiplications.
        enhancement_width: channels of the enhancement block.

    Raises:
        ValueError: an argument that cannot be meant.
    """

    @register_to_config
    def __init__(
        self,
        channels: Sequence[int] = VARIANTS["tiny"],
        residual_blocks: int = 4,
        norm: str = "batch",
        skip: str = "add",
        up_kernel: int = 4,
        output: str = "paint",
        enhancement_width: int = 16,
    ) -> None:
        super().__init__()
        if len(channels) != 3 or min(channels) < 1:
            raise ValueError(
                f"channels is {channels!r}; wanted three numbers, for instance {VARIANTS['tiny']}."
            )
        for name, value, known in (
            ("norm", norm, NORMS),
            ("skip", skip, SKIPS),
            ("up_kernel", up_kernel, UP_KERNELS),
            ("output", output, OUTPUTS),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; wanted one of {known}.")
        half, quarter, eighth = channels
        self.down = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1)
            for before, after in ((3, half), (half, quarter), (quarter, eighth))
        )
        self.blocks = nn.ModuleList(TinyResidualBlock(eighth, norm) for _ in range(residual_blocks))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(
                before, after, up_kernel, stride=2, padding=1, output_padding=up_kernel % 2
            )
            for before, after in ((eighth, quarter), (quarter, half), (half, half))
        )
        self.out = nn.Conv2d(half, 3, 3, padding=1)
        # Apart from the convolution above: phones would have to cut its result in two.
        self.share = nn.Conv2d(half, 1, 3, padding=1) if output == "blend" else None
        self.enhancement = EnhancementBlock(enhancement_width)

    @classmethod
    def from_variant(cls, name: str, **overrides: Any) -> TinyUnet:
        """A network of random weights, from torch's global generator.

        Args:
            name: one of ``VARIANTS``.
            overrides: further arguments of the class.

        Raises:
            ValueError: no such size.
        """
        if name not in VARIANTS:
            raise ValueError(f"There is no size {name!r} of TinyUnet; wanted one of {[*VARIANTS]}.")
        return cls(**{"channels": VARIANTS[name], **overrides})

    @property
    def tile_overlap(self) -> int | None:
        """Pixels of surroundings that decide what a pixel becomes, on each side; None: all."""
        if self.config.norm == "instance":
            return None
        # Convolutions on the way down reach 1, 2 and 4 pixels, those of a block 8 each, transposed
        # ones 8, 4 and 2 at most, the last one and those of the enhancement 1.
        return (1 + 2 + 4) + 16 * self.config.residual_blocks + (8 + 4 + 2) + 3

    def render(self, image: torch.Tensor) -> tuple[torch.Tensor, None]:
        passed = []
        features = image
        for convolution in self.down:
            features = F.relu(convolution(features))
            passed.append(features)
        for block in self.blocks:
            features = block(features)
        # The coarsest features have gone through the blocks; the finer ones come back here.
        for convolution, finer in zip(self.up, (*passed[-2::-1], None), strict=True):
            features = F.relu(convolution(features))
            if finer is not None and self.config.skip == "add":
                features = features + finer
        painted = torch.sigmoid(self.out(features))
        if self.share is None:
            return painted, None
        return painted + torch.sigmoid(self.share(features)) * (image - painted), None

    def fused(self) -> TinyUnet:
        """A copy for inference in which the convolutions do what the batch norms did.

        A batch norm in eval mode is ``s x + t`` with ``x = ReLU(c)``. Its scale goes into the
        convolution before, ``|s| ReLU(c) = ReLU(|s| c)``, and the sign of s into the convolution
        after. One addition is left: moved into the convolution after, t would be missing beyond the
        border, where that one sees zeros.

        Returns:
            In eval mode, with ``norm="shift"``; with any other norm a plain copy.
        """
        if self.config.norm != "batch":
            return copy.deepcopy(self).eval()
        options = {name: one for name, one in self.config.items() if not name.startswith("_")}
        result = TinyUnet(**{**options, "norm": "shift"})
        state = {
            name: value
            for name, value in self.state_dict().items()
            if not (name.startswith("blocks.") and ".norm." in name)
        }
        for number, block in enumerate(self.blocks):
            assert isinstance(block, TinyResidualBlock)
            state |= {f"blocks.{number}.{name}": one for name, one in block.fused().items()}
        result.load_state_dict(
            {name: value.detach().clone() for name, value in state.items()}, assign=True
        )
        return result.eval()


class TinyResidualBlock(nn.Module):
    """``x + ReLU(Conv(Norm(ReLU(Conv(x)))))``, convolutions of 3 x 3."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = _norm(norm, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + F.relu(self.second(self.norm(F.relu(self.first(features)))))

    def fused(self) -> dict[str, torch.Tensor]:
        """What a batch norm leaves to the convolutions around it, by name; see
        :meth:`TinyUnet.fused`."""
        norm = self.norm
        assert isinstance(norm, nn.BatchNorm2d) and self.first.bias is not None
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - scale * norm.running_mean
        sign = torch.where(scale < 0, -1.0, 1.0).to(scale)
        return {
            "first.weight": self.first.weight * scale.abs().view(-1, 1, 1, 1),
            "first.bias": self.first.bias * scale.abs(),
            "norm.shift": (sign * shift).view(1, -1, 1, 1),
            "second.weight": self.second.weight * sign.view(1, -1, 1, 1),
        }


class GlassEncNet(_LiteBokehModel):
    """Lens blur for quality: two hourglasses in a row and the enhancement.

    ``y1 = hourglass(x)``, ``y2 = hourglass(x, y1)``; the result is the enhancement of y2. What a
    pixel becomes depends on the whole photo, through the instance norms.

    Args:
        channels: at full resolution; twice and four times as many at a half and a quarter.
        residual_blocks: of each hourglass.
        enhancement_width: channels of the enhancement block.
    """

    tile_overlap: int | None = None

    @register_to_config
    def __init__(
        self, channels: int = 32, residual_blocks: int = 9, enhancement_width: int = 16
    ) -> None:
        super().__init__()
        self.first = Hourglass(3, channels, residual_blocks)
        self.second = Hourglass(6, channels, residual_blocks)
        self.enhancement = EnhancementBlock(enhancement_width)

    def render(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = self.first(image)
        return self.second(torch.cat([image, first], dim=1)), first

    def fused(self) -> GlassEncNet:
        """A copy for inference, in eval mode; instance norms cannot be folded."""
        return copy.deepcopy(self).eval()


class Hourglass(nn.Module):
    """Down to a quarter of the resolution, through residual blocks, and up again.

    Every convolution but the last is followed by an instance norm and a ReLU; features on the way
    down are added on the way up; a sigmoid comes last.
    """

    def __init__(self, inputs: int, channels: int, residual_blocks: int) -> None:
        super().__init__()
        sizes = (channels, 2 * channels, 4 * channels)
        self.into = _with_norm(nn.Conv2d(inputs, channels, 7, padding=3))
        self.down = nn.ModuleList(
            _with_norm(nn.Conv2d(before, after, 3, stride=2, padding=1))
            for before, after in zip(sizes, sizes[1:], strict=False)
        )
        self.blocks = nn.ModuleList(GlassResidualBlock(sizes[-1]) for _ in range(residual_blocks))
        self.up = nn.ModuleList(
            _with_norm(nn.ConvTranspose2d(before, after, 4, stride=2, padding=1))
            for before, after in zip(sizes[::-1], sizes[-2::-1], strict=False)
        )
        self.out = nn.Conv2d(channels, 3, 7, padding=3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1]."""
        features = self.into(image)
        passed = []
        for step in self.down:
            passed.append(features)
            features = step(features)
        for block in self.blocks:
            features = block(features)
        for step, finer in zip(self.up, passed[::-1], strict=True):
            features = step(features) + finer
        return torch.sigmoid(self.out(features))


class GlassResidualBlock(nn.Module):
    """``x + Norm(Conv(ReLU(Norm(Conv(x)))))``, convolutions of 3 x 3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _with_norm(nn.Conv2d(channels, channels, 3, padding=1))
        self.second = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), InstanceNorm(channels)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + self.second(self.first(features))


class InstanceNorm(nn.Module):
    """Each channel of each picture to mean 0 and variance 1, then scaled and shifted.

    The same as ``torch.nn.InstanceNorm2d(affine=True)``, in operations that the runtimes of phones
    have: theirs need no change of layout for it.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.eps = eps

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        centred = features - features.mean((2, 3), keepdim=True)
        variance = (centred * centred).mean((2, 3), keepdim=True)
        return centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias


class ChannelShift(nn.Module):
    """One number added to each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + self.shift


def _norm(kind: str, channels: int) -> nn.Module:
    """One of ``NORMS``."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "instance":
        return InstanceNorm(channels)
    return ChannelShift(channels) if kind == "shift" else nn.Identity()


def _with_norm(convolution: nn.Conv2d | nn.ConvTranspose2d) -> nn.Sequential:
    return nn.Sequential(convolution, InstanceNorm(convolution.out_channels), nn.ReLU())

"""What BokehFlow remembers of a film from one frame to the next, and how much it trusts it.

A noisy film flickers if every frame is judged anew. So features are carried: where the picture
stands still, a token keeps most of what it was, ``z_t = z_(t-1) rho + y_t (1 - rho)``. Where
something moves, ``rho`` falls to 0, and the frame speaks for itself. What is carried has the size
of a few frames, however long the film is.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from .bokehflow_heads import PIXELS_PER_TOKEN
from .convolutional_unet import start_at_zero

__all__ = ["BokehFlowState", "FeatureCarry", "Stillness", "as_cells", "carried", "remembered"]

NEIGHBOURHOOD = 5
"""Tokens per side over which a change of the picture is averaged."""

CUT = 3.0
"""A scene is cut where the picture changes by this many times the tolerance, on average."""

INITIAL_TOLERANCE = 0.05
"""Of display-encoded values averaged over 2 x 2 pixels: over twice the change that noise with a
standard deviation of 0.05 makes against a picture that is carried itself."""

INITIAL_OPENNESS = 4.0

PIXELS_PER_CELL = 2
"""Of the picture that is remembered: noise weighs less in it, motion does not."""


@dataclass
class BokehFlowState:
    """What one frame leaves to the next; what a model does not carry is None.

    Args:
        picture: (B, 3, H/2, W/2) what the film looks like, carried as the features are, see
            :func:`remembered`: so that slow changes add up until they are noticed.
        depth_features, bokeh_features: (B, C, H/4, W/4) ends of the two streams.
        bokeh: (B, 3, H, W) the frame with lens blur, padded.
        lens: (B, 5) the camera and the strength it was made with.
        memories: of the recurrent blocks, by stream and number; see
            :class:`~bokehdiff.models.bidirectional_recurrence.BidirectionalRecurrenceBlock`.
    """

    picture: torch.Tensor | None = None
    depth_features: torch.Tensor | None = None
    bokeh_features: torch.Tensor | None = None
    bokeh: torch.Tensor | None = None
    lens: torch.Tensor | None = None
    memories: dict[str, Any] = dataclasses.field(default_factory=dict)

    def _each(self, change: Any) -> BokehFlowState:
        def changed(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return change(value)
            if isinstance(value, dict):
                return {name: changed(one) for name, one in value.items()}
            if isinstance(value, tuple):
                parts = [changed(one) for one in value]
                return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
            return value

        return BokehFlowState(
            **{field.name: changed(getattr(self, field.name)) for field in dataclasses.fields(self)}
        )

    def detach(self) -> BokehFlowState:
        """The same without a graph behind it."""
        return self._each(torch.Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> BokehFlowState:
        """The same on a device or in a dtype, as ``Tensor.to`` has it."""
        return self._each(lambda tensor: tensor.to(*args, **kwargs))

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name, those of the memories too, for instance to be stored."""
        found = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                found[field.name] = value
        for name, memory in self.memories.items():
            for place, value in memory._asdict().items():
                if value is not None:
                    found[f"memories.{name}.{place}"] = value
        return found


class Stillness(nn.Module):
    """How much of the last frame may be kept, from how much the picture has changed.

    ``largest_carry exp(-(delta / tolerance)^4)``, delta the mean over the colours and over 5 x 5
    tokens of how much the pictures that are remembered differ. Features would not do: their norms
    see the whole picture, so that one moving thing would change them everywhere. After a cut it is
    0 everywhere.

    Args:
        largest_carry: rho of a picture that stands still; 0.85 leaves 0.28 of the spread of noise.
    """

    def __init__(self, largest_carry: float) -> None:
        super().__init__()
        self.largest_carry = largest_carry
        self.log_tolerance = nn.Parameter(torch.tensor(math.log(INITIAL_TOLERANCE)))

    def change(self, picture: torch.Tensor, last_picture: torch.Tensor) -> torch.Tensor:
        """(B, 1, H/4, W/4) delta over the tolerance, of what is remembered of two frames."""
        delta = (picture - last_picture).abs().mean(1, keepdim=True)
        delta = F.avg_pool2d(delta, PIXELS_PER_TOKEN // PIXELS_PER_CELL)
        delta = F.avg_pool2d(delta, NEIGHBOURHOOD, 1, NEIGHBOURHOOD // 2, count_include_pad=False)
        return delta / self.log_tolerance.exp()

    def forward(self, change: torch.Tensor) -> torch.Tensor:
        """(B, 1, H, W) in [0, largest_carry] from :meth:`change`."""
        cut = change.mean((1, 2, 3), keepdim=True) > CUT
        return self.largest_carry * torch.exp(-change.pow(4)) * (~cut)


class FeatureCarry(nn.Module):
    """Carries the tokens of one stream; a learned gate may close where it should not.

    ``rho = stillness * sigmoid(w [y_t, z_(t-1)] + b)``, per token; open at the start.

    Args:
        channels: of the tokens.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = start_at_zero(nn.Conv2d(2 * channels, 1, 1))
        assert self.gate.bias is not None
        nn.init.constant_(self.gate.bias, INITIAL_OPENNESS)

    def forward(
        self, features: torch.Tensor, last: torch.Tensor, stillness: torch.Tensor
    ) -> torch.Tensor:
        """Tokens (B, C, H, W) from those of this frame, those carried, and (B, 1, H, W)."""
        gate = torch.sigmoid(self.gate(torch.cat([features, last.to(features)], 1)))
        return carried(features, last, stillness * gate)


def remembered(photo: torch.Tensor) -> torch.Tensor:
    """(B, 3, H/2, W/2): the photo (B, 3, H, W) averaged over 2 x 2 pixels."""
    return F.avg_pool2d(photo, PIXELS_PER_CELL)


def as_cells(tokens: torch.Tensor) -> torch.Tensor:
    """Values of tokens (B, 1, H/4, W/4) on the grid of the remembered picture, unchanged."""
    return F.interpolate(tokens, scale_factor=float(PIXELS_PER_TOKEN // PIXELS_PER_CELL))


def carried(now: torch.Tensor, last: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """``now + share (last - now)``: exactly ``now`` where nothing has changed."""
    return now + share.to(now) * (last.to(now) - now)

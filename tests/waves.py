"""Pictures of which every blur is known exactly: sums of waves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["Waves"]


@dataclass(frozen=True)
class Waves:
    """Light ``0.5 + sum a cos(k . x + phase)``, float64. A disc of radius r multiplies each wave by
    ``2 J1(|k| r) / (|k| r)``.

    ``shortest``, ``longest``: periods in pixels. Different for each channel.
    """

    seed: int
    shortest: float = 4.0
    longest: float = 24.0
    number: int = 24
    contrast: float = 0.08

    def light(self, height: int, width: int, radius: float | torch.Tensor = 0.0) -> torch.Tensor:
        """(1, 3, height, width), within about [0.2, 0.8]; radius: one, or (height, width)."""
        random = torch.Generator().manual_seed(self.seed)

        def draw() -> torch.Tensor:
            return torch.rand(3, self.number, generator=random, dtype=torch.float64)

        period = self.shortest * (self.longest / self.shortest) ** draw()
        direction, phase = math.pi * draw(), 2 * math.pi * draw()
        k = 2 * math.pi / period
        y = torch.arange(height, dtype=torch.float64)[:, None]
        x = torch.arange(width, dtype=torch.float64)
        radius = torch.as_tensor(radius, dtype=torch.float64)
        light = torch.full((3, height, width), 0.5, dtype=torch.float64)
        for channel in range(3):
            for wave in range(self.number):
                number, angle = k[channel, wave], direction[channel, wave]
                along = number * (x * torch.cos(angle) + y * torch.sin(angle))
                argument = (number * radius).clamp_min(1e-9)
                passed = 2 * torch.special.bessel_j1(argument) / argument
                amplitude = self.contrast * math.sqrt(2 / self.number)
                light[channel] += amplitude * passed * torch.cos(along + phase[channel, wave])
        return light[None]

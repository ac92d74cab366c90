"""Judges of adversarial training that look at small patches, of two sizes."""

from __future__ import annotations

import torch
import torch.nn as nn

LEAK = 0.2


class PatchDiscriminators(nn.Module):
    """Two convolutional networks that judge patches of 70 and of 34 pixels a side.

    Convolutions of 4 x 4 pixels, of stride 2 as long as the channels double, then of stride 1;
    instance norms between them, and leaky ReLUs. Nothing is remembered from call to call.

    Args:
        channels: of the first convolutions. First weights come from torch's global generator.
    """

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.judges = nn.ModuleList(_judge(channels, halvings) for halvings in (3, 2))

    def forward(self, picture: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits (B, 1, h, w) of each judge, larger for what looks like a photograph.

        Args:
            picture: (B, 3, H, W) in [0, 1], sides of at least 32 pixels.
        """
        centred = 2 * picture - 1
        return tuple(judge(centred) for judge in self.judges)


def _judge(channels: int, halvings: int) -> nn.Sequential:
    """``halvings`` convolutions of stride 2 and two of stride 1."""
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(LEAK)]
    for number in range(1, halvings + 1):
        stride = 2 if number < halvings else 1
        layers += [
            nn.Conv2d(channels, 2 * channels, 4, stride=stride, padding=1),
            nn.InstanceNorm2d(2 * channels),
            nn.LeakyReLU(LEAK),
        ]
        channels *= 2
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, padding=1))

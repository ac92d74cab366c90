"""Judges of adversarial training that look at small patches, of two sizes."""

from __future__ import annotations

import torch
import torch.nn as nn

LEAK = 0.2
SMALLEST_SIDE = 32
"""Pixels of which the last instance norm still takes its mean over 3 x 3 numbers."""


class PatchDiscriminators(nn.Module):
    """Two convolutional networks that judge patches of 70 and of 34 pixels a side.

    Convolutions of 4 x 4 pixels, of stride 2 but for the last two; instance norms between them, and
    leaky ReLUs. Nothing is remembered from call to call.

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

        Raises:
            ValueError: the picture is smaller, or has other channels.
        """
        if picture.ndim != 4 or picture.shape[1] != 3 or min(picture.shape[-2:]) < SMALLEST_SIDE:
            raise ValueError(
                f"The discriminators judge pictures (B, 3, H, W) of at least {SMALLEST_SIDE} "
                f"pixels a side, got {tuple(picture.shape)}. Use larger crops, or set "
                "loss.adversarial_weight: 0."
            )
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

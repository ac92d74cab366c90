"""How a lens is cut into parts, each of which sees what is behind an edge in its own way."""

from __future__ import annotations

import math

import torch

__all__ = ["PART_COUNTS", "shares_of_parts"]

PART_COUNTS = (1, 2, 4)
# The cuts are turned by this angle: most edges in pictures are upright or level, and a cut should
# not coincide with them.
CUT_ANGLE = 0.3


def shares_of_parts(u: torch.Tensor, v: torch.Tensor, parts: int) -> torch.Tensor:
    """(parts, ...) share of each pixel in each part of the lens; the shares of a pixel sum to 1.

    Args:
        u, v: where the pixel lies in the lens, along x and y from its middle, in pixels; any shape.
        parts: 1 for the whole lens, 2 for its halves, 4 for its quarters. The part opposite to
            part p is part ``parts - 1 - p``.
    """
    shares = torch.ones_like(u)[None]
    for cut in range(parts.bit_length() - 1):
        angle = CUT_ANGLE + cut * math.pi / 2
        cosine, sine = math.cos(angle), math.sin(angle)
        # A pixel's square reaches this far to both sides of its middle, across the cut.
        half = (abs(cosine) + abs(sine)) / 2
        side = (0.5 + (u * cosine + v * sine) / (2 * half)).clamp(0, 1)
        shares = torch.cat([shares * side, shares * (1 - side)])
    return shares

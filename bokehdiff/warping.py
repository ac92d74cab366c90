"""A frame of a film as it looks from where the next one was taken: warping by known motion."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["seen_before", "warp"]


def warp(image: Tensor, motion: Tensor) -> Tensor:
    """Return the previous frame moved to where its points are now, (B, C, H, W).

    ``warped(p) = image(p + motion(p))``, bilinear between pixels; beyond the border the pixel at
    the border counts (see `seen_before`). Differentiable in both.

    Args:
        image: (B, C, H, W), the previous frame, or anything else that lies on its pixels.
        motion: (B, 2, H, W), in pixels, to the right and down: the point at pixel p now was at
            ``p + motion(p)`` in the previous frame.

    Raises:
        ValueError: the sizes differ, or motion has not two channels.
    """
    _check_motion(motion, image.shape)
    height, width = image.shape[-2:]
    # grid_sample counts from the edge of the first pixel (-1) to that of the last (1).
    x, y = _places_before(motion)
    places = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    return F.grid_sample(
        image, places.to(image.dtype), mode="bilinear", padding_mode="border", align_corners=False
    )


def seen_before(motion: Tensor) -> Tensor:
    """Return which points were within the previous frame, (B, 1, H, W) bool.

    That something was in front of them there is not known here.

    Args:
        motion: (B, 2, H, W), see `warp`.

    Raises:
        ValueError: motion has not two channels.
    """
    _check_motion(motion, motion.shape)
    height, width = motion.shape[-2:]
    x, y = _places_before(motion)
    inside: Tensor = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return inside[:, None]


def _places_before(motion: Tensor) -> tuple[Tensor, Tensor]:
    """Columns and rows (B, H, W) in the previous frame of what the pixels show now."""
    height, width = motion.shape[-2:]
    columns = torch.arange(width, dtype=motion.dtype, device=motion.device)
    rows = torch.arange(height, dtype=motion.dtype, device=motion.device)
    return motion[:, 0] + columns, motion[:, 1] + rows[:, None]


def _check_motion(motion: Tensor, shape: torch.Size) -> None:
    wanted = (shape[0], 2, *shape[-2:])
    if len(shape) != 4 or tuple(motion.shape) != wanted:
        raise ValueError(
            f"motion has the shape {tuple(motion.shape)} and the frame {tuple(shape)}; wanted "
            "(B, 2, H, W), pixels to the right and down for every pixel of a frame (B, C, H, W)."
        )

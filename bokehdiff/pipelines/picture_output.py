"""Rendered pictures in the form that the user wants."""

from __future__ import annotations

import numpy as np
import PIL.Image
import torch

__all__ = ["Pictures", "pictures_as"]

Pictures = list[PIL.Image.Image] | np.ndarray | torch.Tensor
"""N images of 8 bits; float32 (N, H, W, 3); or (N, 3, H, W)."""


def pictures_as(pictures: torch.Tensor, output_type: str) -> Pictures:
    """(N, 3, H, W) in [0, 1] as ``output_type``, ``"pt"``, ``"np"`` or ``"pil"``, says; 8 bits are
    rounded to nearest."""
    if output_type == "pt":
        return pictures
    arrays: np.ndarray = pictures.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return arrays
    return [PIL.Image.fromarray(one) for one in np.rint(arrays * 255).astype(np.uint8)]

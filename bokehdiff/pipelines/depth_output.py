"""What depth from bokeh returns, in the form that the user wants."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput

from ..depth_pictures import confidence_picture, depth_picture, disparity_picture

__all__ = ["DepthFromBokehOutput", "Maps", "as_output_type", "check_output_type"]

OUTPUT_TYPES = ("pt", "np", "pil")

Maps = torch.Tensor | np.ndarray | list[PIL.Image.Image]


@dataclass
class DepthFromBokehOutput(BaseOutput):
    """What ``DepthFromBokehPipeline`` and ``depth_from_sweep`` return.

    Maps have the size of the photo. By ``output_type``: ``"pt"`` float32 (B, 1, H, W); ``"np"``
    float32 (B, H, W); ``"pil"`` a list of B gray pictures of 16 bits whose unit is in their
    ``info``, see :mod:`bokehdiff.depth_pictures`.

    Args:
        depth: metres along the optical axis; infinite where the disparity is 0.
        disparity: 1/metres, larger is nearer: 1 / depth.
        confidence: [0, 1], of a sweep; None of a network.
        network_K: (B, N) strengths as the network was told them, pixels of blur radius in the
            picture it works on per 1/metre; None of a sweep, or without a stack.
        network_size: (height, width) of that picture; None of a sweep.
        changes: (iterations, B) of a stack that was rendered: the median of
            ``|depth / depth before - 1|`` of each photo.
    """

    depth: Maps
    disparity: Maps
    confidence: Maps | None = None
    network_K: torch.Tensor | None = None
    network_size: tuple[int, int] | None = None
    changes: torch.Tensor | None = None


def check_output_type(output_type: str) -> None:
    """Raises ``ValueError`` unless it is one of ``OUTPUT_TYPES``."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {output_type!r}; wanted one of {OUTPUT_TYPES}.")


def as_output_type(maps: torch.Tensor, kind: str, output_type: str) -> Maps:
    """Maps (B, 1, H, W) as the user wants them; ``kind`` is "depth", "disparity", "confidence"."""
    maps = maps.to(torch.float32)
    if output_type == "pt":
        return maps
    if output_type == "np":
        array: np.ndarray = maps[:, 0].cpu().numpy()
        return array
    draw = {
        "depth": depth_picture,
        "disparity": disparity_picture,
        "confidence": confidence_picture,
    }[kind]
    return [draw(one) for one in maps[:, 0]]

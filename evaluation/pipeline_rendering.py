"""A photograph of a data set through a loaded pipeline."""

from __future__ import annotations

import numpy as np
import torch

from bokehdiff import BokehDiffPipeline
from evaluation.photographs import Photograph

__all__ = ["render_with"]


def render_with(pipeline: BokehDiffPipeline, photograph: Photograph) -> np.ndarray:
    """(H, W, 3) float64 display-encoded sRGB in [0, 1].

    The pipeline takes disparity between 0 and 1: the range of the scene, df in it, is mapped there,
    and K is divided by the same factor, so that every circle of confusion keeps its radius.
    """
    low, high = photograph.disparity_range
    low, high = min(low, photograph.df), max(high, photograph.df)
    unit = high - low or 1.0
    image = torch.from_numpy(photograph.image / np.float32(255)).permute(2, 0, 1)[None]
    disparity = torch.from_numpy(((photograph.disparity - low) / unit).clip(0, 1))[None, None]
    rendered = pipeline(
        image, disparity.float(), (photograph.df - low) / unit, photograph.K * unit,
        output_type="pt",
    ).images  # fmt: skip
    return rendered[0].permute(1, 2, 0).cpu().double().numpy()

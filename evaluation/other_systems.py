"""What others publish, as far as it can be computed from equations: methods to compare with.

They are named as any Python function is: ``--method evaluation.other_systems:bokehme_scatter``.
"""

from __future__ import annotations

import numpy as np
import torch

from bokehdiff.images import linear_to_srgb, srgb_to_linear
from bokehdiff.optics import signed_defocus
from bokehdiff.rendering import scatter_bokehme

__all__ = ["bokehme_scatter"]


def bokehme_scatter(image: np.ndarray, disparity: np.ndarray, df: float, K: float) -> np.ndarray:
    """The classical renderer of BokehMe (CVPR 2022) in linear light, without its networks.

    image: (H, W, 3) uint8 sRGB; disparity: (H, W), larger is nearer; returns (H, W, 3) in [0, 1].
    """
    light = srgb_to_linear(torch.from_numpy(image / 255.0).permute(2, 0, 1)[None])
    nearness = torch.from_numpy(disparity).to(light)[None, None]
    blurred, _, _ = scatter_bokehme(light, signed_defocus(nearness, df, K))
    return linear_to_srgb(blurred)[0].permute(1, 2, 0).numpy()

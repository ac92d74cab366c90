"""A photograph of three planes side by side, of which it is known how far each is."""

from __future__ import annotations

import numpy as np

from evaluation.photographs import Photograph

PLANES = (0.2, 0.5, 0.8)


def three_planes(df: float = 0.8, K: float | None = 20.0) -> Photograph:
    """Far, middle and near side by side, with detail of many sizes and nothing clipped."""
    random = np.random.default_rng(0)
    image = np.zeros((120, 240, 3))
    for cells in (6, 12, 30, 60, 120):
        noise = random.uniform(0, 1, (cells, 2 * cells, 3))
        image += noise.repeat(120 // cells, 0).repeat(120 // cells, 1) / 5
    disparity = np.repeat(np.float32(PLANES), 80)[None].repeat(120, 0)
    picture = (20 + 200 * image).astype(np.uint8)
    return Photograph(
        scene="s", setting="f", image=picture, disparity=disparity, disparity_range=(0.2, 0.8),
        df=df, K=K, truth=picture, labels={"level": 12},
    )  # fmt: skip

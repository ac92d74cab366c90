"""A small folder of triples whose truth the scatter renderer made, so that its K is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from bokehdiff.rendering import render_bokeh

WIDTH, HEIGHT = 120, 90
K = 10.0
"""Of every photograph, at disparities from 0.2 to 0.8 and df of 0.2 or 0.8: 6 px at most."""
PHOTOGRAPHS = {"a_near": ("a", 0.8), "a_far": ("a", 0.2), "b_near": ("b", 0.8)}
"""(scene, df) by name."""
NAMES = ["a_a_far", "a_a_near", "b_b_near"]
"""The names of their pictures, in the order of the data set."""


def picture(seed: int) -> np.ndarray:
    """(H, W, 3) uint8 with detail of many sizes and nothing clipped."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.zeros(1, 3, HEIGHT, WIDTH)
    for cells in (4, 12, 40):
        noise = torch.rand(1, 3, cells, cells, generator=generator)
        levels += F.interpolate(noise, size=(HEIGHT, WIDTH), mode="bilinear") / 3
    return (30 + 190 * levels)[0].permute(1, 2, 0).byte().numpy()


def disparity() -> np.ndarray:
    """(H, W) float32: a far half, and a near half whose depth varies."""
    values = np.full((HEIGHT, WIDTH), 0.2, np.float32)
    values[:, WIDTH // 2 :] = np.linspace(0.5, 0.8, HEIGHT, dtype=np.float32)[:, None]
    return values


def write_triples(folder: Path, known_K: bool = True) -> Path:
    """Writes the layout that ``triples`` reads; returns the folder."""
    for part in ("image", "disparity", "bokeh"):
        (folder / part).mkdir(parents=True)
    settings = {}
    for seed, (name, (scene, df)) in enumerate(PHOTOGRAPHS.items()):
        image = picture(seed)
        truth = render_bokeh(image, disparity(), df, K, method="scatter")
        blurred = (truth[0].permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(image).save(folder / "image" / f"{name}.png")
        Image.fromarray(blurred).save(folder / "bokeh" / f"{name}.png")
        np.save(folder / "disparity" / f"{name}.npy", disparity())
        settings[name] = {"scene": scene, "df": df, **({"K": K} if known_K else {})}
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder

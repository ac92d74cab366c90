"""Contact sheets of samples."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

__all__ = ["write_contact_sheet"]


def write_contact_sheet(
    items: Iterable[Mapping[str, torch.Tensor]],
    path: str | os.PathLike[str],
    columns: int = 4,
    overwrite: bool = False,
) -> None:
    """Writes a picture of samples, each as image, disparity and target side by side.

    ``items``: samples of ``ProceduralScenes`` or ``ShardedScenes``; ``columns`` samples in a row.
    Raises FileExistsError rather than replacing a file, unless ``overwrite``.
    """
    if Path(path).exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name or delete it first.")
    cells = []
    for item in items:
        triple = torch.cat(
            [item["image"], item["disparity"].expand_as(item["image"]), item["target"]], dim=2
        )
        cells.append((triple * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    if not cells:
        raise ValueError("There are no samples to show.")
    gap = 4
    height, width = cells[0].shape[:2]
    rows = -(-len(cells) // columns)
    columns = min(columns, len(cells))
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, cell in enumerate(cells):
        top = index // columns * (height + gap)
        left = index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = cell
    Image.fromarray(sheet).save(path)

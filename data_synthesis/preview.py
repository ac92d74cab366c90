"""Contact sheets of samples."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

__all__ = ["write_contact_sheet"]

GAP = 4
# Larger pictures are made smaller, so that a sheet stays one that can be looked at.
LARGEST_SIDE = 256


def write_contact_sheet(
    items: Iterable[Mapping[str, torch.Tensor]],
    path: str | os.PathLike[str],
    columns: int = 4,
    overwrite: bool = False,
) -> None:
    """Writes a picture of samples, each as image, disparity and target side by side.

    ``items``: samples of ``ProceduralScenes``, ``LayerScenes`` or ``ShardedScenes``, all of one
    size; ``columns`` samples in a row. Raises FileExistsError rather than replacing a file, unless
    ``overwrite``.
    """
    if Path(path).exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name or delete it first.")
    cells = [_side_by_side(item) for item in items]
    if not cells:
        raise ValueError("There are no samples to show.")
    height, width = cells[0].shape[:2]
    rows = -(-len(cells) // columns)
    columns = min(columns, len(cells))
    shape = (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3)
    sheet = np.full(shape, 255, np.uint8)
    for index, cell in enumerate(cells):
        top = index // columns * (height + GAP)
        left = index % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = cell
    Image.fromarray(sheet).save(path)


def _side_by_side(item: Mapping[str, torch.Tensor]) -> np.ndarray:
    """(h, 3 w, 3) uint8."""
    pictures = []
    for name in ("image", "disparity", "target"):
        levels = (item[name].expand_as(item["image"]) * 255).round().to(torch.uint8)
        picture = Image.fromarray(levels.permute(1, 2, 0).numpy())
        picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        pictures.append(np.asarray(picture))
    return np.concatenate(pictures, axis=1)

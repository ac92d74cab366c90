"""What a method is given, and what it should produce: one photograph through one lens setting."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

__all__ = ["Photograph", "read_picture"]


@dataclass(frozen=True)
class Photograph:
    """One photograph and one lens setting.

    The circle of confusion has a radius of ``K * |disparity - df|`` pixels.
    """

    scene: str
    setting: str  # names the lens setting within the scene
    image: np.ndarray  # (H, W, 3) uint8 sRGB, all in focus
    disparity: np.ndarray  # (H, W) float32, larger is nearer, finite
    disparity_range: tuple[float, float]  # smallest and largest disparity of the scene
    df: float  # disparity of the plane in focus, in the unit of ``disparity``
    K: float | None  # pixels of blur radius per unit of disparity; None where nobody knows it
    truth: np.ndarray  # (H, W, 3) uint8 sRGB, what the lens took
    light: np.ndarray | None = None  # (H, W, 3) float32 linear light of the image, not cut off
    labels: dict[str, Any] = field(default_factory=dict)  # what rows of results also say, for JSON

    @property
    def name(self) -> str:
        """File name (without suffix) under which predictions of it are kept."""
        return f"{self.scene}_{self.setting}"


def read_picture(file: Path) -> np.ndarray:
    """(H, W, 3) uint8 of a picture file, upright as its EXIF data say; ValueError if it is missing
    or damaged."""
    if not file.is_file():
        raise ValueError(f"{file} is missing.")
    try:
        with Image.open(file) as picture:
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except OSError as problem:
        raise ValueError(f"{file} cannot be read as a picture: {problem}.") from problem

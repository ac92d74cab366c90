"""A module with a function that can be evaluated."""

from __future__ import annotations

import numpy as np


def darker(image: np.ndarray, disparity: np.ndarray, df: float, K: float) -> np.ndarray:
    return image / 510

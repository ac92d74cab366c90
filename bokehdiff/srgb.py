"""The sRGB curve: display-encoded values to linear light and back."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch

Arrays = TypeVar("Arrays", torch.Tensor, np.ndarray)
"""A torch tensor or a numpy array: what comes in is what goes out."""


def srgb_to_linear(values: Arrays) -> Arrays:
    """Returns linear light from display-encoded sRGB (IEC 61966-2-1), elementwise, same shape.

    Values above 1 follow the power law, values below 0 the straight part. The gradient is finite
    everywhere.
    """
    if isinstance(values, np.ndarray):
        curved = ((np.maximum(values, 0.04045) + 0.055) / 1.055) ** 2.4
        return np.where(values <= 0.04045, values / 12.92, curved).astype(_float_like(values))
    # The clamp keeps the power away from negative bases: their NaN would reach the gradient.
    curved = ((values.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4
    return torch.where(values <= 0.04045, values / 12.92, curved)


def linear_to_srgb(values: Arrays) -> Arrays:
    """Returns display-encoded sRGB from linear light (IEC 61966-2-1), elementwise, same shape.

    Values above 1 follow the power law, values below 0 the straight part. The gradient is finite
    everywhere (12.92 at 0).
    """
    if isinstance(values, np.ndarray):
        curved = 1.055 * np.maximum(values, 0.0031308) ** (1 / 2.4) - 0.055
        return np.where(values <= 0.0031308, values * 12.92, curved).astype(_float_like(values))
    curved = 1.055 * values.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(values <= 0.0031308, values * 12.92, curved)


def _float_like(values: np.ndarray) -> np.dtype:
    return values.dtype if values.dtype.kind == "f" else np.dtype(np.float32)

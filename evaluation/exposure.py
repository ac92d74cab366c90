"""Two photographs of one scene, brought to the same brightness."""

from __future__ import annotations

import numpy as np

__all__ = ["align_exposure"]

# Means of black pictures are not divided by.
LEAST_MEAN = 1e-6


def align_exposure(image: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The photograph (H, W, 3) uint8 sRGB with the mean colour of the truth.

    Each channel, display-encoded in [0, 1], becomes
    ``clip(image * mean(truth) / max(mean(image), 1e-6), 0, 1)``, rounded to 8 bits. What is cut
    off at white makes the result a little darker than the truth.

    image, truth: (H, W, 3) uint8 sRGB. Raises ValueError for anything else.
    """
    for picture, name in ((image, "photograph"), (truth, "truth")):
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise ValueError(
                f"The {name} has shape {picture.shape} and holds {picture.dtype}; wanted "
                "(height, width, 3) of uint8."
            )
    values = image / 255.0
    mean, wanted = values.mean(axis=(0, 1)), truth.mean(axis=(0, 1)) / 255.0
    aligned = values * (wanted / np.maximum(mean, LEAST_MEAN))
    return (aligned.clip(0, 1) * 255).round().astype(np.uint8)

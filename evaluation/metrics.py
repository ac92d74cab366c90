"""Image metrics on display-encoded sRGB in [0, 1]. Larger is better for all of them."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["psnr", "quantise_to_8_bit", "structural_similarity_map"]

# Identical images would have infinite PSNR; a mean over images needs a number (100 dB).
SMALLEST_SQUARED_ERROR = 1e-10


def quantise_to_8_bit(image: np.ndarray) -> np.ndarray:
    """The float64 image clipped to [0, 1] and rounded to multiples of 1/255, as a PNG stores it."""
    return np.round(np.clip(image.astype(np.float64), 0, 1) * 255) / 255


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB for a peak of 1; at most 100."""
    return -10 * math.log10(max(mean_squared_error, SMALLEST_SQUARED_ERROR))


def structural_similarity_map(
    prediction: np.ndarray, truth: np.ndarray
) -> tuple[float, np.ndarray]:
    """(mean SSIM, SSIM of each pixel (H, W)) of two float images (H, W, 3) in [0, 1].

    Gaussian window of sigma 1.5 (11 x 11), population covariance, mean over the colour channels:
    the settings of the original publication. The mean leaves out the 5 pixels at each border,
    where the window is incomplete; the map does not.
    """
    from skimage.metrics import structural_similarity

    mean, similarity = structural_similarity(
        truth,
        prediction,
        data_range=1.0,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    return float(mean), similarity.mean(axis=2)

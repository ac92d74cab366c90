"""Training losses of depth: how far a depth map is from the true one, in ratios.

Both losses take depths in metres of shape (B, H, W) and what is known of the true ones as a mask,
and return one scalar.
"""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["FEWEST_VALID_PIXELS", "scale_invariant_log_loss", "valid_depth", "gradient_loss"]

FEWEST_VALID_PIXELS = 10
"""With fewer pixels of known depth a batch tells nothing, and the loss is zero."""


def valid_depth(depth: Tensor, smallest: float = 1e-3, largest: float = 80.0) -> Tensor:
    """Return where a true depth is known, a boolean tensor of its shape: finite and in range.

    Args:
        depth: metres; unknown depths are 0, infinite or not a number.
        smallest, largest: ends of the range, in metres, both inside.

    Raises:
        ValueError: the range is none.
    """
    if not 0 < smallest < largest < math.inf:
        raise ValueError(
            f"The range of depths is {smallest} to {largest} m; wanted 0 < smallest < largest."
        )
    return depth.isfinite() & (depth >= smallest) & (depth <= largest)


def scale_invariant_log_loss(
    prediction: Tensor, depth: Tensor, valid: Tensor, *, variance_focus: float = 0.5
) -> Tensor:
    """Return SILog, ``sqrt(mean(e^2) - v mean(e)^2)`` with e = log depth - log prediction.

    The means are over all valid pixels of the batch together. With v = 0 it is the RMS error of the
    logarithm, and with v = 1 it ignores a scale that all depths have wrong (Eigen et al. 2014).

    Args:
        prediction: (B, H, W), above 0 where valid.
        depth: (B, H, W), true metres.
        valid: (B, H, W) bool. With fewer than `FEWEST_VALID_PIXELS` the loss is 0.
        variance_focus: v in [0, 1]; BokehDepth's training has 0.5.

    Raises:
        ValueError: shapes differ, or v is out of range.
    """
    _check_shapes(prediction, depth, valid)
    if not 0 <= variance_focus <= 1:
        raise ValueError(f"variance_focus is {variance_focus}; wanted a number in [0, 1].")
    if valid.sum() < FEWEST_VALID_PIXELS:
        return (prediction * 0).sum()
    error = depth[valid].log() - prediction[valid].log()
    squared = error.square().mean() - variance_focus * error.mean().square()
    # The slope of the root is infinite at zero, where there is nothing left to learn.
    return squared.clamp_min(1e-12).sqrt()


def gradient_loss(prediction: Tensor, depth: Tensor, valid: Tensor, *, scales: int = 4) -> Tensor:
    """Return how much the edges of the logarithm of the depth differ, a scalar.

    With e as in `scale_invariant_log_loss`, at scale s every 2^s-th pixel is taken, and the mean of
    ``|e(x + 1) - e(x)|`` and ``|e(y + 1) - e(y)|`` over neighbours that are both valid is added up
    over the scales and divided by their number (MegaDepth, Li and Snavely 2018, Equation 5, per
    neighbour). A scale without such neighbours adds 0.

    Args:
        prediction: (B, H, W), above 0 where valid.
        depth: (B, H, W), true metres.
        valid: (B, H, W) bool.
        scales: at least 1.

    Raises:
        ValueError: shapes differ, or there is no scale.
    """
    _check_shapes(prediction, depth, valid)
    if scales < 1:
        raise ValueError(f"scales is {scales}; wanted at least 1.")
    error = depth.where(valid, 1.0).log() - prediction.where(valid, 1.0).log()
    total = (prediction * 0).sum()
    for scale in range(scales):
        step = 2**scale
        kept, known = error[:, ::step, ::step], valid[:, ::step, ::step]
        for axis in (-2, -1):
            if kept.shape[axis] < 2:
                continue
            both = known.narrow(axis, 1, known.shape[axis] - 1) & known.narrow(
                axis, 0, known.shape[axis] - 1
            )
            total = total + (kept.diff(dim=axis).abs() * both).sum() / both.sum().clamp_min(1)
    return total / scales


def _check_shapes(prediction: Tensor, depth: Tensor, valid: Tensor) -> None:
    if not prediction.shape == depth.shape == valid.shape or prediction.ndim != 3:
        raise ValueError(
            f"prediction, depth and valid have the shapes {tuple(prediction.shape)}, "
            f"{tuple(depth.shape)} and {tuple(valid.shape)}; wanted one shape (B, H, W)."
        )

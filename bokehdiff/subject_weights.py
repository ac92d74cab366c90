"""Where the subject of a pair of photographs is, and how much more it counts in a loss.

The pair itself tells: a lens takes the detail from what is not in focus. Of every disparity it is
measured how much detail is left, and what lies in the plane that keeps most is the subject.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["subject_share", "subject_weights"]

PLANES = 101
"""Disparities from 0 to 1 that are tried."""
PLANE_WIDTH = 0.03
"""Difference in disparity at which detail counts by 1/e for a plane that is tried."""
LEAST_DETAIL = 0.002
"""Share of the detail of a photo below which a plane is too small to be judged."""
PLANE_DEPTH = 0.1
"""Difference in disparity at which a place counts as subject by 1/e."""
WEIGHT_ADDED = 2.0
"""What is added to the weight of 1 in the plane of the subject."""
RANGE_TOLERANCE = 1e-3


def subject_share(image: Tensor, bokeh: Tensor, disparity: Tensor) -> Tensor:
    """Return how much each pixel belongs to the plane in focus, (B, 1, H, W) in [0, 1].

    With g the gradient (the sum of the absolute differences to the left and upper neighbour, mean
    over colours), the focus is the disparity, of 0, 0.01 .. 1, that keeps most of its detail,

        d_f = argmax_c sum(k_c g(bokeh)) / (sum(k_c g(image)) + 0.002 sum(g(image))),
        k_c = exp(-((d - c) / 0.03)^2),

    and ``exp(-((d - d_f) / 0.1)^2)`` comes back. Without any detail d_f is 0.

    It is not the mean disparity of what is alike in both photos: these are also places without
    texture, most of them in the background.

    Args:
        image, bokeh: (B, 3, H, W) in [0, 1], all in focus and through a lens; whole photos, for a
            crop of the background has no subject.
        disparity: (B, 1, H, W) in [0, 1], larger is nearer; NaN where unknown. There the share is
            0, everywhere if nothing is known.

    Raises:
        ValueError: shapes differ, or the disparity is beyond [0, 1].
    """
    if image.ndim != 4 or image.shape[1] != 3 or bokeh.shape != image.shape:
        raise ValueError(
            f"The photos are of shape {tuple(image.shape)} and {tuple(bokeh.shape)}; wanted "
            "(B, 3, H, W) both, the same."
        )
    _check_map("disparity", disparity, image[:, :1].shape)
    known = disparity.isfinite()
    disparity = disparity.where(known, 0)
    low, high = float(disparity.min()), float(disparity.max())
    if not -RANGE_TOLERANCE <= low <= high <= 1 + RANGE_TOLERANCE:
        raise ValueError(
            f"The disparity is from {low:g} to {high:g}; wanted [0, 1], larger is nearer: subtract "
            "its minimum and divide by its range."
        )
    focus = _sharpest_disparity(_detail(image) * known, _detail(bokeh) * known, disparity)
    return torch.exp(-(((disparity - focus) / PLANE_DEPTH) ** 2)) * known


def subject_weights(subject: Tensor) -> Tensor:
    """Return ``(1 + 2 a) / mean(1 + 2 a)``, (B, 1, H, W), of mean 1 in each picture.

    Args:
        subject: a of :func:`subject_share`, (B, 1, H, W) in [0, 1]. The same everywhere gives 1.

    Raises:
        ValueError: it is of another shape.
    """
    _check_map("subject", subject, None)
    weight = 1 + WEIGHT_ADDED * subject
    return weight / weight.mean((1, 2, 3), keepdim=True)


def _detail(picture: Tensor) -> Tensor:
    """(B, 1, H, W) gradient of (B, 3, H, W)."""
    across = F.pad(picture.diff(dim=-1).abs().mean(1, keepdim=True), (1, 0))
    return across + F.pad(picture.diff(dim=-2).abs().mean(1, keepdim=True), (0, 0, 1, 0))


def _sharpest_disparity(before: Tensor, after: Tensor, disparity: Tensor) -> Tensor:
    """(B, 1, 1, 1) where most of the detail `before` is left `after`; all three (B, 1, H, W)."""
    planes = torch.linspace(0, 1, PLANES, dtype=before.dtype, device=before.device)
    nearest = (disparity.clamp(0, 1) * (PLANES - 1)).round().long().flatten(1)
    sums = before.new_zeros(2, len(before), PLANES)
    for place, detail in zip(sums, (before, after), strict=True):
        place.scatter_add_(1, nearest, detail.flatten(1))
    sums = sums @ torch.exp(-(((planes[:, None] - planes) / PLANE_WIDTH) ** 2))
    least = LEAST_DETAIL * before.sum((1, 2, 3))[:, None]
    kept = sums[1] / (sums[0] + least).clamp_min(torch.finfo(before.dtype).tiny)
    return planes[kept.argmax(1)].view(-1, 1, 1, 1)


def _check_map(name: str, values: Tensor, shape: torch.Size | None) -> None:
    if values.ndim != 4 or values.shape[1] != 1 or shape not in (None, values.shape):
        wanted = "(B, 1, H, W)" if shape is None else f"{tuple(shape)}, the size of the photos"
        raise ValueError(f"{name} is of shape {tuple(values.shape)}; wanted {wanted}.")

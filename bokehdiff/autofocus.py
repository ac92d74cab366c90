"""Focus without being told where: on the nearest large thing near the centre, or where it is sharp.

Both are deterministic, and need neither a network nor a choice by a person.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

__all__ = ["central_subject", "sharpest_disparity"]

# --- The nearest large region near the centre -----------------------------------------------------

# Cells on the long side of the grid on which regions are found: a face is a few cells wide.
GRID_CELLS = 96
# A subject is a slab of the scene, this part of its range of disparity deep. Slabs overlap by half,
# so that no subject is cut in two by where they happen to begin.
SLAB_DEPTH = 1 / 8
# Of the bell-shaped weight of the centre, in sides of the picture.
CENTRE_DEVIATION = 0.25


def central_subject(disparity: torch.Tensor) -> torch.Tensor:
    """Returns the disparities (n,) of the nearest large connected region near the centre.

    The map is sampled on a grid of at most 96 cells a side and cut into overlapping slabs, each an
    eighth of the range of disparity (1st to 99th percentile) deep. The regions that are connected
    within a slab compete by ``sqrt(size) * nearness``: the size is the share of all cells, each
    weighted by a Gaussian around the centre (standard deviation a quarter of the side); the
    nearness is the mean disparity, 0 the farthest and 1 the nearest of the scene. So a wide near
    floor, which every slab cuts to a strip at the border, a near twig, which is small, and the
    background, which is far, all lose against what stands in the middle; without such a thing the
    nearest of them wins. A flat scene is one region.

    Args:
        disparity: (H, W), larger is nearer; NaN is unknown.

    Raises:
        ValueError: nothing is known.
    """
    grid = _sampled(disparity)
    known = torch.isfinite(grid)
    if not bool(known.any()):
        raise ValueError(
            "The disparity map has no known pixel to focus on; wanted a map in which at least part "
            "of the picture is measured."
        )
    farthest, nearest = np.quantile(grid[known].numpy(), (0.01, 0.99))
    if nearest <= farthest:
        return grid[known]
    nearness = ((grid - farthest) / (nearest - farthest)).clamp(0, 1)
    starts = torch.arange(0, 1 - SLAB_DEPTH / 2, SLAB_DEPTH / 2).reshape(-1, 1, 1)
    slabs = (nearness >= starts) & (nearness <= starts + SLAB_DEPTH)
    labels = _connected(slabs)

    weight = _centre_weight(*grid.shape).expand_as(labels)[slabs]
    found, region = torch.unique(labels[slabs], return_inverse=True)
    size = weight.new_zeros(len(found)).index_add(0, region, weight)
    near = nearness.expand_as(labels)[slabs].to(weight)
    nearness_of = weight.new_zeros(len(found)).index_add(0, region, weight * near) / size
    best = found[(size.sqrt() * nearness_of).argmax()]
    return grid[(labels == best).any(dim=0)]


def _sampled(disparity: torch.Tensor) -> torch.Tensor:
    """Every so many pixels of (H, W); means over cells would invent depths between two things."""
    height, width = disparity.shape
    cells = max(height, width) / min(GRID_CELLS, max(height, width))
    rows, columns = (
        ((torch.arange(count) + 0.5) * (side / count)).long()
        for side, count in ((s, max(round(s / cells), 1)) for s in (height, width))
    )
    return disparity[rows][:, columns]


def _centre_weight(height: int, width: int) -> torch.Tensor:
    """A Gaussian around the centre, (height, width), of sum 1, float64."""
    rows, columns = (
        (torch.arange(side, dtype=torch.float64) + 0.5) / side - 0.5 for side in (height, width)
    )
    squared = rows[:, None].square() + columns.square()
    weight = torch.exp(-squared / (2 * CENTRE_DEVIATION**2))
    return weight / weight.sum()


def _connected(masks: torch.Tensor) -> torch.Tensor:
    """Numbers the connected regions (8 neighbours) of masks (N, H, W): equal within, else
    different, 0 outside."""
    count, height, width = masks.shape
    inside = masks[:, None].to(torch.float32)
    # The largest number of a region spreads through it. float32 tells 16 million cells apart.
    labels = torch.arange(1, masks.numel() + 1).reshape(count, 1, height, width) * inside
    while True:
        spread = F.max_pool2d(labels, kernel_size=3, stride=1, padding=1) * inside
        if torch.equal(spread, labels):
            return labels[:, 0]
        labels = spread


# --- Where a photograph is sharp ------------------------------------------------------------------

REBLUR_DEVIATION_PX = 1.0
WINDOW_DEVIATION_PX = 2.0
# Contrast per pixel, of [0, 1], below which nothing is said: beyond the grain of a photograph after
# blurring (a fifth of it).
LEAST_CONTRAST = 0.02
# Fewer are a speck or a hot pixel.
LEAST_TEXTURED_PIXELS = 30
# So many say as much as all, which are costly to put in order.
SAMPLED_PIXELS = 1_000_000
# The sharpest part of all texture decides.
SHARPEST_SHARE = 0.01
# At outlines the map may mean either side. The share of the range of disparity, among 5 x 5 pixels,
# at which a pixel counts half.
OUTLINE_STEP = 0.03


def sharpest_disparity(disparity: torch.Tensor, image: torch.Tensor) -> float:
    """Returns the disparity at which an already shallow photograph is sharp.

    Sharpness is the contrast (root of the mean squared gradient around a pixel) divided by the
    contrast that is left after blurring once more, by 1 pixel: large where there are fine details,
    1 where there are none, whatever the contrast of the texture. Smooth areas say nothing. Of the
    sharpest hundredth of the texture it is the median disparity, in which outlines, where the map
    is uncertain, weigh less.

    Args:
        disparity: (H, W), larger is nearer; NaN is unknown.
        image: (3, H, W) display sRGB in [0, 1].

    Raises:
        ValueError: next to nothing is textured.
    """
    gray = image.mean(dim=0)
    contrast = _contrast(gray)
    left = _contrast(_blurred(gray, REBLUR_DEVIATION_PX))
    known = torch.isfinite(disparity)
    textured = known & (left > LEAST_CONTRAST)
    if int(textured.sum()) < LEAST_TEXTURED_PIXELS:
        raise ValueError(
            "The photograph has next to no texture by which sharpness could be seen; say what is "
            "in focus by a pixel, a box, a mask or df instead of 'sharpest'."
        )
    sharpness = (contrast / left)[textured]
    weight = _certainty(disparity, known)[textured]
    every = -(-len(sharpness) // SAMPLED_PIXELS)
    sharpness, weight = sharpness[::every], weight[::every]
    sharpest = sharpness >= _weighted_quantile(sharpness, weight, 1 - SHARPEST_SHARE)
    return _weighted_quantile(disparity[textured][::every][sharpest], weight[sharpest], 0.5)


def _certainty(disparity: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """How surely the map (H, W) means what is seen at a pixel, 0 to 1: less at outlines."""
    filled = torch.where(known, disparity, disparity[known].median())[None, None]
    step = torch.zeros_like(disparity)
    for sign in (1, -1):
        in_rows = F.max_pool2d(sign * filled, (1, 5), 1, (0, 2))
        step += F.max_pool2d(in_rows, (5, 1), 1, (2, 0))[0, 0]
    span = (filled.max() - filled.min()).clamp_min(torch.finfo(filled.dtype).tiny)
    return 1 / (1 + (step / (OUTLINE_STEP * span)).square())


def _contrast(values: torch.Tensor) -> torch.Tensor:
    """Root of the mean squared gradient around each pixel of (H, W), per pixel."""
    padded = F.pad(values[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    across = (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2
    down = (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2
    return _blurred(across.square() + down.square(), WINDOW_DEVIATION_PX).sqrt()


def _blurred(values: torch.Tensor, deviation_px: float) -> torch.Tensor:
    """(H, W) blurred by a Gaussian; the border is repeated."""
    reach = math.ceil(3 * deviation_px)
    kernel = [math.exp(-(offset**2) / (2 * deviation_px**2)) for offset in range(-reach, reach + 1)]
    padded = F.pad(values[None, None], (reach, reach, reach, reach), mode="replicate")[0, 0]
    # On processors added-up shifts are several times as fast as a convolution of one channel.
    for axis, length in ((1, values.shape[1]), (0, values.shape[0])):
        blurred = torch.zeros_like(padded.narrow(axis, 0, length))
        for offset, part in enumerate(kernel):
            blurred.add_(padded.narrow(axis, offset, length), alpha=part / sum(kernel))
        padded = blurred
    return padded


def _weighted_quantile(values: torch.Tensor, weight: torch.Tensor, share: float) -> float:
    """The one of the values (n,) at or below which this share of the weight lies."""
    ordered, order = values.sort(stable=True)
    heaped = weight[order].to(torch.float64).cumsum(dim=0)
    place = torch.searchsorted(heaped, share * heaped[-1])
    return float(ordered[place.clamp(max=len(values) - 1)])

"""Cutting a subject out of a picture whose backdrop is one plain colour.

A pixel is ``I = alpha F + (1 - alpha) B`` in display-encoded sRGB, as matting is commonly defined
(Porter and Duff 1984; Smith and Blinn, Blue Screen Matting, 1996). The backdrop B is estimated
first, so only alpha and the subject's colour F remain: I lies between B and F, and F is looked for
among the colours of the nearby inside of the subject (as in sampling-based matting).
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import ndimage, spatial

__all__ = ["BackdropError", "cut_out"]

# A border pixel farther than this from the border's median colour is no backdrop (RGB in [0, 1]).
LARGEST_BACKDROP_CHANGE = 0.15
# What a plain backdrop may have: noise per channel, and border pixels that are something else.
LARGEST_BACKDROP_NOISE = 0.03
LARGEST_BORDER_SHARE_OF_SUBJECT = 0.35
BORDER_WIDTH = 0.02  # of the shorter side
# The largest minus the smallest channel. Before grey, a subject's shading looks like transparency:
# alpha would be several times less accurate.
SMALLEST_CHROMA = 0.2
# The length of three channels of unit noise has this median (chi distribution).
CHI_MEDIAN = 1.538
# The subject's inside begins this far from visible backdrop (of the shorter side) ...
INSIDE_DEPTH = 0.015
# ... where its colour also differs from the backdrop's by more than this. Nearer colours far
# inside are taken for translucency.
OPAQUE_DIFFERENCE = 0.15
# Colours of the inside are taken from a band this many depths wide, on a grid of this many pixels;
# this many of them are tried for each pixel.
BAND_DEPTHS = 4
GRID = 3
CANDIDATES = 60
PIXELS_AT_ONCE = 1 << 14  # bounds the memory
# How well a mixture has to explain a pixel, beyond its noise.
MIXTURE_TOLERANCE = 0.02
# Threads and wires have no inside: there, a local maximum of the difference counts as opaque.
THIN_DIFFERENCE = 0.3
# Spots of noise: connected pixels that together are smaller than this part of the picture.
SMALLEST_PART = 1e-4
SMALLEST_GAP = 6  # pixels of backdrop that make a hole in the subject
# Colours continue this many pixels past the subject, for whoever resamples the cut-out.
COLOUR_MARGIN = 8


class BackdropError(ValueError):
    """The backdrop is not one plain, strong colour; the message says what was found."""


def cut_out(picture: Image.Image) -> Image.Image:
    """The subject of a picture as RGBA with straight colours, the backdrop removed from its edges.

    ``picture``: RGB; the backdrop may be shaded smoothly (a quadratic in each channel) and noisy.
    A subject's inside counts as opaque where its colour is not close to the backdrop's: how
    transparent glass is, one picture cannot tell. A cast shadow remains as dark translucency.

    Raises BackdropError when the picture's border is not mostly one plain and strong colour, or
    nothing but backdrop is found.
    """
    image = np.asarray(picture.convert("RGB"), np.float64) / 255
    backdrop, noise = _backdrop(image)
    difference = image - backdrop
    distance = np.linalg.norm(difference, axis=-1)
    # Beyond four standard deviations in three channels and one step of 8 bits each.
    empty = _without_small_parts(distance < 4 * noise + 0.012, SMALLEST_GAP)
    if empty.all():
        raise BackdropError("Nothing but backdrop is in the picture.")
    alpha, colour = _unmix(image, backdrop, noise, distance, empty)
    smallest = max(1, round(SMALLEST_PART * alpha.size))
    alpha = np.where(_without_small_parts(alpha > 0, smallest), alpha, 0.0)

    # What the mixture leaves for F is exact but noisy where alpha is small.
    removed = backdrop + difference / np.maximum(alpha, 0.05)[..., None]
    trust = alpha[..., None]
    colour = np.clip(trust * removed + (1 - trust) * colour, 0, 1)
    rgba = np.rint(255 * np.dstack([colour, alpha])).astype(np.uint8)
    return Image.fromarray(_extend_colours(rgba))


def _backdrop(image: np.ndarray) -> tuple[np.ndarray, float]:
    """The backdrop's colour at every pixel, and the standard deviation of a channel's noise."""
    height, width, _ = image.shape
    border = np.ones((height, width), bool)
    side = max(2, round(BORDER_WIDTH * min(height, width)))
    border[side:-side, side:-side] = False
    y, x = np.mgrid[-1 : 1 : 1j * height, -1 : 1 : 1j * width]
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)
    distance = np.linalg.norm(image - np.median(image[border], axis=0), axis=-1)
    tolerance = LARGEST_BACKDROP_CHANGE
    considered = border & (distance < tolerance)
    backdrop = image
    for _ in range(4):
        if considered.sum() < terms.shape[-1]:
            raise BackdropError("The border of the picture has no common colour.")
        # A grid of equations is plenty for six unknowns.
        sample = np.flatnonzero(considered)[:: max(1, considered.sum() // 20_000)]
        equations, colours = terms.reshape(-1, 6)[sample], image.reshape(-1, 3)[sample]
        backdrop = terms @ np.linalg.lstsq(equations, colours, rcond=None)[0]
        distance = np.linalg.norm(image - backdrop, axis=-1)
        noise = float(np.median(distance[considered]) / CHI_MEDIAN)
        tolerance = max(6 * noise, 0.02)
        considered = distance < tolerance
    subject_share = float((distance[border] >= tolerance).mean())
    if noise > LARGEST_BACKDROP_NOISE:
        raise BackdropError(
            f"The backdrop is not plain: its colour varies by {noise:.3f} (standard deviation of a "
            f"channel in [0, 1]); wanted {LARGEST_BACKDROP_NOISE} or less."
        )
    if subject_share > LARGEST_BORDER_SHARE_OF_SUBJECT:
        raise BackdropError(
            f"{subject_share:.0%} of the picture's border differs from the backdrop; wanted "
            f"{LARGEST_BORDER_SHARE_OF_SUBJECT:.0%} or less."
        )
    middle = np.median(backdrop.reshape(-1, 3), axis=0)
    if np.ptp(middle) < SMALLEST_CHROMA:
        raise BackdropError(
            f"The backdrop's colour {np.rint(255 * middle).astype(int).tolist()} is too grey to "
            "tell transparency from shading; wanted a strong colour."
        )
    return backdrop, noise


def _unmix(
    image: np.ndarray, backdrop: np.ndarray, noise: float, distance: np.ndarray, empty: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Alpha (H, W) and an estimate of the subject's colour (H, W, 3)."""
    side = min(empty.shape)
    depth = max(3.0, INSIDE_DEPTH * side)
    from_empty = ndimage.distance_transform_edt(~empty)
    inside = (from_empty > depth) & (distance > OPAQUE_DIFFERENCE)
    band = inside & (from_empty < (1 + BAND_DEPTHS) * depth)
    smooth = ndimage.gaussian_filter(distance, 0.7)
    peaks = smooth >= 0.97 * ndimage.maximum_filter(smooth, size=2 * int(depth) + 1)
    peaks &= ~empty & ~inside & (distance > THIN_DIFFERENCE)
    if inside.any():
        peaks &= ndimage.distance_transform_edt(~inside) > 2 * depth
    grid = np.zeros_like(band)
    grid[::GRID, ::GRID] = True
    candidates = np.argwhere((band & grid) | peaks)
    unknown = np.argwhere(~empty & ~inside)

    alpha = np.where(inside, 1.0, 0.0)
    colour = image.copy()
    if not len(unknown):
        return alpha, colour
    if not len(candidates):  # a faint subject: the least alpha that keeps F within [0, 1]
        room = np.where(image > backdrop, 1 - backdrop, backdrop)
        least = (np.abs(image - backdrop) / np.maximum(room, 1e-3)).max(axis=-1)
        return np.where(empty, 0.0, np.clip(least, 0, 1)), colour
    count = min(CANDIDATES, len(candidates))
    tree = spatial.cKDTree(candidates)
    for first in range(0, len(unknown), PIXELS_AT_ONCE):
        pixels = unknown[first : first + PIXELS_AT_ONCE]
        nearest = tree.query(pixels, k=range(1, count + 1))[1]
        at = tuple(pixels.T)
        mixture = (image - backdrop)[at][:, None]  # I - B
        subject = image[tuple(np.moveaxis(candidates[nearest], -1, 0))]  # (pixels, candidates, 3)
        span = subject - backdrop[at][:, None]  # F - B
        length = np.maximum((span * span).sum(axis=-1), 1e-6)
        alphas = np.clip((mixture * span).sum(axis=-1) / length, 0, 1)
        error = ((mixture - alphas[..., None] * span) ** 2).sum(axis=-1)
        error -= error.min(axis=1, keepdims=True)
        weight = np.exp(-error / (2 * (noise**2 + MIXTURE_TOLERANCE**2)))
        weight /= weight.sum(axis=1, keepdims=True)
        alpha[at] = (weight * alphas).sum(axis=1)
        colour[at] = (weight[..., None] * subject).sum(axis=1)
    return alpha, colour


def _without_small_parts(mask: np.ndarray, smallest: int) -> np.ndarray:
    """The mask without connected parts of fewer than ``smallest`` pixels."""
    parts, _ = ndimage.label(mask)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return (sizes >= smallest)[parts]


def _extend_colours(rgba: np.ndarray) -> np.ndarray:
    """Transparent pixels beside the subject take its nearest colour, those far away are black."""
    distance, (row, column) = ndimage.distance_transform_edt(rgba[..., 3] == 0, return_indices=True)
    near = (distance > 0) & (distance <= COLOUR_MARGIN)
    rgba[near, :3] = rgba[row[near], column[near], :3]
    rgba[distance > COLOUR_MARGIN, :3] = 0
    return rgba

"""What a photograph is focused on where nobody wrote it down: told by a mask, or by sharp edges."""

from __future__ import annotations

import numpy as np
from PIL import Image

__all__ = ["focus_at_common_edges", "focus_in_mask"]

# Low and high threshold of the gradient, in gray levels of 8 bits, from strict to lenient.
EDGE_THRESHOLDS = ((20, 170), (20, 120), (20, 40))
# Edges of the lens picture lie up to this far beside those of the photograph.
EDGE_SIZE = 5
# Subjects are looked for in the middle first: these shares of both sides, then everywhere.
CENTRES = ((0.4, 0.6), (0.3, 0.7), (0.0, 1.0))
# At outlines a map may mean the background; what is farther than the mean edge by more is left out.
FARTHER_THAN_MEAN = 0.05
FEWEST_PIXELS = 6


def focus_in_mask(disparity: np.ndarray, mask: np.ndarray) -> float:
    """Median disparity where the mask is above one half; of the central fifth if it is nowhere.

    disparity (H, W) in [0, 1], larger is nearer; mask (H, W) in [0, 1].
    """
    inside = disparity[mask > 0.5]
    return float(np.median(inside if inside.size else disparity[_centre(disparity, 0.4, 0.6)]))


def focus_at_common_edges(disparity: np.ndarray, image: np.ndarray, truth: np.ndarray) -> float:
    """Disparity of the edges that the photograph and the lens picture both have: those in focus.

    Canny edges (gradient by Sobel, no smoothing, gray levels; thresholds 20 and 170, or 20 and
    120, or 20 and 40 if no edge is in both) of both pictures, made 5 x 5 pixels wide, where they
    meet; in the middle fifth of both sides, else the middle two fifths, else everywhere. The focus
    is the median of their disparities, without those that are smaller than the mean by more than
    0.05 (0.1 if that leaves fewer than 6 pixels). The central fifth if there are no such edges.

    disparity (H, W) in [0, 1], larger is nearer; image, truth (H, W, 3) uint8 sRGB.
    """
    for low, high in EDGE_THRESHOLDS:
        edges = _wide_edges(image, low, high) & _wide_edges(truth, low, high)
        if edges.any():
            break
    else:
        return float(np.median(disparity[_centre(disparity, 0.4, 0.6)]))
    for centre in CENTRES:
        box = _centre(disparity, *centre)
        if edges[box].any():
            at_edges = disparity[box][edges[box]]
            break
    kept = at_edges[at_edges >= at_edges.mean() - FARTHER_THAN_MEAN]
    if kept.size < FEWEST_PIXELS:
        kept = at_edges[at_edges >= at_edges.mean() - 2 * FARTHER_THAN_MEAN]
    return float(np.median(kept))


def _wide_edges(picture: np.ndarray, low: float, high: float) -> np.ndarray:
    from scipy.ndimage import binary_dilation
    from skimage.feature import canny

    gray = np.asarray(Image.fromarray(picture).convert("L"), np.float32)
    edges = canny(gray, sigma=0, low_threshold=low, high_threshold=high)
    return binary_dilation(edges, np.ones((EDGE_SIZE, EDGE_SIZE), bool))


def _centre(array: np.ndarray, start: float, end: float) -> tuple[slice, slice]:
    """Rows and columns between these shares of both sides; at least one of each."""
    rows, columns = (
        slice(int(start * side), max(round(end * side), int(start * side) + 1))
        for side in array.shape[:2]
    )
    return rows, columns

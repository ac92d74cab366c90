"""A fast preview of lens blur: the slices of the layered renderer, wide blur on coarse grids."""

from __future__ import annotations

import functools

import torch

from bokehdiff.rendering.aperture import Aperture
from bokehdiff.rendering.frame import check_blur_arguments
from bokehdiff.rendering.layered import Slice, blur_picture, slice_levels
from bokehdiff.rendering.sources import sources_of_picture

__all__ = ["pyramid_blur"]

# Slices are farther apart than those of the exact renderer.
SLICE_PIXELS = 1.0
SLICE_SHARE = 0.2
# A slice is spread on cells of twice the side as soon as its radius is still this many cells.
RADIUS_CELLS = 4.0
HIDDEN_CELL = 4


def pyramid_blur(
    light: torch.Tensor, signed_defocus: torch.Tensor, *, aperture: Aperture | None = None
) -> torch.Tensor:
    """Blurred picture (B, C, H, W) in linear light, for looking at while one turns the focus ring.

    Arguments, errors and gradients as those of :func:`bokehdiff.rendering.layered.layered_blur`,
    from which it differs in four ways: a slice of radius r is spread on cells of r/8 to r/4 pixels,
    so that rims of wide discs are soft; there are fewer slices; the lens is not cut into parts; and
    what is hidden is guessed more coarsely. So the work hardly grows with the blur.
    """
    check_blur_arguments(light, signed_defocus)
    aperture = aperture or Aperture()
    find = functools.partial(sources_of_picture, hidden_cell=HIDDEN_CELL)
    blurred = [
        blur_picture(picture, defocus[0], aperture, coarse_slices(defocus), 1, find)
        for picture, defocus in zip(light, signed_defocus, strict=True)
    ]
    return torch.stack(blurred)


def coarse_slices(defocus: torch.Tensor) -> list[Slice]:
    """Slices whose radius is at most eight cells."""
    slices = []
    for level in slice_levels(defocus, SLICE_PIXELS, SLICE_SHARE):
        cell = 1
        while abs(level) >= 2 * cell * RADIUS_CELLS:
            cell *= 2
        slices.append(Slice(level, cell))
    return slices

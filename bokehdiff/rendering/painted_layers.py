"""Lens blur in a few layers of defocus, painted over one another from the farthest to the nearest.

What is near hides what is far: a sharp foreground keeps its rim before a blurred background, and a
blurred foreground is seen through. With so few layers it is made for networks that are trained
through it: differentiable everywhere, in light and in defocus. What is hidden is not guessed.
"""

from __future__ import annotations

import math

import torch

from bokehdiff.rendering.aperture import Aperture
from bokehdiff.rendering.defocus_levels import DefocusLevels
from bokehdiff.rendering.frame import check_blur_arguments

__all__ = ["layer_levels", "painted_layers_blur"]

FEWEST_LAYERS = 3


def painted_layers_blur(
    light: torch.Tensor,
    signed_defocus: torch.Tensor,
    *,
    aperture: Aperture | None = None,
    layers: int = 8,
) -> torch.Tensor:
    """Blurred picture, like ``light``: layers of signed defocus, each painted over those behind.

    With w_l the share of a pixel in layer l (:func:`bokehdiff.rendering.defocus_levels.
    share_of_level`), k_l the kernel of the opening there and * the convolution, layer l brings the
    light ``C_l = k_l * (w_l light)`` and hides ``A_l = k_l * w_l``. From the farthest behind the
    plane in focus to the nearest before it ``out <- out (1 - A_l) + C_(l-1)``, where the last C
    comes on top, and the same for a white picture, by which the result is divided. A layer does not
    hide its neighbour, for surfaces between two layers are shared by them: if it did, their circles
    would be too small behind the focus and too large before it.

    Args:
        light: (B, C, H, W) linear light, float32 or float64 (kept).
        signed_defocus: (B, 1, H, W) signed radius of the circle of confusion in pixels, positive
            nearer than the plane in focus: ``K * (disparity - df)``.
        aperture: the opening; default disc. Its ``fringe`` is not looked at, because one defocus
            serves all channels.
        layers: at least 3; see :func:`layer_levels`. Time grows with their number.

    The outermost pixels are repeated beyond the frame.

    Raises:
        ValueError: arguments that do not fit, or an opening with a cat-eye.
    """
    check_blur_arguments(light, signed_defocus)
    if layers < FEWEST_LAYERS:
        raise ValueError(
            f"layers is {layers!r}; wanted at least {FEWEST_LAYERS}: one in focus, one before it "
            "and one behind."
        )
    pictures = zip(light.split(1), signed_defocus.split(1), strict=True)
    return torch.cat([_paint(*picture, aperture, layers) for picture in pictures])


def _paint(
    light: torch.Tensor, defocus: torch.Tensor, aperture: Aperture | None, layers: int
) -> torch.Tensor:
    """(1, C, H, W) of one picture."""
    levels = DefocusLevels(light, defocus, layer_levels(defocus, layers), aperture)
    neighbour = torch.zeros_like(levels.channels[..., : light.shape[2], : light.shape[3]])
    painted = neighbour
    for spectra in levels.spectra():
        for arriving in levels.picture(spectra).unbind(1):
            painted = painted * (1 - arriving[:, -1:]) + neighbour
            neighbour = arriving
    return levels.divided(painted + neighbour)


def layer_levels(signed_defocus: torch.Tensor, layers: int) -> list[float]:
    """Signed defocus of the layers, ascending, from the farthest pixel to the nearest.

    On each side of the focus they lie evenly in the square root of the radius, for a mixture of two
    discs is seen most where one of them is sharp. One layer is exactly in focus if the pixels lie
    on both sides of it. The ends are whole pixels, so that layers stay where they are when the
    defocus changes a little, as derivatives take for granted. At least two layers come back, and
    no more than there are steps of one pixel.
    """
    lowest = math.floor(float(signed_defocus.detach().min()))
    highest = max(math.ceil(float(signed_defocus.detach().max())), lowest + 1)
    start, stop = (math.copysign(math.sqrt(abs(end)), end) for end in (lowest, highest))
    steps = min(layers - 1, highest - lowest)
    if start < 0 < stop:
        behind = min(max(round(steps * -start / (stop - start)), 1), steps - 1)
        roots = [start * number / behind for number in range(behind, 0, -1)]
        before = steps - behind
        roots += [stop * number / before for number in range(before + 1)]
    else:
        roots = [start + (stop - start) * number / steps for number in range(steps + 1)]
    return [root * abs(root) for root in roots]

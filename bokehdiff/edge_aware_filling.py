"""A measured map made whole: where it is unreliable, values come from reliable places around.

The map x sought from the measured d with reliability r minimises, over pixels i and pairs of
neighbours i, j,

    ``sum_i w_i (x_i - d_i)^2 + sum_ij a_ij (x_i - x_j)^2``, ``w = r / (1 - r)``,
    ``a_ij = exp(-|I_i - I_j|^2 / 2 c^2)``

where I are the colours of the photograph. If ``r = 1 / (1 + v)`` for a variance v, as that of
:mod:`bokehdiff.blur_sweep` is, then w is 1 / v: reliable pixels hardly move, and what is unknown
spreads over surfaces and stops at their edges. The linear equations are solved by conjugate
gradients on ever finer grids, each begun with the solution of the coarser one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .grids import pooled

__all__ = ["fill_unreliable"]

# c, in display-encoded colour: less than the contrast of edges, more than that of grain.
COLOUR_DEVIATION = 0.05
# Of a: a little leaks across the strongest edge, so that no place is cut off from what is known.
SMALLEST_CONDUCTANCE = 1e-4
# A pixel never counts more: the equations would become stiff, and nothing would be won.
LARGEST_WEIGHT = 100.0
# Conjugate gradients on each grid: what the coarser grid could not know is local.
ITERATIONS = 160
COARSEST_SIDE = 8


def fill_unreliable(
    values: torch.Tensor, reliability: torch.Tensor, image: torch.Tensor
) -> torch.Tensor:
    """Returns (B, 1, H, W): the values where they are reliable, filled from there elsewhere.

    No value lies outside the range of those with a reliability above 0.

    Args:
        values: (B, 1, H, W), finite where the reliability is above 0.
        reliability: (B, 1, H, W) in [0, 1].
        image: (B, 3, H, W) photograph, display-encoded in [0, 1].

    Raises:
        ValueError: shapes that do not fit, or a picture without a reliable pixel.
    """
    batch, _, height, width = image.shape
    if not values.shape == reliability.shape == (batch, 1, height, width):
        raise ValueError(
            f"values have shape {tuple(values.shape)}, reliability {tuple(reliability.shape)}; "
            f"wanted {(batch, 1, height, width)}, as the image."
        )
    known = reliability > 0
    if not bool(known.flatten(1).any(dim=1).all()):
        raise ValueError("A picture has no reliable pixel to fill from; wanted at least one.")
    filled = [
        _filled(*one)
        for one in zip(values.split(1), reliability.split(1), image.split(1), strict=True)
    ]
    return torch.cat(filled)


def _filled(values: torch.Tensor, reliability: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    known = reliability > 0
    weight = (reliability / (1 - reliability).clamp_min(1e-6)).clamp(max=LARGEST_WEIGHT)
    measured = torch.where(known, values, 0)
    solved = _solved(weight, weight * measured, image.to(values))
    return solved.clamp(values[known].min(), values[known].max())


def _solved(weight: torch.Tensor, weighted: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """The minimum, (1, 1, h, w), for ``weight`` and ``weight * values`` of this grid."""
    height, width = weight.shape[-2:]
    if max(height, width) <= COARSEST_SIDE:
        begin = torch.full_like(weight, float(weighted.sum() / weight.sum()))
    else:
        # Sums over cells: four pixels that know count four times.
        known, sums = (4 * pooled(part, 2) for part in (weight, weighted))
        coarse = _solved(known, sums, F.interpolate(image, known.shape[-2:], mode="area"))
        begin = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    down = _conductance(image[..., 1:, :] - image[..., :-1, :])
    right = _conductance(image[..., 1:] - image[..., :-1])
    diagonal = weight.clone()
    for part, sides in ((down, (0, 0, 1, 0)), (down, (0, 0, 0, 1))):
        diagonal += F.pad(part, sides)
    for part, sides in ((right, (1, 0, 0, 0)), (right, (0, 1, 0, 0))):
        diagonal += F.pad(part, sides)

    def apply(x: torch.Tensor) -> torch.Tensor:
        """The matrix of the equations times x."""
        vertical = down * (x[..., 1:, :] - x[..., :-1, :])
        horizontal = right * (x[..., 1:] - x[..., :-1])
        result = weight * x
        result[..., 1:, :] += vertical
        result[..., :-1, :] -= vertical
        result[..., 1:] += horizontal
        result[..., :-1] -= horizontal
        return result

    return _conjugate_gradients(apply, weighted, begin, diagonal)


def _conductance(contrast: torch.Tensor) -> torch.Tensor:
    """a of pairs of pixels whose colours (1, 3, h, w) differ so much."""
    squares = contrast.square().sum(dim=1, keepdim=True)
    return torch.exp(-squares / (2 * COLOUR_DEVIATION**2)).clamp_min(SMALLEST_CONDUCTANCE)


def _conjugate_gradients(
    apply: Callable[[torch.Tensor], torch.Tensor],
    wanted: torch.Tensor,
    begin: torch.Tensor,
    diagonal: torch.Tensor,
) -> torch.Tensor:
    """x with ``apply(x) = wanted``, from ``begin``; the diagonal of the matrix preconditions."""
    x = begin
    residual = wanted - apply(x)
    enough = 1e-12 * float((wanted.square() / diagonal).sum())
    scaled = residual / diagonal
    direction = scaled
    product = float((residual * scaled).sum())
    for _ in range(ITERATIONS):
        if product <= enough:
            break
        image = apply(direction)
        step = product / float((direction * image).sum())
        x = x + step * direction
        residual = residual - step * image
        scaled = residual / diagonal
        before, product = product, float((residual * scaled).sum())
        direction = scaled + product / before * direction
    return x

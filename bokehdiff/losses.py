"""Training losses: how far a rendered photograph is from the photograph a lens would have made.

Every function takes display-encoded sRGB images of shape (B, 3, H, W) in [-1, 1] and returns one
scalar, a mean over all elements, so that values do not depend on the batch or the crop size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RECONSTRUCTION_KINDS = ("mse", "l1", "charbonnier")
EDGE_VARIANTS = ("official", "paper")
CHARBONNIER_EPSILON = 1e-3


def reconstruction(prediction: Tensor, target: Tensor, kind: str = "mse") -> Tensor:
    """Return the mean pixel-wise distance of `prediction` from `target`, a scalar.

    With e = prediction - target, the mean over all elements is taken of

    - ``"mse"``: ``e^2`` (the paper's reconstruction term),
    - ``"l1"``: ``|e|``,
    - ``"charbonnier"``: ``sqrt(e^2 + 0.001^2)``, an absolute value that is smooth at zero.

    Args:
        prediction: (B, 3, H, W), not clamped, so that values outside [-1, 1] are pulled back.
        target: (B, 3, H, W) in [-1, 1].
        kind: one of ``RECONSTRUCTION_KINDS``.

    Raises:
        ValueError: shapes differ, or `kind` is unknown.
    """
    _check_same_shape(prediction=prediction, target=target)
    error = prediction - target
    if kind == "mse":
        return error.square().mean()
    if kind == "l1":
        return error.abs().mean()
    if kind == "charbonnier":
        return (error.square() + CHARBONNIER_EPSILON**2).sqrt().mean()
    raise ValueError(
        f"The reconstruction loss {kind!r} is unknown. Choose one of {RECONSTRUCTION_KINDS}."
    )


def multi_scale_edge_loss(
    prediction: Tensor,
    target: Tensor,
    all_in_focus: Tensor,
    levels: int = 3,
    variant: str = "official",
) -> Tensor:
    """Return how much the edges of `prediction` differ from those of `target`, a scalar.

    Errors count more where the target or the all-in-focus photograph has an edge, so that an edge
    left sharp and an edge blurred too much both cost. With p, b, f for the three images:

    - ``"official"``, the form the published training script uses. At level l the images are
      reduced to 1/l of their size by area averaging, and g is the forward difference along one
      axis::

          sum over l = 1..levels and both axes of
              (1 / l) * mean(|g(p_l) - g(b_l)| * (1 + max(|g(b_l)|, |g(f_l)|)))

    - ``"paper"``, Equation 10 of the BokehDiff paper. The images keep their size, and G_l is the
      extended Sobel derivative of (2 l + 1) x (2 l + 1) pixels (see `extended_sobel_kernel`)::

          sum over l = 1..levels and both axes of
              (1 / l^2) * mean(|G_l(p) - G_l(b)| * max(|G_l(b)|, |G_l(f)|))

      The paper speaks of "kernel size l", which leaves no derivative at l = 1; l is read as the
      half width.

    Args:
        prediction: (B, 3, H, W). Training clamps it to [-1, 1] first, as the authors do.
        target: (B, 3, H, W), the photograph with lens blur.
        all_in_focus: (B, 3, H, W), the photograph everything is sharp in.
        levels: number of scales, at least 1.
        variant: one of ``EDGE_VARIANTS``.

    Raises:
        ValueError: shapes differ, the image is too small for the coarsest level, or `variant` is
        unknown.
    """
    _check_same_shape(prediction=prediction, target=target, all_in_focus=all_in_focus)
    if variant not in EDGE_VARIANTS:
        raise ValueError(
            f"The edge loss variant {variant!r} is unknown. Choose one of {EDGE_VARIANTS}."
        )
    if levels < 1:
        raise ValueError(f"The edge loss needs at least one level, got levels={levels}.")
    height, width = prediction.shape[-2:]
    smallest_side = 2 * levels if variant == "official" else 2 * levels + 1
    if min(height, width) < smallest_side:
        raise ValueError(
            f"An edge loss with {levels} levels needs images of at least {smallest_side} pixels a "
            f"side, got {height} x {width}. Use fewer levels or larger crops."
        )

    total = prediction.new_zeros(())
    for level in range(1, levels + 1):
        if variant == "official":
            size = (height // level, width // level)
            gradients = [
                _forward_differences(image if level == 1 else F.adaptive_avg_pool2d(image, size))
                for image in (prediction, target, all_in_focus)
            ]
            level_weight, flat_region_weight = 1.0 / level, 1.0
        else:
            gradients = [
                _sobel_differences(image, level) for image in (prediction, target, all_in_focus)
            ]
            level_weight, flat_region_weight = 1.0 / level**2, 0.0
        for of_prediction, of_target, of_all_in_focus in zip(*gradients, strict=True):
            edge_strength = torch.maximum(of_target.abs(), of_all_in_focus.abs())
            difference = (of_prediction - of_target).abs()
            total = (
                total + level_weight * (difference * (flat_region_weight + edge_strength)).mean()
            )
    return total


def extended_sobel_kernel(half_width: int) -> Tensor:
    """Return the (2 n + 1, 2 n + 1) float64 kernel of the horizontal derivative, for half width n.

    The weight at offset (x, y) is ``x / (x^2 + y^2)``, which for n = 1 is the Sobel kernel with
    corners of a half beside a centre of one. Scaled so that an image rising by 1 per pixel gives
    1.
    """
    offsets = torch.arange(-half_width, half_width + 1, dtype=torch.float64)
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    squared_distance = x.square() + y.square()
    kernel = torch.where(squared_distance > 0, x / squared_distance.clamp_min(1), 0.0)
    return kernel / (kernel * x).sum()


def _forward_differences(image: Tensor) -> tuple[Tensor, Tensor]:
    """(vertical (B, C, H-1, W), horizontal (B, C, H, W-1)) differences of neighbouring pixels."""
    return image[..., 1:, :] - image[..., :-1, :], image[..., :, 1:] - image[..., :, :-1]


def _sobel_differences(image: Tensor, half_width: int) -> tuple[Tensor, Tensor]:
    """(vertical, horizontal) extended Sobel derivatives, each (B, C, H - 2 n, W - 2 n)."""
    kernel = extended_sobel_kernel(half_width).to(image)
    pair = torch.stack([kernel.T, kernel])[:, None]
    channels = image.shape[1]
    derivatives = F.conv2d(image, pair.repeat(channels, 1, 1, 1), groups=channels)
    return derivatives[:, 0::2], derivatives[:, 1::2]


def _check_same_shape(**images: Tensor) -> None:
    shapes = {name: tuple(image.shape) for name, image in images.items()}
    if len(set(shapes.values())) != 1 or any(len(shape) != 4 for shape in shapes.values()):
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"A loss compares images of one shape (B, 3, H, W), got {listed}.")

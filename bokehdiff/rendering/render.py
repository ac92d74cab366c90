"""Classical lens blur of a photograph with a disparity map: the one call for every method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bokehdiff.images import as_disparity_batch, as_image_batch, linear_to_srgb, srgb_to_linear
from bokehdiff.optics import check_focus_and_strength, signed_defocus
from bokehdiff.rendering.aperture import Aperture
from bokehdiff.rendering.scatter import depth_ordered_scatter

__all__ = ["METHODS", "render_bokeh"]

Renderer = Callable[[torch.Tensor, torch.Tensor, Aperture], torch.Tensor]


def _scatter(light: torch.Tensor, defocus: torch.Tensor, aperture: Aperture) -> torch.Tensor:
    return depth_ordered_scatter(light, defocus, aperture=aperture)


METHODS: dict[str, Renderer] = {"scatter": _scatter}
"""Renderers by name: (linear light (B, 3, H, W), signed defocus in pixels (B, 1, H, W), aperture)
to blurred linear light (B, 3, H, W)."""

# Up to this radius a disc covers no pixel centre but its own.
SHARP_RADIUS = 0.5


def render_bokeh(
    image: Any,
    disparity: Any,
    df: float | torch.Tensor,
    K: float | torch.Tensor,
    *,
    aperture: Aperture | None = None,
    method: str = "scatter",
    metric: bool = False,
) -> torch.Tensor:
    """Returns the blurred photograph, (B, 3, H, W) float32 display-encoded sRGB in [0, 1].

    The circle of confusion has a radius of ``K * |disparity - df|`` pixels of ``image``; light is
    added up in linear light. An image that nowhere exceeds half a pixel of blur (K=0, or all in
    focus) comes back unchanged. Differentiable in ``image`` given as a tensor.

    Args:
        image: all-in-focus photograph(s), tensor (B, 3, H, W) sRGB in [0, 1] or anything
            :func:`bokehdiff.images.as_image_batch` takes.
        disparity: (B, 1, H, W), larger is nearer, or anything
            :func:`bokehdiff.images.as_disparity_batch` takes; in [0, 1], or 1/metres (``metric``).
        df: disparity of the plane in focus; a number, or one per image.
        K: pixels of blur radius per unit of disparity; a number, or one per image.
        aperture: shape of the lens opening; default a circle.
        method: ``"scatter"``: depth-ordered scatter, see :mod:`bokehdiff.rendering.scatter`.
        metric: disparity and df are in 1/metres.

    Raises:
        ValueError: unknown method; arguments that do not fit each other or make no sense.

    Example:
        >>> photo, disparity = torch.rand(1, 3, 32, 48), torch.rand(1, 1, 32, 48)
        >>> render_bokeh(photo, disparity, df=0.5, K=8.0, aperture=Aperture(blades=6)).shape
        torch.Size([1, 3, 32, 48])
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; wanted one of {', '.join(map(repr, METHODS))}.")
    if aperture is not None and not isinstance(aperture, Aperture):
        raise ValueError(
            f"aperture is {aperture!r}; wanted a bokehdiff.rendering.Aperture, for instance "
            "Aperture(blades=6), or None for a circle."
        )
    photo = as_image_batch(image)
    batch, _, height, width = photo.shape
    nearness = as_disparity_batch(disparity, batch, height, width, metric=metric).to(photo.device)
    focus, strength = check_focus_and_strength(df, K, batch, metric=metric)
    defocus = signed_defocus(nearness, focus.to(photo.device), strength.to(photo.device))
    blurred = METHODS[method](srgb_to_linear(photo), defocus, aperture or Aperture())
    blurred = linear_to_srgb(blurred).clamp(0, 1)
    # sRGB there and back costs a rounding error, which an unblurred photograph need not pay.
    sharp = defocus.abs().amax(dim=(1, 2, 3), keepdim=True) <= SHARP_RADIUS
    return torch.where(sharp, photo, blurred)

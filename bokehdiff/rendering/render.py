"""Classical lens blur of a photograph with a disparity map: the one call for every method."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bokehdiff.images import (
    as_disparity_batch,
    as_image_batch,
    linear_to_srgb,
    read_linear_image,
    srgb_to_linear,
)
from bokehdiff.optics import check_focus_and_strength, signed_defocus
from bokehdiff.rendering.aperture import Aperture
from bokehdiff.rendering.highlights import HighlightBoost, recover_highlights
from bokehdiff.rendering.layered import layered_blur
from bokehdiff.rendering.pyramid import pyramid_blur
from bokehdiff.rendering.scatter import depth_ordered_scatter

__all__ = ["METHODS", "render_bokeh"]

METHODS: dict[str, Callable[..., torch.Tensor]] = {
    "layered": layered_blur,
    "scatter": depth_ordered_scatter,
    "pyramid": pyramid_blur,
}
"""Renderers by name, the best first: (linear light (B, C, H, W), signed defocus in pixels (B, 1, H,
W), ``aperture=``) to blurred linear light (B, C, H, W)."""


def render_bokeh(
    image: Any,
    disparity: Any,
    df: float | torch.Tensor,
    K: float | torch.Tensor,
    *,
    aperture: Aperture | None = None,
    method: str = "layered",
    highlights: str | HighlightBoost | None = None,
    metric: bool = False,
) -> torch.Tensor:
    """Returns the blurred photograph, (B, 3, H, W) float32 display-encoded sRGB in [0, 1].

    The circle of confusion has a radius of ``K * |disparity - df|`` pixels of ``image``; light is
    added up in linear light. An image without any blur (K=0, or all in focus) comes back unchanged.
    Differentiable in ``image`` given as a tensor; with ``"layered"`` and ``"pyramid"`` also in
    ``df``, ``K`` and ``disparity`` given as tensors.

    Args:
        image: all-in-focus photograph(s), tensor (B, 3, H, W) sRGB in [0, 1] or anything
            :func:`bokehdiff.images.as_image_batch` takes.
        disparity: (B, 1, H, W), larger is nearer, or anything
            :func:`bokehdiff.images.as_disparity_batch` takes; in [0, 1], or 1/metres (``metric``).
        df: disparity of the plane in focus; a number, or one per image.
        K: pixels of blur radius per unit of disparity; a number, or one per image.
        aperture: shape of the lens opening; default a circle.
        method: ``"layered"``, the most faithful (:mod:`bokehdiff.rendering.layered`);
            ``"scatter"``, every pixel on its own, without a guess of what is hidden
            (:mod:`bokehdiff.rendering.scatter`); ``"pyramid"``, a fast preview
            (:mod:`bokehdiff.rendering.pyramid`).
        highlights: ``"boost"``, or a :class:`HighlightBoost` with your threshold and gain, gives
            clipped highlights light back before they are blurred. ``"hdr"``: ``image`` is linear
            light, not negative, 1 is white and lamps are brighter; (B, 3, H, W) or (3, H, W)
            tensor, (H, W, 3) array, or a file for :func:`bokehdiff.images.read_linear_image`. The
            result then is linear light too, not clipped.
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
    if not (highlights in (None, "boost", "hdr") or isinstance(highlights, HighlightBoost)):
        raise ValueError(
            f"highlights is {highlights!r}; wanted None, 'boost', 'hdr' (the image is linear "
            "light) or a bokehdiff.rendering.HighlightBoost."
        )
    aperture = aperture or Aperture()
    linear = highlights == "hdr"
    photo = _as_linear_batch(image) if linear else as_image_batch(image)
    batch, _, height, width = photo.shape
    nearness = as_disparity_batch(disparity, batch, height, width, metric=metric).to(photo.device)
    focus, strength = check_focus_and_strength(df, K, batch, metric=metric)
    focus, strength = focus.to(photo.device), strength.to(photo.device)
    if linear:
        light = photo
    elif highlights is None:
        light = srgb_to_linear(photo)
    else:
        boost = highlights if isinstance(highlights, HighlightBoost) else HighlightBoost()
        light = recover_highlights(photo, boost)

    blur = METHODS[method]
    if aperture.fringe == 0:
        defocus = signed_defocus(nearness, focus, strength)
        blurred = blur(light, defocus, aperture=aperture)
        largest = defocus.detach().abs()
    else:  # every colour has its own plane in focus
        defoci = [signed_defocus(nearness, f, strength) for f in aperture.channel_focus(focus)]
        channels = zip(light.split(1, dim=1), defoci, strict=True)
        blurred = torch.cat([blur(one, d, aperture=aperture) for one, d in channels], dim=1)
        largest = torch.cat(defoci, dim=1).detach().abs()
    if not linear:
        blurred = linear_to_srgb(blurred).clamp(0, 1)
    # sRGB there and back costs a rounding error, which an unblurred photograph need not pay.
    sharp = largest.amax(dim=(1, 2, 3), keepdim=True) == 0
    return torch.where(sharp, photo, blurred)


def _as_linear_batch(image: Any) -> torch.Tensor:
    """(B, 3, H, W) float32 linear light from what ``highlights="hdr"`` accepts."""
    if isinstance(image, (str, os.PathLike)):
        return read_linear_image(image)
    wanted = "wanted linear light: a float tensor (B, 3, H, W) or array (H, W, 3)"
    if isinstance(image, np.ndarray) and image.ndim == 3:
        image = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    if not isinstance(image, torch.Tensor):
        raise ValueError(f"With highlights='hdr' image is a {type(image).__name__}; {wanted}.")
    light = image[None] if image.dim() == 3 else image
    if light.dim() != 4 or light.shape[1] != 3 or 0 in light.shape:
        raise ValueError(f"With highlights='hdr' image has shape {tuple(image.shape)}; {wanted}.")
    if not light.is_floating_point():
        raise ValueError(
            f"With highlights='hdr' image is {image.dtype}; {wanted}. An 8- or 16-bit photograph "
            "is display-encoded: leave highlights=None, or take highlights='boost'."
        )
    light = light.to(torch.float32)
    if not bool(torch.isfinite(light).all()) or float(light.detach().min()) < 0:
        raise ValueError(
            "With highlights='hdr' image has negative, NaN or infinite light; " + wanted
        )
    return light

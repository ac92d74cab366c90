"""The circle of confusion painted over a photograph, to see what a lens setting will blur."""

from __future__ import annotations

import torch

from .images import ImageInput, as_image_batch

__all__ = ["coc_overlay"]

IN_FOCUS = (0.0, 0.8, 0.2)
IN_FRONT = (0.1, 0.3, 1.0)
BEHIND = (1.0, 0.15, 0.1)
"""Display sRGB of the paint: green, blue, red."""

SHARP_RADIUS_PX = 0.5
"""A circle that does not leave its pixel."""

LEAST_OPACITY, GREATEST_OPACITY = 0.1, 0.65
LUMINANCE_OF_SRGB = (0.2126, 0.7152, 0.0722)


def coc_overlay(
    image: ImageInput, signed_defocus: torch.Tensor, full_radius_px: float | None = None
) -> torch.Tensor:
    """Returns the photo in gray with its blur painted over: (B, 3, H, W) display sRGB in [0, 1].

    Each pixel is ``gray + opacity * (paint - gray)``. With r = |signed_defocus|: **green** in
    focus, opacity 0.65 where r is at most half a pixel, fading away to r = 1; **blue** in front of
    the plane in focus and **red** behind it, from r = 1 on with opacity ``0.1 + 0.55 * sqrt(r /
    full_radius_px)``, at most 0.65, fading in from r = 1/2. Gray is the luma of the photo, so that
    every colour seen is blur, and the picture stays readable beneath.

    Args:
        image: the photo, (B, 3, H, W) display sRGB in [0, 1], or anything
            :func:`~bokehdiff.images.as_image_batch` takes.
        signed_defocus: (B, 1, H, W) radius in pixels, positive nearer than the plane in focus; one
            photo may come with many of them, and many photos with one.
        full_radius_px: radius of the strongest paint. Default: 2 % of the long side of the photo,
            20 px of 1000, so that a photo looks the same at every size.

    Raises:
        ValueError: sizes or numbers of photos that do not fit, NaN, or a radius that is not
            positive.
    """
    photo = as_image_batch(image)
    height, width = photo.shape[-2:]
    if signed_defocus.ndim != 4 or signed_defocus.shape[1] != 1:
        raise ValueError(
            f"signed_defocus has shape {tuple(signed_defocus.shape)}; wanted (B, 1, H, W)."
        )
    if signed_defocus.shape[-2:] != photo.shape[-2:]:
        raise ValueError(
            f"The signed defocus is {signed_defocus.shape[-1]} x {signed_defocus.shape[-2]} pixels "
            f"(width x height), the photograph {width} x {height}; wanted the same size."
        )
    counts = {photo.shape[0], signed_defocus.shape[0]} - {1}
    if len(counts) > 1:
        raise ValueError(
            f"There are {signed_defocus.shape[0]} maps of defocus for {photo.shape[0]} "
            "photographs; wanted one for each, or one for all."
        )
    if bool(torch.isnan(signed_defocus).any()):
        raise ValueError(
            "The signed defocus has NaN pixels; fill the disparity map first "
            "(bokehdiff.images.fill_holes)."
        )
    full = 0.02 * max(height, width) if full_radius_px is None else full_radius_px
    if not full > 0:
        raise ValueError(f"full_radius_px is {full_radius_px}; wanted pixels, more than 0.")

    defocus = signed_defocus.to(photo)
    radius = defocus.abs()
    blurred = ((radius - SHARP_RADIUS_PX) / SHARP_RADIUS_PX).clamp(0, 1)
    growth = (radius / full).clamp(max=1).sqrt()
    opacity = LEAST_OPACITY + (GREATEST_OPACITY - LEAST_OPACITY) * growth
    sides = torch.where(defocus > 0, _paint(photo, IN_FRONT), _paint(photo, BEHIND))
    luminance = (photo * _paint(photo, LUMINANCE_OF_SRGB)).sum(dim=1, keepdim=True)
    painted = torch.lerp(luminance, sides, opacity * blurred)
    return torch.lerp(painted, _paint(photo, IN_FOCUS), GREATEST_OPACITY * (1 - blurred)).clamp(
        0, 1
    )


def _paint(photo: torch.Tensor, colour: tuple[float, float, float]) -> torch.Tensor:
    return photo.new_tensor(colour).reshape(1, 3, 1, 1)

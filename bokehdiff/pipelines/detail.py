"""What a lens does not touch: keeping the photo's own pixels where nothing is out of focus.

A learned codec loses a little on the way through the latents, and a network changes a little even
where it should change nothing. Both are undone here where optics says that the picture must stay.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..windows import Window, in_windows, put, windows_of

IN_FOCUS_RADIUS = 0.5
"""CoC radius in pixels under which a point of light stays on its own pixel."""

RESIDUAL_GONE_RADIUS = 1.5
"""CoC radius in pixels from which none of the codec's residual is put back."""

PHOTO_GONE_RADIUS = 1.0
"""CoC radius in pixels from which a pixel is never copied from the photo."""

SILHOUETTE_MARGIN = 1.0
"""Pixels around anything blurred that may hold a mixture of sharp and blurred surfaces."""

SILHOUETTE_FADE = 2.0
"""Pixels beyond the margin over which the photo fades in."""

REACH_STEPS = 8
"""Steps in which light spreads over the coarse grid of :func:`blurred_light_depth`."""

WINDOW_PIXELS = 256
"""Side of the windows in which pictures are worked on; what is held of them stays in the caches."""


def fade_out(values: torch.Tensor, start: float, end: float) -> torch.Tensor:
    """1 up to ``start``, 0 from ``end``, a smooth cubic between; same shape as ``values``."""
    position = ((values - start) / (end - start)).clamp(0, 1)
    return 1 - position * position * (3 - 2 * position)


def residual_weight(coc_radius: torch.Tensor) -> torch.Tensor:
    """Share of the codec's residual that is put back, in [0, 1], by the pixel's own blur.

    Args:
        coc_radius: circle-of-confusion radius in pixels, any shape.

    Returns:
        1 where the radius is under half a pixel, fading smoothly to 0 at 1.5 pixels.
    """
    return fade_out(coc_radius, IN_FOCUS_RADIUS, RESIDUAL_GONE_RADIUS)


def blurred_light_depth(signed_defocus: torch.Tensor) -> torch.Tensor:
    """How deep each pixel lies inside the nearest disc of blurred light, in pixels.

    Each pixel nearer than the focal plane by more than half a pixel of blur spreads over a disc of
    its own radius. The result is the maximum over these pixels of (radius - distance): positive
    where light arrives, negative the distance to it. Pixels behind the focal plane count with
    radius 0: a surface in focus hides all that lies behind it, because every ray that ends on its
    sensor pixel passes through the surface at that one point; only mixed pixels of the silhouette
    are concerned.

    The maximum is taken on a grid of cells, an eighth of the largest disc, at least two pixels
    wide, with square neighbourhoods. Each of the two errs towards *more* light, by up to about two
    cells and by 41 % of the radius in the corners. The cost does not depend on the radius.

    Args:
        signed_defocus: (B, 1, H, W), CoC radius in pixels, positive nearer than the focal plane.

    Returns:
        (B, 1, H, W), pixels; a large negative number where nothing blurred is anywhere near.
    """
    lights = [BlurredLight(one) for one in signed_defocus.split(1)]
    return torch.cat([in_windows(light.depth, light.windows) for light in lights])


class BlurredLight:
    """:func:`blurred_light_depth` and :func:`untouched_weight` of one picture, window by window.

    Args:
        signed_defocus: (1, 1, H, W), CoC radius in pixels, positive nearer than the focal plane.

    Attributes:
        windows: windows of the picture that cut no cell.
    """

    def __init__(self, signed_defocus: torch.Tensor) -> None:
        height, width = signed_defocus.shape[-2:]
        reach = max(float(signed_defocus.max()), 0.0) + SILHOUETTE_MARGIN + SILHOUETTE_FADE
        self._signed_defocus = signed_defocus
        self.cell = cell = max(2, -(-int(reach) // REACH_STEPS))
        self.windows = windows_of(height, width, -(-WINDOW_PIXELS // cell) * cell)

        cells = None
        for window in self.windows:
            defocus = window.crop(signed_defocus)
            radius = torch.where(defocus.abs() > IN_FOCUS_RADIUS, defocus.clamp(min=0), -torch.inf)
            cells = put(cells, window, F.max_pool2d(radius, cell, ceil_mode=True), cell)
        assert cells is not None, "no windows"
        for _ in range(int(reach) // cell + 2):
            cells = torch.maximum(cells, F.max_pool2d(cells, 3, stride=1, padding=1) - cell)
        # A finite floor, because interpolation between an infinity and a number has no value.
        # Bilinear weights can lower a pixel by three quarters of the step between two cells; they
        # get it back.
        self._depth_of_cells = cells.clamp(min=-(reach + 4 * cell)) + 0.75 * cell

    def depth(self, window: Window) -> torch.Tensor:
        """(1, 1, rows, columns) of one of the windows, pixels."""
        outer = window.grown(self.cell)
        cells = outer.crop(self._depth_of_cells, self.cell)
        size = (cells.shape[-2] * self.cell, cells.shape[-1] * self.cell)
        depth = F.interpolate(cells, size=size, mode="bilinear", align_corners=False)
        return window.crop(depth, origin=outer)

    def untouched(self, window: Window) -> torch.Tensor:
        """:func:`untouched_weight` (1, 1, rows, columns) of one of the windows."""
        radius = window.crop(self._signed_defocus).abs()
        in_focus = fade_out(radius, IN_FOCUS_RADIUS, PHOTO_GONE_RADIUS)
        start, end = -(SILHOUETTE_MARGIN + SILHOUETTE_FADE), -SILHOUETTE_MARGIN
        return in_focus * fade_out(self.depth(window), start, end)


def untouched_weight(signed_defocus: torch.Tensor) -> torch.Tensor:
    """Where the lens changes nothing at all, in [0, 1].

    Two conditions, each with a smooth transition: the pixel's own CoC is under half a pixel (gone
    at one pixel), and no blurred light arrives from its surroundings, with a margin of one pixel
    for mixed pixels along silhouettes (see :func:`blurred_light_depth`).

    Args:
        signed_defocus: (B, 1, H, W), CoC radius in pixels, positive nearer than the focal plane.

    Returns:
        (B, 1, H, W) in [0, 1]; exactly 1 everywhere when nothing is out of focus.
    """
    lights = [BlurredLight(one) for one in signed_defocus.split(1)]
    return torch.cat([in_windows(light.untouched, light.windows) for light in lights])


def put_back_detail(
    rendered: torch.Tensor,
    image: torch.Tensor,
    codec_image: torch.Tensor | None,
    signed_defocus: torch.Tensor,
) -> torch.Tensor:
    """The rendered picture with the photo's own detail where the lens leaves it alone.

    First the codec's residual, ``image - codec_image``, is added with :func:`residual_weight`:
    what encoding and decoding lost is put back where the pixel's own blur is under half a pixel.
    Then the photo itself takes the place of the result with :func:`untouched_weight`, where no
    other light arrives either. With K = 0, or everything in the focal plane, that is the whole
    picture, for any codec and any network.

    Args:
        rendered: (B, 3, H, W), display sRGB in [0, 1].
        image: (B, 3, H, W), the photo, same range.
        codec_image: (B, 3, H, W), the photo after encoding and decoding; ``None`` when no residual
            is needed.
        signed_defocus: (B, 1, H, W), CoC radius in pixels, positive nearer than the focal plane.

    Returns:
        (B, 3, H, W), not clamped.
    """
    restored = torch.empty_like(rendered)
    for index, one in enumerate(signed_defocus.split(1)):
        picture = slice(index, index + 1)
        light = BlurredLight(one)
        for window in light.windows:
            defocus, photo = window.crop(one), window.crop(image[picture])
            part = window.crop(rendered[picture])
            if codec_image is not None:
                residual = photo - window.crop(codec_image[picture])
                part = part + residual_weight(defocus.abs()) * residual
            untouched = light.untouched(window)
            part = torch.where(untouched >= 1, photo, torch.lerp(part, photo, untouched))
            window.crop(restored[picture]).copy_(part)
    return restored

"""Big photos in parts: which parts the UNet gets, how much around them, and how they are joined.

There are two kinds of UNets.

* A *local* one, as :class:`~bokehdiff.models.light_transport_unet.LightTransportUNet`, goes through
  a picture in windows by itself (``window_pixels`` of its call, ``window_multiple`` of its own) and
  gives the same picture up to rounding. Its windows cost nothing and are the default.
* Others, as SDXL's, look at the whole picture at once: group norms average over it and attention
  reaches across it. Given parts, they see only these, and the result is an approximation; the
  preset ``official_exact``, which measures distances in shares of what the UNet is given, wants
  parts of 512 pixels, as the authors' are. They are left whole by default: with PISA and attention
  that store no tables of all pairs, one call for 24 megapixels holds at most 3.8 GB of activations
  in bfloat16, beside 5.1 GB of weights.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

from ..windows import Window

Tiling = Literal["auto", "official"] | int | None

OFFICIAL_TILE = 64
"""Side of the authors' tiles, latent pixels."""

OFFICIAL_LARGEST_AREA = 2 * OFFICIAL_TILE**2
"""Latent pixels up to which the authors leave a picture whole."""

BLENDED_LATENTS = 8
"""Latent pixels to either side of a border between windows over which one fades into the other."""

WINDOW_PIXELS_PER_THREAD = 256**2
"""Pixels of the windows of a local UNet for each thread of the CPU: what its layers hold of them
stays in the caches, and threads wait for each other seldom enough."""

WINDOW_PIXELS_ON_GPU = 1024
"""Side of such windows on a GPU, where small ones leave processors idle; a bound of memory."""


def check_tiling(tiling: Tiling) -> None:
    """Raises ``ValueError`` unless ``tiling`` is ``"auto"``, ``"official"``, a whole number of
    pixels from 1 up, or ``None``."""
    whole_number = isinstance(tiling, int) and not isinstance(tiling, bool)
    if tiling in ("auto", "official", None) or (whole_number and int(tiling) >= 1):
        return
    raise ValueError(
        f"tiling is {tiling!r}; it must be 'auto', None (the picture as a whole), the side of the "
        "windows in pixels (a whole number such as 1024), or 'official' (the authors' tiles)."
    )


def window_pixels_for(unet: Any, tiling: Tiling, device: torch.device) -> int | None:
    """Side of the windows through which a local UNet shall go, in pixels.

    Args:
        unet: any UNet.
        tiling: ``"auto"`` for windows of the size that suits the device, a number of pixels, which
            is rounded up to what the UNet can do, or anything else for none.
        device: where the UNet computes.

    Returns:
        A multiple of ``unet.window_multiple``; None for the whole picture, and for UNets that are
        not local.
    """
    multiple = getattr(unet, "window_multiple", None)
    if multiple is None or tiling is None or tiling == "official":
        return None
    if tiling == "auto":
        tiling = WINDOW_PIXELS_ON_GPU
        if device.type == "cpu":
            tiling = math.isqrt(WINDOW_PIXELS_PER_THREAD * torch.get_num_threads())
    return _rounded_up(int(tiling), multiple)


def tiles_for(
    tiling: Tiling, height: int, width: int, multiple: int, scale: int, largest_radius: float
) -> list[tuple[Window, torch.Tensor]]:
    """The parts that a UNet which is not local gets of a picture, with their weights.

    Args:
        tiling: of the pipeline's call.
        height, width: of the latents.
        multiple: what sides and origins of parts must be multiples of, latent pixels.
        scale: pixels per latent pixel.
        largest_radius: of the circles of confusion in this picture, pixels.

    Returns:
        Windows of the latents and their weights (rows, columns), float32, whose sum is positive
        everywhere; empty if the picture shall stay whole.
    """
    if tiling == "official":
        return official_tiles(height, width)
    if isinstance(tiling, int):
        side = _rounded_up(-(-tiling // scale), multiple)
        return overlapping_windows(height, width, side, multiple, largest_radius / scale)
    return []


def official_tiles(height: int, width: int) -> list[tuple[Window, torch.Tensor]]:
    """The authors' tiles and weights: 64 x 64 latent pixels, ``exp(-(u^2 + v^2))`` with u and v
    from -2 to 2 across the tile.

    A side shorter than a tile is taken whole, where the authors' code fails, and a tile that theirs
    visits twice is visited once. None for latents of up to 2 * 64^2 pixels.
    """
    if height * width <= OFFICIAL_LARGEST_AREA:
        return []
    rows, columns = min(OFFICIAL_TILE, height), min(OFFICIAL_TILE, width)
    u = torch.linspace(-2, 2, rows)[:, None]
    v = torch.linspace(-2, 2, columns)
    weight = torch.exp(-(u**2 + v**2))
    return [
        (Window(top, left, top + rows, left + columns, height, width), weight)
        for top in official_origins(height)
        for left in official_origins(width)
    ]


def official_origins(length: int) -> list[int]:
    """First latent pixels of the authors' tiles along a side: evenly spaced, whole, ascending."""
    last = length - OFFICIAL_TILE
    if last <= 0:
        return [0]
    steps = (length - OFFICIAL_TILE // 4) // (3 * OFFICIAL_TILE // 4)
    return sorted({number * last // steps for number in range(steps + 1)})


def overlapping_windows(
    height: int, width: int, side: int, multiple: int, largest_radius: float
) -> list[tuple[Window, torch.Tensor]]:
    """Windows with what they need around them, and weights that fade from one to the next.

    A window sees its inside, the band in which it is blended with its neighbours, and beyond that
    the largest circle of confusion: all light that arrives where its weight is above zero, and all
    that may stand in the way of it. A picture that fits one window gives none.

    Args:
        height, width: of the latents.
        side: of the inside of windows, at most; latent pixels.
        multiple: what sides and origins are multiples of.
        largest_radius: of the circles of confusion, latent pixels.

    Returns:
        Windows and weights (rows, columns), which sum to one unless windows are narrower than the
        band.
    """

    def even(length: int) -> int:
        return _rounded_up(-(-length // -(-length // side)), multiple)

    rows, columns = even(height), even(width)
    insides = [
        Window(top, left, min(top + rows, height), min(left + columns, width), height, width)
        for top in range(0, height, rows)
        for left in range(0, width, columns)
    ]
    if len(insides) == 1:
        return []
    margin = _rounded_up(BLENDED_LATENTS, multiple)
    margin += _rounded_up(math.ceil(largest_radius), multiple)

    def fade(start: int, end: int, length: int, seen: torch.Tensor) -> torch.Tensor:
        weight = torch.ones_like(seen)
        if start > 0:
            weight = weight * ((seen - start) / (2 * BLENDED_LATENTS) + 0.5).clamp(0, 1)
        if end < length:
            weight = weight * ((end - seen) / (2 * BLENDED_LATENTS) + 0.5).clamp(0, 1)
        return weight

    tiles = []
    for inside in insides:
        outer = inside.grown(margin)
        down = fade(inside.top, inside.bottom, height, torch.arange(outer.top, outer.bottom) + 0.5)
        along = fade(inside.left, inside.right, width, torch.arange(outer.left, outer.right) + 0.5)
        tiles.append((outer, down[:, None] * along))
    return tiles


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

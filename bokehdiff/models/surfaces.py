"""What each pixel of a photograph shows, and what it hides: the surfaces that send light.

A pixel shows one surface; beside a depth jump two, of which the second is kept in
:class:`MixedPixels`; and behind an occluder there is one that is guessed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..grids import filled_from_coarser, filled_from_surroundings, pooled
from ..rendering.sources import beside_jumps, part_mixtures, without_flying_pixels
from ..windows import Window, put, windows_of

__all__ = ["MixedPixels", "hidden_surfaces", "numbers_in", "parted_surfaces"]

HIDDEN_CELL = 2
"""Pixels per side of the cells on which hidden surfaces are guessed; a guess has no more detail."""

PARTING_MARGIN = 8
"""Pixels around a window that parting its mixtures looks at: 2 to find flying pixels, 2 for pure
colours, 3 to tell a jump from a slope, rounded up."""


class MixedPixels(NamedTuple):
    """M pixels of a window in which a second surface shows.

    ``image``, ``row``, ``column`` (M,): which pixel. ``colour`` (M, 3): linear light of the second
    surface. ``defocus`` (M,): its signed defocus in pixels. ``share`` (M,): how much of the pixel
    the *nearer* of both surfaces fills. ``in_front`` (M,) bool: the second surface is the nearer.
    """

    image: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    colour: torch.Tensor
    defocus: torch.Tensor
    share: torch.Tensor
    in_front: torch.Tensor

    def those(self, which: torch.Tensor) -> MixedPixels:
        """The pixels that a mask (M,) chooses."""
        return MixedPixels(*(part[which] for part in self))


def parted_surfaces(
    light: torch.Tensor, defocus: torch.Tensor, window: Window
) -> tuple[torch.Tensor, torch.Tensor, MixedPixels]:
    """What the pixels of a window show of their own surface, and the second surface of some.

    Args:
        light: (B, 3, H, W) linear light of the picture.
        defocus: (B, 1, H, W) signed, in pixels.
        window: a part of the picture.

    Returns:
        Linear light (B, 3, rows, columns) of the surface that the disparity map names, its defocus
        (B, 1, rows, columns), in which no pixel hangs between two surfaces, and the mixed pixels.
    """
    outer = window.grown(PARTING_MARGIN)
    width = outer.right - outer.left
    colours, levels, found = [], [], []
    for image, (picture, blur) in enumerate(
        zip(outer.crop(light), outer.crop(defocus)[:, 0], strict=True)
    ):
        blur = without_flying_pixels(blur)
        nearer, farther = beside_jumps(blur)
        if bool(farther.any()):
            mixed = part_mixtures(picture, blur, nearer, farther)
            near = mixed.on_nearer[:, None]
            own = torch.where(near, mixed.front, mixed.back)
            picture = picture.flatten(1).T.index_put((mixed.place,), own).T.view_as(picture)
            row = torch.div(mixed.place, width, rounding_mode="floor") + outer.top - window.top
            column = mixed.place % width + outer.left - window.left
            inside = (
                (row >= 0)
                & (row < window.bottom - window.top)
                & (column >= 0)
                & (column < window.right - window.left)
            )
            found.append(
                MixedPixels(
                    torch.full_like(row, image),
                    row,
                    column,
                    torch.where(near, mixed.back, mixed.front),
                    torch.where(mixed.on_nearer, mixed.back_defocus, mixed.front_defocus),
                    mixed.share,
                    ~mixed.on_nearer,
                ).those(inside)
            )
        colours.append(picture)
        levels.append(blur[None])
    colour, level = (window.crop(torch.stack(maps), origin=outer) for maps in (colours, levels))
    if not found:
        return colour, level, no_mixed_pixels(light)
    return colour, level, MixedPixels(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def no_mixed_pixels(like: torch.Tensor) -> MixedPixels:
    """No pixel at all, on the device and in the dtype of a tensor."""
    nowhere = torch.zeros(0, dtype=torch.int64, device=like.device)
    empty = like.new_zeros(0)
    return MixedPixels(
        nowhere, nowhere, nowhere, like.new_zeros(0, 3), empty, empty, nowhere.bool()
    )


def numbers_in(values: torch.Tensor) -> set[int]:
    """The different whole numbers from -1 up in a tensor."""
    return {number - 1 for number in (values.flatten() + 1).bincount().nonzero()[:, 0].tolist()}


def hidden_surfaces(
    light: torch.Tensor,
    disparity: torch.Tensor,
    defocus: torch.Tensor,
    slab_of_pixel: torch.Tensor,
    windows: list[Window] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What probably lies behind each visible surface: the farther surfaces around it, continued.

    A lens looks around the edge of an occluder. How much of the hidden surface it sees is known,
    what is there is not; the nearest visible part of anything farther is the best guess.

    Args:
        light: (B, 3, H, W) linear light of the photo.
        disparity, defocus: (B, 1, H, W), of the visible surface.
        slab_of_pixel: (B, 1, H, W) number of its slab, 0 the farthest.
        windows: windows of the picture, whose sides are multiples of two cells; by default one.

    Returns:
        light (B, 3, H, W), disparity and defocus (B, 1, H, W) of the surface behind, and where the
        lens can see that far behind the edge (B, 1, H, W).
    """
    height, width = defocus.shape[-2:]
    windows = windows or windows_of(height, width)
    slabs_of_windows = [numbers_in(window.crop(slab_of_pixel)) for window in windows]
    farthest, nearest = min(map(min, slabs_of_windows)), max(map(max, slabs_of_windows))

    def cells_of(slab: int) -> torch.Tensor:
        """What is visible of one slab, times how much of each cell it fills, and that share."""
        rows, columns = -(-height // HIDDEN_CELL), -(-width // HIDDEN_CELL)
        cells = light.new_zeros(light.shape[0], 6, rows, columns)
        for window, slabs in zip(windows, slabs_of_windows, strict=True):
            if slab in slabs:
                here = window.crop(slab_of_pixel) == slab
                maps = [window.crop(values) * here for values in (light, disparity, defocus)]
                part = pooled(torch.cat([*maps, here.to(light.dtype)], 1), HIDDEN_CELL)
                cells = put(cells, window, part, HIDDEN_CELL)
        return cells

    hidden = light.new_zeros(light.shape[0], 5, height, width)
    seen = torch.zeros_like(slab_of_pixel, dtype=torch.bool)
    # The slabs just behind may hold the same slanted surface: the first does not count, and the
    # farther away the more. `farther` is the sum of all slabs behind, `known` the weighted sum.
    farther = cells_of(farthest)
    known = torch.zeros_like(farther)
    for slab in range(farthest + 1, nearest + 1):
        if slab > farthest + 1 and any(slab in slabs for slabs in slabs_of_windows):
            coarse, coarse_steps = filled_from_surroundings(pooled(known, 2))
            for window, slabs in zip(windows, slabs_of_windows, strict=True):
                if slab not in slabs:
                    continue
                outer = window.grown(2 * HIDDEN_CELL)
                values, steps = filled_from_coarser(
                    outer.crop(known, HIDDEN_CELL),
                    outer.crop(coarse, 2 * HIDDEN_CELL),
                    outer.crop(coarse_steps, 2 * HIDDEN_CELL),
                )
                values = F.interpolate(
                    values, scale_factor=HIDDEN_CELL, mode="bilinear", align_corners=False
                )
                steps = F.interpolate(steps, scale_factor=HIDDEN_CELL)
                values, steps = (window.crop(one, origin=outer) for one in (values, steps))
                here = window.crop(slab_of_pixel) == slab
                reach = window.crop(defocus).abs() + values[:, 4:5].abs() + HIDDEN_CELL
                in_sight = here & (HIDDEN_CELL * steps <= reach)
                seen = put(seen, window, window.crop(seen) | in_sight)
                hidden = put(hidden, window, torch.where(here, values, window.crop(hidden)))
        known = known + farther
        farther = farther + cells_of(slab)
    return hidden[:, :3], hidden[:, 3:4], hidden[:, 4:5], seen

"""Where the light of a picture comes from: what it shows, and what it hides behind an edge.

A photograph has one colour and one disparity for each pixel. A wide lens sees more: around the edge
of a thing it sees some of what lies behind, and at the edge itself a pixel shows a part of both. So
a photograph becomes a list of sources, each at a pixel, with a coverage, a defocus and a slope:

1. *visible*: every pixel, with what it shows;
2. *silhouette*: pixels beside a depth jump hold a mixture, which is parted into the colour of the
   nearer surface with the share it covers, and the colour of the farther one, which goes on behind;
3. *hidden*: what is behind a nearer surface, as far as the lens may see there: the farther surface
   beside the jump, continued.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bokehdiff.grids import filled_from_surroundings
from bokehdiff.rendering.frame import continued

__all__ = ["Sources", "sources_of_picture"]

# A depth jump: neighbouring defocus differs by so many pixels, by this share of the smaller radius,
# and by twice the slope beside it more than a smooth surface would let it.
JUMP_PIXELS = 0.5
JUMP_SHARE = 0.1
JUMP_SLOPES = 2.0
# Steepest slope of the defocus (pixels per pixel) that is believed: at 1 a surface is seen edge-on
# by a part of the lens.
STEEPEST_SLOPE = 0.8
# A pixel flies between surfaces when fewer of its eight neighbours share its defocus, and the
# surfaces are found within this distance.
FEWEST_ALIKE = 2
FLYING_REACH = 2
# Pure colours of both sides of a jump are sought within this distance, with a Gaussian of this
# deviation, and must be found in so many pixels of each side.
MIXTURE_REACH = 2
MIXTURE_DEVIATION = 1.2
FEWEST_PURE = 5
# How far (squared, as a share of the squared contrast) a pixel may be from the line between both
# colours and still count as their mixture; and the squared contrast in linear light at which the
# colours decide as much as the outline.
LARGEST_RESIDUAL = 0.1
SMALL_CONTRAST = 0.003
# Pixels beside a jump that tell what goes on behind it.
BAND = 4
# Surfaces are sorted into so many classes of defocus, each of which hides what is farther.
HIDDEN_CLASSES = 12
# Farther than this, in pixels and as a share of the radius, is behind.
BEHIND_PIXELS = 1.0
BEHIND_SHARE = 0.15
SMALLEST_WEIGHT = 1e-3
NOTHING = 1e-6


class Sources(NamedTuple):
    """N sources of light of one picture (H, W).

    ``place`` (N,) int64: index of the pixel in reading order. ``light`` (N, C) linear. ``coverage``
    (N,) in [0, 1]: how much of the pixel the source fills. ``defocus`` (N,) signed, in pixels.
    ``slope`` (N, 2): change of the defocus from pixel to pixel along x and y.
    """

    place: torch.Tensor
    light: torch.Tensor
    coverage: torch.Tensor
    defocus: torch.Tensor
    slope: torch.Tensor

    def those(self, which: torch.Tensor | slice) -> Sources:
        """The sources that a mask, indices or a slice choose."""
        return Sources(*(part[which] for part in self))


def sources_of_picture(light: torch.Tensor, defocus: torch.Tensor, hidden_cell: int = 2) -> Sources:
    """The sources of a picture: light (C, H, W) linear, defocus (H, W) signed in pixels.

    Hidden surfaces are guessed on cells of ``hidden_cell`` pixels.
    Linear in ``light`` once the outlines are decided; differentiable in both. At a defocus of 0
    everywhere they add up to the picture.
    """
    height, width = defocus.shape
    channels = len(light)
    defocus = without_flying_pixels(defocus)
    slope = slope_of(defocus)
    pixels = torch.arange(height * width, device=light.device)
    colour = light.reshape(channels, -1).T
    visible_defocus = defocus.reshape(-1)
    visible_slope = slope.reshape(2, -1).T
    nearer, farther = beside_jumps(defocus.detach())
    if not bool(farther.any()):
        return Sources(
            pixels, colour, torch.ones_like(visible_defocus), visible_defocus, visible_slope
        )

    mixed = part_mixtures(light, defocus, nearer, farther)
    inside, outside = mixed.on_nearer, ~mixed.on_nearer
    coverage = torch.ones_like(visible_defocus)
    coverage = coverage.index_put((mixed.place[inside],), mixed.share[inside])
    shown = torch.where(inside[:, None], mixed.front, mixed.back)
    colour = colour.index_put((mixed.place,), shown)
    # The farther surface reaches behind what it is mixed with.
    cleaned = light.reshape(channels, -1).T.index_put((mixed.place[outside],), mixed.back[outside])
    hidden = _hidden(cleaned.T.reshape(light.shape), defocus, slope, farther, hidden_cell)
    known = torch.zeros_like(coverage, dtype=torch.bool)
    known[mixed.place[inside]] = True
    hidden = hidden.those(~known[hidden.place])
    silhouette = Sources(
        mixed.place[outside],
        mixed.front[outside],
        mixed.share[outside],
        mixed.front_defocus[outside],
        torch.zeros_like(visible_slope[: int(outside.sum())]),
    )
    behind = Sources(
        mixed.place[inside],
        mixed.back[inside],
        torch.ones_like(mixed.share[inside]),
        mixed.back_defocus[inside],
        torch.zeros_like(visible_slope[: int(inside.sum())]),
    )
    visible = Sources(pixels, colour, coverage, visible_defocus, visible_slope)
    together = zip(visible, silhouette, behind, hidden, strict=True)
    return Sources(*(torch.cat(parts) for parts in together))


def slope_of(defocus: torch.Tensor) -> torch.Tensor:
    """(2, H, W) change of the defocus (H, W) per pixel along x and y.

    The smaller of the differences to both neighbours, 0 where they disagree in sign, at most 0.8:
    so a depth jump beside a pixel does not count as slope.
    """
    slopes = []
    for axis in (1, 0):
        steps = defocus.diff(dim=axis)
        if steps.shape[axis] == 0:
            slopes.append(torch.zeros_like(defocus))
            continue
        first, last = steps.narrow(axis, 0, 1), steps.narrow(axis, steps.shape[axis] - 1, 1)
        before, after = torch.cat([first, steps], axis), torch.cat([steps, last], axis)
        smaller = torch.where(before.abs() < after.abs(), before, after)
        slopes.append(torch.where(before * after > 0, smaller, torch.zeros_like(smaller)))
    return torch.stack(slopes).clamp(-STEEPEST_SLOPE, STEEPEST_SLOPE)


def without_flying_pixels(defocus: torch.Tensor) -> torch.Tensor:
    """(H, W) defocus, in which pixels that hang between two surfaces belong to the closer one.

    Resampled, compressed and estimated disparity maps ramp from one surface to the other at an
    edge. Crossing the plane in focus, such pixels would stay as sharp crumbs in the blur. A pixel
    flies where the defocus changes faster than a surface may, and few of its neighbours share its
    value.
    """
    size = 2 * FLYING_REACH + 1
    around = continued(defocus[None, None], FLYING_REACH)
    nearest = F.max_pool2d(around, size, stride=1)[0, 0]
    farthest = -F.max_pool2d(-around, size, stride=1)[0, 0]
    steep = nearest - farthest > STEEPEST_SLOPE * (size - 1)
    tolerance = JUMP_PIXELS + JUMP_SHARE / 2 * defocus.detach().abs()
    height, width = defocus.shape
    close = continued(defocus.detach()[None, None], 1)[0, 0]
    alike = torch.zeros_like(defocus)
    for row in range(3):
        for column in range(3):
            neighbour = close[row : row + height, column : column + width]
            alike += (neighbour - defocus.detach()).abs() <= tolerance
    flies = steep & (alike - 1 < FEWEST_ALIKE)
    closer = torch.where(defocus - farthest < nearest - defocus, farthest, nearest)
    return torch.where(flies, closer, defocus)


def beside_jumps(defocus: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two masks (H, W): pixels on the nearer and on the farther side of a depth jump."""
    nearer = torch.zeros_like(defocus, dtype=torch.bool)
    farther = torch.zeros_like(nearer)
    for axis in (0, 1):
        steps = defocus.diff(dim=axis)
        count = steps.shape[axis]
        if count == 0:
            continue
        beyond = torch.cat(
            [steps.narrow(axis, 0, 1), steps, steps.narrow(axis, count - 1, 1)], axis
        )
        smooth = torch.minimum(
            beyond.narrow(axis, 0, count).abs(), beyond.narrow(axis, 2, count).abs()
        )
        radius = defocus.abs()
        smaller = torch.minimum(radius.narrow(axis, 0, count), radius.narrow(axis, 1, count))
        jump = steps.abs() > JUMP_SLOPES * smooth + JUMP_PIXELS + JUMP_SHARE * smaller
        for start, rising in ((0, False), (1, True)):
            side = jump & ((steps > 0) == rising)
            nearer.narrow(axis, start, count).logical_or_(side)
            farther.narrow(axis, start, count).logical_or_(jump & ~side)
    return nearer, farther


class Mixtures(NamedTuple):
    """M pixels beside a jump, parted: colour = share * front + (1 - share) * back."""

    place: torch.Tensor  # (M,)
    front: torch.Tensor  # (M, C) the nearer surface
    back: torch.Tensor  # (M, C) the farther surface
    share: torch.Tensor  # (M,) of the nearer surface
    front_defocus: torch.Tensor  # (M,)
    back_defocus: torch.Tensor  # (M,)
    on_nearer: torch.Tensor  # (M,) bool: the disparity map calls it a pixel of the nearer surface


def part_mixtures(
    light: torch.Tensor, defocus: torch.Tensor, nearer: torch.Tensor, farther: torch.Tensor
) -> Mixtures:
    """Parts pixels beside a jump where pure pixels of both surfaces are near and explain them."""
    height, width = defocus.shape
    edge = nearer | farther
    y, x = edge.nonzero(as_tuple=True)
    around = continued(defocus[None, None], 1)
    front_defocus = F.max_pool2d(around, 3, stride=1)[0, 0][y, x]
    back_defocus = -F.max_pool2d(-around, 3, stride=1)[0, 0][y, x]
    own_defocus = defocus[y, x]
    on_nearer = (own_defocus - front_defocus).abs() <= (own_defocus - back_defocus).abs()
    colour = light[:, y, x].T

    sums = {side: torch.zeros_like(colour) for side in ("front", "back")}
    weights = {side: torch.zeros_like(own_defocus) for side in ("front", "back")}
    pure = {side: torch.zeros_like(own_defocus) for side in ("front", "back")}
    outline = torch.zeros_like(own_defocus)
    for down in range(-MIXTURE_REACH, MIXTURE_REACH + 1):
        for right in range(-MIXTURE_REACH, MIXTURE_REACH + 1):
            rows, columns = (y + down).clamp(0, height - 1), (x + right).clamp(0, width - 1)
            there = defocus[rows, columns].detach()
            unmixed = ~edge[rows, columns]
            weight = math.exp(-(down**2 + right**2) / (2 * MIXTURE_DEVIATION**2))
            to_front, to_back = (there - front_defocus).abs(), (there - back_defocus).abs()
            for side, mine, other, level in (
                ("front", to_front, to_back, front_defocus),
                ("back", to_back, to_front, back_defocus),
            ):
                same = (mine <= JUMP_PIXELS + JUMP_SHARE / 2 * level.abs()) & (mine < other)
                sums[side] = sums[side] + light[:, rows, columns].T * (
                    weight * (same & unmixed)
                ).unsqueeze(1).to(light.dtype)
                weights[side] += weight * (same & unmixed)
                pure[side] += same & unmixed
                if side == "front" and max(abs(down), abs(right)) <= 1:
                    outline += same.to(outline.dtype) / 9
    front = sums["front"] / weights["front"].clamp_min(NOTHING).unsqueeze(1)
    back = sums["back"] / weights["back"].clamp_min(NOTHING).unsqueeze(1)

    with torch.no_grad():
        contrast = front - back
        squared = contrast.square().sum(1)
        share = (outline * SMALL_CONTRAST + ((colour - back) * contrast).sum(1)) / (
            SMALL_CONTRAST + squared
        )
        # The disparity map says which surface is at the pixel's centre, so which fills most of it.
        share = torch.where(on_nearer, share.clamp(0.5, 1), share.clamp(0, 0.5))
    # What the mixture leaves unexplained is given to both colours, so that nothing is lost.
    rest = colour - (share[:, None] * front + (1 - share[:, None]) * back)
    explained = rest.detach().square().sum(1) <= LARGEST_RESIDUAL * squared
    kept = explained & (pure["front"] >= FEWEST_PURE) & (pure["back"] >= FEWEST_PURE)
    rest = rest / (share.square() + (1 - share).square()).unsqueeze(1)
    front = (front + rest * share[:, None]).clamp_min(0)
    back = (back + rest * (1 - share[:, None])).clamp_min(0)
    place = y * width + x
    every = (place, front, back, share, front_defocus, back_defocus, on_nearer)
    return Mixtures(*(values[kept] for values in every))


def _hidden(
    light: torch.Tensor,
    defocus: torch.Tensor,
    slope: torch.Tensor,
    farther: torch.Tensor,
    size: int,
) -> Sources:
    """What lies behind nearer surfaces, as far as a lens may see it around their edges."""
    channels, height, width = light.shape
    classes, borders = _defocus_classes(defocus.detach())
    row, column = torch.arange(height) // size, torch.arange(width) // size
    rows, columns = math.ceil(height / size), math.ceil(width / size)
    cell = (row[:, None] * columns + column).to(light.device)
    known = _grown(farther, defocus.detach())
    values = torch.cat([light, defocus[None], slope, torch.ones_like(defocus)[None]])
    values, level, known_cell = values[:, known], defocus.detach()[known], cell[known]
    found: list[Sources] = []
    for number in torch.unique(classes).tolist():
        # Behind every surface of the class: farther than its farthest.
        farthest = borders[number]
        margin = max(BEHIND_PIXELS, BEHIND_SHARE * abs(farthest))
        behind = ((farthest - margin - level) / margin).clamp(0, 4)
        behind = torch.where(behind < SMALLEST_WEIGHT, 0, behind)
        if not bool((behind > 0).any()):
            continue
        sums = values.new_zeros(len(values), rows * columns)
        sums = sums.index_add(1, known_cell, values * behind) / size**2
        filled, distance = filled_from_surroundings(sums.view(1, -1, rows, columns))
        here = classes == number
        cells = cell[here]
        near_radius = defocus.detach()[here].abs()
        hidden_defocus = filled[0, channels].flatten()[cells]
        steps = distance.flatten()[cells] * size
        seen = steps <= near_radius + hidden_defocus.detach().abs() + size
        cells = cells[seen]
        place = here.flatten().nonzero()[:, 0][seen]
        found.append(
            Sources(
                place,
                filled[0, :channels].flatten(1)[:, cells].T,
                torch.ones_like(hidden_defocus[seen]),
                torch.minimum(hidden_defocus[seen], defocus[here][seen]),
                filled[0, channels + 1 :].flatten(1)[:, cells].T,
            )
        )
    if not found:
        empty = light.new_zeros(0)
        nowhere = torch.zeros(0, dtype=torch.int64, device=light.device)
        return Sources(nowhere, light.new_zeros(0, channels), empty, empty, light.new_zeros(0, 2))
    return Sources(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _defocus_classes(defocus: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """Class (H, W) of each defocus, and the farthest defocus of each class; fine near focus."""
    squashed = torch.asinh(defocus / 2)
    low, high = float(squashed.min()), float(squashed.max())
    borders = torch.linspace(low, high, HIDDEN_CLASSES + 1, dtype=torch.float64)
    classes = torch.bucketize(squashed.contiguous(), borders[1:-1].to(squashed))
    return classes, (2 * torch.sinh(borders)).tolist()


def _grown(seed: torch.Tensor, defocus: torch.Tensor) -> torch.Tensor:
    """The band of the same or a farther surface beside the seed pixels (H, W)."""
    nowhere = torch.full_like(defocus, -math.inf)
    level = torch.where(seed, defocus, nowhere)
    reached = seed.clone()
    for _ in range(BAND):
        around = F.max_pool2d(level[None, None], 3, stride=1, padding=1)[0, 0]
        fresh = (defocus <= around + JUMP_PIXELS) & ~reached
        level = torch.where(fresh, defocus, level)
        reached |= fresh
    return reached

"""Layered lens blur: slices of equal defocus, blurred and laid behind one another.

A picture becomes sources of light (:mod:`bokehdiff.rendering.sources`), sorted into *slices* of
defocus. A source between two slices is shared by both. Slices arrive from near to far: each is
spread over its circle of confusion by one convolution, and a pixel accepts what arrives until it is
full. Three things make the result close to a ray tracer's:

- *Slope.* On a slanted surface the defocus changes within the circle of confusion. A source at
  defocus s with slope g sends the light of lens point u in proportion to ``1 - g . u``, the
  Jacobian of the map from sources to lens points. With it a slanted plane covers every pixel
  exactly once, without it farther parts are lost or what is behind shines through.
- *Lens parts.* Seen from one pixel, an occluder hides what is behind it from one side of the lens
  only. So the lens is cut into quarters, each of which sees its own occlusion.
- *Sparks.* Sources far brighter than their surroundings become discs one by one, with the radius
  that is theirs and not that of the slices around.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from bokehdiff.grids import enlarged
from bokehdiff.rendering.aperture import Aperture
from bokehdiff.rendering.frame import check_blur_arguments, continued, frame_margin
from bokehdiff.rendering.lens_parts import LensParts
from bokehdiff.rendering.sources import Sources, slope_of, sources_of_picture

__all__ = ["LENS_PARTS", "layered_blur", "layered_reference"]

LENS_PARTS = 4
# Slices are this many pixels of defocus apart, or this share of their radius if that is more.
SLICE_PIXELS = 0.7
SLICE_SHARE = 0.1
# A part of the lens that accepted little borrows from what the whole lens saw.
BORROWED = 1e-3
# A pixel that accepted less coverage than this keeps its own light.
SMALLEST_COVERAGE = 1e-4
NOTHING = 1e-6
# A spark is so many times brighter than the geometric mean over a square of this half side around
# it (where less light than this is as good as none); sparks take at most so many kernel entries per
# pixel of the picture, those of the greatest contrast first.
SPARK_CONTRAST = 8.0
SPARK_SURROUNDINGS = 8
DARKNESS = 0.01
SPARK_ENTRIES_PER_PIXEL = 16
SPARK_LEVELS_PER_PIXEL = 16
# Values of a batch of tiles that are transformed at once.
VALUES_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 26}


class Slice(NamedTuple):
    """Sources of about one signed defocus (pixels), spread on a grid of ``cell`` pixels."""

    defocus: float
    cell: int


def layered_blur(
    light: torch.Tensor,
    signed_defocus: torch.Tensor,
    *,
    aperture: Aperture | None = None,
    lens_parts: int = LENS_PARTS,
) -> torch.Tensor:
    """Blurred picture (B, C, H, W) in linear light.

    light: (B, C, H, W) linear light, not negative, float32 or float64 (kept).
    signed_defocus: (B, 1, H, W) signed radius of the circle of confusion in pixels of ``light``,
        positive nearer than the focus plane: ``K * (disparity - df)``.
    aperture: shape of the opening; default disc.
    lens_parts: 4, 2 or 1: into how many parts the lens is cut to tell what each of them sees.

    What is hidden behind edges and lies beyond the frame is unknown and continued from the
    surroundings. Differentiable in ``light`` and, where no depth jump moves, in ``signed_defocus``.
    With gradients every slice is computed again in the backward pass. Raises ValueError for
    arguments that do not fit. :func:`layered_reference` is the plain twin.
    """
    check_blur_arguments(light, signed_defocus)
    if lens_parts not in (1, 2, 4):
        raise ValueError(f"lens_parts is {lens_parts!r}; wanted 1, 2 or 4.")
    aperture = aperture or Aperture()
    blurred = [
        blur_picture(picture, defocus[0], aperture, exact_slices(defocus), lens_parts)
        for picture, defocus in zip(light, signed_defocus, strict=True)
    ]
    return torch.stack(blurred)


def exact_slices(defocus: torch.Tensor) -> list[Slice]:
    """Slices at full resolution that reach from the farthest to the nearest defocus."""
    return [Slice(level, 1) for level in slice_levels(defocus, SLICE_PIXELS, SLICE_SHARE)]


def slice_levels(defocus: torch.Tensor, pixels: float, share: float) -> list[float]:
    """Defocus of slices, ascending, one of them 0; apart by ``pixels`` or a share of the radius."""
    lowest, highest = float(defocus.detach().min()), float(defocus.detach().max())
    levels = [0.0]
    while levels[-1] < max(highest, -lowest):
        levels.append(levels[-1] + max(pixels, share * levels[-1]))
    behind = [-level for level in reversed(levels[1:])]
    # Of the levels beyond the range the first on each side is kept.
    every = [*behind, *levels]
    first = max((i for i, level in enumerate(every) if level <= lowest), default=0)
    last = min((i for i, level in enumerate(every) if level >= highest), default=len(every) - 1)
    return every[first : last + 1]


def blur_picture(
    light: torch.Tensor,
    defocus: torch.Tensor,
    aperture: Aperture,
    slices: Sequence[Slice],
    lens_parts: int,
    find_sources: Callable[[torch.Tensor, torch.Tensor], Sources] = sources_of_picture,
) -> torch.Tensor:
    """One picture (C, H, W) with signed defocus (H, W) through the given slices, ascending."""
    keep_graph = torch.is_grad_enabled() and (light.requires_grad or defocus.requires_grad)
    with torch.set_grad_enabled(keep_graph):
        margin = frame_margin(defocus)
        wide = continued(light[None], margin)[0]
        sources = find_sources(wide, continued_defocus(defocus, margin))
        lens = LensParts(aperture, lens_parts, (margin, *defocus.shape))
        blurred = _blur_sources(sources, wide, lens, slices)
        return blurred[:, margin : margin + light.shape[1], margin : margin + light.shape[2]]


def _blur_sources(
    sources: Sources, wide: torch.Tensor, lens: LensParts, slices: Sequence[Slice]
) -> torch.Tensor:
    """(C, H, W) of the canvas: the picture ``wide`` with all that is around its frame."""
    channels = len(wide)
    canvas = (wide.shape[1], wide.shape[2])
    is_spark = find_sparks(sources, wide)
    sparks = sources.those(is_spark)
    # Sparks cover with the others of their slices, whose radii fit each other; only their light
    # comes on its own.
    unlit = sources._replace(light=sources.light * ~is_spark[:, None])
    others = unlit.those(unlit.defocus.detach().argsort(stable=True))
    levels = torch.tensor([one.defocus for one in slices]).to(sources.defocus)
    interval = torch.bucketize(others.defocus.detach(), levels) - 1
    interval = interval.clamp(0, max(len(slices) - 2, 0))
    starts = torch.searchsorted(
        interval.contiguous(), torch.arange(len(slices) + 1, device=wide.device)
    ).tolist()
    nearest = (sparks.defocus.detach()[:, None] - levels).abs().argmin(1)

    # Accepted light and, last, coverage: (parts, C + 1, H, W).
    accepted = wide.new_zeros(lens.parts, channels + 1, *canvas)
    for number in reversed(range(len(slices))):
        mine = others.those(slice(starts[max(number - 1, 0)], starts[number + 1]))
        lit = sparks.those(nearest == number)
        if len(mine.place) == 0 and len(lit.place) == 0:
            continue
        around = [one.defocus for one in slices[max(number - 1, 0) : number + 2]]
        step = _Step(slices[number], around, lens, canvas)
        if torch.is_grad_enabled():
            accepted = checkpoint(step, accepted, *mine, *lit, use_reentrant=False)
        else:
            accepted = step(accepted, *mine, *lit)
    return combine_parts(accepted, lens.part_weights(canvas).to(accepted), wide)


@dataclass(frozen=True)
class _Step:
    """Lets one slice arrive. Called with what was accepted, the slice's sources and its sparks."""

    one: Slice
    around: list[float]  # defocus of the slice and its neighbours, ascending
    lens: LensParts
    canvas: tuple[int, int]

    def __call__(self, accepted: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        mine, sparks = Sources(*sources[:5]), Sources(*sources[5:])
        share = _hat(mine.defocus, self.one.defocus, self.around)
        mine = mine._replace(coverage=mine.coverage * share)
        corner, arriving = spread(mine, sparks, self.one, self.lens, self.canvas)
        top, left = corner
        rows, columns = arriving.shape[-2:]
        if torch.is_grad_enabled():
            accepted = accepted.clone()
        place = (..., slice(top, top + rows), slice(left, left + columns))
        share = share_accepted(arriving, accepted[place])
        # Nobody else needs what arrived, unless a gradient does.
        arriving = arriving * share if torch.is_grad_enabled() else arriving.mul_(share)
        accepted[place] += arriving
        return accepted


def share_accepted(arriving: torch.Tensor, accepted: torch.Tensor) -> torch.Tensor:
    """(parts, 1, H, W) share in [0, 1] of what arrives that still fits; coverage is the last."""
    room = (1 - accepted[:, -1:]).clamp_min(0)
    return (room / arriving[:, -1:].clamp_min(NOTHING)).clamp(max=1)


def _hat(defocus: torch.Tensor, level: float, around: list[float]) -> torch.Tensor:
    """How much of a source belongs to the slice at ``level``: linear between neighbours."""
    below = max((other for other in around if other < level), default=None)
    above = min((other for other in around if other > level), default=None)
    rising = (defocus - below) / (level - below) if below is not None else None
    falling = (above - defocus) / (above - level) if above is not None else None
    if rising is None or falling is None:
        one = rising if rising is not None else falling
        return torch.ones_like(defocus) if one is None else one.clamp(0, 1)
    return torch.minimum(rising, falling).clamp(0, 1)


def combine_parts(
    accepted: torch.Tensor, part_weights: torch.Tensor, picture: torch.Tensor
) -> torch.Tensor:
    """(C, H, W) light of the whole lens from (parts, C + 1, H, W) light and coverage of its parts.

    ``part_weights`` (parts, 1, H, W) or (parts, 1, 1, 1): share of the light each part lets pass.
    Where no light arrived, as in a picture smaller than the hole of a ring, ``picture`` stays.
    """
    light, coverage = accepted[:, :-1], accepted[:, -1:]
    covered = (part_weights * coverage).sum(0)
    whole = (part_weights * light).sum(0) / covered.clamp_min(NOTHING)
    light = (light + BORROWED * whole) / (coverage + BORROWED)
    blurred = (part_weights * light).sum(0).clamp_min(0)
    return torch.where(covered > SMALLEST_COVERAGE, blurred, picture)


def spread(
    sources: Sources, sparks: Sources, one: Slice, lens: LensParts, canvas: tuple[int, int]
) -> tuple[tuple[int, int], torch.Tensor]:
    """What sources bring to each part of the lens: (top, left), and (parts, C + 1, h, w) there.

    Light comes premultiplied by coverage; coverage is last.
    """
    blocks = []
    if len(sources.place):
        blocks.append(_spread_together(sources, one, lens, canvas))
    if len(sparks.place):
        blocks.append(_spread_one_by_one(sparks, lens, canvas))
    top = max(min(corner[0] for corner, _ in blocks), 0)
    left = max(min(corner[1] for corner, _ in blocks), 0)
    bottom = min(max(corner[0] + block.shape[-2] for corner, block in blocks), canvas[0])
    right = min(max(corner[1] + block.shape[-1] for corner, block in blocks), canvas[1])
    if len(blocks) == 1:
        (down, across), block = blocks[0]
        return (top, left), block[..., top - down : bottom - down, left - across : right - across]
    shape = (*blocks[0][1].shape[:2], bottom - top, right - left)
    arriving = lens.zeros("both", shape, blocks[0][1])
    for corner, block in blocks:
        _add(arriving, (top, left), block, corner)
    return (top, left), arriving


def _spread_together(
    sources: Sources, one: Slice, lens: LensParts, canvas: tuple[int, int]
) -> tuple[tuple[int, int], torch.Tensor]:
    """The slice's sources, gathered on a grid and convolved tile by tile."""
    rows = torch.div(sources.place, canvas[1], rounding_mode="floor")
    columns = sources.place % canvas[1]
    rows = torch.div(rows, one.cell, rounding_mode="floor")
    columns = torch.div(columns, one.cell, rounding_mode="floor")
    values = torch.cat([sources.light, torch.ones_like(sources.coverage)[:, None]], 1)
    values = values * (sources.coverage[:, None] / one.cell**2)
    channels = values.shape[1]
    if one.defocus:  # premultiplied by the slopes, for the Jacobian
        slope_x, slope_y = sources.slope.split(1, dim=1)
        values = torch.cat([values, values * slope_x, values * slope_y], 1)
    top, left = int(rows.min()), int(columns.min())
    tall, broad = int(rows.max()) - top + 1, int(columns.max()) - left + 1
    side = lens.tile_side(one.defocus, one.cell) if one.defocus else 1
    down, across = math.ceil(tall / side), math.ceil(broad / side)
    cells = (rows - top) * (across * side) + (columns - left)
    grid = lens.zeros("grid", (values.shape[1], down * side * across * side), values)
    grid.index_add_(1, cells, values.T)
    if not one.defocus:
        return (top, left), grid.view(1, -1, tall, broad).repeat(lens.parts, 1, 1, 1)

    reach = lens.reach(one.defocus / one.cell)
    tiles = grid.view(3, channels, down, side, across, side).permute(2, 4, 0, 1, 3, 5)
    filled = (tiles[:, :, 0, -1].detach() > 0).flatten(2).any(2).flatten().nonzero()[:, 0].tolist()
    size = next_fast_length(side + 2 * reach)
    shape = (lens.parts, channels, down * side + 2 * reach, across * side + 2 * reach)
    block = lens.zeros("together", shape, grid)
    at_once = max(1, VALUES_AT_ONCE.get(grid.device.type, 1 << 22) // (size * size * 4 * channels))
    at_once = 1 if lens.aperture.varies_over_field else at_once
    kernel = None
    for start in range(0, len(filled), at_once):
        some = filled[start : start + at_once]
        corners = [(number // across * side, number % across * side) for number in some]
        if kernel is None or lens.aperture.varies_over_field:
            filled_rows = min(side, tall - corners[0][0])
            filled_columns = min(side, broad - corners[0][1])
            field = lens.field(
                (top + corners[0][0] + filled_rows / 2) * one.cell - 0.5,
                (left + corners[0][1] + filled_columns / 2) * one.cell - 0.5,
            )
            kernel = lens.kernels(one.defocus, field, one.cell).to(grid)
            kernel = torch.fft.rfft2(kernel, s=(size, size))[:, :, None]
        row, column = zip(*(divmod(number, across) for number in some), strict=True)
        spectra = torch.fft.rfft2(tiles[list(row), list(column)], s=(size, size))
        for part in range(lens.parts):
            spreading = torch.fft.irfft2((spectra * kernel[part]).sum(1), s=(size, size))
            for tile, corner in zip(spreading, corners, strict=True):
                _add(block[part], (0, 0), tile, corner)
    corner = ((top - reach) * one.cell, (left - reach) * one.cell)
    return corner, enlarged(block, one.cell)


def _spread_one_by_one(
    sparks: Sources, lens: LensParts, canvas: tuple[int, int]
) -> tuple[tuple[int, int], torch.Tensor]:
    """The light of sparks with the radius of each, rounded to a sixteenth of a pixel."""
    rows = torch.div(sparks.place, canvas[1], rounding_mode="floor")
    columns = sparks.place % canvas[1]
    levels = spark_levels(sparks.defocus)
    reach = lens.reach(float(levels.abs().max()) / SPARK_LEVELS_PER_PIXEL)
    top, left = int(rows.min()) - reach, int(columns.min()) - reach
    tall, broad = int(rows.max()) + reach + 1 - top, int(columns.max()) + reach + 1 - left
    light = sparks.light * sparks.coverage[:, None]
    values = torch.cat([light, torch.zeros_like(light[:, :1])], 1)
    flat = lens.zeros("one by one", (lens.parts, values.shape[1], tall * broad), values)
    keys = [levels]
    if lens.aperture.varies_over_field:
        # A kernel serves the sparks of one level and of one square of the field.
        side = lens.tile_side(float(levels.abs().max()) / SPARK_LEVELS_PER_PIXEL)
        keys += [torch.div(rows, side, rounding_mode="floor") * side + (side - 1) / 2]
        keys += [torch.div(columns, side, rounding_mode="floor") * side + (side - 1) / 2]
    groups, group_of = torch.stack(keys, 1).unique(dim=0, return_inverse=True)
    for number, key in enumerate(groups.tolist()):
        members = (group_of == number).nonzero()[:, 0]
        field = lens.field(key[1], key[2]) if len(key) > 1 else (0.0, 0.0)
        kernels = lens.kernels(key[0] / SPARK_LEVELS_PER_PIXEL, field)[:, 0].to(values)
        middle = kernels.shape[-1] // 2
        places = (rows[members] - top) * broad + (columns[members] - left)
        for part, kernel in enumerate(kernels):
            y, x = kernel.nonzero(as_tuple=True)
            offsets = (y - middle) * broad + (x - middle)
            at_once = max(1, VALUES_AT_ONCE.get(values.device.type, 1 << 22) // max(len(y), 1))
            for some, here in zip(members.split(at_once), places.split(at_once), strict=True):
                targets = (here[:, None] + offsets).flatten()
                light = values[some].T[:, :, None] * kernel[y, x]
                flat[part].index_add_(1, targets, light.flatten(1))
    return (top, left), flat.view(lens.parts, -1, tall, broad)


def spark_levels(defocus: torch.Tensor) -> torch.Tensor:
    """Defocus of sparks in whole sixteenths of a pixel, below half a pixel less than it is.

    A lamp in focus has a sharp rim. What a kernel of a quarter of a pixel would give its
    neighbours is a hundredth of its light, which is more than they have.
    """
    radius = defocus.detach().abs()
    radius = torch.where(radius < 0.5, (2 * radius - 0.5).clamp_min(0), radius)
    return (radius * SPARK_LEVELS_PER_PIXEL).round() * defocus.detach().sign()


def _add(
    canvas: torch.Tensor, corner: tuple[int, int], block: torch.Tensor, place: tuple[int, int]
) -> None:
    """Adds a block to a canvas where both overlap; ``corner`` and ``place``: top and left."""
    down, right = place[0] - corner[0], place[1] - corner[1]
    top, left = max(down, 0), max(right, 0)
    bottom = min(down + block.shape[-2], canvas.shape[-2])
    end = min(right + block.shape[-1], canvas.shape[-1])
    if bottom > top and end > left:
        within = block[..., top - down : bottom - down, left - right : end - right]
        canvas[..., top:bottom, left:end].add_(within)


def next_fast_length(length: int) -> int:
    """The next even number without prime factors above 5, whose Fourier transform is fast."""
    length += length % 2
    while True:
        rest = length
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return length
        length += 2


def find_sparks(sources: Sources, light: torch.Tensor) -> torch.Tensor:
    """(N,) bool: sources far brighter than the picture (C, H, W) around them, within the budget."""
    brightest = light.detach().amax(0)
    side = 2 * SPARK_SURROUNDINGS + 1
    # The geometric mean, which the spark itself hardly moves.
    surroundings = F.avg_pool2d(
        (brightest + DARKNESS).log()[None, None],
        side,
        stride=1,
        padding=SPARK_SURROUNDINGS,
        count_include_pad=False,
    )
    surroundings = surroundings.exp().flatten()
    contrast = sources.light.detach().amax(1) / surroundings[sources.place]
    sparks = contrast > SPARK_CONTRAST
    # A spark is a point beside others, not a patch of light in the dark: the budget decides.
    entries = (2 * sources.defocus.detach().abs() + 1).square() * sparks
    order = contrast.argsort(descending=True, stable=True)
    affordable = entries[order].cumsum(0) <= SPARK_ENTRIES_PER_PIXEL * brightest.numel()
    kept = torch.zeros_like(sparks)
    kept[order] = affordable
    return sparks & kept


def continued_defocus(defocus: torch.Tensor, margin: int) -> torch.Tensor:
    """(H + 2 m, W + 2 m): surfaces go on straight beyond the frame, within the picture's range."""
    if margin == 0:
        return defocus
    wide = continued(defocus[None, None], margin)[0, 0]
    slope = continued(slope_of(defocus)[None], margin)[0]
    height, width = defocus.shape
    x = torch.arange(-margin, width + margin, device=defocus.device)
    y = torch.arange(-margin, height + margin, device=defocus.device)
    beyond_x, beyond_y = x - x.clamp(0, width - 1), y - y.clamp(0, height - 1)
    wide = wide + slope[0] * beyond_x + slope[1] * beyond_y[:, None]
    return wide.clamp(defocus.min(), defocus.max())


def layered_reference(
    light: torch.Tensor,
    signed_defocus: torch.Tensor,
    *,
    aperture: Aperture | None = None,
    lens_parts: int = LENS_PARTS,
) -> torch.Tensor:
    """Plain float64 twin of :func:`layered_blur`: source by source, no transforms, no tiles.

    Same arguments, same result up to rounding (apertures with a cat-eye excepted, whose kernels are
    here those of each source's own place); returns float64. Slow: for tests and for reading.
    """
    check_blur_arguments(light, signed_defocus)
    aperture = aperture or Aperture()
    results = []
    for picture, defocus in zip(light.double(), signed_defocus[:, 0].double(), strict=True):
        margin = frame_margin(defocus)
        wide = continued(picture[None], margin)[0]
        wide_defocus = continued_defocus(defocus, margin)
        channels, height, width = wide.shape
        lens = LensParts(aperture, lens_parts, (margin, *defocus.shape))
        kernels_of = functools.cache(lens.kernels)  # the same for very many sources
        sources = sources_of_picture(wide, wide_defocus)
        is_spark = find_sparks(sources, wide)
        levels = slice_levels(defocus, SLICE_PIXELS, SLICE_SHARE)
        accepted = wide.new_zeros(lens_parts, channels + 1, height, width)
        for number in reversed(range(len(levels))):
            arriving = torch.zeros_like(accepted)
            for index in range(len(sources.place)):
                place, colour, coverage, defocus_here, slope = (part[index] for part in sources)
                y, x = divmod(int(place), width)
                field, level = lens.field(y, x), float(defocus_here.detach())
                share = _hat(defocus_here, levels[number], levels[max(number - 1, 0) : number + 2])
                lit = 0.0 if is_spark[index] else 1.0
                kernels = kernels_of(levels[number], field)
                kernel = kernels[:, 0] + slope[0] * kernels[:, 1] + slope[1] * kernels[:, 2]
                value = torch.cat([lit * colour, torch.ones(1, dtype=torch.float64)])
                brought = kernel[:, None] * (value * coverage * share)[:, None, None]
                reach = kernel.shape[-1] // 2
                _add(arriving, (0, 0), brought, (y - reach, x - reach))
                nearest = min(range(len(levels)), key=lambda i: abs(levels[i] - level))
                if is_spark[index] and nearest == number:
                    radius = float(spark_levels(defocus_here)) / SPARK_LEVELS_PER_PIXEL
                    kernel = kernels_of(radius, field)[:, 0]
                    value = torch.cat([colour, torch.zeros(1, dtype=torch.float64)])
                    brought = kernel[:, None] * (value * coverage)[:, None, None]
                    reach = kernel.shape[-1] // 2
                    _add(arriving, (0, 0), brought, (y - reach, x - reach))
            accepted += arriving * share_accepted(arriving, accepted)
        blurred = combine_parts(accepted, lens.part_weights((height, width)), wide)
        results.append(blurred[:, margin : height - margin, margin : width - margin])
    return torch.stack(results)

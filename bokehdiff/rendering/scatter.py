"""Depth-ordered scatter: every pixel spreads its light over its circle of confusion."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from bokehdiff.rendering.aperture import Aperture, field_position
from bokehdiff.rendering.frame import check_blur_arguments, continued, frame_margin

__all__ = ["depth_ordered_scatter", "scatter_bokehme", "scatter_reference"]

# Defocus is rounded to levels: 1/16 px apart up to a radius of 8 px, 1/128 of the radius apart
# beyond. One kernel is built for each level that occurs.
LEVELS_PER_PIXEL = 16
FINE_RADIUS = 8.0
# Neighbouring levels whose light arrives together (a quarter of a pixel of defocus up to the fine
# radius): surfaces as close as that do not occlude each other.
LEVELS_PER_SLICE = 4
# A pixel that accepted less coverage than this keeps its own light.
SMALLEST_COVERAGE = 1e-6
# Below this nothing has arrived: in float64 running sums of differences cancel to about 1e-16, and
# those of third differences, across a thousand pixels, to about 1e-10.
SMALLEST_ARRIVAL = 1e-9
# Cells of the field along one side of the picture, at most: each has a kernel of its own for every
# level of defocus in it.
MOST_CELLS = 64
# Third differences of a kernel that are smaller than this, relative to its largest weight, are
# what rounding left of zeros.
SMALLEST_DIFFERENCE = 1e-14


def depth_ordered_scatter(
    light: torch.Tensor,
    signed_defocus: torch.Tensor,
    *,
    aperture: Aperture | None = None,
) -> torch.Tensor:
    """Blurred picture (B, C, H, W) in linear light, scattered from the nearest source to farthest.

    light: (B, C, H, W) linear light, float32 or float64 (kept).
    signed_defocus: (B, 1, H, W) signed radius of the circle of confusion in pixels of ``light``,
        positive nearer than the focus plane: ``K * (disparity - df)``. It also orders the sources.
    aperture: the opening; default disc. Its ``fringe`` is not looked at, because one defocus serves
        all channels: give each colour the defocus of its own focus.

    Each source spreads energy one over ``aperture.kernel(signed_defocus)``. Slices of sources of
    nearly equal depth arrive from near to far; a pixel accepts their coverage until it is full (a
    slice that brings more than the room left is scaled down), and the light is finally divided by
    the coverage accepted, so that uniform light stays uniform. What lies beyond the frame is
    unknown: the outermost pixels are repeated over half the largest radius, the division makes up
    for the rest.

    An opening with ``cat_eye`` differs between sources: the field is divided into cells so small
    that its second rim moves by a pixel at most from one to the next, at most 64 across, and the
    sources of a cell share the kernel of its middle.

    Differentiable in ``light``; ``signed_defocus`` receives no gradient. A kernel enters through
    the horizontal differences of its rows, which are summed up once for each slice: the work for
    a source grows with its radius instead of its area, and memory hardly depends on the radius.
    Only through a ``picture`` it grows with the area. :func:`scatter_reference` is the plain twin.
    """
    check_blur_arguments(light, signed_defocus)
    aperture = aperture or Aperture()
    defocus = signed_defocus.detach().to(light.device)
    blurred = []
    for picture, radii in zip(light.split(1), defocus.split(1), strict=True):
        margin = frame_margin(radii)
        wide, wide_radii = continued(picture, margin), continued(radii, margin)
        wide = _Scatter.apply(wide[0], wide_radii[0, 0], margin, aperture)
        blurred.append(wide[:, margin : margin + light.shape[2], margin : margin + light.shape[3]])
    return torch.stack(blurred)


def scatter_reference(
    light: torch.Tensor, signed_defocus: torch.Tensor, *, aperture: Aperture | None = None
) -> torch.Tensor:
    """Plain float64 twin of :func:`depth_ordered_scatter`: slice by slice, pixel by pixel.

    Same arguments, same result up to rounding; returns float64. Slow: for tests and for reading.
    """
    check_blur_arguments(light, signed_defocus)
    aperture = aperture or Aperture()
    results = []
    light = light.to(torch.float64)
    for picture, radii in zip(light.split(1), signed_defocus.split(1), strict=True):
        margin, frame = frame_margin(radii), (light.shape[2], light.shape[3])
        picture = continued(picture, margin)[0]
        levels = quantise_defocus(continued(radii, margin)[0, 0])
        height, width = levels.shape
        accepted, coverage = torch.zeros_like(picture), torch.zeros_like(picture[0])
        for together in slice_of_level(levels).unique().flip(0):
            arriving, amount = torch.zeros_like(picture), torch.zeros_like(picture[0])
            for y, x in (slice_of_level(levels) == together).nonzero().tolist():
                defocus = defocus_of_level(int(levels[y, x]))
                cells = cells_of_field(aperture, defocus, *frame)
                row, column = (
                    min(max(place - margin, 0), length - 1) * count // length
                    for place, length, count in zip((y, x), frame, cells, strict=True)
                )
                field = middle_of_cell(row, column, cells, *frame)
                kernel = aperture.kernel(defocus, field=field, dtype=torch.float64)
                reach = kernel.shape[0] // 2
                for target_y in range(max(y - reach, 0), min(y + reach + 1, height)):
                    for target_x in range(max(x - reach, 0), min(x + reach + 1, width)):
                        weight = kernel[target_y - y + reach, target_x - x + reach]
                        arriving[:, target_y, target_x] += weight * picture[:, y, x]
                        amount[target_y, target_x] += weight
            share = torch.where(amount > SMALLEST_ARRIVAL, (1 - coverage) / amount, 0).clamp(0, 1)
            accepted += arriving * share
            coverage += amount * share
        blurred = accepted / coverage.clamp_min(SMALLEST_COVERAGE)
        blurred = torch.where(coverage > SMALLEST_COVERAGE, blurred, picture)
        results.append(blurred[:, margin : height - margin, margin : width - margin])
    return torch.stack(results)


def scatter_bokehme(
    image: torch.Tensor, signed_defocus: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The unordered scatter published with BokehMe; returns (bokeh, dilated defocus, weight).

    image (B, C, H, W), signed_defocus (B, 1, H, W) in pixels. A source of radius r reaches the
    pixels within Chebyshev distance floor(r) + 1, with weight
    ``(0.5 + 0.5 tanh(4 (r - distance))) / (r^2 + 0.2)``; bokeh is the weighted mean. The dilated
    defocus (B, 1, H, W) is the largest signed defocus, truncated to a whole number, among the
    sources whose distance is at most r. Differentiable in both arguments (dilation excepted).
    """
    check_blur_arguments(image, signed_defocus)
    radius = signed_defocus.abs()
    reach = int(radius.max()) + 1
    height, width = image.shape[-2:]
    light, weight = torch.zeros_like(image), torch.zeros_like(radius)
    dilated = torch.full_like(radius, -math.inf)
    for dy in range(-min(reach, height - 1), min(reach, height - 1) + 1):
        for dx in range(-min(reach, width - 1), min(reach, width - 1) + 1):
            top, left = max(dy, 0), max(dx, 0)
            bottom, right = height + min(dy, 0), width + min(dx, 0)
            target = (..., slice(top, bottom), slice(left, right))
            source = (..., slice(top - dy, bottom - dy), slice(left - dx, right - dx))
            r, distance = radius[source], math.hypot(dy, dx)
            amount = (0.5 + 0.5 * torch.tanh(4 * (r - distance))) / (r * r + 0.2)
            amount = amount * (max(abs(dy), abs(dx)) <= r.floor() + 1)
            light[target] += amount * image[source]
            weight[target] += amount
            reached = torch.where(distance <= r, signed_defocus[source].trunc(), -math.inf)
            dilated[target] = torch.maximum(dilated[target], reached)
    return light / weight, dilated.detach(), weight


def quantise_defocus(signed_defocus: torch.Tensor) -> torch.Tensor:
    """int64 level of each signed defocus (pixels), rising with it; 0 is in focus."""
    radius = signed_defocus.abs().to(torch.float64)
    beyond = FINE_RADIUS * (1 + torch.log((radius / FINE_RADIUS).clamp_min(1)))
    level = torch.where(radius <= FINE_RADIUS, radius, beyond) * LEVELS_PER_PIXEL
    return (level.round() * signed_defocus.sign()).to(torch.int64)


def defocus_of_level(level: int) -> float:
    """Signed defocus in pixels that a level of :func:`quantise_defocus` stands for."""
    radius = abs(level) / LEVELS_PER_PIXEL
    if radius > FINE_RADIUS:
        radius = FINE_RADIUS * math.exp(radius / FINE_RADIUS - 1)
    return math.copysign(radius, level)


def slice_of_level(level: Any) -> Any:
    """Number of the slice a level (int or tensor) belongs to; the slice 0 is centred on focus."""
    return (level + LEVELS_PER_SLICE // 2) // LEVELS_PER_SLICE


def cells_of_field(
    aperture: Aperture, signed_radius: float, height: int, width: int
) -> tuple[int, int]:
    """(rows, columns) of cells in which sources of one defocus share a kernel."""
    moved_per_pixel = aperture.cat_eye * abs(signed_radius) / (math.hypot(height, width) / 2)
    rows, columns = (math.ceil(moved_per_pixel * length) for length in (height, width))
    return min(max(rows, 1), MOST_CELLS), min(max(columns, 1), MOST_CELLS)


def middle_of_cell(
    row: Any, column: Any, cells: tuple[int, int], height: int, width: int
) -> tuple[Any, Any]:
    """Place in the field (numbers or tensors) of the middle of a cell."""
    y = (row + 0.5) * (height / cells[0]) - 0.5
    x = (column + 0.5) * (width / cells[1]) - 0.5
    return field_position(x, y, height, width)


class _Footprint(NamedTuple):
    """M kernels as K differences each, at places relative to the source in the flat canvas."""

    place: torch.Tensor  # (M, K) int64
    weight: torch.Tensor  # (M, K)
    which: torch.Tensor | None  # (n,) which of the M each source has; None where M is 1


class _Group(NamedTuple):
    """Sources of one level of defocus: a run of the sorted pixels, and what they spread."""

    sources: slice
    footprint: _Footprint


class _Band(NamedTuple):
    """Rows of the picture that a slice reaches, and the columns that it reaches there."""

    rows: slice
    columns: slice
    # The same in the canvas. Its columns begin where the slice begins, because running sums do:
    # ``spare`` of them lie to the left of the picture.
    canvas_rows: slice
    canvas_columns: slice
    spare: int


class _Slice(NamedTuple):
    """Groups whose light arrives together, and where in the picture."""

    groups: list[_Group]
    bands: list[_Band]


class _Scene:
    """Sources of one picture, sorted from near to far and gathered into groups and slices.

    Kernels are entered into a canvas, wider than the picture by the largest reach on every side, as
    the differences of their rows, which running sums turn back into kernels: first differences of a
    flat opening, third differences of a profile (which is a parabola along a row), the kernel
    itself where there is a picture. Differences are zero except on the rims.
    """

    def __init__(self, signed_defocus: torch.Tensor, margin: int, aperture: Aperture) -> None:
        """``margin``: pixels by which the picture was extended on every side."""
        self.height, self.width = signed_defocus.shape
        self.margin, self.aperture, self.device = margin, aperture, signed_defocus.device
        # Differences along a row need the digits; Apple GPUs have no float64.
        self.dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.differences = 0
        if aperture.is_flat:
            self.differences = 1
        elif aperture.picture is None and self.dtype == torch.float64:
            self.differences = 3

        # Stable: within a level the pixels stay in reading order.
        levels = quantise_defocus(signed_defocus).flatten()
        self.levels, self.order = levels.sort(descending=True, stable=True)
        self.y = torch.div(self.order, self.width, rounding_mode="floor")
        self.x = self.order - self.y * self.width
        self.reach = max(_reach(int(self.levels[end])) for end in (0, -1))
        self.canvas_height = self.height + 2 * self.reach
        self.canvas_width = self.width + 2 * self.reach + self.differences
        self.places = (self.y + self.reach) * self.canvas_width + self.x + self.reach

    def slices(self) -> Iterator[_Slice]:
        """Slices from the nearest to the farthest."""
        found, counts = self.levels.unique_consecutive(return_counts=True)
        _, slice_of_group = slice_of_level(found).unique_consecutive(return_inverse=True)
        stops = counts.cumsum(0)
        runs = torch.stack([slice_of_group, found, stops - counts, stops], dim=1).tolist()
        # The first and the last column of the sources in each row of each slice.
        row = slice_of_group.repeat_interleave(counts) * self.height + self.y
        size = (runs[-1][0] + 1) * self.height
        first = self.x.new_full((size,), self.width).scatter_reduce_(0, row, self.x, "amin")
        last = self.x.new_full((size,), -1).scatter_reduce_(0, row, self.x, "amax")
        extents = torch.stack([first, last]).view(2, -1, self.height).cpu().numpy()
        for number, together in itertools.groupby(runs, lambda run: run[0]):
            groups, reach = [], 0
            for _, level, start, stop in together:
                sources = slice(start, stop)
                groups.append(_Group(sources, self._footprint(level, sources)))
                reach = max(reach, _reach(level))
            yield _Slice(groups, list(self._bands(extents[0, number], extents[1, number], reach)))

    def _bands(self, first: np.ndarray, last: np.ndarray, reach: int) -> Iterator[_Band]:
        """Bands of a slice whose sources lie between two columns of each row."""
        # On a CPU a band should fit into the cache.
        pixels_at_once = 1 << 15 if self.device.type == "cpu" else self.height * self.width
        rows_at_once = max(pixels_at_once // int(last.max() - first.min() + 2 * reach + 1), 1)
        filled = np.flatnonzero(last >= 0)
        top, bottom = max(filled[0] - reach, 0), min(filled[-1] + reach + 1, self.height)
        for start in range(int(top), int(bottom), rows_at_once):
            stop = min(start + rows_at_once, int(bottom))
            sources = slice(max(start - reach, 0), stop + reach)
            if last[sources].max() < 0:
                continue
            left, right = int(first[sources].min()) - reach, int(last[sources].max()) + reach
            columns = slice(max(left, 0), min(right + 1 + self.differences, self.width))
            yield _Band(
                slice(start, stop),
                columns,
                slice(start + self.reach, stop + self.reach),
                slice(left + self.reach, columns.stop + self.reach),
                columns.start - left,
            )

    def _footprint(self, level: int, sources: slice) -> _Footprint:
        defocus = defocus_of_level(level)
        which: torch.Tensor | None = None
        field = torch.zeros(1, 2, dtype=torch.float64)
        height, width = self.height - 2 * self.margin, self.width - 2 * self.margin
        cells = cells_of_field(self.aperture, defocus, height, width)
        if cells != (1, 1):
            # Repeated pixels beyond the frame are seen from where they were repeated.
            row = (self.y[sources] - self.margin).clamp(0, height - 1) * cells[0] // height
            column = (self.x[sources] - self.margin).clamp(0, width - 1) * cells[1] // width
            taken, which = (row * cells[1] + column).unique(return_inverse=True)
            taken = taken.cpu()
            cell_row, cell_column = (taken // cells[1]).double(), (taken % cells[1]).double()
            middle = middle_of_cell(cell_row, cell_column, cells, height, width)
            field = torch.stack(middle, dim=1)
        # Some cells at a time, as large kernels of all of them would fill the memory.
        at_once = max((1 << 21) // (2 * _reach(level) + 1) ** 2, 1)
        parts = [self._entries(defocus, some) for some in field.split(at_once)]
        counts = torch.cat([count for count, _, _ in parts])
        place, weight = (torch.cat([part[i] for part in parts]) for i in (1, 2))
        # Kernels with fewer entries than others are filled up with nothing, on the source itself.
        filled = torch.arange(int(counts.max())) < counts[:, None]
        places = torch.zeros(filled.shape, dtype=torch.int64).masked_scatter_(filled, place)
        weights = torch.zeros(filled.shape, dtype=torch.float64).masked_scatter_(filled, weight)
        return _Footprint(places.to(self.device), weights.to(self.device, self.dtype), which)

    def _entries(
        self, defocus: float, field: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Entries of the kernels at places (M, 2) of the field, those of the first one first.

        (how many each has (M,), their places relative to the source, their weights)
        """
        kernels = self.aperture.kernel(defocus, field=field, dtype=torch.float64)
        reach = kernels.shape[-1] // 2
        entries = kernels
        if self.differences > 0:
            entries = F.pad(kernels, (self.differences,) * 2).diff(n=self.differences)
        # First differences of equal weights are exactly zero.
        noise = SMALLEST_DIFFERENCE * float(kernels.max()) if self.differences > 1 else 0.0
        one, dy, dx = (entries.abs() > noise).nonzero(as_tuple=True)
        counts = one.bincount(minlength=len(kernels))
        return counts, (dy - reach) * self.canvas_width + dx - reach, entries[one, dy, dx]

    def pieces(self, group: _Group) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Some sources of a group at a time: (sources, places (n, K), weights (n, K) or (1, K))."""
        place, weight, which = group.footprint
        entries_at_once = 1 << 15 if self.device.type == "cpu" else 1 << 24
        step = max(1, entries_at_once // weight.shape[1])
        start, stop = group.sources.start, group.sources.stop
        for first in range(start, stop, step):
            sources = slice(first, min(first + step, stop))
            if which is None:
                yield sources, self.places[sources, None] + place, weight
            else:
                cell = which[first - start : sources.stop - start]
                yield sources, self.places[sources, None] + place[cell], weight[cell]


class _Canvas:
    """Buffer (C, H, W) of entries that one slice after another passes through."""

    def __init__(self, scene: _Scene, channels: int) -> None:
        self.scene = scene
        size = (channels, scene.canvas_height, scene.canvas_width)
        self.entries = torch.zeros(size, dtype=scene.dtype, device=scene.device)

    def receive(
        self, part: _Slice, light: torch.Tensor
    ) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """(rows, columns, light (C, h, w)) that a slice brings to the picture, coverage last.

        light: (C - 1, N) light of the sources in the order of the scene.
        """
        flat = self.entries.view(len(self.entries), -1)
        for group in part.groups:
            for sources, places, weights in self.scene.pieces(group):
                where = places.view(-1)
                for channel, of_sources in zip(flat, light[:, sources], strict=False):
                    amounts = of_sources.unsqueeze(1) * weights
                    channel.scatter_add_(0, where, amounts.view(-1))
                flat[-1].scatter_add_(0, where, weights.expand_as(places).reshape(-1))
        for band in part.bands:
            entered = self.entries[:, band.canvas_rows, band.canvas_columns]
            received = entered
            for _ in range(self.scene.differences):
                received = received.cumsum(-1)
            yield band.rows, band.columns, received[..., band.spare :]
            entered.zero_()

    def send_back(self, part: _Slice, gradient: torch.Tensor, outgoing: torch.Tensor) -> None:
        """The transpose of :meth:`receive` without coverage.

        gradient: (C, H, W) of what the slice brings to the picture, looked at in its bands.
        outgoing: (C, N) gradient of the light of the sources; that of the slice is written.
        """
        for band in part.bands:
            sums = F.pad(gradient[:, band.rows, band.columns], (band.spare, 0))
            for _ in range(self.scene.differences):
                sums = sums.flip(-1).cumsum(-1).flip(-1)
            self.entries[:, band.canvas_rows, band.canvas_columns] = sums
        flat = self.entries.view(len(self.entries), -1)
        for group in part.groups:
            for sources, places, weights in self.scene.pieces(group):
                gathered = flat[:, places.view(-1)].view(len(flat), *places.shape)
                outgoing[:, sources] = (gathered * weights).sum(-1)
        for band in part.bands:
            self.entries[:, band.canvas_rows, band.canvas_columns] = 0


def _accept(coverage: torch.Tensor, arriving: torch.Tensor) -> torch.Tensor:
    """Share in [0, 1] of the arriving coverage that still fits; it is added to ``coverage``."""
    share = torch.where(arriving > SMALLEST_ARRIVAL, (1 - coverage).div_(arriving), 0)
    coverage.addcmul_(arriving, share.clamp_(0, 1))
    return share


class _Scatter(torch.autograd.Function):
    """Scatter of one picture: light (C, H, W), defocus (H, W). Linear in light.

    The backward pass replays the coverage, which decides who is seen, and gathers the gradient
    with the same shares; only the defocus is kept in between.
    """

    @staticmethod
    def forward(
        ctx: Any, light: torch.Tensor, defocus: torch.Tensor, margin: int, aperture: Aperture
    ) -> torch.Tensor:
        ctx.save_for_backward(defocus)
        ctx.margin, ctx.aperture = margin, aperture
        scene = _Scene(defocus, margin, aperture)
        canvas = _Canvas(scene, len(light) + 1)
        sorted_light = light.flatten(1)[:, scene.order].to(scene.dtype)
        accepted = torch.zeros(light.shape, dtype=scene.dtype, device=scene.device)
        coverage = torch.zeros(light.shape[1:], dtype=scene.dtype, device=scene.device)
        for part in scene.slices():
            for rows, columns, received in canvas.receive(part, sorted_light):
                share = _accept(coverage[rows, columns], received[-1])
                accepted[:, rows, columns].addcmul_(received[:-1], share)
        blurred = accepted.div_(coverage.clamp_min(SMALLEST_COVERAGE)).to(light.dtype)
        if float(light.min()) >= 0:
            blurred.clamp_min_(0)  # what running sums leave of zero may lie below it
        return torch.where(coverage > SMALLEST_COVERAGE, blurred, light)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (defocus,) = ctx.saved_tensors
        scene = _Scene(defocus, ctx.margin, ctx.aperture)
        only_coverage = torch.zeros(0, len(scene.order), dtype=scene.dtype, device=scene.device)
        canvas, sums = _Canvas(scene, 1), _Canvas(scene, len(gradient))

        # The division by the final coverage comes last, so the slices are met twice.
        coverage = torch.zeros(gradient.shape[1:], dtype=scene.dtype, device=scene.device)
        for part in scene.slices():
            for rows, columns, received in canvas.receive(part, only_coverage):
                _accept(coverage[rows, columns], received[-1])
        covered = coverage > SMALLEST_COVERAGE
        incoming = gradient.to(scene.dtype) / coverage.clamp_min(SMALLEST_COVERAGE) * covered
        sorted_outgoing = torch.empty(
            len(gradient), len(scene.order), dtype=scene.dtype, device=scene.device
        )
        shared = torch.empty_like(incoming)
        coverage.zero_()
        for part in scene.slices():
            for rows, columns, received in canvas.receive(part, only_coverage):
                share = _accept(coverage[rows, columns], received[-1])
                torch.mul(incoming[:, rows, columns], share, out=shared[:, rows, columns])
            sums.send_back(part, shared, sorted_outgoing)
        outgoing = torch.empty_like(sorted_outgoing)
        outgoing[:, scene.order] = sorted_outgoing
        kept = gradient * ~covered
        return outgoing.view(gradient.shape).to(gradient.dtype) + kept, None, None, None


def _reach(level: int) -> int:
    """Pixels by which the kernel of a level extends on every side."""
    return max(math.ceil(abs(defocus_of_level(level)) - 0.5), 1)

"""Depth-ordered scatter: every pixel spreads its light over its circle of confusion."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from bokehdiff.rendering.aperture import Aperture

__all__ = ["depth_ordered_scatter", "scatter_bokehme", "scatter_reference"]

# Defocus is rounded to levels: 1/16 px apart up to a radius of 8 px, 1/128 of the radius apart
# beyond. One kernel is built for each level that occurs.
LEVELS_PER_PIXEL = 16
FINE_RADIUS = 8.0
# Neighbouring levels whose light arrives together (a quarter of a pixel of defocus up to the fine
# radius): surfaces as close as that do not occlude each other.
LEVELS_PER_SLICE = 4
# The outermost pixels are repeated beyond the frame over this share of the largest radius. Without
# it the border is a one-sided mean of the inside; the full radius would cost time for little.
FRAME_EXTENSION = 0.5
# Radii up to the longer side of the picture are accepted, and up to this in small pictures.
SMALLEST_RADIUS_LIMIT = 512
# A pixel that accepted less coverage than this keeps its own light.
SMALLEST_COVERAGE = 1e-6
# Running sums of differences cancel to about 1e-16 (float64); below this nothing has arrived.
SMALLEST_ARRIVAL = 1e-12


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
    aperture: shape of the opening; default disc.

    Each source spreads energy one over ``aperture.kernel(signed_defocus)``. Slices of sources of
    nearly equal depth arrive from near to far; a pixel accepts their coverage until it is full (a
    slice that brings more than the room left is scaled down), and the light is finally divided by
    the coverage accepted. What lies beyond the frame is unknown: the outermost pixels are repeated
    over half the largest radius, the division makes up for the rest.

    Differentiable in ``light``; ``signed_defocus`` receives no gradient. A kernel enters through
    the horizontal differences of its rows, which are summed up once for each slice: the work for
    a source grows with its radius instead of its area, and memory hardly depends on the radius.
    :func:`scatter_reference` is the plain twin.
    """
    _check(light, signed_defocus)
    aperture = aperture or Aperture()
    defocus = signed_defocus.detach().to(light.device)
    blurred = []
    for picture, radii in zip(light.split(1), defocus.split(1), strict=True):
        margin = _margin(radii)
        wide, wide_radii = _extend(picture, margin), _extend(radii, margin)
        wide = _Scatter.apply(wide[0], wide_radii[0, 0], aperture)
        blurred.append(wide[:, margin : margin + light.shape[2], margin : margin + light.shape[3]])
    return torch.stack(blurred)


def scatter_reference(
    light: torch.Tensor, signed_defocus: torch.Tensor, *, aperture: Aperture | None = None
) -> torch.Tensor:
    """Plain float64 twin of :func:`depth_ordered_scatter`: slice by slice, pixel by pixel.

    Same arguments, same result up to rounding; returns float64. Slow: for tests and for reading.
    """
    _check(light, signed_defocus)
    aperture = aperture or Aperture()
    results = []
    light = light.to(torch.float64)
    for picture, radii in zip(light.split(1), signed_defocus.split(1), strict=True):
        margin = _margin(radii)
        picture = _extend(picture, margin)[0]
        levels = quantise_defocus(_extend(radii, margin)[0, 0])
        height, width = levels.shape
        accepted, coverage = torch.zeros_like(picture), torch.zeros_like(picture[0])
        for together in slice_of_level(levels).unique().flip(0):
            arriving, amount = torch.zeros_like(picture), torch.zeros_like(picture[0])
            for y, x in (slice_of_level(levels) == together).nonzero().tolist():
                kernel = aperture.kernel(defocus_of_level(int(levels[y, x])), dtype=torch.float64)
                reach = kernel.shape[0] // 2
                for target_y in range(max(y - reach, 0), min(y + reach + 1, height)):
                    for target_x in range(max(x - reach, 0), min(x + reach + 1, width)):
                        weight = kernel[target_y - y + reach, target_x - x + reach]
                        arriving[:, target_y, target_x] += weight * picture[:, y, x]
                        amount[target_y, target_x] += weight
            share = ((1 - coverage) / amount.clamp_min(SMALLEST_ARRIVAL)).clamp(0, 1)
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
    _check(image, signed_defocus)
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


class _Group(NamedTuple):
    """Sources of one defocus level: a run of the sorted pixel indices."""

    start: int
    stop: int
    level: int
    first_row: int
    last_row: int


class _Footprint(NamedTuple):
    """Horizontal differences of a kernel: K entries at offsets (dy, dx) from the source."""

    dy: torch.Tensor  # (K,) int64
    dx: torch.Tensor  # (K,) int64
    weight: torch.Tensor  # (K,)


class _Scene:
    """Sources of one picture, sorted from near to far and gathered into groups and slices."""

    def __init__(self, signed_defocus: torch.Tensor, aperture: Aperture) -> None:
        self.height, self.width = signed_defocus.shape
        self.device = signed_defocus.device
        # Differences along a row need the digits; Apple GPUs have no float64.
        self.dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.aperture = aperture
        self.footprints: dict[int, _Footprint] = {}
        levels = quantise_defocus(signed_defocus).flatten()
        # Stable: within a level the pixels stay in reading order, first row first.
        sorted_levels, self.order = levels.sort(descending=True, stable=True)
        found, counts = sorted_levels.unique_consecutive(return_counts=True)
        stops = counts.cumsum(0)
        starts = stops - counts
        first_rows = self.order[starts] // self.width
        last_rows = self.order[stops - 1] // self.width
        table = torch.stack([starts, stops, found, first_rows, last_rows], dim=1)
        self.groups = [_Group(*row) for row in table.tolist()]

    def slices(self) -> Iterator[list[_Group]]:
        """Groups whose light arrives together, nearest first."""
        together = [self.groups[0]]
        for group in self.groups[1:]:
            if slice_of_level(group.level) != slice_of_level(together[0].level):
                yield together
                together = []
            together.append(group)
        yield together

    def footprint(self, level: int) -> _Footprint:
        if level not in self.footprints:
            kernel = self.aperture.kernel(defocus_of_level(level), dtype=torch.float64)
            reach = kernel.shape[0] // 2
            steps = F.pad(kernel, (1, 1)).diff(dim=1)
            dy, dx = steps.nonzero(as_tuple=True)
            self.footprints[level] = _Footprint(
                (dy - reach).to(self.device),
                (dx - reach).to(self.device),
                steps[dy, dx].to(dtype=self.dtype, device=self.device),
            )
        return self.footprints[level]

    def pieces(
        self, group: _Group, footprint: _Footprint
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(sources (n,), places (n, K)): pixel indices, and where their differences belong.

        Places count in rows of width + 1. What starts left of the frame goes to column 0, where
        the running sum would bring it; everything else outside goes to the spare column or the
        spare row, which nobody reads.
        """
        entries_at_once = 1 << 18 if self.device.type == "cpu" else 1 << 24
        sources_at_once = max(1, entries_at_once // len(footprint.weight))
        for sources in self.order[group.start : group.stop].split(sources_at_once):
            y = torch.div(sources, self.width, rounding_mode="floor")
            x = sources - y * self.width
            rows = y.unsqueeze(1) + footprint.dy
            rows = torch.where((rows < 0) | (rows > self.height), self.height, rows)
            columns = (x.unsqueeze(1) + footprint.dx).clamp_(0, self.width)
            yield sources, columns.add_(rows, alpha=self.width + 1)


class _Canvas:
    """Buffer of horizontal differences (C, H + 1, W + 1) that one slice after another enters."""

    def __init__(self, scene: _Scene, light: torch.Tensor | None) -> None:
        """``light``: (C, H * W) light of the sources, or None to scatter only their coverage."""
        self.scene, self.light = scene, light
        channels = 1 if light is None else 1 + len(light)
        self.differences = torch.zeros(
            channels, scene.height + 1, scene.width + 1, dtype=scene.dtype, device=scene.device
        )

    def receive(self, together: list[_Group]) -> tuple[slice, torch.Tensor]:
        """Rows reached by a slice, and its light (C, rows, W) there, coverage last."""
        scene = self.scene
        reach = math.ceil(max(abs(defocus_of_level(group.level)) for group in together) + 0.5)
        top = max(min(group.first_row for group in together) - reach, 0)
        bottom = min(max(group.last_row for group in together) + reach + 1, scene.height)
        self.differences[:, top:bottom] = 0
        flat = self.differences.view(len(self.differences), -1)
        for group in together:
            footprint = scene.footprint(group.level)
            for sources, places in scene.pieces(group, footprint):
                where = places.view(-1)
                for channel in range(len(flat) - 1):
                    assert self.light is not None
                    amount = self.light[channel, sources].unsqueeze(1) * footprint.weight
                    flat[channel].scatter_add_(0, where, amount.view(-1))
                flat[-1].scatter_add_(0, where, footprint.weight.expand_as(places).reshape(-1))
        received = self.differences[:, top:bottom].cumsum(-1)[..., : scene.width]
        return slice(top, bottom), received


def _accept(coverage: torch.Tensor, arriving: torch.Tensor) -> torch.Tensor:
    """Share in [0, 1] of the arriving coverage that still fits; it is added to ``coverage``."""
    arriving = torch.where(arriving > SMALLEST_ARRIVAL, arriving, 0)
    share = ((1 - coverage) / arriving.clamp_min(SMALLEST_ARRIVAL)).clamp_(0, 1)
    coverage.addcmul_(arriving, share)
    return share


class _Scatter(torch.autograd.Function):
    """Scatter of one picture: light (C, H, W), defocus (H, W). Linear in light.

    The backward pass replays the coverage, which decides who is seen, and gathers the gradient
    with the same shares; only the defocus is kept in between.
    """

    @staticmethod
    def forward(
        ctx: Any, light: torch.Tensor, defocus: torch.Tensor, aperture: Aperture
    ) -> torch.Tensor:
        ctx.save_for_backward(defocus)
        ctx.aperture = aperture
        channels, height, width = light.shape
        scene = _Scene(defocus, aperture)
        canvas = _Canvas(scene, light.reshape(channels, -1).to(scene.dtype))
        accepted = torch.zeros(light.shape, dtype=scene.dtype, device=scene.device)
        coverage = torch.zeros(height, width, dtype=scene.dtype, device=scene.device)
        for together in scene.slices():
            rows, received = canvas.receive(together)
            share = _accept(coverage[rows], received[-1])
            accepted[:, rows].addcmul_(received[:-1], share)
        blurred = accepted.div_(coverage.clamp_min(SMALLEST_COVERAGE)).to(light.dtype)
        return torch.where(coverage > SMALLEST_COVERAGE, blurred, light)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (defocus,) = ctx.saved_tensors
        channels, height, width = gradient.shape
        scene = _Scene(defocus, ctx.aperture)
        canvas = _Canvas(scene, None)

        # The division by the final coverage comes last, so the slices are met twice.
        coverage = torch.zeros(height, width, dtype=scene.dtype, device=scene.device)
        for together in scene.slices():
            rows, received = canvas.receive(together)
            _accept(coverage[rows], received[-1])
        covered = coverage > SMALLEST_COVERAGE
        incoming = gradient.to(scene.dtype) / coverage.clamp_min(SMALLEST_COVERAGE) * covered
        outgoing = torch.zeros(channels, height * width, dtype=scene.dtype, device=scene.device)
        # Running sums, read backwards; the spare row and column stay zero.
        sums = incoming.new_zeros(channels, height + 1, width + 1)
        coverage.zero_()
        for together in scene.slices():
            rows, received = canvas.receive(together)
            share = _accept(coverage[rows], received[-1])
            sums[:, rows, :width] = (incoming[:, rows] * share).flip(-1).cumsum(-1).flip(-1)
            flat = sums.view(channels, -1)
            for group in together:
                footprint = scene.footprint(group.level)
                for sources, places in scene.pieces(group, footprint):
                    gathered = flat[:, places.view(-1)].view(channels, *places.shape)
                    outgoing[:, sources] = gathered @ footprint.weight
        kept = gradient * ~covered
        return outgoing.view(channels, height, width).to(gradient.dtype) + kept, None, None


def _margin(signed_defocus: torch.Tensor) -> int:
    """Pixels by which the picture is extended beyond its frame, at most its longer side."""
    wanted = math.ceil(FRAME_EXTENSION * max(float(signed_defocus.abs().max()) - 0.5, 0))
    return min(wanted, max(signed_defocus.shape[-2:]))


def _extend(picture: torch.Tensor, margin: int) -> torch.Tensor:
    """(1, C, H, W) with the outermost pixels repeated ``margin`` times on each side."""
    return F.pad(picture, (margin,) * 4, mode="replicate") if margin else picture


def _check(light: torch.Tensor, signed_defocus: torch.Tensor) -> None:
    if light.dim() != 4 or 0 in light.shape:
        raise ValueError(f"light has shape {tuple(light.shape)}; wanted (B, C, H, W).")
    if light.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"light is {light.dtype}; wanted float32 or float64.")
    wanted = (light.shape[0], 1, *light.shape[2:])
    if signed_defocus.shape != wanted:
        raise ValueError(
            f"signed_defocus has shape {tuple(signed_defocus.shape)}; wanted {wanted} to match "
            "light."
        )
    if not bool(torch.isfinite(signed_defocus).all()):
        raise ValueError("signed_defocus must be finite; fill holes in the disparity first.")
    largest, limit = float(signed_defocus.abs().max()), max(*light.shape[2:], SMALLEST_RADIUS_LIMIT)
    if largest > limit:
        raise ValueError(
            f"The largest circle of confusion has a radius of {largest:.0f} px, more than the "
            f"{limit} px this picture allows (its longer side, at least {SMALLEST_RADIUS_LIMIT}). "
            "K is pixels of radius per unit of disparity: lower it, or check the disparity's unit."
        )

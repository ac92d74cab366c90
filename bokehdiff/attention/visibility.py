"""What stands in the way of light: rays from key tokens to query tokens through the scene."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import PisaConfig

if TYPE_CHECKING:
    from .geometry import PisaGeometry


def jitter_table(config: PisaConfig, *entries: int) -> Tensor:
    """Return offsets (supersampling, *entries, 2) in tokens, x then y; the first is zero.

    The others are stratified: random points of an additive low-discrepancy sequence, which fill
    the token evenly for any number of rays. The same config gives the same table.
    """
    table = torch.zeros(config.supersampling, *entries, 2)
    rays = config.supersampling - 1
    if rays:
        # Roberts' R2 sequence: the two-dimensional relative of the golden ratio.
        ratio = 1.32471795724474602596
        steps = torch.tensor([1 / ratio, 1 / ratio**2], dtype=torch.float64)
        counts = torch.arange(rays, dtype=torch.float64).view(rays, *([1] * len(entries)), 1)
        # Not torch's numbers: torch.func would take them for noise that differs between calls.
        numbers = random.Random(config.seed)
        start = [numbers.random() for _ in range(2 * math.prod(entries))]
        start_of_entries = torch.tensor(start, dtype=torch.float64).view(*entries, 2)
        table[1:] = ((start_of_entries + counts * steps) % 1.0 - 0.5) * config.jitter_width
    return table


def token_positions(geometry: PisaGeometry) -> tuple[Tensor, Tensor]:
    """Return x (N,) and y (N,) of the token centres, from -1 to 1 across the image."""
    assert geometry.occlusion_map is not None
    height, width, like = geometry.height, geometry.width, geometry.occlusion_map
    rows = torch.arange(height, device=like.device, dtype=like.dtype)
    columns = torch.arange(width, device=like.device, dtype=like.dtype)
    rows, columns = (2 * rows + 1) / height - 1, (2 * columns + 1) / width - 1
    if geometry.config.token_enumeration == "column_major":
        # The authors let the axis with `height` values run fastest and use it as x.
        return rows.repeat(width), columns.repeat_interleave(height)
    return columns.repeat(height), rows.repeat_interleave(width)


def count_visible_rays(
    geometry: PisaGeometry,
    image: int,
    key: Tensor,
    query: Tensor,
    nearest: Tensor,
    noise: Tensor | None = None,
) -> Tensor:
    """Return how many of the `supersampling` rays from key to query arrive (Eq. 7-8).

    A ray is stopped when, at any of its samples, the scene is strictly nearer than the sample.

    Args:
        geometry: of a scene that occludes.
        image: index into the batch.
        key, query: (pairs,) token numbers within the image.
        nearest: (pairs,) bound of the disparity that the rays can meet. Samples that nothing can
            stop are not looked up, which does not change the result.
        noise: (supersampling - 1, segments, pairs, 2) in [0, 1), for `jitter="location_random"`.

    Returns:
        (pairs,) uint8.
    """
    assert geometry.token_disparity is not None and geometry.occlusion_map is not None
    config = geometry.config
    scene = geometry.occlusion_map[image : image + 1]
    disparity = geometry.token_disparity[image].to(scene.dtype)
    centres = token_positions(geometry)
    entries = (config.segments,) if config.jitter == "location_table" else ()
    offsets = jitter_table(config, *entries).to(scene)
    # (segments or 1, supersampling, 2), in positions; the first ray has none.
    offsets = offsets.movedim(0, -2).reshape(-1, config.supersampling, 2) * jitter_unit(geometry)

    rays, count = config.supersampling, key.numel()
    visible = torch.full((count,), rays, dtype=torch.uint8, device=key.device)
    stopped = torch.zeros(rays, count, dtype=torch.bool, device=key.device)
    pair = torch.arange(count, device=key.device)
    of_key = disparity.index_select(0, key)
    risk = least_depth_at_risk(of_key, nearest)
    x_of_query, y_of_query = (centre.index_select(0, query) for centre in centres)
    x_to_key = centres[0].index_select(0, key).sub_(x_of_query)
    y_to_key = centres[1].index_select(0, key).sub_(y_of_query)
    nearest_around = nearest_around_samples(geometry)[image]
    shares = ray_depths(geometry)
    # From the key outwards: the higher a sample has risen, the fewer pairs can still be troubled.
    for segment in reversed(range(config.segments)):
        share = shares[segment]
        troubled = (risk <= share).nonzero().squeeze(1)
        if troubled.numel() < pair.numel():
            visible[pair] = rays - stopped.sum(0, dtype=torch.uint8)
            stopped = stopped.index_select(1, troubled)
            pair, risk, of_key, query, x_of_query, y_of_query, x_to_key, y_to_key = (
                value.index_select(0, troubled)
                for value in (
                    pair, risk, of_key, query, x_of_query, y_of_query, x_to_key, y_to_key
                )
            )  # fmt: skip
        if pair.numel() == 0:
            return visible
        nearer = share * of_key
        sample_depth = nearer + (1 - share)
        if config.sample_depth == "key":
            # Eq. 7 with 1 - depth = p (1 - d) put in: no division by zero at d = 1.
            fraction = nearer.div_(nearer + (1 - share))
        else:
            depth = share * disparity[query] + (1 - share)
            fraction = (1 - depth) * of_key / (depth * (1 - of_key))
        x = (x_to_key * fraction).add_(x_of_query)
        y = (y_to_key * fraction).add_(y_of_query)
        # Few samples have anything around them that could stop them; only these are looked up.
        bound = nearest_around.view(-1).index_select(0, _cell_of_sample(nearest_around, x, y))
        near = (bound > sample_depth).nonzero().squeeze(1)
        if near.numel() == 0:
            continue
        x, y, fraction, sample_depth = (
            value.index_select(0, near) for value in (x, y, fraction, sample_depth)
        )
        samples = scene.new_empty(rays, near.numel(), 2)
        for axis, unmoved in enumerate((x, y)):
            samples[0, :, axis] = unmoved
            for ray in range(1, rays):
                if config.jitter == "source_table":
                    moved = fraction * offsets[0, ray, axis]
                elif config.jitter == "location_table":
                    moved = offsets[segment, ray, axis]
                else:
                    assert noise is not None
                    moved = (noise[ray - 1, segment, pair[near], axis] - 0.5) * config.jitter_width
                    moved = moved * jitter_unit(geometry)[axis]
                torch.add(unmoved, moved, out=samples[ray, :, axis])
        met = F.grid_sample(
            scene, samples[None], mode="bilinear", padding_mode="zeros", align_corners=False
        )[0, 0]
        stopped[:, near] |= met > sample_depth
    visible[pair] = rays - stopped.sum(0, dtype=torch.uint8)
    return visible


def nearest_around_samples(geometry: PisaGeometry) -> Tensor:
    """Return (B, rows, columns) bounds of the disparity that an interpolated sample can meet.

    One for each cell of the occlusion map, for samples that lie in the cell before they are
    jittered. Made once.
    """
    cached = geometry._derived.get("nearest_around_samples")
    if isinstance(cached, Tensor):
        return cached
    scene = geometry.occlusion_map
    assert scene is not None
    reach = []
    for unit, samples in zip(
        jitter_unit(geometry).tolist(), (scene.shape[3], scene.shape[2]), strict=True
    ):
        jitter = unit * geometry.config.jitter_width / 2 if geometry.config.supersampling > 1 else 0
        # Positions run from -1 to 1. Interpolation takes the next sample on either side.
        reach.append(math.ceil(jitter * samples / 2 + 1 - 1e-6))
    widened = _largest_around(_largest_around(scene, 3, reach[0]), 2, reach[1])[:, 0]
    # Interpolation may round to a little more than the largest of what it interpolates.
    widened = widened * (1 + 1e-5)
    geometry._derived["nearest_around_samples"] = widened
    return widened


def _cell_of_sample(cells: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return the flat number of the cell of (rows, columns) in which positions lie."""
    rows, columns = cells.shape
    row = ((y + 1) * (rows / 2)).clamp_(0, rows - 1).floor_()
    column = ((x + 1) * (columns / 2)).clamp_(0, columns - 1)
    # Exact: maps are far smaller than the integers that floats hold.
    # Positions that are not a number, from the authors' 0 / 0, meet nothing in any cell.
    return row.mul_(columns).add_(column.floor_()).nan_to_num_(0.0).int()


def ray_depths(geometry: PisaGeometry) -> Tensor:
    """Return p (segments,): a sample of a key with disparity d lies at p d + (1 - p)."""
    assert geometry.occlusion_map is not None
    like = geometry.occlusion_map
    return torch.linspace(0.1, 0.9, geometry.config.segments, dtype=like.dtype, device=like.device)


def least_depth_at_risk(disparity: Tensor, nearest: Tensor) -> Tensor:
    """Return p from which on the samples of keys may be stopped; above 0.9 none may.

    A sample lies at p d + 1 - p, so something at `nearest` can stop it only if
    p > (1 - nearest) / (1 - d). Slightly less is returned, to be safe from rounding.
    """
    return (1 - nearest) / (1 - disparity).clamp(min=1e-9) * (1 - 1e-5) - 1e-6


def keys_at_risk(geometry: PisaGeometry, disparity: Tensor, nearest: Tensor) -> Tensor:
    """Return bool like `disparity`: keys of which something may stop a ray."""
    return least_depth_at_risk(disparity, nearest) <= ray_depths(geometry)[-1]


def jitter_unit(geometry: PisaGeometry) -> Tensor:
    """Return (2,) what a jitter of one token means in x and y, in positions from -1 to 1."""
    assert geometry.occlusion_map is not None
    # The authors, who move the samples, scale both axes by the number of rows.
    rows, columns = geometry.height, geometry.width
    if geometry.config.jitter != "source_table":
        columns = rows
    unit = torch.tensor([2.0 / columns, 2.0 / rows], dtype=geometry.occlusion_map.dtype)
    return unit.to(geometry.occlusion_map.device)


def nearest_anywhere(geometry: PisaGeometry) -> Tensor:
    """Return (B, N, 4) the largest disparity of each key's image, the same for all directions."""
    assert geometry.occlusion_map is not None
    nearest = geometry.occlusion_map.flatten(1).amax(1)[:, None, None]
    return nearest.expand(-1, geometry.token_count, 4)


def nearest_within_circles(geometry: PisaGeometry) -> Tensor:
    """Return (B, N, 4) bounds of the disparity that rays within each key's circle can meet.

    One for each direction of the ray, numbered as by `ray_direction`.
    """
    assert geometry.occlusion_map is not None
    config = geometry.config
    # Samples may leave the segment between the tokens; then only the whole image bounds them.
    if config.sample_depth != "key" or config.token_enumeration != "row_major":
        return nearest_anywhere(geometry)
    # Beyond the segment: half the jitter, and interpolation with the next sample of the map.
    half_jitter = float(jitter_unit(geometry)[0]) / 2 * config.jitter_width * geometry.width / 2
    slack = math.ceil(max(half_jitter, 0.5) + 0.5 - 1e-6)
    height, width = geometry.height, geometry.width
    reach = (geometry.radius.detach() + geometry.margin) / min(geometry.spacing)
    reach = reach.clamp(max=max(height, width)).ceil().view(-1, 1, height, width)

    around = F.adaptive_max_pool2d(geometry.occlusion_map, (height, width))
    around = _largest_around(_largest_around(around, 3, slack), 2, slack)
    # Four pictures, turned so that every direction is down and to the right.
    widened, reach = _turned(around.expand(-1, 4, -1, -1)), _turned(reach.expand(-1, 4, -1, -1))
    nearest, known = widened, 0
    largest = int(reach.max())
    while known < largest:
        # Bounds of a few reaches serve all: no more than half as far again as needed.
        wanted = min(max(known + 1, known * 3 // 2), largest)
        for axis in (2, 3):
            widened = _largest_ahead(widened, axis, wanted - known)
        nearest = torch.where(reach > known, widened, nearest)
        known = wanted
    return _turned(nearest).flatten(2).mT


def ray_direction(geometry: PisaGeometry, key: Tensor, query: Tensor) -> Tensor:
    """Return 0 to 3 for rays from key to query: 1 if it goes left, plus 2 if it goes up.

    Args:
        geometry: the geometry.
        key, query: (pairs,) numbers in the whole batch.
    """
    # Looked up, for dividing integers is slow.
    number = torch.arange(geometry.batch * geometry.token_count, device=key.device)
    row, column = (number // geometry.width).int(), (number % geometry.width).int()
    leftwards = column.index_select(0, query) < column.index_select(0, key)
    upwards = row.index_select(0, query) < row.index_select(0, key)
    return leftwards.long().add_(upwards, alpha=2)


def _largest_ahead(maps: Tensor, axis: int, reach: int) -> Tensor:
    """Return the maximum over each sample and the `reach` next ones along an axis."""
    covered = 0
    while covered < min(reach, maps.shape[axis] - 1):
        step = min(covered + 1, reach - covered, maps.shape[axis] - 1)
        rest = maps.shape[axis] - step
        ahead = maps.clone()
        ahead.narrow(axis, 0, rest).copy_(
            torch.maximum(maps.narrow(axis, 0, rest), maps.narrow(axis, step, rest))
        )
        maps, covered = ahead, covered + step
    return maps


def _largest_around(maps: Tensor, axis: int, reach: int) -> Tensor:
    """Return the maximum over each sample and `reach` samples on both sides along an axis."""
    behind = _largest_ahead(maps.flip(axis), axis, reach).flip(axis)
    return torch.maximum(_largest_ahead(maps, axis, reach), behind)


def _turned(maps: Tensor) -> Tensor:
    """Return (B, 4, H, W) with channels mirrored not, in x, in y, and in both; its own inverse."""
    as_is, left, up, both = maps.unbind(1)
    return torch.stack([as_is, left.flip(-1), up.flip(-2), both.flip((-2, -1))], 1)

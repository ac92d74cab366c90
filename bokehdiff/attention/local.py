"""The exact local backend: light that cannot leave its circle is only looked for inside it.

The softmax of PISA runs over queries, so every key is complete on its own. Keys are taken in tiles
of 8 x 8 tokens; the largest radius of a tile says how far its light can reach, and tiles of like
reach are worked on together. Everything is laid out as

    (..., tile rows, tile columns, tiles)

with the tiles innermost. A fixed step from key to query then is a plain slice of the window of
queries around the tiles, distances depend on the step alone, and every operation runs over long
contiguous rows. Nothing outside the circles is computed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .geometry import NearestDisparity, PisaGeometry, log_soft_mask

TILE = 8
SCORES_PER_CHUNK = 1 << 20
"""Scores worked on at a time; more costs page faults, fewer costs calls."""
PRODUCTS_PER_STEP = 1 << 18
"""Channels times keys worked on at a time, so that the products of one step stay in cache."""


@dataclass(frozen=True, eq=False)
class TileGroup:
    """Tiles whose light reaches equally far.

    Attributes:
        halo: tokens by which the window of queries is larger than the tile on each side, (y, x).
        steps: (dy, dx) from key to query, nearest first, so the first is (0, 0).
        shells: index into `distances` for every step.
        distances: the different lengths of the steps, in units, ascending.
        image, top, left: (tiles,) image and first token of each tile.
        crosses_border: some windows or tiles leave the grid.
        nearest: (tile rows, tile columns, tiles) bound of the disparity in the way of each key;
            None when nothing can stand in the way, or `visible_rays` is stored.
        visible_rays: (steps, tile rows, tile columns, tiles) uint8 count of rays that arrive; None
            when nothing is in the way, or when it is computed again in each call.
    """

    halo: tuple[int, int]
    steps: tuple[tuple[int, int], ...]
    shells: tuple[int, ...]
    distances: tuple[float, ...]
    image: Tensor
    top: Tensor
    left: Tensor
    crosses_border: bool
    nearest: Tensor | None = None
    visible_rays: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LocalPlan:
    """Tiles of one geometry, grouped by reach. Tiles without emitters are absent.

    Attributes:
        tile: rows and columns of a tile.
        groups: the groups, nearest reach first.
    """

    tile: tuple[int, int]
    groups: tuple[TileGroup, ...]

    @classmethod
    def make(cls, geometry: PisaGeometry) -> LocalPlan:
        """Return the plan of a geometry; traces visibility inside the circles."""
        height, width = geometry.height, geometry.width
        if geometry.token_disparity is not None and not supports(geometry):
            raise ValueError(unsupported_message(geometry))
        tile = (min(TILE, height), min(TILE, width))
        tile_reach = _tile_reach(geometry, tile)
        image, tile_row, tile_column = (tile_reach >= 0).nonzero(as_tuple=True)
        reach = tile_reach[image, tile_row, tile_column]
        top, left = tile_row * tile[0], tile_column * tile[1]

        nearest = NearestDisparity(geometry) if geometry.token_disparity is not None else None
        groups: list[TileGroup] = []
        bytes_left = geometry.visibility_byte_budget
        for group_reach in reach.unique().tolist():
            members = (reach == group_reach).nonzero().squeeze(1)
            halo, steps, shells, distances = _steps_within(group_reach, geometry)
            bottom = top[members] + tile[0] + halo[0]
            right = left[members] + tile[1] + halo[1]
            border = (top[members] < halo[0]) | (left[members] < halo[1])
            border |= (bottom > height) | (right > width)
            for at_border in (False, True):
                which = members[border == at_border]
                whole = TileGroup(
                    halo=halo,
                    steps=steps,
                    shells=shells,
                    distances=distances,
                    image=image[which],
                    top=top[which],
                    left=left[which],
                    crosses_border=at_border,
                )
                for group in _split_by_occlusion(geometry, whole, tile, nearest):
                    size = len(steps) * tile[0] * tile[1] * group.image.numel()
                    if group.nearest is not None and size <= bytes_left:
                        bytes_left -= size
                        group = _with_visible_rays(geometry, group, tile)
                    groups.append(group)
        return cls(tile, tuple(groups))


def supports(geometry: PisaGeometry) -> bool:
    """Return whether visibility depends on the pair alone, so that it can be traced piecewise."""
    noisy = geometry.config.jitter == "location_random" and geometry.config.supersampling > 1
    return geometry.token_disparity is None or not noisy


def pair_share(geometry: PisaGeometry) -> float:
    """Return about which share of the N^2 pairs of tokens this backend would work on.

    More than one when circles fill the image, for the windows are wider than the image then.
    """
    tile = (min(TILE, geometry.height), min(TILE, geometry.width))
    reach = _tile_reach(geometry, tile)
    reach = reach[reach >= 0]
    window = (2 * geometry.height - 1) * (2 * geometry.width - 1)
    steps = (math.pi / math.prod(geometry.spacing) * reach**2).clamp(1, window)
    return float(steps.sum()) * math.prod(tile) / (geometry.token_count**2 * geometry.batch)


def unsupported_message(geometry: PisaGeometry) -> str:
    """Return why the local backend refuses a geometry."""
    return (
        "The local backend needs the same rays in every call, but jitter='location_random' draws "
        "new noise for each pair of tokens. Use backend='reference', or jitter='location_table'."
    )


def _tile_reach(geometry: PisaGeometry, tile: tuple[int, int]) -> Tensor:
    """Return (B, tile rows, tile columns): how far light gets, rounded up; -1 without emitters."""
    reach = geometry.radius.detach() + geometry.margin
    if geometry.emitters is not None:
        reach = reach.masked_fill(~geometry.emitters, -1.0)
    height, width = geometry.height, geometry.width
    reach = reach.view(-1, height, width)
    reach = torch.nn.functional.pad(reach, (0, -width % tile[1], 0, -height % tile[0]), value=-1.0)
    reach = reach.unflatten(2, (-1, tile[1])).unflatten(1, (-1, tile[0])).amax(dim=(2, 4))
    # Few different values make few groups: steps of half a token, wider for wide circles.
    tokens = reach / min(geometry.spacing)
    diagonal = math.hypot(height * geometry.spacing[0], width * geometry.spacing[1])
    whole_image = diagonal / min(geometry.spacing)
    tokens = tokens.clamp(max=whole_image)
    grain = torch.full_like(tokens, 0.5)
    for wide in (8, 16, 32):
        grain = torch.where(tokens > wide, grain * 2, grain)
    rounded = (tokens / grain).ceil() * grain * min(geometry.spacing)
    return torch.where(reach < 0, reach, rounded)


def _steps_within(
    reach: float, geometry: PisaGeometry
) -> tuple[tuple[int, int], tuple[tuple[int, int], ...], tuple[int, ...], tuple[float, ...]]:
    """Return halo, steps, shells and distances of a `TileGroup` of this reach."""
    space_y, space_x = geometry.spacing
    rows = min(int(reach / space_y), geometry.height - 1)
    columns = min(int(reach / space_x), geometry.width - 1)
    by_distance: dict[float, list[tuple[int, int]]] = {}
    for dy in range(-rows, rows + 1):
        for dx in range(-columns, columns + 1):
            distance = math.hypot(dy * space_y, dx * space_x)
            if distance <= reach:
                by_distance.setdefault(distance, []).append((dy, dx))
    distances = tuple(sorted(by_distance))
    steps = tuple(step for distance in distances for step in by_distance[distance])
    shells = tuple(index for index, distance in enumerate(distances) for _ in by_distance[distance])
    halo = max(abs(dy) for dy, _ in steps), max(abs(dx) for _, dx in steps)
    return halo, steps, shells, distances


def _split_by_occlusion(
    geometry: PisaGeometry,
    group: TileGroup,
    tile: tuple[int, int],
    nearest: NearestDisparity | None,
) -> Iterator[TileGroup]:
    """Return the tiles where nothing can stand in the way, then those where something may."""
    hindered = torch.zeros_like(group.image, dtype=torch.bool)
    around = None
    if nearest is not None:
        key, _ = _rows_of(geometry, group.image, group.top, group.left, *tile)
        around = nearest.within(max(group.halo)).reshape(-1)[key]
        hindered = _keys_at_risk(geometry, key, around).flatten(0, 1).any(0)
    for in_the_way in (False, True):
        which = (hindered == in_the_way).nonzero().squeeze(1)
        if which.numel():
            yield dataclasses.replace(
                group,
                image=group.image[which],
                top=group.top[which],
                left=group.left[which],
                nearest=around[..., which] if around is not None and in_the_way else None,
            )


def _keys_at_risk(geometry: PisaGeometry, key: Tensor, nearest: Tensor) -> Tensor:
    """Return bool like `key`: emitting keys of which something may stop a ray."""
    assert geometry.token_disparity is not None
    disparity = geometry.token_disparity.reshape(-1)[key]
    at_risk = geometry.least_depth_at_risk(disparity, nearest) < geometry.ray_depths()[-1]
    return at_risk if geometry.emitters is None else at_risk & geometry.emitters.reshape(-1)[key]


def _rows_of(
    geometry: PisaGeometry, image: Tensor, top: Tensor, left: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Return token numbers (height, width, tiles) in the whole batch, and which are on the grid.

    Numbers off the grid are moved to its edge; what is read there must be masked.
    """
    y = top + torch.arange(height, device=top.device)[:, None]
    x = left + torch.arange(width, device=top.device)[:, None]
    inside = ((y >= 0) & (y < geometry.height))[:, None] & ((x >= 0) & (x < geometry.width))[None]
    y, x = y.clamp(0, geometry.height - 1), x.clamp(0, geometry.width - 1)
    return (image * geometry.token_count + y * geometry.width)[:, None] + x[None], inside


def _visible_rays(
    geometry: PisaGeometry, group: TileGroup, tile: tuple[int, int], members: slice
) -> Tensor:
    """Return (steps, tile rows, tile columns, tiles) uint8 for some tiles of a group."""
    assert group.nearest is not None
    image = group.image[members]
    key, inside = _rows_of(geometry, image, group.top[members], group.left[members], *tile)
    nearest = group.nearest[..., members]
    hindered = inside & _keys_at_risk(geometry, key, nearest)
    steps = torch.tensor(group.steps, device=key.device)
    visible = torch.full(
        (len(group.steps), key.numel()),
        geometry.config.supersampling,
        dtype=torch.uint8,
        device=key.device,
    )
    for number in image.unique().tolist():
        place = (hindered & (image == number)).view(-1).nonzero().squeeze(1)
        mine = key.view(-1)[place] - number * geometry.token_count
        visible[:, place] = geometry.visible_rays(
            number, mine, steps[:, :1], steps[:, 1:], nearest=nearest.reshape(-1)[place]
        )
    return visible.view(len(group.steps), *key.shape)


def _with_visible_rays(
    geometry: PisaGeometry, group: TileGroup, tile: tuple[int, int]
) -> TileGroup:
    """Return the group with its visibility stored, or marked as unhindered if all rays arrive."""
    tiles = group.image.numel()
    at_once = _tiles_per_chunk(group, tile, 1)
    visible = torch.cat(
        [
            _visible_rays(geometry, group, tile, slice(start, start + at_once))
            for start in range(0, tiles, at_once)
        ],
        dim=-1,
    )
    if bool((visible == geometry.config.supersampling).all()):
        return dataclasses.replace(group, nearest=None)
    return dataclasses.replace(group, nearest=None, visible_rays=visible)


def _shift(
    window: Tensor, dy: int, dx: int, halo: tuple[int, int], tile: tuple[int, int]
) -> Tensor:
    """Return the part of (..., window rows, window columns, tiles) one step away from the keys."""
    top, left = halo[0] + dy, halo[1] + dx
    return window[..., top : top + tile[0], left : left + tile[1], :]


def _tiles_per_chunk(group: TileGroup, tile: tuple[int, int], channels: int) -> int:
    """Return how many tiles to take at a time, for one head."""
    keys = min(SCORES_PER_CHUNK // len(group.steps), PRODUCTS_PER_STEP // channels)
    return max(1, keys // (tile[0] * tile[1]))


class _Chunk:
    """Some tiles of a group, with what is needed to weigh their keys' light."""

    def __init__(
        self, geometry: PisaGeometry, tile: tuple[int, int], group: TileGroup, members: slice
    ) -> None:
        self.geometry, self.tile, self.group, self.members = geometry, tile, group, members
        self.heads: list[slice] = []
        image, top, left = group.image[members], group.top[members], group.left[members]
        self.key, self.key_inside = _rows_of(geometry, image, top, left, *tile)
        halo_y, halo_x = group.halo
        self.query, self.query_inside = _rows_of(
            geometry, image, top - halo_y, left - halo_x, tile[0] + 2 * halo_y, tile[1] + 2 * halo_x
        )
        self.emits: Tensor | None = self.key_inside if group.crosses_border else None
        if geometry.emitters is not None:
            emits = geometry.emitters.reshape(-1)[self.key]
            self.emits = emits if self.emits is None else emits & self.emits

    def keys_of(self, plane: Tensor) -> Tensor:
        """Return (C, H, tile rows, tile columns, tiles) of a (C, H, B N)."""
        return _take(plane, self.key)

    def values_of(self, plane: Tensor) -> Tensor:
        """Return `keys_of`, 0 where a key does not emit: its column is 0."""
        values = _take(plane, self.key)
        return values if self.emits is None else values * self.emits

    def queries_of(self, plane: Tensor) -> Tensor:
        """Return (C, H, window rows, window columns, tiles) of a (C, H, B N)."""
        return _take(plane, self.query)

    def shift(self, window: Tensor, step: tuple[int, int]) -> Tensor:
        """Return the queries one step away from each key."""
        return _shift(window, *step, self.group.halo, self.tile)

    def log_mask(self, radius: Tensor) -> Tensor:
        """Return log C (distances, tile rows, tile columns, tiles)."""
        distances = torch.tensor(self.group.distances, dtype=radius.dtype, device=radius.device)
        return log_soft_mask(
            radius[self.key],
            distances.view(-1, 1, 1, 1),
            self.geometry.slope,
            self.geometry.config.cutoff,
        )

    def weights(self, q_window: Tensor, k_tile: Tensor, log_mask: Tensor) -> Tensor:
        """Return A^(QC) (steps, H, tile rows, tile columns, tiles)."""
        group = self.group
        logits = q_window.new_empty(len(group.steps), *k_tile.shape[1:])
        product = torch.empty_like(k_tile)
        for index, step in enumerate(group.steps):
            torch.mul(self.shift(q_window, step), k_tile, out=product)
            torch.sum(product, 0, out=logits[index])
            logits[index] += log_mask[group.shells[index]]
            if group.crosses_border:
                outside = ~self.shift(self.query_inside, step)
                if index == 0:
                    outside = outside & self.key_inside  # a column that is masked later anyway
                logits[index].masked_fill_(outside, -math.inf)
        return torch.softmax(logits, dim=0)

    def visibility(self, dtype: torch.dtype) -> Tensor | None:
        """Return M (steps, tile rows, tile columns, tiles), None where every ray arrives."""
        if self.group.visible_rays is not None:
            visible = self.group.visible_rays[..., self.members]
        elif self.group.nearest is not None:
            visible = _visible_rays(self.geometry, self.group, self.tile, self.members)
        else:
            return None
        return self.geometry.visible_share(visible).to(dtype)


def _take(plane: Tensor, rows: Tensor) -> Tensor:
    """Return (C, H, *rows.shape) of a (C, H, B N)."""
    # gather with an expanded index is ten times as fast as index_select along the last axis.
    index = rows.reshape(1, 1, -1).expand(*plane.shape[:2], -1)
    return plane.gather(2, index).view(*plane.shape[:2], *rows.shape)


def _zeros(like: Tensor) -> Tensor:
    """Return contiguous zeros; `zeros_like` would keep the strides of a transposed tensor."""
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)


def _add_at(plane: Tensor, rows: Tensor, values: Tensor) -> None:
    """Add (C, H, *rows.shape) to (C, H, B N); rows may repeat."""
    index = rows.reshape(1, 1, -1).expand(*plane.shape[:2], -1)
    plane.scatter_add_(2, index, values.reshape(index.shape))


def _chunks(geometry: PisaGeometry, heads: int, channels: int) -> Iterator[_Chunk]:
    """Return the work in pieces; `chunk.heads` splits further by heads."""
    plan = geometry.local_plan()
    for group in plan.groups:
        at_once = _tiles_per_chunk(group, plan.tile, channels)
        for start in range(0, group.image.numel(), at_once):
            chunk = _Chunk(geometry, plan.tile, group, slice(start, start + at_once))
            heads_at_once = max(1, at_once // chunk.key.shape[-1])
            chunk.heads = [
                slice(first, first + heads_at_once) for first in range(0, heads, heads_at_once)
            ]
            yield chunk


class _LocalAttention(torch.autograd.Function):
    """q, k (d, H, B N), v (dv, H, B N), radius (B N) to (dv, H, B N). k carries the scale.

    The backward pass computes the weights again instead of keeping them.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, radius: Tensor, geometry: PisaGeometry
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, radius)
        ctx.geometry = geometry
        out = _zeros(v)
        for chunk in _chunks(geometry, q.shape[1], max(len(q), len(v))):
            log_mask, visibility = chunk.log_mask(radius), chunk.visibility(q.dtype)
            for some in chunk.heads:
                weights = chunk.weights(
                    chunk.queries_of(q[:, some]), chunk.keys_of(k[:, some]), log_mask
                )
                if visibility is not None:
                    weights *= visibility[:, None]
                values = chunk.values_of(v[:, some])
                window = v.new_zeros(*values.shape[:2], *chunk.query.shape)
                for index, step in enumerate(chunk.group.steps):
                    chunk.shift(window, step).addcmul_(weights[index], values)
                _add_at(out[:, some], chunk.query, window)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, radius = ctx.saved_tensors
        geometry: PisaGeometry = ctx.geometry
        grad_out = grad_outputs[0].contiguous()
        grad_q, grad_k, grad_v = _zeros(q), _zeros(k), _zeros(v)
        grad_radius = torch.zeros_like(radius) if ctx.needs_input_grad[3] else None
        for chunk in _chunks(geometry, q.shape[1], max(len(q), len(v))):
            log_mask, visibility = chunk.log_mask(radius), chunk.visibility(q.dtype)
            for some in chunk.heads:
                grad_logits = _LocalAttention._backward_heads(
                    chunk, log_mask, visibility,
                    *(plane[:, some] for plane in (q, k, v, grad_out, grad_q, grad_k, grad_v)),
                )  # fmt: skip
                if grad_radius is not None:
                    # d log C / d radius = slope (1 - C)
                    outside_share = (1 - log_mask.exp()) * geometry.slope
                    grad_tile = torch.zeros_like(outside_share[0])
                    for index, shell in enumerate(chunk.group.shells):
                        grad_tile.addcmul_(grad_logits[index].sum(0), outside_share[shell])
                    if chunk.group.crosses_border:
                        grad_tile = grad_tile * chunk.key_inside
                    grad_radius.index_add_(0, chunk.key.reshape(-1), grad_tile.reshape(-1))
        return grad_q, grad_k, grad_v, grad_radius, None

    @staticmethod
    def _backward_heads(
        chunk: _Chunk,
        log_mask: Tensor,
        visibility: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grad_out: Tensor,
        grad_q: Tensor,
        grad_k: Tensor,
        grad_v: Tensor,
    ) -> Tensor:
        """Add to the gradients of some heads; return that of the logits, shaped as the weights."""
        steps = chunk.group.steps
        q_window, k_tile = chunk.queries_of(q), chunk.keys_of(k)
        weights = chunk.weights(q_window, k_tile, log_mask)
        values, grad_window = chunk.values_of(v), chunk.queries_of(grad_out)

        grad_values = torch.zeros_like(values)
        grad_weights = torch.empty_like(weights)
        product = torch.empty_like(values)
        for index, step in enumerate(steps):
            received = chunk.shift(grad_window, step)
            arriving = weights[index]
            if visibility is not None:
                arriving = arriving * visibility[index]
            grad_values.addcmul_(received, arriving)
            torch.mul(received, values, out=product)
            torch.sum(product, 0, out=grad_weights[index])
        if visibility is not None:
            grad_weights *= visibility[:, None]
        # Softmax backward, in place: dS = P (dP - sum P dP).
        grad_logits = grad_weights.mul_(weights)
        grad_logits -= weights.mul_(grad_logits.sum(0))

        grad_keys = torch.zeros_like(k_tile)
        grad_queries = torch.zeros_like(q_window)
        for index, step in enumerate(steps):
            grad_keys.addcmul_(chunk.shift(q_window, step), grad_logits[index])
            chunk.shift(grad_queries, step).addcmul_(k_tile, grad_logits[index])
        _add_at(grad_q, chunk.query, grad_queries)
        # Tiles do not overlap, but rows off the grid repeat rows on it.
        if chunk.emits is not None:
            grad_values *= chunk.emits
        if chunk.group.crosses_border:
            grad_keys *= chunk.key_inside
        _add_at(grad_k, chunk.key, grad_keys)
        _add_at(grad_v, chunk.key, grad_values)
        return grad_logits


def pisa_attention_local(
    q: Tensor, k: Tensor, v: Tensor, geometry: PisaGeometry, scale: float
) -> Tensor:
    """Return what `pisa_attention_reference` returns, (B, H, N, dv), for float32 or float64."""
    batch, heads, tokens, _ = q.shape
    if geometry.batch == 1 and batch > 1:
        # One geometry for all images: the batch is nothing but more heads.
        q, k, v = (value.reshape(1, batch * heads, tokens, -1) for value in (q, k, v))
        return pisa_attention_local(q, k, v, geometry, scale).view(batch, heads, tokens, -1)

    def planes(value: Tensor) -> Tensor:
        return value.permute(3, 1, 0, 2).reshape(value.shape[3], heads, batch * tokens)

    radius = geometry.radius.to(q.dtype).reshape(-1)
    out = _LocalAttention.apply(planes(q), planes(k * scale), planes(v), radius, geometry)
    assert isinstance(out, Tensor)
    return out.view(-1, heads, batch, tokens).permute(2, 1, 3, 0)

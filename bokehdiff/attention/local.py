"""The exact local backend: light that cannot leave its circle is only looked for inside it.

The softmax of PISA runs over queries, so every key is complete on its own. Keys are taken in square
tiles. The largest radius of a tile says which queries its light can reach at all; these are
gathered, and the tile becomes a small dense attention of its own: two matrix products, with one
softmax in between, over nothing but the surroundings of the tile. What it gives is added back to
the queries. Tiles that reach about equally many queries are worked on together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .geometry import PisaGeometry
from .tiles import group_tiles, plan_tiles

TILE = 8
"""Rows and columns of a tile: 4 gathers more than it saves, 16 reaches farther than needed."""
TILE_OF_THIN_LAYERS = 4
"""Likewise where there are few channels to gather."""
THIN = 64
"""Channels of q and v in all heads up to which a layer is thin."""
SCORES_PER_CHUNK = 1 << 18
"""Scores that a CPU thread works on at a time: what stays in its cache."""
SCORES_PER_CHUNK_ON_GPU = 1 << 26


def pair_share(geometry: PisaGeometry) -> float:
    """Return which share of the N^2 pairs of tokens this backend works on, from 0 to 1."""
    groups = group_tiles(geometry, TILE)
    pairs = sum(group.tiles * group.scores_per_tile for group in groups)
    return min(1.0, pairs / (geometry.token_count**2 * geometry.batch))


class _Workspace:
    """Memory used again and again; fresh memory for every step costs more than the arithmetic."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a tensor of this shape with any content; the last one of this name is gone."""
        size = 1
        for side in shape:
            size *= side
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = self._like.new_empty(size)
        return self._buffers[name][:size].view(shape)

    def gather(self, name: str, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return (planes, *tokens.shape, channels) of (planes, B N, channels)."""
        taken = self.take(name, rows.shape[0], tokens.numel(), rows.shape[2])
        torch.index_select(rows, 1, tokens.reshape(-1), out=taken)
        return taken.view(rows.shape[0], *tokens.shape, rows.shape[2])


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Some tiles of a group, and some planes (images and heads that share the geometry)."""

    keys: Tensor
    queries: Tensor
    emits: Tensor | None
    log_mask: Tensor
    visibility: Tensor | None
    planes: slice


def _chunks(
    geometry: PisaGeometry, q: Tensor, v: Tensor, work: _Workspace, tables: int
) -> Iterator[_Chunk]:
    """Yield the whole work in pieces of a size that suits the device.

    Args:
        geometry: the geometry.
        q, v: (planes, B N, channels).
        work: memory for log C.
        tables: how many tables of scores are held at a time.
    """
    planes = q.shape[0]
    tile = TILE_OF_THIN_LAYERS if planes * (q.shape[2] + v.shape[2]) <= THIN else TILE
    scores = SCORES_PER_CHUNK * torch.get_num_threads()
    if q.device.type != "cpu":
        scores = SCORES_PER_CHUNK_ON_GPU
    scores //= tables
    for group in plan_tiles(geometry, tile, q.dtype):
        tiles = max(1, min(group.tiles, scores // group.scores_per_tile))
        planes_at_once = max(1, scores // (tiles * group.scores_per_tile))
        for first in range(0, group.tiles, tiles):
            some = slice(first, first + tiles)
            shape = (min(tiles, group.tiles - first), group.keys.shape[1], group.queries.shape[1])
            log_mask = group.compute_log_mask(geometry, some, work.take("log mask", *shape))
            visible_rays = group.compute_visible_rays(geometry, some, log_mask)
            visibility = None
            if visible_rays is not None:
                visibility = geometry.visible_share(visible_rays).to(q.dtype)
            for plane in range(0, planes, planes_at_once):
                yield _Chunk(
                    keys=group.keys[some],
                    queries=group.queries[some],
                    emits=None if group.emits is None else group.emits[some],
                    log_mask=log_mask,
                    visibility=visibility,
                    planes=slice(plane, min(plane + planes_at_once, planes)),
                )


def _planes(value: Tensor, geometry: PisaGeometry) -> Tensor:
    """Return (planes, B N, channels) of (B, H, N, channels).

    A geometry that serves a whole batch makes its images nothing but more heads.
    """
    if geometry.batch == 1:
        return value.reshape(-1, *value.shape[2:])
    return value.transpose(0, 1).reshape(value.shape[1], -1, value.shape[3])


def _images(planes: Tensor, geometry: PisaGeometry, shape: torch.Size) -> Tensor:
    """Return (B, H, N, channels), the reverse of `_planes`."""
    if geometry.batch == 1:
        return planes.view(*shape[:3], -1)
    return planes.view(shape[1], shape[0], shape[2], -1).transpose(0, 1)


def _add_rows(rows: Tensor, tokens: Tensor, values: Tensor) -> None:
    """Add (planes, *tokens.shape, channels) to (planes, B N, channels), the same bits every time.

    Tokens may repeat.
    """
    values = values.view(rows.shape[0], -1, rows.shape[2])
    if rows.device.type == "cpu":
        rows.index_add_(1, tokens.reshape(-1), values)
    else:
        # index_add_ would add in any order there; this sorts first.
        everything = torch.arange(rows.shape[0], device=rows.device)[:, None]
        rows.index_put_((everything, tokens.reshape(1, -1)), values, accumulate=True)


def _weights(chunk: _Chunk, keys: Tensor, queries: Tensor, work: _Workspace) -> Tensor:
    """Return A^(QC) (planes, tiles, keys, reached): each key's weights over its queries."""
    weights = work.take("weights", *keys.shape[:3], queries.shape[2])
    torch.bmm(keys.flatten(0, 1), queries.flatten(0, 1).mT, out=weights.flatten(0, 1))
    weights += chunk.log_mask
    return torch.softmax(weights, -1, out=weights)


def forward(
    q: Tensor, k: Tensor, v: Tensor, geometry: PisaGeometry, scale: float
) -> tuple[Tensor, None]:
    """Return (B, H, N, dv) like `pisa_attention_reference`, for float32 or float64."""
    shape = q.shape
    q, k, v = _planes(q, geometry), _planes(k, geometry), _planes(v, geometry)
    out = torch.zeros_like(v)
    work = _Workspace(q)
    for chunk in _chunks(geometry, q, v, work, tables=1):
        queries = work.gather("queries", q[chunk.planes], chunk.queries)
        keys = work.gather("keys", k[chunk.planes], chunk.keys).mul_(scale)
        values = work.gather("values", v[chunk.planes], chunk.keys)
        if chunk.emits is not None:
            values *= chunk.emits[..., None]
        weights = _weights(chunk, keys, queries, work)
        if chunk.visibility is not None:
            weights *= chunk.visibility
        received = work.take("received", *queries.shape[:3], v.shape[2])
        torch.bmm(weights.flatten(0, 1).mT, values.flatten(0, 1), out=received.flatten(0, 1))
        _add_rows(out[chunk.planes], chunk.queries, received)
    return _images(out, geometry, shape), None


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_normaliser: None,
    geometry: PisaGeometry,
    scale: float,
    wants_radius: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k, v and, if wanted, the radius (B, N).

    The weights P are computed again. With W = P M and dV = W dO, the gradient of the scores is
    dS = P (M (V dO) - V dV): the softmax runs over queries, so its correction is one product per
    key.
    """
    shape = q.shape
    q, k, v = _planes(q, geometry), _planes(k, geometry), _planes(v, geometry)
    grad_out = _planes(grad_out, geometry)
    grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    grad_radius = torch.zeros_like(geometry.radius, dtype=q.dtype) if wants_radius else None
    work = _Workspace(q)
    for chunk in _chunks(geometry, q, v, work, tables=2):
        queries = work.gather("queries", q[chunk.planes], chunk.queries)
        keys = work.gather("keys", k[chunk.planes], chunk.keys).mul_(scale)
        values = work.gather("values", v[chunk.planes], chunk.keys)
        if chunk.emits is not None:
            values *= chunk.emits[..., None]
        weights = _weights(chunk, keys, queries, work)
        received = work.gather("received", grad_out[chunk.planes], chunk.queries)

        arriving = weights
        if chunk.visibility is not None:
            arriving = work.take("arriving", *weights.shape)
            torch.mul(weights, chunk.visibility, out=arriving)
        grad_values = work.take("grad values", *values.shape)
        torch.bmm(arriving.flatten(0, 1), received.flatten(0, 1), out=grad_values.flatten(0, 1))
        correction = (grad_values * values).sum(-1, keepdim=True)

        grad_scores = work.take("arriving", *weights.shape)
        torch.bmm(values.flatten(0, 1), received.flatten(0, 1).mT, out=grad_scores.flatten(0, 1))
        if chunk.visibility is not None:
            grad_scores *= chunk.visibility
        grad_scores -= correction
        grad_scores *= weights

        if chunk.emits is not None:
            grad_values *= chunk.emits[..., None]
        _add_rows(grad_v[chunk.planes], chunk.keys, grad_values)
        grad_keys = work.take("grad values", *keys.shape)
        torch.bmm(grad_scores.flatten(0, 1), queries.flatten(0, 1), out=grad_keys.flatten(0, 1))
        _add_rows(grad_k[chunk.planes], chunk.keys, grad_keys.mul_(scale))
        grad_queries = work.take("queries", *queries.shape)
        torch.bmm(grad_scores.flatten(0, 1).mT, keys.flatten(0, 1), out=grad_queries.flatten(0, 1))
        _add_rows(grad_q[chunk.planes], chunk.queries, grad_queries)
        if grad_radius is not None:
            # d log C / d radius = slope (1 - C)
            outside = (1 - chunk.log_mask.exp()) * geometry.slope
            grad_tile = (grad_scores.sum(0) * outside).sum(-1)
            _add_rows(grad_radius.view(1, -1, 1), chunk.keys, grad_tile)
    return (
        _images(grad_q, geometry, shape),
        _images(grad_k, geometry, shape),
        _images(grad_v, geometry, shape),
        grad_radius,
    )

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
"""Channels of q and v in all heads and images that share a geometry, up to which it is thin."""
SCORES_PER_CHUNK = 1 << 18
"""Scores that a CPU thread works on at a time: what stays in its cache."""
SCORES_PER_CHUNK_ON_GPU = 1 << 26


def tile_side(channels: int) -> int:
    """Return rows and columns of tiles for so many channels of q and v in all that share them."""
    return TILE_OF_THIN_LAYERS if channels <= THIN else TILE


def pair_share(geometry: PisaGeometry, q: Tensor | None = None, v: Tensor | None = None) -> float:
    """Return which share of the N^2 pairs of tokens this backend works on, from 0 to 1.

    Args:
        geometry: the geometry.
        q, v: inputs, of which only the shapes count; without them, those of a wide layer.
    """
    tile = TILE
    if q is not None and v is not None:
        tile = tile_side(q[..., 0, 0].numel() // geometry.batch * (q.shape[3] + v.shape[3]))
    groups = group_tiles(geometry, tile)
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


class _Rows:
    """Channels of tokens as rows of one table, wherever heads lie in memory.

    A *plane* is what shares a geometry: all heads, and all images where one geometry serves them.

    Attributes:
        values: (B, H, N, channels).
        starts: (planes,) row of each plane's first token.
        step: rows from one token to the next, tokens being numbered through all images of a plane.
        table: (rows, channels), a view of `values`.
    """

    def __init__(self, values: Tensor, geometry: PisaGeometry) -> None:
        if not self._fits(values, geometry):
            values = values.transpose(1, 2).contiguous().transpose(1, 2)
        images, heads, tokens, channels = values.shape
        per_image, per_head, self.step = (stride // channels for stride in values.stride()[:3])
        images_of_planes = images if geometry.batch == 1 else 1
        device = values.device
        self.values = values
        self.starts = (
            torch.arange(images_of_planes, device=device)[:, None] * per_image
            + torch.arange(heads, device=device) * per_head
        ).view(-1)
        rows = 1 + (images - 1) * per_image + (heads - 1) * per_head + (tokens - 1) * self.step
        self.table = values.as_strided((rows, channels), (channels, 1))

    @staticmethod
    def _fits(values: Tensor, geometry: PisaGeometry) -> bool:
        """Return whether rows of channels can be addressed as `_Rows` does."""
        per_image, per_head, per_token, per_channel = values.stride()
        channels = values.shape[3]
        if per_channel != 1 or any(n % channels for n in (per_image, per_head, per_token)):
            return False
        return geometry.batch == 1 or per_image == geometry.token_count * per_token

    @classmethod
    def zeros_like(cls, rows: _Rows, geometry: PisaGeometry) -> _Rows:
        """Return rows for a result, laid out in memory like an input."""
        return cls(torch.zeros_like(rows.values), geometry)

    def _numbers(self, planes: slice, tokens: Tensor) -> Tensor:
        return (self.starts[planes, None] + tokens.reshape(-1) * self.step).view(-1)

    def gather(self, planes: slice, tokens: Tensor, name: str, work: _Workspace) -> Tensor:
        """Return (planes, *tokens.shape, channels)."""
        numbers = self._numbers(planes, tokens)
        taken = work.take(name, numbers.numel(), self.table.shape[1])
        torch.index_select(self.table, 0, numbers, out=taken)
        return taken.view(-1, *tokens.shape, self.table.shape[1])

    def add(self, planes: slice, tokens: Tensor, values: Tensor) -> None:
        """Add (planes, *tokens.shape, channels), the same bits every time; tokens may repeat."""
        numbers, values = self._numbers(planes, tokens), values.reshape(-1, self.table.shape[1])
        if values.device.type == "cpu":
            self.table.index_add_(0, numbers, values)
        else:
            # index_add_ would add in any order there; this sorts first.
            self.table.index_put_((numbers,), values, accumulate=True)


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Some tiles of a group, and some planes (images and heads that share the geometry).

    Where the lens is cut into parts, `log_lens_shares` is (parts, tiles or 1, keys, reached) and
    the planes are whole rounds of the parts.
    """

    keys: Tensor
    queries: Tensor
    emits: Tensor | None
    log_mask: Tensor
    visibility: Tensor | None
    log_lens_shares: Tensor | None
    planes: slice


def _chunks(
    geometry: PisaGeometry, q: _Rows, v: _Rows, work: _Workspace, tables: int
) -> Iterator[_Chunk]:
    """Yield the whole work in pieces of a size that suits the device.

    Args:
        geometry: the geometry.
        q, v: the inputs.
        work: memory for log C.
        tables: how many tables of scores are held at a time.
    """
    planes, dtype = q.starts.numel(), q.values.dtype
    tile = tile_side(planes * (q.values.shape[3] + v.values.shape[3]))
    scores = SCORES_PER_CHUNK * torch.get_num_threads()
    if q.values.device.type != "cpu":
        scores = SCORES_PER_CHUNK_ON_GPU
    scores //= tables
    for group in plan_tiles(geometry, tile, dtype):
        tiles = max(1, min(group.tiles, scores // group.scores_per_tile))
        planes_at_once = max(1, scores // (tiles * group.scores_per_tile))
        planes_at_once = -(-planes_at_once // geometry.lens_parts) * geometry.lens_parts
        for first in range(0, group.tiles, tiles):
            some = slice(first, first + tiles)
            shape = (min(tiles, group.tiles - first), group.keys.shape[1], group.queries.shape[1])
            log_mask = group.compute_log_mask(geometry, some, work.take("log mask", *shape))
            visible_rays = group.compute_visible_rays(geometry, some, log_mask)
            visibility = None
            if visible_rays is not None:
                visibility = geometry.visible_share(visible_rays).to(dtype)
            shares = None
            if geometry.lens_parts > 1:
                shares = group.compute_log_lens_shares(geometry, some, dtype)
            for plane in range(0, planes, planes_at_once):
                yield _Chunk(
                    keys=group.keys[some],
                    queries=group.queries[some],
                    emits=None if group.emits is None else group.emits[some],
                    log_mask=log_mask,
                    visibility=visibility,
                    log_lens_shares=shares,
                    planes=slice(plane, min(plane + planes_at_once, planes)),
                )


def forward(
    q: Tensor, k: Tensor, v: Tensor, geometry: PisaGeometry, scale: float
) -> tuple[Tensor, None]:
    """Return (B, H, N, dv) like `pisa_attention_reference`, for float32 or float64."""
    work = _Workspace(q)
    of_q, of_k, of_v = (_Rows(value, geometry) for value in (q, k, v))
    out = _Rows.zeros_like(of_v, geometry)
    for chunk in _chunks(geometry, of_q, of_v, work, tables=1):
        queries, keys, values = _gather(chunk, of_q, of_k, of_v, scale, work)
        weights = _weights(chunk, keys, queries, work)
        if chunk.visibility is not None:
            weights *= chunk.visibility
        received = work.take("received", *queries.shape[:3], values.shape[3])
        torch.bmm(weights.flatten(0, 1).mT, values.flatten(0, 1), out=received.flatten(0, 1))
        out.add(chunk.planes, chunk.queries, received)
    return out.values, None


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

    The weights P are computed again. With dP = M (V dO^T), the gradient of the scores is
    dS = P (dP - sum P dP), the sum running over the queries of a key like the softmax.
    """
    work = _Workspace(q)
    of_q, of_k, of_v, of_out = (_Rows(value, geometry) for value in (q, k, v, grad_out))
    grad_q, grad_k, grad_v = (_Rows.zeros_like(rows, geometry) for rows in (of_q, of_k, of_v))
    grad_radius = torch.zeros_like(geometry.radius, dtype=q.dtype) if wants_radius else None
    for chunk in _chunks(geometry, of_q, of_v, work, tables=2):
        queries, keys, values = _gather(chunk, of_q, of_k, of_v, scale, work)
        weights = _weights(chunk, keys, queries, work)
        received = of_out.gather(chunk.planes, chunk.queries, "received", work)

        arriving = weights
        if chunk.visibility is not None:
            arriving = work.take("arriving", *weights.shape)
            torch.mul(weights, chunk.visibility, out=arriving)
        grad_values = work.take("grad of keys", *values.shape)
        torch.bmm(arriving.flatten(0, 1), received.flatten(0, 1), out=grad_values.flatten(0, 1))
        if chunk.emits is not None:
            grad_values *= chunk.emits[..., None]
        grad_v.add(chunk.planes, chunk.keys, grad_values)

        grad_scores = work.take("arriving", *weights.shape)
        torch.bmm(values.flatten(0, 1), received.flatten(0, 1).mT, out=grad_scores.flatten(0, 1))
        if chunk.visibility is not None:
            grad_scores *= chunk.visibility
        # sum P dP, not the equal V . dV: it cancels to the last bit where a key keeps its light.
        grad_scores *= weights
        grad_scores.addcmul_(weights, grad_scores.sum(-1, keepdim=True), value=-1)

        grad_keys = work.take("grad of keys", *keys.shape)
        torch.bmm(grad_scores.flatten(0, 1), queries.flatten(0, 1), out=grad_keys.flatten(0, 1))
        grad_k.add(chunk.planes, chunk.keys, grad_keys.mul_(scale))
        grad_queries = work.take("queries", *queries.shape)
        torch.bmm(grad_scores.flatten(0, 1).mT, keys.flatten(0, 1), out=grad_queries.flatten(0, 1))
        grad_q.add(chunk.planes, chunk.queries, grad_queries)
        if grad_radius is not None:
            # d log C / d radius = slope (1 - C)
            outside = (1 - chunk.log_mask.exp()) * geometry.slope
            grad_tile = (grad_scores.sum(0) * outside).sum(-1)
            grad_radius.view(-1).index_add_(0, chunk.keys.view(-1), grad_tile.view(-1))
    return grad_q.values, grad_k.values, grad_v.values, grad_radius


def _gather(
    chunk: _Chunk, q: _Rows, k: _Rows, v: _Rows, scale: float, work: _Workspace
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries (planes, tiles, reached, d), scaled keys and values (planes, tiles, keys, d).

    Values of keys that emit nothing are 0.
    """
    queries = q.gather(chunk.planes, chunk.queries, "queries", work)
    keys = k.gather(chunk.planes, chunk.keys, "keys", work).mul_(scale)
    values = v.gather(chunk.planes, chunk.keys, "values", work)
    if chunk.emits is not None:
        values *= chunk.emits[..., None]
    return queries, keys, values


def _weights(chunk: _Chunk, keys: Tensor, queries: Tensor, work: _Workspace) -> Tensor:
    """Return A^(QC) (planes, tiles, keys, reached): each key's weights over its queries."""
    weights = work.take("weights", *keys.shape[:3], queries.shape[2])
    torch.bmm(keys.flatten(0, 1), queries.flatten(0, 1).mT, out=weights.flatten(0, 1))
    weights += chunk.log_mask
    if chunk.log_lens_shares is not None:
        weights.unflatten(0, (-1, len(chunk.log_lens_shares))).add_(chunk.log_lens_shares)
    return torch.softmax(weights, -1, out=weights)

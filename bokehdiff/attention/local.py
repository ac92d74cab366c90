"""The exact local backend: light that cannot leave its circle is only looked for inside it.

The softmax of PISA runs over queries, so every key is complete on its own. Keys are taken in tiles
of 8 x 8 tokens. The largest radius of a tile says which queries its light can reach at all; these
are gathered, and the tile becomes a small dense attention of 64 keys: two matrix products, with one
softmax in between, over nothing but the surroundings of the tile. What it gives is added back to
the queries. Tiles that reach about equally many queries are worked on together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .geometry import PisaGeometry

TILE = 8
"""Rows and columns of a tile; 4 gathers more than it saves, 16 reaches farther than needed."""
SCORES_PER_CHUNK = 1 << 18
"""Scores that a CPU thread works on at a time: what stays in its cache."""
SCORES_PER_CHUNK_ON_GPU = 1 << 26
SCORES_PER_STEP_OF_PLAN = 1 << 16
PADDING = 1.1
"""Tiles worked on together may reach this many times as many queries as the least of them."""


@dataclass(frozen=True, eq=False)
class TileGroup:
    """Tiles whose light reaches about equally many queries.

    Tokens are numbered through the whole batch, `image * N + token`.

    Attributes:
        keys: (tiles, keys) tokens of each tile.
        emits: (tiles, keys) bool, False for keys off the grid and for those that emit nothing;
            None when all emit.
        queries: (tiles, reached) tokens that the tile's light may reach; lists of fewer are filled
            up with their first entry.
        reached: (tiles,) length of each list without what fills it up.
        hindered: something may stop light of these tiles.
        log_mask: (tiles, keys, reached) log C; None when it is computed again in each call.
        visible_rays: (tiles, keys, reached) uint8 count of rays that arrive; None likewise, and
            when nothing hinders.
    """

    keys: Tensor
    emits: Tensor | None
    queries: Tensor
    reached: Tensor
    hindered: bool
    log_mask: Tensor | None = None
    visible_rays: Tensor | None = None

    @property
    def tiles(self) -> int:
        """Return the number of tiles."""
        return self.keys.shape[0]

    @property
    def scores_per_tile(self) -> int:
        """Return how many pairs of tokens a tile has."""
        return self.keys.shape[1] * self.queries.shape[1]

    def compute_log_mask(self, geometry: PisaGeometry, some: slice, dtype: torch.dtype) -> Tensor:
        """Return log C (tiles, keys, reached) of some tiles, minus infinity where C is 0.

        Keys that emit nothing get a flat mask; their values are 0 anyway.
        """
        if self.log_mask is not None:
            return self.log_mask[some]
        keys, queries = self.keys[some, :, None], self.queries[some, None]
        log_mask = geometry.log_mask_of_pairs(keys, queries, dtype)
        place = torch.arange(queries.shape[2], device=keys.device)
        log_mask.masked_fill_((place >= self.reached[some, None])[:, None], -torch.inf)
        if self.emits is not None:
            log_mask.masked_fill_(~self.emits[some, :, None], 0.0)
        return log_mask

    def compute_visible_rays(
        self, geometry: PisaGeometry, some: slice, log_mask: Tensor
    ) -> Tensor | None:
        """Return (tiles, keys, reached) uint8 of some tiles; None when nothing hinders."""
        if not self.hindered:
            return None
        if self.visible_rays is not None:
            return self.visible_rays[some]
        return geometry.visible_rays_of_pairs(
            self.keys[some, :, None], self.queries[some, None], log_mask > -torch.inf
        )


@dataclass(frozen=True, eq=False)
class LocalPlan:
    """Tiles of one geometry in groups, those that reach fewest queries first.

    Tiles without emitters are absent.
    """

    groups: tuple[TileGroup, ...]

    @classmethod
    def make(cls, geometry: PisaGeometry, dtype: torch.dtype) -> LocalPlan:
        """Return the plan, with tables as far as the geometry's byte budget allows."""
        bytes_left = geometry.byte_budget
        groups, stored = list(_group_tiles(geometry)), []
        for index, group in enumerate(groups):
            pairs = group.tiles * group.scores_per_tile
            bytes_needed = pairs * (dtype.itemsize + group.hindered)
            if bytes_needed <= bytes_left:
                bytes_left -= bytes_needed
                groups[index] = _with_log_mask(geometry, group, dtype)
                if group.hindered:
                    stored.append(index)
        for index, group in zip(
            stored, _with_visible_rays(geometry, [groups[index] for index in stored]), strict=True
        ):
            groups[index] = group
        return cls(tuple(groups))


def local_plan(geometry: PisaGeometry, dtype: torch.dtype) -> LocalPlan:
    """Return the plan of a geometry, made once."""
    name = f"local_plan_{dtype}"
    plan = geometry._derived.get(name)
    if plan is None:
        plan = geometry._derived[name] = LocalPlan.make(geometry, dtype)
    assert isinstance(plan, LocalPlan)
    return plan


def pair_share(geometry: PisaGeometry) -> float:
    """Return which share of the N^2 pairs of tokens this backend works on, from 0 to 1."""
    pairs = sum(group.tiles * group.scores_per_tile for group in _group_tiles(geometry))
    return pairs / (geometry.token_count**2 * geometry.batch)


def _group_tiles(geometry: PisaGeometry) -> tuple[TileGroup, ...]:
    """Return the groups without tables, made once."""
    cached = geometry._derived.get("tile_groups")
    if cached is None:
        keys, inside, reach, top, left = _tiles(geometry)
        queries, reached = _queries_in_reach(geometry, keys[:, 0], reach, top, left)
        emits = inside
        if geometry.emitters is not None:
            emits = emits & geometry.emitters.reshape(-1)[keys]
        hindered = (geometry.may_be_hindered(keys) & inside).any(1)
        cached = tuple(
            group
            for in_the_way in (False, True)
            for group in _pad(
                queries, reached, keys, emits, (hindered == in_the_way).nonzero()[:, 0], in_the_way
            )
        )
        geometry._derived["tile_groups"] = cached
    return cached  # type: ignore[return-value]


def _tiles(geometry: PisaGeometry) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return tokens and whether they are on the grid (tiles, keys), reach, top and left (tiles,).

    The reach is how far light of the tile gets, in units. Tokens off the grid are moved to its
    edge. Tiles without emitters are left out.
    """
    height, width, device = geometry.height, geometry.width, geometry.radius.device
    rows, columns = min(TILE, height), min(TILE, width)
    image, top, left = torch.meshgrid(
        torch.arange(geometry.batch, device=device),
        torch.arange(0, height, rows, device=device),
        torch.arange(0, width, columns, device=device),
        indexing="ij",
    )
    image, top, left = image.reshape(-1), top.reshape(-1), left.reshape(-1)
    y = (top[:, None] + torch.arange(rows, device=device))[:, :, None]
    x = (left[:, None] + torch.arange(columns, device=device))[:, None]
    inside = ((y < height) & (x < width)).flatten(1)
    tokens = y.clamp(max=height - 1) * width + x.clamp(max=width - 1)
    keys = (image * geometry.token_count)[:, None] + tokens.flatten(1)
    reach = (geometry.radius.detach() + geometry.margin).reshape(-1)
    if geometry.emitters is not None:
        reach = reach.masked_fill(~geometry.emitters.reshape(-1), -1.0)
    reach = reach[keys].amax(1)
    some = (reach >= 0).nonzero().squeeze(1)
    return keys[some], inside[some], reach[some], top[some], left[some]


def _queries_in_reach(
    geometry: PisaGeometry, first: Tensor, reach: Tensor, top: Tensor, left: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the queries that each tile may reach, lists one after the other, and their lengths.

    Args:
        geometry: the geometry.
        first: (tiles,) first token of each tile.
        reach, top, left: (tiles,) as from `_tiles`.
    """
    height, width, device = geometry.height, geometry.width, reach.device
    rows, columns = min(TILE, height), min(TILE, width)
    shortest = min(geometry.spacing)
    # Tiles of like reach look at windows of one size; a little wider does no harm.
    halo = (reach.clamp(max=shortest * max(height, width)) / shortest).long()
    grain = (halo // 8).clamp(min=1)
    halo = (halo + grain - 1) // grain * grain
    lists: list[Tensor] = []
    tiles: list[Tensor] = []
    for size in halo.unique().tolist():
        members = (halo == size).nonzero().squeeze(1)
        dy = torch.arange(-min(size, height - 1), rows + min(size, height - 1), device=device)
        dx = torch.arange(-min(size, width - 1), columns + min(size, width - 1), device=device)
        # Squared distance from the window's tokens to the nearest token of the tile.
        from_tile = [
            (torch.maximum(-d, d - side + 1).clamp(min=0).to(reach.dtype) * spacing).square()
            for d, side, spacing in (
                (dy, rows, geometry.spacing[0]),
                (dx, columns, geometry.spacing[1]),
            )
        ]
        squared = (from_tile[0][:, None] + from_tile[1]).view(-1)
        order = squared.argsort()
        # Nothing is lost to rounding: a mask this near the cutoff is 0 or next to it.
        count = int((squared <= float(reach[members].max()) ** 2 * (1 + 1e-5)).sum())
        order = order[:count].sort().values
        offset_y, offset_x = dy[order // dx.numel()], dx[order % dx.numel()]
        squared = squared[order]
        for some in members.split(max(1, (1 << 22) // order.numel())):
            y, x = top[some, None] + offset_y, left[some, None] + offset_x
            reached = squared <= (reach[some, None] ** 2 * (1 + 1e-5))
            reached &= (y >= 0) & (y < height) & (x >= 0) & (x < width)
            which, place = reached.nonzero(as_tuple=True)
            image = first[some] // geometry.token_count
            tokens = y[which, place] * width + x[which, place]
            lists.append(tokens + image[which] * geometry.token_count)
            tiles.append(some[which])
    owner = torch.cat(tiles) if tiles else reach.new_empty(0, dtype=torch.long)
    queries = torch.cat(lists) if lists else owner
    # A tile's list is in one piece; bring the pieces into the order of the tiles.
    order = owner.argsort(stable=True)
    return queries[order], owner.bincount(minlength=reach.numel())


def _pad(
    queries: Tensor, reached: Tensor, keys: Tensor, emits: Tensor, tiles: Tensor, hindered: bool
) -> Iterator[TileGroup]:
    """Yield groups of the given tiles, lists filled up to the longest of each group."""
    start = reached.cumsum(0) - reached
    lengths = reached[tiles].unique().tolist()
    while lengths:
        shortest = lengths[0]
        longest = max(n for n in lengths if n <= max(shortest * PADDING, shortest + 16))
        lengths = [n for n in lengths if n > longest]
        some = tiles[(reached[tiles] >= shortest) & (reached[tiles] <= longest)]
        some = some[reached[some].argsort(stable=True)]
        place = torch.arange(longest, device=keys.device).expand(some.numel(), -1)
        place = place.masked_fill(place >= reached[some, None], 0)
        emitting = emits[some]
        yield TileGroup(
            keys=keys[some],
            emits=None if bool(emitting.all()) else emitting,
            queries=queries[start[some, None] + place],
            reached=reached[some],
            hindered=hindered,
        )


def _with_log_mask(geometry: PisaGeometry, group: TileGroup, dtype: torch.dtype) -> TileGroup:
    """Return the group with log C stored."""
    shape = (group.tiles, group.keys.shape[1], group.queries.shape[1])
    log_mask = torch.empty(shape, dtype=dtype, device=group.keys.device)
    at_once = max(1, SCORES_PER_STEP_OF_PLAN // group.scores_per_tile)
    for first in range(0, group.tiles, at_once):
        some = slice(first, first + at_once)
        log_mask[some] = group.compute_log_mask(geometry, some, dtype)
    return dataclasses.replace(group, log_mask=log_mask)


def _with_visible_rays(geometry: PisaGeometry, groups: list[TileGroup]) -> Iterator[TileGroup]:
    """Yield groups that have log C with visibility too, as unhindered if all rays arrive.

    Rays of all groups are traced together.
    """
    if not groups:
        return
    lists = [_pairs_at_risk(geometry, group) for group in groups]
    keys, queries = (torch.cat([pairs[which] for pairs in lists]) for which in (0, 1))
    counts = geometry.visible_rays(keys, queries).split([pairs[2].numel() for pairs in lists])
    all_arrive = geometry.config.supersampling
    for group, (_, _, places), rays in zip(groups, lists, counts, strict=True):
        if bool((rays == all_arrive).all()):
            yield dataclasses.replace(group, hindered=False)
            continue
        assert group.log_mask is not None
        visible = torch.full_like(group.log_mask, all_arrive, dtype=torch.uint8)
        visible.view(-1).scatter_(0, places, rays)
        yield dataclasses.replace(group, visible_rays=visible)


def _pairs_at_risk(geometry: PisaGeometry, group: TileGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Return key, query and place in the table (pairs,) of pairs whose rays must be traced."""
    assert group.log_mask is not None
    keys_per_tile, reached = group.log_mask.shape[1:]
    rows = geometry.may_be_hindered(group.keys.view(-1)).nonzero().squeeze(1)
    lit = group.log_mask.view(-1, reached).index_select(0, rows) > -torch.inf
    row, place = lit.nonzero(as_tuple=True)
    row = rows[row]
    queries = group.queries.view(-1)[row // keys_per_tile * reached + place]
    return group.keys.view(-1)[row], queries, row * reached + place


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


def _chunks(geometry: PisaGeometry, like: Tensor, tables: int) -> Iterator[_Chunk]:
    """Yield the whole work in pieces of a size that suits the device.

    Args:
        geometry: the geometry.
        like: (planes, B N, channels), for its device, precision and planes.
        tables: how many tables of scores are held at a time.
    """
    planes = like.shape[0]
    scores = SCORES_PER_CHUNK * torch.get_num_threads()
    if like.device.type != "cpu":
        scores = SCORES_PER_CHUNK_ON_GPU
    scores //= tables
    for group in local_plan(geometry, like.dtype).groups:
        tiles = max(1, min(group.tiles, scores // group.scores_per_tile))
        planes_at_once = max(1, scores // (tiles * group.scores_per_tile))
        for first in range(0, group.tiles, tiles):
            some = slice(first, first + tiles)
            log_mask = group.compute_log_mask(geometry, some, like.dtype)
            visible_rays = group.compute_visible_rays(geometry, some, log_mask)
            visibility = None
            if visible_rays is not None:
                visibility = geometry.visible_share(visible_rays).to(like.dtype)
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
    for chunk in _chunks(geometry, q, tables=1):
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
    for chunk in _chunks(geometry, q, tables=2):
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

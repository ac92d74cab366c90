"""Tiles of keys and the queries that their light may reach: the plan of the local backend.

Tokens are numbered through the whole batch, `image * N + token`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .geometry import PisaGeometry

SCORES_PER_STEP = 1 << 17
"""Pairs of tokens whose log C is computed at a time."""
PAIRS_TRACED_TOGETHER = 1 << 21
"""Pairs whose rays are gathered to be traced together; a bound of memory."""
PADDING = 1.1
"""Tiles worked on together may reach this many times as many queries as the least of them."""
FEWEST_ALIKE = 4
"""Tiles that reach equally far make a group of their own from this number on."""


@dataclass(frozen=True, eq=False)
class TileGroup:
    """Tiles whose light reaches about equally many queries.

    Attributes:
        keys: (tiles, keys) tokens of each tile.
        emits: (tiles, keys) bool, False for keys off the grid and for those that emit nothing;
            None when all emit.
        queries: (tiles, reached) tokens that the tile's light may reach; lists of fewer are filled
            up with their first entry.
        reached: (tiles,) length of each list without what fills it up; None when none is.
        alike: the lists are one list moved about, so that distances are the same in each tile.
        hindered: something may stop light of these tiles.
        log_mask: (tiles, keys, reached) log C; None when it is computed again in each call.
        visible_rays: (tiles, keys, reached) uint8 count of rays that arrive; None likewise, and
            when nothing hinders.
    """

    keys: Tensor
    emits: Tensor | None
    queries: Tensor
    reached: Tensor | None
    alike: bool
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

    def compute_log_mask(self, geometry: PisaGeometry, some: slice, out: Tensor) -> Tensor:
        """Return log C (tiles, keys, reached) of some tiles, minus infinity where C is 0.

        Keys that emit nothing get a flat mask; their values are 0 anyway.

        Args:
            geometry: the geometry.
            some: the tiles.
            out: memory for the result where there is no table of it.
        """
        if self.log_mask is not None:
            return self.log_mask[some]
        measured = slice(0, 1) if self.alike else some
        distance = geometry.distances_of_pairs(
            self.keys[measured, :, None],
            self.queries[measured, None],
            geometry.precision_of_distances(out.dtype),
        )
        geometry.log_mask_at(self.keys[some, :, None], distance, out)
        if self.reached is not None:
            place = torch.arange(out.shape[2], device=out.device)
            out.masked_fill_((place >= self.reached[some, None])[:, None], -torch.inf)
        if self.emits is not None:
            out.masked_fill_(~self.emits[some, :, None], 0.0)
        return out

    def compute_log_lens_shares(
        self, geometry: PisaGeometry, some: slice, dtype: torch.dtype
    ) -> Tensor:
        """Return (parts, tiles, keys, reached) as of `PisaGeometry.log_lens_shares`, of some tiles;
        of one for all where they are alike."""
        measured = slice(0, 1) if self.alike else some
        return geometry.log_lens_shares(
            self.keys[measured, :, None], self.queries[measured, None], dtype
        )

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


def plan_tiles(geometry: PisaGeometry, tile: int, dtype: torch.dtype) -> tuple[TileGroup, ...]:
    """Return the groups of a geometry, made once, with tables as far as its byte budget allows.

    Args:
        geometry: the geometry.
        tile: rows and columns of a tile.
        dtype: precision of log C.
    """
    name = f"tiles_of_{tile}_with_{dtype}"
    cached = geometry._derived.get(name)
    if cached is None:
        cached = geometry._derived[name] = _with_tables(
            geometry, group_tiles(geometry, tile), dtype
        )
    return cached  # type: ignore[return-value]


def group_tiles(geometry: PisaGeometry, tile: int) -> tuple[TileGroup, ...]:
    """Return the groups without tables, made once. Tiles without emitters are absent."""
    name = f"tiles_of_{tile}"
    cached = geometry._derived.get(name)
    if cached is None:
        cached = geometry._derived[name] = tuple(_groups(geometry, tile))
    return cached  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class _Tiles:
    """All tiles that emit light.

    Attributes:
        sides: rows and columns of a tile.
        keys, emits: as in `TileGroup`.
        top, left: (tiles,) the first token, on the grid of its image.
        reach: (tiles,) how far light gets from the tile, in units.
        hindered: (tiles,) bool.
    """

    sides: tuple[int, int]
    keys: Tensor
    emits: Tensor
    top: Tensor
    left: Tensor
    reach: Tensor
    hindered: Tensor

    @classmethod
    def of(cls, geometry: PisaGeometry, tile: int) -> _Tiles:
        """Return the tiles of a geometry. Tokens off the grid are moved to its edge."""
        height, width, device = geometry.height, geometry.width, geometry.radius.device
        rows, columns = min(tile, height), min(tile, width)
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
        keys, emits = keys[some], inside[some]
        if geometry.emitters is not None:
            emits = emits & geometry.emitters.reshape(-1)[keys]
        hindered = (geometry.may_be_hindered(keys) & emits).any(1)
        return cls((rows, columns), keys, emits, top[some], left[some], reach[some], hindered)

    def group(
        self, some: Tensor, queries: Tensor, reached: Tensor | None, *, alike: bool, hindered: bool
    ) -> TileGroup:
        """Return some tiles as a group."""
        emits = self.emits[some]
        return TileGroup(
            keys=self.keys[some],
            emits=None if bool(emits.all()) else emits,
            queries=queries,
            reached=reached,
            alike=alike,
            hindered=hindered,
        )


def _groups(geometry: PisaGeometry, tile: int) -> Iterator[TileGroup]:
    tiles = _Tiles.of(geometry, tile)
    # Few different reaches make large groups: steps of half a token, wider for wide circles.
    shortest = min(geometry.spacing)
    reach = (tiles.reach / shortest).clamp(max=4.0 * max(geometry.height, geometry.width))
    grain = torch.full_like(reach, 0.5)
    for wide in (8, 16, 32):
        grain = torch.where(reach > wide, grain * 2, grain)
    reach = (reach / grain).ceil() * grain * shortest

    halo_y, halo_x = ((reach / spacing).long() for spacing in geometry.spacing)
    bottom, right = tiles.top + tiles.sides[0] + halo_y, tiles.left + tiles.sides[1] + halo_x
    within = (tiles.top >= halo_y) & (bottom <= geometry.height)
    within &= (tiles.left >= halo_x) & (right <= geometry.width)
    alone = torch.ones_like(within)
    if geometry.config.token_spacing is None:
        within.zero_()  # the authors' roundings make distances differ from place to place

    for hindered in (False, True):
        these = within & (tiles.hindered == hindered)
        reaches, counts = reach[these].unique(return_counts=True)
        for common in reaches[counts >= FEWEST_ALIKE].tolist():
            alike = these & (reach == common)
            within &= ~alike
            alone &= ~alike
            some = alike.nonzero().squeeze(1)
            step_y, step_x, _ = _steps_within(geometry, tiles.sides, common)
            queries = tiles.keys[some, :1] + (step_y * geometry.width + step_x)
            yield tiles.group(some, queries, None, alike=True, hindered=hindered)
    yield from _ragged_groups(geometry, tiles, alone.nonzero().squeeze(1))


def _steps_within(
    geometry: PisaGeometry, sides: tuple[int, int], reach: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return steps y and x (steps,) from a tile's first token to all within reach of the tile.

    The third tensor holds the squares of how far each is from the tile, in units.
    """
    height, width, device = geometry.height, geometry.width, geometry.radius.device
    halo_y = min(int(reach / geometry.spacing[0]), height - 1)
    halo_x = min(int(reach / geometry.spacing[1]), width - 1)
    dy = torch.arange(-halo_y, sides[0] + halo_y, device=device)
    dx = torch.arange(-halo_x, sides[1] + halo_x, device=device)
    away_y, away_x = (
        (torch.maximum(-d, d - side + 1).clamp(min=0).to(geometry.widest_dtype) * spacing).square()
        for d, side, spacing in zip((dy, dx), sides, geometry.spacing, strict=True)
    )
    squared = away_y[:, None] + away_x
    # Nothing is lost to rounding: a mask this near the cutoff is 0 or next to it.
    row, column = (squared <= reach**2 * (1 + 1e-5)).nonzero(as_tuple=True)
    return dy[row], dx[column], squared[row, column]


def _ragged_groups(geometry: PisaGeometry, tiles: _Tiles, wanted: Tensor) -> Iterator[TileGroup]:
    """Yield groups of the wanted tiles, each with a list of its own.

    Lists are filled up to the longest of each group.
    """
    if wanted.numel() == 0:
        return
    owner, queries = _queries_in_reach(geometry, tiles, wanted)
    length = owner.bincount(minlength=tiles.reach.numel())
    start = length.cumsum(0) - length
    for hindered in (False, True):
        members = wanted[tiles.hindered[wanted] == hindered]
        lengths = length[members].unique().tolist()
        while lengths:
            shortest = lengths[0]
            longest = max(n for n in lengths if n <= max(shortest * PADDING, shortest + 16))
            lengths = [n for n in lengths if n > longest]
            some = members[(length[members] >= shortest) & (length[members] <= longest)]
            place = torch.arange(longest, device=owner.device).expand(some.numel(), -1)
            place = place.masked_fill(place >= length[some, None], 0)
            reached = None if shortest == longest else length[some]
            of_lists = queries[start[some, None] + place]
            yield tiles.group(some, of_lists, reached, alike=False, hindered=hindered)


def _queries_in_reach(
    geometry: PisaGeometry, tiles: _Tiles, wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """Return tile and token (pairs,) for every token that a wanted tile may reach, tile by tile."""
    height, width = geometry.height, geometry.width
    shortest = min(geometry.spacing)
    # Tiles of like reach look at windows of one size; a little wider does no harm.
    reach = tiles.reach[wanted].clamp(max=4.0 * max(height, width) * shortest)
    reach = reach.to(geometry.widest_dtype)
    halo = (reach / shortest).ceil()
    grain = (halo / 8).floor().clamp(min=1)
    halo = (halo / grain).ceil() * grain * shortest
    owners, tokens = [], []
    for common in halo.unique().tolist():
        step_y, step_x, squared = _steps_within(geometry, tiles.sides, common)
        members = (halo == common).nonzero().squeeze(1)
        for some in members.split(max(1, (1 << 22) // step_y.numel())):
            these = wanted[some]
            y, x = tiles.top[these, None] + step_y, tiles.left[these, None] + step_x
            reached = squared <= reach[some, None] ** 2 * (1 + 1e-5)
            reached &= (y >= 0) & (y < height) & (x >= 0) & (x < width)
            which, place = reached.nonzero(as_tuple=True)
            owners.append(these[which])
            tokens.append(tiles.keys[owners[-1], 0] + step_y[place] * width + step_x[place])
    owner = torch.cat(owners)
    # A tile's list is in one piece; bring the pieces into the order of the tiles.
    order = owner.argsort(stable=True)
    return owner[order], torch.cat(tokens)[order]


def _with_tables(
    geometry: PisaGeometry, groups: tuple[TileGroup, ...], dtype: torch.dtype
) -> tuple[TileGroup, ...]:
    """Return the groups with tables, as far as the byte budget allows.

    Visibility comes first: it is the smaller table, and costs by far the most to make.
    """
    pairs = [group.tiles * group.scores_per_tile for group in groups]
    bytes_left, traced = geometry.byte_budget, []
    for index, group in enumerate(groups):
        if group.hindered and pairs[index] <= bytes_left:
            bytes_left -= pairs[index]
            traced.append(index)
    planned = list(groups)
    for index, group in enumerate(groups):
        bytes_needed = pairs[index] * dtype.itemsize
        if bytes_needed <= bytes_left:
            bytes_left -= bytes_needed
            planned[index] = _with_log_mask(geometry, group, dtype)
    with_rays = _with_visible_rays(geometry, [planned[index] for index in traced], dtype)
    for index, group in zip(traced, with_rays, strict=True):
        planned[index] = group
    return tuple(planned)


def _with_log_mask(geometry: PisaGeometry, group: TileGroup, dtype: torch.dtype) -> TileGroup:
    """Return the group with log C stored."""
    shape = (group.tiles, group.keys.shape[1], group.queries.shape[1])
    log_mask = torch.empty(shape, dtype=dtype, device=group.keys.device)
    at_once = max(1, SCORES_PER_STEP // group.scores_per_tile)
    for first in range(0, group.tiles, at_once):
        some = slice(first, first + at_once)
        group.compute_log_mask(geometry, some, log_mask[some])
    return dataclasses.replace(group, log_mask=log_mask)


class _Pairs(NamedTuple):
    """Key, query and place in the table of the group with this index, (pairs,) each."""

    group: int
    keys: Tensor
    queries: Tensor
    places: Tensor


def _with_visible_rays(
    geometry: PisaGeometry, groups: list[TileGroup], dtype: torch.dtype
) -> list[TileGroup]:
    """Return groups with visibility stored, as unhindered if all rays arrive.

    Rays of small groups are traced together.
    """
    all_arrive = geometry.config.supersampling
    tables = [
        torch.full(
            (group.tiles, group.keys.shape[1], group.queries.shape[1]),
            all_arrive,
            dtype=torch.uint8,
            device=group.keys.device,
        )
        for group in groups
    ]
    stopped = [False] * len(groups)

    def trace(pieces: list[_Pairs]) -> None:
        keys = torch.cat([piece.keys for piece in pieces])
        queries = torch.cat([piece.queries for piece in pieces])
        counts = geometry.visible_rays(keys, queries)
        for piece, rays in zip(
            pieces, counts.split([piece.places.numel() for piece in pieces]), strict=True
        ):
            tables[piece.group].view(-1).scatter_(0, piece.places, rays)
            stopped[piece.group] = stopped[piece.group] or bool((rays < all_arrive).any())

    waiting: list[_Pairs] = []
    for index, group in enumerate(groups):
        for piece in _pairs_at_risk(geometry, group, index, dtype):
            waiting.append(piece)
            if sum(piece.places.numel() for piece in waiting) >= PAIRS_TRACED_TOGETHER:
                trace(waiting)
                waiting = []
    if waiting:
        trace(waiting)
    return [
        dataclasses.replace(group, visible_rays=table)
        if any_stopped
        else dataclasses.replace(group, hindered=False)
        for group, table, any_stopped in zip(groups, tables, stopped, strict=True)
    ]


def _pairs_at_risk(
    geometry: PisaGeometry, group: TileGroup, index: int, dtype: torch.dtype
) -> Iterator[_Pairs]:
    """Yield the pairs of a group, which has this index, whose rays must be traced."""
    keys_per_tile, reached = group.keys.shape[1], group.queries.shape[1]
    hindered = geometry.may_be_hindered(group.keys)
    at_once = max(1, PAIRS_TRACED_TOGETHER // group.scores_per_tile)
    for first in range(0, group.tiles, at_once):
        some = slice(first, min(first + at_once, group.tiles))
        out = torch.empty(0, dtype=dtype, device=group.keys.device)
        if group.log_mask is None:
            out = out.new_empty(some.stop - first, keys_per_tile, reached)
        log_mask = group.compute_log_mask(geometry, some, out)
        rows = hindered[some].reshape(-1).nonzero().squeeze(1)
        lit = log_mask.reshape(-1, reached).index_select(0, rows) > -torch.inf
        which, place = lit.nonzero(as_tuple=True)
        rows += first * keys_per_tile
        start_of_list = rows // keys_per_tile * reached
        places_of_queries = start_of_list.index_select(0, which) + place
        yield _Pairs(
            group=index,
            keys=group.keys.view(-1).index_select(0, rows).index_select(0, which),
            queries=group.queries.reshape(-1).index_select(0, places_of_queries),
            places=(rows * reached).index_select(0, which) + place,
        )

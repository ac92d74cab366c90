"""Which blocks of tokens light passes between, and how much: what block-sparse kernels are fed.

Tokens are taken in tile-major order: a block holds the tokens of one tile of the grid, so that the
tokens of a block are near each other and light leaves a block for few others. For each pair of
blocks that light passes between, log C and the rays that arrive are stored once; heads and layers
share them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .geometry import PisaGeometry

TOKEN_PAIRS_AT_ONCE = 1 << 20
"""Pairs of tokens looked at in one step while the tables are made."""

NOTHING_LOST = 1e-12
"""1 - C below which a pair counts as inside the circle, and log C as 0."""


@dataclass(frozen=True, eq=False)
class BlockPairs:
    """The pairs of blocks that light passes between, gathered by one of the two.

    Block b of image i owns the entries from `offsets[i * blocks + b]` up to the next offset, in
    ascending order of `partner`.

    Attributes:
        offsets: (B * blocks + 1,) int32.
        partner: (pairs,) int32, the other block of the pair.
        log_mask_row: (pairs,) int32 row of `BlockPlan.log_mask`; row 0 is 0 everywhere.
        visible_row: (pairs,) int32 row of `BlockPlan.visible`; in row 0 every ray arrives. None
            where `BlockPlan.visible` is.
    """

    offsets: Tensor
    partner: Tensor
    log_mask_row: Tensor
    visible_row: Tensor | None


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Blocks of tokens of one geometry, the pairs of them with C > 0, and tables for these pairs.

    Keys that emit nothing have log C minus infinity throughout, as have places without a token:
    neither takes part in anything.

    Attributes:
        tile: rows and columns of tokens in a block.
        blocks: rows and columns of blocks on the grid; blocks are counted row by row.
        token_of: (blocks * tokens of a block,) token at each place of the tile-major order, -1 at
            places beyond the edge of the grid.
        queries_of_keys: for each key block, the query blocks that its light reaches.
        keys_of_queries: the same pairs, for each query block.
        log_mask: (rows, keys of a block, queries of a block) float32 log C.
        visible: (rows, keys of a block, queries of a block) uint8 count of the rays that arrive,
            for `PisaGeometry.visible_share`; None when every ray of every pair arrives.
    """

    tile: tuple[int, int]
    blocks: tuple[int, int]
    token_of: Tensor
    queries_of_keys: BlockPairs
    keys_of_queries: BlockPairs
    log_mask: Tensor
    visible: Tensor | None

    @classmethod
    @torch.no_grad()
    def make(cls, geometry: PisaGeometry, tile: tuple[int, int] = (8, 8)) -> BlockPlan:
        """Return the plan of a geometry.

        Raises:
            ValueError: when the tables would not fit in `geometry.byte_budget`.
        """
        near, inside = _pairs_of_blocks(geometry, tile)
        needed, budget = _table_bytes(geometry, tile, near, inside), geometry.byte_budget
        if needed > budget:
            raise ValueError(
                f"The tables of a block-sparse backend need {needed / 2**20:.1f} MiB for "
                f"{geometry.batch} x {geometry.height} x {geometry.width} tokens with circles this "
                f"wide, and byte_budget allows {budget / 2**20:.1f} MiB. Raise the "
                "budget of the geometry, or use backend='local', which stores less."
            )
        image, key_block, query_block = near.nonzero(as_tuple=True)
        soft = ~inside[image, key_block, query_block]
        token_of, blocks = _tile_major_tokens(geometry, tile), near.shape[1]
        places = token_of.view(blocks, -1)
        rays, area = geometry.config.supersampling, places.shape[1]
        occluded = geometry.token_disparity is not None

        # Row 0 of either table serves all the pairs that have nothing to tell.
        log_mask = near.new_zeros(1 + int(soft.sum()), area, area, dtype=torch.float32)
        visible = [near.new_full((1, area, area), rays, dtype=torch.uint8)]
        log_mask_row = torch.zeros_like(image)
        visible_row = torch.zeros_like(image)
        reached = torch.ones_like(soft)
        log_mask_rows, visible_rows = 1, 1
        worth_a_look = torch.arange(image.numel(), device=image.device)
        if not occluded:
            worth_a_look = worth_a_look[soft]
        for pair in worth_a_look.split(max(1, TOKEN_PAIRS_AT_ONCE // area**2)):
            key = places[key_block[pair]][:, :, None]
            query = places[query_block[pair]][:, None, :]
            on_grid = (key >= 0) & (query >= 0)
            first = image[pair, None, None] * geometry.token_count
            key, query = first + key.clamp(min=0), first + query.clamp(min=0)
            if geometry.emitters is not None:
                on_grid &= geometry.emitters.reshape(-1)[key]
            # In double precision: the slope multiplies the rounding of radii and distances.
            table = geometry.log_mask_of_pairs(key, query, torch.float64).float()
            table = table.masked_fill(~on_grid, -math.inf)
            wanted = table > -math.inf

            reached[pair] = wanted.any(2).any(1)
            kept = reached[pair] & soft[pair]
            count = int(kept.sum())
            log_mask[log_mask_rows : log_mask_rows + count] = table[kept]
            log_mask_row[pair[kept]] = log_mask_rows + torch.arange(count, device=image.device)
            log_mask_rows += count

            if occluded:
                arriving = geometry.visible_rays_of_pairs(key, query, wanted)
                arriving = arriving.masked_fill(~wanted, rays)
                kept = (arriving < rays).any(2).any(1)
                count = int(kept.sum())
                visible.append(arriving[kept])
                visible_row[pair[kept]] = visible_rows + torch.arange(count, device=image.device)
                visible_rows += count

        def gathered(by: Tensor, other: Tensor, pairs: Tensor) -> BlockPairs:
            owners = torch.bincount((image * blocks + by)[pairs], minlength=near.shape[0] * blocks)
            return BlockPairs(
                offsets=torch.nn.functional.pad(owners.cumsum(0), (1, 0)).int(),
                partner=other[pairs].int(),
                log_mask_row=log_mask_row[pairs].int(),
                visible_row=visible_row[pairs].int() if visible_rows > 1 else None,
            )

        by_key = reached.nonzero().squeeze(1)
        by_query = by_key[(image * blocks + query_block)[by_key].argsort(stable=True)]
        return cls(
            tile=tile,
            blocks=_grid_of_blocks(geometry, tile),
            token_of=token_of,
            queries_of_keys=gathered(key_block, query_block, by_key),
            keys_of_queries=gathered(query_block, key_block, by_query),
            log_mask=log_mask[:log_mask_rows],
            visible=torch.cat(visible) if visible_rows > 1 else None,
        )

    @staticmethod
    @torch.no_grad()
    def bytes_needed(geometry: PisaGeometry, tile: tuple[int, int] = (8, 8)) -> int:
        """Return an upper bound of the bytes of the tables of a plan, without making it."""
        return _table_bytes(geometry, tile, *_pairs_of_blocks(geometry, tile))


def _grid_of_blocks(geometry: PisaGeometry, tile: tuple[int, int]) -> tuple[int, int]:
    return -(-geometry.height // tile[0]), -(-geometry.width // tile[1])


def _tile_major_tokens(geometry: PisaGeometry, tile: tuple[int, int]) -> Tensor:
    """Return `BlockPlan.token_of`."""
    height, width = geometry.height, geometry.width
    tokens = torch.arange(height * width, device=geometry.radius.device).view(height, width)
    beyond = (0, -width % tile[1], 0, -height % tile[0])
    tokens = torch.nn.functional.pad(tokens, beyond, value=-1)
    tokens = tokens.unflatten(1, (-1, tile[1])).unflatten(0, (-1, tile[0]))
    return tokens.transpose(1, 2).flatten()


def _pairs_of_blocks(geometry: PisaGeometry, tile: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return two bool (B, key blocks, query blocks): near enough for C > 0, and C = 1 throughout.

    A pair may be near although none of its tokens has C > 0: the nearest tokens of the two blocks
    need not be those with the widest circles.
    """
    device, rows_and_columns = geometry.radius.device, _grid_of_blocks(geometry, tile)
    nearest_squared, farthest_squared = [], []
    for count, size, spacing in zip(rows_and_columns, tile, geometry.spacing, strict=True):
        number = torch.arange(count, device=device, dtype=torch.float64)
        apart = (number[:, None] - number).abs()
        # Only the last tile may be cut short, at its far side: the near sides are always there.
        nearest = ((apart - 1).clamp(min=0) * size + (apart > 0)) * spacing
        farthest = ((apart + 1) * size - 1) * spacing
        nearest_squared.append(nearest**2)
        farthest_squared.append(farthest**2)

    def between_blocks(vertical: Tensor, horizontal: Tensor) -> Tensor:
        both = vertical[:, None, :, None] + horizontal[None, :, None, :]
        return both.flatten(2).flatten(0, 1).sqrt()

    nearest = between_blocks(*nearest_squared)
    farthest = between_blocks(*farthest_squared)

    blocks = math.prod(rows_and_columns)
    places = _tile_major_tokens(geometry, tile)
    silent = (places < 0).expand(geometry.batch, -1)
    radius = geometry.radius.detach().double()[:, places.clamp(min=0)]
    if geometry.emitters is not None:
        silent = silent | ~geometry.emitters[:, places.clamp(min=0)]
    radius = radius.masked_fill(silent, -math.inf).view(-1, blocks, places.numel() // blocks)
    whole = (places >= 0).view(blocks, -1).all(1)

    widest, narrowest = radius.amax(2)[..., None], radius.amin(2)[..., None]
    rounding = 1e-9 * farthest.max()
    # Without a cutoff the margin is infinite, and every block with an emitter reaches every other.
    near = (widest > -math.inf) & (nearest <= widest + geometry.margin + rounding)
    inside_by = -math.log(NOTHING_LOST) / geometry.slope if geometry.slope > 0 else math.inf
    inside = near & whole & (narrowest - farthest >= inside_by)
    return near, inside


def _table_bytes(
    geometry: PisaGeometry, tile: tuple[int, int], near: Tensor, inside: Tensor
) -> int:
    """Return the bytes of `log_mask` and `visible` if every near pair kept a row."""
    area, pairs = math.prod(tile) ** 2, int(near.sum())
    visible_bytes = (pairs + 1) * area if geometry.token_disparity is not None else 0
    return (pairs - int(inside.sum()) + 1) * area * 4 + visible_bytes

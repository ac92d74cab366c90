"""Blocks of tokens and the tables of their pairs, against the dense tables of the geometry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bokehdiff.attention import PisaConfig, PisaGeometry
from bokehdiff.attention import blocks as blocks_module
from bokehdiff.attention.blocks import BlockPairs, BlockPlan


def _geometry(
    batch: int = 1,
    size: tuple[int, int] = (16, 24),
    radius: float = 3.0,
    narrowest: float = 0.0,
    occlusion: bool = True,
    emitters: float | None = None,
    **config: Any,
) -> PisaGeometry:
    """Random circles, and near specks over a far ground."""
    height, width = size
    generator = torch.Generator().manual_seed(height * 100 + width)
    coc = torch.rand(batch, 1, height, width, generator=generator, dtype=torch.float64)
    disparity = 0.4 * torch.rand(batch, 1, 2 * height, 2 * width, generator=generator)
    disparity[:, :, ::7, ::5] = 1.0
    share = torch.rand(coc.shape, generator=generator)
    return PisaGeometry.build(
        (narrowest + (radius - narrowest) * coc).requires_grad_(),
        disparity if occlusion else None,
        config=PisaConfig(**config),
        emitters=None if emitters is None else share < emitters,
    )


CASES: dict[str, dict[str, Any]] = {
    "whole tiles": {},
    "ragged tiles": {"size": (13, 21), "radius": 2.0},
    "one row": {"size": (1, 40), "radius": 2.0},
    "one column": {"size": (19, 1), "radius": 2.0},
    "single token": {"size": (1, 1)},
    "two images": {"batch": 2, "size": (13, 30), "radius": 1.0},
    "circles wider than blocks": {"size": (16, 30), "radius": 25.0, "narrowest": 15.0},
    "no occlusion": {"occlusion": False},
    "few emitters": {"size": (20, 33), "emitters": 0.02},
    "unequal axes": {"size": (9, 40), "token_spacing": None, "resample_occlusion_map": True},
    "every pair": {"size": (9, 17), "cutoff": 0.0},
    "no edge": {"size": (9, 17), "hardness": 1.0},
    "occlusion clamped": {"occlusion_ceiling": 0.9, "occlusion_ceiling_until": 1e9},
}
BY_KEY, BY_QUERY = "queries_of_keys", "keys_of_queries"


def _dense(plan: BlockPlan, view: str, geometry: PisaGeometry) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of blocks (B, key blocks, query blocks), log C and M (B, N queries, N keys)."""
    pairs: BlockPairs = getattr(plan, view)
    blocks, batch = plan.blocks[0] * plan.blocks[1], geometry.batch
    assert all(table.dtype == torch.int32 for table in (pairs.offsets, pairs.partner))
    assert pairs.offsets.shape == (batch * blocks + 1,)
    assert pairs.offsets[0] == 0 and pairs.offsets[-1] == pairs.partner.numel()
    owner = torch.arange(batch * blocks).repeat_interleave(pairs.offsets.diff().long())
    image, own, partner = owner // blocks, owner % blocks, pairs.partner.long()
    order = owner * blocks + partner
    assert (order.diff() > 0).all()
    key, query = (own, partner) if view == BY_KEY else (partner, own)

    listed = torch.zeros(batch, blocks, blocks, dtype=torch.bool)
    listed[image, key, query] = True
    log_mask = torch.full((batch, blocks, blocks, *plan.log_mask.shape[1:]), -torch.inf)
    log_mask[image, key, query] = plan.log_mask[pairs.log_mask_row.long()]
    share = torch.ones_like(log_mask)
    if plan.visible is not None:
        assert pairs.visible_row is not None
        rays = plan.visible[pairs.visible_row.long()]
        share[image, key, query] = geometry.visible_share(rays)

    used = (plan.token_of >= 0).nonzero().squeeze(1)
    place_of_token = used[plan.token_of[used].argsort()]
    assert torch.equal(plan.token_of[place_of_token], torch.arange(geometry.token_count))

    def by_token(table: Tensor) -> Tensor:
        table = table.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)
        return table[:, place_of_token][:, :, place_of_token].transpose(1, 2)

    return listed, by_token(log_mask), by_token(share)


@pytest.mark.parametrize("view", [BY_KEY, BY_QUERY])
@pytest.mark.parametrize("tile", [(8, 8), (4, 16)])
@pytest.mark.parametrize("name", CASES)
def test_tables_hold_what_the_dense_ones_hold(
    name: str, tile: tuple[int, int], view: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_module, "TOKEN_PAIRS_AT_ONCE", 5 * 64**2)
    geometry = _geometry(**CASES[name])
    plan = BlockPlan.make(geometry, tile)
    listed, log_mask, share = _dense(plan, view, geometry)

    expected = geometry.log_soft_mask(torch.float64).detach()
    if geometry.emitters is not None:
        expected = expected.masked_fill(~geometry.emitters[:, None, :], -torch.inf)
    torch.testing.assert_close(log_mask, expected.float(), rtol=1e-6, atol=1e-6)
    inside = expected > -torch.inf
    assert torch.equal(share[inside], geometry.visibility()[inside])

    # Listed are the pairs with some C > 0, and no others.
    tokens = torch.arange(geometry.token_count)
    rows, columns = tokens // geometry.width, tokens % geometry.width
    block = rows // tile[0] * plan.blocks[1] + columns // tile[1]
    image, query, key = inside.nonzero(as_tuple=True)
    reached = torch.zeros_like(listed)
    reached[image, block[key], block[query]] = True
    assert torch.equal(listed, reached)

    stored = plan.log_mask.nbytes + (0 if plan.visible is None else plan.visible.nbytes)
    assert stored <= BlockPlan.bytes_needed(geometry, tile)


def test_nothing_is_stored_where_there_is_nothing_to_tell() -> None:
    # Far inside their circles, and nothing in the way: no row but the one that all share.
    plan = BlockPlan.make(_geometry(size=(16, 24), radius=40.0, narrowest=39.0, occlusion=False))
    assert plan.queries_of_keys.partner.numel() == 6 * 6
    assert plan.log_mask.shape == (1, 64, 64) and (plan.log_mask == 0).all()
    assert plan.visible is None and plan.queries_of_keys.visible_row is None
    # A ground without anything above it: rays are traced, and all arrive.
    flat = PisaGeometry.build(torch.ones(1, 1, 16, 24), torch.full((1, 1, 16, 24), 0.3))
    assert BlockPlan.make(flat).visible is None


def test_blocks_without_emitters_are_in_no_pair() -> None:
    coc = torch.full((1, 1, 32, 32), 2.0)
    emitters = torch.zeros(coc.shape, dtype=torch.bool)
    emitters[..., 3, 3] = True
    plan = BlockPlan.make(PisaGeometry.build(coc, emitters=emitters))
    assert plan.queries_of_keys.partner.tolist() == [0]
    nothing = BlockPlan.make(PisaGeometry.build(coc, emitters=torch.zeros_like(emitters)))
    assert nothing.queries_of_keys.partner.numel() == nothing.keys_of_queries.partner.numel() == 0


def test_neighbours_only_in_a_large_sharp_picture() -> None:
    geometry = PisaGeometry.build(torch.full((1, 1, 256, 256), 0.5))
    pairs = BlockPlan.make(geometry).queries_of_keys.partner.numel()
    assert pairs == (3 * 32 - 2) ** 2  # each of 32 x 32 blocks with those around it


def test_the_budget_is_kept() -> None:
    geometry = _geometry()
    needed = BlockPlan.bytes_needed(geometry)
    generous = PisaGeometry.build(torch.ones(1, 1, 8, 8), byte_budget=needed)
    assert BlockPlan.bytes_needed(generous) <= needed
    BlockPlan.make(generous)
    tight = PisaGeometry.build(torch.ones(1, 1, 32, 32), byte_budget=1 << 16)
    with pytest.raises(ValueError, match=r"need .* MiB .* byte_budget allows 0\.1 MiB"):
        BlockPlan.make(tight)


def test_the_same_tables_every_time() -> None:
    first, again = BlockPlan.make(_geometry()), BlockPlan.make(_geometry())
    assert torch.equal(first.log_mask, again.log_mask)
    assert first.visible is not None and again.visible is not None
    assert torch.equal(first.visible, again.visible)
    assert torch.equal(first.keys_of_queries.partner, again.keys_of_queries.partner)
    assert not first.log_mask.requires_grad

"""The local backend against the dense reference in float64: outputs, gradients, sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bokehdiff.attention import PisaConfig, PisaGeometry, pisa_attention
from bokehdiff.attention import local as local_module
from bokehdiff.attention.tiles import group_tiles, plan_tiles

TOLERANCE = 1e-12


def _scene(batch: int, height: int, width: int, largest: float) -> tuple[Tensor, Tensor]:
    """Radii, and a disparity map with near specks over a far ground."""
    generator = torch.Generator().manual_seed(height * 100 + width)
    coc = largest * torch.rand(batch, 1, height, width, generator=generator, dtype=torch.float64)
    disparity = 0.4 * torch.rand(batch, 1, 2 * height, 2 * width, generator=generator)
    disparity[:, :, ::7, ::5] = 1.0
    return coc, disparity


def _compare(
    geometry: PisaGeometry, coc: Tensor, batch: int, heads: int, channels: int, values: int
) -> None:
    results = []
    for backend in ("reference", "local"):
        generator = torch.Generator().manual_seed(0)
        tensors = [
            torch.randn(
                batch, heads, geometry.token_count, size, generator=generator, dtype=torch.float64
            ).requires_grad_()
            for size in (channels, channels, values)
        ]
        out = pisa_attention(*tensors, geometry, backend=backend, scale=1.0)  # type: ignore
        weights = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        inputs = [*tensors, coc] if coc.requires_grad else tensors
        gradients = torch.autograd.grad(out, inputs, weights, retain_graph=True)
        results.append((out, *gradients))
    for expected, found in zip(*results, strict=True):
        largest = max(1.0, float(expected.detach().abs().max()))
        assert (found - expected).abs().max() <= TOLERANCE * largest


CASES: dict[str, dict[str, Any]] = {
    "whole tiles": {"size": (16, 24), "radius": 3.0},
    "ragged tiles": {"size": (13, 21), "radius": 5.0},
    "one row": {"size": (1, 30), "radius": 4.0},
    "one column": {"size": (19, 1), "radius": 4.0},
    "single token": {"size": (1, 1), "radius": 1.0},
    "larger than the image": {"size": (9, 10), "radius": 40.0},
    "several groups, batch and heads": {"size": (27, 33), "radius": 2.0, "batch": 2, "heads": 2},
    "one geometry for a batch": {"size": (13, 12), "radius": 3.0, "batch": 3, "shared": True},
    "no occlusion": {"size": (14, 18), "radius": 3.0, "occlusion": False},
    "few emitters": {"size": (20, 33), "radius": 3.0, "emitters": 0.03},
    "nothing stored": {"size": (13, 21), "radius": 3.0, "options": {"byte_budget": 0}},
    "soft edge": {"size": (12, 11), "radius": 2.0, "options": {"hardness": 5.0}},
    "no edge": {"size": (9, 11), "radius": 2.0, "options": {"hardness": 1.0}},
    "official weights": {"size": (12, 18), "radius": 2.0, "preset": "official_weights"},
    "unequal axes": {
        "size": (8, 20),
        "radius": 3.0,
        "config": {"token_spacing": None, "resample_occlusion_map": True},
    },
    "unequal axes, every pair": {
        "size": (6, 17),
        "radius": 3.0,
        "config": {"token_spacing": None, "cutoff": 0.0},
    },
    "samples jittered, wide image": {
        "size": (8, 30),
        "radius": 2.0,
        "config": {"jitter": "location_table"},
    },
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk", [1 << 12, 1 << 20])
def test_agrees_with_the_reference(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_module, "SCORES_PER_CHUNK", chunk)
    case = CASES[name]
    height, width = case["size"]
    batch = case.get("batch", 1)
    coc, disparity = _scene(1 if case.get("shared") else batch, height, width, case["radius"])
    coc.requires_grad_()
    emitters = None
    if "emitters" in case:
        emitters = torch.rand(coc.shape, generator=torch.Generator().manual_seed(5))
        emitters = emitters < case["emitters"]
    geometry = PisaGeometry.build(
        coc,
        disparity if case.get("occlusion", True) else None,
        config=PisaConfig.preset(case.get("preset", "paper"), **case.get("config", {})),
        emitters=emitters,
        **case.get("options", {}),
    )
    _compare(geometry, coc, batch, case.get("heads", 1), channels=4, values=3)


def test_tiles_without_emitters_are_not_visited() -> None:
    coc, disparity = _scene(1, 32, 32, 2.0)
    emitters = torch.zeros(coc.shape, dtype=torch.bool)
    emitters[..., 3, 3] = emitters[..., 20, 29] = True
    geometry = PisaGeometry.build(coc, disparity, emitters=emitters)
    assert sum(group.tiles for group in plan_tiles(geometry, 8, torch.float32)) == 2
    nothing = PisaGeometry.build(coc, disparity, emitters=torch.zeros_like(emitters))
    q = torch.randn(1, 1, 1024, 4, requires_grad=True)
    out = pisa_attention(q, q, q, nothing, backend="local")
    assert (out == 0).all()
    out.sum().backward()
    assert q.grad is not None and (q.grad == 0).all()


def test_sharp_regions_are_cheap() -> None:
    """Tiles pay for their own radius, not for the largest of the image."""
    coc = torch.zeros(1, 1, 64, 64)
    coc[..., :8, :8] = 12.0
    groups = group_tiles(PisaGeometry.build(coc), 8)
    reached = sorted(group.queries.shape[1] for group in groups for _ in range(group.tiles))
    # A tile and the tokens one step around it; the blurred one covers what it can reach.
    assert len(reached) == 64 and reached[-2] <= 12 * 12 and reached[-1] > 15 * 15


def test_a_small_budget_goes_to_visibility_first() -> None:
    """Rays cost far more to trace again than log C to compute again."""
    coc, disparity = _scene(1, 32, 32, 3.0)
    plenty = plan_tiles(PisaGeometry.build(coc, disparity), 8, torch.float32)
    hindered = [group for group in plenty if group.visible_rays is not None]
    needed = sum(group.tiles * group.scores_per_tile for group in hindered)
    assert needed > 0 and all(group.log_mask is not None for group in plenty)
    tight = plan_tiles(PisaGeometry.build(coc, disparity, byte_budget=needed), 8, torch.float32)
    assert all(group.log_mask is None for group in tight)
    for group, other in zip(
        hindered, (g for g in tight if g.visible_rays is not None), strict=True
    ):
        assert torch.equal(group.visible_rays, other.visible_rays)  # type: ignore[arg-type]


def test_same_bytes_every_time() -> None:
    coc, disparity = _scene(1, 24, 24, 3.0)
    geometry = PisaGeometry.build(coc.float(), disparity)
    q, k, v = torch.randn(3, 1, 1, 576, 8, generator=torch.Generator().manual_seed(0))
    first = pisa_attention(q, k, v, geometry, backend="local")
    again = PisaGeometry.build(coc.float(), disparity)
    assert torch.equal(first, pisa_attention(q, k, v, again, backend="local"))


def test_float32_is_close_to_float64_at_16384_tokens() -> None:
    coc, disparity = _scene(1, 128, 128, 3.0)
    geometry = PisaGeometry.build(coc.float(), disparity)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 16384, 8, generator=generator)
    single = pisa_attention(q, k, v, geometry, backend="local")
    double = pisa_attention(q.double(), k.double(), v.double(), geometry, backend="local")
    assert (single - double).abs().max() < 1e-5 * double.abs().max()


@pytest.mark.gpu
def test_agrees_with_the_reference_on_a_gpu() -> None:
    coc, disparity = _scene(2, 27, 33, 3.0)
    coc = coc.cuda().requires_grad_()
    geometry = PisaGeometry.build(coc, disparity.cuda())
    reference = PisaGeometry.build(coc.detach().cpu(), disparity)
    q, k, v = torch.randn(3, 2, 2, 891, 4, generator=torch.Generator().manual_seed(0)).double()
    out = pisa_attention(q.cuda(), k.cuda(), v.cuda(), geometry, backend="local")
    expected = pisa_attention(q, k, v, reference, backend="reference")
    # Rays on the edge of an occluder may fall to either side.
    assert ((out.cpu() - expected).abs() > 1e-9).float().mean() < 1e-2


@pytest.mark.gpu
def test_same_bytes_every_time_on_a_gpu() -> None:
    """Tiles overlap in what they give light to, yet nothing is added in an order left to chance."""
    coc, disparity = _scene(1, 40, 56, 4.0)
    q, k, v = torch.randn(3, 1, 4, 2240, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for _ in range(2):
        geometry = PisaGeometry.build(coc.float().cuda(), disparity.cuda())
        inputs = [value.cuda().requires_grad_() for value in (q, k, v)]
        out = pisa_attention(*inputs, geometry, backend="local")  # type: ignore[arg-type]
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for first, again in zip(*results, strict=True):
        assert torch.equal(first, again)

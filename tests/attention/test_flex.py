"""The flex backend against the dense reference: eagerly on the CPU, compiled where there is a GPU.

Eager flex_attention computes every pair, so that the CPU does not see which blocks are skipped. The
masks are compared with the circles of confusion instead.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bokehdiff.attention import PisaConfig, PisaGeometry, flex
from bokehdiff.attention.reference import pisa_attention_reference

TOLERANCE = 1e-6
"""Relative to the largest value: the tables are float32."""

CASES: dict[str, dict[str, Any]] = {
    "whole blocks": {"size": (16, 24), "radius": 3.0},
    "ragged blocks": {"size": (13, 21), "radius": 5.0},
    "one row": {"size": (1, 50), "radius": 4.0},
    "single token": {"size": (1, 1), "radius": 1.0},
    "batch": {"size": (13, 21), "radius": 2.0, "batch": 2, "heads": 2},
    "one geometry for a batch": {"size": (9, 20), "radius": 3.0, "batch": 3, "shared": True},
    "no occlusion": {"size": (16, 24), "radius": 3.0, "occlusion": False},
    "some emitters": {"size": (18, 21), "radius": 3.0, "emitters": 0.02},
    "no emitters": {"size": (9, 10), "radius": 3.0, "emitters": 0.0},
    "wide circles": {"size": (16, 16), "radius": 60.0},
    "soft edge": {"size": (12, 11), "radius": 2.0, "hardness": 5.0},
    "no edge": {"size": (9, 11), "radius": 2.0, "hardness": 1.0},
    "unequal axes": {"size": (8, 20), "radius": 3.0, "config": {"token_spacing": None}},
    "official weights": {"size": (12, 18), "radius": 2.0, "preset": "official_weights"},
    "many channels": {"size": (8, 16), "radius": 2.0, "channels": (70, 5)},
    "many value channels": {"size": (8, 16), "radius": 2.0, "channels": (5, 70)},
}


def _geometry(case: dict[str, Any], **options: Any) -> PisaGeometry:
    """A geometry with near specks over a far ground."""
    height, width = case["size"]
    batch = 1 if case.get("shared") else case.get("batch", 1)
    generator = torch.Generator().manual_seed(height * 100 + width)
    coc = torch.rand(batch, 1, height, width, generator=generator, dtype=torch.float64)
    disparity = 0.4 * torch.rand(batch, 1, 2 * height, 2 * width, generator=generator)
    disparity[:, :, ::7, ::5] = 1.0
    emitters = None
    if "emitters" in case:
        emitters = torch.rand(coc.shape, generator=generator) < case["emitters"]
    return PisaGeometry.build(
        case["radius"] * coc,
        disparity if case.get("occlusion", True) else None,
        config=PisaConfig.preset(case.get("preset", "paper"), **case.get("config", {})),
        hardness=case.get("hardness"),
        emitters=emitters,
        **options,
    )


def _inputs(case: dict[str, Any], geometry: PisaGeometry, spread: float = 1.0) -> list[Tensor]:
    """q, k and v; the scores have this standard deviation, and neither unit is that of `scale`."""
    generator = torch.Generator().manual_seed(0)
    channels, values = case.get("channels", (4, 3))
    shape = (case.get("batch", 1), case.get("heads", 1), geometry.token_count)
    q, k, v = (
        torch.randn(*shape, size, generator=generator, dtype=torch.float64)
        for size in (channels, channels, values)
    )
    return [q * spread, k, v]


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest error relative to the largest value; NaN counts as infinitely wrong."""
    error = (found.double() - expected.double()).abs().nan_to_num(nan=torch.inf)
    return float(error.max() / expected.abs().max().clamp(min=1.0))


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str) -> None:
    geometry = _geometry(CASES[name])
    q, k, v = _inputs(CASES[name], geometry)
    scale = q.shape[-1] ** -0.5
    out, log_normaliser = flex.forward(q, k, v, geometry, scale)
    assert out.dtype == log_normaliser.dtype == torch.float64
    expected = pisa_attention_reference(q, k, v, geometry, scale)
    assert _error(out, expected) <= TOLERANCE
    logits = scale * q @ k.mT + geometry.log_soft_mask(torch.float64)[:, None]
    expected = logits.logsumexp(-2)
    if geometry.emitters is not None:
        expected = expected * geometry.emitters[:, None]
    assert _error(log_normaliser, expected) <= TOLERANCE


@pytest.mark.parametrize("occlusion", [True, False])
def test_large_scores_stay_finite(occlusion: bool) -> None:
    case = {"size": (13, 21), "radius": 4.0, "occlusion": occlusion}
    geometry = _geometry(case)
    q, k, v = _inputs(case, geometry, spread=32.0)
    expected = pisa_attention_reference(q, k, v, geometry, 0.5)
    assert _error(flex.forward(q, k, v, geometry, 0.5)[0], expected) <= TOLERANCE
    single = flex.forward(q.float(), k.float(), v.float(), geometry, 0.5)[0]
    # float32 rounds scores of a few hundred by 3e-5.
    assert _error(single, expected) <= 1e-3


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)],
)
def test_lower_precisions(precision: torch.dtype, tolerance: float) -> None:
    case = {"size": (13, 21), "radius": 4.0, "heads": 2, "channels": (16, 24)}
    geometry = _geometry(case)
    q, k, v = (value.to(precision) for value in _inputs(case, geometry))
    out, log_normaliser = flex.forward(q, k, v, geometry, 0.25)
    assert out.dtype == log_normaliser.dtype == torch.float32
    expected = pisa_attention_reference(q.double(), k.double(), v.double(), geometry, 0.25)
    assert _error(out, expected) <= tolerance


def test_takes_any_strides_and_gives_no_gradient() -> None:
    case = {"size": (9, 20), "radius": 3.0, "heads": 3, "batch": 2, "shared": True}
    geometry = _geometry(case)
    q, k, v = _inputs(case, geometry)
    expected = flex.forward(q, k, v, geometry, 0.5)[0]
    q, k, v = (value.transpose(1, 2).contiguous().transpose(1, 2) for value in (q, k, v))
    found = flex.forward(q.requires_grad_(), k, v.requires_grad_(), geometry, 0.5)[0]
    assert torch.equal(found, expected) and not found.requires_grad


@pytest.mark.parametrize(
    "name", ["batch", "one geometry for a batch", "some emitters", "no emitters", "unequal axes"]
)
def test_masks_hold_the_blocks_that_meet(name: str) -> None:
    geometry = _geometry(CASES[name])
    plan = flex._plan_of(geometry, torch.float32)
    reached = (geometry.log_soft_mask(torch.float64) > -torch.inf).mT  # keys, queries
    if geometry.emitters is not None:
        reached = reached & geometry.emitters[:, :, None]
    places = torch.zeros(geometry.batch, *[len(plan.token_of)] * 2, dtype=torch.bool)
    places[:, plan.place_of[:, None], plan.place_of] = reached
    blocks = places.unflatten(2, (-1, flex.BLOCK)).unflatten(1, (-1, flex.BLOCK)).any(4).any(2)
    assert torch.equal(plan.queries_of_keys.to_dense()[:, 0].bool(), blocks)
    assert torch.equal(plan.keys_of_queries.to_dense()[:, 0].bool(), blocks.mT)
    for row in (plan.mask_row, plan.light_row):
        finite = (plan.table[row.long()] > -torch.inf).flatten(3).any(3)
        assert (finite <= blocks).all()
    table = plan.table[plan.mask_row.long()].transpose(2, 3).flatten(3, 4).flatten(1, 2)
    assert torch.equal(table > -torch.inf, places)


def test_distant_blocks_are_skipped() -> None:
    geometry = PisaGeometry.build(torch.full((1, 1, 64, 64), 2.0))
    mask = flex._plan_of(geometry, torch.float32).keys_of_queries
    assert mask.to_dense().float().mean() < 0.3


def test_plan_is_made_once_for_each_precision_of_the_table() -> None:
    geometry = _geometry(CASES["whole blocks"])
    geometry.radius.requires_grad_()
    single, half = (flex._plan_of(geometry, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert flex._plan_of(geometry, torch.float64) is single
    assert flex._plan_of(geometry, torch.float16) is half
    assert single.table.dtype == torch.float32 and half.table.dtype == torch.float16
    assert not single.table.requires_grad


def test_too_large_a_table_is_refused() -> None:
    geometry = _geometry(CASES["whole blocks"], byte_budget=1000)
    q, k, v = _inputs(CASES["whole blocks"], geometry)
    with pytest.raises(ValueError, match="byte_budget"):
        flex.forward(q, k, v, geometry, 1.0)
    # Where the blocks fit, the rounded table still may not.
    geometry = _geometry({"size": (16, 96), "radius": 0.0, "occlusion": False})
    needed = flex._plan_of(geometry, torch.float32).table.nbytes
    geometry = _geometry(
        {"size": (16, 96), "radius": 0.0, "occlusion": False}, byte_budget=needed - 1
    )
    with pytest.raises(ValueError, match="backend='flex' needs"):
        flex._plan_of(geometry, torch.float32)


def test_says_what_it_cannot_do() -> None:
    geometry = _geometry(CASES["ragged blocks"])
    q = torch.zeros(1, 1, geometry.token_count, 4)
    assert flex.supports(geometry, q, q) is None
    assert "CUDA" in str(flex.supports(geometry, q.to("meta"), q.to("meta")))
    noisy = _geometry({**CASES["ragged blocks"], "preset": "official_exact"})
    assert "location_random" in str(flex.supports(noisy, q, q))
    open_sky = _geometry({**CASES["ragged blocks"], "preset": "official_exact", "occlusion": False})
    assert flex.supports(open_sky, q, q) is None


def test_is_traced_whole_and_only_once_for_pictures_of_one_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the CPU can tell about compiling: the tracing, not the kernels."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")

    @functools.cache
    def traced(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(kernel, dynamic=False, fullgraph=True, backend=counter)

    case = {"size": (16, 40), "radius": 3.0}
    for radius in (2.5, 3.0, 3.5):
        geometry = _geometry({**case, "radius": radius})
        q, k, v = (value.float() for value in _inputs(case, geometry))
        eager = flex.forward(q, k, v, geometry, 0.5)
        with monkeypatch.context() as patch:
            patch.setattr(flex, "_run", lambda kernel, *arguments: traced(kernel)(*arguments))
            compiled = flex.forward(q, k, v, geometry, 0.5)
        assert all(map(torch.equal, eager, compiled))
    assert counter.frame_count == 2


def test_eager_calls_do_not_warn() -> None:
    geometry = _geometry(CASES["ragged blocks"])
    q, k, v = _inputs(CASES["ragged blocks"], geometry)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flex.forward(q, k, v, geometry, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [(4, 3), (40, 40), (64, 64), (64, 96), (128, 128), (160, 160)])
@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)],
)
@pytest.mark.parametrize("name", ["batch", "one geometry for a batch", "some emitters"])
def test_agrees_with_the_reference_on_a_gpu(
    name: str, precision: torch.dtype, tolerance: float, channels: tuple[int, int]
) -> None:
    case = {**CASES[name], "channels": channels}
    geometry = _geometry(case).to("cuda")
    q, k, v = (value.to("cuda", precision) for value in _inputs(case, geometry))
    assert flex.supports(geometry, q, v) is None
    scale = q.shape[-1] ** -0.5
    out, log_normaliser = flex.forward(q, k, v, geometry, scale)
    assert out.dtype == log_normaliser.dtype == torch.float32
    assert bool(out.isfinite().all()) and bool(log_normaliser.isfinite().all())
    expected = pisa_attention_reference(q.double(), k.double(), v.double(), geometry, scale)
    # Rays on the edge of an occluder may fall to either side.
    far_off = (out - expected).abs() > tolerance * expected.abs().max()
    assert far_off.float().mean() < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_large_scores_stay_finite_on_a_gpu(precision: torch.dtype) -> None:
    case = {"size": (13, 21), "radius": 4.0, "occlusion": False}
    geometry = _geometry(case).to("cuda")
    q, k, v = (value.to("cuda", precision) for value in _inputs(case, geometry, spread=32.0))
    expected = pisa_attention_reference(q.double(), k.double(), v.double(), geometry, 0.5)
    found = flex.forward(q, k, v, geometry, 0.5)[0]
    assert _error(found, expected) <= (1e-3 if precision == torch.float32 else 3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_same_bits_every_time_with_4096_tokens_on_a_gpu(precision: torch.dtype) -> None:
    case = {"size": (64, 64), "radius": 3.0, "heads": 2, "channels": (64, 64), "occlusion": False}
    geometry = _geometry(case).to("cuda")
    q, k, v = (value.to("cuda", precision) for value in _inputs(case, geometry))
    first, again = (flex.forward(q, k, v, geometry, 0.125)[0] for _ in range(2))
    assert torch.equal(first, again)
    expected = pisa_attention_reference(q.double(), k.double(), v.double(), geometry, 0.125)
    assert _error(first, expected) <= (1e-5 if precision == torch.float32 else 2e-2)


@pytest.mark.gpu
def test_many_sizes_stay_compiled_on_a_gpu() -> None:
    """More sizes than torch keeps by default; uncompiled, every score would be stored."""
    for width in range(16, 160, 16):
        case = {"size": (8, width), "radius": 2.0, "occlusion": False, "channels": (64, 64)}
        geometry = _geometry(case).to("cuda")
        q, k, v = (value.to("cuda", torch.bfloat16) for value in _inputs(case, geometry))
        expected = pisa_attention_reference(q.double(), k.double(), v.double(), geometry, 0.125)
        assert _error(flex.forward(q, k, v, geometry, 0.125)[0], expected) <= 2e-2

"""pisa_attention: properties that hold for every backend, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bokehdiff.attention import PisaConfig, PisaGeometry, pisa_attention

BACKENDS = ["reference", "stream", "local"]


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _radii(height: int, width: int, largest: float, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return largest * torch.rand(batch, 1, height, width, generator=generator, dtype=torch.float64)


def _point_light(height: int, width: int, row: int, column: int) -> Tensor:
    light = torch.zeros(1, 1, height, width, dtype=torch.float64)
    light[..., row, column] = 1.0
    return light.reshape(1, 1, -1, 1)


def _spread(values: Tensor, geometry: PisaGeometry, backend: str) -> Tensor:
    """Light spread with zero logits: PISA as a plain renderer."""
    logits = values.new_zeros(*values.shape[:3], 4)
    return pisa_attention(logits, logits, values, geometry, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_energy_is_conserved_without_occlusion(backend: str) -> None:
    geometry = PisaGeometry.build(_radii(11, 14, 4.0))
    q, k, v = (_random(1, 2, 154, channels, seed=seed) for seed, channels in enumerate((8, 8, 3)))
    out = pisa_attention(3 * q, k, v, geometry, backend=backend)
    assert torch.allclose(out.sum(2), v.sum(2), atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_focus_without_logits_is_the_identity(backend: str) -> None:
    geometry = PisaGeometry.build(torch.zeros(1, 1, 9, 10), torch.rand(1, 1, 9, 10))
    values = _random(1, 1, 90, 5)
    assert torch.allclose(_spread(values, geometry, backend), values, atol=5e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_point_becomes_an_even_disc(backend: str) -> None:
    geometry = PisaGeometry.build(torch.full((1, 1, 15, 15), 4.7))
    disc = _spread(_point_light(15, 15, 7, 7), geometry, backend).view(15, 15)
    y, x = torch.meshgrid(torch.arange(15) - 7, torch.arange(15) - 7, indexing="ij")
    inside = y**2 + x**2 <= 4.7**2
    lit = disc[inside]
    assert torch.allclose(lit, torch.full_like(lit, 1 / int(inside.sum())), rtol=0.01)
    assert disc[~inside].max() < 2e-3 * lit.min()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_nearer_side_occludes(backend: str) -> None:
    """Two flat halves out of focus: the far one loses light behind the near one, not vice versa."""
    coc = torch.full((1, 1, 16, 16), 3.0)
    disparity = torch.full((1, 1, 48, 48), 0.1)
    disparity[..., 24:] = 0.9
    geometry = PisaGeometry.build(coc, disparity, config=PisaConfig(supersampling=1))

    def spread(row: int, column: int) -> Tensor:
        return _spread(_point_light(16, 16, row, column), geometry, backend).view(16, 16)

    far, near = spread(8, 6), spread(8, 9)
    assert far[:, 8:].sum() == 0 and 0.5 < far.sum() < 0.99
    assert near[:, :8].sum() > 0.05 and near.sum() == pytest.approx(1.0)
    # With the depths swapped, the other half loses.
    geometry = PisaGeometry.build(coc, 1 - disparity, config=PisaConfig(supersampling=1))
    assert spread(8, 6).sum() == pytest.approx(1.0) and spread(8, 9).sum() < 0.99


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_light_is_lost_not_moved(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    disparity = torch.rand(1, 1, 24, 24, generator=generator)
    coc = torch.full((1, 1, 12, 12), 2.0, dtype=torch.float64)
    values = torch.ones(1, 1, 144, 1, dtype=torch.float64)
    free = _spread(values, PisaGeometry.build(coc), backend)
    hindered = _spread(values, PisaGeometry.build(coc, disparity), backend)
    assert (hindered <= free + 1e-12).all() and hindered.sum() < 0.95 * free.sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_do_not_emit_give_nothing(backend: str) -> None:
    coc, disparity = _radii(10, 19, 3.0), torch.rand(1, 1, 10, 19)
    emitters = torch.rand(1, 1, 10, 19, generator=torch.Generator().manual_seed(0)) < 0.2
    emitters[..., :8] = False
    q, k, v = (_random(1, 1, 190, 4, seed=seed) for seed in range(3))
    some = pisa_attention(
        q, k, v, PisaGeometry.build(coc, disparity, emitters=emitters), backend=backend
    )
    masked = v * emitters.view(1, 1, -1, 1)
    everything = PisaGeometry.build(coc, disparity)
    assert torch.allclose(some, pisa_attention(q, k, masked, everything, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strong_logits_stay_finite(backend: str) -> None:
    geometry = PisaGeometry.build(_radii(8, 8, 2.0).float(), torch.rand(1, 1, 8, 8))
    q, k, v = (_random(1, 1, 64, 16, seed=seed, dtype=torch.float32) for seed in range(3))
    out = pisa_attention(64 * q, 64 * k, v, geometry, backend=backend)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(backend: str, dtype: torch.dtype) -> None:
    geometry = PisaGeometry.build(_radii(8, 8, 2.0).float(), torch.rand(1, 1, 8, 8))
    q, k, v = (_random(2, 2, 64, 8, seed=seed).to(dtype) for seed in range(3))
    out = pisa_attention(q, k, v, geometry, backend=backend)
    exact = pisa_attention(q.float(), k.float(), v.float(), geometry, backend=backend)
    assert out.dtype == dtype and torch.equal(out, exact.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_of_one_equals_batch_of_many(backend: str) -> None:
    coc, disparity = _radii(9, 12, 2.5, batch=3), torch.rand(3, 1, 18, 24)
    q, k, v = (_random(3, 2, 108, 4, seed=seed) for seed in range(3))
    together = pisa_attention(q, k, v, PisaGeometry.build(coc, disparity), backend=backend)
    for index in range(3):
        one = slice(index, index + 1)
        alone = pisa_attention(
            q[one], k[one], v[one], PisaGeometry.build(coc[one], disparity[one]), backend=backend
        )
        assert torch.allclose(alone, together[one], atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_guidance_repeats_the_images(backend: str) -> None:
    """A batch [a, b, a, b] needs the geometry of a and b only."""
    coc, disparity = _radii(7, 9, 2.5, batch=2), torch.rand(2, 1, 14, 18)
    geometry = PisaGeometry.build(coc, disparity)
    stacked = PisaGeometry.build(coc.repeat(2, 1, 1, 1), disparity.repeat(2, 1, 1, 1))
    q, k, v = (_random(4, 2, 63, 4, seed=seed) for seed in range(3))
    expected = pisa_attention(q, k, v, stacked, backend=backend)
    assert torch.allclose(pisa_attention(q, k, v, geometry, backend=backend), expected, atol=1e-13)


def test_auto_is_exact_for_sharp_and_soft_edges() -> None:
    q, k, v = (_random(1, 1, 120, 4, seed=seed) for seed in range(3))
    for hardness in (1.0, 3.0, 1e6):
        geometry = PisaGeometry.build(_radii(10, 12, 1.0), torch.rand(1, 1, 10, 12),
                                      hardness=hardness)  # fmt: skip
        assert torch.allclose(
            pisa_attention(q, k, v, geometry),
            pisa_attention(q, k, v, geometry, backend="reference"),
            atol=1e-12,
        )


def test_dropout_repeats_with_its_generator() -> None:
    geometry = PisaGeometry.build(_radii(6, 6, 2.0))
    q, k, v = (_random(1, 1, 36, 4, seed=seed) for seed in range(3))

    def drop(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pisa_attention(q, k, v, geometry, dropout=0.5, generator=generator)

    assert torch.equal(drop(0), drop(0)) and not torch.equal(drop(0), drop(1))
    with pytest.raises(ValueError, match="needs backend='reference'"):
        pisa_attention(q, k, v, geometry, dropout=0.5, backend="local")


def test_noise_per_pair_is_refused_by_local_and_dense_under_auto() -> None:
    config = PisaConfig.preset("official_exact")
    geometry = PisaGeometry.build(_radii(6, 6, 2.0), torch.rand(1, 1, 6, 6), config=config)
    q = _random(1, 1, 36, 4)
    pisa_attention(q, q, q, geometry)
    with pytest.raises(ValueError, match="location_random"):
        pisa_attention(q, q, q, geometry, backend="local")


@pytest.mark.parametrize(
    ("q", "v", "backend", "message"),
    [
        ((1, 1, 36), (1, 1, 36, 4), "auto", "batch, heads, tokens, channels"),
        ((1, 1, 36, 4), (1, 2, 36, 4), "auto", "same batch, heads"),
        ((1, 1, 35, 4), (1, 1, 35, 4), "auto", "6 x 6"),
        ((3, 1, 36, 4), (3, 1, 36, 4), "auto", "built for 2 images"),
        ((2, 1, 36, 4), (2, 1, 36, 4), "flash", "backend must be"),
    ],
)
def test_refuses(q: tuple, v: tuple, backend: str, message: str) -> None:
    geometry = PisaGeometry.build(_radii(6, 6, 2.0, batch=2))
    query = torch.zeros(q)
    with pytest.raises(ValueError, match=message):
        pisa_attention(query, query, torch.zeros(v), geometry, backend=backend)  # type: ignore

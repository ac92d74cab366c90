"""Heads that see a part of the lens each: together the whole, apart halves and quarters."""

from __future__ import annotations

import pytest
import torch

from bokehdiff.attention import PisaGeometry, pisa_attention
from bokehdiff.attention.backends import refusal

ROWS, COLUMNS = 11, 13
TOKENS = ROWS * COLUMNS


def geometry_of(parts: int, radius: torch.Tensor | None = None, **options: object) -> PisaGeometry:
    generator = torch.Generator().manual_seed(3)
    if radius is None:
        radius = 4 * torch.rand(1, 1, ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    return PisaGeometry.build(radius, lens_parts=parts, **options)  # type: ignore[arg-type]


def inputs(heads: int, batch: int = 1, channels: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = (3, batch, heads, TOKENS, channels)
    return list(torch.randn(*shape, generator=generator, dtype=torch.float64).unbind())


def spread_of_one(parts: int, backend: str) -> torch.Tensor:
    """(parts, rows, columns) of what the middle token sends, with equal logits."""
    radius = torch.full((1, 1, ROWS, COLUMNS), 4.0, dtype=torch.float64)
    value = torch.zeros(1, parts, TOKENS, 1, dtype=torch.float64)
    value[:, :, ROWS // 2 * COLUMNS + COLUMNS // 2] = 1
    zeros = torch.zeros(1, parts, TOKENS, 2, dtype=torch.float64)
    out = pisa_attention(zeros, zeros, value, geometry_of(parts, radius), backend=backend)  # type: ignore[arg-type]
    return out[0, ..., 0].unflatten(-1, (ROWS, COLUMNS))


@pytest.mark.parametrize("backend", ["reference", "stream", "local"])
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_keep_their_light_and_are_opposite_to_each_other(parts: int, backend: str) -> None:
    spread = spread_of_one(parts, backend)
    torch.testing.assert_close(spread.sum((1, 2)), torch.ones(parts, dtype=torch.float64))
    # The part opposite to p is the last but p, seen through the middle.
    torch.testing.assert_close(spread.flip(0), spread.flip(1, 2))
    columns = torch.arange(COLUMNS, dtype=torch.float64) - COLUMNS // 2
    rows = (torch.arange(ROWS, dtype=torch.float64) - ROWS // 2)[:, None]
    across, down = (spread * columns).sum((1, 2)), (spread * rows).sum((1, 2))
    # Half a disc has its centre of gravity at 4 r / (3 pi) from the cut, a quarter of one at
    # sqrt(2) times that from the middle; r is known to no more than half a token of four.
    distance = (across**2 + down**2).sqrt()
    expected = 4 * 4 / (3 * torch.pi) * (1 if parts == 2 else 2**0.5)
    torch.testing.assert_close(distance, torch.full_like(distance, expected), rtol=0.12, atol=0)


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_together_are_the_whole_lens(parts: int) -> None:
    # On a middle token every part has the same share of the disc, so their mean is the disc.
    whole = spread_of_one(1, "reference")[0]
    torch.testing.assert_close(spread_of_one(parts, "reference").mean(0), whole)


@pytest.mark.parametrize("backend", ["stream", "local"])
@pytest.mark.parametrize(("parts", "heads", "batch"), [(2, 2, 1), (4, 4, 2), (2, 4, 3), (4, 8, 1)])
def test_backends_agree_with_the_formula_gradients_too(
    parts: int, heads: int, batch: int, backend: str
) -> None:
    emitters = torch.rand(1, 1, ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) > 0.3
    results = []
    for name in ("reference", backend):
        geometry = geometry_of(parts, emitters=emitters)
        q, k, v = (value.requires_grad_() for value in inputs(heads, batch))
        out = pisa_attention(q, k, v, geometry, backend=name)  # type: ignore[arg-type]
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        results.append([out.detach(), *torch.autograd.grad(out, (q, k, v), weight)])
    for expected, found in zip(*results, strict=True):
        # Nothing but the order of additions differs.
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_images_of_one_batch_may_have_geometries_of_their_own() -> None:
    generator = torch.Generator().manual_seed(2)
    radius = 3 * torch.rand(2, 1, ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    q, k, v = inputs(4, batch=2)
    expected = pisa_attention(q, k, v, geometry_of(4, radius), backend="reference")
    for backend in ("stream", "local"):
        found = pisa_attention(q, k, v, geometry_of(4, radius), backend=backend)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="lens_parts is 3"):
        geometry_of(3)
    q, k, v = inputs(3)
    with pytest.raises(ValueError, match="3 heads but the geometry cuts the lens into 2"):
        pisa_attention(q, k, v, geometry_of(2))
    for backend in ("flex", "triton"):
        assert "parts" in (refusal(backend, geometry_of(2)) or "")

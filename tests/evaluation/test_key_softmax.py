"""The softmax over keys, against a dense one in float64 and against what it does not conserve."""

from __future__ import annotations

import pytest
import torch

from bokehdiff.attention import PisaConfig, PisaGeometry
from bokehdiff.attention.geometry import log_soft_mask
from evaluation.key_softmax import key_softmax_attention

HEIGHT, WIDTH = 6, 9


def scene(
    batch: int = 1, emitters: bool = False, lens_parts: int = 1, **changes: object
) -> PisaGeometry:
    generator = torch.Generator().manual_seed(1)
    radius = 3 * torch.rand(batch, 1, HEIGHT, WIDTH, generator=generator)
    disparity = 0.9 * torch.rand(batch, 1, HEIGHT, WIDTH, generator=generator)
    emits = torch.rand(batch, 1, HEIGHT, WIDTH, generator=generator) < 0.7
    return PisaGeometry.build(
        radius,
        disparity,
        config=PisaConfig(**changes),
        emitters=emits if emitters else None,
        lens_parts=lens_parts,
    )


def inputs(
    batch: int = 2, heads: int = 4, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randn(batch, heads, HEIGHT * WIDTH, channels, generator=generator, dtype=dtype)
        for channels in (4, 4, 5)
    ]


@pytest.mark.parametrize(
    ("batch", "emitters", "changes"),
    [
        (1, False, {}),
        (2, True, {}),
        (2, False, {"segments": 0}),
        (1, True, {"hardness": 1.0}),
        (2, True, {"hardness": 3.0, "segments": 0}),
        (1, False, {"token_spacing": None}),
        (2, True, {"segments": 0, "lens_parts": 2}),
    ],
)
def test_like_a_dense_softmax_over_keys(batch: int, emitters: bool, changes: dict) -> None:
    geometry = scene(batch, emitters, **changes)
    q, k, v = inputs()
    # C of Eq. 5-6, from the definition, with rows and columns apart.
    row, column = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    places = torch.stack([row, column], -1).flatten(0, 1).double()
    places *= torch.tensor(geometry.spacing, dtype=torch.float64)
    distance = (places[:, None] - places).norm(dim=-1)
    radius = geometry.radius.double()[:, None, None, :]
    logits = 0.7 * q @ k.mT + log_soft_mask(radius, distance, geometry.slope, 1e-12)
    if geometry.lens_parts == 2:
        # Heads 0 and 2 see light that arrives on one side of its source, 1 and 3 on the other; of
        # the row or column between them, each sees half.
        number = torch.arange(HEIGHT * WIDTH)
        halves = geometry.log_lens_shares(number, number[:, None], q.dtype)
        torch.testing.assert_close(halves.exp().sum(0), torch.ones_like(halves[0]))
        logits = logits + halves[[0, 1, 0, 1]]
    if geometry.emitters is not None:
        logits = logits.masked_fill(~geometry.emitters[:, None, None], -torch.inf)
    weights = torch.softmax(logits, -1).nan_to_num(0) * geometry.visibility(q.dtype)[:, None]
    found = key_softmax_attention(q, k, v, geometry, 0.7)
    # float64 throughout but for radius and visible share, which are float32 in both.
    torch.testing.assert_close(found, weights @ v, rtol=1e-9, atol=1e-9)


def test_a_query_that_no_circle_reaches_gets_nothing() -> None:
    emits = torch.zeros(1, 1, HEIGHT, WIDTH, dtype=torch.bool)
    emits[..., 0, 0] = True
    geometry = PisaGeometry.build(torch.zeros(1, 1, HEIGHT, WIDTH), None, emitters=emits)
    q, k, v = inputs(1)
    found = key_softmax_attention(q, k, v, geometry, 1.0)
    torch.testing.assert_close(found[:, :, 0], v[:, :, 0])
    assert not found[:, :, 2:WIDTH].any()
    none = PisaGeometry.build(torch.zeros(1, 1, HEIGHT, WIDTH), None, emitters=emits & False)
    assert not key_softmax_attention(q, k, v, none, 1.0).any()


def test_large_logits_do_not_overflow() -> None:
    q, k, v = inputs(1, dtype=torch.float32)
    found = key_softmax_attention(q, k, v, scene(), 1e4)
    assert found.isfinite().all() and found.abs().max() <= v.abs().max()

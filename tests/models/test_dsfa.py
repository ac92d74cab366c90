"""Divided space-focus attention against its equations, and what makes a stack seen."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bokehdiff.models.dsfa import DSFABlock, DSFAEncoder, check_strengths

WIDTH, HEADS = 16, 4


def block_of(seed: int = 0, **options: Any) -> DSFABlock:
    torch.manual_seed(seed)
    return DSFABlock(WIDTH, HEADS, **options).double()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64)


# -- The equations, without anything fused -------------------------------------------------------


def plain_attention(
    layer: Any, queries: Tensor, keys: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """softmax(scale q k^T + bias) v for each head by itself, (..., L, D) looking at (..., F, D)."""
    weight, shift = layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3)
    head = WIDTH // HEADS
    mixed = []
    for number in range(HEADS):
        rows = slice(number * head, (number + 1) * head)
        q = queries @ weight[0][rows].T + shift[0][rows]
        k, v = (keys @ weight[i][rows].T + shift[i][rows] for i in (1, 2))
        logits = scale * q @ k.transpose(-1, -2)
        if bias is not None:
            logits = logits + bias
        mixed.append(torch.softmax(logits, -1) @ v)
    return torch.cat(mixed, -1) @ layer.out_proj.weight.T + layer.out_proj.bias


def plain_block(
    block: DSFABlock, reference: Tensor, stack: Tensor, K: Tensor, space_scale: float
) -> Tensor:
    """The whole block as section by section of its docstring says, all frames to the end."""

    def normal(layer: Any, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / deviation * layer.weight + layer.bias

    def feed_forward(layer: Any, x: Tensor) -> Tensor:
        hidden = x @ layer.fc1.weight.T + layer.fc1.bias
        gelu = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        return gelu @ layer.fc2.weight.T + layer.fc2.bias

    refined = []
    for picture, frames, strengths in zip(reference, stack, K, strict=True):
        k = torch.cat([torch.zeros(1, dtype=K.dtype), strengths]) / block.largest_strength
        x = torch.cat([picture[None], frames])  # (F, P, D)
        first, _, last = block.k_embed
        t = F.relu(k[:, None] @ first.weight.T + first.bias) @ last.weight.T + last.bias
        y = torch.cat([t[:, None], x], 1)
        z = normal(block.ln_space_attn, y)
        y = y + block.gamma_space_attn * plain_attention(block.space_attn, z, z, space_scale)
        z = normal(block.ln_space_ffn, y)
        y = y + block.gamma_space_ffn * feed_forward(block.space_ffn, z)
        film = t @ block.focus_film.weight.T + block.focus_film.bias
        g, s = film[:, None, :WIDTH], film[:, None, WIDTH:]
        x = y[:, 1:] * (1 + torch.tanh(g)) + s
        bias = -block.alibi_scale * (k[:, None] - k[None]).abs()
        scale = (WIDTH / HEADS) ** -0.5
        places = []
        for place in range(x.shape[1]):
            p = x[:, place]
            z = normal(block.ln_focus_attn, p)
            p = p + block.gamma_focus_attn * plain_attention(block.focus_attn, z, z, scale, bias)
            z = normal(block.ln_focus_ffn, p)
            places.append(p + block.gamma_focus_ffn * feed_forward(block.focus_ffn, z))
        refined.append(torch.stack(places)[:, 0])
    return torch.stack(refined)


@pytest.mark.parametrize("largest_strength", [1.0, 30.0])
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("space, power", [("single", -0.5), ("double", -1.0)])
@pytest.mark.parametrize("frames, patches", [(1, 1), (3, 6)])
def test_block_is_its_equations_with_their_gradients(
    frames: int, patches: int, space: str, power: float, learn: bool, largest_strength: float
) -> None:
    block = block_of(
        space_attention_scale=space,
        alibi_scale=0.7,
        learn_alibi_scale=learn,
        largest_strength=largest_strength,
        initial_gate=0.5,
    )
    inputs = [tokens(2, patches), tokens(2, frames, patches, seed=2)]
    K = torch.tensor([[0.5, 2.0, 7.0], [3.0, 1.0, 0.0]], dtype=torch.float64)[:, :frames]
    inputs = [value.requires_grad_() for value in (*inputs, K)]
    probe = tokens(2, patches, seed=3)

    found = block(*inputs)
    wanted = plain_block(block, *inputs, space_scale=(WIDTH / HEADS) ** power)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    leaves = [*inputs, *block.parameters()]
    for got, expected in zip(
        torch.autograd.grad((found * probe).sum(), leaves),
        torch.autograd.grad((wanted * probe).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


# -- Properties ----------------------------------------------------------------------------------


def test_without_frames_the_reference_comes_back() -> None:
    reference = tokens(2, 5)
    block = block_of()
    assert block(reference, tokens(2, 0, 5), torch.zeros(2, 0)) is reference
    assert block(reference, tokens(2, 0, 5)) is reference


@pytest.mark.parametrize("frames", [1, 2, 7])
@torch.no_grad()
def test_order_of_frames_does_not_matter(frames: int) -> None:
    block, reference, stack = block_of(), tokens(2, 5), tokens(2, frames, 5, seed=2)
    K = torch.arange(1.0, 1 + 2 * frames).view(2, frames).double()
    order = torch.randperm(frames, generator=torch.Generator().manual_seed(0))
    found = block(reference, stack[:, order], K[:, order])
    torch.testing.assert_close(found, block(reference, stack, K), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_pictures_of_a_batch_do_not_see_each_other() -> None:
    block, reference, stack = block_of(), tokens(2, 5), tokens(2, 3, 5, seed=2)
    K = torch.tensor([[1.0, 2, 3], [9, 5, 2]], dtype=torch.float64)
    both = block(reference, stack, K)
    for i in range(2):
        alone = block(reference[i : i + 1], stack[i : i + 1], K[i : i + 1])
        torch.testing.assert_close(alone[0], both[i], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_strength_is_divided_before_anything_else() -> None:
    ours, raw = block_of(largest_strength=30.0), block_of()
    reference, stack = tokens(1, 5), tokens(1, 3, 5, seed=2)
    K = torch.tensor([[10.0, 20.0, 30.0]], dtype=torch.float64)
    torch.testing.assert_close(
        ours(reference, stack, K), raw(reference, stack, K / 30), rtol=1e-12, atol=1e-12
    )


@torch.no_grad()
def test_no_strength_is_strength_zero() -> None:
    block, reference, stack = block_of(), tokens(1, 5), tokens(1, 3, 5, seed=2)
    assert torch.equal(block(reference, stack), block(reference, stack, torch.zeros(1, 3)))


def change_by_another_stack(block: DSFABlock) -> float:
    """Largest change of the tokens, over their largest, at K = 10, 20, 30."""
    reference = tokens(1, 9)
    K = torch.tensor([[10.0, 20.0, 30.0]], dtype=torch.float64)
    one, other = (block(reference, tokens(1, 3, 9, seed=seed), K) for seed in (2, 3))
    return float((one - other).abs().max() / one.abs().max())


@torch.no_grad()
def test_stack_is_seen_unless_strengths_are_raw() -> None:
    """The bias e^-10 of raw strengths hides the stack; the block with K over 30 sees it."""
    seen = change_by_another_stack(block_of(largest_strength=30.0))
    hidden = change_by_another_stack(block_of(largest_strength=1.0))
    assert seen > 1e-3
    assert hidden < 2e-3 * seen


def test_zero_gates_are_the_identity_and_can_be_trained() -> None:
    block = block_of(initial_gate=0.0)
    reference, stack = tokens(2, 5), tokens(2, 3, 5, seed=2)
    K = torch.tensor([[1.0, 2, 3], [9, 5, 2]], dtype=torch.float64)
    refined = block(reference, stack, K)
    assert torch.equal(refined, reference)
    refined.square().sum().backward()
    for name in ("gamma_space_attn", "gamma_space_ffn", "gamma_focus_attn", "gamma_focus_ffn"):
        assert getattr(block, name).grad.abs().min() > 0
    assert block.focus_film.weight.grad.abs().max() > 0


def test_published_start_is_no_identity() -> None:
    block, reference = block_of(), tokens(1, 5)
    assert torch.equal(block.gamma_space_attn, torch.full((WIDTH,), 0.1).double())
    assert not torch.allclose(block(reference, tokens(1, 3, 5, seed=2)), reference, atol=1e-2)


def test_learned_scale_starts_where_the_fixed_one_is_and_stays_positive() -> None:
    fixed, learned = block_of(alibi_scale=0.3), block_of(alibi_scale=0.3, learn_alibi_scale=True)
    reference, stack = tokens(1, 5), tokens(1, 3, 5, seed=2)
    K = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(
        learned(reference, stack, K), fixed(reference, stack, K), rtol=1e-9, atol=1e-9
    )
    assert "log_alibi_scale" not in fixed.state_dict()
    # A step of gradient descent that would carry any plain number below zero.
    gradient = torch.autograd.grad(learned(reference, stack, K).sum(), learned.log_alibi_scale)[0]
    assert gradient.abs() > 0
    with torch.no_grad():
        learned.log_alibi_scale -= 100
    assert 0 < learned.alibi_scale.item() < 1e-40


def test_state_is_that_of_the_published_block() -> None:
    state = block_of().state_dict()
    assert len(state) == 34
    assert state["k_embed.0.weight"].shape == (WIDTH // 4, 1)
    assert state["space_attn.qkv.weight"].shape == (3 * WIDTH, WIDTH)
    assert state["focus_film.weight"].shape == (2 * WIDTH, WIDTH)


@torch.no_grad()
def test_half_precision_is_near_and_keeps_differences_of_large_strengths() -> None:
    block, reference, stack = block_of(), tokens(1, 5), tokens(1, 2, 5, seed=2)
    # Equal numbers in bfloat16, which has eight binary digits, and yet two strengths.
    K = torch.tensor([[1000.0, 1001.0]])
    assert K.bfloat16().unique().numel() == 1
    half = block.bfloat16()
    strengths = half.strengths(K, reference.bfloat16())
    assert strengths.dtype == torch.float32 and strengths.tolist() == [[0.0, 1000.0, 1001.0]]
    found = half(reference.bfloat16(), stack.bfloat16(), K / 1000)
    wanted = block_of()(reference, stack, (K / 1000).double())
    assert found.dtype == torch.bfloat16
    assert (found.double() - wanted).abs().max() < 0.05 * wanted.abs().max()


@torch.no_grad()
def test_autocast_is_near() -> None:
    block = block_of().float()
    reference, stack = tokens(1, 5).float(), tokens(1, 2, 5, seed=2).float()
    K = torch.tensor([[1.0, 3.0]])
    wanted = block(reference, stack, K)
    with torch.autocast("cpu", torch.bfloat16):
        found = block(reference, stack, K)
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()


@torch.no_grad()
def test_block_compiles_into_one_graph() -> None:
    block, reference, stack = block_of(), tokens(1, 5), tokens(1, 2, 5, seed=2)
    K = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(reference, stack, K), block(reference, stack, K))


def test_block_runs_without_numbers() -> None:
    with torch.device("meta"):
        block = DSFABlock(WIDTH, HEADS)
        refined = block(torch.empty(1, 5, WIDTH), torch.empty(1, 3, 5, WIDTH), torch.empty(1, 3))
    assert refined.shape == (1, 5, WIDTH)


# -- Mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "K, words",
    [
        (torch.tensor([[1.0, math.nan]]), "finite strengths"),
        (torch.tensor([[1.0, math.inf]]), "finite strengths"),
        (torch.tensor([[1.0, -0.5]]), "finite strengths"),
        (torch.tensor([[1.0, 2.0, 3.0]]), r"\(1, 3\); wanted \(1, 2\)"),
        (torch.tensor([1.0, 2.0]), r"\(2,\); wanted \(1, 2\)"),
    ],
)
def test_strengths_that_are_none(K: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        block_of()(tokens(1, 5), tokens(1, 2, 5), K)


def test_strengths_of_either_shape_are_the_same() -> None:
    K = torch.tensor([[1.0, 2.0]])
    assert torch.equal(check_strengths(K, 1, 2), check_strengths(K.unsqueeze(-1), 1, 2))


@pytest.mark.parametrize(
    "reference, stack",
    [((1, 5), (1, 2, 4)), ((2, 5), (1, 2, 5)), ((1, 5), (2, 5)), ((1, 1, 5), (1, 2, 5))],
)
def test_shapes_that_do_not_go_together(reference: tuple[int, ...], stack: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="has the shape"):
        block_of()(tokens(*reference), tokens(*stack))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"width": 18}, "multiple of 4"),
        ({"num_heads": 5}, "multiple of 4 and of the number of heads"),
        ({"space_attention_scale": "triple"}, "'triple'"),
        ({"alibi_scale": -1.0}, "alibi_scale is -1.0"),
        ({"alibi_scale": 0.0, "learn_alibi_scale": True}, "cannot be learned"),
        ({"largest_strength": 0.0}, "largest_strength is 0.0"),
    ],
)
def test_options_that_make_no_block(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DSFABlock(**{"width": WIDTH, "num_heads": HEADS, **options})


# -- Levels of a transformer ---------------------------------------------------------------------


def encoder_of(levels: list[int]) -> DSFAEncoder:
    torch.manual_seed(0)
    return DSFAEncoder(WIDTH, levels, HEADS, largest_strength=30.0).double()


@torch.no_grad()
def test_encoder_refines_its_levels_and_no_others() -> None:
    encoder = encoder_of([3, 1])
    assert encoder.levels == [1, 3]
    reference = [tokens(2, 6, seed=i) for i in range(4)]
    stack = [tokens(2, 3, 6, seed=10 + i) for i in range(4)]
    K = torch.tensor([[1.0, 2, 3], [10, 20, 30]], dtype=torch.float64)
    refined = encoder(reference, stack, K)
    assert refined[0] is reference[0] and refined[2] is reference[2]
    for level in (1, 3):
        wanted = encoder.block(level)(reference[level], stack[level], K)
        assert torch.equal(refined[level], wanted)


@torch.no_grad()
def test_encoder_takes_grids_as_well() -> None:
    encoder = encoder_of([0])
    reference, stack = tokens(2, 2, 3), tokens(2, 3, 2, 3, seed=2)
    (grid,) = encoder([reference], [stack])
    (row,) = encoder([reference.flatten(1, 2)], [stack.flatten(2, 3)])
    assert torch.equal(grid.flatten(1, 2), row)


def test_encoder_refuses_features_that_do_not_go_together() -> None:
    encoder = encoder_of([1])
    one, two = [tokens(1, 6)], [tokens(1, 2, 6)]
    with pytest.raises(ValueError, match="1 levels of features"):
        encoder(one, two)
    with pytest.raises(ValueError, match="2 levels .* 1 of the stack"):
        encoder(one * 2, two)
    with pytest.raises(ValueError, match="of level 1"):
        encoder([*one, tokens(1, 2, 3)], two * 2)


@pytest.mark.parametrize("levels", [[], [1, 1], [-1]])
def test_levels_that_are_none(levels: list[int]) -> None:
    with pytest.raises(ValueError, match="levels are"):
        encoder_of(levels)

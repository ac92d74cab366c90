"""The recurrent block against a twin that walks token by token; its gates, and its memory."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from bokehdiff.models.bidirectional_recurrence import BidirectionalRecurrenceBlock, GateFloors
from bokehdiff.models.gated_delta_rule import gated_delta_rule_reference

HEADS, KEYS, VALUES = 2, 3, 4
CHANNELS = HEADS * VALUES


def a_block(seed: int = 0, **settings) -> BidirectionalRecurrenceBlock:
    """Of 8 channels, in float64; every parameter is drawn, norms and biases too."""
    block = BidirectionalRecurrenceBlock(CHANNELS, HEADS, KEYS, VALUES, **settings).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.5 * drawn)
    return block


def some_tokens(height: int = 5, width: int = 7, batch: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, CHANNELS, height, width, generator=generator, dtype=torch.float64)


def floors(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- What it computes ------------------------------------------------------------------------------


def walks_of(height: int, width: int) -> list[list[tuple[int, int]]]:
    rows = [(y, x) for y in range(height) for x in range(width)]
    columns = [(y, x) for x in range(width) for y in range(height)]
    return [rows, rows[::-1], columns, columns[::-1]]


def twin(
    block: BidirectionalRecurrenceBlock,
    x: torch.Tensor,
    film: tuple[torch.Tensor, torch.Tensor] | None,
    alpha_min: torch.Tensor,
) -> torch.Tensor:
    """The equations of the block for one picture (C, H, W), head by head and walk by walk."""
    _, height, width = x.shape
    y = block.mixing_norm(x.permute(1, 2, 0))
    if film is not None:
        y = y * (1 + film[0].flatten()) + film[1].flatten()
    parts = block.project(y).reshape(height, width, block.projections, HEADS, -1)
    answers = torch.zeros(height, width, HEADS, 4, VALUES, dtype=x.dtype)
    for number, walk in enumerate(walks_of(height, width)):
        ys, xs = [y for y, _ in walk], [x for _, x in walk]
        for head in range(HEADS):
            part = parts[ys, xs, number % block.projections, head]
            q, k, v, gates = part.split([KEYS, KEYS, VALUES, 2], -1)
            q, k = (a / torch.sqrt(a.square().sum(-1, keepdim=True) + 1e-6) for a in (q, k))
            alpha = alpha_min + (1 - alpha_min) * torch.sigmoid(gates[:, 0])
            beta = torch.sigmoid(gates[:, 1])
            o, _ = gated_delta_rule_reference(q[None], k[None], v[None], alpha[None], beta[None])
            answers[ys, xs, head, number] = o[0]
    weights = torch.softmax(block.direction_weights(answers.flatten(3)), -1)
    fused = (weights[..., None] * answers).sum(3).flatten(2)
    rows = x.permute(1, 2, 0) + block.answer(block.answer_norm(fused))
    z = F.gelu(block.local_mixing(block.local_norm(rows).permute(2, 0, 1)[None]))
    return rows.permute(2, 0, 1) + block.local_projection(z)[0]


@pytest.mark.parametrize("shared_projections", [False, True])
@pytest.mark.parametrize("filmed", [False, True])
@pytest.mark.parametrize("size", [(5, 7), (6, 3), (1, 4)])
def test_block_is_its_equations(
    shared_projections: bool, filmed: bool, size: tuple[int, int]
) -> None:
    block, x = a_block(shared_projections=shared_projections), some_tokens(*size)
    film = None
    if filmed:
        generator = torch.Generator().manual_seed(5)
        film = tuple(
            torch.randn(2, CHANNELS, 1, 1, generator=generator, dtype=torch.float64)
            for _ in range(2)
        )
    found, memory = block(x, film, floors(0.2, 0.9))
    assert memory is None
    for number, floor in enumerate((0.2, 0.9)):
        own_film = None if film is None else (film[0][number], film[1][number])
        wanted = twin(block, x[number], own_film, floors(floor))
        torch.testing.assert_close(found[number], wanted, rtol=0, atol=1e-11)


def test_every_token_hears_of_every_other_and_longer_with_a_higher_floor() -> None:
    block = a_block()
    reach = []
    for floor in (0.5, 0.99):
        x = some_tokens(8, 8, batch=1).requires_grad_()
        out, _ = block(x, None, floors(floor))
        heard = torch.autograd.grad(out[0, :, 0, 0].sum(), x)[0].abs().sum((0, 1))
        assert heard.min() > 0
        reach.append(float(heard[7, 7] / heard[0, 0]))
    assert reach[1] > 3 * reach[0]


def test_gradients_against_finite_differences() -> None:
    block, x = a_block(), some_tokens(2, 3, batch=1).requires_grad_()
    alpha_min = floors(0.6).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *given: block(given[0], None, given[1])[0], (x, alpha_min)
    )


def test_all_parameters_learn() -> None:
    for temporal in ("none", "final", "chunk"):
        block = a_block(temporal=temporal)
        out, memory = block(some_tokens(9, 9), None, floors(0.9, 0.9))
        if temporal != "none":
            out, _ = block(some_tokens(9, 9, seed=2), None, floors(0.9, 0.9), memory)
        out.square().sum().backward()
        for name, parameter in block.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_half_precision_keeps_gates_near_1() -> None:
    block, x = a_block().float(), some_tokens(12, 12).float()
    wanted, _ = block(x, None, floors(0.999, 0.999).float())
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = block(x, None, floors(0.999, 0.999).float())
    assert (found.float() - wanted).abs().mean() < 0.02 * wanted.abs().mean()
    found, _ = block.bfloat16()(x.bfloat16(), None, floors(0.999, 0.999).float())
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).abs().mean() < 0.02 * wanted.abs().mean()


def test_exported_block_is_the_block() -> None:
    block, x = a_block().float().eval(), some_tokens(6, 5).float()
    alpha_min = floors(0.8, 0.9).float()
    program = torch.export.export(block, (x, None, alpha_min))
    other = some_tokens(6, 5, seed=3).float()
    found, wanted = program.module()(other, None, alpha_min)[0], block(other, None, alpha_min)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    targets = " ".join(str(node.target) for node in program.graph.nodes)
    assert not any(word in targets for word in ("solve", "sort", "arange", "eye", "tril"))


def test_published_number_of_parameters() -> None:
    def count(channels: int, heads: int, keys: int, **settings) -> int:
        block = BidirectionalRecurrenceBlock(channels, heads, keys, channels // heads, **settings)
        return sum(parameter.numel() for parameter in block.parameters())

    # The published totals less everything that is not a block, over 2 x 6 blocks.
    assert [count(80, 4, 16), count(160, 5, 32), count(256, 8, 32)] == [84_548, 370_156, 942_148]
    assert count(80, 4, 16, shared_projections=True) == 84_548 - 3 * 81 * 4 * (16 + 16 + 20 + 2)
    assert count(80, 4, 16, temporal="chunk") == 84_548 + 161
    assert count(80, 4, 16, temporal="final") == 84_548 + 161 + 4 * 4 * 16 * 20


# -- Gates -----------------------------------------------------------------------------------------


def test_floors_start_at_their_half_lives() -> None:
    half_lives = [8.0, 21.5, 64.0, 256.0]
    found = GateFloors(4, half_lives, with_blur=True)()
    assert [floor.item() ** tokens for floor, tokens in zip(found, half_lives, strict=True)] == (
        pytest.approx([0.5] * 4, abs=1e-4)
    )
    (alone,) = GateFloors(1, [8.0], with_blur=False)()
    assert alone.item() == pytest.approx(2 ** (-1 / 8))


def test_floors_grow_whatever_is_learned() -> None:
    gates = GateFloors(6, [8.0 * 2**number for number in range(6)], with_blur=True)
    assert sum(parameter.numel() for parameter in gates.parameters()) == 7
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        gates.steps.copy_(3 * torch.randn(5, generator=generator))
        gates.blur_weight.fill_(2.0)
    found = torch.stack(gates(torch.tensor([0.0, 0.5])))
    assert found.shape == (6, 2)
    assert bool((found.diff(dim=0) > 0).all()) and bool((found[:, 1] > found[:, 0]).all())
    logits = torch.logit(found.double())
    torch.testing.assert_close(
        logits[:, 1] - logits[:, 0], torch.ones(6).double(), rtol=0, atol=1e-3
    )


def test_floors_hear_of_the_blur_only_if_they_are_to() -> None:
    share = torch.tensor([0.0, 1.0])
    deaf = GateFloors(2, [8.0, 64.0], with_blur=False)
    assert sum(parameter.numel() for parameter in deaf.parameters()) == 2
    for floor, alone in zip(deaf(share), deaf(), strict=True):
        assert torch.equal(floor, alone.expand(2))
    hearing = GateFloors(2, [8.0, 64.0], with_blur=True)
    # Untrained, it makes no difference, but it can learn to.
    for floor, alone in zip(hearing(share), deaf(), strict=True):
        assert torch.equal(floor, alone.expand(2))
    torch.stack(hearing(share)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in hearing.parameters())


# -- Memory ----------------------------------------------------------------------------------------


def with_rho(block: BidirectionalRecurrenceBlock, logit: float) -> BidirectionalRecurrenceBlock:
    """The block with rho = sigmoid(logit), whatever it sees."""
    with torch.no_grad():
        block.carry.weight.zero_()
        block.carry.bias.fill_(logit)
    return block


FLOOR = floors(0.98, 0.95)


def test_final_begins_where_the_frame_before_ended() -> None:
    # Twice the rows of a picture, as two frames, are one picture for a walk along the rows.
    block = with_rho(a_block(temporal="final"), 40.0)
    with torch.no_grad():
        block.first_state.zero_()
        # Only the first walk is listened to.
        block.direction_weights.weight.zero_()
        block.direction_weights.bias.copy_(torch.tensor([50.0, 0, 0, 0]))
        block.local_projection.weight.zero_()
    x = some_tokens(10, 6)
    whole, _ = block(x, None, FLOOR)
    first, memory = block(x[:, :, :5], None, FLOOR)
    second, _ = block(x[:, :, 5:], None, FLOOR, memory)
    torch.testing.assert_close(torch.cat([first, second], 2), whole, rtol=0, atol=1e-12)
    alone, _ = with_rho(block, -800.0)(x[:, :, 5:], None, FLOOR, memory)
    torch.testing.assert_close(alone, block(x[:, :, 5:], None, FLOOR)[0], rtol=0, atol=1e-14)
    assert (alone - second).abs().max() > 1e-3


def test_final_blends_learned_and_last_state_by_what_both_frames_show() -> None:
    block, x, now = a_block(temporal="final"), some_tokens(4, 5), some_tokens(4, 5, seed=9)
    _, memory = block(x, None, FLOOR)
    assert torch.equal(memory.mean_token, x.mean((2, 3)))
    both = torch.cat([now.mean((2, 3)), x.mean((2, 3))], 1)
    rho = torch.sigmoid(both @ block.carry.weight[0] + block.carry.bias)
    found, _ = block(now, None, FLOOR, memory)
    for number in range(2):
        blended = a_block(temporal="final")
        with torch.no_grad():
            last = memory.states[0, :, number, None]
            blended.first_state.copy_(rho[number] * last + (1 - rho[number]) * block.first_state)
        wanted, _ = blended(now[number, None], None, FLOOR[number, None])
        torch.testing.assert_close(found[number, None], wanted, rtol=0, atol=1e-12)


def test_chunk_leaves_a_still_film_as_it_is() -> None:
    x = some_tokens(9, 15)
    for temporal, still in (("chunk", True), ("final", False)):
        block, memory = a_block(temporal=temporal), None
        first = None
        for _ in range(3):
            out, memory = block(x, None, FLOOR, memory)
            first = out if first is None else first
        assert torch.equal(out, first) == still


def test_chunk_carries_states_of_the_same_place() -> None:
    x, now = some_tokens(9, 15), some_tokens(9, 15, seed=4)
    plain = a_block()
    block = a_block(temporal="chunk")
    block.load_state_dict(plain.state_dict(), strict=False)
    first, memory = block(x, None, FLOOR)
    # 135 tokens end two times 64 and once early.
    assert memory.states.shape == (3, 4, 2, HEADS, KEYS, VALUES)
    torch.testing.assert_close(first, plain(x, None, FLOOR)[0], rtol=0, atol=1e-12)
    forgetful, _ = with_rho(block, -800.0)(now, None, FLOOR, memory)
    torch.testing.assert_close(forgetful, plain(now, None, FLOOR)[0], rtol=0, atol=1e-12)
    _, kept = with_rho(block, 800.0)(now, None, FLOOR, memory)
    torch.testing.assert_close(kept.states, memory.states, rtol=0, atol=1e-12)
    _, halfway = with_rho(block, 0.0)(now, None, FLOOR, memory)
    _, own = block(now, None, FLOOR)
    torch.testing.assert_close(
        halfway.states[0], (own.states[0] + memory.states[0]) / 2, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("temporal", ["final", "chunk"])
def test_memory_does_not_grow_and_films_may_be_cut_anywhere(temporal: str) -> None:
    block = a_block(temporal=temporal)
    frames = [some_tokens(9, 8, seed=seed) for seed in range(4)]
    memory, outs, memories = None, [], []
    for frame in frames:
        out, memory = block(frame, None, FLOOR, memory)
        outs.append(out)
        memories.append(memory)
    assert {m.states.shape for m in memories} == {memories[0].states.shape}
    again, _ = block(frames[3], None, FLOOR, memories[2]._replace())
    assert torch.equal(again, outs[3])


# -- Mistakes --------------------------------------------------------------------------------------


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="channels is 9"):
        BidirectionalRecurrenceBlock(9, 2, 3, 4)
    with pytest.raises(ValueError, match="temporal is 'feature'"):
        BidirectionalRecurrenceBlock(8, 2, 3, 4, temporal="feature")
    for half_lives in ([8.0, 8.0], [8.0], [-1.0, 8.0]):
        with pytest.raises(ValueError, match="half_lives"):
            GateFloors(2, half_lives, with_blur=False)
    block = a_block(temporal="chunk")
    _, memory = block(some_tokens(9, 15), None, FLOOR)
    with pytest.raises(ValueError, match="begin a new film"):
        block(some_tokens(4, 4), None, FLOOR, memory)


def test_half_lives_of_the_variants_are_within_reach() -> None:
    # From 8 tokens to 4 rows of 64: logits of 2.40 to 5.91.
    steps = [8.0 * 32 ** (number / 5) for number in range(6)]
    gates = GateFloors(6, steps, with_blur=False)
    logits = [torch.logit(floor).item() for floor in gates()]
    assert logits[0] == pytest.approx(2.40, abs=0.01) and logits[-1] == pytest.approx(
        5.91, abs=0.01
    )
    assert all(later > earlier for earlier, later in pairwise(logits))
    assert all(map(math.isfinite, logits))

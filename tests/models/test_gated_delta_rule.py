"""The gated delta rule: every way to compute it against the loop over tokens, gradients too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bokehdiff.models import gated_delta_fla
from bokehdiff.models.gated_delta_rule import gated_delta_rule, gated_delta_rule_reference

SITUATIONS = (
    "ordinary",
    "no start",
    "one token",
    "ends within a chunk",
    "repeated keys, all replaced",
    "nothing written",
    "gates near 0",
    "some gates 0",
    "some logarithms underflow",
    "no fading",
    "values not contiguous",
)

Inputs = list[torch.Tensor]


def inputs(situation: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Inputs:
    """q, k, v, alpha, beta, and unless there is none, start; dk 6, dv 9."""
    generator = torch.Generator().manual_seed(7)
    sequences, tokens = 3, {"one token": 1, "ends within a chunk": 75}.get(situation, 96)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform() -> torch.Tensor:
        return torch.rand(sequences, tokens, generator=generator, dtype=torch.float64)

    q = F.normalize(normal(sequences, tokens, 6), dim=-1)
    k = F.normalize(normal(sequences, tokens, 6), dim=-1)
    v, start = normal(sequences, tokens, 9), normal(sequences, 6, 9)
    alpha, beta = 0.7 + 0.3 * uniform(), uniform()
    if situation == "repeated keys, all replaced":
        k, beta = k[:, :1].repeat(1, tokens, 1), torch.ones_like(beta)
    if situation == "nothing written":
        beta = torch.zeros_like(beta)
    if situation == "gates near 0":
        alpha = 10 ** (-12 * uniform())
    if situation == "some gates 0":
        alpha = torch.where(uniform() < 0.3, 0.0, alpha)
    if situation == "some logarithms underflow":
        alpha = torch.where(uniform() < 0.3, torch.finfo(dtype).tiny / 4, alpha)
    if situation == "no fading":
        alpha = torch.ones_like(alpha)
    if situation == "values not contiguous":
        v = normal(9, tokens, sequences).permute(2, 1, 0)
    given = [q, k, v, alpha, beta] + ([] if situation == "no start" else [start])
    # What the precision rounds is rounded before, so that errors are the computation's alone.
    return [x.to(device, dtype) for x in given]


def results(function, given: Inputs, **settings) -> Inputs:
    """o, h, and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in given]
    o, h = function(*leaves, **settings)
    generator = torch.Generator().manual_seed(3)
    wanted = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (o, h)]
    gradients = torch.autograd.grad((o, h), leaves, wanted)
    return [o.detach(), h.detach(), *gradients]


def error(found: Inputs, wanted: Inputs) -> float:
    """The largest of all, relative to the largest value of each."""
    return max(
        float((one.double() - other).abs().max() / other.abs().max().clamp_min(1e-30))
        for one, other in zip(found, wanted, strict=True)
    )


# -- The reference ---------------------------------------------------------------------------------


def test_reference_by_hand() -> None:
    k = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.6, 0.8]]], dtype=torch.float64)
    q = torch.tensor([[[2.0, 0.0], [1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    v = torch.tensor([[[10.0], [20.0], [5.0]]], dtype=torch.float64)
    alpha = torch.tensor([[0.3, 0.5, 0.9]], dtype=torch.float64)
    beta = torch.tensor([[0.5, 1.0, 0.25]], dtype=torch.float64)
    o, h = gated_delta_rule_reference(q, k, v, alpha, beta)
    # Half of 10 is written under (1, 0) and asked for twice; then 20 takes the place of all that.
    # Then 18 is left, of which the key sees 0.6 18 = 10.8: a quarter of 5 - 10.8 is added.
    assert o.flatten().tolist() == pytest.approx([10.0, 20.0, 0.8 * 0.25 * (5 - 10.8)])
    assert h.flatten().tolist() == pytest.approx([18 + 0.6 * 0.25 * -5.8, 0.8 * 0.25 * -5.8])


def test_a_gate_of_0_forgets() -> None:
    given = inputs("ordinary")
    given[3][:, 40] = 0
    o, h = gated_delta_rule(*given)
    later, end = gated_delta_rule(*(x[:, 40:] for x in given[:5]))
    torch.testing.assert_close(o[:, 40:], later, rtol=0, atol=1e-13)
    torch.testing.assert_close(h, end, rtol=0, atol=1e-13)


# -- All ways to compute it ------------------------------------------------------------------------


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("chunk_size", [1, 16, 64])
def test_chunks_are_the_loop(situation: str, chunk_size: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        given = inputs(situation, dtype)
        wanted = results(gated_delta_rule_reference, [x.double() for x in given])
        found = results(gated_delta_rule, given, chunk_size=chunk_size, segment=32, backend="torch")
        assert all(x.dtype == dtype for x in found)
        assert error(found, wanted) < tolerance


@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_exportable_form_is_the_loop(situation: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        given = inputs(situation, dtype)
        wanted = results(gated_delta_rule_reference, [x.double() for x in given])
        found = results(gated_delta_rule, given, chunk_size=16, backend="exportable")
        if situation in ("some gates 0", "some logarithms underflow"):
            # These gates have no gradient in this form.
            del found[5], wanted[5]
        assert error(found, wanted) < tolerance


def test_gradients_against_finite_differences() -> None:
    given = [x[:1, :6].requires_grad_() for x in inputs("ordinary")[:5]]
    start = inputs("ordinary")[5][:1].requires_grad_()
    for backend, chunk_size in (("torch", 4), ("exportable", 4)):
        assert torch.autograd.gradcheck(
            lambda *x, b=backend, c=chunk_size: gated_delta_rule(
                *x, chunk_size=c, segment=4, backend=b
            ),
            (*given, start),
            fast_mode=True,
        )


@pytest.mark.parametrize("segment", [16, 40, 64, 1000, "auto"])
def test_segments_change_nothing(segment) -> None:
    given = inputs("ends within a chunk")
    whole = results(gated_delta_rule, given, chunk_size=16, segment=80)
    found = results(gated_delta_rule, given, chunk_size=16, segment=segment)
    assert error(found, whole) < 1e-14


def test_a_state_is_handed_over() -> None:
    *tokens, start = inputs("ordinary")
    whole, end = gated_delta_rule(*tokens, start)
    for cut in (1, 16, 37, 95):
        first, middle = gated_delta_rule(*(x[:, :cut] for x in tokens), start)
        second, last = gated_delta_rule(*(x[:, cut:] for x in tokens), middle)
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-13)
        torch.testing.assert_close(last, end, rtol=0, atol=1e-13)


def test_nothing_is_heard_before_it_is_said() -> None:
    given = inputs("ordinary")
    o, _ = gated_delta_rule(*given)
    changed = [x.clone() for x in given[:5]]
    for x in changed:
        x[:, 50] *= 0.5
    later, _ = gated_delta_rule(*changed, given[5])
    assert torch.equal(later[:, :50], o[:, :50])
    assert float((later[:, 50:] - o[:, 50:]).abs().amax((0, 2)).min()) > 0


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    given = inputs("ordinary", torch.float32)
    v = given[2].requires_grad_()
    o, h = gated_delta_rule(*given)
    (alone,) = torch.autograd.grad(h.sum(), v, retain_graph=True)
    (both,) = torch.autograd.grad(h.sum() + o.sum(), v)
    assert alone.abs().sum() > 0 and not torch.equal(alone, both)


def test_inputs_are_left_alone() -> None:
    given = inputs("ordinary", torch.float32)
    before = [x.clone() for x in given]
    results(gated_delta_rule, given)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


def test_half_precision_is_computed_in_float32() -> None:
    given = [x.bfloat16() for x in inputs("ordinary")]
    wanted, _ = gated_delta_rule(*(x.float() for x in given))
    with torch.autocast("cpu", torch.bfloat16):
        o, h = gated_delta_rule(*given)
        gradients = torch.autograd.grad(
            gated_delta_rule(*(x.requires_grad_() for x in given))[0].sum(), given
        )
    assert o.dtype == torch.bfloat16 and h.dtype == torch.float32
    assert torch.equal(o, wanted.bfloat16())
    assert all(x.dtype == torch.bfloat16 and x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("tokens", [64, 150])
def test_agrees_with_transformers(tokens: int) -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    q, k, v, alpha, beta, start = (
        torch.cat([x, x.flip(1)], 1)[:, :tokens] if number < 5 else x
        for number, x in enumerate(inputs("ordinary", torch.float32))
    )
    o, h = gated_delta_rule(q, k, v, alpha, beta, start)
    # Theirs scales queries by dk^-0.5.
    theirs, end = torch_chunk_gated_delta_rule(
        (q * q.shape[2] ** 0.5)[:, :, None],
        k[:, :, None],
        v[:, :, None],
        alpha.log()[:, :, None],
        beta[:, :, None],
        initial_state=start[:, None],
        output_final_state=True,
    )
    assert error([o, h], [theirs[:, :, 0].double(), end[:, 0].double()]) < 1e-5


# -- Export ----------------------------------------------------------------------------------------


class Rule(torch.nn.Module):
    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gated_delta_rule(*given, chunk_size=16)


def test_an_exported_program_holds_products_and_constants_alone() -> None:
    given = inputs("ends within a chunk", torch.float32)
    program = torch.export.export(Rule(), tuple(given))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    for forbidden in ("solve", "triangular", "tril", "arange", "eye", "cumsum", "where", "sort"):
        assert not [name for name in names if forbidden in name]
    other = [x.roll(1, 0) for x in given]
    found = program.module()(*other)
    assert error(list(found), [x.double() for x in gated_delta_rule(*other)]) < 1e-5
    # No constant that tracing made is left behind.
    o, _ = gated_delta_rule(*other, chunk_size=16, backend="exportable")
    assert type(o) is torch.Tensor


# -- Mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: {"q": x[0][:, :3]}, "q is .* wanted"),
        (lambda x: {"v": x[2][:2]}, "the same N sequences"),
        (lambda x: {"k": x[1][:, :0], "v": x[2][:, :0]}, "the same T tokens"),
        (lambda x: {"alpha": x[3][..., None]}, "alpha is"),
        (lambda x: {"beta": x[4][0]}, "beta is"),
        (lambda x: {"start": x[5].transpose(1, 2)}, "start is"),
        (lambda x: {"chunk_size": 24}, "power of two"),
        (lambda x: {"chunk_size": 0}, "power of two"),
        (lambda x: {"segment": 0}, "segment is 0"),
        (lambda x: {"backend": "cuda"}, "backend is 'cuda'"),
        (lambda x: {"backend": "fla"}, "on a CUDA device"),
    ],
)
def test_mistakes_are_refused(change, words: str) -> None:
    given = inputs("ordinary")
    names = ("q", "k", "v", "alpha", "beta", "start")
    with pytest.raises(ValueError, match=words):
        gated_delta_rule(**dict(zip(names, given, strict=True)) | change(given))


# -- On a GPU --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("situation", SITUATIONS)
def test_chunks_on_a_gpu_are_the_loop(situation: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        given = inputs(situation, dtype)
        wanted = results(gated_delta_rule_reference, [x.double() for x in given])
        found = results(gated_delta_rule, [x.cuda() for x in given], backend="torch")
        assert error([x.cpu() for x in found], wanted) < tolerance


@pytest.mark.gpu
@pytest.mark.skipif(not gated_delta_fla.fla_is_installed(), reason="needs flash-linear-attention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fla_has_our_scale_and_our_layout_of_the_state(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    # dk is not dv: a transposed state would not fit, and a scale of dk^-0.5 would show.
    q, k, v = (torch.randn(4, 200, d, generator=generator) for d in (32, 32, 64))
    alpha, beta = (torch.rand(4, 200, generator=generator) for _ in range(2))
    start = torch.randn(4, 32, 64, generator=generator)
    given = [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, 0.7 + 0.3 * alpha, beta, start]
    rounded = [x.to(dtype) if number < 3 else x for number, x in enumerate(given)]
    wanted = results(gated_delta_rule_reference, [x.double() for x in rounded])
    found = results(gated_delta_rule, [x.cuda() for x in rounded], backend="fla")
    assert found[1].shape == (4, 32, 64)
    assert error([x.cpu() for x in found], wanted) < 2e-2


@pytest.mark.gpu
@pytest.mark.skipif(not gated_delta_fla.fla_is_installed(), reason="needs flash-linear-attention")
def test_auto_takes_fla_for_half_precision_alone() -> None:
    given = [x.cuda() for x in inputs("ordinary", torch.float32)]
    in_chunks = gated_delta_rule(*given, backend="torch")[0]
    assert torch.equal(gated_delta_rule(*given)[0], in_chunks)
    half = [x.bfloat16() for x in given]
    assert torch.equal(gated_delta_rule(*half)[0], gated_delta_rule(*half, backend="fla")[0])

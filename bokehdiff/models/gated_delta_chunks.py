"""The gated delta rule in chunks of tokens; see :mod:`bokehdiff.models.gated_delta_rule`.

With ``D_ts = alpha_(s+1) .. alpha_t`` for s <= t, else 0, ``gamma_t = alpha_1 .. alpha_t``, and
rows of K, Q, V for the C tokens of a chunk that begins with the state h,

    A = strictly_lower(beta (K K^T) D)      U = (I + A)^-1 beta (V - gamma K h)
    O = gamma Q h + ((Q K^T) D) U           h <- gamma_C h + (D_C K)^T U

Only the terms with h have to wait for the chunk before. Logarithms of decay are summed over
``s < i <= t`` by a product with ones, never subtracted from one another, so that decays next to
nothing stay exact, and so do their gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

__all__ = ["exportable_chunks", "in_chunks"]


@torch.compiler.disable(
    reason="There are as many steps as chunks, and a graph would hold them all."
)
def in_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    start: torch.Tensor,
    chunk_size: int,
    segment: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, h) of tensors in one dtype; `segment` is a multiple of `chunk_size`, in tokens."""
    return _InChunks.apply(q, k, v, alpha, beta, start, chunk_size, segment)


class _InChunks(torch.autograd.Function):
    """Forward segment by segment; backward from the last to the first, each computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        alpha: torch.Tensor,
        beta: torch.Tensor,
        start: torch.Tensor,
        chunk_size: int,
        segment: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ones = v.new_ones(chunk_size, chunk_size)
        masks = _Masks(ones.tril(), ones.tril(-1))
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        h, starts = start, []
        for begin in range(0, v.shape[1], segment):
            part = slice(begin, begin + segment)
            work = _Segment([x[:, part] for x in (q, k, v, alpha, beta)], masks)
            starts.append(h)
            h = work.run(h)
            work.answer(o[:, part])
        ctx.save_for_backward(q, k, v, alpha, beta, torch.stack(starts))
        ctx.masks, ctx.segment = masks, segment
        return o, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, o_gradient: torch.Tensor, h_gradient: torch.Tensor) -> Any:
        *inputs, starts = ctx.saved_tensors
        gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        begins = range(0, inputs[0].shape[1], ctx.segment)
        with torch.autocast(o_gradient.device.type, enabled=False):
            for begin, start in reversed(list(zip(begins, starts.unbind(), strict=True))):
                part = slice(begin, begin + ctx.segment)
                work = _Segment([x[:, part] for x in inputs], ctx.masks)
                work.run(start)
                h_gradient = work.backward(
                    o_gradient[:, part], h_gradient, [x[:, part] for x in gradients]
                )
        return (*gradients, h_gradient, None, None)


class _Masks(NamedTuple):
    """Ones (C, C) where token s, the column, is not later than token t, or is earlier."""

    not_later: torch.Tensor
    earlier: torch.Tensor


def _floored(alpha: torch.Tensor) -> torch.Tensor:
    """Gates above a floor that is nothing beside 1, and has an inverse and a logarithm."""
    return alpha.clamp_min(torch.finfo(alpha.dtype).tiny ** 0.5)


class _Segment:
    """A stretch of N sequences, cut into L chunks: B = L N chunks, those of one time together.

    Args:
        inputs: q, k (N, S, dk), v (N, S, dv), alpha and beta (N, S). S may end within a chunk.
        masks: of C tokens.
    """

    def __init__(self, inputs: Sequence[torch.Tensor], masks: _Masks) -> None:
        q, k, v, alpha, beta = inputs
        (N, self.S, dk), C = k.shape, masks.not_later.shape[0]
        L = math.ceil(self.S / C)
        B = L * N
        self.sizes = L, N, C
        self.masks = masks
        self.alpha = _floored(alpha)

        # Keys lie above queries: what both need of a product is one product.
        self.kq = k.new_empty(B, 2 * C, dk)
        self.k, self.q = self.kq[:, :C], self.kq[:, C:]
        self._by_time(self.k).copy_(self._chunks(k))
        self._by_time(self.q).copy_(self._chunks(q))
        self.v = self._chunks(v)
        self.beta = self._chunks(beta[..., None]).reshape(B, C, 1)

        # Logarithms, so that the zeros of the padding do not fade the state.
        logs = self._chunks(self.alpha.log()[..., None]).reshape(B, 1, C)
        spans = torch.matmul(masks.not_later * logs, masks.earlier)
        self.decay = spans.exp_().mul_(masks.not_later)
        self.gamma = torch.matmul(logs, masks.not_later.T).exp_().transpose(1, 2)

        both = torch.bmm(self.kq, self.k.transpose(1, 2)).view(B, 2, C, C)
        self.kk_qk = both.mul_(self.decay[:, None]).view(B, 2 * C, C)
        self.kk, self.qk = self.kk_qk[:, :C], self.kk_qk[:, C:]
        self.system = self.kk * self.beta
        self.last_decay = self.decay[:, -1, :, None]
        self.keys_to_end = self.k * self.last_decay

    def _chunks(self, x: torch.Tensor) -> torch.Tensor:
        """(L, N, C, d) of (N, S, d), followed by zeros to the end of the last chunk."""
        L, N, C = self.sizes
        if L * C > self.S:
            x = F.pad(x, (0, 0, 0, L * C - self.S))
        return x.unflatten(1, (L, C)).transpose(0, 1)

    def _by_time(self, x: torch.Tensor) -> torch.Tensor:
        """(L, N, ...) of (B, ...)."""
        return x.unflatten(0, self.sizes[:2])

    def _put(self, chunks: torch.Tensor, into: torch.Tensor) -> None:
        """Writes (B, C, d) into (N, S, d)."""
        L, _, C = self.sizes
        sequences = self._by_time(chunks).transpose(0, 1)
        if L * C == self.S:
            into.unflatten(1, (L, C)).copy_(sequences)
        else:
            into.copy_(sequences.flatten(1, 2)[:, : self.S])

    def run(self, start: torch.Tensor) -> torch.Tensor:
        """The state (N, dk, dv) after these tokens from the one before them."""
        (L, N, C), dv = self.sizes, start.shape[2]
        # beta V, and -beta gamma K, side by side: the solver takes rows, as columns of the other.
        sides = self.k.new_empty(L * N, C, dv + self.k.shape[2])
        torch.mul(self.v, self._by_time(self.beta), out=self._by_time(sides)[..., :dv])
        torch.mul(self.k, -self.beta * self.gamma, out=sides[..., dv:])
        solved = torch.linalg.solve_triangular(
            self.system.transpose(1, 2), sides.transpose(1, 2),
            upper=True, left=False, unitriangular=True,
        ).transpose(1, 2)  # fmt: skip
        self.written, self.erased = solved[..., :dv].contiguous(), solved[..., dv:]

        states = start.new_empty(L + 1, *start.shape)
        states[0] = start
        for state, after, written, erased, keys, gamma in zip(
            states[:-1].unbind(),
            states[1:].unbind(),
            self._by_time(self.written).unbind(),
            self._by_time(self.erased).unbind(),
            self._by_time(self.keys_to_end.transpose(1, 2)).unbind(),
            self._by_time(self.gamma[:, -1:]).unbind(),
            strict=True,
        ):
            written.baddbmm_(erased, state)
            torch.mul(state, gamma, out=after)
            after.baddbmm_(keys, written)
        self.states = states[:-1].flatten(0, 1)
        return states[-1].clone()

    def answer(self, o: torch.Tensor) -> None:
        """Writes what the tokens answer into (N, S, dv); after :meth:`run`."""
        remembered = torch.bmm(self.q, self.states).mul_(self.gamma)
        self._put(remembered.baddbmm_(self.qk, self.written), o)

    def backward(
        self,
        o_gradient: torch.Tensor,
        end_gradient: torch.Tensor,
        gradients: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """The gradient of the start, from those of the answers and of the end; after :meth:`run`.

        Writes those of the inputs into `gradients`, five tensors in the order of the inputs.
        """
        q_gradient, k_gradient, v_gradient, alpha_gradient, beta_gradient = gradients
        (L, N, C), masks = self.sizes, self.masks
        k, q, beta, gamma, states = self.k, self.q, self.beta, self.gamma, self.states
        dk, dv = states.shape[1:]

        # Back through the chunks: gradients of what was written, and of the state after each.
        pair = k.new_empty(L * N, 2 * C, dv)
        self._by_time(pair[:, C:]).copy_(self._chunks(o_gradient))
        o_gradient = pair[:, C:]
        written_gradient = torch.bmm(self.qk.transpose(1, 2), o_gradient)
        asked = torch.bmm((q * gamma).transpose(1, 2), o_gradient)
        ends = k.new_empty(L + 1, N, dk, dv)
        ends[L] = end_gradient
        steps = zip(
            ends[:-1].unbind(),
            ends[1:].unbind(),
            self._by_time(written_gradient).unbind(),
            self._by_time(asked).unbind(),
            self._by_time(self.erased.transpose(1, 2)).unbind(),
            self._by_time(self.keys_to_end).unbind(),
            self._by_time(gamma[:, -1:]).unbind(),
            strict=True,
        )
        for before, after, written, asked_here, erased, keys, gamma_end in reversed(list(steps)):
            written.baddbmm_(keys, after)
            torch.addcmul(asked_here, after, gamma_end, out=before)
            before.baddbmm_(erased, written)
        ends_flat = ends[1:].flatten(0, 1)

        # Through the solver: with Z = (I + A)^-T dU, dA = -Z U^T. Minus Z lies above dO.
        solved = torch.linalg.solve_triangular(
            self.system, written_gradient.transpose(1, 2),
            upper=False, left=False, unitriangular=True,
        ).transpose(1, 2)  # fmt: skip
        torch.neg(solved, out=pair[:, :C])
        self._put(solved * beta, v_gradient)
        beta_sum = (self._by_time(solved) * self.v).sum(-1).flatten(0, 1)

        # Through the products within a chunk.
        products = torch.bmm(pair, self.written.transpose(1, 2))
        system_gradient = products[:, :C].mul_(masks.earlier)
        beta_sum += (system_gradient * self.kk).sum(-1)
        system_gradient.mul_(beta)
        spans = torch.mul(system_gradient, self.kk).addcmul_(products[:, C:], self.qk)
        products.view(-1, 2, C, C).mul_(self.decay[:, None])
        kq_gradient = torch.bmm(products, k)
        kq_gradient[:, :C] += torch.bmm(products.transpose(1, 2), self.kq)

        # Through what was read of the state before the chunk, and written into the one after.
        reads = torch.bmm(pair, states.transpose(1, 2))
        read_sum = (reads * self.kq).sum(-1)
        beta_sum += read_sum[:, :C] * gamma[..., 0]
        gamma_log = torch.addcmul(read_sum[:, C:], read_sum[:, :C], beta[..., 0])
        gamma_log[:, -1] += (ends_flat * states).sum((1, 2))
        gamma_log *= gamma[..., 0]
        kq_gradient.addcmul_(reads, torch.cat([beta * gamma, gamma], 1))
        to_end = torch.bmm(self.written, ends_flat.transpose(1, 2))
        spans[:, -1] += (to_end * self.keys_to_end).sum(-1)
        kq_gradient[:, :C].addcmul_(to_end, self.last_decay)

        # Of alpha_i: all spans over it, s < i <= t, and all gammas from it on.
        over = torch.matmul(spans, masks.earlier.T).mul_(masks.not_later).sum(1)
        over += torch.matmul(gamma_log, masks.not_later)
        self._put(kq_gradient[:, :C], k_gradient)
        self._put(kq_gradient[:, C:], q_gradient)
        self._put(beta_sum[..., None], beta_gradient[..., None])
        self._put(over[..., None], alpha_gradient[..., None])
        alpha_gradient.div_(self.alpha)
        return ends[0].clone()


def exportable_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    start: torch.Tensor,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, h) as :func:`in_chunks`, of matrix products, for exporters; gradients by autograd.

    ``(I + A)^-1`` comes of its quarters: of a block whose halves X are inverted, the quarter below
    is ``-X A X``. That is as accurate as solving; powers of A are not, where keys repeat. Gates of
    0 compute as they should, but get no gradient here.
    """
    length = v.shape[1]
    missing = -length % chunk_size

    def ones(where: Callable[[int, int], bool]) -> torch.Tensor:
        # Numbers, not torch.tril: the exported program then holds them and computes nothing.
        tokens = range(chunk_size)
        rows = [[float(where(t, s)) for s in tokens] for t in tokens]
        return torch.tensor(rows, dtype=v.dtype, device=v.device)

    def below(side: int) -> torch.Tensor:
        """Of blocks of twice the side along the diagonal, the quarter below it."""
        return ones(lambda t, s: s // side % 2 == 0 and t // side == s // side + 1)

    not_later, earlier = ones(lambda t, s: s <= t), ones(lambda t, s: s < t)

    def chunks(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, 0, 0, missing)).unflatten(1, (-1, chunk_size))

    q, k, v, beta = chunks(q), chunks(k), chunks(v), chunks(beta[..., None])
    logs = chunks(_floored(alpha).log()[..., None]).transpose(2, 3)
    decay = torch.matmul(not_later * logs, earlier).exp() * not_later
    gamma = torch.matmul(logs, not_later.T).exp().transpose(2, 3)
    system = torch.matmul(k, k.transpose(2, 3)) * decay * beta
    inverse = ones(lambda t, s: s == t)
    for level in range(chunk_size.bit_length() - 1):
        quarter = system * below(2**level)
        inverse = inverse - torch.matmul(torch.matmul(inverse, quarter), inverse)
    written = torch.matmul(inverse, beta * v)
    erased = torch.matmul(inverse, beta * gamma * k)
    asked = q * gamma
    within = torch.matmul(q, k.transpose(2, 3)) * decay
    keys_to_end = (k * decay[:, :, -1, :, None]).transpose(2, 3)
    outputs = []
    for chunk in range(v.shape[1]):
        values = written[:, chunk] - torch.matmul(erased[:, chunk], start)
        outputs.append(
            torch.matmul(asked[:, chunk], start) + torch.matmul(within[:, chunk], values)
        )
        kept = gamma[:, chunk, -1:] * start
        start = kept + torch.matmul(keys_to_end[:, chunk], values)
    return torch.cat(outputs, 1)[:, :length], start

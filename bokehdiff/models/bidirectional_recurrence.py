"""The recurrent block of BokehFlow: four walks over the grid of tokens, and a memory that fades.

A token sees all others, in time linear in their number: the gated delta rule
(:mod:`bokehdiff.models.gated_delta_rule`) reads the rows from the first token to the last, and
back, and the columns likewise; what the four walks answer is weighed against each other.

Over a film, a block can also start from what the frame before left in its states: ``temporal``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F

from .gated_convolution import FilmScaleAndShift
from .gated_delta_rule import gated_delta_rule

__all__ = ["BidirectionalRecurrenceBlock", "BlockMemory", "GateFloors"]

DIRECTIONS = 4
"""Rows forwards, rows backwards, columns forwards, columns backwards."""

TOKENS_BETWEEN_STATES = 64
"""Of ``temporal="chunk"``: fixed, whatever chunks are computed in, for it changes the result."""

SHORTEST_KEY = 1e-3
"""Keys and queries much shorter than this are not stretched to length 1."""

Temporal = Literal["none", "final", "chunk"]


class BlockMemory(NamedTuple):
    """What a block remembers of a frame.

    mean_token: (B, C) mean of the tokens that came in.
    states: (1, 4, B, heads, dk, dv) at the end of every walk, or of every 64 tokens of it.
    """

    mean_token: torch.Tensor
    states: torch.Tensor


class GateFloors(nn.Module):
    """How much of its memory each block keeps at least, from one token to the next.

    ``sigmoid(a_l + lambda blur_share)`` with ``a_l = a_1 + softplus(delta_2) + .. +
    softplus(delta_l)``: later blocks remember longer, and all of them longer where much is blurred.

    Args:
        blocks: how many.
        half_lives: of each block, tokens after which half is left at the start of training; each
            longer than the one before.
        with_blur: whether the blur counts; lambda starts at 0.

    Raises:
        ValueError: half-lives that do not grow, or of another number.
    """

    def __init__(self, blocks: int, half_lives: Sequence[float], with_blur: bool) -> None:
        super().__init__()
        growing = all(a < b for a, b in zip(half_lives, half_lives[1:], strict=False))
        if len(half_lives) != blocks or not growing or min(half_lives, default=0) <= 0:
            raise ValueError(
                f"half_lives are {list(half_lives)}; wanted {blocks} numbers of tokens, one per "
                "block, each larger than the one before."
            )
        # alpha = 2^(-1/n), and its logit log(alpha / (1 - alpha)) = -log(2^(1/n) - 1).
        logits = [-math.log(math.expm1(math.log(2) / tokens)) for tokens in half_lives]
        steps = [b - a for a, b in zip(logits, logits[1:], strict=False)]
        self.first = nn.Parameter(torch.tensor(logits[0]))
        # The inverse of softplus.
        self.steps = nn.Parameter(torch.tensor([math.log(math.expm1(step)) for step in steps]))
        self.blur_weight = nn.Parameter(torch.zeros(())) if with_blur else None

    def forward(self, blur_share: torch.Tensor | None = None) -> list[torch.Tensor]:
        """The floor of each block, (B,) in (0, 1), not in half precision.

        Args:
            blur_share: (B,) mean radius of the circle of confusion over the largest, in [0, 1];
                None is 0 for one picture, and does not count without `with_blur`.
        """
        growth = F.softplus(in_full(self.steps)).cumsum(0)
        logits = in_full(self.first) + torch.cat([growth.new_zeros(1), growth])
        blur = logits.new_zeros(1) if blur_share is None else blur_share.to(logits)
        if self.blur_weight is None:
            blur = torch.zeros_like(blur)
        else:
            blur = in_full(self.blur_weight) * blur
        return list(torch.sigmoid(logits[:, None] + blur).unbind())


class BidirectionalRecurrenceBlock(nn.Module):
    """Mixes all tokens of a picture by four walks of a gated delta rule, then each with its eight
    neighbours.

    Per direction and head: q, k of length 1, v, ``beta = sigmoid(.)`` and ``alpha = alpha_min + (1
    - alpha_min) sigmoid(.)``, all linear in ``FiLM(norm(x))``; ``o`` from the gated delta rule.
    Then ``x <- x + linear(norm(sum_j g_j o_j))`` with ``g = softmax(W [o_1; o_2; o_3; o_4])`` per
    head, and ``x <- x + linear(GELU(conv(norm(x))))`` with a depthwise 3 x 3 convolution.

    Args:
        channels: C of the tokens; heads * value_channels.
        heads, key_channels, value_channels: of the recurrence.
        shared_projections: all directions share q, k, v and gates.
        chunk_size: of :func:`~bokehdiff.models.gated_delta_rule.gated_delta_rule`.
        temporal: what a frame leaves to the next one. ``"final"``: walks start at ``S + rho
            (S_prev - S)`` with S learned and S_prev the end of the same walk, one frame before.
            ``"chunk"``: after every 64 tokens the state is blended so with the one at the same
            place. ``rho = sigmoid(w [mean x_t, mean x_(t-1)] + b)``. ``"none"``: nothing.

    Raises:
        ValueError: numbers or options that do not fit.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        key_channels: int,
        value_channels: int,
        *,
        shared_projections: bool = False,
        chunk_size: int | Literal["auto"] = "auto",
        temporal: Temporal = "none",
    ) -> None:
        super().__init__()
        if channels != heads * value_channels:
            raise ValueError(
                f"channels is {channels}, but {heads} heads of {value_channels} values have "
                f"{heads * value_channels}; choose value_channels = channels / heads."
            )
        if temporal not in get_args(Temporal):
            raise ValueError(f"temporal is {temporal!r}; wanted one of {get_args(Temporal)}.")
        self.heads, self.key_channels, self.value_channels = heads, key_channels, value_channels
        self.projections = 1 if shared_projections else DIRECTIONS
        self.chunk_size, self.temporal = chunk_size, temporal
        per_head = 2 * key_channels + value_channels + 2
        self.mixing_norm = nn.LayerNorm(channels)
        self.project = nn.Linear(channels, self.projections * heads * per_head)
        self.direction_weights = nn.Linear(DIRECTIONS * value_channels, DIRECTIONS)
        self.answer_norm = nn.LayerNorm(channels)
        self.answer = nn.Linear(channels, channels)
        self.local_norm = nn.LayerNorm(channels)
        self.local_mixing = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.local_projection = nn.Conv2d(channels, channels, 1)
        if temporal != "none":
            self.carry = nn.Linear(2 * channels, 1)
        if temporal == "final":
            state = (DIRECTIONS, 1, heads, key_channels, value_channels)
            self.first_state = nn.Parameter(torch.zeros(state))

    def forward(
        self,
        x: torch.Tensor,
        film: FilmScaleAndShift | None,
        alpha_min: torch.Tensor,
        memory: BlockMemory | None = None,
    ) -> tuple[torch.Tensor, BlockMemory | None]:
        """(tokens, memory) from tokens (B, C, H, W) and what the frame before left.

        Args:
            x: (B, C, H, W).
            film: scale and shift (B, C, 1, 1) after the first norm.
            alpha_min: (B,) what the gates keep at least.
            memory: of the frame before; None for a first frame, and without `temporal`.

        Raises:
            ValueError: a memory of other sizes.
        """
        rows = x.permute(0, 2, 3, 1)
        y = self.mixing_norm(rows)
        if film is not None:
            scale, shift = (part.permute(0, 2, 3, 1) for part in film)
            y = y * (1 + scale) + shift
        q, k, v, alpha, beta = self._sequences(y, alpha_min)
        o, new_memory = self._walk(q, k, v, alpha, beta, x.mean((2, 3)), memory)
        rows = rows + self.answer(self.answer_norm(self._fused(o, rows)))
        z = self.local_norm(rows).permute(0, 3, 1, 2)
        x = rows.permute(0, 3, 1, 2)
        return x + self.local_projection(F.gelu(self.local_mixing(z))), new_memory

    def _sequences(self, y: torch.Tensor, alpha_min: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k, v (4 B heads, H W, d) and gates (4 B heads, H W), direction first, of (B, H, W, C).

        Gates are not in half precision: what is close to 1 could not be told apart there.
        """
        projected = self.project(y).unflatten(3, (self.projections, self.heads, -1))
        walks = []
        for direction in range(DIRECTIONS):
            walk = projected[..., direction % self.projections, :, :]
            walk = walk.transpose(1, 2) if direction >= 2 else walk
            walk = walk.flatten(1, 2).transpose(1, 2)
            walks.append(walk.flip(2) if direction % 2 else walk)
        sequences = torch.stack(walks)
        q, k, v, gates = sequences.split(
            [self.key_channels, self.key_channels, self.value_channels, 2], -1
        )
        alpha, beta = torch.sigmoid(in_full(gates)).unbind(-1)
        floor = alpha_min.to(alpha)[None, :, None, None]
        alpha = floor + (1 - floor) * alpha
        return tuple(part.flatten(0, 2) for part in (unit(q), unit(k), v, alpha, beta))

    def _fused(self, o: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C): the answers (4 B heads, H W, dv) back on the grid, weighed."""
        batch, height, width, _ = rows.shape
        walks = o.unflatten(0, (DIRECTIONS, batch, self.heads)).transpose(2, 3)
        on_grid = []
        for direction, walk in enumerate(walks.unbind()):
            walk = walk.flip(1) if direction % 2 else walk
            if direction >= 2:
                on_grid.append(walk.unflatten(1, (width, height)).transpose(1, 2))
            else:
                on_grid.append(walk.unflatten(1, (height, width)))
        answers = torch.stack(on_grid, -2)
        weights = torch.softmax(self.direction_weights(answers.flatten(-2)), -1)
        return (weights[..., None] * answers).sum(-2).flatten(-2)

    def _walk(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        alpha: torch.Tensor,
        beta: torch.Tensor,
        mean_token: torch.Tensor,
        memory: BlockMemory | None,
    ) -> tuple[torch.Tensor, BlockMemory | None]:
        """The answers, and what the next frame needs of this one."""
        if self.temporal == "none":
            return gated_delta_rule(q, k, v, alpha, beta, chunk_size=self.chunk_size)[0], None
        batch, length = mean_token.shape[0], q.shape[1]
        step = length if self.temporal == "final" else TOKENS_BETWEEN_STATES
        begins = range(0, length, step)
        state = (DIRECTIONS, batch, self.heads, self.key_channels, self.value_channels)
        last, rho = None, None
        if memory is not None:
            if memory.states.shape != (len(begins), *state):
                raise ValueError(
                    f"The memory holds states {tuple(memory.states.shape)}, these tokens need "
                    f"{(len(begins), *state)}; begin a new film with memory=None."
                )
            last = in_full(memory.states)
            both = torch.cat([mean_token, memory.mean_token.to(mean_token)], 1)
            rho = torch.sigmoid(in_full(self.carry(both)))[None, :, :, None, None]

        start = None
        if self.temporal == "final":
            start = in_full(self.first_state).expand(state)
            if last is not None and rho is not None:
                start = start + rho * (last[0] - start)
        answers, states = [], []
        for number, begin in enumerate(begins):
            part = slice(begin, begin + step)
            o, h = gated_delta_rule(
                q[:, part], k[:, part], v[:, part], alpha[:, part], beta[:, part],
                None if start is None else start.flatten(0, 2),
                chunk_size=self.chunk_size,
            )  # fmt: skip
            start = h.unflatten(0, state[:3])
            if self.temporal == "chunk" and last is not None and rho is not None:
                start = start + rho * (last[number] - start)
            answers.append(o)
            states.append(start)
        return torch.cat(answers, 1), BlockMemory(mean_token, torch.stack(states))


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors (..., d) of length 1, and shorter where there is hardly anything to stretch."""
    wide = in_full(vectors)
    length = wide.square().sum(-1, keepdim=True) + SHORTEST_KEY**2
    return (wide * torch.rsqrt(length)).to(vectors.dtype)


def in_full(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or in float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

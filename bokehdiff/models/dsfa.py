"""Divided space-focus attention (DSFA): features of a sharp picture, refined by a bokeh stack.

A bokeh stack is one photograph with several strengths of defocus. A vision transformer describes
the sharp picture and every frame by tokens, one for each patch. :class:`DSFABlock` lets the tokens
look at each other first inside a frame (space), then at the same place across frames (focus), and
returns those of the sharp picture; :class:`DSFAEncoder` does so at several depths of a transformer.

With x_f the tokens of frame f, frame 0 being the sharp picture, K_f the strength of its blur in
pixels of radius per 1/metre divided by ``largest_strength``, and K_0 = 0 (BokehDepth,
arXiv:2512.12425)::

    t_f       = W_b relu(W_a K_f + b_a) + b_b
    [t_f x_f] = tokens after self-attention inside the frame and an MLP, each times a gate
    (g, s)_f  = W_film t_f + b_film                              (t_f as it was at first)
    x_f       = x_f (1 + tanh g_f) + s_f
    x_0       = tokens after attention across frames, and an MLP, each times a gate

The logits of the attention across frames have the bias ``-alibi_scale |K_i - K_j|``.

**Strength and bias.** With the published ``largest_strength = 1`` and K = 10, 20, 30, the sharp
picture gives the frames weights of e^-10 and less: it does not see the stack, and the depth does
not depend on it. ``largest_strength = 30``, the largest K that stacks are made with, keeps the
bias between 0 and ``-alibi_scale``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ATTENTION_SCALES", "DSFABlock", "DSFAEncoder", "check_strengths"]

ATTENTION_SCALES = ("single", "double")
"""Factors of the logits of attention: "single" is 1/sqrt(d), d being the width of a head; "double"
is 1/d, the scale applied twice, as in the code that the published weights were trained with."""

LAYER_NORM_EPSILON = 1e-5


def check_strengths(K: Tensor, batch: int, frames: int) -> Tensor:
    """The strengths as (batch, frames), if they are strengths of so many frames.

    Args:
        K: (batch, frames) or (batch, frames, 1), in pixels of blur radius per 1/metre.
        batch: pictures.
        frames: of the stack of each of them, without the sharp picture.

    Raises:
        ValueError: another number of strengths, or one that is negative, infinite or not a number.
    """
    if K.shape == (batch, frames, 1):
        K = K.squeeze(-1)
    if K.shape != (batch, frames):
        raise ValueError(
            f"K has the shape {tuple(K.shape)}; wanted ({batch}, {frames}): one strength for each "
            f"frame of the stack, without the sharp picture, whose strength is 0."
        )
    # What a compiled graph or the meta device holds has no values to look at.
    if not (K.is_meta or torch.compiler.is_compiling()):
        if not bool((torch.isfinite(K) & (K >= 0)).all()):
            raise ValueError(
                f"K is {K.tolist()}; wanted finite strengths of 0 or more, in pixels of blur "
                "radius per 1/metre."
            )
    return K


class DSFABlock(nn.Module):
    """Tokens of a sharp picture, refined by those of the frames of its bokeh stack.

    The parameters carry the names of the published checkpoints, of which those of UniDepthV2 hold
    blocks as they are here.

    Args:
        width: D, channels of a token.
        num_heads: of both attentions; divides the width.
        mlp_ratio: channels inside the two MLPs, over the width.
        space_attention_scale: of the logits inside a frame, see :data:`ATTENTION_SCALES`. Those
            across frames are always "single". The published weights want "double".
        alibi_scale: of the bias by which frames of other strengths are seen less; 0 or more.
        learn_alibi_scale: make it a parameter, which starts there and stays above 0.
        largest_strength: what K is divided by before anything else; 1 takes it as it is.
        initial_gate: of what attentions and MLPs add, at the start. With 0 the shift and scale by
            strength start at zero as well, so that a fresh block returns what it is given.
    """

    def __init__(
        self,
        width: int,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        *,
        space_attention_scale: str = "single",
        alibi_scale: float = 1.0,
        learn_alibi_scale: bool = False,
        largest_strength: float = 1.0,
        initial_gate: float = 0.1,
    ) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads or width % 4:
            raise ValueError(
                f"width is {width} and num_heads {num_heads}; the width must be a multiple of 4 "
                "and of the number of heads."
            )
        if space_attention_scale not in ATTENTION_SCALES:
            raise ValueError(
                f"space_attention_scale is {space_attention_scale!r}; wanted one of "
                f"{ATTENTION_SCALES}."
            )
        if not (math.isfinite(alibi_scale) and alibi_scale >= 0):
            raise ValueError(f"alibi_scale is {alibi_scale}; wanted a finite number of 0 or more.")
        if learn_alibi_scale and alibi_scale == 0:
            raise ValueError(
                "alibi_scale is 0 and cannot be learned from there, since what is learned is its "
                "logarithm. Start from a number above 0, or do not learn it."
            )
        if not (math.isfinite(largest_strength) and largest_strength > 0):
            raise ValueError(
                f"largest_strength is {largest_strength}; wanted a finite number above 0."
            )
        self.width = width
        self.largest_strength = largest_strength
        self.initial_gate = initial_gate
        self.initial_alibi_scale = alibi_scale

        hidden = int(width * mlp_ratio)
        self.k_embed = nn.Sequential(
            nn.Linear(1, width // 4), nn.ReLU(), nn.Linear(width // 4, width)
        )
        self.focus_film = nn.Linear(width, 2 * width)
        scale = (width // num_heads) ** (-1.0 if space_attention_scale == "double" else -0.5)
        self.ln_space_attn = nn.LayerNorm(width, eps=LAYER_NORM_EPSILON)
        self.space_attn = _Attention(width, num_heads, scale)
        self.ln_space_ffn = nn.LayerNorm(width, eps=LAYER_NORM_EPSILON)
        self.space_ffn = _FeedForward(width, hidden)
        self.ln_focus_attn = nn.LayerNorm(width, eps=LAYER_NORM_EPSILON)
        self.focus_attn = _Attention(width, num_heads, (width // num_heads) ** -0.5)
        self.ln_focus_ffn = nn.LayerNorm(width, eps=LAYER_NORM_EPSILON)
        self.focus_ffn = _FeedForward(width, hidden)
        self.gamma_space_attn = nn.Parameter(torch.empty(width))
        self.gamma_space_ffn = nn.Parameter(torch.empty(width))
        self.gamma_focus_attn = nn.Parameter(torch.empty(width))
        self.gamma_focus_ffn = nn.Parameter(torch.empty(width))
        self.log_alibi_scale = nn.Parameter(torch.empty(1)) if learn_alibi_scale else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts all parameters afresh."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                module.reset_parameters()
        for gate in (
            self.gamma_space_attn,
            self.gamma_space_ffn,
            self.gamma_focus_attn,
            self.gamma_focus_ffn,
        ):
            nn.init.constant_(gate, self.initial_gate)
        if self.initial_gate == 0:
            nn.init.zeros_(self.focus_film.weight)
            nn.init.zeros_(self.focus_film.bias)
        if self.log_alibi_scale is not None:
            nn.init.constant_(self.log_alibi_scale, math.log(self.initial_alibi_scale))

    @property
    def alibi_scale(self) -> Tensor | float:
        """Scale of the bias for K divided by ``largest_strength``; a (1,) tensor if learned."""
        if self.log_alibi_scale is None:
            return self.initial_alibi_scale
        return self.log_alibi_scale.exp()

    def forward(self, reference: Tensor, stack: Tensor, K: Tensor | None = None) -> Tensor:
        """The refined tokens of the sharp picture, (B, P, D).

        Args:
            reference: (B, P, D), tokens of the patches of the sharp picture.
            stack: (B, N, P, D), those of the N frames; without any the reference comes back.
            K: (B, N) or (B, N, 1), strength of the blur of each frame in pixels of radius, of the
                picture that the tokens were made of, per 1/metre. None is 0 for all frames.

        Raises:
            ValueError: shapes that do not go together, or strengths that are none.
        """
        if reference.ndim != 3 or reference.shape[-1] != self.width:
            raise ValueError(
                f"reference has the shape {tuple(reference.shape)}; wanted (B, P, {self.width})."
            )
        batch, patches, width = reference.shape
        if stack.ndim != 4 or stack.shape != (batch, stack.shape[1], patches, width):
            raise ValueError(
                f"stack has the shape {tuple(stack.shape)}; wanted ({batch}, N, {patches}, "
                f"{width}): as many tokens in each frame as in the sharp picture."
            )
        count = stack.shape[1]
        if K is None:
            K = reference.new_zeros(batch, count)
        strengths = self.strengths(check_strengths(K, batch, count), reference)
        if count == 0:
            return reference
        frames = torch.cat([reference.unsqueeze(1), stack], 1)
        tokens = self.strength_tokens(strengths, reference)
        frames = self.attend_space(frames, tokens)
        frames = self.modulate(frames, tokens)
        # Nothing is asked of the other frames after this, so only the sharp picture looks.
        return self.attend_focus(frames[:, :1], frames, strengths[:, :1], strengths).squeeze(1)

    def strengths(self, K: Tensor, reference: Tensor) -> Tensor:
        """K (B, N) over ``largest_strength``, after 0 for the sharp picture: (B, F), F = N + 1.

        In float32 at least: half precision would round differences of large strengths away.
        """
        K = K.to(reference.device, torch.promote_types(reference.dtype, torch.float32))
        return F.pad(K / self.largest_strength, (1, 0))

    def strength_tokens(self, strengths: Tensor, reference: Tensor) -> Tensor:
        """The token t of each frame, (B, F, D), for strengths (B, F)."""
        tokens: Tensor = self.k_embed(strengths.unsqueeze(-1).to(reference.dtype))
        return tokens

    def attend_space(self, frames: Tensor, tokens: Tensor) -> Tensor:
        """Frames (B, F, P, D) after attention of each to itself and to its token (B, F, D)."""
        sequence = torch.cat([tokens.unsqueeze(2), frames], 2).flatten(0, 1)
        sequence = sequence + self.gamma_space_attn * self.space_attn(self.ln_space_attn(sequence))
        sequence = sequence + self.gamma_space_ffn * self.space_ffn(self.ln_space_ffn(sequence))
        return sequence[:, 1:].unflatten(0, frames.shape[:2])

    def film(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What tokens (B, F, D) of strengths make of features: scale, before tanh, and shift."""
        scale, shift = self.focus_film(tokens).chunk(2, -1)
        return scale, shift

    def modulate(self, frames: Tensor, tokens: Tensor) -> Tensor:
        """Frames (B, F, P, D), each scaled and shifted by what its strength says."""
        scale, shift = self.film(tokens)
        return frames * (1 + torch.tanh(scale)).unsqueeze(2) + shift.unsqueeze(2)

    def attend_focus(
        self, looking: Tensor, frames: Tensor, looking_strengths: Tensor, strengths: Tensor
    ) -> Tensor:
        """Frames that look (B, L, P, D), after attention to all frames (B, F, P, D) at each place.

        Args:
            looking: some of the frames, or all.
            frames: those looked at.
            looking_strengths, strengths: (B, L) and (B, F), theirs.
        """
        difference = (looking_strengths.unsqueeze(2) - strengths.unsqueeze(1)).abs()
        bias = -self.alibi_scale * difference
        # One sequence of frames for each place; the bias is the same in all heads and places.
        x, seen = looking.transpose(1, 2), frames.transpose(1, 2)
        x = x + self.gamma_focus_attn * self.focus_attn(
            self.ln_focus_attn(x), self.ln_focus_attn(seen), bias[:, None, None]
        )
        x = x + self.gamma_focus_ffn * self.focus_ffn(self.ln_focus_ffn(x))
        return x.transpose(1, 2)


class _Attention(nn.Module):
    """Multi-head attention, queries, keys and values of one projection in this order."""

    def __init__(self, width: int, num_heads: int, scale: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = scale
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, seen: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """x (..., L, D) after attention to ``seen`` (..., F, D), by default to itself.

        The bias is added to the logits and broadcasts to (..., heads, L, F).
        """
        if seen is None:
            query, key, value = self.qkv(x).chunk(3, -1)
        else:
            width = x.shape[-1]
            query = F.linear(x, self.qkv.weight[:width], self.qkv.bias[:width])
            key, value = F.linear(seen, self.qkv.weight[width:], self.qkv.bias[width:]).chunk(2, -1)
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
            for part in (query, key, value)
        )
        # Across frames this has five axes, with which torch takes plain products: a sequence has a
        # few frames, too short for a fused kernel to gain, and there is one for each place.
        if bias is not None:
            bias = bias.to(query.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value, bias, scale=self.scale)
        return cast(Tensor, self.out_proj(mixed.transpose(-3, -2).flatten(-2)))


class _FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x))))


class DSFAEncoder(nn.Module):
    """Features of a sharp picture, refined by those of its stack at chosen levels of a transformer.

    For any vision transformer that gives features of some of its layers.

    Args:
        width: D, channels of the features.
        levels: indices of the lists of features, of those to refine.
        num_heads, options: of the :class:`DSFABlock` of each level.
    """

    def __init__(
        self, width: int, levels: Sequence[int], num_heads: int = 8, **options: Any
    ) -> None:
        super().__init__()
        if not levels or sorted(set(levels)) != sorted(levels) or min(levels) < 0:
            raise ValueError(
                f"levels are {list(levels)}; wanted different indices of 0 or more, at least one."
            )
        self.blocks = nn.ModuleDict(
            {str(level): DSFABlock(width, num_heads, **options) for level in sorted(levels)}
        )

    @property
    def levels(self) -> list[int]:
        """Indices of the features that are refined, ascending."""
        return [int(level) for level in self.blocks]

    def block(self, level: int) -> DSFABlock:
        """The block that refines a level."""
        return cast(DSFABlock, self.blocks[str(level)])

    def forward(
        self, reference: Sequence[Tensor], stack: Sequence[Tensor], K: Tensor | None = None
    ) -> list[Tensor]:
        """All the features of the sharp picture, those of the chosen levels refined.

        Args:
            reference: for each level (B, P, D) or (B, h, w, D), without class tokens.
            stack: for each level (B, N, P, D) or (B, N, h, w, D).
            K: (B, N) or (B, N, 1), see :class:`DSFABlock`.

        Raises:
            ValueError: lists that lack a level, or tensors that do not go together.
        """
        if len(reference) != len(stack) or len(reference) <= self.levels[-1]:
            raise ValueError(
                f"There are {len(reference)} levels of features of the picture and {len(stack)} of "
                f"the stack; wanted equally many, with those that are refined, {self.levels}."
            )
        refined = list(reference)
        for level in self.levels:
            picture, frames = reference[level], stack[level]
            if picture.ndim not in (3, 4) or frames.shape[2:] != picture.shape[1:]:
                raise ValueError(
                    f"Features of level {level} have the shapes {tuple(picture.shape)} and "
                    f"{tuple(frames.shape)} in the stack; wanted (B, P, D) and (B, N, P, D), or "
                    "(B, h, w, D) and (B, N, h, w, D)."
                )
            tokens = self.block(level)(picture.flatten(1, -2), frames.flatten(2, -2), K)
            refined[level] = tokens.reshape(picture.shape)
        return refined

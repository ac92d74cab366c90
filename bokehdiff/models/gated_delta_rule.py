"""The gated delta rule: a memory that writes what it did not expect, and fades.

A sequence of T tokens is read in order into a state ``h`` (dk, dv), a linear map from keys to
values. Token t lets the state fade by ``alpha_t``, replaces the share ``beta_t`` of what stands
under its key by its value, and asks the state with its query:

    h_t = alpha_t (I - beta_t k_t k_t^T) h_(t-1) + beta_t k_t v_t^T        o_t = h_t^T q_t

:func:`gated_delta_rule_reference` is these equations, and what all else is tested against.
:func:`gated_delta_rule` computes the same in chunks of tokens, with matrix products within a chunk
and steps from chunk to chunk only: :mod:`bokehdiff.models.gated_delta_chunks`.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

from .gated_delta_chunks import exportable_chunks, in_chunks

__all__ = ["Backend", "gated_delta_rule", "gated_delta_rule_reference"]

Backend = Literal["auto", "torch", "exportable", "fla"]

CHUNK_ON_CPU, CHUNK_ELSEWHERE = 16, 64
"""Tokens of a chunk; on the CPU the work within a chunk weighs more than the steps between."""

TOKENS_AT_ONCE_ON_CPU = 4096
"""Tokens, of all sequences together, whose tables fit the cache of a processor."""

SEGMENT_ELSEWHERE = 2048


def gated_delta_rule_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, h) token by token, in the precision of the inputs: the specification.

    Arguments, results and errors as of :func:`gated_delta_rule`.
    """
    _check(q, k, v, alpha, beta, start)
    h = k.new_zeros(k.shape[0], k.shape[2], v.shape[2]) if start is None else start
    outputs = []
    for t in range(k.shape[1]):
        fade, share = alpha[:, t, None, None], beta[:, t, None, None]
        expected = torch.einsum("nk,nkv->nv", k[:, t], h)
        h = fade * (h - share * torch.einsum("nk,nv->nkv", k[:, t], expected))
        h = h + share * torch.einsum("nk,nv->nkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("nk,nkv->nv", q[:, t], h))
    return torch.stack(outputs, 1), h


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    start: torch.Tensor | None = None,
    *,
    chunk_size: int | Literal["auto"] = "auto",
    segment: int | Literal["auto"] = "auto",
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, h): what N sequences answer, (N, T, dv), and their states at the end, (N, dk, dv).

    Computed in float32, or in float64 if anything comes in float64, autocast or not; ``o`` comes
    back in the dtype of v, ``h`` as it was computed. Time and memory are linear in T. Gradients
    keep no more than the inputs and one state per segment; what is within is computed again.

    Args:
        q, k: (N, T, dk) queries and keys. The rule is stable for keys no longer than 1.
        v: (N, T, dv) values.
        alpha: (N, T) in [0, 1], what is left of the state after one token.
        beta: (N, T) in [0, 1], the share that is replaced.
        start: (N, dk, dv) state before the first token; None is 0. The end of one call may start
            the next.
        chunk_size: C, a power of two; "auto" is 16 on the CPU, else 64.
        segment: tokens of each sequence that are worked on at a time, rounded up to whole chunks:
            less memory for more steps, the same result. "auto" fits the cache of a processor, and
            is 2048 elsewhere.
        backend: ``"torch"``; ``"exportable"``, the same of matrix products, with constant masks
            and without a solver, for torch.export; ``"fla"``, the kernels of
            flash-linear-attention (CUDA alone, products in TF32 at best); or ``"auto"``:
            exportable while torch exports, fla where it is installed and values come in half
            precision, else torch.

    Raises:
        ValueError: shapes, sizes or a backend that do not fit.
        ImportError: fla was asked for and is not installed.
    """
    _check(q, k, v, alpha, beta, start)
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; wanted one of {get_args(Backend)}.")
    if backend == "auto":
        backend = _chosen_backend(v)
    with torch.autocast(v.device.type, enabled=False):
        if backend == "fla":
            from .gated_delta_fla import gated_delta_rule_fla

            return gated_delta_rule_fla(q, k, v, alpha, beta, start)
        chunk_size = _chunk_size(chunk_size, backend, v)
        dtype = torch.float32
        if any(x is not None and x.dtype == torch.float64 for x in (q, k, v, alpha, beta, start)):
            dtype = torch.float64
        if start is None:
            start = v.new_zeros(v.shape[0], k.shape[2], v.shape[2])
        q, k, wide_v, alpha, beta, start = (x.to(dtype) for x in (q, k, v, alpha, beta, start))
        if backend == "exportable":
            o, h = exportable_chunks(q, k, wide_v, alpha, beta, start, chunk_size)
        else:
            at_once = _segment(segment, chunk_size, v)
            o, h = in_chunks(q, k, wide_v, alpha, beta, start, chunk_size, at_once)
        return o.to(v.dtype), h


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    start: torch.Tensor | None,
) -> None:
    """Raises ValueError unless the shapes belong together."""
    if k.dim() != 3 or v.dim() != 3 or k.shape[:2] != v.shape[:2] or k.shape[1] == 0:
        raise ValueError(
            f"k is {tuple(k.shape)} and v {tuple(v.shape)}; wanted (N, T, dk) and (N, T, dv), the "
            "same N sequences of the same T tokens, at least one."
        )
    state = (k.shape[0], k.shape[2], v.shape[2])
    for name, tensor, wanted in (
        ("q", q, k.shape),
        ("alpha", alpha, k.shape[:2]),
        ("beta", beta, k.shape[:2]),
        ("start", start, state),
    ):
        if tensor is not None and tensor.shape != wanted:
            raise ValueError(f"{name} is {tuple(tensor.shape)}; wanted {tuple(wanted)} beside k.")


def _chosen_backend(v: torch.Tensor) -> Backend:
    if torch.compiler.is_exporting():
        return "exportable"
    if v.is_cuda and v.dtype in (torch.float16, torch.bfloat16):
        from .gated_delta_fla import fla_is_installed

        if fla_is_installed():
            return "fla"
    return "torch"


def _chunk_size(chunk_size: int | str, backend: Backend, v: torch.Tensor) -> int:
    if chunk_size == "auto":
        on_cpu = backend == "torch" and v.device.type == "cpu"
        return CHUNK_ON_CPU if on_cpu else CHUNK_ELSEWHERE
    if not isinstance(chunk_size, int) or chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(
            f'chunk_size is {chunk_size!r}; wanted a power of two, for instance 16, or "auto".'
        )
    return chunk_size


def _segment(segment: int | str, chunk_size: int, v: torch.Tensor) -> int:
    if segment == "auto":
        at_once = SEGMENT_ELSEWHERE
        if v.device.type == "cpu":
            at_once = TOKENS_AT_ONCE_ON_CPU // max(v.shape[0], 1)
        return max(at_once // chunk_size, 4) * chunk_size
    if not isinstance(segment, int) or segment < 1:
        raise ValueError(f'segment is {segment!r}; wanted tokens, for instance 2048, or "auto".')
    return math.ceil(segment / chunk_size) * chunk_size

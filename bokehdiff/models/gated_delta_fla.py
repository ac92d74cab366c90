"""The gated delta rule by the Triton kernels of flash-linear-attention, on NVIDIA GPUs."""

from __future__ import annotations

import importlib.util

import torch

__all__ = ["fla_is_installed", "gated_delta_rule_fla"]


def fla_is_installed() -> bool:
    """Whether flash-linear-attention can be imported."""
    return importlib.util.find_spec("fla") is not None


def gated_delta_rule_fla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, h) as of :func:`~bokehdiff.models.gated_delta_rule.gated_delta_rule`, in TF32 at best.

    Raises:
        ValueError: tensors that are not on a CUDA device, or are float64.
        ImportError: flash-linear-attention is not installed.
    """
    if not v.is_cuda or v.dtype == torch.float64:
        raise ValueError(
            f'v is {v.dtype} on {v.device}; backend="fla" computes in single or half precision on '
            'a CUDA device. Take backend="torch" here.'
        )
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError as problem:
        raise ImportError(
            'backend="fla" needs flash-linear-attention: pip install "bokehdiff[fla]".'
        ) from problem
    # N sequences of one head each. Left alone, fla would scale queries by dk^-0.5. Its state is
    # (N, heads, dk, dv) as ours is.
    o, h = chunk_gated_delta_rule(
        *(tensor.to(v.dtype)[:, :, None].contiguous() for tensor in (q, k, v)),
        g=alpha.float().clamp_min(torch.finfo(torch.float32).tiny).log()[:, :, None],
        beta=beta.to(v.dtype)[:, :, None].contiguous(),
        scale=1.0,
        initial_state=None if start is None else start.float()[:, None].contiguous(),
        output_final_state=True,
    )
    return o[:, :, 0], h[:, 0]

"""PISA, dense and plain: the specification that every other backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import PisaGeometry


def pisa_weights_reference(q: Tensor, k: Tensor, geometry: PisaGeometry, scale: float) -> Tensor:
    """Return A^(QC) (B, H, N queries, N keys), Eq. 5-6: every key's column sums to one.

    The soft mask is added as a logarithm, so that one softmax does all and nothing underflows.
    """
    scores = scale * q @ k.transpose(-1, -2)
    logits = scores + geometry.log_soft_mask(q.dtype)[:, None]
    if geometry.lens_parts > 1:
        number = torch.arange(geometry.token_count, device=q.device)
        shares = geometry.log_lens_shares(number, number[:, None], q.dtype)
        logits = logits + shares.repeat(q.shape[1] // geometry.lens_parts, 1, 1)
    return torch.softmax(logits, dim=-2)


def pisa_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: PisaGeometry,
    scale: float,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return (B, H, N, dv), Eq. 9: light that is stopped on its way is lost."""
    weights = pisa_weights_reference(q, k, geometry, scale)
    weights = weights * geometry.visibility(q.dtype)[:, None]
    if dropout:
        generator = generator or torch.Generator().manual_seed(geometry.config.seed)
        kept = torch.rand(weights.shape, generator=generator, device=generator.device) >= dropout
        weights = weights * kept.to(weights.device) / (1 - dropout)
    return weights @ v

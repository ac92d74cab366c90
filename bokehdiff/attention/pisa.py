"""PISA: self-attention in which light spreads from each token over its circle of confusion."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .geometry import PisaGeometry
from .local import pair_share, pisa_attention_local, supports
from .reference import pisa_attention_reference

Backend = Literal["auto", "reference", "local"]


def pisa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: PisaGeometry,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the light that arrives at each token, (B, H, N, dv) in the dtype of `v`.

    Every key distributes its value over the queries inside its circle of confusion, with weights
    that sum to one (softmax over the *queries*, Eq. 5-6); what is hidden from a query is lost to it
    (Eq. 9). Without occlusion the sum of the output over the tokens equals that of `v`.

    Args:
        q, k: (B, H, N, d), tokens row-major on the grid of `geometry`.
        v: (B, H, N, dv).
        geometry: of B images, or of one that serves all.
        scale: factor of q k^T, by default 1 / sqrt(d).
        backend: `reference` is dense, of order N^2; `local` is exact too, and of order N times the
            area of the circles; `auto` takes `local` unless circles fill the image.
        dropout: probability of dropping a weight after the softmax; dense backend only.
        generator: random numbers for the dropout; None takes the seed of the geometry's config.

    Half precision is computed in float32, float64 in float64. Gradients reach q, k, v and, where
    it asks for them, the radius of the geometry.

    Raises:
        ValueError: when shapes do not agree, or the backend cannot do what the geometry asks.
    """
    _check_shapes(q, k, v, geometry)
    if backend not in ("auto", "reference", "local"):
        raise ValueError(f"backend must be 'auto', 'reference' or 'local', got {backend!r}.")
    if backend == "auto":
        backend = "reference" if dropout else choose_backend(geometry)
    if dropout and backend != "reference":
        raise ValueError(f"dropout={dropout} needs backend='reference', got {backend!r}.")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    dtype = torch.promote_types(torch.promote_types(q.dtype, v.dtype), torch.float32)
    q, k, values = q.to(dtype), k.to(dtype), v.to(dtype)
    with torch.autocast(q.device.type, enabled=False):
        if backend == "local":
            out = pisa_attention_local(q, k, values, geometry, scale)
        else:
            out = pisa_attention_reference(q, k, values, geometry, scale, dropout, generator)
    return out.to(v.dtype)


def choose_backend(geometry: PisaGeometry) -> Backend:
    """Return the backend that `auto` takes."""
    if not supports(geometry):
        return "reference"
    # Dense tables of more tokens than this would not fit in memory.
    if geometry.token_count <= 4096 and pair_share(geometry) > 0.5:
        return "reference"
    return "local"


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, geometry: PisaGeometry) -> None:
    for name, value in (("q", q), ("k", k), ("v", v)):
        if value.ndim != 4:
            raise ValueError(
                f"{name} must have shape (batch, heads, tokens, channels), got "
                f"{tuple(value.shape)}."
            )
    if q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise ValueError(
            "PISA is self-attention: q and k must have one shape and v the same batch, heads and "
            f"tokens; got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}."
        )
    if q.shape[2] != geometry.token_count:
        raise ValueError(
            f"q has {q.shape[2]} tokens but the geometry is {geometry.height} x {geometry.width} = "
            f"{geometry.token_count}; build the geometry for this layer's grid."
        )
    if geometry.batch not in (1, q.shape[0]):
        raise ValueError(
            f"q has batch {q.shape[0]} but the geometry was built for {geometry.batch} images."
        )

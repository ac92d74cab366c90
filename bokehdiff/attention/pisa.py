"""PISA: self-attention in which light spreads from each token over its circle of confusion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import Backend, choose_backend, gradient_kernels, kernels, refusal
from .geometry import PisaGeometry
from .reference import pisa_attention_reference

NATIVE_PRECISION = ("triton", "flex")
"""Backends that take half precision as it is and compute in float32 inside."""


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
        geometry: of B images, of one that serves all, or of a part of B images that follow one
            another several times, as classifier-free guidance stacks them.
        scale: factor of q k^T, by default 1 / sqrt(d).
        backend: all compute the same. `reference` is dense, of order N^2; `stream` too, in memory
            of order N; `local` is of order N times the area of the circles; `flex` and `triton`
            are the same on a GPU; `auto` takes what `explain(geometry)` names.
        dropout: probability of dropping a weight after the softmax; backend `reference` only.
        generator: random numbers for the dropout; None takes the seed of the geometry's config.

    Scores, masks and softmax are computed in float32 for half precision, in float64 for float64.
    Gradients reach q, k, v and, where it asks for them, the radius of the geometry; they can be
    taken once.

    Raises:
        ValueError: when shapes do not agree, or the backend cannot do what the geometry asks.
    """
    _check_shapes(q, k, v, geometry)
    batch = q.shape[0]
    q, k, v = (_repeats_as_heads(value, geometry) for value in (q, k, v))
    if backend == "auto":
        backend = "reference" if dropout else choose_backend(geometry, q, v).backend
    reason = refusal(backend, geometry, q, v)
    if reason:
        raise ValueError(f"backend={backend!r} cannot compute this: {reason}")
    if dropout and backend != "reference":
        raise ValueError(f"dropout={dropout} needs backend='reference', got {backend!r}.")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    dtype = v.dtype
    q, k, v = _working_precision(backend, q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        if backend == "reference":
            out = pisa_attention_reference(q, k, v, geometry, scale, dropout, generator)
        else:
            out, _ = _Attention.apply(q, k, v, geometry.radius, geometry, scale, backend)
    return _heads_as_repeats(out.to(dtype), batch)


def pisa_attention_gradients(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: PisaGeometry,
    scale: float,
    backend: Backend,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, given that of what `pisa_attention` returns."""
    batch = q.shape[0]
    grad_out, q, k, v = (_repeats_as_heads(value, geometry) for value in (grad_out, q, k, v))
    if backend == "auto":
        backend = choose_backend(geometry, q, v).backend
    dtypes = [value.dtype for value in (q, k, v)]
    q, k, v = _working_precision(backend, q, k, v)
    if backend == "reference":
        with torch.autocast(q.device.type, enabled=False):
            pull_back = torch.func.vjp(
                lambda q, k, v: pisa_attention_reference(q, k, v, geometry, scale), q, k, v
            )[1]
            grad_q, grad_k, grad_v = pull_back(grad_out.to(v.dtype))
    else:
        grad_q, grad_k, grad_v, _ = _gradients(
            grad_out, q, k, v, None, geometry, scale, backend, False
        )
    grad_q, grad_k, grad_v = (
        _heads_as_repeats(gradient.to(dtype), batch)
        for gradient, dtype in zip((grad_q, grad_k, grad_v), dtypes, strict=True)
    )
    return grad_q, grad_k, grad_v


def _repeats_as_heads(value: Tensor, geometry: PisaGeometry) -> Tensor:
    """Return (images, heads, ...): a batch that repeats its images has only more heads."""
    if geometry.batch in (1, value.shape[0]):
        return value
    return value.unflatten(0, (-1, geometry.batch)).transpose(0, 1).flatten(1, 2)


def _heads_as_repeats(value: Tensor, batch: int) -> Tensor:
    """Return (batch, heads, ...), the reverse of `_repeats_as_heads`."""
    if value.shape[0] == batch:
        return value
    return value.unflatten(1, (batch // value.shape[0], -1)).transpose(0, 1).flatten(0, 1)


def _working_precision(
    backend: str, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v as the backend takes them."""
    if backend in NATIVE_PRECISION:
        return q, k, v
    dtype = torch.promote_types(torch.promote_types(q.dtype, v.dtype), torch.float32)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _gradients(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_normaliser: Tensor | None,
    geometry: PisaGeometry,
    scale: float,
    backend: str,
    wants_radius: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k, v and the radius from the kernels that have them."""
    kernel = gradient_kernels(backend)
    q, k, v = _working_precision(kernel, q, k, v)
    if kernel not in NATIVE_PRECISION:
        grad_out = grad_out.to(v.dtype)
    # Backward passes may run inside an autocast that the forward pass had switched off.
    with torch.autocast(q.device.type, enabled=False):
        gradients: tuple[Tensor, Tensor, Tensor, Tensor | None] = kernels(kernel).backward(
            grad_out, q, k, v, log_normaliser, geometry, scale, wants_radius
        )
    return gradients


class _Attention(torch.autograd.Function):
    """Every backend but the reference: a forward and a backward pass written by hand.

    The radius is an argument of its own so that gradients reach it.
    """

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        radius: Tensor,
        geometry: PisaGeometry,
        scale: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        out, log_normaliser = kernels(backend).forward(q, k, v, geometry, scale)
        return out, q.new_empty(0) if log_normaliser is None else log_normaliser

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, _, ctx.geometry, ctx.scale, ctx.backend = inputs
        ctx.save_for_backward(q, k, v, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v, log_normaliser = ctx.saved_tensors
        gradients = _Gradients.apply(
            grads[0], q, k, v, log_normaliser, ctx.geometry, ctx.scale, ctx.backend,
            ctx.needs_input_grad[3],
        )  # fmt: skip
        return *gradients[:3], gradients[3] if ctx.needs_input_grad[3] else None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NOT_TWICE)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *inputs: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        q, k, v, radius, *rest = inputs
        if in_dims[3] is not None:
            raise NotImplementedError(_NO_VMAP_OVER_GEOMETRY)
        q, k, v = (
            _into_heads(value, dim, info.batch_size)
            for value, dim in zip((q, k, v), in_dims, strict=False)
        )
        results = _Attention.apply(q, k, v, radius, *rest)
        out, log_normaliser = (_out_of_heads(value, info.batch_size) for value in results)
        return (out, log_normaliser), (0, 0)


class _Gradients(torch.autograd.Function):
    """The backward pass as a function of its own, so that `torch.func` can batch it too."""

    @staticmethod
    def forward(
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_normaliser: Tensor,
        geometry: PisaGeometry,
        scale: float,
        backend: str,
        wants_radius: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grad_q, grad_k, grad_v, grad_radius = _gradients(
            grad_out,
            q,
            k,
            v,
            log_normaliser if log_normaliser.numel() else None,
            geometry,
            scale,
            backend,
            wants_radius,
        )
        if grad_radius is None:
            grad_radius = q.new_empty(0)
        radius = grad_radius.to(geometry.radius.dtype)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), radius

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        raise NotImplementedError(_NOT_TWICE)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *inputs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        *tensors, geometry, scale, backend, wants_radius = inputs
        if wants_radius:
            raise NotImplementedError(_NO_VMAP_OVER_GEOMETRY)
        tensors = [
            value if value.numel() == 0 else _into_heads(value, dim, info.batch_size)
            for value, dim in zip(tensors, in_dims, strict=False)
        ]
        results = _Gradients.apply(*tensors, geometry, scale, backend, False)
        return tuple(_out_of_heads(value, info.batch_size) for value in results), (0, 0, 0, 0)


_NOT_TWICE = (
    "PISA has first derivatives in reverse mode. For forward mode and second derivatives use "
    "backend='reference', which is plain autograd."
)

_NO_VMAP_OVER_GEOMETRY = (
    "torch.func.vmap cannot map over the geometry of PISA or its gradient: every image has tiles "
    "of its own. Put the images into the batch of one PisaGeometry, or use backend='reference'."
)


def _into_heads(value: Tensor, dim: int | None, size: int) -> Tensor:
    """Return (B, size * H, ...): what vmap maps over is nothing but more heads."""
    value = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
    return value.transpose(0, 1).flatten(1, 2)


def _out_of_heads(value: Tensor, size: int) -> Tensor:
    """Return (size, B, H, ...), the reverse of `_into_heads`."""
    if value.numel() == 0:
        return value.expand(size, *value.shape)
    return value.unflatten(1, (size, -1)).movedim(1, 0)


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
    if q.shape[1] % geometry.lens_parts:
        raise ValueError(
            f"q has {q.shape[1]} heads but the geometry cuts the lens into {geometry.lens_parts} "
            "parts; give as many heads, or a multiple."
        )
    if q.shape[0] % geometry.batch:
        raise ValueError(
            f"q has batch {q.shape[0]} but the geometry was built for {geometry.batch} images; "
            "give as many, or a multiple."
        )

"""The streaming backend: any circle of confusion, memory of order N.

Keys are taken some at a time and meet all queries. Since the softmax of PISA runs over queries,
one pass is enough: nothing about a key has to be remembered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .geometry import PisaGeometry

SCORES_PER_CHUNK = 1 << 20
"""Scores that a CPU thread works on at a time."""
SCORES_PER_CHUNK_ON_GPU = 1 << 26
KEYS_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Some keys of one image and some of the heads that share it.

    Attributes:
        image: indices of the images (a slice: all of them when one geometry serves the batch).
        heads, keys: slices.
        log_mask, visibility: (keys, N), the latter None when nothing is in the way.
        log_lens_shares: (heads, keys, N); None for the whole lens.
    """

    image: slice
    heads: slice
    keys: slice
    log_mask: Tensor
    visibility: Tensor | None
    log_lens_shares: Tensor | None


def _chunks(geometry: PisaGeometry, q: Tensor) -> Iterator[_Chunk]:
    batch, heads, tokens, _ = q.shape
    scores = SCORES_PER_CHUNK * torch.get_num_threads()
    if q.device.type != "cpu":
        scores = SCORES_PER_CHUNK_ON_GPU
    images_at_once = batch if geometry.batch == 1 else 1
    keys_at_once = max(1, min(KEYS_AT_ONCE, scores // (tokens * images_at_once)))
    heads_at_once = max(1, scores // (tokens * images_at_once * keys_at_once))
    part_of_head = torch.arange(heads, device=q.device) % geometry.lens_parts
    number = torch.arange(tokens, device=q.device)
    for image in range(geometry.batch):
        queries = number + image * tokens
        for first in range(0, tokens, keys_at_once):
            keys = slice(first, min(first + keys_at_once, tokens))
            log_mask = geometry.log_mask_of_pairs(queries[keys, None], queries, q.dtype)
            visibility = _visibility(geometry, image, keys, log_mask)
            shares = None
            if geometry.lens_parts > 1:
                shares = geometry.log_lens_shares(queries[keys, None], queries, q.dtype)
            for head in range(0, heads, heads_at_once):
                some = slice(head, head + heads_at_once)
                yield _Chunk(
                    image=slice(image, image + images_at_once),
                    heads=some,
                    keys=keys,
                    log_mask=log_mask,
                    visibility=visibility,
                    log_lens_shares=None if shares is None else shares[part_of_head[some]],
                )


def _visibility(geometry: PisaGeometry, image: int, keys: slice, log_mask: Tensor) -> Tensor | None:
    """Return M (keys, N), from a table that is filled piece by piece if the budget allows it."""
    tokens = geometry.token_count
    visibility = None
    if geometry.token_disparity is not None:
        number = torch.arange(tokens, device=log_mask.device) + image * tokens
        pairs = (number[keys, None], number, log_mask > -torch.inf)
        if geometry.batch * tokens**2 > geometry.byte_budget:
            rays = geometry.visible_rays_of_pairs(*pairs)
        else:
            table = geometry._derived.setdefault("streamed_rays", {})
            assert isinstance(table, dict)
            name = (image, keys.start, keys.stop)
            if name not in table:
                table[name] = geometry.visible_rays_of_pairs(*pairs)
            rays = table[name]
        visibility = geometry.visible_share(rays).to(log_mask.dtype)
    if geometry.emitters is not None:
        emits = geometry.emitters[image, keys, None].to(log_mask.dtype)
        visibility = emits.expand_as(log_mask) if visibility is None else visibility * emits
    return visibility


def _weights(chunk: _Chunk, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return A^(QC) (images, heads, keys, N): each key's weights over all queries."""
    keys = k[chunk.image, chunk.heads, chunk.keys] * scale
    scores = keys @ q[chunk.image, chunk.heads].mT
    scores += chunk.log_mask
    if chunk.log_lens_shares is not None:
        scores += chunk.log_lens_shares
    return torch.softmax(scores, -1)


def forward(
    q: Tensor, k: Tensor, v: Tensor, geometry: PisaGeometry, scale: float
) -> tuple[Tensor, None]:
    """Return (B, H, N, dv) like `pisa_attention_reference`, for float32 or float64."""
    out = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    for chunk in _chunks(geometry, q):
        weights = _weights(chunk, q, k, scale)
        if chunk.visibility is not None:
            weights *= chunk.visibility
        out[chunk.image, chunk.heads] += weights.mT @ v[chunk.image, chunk.heads, chunk.keys]
    return out, None


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_normaliser: Tensor | None,
    geometry: PisaGeometry,
    scale: float,
    wants_radius: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k, v and, if wanted, the radius (B, N).

    With dP = M (V dO^T), the gradient of the scores is dS = P (dP - sum P dP), the sum running over
    the queries of a key like the softmax.
    """
    grad_q = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    grad_k, grad_v = torch.empty_like(grad_q), torch.empty_like(v)
    grad_radius = torch.zeros_like(geometry.radius, dtype=q.dtype) if wants_radius else None
    for chunk in _chunks(geometry, q):
        of_queries = (chunk.image, chunk.heads)
        of_keys = (chunk.image, chunk.heads, chunk.keys)
        weights = _weights(chunk, q, k, scale)
        visibility = 1.0 if chunk.visibility is None else chunk.visibility
        grad_v[of_keys] = (weights * visibility) @ grad_out[of_queries]
        grad_scores = (v[of_keys] @ grad_out[of_queries].mT) * visibility
        grad_scores *= weights
        grad_scores -= weights * grad_scores.sum(-1, keepdim=True)
        grad_k[of_keys] = scale * (grad_scores @ q[of_queries])
        grad_q[of_queries] += scale * (grad_scores.mT @ k[of_keys])
        if grad_radius is not None:
            # d log C / d radius = slope (1 - C)
            outside = (1 - chunk.log_mask.exp()) * geometry.slope
            image = slice(chunk.image.start, chunk.image.start + 1)
            grad_radius[image, chunk.keys] += (grad_scores.sum((0, 1)) * outside).sum(-1)
    return grad_q, grad_k, grad_v, grad_radius

"""What PISA replaces: attention whose softmax runs over the keys, for ablations.

Each query averages the light of the circles of confusion it lies in. Energy is not conserved: a
source gives to every query that sees it as much as that query has room for.
"""

from __future__ import annotations

import itertools
import math

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from bokehdiff.attention import PisaAttnProcessor, PisaGeometry
from bokehdiff.attention.geometry import log_soft_mask

__all__ = ["KeySoftmaxProcessor", "key_softmax_attention"]

# Below every logit, yet finite, so that the difference of two of them is a number.
BELOW_ALL_LOGITS = -1e30


def key_softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, geometry: PisaGeometry, scale: float
) -> Tensor:
    """``out_q = sum_k M_qk A_qk v_k`` with ``A = softmax over k of (scale q.k + log C)``.

    C is PISA's soft circle of confusion, or the part of it that a head sees, and M its visibility;
    keys that do not emit take no part, and a query that no circle reaches gets 0. The cost is that
    of the circles, not of all pairs.

    Args:
        q, k: (B, H, N, d), tokens row-major on the grid of ``geometry``.
        v: (B, H, N, dv).
        geometry: of B images, or of one that serves all.
        scale: factor of q k^T.

    Returns:
        (B, H, N, dv) in the dtype of ``v``.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    images = [
        _of_one_image(
            *(value[image].to(dtype) for value in (q, k, v)),
            geometry,
            image if geometry.batch > 1 else 0,
            scale,
        )
        for image in range(q.shape[0])
    ]
    return torch.stack(images).to(v.dtype)


def _of_one_image(
    q: Tensor, k: Tensor, v: Tensor, geometry: PisaGeometry, image: int, scale: float
) -> Tensor:
    """(H, N, dv) of (H, N, d) and (H, N, dv), the softmax being summed up offset by offset."""
    height, width, tokens = geometry.height, geometry.width, geometry.token_count
    number = torch.arange(tokens, device=q.device)
    emitting = number if geometry.emitters is None else number[geometry.emitters[image]]
    radius = geometry.radius[image].detach().to(geometry.widest_dtype)[emitting]
    highest = q.new_full(q.shape[:2], BELOW_ALL_LOGITS)
    total, sums = torch.zeros_like(highest), torch.zeros_like(v)
    if not len(emitting):
        return sums

    reach = float(radius.max()) + geometry.margin
    rows, columns = (
        math.ceil(min(reach / spacing, side - 1))
        for spacing, side in zip(geometry.spacing, (height, width), strict=True)
    )
    for down, right in itertools.product(range(-rows, rows + 1), range(-columns, columns + 1)):
        row, column = emitting // width + down, emitting % width + right
        distance = math.hypot(down * geometry.spacing[0], right * geometry.spacing[1])
        log_mask = log_soft_mask(radius, radius.new_tensor(distance), geometry.slope,
                                 geometry.config.cutoff)  # fmt: skip
        reached = (log_mask > -math.inf) & (row >= 0) & (row < height)
        reached &= (column >= 0) & (column < width)
        key, query = emitting[reached], (row * width + column)[reached]
        if not len(key):
            continue
        # One offset brings each query at most one key, so that nothing is added twice.
        logits = scale * (q[:, query] * k[:, key]).sum(-1) + log_mask[reached].to(q.dtype)
        if geometry.lens_parts > 1:
            shares = geometry.log_lens_shares(key, query, q.dtype)
            logits = logits + shares.repeat(len(q) // geometry.lens_parts, 1)
        before = highest[:, query]
        now = torch.maximum(before, logits)
        shrunk, weight = (before - now).exp(), (logits - now).exp()
        rays = geometry.visible_rays_of_pairs(
            key + image * tokens, query + image * tokens, wanted=torch.ones_like(key, dtype=bool)
        )
        seen = geometry.visible_share(rays).to(q.dtype)
        highest[:, query] = now
        total[:, query] = total[:, query] * shrunk + weight
        arriving = (weight * seen)[..., None] * v[:, key]
        sums[:, query] = sums[:, query] * shrunk[..., None] + arriving
    return sums / total.clamp_min(torch.finfo(total.dtype).tiny)[..., None]


class KeySoftmaxProcessor(PisaAttnProcessor):
    """A PISA layer that computes :func:`key_softmax_attention` in the place of PISA."""

    def attend(
        self, attn: Attention, query: Tensor, key: Tensor, value: Tensor, geometry: PisaGeometry
    ) -> Tensor:
        """As of PISA's processor."""
        return key_softmax_attention(query, key, value, geometry.to(query.device), attn.scale)

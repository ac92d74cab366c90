"""PISA on a GPU: block-sparse kernels that keep scores in registers and store none.

The softmax of PISA runs over queries and light is gathered over keys, so there are two sweeps in
the forward pass: every block of keys meets the queries that it reaches, which gives the normaliser
of each key; then every block of queries gathers from the keys that reach it. The backward pass is
arranged likewise. One program owns all that it writes: there are no atomic additions, and the same
input gives the same bits.

With S = scale q k^T, P = C exp(S) / sum over queries, M the visibility and dO the gradient of the
output, the equations are

    out = (P M) V         L_k = log sum_q C exp(S)
    dV = (P M)^T dO       dP = M (dO V^T)      delta_k = sum_q P dP = V_k . dV_k
    dS = P (dP - delta)   dQ = scale dS K      dK = scale dS^T Q
    d radius_k = slope sum_q dS (1 - C)        for each head

A program computes which tokens its tile holds instead of having them sorted into blocks first:
the channels of a token lie side by side in any layout, so rows are read whole either way, and no
sorted copy is needed of what comes in or goes out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .blocks import BlockPlan

if TYPE_CHECKING:
    from .geometry import PisaGeometry

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

TILE = (8, 8)
"""Rows and columns of tokens in a block: the smallest that keeps tensor cores busy, for what a
block computes in vain is the rim between its circles and the blocks that they touch."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _kernel(function: Any) -> Any:
    """Return `triton.jit(function)`; without Triton, the function, which nothing then calls."""
    return function if triton is None else triton.jit(function)


# -- what the kernels share ------------------------------------------------------------------------


@_kernel
def _tokens_of_block(
    block: tl.tensor,
    height: int,
    width: int,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the tokens of a block, as `BlockPlan.token_of` has them, and which are on the grid."""
    tiles_across = tl.cdiv(width, TILE_WIDTH)
    place = tl.arange(0, TILE_HEIGHT * TILE_WIDTH)
    row = block // tiles_across * TILE_HEIGHT + place // TILE_WIDTH
    column = block % tiles_across * TILE_WIDTH + place % TILE_WIDTH
    return (row * width + column).to(tl.int64), (row < height) & (column < width)


@_kernel
def _rows_of(
    values: tl.tensor,
    strides: tl.tuple,
    image: tl.tensor,
    head: tl.tensor,
    tokens: tl.tensor,
    CHANNELS: tl.constexpr,
) -> tl.tensor:
    """Return pointers (tokens, CHANNELS) into a (B, H, N, channels)."""
    first = image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    return values + first + (tokens * strides[2])[:, None] + tl.arange(0, CHANNELS)[None, :]


@_kernel
def _rows_within(used: tl.tensor, HEAD_SIZE: tl.constexpr, CHANNELS: tl.constexpr) -> tl.tensor:
    """Return bool (tokens, CHANNELS): there is such a token, and such a channel."""
    return used[:, None] & (tl.arange(0, CHANNELS) < HEAD_SIZE)[None, :]


@_kernel
def _pair_table(
    table: tl.tensor, row: tl.tensor, places: tl.tensor, in_row_0: float, BLOCK: tl.constexpr
) -> tl.tensor:
    """Return one row of a table of `BlockPlan`, without reading row 0, which is constant."""
    stored = tl.broadcast_to(row, (BLOCK, BLOCK)) > 0
    return tl.load(table + row.to(tl.int64) * (BLOCK * BLOCK) + places, mask=stored, other=in_row_0)


@_kernel
def _visibility(
    visible: tl.tensor,
    row: tl.tensor,
    places: tl.tensor,
    least_share: float,
    RAYS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Return M for a pair of blocks, as `PisaGeometry.visible_share` does."""
    rays = _pair_table(visible, row, places, RAYS, BLOCK)
    return tl.maximum(rays.to(tl.float32) * (1.0 / RAYS), least_share)


# -- the kernels: one program for each head (the neighbours, which share tables), image and block --


@_kernel
def _log_normaliser_kernel(
    q: tl.tensor,
    k: tl.tensor,
    log_normaliser: tl.tensor,
    offsets: tl.tensor,
    partner: tl.tensor,
    log_mask_row: tl.tensor,
    log_mask: tl.tensor,
    q_strides: tl.tuple,
    k_strides: tl.tuple,
    images_of_plan: int,
    height: int,
    width: int,
    scale: float,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
) -> None:
    """L of a block of keys, from one sweep over the queries they reach."""
    head, image, key_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    BLOCK: tl.constexpr = TILE_HEIGHT * TILE_WIDTH
    places = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    keys, key_used = _tokens_of_block(key_block, height, width, TILE_HEIGHT, TILE_WIDTH)
    k_rows = _rows_of(k, k_strides, image, head, keys, CHANNELS)
    k_block = tl.load(k_rows, mask=_rows_within(key_used, HEAD_SIZE, CHANNELS), other=0.0)

    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    owner = image % images_of_plan * tl.num_programs(2) + key_block
    for entry in range(tl.load(offsets + owner), tl.load(offsets + owner + 1)):
        query_block = tl.load(partner + entry)
        queries, query_used = _tokens_of_block(query_block, height, width, TILE_HEIGHT, TILE_WIDTH)
        q_rows = _rows_of(q, q_strides, image, head, queries, CHANNELS)
        q_block = tl.load(q_rows, mask=_rows_within(query_used, HEAD_SIZE, CHANNELS), other=0.0)
        log_c = _pair_table(log_mask, tl.load(log_mask_row + entry), places, 0.0, BLOCK)
        logits = tl.dot(k_block, tl.trans(q_block), input_precision="ieee") * scale + log_c
        larger = tl.maximum(largest, tl.max(logits, 1))
        # A column may be empty so far; then exp(-inf - 0) is the 0 that exp(-inf + inf) is not.
        reference = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(largest - reference)
        total += tl.sum(tl.exp(logits - reference[:, None]), 1)
        largest = larger
    # Keys that reach nothing get 0: every logit of theirs is -inf, and exp(-inf - 0) is 0.
    result = tl.where(total > 0, largest + tl.log(tl.where(total > 0, total, 1.0)), 0.0)
    of_head = (image.to(tl.int64) * tl.num_programs(0) + head) * (height * width)
    tl.store(log_normaliser + of_head + keys, result, mask=key_used)


@_kernel
def _output_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    log_normaliser: tl.tensor,
    out: tl.tensor,
    offsets: tl.tensor,
    partner: tl.tensor,
    log_mask_row: tl.tensor,
    visible_row: tl.tensor,
    log_mask: tl.tensor,
    visible: tl.tensor,
    q_strides: tl.tuple,
    k_strides: tl.tuple,
    v_strides: tl.tuple,
    out_strides: tl.tuple,
    images_of_plan: int,
    height: int,
    width: int,
    scale: float,
    least_share: float,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    RAYS: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
) -> None:
    """out of a block of queries, from one sweep over the keys that reach them."""
    head, image, query_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    BLOCK: tl.constexpr = TILE_HEIGHT * TILE_WIDTH
    # Tables have a row for each key; here queries come first.
    places = tl.arange(0, BLOCK)[None, :] * BLOCK + tl.arange(0, BLOCK)[:, None]
    queries, query_used = _tokens_of_block(query_block, height, width, TILE_HEIGHT, TILE_WIDTH)
    q_rows = _rows_of(q, q_strides, image, head, queries, CHANNELS)
    q_block = tl.load(q_rows, mask=_rows_within(query_used, HEAD_SIZE, CHANNELS), other=0.0)
    of_head = (image.to(tl.int64) * tl.num_programs(0) + head) * (height * width)

    gathered = tl.zeros((BLOCK, VALUE_CHANNELS), tl.float32)
    owner = image % images_of_plan * tl.num_programs(2) + query_block
    for entry in range(tl.load(offsets + owner), tl.load(offsets + owner + 1)):
        key_block = tl.load(partner + entry)
        keys, key_used = _tokens_of_block(key_block, height, width, TILE_HEIGHT, TILE_WIDTH)
        k_rows = _rows_of(k, k_strides, image, head, keys, CHANNELS)
        k_block = tl.load(k_rows, mask=_rows_within(key_used, HEAD_SIZE, CHANNELS), other=0.0)
        v_rows = _rows_of(v, v_strides, image, head, keys, VALUE_CHANNELS)
        v_within = _rows_within(key_used, VALUE_SIZE, VALUE_CHANNELS)
        v_block = tl.load(v_rows, mask=v_within, other=0.0)
        log_c = _pair_table(log_mask, tl.load(log_mask_row + entry), places, 0.0, BLOCK)
        normaliser = tl.load(log_normaliser + of_head + keys, mask=key_used, other=0.0)
        logits = tl.dot(q_block, tl.trans(k_block), input_precision="ieee") * scale + log_c
        weights = tl.exp(logits - normaliser[None, :])
        if visible is not None:
            row = tl.load(visible_row + entry)
            weights *= _visibility(visible, row, places, least_share, RAYS, BLOCK)
        gathered = tl.dot(weights.to(v_block.dtype), v_block, gathered, input_precision="ieee")
    out_rows = _rows_of(out, out_strides, image, head, queries, VALUE_CHANNELS)
    tl.store(out_rows, gathered, mask=_rows_within(query_used, VALUE_SIZE, VALUE_CHANNELS))


@_kernel
def _key_gradients_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    grad_out: tl.tensor,
    log_normaliser: tl.tensor,
    grad_k: tl.tensor,
    grad_v: tl.tensor,
    delta: tl.tensor,
    grad_radius: tl.tensor,
    offsets: tl.tensor,
    partner: tl.tensor,
    log_mask_row: tl.tensor,
    visible_row: tl.tensor,
    log_mask: tl.tensor,
    visible: tl.tensor,
    q_strides: tl.tuple,
    k_strides: tl.tuple,
    v_strides: tl.tuple,
    grad_out_strides: tl.tuple,
    grad_k_strides: tl.tuple,
    grad_v_strides: tl.tuple,
    images_of_plan: int,
    height: int,
    width: int,
    scale: float,
    slope: float,
    least_share: float,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    RAYS: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
) -> None:
    """dV, delta, dK and the gradient of the radius for a block of keys, from two sweeps."""
    head, image, key_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    BLOCK: tl.constexpr = TILE_HEIGHT * TILE_WIDTH
    places = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    keys, key_used = _tokens_of_block(key_block, height, width, TILE_HEIGHT, TILE_WIDTH)
    k_within = _rows_within(key_used, HEAD_SIZE, CHANNELS)
    v_within = _rows_within(key_used, VALUE_SIZE, VALUE_CHANNELS)
    k_block = tl.load(_rows_of(k, k_strides, image, head, keys, CHANNELS), mask=k_within, other=0.0)
    v_block = tl.load(
        _rows_of(v, v_strides, image, head, keys, VALUE_CHANNELS), mask=v_within, other=0.0
    )
    of_head = (image.to(tl.int64) * tl.num_programs(0) + head) * (height * width)
    normaliser = tl.load(log_normaliser + of_head + keys, mask=key_used, other=0.0)[:, None]
    owner = image % images_of_plan * tl.num_programs(2) + key_block
    start, end = tl.load(offsets + owner), tl.load(offsets + owner + 1)

    grad_v_block = tl.zeros((BLOCK, VALUE_CHANNELS), tl.float32)
    for entry in range(start, end):
        query_block = tl.load(partner + entry)
        queries, query_used = _tokens_of_block(query_block, height, width, TILE_HEIGHT, TILE_WIDTH)
        q_rows = _rows_of(q, q_strides, image, head, queries, CHANNELS)
        q_block = tl.load(q_rows, mask=_rows_within(query_used, HEAD_SIZE, CHANNELS), other=0.0)
        grad_rows = _rows_of(grad_out, grad_out_strides, image, head, queries, VALUE_CHANNELS)
        grad_within = _rows_within(query_used, VALUE_SIZE, VALUE_CHANNELS)
        received = tl.load(grad_rows, mask=grad_within, other=0.0).to(v_block.dtype)
        log_c = _pair_table(log_mask, tl.load(log_mask_row + entry), places, 0.0, BLOCK)
        logits = tl.dot(k_block, tl.trans(q_block), input_precision="ieee") * scale + log_c
        weights = tl.exp(logits - normaliser)
        if visible is not None:
            row = tl.load(visible_row + entry)
            weights *= _visibility(visible, row, places, least_share, RAYS, BLOCK)
        grad_v_block = tl.dot(
            weights.to(v_block.dtype), received, grad_v_block, input_precision="ieee"
        )
    grad_v_rows = _rows_of(grad_v, grad_v_strides, image, head, keys, VALUE_CHANNELS)
    tl.store(grad_v_rows, grad_v_block, mask=v_within)
    delta_block = tl.sum(v_block.to(tl.float32) * grad_v_block, 1)
    tl.store(delta + of_head + keys, delta_block, mask=key_used)

    grad_k_block = tl.zeros((BLOCK, CHANNELS), tl.float32)
    grad_radius_block = tl.zeros((BLOCK,), tl.float32)
    for entry in range(start, end):
        query_block = tl.load(partner + entry)
        queries, query_used = _tokens_of_block(query_block, height, width, TILE_HEIGHT, TILE_WIDTH)
        q_rows = _rows_of(q, q_strides, image, head, queries, CHANNELS)
        q_block = tl.load(q_rows, mask=_rows_within(query_used, HEAD_SIZE, CHANNELS), other=0.0)
        grad_rows = _rows_of(grad_out, grad_out_strides, image, head, queries, VALUE_CHANNELS)
        grad_within = _rows_within(query_used, VALUE_SIZE, VALUE_CHANNELS)
        received = tl.load(grad_rows, mask=grad_within, other=0.0).to(v_block.dtype)
        log_c = _pair_table(log_mask, tl.load(log_mask_row + entry), places, 0.0, BLOCK)
        logits = tl.dot(k_block, tl.trans(q_block), input_precision="ieee") * scale + log_c
        weights = tl.exp(logits - normaliser)
        grad_weights = tl.dot(v_block, tl.trans(received), input_precision="ieee")
        if visible is not None:
            row = tl.load(visible_row + entry)
            grad_weights *= _visibility(visible, row, places, least_share, RAYS, BLOCK)
        grad_logits = weights * (grad_weights - delta_block[:, None])
        grad_k_block = tl.dot(
            grad_logits.to(q_block.dtype), q_block, grad_k_block, input_precision="ieee"
        )
        if grad_radius is not None:
            grad_radius_block += tl.sum(grad_logits * (1.0 - tl.exp(log_c)), 1)
    grad_k_rows = _rows_of(grad_k, grad_k_strides, image, head, keys, CHANNELS)
    tl.store(grad_k_rows, grad_k_block * scale, mask=k_within)
    if grad_radius is not None:
        tl.store(grad_radius + of_head + keys, grad_radius_block * slope, mask=key_used)


@_kernel
def _query_gradient_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    grad_out: tl.tensor,
    log_normaliser: tl.tensor,
    delta: tl.tensor,
    grad_q: tl.tensor,
    offsets: tl.tensor,
    partner: tl.tensor,
    log_mask_row: tl.tensor,
    visible_row: tl.tensor,
    log_mask: tl.tensor,
    visible: tl.tensor,
    q_strides: tl.tuple,
    k_strides: tl.tuple,
    v_strides: tl.tuple,
    grad_out_strides: tl.tuple,
    grad_q_strides: tl.tuple,
    images_of_plan: int,
    height: int,
    width: int,
    scale: float,
    least_share: float,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    RAYS: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
) -> None:
    """dQ of a block of queries, from one sweep over the keys that reach them."""
    head, image, query_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    BLOCK: tl.constexpr = TILE_HEIGHT * TILE_WIDTH
    places = tl.arange(0, BLOCK)[None, :] * BLOCK + tl.arange(0, BLOCK)[:, None]
    queries, query_used = _tokens_of_block(query_block, height, width, TILE_HEIGHT, TILE_WIDTH)
    q_within = _rows_within(query_used, HEAD_SIZE, CHANNELS)
    q_block = tl.load(
        _rows_of(q, q_strides, image, head, queries, CHANNELS), mask=q_within, other=0.0
    )
    grad_rows = _rows_of(grad_out, grad_out_strides, image, head, queries, VALUE_CHANNELS)
    grad_within = _rows_within(query_used, VALUE_SIZE, VALUE_CHANNELS)
    received = tl.load(grad_rows, mask=grad_within, other=0.0)
    of_head = (image.to(tl.int64) * tl.num_programs(0) + head) * (height * width)

    grad_q_block = tl.zeros((BLOCK, CHANNELS), tl.float32)
    owner = image % images_of_plan * tl.num_programs(2) + query_block
    for entry in range(tl.load(offsets + owner), tl.load(offsets + owner + 1)):
        key_block = tl.load(partner + entry)
        keys, key_used = _tokens_of_block(key_block, height, width, TILE_HEIGHT, TILE_WIDTH)
        k_rows = _rows_of(k, k_strides, image, head, keys, CHANNELS)
        k_block = tl.load(k_rows, mask=_rows_within(key_used, HEAD_SIZE, CHANNELS), other=0.0)
        v_rows = _rows_of(v, v_strides, image, head, keys, VALUE_CHANNELS)
        v_within = _rows_within(key_used, VALUE_SIZE, VALUE_CHANNELS)
        v_block = tl.load(v_rows, mask=v_within, other=0.0)
        log_c = _pair_table(log_mask, tl.load(log_mask_row + entry), places, 0.0, BLOCK)
        normaliser = tl.load(log_normaliser + of_head + keys, mask=key_used, other=0.0)
        delta_block = tl.load(delta + of_head + keys, mask=key_used, other=0.0)
        logits = tl.dot(q_block, tl.trans(k_block), input_precision="ieee") * scale + log_c
        weights = tl.exp(logits - normaliser[None, :])
        grad_weights = tl.dot(received.to(v_block.dtype), tl.trans(v_block), input_precision="ieee")
        if visible is not None:
            row = tl.load(visible_row + entry)
            grad_weights *= _visibility(visible, row, places, least_share, RAYS, BLOCK)
        grad_logits = weights * (grad_weights - delta_block[None, :])
        grad_q_block = tl.dot(
            grad_logits.to(k_block.dtype), k_block, grad_q_block, input_precision="ieee"
        )
    grad_q_rows = _rows_of(grad_q, grad_q_strides, image, head, queries, CHANNELS)
    tl.store(grad_q_rows, grad_q_block * scale, mask=q_within)


# -- the backend -----------------------------------------------------------------------------------


def supports(geometry: PisaGeometry, q: Tensor, v: Tensor) -> str | None:
    """Return why the kernels cannot serve these tensors, as a sentence, or None if they can."""
    if triton is None:
        return "the Triton library is missing: pip install triton."
    if not geometry.has_repeatable_rays:
        return (
            "jitter='location_random' draws new noise for each pair of tokens, and the kernels "
            "need the same rays in every call."
        )
    for name, value in (("q", q), ("v", v)):
        if value.dtype not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            return f"the kernels compute in {known}, but {name} is {value.dtype}."
    if q.device.type != "cuda":
        if isinstance(_output_kernel, triton.JITFunction):
            return f"the kernels need tensors on a CUDA device, but q is on {q.device}."
        return None  # Triton's interpreter runs the kernels, without the limits of a GPU.
    # Some versions of torch leave out attributes of it in their types.
    device: Any = torch.cuda.get_device_properties(q.device)
    if device.major < 8:
        return (
            f"the kernels need a GPU of compute capability 8.0 or newer, and {device.name} has "
            f"{device.major}.{device.minor}."
        )
    needed, available = shared_memory_bytes(q, v), device.shared_memory_per_block_optin
    if needed > available:
        return (
            f"heads of {q.shape[-1]} and {v.shape[-1]} channels in {v.dtype} take {needed // 1024} "
            f"KiB of shared memory, and {device.name} has {available // 1024} KiB."
        )
    return None


def shared_memory_bytes(q: Tensor, v: Tensor) -> int:
    """Return the shared memory that a program may take: a block of q, k, v, dO, and of scores."""
    block, itemsize = TILE[0] * TILE[1], max(q.itemsize, v.itemsize)
    return 2 * block * (_padded(q) + _padded(v)) * itemsize + 4 * block**2


def forward(
    q: Tensor, k: Tensor, v: Tensor, geometry: PisaGeometry, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the light that arrives (Eq. 9), and the normaliser that `backward` needs.

    Args:
        q, k: (B, H, N, d) float16, bfloat16 or float32, with any strides.
        v: (B, H, N, dv), likewise.
        geometry: of B images, or of one that serves all.
        scale: factor of q k^T.

    Returns:
        out (B, H, N, dv) float32, and L (B, H, N) float32, the logarithm of the sum over queries
        of C exp(S) for each key; 0 for keys that emit nothing.

    Scores, normalisers and sums are float32. Weights are rounded to the dtype of `v` before they
    multiply it.
    """
    plan = _plan_of(geometry)
    q, k, v = _channels_last(q), _channels_last(k), _channels_last(v)
    log_normaliser = _log_normaliser(q, k, v, geometry, scale)
    out = v.new_empty(v.shape, dtype=torch.float32)
    grid, settings = _launch(plan, geometry, q, v, scale)
    by_query = plan.keys_of_queries
    with _device_of(q):
        _output_kernel[grid](
            q, k, v, log_normaliser, out,
            by_query.offsets, by_query.partner, by_query.log_mask_row, by_query.visible_row,
            plan.log_mask, plan.visible,
            q.stride()[:3], k.stride()[:3], v.stride()[:3], out.stride()[:3],
            **settings, **_settings_of_values(geometry, v),
        )  # fmt: skip
    return out, log_normaliser


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
    """Return the gradients of q, k, v and, if it is wanted, of `geometry.radius`, all in float32.

    Args:
        grad_out: (B, H, N, dv) gradient of `out`; used in the dtype of `v`.
        q, k, v, geometry, scale: as given to `forward`.
        log_normaliser: as `forward` returned it; None computes it again.
        wants_radius: whether to compute the gradient of the radius.

    Returns:
        (B, H, N, d), (B, H, N, d), (B, H, N, dv), and (geometry.batch, N) per unit of radius.
    """
    plan = _plan_of(geometry)
    q, k, v, grad_out = (_channels_last(value) for value in (q, k, v, grad_out))
    grad_q, grad_k, grad_v = (
        torch.empty(value.shape, dtype=torch.float32, device=q.device) for value in (q, k, v)
    )
    if log_normaliser is None:
        log_normaliser = _log_normaliser(q, k, v, geometry, scale)
    log_normaliser = log_normaliser.contiguous()
    delta = torch.empty_like(log_normaliser)
    grad_radius = torch.empty_like(log_normaliser) if wants_radius else None
    grid, settings = _launch(plan, geometry, q, v, scale)
    settings.update(_settings_of_values(geometry, v))
    by_key, by_query = plan.queries_of_keys, plan.keys_of_queries
    with _device_of(q):
        _key_gradients_kernel[grid](
            q, k, v, grad_out, log_normaliser, grad_k, grad_v, delta, grad_radius,
            by_key.offsets, by_key.partner, by_key.log_mask_row, by_key.visible_row,
            plan.log_mask, plan.visible,
            q.stride()[:3], k.stride()[:3], v.stride()[:3], grad_out.stride()[:3],
            grad_k.stride()[:3], grad_v.stride()[:3],
            slope=geometry.slope, **settings,
        )  # fmt: skip
        _query_gradient_kernel[grid](
            q, k, v, grad_out, log_normaliser, delta, grad_q,
            by_query.offsets, by_query.partner, by_query.log_mask_row, by_query.visible_row,
            plan.log_mask, plan.visible,
            q.stride()[:3], k.stride()[:3], v.stride()[:3], grad_out.stride()[:3],
            grad_q.stride()[:3],
            **settings,
        )  # fmt: skip
    if grad_radius is not None:
        grad_radius = grad_radius.sum(1)
        if geometry.batch == 1:
            grad_radius = grad_radius.sum(0, keepdim=True)
    return grad_q, grad_k, grad_v, grad_radius


def _log_normaliser(
    q: Tensor, k: Tensor, v: Tensor, geometry: PisaGeometry, scale: float
) -> Tensor:
    """Return L (B, H, N), the first of the two sweeps of `forward`."""
    plan = _plan_of(geometry)
    log_normaliser = q.new_empty(q.shape[:3], dtype=torch.float32)
    grid, settings = _launch(plan, geometry, q, v, scale)
    pairs = plan.queries_of_keys
    with _device_of(q):
        _log_normaliser_kernel[grid](
            q, k, log_normaliser,
            pairs.offsets, pairs.partner, pairs.log_mask_row, plan.log_mask,
            q.stride()[:3], k.stride()[:3],
            **settings,
        )  # fmt: skip
    return log_normaliser


def _plan_of(geometry: PisaGeometry) -> BlockPlan:
    """Return the plan of a geometry, made once."""
    plan = geometry._derived.get("block_plan")
    if plan is None:
        plan = BlockPlan.make(geometry, TILE)
        geometry._derived["block_plan"] = plan
    assert isinstance(plan, BlockPlan)
    return plan


def _channels_last(value: Tensor) -> Tensor:
    """Return a tensor whose channels lie side by side; the kernels take no stride for them."""
    return value if value.stride(-1) == 1 else value.contiguous()


def _padded(value: Tensor) -> int:
    """Return the channels that the kernels work on: a power of two, and 16 at least."""
    return max(16, triton.next_power_of_2(value.shape[-1]))


def _launch(
    plan: BlockPlan, geometry: PisaGeometry, q: Tensor, v: Tensor, scale: float
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Return the grid of programs, heads innermost, and what every kernel is told."""
    grid = (q.shape[1], q.shape[0], plan.blocks[0] * plan.blocks[1])
    # Few enough threads for two programs at a time, many enough to keep operands in registers;
    # exact float32 products run outside the tensor cores and need the most.
    in_float32 = torch.float32 in (q.dtype, v.dtype)
    wide = max(_padded(q), _padded(v)) > 64
    return grid, {
        "images_of_plan": geometry.batch,
        "height": geometry.height,
        "width": geometry.width,
        "scale": scale,
        "HEAD_SIZE": q.shape[-1],
        "CHANNELS": _padded(q),
        "TILE_HEIGHT": plan.tile[0],
        "TILE_WIDTH": plan.tile[1],
        "num_warps": 16 if in_float32 else 8 if wide else 4,
        "num_stages": 1 if in_float32 or wide else 2,
        # Releases of Triton differ in their default.
        "enable_fp_fusion": True,
    }


def _settings_of_values(geometry: PisaGeometry, v: Tensor) -> dict[str, Any]:
    """Return what the kernels that read values and visibility are told besides."""
    return {
        "least_share": float(geometry.visible_share(torch.zeros(()))),
        "RAYS": geometry.config.supersampling,
        "VALUE_SIZE": v.shape[-1],
        "VALUE_CHANNELS": _padded(v),
    }


def _device_of(value: Tensor) -> torch.cuda.device:
    """Return a context in which kernels run where the tensor is; it does nothing for a CPU."""
    return torch.cuda.device(value.device if value.is_cuda else -1)

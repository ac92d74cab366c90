"""PISA as two calls of `torch.nn.attention.flex_attention`, for CUDA.

Attention normalises over keys, PISA over queries. So the first call swaps the roles: every key
attends to the queries, and the log-sum-exp of its logits is the normaliser L of the key. The second
call is attention as usual. With S = scale q k^T and M the visibility,

    L_k = log sum_q exp(S + log C)
    out = sum_k exp(S - L_k + log C + log M) v_k

and as flex_attention divides that sum by the sum of its exponentials, which it also returns as a
logarithm, the division is undone afterwards.

The tokens are taken in blocks of 128, and only pairs of blocks that light passes between are
visited. For these log C and log C + log M are read from a table that heads and layers share: the
exponentials limit the speed already, and C would add more of them for each head.

There is no backward pass here: flex_attention has none on the CPU, where it could be checked, and
the exact gradient of another backend serves as well.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    FlexKernelOptions,
    flex_attention,
)

from .blocks import BlockPairs, BlockPlan
from .geometry import PisaGeometry

TILE = (8, 16)
"""Rows and columns of tokens in a block: 128 tokens, the block that flex_attention is made for."""
BLOCK = TILE[0] * TILE[1]
SHIFT, LOW_BITS = BLOCK.bit_length() - 1, BLOCK - 1
"""A block is a place >> SHIFT, and the place in it place & LOW_BITS; kernels divide slowly."""

KERNEL_SHAPES = {
    (64, 2): (64, 64, 4),
    (128, 2): (64, 32, 4),
    (256, 2): (64, 16, 4),
    (64, 4): (64, 32, 4),
    (128, 4): (32, 16, 4),
    (256, 4): (32, 16, 8),
}
"""Rows, columns and warps that a kernel works with, for channels of a head and bytes of a number.

What torch takes by default leaves no registers for the table: they spill to memory by kilobytes. It
may also ask for more shared memory than there is, above all where v is wider than q; hence heads of
other sizes are filled up with zeros to one of these.
"""
HEAD_SIZES = sorted({channels for channels, _ in KERNEL_SHAPES})
FEWEST_CHANNELS = 16
"""Narrowest values of the kernels' matrix products."""
PRECISIONS = (torch.float16, torch.bfloat16, torch.float32)

COMPILED_VARIANTS = 64
"""Each grid, batch and precision has its own kernels; torch would stop at 8 of them."""
LARGEST_TABLE = 2**31
"""Elements that a kernel can count with 32 bits."""


@dataclass(frozen=True, eq=False)
class FlexPlan:
    """Which blocks of tokens meet, and a table of what passes between them.

    Attributes:
        token_of: (P,) token at each place of the tile-major order; places without one repeat 0.
        place_of: (N,) place of each token.
        queries_of_keys: the query blocks that each key block meets.
        keys_of_queries: the key blocks that each query block meets.
        table: (rows, BLOCK keys, BLOCK queries) logarithms. One row is minus infinity everywhere.
        mask_row: (B, key blocks, query blocks) int32 row of `table` with log C.
        light_row: likewise, with log C + log M.
    """

    token_of: Tensor
    place_of: Tensor
    queries_of_keys: BlockMask
    keys_of_queries: BlockMask
    table: Tensor
    mask_row: Tensor
    light_row: Tensor

    @classmethod
    @torch.no_grad()
    def make(cls, geometry: PisaGeometry, precision: torch.dtype) -> FlexPlan:
        """Return the plan of a geometry, with tables in `precision`.

        Raises:
            ValueError: when the tables would not fit in `geometry.byte_budget`.
        """
        plan = BlockPlan.make(geometry, tile=TILE)
        places, blocks = plan.token_of.numel(), plan.token_of.numel() // BLOCK
        pairs, device = plan.queries_of_keys, plan.token_of.device
        at = _positions(pairs, blocks)

        # Rows of log C, a row for blocks that do not meet, and rows of log C + log M.
        nothing, hidden = len(plan.log_mask), torch.zeros(0, dtype=torch.long, device=device)
        if pairs.visible_row is not None:
            hidden = pairs.visible_row.nonzero().squeeze(1)
        rows = _rounded_up(nothing + 1 + hidden.numel())
        _check_size(geometry, rows, precision)
        table = torch.full((rows, BLOCK, BLOCK), -torch.inf, dtype=precision, device=device)
        table[:nothing] = plan.log_mask
        light_row_of_pair = pairs.log_mask_row.clone()
        if plan.visible is not None and pairs.visible_row is not None:
            light_row_of_pair[hidden] = (
                nothing + 1 + torch.arange(hidden.numel(), dtype=torch.int32, device=device)
            )
            for some in hidden.split(BLOCK):
                share = geometry.visible_share(plan.visible[pairs.visible_row[some]])
                light = plan.log_mask[pairs.log_mask_row[some]] + share.log()
                table[light_row_of_pair[some]] = light.to(precision)

        mask_row = torch.full(
            (geometry.batch, blocks, blocks), nothing, dtype=torch.int32, device=device
        )
        light_row = mask_row.clone()
        mask_row.view(-1)[at] = pairs.log_mask_row
        light_row.view(-1)[at] = light_row_of_pair
        meets = mask_row != nothing

        used = (plan.token_of >= 0).nonzero().squeeze(1)
        place_of = torch.empty(geometry.token_count, dtype=torch.long, device=device)
        place_of[plan.token_of[used]] = used
        return cls(
            token_of=plan.token_of.clamp(min=0),
            place_of=place_of,
            queries_of_keys=_block_mask(meets, places),
            keys_of_queries=_block_mask(meets.transpose(1, 2), places),
            table=table,
            mask_row=mask_row,
            light_row=light_row,
        )


def _positions(pairs: BlockPairs, blocks: int) -> Tensor:
    """Return where the pairs lie in a flattened (B, blocks, partner blocks)."""
    sizes = pairs.offsets.diff().long()
    owner = torch.arange(sizes.numel(), device=sizes.device).repeat_interleave(sizes)
    return owner * blocks + pairs.partner


def _rounded_up(rows: int) -> int:
    """Return the next power of two: kernels are compiled anew for every size of the table."""
    return 1 << (rows - 1).bit_length()


def _check_size(geometry: PisaGeometry, rows: int, precision: torch.dtype) -> None:
    elements = rows * BLOCK**2
    needed, budget = elements * precision.itemsize, geometry.byte_budget
    wanted = (
        f"The table of backend='flex' needs {needed / 2**20:.1f} MiB for {geometry.batch} x "
        f"{geometry.height} x {geometry.width} tokens with circles this wide, and "
    )
    if needed > budget:
        raise ValueError(
            f"{wanted}byte_budget allows {budget / 2**20:.1f} MiB. Raise the budget of the "
            "geometry, or use backend='local', which stores less."
        )
    if elements > LARGEST_TABLE:
        largest = LARGEST_TABLE * precision.itemsize / 2**20
        raise ValueError(f"{wanted}its kernels reach {largest:.0f} MiB. Use backend='local'.")


def _block_mask(meets: Tensor, places: int) -> BlockMask:
    """Return the mask of a bool (B, rows of blocks, columns of blocks), the same for all heads."""
    counts = meets.sum(2, dtype=torch.int32)
    columns = meets.int().argsort(dim=2, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(
        counts[:, None].contiguous(),
        columns[:, None].contiguous(),
        BLOCK_SIZE=BLOCK,
        seq_lengths=(places, places),
    )


def _plan_of(geometry: PisaGeometry, precision: torch.dtype) -> FlexPlan:
    """Return the plan of a geometry, made once."""
    # Half precision has room for what light weighs: log C reaches from 0 to the log of the cutoff.
    # float16 has three bits more than bfloat16 for that.
    table_precision = torch.float32 if precision.itemsize > 2 else torch.float16
    name = "flex_plan" if table_precision is torch.float32 else "flex_plan_half"
    plan = geometry._derived.get(name)
    if plan is None:
        plan = geometry._derived[name] = FlexPlan.make(geometry, table_precision)
    assert isinstance(plan, FlexPlan)
    return plan


# -- the two calls; torch.compile makes one kernel of each -----------------------------------------


def _kernel_options(q: Tensor) -> FlexKernelOptions | None:
    shape = KERNEL_SHAPES.get((q.shape[3], q.dtype.itemsize))
    if shape is None:  # not a kernel, then: the CPU takes heads of any size and float64
        return None
    rows, columns, warps = shape
    return {"BLOCK_M": rows, "BLOCK_N": columns, "num_warps": warps, "num_stages": 2}


def _log_normaliser(
    k: Tensor, q: Tensor, block_mask: BlockMask, row: Tensor, table: Tensor, scale: float
) -> Tensor:
    """Return L (B, H, P); 0 for keys that emit nothing, all of whose logits are minus infinity."""
    precision = torch.promote_types(q.dtype, torch.float32)

    def logit(score: Tensor, image: Tensor, head: Tensor, key: Tensor, query: Tensor) -> Tensor:
        entry = row[image, key >> SHIFT, query >> SHIFT]
        return score + table[entry, key & LOW_BITS, query & LOW_BITS].to(precision)

    # Values must be given and are of no use; the fewest channels cost least.
    values = q[..., :FEWEST_CHANNELS]
    _, sums = flex_attention(
        k, q, values, logit, block_mask, scale,
        kernel_options=_kernel_options(q), return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    assert sums.lse is not None
    return sums.lse.masked_fill(sums.lse.isneginf(), 0.0)


def _output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_normaliser: Tensor,
    block_mask: BlockMask,
    row: Tensor,
    table: Tensor,
    scale: float,
) -> Tensor:
    """Return the light that arrives, (B, H, P, dv), in float32 or float64."""
    precision = log_normaliser.dtype

    def logit(score: Tensor, image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        entry = row[image, key >> SHIFT, query >> SHIFT]
        # The two large numbers first: their difference has no rounding left to lose.
        weight = score - log_normaliser[image, head, key]
        return weight + table[entry, key & LOW_BITS, query & LOW_BITS].to(precision)

    mean, sums = flex_attention(
        q, k, v, logit, block_mask, scale,
        kernel_options=_kernel_options(q), return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    assert sums.lse is not None
    # Where nothing arrives the mean is 0, and so is the exponential of minus infinity.
    return mean.to(precision) * sums.lse.exp()[..., None]


@functools.cache
def _compiled(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # fullgraph, because what torch.compile leaves uncompiled would store every score.
    return torch.compile(kernel, dynamic=False, fullgraph=True)


def _run(kernel: Callable[..., Tensor], *arguments: Any) -> Tensor:
    if torch.compiler.is_compiling():
        return kernel(*arguments)
    if arguments[0].is_cuda:
        with torch._dynamo.config.patch(recompile_limit=COMPILED_VARIANTS):
            return _compiled(kernel)(*arguments)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        return kernel(*arguments)


def supports(geometry: PisaGeometry, q: Tensor, v: Tensor) -> str | None:
    """Return why the kernels cannot serve these tensors, as a sentence, or None if they can.

    On the CPU the two calls are not compiled and store every score: that is for checks only.
    """
    if geometry.token_disparity is not None and not geometry.has_repeatable_rays:
        return (
            "backend='flex' needs the same rays in every call, but jitter='location_random' draws "
            "new noise for each pair of tokens."
        )
    if q.device.type == "cpu":
        return None
    if q.device.type != "cuda":
        return f"backend='flex' needs tensors on a CUDA device, but q is on {q.device}."
    if importlib.util.find_spec("triton") is None:
        return "backend='flex' is compiled with the Triton library: pip install triton."
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "backend='flex' needs a GPU of compute capability 8.0 (Ampere) or newer."
    for name, value in (("q", q), ("v", v)):
        if value.dtype not in PRECISIONS:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in PRECISIONS)
            return f"backend='flex' computes in {known}, but {name} is {value.dtype}."
        if value.shape[-1] > HEAD_SIZES[-1]:
            return (
                f"backend='flex' takes heads of at most {HEAD_SIZES[-1]} channels, but {name} has "
                f"{value.shape[-1]}."
            )
    return None


@torch.no_grad()
def forward(
    q: Tensor, k: Tensor, v: Tensor, geometry: PisaGeometry, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the light that arrives (Eq. 9), and the normaliser of each key.

    Args:
        q, k: (B, H, N, d) float16, bfloat16 or float32; on the CPU float64 too.
        v: (B, H, N, dv), likewise.
        geometry: of B images, or of one that serves all.
        scale: factor of q k^T.

    Returns:
        out (B, H, N, dv) float32, and L (B, H, N) float32, the logarithm of the sum over queries
        of C exp(S) for each key; 0 for keys that emit nothing. Both are float64 if the inputs are.

    Scores, normalisers and sums are float32. In half precision weights and their mean are rounded
    to the dtype of the inputs, and log C and log M to float16.
    """
    precision = functools.reduce(torch.promote_types, (q.dtype, k.dtype, v.dtype))
    plan = _plan_of(geometry, precision)
    images, heads = q.shape[:2]
    channels = max(q.shape[3], v.shape[3])
    head_size = next((size for size in HEAD_SIZES if size >= channels), channels)
    # One geometry for all images: the batch is nothing but more heads.
    shape = (1, images * heads) if geometry.batch == 1 else (images, heads)

    def tile_major(value: Tensor) -> Tensor:
        value = F.pad(value.to(precision), (0, head_size - value.shape[3]))
        return value.index_select(2, plan.token_of).reshape(*shape, -1, head_size)

    def row_major(value: Tensor) -> Tensor:
        return value.reshape(images, heads, *value.shape[2:]).index_select(2, plan.place_of)

    value_channels = v.shape[3]
    q, k, v = tile_major(q), tile_major(k), tile_major(v)
    log_normaliser = _run(
        _log_normaliser, k, q, plan.queries_of_keys, plan.mask_row, plan.table, scale
    )
    out = _run(
        _output, q, k, v, log_normaliser, plan.keys_of_queries, plan.light_row, plan.table, scale
    )
    return row_major(out[..., :value_channels]), row_major(log_normaliser)

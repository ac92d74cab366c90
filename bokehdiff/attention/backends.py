"""The backends of PISA: which there are, what each costs, and which one `auto` takes."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from .blocks import BlockPlan
from .geometry import UNREPEATABLE_RAYS, PisaGeometry
from .local import pair_share

Backend = Literal["auto", "reference", "stream", "local", "flex", "triton"]

NAMES: tuple[Backend, ...] = tuple(name for name in get_args(Backend) if name != "auto")

MOST_LOCAL_SHARE = 0.9
"""From this share of all pairs of tokens on, lists of neighbours cost more than they save."""
MOST_SPARSE_SHARE = 0.5
"""Likewise for blocks of 64 x 64 pairs on a GPU, which hold more pairs that light does not link."""


def kernels(backend: str) -> ModuleType:
    """Return the module with `forward` of a backend, and `backward` where it has its own."""
    return importlib.import_module(f".{backend}", __package__)


def gradient_kernels(backend: str) -> str:
    """Return the backend whose `backward` belongs to the `forward` of this one."""
    return "local" if backend == "flex" else backend


def refusal(
    backend: str, geometry: PisaGeometry, q: Tensor | None = None, v: Tensor | None = None
) -> str | None:
    """Return why a backend cannot compute this, in a sentence; None when it can.

    Args:
        backend: a name.
        geometry: the geometry.
        q, v: the inputs, of which only shape, dtype and device count; without them, those of a
            layer with 64 channels per head in float32 on the geometry's device.

    Raises:
        ValueError: for a backend that does not exist.
    """
    if backend not in NAMES:
        raise ValueError(f"backend must be 'auto' or one of {NAMES}, got {backend!r}.")
    if backend == "reference":
        return None
    if not geometry.has_repeatable_rays:
        return UNREPEATABLE_RAYS
    if backend in ("stream", "local"):
        return None
    if geometry.lens_parts > 1:
        return "its kernels spread light through the whole lens, not through its parts."
    if q is None or v is None:
        q = v = torch.empty(1, device=geometry.radius.device).expand(1, 1, geometry.token_count, 64)
    reason: str | None = kernels(backend).supports(geometry, q, v)
    return reason


def available_backends(
    geometry: PisaGeometry, q: Tensor | None = None, v: Tensor | None = None
) -> dict[Backend, str | None]:
    """Return for every backend None, or why it cannot compute this; arguments as `refusal`'s."""
    return {name: refusal(name, geometry, q, v if v is not None else q) for name in NAMES}


@dataclass(frozen=True)
class BackendChoice:
    """What `auto` takes for a geometry, and why. Printed, it says so in words.

    Attributes:
        backend: its name.
        reason: why, in a sentence.
        pair_share: share of the N^2 pairs of tokens that light may link, as `local` counts them.
            The work of `reference` and `stream` is 1 in this unit.
        refused: why other backends cannot be taken, by name, as far as that was asked.
    """

    backend: Backend
    reason: str
    pair_share: float
    refused: dict[Backend, str]

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.reason}"]
        lines += [f"not {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def choose_backend(
    geometry: PisaGeometry, q: Tensor | None = None, v: Tensor | None = None
) -> BackendChoice:
    """Return the backend that `auto` takes, for given inputs or in general.

    The estimate of the work is the share of the N^2 pairs of tokens that must be looked at: those
    of each tile of keys with the queries that the largest circle of the tile reaches.
    """
    if refusal("local", geometry, q, v):
        return BackendChoice("reference", "only the dense formula can do this.", 1.0, {})
    share = pair_share(geometry, q, v)
    linked = f"light may link {share:.1%} of the pairs of {geometry.token_count} tokens"
    device = geometry.radius.device if q is None else q.device
    refused: dict[Backend, str] = {}
    if device.type == "cuda" and share < MOST_SPARSE_SHARE:
        failure = (
            refusal("triton", geometry, q, v)
            or _triton_tables_too_large(geometry)
            or triton_failure(device)
        )
        if failure is None:
            reason = f"{linked}, and blocks of the others are left out on the GPU."
            return BackendChoice("triton", reason, share, refused)
        refused["triton"] = failure
    if share < MOST_LOCAL_SHARE:
        reason = f"{linked}, and only the surroundings of each tile are looked at."
        return BackendChoice("local", reason, share, refused)
    reason = f"{linked}: nearly all, so keys meet all queries, some keys at a time."
    return BackendChoice("stream", reason, share, refused)


def explain(
    geometry: PisaGeometry, q: Tensor | None = None, v: Tensor | None = None
) -> BackendChoice:
    """Return which backend `pisa_attention(..., backend="auto")` takes, and why; print it.

    Args:
        geometry: the geometry.
        q, v: inputs of the layer, of which only shape, dtype and device count; without them, those
            of a layer with 64 channels per head in float32 on the geometry's device.
    """
    choice = choose_backend(geometry, q, v)
    refused = {
        name: reason for name, reason in available_backends(geometry, q, v).items() if reason
    }
    return dataclasses.replace(choice, refused=refused | choice.refused)


def _triton_tables_too_large(geometry: PisaGeometry) -> str | None:
    """Return why the tables of the kernels would not fit the byte budget; None if they do."""
    # Asked by every layer, and answered from all pairs of blocks: once per geometry is enough.
    needed = geometry._derived.get("bytes_of_block_plan")
    if needed is None:
        needed = geometry._derived["bytes_of_block_plan"] = BlockPlan.bytes_needed(geometry)
    assert isinstance(needed, int)
    if needed <= geometry.byte_budget:
        return None
    return f"its tables may need {needed} bytes, more than byte_budget={geometry.byte_budget}."


@functools.cache
def triton_failure(device: torch.device) -> str | None:
    """Return what is wrong with the Triton kernels on this GPU; None when they compute what is due.

    They depend on driver, compiler and GPU, so `auto` takes them only where a scene of 144 tokens
    comes out as from the reference in float64, gradients included. Asked once per process and GPU.
    """
    from .pisa import pisa_attention

    results = []
    # Asked for by a call that may itself run without gradients.
    with torch.inference_mode(False), torch.enable_grad():
        generator = torch.Generator().manual_seed(0)
        coc = 3 * torch.rand(1, 1, 12, 12, generator=generator)
        disparity = 0.9 * torch.rand(1, 1, 24, 24, generator=generator)
        geometry = PisaGeometry.build(coc.to(device), disparity.to(device))
        inputs = torch.randn(4, 1, 2, 144, 64, generator=generator).to(device)
        choices: tuple[tuple[Backend, torch.dtype], ...] = (
            ("reference", torch.float64),
            ("triton", torch.float32),
        )
        try:
            for backend, dtype in choices:
                q, k, v, weight = (value.to(dtype).requires_grad_() for value in inputs)
                out = pisa_attention(q, k, v, geometry, backend=backend)
                gradients = torch.autograd.grad(out, (q, k, v), weight)
                results.append(torch.stack([out.detach(), *gradients]).double())
        except Exception as problem:  # whatever a compiler or driver may throw
            return f"its kernels do not run on this GPU ({type(problem).__name__}: {problem})."
    # Rays that graze an edge may be rounded to either side, in no more than a few pairs.
    error = (results[1] - results[0]).abs().flatten().quantile(0.99)
    if not bool(error < 1e-4):
        return f"its kernels are off by {float(error):.2g} on this GPU."
    return None

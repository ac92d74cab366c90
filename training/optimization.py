"""The optimiser of a run: learning rate over the steps, parameter groups, clipping."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

OPTIMIZERS = ("adamw", "adamw_8bit")
SCHEDULES = ("cosine", "constant")


def learning_rate_factor(
    step: int, warmup_steps: int, max_train_steps: int, schedule: str = "cosine"
) -> float:
    """Return the share of the highest learning rate in step `step`, counted from 0.

    It rises linearly over the warm-up; then it falls by half a cosine to zero at the last step, or
    stays if the schedule of `SCHEDULES` is ``constant``.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(max_train_steps - warmup_steps, 1)
    return 0.5 + 0.5 * math.cos(math.pi * progress)


def parameter_groups(
    parameters: dict[str, nn.Parameter],
    scales: dict[str, float],
    decays: Callable[[str, nn.Parameter], bool] | None = None,
) -> list[dict[str, Any]]:
    """Return a group of parameters per factor; the first fragment that a name contains decides.

    Those that `decays` says no to, by name and value, are groups of their own without weight decay.
    """
    for fragment in scales:
        if not any(fragment in name for name in parameters):
            parts = ", ".join(f"{part}." for part in parts_of(parameters))
            raise ValueError(
                f"lr_scale names {fragment!r}, which is in no trained parameter's name. What is "
                f"trained has names that begin with {parts}"
            )
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        scale = next((float(scales[part]) for part in scales if part in name), 1.0)
        decaying = decays is None or decays(name, parameter)
        groups.setdefault((scale, decaying), []).append(parameter)
    return [
        {"params": members, "scale": scale, **({} if decaying else {"weight_decay": 0.0})}
        for (scale, decaying), members in groups.items()
    ]


def parts_of(parameters: dict[str, nn.Parameter]) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of each network, by the first component of their names."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        parts.setdefault(name.split(".", 1)[0], []).append(parameter)
    return parts


def make_optimizer(
    kind: str, groups: list[dict[str, Any]], **settings: Any
) -> torch.optim.Optimizer:
    """Return the optimiser of `OPTIMIZERS` named `kind`, with AdamW's `settings`.

    ``adamw_8bit`` keeps its two moments in 8 bits (bitsandbytes), a quarter of the memory.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if kind == "adamw":
        return torch.optim.AdamW(groups, **settings)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            "optimizer adamw_8bit needs bitsandbytes: pip install bitsandbytes. Or use optimizer "
            "adamw."
        ) from error
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, **settings)
    return optimizer


def clip_gradients(
    accelerator: Accelerator, parameters: dict[str, nn.Parameter], largest_norm: float
) -> dict[str, Tensor]:
    """Scale the gradient of each network down to `largest_norm`; 0 does not.

    Returns:
        ``gradient_norm_PART`` of each network before, its Euclidean norm. DeepSpeed clips by itself
        (``gradient_clipping`` of its configuration, all networks together), so that there is one
        norm, ``gradient_norm``.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        norm = accelerator.clip_grad_norm_(parameters.values(), largest_norm)
        return {} if norm is None else {"gradient_norm": torch.as_tensor(norm)}
    # Once for all: a second time would be refused within a step.
    accelerator.unscale_gradients()
    norms = {}
    for part, members in parts_of(parameters).items():
        norm = nn.utils.clip_grad_norm_(members, largest_norm or math.inf)
        # With sharded parameters the norm is spread over the processes.
        norms[f"gradient_norm_{part}"] = (
            norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        )
    return norms

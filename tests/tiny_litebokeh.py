"""Small networks of LiteBokeh with weights that are neither trained nor zero."""

from __future__ import annotations

from typing import Any

import torch

from bokehdiff.models.litebokeh import GlassEncNet, TinyUnet


def tiny_unet(seed: int = 0, **options: Any) -> TinyUnet:
    """With batch norms that have statistics and scales of both signs, and a working enhancement."""
    return _disturbed(TinyUnet, seed, **{"channels": (4, 6, 8), **options})


def tiny_glass(seed: int = 0, **options: Any) -> GlassEncNet:
    """With a working enhancement."""
    return _disturbed(GlassEncNet, seed, **{"channels": 4, "residual_blocks": 2, **options})


def _disturbed(kind: Any, seed: int, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = kind(**options)
    with torch.no_grad():
        for name, value in (*network.named_parameters(), *network.named_buffers()):
            noise = torch.randn(value.shape, generator=generator)
            if "running_var" in name:
                value.copy_(noise.abs() + 0.1)
            elif ".norm." in name and "batches" not in name:
                value.copy_(noise)
            elif "correct" in name or "out" in name:
                # Pictures differ from place to place by much more than tests look for.
                value.add_(0.2 * noise)
    return network.eval().requires_grad_(False)

"""An adapter for the blur strength of a tiny FLUX.1-Kontext, for tests."""

from __future__ import annotations

import torch

from bokehdiff.models.bokeh_adapter import BokehAdapter


def trained_adapter(seed: int = 0) -> BokehAdapter:
    """An adapter for :func:`tests.tiny_flux.tiny_flux_transformer` whose branches all matter, as
    after a training."""
    generator = torch.Generator().manual_seed(seed)
    adapter = BokehAdapter(2, 2, width=32, context_width=8, rank=4, alpha=4.0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapter.eval()

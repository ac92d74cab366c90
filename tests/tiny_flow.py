"""A BokehFlow of some ten thousand parameters, of the real class, for tests.

Its weights are random in every layer, those that begin at zero too, so that depth and correction
depend on all that they can depend on.
"""

from __future__ import annotations

from typing import Any

import torch

from bokehdiff.models.bokehflow import BokehFlowModel


def untrained_flow(**changes: Any) -> BokehFlowModel:
    """A network as it is before training: what it renders is physics alone."""
    torch.manual_seed(0)
    values: dict[str, Any] = dict(
        channels=16,
        stem_channels=8,
        head_channels=8,
        blocks=2,
        fusion="depth_to_bokeh",
        radius_tokens=True,
        max_coc_radius=240.0,  # 12 px of a photo 64 pixels wide
    )
    return BokehFlowModel.from_variant("nano", **{**values, **changes}).eval()


def tiny_flow(**changes: Any) -> BokehFlowModel:
    """A network that does something everywhere."""
    model = untrained_flow(**changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1, generator=generator)
    return model

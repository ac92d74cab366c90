"""A Depth Anything of some thousand parameters, made of the real classes, for tests.

Its weights are not random but chosen, so that what it answers is known: bright is near. Every layer
passes one channel on, which starts as the mean m of a patch as processed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessorPil,
)

MAX_DEPTH = 20
"""Metres, of the metric network."""

CHANNELS = 8
MEAN, DEVIATION = 0.5, 0.25
"""Of the processor, in all three colours."""


def tiny_depth_processor(**changes: Any) -> DPTImageProcessorPil:
    """The processor of the published checkpoints but for 70 instead of 518 pixels, and gray."""
    values: dict[str, Any] = dict(
        size={"height": 70, "width": 70},
        ensure_multiple_of=14,
        keep_aspect_ratio=True,
        image_mean=[MEAN] * 3,
        image_std=[DEVIATION] * 3,
    )
    return DPTImageProcessorPil(**{**values, **changes})


def known_answer(brightness: float | np.ndarray, kind: str) -> Any:
    """What :func:`tiny_depth_network` answers of a picture of one gray, display-encoded in [0, 1].

    Normalising (m, -m, 1, -1, 0, 0, 0, 0) over its channels makes ``g = m * sqrt(8 / (2 m^2 + 2))``
    of m. The relative network answers ``g + 4``, the metric one ``20 / (1 + exp(g))`` metres.
    """
    mean = (np.asarray(brightness, np.float64) - MEAN) / DEVIATION
    g = mean * np.sqrt(CHANNELS / (2 * mean**2 + 2))
    return MAX_DEPTH / (1 + np.exp(g)) if kind == "metric" else g + 4


@torch.no_grad()
def tiny_depth_network(kind: str = "relative") -> DepthAnythingForDepthEstimation:
    """A network to which bright is near; ``kind`` is ``"relative"`` or ``"metric"``."""
    backbone = Dinov2Config(
        hidden_size=CHANNELS,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=70,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=CHANNELS,
        neck_hidden_sizes=[4] * 4,
        fusion_hidden_size=4,
        head_hidden_size=2,
        depth_estimation_type=kind,
        max_depth=MAX_DEPTH if kind == "metric" else 1,
    )
    torch.manual_seed(0)
    network = DepthAnythingForDepthEstimation(config).eval()
    embeddings = network.backbone.embeddings
    embeddings.position_embeddings.zero_()
    patches = embeddings.patch_embeddings.projection
    patches.weight.zero_()
    patches.weight[0], patches.weight[1] = (sign / patches.weight[0].numel() for sign in (1, -1))
    patches.bias.copy_(torch.tensor([0.0, 0, 1, -1, 0, 0, 0, 0]))
    for layer in network.backbone.encoder.layer:
        layer.layer_scale1.lambda1.zero_()
        layer.layer_scale2.lambda1.zero_()
    coarser_stages = tuple(f"reassemble_stage.layers.{stage}" for stage in (1, 2, 3))
    for name, layer in [*network.neck.named_modules(), *network.head.named_modules()]:
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            for parameter in layer.parameters():
                parameter.zero_()
            if "residual" not in name and not name.startswith(coarser_stages):
                enlarging = layer.kernel_size == (4, 4)
                middle = slice(None) if enlarging else layer.kernel_size[0] // 2
                layer.weight[0, 0, middle, middle] = 1
    network.head.conv1.bias[0] = 4  # so that no ReLU cuts it
    if kind == "metric":
        network.head.conv3.weight[0, 0] = -1
        network.head.conv3.bias[0] = 4
    return network


def save_tiny_depth(folder: Path, kind: str = "relative") -> Path:
    """The folder, as ``DepthEstimator.from_pretrained`` wants it."""
    tiny_depth_network(kind).save_pretrained(folder)
    tiny_depth_processor().save_pretrained(folder)
    return folder

"""A network with the outside of UniDepthV2, for tests where the ``unidepth`` package is absent.

Its encoder is transformers' DINOv2 with the output of UniDepth's; its decoder reads distance, rays
and confidence off the features, so that every answer depends on what the encoder says.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Backbone, Dinov2Config

FINAL_NORM_EPSILON = 1e-5


class UniDepthBackbone(nn.Module):
    """Normalised features (B, h, w, D) and class tokens (B, 1, D) of every layer of a DINOv2."""

    def __init__(self, width: int, layers: int, heads: int, image_size: int) -> None:
        super().__init__()
        self.embed_dim = width
        self.vit = Dinov2Backbone(
            Dinov2Config(
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                image_size=image_size,
                patch_size=14,
                layer_norm_eps=1e-6,
                out_indices=list(range(1, layers + 1)),
                reshape_hidden_states=False,
            )
        )
        self.vit.layernorm.eps = FINAL_NORM_EPSILON

    def forward(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        rows = image.shape[-2] // 14
        maps = self.vit(image).feature_maps
        features = [tokens[:, 1:].unflatten(1, (rows, -1)).contiguous() for tokens in maps]
        return features, [tokens[:, :1] for tokens in maps]


class TinyUniDepth(nn.Module):
    """Four layers in four stages; distances of 1 to 10 m."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.pixel_encoder: nn.Module = UniDepthBackbone(width, 4, 2, 56)
        self.pixel_decoder = nn.Linear(width, 2)
        self.slices_encoder_range = [(0, 1), (1, 2), (2, 3), (3, 4)]
        self.shape_constraints: dict[str, Any] = {
            "ratio_bounds": [0.5, 2.5],
            "pixels_min": 2_000,
            "pixels_max": 6_000,
        }

    def encode_decode(
        self, inputs: dict[str, Any], image_metas: list[Any]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        image = inputs["image"]
        features, _ = self.pixel_encoder(image)
        assert len(features[-1]) == len(image)
        answer = self.pixel_decoder(sum(features)).movedim(-1, 1)
        answer = F.interpolate(answer, image.shape[-2:], mode="bilinear").sigmoid()
        depth = 1 + 9 * answer[:, :1]
        if inputs["camera"] is not None:
            depth = depth * inputs["camera"].get_rays(shapes=(len(image), *image.shape[-2:]))
        return inputs, {"depth": depth, "confidence": answer[:, 1:]}


def tiny_unidepth() -> TinyUniDepth:
    """With weights large enough that what the encoder says is seen in the depth."""
    torch.manual_seed(0)
    model = TinyUniDepth().eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.mul_(4)
    return model

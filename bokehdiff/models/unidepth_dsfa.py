"""UniDepthV2 that also sees a bokeh stack, by divided space-focus attention (DSFA).

The network is that of the ``unidepth`` package, which is installed apart from this one. What is
used of it, :func:`add_dsfa` and :func:`infer_from_stack` say. Depth in metres comes out, and the
decoder is unchanged (BokehDepth, arXiv:2512.12425).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..backbones import IMAGENET_DEVIATION, IMAGENET_MEAN
from ..optics import rescale_strength
from .dsfa import DSFAEncoder, check_strengths

__all__ = [
    "PUBLISHED_OPTIONS",
    "DSFAPixelEncoder",
    "UniDepthGeometry",
    "add_dsfa",
    "infer_from_stack",
]

PUBLISHED_OPTIONS: dict[str, Any] = dict(
    num_heads=8, space_attention_scale="double", largest_strength=1.0, initial_gate=0.1
)
"""Options of :class:`~bokehdiff.models.dsfa.DSFAEncoder` that the published weights want."""

PATCH = 14


class DSFAPixelEncoder(nn.Module):
    """A vision transformer's features of a picture, refined by those of its bokeh stack.

    Args:
        backbone: a module that makes of pictures (B, 3, h, w) two lists with an entry for each
            layer: features (B, h/14, w/14, D) or (B, P, D), and class tokens.
        width: D.
        levels: indices of the layers whose features are refined.
        options: of :class:`~bokehdiff.models.dsfa.DSFAEncoder`.
    """

    def __init__(
        self, backbone: nn.Module, width: int, levels: Sequence[int], **options: Any
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.fusion = DSFAEncoder(width, levels, **options)

    def forward(
        self, image: Tensor, stack: Tensor | None = None, K: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Features and class tokens of the picture, of every layer, as the backbone gives them.

        Args:
            image: (B, 3, h, w), as the backbone takes it.
            stack: (B, N, 3, h, w), the frames, prepared in the same way; None leaves all as it is.
            K: (B, N), strength of the blur of each frame: pixels of radius in ``image`` per
                1/metre.

        Raises:
            ValueError: a stack without K or the reverse, other sizes, or strengths that are none.
        """
        if (stack is None) != (K is None):
            raise ValueError(
                "A stack and its strengths K go together. Give stack (B, N, 3, h, w) and K (B, N), "
                "or neither."
            )
        features, class_tokens = self.backbone(image)
        if stack is None or K is None:
            return list(features), list(class_tokens)
        if stack.ndim != 5 or stack.shape[:1] + stack.shape[2:] != image.shape:
            raise ValueError(
                f"stack has the shape {tuple(stack.shape)}; wanted (B, N, 3, h, w) with the sizes "
                f"of the picture, {tuple(image.shape)}."
            )
        batch, count = stack.shape[:2]
        K = check_strengths(K, batch, count)
        if count == 0:
            return list(features), list(class_tokens)
        frames = [
            layer.unflatten(0, (batch, count)) for layer in self.backbone(stack.flatten(0, 1))[0]
        ]
        return self.fusion(features, frames, K), list(class_tokens)


def add_dsfa(model: Any, **options: Any) -> DSFAPixelEncoder:
    """Puts a :class:`DSFAPixelEncoder` around the encoder of a UniDepthV2, in place.

    Used of the model are ``pixel_encoder``, its ``embed_dim``, and ``slices_encoder_range``, whose
    stages end with the layers that are refined.

    Args:
        model: a ``unidepth.models.UniDepthV2``.
        options: of :class:`~bokehdiff.models.dsfa.DSFAEncoder`. By default a fresh encoder changes
            nothing, and K is divided by 30.

    Returns:
        The new ``model.pixel_encoder``.

    Raises:
        ValueError: a model that has DSFA already.
    """
    encoder = dsfa_around(model, **options)
    model.pixel_encoder = encoder
    return encoder


def dsfa_around(model: Any, **options: Any) -> DSFAPixelEncoder:
    """What :func:`add_dsfa` puts into the model, without doing so."""
    backbone = model.pixel_encoder
    if isinstance(backbone, DSFAPixelEncoder):
        raise ValueError(
            "The encoder of this model has DSFA already; wanted a UniDepthV2 as its package makes "
            "it."
        )
    levels = [end - 1 for _, end in model.slices_encoder_range]
    ours = dict(largest_strength=30.0, initial_gate=0.0)
    encoder = DSFAPixelEncoder(backbone, backbone.embed_dim, levels, **{**ours, **options})
    example = next(backbone.parameters())
    encoder.fusion.to(example.device, example.dtype)
    return encoder.train(model.training)


@dataclass(frozen=True)
class UniDepthGeometry:
    """How a picture is padded and resized for UniDepthV2.

    Attributes:
        pads: pixels of the picture added left, right, above and below.
        padded: height and width with them.
        factor: of the resize, before the sides are rounded.
        network: height and width that the network sees, multiples of 14.
    """

    pads: tuple[int, int, int, int]
    padded: tuple[int, int]
    factor: float
    network: tuple[int, int]

    @classmethod
    def of(
        cls,
        height: int,
        width: int,
        ratios: tuple[float, float] = (0.5, 2.5),
        pixels: tuple[float, float] = (200_000, 600_000),
    ) -> UniDepthGeometry:
        """For a picture of this size.

        Args:
            height, width: pixels.
            ratios: least and largest width over height, to which pictures are padded.
            pixels: least and largest number of pixels that the network sees, before its sides are
                rounded up to whole patches.
        """
        ratio = min(max(width / height, ratios[0]), ratios[1])
        padded = (height, width)
        if width / height > ratio:
            padded = (int(width / ratio), width)
        elif width / height < ratio:
            padded = (height, int(height * ratio))
        above, left = (
            (big - small) // 2 for big, small in zip(padded, (height, width), strict=True)
        )
        pads = (left, padded[1] - width - left, above, padded[0] - height - above)
        area = padded[0] * padded[1]
        factor = math.sqrt(min(max(area, pixels[0]), pixels[1]) / area)
        rows, columns = (math.ceil(int(side * factor) / PATCH) * PATCH for side in padded)
        return cls(pads, padded, factor, (rows, columns))

    def prepare(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), sRGB in [0, 1], as the network takes them, padded with gray."""
        mean, deviation = (
            pictures.new_tensor(values)[:, None, None]
            for values in (IMAGENET_MEAN, IMAGENET_DEVIATION)
        )
        padded = F.pad((pictures - mean) / deviation, self.pads)
        return F.interpolate(padded, self.network, mode="bilinear", align_corners=False)

    def restore(self, values: Tensor) -> Tensor:
        """Values (B, C, h, w) of the network at the pixels (B, C, H, W) of the picture."""
        padded = F.interpolate(values, self.padded, mode="bilinear", align_corners=False)
        left, right, above, below = self.pads
        return padded[..., above : self.padded[0] - below, left : self.padded[1] - right]


class _EncoderWithStack(nn.Module):
    """The encoder as UniDepth calls it, with the picture alone."""

    def __init__(self, encoder: DSFAPixelEncoder, stack: Tensor, K: Tensor) -> None:
        super().__init__()
        self.encoder, self.stack, self.K = encoder, stack, K

    def forward(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        encoded: tuple[list[Tensor], list[Tensor]] = self.encoder(image, self.stack, self.K)
        return encoded


@torch.no_grad()
def infer_from_stack(
    model: Any, image: Tensor, stack: Tensor, K: Tensor, camera: Any = None
) -> dict[str, Tensor]:
    """Depth by a UniDepthV2 with DSFA, from a picture and its bokeh stack.

    The model is not changed. Used of it, besides the encoder, are ``encode_decode``,
    ``shape_constraints`` and, if set, ``resolution_level``.

    Args:
        model: a ``unidepth.models.UniDepthV2`` after :func:`add_dsfa`.
        image: (B, 3, H, W), sRGB in [0, 1].
        stack: (B, N, 3, H, W), the frames, of which there is at least one.
        K: (B, N), strength of the blur of each frame: pixels of radius in ``image`` per 1/metre.
        camera: a camera of the ``unidepth`` package for ``image``, as a batch; by default the
            network predicts one.

    Returns:
        ``depth`` (B, 1, H, W) in metres and ``confidence`` (B, 1, H, W), larger is surer.

    Raises:
        ValueError: a model without DSFA, sizes that differ, or strengths that are none.
    """
    if not isinstance(model.pixel_encoder, DSFAPixelEncoder):
        raise ValueError("The model has no DSFA; wanted one after add_dsfa(model).")
    if stack.ndim != 5 or stack.shape[:1] + stack.shape[2:] != image.shape or not stack.shape[1]:
        raise ValueError(
            f"stack has the shape {tuple(stack.shape)}; wanted (B, N, 3, H, W), N of 1 or more, "
            f"with the sizes of the picture, {tuple(image.shape)}."
        )
    K = check_strengths(K, *stack.shape[:2])
    limits = model.shape_constraints
    least, most = limits["pixels_min"], limits["pixels_max"]
    if (level := getattr(model, "resolution_level", None)) is not None:
        step = (most - least) / 10
        least, most = least + level * step, least + (level + 1) * step
    geometry = UniDepthGeometry.of(
        image.shape[-2], image.shape[-1], tuple(limits["ratio_bounds"]), (least, most)
    )
    frames = geometry.prepare(stack.flatten(0, 1)).unflatten(0, stack.shape[:2])
    K = rescale_strength(K, geometry.padded[1], geometry.network[1])
    if camera is not None:
        left, right, above, below = geometry.pads
        camera = camera.crop(left=-left, top=-above, right=-right, bottom=-below)
        camera = camera.resize(geometry.factor)
    # A model that shares everything but the encoder, so that this one keeps no stack.
    seeing = copy.copy(model)
    seeing._modules = {
        **model._modules,
        "pixel_encoder": _EncoderWithStack(model.pixel_encoder, frames, K),
    }
    _, outputs = seeing.encode_decode({"image": geometry.prepare(image), "camera": camera}, [])
    return {name: geometry.restore(outputs[name]) for name in ("depth", "confidence")}

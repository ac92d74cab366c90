"""Depth Anything V2 that also sees a bokeh stack, by divided space-focus attention (DSFA).

The sharp picture and every frame of its stack go through the same DINOv2 backbone. At some of the
four levels that the DPT neck takes, :class:`~bokehdiff.models.dsfa.DSFABlock` refines the tokens
of the sharp picture by those of the frames (BokehDepth, arXiv:2512.12425); neck and head are those
of Depth Anything. Without a stack the network is Depth Anything.

Importing this module makes ``AutoModelForDepthEstimation`` know the network.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForDepthEstimation,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
)
from transformers.modeling_outputs import DepthEstimatorOutput
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings

from .dsfa import ATTENTION_SCALES, DSFABlock, DSFAEncoder, check_strengths

__all__ = ["DepthAnythingDSFAConfig", "DepthAnythingDSFAForDepthEstimation"]


@strict
class DepthAnythingDSFAConfig(DepthAnythingConfig):
    """Configuration of :class:`DepthAnythingDSFAForDepthEstimation`.

    The defaults are for training: a fresh network is exactly Depth Anything, and K is brought to
    [0, 1] before the network sees it. The published weights want others, which
    :func:`bokehdiff.dsfa_files.read_depth_anything_dsfa` sets.

    Args:
        fusion_levels: which of the backbone's ``out_indices`` are refined, counted from 0.
        fusion_heads: attention heads of DSFA.
        space_attention_scale: of DSFA inside a frame, ``"single"`` or ``"double"``, see
            :data:`bokehdiff.models.dsfa.ATTENTION_SCALES`.
        backbone_attention_scale: the same of the backbone. The authors trained with "double" on
            CUDA; their program for single pictures computes with "single".
        interpolate_offset: added to the sides of the grid of patches, in patches, when position
            embeddings are resized to it. 0 is how transformers does it; the authors', and those of
            Depth Anything, have 0.1.
        alibi_scale, learn_alibi_scale, largest_strength, initial_gate: of
            :class:`bokehdiff.models.dsfa.DSFABlock`. With ``largest_strength=1``, as published, the
            stack changes nothing at K = 10, 20, 30.
        others: of ``transformers.DepthAnythingConfig``. ``max_depth`` is an int, in metres.
    """

    model_type = "depth_anything_dsfa"

    fusion_levels: list[int] | tuple[int, ...] = (2, 3)
    fusion_heads: int = 8
    space_attention_scale: str = "single"
    backbone_attention_scale: str = "single"
    interpolate_offset: int | float = 0.0
    alibi_scale: int | float = 1.0
    learn_alibi_scale: bool = False
    largest_strength: int | float = 30.0
    initial_gate: int | float = 0.0

    def validate_fusion(self) -> None:
        """Part of the checks on construction."""
        levels = len(self.neck_hidden_sizes)
        if not all(0 <= level < levels for level in self.fusion_levels):
            raise ValueError(
                f"fusion_levels are {list(self.fusion_levels)}; wanted indices of the {levels} "
                f"levels that the neck takes, 0 to {levels - 1}."
            )
        if self.backbone_attention_scale not in ATTENTION_SCALES:
            raise ValueError(
                f"backbone_attention_scale is {self.backbone_attention_scale!r}; wanted one of "
                f"{ATTENTION_SCALES}."
            )


class _OffsetEmbeddings(Dinov2Embeddings):
    """Embeddings whose positions are resized with an offset to the factors of the resize."""

    def __init__(self, config: Any, offset: float) -> None:
        super().__init__(config)
        self.offset = offset

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Position embeddings (1, 1 + h w, D) for a picture of so many pixels.

        Bicubic, with the factors ``(h + offset) / native`` and ``(w + offset) / native``, which say
        where a patch lies in the native grid: by the offset less far from the first than if the
        grids covered the same picture.
        """
        positions = self.position_embeddings
        native = round((positions.shape[1] - 1) ** 0.5)
        rows, columns = (
            side // patch
            for side, patch in zip((height, width), self.patch_embeddings.patch_size, strict=True)
        )
        if rows == columns == native:
            return positions
        grid = positions[:, 1:].unflatten(1, (native, native)).permute(0, 3, 1, 2)
        resized = F.interpolate(
            grid.to(torch.promote_types(grid.dtype, torch.float32)),
            scale_factor=((rows + self.offset) / native, (columns + self.offset) / native),
            mode="bicubic",
        )
        resized = resized.to(grid.dtype).flatten(2).transpose(1, 2)
        return torch.cat([positions[:, :1], resized], 1)


class DepthAnythingDSFAForDepthEstimation(DepthAnythingForDepthEstimation):
    """Depth of a picture, from the picture and a stack of it with several strengths of defocus.

    Published weights take K as it is (``largest_strength=1``). The bias between frames then makes
    them invisible: with K = 10, 20, 30 another stack changes the depth by less than rounding in
    half precision. Train with ``largest_strength=30``, or give such weights K of a few units.
    """

    config_class = DepthAnythingDSFAConfig
    _no_split_modules = ["DSFABlock"]

    def __init__(self, config: DepthAnythingDSFAConfig) -> None:
        super().__init__(config)
        if config.interpolate_offset or config.backbone_attention_scale != "single":
            self._change_backbone(config)
        self.fusion = DSFAEncoder(
            config.reassemble_hidden_size,
            config.fusion_levels,
            config.fusion_heads,
            space_attention_scale=config.space_attention_scale,
            alibi_scale=float(config.alibi_scale),
            learn_alibi_scale=config.learn_alibi_scale,
            largest_strength=float(config.largest_strength),
            initial_gate=float(config.initial_gate),
        )
        self.post_init()

    def _change_backbone(self, config: DepthAnythingDSFAConfig) -> None:
        """Gives the backbone the attention scale and position embeddings of the configuration."""
        if not isinstance(self.backbone.embeddings, Dinov2Embeddings):
            raise ValueError(
                f"The backbone is a {type(self.backbone).__name__}; interpolate_offset and "
                "backbone_attention_scale are options of DINOv2 alone. Leave them at 0 and "
                "'single'."
            )
        if config.interpolate_offset:
            self.backbone.embeddings = _OffsetEmbeddings(
                self.backbone.config, float(config.interpolate_offset)
            )
        if config.backbone_attention_scale == "double":
            for module in self.backbone.modules():
                if hasattr(module, "scaling"):  # 1 / sqrt(d), whatever the class is called
                    module.scaling = 1 / round(module.scaling**-2)

    def _init_weights(self, module: nn.Module) -> None:
        # The layers inside come first and get transformers' start; a block starts otherwise.
        if isinstance(module, DSFABlock):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    @classmethod
    def from_depth_anything(
        cls, model: DepthAnythingForDepthEstimation | str | os.PathLike[str], **options: Any
    ) -> DepthAnythingDSFAForDepthEstimation:
        """Depth Anything's weights with fresh DSFA blocks, in evaluation mode.

        Args:
            model: a Depth Anything, which is copied; or its folder, or its name on the Hub.
            options: of :class:`DepthAnythingDSFAConfig`. ``depth_estimation_type`` and
                ``max_depth`` among them give relative weights a metric head to train.

        Raises:
            ValueError: weights that do not fit the options.
        """
        if not isinstance(model, DepthAnythingForDepthEstimation):
            model = DepthAnythingForDepthEstimation.from_pretrained(model)
        if isinstance(model, cls):
            raise ValueError(
                f"{type(model).__name__} has DSFA blocks already; wanted a plain Depth Anything."
            )
        values = model.config.to_dict()
        for name in ("model_type", "architectures", "transformers_version"):
            values.pop(name, None)
        network = cls(DepthAnythingDSFAConfig(**{**values, **options}))
        state = model.state_dict()
        mine = {
            name: value.shape
            for name, value in network.state_dict().items()
            if not name.startswith("fusion.")
        }
        odd = sorted(
            name for name in mine.keys() | state.keys()
            if name not in mine or name not in state or mine[name] != state[name].shape
        )  # fmt: skip
        if odd:
            raise ValueError(
                f"The options ask for a network of another size than the weights: {odd[0]} "
                f"{'and others ' if len(odd) > 1 else ''}would not fit. Give options of DSFA only."
            )
        network.to(model.device, model.dtype).load_state_dict(state, strict=False)
        return network.eval()

    def forward(
        self,
        pixel_values: Tensor,
        stack_pixel_values: Tensor | None = None,
        K: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, ...] | DepthEstimatorOutput:
        """Depth (B, H, W) as ``predicted_depth``, in metres if the configuration says "metric".

        H and W are the sides of the picture in whole patches.

        Args:
            pixel_values: (B, 3, h, w), the sharp picture as the processor gives it.
            stack_pixel_values: (B, N, 3, h, w), the frames, prepared in the same way. None, or no
                frames, and the network is Depth Anything.
            K: (B, N), strength of the blur of each frame: pixels of radius in ``pixel_values`` per
                1/metre. A picture that was resized by a factor has K times that factor.
            labels: not for training; the loss is computed by who trains.
            output_attentions, output_hidden_states: also return those of the sharp picture.
            return_dict: a ``DepthEstimatorOutput`` (the default) or a tuple.

        Raises:
            ValueError: a stack without K or the reverse, other sizes, or strengths that are none.
        """
        if (stack_pixel_values is None) != (K is None):
            given, lacking = ("a stack", "K") if K is None else ("K", "stack")
            raise ValueError(
                f"There is {given} and no {lacking}. Give stack_pixel_values (B, N, 3, h, w) "
                "together with K (B, N), or neither."
            )
        if stack_pixel_values is None or K is None:
            return super().forward(
                pixel_values,
                labels=labels,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
                **kwargs,
            )
        if labels is not None:
            raise NotImplementedError("The loss is computed outside the network, from its depth.")
        batch, *size = pixel_values.shape
        if stack_pixel_values.ndim != 5 or (
            stack_pixel_values.shape[0], *stack_pixel_values.shape[2:]
        ) != (batch, *size):  # fmt: skip
            raise ValueError(
                f"stack_pixel_values has the shape {tuple(stack_pixel_values.shape)}; wanted "
                f"({', '.join(map(str, (batch, 'N', *size)))}): frames of the size of the picture."
            )
        count = stack_pixel_values.shape[1]
        K = check_strengths(K, batch, count)

        if return_dict is None:
            return_dict = self.config.return_dict
        outputs = self.backbone.forward_with_filtered_kwargs(
            pixel_values,
            output_hidden_states=output_hidden_states or self.config.output_hidden_states,
            output_attentions=output_attentions or self.config.output_attentions,
        )
        features = list(outputs.feature_maps)
        if count:
            frames = self.backbone(stack_pixel_values.flatten(0, 1)).feature_maps
            # Class tokens, which the neck leaves out, stay where they are.
            refined = self.fusion(
                [tokens[:, 1:] for tokens in features],
                [tokens[:, 1:].unflatten(0, (batch, count)) for tokens in frames],
                K,
            )
            features = [
                torch.cat([tokens[:, :1], patches], 1)
                for tokens, patches in zip(features, refined, strict=True)
            ]
        rows, columns = (side // self.config.patch_size for side in size[1:])
        depth = self.head(self.neck(features, rows, columns), rows, columns)
        if not return_dict:
            extra = (outputs.hidden_states, outputs.attentions)
            return (depth, *(value for value in extra if value is not None))
        return DepthEstimatorOutput(
            predicted_depth=depth,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


AutoConfig.register(DepthAnythingDSFAConfig.model_type, DepthAnythingDSFAConfig, exist_ok=True)
AutoModelForDepthEstimation.register(
    DepthAnythingDSFAConfig, DepthAnythingDSFAForDepthEstimation, exist_ok=True
)

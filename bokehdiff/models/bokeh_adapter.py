"""The adapter that tells FLUX.1-Kontext how strong a blur to paint.

The strength K is that of :mod:`bokehdiff.optics`: a circle of confusion has a radius of
K |disparity - focus_disparity| pixels with disparity in 1/metres, so K is in pixels times metres,
of the picture on which the network works. A small network embeds K / 30; parameters beside each
attention module carry the embedding, and what else the blur takes, into the frozen transformer
(:mod:`bokehdiff.models.bokeh_attention`).

Names and shapes of the parameters are those of the authors' ``bokeh_lora.bin``
(:mod:`bokehdiff.bokeh_adapter_files` reads and writes such files).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxTransformer2DModel,
)
from torch import Tensor, nn

from ..attention.processor import uncompiled
from ..tensor_files import check_whole
from .bokeh_attention import BokehBlock, BokehCondition, BokehFluxAttnProcessor, BokehGrounding

__all__ = [
    "LARGEST_STRENGTH",
    "SMALLEST_STRENGTH",
    "UNCONDITIONAL_STRENGTH",
    "BokehAdapter",
    "BokehCondition",
    "BokehGrounding",
    "flux_sizes",
]

SMALLEST_STRENGTH, LARGEST_STRENGTH = 1.0, 30.0
"""Range of K, pixels times metres, in which the adapter is trained; it is told K / 30."""

UNCONDITIONAL_STRENGTH = -1.0
"""What :meth:`BokehAdapter.embed` is told in place of K / 30 where no strength is asked for."""

EMBEDDING_HIDDEN_WIDTH = 64


class BokehAdapter(ModelMixin, ConfigMixin):
    """Parameters that make a FLUX transformer follow a blur strength.

    :meth:`install` puts them to work in a transformer, which neither owns nor saves them. There it
    computes what it always did, until a call hands over ``joint_attention_kwargs={"bokeh":
    BokehCondition(adapter.embed(k_normalised))}``.

    A fresh adapter changes nothing whatever it is told: the second matrix of every layer is zero.

    Args:
        num_layers, num_single_layers: double and single blocks of the transformer.
        width: channels of the transformer.
        context_width: channels of the embedding of K.
        rank: of the layers beside the attention modules.
        alpha: their answer is multiplied by alpha / rank.

    Raises:
        ValueError: sizes that are not positive.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        num_layers: int = 19,
        num_single_layers: int = 38,
        width: int = 3072,
        context_width: int = 768,
        rank: int = 128,
        alpha: float = 128.0,
    ) -> None:
        super().__init__()
        sizes = dict(width=width, context_width=context_width, rank=rank, alpha=alpha)
        sizes["num_layers + num_single_layers"] = num_layers + num_single_layers
        for name, size in sizes.items():
            if not size > 0:
                raise ValueError(f"{name} of a BokehAdapter must be positive, got {size!r}.")
        self.embedding_layer = nn.Sequential(
            nn.Linear(1, EMBEDDING_HIDDEN_WIDTH),
            nn.ReLU(),
            nn.Linear(EMBEDDING_HIDDEN_WIDTH, context_width),
        )
        self.adapter_modules = nn.ModuleList(
            BokehBlock(width, context_width, rank, alpha)
            for _ in range(num_layers + num_single_layers)
        )
        self._draw(None)

    @property
    def blocks(self) -> list[BokehBlock]:
        """The parameters beside each attention module: double blocks, then single ones."""
        return [block for block in self.adapter_modules if isinstance(block, BokehBlock)]

    def _embedding_linears(self) -> list[nn.Linear]:
        return [layer for layer in self.embedding_layer if isinstance(layer, nn.Linear)]

    def _draw(self, generator: torch.Generator | None) -> None:
        """Sets all parameters anew: those that are random as torch.nn.Linear draws its own."""
        for linear in self._embedding_linears():
            reach = linear.in_features**-0.5
            nn.init.uniform_(linear.weight, -reach, reach, generator=generator)
            nn.init.uniform_(linear.bias, -reach, reach, generator=generator)
        for block in self.blocks:
            for layer in block.layers():
                layer.reset(generator)

    @classmethod
    def for_transformer(
        cls,
        transformer: FluxTransformer2DModel,
        *,
        rank: int = 128,
        alpha: float | None = None,
        context_width: int = 768,
        generator: torch.Generator | None = None,
    ) -> BokehAdapter:
        """A fresh adapter of the size that fits a transformer, in float32 on its device.

        Args:
            transformer: a FLUX transformer; it stays as it is until :meth:`install`.
            rank: of the layers beside the attention modules.
            alpha: see the class; None is the rank.
            context_width: channels of the embedding of K.
            generator: where the random numbers come from (a CPU generator); None is torch's own.

        Raises:
            ValueError: not a FLUX transformer, or sizes that are not positive.
        """
        num_layers, num_single_layers, width = flux_sizes(transformer)
        # Without numbers at first: torch's own generator is not touched where another is given.
        with torch.device("meta"):
            adapter = cls(
                num_layers=num_layers,
                num_single_layers=num_single_layers,
                width=width,
                context_width=context_width,
                rank=rank,
                alpha=float(rank if alpha is None else alpha),
            )
        if transformer.device.type != "meta":
            adapter.to_empty(device="cpu")
            adapter._draw(generator)
        return adapter.to(transformer.device)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, output_loading_info: bool = False, **options: Any
    ) -> Any:
        """An adapter that ``save_pretrained`` wrote; other files are for
        :func:`bokehdiff.bokeh_adapter_files.read_bokeh_adapter`.

        Args:
            pretrained_model_name_or_path: folder, or name on the Hub.
            output_loading_info: return the adapter and what diffusers says of the loading.
            options: as of ``ModelMixin.from_pretrained``.

        Raises:
            ValueError: weights that do not fit their ``config.json``.
        """
        adapter, loading = super().from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **options
        )
        name = str(pretrained_model_name_or_path)
        check_whole(loading, name, "Fetch or copy the adapter again.")
        return (adapter, loading) if output_loading_info else adapter

    def embed(self, k_normalised: Tensor) -> Tensor:
        """The embedding of blur strengths, (B, context_width), in the dtype of the adapter.

        Args:
            k_normalised: (B,), K / 30 with K in pixels times metres of the picture on which the
                network works, [1/30, 1] in training; or ``UNCONDITIONAL_STRENGTH``.

        Raises:
            ValueError: another shape, or integers.
        """
        if k_normalised.ndim != 1 or not k_normalised.is_floating_point():
            raise ValueError(
                f"k_normalised is {k_normalised.dtype} {tuple(k_normalised.shape)}; it must be "
                "floating point (B,), K / 30 for each sample."
            )
        weight = self._embedding_linears()[0].weight
        embedding: Tensor = self.embedding_layer(k_normalised[:, None].to(weight))
        return embedding

    def forward(self, k_normalised: Tensor) -> Tensor:
        """:meth:`embed`, for wrappers that watch the call of a module."""
        return self.embed(k_normalised)

    def install(self, transformer: FluxTransformer2DModel) -> None:
        """Puts the adapter beside all attention modules; a second time changes nothing.

        The transformer computes with the parameters of this adapter, on whatever device and in
        whatever dtype they are; none of them becomes its own. The attention backend stays.

        Args:
            transformer: with stock processors.

        Raises:
            ValueError: the transformer is of another size, or has other processors: another
                adapter's, or an IP-Adapter's. It is left as it was.
        """
        attentions = _attentions(transformer)
        if self.is_installed(transformer):
            return
        sizes = (self.config.num_layers, self.config.num_single_layers, self.config.width)
        wanted = flux_sizes(transformer)
        if sizes != wanted:
            raise ValueError(
                "The adapter was made for {} double and {} single blocks of {} channels; this "
                "transformer has {} and {} of {}. Load it with the base model it was trained "
                "on.".format(*sizes, *wanted)
            )
        for attention in attentions:
            if type(attention.processor) is not FluxAttnProcessor:
                what = type(attention.processor).__name__
                raise ValueError(
                    f"The transformer has processors of {what}; wanted those of stock FLUX. Call "
                    "BokehAdapter.remove(transformer) for another BokehAdapter, or "
                    "unload_ip_adapter() of the pipeline."
                )
        for attention, block in zip(attentions, self.blocks, strict=True):
            _exchange_processor(attention, BokehFluxAttnProcessor(block))

    @staticmethod
    def remove(transformer: FluxTransformer2DModel) -> None:
        """Gives the attention modules their stock processors back; without an adapter, nothing.

        It takes out whichever adapter is there. The attention backend stays.
        """
        for attention in _attentions(transformer):
            if isinstance(attention.processor, BokehFluxAttnProcessor):
                _exchange_processor(attention, FluxAttnProcessor())

    def is_installed(self, transformer: FluxTransformer2DModel) -> bool:
        """Whether this adapter, and no other, is beside all attention modules of a transformer."""
        installed = [getattr(one.processor, "block", None) for one in _attentions(transformer)]
        blocks = self.blocks
        return len(installed) == len(blocks) and all(
            one is own for one, own in zip(installed, blocks, strict=True)
        )


def flux_sizes(transformer: nn.Module) -> tuple[int, int, int]:
    """Double blocks, single blocks and channels of a FLUX transformer."""
    config = _flux(transformer).config
    width = config.num_attention_heads * config.attention_head_dim
    return config.num_layers, config.num_single_layers, width


def _flux(transformer: nn.Module) -> FluxTransformer2DModel:
    """The FLUX transformer itself, without what ``torch.compile`` puts around it."""
    inner = uncompiled(transformer)
    if not isinstance(inner, FluxTransformer2DModel):
        raise ValueError(
            f"A BokehAdapter works in a FluxTransformer2DModel, got {type(inner).__name__}."
        )
    return inner


def _attentions(transformer: nn.Module) -> list[FluxAttention]:
    """All attention modules in the order of the adapter: double blocks, then single ones."""
    flux = _flux(transformer)
    return [block.attn for block in [*flux.transformer_blocks, *flux.single_transformer_blocks]]


def _exchange_processor(attention: FluxAttention, processor: FluxAttnProcessor) -> None:
    """Sets a processor that goes on with the backend and the parallelism of the one before."""
    processor._attention_backend = attention.processor._attention_backend
    processor._parallel_config = attention.processor._parallel_config
    attention.set_processor(processor)

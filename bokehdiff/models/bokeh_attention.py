"""What one attention module of FLUX computes when it is told a blur strength K.

FLUX knows nothing of K. Beside each attention module lies a :class:`BokehBlock` of low-rank layers:
two change queries and keys, and one turns the embedding of K into something that is added to what
attention gathers. :class:`BokehFluxAttnProcessor` computes all that, as a function of its arguments
alone: what is wanted comes with each call as a :class:`BokehCondition`, so that two calls, or the
two halves of one batch, never see the K of the other. Without one it is the stock processor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

__all__ = ["BokehBlock", "BokehCondition", "BokehFluxAttnProcessor", "BokehGrounding"]

GROUNDED_BLOCKS = ("all", "single")


@dataclass(frozen=True, eq=False)
class BokehGrounding:
    """Lends samples of a batch the layout of others: grounded attention.

    Sample t with pivot p attends with the queries of p to the keys of both, and takes its own
    values: softmax(Q_p [K_t ; K_p]^T) [V_t ; V_t], after the rotary embedding.

    Args:
        pivot: (B,) integers; the index in the batch from which each sample takes its layout. A
            sample that is its own pivot computes ordinary attention. All zeros are the authors'
            image-to-image variant.
        blocks: ``"all"`` (image to image, and all of BokehDiffusion) or ``"single"`` (BokehDepth's
            text-to-image variant: only the blocks that see text and image as one stream).

    Raises:
        ValueError: other blocks, or a pivot that is no vector of indices into a batch of its
            length.
    """

    pivot: Tensor
    blocks: str = "all"

    def __post_init__(self) -> None:
        if self.blocks not in GROUNDED_BLOCKS:
            raise ValueError(
                f"blocks is {self.blocks!r}; attention is grounded in one of {GROUNDED_BLOCKS}."
            )
        pivot = self.pivot
        if not isinstance(pivot, Tensor) or pivot.dtype != torch.long or pivot.ndim != 1:
            what = (
                f"{pivot.dtype} {tuple(pivot.shape)}" if isinstance(pivot, Tensor) else f"{pivot!r}"
            )
            raise ValueError(
                f"pivot is {what}; it must be a torch.long tensor (B,), an index for each sample."
            )
        # Out of range on a GPU is an error that takes the whole process down.
        if len(pivot) and not 0 <= int(pivot.min()) <= int(pivot.max()) < len(pivot):
            raise ValueError(
                f"pivot is {pivot.tolist()}; a batch of {len(pivot)} has samples 0 to "
                f"{len(pivot) - 1}."
            )


@dataclass(frozen=True, eq=False)
class BokehCondition:
    """What the attention modules are told in one call of the transformer.

    Hand it over as ``joint_attention_kwargs={"bokeh": condition}``.

    Args:
        embedding: (B, context_width), of :meth:`BokehAdapter.embed`; B is that of the call, or 1
            for all samples alike.
        lora_scale: times what the adapter adds to queries and keys; 0 leaves them stock.
        bokeh_scale: times what K adds; 0 leaves it out.
        grounding: samples from which others take their layout; None for ordinary attention.

    Raises:
        ValueError: an embedding of another shape, a scale that is no finite number, or a grounding
            for another batch.
    """

    embedding: Tensor
    lora_scale: float = 1.0
    bokeh_scale: float = 1.0
    grounding: BokehGrounding | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.embedding, Tensor) or self.embedding.ndim != 2:
            what = (
                f"has shape {tuple(self.embedding.shape)}"
                if isinstance(self.embedding, Tensor)
                else f"is {self.embedding!r}"
            )
            raise ValueError(
                f"embedding {what}; it must be a tensor (B, context_width), as "
                "BokehAdapter.embed(k_normalised) gives."
            )
        for name in ("lora_scale", "bokeh_scale"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name} is {value!r}; it must be a finite number.")
        if self.grounding is not None and len(self.embedding) not in (
            1,
            len(self.grounding.pivot),
        ):
            raise ValueError(
                f"embedding is of {len(self.embedding)} samples and the pivot of grounding of "
                f"{len(self.grounding.pivot)}; both are of the batch of one call."
            )


class LowRankLayer(nn.Module):
    """A linear layer of two thin matrices without biases, alpha / rank up(down(x)).

    It computes in the dtype of ``down`` whatever comes in, and answers in the dtype that came in.
    """

    def __init__(self, in_width: int, out_width: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.down = nn.Linear(in_width, rank, bias=False)
        self.up = nn.Linear(rank, out_width, bias=False)
        self.scale = alpha / rank

    def reset(self, generator: torch.Generator | None) -> None:
        """Draws ``down`` from N(0, (1 / rank)^2); ``up`` becomes zero: the layer adds nothing."""
        nn.init.normal_(self.down.weight, std=1 / self.down.out_features, generator=generator)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        # Scaled where it is thin: the same product with less to read and write.
        thin = self.down(x.to(self.down.weight.dtype)) * self.scale
        answer: Tensor = self.up(thin)
        return answer.to(x.dtype)


class BokehBlock(nn.Module):
    """The parameters beside one attention module.

    ``to_k_dof`` makes the key of a cross-attention to the embedding of K. That embedding is one
    token, over which a softmax is 1 whatever the key says: the layer is in the files and in no
    result, and is not trained.
    """

    def __init__(self, width: int, context_width: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.to_k_dof = LowRankLayer(context_width, width, rank, alpha).requires_grad_(False)
        self.to_v_dof = LowRankLayer(context_width, width, rank, alpha)
        self.to_q_adp = LowRankLayer(width, width, rank, alpha)
        self.to_k_adp = LowRankLayer(width, width, rank, alpha)

    def layers(self) -> Iterator[LowRankLayer]:
        """All four."""
        yield from (self.to_k_dof, self.to_v_dof, self.to_q_adp, self.to_k_adp)


class BokehFluxAttnProcessor(FluxAttnProcessor):
    """Attention processor of FLUX that takes a :class:`BokehCondition` as keyword ``bokeh``.

    It is no ``torch.nn.Module``: the transformer whose processor it is does not own the block, so
    the transformer's parameters and files stay those of the base model.

    Args:
        block: the parameters; they stay part of the adapter that they belong to.
    """

    def __init__(self, block: BokehBlock) -> None:
        super().__init__()
        self.block = block

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        bokeh: BokehCondition | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns what the stock processor returns, in the same shapes and order.

        Args:
            attn: the module, a ``FluxAttention``.
            hidden_states: (B, tokens, width) of the image, or of text and image in single blocks.
            encoder_hidden_states: (B, text tokens, width), of the text in double blocks.
            attention_mask: as of the attention backend; None for all pairs.
            image_rotary_emb: cosines and sines (tokens, channels per head), text first.
            bokeh: the condition; None computes what the stock processor computes, bit by bit.

        Raises:
            ValueError: a condition for another batch, or a mask with grounded attention.
        """
        if bokeh is None:
            stock: Tensor | tuple[Tensor, Tensor] = super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return stock
        batch, grounding = len(hidden_states), bokeh.grounding
        if len(bokeh.embedding) not in (1, batch):
            raise ValueError(
                f"The condition is for a batch of {len(bokeh.embedding)}, and the transformer was "
                f"called with a batch of {batch}; give one embedding for each sample, or one for "
                "all."
            )
        single = encoder_hidden_states is None
        if grounding is not None and grounding.blocks == "single" and not single:
            grounding = None
        if grounding is not None and len(grounding.pivot) != batch:
            raise ValueError(
                f"The pivot of grounding is for a batch of {len(grounding.pivot)}, and the "
                f"transformer was called with a batch of {batch}."
            )
        if grounding is not None and attention_mask is not None:
            raise ValueError(
                "Grounded attention takes no attention_mask: queries of one sample see keys of two."
            )

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, attn.head_dim))

        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            projections = (attn.to_q, attn.to_k, attn.to_v)
            query, key, value = (project(hidden_states) for project in projections)
        if bokeh.lora_scale:
            query = query.add(self.block.to_q_adp(query), alpha=bokeh.lora_scale)
            key = key.add(self.block.to_k_adp(key), alpha=bokeh.lora_scale)
        query, key, value = attn.norm_q(heads(query)), attn.norm_k(heads(key)), heads(value)

        text_tokens = 0
        if encoder_hidden_states is not None:
            text_tokens = encoder_hidden_states.shape[1]
            if attn.fused_projections:
                text = attn.to_added_qkv(encoder_hidden_states).chunk(3, dim=-1)
            else:
                projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
                text = tuple(project(encoder_hidden_states) for project in projections)
            query = torch.cat([attn.norm_added_q(heads(text[0])), query], dim=1)
            key = torch.cat([attn.norm_added_k(heads(text[1])), key], dim=1)
            value = torch.cat([heads(text[2]), value], dim=1)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)

        if grounding is not None:
            pivot = grounding.pivot.to(query.device)
            query = query[pivot]
            key = torch.cat([key, key[pivot]], dim=1)
            value = torch.cat([value, value], dim=1)
        gathered = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        gathered = gathered.flatten(2).to(query.dtype)
        if bokeh.bokeh_scale:
            # Cross-attention to the one token of K: its value, whatever query and key are.
            of_strength = self.block.to_v_dof(bokeh.embedding).to(gathered.dtype)
            gathered = gathered.add(of_strength[:, None], alpha=bokeh.bokeh_scale)
        if single:
            return gathered
        of_text, of_image = gathered.split_with_sizes(
            [text_tokens, gathered.shape[1] - text_tokens], dim=1
        )
        of_image = attn.to_out[1](attn.to_out[0](of_image.contiguous()))
        return of_image, attn.to_add_out(of_text.contiguous())

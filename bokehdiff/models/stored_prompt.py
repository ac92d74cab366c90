"""The embedding of one prompt, saved as a part of a pipeline.

A pipeline that always says the same sentence needs its embedding, not the two text encoders that
made it (1.6 GB for SDXL). ``StoredPrompt`` carries the embedding through ``save_pretrained`` and
``from_pretrained`` like any other component.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin


class StoredPrompt(ModelMixin, ConfigMixin):
    """Embeddings of a fixed prompt, in the form in which SDXL's UNet takes them.

    A fresh one holds zeros: what an untrained UNet gets to see before anybody stored a sentence.

    Args:
        prompt: the sentence that was embedded, for the record.
        tokens: length of the token sequence.
        embedding_channels: channels per token (SDXL: 768 + 1280 = 2048).
        pooled_channels: channels of the pooled embedding (SDXL: 1280).
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        prompt: str = "",
        tokens: int = 77,
        embedding_channels: int = 2048,
        pooled_channels: int = 1280,
    ) -> None:
        super().__init__()
        self.prompt_embeds = torch.nn.Parameter(
            torch.zeros(1, tokens, embedding_channels), requires_grad=False
        )
        self.pooled_prompt_embeds = torch.nn.Parameter(
            torch.zeros(1, pooled_channels), requires_grad=False
        )

    @classmethod
    def from_embeddings(
        cls, prompt: str, prompt_embeds: torch.Tensor, pooled_prompt_embeds: torch.Tensor
    ) -> StoredPrompt:
        """A component that holds these embeddings.

        Args:
            prompt: the sentence they were computed from.
            prompt_embeds: (1, tokens, embedding_channels).
            pooled_prompt_embeds: (1, pooled_channels).

        Raises:
            ValueError: other shapes.
        """
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[0] != 1:
            raise ValueError(
                f"prompt_embeds has shape {tuple(prompt_embeds.shape)}; it must be (1, tokens, "
                "channels), the embedding of one prompt."
            )
        if pooled_prompt_embeds.ndim != 2 or pooled_prompt_embeds.shape[0] != 1:
            raise ValueError(
                f"pooled_prompt_embeds has shape {tuple(pooled_prompt_embeds.shape)}; it must be "
                "(1, channels), the pooled embedding of one prompt."
            )
        stored = cls(
            prompt=prompt,
            tokens=prompt_embeds.shape[1],
            embedding_channels=prompt_embeds.shape[2],
            pooled_channels=pooled_prompt_embeds.shape[1],
        )
        for name, values in (
            ("prompt_embeds", prompt_embeds),
            ("pooled_prompt_embeds", pooled_prompt_embeds),
        ):
            parameter = torch.nn.Parameter(values.detach().clone(), requires_grad=False)
            setattr(stored, name, parameter)
        return stored

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``(prompt_embeds, pooled_prompt_embeds)``: (1, tokens, channels) and (1, channels)."""
        # Offloading takes the values out of the parameters as soon as this returns.
        return self.prompt_embeds.detach(), self.pooled_prompt_embeds.detach()

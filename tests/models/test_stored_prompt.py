"""The stored embedding of a prompt comes back as it was saved."""

from __future__ import annotations

import pytest
import torch

from bokehdiff.models import StoredPrompt


def test_save_and_load(tmp_path) -> None:
    prompt_embeds, pooled = torch.rand(1, 7, 6), torch.rand(1, 5)
    stored = StoredPrompt.from_embeddings("a sentence", prompt_embeds, pooled)
    stored.save_pretrained(tmp_path)
    loaded = StoredPrompt.from_pretrained(tmp_path)
    assert loaded.config.prompt == "a sentence"
    for ours, wanted in zip(loaded(), (prompt_embeds, pooled), strict=True):
        assert torch.equal(ours, wanted)


def test_keeps_the_dtype_of_the_embeddings_and_asks_for_no_gradient() -> None:
    stored = StoredPrompt.from_embeddings("", torch.rand(1, 2, 3).half(), torch.rand(1, 4).half())
    assert stored.dtype == torch.float16
    assert not any(parameter.requires_grad for parameter in stored.parameters())


@pytest.mark.parametrize(
    ("embeds_shape", "pooled_shape", "name"),
    [
        ((2, 7, 6), (1, 5), "prompt_embeds"),
        ((7, 6), (1, 5), "prompt_embeds"),
        ((1, 7, 6), (2, 5), "pooled_prompt_embeds"),
        ((1, 7, 6), (5,), "pooled_prompt_embeds"),
    ],
)
def test_refuses_other_shapes(embeds_shape, pooled_shape, name) -> None:
    with pytest.raises(ValueError, match=f"^{name} has shape"):
        StoredPrompt.from_embeddings("", torch.rand(embeds_shape), torch.rand(pooled_shape))

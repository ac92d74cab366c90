"""Networks read from a folder of their own, from that of a pipeline, or from the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from transformers.utils import cached_file

from ..checkpoints import is_no_hub_id
from ..tensor_files import check_whole, first_line

__all__ = ["read_network"]


def read_network(
    name: str,
    kinds: Mapping[str, type[ModelMixin]],
    *,
    system: str,
    how_to_get: str,
    revision: str | None = None,
    token: str | bool | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The one network of a folder, its own or a pipeline's, or of a repository on the Hub.

    Args:
        name: the folder or repository; a pipeline has the network as its component ``model``.
        kinds: classes that it may be of, by name.
        system: what it is a network of, for messages.
        how_to_get: a sentence that tells where there are such networks, for messages.
        revision: branch, tag or commit on the Hub.
        token: of the Hub, for repositories that are not public.
        dtype: of its weights.

    Returns:
        In eval mode, without gradients; safetensors only.

    Raises:
        ValueError: nothing there, another kind of model, or one that is damaged or incomplete.
    """
    name = os.path.expanduser(name)
    if os.path.isfile(name):
        raise ValueError(f"{name!r} is a file; wanted a folder. {how_to_get}")
    if not os.path.isdir(name) and is_no_hub_id(name):
        raise ValueError(
            f"There is no folder {name!r}. Give a folder written by save_pretrained, or a name on "
            f"the Hub. {how_to_get}"
        )
    from_hub: dict[str, Any] = dict(revision=revision, token=token)
    loading = None
    try:
        inside = cached_file(
            name, "model_index.json", **from_hub, _raise_exceptions_for_missing_entries=False
        )
        folder = "" if inside is None else "model"
        config_file = cached_file(name, "config.json", subfolder=folder, **from_hub)
        kind = json.loads(Path(config_file).read_text(encoding="utf-8")).get("_class_name")
        if kind in kinds:
            model, loading = kinds[kind].from_pretrained(
                name,
                subfolder=folder or None,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **from_hub,
            )
    except (
        OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError,
    ) as error:  # fmt: skip
        raise ValueError(
            f"{name!r} could not be loaded as a network of {system} "
            f"({first_line(error).rstrip('. ')}); wanted a folder with config.json and "
            f"diffusion_pytorch_model.safetensors. {how_to_get}"
        ) from error
    if loading is None:
        wanted = " or ".join(map(repr, kinds))
        raise ValueError(f"{name!r} holds a model of type {kind!r}; wanted {wanted}. {how_to_get}")
    check_whole(loading, name, "Copy or fetch it again.")
    for tensor in (*model.parameters(), *model.buffers()):
        # Copies: tensors mapped from a file lie at any address, where products round differently.
        tensor.data = tensor.data.clone()
    return model.eval().requires_grad_(False)

"""Files of tensors, read as numbers or not at all: what would run code when read is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = [
    "check_whole",
    "first_line",
    "is_plain_tensor",
    "read_pickle",
    "read_pickled_tensors",
    "read_safetensors",
]


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, on the CPU, and what its header says.

    Raises:
        ValueError: damaged, or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            # Copies: tensors mapped from the file lie at any address, and where they do matrix
            # products round differently, so that equal weights would render unequal last bits.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged or no safetensors file ({first_line(error)}). Copy or "
            "download it again."
        ) from None


def read_pickle(path: Path) -> Any:
    """What ``torch.save`` wrote into a file, on the CPU, if it is made of tensors and plain values.

    Raises:
        ValueError: damaged, or it wants to run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Damage shows in many ways: a broken archive, a broken pickle, or one with code in it.
        raise ValueError(
            f"{str(path)!r} cannot be read as names and tensors ({first_line(error)}). Copy or "
            "download it again; a file that wants to run code when it is read is not opened."
        ) from None


def read_pickled_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a plain dictionary that ``torch.save`` wrote, by name, on the CPU.

    Raises:
        ValueError: damaged, it wants to run code, or it holds something else.
    """
    stored = read_pickle(path)
    if not isinstance(stored, dict) or not all(
        isinstance(name, str) and is_plain_tensor(value) for name, value in stored.items()
    ):
        raise ValueError(
            f"{str(path)!r} holds something other than a plain dictionary from names to tensors; "
            "save the state_dict() alone."
        )
    return {name: value.detach() for name, value in stored.items()}


def check_whole(loading: Mapping[str, Any], name: str, advice: str) -> None:
    """Raises ``ValueError`` unless every tensor of a model was there, and no other.

    Args:
        loading: what ``from_pretrained(..., output_loading_info=True)`` says.
        name: folder of the model, or its name on the Hub.
        advice: what to do, the end of the sentence.
    """
    for state in ("missing", "unexpected", "mismatched"):
        if tensors := sorted(map(str, loading[f"{state}_keys"])):
            raise ValueError(
                f"The weights of {name} do not fit its config.json: {len(tensors)} tensors are "
                f"{state}, among them {tensors[0]}; wanted a whole model. {advice}"
            )


def is_plain_tensor(value: Any) -> bool:
    """Whether it is a dense tensor that has its numbers."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta


def first_line(error: Exception) -> str:
    """What an error says, shortened to one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""Adapters for blur strength in files: the authors' layouts, BokehDiffusion's, and ours.

All hold the same tensors (:class:`bokehdiff.models.bokeh_adapter.BokehAdapter`):

- BokehDepth's ``bokeh_lora.bin``, a plain dictionary written by ``torch.save``; the same in
  safetensors; or what ``accelerate`` leaves in a folder, ``model.safetensors`` or
  ``pytorch_model.bin``. Names may lack ``adapter_modules.`` in front.
- BokehDiffusion's ``model.safetensors`` with a ``config.json``, which calls ``to_k_dof`` and
  ``to_v_dof`` ``to_k_bokeh`` and ``to_v_bokeh``.
- A folder of ``BokehAdapter.save_pretrained``.

A file is read as numbers or not at all: one that would have to run code to be read is refused.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from .checkpoints import check_tensors, is_no_hub_id
from .models.bokeh_adapter import BokehAdapter, flux_sizes
from .tensor_files import read_pickled_tensors, read_safetensors
from .whole_files import file_to_write, whole_or_not_at_all

__all__ = ["read_bokeh_adapter", "write_bokeh_adapter"]

CONFIG_FILE = "config.json"
OUR_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin", "bokeh_lora.bin")
"""Names under which others save an adapter in a folder; the first that is there is read."""

DOUBLE_BLOCKS_OF_FLUX, BLOCKS_OF_FLUX = 19, 57

_NAME = re.compile(
    r"(?:adapter_modules\.)?(?P<block>\d+)\.to_(?P<layer>k_dof|v_dof|k_bokeh|v_bokeh|q_adp|k_adp)"
    r"\.(?P<matrix>down|up)\.weight"
)
_EMBEDDING_NAME = re.compile(r"embedding_layer\.[02]\.(weight|bias)")
_BLOCK_NAME = re.compile(r"(?P<single>single_)?transformer_blocks\.\d+(\.attn(\.processor)?)?")


# -- In ------------------------------------------------------------------------------------------


def read_bokeh_adapter(
    source: str | os.PathLike[str],
    *,
    transformer: FluxTransformer2DModel | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> BokehAdapter:
    """Reads an adapter in any of the layouts.

    Sizes follow from the tensors. alpha is the rank, so that layers count as they are, unless a
    ``config.json`` in the same folder says otherwise (``lora_alpha``).

    Args:
        source: a ``.bin``, ``.pt``, ``.pth`` or ``.safetensors`` file, a folder, or ``owner/name``
            on the Hub.
        transformer: where it is going to be installed; tells which blocks are double ones. Without
            one, 57 blocks are taken for FLUX.1's 19 double and 38 single ones.
        revision: branch, tag or commit on the Hub.
        token: as of ``huggingface_hub``.

    Returns:
        The adapter on the CPU, in the dtype of the file, not yet installed.

    Raises:
        ValueError: there is nothing of that name, the file is damaged, holds code or something
            else, lacks a part of an adapter, or has tensors too many.
    """
    name = os.path.expanduser(os.fspath(source))
    path = Path(name)
    if not path.exists():
        if is_no_hub_id(name) or name.count("/") != 1:
            raise ValueError(
                f"There is no file or folder {name!r}. Give an adapter's file (bokeh_lora.bin, "
                ".safetensors), its folder, or 'owner/name' on the Hub."
            )
        path = _download(name, revision, token)
    if path.is_dir():
        if (path / OUR_WEIGHTS_FILE).is_file():
            return _read_ours(path)
        path = _weights_file(path)
    tensors = _in_our_names(_read_tensors(path), path)
    config = _config_of_others(path.parent / CONFIG_FILE)
    adapter = _empty_adapter(_sizes(tensors, config, transformer, path))
    check_tensors(tensors, _shapes(adapter), "BokehAdapter")
    adapter.load_state_dict(tensors, assign=True)
    return adapter.eval()


def _weights_file(folder: Path) -> Path:
    for name in WEIGHTS_FILES:
        if (folder / name).is_file():
            return folder / name
    inside = sorted(os.listdir(folder))
    raise ValueError(
        f"{str(folder)!r} holds no adapter; wanted one of {', '.join(WEIGHTS_FILES)}, or "
        f"{OUR_WEIGHTS_FILE} with its {CONFIG_FILE}. It has {', '.join(inside[:5]) or 'no files'}."
    )


def _read_ours(folder: Path) -> BokehAdapter:
    """A folder of ``save_pretrained``, as a whole or not at all."""
    config = _json(folder / CONFIG_FILE)
    if config is None or config.get("_class_name") != BokehAdapter.__name__:
        raise ValueError(
            f"{str(folder)!r} has a {OUR_WEIGHTS_FILE}, and no {CONFIG_FILE} of a BokehAdapter "
            "beside it. Give the folder that BokehAdapter.save_pretrained wrote."
        )
    sizes = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        adapter = _empty_adapter(sizes)
    except TypeError as error:
        raise ValueError(
            f"{str(folder / CONFIG_FILE)!r} does not describe a BokehAdapter: {error}."
        ) from None
    tensors = _read_tensors(folder / OUR_WEIGHTS_FILE)
    check_tensors(tensors, _shapes(adapter), "BokehAdapter")
    adapter.load_state_dict(tensors, assign=True)
    return adapter.eval()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """What a file holds, if that is names and tensors and nothing else."""
    return (
        read_safetensors(path)[0] if path.suffix == ".safetensors" else read_pickled_tensors(path)
    )


def _in_our_names(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter, or ValueError if others are among them or some are lacking."""
    named: dict[str, Tensor] = {}
    strangers, doubles = [], []
    for given, value in tensors.items():
        match = _NAME.fullmatch(given)
        if match is not None:
            layer = match["layer"].replace("_bokeh", "_dof")
            name = f"adapter_modules.{int(match['block'])}.to_{layer}.{match['matrix']}.weight"
        elif _EMBEDDING_NAME.fullmatch(given):
            name = given
        else:
            strangers.append(given)
            continue
        if name in named:
            doubles.append(name)
        named[name] = value
    if strangers:
        raise ValueError(
            f"{str(path)!r} holds {len(strangers)} tensors that are none of an adapter for blur "
            f"strength, among them {strangers[0]}; wanted names such as "
            "adapter_modules.0.to_v_dof.down.weight."
        )
    if doubles:
        raise ValueError(
            f"{str(path)!r} holds {len(doubles)} tensors twice under different names, among them "
            f"{doubles[0]}. Save one adapter in a file."
        )
    blocks = _blocks(named)
    if not blocks:
        raise ValueError(f"{str(path)!r} holds no layers of an adapter for blur strength.")
    for layer, part in (
        ("to_q_adp", "queries"),
        ("to_k_adp", "keys"),
        ("to_k_dof", "the key of K"),
        ("to_v_dof", "the value of K"),
    ):
        lacking = [
            block
            for block in range(max(blocks) + 1)
            if not any(f"adapter_modules.{block}.{layer}.{end}.weight" in named
                       for end in ("down", "up"))
        ]  # fmt: skip
        if lacking:
            raise ValueError(
                f"{str(path)!r} is a part of an adapter: in {len(lacking)} of {max(blocks) + 1} "
                f"blocks it lacks {layer}, the layer for {part} (the first is block "
                f"{lacking[0]}). It may have been saved without them; only whole adapters are "
                "read."
            )
    return named


def _blocks(named: Mapping[str, Tensor]) -> set[int]:
    return {int(name.split(".")[1]) for name in named if name.startswith("adapter_modules.")}


def _sizes(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    transformer: FluxTransformer2DModel | None,
    path: Path,
) -> dict[str, Any]:
    """The arguments of the BokehAdapter that these tensors make."""
    count = len(_blocks(tensors))
    first = tensors.get("adapter_modules.0.to_v_dof.down.weight", torch.empty(0))
    up = tensors.get("adapter_modules.0.to_v_dof.up.weight", torch.empty(0))
    if first.ndim != 2 or up.ndim != 2:
        raise ValueError(
            f"{str(path)!r} has no two matrices (rank, context width) and (width, rank) in "
            "adapter_modules.0.to_v_dof; it is damaged, or no adapter for blur strength."
        )
    rank, context_width = first.shape
    if config.get("lora_rank") not in (None, rank):
        raise ValueError(
            f"{str(path.parent / CONFIG_FILE)!r} speaks of lora_rank {config['lora_rank']}, and "
            f"{path.name} has rank {rank}. The two do not belong together."
        )
    alpha = config.get("lora_alpha")
    if alpha is None:
        alpha = rank
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise ValueError(
            f"{str(path.parent / CONFIG_FILE)!r} has lora_alpha {alpha!r}; wanted a positive "
            "number."
        )
    double = _double_blocks(count, config, transformer, path)
    return dict(
        num_layers=double,
        num_single_layers=count - double,
        width=up.shape[0],
        context_width=context_width,
        rank=rank,
        alpha=float(alpha),
    )


def _double_blocks(
    count: int,
    config: Mapping[str, Any],
    transformer: FluxTransformer2DModel | None,
    path: Path,
) -> int:
    """How many of the blocks are double ones: the first in the file."""
    if blocks := config.get("blocks"):
        matches = [_BLOCK_NAME.fullmatch(str(block)) for block in blocks]
        double = sum(match is not None and not match["single"] for match in matches)
        if None in matches or len(blocks) != count:
            raise ValueError(
                f"{str(path.parent / CONFIG_FILE)!r} lists {len(blocks)} blocks and {path.name} "
                f"has layers for {count}; wanted one transformer_blocks.i or "
                "single_transformer_blocks.i for each."
            )
        return double
    if transformer is not None:
        double, single, _ = flux_sizes(transformer)
        if double + single != count:
            raise ValueError(
                f"{str(path)!r} has layers for {count} attention modules; the transformer has "
                f"{double} double and {single} single blocks. Load it with the base model it was "
                "trained on."
            )
        return double
    if count != BLOCKS_OF_FLUX:
        raise ValueError(
            f"{str(path)!r} has layers for {count} attention modules, and FLUX.1 has "
            f"{BLOCKS_OF_FLUX}. Give the transformer it was trained on as transformer=."
        )
    return DOUBLE_BLOCKS_OF_FLUX


def _empty_adapter(sizes: Mapping[str, Any]) -> BokehAdapter:
    with torch.device("meta"):
        return BokehAdapter(**sizes)


def _shapes(adapter: BokehAdapter) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in adapter.state_dict().items()}


def _config_of_others(path: Path) -> dict[str, Any]:
    """What a config.json says of an adapter beside it; nothing, if it is about something else."""
    config = _json(path) or {}
    names = ("lora_rank", "lora_alpha", "blocks")
    return {name: config[name] for name in names if config.get(name) is not None}


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        values = error
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} is damaged: it is no JSON object. Copy it again.")
    return values


def _download(hub_id: str, revision: str | None, token: str | bool | None) -> Path:
    """Fetches the files of an adapter, and no others, from the Hub; returns their folder."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            hub_id,
            revision=revision,
            token=token,
            allow_patterns=[CONFIG_FILE, OUR_WEIGHTS_FILE, *WEIGHTS_FILES],
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"There is no file or folder {hub_id!r}, and no adapter of that name could be fetched "
            f"from the Hub ({reason}). A repository that is not public wants a token=."
        ) from error
    if not any(Path(folder, name).is_file() for name in (OUR_WEIGHTS_FILE, *WEIGHTS_FILES)):
        raise ValueError(
            f"{hub_id!r} on the Hub holds no adapter; wanted one of {', '.join(WEIGHTS_FILES)}, or "
            f"{OUR_WEIGHTS_FILE} with its {CONFIG_FILE}, outside its folders."
        )
    return Path(folder)


# -- Out -----------------------------------------------------------------------------------------


def write_bokeh_adapter(
    adapter: BokehAdapter, path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Writes an adapter as the authors do: one file, all names with ``adapter_modules.``.

    Their readers take alpha for the rank, so the second matrix of each layer is written multiplied
    by alpha / rank: exact for powers of two, rounded otherwise. Of a whole pipeline, or for
    ``BokehAdapter.from_pretrained``, ``save_pretrained`` writes our layout.

    Args:
        adapter: what to write; tensors are written in the dtype they have.
        path: ``bokeh_lora.bin``, or a name that ends in ``.safetensors``; it is there as a whole or
            not at all.
        overwrite: replace a file of that name.

    Raises:
        ValueError: another suffix.
        FileNotFoundError: the folder is not there.
        FileExistsError: there is such a file, and `overwrite` is off.
    """
    file = file_to_write(path, (".bin", ".safetensors"), overwrite)
    scale = adapter.config.alpha / adapter.config.rank
    tensors = {}
    for name, value in adapter.state_dict().items():
        value = torch.clone(value.cpu(), memory_format=torch.contiguous_format)
        tensors[name] = value * scale if name.endswith(".up.weight") else value
    with whole_or_not_at_all(file) as unfinished:
        if file.suffix.lower() == ".bin":
            torch.save(tensors, unfinished)
        else:
            save_file(tensors, unfinished, metadata={"format": "pt"})

"""Networks with divided space-focus attention (DSFA) in the files of their authors.

BokehDepth's checkpoints are pickles of tensors with the names of the authors' code. Here they
become :class:`~bokehdiff.models.depth_anything_dsfa.DepthAnythingDSFAForDepthEstimation`, which
``save_pretrained`` keeps as safetensors, and the reverse; those of UniDepthV2 are loaded into the
network of the ``unidepth`` package. A pickle is read without running code in it, and every tensor
must find its place.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Dinov2Config

from .checkpoints import check_tensors
from .models.depth_anything_dsfa import (
    DepthAnythingDSFAConfig,
    DepthAnythingDSFAForDepthEstimation,
)
from .models.unidepth_dsfa import PUBLISHED_OPTIONS, DSFAPixelEncoder, dsfa_around
from .tensor_files import is_plain_tensor, read_pickle
from .whole_files import file_to_write, whole_or_not_at_all

__all__ = [
    "ENCODERS",
    "depth_anything_from_official",
    "depth_anything_to_official",
    "load_unidepth_dsfa",
    "official_config",
    "read_depth_anything",
    "read_depth_anything_dsfa",
    "read_official_tensors",
    "write_depth_anything_dsfa",
]

ENCODERS: dict[str, dict[str, Any]] = {
    "vits": dict(width=384, layers=12, heads=6, features=64, channels=[48, 96, 192, 384]),
    "vitb": dict(width=768, layers=12, heads=12, features=128, channels=[96, 192, 384, 768]),
    "vitl": dict(width=1024, layers=24, heads=16, features=256, channels=[256, 512, 1024, 1024]),
    "vitg": dict(width=1536, layers=40, heads=24, features=384, channels=[1536] * 4),
}
"""Sizes of the four Depth Anything V2: of the backbone, then channels of the DPT head."""

OUT_INDICES = {
    "vits": [3, 6, 9, 12],
    "vitb": [3, 6, 9, 12],
    "vitl": [5, 12, 18, 24],
    "vitg": [10, 20, 30, 40],
}
"""Layers of the backbone whose tokens the head takes, counted from 1."""

PUBLISHED_MAX_DEPTH = 80
"""Metres, of the published checkpoints that say nothing else."""

CONFIG_KEY = "bokehdiff"
"""Entry beside the tensors, in files written here, with the configuration of the network."""

_PARTS = "weight|bias"
_BLOCK = r"backbone\.encoder\.layer\.(\d+)\."
_REFINE = r"neck\.fusion_stage\.layers\.(\d)\."

_NAMES: tuple[tuple[str, str], ...] = (
    (r"backbone\.embeddings\.(cls_token|mask_token)", r"pretrained.\1"),
    (r"backbone\.embeddings\.position_embeddings", "pretrained.pos_embed"),
    (
        rf"backbone\.embeddings\.patch_embeddings\.projection\.({_PARTS})",
        r"pretrained.patch_embed.proj.\1",
    ),
    (rf"{_BLOCK}(norm[12]|mlp\.fc[12])\.({_PARTS})", r"pretrained.blocks.\1.\2.\3"),
    (
        rf"{_BLOCK}attention\.(?:attention\.)?(?:q_proj|query)\.({_PARTS})",
        r"pretrained.blocks.\1.attn.qkv.\2 0/3",
    ),
    (
        rf"{_BLOCK}attention\.(?:attention\.)?(?:k_proj|key)\.({_PARTS})",
        r"pretrained.blocks.\1.attn.qkv.\2 1/3",
    ),
    (
        rf"{_BLOCK}attention\.(?:attention\.)?(?:v_proj|value)\.({_PARTS})",
        r"pretrained.blocks.\1.attn.qkv.\2 2/3",
    ),
    (
        rf"{_BLOCK}attention\.(?:o_proj|output\.dense)\.({_PARTS})",
        r"pretrained.blocks.\1.attn.proj.\2",
    ),
    (rf"{_BLOCK}layer_scale([12])\.lambda1", r"pretrained.blocks.\1.ls\2.gamma"),
    (rf"{_BLOCK}mlp\.gate_proj\.({_PARTS})", r"pretrained.blocks.\1.mlp.w12.\2 0/2"),
    (rf"{_BLOCK}mlp\.up_proj\.({_PARTS})", r"pretrained.blocks.\1.mlp.w12.\2 1/2"),
    (rf"{_BLOCK}mlp\.weights_in\.({_PARTS})", r"pretrained.blocks.\1.mlp.w12.\2"),
    (rf"{_BLOCK}mlp\.(?:down_proj|weights_out)\.({_PARTS})", r"pretrained.blocks.\1.mlp.w3.\2"),
    (rf"backbone\.layernorm\.({_PARTS})", r"pretrained.norm.\1"),
    (
        rf"neck\.reassemble_stage\.layers\.(\d)\.projection\.({_PARTS})",
        r"depth_head.projects.\1.\2",
    ),
    (
        rf"neck\.reassemble_stage\.layers\.(\d)\.resize\.({_PARTS})",
        r"depth_head.resize_layers.\1.\2",
    ),
    (rf"head\.conv1\.({_PARTS})", r"depth_head.scratch.output_conv1.\1"),
    (rf"head\.conv2\.({_PARTS})", r"depth_head.scratch.output_conv2.0.\1"),
    (rf"head\.conv3\.({_PARTS})", r"depth_head.scratch.output_conv2.2.\1"),
    (
        rf"fusion\.blocks\.(\d+)\.focus_film\.({_PARTS})",
        r"encoder_fusion.layers.\1.block.focus_film.0.\2",
    ),
    (r"fusion\.blocks\.(\d+)\.(.+)", r"encoder_fusion.layers.\1.block.\2"),
)
"""Our names, as patterns, and the authors'; "0/3" is the first third of the rows of a tensor."""


def _place(name: str) -> tuple[str, int, int]:
    """The authors' name of one of our tensors, and which of how many equal parts of it ours is."""
    if match := re.fullmatch(r"neck\.convs\.(\d)\.weight", name):
        return f"depth_head.scratch.layer{int(match[1]) + 1}_rn.weight", 0, 1
    if match := re.fullmatch(rf"{_REFINE}projection\.({_PARTS})", name):
        return f"depth_head.scratch.refinenet{4 - int(match[1])}.out_conv.{match[2]}", 0, 1
    if match := re.fullmatch(
        rf"{_REFINE}residual_layer([12])\.convolution([12])\.({_PARTS})", name
    ):
        layer, unit, convolution, part = match.groups()
        return (
            f"depth_head.scratch.refinenet{4 - int(layer)}.resConfUnit{unit}.conv{convolution}."
            f"{part}",
            0,
            1,
        )
    for pattern, theirs in _NAMES:
        if match := re.fullmatch(pattern, name):
            official, _, share = match.expand(theirs).partition(" ")
            index, _, count = (share or "0/1").partition("/")
            return official, int(index), int(count)
    raise ValueError(
        f"{name!r} is no tensor of a Depth Anything with a DINOv2 backbone; this version of "
        "transformers may name it otherwise."
    )


def depth_anything_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of our network, or of a plain Depth Anything, under the authors' names.

    Raises:
        ValueError: a tensor that the authors' network does not have.
    """
    parts: dict[str, dict[int, Tensor]] = {}
    for name, value in state.items():
        official, index, _ = _place(name)
        parts.setdefault(official, {})[index] = value
    return {
        name: torch.cat([pieces[index] for index in sorted(pieces)])
        if len(pieces) > 1
        else pieces[0]
        for name, pieces in parts.items()
    }


def depth_anything_from_official(
    tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The authors' tensors under our names.

    Args:
        tensors: with the authors' names, all of them.
        state: of the network they are for, of which names and shapes are looked at.

    Raises:
        ValueError: a tensor too many, too few, or of another shape.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    for name, value in state.items():
        official, _, count = _place(name)
        wanted[official] = (count * value.shape[0], *value.shape[1:]) if value.ndim else ()
    check_tensors(tensors, wanted, "Depth Anything with DSFA")
    ours = {}
    for name in state:
        official, index, count = _place(name)
        ours[name] = tensors[official].chunk(count)[index]
    return ours


def official_config(encoder: str = "vitl", **options: Any) -> DepthAnythingDSFAConfig:
    """The configuration of a published Depth Anything V2 with DSFA.

    K is taken as it is, and the scales of attention are those of the training on CUDA, where both
    are "double"; ``backbone_attention_scale="single"`` is what the authors' program for single
    pictures does. Which of them published weights want is worth a test on a picture of known depth.

    Args:
        encoder: one of :data:`ENCODERS`.
        options: of :class:`DepthAnythingDSFAConfig`, in place of the published.

    Raises:
        ValueError: another encoder, or a ``max_depth`` that is no whole number of metres.
    """
    if encoder not in ENCODERS:
        raise ValueError(f"encoder is {encoder!r}; wanted one of {', '.join(ENCODERS)}.")
    sizes = ENCODERS[encoder]
    values: dict[str, Any] = dict(
        backbone_config=Dinov2Config(
            hidden_size=sizes["width"],
            num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"],
            image_size=518,
            patch_size=14,
            use_swiglu_ffn=encoder == "vitg",
            out_indices=OUT_INDICES[encoder],
            apply_layernorm=True,
            reshape_hidden_states=False,
        ),
        reassemble_hidden_size=sizes["width"],
        neck_hidden_sizes=sizes["channels"],
        fusion_hidden_size=sizes["features"],
        depth_estimation_type="metric",
        max_depth=PUBLISHED_MAX_DEPTH,
        space_attention_scale="double",
        backbone_attention_scale="double",
        interpolate_offset=0.1,
        largest_strength=1.0,
        initial_gate=0.1,
    )
    values |= options
    values["max_depth"] = _whole_metres(values["max_depth"])
    return DepthAnythingDSFAConfig(**values)


def _whole_metres(depth: Any) -> int:
    """max_depth as transformers wants it, which refuses 80.0."""
    if not isinstance(depth, (int, float)) or depth < 1 or not float(depth).is_integer():
        raise ValueError(
            f"max_depth is {depth!r}; wanted a whole number of metres, of 1 or more: transformers "
            "stores an int."
        )
    return int(depth)


# -- In ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _paths_allowed() -> Iterator[None]:
    """Lets ``torch.load`` read paths, which the authors' arguments hold, and nothing else besides.

    As pure paths: those cannot touch a disk, and a path of Windows can be read elsewhere. Versions
    of Python write them under different modules.
    """
    kinds = {
        "PosixPath": pathlib.PurePosixPath,
        "PurePosixPath": pathlib.PurePosixPath,
        "WindowsPath": pathlib.PureWindowsPath,
        "PureWindowsPath": pathlib.PureWindowsPath,
    }
    allowed: list[Any] = [
        (kind, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name, kind in kinds.items()
    ]
    with torch.serialization.safe_globals(allowed):
        yield


def _read_pickle(path: Path) -> dict[str, Any]:
    """What ``torch.save`` wrote, if it is a dictionary and holds no code."""
    if not path.is_file():
        raise ValueError(
            f"There is no file {str(path)!r}. Give a checkpoint that torch.save wrote."
        )
    with _paths_allowed():
        stored = read_pickle(path)
    if not isinstance(stored, dict):
        raise ValueError(f"{str(path)!r} holds a {type(stored).__name__}; wanted a dictionary.")
    return stored


def _tensors_of(stored: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The network's tensors, without what comes of training on several devices."""
    for entry in ("model", "state_dict"):
        if isinstance(stored.get(entry), dict):
            stored = stored[entry]
            break
    tensors: dict[str, Tensor] = {}
    for name, value in stored.items():
        if not isinstance(name, str) or not is_plain_tensor(value):
            raise ValueError(
                f"{str(path)!r} holds {name!r}, a {type(value).__name__}, among the tensors of the "
                "network; wanted dense tensors alone, under 'model', under 'state_dict' or by "
                "themselves."
            )
        short = name.removeprefix("module.")
        if short in tensors:
            raise ValueError(f"{str(path)!r} holds {short!r} with and without 'module.' before it.")
        tensors[short] = value.detach()
    return tensors


def read_official_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint of BokehDepth, on the CPU, under the authors' names.

    A moving average of the parameters (``ema``) takes their place if it has as many tensors as the
    network; otherwise it is left out, as the authors do. A ``module.`` that names begin with goes.

    Raises:
        ValueError: a file that is missing, damaged, would run code, or holds something else.
    """
    path = Path(path)
    stored = _read_pickle(path)
    tensors = _tensors_of(stored, path)
    average = stored.get("ema")
    shadows = average.get("shadow_params") if isinstance(average, dict) else None
    if isinstance(shadows, (list, tuple)) and len(shadows) == len(tensors):
        for (name, value), shadow in zip(tensors.items(), shadows, strict=True):
            if not isinstance(shadow, Tensor) or shadow.shape != value.shape:
                raise ValueError(
                    f"The moving average in {str(path)!r} does not fit {name!r}: it has the shape "
                    f"{tuple(getattr(shadow, 'shape', ()))}, wanted {tuple(value.shape)}."
                )
            tensors[name] = shadow.detach()
    return tensors


def read_depth_anything_dsfa(
    path: str | os.PathLike[str], config: DepthAnythingDSFAConfig | None = None
) -> DepthAnythingDSFAForDepthEstimation:
    """The network of a checkpoint of BokehDepth, or of :func:`write_depth_anything_dsfa`.

    Keep it with ``save_pretrained``, and this is needed once.

    Args:
        path: ``DAV2_dsfa_release.pth``, or a checkpoint of the authors' training.
        config: of the network. By default the one that the file was written with here; else
            :func:`official_config` of the encoder that has the width of the tensors, with the
            ``max_depth`` that the arguments of the authors' training name.

    Returns:
        The network on the CPU, in evaluation mode, in the dtype of the file.

    Raises:
        ValueError: a file that is damaged, would run code, or does not fit.
    """
    path = Path(path)
    stored = _read_pickle(path)
    tensors = _tensors_of(stored, path)
    levels = sorted(
        {
            int(match[1])
            for name in tensors
            if (match := re.match(r"encoder_fusion\.layers\.(\d+)\.", name))
        }
    )
    if not levels:
        raise ValueError(
            f"{str(path)!r} holds no DSFA blocks. read_depth_anything reads a plain Depth Anything "
            "V2."
        )
    if config is None:
        written = stored.get(CONFIG_KEY)
        if isinstance(written, dict):
            config = DepthAnythingDSFAConfig.from_dict(written)
        else:
            config = official_config(
                _encoder_of(tensors, path),
                fusion_levels=levels,
                max_depth=_max_depth_of(stored),
            )
    return _network_of(tensors, config)


def read_depth_anything(
    path: str | os.PathLike[str], encoder: str | None = None, **options: Any
) -> DepthAnythingDSFAForDepthEstimation:
    """A plain Depth Anything V2 in its authors' file, with fresh DSFA blocks.

    Args:
        path: a checkpoint such as ``depth_anything_v2_metric_vkitti_vitl.pth``.
        encoder: one of :data:`ENCODERS`; by default the one that has the width of the tensors.
        options: of :class:`DepthAnythingDSFAConfig`, in place of its defaults, which make a network
            that starts as exactly this Depth Anything; ``max_depth`` is 80 for outdoor weights
            (the default) and 20 for indoor weights.

    Returns:
        The network on the CPU, in evaluation mode, in the dtype of the file.

    Raises:
        ValueError: a file that is damaged, would run code, or does not fit.
    """
    path = Path(path)
    tensors = _tensors_of(_read_pickle(path), path)
    if any(name.startswith("encoder_fusion.") for name in tensors):
        raise ValueError(
            f"{str(path)!r} holds DSFA blocks, which read_depth_anything_dsfa reads with the rest."
        )
    defaults = DepthAnythingDSFAConfig()
    ours = {name: getattr(defaults, name) for name in _FRESH}
    config = official_config(encoder or _encoder_of(tensors, path), **{**ours, **options})
    return _network_of(tensors, config, fresh_fusion=True)


def load_unidepth_dsfa(model: Any, path: str | os.PathLike[str]) -> None:
    """Loads ``UDv2_dsfa_release.pth`` into a UniDepthV2, which gets DSFA if it has none.

    Args:
        model: a ``unidepth.models.UniDepthV2`` of the size of the weights, with or without DSFA.
            Without, its encoder becomes a
            :class:`~bokehdiff.models.unidepth_dsfa.DSFAPixelEncoder` with the published options.
        path: the checkpoint; its moving average, if it has one that fits, is what is loaded.

    Raises:
        ValueError: a file that is damaged, would run code, or does not fit; the model is then as it
            was.
    """
    tensors = read_official_tensors(path)
    encoder = model.pixel_encoder
    if not isinstance(encoder, DSFAPixelEncoder):
        encoder = dsfa_around(model, **PUBLISHED_OPTIONS)
    state = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith("pixel_encoder.")
    }
    state |= {f"pixel_encoder.{name}": value for name, value in encoder.state_dict().items()}
    names = {
        unidepth_to_official(name, encoder.fusion.levels): name
        for name in state
        if not name.endswith(".log_alibi_scale")
    }
    shapes = {official: tuple(state[name].shape) for official, name in names.items()}
    check_tensors(tensors, shapes, "UniDepthV2 with DSFA")
    model.pixel_encoder = encoder
    model.load_state_dict({names[name]: value for name, value in tensors.items()}, strict=False)


def unidepth_to_official(name: str, levels: Sequence[int]) -> str:
    """The authors' name of a tensor of a UniDepthV2 with DSFA, whose blocks they count by stage."""
    if match := re.fullmatch(r"(pixel_encoder\.fusion)\.blocks\.(\d+)\.(.+)", name):
        return f"{match[1]}_blocks.{levels.index(int(match[2]))}.{match[3]}"
    return name


_FRESH = ("space_attention_scale", "backbone_attention_scale", "largest_strength", "initial_gate")
"""Options in which weights without DSFA follow the defaults, not what is published with DSFA."""


def _encoder_of(tensors: Mapping[str, Tensor], path: Path) -> str:
    token = tensors.get("pretrained.cls_token")
    width = token.shape[-1] if token is not None and token.ndim else None
    for name, sizes in ENCODERS.items():
        if sizes["width"] == width:
            return name
    raise ValueError(
        f"{str(path)!r} is "
        + (
            "no Depth Anything V2: it has no pretrained.cls_token."
            if width is None
            else f"of no published size: its tokens have {width} channels. Give its config."
        )
    )


def _max_depth_of(stored: Mapping[str, Any]) -> Any:
    arguments = stored.get("args")
    depth = arguments.get("max_depth") if isinstance(arguments, dict) else None
    return PUBLISHED_MAX_DEPTH if depth is None else depth


def _network_of(
    tensors: Mapping[str, Tensor], config: DepthAnythingDSFAConfig, fresh_fusion: bool = False
) -> DepthAnythingDSFAForDepthEstimation:
    network = DepthAnythingDSFAForDepthEstimation(config)
    # A scale that is to be learned is no tensor of the authors; it starts at the configuration's.
    state = {
        name: value
        for name, value in network.state_dict().items()
        if not name.endswith(".log_alibi_scale")
        and not (fresh_fusion and name.startswith("fusion."))
    }
    ours = depth_anything_from_official(tensors, state)
    network.to(next(iter(ours.values())).dtype).load_state_dict(ours, strict=False)
    return network.eval()


# -- Out -----------------------------------------------------------------------------------------


@torch.no_grad()
def write_depth_anything_dsfa(
    network: DepthAnythingDSFAForDepthEstimation,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> None:
    """Writes a network as a checkpoint that the authors' code loads; the file appears whole.

    Their code takes K as it is: ``largest_strength`` goes into the weights and into
    ``alibi_scale``, exactly if it is a power of two, else but for rounding. The file also holds the
    configuration that goes with it, under ``"bokehdiff"``; what of it differs from
    :func:`official_config`, as ``alibi_scale`` does, the authors' network has to be built with.

    Args:
        network: what to write, in the dtype it has.
        path: ends in ``.pth`` or ``.pt``.
        overwrite: replace a file that is there.

    Raises:
        ValueError: learned scales of the bias that differ between levels, of which the authors'
            network has one; or another suffix.
        FileExistsError: the file is there already.
    """
    file = file_to_write(path, (".pth", ".pt"), overwrite)
    config = network.config
    scales = {
        level: float(network.fusion.block(level).alibi_scale) for level in network.fusion.levels
    }
    if not all(math.isclose(scale, min(scales.values())) for scale in scales.values()):
        raise ValueError(
            f"The levels have learned the scales {scales} for the bias of attention; the authors' "
            "network has one for all. Keep this network with save_pretrained."
        )
    state = {
        name: value.detach().cpu().clone()
        for name, value in network.state_dict().items()
        if not name.endswith(".log_alibi_scale")
    }
    for level in scales:
        state[f"fusion.blocks.{level}.k_embed.0.weight"] /= config.largest_strength
    values = config.to_dict()
    values.update(
        alibi_scale=min(scales.values()) / config.largest_strength,
        learn_alibi_scale=False,
        largest_strength=1.0,
    )
    with whole_or_not_at_all(file) as unfinished:
        torch.save(
            {"model": depth_anything_to_official(state), CONFIG_KEY: values},
            unfinished,
        )

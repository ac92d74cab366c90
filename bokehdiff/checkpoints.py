"""Trained weights of BokehDiff in files: adapters of the UNet, parts of the codec, settings.

Two layouts, told apart when reading:

- ``diffusers``: ``pytorch_lora_weights.safetensors`` with names that begin with ``unet.``, and
  ``vae.`` for adapters of the codec, of which stock SDXL pipelines load the UNet's half; trained
  parameters of the codec in ``vae_encoder.safetensors``.
- ``official``, the authors': the same first file with names that have no prefix; trained parameters
  of the codec in ``vae.ckpt``, a plain dictionary written by ``torch.save``.

The header of the first file says how the adapters are scaled (``lora_adapter_metadata``, as
diffusers writes it) and, as ``bokehdiff``, for which settings of the pipeline the weights were
trained and which file holds the codec. A file that says nothing is taken for the authors'.

``BokehDiffPipeline.load_bokeh_weights`` and ``save_bokeh_weights`` are the way in and out of a
pipeline.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor, nn

from .attention import DEFAULT_PISA_LAYERS, PisaConfig
from .tensor_files import first_line, read_pickled_tensors, read_safetensors
from .whole_files import whole_or_not_at_all

LORA_FILE = "pytorch_lora_weights.safetensors"
VAE_FILE = "vae_encoder.safetensors"
OFFICIAL_VAE_FILE = "vae.ckpt"
LAYOUTS = ("diffusers", "official")

SETTINGS_KEY = "bokehdiff"
"""Entry of the header of ``LORA_FILE`` with the settings, as JSON."""

SETTINGS = ("pisa", "timestep", "prompt", "pisa_layers")
"""Values in the configuration of a pipeline that go with weights."""

BOKEH_PROMPT = "an excellent photo with a large aperture"
BOKEH_TIMESTEP = 499
BOKEH_PISA_LAYERS = ",".join(DEFAULT_PISA_LAYERS)

UNET_LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
    "time_emb_proj",
)
"""Endings of the names of the UNet's layers in which the authors trained adapters."""

VAE_TRAINED_PARTS = ("encoder.conv_in", "encoder.mid_block", "encoder.conv_out")
"""Parts of the codec that are trained; all parameters in them, or adapters of layers in them."""

BASE_MODEL_ADVICE = (
    "Load them onto the base model they were trained on; for adapters that are not BokehDiff's "
    "there is load_lora_weights."
)

_VAE_FILE_ENTRY = "vae_file"
_LORA_NAME = re.compile(
    r"(?:base_model\.model\.)?(?:(?P<part>unet|vae)\.)?(?:base_model\.model\.)?(?P<layer>.+)\."
    r"(?:lora_A|lora_down|lora\.down|(?P<up>lora_B|lora_up|lora\.up))(?:\.[^.]+)?\.weight"
)


@dataclass
class BokehWeights:
    """What a training of BokehDiff leaves, in one spelling of the names.

    Args:
        unet_lora: adapters of the UNet, ``"mid_block.resnets.0.conv1.lora_A.weight"``: for a layer
            with weights (out, in) A is (rank, in) and B (out, rank); for a convolution (out, in, h,
            w) they are (rank, in, h, w) and (out, rank, 1, 1).
        vae: parameters of the codec that replace those it has, ``"encoder.conv_in.weight"``: all in
            ``VAE_TRAINED_PARTS``, or none.
        vae_lora: adapters of the codec, or none.
        unet_lora_config, vae_lora_config: how the adapters are made and scaled, values of peft's
            ``LoraConfig.to_dict()``. Without them B A is added as it is (alpha = rank).
        settings: configuration of the pipeline the weights were trained for, some of ``SETTINGS``.
    """

    unet_lora: dict[str, Tensor]
    vae: dict[str, Tensor]
    vae_lora: dict[str, Tensor]
    unet_lora_config: dict[str, Any] | None
    vae_lora_config: dict[str, Any] | None
    settings: dict[str, Any]


def official_settings() -> dict[str, Any]:
    """The settings of the weights that the authors published."""
    return {
        "pisa": PisaConfig.preset("official_weights").to_dict(),
        "timestep": BOKEH_TIMESTEP,
        "prompt": BOKEH_PROMPT,
        "pisa_layers": BOKEH_PISA_LAYERS,
    }


# -- Out -----------------------------------------------------------------------------------------


def write_bokeh_weights(
    weights: BokehWeights, folder: str | os.PathLike[str], layout: str = "diffusers"
) -> None:
    """Writes weights into a folder, which is made; each file is there as a whole or not at all.

    Files of an earlier set in the same folder are replaced or removed.

    Args:
        weights: what to write; tensors are written in the dtype they have.
        folder: where to.
        layout: ``"diffusers"`` or ``"official"``. The authors' layout has no place for alpha, so B
            is written multiplied by alpha / rank: exact for powers of two, rounded otherwise.

    Raises:
        ValueError: weights that the layout cannot hold, or that would not be read back.
    """
    folder = Path(folder)
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; it must be one of {LAYOUTS}.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file. Weights are written into a folder.")
    if not weights.unet_lora:
        raise ValueError("There are no adapters of the UNet, so there is nothing to load later.")
    for tensors in (weights.unet_lora, weights.vae_lora):
        odd = [name for name in tensors if _place(name) != ("unet", name)]
        if odd:
            raise ValueError(
                f"Names of adapter tensors end in .lora_A.weight or .lora_B.weight, without prefix "
                f"and adapter name, as peft's get_peft_model_state_dict gives them. Got "
                f"{_some(odd)}."
            )
    for values in (weights.unet_lora_config, weights.vae_lora_config):
        if values is not None:
            lora_config(values)
    check_setting_names(weights.settings)

    unet_lora, unet_lora_config = weights.unet_lora, weights.unet_lora_config
    metadata = {"format": "pt"}
    if layout == "official":
        if weights.vae_lora:
            raise ValueError(
                "The authors' layout has no place for adapters of the codec. Write layout "
                "'diffusers', or merge the adapters into the parameters of the codec and give "
                "those as BokehWeights.vae."
            )
        if unet_lora_config is not None:
            unet_lora, unet_lora_config = _with_alpha_in_b(unet_lora, unet_lora_config)
        tensors = dict(unet_lora)
        adapter_metadata = dict(unet_lora_config or {})
    else:
        tensors = {f"unet.{name}": value for name, value in unet_lora.items()}
        tensors |= {f"vae.{name}": value for name, value in weights.vae_lora.items()}
        adapter_metadata = {
            f"unet.{name}": value for name, value in (unet_lora_config or {}).items()
        }
        adapter_metadata |= {
            f"vae.{name}": value for name, value in (weights.vae_lora_config or {}).items()
        }
    vae_file = None
    if weights.vae:
        vae_file = VAE_FILE if layout == "diffusers" else OFFICIAL_VAE_FILE
    if adapter_metadata:
        metadata[LORA_ADAPTER_METADATA_KEY] = _as_json(adapter_metadata)
    metadata[SETTINGS_KEY] = _as_json({**weights.settings, _VAE_FILE_ENTRY: vae_file})

    folder.mkdir(parents=True, exist_ok=True)
    if vae_file is not None:
        vae = _copies(weights.vae)
        with whole_or_not_at_all(folder / vae_file) as unfinished:
            if layout == "diffusers":
                save_file(vae, unfinished, metadata={"format": "pt"})
            else:
                torch.save(vae, unfinished)
    with whole_or_not_at_all(folder / LORA_FILE) as unfinished:
        save_file(_copies(tensors), unfinished, metadata=metadata)
    for stale in {VAE_FILE, OFFICIAL_VAE_FILE} - {vae_file}:
        (folder / stale).unlink(missing_ok=True)


def _with_alpha_in_b(
    tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same adapters for readers that take alpha for the rank: B times alpha / rank."""
    config = lora_config(values)
    scaled = dict(tensors)
    for name, value in tensors.items():
        layer, _, matrix = name.rpartition(".lora_")
        if matrix == "B.weight":
            rank = value.shape[1]
            alphas = config.alpha_pattern
            alpha = alphas.get(get_pattern_key(list(alphas), layer), config.lora_alpha)
            scaled[name] = value * (alpha / (math.sqrt(rank) if config.use_rslora else rank))
    unscaled = {"lora_alpha": config.r, "alpha_pattern": config.rank_pattern, "use_rslora": False}
    return scaled, {**values, **unscaled}


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of their own, since a view would be written with all that it looks at."""
    return {
        name: torch.clone(value.detach().cpu(), memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }


def _as_json(values: Mapping[str, Any]) -> str:
    plain = {
        name: sorted(value) if isinstance(value, set) else value for name, value in values.items()
    }
    return json.dumps(plain, indent=2, sort_keys=True)


# -- In ------------------------------------------------------------------------------------------


def read_bokeh_weights(folder: str | os.PathLike[str]) -> BokehWeights:
    """Reads weights in either layout.

    Names of adapter tensors may begin with ``unet.``, ``vae.`` and ``base_model.model.``, may carry
    the name of an adapter, and may say ``lora.down``, ``lora.up``, ``lora_down`` and ``lora_up``
    for A and B.

    Args:
        folder: what :func:`write_bokeh_weights` wrote, or the two files of the authors.

    Returns:
        The weights on the CPU, in the dtype of the files. Those of the authors carry
        :func:`official_settings` and a configuration that names the layers they trained.

    Raises:
        ValueError: a file that is missing, damaged, or holds something else.
    """
    folder = Path(folder)
    path = folder / LORA_FILE
    if not path.is_file():
        inside = sorted(os.listdir(folder)) if folder.is_dir() else []
        raise ValueError(
            f"{str(folder)!r} holds no trained weights: it has no {LORA_FILE} "
            f"({'it has ' + _some(inside) if inside else 'it is empty or no folder'})."
        )
    tensors, header = read_safetensors(path)
    placed: dict[str, dict[str, Tensor]] = {"unet": {}, "vae": {}}
    strangers, doubles = [], []
    for given_name, value in tensors.items():
        place = _place(given_name)
        if place is None:
            strangers.append(given_name)
        elif place[1] in placed[place[0]]:
            doubles.append(given_name)
        else:
            placed[place[0]][place[1]] = value
    if strangers:
        raise ValueError(
            f"{str(path)!r} holds tensors that are no adapters of UNet or codec: "
            f"{_some(strangers)}. Names end in .lora_A.weight or .lora_B.weight."
        )
    if doubles:
        raise ValueError(
            f"{str(path)!r} holds more than one adapter for a layer: {_some(doubles)}. Save one "
            "adapter in a file."
        )
    if not placed["unet"]:
        raise ValueError(f"{str(path)!r} holds no adapters of the UNet.")
    configs = _adapter_configs(header, path)

    if SETTINGS_KEY in header:
        settings = _from_json(header[SETTINGS_KEY], SETTINGS_KEY, path)
        vae_file = settings.pop(_VAE_FILE_ENTRY, None)
        check_setting_names(settings, str(path))
    else:
        settings, vae_file = official_settings(), OFFICIAL_VAE_FILE
        if not configs["unet"]:
            rank = _config_of_shapes(placed["unet"]).r
            targets = list(UNET_LORA_TARGETS)
            configs["unet"] = {"r": rank, "lora_alpha": rank, "target_modules": targets}
    return BokehWeights(
        unet_lora=placed["unet"],
        vae=_read_vae(folder, vae_file),
        vae_lora=placed["vae"],
        unet_lora_config=configs["unet"] or None,
        vae_lora_config=configs["vae"] or None,
        settings=settings,
    )


def _place(name: str) -> tuple[str, str] | None:
    """("unet" or "vae", the name of an adapter's tensor in our spelling), or None."""
    match = _LORA_NAME.fullmatch(name)
    if match is None:
        return None
    matrix = "lora_B" if match["up"] else "lora_A"
    return match["part"] or "unet", f"{match['layer']}.{matrix}.weight"


def _adapter_configs(header: Mapping[str, str], path: Path) -> dict[str, dict[str, Any]]:
    """Configurations by part; those without a prefix are the UNet's, as its tensors are."""
    configs: dict[str, dict[str, Any]] = {"unet": {}, "vae": {}}
    if LORA_ADAPTER_METADATA_KEY in header:
        values = _from_json(header[LORA_ADAPTER_METADATA_KEY], LORA_ADAPTER_METADATA_KEY, path)
        for name, value in values.items():
            part, _, entry = name.partition(".")
            if part in configs and entry:
                configs[part][entry] = value
            else:
                configs["unet"][name] = value
    return configs


def _read_vae(folder: Path, vae_file: str | None) -> dict[str, Tensor]:
    """The parameters in the one file of the codec that belongs to the set, if any does."""
    if vae_file not in (None, VAE_FILE, OFFICIAL_VAE_FILE):
        raise ValueError(
            f"{str(folder / LORA_FILE)!r} names {vae_file!r} as the file of the codec; known are "
            f"{VAE_FILE} and {OFFICIAL_VAE_FILE}."
        )
    for other in (VAE_FILE, OFFICIAL_VAE_FILE):
        if other != vae_file and (folder / other).exists():
            raise ValueError(
                f"{str(folder / other)!r} does not belong to the {LORA_FILE} beside it, which "
                f"{'goes with ' + vae_file if vae_file else 'goes without'}. Remove it, or keep "
                "the two files of one training together."
            )
    if vae_file is None:
        return {}
    path = folder / vae_file
    if not path.is_file():
        raise ValueError(
            f"{str(folder)!r} lacks {vae_file}, the trained parameters of the codec, which go with "
            f"its {LORA_FILE}. Copy or download both."
        )
    return read_safetensors(path)[0] if vae_file == VAE_FILE else read_pickled_tensors(path)


def _from_json(text: str, entry: str, path: Path) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        values = error
    if not isinstance(values, dict):
        raise ValueError(f"The header of {str(path)!r} is damaged: {entry} is no JSON object.")
    return values


def download_bokeh_weights(
    hub_id: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Fetches the files of a set of weights, and no others, from the Hub.

    Args:
        hub_id: ``"owner/name"``.
        subfolder: folder in it that holds the files.
        revision: branch, tag or commit.
        token: as of ``huggingface_hub``.

    Returns:
        The folder they are in, for :func:`read_bokeh_weights`.

    Raises:
        ValueError: the Hub has no such set, or cannot be reached and nothing was fetched before.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    inside = f"{subfolder.strip('/')}/" if subfolder else ""
    try:
        folder = snapshot_download(
            hub_id,
            revision=revision,
            token=token,
            allow_patterns=[inside + name for name in (LORA_FILE, VAE_FILE, OFFICIAL_VAE_FILE)],
        )
    except (OSError, ValueError) as error:
        reason = first_line(error)
        if isinstance(error, GatedRepoError):
            reason = "its authors grant access on request; give token= when they have"
        elif isinstance(error, RepositoryNotFoundError):
            reason = "there is no such repository, or it wants a token="
        elif isinstance(error, RevisionNotFoundError):
            reason = f"it has no revision {revision!r}"
        raise ValueError(
            f"There is no folder {hub_id!r}, and no weights of that name could be fetched from the "
            f"Hub ({reason}). Give a folder with {LORA_FILE}, or 'owner/name'."
        ) from error
    if not Path(folder, inside, LORA_FILE).is_file():
        others = _folders_on_the_hub(hub_id, revision, token)
        raise ValueError(
            f"{hub_id!r} on the Hub holds no trained weights "
            f"{f'in {subfolder!r}' if subfolder else 'outside its folders'}: there is no "
            f"{inside}{LORA_FILE}. "
            + (f"There is one for subfolder={_some(map(repr, others), ' or ')}." if others else "")
        )
    return Path(folder, inside)


def _folders_on_the_hub(hub_id: str, revision: str | None, token: str | bool | None) -> list[str]:
    """Folders of a repository with weights in them, or none if it cannot be reached."""
    from huggingface_hub import HfApi

    try:
        names = HfApi(token=token).list_repo_files(hub_id, revision=revision)
    except Exception:  # It is asked only to say more in an error that is raised anyway.
        return []
    return sorted(name.removesuffix(f"/{LORA_FILE}") for name in names if f"/{LORA_FILE}" in name)


def is_no_hub_id(name: str) -> bool:
    """Whether a name can only have been meant as a path."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


# -- Against a model -----------------------------------------------------------------------------


def check_setting_names(settings: Mapping[str, Any], source: str = "BokehWeights") -> None:
    """Raises ``ValueError`` for names that are none of ``SETTINGS``."""
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise ValueError(f"{source} has settings {unknown}; known are {list(SETTINGS)}.")


def lora_config(values: Mapping[str, Any]) -> LoraConfig:
    """peft's configuration of these values.

    Raises:
        ValueError: values that this version of peft does not know, or adapters of another kind than
            two matrices per layer.
    """
    known = {field.name for field in dataclasses.fields(LoraConfig) if field.init}
    # Another version of peft may know more options; those that are off change nothing.
    unknown = sorted(name for name, value in values.items() if value and name not in known)
    if unknown:
        raise ValueError(
            f"The configuration of the adapters has {unknown}, which this version of peft does not "
            "know. Update peft."
        )
    try:
        config = LoraConfig(**{name: value for name, value in values.items() if name in known})
    except (TypeError, ValueError) as error:
        raise ValueError(f"The configuration of the adapters is damaged: {error}") from None
    plain = {"use_dora": False, "lora_bias": False, "bias": "none"}
    odd = {
        name: getattr(config, name) for name, off in plain.items() if getattr(config, name) != off
    }
    if odd or config.modules_to_save or not config.target_modules:
        raise ValueError(
            f"Adapters are two matrices in each of the target_modules and nothing else; their "
            f"configuration has {odd or 'modules_to_save, or no target_modules'}."
        )
    return config


def check_adapter(
    tensors: Mapping[str, Tensor], values: Mapping[str, Any] | None, model: nn.Module
) -> LoraConfig:
    """Checks that adapters fit a model, without changing it, and returns their configuration.

    Args:
        tensors: adapters as in ``BokehWeights``.
        values: their configuration; without one it is made from the shapes, alpha being the rank.
        model: UNet or codec, with or without other adapters in it.

    Raises:
        ValueError: a tensor too many, too few, or of another shape than the layer needs.
    """
    config = _config_of_shapes(tensors) if values is None else lora_config(values)
    check_tensors(
        tensors,
        adapter_shapes(model, config),
        f"{type(model).__name__} of the pipeline",
        BASE_MODEL_ADVICE,
    )
    return config


def adapter_shapes(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that adapters of this configuration have in a model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if re.search(r"(^|\.)(base_layer|lora_)", name):
            continue
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        if not check_target_module_exists(config, name):
            continue
        rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)
        if isinstance(layer, nn.Linear):
            shapes[f"{name}.lora_A.weight"] = (rank, layer.in_features)
            shapes[f"{name}.lora_B.weight"] = (layer.out_features, rank)
        else:
            shapes[f"{name}.lora_A.weight"] = (rank, *layer.weight.shape[1:])
            shapes[f"{name}.lora_B.weight"] = (layer.out_channels, rank, 1, 1)
    return shapes


def _config_of_shapes(tensors: Mapping[str, Tensor]) -> LoraConfig:
    """The configuration that adapters without one must have had, alpha being the rank."""
    layers = sorted({name.rpartition(".lora_")[0] for name in tensors})
    ranks = {
        name.removesuffix(".lora_A.weight"): len(value)
        for name, value in tensors.items()
        if name.endswith(".lora_A.weight") and value.ndim
    }
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual}
    return LoraConfig(
        r=usual,
        lora_alpha=usual,
        target_modules=layers,
        rank_pattern=others,
        alpha_pattern=dict(others),
    )


def codec_parameters(vae: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a codec in ``VAE_TRAINED_PARTS``, whether or not adapters are around
    them."""
    parameters = {
        name.replace(".base_layer.", "."): value
        for name, value in vae.named_parameters()
        if ".lora_" not in name
    }
    return {
        name: value
        for name, value in parameters.items()
        if name.startswith(tuple(f"{part}." for part in VAE_TRAINED_PARTS))
    }


def check_codec(tensors: Mapping[str, Tensor], vae: nn.Module) -> None:
    """Checks that parameters fit a codec, without changing it.

    Raises:
        ValueError: a tensor too many, too few, or of another shape.
    """
    wanted = {name: tuple(value.shape) for name, value in codec_parameters(vae).items()}
    check_tensors(tensors, wanted, f"{type(vae).__name__} of the pipeline", BASE_MODEL_ADVICE)


def check_tensors(
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, tuple[int, ...]],
    model: str,
    advice: str = "Load them into the model that they were made for.",
) -> None:
    """Raises ``ValueError`` unless the tensors are those wanted, by name and shape, all of numbers
    that can be trained.

    Args:
        tensors: by name.
        wanted: shapes by name.
        model: what they do not fit, in the words of the error.
        advice: what to do, its last sentence.
    """
    problems = []
    if missing := [name for name in wanted if name not in tensors]:
        problems.append(f"missing: {_some(missing)}")
    if extra := [name for name in tensors if name not in wanted]:
        problems.append(f"not in the model: {_some(extra)}")
    shapes = {name: tuple(tensors[name].shape) for name in wanted if name in tensors}
    if wrong := [
        f"{name} {shape}, wanted {wanted[name]}"
        for name, shape in shapes.items()
        if shape != wanted[name]
    ]:
        problems.append(f"of another shape: {_some(wrong, '; ')}")
    if integers := [
        f"{name} {value.dtype}" for name, value in tensors.items() if not value.is_floating_point()
    ]:
        problems.append(f"not in floating point: {_some(integers)}")
    if problems:
        raise ValueError(
            f"The weights do not fit the {model}. Tensors {'. Tensors '.join(problems)}. {advice}"
        )


def _some(names: Iterable[str], separator: str = ", ") -> str:
    """The first few of some names, and how many there are."""
    names = list(names)
    shown = separator.join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"

"""Base models that ``BokehDiffPipeline`` is loaded from: which folders and single files fit.

diffusers reads both, but notices late and in words of its own that a file is of another model, or
falls back to files that hold pickles. Here the names of files and tensors are looked at first, and
the loaded layers afterwards.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping

from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import nn

WEIGHTS_FILE = re.compile(
    r"diffusion_pytorch_model(\.(?P<variant>\w+))?(-\d+-of-\d+)?\.(safetensors|bin)"
)

UNET = "model.diffusion_model."
FIRST_LAYER = f"{UNET}input_blocks.0.0.weight"
PARTS = {
    "unet": UNET,
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
"""With what the names of each part of the pipeline begin."""


def check_plain_variant(folder: str, given: Collection[str] = ()) -> None:
    """Raises ``ValueError`` if the weights of a part are there only in a variant, such as fp16.

    Args:
        folder: an existing folder of a pipeline.
        given: names of parts that come from elsewhere.
    """
    for part in ("unet", "vae"):
        inside = os.path.join(folder, part)
        if part in given or not os.path.isdir(inside):
            continue
        files = [WEIGHTS_FILE.fullmatch(name) for name in os.listdir(inside)]
        variants = {found["variant"] for found in files if found is not None}
        if variants and None not in variants:
            found = sorted(map(str, variants))
            raise ValueError(
                f"The weights of {part} in {folder!r} are there only as variant "
                f"{', '.join(found)}. Load them with from_pretrained(..., variant={found[0]!r})."
            )


def check_single_file(path: str, given: Collection[str] = ()) -> None:
    """Raises ``ValueError`` unless a file holds an SDXL base model that predicts noise.

    Args:
        path: an existing file.
        given: names of parts that come from elsewhere and need not be in it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            channels = file.get_slice(FIRST_LAYER).get_shape()[1] if FIRST_LAYER in names else None
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path!r} is damaged or no safetensors file ({str(error).splitlines()[0]}). Other "
            "kinds of files are not read, because they can hold code."
        ) from None
    missing = [part for part, prefix in PARTS.items() if not _any_begins(names, prefix)]
    missing = [part for part in missing if part not in given]
    kind = _kind(names, channels, missing)
    if kind is not None:
        raise ValueError(
            f"{path!r} holds {kind}. BokehDiffPipeline.from_single_file takes a base model of "
            "Stable Diffusion XL, with names that begin with "
            f"{', '.join(prefix for prefix in PARTS.values())}."
        )
    if missing:
        raise ValueError(
            f"{path!r} holds no {', '.join(missing)}: no names begin with "
            f"{', '.join(PARTS[part] for part in missing)}. Load them from elsewhere and pass "
            f"them, {missing[0]}=..., to from_single_file."
        )


def _kind(names: Collection[str], channels: int | None, missing: Collection[str]) -> str | None:
    """What a file holds instead of an SDXL base model, if it does."""
    if any("lora" in name for name in names):
        return (
            "adapters (LoRA), which are loaded into a pipeline by load_bokeh_weights or "
            "load_lora_weights"
        )
    if channels is None and "unet" in missing:
        if "conv_in.weight" in names or "unet.conv_in.weight" in names:
            return (
                "a UNet in the layout of diffusers, which belongs in a folder for from_pretrained"
            )
        if "encoder.conv_in.weight" in names or _any_begins(names, PARTS["vae"]):
            return "a codec alone, which AutoencoderKL.from_single_file loads"
        return f"no model that is known here ({', '.join(sorted(names)[:3]) or 'nothing at all'})"
    if _any_begins(names, "cond_stage_model."):
        return "a model of Stable Diffusion 1 or 2"
    if _any_begins(names, "conditioner.embedders.0.model."):
        return "the SDXL refiner"
    if channels not in (None, 4):
        return f"an inpainting or editing model, whose UNet takes {channels} channels"
    if "v_pred" in names:
        return "a model that predicts velocity (v_pred), not noise"
    if any(name.startswith("edm_") for name in names):
        return "a model of the EDM schedule, which does not predict noise"
    return None


def check_all_loaded(pipe: DiffusionPipeline, path: str) -> None:
    """Raises ``ValueError`` if layers got no numbers from the file."""
    empty: Mapping[str, list[str]] = {
        part: [name for name, value in model.named_parameters() if value.is_meta]
        for part, model in pipe.components.items()
        if isinstance(model, nn.Module)
    }
    lacking = [f"{part}.{name}" for part, names in empty.items() for name in names]
    if lacking:
        raise ValueError(
            f"{os.fspath(path)!r} lacks tensors of {', '.join(lacking[:3])}"
            f"{f' and {len(lacking) - 3} more' if len(lacking) > 3 else ''}. Copy or download it "
            "again, or give the config of the model it was made from."
        )


def _any_begins(names: Collection[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)

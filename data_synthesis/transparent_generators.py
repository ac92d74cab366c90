"""Generators of transparent pictures: what they need, where they find it, what they record.

Models are folders on this machine, or ids on the Hugging Face hub that are in the local cache;
nothing is downloaded, and no code that comes with a model is run.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub import hf_hub_download, snapshot_download
from PIL import Image
from safetensors import SafetensorError

from data_synthesis.matting import cut_out
from data_synthesis.shards import file_sha256
from data_synthesis.transparent_decoder import (
    SIZE_MULTIPLE,
    TransparentDecoder,
    merge_attention_offsets,
)

__all__ = ["BackdropGenerator", "LayerDiffuseGenerator", "Sampling", "TransparentGenerator"]

LAYERDIFFUSE = "LayerDiffusion/layerdiffusion-v1"
OFFSETS_FILE = "layer_xl_transparent_attn.safetensors"
DECODER_FILE = "vae_transparent_decoder.safetensors"
# Backdrops that differ from most subjects; before grey and white, transparency is hard to see.
BACKDROP_COLOURS = ("green", "blue", "magenta")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
VARIANT = re.compile(r"\.(\w+)(?:-\d+-of-\d+)?\.safetensors$")


class TransparentGenerator(Protocol):
    """Makes a transparent picture from words."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What the pictures depend on beside prompt and randomness, JSON-able."""
        ...

    def generate(
        self, prompt: str, generator: torch.Generator
    ) -> tuple[Image.Image, dict[str, Any]]:
        """The RGBA picture with straight colours, and what else is to be recorded about it.

        One at a time, because the numerics of a batch depend on its company. ``generator``: of
        the CPU, the only source of randomness. Raises BackdropError where the subject cannot be
        cut out.
        """
        ...


@dataclass(frozen=True)
class Sampling:
    """How pictures are sampled: height = width in pixels, denoising steps, guidance."""

    size: int = 1024
    steps: int = 25
    guidance_scale: float = 7.0
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        if self.size < 64 or self.size % 8 or self.steps < 1:
            raise ValueError(
                f"size is {self.size}, steps {self.steps}; wanted a multiple of 8 from 64 on, and "
                "1 step or more."
            )

    @property
    def call(self) -> dict[str, Any]:
        """The arguments of a diffusers pipeline."""
        return {
            "height": self.size,
            "width": self.size,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "negative_prompt": self.negative_prompt,
        }


class LayerDiffuseGenerator:
    """SDXL that writes transparency into its latents; see ``transparent_decoder``."""

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        decoder: TransparentDecoder,
        sampling: Sampling,
        provenance: Mapping[str, Any],
    ) -> None:
        """``pipeline``: with the attention offsets merged; its VAE in float32, because SDXL's
        overflows in half precision."""
        if sampling.size % SIZE_MULTIPLE:
            raise ValueError(
                f"size is {sampling.size}; LayerDiffuse wants a multiple of {SIZE_MULTIPLE}."
            )
        self.pipeline, self.decoder = pipeline, decoder
        self._call = sampling.call
        self.provenance = {"class": type(self).__name__, **provenance, **self._call}

    @classmethod
    def load(
        cls,
        model: str,
        sampling: Sampling,
        *,
        layerdiffuse: str = LAYERDIFFUSE,
        revision: str | None = None,
        variant: str | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> LayerDiffuseGenerator:
        """``model``: an SDXL; ``layerdiffuse``: of the two published files; folders or hub ids.

        Raises FileNotFoundError where one is missing, with the command that downloads it;
        ValueError where one is not what it should be.
        """
        source = _Model.find(model, revision, variant)
        if source.pipeline_class != "StableDiffusionXLPipeline":
            raise ValueError(
                f"{source.name} holds a {source.pipeline_class}; LayerDiffuse was made for "
                "StableDiffusionXLPipeline. Other models can be used before a plain backdrop: "
                "--generator backdrop"
            )
        files = {
            name: _layerdiffuse_file(layerdiffuse, name) for name in (OFFSETS_FILE, DECODER_FILE)
        }
        decoder = TransparentDecoder.from_file(files[DECODER_FILE])
        pipeline = source.load(StableDiffusionXLPipeline, dtype, add_watermarker=False)
        merge_attention_offsets(pipeline.unet, files[OFFSETS_FILE])
        pipeline.vae.to(torch.float32)
        provenance = source.provenance(dtype)
        provenance["weights_sha256"] |= {name: file_sha256(file) for name, file in files.items()}
        return cls(pipeline.to(device), decoder.to(device, dtype), sampling, provenance)

    def generate(
        self, prompt: str, generator: torch.Generator
    ) -> tuple[Image.Image, dict[str, Any]]:
        with torch.inference_mode():
            latents = self.pipeline(
                prompt, generator=generator, output_type="latent", **self._call
            ).images
            vae = self.pipeline.vae
            latents = latents.float() / vae.config.scaling_factor
            pixels = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
            dtype = self.decoder.conv_in.weight.dtype
            alpha_first = self.decoder.decode(pixels.to(dtype), latents.to(dtype))[0].float()
            rgba = (255 * alpha_first.roll(-1, dims=0)).round().to(torch.uint8)
        return Image.fromarray(rgba.permute(1, 2, 0).cpu().numpy()), {}


class BackdropGenerator:
    """Any text-to-image model, asked for a plain backdrop that ``matting`` then removes.

    Glass, smoke and shadows come out less well than from LayerDiffuse.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, sampling: Sampling, provenance: Mapping[str, Any]
    ) -> None:
        self.pipeline = pipeline
        # Models that are distilled to do without have no negative prompt.
        known = inspect.signature(pipeline.__call__).parameters
        self._call = {name: value for name, value in sampling.call.items() if name in known}
        self.provenance = {"class": type(self).__name__, **provenance, **self._call}

    @classmethod
    def load(
        cls,
        model: str,
        sampling: Sampling,
        *,
        revision: str | None = None,
        variant: str | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> BackdropGenerator:
        """``model``: a folder or hub id; raises as LayerDiffuseGenerator's."""
        source = _Model.find(model, revision, variant)
        pipeline = source.load(AutoPipelineForText2Image, dtype)
        return cls(pipeline.to(device), sampling, source.provenance(dtype))

    def generate(
        self, prompt: str, generator: torch.Generator
    ) -> tuple[Image.Image, dict[str, Any]]:
        words = set(re.findall(r"\w+", prompt.lower()))
        colours = [c for c in BACKDROP_COLOURS if c not in words] or BACKDROP_COLOURS
        colour = colours[generator.initial_seed() % len(colours)]
        full = f"{prompt}, isolated on a plain solid {colour} background"
        picture = self.pipeline(full, generator=generator, output_type="pil", **self._call).images[
            0
        ]
        return cut_out(picture), {"full_prompt": full}


@dataclass(frozen=True)
class _Model:
    """A diffusers pipeline on this machine."""

    name: str
    revision: str | None  # commit on the hub; None for a folder
    variant: str | None
    folder: Path
    pipeline_class: str
    advice: str  # what to do when something about it is wrong

    @classmethod
    def find(cls, model: str, revision: str | None, variant: str | None) -> _Model:
        folder = Path(model).expanduser()
        if folder.is_dir():
            name, revision, advice = folder.resolve().name, None, "Save or download it again."
        else:
            _check_hub_id(model, "model")
            chosen = {"revision": revision, "variant": variant}
            words = "".join(f", {key}={value!r}" for key, value in chosen.items() if value)
            advice = (
                'Download it:\n  python -c "from diffusers import DiffusionPipeline; '
                f"DiffusionPipeline.download('{model}'{words})\""
            )
            try:
                folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
            except OSError:
                raise FileNotFoundError(
                    f"The model {model} is not on this machine. {advice}"
                ) from None
            name, revision = model, folder.name
        try:
            index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
            pipeline_class = str(index["_class_name"])
        except (OSError, json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{folder} is no diffusers pipeline ({error}). {advice}") from None
        return cls(name, revision, variant, folder, pipeline_class, advice)

    def load(self, pipeline_class: Any, dtype: torch.dtype, **others: Any) -> Any:
        try:
            pipeline = pipeline_class.from_pretrained(
                self.folder,
                dtype=dtype,
                variant=self.variant,
                use_safetensors=True,
                local_files_only=True,
                **others,
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"{self.name} cannot be loaded as a text-to-image model: {error} {self.advice}"
            ) from None
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def provenance(self, dtype: torch.dtype) -> dict[str, Any]:
        weights = {}
        for file in sorted(self.folder.glob("*/*.safetensors")):
            variant = VARIANT.search(file.name)
            if (variant[1] if variant else None) == self.variant:
                weights[f"{file.parent.name}/{file.name}"] = file_sha256(file)
        return {
            "model": self.name,
            "revision": self.revision,
            "weights_sha256": weights,
            "dtype": str(dtype).removeprefix("torch."),
        }


def _layerdiffuse_file(source: str, name: str) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} lacks {name}. Download it:\n  hf download {LAYERDIFFUSE} "
                f"{OFFSETS_FILE} {DECODER_FILE} --local-dir {folder}"
            )
        return folder / name
    _check_hub_id(source, "layerdiffuse")
    try:
        return Path(hf_hub_download(source, name, local_files_only=True))
    except OSError:
        raise FileNotFoundError(
            f"{name} of {source} is not on this machine. Download it:\n  hf download {source} "
            f"{OFFSETS_FILE} {DECODER_FILE}\n"
            "or cut subjects out of plain backdrops instead: --generator backdrop"
        ) from None


def _check_hub_id(name: str, what: str) -> None:
    if not HUB_ID.fullmatch(name):
        raise ValueError(f"{what} is {name}; there is no such folder, nor is it a hub id.")

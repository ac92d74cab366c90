"""What training the generator of bokeh stacks means: its networks, data, loss and files."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn
from torch.utils.data import Dataset

from bokehdiff.bokeh_adapter_files import read_bokeh_adapter, write_bokeh_adapter
from bokehdiff.models.bokeh_adapter import (
    LARGEST_STRENGTH,
    SMALLEST_STRENGTH,
    UNCONDITIONAL_STRENGTH,
    BokehAdapter,
    BokehCondition,
    BokehGrounding,
)
from bokehdiff.pipelines.bokeh_stack import BokehStackPipeline
from training.bokeh_stack_card import bokeh_stack_card_text
from training.bokeh_stack_data import (
    PAIRS,
    PHOTOGRAPHS,
    SCENES,
    SOURCES,
    BokehStackSamples,
)
from training.bokeh_stack_sources import (
    FOCUS,
    PhotographPairs,
    RenderedPhotographs,
    SceneStacks,
    Source,
    StoredSceneStacks,
)
from training.bokeh_stack_validation import held_out_losses, held_out_scenes, sampled_scores
from training.model_card import CardText
from training.samples import seeded_generator
from training.settings import check_at_least, mapping, setting_adder
from training.task import TrainingTask
from training.validation import Validation

TIMESTEPS = 1000
"""Of the schedule of FLUX; timestep t is a share s = t / 1000 of noise."""

OFFICIAL_FILE = "official/bokeh_lora.bin"
MIXED_PRECISION = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}

MANIFESTS = {PHOTOGRAPHS: "data_photographs", PAIRS: "data_pairs"}
"""Settings that name the manifests of sources."""

PROMPTS_KEPT = 512
"""Embedded prompts that are remembered, of 4 MB each with FLUX."""

# The numbers that keep streams of random numbers apart, after those of the data.
_NOISE, _LATENTS = 4, 5


# -- Settings ------------------------------------------------------------------------------------


def add_bokeh_stack_settings(parser: argparse.ArgumentParser) -> None:
    """Add the settings of model, steps, data and validation."""
    add = setting_adder(parser.add_argument_group("model: the adapter of a frozen FLUX.1-Kontext"))
    add("pretrained", help="folder or hub id of FLUX.1-Kontext")
    add("adapter_start", help="adapter to start from: a folder or file; without it, a fresh one")
    add("adapter_rank", type=int, default=128, help="of its low-rank layers")
    add("adapter_alpha", type=float, help="they are scaled by alpha / rank; without it, by 1")
    add("prompt_tokens", type=int, default=512, help="tokens of the T5 text encoder, up to 512")
    add("export", choices=("official",), help="save the adapter in the authors' layout as well")

    add = setting_adder(parser.add_argument_group("steps: what a sample asks of the network"))
    add(
        "reference_share",
        type=float,
        default=0.5,
        help="share of the batches that go from a sharp picture to one with blur; the others have "
        "no picture to start from, and show one scene at several K",
    )
    add(
        "pivot_share",
        type=float,
        default=0.2,
        help="share of the latter's samples that have noise, timestep and layout of one of their "
        "batch",
    )
    add("drop_K", type=float, default=0.1, help="share without reference that is not told K")
    add("drop_caption", type=float, default=0.1, help="share without reference and without prompt")
    add(
        "keep_caption",
        type=float,
        default=0.35,
        help="share with reference whose prompt is the caption and not an instruction with K",
    )
    add("guidance", type=float, default=1.0, help="what the guidance embedding is told")
    add("noise_offset", type=float, default=0.05, help="noise that is the same all over a channel")

    add = setting_adder(parser.add_argument_group("data: see training/bokeh_stack_sources.py"))
    add(
        "data_weights",
        type=mapping,
        default={SCENES: 1},
        help=f"how often batches are of each source: {', '.join(SOURCES)}",
    )
    add("data_stacks", help="folder of procedural scenes; without it, they are made on the fly")
    add("data_photographs", help="manifest of photographs with metric depth, rendered here")
    add("data_pairs", help="manifest of pairs of photographs, sharp and with blur")
    add("data_size", type=int, default=512, help="pixels a side of the training pictures")
    add("data_seed", type=int, default=0, help="of the procedural scenes")
    add("data_options", type=mapping, default={}, help="further arguments of StackScenes")
    add("data_focus", choices=FOCUS, default=FOCUS[0], help="of rendered photographs")
    add("data_smallest_K", type=float, default=SMALLEST_STRENGTH, help="px*m of these pictures")
    add("data_largest_K", type=float, default=LARGEST_STRENGTH, help="px*m of these pictures")

    add = setting_adder(parser.add_argument_group("held-out procedural scenes"))
    add("validation_scenes", type=int, default=8, help="their number; 0 does not validate")
    add("validation_seed", type=int, default=1_000_003, help="their seed")
    add(
        "validation_sampling_steps",
        type=int,
        default=0,
        help="sample stacks of them in so many steps, and see whether more K blurs more; 0 does "
        "not",
    )


def check_bokeh_stack_settings(args: argparse.Namespace) -> None:
    """Raise ValueError for settings that cannot work, before anything is written."""
    if args.pretrained is None:
        raise ValueError(
            "The adapter is trained beside FLUX.1-Kontext, which stays as it is. Set pretrained to "
            "its folder or hub id, black-forest-labs/FLUX.1-Kontext-dev."
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ValueError(
            "Under FSDP the attention of FLUX would see pieces of the adapter. Use DDP: the "
            "adapter and its optimiser are small beside the frozen transformer."
        )
    if args.compile:
        raise ValueError("The generator of stacks is not trained compiled. Leave out compile.")
    check_at_least(
        args,
        {
            **dict.fromkeys(("adapter_rank", "data_size", "prompt_tokens"), 1),
            **dict.fromkeys(("guidance", "noise_offset", "data_seed", "validation_scenes"), 0),
            **dict.fromkeys(("validation_seed", "validation_sampling_steps"), 0),
        },
    )
    if args.adapter_alpha is not None and not args.adapter_alpha > 0:
        raise ValueError(f"The setting adapter_alpha must be above 0, got {args.adapter_alpha}.")
    if args.prompt_tokens > 512:
        raise ValueError(
            f"The setting prompt_tokens must be at most 512, which FLUX was trained with, got "
            f"{args.prompt_tokens}."
        )
    shares = ("reference_share", "pivot_share", "drop_K", "drop_caption", "keep_caption")
    for name in shares:
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(
                f"The setting {name} must be a share from 0 to 1, got {getattr(args, name)}."
            )
    if args.reference_share < 1 and args.pivot_share > 0 and args.batch_size == 1:
        raise ValueError(
            "Samples without reference share the noise of others of their batch (pivot_share "
            f"{args.pivot_share:g}), and a batch_size of 1 has no others. Raise batch_size, or set "
            "pivot_share 0 or reference_share 1."
        )
    if not SMALLEST_STRENGTH <= args.data_smallest_K < args.data_largest_K <= LARGEST_STRENGTH:
        raise ValueError(
            f"data.smallest_K {args.data_smallest_K:g} and data.largest_K {args.data_largest_K:g} "
            f"must rise within {SMALLEST_STRENGTH:g} to {LARGEST_STRENGTH:g} px*m, the range of "
            "the adapter."
        )
    _check_sources(args)


def _check_sources(args: argparse.Namespace) -> None:
    """What is weighted and what is there must be the same."""
    weights = args.data_weights
    if unknown := sorted(set(map(str, weights)) - set(SOURCES)):
        raise ValueError(
            f"data.weights names {unknown[0]!r}; the sources are {', '.join(SOURCES)}."
        )
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not weight > 0:
            raise ValueError(
                f"data.weights gives {name} {weight!r}; wanted a number above 0. Leave out what is "
                "not used."
            )
    if not weights:
        raise ValueError("data.weights is empty; wanted at least one source, such as {scenes: 1}.")
    for name, setting in MANIFESTS.items():
        if (getattr(args, setting) is None) != (name not in weights):
            raise ValueError(
                f"{setting} is {getattr(args, setting)!r} and data.weights is {weights}; the "
                f"source {name} needs both, a manifest and a weight, or neither."
            )
    if args.data_stacks is not None and SCENES not in weights:
        raise ValueError(
            f"data.stacks is {args.data_stacks!r} and data.weights is {weights}; give {SCENES} a "
            "weight, or leave out data.stacks."
        )
    on_the_fly = SCENES in weights and args.data_stacks is None
    if args.data_options and not on_the_fly and not args.validation_scenes:
        raise ValueError(
            "data.options are of procedural scenes made on the fly, and this run makes none."
        )
    if on_the_fly and args.validation_scenes and args.validation_seed == args.data_seed:
        raise ValueError(
            "validation_seed equals data.seed, so the run would be validated on scenes it has "
            "trained on. Change one of them."
        )


# -- The task ------------------------------------------------------------------------------------


class BokehStackTask(TrainingTask):
    """An adapter beside a frozen FLUX.1-Kontext, trained with the rectified-flow loss.

    Attributes:
        adapter: all that is trained (without its ``to_k_dof``, which no result depends on).
        transformer, vae, text_encoder, text_encoder_2: frozen.
        pipe: the pipeline they belong to.
    """

    def __init__(self, args: argparse.Namespace, pipe: BokehStackPipeline | None = None) -> None:
        """Make what `args` describe, with `pipe` instead of the pipeline that they name.

        A fresh adapter is drawn from torch's global generator, which the caller seeds.

        Raises:
            ValueError: there is no such pipeline, adapter or data, or they do not fit each other.
        """
        super().__init__()
        self.args = args
        self.precision = MIXED_PRECISION[args.mixed_precision]
        self.pipe = load_pipeline(args.pretrained, self.precision) if pipe is None else pipe
        self.transformer: FluxTransformer2DModel = self.pipe.transformer
        self.vae: AutoencoderKL = self.pipe.vae
        self.text_encoder: nn.Module = self.pipe.text_encoder
        self.text_encoder_2: nn.Module = self.pipe.text_encoder_2
        for frozen in (self.transformer, self.vae, self.text_encoder, self.text_encoder_2):
            frozen.requires_grad_(False)
        self.vae.float()
        token = 2 * self.pipe.vae_scale_factor
        if args.data_size % token:
            raise ValueError(
                f"data.size is {args.data_size}; a token of this model is {token} x {token} "
                f"pixels, so wanted a multiple of {token}."
            )
        if args.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.adapter: BokehAdapter = make_adapter(self.pipe, args)
        BokehAdapter.remove(self.transformer)
        self.adapter.install(self.transformer)
        self.pipe.register_modules(bokeh_adapter=self.adapter)
        self.pipe.set_progress_bar_config(disable=True)
        self.samples = make_samples(args)
        self._prompts: dict[str, tuple[Tensor, Tensor]] = {}
        self._held_out: list[dict[str, Tensor]] | None = None
        self.train()

    def train(self, mode: bool = True) -> BokehStackTask:
        """Note the mode; no network here computes anything else in training."""
        self.training = mode
        for network in self.children():
            network.eval()
        return self

    @property
    def device(self) -> torch.device:
        return self.adapter.device

    # -- One forward pass ------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Nothing changes over the run."""

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Return ``loss``, the mean of `squared_errors` over the batch.

        Noise, timestep and what the codec draws depend on the seed and the samples' numbers.

        Args:
            batch: samples of :class:`~training.bokeh_stack_data.BokehStackSamples`, of one group.
            step: optimiser steps done.
        """
        numbers = batch["number"]
        pivot = batch["pivot"]
        target = self.target_latents(batch["target"], numbers)
        noise, shares = self.noise(numbers[pivot], target.shape[1:])
        told = batch["K"] / LARGEST_STRENGTH
        told = torch.where(batch["tells_K"], told, torch.full_like(told, UNCONDITIONAL_STRENGTH))
        grounding = None
        if bool((pivot != torch.arange(len(pivot), device=pivot.device)).any()):
            grounding = BokehGrounding(pivot, "single")
        errors = self.squared_errors(
            target,
            noise,
            shares,
            told,
            self.samples.prompts(batch),
            reference=batch["image"] if bool(batch["with_reference"][0]) else None,
            grounding=grounding,
        )
        return {"loss": errors.mean()}

    def squared_errors(
        self,
        target: Tensor,
        noise: Tensor,
        shares: Tensor,
        told: Tensor,
        prompts: Sequence[str],
        *,
        reference: Tensor | None = None,
        grounding: BokehGrounding | None = None,
    ) -> Tensor:
        """Return mean((v - (noise - target))^2) of each sample, (B,) float32.

        v is the velocity that the network sees in ``(1 - s) target + s noise``; it is compared on
        the target's tokens, not on those of the reference.

        Args:
            target, noise: latents (B, C, h, w).
            shares: s in [0, 1] of each sample, (B,).
            told: K / 30, or ``UNCONDITIONAL_STRENGTH``, of each sample, (B,).
            prompts: one for each sample.
            reference: sharp pictures (B, 3, H, W), sRGB in [0, 1], or None.
            grounding: whose layout samples take.
        """
        along = shares.reshape(-1, 1, 1, 1)
        tokens = self.packed((1 - along) * target + along * noise)
        ids = self.position_ids(target, 0)
        count = tokens.shape[1]
        if reference is not None:
            sharp = self.reference_latents(reference)
            tokens = torch.cat([tokens, self.packed(sharp)], dim=1)
            ids = torch.cat([ids, self.position_ids(sharp, 1)])
        text, pooled = self.embedded(prompts)
        dtype = self.transformer.dtype
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full_like(shares, self.args.guidance)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            condition = BokehCondition(self.adapter.embed(told), grounding=grounding)
            velocity = self.transformer(
                hidden_states=tokens.to(dtype),
                encoder_hidden_states=text,
                pooled_projections=pooled,
                timestep=shares.to(dtype),
                guidance=guidance,
                img_ids=ids.to(dtype),
                txt_ids=torch.zeros(text.shape[1], 3, device=text.device, dtype=dtype),
                joint_attention_kwargs={"bokeh": condition},
                return_dict=False,
            )[0]
        wanted = self.packed(noise - target)
        return (velocity[:, :count].float() - wanted).square().mean((1, 2))

    def noise(self, numbers: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return noise (B, C, h, w) and its share s (B,) of the samples with these numbers.

        The timestep is uniform over the thousand of the schedule, without the shift to more noise
        that larger pictures get when they are sampled.
        """
        noises, shares = [], []
        for number in numbers.tolist():
            generator = seeded_generator(self.args.seed, _NOISE, number)
            shares.append((1 + int(torch.randint(TIMESTEPS, (), generator=generator))) / TIMESTEPS)
            noise = torch.randn(tuple(shape), generator=generator)
            offset = torch.randn((shape[0], 1, 1), generator=generator)
            noises.append(noise + self.args.noise_offset * offset)
        return torch.stack(noises).to(self.device), torch.tensor(shares, device=self.device)

    # -- Pictures and prompts for the network ----------------------------------------------------

    @torch.no_grad()
    def target_latents(self, pictures: Tensor, numbers: Tensor | None = None) -> Tensor:
        """Return latents (B, C, h, w) of pictures (B, 3, H, W), sRGB in [0, 1].

        With the samples' numbers they are drawn from the distribution that the codec gives, else
        they are its mode, as the pipeline takes references.
        """
        given = self.vae.encode(2 * pictures - 1).latent_dist
        latents = given.mode()
        if numbers is not None:
            drawn = [
                torch.randn(
                    tuple(latents.shape[1:]),
                    generator=seeded_generator(self.args.seed, _LATENTS, number),
                )
                for number in numbers.tolist()
            ]
            latents = latents + given.std * torch.stack(drawn).to(latents.device)
        config = self.vae.config
        return (latents - config.shift_factor) * config.scaling_factor

    def reference_latents(self, pictures: Tensor) -> Tensor:
        """Return the latents of references, which the pipeline gives the network when sampling."""
        return self.target_latents(pictures)

    def packed(self, latents: Tensor) -> Tensor:
        """Return latents (B, C, h, w) as tokens of 2 x 2 latents, (B, h w / 4, 4 C)."""
        return self.pipe._pack_latents(latents, *latents.shape)

    def position_ids(self, latents: Tensor, first: int) -> Tensor:
        """Return (tokens, 3): `first` (0 of targets, 1 of references), row, column."""
        height, width = latents.shape[-2:]
        ids = self.pipe._prepare_latent_image_ids(
            len(latents), height // 2, width // 2, latents.device, latents.dtype
        )
        ids[..., 0] = first
        return ids

    @torch.no_grad()
    def embedded(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the embeddings of prompts: (B, tokens, channels) of T5, (B, channels) of CLIP."""
        for prompt in prompts:
            if prompt not in self._prompts:
                # One at a time: in a batch, other prompts would change the last bits.
                text, pooled, _ = self.pipe.encode_prompt(
                    prompt=prompt,
                    prompt_2=None,
                    device=self.device,
                    max_sequence_length=self.args.prompt_tokens,
                )
                dtype = self.transformer.dtype
                self._prompts[prompt] = (text.to("cpu", dtype), pooled.to("cpu", dtype))
        text, pooled = (
            torch.cat([self._prompts[prompt][part] for prompt in prompts]).to(self.device)
            for part in (0, 1)
        )
        while len(self._prompts) > PROMPTS_KEPT:
            del self._prompts[next(iter(self._prompts))]
        return text, pooled

    # -- Data ------------------------------------------------------------------------------------

    def training_samples(self) -> Dataset[dict[str, Tensor]]:
        return self.samples

    def validate(self) -> Validation | None:
        """Score the first ``validation_scenes`` procedural scenes of the held-out seed."""
        args = self.args
        if args.validation_scenes == 0:
            return None
        if self._held_out is None:
            self._held_out = held_out_scenes(
                args.validation_seed,
                args.validation_scenes,
                args.data_size,
                (args.data_smallest_K, args.data_largest_K),
                args.data_options,
            )
        scores: dict[str, Any] = {"scenes": len(self._held_out)}
        scores |= held_out_losses(self, self._held_out, args.validation_seed)
        if not args.validation_sampling_steps:
            return Validation(scores, None)
        sampled = sampled_scores(
            self, self._held_out, args.validation_sampling_steps, args.validation_seed
        )
        return Validation(scores | sampled.scores, sampled.grid)

    def validation_summary(self, scores: Mapping[str, Any]) -> str:
        said = f"loss {scores['loss']:.5f}, told another K {scores['loss_other_K']:.5f}"
        if "psnr" in scores:
            said += (
                f"; sampled, PSNR {scores['psnr']:.2f} dB (sharp picture "
                f"{scores['psnr_identity']:.2f})"
            )
        if "control" in scores:
            said += f"; more K blurs more in {scores['control']:.0%} of scenes"
        return said

    def as_saved(self) -> contextlib.AbstractContextManager[None]:
        """Training and inference have the same networks."""
        return contextlib.nullcontext()

    # -- Files -----------------------------------------------------------------------------------

    def save_weights(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """Save the adapter, for ``BokehStackPipeline.load_bokeh_adapter``."""
        self.adapter.save_pretrained(folder)

    def load_weights(self, folder: Path) -> None:
        """Load what `save_weights` saved.

        Raises:
            ValueError: the folder holds no adapter, or one of another size.
        """
        saved = read_bokeh_adapter(folder)
        _check_same_size(saved, self.adapter, f"{folder} holds", "Resume with it.")
        self.adapter.load_state_dict(saved.state_dict())

    def save_result(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """Save the adapter, and with ``export`` in the authors' layout as well."""
        self.save_weights(folder, trained)
        if self.args.export == "official":
            official = folder / OFFICIAL_FILE
            official.parent.mkdir(exist_ok=True)
            write_bokeh_adapter(self.adapter, official, overwrite=True)

    def card_text(self, scores: Mapping[str, Any], log: list[dict[str, Any]]) -> CardText:
        return bokeh_stack_card_text(self.args, scores, log)


# -- What it is made of --------------------------------------------------------------------------


def load_pipeline(source: str, precision: torch.dtype | None) -> BokehStackPipeline:
    """Return the pipeline; what stays as it is needs no more digits than it is used with.

    Raises:
        ValueError: there is none.
    """
    try:
        return BokehStackPipeline.from_pretrained(source, dtype=precision or torch.float32)
    except OSError as error:
        raise ValueError(
            f"pretrained {source!r} is no pipeline of FLUX.1-Kontext that can be loaded: {error}"
        ) from error


def make_adapter(pipe: BokehStackPipeline, args: argparse.Namespace) -> BokehAdapter:
    """Return the adapter to train, in float32: that of ``adapter.start`` or a fresh one.

    Raises:
        ValueError: there is none, or it is of another size.
    """
    fresh = BokehAdapter.for_transformer(
        pipe.transformer, rank=args.adapter_rank, alpha=args.adapter_alpha
    )
    if args.adapter_start is None:
        return fresh
    started = read_bokeh_adapter(args.adapter_start, transformer=pipe.transformer)
    _check_same_size(started, fresh, f"adapter.start {args.adapter_start} has", "Set them so.")
    return started.float().to(fresh.device)


def _check_same_size(given: BokehAdapter, wanted: BokehAdapter, whose: str, advice: str) -> None:
    names = ("num_layers", "num_single_layers", "width", "context_width", "rank", "alpha")
    for name in names:
        if given.config[name] != wanted.config[name]:
            raise ValueError(
                f"{whose} an adapter of {name} {given.config[name]}; model and settings want "
                f"{wanted.config[name]}. {advice}"
            )


def _scenes(args: argparse.Namespace, strengths: tuple[float, float]) -> Source:
    frames = args.batch_size if args.reference_share < 1 else 1
    if args.data_stacks is None:
        return SceneStacks(args.data_seed, args.data_size, strengths, frames, args.data_options)
    stored = StoredSceneStacks(args.data_stacks, args.data_size, strengths, frames)
    if args.validation_scenes and stored.seed == args.validation_seed:
        raise ValueError(
            f"The scenes in {args.data_stacks} have the seed {stored.seed}, and so has "
            "validation_seed: the run would be validated on scenes it has trained on. Change it."
        )
    return stored


def make_samples(args: argparse.Namespace) -> BokehStackSamples:
    """Return the samples that the settings describe.

    Raises:
        ValueError: a manifest or the options of the scenes are not as they should be.
    """
    strengths = (args.data_smallest_K, args.data_largest_K)
    sources: dict[str, Source] = {}
    if SCENES in args.data_weights:
        sources[SCENES] = _scenes(args, strengths)
    if PHOTOGRAPHS in args.data_weights:
        sources[PHOTOGRAPHS] = RenderedPhotographs(
            args.data_photographs, args.data_size, strengths, args.data_focus
        )
    if PAIRS in args.data_weights:
        sources[PAIRS] = PhotographPairs(args.data_pairs, args.data_size, strengths)
    return BokehStackSamples(
        sources,
        args.data_weights,
        batch_size=args.batch_size,
        seed=args.seed,
        reference_share=args.reference_share,
        pivot_share=args.pivot_share,
        drop_K=args.drop_K,
        drop_caption=args.drop_caption,
        keep_caption=args.keep_caption,
    )

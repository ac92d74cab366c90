"""What training LiteBokeh means: its network, its data, its losses, its files."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import Dataset

from bokehdiff import losses
from bokehdiff.models.litebokeh import (
    SMALLEST_SIDE,
    VARIANTS,
    GlassEncNet,
    LiteBokehOutput,
    TinyUnet,
)
from bokehdiff.models.patch_discriminator import PatchDiscriminators
from bokehdiff.pipelines.litebokeh import LiteBokehPipeline, read_litebokeh
from bokehdiff.subject_weights import subject_weights
from training.litebokeh_card import litebokeh_card_text
from training.litebokeh_data import KINDS, held_out_samples, training_crops
from training.litebokeh_validation import validate_litebokeh, validation_line
from training.model_card import CardText
from training.settings import check_at_least, mapping, schedule, setting_adder
from training.task import TrainingTask
from training.validation import Validation

DISCRIMINATOR_FILE = "discriminator.safetensors"
MIXED_PRECISION = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
PHASES = ("bokeh", "enhancement")
MODEL_KINDS = ("tiny_unet", "glass_enc_net")
SMALLEST_JUDGED_SIDE = 32
"""Pixels a side of the smallest picture that the discriminators can judge."""
DEAD_VARIANCE = 1e-7
"""Of a channel of features whose values are of the order of 1."""
LIKENESS = ("l1", "ssim", "perceptual")
"""Losses that tell the picture what it should be."""


# -- Settings ------------------------------------------------------------------------------------


def add_litebokeh_settings(parser: argparse.ArgumentParser) -> None:
    """Add the settings of model, data and losses."""
    flag = argparse.BooleanOptionalAction
    add = setting_adder(parser.add_argument_group("model: pretrained, or made from nothing"))
    add("pretrained", help="folder or hub id of a LiteBokeh to start from")
    add("model_kind", choices=MODEL_KINDS, help="a network made from nothing")
    add("model_variant", choices=tuple(VARIANTS), help="size of a tiny_unet; without it, tiny")
    add(
        "model_options",
        type=mapping,
        default={},
        help="further arguments of a network made from nothing, for instance '{norm: instance}'",
    )
    add(
        "phase",
        choices=PHASES,
        default="bokeh",
        help="train all but the enhancement block on blurred photographs, or, after that, the "
        "enhancement block alone on photographs made worse",
    )

    add = setting_adder(parser.add_argument_group("data: stored, or made on the fly"))
    add(
        "data_kind",
        choices=KINDS,
        default="scenes",
        help="layered scenes with a subject in focus, or pairs of real photographs",
    )
    add(
        "data_folder",
        help="shards of `python -m data_synthesis layers`, or a folder with original/ and bokeh/; "
        "without it, scenes are made on the fly",
    )
    add("data_size", type=int, default=256, help="pixels a side of scenes made on the fly")
    add("data_seed", type=int, default=0, help="their seed")
    add("data_options", type=mapping, default={}, help="further arguments of LayerScenes")
    add("data_crop_size", type=int, default=192, help="pixels a side of the crops trained on")
    add(
        "data_noise",
        type=float,
        default=1.0,
        help="of photographs made worse, a factor; 0 is none, and then nothing teaches the "
        "enhancement to smooth",
    )

    add = setting_adder(
        parser.add_argument_group(
            "loss, on display-encoded sRGB in [0, 1]; a weight is a number, or a mapping from "
            "steps to numbers, linear in between. Phase enhancement has the mean difference alone"
        )
    )
    add("loss_l1_weight", type=schedule, default="10", help="of the mean difference")
    add("loss_ssim_weight", type=schedule, default="10", help="of 1 - SSIM")
    add("loss_perceptual_weight", type=schedule, default="0", help="of features of VGG-19")
    add("loss_perceptual_weights", help="file of VGG-19; without it, torchvision's download")
    add(
        "loss_depth_weighted",
        action=flag,
        default=True,
        help="count differences up to three times in the plane of the subject",
    )
    add(
        "loss_first_weight",
        type=schedule,
        default="0.5",
        help="of these losses of what the first hourglass of a glass_enc_net makes",
    )
    add(
        "loss_adversarial_weight",
        type=schedule,
        default="0",
        help="of deceiving the discriminators",
    )

    add = setting_adder(parser.add_argument_group("held-out scenes, of data_kind"))
    add("validation_scenes", type=int, default=16, help="their number; 0 does not validate")
    add("validation_folder", help="as data_folder; without it, scenes on the fly")
    add("validation_seed", type=int, default=1_000_003, help="seed of held-out scenes")
    add("validation_pictures", type=int, default=4, help="how many of them are shown")


def check_litebokeh_settings(args: argparse.Namespace) -> None:
    """Raise ValueError for settings that cannot work, before anything is written."""
    if args.phase == "enhancement" and args.pretrained is None:
        raise ValueError(
            "Phase enhancement goes on with the result of phase bokeh: set pretrained to its "
            "folder."
        )
    if (args.pretrained is None) == (args.model_kind is None):
        raise ValueError(
            "Say where the model comes from: either pretrained (a folder or hub id), or "
            f"model.kind ({', '.join(MODEL_KINDS)}: a network made from nothing), not both."
        )
    if args.pretrained is not None and (args.model_variant or args.model_options):
        raise ValueError(
            "model.variant and model.options are of a network made from nothing; a pretrained one "
            "has its own. Leave them out."
        )
    if args.model_kind == "glass_enc_net" and args.model_variant is not None:
        raise ValueError(
            "model.variant is a size of tiny_unet. Size a glass_enc_net by model.options "
            "'{channels: 32, residual_blocks: 9}'."
        )
    for name in ("gradient_checkpointing", "compile"):
        if getattr(args, name):
            raise ValueError(f"LiteBokeh is not trained with {name}. Leave it out.")
    check_at_least(
        args,
        {
            **dict.fromkeys(("data_size", "data_crop_size"), SMALLEST_SIDE),
            **dict.fromkeys(("data_seed", "validation_scenes"), 0),
            **dict.fromkeys(("validation_seed", "validation_pictures"), 0),
        },
    )
    if not args.data_noise >= 0:
        raise ValueError(f"The setting data_noise must be at least 0, got {args.data_noise}.")
    if args.phase == "enhancement":
        for name in ("perceptual", "adversarial"):
            if not getattr(args, f"loss_{name}_weight").is_zero:
                raise ValueError(
                    f"Phase enhancement is trained on the mean difference alone: leave out "
                    f"loss.{name}_weight."
                )
    elif all(getattr(args, f"loss_{name}_weight").is_zero for name in LIKENESS):
        raise ValueError(
            "Nothing tells the picture what it should be: give loss.l1_weight, loss.ssim_weight or "
            "loss.perceptual_weight a value."
        )
    if not args.loss_adversarial_weight.is_zero and args.data_crop_size < SMALLEST_JUDGED_SIDE:
        raise ValueError(
            f"The discriminators judge crops of at least {SMALLEST_JUDGED_SIDE} pixels a side, got "
            f"data.crop_size {args.data_crop_size}. Raise it, or leave out loss.adversarial_weight."
        )
    if args.data_kind == "pairs":
        if args.data_folder is None:
            raise ValueError("Photographs are not made on the fly: data_kind pairs needs a folder.")
        if args.validation_scenes and args.validation_folder is None:
            raise ValueError(
                "Held-out photographs are not made on the fly: set validation_folder, or "
                "validation_scenes 0."
            )
    if args.data_folder is None:
        if args.data_crop_size > args.data_size:
            raise ValueError(
                f"Crops of {args.data_crop_size} pixels do not fit scenes of {args.data_size} "
                "pixels. Lower data.crop_size or raise data.size."
            )
        if args.validation_folder is None and args.validation_seed == args.data_seed:
            raise ValueError(
                "validation_seed equals data.seed, so the run would be validated on scenes it has "
                "trained on. Change one of them."
            )


# -- The task ------------------------------------------------------------------------------------


class LiteBokehTask(TrainingTask):
    """From a photograph to the same with what is behind the subject blurred.

    Phase ``"bokeh"`` trains all of the network but its enhancement block, which stays as it is.
    Phase ``"enhancement"`` trains that block alone, on photographs made worse; all else stays as it
    is to the last bit, statistics of batch norms included.

    Batch norms gather running statistics of the weights as they are trained. Averaged weights are
    saved with these: statistics measured anew for them score the same to some hundredths of a dB.
    Of several processes the statistics are those of the first, which the others take over in every
    step.

    Attributes:
        network: what is trained.
        perceptual: features of VGG-19, if their weight is not zero.
        discriminator: judges of the adversarial loss, if its weight is not zero.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        """Make what `args` describe. Random weights come from torch's global generator."""
        super().__init__()
        self.args = args
        self.network = build_network(args)
        self.perceptual: losses.VGGFeatureLoss | None = None
        if not args.loss_perceptual_weight.is_zero:
            self.perceptual = losses.VGGFeatureLoss.from_backbone(args.loss_perceptual_weights)
        self.discriminator: PatchDiscriminators | None = None
        if not args.loss_adversarial_weight.is_zero:
            self.discriminator = PatchDiscriminators()
        self._held_out: list[dict[str, Tensor]] | None = None
        self.train()

    def train(self, mode: bool = True) -> LiteBokehTask:
        """Set the network to training in phase bokeh alone: batch norms change by it."""
        super().train(mode)
        if self.args.phase == "enhancement":
            self.network.eval()
        return self

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay is for this parameter: not for norms and biases."""
        return parameter.ndim > 1

    # -- One forward pass ------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Nothing but the learning rate and the weights of the losses changes over the run."""

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Return ``loss`` and its unweighted parts, means over the batch.

        The losses of network and discriminators are added up and differentiated together: each
        reaches its own parameters only.

        Args:
            batch: see `training.litebokeh_data`.
            step: optimiser steps done.
        """
        if self.args.phase == "enhancement":
            return {"loss": (self.enhanced(batch["degraded"]) - batch["image"]).abs().mean()}
        out = self.render(batch["image"])
        # Losses take no part in the autocast that accelerate adds in fp16.
        with torch.autocast(self.device.type, enabled=False):
            rendered = out.rendered.float()
            terms = self.likeness(rendered, batch)
            loss = self.weighted_sum(terms, step)
            if out.first_rendered is not None and not self.args.loss_first_weight.is_zero:
                first = self.weighted_sum(self.likeness(out.first_rendered.float(), batch), step)
                loss = loss + self.args.loss_first_weight.at(step) * first
                terms["first"] = first
            if self.discriminator is not None:
                judged = self.judgement(rendered, batch["bokeh"])
                weight = self.args.loss_adversarial_weight.at(step)
                loss = loss + weight * judged["adversarial"] + judged["discriminator"]
                terms |= judged
        return {"loss": loss, **terms}

    def render(self, image: Tensor, enhance: bool = False) -> LiteBokehOutput:
        """Return what the network makes of (B, 3, H, W) in [0, 1]."""
        with self.autocast():
            out: LiteBokehOutput = self.network(image, enhance=enhance)
        return out

    def enhanced(self, picture: Tensor) -> Tensor:
        """Return what the enhancement block makes of (B, 3, H, W) in [0, 1], in float32."""
        with self.autocast():
            enhanced: Tensor = self.network.enhancement(picture)
        return enhanced.float()

    def autocast(self) -> torch.autocast:
        """The precision that the network computes in."""
        precision = MIXED_PRECISION[self.args.mixed_precision]
        return torch.autocast(self.device.type, precision, enabled=precision is not None)

    def likeness(self, picture: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the unweighted losses of `LIKENESS` that count, scalars.

        Args:
            picture: (B, 3, H, W) in [0, 1].
            batch: with ``bokeh`` (B, 3, H, W) and ``subject`` (B, 1, H, W).
        """
        args, target = self.args, batch["bokeh"]
        weight = torch.ones_like(batch["subject"])
        if args.loss_depth_weighted:
            weight = subject_weights(batch["subject"])
        terms = {}
        if not args.loss_l1_weight.is_zero:
            terms["l1"] = losses.weighted_l1(picture, target, weight)
        if not args.loss_ssim_weight.is_zero:
            terms["ssim"] = losses.weighted_structural_similarity_loss(picture, target, weight)
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(picture, target)
        return terms

    def weighted_sum(self, terms: Mapping[str, Tensor], step: int) -> Tensor:
        """Return the sum of `terms` (at least one) by their weights in this step."""
        weighted = [
            getattr(self.args, f"loss_{name}_weight").at(step) * term
            for name, term in terms.items()
        ]
        return torch.stack(weighted).sum()

    def judgement(self, rendered: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the unweighted losses ``adversarial`` and ``discriminator``, scalars.

        Args:
            rendered, target: (B, 3, H, W) in [0, 1].
        """
        assert self.discriminator is not None
        # For whoever renders, the judges are constants.
        constants = {name: value.detach() for name, value in self.discriminator.named_parameters()}
        adversarial = losses.hinge_generator_loss(
            functional_call(self.discriminator, constants, rendered)
        )
        real, fake = self.discriminator(target), self.discriminator(rendered.detach())
        return {
            "adversarial": adversarial,
            "discriminator": losses.hinge_discriminator_loss(real, fake),
        }

    # -- Data ------------------------------------------------------------------------------------

    def training_samples(self) -> Dataset[dict[str, Tensor]]:
        return training_crops(self.args)

    @torch.no_grad()
    def validate(self) -> Validation | None:
        """Score the first ``validation_scenes`` held-out scenes; see `validate_litebokeh`."""
        if self.args.validation_scenes == 0:
            return None
        if self._held_out is None:
            self._held_out = held_out_samples(self.args)
        return validate_litebokeh(
            lambda image: self.render(image, enhance=True),
            self._held_out,
            self.device,
            enhanced=self.enhanced if self.args.phase == "enhancement" else None,
            noise=self.args.data_noise,
            pictures=self.args.validation_pictures,
        )

    def validation_summary(self, scores: Mapping[str, Any]) -> str:
        return validation_line(scores)

    @contextlib.contextmanager
    def as_saved(self) -> Iterator[None]:
        """In eval mode, in which batch norms take what they have gathered and leave it as it is."""
        self.eval()
        try:
            yield
        finally:
            self.train()

    # -- Files -----------------------------------------------------------------------------------

    def save_weights(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """Save the pipeline, as ``LiteBokehPipeline`` reads it."""
        LiteBokehPipeline(self.network).save_pretrained(folder)

    def load_weights(self, folder: Path) -> None:
        """Load what `save_weights` saved.

        Raises:
            ValueError: the folder holds no network, or one of other options.
        """
        saved = read_litebokeh(str(folder))
        if type(saved) is not type(self.network) or options_of(saved) != options_of(self.network):
            raise ValueError(
                f"{folder} holds a network of other options. Resume with the model it was saved "
                "with."
            )
        self.network.load_state_dict(saved.state_dict())

    def save_training_state(self, folder: Path) -> None:
        if self.discriminator is not None:
            save_file(self.discriminator.state_dict(), folder / DISCRIMINATOR_FILE)

    def load_training_state(self, folder: Path) -> None:
        path = folder / DISCRIMINATOR_FILE
        if path.is_file() != (self.discriminator is not None):
            raise ValueError(
                f"{folder} was saved {'with' if path.is_file() else 'without'} a discriminator. "
                "Resume with the loss.adversarial_weight it was saved with."
            )
        if self.discriminator is not None:
            self.discriminator.load_state_dict(load_file(path))

    def save_result(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """Save the pipeline, as ``LiteBokehPipeline`` reads it, without dead channels."""
        if self.args.phase == "bokeh":
            silence_dead_channels(self.network)
        self.save_weights(folder, trained)

    def card_text(self, scores: Mapping[str, Any], log: list[dict[str, Any]]) -> CardText:
        return litebokeh_card_text(self.args, self.network, dict(scores), log)


def build_network(args: argparse.Namespace) -> TinyUnet | GlassEncNet:
    """Return the network to train, in float32: a pretrained one, or one made from nothing.

    What the phase does not train is frozen.

    Raises:
        ValueError: the settings do not fit it, or there is no such network.
    """
    network: TinyUnet | GlassEncNet
    if args.pretrained is not None:
        network = read_litebokeh(args.pretrained)
    else:
        try:
            if args.model_kind == "tiny_unet":
                network = TinyUnet.from_variant(args.model_variant or "tiny", **args.model_options)
            else:
                network = GlassEncNet(**args.model_options)
        except TypeError as error:
            raise ValueError(
                f"The settings in model.options do not fit {args.model_kind}: {error}."
            ) from error
    enhances = args.phase == "enhancement"
    network.requires_grad_(not enhances)
    network.enhancement.requires_grad_(enhances)
    return network


@torch.no_grad()
def silence_dead_channels(network: TinyUnet | GlassEncNet) -> None:
    """Set the scale of batch norms to 0 where nothing of the training photographs got through.

    Such a channel has a variance of 0, by whose root its norm divides: a photograph unlike those of
    the training may wake it, three hundred times too strong. Nothing else changes.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            module.weight[module.running_var < DEAD_VARIANCE] = 0


def options_of(network: TinyUnet | GlassEncNet) -> dict[str, Any]:
    """Return the arguments that `network` was made with, as a file holds them."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in network.config.items()
        if not name.startswith("_")
    }

"""What training BokehDiff means: its networks, its data, its losses, its files."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from bokehdiff import losses
from bokehdiff.attention import PisaConfig
from bokehdiff.checkpoints import (
    LORA_FILE,
    SETTINGS,
    UNET_LORA_TARGETS,
    VAE_FILE,
    VAE_TRAINED_PARTS,
    BokehWeights,
    codec_parameters,
    read_bokeh_weights,
    write_bokeh_weights,
)
from bokehdiff.images import pad_to_multiple
from bokehdiff.models import (
    AutoencoderSpaceToDepth,
    BokehDiscriminator,
    LightTransportUNet,
    StoredPrompt,
)
from bokehdiff.optics import signed_defocus
from bokehdiff.pipelines import BokehDiffPipeline
from training.bokehdiff_card import bokehdiff_card_text
from training.model_card import CardText
from training.optimization import parts_of
from training.refiner_validation import MISTAKES_PX, refiner_scores
from training.samples import AugmentedCrops, seeded_generator
from training.settings import (
    check_at_least,
    mapping,
    names,
    schedule,
    setting_adder,
)
from training.task import TrainingTask, trained_parameters
from training.validation import Validation, validate, without_border

DISCRIMINATOR_FILE = "discriminator.safetensors"
OFFICIAL_FOLDER = "official"
ADAPTER_NAME = "default"
MIXED_PRECISION = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


REFINER = "refiner"
"""The part of the UNet that its own loss trains, and no loss of the rendering reaches."""
SEEN = ("image", "disparity", "df", "K")
"""What the renderer is given of a sample."""
RENDERING_LOSSES = ("reconstruction", "edge", "perceptual")
"""Those that tell the rendering what it should be."""


# -- Settings ------------------------------------------------------------------------------------


def add_bokehdiff_settings(parser: argparse.ArgumentParser) -> None:
    """Add the settings of models, data and losses."""
    flag = argparse.BooleanOptionalAction
    add = setting_adder(parser.add_argument_group("model: pretrained, or made from nothing"))
    add("pretrained", help="pipeline folder or hub id to start from")
    add("model_unet", type=mapping, help="arguments of a LightTransportUNet made from nothing")
    add("model_block_size", type=int, default=2, help="pixels a side of its lossless latents")
    add(
        "model_pisa",
        type=mapping,
        help="PISA: '{preset: official_weights}', and fields that depart from the preset; without "
        "it, the pretrained pipeline's own, or 'paper'",
    )
    add("pisa_in_training", type=mapping, default={}, help="fields that differ in training only")
    add("pisa_hardness_by_step", action=flag, default=True, help="harden circles step by step")
    add("mode", choices=("full", "lora"), default="full", help="train the UNet, or adapters in it")
    add(
        "trained_parts",
        type=names,
        help="parts of the UNet that are trained in mode full, by the first component of their "
        "names, for instance 'refiner'; without it, all that a loss reaches",
    )
    add("lora_rank", type=int, default=8, help="rank of the adapters")
    add("lora_alpha", type=float, default=8.0, help="adapters are scaled by alpha / rank")
    add("lora_targets", type=names, default=list(UNET_LORA_TARGETS), help="endings of layer names")
    add(
        "vae_mode",
        choices=("none", "full", "lora"),
        default="none",
        help=f"train {', '.join(VAE_TRAINED_PARTS)} of the VAE, or adapters in them",
    )
    add("export", choices=("official",), help="save the adapters in the authors' layout as well")

    add = setting_adder(parser.add_argument_group("data: shards, or scenes made on the fly"))
    add("data_shards", help="folder of shards written by data_synthesis")
    add(
        "data_kind",
        choices=("procedural", "layers"),
        default="procedural",
        help="scenes made on the fly: layered scenes from nothing, or the paper's cut-outs over "
        "photographs",
    )
    add("data_size", type=int, default=128, help="pixels a side of scenes made on the fly")
    add("data_seed", type=int, default=0, help="their seed")
    add(
        "data_options",
        type=mapping,
        default={},
        help="further arguments of ProceduralScenes or LayerScenes, for instance "
        "'{foregrounds: cutouts, backgrounds: photos}'",
    )
    add("data_crop_size", type=int, default=128, help="pixels a side of the crops trained on")
    add(
        "data_corruption",
        type=float,
        default=0.0,
        help="share of crops whose disparity gets mistakes as in estimated maps",
    )

    add = setting_adder(
        parser.add_argument_group(
            "loss, on display-encoded sRGB in [-1, 1]; a weight is a number, or a mapping from "
            "steps to numbers, linear in between"
        )
    )
    add("loss_reconstruction", choices=losses.RECONSTRUCTION_KINDS, default="mse", help="kind")
    add("loss_reconstruction_weight", type=schedule, default="1", help="its weight")
    add("loss_edge_weight", type=schedule, default="1", help="of the multi-scale edge loss")
    add("loss_edge_variant", choices=losses.EDGE_VARIANTS, default="official", help="its form")
    add("loss_perceptual_weight", type=schedule, default="0", help="of LPIPS (VGG)")
    add("loss_perceptual_weights", help="file of VGG-16; without it, torchvision's download")
    add(
        "loss_adversarial_weight", type=schedule, default="0", help="of deceiving the discriminator"
    )
    add(
        "loss_adversarial_backbone",
        default="facebook/convnext-base-224-22k",
        help="ConvNeXt folder or hub id, frozen",
    )
    add(
        "loss_real_label", type=float, default=0.8, help="what the discriminator calls a photograph"
    )
    add(
        "loss_disparity_weight",
        type=schedule,
        default="0",
        help="of the choices of the refiner of the UNet, which mends mistakes of the disparity",
    )
    add("loss_border", type=int, default=0, help="pixels at the border that count for nothing")

    add = setting_adder(parser.add_argument_group("held-out scenes"))
    add("validation_scenes", type=int, default=8, help="their number; 0 does not validate")
    add("validation_shards", help="folder of held-out shards; without it, scenes on the fly")
    add("validation_seed", type=int, default=1_000_003, help="seed of held-out scenes")
    add("validation_pictures", type=int, default=4, help="how many of them are shown")


def check_bokehdiff_settings(args: argparse.Namespace) -> None:
    """Raise ValueError for settings that cannot work, before anything is written."""
    if (args.pretrained is None) == (args.model_unet is None):
        raise ValueError(
            "Say where the model comes from: either pretrained (a folder or hub id), or model.unet "
            "(the arguments of a network made from nothing), not both."
        )
    if args.mode == "lora" and args.pretrained is None:
        raise ValueError("Adapters (mode lora) need trained weights under them. Set pretrained.")
    if args.vae_mode != "none" and args.pretrained is None:
        raise ValueError(
            "The lossless codec of a model from nothing has no weights: vae_mode none."
        )
    if args.vae_mode == "lora" and args.mode == "full":
        raise ValueError(
            "A pipeline saved whole (mode full) cannot hold adapters of its VAE. Use vae_mode full "
            "or none, or mode lora."
        )
    if args.mode == "full" and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ValueError(
            "Under FSDP adapters are trained (mode lora): a UNet in pieces cannot be saved whole. "
            "Use DDP or DeepSpeed for mode full."
        )
    if args.export is not None and (args.mode != "lora" or args.vae_mode == "lora"):
        raise ValueError(
            "The authors' layout holds adapters of the UNet and whole weights of the VAE: "
            "export official needs mode lora and vae_mode full or none."
        )
    check_at_least(
        args,
        {
            **dict.fromkeys(("model_block_size", "lora_rank", "data_size", "data_crop_size"), 1),
            **dict.fromkeys(("data_seed", "loss_border", "validation_scenes"), 0),
            **dict.fromkeys(("validation_seed", "validation_pictures"), 0),
        },
    )
    if not 0 <= args.data_corruption <= 1:
        raise ValueError(
            f"The setting data_corruption must be a share from 0 to 1, got {args.data_corruption}."
        )
    if not renders(args) and (
        args.loss_disparity_weight.is_zero or not args.loss_adversarial_weight.is_zero
    ):
        raise ValueError(
            f"Nothing tells the rendering what it should be: give one of "
            f"{', '.join(f'loss.{name}_weight' for name in RENDERING_LOSSES)} a weight, or train "
            "the refiner alone, with loss.disparity_weight and no other."
        )
    if args.mode == "lora" and (
        args.trained_parts is not None or not args.loss_disparity_weight.is_zero
    ):
        raise ValueError(
            "In mode lora adapters are trained and nothing else of the UNet: leave out "
            "trained_parts and loss.disparity_weight."
        )
    if not 0 < args.loss_real_label <= 1:
        raise ValueError(
            f"The setting loss_real_label must be in (0, 1], got {args.loss_real_label}."
        )
    if 2 * args.loss_border >= args.data_crop_size:
        raise ValueError(
            f"A loss.border of {args.loss_border} pixels on each side leaves nothing of crops of "
            f"{args.data_crop_size} pixels. Lower loss.border or raise data.crop_size."
        )
    if args.data_shards is None:
        if args.data_crop_size > args.data_size:
            raise ValueError(
                f"Crops of {args.data_crop_size} pixels do not fit {args.data_kind} scenes of "
                f"{args.data_size} pixels. Lower data.crop_size or raise data.size."
            )
        if args.validation_shards is None and args.validation_seed == args.data_seed:
            raise ValueError(
                "validation_seed equals data.seed, so the run would be validated on scenes it has "
                "trained on. Change one of them."
            )


def renders(args: argparse.Namespace) -> bool:
    """Whether the rendering is trained, and not the refiner of the disparity alone."""
    return not all(getattr(args, f"loss_{name}_weight").is_zero for name in RENDERING_LOSSES)


# -- The task ------------------------------------------------------------------------------------


class BokehDiffTask(TrainingTask):
    """From an all-in-focus photograph to one with lens blur, by one UNet step at T = 499.

    Attributes:
        unet: the network, or the frozen network with trained adapters in it.
        vae: the codec. Its decoder is frozen and differentiated through.
        perceptual: LPIPS, if its weight is not zero.
        discriminator: judge of the adversarial loss, if its weight is not zero.
    """

    def __init__(self, args: argparse.Namespace, pipe: BokehDiffPipeline | None = None) -> None:
        """Make what `args` describe, with `pipe` instead of the pipeline that they name.

        Random weights come from torch's global generator, which the caller seeds.
        """
        super().__init__()
        self.args = args
        self.pipe = build_pipeline(args) if pipe is None else pipe
        self.unet: nn.Module = self.pipe.unet
        self.vae: nn.Module = self.pipe.vae
        self.config_for_inference = PisaConfig.from_dict(dict(self.pipe.config.pisa))
        self.config_in_training = PisaConfig.from_dict(
            {**self.config_for_inference.to_dict(), **args.pisa_in_training}
        )
        select_trained_parameters(self.pipe, args)
        self.perceptual: losses.PerceptualLoss | None = None
        if not args.loss_perceptual_weight.is_zero:
            self.perceptual = losses.PerceptualLoss.from_backbone(args.loss_perceptual_weights)
        self.discriminator: BokehDiscriminator | None = None
        if not args.loss_adversarial_weight.is_zero:
            self.discriminator = BokehDiscriminator.from_backbone(args.loss_adversarial_backbone)
        if args.compile:
            if self.config_in_training.dropout:
                raise ValueError(
                    "A compiled UNet draws no random numbers: set pisa_in_training "
                    "'{dropout: 0.0}', or leave out compile."
                )
            self.unet.compile()
        self._held_out: list[dict[str, Tensor]] | None = None
        self.train()

    def train(self, mode: bool = True) -> BokehDiffTask:
        """Set the UNet alone to training; frozen networks stay as they are."""
        self.training = mode
        self.unet.train(mode)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    # -- One forward pass ------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Set the hardness of PISA: it is a function of the step, so nothing has to remember it."""
        config = self.config_in_training
        context = self.pipe.verify_pisa()
        context.config = config.at_step(step) if self.args.pisa_hardness_by_step else config

    def forward(self, batch: dict[str, Tensor], step: int | None = None) -> dict[str, Tensor]:
        """Return ``loss`` and its unweighted parts, means over the batch.

        Without a step, return the ``prediction`` alone: under FSDP the networks compute only within
        a call of the task.

        The reconstruction loss takes the rendering as it is, so that values beyond white and black
        are pulled back; the others take it clamped. The losses of renderer and discriminator are
        added up and differentiated together: each reaches its own parameters only, and both judge
        with the discriminator as it was before the step.

        Args:
            batch: image, target (B, 3, H, W), disparity and true_disparity (B, 1, H, W) in [0, 1],
                df, K and number (B,); without a step no target, true_disparity and number.
            step: optimiser steps done.
        """
        if step is None:
            return {"prediction": self.render(**batch)}
        args = self.args
        terms: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        if not args.loss_disparity_weight.is_zero:
            weights["disparity"] = args.loss_disparity_weight.at(step)
            terms["disparity"] = self.disparity_loss(batch)
        if renders(args):
            self.add_rendering_losses(batch, step, terms, weights)
        loss = batch["image"].new_zeros(())
        for name, term in terms.items():
            loss = loss + weights[name] * term
        return {"loss": loss, **terms}

    def disparity_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of the refiner, a scalar; see `DisparityRefiner.loss`."""
        multiple = self.pipe.image_multiple
        image, disparity, true_disparity = (
            pad_to_multiple(batch[name].float(), multiple)[0]
            for name in ("image", "disparity", "true_disparity")
        )
        maps, true_maps = (
            torch.cat([one, signed_defocus(one, batch["df"], batch["K"])], 1)
            for one in (disparity, true_disparity)
        )
        precision = MIXED_PRECISION[self.args.mixed_precision]
        with torch.autocast(image.device.type, precision, enabled=precision is not None):
            loss: Tensor = self.unet.refiner.loss(image, maps, true_maps)
        return loss

    def add_rendering_losses(
        self,
        batch: dict[str, Tensor],
        step: int,
        terms: dict[str, Tensor],
        weights: dict[str, float],
    ) -> None:
        """Render a batch, and add the losses of the rendering and what they weigh in this step."""
        args = self.args
        if self.config_in_training.dropout:
            # Drawn anew for every batch, and again the same where gradients are checkpointed.
            context = self.pipe.verify_pisa()
            seed = seeded_generator(args.seed, 2, int(batch["number"][0])).initial_seed()
            context.config = context.config.replace(seed=seed)
        prediction = self.render(**{name: batch[name] for name in SEEN})
        # Losses take no part in the autocast that accelerate adds in fp16.
        with torch.autocast(prediction.device.type, enabled=False):
            prediction, target, all_in_focus = (
                without_border(image.float(), args.loss_border)
                for image in (prediction, 2 * batch["target"] - 1, 2 * batch["image"] - 1)
            )
            clamped = prediction.clamp(-1, 1)
            if weight := args.loss_reconstruction_weight.at(step):
                weights["reconstruction"] = weight
                terms["reconstruction"] = losses.reconstruction(
                    prediction, target, args.loss_reconstruction
                )
            if weight := args.loss_edge_weight.at(step):
                weights["edge"] = weight
                terms["edge"] = losses.multi_scale_edge_loss(
                    clamped, target, all_in_focus, variant=args.loss_edge_variant
                )
            if self.perceptual is not None and (weight := args.loss_perceptual_weight.at(step)):
                weights["perceptual"] = weight
                terms["perceptual"] = self.perceptual(clamped, target)
            if self.discriminator is not None:
                if weight := args.loss_adversarial_weight.at(step):
                    weights["adversarial"] = weight
                    terms["adversarial"] = losses.generator_loss(
                        self.discriminator(clamped), args.loss_real_label
                    )
                judged = torch.cat([target, clamped.detach()])
                real, fake = self.discriminator(judged, update=True).chunk(2)
                weights["discriminator"] = 1.0
                terms["discriminator"] = losses.discriminator_loss(real, fake, args.loss_real_label)

    def render(self, image: Tensor, disparity: Tensor, df: Tensor, K: Tensor) -> Tensor:
        """Return the photograph with lens blur, (B, 3, H, W) in [-1, 1] but not clamped.

        Args:
            image: (B, 3, H, W) all-in-focus photograph, display-encoded sRGB in [0, 1].
            disparity: (B, 1, H, W) in [0, 1], larger is nearer.
            df: (B,) disparity in focus.
            K: (B,) circle-of-confusion radius in pixels of `image` per unit of disparity.
        """
        precision = MIXED_PRECISION[self.args.mixed_precision]
        # Of the networks this reaches the UNet alone; the codec computes in its own precision.
        with torch.autocast(image.device.type, precision, enabled=precision is not None):
            return self.pipe.render_tensors(2 * image - 1, disparity, df, K)

    # -- Data ------------------------------------------------------------------------------------

    def training_samples(self) -> Dataset[dict[str, Tensor]]:
        scenes, count = open_scenes(self.args.data_shards, self.args.data_seed, self.args)
        args = self.args
        return AugmentedCrops(
            scenes, count, args.data_crop_size, args.seed, corruption=args.data_corruption
        )

    def validate(self) -> Validation | None:
        """Score the first ``validation_scenes`` scenes of the held-out shards or seed.

        The rendering is scored if a loss of its own trains it, the refiner if its loss does.
        """
        if self.args.validation_scenes == 0:
            return None
        if self._held_out is None:
            self._held_out = held_out_scenes(self.args)

        validation = Validation({"scenes": len(self._held_out)}, None)
        if renders(self.args):
            validation = validate(
                lambda *seen: self(dict(zip(SEEN, seen, strict=True)))["prediction"],
                self._held_out,
                self.args.loss_border,
                self.device,
                perceptual=self.perceptual,
                pictures=self.args.validation_pictures,
            )
        if not self.args.loss_disparity_weight.is_zero:
            validation.scores |= refiner_scores(self.unet.refiner, self._held_out, self.device)
        return validation

    def validation_summary(self, scores: Mapping[str, Any]) -> str:
        parts = []
        if "psnr" in scores:
            parts.append(
                f"PSNR {scores['psnr']:.2f} dB (photograph as it is "
                f"{scores['psnr_identity']:.2f}), "
                f"blurred {scores.get('psnr_blurred', math.nan):.2f}, "
                f"in focus {scores.get('psnr_in_focus', math.nan):.2f}; "
                f"more K blurs more in {scores.get('control', math.nan):.0%} of scenes"
            )
        if "spoilt_exact" in scores:
            mended = ", ".join(
                f"{scores.get(f'mended_{pixels}px', math.nan):.1%}" for pixels in MISTAKES_PX
            )
            parts.append(
                f"of wrong pixels mended {mended} at {', '.join(map(str, MISTAKES_PX))} px; "
                f"of an exact map spoilt {scores['spoilt_exact']:.2%}"
            )
        return "; ".join(parts)

    @contextlib.contextmanager
    def as_saved(self) -> Iterator[None]:
        """With the final hardness and no dropout."""
        context = self.pipe.verify_pisa()
        config = context.config
        context.config = self.config_for_inference
        self.eval()
        try:
            yield
        finally:
            self.train()
            context.config = config

    # -- Files -----------------------------------------------------------------------------------

    def save_weights(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """Save ``unet/`` in mode "full", else what ``BokehDiffPipeline.load_bokeh_weights`` loads.

        In mode "full", trained parts of the VAE are saved as they are in mode "lora".
        """
        if self.args.mode == "full":
            self.pipe.unet.save_pretrained(folder / "unet")
            vae = self.bokeh_weights(trained).vae
            if vae:
                save_file(vae, folder / VAE_FILE)
            return
        write_bokeh_weights(self.bokeh_weights(trained), folder)

    def load_weights(self, folder: Path) -> None:
        """Load what `save_weights` saved.

        Raises:
            ValueError: the folder holds weights of another mode or of other layers.
        """
        mode = self.args.mode
        if not (folder / ("unet" if mode == "full" else LORA_FILE)).exists():
            raise ValueError(
                f"{folder} holds no weights of mode {mode}. Resume in the mode it was saved in."
            )
        if mode == "full":
            saved = type(self.pipe.unet).from_pretrained(folder / "unet")
            self.pipe.unet.load_state_dict(saved.state_dict())
            stored = BokehWeights({}, {}, {}, None, None, {})
            if (folder / VAE_FILE).is_file():
                stored.vae = load_file(folder / VAE_FILE)
        else:
            stored = read_bokeh_weights(folder)
        wanted = self.bokeh_weights(trained_parameters(self))
        for kind, setting in (
            ("unet_lora", "lora.targets"),
            ("vae", "vae_mode"),
            ("vae_lora", "vae_mode"),
        ):
            if getattr(stored, kind).keys() != getattr(wanted, kind).keys():
                raise ValueError(
                    f"{folder} holds weights of other layers. Resume with its {setting}."
                )
        if stored.unet_lora:
            set_peft_model_state_dict(self.pipe.unet, stored.unet_lora)
        if stored.vae_lora:
            set_peft_model_state_dict(self.pipe.vae, stored.vae_lora)
        self.pipe.vae.load_state_dict(stored.vae, strict=False)

    def bokeh_weights(self, trained: Mapping[str, Tensor]) -> BokehWeights:
        """Return `trained` (names begin with ``unet.`` and ``vae.``) in the form files have."""
        unet, vae = (
            {
                name.removeprefix(prefix): value.detach()
                for name, value in trained.items()
                if name.startswith(prefix)
            }
            for prefix in ("unet.", "vae.")
        )
        settings = {name: self.pipe.config[name] for name in SETTINGS}
        weights = BokehWeights({}, {}, {}, None, None, settings)
        if self.args.mode == "lora":
            weights.unet_lora = get_peft_model_state_dict(self.pipe.unet, unet)
            weights.unet_lora_config = self.pipe.unet.peft_config[ADAPTER_NAME].to_dict()
        if self.args.vae_mode == "lora":
            weights.vae_lora = get_peft_model_state_dict(self.pipe.vae, vae)
            weights.vae_lora_config = self.pipe.vae.peft_config[ADAPTER_NAME].to_dict()
        elif self.args.vae_mode == "full":
            weights.vae = vae
        return weights

    def save_training_state(self, folder: Path) -> None:
        if self.discriminator is not None:
            save_file(self.discriminator.head_state_dict(), folder / DISCRIMINATOR_FILE)

    def load_training_state(self, folder: Path) -> None:
        path = folder / DISCRIMINATOR_FILE
        if path.is_file() != (self.discriminator is not None):
            raise ValueError(
                f"{folder} was saved {'with' if path.is_file() else 'without'} a discriminator. "
                "Resume with the loss.adversarial_weight it was saved with."
            )
        if self.discriminator is not None:
            self.discriminator.load_head_state_dict(load_file(path))

    def save_result(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """Save the pipeline in mode "full", else the adapters and the trained parts of the VAE."""
        if self.args.mode == "full":
            self.pipe.save_pretrained(folder)
            return
        weights = self.bokeh_weights(trained)
        write_bokeh_weights(weights, folder)
        if self.args.export == "official":
            write_bokeh_weights(weights, folder / OFFICIAL_FOLDER, layout="official")

    def card_text(self, scores: Mapping[str, Any], log: list[dict[str, Any]]) -> CardText:
        return bokehdiff_card_text(self.args, dict(scores), log)


# -- Models --------------------------------------------------------------------------------------


def build_pipeline(args: argparse.Namespace) -> BokehDiffPipeline:
    """Return the pipeline to train: a pretrained one, or one made from nothing.

    From nothing, a LightTransportUNet is put on a lossless codec, with the schedule of SDXL and an
    empty prompt. Its weights come from torch's global generator, which the caller seeds.
    """
    changes = dict(args.model_pisa or {})
    pisa = PisaConfig.preset(changes.pop("preset", "paper"))
    pisa = PisaConfig.from_dict({**pisa.to_dict(), **changes})
    if args.pretrained is not None:
        own = {} if args.model_pisa is None else {"pisa": pisa.to_dict()}
        return BokehDiffPipeline.from_pretrained(args.pretrained, **own)
    block_size = args.model_block_size
    channels = {"in_channels": 5 * block_size**2, "out_channels": 3 * block_size**2}
    try:
        unet = LightTransportUNet(block_size=block_size, **{**channels, **args.model_unet})
    except TypeError as error:
        raise ValueError(
            f"The settings in model.unet do not fit LightTransportUNet: {error}."
        ) from error
    return BokehDiffPipeline(
        vae=AutoencoderSpaceToDepth(block_size=block_size),
        unet=unet,
        scheduler=DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
        ),
        stored_prompt=StoredPrompt(tokens=1, embedding_channels=8, pooled_channels=8),
        pisa_layers="light_transport.attn",
        pisa=pisa.to_dict(),
    )


def select_trained_parameters(pipe: BokehDiffPipeline, args: argparse.Namespace) -> None:
    """Freeze what is not trained, add adapters, and put what is trained in float32.

    The prompt is embedded once. Where adapters are the result, nothing needs the text encoders any
    more, and the pipeline lets go of them.
    """
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False)
            component.eval()
    if args.mode == "full":
        trained_unet_parts = parts_to_train(pipe.unet, args)
        for name, parameter in pipe.unet.named_parameters():
            parameter.requires_grad_(name.split(".", 1)[0] in trained_unet_parts)
    pipe.vae.float()
    if pipe.text_encoder is not None and args.mode == "lora":
        without = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        pipe.register_modules(stored_prompt=pipe.make_stored_prompt(), **without)
    elif pipe.text_encoder is not None:
        pipe.bokeh_prompt()
    if args.mode == "lora":
        # What stays as it is needs no more digits than it is used with.
        precision = MIXED_PRECISION[args.mixed_precision]
        if precision is not None:
            pipe.unet.to(precision)
        pipe.unet.add_adapter(adapter_config(args, args.lora_targets))
    if args.vae_mode != "none":
        trained = trained_vae_layers(pipe)
        if args.vae_mode == "full":
            for value in codec_parameters(pipe.vae).values():
                value.requires_grad_(True)
        else:
            pipe.vae.add_adapter(adapter_config(args, trained))
    for component in (pipe.unet, pipe.vae):
        cast_training_params(component)
        if args.gradient_checkpointing and component._supports_gradient_checkpointing:
            component.enable_gradient_checkpointing()


def parts_to_train(unet: nn.Module, args: argparse.Namespace) -> list[str]:
    """Return the names of the children of the UNet that are trained in mode "full".

    Raises:
        ValueError: there is no such part, or no loss reaches one of them.
    """
    there = list(parts_of(dict(unet.named_parameters())))
    refines = not args.loss_disparity_weight.is_zero
    reached = [part for part in there if (refines if part == REFINER else renders(args))]
    wanted = reached if args.trained_parts is None else args.trained_parts
    for part in wanted:
        if part not in there:
            raise ValueError(
                f"trained_parts names {part!r}, which the UNet does not have. Its parts are "
                f"{', '.join(there)}."
            )
        if part not in reached:
            raise ValueError(
                f"trained_parts names {part!r}, which no loss reaches. The part {REFINER} learns "
                "from loss.disparity_weight, all others from the losses of the rendering."
            )
    if refines and REFINER not in wanted:
        raise ValueError(
            f"loss.disparity_weight trains the part {REFINER} of the UNet, and "
            + (
                "trained_parts leaves it out."
                if REFINER in there
                else "this one has none: set model.unet {refiner_block_out_channels: [...]}."
            )
        )
    return wanted


def adapter_config(args: argparse.Namespace, targets: list[str]) -> LoraConfig:
    """Adapters that change nothing before they are trained: A random, B zero."""
    return LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=targets,
    )


def trained_vae_layers(pipe: BokehDiffPipeline) -> list[str]:
    """Return the names of the convolutions and projections in the trained parts of the VAE.

    Raises:
        ValueError: it has none of these parts.
    """
    layers = [
        name
        for name, module in pipe.vae.named_modules()
        if name.startswith(VAE_TRAINED_PARTS) and isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    if not layers:
        raise ValueError(
            f"{type(pipe.vae).__name__} has no {' or '.join(VAE_TRAINED_PARTS)}. Use vae_mode none."
        )
    return layers


# -- Scenes --------------------------------------------------------------------------------------


def open_scenes(shards: str | None, seed: int, args: argparse.Namespace) -> tuple[Any, int | None]:
    """Return scenes by index and their number: those in `shards`, or endless ones on the fly."""
    # Reading shards does not need what making scenes needs.
    if shards is not None:
        from data_synthesis.reader import ShardedScenes

        scenes = ShardedScenes(shards)
        return scenes, len(scenes)
    if args.data_kind == "layers":
        from data_synthesis.layer_scenes import LayerScenes as Scenes
    else:
        from data_synthesis.procedural import ProceduralScenes as Scenes
    try:
        return Scenes(seed, size=args.data_size, **args.data_options), None
    except TypeError as error:
        raise ValueError(
            f"The settings in data.options do not fit {Scenes.__name__}: {error}."
        ) from error


def held_out_scenes(args: argparse.Namespace) -> list[dict[str, Tensor]]:
    """Return the first ``validation_scenes`` scenes of the held-out shards or seed."""
    scenes, count = open_scenes(args.validation_shards, args.validation_seed, args)
    wanted = args.validation_scenes if count is None else min(args.validation_scenes, count)
    return [scenes[index] for index in tqdm(range(wanted), desc="held-out scenes", leave=False)]

"""What training BokehFlow means: its network, its data, its losses, its files."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from bokehdiff import losses
from bokehdiff.depth_losses import scale_invariant_log_loss
from bokehdiff.models.bokehflow import BokehFlowModel, BokehFlowOutput
from bokehdiff.models.temporal_state import BokehFlowState
from bokehdiff.pipelines.bokehflow import BokehFlowPipeline
from bokehdiff.pipelines.bokehflow_loading import read_bokehflow
from training.bokehflow_card import bokehflow_card_text
from training.bokehflow_data import KINDS, held_out_samples, training_crops
from training.bokehflow_validation import validate_flow, validation_line
from training.model_card import CardText
from training.settings import check_at_least, mapping, schedule, setting_adder
from training.task import TrainingTask
from training.validation import Validation, without_border

MODEL_FOLDER = "model"
MIXED_PRECISION = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
VARIANTS = ("nano", "small", "base")
MIXERS = ("gated_conv", "bigdr")
LOSSES = ("reconstruction", "ssim", "perceptual", "depth", "coarse_depth", "physics", "warping")
SMALLEST_SPREAD = 0.05
"""In 1/m: the standard deviation that relative inverse depth is stretched to at least."""


# -- Settings ------------------------------------------------------------------------------------


def add_bokehflow_settings(parser: argparse.ArgumentParser) -> None:
    """Add the settings of model, data and losses."""
    add = setting_adder(parser.add_argument_group("model: pretrained, or made from nothing"))
    add("pretrained", help="folder or hub id of a BokehFlow to start from")
    add("model_variant", choices=VARIANTS, help="size of a network made from nothing")
    add("model_mixer", choices=MIXERS, default="gated_conv", help="what its blocks mix pixels with")
    add(
        "model_options",
        type=mapping,
        default={},
        help="further arguments of a BokehFlowModel made from nothing, for instance "
        "'{fusion: depth_to_bokeh, max_coc_radius: 96}'",
    )

    add = setting_adder(parser.add_argument_group("data: stored, or made on the fly"))
    add(
        "data_kind",
        choices=KINDS,
        default="stills",
        help="photographs with relative disparity; clips; or pairs of real photographs",
    )
    add(
        "data_folder",
        help="shards of `python -m data_synthesis procedural`, clips of `python -m data_synthesis "
        "clips`, or photographs with a manifest.jsonl; without it, stills and clips are made on "
        "the fly",
    )
    add("data_size", type=int, default=192, help="pixels a side of scenes made on the fly")
    add("data_seed", type=int, default=0, help="their seed")
    add(
        "data_options",
        type=mapping,
        default={},
        help="further arguments of ProceduralScenes or ClipScenes",
    )
    add("data_crop_size", type=int, default=128, help="pixels a side of the crops trained on")
    add(
        "data_true_depth_share",
        type=float,
        default=0.75,
        help="share of the samples rendered with the true depth; the others, with the network's",
    )

    add = setting_adder(
        parser.add_argument_group(
            "loss, on display-encoded sRGB in [-1, 1]; a weight is a number, or a mapping from "
            "steps to numbers, linear in between"
        )
    )
    add("loss_reconstruction_weight", type=schedule, default="1", help="of the mean difference")
    add("loss_ssim_weight", type=schedule, default="1", help="of 1 - SSIM")
    add("loss_perceptual_weight", type=schedule, default="0", help="of LPIPS (VGG)")
    add("loss_perceptual_weights", help="file of VGG-16; without it, torchvision's download")
    add("loss_depth_weight", type=schedule, default="0.1", help="of SILog of the depth")
    add(
        "loss_coarse_depth_weight",
        type=schedule,
        default="0.1",
        help="of the logarithm of the coarse depth that sets the gates of the mixer bigdr",
    )
    add(
        "loss_physics_weight",
        type=schedule,
        default="0.2",
        help="of the mean difference of what the lens formula alone renders",
    )
    add("loss_warping_weight", type=schedule, default="0.2", help="of flicker, in clips alone")
    add("loss_border", type=int, default=0, help="pixels at the border that count for nothing")

    add = setting_adder(parser.add_argument_group("held-out scenes, of data_kind"))
    add("validation_scenes", type=int, default=16, help="their number; 0 does not validate")
    add("validation_folder", help="as data_folder; without it, scenes on the fly")
    add("validation_seed", type=int, default=1_000_003, help="seed of held-out scenes")
    add("validation_pictures", type=int, default=4, help="how many of them are shown")


def check_bokehflow_settings(args: argparse.Namespace) -> None:
    """Raise ValueError for settings that cannot work, before anything is written."""
    if (args.pretrained is None) == (args.model_variant is None):
        raise ValueError(
            "Say where the model comes from: either pretrained (a folder or hub id), or "
            f"model.variant ({', '.join(VARIANTS)}: a network made from nothing), not both."
        )
    if args.pretrained is not None and args.model_options:
        raise ValueError(
            "model.options are of a network made from nothing; a pretrained one has its own. Leave "
            "them out."
        )
    for name in ("gradient_checkpointing", "compile"):
        if getattr(args, name):
            raise ValueError(f"BokehFlow is not trained with {name}. Leave it out.")
    check_at_least(
        args,
        {
            **dict.fromkeys(("data_size", "data_crop_size"), 16),
            **dict.fromkeys(("data_seed", "loss_border", "validation_scenes"), 0),
            **dict.fromkeys(("validation_seed", "validation_pictures"), 0),
        },
    )
    if not 0 <= args.data_true_depth_share <= 1:
        raise ValueError(
            "The setting data_true_depth_share must be a share from 0 to 1, got "
            f"{args.data_true_depth_share}."
        )
    if all(
        getattr(args, f"loss_{name}_weight").is_zero
        for name in ("reconstruction", "ssim", "perceptual")
    ):
        raise ValueError(
            "Nothing tells the rendering what it should be: give loss.reconstruction_weight, "
            "loss.ssim_weight or loss.perceptual_weight a value."
        )
    if 2 * args.loss_border > args.data_crop_size - losses.SSIM_WINDOW:
        raise ValueError(
            f"A loss.border of {args.loss_border} pixels on each side leaves less than "
            f"{losses.SSIM_WINDOW} of crops of {args.data_crop_size} pixels. Lower loss.border or "
            "raise data.crop_size."
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
                f"Crops of {args.data_crop_size} pixels do not fit {args.data_kind} of "
                f"{args.data_size} pixels. Lower data.crop_size or raise data.size."
            )
        if args.validation_folder is None and args.validation_seed == args.data_seed:
            raise ValueError(
                "validation_seed equals data.seed, so the run would be validated on scenes it has "
                "trained on. Change one of them."
            )


# -- The task ------------------------------------------------------------------------------------


class BokehFlowTask(TrainingTask):
    """From frames all in focus, and a lens, to the same frames with lens blur.

    A clip is unrolled: each frame is rendered with the state that the one before it left, and
    gradients go back through all of them.

    Attributes:
        network: what is trained.
        perceptual: LPIPS, if its weight is not zero.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        """Make what `args` describe. Random weights come from torch's global generator."""
        super().__init__()
        self.args = args
        self.network = build_network(args)
        self.perceptual: losses.PerceptualLoss | None = None
        if not args.loss_perceptual_weight.is_zero:
            self.perceptual = losses.PerceptualLoss.from_backbone(args.loss_perceptual_weights)
        self._held_out: list[dict[str, Tensor]] | None = None
        self.train()

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay is for this parameter: not for norms, biases and gates."""
        return parameter.ndim > 1

    # -- One forward pass ------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Nothing but the learning rate and the weights of the losses changes over the run."""

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Return ``loss`` and those of its unweighted parts that count, means over the frames.

        Args:
            batch: see `training.bokehflow_data`.
            step: optimiser steps done.
        """
        count = batch["frames"].shape[1]
        sums: dict[str, Tensor] = {}
        state: BokehFlowState | None = None
        previous: Tensor | None = None
        for number in range(count):
            out, own = self.render(batch, number, state)
            terms = self.frame_terms(batch, number, out, own)
            bokeh = 2 * out.bokeh.float() - 1
            if previous is not None and not self.args.loss_warping_weight.is_zero:
                terms["warping"] = losses.warping_loss(
                    *(without_border(one, self.args.loss_border) for one in (bokeh, previous)),
                    *(
                        without_border(batch[name][:, number], self.args.loss_border)
                        for name in ("motion", "visible")
                    ),
                )
            for name, term in terms.items():
                # Nothing comes before the first frame.
                frames = count - 1 if name == "warping" else count
                sums[name] = sums.get(name, term.new_zeros(())) + term / frames
            state, previous = out.state, bokeh
        loss = batch["frames"].new_zeros(())
        for name, term in sums.items():
            loss = loss + getattr(self.args, f"loss_{name}_weight").at(step) * term
        return {"loss": loss, **sums}

    def frame_terms(
        self, batch: dict[str, Tensor], number: int, out: BokehFlowOutput, own: Tensor
    ) -> dict[str, Tensor]:
        """Return the unweighted losses of frame `number` but that of flicker, scalars."""
        args = self.args
        target, bokeh, physics = (
            without_border(2 * picture.float() - 1, args.loss_border)
            for picture in (batch["bokeh"][:, number], out.bokeh, out.physics)
        )
        terms = {}
        if not args.loss_reconstruction_weight.is_zero:
            terms["reconstruction"] = losses.reconstruction(bokeh, target, "l1")
        if not args.loss_ssim_weight.is_zero:
            terms["ssim"] = losses.structural_similarity_loss(bokeh, target)
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(bokeh.clamp(-1, 1), target)
        if not args.loss_physics_weight.is_zero:
            terms["physics"] = losses.reconstruction(physics, target, "l1")
        return terms | self.depth_terms(batch, number, out, own)

    def depth_terms(
        self, batch: dict[str, Tensor], number: int, out: BokehFlowOutput, own: Tensor
    ) -> dict[str, Tensor]:
        """Return the unweighted losses of the network's own inverse depth `own` (B, 1, H, W)."""
        args = self.args
        if args.loss_depth_weight.is_zero and args.loss_coarse_depth_weight.is_zero:
            return {}
        true, known = self.true_inverse_depth(batch, number, own)
        terms = {}
        if not args.loss_depth_weight.is_zero:
            terms["depth"] = scale_invariant_log_loss(1 / own[:, 0], 1 / true[:, 0], known[:, 0])
        if out.coarse_inverse_depth is not None and not args.loss_coarse_depth_weight.is_zero:
            coarse = out.coarse_inverse_depth
            wanted = nn.functional.adaptive_avg_pool2d(true, coarse.shape[-2:])
            whole = nn.functional.adaptive_avg_pool2d(known.to(true), coarse.shape[-2:]) > 0.99
            error = (coarse.float().log() - wanted.log()).abs() * whole
            terms["coarse_depth"] = error.sum() / whole.sum().clamp_min(1)
        return terms

    def true_inverse_depth(
        self, batch: dict[str, Tensor], number: int, own: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return true inverse depth (B, 1, H, W) in 1/m, and where it is known.

        Relative maps are laid on the network's own depth; see `laid_on`. What is nearer or farther
        than the network can say counts as the nearest or farthest that it can.
        """
        config = self.network.config
        stored = batch["inverse_depth"][:, number]
        known = stored.isfinite()
        metric = batch["metric"].view(-1, 1, 1, 1)
        true = torch.where(metric, stored, laid_on(own.detach(), stored))
        farthest, nearest = 1 / config.farthest_m, 1 / config.nearest_m
        # Where it is unknown it has a value, so that the logarithms there do no harm.
        return true.where(known, own.detach()).clamp(farthest, nearest), known

    def render(
        self, batch: dict[str, Tensor], number: int, state: BokehFlowState | None
    ) -> tuple[BokehFlowOutput, Tensor]:
        """Return frame `number` with lens blur, and the network's own inverse depth (B, 1, H, W).

        Samples that give depth are rendered with it where it is known, the others with the
        network's own.

        Args:
            batch: see `training.bokehflow_data`.
            number: of the frame.
            state: of the frame before.
        """
        network = self.network
        image = batch["frames"][:, number]
        width = batch["photo_width_px"]
        stored = batch["inverse_depth"][:, number]
        given = stored.isfinite() & batch["gives_depth"].view(-1, 1, 1, 1)

        def rendered(inverse_depth: Tensor | None) -> BokehFlowOutput:
            asked: dict[str, Any] = {"photo_width_px": width, "return_physics": True}
            if "camera" not in batch:
                return network.blur(
                    observation,
                    *(batch["df"], batch["K"]),
                    **{"disparity": inverse_depth, "metric": True, **asked},
                )
            camera = batch["camera"].unbind(1)
            out: BokehFlowOutput = network(
                observation, *camera, **{"inverse_depth": inverse_depth, **asked}
            )
            return out

        precision = MIXED_PRECISION[self.args.mixed_precision]
        with torch.autocast(image.device.type, precision, enabled=precision is not None):
            observation = network.observe(image, state=state)
            # A network whose depth depends on the camera has to be asked for it first.
            alone = rendered(None) if observation.inverse_depth is None else None
            own = observation.inverse_depth if alone is None else alone.inverse_depth
            if alone is not None and not given.any():
                return alone, own
            return rendered(torch.where(given, stored, own)), own

    # -- Data ------------------------------------------------------------------------------------

    def training_samples(self) -> Dataset[dict[str, Tensor]]:
        return training_crops(self.args)

    @torch.no_grad()
    def validate(self) -> Validation | None:
        """Score the first ``validation_scenes`` held-out scenes; see `validate_flow`."""
        if self.args.validation_scenes == 0:
            return None
        if self._held_out is None:
            self._held_out = held_out_samples(self.args)
        return validate_flow(
            self.render,
            self.network,
            self._held_out,
            self.args.loss_border,
            self.device,
            pictures=self.args.validation_pictures,
        )

    def validation_summary(self, scores: Mapping[str, Any]) -> str:
        return validation_line(scores)

    @contextlib.contextmanager
    def as_saved(self) -> Iterator[None]:
        """As it is: nothing of this network is different in training."""
        yield

    # -- Files -----------------------------------------------------------------------------------

    def save_weights(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """Save ``model/``, which ``BokehFlowModel.from_pretrained`` reads."""
        self.network.save_pretrained(folder / MODEL_FOLDER)

    def load_weights(self, folder: Path) -> None:
        """Load what `save_weights` saved.

        Raises:
            ValueError: the folder holds no network, or one of other options.
        """
        saved = read_bokehflow(str(folder / MODEL_FOLDER))
        if options_of(saved) != options_of(self.network):
            raise ValueError(
                f"{folder} holds a network of other options. Resume with the model it was saved "
                "with."
            )
        self.network.load_state_dict(saved.state_dict())

    def save_result(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """Save the pipeline, as ``BokehFlowPipeline`` and ``BokehFlowVideoPipeline`` read it."""
        BokehFlowPipeline(self.network).save_pretrained(folder)

    def card_text(self, scores: Mapping[str, Any], log: list[dict[str, Any]]) -> CardText:
        return bokehflow_card_text(self.args, dict(scores), log)


def build_network(args: argparse.Namespace) -> BokehFlowModel:
    """Return the network to train, in float32: a pretrained one, or one made from nothing.

    What no sample reaches is frozen: the gates between frames, where there is one frame, and the
    coarse depth without its loss.

    Raises:
        ValueError: the settings do not fit it, or there is no such network.
    """
    if args.pretrained is not None:
        network = read_bokehflow(args.pretrained)
    else:
        try:
            network = BokehFlowModel.from_variant(
                args.model_variant, mixer=args.model_mixer, **args.model_options
            )
        except TypeError as error:
            raise ValueError(
                f"The settings in model.options do not fit BokehFlowModel: {error}."
            ) from error
    network.requires_grad_(True)
    if args.data_kind != "clips":
        for part in ("stillness", "depth_carry", "bokeh_carry"):
            if hasattr(network, part):
                getattr(network, part).requires_grad_(False)
    if hasattr(network, "coarse_depth") and args.loss_coarse_depth_weight.is_zero:
        network.coarse_depth.requires_grad_(False)
    return network.train()


def options_of(network: BokehFlowModel) -> dict[str, Any]:
    """Return the arguments that `network` was made with."""
    return {name: value for name, value in network.config.items() if not name.startswith("_")}


def laid_on(own: Tensor, relative: Tensor) -> Tensor:
    """Return relative inverse depth in the metres of the network: ``a relative + b``.

    a and b are those of least squares against the network's own inverse depth, per sample, over
    what is known. a is at least so large that the map varies by `SMALLEST_SPREAD`, so that a
    network that sees everything in one plane, or near and far swapped, is told otherwise.

    Args:
        own: (B, 1, H, W) in 1/m, without gradients.
        relative: (B, 1, H, W), larger is nearer, not finite where unknown.
    """
    known = relative.isfinite()
    count = known.sum((1, 2, 3), keepdim=True).clamp_min(1)
    values = relative.where(known, torch.zeros(()).to(relative))

    def mean(one: Tensor) -> Tensor:
        return (one * known).sum((1, 2, 3), keepdim=True) / count

    middle, own_middle = mean(values), mean(own)
    variance = mean((values - middle).square())
    covariance = mean((values - middle) * (own - own_middle))
    smallest = SMALLEST_SPREAD / variance.sqrt().clamp_min(1e-6)
    scale = torch.maximum(covariance / variance.clamp_min(1e-12), smallest)
    return own_middle + scale * (relative - middle)

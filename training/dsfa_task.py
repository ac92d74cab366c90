"""What training depth from a bokeh stack means: network, data, losses, files."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import DPTImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from bokehdiff.depth_losses import gradient_loss, scale_invariant_log_loss, valid_depth
from bokehdiff.models.depth_anything_dsfa import (
    DepthAnythingDSFAConfig,
    DepthAnythingDSFAForDepthEstimation,
)
from evaluation.depth_metrics import depth_metrics
from training.dsfa_card import dsfa_card_text
from training.dsfa_data import StackCrops, held_out_stacks, open_stacks
from training.model_card import CardText
from training.samples import seeded_generator
from training.settings import check_at_least, mapping, names, schedule, setting_adder
from training.task import TrainingTask, trained_parameters
from training.validation import Validation, picture_grid

WEIGHTS_FILE = "model.safetensors"
FUSION = "fusion"
"""The part of the network that sees the stack."""
MIXED_PRECISION = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
VALIDATION_BATCH = 16


def add_dsfa_settings(parser: argparse.ArgumentParser) -> None:
    """Add the settings of model, data and losses."""
    add = setting_adder(parser.add_argument_group("model: pretrained, or made from nothing"))
    add(
        "pretrained",
        help="folder or hub id of a Depth Anything, which gets fresh DSFA blocks, or of one that "
        "has them",
    )
    add(
        "model_fusion",
        type=mapping,
        default={},
        help="options of DepthAnythingDSFAConfig for a Depth Anything without DSFA blocks, for "
        "instance '{largest_strength: 30}'",
    )
    add(
        "model_network",
        type=mapping,
        help="arguments of a DepthAnythingDSFAConfig made from nothing; backbone_config holds "
        "those of a Dinov2Config",
    )
    add(
        "model_initial_depth",
        type=float,
        help="metres that a network made from nothing starts at; without it, half its max_depth",
    )
    add(
        "trained_parts",
        type=names,
        help="parts of the network that are trained: backbone, neck, head, fusion; without it, all "
        "that the samples reach",
    )

    add = setting_adder(parser.add_argument_group("data: stacks with depth, or made on the fly"))
    add(
        "data_stacks",
        help="folder written by `python -m data_synthesis stacks`, or a manifest.jsonl of ref, "
        "depth, stack and k",
    )
    add("data_depth_scale", type=float, default=1e-3, help="metres per step of 16-bit PNGs of it")
    add("data_size", type=int, default=128, help="pixels a side of scenes made on the fly")
    add("data_seed", type=int, default=0, help="their seed")
    add("data_options", type=mapping, default={}, help="further arguments of StackScenes")
    add("data_crop_size", type=int, default=128, help="pixels a side of the crops trained on")

    add = setting_adder(parser.add_argument_group("stack: the frames a step sees"))
    add("stack_fewest", type=int, default=2, help="frames of a step, at least")
    add("stack_most", type=int, default=3, help="and at most; 0 trains without any stack")
    add(
        "stack_drop",
        type=float,
        default=0.1,
        help="share of the steps without a stack, so that depth of a single picture stays good",
    )

    add = setting_adder(
        parser.add_argument_group(
            "loss, on the logarithm of depth; a weight is a number, or a mapping from steps to "
            "numbers, linear in between"
        )
    )
    add("loss_silog_weight", type=schedule, default="1", help="of SILog")
    add("loss_silog_variance_focus", type=float, default=0.5, help="1 ignores a wrong scale")
    add("loss_gradient_weight", type=schedule, default="0.5", help="of the edges of depth")
    add("loss_smallest_depth", type=float, default=1e-3, help="metres; nearer counts for nothing")
    add("loss_largest_depth", type=float, default=80.0, help="metres; farther counts for nothing")

    add = setting_adder(parser.add_argument_group("held-out stacks"))
    add("validation_scenes", type=int, default=16, help="their number; 0 does not validate")
    add("validation_stacks", help="a folder or manifest as data_stacks; without it, on the fly")
    add("validation_seed", type=int, default=1_000_003, help="seed of held-out stacks")
    add("validation_pictures", type=int, default=4, help="how many of them are shown")


def check_dsfa_settings(args: argparse.Namespace) -> None:
    """Raise ValueError for settings that cannot work, before anything is written."""
    if (args.pretrained is None) == (args.model_network is None):
        raise ValueError(
            "Say where the model comes from: either pretrained (a folder or hub id), or "
            "model.network (the arguments of a network made from nothing), not both."
        )
    if args.model_network is not None and not isinstance(
        args.model_network.get("backbone_config"), dict
    ):
        raise ValueError("model.network lacks backbone_config, the arguments of a Dinov2Config.")
    if args.model_network is not None and args.model_fusion:
        raise ValueError(
            "model.fusion adds DSFA blocks to a pretrained Depth Anything. For a network made from "
            "nothing put its options into model.network."
        )
    if args.model_initial_depth is not None and (
        args.model_network is None
        or not 0 < args.model_initial_depth < args.model_network.get("max_depth", 1)
    ):
        raise ValueError(
            f"model.initial_depth is {args.model_initial_depth}; wanted metres between 0 and the "
            "max_depth of model.network, and leave it out for pretrained weights."
        )
    check_at_least(
        args,
        {
            **dict.fromkeys(("data_size", "data_crop_size"), 1),
            **dict.fromkeys(("data_seed", "validation_seed", "validation_scenes"), 0),
            **dict.fromkeys(("validation_pictures", "stack_fewest", "stack_most"), 0),
        },
    )
    if args.stack_most < args.stack_fewest:
        raise ValueError(
            f"stack.fewest is {args.stack_fewest} and stack.most {args.stack_most}; wanted at most "
            "as many at least as at most. To train without any stack set both to 0."
        )
    if not 0 <= args.stack_drop < 1:
        raise ValueError(
            f"The setting stack_drop must be a share from 0 to less than 1, got {args.stack_drop}."
        )
    if args.loss_silog_weight.is_zero:
        raise ValueError("Without loss.silog_weight nothing tells depths their metres. Set it.")
    valid_depth(torch.ones(1), args.loss_smallest_depth, args.loss_largest_depth)
    if args.data_stacks is None and args.validation_stacks is None:
        if args.data_seed == args.validation_seed and args.validation_scenes:
            raise ValueError(
                "validation_seed equals data.seed, so the run would be validated on scenes it has "
                "trained on. Change one of them."
            )


class DSFATask(TrainingTask):
    """Metric depth of a sharp picture, from it and the frames of its bokeh stack.

    Every step sees so many frames as are drawn for it, the same number in all samples of the step,
    each sample its own, with their K in px*m of the crop.

    Attributes:
        network: what is trained.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        """Make what `args` describe. Random weights come from torch's global generator."""
        super().__init__()
        self.args = args
        self.network = build_network(args)
        self._select_trained_parts()
        if args.gradient_checkpointing:
            self.network.gradient_checkpointing_enable()
        mean, deviation = (
            torch.tensor(values).view(3, 1, 1)
            for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("deviation", deviation, persistent=False)
        self._held_out: list[dict[str, Tensor]] | None = None
        self.train()

    def _select_trained_parts(self) -> None:
        """Freeze the parts that are not trained.

        Raises:
            ValueError: there is no such part, or no sample reaches it.
        """
        there = [part for part, _ in self.network.named_children()]
        reached = [part for part in there if part != FUSION or self.args.stack_most]
        wanted = reached if self.args.trained_parts is None else self.args.trained_parts
        for part in wanted:
            if part not in there:
                raise ValueError(
                    f"trained_parts names {part!r}, which the network does not have. Its parts are "
                    f"{', '.join(there)}."
                )
            if part not in reached:
                raise ValueError(
                    f"trained_parts names {FUSION!r}, and no step sees a stack. Raise stack.most."
                )
        self.network.requires_grad_(False)
        for part, module in self.network.named_children():
            module.requires_grad_(part in wanted)
        # What the forward pass never reaches would keep processes that share gradients waiting.
        self.network.backbone.embeddings.mask_token.requires_grad_(False)
        first_fusion = self.network.neck.fusion_stage.layers[0]
        first_fusion.residual_layer1.requires_grad_(False)

    # -- One forward pass ------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Nothing but the learning rate and the weights of the losses changes over the run."""

    def frames_of(self, step: int) -> int:
        """How many frames step `step` sees: a function of the seed and the step alone."""
        args = self.args
        generator = seeded_generator(args.seed, 2, step)
        if float(torch.rand((), generator=generator)) < args.stack_drop:
            return 0
        span = args.stack_most - args.stack_fewest + 1
        return args.stack_fewest + int(torch.randint(span, (), generator=generator))

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Return ``loss`` and its unweighted parts ``silog`` and ``gradient``.

        Args:
            batch: image (B, 3, C, C), depth (B, 1, C, C), stack (B, N, 3, C, C) and K (B, N).
            step: optimiser steps done.

        Raises:
            ValueError: the stacks have fewer frames than ``stack_most``.
        """
        args = self.args
        if batch["K"].shape[1] < args.stack_most:
            raise ValueError(
                f"The stacks have {batch['K'].shape[1]} frames and stack.most is "
                f"{args.stack_most}. Lower it, or make stacks of more frames."
            )
        count = self.frames_of(step)
        prediction = self.depth(batch["image"], batch["stack"][:, :count], batch["K"][:, :count])
        depth = batch["depth"][:, 0]
        valid = valid_depth(depth, args.loss_smallest_depth, args.loss_largest_depth)
        terms = {
            "silog": scale_invariant_log_loss(
                prediction, depth, valid, variance_focus=args.loss_silog_variance_focus
            ),
            "gradient": gradient_loss(prediction, depth, valid),
        }
        loss = sum(getattr(args, f"loss_{name}_weight").at(step) * terms[name] for name in terms)
        if count == 0:
            # Processes that share gradients wait for those of all that is trained.
            for value in self.network.fusion.parameters():
                if value.requires_grad:
                    loss = loss + 0 * value.sum()
        return {"loss": loss, **terms}

    def depth(self, image: Tensor, stack: Tensor, K: Tensor) -> Tensor:
        """Return depth (B, H, W) in metres, in float32, above 0.

        Args:
            image: (B, 3, H, W) in [0, 1].
            stack: (B, N, 3, H, W) in [0, 1]; without frames the network sees the image alone.
            K: (B, N), px*m of these pictures.
        """
        precision = MIXED_PRECISION[self.args.mixed_precision]
        pixels, frames = ((one - self.mean) / self.deviation for one in (image, stack))
        with torch.autocast(image.device.type, precision, enabled=precision is not None):
            seen = (frames, K) if K.shape[1] else ()
            depth: Tensor = self.network(pixels, *seen).predicted_depth
        # Where a sigmoid rounds to zero, or a relative head cuts off, the logarithm has no value.
        return depth.float().clamp_min(1e-4)

    # -- Data ------------------------------------------------------------------------------------

    def training_samples(self) -> Dataset[dict[str, Tensor]]:
        stacks, count = open_stacks(self.args.data_stacks, self.args.data_seed, self.args)
        return StackCrops(stacks, count, self.args.data_crop_size, self.args.seed)

    @torch.no_grad()
    def validate(self) -> Validation | None:
        """Score held-out stacks: depth from the stack, from the picture alone, and from copies.

        Scores are means over scenes of `evaluation.depth_metrics`: ``abs_rel`` and ``delta1`` as
        trained, with all frames if there are any; ``abs_rel_single`` without a stack,
        ``abs_rel_copies`` with the sharp picture in place of every frame; ``stack_effect``, the
        mean of |depth from copies - depth from the stack| / depth from the stack.
        """
        args = self.args
        if args.validation_scenes == 0:
            return None
        if self._held_out is None:
            self._held_out = held_out_stacks(args)
        rows: list[dict[str, float]] = []
        pictures: list[dict[str, PIL.Image.Image]] = []
        for start in range(0, len(self._held_out), VALIDATION_BATCH):
            scenes = self._held_out[start : start + VALIDATION_BATCH]
            image, depth, stack, K = (
                torch.stack([scene[name] for scene in scenes]).to(self.mean.device)
                for name in ("image", "depth", "stack", "K")
            )
            stack, K = stack[:, : args.stack_most], K[:, : args.stack_most]
            shown = {"": self.depth(image, stack, K)}
            if args.stack_most:
                copies = image[:, None].expand_as(stack)
                shown["_copies"] = self.depth(image, copies, K)
                shown["_single"] = self.depth(image, stack[:, :0], K[:, :0])
            valid = valid_depth(depth[:, 0], args.loss_smallest_depth, args.loss_largest_depth)
            for index in range(len(scenes)):
                row: dict[str, float] = {}
                for suffix, predicted in shown.items():
                    found = depth_metrics(
                        *(one[index].cpu().numpy() for one in (predicted, depth[:, 0], valid))
                    )
                    kept = ("abs_rel", "delta1") if not suffix else ("abs_rel",)
                    row |= {name + suffix: found[name] for name in kept if found}
                if args.stack_most:
                    change = (shown["_copies"][index] / shown[""][index] - 1).abs()
                    row["stack_effect"] = float(change.mean())
                rows.append(row)
                if len(pictures) < args.validation_pictures:
                    pictures.append(
                        _pictures(image[index], stack[index], depth[index, 0], shown[""][index])
                    )
        names_ = dict.fromkeys(name for row in rows for name in row)
        scores: dict[str, float | int] = {"scenes": len(rows)}
        for name in names_:
            values = [row[name] for row in rows if name in row]
            scores[name] = sum(values) / len(values)
        return Validation(scores, picture_grid(pictures) if pictures else None)

    def validation_summary(self, scores: Mapping[str, Any]) -> str:
        parts = [
            f"AbsRel {scores.get('abs_rel', math.nan):.4f}, "
            f"delta1 {scores.get('delta1', math.nan):.3f}"
        ]
        if "stack_effect" in scores:
            parts.append(
                f"without the stack {scores.get('abs_rel_single', math.nan):.4f}, with copies "
                f"{scores.get('abs_rel_copies', math.nan):.4f}, which change depth by "
                f"{scores['stack_effect']:.1%}"
            )
        return "; ".join(parts)

    @contextlib.contextmanager
    def as_saved(self) -> Iterator[None]:
        """Without dropout."""
        self.eval()
        try:
            yield
        finally:
            self.train()

    # -- Files -----------------------------------------------------------------------------------

    def save_weights(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """Save what is trained; the rest is as it was at the start."""
        values = {name: value.contiguous() for name, value in trained.items()}
        save_file(values, folder / WEIGHTS_FILE)

    def load_weights(self, folder: Path) -> None:
        """Load what `save_weights` saved.

        Raises:
            ValueError: the folder holds weights of other parts or of another size.
        """
        path = folder / WEIGHTS_FILE
        if not path.is_file():
            raise ValueError(f"{folder} holds no {WEIGHTS_FILE}. Resume from another checkpoint.")
        stored = load_file(path)
        trained = trained_parameters(self)
        odd = sorted(
            name
            for name in stored.keys() | trained.keys()
            if name not in stored
            or name not in trained
            or stored[name].shape != trained[name].shape
        )
        if odd:
            raise ValueError(
                f"{path} holds weights of other parts, or of another size: {', '.join(odd[:3])} "
                f"({len(odd)} in all). Resume with its model, trained_parts and stack.most."
            )
        with torch.no_grad():
            for name, value in trained.items():
                value.copy_(stored[name])

    def save_result(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """Save the network and its image processor, as ``DepthFromBokehPipeline`` reads them."""
        self.network.save_pretrained(folder)
        side = self.args.data_crop_size
        processor = DPTImageProcessorPil(
            size={"height": side, "width": side},
            keep_aspect_ratio=True,
            ensure_multiple_of=self.network.config.patch_size,
            image_mean=IMAGENET_DEFAULT_MEAN,
            image_std=IMAGENET_DEFAULT_STD,
        )
        processor.save_pretrained(folder)

    def card_text(self, scores: Mapping[str, Any], log: list[dict[str, Any]]) -> CardText:
        return dsfa_card_text(self.args, dict(scores), log)


def build_network(args: argparse.Namespace) -> DepthAnythingDSFAForDepthEstimation:
    """Return the network to train, in float32: a pretrained one, or one made from nothing.

    Raises:
        ValueError: the settings do not fit it, or DSFA is asked for twice.
    """
    if args.pretrained is None:
        from transformers import Dinov2Config

        values = {"depth_estimation_type": "metric", **args.model_network}
        _check_names("model.network", values, DepthAnythingDSFAConfig)
        _check_names("model.network.backbone_config", values["backbone_config"], Dinov2Config)
        try:
            backbone = Dinov2Config(
                apply_layernorm=True,
                reshape_hidden_states=False,
                **values.pop("backbone_config"),
            )
            config = DepthAnythingDSFAConfig(
                **{
                    "backbone_config": backbone,
                    "patch_size": backbone.patch_size,
                    "reassemble_hidden_size": backbone.hidden_size,
                    **values,
                }
            )
            network = DepthAnythingDSFAForDepthEstimation(config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"The settings in model.network do not fit: {error}") from error
        if args.model_initial_depth is not None:
            # Half of max_depth is far from most scenes, and units of the head die on the way there.
            share = args.model_initial_depth / config.max_depth
            nn.init.constant_(network.head.conv3.bias, math.log(share / (1 - share)))
        projection = network.backbone.embeddings.patch_embeddings.projection
        with torch.no_grad():
            projection.weight.copy_(cosine_filters(*projection.weight.shape[::2]))
        return network
    if _has_fusion(args.pretrained):
        if args.model_fusion:
            raise ValueError(
                f"{args.pretrained} has DSFA blocks already, with options of their own. Leave out "
                "model.fusion."
            )
        network = DepthAnythingDSFAForDepthEstimation.from_pretrained(
            args.pretrained, dtype=torch.float32
        )
    else:
        _check_names("model.fusion", args.model_fusion, DepthAnythingDSFAConfig)
        network = DepthAnythingDSFAForDepthEstimation.from_depth_anything(
            args.pretrained, **args.model_fusion
        ).float()
    if network.config.depth_estimation_type != "metric":
        raise ValueError(
            f"{args.pretrained} gives relative depth. Start from metric weights, or give it a "
            "metric head: model.fusion '{depth_estimation_type: metric, max_depth: 20}'."
        )
    return network


def _check_names(setting: str, values: Mapping[str, Any], kind: type) -> None:
    """Raise ValueError for names a configuration does not have; it would take them silently."""
    if unknown := sorted(values.keys() - kind().to_dict().keys()):
        raise ValueError(
            f"The settings in {setting} do not fit: {kind.__name__} has no {', '.join(unknown)}."
        )


def cosine_filters(count: int, side: int) -> Tensor:
    """Return (count, 3, side, side) filters of a patch: what a network from nothing looks through.

    Products of cosines along both axes, of the sum of the colours and of two differences of them,
    from coarse to fine, colours four steps later than brightness. Finer ones are louder in
    proportion to their frequency, which makes up for what pictures lack there, so that the
    sharpness of a patch is heard beside its brightness. Random filters see little else than that.
    Filters beyond the 3 side^2 there are, are zero.
    """
    places = torch.arange(side, dtype=torch.float64) + 0.5
    waves = torch.cos(math.pi / side * torch.arange(side)[:, None] * places)
    waves = waves / waves.norm(dim=1, keepdim=True)
    colours = torch.tensor([[1, 1, 1], [1, 0, -1], [-0.5, 1, -0.5]], dtype=torch.float64)
    colours = colours / colours.norm(dim=1, keepdim=True)
    kinds = sorted(
        (math.hypot(down, right) + (4 if colour else 0), colour, down, right)
        for colour in range(3)
        for down in range(side)
        for right in range(side)
    )
    filters = torch.zeros(count, 3, side, side)
    for place, (_, colour, down, right) in enumerate(kinds[:count]):
        wave = waves[down][:, None] * waves[right]
        loudness = (1 + math.hypot(down, right)) / side
        filters[place] = (loudness * colours[colour][:, None, None] * wave).float()
    return filters


def _has_fusion(pretrained: str) -> bool:
    from transformers import AutoConfig

    return isinstance(AutoConfig.from_pretrained(pretrained), DepthAnythingDSFAConfig)


def _pictures(
    image: Tensor, stack: Tensor, depth: Tensor, predicted: Tensor
) -> dict[str, PIL.Image.Image]:
    """A row for `picture_grid`; inverse depths share the range of the true one."""
    inverse = [1 / one.clamp_min(1e-3) for one in (depth, predicted)]
    largest = inverse[0].max()
    row = {"picture": image}
    if len(stack):
        row["strongest frame"] = stack[int(stack.std((-1, -2)).mean(-1).argmin())]
    row |= {"true 1/depth": inverse[0] / largest, "predicted": inverse[1] / largest}
    shown = {}
    for title, values in row.items():
        levels = values.clamp(0, 1).mul(255).round().byte().cpu().numpy()
        levels = levels.transpose(1, 2, 0) if levels.ndim == 3 else levels
        shown[title] = PIL.Image.fromarray(levels).convert("RGB")
    return shown

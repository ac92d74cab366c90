"""What the model card of a LiteBokeh says, whatever run it comes from."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bokehdiff.models.litebokeh import GlassEncNet, TinyUnet
from training.model_card import CardText, scores_table, weighted_sum
from training.settings import Schedule

LICENSE_FROM_NOTHING = "apache-2.0"
"""Of weights that owe nothing to a model or to pictures of others."""

USAGE = """\
from bokehdiff import LiteBokehPipeline

pipe = LiteBokehPipeline.from_pretrained("PATH_TO_THIS_FOLDER")
image = pipe(photo).images[0]
image = pipe(photo, enhance=False).images[0]  # without the enhancement block"""

INTENDED_USE = """\
Lens blur behind the subject of a photograph, on phones and other small machines. It needs the
photograph alone: no depth and no camera. It is no camera either: a rendered photograph is no
evidence of how a scene was taken."""

LIMITS = """\
**The strength of the blur cannot be controlled, and neither can the focus.** The blur is that of
the photographs this network was trained with, in pixels: a photograph of twice the size is blurred
half as much, measured in its own width. What the subject is, the network decides by what it sees; a
scene unlike those it was trained with may be blurred in part, or not at all. What lies behind an
occluder, and how bright a clipped highlight was, is a guess."""

COLUMNS = {
    "psnr": ("PSNR", 2),
    "psnr_subject": ("PSNR, subject", 2),
    "psnr_background": ("PSNR, background", 2),
    "ssim": ("SSIM", 4),
    "sharpness_subject": ("sharpness of the subject", 3),
}


def litebokeh_card_text(
    args: argparse.Namespace,
    network: TinyUnet | GlassEncNet,
    scores: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
) -> CardText:
    """Return what the card says about model, data, losses and scores.

    Args:
        args: the settings of `training.litebokeh_task.add_litebokeh_settings`.
        network: what was trained.
        scores: what ``LiteBokehTask.validate`` returned at the end; empty if not validated.
        log: the entries of ``log.jsonl``.
    """
    base = args.pretrained
    limits = LIMITS
    if base is not None:
        limits += f"\n\nThe licence of `{base}` holds for what was made from it."
    if args.data_kind == "pairs":
        limits += f"\n\nSo does that of the photographs in `{args.data_folder}`."
    parameters = sum(value.numel() for value in network.parameters())
    ours = base is None and args.data_kind != "pairs"
    return CardText(
        title="LiteBokeh",
        summary="Lens blur from the photograph alone, by plain convolutions that phones run.\n"
        "Load it with the `bokehdiff` package.",
        usage=USAGE,
        training_rows=[
            ("network", f"{_network(network)}, {parameters:,} parameters"),
            ("started from", f"`{base}`" if base else "nothing"),
            ("trained", _trained(args)),
            ("data", _scenes(args.data_folder, args.data_seed, args)),
            ("crops", f"{args.data_crop_size} x {args.data_crop_size} pixels, mirrored"),
            ("loss", _loss(args, network)),
        ],
        scores_section=_scores_section(args, scores, log),
        intended_use=INTENDED_USE,
        limits=limits,
        tags=["bokehdiff", "bokeh", "lens-blur", "image-to-image", "mobile"],
        pipeline_tag="image-to-image",
        base_model=base if base is not None and not Path(base).exists() else None,
        license=LICENSE_FROM_NOTHING if ours else None,
    )


def _network(network: TinyUnet | GlassEncNet) -> str:
    options = ", ".join(
        f"{name} {value}" for name, value in network.config.items() if not name.startswith("_")
    )
    return f"{type(network).__name__} ({options})"


def _trained(args: argparse.Namespace) -> str:
    if args.phase == "enhancement":
        return "the enhancement block alone, on photographs made worse"
    return "all but the enhancement block"


def _scenes(folder: str | None, seed: int, args: argparse.Namespace) -> str:
    kind = {"scenes": "layered scenes, the subject in focus", "pairs": "pairs of photographs"}
    if folder is not None:
        return f"{kind[args.data_kind]}, those in `{folder}`"
    return f"{kind[args.data_kind]}, {args.data_size} x {args.data_size} pixels, seed {seed}"


def _loss(args: argparse.Namespace, network: TinyUnet | GlassEncNet) -> str:
    if args.phase == "enhancement":
        return "L1, on sRGB in [0, 1]"
    terms: list[tuple[Schedule, str]] = [
        (args.loss_l1_weight, "L1"),
        (args.loss_ssim_weight, "(1 - SSIM)"),
        (args.loss_perceptual_weight, "features of VGG-19"),
        (args.loss_adversarial_weight, "hinge loss of patch discriminators"),
    ]
    if isinstance(network, GlassEncNet):
        terms.append((args.loss_first_weight, "the same of the first hourglass"))
    weighted = ", up to 3 times as much in the plane of the subject"
    return (
        f"{weighted_sum(*terms)}, on sRGB in [0, 1]{weighted if args.loss_depth_weighted else ''}"
    )


def _scores_section(
    args: argparse.Namespace, scores: Mapping[str, Any], log: Sequence[Mapping[str, Any]]
) -> str:
    if not scores:
        return "This run was not validated."
    held_out = _scenes(args.validation_folder, args.validation_seed, args)
    first = [entry for entry in log if entry["kind"] == "validation" and entry["step"] == 0]
    rows = [
        ("photograph left as it is", scores, "_identity"),
        *[("before training", entry, "") for entry in first],
        ("after training", scores, ""),
        ("after training, without the enhancement", scores, "_plain"),
    ]
    lines = scores_table(COLUMNS, rows, scores)
    about = (
        f"On display-encoded sRGB, mean over {scores['scenes']} held-out scenes ({held_out}). PSNR "
        "in dB. The sharpness is the contrast of neighbours as a share of the truth's."
    )
    return "\n".join([about, "", *lines, *_enhancement_lines(scores)])


def _enhancement_lines(scores: Mapping[str, Any]) -> list[str]:
    """What the enhancement block does by itself, if it was scored."""
    listed = []
    if "psnr_degraded" in scores:
        listed.append(
            f"- photographs made worse: {scores['psnr_degraded']:.2f} dB, enhanced: "
            f"{scores['psnr_enhanced']:.2f} dB"
        )
    if "psnr_clean" in scores:
        listed.append(
            f"- photographs that need no enhancement, enhanced: {scores['psnr_clean']:.2f} dB"
        )
    if "background_error_rise" in scores:
        listed.append(
            "- the enhancement changes the mean difference in the blurred background by "
            f"{scores['background_error_rise']:+.1%}"
        )
    return ["", *listed] if listed else []

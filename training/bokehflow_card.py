"""What the model card of a BokehFlow says, whatever run it comes from."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.model_card import CardText, scores_table, weighted_sum
from training.settings import Schedule

LICENSE_FROM_NOTHING = "apache-2.0"
"""Of weights that owe nothing to a model or to pictures of others."""

USAGE = """\
from bokehdiff import BokehFlowPipeline

pipe = BokehFlowPipeline.from_pretrained("PATH_TO_THIS_FOLDER")
image = pipe(photo, disparity, df=0.7, K=20.0).images[0]
image = pipe(photo, focus=(512, 300), K=20.0).images[0]  # with the depth that it finds itself"""

INTENDED_USE = """\
Lens blur for photographs and films in which everything is sharp, from a disparity map or from the
depth that the network finds itself: for editing, and for research into computational photography.
It is no camera: a rendered photograph is no evidence of how a scene was taken."""

LIMITS = """\
The network knows the scenes, the sizes of blur and the motions it was trained with; depth that it
finds itself is a guess, good for scenes like those. Circles of confusion are cut off at a largest
radius. What lies behind an occluder or beyond the frame, and how bright a clipped highlight was, is
a guess as well."""

COLUMNS = {
    "psnr": ("PSNR", 2),
    "psnr_edges": ("PSNR near depth edges", 2),
    "ssim": ("SSIM", 4),
}
DEPTH_AND_FILM = {
    "abs_rel": "AbsRel of the depth it finds",
    "delta1": "delta1 of it",
    "warping_error": "warping error of films",
    "warping_error_single": "the same, each frame for itself",
    "warping_error_target": "the same, of the ground truth",
}


def bokehflow_card_text(
    args: argparse.Namespace, scores: Mapping[str, Any], log: Sequence[Mapping[str, Any]]
) -> CardText:
    """Return what the card says about model, data, losses and scores.

    Args:
        args: the settings of `training.bokehflow_task.add_bokehflow_settings`.
        scores: what ``BokehFlowTask.validate`` returned at the end; empty if not validated.
        log: the entries of ``log.jsonl``.
    """
    base = args.pretrained
    limits = LIMITS
    if base is not None:
        limits += f"\n\nThe licence of `{base}` holds for what was made from it."
    if args.data_kind == "pairs":
        limits += f"\n\nSo does that of the photographs in `{args.data_folder}`."
    start = f"`{base}`" if base else f"nothing: {args.model_variant}, {args.model_mixer}"
    if args.model_options:
        start += f", {args.model_options}"
    ours = base is None and args.data_kind != "pairs"
    return CardText(
        title="BokehFlow",
        summary="Lens blur for photographs and films, and their depth, in time linear in the "
        "pixels.\nLoad it with the `bokehdiff` package.",
        usage=USAGE,
        training_rows=[
            ("started from", start),
            ("data", _scenes(args.data_folder, args.data_seed, args)),
            ("crops", _crops(args)),
            ("depth", _depth(args)),
            ("loss", _loss(args)),
        ],
        scores_section=_scores_section(args, scores, log),
        intended_use=INTENDED_USE,
        limits=limits,
        tags=["bokehdiff", "bokeh", "lens-blur", "image-to-image", "video"],
        pipeline_tag="image-to-image",
        base_model=base if base is not None and not Path(base).exists() else None,
        license=LICENSE_FROM_NOTHING if ours else None,
    )


def _scenes(folder: str | None, seed: int, args: argparse.Namespace) -> str:
    kind = {
        "stills": "procedural photographs",
        "clips": "procedural clips",
        "pairs": "pairs of photographs",
    }[args.data_kind]
    if folder is not None:
        return f"{kind}, those in `{folder}`"
    return f"{kind}, {args.data_size} x {args.data_size} pixels, seed {seed}"


def _crops(args: argparse.Namespace) -> str:
    turned = " and turned" if args.data_kind == "stills" else ""
    return f"{args.data_crop_size} x {args.data_crop_size} pixels, mirrored{turned}"


def _depth(args: argparse.Namespace) -> str:
    return (
        f"{args.data_true_depth_share:.0%} of the samples of known depth rendered with it, the "
        "others with the network's own"
    )


def _loss(args: argparse.Namespace) -> str:
    terms: list[tuple[Schedule, str]] = [
        (args.loss_reconstruction_weight, "L1"),
        (args.loss_ssim_weight, "(1 - SSIM)"),
        (args.loss_perceptual_weight, "LPIPS (VGG-16)"),
        (args.loss_physics_weight, "L1 of the physics"),
        (args.loss_depth_weight, "SILog of the depth"),
    ]
    if args.model_mixer == "bigdr":
        terms.append((args.loss_coarse_depth_weight, "coarse depth"))
    if args.data_kind == "clips":
        terms.append((args.loss_warping_weight, "warping error"))
    return f"{weighted_sum(*terms)}, on sRGB in [-1, 1]"


def _scores_section(
    args: argparse.Namespace, scores: Mapping[str, Any], log: Sequence[Mapping[str, Any]]
) -> str:
    if not scores:
        return "This run was not validated."
    held_out = _scenes(args.validation_folder, args.validation_seed, args)
    border = f", without {args.loss_border} pixels at the border" if args.loss_border else ""
    first = [entry for entry in log if entry["kind"] == "validation" and entry["step"] == 0]
    rows = [
        ("photograph left as it is", scores, "_identity"),
        ("the lens formula alone", scores, "_physics"),
        *[("before training", entry, "") for entry in first],
        ("after training", scores, ""),
        ("after training, with the depth it finds", scores, "_own_depth"),
    ]
    lines = scores_table(COLUMNS, rows, scores)
    listed = [
        f"- {title}: {scores[name]:.4f}" for name, title in DEPTH_AND_FILM.items() if name in scores
    ]
    if "control" in scores:
        listed.append(
            "- control: the blurred region loses contrast each time K grows, from 0 by quarters to "
            f"all of the scene's K, in {scores['control']:.0%} of the scenes"
        )
    return "\n".join(
        [
            f"On display-encoded sRGB, mean over {scores['scenes']} held-out scenes "
            f"({held_out}){border}. PSNR in dB. Near depth edges: within two radii of where the "
            "radius jumps by more than a pixel.",
            "",
            *lines,
            "",
            *listed,
        ]
    )

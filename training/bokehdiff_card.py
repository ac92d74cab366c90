"""What the model card of a BokehDiff says, whatever run it comes from."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from training.model_card import CardText, validation_table, weighted_sum
from training.refiner_validation import MISTAKES_PX
from training.validation import BLURRED_RADIUS, IN_FOCUS_RADIUS

LICENSE_FROM_NOTHING = "apache-2.0"
"""Of weights that owe nothing to a model of others."""

USAGE = """\
from bokehdiff import BokehDiffPipeline

{loading}
image = pipe(photo, disparity, df=0.7, K=20.0).images[0]"""

INTENDED_USE = """\
Rendering lens blur into photographs in which everything is sharp, given a disparity map in which
larger is nearer: for editing, and for research into computational photography. `df` is the
disparity in focus, and `K` the radius of the circle of confusion in pixels per unit of disparity:
`K * |disparity - df|`. It is no camera: a rendered photograph is no evidence of how a scene was
taken, nor a measurement of depth."""

LIMITS = """\
Blur wider than that of the training scenes was never seen in training. What lies behind an occluder
or beyond the frame, and how bright a clipped highlight was, is a guess. The disparity is taken at
its word: where its edges miss those of the photograph, so does the blur. The aperture is round."""


def bokehdiff_card_text(
    args: argparse.Namespace, scores: Mapping[str, Any], log: Sequence[Mapping[str, Any]]
) -> CardText:
    """Return what the card says about model, data, losses and scores.

    Args:
        args: the settings of `training.bokehdiff_task.add_bokehdiff_settings`.
        scores: what `training.validation.validate` returned at the end; empty if not validated.
        log: the entries of ``log.jsonl``.
    """
    adapters = args.mode == "lora"
    base = args.pretrained
    loading = 'pipe = BokehDiffPipeline.from_pretrained("PATH_TO_THIS_FOLDER")'
    if adapters:
        loading = (
            f'pipe = BokehDiffPipeline.from_pretrained("{base}")\n'
            'pipe.load_bokeh_weights("PATH_TO_THIS_FOLDER")'
        )
    limits = LIMITS
    if base is not None:
        limits += f"\n\nThe licence of `{base}` holds for what was made from it."
    return CardText(
        title="BokehDiff, low-rank adapters" if adapters else "BokehDiff",
        summary=_summary(args),
        usage=USAGE.format(loading=loading),
        training_rows=[
            ("started from", f"`{base}`" if base else "nothing (the physics it starts at)"),
            ("trained", _trained(args)),
            ("data", _scenes(args.data_shards, args.data_seed, args)),
            ("crops", _crops(args)),
            ("loss", _loss(args)),
        ],
        scores_section=_scores_section(args, scores, log),
        intended_use=INTENDED_USE,
        limits=limits,
        tags=["bokehdiff", "bokeh", "lens-blur", "image-to-image", *(["lora"] if adapters else [])],
        pipeline_tag="image-to-image",
        base_model=base if base is not None and _is_hub_name(base) else None,
        license=LICENSE_FROM_NOTHING if base is None else None,
    )


def _summary(args: argparse.Namespace) -> str:
    where = "Load it with the `bokehdiff` package; `DiffusionPipeline` does not know the class."
    if args.mode == "lora":
        where = f"Adapters of `{args.pretrained}`, to load with the `bokehdiff` package."
    what = "Lens blur for photographs with a disparity map, in one step of the network at T = 499."
    return f"{what}\n{where}"


def _trained(args: argparse.Namespace) -> str:
    """Which parts of the model."""
    unet = "low-rank adapters of the UNet" if args.mode == "lora" else "the UNet"
    if args.trained_parts is not None:
        unet = f"of the UNet: {', '.join(args.trained_parts)}"
    ends = "the input, middle and output of the VAE encoder"
    vae = {"none": "", "full": f" and {ends}", "lora": f" and adapters of {ends}"}[args.vae_mode]
    return unet + vae


def _scenes(shards: str | None, seed: int, args: argparse.Namespace) -> str:
    """Where scenes come from."""
    if shards is not None:
        return f"the shards in `{shards}`"
    kind = {"procedural": "procedural scenes", "layers": "layered scenes of cut-outs"}
    return f"{kind[args.data_kind]}, {args.data_size} x {args.data_size} pixels, seed {seed}"


def _crops(args: argparse.Namespace) -> str:
    crops = f"{args.data_crop_size} x {args.data_crop_size} pixels, mirrored and turned"
    if args.data_corruption:
        crops += f"; {args.data_corruption:.0%} with mistakes in the disparity"
    return crops


def _loss(args: argparse.Namespace) -> str:
    """The terms with their weights, as sums, and on what they are computed."""
    rendering = weighted_sum(
        (args.loss_reconstruction_weight, args.loss_reconstruction),
        (args.loss_perceptual_weight, "LPIPS (VGG-16)"),
        (args.loss_edge_weight, f"multi-scale edge ({args.loss_edge_variant})"),
        (args.loss_adversarial_weight, "adversarial"),
    )
    parts = [f"{rendering}, on sRGB in [-1, 1]"] if rendering else []
    if refiner := weighted_sum((args.loss_disparity_weight, "choice of disparity")):
        parts.append(refiner)
    return "; ".join(parts)


def _scores_section(
    args: argparse.Namespace, scores: Mapping[str, Any], log: Sequence[Mapping[str, Any]]
) -> str:
    if not scores:
        return "This run was not validated."
    sections = []
    if "psnr" in scores:
        sections.append(_rendering_section(args, scores, log))
    if "spoilt_exact" in scores:
        sections.append(_refiner_section(args, scores))
    return "\n\n".join(sections)


def _rendering_section(
    args: argparse.Namespace, scores: Mapping[str, Any], log: Sequence[Mapping[str, Any]]
) -> str:
    held_out = _scenes(args.validation_shards, args.validation_seed, args)
    border = f", without {args.loss_border} pixels at the border" if args.loss_border else ""
    larger = "Larger is better"
    if "lpips" in scores:
        larger += ", except for LPIPS (VGG-16)"
    return f"""\
On display-encoded sRGB, mean over {scores["scenes"]} held-out scenes ({held_out}){border}.
PSNR in dB. Blurred: circles of confusion of a radius above {BLURRED_RADIUS:g} pixels; in focus:
below {IN_FOCUS_RADIUS:g} pixels. {larger}.

{validation_table(scores, log)}"""


def _refiner_section(args: argparse.Namespace, scores: Mapping[str, Any]) -> str:
    held_out = _scenes(args.validation_shards, args.validation_seed, args)
    rows = [
        f"| {pixels} px | {scores[f'mended_{pixels}px']:.1%} | {scores[f'spoilt_{pixels}px']:.2%} |"
        for pixels in MISTAKES_PX
        if f"mended_{pixels}px" in scores
    ]
    table = "\n".join(
        [
            "| near things shrunk or grown by | wrong pixels mended | right pixels spoilt |",
            "| --- | --- | --- |",
            *rows,
            f"| nothing (exact) | | {scores['spoilt_exact']:.2%} |",
        ]
    )
    return f"""\
What the refiner makes of maps with mistakes, on {scores["scenes"]} held-out scenes ({held_out}). A
pixel is wrong if its circle of confusion is, by more than half a pixel of radius (or 1 % of the
range in the scene).

{table}"""


def _is_hub_name(name: str) -> bool:
    """Whether `name` can be that of a model on the Hub, and is no folder here."""
    if Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True

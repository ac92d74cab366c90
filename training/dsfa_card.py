"""What the model card of a depth network with DSFA says, whatever run it comes from."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.model_card import CardText
from training.settings import Schedule

LICENSE_FROM_NOTHING = "apache-2.0"
"""Of weights that owe nothing to a model of others."""

USAGE = """\
from bokehdiff import DepthFromBokehPipeline

pipe = DepthFromBokehPipeline.from_pretrained("PATH_TO_THIS_FOLDER")
# K: blur radius in pixels of the photo per 1/m
out = pipe("photo.jpg", stack=["k10.png", "k20.png"], K=[10, 20])
out.depth  # (1, 1, H, W), metres"""

INTENDED_USE = """\
Depth in metres of a photograph, from it and a stack of it with several strengths of defocus whose
`K` are known, in pixels of blur radius per 1/m. Without a stack it is a depth network for single
pictures. For research into depth from defocus."""

LIMITS = """\
Depth is only as metric as `K` is: a stack with another `K` than it says gives another depth. The
network knows the scenes, strengths and distance in focus it was trained with. Surfaces without
texture show no blur, so their depth is a guess from what is around them."""


def dsfa_card_text(
    args: argparse.Namespace, scores: Mapping[str, Any], log: Sequence[Mapping[str, Any]]
) -> CardText:
    """Return what the card says about model, data, losses and scores.

    Args:
        args: the settings of `training.dsfa_task.add_dsfa_settings`.
        scores: what ``DSFATask.validate`` returned at the end; empty if not validated.
        log: the entries of ``log.jsonl``.
    """
    base = args.pretrained
    limits = LIMITS
    if base is not None:
        limits += f"\n\nThe licence of `{base}` holds for what was made from it."
    trained = "all parts" if args.trained_parts is None else ", ".join(args.trained_parts)
    stack = f"{args.stack_fewest} to {args.stack_most} frames, drawn for every step"
    if args.stack_drop:
        stack += f"; {args.stack_drop:.0%} of the steps without a stack"
    return CardText(
        title="Depth from a bokeh stack",
        summary="Metric depth of a photograph and its bokeh stack: Depth Anything with divided "
        "space-focus attention (DSFA).\nLoad it with the `bokehdiff` package.",
        usage=USAGE,
        training_rows=[
            ("started from", f"`{base}`" if base else "nothing"),
            ("trained", trained),
            ("data", _stacks(args.data_stacks, args.data_seed, args)),
            ("crops", f"{args.data_crop_size} x {args.data_crop_size} pixels, mirrored"),
            ("stack", stack if args.stack_most else "none"),
            ("loss", _loss(args)),
        ],
        scores_section=_scores_section(args, scores, log),
        intended_use=INTENDED_USE,
        limits=limits,
        tags=["bokehdiff", "depth-estimation", "depth-from-defocus"],
        pipeline_tag="depth-estimation",
        base_model=base if base is not None and not Path(base).exists() else None,
        license=LICENSE_FROM_NOTHING if base is None else None,
    )


def _stacks(source: str | None, seed: int, args: argparse.Namespace) -> str:
    if source is not None:
        return f"the stacks in `{source}`"
    return f"procedural stacks, {args.data_size} x {args.data_size} pixels, seed {seed}"


def _loss(args: argparse.Namespace) -> str:
    terms: list[tuple[Schedule, str]] = [
        (args.loss_silog_weight, f"SILog (variance focus {args.loss_silog_variance_focus:g})"),
        (args.loss_gradient_weight, "multi-scale gradients"),
    ]
    named = [f"{weight} x {name}" for weight, name in terms if not weight.is_zero]
    return f"{' + '.join(named)}, on the logarithm of depth"


def _scores_section(
    args: argparse.Namespace, scores: Mapping[str, Any], log: Sequence[Mapping[str, Any]]
) -> str:
    if not scores:
        return "This run was not validated."
    held_out = _stacks(args.validation_stacks, args.validation_seed, args)
    first = [entry for entry in log if entry["kind"] == "validation" and entry["step"] == 0]
    rows = [("before training", entry) for entry in first] + [("after training", scores)]
    names = [
        name
        for name in ("abs_rel", "delta1", "abs_rel_single", "abs_rel_copies", "stack_effect")
        if name in scores
    ]
    titles = {
        "abs_rel": "AbsRel",
        "delta1": "delta1",
        "abs_rel_single": "AbsRel, no stack",
        "abs_rel_copies": "AbsRel, copies",
        "stack_effect": "copies change depth by",
    }
    table = [
        f"| | {' | '.join(titles[name] for name in names)} |",
        f"| {' | '.join(['---'] * (len(names) + 1))} |",
        *(
            f"| {label} | {' | '.join(f'{row[name]:.4f}' for name in names)} |"
            for label, row in rows
        ),
    ]
    text = f"Mean over {scores['scenes']} held-out scenes ({held_out}), metres against metres."
    if "abs_rel_copies" in scores:
        text += " Copies: the sharp picture in place of every frame, with the frames' K."
    return "\n".join([text, "", *table])

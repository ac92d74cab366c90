"""What the model card of a generator of bokeh stacks says."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bokehdiff.checkpoints import is_no_hub_id
from training.bokeh_stack_data import (
    PAIRS,
    PHOTOGRAPHS,
    SCENES,
)
from training.bokeh_stack_validation import FRAMES, K_EDGES, NOISE_SHARES
from training.model_card import CardText
from training.validation import BLURRED_RADIUS

USAGE = """\
import torch
from bokehdiff import BokehStackPipeline

pipe = BokehStackPipeline.from_pretrained("{base}", dtype=torch.bfloat16).to("cuda")
pipe.load_bokeh_adapter("PATH_TO_THIS_FOLDER")
stack = pipe(photo, K=[10, 20, 30], max_area={size} * {size}, guidance_scale={guidance:g}).images"""

SUMMARY = """\
An adapter of `{base}` that makes it follow a blur strength: from one sharp photograph it paints the
same photograph with lens blur, once for each K. K is metric, pixels of blur radius of the picture
per 1/metre: `radius = K * |1/distance - 1/focus_distance|`. Load it with the `bokehdiff`
package."""

INTENDED_USE = """\
Lens blur without a depth map, and stacks of it from which depth can be estimated; for editing, and
for research into computational photography. The pictures are painted, not taken: they are no
evidence of a scene, and what they show is not measured."""

LIMITS = """\
The network works on pictures of about the size it was trained with, and was trained for K from
{smallest:g} to {largest:g} px*m of these; more is refused. What is in focus is its own choice. It
may change what it should leave alone."""

SOURCES_IN_WORDS = {
    SCENES: "procedural scenes, ray traced through a thin lens (seed {data_seed})",
    PHOTOGRAPHS: "photographs of `{data_photographs}`, rendered with their metric depth",
    PAIRS: "pairs of photographs of `{data_pairs}`",
}


def bokeh_stack_card_text(
    args: argparse.Namespace, scores: Mapping[str, Any], log: Sequence[Mapping[str, Any]]
) -> CardText:
    """Return what the card says about model, data, steps, loss and scores.

    Args:
        args: the settings of `training.bokeh_stack_task.add_bokeh_stack_settings`.
        scores: those at the end; empty if the run was not validated.
        log: the entries of ``log.jsonl``.
    """
    base = args.pretrained
    limits = LIMITS.format(smallest=args.data_smallest_K, largest=args.data_largest_K)
    return CardText(
        title="Bokeh stacks, an adapter of FLUX.1-Kontext",
        summary=SUMMARY.format(base=base),
        usage=USAGE.format(base=base, size=args.data_size, guidance=args.guidance),
        training_rows=[
            ("started from", f"`{base}`, {_start(args)}"),
            ("trained", f"adapter beside all attention modules, rank {args.adapter_rank}"),
            ("data", _data(args)),
            ("pictures", f"{args.data_size} x {args.data_size} pixels, mirrored at random"),
            ("steps", _steps(args)),
            (
                "loss",
                "rectified flow, mean((v - (noise - latents))^2) on the target's tokens, timesteps "
                f"uniform, noise offset {args.noise_offset:g}, guidance {args.guidance:g}",
            ),
        ],
        scores_section=_scores_section(args, scores, log),
        intended_use=INTENDED_USE,
        limits=f"{limits}\n\nThe licence of `{base}` holds for what was made from it.",
        tags=["bokehdiff", "bokeh", "lens-blur", "flux-kontext", "image-to-image"],
        pipeline_tag="image-to-image",
        base_model=None if Path(base).exists() or is_no_hub_id(base) else base,
        license=None,
    )


def _start(args: argparse.Namespace) -> str:
    if args.adapter_start is None:
        return "with a fresh adapter"
    return f"with the adapter `{args.adapter_start}`"


def _data(args: argparse.Namespace) -> str:
    whole = sum(args.data_weights.values())
    words = dict(SOURCES_IN_WORDS)
    if args.data_stacks is not None:
        words[SCENES] = "procedural scenes of `{data_stacks}`, ray traced through a thin lens"
    parts = [
        f"{weight / whole:.0%} " + words[name].format(**vars(args))
        for name, weight in args.data_weights.items()
    ]
    strengths = f"{args.data_smallest_K:g} to {args.data_largest_K:g}"
    return f"{'; '.join(parts)}; K from {strengths} px*m of the training picture"


def _steps(args: argparse.Namespace) -> str:
    steps = f"{args.reference_share:.0%} from the sharp picture"
    if args.reference_share < 1:
        steps += (
            f", the others of one scene at {args.batch_size} K without it, of which "
            f"{args.pivot_share:.0%} share noise and layout; K not told to {args.drop_K:.0%} of "
            "these"
        )
    return steps


def _scores_section(
    args: argparse.Namespace, scores: Mapping[str, Any], log: Sequence[Mapping[str, Any]]
) -> str:
    if not scores:
        return "This run was not validated."
    columns = {"loss": "loss", "loss_other_K": "told another K"}
    for low, high in zip(K_EDGES, K_EDGES[1:], strict=False):
        if f"loss_K_{low}_{high}" in scores:
            columns[f"loss_K_{low}_{high}"] = f"K {low} to {high}"
    before = [entry for entry in log if entry["kind"] == "validation" and entry["step"] == 0]
    rows = [
        f"| {label} | {' | '.join(f'{row[name]:.5f}' for name in columns)} |"
        for label, row in (
            *(("before training", entry) for entry in before),
            ("after training", scores),
        )
    ]
    table = "\n".join(
        [f"| | {' | '.join(columns.values())} |", f"|{' --- |' * (1 + len(columns))}", *rows]
    )
    shares = ", ".join(f"{share:g}" for share in NOISE_SHARES)
    section = f"""\
The loss on {scores["scenes"]} held-out procedural scenes (seed {args.validation_seed}) of {FRAMES}
frames, with the sharp picture as reference, at shares of noise of {shares}. Told another K: the
loss when prompt and adapter say the K of another frame of the scene, which must be larger for a
network that follows K.

{table}"""
    if "psnr" in scores:
        section += f"""

Sampled in {args.validation_sampling_steps} steps, PSNR against the traced frames is
{scores["psnr"]:.2f} dB; the sharp picture left as it is has {scores["psnr_identity"]:.2f} dB."""
    if "control" in scores:
        section += f"""
Control: the region whose blur radius at the largest K is above {BLURRED_RADIUS:g} pixels loses
contrast each time K grows in {scores["control"]:.0%} of the scenes; the rank correlation between K
and blur is {scores["control_correlation"]:.3f}."""
    return section

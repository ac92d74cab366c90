"""`bokehdiff depth`: how near each pixel of photographs is, by a depth model or a bokeh stack."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .depth_from_bokeh import FromBokeh, Side, StackMethod, depth_from_bokeh
from .disparities import check_photos, depth_estimator
from .renderers import usable_device
from .results import check_targets, one_by_one
from .speech import Mistake, plain_speech

if TYPE_CHECKING:
    import torch


DEPTH_EXAMPLES = """\b
Examples:
  bokehdiff depth photo.jpg -o disparity.png
  bokehdiff depth *.jpg -o maps
  bokehdiff depth photo.jpg -o disparity.npy \\
    --model depth-anything/Depth-Anything-V2-Metric-Outdoor-Small-hf
  bokehdiff depth photo.jpg --from-bokeh --stack f4.jpg --stack f2.jpg --K 10,20 \\
    --focus-distance 1.5 -o depth
  bokehdiff depth photo.jpg --from-bokeh --stack STACK_FOLDER --model DSFA_FOLDER -o depth
  bokehdiff depth photo.jpg --from-bokeh --K 10,20,30 --model DSFA_FOLDER -o depth \\
    --stack-model black-forest-labs/FLUX.1-Kontext-dev --stack-weights weights/bokeh_lora.bin
"""

DISPARITY_SUFFIXES = (".png", ".npy")


def depth(
    context: typer.Context,
    photos: Annotated[
        list[Path],
        typer.Argument(metavar="PHOTO...", help="One or more photographs.", show_default=False),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="File (.png: 16-bit gray, 0 the farthest; .npy: float32) or, for several "
            "photographs, a folder, in which NAME_disparity.png is written (.npy by models in "
            "metres). With --from-bokeh a folder.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Depth model: folder or hub id. Default: "
            "depth-anything/Depth-Anything-V2-Small-hf. Those with Metric in their name answer in "
            "1/metres. With --from-bokeh: Depth Anything with DSFA; default: none, blur is "
            "measured.",
            show_default=False,
        ),
    ] = None,
    from_bokeh: Annotated[
        bool,
        typer.Option(
            "--from-bokeh",
            help="Metric depth of one photograph from a bokeh stack of it. Writes depth.npy "
            "(metres), depth.png (16 bits), disparity.npy (1/metres), depth_color.png, "
            "confidence.png where blur was measured, and summary.json.",
        ),
    ] = False,
    stack: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A picture of the stack, once for each, of the size of the photograph; or the "
            "folder that `bokehdiff stack` wrote, which says K too.",
            show_default=False,
        ),
    ] = None,
    strengths: Annotated[
        str | None,
        typer.Option(
            "--K",
            metavar="K,K,...",
            help="Blur strength of each picture of the stack: pixels of blur radius, of this "
            "photograph, per 1/metre of disparity.",
            show_default=False,
        ),
    ] = None,
    focus_distance: Annotated[
        str | None,
        typer.Option(
            metavar="M",
            help="Distance in metres at which the stack is in focus, or one for each picture, "
            "0.8,1.5,inf. Needed without --model, and with --stack-method or a BokehDiff "
            "--stack-model.",
            show_default=False,
        ),
    ] = None,
    side: Annotated[
        Side | None,
        typer.Option(
            help="Of the plane in focus, on which everything lies; without --model. Default: "
            "farther, or both if the pictures differ in focus.",
            show_default=False,
        ),
    ] = None,
    stack_model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="What makes the stack for --model: FLUX.1-Kontext (folder or hub id), or a "
            "BokehDiff folder. `bokehdiff stack` has more settings, and keeps the stack.",
            show_default=False,
        ),
    ] = None,
    stack_weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="What was trained for that --stack-model, for instance bokeh_lora.bin.",
            show_default=False,
        ),
    ] = None,
    stack_method: Annotated[
        StackMethod | None,
        typer.Option(
            help="Render the stack from the estimate of --model instead, which adds nothing to "
            "what the model knows.",
            show_default=False,
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How often a stack is rendered and depth estimated with it. Default: 1.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the noise of --stack-model. Default: 42.", show_default=False),
    ] = None,
    device: options.Device = None,
    force: options.Force = False,
) -> None:
    """Estimate disparity maps of photographs: larger is nearer, in [0, 1] or 1/metres.

    render and focus-pull take them by --disparity. With --from-bokeh: depth in metres of one
    photograph, from a bokeh stack of it.
    """
    with plain_speech():
        asked = FromBokeh(
            stack=stack or [],
            strengths=strengths,
            focus_distance=focus_distance,
            side=side,
            stack_model=stack_model,
            stack_weights=stack_weights,
            stack_method=stack_method,
            iterations=iterations,
            seed=seed,
        )
        if from_bokeh:
            depth_from_bokeh(context, photos, output, model, device, force, asked)
            return
        asked.check_absent()
        check_photos(photos)
        into_folder = _is_folder(photos, output)
        estimator = depth_estimator(model, usable_device(device))
        if into_folder:
            suffix = ".npy" if estimator.metric else ".png"
            targets = [output / f"{photo.stem}_disparity{suffix}" for photo in photos]
        elif estimator.metric and output.suffix.lower() == ".png":
            raise Mistake(
                f"-o {output} would hold [0, 1], and this model estimates 1/metres; wanted a file "
                f"ending in .npy, for instance -o {output.with_suffix('.npy')}."
            )
        else:
            targets = [output]
        check_targets(photos, targets, force, do="Estimate", done="estimated")
        unit = " 1/m" if estimator.metric else ""

        def estimate_one(number: int) -> str:
            target = targets[number]
            disparity = estimator(photos[number]).disparity[0, 0]
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(target, disparity, force)
            return f"{target} ({float(disparity.min()):.4g} to {float(disparity.max()):.4g}{unit})"

        if one_by_one(photos, estimate_one):
            raise typer.Exit(1)


def _is_folder(photos: list[Path], output: Path) -> bool:
    """Whether maps are written into the folder `output` rather than into a file of that name."""
    suffix = output.suffix.lower()
    if output.is_dir() or suffix == "":
        if output.is_file():
            raise Mistake(
                f"-o {output} is a file without an ending; wanted a folder, or a file "
                f"ending in {' or '.join(DISPARITY_SUFFIXES)}."
            )
        return True
    if suffix not in DISPARITY_SUFFIXES:
        raise Mistake(
            f"-o {output} ends in {suffix}; wanted a folder, or a file ending in "
            f"{' or '.join(DISPARITY_SUFFIXES)}."
        )
    if len(photos) > 1:
        raise Mistake(
            f"-o {output} is one file for {len(photos)} photographs; wanted a folder, for instance "
            f"-o {output.with_suffix('')}."
        )
    if not output.parent.is_dir():
        raise Mistake(f"-o {output}: there is no folder {output.parent}; create it first.")
    return False


def _write(target: Path, disparity: torch.Tensor, force: bool) -> None:
    """Writes a map (H, W): 16-bit gray if it is a .png, else float32."""
    import numpy as np

    from ..png_files import encode_png
    from ..whole_files import file_to_write, write_whole

    values = disparity.numpy()
    if target.suffix.lower() == ".png":
        data = encode_png((values * 65535).round().astype(np.uint16)[..., None])
    else:
        encoded = io.BytesIO()
        np.save(encoded, values)
        data = encoded.getvalue()
    write_whole(file_to_write(target, DISPARITY_SUFFIXES, force), data)

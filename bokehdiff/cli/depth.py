"""`bokehdiff depth`: how near each pixel of photographs is, estimated by a depth model."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
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
"""

DISPARITY_SUFFIXES = (".png", ".npy")


def depth(
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
            "metres).",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Depth model: folder or hub id. Default: "
            "depth-anything/Depth-Anything-V2-Small-hf. Those with Metric in their name answer in "
            "1/metres.",
            show_default=False,
        ),
    ] = None,
    device: options.Device = None,
    force: options.Force = False,
) -> None:
    """Estimate disparity maps of photographs: larger is nearer, in [0, 1] or 1/metres.

    render and focus-pull take them by --disparity.
    """
    with plain_speech():
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

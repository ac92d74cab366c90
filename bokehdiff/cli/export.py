"""`bokehdiff export`: networks as files for other runtimes, one command for each system."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .speech import plain_speech

EXPORT_FLOW_EXAMPLES = """\b
Examples:
  bokehdiff export flow -o flow.onnx
  bokehdiff export flow my_network -o film.onnx --video
  bokehdiff export flow -o refocus.onnx --given-depth --fp16
"""

export = typer.Typer(
    name="export",
    help="Write a network as a file for programs without Python.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@export.command(epilog=EXPORT_FLOW_EXAMPLES)
def flow(
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", help="The file to write: .onnx.", show_default=False
        ),
    ],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Folder or hub id of a BokehFlow. Default: the small one inside the package.",
            show_default=False,
        ),
    ] = None,
    video: Annotated[
        bool,
        typer.Option(
            "--video",
            help="For films: what is carried from frame to frame goes in and comes out.",
        ),
    ] = False,
    given_depth: Annotated[
        bool,
        typer.Option(
            "--given-depth",
            help="Inverse depth (1/metres) goes in. Default: the network's own comes out.",
        ),
    ] = False,
    fp16: Annotated[
        bool,
        typer.Option(
            "--fp16",
            help="The network computes in float16, for GPUs; light, depth and lens stay float32.",
        ),
    ] = False,
    widest: Annotated[
        int | None,
        typer.Option(
            metavar="PX",
            help="Width of the widest photos, in pixels; less is faster. Default: 1920.",
            show_default=False,
        ),
    ] = None,
    force: options.Force = False,
) -> None:
    """Write a BokehFlow as an ONNX file.

    Photos of any size and the camera go in, photos with lens blur come out. The file tells its
    inputs, outputs and units in its metadata. It is written only if onnxruntime gives the same
    pictures with it as the network; that takes a minute or two.
    """
    with plain_speech():
        from ..onnx_files import onnx_file_to_write

        # Before the seconds that reading a network takes.
        onnx_file_to_write(output, force)
        from .. import FLOW_NANO
        from ..bokehflow_export import WIDEST_PHOTO_PX, export_bokehflow
        from ..pipelines.bokehflow_loading import read_bokehflow

        differences = export_bokehflow(
            read_bokehflow(FLOW_NANO if model is None else model),
            output,
            carried=video,
            given_depth=given_depth,
            half=fp16,
            widest_photo_px=WIDEST_PHOTO_PX if widest is None else widest,
            overwrite=force,
        )
        size = output.stat().st_size / 1e6
        typer.echo(f"{output} ({size:.1f} MB, as the network to {max(differences.values()):.1g})")

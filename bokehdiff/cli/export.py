"""`bokehdiff export`: networks as files for other runtimes, one command for each system."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .speech import Mistake, plain_speech

EXPORT_FLOW_EXAMPLES = """\b
Examples:
  bokehdiff export flow -o flow.onnx
  bokehdiff export flow my_network -o film.onnx --video
  bokehdiff export flow -o refocus.onnx --given-depth --fp16
"""

EXPORT_COMPACT_EXAMPLES = """\b
Examples:
  bokehdiff export compact -o compact.onnx
  bokehdiff export compact -o compact.tflite --size 1536x1024
  bokehdiff export compact my_network -o small.tflite --size 1536x1024 --int8
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


@export.command(epilog=EXPORT_COMPACT_EXAMPLES)
def compact(
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="The file to write: .onnx, for photos of any size, or .tflite.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Folder or hub id of a LiteBokeh. Default: the small one inside the package.",
            show_default=False,
        ),
    ] = None,
    file_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="KIND",
            help="onnx or tflite. Default: what OUT ends in.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WxH",
            help="Of the photos of a .tflite file, in pixels, multiples of 8: 1536x1024.",
            show_default=False,
        ),
    ] = None,
    fp16: Annotated[
        bool,
        typer.Option(
            "--fp16",
            help="float16 inside: of .onnx files weights and arithmetic, of .tflite files weights. "
            "Pictures go in and come out as float32.",
        ),
    ] = False,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="Of .tflite files: weights with 8 bits.",
        ),
    ] = False,
    no_enhancement: Annotated[
        bool, typer.Option("--no-enhancement", help="Leave the enhancement block out.")
    ] = False,
    force: options.Force = False,
) -> None:
    """Write a LiteBokeh as an ONNX or a TFLite file.

    A photo goes in, the photo with lens blur comes out. The file tells its input, output and units
    in its metadata. It is written only if its runtime, onnxruntime or LiteRT, gives the same
    picture with it as the network. TFLite files need an environment of their own: make tflite.
    """
    with plain_speech():
        if file_format not in (None, "onnx", "tflite"):
            raise Mistake(f"--format is {file_format!r}; wanted onnx or tflite.")
        if file_format and output.suffix.lower() != f".{file_format}":
            raise Mistake(
                f"--format is {file_format}, but {output.name} is to be written; wanted a name "
                f"that ends in .{file_format}, or no --format."
            )
        if fp16 and int8:
            raise Mistake("--fp16 and --int8 were given; wanted one of them.")
        from ..compact_export import compact_file_to_write, export_compact

        photo_size = None if size is None else _width_and_height(size)
        precision = "float16" if fp16 else "int8" if int8 else "float32"
        # Before the seconds that reading a network takes.
        compact_file_to_write(output, photo_size, precision, force)
        from .. import COMPACT_TINY
        from ..pipelines.litebokeh import read_litebokeh

        agreement = export_compact(
            read_litebokeh(COMPACT_TINY if model is None else model),
            output,
            size=photo_size,
            precision=precision,
            enhance=not no_enhancement,
            overwrite=force,
        )
        near = f"as the network to {agreement.largest_difference:.1g}"
        if int8:
            near = f"{agreement.psnr:.1f} dB against the network"
        typer.echo(f"{output} ({output.stat().st_size / 1e6:.2f} MB, {near})")


def _width_and_height(text: str) -> tuple[int, int]:
    """Of ``WIDTHxHEIGHT``."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise Mistake(f"--size is {text!r}; wanted WIDTHxHEIGHT in pixels, for instance 1536x1024.")
    return int(found[1]), int(found[2])

"""`bokehdiff compact`: photographs blurred by the network for phones, which needs nothing else."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .renderers import usable_device
from .results import one_by_one, plan_outputs
from .speech import plain_speech

COMPACT_EXAMPLES = """\b
Examples:
  bokehdiff compact photo.jpg -o blurred.jpg
  bokehdiff compact shots/*.jpg -o blurred/
  bokehdiff compact photo.jpg --model outputs/litebokeh/tiny -o blurred.jpg
"""


def compact(
    photos: options.Photos,
    output: options.PictureOrFolder,
    model: options.Model = None,
    enhancement: Annotated[
        bool,
        typer.Option(
            "--enhancement/--no-enhancement", help="Let the enhancement make the result clearer."
        ),
    ] = True,
    device: options.Device = None,
    force: options.Force = False,
) -> None:
    """Blur what is behind the subject, by a network small enough for phones.

    No depth, no lens: the network sees the photo alone. What is in focus and how strong the blur is
    cannot be chosen; `bokehdiff render` can.
    """
    with plain_speech():
        targets = plan_outputs(photos, [False] * len(photos), output, force, coc=False)
        from .. import COMPACT_TINY
        from ..photographs import read_photograph, write_photograph
        from ..pipelines.litebokeh import LiteBokehPipeline

        pipe = LiteBokehPipeline.from_pretrained(COMPACT_TINY if model is None else model)
        pipe.to(usable_device(device))

        def blur_one(number: int) -> str:
            read = read_photograph(photos[number])
            image = read.display_encoded(photos[number].name)
            (result,) = pipe(image, enhance=enhancement, output_type="pt", return_dict=False)
            targets[number].parent.mkdir(parents=True, exist_ok=True)
            write_photograph(targets[number], result, read, overwrite=force)
            return str(targets[number])

        if one_by_one(photos, blur_one):
            raise typer.Exit(1)

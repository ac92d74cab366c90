"""`bokehdiff app`: a page in the browser, to click on what shall be in focus."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .speech import Mistake, plain_speech

APP_EXAMPLES = """\b
Examples:
  bokehdiff app
  bokehdiff app --depth-model FOLDER --model FOLDER --model owner/name
  bokehdiff app --host 0.0.0.0 --port 8080 --largest-upload 20 --largest-photo 12
"""


def page(
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets other computers in.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(help="Default: the first free one from 7860.", show_default=False),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER",
            help="Model folder or hub id to offer beside those inside the package; may be given "
            "several times.",
            show_default=False,
        ),
    ] = None,
    depth_model: options.DepthModel = None,
    device: options.Device = None,
    largest_upload: Annotated[
        int, typer.Option(metavar="MB", help="Refuse files that are larger.")
    ] = 64,
    largest_photo: Annotated[
        float, typer.Option(metavar="MEGAPIXELS", help="Refuse photographs that are larger.")
    ] = 24,
) -> None:
    """Serve a page: drop a photograph, click on what shall be in focus, open the aperture.

    Works without a network. Each visitor sees only what is theirs, and it is deleted afterwards.
    """
    with plain_speech():
        if largest_upload < 1 or not largest_photo > 0:
            raise Mistake(
                f"--largest-upload is {largest_upload} and --largest-photo {largest_photo:g}; "
                "wanted a megabyte or more, and more than 0 megapixels."
            )
        from ..page.server import serve
        from ..page.settings import PageSettings

        settings = PageSettings(
            models=tuple(model or ()),
            depth_model=depth_model,
            device=device,
            largest_upload_mb=largest_upload,
            largest_photo_megapixels=largest_photo,
        )
        serve(settings, host, port)

"""The command line: one verb per file. Heavy imports wait until a verb runs."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from .app import APP_EXAMPLES, page
from .compact import COMPACT_EXAMPLES, compact
from .depth import DEPTH_EXAMPLES, depth
from .export import export
from .focus_pull import FOCUS_PULL_EXAMPLES, focus_pull
from .info import info
from .render import RENDER_EXAMPLES, render
from .stack import STACK_EXAMPLES, stack
from .video import VIDEO_EXAMPLES, video

app = typer.Typer(
    name="bokehdiff",
    help="Lens blur for photographs and films.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bokehdiff {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


app.command(epilog=RENDER_EXAMPLES)(render)
app.command(epilog=COMPACT_EXAMPLES)(compact)
app.command(epilog=FOCUS_PULL_EXAMPLES)(focus_pull)
app.command(epilog=DEPTH_EXAMPLES)(depth)
app.command(epilog=STACK_EXAMPLES)(stack)
app.command(epilog=VIDEO_EXAMPLES)(video)
app.add_typer(export)
app.command(name="app", epilog=APP_EXAMPLES)(page)
app.command()(info)


def main() -> None:
    """Runs the command line."""
    app()

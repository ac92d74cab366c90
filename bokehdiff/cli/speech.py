"""How the command line talks: mistakes in one sentence, repairs as notes, all on standard error."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import TextIO

import typer


class Mistake(ValueError):
    """A sentence for the person at the keyboard."""


@contextlib.contextmanager
def plain_speech() -> Iterator[None]:
    """Shows mistakes as one sentence and exit code 1, and repairs as notes."""
    from ..images import InputRepairedWarning

    show_others = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, InputRepairedWarning):
            note(str(message))
        else:
            show_others(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.simplefilter("always", InputRepairedWarning)
        warnings.showwarning = show
        try:
            yield
        except (ValueError, OSError, ImportError) as mistake:
            say_error(str(mistake))
            raise typer.Exit(1) from None


def note(sentence: str) -> None:
    from tqdm import tqdm

    tqdm.write(f"note: {sentence}", file=sys.stderr)


def say_error(sentence: str) -> None:
    typer.echo("bokehdiff: " + " ".join(sentence.split()), err=True)

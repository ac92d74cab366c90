"""Sentences of the library for the visitor whose request made them."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import TextIO

from ..picture_files import InputRepairedWarning

_of_this_thread = threading.local()


@contextlib.contextmanager
def notes_of_this_request() -> Iterator[list[str]]:
    """Collects what is warned about repaired input in this thread meanwhile."""
    notes: list[str] = []
    _of_this_thread.notes = notes
    try:
        yield notes
    finally:
        _of_this_thread.notes = None


def send_warnings_to_their_requests() -> None:
    """Has all warnings about repaired input collected by the request they belong to.

    Once for the process: warnings are caught for all threads at once, so that requests in several
    threads cannot each catch their own.
    """
    show_others = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        notes = getattr(_of_this_thread, "notes", None)
        if notes is not None and issubclass(category, InputRepairedWarning):
            if str(message) not in notes:
                notes.append(str(message))
        else:
            show_others(message, category, filename, lineno, file, line)

    warnings.simplefilter("always", InputRepairedWarning)
    warnings.showwarning = show

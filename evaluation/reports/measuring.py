"""Measurements by command lines of the evaluation, one after the other or side by side."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Measurement", "measure", "pictures_of"]

Results = dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """A command of the evaluation whose results are quoted.

    Attributes:
        what: it measures, for people who wait for it.
        minutes: about how many it takes on one thread, for those people and for sharing out.
        arguments: of ``python -m evaluation``, without ``--out``; words in capitals stand for
            folders (DATA).
        sheet: method and metric that choose the photographs of a contact sheet, for which the
            pictures are kept; None for none.
    """

    what: str
    minutes: float
    arguments: tuple[str, ...]
    sheet: tuple[str, str] | None = None

    @property
    def command(self) -> str:
        """What a person types."""
        return f"python -m evaluation {shlex.join(self.arguments)}"

    def arguments_in(self, folders: Mapping[str, Path]) -> list[str]:
        """The arguments with the folders that the words in capitals stand for."""
        return [str(folders.get(word, word)) for word in self.arguments]


def measure(
    measurements: Mapping[str, Measurement],
    folders: Mapping[str, Path],
    out: Path,
    processes: int = 1,
) -> dict[str, Results]:
    """The results of every measurement by name, also written to ``out/<name>.json``.

    Pictures for contact sheets are put in ``out/pictures/<name>``, in the place of older ones. Says
    what it does and how long it took. Each process measures on one thread, as sums in another order
    end in other digits.

    Raises:
        ValueError: a measurement failed, and why.
    """
    from evaluation.results import read_results

    finished: dict[str, Results] = {}
    for name, seconds in _all_done(measurements, folders, out, processes):
        print(f"{name}: {seconds:.0f} s", flush=True)
        # As documents quote it, whatever the folders are here.
        command = measurements[name].command
        finished[name] = {**read_results(out / f"{name}.json"), "command": command}
    return {name: finished[name] for name in measurements}


def pictures_of(out: Path, name: str) -> Path:
    """Where :func:`measure` keeps the pictures of a measurement."""
    return out / "pictures" / name


def _all_done(
    measurements: Mapping[str, Measurement],
    folders: Mapping[str, Path],
    out: Path,
    processes: int,
) -> Iterator[tuple[str, float]]:
    """(name, seconds) of each measurement when its results are written."""
    commands = {}
    for name, measurement in measurements.items():
        commands[name] = [
            *measurement.arguments_in(folders),
            *("--out", str(out / f"{name}.json")),
            *(("--save", str(pictures_of(out, name))) if measurement.sheet else ()),
        ]
        shutil.rmtree(pictures_of(out, name), ignore_errors=True)
        print(
            f"{name}: {measurement.what} (about {measurement.minutes:g} min on one thread). "
            f"{measurement.command}",
            flush=True,
        )
    if min(processes, len(commands)) == 1:
        for name, arguments in commands.items():
            yield _run(name, arguments, alone=True)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        # The longest first, so that no process is left with one of them at the end.
        order = sorted(commands, key=lambda name: -measurements[name].minutes)
        tasks = [pool.submit(_run, name, commands[name], False) for name in order]
        try:
            for task in as_completed(tasks):
                yield task.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _run(name: str, arguments: Sequence[str], alone: bool) -> tuple[str, float]:
    """Runs one command of the evaluation; ``alone``: with nothing beside it at the terminal."""
    from evaluation.__main__ import main

    start = time.perf_counter()
    said = io.StringIO()
    with contextlib.ExitStack() as around:
        # The tables that the command prints are in its results, too.
        around.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not alone:
            # Bars of several processes would write over each other.
            around.enter_context(contextlib.redirect_stderr(said))
        around.enter_context(_one_thread())
        status = main(arguments)
    if status:
        raise ValueError(
            f"The measurement {name} failed (python -m evaluation {shlex.join(arguments)}): "
            f"{said.getvalue().strip() or 'see above'}"
        )
    return name, time.perf_counter() - start


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

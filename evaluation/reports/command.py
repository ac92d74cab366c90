"""``python -m evaluation report``: a page of results, or the documented numbers checked."""

from __future__ import annotations

import argparse
import json
import os
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.reports.documented_numbers import (
    DOCUMENTED_NUMBERS,
    RAYTRACED_DATA,
    REPOSITORY,
    SYNBOKEH_DATA,
    SYNBOKEH_SCENES,
    SYNBOKEH_SIZE,
)
from evaluation.reports.markers import Difference
from evaluation.reports.measuring import Measurement, measure, pictures_of
from evaluation.reports.quoted_numbers import QuotedNumbers
from evaluation.reports.tables import Results

if TYPE_CHECKING:
    from evaluation.reports.contact_sheet import Sheet

__all__ = ["add_arguments", "run"]

RAYTRACED = REPOSITORY.parent / "shared" / "bench" / "raytraced" / "data"
REPORTS = REPOSITORY / "reports"
PAGE = "index.html"
CLAIM = ".report"
# A whole block may be new.
LONGEST_CELL = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``report``."""
    parser.add_argument(
        "results",
        nargs="*",
        type=Path,
        metavar="RESULTS",
        help="JSON files that --out of other commands wrote: their tables, plots and one page. "
        "Without any, the numbers that README and documentation quote are measured anew and "
        "compared.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder for what is made, new or of an earlier report; default: reports/NAME in the "
        "checkout, NAME that of the first RESULTS, or documentation",
    )
    sheet = parser.add_argument_group("a contact sheet, with RESULTS of one comparison")
    sheet.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="what --save of the comparison was"
    )
    sheet.add_argument("--data", type=Path, metavar="FOLDER", help="the data set's folder")
    sheet.add_argument(
        "--method",
        metavar="NAME",
        help="whose worst, median and best photograph are shown; default: the last of the results",
    )
    sheet.add_argument("--metric", metavar="NAME", help="by which; default: the first")
    numbers = parser.add_argument_group("the numbers of README and documentation, without RESULTS")
    numbers.add_argument(
        "--raytraced",
        type=Path,
        metavar="DATA",
        help="the ray-traced benchmark; default: shared/bench/raytraced/data beside the checkout",
    )
    numbers.add_argument(
        "--only",
        action="append",
        choices=list(DOCUMENTED_NUMBERS.blocks),
        metavar="NAME",
        help=f"only this block: {', '.join(DOCUMENTED_NUMBERS.blocks)}; may be given several times",
    )
    numbers.add_argument(
        "--write", action="store_true", help="put what was measured into the files"
    )
    numbers.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="measure so many things side by side, each on one thread; default: one for each core",
    )


def run(arguments: argparse.Namespace) -> int:
    """Makes what is asked for; returns 1 if quoted and measured numbers differ, else 0.

    Raises:
        ValueError: arguments that do not go together, files that hold no results, a benchmark
            that is missing, a measurement that failed.
    """
    if arguments.results:
        _refuse(arguments, ("raytraced", "only", "write", "processes"), "with RESULTS")
        return report_results(arguments, arguments.out or REPORTS / arguments.results[0].stem)
    _refuse(arguments, ("pictures", "data", "method", "metric"), "without RESULTS")
    return check_numbers(arguments, arguments.out or REPORTS / "documentation")


def report_results(arguments: argparse.Namespace, out: Path) -> int:
    """Writes tables, plots, contact sheet and page of results files."""
    from evaluation.results import read_results

    results = [read_results(file) for file in arguments.results]
    names = [file.stem for file in arguments.results]
    if len(set(names)) < len(names):
        raise ValueError(
            f"Two files of results are called {_first_repeated(names)}; wanted different names, as "
            "what is made of them is called like them."
        )
    sheets = {}
    if arguments.pictures or arguments.data or arguments.method or arguments.metric:
        if len(results) > 1 or not (arguments.pictures and arguments.data):
            raise ValueError(
                "A contact sheet wants the RESULTS of one comparison, --pictures and --data; "
                f"{len(results)} RESULTS were given"
                f"{'' if arguments.pictures else ', no --pictures'}"
                f"{'' if arguments.data else ', no --data'}."
            )
        sheets[names[0]] = _sheet(
            results[0], arguments.pictures, arguments.data, arguments.method, arguments.metric
        )
    claim(out)
    write_report(dict(zip(names, results, strict=True)), sheets, out, "Lens blur, measured", [])
    return 0


def check_numbers(
    arguments: argparse.Namespace, out: Path, numbers: QuotedNumbers = DOCUMENTED_NUMBERS
) -> int:
    """Measures what documents quote, and compares or rewrites it; returns the exit status."""
    start = time.perf_counter()
    processes = cores() if arguments.processes is None else arguments.processes
    if processes < 1:
        raise ValueError(f"--processes is {processes}; wanted at least 1.")
    chosen = arguments.only or list(numbers.blocks)
    quoted = numbers.quoted(chosen)
    measurements = numbers.measurements_for(chosen)
    claim(out)
    folders = _folders(arguments, measurements, out, processes)

    results = measure(measurements, folders, out, processes)
    texts = numbers.texts(chosen, results)
    differences = numbers.differences(quoted, texts)
    verdict = verdict_on(differences)
    introduction = [f"Measured anew by python -m evaluation report. {verdict}"]
    sheets = {
        name: _sheet(results[name], pictures_of(out, name), folders[made.arguments[2]], *made.sheet)
        for name, made in measurements.items()
        if made.sheet
    }
    write_report(results, sheets, out, "The documented numbers", introduction)
    if differences:
        print(difference_table(differences))
    if arguments.write:
        for file in numbers.write(texts):
            print(f"Rewritten: {file}")
    print(f"{verdict} {len(chosen)} blocks, {time.perf_counter() - start:.0f} s.")
    return int(not arguments.write and not all(one.rounding for one in differences))


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def claim(out: Path) -> None:
    """Makes the folder one whose files reports replace.

    Raises:
        ValueError: it is a file, or holds something else.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; wanted a folder for the report.")
    if out.is_dir() and any(out.iterdir()) and not (out / CLAIM).is_file():
        raise ValueError(
            f"{out} holds files that no report wrote; wanted a new folder, so that none of them is "
            "replaced: --out FOLDER."
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / CLAIM).write_text("Files here are replaced by the next python -m evaluation report.\n")


def write_report(
    results: dict[str, Results],
    sheets: dict[str, Sheet],
    out: Path,
    title: str,
    introduction: Sequence[str],
) -> None:
    """Writes NAME.md, NAME.summary.json and NAME_PLOT.png for each of the results, and the page.

    ``sheets``: contact sheets by the name of their results; they are also written as PNG files.
    """
    from bokehdiff.whole_files import whole_or_not_at_all, write_whole
    from evaluation.reports.page import section_of, write_page
    from evaluation.reports.plots import plots_of, write_plot
    from evaluation.reports.tables import as_document, summary

    sections = []
    for name, measured in results.items():
        write_whole(out / f"{name}.md", as_document(measured).encode())
        text = json.dumps(summary(measured), indent=1, allow_nan=False)
        write_whole(out / f"{name}.summary.json", f"{text}\n".encode())
        for plot in plots_of(measured):
            write_plot(plot, out / f"{name}_{plot.name}.png")
        sheet = sheets.get(name)
        if sheet is not None:
            with whole_or_not_at_all(out / f"{name}_sheet.png", ".png") as unfinished:
                sheet.picture.save(unfinished)
        sections.append(section_of(measured, [] if sheet is None else [sheet]))
    write_page(out / PAGE, title, introduction, sections)
    print(f"Tables, plots and the page: {out / PAGE}")


def difference_table(differences: Sequence[Difference]) -> str:
    """place, quoted, measured of each difference; those by rounding say so."""
    rows = [("place", "quoted", "measured", "")]
    rows += [
        (d.place, _cell(d.quoted), _cell(d.measured), "rounding" if d.rounding else "")
        for d in differences
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _cell(words: str) -> str:
    return textwrap.shorten(words, LONGEST_CELL, placeholder=" ...") or "nothing"


def verdict_on(differences: Sequence[Difference]) -> str:
    """One or two sentences: how many numbers differ, and how many only by rounding."""
    rounded = sum(difference.rounding for difference in differences)
    real = len(differences) - rounded
    words = f"Places that differ: {real}." if real else "What is quoted is what was measured."
    if rounded:
        words += (
            f" Numbers that differ by one unit of the last digit, which is rounding: {rounded}."
        )
    return words


def _refuse(arguments: argparse.Namespace, options: Sequence[str], when: str) -> None:
    for option in options:
        if getattr(arguments, option) not in (None, False):
            raise ValueError(f"--{option} means nothing {when}; leave it out.")


def _first_repeated(names: Sequence[str]) -> str:
    return next(name for i, name in enumerate(names) if name in names[:i])


def _sheet(
    results: Results, pictures: Path, data: Path, method: str | None, metric: str | None
) -> Sheet:
    from evaluation.datasets import open_dataset
    from evaluation.reports.contact_sheet import choose, make_contact_sheet

    method = method or list(results["methods"])[-1]
    metric = metric or next(iter(results["metrics"]))
    scenes = sorted({choice.scene for choice in choose(results, method, metric)})
    dataset = open_dataset(results["dataset"]["name"], data, scenes)
    return make_contact_sheet(results, dataset.photographs(), pictures, method, metric)


def _folders(
    arguments: argparse.Namespace, measurements: dict[str, Measurement], out: Path, processes: int
) -> dict[str, Path]:
    """What the words in capitals of the commands stand for; makes the scenes that can be made."""
    used = {word for measurement in measurements.values() for word in measurement.arguments}
    folders = {}
    if RAYTRACED_DATA in used:
        folders[RAYTRACED_DATA] = arguments.raytraced or RAYTRACED
        if not folders[RAYTRACED_DATA].is_dir():
            raise ValueError(
                f"There is no ray-traced benchmark at {folders[RAYTRACED_DATA]}; wanted its folder "
                "as --raytraced DATA, or --only NAME for blocks that do not need it."
            )
    if SYNBOKEH_DATA in used:
        from data_synthesis.benchmark import write_benchmark

        folders[SYNBOKEH_DATA] = out / "synbokeh300"
        start = time.perf_counter()
        write_benchmark(
            "synbokeh300",
            folders[SYNBOKEH_DATA],
            count=SYNBOKEH_SCENES,
            size=SYNBOKEH_SIZE,
            processes=processes,
        )
        print(
            f"{SYNBOKEH_SCENES} scenes of synbokeh300 in {folders[SYNBOKEH_DATA]}: "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return folders

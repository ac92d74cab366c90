"""How long bokehdiff takes to start: the import, the command line, the first picture.

Every figure is that of a process of its own, which a person would start in the same way.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from evaluation.pipeline_speed import markdown
from evaluation.report import hardware, hardware_sentence, write_json
from evaluation.speed import BLUR_SHARE, motorcycle

__all__ = ["PICTURES", "PROCESSES", "STAGES", "StartSpeed", "run", "start_of"]

REPOSITORY = Path(__file__).resolve().parents[1]

PROCESSES = {
    "python": ["-c", "pass"],
    "import bokehdiff": ["-c", "import bokehdiff"],
    "bokehdiff --version": ["-m", "bokehdiff", "--version"],
    "bokehdiff --help": ["-m", "bokehdiff", "--help"],
    "import torch": ["-c", "import torch"],
}
"""By name: what the interpreter is asked to do. The first and the last are for comparison."""

PICTURES = ("layered", "flow_nano", "tiny")
"""What makes the first picture: the classical renderer, and the networks inside the package."""

STAGES = {
    "python": "the interpreter",
    "torch": "import of what reads pictures, torch with it",
    "import": "import of the renderer, or of the pipeline, diffusers with it",
    "read": "photograph and disparity from files",
    "load": "weights",
    "prepare": "what focus and blur do not change",
    "render": "the picture",
}
"""By column of the table: what happens in it; measured by ``evaluation.first_picture``."""

LARGEST_IMPORT_SECONDS = 0.3
"""What ``import bokehdiff`` may take."""

# Linux counts the memory of what starts a process as the process's own, hence something small.
LAUNCHER = """
import os, sys, time
start = time.monotonic()
process = os.posix_spawn(sys.executable, [sys.executable, *sys.argv[1:]], os.environ)
_, status, used = os.wait4(process, 0)
end = time.monotonic()
print()
print(start, end, used.ru_utime + used.ru_stime, used.ru_maxrss, os.waitstatus_to_exitcode(status))
"""


@dataclass(frozen=True)
class StartSpeed:
    """A process from its start to its end.

    Attributes:
        process: its name.
        wall_seconds: until it had ended.
        processor_seconds: of all its threads.
        peak_megabytes: largest resident memory, 10^6 bytes.
        stages: seconds of each stage by its name, of the clock on the wall and of the processor;
            empty of processes that make no picture.
    """

    process: str
    wall_seconds: float
    processor_seconds: float
    peak_megabytes: float
    stages: dict[str, tuple[float, float]]


def start_of(name: str, words: Sequence[str], threads: int = 1) -> StartSpeed:
    """One fresh process of this interpreter.

    Args:
        name: for the row.
        words: what the interpreter is asked to do.
        threads: of torch.

    Raises:
        ValueError: the process failed; with the last of what it said.
    """
    # A virtual environment is found through the interpreter's own path, so isolation loses nothing.
    finished = subprocess.run(
        [sys.executable, "-I", "-S", "-c", LAUNCHER, *words],
        capture_output=True, text=True, cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    *said, measured = finished.stdout.rstrip().splitlines() or [""]
    numbers = [float(number) for number in measured.split()]
    if finished.returncode or len(numbers) != 5 or numbers[-1] != 0:
        last = finished.stderr.strip().splitlines()[-1:] or ["it was stopped by the system"]
        raise ValueError(f"{name} could not be started: {last[0]}.")
    start, end, processor, peak, _ = numbers
    moments = {"start": (start, 0.0)}
    for line in said:
        if line.startswith("stages "):
            for stage, wall, used in (word.split("=") for word in line.split()[1:]):
                moments[stage] = float(wall), float(used)
    return StartSpeed(
        process=name,
        wall_seconds=end - start,
        processor_seconds=processor,
        # Kilobytes of Linux, bytes of macOS.
        peak_megabytes=peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6,
        stages={
            stage: (
                moments[stage][0] - moments[before][0],
                moments[stage][1] - moments[before][1],
            )
            for before, stage in itertools.pairwise(moments)
        },
    )


def median_of(repeats: Sequence[StartSpeed]) -> StartSpeed:
    """Each figure's median, of one process started several times."""
    return StartSpeed(
        process=repeats[0].process,
        wall_seconds=statistics.median(one.wall_seconds for one in repeats),
        processor_seconds=statistics.median(one.processor_seconds for one in repeats),
        peak_megabytes=statistics.median(one.peak_megabytes for one in repeats),
        stages={
            stage: (
                statistics.median(one.stages[stage][0] for one in repeats),
                statistics.median(one.stages[stage][1] for one in repeats),
            )
            for stage in repeats[0].stages
        },
    )


def measure(processes: Mapping[str, Sequence[str]], repeats: int, threads: int) -> list[StartSpeed]:
    """The medians of every process; in turns, after one start each that does not count."""
    measured: dict[str, list[StartSpeed]] = {name: [] for name in processes}
    with tqdm(
        total=(1 + repeats) * len(processes), unit="process", leave=False, disable=None
    ) as progress:
        for turn in range(1 + repeats):
            for name, words in processes.items():
                progress.set_postfix_str(name)
                one = start_of(name, words, threads)
                if turn:
                    measured[name].append(one)
                progress.update()
    return [median_of(found) for found in measured.values()]


def process_table(rows: Sequence[StartSpeed]) -> str:
    """One line for each process, in Markdown."""
    return markdown(
        [
            ["process", "time, s", "processor, s", "peak, MB"],
            *(
                [
                    row.process,
                    f"{row.wall_seconds:.3f}",
                    f"{row.processor_seconds:.3f}",
                    f"{row.peak_megabytes:.0f}",
                ]
                for row in rows
            ),
        ]
    )


def stage_table(rows: Sequence[StartSpeed], of_processor: bool) -> str:
    """One line for each first picture with its stages, in Markdown.

    Args:
        rows: of processes that made a picture.
        of_processor: its seconds, which other programs hardly disturb; else those on the wall.
    """
    lines = [["stages, s", *STAGES, "until the picture"]]
    for row in rows:
        seconds = {stage: both[of_processor] for stage, both in row.stages.items()}
        lines.append(
            [
                row.process,
                *(f"{seconds[stage]:.2f}" if stage in seconds else "-" for stage in STAGES),
                f"{sum(seconds.values()):.2f}",
            ]
        )
    return markdown(lines)


def import_seconds(rows: Sequence[StartSpeed]) -> float:
    """What ``import bokehdiff`` adds to an interpreter that does nothing."""
    wall = {row.process: row.wall_seconds for row in rows}
    return max(wall["import bokehdiff"] - wall["python"], 0.0)


# -- the command -----------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints the tables and writes the JSON. ValueError for mistakes."""
    if not 0.01 <= arguments.megapixels <= 100:
        raise ValueError(f"--megapixels must be in [0.01, 100], got {arguments.megapixels:g}.")
    for name in ("repeats", "threads"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}.")
    wanted = arguments.first_picture or list(PICTURES)
    for by in wanted:
        if by not in PICTURES:
            raise ValueError(
                f"--first-picture {by} is none of {', '.join(PICTURES)}; leave it out for all."
            )
    photo, disparity = motorcycle(arguments.megapixels)
    height, width = disparity.shape
    K = BLUR_SHARE * width
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / "photo.png"), str(Path(folder) / "disparity.npy")]
        Image.fromarray(photo).save(files[0])
        np.save(files[1], disparity)
        script = ["-m", "evaluation.first_picture"]
        pictures = {
            f"first picture, {by}": [*script, by, *files, "0.5", str(K)]
            for by in dict.fromkeys(wanted)
        }
        rows = measure({**PROCESSES, **pictures}, arguments.repeats, arguments.threads)
    first_pictures = [row for row in rows if row.stages]
    took = import_seconds(rows)
    words = protocol(width, height, K, arguments.repeats, arguments.threads)
    torch.set_num_threads(arguments.threads)
    machine = hardware()
    print(process_table(rows))
    print()
    print(stage_table(first_pictures, of_processor=arguments.threads == 1))
    print()
    print(f"import bokehdiff: {took:.3f} s; at most {LARGEST_IMPORT_SECONDS:g} s is wanted.")
    print(words)
    print(hardware_sentence(machine))
    if arguments.out:
        write_json(
            arguments.out,
            {
                "benchmark": "speed start",
                "protocol": words,
                "command": arguments.command_line,
                "hardware": machine,
                "import_seconds": took,
                "rows": [asdict(row) for row in rows],
            },
        )
        print(f"All figures: {arguments.out}")


def protocol(width: int, height: int, K: float, repeats: int, threads: int) -> str:
    """What the columns mean and how they were measured."""
    clock = "processor time" if threads == 1 else "wall-clock time"
    stages = "; ".join(f"{stage}: {meaning}" for stage, meaning in STAGES.items())
    return (
        f"Fresh processes, in turns; medians of {repeats} after one start each that warms up the "
        "system's file cache. time: wall-clock, which other programs disturb, from the start to "
        "the end of the process. processor: of all threads. peak: largest resident memory, "
        f"libraries included. First picture: scikit-image's motorcycle photograph at {width} x "
        f"{height} px, df 0.5, K {K:.1f}, by render_bokeh(method='layered') or by a network inside "
        f"the package. Stages, {clock}: {stages}. import bokehdiff: its process less that of "
        "python."
    )

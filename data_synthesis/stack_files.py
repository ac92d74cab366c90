"""Bokeh stacks written once and read many times: ``python -m data_synthesis stacks --help``.

How they are stored is told in :mod:`data_synthesis.sample_folders`: the tensors are those that
``StackScenes.arrays`` describes, 64 stacks to a file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_synthesis.sample_folders import FolderLayout, StoredSamples, write_samples
from data_synthesis.stack_scenes import StackScenes

__all__ = ["StoredStacks", "write_stacks"]

LAYOUT = FolderLayout("stacks", per_file=64)


def write_stacks(
    scenes: StackScenes,
    folder: Path,
    *,
    count: int,
    processes: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Write stacks 0 to ``count - 1`` into a folder, as
    :func:`data_synthesis.sample_folders.write_samples` does."""
    write_samples(LAYOUT, scenes, folder, count=count, processes=processes, progress=progress)


class StoredStacks(StoredSamples):
    """The stacks in a folder: ``stacks[i]`` equals ``scenes[i]`` that was written.

    ``settings``: what the data set was made with, see ``StackScenes.settings``.

    Raises:
        ValueError: the folder holds no stacks, or not all of them, or a file is damaged.
    """

    layout = LAYOUT
    scenes = StackScenes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``python -m data_synthesis stacks``."""
    parser.description = "Bokeh stacks of layered scenes with true metric depth."
    pair: dict[str, Any] = {"type": float, "nargs": 2}
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--count", type=int, default=64, help="stacks (default %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="height = width (default 128)")
    parser.add_argument("--seed", type=int, default=0, help="which data set (default 0)")
    parser.add_argument("--frames", type=int, default=3, help="of a stack (default %(default)s)")
    parser.add_argument(
        "--strengths",
        **pair,
        metavar=("LOW", "HIGH"),
        help="range of K in px*m at this size (default: size/256 to size/16)",
    )
    parser.add_argument(
        "--textureless-share",
        type=float,
        default=0.3,
        metavar="SHARE",
        help="of the surfaces, of one colour or nearly so (default %(default)s)",
    )
    parser.add_argument(
        "--disparities",
        **pair,
        default=(0.1, 1.0),
        metavar=("FAR", "NEAR"),
        help="of the surfaces seen, in 1/m (default 0.1 1: 1 to 10 m)",
    )
    parser.add_argument(
        "--df",
        **pair,
        metavar=("LOW", "HIGH"),
        help="disparity in focus in 1/m, drawn between these (default: the near end)",
    )
    parser.add_argument("--processes", type=int, default=1, help="default 1")


def run(options: argparse.Namespace) -> int:
    """Write the stacks that the parsed :func:`add_arguments` ask for; returns 0."""
    scenes = StackScenes(
        options.seed,
        options.size,
        frames=options.frames,
        strengths=options.strengths,
        textureless_share=options.textureless_share,
        disparities=options.disparities,
        df=options.df,
    )
    with tqdm(total=options.count, unit="stack", smoothing=0.05, disable=None) as bar:
        write_stacks(
            scenes,
            options.out,
            count=options.count,
            processes=options.processes,
            progress=bar.update,
        )
    print(f"{options.out} holds {options.count} stacks of {options.frames} frames.")
    return 0

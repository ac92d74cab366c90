"""Clips written once and read many times: ``python -m data_synthesis clips --help``.

How they are stored is told in :mod:`data_synthesis.sample_folders`: the tensors are those that
``ClipScenes.arrays`` describes, 16 clips to a file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_synthesis.clip_scenes import MOTIONS, ClipScenes
from data_synthesis.sample_folders import FolderLayout, StoredSamples, write_samples

__all__ = ["StoredClips", "write_clips"]

LAYOUT = FolderLayout("clips", per_file=16)


def write_clips(
    scenes: ClipScenes,
    folder: Path,
    *,
    count: int,
    processes: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Write clips 0 to ``count - 1`` into a folder, as
    :func:`data_synthesis.sample_folders.write_samples` does."""
    write_samples(LAYOUT, scenes, folder, count=count, processes=processes, progress=progress)


class StoredClips(StoredSamples):
    """The clips in a folder: ``clips[i]`` equals ``scenes[i]`` that was written.

    ``settings``: what the data set was made with, see ``ClipScenes.settings``.

    Raises:
        ValueError: the folder holds no clips, or not all of them, or a file is damaged.
    """

    layout = LAYOUT
    scenes = ClipScenes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``python -m data_synthesis clips``."""
    parser.description = "Clips of layered scenes with true depth, motion and lens blur."
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--count", type=int, default=64, help="clips (default %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="height = width (default 128)")
    parser.add_argument("--frames", type=int, default=4, help="of a clip (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which data set (default 0)")
    parser.add_argument(
        "--motions",
        nargs="+",
        default=MOTIONS,
        choices=MOTIONS,
        metavar="MOTION",
        help=f"what can happen in a clip, of {', '.join(MOTIONS)} (default: all)",
    )
    parser.add_argument(
        "--still-share",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="of still clips, if there are others (default %(default)s)",
    )
    parser.add_argument(
        "--noise",
        type=float,
        nargs=2,
        default=(0.0, 0.05),
        metavar=("LOW", "HIGH"),
        help="standard deviation of the noise of pictures in [0, 1], drawn per clip (default 0 "
        "0.05); from 0 on, a fifth of the clips have none",
    )
    parser.add_argument("--processes", type=int, default=1, help="default 1")


def run(options: argparse.Namespace) -> int:
    """Write the clips that the parsed :func:`add_arguments` ask for; returns 0."""
    scenes = ClipScenes(
        options.seed,
        options.size,
        frames=options.frames,
        motions=options.motions,
        still_share=options.still_share,
        noise=options.noise,
    )
    with tqdm(total=options.count, unit="clip", smoothing=0.05, disable=None) as bar:
        write_clips(
            scenes,
            options.out,
            count=options.count,
            processes=options.processes,
            progress=bar.update,
        )
    print(f"{options.out} holds {options.count} clips of {options.frames} frames.")
    return 0

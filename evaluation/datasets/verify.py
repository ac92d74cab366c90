"""Whether a data set on disk is complete and undamaged."""

from __future__ import annotations

import argparse

from evaluation.datasets import DATASETS, open_dataset

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=DATASETS, help="which layout the folder has")
    parser.add_argument("folder", help="where the data set lies")
    parser.add_argument(
        "--scenes", metavar="NAME,NAME", help="only these scenes, separated by commas"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints a line for each problem. Returns 0 if there is none, 1 otherwise.

    Raises ValueError for a folder that cannot be opened as this data set.
    """
    scenes = arguments.scenes.split(",") if arguments.scenes else None
    dataset = open_dataset(arguments.name, arguments.folder, scenes)
    problems = dataset.verify()
    for problem in problems:
        print(problem)
    if problems:
        print(f"{len(problems)} problem{'s' if len(problems) > 1 else ''}.")
        return 1
    print(f"Photographs: {len(dataset)}, scenes: {len(dataset.scenes)}; all as they should be.")
    return 0

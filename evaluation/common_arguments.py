"""What commands have in common: data set, methods and metrics by name, and where results go."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evaluation.datasets import DataSet
    from evaluation.methods import Method
    from evaluation.metrics import Metric
    from evaluation.results import Results

__all__ = [
    "add_data_set",
    "add_device",
    "add_methods",
    "add_metrics",
    "add_out",
    "data_set_asked_for",
    "finish",
    "methods_asked_for",
    "metrics_asked_for",
]


def add_data_set(parser: argparse.ArgumentParser) -> None:
    """DATASET, FOLDER and ``--scenes``."""
    from evaluation.datasets import DATASETS

    parser.add_argument("dataset", metavar="DATASET", help=f"one of {', '.join(DATASETS)}")
    parser.add_argument("folder", metavar="FOLDER", help="where it lies")
    parser.add_argument("--scenes", metavar="A,B", help="only these scenes, e.g. s01,s03")


def add_methods(parser: argparse.ArgumentParser) -> None:
    """``--method``, ``--predictions`` and ``--device``."""
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="NAME",
        help="tiny (the checkpoint inside the package), flow (the small fast network inside it), "
        "flow-physics, layered, scatter, pyramid, one of these "
        "three with +boost (clipped highlights get light back first), gaussian (the best global "
        "one, chosen with the truth), a model folder, or a Python function of image, disparity, df "
        "and K (module:function or path/to/file.py:function); NAME=... to give it another name; "
        "may be given several times",
    )
    parser.add_argument(
        "--predictions",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="finished pictures of another system, DIR/<scene>_<setting>.png; may be given several "
        "times. Without NAME= it is called like the folder.",
    )
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``."""
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, mps")


def add_metrics(parser: argparse.ArgumentParser, default: str) -> None:
    """``--metric`` and ``--weights``; ``default`` says in words what is measured without them."""
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help=f"one of python -m evaluation metrics; may be given several times. Default: {default}",
    )
    parser.add_argument(
        "--weights", metavar="PATH", help="file or folder of the networks of lpips and dists"
    )


def add_out(parser: argparse.ArgumentParser) -> None:
    """``--out``."""
    parser.add_argument("--out", metavar="FILE", help="write all figures to this JSON file")


def data_set_asked_for(arguments: argparse.Namespace) -> DataSet:
    """The data set, opened. ValueError if there is none."""
    from evaluation.datasets import open_dataset

    scenes = arguments.scenes.split(",") if arguments.scenes else None
    return open_dataset(arguments.dataset, arguments.folder, scenes)


def methods_asked_for(arguments: argparse.Namespace, given: str = "srgb8") -> list[Method]:
    """The methods and the predictions, in this order. ValueError if there are none.

    ``given``: what methods see, see :func:`evaluation.methods.method_by_name`.
    """
    from evaluation.methods import IDENTITY, method_by_name, predictions_in, split_name

    if not arguments.method and not arguments.predictions:
        raise ValueError("Nothing to evaluate; wanted --method NAME or --predictions NAME=DIR.")
    methods = []
    for text in dict.fromkeys(arguments.method):
        name, what = split_name(text)
        method = method_by_name(what, arguments.device, given)
        methods.append(dataclasses.replace(method, name=name or method.name))
    for text in arguments.predictions:
        name, folder = split_name(text)
        methods.append(predictions_in(folder, name or Path(folder).resolve().name))
    asked = [*dict.fromkeys(arguments.method), *arguments.predictions]
    for text, method in zip(asked, methods, strict=True):
        if method.name == IDENTITY and text != IDENTITY:
            raise ValueError(
                f"{text} would be called {IDENTITY}, which is the photograph itself; wanted "
                "another name for it: NAME=..."
            )
    return methods


def metrics_asked_for(arguments: argparse.Namespace, default: Sequence[str]) -> list[Metric]:
    """The metrics by ``--metric``, or the default ones.

    Raises:
        ValueError: an unknown name, weights that cannot be had, or a package that is missing.
    """
    from evaluation.metrics import metric_by_name

    names = dict.fromkeys(arguments.metric or default)
    try:
        return [metric_by_name(name, arguments.weights, arguments.device) for name in names]
    except ImportError as missing:
        raise ValueError(str(missing)) from missing


def finish(results: Results, arguments: argparse.Namespace) -> int:
    """Puts the command into the results, prints them, and writes them to ``--out``; returns 0."""
    from evaluation.report import printed
    from evaluation.results import write_results

    results["command"] = arguments.command_line
    print(printed(results))
    if arguments.out:
        write_results(arguments.out, results)
        print(f"All figures: {arguments.out}")
    return 0

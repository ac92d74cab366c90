"""``python -m evaluation compare``: methods side by side on a data set."""

from __future__ import annotations

import argparse

from evaluation.common_arguments import (
    add_data_set,
    add_methods,
    add_metrics,
    add_out,
    data_set_asked_for,
    finish,
    methods_asked_for,
    metrics_asked_for,
)

__all__ = ["DEFAULT_METRICS", "add_arguments", "run"]

DEFAULT_METRICS = (
    "psnr", "ssim", "psnr_nohl", "psnr_edge", "psnr_blurred", "psnr_infocus", "psnr_highlight",
)  # fmt: skip
"""Those that no photograph of the data set has are left out."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``compare``."""
    from evaluation.compare import EXPOSURES, STRENGTHS

    add_data_set(parser)
    add_methods(parser)
    parser.add_argument(
        "--input",
        choices=["srgb8", "linear"],
        default="srgb8",
        help="what methods are given: the 8-bit photograph (default), or its linear light with "
        "the highlights, where the data set has it",
    )
    parser.add_argument(
        "--K",
        choices=list(STRENGTHS),
        default="given",
        help="the blur strength: the data set's (default); the best by SSIM for each photograph; "
        "or the best one for each method and the whole data set",
    )
    parser.add_argument(
        "--exposure",
        choices=list(EXPOSURES),
        default="as_is",
        help="give methods the photograph as it is (default), or with the mean colour of the truth",
    )
    add_metrics(parser, f"those of {', '.join(DEFAULT_METRICS)} that the data set allows")
    parser.add_argument(
        "--against",
        metavar="NAME",
        help="also the difference of each method from this one, photograph by photograph",
    )
    parser.add_argument(
        "--save", metavar="DIR", help="keep the pictures here: DIR/<method>/<scene>_<setting>.png"
    )
    add_out(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compares, prints the table and writes the JSON; returns 0. ValueError for mistakes."""
    from evaluation.compare import compare, with_identity
    from evaluation.results import add_differences

    if arguments.input == "linear" and arguments.exposure == "aligned":
        raise ValueError(
            "--exposure aligned is for 8-bit photographs; wanted --input srgb8, or leave out "
            "--exposure."
        )
    dataset = data_set_asked_for(arguments)
    methods = with_identity(methods_asked_for(arguments, arguments.input), arguments.input)
    metrics = metrics_asked_for(arguments, DEFAULT_METRICS)
    if arguments.against and arguments.against not in {method.name for method in methods}:
        raise ValueError(
            f"--against {arguments.against} is no method here; wanted one of "
            f"{', '.join(method.name for method in methods)}."
        )
    results = compare(
        dataset,
        methods,
        metrics,
        K=arguments.K,
        exposure=arguments.exposure,
        save_to=arguments.save,
    )
    if not arguments.metric:
        results["metrics"] = {
            name: about
            for name, about in results["metrics"].items()
            if any(name in method["mean"] for method in results["methods"].values())
        }
    if arguments.against:
        add_differences(results, arguments.against)
    return finish(results, arguments)

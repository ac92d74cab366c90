"""Is BokehFlow better than its own physics rendering, where it matters? And than classical ones?"""

from __future__ import annotations

import argparse

from evaluation.common_arguments import (
    add_data_set,
    add_device,
    add_metrics,
    add_out,
    data_set_asked_for,
    finish,
    metrics_asked_for,
)

__all__ = ["CLASSICAL", "METRICS", "add_arguments", "run"]

CLASSICAL = ("pyramid", "layered")
METRICS = (
    "psnr_nohl", "ssim_nohl", "psnr_edge_nohl", "psnr_blurred_nohl", "psnr_infocus", "psnr",
    "psnr_edge",
)  # fmt: skip
"""Those that no photograph of the data set has are left out."""

EXAMPLES = """examples:
  python -m evaluation flow-quality raytraced bench/raytraced/data
  python -m evaluation flow-quality raytraced bench/raytraced/data --model FOLDER --out flow.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``flow-quality``."""
    parser.epilog = EXAMPLES
    add_data_set(parser)
    parser.add_argument(
        "--model",
        default="flow",
        metavar="FOLDER",
        help="a trained BokehFlow; default: %(default)s, the one inside the package",
    )
    parser.add_argument(
        "--method",
        action="append",
        metavar="NAME",
        help="compared with it besides its physics rendering; may be given several times. "
        f"Default: {', '.join(CLASSICAL)}",
    )
    add_metrics(parser, f"those of {', '.join(METRICS)} that the data set allows")
    parser.add_argument(
        "--save", metavar="DIR", help="keep the pictures here: DIR/<method>/<scene>_<setting>.png"
    )
    add_device(parser)
    add_out(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compares, prints the table and writes the JSON; returns 0. ValueError for mistakes."""
    from evaluation.compare import compare
    from evaluation.methods import PHYSICS, method_by_name
    from evaluation.results import add_differences

    dataset = data_set_asked_for(arguments)
    names = [arguments.model, f"{arguments.model.rstrip('/')}{PHYSICS}"]
    network, physics, *others = (
        method_by_name(name, arguments.device)
        for name in (*names, *(arguments.method or CLASSICAL))
    )
    metrics = metrics_asked_for(arguments, METRICS)
    results = compare(dataset, [network, physics, *others], metrics, save_to=arguments.save)
    if not arguments.metric:
        results["metrics"] = {
            name: about
            for name, about in results["metrics"].items()
            if any(name in method["mean"] for method in results["methods"].values())
        }
    add_differences(results, physics.name)
    return finish(results, arguments)

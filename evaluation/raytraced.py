"""The ray-traced benchmark: 3D scenes photographed with a pinhole and with a thin lens.

The table that it has always had, by the loop, the metrics and the data set that all comparisons
share (:mod:`evaluation.compare`); its groups of images and regions have names of their own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.bootstrap import mean_interval
from evaluation.compare import compare
from evaluation.datasets import DataSet, open_dataset
from evaluation.methods import Method, method_by_name, predictions_in
from evaluation.metrics import metric_by_name
from evaluation.report import hardware, table, write_json

__all__ = ["add_arguments", "evaluate", "protocol", "run", "summarise"]

REGIONS = ("infocus", "blurred", "edge", "nohl", "edge_nohl", "blurred_nohl")
METRICS = [
    f"{kind}{region}" for kind in ("psnr", "ssim") for region in ("", *(f"_{r}" for r in REGIONS))
]
# The lens settings that every scene has; scenes weigh equally in their mean.
COMMON_SETTINGS = ("f1_r28", "f0_r14", "f2_r06")

COLUMNS = [
    ("nohl", "overall", "psnr_nohl"),
    ("SSIM", "overall", "ssim_nohl"),
    ("r06", "level_06", "psnr_nohl"),
    ("r14", "level_14", "psnr_nohl"),
    ("r28", "level_28", "psnr_nohl"),
    ("common3", "common3", "psnr_nohl"),
    ("edge", "overall", "psnr_edge_nohl"),
    ("blurred", "overall", "psnr_blurred_nohl"),
    ("infocus", "overall", "psnr_infocus"),
    ("| all", "overall", "psnr"),
    ("SSIM", "overall", "ssim"),
    ("edge", "overall", "psnr_edge"),
    ("blurred", "overall", "psnr_blurred"),
]

EXAMPLES = """examples:
  python -m evaluation raytraced bench/raytraced/data --method tiny --out tiny.json
  python -m evaluation raytraced bench/raytraced/data --method scatter --scenes s01,s03
  python -m evaluation raytraced bench/raytraced/data --method layered --method layered+boost
  python -m evaluation raytraced bench/raytraced/data --method layered --input linear
  python -m evaluation raytraced bench/raytraced/data --method path/to/checkpoint --save pictures
  python -m evaluation raytraced bench/raytraced/data --predictions pictures/checkpoint
"""

PHOTOGRAPH_GIVEN = {
    "srgb8": "8-bit sRGB all-in-focus photograph",
    "linear": "all-in-focus photograph in linear light, highlights not cut off (half floats)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``raytraced``."""
    parser.epilog = EXAMPLES
    parser.add_argument("data", metavar="DATA", help="folder that holds the scene folders")
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="NAME",
        help="tiny (the checkpoint inside the package), flow (the small fast network inside it), "
        "flow-physics, layered, scatter, pyramid, one of these "
        "three with +boost (clipped highlights get light back first), gaussian, identity, or a "
        "model folder; may be given several times. The identity is always in the table.",
    )
    parser.add_argument(
        "--input",
        choices=["srgb8", "linear"],
        default="srgb8",
        help="what methods are given: the 8-bit photograph (default), or its linear light with "
        "the highlights",
    )
    parser.add_argument(
        "--predictions", metavar="DIR", help="score finished pictures DIR/<scene>_<setting>.png"
    )
    parser.add_argument("--scenes", metavar="A,B", help="only these scenes, e.g. s01,s03")
    parser.add_argument(
        "--save", metavar="DIR", help="keep the pictures here: DIR/<method>/<scene>_<setting>.png"
    )
    parser.add_argument("--out", metavar="FILE", help="write all figures to this JSON file")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, mps")


def run(arguments: argparse.Namespace) -> int:
    """Runs the benchmark; prints the table and writes the JSON. ValueError for mistakes."""
    scenes = arguments.scenes.split(",") if arguments.scenes else None
    dataset = open_dataset("raytraced", arguments.data, scenes)
    if not arguments.method and not arguments.predictions:
        raise ValueError("Nothing to evaluate; wanted --method NAME or --predictions DIR.")
    methods = [
        method_by_name(name, arguments.device, arguments.input)
        for name in dict.fromkeys(["identity", *arguments.method])
    ]
    if arguments.predictions:
        methods.append(predictions_in(arguments.predictions))
    results = evaluate(dataset, methods, arguments.save)

    machine = hardware(arguments.device)
    print(table(results, COLUMNS))
    print()
    for name, result in results.items():
        print(f"{name}: {result['description']}.")
    print(
        f"{len(dataset)} images of {len(dataset.scenes)} scenes ({', '.join(dataset.scenes)}). "
        "PSNR in dB. Left of the bar: pixels that no clipped highlight reaches (infocus: all); "
        "right of it: all pixels. "
        f"Seconds on {machine['processor']}, {machine['torch_threads']} thread(s), device "
        f"{machine['device']}."
    )
    print(protocol(arguments.input))
    if arguments.out:
        write_json(
            arguments.out,
            {
                "benchmark": "raytraced",
                "protocol": protocol(arguments.input),
                "input": arguments.input,
                "data": str(Path(arguments.data).resolve()),
                "scenes": dataset.scenes,
                "hardware": machine,
                "results": results,
            },
        )
        print(f"All figures: {arguments.out}")
    return 0


def protocol(given: str) -> str:
    """What the figures mean, in words; ``given``: ``srgb8`` or ``linear``."""
    return (
        f"Each method is given the {PHOTOGRAPH_GIVEN[given]}, its true disparity (one sample "
        "through each pixel centre), the disparity in focus and K, and nothing else unless its "
        "description says so. "
        "The circle of confusion has a radius of K * |disparity - df| pixels; the lens is a thin "
        "lens with a circular opening. "
        "PSNR and SSIM (Gaussian window, sigma 1.5) are computed on display-encoded sRGB, "
        "predictions clipped and rounded to 8 bits, for each image, and averaged over images. "
        "edge: within 6 px of a disparity step of more than 3 % of the scene's range. infocus: "
        "radius below 0.75 px, not edge. blurred: the rest. nohl: pixels that the disc of no "
        "clipped highlight (linear light above 1.5) can reach, the fair figure for methods that "
        "see 8 bits; edge_nohl, blurred_nohl: the parts of these regions in it. level_NN: "
        "settings whose largest radius is NN px. common3: the three settings that every scene has. "
        "The interval is the middle 95 % of nohl PSNR when scenes, not images, are drawn again "
        "with replacement. Seconds are wall-clock time of the method alone, first image included."
    )


def evaluate(
    dataset: DataSet, methods: Sequence[Method], save_to: str | Path | None = None
) -> dict[str, dict[str, Any]]:
    """Results by method name: :func:`summarise` plus description, seconds_per_image and rows.

    ``save_to``: as of :func:`evaluation.compare.compare`, whose errors are those here.
    """
    metrics = [metric_by_name(name) for name in METRICS]
    compared = compare(dataset, methods, metrics, save_to=save_to)
    return {
        name: {
            "description": about["description"],
            "seconds_per_image": about["seconds_per_image"],
            **summarise(about["rows"]),
            "rows": about["rows"],
        }
        for name, about in compared["methods"].items()
    }


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over all rows and over groups of rows, each a dict of figures; and the interval."""
    groups = {"overall": list(rows)}
    for level in sorted({row["level"] for row in rows}):
        groups[f"level_{level:02d}"] = [row for row in rows if row["level"] == level]
    groups["alpha_scenes"] = [row for row in rows if row["alpha"]]
    groups["light_scenes"] = [row for row in rows if row["lights"]]
    groups["no_light_scenes"] = [row for row in rows if not row["lights"]]
    groups["common3"] = [row for row in rows if row["id"] in COMMON_SETTINGS]
    summary: dict[str, Any] = {name: _means(members) for name, members in groups.items()}
    summary["images"] = len(rows)
    summary["scenes"] = len({row["scene"] for row in rows})
    summary["psnr_nohl_interval"] = mean_interval(rows, "psnr_nohl")
    return summary


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean of every figure over the rows that have it."""
    names = sorted({name for row in rows for name in row if name in METRICS})
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}

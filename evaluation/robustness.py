"""How much a wrong disparity costs each method: the drop of every metric, with quartiles."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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
from evaluation.compare import compare, with_identity
from evaluation.corruptions import CORRUPTIONS, check_level, corrupted
from evaluation.datasets import DataSet
from evaluation.methods import IDENTITY, Method
from evaluation.metrics import Metric
from evaluation.results import Results

__all__ = ["add_arguments", "drops_of", "robustness", "run"]

PIXELS = (1, 2, 4, 8)
"""Default levels of erosion, dilation and blur."""
LEVELS = (256, 64, 32, 16)
"""Default levels of quantisation."""

DEFAULT_METHODS = ("tiny", "scatter", "layered")
DEFAULT_METRICS = ("psnr", "psnr_edge", "ssim")

PROTOCOL = (
    "Every method is given each photograph with its true disparity, and again with the disparity "
    "corrupted; df, K and the truth stay. A drop is by how much a metric gets worse through the "
    "corruption, for the same photograph and method; quartiles are over photographs. "
    "{corruptions}"
    "Regions are those of the true disparity."
)


def robustness(
    dataset: DataSet,
    methods: Sequence[Method],
    metrics: Sequence[Metric],
    corruptions: Mapping[str, Sequence[int]],
) -> Results:
    """Results of kind ``robustness``: those of :func:`compare`, and ``drops``.

    Args:
        dataset: of photographs whose K is known.
        methods: the identity is put before them if it is not among them.
        metrics: at least one.
        corruptions: the levels of each, by its name; see :data:`CORRUPTIONS`.

    Returns:
        As :func:`compare`, whose figures are those of the true disparity. The rows of a method are
        of all photographs with ``corruption`` "none" and ``corruption_level`` 0, then of those
        that are corrupted. Its ``drops`` are, by corruption, level and metric, the
        ``lower_quartile``, ``median``, ``upper_quartile`` and ``mean`` over the photographs that
        have the metric.

    Raises:
        ValueError: as of :func:`compare`, or a corruption or level that there is not.
    """
    asked = [(name, level) for name, levels in corruptions.items() for level in levels]
    methods = with_identity(methods)
    # The identity looks at no disparity, so nothing is rendered for it again.
    variants = {
        (method.name, *one): method if method.name == IDENTITY else _under(method, *one)
        for method in methods
        for one in asked
    }
    every = {method.name: method for method in [*methods, *variants.values()]}
    results = compare(dataset, list(every.values()), metrics)
    rows = {name: about["rows"] for name, about in results["methods"].items()}
    results["methods"] = {method.name: results["methods"][method.name] for method in methods}
    for name, about in results["methods"].items():
        about["drops"] = {corruption: {} for corruption in corruptions}
        about["rows"] = [{**row, "corruption": "none", "corruption_level": 0} for row in rows[name]]
        for corruption, level in asked:
            after = rows[variants[name, corruption, level].name]
            about["drops"][corruption][str(level)] = drops_of(rows[name], after, metrics)
            about["rows"] += [
                {**row, "corruption": corruption, "corruption_level": level} for row in after
            ]
    words = "".join(f"{name}: {CORRUPTIONS[name].description}. " for name in corruptions)
    return {
        **results,
        "kind": "robustness",
        "title": f"{results['title']}, disparity corrupted",
        "protocol": f"{PROTOCOL.format(corruptions=words)} {results['protocol']}",
    }


def drops_of(
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    metrics: Sequence[Metric],
) -> dict[str, dict[str, float]]:
    """By metric, the quartiles and the mean of how much worse each row became.

    ``before`` and ``after``: rows of the same photographs in the same order. Quartiles are linear
    between photographs. A metric that no photograph has is left out.
    """
    drops = {}
    for metric in metrics:
        differences = [
            first[metric.name] - second[metric.name]
            for good, bad in zip(before, after, strict=True)
            for first, second in [(good, bad) if metric.better == "higher" else (bad, good)]
            if metric.name in good and metric.name in bad
        ]
        if differences:
            lower, median, upper = np.percentile(differences, [25, 50, 75])
            drops[metric.name] = {
                "lower_quartile": float(lower),
                "median": float(median),
                "upper_quartile": float(upper),
                "mean": float(np.mean(differences)),
            }
    return drops


def _under(method: Method, corruption: str, level: int) -> Method:
    """The method, given a disparity that is corrupted."""
    return dataclasses.replace(
        method,
        name=f"{method.name}, {corruption} {level}",
        render=lambda photograph: method.render(corrupted(photograph, corruption, level)),
        timed=False,  # the corruption takes time of its own
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m evaluation robustness``."""
    add_data_set(parser)
    add_methods(parser)
    parser.epilog = f"Without --method: {', '.join(DEFAULT_METHODS)}."
    parser.add_argument(
        "--corruption",
        action="append",
        default=[],
        metavar="NAME",
        help=f"one of {', '.join(CORRUPTIONS)}; may be given several times. Default: all",
    )
    parser.add_argument(
        "--levels",
        default=",".join(map(str, PIXELS)),
        metavar="E,E",
        help="pixels of erosion, dilation and blur, default %(default)s; the paper has 1 to 8",
    )
    parser.add_argument(
        "--quantise-levels",
        default=",".join(map(str, LEVELS)),
        metavar="N,N",
        help="values that a quantised disparity has, default %(default)s",
    )
    add_metrics(parser, f"{', '.join(DEFAULT_METRICS)}, and lpips with --weights")
    add_out(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints medians and quartiles, and writes the JSON; returns 0.

    ValueError for mistakes.
    """
    pixels = _numbers(arguments.levels, "--levels")
    values = _numbers(arguments.quantise_levels, "--quantise-levels")
    corruptions = {
        name: values if name == "quantise" else pixels
        for name in arguments.corruption or CORRUPTIONS
    }
    for name, levels in corruptions.items():
        for level in levels:
            check_level(name, level)
    if arguments.predictions:
        raise ValueError(
            "Finished pictures were made from one disparity and cannot be asked how they would be "
            "with another; wanted methods that render here, by --method."
        )
    dataset = data_set_asked_for(arguments)
    arguments.method = arguments.method or list(DEFAULT_METHODS)
    methods = methods_asked_for(arguments)
    default = [*DEFAULT_METRICS, *(["lpips"] if arguments.weights else [])]
    metrics = metrics_asked_for(arguments, default)
    return finish(robustness(dataset, methods, metrics, corruptions), arguments)


def _numbers(text: str, option: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"{option} is {text!r}; wanted whole numbers, e.g. 1,2,4.") from None

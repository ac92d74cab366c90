"""Does the blur do what it is told: grow with K, and leave sharp what lies at df?

No truth is needed: the blur is measured against the photograph that is all in focus.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from evaluation.blur_measure import measured_blur
from evaluation.common_arguments import (
    add_data_set,
    add_methods,
    add_out,
    data_set_asked_for,
    finish,
    methods_asked_for,
)
from evaluation.datasets import DataSet
from evaluation.disparity_bands import Band, bands_of, near_middle_and_far
from evaluation.methods import Method
from evaluation.metrics import quantise_to_8_bit
from evaluation.photographs import Photograph
from evaluation.report import hardware
from evaluation.results import Results

__all__ = ["add_arguments", "controllability", "correlation", "row_of", "run", "summary_of"]

DEFAULT_METHODS = ("tiny", "scatter", "layered")
K_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
# A band counts as blurred from this radius on.
LEAST_RADIUS_PX = 2.0
# Radii are looked for up to this multiple of the widest that the scene could have.
SEARCHED = 1.5

PROTOCOL = (
    "Disparity is cut into 3 to 8 bands of equal width. Blur is measured in bands that hold at "
    "least 400 textured pixels away from depth edges, in pixels of radius, by comparing the "
    "rendered picture with the photograph. "
    "K_correlation: Pearson correlation of K with the blur measured in the most textured band that "
    "is blurred by 2 px or more, at fixed df, for K of 0, 1/4, 1/2, 3/4 and 1 of the photograph's. "
    "A method that does not answer to K has 0. "
    "focus_follows: df is set to the disparity of the farthest band, of the nearest and of one in "
    "between, and each time that band has to have the least blur of the three; 1 if so, else 0; "
    "the figure of a method is the share of scenes of which every photograph has 1. Photographs "
    "without such bands have no figure."
)
METRICS = {
    "K_correlation": {
        "better": "higher",
        "unit": "",
        "description": "Pearson correlation of K with the measured blur radius",
    },
    "focus_follows": {
        "better": "higher",
        "unit": "",
        "description": "share of scenes where the band of disparity df is the sharpest",
    },
}


def controllability(dataset: DataSet, methods: Sequence[Method]) -> Results:
    """Results of kind ``controllability``.

    Args:
        dataset: of photographs whose K is known; their truth is not looked at.
        methods: those whose control is measured; names of their own.

    Returns:
        What :mod:`evaluation.results` describes, with the rows of :func:`row_of`. Each method has
        ``K_correlation`` and ``K_correlation_minimum``, mean and minimum over the photographs that
        have the figure, and ``focus_follows``, the share of scenes of which every photograph has 1;
        None where no photograph tells.

    Raises:
        ValueError: a photograph whose K nobody knows; what is wrong with the data set's files.
    """
    rows: dict[str, list[dict[str, Any]]] = {method.name: [] for method in methods}
    images = len(dataset)
    with tqdm(
        total=images * len(methods), unit="image", desc=dataset.name, leave=False, disable=None
    ) as progress:
        for photograph in dataset.photographs():
            for method in methods:
                progress.set_postfix_str(f"{photograph.name} {method.name}")
                rows[method.name].append(row_of(photograph, method))
                progress.update()
    device = next((method.device for method in methods if method.device != "cpu"), "cpu")
    return {
        "kind": "controllability",
        "title": f"{dataset.name}, control of the blur",
        "protocol": PROTOCOL,
        "command": "",
        "dataset": {"name": dataset.name, "scenes": list(dataset.scenes), "images": images},
        "hardware": hardware(device),
        "metrics": METRICS,
        "methods": {
            method.name: {
                "description": method.description,
                **summary_of(rows[method.name]),
                "rows": rows[method.name],
            }
            for method in methods
        },
    }


def summary_of(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The figures of a method, from those of its rows; see :func:`controllability`."""
    correlations = [row["K_correlation"] for row in rows if "K_correlation" in row]
    follows: dict[str, bool] = {}
    for row in rows:
        if "focus_follows" in row:
            before = follows.get(row["scene"], True)
            follows[row["scene"]] = before and row["focus_follows"] == 1
    return {
        "K_correlation": float(np.mean(correlations)) if correlations else None,
        "K_correlation_minimum": min(correlations, default=None),
        "focus_follows": float(np.mean(list(follows.values()))) if follows else None,
    }


def row_of(photograph: Photograph, method: Method) -> dict[str, Any]:
    """The row of one photograph: what was measured, and the figures that it has.

    Besides the figures: ``radius`` (pixels) that the band of the sweep of K has at full K,
    ``blur_by_K`` (measured pixels, one for each share of K), ``focus_disparities`` and
    ``blur_by_focus`` (for each of them, the measured pixels in the bands of all of them).

    Raises:
        ValueError: a photograph whose K nobody knows.
    """
    if photograph.K is None:
        raise ValueError(
            f"Nobody knows the K of {photograph.name}, of which parts are to be asked for; wanted "
            "a data set that gives K."
        )
    row: dict[str, Any] = {
        "scene": photograph.scene,
        "setting": photograph.setting,
        "K": photograph.K,
        **photograph.labels,
    }
    bands = bands_of(photograph)
    radius = {id(band): photograph.K * abs(band.disparity - photograph.df) for band in bands}
    blurred = [band for band in bands if radius[id(band)] >= LEAST_RADIUS_PX]
    if blurred:
        band = max(blurred, key=lambda one: one.textured)
        measured = [
            _blur_in([band], photograph, method, photograph.df, share * photograph.K)[0]
            for share in K_SHARES
        ]
        row["radius"], row["blur_by_K"] = radius[id(band)], measured
        row["K_correlation"] = correlation(K_SHARES, measured)
    chosen = near_middle_and_far(bands)
    if len(chosen) > 1:
        blur = [
            _blur_in(chosen, photograph, method, band.disparity, photograph.K) for band in chosen
        ]
        row["focus_disparities"] = [band.disparity for band in chosen]
        row["blur_by_focus"] = blur
        sharpest = [int(np.argmin(one)) for one in blur]
        row["focus_follows"] = float(sharpest == list(range(len(chosen))))
    return row


def _blur_in(
    bands: Sequence[Band], photograph: Photograph, method: Method, df: float, K: float
) -> list[float]:
    asked = dataclasses.replace(photograph, df=df, K=K)
    rendered = quantise_to_8_bit(method.render(asked))
    low, high = photograph.disparity_range
    largest = SEARCHED * photograph.K * (high - low)
    return [measured_blur(photograph.image, rendered, band.pixels, largest) for band in bands]


def correlation(asked: Sequence[float], measured: Sequence[float]) -> float:
    """Pearson's, in [-1, 1]; 0 where nothing was measured but one value."""
    if np.ptp(measured) == 0:
        return 0.0
    return float(np.corrcoef(asked, measured)[0, 1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m evaluation controllability``."""
    add_data_set(parser)
    add_methods(parser)
    parser.epilog = f"Without --method: {', '.join(DEFAULT_METHODS)}."
    add_out(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints the table and writes the JSON; returns 0. ValueError for mistakes."""
    if arguments.predictions:
        raise ValueError(
            "Finished pictures have one K and one df and cannot be asked for others; wanted "
            "methods that render here, by --method."
        )
    arguments.method = arguments.method or list(DEFAULT_METHODS)
    dataset = data_set_asked_for(arguments)
    return finish(controllability(dataset, methods_asked_for(arguments)), arguments)

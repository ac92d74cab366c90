"""What each part of a model is worth: the model as it is beside variants that lack one part."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import bokehdiff
from bokehdiff import BokehDiffPipeline
from evaluation.ablation_variants import FULL, Variant, variants_of
from evaluation.common_arguments import (
    add_data_set,
    add_device,
    add_metrics,
    add_out,
    data_set_asked_for,
    finish,
    metrics_asked_for,
)
from evaluation.compare import compare
from evaluation.datasets import DataSet
from evaluation.methods import Method
from evaluation.metrics import Metric
from evaluation.photographs import Photograph
from evaluation.pipeline_rendering import render_with
from evaluation.results import Results, add_differences

__all__ = ["ablations", "add_arguments", "run"]

DEFAULT_METRICS = (
    "psnr", "psnr_edge", "psnr_blurred", "psnr_infocus", "psnr_highlight", "ssim",
)  # fmt: skip
WEIGHTS_NAME = "ablated"

PROTOCOL = (
    "One part of the model at a time is switched off, and nothing is trained again: a change says "
    "what the part is worth to this model, not how well another would do that had been trained "
    "without it. Changes are variant - full, photograph by photograph."
)


def ablations(
    dataset: DataSet,
    pipeline: BokehDiffPipeline,
    metrics: Sequence[Metric],
    *,
    weights: str | None = None,
    description: str = "",
) -> Results:
    """Results of kind ``ablations``: a comparison whose methods are variants of one model.

    Args:
        dataset: of photographs whose K is known.
        pipeline: the model; it is as before when this returns.
        metrics: at least one.
        weights: name of the trained weights in the pipeline (``load_bokeh_weights``), if any.
        description: of the model, in words.

    Returns:
        As of :func:`evaluation.compare.compare`, the full model first and the identity last. Every
        other method has, by metric, ``change``, its mean minus that of the full model, and
        ``difference``, the same with its interval. ``missing`` says, by name, why the model has not
        every variant.

    Raises:
        ValueError: as of ``compare``.
    """
    variants, missing = variants_of(pipeline, weights)
    device = str(pipeline.device)
    methods = [
        Method(
            variant.name,
            variant.description,
            lambda photograph, variant=variant: _render(pipeline, variant, photograph),
            # How a part is switched off takes time of its own.
            timed=variant.name == FULL,
            device=device,
        )
        for variant in variants
    ]
    results = compare(dataset, methods, metrics)
    add_differences(results, FULL)
    found = results["methods"]
    found[FULL]["description"] += f": {description}" if description else ""
    for about in found.values():
        if "difference" in about:
            about["change"] = {name: one["mean"] for name, one in about["difference"].items()}
    names = [*(variant.name for variant in variants), *found]  # the identity is among all
    absent = "".join(f" No row {name}: {reason}." for name, reason in missing.items())
    return {
        **results,
        "kind": "ablations",
        "title": f"{results['title']}, parts of a model switched off",
        "protocol": f"{PROTOCOL}{absent} {results['protocol']}",
        "methods": {name: found[name] for name in dict.fromkeys(names)},
        "missing": missing,
    }


def _render(pipeline: BokehDiffPipeline, variant: Variant, photograph: Photograph) -> np.ndarray:
    with variant.applied(pipeline):
        return render_with(pipeline, photograph)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m evaluation ablations``."""
    add_data_set(parser)
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="a model folder; default: tiny, the checkpoint inside the package",
    )
    parser.add_argument(
        "--bokeh-weights",
        metavar="FOLDER",
        help="trained weights to load into the model (load_bokeh_weights), whose encoder can be "
        "exchanged for the model's own",
    )
    add_device(parser)
    add_metrics(parser, ", ".join(DEFAULT_METRICS))
    add_out(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints the table and writes the JSON; returns 0. ValueError for mistakes."""
    dataset = data_set_asked_for(arguments)
    metrics = metrics_asked_for(arguments, DEFAULT_METRICS)
    tiny = arguments.model in (None, "tiny")
    folder = bokehdiff.TINY if tiny else arguments.model
    if not (Path(folder) / "model_index.json").is_file():
        raise ValueError(
            f"--model {folder} holds no model: wanted a folder that save_pretrained wrote, with a "
            "model_index.json."
        )
    pipeline = BokehDiffPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    description = f"BokehDiffPipeline.from_pretrained({'bokehdiff.TINY' if tiny else folder!r})"
    if arguments.bokeh_weights:
        pipeline.load_bokeh_weights(arguments.bokeh_weights, adapter_name=WEIGHTS_NAME)
        description += f" with the weights {arguments.bokeh_weights!r}"
    results = ablations(
        dataset,
        pipeline.to(arguments.device),
        metrics,
        weights=WEIGHTS_NAME if arguments.bokeh_weights else None,
        description=description,
    )
    return finish(results, arguments)

"""Results of measurements: what every report reads, as JSON.

A dict with

- ``kind``: one of :data:`KINDS`; ``title``; ``protocol`` in words; ``command`` ("" if none);
- ``dataset``: ``name``, ``scenes`` (names) and ``images`` (how many);
- ``hardware``: see :func:`evaluation.report.hardware`;
- ``metrics``: by name, ``better`` ("higher" or "lower"), ``unit`` and ``description``;
- ``methods``: by name, ``description``, ``rows`` and what the kind has besides.

Each row is one photograph: ``scene``, ``setting``, labels of the data set, and figures by the name
of the metric, absent where the photograph has none. Of kind ``comparison`` it has ``K``,
``seconds`` and ``peak_memory_bytes`` (None where not known), and each method has ``mean`` and
``interval`` by metric (:mod:`evaluation.bootstrap`), ``seconds_per_image`` and
``peak_memory_bytes``. Other kinds: :mod:`evaluation.robustness`, :mod:`evaluation.ablations`,
:mod:`evaluation.controllability`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bokehdiff.whole_files import write_whole
from evaluation.bootstrap import difference_interval, differences, mean_interval

__all__ = [
    "KINDS",
    "Results",
    "add_differences",
    "read_results",
    "summary_of_rows",
    "write_results",
]

Results = dict[str, Any]
"""As above."""

KINDS = ("comparison", "robustness", "ablations", "controllability")

KEYS = ("title", "protocol", "command", "dataset", "hardware", "metrics", "methods")


def summary_of_rows(rows: Sequence[dict[str, Any]], metrics: Sequence[str]) -> dict[str, Any]:
    """``mean``, ``interval``, ``seconds_per_image`` and ``peak_memory_bytes`` of a method's rows.

    Means are over the rows that have the metric; a metric that none has is absent from ``mean``
    and None in ``interval``. Seconds are the mean over rows, memory the largest; None without any.
    """
    means = {}
    for metric in metrics:
        figures = [row[metric] for row in rows if row.get(metric) is not None]
        if figures:
            means[metric] = float(np.mean(figures))
    seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
    peaks = [row["peak_memory_bytes"] for row in rows if row["peak_memory_bytes"] is not None]
    return {
        "mean": means,
        "interval": {metric: mean_interval(rows, metric) for metric in metrics},
        "seconds_per_image": float(np.mean(seconds)) if seconds else None,
        "peak_memory_bytes": max(peaks, default=None),
    }


def add_differences(results: Results, against: str) -> None:
    """Gives every other method of a comparison its ``difference`` from one of them.

    By metric, ``mean`` and ``interval`` (or None) of method - against, photograph by photograph
    (:func:`evaluation.bootstrap.difference_interval`). ``results["against"]`` says which one it is.

    Raises:
        ValueError: there is no such method.
    """
    methods = results["methods"]
    if against not in methods:
        raise ValueError(f"There is no method {against}; wanted one of {', '.join(methods)}.")
    results["against"] = against
    for name, about in methods.items():
        if name == against:
            continue
        about["difference"] = {}
        for metric in results["metrics"]:
            rows = about["rows"], methods[against]["rows"]
            values = list(differences(*rows, metric).values())
            if values:
                about["difference"][metric] = {
                    "mean": float(np.mean(values)),
                    "interval": difference_interval(*rows, metric),
                }


def write_results(file: str | Path, results: Results) -> None:
    """Writes results as JSON, whole or not at all, in the place of older ones.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a figure is NaN or infinite.
    """
    write_whole(Path(file), (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())


def read_results(file: str | Path) -> Results:
    """The results that :func:`write_results` wrote.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    wanted = "wanted a file that --out of python -m evaluation compare (or robustness, ...) wrote."
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"There is no file {file}; {wanted}")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"{file} is not valid JSON ({problem}); {wanted}") from problem
    kind = results.get("kind") if isinstance(results, dict) else None
    if kind not in KINDS:
        raise ValueError(f"{file} holds no results of {', '.join(KINDS)}; {wanted}")
    missing = [key for key in KEYS if key not in results]
    if missing:
        raise ValueError(f"{file} is of kind {kind} but lacks {', '.join(missing)}; {wanted}")
    return results

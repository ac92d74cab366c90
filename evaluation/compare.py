"""The one loop: methods on a data set by metrics, with the seconds and the memory they take."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from bokehdiff.whole_files import whole_or_not_at_all
from evaluation import bootstrap
from evaluation.datasets import DataSet
from evaluation.exposure import align_exposure
from evaluation.memory import memory_bytes, peak_bytes_of
from evaluation.methods import IDENTITY, Method, method_by_name
from evaluation.metrics import Metric, measure_all, quantise_to_8_bit
from evaluation.photographs import Photograph
from evaluation.report import hardware
from evaluation.results import Results, summary_of_rows
from evaluation.strength_search import (
    LARGEST_RADIUS_SHARE,
    SMALLEST_RADIUS_PX,
    TOLERANCE,
    best_common_range_px,
    best_K,
    disparity_span,
    largest_defocus,
)

__all__ = ["EXPOSURES", "STRENGTHS", "compare", "with_identity"]

SEARCH = (
    "by golden-section search over ln K for the highest {what}, between the K whose largest circle "
    f"of confusion has {SMALLEST_RADIUS_PX} px and that whose has {100 * LARGEST_RADIUS_SHARE:g} % "
    f"of the width, to {100 * TOLERANCE:g} % (15 or 16 strengths for widths of 500 to 2000 px), "
    "and K = 0; so the truth is used, and these figures are not those of a known K."
)
STRENGTHS = {
    "given": "K is the data set's.",
    "searched": f"K is searched for each photograph and method {SEARCH.format(what='SSIM')}",
    "searched_per_method": (
        "K, relative to the range of the disparity, is one number for each method and the whole "
        f"data set, searched {SEARCH.format(what='mean SSIM')}"
    ),
}
"""What ``K=`` can be, in words."""

EXPOSURES = {
    "as_is": "Photographs have the exposure they were taken with.",
    "aligned": (
        "Each colour channel of a photograph is scaled to the mean that the truth has before "
        "methods are given it, the identity, too."
    ),
}
"""What ``exposure=`` can be, in words."""

TITLES = {
    "given": "",
    "searched": ", K searched per photograph",
    "searched_per_method": ", K searched per method",
    "as_is": "",
    "aligned": ", exposure aligned",
}

# Reading can take longer than rendering: light fields are made of views, foci are searched for.
KEPT_SHARE_OF_MEMORY = 0.25

PROTOCOL = (
    "Every method renders every photograph through its lens from what its description says it is "
    "given. The circle of confusion has a radius of K * |disparity - df| pixels. {strength} "
    "{exposure} Pictures are clipped and rounded to 8 bits, compared with the truth image by "
    "image, and figures averaged over the images that have them. "
    f"{bootstrap.PROTOCOL} "
    "Seconds are wall-clock time of the method alone, first image included. Peak memory is what a "
    "method takes to render the largest photograph, and of these the most blurred one, once more, "
    "above what was taken before: resident memory, on a GPU what torch holds there; - where the "
    "system cannot tell."
)


def compare(
    dataset: DataSet,
    methods: Sequence[Method],
    metrics: Sequence[Metric],
    *,
    K: str = "given",
    exposure: str = "as_is",
    save_to: str | Path | None = None,
) -> Results:
    """Results of kind ``comparison``: every method on every photograph by every metric.

    Args:
        dataset: what is rendered.
        methods: the identity is put before them if it is not among them.
        metrics: at least one. Regions are always those of the data set's own K.
        K: ``given``; ``searched``, for the best SSIM of each photograph; or
            ``searched_per_method``, one strength for each method and the whole data set. Methods
            that need no K are not searched for.
        exposure: ``as_is``, or ``aligned``: methods are given the photograph with the mean colour
            of the truth (:func:`evaluation.exposure.align_exposure`).
        save_to: a folder for the 8-bit pictures ``<method>/<scene>_<setting>.png``.

    Returns:
        What :mod:`evaluation.results` describes; its ``command`` is empty. After a search rows have
        the K that was found, and after one per method each has ``range_px``, which is
        K * (largest - smallest disparity).

    Raises:
        ValueError: two methods share a name, no metric, ``save_to`` holds pictures already, a
            photograph whose K nobody knows, a picture that cannot be scored; and what is wrong
            with the data set's files.
    """
    methods = with_identity(methods)
    _check(methods, metrics, K, exposure, save_to)
    range_px: dict[str, float] = {}
    if K == "searched_per_method":
        range_px = _searched_range_px(dataset, methods, exposure)
    rows = _rows(dataset, methods, metrics, K, exposure, range_px, save_to)
    return {
        "kind": "comparison",
        "title": f"{dataset.name}{TITLES[K]}{TITLES[exposure]}",
        "protocol": PROTOCOL.format(strength=STRENGTHS[K], exposure=EXPOSURES[exposure]),
        "command": "",
        "dataset": {
            "name": dataset.name,
            "scenes": list(dataset.scenes),
            "images": len(rows[IDENTITY]),
        },
        "hardware": hardware(next((m.device for m in methods if m.device != "cpu"), "cpu")),
        "metrics": {
            metric.name: {
                "better": metric.better,
                "unit": metric.unit,
                "description": metric.description,
            }
            for metric in metrics
        },
        "methods": {
            method.name: {
                "description": method.description,
                **({"range_px": range_px[method.name]} if method.name in range_px else {}),
                **summary_of_rows(rows[method.name], [metric.name for metric in metrics]),
                "rows": rows[method.name],
            }
            for method in methods
        },
    }


def with_identity(methods: Sequence[Method], given: str = "srgb8") -> list[Method]:
    """The methods, the identity before the others; ``given`` as of :func:`method_by_name`."""
    identity = [method for method in methods if method.name == IDENTITY]
    others = [method for method in methods if method.name != IDENTITY]
    return [*(identity or [method_by_name(IDENTITY, given=given)]), *others]


def _check(
    methods: Sequence[Method],
    metrics: Sequence[Metric],
    K: str,
    exposure: str,
    save_to: str | Path | None,
) -> None:
    names = [method.name for method in methods]
    repeated = [name for i, name in enumerate(names) if name in names[:i]]
    if repeated:
        raise ValueError(
            f"Two methods share the name {repeated[0]}; wanted names of their own, for instance "
            f"--method other_{repeated[0].replace(':', '_')}=WHAT on the command line."
        )
    if not metrics:
        raise ValueError("There is no metric; wanted at least one.")
    for value, name, allowed in ((K, "K", STRENGTHS), (exposure, "exposure", EXPOSURES)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; wanted one of {', '.join(allowed)}.")
    for folder in [] if save_to is None else [Path(save_to) / name for name in names]:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(
                f"{folder} is there already; wanted a new folder to save pictures to, so that none "
                "is replaced."
            )


def _searched_range_px(
    dataset: DataSet, methods: Sequence[Method], exposure: str
) -> dict[str, float]:
    """Of every method that needs K, by name."""
    replay = _Replay(dataset, exposure)
    found = {}
    for method in methods:
        if not method.needs_K:
            continue
        with tqdm(unit="image", desc=f"search for {method.name}", leave=False, disable=None) as bar:

            def photographs(bar: tqdm = bar) -> Iterator[Photograph]:
                for photograph in replay.photographs():
                    yield photograph
                    bar.update()

            with _named(method.name):
                found[method.name] = best_common_range_px(method, photographs)
    return found


class _Replay:
    """Gives the photographs of a data set many times: from memory, if all of them fit there."""

    def __init__(self, dataset: DataSet, exposure: str) -> None:
        self.dataset, self.exposure = dataset, exposure
        self.kept: list[Photograph] | None = None

    def photographs(self) -> Iterator[Photograph]:
        if self.kept is not None:
            yield from self.kept
            return
        kept, free = [], KEPT_SHARE_OF_MEMORY * memory_bytes()
        for photograph in self.dataset.photographs():
            shown = _exposed(photograph, self.exposure)
            # Settings of a scene share arrays, so this is more than they take.
            free -= sum(
                array.nbytes
                for array in (shown.image, shown.disparity, shown.truth, shown.light)
                if array is not None
            )
            if free >= 0:
                kept.append(shown)
            yield shown
        if free >= 0:
            self.kept = kept


def _rows(
    dataset: DataSet,
    methods: Sequence[Method],
    metrics: Sequence[Metric],
    K: str,
    exposure: str,
    range_px: Mapping[str, float],
    save_to: str | Path | None,
) -> dict[str, list[dict[str, Any]]]:
    """The rows of each method by its name."""
    rows: dict[str, list[dict[str, Any]]] = {method.name: [] for method in methods}
    hardest = {method.name: _Hardest() for method in methods}
    with tqdm(
        total=len(dataset) * len(methods), unit="image", desc=dataset.name, leave=False,
        disable=None,
    ) as progress:  # fmt: skip
        for photograph in dataset.photographs():
            shown = _exposed(photograph, exposure)
            for method in methods:
                progress.set_postfix_str(f"{photograph.name} {method.name}")
                with _named(f"{method.name}, {photograph.name}"):
                    asked = _with_K(shown, method, K, range_px)
                    start = time.perf_counter()
                    picture = method.render(asked)
                    seconds = time.perf_counter() - start
                    rounded = quantise_to_8_bit(picture)
                    figures = measure_all(metrics, rounded, photograph)
                row = {
                    "scene": photograph.scene,
                    "setting": photograph.setting,
                    "K": asked.K,
                    "seconds": seconds if method.timed else None,
                    "peak_memory_bytes": None,
                    **photograph.labels,
                    **{name: value for name, value in figures.items() if value is not None},
                }
                rows[method.name].append(row)
                hardest[method.name].consider(asked, row)
                if save_to is not None:
                    _write_png(Path(save_to) / method.name / f"{photograph.name}.png", rounded)
                progress.update()
        for method in methods:
            if method.timed and rows[method.name]:
                progress.set_postfix_str(f"memory of {method.name}")
                hardest[method.name].measure_memory(method)
    return rows


class _Hardest:
    """The largest photograph of a method so far, and of these the most blurred, with its row."""

    def __init__(self) -> None:
        self.size = (0, 0.0)

    def consider(self, photograph: Photograph, row: dict[str, Any]) -> None:
        radius = (photograph.K or 0.0) * largest_defocus(photograph)
        size = (photograph.disparity.size, radius)
        if size > self.size:
            self.size, self.photograph, self.row = size, photograph, row

    def measure_memory(self, method: Method) -> None:
        """In a render of its own, so that seconds are those of warm memory."""
        self.row["peak_memory_bytes"] = peak_bytes_of(
            lambda: method.render(self.photograph), method.device
        )


def _exposed(photograph: Photograph, exposure: str) -> Photograph:
    """The photograph as methods are given it."""
    if exposure == "as_is":
        return photograph
    aligned = align_exposure(photograph.image, photograph.truth)
    return dataclasses.replace(photograph, image=aligned)


def _with_K(
    photograph: Photograph, method: Method, K: str, range_px: Mapping[str, float]
) -> Photograph:
    """The photograph with the K that the method is to use."""
    if K == "given":
        if method.needs_K and photograph.K is None:
            raise ValueError(
                "nobody knows the K of this photograph; wanted --K searched or --K "
                "searched_per_method (K= in Python), by which the best one is looked for."
            )
        return photograph
    found = None
    if method.needs_K and K == "searched":
        found = best_K(method, photograph)
    elif method.needs_K:
        found = range_px[method.name] / disparity_span(photograph)
    return dataclasses.replace(photograph, K=found)


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """A ValueError says where it arose."""
    try:
        yield
    except ValueError as problem:
        raise ValueError(f"{where}: {problem}") from problem


def _write_png(file: Path, rounded: np.ndarray) -> None:
    """Writes a picture of multiples of 1/255."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_or_not_at_all(file, ".png") as unfinished:
        Image.fromarray((rounded * 255).round().astype(np.uint8)).save(unfinished)

"""Results as plots. Every plot says in words what it shows, for those who cannot see it."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.reports.tables import (
    CORRUPTED,
    IDENTITY,
    Results,
    corruption_levels,
    direction,
    methods_in_order,
    shown,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Plot", "plots_of", "svg_of", "write_plot"]

# Okabe and Ito's colours, told apart by all kinds of colour vision, without black (the identity's)
# and yellow, which is hard to see on white. Marks differ as well, for prints without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
IDENTITY_COLOUR = "#000000"
PANELS_IN_A_ROW = 3
DOTS_PER_INCH = 150


@dataclass(frozen=True)
class Plot:
    """A figure and the words for it.

    Attributes:
        name: part of file names.
        title: heading.
        words: what can be seen, in a sentence.
        figure: matplotlib's.
    """

    name: str
    title: str
    words: str
    figure: Figure


def plots_of(results: Results) -> list[Plot]:
    """The plots for results of any kind, the most important first."""
    makers: dict[str, Callable[[Results], list[Plot]]] = {
        "comparison": _comparison_plots,
        "robustness": lambda results: [robustness_plot(results, m) for m in results["metrics"]],
        "ablations": lambda results: [comparison_plot(results)],
        "controllability": lambda results: [control_plot(results)],
    }
    return makers[results["kind"]](results)


def comparison_plot(results: Results) -> Plot:
    """A panel for each metric: a dot at each method's mean, a line over its interval."""
    from matplotlib.figure import Figure

    methods = methods_in_order(results)
    metrics = list(results["metrics"])
    columns = min(PANELS_IN_A_ROW, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = Figure(
        figsize=(2 + 2.6 * columns, rows * (0.9 + 0.28 * len(methods))), layout="constrained"
    )
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for panel in panels[len(metrics) :]:
        panel.set_visible(False)
    for panel, metric in zip(panels, metrics, strict=False):
        for position, name in enumerate(methods):
            about = results["methods"][name]
            mean, interval = about["mean"].get(metric), about.get("interval", {}).get(metric)
            if mean is None:
                continue
            colour, mark = style(methods, name)
            if interval is not None:
                panel.plot(interval, [position] * 2, color=colour, linewidth=1.5)
            panel.plot([mean], [position], mark, color=colour, markersize=6)
        panel.set_xlabel(f"{axis_label(results, metric)}\n{better_words(results, metric)}")
        panel.set_yticks(range(len(methods)), methods)
        panel.set_ylim(len(methods) - 0.5, -0.5)
        panel.grid(axis="x", color="0.9")
        _without_frame(panel)
    return Plot(
        "means",
        "Means and intervals",
        "A dot for the mean of each method, one panel for each metric; the line is the middle 95 % "
        f"when scenes are drawn again. {_best_words(results, metrics)}",
        figure,
    )


def quality_plot(results: Results, metric: str) -> Plot | None:
    """Quality against seconds per image; None where fewer than two methods were timed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    methods = methods_in_order(results)
    timed = {
        name: (about["seconds_per_image"], about["mean"][metric])
        for name in methods
        if (about := results["methods"][name]).get("seconds_per_image")
        and about["mean"].get(metric) is not None
        # Handing back the photograph takes no time worth a place on the axis.
        and name != IDENTITY
    }
    if len(timed) < 2:
        return None
    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    for name, (seconds, mean) in timed.items():
        colour, mark = style(methods, name)
        interval = results["methods"][name].get("interval", {}).get(metric)
        if interval is not None:
            panel.plot([seconds] * 2, interval, color=colour, linewidth=1, alpha=0.6)
        panel.plot([seconds], [mean], mark, color=colour, markersize=7)
        panel.annotate(
            name, (seconds, mean), (6, 4), textcoords="offset points", color=colour, fontsize=9
        )
    panel.set_xscale("log")
    panel.margins(x=0.25)
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlabel("seconds per image (logarithmic), fewer is better")
    panel.set_ylabel(f"{axis_label(results, metric)}, {better_words(results, metric)}")
    panel.grid(color="0.9")
    _without_frame(panel)
    unit = results["metrics"][metric]["unit"]
    points = "; ".join(
        f"{name} {shown(mean, unit)} {unit} in {seconds:.2g} s".replace("  ", " ")
        for name, (seconds, mean) in timed.items()
    )
    return Plot(
        "quality_and_seconds",
        f"{metric} against seconds",
        f"Mean {metric} against seconds per image: {points}.",
        figure,
    )


def robustness_plot(results: Results, metric: str) -> Plot:
    """The drop at each level of each corruption: a line through medians, a band of quartiles."""
    from matplotlib.figure import Figure

    from evaluation.corruptions import CORRUPTIONS

    # The identity looks at no disparity.
    methods = [name for name in methods_in_order(results) if name != IDENTITY]
    by_corruption: dict[str, list[str]] = {}
    for corruption, level in corruption_levels(results):
        by_corruption.setdefault(corruption, []).append(level)
    figure = Figure(figsize=(1 + 3 * len(by_corruption), 3.4), layout="constrained")
    panels = figure.subplots(1, len(by_corruption), squeeze=False, sharey=True)[0]
    for panel, (corruption, levels) in zip(panels, by_corruption.items(), strict=True):
        for name in methods:
            drops = results["methods"][name]["drops"].get(corruption, {})
            known = [level for level in levels if metric in drops.get(level, {})]
            if not known:
                continue
            colour, mark = style(methods, name)
            at = [float(level) for level in known]
            quartiles = {
                which: [drops[level][metric][which] for level in known]
                for which in ("lower_quartile", "median", "upper_quartile")
            }
            panel.fill_between(
                at, quartiles["lower_quartile"], quartiles["upper_quartile"],
                color=colour, alpha=0.18, linewidth=0,
            )  # fmt: skip
            panel.plot(at, quartiles["median"], marker=mark, color=colour, label=name, markersize=5)
        panel.axhline(0, color="0.6", linewidth=0.8)
        panel.set_xlabel(f"level ({CORRUPTIONS[corruption].unit})")
        panel.set_xticks([float(level) for level in levels], levels)
        panel.set_title(f"disparity {CORRUPTED[corruption]}", fontsize=10)
        panel.grid(color="0.9")
        _without_frame(panel)
    panels[0].set_ylabel(f"drop of {axis_label(results, metric)}, less is better")
    panels[0].legend(frameon=False, fontsize=9)
    return Plot(
        f"robustness_{metric}",
        f"{metric} under a corrupted disparity",
        f"Drop of {metric} against the level of each corruption: median as a line, quartiles as a "
        f"band. {_hardest_words(results, metric, by_corruption)}",
        figure,
    )


def control_plot(results: Results) -> Plot:
    """The blur that was measured against the blur that K asks for: a line for each photograph."""
    from matplotlib.figure import Figure

    from evaluation.controllability import K_SHARES

    methods = methods_in_order(results)
    columns = min(PANELS_IN_A_ROW, len(methods))
    rows = math.ceil(len(methods) / columns)
    figure = Figure(figsize=(1 + 3 * columns, 0.4 + 3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for panel in panels[len(methods) :]:
        panel.set_visible(False)
    for panel, name in zip(panels, methods, strict=False):
        colour, mark = style(methods, name)
        for row in results["methods"][name]["rows"]:
            if row.get("blur_by_K") is not None:
                asked = [share * row["radius"] for share in K_SHARES]
                panel.plot(asked, row["blur_by_K"], marker=mark, color=colour, alpha=0.5, ms=4)
        panel.axline((0, 0), slope=1, color="0.5", linewidth=0.8, linestyle="--")
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("radius asked for (px)")
        panel.set_ylabel("radius measured (px)")
        panel.grid(color="0.9")
        _without_frame(panel)
    figures = "; ".join(
        f"{name} correlates by {shown(results['methods'][name].get('K_correlation'), '')}"
        for name in methods
    )
    return Plot(
        "control",
        "Blur against K",
        "The blur radius measured in one part of each photograph against the radius that K asks "
        f"for there, as K grows from 0; dashed where both are the same. {figures}.",
        figure,
    )


def svg_of(plot: Plot) -> bytes:
    """The plot as an SVG file; the same results give the same bytes."""
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": plot.name}):
        plot.figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def write_plot(plot: Plot, file: Path) -> None:
    """Writes a .png, .svg or .pdf file, which appears whole."""
    from bokehdiff.whole_files import whole_or_not_at_all

    with whole_or_not_at_all(file, file.suffix) as unfinished:
        plot.figure.savefig(unfinished, dpi=DOTS_PER_INCH)


def style(methods: Sequence[str], name: str) -> tuple[str, str]:
    """(colour, mark) of a method: the same in all plots of the same results."""
    if name == IDENTITY:
        return IDENTITY_COLOUR, "o"
    place = [other for other in methods if other != IDENTITY].index(name)
    return COLOURS[place % len(COLOURS)], MARKS[place % len(MARKS)]


def axis_label(results: Results, metric: str) -> str:
    """Name and unit."""
    unit = results["metrics"][metric]["unit"]
    return f"{metric} ({unit})" if unit else metric


def better_words(results: Results, metric: str) -> str:
    """Which way is better."""
    return "higher is better" if direction(results, metric) == "↑" else "lower is better"


def _comparison_plots(results: Results) -> list[Plot]:
    against_time = quality_plot(results, next(iter(results["metrics"])))
    return [comparison_plot(results), *([] if against_time is None else [against_time])]


def _best_words(results: Results, metrics: Sequence[str]) -> str:
    sentences = []
    for metric in metrics:
        about = results["metrics"][metric]
        means = {
            name: method["mean"][metric]
            for name, method in results["methods"].items()
            if method["mean"].get(metric) is not None
        }
        if means:
            best = (max if about["better"] == "higher" else min)(means, key=means.__getitem__)
            figure = f"{shown(means[best], about['unit'])} {about['unit']}".strip()
            sentences.append(f"Best {metric}: {best}, {figure}.")
    return " ".join(sentences)


def _hardest_words(results: Results, metric: str, by_corruption: dict[str, list[str]]) -> str:
    unit = results["metrics"][metric]["unit"]
    sentences = []
    for corruption, levels in by_corruption.items():
        # Fewer bits are harder, more pixels of the others.
        hardest = levels[0] if corruption == "quantise" else levels[-1]
        drops = {
            name: about["drops"][corruption][hardest][metric]["median"]
            for name, about in results["methods"].items()
            if metric in about["drops"].get(corruption, {}).get(hardest, {}) and name != IDENTITY
        }
        figures = ", ".join(f"{n} {shown(d, unit)} {unit}".strip() for n, d in drops.items())
        sentences.append(f"At {corruption} {hardest}: {figures}.")
    return " ".join(sentences)


def _without_frame(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_axisbelow(True)

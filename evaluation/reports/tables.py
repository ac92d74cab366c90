"""Results as tables, in Markdown and for the page, and as a short JSON summary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Cell",
    "Table",
    "as_document",
    "as_markdown",
    "descriptions",
    "direction",
    "hardware_words",
    "marked_cells",
    "methods_in_order",
    "shown",
    "summary",
    "tables_of",
]

Results = dict[str, Any]
"""What ``evaluation.results`` reads and writes."""

MISSING = "-"
IDENTITY = "identity"
CORRUPTED = {
    "erode": "eroded",
    "dilate": "dilated",
    "blur": "blurred",
    "quantise": "quantised",
}
"""What a disparity is after each corruption."""


@dataclass(frozen=True)
class Cell:
    """One cell: what it says, and whether it is the best of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    Attributes:
        caption: a sentence that says what the cells are.
        headings: of all columns, that of the row names first.
        rows: as many cells as headings each.
    """

    caption: str
    headings: list[str]
    rows: list[list[Cell]]


def tables_of(results: Results) -> list[Table]:
    """The tables for results of any kind, the most important first.

    Raises:
        ValueError: a kind of results that has no table.
    """
    makers: dict[str, Callable[[Results], list[Table]]] = {
        "comparison": comparison_tables,
        "robustness": robustness_tables,
        "ablations": lambda results: [ablation_table(results)],
        "controllability": lambda results: [controllability_table(results)],
    }
    kind = results.get("kind")
    if kind not in makers:
        raise ValueError(
            f"There is no table for results of kind {kind!r}; wanted {', '.join(makers)}."
        )
    return makers[kind](results)


def comparison_tables(results: Results) -> list[Table]:
    """The means, and the differences from one method where the results hold them."""
    if "against" not in results:
        return [comparison_table(results)]
    return [comparison_table(results), differences_table(results)]


def comparison_table(results: Results, metrics: Sequence[str] | None = None) -> Table:
    """One row for each method: the mean of each metric with its interval, seconds and memory.

    ``metrics``: only these, in this order; default all. Ties as printed are all the best.
    """
    chosen = list(results["metrics"]) if metrics is None else list(metrics)
    methods = methods_in_order(results)
    columns = [_metric_column(results, methods, metric) for metric in chosen]
    headings = [_metric_heading(results, metric) for metric in chosen]
    timed = [results["methods"][name].get("seconds_per_image") for name in methods]
    if any(seconds is not None for seconds in timed):
        headings.append("s per image ↓")
        columns.append([Cell(MISSING if value is None else f"{value:.3g}") for value in timed])
    peaks = [results["methods"][name].get("peak_memory_bytes") for name in methods]
    if any(peak is not None for peak in peaks):
        headings.append("peak memory, GB ↓")
        columns.append([Cell(MISSING if peak is None else f"{peak / 1e9:.2f}") for peak in peaks])
    return Table(
        f"Means over {_images(results)}; in parentheses the middle 95 % when scenes are drawn "
        "again. Bold: the best of a column.",
        ["", *headings],
        [[Cell(name), *cells] for name, *cells in zip(methods, *columns, strict=True)],
    )


def differences_table(results: Results) -> Table:
    """One row for each method: by how much it differs from ``results["against"]``."""
    against, metrics = results["against"], results["metrics"]
    rows = []
    for name in methods_in_order(results):
        if name == against:
            continue
        cells = [Cell(name)]
        for metric, about in metrics.items():
            found = results["methods"][name]["difference"].get(metric)
            cells.append(_difference_cell(found, about["unit"]))
        rows.append(cells)
    return Table(
        f"Difference from {against}, image by image; in parentheses the middle 95 % when scenes "
        "are drawn again. Where that does not hold 0 the difference is more than the choice of "
        "scenes.",
        ["", *(_metric_heading(results, metric) for metric in metrics)],
        rows,
    )


def robustness_tables(results: Results) -> list[Table]:
    """A table for each metric: by how much it drops at every level of every corruption.

    Bold is the smallest drop of a column among the methods that blur.
    """
    return [_robustness_table(results, metric) for metric in results["metrics"]]


def _robustness_table(results: Results, metric: str) -> Table:
    from evaluation.corruptions import CORRUPTIONS

    methods = methods_in_order(results)
    unit = results["metrics"][metric]["unit"]
    headings, columns = [], []
    for corruption, level in corruption_levels(results):
        drops = [_drop(results["methods"][name], corruption, level, metric) for name in methods]
        texts = [
            MISSING
            if drop is None
            else f"{shown(drop['median'], unit)} ({shown(drop['lower_quartile'], unit)} to "
            f"{shown(drop['upper_quartile'], unit)})"
            for drop in drops
        ]
        medians = [
            None if drop is None or name == IDENTITY else drop["median"]
            for name, drop in zip(methods, drops, strict=True)
        ]
        headings.append(f"{CORRUPTED[corruption]} {level} {CORRUPTIONS[corruption].unit} ↓")
        columns.append(marked_cells(texts, medians, unit, "lower"))
    return Table(
        f"Drop of {_metric_words(results, metric)} when the disparity is corrupted, over "
        f"{_images(results)}: median (quartiles). Less is better.",
        ["", *headings],
        [[Cell(name), *cells] for name, *cells in zip(methods, *columns, strict=True)],
    )


def ablation_table(results: Results) -> Table:
    """One row for each variant: the mean of each metric, and the change from the full method."""
    variants = list(results["methods"])
    headings, columns = [], []
    for metric, about in results["metrics"].items():
        headings += [_metric_heading(results, metric), "change"]
        columns.append(_metric_column(results, variants, metric, intervals=False))
        columns.append([_change_cell(results["methods"][name], metric, about) for name in variants])
    return Table(
        f"Means over {_images(results)}, and what changes when a part is taken away; in "
        "parentheses the middle 95 % of that when scenes are drawn again. Bold: the best of a "
        "column.",
        ["", *headings],
        [[Cell(name), *cells] for name, *cells in zip(variants, *columns, strict=True)],
    )


def controllability_table(results: Results) -> Table:
    """One row for each method: whether blur grows with K, and whether focus follows df."""
    figures = ("K_correlation", "K_correlation_minimum", "focus_follows")
    rows = []
    for name in methods_in_order(results):
        values = [results["methods"][name].get(figure) for figure in figures]
        # A correlation of 0.999 and one of 0.9999 are far apart.
        rows.append([Cell(name), *(Cell(MISSING if v is None else f"{v:.4f}") for v in values)])
    return Table(
        f"Control, over {_images(results)}: the correlation of K with the measured blur, as a mean "
        "and in the photograph where it is least, and the share of scenes in which the plane at df "
        "is the sharpest.",
        ["", "correlation of K with blur ↑", "least ↑", "focus follows df ↑"],
        rows,
    )


def as_markdown(table: Table) -> str:
    """The table in Markdown, the best cells bold; without its caption."""
    lines = [_markdown_row(table.headings), _markdown_row(["---"] * len(table.headings))]
    for row in table.rows:
        lines.append(
            _markdown_row(f"**{escaped(c.text)}**" if c.best else escaped(c.text) for c in row)
        )
    return "\n".join(lines)


def as_document(results: Results) -> str:
    """A Markdown document: title, tables, protocol, metrics, methods, command and hardware."""
    parts = [f"# {escaped(results['title'])}"]
    for table in tables_of(results):
        parts += [escaped(table.caption), as_markdown(table)]
    parts.append(escaped(results["protocol"]))
    parts.append(
        "\n".join(f"- {escaped(name)}: {escaped(text)}" for name, text in descriptions(results))
    )
    parts.append(f"`{results['command']}`")
    parts.append(escaped(hardware_words(results)))
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(results: Results) -> dict[str, Any]:
    """The results without the rows of single photographs."""
    methods = {
        name: {key: value for key, value in about.items() if key != "rows"}
        for name, about in results["methods"].items()
    }
    return {**results, "methods": methods}


def descriptions(results: Results) -> list[tuple[str, str]]:
    """(name, what it is) of every metric and every method that says so."""
    described = [*results["metrics"].items(), *results["methods"].items()]
    return [(name, about["description"]) for name, about in described if "description" in about]


def methods_in_order(results: Results) -> list[str]:
    """Names of the methods, the identity first, the others as they were given."""
    return sorted(results["methods"], key=lambda name: name != IDENTITY)


def corruption_levels(results: Results) -> list[tuple[str, str]]:
    """(corruption, level) of robustness results, levels ascending; levels are JSON's strings."""
    found: dict[str, set[str]] = {}
    for about in results["methods"].values():
        for corruption, levels in about["drops"].items():
            found.setdefault(corruption, set()).update(map(str, levels))
    return [(name, level) for name in found for level in sorted(found[name], key=float)]


def direction(results: Results, metric: str) -> str:
    """↑ where a higher figure is better, else ↓."""
    return "↑" if results["metrics"][metric]["better"] == "higher" else "↓"


def shown(value: float | None, unit: str) -> str:
    """A figure as tables print it: two decimals with a unit, three without (SSIM, LPIPS, ...)."""
    return MISSING if value is None else _without_signed_zero(f"{value:.{2 if unit else 3}f}")


def signed(value: float | None, unit: str) -> str:
    """:func:`shown` with its sign; what prints as zero has none."""
    return MISSING if value is None else _without_signed_zero(f"{value:+.{2 if unit else 3}f}")


def _without_signed_zero(text: str) -> str:
    return text if float(text) else text.lstrip("+-")


def marked_cells(
    texts: Sequence[str], values: Sequence[float | None], unit: str, better: str
) -> list[Cell]:
    """Cells in which those that print the best value are marked; none where all are the same.

    ``texts`` and ``values`` of one column; ``better``: "higher" or "lower".
    """
    printed = [None if value is None else float(shown(value, unit)) for value in values]
    known = [value for value in printed if value is not None]
    if len(set(known)) < 2:
        return [Cell(text) for text in texts]
    best = max(known) if better == "higher" else min(known)
    return [Cell(text, value == best) for text, value in zip(texts, printed, strict=True)]


def hardware_words(results: Results) -> str:
    """What the seconds were measured on."""
    machine = results.get("hardware") or {}
    words = [
        str(machine.get("gpu", machine.get("processor", ""))),
        f"{machine['torch_threads']} thread(s)" if "torch_threads" in machine else "",
        str(machine.get("dtype", "")),
        f"torch {machine['torch']}" if "torch" in machine else "",
    ]
    return ", ".join(word for word in words if word)


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, also inside a table."""
    flat = " ".join(str(text).split())
    return flat.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _metric_column(
    results: Results, methods: Sequence[str], metric: str, intervals: bool = True
) -> list[Cell]:
    about = results["metrics"][metric]
    unit = about["unit"]
    means = [results["methods"][name]["mean"].get(metric) for name in methods]
    texts = []
    for name, mean in zip(methods, means, strict=True):
        interval = results["methods"][name].get("interval", {}).get(metric)
        text = shown(mean, unit)
        if intervals and mean is not None and interval is not None:
            text += f" ({shown(interval[0], unit)} to {shown(interval[1], unit)})"
        texts.append(text)
    return marked_cells(texts, means, unit, about["better"])


def _change_cell(variant: dict[str, Any], metric: str, about: dict[str, Any]) -> Cell:
    """The difference with its interval where the results hold it, else the change."""
    difference = variant.get("difference", {}).get(metric)
    if difference is not None:
        return _difference_cell(difference, about["unit"])
    return Cell(signed(variant.get("change", {}).get(metric), about["unit"]))


def _difference_cell(difference: dict[str, Any] | None, unit: str) -> Cell:
    if difference is None:
        return Cell(MISSING)
    text, interval = signed(difference["mean"], unit), difference["interval"]
    if interval is not None:
        text += f" ({signed(interval[0], unit)} to {signed(interval[1], unit)})"
    return Cell(text)


def _drop(
    about: dict[str, Any], corruption: str, level: str, metric: str
) -> dict[str, float] | None:
    levels = {str(key): value for key, value in about["drops"].get(corruption, {}).items()}
    return levels.get(level, {}).get(metric)


def _metric_heading(results: Results, metric: str) -> str:
    return f"{_metric_words(results, metric)} {direction(results, metric)}"


def _metric_words(results: Results, metric: str) -> str:
    unit = results["metrics"][metric]["unit"]
    return f"{metric}, {unit}" if unit else metric


def _images(results: Results) -> str:
    dataset = results["dataset"]
    scenes = len(dataset["scenes"])
    return f"{dataset['images']} images of {scenes} scene{'' if scenes == 1 else 's'}"


def _markdown_row(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"

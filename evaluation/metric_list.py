"""``python -m evaluation metrics``: what the metrics are called, and what each of them fixes."""

from __future__ import annotations

import argparse
import textwrap

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(arguments: argparse.Namespace) -> int:
    """Prints the table of metrics: name, which direction is better, unit, description."""
    print(table())
    return 0


def table() -> str:
    """One paragraph for each metric."""
    from evaluation.metrics import METRICS

    width = max(map(len, METRICS))
    lines = [f"{'metric':<{width}}  better  unit  what it is"]
    for name, recipe in METRICS.items():
        start = f"{name:<{width}}  {recipe.better:<6}  {recipe.unit or '-':<4}  "
        lines.append(
            textwrap.fill(
                recipe.description,
                width=110,
                initial_indent=start,
                subsequent_indent=" " * len(start),
                break_on_hyphens=False,
            )
        )
    return "\n".join(lines)

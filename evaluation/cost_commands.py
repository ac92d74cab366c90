"""``python -m evaluation cost``: parameters, arithmetic, seconds and memory of whole networks."""

from __future__ import annotations

import argparse
import importlib

__all__ = ["add_arguments", "run"]

EXAMPLES = """examples:
  python -m evaluation cost bokeh-stack
  python -m evaluation cost dsfa --encoder vitl --size 518x518
  python -m evaluation cost dsfa --device cuda --dtype bfloat16 --out dsfa.json
"""

SUBJECTS = {
    "bokeh-stack": ("evaluation.bokeh_stack_cost", "a bokeh stack by FLUX.1-Kontext"),
    "dsfa": ("evaluation.dsfa_cost", "Depth Anything V2 with a bokeh stack"),
}
"""Modules with ``add_arguments`` and ``run``, and what they count."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``cost``, one parser for each subject."""
    parser.epilog = EXAMPLES
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    for name, (module, what) in SUBJECTS.items():
        own = subjects.add_parser(
            name,
            help=what,
            description="Count parameters and operations on torch's meta device, and with "
            f"--device measure random weights: {what}.",
            epilog=EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        importlib.import_module(module).add_arguments(own)


def run(arguments: argparse.Namespace) -> int:
    """Counts what was asked for; returns the exit status."""
    status: int = importlib.import_module(SUBJECTS[arguments.subject][0]).run(arguments)
    return status

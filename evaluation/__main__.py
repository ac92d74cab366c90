"""Command line of the evaluation room: ``python -m evaluation PROTOCOL ...``."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = """examples:
  python -m evaluation compare raytraced DATA --method tiny --method scatter --out results.json
  python -m evaluation compare ebb FOLDER --method scatter --K searched --exposure aligned
  python -m evaluation compare triples FOLDER --method mine.py:blur --predictions theirs=pictures
  python -m evaluation raytraced DATA --method tiny --out tiny.json
  python -m evaluation robustness raytraced DATA --method tiny --method scatter --out drops.json
  python -m evaluation report results.json drops.json
  python -m evaluation sweep raytraced DATA --pictures FOLDER
  python -m evaluation flow-quality raytraced DATA --model FOLDER
  python -m evaluation flicker --model FOLDER
  python -m evaluation compact-quality SCENES --model mine=FOLDER
  python -m evaluation speed render --megapixels 1
  python -m evaluation speed compact --variant tiny --mean-opinion-score 6.5
  python -m evaluation cost dsfa

PROTOCOL --help says more about each.
"""


@dataclass(frozen=True)
class Protocol:
    """A command: the module that has its ``add_arguments(parser)`` and ``run(arguments)``."""

    module: str
    help: str
    packages: tuple[str, ...] = ("scipy.ndimage", "skimage")


PROTOCOLS = {
    "compare": Protocol("evaluation.compare_command", "methods side by side on a data set"),
    "raytraced": Protocol(
        "evaluation.raytraced", "3D scenes ray-traced with a thin lens (PSNR in dB, SSIM)"
    ),
    "robustness": Protocol("evaluation.robustness", "what a wrong disparity costs each method"),
    "ablations": Protocol("evaluation.ablations", "what each part of a model is worth"),
    "controllability": Protocol(
        "evaluation.controllability", "whether blur follows K, and focus follows df"
    ),
    "report": Protocol(
        "evaluation.reports.command",
        "a page of results, or the documented numbers checked",
        (),
    ),
    "metrics": Protocol("evaluation.metric_list", "what the metrics are and what each fixes", ()),
    "verify": Protocol("evaluation.datasets.verify", "whether a data set is whole", ()),
    "sweep": Protocol("evaluation.sweep", "inverse depth regressed from real bokeh stacks"),
    "dsfa": Protocol("evaluation.dsfa_helps", "what a bokeh stack is worth to a depth network"),
    "flow-quality": Protocol(
        "evaluation.flow_quality", "BokehFlow beside its own physics and classical renderers"
    ),
    "flicker": Protocol(
        "evaluation.flicker",
        "whether films through BokehFlow flicker, or lag behind",
        ("scipy.ndimage",),
    ),
    "compact-quality": Protocol(
        "evaluation.compact_quality", "LiteBokeh: subject and background, with its enhancement", ()
    ),
    "speed": Protocol("evaluation.speed_commands", "seconds and memory", ()),
    "cost": Protocol("evaluation.cost_commands", "parameters and arithmetic of networks", ()),
}


def parser(protocol: str | None = None) -> argparse.ArgumentParser:
    """The command line's arguments; those of one protocol only, if it is named."""
    whole = argparse.ArgumentParser(
        prog="python -m evaluation",
        description="Measure lens blur against a truth.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    protocols = whole.add_subparsers(dest="protocol", required=True, metavar="PROTOCOL")
    for name, known in PROTOCOLS.items():
        own = protocols.add_parser(
            name,
            help=known.help,
            description=f"{known.help[0].upper()}{known.help[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        # The modules of the others, and torch with some of them, need not be imported.
        if protocol in (name, None):
            importlib.import_module(known.module).add_arguments(own)
    return whole


def check_before_work(arguments: argparse.Namespace) -> None:
    """Raises ValueError for what would fail only after minutes of work, in any protocol."""
    packages: Sequence[str] = PROTOCOLS[arguments.protocol].packages
    if arguments.protocol == "speed":
        from evaluation import speed_commands

        packages = speed_commands.packages(arguments)
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as missing:
            raise ValueError(
                f"{missing.name} is not installed; the evaluation needs "
                "pip install 'bokehdiff[data]'."
            ) from missing
    # The report makes its folder.
    for option in ("out", "plot") if arguments.protocol != "report" else ():
        file = getattr(arguments, option, None)
        if file and not Path(file).resolve().parent.is_dir():
            raise ValueError(f"There is no folder {Path(file).parent} for --{option}.")
    if hasattr(arguments, "device"):
        from evaluation import methods

        methods.check_device(arguments.device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status (2 for a mistake of the caller)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    named = arguments[0] if arguments else ""
    parsed = parser(named).parse_args(arguments)
    parsed.command_line = f"python -m evaluation {shlex.join(arguments)}"
    try:
        check_before_work(parsed)
        return importlib.import_module(PROTOCOLS[parsed.protocol].module).run(parsed)
    except (ValueError, FileNotFoundError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

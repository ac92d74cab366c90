"""The README of a training result, filled with the numbers of the run."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData

from training.settings import Schedule


@dataclass
class RunReport:
    """What a run did and reached, whatever it trained.

    Attributes:
        args: its settings, of which those of `training.run_settings` and ``command`` are read.
        step: optimiser steps done.
        seconds: wall-clock time they took, with validation and checkpoints.
        processes: number of processes that trained together.
        device: where they computed.
        precision: "float32", "fp16" or "bf16".
        trained_parameters: number of values trained.
        scores: those at the end, by name; empty if the run was not validated.
        samples_per_second: of all processes together; None if the log does not say.
        log: the entries of ``log.jsonl``.
        pictures: path of the last validation's pictures in the output folder, if there are any.
    """

    args: argparse.Namespace
    step: int
    seconds: float
    processes: int
    device: torch.device
    precision: str
    trained_parameters: int
    scores: Mapping[str, Any]
    samples_per_second: float | None
    log: Sequence[Mapping[str, Any]]
    pictures: str | None


@dataclass
class CardText:
    """What only the task that was trained can say about its model.

    Attributes:
        title: the model's name.
        summary: what it is, in a paragraph.
        usage: Python code that loads and calls it.
        training_rows: data, losses and where it started from, as (name, value).
        scores_section: its scores, with the protocol in words.
        intended_use: what it is made for, and what not.
        limits: what it cannot do.
        tags: for the Hub's search.
        pipeline_tag: the Hub's name of the task.
        base_model: name on the Hub of the model that was trained further, if there was one.
        license: identifier of the weights' licence; None if it is not for us to say.
    """

    title: str
    summary: str
    usage: str
    training_rows: list[tuple[str, str]]
    scores_section: str
    intended_use: str
    limits: str
    tags: list[str]
    pipeline_tag: str
    base_model: str | None
    license: str | None


def model_card(report: RunReport, text: CardText) -> ModelCard:
    """Return the card: what was trained, for how long, on what, how, and how good it is.

    Nothing is read from the Hub. (The template of diffusers has gaps for people to fill; here the
    run and the task know what belongs there.)
    """
    data = ModelCardData(
        license=text.license, base_model=text.base_model, pipeline_tag=text.pipeline_tag
    )
    picture = ""
    if report.pictures is not None:
        picture = f"\n\n![Held-out samples at the end of training]({report.pictures})"
    body = f"""# {text.title}

{text.summary}

```python
{text.usage}
```

## Intended use

{text.intended_use}

## Limits

{text.limits}

## Training

{_table(("", ""), [*text.training_rows, *_run_rows(report)])}

The command, with all settings in `training_config.yaml` and the course of the run in `log.jsonl`:

```
{report.args.command}
```

## Validation

{text.scores_section}{picture}
"""
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")
    return populate_model_card(card, tags=text.tags)


def _run_rows(report: RunReport) -> list[tuple[str, str]]:
    """What the loop did, as (name, value)."""
    args = report.args
    optimizer = {"adamw": "AdamW", "adamw_8bit": "AdamW with moments in 8 bits"}[args.optimizer]
    optimizer += f", learning rate {args.learning_rate:g}, {args.warmup_steps} steps of warm-up"
    optimizer += f", {args.learning_rate_schedule} to step {args.max_train_steps}"
    if args.ema_decay:
        optimizer += f", weights averaged by {args.ema_decay:g}"
    samples = args.batch_size * args.gradient_accumulation_steps * report.processes
    rows = [
        ("optimiser", optimizer),
        ("samples per step", f"{samples}"),
        ("optimiser steps", f"{report.step}"),
        ("hours", f"{report.seconds / 3600:.2f}"),
        ("hardware", hardware(report.processes, report.device)),
        ("precision", report.precision),
        ("trained parameters", f"{report.trained_parameters:,}"),
        ("seed", f"{args.seed}"),
        ("versions", versions("bokehdiff", "torch", "diffusers", "accelerate")),
    ]
    if report.samples_per_second is not None:
        rows.insert(4, ("samples per second", f"{report.samples_per_second:.3g}"))
    # A run that goes on unchanged is the run that was not interrupted.
    for entry in report.log:
        if changes := entry.get("changed_settings"):
            what = ", ".join(
                f"{name} {new} instead of {old}" for name, (old, new) in changes.items()
            )
            rows.append((f"after step {entry['step']}", what))
    return rows


def validation_table(scores: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> str:
    """Return the scores beside those of the photograph as it is and of the network at the start.

    Below the table it says how well the blur follows K.

    Args:
        scores: what `training.validation.validate` returned at the end.
        log: the entries of ``log.jsonl``.
    """
    identity = {
        name.removesuffix("_identity"): value
        for name, value in scores.items()
        if name.endswith("_identity")
    }
    rows = [
        ("photograph left as it is", identity),
        *[
            ("before training", entry)
            for entry in log
            if entry["kind"] == "validation" and entry["step"] == 0
        ],
        ("after training", scores),
    ]
    columns = [column for column in _COLUMNS if any(column.name in row for _, row in rows)]
    table = _table(
        ("", *(column.title for column in columns)),
        [
            (label, *(f"{row[c.name]:.{c.digits}f}" if c.name in row else "" for c in columns))
            for label, row in rows
        ],
    )
    if "control" not in scores:
        return table
    return f"""{table}

Control: the blurred region loses contrast each time K grows, from 0 by quarters to all of the
scene's K, in {scores["control"]:.0%} of the scenes. The rank correlation between K and blur is
{scores["control_correlation"]:.3f}, where 1 says that more K always gives more blur."""


@dataclass(frozen=True)
class _Column:
    name: str
    title: str
    digits: int


_COLUMNS = (
    _Column("psnr", "PSNR", 2),
    _Column("psnr_blurred", "PSNR, blurred", 2),
    _Column("psnr_in_focus", "PSNR, in focus", 2),
    _Column("ssim", "SSIM", 4),
    _Column("lpips", "LPIPS", 4),
)


def weighted_sum(*terms: tuple[Schedule, str]) -> str:
    """Return losses with their weights, without those that never count."""
    return " + ".join(
        f"({weight}) x {name}" if len(weight.points) > 1 else f"{weight} x {name}"
        for weight, name in terms
        if not weight.is_zero
    )


def scores_table(
    columns: Mapping[str, tuple[str, int]],
    rows: Sequence[tuple[str, Mapping[str, Any], str]],
    shown: Mapping[str, Any],
) -> list[str]:
    """Return the lines of a table in Markdown.

    Args:
        columns: title and digits of each score by its name.
        rows: label, scores, and what is added to the names of the scores in this row.
        shown: scores by name; columns of others are left out.
    """
    names = [name for name in columns if name in shown]
    lines = [
        f"| | {' | '.join(columns[name][0] for name in names)} |",
        f"| {' | '.join(['---'] * (len(names) + 1))} |",
    ]
    for label, values, suffix in rows:
        cells = [
            f"{values[name + suffix]:.{columns[name][1]}f}" if name + suffix in values else ""
            for name in names
        ]
        lines.append(f"| {' | '.join([label, *cells])} |")
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown of a table."""
    lines = [
        head,
        ["---"] * len(head),
        *([cell.replace("|", r"\|") for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def hardware(processes: int, device: torch.device) -> str:
    """Return devices or processors in words."""
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    processor = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        models = [
            line.split(":", 1)[1].strip()
            for line in cpu_info.read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        processor = models[0] if models else processor
    return f"{processes} x {torch.get_num_threads()} threads of {processor}"


def versions(*packages: str) -> str:
    """Return "name version" of each installed package, comma separated."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)

"""The README of a training result, filled with the numbers of the run."""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from training.validation import BLURRED_RADIUS, IN_FOCUS_RADIUS


@dataclass
class RunReport:
    """What a run did and reached.

    Attributes:
        args: its settings.
        step: optimiser steps done.
        seconds: wall-clock time they took, with validation and checkpoints.
        processes: number of processes that trained together.
        device: where they computed.
        precision: "float32", "fp16" or "bf16".
        trained_parameters: number of values trained.
        scores: what `training.validation.validate` returned at the end; empty if not validated.
    """

    args: argparse.Namespace
    step: int
    seconds: float
    processes: int
    device: torch.device
    precision: str
    trained_parameters: int
    scores: dict[str, Any]


def model_card(report: RunReport) -> str:
    """Return the card: what was trained, for how long, on what, how, and how good it is."""
    args = report.args
    lora = args.mode == "lora"
    loading = 'pipe = BokehDiffPipeline.from_pretrained("PATH_TO_THIS_FOLDER")'
    if lora:
        loading = (
            f'pipe = BokehDiffPipeline.from_pretrained("{args.pretrained}")\n'
            'pipe.load_lora_weights("PATH_TO_THIS_FOLDER")'
        )
    data = f"procedural scenes, {args.data_size} x {args.data_size} pixels, seed {args.data_seed}"
    if args.data_shards is not None:
        data = f"the shards in `{args.data_shards}`"
    start = f"`{args.pretrained}`" if args.pretrained else "nothing (the physics it starts at)"
    loss = f"{args.loss_reconstruction_weight:g} x {args.loss_reconstruction}"
    if args.loss_edge_weight:
        loss += f" + {args.loss_edge_weight:g} x multi-scale edge ({args.loss_edge_variant})"
    schedule = f"{args.warmup_steps} steps of warm-up, cosine to step {args.max_train_steps}"
    if args.ema_decay:
        schedule += f", weights averaged by {args.ema_decay:g}"
    samples = args.batch_size * args.gradient_accumulation_steps * report.processes
    front_matter = "library_name: diffusers\nlicense: apache-2.0\n"
    front_matter += f"base_model: {args.pretrained}\n" if lora else ""
    front_matter += f"tags: [bokehdiff, bokeh, lens-blur, image-to-image{', lora' if lora else ''}]"
    return f"""---
{front_matter}
---

# BokehDiff{", low-rank adapters" if lora else ""}

Lens blur for photographs with a disparity map, in one step of the network at T = 499.

```python
from bokehdiff import BokehDiffPipeline

{loading}
image = pipe(photo, disparity, df=0.7, K=20.0).images[0]
```

## Training

| | |
|---|---|
| started from | {start} |
| optimiser steps | {report.step} |
| hours | {report.seconds / 3600:.2f} |
| hardware | {hardware(report)} |
| trained parameters | {report.trained_parameters:,} |
| data | {data} |
| samples per step | {samples}, crops of {args.data_crop_size} pixels, mirrored and turned |
| loss | {loss}, on sRGB in [-1, 1] |
| optimiser | AdamW, learning rate {args.learning_rate:g}, {schedule} |
| precision | {report.precision} |
| versions | {versions("bokehdiff", "torch", "diffusers", "accelerate")} |

The command, with all settings in `training_config.yaml` and the course of the run in `log.jsonl`:

```
{args.command}
```

## Validation

{validation_section(report)}
"""


def validation_section(report: RunReport) -> str:
    """Return the scores beside those of the photograph as it is and of the untrained network."""
    args, scores = report.args, report.scores
    if not scores:
        return "This run was not validated."
    log = (Path(args.output_dir) / "log.jsonl").read_text(encoding="utf-8")
    validations = [entry for entry in map(json.loads, log.splitlines()) if "psnr" in entry]
    identity = {
        "psnr": scores["psnr_identity"],
        "psnr_blurred": scores.get("psnr_blurred_identity"),
    }
    rows = [
        ("photograph left as it is", identity),
        *[("before training", entry) for entry in validations if entry["step"] == 0][:1],
        ("after training", scores),
    ]
    table = "\n".join(
        f"| {label} | {' | '.join(_decibels(row.get(name)) for name in _COLUMNS)} |"
        for label, row in rows
    )
    held_out = args.validation_shards or f"procedural, seed {args.validation_seed}"
    return f"""PSNR in dB on display-encoded sRGB, mean over {scores["scenes"]} held-out scenes
({held_out}), without {args.loss_border} pixels at the border. Blurred: circles of confusion of a
radius above {BLURRED_RADIUS:g} pixels; in focus: below {IN_FOCUS_RADIUS:g} pixels.

| | all | blurred | in focus |
|---|---|---|---|
{table}

Control: the blurred region loses contrast each time K grows, from 0 to half to all of the scene's
K, in {scores.get("control", 0):.0%} of the scenes."""


_COLUMNS = ("psnr", "psnr_blurred", "psnr_in_focus")


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def hardware(report: RunReport) -> str:
    """Return devices or processors in words."""
    if report.device.type == "cuda":
        return f"{report.processes} x {torch.cuda.get_device_name(report.device)}"
    processor = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        models = [
            line.split(":", 1)[1].strip()
            for line in cpu_info.read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        processor = models[0] if models else processor
    return f"{report.processes} x {torch.get_num_threads()} threads of {processor}"


def versions(*packages: str) -> str:
    """Return "name version" of each installed package, comma separated."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)

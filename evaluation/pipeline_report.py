"""What ``speed pipeline`` is asked for, checked, measured and put into words."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from bokehdiff import BokehDiffPipeline
from evaluation import pipeline_flops, pipeline_scale, pipeline_speed
from evaluation.pisa_speed import check_device, numbers

OPTIONS = {
    "flops": {"size", "shapes", "radius"},
    "refocus": {"size", "shapes", "radius", "dtype", "repeats"},
    "megapixels": {"model", "radius", "radius_scales", "tiling", "dtype"},
    "stages": {"size", "shapes", "radius", "compile", "dtype", "repeats"},
}
"""The options that mean something in each mode, besides threads, device and file."""

SMALLEST_SIDE = 64


@dataclass(frozen=True)
class Measured:
    """A finished measurement.

    Attributes:
        mode: name in `OPTIONS`.
        dtype: of weights and activations.
        rows: of the table, as plain values.
        table: for people.
        protocol: what the figures mean and how they were measured.
        left_out: what could not be measured, and why.
    """

    mode: str
    dtype: str
    rows: list[dict[str, Any]]
    table: str
    protocol: str
    left_out: dict[str, str] = field(default_factory=dict)


def mode_of(arguments: argparse.Namespace) -> str:
    """What is asked for: a name in `OPTIONS`."""
    for mode in ("flops", "refocus", "megapixels"):
        if getattr(arguments, mode):
            return mode
    return "stages"


def sizes_of(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Height and width of each "WIDTHxHEIGHT".

    Raises:
        ValueError: another spelling, or a side under `SMALLEST_SIDE`.
    """
    sizes = []
    for text in texts:
        found = re.fullmatch(r"(\d+)x(\d+)", text)
        if not found or min(int(found[1]), int(found[2])) < SMALLEST_SIDE:
            raise ValueError(
                f"--size takes WIDTHxHEIGHT in pixels, each at least {SMALLEST_SIDE}, e.g. "
                f"1536x1024, got {text!r}."
            )
        sizes.append((int(found[2]), int(found[1])))
    return sizes


def check(arguments: argparse.Namespace, mode: str) -> None:
    """Raises ValueError for options that mean nothing in this mode, and numbers out of range."""
    for option in sorted(set().union(*OPTIONS.values()) - OPTIONS[mode]):
        if getattr(arguments, option) not in (None, False):
            flag = "without a mode" if mode == "stages" else f"with --{mode}"
            raise ValueError(f"--{option.replace('_', '-')} means nothing {flag}; leave it out.")
    for option in ("repeats", "threads"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option} must be at least 1, got {value}.")
    if not 0 < arguments.radius < math.inf:
        raise ValueError(f"--radius must be positive, got {arguments.radius:g}.")
    check_device(arguments.device)
    if mode == "flops" and arguments.device != "cpu":
        raise ValueError("--flops computes nothing and takes no --device; leave it out.")


def measure(arguments: argparse.Namespace) -> Measured:
    """What the arguments of ``speed pipeline`` ask for.

    Raises:
        ValueError: arguments that cannot be meant, before any work.
    """
    mode = mode_of(arguments)
    check(arguments, mode)
    torch.set_num_threads(arguments.threads)
    dtype, device = arguments.dtype or "float32", arguments.device
    radius, repeats = arguments.radius, arguments.repeats or 10
    if mode == "megapixels":
        return _megapixels(arguments, dtype)

    shapes = arguments.shapes or "sdxl"
    sizes = sizes_of(arguments.size or ["1024x1024", "1536x1024"])
    if mode == "flops":
        counts = [pipeline_flops.pipeline_flops(shapes, *size, radius) for size in sizes]
        return Measured(
            mode=mode,
            dtype="any dtype",
            rows=[asdict(count) for count in counts],
            table=pipeline_flops.table(counts),
            protocol=pipeline_flops.protocol(counts, shapes),
        )

    def pipe() -> BokehDiffPipeline:
        # A new one for each size: what was compiled for one would be compiled worse for the next.
        return pipeline_speed.random_pipeline(shapes, device, getattr(torch, dtype))

    if mode == "refocus":
        refocused = [pipeline_speed.refocus_speed(pipe(), *size, radius, repeats) for size in sizes]
        return Measured(
            mode=mode,
            dtype=dtype,
            rows=[asdict(row) for row in refocused],
            table=pipeline_speed.refocus_table(refocused),
            protocol=pipeline_speed.refocus_protocol(shapes, radius, repeats, device),
        )
    staged = [
        pipeline_speed.stage_speed(pipe(), *size, radius, repeats, compiled=arguments.compile)
        for size in sizes
    ]
    return Measured(
        mode=mode,
        dtype=dtype,
        rows=[asdict(row) for row in staged],
        table=pipeline_speed.stage_table(staged),
        protocol=pipeline_speed.stage_protocol(staged, shapes, repeats, device),
    )


def _megapixels(arguments: argparse.Namespace, dtype: str) -> Measured:
    megapixels = numbers(arguments.megapixels, "--megapixels")
    for size in megapixels:
        if not 0.01 <= size <= 100:
            raise ValueError(f"--megapixels must be in [0.01, 100], got {size:g}.")
    cases = pipeline_scale.cases(
        arguments.model, megapixels, arguments.radius, arguments.radius_scales,
        tiling=arguments.tiling, dtype=dtype, device=arguments.device, threads=arguments.threads,
    )  # fmt: skip
    rows, left_out = pipeline_scale.measure(cases)
    return Measured(
        mode="megapixels",
        dtype=dtype,
        rows=[asdict(row) for row in rows],
        table=pipeline_scale.table(rows),
        protocol=pipeline_scale.protocol(rows, cases[0]),
        left_out=left_out,
    )

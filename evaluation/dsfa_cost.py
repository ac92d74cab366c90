"""What divided space-focus attention (DSFA) costs: Depth Anything V2 with and without a stack.

Parameters and arithmetic are counted on torch's ``meta`` device, where tensors have shapes and no
content; seconds and memory are those of random weights on a device that is asked for.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from bokehdiff.dsfa_files import ENCODERS, official_config
from bokehdiff.models.depth_anything_dsfa import DepthAnythingDSFAForDepthEstimation
from evaluation import report
from evaluation.memory import peak_bytes_of
from evaluation.pipeline_flops import flops_of
from evaluation.pipeline_speed import in_words, markdown
from evaluation.speed import timed

PATCH = 14

DEFAULT_SIZES = ("518x518", "1008x1008")
"""What the weights were trained at, and 1 megapixel in whole patches."""

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class DSFACost:
    """One network and one picture with its stack; a multiplication and an addition are two.

    Attributes:
        encoder: one of :data:`bokehdiff.dsfa_files.ENCODERS`.
        width, height: of the picture, pixels.
        frames: of the stack.
        parameters, fusion_parameters: of Depth Anything, and of the DSFA blocks.
        single: operations of Depth Anything alone, with one picture.
        backbone: those of the backbone that the frames take in addition.
        fusion: those of the DSFA blocks.
        seconds_single, seconds: without and with the stack, medians; None if not measured.
        peak_bytes_single, peak_bytes: most memory on top of the network and the pictures.
    """

    encoder: str
    width: int
    height: int
    frames: int
    parameters: int
    fusion_parameters: int
    single: float
    backbone: float
    fusion: float
    seconds_single: float | None = None
    seconds: float | None = None
    peak_bytes_single: int | None = None
    peak_bytes: int | None = None

    @property
    def with_stack(self) -> float:
        """Operations with the stack."""
        return self.single + self.backbone + self.fusion


@contextmanager
def _new_tensors(device: str, dtype: torch.dtype) -> Iterator[None]:
    """New tensors are made on this device, in this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _network(
    encoder: str, device: str, dtype: torch.dtype = torch.float32
) -> DepthAnythingDSFAForDepthEstimation:
    with _new_tensors(device, dtype):
        return DepthAnythingDSFAForDepthEstimation(official_config(encoder)).eval()


def _inputs(
    height: int, width: int, frames: int, device: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """A picture, a stack and its strengths; gray, since arithmetic does not depend on content."""
    with _new_tensors(device, dtype):
        picture, stack = torch.zeros(1, 3, height, width), torch.zeros(1, frames, 3, height, width)
        return picture, stack, torch.arange(1.0, frames + 1).mul(10)[None]


def _count(network: nn.Module) -> int:
    return sum(value.numel() for value in network.parameters())


def count_cost(encoder: str, height: int, width: int, frames: int) -> DSFACost:
    """Parameters and arithmetic, without computing anything."""
    network = _network(encoder, "meta")
    picture, stack, K = _inputs(height, width, frames, "meta")
    single = flops_of(lambda: network(picture))
    backbone = flops_of(lambda: network.backbone(stack.flatten(0, 1)))
    with_stack = flops_of(lambda: network(picture, stack, K))
    fusion_parameters = _count(network.fusion)
    return DSFACost(
        encoder=encoder,
        width=width,
        height=height,
        frames=frames,
        parameters=_count(network) - fusion_parameters,
        fusion_parameters=fusion_parameters,
        single=single,
        backbone=backbone,
        fusion=with_stack - single - backbone,
    )


@torch.inference_mode()
def measure_cost(cost: DSFACost, repeats: int, device: str, dtype: torch.dtype) -> DSFACost:
    """The same with seconds and memory of random weights, after one round that does not count."""
    torch.manual_seed(0)
    network = _network(cost.encoder, device, dtype)
    picture, stack, K = _inputs(cost.height, cost.width, cost.frames, device, dtype)
    found: list[tuple[float, int | None]] = []
    for values in ((picture,), (picture, stack, K)):
        network(*values)
        rounds = [
            timed(lambda values=values: network(*values), torch.device(device))[0]
            for _ in range(repeats)
        ]
        peak = peak_bytes_of(lambda values=values: network(*values), device)
        found.append((statistics.median(rounds), peak))
    (seconds_single, peak_single), (seconds, peak) = found
    measured = dict(seconds_single=seconds_single, seconds=seconds)
    return DSFACost(
        **{**asdict(cost), **measured, "peak_bytes_single": peak_single, "peak_bytes": peak}
    )


def table(costs: Sequence[DSFACost]) -> str:
    """One line for each network and size, in Markdown."""
    measured = any(cost.seconds is not None for cost in costs)
    lines = [
        [
            "network",
            "picture",
            "parameters, M",
            "of DSFA, M",
            "alone, TFLOP",
            "frames, TFLOP",
            "DSFA, TFLOP",
            "times alone",
        ]
    ]
    if measured:
        lines[0] += ["alone, s", "stack, s", "alone, GB", "stack, GB"]
    for cost in costs:
        line = [
            cost.encoder,
            f"{cost.width} x {cost.height}",
            f"{(cost.parameters + cost.fusion_parameters) / 1e6:.1f}",
            f"{cost.fusion_parameters / 1e6:.1f}",
            f"{cost.single / 1e12:.3f}",
            f"{cost.backbone / 1e12:.3f}",
            f"{cost.fusion / 1e12:.3f}",
            f"{cost.with_stack / cost.single:.2f}",
        ]
        if measured:
            line += [in_words(cost.seconds_single, ".3f"), in_words(cost.seconds, ".3f")]
            for peak in (cost.peak_bytes_single, cost.peak_bytes):
                line.append(in_words(None if peak is None else peak / 1e9, ".2f"))
        lines.append(line)
    return markdown(lines)


def protocol(costs: Sequence[DSFACost], device: str | None, repeats: int) -> str:
    """What was counted and measured."""
    words = (
        "Depth Anything V2 with DSFA at the last two of four levels, one picture with a stack of "
        f"{costs[0].frames}; 'alone' is Depth Anything without the stack, 'frames' the backbone's "
        "work on the frames, 'DSFA' that of the blocks. Counted by torch.utils.flop_counter on the "
        "meta device: matrix products, convolutions and attention, two operations for a "
        "multiplication and an addition."
    )
    if device is not None:
        words += (
            f" Seconds: random weights on {device}, median of {repeats} rounds after one that does "
            "not count. GB: the most memory (10^9 bytes) on top of network and pictures."
        )
    return words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``cost dsfa``."""
    parser.add_argument(
        "--encoder",
        action="append",
        choices=list(ENCODERS),
        help="size of Depth Anything V2; may be given several times. Default: vits, vitb, vitl.",
    )
    parser.add_argument(
        "--size",
        action="append",
        metavar="WxH",
        help="width and height of the picture in pixels, multiples of 14; may be given several "
        f"times. Default: {' and '.join(DEFAULT_SIZES)}.",
    )
    parser.add_argument("--frames", type=int, default=3, help="of the stack, default %(default)s")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="also run random weights there; default: count"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of weights and activations that are run, default %(default)s",
    )
    parser.add_argument("--repeats", type=int, default=5, help="default %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, default %(default)s")
    parser.add_argument("--out", metavar="FILE", help="write the figures to this JSON file")


def _size(text: str) -> tuple[int, int]:
    """Height and width of "WxH"."""
    width, times, height = text.partition("x")
    if times and width.isdecimal() and height.isdecimal():
        sides = int(height), int(width)
        if min(sides) > 0 and not any(side % PATCH for side in sides):
            return sides
    raise ValueError(
        f"--size is {text!r}; wanted WxH in pixels, both multiples of {PATCH}, such as "
        f"{DEFAULT_SIZES[0]}."
    )


def run(arguments: argparse.Namespace) -> int:
    """Counts and measures, prints the table and writes the JSON; returns 0.

    Raises:
        ValueError: arguments out of range.
    """
    sizes = [_size(text) for text in arguments.size or DEFAULT_SIZES]
    for name in ("frames", "repeats", "threads"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}.")
    torch.set_num_threads(arguments.threads)
    costs = [
        count_cost(encoder, height, width, arguments.frames)
        for encoder in arguments.encoder or ("vits", "vitb", "vitl")
        for height, width in sizes
    ]
    if arguments.device:
        dtype = getattr(torch, arguments.dtype)
        costs = [measure_cost(cost, arguments.repeats, arguments.device, dtype) for cost in costs]
    machine = {**report.hardware(arguments.device or "cpu"), "dtype": arguments.dtype}
    described = protocol(costs, arguments.device, arguments.repeats)
    print(table(costs))
    print()
    print(described)
    if arguments.device:
        print(report.hardware_sentence(machine))
    if arguments.out:
        report.write_json(
            arguments.out,
            {
                "benchmark": "cost dsfa",
                "protocol": described,
                "hardware": machine if arguments.device else None,
                "costs": [{**asdict(cost), "with_stack": cost.with_stack} for cost in costs],
            },
        )
        print(f"All figures: {arguments.out}")
    return 0

"""How fast LiteBokeh is on this processor: in torch, onnxruntime and LiteRT, and per pixel.

Weights are random unless a trained network is named: what there is to compute is the same.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bokehdiff.compact_score import compact_score
from bokehdiff.models.litebokeh import GlassEncNet, TinyUnet
from bokehdiff.pipelines.litebokeh import read_litebokeh
from evaluation.memory import peak_bytes_of
from evaluation.pipeline_flops import flops_of
from evaluation.pipeline_report import sizes_of
from evaluation.pipeline_speed import (
    WARM_UPS,
    clock_in_words,
    in_words,
    markdown,
    photograph,
    time_in_turns,
)
from evaluation.report import hardware, hardware_sentence, write_json

__all__ = ["GLASS", "Linearity", "RuntimeSpeed", "linearity", "run", "runtime_speed"]

Network = TinyUnet | GlassEncNet
Ready = Callable[[], Any]
"""One photo through a runtime that has its file and its photo."""

GLASS = "glass"
"""Among the sizes of TinyUnet: the GlassEncNet of the published kind."""
SIZES = ["1536x1024"]
GROWING = ["384x256", "768x512", "1536x1024"]
"""What is measured, with --linearity too, unless other sizes are named."""
PACKAGES = {"onnx": ("onnxruntime", "onnxruntime"), "tflite": ("LiteRT", "ai_edge_litert")}
"""By the option that names a file: its runtime, and the module that has it."""


@dataclass(frozen=True)
class RuntimeSpeed:
    """One network, one size of photo and one runtime.

    Attributes:
        network: its name.
        runtime: "torch", "onnxruntime" or "LiteRT".
        width, height: of the photo, pixels.
        parameters: their number.
        giga_macs: 10^9 multiplications and additions of the convolutions.
        milliseconds: for the photo, median.
        ratio: of them to those of torch.
        peak_megabytes: most memory for reading the file and the first photo; of torch, for the
            photo and the weights; None where the system cannot tell.
        score: the challenge's, with a mean opinion score.
    """

    network: str
    runtime: str
    width: int
    height: int
    parameters: int
    giga_macs: float
    milliseconds: float
    ratio: float
    peak_megabytes: float | None
    score: float | None


@torch.inference_mode()
def runtime_speed(
    name: str,
    network: Network,
    height: int,
    width: int,
    repeats: int,
    files: Mapping[str, Path] | None = None,
    mean_opinion_score: float | None = None,
) -> list[RuntimeSpeed]:
    """Time a photo in all runtimes in turns.

    Args:
        name: of the network, for the rows.
        network: on the CPU.
        height, width: of the photo, pixels.
        repeats: rounds that count.
        files: of the network, by ``"onnx"`` and ``"tflite"``; written by ``bokehdiff export
            compact``.
        mean_opinion_score: of its pictures, by people, for the score.

    Raises:
        ValueError: a file for photos of another size.
    """
    photo = photograph(height, width)[0]
    starts: dict[str, Callable[[], Ready]] = {"torch": lambda: lambda: network(photo)}
    for kind, file in (files or {}).items():
        start = {"onnx": in_onnxruntime, "tflite": in_litert}[kind]
        starts[PACKAGES[kind][0]] = lambda start=start, file=file: start(file, photo.numpy())
    ready: dict[str, Ready] = {}
    peaks = {}
    for runtime, start in starts.items():

        def first_photo(runtime: str = runtime, start: Callable[[], Ready] = start) -> None:
            ready[runtime] = start()
            ready[runtime]()

        peaks[runtime] = peak_bytes_of(first_photo)
        if runtime not in ready:  # nothing was done, for want of a memory that can be measured
            ready[runtime] = start()
    weights = sum(one.numel() * one.element_size() for one in network.parameters())
    if peaks["torch"] is not None:
        peaks["torch"] += weights
    spent = time_in_turns(ready, repeats, "cpu", f"{name}, {width} x {height}")
    return [
        RuntimeSpeed(
            network=name,
            runtime=runtime,
            width=width,
            height=height,
            parameters=sum(one.numel() for one in network.parameters()),
            giga_macs=macs_of(network, height, width) / 1e9,
            milliseconds=milliseconds,
            ratio=milliseconds / spent["torch"],
            peak_megabytes=None if peaks[runtime] is None else peaks[runtime] / 1e6,
            score=None
            if mean_opinion_score is None
            else compact_score(mean_opinion_score, [milliseconds]),
        )
        for runtime, milliseconds in spent.items()
    ]


def in_onnxruntime(file: Path, photo: np.ndarray) -> Ready:
    """A photo (1, 3, H, W) through an ONNX file, with as many threads as torch has."""
    from bokehdiff.onnx_files import RunningModel

    session = RunningModel(str(file), torch.get_num_threads())
    return lambda: session({"image": photo})


def in_litert(file: Path, photo: np.ndarray) -> Ready:
    """The same through a TFLite file.

    Raises:
        ValueError: it is for photos of another size.
    """
    from bokehdiff.tflite_files import RunningTFLite

    channels_last = np.ascontiguousarray(photo.transpose(0, 2, 3, 1))
    interpreter = RunningTFLite(file.read_bytes(), torch.get_num_threads())
    made_for, given = interpreter.input_sizes["image"], channels_last.shape
    if made_for != given:
        raise ValueError(
            f"{file.name} is for photos of {made_for[2]}x{made_for[1]} pixels, --size is "
            f"{given[2]}x{given[1]}; wanted the same, or another file."
        )
    return lambda: interpreter({"image": channels_last})


def macs_of(network: Network, height: int, width: int) -> float:
    """Multiplications with additions of the convolutions for one photo."""
    empty = copy.deepcopy(network).to("meta")
    return flops_of(lambda: empty(torch.empty(1, 3, height, width, device="meta"))) / 2


def runtime_table(rows: Sequence[RuntimeSpeed]) -> str:
    """One line for each network, size and runtime, in Markdown."""
    lines = [["network", "photo, px", "runtime", "ms", "of torch", "peak, MB", "parameters",
              "GMAC", "score"]]  # fmt: skip
    for row in rows:
        lines.append(
            [
                row.network,
                f"{row.width} x {row.height}",
                row.runtime,
                f"{row.milliseconds:.1f}",
                f"{row.ratio:.2f}",
                in_words(row.peak_megabytes, ".0f"),
                f"{row.parameters:,}",
                f"{row.giga_macs:.2f}",
                in_words(row.score, ".3g"),
            ]
        )
    return markdown(lines)


# -- larger photos ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linearity:
    """What a pixel costs in photos of one size.

    Attributes:
        network: its name.
        width, height: of the photo, pixels.
        macs_per_pixel: of the convolutions.
        nanoseconds_per_pixel: in torch, median.
        macs_ratio, time_ratio: to those of the first size.
    """

    network: str
    width: int
    height: int
    macs_per_pixel: float
    nanoseconds_per_pixel: float
    macs_ratio: float
    time_ratio: float


@torch.inference_mode()
def linearity(
    name: str, network: Network, sizes: Sequence[tuple[int, int]], repeats: int
) -> list[Linearity]:
    """Measure photos of several heights and widths, in turns."""
    photos = {size: photograph(*size)[0] for size in sizes}
    works = {str(size): lambda photo=photo: network(photo) for size, photo in photos.items()}
    spent = time_in_turns(works, repeats, "cpu", name)
    pixels = {size: size[0] * size[1] for size in sizes}
    macs = {size: macs_of(network, *size) / pixels[size] for size in sizes}
    times = {size: 1e6 * spent[str(size)] / pixels[size] for size in sizes}
    return [
        Linearity(
            network=name,
            width=size[1],
            height=size[0],
            macs_per_pixel=macs[size],
            nanoseconds_per_pixel=times[size],
            macs_ratio=macs[size] / macs[sizes[0]],
            time_ratio=times[size] / times[sizes[0]],
        )
        for size in sizes
    ]


def linearity_table(rows: Sequence[Linearity]) -> str:
    """One line for each network and size, in Markdown."""
    lines = [["network", "photo, px", "MAC/px", "ratio", "time, ns/px", "ratio"]]
    for row in rows:
        lines.append(
            [
                row.network,
                f"{row.width} x {row.height}",
                f"{row.macs_per_pixel:.1f}",
                f"{row.macs_ratio:.4f}",
                f"{row.nanoseconds_per_pixel:.0f}",
                f"{row.time_ratio:.2f}",
            ]
        )
    return markdown(lines)


# -- the command -----------------------------------------------------------------------------------


def networks_asked_for(model: str | None, variants: Sequence[str] | None) -> dict[str, Network]:
    """A trained network, or sizes with random weights that depend on nothing, by name.

    Raises:
        ValueError: both, or no such network.
    """
    if model:
        if variants:
            raise ValueError(
                "--model is a network as it is; leave out --variant, which chooses random weights."
            )
        return {Path(model).name: read_litebokeh(model)}
    networks: dict[str, Network] = {}
    for variant in variants or ["tiny"]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = GlassEncNet() if variant == GLASS else TinyUnet.from_variant(variant)
        networks[variant] = network.eval().requires_grad_(False)
    return networks


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints the table and writes the JSON. ValueError for mistakes."""
    for name in ("repeats", "threads"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}.")
    given = {kind: getattr(arguments, kind) for kind in PACKAGES if getattr(arguments, kind)}
    of_runtimes = {**given, "mean-opinion-score": arguments.mean_opinion_score}
    if arguments.linearity and any(value is not None for value in of_runtimes.values()):
        raise ValueError(
            "--linearity measures torch alone; leave it out, or --onnx, --tflite and "
            "--mean-opinion-score."
        )
    sizes = sizes_of(arguments.size or (GROWING if arguments.linearity else SIZES))
    networks = networks_asked_for(arguments.model, arguments.variant)
    if given and len(networks) > 1:
        raise ValueError("--onnx and --tflite are files of one network; wanted one --variant.")
    for file in given.values():
        if not Path(file).is_file():
            raise ValueError(f"There is no file {file}; `bokehdiff export compact` writes one.")
    missing = {kind for kind in given if importlib.util.find_spec(PACKAGES[kind][1]) is None}
    files = {kind: Path(file) for kind, file in given.items() if kind not in missing}
    torch.set_num_threads(arguments.threads)
    rows: list[Any] = []
    for name, network in networks.items():
        if arguments.linearity:
            rows += linearity(name, network, sizes, arguments.repeats)
        else:
            for size in sizes:
                rows += runtime_speed(
                    name, network, *size, arguments.repeats, files, arguments.mean_opinion_score
                )
    mode = "linearity" if arguments.linearity else "runtimes"
    words = protocol(mode, arguments.repeats, arguments.mean_opinion_score)
    machine = hardware()
    left_out = {PACKAGES[kind][0]: f"{PACKAGES[kind][1]} is not installed here" for kind in missing}
    print(linearity_table(rows) if arguments.linearity else runtime_table(rows))
    print()
    for runtime, reason in left_out.items():
        print(f"No row for {runtime}: {reason}.")
    print(words)
    print(hardware_sentence(machine))
    if arguments.out:
        write_json(
            arguments.out,
            {
                "benchmark": f"speed compact, {mode}",
                "protocol": words,
                "command": arguments.command_line,
                "hardware": machine,
                "files": {kind: file.name for kind, file in files.items()},
                "left_out": left_out,
                "rows": [asdict(row) for row in rows],
            },
        )
        print(f"All figures: {arguments.out}")


def protocol(mode: str, repeats: int, mean_opinion_score: float | None) -> str:
    """What the columns mean and how they were measured."""
    clock = f"Time: {clock_in_words('cpu')}."
    if mode == "linearity":
        return (
            f"A photo through torch; median of {repeats} rounds, sizes in turns, after {WARM_UPS} "
            "that warm up. MAC: a multiplication with an addition, of the convolutions. Ratios: to "
            f"the first size. {clock}"
        )
    words = (
        f"A photo, with the enhancement; median of {repeats} rounds, runtimes in turns, after "
        f"{WARM_UPS} that warm up. Peak: memory of the process for reading the file and the first "
        f"photo, above what there was; of torch, for the photo, and its weights. {clock}"
    )
    if mean_opinion_score is not None:
        words += (
            f" Score: 2^(2 MOS) / ms with the mean opinion score {mean_opinion_score:g}. Opinions "
            "are given by people who look at the pictures, and the challenge's milliseconds are "
            "those of the GPUs of two phones: this is what this processor would score with such an "
            "opinion, no result of the challenge."
        )
    return words

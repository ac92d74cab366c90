"""How fast BokehFlow is, and what memory it takes: films, photos of twice the size, long films.

Weights are random unless a trained network is named: what there is to compute is the same.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bokehdiff.models.bokehflow import PIXELS_PER_TOKEN, REFERENCE_WIDTH, BokehFlowModel
from bokehdiff.pipelines.bokehflow_video import BokehFlowVideoPipeline
from evaluation.flow_networks import described, networks_asked_for
from evaluation.flow_training_speed import CAMERA, training_speed, training_table
from evaluation.memory import peak_bytes_of, resident_bytes, restart_peak
from evaluation.pipeline_flops import flops_of
from evaluation.pipeline_report import sizes_of
from evaluation.pipeline_speed import (
    WARM_UPS,
    clock_in_words,
    in_words,
    markdown,
    milliseconds_of,
    photograph,
    time_in_turns,
)
from evaluation.report import hardware, hardware_sentence, write_json

__all__ = [
    "Growth",
    "film_speed",
    "growth",
    "run",
    "stream_memory",
]

FOCUS_AND_STRENGTH = (0.5, 10.0)
"""df in 1/m, and K in pixels metres of a photo of REFERENCE_WIDTH: no circle is too large for the
published networks."""
SETTLED_FRAMES = 10
"""Of a long film: what libraries set up at first, and the state, are there by then."""


# -- films -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FilmSpeed:
    """One network and one size of a film, a frame at a time with the state of the one before.

    Attributes:
        network: its name.
        parameters: their number.
        width, height: of the frames, pixels.
        milliseconds: for a frame, median.
        frames_per_second: what that makes.
        weights_megabytes: 10^6 bytes.
        state_megabytes: what one frame leaves to the next.
        peak_megabytes: most memory for two frames, weights and state included; None where the
            system cannot tell.
    """

    network: str
    parameters: int
    width: int
    height: int
    milliseconds: float
    frames_per_second: float
    weights_megabytes: float
    state_megabytes: float
    peak_megabytes: float | None


@torch.inference_mode()
def film_speed(
    name: str,
    network: BokehFlowModel,
    height: int,
    width: int,
    repeats: int,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> FilmSpeed:
    """Time frames of a film with a little noise; the network finds depth and blurs.

    Args:
        name: of the network, for the row.
        network: on the device that is measured; stays as it is.
        height, width: of the frames, pixels.
        repeats: frames that count.
        dtype: of weights and activations; light stays float32.
        compiled: by torch.compile.

    Raises:
        ValueError: what comes out is not finite.
    """
    # Not its own `to`, which warns of modules that stay in float32 even if there are none.
    network = nn.Module.to(copy.deepcopy(network), dtype)
    device = network.device.type
    photo = photograph(height, width)[0].to(network.device)
    noise = torch.randn(photo.shape, generator=torch.Generator().manual_seed(0))
    frames = [photo, (photo + 0.02 * noise.to(photo)).clamp(0, 1)]
    call: Callable[..., Any] = torch.compile(network) if compiled else network
    first = call(frames[0], *CAMERA)
    if not bool(torch.isfinite(first.bokeh).all()):
        raise ValueError(f"{name} makes pictures that are not finite in {dtype}.")
    states = [first.state]

    def frame() -> None:
        states.append(call(frames[1], *CAMERA, state=states.pop()).state)

    def two_frames() -> None:
        call(frames[1], *CAMERA, state=call(frames[0], *CAMERA).state)

    spent = time_in_turns({"frame": frame}, repeats, device, f"{name}, {width} x {height}")
    state = sum(_bytes(value) for value in states[0].tensors().values())
    states.clear()
    del first
    peak = peak_bytes_of(two_frames, device)
    weights = sum(map(_bytes, network.parameters()))
    return FilmSpeed(
        network=name,
        parameters=sum(value.numel() for value in network.parameters()),
        width=width,
        height=height,
        milliseconds=spent["frame"],
        frames_per_second=1000 / spent["frame"],
        weights_megabytes=weights / 1e6,
        state_megabytes=state / 1e6,
        peak_megabytes=None if peak is None else (peak + weights) / 1e6,
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def film_table(rows: Sequence[FilmSpeed]) -> str:
    """One line for each network and size, in Markdown."""
    lines = [["network", "parameters", "frames, px", "ms", "fps", "state, MB", "peak, MB"]]
    for row in rows:
        lines.append(
            [
                row.network,
                f"{row.parameters:,}",
                f"{row.width} x {row.height}",
                f"{row.milliseconds:.1f}",
                f"{row.frames_per_second:.2f}",
                f"{row.state_megabytes:.1f}",
                in_words(row.peak_megabytes, ".0f"),
            ]
        )
    return markdown(lines)


# -- twice the size --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Growth:
    """What a network takes of a photo, and of one with twice the sides.

    Attributes:
        network: its name.
        side, double_side: of the photos, pixels.
        nanoseconds_per_pixel, bytes_per_pixel, flops_per_token: of the two; bytes on top of what
            there is before, None where the system cannot tell; operations as torch counts them, of
            convolutions and matrix products.
    """

    network: str
    side: int
    double_side: int
    nanoseconds_per_pixel: tuple[float, float]
    bytes_per_pixel: tuple[float, float] | None
    flops_per_token: tuple[float, float]


@torch.inference_mode()
def growth(name: str, network: BokehFlowModel, side: int, repeats: int) -> Growth:
    """Measure a first frame of two square sizes, in turns.

    Args:
        name: of the network.
        network: on the device that is measured.
        side: of the smaller photo, a multiple of 4.
        repeats: rounds that count.
    """
    device = network.device.type
    photos = {size: photograph(size, size)[0].to(network.device) for size in (side, 2 * side)}
    works = {
        size: lambda photo=photo: network(photo, *CAMERA, photo_width_px=REFERENCE_WIDTH)
        for size, photo in photos.items()
    }
    spent = time_in_turns(
        {str(size): work for size, work in works.items()}, repeats, device, f"{name}, {side} px"
    )
    peaks = [peak_bytes_of(work, device) for work in works.values()]
    flops = [flops_of(work) for work in works.values()]
    pixels = [size**2 for size in works]

    def per_pixel(values: Sequence[float]) -> tuple[float, float]:
        one, other = (value / count for value, count in zip(values, pixels, strict=True))
        return one, other

    flops_per_pixel = per_pixel(flops)
    return Growth(
        network=name,
        side=side,
        double_side=2 * side,
        nanoseconds_per_pixel=per_pixel([1e6 * spent[str(size)] for size in works]),
        bytes_per_pixel=None if None in peaks else per_pixel(peaks),
        flops_per_token=tuple(PIXELS_PER_TOKEN**2 * value for value in flops_per_pixel),
    )


def growth_table(rows: Sequence[Growth]) -> str:
    """One line for each network, in Markdown."""
    lines = [["network", "sides, px", "time, ns/px", "ratio", "memory, B/px", "ratio",
              "FLOP/token", "ratio"]]  # fmt: skip
    for row in rows:
        line = [row.network, f"{row.side}, {row.double_side}"]
        for pair, form in (
            (row.nanoseconds_per_pixel, ".0f"),
            (row.bytes_per_pixel, ".0f"),
            (row.flops_per_token, ".6g"),
        ):
            if pair is None:
                line += ["-", "-"]
            else:
                line += [", ".join(format(value, form) for value in pair)]
                line += [f"{pair[1] / pair[0]:.4f}"]
        lines.append(line)
    return markdown(lines)


# -- long films ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StreamMemory:
    """Memory of a long film.

    Attributes:
        network: its name.
        width, height, frames: of the film.
        settled_megabytes: most memory of the process, or on the GPU, within the first 10 frames.
        peak_megabytes: of all frames.
        growth_percent: of the latter over the former.
        milliseconds: per frame, mean.
    """

    network: str
    width: int
    height: int
    frames: int
    settled_megabytes: float
    peak_megabytes: float
    growth_percent: float
    milliseconds: float


def stream_memory(
    name: str, network: BokehFlowModel, height: int, width: int, frames: int
) -> StreamMemory:
    """Stream a film that is made as it is watched.

    Raises:
        ValueError: not more frames than it takes to settle.
    """
    if frames <= SETTLED_FRAMES:
        raise ValueError(f"--stream must be more than {SETTLED_FRAMES} frames, got {frames}.")
    device = network.device.type
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        restart_peak()
    photo = photograph(height, width)[0]

    def film() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for number in range(frames):
            noise = torch.randn(photo.shape, generator=generator)
            yield (photo.roll(number, -1) + 0.02 * noise).clamp(0, 1)

    pipe = BokehFlowVideoPipeline(model=network)
    df, K = FOCUS_AND_STRENGTH
    stream = pipe.stream(film(), df=df, K=K * width / REFERENCE_WIDTH, metric=True)
    settled = 0.0

    def watch() -> None:
        nonlocal settled
        watched = tqdm(stream, total=frames, unit="frame", desc=name, leave=False, disable=None)
        for number, _ in enumerate(watched, start=1):
            if number == SETTLED_FRAMES:
                settled = _peak(device)

    spent = milliseconds_of(watch, device)
    peak = _peak(device)
    return StreamMemory(
        name,
        width,
        height,
        frames,
        settled / 1e6,
        peak / 1e6,
        100 * (peak / settled - 1),
        spent / frames,
    )


def _peak(device: str) -> float:
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes(peak=True)


def stream_table(rows: Sequence[StreamMemory]) -> str:
    """One line for each network, in Markdown."""
    lines = [["network", "frames", "px", f"peak of {SETTLED_FRAMES} frames, MB", "of all, MB",
              "growth, %", "ms per frame"]]  # fmt: skip
    for row in rows:
        lines.append(
            [
                row.network,
                f"{row.frames}",
                f"{row.width} x {row.height}",
                f"{row.settled_megabytes:.1f}",
                f"{row.peak_megabytes:.1f}",
                f"{row.growth_percent:.2f}",
                f"{row.milliseconds:.1f}",
            ]
        )
    return markdown(lines)


# -- the command -----------------------------------------------------------------------------------

SIZES = {
    "films": ["1280x720", "1920x1080"],
    "linearity": ["256x256"],
    "training": ["256x256"],
    "stream": ["320x180"],
}
"""What is measured, and the sizes it is measured at unless others are named."""


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints the table and writes the JSON. ValueError for mistakes."""
    mode = "films"
    if arguments.linearity:
        mode = "linearity"
    elif arguments.training_step:
        mode = "training"
    elif arguments.stream is not None:
        mode = "stream"
    for name in ("batch", "repeats", "threads"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}.")
    if mode != "films" and (arguments.dtype != "float32" or arguments.compile):
        raise ValueError("--dtype and --compile are for films; leave out the other mode, or them.")
    sizes = sizes_of(arguments.size or SIZES[mode])
    for height, width in sizes:
        if mode in ("linearity", "training") and (height != width or width % PIXELS_PER_TOKEN):
            raise ValueError(
                f"--size is {width}x{height}; wanted a square whose sides are multiples of "
                f"{PIXELS_PER_TOKEN}."
            )
    torch.set_num_threads(arguments.threads)
    networks = networks_asked_for(arguments)
    rows: list[Any] = []
    for name, network in networks.items():
        for height, width in sizes:
            if mode == "films":
                dtype = getattr(torch, arguments.dtype)
                rows.append(
                    film_speed(
                        name, network, height, width, arguments.repeats, dtype, arguments.compile
                    )
                )
            elif mode == "linearity":
                rows.append(growth(name, network, width, arguments.repeats))
            elif mode == "training":
                rows.append(
                    training_speed(name, network, width, arguments.batch, arguments.repeats)
                )
            else:
                rows.append(stream_memory(name, network, height, width, arguments.stream))
    table = {
        "films": film_table,
        "linearity": growth_table,
        "training": training_table,
        "stream": stream_table,
    }[mode](rows)
    words = protocol(mode, arguments.repeats, arguments.device)
    machine = {**hardware(arguments.device), "dtype": arguments.dtype}
    print(table)
    print()
    for name, network in networks.items():
        print(f"{name}: {described(network)}.")
    print(words)
    print(hardware_sentence(machine))
    if arguments.out:
        write_json(
            arguments.out,
            {
                "benchmark": f"speed flow, {mode}",
                "protocol": words,
                "command": arguments.command_line,
                "hardware": machine,
                "networks": {name: described(network) for name, network in networks.items()},
                "rows": [asdict(row) for row in rows],
            },
        )
        print(f"All figures: {arguments.out}")


def protocol(mode: str, repeats: int, device: str) -> str:
    """What the columns mean and how they were measured."""
    memory = "what torch holds on the GPU" if device == "cuda" else "memory of the process"
    words = {
        "films": "One frame at a time, with the state of the one before; the network finds depth "
        f"and blurs. Median of {repeats} frames after {WARM_UPS} that warm up. Peak: {memory} for "
        "two frames, above what there was, and the weights.",
        "linearity": "A first frame, with circles of confusion of as many pixels in both sizes; "
        f"median of {repeats} rounds, in turns, after {WARM_UPS} that warm up. Memory: {memory}, "
        "above what there was, at its peak. FLOP: convolutions and matrix products, two for a "
        "multiplication and an addition.",
        "training": "Forward, L1, SSIM and logarithmic depth, backward and AdamW; median of "
        f"{repeats} steps after one that does not count. Recurrence of a block: four directions, "
        "forward and backward, once. Loop: the published equations, token after token; tuned: the "
        "fastest that we could write. Step with loops: reckoned, the step with the loops of all "
        "blocks in the place of what they have.",
        "stream": f"A film that is made as it is watched, none of it kept. Peak: {memory}, whole.",
    }[mode]
    return f"{words} Time: {clock_in_words(device)}."

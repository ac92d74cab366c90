"""How many pictures a second the synthesis traces: ``python -m data_synthesis.speed``.

Measured are the compiled tracer of planes, in one process and in several, and the same loops over
lens samples and layers written plainly in numpy, which is also what the tracer is tested against.
Every process has one thread.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from bokehdiff.rendering.aperture import Aperture, field_position
from data_synthesis.lens import EMPTY_ALPHA, SOLID_ALPHA
from data_synthesis.planes import trace_planes

__all__ = ["example_scene", "main", "trace_with_numpy"]

# Seconds that processes may take to start, compile and do their share.
PATIENCE = 900.0
# Pixels: the largest circle of confusion of the example, and the canvas around its picture.
EXAMPLE_RADIUS = 24.0
EXAMPLE_MARGIN = 32
EXAMPLES = """examples:
  python -m data_synthesis.speed
  python -m data_synthesis.speed --processes 8 --out speed.json
  python -m data_synthesis.speed --aperture '{"blades": 6, "cat_eye": 0.5}'"""


def trace_with_numpy(
    layers: np.ndarray,
    planes: np.ndarray,
    df: float,
    K: float,
    *,
    aperture: Aperture | None = None,
    samples_per_side: int = 21,
    window: tuple[int, int, int, int] | None = None,
    every: int = 1,
) -> np.ndarray:
    """(h, w, 3) picture as :func:`data_synthesis.planes.trace_planes` defines it, plainly written.

    Arguments as there; all is computed in the type of ``layers``: float64 is the reference of the
    tests. ``every``: only every n-th lens sample is traced (a coarser picture, in less time).
    """
    aperture = aperture or Aperture()
    window = window or (0, 0, *layers.shape[1:3])
    points = aperture.lens_samples(samples_per_side, dtype=torch.float64)[::every]
    channel_focus = aperture.channel_focus(float(df))
    pictures = {
        focus: _trace_focus(layers, planes, focus, K, aperture, points, window)
        for focus in set(channel_focus)
    }
    return np.stack([pictures[focus][..., c] for c, focus in enumerate(channel_focus)], axis=-1)


def _trace_focus(
    layers: np.ndarray,
    planes: np.ndarray,
    focus: float,
    K: float,
    aperture: Aperture,
    points: torch.Tensor,
    window: tuple[int, int, int, int],
) -> np.ndarray:
    count, height, width, _ = layers.shape
    top, left, rows, columns = window
    y, x = np.mgrid[top : top + rows, left : left + columns].astype(layers.dtype)
    field = field_position(torch.from_numpy(x - left), torch.from_numpy(y - top), rows, columns)
    transmission = torch.stack([aperture.lens_weights(points, side) for side in (-1, 0, 1)], 1)
    sums = np.zeros((rows, columns, 4), layers.dtype)
    for (u, v), (behind, within, before) in zip(
        points.tolist(), transmission.tolist(), strict=True
    ):
        light = np.ones((rows, columns), layers.dtype)
        if aperture.varies_over_field:
            point = torch.tensor([u, v], dtype=torch.float64)
            light *= (aperture.transmission(point[0], point[1], 0, field) > 0).numpy()
        for layer in range(count):
            d0, dx, dy = planes[layer].tolist()
            shift = K * (d0 + dx * x + dy * y - focus) / (1 - K * (dx * u + dy * v))
            hit_x, hit_y = x + shift * u, y + shift * v
            inside = (hit_x >= 0) & (hit_x < width) & (hit_y >= 0) & (hit_y < height)
            column = np.clip(hit_x, 0, width - 1).astype(np.int64)
            row = np.clip(hit_y, 0, height - 1).astype(np.int64)
            next_column, next_row = (
                np.minimum(column + 1, width - 1),
                np.minimum(row + 1, height - 1),
            )
            right, down = (hit_x - column)[..., None], (hit_y - row)[..., None]
            texels = layers[layer]
            upper = (1 - right) * texels[row, column] + right * texels[row, next_column]
            lower = (1 - right) * texels[next_row, column] + right * texels[next_row, next_column]
            colour = (1 - down) * upper + down * lower
            alpha = colour[..., 3]
            met = inside & (alpha >= EMPTY_ALPHA)
            weight = np.where(shift > 0, before, np.where(shift < 0, behind, within)) * light
            sums += np.where(met, weight, 0)[..., None] * colour
            if layer == count - 1:
                sums[..., 3] += np.where(inside & ~met, weight, 0)
            light = light * np.where(met, np.where(alpha > SOLID_ALPHA, 0, 1 - alpha), 1)
    return np.maximum(sums[..., :3], 0) / np.maximum(sums[..., 3:], 1e-5)


def example_scene(size: int = 512) -> dict[str, Any]:
    """Arguments of :func:`trace_planes`: a cut-out with a ragged rim before a slanted background.

    The picture is ``size`` pixels square; the background is in focus at its far end and the
    cut-out, which covers a third of the picture, has a blur radius of 24 pixels.
    """
    rng = np.random.default_rng(0)
    side = size + 2 * EXAMPLE_MARGIN
    layers = np.empty((2, side, side, 4), np.float32)
    texture = ndimage.gaussian_filter(rng.standard_normal((2, side, side, 3)), (0, 2, 2, 0))
    layers[..., :3] = np.clip(0.4 + texture, 0, 1)
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    angle = np.arctan2(y, x)
    rim = size / 3 * (1 + 0.15 * np.sin(7 * angle) + 0.03 * np.sin(90 * angle))
    layers[0, ..., 3] = np.clip(rim - np.hypot(x, y) + 0.5, 0, 1)
    layers[0, ..., :3] *= layers[0, ..., 3:]
    layers[1, ..., 3] = 1
    far, near = 0.1, 0.8
    planes = np.array([[near, 0, 0], [far, 0.05 / side, 0.15 / side]])
    return {
        "layers": layers,
        "planes": planes,
        "df": far,
        "K": EXAMPLE_RADIUS / (near - far),
        "window": (EXAMPLE_MARGIN, EXAMPLE_MARGIN, size, size),
    }


def _traced_example(options: argparse.Namespace) -> Callable[[int], Any]:
    scene = example_scene(options.size)
    aperture = Aperture.from_dict(options.aperture)
    return lambda index: trace_planes(
        **scene, aperture=aperture, samples_per_side=options.samples_per_side
    )


def _whole_sample(options: argparse.Namespace) -> Callable[[int], Any]:
    from data_synthesis.layer_scenes import LayerScenes

    scenes = LayerScenes(
        0,
        options.size,
        procedural_share=1.0,
        layers=(1, 1),
        aperture=Aperture.from_dict(options.aperture),
        samples_per_side=options.samples_per_side,
    )
    return scenes.arrays


WORK: dict[str, Callable[[argparse.Namespace], Callable[[int], Any]]] = {
    "tracing": _traced_example,
    "composing and tracing": _whole_sample,
}
"""For a line of the table: from the options to a function of the number of the sample."""


def _worker(name: str, options: argparse.Namespace, number: int, barrier: Any) -> None:
    try:
        torch.set_num_threads(1)
        work = WORK[name](options)
        # Compiled code is loaded, or made, at the first call.
        work(0)
        barrier.wait()
        for index in range(options.count):
            work(number * options.count + index)
        barrier.wait()
    except BaseException:
        # Nobody waits for a process that has failed.
        barrier.abort()
        raise


def samples_per_second(name: str, options: argparse.Namespace, processes: int) -> float:
    """Samples per second of wall-clock time of so many processes, without their start.

    Raises RuntimeError if one of them fails.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes + 1, timeout=PATIENCE)
    workers = [
        context.Process(target=_worker, args=(name, options, number, barrier), daemon=True)
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()
    try:
        barrier.wait()
        start = time.perf_counter()
        barrier.wait()
        seconds = time.perf_counter() - start
    except threading.BrokenBarrierError:
        raise RuntimeError("A process failed; its own message is above.") from None
    finally:
        for worker in workers:
            worker.join()
    return processes * options.count / seconds


def _processor_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Least processor time of one call, all threads of this process together."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def compare_with_numpy(options: argparse.Namespace) -> dict[str, float]:
    """Processor seconds of one picture, compiled and in numpy."""
    scene = example_scene(options.size)
    aperture = Aperture.from_dict(options.aperture)
    samples = len(aperture.lens_samples(options.samples_per_side))
    every = max(1, samples // options.numpy_samples)
    measured = len(range(0, samples, every))
    settings = {**scene, "aperture": aperture, "samples_per_side": options.samples_per_side}
    trace_planes(**settings)
    compiled = _processor_seconds(lambda: trace_planes(**settings), options.count)
    numpy = _processor_seconds(lambda: trace_with_numpy(**settings, every=every), 1)
    return {
        "lens_samples": samples,
        "lens_samples_measured_in_numpy": measured,
        "compiled_seconds": compiled,
        "numpy_seconds": numpy * samples / measured,
        "ratio": numpy * samples / measured / compiled,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status (0, or 2 after a mistake)."""
    parser = argparse.ArgumentParser(
        prog="python -m data_synthesis.speed",
        description="Measures how many samples a second are made.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", type=int, default=512, help="height = width (default 512)")
    parser.add_argument(
        "--samples-per-side", type=int, default=21, help="grid of lens samples (default 21)"
    )
    parser.add_argument("--aperture", type=json.loads, default={}, help="settings as JSON")
    parser.add_argument("--processes", type=int, default=2, help="beside one (default 2)")
    parser.add_argument("--count", type=int, default=8, help="samples per process (default 8)")
    parser.add_argument(
        "--numpy-samples",
        type=int,
        default=32,
        help="lens samples to measure numpy with, from which all are extrapolated (default 32)",
    )
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args(arguments)
    for name in ("size", "samples_per_side", "processes", "count", "numpy_samples"):
        if getattr(options, name) < 1:
            parser.error(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; wanted 1 or more"
            )
    if options.out is not None and options.out.exists():
        parser.error(f"{options.out} exists; choose another name or delete it first")
    try:
        Aperture.from_dict(options.aperture)
    except ValueError as mistake:
        parser.error(f"--aperture: {mistake}")

    from evaluation.report import hardware

    # The processes inherit it; their libraries read it when they start.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    comparison = compare_with_numpy(options)
    try:
        speeds = {
            name: {
                processes: samples_per_second(name, options, processes)
                for processes in sorted({1, options.processes})
            }
            for name in WORK
        }
    except RuntimeError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    machine = hardware()
    print(f"{machine['processor']}, {machine['cores']} cores, one thread per process")
    print(
        f"{options.size} x {options.size} px, 2 layers, {comparison['lens_samples']} lens samples "
        f"of {Aperture.from_dict(options.aperture)!r}\n"
    )
    width = max(map(len, WORK))
    print(f"{'samples per second':{width}s}  processes  per second  of one process")
    for name, by_processes in speeds.items():
        for processes, speed in by_processes.items():
            share = speed / by_processes[1]
            print(f"{name:{width}s}  {processes:9d}  {speed:10.2f}  {share:14.2f}")
    print(
        "\none core, processor seconds per picture: compiled "
        f"{comparison['compiled_seconds']:.3f}, numpy {comparison['numpy_seconds']:.1f} (from "
        f"{comparison['lens_samples_measured_in_numpy']} lens samples), "
        f"{comparison['ratio']:.0f} times as long"
    )
    if options.out is not None:
        report = {
            "hardware": machine,
            "settings": {key: value for key, value in vars(options).items() if key != "out"},
            "samples_per_second": speeds,
            "one_core": comparison,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

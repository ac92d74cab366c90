"""How long the classical renderers take as the blur grows, and how much memory."""

from __future__ import annotations

import functools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch
from tqdm import tqdm

from bokehdiff.rendering import Aperture, render_bokeh
from bokehdiff.rendering.render import METHODS
from evaluation.memory import resident_bytes, restart_peak
from evaluation.speed import motorcycle

FOCUS_DISPARITY = 0.5
"""Things before and behind the plane in focus are blurred alike."""

SMALLEST_MEGAPIXELS = 0.01


@dataclass(frozen=True)
class Case:
    """What is rendered: scikit-image's motorcycle photograph by one method at one blur."""

    method: str
    radius: float  # of the largest circle of confusion, pixels
    megapixels: float
    aperture: Aperture
    device: str

    @functools.cached_property
    def K(self) -> float:
        """Pixels of radius per unit of disparity that gives the radius."""
        _, disparity = photograph(self.megapixels, self.device)
        return self.radius / float((disparity - FOCUS_DISPARITY).abs().max())

    def render(self) -> None:
        image, disparity = photograph(self.megapixels, self.device)
        with torch.inference_mode():
            render_bokeh(
                image, disparity, FOCUS_DISPARITY, self.K,
                aperture=self.aperture, method=self.method,
            )  # fmt: skip


@functools.cache
def photograph(megapixels: float, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Image (1, 3, H, W) uint8 and disparity (1, 1, H, W) in [0, 1]."""
    photo, disparity = motorcycle(megapixels)
    image = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None]
    return image.to(device), torch.from_numpy(disparity.copy())[None, None].to(device)


@dataclass(frozen=True)
class ClassicalSpeed:
    """Time and memory of one renderer at one blur.

    Attributes:
        method: name in ``render_bokeh``.
        width, height: of the photograph, pixels.
        radius: of the largest circle of confusion, pixels.
        K: pixels of radius per unit of disparity that gives this radius.
        seconds: of one render, median of the repeats.
        ratio_to_radius_before: ``seconds`` over those of the radius before, if there is one.
        peak_megabytes: largest memory during a render, on top of what there was before it.
    """

    method: str
    width: int
    height: int
    radius: float
    K: float
    seconds: float
    ratio_to_radius_before: float | None
    peak_megabytes: float


def measure(
    methods: Sequence[str],
    radii: Sequence[float],
    megapixels: float,
    repeats: int,
    aperture: Aperture,
    device: str,
) -> list[ClassicalSpeed]:
    """Times every method at every radius.

    Raises ValueError for an unknown method, or what :func:`render_bokeh` refuses.
    """
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"There is no method {method!r}; choose from {', '.join(METHODS)}.")
    height, width = photograph(megapixels, device)[0].shape[-2:]
    rows: list[ClassicalSpeed] = []
    turns = len(methods) * len(radii) * (2 + repeats)
    with tqdm(total=turns, unit="render", leave=False, disable=None) as progress:
        for method in methods:
            before = None
            for radius in radii:
                progress.set_postfix_str(f"{method}, radius {radius:g}")
                case = Case(method, radius, megapixels, aperture, device)
                seconds = []
                for _ in range(1 + repeats):
                    seconds.append(seconds_of(case.render, device))
                    progress.update()
                median = statistics.median(seconds[1:])
                rows.append(
                    ClassicalSpeed(
                        method=method,
                        width=width,
                        height=height,
                        radius=radius,
                        K=case.K,
                        seconds=median,
                        ratio_to_radius_before=None if before is None else median / before,
                        peak_megabytes=peak_bytes(case) / 1e6,
                    )
                )
                progress.update()
                before = median
    return rows


def seconds_of(work: Callable[[], None], device: str) -> float:
    """Processor time of one thread, else wall-clock time; a GPU's work is waited for."""
    one_thread = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if one_thread else time.perf_counter
    start = clock()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return clock() - start


def peak_bytes(case: Case) -> int:
    """Largest memory during a render, on top of what there is before it."""
    if case.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(case.device)
        before = torch.cuda.memory_allocated(case.device)
        case.render()
        return torch.cuda.max_memory_allocated(case.device) - before
    # In a process of its own, where no memory lies that earlier renders left.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(_peak_here, case, torch.get_num_threads()).result()
        except BrokenProcessPool as problem:
            raise ValueError(
                f"{case.method} at radius {case.radius:g} was stopped by the system while its "
                "memory was measured, most likely because there is not enough; take fewer "
                "--megapixels."
            ) from problem


def _peak_here(case: Case, threads: int) -> int:
    torch.set_num_threads(threads)
    # What libraries set up at their first call is not the render's.
    Case(case.method, 2.0, SMALLEST_MEGAPIXELS, case.aperture, case.device).render()
    photograph(case.megapixels, case.device)
    before = resident_bytes(peak=not restart_peak())
    case.render()
    return max(0, resident_bytes(peak=True) - before)


def table(rows: Sequence[ClassicalSpeed]) -> str:
    """The rows for people."""
    width = max(len("method"), *(len(row.method) for row in rows))
    lines = [
        f"{'method':{width}s}  {'radius':>8s}  {'seconds':>9s}  {'/ before':>8s}  {'peak MB':>8s}"
    ]
    for row in rows:
        ratio = row.ratio_to_radius_before
        lines.append(
            f"{row.method:{width}s}  {row.radius:8g}  {row.seconds:9.3f}  "
            f"{'-' if ratio is None else format(ratio, '.2f'):>8s}  {row.peak_megabytes:8.0f}"
        )
    return "\n".join(lines)


def protocol(rows: Sequence[ClassicalSpeed], repeats: int, aperture: Aperture, device: str) -> str:
    """What the columns mean and how they were measured."""
    if device == "cpu" and torch.get_num_threads() == 1:
        clock = "processor time of one thread, which other programs hardly disturb"
    else:
        clock = "wall-clock time, which other programs disturb"
    return (
        f"render_bokeh on scikit-image's motorcycle photograph ({rows[0].width} x "
        f"{rows[0].height} px), disparity in [0, 1], df {FOCUS_DISPARITY:g}, {aperture!r}. radius: "
        "of the largest circle of confusion, pixels. seconds: of one render, "
        f"{clock}; median of {repeats} after one warm-up. / before: seconds over those of the "
        "radius above. peak MB: largest memory during a render in a process of its own, on top of "
        "what there was before it."
    )

"""What a photo costs in the pipeline as it gets larger: seconds and peak memory per megapixel."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from bokehdiff import TINY, BokehDiffPipeline
from bokehdiff.cli.options import parse_tiling
from evaluation.memory import resident_bytes
from evaluation.pipeline_speed import clock_in_words, markdown, milliseconds_of, peak_megabytes_of
from evaluation.speed import motorcycle

FOCUS_DISPARITY = 0.5
"""Things before and behind the plane in focus are blurred alike."""


@dataclass(frozen=True)
class Case:
    """One size of scikit-image's motorcycle photograph.

    Attributes:
        model: folder of the pipeline.
        megapixels: 10^6 pixels.
        radius: of the largest circle of confusion, pixels.
        tiling: as ``bokehdiff render --tiling`` takes it; None leaves the pipeline's default.
        dtype, device, threads: what it runs in and on.
    """

    model: str
    megapixels: float
    radius: float
    tiling: str | None
    dtype: str
    device: str
    threads: int

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of `prepare` and `render`."""
        return {} if self.tiling is None else {"tiling": parse_tiling(self.tiling)}


@dataclass(frozen=True)
class SizeSpeed:
    """Time and memory of one size.

    Attributes:
        width, height: of the photo, pixels.
        megapixels: 10^6 pixels of this photo.
        radius: of its largest circle of confusion, pixels.
        prepare_seconds, render_seconds: of the photo, once.
        seconds_per_megapixel: both, per megapixel.
        before_megabytes: memory (10^6 bytes) with the pipeline loaded and the photo read.
        peak_megabytes: largest memory while the photo is prepared and rendered.
        megabytes_per_megapixel: growth from the former to the latter, per megapixel.
    """

    width: int
    height: int
    megapixels: float
    radius: float
    prepare_seconds: float
    render_seconds: float
    seconds_per_megapixel: float
    before_megabytes: float
    peak_megabytes: float
    megabytes_per_megapixel: float


def cases(
    model: str | None, megapixels: Sequence[float], radius: float, scales: bool, **rest: Any
) -> list[Case]:
    """A case for every size.

    Args:
        model: folder; None, "tiny" and "TINY" are the checkpoint inside the package.
        megapixels: sizes.
        radius: largest circle of confusion in pixels, of the first size.
        scales: the circles grow with the sides of the photo; otherwise they are the same for all.
        rest: of `Case`.
    """
    folder = TINY if model in (None, "tiny", "TINY") else model
    return [
        Case(
            model=folder,
            megapixels=size,
            radius=radius * (size / megapixels[0]) ** 0.5 if scales else radius,
            **rest,
        )
        for size in megapixels
    ]


def measure_here(case: Case) -> SizeSpeed:
    """Prepare and render one photo; on the CPU the memory is right only in a fresh process."""
    torch.set_num_threads(case.threads)
    pipe = BokehDiffPipeline.from_pretrained(case.model, dtype=getattr(torch, case.dtype))
    pipe.to(case.device)
    # A small photo first: what libraries set up when they are first used is not the photo's.
    small, small_disparity = motorcycle(0.01)
    pipe.render(pipe.prepare(small, small_disparity, **case.options), FOCUS_DISPARITY, 1.0)
    photo, disparity = motorcycle(case.megapixels)
    K = case.radius / float(abs(disparity - FOCUS_DISPARITY).max())
    scenes: list[Any] = []
    milliseconds = []

    def prepare() -> None:
        scenes.append(pipe.prepare(photo, disparity, **case.options))

    def render() -> None:
        pipe.render(scenes[0], FOCUS_DISPARITY, K, **case.options)

    def whole() -> None:
        milliseconds.extend(milliseconds_of(work, case.device) for work in (prepare, render))

    if case.device == "cuda":
        before = torch.cuda.memory_allocated(case.device) / 1e6
    else:
        before = resident_bytes(peak=False) / 1e6
    peak = peak_megabytes_of(whole, case.device)
    height, width = disparity.shape
    pixels = height * width / 1e6
    return SizeSpeed(
        width=width,
        height=height,
        megapixels=pixels,
        radius=case.radius,
        prepare_seconds=milliseconds[0] / 1000,
        render_seconds=milliseconds[1] / 1000,
        seconds_per_megapixel=sum(milliseconds) / 1000 / pixels,
        before_megabytes=before,
        peak_megabytes=peak,
        megabytes_per_megapixel=max(0.0, peak - before) / pixels,
    )


def measure(of: Sequence[Case]) -> tuple[list[SizeSpeed], dict[str, str]]:
    """Each size in a process of its own.

    Returns:
        The rows, and for each size whose process was ended by the system, what happened.
    """
    rows: list[SizeSpeed] = []
    left_out: dict[str, str] = {}
    for case in tqdm(of, unit="size", leave=False, disable=None):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            try:
                rows.append(process.submit(measure_here, case).result())
            except BrokenProcessPool:
                left_out[f"{case.megapixels:g} megapixels"] = (
                    "its process was ended by the system, most likely for want of memory."
                )
    return rows, left_out


def spread(values: Sequence[float]) -> float:
    """How much more the largest is than the smallest, as a share of the smallest."""
    return max(values) / min(values) - 1


def table(rows: Sequence[SizeSpeed]) -> str:
    """One line for each size, in Markdown."""
    lines = [
        ["size", "MP", "radius, px", "prepare, s", "render, s", "s / MP", "peak MB", "MB / MP"]
    ]
    for row in rows:
        lines.append(
            [
                f"{row.width} x {row.height}",
                f"{row.megapixels:.3g}",
                f"{row.radius:.3g}",
                f"{row.prepare_seconds:.2f}",
                f"{row.render_seconds:.2f}",
                f"{row.seconds_per_megapixel:.3f}",
                f"{row.peak_megabytes:.0f}",
                f"{row.megabytes_per_megapixel:.0f}",
            ]
        )
    return markdown(lines)


def protocol(rows: Sequence[SizeSpeed], case: Case) -> str:
    """What the columns mean, how they were measured, and how flat the cost is."""
    whose = "torch's on the GPU" if case.device == "cuda" else "of the whole process"
    sentences = [
        "scikit-image's motorcycle photograph, scaled; "
        f"{'the checkpoint inside the package' if case.model == TINY else case.model}, tiling "
        f"{'by default' if case.tiling is None else repr(case.tiling)}. Each size is prepared and "
        "rendered once, in a process of its own that has rendered a small photo before. Time: "
        f"{clock_in_words(case.device)}. Peak memory: {whose}; MB / MP: its growth over what there "
        "was with the photo read, per megapixel."
    ]
    if len(rows) > 1:
        costs = spread([row.seconds_per_megapixel for row in rows])
        sentences.append(f"Seconds per megapixel differ by {costs:.0%} between sizes.")
    return " ".join(sentences)

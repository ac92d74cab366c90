"""How long a photograph takes, and how much memory: prepare, first render, refocus."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from PIL import Image

from bokehdiff.images import fill_holes
from evaluation.memory import resident_bytes

if TYPE_CHECKING:
    from bokehdiff import BokehDiffPipeline

Result = TypeVar("Result")

BLUR_SHARE = 0.03
"""Largest circle-of-confusion radius as a share of the photograph's width."""


@dataclass(frozen=True)
class RenderSpeed:
    """Seconds and memory of one photograph.

    Attributes:
        width, height: of the photograph, pixels.
        largest_radius: of its circles of confusion, pixels, at the first focus.
        prepare_seconds: encoding and filling holes.
        first_render_seconds: the first render of the process, warm-up of the libraries included.
        refocus_seconds: median of the renders that follow, each at another focus.
        peak_megabytes: largest memory of the whole process so far, libraries included.
    """

    width: int
    height: int
    largest_radius: float
    prepare_seconds: float
    first_render_seconds: float
    refocus_seconds: float
    peak_megabytes: float


def timed(work: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Seconds of wall-clock time until the result is there, and the result."""
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def motorcycle(megapixels: float) -> tuple[np.ndarray, np.ndarray]:
    """scikit-image's photograph and measured disparity in [0, 1], enlarged to this many pixels."""
    from skimage.data import stereo_motorcycle

    photo, _, measured = stereo_motorcycle()
    measured = torch.from_numpy(np.where(np.isfinite(measured), measured, np.nan)).float()
    disparity = fill_holes(measured[None, None])[0, 0].numpy()
    disparity = (disparity - disparity.min()) / (disparity.max() - disparity.min())
    scale = (megapixels * 1e6 / disparity.size) ** 0.5
    size = (round(photo.shape[1] * scale), round(photo.shape[0] * scale))
    photo = np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.LANCZOS))
    disparity = np.asarray(Image.fromarray(disparity).resize(size, Image.Resampling.NEAREST))
    return photo, disparity


def render_speed(pipe: BokehDiffPipeline, megapixels: float, repeats: int) -> RenderSpeed:
    """Time one photograph of this size at ``1 + repeats`` focus planes."""
    photo, disparity = motorcycle(megapixels)
    height, width = disparity.shape
    K = BLUR_SHARE * width
    focus = np.linspace(1, 0, 1 + repeats)
    device = pipe._execution_device
    prepare_seconds, scene = timed(lambda: pipe.prepare(photo, disparity), device)
    seconds = [
        timed(lambda df=df: pipe.render(scene, float(df), K, output_type="pt"), device)[0]
        for df in focus
    ]
    return RenderSpeed(
        width=width,
        height=height,
        largest_radius=K,
        prepare_seconds=prepare_seconds,
        first_render_seconds=seconds[0],
        refocus_seconds=statistics.median(seconds[1:]),
        peak_megabytes=resident_bytes(peak=True) / 1e6,
    )


def sentence(speed: RenderSpeed) -> str:
    """The measurement in words."""
    values = asdict(speed)
    return (
        "{width} x {height} px, circles of confusion up to {largest_radius:.0f} px: prepare "
        "{prepare_seconds:.2f} s, first render {first_render_seconds:.2f} s, refocus "
        "{refocus_seconds:.2f} s, peak memory {peak_megabytes:.0f} MB"
    ).format(**values)

"""What nodes share: fields that several ask for, ComfyUI's tensors, and its bar of progress.

ComfyUI's IMAGE is (B, H, W, C) in [0, 1], its MASK (B, H, W), both on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from bokehdiff.images import as_disparity_batch, as_image_batch
from bokehdiff.lens import DEFAULT_STRENGTH

if TYPE_CHECKING:
    from bokehdiff.depth import DepthEstimate

# What several nodes ask for.
PHOTO = ("IMAGE", {"tooltip": "Photographs in which all is sharp."})
ONE_PHOTO = ("IMAGE", {"tooltip": "One photograph in which all is sharp."})
FOCUS = ("FOCUS", {"tooltip": "What is in focus."})
RENDERER = ("BOKEH_RENDERER", {"tooltip": "What makes the blur."})
DISPARITY = ("DISPARITY", {"tooltip": "How near everything is, as large as the photograph."})
STRENGTH = (
    "FLOAT",
    {
        "default": DEFAULT_STRENGTH,
        "min": 0.0,
        "max": 10000.0,
        "step": 0.5,
        "tooltip": "Blur strength: pixels of blur radius per unit of disparity. The radius is "
        "K * |disparity - disparity in focus|. If the disparity is in 1/metres, so is this. "
        "Not used while a camera is connected.",
    },
)
STRENGTHS = (
    "STRING",
    {
        "default": "10, 20, 30",
        "tooltip": "Blur strength of each picture: pixels of blur radius per 1/metre.",
    },
)
CAMERA = (
    "BOKEH_CAMERA",
    {"tooltip": "Takes the place of K: while it is connected, K is not used."},
)
WHOLE_SUBJECT = (
    "BOOLEAN",
    {"default": False, "tooltip": "Keep all of the subject sharp, not one plane of it."},
)


def device() -> str:
    """Where models compute."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def as_photos(image: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) of ComfyUI's IMAGE, checked."""
    return as_image_batch(image.movedim(-1, 1))


def one_photo(image: torch.Tensor) -> torch.Tensor:
    """(1, 3, H, W) of an IMAGE that holds one photograph."""
    if len(image) != 1:
        raise ValueError(
            f"image is a batch of {len(image)}; wanted one photograph. ImageFromBatch takes one "
            "out of a batch."
        )
    return as_photos(image)


def as_comfy_image(pictures: torch.Tensor) -> torch.Tensor:
    """ComfyUI's IMAGE of (B, 3, H, W)."""
    return pictures.movedim(1, -1).float().cpu().contiguous()


def nearness_of(disparity: DepthEstimate, photos: torch.Tensor) -> torch.Tensor:
    """The disparity map (B, 1, H, W) of photographs (B, 3, H, W), checked against them."""
    count, _, height, width = photos.shape
    return as_disparity_batch(disparity.disparity, count, height, width, disparity.metric)


def progress_bar(count: int) -> Any:
    """ComfyUI's bar, of which ``update(1)`` is called `count` times, and which also lets a person
    interrupt; outside ComfyUI one of text."""
    try:
        from comfy.utils import ProgressBar
    except ImportError:
        return tqdm(total=count, disable=count < 2)
    return ProgressBar(count)


def progress(count: int) -> Iterator[int]:
    """The numbers from 0 to count - 1, with a bar."""
    bar = progress_bar(count)
    for index in range(count):
        yield index
        bar.update(1)


def numbers(text: str, name: str, example: str) -> list[float]:
    """The numbers in a text, separated by commas or spaces."""
    try:
        return [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(
            f"{name} is {text!r}; wanted numbers separated by commas, for instance {example}."
        ) from None


def number(default: float, low: float, high: float, step: float, tooltip: str) -> tuple[str, Any]:
    """An input of one number. The editor rounds to as many digits as ``step`` has."""
    return (
        "FLOAT",
        {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip},
    )


def pixel(tooltip: str) -> tuple[str, Any]:
    """An input of one column or row."""
    return ("INT", {"default": 0, "min": 0, "max": 100000, "tooltip": tooltip})

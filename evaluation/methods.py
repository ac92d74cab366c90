"""What can be evaluated: renderers by name, model folders, and folders of finished pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bokehdiff.images import linear_to_srgb, srgb_to_linear
from evaluation.metrics import quantise_to_8_bit

__all__ = [
    "BOOST",
    "Method",
    "Photograph",
    "check_device",
    "method_by_name",
    "predictions_in",
    "read_picture",
]

BOOST = "+boost"
"""Ending of a classical renderer's name: clipped highlights get light back before blurring."""

GAUSSIAN_SIGMAS = (0.4, 0.7, 1.0, 1.5, 2.2, 3.2, 4.5, 6.5, 9.0, 13.0)


@dataclass(frozen=True)
class Photograph:
    """One photograph and one lens setting: what a method is given, and what it should produce."""

    scene: str
    setting: str  # names the lens setting within the scene
    image: np.ndarray  # (H, W, 3) uint8 sRGB, all in focus
    light: np.ndarray  # (H, W, 3) float32 linear light of the same, not cut off at white
    disparity: np.ndarray  # (H, W) float32, 1/distance, larger is nearer
    disparity_range: tuple[float, float]  # smallest and largest disparity of the scene
    df: float  # disparity of the plane in focus
    K: float  # pixels of blur radius per unit of disparity
    truth: np.ndarray  # (H, W, 3) uint8 sRGB, what the lens would have taken

    @property
    def name(self) -> str:
        """File name (without suffix) under which predictions of it are kept."""
        return f"{self.scene}_{self.setting}"


@dataclass(frozen=True)
class Method:
    """A named way of turning a :class:`Photograph` into (H, W, 3) float sRGB in [0, 1]."""

    name: str
    description: str
    render: Callable[[Photograph], np.ndarray]
    timed: bool = True


def check_device(device: str) -> None:
    """Raises ValueError for a device that torch does not know or this machine does not have."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here: {reason}") from problem


def method_by_name(name: str, device: str = "cpu", given: str = "srgb8") -> Method:
    """The method of that name, or the pipeline in the model folder of that name.

    ``tiny`` is the checkpoint inside the package; ``layered``, ``scatter``, ``pyramid`` are the
    classical renderers, with ``+boost`` after clipped highlights were given light back;
    ``gaussian`` is one global Gaussian whose width is chosen per image by looking at the truth (a
    bound, not a competitor); ``identity`` returns the photograph. ``given`` says what it sees:
    ``srgb8`` (the 8-bit photograph) or ``linear`` (linear light that is not cut off at white).
    Raises ValueError for anything else that is not a folder, and for a method that does not take
    what is given.
    """
    from bokehdiff.rendering.render import METHODS

    linear = given == "linear"
    source = "linear light that is not cut off at white" if linear else "8-bit sRGB"
    if name == "identity":
        return Method(
            name,
            f"the all-in-focus photograph itself ({source})",
            lambda photograph: _identity(photograph, linear),
        )
    if name == "gaussian":
        return Method(
            name,
            f"one global Gaussian in linear light ({source}); its sigma, out of "
            f"{', '.join(map(str, GAUSSIAN_SIGMAS))} px, is chosen per image with the truth",
            lambda photograph: _best_gaussian(photograph, linear),
        )
    base = name.removesuffix(BOOST)
    if base in METHODS:
        if linear and base != name:
            raise ValueError(
                f"--method {name} guesses highlights that --input linear does not cut off; wanted "
                f"--method {base}, or --input srgb8."
            )
        highlights = "hdr" if linear else "boost" if base != name else None
        return Method(
            name,
            f"bokehdiff.rendering.render_bokeh(method={base!r}, highlights={highlights!r}), metric "
            "disparity",
            lambda photograph: _classical(photograph, base, highlights, device),
        )
    classical = ", ".join(METHODS)
    if name == "tiny" or Path(name).is_dir():
        if linear:
            raise ValueError(
                f"--method {name} takes photographs that are cut off at white; wanted one of "
                f"{classical}, gaussian, identity with --input linear."
            )
        import bokehdiff

        if name == "tiny":
            return _pipeline(name, Path(bokehdiff.TINY), device, "bokehdiff.TINY")
        return _pipeline(Path(name).resolve().name, Path(name), device, repr(name))
    raise ValueError(
        f"--method {name} is neither one of tiny, {classical}, gaussian, identity, nor "
        f"{next(iter(METHODS))}{BOOST} or another with boosted highlights, nor a folder with a "
        "model."
    )


def predictions_in(folder: str | Path) -> Method:
    """Finished pictures: ``folder/<scene>_<setting>.png`` (for instance s01_f1_r28.png)."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder} with predictions.")

    def read(photograph: Photograph) -> np.ndarray:
        file = folder / f"{photograph.name}.png"
        if not file.is_file():
            raise ValueError(
                f"The prediction {file} is missing; wanted one PNG for each lens setting, or "
                "--scenes to name the scenes that are there."
            )
        return read_picture(file) / 255.0

    return Method("predictions", f"pictures read from {folder}", read, timed=False)


def read_picture(file: Path) -> np.ndarray:
    """(H, W, 3) uint8 of a picture file; ValueError if it is missing or damaged."""
    if not file.is_file():
        raise ValueError(f"{file} is missing.")
    try:
        with Image.open(file) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError as problem:
        raise ValueError(f"{file} cannot be read as a picture: {problem}.") from problem


def _identity(photograph: Photograph, linear: bool) -> np.ndarray:
    return linear_to_srgb(photograph.light) if linear else photograph.image / 255.0


def _best_gaussian(photograph: Photograph, linear: bool) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    light = photograph.light if linear else srgb_to_linear(photograph.image / 255.0)
    truth = photograph.truth / 255.0
    best, smallest_error = _identity(photograph, linear), np.inf
    for sigma in GAUSSIAN_SIGMAS:
        blurred = linear_to_srgb(gaussian_filter(light, (sigma, sigma, 0), truncate=3))
        error = float(((quantise_to_8_bit(blurred) - truth) ** 2).mean())
        if error < smallest_error:
            best, smallest_error = blurred, error
    return best


def _as_tensors(photograph: Photograph, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Image (1, 3, H, W) in [0, 1] and metric disparity (1, 1, H, W), float32."""
    image = torch.from_numpy(photograph.image / np.float32(255)).permute(2, 0, 1)[None]
    disparity = torch.from_numpy(photograph.disparity)[None, None]
    return image.to(device), disparity.to(device)


def _as_array(image: torch.Tensor) -> np.ndarray:
    return image[0].permute(1, 2, 0).to(device="cpu", dtype=torch.float64).numpy()


def _classical(
    photograph: Photograph, method: str, highlights: str | None, device: str
) -> np.ndarray:
    from bokehdiff.rendering import render_bokeh

    image, disparity = _as_tensors(photograph, device)
    if highlights == "hdr":
        image = torch.from_numpy(photograph.light).permute(2, 0, 1)[None].to(device)
    blurred = render_bokeh(
        image, disparity, photograph.df, photograph.K,
        method=method, highlights=highlights, metric=True,
    )  # fmt: skip
    return _as_array(linear_to_srgb(blurred) if highlights == "hdr" else blurred)


def _pipeline(name: str, folder: Path, device: str, shown: str) -> Method:
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} holds no model: wanted a folder that save_pretrained wrote, with a "
            "model_index.json."
        )
    from bokehdiff import BokehDiffPipeline

    pipeline = BokehDiffPipeline.from_pretrained(folder).to(device)
    pipeline.set_progress_bar_config(disable=True)

    def render(photograph: Photograph) -> np.ndarray:
        image, disparity = _as_tensors(photograph, device)
        low, high = photograph.disparity_range
        # The same circles of confusion in disparity between 0 and 1.
        disparity = ((disparity - low) / (high - low)).clamp(0, 1)
        df, K = (photograph.df - low) / (high - low), photograph.K * (high - low)
        return _as_array(pipeline(image, disparity, df, K, output_type="pt").images)

    return Method(
        name,
        f"BokehDiffPipeline.from_pretrained({shown}), one step, disparity mapped to [0, 1]",
        render,
    )

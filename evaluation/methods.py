"""What can be evaluated: renderers by name, model folders, and folders of finished pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evaluation.metrics import quantise_to_8_bit

__all__ = [
    "METHOD_NAMES",
    "Method",
    "Photograph",
    "check_device",
    "method_by_name",
    "predictions_in",
    "read_picture",
]

METHOD_NAMES = ("tiny", "scatter", "gaussian", "identity")

GAUSSIAN_SIGMAS = (0.4, 0.7, 1.0, 1.5, 2.2, 3.2, 4.5, 6.5, 9.0, 13.0)


@dataclass(frozen=True)
class Photograph:
    """One photograph and one lens setting: what a method is given, and what it should produce."""

    scene: str
    setting: str  # names the lens setting within the scene
    image: np.ndarray  # (H, W, 3) uint8 sRGB, all in focus
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


def method_by_name(name: str, device: str = "cpu") -> Method:
    """The method of that name, or the pipeline in the model folder of that name.

    ``tiny`` is the checkpoint inside the package; ``scatter`` the classical renderer; ``gaussian``
    one global Gaussian whose width is chosen per image by looking at the truth (a bound, not a
    competitor); ``identity`` returns the photograph. Raises ValueError for anything else that is
    not a folder.
    """
    if name == "identity":
        return Method(name, "the all-in-focus photograph itself", _identity)
    if name == "gaussian":
        return Method(
            name,
            "one global Gaussian in linear light; its sigma, out of "
            f"{', '.join(map(str, GAUSSIAN_SIGMAS))} px, is chosen per image with the truth",
            _best_gaussian,
        )
    if name == "scatter":
        return Method(
            name,
            "bokehdiff.rendering.render_bokeh(method='scatter'): depth-ordered scatter in linear "
            "light, metric disparity",
            lambda photograph: _classical(photograph, name, device),
        )
    if name == "tiny":
        import bokehdiff

        return _pipeline(name, Path(bokehdiff.TINY), device, "bokehdiff.TINY")
    if Path(name).is_dir():
        return _pipeline(Path(name).resolve().name, Path(name), device, repr(name))
    raise ValueError(
        f"--method {name} is neither one of {', '.join(METHOD_NAMES)} nor a folder with a model."
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


def _identity(photograph: Photograph) -> np.ndarray:
    return photograph.image / 255.0


def _best_gaussian(photograph: Photograph) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    from bokehdiff.images import linear_to_srgb, srgb_to_linear

    light = srgb_to_linear(photograph.image / 255.0)
    truth = photograph.truth / 255.0
    best, smallest_error = photograph.image / 255.0, np.inf
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


def _classical(photograph: Photograph, method: str, device: str) -> np.ndarray:
    from bokehdiff.rendering import render_bokeh

    image, disparity = _as_tensors(photograph, device)
    df, K = photograph.df, photograph.K
    return _as_array(render_bokeh(image, disparity, df, K, method=method, metric=True))


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

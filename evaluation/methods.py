"""What can be evaluated: renderers by name, models, functions, and folders of finished pictures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bokehdiff.images import linear_to_srgb, srgb_to_linear
from evaluation.callables import function_named, is_callable_name, rendering_with
from evaluation.metrics import quantise_to_8_bit
from evaluation.photographs import Photograph, read_picture

__all__ = [
    "BOOST",
    "IDENTITY",
    "PHYSICS",
    "SHIPPED",
    "Method",
    "check_device",
    "holds_bokehflow",
    "method_by_name",
    "predictions_in",
    "split_name",
]

IDENTITY = "identity"
"""Name of the method that returns the photograph."""

BOOST = "+boost"
"""Ending of a classical renderer's name: clipped highlights get light back before blurring."""

SHIPPED = "flow"
"""Name of the BokehFlow inside the package."""

PHYSICS = "-physics"
"""Ending of a BokehFlow's name: what it renders before it adds anything of its own."""

GAUSSIAN_SIGMAS = (0.0, 0.4, 0.7, 1.0, 1.5, 2.2, 3.2, 4.5, 6.5, 9.0, 13.0)

PREDICTION_SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Method:
    """A named way of turning a :class:`Photograph` into (H, W, 3) float sRGB in [0, 1]."""

    name: str
    description: str  # what it is, and what it is given
    render: Callable[[Photograph], np.ndarray]
    timed: bool = True  # whether it computes the picture here
    needs_K: bool = True  # whether photographs have to have a K
    device: str = "cpu"  # where it computes


def check_device(device: str) -> None:
    """Raises ValueError for a device that torch does not know or this machine does not have."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here: {reason}") from problem


def holds_bokehflow(folder: str | Path) -> bool:
    """Whether the folder holds a BokehFlow, as a model or as a pipeline."""
    for file in (Path(folder) / "model_index.json", Path(folder) / "config.json"):
        if file.is_file():
            try:
                name = json.loads(file.read_text(encoding="utf-8")).get("_class_name")
            except (ValueError, AttributeError):
                return False
            return str(name).startswith("BokehFlow")
    return False


def method_by_name(name: str, device: str = "cpu", given: str = "srgb8") -> Method:
    """The method of that name, the pipeline in the model folder, or the function, of that name.

    ``tiny`` is the checkpoint inside the package; ``layered``, ``scatter``, ``pyramid`` are the
    classical renderers, with ``+boost`` after clipped highlights were given light back;
    ``gaussian`` is one global Gaussian whose width is chosen per image by looking at the truth (a
    bound, not a competitor); ``flow`` is the BokehFlow inside the package, ``flow-physics`` its
    physics rendering alone, as FOLDER and FOLDER-physics are those of a BokehFlow in a folder;
    ``identity`` returns the photograph; ``module:function`` and ``file.py:function`` are Python
    functions (see :mod:`evaluation.callables`). ``given`` says what it sees: ``srgb8`` (the 8-bit
    photograph) or ``linear`` (linear light that is not cut off at white). Raises ValueError for
    anything else that is not a folder, and for a method that does not take what is given.
    """
    from bokehdiff.rendering.render import METHODS

    linear = given == "linear"
    source = "linear light that is not cut off at white" if linear else "8-bit sRGB"
    if name == IDENTITY:
        return Method(
            name,
            f"the all-in-focus photograph itself ({source})",
            lambda photograph: _identity(photograph, linear),
            needs_K=False,
        )
    if name == "gaussian":
        return Method(
            name,
            f"one global Gaussian in linear light ({source}); its sigma, out of "
            f"{', '.join(map(str, GAUSSIAN_SIGMAS))} px, is chosen per image with the truth",
            lambda photograph: _best_gaussian(photograph, linear),
            needs_K=False,
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
            f"bokehdiff.rendering.render_bokeh(method={base!r}, highlights={highlights!r}), given "
            f"{source}, disparity, df and K",
            lambda photograph: _classical(photograph, base, highlights, device),
            device=device,
        )
    classical = ", ".join(METHODS)
    of_network = name if Path(name).is_dir() else name.removesuffix(PHYSICS)
    is_bokehflow = of_network == SHIPPED or holds_bokehflow(of_network)
    if name == "tiny" or is_bokehflow or Path(name).is_dir() or is_callable_name(name):
        if linear:
            raise ValueError(
                f"--method {name} takes photographs that are cut off at white; wanted one of "
                f"{classical}, gaussian, identity with --input linear."
            )
        if name == "tiny":
            import bokehdiff

            return _pipeline(name, Path(bokehdiff.TINY), device, "bokehdiff.TINY")
        if is_bokehflow:
            return _bokehflow(of_network, device, physics_alone=of_network != name)
        if Path(name).is_dir():
            return _pipeline(Path(name).resolve().name, Path(name), device, repr(name))
        place, _, function = name.rpartition(":")
        return Method(
            # Without folders, as pictures are kept in a folder of this name.
            f"{Path(place).name}:{function}",
            f"the Python function {name}, given {source}, disparity in the unit of the data set, "
            "df and K",
            rendering_with(function_named(name)),
        )
    raise ValueError(
        f"--method {name} is neither one of tiny, {SHIPPED}, {SHIPPED}{PHYSICS}, {classical}, "
        f"gaussian, identity, nor {next(iter(METHODS))}{BOOST} or another with boosted highlights, "
        "nor a folder with a model, nor a Python function (module:function or "
        "path/to/file.py:function)."
    )


def split_name(text: str) -> tuple[str | None, str]:
    """(NAME, WHAT) of ``NAME=WHAT``, and (None, WHAT) without a name.

    Raises ValueError for a name that cannot be that of a folder, in which pictures are kept.
    """
    name, equals, what = text.partition("=")
    if not equals or Path(text).exists():
        return None, text
    if not name or not what or Path(name).name != name or name == "..":
        raise ValueError(
            f"{text!r} has no name that can be used; wanted NAME=WHAT, the name without slashes."
        )
    return name, what


def predictions_in(folder: str | Path, name: str = "predictions") -> Method:
    """Finished pictures: ``folder/<scene>_<setting>.png`` (for instance s01_f1_r28.png).

    ``.jpg`` and ``.jpeg`` are read, too. ValueError if there is no such folder; rendering raises it
    for a picture that is missing, there twice or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder} with predictions.")

    def read(photograph: Photograph) -> np.ndarray:
        files = [folder / f"{photograph.name}{suffix}" for suffix in PREDICTION_SUFFIXES]
        found = [file for file in files if file.is_file()]
        if not found:
            raise ValueError(
                f"The prediction {files[0]} is missing; wanted one picture for each lens setting, "
                "or --scenes to name the scenes that are there."
            )
        if len(found) > 1:
            raise ValueError(
                f"There are {' and '.join(map(str, found))}; wanted one prediction for each lens "
                "setting."
            )
        return read_picture(found[0]) / 255.0

    return Method(
        name,
        f"pictures read from {folder}; what their maker was given is not known here",
        read,
        timed=False,
        needs_K=False,
    )


def _light_of(photograph: Photograph) -> np.ndarray:
    if photograph.light is None:
        raise ValueError(
            f"{photograph.name} has no linear light beside the 8-bit photograph; wanted "
            "--input srgb8 for this data set."
        )
    return photograph.light


def _identity(photograph: Photograph, linear: bool) -> np.ndarray:
    return linear_to_srgb(_light_of(photograph)) if linear else photograph.image / 255.0


def _best_gaussian(photograph: Photograph, linear: bool) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    light = _light_of(photograph) if linear else srgb_to_linear(photograph.image / 255.0)
    truth = photograph.truth / 255.0

    def error(picture: np.ndarray) -> float:
        return float(((quantise_to_8_bit(picture) - truth) ** 2).mean())

    blurred = (
        linear_to_srgb(gaussian_filter(light, (sigma, sigma, 0), truncate=3))
        for sigma in GAUSSIAN_SIGMAS
    )
    return min(blurred, key=error)


def _not_negative(photograph: Photograph) -> Photograph:
    """The same circles of confusion with disparity and df that are at least 0."""
    lowest = min(float(photograph.disparity.min()), photograph.df, 0.0)
    if lowest == 0:
        return photograph
    return dataclasses.replace(
        photograph,
        disparity=photograph.disparity - np.float32(lowest),
        df=photograph.df - lowest,
    )


def _as_tensors(photograph: Photograph, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Image (1, 3, H, W) in [0, 1] and disparity (1, 1, H, W) of the data set, float32."""
    image = torch.from_numpy(photograph.image / np.float32(255)).permute(2, 0, 1)[None]
    disparity = torch.from_numpy(photograph.disparity)[None, None]
    return image.to(device), disparity.to(device)


def _as_array(image: torch.Tensor) -> np.ndarray:
    return image[0].permute(1, 2, 0).to(device="cpu", dtype=torch.float64).numpy()


def _classical(
    photograph: Photograph, method: str, highlights: str | None, device: str
) -> np.ndarray:
    from bokehdiff.rendering import render_bokeh

    photograph = _not_negative(photograph)
    image, disparity = _as_tensors(photograph, device)
    if highlights == "hdr":
        image = torch.from_numpy(_light_of(photograph)).permute(2, 0, 1)[None].to(device)
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
    from evaluation.pipeline_rendering import render_with

    pipeline = BokehDiffPipeline.from_pretrained(folder).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return Method(
        name,
        f"BokehDiffPipeline.from_pretrained({shown}), one step, given 8-bit sRGB, disparity "
        "mapped to [0, 1], df and K",
        lambda photograph: render_with(pipeline, photograph),
        device=device,
    )


def _bokehflow(folder: str, device: str, physics_alone: bool) -> Method:
    from evaluation.flow_networks import blurred_by, described, read_network

    network = read_network(folder, device)
    part = "what it renders before it adds anything of its own" if physics_alone else "whole"
    return Method(
        f"{Path(folder).resolve().name}{PHYSICS if physics_alone else ''}",
        f"BokehFlow ({described(network)}), {part}, given 8-bit sRGB, disparity mapped to [0, 1], "
        "df and K",
        lambda photograph: blurred_by(network, photograph, physics_alone),
        device=device,
    )

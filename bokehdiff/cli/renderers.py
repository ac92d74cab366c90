"""What makes the blur: a network or a classical renderer, behind one call."""

from __future__ import annotations

import enum
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import FLOW_NANO, TINY
from .speech import Mistake

if TYPE_CHECKING:
    import torch

    from ..lens import LensSetting
    from ..rendering import Aperture
    from ..rendering.highlights import HighlightBoost


class Method(str, enum.Enum):
    """How the blur is made."""

    model = "model"
    flow = "flow"
    layered = "layered"
    scatter = "scatter"
    pyramid = "pyramid"


NETWORKS = (Method.model, Method.flow)

CLASSICAL_METHODS = ", ".join(method.value for method in Method if method not in NETWORKS)

Refocus = Callable[["LensSetting"], "torch.Tensor"]
"""refocus(lens): the picture (1, 3, H, W) that the lens takes, encoded as the photograph was."""

Prepare = Callable[["torch.Tensor", "torch.Tensor", bool, bool], Refocus]
"""prepare(image, disparity, metric, linear), with an image (1, 3, H, W) that `linear` says to be
linear light, else display-encoded in [0, 1]; done once per photograph."""


def usable_device(device: str | None) -> str:
    """The device to compute on."""
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise Mistake(f"--device {device} cannot be used ({reason}); try --device cpu.") from None
    return device


def load_renderer(
    method: Method,
    device: str,
    *,
    model: str | None = None,
    weights: str | None = None,
    tiling: Any = "auto",
    aperture: Aperture | None = None,
    boost: HighlightBoost | None = None,
) -> Prepare:
    """The renderer, with its model loaded."""
    if model is not None and method not in NETWORKS:
        raise Mistake(
            f"--model goes with --method model or flow, not with --method {method.value}."
        )
    if weights is not None and method is Method.flow:
        raise Mistake("--weights goes with --method model, not with --method flow.")
    if weights is not None and model is None:
        raise Mistake("--weights goes with --model, the model that they were trained for.")
    if method is Method.model:
        return _diffusion(device, model, weights, tiling)
    if method is Method.flow:
        return _flow(device, model, aperture, boost)
    return _classical(method, device, aperture, boost)


def _classical(
    method: Method, device: str, aperture: Aperture | None, boost: HighlightBoost | None
) -> Prepare:
    from ..rendering import render_bokeh

    def prepare(
        image: torch.Tensor, disparity: torch.Tensor, metric: bool, linear: bool
    ) -> Refocus:
        image, disparity = image.to(device), disparity.to(device)

        def refocus(lens: LensSetting) -> torch.Tensor:
            lens = lens.to(device)
            return render_bokeh(
                image, lens.in_one_plane(disparity), lens.df, lens.K,
                aperture=aperture, method=method.value, highlights="hdr" if linear else boost,
                metric=metric,
            )  # fmt: skip

        return refocus

    return prepare


def _diffusion(device: str, model: str | None, weights: str | None, tiling: Any) -> Prepare:
    folder = TINY if model is None else os.path.expanduser(model)
    if model is None and not os.path.isdir(folder):
        raise Mistake(
            f"The model inside the package is missing ({folder}); reinstall bokehdiff, or use "
            "--model."
        )
    if os.path.isdir(folder) and not os.path.isfile(os.path.join(folder, "model_index.json")):
        raise Mistake(
            f"{folder} is no model: it has no model_index.json; wanted a folder written by "
            "save_pretrained, or a hub id."
        )
    from diffusers.utils import logging

    from ..pipelines import BokehDiffPipeline

    if os.path.isdir(folder):  # a download has something to show, a folder loads at once
        logging.disable_progress_bar()
    single_file = Path(folder).is_file()
    load = BokehDiffPipeline.from_single_file if single_file else BokehDiffPipeline.from_pretrained
    pipe = load(folder)
    if weights is not None:
        pipe.load_bokeh_weights(weights)
    pipe.to(device)

    def prepare(
        image: torch.Tensor, disparity: torch.Tensor, metric: bool, linear: bool
    ) -> Refocus:
        scene = pipe.prepare(image, disparity, metric, tiling=tiling)

        def refocus(lens: LensSetting) -> torch.Tensor:
            in_focus = (lens.df, lens.df_nearer)
            rendered: torch.Tensor = pipe.render(
                scene, K=lens.K, focus_range=in_focus, tiling=tiling, output_type="pt"
            )[0]
            return rendered

        return refocus

    return prepare


def _flow(
    device: str, model: str | None, aperture: Aperture | None, boost: HighlightBoost | None
) -> Prepare:
    if boost is not None:
        raise Mistake(
            "--highlights boost does not go with --method flow, which takes photographs cut off at "
            f"white; wanted --method {CLASSICAL_METHODS}."
        )
    from ..images import InputRepairedWarning, srgb_to_linear
    from ..linear_images import cut_off_at_white
    from ..pipelines.bokehflow import BokehFlowPipeline
    from ..pipelines.bokehflow_loading import CLAMPED_SHARE_ALLOWED, check_aperture

    pipe = BokehFlowPipeline.from_pretrained(FLOW_NANO if model is None else model).to(device)
    check_aperture(pipe.model, aperture)

    def prepare(
        image: torch.Tensor, disparity: torch.Tensor, metric: bool, linear: bool
    ) -> Refocus:
        shown = cut_off_at_white(image, "The photograph") if linear else image
        scene = pipe.prepare(shown, disparity, metric)
        told_of_clamping = False

        def refocus(lens: LensSetting) -> torch.Tensor:
            nonlocal told_of_clamping
            with warnings.catch_warnings():
                if told_of_clamping:  # once per photograph, whatever the number of pictures
                    warnings.simplefilter("ignore", InputRepairedWarning)
                in_focus = (lens.df, lens.df_nearer)
                blurred = pipe.render(
                    scene, K=lens.K, focus_range=in_focus, aperture=aperture, output_type="pt"
                )
            told_of_clamping |= bool((blurred.clamped_share > CLAMPED_SHARE_ALLOWED).any())
            picture: torch.Tensor = blurred.images
            return srgb_to_linear(picture) if linear else picture

        return refocus

    return prepare

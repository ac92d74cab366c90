"""Nodes that blur: what renders, what is in focus, which camera, one picture, a focus pull.

What runs along the links, besides ComfyUI's own types:

``BOKEH_RENDERER``
    a ``BokehDiffPipeline``, a ``BokehFlowPipeline`` or a :class:`ClassicalRenderer`
``DISPARITY``
    a ``bokehdiff.depth.DepthEstimate``: the map (B, 1, H, W), and whether it is in 1/metres
``FOCUS``
    arguments of ``bokehdiff.lens.choose_lens`` that say what is in focus
``BOKEH_CAMERA``
    those that say how strong the blur is: a ``bokehdiff.Camera``, and distances
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import bokehdiff
from bokehdiff.camera import ASSUMED_FOCUS_DISTANCE_M, FULL_FRAME_WIDTH_MM
from bokehdiff.easing import eased
from bokehdiff.lens import LensSetting, choose_lens

from .shared import (
    CAMERA,
    DISPARITY,
    FOCUS,
    ONE_PHOTO,
    PHOTO,
    RENDERER,
    STRENGTH,
    WHOLE_SUBJECT,
    as_comfy_image,
    as_photos,
    device,
    nearness_of,
    number,
    one_photo,
    pixel,
    progress,
)

if TYPE_CHECKING:
    from bokehdiff.depth import DepthEstimate

BOKEHDIFF, BOKEHFLOW = "BokehDiff or SDXL", "BokehFlow"


# --- What renders ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassicalRenderer:
    """How ``bokehdiff.render_bokeh`` is called."""

    method: str
    aperture: bokehdiff.Aperture
    highlights: str | None


class LoadModel:
    """Loads a network that blurs. TINY and FLOW_NANO are inside bokehdiff."""

    DESCRIPTION = __doc__
    CATEGORY = "bokehdiff"
    FUNCTION = "load"
    RETURN_TYPES = ("BOKEH_RENDERER",)
    RETURN_NAMES = ("renderer",)
    OUTPUT_TOOLTIPS = ("For the nodes that render.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (
                    ["TINY", "FLOW_NANO", BOKEHDIFF, BOKEHFLOW],
                    {
                        "tooltip": "TINY: the best inside bokehdiff. FLOW_NANO: fast. The others "
                        "are loaded from folder_or_hub_id."
                    },
                ),
            },
            "optional": {
                "folder_or_hub_id": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Where a model of the other kinds lies, for instance "
                        "stabilityai/stable-diffusion-xl-base-1.0.",
                    },
                ),
                "weights": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Trained weights on top of SDXL: folder or hub id.",
                    },
                ),
                "dtype": (
                    ["float32", "bfloat16", "float16"],
                    {"tooltip": "In which to compute; the last two are for GPUs."},
                ),
            },
        }

    def load(
        self, model: str, folder_or_hub_id: str = "", weights: str = "", dtype: str = "float32"
    ) -> tuple[Any]:
        inside = {"TINY": bokehdiff.TINY, "FLOW_NANO": bokehdiff.FLOW_NANO}
        if model in inside and folder_or_hub_id:
            raise ValueError(
                f"folder_or_hub_id is {folder_or_hub_id!r}, but model is {model}, which is inside "
                f"bokehdiff; wanted model {BOKEHDIFF!r} or {BOKEHFLOW!r}, or no folder_or_hub_id."
            )
        if model not in inside and not folder_or_hub_id:
            raise ValueError(
                f"folder_or_hub_id is empty; wanted the folder or hub id of a {model} model."
            )
        is_flow = model in ("FLOW_NANO", BOKEHFLOW)
        if is_flow and weights:
            raise ValueError(f"weights go on top of {BOKEHDIFF}; wanted none with {model}.")
        kind = bokehdiff.BokehFlowPipeline if is_flow else bokehdiff.BokehDiffPipeline
        pipe = kind.from_pretrained(
            inside.get(model, folder_or_hub_id), dtype=getattr(torch, dtype)
        )
        if weights:
            pipe.load_bokeh_weights(weights)
        return (pipe.to(device()),)


class ClassicalRendererNode:
    """Blurs by optics, without a network, through an opening of any shape."""

    DESCRIPTION = __doc__
    CATEGORY = "bokehdiff"
    FUNCTION = "choose"
    RETURN_TYPES = ("BOKEH_RENDERER",)
    RETURN_NAMES = ("renderer",)
    OUTPUT_TOOLTIPS = ("For the nodes that render.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "method": (
                    ["layered", "scatter", "pyramid"],
                    {
                        "tooltip": "layered: the most faithful. scatter: every pixel on its own. "
                        "pyramid: a fast preview."
                    },
                ),
            },
            "optional": {
                "blades": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 64,
                        "tooltip": "Blades of the iris; 0 for a disc.",
                    },
                ),
                "rotation": number(0.0, -360.0, 360.0, 0.5, "Degrees by which blades are turned."),
                "roundness": number(
                    0.0, 0.0, 1.0, 0.05, "Bends the blades from straight (0) to the circle (1)."
                ),
                "cat_eye": number(
                    0.0, 0.0, 1.0, 0.05, "Optical vignetting: lemons towards the corners."
                ),
                "squeeze": number(
                    1.0, 0.25, 4.0, 0.05, "Anamorphic: width over height of the discs."
                ),
                "boost_highlights": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Guess the light of lamps that are cut off at white.",
                    },
                ),
            },
        }

    def choose(
        self, method: str, boost_highlights: bool = False, **opening: float
    ) -> tuple[ClassicalRenderer]:
        highlights = "boost" if boost_highlights else None
        return (ClassicalRenderer(method, bokehdiff.Aperture(**opening), highlights),)


# --- What is in focus -----------------------------------------------------------------------------


class FocusPoint:
    """Focuses on what is at a pixel."""

    DESCRIPTION = __doc__
    CATEGORY = "bokehdiff"
    FUNCTION = "choose"
    RETURN_TYPES = ("FOCUS",)
    RETURN_NAMES = ("focus",)
    OUTPUT_TOOLTIPS = ("What is in focus.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"x": pixel("Column, from 0 left."), "y": pixel("Row, from 0 at top.")}}

    def choose(self, x: int, y: int) -> tuple[dict[str, Any]]:
        return ({"focus": (x, y)},)


class FocusMask:
    """Focuses on what a mask marks, for instance one of the mask editor."""

    DESCRIPTION = __doc__
    CATEGORY = "bokehdiff"
    FUNCTION = "choose"
    RETURN_TYPES = ("FOCUS",)
    RETURN_NAMES = ("focus",)
    OUTPUT_TOOLTIPS = ("What is in focus.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "mask": (
                    "MASK",
                    {
                        "tooltip": "The subject, as large as the photograph; one, or one for each "
                        "photograph."
                    },
                ),
                "whole_subject": WHOLE_SUBJECT,
            }
        }

    def choose(self, mask: torch.Tensor, whole_subject: bool) -> tuple[dict[str, Any]]:
        return ({"focus": mask, "whole_subject": whole_subject},)


class FocusAuto:
    """Focuses on the nearest large thing near the centre of each photograph."""

    DESCRIPTION = __doc__
    CATEGORY = "bokehdiff"
    FUNCTION = "choose"
    RETURN_TYPES = ("FOCUS",)
    RETURN_NAMES = ("focus",)
    OUTPUT_TOOLTIPS = ("What is in focus.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"whole_subject": WHOLE_SUBJECT}}

    def choose(self, whole_subject: bool) -> tuple[dict[str, Any]]:
        return ({"focus": "auto", "whole_subject": whole_subject},)


class FocusDisparity:
    """Focuses on a plane."""

    DESCRIPTION = __doc__
    CATEGORY = "bokehdiff"
    FUNCTION = "choose"
    RETURN_TYPES = ("FOCUS",)
    RETURN_NAMES = ("focus",)
    OUTPUT_TOOLTIPS = ("What is in focus.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "Disparity in focus: 0 (farthest) to 1 (nearest), or 1/metres as the map is."
        return {"required": {"df": number(0.5, 0.0, 100.0, 0.005, tooltip)}}

    def choose(self, df: float) -> tuple[dict[str, Any]]:
        return ({"df": df},)


# --- How strong the blur is -----------------------------------------------------------------------


class CameraNode:
    """The camera whose blur is wanted, in place of K."""

    DESCRIPTION = __doc__
    CATEGORY = "bokehdiff"
    FUNCTION = "choose"
    RETURN_TYPES = ("BOKEH_CAMERA",)
    RETURN_NAMES = ("camera",)
    OUTPUT_TOOLTIPS = ("For the nodes that render, in place of K.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "f_number": number(1.8, 0.1, 1000.0, 0.05, "Aperture: 1.8 blurs more than 8."),
                "focal_length_mm": number(
                    50.0, 0.1, 10000.0, 0.5, "The real one in mm, not the 35 mm equivalent."
                ),
                "sensor_width_mm": number(
                    FULL_FRAME_WIDTH_MM,
                    0.1,
                    1000.0,
                    0.05,
                    "Long side of the sensor in mm: 36 is full frame, 23.5 APS-C, 17.3 Micro Four "
                    "Thirds. Of a cropped photograph, of what is left.",
                ),
                "focus_distance_m": number(
                    ASSUMED_FOCUS_DISTANCE_M,
                    0.01,
                    100000.0,
                    0.05,
                    "Metres to what is in focus; in a focus pull, at first. Not used where the "
                    "disparity is in 1/metres, which says it by itself.",
                ),
                "farthest_distance_m": number(
                    0.0,
                    0.0,
                    100000.0,
                    0.5,
                    "Metres to the farthest thing, for instance the wall of a room; 0 for "
                    "infinity. Not used where the disparity is in 1/metres.",
                ),
            }
        }

    def choose(
        self,
        f_number: float,
        focal_length_mm: float,
        sensor_width_mm: float,
        focus_distance_m: float,
        farthest_distance_m: float,
    ) -> tuple[dict[str, Any]]:
        camera = {
            "camera": bokehdiff.Camera(f_number, focal_length_mm, sensor_width_mm),
            "focus_distance_m": focus_distance_m,
            "farthest_distance_m": farthest_distance_m or math.inf,
        }
        return (camera,)


def blur_of(K: float, camera: dict[str, Any] | None, metric: bool) -> dict[str, Any]:
    """Arguments of ``choose_lens`` that say how strong the blur is: a camera if there is one."""
    if camera is None:
        return {"K": K}
    return {"camera": camera["camera"]} if metric else camera


# --- Rendering ------------------------------------------------------------------------------------


class Render:
    """Blurs photographs as a lens would have."""

    DESCRIPTION = __doc__
    CATEGORY = "bokehdiff"
    FUNCTION = "render"
    RETURN_TYPES = ("IMAGE", "IMAGE")
    RETURN_NAMES = ("image", "circles_of_confusion")
    OUTPUT_TOOLTIPS = (
        "The blurred photographs.",
        "What is blurred: green is in focus, blue in front, red behind.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": PHOTO,
                "disparity": DISPARITY,
                "focus": FOCUS,
                "renderer": RENDERER,
                "K": STRENGTH,
            },
            "optional": {"camera": CAMERA},
        }

    def render(
        self,
        image: torch.Tensor,
        disparity: DepthEstimate,
        focus: dict[str, Any],
        renderer: Any,
        K: float,
        camera: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        photos = as_photos(image)
        nearness = nearness_of(disparity, photos)
        metric = disparity.metric
        blur = blur_of(K, camera, metric)
        lens = choose_lens(nearness, metric=metric, image=photos, **focus, **blur)
        blurred = []
        # One by one, so that memory does not grow with the batch.
        for number_of_photo in progress(len(photos)):
            one = slice(number_of_photo, number_of_photo + 1)
            refocus = prepared(renderer, photos[one], nearness[one], metric)
            blurred.append(refocus(lens.part(one.start, one.stop)))
        overlay = bokehdiff.coc_overlay(photos, lens.signed_defocus(nearness))
        return as_comfy_image(torch.cat(blurred)), as_comfy_image(overlay)


class FocusPull:
    """Moves the focus of one photograph, as a film, with the blur of its first frame throughout."""

    DESCRIPTION = __doc__
    CATEGORY = "bokehdiff"
    FUNCTION = "pull"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("frames",)
    OUTPUT_TOOLTIPS = ("The frames, as a batch.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ONE_PHOTO,
                "disparity": DISPARITY,
                "focus_from": ("FOCUS", {"tooltip": "What is in focus first."}),
                "focus_to": ("FOCUS", {"tooltip": "What is in focus last."}),
                "renderer": RENDERER,
                "K": STRENGTH,
                "frames": (
                    "INT",
                    {"default": 24, "min": 2, "max": 10000, "tooltip": "Number of frames."},
                ),
                "easing": (
                    ["smooth", "linear"],
                    {"tooltip": "smooth starts and stops gently; linear moves evenly."},
                ),
            },
            "optional": {"camera": CAMERA},
        }

    def pull(
        self,
        image: torch.Tensor,
        disparity: DepthEstimate,
        focus_from: dict[str, Any],
        focus_to: dict[str, Any],
        renderer: Any,
        K: float,
        frames: int,
        easing: str,
        camera: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor]:
        photo = one_photo(image)
        nearness = nearness_of(disparity, photo)
        metric = disparity.metric
        # The blur stays as strong as it is at first, and distances are those of what is in focus
        # there.
        blur = blur_of(K, camera, metric)
        start = choose_lens(nearness, metric=metric, image=photo, **focus_from, **blur)
        end = choose_lens(nearness, metric=metric, image=photo, **focus_to)
        refocus = prepared(renderer, photo, nearness, metric)
        pictures = []
        for frame in progress(frames):
            time = frame / (frames - 1)
            along = eased(time) if easing == "smooth" else time
            lens = LensSetting(
                torch.lerp(start.df, end.df, along),
                torch.lerp(start.df_nearer, end.df_nearer, along),
                start.K,
            )
            pictures.append(refocus(lens))
        return (as_comfy_image(torch.cat(pictures)),)


def prepared(
    renderer: Any, photo: torch.Tensor, nearness: torch.Tensor, metric: bool
) -> Callable[[LensSetting], torch.Tensor]:
    """A function from a setting of the lens to the picture (1, 3, H, W) of a photograph, on the
    CPU; what focus and blur do not change is done once, here."""
    if isinstance(renderer, ClassicalRenderer):
        place = device()
        photo, nearness = photo.to(place), nearness.to(place)

        def blur(lens: LensSetting) -> torch.Tensor:
            lens = lens.to(place)
            return bokehdiff.render_bokeh(
                photo,
                lens.in_one_plane(nearness),
                lens.df,
                lens.K,
                aperture=renderer.aperture,
                method=renderer.method,
                highlights=renderer.highlights,
                metric=metric,
            ).cpu()

        return blur
    scene = renderer.prepare(photo, nearness, metric)

    def refocus(lens: LensSetting) -> torch.Tensor:
        in_focus = (lens.df, lens.df_nearer)
        return renderer.render(scene, K=lens.K, focus_range=in_focus, output_type="pt").images.cpu()

    return refocus


BLUR_NODES = {
    "BokehDiffLoadModel": (LoadModel, "Load Bokeh Model"),
    "BokehDiffClassicalRenderer": (ClassicalRendererNode, "Bokeh without a Model"),
    "BokehDiffFocusPoint": (FocusPoint, "Focus on a Point"),
    "BokehDiffFocusMask": (FocusMask, "Focus on a Mask"),
    "BokehDiffFocusAuto": (FocusAuto, "Focus on the Subject"),
    "BokehDiffFocusDisparity": (FocusDisparity, "Focus on a Plane"),
    "BokehDiffCamera": (CameraNode, "Camera"),
    "BokehDiffRender": (Render, "Render Bokeh"),
    "BokehDiffFocusPull": (FocusPull, "Focus Pull"),
}

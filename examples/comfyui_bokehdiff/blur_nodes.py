"""Nodes that blur: what renders, what is in focus, one picture, a focus pull, a bokeh stack.

What runs along the links, besides ComfyUI's own types:

``BOKEH_RENDERER``
    a ``BokehDiffPipeline``, a ``BokehFlowPipeline`` or a :class:`ClassicalRenderer`
``DISPARITY``
    a ``bokehdiff.depth.DepthEstimate``: the map (B, 1, H, W), and whether it is in 1/metres
``FOCUS``
    arguments of ``bokehdiff.lens.choose_lens`` that say what is in focus

ComfyUI's IMAGE is (B, H, W, C) in [0, 1], its MASK (B, H, W), both on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

import bokehdiff
from bokehdiff.easing import eased
from bokehdiff.images import as_disparity_batch, as_image_batch
from bokehdiff.lens import DEFAULT_STRENGTH, LensSetting, choose_lens
from bokehdiff.stack_strengths import check_strengths

if TYPE_CHECKING:
    from bokehdiff.depth import DepthEstimate

BOKEHDIFF, BOKEHFLOW = "BokehDiff or SDXL", "BokehFlow"

# What several nodes ask for.
PHOTO = ("IMAGE", {"tooltip": "Photographs in which all is sharp."})
ONE_PHOTO = ("IMAGE", {"tooltip": "One photograph in which all is sharp."})
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
        "K * |disparity - disparity in focus|. If the disparity is in 1/metres, so is this.",
    },
)
STRENGTHS = (
    "STRING",
    {
        "default": "10, 20, 30",
        "tooltip": "Blur strength of each picture: pixels of blur radius per 1/metre.",
    },
)
WHOLE_SUBJECT = (
    "BOOLEAN",
    {"default": False, "tooltip": "Keep all of the subject sharp, not one plane of it."},
)


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
                "rotation": number(0.0, -360.0, 360.0, 1.0, "Degrees by which blades are turned."),
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
        return {"required": {"df": number(0.5, 0.0, 100.0, 0.01, tooltip)}}

    def choose(self, df: float) -> tuple[dict[str, Any]]:
        return ({"df": df},)


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
                "focus": ("FOCUS", {"tooltip": "What is in focus."}),
                "renderer": RENDERER,
                "K": STRENGTH,
            }
        }

    def render(
        self,
        image: torch.Tensor,
        disparity: DepthEstimate,
        focus: dict[str, Any],
        renderer: Any,
        K: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        photos = as_photos(image)
        nearness = nearness_of(disparity, photos)
        lens = choose_lens(nearness, K=K, metric=disparity.metric, image=photos, **focus)
        blurred = []
        # One by one, so that memory does not grow with the batch.
        for number_of_photo in progress(len(photos)):
            one = slice(number_of_photo, number_of_photo + 1)
            refocus = prepared(renderer, photos[one], nearness[one], disparity.metric)
            blurred.append(refocus(lens.part(one.start, one.stop)))
        overlay = bokehdiff.coc_overlay(photos, lens.signed_defocus(nearness))
        return as_comfy_image(torch.cat(blurred)), as_comfy_image(overlay)


class FocusPull:
    """Moves the focus of one photograph from one thing to another, as a film."""

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
            }
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
    ) -> tuple[torch.Tensor]:
        photo = one_photo(image)
        nearness = nearness_of(disparity, photo)
        start, end = (
            choose_lens(nearness, K=K, metric=disparity.metric, image=photo, **focus)
            for focus in (focus_from, focus_to)
        )
        refocus = prepared(renderer, photo, nearness, disparity.metric)
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


class Stack:
    """Blurs one photograph with several strengths; the disparity is in 1/metres."""

    DESCRIPTION = __doc__
    CATEGORY = "bokehdiff"
    FUNCTION = "render"
    RETURN_TYPES = ("IMAGE", "STRING", "STRING")
    RETURN_NAMES = ("stack", "K", "focus_distance_m")
    OUTPUT_TOOLTIPS = (
        "One picture for each strength, as a batch.",
        "The strengths, for the nodes that find depth in a stack.",
        "Metres to what is in focus, for the same.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ONE_PHOTO,
                "disparity": DISPARITY,
                "focus": ("FOCUS", {"tooltip": "What is in focus."}),
                "renderer": RENDERER,
                "K": STRENGTHS,
            }
        }

    def render(
        self,
        image: torch.Tensor,
        disparity: DepthEstimate,
        focus: dict[str, Any],
        renderer: Any,
        K: str,
    ) -> tuple[torch.Tensor, str, str]:
        if not disparity.metric:
            raise ValueError(
                "The disparity has no unit; a bokeh stack wants 1/metres: estimate it with a "
                "metric depth model, or say what white stands for in Disparity from Image."
            )
        photo = one_photo(image)
        nearness = nearness_of(disparity, photo)
        lenses = [
            choose_lens(nearness, K=strength, metric=True, image=photo, **focus)
            for strength in check_strengths(numbers(K, "K", "10, 20, 30"))
        ]
        refocus = prepared(renderer, photo, nearness, True)
        stack = torch.cat([refocus(lenses[index]) for index in progress(len(lenses))])
        plane = float(lenses[0].df)
        distance = 1 / plane if plane > 0 else float("inf")
        return as_comfy_image(stack), K, f"{distance:.9g}"


# --- What nodes share -----------------------------------------------------------------------------


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


def progress(count: int) -> Any:
    """The numbers from 0 to count - 1, with ComfyUI's bar, which also lets a person interrupt."""
    try:
        from comfy.utils import ProgressBar
    except ImportError:  # outside ComfyUI
        yield from tqdm(range(count), disable=count < 2)
        return
    bar = ProgressBar(count)
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
    """An input of one number."""
    return (
        "FLOAT",
        {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip},
    )


def pixel(tooltip: str) -> tuple[str, Any]:
    """An input of one column or row."""
    return ("INT", {"default": 0, "min": 0, "max": 100000, "tooltip": tooltip})


BLUR_NODES = {
    "BokehDiffLoadModel": (LoadModel, "Load Bokeh Model"),
    "BokehDiffClassicalRenderer": (ClassicalRendererNode, "Bokeh without a Model"),
    "BokehDiffFocusPoint": (FocusPoint, "Focus on a Point"),
    "BokehDiffFocusMask": (FocusMask, "Focus on a Mask"),
    "BokehDiffFocusAuto": (FocusAuto, "Focus on the Subject"),
    "BokehDiffFocusDisparity": (FocusDisparity, "Focus on a Plane"),
    "BokehDiffRender": (Render, "Render Bokeh"),
    "BokehDiffFocusPull": (FocusPull, "Focus Pull"),
    "BokehDiffStack": (Stack, "Bokeh Stack"),
}

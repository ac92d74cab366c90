"""Nodes for bokeh stacks, one photograph with several strengths of blur: rendered from its
disparity, or painted by FLUX.1-Kontext, which needs none.

``BOKEH_STACK_PAINTER`` along the links is a ``BokehStackPipeline`` with its adapter.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

import bokehdiff
from bokehdiff.lens import choose_lens
from bokehdiff.pipelines.stack_inputs import STACK_SEED
from bokehdiff.stack_strengths import check_strengths, strengths_of_camera

from .blur_nodes import prepared
from .shared import (
    CAMERA,
    DISPARITY,
    FOCUS,
    ONE_PHOTO,
    RENDERER,
    STRENGTHS,
    as_comfy_image,
    device,
    nearness_of,
    numbers,
    one_photo,
    progress,
    progress_bar,
)

if TYPE_CHECKING:
    from bokehdiff.depth import DepthEstimate

STACK_STRENGTHS = (
    "STRING",
    {
        **STRENGTHS[1],
        "tooltip": f"{STRENGTHS[1]['tooltip']} Not used while a camera is connected.",
    },
)
F_NUMBERS = (
    "STRING",
    {
        "default": "",
        "tooltip": "Of the camera, one for each picture, for instance 2.8, 4, 8. Empty: one "
        "picture with its own.",
    },
)


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
                "focus": FOCUS,
                "renderer": RENDERER,
                "K": STACK_STRENGTHS,
            },
            "optional": {"camera": CAMERA, "f_numbers": F_NUMBERS},
        }

    def render(
        self,
        image: torch.Tensor,
        disparity: DepthEstimate,
        focus: dict[str, Any],
        renderer: Any,
        K: str,
        camera: dict[str, Any] | None = None,
        f_numbers: str = "",
    ) -> tuple[torch.Tensor, str, str]:
        if not disparity.metric:
            raise ValueError(
                "The disparity has no unit; a bokeh stack wants 1/metres: estimate it with a "
                "metric depth model, or say what white stands for in Disparity from Image."
            )
        photo = one_photo(image)
        nearness = nearness_of(disparity, photo)
        lens = choose_lens(nearness, metric=True, image=photo, **focus)
        plane = float(lens.df)
        distance = 1 / plane if plane > 0 else float("inf")
        strengths = strengths_of(photo, K, camera, f_numbers, distance)
        refocus = prepared(renderer, photo, nearness, True)
        stack = [
            refocus(dataclasses.replace(lens, K=torch.full_like(lens.K, strengths[index])))
            for index in progress(len(strengths))
        ]
        return as_comfy_image(torch.cat(stack)), as_text(strengths), f"{distance:.9g}"


class LoadStackPainter:
    """Loads FLUX.1-Kontext with the adapter of BokehDepth, which paints bokeh stacks."""

    DESCRIPTION = __doc__
    CATEGORY = "bokehdiff"
    FUNCTION = "load"
    RETURN_TYPES = ("BOKEH_STACK_PAINTER",)
    RETURN_NAMES = ("painter",)
    OUTPUT_TOOLTIPS = ("For Paint Bokeh Stack.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (
                    "STRING",
                    {
                        "default": "black-forest-labs/FLUX.1-Kontext-dev",
                        "tooltip": "Folder or hub id of FLUX.1-Kontext.",
                    },
                ),
                "adapter": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "The adapter trained for it: bokeh_lora.bin, a .safetensors "
                        "file, a folder or a hub id. Empty if the folder of the model holds it.",
                    },
                ),
            },
            "optional": {
                "dtype": (
                    ["auto", "bfloat16", "float16", "float32"],
                    {"tooltip": "In which to compute. auto: bfloat16 on a GPU, float32 on a CPU."},
                ),
                "offload": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Keep parts of the model off the GPU until they run.",
                    },
                ),
            },
        }

    def load(
        self, model: str, adapter: str, dtype: str = "auto", offload: bool = False
    ) -> tuple[Any]:
        place = device()
        if not model:
            raise ValueError("model is empty; wanted the folder or hub id of FLUX.1-Kontext.")
        if offload and place == "cpu":
            raise ValueError(
                "offload is on, but there is no GPU to keep parts away from; wanted it off."
            )
        if dtype == "auto":
            dtype = "float32" if place == "cpu" else "bfloat16"
        pipe = bokehdiff.BokehStackPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
        if adapter:
            pipe.load_bokeh_adapter(adapter)
        elif pipe.bokeh_adapter is None:
            raise ValueError(
                f"adapter is empty, and {model} holds none, without which FLUX.1-Kontext knows "
                "nothing of K; wanted a file, for instance weights/bokeh_lora.bin, a folder or a "
                "hub id."
            )
        pipe.set_progress_bar_config(disable=True)  # the node that paints shows its own
        if offload:
            pipe.enable_model_cpu_offload(device=place)
        else:
            pipe.to(place)
        return (pipe,)


class PaintStack:
    """Paints one photograph with several strengths of blur, without a disparity map."""

    DESCRIPTION = __doc__
    CATEGORY = "bokehdiff"
    FUNCTION = "paint"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("stack", "K")
    OUTPUT_TOOLTIPS = (
        "One picture for each strength, as a batch, as large as the photograph.",
        "The strengths, for the nodes that find depth in a stack.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ONE_PHOTO,
                "painter": ("BOKEH_STACK_PAINTER", {"tooltip": "What paints."}),
                "K": STACK_STRENGTHS,
                "seed": (
                    "INT",
                    {
                        "default": STACK_SEED,
                        "min": 0,
                        "max": 2**64 - 1,
                        "control_after_generate": True,
                        "tooltip": "Of the noise, which is the same for every picture.",
                    },
                ),
                "steps": (
                    "INT",
                    {"default": 50, "min": 1, "max": 1000, "tooltip": "Steps of denoising."},
                ),
            },
            "optional": {
                "camera": CAMERA,
                "f_numbers": F_NUMBERS,
                "max_area": (
                    "INT",
                    {
                        "default": 1024 * 1024,
                        "min": 256,
                        "max": 4096 * 4096,
                        "tooltip": "Pixels on which the network works; a larger photograph is made "
                        "smaller, and the pictures larger again.",
                    },
                ),
            },
        }

    def paint(
        self,
        image: torch.Tensor,
        painter: bokehdiff.BokehStackPipeline,
        K: str,
        seed: int,
        steps: int,
        camera: dict[str, Any] | None = None,
        f_numbers: str = "",
        max_area: int = 1024 * 1024,
    ) -> tuple[torch.Tensor, str]:
        photo = one_photo(image)
        distance = None if camera is None else camera["focus_distance_m"]
        strengths = strengths_of(photo, K, camera, f_numbers, distance)
        bar = progress_bar(steps * sum(strength > 0 for strength in strengths))

        def one_step_on(*_: Any) -> dict[str, Any]:
            bar.update(1)
            return {}

        painted = painter(
            photo,
            strengths,
            generator=torch.Generator().manual_seed(seed),
            num_inference_steps=steps,
            max_area=max_area,
            batch_size=1,  # so that memory does not grow with the stack
            callback_on_step_end=one_step_on,
            output_type="pt",
        )
        return as_comfy_image(painted.images), as_text(strengths)


def strengths_of(
    photo: torch.Tensor,
    K: str,
    camera: dict[str, Any] | None,
    f_numbers: str,
    focus_distance_m: float | None,
) -> list[float]:
    """K of each picture of a stack of a photograph (1, 3, H, W): of a camera if there is one."""
    apertures = numbers(f_numbers, "f_numbers", "2.8, 4, 8")
    if camera is None:
        if apertures:
            raise ValueError(
                f"f_numbers is {f_numbers!r}, but no camera is connected; wanted a Camera, or K "
                "and no f_numbers."
            )
        return check_strengths(numbers(K, "K", "10, 20, 30"))
    height, width = photo.shape[-2:]
    return strengths_of_camera(
        photo, (height, width), camera["camera"], apertures or None, focus_distance_m
    )


def as_text(strengths: list[float]) -> str:
    """Numbers as fields of nodes take them."""
    return ", ".join(f"{strength:.9g}" for strength in strengths)


STACK_NODES = {
    "BokehDiffStack": (Stack, "Bokeh Stack"),
    "BokehDiffLoadStackPainter": (LoadStackPainter, "Load Bokeh Stack Painter"),
    "BokehDiffPaintStack": (PaintStack, "Paint Bokeh Stack"),
}

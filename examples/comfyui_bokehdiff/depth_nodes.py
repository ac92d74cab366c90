"""Nodes for the disparity of photographs: estimated, from a picture, or found in a bokeh stack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import bokehdiff
from bokehdiff.images import as_disparity_batch, as_image_batch

from .shared import ONE_PHOTO, PHOTO, STRENGTHS, as_comfy_image, as_photos, device, numbers

if TYPE_CHECKING:
    from bokehdiff.depth import DepthEstimate

STACK = ("IMAGE", {"tooltip": "The same view blurred with several strengths, as a batch."})


class EstimateDisparity:
    """Estimates how near everything is from the photographs alone."""

    DESCRIPTION = __doc__
    CATEGORY = "bokehdiff"
    FUNCTION = "estimate"
    RETURN_TYPES = ("DISPARITY",)
    RETURN_NAMES = ("disparity",)
    OUTPUT_TOOLTIPS = ("Larger is nearer: in [0, 1], or in 1/metres if the model knows metres.",)

    def __init__(self) -> None:
        # ComfyUI keeps the node between runs, so that another photograph loads no model again.
        self.loaded: tuple[str, Any] | None = None

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": PHOTO,
                "depth_model": (
                    "STRING",
                    {
                        "default": "depth-anything/Depth-Anything-V2-Small-hf",
                        "tooltip": "Folder or hub id of a Depth Anything model. Those with Metric "
                        "in their name answer in metres.",
                    },
                ),
            }
        }

    def estimate(self, image: torch.Tensor, depth_model: str) -> tuple[DepthEstimate]:
        photos = as_photos(image)
        if self.loaded is None or self.loaded[0] != depth_model:
            estimator = bokehdiff.DepthEstimator.from_pretrained(depth_model, device=device())
            self.loaded = (depth_model, estimator)
        return (self.loaded[1](photos),)


class DisparityFromImage:
    """Takes gray pictures, of which the lighter is nearer, for the disparity."""

    DESCRIPTION = __doc__
    CATEGORY = "bokehdiff"
    FUNCTION = "read"
    RETURN_TYPES = ("DISPARITY",)
    RETURN_NAMES = ("disparity",)
    OUTPUT_TOOLTIPS = ("Larger is nearer.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": (
                    "IMAGE",
                    {"tooltip": "Gray, white is nearest. Invert Image turns a map of depth."},
                ),
                "normalise": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "Stretch each map to [0, 1]."},
                ),
                "white_per_metre": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 100.0,
                        "step": 0.005,
                        "tooltip": "What white stands for, in 1/metres; 0 if the map has no unit.",
                    },
                ),
            }
        }

    def read(
        self, image: torch.Tensor, normalise: bool, white_per_metre: float
    ) -> tuple[DepthEstimate]:
        from bokehdiff.depth import DepthEstimate

        metric = white_per_metre > 0
        if normalise and metric:
            raise ValueError(
                "normalise and white_per_metre both came; a stretched map has no unit."
            )
        count, height, width, _ = image.shape
        for picture in image:
            if not bool((picture[..., :3] == picture[..., :1]).all()):
                # Refuses what has colours, and says why.
                as_disparity_batch(picture[..., :3], count, height, width)
        maps = image[..., :1].movedim(-1, 1)
        if normalise:
            maps = bokehdiff.normalise_disparity(maps)[0]
        maps = as_disparity_batch(maps, count, height, width)
        return (DepthEstimate(maps * white_per_metre if metric else maps, metric),)


class DisparityToImage:
    """Shows the disparity as pictures, each stretched to its own range."""

    DESCRIPTION = __doc__
    CATEGORY = "bokehdiff"
    FUNCTION = "draw"
    RETURN_TYPES = ("IMAGE", "IMAGE")
    RETURN_NAMES = ("gray", "colours")
    OUTPUT_TOOLTIPS = ("White is nearest.", "Yellow is near, blue is far.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"disparity": ("DISPARITY", {"tooltip": "How near everything is."})}}

    def draw(self, disparity: DepthEstimate) -> tuple[torch.Tensor, torch.Tensor]:
        from bokehdiff.depth_pictures import colour_picture

        maps = disparity.disparity
        gray = bokehdiff.normalise_disparity(maps)[0].expand(-1, 3, -1, -1)
        colours = as_image_batch([colour_picture(one) for one in maps[:, 0]])
        return as_comfy_image(gray), as_comfy_image(colours)


class DepthFromSweep:
    """Finds depth by measuring how much each place is blurred, without a network."""

    DESCRIPTION = __doc__
    CATEGORY = "bokehdiff"
    FUNCTION = "measure"
    RETURN_TYPES = ("DISPARITY", "MASK")
    RETURN_NAMES = ("disparity", "confidence")
    OUTPUT_TOOLTIPS = ("In 1/metres.", "How far what was measured can be trusted, 0 to 1.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": (
                    "IMAGE",
                    {"tooltip": "The photograph with the aperture nearly closed."},
                ),
                "stack": STACK,
                "K": STRENGTHS,
                "focus_distance_m": (
                    "STRING",
                    {
                        "default": "1.5",
                        "tooltip": "Metres to what is in focus: one number, or one for each "
                        "picture of the stack. inf is infinity.",
                    },
                ),
                "side": (
                    ["auto", "farther", "nearer", "both"],
                    {
                        "tooltip": "Of the plane in focus on which everything lies. auto: both if "
                        "the focus differs, else farther."
                    },
                ),
            }
        }

    def measure(
        self, image: torch.Tensor, stack: torch.Tensor, K: str, focus_distance_m: str, side: str
    ) -> tuple[DepthEstimate, torch.Tensor]:
        from bokehdiff.depth import DepthEstimate

        distances = numbers(focus_distance_m, "focus_distance_m", "1.5")
        found = bokehdiff.depth_from_sweep(
            as_photos(image).to(device()),
            as_photos(stack),
            numbers(K, "K", "10, 20, 30"),
            distances[0] if len(distances) == 1 else distances,
            side=None if side == "auto" else side,
        )
        return DepthEstimate(found.disparity.cpu(), True), found.confidence[:, 0].cpu()


class DepthFromBokeh:
    """Finds depth with Depth Anything and DSFA, which sees the photograph and a stack."""

    DESCRIPTION = __doc__
    CATEGORY = "bokehdiff"
    FUNCTION = "estimate"
    RETURN_TYPES = ("DISPARITY",)
    RETURN_NAMES = ("disparity",)
    OUTPUT_TOOLTIPS = ("In 1/metres.",)

    def __init__(self) -> None:
        # ComfyUI keeps the node between runs, so that another photograph loads no model again.
        self.loaded: tuple[str, Any] | None = None

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ONE_PHOTO,
                "stack": STACK,
                "K": STRENGTHS,
                "depth_model": (
                    "STRING",
                    {"default": "", "tooltip": "Folder or hub id of the network with DSFA."},
                ),
            }
        }

    def estimate(
        self, image: torch.Tensor, stack: torch.Tensor, K: str, depth_model: str
    ) -> tuple[DepthEstimate]:
        from bokehdiff.depth import DepthEstimate

        if not depth_model:
            raise ValueError(
                "depth_model is empty; wanted the folder or hub id of Depth Anything with DSFA. "
                "Without a network, take Depth from Bokeh, measured."
            )
        if self.loaded is None or self.loaded[0] != depth_model:
            pipe = bokehdiff.DepthFromBokehPipeline.from_pretrained(depth_model)
            self.loaded = (depth_model, pipe.to(device()))
        strengths = numbers(K, "K", "10, 20, 30")
        found = self.loaded[1](as_photos(image), as_photos(stack), strengths)
        return (DepthEstimate(found.disparity.cpu(), True),)


DEPTH_NODES = {
    "BokehDiffEstimateDisparity": (EstimateDisparity, "Estimate Disparity"),
    "BokehDiffDisparityFromImage": (DisparityFromImage, "Disparity from Image"),
    "BokehDiffDisparityToImage": (DisparityToImage, "Disparity to Image"),
    "BokehDiffDepthFromSweep": (DepthFromSweep, "Depth from Bokeh, measured"),
    "BokehDiffDepthFromBokeh": (DepthFromBokeh, "Depth from Bokeh, by a Network"),
}

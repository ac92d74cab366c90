"""Disparity estimated from the photograph alone, by Depth Anything through transformers.

    estimator = DepthEstimator.from_pretrained()
    estimate = estimator("photo.jpg")
    pipe("photo.jpg", estimate.disparity, df=0.8, K=20, metric=estimate.metric)

Networks of two kinds are told apart by ``config.depth_estimation_type``:

``"relative"``
    They answer inverse depth up to an unknown scale and offset, **larger is nearer**. Each image is
    stretched to [0, 1]: with q(x) the answer that a share x of the cells lies below,
    ``(answer - q(0.001)) / (q(0.999) - q(0.001))``, clamped, so that a few odd cells do not take
    the range from all the others.
``"metric"``
    They answer depth in metres, **larger is farther**, which becomes 1/metres by
    :func:`bokehdiff.optics.depth_to_disparity`. Nearer than a centimetre counts as a centimetre.

The network sees the photograph with its short side shrunk to 518 pixels, as its image processor
says; :mod:`bokehdiff.edge_aware_upsampling` brings the answer to the size of the photograph.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    DPTImageProcessorPil,
)

from .checkpoints import is_no_hub_id
from .depth_cache import DepthCache, cache_folder_of_user, digest
from .edge_aware_upsampling import upsample_to_photo
from .images import LARGEST_METRIC_DISPARITY, ImageInput, as_image_batch
from .optics import depth_to_disparity
from .tensor_files import check_whole
from .whole_files import PathLike

__all__ = ["DEFAULT_DEPTH_MODEL", "DepthEstimate", "DepthEstimator"]

DEFAULT_DEPTH_MODEL = "depth-anything/Depth-Anything-V2-Small-hf"

# The share of cells that may lie beyond either end of [0, 1].
SATURATED_SHARE = 1e-3
# Longer pictures are continued to this shape: else cells would grow without bound, or a side of the
# network's picture would vanish.
LONGEST_ASPECT = 8

WAY_OUT = "or bring a disparity map of your own (disparity=, --disparity on the command line)."


@dataclass(frozen=True)
class DepthEstimate:
    """How near each pixel of photographs is.

    Attributes:
        disparity: (B, 1, H, W) float32 of the photographs' size, on their device; larger is nearer.
            In [0, 1], or in 1/metres.
        metric: whether it is in 1/metres.
    """

    disparity: torch.Tensor
    metric: bool


class DepthEstimator:
    """Estimates disparity; usually made by :meth:`from_pretrained`.

    The same pixels give the same answer, alone or in a batch.

    Args:
        network: in evaluation mode, on the device and in the dtype to compute in.
        processor: brings pictures to the size and the colours that the network was trained with.
            The one of Pillow, which needs no torchvision and gives the same on all machines.
        cache: where answers of the network are kept; None for nowhere.

    Raises:
        ValueError: network and processor do not fit each other.
    """

    def __init__(
        self,
        network: DepthAnythingForDepthEstimation,
        processor: DPTImageProcessorPil,
        cache: DepthCache | None = None,
    ) -> None:
        patch_size = network.config.patch_size
        if processor.ensure_multiple_of % patch_size:
            raise ValueError(
                f"The image processor makes sides multiples of {processor.ensure_multiple_of} "
                f"pixels, the network looks at patches of {patch_size}; wanted the processor that "
                "the network was trained with, in its preprocessor_config.json (published ones: "
                "size 518, ensure_multiple_of 14, keep_aspect_ratio true)."
            )
        self.network = network
        self.processor = processor
        self.cache = cache

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: PathLike = DEFAULT_DEPTH_MODEL,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        cache_folder: PathLike | None = "auto",
    ) -> DepthEstimator:
        """An estimator with the weights in a folder or on the Hub.

        Args:
            name_or_path: folder written by ``save_pretrained``, or ``"owner/name"``:
                ``depth-anything/Depth-Anything-V2-Small-hf``, ``...-Base-hf``, ``...-Large-hf``, or
                ``Depth-Anything-V2-Metric-Indoor-Small-hf`` and its likes, which answer in metres.
                Only safetensors are read, and no code.
            revision: branch, tag or commit on the Hub.
            device: where to compute.
            dtype: in which to compute; float16 and bfloat16 are for GPUs.
            cache_folder: where answers of the network are kept, some 1.6 MB per photograph, whole
                or not at all; ``"auto"`` is :func:`~bokehdiff.depth_cache.cache_folder_of_user`,
                None keeps nothing.

        Raises:
            ValueError: there is no such model, it cannot be fetched, it is damaged or incomplete,
                or no Depth Anything model.
        """
        name = os.path.expanduser(os.fspath(name_or_path))
        if os.path.isfile(name) or not os.path.isdir(name) and is_no_hub_id(name):
            what = f"{name} is a file" if os.path.isfile(name) else f"There is no folder {name}"
            raise ValueError(
                f"{what}; wanted the folder of a depth model, or a name on the Hub such as "
                f"{DEFAULT_DEPTH_MODEL}, {WAY_OUT}"
            )
        try:
            values, _ = DepthAnythingConfig.get_config_dict(name, revision=revision)
            kind = values.get("model_type")
            if kind is None:
                raise OSError("it has no config.json that names a type of model")
            if kind == DepthAnythingConfig.model_type:
                processor = DPTImageProcessorPil.from_pretrained(name, revision=revision)
                network, loading = DepthAnythingForDepthEstimation.from_pretrained(
                    name,
                    revision=revision,
                    dtype=dtype,
                    use_safetensors=True,
                    output_loading_info=True,
                )
        except (
            OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError,
            StrictDataclassError,
        ) as error:  # fmt: skip
            raise ValueError(_not_loaded(name, error)) from error
        if kind != DepthAnythingConfig.model_type:
            raise ValueError(
                f"{name} holds a model of type {kind!r}; wanted a Depth Anything model "
                f"({DepthAnythingConfig.model_type!r}), for instance {DEFAULT_DEPTH_MODEL}, "
                f"{WAY_OUT}"
            )
        check_whole(loading, name, f"Fetch it again, {WAY_OUT}")
        cache = None
        if cache_folder == "auto":
            cache = DepthCache(cache_folder_of_user() / "depth")
        elif cache_folder is not None:
            cache = DepthCache(cache_folder)
        return cls(network.to(device).eval().requires_grad_(False), processor, cache)

    @property
    def metric(self) -> bool:
        """Whether estimates are in 1/metres."""
        return bool(self.network.config.depth_estimation_type == "metric")

    @torch.no_grad()
    def __call__(self, image: ImageInput) -> DepthEstimate:
        """The disparity of photographs.

        Args:
            image: anything :func:`bokehdiff.images.as_image_batch` takes, of any size and shape.

        Raises:
            FileNotFoundError: a path leads to no file.
            ValueError: no valid images, or the network answers no finite number.
        """
        photos = as_image_batch(image).detach()
        disparity = torch.cat([self._disparity_of_one(photo[None]) for photo in photos])
        return DepthEstimate(disparity, self.metric)

    def _disparity_of_one(self, photo: torch.Tensor) -> torch.Tensor:
        """(1, 1, H, W) on the device of the photograph (1, 3, H, W)."""
        height, width = photo.shape[-2:]
        shortest = math.ceil(max(height, width) / LONGEST_ASPECT)
        beyond = (0, max(shortest - width, 0), 0, max(shortest - height, 0))
        seen = F.pad(photo, beyond, mode="replicate") if any(beyond) else photo
        seen = seen.to(self.network.device)
        answer = self._answer(seen)
        if self.metric:
            nearest = 1 / LARGEST_METRIC_DISPARITY
            disparity = depth_to_disparity(answer.clamp(min=nearest))
        else:
            shares = answer.new_tensor([SATURATED_SHARE, 1 - SATURATED_SHARE])
            low, high = torch.quantile(answer.flatten(), shares)
            span = torch.where(high > low, high - low, 1)
            disparity = ((answer - low) / span).clamp(0, 1)
        disparity = upsample_to_photo(disparity, seen)
        return disparity[..., :height, :width].to(photo.device)

    def _answer(self, photo: torch.Tensor) -> torch.Tensor:
        """What the network says of a photograph: (1, 1, h, w) float32 of its own resolution."""
        levels = (photo[0] * 255).round_().to(torch.uint8).permute(1, 2, 0).cpu()
        picture = Image.fromarray(levels.numpy())
        pixels = self.processor(images=picture, return_tensors="pt").pixel_values.to(torch.float32)
        name = digest(self._identity, pixels) if self.cache is not None else ""
        answer = self.cache.find(name) if self.cache is not None else None
        if answer is None:
            seen = pixels.to(self.network.device, self.network.dtype)
            answer = self.network(pixel_values=seen).predicted_depth[:, None].to(torch.float32)
            if not bool(torch.isfinite(answer).all()):
                raise ValueError(
                    f"The depth model answered NaN or infinity in {self.network.dtype}; wanted "
                    "finite numbers. Load it with dtype=torch.float32, "
                    f"{WAY_OUT}"
                )
            if self.cache is not None:
                self.cache.keep(name, answer)
        return answer.to(self.network.device)

    @cached_property
    def _identity(self) -> str:
        """A hash of all in the network that decides its answers."""
        settings: dict[str, Any] = self.network.config.to_dict()
        settings.pop("_name_or_path", None)  # the same network in another folder is the same
        parts = [part for item in sorted(self.network.state_dict().items()) for part in item]
        return digest(json.dumps(settings, sort_keys=True, default=str), *parts)


def _not_loaded(name: str, error: Exception) -> str:
    """One sentence about a model that could not be loaded, and what to do."""
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(". ")
    if os.path.isdir(name):
        return (
            f"{name} could not be loaded as a depth model ({reason}); wanted a folder with "
            f"config.json, preprocessor_config.json and model.safetensors of a Depth Anything "
            f"model: fetch it again by `hf download {DEFAULT_DEPTH_MODEL} --local-dir FOLDER`, "
            f"{WAY_OUT}"
        )
    return (
        f"The depth model {name} could not be fetched ({reason}). Without a network, fetch it "
        f"elsewhere by `hf download {name} --local-dir FOLDER` and name that folder instead "
        f"(--depth-model or --model on the command line), {WAY_OUT}"
    )

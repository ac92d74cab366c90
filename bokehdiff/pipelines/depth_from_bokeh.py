"""Metric depth of a photo and its bokeh stack: ``DepthFromBokehPipeline``.

A bokeh stack is one view photographed, painted or rendered with several strengths of lens blur. How
much a place is blurred at each strength K tells how far it lies from the plane in focus. Here a
depth network looks at the photo and its stack (BokehDepth, arXiv:2512.12425). The stack is given,
or made: painted by :class:`~bokehdiff.pipelines.bokeh_stack.BokehStackPipeline`, or rendered from
the network's own estimate. :func:`bokehdiff.pipelines.depth_from_sweep.depth_from_sweep` measures
blur instead, and needs no network.

What a stack can add: a **real** one carries the blur of the lens, a measurement. A **painted** one
carries what its network knows of how pictures look. A **rendered** one is computed from the depth
that it shall improve, so it adds nothing to what the depth network knows already.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import DPTImageProcessorPil
from transformers.utils import cached_file

from ..checkpoints import is_no_hub_id
from ..depth import LONGEST_ASPECT
from ..edge_aware_upsampling import upsample_to_photo
from ..images import (
    LARGEST_METRIC_DISPARITY,
    ImageInput,
    as_image_batch,
)

# A component is found again at loading only if its module is imported by then.
from ..models.depth_anything_dsfa import (
    DepthAnythingDSFAConfig,
    DepthAnythingDSFAForDepthEstimation,
)
from ..optics import depth_to_disparity, disparity_to_depth, rescale_strength
from ..rendering import render_bokeh
from ..rendering.render import METHODS
from ..tensor_files import check_whole
from ..whole_files import PathLike
from .bokeh_stack import BokehStackPipeline
from .bokehdiff import BokehDiffPipeline
from .depth_inputs import (
    StackInput,
    Strengths,
    as_stack_batch,
    focus_disparities,
    strengths_per_photo,
)
from .depth_output import DepthFromBokehOutput, as_output_type, check_output_type

__all__ = ["DepthFromBokehPipeline"]

HOW_TO_GET_DSFA = (
    "Train one with `python -m training.train_dsfa`, or read the authors' checkpoint with "
    "bokehdiff.dsfa_files.read_depth_anything_dsfa and keep it with save_pretrained. The photo "
    "alone is bokehdiff.DepthEstimator's (`bokehdiff depth` without --from-bokeh); a stack without "
    "a network, bokehdiff.pipelines.depth_from_sweep's."
)


class DepthFromBokehPipeline(DiffusionPipeline):
    """Depth in metres of a photo and its bokeh stack, by Depth Anything with DSFA.

    Load with ``DepthFromBokehPipeline.from_pretrained(folder)``: a folder saved by this class, or
    that of the network alone with its ``preprocessor_config.json``.
    ``DiffusionPipeline.from_pretrained`` does not know this class.

    **K is that of the photo given**, pixels of blur radius per 1/metre. The network sees photo and
    frames at its own size, and is told ``K * its width / width of the photo``.

    The answer is brought to the size of the photo as disparity, with edges on those of the photo
    (:func:`bokehdiff.edge_aware_upsampling.upsample_to_photo`), as
    :class:`bokehdiff.depth.DepthEstimator` does; the authors interpolate depth bilinearly.

    Args:
        depth_model: a network that answers in metres (``depth_estimation_type="metric"``).
        image_processor: brings pictures to the size and colours that the network was trained with.

    Raises:
        ValueError: a network without DSFA or that answers no metres, or a processor that does not
            fit it.
    """

    model_cpu_offload_seq = "depth_model"

    def __init__(
        self,
        depth_model: DepthAnythingDSFAForDepthEstimation,
        image_processor: DPTImageProcessorPil,
    ) -> None:
        super().__init__()
        if not isinstance(depth_model, DepthAnythingDSFAForDepthEstimation):
            raise ValueError(
                f"depth_model is a {type(depth_model).__name__}, which sees no stack; wanted a "
                "bokehdiff.models.depth_anything_dsfa.DepthAnythingDSFAForDepthEstimation. "
                f"{HOW_TO_GET_DSFA}"
            )
        if depth_model.config.depth_estimation_type != "metric":
            raise ValueError(
                "depth_model answers disparity without a unit (depth_estimation_type "
                f"{depth_model.config.depth_estimation_type!r}); wanted one that answers metres, "
                "'metric': K ties blur to 1/metres."
            )
        patch_size = depth_model.config.patch_size
        if image_processor.ensure_multiple_of % patch_size:
            raise ValueError(
                f"The image processor makes sides multiples of {image_processor.ensure_multiple_of}"
                f" pixels, the network looks at patches of {patch_size}; wanted the processor that "
                "the network was trained with, in its preprocessor_config.json (published ones: "
                "size 518, ensure_multiple_of 14, keep_aspect_ratio true)."
            )
        self.register_modules(depth_model=depth_model, image_processor=image_processor)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> DepthFromBokehPipeline:
        """The pipeline with the weights in a folder or on the Hub; safetensors only.

        Args:
            pretrained_model_name_or_path: folder saved by this class or by ``save_pretrained`` of
                the network and its processor, or the name of either on the Hub.
            revision: branch, tag or commit on the Hub.
            token: of the Hub, for repositories that are not public.
            dtype: in which to compute; float16 and bfloat16 are for GPUs.

        Raises:
            ValueError: nothing there, a network without DSFA, or one that is damaged or
                incomplete.
        """
        name = os.path.expanduser(os.fspath(pretrained_model_name_or_path))
        if os.path.isfile(name):
            raise ValueError(f"{name!r} is a file; wanted a folder. {HOW_TO_GET_DSFA}")
        if not os.path.isdir(name) and is_no_hub_id(name):
            raise ValueError(
                f"There is no folder {name!r}. Give a folder written by save_pretrained, or a name "
                f"on the Hub. {HOW_TO_GET_DSFA}"
            )
        from_hub: dict[str, Any] = dict(revision=revision, token=token)
        try:
            inside = cached_file(
                name, "model_index.json", **from_hub,
                _raise_exceptions_for_missing_entries=False,
            )  # fmt: skip
            network_folder, processor_folder = (
                ("", "") if inside is None else ("depth_model", "image_processor")
            )
            values, _ = DepthAnythingDSFAConfig.get_config_dict(
                name, subfolder=network_folder, **from_hub
            )
            kind = values.get("model_type")
            if kind is None:
                raise OSError("it has no config.json that names a type of model")
            if kind == DepthAnythingDSFAConfig.model_type:
                processor = DPTImageProcessorPil.from_pretrained(
                    name, subfolder=processor_folder, **from_hub
                )
                network, loading = DepthAnythingDSFAForDepthEstimation.from_pretrained(
                    name,
                    subfolder=network_folder,
                    dtype=dtype,
                    use_safetensors=True,
                    output_loading_info=True,
                    **from_hub,
                )
        except (
            OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError,
            StrictDataclassError,
        ) as error:  # fmt: skip
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(
                f"{name!r} could not be loaded as a depth network with DSFA "
                f"({reason.rstrip('. ')}); wanted a folder with config.json, "
                f"preprocessor_config.json and model.safetensors. {HOW_TO_GET_DSFA}"
            ) from error
        if kind != DepthAnythingDSFAConfig.model_type:
            raise ValueError(
                f"{name!r} holds a model of type {kind!r}, which sees no stack; wanted "
                f"{DepthAnythingDSFAConfig.model_type!r}. {HOW_TO_GET_DSFA}"
            )
        check_whole(loading, name, "Copy or fetch it again.")
        return cls(network.eval().requires_grad_(False), processor)

    # -- The call --------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput,
        stack: StackInput | None = None,
        K: Strengths | None = None,
        *,
        stack_from: BokehStackPipeline | BokehDiffPipeline | str | None = None,
        focus_distance_m: float | None = None,
        iterations: int = 1,
        stack_options: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
    ) -> DepthFromBokehOutput | tuple[Any, ...]:
        """Depth of photos, seen with their bokeh stacks.

        The stack is given as ``stack``, or made by ``stack_from``. Without either the network sees
        the photo alone.

        Args:
            image: one or more all-in-focus photos, anything
                :func:`bokehdiff.images.as_image_batch` takes.
            stack: the frames of one photo: a list of N pictures of its size, or (N, 3, H, W); of B
                photos a list of B of these, or (B, N, 3, H, W).
            K: blur strength of each frame, pixels of blur radius **in the photo** per 1/metre: (N,)
                numbers, or (B, N).
            stack_from: a :class:`BokehStackPipeline`, which paints the stack; or
                :class:`BokehDiffPipeline`, or one of ``"layered"``, ``"scatter"``, ``"pyramid"``
                (:func:`bokehdiff.render_bokeh`), which render it from the estimate of the photo
                alone. That adds nothing to what the network knows, and may even amplify its errors;
                ``changes`` says how much the depth changed.
            focus_distance_m: where a rendered stack is focused, metres.
            iterations: how often a stack is rendered from the depth so far and the depth estimated
                with it.
            stack_options: more arguments of what makes the stack, for instance
                ``{"num_inference_steps": 28}``.
            generator: of the noise of pipelines that make a stack.
            output_type: ``"pt"``, ``"np"`` or ``"pil"``.
            return_dict: return a plain tuple when false.

        Returns:
            :class:`DepthFromBokehOutput`, of the size of the photo.

        Raises:
            FileNotFoundError: a path leads to no file.
            ValueError: an input that cannot be meant, frames of another size, or a network that
                answers NaN.
        """
        # 1. Check inputs before any work is done.
        check_output_type(output_type)
        renders = stack_from is not None and not isinstance(stack_from, BokehStackPipeline)
        check_source(stack, K, stack_from)
        check_rendering(renders, focus_distance_m, iterations)
        if stack_from is None and (stack_options is not None or generator is not None):
            raise ValueError(
                "stack_options and generator are for what makes a stack; give stack_from too, or "
                "leave them out."
            )
        photos = as_image_batch(image).float()
        frames = None if stack is None else as_stack_batch(stack, photos)
        strengths = None
        if K is not None:
            count = None if frames is None else frames.shape[1]
            strengths = strengths_per_photo(K, len(photos), count)
        options = dict(stack_options or {})
        if generator is not None:
            options["generator"] = generator

        # 2. Paint the stack.
        if isinstance(stack_from, BokehStackPipeline):
            assert strengths is not None
            frames = painted_stack(stack_from, photos, strengths, options)

        # 3. The network, and the way back to the size of the photo.
        estimate = self._estimate(photos, frames, strengths)

        # 4. Render the stack from that estimate, and estimate again.
        changes = []
        for _ in range(iterations if renders else 0):
            assert stack_from is not None and strengths is not None
            before = estimate.disparity
            df = float(focus_disparities(focus_distance_m, 1)[0])
            frames = rendered_stack(stack_from, photos, before, df, strengths, options)
            estimate = self._estimate(photos, frames, strengths)
            change = (before / estimate.disparity - 1).abs()  # of depth, its inverse
            changes.append(change.flatten(1).median(dim=1).values)
        self.maybe_free_model_hooks()

        # 5. Output.
        output = DepthFromBokehOutput(
            depth=as_output_type(disparity_to_depth(estimate.disparity), "depth", output_type),
            disparity=as_output_type(estimate.disparity, "disparity", output_type),
            network_K=estimate.network_K,
            network_size=estimate.network_size,
            changes=torch.stack(changes) if changes else None,
        )
        return output if return_dict else output.to_tuple()

    def _estimate(
        self, photos: torch.Tensor, frames: torch.Tensor | None, strengths: torch.Tensor | None
    ) -> _Estimate:
        """What the network says of photos (B, 3, H, W) with frames (B, N, 3, H, W) or without."""
        estimates = [
            self._estimate_of_one(
                photo,
                None if frames is None else frames[number],
                None if frames is None or strengths is None else strengths[number],
            )
            for number, photo in enumerate(photos)
        ]
        told = [one.network_K for one in estimates if one.network_K is not None]
        return _Estimate(
            torch.cat([one.disparity for one in estimates]),
            estimates[0].network_size,
            torch.cat(told) if told else None,
        )

    def _estimate_of_one(
        self, photo: torch.Tensor, frames: torch.Tensor | None, strengths: torch.Tensor | None
    ) -> _Estimate:
        """The same of (3, H, W), (N, 3, H, W) and (N,)."""
        height, width = photo.shape[-2:]
        shortest = math.ceil(max(height, width) / LONGEST_ASPECT)
        beyond = (0, max(shortest - width, 0), 0, max(shortest - height, 0))
        seen = F.pad(photo[None], beyond, mode="replicate")
        pixels = self._prepared(seen)
        inputs = dict(pixel_values=pixels)
        network_K = None
        if frames is not None and strengths is not None:
            network_K = rescale_strength(strengths[None], seen.shape[-1], pixels.shape[-1])
            stack = F.pad(frames, beyond, mode="replicate")
            inputs["stack_pixel_values"] = self._prepared(stack)[None]
            inputs["K"] = network_K.to(pixels)
        answer = self.depth_model(**inputs).predicted_depth[:, None].float()
        if not bool(torch.isfinite(answer).all()):
            raise ValueError(
                f"The depth network answered NaN or infinity in {self.depth_model.dtype}; wanted "
                "finite numbers. Load it with dtype=torch.float32, and check that K is in pixels "
                "of blur radius per 1/metre."
            )
        disparity = depth_to_disparity(answer.clamp(min=1 / LARGEST_METRIC_DISPARITY))
        disparity = upsample_to_photo(disparity, seen.to(disparity.device))
        return _Estimate(
            disparity[..., :height, :width].to(photo.device),
            (pixels.shape[-2], pixels.shape[-1]),
            network_K,
        )

    def _prepared(self, pictures: torch.Tensor) -> torch.Tensor:
        """(N, 3, h, w) for the network, of pictures (N, 3, H, W) display-encoded in [0, 1]."""
        levels = (pictures * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        pixels = self.image_processor(
            images=[PIL.Image.fromarray(one) for one in levels], return_tensors="pt"
        ).pixel_values
        prepared: torch.Tensor = pixels.to(self._execution_device, self.depth_model.dtype)
        return prepared


class _Estimate(NamedTuple):
    """(B, 1, H, W) disparity in 1/metres, and what the network saw: (height, width), (B, N) K."""

    disparity: torch.Tensor
    network_size: tuple[int, int]
    network_K: torch.Tensor | None


# -- Stacks that are made ------------------------------------------------------------------------


def painted_stack(
    pipe: BokehStackPipeline,
    photos: torch.Tensor,
    strengths: torch.Tensor,
    options: Mapping[str, Any],
) -> torch.Tensor:
    """(B, N, 3, H, W) frames of photos (B, 3, H, W) at strengths (B, N), painted one by one."""
    stacks = []
    for photo, K in zip(photos.split(1), strengths, strict=True):
        painted: torch.Tensor = pipe(photo, K=K.tolist(), output_type="pt", **options)[0]
        stacks.append(painted)
    return torch.stack(stacks).to(photos)


def rendered_stack(
    stack_from: BokehDiffPipeline | str,
    photos: torch.Tensor,
    disparity: torch.Tensor,
    df: float,
    strengths: torch.Tensor,
    options: Mapping[str, Any],
) -> torch.Tensor:
    """(B, N, 3, H, W) frames of photos (B, 3, H, W) with disparity (B, 1, H, W) in 1/metres."""
    stacks = []
    for photo, nearness, K in zip(photos.split(1), disparity.split(1), strengths, strict=True):
        if isinstance(stack_from, str):
            frames = [
                render_bokeh(photo, nearness, df, k, method=stack_from, metric=True, **options)
                for k in K.tolist()
            ]
            stacks.append(torch.cat(frames))
        else:
            rendered: torch.Tensor = stack_from(
                photo, nearness, df=df, K=K.tolist(), metric=True, output_type="pt", **options
            )[0]
            stacks.append(rendered)
    return torch.stack(stacks).to(photos)


# -- Checks -------------------------------------------------------------------------------------


def check_source(stack: Any, K: Any, stack_from: Any) -> None:
    """Raises ``ValueError`` unless it is clear where the stack comes from."""
    if stack is not None and stack_from is not None:
        raise ValueError("stack and stack_from were both given; the stack is one of them.")
    if stack_from is not None and not (
        isinstance(stack_from, (BokehStackPipeline, BokehDiffPipeline)) or stack_from in METHODS
    ):
        raise ValueError(
            f"stack_from is {stack_from!r}; wanted a BokehStackPipeline, a BokehDiffPipeline or "
            f"one of {', '.join(map(repr, METHODS))}."
        )
    if K is None and (stack is not None or stack_from is not None):
        raise ValueError(
            "K is missing; wanted the blur strength of each frame of the stack, pixels of blur "
            "radius in the photo per 1/metre, for instance K=[10, 20, 30]. "
            "bokehdiff.strength_from_camera gives that of a camera."
        )
    if K is not None and stack is None and stack_from is None:
        raise ValueError(
            "K was given without a stack; wanted stack=, its frames, or stack_from=, what makes "
            "them, for instance stack_from='layered'."
        )


def check_rendering(renders: bool, focus_distance_m: Any, iterations: Any) -> None:
    """Raises ``ValueError`` for a focus or iterations that are missing, wrong, or of no use."""
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations is {iterations!r}; wanted a whole number, 1 or more.")
    if renders and focus_distance_m is None:
        raise ValueError(
            "focus_distance_m is missing; wanted the metres at which the stack is rendered in "
            "focus, for instance focus_distance_m=1.5."
        )
    if renders:
        focus_disparities(focus_distance_m, 1)
    elif focus_distance_m is not None or iterations != 1:
        raise ValueError(
            f"focus_distance_m is {focus_distance_m!r} and iterations {iterations!r}, which are of "
            "a stack that is rendered (stack_from; --stack-method on the command line). The "
            "network is not told at which distance a given or painted stack is in focus; a sweep "
            "is."
        )

"""Lens blur for photos by a small network around physics: ``BokehFlowPipeline``.

The way of a picture: the network looks at the photo and says how far away everything is
(``prepare``); the circles of confusion follow from the lens, a differentiable renderer blurs, and
the network corrects what it does wrong (``render``). Focusing elsewhere repeats ``render`` only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils import BaseOutput

from ..camera import Camera
from ..depth import DepthEstimator
from ..images import ImageInput, as_disparity_batch, as_image_batch, crop_to
from ..lens import check_lens_arguments, choose_lens
from ..models.bokehflow import SMALLEST_SIDE, BokehFlowModel, Observation
from ..optics import PerImage
from ..overlay import coc_overlay
from ..rendering import Aperture
from .bokehflow_loading import (
    PipelineWithBokehFlow,
    bring_in,
    check_aperture,
    tell_of_clamping,
)
from .detail import put_back_detail
from .picture_output import Pictures, pictures_as

__all__ = ["BokehFlowPipeline", "BokehFlowPipelineOutput", "BokehFlowScene"]

OUTPUT_TYPES = ("pil", "np", "pt")


@dataclass
class BokehFlowPipelineOutput(BaseOutput):
    """What :class:`BokehFlowPipeline` returns, of N pictures.

    Args:
        images: the rendered pictures, display sRGB, of the size of the input. By ``output_type``:
            ``"pil"`` a list of N images of 8 bits, rounded to nearest; ``"np"`` float32 (N, H, W,
            3) in [0, 1]; ``"pt"`` float32 (N, 3, H, W) in [0, 1].
        disparity: float32 (B, 1, H, W) of the B photos, larger is nearer: as it was given, holes
            filled, or as it was estimated.
        metric: whether ``disparity``, ``df`` and ``K`` are in 1/metres.
        df: (N,) disparity of the plane in focus; of a range, its farther end.
        K: (N,) pixels of circle-of-confusion radius per unit of disparity.
        clamped_share: (N,) share of the pixels whose circle of confusion was larger than the
            network can blur, in [0, 1]; they got the largest it can.
        coc: with ``return_coc``, the photo with its circles of confusion painted over it (green in
            focus, blue in front, red behind; see :func:`bokehdiff.overlay.coc_overlay`), in the
            form of ``images``.
    """

    images: Pictures
    disparity: torch.Tensor
    metric: bool
    df: torch.Tensor
    K: torch.Tensor
    clamped_share: torch.Tensor
    coc: Pictures | None = None


@dataclass
class BokehFlowScene:
    """Photos made ready by :meth:`BokehFlowPipeline.prepare`, for any focus and blur.

    Args:
        image: the photos, display sRGB, float32 (B, 3, H, W) in [0, 1].
        disparity: float32 (B, 1, H, W), larger is nearer, holes filled; in [0, 1], or 1/metres if
            ``metric``.
        observations: what the network saw in each of the B photos.
        metric: whether ``disparity``, and the focus to come, is in 1/metres.
    """

    image: torch.Tensor
    disparity: torch.Tensor
    observations: list[Observation]
    metric: bool = False

    @property
    def batch_size(self) -> int:
        """Number of photos, B."""
        return self.image.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the photos and of everything rendered from them, in pixels."""
        return self.image.shape[-2], self.image.shape[-1]

    def part(self, number: int) -> tuple[torch.Tensor, torch.Tensor, Observation]:
        """The photo (1, 3, H, W) of a number, its disparity (1, 1, H, W), and what was seen."""
        one = slice(number, number + 1)
        return self.image[one], self.disparity[one], self.observations[number]


class BokehFlowPipeline(PipelineWithBokehFlow):
    """Adds the blur of a real lens to all-in-focus photos, by a network of 1 to 20 MB.

        pipe = BokehFlowPipeline.from_pretrained(bokehdiff.FLOW_NANO)
        pipe("photo.jpg", focus=(512, 300), f_number=1.4).images[0].save("blurred.png")

    Load with ``BokehFlowPipeline.from_pretrained(folder_or_hub_id)``.
    ``DiffusionPipeline.from_pretrained`` does not know this class. Films are blurred by
    :class:`~bokehdiff.pipelines.bokehflow_video.BokehFlowVideoPipeline`.

    **Photos without disparity.** The network sees depth by itself, in metres, so that ``df`` and
    ``focus_range`` are in 1/metres then. ``depth_estimator`` may be set to a
    :class:`bokehdiff.depth.DepthEstimator`, which is asked instead; it is no component and is not
    saved.

    There is no randomness: the same photo and lens give the same picture.

    Args:
        model: the network; any variant, mixer and renderer.

    Raises:
        ValueError: something else than a network of BokehFlow.
    """

    depth_estimator: DepthEstimator | None = None

    # -- The call --------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput,
        disparity: ImageInput | None = None,
        df: PerImage | None = None,
        K: PerImage | None = None,
        *,
        focus: Any = None,
        focus_range: Sequence[PerImage] | None = None,
        whole_subject: bool = False,
        f_number: float | None = None,
        focal_length_mm: float | None = None,
        focal_length_35mm: float | None = None,
        sensor_width_mm: float | None = None,
        camera: Camera | None = None,
        focus_distance_m: float | None = None,
        farthest_distance_m: float = math.inf,
        metric: bool = False,
        aperture: Aperture | None = None,
        preserve_detail: bool = True,
        return_coc: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> BokehFlowPipelineOutput | tuple[Any, ...]:
        """Renders all-in-focus photos as a lens would have taken them.

        What is in focus is said by one of ``df``, ``focus`` and ``focus_range``; how strong the
        blur is by ``K`` or by a camera. One photo may be given several values of them and then
        comes back as often.

        Args:
            image: PIL image, numpy array (H, W, 3), tensor (3, H, W) or (B, 3, H, W), path, or a
                list of them of one size; display sRGB, floats in [0, 1].
            disparity: one map per photo, of its size: numpy array, tensor, path, or a list. Larger
                is nearer, in [0, 1] unless ``metric``. NaN and infinity are holes and get filled.
                Without one it is estimated, by :attr:`depth_estimator` if there is one, else by the
                network, in 1/metres.
            df: disparity of the plane in focus, in the unit of the map; one number, or one per
                picture.
            K: blur strength, pixels of circle-of-confusion radius per unit of disparity; one
                number, or one per picture; 20 without a camera. The radius is
                ``K * |disparity - df|``.
            focus: a pixel ``(x, y)``, a box ``(x0, y0, x1, y1)``, a mask of the photo's size,
                ``"auto"``, or ``"sharpest"`` for a photo that is shallow already; a list holds one
                per picture. See :func:`bokehdiff.focus.find_focus`.
            focus_range: ``(from, to)``, disparities between which everything stays sharp.
            whole_subject: keep all that the box or mask of ``focus`` holds sharp, not one plane.
            f_number, focal_length_mm, focal_length_35mm, sensor_width_mm: a camera; what is not
                given is taken from the EXIF data of the (first) photo, a path or PIL image. See
                :meth:`bokehdiff.camera.Camera.from_photo`.
            camera: a :class:`bokehdiff.camera.Camera`, instead of these four.
            focus_distance_m: distance of what is in focus. It ties relative disparity to metres, as
                a camera needs; metric disparity knows it.
            farthest_distance_m: distance of relative disparity 0.
            metric: disparity, df and focus_range are in 1/metres.
            aperture: the shape of the opening, for networks whose renderer knows shapes
                (``"binned"`` and ``"layered"``); default a disc.
            preserve_detail: the photo itself where nothing is blurred, see
                :func:`bokehdiff.pipelines.detail.put_back_detail`. K = 0 then returns the photo.
            return_coc: also return the photo with its circles of confusion painted over it.
            output_type: ``"pil"``, ``"np"`` or ``"pt"``.
            return_dict: return a plain tuple when false.

        Returns:
            :class:`BokehFlowPipelineOutput` with the rendered ``images``, of the size of the input.

        Raises:
            FileNotFoundError: a path leads to no file.
            ValueError: an input that cannot be meant; the message says what to do.
        """
        # 1. Check inputs before any work is done.
        check_output_type(output_type)
        check_aperture(self.model, aperture)
        lens_parts = (f_number, focal_length_mm, focal_length_35mm, sensor_width_mm)
        if any(part is not None for part in lens_parts):
            if camera is not None:
                raise ValueError("camera was given, and parts of another one; give one of them.")
            camera = Camera.from_photo(
                image[0] if isinstance(image, (list, tuple)) and image else image,
                f_number=f_number,
                focal_length_mm=focal_length_mm,
                focal_length_35mm=focal_length_35mm,
                sensor_width_mm=sensor_width_mm,
            )
        check_lens_arguments(df, K, focus, focus_range, whole_subject, camera, focus_distance_m)
        # 2. Read, let the network look, estimate the disparity if there is none.
        scene = self.prepare(image, disparity, metric)
        # 3. Blur each picture, put the photo back where nothing is blurred, output.
        return self.render(
            scene,
            df,
            K,
            focus=focus,
            focus_range=focus_range,
            whole_subject=whole_subject,
            camera=camera,
            focus_distance_m=focus_distance_m,
            farthest_distance_m=farthest_distance_m,
            aperture=aperture,
            preserve_detail=preserve_detail,
            return_coc=return_coc,
            output_type=output_type,
            return_dict=return_dict,
        )

    @torch.no_grad()
    def prepare(
        self, image: ImageInput, disparity: ImageInput | None = None, metric: bool = False
    ) -> BokehFlowScene:
        """Does the part of the work that focus and blur do not change: reading, checking, looking.

        Args:
            image, disparity, metric: as of :meth:`__call__`.

        Returns:
            A :class:`BokehFlowScene` for :meth:`render`.

        Raises:
            FileNotFoundError: a path leads to no file.
            ValueError: an input that cannot be meant.
        """
        photos = as_image_batch(image)
        batch_size, _, height, width = photos.shape
        if disparity is None and self.depth_estimator is not None:
            estimate = self.depth_estimator(photos)
            if metric and not estimate.metric:
                raise ValueError(
                    "metric=True, but the depth model estimates relative disparity. Leave metric "
                    "out, or set pipe.depth_estimator to None, and the network of this pipeline "
                    "estimates metres."
                )
            disparity, metric = estimate.disparity, estimate.metric
        if disparity is not None:
            disparity = as_disparity_batch(disparity, batch_size, height, width, metric)
        photos = photos.to(self._execution_device)
        bring_in(self.model)
        # One by one, so that a photo comes out of a batch as it does alone.
        observations = [self.model.observe(photo) for photo in _large_enough(photos).split(1)]
        if disparity is None:
            estimates = [_own_disparity(self.model, one) for one in observations]
            disparity, metric = crop_to(torch.cat(estimates), (height, width)), True
        self.maybe_free_model_hooks()
        return BokehFlowScene(photos, disparity.to(photos.device), observations, metric)

    @torch.no_grad()
    def render(
        self,
        scene: BokehFlowScene,
        df: PerImage | None = None,
        K: PerImage | None = None,
        *,
        focus: Any = None,
        focus_range: Sequence[PerImage] | None = None,
        whole_subject: bool = False,
        camera: Camera | None = None,
        focus_distance_m: float | None = None,
        farthest_distance_m: float = math.inf,
        aperture: Aperture | None = None,
        preserve_detail: bool = True,
        return_coc: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> BokehFlowPipelineOutput | tuple[Any, ...]:
        """Renders a prepared scene; the network does not look again, so refocusing is cheap.

        A scene of one photo is rendered as often as there are values of focus and blur, one picture
        after the other.

        Args:
            scene: what :meth:`prepare` returned.
            df, K, focus, focus_range, whole_subject, camera, focus_distance_m, farthest_distance_m,
                aperture, preserve_detail, return_coc, output_type, return_dict: as of
                :meth:`__call__`.

        Returns:
            As of :meth:`__call__`.

        Raises:
            ValueError: an input that cannot be meant.
        """
        check_output_type(output_type)
        check_aperture(self.model, aperture)
        if not isinstance(scene, BokehFlowScene):
            raise ValueError(
                f"render got a {type(scene).__name__}; it takes the scene that "
                "prepare(image, disparity) returns. To render a photo at once, call the pipeline."
            )
        lens = choose_lens(
            scene.disparity,
            df=df,
            K=K,
            focus=focus,
            focus_range=focus_range,
            whole_subject=whole_subject,
            camera=camera,
            focus_distance_m=focus_distance_m,
            farthest_distance_m=farthest_distance_m,
            metric=scene.metric,
            image=scene.image,
        ).to(scene.image.device)
        bring_in(self.model)
        # The long side, so that turning the photo changes nothing.
        photo_width_px = max(scene.size)
        pictures, overlays, clamped_shares = [], [], []
        for number in range(lens.count):
            photo, disparity, observation = scene.part(number if scene.batch_size > 1 else 0)
            setting = lens.part(number, number + 1)
            blurred = self.model.blur(
                observation,
                setting.df,
                setting.K,
                disparity=_large_enough(setting.in_one_plane(disparity)),
                metric=scene.metric,
                photo_width_px=photo_width_px,
                aperture=aperture,
            )
            picture = crop_to(blurred.bokeh, scene.size)
            if preserve_detail:
                coc = crop_to(blurred.coc, scene.size)
                picture = put_back_detail(picture, photo, None, coc)
            pictures.append(picture.clamp(0, 1))
            clamped_shares.append(blurred.clamped_share)
            if return_coc:
                overlays.append(coc_overlay(photo, setting.signed_defocus(disparity)))
        self.maybe_free_model_hooks()
        clamped_share = torch.cat(clamped_shares)
        tell_of_clamping(self.model, clamped_share, photo_width_px)
        output = BokehFlowPipelineOutput(
            images=pictures_as(torch.cat(pictures), output_type),
            disparity=scene.disparity,
            metric=scene.metric,
            df=lens.df,
            K=lens.K,
            clamped_share=clamped_share,
            coc=pictures_as(torch.cat(overlays), output_type) if return_coc else None,
        )
        return output if return_dict else output.to_tuple()


def check_output_type(output_type: str) -> None:
    """Raises ``ValueError`` unless it is one of ``OUTPUT_TYPES``."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {output_type!r}; wanted one of {OUTPUT_TYPES}.")


def _own_disparity(model: BokehFlowModel, observation: Observation) -> torch.Tensor:
    """(1, 1, H, W) 1/metres, as the network sees it; with ``fusion="both"``, where depth depends on
    the camera, as it sees it through a lens without blur."""
    if observation.inverse_depth is not None:
        return observation.inverse_depth
    return model.blur(observation, 0.0, 0.0).inverse_depth


def _large_enough(maps: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) continued at the bottom and right to the smallest size that the network takes;
    the last row and column are repeated."""
    right, below = (max(SMALLEST_SIDE - side, 0) for side in (maps.shape[-1], maps.shape[-2]))
    return F.pad(maps, (0, right, 0, below), mode="replicate") if right or below else maps

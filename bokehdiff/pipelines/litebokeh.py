"""Lens blur on phones, from the photo alone: ``LiteBokehPipeline``."""

from __future__ import annotations

import os
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from ..images import ImageInput, as_image_batch, crop_to, pad_to_multiple

# A component is found again at loading only if its module is imported by then.
from ..models.litebokeh import PIXELS_PER_CELL, SMALLEST_SIDE, GlassEncNet, TinyUnet
from ..whole_files import PathLike
from ..windows import Window, in_windows, windows_of
from .network_loading import read_network
from .picture_output import pictures_as

__all__ = ["LiteBokehPipeline", "read_litebokeh"]

OUTPUT_TYPES = ("pil", "np", "pt")

TILE_SIZE = 2048
"""Pixels a side of tiles unless another size is asked for: 18 % more work than without, and a peak
of 1 GB whatever the photo."""

KINDS: dict[str, type[TinyUnet] | type[GlassEncNet]] = {
    kind.__name__: kind for kind in (TinyUnet, GlassEncNet)
}

HOW_TO_GET_LITEBOKEH = (
    "bokehdiff.COMPACT_TINY is the network inside this package; "
    "`python -m training.train_litebokeh` trains others."
)

LENS_ARGUMENTS = (
    "disparity", "df", "K", "focus", "focus_range", "whole_subject", "camera", "f_number",
    "focal_length_mm", "focal_length_35mm", "sensor_width_mm", "focus_distance_m",
    "farthest_distance_m", "metric", "aperture", "return_coc",
)  # fmt: skip
"""What the other pipelines of this library take and this one cannot."""


class LiteBokehPipeline(DiffusionPipeline):
    """Blurs what is behind the subject of a photo, by a network of 1.5 MB that phones run.

        pipe = LiteBokehPipeline.from_pretrained(bokehdiff.COMPACT_TINY)
        pipe("photo.jpg").images[0].save("blurred.png")

    **Neither focus nor strength can be chosen.** The network decides by what it sees what the
    subject is, and blurs the rest as much, in pixels, as in the photographs it was trained with; a
    photo of twice the size is blurred half as much. Arguments of a lens are refused.
    :class:`~bokehdiff.pipelines.bokehflow.BokehFlowPipeline` is the small network that has a lens.

    Load with ``LiteBokehPipeline.from_pretrained(folder_or_hub_id)``.
    ``DiffusionPipeline.from_pretrained`` does not know this class. There is no randomness.

    Args:
        model: a :class:`~bokehdiff.models.litebokeh.TinyUnet` or
            :class:`~bokehdiff.models.litebokeh.GlassEncNet`, trained.

    Raises:
        ValueError: something else.
    """

    model_cpu_offload_seq = "model"

    def __init__(self, model: TinyUnet | GlassEncNet) -> None:
        super().__init__()
        if not isinstance(model, tuple(KINDS.values())):
            raise ValueError(
                f"model is a {type(model).__name__}; wanted a {' or a '.join(KINDS)} of "
                f"bokehdiff.models. {HOW_TO_GET_LITEBOKEH}"
            )
        self.register_modules(model=model)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> LiteBokehPipeline:
        """The pipeline with the network in a folder or on the Hub; safetensors only.

        Args:
            pretrained_model_name_or_path: folder saved by ``save_pretrained`` of this class or of
                a network, or the name of such a one on the Hub; ``bokehdiff.COMPACT_TINY`` ships
                with the package.
            revision: branch, tag or commit on the Hub.
            token: of the Hub, for repositories that are not public.
            dtype: in which the network computes; float16 and bfloat16 are for GPUs.

        Raises:
            ValueError: nothing there, another kind of model, or one that is damaged or incomplete.
        """
        name = os.fspath(pretrained_model_name_or_path)
        return cls(read_litebokeh(name, revision=revision, token=token, dtype=dtype))

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput,
        *,
        enhance: bool = True,
        tile_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **lens: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Blurs photos.

        Args:
            image: a path, Pillow picture, array or tensor, or a list of them of one size; see
                :func:`bokehdiff.images.as_image_batch`. All in focus.
            enhance: let the enhancement block make the result clearer.
            tile_size: pixels a side of the tiles that large photos go through in, a multiple of 8.
                Tiles overlap by as much as decides what a pixel becomes, so the result is the same
                up to rounding. Default: 2048, and no tiles for networks that see the whole photo.
            output_type: ``"pil"``, 8 bits rounded to nearest; ``"np"`` float32 (N, H, W, 3), or
                ``"pt"`` float32 (N, 3, H, W), in [0, 1].
            return_dict: an ``ImagePipelineOutput``, or a tuple.

        Returns:
            ``images``: the blurred photos, of the size they came in.

        Raises:
            FileNotFoundError: a path leads to no file.
            ValueError: an input that cannot be meant, or an argument of a lens.
        """
        self.check_inputs(tile_size, output_type, lens)
        photos = as_image_batch(image)
        size = (photos.shape[-2], photos.shape[-1])
        if min(size) < SMALLEST_SIDE:
            photos, _ = pad_to_multiple(photos, SMALLEST_SIDE)
        device = self._execution_device
        # One by one, so that a photo comes out of a batch as it does alone.
        pictures = [self._blurred(one.to(device), enhance, tile_size) for one in photos.split(1)]
        self.maybe_free_model_hooks()
        images = pictures_as(crop_to(torch.cat(pictures), size), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def check_inputs(self, tile_size: int | None, output_type: str, lens: dict[str, Any]) -> None:
        """Raises ``ValueError`` for what cannot be meant, and ``TypeError`` for unknown arguments;
        arguments as of :meth:`__call__`."""
        for name in lens:
            if name in LENS_ARGUMENTS:
                raise ValueError(
                    f"{name} was given, but this network sees the photo alone: what is in focus "
                    "and how strong the blur is cannot be chosen. Leave it out, or take "
                    "BokehFlowPipeline, BokehDiffPipeline or render_bokeh, which have a lens."
                )
            raise TypeError(f"LiteBokehPipeline got an unexpected keyword argument {name!r}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; wanted one of {OUTPUT_TYPES}.")
        if tile_size is None:
            return
        if self.model.tile_overlap is None:
            raise ValueError(
                f"tile_size is {tile_size}, but what this {type(self.model).__name__} makes of a "
                "pixel depends on the whole photo, so tiles would differ; leave it out. A TinyUnet "
                'with norm="batch" can be tiled.'
            )
        if tile_size < PIXELS_PER_CELL or tile_size % PIXELS_PER_CELL:
            raise ValueError(
                f"tile_size is {tile_size}; wanted a multiple of {PIXELS_PER_CELL} pixels, for "
                f"instance {TILE_SIZE}."
            )

    def _blurred(self, photo: torch.Tensor, enhance: bool, tile_size: int | None) -> torch.Tensor:
        """(1, 3, H, W) float32 of one photo, in tiles if it is larger than they are."""
        height, width = photo.shape[-2:]
        overlap = self.model.tile_overlap
        side = None if overlap is None else tile_size or TILE_SIZE

        def part(window: Window) -> torch.Tensor:
            tile = window.crop(photo).to(self.model.dtype)
            blurred: torch.Tensor = self.model(tile, enhance=enhance).bokeh
            return blurred.float()

        # Tiles and their overlaps begin at whole cells, so that strides fall on the same pixels.
        return in_windows(part, windows_of(height, width, side), overlap or 0)


def read_litebokeh(
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    dtype: torch.dtype = torch.float32,
) -> TinyUnet | GlassEncNet:
    """The network of a folder, its own or a pipeline's, or of a repository on the Hub.

    Arguments and errors as of :meth:`LiteBokehPipeline.from_pretrained`.
    """
    model: TinyUnet | GlassEncNet = read_network(
        name,
        KINDS,
        system="LiteBokeh",
        how_to_get=HOW_TO_GET_LITEBOKEH,
        revision=revision,
        token=token,
        dtype=dtype,
    )
    return model

"""A visitor's photograph and disparity: small for previews, and at full size when it is asked for.

Only the small ones are kept; memory does not grow with the photographs of many visitors.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from ..cli.disparities import DISPARITY_SUFFIXES, disparity_of
from ..cli.renderers import Refocus
from ..depth import DepthEstimator
from ..focus import find_focus
from ..linear_images import LINEAR_LIGHT_SUFFIXES, open_image_io
from ..photographs import Photograph, read_photograph
from ..picture_files import open_picture
from .renderers import Renderers

PREVIEW_SIDE = 512
"""Long side of previews in pixels, at most."""


# Without .npz, whose numbers may take any memory once unpacked.
MAP_SUFFIXES = tuple(suffix for suffix in DISPARITY_SUFFIXES if suffix != ".npz")


class Unit(str, enum.Enum):
    """What the numbers of a disparity map mean."""

    unit_range = "0 (far) to 1 (near)"
    any_range = "any, larger is nearer: stretch it"
    metric = "1/metres"


@dataclass(frozen=True)
class Sources:
    """The files of a scene.

    Args:
        photo: the photograph.
        disparity: its map; None: estimated.
        unit: of the map.
    """

    photo: Path
    disparity: Path | None = None
    unit: Unit = Unit.unit_range


@dataclass(frozen=True, eq=False)
class Scene:
    """A photograph made ready for previews.

    Args:
        sources: where it comes from.
        size: (height, width) of the photograph.
        photo: the photograph as small as previews are, without EXIF, XMP and transparency.
        disparity: (1, 1, h, w) of that size.
        metric: whether it is in 1/metres.
        subject_df: disparity of the nearest large thing near the centre.
        refocus: makes fast previews; the photograph was prepared once for it.
    """

    sources: Sources
    size: tuple[int, int]
    photo: Photograph
    disparity: torch.Tensor
    metric: bool
    subject_df: float
    refocus: Refocus

    @property
    def preview_size(self) -> tuple[int, int]:
        """(height, width) of previews."""
        return self.disparity.shape[-2], self.disparity.shape[-1]


@dataclass(frozen=True, eq=False)
class FullSize:
    """A photograph of full size: the file, its picture (1, 3, H, W) in [0, 1], the disparity."""

    photograph: Photograph
    image: torch.Tensor
    disparity: torch.Tensor
    metric: bool


def read_full_size(
    sources: Sources, estimator: Callable[[], DepthEstimator], largest_megapixels: float
) -> FullSize:
    """Reads a photograph and its disparity, or estimates it.

    Args:
        sources: the files.
        estimator: gives the model that estimates disparity.
        largest_megapixels: photographs above are refused before they are unpacked.

    Raises:
        ValueError, OSError: a file that cannot be used or is gone; no model to estimate with.
    """
    if not sources.photo.is_file():
        raise ValueError(
            "The photograph is no longer here: uploads are deleted after a while. Drop it again."
        )
    if sources.disparity is not None and sources.disparity.suffix.lower() not in MAP_SUFFIXES:
        raise ValueError(
            f"{sources.disparity.name} is no disparity map; wanted one of "
            f"{', '.join(MAP_SUFFIXES)}."
        )
    for file in (sources.photo, sources.disparity):
        if file is not None:
            _refuse_large(file, largest_megapixels)
    photograph = read_photograph(sources.photo)
    image = photograph.display_encoded(sources.photo.name)
    _check_pixels(sources.photo.name, image.shape[-1], image.shape[-2], largest_megapixels)
    disparity, metric = disparity_of(
        sources.disparity,
        image,
        estimator() if sources.disparity is None else None,
        metric=sources.disparity is not None and sources.unit is Unit.metric,
        normalise=sources.unit is Unit.any_range,
        invalid=None,
    )
    return FullSize(photograph, image, disparity, metric)


def open_scene(sources: Sources, renderers: Renderers) -> Scene:
    """Reads a photograph and makes it ready for previews.

    Raises:
        ValueError, OSError: as of :func:`read_full_size`.
    """
    settings = renderers.settings
    full = read_full_size(sources, renderers.depth_estimator, settings.largest_photo_megapixels)
    image, disparity = shrunk(full.image, full.disparity)
    subject, _ = find_focus(disparity, "auto")
    return Scene(
        sources=sources,
        size=(full.image.shape[-2], full.image.shape[-1]),
        photo=Photograph(image, icc_profile=full.photograph.icc_profile),
        disparity=disparity,
        metric=full.metric,
        subject_df=float(subject),
        refocus=renderers.fast(None)(image, disparity, full.metric, False),
    )


def shrunk(image: torch.Tensor, disparity: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A photograph (1, 3, H, W) and its map (1, 1, H, W), the long side at most ``PREVIEW_SIDE``.

    Disparity is picked, not averaged: between two things there is nothing.
    """
    height, width = image.shape[-2:]
    shrink = PREVIEW_SIDE / max(height, width)
    if shrink >= 1:
        return image, disparity
    size = (max(round(height * shrink), 1), max(round(width * shrink), 1))
    small = F.interpolate(image, size, mode="bilinear", antialias=True).clamp(0, 1)
    return small, F.interpolate(disparity, size, mode="nearest-exact")


def _refuse_large(file: Path, largest_megapixels: float) -> None:
    """Looks at the size that a file says it has, without unpacking it."""
    size = None
    # What is broken is told of when the file is read.
    broken = (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError)
    with contextlib.suppress(*broken):
        if file.suffix.lower() in LINEAR_LIGHT_SUFFIXES:
            opened = open_image_io(file.name).ImageInput.open(str(file))
            size = None if opened is None else (opened.spec().width, opened.spec().height)
        else:
            with open_picture(file) as picture:
                size = None if picture is None else picture.size
    if size is not None:
        _check_pixels(file.name, *size, largest_megapixels)


def _check_pixels(name: str, width: int, height: int, largest_megapixels: float) -> None:
    if width * height > largest_megapixels * 1e6:
        raise ValueError(
            f"{name} has {width} x {height} pixels, {width * height / 1e6:.3g} megapixels; this "
            f"page takes up to {largest_megapixels:g}. Make it smaller first, or render it by "
            "bokehdiff render."
        )

"""Where the disparity of a photograph comes from: a file that belongs to it, or a depth model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .speech import Mistake, note

if TYPE_CHECKING:
    import torch

    from ..depth import DepthEstimator

DISPARITY_SUFFIXES = (".npy", ".npz", ".pfm", ".png", ".tif", ".tiff")


def check_photos(photos: list[Path]) -> None:
    """Refuses photographs that are not there."""
    for photo in photos:
        if not photo.is_file():
            what = "is a folder" if photo.is_dir() else "does not exist"
            raise Mistake(f"{photo} {what}; wanted a photograph.")


def check_unit(metric: bool, normalise: bool) -> None:
    """Refuses to take a map for 1/metres that is to be stretched."""
    if metric and normalise:
        raise Mistake("--metric and --normalise both came; a stretched map has no unit.")


def find_disparities(photos: list[Path], disparity: str | None) -> list[Path | None]:
    """The disparity map of every photograph; None where there is none and it is to be estimated."""
    check_photos(photos)
    if disparity is None:
        return [None] * len(photos)
    if "{stem}" in disparity:
        files = [Path(disparity.replace("{stem}", photo.stem)) for photo in photos]
        for photo, file in zip(photos, files, strict=True):
            if not file.is_file():
                raise Mistake(f"{photo.name} has no disparity map: there is no file {file}.")
        return list(files)
    source = Path(disparity)
    if source.is_dir():
        return [_find_disparity(source, photo) for photo in photos]
    if not source.is_file():
        raise Mistake(f"There is no disparity map {source}; wanted a file, a folder or a pattern.")
    if len(photos) > 1:
        raise Mistake(
            f"There are {len(photos)} photographs but one disparity map, {source.name}; wanted a "
            "folder with a map of the same name for each, or a pattern such as 'maps/{stem}.png'."
        )
    return [source]


def _find_disparity(folder: Path, photo: Path) -> Path:
    names = [f"{photo.stem}{ending}" for ending in ("", "_disp", "_disparity")]
    found = [
        file
        for file in sorted(folder.iterdir())
        if file.stem in names
        and file.suffix.lower() in DISPARITY_SUFFIXES
        and not file.samefile(photo)
    ]
    if not found:
        raise Mistake(
            f"{folder} has no disparity map for {photo.name}; wanted {', '.join(names)} with one "
            f"of the endings {' '.join(DISPARITY_SUFFIXES)}."
        )
    if len(found) > 1:
        raise Mistake(
            f"{folder} has several disparity maps for {photo.name}: "
            f"{', '.join(file.name for file in found)}; wanted one. Say which with a pattern, for "
            f"instance --disparity '{folder}/{{stem}}{found[0].suffix}'."
        )
    return found[0]


def read_matching_disparity(
    file: Path, image: torch.Tensor, *, metric: bool, normalise: bool, invalid: float | None
) -> torch.Tensor:
    """Reads a disparity map and checks it against its photograph: (1, 1, H, W) in [0, 1], or in
    1/metres."""
    from ..images import as_disparity_batch, read_disparity
    from ..optics import normalise_disparity

    disparity = read_disparity(file, invalid=invalid)
    if normalise:
        disparity = normalise_disparity(disparity)[0]
    height, width = image.shape[-2:]
    disparity = as_disparity_batch(disparity, 1, height, width, metric=metric)
    low, high = float(disparity.min()), float(disparity.max())
    if not normalise and not metric and 0 < high - low < 0.1:
        note(
            f"{file.name} spans only {low:.3g} to {high:.3g} of [0, 1], so there will be little "
            "blur. If it is in another unit, add --normalise."
        )
    return disparity


def depth_estimator(model: str | None, device: str) -> DepthEstimator:
    """The model that estimates disparity."""
    from transformers.utils import logging

    from ..depth import DepthEstimator

    if model is not None and Path(model).is_dir():  # a download has something to show
        logging.disable_progress_bar()
    return DepthEstimator.from_pretrained(*([] if model is None else [model]), device=device)


def disparity_of(
    file: Path | None,
    image: torch.Tensor,
    estimator: DepthEstimator | None,
    *,
    metric: bool,
    normalise: bool,
    invalid: float | None,
) -> tuple[torch.Tensor, bool]:
    """The disparity (1, 1, H, W) of a photograph (1, 3, H, W), from its file or estimated, and
    whether it is in 1/metres."""
    if file is not None:
        read = read_matching_disparity(
            file, image, metric=metric, normalise=normalise, invalid=invalid
        )
        return read, metric
    assert estimator is not None
    estimate = estimator(image)
    if metric and not estimate.metric:
        raise Mistake(
            "--metric goes with a disparity map in 1/metres or a metric --depth-model, for "
            "instance depth-anything/Depth-Anything-V2-Metric-Outdoor-Small-hf; this one estimates "
            "disparity without a unit."
        )
    return estimate.disparity, estimate.metric

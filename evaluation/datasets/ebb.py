"""EBB! Val294: street and plant photographs taken with a small and with a wide aperture."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from evaluation.datasets.estimated_disparity import nearest_value, read_estimated_disparity
from evaluation.datasets.focus_in_pictures import focus_at_common_edges, focus_in_mask
from evaluation.datasets.reading import (
    MAP_SUFFIXES,
    PICTURE_SUFFIXES,
    files_by_name,
    map_of,
    read_map,
)
from evaluation.datasets.scenes import Reader, Scene, ScenesOnDisk
from evaluation.exposure import align_exposure
from evaluation.photographs import Photograph, read_picture

__all__ = ["EBB", "AlignedEBB"]

SETTING = "wide"


class _Pair(Scene):
    """One photograph and what the lens took of it."""

    def __init__(
        self, name: str, image: Path, truth: Path, disparity: Path, mask: Path | None
    ) -> None:
        self.name, self.image, self.truth = name, image, truth
        self.disparity, self.mask = disparity, mask

    def settings(self) -> list[str]:
        return [SETTING]

    def files(self) -> dict[Path, Reader]:
        nearest = nearest_value(self.disparity.parent)
        files: dict[Path, Reader] = {
            self.image: read_picture,
            self.truth: read_picture,
            self.disparity: lambda file: read_estimated_disparity(file, nearest),
        }
        return files if self.mask is None else {**files, self.mask: read_map}

    def photographs(self) -> Iterator[Photograph]:
        image = self.read(self.image)
        truth, disparity = self.read(self.truth, image), self.read(self.disparity, image)
        if self.mask is not None:
            df = focus_in_mask(disparity, self.read(self.mask, image))
        else:
            df = focus_at_common_edges(disparity, image, truth)
        yield Photograph(
            scene=self.name,
            setting=SETTING,
            image=image,
            disparity=disparity,
            disparity_range=(float(disparity.min()), float(disparity.max())),
            df=df,
            K=None,
            truth=truth,
        )


class EBB(ScenesOnDisk):
    """Pairs of photographs by a camera on a tripod, f/16 and f/1.8 (Ignatov et al. 2020).

    The set of the AIM challenges ("Everything is Better with Bokeh!"), to be asked for from its
    authors; 294 of its pairs are the validation set Val294 of later papers. NAME is a scene:

    - ``input/NAME.jpg``: all in focus (``original`` in EBB!); ``.jpeg`` and ``.png`` too;
    - ``bokeh/NAME.jpg``: the truth;
    - ``depth/NAME_pred.npy``: (H, W) disparity by a network, as large as the photograph; ``.npz``,
      ``.pfm``, ``.png``, ``.tif`` too, and the names NAME_disparity (``bokehdiff depth`` writes
      them) and NAME;
    - ``depth/convention.json``, optional: ``{"nearest": 0}`` for maps in which *smaller* is nearer.
      Without the file larger is nearer. The files of the BokehDiff authors hold
      ``1 - minmax(prediction)``, in which the nearest is 0, so they need it;
    - ``mask/NAME.png``, optional: white on what is in focus.

    Disparity becomes [0, 1], 1 the nearest
    (:func:`~evaluation.datasets.estimated_disparity.read_estimated_disparity`). The aperture in
    pixels is unknown (K is None), and so is the focus: df is found with the mask, or by the edges
    that both pictures have (:mod:`evaluation.datasets.focus_in_pictures`).
    """

    name = "ebb"
    layout = "the folders input, bokeh and depth, with input/NAME.jpg, bokeh/NAME.jpg and so on"

    @staticmethod
    def scenes_in(folder: Path) -> dict[str, _Pair]:
        inputs, truths = (
            files_by_name(folder / part, PICTURE_SUFFIXES) for part in ("input", "bokeh")
        )
        maps = files_by_name(folder / "depth", MAP_SUFFIXES)
        masks = files_by_name(folder / "mask", PICTURE_SUFFIXES)
        if not inputs or not truths:
            return {}
        return {
            name: _Pair(
                name,
                inputs.get(name, folder / "input" / f"{name}.jpg"),
                truths.get(name, folder / "bokeh" / f"{name}.jpg"),
                map_of(name, maps, folder / "depth"),
                masks.get(name),
            )
            for name in {*inputs, *truths}
        }


class AlignedEBB(EBB):
    """The same pairs; each photograph is given the mean colour of its truth first.

    The two pictures of EBB! differ in exposure and white balance, which no lens blur can know
    (:func:`~evaluation.exposure.align_exposure`). The layout is that of :class:`EBB`.
    """

    name = "ebb_aligned"

    def photographs(self) -> Iterator[Photograph]:
        for photograph in super().photographs():
            aligned: np.ndarray = align_exposure(photograph.image, photograph.truth)
            yield dataclasses.replace(photograph, image=aligned)

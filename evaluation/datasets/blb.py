"""BLB, level 5: Blender scenes in linear light, with exact depth and focus."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bokehdiff.images import read_linear_image
from bokehdiff.linear_images import float_file_samples
from evaluation.datasets.reading import finite_number, read_json
from evaluation.datasets.scenes import Reader, Scene, ScenesOnDisk
from evaluation.photographs import Photograph

__all__ = ["BLB"]

DESCRIPTION, PHOTOGRAPH, DEPTH = "info.json", "image.exr", "depth.exr"
LEVEL = 5
# The strongest of the blur parameters, counted from 0, which also is the number in file names.
LEVEL_INDEX = LEVEL - 1
TRUTH_NAME = re.compile(rf"bokeh_{LEVEL_INDEX:02d}_(\d+)\.exr")
DISPLAY_GAMMA = 2.2


class _BlenderScene(Scene):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @functools.cached_property
    def description(self) -> tuple[float, list[float]]:
        """K and the focus distances of info.json, checked."""
        file = self.folder / DESCRIPTION
        content = read_json(file)
        for name, least in (("blur_parameters", LEVEL), ("focus_distances", 1)):
            values = content.get(name)
            if not isinstance(values, list) or len(values) < least:
                raise ValueError(f"{file} lacks {name}; wanted a list of at least {least}.")
            for value in values:
                if finite_number(value, f"a value of {name}", file) <= 0:
                    raise ValueError(f"{file}: {name} has {value}; wanted values above 0.")
        return float(content["blur_parameters"][LEVEL_INDEX]), content["focus_distances"]

    def truths(self) -> list[Path]:
        """The lens pictures, one for each focus distance; made up names for missing ones."""
        numbered = {
            int(match[1]): file
            for file in sorted(self.folder.glob("bokeh_*.exr"))
            if (match := TRUTH_NAME.fullmatch(file.name))
        }
        _, distances = self.description
        return [
            numbered.get(index, self.folder / f"bokeh_{LEVEL_INDEX:02d}_{index:02d}.exr")
            for index in range(len(distances))
        ]

    def settings(self) -> list[str]:
        return [f"focus_{index:02d}" for index in range(len(self.description[1]))]

    def files(self) -> dict[Path, Reader]:
        return {
            self.folder / PHOTOGRAPH: _read_light,
            self.folder / DEPTH: _read_depth,
            **{file: _read_light for file in self.truths()},
        }

    def photographs(self) -> Iterator[Photograph]:
        light = self.read(self.folder / PHOTOGRAPH)
        depth = self.read(self.folder / DEPTH, light)
        disparity = (1 / (depth + 1e-10)).astype(np.float32)
        K, distances = self.description
        for setting, distance, file in zip(self.settings(), distances, self.truths(), strict=True):
            yield Photograph(
                scene=self.folder.name,
                setting=setting,
                image=_displayed(light),
                light=light,
                disparity=disparity,
                disparity_range=(float(disparity.min()), float(disparity.max())),
                df=1 / distance,
                K=K,
                truth=_displayed(self.read(file, light)),
                labels={"level": LEVEL, "focus_distance": distance},
            )


def _read_light(file: Path) -> np.ndarray:
    """(H, W, 3) float32 linear light, in the order R, G, B, which the file names."""
    if not file.is_file():
        raise ValueError(f"{file} is missing.")
    try:
        return read_linear_image(file)[0].permute(1, 2, 0).numpy()
    except ValueError as problem:
        raise ValueError(f"{file.parent}: {problem}") from problem


def _read_depth(file: Path) -> np.ndarray:
    """(H, W) float64 depth: the only channel, or B, which EXR files store first.

    Infinite depth is the sky. ValueError if there is NaN or depth that is not above 0.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing.")
    try:
        samples, _ = float_file_samples(file)
    except ValueError as problem:
        raise ValueError(f"{file.parent}: {problem}") from problem
    depth = samples[:, :, 2 if samples.shape[2] > 2 else 0].astype(np.float64)
    wrong = int((~(depth > 0)).sum())
    if wrong:
        raise ValueError(f"{file} has {wrong} values that are NaN or not above 0; wanted depth.")
    return depth


def _displayed(light: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 from linear light: ``clip(light, 0, 1)^(1 / 2.2)``."""
    return ((light.clip(0, 1) ** (1 / DISPLAY_GAMMA)) * 255).round().astype(np.uint8)


class BLB(ScenesOnDisk):
    """Ten Blender scenes, ten focal settings each, at the strongest blur (Peng et al. 2022).

    The benchmark of BokehMe, from its authors; only its level 5 is read. A folder for each scene:

    - ``image.exr``: all in focus, linear light, channels named R, G and B;
    - ``depth.exr``: metric depth, one channel; of several the one named B, which such files store
      first. Infinite is the sky;
    - ``bokeh_04_<index>.exr``: the truth in linear light, focused at
      ``focus_distances[index]``;
    - ``info.json``: ``blur_parameters``, of which the fifth is K, and ``focus_distances``.

    Channels go by their names, so there is no mistaking BGR for RGB. Pictures are displayed by
    ``v^(1 / 2.2)``, cut off at white, not by the sRGB curve. Disparity is
    ``1 / (depth + 1e-10)``, not normalised, so it may exceed 1; ``df = 1 / focus_distance``, and
    the circle of confusion has a radius of ``K * |disparity - df|`` pixels. Photographs carry
    ``light``, the photograph as the file has it, and the labels ``level`` and ``focus_distance``.
    Reading needs ``pip install 'bokehdiff[hdr]'``.
    """

    name = "blb"
    layout = "folders with an image.exr, depth.exr, bokeh_04_*.exr and info.json"

    @staticmethod
    def scenes_in(folder: Path) -> dict[str, _BlenderScene]:
        files = (*folder.glob(f"*/{DESCRIPTION}"), *folder.glob(f"*/{PHOTOGRAPH}"))
        return {file.parent.name: _BlenderScene(file.parent) for file in files}

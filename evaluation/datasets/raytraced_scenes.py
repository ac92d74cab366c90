"""The ray-traced benchmark: 3D scenes photographed with a pinhole and with a thin lens."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.datasets.reading import finite_number, read_array, read_json, read_map
from evaluation.datasets.scenes import Reader, Scene, ScenesOnDisk
from evaluation.photographs import Photograph, read_picture

__all__ = ["RaytracedScene", "RaytracedScenes"]

PHOTOGRAPH, LIGHT, DISPARITY = "aif.png", "aif_lin.npz", "disp.npz"
DESCRIPTION = "meta.json"

RANGE_KEYS = ("disp_min", "disp_max", "disp_p001", "disp_p999")
SETTING_KEYS = ("id", "level", "df", "K")


class RaytracedScene(Scene):
    """A folder of the layout that :class:`RaytracedScenes` describes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """The content of meta.json, checked."""
        file = self.folder / DESCRIPTION
        meta = read_json(file)
        missing = [name for name in (*RANGE_KEYS, "configs") if name not in meta]
        settings = meta.get("configs") or [{}]
        if not isinstance(settings, list) or not all(isinstance(one, dict) for one in settings):
            raise ValueError(f"{file}: configs is no list of objects, one for each lens setting.")
        for setting in settings:
            missing += [f"configs: {name}" for name in SETTING_KEYS if name not in setting]
        if missing:
            raise ValueError(f"{file} lacks {', '.join(dict.fromkeys(missing))}.")
        low, high, *_ = (finite_number(meta[name], name, file) for name in RANGE_KEYS)
        if not high > low:
            raise ValueError(f"{file}: disp_max has to be larger than disp_min.")
        for setting in settings:
            for name in ("df", "K"):
                finite_number(setting[name], f"{name} of {setting['id']}", file)
        return meta

    def settings(self) -> list[str]:
        return [setting["id"] for setting in self.description["configs"]]

    def files(self) -> dict[Path, Reader]:
        names: dict[str, Reader] = {
            PHOTOGRAPH: read_picture,
            LIGHT: _read_light,
            DISPARITY: read_map,
            **{f"gt_{setting}.png": read_picture for setting in self.settings()},
        }
        return {self.folder / name: read for name, read in names.items()}

    def photographs(self) -> Iterator[Photograph]:
        meta = self.description
        image = self.read(self.folder / PHOTOGRAPH)
        light = self.read(self.folder / LIGHT, image)
        disparity = self.read(self.folder / DISPARITY, image)
        for setting in meta["configs"]:
            yield Photograph(
                scene=self.folder.name,
                setting=setting["id"],
                image=image,
                light=light,
                disparity=disparity,
                disparity_range=(meta["disp_min"], meta["disp_max"]),
                df=setting["df"],
                K=setting["K"],
                truth=self.read(self.folder / f"gt_{setting['id']}.png", image),
                labels={
                    "level": setting["level"],
                    "id": setting["id"],
                    "alpha": bool(meta.get("alpha_cards", False)),
                    "lights": meta.get("n_lights", 0) > 0,
                },
            )


def _read_light(file: Path) -> np.ndarray:
    light = read_array(file, "aif")
    if light.ndim != 3 or light.shape[2] != 3:
        raise ValueError(f"{file} holds 'aif' of shape {light.shape}; wanted (H, W, 3).")
    return light


class RaytracedScenes(ScenesOnDisk):
    """3D scenes that a ray tracer photographed through a thin lens with a circular opening.

    A folder for each scene with

    - ``aif.png``: all in focus, 8-bit sRGB;
    - ``aif_lin.npz['aif']``: (H, W, 3), the same in linear light, highlights not cut off;
    - ``disp.npz['disp']``: (H, W), disparity 1/distance, one sample through each pixel centre;
    - ``gt_<id>.png``: the truth for each lens setting, 8-bit sRGB;
    - ``meta.json``: ``disp_min``, ``disp_max`` and the quantiles ``disp_p001`` (0.1 %) and
      ``disp_p999`` of the disparity, whether there are cards with soft edges (``alpha_cards``)
      and how many small lamps (``n_lights``), and ``configs``, a list of lens settings, each with
      ``id``, ``level`` (largest blur radius, pixels), ``df`` and ``K``.

    The scenes come with the benchmark of this project; some of their textures are photographs by
    others, so they are for evaluation alone and are not handed on.

    Photographs carry ``light`` and the labels ``level``, ``id``, ``alpha`` and ``lights``.
    """

    name = "raytraced"
    layout = "folders with a meta.json, aif.png, aif_lin.npz, disp.npz and gt_*.png"

    @staticmethod
    def scenes_in(folder: Path) -> dict[str, RaytracedScene]:
        files = (*folder.glob(f"*/{DESCRIPTION}"), *folder.glob(f"*/{PHOTOGRAPH}"))
        return {file.parent.name: RaytracedScene(file.parent) for file in files}

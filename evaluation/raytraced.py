"""The ray-traced benchmark: 3D scenes photographed with a pinhole and with a thin lens.

Layout, one folder for each scene: ``aif.png`` (all in focus, 8-bit sRGB), ``aif_lin.npz['aif']``
(the same in linear light, highlights unclipped), ``disp.npz['disp']`` (float32 disparity
1/distance), ``gt_<setting>.png`` (the truth, 8-bit sRGB) and ``meta.json``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from evaluation.methods import Method, Photograph, read_picture
from evaluation.metrics import psnr, quantise_to_8_bit, structural_similarity_map

__all__ = ["Regions", "evaluate", "find_scenes", "protocol", "regions_of", "score", "summarise"]

# A depth edge: neighbouring disparities differ by more than this share of the scene's range.
EDGE_STEP = 0.03
EDGE_DISTANCE_PX = 6.0
IN_FOCUS_RADIUS_PX = 0.75
# Linear light above which the 8-bit photograph hides how bright a pixel is.
HIGHLIGHT_LEVEL = 1.5
# Regions with fewer pixels are too small for a figure of their own.
SMALLEST_REGION_PX = 200
# The lens settings that every scene has; scenes weigh equally in their mean.
COMMON_SETTINGS = ("f1_r28", "f0_r14", "f2_r06")

META_KEYS = ("disp_min", "disp_max", "disp_p001", "disp_p999", "configs")
SETTING_KEYS = ("id", "level", "df", "K")

PHOTOGRAPH_GIVEN = {
    "srgb8": "8-bit sRGB all-in-focus photograph",
    "linear": "all-in-focus photograph in linear light, highlights not cut off (half floats)",
}


def protocol(given: str) -> str:
    """What the figures mean, in words; ``given``: ``srgb8`` or ``linear``."""
    return (
        f"Each method is given the {PHOTOGRAPH_GIVEN[given]}, its true disparity (one sample "
        "through each pixel centre), the disparity in focus and K, and nothing else unless its "
        "description says so. "
        "The circle of confusion has a radius of K * |disparity - df| pixels; the lens is a thin "
        "lens with a circular opening. "
        "PSNR and SSIM (Gaussian window, sigma 1.5) are computed on display-encoded sRGB, "
        "predictions clipped and rounded to 8 bits, for each image, and averaged over images. "
        "edge: within 6 px of a disparity step of more than 3 % of the scene's range. infocus: "
        "radius below 0.75 px, not edge. blurred: the rest. nohl: pixels that the disc of no "
        "clipped highlight (linear light above 1.5) can reach, the fair figure for methods that "
        "see 8 bits; edge_nohl, blurred_nohl: the parts of these regions in it. level_NN: "
        "settings whose largest radius is NN px. common3: the three settings that every scene has. "
        "The interval is the middle 95 % of nohl PSNR when scenes, not images, are drawn again "
        "with replacement. Seconds are wall-clock time of the method alone, first image included."
    )


Regions = dict[str, np.ndarray]
"""Boolean masks (H, W) by name."""


@dataclass(frozen=True)
class Scene:
    """A scene folder, read when asked."""

    folder: Path
    meta: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name

    def photographs(self) -> Iterator[tuple[Photograph, Regions, dict[str, Any]]]:
        """Every lens setting: the photograph, its regions, and what its row of results says."""
        image = read_picture(self.folder / "aif.png")
        light = _read_array(self.folder / "aif_lin.npz", "aif").astype(np.float32)
        disparity = _read_array(self.folder / "disp.npz", "disp").astype(np.float32)
        for array, name in ((light, "aif_lin.npz"), (disparity, "disp.npz")):
            if array.shape[:2] != image.shape[:2]:
                raise ValueError(
                    f"{self.folder / name} is {array.shape[1]} x {array.shape[0]} pixels, aif.png "
                    f"{image.shape[1]} x {image.shape[0]}; wanted the same size."
                )
        disparity_step = EDGE_STEP * (self.meta["disp_p999"] - self.meta["disp_p001"])
        for setting in self.meta["configs"]:
            photograph = Photograph(
                scene=self.name,
                setting=setting["id"],
                image=image,
                light=light,
                disparity=disparity,
                disparity_range=(self.meta["disp_min"], self.meta["disp_max"]),
                df=setting["df"],
                K=setting["K"],
                truth=read_picture(self.folder / f"gt_{setting['id']}.png"),
            )
            labels = {
                "scene": self.name,
                "id": setting["id"],
                "level": setting["level"],
                "alpha": bool(self.meta.get("alpha_cards", False)),
                "lights": self.meta.get("n_lights", 0) > 0,
            }
            radius = setting["K"] * np.abs(disparity - setting["df"])
            yield photograph, regions_of(disparity, radius, light, disparity_step), labels


def find_scenes(data: str | Path, names: Sequence[str] | None = None) -> list[Scene]:
    """The scenes of a benchmark folder, sorted by name; only ``names`` if given.

    Raises ValueError for a missing folder, a folder without scenes, or an unknown scene name.
    """
    data = Path(data)
    if not data.is_dir():
        raise ValueError(f"There is no benchmark folder {data}.")
    found = {file.parent.name: file.parent for file in sorted(data.glob("*/meta.json"))}
    if not found:
        inside = next(data.glob("*/*/meta.json"), None)
        hint = f" Did you mean {inside.parent.parent}?" if inside else ""
        raise ValueError(
            f"{data} holds no scene; wanted folders with a meta.json, aif.png, aif_lin.npz, "
            f"disp.npz and gt_*.png.{hint}"
        )
    unknown = sorted(set(names or ()) - set(found))
    if unknown:
        raise ValueError(
            f"{data} has no scene {', '.join(unknown)}; it has {', '.join(sorted(found))}."
        )
    return [_read_scene(found[name]) for name in sorted(set(names or found))]


def _read_scene(folder: Path) -> Scene:
    file = folder / "meta.json"
    try:
        meta = json.loads(file.read_text())
    except json.JSONDecodeError as problem:
        raise ValueError(f"{file} is not valid JSON: {problem}.") from problem
    missing = [name for name in META_KEYS if name not in meta]
    settings = meta.get("configs") or [{}]
    missing += [f"configs: {name}" for name in SETTING_KEYS if name not in settings[0]]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}.")
    if not meta["disp_max"] > meta["disp_min"]:
        raise ValueError(f"{file}: disp_max has to be larger than disp_min.")
    return Scene(folder, meta)


def regions_of(
    disparity: np.ndarray, radius: np.ndarray, light: np.ndarray, disparity_step: float
) -> Regions:
    """Masks (H, W): exclusive infocus, blurred, edge; nohl overlaps them; edge_nohl, blurred_nohl.

    disparity (H, W); radius (H, W) of the circle of confusion in pixels; light (H, W, 3) linear,
    unclipped; disparity_step: the smallest step between neighbours that counts as a depth edge.
    """
    from scipy.ndimage import distance_transform_edt

    at_edge = np.zeros(disparity.shape, bool)
    across = np.abs(np.diff(disparity, axis=1)) > disparity_step
    down = np.abs(np.diff(disparity, axis=0)) > disparity_step
    at_edge[:, 1:] |= across
    at_edge[:, :-1] |= across
    at_edge[1:] |= down
    at_edge[:-1] |= down
    edge = at_edge
    if at_edge.any():
        edge = distance_transform_edt(~at_edge) <= EDGE_DISTANCE_PX

    highlight = light.max(axis=2) > HIGHLIGHT_LEVEL
    reached = np.zeros(disparity.shape, bool)
    # Highlights of similar radius (within 2 px, rounded up) share one distance transform.
    reach_class = np.ceil(radius / 2).astype(int)
    for reach in np.unique(reach_class[highlight]):
        members = highlight & (reach_class == reach)
        reached |= distance_transform_edt(~members) <= 2 * reach + 1.5

    sharp = radius < IN_FOCUS_RADIUS_PX
    blurred = ~sharp & ~edge
    return {
        "infocus": sharp & ~edge,
        "blurred": blurred,
        "edge": edge,
        "nohl": ~reached,
        "edge_nohl": edge & ~reached,
        "blurred_nohl": blurred & ~reached,
    }


def score(prediction: np.ndarray, truth: np.ndarray, regions: Regions) -> dict[str, float]:
    """PSNR and SSIM of the whole image and of every region of at least 200 pixels.

    prediction (H, W, 3) float sRGB in [0, 1], rounded here to 8 bits; truth (H, W, 3) uint8 sRGB.
    """
    if prediction.shape != truth.shape:
        raise ValueError(
            f"The prediction has shape {prediction.shape}, the truth {truth.shape}; wanted the "
            "same size, (height, width, 3)."
        )
    if not np.isfinite(prediction).all():
        raise ValueError("The prediction contains NaN or infinite values.")
    rounded, exact = quantise_to_8_bit(prediction), truth / 255.0
    squared_error = ((rounded - exact) ** 2).mean(axis=2)
    mean_similarity, similarity = structural_similarity_map(rounded, exact)
    figures = {"psnr": psnr(float(squared_error.mean())), "ssim": mean_similarity}
    for name, mask in regions.items():
        if mask.sum() >= SMALLEST_REGION_PX:
            figures[f"psnr_{name}"] = psnr(float(squared_error[mask].mean()))
            figures[f"ssim_{name}"] = float(similarity[mask].mean())
    return figures


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over all rows and over groups of rows, each a dict of figures; and the interval."""
    groups = {"overall": list(rows)}
    for level in sorted({row["level"] for row in rows}):
        groups[f"level_{level:02d}"] = [row for row in rows if row["level"] == level]
    groups["alpha_scenes"] = [row for row in rows if row["alpha"]]
    groups["light_scenes"] = [row for row in rows if row["lights"]]
    groups["no_light_scenes"] = [row for row in rows if not row["lights"]]
    groups["common3"] = [row for row in rows if row["id"] in COMMON_SETTINGS]
    summary: dict[str, Any] = {name: _means(members) for name, members in groups.items()}
    summary["images"] = len(rows)
    summary["scenes"] = len({row["scene"] for row in rows})
    summary["psnr_nohl_interval"] = _interval_over_scenes(rows, "psnr_nohl")
    return summary


def evaluate(
    scenes: Sequence[Scene], methods: Sequence[Method], save_to: str | Path | None = None
) -> dict[str, dict[str, Any]]:
    """Results by method name: :func:`summarise` plus description, seconds_per_image and rows.

    ``save_to``: folder for the 8-bit predictions ``<scene>_<setting>.png``, in a subfolder for
    each method if there are several.
    """
    rows: dict[str, list[dict[str, Any]]] = {method.name: [] for method in methods}
    if len(rows) < len(methods):
        raise ValueError(f"Two methods share a name: {', '.join(m.name for m in methods)}.")
    images = sum(len(scene.meta["configs"]) for scene in scenes)
    with tqdm(
        total=images * len(methods), unit="image", desc="raytraced", leave=False, disable=None
    ) as progress:
        for scene in scenes:
            for photograph, regions, labels in scene.photographs():
                for method in methods:
                    progress.set_postfix_str(f"{photograph.name} {method.name}")
                    start = time.perf_counter()
                    prediction = method.render(photograph)
                    seconds = time.perf_counter() - start
                    try:
                        figures = score(prediction, photograph.truth, regions)
                    except ValueError as problem:
                        raise ValueError(f"{method.name}, {photograph.name}: {problem}") from None
                    rows[method.name].append({**labels, "seconds": seconds, **figures})
                    if save_to is not None:
                        folder = Path(save_to) / (method.name if len(methods) > 1 else "")
                        _write_png(folder / f"{photograph.name}.png", prediction)
                    progress.update()
    return {
        method.name: {
            "description": method.description,
            "seconds_per_image": (
                float(np.mean([row["seconds"] for row in rows[method.name]]))
                if method.timed
                else None
            ),
            **summarise(rows[method.name]),
            "rows": rows[method.name],
        }
        for method in methods
    }


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean of every figure over the rows that have it."""
    names = sorted({name for row in rows for name in row if name.startswith(("psnr", "ssim"))})
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def _interval_over_scenes(rows: Sequence[dict[str, Any]], figure: str) -> list[float] | None:
    """[low, high] of the middle 95 % of the mean when whole scenes are drawn with replacement."""
    by_scene: dict[str, list[float]] = {}
    for row in rows:
        if figure in row:
            by_scene.setdefault(row["scene"], []).append(row[figure])
    if len(by_scene) < 2:
        return None
    sums = np.array([sum(values) for values in by_scene.values()])
    counts = np.array([len(values) for values in by_scene.values()])
    draws = np.random.default_rng(0).integers(len(sums), size=(2000, len(sums)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    return [float(value) for value in np.percentile(means, [2.5, 97.5])]


def _read_array(file: Path, key: str) -> np.ndarray:
    if not file.is_file():
        raise ValueError(f"{file} is missing from the benchmark.")
    with np.load(file) as archive:
        if key not in archive:
            raise ValueError(f"{file} has no array {key!r}; it has {', '.join(archive)}.")
        return archive[key]


def _write_png(file: Path, image: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((quantise_to_8_bit(image) * 255).round().astype(np.uint8)).save(file)

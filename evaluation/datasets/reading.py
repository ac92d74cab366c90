"""The files that data sets are made of: JSON, arrays, maps of disparity, and files by name.

They raise a ValueError that names the file that is missing or wrong; of damaged arrays numpy raises
more kinds of errors, which :meth:`~evaluation.datasets.scenes.Scene.read` turns into one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bokehdiff.images import read_disparity

__all__ = [
    "MAP_SUFFIXES",
    "PICTURE_SUFFIXES",
    "files_by_name",
    "finite_number",
    "map_of",
    "read_array",
    "read_json",
    "read_map",
]

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
MAP_SUFFIXES = (".npy", ".npz", ".pfm", ".png", ".tif", ".tiff")
# What may follow the name of a photograph in that of its map: nothing, or as two programs end it.
MAP_ENDINGS = ("_pred", "_disparity", "")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    if not file.is_file():
        raise ValueError(f"{file} is missing.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"{file} is not valid JSON: {problem}.") from problem
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}; wanted an object.")
    return content


def finite_number(value: Any, what: str, file: Path) -> float:
    """The value as a float. ``what`` names it in the error."""
    # Booleans are integers to Python, to a person they are not.
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{file}: {what} is {value!r}; wanted a finite number.")
    return float(value)


def read_array(file: Path, key: str) -> np.ndarray:
    """The array of that name in an ``.npz`` file, as float32. All its values are finite."""
    if not file.is_file():
        raise ValueError(f"{file} is missing.")
    with np.load(file, allow_pickle=False) as archive:
        if key not in archive:
            raise ValueError(f"{file} has no array {key!r}; it has {', '.join(archive)}.")
        return _finite(archive[key].astype(np.float32), file)


def read_map(file: Path) -> np.ndarray:
    """(H, W) float32 disparity in the unit of the file; 8 and 16-bit files span [0, 1]."""
    if not file.is_file():
        raise ValueError(f"{file} is missing.")
    try:
        disparity = read_disparity(file)[0, 0].numpy()
    except ValueError as problem:
        raise ValueError(f"{file} cannot be read as a map of disparity: {problem}") from problem
    return _finite(disparity, file)


def _finite(array: np.ndarray, file: Path) -> np.ndarray:
    unknown = int((~np.isfinite(array)).sum())
    if unknown:
        raise ValueError(
            f"{file} has {unknown} NaN or infinite values; wanted finite ones. Fill the holes "
            "first, for instance with bokehdiff.images.fill_holes."
        )
    return array


def files_by_name(folder: Path, suffixes: Iterable[str]) -> dict[str, Path]:
    """The files of a folder with one of these suffixes, by their names without it; sorted.

    {} if there is no such folder. Hidden files are left out. ValueError if two share a name.
    """
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.suffix.lower() not in suffixes or file.name.startswith("."):
            continue
        if file.stem in found:
            raise ValueError(
                f"{found[file.stem]} and {file} have the same name; wanted one file for each."
            )
        found[file.stem] = file
    return found


def map_of(name: str, maps: dict[str, Path], folder: Path) -> Path:
    """The map of a photograph among those of a folder: NAME_pred, NAME_disparity or NAME.

    The path of a file that is missing, NAME.npy, if there is none.
    """
    endings = [name + ending for ending in MAP_ENDINGS if name + ending in maps]
    if len(endings) > 1:
        raise ValueError(
            f"{folder} holds {' and '.join(maps[ending].name for ending in endings)}; wanted one "
            f"map of {name}."
        )
    return maps[endings[0]] if endings else folder / f"{name}.npy"

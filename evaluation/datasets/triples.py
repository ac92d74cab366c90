"""Any folder of triples: a photograph, its disparity, and what a lens took."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evaluation.datasets.reading import (
    MAP_SUFFIXES,
    PICTURE_SUFFIXES,
    files_by_name,
    finite_number,
    map_of,
    read_json,
    read_map,
)
from evaluation.datasets.scenes import Reader, Scene, ScenesOnDisk
from evaluation.photographs import Photograph, read_picture

__all__ = ["Triples"]

SETTINGS = ("settings.json", "settings.csv")
COLUMNS = ("name", "df", "K", "scene")
# The lens setting of a photograph that is a scene of its own.
ONLY_SETTING = "bokeh"


class _Triple(Scene):
    """A photograph, its disparity, its truth, and what the settings say of them."""

    def __init__(
        self, scene: str, setting: str, image: Path, disparity: Path, truth: Path,
        row: dict[str, Any], source: Path,
    ) -> None:  # fmt: skip
        self.scene, self.setting = scene, setting
        self.image, self.disparity, self.truth = image, disparity, truth
        self.row, self.source = row, source

    @property
    def df(self) -> float:
        return finite_number(self.row.get("df"), f"df of {self.image.stem}", self.source)

    @property
    def K(self) -> float | None:
        """None where the settings say none."""
        if self.row.get("K") is None:
            return None
        K = finite_number(self.row["K"], f"K of {self.image.stem}", self.source)
        if K < 0:
            raise ValueError(f"{self.source}: K of {self.image.stem} is {K:g}; wanted 0 or more.")
        return K

    def settings(self) -> list[str]:
        return [self.setting]

    def files(self) -> dict[Path, Reader]:
        return {self.image: read_picture, self.disparity: read_map, self.truth: read_picture}

    def photographs(self) -> Iterator[Photograph]:
        image = self.read(self.image)
        disparity = self.read(self.disparity, image)
        yield Photograph(
            scene=self.scene,
            setting=self.setting,
            image=image,
            disparity=disparity,
            disparity_range=(float(disparity.min()), float(disparity.max())),
            df=self.df,
            K=self.K,
            truth=self.read(self.truth, image),
        )

    def problems(self) -> list[str]:
        problems = super().problems()
        for number in ("df", "K"):
            try:
                getattr(self, number)
            except ValueError as problem:
                problems.append(str(problem))
        return problems


class _Triples(Scene):
    """The triples of one scene."""

    def __init__(self, triples: list[_Triple]) -> None:
        self.triples = triples

    def settings(self) -> list[str]:
        return [triple.setting for triple in self.triples]

    def files(self) -> dict[Path, Reader]:
        return {file: read for triple in self.triples for file, read in triple.files().items()}

    def photographs(self) -> Iterator[Photograph]:
        for triple in self.triples:
            yield from triple.photographs()

    def problems(self) -> list[str]:
        # Triple by triple: the photographs of a scene may differ in size.
        return [problem for triple in self.triples for problem in triple.problems()]


class Triples(ScenesOnDisk):
    """Photographs of your own, or of a set that has no reader here.

    For each NAME

    - ``image/NAME.png``: all in focus; ``.jpg`` and ``.jpeg`` too;
    - ``disparity/NAME.npy``: (H, W), larger is nearer, in any unit, taken as it is; ``.npz``,
      ``.pfm``, 8 and 16-bit ``.png`` and ``.tif`` (these span [0, 1]), and the names NAME_pred and
      NAME_disparity too;
    - ``bokeh/NAME.png``: the truth;

    and one file that says how each was taken: ``settings.json``,
    ``{"NAME": {"df": 0.4, "K": 25.0, "scene": "kitchen"}}``, or ``settings.csv`` with the columns
    ``name``, ``df``, ``K`` and ``scene``.

    - df: disparity in focus, in the unit of the map;
    - K: pixels of blur radius per unit of disparity; left out or empty where nobody knows it;
    - scene: photographs that show the same, so that intervals draw them together; left out or
      empty for a photograph that is a scene of its own.

    The setting of a photograph is NAME, or ``bokeh`` if it is a scene of its own.
    """

    name = "triples"
    layout = (
        "the folders image, disparity and bokeh, and settings.json or settings.csv with df for "
        "each picture"
    )

    @staticmethod
    def scenes_in(folder: Path) -> dict[str, _Triples]:
        sources = [folder / name for name in SETTINGS if (folder / name).is_file()]
        if len(sources) > 1:
            raise ValueError(f"{folder} holds {' and '.join(SETTINGS)}; wanted one of them.")
        if not sources:
            return {}
        source = sources[0]
        try:
            rows = _read_csv(source) if source.suffix == ".csv" else _read_rows(source)
        except (UnicodeDecodeError, csv.Error) as problem:
            raise ValueError(f"{source} is no table as CSV: {problem}.") from problem
        images, truths = (
            files_by_name(folder / part, PICTURE_SUFFIXES) for part in ("image", "bokeh")
        )
        maps = files_by_name(folder / "disparity", MAP_SUFFIXES)
        scenes: dict[str, list[_Triple]] = {}
        for name, row in sorted(rows.items()):
            scene = row.get("scene")
            triple = _Triple(
                scene=name if scene is None else str(scene),
                setting=ONLY_SETTING if scene is None else name,
                image=images.get(name, folder / "image" / f"{name}.png"),
                disparity=map_of(name, maps, folder / "disparity"),
                truth=truths.get(name, folder / "bokeh" / f"{name}.png"),
                row=row,
                source=source,
            )
            scenes.setdefault(triple.scene, []).append(triple)
        return {scene: _Triples(triples) for scene, triples in scenes.items()}

    def verify(self) -> list[str]:
        found = self.scenes_in(self.folder).values()
        described = {triple.image for scene in found for triple in scene.triples}
        pictures = files_by_name(self.folder / "image", PICTURE_SUFFIXES).values()
        unknown = sorted(set(pictures) - described)
        return [f"{file} is in no {' or '.join(SETTINGS)}." for file in unknown] + super().verify()


def _read_rows(file: Path) -> dict[str, dict[str, Any]]:
    rows = read_json(file)
    for name, row in rows.items():
        if not isinstance(row, dict):
            raise ValueError(
                f"{file}: {name} is {json.dumps(row)}; wanted an object with df, and maybe K and "
                "scene."
            )
    return rows


def _read_csv(file: Path) -> dict[str, dict[str, Any]]:
    """The rows by name; empty cells are left out, df and K are numbers where they look like it."""
    with file.open(newline="", encoding="utf-8-sig") as lines:
        table = csv.DictReader(lines)
        columns = table.fieldnames or []
        if not {"name", "df"} <= set(columns):
            raise ValueError(
                f"{file} has the columns {', '.join(columns) or '(none)'}; wanted name and df, and "
                "maybe K and scene."
            )
        rows: dict[str, dict[str, Any]] = {}
        for line in table:
            row = {column: line[column] for column in COLUMNS if line.get(column)}
            name = row.pop("name", "")
            if name in rows:
                raise ValueError(f"{file} has {name!r} twice; wanted one line for each name.")
            rows[name] = {**row, **_numbers(row)}
    return rows


def _numbers(row: dict[str, str]) -> dict[str, float]:
    """df and K of a row as numbers. What is none stays text, to be refused when it is needed."""
    numbers = {}
    for column in ("df", "K"):
        try:
            numbers[column] = float(row[column])
        except (KeyError, ValueError):
            continue
    return numbers

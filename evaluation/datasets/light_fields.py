"""Light fields: photographs from a grid of viewpoints, which add up to what a lens takes."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bokehdiff.images import linear_to_srgb, srgb_to_linear
from evaluation.datasets.reading import MAP_SUFFIXES, PICTURE_SUFFIXES, files_by_name, read_map
from evaluation.datasets.scenes import Reader, Scene, ScenesOnDisk
from evaluation.photographs import Photograph, read_picture

__all__ = ["LightFields", "aperture_weights", "radius_of", "refocused"]

# Planes in focus: these percentiles of the disparity.
FOCUS_PERCENTILES = {"near": 95, "middle": 50, "far": 5}
# Apertures: parts of the largest disc that the grid of views holds.
APERTURES = {"full": 1.0, "half": 0.5}

VIEW_NAME = re.compile(r"(\d+)_(\d+)")
NUMBERED_VIEW_NAME = re.compile(r"input_Cam(\d+)")
DISPARITIES = ("disparity", "gt_disp_lowres")
# Samples along a side of a view's cell by which its share of the disc is told.
CELL_SAMPLES = 64


def aperture_weights(rows: int, columns: int, radius: float) -> np.ndarray:
    """(rows, columns) float64: how much of a round aperture each view stands for; their sum is 1.

    A view stands for the unit square around it, and weighs as much as the disc of this radius
    (distances between neighbouring views) around the central view covers of its square.
    """
    offset = (np.arange(CELL_SAMPLES) + 0.5) / CELL_SAMPLES - 0.5
    down, across = (
        (np.arange(count)[:, None] - (count - 1) / 2 + offset).ravel() for count in (rows, columns)
    )
    inside = down[:, None] ** 2 + across**2 <= radius**2
    weights = inside.reshape(rows, CELL_SAMPLES, columns, CELL_SAMPLES).mean(axis=(1, 3))
    return weights / weights.sum()


def radius_of(weights: np.ndarray) -> float:
    """Radius, in views, of the uniform disc that spreads light as far as weights (V, U) of views.

    ``2 sqrt(mean u^2)``, u the distance of a view from the centre along one axis, is the radius of
    a disc; the views at its rim stand for squares that it covers in part, so they reach a little
    beyond the disc that :func:`aperture_weights` was asked for.
    """
    rows, columns = weights.shape
    down, across = np.arange(rows) - (rows - 1) / 2, np.arange(columns) - (columns - 1) / 2
    squared = (weights * (down[:, None] ** 2 + across**2)).sum() / weights.sum()
    return float(2 * np.sqrt(squared / 2))


def refocused(views: np.ndarray, disparity: float, weights: np.ndarray) -> np.ndarray:
    """(H, W, 3) what a lens takes that is focused on a disparity; same dtype as the views.

    views (V, U, H, W, 3) in linear light, rows of views from above, columns from the left;
    disparity: pixels by which a thing moves from one view to the next; weights (V, U) of the views,
    of sum 1. A thing of disparity d, seen at x in the central view (vc, uc), is at
    ``x - d (u - uc)`` in column u and at ``y - d (v - vc)`` in row v, so with df in focus

        lens(y, x) = sum over v, u of weight[v, u] * view[v, u](y - df (v - vc), x - df (u - uc))

    It is spread over a disc of ``radius_of(weights) * |d - df|`` pixels. Between
    pixels cubic splines interpolate; beyond the border the outermost pixels repeat.
    """
    from scipy.ndimage import shift

    rows, columns = weights.shape
    picture = np.zeros(views.shape[2:], np.float64)
    for v, u in zip(*np.nonzero(weights), strict=True):
        down, across = disparity * (v - (rows - 1) / 2), disparity * (u - (columns - 1) / 2)
        # One channel at a time: over all three, scipy interpolates between colours too.
        for channel in range(views.shape[4]):
            moved = shift(views[v, u, ..., channel], (down, across), order=3, mode="nearest")
            picture[..., channel] += weights[v, u] * moved
    return picture.astype(views.dtype)


class _LightField(Scene):
    """A folder of the layout that :class:`LightFields` describes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @functools.cached_property
    def grid(self) -> list[list[Path]]:
        """The files of the views, rows from above; names of missing ones too."""
        named = _numbers_in(self.folder / "views", VIEW_NAME)
        numbered = _numbers_in(self.folder, NUMBERED_VIEW_NAME)
        if named and numbered:
            raise ValueError(f"{self.folder} holds views/ and input_Cam*; wanted one of them.")
        if numbered:
            side = math.isqrt(max(number for (number,) in numbered)) + 1
            grid = [
                [
                    numbered.get((number,), self.folder / f"input_Cam{number:03d}.png")
                    for number in range(row * side, (row + 1) * side)
                ]
                for row in range(side)
            ]
        else:
            rows, columns = (range(min(ends), max(ends) + 1) for ends in zip(*named, strict=True))
            grid = [
                [
                    named.get((row, column), self.folder / "views" / f"{row:02d}_{column:02d}.png")
                    for column in columns
                ]
                for row in rows
            ]
        if len(grid) % 2 == 0 or len(grid[0]) % 2 == 0 or min(len(grid), len(grid[0])) < 3:
            raise ValueError(
                f"{self.folder} has {len(grid)} x {len(grid[0])} views (rows x columns); wanted "
                "odd numbers from 3 up, so that one view is the central one."
            )
        return grid

    @property
    def disparity(self) -> Path:
        maps = files_by_name(self.folder, MAP_SUFFIXES)
        found = [maps[name] for name in DISPARITIES if name in maps]
        if len(found) > 1:
            raise ValueError(
                f"{self.folder} holds {' and '.join(file.name for file in found)}; wanted one of "
                "them."
            )
        return found[0] if found else self.folder / f"{DISPARITIES[0]}.npy"

    @property
    def counts(self) -> tuple[int, int]:
        """How many rows and columns of views there are."""
        return len(self.grid), len(self.grid[0])

    @property
    def centre(self) -> Path:
        rows, columns = self.counts
        return self.grid[rows // 2][columns // 2]

    @property
    def largest_radius(self) -> float:
        """Of the largest disc that the squares around the views hold, in views."""
        return min(self.counts) / 2

    def settings(self) -> list[str]:
        return [f"{plane}_{aperture}" for plane in FOCUS_PERCENTILES for aperture in APERTURES]

    def files(self) -> dict[Path, Reader]:
        files: dict[Path, Reader] = {self.centre: read_picture, self.disparity: read_map}
        return files | {file: read_picture for row in self.grid for file in row}

    def photographs(self) -> Iterator[Photograph]:
        image = self.read(self.centre)
        disparity = self.read(self.disparity, image)
        focus = {
            plane: float(np.percentile(disparity, percentile))
            for plane, percentile in FOCUS_PERCENTILES.items()
        }
        frame = self._frame(image.shape, max(map(abs, focus.values())))
        views = np.stack([self._row(row, image) for row in self.grid])
        # Renderers take no negative disparity, and only differences matter.
        farthest = float(disparity[frame].min())
        disparity = disparity - farthest
        shown = disparity[frame]
        for plane, df in focus.items():
            largest_step = float(np.abs(shown - (df - farthest)).max())
            for aperture, part in APERTURES.items():
                weights = aperture_weights(*self.counts, part * self.largest_radius)
                light = refocused(views, df, weights)[frame].clip(0, 1)
                yield Photograph(
                    scene=self.folder.name,
                    setting=f"{plane}_{aperture}",
                    image=image[frame],
                    disparity=shown,
                    disparity_range=(float(shown.min()), float(shown.max())),
                    df=df - farthest,
                    K=radius_of(weights),
                    truth=(linear_to_srgb(light) * 255).round().astype(np.uint8),
                    labels={"view_step_px": largest_step},
                )

    def problems(self) -> list[str]:
        return super().problems() or self._moves_the_other_way()

    def _moves_the_other_way(self) -> list[str]:
        """A sentence for each direction in which the views fit the negative disparity better."""
        from scipy.ndimage import map_coordinates

        image, disparity = self.read(self.centre), self.read(self.disparity)
        y, x = np.indices(disparity.shape, np.float32)
        row, column = (count // 2 for count in self.counts)
        problems = []
        for file, down, across, where in (
            (self.grid[row][column + 1], 0, 1, "to the right of"),
            (self.grid[row + 1][column], 1, 0, "below"),
        ):
            view = self.read(file).mean(axis=2)
            errors = []
            for sign in (1, -1):
                seen_at = (y - sign * down * disparity, x - sign * across * disparity)
                fitted = map_coordinates(view, seen_at, order=1, mode="nearest")
                errors.append(float(np.abs(fitted - image.mean(axis=2)).mean()))
            if errors[1] < errors[0]:
                problems.append(
                    f"{self.disparity}: in {file.name}, {where} the central view, things "
                    "move against its disparity; wanted larger to be nearer, rows of views from "
                    "above and columns from the left."
                )
        return problems

    def _row(self, row: list[Path], image: np.ndarray) -> np.ndarray:
        """(U, H, W, 3) float32 linear light of the views of a row."""
        views = [self.read(file, image) for file in row]
        return srgb_to_linear(np.stack(views).astype(np.float32) / 255)

    def _frame(self, shape: tuple[int, ...], largest_shift: float) -> tuple[slice, slice]:
        """Rows and columns that every view shows, whichever plane is in focus."""
        margins = [math.ceil(largest_shift * (count - 1) / 2) for count in self.counts]
        for side, margin in zip(shape[:2], margins, strict=True):
            if side <= 2 * margin:
                raise ValueError(
                    f"{self.disparity}: its disparities move the outermost views by {margin} "
                    f"pixels, half of the picture ({side} pixels) or more; wanted pixels from one "
                    "view to the next."
                )
        down, across = (
            slice(margin, side - margin) for side, margin in zip(shape[:2], margins, strict=True)
        )
        return down, across


def _numbers_in(folder: Path, name: re.Pattern[str]) -> dict[tuple[int, ...], Path]:
    """The pictures of a folder by the numbers in their names."""
    return {
        tuple(int(number) for number in match.groups()): file
        for stem, file in files_by_name(folder, PICTURE_SUFFIXES).items()
        if (match := name.fullmatch(stem))
    }


class LightFields(ScenesOnDisk):
    """Scenes seen from a grid of viewpoints, which together are a lens of any size and focus.

    A folder for each scene with

    - ``views/VV_UU.png`` (``.jpg`` too): what the camera in row VV, counted from above, and column
      UU, counted from the left, sees; or ``input_Cam000.png`` and so on, row by row from the top
      left, as in the 4D light field benchmark (Honauer et al. 2016, CC BY-NC-SA 4.0,
      lightfield-analysis.uni-konstanz.de). A full grid with odd numbers of rows and columns;
    - ``disparity.npy`` (``.npz``, ``.pfm``) or ``gt_disp_lowres.pfm``: (H, W), disparity of the
      central view: **pixels by which a thing moves to the left from one view to the next on the
      right**, and up to the next below. Larger is nearer; it may be negative.

    The photograph is the central view. The truth is the weighted mean, in linear light, of all
    views, each shifted so that the plane in focus lies still (:func:`refocused`). The aperture is
    a disc around the central view (:func:`aperture_weights`), and K is its radius in views
    (:func:`radius_of`): a thing of disparity d is spread over a disc of ``K * |d - df|`` pixels.
    The full aperture is the largest disc that the squares around the views hold (of 9 x 9 views:
    4.5), the half has half its radius; in focus are the 95th, 50th and 5th percentile of the
    disparity. Disparity and df are counted from the farthest pixel, so that they are not negative,
    and the border that some view does not show is cut off.

    The views are samples of the lens: where a thing moves by more than a pixel from one view to
    the next, relative to the plane in focus, the truth shows copies of it rather than a disc. The
    label ``view_step_px`` says the largest such step, in pixels.
    """

    name = "light_fields"
    layout = "folders with views/VV_UU.png or input_Cam000.png and so on, and a disparity.npy"

    @staticmethod
    def scenes_in(folder: Path) -> dict[str, _LightField]:
        return {
            scene.name: _LightField(scene)
            for scene in sorted(folder.iterdir())
            if _numbers_in(scene / "views", VIEW_NAME) or _numbers_in(scene, NUMBERED_VIEW_NAME)
        }

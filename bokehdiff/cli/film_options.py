"""What the command line says about focus and blur of a film."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .options import parse_focus
from .speech import Mistake, note

if TYPE_CHECKING:
    from ..camera import Camera
    from ..film_blur import FilmLens
    from ..focus_keyframes import FocusKeyframe
    from ..video_files import FilmFormat

ASSUMED_FOCAL_LENGTH_MM = 50.0


@dataclass(frozen=True)
class FilmOptions:
    """Focus and blur as they were given; :meth:`keyframes` and :meth:`lens` apply them."""

    focus: str | None = None
    df: float | None = None
    strength: float | None = None
    f_number: float | None = None
    focal_length_mm: float | None = None
    focal_length_35mm: float | None = None
    sensor_width_mm: float | None = None
    focus_distance_m: float | None = None
    farthest_distance_m: float | None = None

    @property
    def has_camera(self) -> bool:
        """Whether any option describes the camera."""
        parts = (
            self.f_number,
            self.focal_length_mm,
            self.focal_length_35mm,
            self.sensor_width_mm,
        )
        return any(part is not None for part in parts)

    def check(self, metric: bool) -> None:
        """Refuses options that do not go together, before anything is read.

        Args:
            metric: whether disparity may be in 1/metres.
        """
        from ..optics import check_focus_and_strength

        if self.focus is not None and self.df is not None:
            raise Mistake("--focus and --df both came; what is in focus is said by one of them.")
        if self.strength is not None and self.has_camera:
            raise Mistake("--K and options of a camera both came; the blur is said by one of them.")
        if self.sensor_width_mm is not None and self.focal_length_35mm is not None:
            raise Mistake(
                "--sensor-width and --focal-length-35mm both came; the sensor is said by one of "
                "them."
            )
        if self.focal_length_35mm is not None and self.focal_length_mm is None:
            raise Mistake("--focal-length-35mm goes with --focal-length, the real one.")
        check_focus_and_strength(self.df or 0.0, self.strength or 0.0, 1, metric=metric)

    def keyframes(self, metric: bool) -> list[FocusKeyframe]:
        """What is in focus, as keyframes.

        Args:
            metric: whether disparity is in 1/metres.
        """
        from ..focus_keyframes import FocusKeyframe, read_focus_keyframes

        if metric and self.farthest_distance_m is not None:
            raise Mistake(
                "--farthest-distance goes with maps without a unit; these are in 1/metres."
            )
        if metric and self.focus_distance_m is not None:
            if self.focus is not None or self.df is not None:
                raise Mistake(
                    f"--focus-distance {self.focus_distance_m:g} came beside another focus, but "
                    "disparity is in 1/metres, which says by itself how far away that is; leave "
                    "one of them out."
                )
            return [FocusKeyframe(frame=0, distance_m=self.focus_distance_m)]
        if self.df is not None:
            return [FocusKeyframe(frame=0, df=self.df)]
        if self.focus is not None and self.focus.lower().endswith(".json"):
            keyframes = read_focus_keyframes(self.focus)
            for one in keyframes:
                _check_unit(one, self.focus, metric)
            return keyframes
        where = parse_focus("auto" if self.focus is None else self.focus)
        if where == "auto":
            return [FocusKeyframe(frame=0, auto=True)]
        if where == "sharpest" or len(where) != 2:
            raise Mistake(
                f"--focus is {self.focus!r}; wanted a pixel X,Y of the first frame, auto, or a "
                "JSON file of keyframes."
            )
        return [FocusKeyframe(frame=0, point=where)]

    def lens(
        self, keyframes: list[FocusKeyframe], film: FilmFormat, metric: bool
    ) -> tuple[FilmLens, list[float]]:
        """The lens, and its strength at each keyframe: K, or with a camera 1 over the f-number."""
        from ..film_blur import FilmLens
        from ..lens import DEFAULT_STRENGTH

        by_f_number = any(one.f_number is not None for one in keyframes)
        by_strength = any(one.K is not None for one in keyframes)
        if by_f_number and self.strength is not None or by_strength and self.has_camera:
            raise Mistake(
                "The blur is said by K here and by a camera there (--K and --f-number, K and "
                "f_number of keyframes); wanted one of them."
            )
        size = (film.height, film.width)
        camera = self._camera(keyframes, size) if self.has_camera or by_f_number else None
        distances = (self.focus_distance_m, self.farthest_distance_m)
        if metric:
            distances = (None, None)
        elif camera is None and any(one is not None for one in distances):
            raise Mistake(
                "--focus-distance and --farthest-distance go with a camera, for instance "
                "--f-number 2; without one K is the blur."
            )
        if camera is None:
            K = DEFAULT_STRENGTH if self.strength is None else self.strength
            strengths = _carried_on(K, [one.K for one in keyframes])
        else:
            numbers = _carried_on(camera.f_number, [one.f_number for one in keyframes])
            strengths = [1 / number for number in numbers]
        focus_distance, farthest = distances
        lens = FilmLens(
            camera, size, metric, focus_distance, math.inf if farthest is None else farthest
        )
        return lens, strengths

    def _camera(self, keyframes: list[FocusKeyframe], size: tuple[int, int]) -> Camera:
        from ..camera import FULL_FRAME_WIDTH_MM, Camera

        numbers = (self.f_number, *(one.f_number for one in keyframes))
        f_number = next((one for one in numbers if one is not None), None)
        if f_number is None:
            raise Mistake("A camera came without its f-number; wanted --f-number, for instance 2.")
        focal_length = self.focal_length_mm
        if focal_length is None:
            focal_length = ASSUMED_FOCAL_LENGTH_MM
            note(
                f"films do not say their focal length, so {focal_length:g} mm was assumed; "
                "--focal-length sets it, on which the strength of the blur depends."
            )
        if self.focal_length_35mm is not None:
            return Camera.from_equivalent(f_number, focal_length, self.focal_length_35mm, size)
        width = FULL_FRAME_WIDTH_MM if self.sensor_width_mm is None else self.sensor_width_mm
        return Camera(f_number, focal_length, width)


def _check_unit(keyframe: FocusKeyframe, name: str, metric: bool) -> None:
    """Refuses a plane that the maps cannot have."""
    if keyframe.distance_m is not None and not metric:
        raise Mistake(
            f"{name} has distance_m at {keyframe.moment}, but disparity has no unit; wanted df, a "
            "pixel or auto, or disparity in metres: the network's own, a metric --depth-model, or "
            "maps with --metric."
        )
    if keyframe.df is not None and keyframe.df > 1 and not metric:
        raise Mistake(
            f"{name} has df {keyframe.df:g} at {keyframe.moment}; wanted a disparity within [0, 1]."
        )


def _carried_on(first: float, values: list[float | None]) -> list[float]:
    """The values, each that is missing as the one before."""
    found = []
    for value in values:
        first = first if value is None else value
        found.append(first)
    return found

"""A real camera, and the blur it makes: f-number, focal length and sensor, given or from EXIF.

:meth:`Camera.strength` is the one place where a camera becomes K, pixels of blur radius per unit of
a disparity map; the formula is :func:`bokehdiff.optics.strength_from_camera`.
"""

from __future__ import annotations

import math
import os
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from PIL import Image

from .exif_blocks import EXIF_FOLDER, HEIGHTS, WIDTHS
from .images import ImageInput
from .optics import (
    PerImage,
    check_focus_and_strength,
    require_positive,
    sensor_width_from_equivalent,
    strength_from_camera,
)
from .picture_files import InputRepairedWarning, existing_file, open_picture
from .whole_files import PathLike

__all__ = ["ASSUMED_FOCUS_DISTANCE_M", "FULL_FRAME_WIDTH_MM", "Camera", "subject_distance_m"]

FULL_FRAME_WIDTH_MM = 36.0
"""Long side of the sensor of a full-frame camera."""

ASSUMED_FOCUS_DISTANCE_M = 2.0
"""Distance of the plane in focus where relative disparity comes without one: a portrait's."""

# Tags among the camera's data in EXIF 3.0.
F_NUMBER, FOCAL_LENGTH, FOCAL_LENGTH_35MM, SUBJECT_DISTANCE = 0x829D, 0x920A, 0xA405, 0x9206
FOCAL_PLANE_X_RESOLUTION, FOCAL_PLANE_RESOLUTION_UNIT = 0xA20E, 0xA210
INFINITE_DISTANCE = 0xFFFFFFFF
# 4 and 5 (mm, micrometres) are not in the standard but in cameras.
MM_PER_RESOLUTION_UNIT = {2: 25.4, 3: 10.0, 4: 1.0, 5: 1e-3}

# From half a phone's to large format; beyond lie broken numbers.
SMALLEST_SENSOR_MM, LARGEST_SENSOR_MM = 1.0, 250.0

# Equivalents are whole mm, 5 % at 10 mm. Sensors that differ by more differ in what was done to
# the photograph.
EQUIVALENT_ROUNDING = 0.1


@dataclass(frozen=True)
class Camera:
    """The lens and the sensor that decide how much is blurred.

    Args:
        f_number: N, for instance 1.8.
        focal_length_mm: the real focal length, not the 35 mm equivalent.
        sensor_width_mm: the **long side** of the sensor, whichever way the camera is held; default
            a full-frame camera.

    Raises:
        ValueError: a value is not a positive number.
    """

    f_number: float
    focal_length_mm: float
    sensor_width_mm: float = FULL_FRAME_WIDTH_MM

    def __post_init__(self) -> None:
        require_positive("f_number", self.f_number, "1.8")
        require_positive("focal_length_mm", self.focal_length_mm, "50")
        require_positive("sensor_width_mm", self.sensor_width_mm, "36")

    @classmethod
    def from_equivalent(
        cls,
        f_number: float,
        focal_length_mm: float,
        focal_length_35mm: float,
        image_size: Sequence[int],
    ) -> Camera:
        """The camera whose sensor is told by a 35 mm equivalent, as of phones.

        Blur is made by the real focal length and the real f-number: a phone at 5.7 mm and f/1.8, 26
        mm by its equivalent, blurs like a full-frame camera at 26 mm and f/8.2. For the blur of a
        full-frame camera give its own numbers: ``Camera(f_number=1.4, focal_length_mm=85)``.

        Args:
            f_number: N.
            focal_length_mm: the real one, for instance 5.7.
            focal_length_35mm: its equivalent, for instance 26; equal diagonal fields of view.
            image_size: (height, width) of the uncropped photograph, whose shape the sensor has.

        Raises:
            ValueError: a value is not a positive number.
        """
        long_side, short_side = max(image_size), min(image_size)
        sensor = sensor_width_from_equivalent(
            focal_length_mm, focal_length_35mm, long_side, short_side
        )
        return cls(f_number, focal_length_mm, sensor)

    @classmethod
    def from_photo(
        cls,
        photo: ImageInput,
        *,
        f_number: float | None = None,
        focal_length_mm: float | None = None,
        sensor_width_mm: float | None = None,
        focal_length_35mm: float | None = None,
    ) -> Camera:
        """The camera that took a photograph; what is given wins, the rest comes from its EXIF data.

        The sensor comes from, in this order: `sensor_width_mm`; `focal_length_35mm`; the EXIF data,
        unless a `focal_length_mm` other than theirs means another camera; full frame, where
        `focal_length_mm` is given.
        In EXIF, pixels per mm of sensor (FocalPlaneXResolution) are taken where they agree with the
        equivalent focal length (FocalLengthIn35mmFilm): programs that resize a photograph leave
        them as they were.

        Args:
            photo: a path or a Pillow picture. Arrays and tensors carry no EXIF data.
            f_number, focal_length_mm, sensor_width_mm: as of :class:`Camera`.
            focal_length_35mm: as of :meth:`from_equivalent`; the photograph gives the shape.

        Raises:
            FileNotFoundError: a path leads to no file.
            ValueError: something is neither given nor in the EXIF data; a value is not positive;
                the sensor is given in two ways.
        """
        if sensor_width_mm is not None and focal_length_35mm is not None:
            raise ValueError(
                "sensor_width_mm and focal_length_35mm were both given; the sensor is said by one "
                "of them."
            )
        name, size, exif = _read(photo)
        found_f_number = exif.f_number if f_number is None else f_number
        focal_length = exif.focal_length_mm if focal_length_mm is None else focal_length_mm
        sensor = sensor_width_mm
        missing = []
        if found_f_number is None:
            missing.append("the f-number (f_number; --f-number on the command line)")
        if focal_length is None:
            missing.append("the real focal length (focal_length_mm; --focal-length)")
        elif sensor is None and focal_length_35mm is not None:
            if size is None:
                raise ValueError(
                    f"The shape of {name} is not known, which focal_length_35mm is turned into a "
                    "sensor with: give sensor_width_mm (--sensor-width), its long side."
                )
            sensor = sensor_width_from_equivalent(
                focal_length, focal_length_35mm, max(size), min(size)
            )
        elif sensor is None:
            if not _is_another_lens(focal_length_mm, exif.focal_length_mm):
                sensor = _sensor_width_mm(exif, focal_length, size)
            if sensor is None and focal_length_mm is not None:
                sensor = FULL_FRAME_WIDTH_MM
            if sensor is None:
                missing.append(
                    "the size of the sensor (sensor_width_mm, its long side, or "
                    "focal_length_35mm; --sensor-width or --focal-length-35mm)"
                )
        if missing:
            raise ValueError(
                f"The EXIF data of {name} lack {' and '.join(missing)}: give what is missing."
            )
        assert found_f_number is not None and focal_length is not None and sensor is not None
        return cls(found_f_number, focal_length, sensor)

    @overload
    def strength(
        self,
        image_size: Sequence[int],
        df: float,
        *,
        metric: bool = ...,
        focus_distance_m: float | None = ...,
        farthest_distance_m: float = ...,
    ) -> float: ...

    @overload
    def strength(
        self,
        image_size: Sequence[int],
        df: Sequence[float] | np.ndarray | torch.Tensor,
        *,
        metric: bool = ...,
        focus_distance_m: float | None = ...,
        farthest_distance_m: float = ...,
    ) -> torch.Tensor: ...

    def strength(
        self,
        image_size: Sequence[int],
        df: PerImage,
        *,
        metric: bool = False,
        focus_distance_m: float | None = None,
        farthest_distance_m: float = math.inf,
    ) -> float | torch.Tensor:
        """Returns K for a disparity map: pixels of blur radius per unit of disparity.

        K of :func:`~bokehdiff.optics.strength_from_camera` is per 1/metre. With ``metric`` that is
        the unit of the map, and the focus distance is s = 1/df. Relative disparity is taken as
        affine in 1/distance, with 0 at `farthest_distance_m` and `df` at `focus_distance_m`, so one
        unit of it is ``(1/focus_distance_m - 1/farthest_distance_m) / df`` 1/metres, by which K is
        multiplied. Pixels per mm are those of the long side, so that turning photo and camera
        changes nothing.

        Args:
            image_size: (height, width) of the *uncropped* photograph, resized as the image at hand
                is.
            df: disparity of the plane in focus, in the unit of the map; one number, or one per
                image.
            metric: disparity and df are in 1/metres.
            focus_distance_m: for relative disparity: distance of what is in focus. Default: 2 m is
                assumed, with an :class:`~bokehdiff.images.InputRepairedWarning`.
            farthest_distance_m: for relative disparity: distance of what has disparity 0.

        Returns:
            A number, or for other kinds of `df` a tensor (B,) on its device, without gradient.

        Raises:
            ValueError: distances that cannot be: within the focal length; a plane in focus that is
                not nearer than the farthest distance, or with df=0; a distance for metric
                disparity, which says it by itself.
        """
        height, width = image_size
        require_positive("The height of the image", height, "3024")
        require_positive("The width of the image", width, "4032")
        count = df.numel() if isinstance(df, torch.Tensor) else int(np.size(df))
        planes, _ = check_focus_and_strength(df, 0.0, max(count, 1), metric=metric)
        disparities = planes.detach().to(torch.float64).tolist()
        if metric:
            if focus_distance_m is not None or not math.isinf(farthest_distance_m):
                raise ValueError(
                    "The disparity map is in 1/metres, so that df says by itself at which distance "
                    "it is: leave focus_distance_m and farthest_distance_m out."
                )
            strengths = [self._strength_of_plane(plane, image_size) for plane in disparities]
        else:
            if focus_distance_m is None:
                focus_distance_m = ASSUMED_FOCUS_DISTANCE_M
                warnings.warn(
                    "The disparity map has no unit, so what is in focus was assumed to be "
                    f"{focus_distance_m:g} m away. focus_distance_m (--focus-distance) sets the "
                    "distance, on which the strength of a camera's blur depends.",
                    InputRepairedWarning,
                    stacklevel=2,
                )
            per_dioptre = self._strength(focus_distance_m, image_size)
            strengths = [
                per_dioptre * self._unit_of_relative(plane, focus_distance_m, farthest_distance_m)
                for plane in disparities
            ]
        if isinstance(df, (int, float)):
            return strengths[0]
        return torch.tensor(strengths, dtype=planes.dtype, device=planes.device)

    def _strength(self, focus_distance_m: float, image_size: Sequence[int]) -> float:
        """Pixels of radius per 1/metre."""
        return strength_from_camera(
            self.f_number,
            self.focal_length_mm,
            focus_distance_m,
            self.sensor_width_mm,
            max(image_size),
        )

    def _strength_of_plane(self, df: float, image_size: Sequence[int]) -> float:
        """Pixels of radius per 1/metre, focused at a metric disparity."""
        if df * self.focal_length_mm >= 1000:
            raise ValueError(
                f"df is {df:g} 1/metres, a distance of {1000 / df:.4g} mm, within the focal length "
                f"of {self.focal_length_mm:g} mm, where no lens forms an image: focus farther "
                "away, or give the focal length of a phone in its real mm."
            )
        return self._strength(1 / df if df > 0 else math.inf, image_size)

    def _unit_of_relative(
        self, df: float, focus_distance_m: float, farthest_distance_m: float
    ) -> float:
        """1/metres in one unit of a relative disparity map."""
        require_positive("farthest_distance_m", farthest_distance_m, "20", infinity_allowed=True)
        if focus_distance_m >= farthest_distance_m:
            raise ValueError(
                f"focus_distance_m is {focus_distance_m:g} m and farthest_distance_m "
                f"{farthest_distance_m:g} m; wanted what is in focus nearer than what has "
                "disparity 0."
            )
        if df == 0:
            raise ValueError(
                f"df is 0, which is the farthest thing of a map without a unit, at "
                f"{farthest_distance_m:g} m, and cannot be {focus_distance_m:g} m away. Give the "
                "map in 1/metres (metric=True), focus on something nearer, or give K instead of a "
                "camera."
            )
        unit = (1 / focus_distance_m - 1 / farthest_distance_m) / df
        nearest_m = 1 / (unit + 1 / farthest_distance_m)
        if nearest_m * 1000 <= self.focal_length_mm:
            raise ValueError(
                f"With df = {df:.4g} at {focus_distance_m:g} m the nearest things of the map "
                f"(disparity 1) are {1000 * nearest_m:.3g} mm away, within the focal length of "
                f"{self.focal_length_mm:g} mm, where no lens forms an image: give the real "
                "distance as focus_distance_m (--focus-distance)."
            )
        return unit


def subject_distance_m(photo: PathLike | Image.Image) -> float | None:
    """Returns the distance in metres at which the camera was focused, from the EXIF data.

    ``math.inf`` where they say infinity; None where they say nothing (SubjectDistance is rare). It
    belongs to what is sharp in the photograph, and is `focus_distance_m` if `df` is there too.

    Raises:
        FileNotFoundError: a path leads to no file.
    """
    return _read(photo)[2].subject_distance_m


class CameraExif(NamedTuple):
    """What EXIF data say about the camera; None where they are silent or broken."""

    f_number: float | None = None
    focal_length_mm: float | None = None
    focal_length_35mm: float | None = None
    subject_distance_m: float | None = None
    focal_plane_width_mm: float | None = None


def _read(photo: Any) -> tuple[str, tuple[int, int] | None, CameraExif]:
    """Name, (height, width) if known, and EXIF data of a photograph of any kind."""
    if isinstance(photo, (str, os.PathLike)):
        file = existing_file(photo, "photograph")
        try:
            with open_picture(file) as picture:
                if picture is not None:
                    return file.name, picture.size[::-1], _camera_exif(picture)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            pass  # Floats and broken files carry nothing here; whoever renders them says so.
        return file.name, None, CameraExif()
    if isinstance(photo, Image.Image):
        name = Path(getattr(photo, "filename", "") or "the photograph").name
        return name, photo.size[::-1], _camera_exif(photo)
    if isinstance(photo, torch.Tensor) and photo.ndim >= 2:
        return "the photograph", (photo.shape[-2], photo.shape[-1]), CameraExif()
    if isinstance(photo, np.ndarray) and photo.ndim >= 2:
        height, width = photo.shape[-3:-1] if photo.ndim > 2 else photo.shape
        return "the photograph", (height, width), CameraExif()
    raise ValueError(
        f"The photograph is a {type(photo).__name__}; wanted one photograph: a path or a Pillow "
        "picture with its EXIF data, an array (H, W, 3) or a tensor (3, H, W)."
    )


def _camera_exif(picture: Image.Image) -> CameraExif:
    try:
        exif = picture.getexif()
        tags = dict(exif.get_ifd(EXIF_FOLDER))
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return CameraExif()
    distance = _positive(tags.get(SUBJECT_DISTANCE))
    if getattr(tags.get(SUBJECT_DISTANCE), "numerator", 0) == INFINITE_DISTANCE:
        distance = math.inf
    width_mm = None
    resolution = _positive(tags.get(FOCAL_PLANE_X_RESOLUTION))
    unit_mm = MM_PER_RESOLUTION_UNIT.get(tags.get(FOCAL_PLANE_RESOLUTION_UNIT, 2))
    if resolution is not None and unit_mm is not None:
        sides = (_positive(tags.get(WIDTHS[1])), _positive(tags.get(HEIGHTS[1])))
        long_side = max((side for side in sides if side is not None), default=max(picture.size))
        width_mm = long_side / resolution * unit_mm
        if not SMALLEST_SENSOR_MM <= width_mm <= LARGEST_SENSOR_MM:
            width_mm = None
    return CameraExif(
        f_number=_positive(tags.get(F_NUMBER)),
        focal_length_mm=_positive(tags.get(FOCAL_LENGTH)),
        focal_length_35mm=_positive(tags.get(FOCAL_LENGTH_35MM)),
        subject_distance_m=distance,
        focal_plane_width_mm=width_mm,
    )


def _positive(value: Any) -> float | None:
    """A number from an EXIF tag; None for 0 (which says unknown), 0/0 and what is no number."""
    try:
        number = float(value[0] if isinstance(value, tuple) and len(value) == 1 else value)
    except (TypeError, ValueError, ArithmeticError):
        return None
    return number if math.isfinite(number) and number > 0 else None


def _is_another_lens(given_mm: float | None, exif_mm: float | None) -> bool:
    """Whether a focal length was given that is not that of the photograph."""
    return given_mm is not None and exif_mm is not None and abs(given_mm / exif_mm - 1) > 0.01


def _sensor_width_mm(
    exif: CameraExif, focal_length_mm: float, size: tuple[int, int] | None
) -> float | None:
    """Long side of the sensor from EXIF data."""
    width_mm = exif.focal_plane_width_mm
    if exif.focal_length_35mm is None or size is None:
        return width_mm
    by_equivalent = sensor_width_from_equivalent(
        focal_length_mm, exif.focal_length_35mm, max(size), min(size)
    )
    if width_mm is None or abs(width_mm / by_equivalent - 1) > EQUIVALENT_ROUNDING:
        return by_equivalent
    return width_mm

"""The controls of the lens on the page, as the library's settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..camera import Camera
from ..lens import LensSetting
from ..rendering import Aperture

LEAST_SUBJECT_DISPARITY = 1e-3


@dataclass(frozen=True)
class LensControls:
    """What a visitor has set.

    Args:
        f_number, focal_length_mm: of a full-frame camera.
        subject_distance_m: of the main subject, where the disparity has no unit.
        blades: of the aperture; 0 a circle.
        cat_eye: optical vignetting, 0 to 1.
    """

    f_number: float = 1.8
    focal_length_mm: float = 85
    subject_distance_m: float = 2
    blades: int = 0
    cat_eye: float = 0

    def aperture(self) -> Aperture | None:
        """The shape of the opening; None for a circle everywhere."""
        if self.blades == 0 and self.cat_eye == 0:
            return None
        return Aperture(blades=self.blades, cat_eye=self.cat_eye)

    def setting(
        self, df: float, image_size: Sequence[int], *, metric: bool, subject_df: float
    ) -> LensSetting:
        """Focus and blur for a picture.

        Disparity without a unit is taken as 1/distance times a number, which the main subject
        fixes. So the scene keeps its depth wherever the focus goes, and only the lens moves.

        Args:
            df: disparity in focus, in the unit of the map.
            image_size: (height, width) of the picture; K is in its pixels.
            metric: the map is in 1/metres.
            subject_df: disparity of the main subject, which is `subject_distance_m` away.

        Raises:
            ValueError: a lens that cannot be, or a distance within its focal length.
        """
        unit = 1.0
        if not metric:
            unit = 1 / (self.subject_distance_m * max(subject_df, LEAST_SUBJECT_DISPARITY))
        camera = Camera(self.f_number, self.focal_length_mm)
        strength = camera.strength(image_size, df * unit, metric=True) * unit
        plane = torch.tensor([df], dtype=torch.float32)
        return LensSetting(plane, plane, torch.tensor([strength], dtype=torch.float32))

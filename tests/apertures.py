"""Openings of every kind, for tests of whatever light passes through."""

from __future__ import annotations

import torch

from bokehdiff.rendering import Aperture

PICTURE = torch.linspace(1, 0.2, 5)[:, None] * torch.linspace(0.3, 1, 4)
SAME_EVERYWHERE = {
    "disc": Aperture(),
    "pentagon": Aperture(5, rotation=10.0),
    "tall": Aperture(squeeze=0.6),
    "donut": Aperture(obstruction=0.5),
    "bubble": Aperture(spherical=0.8),
    "picture": Aperture(rotation=30.0, picture=PICTURE),
}

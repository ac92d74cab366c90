"""Lens openings for training samples: random ones, and those named on the command line."""

from __future__ import annotations

import argparse
import json
from typing import Literal

import numpy as np

from bokehdiff.rendering.aperture import Aperture

__all__ = ["add_aperture_argument", "random_aperture"]


def random_aperture(rng: np.random.Generator) -> Aperture:
    """A lens opening as they are met in photographs, drawn independently feature by feature.

    - 35 % a disc, else 5 to 9 blades, evenly likely, turned and rounded at random (``rotation``
      and ``roundness`` uniform);
    - 10 % anamorphic: ``squeeze`` uniform from 0.5 to 0.8;
    - 5 % a mirror lens: ``obstruction`` uniform from 0.25 to 0.5;
    - 50 % vignetted towards the corners: ``cat_eye`` uniform from 0.1 to 0.8;
    - 40 % with spherical aberration: ``spherical`` uniform from -0.7 to 0.7;
    - 15 % with coloured rims: ``fringe`` uniform from -0.02 to 0.02 of the disparity's unit, which
      is 0.4 pixels of radius at K = 20.

    Never a picture. The same state of ``rng`` gives the same opening; every call takes the same
    number of random values.
    """
    shares = rng.uniform(size=6)
    blades = int(rng.integers(5, 10))
    rotation, roundness, squeeze, obstruction, cat_eye, spherical, fringe = rng.uniform(
        [0, 0, 0.5, 0.25, 0.1, -0.7, -0.02], [360, 1, 0.8, 0.5, 0.8, 0.7, 0.02]
    ).round(4)
    disc = shares[0] < 0.35
    return Aperture(
        blades=0 if disc else blades,
        rotation=0.0 if disc else float(rotation),
        roundness=0.0 if disc else float(roundness),
        squeeze=float(squeeze) if shares[1] < 0.10 else 1.0,
        obstruction=float(obstruction) if shares[2] < 0.05 else 0.0,
        cat_eye=float(cat_eye) if shares[3] < 0.50 else 0.0,
        spherical=float(spherical) if shares[4] < 0.40 else 0.0,
        fringe=float(fringe) if shares[5] < 0.15 else 0.0,
    )


def add_aperture_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--aperture``: an :class:`Aperture`, "random", or None for the disc."""
    parser.add_argument(
        "--aperture",
        type=_aperture,
        metavar="random|JSON",
        help="random, or the fields of one opening, such as '{\"blades\": 6}' (default: the disc)",
    )


def _aperture(text: str) -> Aperture | Literal["random"]:
    if text == "random":
        return "random"
    try:
        return Aperture.from_dict(json.loads(text))
    except ValueError as mistake:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither random nor the fields of an opening, such as "
            f"'{{\"blades\": 6}}': {mistake}"
        ) from mistake

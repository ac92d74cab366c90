"""The disparity of a photograph with one mistake of a chosen strength in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data_synthesis.corruption import blurred, eroded, quantised
from evaluation.photographs import Photograph

__all__ = ["CORRUPTIONS", "Corruption", "check_level", "corrupted"]


@dataclass(frozen=True)
class Corruption:
    """A mistake that disparity maps have; a row of :data:`CORRUPTIONS`."""

    unit: str  # of the level
    lowest: int  # level
    highest: int  # level
    description: str
    apply: Callable[[np.ndarray, int], np.ndarray]  # of (H, W) disparity in [0, 1], and the level


CORRUPTIONS = {
    "erode": Corruption(
        "px", 1, 256,
        "near things shrunk: the smallest disparity under an elliptical element of side 2 e + 1",
        eroded,
    ),
    "dilate": Corruption(
        "px", 1, 256,
        "near things grown: the largest disparity under an elliptical element of side 2 e + 1",
        lambda disparity, level: eroded(disparity, -level),
    ),
    "blur": Corruption("px", 1, 256, "edges washed out: a Gaussian of this sigma", blurred),
    "quantise": Corruption(
        "levels", 2, 65536,
        "rounded to so many evenly spaced values of the scene's range",
        quantised,
    ),
}  # fmt: skip
"""By name. The signs and the element of erosion and dilation are those of the BokehDiff paper."""


def corrupted(photograph: Photograph, corruption: str, level: int) -> Photograph:
    """The photograph with this mistake in its disparity; nothing else of it changes.

    df and K stay, as the person asks for the same lens: what lay in focus may no longer do so. The
    truth stays what the lens took.

    Args:
        photograph: not changed.
        corruption: a name of :data:`CORRUPTIONS`.
        level: its strength, in the unit of the corruption: pixels of the photograph, or levels,
            of which fewer are worse.

    Raises:
        ValueError: an unknown corruption, or a level that it does not have.
    """
    check_level(corruption, level)
    low, high = (np.float32(end) for end in photograph.disparity_range)
    shown = (photograph.disparity.astype(np.float32) - low) / (high - low)
    changed = CORRUPTIONS[corruption].apply(shown, int(level)) * (high - low) + low
    return dataclasses.replace(photograph, disparity=changed.astype(np.float32))


def check_level(corruption: str, level: int) -> None:
    """Raises ValueError for an unknown corruption, or a level that it does not have."""
    if corruption not in CORRUPTIONS:
        raise ValueError(
            f"There is no corruption {corruption!r}; wanted one of {', '.join(CORRUPTIONS)}."
        )
    made = CORRUPTIONS[corruption]
    if level != int(level) or not made.lowest <= level <= made.highest:
        raise ValueError(
            f"The level of {corruption} is {level!r}; wanted a whole number of {made.unit} from "
            f"{made.lowest} to {made.highest}."
        )

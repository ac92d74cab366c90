"""Data sets by name: readers that give photographs with their truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evaluation.datasets.base import DataSet
from evaluation.datasets.blb import BLB
from evaluation.datasets.ebb import EBB, AlignedEBB
from evaluation.datasets.light_fields import LightFields
from evaluation.datasets.raytraced_scenes import RaytracedScenes
from evaluation.datasets.realbokeh import RealBokeh
from evaluation.datasets.synbokeh import SynBokeh300
from evaluation.datasets.triples import Triples

__all__ = ["DATASETS", "DataSet", "open_dataset"]

DATASETS: dict[str, type[DataSet]] = {
    kind.name: kind
    for kind in (
        RaytracedScenes, SynBokeh300, EBB, AlignedEBB, BLB, RealBokeh, LightFields, Triples,
    )
}  # fmt: skip
"""Every data set by its name; the docstring of each says how its folder lies."""


def open_dataset(name: str, folder: str | Path, scenes: Sequence[str] | None = None) -> DataSet:
    """The data set of that name in a folder; only ``scenes`` if given.

    Raises ValueError for an unknown name, a missing folder, one that holds no scene of that
    layout, or an unknown scene.
    """
    if name not in DATASETS:
        raise ValueError(f"There is no data set {name!r}; wanted one of {', '.join(DATASETS)}.")
    return DATASETS[name](folder, scenes)

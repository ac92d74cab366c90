"""What every data set offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

from evaluation.photographs import Photograph

__all__ = ["DataSet"]


class DataSet(ABC):
    """Photographs with their truth, read from a folder when asked.

    Subclasses say in their docstring how the folder lies and where it comes from. Opening one
    raises ValueError for a folder that is missing or holds no scene of that layout.

    ``scenes``: only these scenes; unknown names raise ValueError.
    """

    name: str

    @abstractmethod
    def __init__(self, folder: str | Path, scenes: Sequence[str] | None = None) -> None: ...

    @property
    @abstractmethod
    def scenes(self) -> list[str]:
        """Names, sorted. Photographs of one scene are not independent: intervals draw scenes."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of photographs, so of lens settings of all scenes, without reading pictures."""

    @abstractmethod
    def photographs(self) -> Iterator[Photograph]:
        """All photographs, scene by scene. ValueError names the file that is wrong."""

    @abstractmethod
    def verify(self) -> list[str]:
        """A sentence for each thing that is missing, damaged or contradicts the layout; [] if all
        is well. Reads every file."""

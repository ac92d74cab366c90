"""What data sets of files share: finding scenes, reading them when asked, verifying them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evaluation.datasets.base import DataSet
from evaluation.photographs import Photograph

__all__ = ["Reader", "Scene", "ScenesOnDisk"]

Reader = Callable[[Path], np.ndarray]
"""Gives the array of a file, height and width first. ValueError if it is missing; of damaged files
decoders raise anything."""

# More would hide the sentence.
LISTED_SCENES = 20


class Scene(ABC):
    """A scene on disk. Nothing is read before it is asked for."""

    @abstractmethod
    def settings(self) -> list[str]:
        """Names of the lens settings. ValueError if the description of the scene is wrong."""

    @abstractmethod
    def files(self) -> dict[Path, Reader]:
        """Every picture and map, all of one size, with what reads it; the photograph is first.

        ValueError if the description of the scene is wrong.
        """

    @abstractmethod
    def photographs(self) -> Iterator[Photograph]:
        """One for each lens setting. ValueError names the file that is wrong."""

    def read(self, file: Path, like: np.ndarray | None = None) -> np.ndarray:
        """One of the files. ValueError if it is missing, damaged, or not as large as ``like``."""
        try:
            array = self.files()[file](file)
        except ValueError:
            raise
        except Exception as problem:
            # Whatever decoders raise on a damaged file: of zip archives, syntax, memory ...
            raise ValueError(f"{file} is damaged or truncated ({problem}).") from problem
        if like is not None and array.shape[:2] != like.shape[:2]:
            raise ValueError(
                f"{file} is {array.shape[1]} x {array.shape[0]} pixels (width x height), the "
                f"photograph {like.shape[1]} x {like.shape[0]}; wanted the same size."
            )
        return array

    def problems(self) -> list[str]:
        """A sentence for each thing that is wrong; reads every file."""
        try:
            files = list(self.files())
            self.settings()
        except ValueError as problem:
            return [str(problem)]
        photograph, problems = None, []
        for file in files:
            try:
                array = self.read(file, photograph)
            except ValueError as problem:
                problems.append(str(problem))
            else:
                photograph = array if file == files[0] else photograph
        return problems


class ScenesOnDisk(DataSet):
    """A data set whose scenes lie in one folder."""

    layout: str
    """What a folder has to hold, in words."""

    def __init__(self, folder: str | Path, scenes: Sequence[str] | None = None) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"There is no benchmark folder {self.folder}.")
        found = self.scenes_in(self.folder)
        if not found:
            raise ValueError(f"{self.folder} holds no scene; wanted {self.layout}.{self._hint()}")
        unknown = sorted(set(scenes or ()) - set(found))
        if unknown:
            known = sorted(found)
            more = f" and {len(known) - LISTED_SCENES} more" if len(known) > LISTED_SCENES else ""
            raise ValueError(
                f"{self.folder} has no scene {', '.join(unknown)}; it has "
                f"{', '.join(known[:LISTED_SCENES])}{more}."
            )
        self._scenes = {name: found[name] for name in sorted(set(scenes or found))}

    @staticmethod
    @abstractmethod
    def scenes_in(folder: Path) -> Mapping[str, Scene]:
        """The scenes of a folder by name; {} if it has none. Complete ones or not."""

    @property
    def scenes(self) -> list[str]:
        return list(self._scenes)

    def __len__(self) -> int:
        return sum(len(scene.settings()) for scene in self._scenes.values())

    def photographs(self) -> Iterator[Photograph]:
        for scene in self._scenes.values():
            yield from scene.photographs()

    def verify(self) -> list[str]:
        scenes = tqdm(
            self._scenes.values(), unit="scene", desc=self.name, leave=False, disable=None
        )
        # Scenes may share a file, which is wrong once.
        return list(dict.fromkeys(problem for scene in scenes for problem in scene.problems()))

    def _hint(self) -> str:
        """The folder a level off that holds scenes, as a question; or nothing."""
        inside = sorted(child for child in self.folder.iterdir() if child.is_dir())
        for folder in (*inside, self.folder.absolute().parent):
            try:
                if self.scenes_in(folder):
                    return f" Did you mean {folder}?"
            except (OSError, ValueError):
                continue
        return ""

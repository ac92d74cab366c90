"""Folders of samples that are written once and read many times, several to a file.

A folder holds one data set: ``NAME.json``, which says what the samples were made with and how many
there are, and files ``NAME-00000-of-00040.safetensors`` of some samples each, with the tensors of
the scenes' ``arrays``, one sample per entry of their first axis. Files appear whole, and those that
are there are kept, so an interrupted command goes on when it is given again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch.utils.data import Dataset

from bokehdiff.whole_files import whole_or_not_at_all, write_whole
from data_synthesis.endless import EndlessScenes
from data_synthesis.sharing import share_out

if TYPE_CHECKING:
    from data_synthesis.writer import Scenes

__all__ = ["FolderLayout", "StoredSamples", "write_samples"]


@dataclass(frozen=True)
class FolderLayout:
    """How samples of one kind are stored.

    ``name``: plural of what one sample is called, in names of files and in sentences; also the
    command of ``python -m data_synthesis`` that writes them. ``per_file``: samples of a file.
    """

    name: str
    per_file: int

    @property
    def description(self) -> str:
        return f"{self.name}.json"

    def files(self, count: int) -> int:
        """Files that hold so many samples."""
        return -(-count // self.per_file)

    def file_name(self, number: int, count: int) -> str:
        """Name of one file of a data set of so many samples."""
        return f"{self.name}-{number:05d}-of-{self.files(count):05d}.safetensors"

    def read_description(self, folder: Path) -> dict[str, Any]:
        """``settings`` and ``count`` of a folder; ``ValueError`` if they cannot be read."""
        path = folder / self.description
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
            return {"settings": dict(description["settings"]), "count": int(description["count"])}
        except FileNotFoundError:
            raise ValueError(
                f"{folder} holds no {self.name}: it has no {self.description}. Write them with "
                f"`python -m data_synthesis {self.name} --count N --out FOLDER`."
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} cannot be read ({error!r}). Write the {self.name} again."
            ) from error


def write_samples(
    layout: FolderLayout,
    scenes: Scenes,
    folder: Path,
    *,
    count: int,
    processes: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Write samples 0 to ``count - 1``, in so many processes; what is there is kept.

    Args:
        layout: how they are stored.
        scenes: where they come from; all samples have arrays of the same names and shapes.
        folder: made if there is none.
        count: at least 1.
        processes: they share the files out; the bytes do not depend on the number.
        progress: told of every n samples of this process that are done or were there.

    Raises:
        ValueError: the folder holds another data set, or a number makes no sense.
        ChildProcessError: one of the processes failed.
    """
    if count < 1 or processes < 1:
        raise ValueError(f"count is {count}, processes {processes}; wanted at least 1 of each.")
    description = {"settings": scenes.settings, "count": count}
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / layout.description).is_file():
        if (there := layout.read_description(folder)) != description:
            raise ValueError(
                f"{folder} holds another data set: {there}; wanted {description}. Choose another "
                "folder, or give the settings it was made with."
            )
    elif any(folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty and holds no {layout.name}. Choose another folder."
        )
    else:
        content = json.dumps(description, indent=1) + "\n"
        write_whole(folder / layout.description, content.encode())
    share_out(
        _write_share,
        [(layout, scenes, folder, count, number, processes) for number in range(1, processes)],
        lambda: _write_share(layout, scenes, folder, count, 0, processes, progress),
    )


class StoredSamples(Dataset[dict[str, torch.Tensor]]):
    """The samples in a folder: ``stored[i]`` equals ``scenes[i]`` that was written.

    Those that inherit say how they are stored (``layout``) and what makes them (``scenes``).
    ``settings``: what the data set was made with, see the ``settings`` of those scenes.

    Raises:
        ValueError: the folder holds no such samples, or not all of them, or a file is damaged.
    """

    layout: ClassVar[FolderLayout]
    scenes: ClassVar[type[EndlessScenes]]

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        description = self.layout.read_description(self.folder)
        self.settings: dict[str, Any] = description["settings"]
        self._count: int = description["count"]
        numbers = range(self.layout.files(self._count))
        names = [self.layout.file_name(number, self._count) for number in numbers]
        if missing := [name for name in names if not (self.folder / name).is_file()]:
            raise ValueError(
                f"{self.folder} is not finished: {len(missing)} of {len(names)} files are missing, "
                f"for instance {missing[0]}. Give the command that writes it again."
            )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self._count:
            raise IndexError(
                f"index is {index}; the data set has {self._count} {self.layout.name}."
            )
        number, place = divmod(int(index), self.layout.per_file)
        path = self.folder / self.layout.file_name(number, self._count)
        try:
            # Opened anew every time: nothing is shared between the workers of a data loader.
            with safe_open(path, "numpy") as file:
                return self.scenes.as_tensors(
                    {name: file.get_slice(name)[place] for name in file.keys()}
                )
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged ({error}). Delete it and give the command that wrote it again."
            ) from error


def _write_share(
    layout: FolderLayout,
    scenes: Scenes,
    folder: Path,
    count: int,
    first: int,
    step: int,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Writes the files ``first``, ``first + step``, ... that are not there."""
    for number in range(first, layout.files(count), step):
        path = folder / layout.file_name(number, count)
        indices = range(number * layout.per_file, min((number + 1) * layout.per_file, count))
        if not path.is_file():
            arrays = [scenes.arrays(index) for index in indices]
            whole = {name: np.stack([one[name] for one in arrays]) for name in arrays[0]}
            with whole_or_not_at_all(path) as unfinished:
                save_file(whole, unfinished)
        if progress is not None:
            progress(len(indices))

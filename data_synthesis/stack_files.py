"""Bokeh stacks written once and read many times: ``python -m data_synthesis stacks --help``.

A folder holds one data set: ``stacks.json``, which says what the stacks were made with and how many
there are, and files ``stacks-00000-of-00040.safetensors`` of 64 stacks each, with the tensors that
``StackScenes.arrays`` describes, one stack per entry of their first axis. Files appear whole, and
those that are there are kept, so an interrupted command goes on when it is given again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch.utils.data import Dataset
from tqdm import tqdm

from bokehdiff.whole_files import whole_or_not_at_all, write_whole
from data_synthesis.sharing import share_out
from data_synthesis.stack_scenes import StackScenes

__all__ = ["StoredStacks", "write_stacks"]

DESCRIPTION = "stacks.json"
STACKS_PER_FILE = 64


def write_stacks(
    scenes: StackScenes,
    folder: Path,
    *,
    count: int,
    processes: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Write stacks 0 to ``count - 1``, in so many processes; what is there is kept.

    Args:
        scenes: where they come from.
        folder: made if there is none.
        count: at least 1.
        processes: they share the files out; the bytes do not depend on the number.
        progress: told of every n stacks of this process that are done or were there.

    Raises:
        ValueError: the folder holds another data set, or a number makes no sense.
        ChildProcessError: one of the processes failed.
    """
    if count < 1 or processes < 1:
        raise ValueError(f"count is {count}, processes {processes}; wanted at least 1 of each.")
    description = {"settings": scenes.settings, "count": count}
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / DESCRIPTION).is_file():
        if (there := _read_description(folder)) != description:
            raise ValueError(
                f"{folder} holds another data set: {there}; wanted {description}. Choose another "
                "folder, or give the settings it was made with."
            )
    elif any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no stacks. Choose another folder.")
    else:
        write_whole(folder / DESCRIPTION, (json.dumps(description, indent=1) + "\n").encode())
    share_out(
        _write_share,
        [(scenes, folder, count, number, processes) for number in range(1, processes)],
        lambda: _write_share(scenes, folder, count, 0, processes, progress),
    )


class StoredStacks(Dataset[dict[str, torch.Tensor]]):
    """The stacks in a folder: ``stacks[i]`` equals ``scenes[i]`` that was written.

    ``settings``: what the data set was made with, see ``StackScenes.settings``.

    Raises:
        ValueError: the folder holds no stacks, or not all of them, or a file is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        description = _read_description(self.folder)
        self.settings: dict[str, Any] = description["settings"]
        self._count: int = description["count"]
        names = [_file_name(number, self._count) for number in range(_files(self._count))]
        if missing := [name for name in names if not (self.folder / name).is_file()]:
            raise ValueError(
                f"{self.folder} is not finished: {len(missing)} of {len(names)} files are missing, "
                f"for instance {missing[0]}. Give the command that writes it again."
            )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self._count:
            raise IndexError(f"index is {index}; the data set has {self._count} stacks.")
        number, place = divmod(int(index), STACKS_PER_FILE)
        path = self.folder / _file_name(number, self._count)
        try:
            # Opened anew every time: nothing is shared between the workers of a data loader.
            with safe_open(path, "numpy") as file:
                return StackScenes.as_tensors(
                    {name: file.get_slice(name)[place] for name in file.keys()}
                )
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged ({error}). Delete it and give the command that wrote it again."
            ) from error


def _write_share(
    scenes: StackScenes,
    folder: Path,
    count: int,
    first: int,
    step: int,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Writes the files ``first``, ``first + step``, ... that are not there."""
    for number in range(first, _files(count), step):
        path = folder / _file_name(number, count)
        indices = range(number * STACKS_PER_FILE, min((number + 1) * STACKS_PER_FILE, count))
        if not path.is_file():
            arrays = [scenes.arrays(index) for index in indices]
            whole = {name: np.stack([one[name] for one in arrays]) for name in arrays[0]}
            with whole_or_not_at_all(path) as unfinished:
                save_file(whole, unfinished)
        if progress is not None:
            progress(len(indices))


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        return {"settings": dict(description["settings"]), "count": int(description["count"])}
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no stacks: it has no {DESCRIPTION}. Write them with "
            "`python -m data_synthesis stacks --count N --out FOLDER`."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}). Write the stacks again.") from error


def _files(count: int) -> int:
    return -(-count // STACKS_PER_FILE)


def _file_name(number: int, count: int) -> str:
    return f"stacks-{number:05d}-of-{_files(count):05d}.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``python -m data_synthesis stacks``."""
    parser.description = "Bokeh stacks of layered scenes with true metric depth."
    pair: dict[str, Any] = {"type": float, "nargs": 2}
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--count", type=int, default=64, help="stacks (default %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="height = width (default 128)")
    parser.add_argument("--seed", type=int, default=0, help="which data set (default 0)")
    parser.add_argument("--frames", type=int, default=3, help="of a stack (default %(default)s)")
    parser.add_argument(
        "--strengths",
        **pair,
        metavar=("LOW", "HIGH"),
        help="range of K in px*m at this size (default: size/256 to size/16)",
    )
    parser.add_argument(
        "--textureless-share",
        type=float,
        default=0.3,
        metavar="SHARE",
        help="of the surfaces, of one colour or nearly so (default %(default)s)",
    )
    parser.add_argument(
        "--disparities",
        **pair,
        default=(0.1, 1.0),
        metavar=("FAR", "NEAR"),
        help="of the surfaces seen, in 1/m (default 0.1 1: 1 to 10 m)",
    )
    parser.add_argument(
        "--df",
        **pair,
        metavar=("LOW", "HIGH"),
        help="disparity in focus in 1/m, drawn between these (default: the near end)",
    )
    parser.add_argument("--processes", type=int, default=1, help="default 1")


def run(options: argparse.Namespace) -> int:
    """Write the stacks that the parsed :func:`add_arguments` ask for; returns 0."""
    scenes = StackScenes(
        options.seed,
        options.size,
        frames=options.frames,
        strengths=options.strengths,
        textureless_share=options.textureless_share,
        disparities=options.disparities,
        df=options.df,
    )
    with tqdm(total=options.count, unit="stack", smoothing=0.05, disable=None) as bar:
        write_stacks(
            scenes,
            options.out,
            count=options.count,
            processes=options.processes,
            progress=bar.update,
        )
    print(f"{options.out} holds {options.count} stacks of {options.frames} frames.")
    return 0

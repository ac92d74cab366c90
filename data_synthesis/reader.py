"""Reading shards by index, and checking them."""

from __future__ import annotations

import itertools
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from data_synthesis.shards import (
    DamagedSample,
    Shard,
    StoredSample,
    check_sample,
    decode_sample,
    file_sha256,
    find_samples,
    read_manifest,
    sample_key,
    shard_layout,
)

__all__ = ["DamagedSampleWarning", "ShardedScenes", "verify_shards"]

PROBLEMS_SHOWN = 8


class DamagedSampleWarning(UserWarning):
    """Samples of a data set are left out; the message names them and their shards."""


class ShardedScenes(Dataset[dict[str, torch.Tensor]]):
    """The samples in a folder of shards, in the order of their indices; ``len()`` of them.

    ``scenes[i]`` equals the sample that was written: float32 tensors ``image`` and ``target``
    (3, H, W), ``disparity`` (1, H, W), all in [0, 1], ``df`` () and ``K`` (). ``record(i)`` tells
    its index, seed, aperture and provenance. ``settings``: what the data set was made with.

    Damaged samples are left out, so that ``i`` counts the others, always the same way: opening
    the folder reads every sample once and compares its SHA-256. A :class:`DamagedSampleWarning`
    names them and ``problems`` lists all. With ``verify=False`` opening reads only the headers of
    the archives, which is enough to notice samples that are missing; one that has changed raises
    DamagedSample when it is asked for, as does one that changes later.

    Raises ValueError when the folder holds no data set, an unfinished one, or no whole sample.

    The shards are ordinary archives of WebDataset, and can be streamed without this class::

        shards = sorted(glob.glob("scenes/shard-*.tar"))
        webdataset.WebDataset(shards, shardshuffle=False).decode("torchrgb")
        datasets.load_dataset("webdataset", data_files="scenes/shard-*.tar", streaming=True)

    which give ``image.png`` decoded, ``target.npy`` and ``disparity.npy`` as 16-bit integers and
    ``json``, and check nothing.
    """

    def __init__(self, folder: str | os.PathLike[str], *, verify: bool = True) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        self.settings: dict[str, Any] = manifest["settings"]
        self.problems: list[str] = []
        self._shards = shard_layout(manifest["count"], manifest["num_shards"])
        places = []  # (shard, index, start, stop) of every sample
        for number, shard in enumerate(
            tqdm(self._shards, "checking shards", leave=False, disable=None, unit="shard")
        ):
            found, problem = _look_through(self.folder / shard.name, shard, verify)
            places += [(number, *place) for place in found]
            if problem:
                self.problems.append(problem)
        shown = "\n  ".join(self.problems[:PROBLEMS_SHOWN])
        if len(self.problems) > PROBLEMS_SHOWN:
            shown += f"\n  and {len(self.problems) - PROBLEMS_SHOWN} more shards"
        if not places:
            raise ValueError(f"{self.folder} holds no whole sample:\n  {shown}")
        if self.problems:
            warnings.warn(
                f"{manifest['count'] - len(places)} of {manifest['count']} samples in "
                f"{self.folder} are left out:\n  {shown}",
                DamagedSampleWarning,
                stacklevel=2,
            )
        # An array, because workers of a data loader get a copy of it.
        self._places = np.array(places, np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self._read(index)
        integers = {"image": sample.image, "disparity": sample.disparity, "target": sample.target}
        item = {
            name: torch.from_numpy(array.astype(np.float32) / np.iinfo(array.dtype).max)
            for name, array in integers.items()
        }
        numbers = {name: torch.tensor(sample.record[name]) for name in ("df", "K")}
        return {**item, **numbers}

    def record(self, index: int) -> dict[str, Any]:
        """``index`` in the data set and its ``seed``, ``df``, ``K``, and as dicts ``aperture``
        (``Aperture.from_dict`` reads it) and ``provenance``."""
        return self._read(index).record

    def _read(self, index: int) -> StoredSample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index is {index}; the data set has {len(self)} samples.")
        number, stored_index, start, stop = self._places[index].tolist()
        path = self.folder / self._shards[number].name
        try:
            # Opened anew every time: nothing is shared between the workers of a data loader.
            with path.open("rb") as archive:
                archive.seek(start)
                return decode_sample(stored_index, archive.read(stop - start))
        except DamagedSample as error:
            raise DamagedSample(
                f"{path}: {error}. Open the data set with verify=True, which leaves out what is "
                "damaged."
            ) from error


def verify_shards(folder: str | os.PathLike[str]) -> list[str]:
    """What is wrong with the shards of a folder, a sentence for each bad one.

    The SHA-256 of every shard is compared with ``manifest.json``; of one that differs, the
    damaged samples are named. Raises ValueError when the folder holds no data set or an
    unfinished one.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    checksums = {entry["name"]: entry["sha256"] for entry in manifest["shards"]}
    problems = []
    layout = shard_layout(manifest["count"], manifest["num_shards"])
    for shard in tqdm(layout, "checking shards", leave=False, disable=None, unit="shard"):
        path = folder / shard.name
        if not path.exists() or file_sha256(path) != checksums[shard.name]:
            _, problem = _look_through(path, shard, verify=True)
            problems.append(
                problem or f"{shard.name}: its SHA-256 differs, though every sample is whole"
            )
    return problems


def _look_through(
    path: Path, shard: Shard, verify: bool
) -> tuple[list[tuple[int, int, int]], str | None]:
    """(index, start, stop) of the whole samples of a shard, and what is wrong with the others."""
    if not path.is_file():
        return [], f"{shard.name} is missing, with samples {_runs(list(shard.indices))}"
    places = {}
    with path.open("rb") as archive:
        for index, start, stop in find_samples(archive):
            places[index] = (index, start, stop)
        if verify:
            for index, start, stop in list(places.values()):
                archive.seek(start)
                try:
                    check_sample(index, archive.read(stop - start))
                except DamagedSample:
                    del places[index]
    lost = [index for index in shard.indices if index not in places]
    problem = f"{shard.name}: damaged or missing are samples {_runs(lost)}" if lost else None
    return [places[index] for index in shard.indices if index in places], problem


def _runs(indices: list[int]) -> str:
    """Names of samples, neighbours drawn together: ``00000003 to 00000007, 00000012``."""
    named = []
    for _, run in itertools.groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        keys = [sample_key(index) for _, index in run]
        named.append(keys[0] if len(keys) == 1 else f"{keys[0]} to {keys[-1]}")
    return ", ".join(named)

"""Samples on disk: safetensors shards, written once, resumed, read by index.

A shard ``procedural-00000000-00000063.safetensors`` holds samples 0 to 63 of one data set as
stacked arrays: ``image`` uint8 (N, 3, H, W), ``target`` uint16 (N, 3, H, W), ``disparity`` uint16
(N, 1, H, W), ``df`` and ``K`` float32 (N,). Integers span [0, 1] by their largest value. The
data set's settings are in the shard's metadata; a folder holds one data set.
"""

from __future__ import annotations

import bisect
import json
import os
import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

__all__ = ["ShardedScenes", "write_shards"]

SHARD_NAME = re.compile(r"procedural-(\d{8,})-(\d{8,})\.safetensors")
DTYPES = {
    "image": np.uint8,
    "target": np.uint16,
    "disparity": np.uint16,
    "df": np.float32,
    "K": np.float32,
}


def _shard_ranges(folder: Path) -> list[tuple[int, int, Path]]:
    """(first, last, path) of every shard in the folder, by first index."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = SHARD_NAME.fullmatch(path.name)
        if match:
            found.append((int(match[1]), int(match[2]), path))
    return sorted(found)


def _process_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _shard_settings(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "numpy") as shard:
            metadata = shard.metadata() or {}
            missing = set(DTYPES) - set(shard.keys())
        settings = json.loads(metadata["settings"])
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise ValueError(
            f"{path} is no readable shard ({error}); delete it and write it again."
        ) from error
    if missing:
        raise ValueError(f"{path} lacks {sorted(missing)}; delete it and write it again.")
    return settings


def write_shards(
    sample: Callable[[int], Mapping[str, Any]],
    folder: str | os.PathLike[str],
    *,
    count: int,
    start: int = 0,
    shard_size: int = 64,
    settings: Mapping[str, Any],
    progress: Callable[[int], Any] | None = None,
) -> list[Path]:
    """Writes samples ``start`` to ``start + count - 1``; returns the paths newly written.

    ``sample(i)`` returns the stored arrays of sample i (``ProceduralScenes.arrays``). Samples
    that the folder already holds are skipped, so an interrupted run is simply started again; no
    file is ever replaced. A shard appears only when it is complete. ``settings`` describes the
    data set; a folder that holds another one is refused with ValueError. ``progress(n)`` is told
    of every n samples that are done or were there.
    """
    if count < 1 or start < 0 or shard_size < 1:
        raise ValueError(
            f"count is {count}, start {start}, shard_size {shard_size}; wanted at least 1, 0, 1."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    wanted_settings = json.loads(json.dumps(dict(settings)))
    wanted = np.ones(count, bool)
    for first, last, path in _shard_ranges(folder):
        existing = _shard_settings(path)
        if existing != wanted_settings:
            raise ValueError(
                f"{folder} already holds another data set: {path.name} was made with {existing}, "
                f"now {wanted_settings} is asked for. Choose another folder."
            )
        wanted[max(first - start, 0) : max(last + 1 - start, 0)] = False
    if progress is not None:
        progress(int(count - wanted.sum()))
    written = []
    missing = np.flatnonzero(wanted) + start
    while len(missing):
        # A run of consecutive samples that ends where a shard of a full run would end.
        first = int(missing[0])
        limit = start + ((first - start) // shard_size + 1) * shard_size
        length = 1
        while length < len(missing) and missing[length] == first + length < limit:
            length += 1
        missing = missing[length:]
        items = []
        for index in range(first, first + length):
            items.append(sample(index))
            if progress is not None:
                progress(1)
        arrays = {
            name: np.ascontiguousarray(np.stack([np.asarray(item[name], dtype) for item in items]))
            for name, dtype in DTYPES.items()
        }
        path = folder / f"procedural-{first:08d}-{first + length - 1:08d}.safetensors"
        unfinished = folder / f".{path.name}.{uuid.uuid4().hex}.unfinished"
        try:
            save_file(arrays, unfinished, metadata={"settings": json.dumps(wanted_settings)})
            # The library makes files only their owner can read; shards are ordinary files.
            unfinished.chmod(0o666 & ~_process_umask())
            if path.exists():
                raise FileExistsError(f"{path} appeared meanwhile; is another run writing there?")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        written.append(path)
    return written


class ShardedScenes:
    """Map-style reader of a folder of shards: ``len()`` samples in the order of their indices.

    ``scenes[i]`` equals the sample the shard was written from: float32 tensors ``image`` and
    ``target`` (3, H, W), ``disparity`` (1, H, W), all in [0, 1], ``df`` () and ``K`` ().
    ``settings``: what the data set was made with. Shards that appear later are not seen.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        ranges = _shard_ranges(self.folder)
        if not ranges:
            raise ValueError(
                f"{self.folder} holds no shards (procedural-*.safetensors); write some with "
                "`python -m data_synthesis procedural --out FOLDER --count N`."
            )
        self.settings = _shard_settings(ranges[0][2])
        self._paths: list[Path] = []
        self._starts: list[int] = []  # position of each shard's first sample in this data set
        self._length = 0
        previous_last = -1
        for first, last, path in ranges:
            if first <= previous_last:
                raise ValueError(f"{path} repeats samples of the shard before it; delete one.")
            settings = _shard_settings(path)
            if settings != self.settings:
                raise ValueError(
                    f"{path} was made with {settings}, other shards with {self.settings}."
                )
            previous_last = last
            self._paths.append(path)
            self._starts.append(self._length)
            self._length += last - first + 1
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        # Workers of a data loader open the files themselves.
        return {**self.__dict__, "_open": {}}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -self._length <= index < self._length:
            raise IndexError(f"index is {index}; the data set has {self._length} samples.")
        index = int(index) % self._length
        shard = bisect.bisect_right(self._starts, index) - 1
        if shard not in self._open:
            self._open[shard] = safe_open(self._paths[shard], "numpy")
        row = index - self._starts[shard]
        item = {}
        for name, dtype in DTYPES.items():
            values = self._open[shard].get_slice(name)[row : row + 1][0]
            if np.issubdtype(dtype, np.integer):
                values = values.astype(np.float32) / np.iinfo(dtype).max
            item[name] = torch.from_numpy(np.asarray(values, np.float32))
        return item

"""Writing data sets in shards: by many processes and machines, interrupted at any time."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from data_synthesis.shards import (
    END_OF_ARCHIVE,
    FORMAT_VERSION,
    MANIFEST,
    UNFINISHED,
    Shard,
    encode_sample,
    file_sha256,
    read_manifest,
    sample_key,
    shard_layout,
)
from data_synthesis.sharing import share_out

__all__ = ["Scenes", "default_shards", "write_shards"]

PLAN = "plan.json"
SAMPLES_PER_SHARD = 64


class Scenes(Protocol):
    """Samples by index, each a function of the settings and its index alone.

    ``settings``: JSON-able; everything that determines the samples, among it the ``seed``.
    ``arrays(index)``: what :func:`data_synthesis.shards.encode_sample` takes.
    """

    @property
    def settings(self) -> Mapping[str, Any]: ...

    def arrays(self, index: int) -> Mapping[str, Any]: ...


def default_shards(count: int) -> int:
    """As many shards as hold up to 64 samples each."""
    return -(-count // SAMPLES_PER_SHARD)


def write_shards(
    scenes: Scenes,
    folder: str | os.PathLike[str],
    *,
    count: int,
    num_shards: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    processes: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> bool:
    """Writes samples 0 to ``count - 1`` of ``scenes``; returns whether all of them are there.

    What is there is kept, so a run that was interrupted is simply started again. Of
    ``world_size`` processes, which need not know of each other nor run at the same time, process
    ``rank`` writes every ``world_size``-th shard; the files do not depend on that number, nor on
    interruptions, and it does no harm if two processes happen to write the same. Whichever
    finishes the last shard writes ``manifest.json``. A shard that was deleted because it was
    damaged is written again.

    ``num_shards``: 64 samples each by default. ``processes``: this one starts others by the
    method "spawn" and shares its work with them. ``progress(n)`` is told of every n samples of
    this process that are done or were there.

    Raises ValueError when the folder holds another data set, another number of samples or shards
    included, or when a shard that is written again turns out another than before, and
    ChildProcessError when a process that was started has failed.
    """
    num_shards = default_shards(count) if num_shards is None else num_shards
    layout = shard_layout(count, num_shards)
    if not (0 <= rank < world_size and processes >= 1):
        raise ValueError(
            f"rank is {rank}, world_size {world_size}, processes {processes}; wanted 0 <= rank < "
            "world_size and at least 1."
        )
    folder = Path(folder)
    plan = {
        "format_version": FORMAT_VERSION,
        "settings": json.loads(json.dumps(dict(scenes.settings))),
        "count": count,
        "num_shards": num_shards,
    }
    _claim(folder, plan)
    first, world_size = rank * processes, world_size * processes
    share_out(
        _write_share,
        [(scenes, folder, plan, first + number, world_size) for number in range(1, processes)],
        lambda: _write_share(scenes, folder, plan, first, world_size, progress),
    )
    return (folder / MANIFEST).exists() and all((folder / shard.name).exists() for shard in layout)


def _write_share(
    scenes: Scenes,
    folder: Path,
    plan: dict[str, Any],
    rank: int,
    world_size: int,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Writes the shards of one process, and the manifest if they were the last ones."""
    layout = shard_layout(plan["count"], plan["num_shards"])
    checksums = {}
    if (folder / MANIFEST).exists():
        checksums = {entry["name"]: entry["sha256"] for entry in read_manifest(folder)["shards"]}
    for shard in layout[rank::world_size]:
        new = _write_shard(scenes, folder, shard, progress or (lambda samples: None))
        path = folder / shard.name
        if new and checksums and file_sha256(path) != checksums[shard.name]:
            raise ValueError(
                f"{path} was written again and is not what it was, as {MANIFEST} shows: the "
                "libraries or the program have changed. Write the data set to another folder."
            )
    _finish(folder, plan, layout)


def _claim(folder: Path, plan: dict[str, Any]) -> None:
    """Makes the folder that of this data set, or raises ValueError because it is another's."""
    place = folder / UNFINISHED / PLAN
    # In this order: at any time a shard has had a plan before it, and a plan goes after a manifest.
    stray = next(folder.glob("shard-*.tar"), None)
    try:
        there = json.loads(place.read_bytes())
    except FileNotFoundError:
        if (folder / MANIFEST).exists():
            there = read_manifest(folder)
        elif stray is None:
            _put(folder, place, [_readable(plan)])
            there = json.loads(place.read_bytes())
        else:
            raise ValueError(
                f"{folder} holds {stray.name}, but neither {MANIFEST} nor {UNFINISHED}/{PLAN}, "
                "which tell what it was made with. Choose another folder."
            ) from None
    differing = [
        f"{name} is {before} there, {asked} here"
        for name, before, asked in _differences(there, plan)
    ]
    if differing:
        raise ValueError(
            f"{folder} holds another data set ({'; '.join(differing)}). Choose another folder."
        )


def _differences(there: dict[str, Any], plan: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, value there, value of the plan) of what differs."""
    pairs = [(name, there[name], plan[name]) for name in ("format_version", "count", "num_shards")]
    before, asked = there["settings"], plan["settings"]
    pairs += [
        (key, before.get(key), asked.get(key)) for key in sorted(before.keys() | asked.keys())
    ]
    return (pair for pair in pairs if pair[1] != pair[2])


def _write_shard(
    scenes: Scenes, folder: Path, shard: Shard, progress: Callable[[int], Any]
) -> bool:
    """Gives the folder that shard; whether it was this process that did.

    Finished samples wait as files of their own: little is lost when the process is killed.
    """
    path = folder / shard.name
    parts = [folder / UNFINISHED / sample_key(index) for index in shard.indices]
    new = False
    try:
        for index, part in zip(shard.indices, parts, strict=True):
            # It was there before, or another process is doing the same and was faster.
            if path.exists():
                progress(shard.indices.stop - index)
                break
            if not part.exists():
                seed = scenes.settings["seed"]
                _put(folder, part, [encode_sample(index, seed, scenes.arrays(index))])
            progress(1)
        if not path.exists():
            _put(folder, path, chain((part.read_bytes() for part in parts), [END_OF_ARCHIVE]))
            new = True
    except FileNotFoundError:
        # Whoever was faster has removed the parts.
        if not path.exists():
            raise
    for part in parts:
        part.unlink(missing_ok=True)
    return new


def _finish(folder: Path, plan: dict[str, Any], layout: list[Shard]) -> None:
    """Writes the manifest if all shards are there, and tidies up."""
    if not all((folder / shard.name).exists() for shard in layout):
        return
    manifest = folder / MANIFEST
    if not manifest.exists():
        shards = [
            {
                "name": shard.name,
                "sha256": file_sha256(folder / shard.name),
                "bytes": (folder / shard.name).stat().st_size,
                "samples": len(shard.indices),
                "first_index": shard.indices[0],
                "last_index": shard.indices[-1],
            }
            for shard in layout
        ]
        try:
            _put(folder, manifest, [_readable({**plan, "shards": shards})])
        except FileNotFoundError:
            # Another process has finished at the same moment and tidied up.
            if not manifest.exists():
                raise
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def _put(folder: Path, path: Path, chunks: Iterable[bytes]) -> None:
    """Writes a file that appears only when it is complete, even if the power fails.

    Should two processes write the same file at once, they write the same bytes.
    """
    unfinished = folder / UNFINISHED / f"{path.name}.{uuid.uuid4().hex}"
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    try:
        with unfinished.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _readable(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()

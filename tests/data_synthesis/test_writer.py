"""Shards are the same bytes however often their writer is killed and however many there are."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_synthesis import write_shards
from data_synthesis.reader import verify_shards
from data_synthesis.shards import shard_layout
from tests.data_synthesis.noise_scenes import NoiseScenes

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
COUNT, SHARDS = 60, 6


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def start_writer(folder: Path, count: int = COUNT, shards: int = SHARDS) -> subprocess.Popen[bytes]:
    """A writer in a process of its own, which is just about to begin."""
    module = "tests.data_synthesis.noise_scenes"
    process = subprocess.Popen(
        [sys.executable, "-m", module, str(folder), str(count), str(shards)],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.readline() == b"writing\n"
    return process


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert write_shards(NoiseScenes(), folder, count=COUNT, num_shards=SHARDS)
    return folder


# --- What a folder holds --------------------------------------------------------------------------


def test_folder_holds_shards_and_a_manifest(uninterrupted: Path) -> None:
    manifest = json.loads((uninterrupted / "manifest.json").read_text())
    assert manifest["settings"] == NoiseScenes().settings
    assert (manifest["count"], manifest["num_shards"], manifest["format_version"]) == (60, 6, 1)
    names = [f"shard-{number:05d}-of-00006.tar" for number in range(6)]
    assert [shard["name"] for shard in manifest["shards"]] == names
    assert sorted(contents(uninterrupted)) == ["manifest.json", *names]
    assert [shard["first_index"] for shard in manifest["shards"]] == list(range(0, 60, 10))
    for shard in manifest["shards"]:
        data = (uninterrupted / shard["name"]).read_bytes()
        assert shard["bytes"] == len(data) and shard["samples"] == 10
    assert verify_shards(uninterrupted) == []


def test_archives_hold_four_files_a_sample_and_no_trace_of_who_wrote_them(
    uninterrupted: Path,
) -> None:
    with tarfile.open(uninterrupted / "shard-00001-of-00006.tar") as archive:
        members = archive.getmembers()
    expected = [
        f"{index:08d}.{ending}"
        for index in range(10, 20)
        for ending in ("image.png", "target.npy", "disparity.npy", "json")
    ]
    assert [member.name for member in members] == expected
    assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {
        (0, 0, 0, "")
    }


@pytest.mark.parametrize(("count", "num_shards"), [(1, 1), (7, 3), (64, 64), (1000, 7)])
def test_every_sample_is_in_one_shard(count: int, num_shards: int) -> None:
    layout = shard_layout(count, num_shards)
    assert [index for shard in layout for index in shard.indices] == list(range(count))
    sizes = [len(shard.indices) for shard in layout]
    assert len(layout) == num_shards and max(sizes) - min(sizes) <= 1


def test_shards_hold_64_samples_by_default(tmp_path: Path) -> None:
    write_shards(NoiseScenes(), tmp_path, count=65)
    assert sorted(contents(tmp_path))[1:] == [
        "shard-00000-of-00002.tar",
        "shard-00001-of-00002.tar",
    ]


# --- Interruptions --------------------------------------------------------------------------------


def test_killed_at_ten_random_moments(uninterrupted: Path, tmp_path: Path) -> None:
    process = start_writer(tmp_path / "whole")
    started = time.monotonic()
    process.communicate()
    whole = time.monotonic() - started
    folder = tmp_path / "killed"
    moments = random.Random(5)
    kills = 0
    for _ in range(10):
        process = start_writer(folder)
        # Ten such pieces are about three quarters of the work.
        time.sleep(moments.uniform(0, 0.15 * whole))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    process = start_writer(folder)
    assert process.wait() == 0
    assert contents(folder) == contents(uninterrupted)
    # Clocks are not to be relied on: the last may come too late.
    assert kills >= 7


def _write_and_die(folder: Path, step: int) -> None:
    """Writes, and is gone without a trace before the ``step``-th change of the disk."""
    remaining = [step]

    def deadly(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **options: Any) -> Any:
            remaining[0] -= 1
            if remaining[0] == 0:
                os._exit(9)
            return change(*arguments, **options)

        return changed

    os.replace, os.fsync = deadly(os.replace), deadly(os.fsync)
    Path.unlink, shutil.rmtree = deadly(Path.unlink), deadly(shutil.rmtree)
    write_shards(NoiseScenes(), folder, count=3, num_shards=2)
    os._exit(0)


def test_killed_at_every_step(tmp_path: Path) -> None:
    write_shards(NoiseScenes(), tmp_path / "whole", count=3, num_shards=2)
    fork = multiprocessing.get_context("fork")
    for step in range(1, 100):
        folder = tmp_path / str(step)
        process = fork.Process(target=_write_and_die, args=(folder, step))
        process.start()
        process.join()
        assert write_shards(NoiseScenes(), folder, count=3, num_shards=2)
        assert contents(folder) == contents(tmp_path / "whole"), step
        if process.exitcode == 0:
            break
    # A plan, three samples, two shards and the manifest, each with several steps.
    assert 20 < step < 99


def test_resume_makes_only_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Sample 5 fails"):
        write_shards(NoiseScenes(fails_at=5), tmp_path, count=9, num_shards=3)
    assert (tmp_path / "shard-00000-of-00003.tar").exists()
    assert not (tmp_path / "shard-00001-of-00003.tar").exists()
    scenes, done = NoiseScenes(), []
    assert write_shards(scenes, tmp_path, count=9, num_shards=3, progress=done.append)
    assert scenes.made == [5, 6, 7, 8] and sum(done) == 9
    again = NoiseScenes()
    assert write_shards(again, tmp_path, count=9, num_shards=3)
    assert again.made == []


def test_deleted_shard_is_written_again_and_compared(tmp_path: Path) -> None:
    write_shards(NoiseScenes(), tmp_path, count=6, num_shards=3)
    whole = contents(tmp_path)
    (tmp_path / "shard-00001-of-00003.tar").unlink()
    assert write_shards(NoiseScenes(), tmp_path, count=6, num_shards=3)
    assert contents(tmp_path) == whole

    class Changed(NoiseScenes):
        def arrays(self, index: int) -> dict[str, Any]:
            return {**super().arrays(index), "df": 0.5}

    (tmp_path / "shard-00001-of-00003.tar").unlink()
    with pytest.raises(ValueError, match="shard-00001-of-00003.tar was written again and is not"):
        write_shards(Changed(), tmp_path, count=6, num_shards=3)


# --- Many writers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_any_number_of_processes_in_any_order(
    uninterrupted: Path, tmp_path: Path, order: tuple[int, ...]
) -> None:
    finished = [
        write_shards(
            NoiseScenes(), tmp_path, count=COUNT, num_shards=SHARDS, rank=rank, world_size=3
        )
        for rank in order
    ]
    assert finished == [False, False, True]
    assert contents(tmp_path) == contents(uninterrupted)


def test_two_writers_at_once_on_one_folder(uninterrupted: Path, tmp_path: Path) -> None:
    for number in range(2):
        folder = tmp_path / str(number)
        writers = [start_writer(folder) for _ in range(2)]
        for writer in writers:
            _, errors = writer.communicate()
            assert writer.returncode == 0, errors.decode()
        assert contents(folder) == contents(uninterrupted)


def test_own_processes(uninterrupted: Path, tmp_path: Path) -> None:
    assert write_shards(NoiseScenes(), tmp_path, count=COUNT, num_shards=SHARDS, processes=2)
    assert contents(tmp_path) == contents(uninterrupted)


def test_failure_of_an_own_process_is_told(tmp_path: Path) -> None:
    with pytest.raises(ChildProcessError, match="1 of 2 processes failed"):
        write_shards(NoiseScenes(fails_at=3), tmp_path, count=4, num_shards=2, processes=2)
    assert write_shards(NoiseScenes(), tmp_path, count=4, num_shards=2)


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scenes": NoiseScenes(7)}, "another data set .seed is 0 there, 7 here"),
        ({"count": 7}, "count is 6 there, 7 here"),
        ({"num_shards": 2}, "num_shards is 3 there, 2 here"),
    ],
)
def test_another_data_set_is_refused(
    tmp_path: Path, finished: bool, changes: dict[str, Any], sentence: str
) -> None:
    arguments = {"scenes": NoiseScenes(), "count": 6, "num_shards": 3}
    write_shards(folder=tmp_path, **arguments, world_size=1 if finished else 2)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        write_shards(folder=tmp_path, **{**arguments, **changes})
    assert contents(tmp_path) == before


def test_shards_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    write_shards(NoiseScenes(), tmp_path, count=2)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="neither manifest.json nor"):
        write_shards(NoiseScenes(), tmp_path, count=2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"count": 0}, "0 samples in 0 shards"),
        ({"count": 2, "num_shards": 3}, "at least one sample in each"),
        ({"count": 2, "rank": 1}, "rank is 1, world_size 1"),
        ({"count": 2, "processes": 0}, "processes 0"),
    ],
)
def test_mistakes_are_refused(tmp_path: Path, arguments: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        write_shards(NoiseScenes(), tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("image", np.zeros((3, 16, 16), np.float32), "image of sample 0 is float32"),
        ("target", np.zeros((3, 16, 15), np.uint16), "target of sample 0 is uint16"),
        ("disparity", np.zeros((3, 16, 16), np.uint16), "disparity of sample 0 is"),
        ("K", float("nan"), "JSON"),
    ],
)
def test_scenes_that_cannot_be_stored(tmp_path: Path, name: str, value: Any, sentence: str) -> None:
    class Wrong(NoiseScenes):
        def arrays(self, index: int) -> dict[str, Any]:
            return {**super().arrays(index), name: value}

    with pytest.raises(ValueError, match=sentence):
        write_shards(Wrong(), tmp_path, count=1)

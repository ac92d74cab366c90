"""Writing, resuming and reading shards, and the command line around them."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_synthesis import ProceduralScenes, ShardedScenes, write_shards
from data_synthesis.__main__ import main

SIZE = 32


@pytest.fixture(scope="module")
def scenes() -> ProceduralScenes:
    return ProceduralScenes(seed=4, size=SIZE, radius=(1.0, 4.0))


@pytest.fixture(scope="module")
def written(scenes: ProceduralScenes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    paths = write_shards(scenes.arrays, folder, count=7, shard_size=3, settings=scenes.settings)
    assert [path.name for path in paths] == [
        "procedural-00000000-00000002.safetensors",
        "procedural-00000003-00000005.safetensors",
        "procedural-00000006-00000006.safetensors",
    ]
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "shards"))


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def test_round_trip_is_exact(scenes: ProceduralScenes, folder: Path) -> None:
    read = ShardedScenes(folder)
    assert len(read) == 7
    assert read.settings["seed"] == 4 and read.settings["size"] == SIZE
    for index in (6, 0, 3, 2):
        assert_same(read[index], scenes[index])
    assert_same(read[-1], scenes[6])
    assert_same(pickle.loads(pickle.dumps(read))[4], scenes[4])
    with pytest.raises(IndexError, match="7 samples"):
        read[7]


def test_data_loader_with_workers(folder: Path) -> None:
    loader = torch.utils.data.DataLoader(
        ShardedScenes(folder), batch_size=4, num_workers=1, multiprocessing_context="fork"
    )
    batches = list(loader)
    assert batches[0]["image"].shape == (4, 3, SIZE, SIZE) and batches[1]["K"].shape == (3,)


def test_resume_writes_only_what_is_missing(scenes: ProceduralScenes, folder: Path) -> None:
    (folder / "procedural-00000003-00000005.safetensors").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    made = []

    def counted(index: int) -> dict:
        made.append(index)
        return scenes.arrays(index)

    done = []
    write_shards(
        counted, folder, count=8, shard_size=3, settings=scenes.settings, progress=done.append
    )
    assert made == [3, 4, 5, 7]
    assert sum(done) == 8
    for name, time in times.items():
        assert (folder / name).stat().st_mtime_ns == time
    read = ShardedScenes(folder)
    assert len(read) == 8
    assert_same(read[4], scenes[4])
    assert_same(read[7], scenes[7])
    assert not write_shards(counted, folder, count=8, shard_size=3, settings=scenes.settings)


def test_an_interrupted_shard_leaves_nothing_behind(
    scenes: ProceduralScenes, tmp_path: Path
) -> None:
    def failing(index: int) -> dict:
        if index == 4:
            raise KeyboardInterrupt
        return scenes.arrays(index)

    with pytest.raises(KeyboardInterrupt):
        write_shards(failing, tmp_path, count=6, shard_size=3, settings=scenes.settings)
    assert [path.name for path in tmp_path.iterdir()] == [
        "procedural-00000000-00000002.safetensors"
    ]
    assert len(ShardedScenes(tmp_path)) == 3


def test_another_data_set_is_refused(scenes: ProceduralScenes, folder: Path) -> None:
    other = ProceduralScenes(seed=9, size=SIZE)
    with pytest.raises(ValueError, match="another data set"):
        write_shards(other.arrays, folder, count=9, settings=other.settings)


def test_broken_and_overlapping_shards_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no shards"):
        ShardedScenes(tmp_path / "nothing")
    copy = folder / "procedural-00000004-00000006.safetensors"
    shutil.copy(folder / "procedural-00000003-00000005.safetensors", copy)
    with pytest.raises(ValueError, match="repeats samples"):
        ShardedScenes(folder)
    copy.unlink()
    (folder / "procedural-00000003-00000005.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="no readable shard"):
        ShardedScenes(folder)


def test_counts_are_checked(scenes: ProceduralScenes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="count is 0"):
        write_shards(scenes.arrays, tmp_path, count=0, settings=scenes.settings)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, sheet = tmp_path / "out", tmp_path / "sheet.png"
    command = ["procedural", "--count", "3", "--size", "32", "--seed", "2", "--out", str(out)]
    assert main([*command, "--start", "5", "--preview", str(sheet)]) == 0
    assert_same(ShardedScenes(out)[1], ProceduralScenes(2, 32)[6])
    with Image.open(sheet) as picture:
        assert picture.size == (3 * 96 + 2 * 4, 32)
    # A finished folder is left as it is; another data set and an existing picture are refused.
    assert main([*command, "--start", "5"]) == 0
    assert "0 new shards" in capsys.readouterr().out
    assert main([*command, "--seed", "3"]) == 2
    assert "another data set" in capsys.readouterr().err
    assert main(["procedural", "--count", "1", "--size", "32", "--preview", str(sheet)]) == 2
    assert "exists" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["procedural"])

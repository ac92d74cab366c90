"""Files of clips: what is stored is what was made, whatever happened while it was written."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from data_synthesis import clip_files
from data_synthesis.clip_files import StoredClips, write_clips
from data_synthesis.clip_scenes import ClipScenes


@pytest.fixture(scope="module")
def scenes() -> ClipScenes:
    return ClipScenes(13, 16, frames=2)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, scenes: ClipScenes) -> Path:
    folder = tmp_path_factory.mktemp("clips") / "new"
    told: list[int] = []
    write_clips(scenes, folder, count=35, progress=told.append)
    assert told == [16, 16, 3]
    return folder


def test_stored_clips_equal_the_scenes(written: Path, scenes: ClipScenes) -> None:
    stored = StoredClips(written)
    assert len(stored) == 35 and stored.settings == scenes.settings
    for index in (0, 15, 16, 34):
        assert stored[index].keys() == scenes[index].keys()
        for name, value in scenes[index].items():
            assert stored[index][name].dtype == value.dtype
            assert torch.equal(stored[index][name], value), (index, name)
    with pytest.raises(IndexError, match="has 35 clips"):
        stored[35]


def test_missing_and_damaged_files_are_written_again_the_same(
    tmp_path: Path, written: Path, scenes: ClipScenes
) -> None:
    for file in written.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    first, second, third = sorted(tmp_path.glob("*.safetensors"))
    content = third.read_bytes()
    third.write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"clips-00002-of-00003.safetensors is damaged .* Delete"):
        StoredClips(tmp_path)[34]
    third.unlink()
    with pytest.raises(ValueError, match="is not finished: 1 of 3 files are missing"):
        StoredClips(tmp_path)
    before = [file.stat().st_mtime_ns for file in (first, second)]
    write_clips(scenes, tmp_path, count=35)
    assert third.read_bytes() == content
    assert [file.stat().st_mtime_ns for file in (first, second)] == before


def test_folders_of_others_are_left_alone(
    tmp_path: Path, written: Path, scenes: ClipScenes
) -> None:
    with pytest.raises(ValueError, match="holds another data set"):
        write_clips(ClipScenes(14, 16, frames=2), written, count=35)
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match="is not empty and holds no clips"):
        write_clips(scenes, tmp_path, count=1)
    with pytest.raises(ValueError, match=r"holds no clips.*python -m data_synthesis clips"):
        StoredClips(tmp_path)
    with pytest.raises(ValueError, match="count is 0"):
        write_clips(scenes, tmp_path / "new", count=0)


def test_the_command_writes_what_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    clip_files.add_arguments(parser)
    flags = "--count 2 --size 16 --seed 13 --frames 3 --noise 0.02 0.02 --still-share 0.5".split()
    flags += ["--motions", "pan", "still", "--out", str(tmp_path / "clips")]
    assert clip_files.run(parser.parse_args(flags)) == 0
    assert "holds 2 clips of 3 frames" in capsys.readouterr().out
    chosen = ClipScenes(
        13, 16, frames=3, motions=("still", "pan"), still_share=0.5, noise=(0.02, 0.02)
    )
    assert StoredClips(tmp_path / "clips").settings == chosen.settings


def test_several_processes_write_the_same_bytes(
    tmp_path: Path, written: Path, scenes: ClipScenes
) -> None:
    write_clips(scenes, tmp_path, count=35, processes=2)
    for file in sorted(written.iterdir()):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()

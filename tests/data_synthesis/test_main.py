"""The command line, and its processes."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_synthesis import ProceduralScenes, ShardedScenes
from data_synthesis.__main__ import COMMANDS, main
from tests.data_synthesis.test_writer import ENVIRONMENT, REPOSITORY, contents

PROCEDURAL = ["procedural", "--count", "6", "--size", "24", "--seed", "2", "--num-shards", "3"]


@pytest.fixture(autouse=True)
def not_launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("main") / "out"
    assert main([*PROCEDURAL, "--out", str(folder)]) == 0
    return folder


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_shards_hold_the_procedural_scenes(written: Path) -> None:
    scenes = ShardedScenes(written)
    assert len(scenes) == 6
    for index in (0, 5):
        assert_same(scenes[index], ProceduralScenes(2, 24)[index])


def test_finished_folders_stay_and_others_are_refused(
    written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(written)
    assert main([*PROCEDURAL, "--out", str(written)]) == 0
    assert "is finished: 6 samples in 3 shards" in capsys.readouterr().out
    assert main([*PROCEDURAL, "--aperture", "random", "--out", str(written)]) == 2
    assert "another data set (aperture is {} there, random here)" in capsys.readouterr().err
    assert main([*PROCEDURAL, "--imperfect-share", "0", "--out", str(written)]) == 2
    assert "another data set (imperfect_share is None there, 0.0 here)" in capsys.readouterr().err
    assert main([*PROCEDURAL, "--count", "2", "--out", str(written)]) == 2
    assert "at least one sample in each" in capsys.readouterr().err
    assert contents(written) == before


def test_verify(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(written)]) == 0
    assert main(["verify", str(tmp_path)]) == 2
    assert "holds no data set" in capsys.readouterr().err
    for name, data in contents(written).items():
        (tmp_path / name).write_bytes(data if "00001" not in name else b"")
    assert main(["verify", str(tmp_path)]) == 1
    assert "shard-00001-of-00003.tar: damaged" in capsys.readouterr().out
    # As the message says: deleted and written again.
    (tmp_path / "shard-00001-of-00003.tar").unlink()
    assert main([*PROCEDURAL, "--out", str(tmp_path)]) == 0
    assert contents(tmp_path) == contents(written)


@pytest.mark.parametrize(
    "source", [None, ["procedural", "--size", "24", "--seed", "2"], ["layers", "--size", "32"]]
)
def test_preview(written: Path, tmp_path: Path, source: list[str] | None) -> None:
    sheet = tmp_path / "sheet.png"
    command = ["preview", *(source or [str(written)]), "--count", "5", "--out", str(sheet)]
    assert main(command) == 0
    side = 32 if source and source[0] == "layers" else 24
    with Image.open(sheet) as picture:
        assert picture.size == (4 * 3 * side + 3 * 4, 2 * side + 4)
        assert len(picture.getcolors(1 << 16)) > 100
    assert main(command) == 2  # it exists


def test_preview_beside_shards(tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    assert main(["procedural", "--count", "2", "--size", "24", "--preview", str(sheet)]) == 0
    with Image.open(sheet) as picture:
        assert picture.size == (2 * 3 * 24 + 4, 24)


def test_large_pictures_are_shown_smaller(tmp_path: Path) -> None:
    from data_synthesis.preview import write_contact_sheet

    item = {"image": torch.rand(3, 300, 600), "disparity": torch.rand(1, 300, 600)}
    write_contact_sheet([{**item, "target": item["image"]}], tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.size == (3 * 256, 128)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"data_synthesis {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["procedural"], "nothing to do"),
        (["procedural", "--out", "x", "--processes", "0"], "--processes is 0"),
        (["procedural", "--out", "x", "--aperture", "round"], "neither random nor the fields"),
        (["preview", "x", "--out", "x.png", "--count", "0"], "--count is 0"),
        (["nonsense"], "invalid choice"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


# --- Processes ------------------------------------------------------------------------------------


def launched(processes: int, folder: Path) -> list[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launcher += ["--num_processes", str(processes), "--num_machines", "1", "--main_process_port"]
    return [*launcher, "0", "-m", "data_synthesis", *PROCEDURAL, "--out", str(folder)]


def test_accelerate_launch_with_two_processes(written: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        launched(2, tmp_path), cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # Both took part.
    assert "process 1 of 2: 100%" in done.stderr and "4/4" in done.stderr
    assert contents(tmp_path) == contents(written)


def test_own_processes(written: Path, tmp_path: Path) -> None:
    assert main([*PROCEDURAL, "--processes", "2", "--out", str(tmp_path)]) == 0
    assert contents(tmp_path) == contents(written)


@pytest.mark.slow
def test_two_machines_killed_at_random_moments(tmp_path: Path) -> None:
    command = ["procedural", "--count", "60", "--size", "24", "--num-shards", "4", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    folder = tmp_path / "killed"
    moments = random.Random(3)
    killed = 0
    for _ in range(5):
        there = {path.name for path in folder.rglob("*")}
        machines = [
            subprocess.Popen(
                [sys.executable, "-m", "data_synthesis", *command, str(folder)],
                cwd=REPOSITORY,
                env={**ENVIRONMENT, "RANK": str(rank), "WORLD_SIZE": "2"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for rank in range(2)
        ]
        # Until there is something new, and then a moment: each piece gets a little further.
        while machines[0].poll() is None and {path.name for path in folder.rglob("*")} <= there:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.2))
        for machine in machines:
            machine.kill()
            killed += machine.wait() == -signal.SIGKILL
    assert killed >= 5
    assert main([*command, str(folder)]) == 0
    assert contents(folder) == contents(tmp_path / "whole")

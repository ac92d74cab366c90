"""The benchmark on disk: the same bytes however it is written, and read by the evaluation."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_synthesis.benchmark import BENCHMARKS, add_arguments, run, write_benchmark
from data_synthesis.layer_scenes import LayerScenes

REPOSITORY = Path(__file__).resolve().parents[2]
SIZE = 128
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
PROGRAM = """
import sys
from data_synthesis.benchmark import write_benchmark
if __name__ == "__main__":
    write_benchmark("synbokeh300", sys.argv[1], count=int(sys.argv[2]), size=128,
                    processes=int(sys.argv[3]))
"""


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file by its name below the folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark") / "miniature"
    written = write_benchmark("synbokeh300", folder, count=2, size=SIZE)
    assert [path.name for path in written] == ["s000", "s001"]
    return folder


def test_a_scene_holds_what_its_description_says(miniature: Path) -> None:
    assert BENCHMARKS["synbokeh300"].scenes == 300
    for folder in (miniature / "s000", miniature / "s001"):
        meta = json.loads((folder / "meta.json").read_text())
        assert len(meta["configs"]) == 4
        disparity = np.load(folder / "disp.npz")["disp"]
        light = np.load(folder / "aif_lin.npz")["aif"]
        assert disparity.shape == (SIZE, SIZE) and disparity.dtype == np.float32
        assert light.shape == (SIZE, SIZE, 3)
        sharp = np.asarray(Image.open(folder / "aif.png")).astype(float)
        farther_off = 0.0
        for setting in meta["configs"]:
            largest = setting["K"] * np.abs(disparity - setting["df"]).max()
            assert abs(largest - setting["max_radius_px"]) < 1e-3
            # Planes that would be met edge-on are blurred less.
            assert setting["level"] * 0.6 < largest < setting["level"] + 1e-3
            truth = np.asarray(Image.open(folder / f"gt_{setting['id']}.png")).astype(float)
            assert truth.shape == sharp.shape
            error = ((truth - sharp) ** 2).mean()
            assert error > farther_off
            farther_off = error


def test_checksums_are_those_of_the_usual_tool(miniature: Path) -> None:
    for line in (miniature / "s000" / "SHA256SUMS").read_text().splitlines():
        checksum, name = line.split("  ")
        data = (miniature / "s000" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == checksum
    assert len(list((miniature / "s000").iterdir())) == 9


def test_the_evaluation_reads_and_scores_it(miniature: Path, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "evaluation", "raytraced", str(miniature), "--method", "scatter",
         "--out", str(tmp_path / "out.json")],
        cwd=REPOSITORY, env=ENVIRONMENT, check=True, capture_output=True,
    )  # fmt: skip
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    scatter, identity = results["scatter"]["overall"], results["identity"]["overall"]
    assert results["scatter"]["images"] == 8 and results["scatter"]["scenes"] == 2
    # A renderer that takes K, df or the side of the focus otherwise does not come near.
    assert scatter["psnr"] > identity["psnr"] + 5
    assert scatter["psnr_blurred"] > 35


@pytest.mark.slow
def test_any_number_of_processes_and_kills_give_the_same_bytes(
    miniature: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    work = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), "300", "1"], cwd=REPOSITORY, env=ENVIRONMENT
    )
    deadline = time.monotonic() + 60
    while not (folder / "s000").exists():
        assert work.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    work.send_signal(signal.SIGKILL)
    work.wait()
    kept = (folder / "s000" / "meta.json").stat().st_mtime_ns
    script = tmp_path / "write.py"
    script.write_text(PROGRAM)
    subprocess.run(
        [sys.executable, str(script), str(folder), "3", "2"],
        cwd=REPOSITORY, env=ENVIRONMENT, check=True,
    )  # fmt: skip
    assert (folder / "s000" / "meta.json").stat().st_mtime_ns == kept
    assert not (folder / ".unfinished").exists()
    found = contents(folder)
    for name, checksum in contents(miniature).items():
        assert found[name] == checksum, name
    assert {name.split("/")[0] for name in found if not name.startswith("s0")} == {"benchmark.json"}


def test_finished_scenes_are_kept_and_damage_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "benchmark"
    done: list[int] = []
    assert len(write_benchmark("synbokeh300", folder, count=1, size=SIZE)) == 1
    assert write_benchmark("synbokeh300", folder, count=1, size=SIZE, progress=done.append) == []
    assert sum(done) == 1
    truth = next((folder / "s000").glob("gt_*.png"))
    truth.write_bytes(truth.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{truth.name} of .*s000 is not as it was written"):
        write_benchmark("synbokeh300", folder, count=1, size=SIZE)
    truth.unlink()
    with pytest.raises(ValueError, match="s000 is not as it was written"):
        write_benchmark("synbokeh300", folder, count=1, size=SIZE)


def test_another_benchmark_is_not_mixed_in(miniature: Path, tmp_path: Path) -> None:
    before = contents(miniature)
    with pytest.raises(ValueError, match="another benchmark.*size 128, not 130"):
        write_benchmark("synbokeh300", miniature, count=1, size=SIZE + 2)
    assert contents(miniature) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        write_benchmark("synbokeh300", tmp_path, count=1, size=SIZE)
    assert contents(tmp_path).keys() == {"notes.txt"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "ebb"}, "name is 'ebb'"),
        ({"count": 0}, "count is 0"),
        ({"count": 301}, "1 to 300"),
        ({"size": 64}, "size is 64"),
        ({"processes": 0}, "processes is 0"),
        ({"foregrounds": "no/such/folder"}, "There is no folder"),
    ],
)
def test_mistakes_are_refused(arguments: dict, sentence: str, tmp_path: Path) -> None:
    settings = {"name": "synbokeh300", "folder": tmp_path / "out", "size": SIZE, **arguments}
    with pytest.raises(ValueError, match=sentence):
        write_benchmark(**settings)
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    folder = tmp_path / "out"
    run(parser.parse_args(["--out", str(folder), "--count", "1", "--size", str(SIZE)]))
    assert "1 new scenes" in capsys.readouterr().out
    assert (folder / "s000" / "meta.json").is_file()


def test_foreground_and_background_are_in_focus_about_equally_often() -> None:
    scenes = LayerScenes(300, SIZE, focus={"foreground": 0.5, "background": 0.5})
    focus = [scenes.compose(index, 12).provenance["focus"] for index in range(24)]
    assert 5 <= focus.count("foreground") <= 19

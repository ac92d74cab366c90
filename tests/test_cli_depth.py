"""`bokehdiff depth`, with tiny real models and files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from bokehdiff.cli import app
from bokehdiff.depth import DEFAULT_DEPTH_MODEL, DepthEstimator
from bokehdiff.images import read_disparity
from tests.tiny_depth import save_tiny_depth


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    kinds = ("relative", "metric")
    return {kind: save_tiny_depth(tmp_path_factory.mktemp(kind), kind) for kind in kinds}


@pytest.fixture(autouse=True)
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """photo.png (90 x 60) with a bright square on dark, in `tmp_path`; the cache beside it."""
    monkeypatch.setenv("BOKEHDIFF_CACHE", str(tmp_path / "cache"))
    photo = np.full((60, 90, 3), 50, np.uint8)
    photo[15:45, 30:60] = 220
    Image.fromarray(photo).save(tmp_path / "photo.png")
    return tmp_path


def test_help_shows_examples():
    assert "bokehdiff depth photo.jpg -o disparity.png" in run("depth", "--help").output
    assert "depth" in run("--help").output


def test_a_png_of_16_bits_reads_back_as_the_estimate(scene, folders):
    target = scene / "disparity.png"
    result = run(
        "depth",
        scene / "photo.png",
        "-o",
        target,
        "--model",
        folders["relative"],
        "--device",
        "cpu",
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{target} (0 to 1)\n"
    with Image.open(target) as written:
        assert written.mode == "I;16" and written.size == (90, 60)
    estimator = DepthEstimator.from_pretrained(folders["relative"], cache_folder=None)
    wanted = estimator(scene / "photo.png").disparity
    torch.testing.assert_close(read_disparity(target), wanted, atol=0.51 / 65535, rtol=0)
    assert len(list((scene / "cache" / "depth").iterdir())) == 1


@pytest.mark.parametrize("kind", ["relative", "metric"])
def test_npy_holds_the_estimate(scene, folders, kind):
    target = scene / "disparity.npy"
    result = run("depth", scene / "photo.png", "-o", target, "--model", folders[kind])
    assert result.exit_code == 0, result.output
    assert ("1/m" in result.stdout) == (kind == "metric")
    estimator = DepthEstimator.from_pretrained(folders[kind], cache_folder=None)
    assert torch.equal(read_disparity(target), estimator(scene / "photo.png").disparity)


def test_metres_do_not_go_into_a_png(scene, folders):
    target = scene / "disparity.png"
    result = run("depth", scene / "photo.png", "-o", target, "--model", folders["metric"])
    assert result.exit_code == 1 and not target.exists()
    assert "wanted a file ending in .npy" in result.stderr


@pytest.mark.parametrize("kind, suffix", [("relative", ".png"), ("metric", ".npy")])
def test_several_into_a_folder_that_render_takes(scene, folders, kind, suffix):
    Image.open(scene / "photo.png").rotate(180).save(scene / "other.jpg")
    photos = (scene / "photo.png", scene / "other.jpg")
    result = run("depth", *photos, "-o", scene / "maps", "--model", folders[kind])
    assert result.exit_code == 0, result.output
    names = sorted(file.name for file in (scene / "maps").iterdir())
    assert names == [f"other_disparity{suffix}", f"photo_disparity{suffix}"]
    metric = ["--metric"] if kind == "metric" else []
    rendered = run(
        "render", *photos, "--disparity", scene / "maps", "--df", 0.3, "--K", 5, "--method",
        "scatter", "-o", scene / "out", *metric,
    )  # fmt: skip
    assert rendered.exit_code == 0, rendered.output


def test_nothing_is_overwritten_unasked(scene, folders):
    target = scene / "disparity.npy"
    target.write_bytes(b"mine")
    command = ("depth", scene / "photo.png", "-o", target, "--model", folders["relative"])
    result = run(*command)
    assert result.exit_code == 1 and target.read_bytes() == b"mine"
    assert "exists already; nothing was estimated" in result.stderr
    assert run(*command, "--force").exit_code == 0
    assert read_disparity(target).shape == (1, 1, 60, 90)
    result = run(*command[:2], "-o", scene / "photo.png", *command[4:], "--force")
    assert result.exit_code == 1 and "is the photograph itself" in result.stderr


def test_outputs_that_cannot_be(scene, folders):
    (scene / "plain").write_text("")
    (scene / "deeper").mkdir()
    Image.open(scene / "photo.png").save(scene / "deeper" / "photo.png")
    two = (scene / "photo.png", scene / "deeper" / "photo.png")
    for photos, output, sentence in (
        (two[:1], "map.jpg", "ends in .jpg; wanted a folder, or a file ending in .png or .npy"),
        (two, "map.png", "is one file for 2 photographs; wanted a folder"),
        (two, "maps", "would both be written to"),
        (two[:1], "none/map.png", "create it first"),
        (two[:1], "plain", "is a file without an ending"),
        ((scene / "none.png",), "map.png", "none.png does not exist; wanted a photograph"),
    ):
        result = run("depth", *photos, "-o", scene / output, "--model", folders["relative"])
        assert result.exit_code == 1 and sentence in result.stderr, result.output


def test_one_bad_photograph_does_not_stop_the_rest(scene, folders):
    (scene / "bad.png").write_bytes((scene / "photo.png").read_bytes()[:100])
    result = run(
        "depth", scene / "bad.png", scene / "photo.png", "-o", scene / "maps", "--model",
        folders["relative"],
    )  # fmt: skip
    assert result.exit_code == 1 and "bad.png is damaged or truncated" in result.stderr
    assert [file.name for file in (scene / "maps").iterdir()] == ["photo_disparity.png"]


def run_as_new_user(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, whose Hub cache is ``folder / "hub"``, and without a network."""
    environment = {**os.environ, "HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    return subprocess.run(
        [sys.executable, "-m", "bokehdiff", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_without_network_and_weights_there_is_one_clear_sentence(scene):
    """As on a machine where nothing was ever fetched."""
    result = run_as_new_user(scene, "depth", "photo.png", "-o", "disparity.png")
    assert result.returncode == 1 and result.stdout == ""
    (sentence,) = result.stderr.strip().splitlines()
    assert sentence.startswith(f"bokehdiff: The depth model {DEFAULT_DEPTH_MODEL} could not be ")
    assert f"`hf download {DEFAULT_DEPTH_MODEL} --local-dir FOLDER`" in sentence
    assert "--disparity" in sentence
    assert not (scene / "disparity.png").exists()


@pytest.mark.slow
def test_what_was_fetched_before_needs_no_network(scene, folders):
    """The default model, as the Hub's client lays it down."""
    repository = scene / "hub" / ("models--" + DEFAULT_DEPTH_MODEL.replace("/", "--"))
    commit = "0123456789" * 4
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folders["relative"], repository / "snapshots" / commit)
    result = run_as_new_user(scene, "depth", "photo.png", "-o", "disparity.npy")
    assert result.returncode == 0, result.stderr
    estimator = DepthEstimator.from_pretrained(folders["relative"], cache_folder=None)
    assert torch.equal(
        read_disparity(scene / "disparity.npy"), estimator(scene / "photo.png").disparity
    )

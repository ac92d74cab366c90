"""The example scripts, run as a person runs them, on small pictures."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import stereo_motorcycle

import bokehdiff

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples"
SCRIPTS = (
    "render",
    "focus_pull",
    "stack_and_depth",
    "train_on_cutouts",
    "evaluate_method",
)


def run(name: str, *arguments: str | Path, folder: Path) -> str:
    """What a script prints that is started in `folder`."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(np.float32) / 255


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A piece of a photograph, and its disparity beside it: the left half is near."""
    folder = tmp_path_factory.mktemp("photo")
    Image.fromarray(stereo_motorcycle()[0][150:214, 300:396]).save(folder / "photo.png")
    disparity = np.full((64, 96), 0.2, np.float32)
    disparity[:, :48] = 0.9
    np.save(folder / "disparity.npy", disparity)
    return folder / "photo.png"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_short_and_says_how_it_is_started(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 75
    assert f"python examples/{name}.py" in ast.get_docstring(ast.parse(text))


def test_render(photo, tmp_path):
    disparity = photo.with_name("disparity.npy")
    run(
        "render", "--photo", photo, "--disparity", disparity, "--focus", 10, 30, "--K", 12,
        "--out", tmp_path / "a" / "b", folder=tmp_path,
    )  # fmt: skip
    blurred = pixels(tmp_path / "a" / "b" / "blurred.png")
    change = np.abs(blurred - pixels(photo)).mean(axis=(0, 2))
    assert change[:36].max() < 1 / 255 < 5 / 255 < change[52:].mean()
    assert (tmp_path / "a" / "b" / "circles_of_confusion.png").is_file()


def test_focus_pull(photo, tmp_path):
    said = run(
        "focus_pull", "--photo", photo, "--disparity", photo.with_name("disparity.npy"),
        "--from", 10, 30, "--to", 80, 30, "--frames", 3, "--K", 12, "--out", tmp_path,
        folder=tmp_path,
    )  # fmt: skip
    assert "3 frames, df 0.90 to 0.20" in said
    film = Image.open(tmp_path / "focus_pull.webp")
    assert (film.n_frames, film.size) == (3, (96, 64))
    detail = []
    for frame in (0, 2):
        film.seek(frame)
        steps = np.abs(np.diff(np.asarray(film.convert("L")).astype(float), axis=1)).mean(axis=0)
        detail.append((steps[:40].mean(), steps[55:].mean()))
    assert detail[0][0] > 1.5 * detail[1][0] and detail[1][1] > 1.5 * detail[0][1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stack_and_depth(tmp_path):
    generator = torch.Generator().manual_seed(0)
    bokehdiff.write_image(tmp_path / "noise.png", torch.rand(1, 3, 80, 80, generator=generator))
    disparity = np.full((80, 80), 0.4, np.float32)
    disparity[:, 40:] = 0.8
    np.save(tmp_path / "metric.npy", disparity)
    said = run(
        "stack_and_depth", "--photo", "noise.png", "--disparity", "metric.npy", "--K", 6, 12,
        "--out", "out", folder=tmp_path,
    )  # fmt: skip
    error = float(said.split("Median error of inverse depth: ")[1].split("%")[0])
    assert error < 10
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"sharp.png", "K_6.png", "K_12.png", "found.png", "measured.png"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_train_on_cutouts(tmp_path):
    run("train_on_cutouts", "--max_train_steps", "4", "--out", "out", folder=tmp_path)
    trained = bokehdiff.BokehDiffPipeline.from_pretrained(tmp_path / "out" / "model")
    before = bokehdiff.BokehDiffPipeline.from_pretrained(bokehdiff.TINY)
    changed = [
        name
        for name, value in before.unet.state_dict().items()
        if not torch.equal(value, trained.unet.state_dict()[name])
    ]
    assert changed and not [name for name in changed if name.startswith("refiner")]
    blurred, truth = (pixels(tmp_path / "out" / f"{name}.png") for name in ("blurred", "truth"))
    assert np.abs(blurred - truth).mean() < 0.05
    # The cut-outs that it made serve as a person's own.
    own = ("--cutouts", tmp_path / "out" / "cutouts", "--max_train_steps", "1", "--out", "own")
    run("train_on_cutouts", *own, folder=tmp_path)
    assert not (tmp_path / "own" / "cutouts").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_evaluate_method(tmp_path):
    run("evaluate_method", "--scenes", "1", "--out", "out", folder=tmp_path)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    text = json.dumps(results)
    for method in ("gaussians", "tiny", "scatter"):
        assert method in text
    assert (tmp_path / "out" / "report" / "index.html").is_file()
    mine = tmp_path / "mine.py"
    mine.write_text("def same(image, disparity, df, K):\n    return image\n")
    named = ("--method", f"same={mine}:same", "--scenes", "1", "--out", "out")
    assert "same" in run("evaluate_method", *named, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SCRIPTS[:3])
def test_without_arguments_it_takes_the_photograph_of_scikit_image(name, tmp_path):
    run(name, folder=tmp_path)
    made = list((tmp_path / "outputs" / name).iterdir())
    with Image.open(max(made)) as picture:
        assert picture.size == (741, 500)

"""`bokehdiff stack`: by a classical renderer, and by a tiny FLUX.1-Kontext in a real process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from bokehdiff.cli import app
from bokehdiff.images import read_image
from bokehdiff.optics import strength_from_camera
from bokehdiff.pipelines.bokeh_stack import BokehStackPipeline
from bokehdiff.rendering import render_bokeh
from bokehdiff.stack_folder import read_stack_folder
from tests.tiny_bokeh_stack import trained_adapter
from tests.tiny_depth import save_tiny_depth
from tests.tiny_flux import tiny_kontext_components

REPOSITORY = str(Path(__file__).resolve().parents[1])


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """photo.png (64 x 48), noise, and photo.npy in 1/metres: a square at 1.25 m, a wall at 10 m."""
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    disparity = np.full((48, 64), 0.1, np.float32)
    disparity[8:40, 4:30] = 0.8
    exif = Image.Exif()
    # FNumber, FocalLength, FocalLengthIn35mmFilm
    exif[0x8769] = {0x829D: 2.0, 0x920A: 50.0, 0xA405: 50}
    Image.fromarray(photo).save(tmp_path / "photo.png", exif=exif)
    np.save(tmp_path / "photo.npy", disparity)
    return tmp_path


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())  # type: ignore[no-any-return]


# -- By a classical renderer -----------------------------------------------------------------------


def test_a_classical_stack_is_that_of_the_renderer(scene: Path) -> None:
    result = run(
        "stack", scene / "photo.png", "--K", "0,4,12", "--disparity", scene / "photo.npy",
        "--focus-distance", 1.25, "--device", "cpu", "-o", scene / "stack",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "3 pictures, K 0, 4, 12, df 0.8 1/m" in result.stdout
    image, stack, K, df = read_stack_folder(scene / "stack")
    assert torch.equal(image, read_image(scene / "photo.png"))
    assert K == [0.0, 4.0, 12.0] and df == pytest.approx(0.8)
    assert torch.equal(stack[:1], image)  # K = 0
    disparity = np.load(scene / "photo.npy")
    for picture, strength in zip(stack[1:], K[1:], strict=True):
        wanted = render_bokeh(image, disparity, 0.8, strength, metric=True)[0]
        torch.testing.assert_close(picture, wanted, atol=0.5 / 255 + 1e-6, rtol=0)  # of 8 bits
    said = summary(scene / "stack")
    assert said["method"] == "layered" and said["arguments"]["strengths"] == "0,4,12"
    assert said["versions"].keys() >= {"bokehdiff", "torch", "diffusers", "python"}


def test_the_focus_may_be_a_place_and_the_strength_a_camera(scene: Path) -> None:
    result = run(
        "stack", scene / "photo.png", "--f-numbers", "1.4,2.8", "--disparity",
        scene / "photo.npy", "--focus", "16,24", "--method", "scatter", "--sensor-width", 36,
        "-o", scene / "stack",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    read = read_stack_folder(scene / "stack")
    assert read.df == pytest.approx(0.8)
    wanted = [strength_from_camera(number, 50, 1.25, 36, 64) for number in (1.4, 2.8)]
    assert read.K == pytest.approx(wanted, rel=1e-6)


def test_the_focus_may_be_at_infinity(scene: Path) -> None:
    result = run(
        "stack", scene / "photo.png", "--K", "5", "--disparity", scene / "photo.npy",
        "--focus-distance", "inf", "--method", "pyramid", "-o", scene / "stack",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert read_stack_folder(scene / "stack").df == 0
    assert summary(scene / "stack")["arguments"]["focus_distance"] == "inf"


def test_a_metric_depth_model_takes_the_place_of_a_map(scene: Path) -> None:
    save_tiny_depth(scene / "metric", "metric")
    common = ("stack", scene / "photo.png", "--K", "5", "--focus-distance", 10)
    result = run(*common, "--depth-model", scene / "metric", "-o", scene / "stack")
    assert result.exit_code == 0, result.output
    assert read_stack_folder(scene / "stack").K == [5.0]
    save_tiny_depth(scene / "relative", "relative")
    result = run(*common, "--depth-model", scene / "relative", "-o", scene / "other")
    assert result.exit_code == 1 and "metric" in result.stderr
    assert not (scene / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs a disparity map in 1/metres"),
        (["--disparity", "photo.npy"], "--focus-distance and --focus"),
        (["--disparity", "photo.npy", "--focus", "9,9", "--focus-distance", "2"], "both were"),
        (["--disparity", "photo.npy", "--focus-distance", "-2"], "more than 0"),
        (["--disparity", "photo.npy", "--focus-distance", "2", "--K", "ten"], "wanted numbers"),
        (["--disparity", "photo.npy", "--focus-distance", "2", "--K", "-1"], "each 0 or more"),
        (["--disparity", "none.npy", "--focus-distance", "2"], "no disparity map"),
        (["--focus-distance", "2", "--K", "1", "--f-numbers", "2"], "needs a disparity"),
        (["--disparity", "photo.npy", "--K", "1", "--f-numbers", "2"], "both came"),
        (["--method", "model"], "goes with --model"),
        (["--weights", "a.bin", "--disparity", "photo.npy"], "--weights goes with --model"),
        (["--model", "m", "--disparity", "photo.npy"], "paints without a map"),
        (["--model", "m", "--method", "layered"], "--method model"),
        (["--model", "./nowhere"], "There is no folder"),
        (["--model", "./nowhere", "--offload", "--device", "cpu"], "--offload"),
    ],
)
def test_mistakes_are_one_sentence_and_nothing_is_written(
    scene: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(scene)
    result = run("stack", "photo.png", "-o", "stack", *arguments)
    assert result.exit_code == 1 and message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (scene / "stack").exists()


def test_a_stack_is_not_written_over(scene: Path) -> None:
    arguments = (
        "stack", scene / "photo.png", "--K", "3", "--disparity", scene / "photo.npy",
        "--focus-distance", 2, "--method", "pyramid", "-o", scene / "stack",
    )  # fmt: skip
    assert run(*arguments).exit_code == 0
    (scene / "stack" / "0.png").write_bytes(b"mine")
    again = run(*arguments)
    assert again.exit_code == 1 and "--force" in again.stderr
    assert (scene / "stack" / "0.png").read_bytes() == b"mine"
    assert run(*arguments, "--force").exit_code == 0
    assert read_stack_folder(scene / "stack").K == [3.0]
    # The photograph itself is not written over, whatever is forced.
    photo = scene / "stack" / "ref.png"
    before = photo.read_bytes()
    on_itself = run("stack", photo, *arguments[2:], "--force")
    assert on_itself.exit_code == 1 and "the photograph itself" in on_itself.stderr
    assert photo.read_bytes() == before
    (scene / "file").write_text("mine")
    on_a_file = run(*arguments[:-1], scene / "file", "--force")
    assert on_a_file.exit_code == 1 and "is a file" in on_a_file.stderr


# -- By FLUX.1-Kontext -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Kontext (kontext) and its adapter (bokeh_lora.bin)."""
    folder = tmp_path_factory.mktemp("saved")
    pipe = BokehStackPipeline(**tiny_kontext_components(folder), bokeh_adapter=trained_adapter())
    pipe.save_bokeh_adapter(folder / "bokeh_lora.bin")
    pipe.unload_bokeh_adapter()
    pipe.save_pretrained(folder / "kontext")
    return folder


def painting(saved: Path) -> list[str]:
    return [
        *("stack", "photo.png", "--K", "0,20,60"),
        *("--model", str(saved / "kontext"), "--weights", str(saved / "bokeh_lora.bin")),
        *("--steps", "2", "--guidance", "5", "--seed", "7", "--max-area", "1024"),
        *("--colour-transfer", "none", "--focus-distance", "2", "--device", "cpu"),
    ]


def test_a_painted_stack_is_that_of_the_pipeline(
    scene: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(scene)
    result = run(*painting(saved), "-o", "stack")
    assert result.exit_code == 0, result.output
    assert "3 pictures, K 0, 20, 60, df 0.5 1/m" in result.stdout
    assert "2/2" in result.stderr  # the progress of the steps
    image, stack, K, df = read_stack_folder(scene / "stack")
    assert K == [0.0, 20.0, 60.0] and df == 0.5 and torch.equal(stack[:1], image)

    pipe = BokehStackPipeline.from_pretrained(saved / "kontext")
    pipe.load_bokeh_adapter(saved / "bokeh_lora.bin")
    wanted = pipe(
        scene / "photo.png", [0, 20, 60], num_inference_steps=2, guidance_scale=5.0,
        max_area=1024, colour_transfer=None, generator=torch.Generator().manual_seed(7),
        output_type="pt",
    )  # fmt: skip
    torch.testing.assert_close(stack, wanted.images, atol=0.5 / 255 + 1e-6, rtol=0)  # of 8 bits

    said = summary(scene / "stack")
    rows, columns = wanted.network_size
    assert said["network"] == {
        "k": wanted.network_K, "size": [columns, rows], "prompts": wanted.prompts,
    }  # fmt: skip
    assert said["dtype"] == "float32" and said["device"] == "cpu" and said["method"] == "model"
    used = {"steps": 2, "guidance": 5.0, "seed": 7, "max_area": 1024, "colour_transfer": "none"}
    assert said["arguments"].items() >= {**used, "lora_scale": 1.0, "prompt": None}.items()


@pytest.mark.slow
def test_a_painted_stack_in_a_process_of_its_own(
    scene: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "bokehdiff", *painting(saved), "-o", "by_process"],
        cwd=scene,
        env={"PYTHONPATH": REPOSITORY, **os.environ},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "by_process (3 pictures, K 0, 20, 60, df 0.5 1/m)\n"
    monkeypatch.chdir(scene)
    assert run(*painting(saved), "-o", "here").exit_code == 0
    by_process, here = (read_stack_folder(scene / name) for name in ("by_process", "here"))
    # Eight bits; a process with other threads may add up in another order.
    torch.testing.assert_close(by_process.stack, here.stack, atol=1.01 / 255, rtol=0)


def test_what_the_model_cannot_do_is_said(scene: Path, saved: Path) -> None:
    common = ("stack", scene / "photo.png", "--model", saved / "kontext", "-o", scene / "stack")
    without = run(*common, "--device", "cpu")
    assert without.exit_code == 1 and "--weights" in without.stderr
    weights = ("--weights", saved / "bokeh_lora.bin", "--device", "cpu")
    beyond = run(*common, *weights, "--K", "90")
    assert beyond.exit_code == 1 and "wanted 1 to 30" in beyond.stderr
    silent = run(*common, *weights, "--f-numbers", "0.5")
    assert silent.exit_code == 1 and "--focus-distance" in silent.stderr
    assert not (scene / "stack").exists()

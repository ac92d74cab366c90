"""`bokehdiff depth --from-bokeh`, with tiny real models and files."""

from __future__ import annotations

import functools
import json
import math
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

from bokehdiff import TINY, render_bokeh
from bokehdiff.cli import app
from bokehdiff.images import read_image, write_image
from bokehdiff.models.bokeh_adapter import BokehAdapter
from bokehdiff.optics import depth_to_disparity
from bokehdiff.pipelines.bokeh_stack import BokehStackPipeline
from bokehdiff.pipelines.depth_from_bokeh import DepthFromBokehPipeline
from bokehdiff.pipelines.depth_from_sweep import depth_from_sweep
from bokehdiff.stack_folder import write_stack_folder
from tests.tiny_depth import save_tiny_depth
from tests.tiny_depth_dsfa import save_tiny_dsfa
from tests.tiny_flux import tiny_kontext_components

HEIGHT, WIDTH = 64, 96
K = [6.0, 12.0]
NETWORK_FILES = ["depth.npy", "depth.png", "depth_color.png", "disparity.npy", "summary.json"]
SWEEP_FILES = sorted([*NETWORK_FILES, "confidence.png"])


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@functools.cache
def scene() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Photo, disparity and stack of a textured plane from 1.25 to 2.5 m, focused at 1 m."""
    generator = torch.Generator().manual_seed(0)
    photo = torch.rand(1, 3, HEIGHT, WIDTH, generator=generator) * 0.8 + 0.1
    disparity = torch.linspace(0.8, 0.4, WIDTH).expand(1, 1, HEIGHT, WIDTH)
    frames = [render_bokeh(photo, disparity, 1.0, k, metric=True) for k in K]
    return photo, disparity, torch.cat(frames)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `dsfa`, `plain` and `flux` (with its adapter) in one."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_dsfa(folder / "dsfa")
    save_tiny_depth(folder / "plain", "metric")
    generator = torch.Generator().manual_seed(0)
    adapter = BokehAdapter(2, 2, width=32, context_width=8, rank=4, alpha=4.0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    pipe = BokehStackPipeline(**tiny_kontext_components(folder), bokeh_adapter=adapter.eval())
    pipe.save_pretrained(folder / "flux")
    return folder


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """photo.png, k6.png, k12.png, and the same as a stack folder `stack`."""
    photo, _, frames = scene()
    write_image(tmp_path / "photo.png", photo)
    for k, frame in zip(K, frames, strict=True):
        write_image(tmp_path / f"k{k:g}.png", frame)
    write_stack_folder(tmp_path / "stack", photo, frames, K, df=1.0)
    return tmp_path


def given(folder: Path) -> list[object]:
    """The arguments that name photo, frames and their strengths."""
    frames = [part for k in K for part in ("--stack", folder / f"k{k:g}.png")]
    return ["depth", folder / "photo.png", "--from-bokeh", *frames, "--K", "6,12"]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_help_shows_examples():
    assert (
        "bokehdiff depth photo.jpg --from-bokeh --stack STACK_FOLDER" in run("depth", "-h").output
    )


def test_a_process_of_its_own_measures_a_stack(work):
    """As a person does it: relative names, no weights, no network."""
    result = subprocess.run(
        [
            *(sys.executable, "-m", "bokehdiff", "depth", "photo.png", "--from-bokeh"),
            *("--stack", "k6.png", "--stack", "k12.png", "--K", "6,12", "--focus-distance", "1"),
            *("-o", "results/depth", "--device", "cpu"),
        ],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("results/depth (sweep, depth 1.")
    folder = work / "results" / "depth"
    assert names(folder) == SWEEP_FILES and names(work / "results") == ["depth"]

    depth, disparity = np.load(folder / "depth.npy"), np.load(folder / "disparity.npy")
    assert depth.dtype == disparity.dtype == np.float32
    assert depth.shape == disparity.shape == (HEIGHT, WIDTH)
    truth = 1 / scene()[1][0, 0].numpy()
    assert np.median(np.abs(depth / truth - 1)) < 0.05  # as of depth_from_sweep
    np.testing.assert_allclose(disparity, depth_to_disparity(depth), rtol=1e-6)
    with Image.open(folder / "depth.png") as picture:
        assert picture.mode == "I;16" and picture.text == {"unit": "0.001 m"}
        np.testing.assert_allclose(np.asarray(picture) / 1000, depth, atol=0.51e-3)
    with Image.open(folder / "depth_color.png") as picture:
        assert picture.mode == "RGB" and picture.size == (WIDTH, HEIGHT)
    with Image.open(folder / "confidence.png") as picture:
        assert picture.mode == "I;16" and np.asarray(picture).max() > 32768

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["method"] == "sweep" and summary["side"] == "farther"
    assert summary["photo"] == "../../photo.png" and summary["size"] == [WIDTH, HEIGHT]
    assert summary["stack"] == ["../../k6.png", "../../k12.png"]
    assert summary["k"] == K and summary["focus_distance_m"] == 1
    assert summary["depth_png_unit"] == "0.001 m" and sorted(summary["files"]) == SWEEP_FILES[:-1]
    assert summary["depth_m"]["nearest"] == pytest.approx(depth.min())
    assert torch.__version__.startswith(summary["versions"]["torch"])
    assert summary["arguments"]["strengths"] == "6,12"
    assert summary["arguments"]["stack"] == ["../../k6.png", "../../k12.png"]
    assert summary["arguments"]["output"] == "."
    assert str(work) not in json.dumps(summary)


def test_render_takes_the_disparity(work):
    assert run(*given(work), "--focus-distance", 1, "-o", work / "depth").exit_code == 0
    result = run(
        "render", work / "photo.png", "--disparity", work / "depth" / "disparity.npy", "--metric",
        "--df", 1, "--K", 12, "--method", "layered", "-o", work / "again.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    # The disparity that explains the frame renders it: grain of +-0.4 is blurred to a few levels.
    difference = read_image(work / "again.png") - read_image(work / "k12.png")
    assert float(difference.abs().mean()) < 0.01


def test_a_folder_says_strengths_and_focus(work):
    """And may lie anywhere, as its names are relative."""
    shutil.move(work / "stack", work / "moved")
    command = ["depth", work / "photo.png", "--from-bokeh", "--stack", work / "moved"]
    result = run(*command, "-o", work / "out")
    assert result.exit_code == 0, result.output
    wanted = depth_from_sweep(
        work / "photo.png", [work / "k6.png", work / "k12.png"], K, 1.0, output_type="np"
    )
    assert np.array_equal(np.load(work / "out" / "depth.npy"), wanted.depth[0])
    summary = json.loads((work / "out" / "summary.json").read_text())
    assert summary["k"] == K and summary["stack"] == ["../moved"]


def test_a_focal_stack_and_infinity(work):
    photo, disparity, _ = scene()
    for name, metres in (("near", 1.0), ("far", math.inf)):
        frame = render_bokeh(photo, disparity, 1 / metres, 8, metric=True)
        write_image(work / f"{name}.png", frame)
    result = run(
        "depth", work / "photo.png", "--from-bokeh", "--stack", work / "near.png", "--stack",
        work / "far.png", "--K", "8,8", "--focus-distance", "1,inf", "-o", work / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    summary = json.loads((work / "out" / "summary.json").read_text())
    assert summary["focus_distance_m"] == [1.0, "infinity"] and summary["side"] == "both"
    depth = np.load(work / "out" / "depth.npy")
    assert np.median(np.abs(depth * disparity[0, 0].numpy() - 1)) < 0.05


def test_a_network_sees_the_stack(work, models):
    out = work / "out"
    result = run(*given(work), "--model", models / "dsfa", "-o", out, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert names(out) == NETWORK_FILES and "(network, depth " in result.stdout
    pipe = DepthFromBokehPipeline.from_pretrained(models / "dsfa")
    wanted = pipe(work / "photo.png", [work / "k6.png", work / "k12.png"], K)
    assert np.array_equal(np.load(out / "depth.npy"), wanted.depth[0, 0].numpy())
    summary = json.loads((out / "summary.json").read_text())
    assert summary["method"] == "network" and summary["seed"] is None
    assert summary["network"]["k"] == wanted.network_K[0].tolist()
    assert summary["network"]["size"] == list(wanted.network_size)[::-1]
    assert (out / summary["arguments"]["model"]).samefile(models / "dsfa")
    assert not Path(summary["arguments"]["model"]).is_absolute()


@pytest.mark.parametrize("source", ["layered", TINY])
def test_a_stack_rendered_from_the_estimate(work, models, source):
    how = ["--stack-model" if source == TINY else "--stack-method", source]
    result = run(
        "depth", work / "photo.png", "--from-bokeh", "--model", models / "dsfa", "--K", "4,8",
        *how, "--focus-distance", 2, "--iterations", 2, "-o", work / "out", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    summary = json.loads((work / "out" / "summary.json").read_text())
    assert len(summary["changes"]) == 2 and summary["changes"][0] > 0
    assert summary["stack"] is None and summary["focus_distance_m"] == 2
    assert summary["arguments"]["iterations"] == 2


@pytest.mark.slow
def test_a_painted_stack(work, models):
    """By a tiny FLUX.1-Kontext with all its steps, so of a small picture."""
    write_image(work / "small.png", scene()[0][..., :32, :32])
    result = run(
        "depth", work / "small.png", "--from-bokeh", "--model", models / "dsfa", "--K", "10,20",
        "--stack-model", models / "flux", "--seed", 5, "-o", work / "out", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    painter = BokehStackPipeline.from_pretrained(models / "flux")
    painter.set_progress_bar_config(disable=True)
    wanted = DepthFromBokehPipeline.from_pretrained(models / "dsfa")(
        work / "small.png",
        K=[10, 20],
        stack_from=painter,
        generator=torch.Generator().manual_seed(5),
    )
    assert np.array_equal(np.load(work / "out" / "depth.npy"), wanted.depth[0, 0].numpy())
    assert json.loads((work / "out" / "summary.json").read_text())["seed"] == 5


def test_nothing_is_overwritten_unasked(work, models):
    out = work / "out"
    out.mkdir()
    (out / "depth.npy").write_bytes(b"mine")
    (out / "notes.txt").write_text("keep")
    command = [*given(work), "-o", out]
    result = run(*command, "--focus-distance", 1)
    assert result.exit_code == 1 and "depth.npy exists already; nothing was" in result.stderr
    assert names(out) == ["depth.npy", "notes.txt"]
    assert (out / "depth.npy").read_bytes() == b"mine"
    assert run(*command, "--focus-distance", 1, "--force").exit_code == 0
    assert names(out) == sorted([*SWEEP_FILES, "notes.txt"])
    # A confidence that belongs to another depth would mislead.
    assert run(*command, "--model", models / "dsfa", "--force").exit_code == 0
    assert names(out) == sorted([*NETWORK_FILES, "notes.txt"])
    assert (out / "notes.txt").read_text() == "keep"


def test_a_folder_may_have_a_dot_in_its_name(work):
    assert run(*given(work), "--focus-distance", 1, "-o", work / "v1.2").exit_code == 0
    assert names(work / "v1.2") == SWEEP_FILES


def test_a_failure_leaves_nothing(work):
    Image.new("RGB", (WIDTH, HEIGHT), (9, 9, 9)).save(work / "blank.png")
    result = run(
        "depth", work / "blank.png", "--from-bokeh", "--stack", work / "blank.png", "--K", 9,
        "--focus-distance", 1, "-o", work / "out",
    )  # fmt: skip
    assert result.exit_code == 1 and "Nothing could be measured" in result.stderr
    assert not (work / "out").exists()
    assert not [name for name in names(work) if name.endswith("unfinished")]


def test_what_was_given_is_not_written_over(work):
    command = ["depth", work / "photo.png", "--from-bokeh", "--stack", work / "stack", "--force"]
    before = {file: file.read_bytes() for file in (work / "stack").iterdir()}
    result = run(*command, "-o", work / "stack")
    assert result.exit_code == 1 and "is the folder of the stack" in result.stderr
    assert {file: file.read_bytes() for file in (work / "stack").iterdir()} == before
    (work / "out").mkdir()
    shutil.copy(work / "photo.png", work / "out" / "depth.png")
    result = run(
        "depth", work / "out" / "depth.png", "--from-bokeh", "--stack", work / "k6.png", "--K", 6,
        "--focus-distance", 1, "-o", work / "out", "--force",
    )  # fmt: skip
    assert result.exit_code == 1 and "depth.png would be written over" in result.stderr


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("--stack k6.png --focus-distance 1", "--K is missing"),
        ("--stack k6.png --K 6,12 --focus-distance 1", "2 strengths K for 1 frames"),
        ("--stack k6.png --K six --focus-distance 1", "--K is 'six'; wanted numbers"),
        ("--stack k6.png --K nan --focus-distance 1", "K is [nan]"),
        ("--stack k6.png --K -6 --focus-distance 1", "K is [-6.0]"),
        ("--stack k6.png --K 6", "--focus-distance is missing; wanted the metres"),
        ("--stack k6.png --K 6 --focus-distance 0", "above 0"),
        ("--stack k6.png --K 6 --focus-distance 1,2", "2 numbers for 1 frames"),
        ("--stack k6.png --K 6 --focus-distance 1 --side both", "does not tell nearer"),
        ("--stack small.png --K 6 --focus-distance 1", "small.png is 20 x 10 pixels"),
        ("--stack none.png --K 6 --focus-distance 1", "none.png does not exist"),
        ("--stack stack --K 6", "which the folder stack says itself"),
        ("--stack stack --stack k6.png --K 6", "either one folder or the pictures"),
        ("--K 6", "none of them was given"),
        ("--stack k6.png --stack-method layered --K 6", "--stack and --stack-method were given"),
        ("--stack-method layered --K 6", "--stack-method makes a stack for a depth network"),
        ("--stack k6.png --K 6 --seed 1", "--seed goes with --stack-model"),
        ("--stack k6.png --K 6 --stack-weights x", "--stack-weights goes with --stack-model"),
        ("--stack k6.png --K 6 --focus-distance 1 --iterations 2", "--iterations goes with"),
        ("--stack k6.png --K 6 --model MODELS/dsfa --side nearer", "--side is for a stack without"),
        ("--stack k6.png --K 6 --model MODELS/plain", "which sees no stack"),
        ("--stack k6.png --K 6 --model MODELS/dsfa --focus-distance 1", "is not told at which"),
        ("--stack-method layered --K 6 --model MODELS/dsfa", "focus_distance_m is missing"),
        ("--stack-model stack --K 6 --model MODELS/dsfa", "holds no pipeline"),
        ("other.png --stack k6.png --K 6 --focus-distance 1", "takes one at a time"),
    ],
)
def test_mistakes(work, models, monkeypatch, arguments, sentence):
    monkeypatch.chdir(work)
    Image.new("RGB", (20, 10)).save("small.png")
    words = arguments.replace("MODELS", str(models)).split()
    result = run("depth", "photo.png", *words, "--from-bokeh", "-o", "out", "--device", "cpu")
    assert result.exit_code == 1 and sentence in result.stderr, result.output
    assert result.stderr.count("\n") == 1 and result.stdout == ""
    assert not (work / "out").exists()


@pytest.mark.parametrize("output", ["out.png", "photo.png", "k6.png"])
def test_the_result_is_a_folder(work, output):
    result = run(*given(work), "--focus-distance", 1, "-o", work / output, "--force")
    assert result.exit_code == 1 and "wanted a folder, for instance -o" in result.stderr


@pytest.mark.parametrize("option", ["--stack k6.png", "--K 6", "--focus-distance 1", "--seed 1"])
def test_options_that_go_with_from_bokeh(work, option):
    result = run("depth", work / "photo.png", *option.split(), "-o", work / "out.png")
    assert result.exit_code == 1 and f"{option.split()[0]} goes with --from-bokeh" in result.stderr

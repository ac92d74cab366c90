"""`bokehdiff export`, with tiny real networks and files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner

from bokehdiff.cli import app
from bokehdiff.models.bokehflow import BokehFlowModel
from tests.tiny_flow import tiny_flow
from tests.tiny_litebokeh import tiny_unet


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def small_flow() -> BokehFlowModel:
    """A network that is traced in some seconds."""
    return tiny_flow(blocks=1, fusion_every=1)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    small_flow().save_pretrained(folder)
    return folder


def test_help_shows_examples():
    assert "bokehdiff export flow -o flow.onnx" in run("export", "flow", "--help").output
    assert "flow" in run("export", "--help").output
    words = run("export", "compact", "--help").output
    assert "bokehdiff export compact -o compact.tflite --size 1536x1024" in words


@pytest.mark.slow
def test_photos_of_any_size(tmp_path, network):
    file = tmp_path / "flow.onnx"
    result = run("export", "flow", network, "-o", file, "--widest", 32)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{file} (0.") and " MB, as the network to " in result.stdout

    # As a program that knows nothing of bokehdiff.
    session = onnxruntime.InferenceSession(str(file))
    assert "display-encoded sRGB" in session.get_modelmeta().custom_metadata_map["image"]
    model = small_flow()
    for height, width in ((64, 96), (128, 72), (67, 131), (256, 256)):
        image = np.random.default_rng(height).random((2, 3, height, width), np.float32)
        camera = np.array([[2, 50, 2, 36, 24], [1.4, 85, 1.5, 36, 32]], np.float32)
        bokeh, coc, inverse_depth = session.run(None, {"image": image, "camera": camera})
        f_number, focal_length, focus, sensor, photo_width = torch.from_numpy(camera).unbind(1)
        with torch.no_grad():
            wanted = model(
                torch.from_numpy(image),
                *(f_number, focal_length, focus, sensor),
                photo_width_px=photo_width,
            )
        np.testing.assert_allclose(bokeh, wanted.bokeh, atol=1e-4, rtol=0)
        np.testing.assert_allclose(inverse_depth, wanted.inverse_depth, atol=1e-4, rtol=0)
        np.testing.assert_allclose(coc, wanted.coc, atol=1e-4, rtol=0)
    again = run("export", "flow", network, "-o", file)
    assert again.exit_code == 1 and "exists already" in again.stderr


def test_mistakes_in_one_sentence(tmp_path, network):
    for output, sentence in (("flow.tflite", "wanted one of .onnx"), ("no/f.onnx", "create it")):
        result = run("export", "flow", network, "-o", tmp_path / output)
        assert result.exit_code == 1 and sentence in result.stderr
    result = run("export", "flow", tmp_path / "nothing", "-o", tmp_path / "flow.onnx")
    assert result.exit_code == 1 and "There is no folder" in result.stderr


@pytest.mark.slow
def test_films_by_the_installed_command(tmp_path, network):
    file = tmp_path / "film.onnx"
    result = subprocess.run(
        [sys.executable, "-m", "bokehdiff", "export", "flow", str(network), "-o", str(file),
         "--video", "--given-depth", "--fp16", "--widest", "32"],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    session = onnxruntime.InferenceSession(str(file))
    kinds = {value.name: value.type for value in session.get_inputs()}
    assert list(kinds)[:3] == ["image", "camera", "inverse_depth"] and "last_lens" in kinds
    halved = {name for name, kind in kinds.items() if kind == "tensor(float16)"}
    assert halved == {"last_depth_features", "last_bokeh_features"}
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["precision"] == "float16"
    differences = json.loads(metadata["largest_differences"])
    assert set(differences) == {"bokeh", "coc"}
    assert 1e-6 < differences["bokeh"] < 2e-2


def test_compact_takes_photos_of_any_size(tmp_path):
    tiny_unet().save_pretrained(tmp_path / "network")
    file = tmp_path / "compact.onnx"
    words = ["export", "compact", tmp_path / "network", "-o", file, "--no-enhancement"]
    result = run(*words, "--format", "onnx")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{file} (0.04 MB, as the network to ")

    # As a program that knows nothing of bokehdiff.
    session = onnxruntime.InferenceSession(str(file))
    assert "display-encoded sRGB" in session.get_modelmeta().custom_metadata_map["image"]
    for height, width in ((64, 96), (67, 131)):
        image = np.random.default_rng(height).random((2, 3, height, width), np.float32)
        (bokeh,) = session.run(None, {"image": image})
        with torch.no_grad():
            wanted = tiny_unet()(torch.from_numpy(image), enhance=False).bokeh
        np.testing.assert_allclose(bokeh, wanted, atol=1e-5, rtol=0)
    again = run(*words)
    assert again.exit_code == 1 and "exists already" in again.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("-o a.onnx --format tflite", "--format is tflite, but a.onnx is to be written"),
        ("-o a.tflite --format onnx", "wanted a name that ends in .onnx, or no --format"),
        ("-o a.onnx --format coreml", "--format is 'coreml'; wanted onnx or tflite"),
        ("-o a.tflite --fp16 --int8", "--fp16 and --int8 were given; wanted one of them"),
        ("-o a.tflite --size 1536", "--size is '1536'; wanted WIDTHxHEIGHT"),
        ("-o a.tflite", "made for one size of photo; wanted its width and height"),
        ("-o a.tflite --size 1500x1000", "1500x1000; wanted multiples of 8"),
        ("-o a.onnx --size 64x64", "an ONNX file takes photos of any size"),
        ("-o a.onnx --int8", "int8 was asked for, which is for TFLite files"),
        ("-o a.pt", "wanted one of .onnx, .tflite"),
        ("-o a.onnx no/such/folder", "There is no folder 'no/such/folder'"),
    ],
)
def test_mistakes_about_compact_files(words, sentence):
    result = run("export", "compact", *words.split())
    assert result.exit_code == 1 and sentence in result.stderr
    assert not Path("a.onnx").exists() and not Path("a.tflite").exists()

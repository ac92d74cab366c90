"""`bokehdiff compact`, with a tiny real network and files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from bokehdiff.cli import app
from bokehdiff.pipelines.litebokeh import LiteBokehPipeline
from tests.tiny_litebokeh import tiny_unet
from tests.tiny_models import photo_and_disparity

PHOTO, _ = photo_and_disparity(40, 57)


def run(*arguments: object):
    return CliRunner().invoke(app, ["compact", *map(str, arguments), "--device", "cpu"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    LiteBokehPipeline(tiny_unet()).save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    file = tmp_path / "photo.png"
    Image.fromarray(PHOTO).save(file)
    return file


@pytest.mark.parametrize(("flags", "enhance"), [((), True), (("--no-enhancement",), False)])
def test_the_file_holds_the_picture_of_the_pipeline(model, photo, flags, enhance):
    target = photo.with_name("blurred.png")
    result = run(photo, "-o", target, "--model", model, *flags)
    assert result.exit_code == 0, result.output
    (wanted,) = LiteBokehPipeline.from_pretrained(model)(PHOTO, enhance=enhance).images
    with Image.open(target) as written:
        assert np.array_equal(np.asarray(written), np.asarray(wanted))


def test_a_folder_of_results_past_a_broken_photo(model, photo, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    other = tmp_path / "other.jpg"
    Image.fromarray(PHOTO).save(other)
    result = run(photo, broken, other, "-o", tmp_path / "blurred", "--model", model)
    assert result.exit_code == 1 and "broken.jpg" in result.output
    assert sorted(path.name for path in (tmp_path / "blurred").iterdir()) == [
        "other.jpg",
        "photo.png",
    ]


def test_nothing_is_overwritten_unasked(model, photo):
    before = photo.read_bytes()
    result = run(photo, "-o", photo, "--model", model, "--force")
    assert result.exit_code == 1 and "is the photograph itself" in result.output
    target = photo.with_name("there.png")
    target.write_bytes(b"mine")
    result = run(photo, "-o", target, "--model", model)
    assert result.exit_code == 1 and "exists already" in result.output
    assert target.read_bytes() == b"mine" and photo.read_bytes() == before


def test_a_lens_is_no_option(model, photo):
    result = run(photo, "-o", photo.with_name("out.png"), "--model", model, "--K", 20)
    assert result.exit_code == 2 and "--K" in result.output

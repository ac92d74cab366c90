"""Reading folders of cut-outs and photographs, and making them from nothing."""

from __future__ import annotations

import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_synthesis.cutouts import (
    PictureFolders,
    SourceFileWarning,
    procedural_background,
    procedural_cutout,
)


def save_cutout(path: Path, colour: tuple[int, int, int], side: int = 32) -> None:
    pixels = np.zeros((side, side, 4), np.uint8)
    pixels[..., :3] = colour
    pixels[4:-4, 6:-6, 3] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def cutouts(tmp_path: Path) -> Path:
    folder = tmp_path / "cutouts"
    save_cutout(folder / "b.png", (0, 0, 255))
    save_cutout(folder / "animals" / "a.webp", (255, 0, 0))
    save_cutout(folder / "c.png", (0, 255, 0))
    return folder


def test_pictures_come_in_the_order_of_their_names(cutouts: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures = PictureFolders(cutouts, "cutout")
    names = [pictures.provenance(index)["file"] for index in range(len(pictures))]
    assert names == ["animals/a.webp", "b.png", "c.png"]
    assert pictures[1].mode == "RGBA"
    assert pictures[1].getpixel((16, 16)) == (0, 0, 255, 255)
    assert pictures.problems == []


def test_unusable_files_are_named_with_their_reason(cutouts: Path) -> None:
    whole = (cutouts / "b.png").read_bytes()
    (cutouts / "cut_short.png").write_bytes(whole[: len(whole) // 2])
    (cutouts / "no_picture.png").write_text("hello")
    Image.new("RGB", (32, 32)).save(cutouts / "photo.jpg")
    Image.new("RGBA", (32, 32), (1, 2, 3, 255)).save(cutouts / "opaque.png")
    Image.new("RGBA", (32, 32), (1, 2, 3, 0)).save(cutouts / "empty.png")
    save_cutout(cutouts / "tiny.png", (0, 0, 0), side=15)
    (cutouts / "notes.txt").write_text("not a picture, so no problem")
    with pytest.warns(SourceFileWarning, match="6 of 9 files") as caught:
        pictures = PictureFolders(cutouts, "cutout")
    assert len(pictures) == 3
    assert len(pictures.problems) == 6
    for name, reason in (
        ("cut_short.png", ""),
        ("no_picture.png", "cannot identify"),
        ("photo.jpg", "no alpha channel"),
        ("opaque.png", "opaque everywhere"),
        ("empty.png", "transparent everywhere"),
        ("tiny.png", "15 x 15"),
    ):
        (problem,) = [problem for problem in pictures.problems if name in problem]
        assert reason in problem
        assert name in str(caught[0].message)


def test_a_damaged_photograph_is_left_out(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut_short.jpg").write_bytes(data[: len(data) // 2])
    with pytest.warns(SourceFileWarning, match=r"cut_short\.jpg"):
        pictures = PictureFolders(tmp_path, "background")
    assert len(pictures) == 1
    assert pictures[0].mode == "RGB"


def test_nothing_usable_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no folder"):
        PictureFolders(tmp_path / "missing", "cutout")
    with pytest.raises(ValueError, match="no usable cutout"):
        PictureFolders(tmp_path, "cutout")
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.jpg")
    with pytest.raises(ValueError, match=r"photo\.jpg: has no alpha"):
        PictureFolders(tmp_path, "cutout")


def test_fingerprint_tells_contents_and_not_places(cutouts: Path, tmp_path: Path) -> None:
    fingerprint = PictureFolders(cutouts, "cutout").fingerprint
    copied = shutil.copytree(cutouts, tmp_path / "elsewhere")
    assert PictureFolders(copied, "cutout").fingerprint == fingerprint
    save_cutout(copied / "c.png", (0, 254, 0))
    assert PictureFolders(copied, "cutout").fingerprint != fingerprint


def test_a_file_that_changes_meanwhile_is_refused(cutouts: Path) -> None:
    pictures = PictureFolders(cutouts, "cutout")
    save_cutout(cutouts / "b.png", (9, 9, 9))
    with pytest.raises(ValueError, match=r"b\.png has changed"):
        pictures[1]


def test_memory_is_bounded_and_does_not_matter(cutouts: Path) -> None:
    """Room for one decoded picture: all come out right, in any order, and after pickling."""
    roomy = PictureFolders(cutouts, "cutout")
    small = PictureFolders(cutouts, "cutout", cache_bytes=32 * 32 * 4)
    copied = pickle.loads(pickle.dumps(small))
    for index in (0, 1, 0, 2, 2, 1, 0):
        expected = np.asarray(roomy[index])
        assert np.array_equal(np.asarray(small[index]), expected)
        assert np.array_equal(np.asarray(copied[index]), expected)
        assert len(small._cached) == 1
    assert len(roomy._cached) == 3


def test_procedural_pictures_follow_from_their_seed() -> None:
    for seed in range(6):
        cutout = procedural_cutout(seed, 64)
        assert cutout.mode == "RGBA" and max(cutout.size) == 64
        assert cutout.getchannel("A").getextrema()[1] > 0
        assert cutout.tobytes() == procedural_cutout(seed, 64).tobytes()
        background = procedural_background(seed, 65)
        assert background.mode == "RGB" and background.size == (65, 65)
        assert background.tobytes() == procedural_background(seed, 65).tobytes()
        assert np.asarray(background).std() > 1
    assert procedural_cutout(1, 64).tobytes() != procedural_cutout(2, 64).tobytes()

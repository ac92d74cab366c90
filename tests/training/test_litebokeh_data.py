"""Samples of LiteBokeh: crops of scenes and of pairs on disk, held-out photographs, mistakes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from bokehdiff.subject_weights import subject_share
from data_synthesis.layer_scenes import LayerScenes
from data_synthesis.writer import write_shards
from training.litebokeh_data import (
    SUBJECT_SCENES,
    PhotoCrops,
    PhotoPairs,
    held_out_sample,
    held_out_samples,
    open_scenes,
    training_crops,
)

CROP, HEIGHT, WIDTH = 24, 30, 40


def settings(**changes: Any) -> argparse.Namespace:
    """Those that the data see, of scenes made on the fly."""
    return argparse.Namespace(
        **{
            **{"data_kind": "scenes", "data_folder": None, "data_size": 40, "data_seed": 3},
            **{"data_options": {}, "data_crop_size": CROP, "seed": 7, "phase": "bokeh"},
            **{"data_noise": 1.0},
            **{"validation_folder": None, "validation_seed": 4, "validation_scenes": 2},
            **changes,
        }
    )


def photo(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def save(file: Path, pixels: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(file)


def ramp() -> np.ndarray:
    """(HEIGHT, WIDTH) float32 disparity from 2 on the left to 5 on the right."""
    return np.linspace(2, 5, WIDTH, dtype=np.float32)[None].repeat(HEIGHT, 0)


def write_pairs(folder: Path, original: str = "original") -> Path:
    """Two pairs; the first has a map. The target of each is its image, brighter on the right."""
    for number, name in enumerate(("first", "second")):
        pixels = photo(number)
        save(folder / original / f"{name}.png", pixels)
        changed = pixels.copy()
        changed[:, WIDTH // 2 :] //= 2
        save(folder / "bokeh" / f"{name}.png", changed)
    (folder / "depth").mkdir()
    np.save(folder / "depth" / "first_pred.npy", ramp())
    return folder


class Places:
    """One photo in which every pixel says where it is; what is left of column 12 is in focus."""

    def __init__(self) -> None:
        y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
        self.image = torch.stack([y / 64, x / 64, torch.zeros(HEIGHT, WIDTH)])
        in_focus = (x < 12)[None]
        # Beyond that there is half of the detail along the rows, and no edge where it begins.
        flatter = torch.stack([y / 64, (11 + (x - 11) / 2) / 64, torch.zeros(HEIGHT, WIDTH)])
        self.scene = {
            "image": self.image,
            "target": torch.where(in_focus, self.image, flatter),
            "disparity": torch.where(in_focus, 0.9, 0.1),
        }

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return dict(self.scene)


# -- Crops ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["bokeh", "enhancement"])
def test_samples_depend_on_their_number_alone(phase: str) -> None:
    crops = training_crops(settings(phase=phase))
    backwards = {number: crops[number] for number in (3, 1, 0)}
    again = training_crops(settings(phase=phase))
    for number in (0, 1, 3):
        sample = again[number]
        for name, value in sample.items():
            assert torch.equal(value, backwards[number][name]), name
            assert value.shape[-2:] == (CROP, CROP) and value.is_contiguous()
            assert 0 <= value.min() and value.max() <= 1
    other = training_crops(settings(phase=phase, seed=8))[0]
    assert not torch.equal(other["image"], backwards[0]["image"])
    assert not torch.equal(backwards[0]["image"], backwards[1]["image"])


def test_crops_keep_pictures_and_subject_together() -> None:
    """Also where the crop shows nothing of the subject: it is that of the whole photo."""
    places = Places()
    whole = subject_share(*(places.scene[name][None] for name in ("image", "target", "disparity")))
    crops = PhotoCrops(places, 1, CROP, 0, phase="bokeh")
    directions, corners, without_subject = set(), set(), 0
    for number in range(30):
        sample = crops[number]
        assert sample.keys() == {"image", "bokeh", "subject"}
        y, x = (sample["image"][:2] * 64).round().long()
        directions.add(int(x[0, 1] - x[0, 0]))
        assert (y[1:] > y[:-1]).all()  # never upside down
        corners.add((int(y.min()), int(x.min())))
        assert torch.equal(sample["bokeh"], places.scene["target"][:, y, x])
        assert torch.equal(sample["subject"], whole[0][:, y, x])
        shown = sample["subject"] > 0.5
        assert torch.equal(shown[0], x < 12)
        without_subject += not shown.any()
    assert directions == {-1, 1} and len(corners) > 20 and without_subject > 0
    assert {y for y, _ in corners} == set(range(HEIGHT - CROP + 1))


def test_a_pass_shows_every_scene_once(tmp_path: Path) -> None:
    pairs = PhotoPairs(write_pairs(tmp_path))
    crops = PhotoCrops(pairs, 2, HEIGHT, 0, phase="enhancement")
    for first in range(0, 8, 2):
        pictures = [crops[first + position]["image"].mean() for position in range(2)]
        assert abs(float(pictures[0] - pictures[1])) > 1e-4


def test_the_enhancement_learns_from_the_photograph_made_worse() -> None:
    crops = training_crops(settings(phase="enhancement"))
    same = training_crops(settings())
    changed = 0
    for number in range(6):
        sample = crops[number]
        assert sample.keys() == {"image", "degraded"}
        assert torch.equal(sample["image"], same[number]["image"])
        difference = (sample["image"] - sample["degraded"]).abs().mean()
        assert difference < 0.2
        changed += bool(difference > 1e-3)
    assert changed >= 4


@pytest.mark.parametrize("phase", ["bokeh", "enhancement"])
def test_crops_larger_than_the_photograph_are_refused(phase: str) -> None:
    crops = PhotoCrops(Places(), 1, 36, 0, phase=phase)
    with pytest.raises(ValueError, match="Crops of 36 pixels do not fit photographs of 30 x 40"):
        crops[0]


# -- Pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("original", ["original", "input"])
def test_pairs_are_what_the_files_hold(tmp_path: Path, original: str) -> None:
    pairs = PhotoPairs(write_pairs(tmp_path, original))
    assert len(pairs) == 2
    for number, pair in enumerate((pairs[0], pairs[1])):
        pixels = torch.from_numpy(photo(number)).permute(2, 0, 1)
        assert torch.equal((pair["image"] * 255).round().to(torch.uint8), pixels)
        pixels[..., WIDTH // 2 :] //= 2
        assert torch.equal((pair["target"] * 255).round().to(torch.uint8), pixels)
    assert torch.allclose(pairs[0]["disparity"], torch.linspace(0, 1, WIDTH), atol=0.04)
    assert pairs[1]["disparity"].isnan().all()
    subject = PhotoCrops(pairs, 2, CROP, 0, phase="bokeh")
    shares = sorted(float(subject[number]["subject"].max()) for number in range(2))
    assert shares[0] == 0 < shares[1]


def test_maps_in_which_smaller_is_nearer_are_turned_round(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path)
    before = PhotoPairs(folder)[0]["disparity"]
    (folder / "depth" / "convention.json").write_text(json.dumps({"nearest": 0}))
    after = PhotoPairs(folder)[0]["disparity"]
    assert torch.allclose(after, 1 - before, atol=0.06)
    (folder / "depth" / "convention.json").write_text(json.dumps({"nearest": 2}))
    with pytest.raises(ValueError, match="says that the nearest is 2"):
        PhotoPairs(folder)


def test_pairs_do_without_maps(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path)
    (folder / "depth" / "first_pred.npy").unlink()
    (folder / "depth").rmdir()
    assert PhotoPairs(folder)[0]["disparity"].isnan().all()


def test_pairs_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no folder original/; wanted original/NAME.jpg"):
        PhotoPairs(tmp_path / "none")
    folder = write_pairs(tmp_path / "pairs")
    save(folder / "bokeh" / "third.png", photo(3))
    with pytest.raises(ValueError, match=r"third\.png has no partner in .*original; wanted"):
        PhotoPairs(folder)
    (folder / "bokeh" / "third.png").unlink()
    (folder / "bokeh" / "first.png").unlink()
    with pytest.raises(ValueError, match=r"first\.png has no partner in .*bokeh; wanted"):
        PhotoPairs(folder)
    (folder / "input").mkdir()
    with pytest.raises(ValueError, match="has both original/ and input/"):
        PhotoPairs(folder)
    (tmp_path / "empty" / "original").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no pairs"):
        PhotoPairs(tmp_path / "empty")


def test_pairs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path)
    np.save(folder / "depth" / "first_pred.npy", ramp()[1:])
    with pytest.raises(ValueError, match=r"first_pred\.npy is 40 x 29 pixels and .* 40 x 30"):
        PhotoPairs(folder)[0]
    save(folder / "bokeh" / "second.png", photo(1)[:, 1:])
    with pytest.raises(ValueError, match=r"bokeh.second\.png is 39 x 30 pixels and .* 40 x 30"):
        PhotoPairs(folder)[1]
    (folder / "original" / "second.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"second\.png cannot be read as a picture"):
        PhotoPairs(folder)[1]


# -- Opening -------------------------------------------------------------------------------------


def test_scenes_have_a_subject_in_focus_unless_options_say_otherwise() -> None:
    scenes, endless = open_scenes(None, 5, settings())
    assert endless is None
    assert (
        scenes.settings
        == LayerScenes(5, 40, focus={"foreground": 1}, stopped_down=1.8 / 16).settings
    )
    options = {"stopped_down": 0.0, "radius": [2, 2]}
    chosen, _ = open_scenes(None, 5, settings(data_options=options))
    assert chosen.settings == LayerScenes(5, 40, focus={"foreground": 1}, radius=(2, 2)).settings
    with pytest.raises(ValueError, match="data.options do not fit LayerScenes"):
        open_scenes(None, 5, settings(data_options={"nose": 1}))


def test_stored_scenes_are_those_on_the_fly(tmp_path: Path) -> None:
    scenes = LayerScenes(3, 40, **SUBJECT_SCENES)
    write_shards(scenes, tmp_path / "scenes", count=2)
    stored, count = open_scenes(str(tmp_path / "scenes"), 0, settings())
    made, _ = open_scenes(None, 3, settings())
    assert count == 2
    for name, value in stored[1].items():
        assert torch.equal(value, made[1][name]), name
    folder = str(tmp_path / "scenes")
    assert len(held_out_samples(settings(validation_folder=folder, validation_scenes=5))) == 2
    assert training_crops(settings(data_folder=folder))[0]["image"].shape == (3, CROP, CROP)


def test_held_out_scenes_are_whole_and_say_what_is_in_focus() -> None:
    samples = held_out_samples(settings())
    assert len(samples) == 2
    for number, sample in enumerate(samples):
        scene = LayerScenes(4, 40, **SUBJECT_SCENES)[number]
        assert torch.equal(sample["image"], scene["image"])
        assert torch.equal(sample["bokeh"], scene["target"])
        assert sample["in_focus"].dtype == torch.bool and sample["in_focus"].shape == (1, 40, 40)
    scene = {
        "image": torch.zeros(3, 1, 3), "target": torch.ones(3, 1, 3), "df": torch.tensor(0.5),
        "K": torch.tensor(10.0), "disparity": torch.tensor([[[0.44, 0.46, 0.56]]]),
    }  # fmt: skip
    assert held_out_sample(scene)["in_focus"].tolist() == [[[False, True, False]]]


def test_held_out_pairs_do_not_say_what_is_in_focus(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path)
    samples = held_out_samples(settings(data_kind="pairs", validation_folder=str(folder)))
    assert len(samples) == 2
    assert all(sample.keys() == {"image", "bokeh"} for sample in samples)
    assert samples[1]["image"].shape == (3, HEIGHT, WIDTH)

"""Samples of BokehFlow: what photographs, clips and pairs become, crops, manifests."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from bokehdiff.optics import strength_from_camera
from bokehdiff.warping import warp
from data_synthesis.clip_files import write_clips
from data_synthesis.clip_scenes import ClipScenes
from data_synthesis.procedural import ProceduralScenes
from tests.training.bokehflow_runs import LINE, WIDTH, write_pairs
from training.bokehflow_data import (
    FlowCrops,
    PhotoPairs,
    clip_sample,
    held_out_samples,
    open_scenes,
    pair_sample,
    still_sample,
    training_crops,
)

CROP = 24


def settings(**changes: Any) -> argparse.Namespace:
    """Those that the data see, of stills made on the fly."""
    return argparse.Namespace(
        **{
            **{"data_kind": "stills", "data_folder": None, "data_size": 32, "data_seed": 3},
            **{"data_options": {}, "data_crop_size": CROP, "data_true_depth_share": 0.5, "seed": 7},
            **{"validation_folder": None, "validation_seed": 4, "validation_scenes": 2},
            **changes,
        }
    )


@pytest.fixture(scope="module")
def still() -> dict[str, torch.Tensor]:
    return ProceduralScenes(3, 32)[0]


@pytest.fixture(scope="module")
def pan() -> ClipScenes:
    """Clips without noise in which everything moves alike; clip 3 by whole pixels."""
    return ClipScenes(3, 48, motions=("pan",), noise=(0.0, 0.0))


# -- Photographs and clips -----------------------------------------------------------------------


def test_photographs_keep_every_radius_in_metres(still: dict[str, torch.Tensor]) -> None:
    sample = still_sample(still, None)
    radius = still["K"] * (still["disparity"] - still["df"])
    assert torch.allclose(
        sample["K"] * (sample["inverse_depth"][0] - sample["df"]), radius, atol=1e-4
    )
    assert 0.1 <= sample["inverse_depth"].min() and sample["inverse_depth"].max() <= 1
    assert torch.equal(sample["frames"][0], still["image"]) and sample["frames"].ndim == 4
    assert sample["photo_width_px"] == 1280 and sample["metric"]


def test_photo_widths_are_log_uniform(still: dict[str, torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    widths = torch.stack(
        [still_sample(still, generator)["photo_width_px"] for _ in range(400)]
    ).log()
    low, high = math.log(384), math.log(1920)
    assert low <= widths.min() and widths.max() <= high
    assert float(widths.mean()) == pytest.approx((low + high) / 2, abs=0.08)
    assert float(widths.std()) == pytest.approx((high - low) / math.sqrt(12), abs=0.05)


def test_clips_have_the_lens_of_their_camera(pan: ClipScenes) -> None:
    clip = pan[3]
    sample = clip_sample(clip, None)
    camera = [float(value) for value in sample["camera"]]
    assert camera == [
        float(clip[name])
        for name in ("f_number", "focal_length_mm", "focus_distance_m", "sensor_width_mm")
    ]
    expected = strength_from_camera(*camera, float(clip["photo_width_px"]))
    assert float(sample["K"]) == pytest.approx(expected, rel=1e-5)
    assert float(sample["df"]) == pytest.approx(1 / camera[2], rel=1e-6)


# -- Crops ---------------------------------------------------------------------------------------


def test_samples_depend_on_their_number_alone() -> None:
    crops = training_crops(settings())
    backwards = {number: crops[number] for number in (5, 2, 0)}
    again = training_crops(settings())
    for number in (0, 2, 5):
        sample = again[number]
        assert sample.keys() == backwards[number].keys()
        for name, value in sample.items():
            assert torch.equal(value, backwards[number][name]), name
    other = training_crops(settings(seed=8))[0]
    assert not torch.equal(other["frames"], backwards[0]["frames"])


def test_mirrored_clips_still_move_as_they_say(pan: ClipScenes) -> None:
    crops = FlowCrops(
        *(_Only(pan[3]), 1, CROP, 0),
        **{"as_sample": clip_sample, "given_share": 1.0, "turned": False},
    )
    uncropped, signs = pan[3]["motion"][1, 0], set()
    for number in range(8):
        sample = crops[number]
        assert sample["frames"].shape == (4, 3, CROP, CROP)
        signs.add(float(sample["motion"][1, 0].mean().sign()))
        shown = sample["visible"][1:] > 0
        # What was beyond the crop is visible in the film, and cannot be compared within the crop.
        inside = shown[..., 4:-4, 4:-4]
        change = (sample["frames"][1:] - warp(sample["frames"][:-1], sample["motion"][1:])).abs()
        assert change[..., 4:-4, 4:-4][inside.expand(-1, 3, -1, -1)].max() < 1e-5
    assert uncropped.abs().min() > 0 and signs == {-1.0, 1.0}


def test_depth_is_given_to_the_share_of_the_samples_that_is_asked_for(
    still: dict[str, torch.Tensor],
) -> None:
    for share, low, high in ((0.0, 0, 0), (0.75, 120, 180), (1.0, 200, 200)):
        crops = FlowCrops(
            *(_Only(still), 1, CROP, 0),
            **{"as_sample": still_sample, "given_share": share, "turned": True},
        )
        count = sum(bool(crops[number]["gives_depth"]) for number in range(200))
        assert low <= count <= high


def test_crops_larger_than_the_picture_are_refused(still: dict[str, torch.Tensor]) -> None:
    crops = FlowCrops(
        *(_Only(still), 1, 40, 0),
        **{"as_sample": still_sample, "given_share": 1.0, "turned": True},
    )
    with pytest.raises(ValueError, match="Crops of 40 pixels do not fit pictures of 32 x 32"):
        crops[0]


class _Only:
    """One scene, whatever the index."""

    def __init__(self, scene: dict[str, torch.Tensor]) -> None:
        self.scene = scene

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return dict(self.scene)


# -- Pairs ---------------------------------------------------------------------------------------


def test_pairs_are_read_with_the_lens_of_the_whole_photo(tmp_path: Path) -> None:
    depth = {**LINE, "depth": "depth.npy", "sensor_width_mm": 23.5}
    pairs = PhotoPairs(write_pairs(tmp_path, LINE, depth, {**LINE, "disparity": "disparity.png"}))
    assert len(pairs) == 3
    plain, metric, relative = (pairs[index] for index in range(3))

    read = np.array(PIL.Image.open(tmp_path / "blurred.png"), np.float32) / 255
    assert np.allclose(plain["bokeh"][0].permute(1, 2, 0), read)
    assert plain["inverse_depth"].isnan().all() and not plain["metric"]
    assert float(plain["df"]) == 0.5
    assert float(plain["K"]) == pytest.approx(strength_from_camera(2.0, 50, 2.0, 36, WIDTH))
    assert plain["camera"].tolist() == [2.0, 50.0, 2.0, 36.0]
    assert float(metric["K"]) == pytest.approx(strength_from_camera(2.0, 50, 2.0, 23.5, WIDTH))

    assert metric["metric"] and metric["inverse_depth"][0, 0, 0, :3].isnan().all()
    stored = np.load(tmp_path / "depth.npy")[1:]
    assert np.allclose(1 / metric["inverse_depth"][0, 0, 1:], stored, rtol=1e-5)
    assert not relative["metric"] and relative["inverse_depth"].max() > 1

    crops = FlowCrops(
        *(pairs, 3, CROP, 0), **{"as_sample": pair_sample, "given_share": 1.0, "turned": False}
    )
    for number in range(3):
        sample = crops[number]
        # The crop has the lens of the photo it was cut from.
        assert sample["photo_width_px"] == WIDTH and sample["K"] in (plain["K"], metric["K"])
        assert bool(sample["gives_depth"]) == bool(sample["metric"])
    assert {float(crops[number]["K"]) for number in range(3)} == {
        float(plain["K"]),
        float(metric["K"]),
    }


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"image": "sharp.png"}, "Line 1 of .* is no pair"),
        ({**LINE, "f_number": "wide"}, "Line 1 of .* is no pair"),
        ({**LINE, "focus_distance_m": 0.04}, "within the focal length"),
        ({**LINE, "f_number": -2}, "f_number is -2"),
        ({**LINE, "depth": "depth.npy", "disparity": "disparity.png"}, "wanted one of them"),
    ],
)
def test_lines_that_are_no_pairs_are_refused(
    tmp_path: Path, line: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        PhotoPairs(write_pairs(tmp_path, line))


def test_pairs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path, {**LINE, "disparity": "small.png"})
    with pytest.raises(ValueError, match="small.png is 40 x 29 pixels and sharp.png 40 x 30"):
        PhotoPairs(folder)[0]
    folder = write_pairs(tmp_path, {**LINE, "disparity": "sharp.png"})
    with pytest.raises(ValueError, match="is of mode RGB"):
        PhotoPairs(folder)[0]
    with pytest.raises(ValueError, match="has no lines"):
        PhotoPairs(write_pairs(tmp_path))
    with pytest.raises(ValueError, match="cannot be read"):
        PhotoPairs(tmp_path / "none")


# -- Opening -------------------------------------------------------------------------------------


def test_stored_clips_are_those_on_the_fly(tmp_path: Path) -> None:
    scenes = ClipScenes(3, 32, frames=2)
    write_clips(scenes, tmp_path / "clips", count=2)
    fly = settings(data_kind="clips", data_options={"frames": 2})
    stored, count = open_scenes(str(tmp_path / "clips"), 0, fly)
    made, endless = open_scenes(None, 3, fly)
    assert count == 2 and endless is None
    for name, value in stored[1].items():
        assert torch.equal(value, made[1][name]), name
    held_out = held_out_samples(settings(data_kind="clips", data_options={"frames": 2}))
    assert len(held_out) == 2 and held_out[0]["frames"].shape == (2, 3, 32, 32)


def test_held_out_pairs_are_cut_in_the_middle(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path, LINE)
    (sample,) = held_out_samples(settings(data_kind="pairs", validation_folder=str(folder)))
    whole = PhotoPairs(folder)[0]
    assert torch.equal(sample["frames"], whole["frames"][..., 3:27, 8:32])
    assert torch.equal(sample["K"], whole["K"])


@pytest.mark.parametrize("kind", ["stills", "clips"])
def test_options_that_do_not_fit_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="data.options do not fit"):
        training_crops(settings(data_kind=kind, data_options={"colour": 3}))

"""Properties of the procedural samples themselves."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bokehdiff.rendering import Aperture
from data_synthesis import ProceduralScenes, procedural
from data_synthesis.apertures import random_aperture
from data_synthesis.lens import trace_pixels
from data_synthesis.procedural import GENERATOR_VERSION

REPOSITORY = Path(__file__).resolve().parents[2]
SIZE = 48


def digest(item: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(item[key].numpy().tobytes() for key in sorted(item))).hexdigest()


@pytest.fixture(scope="module")
def samples() -> list[dict[str, torch.Tensor]]:
    scenes = ProceduralScenes(seed=11, size=SIZE)
    return [scenes[i] for i in range(24)]


def test_shapes_types_and_ranges(samples: list[dict[str, torch.Tensor]]) -> None:
    for item in samples:
        assert set(item) == {"image", "disparity", "df", "K", "target"}
        assert item["image"].shape == item["target"].shape == (3, SIZE, SIZE)
        assert item["disparity"].shape == (1, SIZE, SIZE)
        assert item["df"].shape == item["K"].shape == ()
        for name, value in item.items():
            assert value.dtype == torch.float32, name
            assert torch.isfinite(value).all(), name
        for name in ("image", "disparity", "target", "df"):
            assert item[name].min() >= 0 and item[name].max() <= 1, name
        assert item["K"] >= 0
        levels = item["image"] * 255
        assert (levels - levels.round()).abs().max() < 1e-4


def test_scenes_vary_and_radii_stay_in_range(samples: list[dict[str, torch.Tensor]]) -> None:
    radii = torch.stack(
        [(item["K"] * (item["disparity"] - item["df"]).abs()).max() for item in samples]
    )
    assert radii.max() < 32.5
    assert (radii > 8).any() and (radii < 4).any()
    full = [item for item in samples if item["disparity"].max() - item["disparity"].min() > 0.95]
    assert len(full) > len(samples) / 2
    brightness = torch.stack([item["image"].mean() for item in samples])
    assert brightness.std() > 0.05
    # Something to see in every picture, and few of them blown out.
    assert min(float(item["image"].std()) for item in samples) > 0.01
    focus = torch.stack([item["df"] for item in samples])
    assert (focus < 0.33).any() and (focus > 0.67).any()


def test_same_sample_in_any_order_and_process() -> None:
    scenes = ProceduralScenes(seed=5, size=SIZE)
    expected = [digest(scenes[i]) for i in (3, 0)]
    again = ProceduralScenes(seed=5, size=SIZE)
    assert [digest(again[i]) for i in (0, 3)] == expected[::-1]
    assert digest(ProceduralScenes(seed=6, size=SIZE)[3]) != expected[0]
    program = (
        "import hashlib\n"
        "from data_synthesis import ProceduralScenes\n"
        f"item = ProceduralScenes(seed=5, size={SIZE})[3]\n"
        "stored = b''.join(item[key].numpy().tobytes() for key in sorted(item))\n"
        "print(hashlib.sha256(stored).hexdigest())"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": "1"}
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.split()[-1] == expected[0]


def test_samples_of_this_version_stay_what_they_are() -> None:
    """Means over the samples 0 to 3 of version 1; another draw anywhere would change them all."""
    assert GENERATOR_VERSION == 1
    stored = {
        "image": [97.7736, 64.854, 82.5498, 125.3955],
        "disparity": [28828.6337, 43143.2448, 51685.0165, 47384.9622],
        "df": [0.4077, 0.8221, 0.6084, 0.6189],
        "K": [76.5978, 7.7049, 9.1308, 2.7812],
        "target": [27182.3681, 17496.4463, 21797.9738, 33506.6622],
    }
    scenes = ProceduralScenes(seed=5, size=SIZE)
    for index in range(4):
        arrays = scenes.arrays(index)
        for name, means in stored.items():
            assert float(np.mean(arrays[name])) == pytest.approx(means[index], rel=2e-4), name


def test_imperfect_share_changes_maps_alone() -> None:
    shares = {"default": {}, "exact": {"imperfect_share": 0.0}, "none": {"imperfect_share": 1.0}}
    scenes = {
        name: ProceduralScenes(seed=5, size=32, radius=(1.5, 4.0), **share)
        for name, share in shares.items()
    }
    exact_maps, ramps = Counter(), Counter()
    for index in range(10):
        arrays = {name: some.arrays(index) for name, some in scenes.items()}
        for name, one in arrays.items():
            for key in ("image", "df", "K", "target"):
                np.testing.assert_array_equal(arrays["exact"][key], one[key], err_msg=key)
            exact_maps[name] += np.array_equal(arrays["exact"]["disparity"], one["disparity"])
            # An edge is one step in an exact map: no pixel lies between the surfaces.
            steps = np.diff(one["disparity"][0].astype(float) / 65535, axis=1)
            ramps[name] += int((np.minimum(steps[:, :-1], steps[:, 1:]) > 0.08).sum())
    assert 3 <= exact_maps["default"] < 10
    assert exact_maps["none"] <= 1  # a change may be smaller than a step of the map
    assert ramps["exact"] < 0.1 * ramps["none"]


def test_settings_name_another_imperfect_share() -> None:
    assert "imperfect_share" not in ProceduralScenes().settings  # as in folders of before
    assert ProceduralScenes(imperfect_share=0).settings["imperfect_share"] == 0


def test_no_global_random_state_is_used() -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    torch_before = torch.get_rng_state()
    ProceduralScenes(seed=2, size=32)[0]
    assert (np.random.get_state()[1] == before).all()
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_without_blur_the_target_is_the_image() -> None:
    scenes = ProceduralScenes(
        seed=3, size=SIZE, radius=(1e-6, 1e-6), sharp_share=0, light_share=1.0
    )
    for index in range(6):
        item = scenes[index]
        assert (item["image"] - item["target"]).abs().max() * 255 <= 0.51


def test_what_is_in_focus_stays_sharp() -> None:
    errors = []
    for index in range(16):
        item = ProceduralScenes(seed=21, size=96, radius=(3.0, 8.0), light_share=0)[index]
        radius = item["K"] * (item["disparity"] - item["df"]).abs()
        # In focus with everything around it: nothing blurred leaks in.
        widest = torch.nn.functional.max_pool2d(radius[None], 23, 1, 11)[0, 0]
        focused = widest < 0.3
        if focused.sum() > 50:
            errors.append(float((item["image"] - item["target"])[:, focused].pow(2).mean()))
    assert len(errors) >= 2
    assert -10 * np.log10(np.mean(errors)) > 44


def test_blur_keeps_the_mean_brightness() -> None:
    """Linear light is moved about, not made or lost; only the frame and occlusion change it."""
    ratios = []
    for index in range(16):
        item = ProceduralScenes(seed=8, size=96, radius=(2.0, 4.0), light_share=0)[index]
        image, target = (item[name].double() ** 2.2 for name in ("image", "target"))
        ratios.append(float(target.mean() / image.mean()))
    assert np.abs(np.array(ratios) - 1).max() < 0.08
    assert abs(np.mean(ratios) - 1) < 0.015


def test_length_indices_and_pickling() -> None:
    endless = ProceduralScenes(size=32)
    with pytest.raises(TypeError, match="endless"):
        len(endless)
    finite = ProceduralScenes(size=32, length=2)
    assert len(finite) == 2
    assert len(list(finite)) == 2
    with pytest.raises(IndexError, match="less than 2"):
        finite[2]
    with pytest.raises(IndexError, match="at least 0"):
        endless[-1]
    copy = pickle.loads(pickle.dumps(endless))
    assert digest(copy[1]) == digest(endless[1])


def test_any_aperture_sees_the_same_scenes() -> None:
    aperture = Aperture(blades=6, cat_eye=0.5, spherical=0.4)
    disc = ProceduralScenes(seed=5, size=SIZE)
    shaped = ProceduralScenes(seed=5, size=SIZE, aperture=aperture)
    changed = 0
    for index in range(4):
        plain, through = disc.arrays(index), shaped.arrays(index)
        for name in ("image", "disparity", "df", "K"):
            np.testing.assert_array_equal(plain[name], through[name], err_msg=name)
        changed += not np.array_equal(plain["target"], through["target"])
        # The same light, spread otherwise.
        assert plain["target"].mean() == pytest.approx(through["target"].mean(), rel=0.05)
        assert Aperture.from_dict(plain["aperture"]) == Aperture()
        assert Aperture.from_dict(through["aperture"]) == aperture
        assert plain["provenance"] == {}
    assert changed >= 3


def test_the_plain_disc_is_the_default() -> None:
    default = ProceduralScenes(seed=5, size=SIZE)
    disc = ProceduralScenes(seed=5, size=SIZE, aperture=Aperture())
    assert digest(default[1]) == digest(disc[1])
    assert default.settings == disc.settings


def test_random_apertures_differ_and_repeat() -> None:
    scenes = ProceduralScenes(seed=5, size=32, aperture="random")
    settings = [scenes.arrays(index)["aperture"] for index in range(12)]
    assert len({json.dumps(one) for one in settings}) > 6
    again = ProceduralScenes(seed=5, size=32, aperture="random")
    for index in (7, 0):
        one, other = scenes.arrays(index), again.arrays(index)
        assert one["aperture"] == other["aperture"] == settings[index]
        np.testing.assert_array_equal(one["target"], other["target"])


def test_settings_name_the_aperture() -> None:
    assert ProceduralScenes(aperture="random").settings["aperture"] == "random"
    shaped = ProceduralScenes(aperture=Aperture(blades=7, cat_eye=0.25))
    assert shaped.settings["aperture"] == {"blades": 7, "cat_eye": 0.25}
    assert json.loads(json.dumps(shaped.settings)) == shaped.settings


def test_fringe_counts_in_the_disparity_of_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red is blurred by K * fringe pixels where green is sharp, in the units of the sample."""
    traced = []

    def watched(*arguments: Any, **settings: Any) -> np.ndarray:
        traced.append((arguments, settings))
        return trace_pixels(*arguments, **settings)

    monkeypatch.setattr(procedural, "trace_pixels", watched)
    fringe = 0.05
    scenes = ProceduralScenes(seed=5, size=32, aperture=Aperture(fringe=fringe))
    for index in range(3):
        sample = scenes.arrays(index)
        (_, _, df, K, *_), settings = traced[-1]
        red, green, _ = settings["aperture"].channel_focus(df)
        assert K * (green - red) == pytest.approx(sample["K"] * fringe, rel=1e-9)


def test_random_apertures_follow_their_documented_shares() -> None:
    rng = np.random.default_rng(0)
    drawn = [random_aperture(rng) for _ in range(2000)]
    shares = {
        "disc": (0.35, [one.blades == 0 for one in drawn]),
        "squeeze": (0.10, [one.squeeze != 1 for one in drawn]),
        "obstruction": (0.05, [one.obstruction > 0 for one in drawn]),
        "cat_eye": (0.50, [one.cat_eye > 0 for one in drawn]),
        "spherical": (0.40, [one.spherical != 0 for one in drawn]),
        "fringe": (0.15, [one.fringe != 0 for one in drawn]),
    }
    for name, (share, found) in shares.items():
        # Four standard deviations of 2000 draws.
        assert np.mean(found) == pytest.approx(share, abs=4 * (0.25 / 2000) ** 0.5), name
    assert {one.blades for one in drawn} == {0, 5, 6, 7, 8, 9}
    assert max(abs(one.fringe) for one in drawn) <= 0.02
    assert all(one.picture is None for one in drawn)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"size": 8}, "at least 16"),
        ({"radius": (4.0, 2.0)}, "radius is"),
        ({"radius": (0.0, 2.0)}, "radius is"),
        ({"light_share": 1.5}, "light_share is 1.5"),
        ({"sharp_share": -0.1}, "sharp_share is -0.1"),
        ({"imperfect_share": 2}, "imperfect_share is 2"),
        ({"length": -3}, "length is -3"),
        ({"aperture": "hexagon"}, "aperture is 'hexagon'"),
        ({"aperture": 6}, "aperture is 6"),
    ],
)
def test_mistakes_are_refused(arguments: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ProceduralScenes(**arguments)

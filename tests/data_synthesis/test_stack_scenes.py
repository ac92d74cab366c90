"""Bokeh stacks with metric depth: what a sample is, that it is physics, and files of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve, maximum_filter

from bokehdiff.images import linear_to_srgb, srgb_to_linear
from data_synthesis import stack_files
from data_synthesis.stack_files import StoredStacks, write_stacks
from data_synthesis.stack_scenes import StackScenes

SIZE = 32


def disc(radius: float, finer: int = 16) -> np.ndarray:
    """A disc on a grid of pixels, each the share of it that is covered; sums to one."""
    reach = int(np.ceil(radius + 0.5))
    steps = (np.arange((2 * reach + 1) * finer) + 0.5) / finer - reach - 0.5
    inside = steps[:, None] ** 2 + steps**2 <= radius**2
    cells = inside.reshape(2 * reach + 1, finer, 2 * reach + 1, finer).mean((1, 3))
    return cells / cells.sum()


def test_a_sample_is_what_it_says() -> None:
    scenes = StackScenes(3, SIZE, frames=4, strengths=(0.5, 3.0), disparities=(0.2, 0.8))
    for index in range(4):
        sample = scenes[index]
        assert {name: tuple(value.shape) for name, value in sample.items()} == {
            "image": (3, SIZE, SIZE),
            "depth": (1, SIZE, SIZE),
            "df": (),
            "stack": (4, 3, SIZE, SIZE),
            "K": (4,),
        }
        assert all(value.dtype == torch.float32 for value in sample.values())
        for name in ("image", "stack"):
            steps = sample[name] * 255
            assert sample[name].min() >= 0 and sample[name].max() <= 1
            assert torch.allclose(steps, steps.round(), atol=1e-4)
        assert sample["depth"].min() >= 1 / 0.8 - 1e-4 and sample["depth"].max() <= 5 + 1e-3
        assert sample["df"] == pytest.approx(0.8)
        ratios = sample["K"][1:] / sample["K"][:-1]
        assert (ratios >= 1.1 - 1e-5).all() and sample["K"][-1] <= 3.0
    assert scenes.settings["strengths"] == [0.5, 3.0]


def test_samples_depend_on_seed_and_index_alone() -> None:
    first, again = StackScenes(1, SIZE, frames=2), StackScenes(1, SIZE, frames=2)
    later = again[2]
    for name, value in first[2].items():
        assert torch.equal(value, later[name]), name
    assert not torch.equal(first[0]["image"], first[1]["image"])
    assert not torch.equal(first[0]["image"], StackScenes(2, SIZE, frames=2)[0]["image"])


def test_frames_are_the_picture_convolved_with_the_disc_of_their_radius() -> None:
    """All surfaces 2 m away and the focus at infinity: r = K / 2 everywhere, nothing occluded."""
    scenes = StackScenes(5, 48, frames=2, strengths=(4.0, 10.0), disparities=(0.4999, 0.5), df=0.0)
    for index in (1, 2, 3):
        sample = scenes[index]
        sharp = srgb_to_linear(sample["image"].double()).numpy()
        # What is brighter than white in the scene is not in the picture.
        known = maximum_filter(sharp.max(0), size=15)[8:-8, 8:-8] < 1
        assert known.mean() > 0.8
        for K, frame in zip(sample["K"].tolist(), sample["stack"].double().numpy(), strict=True):
            errors = []
            for radius in (0.8 * K / 2, K / 2, 1.25 * K / 2):
                light = np.stack([convolve(colour, disc(radius)) for colour in sharp])
                expected = linear_to_srgb(np.clip(light, 0, 1))
                errors.append(np.square((expected - frame)[..., 8:-8, 8:-8][:, known]).mean())
            assert errors[1] < 0.5 * min(errors[0], errors[2]), (index, K, errors)
            # Noise of up to 1.5 steps (3.5e-5) and of the tracing (42 dB at least, 6.3e-5).
            assert errors[1] < 1e-4, (index, K, errors)


def test_more_strength_blurs_more_and_the_focus_stays_sharp() -> None:
    scenes = StackScenes(7, 48, frames=3, strengths=(1.0, 9.0), textureless_share=0.0)
    contrasts, kept = [], []
    for index in range(6):
        sample = scenes[index]
        contrasts.append([float(frame.diff().square().mean()) for frame in sample["stack"]])
        radius = sample["K"][-1] * (1 / sample["depth"] - sample["df"]).abs()
        if (sharp := (radius < 0.2)[0]).sum() > 50:
            kept.append(float((sample["stack"][-1] - sample["image"])[:, sharp].abs().mean()))
    means = np.mean(contrasts, axis=0)
    assert means[0] > 1.2 * means[1] > 1.44 * means[2]
    assert all(change < 0.03 for change in kept)


def test_textureless_surfaces_have_no_texture() -> None:
    def roughness(share: float) -> float:
        scenes = StackScenes(11, 48, frames=1, textureless_share=share)
        return float(
            torch.stack([scenes[i]["image"].diff().abs().median() for i in range(6)]).mean()
        )

    # What is left is noise of at most 1.5 steps: between neighbours below 1.5 * sqrt(2) * 0.68.
    assert roughness(1.0) < 1.5 / 255 < 2 * 1.5 / 255 < roughness(0.0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"size": 8}, "size is 8"),
        ({"frames": 0}, "frames is 0"),
        ({"textureless_share": 1.5}, "textureless_share is 1.5"),
        ({"strengths": (3.0, 1.0)}, r"strengths is \(3.0, 1.0\); wanted \(low, high\) in px\*m"),
        ({"strengths": (1.0, 1.2), "frames": 3}, "wide enough for 3 frames"),
        ({"disparities": (0.0, 1.0)}, "disparities is"),
        ({"disparities": (1.0, 1.0)}, "a near end above the far"),
        ({"df": -0.1}, "df is -0.1"),
        ({"df": (1.0, 0.5)}, "df is"),
        ({"length": -1}, "length is -1"),
    ],
)
def test_mistakes_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        StackScenes(**settings)


def test_length_makes_it_finite() -> None:
    with pytest.raises(TypeError, match="endless"):
        len(StackScenes())
    scenes = StackScenes(length=2, size=SIZE)
    assert len(scenes) == 2
    with pytest.raises(IndexError, match="less than 2"):
        scenes[2]


# -- Files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes() -> StackScenes:
    return StackScenes(13, 16, frames=2, strengths=(0.5, 2.0), df=(0.0, 0.5))


def test_stored_stacks_equal_the_scenes(tmp_path: Path, scenes: StackScenes) -> None:
    told: list[int] = []
    write_stacks(scenes, tmp_path / "stacks", count=66, progress=told.append)
    assert told == [64, 2]
    stored = StoredStacks(tmp_path / "stacks")
    assert len(stored) == 66 and stored.settings == scenes.settings
    for index in (0, 63, 64, 65):
        for name, value in scenes[index].items():
            assert torch.equal(stored[index][name], value), (index, name)
    with pytest.raises(IndexError, match="has 66 stacks"):
        stored[66]


def test_what_is_there_is_kept_and_what_is_missing_is_written(
    tmp_path: Path, scenes: StackScenes
) -> None:
    write_stacks(scenes, tmp_path, count=65)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(ValueError, match="is not finished: 1 of 2 files are missing"):
        StoredStacks(tmp_path)
    before = first.stat().st_mtime_ns
    write_stacks(scenes, tmp_path, count=65)
    assert second.read_bytes() == content and first.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds another data set"):
        write_stacks(StackScenes(14, 16, frames=2), tmp_path, count=65)
    second.write_bytes(content[:100])
    with pytest.raises(ValueError, match="is damaged"):
        StoredStacks(tmp_path)[64]


def test_folders_of_others_are_left_alone(tmp_path: Path, scenes: StackScenes) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match="is not empty and holds no stacks"):
        write_stacks(scenes, tmp_path, count=1)
    with pytest.raises(ValueError, match="holds no stacks"):
        StoredStacks(tmp_path)
    with pytest.raises(ValueError, match="count is 0"):
        write_stacks(scenes, tmp_path / "new", count=0)


def test_the_command_writes_what_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    stack_files.add_arguments(parser)
    flags = "--count 2 --size 16 --seed 13 --frames 2 --strengths 0.5 2 --df 0 0.5".split()
    assert stack_files.run(parser.parse_args([*flags, "--out", str(tmp_path / "stacks")])) == 0
    assert "holds 2 stacks of 2 frames" in capsys.readouterr().out
    stored = StoredStacks(tmp_path / "stacks")
    assert (
        stored.settings
        == StackScenes(13, 16, frames=2, strengths=(0.5, 2.0), df=(0.0, 0.5)).settings
    )


@pytest.mark.slow
def test_several_processes_write_the_same_bytes(tmp_path: Path, scenes: StackScenes) -> None:
    write_stacks(scenes, tmp_path / "one", count=130)
    write_stacks(scenes, tmp_path / "two", count=130, processes=2)
    for file in sorted((tmp_path / "one").iterdir()):
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes()

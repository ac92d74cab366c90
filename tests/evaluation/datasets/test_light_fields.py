"""Light fields: the lens that their views add up to, against planes seen through a dense lens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import j1

from bokehdiff.images import linear_to_srgb, srgb_to_linear
from bokehdiff.rendering import render_bokeh
from evaluation.datasets import open_dataset
from evaluation.datasets.light_fields import aperture_weights, radius_of, refocused
from evaluation.photographs import Photograph
from tests.evaluation.datasets.miniatures import (
    FAR_DISPARITY,
    NEAR_DISPARITY,
    VIEWS,
    two_planes,
    write_light_field,
)

FULL = VIEWS / 2
"""Radius of the largest aperture, in views; of the miniature's frame 4 pixels are cut off."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("light_fields")
    write_light_field(folder)
    return folder


@pytest.fixture(scope="module")
def photographs(folder: Path) -> dict[str, Photograph]:
    return {one.setting: one for one in open_dataset("light_fields", folder).photographs()}


def seen_through_a_dense_lens(df: float, radius: float, points: int = 21) -> np.ndarray:
    """(H, W, 3) linear light: the mean over a grid of points inside a disc of viewpoints."""
    grid = (np.arange(points) + 0.5) / points * 2 - 1
    inside = [(u, v) for v in grid for u in grid if u * u + v * v <= 1]
    return sum(two_planes(radius * u, radius * v, df) for u, v in inside) / len(inside)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = ((one.astype(float) - other.astype(float)) ** 2).mean()
    return float(10 * np.log10(255**2 / error))


def test_photographs_say_what_was_put_in(tmp_path: Path, folder: Path) -> None:
    put_in = write_light_field(tmp_path, numbered=True)
    numbered = list(open_dataset("light_fields", tmp_path).photographs())
    named = list(open_dataset("light_fields", folder).photographs())
    # The outermost views see the nearest plane in focus moved by 0.8 * 4 = 3.2 pixels.
    frame = (slice(4, -4), slice(4, -4))
    settings = [
        f"{plane}_{part}" for plane in ("near", "middle", "far") for part in ("full", "half")
    ]
    assert [one.setting for one in named] == settings
    for one, other in zip(named, numbered, strict=True):
        assert one.scene == "planes"
        assert np.array_equal(one.image, put_in["image"][frame])
        assert one.disparity == pytest.approx(put_in["disparity"][frame] - FAR_DISPARITY)
        assert one.disparity.dtype == np.float32 and one.disparity.min() == 0
        radius = FULL if one.setting.endswith("full") else FULL / 2
        assert one.K == radius_of(aperture_weights(VIEWS, VIEWS, radius))
        # Squares at the rim of the disc reach beyond it, by less than half a view.
        assert radius < one.K < 1.05 * radius
        df = NEAR_DISPARITY - FAR_DISPARITY if one.setting.startswith("near") else 0.0
        assert one.df == pytest.approx(df, abs=1e-6)
        assert one.disparity_range == (one.disparity.min(), one.disparity.max())
        assert one.labels["view_step_px"] == pytest.approx(1.2) and json.dumps(one.labels)
        assert one.light is None
        assert np.array_equal(one.truth, other.truth) and one.df == other.df


@pytest.mark.parametrize("setting", ["near_full", "far_full", "near_half", "far_half"])
def test_truth_is_that_of_a_dense_lens(photographs: dict[str, Photograph], setting: str) -> None:
    one = photographs[setting]
    assert one.K is not None
    df = NEAR_DISPARITY if setting.startswith("near") else FAR_DISPARITY
    dense = linear_to_srgb(seen_through_a_dense_lens(df, one.K))[4:-4, 4:-4] * 255
    through_the_wrong_lens = {
        "one view smaller": seen_through_a_dense_lens(df, one.K - 1),
        "focused as far before the far plane": seen_through_a_dense_lens(-df, one.K),
    }
    right = psnr(one.truth, dense)
    assert right > 40
    for name, wrong in through_the_wrong_lens.items():
        assert psnr(one.truth, linear_to_srgb(wrong)[4:-4, 4:-4] * 255) < right - 6, name
    assert psnr(one.truth, one.image) < right - 6


def test_the_plane_in_focus_stays_sharp(photographs: dict[str, Photograph]) -> None:
    for setting in ("near_full", "far_full"):
        one = photographs[setting]
        in_focus = np.abs(one.disparity - one.df) < 1e-4
        # Away from the outline, where the other plane's light comes in.
        y, x = np.mgrid[: one.image.shape[0], : one.image.shape[1]]
        distance = np.abs(np.hypot(y + 4 - 30, x + 4 - 34) - 14)
        inside = in_focus & (distance > 1.2 * FULL + 4)
        assert inside.sum() > 40
        difference = np.abs(one.truth.astype(int) - one.image)[inside]
        # Views and truth are rounded to 8 bits, each by half a level.
        assert difference.max() <= 1


@pytest.mark.parametrize("radius", [1.5, 2.25, 4.5])
@pytest.mark.parametrize("df", [-1.5, 0.7])
def test_a_wave_loses_the_contrast_that_a_disc_takes(radius: float, df: float) -> None:
    """A disc of r pixels scales a wave of f cycles a pixel by 2 J1(2 pi f r) / (2 pi f r)."""
    frequency, disparity = 1 / 24, 0.3
    y, x = np.mgrid[:64, :96].astype(np.float64)
    views = np.empty((VIEWS, VIEWS, 64, 96, 3))
    for v in range(VIEWS):
        for u in range(VIEWS):
            seen_at = x + disparity * (u - 4) + 0 * y
            views[v, u] = 0.5 + 0.4 * np.cos(2 * np.pi * frequency * seen_at)[..., None]
    weights = aperture_weights(VIEWS, VIEWS, radius)
    lens = refocused(views, df, weights)
    wave = np.cos(2 * np.pi * frequency * x)
    inside = (slice(20, -20), slice(20, -20))
    found = ((lens[..., 0] - 0.5) * wave)[inside].sum() / (0.4 * wave[inside] ** 2).sum()
    argument = 2 * np.pi * frequency * radius_of(weights) * abs(disparity - df)
    # A disc and the views spread light equally far, so they differ in fourth order only.
    assert found == pytest.approx(2 * j1(argument) / argument, rel=0.005)


def test_weights_are_the_covered_parts_of_squares() -> None:
    weights = aperture_weights(9, 9, 4.5)
    assert weights.sum() == pytest.approx(1)
    assert np.array_equal(weights, weights[::-1]) and np.allclose(weights, weights.T)
    # A whole square of a disc of area pi r^2; squares are sampled 64 x 64 times.
    assert weights[4, 4] == pytest.approx(1 / (np.pi * 4.5**2), rel=1e-3)
    assert weights[0, 0] == 0 < weights[0, 4] < weights[1, 4]
    # The finer the grid, the closer its views come to the disc they stand for.
    assert radius_of(aperture_weights(33, 33, 16.5)) == pytest.approx(16.5, rel=1e-3)
    lone = aperture_weights(3, 5, 0.5)
    assert lone[1, 2] == 1 and lone.sum() == 1


@pytest.mark.parametrize("setting", ["near_full", "far_full"])
def test_our_renderer_agrees_on_K_and_df(photographs: dict[str, Photograph], setting: str) -> None:
    one = photographs[setting]
    assert one.K is not None
    image = torch.from_numpy(one.image / np.float32(255)).permute(2, 0, 1)[None]
    disparity = torch.from_numpy(one.disparity)[None, None]

    def agreement(K: float) -> float:
        blurred = render_bokeh(image, disparity, one.df, K, method="layered", metric=True)
        return psnr(one.truth, blurred[0].permute(1, 2, 0).numpy() * 255)

    right = agreement(one.K)
    assert right > psnr(one.truth, one.image) + 6
    assert right > max(agreement(1.5 * one.K), agreement(one.K / 1.5)) + 1


def test_light_adds_up_linearly(photographs: dict[str, Photograph]) -> None:
    one = photographs["far_full"]
    light = srgb_to_linear(one.truth / 255.0).mean()
    assert light == pytest.approx(srgb_to_linear(one.image / 255.0).mean(), rel=0.03)


@pytest.mark.parametrize("way", ["disparity negated", "columns from the right"])
def test_the_wrong_sign_is_noticed(tmp_path: Path, way: str) -> None:
    write_light_field(tmp_path)
    scene = tmp_path / "planes"
    assert open_dataset("light_fields", tmp_path).verify() == []
    if way == "disparity negated":
        np.save(scene / "disparity.npy", -np.load(scene / "disparity.npy"))
    else:
        views = {file.stem: file.read_bytes() for file in (scene / "views").iterdir()}
        for name, content in views.items():
            row, column = name.split("_")
            (scene / "views" / f"{row}_{VIEWS - 1 - int(column):02d}.png").write_bytes(content)
    problems = open_dataset("light_fields", tmp_path).verify()
    assert len(problems) == (2 if way == "disparity negated" else 1)
    assert all("against its disparity" in problem for problem in problems)


def test_refusals(tmp_path: Path) -> None:
    write_light_field(tmp_path)
    scene = tmp_path / "planes"
    np.save(scene / "disparity.npy", 20 * np.load(scene / "disparity.npy"))
    with pytest.raises(ValueError, match="move the outermost views by 64 pixels"):
        next(open_dataset("light_fields", tmp_path).photographs())
    for column in range(VIEWS):
        (scene / "views" / f"00_{column:02d}.png").unlink()
    with pytest.raises(ValueError, match="8 x 9 views .*wanted odd numbers"):
        next(open_dataset("light_fields", tmp_path).photographs())

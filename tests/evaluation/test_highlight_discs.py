"""Discs of lights: radius and evenness of discs made by hand, and which of them are measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.signal import fftconvolve

from bokehdiff.srgb import linear_to_srgb
from evaluation.highlight_discs import disc_flatness, disc_radius_error, measurable_discs
from evaluation.photographs import Photograph

HEIGHT, WIDTH = 140, 160
SOURCE_RADIUS = 1.8
FAR, NEAR = 0.1, 0.5
Place = tuple[float, float]


def disc(centre: Place, radius: float) -> np.ndarray:
    """(H, W): share of each pixel that the disc covers, from 8 x 8 points."""
    fine = 8
    y = (np.arange(HEIGHT * fine) + 0.5) / fine - 0.5 - centre[0]
    x = (np.arange(WIDTH * fine) + 0.5) / fine - 0.5 - centre[1]
    inside = (y[:, None] ** 2 + x**2 <= radius**2).astype(float)
    return inside.reshape(HEIGHT, fine, WIDTH, fine).mean(axis=(1, 3))


def disc_of_the_light(centre: Place, radius: float) -> np.ndarray:
    """(H, W): the disc that the lens makes of every point of the light, 1 in its middle."""
    source = disc((8.0, 8.0), SOURCE_RADIUS)[:17, :17]
    return fftconvolve(disc(centre, radius), source / source.sum(), mode="same")


def blob(centre: Place, sigma: float) -> np.ndarray:
    y, x = np.arange(HEIGHT)[:, None] - centre[0], np.arange(WIDTH) - centre[1]
    return np.exp(-(y**2 + x**2) / (2 * sigma**2))


def texture(blur: float = 0.0) -> np.ndarray:
    grain = gaussian_filter(np.random.default_rng(0).normal(size=(HEIGHT, WIDTH)), 2)
    return 0.08 + gaussian_filter(0.02 * grain / grain.std(), blur)


def picture(light: np.ndarray) -> np.ndarray:
    """8-bit sRGB (H, W, 3) of gray linear light."""
    shown = linear_to_srgb(np.clip(light, 0, 1)) * 255
    return np.repeat(shown.round().astype(np.uint8)[..., None], 3, axis=2)


def photograph(
    radius: float,
    places: Sequence[Place] = ((70.3, 80.6),),
    plateau: float = 0.5,
    seen: np.ndarray | None = None,
) -> Photograph:
    """Lights over a far texture; the lens makes discs of `radius` with this much light above it.

    `seen` replaces the discs in the truth: (H, W) linear light above the texture.
    """
    radiance = plateau * (radius / SOURCE_RADIUS) ** 2
    lights = sum(radiance * disc(place, SOURCE_RADIUS) for place in places)
    if seen is None:
        seen = sum(plateau * disc_of_the_light(place, radius) for place in places)
    sharp = texture() + lights
    return Photograph(
        scene="lights",
        setting="f1",
        image=picture(sharp),
        disparity=np.full((HEIGHT, WIDTH), FAR, np.float32),
        disparity_range=(FAR, NEAR),
        df=NEAR,
        K=radius / (NEAR - FAR),
        truth=picture(texture(radius / 2) + seen),
        light=np.repeat(sharp[..., None], 3, axis=2).astype(np.float32),
    )


@pytest.mark.parametrize("radius", [6.0, 9.5, 14.0, 25.0])
@pytest.mark.parametrize("centre", [(70.0, 80.0), (70.5, 79.5), (69.7, 80.2)])
def test_the_radius_of_a_disc_is_measured(radius: float, centre: Place) -> None:
    (found,) = measurable_discs(photograph(radius, [centre]))
    assert found.truth.radius == pytest.approx(radius, rel=0.03)
    assert found.radius == pytest.approx(radius, rel=1e-5)
    assert found.source_radius == pytest.approx(SOURCE_RADIUS, rel=0.1)
    assert found.truth.evenness > 0.9


def test_truth_has_no_error() -> None:
    given = photograph(12)
    assert disc_radius_error(given.truth / 255, given) == 0
    assert disc_flatness(given.truth / 255, given) > 0.95


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.1, 1.3])
def test_a_disc_of_another_radius_shows(factor: float) -> None:
    given, other = (
        photograph(14),
        photograph(14, seen=0.5 * disc_of_the_light((70.3, 80.6), 14 * factor)),
    )
    error = disc_radius_error(other.truth / 255, given)
    assert error == pytest.approx(abs(factor - 1), abs=0.03)


def test_a_gaussian_of_the_same_moment_is_told_from_a_disc() -> None:
    # The root of twice the second moment of a Gaussian is 2 sigma.
    given, other = photograph(14), photograph(14, seen=0.9 * blob((70.3, 80.6), 7))
    gaussian = other.truth / 255
    # Its tails go on where the light of the ground is measured, and beyond.
    assert disc_radius_error(gaussian, given) < 0.1
    distance = np.arange(24) + 0.5
    profile = np.exp(-(distance**2) / (2 * 7**2))
    profile -= profile[-4:].mean()
    rim = profile[(distance >= 0.6 * 14) & (distance <= 0.85 * 14)].mean()
    wanted = rim / profile[distance <= 7].mean()
    assert wanted < 0.45
    assert disc_flatness(gaussian, given) == pytest.approx(wanted, abs=0.05)


def test_a_ring_is_as_uneven_as_a_hump() -> None:
    given = photograph(14)
    hollow = 0.5 * disc((70.3, 80.6), 14) - 0.25 * disc((70.3, 80.6), 7.5)
    other = photograph(14, seen=hollow)
    assert disc_flatness(other.truth / 255, given) == pytest.approx(0.5, abs=0.06)


def test_a_method_that_makes_no_disc_has_the_worst_figures() -> None:
    given = photograph(14)
    nothing = picture(texture(7)) / 255
    assert disc_radius_error(nothing, given) == 1
    assert disc_flatness(nothing, given) == 0
    # The identity shows the light itself, cut off at white: less than a tenth of what it sends.
    assert disc_radius_error(given.image / 255, given) == 1


def test_the_mean_is_over_discs() -> None:
    places = [(40.0, 40.0), (95.0, 115.0)]
    given = photograph(10, places)
    assert len(measurable_discs(given)) == 2
    half = picture(texture(5) + 0.5 * disc_of_the_light(places[0], 10)) / 255
    assert disc_radius_error(half, given) == pytest.approx(0.5, abs=0.01)
    assert disc_flatness(half, given) == pytest.approx(0.5, abs=0.05)


def test_discs_that_overlap_are_measured_where_they_are_alone() -> None:
    places = [(70.0, 70.0), (70.0, 86.0)]
    found = measurable_discs(photograph(12, places, plateau=0.3))
    assert len(found) == 2
    for one in found:
        assert one.truth.radius == pytest.approx(12, rel=0.03)
    assert measurable_discs(photograph(12, [(70.0, 75.0), (70.0, 81.0)], plateau=0.3)) == []


def test_the_frame_may_cut_a_disc() -> None:
    (found,) = measurable_discs(photograph(12, [(6.0, 80.0)]))
    assert found.truth.radius == pytest.approx(12, rel=0.03)


def test_discs_that_the_truth_does_not_show_are_left_out() -> None:
    assert measurable_discs(photograph(4)) == [], "too small"
    assert measurable_discs(photograph(14, plateau=1.2)) == [], "cut off at white"
    assert measurable_discs(photograph(14, seen=0.5 * disc((70.3, 80.6), 11))) == [], "another"
    assert measurable_discs(photograph(14, seen=0.9 * blob((70.3, 80.6), 7))) == [], "no disc"
    assert measurable_discs(photograph(14, seen=np.zeros((HEIGHT, WIDTH)))) == [], "hidden"
    given = photograph(14)
    disparity = given.disparity.copy()
    disparity[:, 84:] = NEAR  # something in front of a part of it
    truth = given.truth.copy()
    truth[:, 84:] = 60
    (found,) = measurable_discs(dataclasses.replace(given, disparity=disparity, truth=truth))
    assert found.truth.radius == pytest.approx(14, rel=0.03)
    disparity[:, 60:] = NEAR
    disparity[68:73, 78:83] = FAR  # seen through a hole
    assert measurable_discs(dataclasses.replace(given, disparity=disparity)) == []


def test_a_colour_that_is_not_cut_off_is_looked_at() -> None:
    given = photograph(14)
    colours = [picture(texture(7) + level * disc((70.3, 80.6), 14)) for level in (1.5, 0.3, 0.7)]
    truth = np.stack([colour[..., 0] for colour in colours], axis=2)
    (found,) = measurable_discs(dataclasses.replace(given, truth=truth))
    assert found.channel == 2
    assert found.truth.plateau == pytest.approx(0.78, abs=0.01)


def test_without_lights_or_K_there_is_no_figure() -> None:
    given = photograph(14)
    dark = dataclasses.replace(given, light=np.full_like(given.light, 0.5))
    for without in (
        dark,
        dataclasses.replace(given, light=None),
        dataclasses.replace(given, K=None),
    ):
        assert disc_radius_error(given.truth / 255, without) is None
        assert disc_flatness(given.truth / 255, without) is None


def test_ray_traced_discs_have_the_radius_of_the_circle_of_confusion(shared_root: Path) -> None:
    from evaluation.datasets import open_dataset

    folder = shared_root / "bench" / "raytraced" / "data"
    if not folder.is_dir():
        pytest.skip(f"no ray-traced benchmark at {folder}")
    found = [
        disc
        for given in open_dataset("raytraced", folder, ["s01", "s03"]).photographs()
        for disc in measurable_discs(given)
    ]
    assert len(found) >= 20
    errors = [abs(disc.truth.radius / disc.radius - 1) for disc in found]
    # The scene's own structure behind a disc is what remains.
    assert np.mean(errors) < 0.01 and np.quantile(errors, 0.9) < 0.03
    assert np.mean([disc.truth.evenness for disc in found]) > 0.95

"""The aperture: kernels of sum one, lens samples, blades, orientation, mistakes."""

from __future__ import annotations

import math

import pytest
import torch

from bokehdiff.rendering import Aperture

SHAPES = [Aperture(), Aperture(5), Aperture(6, rotation=20.0), Aperture(7, roundness=0.5)]


@pytest.mark.parametrize("aperture", SHAPES)
@pytest.mark.parametrize("radius", [0.0, 0.3, 0.51, 1.0, 2.7, -2.7, 15.2])
def test_kernel_spreads_energy_one(aperture: Aperture, radius: float) -> None:
    kernel = aperture.kernel(radius, dtype=torch.float64)
    assert kernel.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert (kernel >= 0).all()
    assert kernel.shape[0] == kernel.shape[1] and kernel.shape[0] % 2 == 1


def test_disc_kernel_is_the_antialiased_disc() -> None:
    kernel = Aperture().kernel(2.3, dtype=torch.float64)
    reach = kernel.shape[0] // 2
    for y in range(-reach, reach + 1):
        for x in range(-reach, reach + 1):
            weight = min(max(2.3 + 0.5 - math.hypot(x, y), 0), 1)
            ratio = kernel[y + reach, x + reach] / kernel[reach, reach]
            assert ratio.item() == pytest.approx(weight, abs=1e-12)
    assert kernel[0].max() > 0, "the kernel is larger than it has to be"


@pytest.mark.parametrize("radius", [0.0, 0.25, 0.5, -0.5])
def test_small_radius_is_a_single_weight(radius: float) -> None:
    assert Aperture().kernel(radius).tolist() == [[1.0]]


@pytest.mark.parametrize(("side", "count"), [(1, 1), (11, 81), (15, 149), (21, 317)])
def test_lens_samples_of_the_disc(side: int, count: int) -> None:
    points = Aperture().lens_samples(side, dtype=torch.float64)
    assert points.shape == (count, 2)
    assert points.square().sum(1).max() <= 1 + 1e-9
    torch.testing.assert_close(points.mean(0), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("blades", [3, 5, 6, 9])
def test_blades_cut_the_area_of_a_polygon(blades: int) -> None:
    polygon = Aperture(blades, rotation=13.0).lens_samples(401)
    disc = Aperture().lens_samples(401)
    area = blades / 2 * math.sin(2 * math.pi / blades) / math.pi
    assert len(polygon) / len(disc) == pytest.approx(area, rel=0.02)


def test_roundness_goes_from_blades_to_disc() -> None:
    straight, bent, full = (
        len(Aperture(5, roundness=r).lens_samples(201)) for r in (0.0, 0.5, 1.0)
    )
    assert straight < bent < full == len(Aperture().lens_samples(201))


def test_near_side_shows_the_opening_turned_around() -> None:
    aperture = Aperture(5, rotation=7.0)
    near, far = aperture.kernel(9.0), aperture.kernel(-9.0)
    torch.testing.assert_close(near, far.flip(0, 1))
    assert not torch.allclose(near, far)
    assert not aperture.is_symmetric and Aperture(6).is_symmetric


def test_a_corner_points_where_the_rotation_says() -> None:
    points = Aperture(3, rotation=90.0).lens_samples(201, dtype=torch.float64)
    lowest_on_screen = points[points[:, 1].argmax()]
    torch.testing.assert_close(lowest_on_screen, torch.tensor([0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"blades": 2}, "at least 3"),
        ({"blades": 5.5}, "whole number"),
        ({"blades": 5, "roundness": 1.5}, "roundness"),
        ({"blades": 5, "rotation": math.nan}, "finite angle"),
    ],
)
def test_impossible_openings_are_refused(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Aperture(**arguments)


def test_impossible_samples_and_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="whole number"):
        Aperture().lens_samples(0)
    with pytest.raises(ValueError, match="no point inside"):
        Aperture().lens_samples(2)
    with pytest.raises(ValueError, match="finite"):
        Aperture().kernel(math.inf)

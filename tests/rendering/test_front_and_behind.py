"""Both sides of the plane in focus, each blurred on its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bokehdiff.rendering.front_and_behind import front_and_behind
from bokehdiff.rendering.gaussian_pyramid import gaussian_pyramid_blur

LEVELS = 5


def two_halves(left: float, right: float) -> torch.Tensor:
    """(1, 1, 64, 128) of two values."""
    values = torch.full((1, 1, 64, 128), left)
    values[..., 64:] = right
    return values


def sides_of(light: torch.Tensor, defocus: torch.Tensor):
    blurred = gaussian_pyramid_blur(light, defocus, levels=LEVELS)
    return front_and_behind(light, defocus, blurred, levels=LEVELS)


def test_uniform_light_stays_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    defocus = 20 * torch.rand(1, 1, 64, 128, generator=generator) - 10
    sides = sides_of(torch.full((1, 3, 64, 128), 0.3), defocus)
    for colour in (sides.front, sides.behind):
        assert (colour - 0.3).abs().max() < 1e-6
    for coverage in (sides.front_coverage, sides.behind_coverage):
        assert float(coverage.min()) >= 0 and float(coverage.max()) <= 1 + 1e-6


def test_background_does_not_take_the_colour_of_a_sharp_thing_before_it() -> None:
    light = two_halves(0.2, 1.0).expand(1, 3, 64, 128)
    defocus = two_halves(-12.0, 0.0)  # dark background, bright thing in focus
    whole = gaussian_pyramid_blur(light, defocus, levels=LEVELS)
    sides = sides_of(light, defocus)
    beside = (0, 0, 32, 60)  # four pixels from the edge
    assert float(whole[beside]) > 0.35
    assert float(sides.behind[beside]) == pytest.approx(0.2, abs=0.03)


def test_a_near_thing_throws_light_beyond_its_outline() -> None:
    light = two_halves(1.0, 0.1).expand(1, 3, 64, 128)
    defocus = two_halves(12.0, 0.0)  # bright thing in front, dark plane in focus
    sides = sides_of(light, defocus)
    coverage = sides.front_coverage[0, 0, 32]
    assert float(coverage[64 + 4]) > 0.15 and float(coverage[64 + 30]) < 0.01
    assert bool((coverage.diff() < 1e-4).all())
    assert float(sides.front[0, 0, 32, 64 + 4]) > 0.75
    assert float(sides.behind_coverage.max()) < 1e-6


def test_it_is_the_normalised_gaussian_of_each_side() -> None:
    """Against direct convolutions in float64, where one radius holds for the whole side."""
    generator = torch.Generator().manual_seed(3)
    soft = F.interpolate(torch.rand(1, 3, 8, 16, generator=generator), (64, 128), mode="bicubic")
    light = soft.clamp(0, 1)
    radius = 8.0
    defocus = two_halves(-radius, radius)
    sides = sides_of(light, defocus)
    places = torch.arange(-32, 33, dtype=torch.float64)
    kernel = torch.exp(-places.square() / (2 * (radius / 2) ** 2))
    kernel /= kernel.sum()

    def gaussian(picture: torch.Tensor) -> torch.Tensor:
        channels = picture.shape[1]
        wide = F.pad(picture.double(), (32,) * 4, mode="replicate")
        weight = kernel.expand(channels, 1, -1)
        wide = F.conv2d(wide, weight[..., None], groups=channels)
        return F.conv2d(wide, weight[:, :, None], groups=channels)

    for colour, coverage, sign in (
        (sides.front, sides.front_coverage, 1),
        (sides.behind, sides.behind_coverage, -1),
    ):
        belongs = (sign * defocus).clamp(0, 1)
        expected = gaussian(belongs)
        # Cells of two pixels, and borders of which cells are repeated and not pixels.
        assert (coverage - expected)[..., 8:-8, 8:-8].abs().max() < 0.03
        seen = expected > 0.3
        normalised = gaussian(light * belongs) / expected.clamp_min(1e-9)
        off = ((colour - normalised).abs() * seen)[..., 8:-8, 8:-8]
        assert off.max() < 0.06 and off.mean() < 0.01


def test_gradients_are_finite() -> None:
    generator = torch.Generator().manual_seed(5)
    light = torch.rand(1, 3, 32, 32, generator=generator, requires_grad=True)
    defocus = (8 * torch.rand(1, 1, 32, 32, generator=generator) - 4).requires_grad_()
    blurred = gaussian_pyramid_blur(light, defocus, levels=LEVELS)
    sum(part.sum() for part in front_and_behind(light, defocus, blurred, levels=LEVELS)).backward()
    for leaf in (light, defocus):
        assert leaf.grad is not None and bool(torch.isfinite(leaf.grad).all())

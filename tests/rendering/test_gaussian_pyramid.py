"""The pyramid of Gaussians against direct ones; what else it does: test_flow_renderers.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from bokehdiff.rendering.gaussian_pyramid import gaussian_pyramid_blur, levels_for

DOUBLE = {"dtype": torch.float64}


def under_gaussian(picture: torch.Tensor, deviation: float) -> torch.Tensor:
    """The picture under a Gaussian at full resolution, its border repeated."""
    reach = math.ceil(6 * deviation)
    places = torch.arange(-reach, reach + 1, **DOUBLE)
    weights = torch.exp(-places.square() / (2 * deviation**2))
    weights = (weights / weights.sum()).expand(picture.shape[1], 1, 1, -1)
    wide = F.pad(picture, (reach,) * 4, mode="replicate")
    wide = F.conv2d(wide, weights, groups=picture.shape[1])
    return F.conv2d(wide, weights.transpose(2, 3), groups=picture.shape[1])


def plain_twin(light: torch.Tensor, signed_defocus: torch.Tensor, levels: int) -> torch.Tensor:
    """Float64: Gaussians of 0, 1, 2, 4, ... pixels, mixed for the variance each pixel wants."""
    deviations = [0.0, *(2.0**number for number in range(levels))]
    pictures = [light, *(under_gaussian(light, deviation) for deviation in deviations[1:])]
    wanted = (signed_defocus.square() / 4).clamp(max=deviations[-1] ** 2)
    blurred = torch.zeros_like(light)
    for number, picture in enumerate(pictures):
        here = deviations[number] ** 2
        share = torch.ones_like(wanted)
        if number > 0:
            before = deviations[number - 1] ** 2
            share = torch.minimum(share, (wanted - before) / (here - before))
        if number < levels:
            after = deviations[number + 1] ** 2
            share = torch.minimum(share, (after - wanted) / (after - here))
        blurred = blurred + share.clamp_min(0) * picture
    return blurred


def smooth(height: int, width: int, cell: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // cell, width // cell, generator=generator, **DOUBLE)
    return F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)


def test_is_the_plain_twin_where_it_works_on_pixels() -> None:
    """Circles up to 2 px need only the Gaussian of 1 px, whose cells are pixels."""
    light = torch.rand(1, 3, 31, 37, generator=torch.Generator().manual_seed(1), **DOUBLE)
    defocus = torch.linspace(-2, 2, 37, **DOUBLE).expand(1, 1, 31, 37)
    ours = gaussian_pyramid_blur(light, defocus, levels=4)
    torch.testing.assert_close(ours, plain_twin(light, defocus, 4), atol=2e-4, rtol=0)


@pytest.mark.parametrize("radius", [3.0, 4.0, 11.0, 32.0])
@pytest.mark.parametrize("kind", ["noise", "smooth", "edge"])
def test_close_to_the_plain_twin_inside_of_the_frame(radius: float, kind: str) -> None:
    generator = torch.Generator().manual_seed(2)
    light = {
        "noise": torch.rand(1, 1, 160, 160, generator=generator, **DOUBLE),
        "smooth": smooth(160, 160),
        "edge": (torch.arange(160) > 77).double().expand(1, 1, 160, 160),
    }[kind]
    defocus = torch.full_like(light[:, :1], -radius)
    difference = gaussian_pyramid_blur(light, defocus, levels=5) - plain_twin(light, defocus, 5)
    difference = difference[..., 48:-48, 48:-48].abs()
    assert difference.max() < 0.02 and difference.square().mean().sqrt() < 0.01


@pytest.mark.parametrize("height", [128, 101])
@pytest.mark.parametrize("radius", [4.0, 31.0])
def test_close_to_the_plain_twin_at_the_border(radius: float, height: int) -> None:
    """Whole cells are repeated beyond the frame instead of pixels: little of a soft picture."""
    light = smooth(height, 131, 16)
    defocus = torch.full((1, 1, height, 131), radius, **DOUBLE)
    difference = gaussian_pyramid_blur(light, defocus, levels=5) - plain_twin(light, defocus, 5)
    assert difference.abs().max() < 0.15 and difference.square().mean().sqrt() < 0.03


def test_every_pixel_has_the_blur_of_its_own_radius() -> None:
    light = smooth(96, 120)
    x = torch.linspace(-1, 1, 120, **DOUBLE).expand(1, 1, 96, 120)
    defocus = torch.where(x > 0.2, 14 * x, 9 * x.square())
    plain = plain_twin(light, defocus, 5)
    for sides in (defocus, -defocus):
        difference = gaussian_pyramid_blur(light, sides, levels=5) - plain
        assert difference.square().mean().sqrt() < 0.01


@pytest.mark.parametrize("radius", [0.5, 1.0, 2.0, 3.0, 7.0, 20.0, 31.0, 60.0])
def test_a_point_spreads_as_far_as_its_circle(radius: float) -> None:
    size, levels = 400, levels_for(radius)
    for place in (200, 213):
        light = torch.zeros(1, 1, size, size, **DOUBLE)
        light[..., place, 200] = 1
        spread = gaussian_pyramid_blur(light, torch.full_like(light, radius), levels=levels)[0, 0]
        assert float(spread.sum()) == pytest.approx(1, abs=1e-4)
        profile, at = spread.sum(1), torch.arange(size, **DOUBLE)
        mean = float((profile * at).sum() / profile.sum())
        variance = float((profile * (at - mean).square()).sum() / profile.sum())
        assert math.sqrt(variance) == pytest.approx(radius / 2, rel=0.012)
        assert mean == pytest.approx(place, abs=0.01 * radius + 1e-9)


def test_an_even_ramp_stays_an_even_ramp() -> None:
    """No steps of the coarse cells are left in what is smooth."""
    ramp = torch.linspace(0, 1, 160, **DOUBLE).expand(1, 1, 160, 160)
    for radius in (2.0, 6.0, 16.0, 30.0):
        blurred = gaussian_pyramid_blur(ramp, torch.full_like(ramp, radius), levels=5)
        inside = (..., slice(64, -64), slice(64, -64))
        torch.testing.assert_close(blurred[inside], ramp[inside], atol=2e-4, rtol=0)
        slopes = blurred[inside].diff(dim=-1)
        assert float(slopes.min()) > 0.97 / 159 and float(slopes.max()) < 1.03 / 159


def test_larger_circles_are_rendered_with_the_largest() -> None:
    light = smooth(64, 64)
    largest = gaussian_pyramid_blur(light, torch.full((1, 1, 64, 64), 8.0, **DOUBLE), levels=3)
    beyond = gaussian_pyramid_blur(light, torch.full((1, 1, 64, 64), 50.0, **DOUBLE), levels=3)
    assert torch.equal(largest, beyond)


@pytest.mark.parametrize("radius", [0.0, 1.0, 2.0, 2.1, 4.0, 31.0, 32.0, 33.0, 96.0])
def test_levels_reach_as_far_as_the_largest_circle_and_no_farther(radius: float) -> None:
    levels = levels_for(radius)
    assert 2**levels >= radius and (levels == 1 or 2 ** (levels - 1) < radius)


@pytest.mark.parametrize("levels", [0, -3])
def test_no_levels_are_refused(levels: int) -> None:
    with pytest.raises(ValueError, match=f"levels is {levels}; wanted at least 1"):
        gaussian_pyramid_blur(torch.rand(1, 3, 8, 8), torch.rand(1, 1, 8, 8), levels=levels)

"""The fast preview: what it shares with the layered renderer, and where it may differ."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from bokehdiff.rendering import Aperture, layered_blur, pyramid_blur
from bokehdiff.rendering.pyramid import coarse_slices

DOUBLE = {"dtype": torch.float64}


def smooth_picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 6, width // 6, generator=generator, **DOUBLE)
    return F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)


def test_slices_ascend_around_the_focus_and_their_radius_is_a_few_cells() -> None:
    slices = coarse_slices(torch.linspace(-90, 40, 50)[None])
    levels = [one.defocus for one in slices]
    assert levels == sorted(levels) and 0.0 in levels
    assert levels[0] <= -90 and levels[-1] >= 40
    for one in slices:
        assert one.cell & (one.cell - 1) == 0, "a power of two"
        assert abs(one.defocus) < 8 * one.cell and (
            one.cell == 1 or abs(one.defocus) >= 4 * one.cell
        )


@pytest.mark.parametrize("radius", [100.0, 400.0])
def test_the_number_of_slices_grows_with_the_logarithm_of_the_blur(radius: float) -> None:
    few = len(coarse_slices(torch.tensor([[-50.0, 50.0]])))
    many = len(coarse_slices(torch.tensor([[-radius, radius]])))
    doublings = math.log2(radius / 50)
    # Slices are 20 % apart: 3.8 for each doubling, on each side.
    assert many - few == pytest.approx(2 * doublings * math.log(2) / math.log(1.2), abs=2)


@pytest.mark.parametrize("radius", [5.0, 12.0, 30.0])
def test_close_to_the_layered_renderer(radius: float) -> None:
    light = smooth_picture(48, 60)
    x = torch.linspace(-1, 1, 60, **DOUBLE).expand(1, 1, 48, 60)
    defocus = 0.5 * radius * x
    defocus = torch.where(x.abs() < 0.4, radius, defocus)
    preview, exact = pyramid_blur(light, defocus), layered_blur(light, defocus)
    error = (preview - exact).square().mean().sqrt().item()
    blurred_away = (light - exact).square().mean().sqrt().item()
    assert error < 0.02 and error < blurred_away / 5


@pytest.mark.parametrize("signed", [-9.0, 17.0, -24.0])
def test_wide_discs_have_their_radius_although_their_rims_are_soft(signed: float) -> None:
    light = torch.zeros(1, 1, 97, 97, **DOUBLE)
    # A dark grey floor keeps the patch from being a spark, which is drawn as exactly as elsewhere.
    light += 0.2
    light[..., 48, 48] = 1.0
    spread = pyramid_blur(light, torch.full_like(light, signed))[0, 0] - 0.2
    assert spread.sum().item() == pytest.approx(0.8, rel=1e-6)
    x = torch.arange(97, **DOUBLE)
    middle = (spread.sum(0) @ x / 0.8).item()
    moment = (spread.sum(0) @ (x - middle) ** 2 / 0.8).item() - 1 / 12
    # A point between two slices is spread over both: up to (20 % / 2)^2 / 2 more.
    assert 2 * math.sqrt(moment) == pytest.approx(abs(signed), rel=0.02)
    # Its place is that of the cell, of a quarter of the radius at most.
    assert middle == pytest.approx(48, abs=abs(signed) / 8)


def test_a_lamp_in_the_dark_is_as_sharp_as_in_the_layered_renderer() -> None:
    light = torch.zeros(1, 1, 61, 61, **DOUBLE)
    light[..., 30, 30] = 1.0
    defocus = torch.full_like(light, -20.0)
    preview, exact = pyramid_blur(light, defocus), layered_blur(light, defocus)
    assert (preview - exact).abs().sum() < 0.02


def smooth_surface() -> tuple[torch.Tensor, torch.Tensor]:
    """Light, and a defocus of which no two neighbouring slopes are equal (where a kink is)."""
    x, y = torch.linspace(-1, 1, 22, **DOUBLE), torch.linspace(-1, 1, 20, **DOUBLE)[:, None]
    defocus = 2.8 + 1.1 * x + 0.22 * x**2 + 0.7 * y + 0.1 * y**2 + 0.5 * x * y
    return 0.05 + smooth_picture(20, 22), defocus[None, None]


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("aperture", [Aperture(), Aperture(5, spherical=0.5)])
def test_gradients_are_those_of_finite_differences(aperture: Aperture, side: int) -> None:
    light, defocus = smooth_surface()
    defocus = 3 * side * defocus  # wide enough for cells of two pixels
    upstream = torch.randn(light.shape, generator=torch.Generator().manual_seed(1), **DOUBLE)
    inputs = (light.requires_grad_(), defocus.requires_grad_())
    gradients = torch.autograd.grad(pyramid_blur(*inputs, aperture=aperture), inputs, upstream)
    for number, gradient in enumerate(gradients):
        generator = torch.Generator().manual_seed(2)
        direction = torch.randn(gradient.shape, generator=generator, **DOUBLE)
        ends = []
        for step in (-1e-6, 1e-6):
            moved = [given.detach() for given in inputs]
            moved[number] = moved[number] + step * direction
            ends.append((pyramid_blur(*moved, aperture=aperture) * upstream).sum())
        change = (ends[1] - ends[0]) / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), change, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("light", "defocus", "words"),
    [
        (torch.rand(3, 8, 8), torch.rand(1, 1, 8, 8), r"wanted \(B, C, H, W\)"),
        (torch.rand(0, 3, 8, 8), torch.rand(0, 1, 8, 8), r"wanted \(B, C, H, W\)"),
        (torch.rand(1, 3, 8, 8).half(), torch.rand(1, 1, 8, 8), "float32 or float64"),
        (torch.rand(1, 3, 8, 8), torch.rand(1, 1, 8, 9), "to match light"),
        (torch.rand(1, 3, 8, 8), torch.full((1, 1, 8, 8), math.nan), "finite"),
        (torch.rand(1, 3, 8, 8), torch.full((1, 1, 8, 8), 9000.0), "radius of 9000 px"),
    ],
)
def test_mistakes_are_refused(light: torch.Tensor, defocus: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pyramid_blur(light, defocus)

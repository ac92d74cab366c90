"""Blur in bins of equal radius, against a plain twin; what else it does: test_flow_renderers.py."""

from __future__ import annotations

import math

import pytest
import torch

from bokehdiff.rendering import Aperture, layered_blur
from bokehdiff.rendering.defocus_levels import DefocusLevels, share_of_level
from bokehdiff.rendering.radius_bins import binned_blur
from tests.apertures import SAME_EVERYWHERE as APERTURES
from tests.levels_twin import bins_around, crossing_case, divided, scattered

EVERY_APERTURE = pytest.mark.parametrize("aperture", APERTURES.values(), ids=APERTURES.keys())


def plain_twin(
    light: torch.Tensor, signed_defocus: torch.Tensor, aperture: Aperture, bin_px: float
) -> torch.Tensor:
    results = []
    for picture, defocus in zip(light, signed_defocus[:, 0], strict=True):
        place = defocus.abs() if aperture.is_symmetric else defocus
        bins = bins_around(place, bin_px)
        results.append(divided(scattered(picture, place, bins, aperture).sum(0), picture))
    return torch.stack(results)


@pytest.mark.parametrize("bin_px", [1.0, 2.0, 3.7])
@EVERY_APERTURE
def test_agrees_with_the_plain_twin(aperture: Aperture, bin_px: float) -> None:
    light, defocus = crossing_case()
    ours = binned_blur(light, defocus, aperture=aperture, bin_px=bin_px)
    plain = plain_twin(light, defocus, aperture, bin_px)
    torch.testing.assert_close(ours, plain, atol=1e-11, rtol=1e-11)


def test_agrees_with_the_plain_twin_in_a_batch_of_different_blur() -> None:
    light, defocus = crossing_case(3)
    defocus = defocus * torch.tensor([-2.0, 0.0, 0.3], dtype=torch.float64).view(3, 1, 1, 1)
    ours = binned_blur(light, defocus)
    torch.testing.assert_close(ours, plain_twin(light, defocus, Aperture(), 2.0))


def test_gradients_are_those_of_the_plain_twin() -> None:
    light, defocus = crossing_case()
    light, defocus = light.requires_grad_(), defocus.requires_grad_()
    upstream = torch.randn(light.shape, generator=torch.Generator().manual_seed(1)).double()
    ours = binned_blur(light, defocus, aperture=Aperture(5))
    plain = plain_twin(light, defocus, Aperture(5), 2.0)
    for one, other in zip(
        torch.autograd.grad(ours, (light, defocus), upstream),
        torch.autograd.grad(plain, (light, defocus), upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_single_precision_is_close_to_the_plain_twin() -> None:
    light, defocus = crossing_case()
    ours = binned_blur(light.float(), defocus.float())
    plain = plain_twin(light.float().double(), defocus.float().double(), Aperture(), 2.0)
    # A few units of the last digit of the brightest spot.
    torch.testing.assert_close(ours.double(), plain, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("bins_at_once", [1, 2, 5])
def test_bins_transformed_together_or_apart_give_the_same(
    bins_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    light, defocus = crossing_case(2)
    together = binned_blur(light, 3 * defocus)
    levels = DefocusLevels(light, 3 * defocus, [0.0, 14.0], None)
    values = bins_at_once * levels.channels.shape[0] * 4 * levels.size[0] * levels.size[1]
    monkeypatch.setattr("bokehdiff.rendering.defocus_levels.VALUES_AT_ONCE", {"cpu": values})
    torch.testing.assert_close(binned_blur(light, 3 * defocus), together, atol=1e-12, rtol=0)


@pytest.mark.parametrize("radius", [4.0, 10.0])
@EVERY_APERTURE
@pytest.mark.parametrize("side", [1, -1])
def test_a_point_becomes_the_opening(aperture: Aperture, radius: float, side: int) -> None:
    light = torch.zeros(1, 1, 41, 45, dtype=torch.float64)
    light[..., 20, 22] = 1
    spread = binned_blur(light, torch.full_like(light, side * radius), aperture=aperture)[0, 0]
    # A share of 1e-4 is the point's own light.
    spread = (1 + 1e-4) * spread - 1e-4 * light[0, 0]
    kernel = aperture.kernel(side * radius, dtype=torch.float64)
    reach = len(kernel) // 2
    here = spread[20 - reach : 21 + reach, 22 - reach : 23 + reach]
    torch.testing.assert_close(here, kernel, atol=1e-12, rtol=0)


def test_shares_sum_to_one_and_keep_the_mean_square() -> None:
    levels = [-9.0, -4.0, -1.5, 0.0, 2.0, 7.0]
    defocus = torch.linspace(-9, 7, 400, dtype=torch.float64)
    shares = torch.stack([share_of_level(defocus, levels, n) for n in range(len(levels))])
    assert (shares >= 0).all() and ((shares > 0).sum(0) <= 2).all()
    torch.testing.assert_close(shares.sum(0), torch.ones_like(defocus))
    squares = torch.tensor(levels, dtype=torch.float64).square()
    torch.testing.assert_close(squares @ shares, defocus.square())
    beyond = torch.tensor([-20.0, 20.0])
    assert share_of_level(beyond, levels, 0).tolist() == [1, 0]
    assert share_of_level(beyond, levels, 5).tolist() == [0, 1]


def test_finer_bins_come_closer_to_every_pixel_having_its_own_circle() -> None:
    light = torch.rand(1, 3, 40, 48, generator=torch.Generator().manual_seed(2)).double()
    defocus = torch.linspace(0.5, 6, 48, dtype=torch.float64).expand(1, 1, 40, 48)
    exact = binned_blur(light, defocus, bin_px=0.25)
    errors = [
        float((binned_blur(light, defocus, bin_px=width) - exact).square().mean())
        for width in (0.5, 1.0, 2.0, 4.0)
    ]
    assert errors == sorted(errors) and errors[0] < errors[-1] / 20


def test_one_even_plane_is_what_the_layered_renderer_makes_of_it() -> None:
    light = torch.rand(1, 3, 60, 64, generator=torch.Generator().manual_seed(3)).double()
    defocus = torch.full((1, 1, 60, 64), -6.0, dtype=torch.float64)
    ours, exact = binned_blur(light, defocus), layered_blur(light, defocus)
    difference = (ours - exact)[..., 8:-8, 8:-8].abs().max()
    assert difference < 0.02 < float((light - exact)[..., 8:-8, 8:-8].abs().max()) / 10


@pytest.mark.parametrize("bin_px", [0.0, 0.1, -2.0, math.inf, math.nan])
def test_bins_without_width_are_refused(bin_px: float) -> None:
    with pytest.raises(ValueError, match=r"bin_px is .*; wanted the pixels of radius"):
        binned_blur(*crossing_case(), bin_px=bin_px)


def test_an_opening_that_differs_between_places_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cat_eye=0.5\) differs between places.*render_bokeh"):
        binned_blur(*crossing_case(), aperture=Aperture(cat_eye=0.5))

"""Layers painted over one another, against a plain twin; what else: test_flow_renderers.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from bokehdiff.rendering import Aperture, layered_blur
from bokehdiff.rendering.painted_layers import layer_levels, painted_layers_blur
from bokehdiff.rendering.radius_bins import binned_blur
from tests.apertures import SAME_EVERYWHERE as APERTURES
from tests.levels_twin import crossing_case, divided, scattered

EVERY_APERTURE = pytest.mark.parametrize("aperture", APERTURES.values(), ids=APERTURES.keys())


def plain_twin(
    light: torch.Tensor, signed_defocus: torch.Tensor, aperture: Aperture, layers: int
) -> torch.Tensor:
    """Every layer is dimmed by all that are nearer, its neighbour excepted."""
    results = []
    for picture, defocus in zip(light, signed_defocus[:, 0], strict=True):
        levels = layer_levels(defocus, layers)
        arriving = scattered(picture, defocus, levels, aperture)
        sums = torch.zeros_like(arriving[0])
        for number in range(len(levels)):
            passing = torch.ones_like(arriving[0, -1])
            for nearer in range(number + 2, len(levels)):
                passing = passing * (1 - arriving[nearer, -1])
            sums = sums + passing * arriving[number]
        results.append(divided(sums, picture))
    return torch.stack(results)


@pytest.mark.parametrize("layers", [3, 5, 8])
@EVERY_APERTURE
def test_agrees_with_the_plain_twin(aperture: Aperture, layers: int) -> None:
    light, defocus = crossing_case()
    ours = painted_layers_blur(light, defocus, aperture=aperture, layers=layers)
    plain = plain_twin(light, defocus, aperture, layers)
    torch.testing.assert_close(ours, plain, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("scale", [-2.0, 0.0, 0.2])
def test_agrees_with_the_plain_twin_for_much_and_little_blur(scale: float) -> None:
    light, defocus = crossing_case(2)
    defocus = torch.cat([scale * defocus[:1], 3 + 0.5 * defocus[1:]])
    ours = painted_layers_blur(light, defocus)
    torch.testing.assert_close(ours, plain_twin(light, defocus, Aperture(), 8))


def test_gradients_are_those_of_the_plain_twin() -> None:
    light, defocus = crossing_case()
    light, defocus = light.requires_grad_(), defocus.requires_grad_()
    upstream = torch.randn(light.shape, generator=torch.Generator().manual_seed(1)).double()
    ours = painted_layers_blur(light, defocus, aperture=Aperture(5))
    plain = plain_twin(light, defocus, Aperture(5), 8)
    for one, other in zip(
        torch.autograd.grad(ours, (light, defocus), upstream),
        torch.autograd.grad(plain, (light, defocus), upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_single_precision_is_close_to_the_plain_twin() -> None:
    light, defocus = crossing_case()
    ours = painted_layers_blur(light.float(), defocus.float())
    plain = plain_twin(light.float().double(), defocus.float().double(), Aperture(), 8)
    torch.testing.assert_close(ours.double(), plain, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("layers", [3, 4, 8, 13])
@pytest.mark.parametrize(
    ("lowest", "highest"),
    [(-31, 20), (-0.3, 0.2), (0, 0), (0, 31), (-5, -3), (5, 31), (-31, 0.2), (-96, 96), (-7, -7)],
)
def test_layers_reach_over_all_pixels_and_one_is_in_focus(
    lowest: float, highest: float, layers: int
) -> None:
    levels = layer_levels(torch.tensor([lowest, highest]), layers)
    assert levels == sorted(set(levels)) and 2 <= len(levels) <= layers
    assert levels[0] <= lowest + 1e-6 and levels[-1] >= highest - 1e-6
    # The ends are whole pixels, of which nothing goes to waste.
    assert levels[0] > lowest - 1 and levels[-1] < max(highest, lowest) + 1 + 1e-6
    if lowest <= 0 <= highest:
        assert 0.0 in levels
    if highest - lowest > layers:
        assert len(levels) == layers


def test_a_sharp_foreground_hides_the_blurred_background() -> None:
    """Its rim stays as it is, where bins of radius let the background spill over it."""
    light = torch.zeros(1, 3, 40, 60)
    light[..., 30:] = 0.8
    defocus = torch.full((1, 1, 40, 60), -10.0)
    defocus[..., :30] = 0
    layered = painted_layers_blur(light, defocus)
    binned = binned_blur(light, defocus)
    assert layered[..., :30].max() < 1e-6
    assert binned[..., 29].min() > 0.2


def test_a_blurred_foreground_covers_what_is_in_focus_and_is_seen_through() -> None:
    light = torch.zeros(1, 1, 40, 60, dtype=torch.float64)
    light[..., 30:] = 1.0
    defocus = torch.zeros_like(light)
    defocus[..., 30:] = 8.0
    blurred = painted_layers_blur(light, defocus)[0, 0, 20]
    # Half the disc of the rim reaches over the background, and half of it is seen beyond.
    assert blurred[21].item() < 1e-3 < blurred[25].item() < blurred[29].item()
    assert blurred[29].item() == pytest.approx(0.5, abs=0.1)
    exact = layered_blur(light, defocus)[0, 0, 20]
    assert (blurred - exact)[:30].abs().max() < 0.05


@pytest.mark.parametrize("radius", [1.0, 2.6, 5.5, 12.0, 20.0, 26.0])
@pytest.mark.parametrize("side", [1, -1])
def test_planes_between_layers_have_their_circle(radius: float, side: int) -> None:
    """The mixture of two discs has the mean of their squares; the nearer does not win."""
    light = torch.zeros(1, 1, 90, 90, dtype=torch.float64)
    light[..., 45, 45] = 1
    defocus = torch.full_like(light, side * radius)
    defocus[..., 0, 0], defocus[..., -1, -1] = -31.0, 31.0
    levels = layer_levels(defocus, 8)
    spread = painted_layers_blur(light, defocus)[0, 0]
    place = torch.arange(90, dtype=torch.float64) - 45
    variance = float((spread.sum(0) * place.square()).sum() / spread.sum())
    assert variance == pytest.approx(radius**2 / 4, rel=0.01, abs=0.12)
    assert all(abs(level - side * radius) > 0.3 for level in levels), "none is at the plane"


def scene(seed: int, largest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Textured rectangles before a curved background, in focus at one of them."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 14, 16, generator=generator)
    light = F.interpolate(coarse, (56, 64), mode="bicubic").clamp(0, 1).square()
    disparity = 0.3 * F.interpolate(
        torch.rand(1, 1, 3, 3, generator=generator), (56, 64), mode="bicubic"
    )
    disparity[..., 10:40, 8:30] = 0.5
    disparity[..., 24:50, 22:52] = 1.0
    light[..., 10:40, 8:30] *= torch.tensor([0.3, 0.6, 0.9]).view(3, 1, 1)
    light[..., 24:50, 22:52] *= torch.tensor([0.9, 0.3, 0.4]).view(3, 1, 1)
    return light, largest * (disparity - 0.5)


@pytest.mark.parametrize("largest", [8.0, 20.0])
def test_few_layers_come_close_to_the_exact_renderer(largest: float) -> None:
    for seed in range(2):
        light, defocus = scene(seed, largest)
        exact = layered_blur(light, defocus)
        error = (painted_layers_blur(light, defocus) - exact).square().mean()
        without_blur = (light - exact).square().mean()
        assert -10 * math.log10(error) > 29 and error < without_blur / 6


@pytest.mark.parametrize("layers", [0, 2, -8])
def test_too_few_layers_are_refused(layers: int) -> None:
    with pytest.raises(ValueError, match=f"layers is {layers}; wanted at least 3"):
        painted_layers_blur(*crossing_case(), layers=layers)


def test_an_opening_that_differs_between_places_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cat_eye=0.5\) differs between places.*render_bokeh"):
        painted_layers_blur(*crossing_case(), aperture=Aperture(cat_eye=0.5))

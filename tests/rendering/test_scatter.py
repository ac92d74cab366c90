"""Depth-ordered scatter against its plain twin, and what light must do."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from bokehdiff.rendering import (
    Aperture,
    depth_ordered_scatter,
    render_layers,
    scatter_bokehme,
    scatter_reference,
)
from bokehdiff.rendering.scatter import defocus_of_level, quantise_defocus

DOUBLE = {"dtype": torch.float64}


def random_case(
    batch: int, height: int, width: int, radius: float, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 light (B, 3, H, W) and a defocus map with a flat near part over a rough far one."""
    generator = torch.Generator().manual_seed(seed)
    light = torch.rand(batch, 3, height, width, generator=generator, **DOUBLE)
    defocus = (torch.rand(batch, 1, height, width, generator=generator, **DOUBLE) - 0.7) * radius
    defocus[..., : width // 2] = 0.6 * radius
    return light, defocus


@pytest.mark.parametrize("aperture", [None, Aperture(5, rotation=10.0), Aperture(6, roundness=0.4)])
def test_agrees_with_the_plain_twin(aperture: Aperture | None) -> None:
    light, defocus = random_case(2, 11, 13, radius=5.0)
    ours = depth_ordered_scatter(light, defocus, aperture=aperture)
    plain = scatter_reference(light, defocus, aperture=aperture)
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-12)


def test_agrees_with_the_plain_twin_where_radii_exceed_the_picture() -> None:
    light, defocus = random_case(1, 5, 6, radius=15.0)
    ours, plain = depth_ordered_scatter(light, defocus), scatter_reference(light, defocus)
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("aperture", [None, Aperture(5)])
def test_gradient_of_the_light(aperture: Aperture | None) -> None:
    light, defocus = random_case(2, 9, 10, radius=5.0)
    light.requires_grad_()
    blurred = depth_ordered_scatter(light, defocus, aperture=aperture)
    upstream = torch.randn(light.shape, generator=torch.Generator().manual_seed(1), **DOUBLE)
    (gradient,) = torch.autograd.grad(blurred, light, upstream)
    # Scatter is linear in light, so the gradient has to be its transpose for any other light.
    other = torch.rand(light.shape, generator=torch.Generator().manual_seed(2), **DOUBLE)
    forward = (depth_ordered_scatter(other, defocus, aperture=aperture) * upstream).sum()
    torch.testing.assert_close((gradient * other).sum(), forward)
    for channel, y, x in [(0, 0, 0), (1, 4, 4), (2, 8, 9), (0, 5, 7)]:
        unit = torch.zeros_like(other)
        unit[1, channel, y, x] = 1
        forward = (depth_ordered_scatter(unit, defocus, aperture=aperture) * upstream).sum()
        torch.testing.assert_close(gradient[1, channel, y, x], forward)


def test_no_defocus_returns_the_light() -> None:
    light, defocus = random_case(1, 9, 8, radius=1.0)
    for amount in (0.0, 0.4):
        sharp = depth_ordered_scatter(light, defocus * 0 + amount)
        torch.testing.assert_close(sharp, light, atol=1e-15, rtol=0)


@pytest.mark.parametrize("signed", [6.5, -6.5])
@pytest.mark.parametrize("aperture", [Aperture(), Aperture(5)])
def test_a_point_of_light_becomes_the_kernel(signed: float, aperture: Aperture) -> None:
    light = torch.zeros(1, 1, 41, 41, **DOUBLE)
    light[..., 20, 20] = 1000.0
    blurred = depth_ordered_scatter(light, torch.full_like(light, signed), aperture=aperture)
    kernel = 1000 * aperture.kernel(signed, **DOUBLE)
    reach = kernel.shape[0] // 2
    expected = F.pad(kernel, (20 - reach,) * 4)[None, None]
    torch.testing.assert_close(blurred, expected, atol=1e-9, rtol=1e-9)
    assert blurred.sum().item() == pytest.approx(1000.0)


def test_uniform_light_stays_uniform() -> None:
    _, defocus = random_case(1, 20, 24, radius=9.0)
    light = torch.full((1, 3, 20, 24), 0.37, **DOUBLE)
    torch.testing.assert_close(depth_ordered_scatter(light, defocus), light)


def test_a_sharp_near_object_is_not_touched_by_the_blur_behind_it() -> None:
    light, _ = random_case(1, 24, 24, radius=1.0)
    defocus = torch.full((1, 1, 24, 24), -8.0, **DOUBLE)
    defocus[..., 8:16, 8:16] = 0.0
    blurred = depth_ordered_scatter(light, defocus)
    torch.testing.assert_close(blurred[..., 8:16, 8:16], light[..., 8:16, 8:16])


def test_swapping_near_and_far_moves_the_occlusion() -> None:
    light = torch.zeros(1, 1, 24, 24, **DOUBLE)
    light[..., 8:16, 8:16] = 1.0
    square_in_front = torch.full_like(light, -6.0)
    square_in_front[..., 8:16, 8:16] = 0.0
    far_side = depth_ordered_scatter(light, square_in_front)
    near_side = depth_ordered_scatter(light, square_in_front.neg())
    assert far_side[0, 0, 12, 8].item() == pytest.approx(1.0), "a sharp edge in front"
    assert near_side[0, 0, 12, 8].item() < 0.8, "the dark blur in front spills over it"


def test_blurred_near_object_spreads_over_the_sharp_background() -> None:
    light = torch.zeros(1, 1, 40, 40, **DOUBLE)
    light[..., :20] = 1.0
    defocus = torch.zeros_like(light)
    defocus[..., :20] = 6.0
    profile = depth_ordered_scatter(light, defocus)[0, 0, 20]
    assert (profile.diff() <= 1e-12).all()
    assert 0.05 < profile[22] < 0.5 and profile[27] < 1e-9


def test_close_to_the_ray_traced_truth() -> None:
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(1, 6, 9, 11, generator=generator, **DOUBLE)
    colours = F.interpolate(coarse, size=(64, 80), mode="bicubic").clamp(0, 1)
    colours = colours.view(1, 2, 3, 64, 80)
    alphas = torch.ones(1, 2, 1, 64, 80, **DOUBLE)
    alphas[:, 0, :, :, 40:] = 0
    planes = torch.tensor([[[0.0, 0.0, 1 / 0.8], [0.0, 0.0, 1 / 0.3]]], **DOUBLE)
    near = alphas[:, 0]
    photo, disparity = torch.lerp(colours[:, 1], colours[:, 0], near), 0.3 + 0.5 * near
    for df in (0.3, 0.8):
        truth = render_layers(colours, alphas, planes, df, 14.0, samples_per_side=25).image()
        blurred = depth_ordered_scatter(photo, 14.0 * (disparity - df))
        error = (blurred - truth)[..., 8:-8, 8:-8].square().mean().item()
        unblurred = (photo - truth)[..., 8:-8, 8:-8].square().mean().item()
        assert error < unblurred / 10


def test_batch_mates_and_repetition_do_not_change_a_bit() -> None:
    light, defocus = random_case(2, 15, 16, radius=6.0)
    defocus[1] *= 3
    together = depth_ordered_scatter(light, defocus)
    assert torch.equal(together, depth_ordered_scatter(light, defocus))
    assert torch.equal(together[:1], depth_ordered_scatter(light[:1], defocus[:1]))


def test_float32_is_kept_and_close_to_float64() -> None:
    light, defocus = random_case(1, 30, 31, radius=9.0)
    single = depth_ordered_scatter(light.float(), defocus)
    assert single.dtype == torch.float32
    exact = depth_ordered_scatter(light, defocus)
    torch.testing.assert_close(single.double(), exact, atol=1e-6, rtol=1e-6)


def test_levels_of_defocus_are_fine_ordered_and_symmetric() -> None:
    defocus = torch.linspace(-300, 300, 20001, **DOUBLE)
    levels = quantise_defocus(defocus)
    assert (levels.diff() >= 0).all()
    assert torch.equal(levels, -quantise_defocus(-defocus))
    meant = torch.tensor([defocus_of_level(level) for level in levels.tolist()], **DOUBLE)
    assert ((meant - defocus).abs() <= (defocus.abs() / 250).clamp_min(1 / 31)).all()


@pytest.mark.gpu
def test_gpu_agrees_with_the_processor() -> None:
    light, defocus = random_case(1, 40, 50, radius=9.0)
    there = depth_ordered_scatter(light.cuda(), defocus.cuda()).cpu()
    torch.testing.assert_close(there, depth_ordered_scatter(light, defocus))


def test_bokehme_scatter_keeps_uniform_light_and_dilates_the_near_side() -> None:
    defocus = torch.full((1, 1, 12, 12), -1.5, **DOUBLE)
    defocus[..., 6, 6] = 2.7
    bokeh, dilated, weight = scatter_bokehme(torch.full((1, 3, 12, 12), 0.2, **DOUBLE), defocus)
    torch.testing.assert_close(bokeh, torch.full_like(bokeh, 0.2))
    y, x = torch.meshgrid(torch.arange(12) - 6, torch.arange(12) - 6, indexing="ij")
    assert torch.equal(dilated[0, 0] == 2, torch.hypot(x.double(), y.double()) <= 2.7)
    assert (weight > 0).all()


@pytest.mark.parametrize(
    ("light", "defocus", "words"),
    [
        (torch.rand(3, 8, 8), torch.rand(1, 1, 8, 8), r"wanted \(B, C, H, W\)"),
        (torch.rand(1, 3, 8, 8).half(), torch.rand(1, 1, 8, 8), "float32 or float64"),
        (torch.rand(1, 3, 8, 8), torch.rand(1, 1, 8, 9), "to match light"),
        (torch.rand(1, 3, 8, 8), torch.full((1, 1, 8, 8), math.nan), "finite"),
        (torch.rand(1, 3, 8, 8), torch.full((1, 1, 8, 8), 9000.0), "radius of 9000 px"),
    ],
)
def test_mistakes_are_refused(light: torch.Tensor, defocus: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        depth_ordered_scatter(light, defocus)

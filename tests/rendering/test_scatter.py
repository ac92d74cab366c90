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
from bokehdiff.rendering.scatter import (
    MOST_CELLS,
    cells_of_field,
    defocus_of_level,
    middle_of_cell,
    quantise_defocus,
)
from tests.apertures import PICTURE, SAME_EVERYWHERE

DOUBLE = {"dtype": torch.float64}
APERTURES = {
    **SAME_EVERYWHERE,
    "rounded hexagon": Aperture(6, roundness=0.4),
    "cat-eye": Aperture(cat_eye=0.25),
    "cream": Aperture(7, obstruction=0.2, spherical=-1.0),
    "all": Aperture(5, rotation=10.0, squeeze=0.8, cat_eye=0.25, spherical=0.5, picture=PICTURE),
}
EVERY_APERTURE = pytest.mark.parametrize("aperture", APERTURES.values(), ids=APERTURES.keys())


def random_case(
    batch: int, height: int, width: int, radius: float, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 light (B, 3, H, W) and a defocus map with a flat near part over a rough far one."""
    generator = torch.Generator().manual_seed(seed)
    light = torch.rand(batch, 3, height, width, generator=generator, **DOUBLE)
    defocus = (torch.rand(batch, 1, height, width, generator=generator, **DOUBLE) - 0.7) * radius
    defocus[..., : width // 2] = 0.6 * radius
    return light, defocus


@EVERY_APERTURE
def test_agrees_with_the_plain_twin(aperture: Aperture) -> None:
    light, defocus = random_case(2, 11, 13, radius=5.0)
    ours = depth_ordered_scatter(light, defocus, aperture=aperture)
    plain = scatter_reference(light, defocus, aperture=aperture)
    # Running sums of third differences lose some digits.
    tolerance = 1e-12 if aperture.spherical == 0 else 1e-9
    torch.testing.assert_close(ours, plain, atol=tolerance, rtol=tolerance)


def test_agrees_with_the_plain_twin_where_every_cell_has_its_kernel() -> None:
    light, defocus = random_case(1, 9, 12, radius=6.0)
    aperture = Aperture(cat_eye=1.0, obstruction=0.3)
    assert cells_of_field(aperture, 6.0, 9, 12) == (8, 10)
    ours = depth_ordered_scatter(light, defocus, aperture=aperture)
    plain = scatter_reference(light, defocus, aperture=aperture)
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-12)


def test_agrees_with_the_plain_twin_over_several_bands() -> None:
    """A wide slice is summed up in bands; the twin looks at a few pixels of the far ends."""
    generator = torch.Generator().manual_seed(5)
    light = torch.rand(1, 1, 300, 300, generator=generator, **DOUBLE)
    defocus = torch.full_like(light, 1.8)
    defocus[..., 40:60, 250:] = -2.7
    blurred = depth_ordered_scatter(light, defocus)
    for rows, columns in ((slice(0, 12), slice(0, 12)), (slice(50, 70), slice(240, 260))):
        crop = (..., rows, columns)
        plain = scatter_reference(light[crop], defocus[crop])
        inner = (..., slice(4, -4), slice(4, -4))
        torch.testing.assert_close(blurred[crop][inner], plain[inner], atol=1e-12, rtol=1e-12)


def test_agrees_with_the_plain_twin_where_radii_exceed_the_picture() -> None:
    light, defocus = random_case(1, 5, 6, radius=15.0)
    ours, plain = depth_ordered_scatter(light, defocus), scatter_reference(light, defocus)
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["disc", "pentagon", "cat-eye", "bubble", "all"])
def test_gradient_of_the_light(name: str) -> None:
    aperture = APERTURES[name]
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


@EVERY_APERTURE
def test_no_defocus_returns_the_light(aperture: Aperture) -> None:
    light, defocus = random_case(1, 9, 8, radius=1.0)
    # Less than half the first level of defocus is none.
    for amount in (0.0, 0.03, -0.03):
        sharp = depth_ordered_scatter(light, defocus * 0 + amount, aperture=aperture)
        # A sum of third differences along a row is exact to a few units of its last digits.
        torch.testing.assert_close(sharp, light, atol=1e-15 if aperture.is_flat else 1e-12, rtol=0)


@pytest.mark.parametrize("signed", [0.375, 4.5, -4.5])
@EVERY_APERTURE
def test_a_point_of_light_becomes_the_kernel(signed: float, aperture: Aperture) -> None:
    light = torch.zeros(1, 1, 41, 41, **DOUBLE)
    place = (10, 30)  # in the middle of a cell of the field, at the top right
    light[..., place[0], place[1]] = 1000.0
    blurred = depth_ordered_scatter(light, torch.full_like(light, signed), aperture=aperture)
    cells = cells_of_field(aperture, signed, 41, 41)
    assert cells in ((1, 1), (2, 2))
    field = middle_of_cell(0, cells[1] - 1, cells, 41, 41)
    kernel = 1000 * aperture.kernel(signed, field=field, **DOUBLE)
    reach = kernel.shape[0] // 2
    expected = torch.zeros_like(light)
    expected[
        ...,
        place[0] - reach : place[0] + reach + 1,
        place[1] - reach : place[1] + reach + 1,
    ] = kernel
    torch.testing.assert_close(blurred, expected, atol=1e-6, rtol=1e-6)
    assert blurred.sum().item() == pytest.approx(1000.0, rel=1e-7)
    single = depth_ordered_scatter(
        light.float(), torch.full_like(light, signed).float(), aperture=aperture
    )
    assert single.sum().item() == pytest.approx(1000.0, rel=1e-5)


@pytest.mark.parametrize("radius", [3.0, 6.4, 11.0])
def test_a_point_of_light_has_the_area_and_the_radius_of_the_disc(radius: float) -> None:
    light = torch.zeros(1, 1, 61, 61, **DOUBLE)
    light[..., 30, 30] = 1.0
    disc = depth_ordered_scatter(light, torch.full_like(light, -radius))[0, 0]
    # Levels of defocus are 1/128 of the radius apart at most, so areas may be off by 1/128.
    assert 1 / disc.max().item() == pytest.approx(math.pi * radius**2, rel=0.01)
    squares = (torch.arange(61, **DOUBLE) - 30) ** 2
    spread = (disc.sum(0) @ squares).item() - 1 / 12  # without that of a pixel's square
    assert 2 * math.sqrt(spread) == pytest.approx(radius, rel=0.01)


@EVERY_APERTURE
def test_uniform_light_stays_uniform(aperture: Aperture) -> None:
    _, defocus = random_case(1, 20, 24, radius=9.0)
    light = torch.full((1, 3, 20, 24), 0.37, **DOUBLE)
    blurred = depth_ordered_scatter(light, defocus, aperture=aperture)
    torch.testing.assert_close(blurred, light, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("height", [300, 400])
@pytest.mark.parametrize("cat_eye", [0.2, 1.0])
@pytest.mark.parametrize("radius", [0.5, 7.0, 25.0])
def test_second_rim_moves_by_a_pixel_between_cells(
    height: int, cat_eye: float, radius: float
) -> None:
    cells = cells_of_field(Aperture(cat_eye=cat_eye), radius, height, 400)
    first = middle_of_cell(0, 0, cells, height, 400)
    second = middle_of_cell(1, 1, cells, height, 400)
    for one, other, count in zip(first, second, reversed(cells), strict=True):
        moved = abs(other - one) * cat_eye * radius
        assert moved <= 1 + 1e-9 or count == MOST_CELLS
    assert cells_of_field(Aperture(), radius, height, 400) == (1, 1)


def test_cat_eye_cuts_the_outer_side_behind_the_focus() -> None:
    """Left of the picture's middle, a farther point lacks light on its left."""
    light = torch.zeros(1, 1, 61, 81, **DOUBLE)
    light[..., 30, 12] = 1.0
    aperture = Aperture(cat_eye=1.0)
    for signed, lacks_left in ((-10.0, True), (10.0, False)):
        blurred = depth_ordered_scatter(light, torch.full_like(light, signed), aperture=aperture)
        left, right = blurred[..., :12].sum().item(), blurred[..., 13:].sum().item()
        assert (left < 0.5 * right) == lacks_left and (right < 0.5 * left) != lacks_left


@EVERY_APERTURE
def test_a_sharp_near_object_is_not_touched_by_the_blur_behind_it(aperture: Aperture) -> None:
    light, _ = random_case(1, 24, 24, radius=1.0)
    defocus = torch.full((1, 1, 24, 24), -8.0, **DOUBLE)
    defocus[..., 8:16, 8:16] = 0.0
    blurred = depth_ordered_scatter(light, defocus, aperture=aperture)
    inside = (..., slice(8, 16), slice(8, 16))
    torch.testing.assert_close(blurred[inside], light[inside], atol=1e-7, rtol=0)


@EVERY_APERTURE
def test_a_blurred_near_plane_hides_what_is_behind_it(aperture: Aperture) -> None:
    """Where near light alone fills a pixel, nothing far shines through, and beyond it does."""
    light = torch.ones(1, 1, 24, 40, **DOUBLE)
    light[..., :20] = 0.0
    defocus = torch.full_like(light, -3.0)
    defocus[..., :20] = 5.0
    blurred = depth_ordered_scatter(light, defocus, aperture=aperture)
    assert blurred[..., :14].abs().max() < 1e-7
    torch.testing.assert_close(blurred[..., 30:], light[..., 30:], atol=1e-7, rtol=0)


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


@EVERY_APERTURE
def test_batch_mates_and_repetition_do_not_change_a_bit(aperture: Aperture) -> None:
    light, defocus = random_case(2, 15, 16, radius=6.0)
    defocus[1] *= 3
    together = depth_ordered_scatter(light, defocus, aperture=aperture)
    assert torch.equal(together, depth_ordered_scatter(light, defocus, aperture=aperture))
    alone = depth_ordered_scatter(light[:1], defocus[:1], aperture=aperture)
    assert torch.equal(together[:1], alone)


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

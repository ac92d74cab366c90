"""Layered blur against its plain twin, closed forms and the ray tracer."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from bokehdiff.rendering import (
    Aperture,
    depth_ordered_scatter,
    layered_blur,
    layered_reference,
    render_layers,
)
from bokehdiff.rendering.aperture import field_position
from bokehdiff.rendering.layered import (
    blur_picture,
    exact_slices,
    find_sparks,
    next_fast_length,
    slice_levels,
)
from bokehdiff.rendering.sources import Sources, sources_of_picture
from tests.apertures import SAME_EVERYWHERE as APERTURES

DOUBLE = {"dtype": torch.float64}
EVERY_APERTURE = pytest.mark.parametrize("aperture", APERTURES.values(), ids=APERTURES.keys())


def slanted_case(height: int = 12, width: int = 13) -> tuple[torch.Tensor, torch.Tensor]:
    """Two slanted surfaces that cross the focus, a jump between them, and sparks in the dark."""
    generator = torch.Generator().manual_seed(0)
    light = 0.1 * torch.rand(1, 3, height, width, generator=generator, **DOUBLE)
    light[..., 2, 3], light[..., height - 3, width - 2] = 40.0, 20.0
    x, y = torch.arange(width, **DOUBLE), torch.arange(height, **DOUBLE)[:, None]
    defocus = -3 + 0.3 * x + 0.1 * y
    defocus[:, : width // 2] += 4
    return light, defocus[None, None]


def flat_case(near: float, far: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A flat square before a flat background, both with texture."""
    generator = torch.Generator().manual_seed(1)
    light = torch.rand(1, 3, 11, 14, generator=generator, **DOUBLE)
    defocus = torch.full((1, 1, 11, 14), far, **DOUBLE)
    defocus[..., 3:8, 4:10] = near
    return light, defocus


def assert_twins(
    light: torch.Tensor, defocus: torch.Tensor, aperture: Aperture, lens_parts: int = 4
) -> None:
    ours = layered_blur(light, defocus, aperture=aperture, lens_parts=lens_parts)
    plain = layered_reference(light, defocus, aperture=aperture, lens_parts=lens_parts)
    # Transforms leave a few units of the last digit of the brightest spark.
    torch.testing.assert_close(ours, plain, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("lens_parts", [1, 2, 4])
@EVERY_APERTURE
def test_agrees_with_the_plain_twin(aperture: Aperture, lens_parts: int) -> None:
    light, defocus = slanted_case()
    sources = sources_of_picture(light[0], defocus[0, 0])
    assert find_sparks(sources, light[0]).any(), "there are sparks"
    assert len(sources.place) > light[0, 0].numel(), "there are jumps"
    assert sources.slope.abs().max() > 0.2
    assert_twins(light, defocus, aperture, lens_parts)


@pytest.mark.parametrize(
    ("near", "far"), [(3.0, 0.0), (0.0, -4.0), (5.5, 2.0), (-1.0, -6.2), (2.0, -2.0), (20.0, -9.0)]
)
def test_agrees_with_the_plain_twin_on_either_side_of_the_focus(near: float, far: float) -> None:
    assert_twins(*flat_case(near, far), Aperture(5))


def test_agrees_with_the_plain_twin_in_a_batch() -> None:
    light, defocus = slanted_case(10, 11)
    light = torch.cat([light, light.flip(-1), 0.5 + light])
    defocus = torch.cat([defocus, -defocus, torch.full_like(defocus, 1.3)])
    assert_twins(light, defocus, Aperture(6))


def test_agrees_with_the_plain_twin_over_several_tiles() -> None:
    """A long strip takes two tiles; the twin sees the ends and the seam."""
    generator = torch.Generator().manual_seed(2)
    light = torch.rand(1, 1, 8, 200, generator=generator, **DOUBLE)
    defocus = torch.linspace(1.2, 2.2, 200, **DOUBLE).expand(1, 1, 8, 200)
    blurred = layered_blur(light, defocus)
    for start, stop in ((0, 24), (88, 112), (176, 200)):
        crop = (..., slice(start, stop))
        # The slices have to be those of the whole strip, so both ends of the range stay.
        inner = slice(4 if start else 0, stop - start - (4 if stop < 200 else 0))
        part = defocus[crop].clone()
        plain = layered_reference(light[crop], part)
        ours = layered_blur(light[crop], part)
        torch.testing.assert_close(ours, plain, atol=1e-9, rtol=0)
        torch.testing.assert_close(blurred[crop][..., inner], plain[..., inner], atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["disc", "pentagon", "bubble"])
def test_float32_is_close_to_the_plain_twin(name: str) -> None:
    light, defocus = slanted_case()
    single = layered_blur(light.float(), defocus.float(), aperture=APERTURES[name])
    assert single.dtype == torch.float32
    # What float32 makes of the inputs is not the renderer's fault.
    plain = layered_reference(light.float(), defocus.float(), aperture=APERTURES[name])
    # A transform errs by a few units of the last digit of the largest value: 20 * 2^-23.
    torch.testing.assert_close(single.double(), plain, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("lens_parts", [1, 4])
@pytest.mark.parametrize("name", ["disc", "pentagon", "bubble"])
def test_gradient_of_the_light_is_that_of_the_plain_twin(name: str, lens_parts: int) -> None:
    light, defocus = slanted_case()
    light.requires_grad_()
    upstream = torch.randn(light.shape, generator=torch.Generator().manual_seed(3), **DOUBLE)
    given = {"aperture": APERTURES[name], "lens_parts": lens_parts}
    ours = layered_blur(light, defocus, **given)
    plain = layered_reference(light, defocus, **given)
    torch.testing.assert_close(
        torch.autograd.grad(ours, light, upstream)[0],
        torch.autograd.grad(plain, light, upstream)[0],
        atol=1e-9,
        rtol=1e-9,
    )


def test_gradients_do_not_change_the_picture() -> None:
    light, defocus = slanted_case()
    plain = layered_blur(light, defocus)
    with_light = layered_blur(light.clone().requires_grad_(), defocus)
    with_defocus = layered_blur(light, defocus.clone().requires_grad_())
    assert torch.equal(plain, with_light) and torch.equal(plain, with_defocus)
    assert with_light.requires_grad and with_defocus.requires_grad and not plain.requires_grad
    with torch.no_grad():
        assert not layered_blur(light.clone().requires_grad_(), defocus).requires_grad


def smooth_surface(side: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Soft light, and a defocus of which no two neighbouring slopes are equal (where a kink is)."""
    generator = torch.Generator().manual_seed(0)
    coarse = 0.1 + 0.8 * torch.rand(1, 3, 4, 5, generator=generator, **DOUBLE)
    light = F.interpolate(coarse, size=(20, 22), mode="bicubic", align_corners=True)
    x, y = torch.linspace(-1, 1, 22, **DOUBLE), torch.linspace(-1, 1, 20, **DOUBLE)[:, None]
    defocus = 2.8 + 1.1 * x + 0.22 * x**2 + 0.7 * y + 0.1 * y**2 + 0.5 * x * y
    return light.clamp_min(0.01), side * defocus[None, None]


@pytest.mark.parametrize("lens_parts", [1, 4])
@pytest.mark.parametrize("aperture", [Aperture(), Aperture(5, spherical=0.5)])
@pytest.mark.parametrize("side", [1.0, -1.0])
@pytest.mark.parametrize("everywhere", [True, False], ids=["shift", "any direction"])
def test_gradient_of_the_defocus_is_that_of_finite_differences(
    aperture: Aperture, side: float, lens_parts: int, everywhere: bool
) -> None:
    light, defocus = smooth_surface(side)
    given = {"aperture": aperture, "lens_parts": lens_parts}
    upstream = torch.randn(light.shape, generator=torch.Generator().manual_seed(1), **DOUBLE)
    direction = torch.randn(defocus.shape, generator=torch.Generator().manual_seed(5), **DOUBLE)
    direction = torch.ones_like(defocus) if everywhere else direction
    free = defocus.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layered_blur(light, free, **given), free, upstream)
    # Larger steps run into the kinks, smaller ones into rounding.
    ends = [
        (layered_blur(light, defocus + step * direction, **given) * upstream).sum()
        for step in (-1e-6, 1e-6)
    ]
    change = (ends[1] - ends[0]) / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), change, rtol=1e-5, atol=1e-7)


def mean_over_the_lens(
    start: float, slope: float, first: float, step: float, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(W,) what pixels of a plane see: the mean light of the hits x + s u over a full disc.

    And (W,) whether all hits lie in the picture. Plane s(x) = start + slope x with light first +
    step x. The ray through lens point (u, v) hits where s = start + slope (x + s u), so s = (start
    + slope x) / (1 - slope u).
    """
    u = (torch.arange(2000, **DOUBLE) + 0.5) / 1000 - 1
    chord = (1 - u.square()).sqrt()
    x = torch.arange(width, **DOUBLE)[:, None]
    hits = x + (start + slope * x) / (1 - slope * u) * u
    inside = (hits.amin(1) > 1) & (hits.amax(1) < width - 2)
    return first + step * (hits * chord).sum(1) / chord.sum(), inside


@pytest.mark.parametrize("lens_parts", [1, 4])
@pytest.mark.parametrize("middle", [0.0, 6.0, -6.0])
@pytest.mark.parametrize("slope", [0.1, 0.25, 0.5, -0.4])
def test_slanted_plane_with_a_ramp_of_light(slope: float, middle: float, lens_parts: int) -> None:
    """A slant shifts the mean of the ramp, because rays of one side of the lens hit farther off."""
    height, width, step = 40, 64, 0.01
    start = middle - slope * width / 2
    x = torch.arange(width, **DOUBLE)
    defocus = (start + slope * x).expand(1, 1, height, width)
    light = (0.2 + step * x).expand(1, 1, height, width)
    truth, interior = mean_over_the_lens(start, slope, 0.2, step, width)
    assert interior.sum() > 16
    blurred = layered_blur(light, defocus, lens_parts=lens_parts)[0, 0, height // 2]
    error = (blurred - truth)[interior].abs().max().item()
    # A tenth of a pixel on the ramp, against shifts of up to 1.5. An uncut lens is full too early
    # where discs of several slices meet, and loses a little of the farthest.
    assert error < (0.1 if lens_parts == 4 else 0.25) * step
    shift = (light[0, 0, 0] - truth)[interior].abs().max().item()
    if shift > step / 2:
        assert error < shift / 5
        scattered = depth_ordered_scatter(light, defocus)[0, 0, height // 2]
        assert error < (scattered - truth)[interior].abs().max().item() / 4


def coverage_of_slanted_plane(middle: float, slope: float, with_slopes: bool) -> torch.Tensor:
    """(H, W) share of the lens that sees a white plane, before black that is far behind it."""
    x = torch.arange(64, **DOUBLE)
    defocus = (middle + slope * (x - 32)).expand(40, 64)

    def plane_before_black(light: torch.Tensor, defocus: torch.Tensor) -> Sources:
        plane = sources_of_picture(light, defocus)
        if not with_slopes:
            plane = plane._replace(slope=torch.zeros_like(plane.slope))
        black = plane._replace(
            light=torch.zeros_like(plane.light),
            defocus=torch.full_like(plane.defocus, -25.0),
            slope=torch.zeros_like(plane.slope),
        )
        return Sources(*(torch.cat(both) for both in zip(plane, black, strict=True)))

    slices = exact_slices(torch.cat([defocus.flatten(), torch.tensor([-25.0], **DOUBLE)]))
    white = torch.ones(1, 40, 64, **DOUBLE)
    return blur_picture(
        white, defocus, Aperture(), slices, lens_parts=4, find_sources=plane_before_black
    )[0]


@pytest.mark.parametrize(("middle", "slope"), [(8.0, 0.1), (8.0, -0.25), (-7.0, 0.25), (-8.0, 0.4)])
def test_slanted_plane_covers_every_pixel_once(middle: float, slope: float) -> None:
    """Nothing shines through a closed surface, which is what slopes are for."""
    interior = (slice(14, -14), slice(20, -20))
    leaking = 1 - coverage_of_slanted_plane(middle, slope, with_slopes=True)[interior]
    without = 1 - coverage_of_slanted_plane(middle, slope, with_slopes=False)[interior]
    assert leaking.max() < 0.015
    assert without.max() > 3 * leaking.max() and without.max() > slope / 8


def test_slanted_plane_leaks_little_where_it_crosses_the_focus() -> None:
    """There discs are smaller than pixels, and the slope's part of a kernel is coarse."""
    leaking = 1 - coverage_of_slanted_plane(0.0, 0.4, with_slopes=True)[14:-14, 20:-20]
    assert leaking.max() < 0.08 and leaking.mean() < 0.015


def layer_scene(
    seed: int, slope: float, df: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """photo, signed defocus and ray-traced truth: a half-plane before a textured background."""
    height, width, K, near, far = 48, 56, 14.0, 0.8, 0.3
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, 3, 8, 9, generator=generator, **DOUBLE)
    colours = F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)[None]
    alphas = torch.ones(1, 2, 1, height, width, **DOUBLE)
    alphas[:, 0, :, :, width // 2 :] = 0
    # The disparity of the background is far + slope (x - width / 2).
    start = far - slope * width / 2
    planes = torch.tensor([[[0, 0, 1 / near], [-slope / start, 0, 1 / start]]], **DOUBLE)
    truth = render_layers(colours, alphas, planes, df, K, samples_per_side=31).image()
    background = (start + slope * torch.arange(width, **DOUBLE)).expand(1, 1, height, width)
    share = alphas[:, 0]
    photo = torch.lerp(colours[:, 1], colours[:, 0], share)
    disparity = torch.lerp(background, torch.full_like(background, near), share)
    return photo, K * (disparity - df), truth


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    """In linear light, without the border, where the ray tracer's rays miss the scene."""
    difference = (one - other)[..., 9:-9, 9:-9]
    return -10 * math.log10(difference.square().mean().item())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("slope", "df"),
    [(0.006, 0.8), (0.006, 0.3), (0.0, 0.8), (0.0, 0.3), (0.008, 0.5)],
)
def test_close_to_the_ray_traced_truth(slope: float, df: float, seed: int) -> None:
    photo, defocus, truth = layer_scene(seed, slope, df)
    ours = psnr(layered_blur(photo, defocus), truth)
    # The rest is texture hidden behind the near half, which nobody knows from the photograph.
    assert ours > 32
    assert ours > psnr(photo, truth) + 12
    assert ours > psnr(depth_ordered_scatter(photo, defocus), truth)


def test_parts_of_the_lens_bring_it_closer_to_the_truth() -> None:
    """Between a near and a far blur every part of the lens sees an occlusion of its own."""
    photo, defocus, truth = layer_scene(1, 0.008, 0.5)
    quality = [psnr(layered_blur(photo, defocus, lens_parts=n), truth) for n in (1, 4)]
    assert quality[1] > quality[0] + 0.5


@pytest.mark.parametrize("signed", [-8.0, 7.0])
@pytest.mark.parametrize("cat_eye", [0.3, 0.6, 1.0])
def test_a_point_near_the_corner_is_the_cat_eye_of_its_place(signed: float, cat_eye: float) -> None:
    height, width, row, column = 48, 60, 12, 14
    aperture = Aperture(cat_eye=cat_eye)
    light = torch.zeros(1, 1, height, width, **DOUBLE)
    light[..., row, column] = 1.0
    disc = layered_blur(light, torch.full_like(light, signed), aperture=aperture)[0, 0]
    kernel = aperture.kernel(signed, field=field_position(column, row, height, width), **DOUBLE)
    reach = kernel.shape[0] // 2
    expected = torch.zeros_like(disc)
    expected[row - reach : row + reach + 1, column - reach : column + reach + 1] = kernel
    # The middle of its tile may be a pixel of the second rim away: so many of its pixels.
    error = (disc / disc.sum() - expected).abs().sum().item()
    assert error < 2 * cat_eye / abs(signed)
    # And it is no disc: it lacks what the second rim cuts off.
    round_disc = Aperture().kernel(signed, **DOUBLE)
    whole = torch.zeros_like(disc)
    whole[row - reach : row + reach + 1, column - reach : column + reach + 1] = round_disc
    assert (disc / disc.sum() - whole).abs().sum().item() > 2 * error


def test_cat_eye_cuts_the_outer_side_behind_the_focus() -> None:
    """Left of the picture's middle, a farther point lacks light on its left."""
    light = torch.zeros(1, 1, 61, 81, **DOUBLE)
    light[..., 30, 12] = 1.0
    aperture = Aperture(cat_eye=1.0)
    for signed, lacks_left in ((-10.0, True), (10.0, False)):
        blurred = layered_blur(light, torch.full_like(light, signed), aperture=aperture)
        left, right = blurred[..., :12].sum().item(), blurred[..., 13:].sum().item()
        assert (left < 0.5 * right) == lacks_left and (right < 0.5 * left) != lacks_left


def test_sparks_are_points_beside_others_and_affordable() -> None:
    light = torch.full((1, 40, 40), 0.01, **DOUBLE)
    light[:, 10, 10], light[:, 30, 5] = 5.0, 0.03
    light[:, 20:34, 20:34] = 5.0  # a patch of light, most of it among its like
    defocus = torch.full((40, 40), 6.0, **DOUBLE)
    sparks = find_sparks(sources_of_picture(light, defocus), light).view(40, 40)
    assert sparks[10, 10] and not sparks[30, 5] and not sparks[27, 27]
    # The brightest first, until the kernels have sixteen entries for each pixel of the picture.
    generator = torch.Generator().manual_seed(4)
    many = torch.zeros(1, 40, 40, **DOUBLE)
    many[:, ::5, ::5] = 1 + torch.rand(1, 8, 8, generator=generator, **DOUBLE)
    wide = torch.full((40, 40), 25.0, **DOUBLE)
    found = find_sparks(sources_of_picture(many, wide), many).view(40, 40)
    assert 0 < found.sum() * 51**2 <= 16 * 40**2
    narrow = find_sparks(sources_of_picture(many, wide / 10), many)
    assert narrow.sum() == 64


def test_slices_ascend_are_close_and_contain_the_focus() -> None:
    levels = slice_levels(torch.tensor([-40.0, 23.0]), 0.7, 0.1)
    assert levels == sorted(levels) and 0.0 in levels
    assert levels[0] <= -40 < levels[1] and levels[-2] < 23 <= levels[-1]
    for low, high in zip(levels, levels[1:], strict=False):
        nearer = min(abs(low), abs(high))
        assert high - low == pytest.approx(max(0.7, 0.1 * nearer))
    assert slice_levels(torch.zeros(3), 0.7, 0.1) == [0.0]
    assert min(slice_levels(torch.tensor([5.0, 9.0]), 0.7, 0.1)) > 4


@pytest.mark.parametrize("length", [1, 2, 7, 102, 191, 1025])
def test_fast_lengths_are_even_and_smooth(length: int) -> None:
    fast = next_fast_length(length)
    assert length <= fast <= max(2 * length, 2) and fast % 2 == 0
    rest = fast
    for factor in (2, 3, 5):
        while rest % factor == 0:
            rest //= factor
    assert rest == 1


@pytest.mark.gpu
def test_gpu_agrees_with_the_processor() -> None:
    light, defocus = slanted_case(40, 50)
    there = layered_blur(light.cuda(), defocus.cuda()).cpu()
    torch.testing.assert_close(there, layered_blur(light, defocus), atol=1e-9, rtol=0)


RANDOM, INSIDE = torch.rand(1, 3, 8, 8), torch.rand(1, 1, 8, 8)


@pytest.mark.parametrize("blur", [layered_blur, layered_reference])
@pytest.mark.parametrize(
    ("light", "defocus", "words"),
    [
        (torch.rand(3, 8, 8), INSIDE, r"light has shape \(3, 8, 8\); wanted \(B, C, H, W\)"),
        (torch.rand(0, 3, 8, 8), torch.rand(0, 1, 8, 8), r"wanted \(B, C, H, W\)"),
        (RANDOM.half(), INSIDE, "torch.float16; wanted float32 or float64"),
        ((RANDOM * 255).to(torch.uint8), INSIDE, "torch.uint8; wanted float32 or float64"),
        (RANDOM, torch.rand(1, 1, 8, 9), r"\(1, 1, 8, 9\); wanted \(1, 1, 8, 8\) to match light"),
        (RANDOM, torch.rand(2, 1, 8, 8), "to match light"),
        (RANDOM, torch.rand(8, 8), "to match light"),
        (RANDOM, torch.full((1, 1, 8, 8), math.nan), "finite; fill holes"),
        (RANDOM, torch.full((1, 1, 8, 8), -math.inf), "finite; fill holes"),
        (RANDOM, torch.full((1, 1, 8, 8), 9000.0), "radius of 9000 px.*lower it"),
    ],
)
def test_mistakes_are_refused(
    blur: object, light: torch.Tensor, defocus: torch.Tensor, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        blur(light, defocus)  # type: ignore[operator]


@pytest.mark.parametrize("lens_parts", [0, 3, 8, 2.5])
def test_other_numbers_of_lens_parts_are_refused(lens_parts: int) -> None:
    with pytest.raises(ValueError, match=f"lens_parts is {lens_parts}; wanted 1, 2 or 4"):
        layered_blur(RANDOM, INSIDE, lens_parts=lens_parts)

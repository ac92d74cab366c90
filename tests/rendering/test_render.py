"""render_bokeh, the door of the classical renderers, and what light must do in all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bokehdiff.images import linear_to_srgb, srgb_to_linear
from bokehdiff.rendering import (
    Aperture,
    HighlightBoost,
    depth_ordered_scatter,
    layered_blur,
    pyramid_blur,
    recover_highlights,
    render_bokeh,
)
from bokehdiff.rendering.render import METHODS
from tests.apertures import PICTURE, SAME_EVERYWHERE

DOUBLE = {"dtype": torch.float64}
Blur = Callable[..., torch.Tensor]
APERTURES = {**SAME_EVERYWHERE, "cat-eye": Aperture(cat_eye=1.0, obstruction=0.3)}
EVERY_METHOD = pytest.mark.parametrize("blur", METHODS.values(), ids=METHODS.keys())
EXACT_METHODS = pytest.mark.parametrize(
    "blur", [layered_blur, depth_ordered_scatter], ids=["layered", "scatter"]
)
EVERY_APERTURE = pytest.mark.parametrize("aperture", APERTURES.values(), ids=APERTURES.keys())
APERTURES_OF_ALL_PLACES = pytest.mark.parametrize(
    "aperture", SAME_EVERYWHERE.values(), ids=SAME_EVERYWHERE.keys()
)


def rough_case(
    batch: int, height: int, width: int, radius: float, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 light (B, 3, H, W) and a defocus map with a flat near part over a rough far one."""
    generator = torch.Generator().manual_seed(seed)
    light = torch.rand(batch, 3, height, width, generator=generator, **DOUBLE)
    defocus = (torch.rand(batch, 1, height, width, generator=generator, **DOUBLE) - 0.7) * radius
    defocus[..., : width // 2] = 0.6 * radius
    return light, defocus


def two_halves(
    left: float, right: float, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """White (1, 3, H, W) and the defocus of two planes that meet in the middle."""
    defocus = torch.full((1, 1, height, width), right, **DOUBLE)
    defocus[..., : width // 2] = left
    return torch.ones(1, 3, height, width, **DOUBLE), defocus


def lone_point(signed: float, side: int = 61) -> tuple[torch.Tensor, torch.Tensor]:
    """A point of light 1 in the middle of the dark, on a plane of that defocus."""
    light = torch.zeros(1, 1, side, side, **DOUBLE)
    light[..., side // 2, side // 2] = 1.0
    return light, torch.full_like(light, signed)


def covered_by_half_plane(distance: torch.Tensor, radius: float) -> torch.Tensor:
    """Share of a disc around a point that lies beyond a straight edge at that distance."""
    share = (distance / radius).clamp(-1, 1)
    return (torch.acos(share) - share * (1 - share.square()).sqrt()) / math.pi


@EVERY_APERTURE
@EVERY_METHOD
def test_no_defocus_returns_the_light(blur: Blur, aperture: Aperture) -> None:
    light, defocus = rough_case(1, 9, 8, radius=1.0)
    sharp = blur(light, torch.zeros_like(defocus), aperture=aperture)
    # A sum of third differences along a row is exact to a few units of its last digits.
    torch.testing.assert_close(sharp, light, atol=1e-12, rtol=0)


@EVERY_APERTURE
@EVERY_METHOD
def test_uniform_light_stays_uniform(blur: Blur, aperture: Aperture) -> None:
    _, defocus = rough_case(1, 20, 24, radius=9.0)
    light = torch.full((1, 3, 20, 24), 0.37, **DOUBLE)
    blurred = blur(light, defocus, aperture=aperture)
    torch.testing.assert_close(blurred, light, atol=1e-7, rtol=0)
    single = blur(light.float(), defocus.float(), aperture=aperture)
    torch.testing.assert_close(single, light.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("other", [6.0, -6.0])
@EVERY_METHOD
def test_plane_in_focus_stays_sharp_away_from_jumps(blur: Blur, other: float) -> None:
    light, _ = rough_case(1, 20, 48, radius=1.0)
    _, defocus = two_halves(0.0, other, 20, 48)
    blurred = blur(light, defocus)
    # A nearer plane reaches over 6 pixels, and parting mixtures concerns 2 pixels beside the jump.
    clear = (..., slice(0, 24 - 8))
    torch.testing.assert_close(blurred[clear], light[clear], atol=1e-7, rtol=0)


@pytest.mark.parametrize("signed", [-6.0, 9.3, -14.77, 20.0])
@APERTURES_OF_ALL_PLACES
@EXACT_METHODS
def test_a_lone_point_keeps_its_light(blur: Blur, aperture: Aperture, signed: float) -> None:
    light, defocus = lone_point(signed)
    blurred = blur(light, defocus, aperture=aperture)
    assert blurred.sum().item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("signed", [-6.0, 9.3, -14.77, 20.0])
@APERTURES_OF_ALL_PLACES
def test_a_lone_point_keeps_its_light_in_the_preview(aperture: Aperture, signed: float) -> None:
    """Its slices are coarse, and the point is drawn with a radius between theirs: half a percent of
    the light of a donut, which has its light where both radii differ."""
    blurred = pyramid_blur(*lone_point(signed), aperture=aperture)
    assert blurred.sum().item() == pytest.approx(1.0, rel=5e-3)


@EXACT_METHODS
def test_points_under_a_cat_eye_keep_their_light_on_average(blur: Blur) -> None:
    """Between tiles that share a kernel the second rim steps by up to a pixel. The step crowds
    light or thins it out; over many points both even out."""
    aperture = Aperture(cat_eye=0.25)
    light = torch.zeros(1, 1, 101, 101, **DOUBLE)
    light[..., 18:-17:13, 18:-17:13] = 1.0
    for signed in (-6.0, 9.3):
        blurred = blur(light, torch.full_like(light, signed), aperture=aperture)
        assert blurred.sum().item() == pytest.approx(light.sum().item(), rel=0.05)


@pytest.mark.parametrize("radius", [6.0, 9.3, 14.77, 20.0])
@EXACT_METHODS
def test_a_lone_point_has_the_area_and_the_radius_of_the_disc(blur: Blur, radius: float) -> None:
    disc = blur(*lone_point(-radius))[0, 0]
    assert 1 / disc.max().item() == pytest.approx(math.pi * radius**2, rel=0.01)
    squares = (torch.arange(61, **DOUBLE) - 30) ** 2
    spread = (disc.sum(0) @ squares / disc.sum()).item() - 1 / 12  # without that of a pixel
    assert 2 * math.sqrt(spread) == pytest.approx(radius, rel=0.01)


@pytest.mark.parametrize("behind", [0.0, -3.0])
@EVERY_METHOD
def test_a_nearer_blurred_thing_covers_what_is_behind(blur: Blur, behind: float) -> None:
    """White over black: its veil outside is the share of the lens that it covers."""
    light, defocus = two_halves(6.0, behind, 32, 64)
    light[..., 32:] = 0.0
    profile = blur(light, defocus)[0, 0, 16]
    assert (profile.diff() <= 1e-3).all()
    distance = torch.arange(64, **DOUBLE) - 31.5
    truth = covered_by_half_plane(distance, 6.0)
    # A pixel is 1/12 of the diameter wide, over which the veil changes by up to a tenth.
    torch.testing.assert_close(profile[32:], truth[32:], atol=0.01, rtol=0)
    assert (profile[: 32 - 8] - 1).abs().max() < 1e-3, "nothing shines through its middle"


@EVERY_METHOD
def test_the_rim_of_a_nearer_thing_is_see_through(blur: Blur) -> None:
    """Stripes behind a grey thing are as visible through its veil as the lens sees past it."""
    light, defocus = two_halves(6.0, 0.0, 32, 64)
    light[..., :32] = 0.5
    light[..., 32:] = (torch.arange(32) // 2 % 2).to(torch.float64)[:, None]
    blurred = blur(light, defocus)[0, 0]
    rows = torch.arange(4, 28)
    bright, dark = blurred[rows[rows // 2 % 2 == 1]].mean(0), blurred[rows[rows // 2 % 2 == 0]]
    seen = bright - dark.mean(0)
    veil = covered_by_half_plane(torch.arange(64, **DOUBLE) - 31.5, 6.0)
    # Beside the edge colours are those of parted mixtures.
    torch.testing.assert_close(seen[34:], 1 - veil[34:], atol=0.02, rtol=0)


@pytest.mark.parametrize("method", ["layered", "pyramid"])
def test_a_nearer_thing_is_see_through_within_its_outline(method: str) -> None:
    """What is hidden there continues the background, where scatter has nothing to show."""
    light, defocus = two_halves(6.0, 0.0, 32, 64)
    light[..., 32:] = 0.0
    profile = METHODS[method](light, defocus)[0, 0, 16]
    truth = covered_by_half_plane(torch.arange(64, **DOUBLE) - 31.5, 6.0)
    torch.testing.assert_close(profile, truth, atol=0.01, rtol=0)


@EVERY_APERTURE
@EVERY_METHOD
def test_a_sharp_near_thing_is_not_touched_by_the_blur_behind_it(
    blur: Blur, aperture: Aperture
) -> None:
    light = torch.ones(1, 3, 24, 24, **DOUBLE)
    defocus = torch.full((1, 1, 24, 24), -8.0, **DOUBLE)
    square = (..., slice(8, 16), slice(8, 16))
    defocus[square] = 0.0
    light[square] = 0.1
    blurred = blur(light, defocus, aperture=aperture)
    # Colours that meet are told apart to about a thousandth of their contrast.
    torch.testing.assert_close(blurred[square], light[square], atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ["cat-eye", "donut"])
@EVERY_METHOD
def test_uniform_light_stays_uniform_where_radii_reach_the_size_of_the_picture(
    blur: Blur, name: str
) -> None:
    light = torch.full((1, 1, 20, 30), 0.37)
    for signed in (20.0, -20.0, 60.0):
        blurred = blur(light, torch.full_like(light, signed), aperture=APERTURES[name])
        # Some pixels accept a hundredth of the coverage, and float32 transforms round to 1e-7.
        torch.testing.assert_close(blurred, light, atol=1e-4, rtol=0)


@EVERY_APERTURE
@EVERY_METHOD
def test_light_is_finite_and_never_negative(blur: Blur, aperture: Aperture) -> None:
    light, defocus = rough_case(1, 21, 26, radius=12.0, seed=4)
    light = light * (light > 0.7)
    light[..., 4, 5], light[..., 15, 20] = 300.0, 40.0
    for dtype in (torch.float64, torch.float32):
        blurred = blur(light.to(dtype), defocus.to(dtype), aperture=aperture)
        assert blurred.dtype == dtype and blurred.shape == light.shape
        assert torch.isfinite(blurred).all() and (blurred >= 0).all()


def whole_lens(blur: Blur) -> dict[str, Any]:
    """The cuts between parts of the lens are not symmetric, so the lens must not be cut."""
    return {"lens_parts": 1} if blur is layered_blur else {}


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("name", ["disc", "donut", "tall", "bubble"])
@EVERY_METHOD
def test_mirrored_scene_gives_the_mirrored_picture(blur: Blur, name: str, axis: int) -> None:
    # With the margin 32 pixels: what is hidden is guessed on cells that fold in the middle too.
    light, defocus = two_halves(6.5, -4.0, 26, 26)
    light = torch.rand(light.shape, generator=torch.Generator().manual_seed(2), **DOUBLE)
    defocus[..., 4:12, 15:22] = 1.5
    given = {"aperture": APERTURES[name], **whole_lens(blur)}
    mirrored = blur(light.flip(axis), defocus.flip(axis), **given).flip(axis)
    torch.testing.assert_close(mirrored, blur(light, defocus, **given), atol=1e-9, rtol=0)


@pytest.mark.parametrize("aperture", [Aperture(5, rotation=10.0), Aperture(picture=PICTURE)])
@EVERY_METHOD
def test_an_odd_opening_is_turned_in_front_of_the_focus(blur: Blur, aperture: Aperture) -> None:
    behind = blur(*lone_point(-7.0, 31), aperture=aperture)
    in_front = blur(*lone_point(7.0, 31), aperture=aperture)
    # The cells of the preview begin at the frame and do not fold about the point; 1 % of the peak.
    tolerance = 1e-4 if blur is pyramid_blur else 1e-9
    torch.testing.assert_close(in_front.flip(-1, -2), behind, atol=tolerance, rtol=0)
    assert (in_front - behind).abs().sum() > 0.1
    upright = aperture.kernel(-7.0, **DOUBLE)
    assert (behind[0, 0, 8:23, 8:23] - upright).abs().sum() < 0.01


@pytest.mark.parametrize("name", ["disc", "cat-eye", "bubble"])
@EVERY_METHOD
def test_batch_mates_and_repetition_do_not_change_a_bit(blur: Blur, name: str) -> None:
    aperture = APERTURES[name]
    light, defocus = rough_case(2, 15, 16, radius=6.0)
    defocus[1] *= 3
    light[1, :, 3, 3] = 50.0
    light_before, defocus_before = light.clone(), defocus.clone()
    together = blur(light, defocus, aperture=aperture)
    assert torch.equal(together, blur(light, defocus, aperture=aperture))
    alone = [
        blur(one[None], its[None], aperture=aperture)
        for one, its in zip(light, defocus, strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(light, light_before) and torch.equal(defocus, defocus_before)


@EVERY_METHOD
def test_float32_is_close_to_float64(blur: Blur) -> None:
    light, defocus = rough_case(1, 30, 31, radius=9.0)
    single = blur(light.float(), defocus.float())
    assert single.dtype == torch.float32
    # A rounded defocus may fall into the next level of scatter, one of 128 over the radius.
    torch.testing.assert_close(
        single.double(), blur(light, defocus.float().double()), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 3), (3, 40)])
@pytest.mark.parametrize("name", ["disc", "pentagon", "donut", "cat-eye", "picture"])
@EVERY_METHOD
def test_tiny_pictures_and_radii_beyond_them(blur: Blur, name: str, size: tuple[int, int]) -> None:
    aperture = APERTURES[name]
    generator = torch.Generator().manual_seed(size[1])
    light = 0.2 + torch.rand(1, 2, *size, generator=generator, **DOUBLE)
    defocus = torch.linspace(-20, 30, size[0] * size[1], **DOUBLE).view(1, 1, *size)
    blurred = blur(light, defocus, aperture=aperture)
    assert blurred.shape == light.shape
    assert (blurred >= light.min() - 1e-9).all() and (blurred <= light.max() + 1e-9).all()


@pytest.fixture
def scene() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.rand(2, 3, 20, 26, generator=generator),
        "disparity": torch.rand(2, 1, 20, 26, generator=generator),
        "df": 0.5,
        "K": 6.0,
    }


def smooth_scene() -> dict[str, Any]:
    """A photograph of a curved surface, on which no depth jump moves."""
    generator = torch.Generator().manual_seed(2)
    x, y = torch.linspace(-1, 1, 30), torch.linspace(-1, 1, 24)[:, None]
    return {
        "image": torch.rand(1, 3, 24, 30, generator=generator),
        "disparity": (0.5 + 0.2 * x + 0.06 * x**2 + 0.12 * y + 0.04 * y**2)[None, None],
        "df": torch.tensor(0.2),
        "K": torch.tensor(7.0),
    }


def detail(photo: torch.Tensor) -> torch.Tensor:
    return photo.diff(dim=-1).square().sum() + photo.diff(dim=-2).square().sum()


@pytest.mark.parametrize("method", METHODS)
def test_blurs_in_linear_light(scene: dict[str, Any], method: str) -> None:
    blurred = render_bokeh(**scene, aperture=Aperture(7), method=method)
    defocus = scene["K"] * (scene["disparity"] - scene["df"])
    light = METHODS[method](srgb_to_linear(scene["image"]), defocus, aperture=Aperture(7))
    torch.testing.assert_close(blurred, linear_to_srgb(light).clamp(0, 1))
    assert blurred.shape == scene["image"].shape and blurred.dtype == torch.float32


def test_methods_are_the_best_first_and_the_first_is_the_default(scene: dict[str, Any]) -> None:
    assert list(METHODS) == ["layered", "scatter", "pyramid"]
    assert torch.equal(render_bokeh(**scene), render_bokeh(**scene, method="layered"))


@pytest.mark.parametrize("method", METHODS)
def test_no_blur_returns_the_photograph_exactly(scene: dict[str, Any], method: str) -> None:
    unblurred = render_bokeh(**{**scene, "K": 0.0}, method=method)
    assert torch.equal(unblurred, scene["image"])
    in_focus = {**scene, "disparity": torch.full((2, 1, 20, 26), 0.5)}
    assert torch.equal(render_bokeh(**in_focus, method=method), scene["image"])


@pytest.mark.parametrize("method", METHODS)
def test_focus_and_strength_for_each_image(scene: dict[str, Any], method: str) -> None:
    df, K = torch.tensor([0.2, 0.9]), torch.tensor([0.0, 8.0])
    together = render_bokeh(scene["image"], scene["disparity"], df, K, method=method)
    assert torch.equal(together[0], scene["image"][0])
    alone = render_bokeh(scene["image"][1:], scene["disparity"][1:], 0.9, 8.0, method=method)
    # Vectorised powers round differently at the end of a tensor.
    torch.testing.assert_close(together[1:], alone, atol=1e-6, rtol=0)


def test_takes_what_a_person_has(scene: dict[str, Any]) -> None:
    pixels = (scene["image"][0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    disparity = scene["disparity"][0, 0].numpy()
    from_picture = render_bokeh(Image.fromarray(pixels), disparity, 0.5, 6.0)
    from_array = render_bokeh(pixels, torch.from_numpy(disparity), 0.5, 6.0)
    assert torch.equal(from_picture, from_array) and from_picture.shape == (1, 3, 20, 26)


def test_metric_disparity_may_exceed_one(scene: dict[str, Any]) -> None:
    metric = render_bokeh(scene["image"], 4 * scene["disparity"], 2.0, 1.5, metric=True)
    torch.testing.assert_close(metric, render_bokeh(**scene))


@pytest.mark.parametrize("method", METHODS)
def test_gradient_reaches_the_photograph(scene: dict[str, Any], method: str) -> None:
    image = scene["image"].requires_grad_()
    blurred = render_bokeh(**{**scene, "image": image}, method=method)
    (gradient,) = torch.autograd.grad(blurred.square().sum(), image)
    assert torch.isfinite(gradient).all()
    # What is behind everything and seen by no part of the lens has none.
    assert (gradient != 0).double().mean() > 0.9


@pytest.mark.parametrize("method", ["layered", "pyramid"])
@pytest.mark.parametrize("name", ["K", "df"])
def test_gradient_of_focus_and_strength(method: str, name: str) -> None:
    """Sharpness falls with the strength, and with a plane in focus that leaves the scene."""
    scene = smooth_scene()
    scene[name].requires_grad_()
    (gradient,) = torch.autograd.grad(detail(render_bokeh(**scene, method=method)), scene[name])
    step = 0.02 if name == "K" else 0.003
    with torch.no_grad():
        ends = [
            detail(render_bokeh(**{**scene, name: scene[name] + sign * step}, method=method))
            for sign in (-1, 1)
        ]
    change = (ends[1] - ends[0]) / (2 * step)
    # The whole disparity is nearer than df: it is in focus the better the larger df is.
    assert (change < 0) == (name == "K") and (gradient < 0) == (name == "K")
    # float32, and the slices' edges are kinks within the step.
    torch.testing.assert_close(gradient, change, rtol=0.03, atol=0)


@pytest.mark.parametrize("method", ["layered", "pyramid"])
def test_gradient_of_disparity_is_finite_at_jumps_too(scene: dict[str, Any], method: str) -> None:
    inputs = {
        **{name: scene[name].requires_grad_() for name in ("image", "disparity")},
        "df": torch.tensor([0.5, 0.3], requires_grad=True),
        "K": torch.tensor([6.0, 3.0], requires_grad=True),
    }
    blurred = render_bokeh(**inputs, method=method, aperture=Aperture(5, fringe=0.1))
    for gradient in torch.autograd.grad(blurred.square().sum(), list(inputs.values())):
        assert torch.isfinite(gradient).all() and (gradient != 0).any()


@pytest.mark.parametrize("method", METHODS)
def test_fringe_focuses_every_colour_at_its_own_disparity(
    scene: dict[str, Any], method: str
) -> None:
    aperture = Aperture(6, fringe=0.1)
    blurred = render_bokeh(**scene, aperture=aperture, method=method)
    for channel, focus in enumerate((0.4, 0.5, 0.4)):
        plain = render_bokeh(**{**scene, "df": focus}, aperture=Aperture(6), method=method)
        if method == "scatter":
            torch.testing.assert_close(blurred[:, channel], plain[:, channel])
        else:  # mixtures and sparks are told from one colour instead of three
            assert (blurred[:, channel] - plain[:, channel]).abs().mean() < 0.03


def test_fringe_gives_magenta_rims_in_front_of_the_focus_and_green_behind() -> None:
    """A white edge on a plane of its own: what spreads farther tints the dark side."""
    photo = torch.zeros(1, 3, 16, 40)
    photo[..., :20] = 1.0
    for disparity, greener in ((0.7, False), (0.3, True)):
        plane = torch.full((1, 1, 16, 40), disparity)
        blurred = render_bokeh(photo, plane, 0.5, 20.0, aperture=Aperture(fringe=0.05))
        dark_side = blurred[0, :, 8, 20:].sum(-1)
        assert (dark_side[1] > dark_side[0]) == greener
        torch.testing.assert_close(dark_side[0], dark_side[2])


def lamp_in_the_dark() -> dict[str, Any]:
    photo = torch.full((1, 3, 40, 48), 0.05)
    photo[..., 20:22, 24:26] = 1.0
    return {"image": photo, "disparity": torch.full((1, 1, 40, 48), 0.2), "df": 0.8, "K": 10.0}


@pytest.mark.parametrize("method", METHODS)
def test_boosted_highlights(method: str) -> None:
    scene = lamp_in_the_dark()
    plain = render_bokeh(**scene, method=method)
    boosted = render_bokeh(**scene, method=method, highlights="boost")
    own = HighlightBoost()
    assert torch.equal(boosted, render_bokeh(**scene, method=method, highlights=own))
    light = recover_highlights(scene["image"], own)
    assert light.max() > 10, "the lamp is one"
    defocus = torch.full((1, 1, 40, 48), 10.0 * (0.2 - 0.8))
    expected = linear_to_srgb(METHODS[method](light, defocus)).clamp(0, 1)
    torch.testing.assert_close(boosted, expected)
    inside = (..., slice(18, 24), slice(22, 28))
    assert (boosted[inside] > plain[inside] + 0.2).all()
    assert boosted.max() <= 1
    weaker = render_bokeh(**scene, method=method, highlights=HighlightBoost(gain=4.0))
    assert (weaker[inside] < boosted[inside]).all() and (weaker[inside] > plain[inside]).all()


@pytest.mark.parametrize("method", METHODS)
def test_linear_light_comes_in_and_goes_out(method: str) -> None:
    light = torch.full((1, 3, 40, 48), 0.05)
    light[..., 20, 24] = 500.0
    scene = {**lamp_in_the_dark(), "image": light}
    blurred = render_bokeh(**scene, method=method, highlights="hdr")
    defocus = torch.full((1, 1, 40, 48), 10.0 * (0.2 - 0.8))
    torch.testing.assert_close(blurred, METHODS[method](light, defocus))
    assert blurred.max() > 2, "not clipped"
    assert torch.equal(
        blurred, render_bokeh(**{**scene, "image": light[0]}, method=method, highlights="hdr")
    )
    array = light[0].permute(1, 2, 0).numpy()
    assert torch.equal(
        blurred, render_bokeh(**{**scene, "image": array}, method=method, highlights="hdr")
    )
    unblurred = render_bokeh(**{**scene, "K": 0.0}, method=method, highlights="hdr")
    assert torch.equal(unblurred, light)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_left_as_they_were(scene: dict[str, Any], method: str) -> None:
    before = {name: scene[name].clone() for name in ("image", "disparity")}
    for highlights in (None, "boost", "hdr"):
        render_bokeh(**scene, method=method, highlights=highlights, aperture=Aperture(fringe=0.1))
    assert all(torch.equal(scene[name], values) for name, values in before.items())


LINEAR = {"highlights": "hdr"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "gathering"}, "wanted one of 'layered', 'scatter', 'pyramid'"),
        ({"aperture": "hexagon"}, "aperture is 'hexagon'; wanted a bokehdiff.rendering.Aperture"),
        ({"image": torch.rand(2, 3, 20, 26) * 255}, "0"),
        ({"image": torch.rand(20, 26)}, "shape"),
        ({"disparity": torch.rand(2, 1, 10, 13)}, "same size"),
        ({"disparity": torch.full((2, 1, 20, 26), math.nan)}, "no known pixel"),
        ({"disparity": torch.rand(2, 1, 20, 26) * 1000}, "metric"),
        ({"df": 1.5}, "df"),
        ({"K": -3.0}, "K"),
        ({"K": math.inf}, "finite"),
        ({"K": 1e6}, "circle of confusion"),
        ({"df": torch.rand(3)}, "df"),
        ({"highlights": "bright"}, "highlights is 'bright'; wanted None, 'boost', 'hdr'"),
        ({"highlights": True}, "highlights is True; wanted None"),
        ({"highlights": 24.0}, "highlights is 24.0; wanted None"),
        (
            {**LINEAR, "image": torch.zeros(2, 3, 20, 26, dtype=torch.uint8)},
            "image is torch.uint8; .* display-encoded: leave highlights=None",
        ),
        (
            {**LINEAR, "image": np.zeros((20, 26, 3), np.uint8)},
            "image is torch.uint8; .* display-encoded: leave highlights=None",
        ),
        ({**LINEAR, "image": -torch.rand(2, 3, 20, 26)}, "negative, NaN or infinite light"),
        ({**LINEAR, "image": torch.full((2, 3, 20, 26), math.nan)}, "negative, NaN or infinite"),
        ({**LINEAR, "image": torch.full((2, 3, 20, 26), math.inf)}, "negative, NaN or infinite"),
        ({**LINEAR, "image": torch.rand(2, 1, 20, 26)}, r"image has shape \(2, 1, 20, 26\)"),
        ({**LINEAR, "image": torch.rand(20, 26)}, r"image has shape \(20, 26\); wanted linear"),
        ({**LINEAR, "image": [0.5]}, "image is a list; wanted linear light"),
    ],
)
def test_mistakes_are_refused(scene: dict[str, Any], change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        render_bokeh(**{**scene, **change})

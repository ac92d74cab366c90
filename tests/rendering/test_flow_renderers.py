"""What every renderer that networks are trained through has to do, whatever it computes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from bokehdiff.optics import lens_strength, signed_defocus
from bokehdiff.rendering.gaussian_pyramid import gaussian_pyramid_blur
from bokehdiff.rendering.painted_layers import painted_layers_blur
from bokehdiff.rendering.radius_bins import binned_blur

Renderer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
RENDERERS: dict[str, Renderer] = {
    "pyramid": functools.partial(gaussian_pyramid_blur, levels=5),
    "binned": binned_blur,
    "layered": painted_layers_blur,
}
EVERY_RENDERER = pytest.mark.parametrize("blur", RENDERERS.values(), ids=RENDERERS.keys())


def texture(
    batch: int = 1, height: int = 30, width: int = 33, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 3, height, width, generator=generator, dtype=torch.float64).to(dtype)


def depths(height: int = 40, width: int = 50) -> dict[str, torch.Tensor]:
    x = torch.linspace(-1, 1, width).expand(1, 1, height, width)
    y = torch.linspace(-1, 1, height)[:, None].expand(1, 1, height, width)
    noise = torch.rand(1, 1, height, width, generator=torch.Generator().manual_seed(1))
    step = torch.where(x > 0.1, 12.0, -7.3)
    lone = torch.zeros(1, 1, height, width)
    lone[..., 20, 24] = 31.0
    return {
        "flat": torch.full((1, 1, height, width), -4.3),
        "ramp": 9 * x + 3 * y,
        "step": step,
        "step and ramp": torch.where(y > 0, step, 20 * x),
        "sharp before blurred": torch.where(x > 0.1, 0.0, -31.0),
        "noise": 40 * (noise - 0.5),
        "one blurred pixel between sharp ones": lone,
        "circles larger than the picture": 6 * step,
    }


@EVERY_RENDERER
@pytest.mark.parametrize("defocus", depths().values(), ids=depths().keys())
def test_uniform_light_stays_uniform_whatever_the_depth(
    blur: Renderer, defocus: torch.Tensor
) -> None:
    light = torch.tensor([0.03, 0.5, 0.93]).view(1, 3, 1, 1).expand(1, 3, 40, 50)
    torch.testing.assert_close(blur(light, defocus), light, atol=1e-5, rtol=0)


@EVERY_RENDERER
def test_no_blur_gives_the_picture_and_still_a_gradient(blur: Renderer) -> None:
    light = texture()
    strength = torch.zeros((), requires_grad=True)
    blurred = blur(light, strength * (torch.rand(1, 1, 30, 33) - 0.5))
    torch.testing.assert_close(blurred, light, atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(blurred.sum(), strength)
    assert torch.isfinite(gradient)


@EVERY_RENDERER
@pytest.mark.parametrize("beside", [6.0, -6.0])
def test_what_is_in_focus_stays_sharp(blur: Renderer, beside: float) -> None:
    light = texture(width=40)
    defocus = torch.zeros(1, 1, 30, 40)
    defocus[..., 20:] = beside
    blurred = blur(light, defocus)
    # Farther from the blurred half than its light reaches.
    torch.testing.assert_close(blurred[..., :13], light[..., :13], atol=1e-6, rtol=0)
    contrast = [picture[..., 28:].std() for picture in (blurred, light)]
    assert contrast[0] < contrast[1] / 4


@EVERY_RENDERER
def test_more_blur_leaves_less_contrast(blur: Renderer) -> None:
    light = texture()
    contrasts = [
        float(blur(light, torch.full((1, 1, 30, 33), radius)).std())
        for radius in (0.0, 0.3, 1.0, 2.5, 5.0, 9.0, 14.0)
    ]
    assert contrasts == sorted(contrasts, reverse=True) and contrasts[-1] < contrasts[0] / 5


@EVERY_RENDERER
@pytest.mark.parametrize("radius", [0.5, 2.0, 5.5, 16.0, 31.0])
@pytest.mark.parametrize("side", [1, -1])
def test_a_point_spreads_as_a_disc_of_its_radius_does(
    blur: Renderer, radius: float, side: int
) -> None:
    """Variance r^2 / 4 along each axis, wherever the point falls; no light is lost."""
    size, wanted = 224, radius**2 / 4
    for row, column in ((112, 112), (107, 117), (120, 103)):
        light = torch.zeros(1, 1, size, size, dtype=torch.float64)
        light[..., row, column] = 1
        defocus = torch.full_like(light, side * radius)
        # Far from the point, so that its circle lies between others.
        defocus[..., 0, 0], defocus[..., -1, -1] = -32.0, 32.0
        spread = blur(light, defocus)[0, 0]
        assert float(spread.sum()) == pytest.approx(1, abs=2e-3)
        place = torch.arange(size, dtype=torch.float64)
        for profile, middle in ((spread.sum(1), row), (spread.sum(0), column)):
            share = profile / profile.sum()
            mean = float((share * place).sum())
            assert mean == pytest.approx(middle, abs=0.01 + 0.015 * radius)
            variance = float((share * (place - mean).square()).sum())
            # The squares of pixels make sharp rims a little wider.
            assert 0.98 * wanted < variance < 1.02 * wanted + 0.12 * min(wanted, 1)


def lens_case(batch: int = 2) -> dict[str, torch.Tensor]:
    """A lens per picture, and smooth inverse depth with a jump, in 1/metres, on both sides of it.

    Radii reach from 11 px behind to 9 px before the focus.
    """
    height, width = 15, 18
    generator = torch.Generator().manual_seed(2)
    coarse = torch.rand(batch, 1, 4, 4, generator=generator, dtype=torch.float64)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    inverse_depth = 0.12 + 0.3 * smooth.clamp(0, 1)
    inverse_depth[..., 4:11, 7:15] += 0.4
    return {
        "inverse_depth": inverse_depth,
        "f_number": torch.tensor([2.0, 1.4], dtype=torch.float64),
        "focal_length_mm": torch.tensor([50.0, 35.0], dtype=torch.float64),
        "focus_distance_m": torch.tensor([2.0, 1.7], dtype=torch.float64),
    }


def rendered_value(
    blur: Renderer,
    inverse_depth: torch.Tensor,
    f_number: torch.Tensor,
    focal_length_mm: torch.Tensor,
    focus_distance_m: torch.Tensor,
) -> torch.Tensor:
    """Some smooth number of the picture that a lens makes."""
    strength = lens_strength(f_number, focal_length_mm, focus_distance_m, 36.0, 1280.0)
    defocus = signed_defocus(inverse_depth, 1 / focus_distance_m, strength)
    light = texture(2, 15, 18, torch.float64)
    upstream = torch.randn(light.shape, generator=torch.Generator().manual_seed(3)).double()
    return (blur(light, defocus) * upstream).sum()


@EVERY_RENDERER
@pytest.mark.parametrize("name", lens_case())
def test_gradients_of_depth_and_lens_are_those_of_central_differences(
    blur: Renderer, name: str
) -> None:
    case = lens_case()
    free = case[name].clone().requires_grad_()
    value = rendered_value(blur, **(case | {name: free}))
    (gradient,) = torch.autograd.grad(value, free)
    assert torch.isfinite(gradient).all() and (gradient != 0).any()
    directions = [torch.randn(free.shape, generator=torch.Generator().manual_seed(4)).double()]
    for place in range(0, free.numel(), max(free.numel() // 6, 1)):
        directions.append(F.one_hot(torch.tensor(place), free.numel()).view(free.shape).double())
    step = 1e-6
    for direction in directions:
        ends = [
            rendered_value(blur, **(case | {name: case[name] + side * step * direction}))
            for side in (-1, 1)
        ]
        change = float(ends[1] - ends[0]) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(change, rel=1e-4, abs=1e-6)


@EVERY_RENDERER
def test_gradient_of_the_light_is_exact(blur: Renderer) -> None:
    """Blur is linear in light, so the transpose follows from two products."""
    light = texture(2, 15, 18, torch.float64).requires_grad_()
    case = lens_case()
    defocus = signed_defocus(case["inverse_depth"], 0.5, 30.0)
    upstream = texture(2, 15, 18, torch.float64).flip(-1)
    (gradient,) = torch.autograd.grad(blur(light, defocus), light, upstream)
    other = texture(2, 15, 18, torch.float64).flip(-2).square()
    wanted = (blur(other, defocus) * upstream).sum()
    torch.testing.assert_close((gradient * other).sum(), wanted, rtol=1e-10, atol=0)


@EVERY_RENDERER
def test_blur_is_linear_in_light(blur: Renderer) -> None:
    one = texture(1, 30, 33, torch.float64)
    other = one.flip(-1).square()
    defocus = 20 * (torch.rand(1, 1, 30, 33, generator=torch.Generator().manual_seed(5)) - 0.5)
    defocus = defocus.double()
    together = blur(0.3 * one + 2 * other, defocus)
    torch.testing.assert_close(
        together, 0.3 * blur(one, defocus) + 2 * blur(other, defocus), atol=1e-10, rtol=0
    )


@EVERY_RENDERER
def test_a_mirrored_picture_is_blurred_to_the_mirrored_blur(blur: Renderer) -> None:
    light = texture(1, 32, 48, torch.float64)
    x = torch.linspace(-1, 1, 48, dtype=torch.float64).expand(1, 1, 32, 48)
    defocus = torch.where(x > 0.3, 9.0, 5 * x - 3)
    for axis in (-1, -2):
        mirrored = blur(light.flip(axis), defocus.flip(axis)).flip(axis)
        torch.testing.assert_close(mirrored, blur(light, defocus), atol=1e-10, rtol=0)


@EVERY_RENDERER
def test_pictures_of_a_batch_do_not_touch_each_other(blur: Renderer) -> None:
    light = texture(3)
    noise = torch.rand(3, 1, 30, 33, generator=torch.Generator().manual_seed(6)) - 0.5
    defocus = noise * torch.tensor([0.0, 6.0, 40.0]).view(3, 1, 1, 1)
    together = blur(light, defocus)
    for number in range(3):
        one = slice(number, number + 1)
        torch.testing.assert_close(together[one], blur(light[one], defocus[one]), atol=2e-6, rtol=0)


@EVERY_RENDERER
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept_and_single_precision_is_close(blur: Renderer, dtype: torch.dtype) -> None:
    light = texture(dtype=dtype)
    defocus = depths(30, 33)["step and ramp"]
    blurred = blur(light, defocus.to(dtype))
    assert blurred.dtype == dtype and blurred.shape == light.shape
    exact = blur(light.double(), defocus.double())
    torch.testing.assert_close(blurred.double(), exact, atol=1e-5, rtol=0)


@EVERY_RENDERER
def test_half_precision_around_the_renderer_changes_nothing(blur: Renderer) -> None:
    light, defocus = texture().requires_grad_(), depths(30, 33)["ramp"].requires_grad_()
    plain = blur(light, defocus)
    gradients = torch.autograd.grad(plain.square().sum(), (light, defocus))
    with torch.autocast("cpu", torch.bfloat16):
        around = blur(light, defocus)
        around_gradients = torch.autograd.grad(around.square().sum(), (light, defocus))
    assert around.dtype == torch.float32
    torch.testing.assert_close(around, plain, atol=1e-6, rtol=0)
    for one, other in zip(around_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@EVERY_RENDERER
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (17, 3)])
def test_smallest_pictures(blur: Renderer, size: tuple[int, int]) -> None:
    light = texture(1, *size)
    blurred = blur(light, torch.full((1, 1, *size), 9.0))
    assert blurred.shape == light.shape and torch.isfinite(blurred).all()


@EVERY_RENDERER
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
def test_mistakes_are_refused(
    blur: Renderer, light: torch.Tensor, defocus: torch.Tensor, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        blur(light, defocus)

"""The ray-traced layer renderer against a plain ray-by-ray loop, and its properties."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bokehdiff.rendering import Aperture, LayerRender, render_layers


def random_scene(
    batch: int, layers: int, height: int, width: int, seed: int = 0, slant: float = 0.2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float64 colours, alphas (with empty, solid and soft parts; solid behind) and planes."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    colours = torch.rand(batch, layers, 3, height, width, **draw)
    alphas = (torch.rand(batch, layers, 1, height, width, **draw) * 2 - 0.5).clamp(0, 1)
    alphas[:, -1] = 1
    disparity = torch.linspace(0.9, 0.2, layers, dtype=torch.float64).expand(batch, layers)
    slopes = (torch.rand(batch, layers, 2, **draw) - 0.5) * slant / width
    planes = torch.cat([slopes, 1 / disparity.unsqueeze(-1)], dim=-1)
    return colours, alphas, planes


def plain_loop(
    colours: torch.Tensor,
    alphas: torch.Tensor,
    planes: torch.Tensor,
    df: float,
    K: float,
    lens: torch.Tensor,
    vignetting: float,
) -> LayerRender:
    """One ray after the other, as the specification reads. One scene: (L, 3, H, W), ..."""
    layers, _, height, width = colours.shape
    rgb = torch.zeros(3, height, width, dtype=torch.float64)
    coverage, weight = torch.zeros_like(rgb[:1]), torch.zeros_like(rgb[:1])

    def bilinear(texture: torch.Tensor, x: float, y: float) -> torch.Tensor:
        left, top = math.floor(x), math.floor(y)
        right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
        across, down = x - left, y - top
        upper = texture[:, top, left] * (1 - across) + texture[:, top, right] * across
        lower = texture[:, bottom, left] * (1 - across) + texture[:, bottom, right] * across
        return upper * (1 - down) + lower * down

    for y in range(height):
        for x in range(width):
            for u, v in lens.tolist():
                shifted_u = u + vignetting * (x - (width - 1) / 2)
                shifted_v = v + vignetting * (y - (height - 1) / 2)
                if vignetting and shifted_u**2 + shifted_v**2 > 1.1:
                    continue
                transmittance = 1.0
                for layer in range(layers):
                    a, b, c = planes[layer].tolist()
                    s = (1 - a * x - b * y - c * df) / (a * u + b * v + c / K + 1e-5)
                    hit_x, hit_y = x + s * u, y + s * v
                    if not (0 <= hit_x < width and 0 <= hit_y < height):
                        continue
                    alpha = bilinear(alphas[layer], hit_x, hit_y).item()
                    if alpha < 0.01:
                        if layer == layers - 1:
                            weight[0, y, x] += transmittance
                        continue
                    light = bilinear(alphas[layer] * colours[layer], hit_x, hit_y)
                    rgb[:, y, x] += transmittance * light
                    coverage[0, y, x] += transmittance * alpha
                    weight[0, y, x] += transmittance * alpha
                    if alpha > 0.99:
                        break
                    transmittance *= 1 - alpha
    return LayerRender(rgb, coverage, weight)


@pytest.mark.parametrize("vignetting", [0.0, 0.06])
@pytest.mark.parametrize("slant", [0.0, 0.4])
def test_agrees_with_the_plain_loop(vignetting: float, slant: float) -> None:
    colours, alphas, planes = random_scene(1, 3, 9, 12, slant=slant)
    alphas[0, -1, 0, 3:6, 4:9] = 0.0
    aperture = Aperture(5, rotation=3.0)
    render = render_layers(
        colours,
        alphas,
        planes,
        0.43,
        7.1,
        aperture=aperture,
        samples_per_side=8,
        vignetting=vignetting,
    )
    lens = aperture.lens_samples(8, dtype=torch.float64)
    plain = plain_loop(colours[0], alphas[0], planes[0], 0.43, 7.1, lens, vignetting)
    for ours, wanted in zip(render, plain, strict=True):
        torch.testing.assert_close(ours[0], wanted, atol=1e-9, rtol=1e-9)


def test_batch_and_chunks_do_not_change_the_result() -> None:
    colours, alphas, planes = random_scene(2, 2, 10, 11)
    df, K = torch.tensor([0.3, 0.8]), torch.tensor([5.0, 9.0])
    together = render_layers(colours, alphas, planes, df, K, samples_per_side=7)
    ray_by_ray = render_layers(colours, alphas, planes, df, K, samples_per_side=7, rays_at_once=1)
    torch.testing.assert_close(together, ray_by_ray)
    for item in range(2):
        one = slice(item, item + 1)
        alone = render_layers(
            colours[one], alphas[one], planes[one], df[item], K[item], samples_per_side=7
        )
        for batched, single in zip(together, alone, strict=True):
            torch.testing.assert_close(batched[one], single)


def test_zero_strength_and_focus_plane_are_sharp() -> None:
    colours, _, _ = random_scene(1, 1, 12, 14)
    opaque = torch.ones(1, 1, 1, 12, 14, dtype=torch.float64)
    plane = torch.tensor([[[0.0, 0.0, 1 / 0.6]]], dtype=torch.float64)
    for df, K in [(0.1, 0.0), (0.6, 25.0)]:
        image = render_layers(colours, opaque, plane, df, K, samples_per_side=9).image()
        torch.testing.assert_close(image, colours[:, 0], atol=1e-9, rtol=0)


def test_a_point_of_light_becomes_a_disc_of_the_right_radius() -> None:
    colours = torch.zeros(1, 1, 3, 41, 41, dtype=torch.float64)
    colours[..., 20, 20] = 1
    opaque = torch.ones_like(colours[:, :, :1])
    plane = torch.tensor([[[0.0, 0.0, 1 / 0.7]]], dtype=torch.float64)
    radius = 12.0
    image = render_layers(colours, opaque, plane, 0.4, radius / 0.3, samples_per_side=61).image()
    y, x = torch.meshgrid(torch.arange(41) - 20, torch.arange(41) - 20, indexing="ij")
    distance = torch.hypot(x.double(), y.double())
    lit = image[0, 0] > 0.25 * image[0, 0, 20, 20]
    assert lit[distance < radius - 1].all() and not lit[distance > radius + 1].any()
    # Its kernel is the one that scatter uses.
    kernel = Aperture().kernel(radius, dtype=torch.float64)
    reach = kernel.shape[0] // 2
    crop = image[0, 0, 20 - reach : 21 + reach, 20 - reach : 21 + reach]
    assert (crop - kernel).abs().sum() < 0.1


@pytest.mark.parametrize(("df", "signed"), [(0.4, 9.0), (1.0, -9.0)])
def test_bladed_point_of_light_has_the_orientation_of_the_kernel(df: float, signed: float) -> None:
    colours = torch.zeros(1, 1, 3, 33, 33, dtype=torch.float64)
    colours[..., 16, 16] = 1
    opaque = torch.ones_like(colours[:, :, :1])
    plane = torch.tensor([[[0.0, 0.0, 1 / 0.7]]], dtype=torch.float64)
    aperture = Aperture(3, rotation=10.0)
    image = render_layers(
        colours, opaque, plane, df, 30.0, aperture=aperture, samples_per_side=61
    ).image()
    kernel = aperture.kernel(signed, dtype=torch.float64)
    reach = kernel.shape[0] // 2
    crop = image[0, 0, 16 - reach : 17 + reach, 16 - reach : 17 + reach]
    assert (crop - kernel).abs().sum() < 0.2 < (crop - kernel.flip(0, 1)).abs().sum()


def test_black_behind_the_last_layer_and_light_lost_beside_it() -> None:
    colours = torch.ones(1, 1, 3, 8, 8)
    empty = torch.zeros(1, 1, 1, 8, 8)
    render = render_layers(
        colours, empty, torch.tensor([[[0.0, 0.0, 1.0]]]), 1.0, 5.0, samples_per_side=5
    )
    assert render.rgb.abs().max() == 0 and render.coverage.abs().max() == 0
    assert (render.weight == 13).all()
    assert (render.image() == 0).all()


def test_gradients() -> None:
    colours, alphas, planes = random_scene(1, 2, 4, 5)
    alphas = alphas * 0.5 + 0.2

    def rendered(colours: torch.Tensor, alphas: torch.Tensor) -> Any:
        return tuple(
            render_layers(colours, alphas, planes, 0.4, 3.3, samples_per_side=5, rays_at_once=40)
        )

    inputs = (colours.requires_grad_(), alphas.requires_grad_())
    assert torch.autograd.gradcheck(rendered, inputs, fast_mode=True)


def test_float32_is_kept_and_close_to_float64() -> None:
    colours, alphas, planes = random_scene(1, 3, 16, 18, slant=0.3)
    exact = render_layers(colours, alphas, planes, 0.41, 6.0, samples_per_side=11).image()
    single = render_layers(
        colours.float(), alphas.float(), planes.float(), 0.41, 6.0, samples_per_side=11
    ).image()
    assert single.dtype == torch.float32
    close = (single.double() - exact).abs() < 1e-4
    assert close.double().mean() > 0.98, "only rays within rounding of a border may differ"


@pytest.mark.gpu
def test_gpu_agrees_with_the_processor() -> None:
    colours, alphas, planes = random_scene(2, 3, 20, 21)
    here = render_layers(colours, alphas, planes, 0.43, 6.0)
    there = render_layers(colours.cuda(), alphas.cuda(), planes.cuda(), 0.43, 6.0)
    torch.testing.assert_close(there.image().cpu(), here.image(), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"colours": torch.rand(1, 3, 8, 8)}, r"\(B, L, 3, H, W\)"),
        ({"colours": torch.rand(1, 2, 3, 8, 8).half()}, "float32 or float64"),
        ({"alphas": torch.rand(1, 2, 1, 8, 9)}, "alphas has shape"),
        ({"planes": torch.rand(1, 3, 3)}, "planes has shape"),
        ({"planes": torch.zeros(1, 2, 3)}, "c different from 0"),
        ({"df": torch.tensor([0.1, 0.2])}, "df has 2 values"),
        ({"df": math.nan}, "df must be finite"),
        ({"K": -1.0}, "K must not be negative"),
    ],
)
def test_mistakes_are_refused(change: dict, words: str) -> None:
    good: dict[str, Any] = {
        "colours": torch.rand(1, 2, 3, 8, 8),
        "alphas": torch.ones(1, 2, 1, 8, 8),
        "planes": torch.tensor([[[0.0, 0.0, 2.0], [0.0, 0.0, 5.0]]]),
        "df": 0.5,
        "K": 4.0,
    }
    with pytest.raises(ValueError, match=words):
        render_layers(**{**good, **change})

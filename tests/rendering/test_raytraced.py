"""The ray-traced layer renderer against a plain ray-by-ray loop, and its properties."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bokehdiff.rendering import Aperture, LayerRender, render_layers
from bokehdiff.rendering.aperture import field_position

DOUBLE = {"dtype": torch.float64}


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
    aperture: Aperture,
    samples_per_side: int,
    vignetting: float,
) -> LayerRender:
    """One ray after the other, as the specification reads. One scene: (L, 3, H, W), ..."""
    layers, _, height, width = colours.shape
    lens = aperture.lens_samples(samples_per_side, dtype=torch.float64)
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
                point = torch.tensor([u, v], **DOUBLE)
                field = field_position(float(x), float(y), height, width)
                passing = {
                    side: aperture.transmission(point[0], point[1], side, field).item()
                    for side in (-1, 0, 1)
                }
                transmittance = 1.0
                for layer in range(layers):
                    a, b, c = planes[layer].tolist()
                    s = (1 - a * x - b * y - c * df) / (a * u + b * v + c / K + 1e-5)
                    hit_x, hit_y = x + s * u, y + s * v
                    if not (0 <= hit_x < width and 0 <= hit_y < height):
                        continue
                    alpha = bilinear(alphas[layer], hit_x, hit_y).item()
                    arriving = transmittance * passing[(s > 0) - (s < 0)]
                    if alpha < 0.01:
                        if layer == layers - 1:
                            weight[0, y, x] += arriving
                        continue
                    light = bilinear(alphas[layer] * colours[layer], hit_x, hit_y)
                    rgb[:, y, x] += arriving * light
                    coverage[0, y, x] += arriving * alpha
                    weight[0, y, x] += arriving * alpha
                    if alpha > 0.99:
                        break
                    transmittance *= 1 - alpha
    return LayerRender(rgb, coverage, weight)


PICTURE = torch.linspace(1, 0.2, 5)[:, None] * torch.linspace(0.3, 1, 4)


@pytest.mark.parametrize(
    ("aperture", "vignetting", "slant"),
    [
        (Aperture(5, rotation=3.0), 0.0, 0.0),
        (Aperture(5, rotation=3.0), 0.06, 0.4),
        (Aperture(cat_eye=0.9, spherical=0.7), 0.0, 0.4),
        (Aperture(obstruction=0.3, squeeze=0.7, spherical=-1.0), 0.0, 0.0),
        (Aperture(rotation=40.0, cat_eye=0.4, picture=PICTURE), 0.0, 0.4),
    ],
)
def test_agrees_with_the_plain_loop(aperture: Aperture, vignetting: float, slant: float) -> None:
    colours, alphas, planes = random_scene(1, 3, 9, 12, slant=slant)
    alphas[0, -1, 0, 3:6, 4:9] = 0.0
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
    plain = plain_loop(colours[0], alphas[0], planes[0], 0.43, 7.1, aperture, 8, vignetting)
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


EVERYTHING = Aperture(5, 10.0, 0.2, 0.8, 0.1, 0.5, 0.6, 0.0, PICTURE)


@pytest.mark.parametrize("aperture", [None, EVERYTHING])
def test_zero_strength_and_focus_plane_are_sharp(aperture: Aperture | None) -> None:
    colours, _, _ = random_scene(1, 1, 12, 14)
    opaque = torch.ones(1, 1, 1, 12, 14, dtype=torch.float64)
    plane = torch.tensor([[[0.0, 0.0, 1 / 0.6]]], dtype=torch.float64)
    for df, K in [(0.1, 0.0), (0.6, 25.0)]:
        image = render_layers(
            colours, opaque, plane, df, K, aperture=aperture, samples_per_side=9
        ).image()
        torch.testing.assert_close(image, colours[:, 0], atol=1e-9, rtol=0)


def ramp(height: int, width: int, across: float, down: float) -> torch.Tensor:
    """Colours (1, 1, 3, H, W): 0 in the middle of the picture, so many units more per pixel."""
    x = torch.arange(width, **DOUBLE) - (width - 1) / 2
    y = torch.arange(height, **DOUBLE)[:, None] - (height - 1) / 2
    return (across * x + down * y).expand(1, 1, 3, height, width)


@pytest.mark.parametrize("slope", [(0.5, 0.0), (-0.3, 0.45), (0.0, 0.0)])
@pytest.mark.parametrize("df", [0.2, 0.9])
def test_slanted_plane_with_a_linear_texture(slope: tuple[float, float], df: float) -> None:
    """The mean of a linear texture is its value at the mean hit, and that has a closed form.

    With D = c / K + guard, N = 1 - a x - b y - c df, g = (a, b), G = |g| and the lens point (p, q)
    turned so that p runs along g, the mean of s p = N p / (D + G p) over the unit disc is
    ``N / G (1 - 2 D (D - sqrt(D^2 - G^2)) / G^2)``; across g it is 0.
    """
    height, width, K, disparity = 31, 33, 10.0, 0.5
    # The radius changes by |slope| pixels per pixel; disparity 0.5 is met in the middle.
    c = 1 / disparity
    a, b = (c / K * part for part in slope)
    x0, y0 = (width - 1) / 2, (height - 1) / 2
    scale = 1 + a * x0 + b * y0  # (a, b, c) / scale is the plane with a and b as they are here
    plane = torch.tensor([[[a / scale, b / scale, c / scale]]], **DOUBLE)
    texture = ramp(height, width, 0.7, -0.2) + 100
    image = render_layers(
        texture, torch.ones_like(texture[:, :, :1]), plane, df, K, samples_per_side=101
    ).image()
    a, b, c = plane.flatten().tolist()
    for x, y in [(16, 15), (14, 17), (18, 13)]:
        numerator = 1 - a * x - b * y - c * df
        parallel = c / K + 1e-5
        steepness = math.hypot(a, b)
        if steepness == 0:
            moved = 0.0
        else:
            root = math.sqrt(parallel**2 - steepness**2)
            moved = numerator * (1 - 2 * parallel * (parallel - root) / steepness**2) / steepness**2
        assert abs(moved * steepness) > 0.15 or steepness == 0
        wanted = 100 + 0.7 * (x + moved * a - x0) - 0.2 * (y + moved * b - y0)
        # 101 samples across resolve the rim of the disc to about 1e-3 of the radius of 4 px.
        assert image[0, 0, y, x].item() == pytest.approx(wanted, abs=4e-3)


def segment(t: torch.Tensor) -> torch.Tensor:
    """Area of the unit disc where u > t."""
    t = t.clamp(-1, 1)
    return torch.arccos(t) - t * torch.sqrt(1 - t**2)


def bright_segment(t: torch.Tensor) -> torch.Tensor:
    """Integral of ``2 rho^2 - 1`` over the unit disc where u > t.

    Over v first: ``2 (2 u^2 - 1) h + 4 h^3 / 3`` with ``h = sqrt(1 - u^2)``, and with u = sin a
    that is ``2/3 d/da (-sin a cos^3 a)``, term by term.
    """
    t = t.clamp(-1, 1)
    return 2 / 3 * t * (1 - t**2) ** 1.5


@pytest.mark.parametrize(
    ("aperture", "share"),
    [
        (Aperture(), lambda t: segment(t) / math.pi),
        (
            Aperture(obstruction=0.6),
            lambda t: (segment(t) - 0.36 * segment(t / 0.6)) / (0.64 * math.pi),
        ),
        (Aperture(squeeze=0.5), lambda t: segment(t / 0.5) / math.pi),
        (Aperture(squeeze=2.0), lambda t: segment(t) / math.pi),
        (Aperture(spherical=0.8), lambda t: (segment(t) - 0.8 * bright_segment(t)) / math.pi),
    ],
    ids=["disc", "donut", "tall", "wide", "spherical"],
)
def test_step_edge_in_front_covers_a_segment_of_the_lens(aperture: Aperture, share: Any) -> None:
    """A near plane, opaque right of an edge, hides as much of the lens as lies beyond the edge."""
    height, width, radius = 17, 41, 7.0
    colours = torch.zeros(1, 2, 3, height, width, **DOUBLE)
    colours[:, 0] = 1
    alphas = torch.ones_like(colours[:, :, :1])
    alphas[:, 0, ..., : width // 2] = 0
    planes = torch.tensor([[[0.0, 0.0, 1 / 0.8], [0.0, 0.0, 1 / 0.3]]], **DOUBLE)
    # In focus behind: the edge is blurred by the radius; the far plane counts evenly.
    K = radius / 0.5
    render = render_layers(colours, alphas, planes, 0.3, K, aperture=aperture, samples_per_side=81)
    ours = (render.rgb / len(aperture.lens_samples(81)))[0, 0, height // 2]
    # Bilinear opacity rises from 0 to 1 between two pixels: the mean over edges in between.
    edges = width // 2 - 1 + (torch.arange(1000, **DOUBLE) + 0.5) / 1000
    t = (edges - torch.arange(width, **DOUBLE)[:, None]) / radius
    wanted = share(t).mean(1)
    inside = slice(8, -8)  # beyond, rays leave the frame
    torch.testing.assert_close(ours[inside], wanted[inside], atol=5e-3, rtol=0)


def test_profile_belongs_to_the_side_of_the_focus_where_a_ray_hits() -> None:
    """In front the rim is dark, behind it is bright: seen by two planes half transparent."""
    colours = torch.stack([torch.ones(3, 25, 25), torch.zeros(3, 25, 25)]).double()[None]
    alphas = torch.tensor([0.5, 1.0], **DOUBLE).view(1, 2, 1, 1, 1).expand(1, 2, 1, 25, 25)
    planes = torch.tensor([[[0.0, 0.0, 1 / 0.8], [0.0, 0.0, 1 / 0.3]]], **DOUBLE)
    ring = Aperture(obstruction=0.8, spherical=0.5)
    image = render_layers(colours, alphas, planes, 0.5, 5.0, aperture=ring, samples_per_side=101)
    # The mean of 2 rho^2 - 1 over the ring from 0.8 to 1 is 0.64.
    near, far = 0.5 * (1 - 0.5 * 0.64), 0.5 * (1 + 0.5 * 0.64)
    assert image.image()[0, 0, 12, 12].item() == pytest.approx(near / (near + far), abs=2e-3)


def test_cat_eye_lets_the_overlap_of_two_discs_pass() -> None:
    height, width = 31, 41
    colours = torch.ones(1, 1, 3, height, width, **DOUBLE)
    plane = torch.tensor([[[0.0, 0.0, 2.0]]], **DOUBLE)
    opaque = torch.ones_like(colours[:, :, :1])
    aperture = Aperture(cat_eye=0.9)
    render = render_layers(
        colours, opaque, plane, 0.5, 9.0, aperture=aperture, samples_per_side=101
    )
    y, x = torch.meshgrid(torch.arange(height) - 15, torch.arange(width) - 20, indexing="ij")
    apart = 0.9 * torch.hypot(x.double(), y.double()) / (math.hypot(height, width) / 2)
    overlap = 2 * torch.arccos(apart / 2) - apart / 2 * torch.sqrt(4 - apart**2)
    open_share = render.weight[0, 0] / len(aperture.lens_samples(101))
    torch.testing.assert_close(open_share, overlap / math.pi, atol=5e-3, rtol=0)


@pytest.mark.parametrize(("df", "signed"), [(0.3, 6.0), (0.7, -6.0)])
def test_picture_with_its_left_half_open_looks_from_the_left(df: float, signed: float) -> None:
    texture = ramp(21, 25, 1.0, 0.0) + 100
    plane = torch.tensor([[[0.0, 0.0, 2.0]]], **DOUBLE)
    opaque = torch.ones_like(texture[:, :, :1])
    left_half = torch.zeros(1, 512)
    left_half[:, :256] = 1
    aperture = Aperture(picture=left_half)
    render = render_layers(
        texture, opaque, plane, df, 30.0, aperture=aperture, samples_per_side=100
    )
    # The mean of u over the left half of the disc.
    wanted = 100 - 4 / (3 * math.pi) * signed
    assert render.image()[0, 0, 10, 12].item() == pytest.approx(wanted, abs=0.02)


def test_fringe_focuses_each_colour_on_its_own() -> None:
    colours, alphas, planes = random_scene(1, 3, 12, 13, slant=0.3)
    plain, fringed = Aperture(6, cat_eye=0.3), Aperture(6, cat_eye=0.3, fringe=0.07)
    render = render_layers(colours, alphas, planes, 0.5, 6.0, aperture=fringed, samples_per_side=9)
    for channel, focus in enumerate((0.43, 0.5, 0.43)):
        alone = render_layers(
            colours, alphas, planes, focus, 6.0, aperture=plain, samples_per_side=9
        )
        this = slice(channel, channel + 1)
        torch.testing.assert_close(render.rgb[:, this], alone.rgb[:, this])
        torch.testing.assert_close(render.weight[:, this], alone.weight)
        torch.testing.assert_close(render.coverage[:, this], alone.coverage)
        torch.testing.assert_close(render.image()[:, this], alone.image()[:, this])


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


@pytest.mark.parametrize(("df", "signed"), [(0.4, 9.0), (1.0, -9.0)])
@pytest.mark.parametrize(
    "aperture",
    [Aperture(spherical=0.9), Aperture(rotation=20.0, picture=PICTURE), Aperture(obstruction=0.5)],
    ids=["spherical", "picture", "donut"],
)
def test_point_of_light_becomes_the_kernel(aperture: Aperture, df: float, signed: float) -> None:
    colours = torch.zeros(1, 1, 3, 33, 33, **DOUBLE)
    colours[..., 16, 16] = 1
    opaque = torch.ones_like(colours[:, :, :1])
    plane = torch.tensor([[[0.0, 0.0, 1 / 0.7]]], **DOUBLE)
    image = render_layers(
        colours, opaque, plane, df, 30.0, aperture=aperture, samples_per_side=61
    ).image()
    kernel = aperture.kernel(signed, **DOUBLE)
    reach = kernel.shape[0] // 2
    crop = image[0, 0, 16 - reach : 17 + reach, 16 - reach : 17 + reach]
    turned = aperture.kernel(-signed, **DOUBLE)
    assert (crop - kernel).abs().sum() < 0.15
    assert aperture.is_symmetric or (crop - turned).abs().sum() > 0.2


@pytest.mark.parametrize(("df", "signed"), [(0.5, 6.0), (0.9, -6.0)])
def test_cat_eye_cuts_the_side_that_it_cuts_from_the_kernel(df: float, signed: float) -> None:
    colours = torch.zeros(1, 1, 3, 61, 61, **DOUBLE)
    colours[..., 12, 45] = 1
    opaque = torch.ones_like(colours[:, :, :1])
    plane = torch.tensor([[[0.0, 0.0, 1 / 0.7]]], **DOUBLE)
    aperture = Aperture(cat_eye=0.9)
    image = render_layers(
        colours, opaque, plane, df, 30.0, aperture=aperture, samples_per_side=41
    ).image()
    kernel = aperture.kernel(signed, field=field_position(45.0, 12.0, 61, 61), **DOUBLE)
    crop = image[0, 0, 12 - 6 : 12 + 7, 45 - 6 : 45 + 7]
    crop = crop / crop.sum()
    # The renderer cuts at the place of the pixel that sees, the kernel at that of the source.
    assert (crop - kernel).abs().sum() < 0.25 < 0.6 < (crop - kernel.flip(0, 1)).abs().sum()


def test_black_behind_the_last_layer_and_light_lost_beside_it() -> None:
    colours = torch.ones(1, 1, 3, 8, 8)
    empty = torch.zeros(1, 1, 1, 8, 8)
    render = render_layers(
        colours, empty, torch.tensor([[[0.0, 0.0, 1.0]]]), 1.0, 5.0, samples_per_side=5
    )
    assert render.rgb.abs().max() == 0 and render.coverage.abs().max() == 0
    assert (render.weight == 13).all()
    assert (render.image() == 0).all()


@pytest.mark.parametrize(
    "aperture", [None, Aperture(cat_eye=0.5, spherical=0.6, fringe=0.1, picture=PICTURE)]
)
def test_gradients(aperture: Aperture | None) -> None:
    colours, alphas, planes = random_scene(1, 2, 4, 5)
    alphas = alphas * 0.5 + 0.2
    settings = {"aperture": aperture, "samples_per_side": 5, "rays_at_once": 40}

    def rendered(colours: torch.Tensor, alphas: torch.Tensor) -> Any:
        return tuple(render_layers(colours, alphas, planes, 0.4, 3.3, **settings))

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

"""The compiled tracer against the plain reference, and the physics of what it returns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from bokehdiff.rendering.aperture import Aperture
from bokehdiff.rendering.raytraced import render_layers
from data_synthesis.lens import (
    add_lights,
    hard_disparity,
    pinhole_view,
    spiral_lens_points,
    trace_pixels,
    trace_regular,
)
from data_synthesis.planes import trace_planes

FLAT = [0.0, 0.0]
APERTURES = {
    "blades": Aperture(blades=5, rotation=20),
    "anamorphic": Aperture(squeeze=0.5),
    "mirror lens": Aperture(obstruction=0.5),
    "cat-eye": Aperture(cat_eye=0.9),
    "spherical": Aperture(spherical=0.8),
    "everything": Aperture(blades=6, obstruction=0.3, cat_eye=0.6, spherical=-0.6, fringe=0.1),
}


def premultiplied(colours: np.ndarray, alphas: np.ndarray) -> np.ndarray:
    """(L, H, W, 4) from colours (L, 3, H, W) and alphas (L, H, W)."""
    stack = np.concatenate([colours * alphas[:, None], alphas[:, None]], 1)
    return np.ascontiguousarray(stack.transpose(0, 2, 3, 1), np.float32)


def flat_layers(*colours_and_masks: tuple[float, np.ndarray]) -> np.ndarray:
    return premultiplied(
        np.stack([np.broadcast_to(np.float32(c), (3, *m.shape)) for c, m in colours_and_masks]),
        np.stack([m.astype(np.float32) for _, m in colours_and_masks]),
    )


@pytest.mark.parametrize(("K", "df"), [(8.0, 0.6), (20.0, 0.1), (0.0, 0.3)])
def test_regular_lens_grid_matches_the_reference(K: float, df: float) -> None:
    rng = np.random.default_rng(0)
    count, height, width = 4, 40, 52
    smooth = ndimage.gaussian_filter(rng.standard_normal((count, 3, height, width)), (0, 0, 2, 2))
    colours = (0.5 + smooth).astype(np.float32)
    fields = ndimage.gaussian_filter(rng.standard_normal((count, height, width)), (0, 3, 3))
    # Opacity stays off the two thresholds, where rounding decides between two answers.
    alphas = np.clip(0.5 + 4 * fields, 0.02, 0.98).astype(np.float32)
    alphas[-1] = 1
    planes = np.array([[0.8, 0.001, 0], [0.6, 0, -0.002], [0.4, 0, 0], [0.2, 0.002, 0.001]])

    lens = Aperture().lens_samples(9)
    sums = trace_regular(premultiplied(colours, alphas), planes, df, K, lens.numpy())
    d0, dx, dy = planes.T
    reference = render_layers(
        torch.from_numpy(colours)[None].double(),
        torch.from_numpy(alphas)[None, :, None].double(),
        torch.from_numpy(np.stack([-dx / d0, -dy / d0, 1 / d0], 1))[None],
        df,
        K,
        samples_per_side=9,
    )
    expected = torch.cat([reference.rgb, reference.weight], 1)[0].permute(1, 2, 0).numpy()
    # The reference's guard against parallel rays shifts hits by up to 0.003 texels; hits within
    # that of the canvas border may count in one and not in the other.
    inner = slice(16, -16)
    difference = np.abs(sums[..., [0, 1, 2, 4]] - expected)[inner, inner] / len(lens)
    assert difference.max() < 5e-4
    assert difference.mean() < 5e-5


def test_spiral_fills_the_disc_evenly() -> None:
    points = spiral_lens_points(160)
    radius = np.hypot(*points.T)
    assert radius.max() <= 1
    assert np.abs(points.mean(0)).max() < 0.01
    assert np.mean(radius**2) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("K", [0.0, 3.0, 12.0])
def test_uniform_scene_stays_uniform(K: float) -> None:
    canvas = np.ones((120, 120), bool)
    half = np.zeros_like(canvas)
    half[:, :60] = True
    layers = flat_layers((0.4, half), (0.4, canvas))
    planes = np.array([[0.9, *FLAT], [0.2, 0.001, 0]])
    picture = trace_pixels(layers, planes, 0.5, K, 28, 32)
    np.testing.assert_allclose(picture, 0.4, atol=2e-6)


def test_pinhole_and_zero_strength_agree() -> None:
    rng = np.random.default_rng(1)
    layers = premultiplied(
        rng.uniform(0, 1, (3, 3, 60, 60)).astype(np.float32),
        np.stack([rng.uniform(0, 1, (60, 60)), rng.integers(0, 2, (60, 60)), np.ones((60, 60))]),
    )
    planes = np.array([[0.9, *FLAT], [0.5, 0, 0.002], [0.1, *FLAT]])
    picture, _ = pinhole_view(layers, planes, 10, 20)
    np.testing.assert_allclose(trace_pixels(layers, planes, 0.4, 0.0, 10, 20), picture, atol=2e-6)


def edge_scene() -> tuple[np.ndarray, np.ndarray]:
    """A white near half plane (left) before a black far wall; the tile is 40 pixels at 20."""
    canvas = np.ones((120, 120), bool)
    half = np.zeros_like(canvas)
    half[:, :60] = True
    return flat_layers((1.0, half), (0.0, canvas)), np.array([[1.0, *FLAT], [0.0, *FLAT]])


def test_blurred_near_thing_covers_the_far_one_in_focus() -> None:
    layers, planes = edge_scene()
    picture = trace_pixels(layers, planes, 0.0, 6.0, 20, 40)[:, :, 0]  # far in focus
    # Half way at the edge, and it spreads to both sides as far as the radius and no further.
    assert picture[:, 19:21].mean() == pytest.approx(0.5, abs=0.02)
    assert picture[:, 24].mean() > 0.02
    assert picture[:, 15].mean() < 0.98
    assert np.abs(picture[:, 27:]).max() < 1e-6
    assert picture[:, :13].min() > 1 - 1e-6


def test_near_thing_in_focus_keeps_its_edge() -> None:
    layers, planes = edge_scene()
    picture = trace_pixels(layers, planes, 1.0, 6.0, 20, 40)[:, :, 0]
    np.testing.assert_allclose(picture[:, :20], 1, atol=1e-6)
    np.testing.assert_allclose(picture[:, 20:], 0, atol=1e-6)


def test_hidden_light_appears_around_a_blurred_edge() -> None:
    canvas = np.ones((120, 120), bool)
    half = np.zeros_like(canvas)
    half[:, :60] = True
    layers = flat_layers((0.0, half), (0.2, canvas))
    layers[1, :, :60, :3] = 1.0  # bright only where the near thing hides it
    planes = np.array([[1.0, *FLAT], [0.0, *FLAT]])
    seen, _ = pinhole_view(layers, planes, 20, 40)
    assert seen.max() <= 0.2 + 1e-6
    picture = trace_pixels(layers, planes, 0.0, 6.0, 20, 40)
    assert picture[:, 16:20].max() > 0.3


def test_blurred_edge_follows_the_disc() -> None:
    """The edge spread function of a uniform disc, in closed form."""
    layers, planes = edge_scene()
    radius = 8.0
    picture = trace_pixels(layers, planes, 0.0, radius, 20, 40)[:, :, 0].mean(0)
    x = np.clip((np.arange(40) - 19.5) / radius, -1, 1)
    expected = 0.5 - (np.arcsin(x) + x * np.sqrt(1 - x**2)) / np.pi
    assert np.abs(picture - expected).max() < 0.01


def test_hard_disparity_takes_the_nearest_half_opaque_surface() -> None:
    canvas = np.ones((40, 40), np.float32)
    faint, solid = 0.4 * canvas, canvas.copy()
    solid[:, 20:] = 0
    layers = flat_layers((0.5, faint), (0.5, solid), (0.5, canvas))
    planes = np.array([[0.9, *FLAT], [0.6, *FLAT], [0.1, 0.001, 0]])
    disparity, nearest = hard_disparity(layers, planes, 0, 20)
    np.testing.assert_array_equal(nearest[:, :10], 1)
    np.testing.assert_array_equal(nearest[:, 10:], 2)
    np.testing.assert_allclose(disparity[:, :10], 0.6)
    np.testing.assert_allclose(disparity[0, 15], 0.1 + 0.001 * 30.5, rtol=1e-6)


@pytest.mark.parametrize("K", [0.0, 0.8, 2.0, 5.0, 11.0])
def test_a_light_keeps_its_energy_and_fills_its_disc(K: float) -> None:
    layers = flat_layers((0.0, np.ones((140, 140), bool)))
    planes = np.array([[1.0, *FLAT]])
    light = np.array([[0, 70.3, 69.1, 2.0, 30.0, 20.0, 10.0]])
    picture = np.zeros((50, 50, 3), np.float32)
    add_lights(picture, layers, planes, 0.0, K, 20, light)
    energy = np.pi * 1.0**2 * np.array([30.0, 20.0, 10.0])  # radius 2 texels is 1 pixel
    np.testing.assert_allclose(picture.sum((0, 1)), energy, rtol=0.01)
    row, column = np.mgrid[:50, :50]
    distance = np.hypot(column - (70.3 - 20.5) / 2, row - (69.1 - 20.5) / 2)
    assert picture[distance > K + 2.3].max() == 0
    if K > 4:
        inside = picture[distance < K - 2][:, 0]
        np.testing.assert_allclose(inside, energy[0] / (np.pi * K**2), rtol=0.02)


def test_light_of_a_point_light_agrees_with_tracing_it() -> None:
    """Splitting small lights off must not change the picture: the same disc as a texture."""
    size, K = 40, 5.0
    canvas = np.ones((120, 120), bool)
    y, x = np.mgrid[:120, :120]
    half = x < 58
    plain = flat_layers((0.1, half), (0.2, canvas))
    planes = np.array([[1.0, *FLAT], [0.0, *FLAT]])
    disc = np.hypot(x - 62, y - 60) <= 6
    textured = plain.copy()
    textured[1, disc, :3] += 4.0
    traced = trace_pixels(textured, planes, 0.6, K, 20, size, density=1000.0)
    split = trace_pixels(plain, planes, 0.6, K, 20, size, density=1000.0)
    # The equal-area radius of the disc drawn in texels.
    radius = np.sqrt(disc.sum() / np.pi)
    add_lights(split, plain, planes, 0.6, K, 20, np.array([[1, 62, 60, radius, 4, 4, 4]]))
    # The near half plane covers part of the light.
    assert 0.5 < split.max() < 4.3
    assert np.abs(split - traced).mean() < 0.02
    assert split.sum() == pytest.approx(traced.sum(), rel=0.01)


@pytest.mark.parametrize("name", APERTURES)
def test_uniform_scene_stays_uniform_through_any_aperture(name: str) -> None:
    canvas = np.ones((120, 120), bool)
    half = np.zeros_like(canvas)
    half[:, :60] = True
    layers = flat_layers((0.4, half), (0.4, canvas))
    planes = np.array([[0.9, *FLAT], [0.2, 0.001, 0]])
    picture = trace_pixels(layers, planes, 0.5, 9.0, 28, 32, aperture=APERTURES[name])
    np.testing.assert_allclose(picture, 0.4, atol=2e-6)


def test_the_plain_disc_is_traced_as_ever() -> None:
    layers, planes = edge_scene()
    picture = trace_pixels(layers, planes, 0.2, 6.0, 20, 40, seed=3)
    same = trace_pixels(layers, planes, 0.2, 6.0, 20, 40, seed=3, aperture=Aperture())
    np.testing.assert_array_equal(picture, same)


@pytest.mark.parametrize("name", APERTURES)
@pytest.mark.parametrize("df", [-0.4, 1.3])
def test_any_aperture_agrees_with_the_tracer_of_planes(name: str, df: float) -> None:
    """Random points of each pixel against a regular grid: the same integrals."""
    rng = np.random.default_rng(9)
    smooth = ndimage.gaussian_filter(rng.standard_normal((2, 112, 112, 4)), (0, 4, 4, 0)) * 8
    layers = np.clip(0.5 + smooth, 0, 1).astype(np.float32)
    layers[1, ..., 3] = 1
    layers[..., :3] *= layers[..., 3:]
    planes = np.array([[0.9, *FLAT], [0.2, 0.001, 0]])
    aperture = APERTURES[name]
    margin, size, K = 26, 30, 6.0
    ours = trace_pixels(layers, planes, df, K, margin, size, density=1000.0, aperture=aperture)
    # Two texels per pixel: of the canvas every texel is traced, and four make a pixel.
    window = (margin, margin, 2 * size, 2 * size)
    fine = trace_planes(layers, planes, df, 2 * K, aperture=aperture, window=window)
    wanted = fine.reshape(size, 2, size, 2, 3).mean((1, 3))
    difference = np.abs(ours - wanted)
    # Noise of up to 160 points a pixel, and the coarseness of the grid, both about 0.003.
    assert difference.mean() < 0.006
    assert np.abs((ours - wanted).mean()) < 0.0005


def test_coloured_rims_are_another_focus() -> None:
    layers, planes = edge_scene()
    fringed = trace_pixels(layers, planes, 0.3, 8.0, 20, 40, aperture=Aperture(fringe=0.1))
    green = trace_pixels(layers, planes, 0.3, 8.0, 20, 40)
    others = trace_pixels(layers, planes, 0.3 - 0.1, 8.0, 20, 40)
    np.testing.assert_array_equal(fringed[..., 1], green[..., 1])
    np.testing.assert_array_equal(fringed[..., [0, 2]], others[..., [0, 2]])


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("name", ["blades", "anamorphic", "mirror lens", "spherical"])
def test_a_light_becomes_the_kernel(name: str, side: int) -> None:
    aperture, radius = APERTURES[name], 11.0
    layers = flat_layers((0.0, np.ones((140, 140), bool)))
    planes = np.array([[0.5 + 0.5 * side, *FLAT]])
    # In the middle of pixel (25, 25) of 51; its own radius of half a texel hardly shows.
    light = np.array([[0, 70.5, 70.5, 0.5, 3.0, 2.0, 1.0]])
    picture = np.zeros((51, 51, 3), np.float32)
    add_lights(picture, layers, planes, 0.5, 2 * radius, 20, light, aperture=aperture)
    energy = np.pi * 0.25**2 * np.array([3.0, 2.0, 1.0])
    np.testing.assert_allclose(picture.sum((0, 1)), energy, rtol=0.01)
    seen = picture[..., 0] / picture[..., 0].sum()

    def distance(signed_radius: float) -> float:
        kernel = aperture.kernel(signed_radius).numpy()
        return float(np.abs(seen - np.pad(kernel, 25 - kernel.shape[0] // 2)).sum())

    assert distance(side * radius) < 0.08
    if not aperture.is_symmetric:
        assert distance(-side * radius) > 2 * distance(side * radius)


@pytest.mark.parametrize("radius", [0.3, 0.6, 1.5, 3.0, 6.0])
@pytest.mark.parametrize("name", ["blades", "anamorphic", "mirror lens", "spherical"])
def test_a_light_keeps_its_energy_through_any_opening(name: str, radius: float) -> None:
    layers = flat_layers((0.0, np.ones((140, 140), bool)))
    light = np.array([[0, 70.3, 69.1, 2.0, 30.0, 20.0, 10.0]])
    picture = np.zeros((51, 51, 3), np.float32)
    planes = np.array([[1.0, *FLAT]])
    add_lights(picture, layers, planes, 0.0, radius, 20, light, aperture=APERTURES[name])
    energy = np.pi * np.array([30.0, 20.0, 10.0])  # a radius of 2 texels is 1 pixel
    np.testing.assert_allclose(picture.sum((0, 1)), energy, rtol=0.01)


@pytest.mark.parametrize("name", ["blades", "mirror lens", "cat-eye", "spherical"])
@pytest.mark.parametrize(("df", "place"), [(0.6, (62, 60)), (-0.6, (88, 42))])
def test_light_of_a_light_agrees_with_tracing_it_through_any_aperture(
    name: str, df: float, place: tuple[int, int]
) -> None:
    size, K = 40, 5.0
    canvas = np.ones((120, 120), bool)
    y, x = np.mgrid[:120, :120]
    plain = flat_layers((0.1, x < 58), (0.2, canvas))
    planes = np.array([[1.0, *FLAT], [0.0, *FLAT]])
    disc = np.hypot(x - place[0], y - place[1]) <= 6
    textured = plain.copy()
    textured[1, disc, :3] += 4.0
    settings = {"density": 1000.0, "aperture": APERTURES[name]}
    traced = trace_pixels(textured, planes, df, K, 20, size, **settings)
    split = trace_pixels(plain, planes, df, K, 20, size, **settings)
    before = split.copy()
    radius = np.sqrt(disc.sum() / np.pi)
    light = np.array([[1, *place, radius, 4, 4, 4]])
    add_lights(split, plain, planes, df, K, 20, light, aperture=APERTURES[name])
    assert split.max() > 0.5
    added, wanted = (split - before).sum((0, 1)), (traced - before).sum((0, 1))
    np.testing.assert_allclose(added, wanted, rtol=0.03)
    assert np.abs(split - traced).sum() < 0.1 * wanted.sum()

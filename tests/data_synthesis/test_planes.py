"""The tracer of planes against plain numpy, the reference renderer, goldens and closed forms."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from bokehdiff.rendering import Aperture, render_layers
from data_synthesis.planes import planes_from_published, trace_planes
from data_synthesis.speed import trace_with_numpy
from tests.test_goldens_renderer import INDEX, RAY_TRACED, cases, near_the_frame, tensors_of

REPOSITORY = Path(__file__).resolve().parents[2]
FLAT = [0.0, 0.0]
# The guard against parallel rays of the published renderer.
PUBLISHED_GUARD = 1e-5

HEART = np.array(
    [
        [0, 1, 1, 0, 0, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0.5, 0.5, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]
)
APERTURES = {
    "disc": Aperture(),
    "blades": Aperture(blades=5, rotation=20, roundness=0.3),
    "anamorphic": Aperture(squeeze=0.5),
    "mirror lens": Aperture(obstruction=0.4),
    "cat-eye": Aperture(cat_eye=0.7),
    "spherical": Aperture(spherical=0.8),
    "fringe": Aperture(fringe=0.06),
    "picture": Aperture.from_picture(HEART),
    "everything": Aperture(
        blades=7, squeeze=0.8, obstruction=0.2, cat_eye=0.5, spherical=-0.5, fringe=-0.04
    ),
}


def random_scene(
    rng: np.random.Generator, count: int, height: int, width: int, slope: float
) -> tuple[np.ndarray, np.ndarray]:
    """Premultiplied layers (L, H, W, 4) with soft edges, gaps and solid parts, and their planes.

    The last layer has gaps too. Disparity changes by up to ``slope`` over the canvas.
    """
    noise = rng.standard_normal((count, height, width, 4))
    smooth = ndimage.gaussian_filter(noise, (0, 2, 2, 0)) * 4
    layers = np.clip(0.5 + smooth, 0, 1)
    layers[..., 3] = np.clip(0.5 + 2 * smooth[..., 3], 0, 1)
    layers[..., :3] *= layers[..., 3:]
    d0 = np.sort(rng.uniform(0.1, 0.9, count))[::-1]
    slopes = rng.uniform(-slope, slope, (count, 2)) / max(height, width)
    return layers.astype(np.float32), np.column_stack([d0, slopes])


def assert_same_picture(ours: np.ndarray, wanted: np.ndarray) -> None:
    """Equal to rounding, but for the rays on which rounding decides.

    Those meet an opacity within rounding of a threshold or the border of the canvas: few, and
    one of them weighs at most a ray's share of a pixel.
    """
    assert ours.dtype == np.float32 and ours.shape == wanted.shape
    difference = np.abs(ours - wanted)
    assert difference.mean() < 1e-6
    assert np.mean(difference > 1e-5) < 2e-3
    assert difference.max() < 0.05


@pytest.mark.parametrize("name", APERTURES)
@pytest.mark.parametrize(("K", "df"), [(12.0, 0.35), (5.0, 0.8)])
def test_agrees_with_plain_numpy_in_float64(name: str, K: float, df: float) -> None:
    layers, planes = random_scene(np.random.default_rng(3), 3, 50, 90, 0.5)
    arguments = {"aperture": APERTURES[name], "samples_per_side": 9, "window": (6, 8, 38, 75)}
    ours = trace_planes(layers, planes, df, K, **arguments)
    wanted = trace_with_numpy(layers.astype(np.float64), planes, df, K, **arguments)
    assert_same_picture(ours, wanted)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 4),
    height=st.integers(1, 20),
    width=st.integers(1, 140),
    K=st.sampled_from([0.0, 1.0, 7.3, 20.0]),
    slope=st.sampled_from([0.0, 0.3]),
    name=st.sampled_from(sorted(APERTURES)),
)
def test_any_canvas_and_any_number_of_layers(
    seed: int, count: int, height: int, width: int, K: float, slope: float, name: str
) -> None:
    rng = np.random.default_rng(seed)
    layers, planes = random_scene(rng, count, height, width, slope)
    # As steep as a lens of this K can see.
    planes[:, 1:] *= min(1, 0.9 / max(K * np.hypot(planes[:, 1], planes[:, 2]).max(), 1e-9))
    df = float(rng.uniform(0, 1))
    ours = trace_planes(layers, planes, df, K, aperture=APERTURES[name], samples_per_side=7)
    wanted = trace_with_numpy(
        layers.astype(np.float64), planes, df, K, aperture=APERTURES[name], samples_per_side=7
    )
    difference = np.abs(ours - wanted)
    assert np.median(difference) < 1e-5
    # Single rays on which rounding decides; see assert_same_picture.
    assert np.sum(difference > 1e-4) <= 3 * 3


def published(planes: np.ndarray) -> torch.Tensor:
    """(1, L, 3) coefficients (a, b, c) of planes (d0, dx, dy)."""
    d0, dx, dy = planes.T
    return torch.from_numpy(np.stack([-dx / d0, -dy / d0, 1 / d0], axis=1))[None]


def guarded(coefficients: np.ndarray, df: float, K: float) -> np.ndarray:
    """Planes that rays meet where they meet the published ones with their guard.

    ``a u + b v + c / K + guard`` is what a smaller K would give, ``K / (1 + guard K / c)``, and a
    smaller K is a plane drawn towards the focus.
    """
    planes = planes_from_published(coefficients)
    drawn = 1 / (1 + PUBLISHED_GUARD * K / np.asarray(coefficients, np.float64)[:, 2:])
    return drawn * (planes - [df, 0, 0]) + [df, 0, 0]


@pytest.mark.parametrize("name", APERTURES)
def test_agrees_with_the_reference_renderer(name: str) -> None:
    layers, planes = random_scene(np.random.default_rng(5), 3, 34, 41, 0.4)
    df, K = 0.4, 9.0
    exact = torch.from_numpy(layers).double()
    alphas = exact[..., 3:]
    colours = exact[..., :3] / alphas.clamp_min(1e-9)
    coefficients = published(planes)
    render = render_layers(
        colours.permute(0, 3, 1, 2)[None],
        alphas.permute(0, 3, 1, 2)[None],
        coefficients,
        df,
        K,
        aperture=APERTURES[name],
        samples_per_side=9,
    )
    ours = trace_planes(
        layers,
        guarded(coefficients[0].numpy(), df, K),
        df,
        K,
        aperture=APERTURES[name],
        samples_per_side=9,
    )
    assert_same_picture(ours, render.image()[0].permute(1, 2, 0).numpy())


@pytest.mark.skipif(
    not INDEX.is_file(), reason=f"no {INDEX}; point BOKEHDIFF_FIXTURES at the folder of fixtures"
)
@pytest.mark.parametrize("name", RAY_TRACED)
def test_golden_pictures(name: str) -> None:
    case, stored = cases()[name], tensors_of(name)
    wanted = (stored["bokeh_cum"][:, :3] / stored["weight_cum"].clamp_min(1e-5)).clamp_min(0)
    certain = ~near_the_frame(stored["coffs"], case)
    assert certain.double().mean() > 0.5
    for item in range(len(wanted)):
        alphas = stored["alphas"][item]
        layers = torch.cat([alphas * stored["images"][item], alphas], dim=1).permute(0, 2, 3, 1)
        planes = guarded(stored["coffs"][item].numpy(), case["focus"], case["K"])
        ours = trace_planes(
            layers.numpy(), planes, case["focus"], case["K"], samples_per_side=case["side"]
        )
        difference = (torch.from_numpy(ours).permute(2, 0, 1) - wanted[item]).abs()
        assert (difference * certain[item]).max() < 2e-5


def test_planes_of_published_coefficients() -> None:
    a, b, c = 0.01, -0.02, 4.0
    [[d0, dx, dy]] = planes_from_published(np.array([[a, b, c]]))
    x, y = 7.0, 3.0
    assert d0 + dx * x + dy * y == pytest.approx((1 - a * x - b * y) / c, rel=1e-15)


def test_slanted_ramp_has_its_closed_form() -> None:
    """The mean of a linear ramp over the circle of confusion of a slanted plane.

    With slope k = K dx the hit of lens point (u, v) is x + s u / (1 - k u), and the mean of
    u / (1 - k u) over the unit disc is (2 (1 - sqrt(1 - k^2)) / k^2 - 1) / k.
    """
    height, width = 61, 81
    K, df, slope = 10.0, 0.2, 0.06
    ramp = np.linspace(0.1, 0.9, width)
    layers = np.ones((1, height, width, 4), np.float32)
    layers[0, ..., :3] = ramp[:, None]
    planes = np.array([[0.7 - slope * 40, slope, 0.0]])
    window = (30, 35, 1, 10)
    picture = trace_planes(layers, planes, df, K, samples_per_side=101, window=window)
    x = np.arange(35, 45)
    s = K * (planes[0, 0] + slope * x - df)
    k = K * slope
    mean = (2 * (1 - np.sqrt(1 - k * k)) / k**2 - 1) / k
    expected = ramp[0] + (ramp[1] - ramp[0]) * (x + s * mean)
    assert (expected - ramp[35:45]).min() > 0.003, "the slope must show"
    # A grid of 101 points per side fills the disc to about 101^-1.5 of its area.
    np.testing.assert_allclose(picture[0, :, 0], expected, atol=1e-4)


@pytest.mark.parametrize("df", [0.0, 2.0])
def test_blurred_edge_covers_a_circular_segment(df: float) -> None:
    """A near half plane, blurred in front of the focus or behind it, over a black plane."""
    half = np.zeros((2, 41, 64, 4), np.float32)
    half[1, ..., 3] = 1
    half[0, :, :32] = 1
    planes = np.array([[1.0, *FLAT], [df, *FLAT]])
    radius = 8.0
    picture = trace_planes(half, planes, df, radius, samples_per_side=101, window=(20, 16, 1, 32))
    # The texels' own edge lies between the columns 31 and 32.
    x = np.clip((np.arange(16, 48) - 31.5) / radius, -1, 1)
    expected = 0.5 - (np.arcsin(x) + x * np.sqrt(1 - x**2)) / np.pi
    np.testing.assert_allclose(picture[0, :, 0], expected, atol=0.005)


@pytest.mark.parametrize("name", APERTURES)
def test_uniform_light_stays_uniform(name: str) -> None:
    layers = random_scene(np.random.default_rng(1), 3, 40, 50, 0)[0]
    layers[-1, ..., 3] = 1
    layers[..., :3] = layers[..., 3:] * np.float32([0.2, 0.5, 0.8])
    planes = np.array([[0.9, 0.001, 0], [0.5, *FLAT], [0.1, 0, 0.002]])
    picture = trace_planes(layers, planes, 0.5, 9.0, aperture=APERTURES[name], samples_per_side=9)
    np.testing.assert_allclose(picture, np.broadcast_to([0.2, 0.5, 0.8], (40, 50, 3)), atol=2e-6)


@pytest.mark.parametrize("name", ["disc", "everything"])
def test_without_strength_layers_are_composited(name: str) -> None:
    layers, planes = random_scene(np.random.default_rng(2), 3, 30, 40, 0.5)
    layers[-1, ..., 3] = 1
    layers[layers[..., 3] < 0.02] = 0
    layers[..., 3] = np.where(layers[..., 3] > 0.98, 1, layers[..., 3])
    picture = trace_planes(layers, planes, 0.3, 0.0, aperture=APERTURES[name], samples_per_side=5)
    expected = np.zeros((30, 40, 3))
    for layer in layers[::-1].astype(np.float64):
        expected = layer[..., :3] + (1 - layer[..., 3:]) * expected
    np.testing.assert_allclose(picture, expected, atol=2e-6)


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("name", ["blades", "anamorphic", "mirror lens", "spherical", "picture"])
def test_a_point_of_light_becomes_the_kernel(name: str, side: int) -> None:
    """Orientation and profile: the picture of one bright texel, against the aperture's kernel."""
    aperture, radius = APERTURES[name], 11.0
    layers = np.zeros((1, 41, 41, 4), np.float32)
    layers[..., 3] = 1
    layers[0, 20, 20, :3] = 100
    plane = np.array([[0.5 + 0.5 * side, *FLAT]])
    picture = trace_planes(layers, plane, 0.5, 2 * radius, aperture=aperture, samples_per_side=61)
    seen = picture[..., 1] / picture[..., 1].sum()
    kernel = aperture.kernel(side * radius).numpy()
    reach = kernel.shape[0] // 2
    padded = np.pad(kernel, 20 - reach)
    distance = np.abs(seen - padded).sum()
    # Texels are tents, the kernel's pixels are boxes: they differ along the rims.
    assert distance < 0.08
    other_side = np.pad(aperture.kernel(-side * radius).numpy(), 20 - reach)
    if not aperture.is_symmetric:
        assert np.abs(seen - other_side).sum() > 2 * distance


def test_fringe_is_another_focus_for_red_and_blue() -> None:
    layers, planes = random_scene(np.random.default_rng(4), 2, 40, 50, 0.3)
    fringed = trace_planes(layers, planes, 0.4, 10.0, aperture=Aperture(fringe=0.05))
    green = trace_planes(layers, planes, 0.4, 10.0)
    others = trace_planes(layers, planes, 0.4 - 0.05, 10.0)
    np.testing.assert_array_equal(fringed[..., 1], green[..., 1])
    np.testing.assert_array_equal(fringed[..., [0, 2]], others[..., [0, 2]])
    assert np.abs(green - others).max() > 0.05


@pytest.mark.parametrize("name", ["disc", "spherical"])
def test_a_window_is_a_crop(name: str) -> None:
    layers, planes = random_scene(np.random.default_rng(6), 2, 60, 150, 0.3)
    arguments = {"aperture": APERTURES[name], "samples_per_side": 9}
    whole = trace_planes(layers, planes, 0.5, 8.0, **arguments)
    part = trace_planes(layers, planes, 0.5, 8.0, **arguments, window=(11, 17, 29, 101))
    # The tiles lie elsewhere, and with them the roundings.
    difference = np.abs(part - whole[11:40, 17:118])
    assert np.median(difference) < 1e-6
    assert difference.max() < 2e-3


def test_light_beyond_the_window_is_seen() -> None:
    layers = np.ones((1, 30, 40, 4), np.float32)
    layers[0, :, 20:, :3] = 0
    planes = np.array([[0.0, *FLAT]])
    picture = trace_planes(layers, planes, 1.0, 8.0, window=(10, 20, 10, 10))
    assert picture[:, 0].min() > 0.4
    assert picture[:, 9].max() == 0


def digest_of_a_picture() -> str:
    layers, planes = random_scene(np.random.default_rng(7), 3, 70, 90, 0.3)
    picture = trace_planes(
        layers, planes, 0.5, 9.0, aperture=APERTURES["everything"], samples_per_side=9
    )
    return hashlib.sha256(picture.tobytes()).hexdigest()


def test_same_bytes_in_threads_and_processes() -> None:
    expected = digest_of_a_picture()
    with ThreadPoolExecutor(4) as pool:
        assert {*pool.map(lambda _: digest_of_a_picture(), range(8))} == {expected}
    program = "from tests.data_synthesis.test_planes import digest_of_a_picture as f; print(f())"
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.split()[-1] == expected


def test_inputs_are_left_alone() -> None:
    layers, planes = random_scene(np.random.default_rng(8), 2, 20, 20, 0.1)
    before = layers.copy(), planes.copy()
    trace_planes(layers, planes, 0.5, 4.0, samples_per_side=5)
    np.testing.assert_array_equal(layers, before[0])
    np.testing.assert_array_equal(planes, before[1])


LAYERS = np.ones((2, 8, 9, 4), np.float32)
PLANES = np.array([[0.8, *FLAT], [0.2, *FLAT]])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"layers": LAYERS[0]}, "wanted \\(L, H, W, 4\\)"),
        ({"layers": LAYERS.astype(np.uint8)}, "type uint8"),
        ({"layers": LAYERS * np.nan}, "NaN or infinity"),
        ({"layers": LAYERS * 255}, "goes from 255 to 255"),
        ({"planes": PLANES[:1]}, "planes has shape \\(1, 3\\)"),
        ({"planes": PLANES + np.inf}, "finite"),
        ({"planes": PLANES + [0, 0.2, 0]}, "edge-on"),
        ({"K": -1.0}, "K is -1"),
        ({"df": np.nan}, "df is nan"),
        ({"window": (0, 0, 9, 9)}, "canvas of 8 x 9"),
        ({"window": (-1, 0, 4, 4)}, "window is"),
        ({"window": (0, 0, 0, 4)}, "at least one pixel"),
        ({"samples_per_side": 0}, "samples_per_side is 0"),
    ],
)
def test_mistakes_are_refused(arguments: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        trace_planes(**{"layers": LAYERS, "planes": PLANES, "df": 0.5, "K": 6.0, **arguments})

"""The blur radius measured between two pictures: exact waves, a plain twin, what is left out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bokehdiff import blur_radius
from bokehdiff.blur_radius import measure_blur_radius, minimum_of_costs
from tests.waves import Waves

INSIDE = (..., slice(24, -24), slice(24, -24))
RADII = torch.arange(0, 12.1, 0.25)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("radius", [0.0, 0.7, 1.5, 3.3, 6.1, 9.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_radius_of_waves_blurred_exactly(radius: float, dtype: torch.dtype) -> None:
    waves = Waves(seed=3)
    sharp, blurred = waves.light(96, 112).to(dtype), waves.light(96, 112, radius).to(dtype)
    measured = measure_blur_radius(sharp, blurred, RADII)
    assert measured.radius.shape == measured.reliability.shape == (1, 1, 96, 112)
    assert measured.radius.dtype == dtype
    # A parabola over steps of a quarter of a pixel; the mean square is even in the radius.
    error = (measured.radius - radius)[INSIDE]
    assert float(error.abs().median()) < 0.03 and float(error.abs().max()) < 0.1
    assert float(measured.reliability[INSIDE].min()) > 0.5


def test_reliability_falls_with_texture_and_rises_with_it() -> None:
    flat = torch.full((1, 3, 64, 64), 0.5)
    faint = 0.5 + (Waves(seed=1).light(64, 64).float() - 0.5) / 40
    strong = Waves(seed=1).light(64, 64).float()
    noise = 0.005 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def trust(sharp: torch.Tensor, blurred: torch.Tensor) -> float:
        return float(
            measure_blur_radius(sharp, blurred + noise, RADII).reliability[INSIDE].median()
        )

    blurred = Waves(seed=1).light(64, 64, 3.0).float()
    on_flat, on_faint = trust(flat, flat), trust(faint, 0.5 + (blurred - 0.5) / 40)
    on_strong = trust(strong, blurred)
    assert on_flat < 0.05 and on_faint < 0.1
    assert on_strong > 0.5


def test_what_no_radius_explains_is_not_reliable() -> None:
    sharp, other = Waves(seed=1).light(64, 64), Waves(seed=2).light(64, 64, 3.0)
    matching = Waves(seed=1).light(64, 64, 3.0)
    wrong = measure_blur_radius(sharp, other, RADII).reliability[INSIDE].median()
    right = measure_blur_radius(sharp, matching, RADII).reliability[INSIDE].median()
    assert float(wrong) < 0.5 < 0.8 < float(right)


def test_light_of_clipped_pixels_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    waves = Waves(seed=5)
    sharp, blurred = waves.light(96, 96), waves.light(96, 96, 4.0)
    # A lamp of 20, which a disc of radius 4 spreads at 20 / (16 pi), is clipped to 1 in both.
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    distance = torch.hypot(y - 48, x - 48)
    sharp = torch.where(distance == 0, 1.0, sharp)
    blurred = torch.where(distance <= 4, (blurred + 20 / (16 * math.pi)).clamp_max(1), blurred)
    measured = measure_blur_radius(sharp, blurred, RADII)
    error = (measured.radius[0, 0] - 4).abs()
    assert float(error[distance < 24].max()) < 0.25
    monkeypatch.setattr(blur_radius, "CLIPPED_LIGHT", 2.0)
    misled = (measure_blur_radius(sharp, blurred, RADII).radius[0, 0] - 4).abs()
    assert float(misled[distance <= 4].median()) > 1


def test_costs_agree_with_a_plain_twin() -> None:
    """Direct sums over pixels, a blur for every candidate, against transforms of nodes."""
    window, height, width = 1.5, 26, 30
    waves = Waves(seed=7, shortest=5)
    sharp, frame = waves.light(height, width), waves.light(height, width, 2.0)
    candidates = torch.tensor([0.0, 0.9, 2.1, 3.2], dtype=torch.float64)
    costs = blur_radius._costs(
        sharp[0],
        frame,
        candidates[None],
        blur_radius._nodes(3.2),
        window,
        *[blur_radius.windows_of(height, width)[0]] * 2,
    )
    # 64 x 64 zeros: the wave response of a disc, as a sum over all frequencies of the whole grid.
    size = 64
    place = np.arange(size)
    frequency = np.fft.fftfreq(size)
    number = 2 * np.pi * np.hypot(frequency[:, None], frequency[None])
    light = np.zeros((5, size, size))
    light[:3, :height, :width] = sharp[0].numpy()
    light[3, :height, :width] = 1
    reach = math.ceil(2.5 * window)
    offsets = np.arange(-reach, reach + 1)
    bell = np.exp(-0.5 * (offsets / window) ** 2)
    bell /= bell.sum()
    for index, radius in enumerate(candidates.tolist()):
        argument = torch.from_numpy(np.maximum(number * radius, 1e-9))
        response = (2 * torch.special.bessel_j1(argument) / argument).numpy()
        kernel = np.real(np.fft.ifft2(response))
        blurred = np.zeros((4, height, width))
        for y in range(height):
            for x in range(width):
                shifted = kernel[(y - place)[:, None] % size, (x - place)[None] % size]
                blurred[:, y, x] = (light[:4] * shifted).sum((1, 2))
        share = np.clip(blurred[3], 1e-3, 1)
        squared = (((blurred[:3] / share) - frame[0].numpy()) ** 2).sum(0)

        def mean(values: np.ndarray) -> np.ndarray:
            wide = np.pad(values, reach, mode="edge")
            result = np.zeros((height, width))
            for dy in range(2 * reach + 1):
                for dx in range(2 * reach + 1):
                    result += bell[dy] * bell[dx] * wide[dy : dy + height, dx : dx + width]
            return result

        own = sum(mean(c**2) - mean(c) ** 2 for c in frame[0].numpy())
        unknown = blur_radius.UNKNOWN_WEIGHT
        variance = mean(share**2 * squared) + unknown * own
        variance /= mean(share**2) + unknown
        expected = np.log(variance + blur_radius.ROUNDING_VARIANCE)
        # Between nodes a quarter of a pixel apart: 3 % of the variance of the difference.
        difference = np.abs(np.exp(costs[index].numpy()) - np.exp(expected))
        assert difference.max() < 0.03 * np.exp(expected).max(), radius


def test_tiles_give_what_the_whole_picture_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    sharp = Waves(seed=2).light(150, 170)[0]
    frame = Waves(seed=2).light(150, 170, 3.0)
    candidates = torch.linspace(0, 6, 13, dtype=torch.float64)
    whole = minimum_of_costs(sharp, frame, candidates, candidates[None], 2.5)
    monkeypatch.setattr(blur_radius, "NUMBERS_AT_ONCE", 1)
    monkeypatch.setattr(blur_radius, "SMALLEST_TILE", 64)
    tiled = minimum_of_costs(sharp, frame, candidates, candidates[None], 2.5)
    # A tile sees the picture as far as discs reach, but not all of the ripples of the transform.
    assert float((whole.place - tiled.place).abs().max()) < 0.02


def test_pictures_of_a_batch_do_not_mix() -> None:
    one, two = Waves(seed=1).light(48, 48), Waves(seed=2).light(48, 48)
    blurred = torch.cat([Waves(1).light(48, 48, 2.0), Waves(2).light(48, 48, 5.0)])
    both = measure_blur_radius(torch.cat([one, two]), blurred, RADII)
    alone = measure_blur_radius(two, blurred[1:], RADII)
    assert torch.equal(both.radius[1:], alone.radius)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"radii": [0.0, 1.0]}, "at least 3"),
        ({"radii": [0.0, 2.0, 1.0]}, "ascending"),
        ({"radii": [-1.0, 0.0, 1.0]}, "0 or more"),
        ({"radii": [0.0, 1.0, math.nan]}, "at least 3"),
        ({"blurred": torch.ones(1, 3, 8, 9)}, "like sharp"),
        ({"blurred": torch.full((1, 3, 8, 8), math.nan)}, "linear light"),
        ({"sharp": -torch.ones(1, 3, 8, 8)}, "not negative"),
        ({"sharp": torch.ones(3, 8, 8)}, "wanted \\(B, C, H, W\\)"),
        ({"sharp": torch.ones(1, 3, 8, 8, dtype=torch.uint8)}, "float32 or float64"),
        ({"window": 0.0}, "0.5 to 100"),
    ],
)
def test_mistakes_are_told(change: dict[str, object], said: str) -> None:
    arguments: dict[str, object] = {
        "sharp": torch.ones(1, 3, 8, 8),
        "blurred": torch.ones(1, 3, 8, 8),
        "radii": [0.0, 1.0, 2.0],
    }
    with pytest.raises(ValueError, match=said):
        measure_blur_radius(**{**arguments, **change})  # type: ignore[arg-type]

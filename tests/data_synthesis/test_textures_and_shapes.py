"""Textures and outlines: ranges, statistics, determinism."""

from __future__ import annotations

import numpy as np
import pytest

from data_synthesis.shapes import SOLID_SHAPES, THIN_SHAPES, solid_shape, thin_shape
from data_synthesis.textures import TEXTURE_CHANCES, TextureBank, fractal_noise


@pytest.mark.parametrize("kind", list(TEXTURE_CHANCES))
def test_textures_are_linear_light_and_repeatable(kind: str) -> None:
    made = [TextureBank(np.random.default_rng(4), 90, 110).texture(kind) for _ in range(2)]
    assert made[0].shape == (90, 110, 3) and made[0].dtype == np.float32
    assert made[0].min() >= 0 and made[0].max() <= 1
    assert made[0].std() > 1e-3
    np.testing.assert_array_equal(*made)


def test_fractal_noise_has_the_spectrum_asked_for() -> None:
    exponent = 1.2
    field = fractal_noise(np.random.default_rng(0), 256, 256, exponent)
    assert abs(field.mean()) < 1e-5 and abs(field.std() - 1) < 1e-3
    power = np.abs(np.fft.fft2(field)) ** 2
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256)) * 256
    bands = [(4, 8), (8, 16), (16, 32), (32, 64), (64, 128)]
    means = [power[(frequency >= a) & (frequency < b)].mean() for a, b in bands]
    slope = np.polyfit(np.log([a for a, _ in bands]), np.log(means), 1)[0]
    assert slope == pytest.approx(-2 * exponent, abs=0.15)


@pytest.mark.parametrize("kind", SOLID_SHAPES)
def test_solid_shapes(kind: str) -> None:
    covered = []
    for seed in range(4):
        mask = solid_shape(np.random.default_rng(seed), 60, 48, kind)
        assert mask.shape == (60, 48) and mask.dtype == np.float32
        assert mask.min() >= 0 and mask.max() <= 1
        np.testing.assert_array_equal(mask, solid_shape(np.random.default_rng(seed), 60, 48, kind))
        covered.append(mask.mean())
    assert 0.03 < np.mean(covered) <= 1


@pytest.mark.parametrize("kind", THIN_SHAPES)
def test_thin_shapes(kind: str) -> None:
    covered = []
    for seed in range(4):
        mask = thin_shape(np.random.default_rng(seed), 160, 160, kind)
        assert mask.shape == (160, 160) and 0 <= mask.min() and mask.max() <= 1
        covered.append(mask.mean())
    assert 0.002 < np.mean(covered) < 0.8


def test_unknown_kinds_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="'cube'"):
        solid_shape(rng, 20, 20, "cube")
    with pytest.raises(ValueError, match="'rope'"):
        thin_shape(rng, 20, 20, "rope")
    with pytest.raises(ValueError, match="'photo'"):
        TextureBank(rng, 20, 20).texture("photo")

"""Measured blur: discs of known radius over textures, and regions that cannot be measured."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.signal import fftconvolve

from bokehdiff.srgb import linear_to_srgb, srgb_to_linear
from evaluation.blur_measure import measured_blur

FINE = 4  # the world has so many samples a side in each pixel
BORDER = 26
RADII = np.array([0, 0.5, 1, 1.5, 2, 3, 5, 8, 12, 18, 24])


def noise(slope: float) -> np.ndarray:
    """Linear light (480, 480): noise whose amplitude falls with frequency to the power -slope."""
    side = 120 * FINE
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    frequency[0, 0] = np.inf
    white = np.fft.rfft2(np.random.default_rng(0).normal(size=(side, side)))
    made = np.fft.irfft2(white * np.maximum(frequency, 1 / side) ** -slope)
    return np.clip(0.3 + 0.1 * made / made.std(), 0.01, 0.99)


def photo_of_a_cat() -> np.ndarray:
    from skimage.data import chelsea

    return srgb_to_linear(chelsea()[:300, :448, 1] / 255.0)


def photographed(world: np.ndarray, radius: float) -> np.ndarray:
    """(H, W, 3) 8-bit sRGB / 255 of the world through a disc of so many pixels' radius."""
    reach = int(radius * FINE) + 1
    offsets = np.arange(-reach, reach + 1)
    disc = (np.hypot(offsets[:, None], offsets) <= radius * FINE).astype(float)
    padded = np.pad(world, reach, mode="symmetric")
    seen = fftconvolve(padded, disc / disc.sum(), mode="valid")
    height, width = (side // FINE for side in seen.shape)
    pixels = seen.reshape(height, FINE, width, FINE).mean(axis=(1, 3))
    shown = np.repeat(linear_to_srgb(pixels)[..., None], 3, axis=2)
    return np.round(np.clip(shown, 0, 1) * 255) / 255


def middle(picture: np.ndarray) -> np.ndarray:
    mask = np.zeros(picture.shape[:2], bool)
    mask[BORDER:-BORDER, BORDER:-BORDER] = True
    return mask


@pytest.mark.parametrize("texture", ["cat", 0.5, 1.5])
def test_it_is_the_radius_of_the_disc(texture: str | float) -> None:
    world = photo_of_a_cat() if isinstance(texture, str) else noise(texture)
    photo = photographed(world, 0)
    mask = middle(photo)
    measured = np.array(
        [measured_blur(photo, photographed(world, radius), mask, 32) for radius in RADII]
    )
    assert measured[0] == 0
    assert (np.diff(measured) > 0).all()
    assert np.corrcoef(RADII, measured)[0, 1] > 0.999
    # The photo's own pixels hide part of a blur that is smaller than they are.
    np.testing.assert_allclose(measured[RADII >= 1], RADII[RADII >= 1], rtol=0.10)
    np.testing.assert_allclose(measured[RADII >= 2], RADII[RADII >= 2], rtol=0.03)


@pytest.mark.parametrize("radius", [3.0, 7.0, 9.0, 11.5])
def test_a_pattern_that_a_disc_turns_around_is_no_trap(radius: float) -> None:
    # A disc of radius r inverts a wave of frequency f from 2 pi f r = 3.83 on: here at 6.1 and
    # 4.3 px, and turns it back at 11.2 and 7.8 px.
    side = 200
    at = np.arange(side) - side / 2
    along = at[:, None] * 0.6 + at * 0.8

    def pattern(radius: float) -> np.ndarray:
        """By the Bessel function of an own series: J1(x) / x = sum (-x^2/4)^k / (2 k! (k+1)!)."""
        light = 0.4
        for frequency in (0.1, 0.1414):
            quarter = -((2 * np.pi * frequency * radius) ** 2) / 4
            term, contrast = 1.0, 0.0
            for k in range(40):
                contrast += term
                term *= quarter / ((k + 1) * (k + 2))
            light = light + 0.15 * contrast * np.sin(2 * np.pi * frequency * along)
        return np.repeat(linear_to_srgb(light)[..., None], 3, axis=2)

    mask = np.zeros((side, side), bool)
    mask[70:130, 70:130] = True
    measured = measured_blur(pattern(0), pattern(radius), mask, 14)
    assert measured == pytest.approx(radius, abs=0.02)


def test_a_gaussian_is_like_a_disc_of_nearly_its_second_moment() -> None:
    world = noise(1.0)
    photo = photographed(world, 0)
    light = srgb_to_linear(photo)
    measured = []
    for radius in (2.0, 4.0, 8.0, 12.0):
        blurred = linear_to_srgb(gaussian_filter(light, (radius / 2, radius / 2, 0)))
        measured.append(measured_blur(photo, blurred, middle(photo)) / radius)
    assert 0.8 < min(measured) and max(measured) < 1.0


def test_only_the_mask_counts() -> None:
    world = noise(1.0)
    photo, rendered = photographed(world, 0), photographed(world, 5)
    mask = np.zeros(photo.shape[:2], bool)
    mask[50:70, 50:70] = True
    wanted = measured_blur(photo, rendered, mask, 8)
    assert wanted == pytest.approx(5, rel=0.03)
    elsewhere = rendered.copy()
    elsewhere[~mask] = 0
    assert measured_blur(photo, elsewhere, mask, 8) == wanted
    # Of the photo, what the largest disc carries in; and the end of the search changes nothing.
    far = photo.copy()
    far[:40], far[80:], far[:, :40], far[:, 80:] = 0, 0, 0, 0
    assert measured_blur(far, rendered, mask, 8) == wanted
    assert measured_blur(photo, rendered, mask, 30) == pytest.approx(wanted, abs=0.02)


def test_bytes_are_taken_as_they_are() -> None:
    world = noise(1.0)
    photo, rendered = photographed(world, 0), photographed(world, 3)
    mask = middle(photo)
    as_bytes = [(255 * picture).round().astype(np.uint8) for picture in (photo, rendered)]
    assert measured_blur(*as_bytes, mask) == measured_blur(photo, rendered, mask)


def test_a_mask_at_the_frame_is_measured() -> None:
    world = noise(1.0)
    photo, rendered = photographed(world, 0), photographed(world, 6)
    mask = np.zeros(photo.shape[:2], bool)
    mask[:40, :40] = True
    # The world goes on as its mirror image in both, by the construction of `photographed`.
    assert measured_blur(photo, rendered, mask) == pytest.approx(6, rel=0.03)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rendered": np.zeros((40, 41, 3))}, "wanted the same"),
        ({"photo": np.zeros((40, 40)), "rendered": np.zeros((40, 40))}, "height, width, 3"),
        ({"rendered": np.full((40, 40, 3), 1.5)}, r"from 1.5 to 1.5; wanted display-encoded"),
        ({"rendered": np.full((40, 40, 3), np.nan)}, "wanted display-encoded"),
        ({"rendered": np.zeros((40, 40, 3), np.int32)}, "is int32"),
        ({"mask": np.ones((40, 40))}, "wanted bool"),
        ({"mask": np.ones((20, 40), bool)}, r"wanted bool of \(40, 40\)"),
        ({"mask": np.zeros((40, 40), bool)}, "holds 0 pixels; wanted at least 200"),
        ({"photo": np.full((40, 40, 3), 0.5)}, "no texture"),
        ({"largest_radius": 0.0}, "above 0"),
    ],
)
def test_mistakes_get_a_sentence(change: dict[str, object], words: str) -> None:
    texture = np.random.default_rng(0).random((40, 40, 3))
    given = {"photo": texture, "rendered": texture, "mask": np.ones((40, 40), bool), **change}
    with pytest.raises(ValueError, match=words):
        measured_blur(**given)

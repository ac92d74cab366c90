"""Colours are brought to the statistics of another picture, in 8-bit LAB."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bokehdiff.colour_transfer import lab_to_rgb, rgb_to_lab, transfer_colours


def noise(seed: int, low: int = 0, high: int = 256, size: tuple[int, int] = (40, 60)) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (*size, 3), dtype=np.uint8)


def exact_lab(rgb: np.ndarray) -> np.ndarray:
    """CIE LAB of sRGB under D65 in float64, as the standard defines it, on 8-bit axes."""
    display = rgb / 255
    light = np.where(display <= 0.04045, display / 12.92, ((display + 0.055) / 1.055) ** 2.4)
    matrix = [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
    xyz = light @ np.array(matrix).T / [0.95047, 1.0, 1.08883]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    lightness = 116 * f[..., 1] - 16
    axes = [lightness * 2.55, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])]
    return np.stack(axes, -1) + [0, 128, 128]


def test_lab_is_that_of_the_standard_in_eight_bits() -> None:
    rgb = noise(0, size=(200, 200))
    # Half a unit of rounding at the end; before it linear light is in steps of 1 / 2040, each of
    # which is 500 * 7.8 / 2040 = 1.9 units of a in dark colours.
    difference = np.abs(rgb_to_lab(rgb) - exact_lab(rgb))
    assert difference.max() < 2.5 and (difference.mean((0, 1)) < 0.3).all()


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((0, 0, 0), (0, 128, 128)),
        ((255, 255, 255), (255, 128, 128)),
        ((128, 128, 128), (137, 128, 128)),
        ((255, 0, 0), (136, 208, 195)),
        ((0, 255, 0), (224, 42, 211)),
        ((0, 0, 255), (82, 207, 20)),
    ],
)
def test_known_colours(rgb: tuple[int, ...], lab: tuple[int, ...]) -> None:
    picture = np.array(rgb, np.uint8).reshape(1, 1, 3)
    assert tuple(rgb_to_lab(picture)[0, 0]) == lab


def test_colours_come_back_from_lab() -> None:
    """One unit of a or b is several levels of a dark saturated colour, at most one of a gray."""
    gray = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 256, 3)
    assert np.abs(lab_to_rgb(rgb_to_lab(gray)).astype(int) - gray).max() <= 1
    rgb = noise(1, size=(300, 300))
    difference = np.abs(lab_to_rgb(rgb_to_lab(rgb)).astype(int) - rgb)
    assert difference.mean() < 1 and np.quantile(difference, 0.9) <= 2


@pytest.mark.parametrize("statistics", ["lab", "lab_mean"])
def test_the_statistics_become_those_of_the_reference(statistics: Any) -> None:
    image, reference = noise(0, 60, 160), noise(1, 90, 140, size=(30, 20))
    given, wanted = rgb_to_lab(image), rgb_to_lab(reference)
    moved = rgb_to_lab(transfer_colours(image, reference, statistics))
    # Rounding down costs half a unit of LAB, and the way over sRGB less than that.
    np.testing.assert_allclose(moved.mean((0, 1)), wanted.mean((0, 1)) - 0.5, atol=0.5)
    deviation = wanted if statistics == "lab" else given
    np.testing.assert_allclose(moved.std((0, 1)), deviation.std((0, 1)), rtol=0.05)


def test_a_picture_to_its_own_colours_stays() -> None:
    image = noise(0, 60, 160)
    # Means are subtracted and added in floats, so that some values round down to the one below.
    through_lab = lab_to_rgb(rgb_to_lab(image)).astype(int)
    assert np.abs(transfer_colours(image, image).astype(int) - through_lab).mean() < 2


def test_a_picture_of_one_colour_takes_the_mean_alone() -> None:
    flat = np.full((8, 8, 3), (90, 120, 40), np.uint8)
    moved = transfer_colours(flat, noise(0, 60, 160))
    assert (moved == moved[0, 0]).all()
    again = transfer_colours(moved, flat)
    assert np.abs(again.astype(int) - flat).max() <= 6  # a unit of LAB, in this dark green


@pytest.mark.parametrize(
    "picture",
    [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), "photo.png",
     np.zeros((0, 4, 3), np.uint8)],
)  # fmt: skip
def test_other_kinds_of_pictures_are_refused(picture: Any) -> None:
    with pytest.raises(ValueError, match=r"wanted .*\(H, W, 3\)"):
        rgb_to_lab(picture)
    with pytest.raises(ValueError, match=r"wanted .*\(H, W, 3\)"):
        lab_to_rgb(picture)


def test_unknown_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match="'rgb'.*lab_mean"):
        transfer_colours(noise(0), noise(1), "rgb")  # type: ignore[arg-type]

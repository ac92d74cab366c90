"""The colours that show how much is blurred, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bokehdiff.overlay import BEHIND, IN_FOCUS, IN_FRONT, coc_overlay

GRAY = torch.full((1, 3, 1, 9), 0.5)
RADII = torch.tensor([-50.0, -20.0, -5.0, -1.0, 0.0, 0.4, 1.0, 5.0, 20.0]).reshape(1, 1, 1, 9)


def blended(opacity: float, paint: tuple[float, float, float], gray: float = 0.5) -> list[float]:
    return [gray + opacity * (part - gray) for part in paint]


def test_colours_at_known_radii():
    shown = coc_overlay(GRAY, RADII, full_radius_px=20)[0, :, 0].T
    for radius, colour in zip(RADII.flatten().tolist(), shown.tolist(), strict=True):
        if abs(radius) <= 0.5:
            wanted = blended(0.65, IN_FOCUS)
        else:
            opacity = 0.1 + 0.55 * min(abs(radius) / 20, 1) ** 0.5
            wanted = blended(opacity, IN_FRONT if radius > 0 else BEHIND)
        assert colour == pytest.approx(wanted, abs=1e-6)


def test_between_half_a_pixel_and_one_the_green_gives_way():
    radii = torch.linspace(-1, 1, 9).reshape(1, 1, 1, 9)
    shown = coc_overlay(GRAY, radii, full_radius_px=20)[0, :, 0]
    red, green, blue = shown - 0.5
    # 0.75 pixels: half of the paint of the side, and half of the green over it.
    opacity = 0.5 * (0.1 + 0.55 * (0.75 / 20) ** 0.5)
    side = blended(opacity, IN_FRONT)
    wanted = [s + 0.325 * (g - s) for s, g in zip(side, IN_FOCUS, strict=True)]
    assert shown[:, 7].tolist() == pytest.approx(wanted, abs=1e-6)
    assert bool((green[2:7] > 0).all()) and green[0] < 0 and green[8] < 0


def test_hue_says_the_side_and_strength_the_radius():
    shown = coc_overlay(GRAY, RADII, full_radius_px=20)[0, :, 0]
    red, green, blue = shown
    assert (red > torch.maximum(green, blue))[:4].all()
    assert (green > torch.maximum(red, blue))[4:6].all()
    assert (blue > torch.maximum(red, green))[6:].all()
    colourful = shown.amax(dim=0) - shown.amin(dim=0)
    assert (colourful[6:].diff() > 0).all() and (colourful[1:4].diff() < 0).all()
    assert colourful[0] == colourful[1]  # not beyond the strongest


def test_strength_looks_the_same_at_every_size():
    small = coc_overlay(torch.full((1, 3, 50, 100), 0.5), torch.full((1, 1, 50, 100), 1.5))
    large = coc_overlay(torch.full((1, 3, 100, 200), 0.5), torch.full((1, 1, 100, 200), 3.0))
    assert torch.allclose(small[..., 0, 0], large[..., 0, 0])


def test_the_picture_stays_readable():
    """A step of luma is still a step of at least a third of its height under any paint."""
    photo = torch.zeros(1, 3, 2, 9)
    photo[:, :, 1] = 1
    luma = torch.tensor([0.2126, 0.7152, 0.0722])
    shown = torch.einsum("c,bchw->bhw", luma, coc_overlay(photo, RADII.expand(1, 1, 2, 9)))
    assert (shown[:, 1] - shown[:, 0] >= 0.35 - 1e-6).all()


def test_one_photo_with_many_settings_and_other_kinds_of_photo():
    defocus = torch.randn(3, 1, 4, 6) * 5
    photo = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    shown = coc_overlay(photo, defocus)
    assert shown.shape == (3, 3, 4, 6) and shown.dtype == torch.float32
    assert shown.min() >= 0 and shown.max() <= 1
    for i in range(3):
        assert torch.equal(shown[i : i + 1], coc_overlay(photo, defocus[i : i + 1]))


@pytest.mark.parametrize(
    ("defocus", "full", "sentence"),
    [
        (torch.zeros(1, 1, 9), None, "wanted \\(B, 1, H, W\\)"),
        (torch.zeros(1, 1, 2, 9), None, "9 x 2 pixels .* photograph 9 x 1"),
        (torch.zeros(3, 1, 1, 9), None, "3 maps of defocus for 2 photographs"),
        (torch.full((1, 1, 1, 9), float("nan")), None, "NaN pixels"),
        (torch.zeros(1, 1, 1, 9), 0, "full_radius_px is 0"),
        (torch.zeros(1, 1, 1, 9), float("nan"), "full_radius_px is nan"),
    ],
)
def test_mistakes(defocus: torch.Tensor, full: float | None, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        coc_overlay(GRAY.expand(2, 3, 1, 9), defocus, full)

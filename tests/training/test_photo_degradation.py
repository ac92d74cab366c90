"""Photographs made worse: each change by itself, how often it happens, and from what."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_synthesis.procedural import ProceduralScenes
from training import photo_degradation
from training.photo_degradation import degraded
from training.samples import seeded_generator


@pytest.fixture(scope="module")
def photo() -> Tensor:
    return ProceduralScenes(3, 48)[0]["image"]


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes one change in every picture and leaves out the others, by narrowing their ranges."""

    def narrow(change: str, **ranges: Any) -> None:
        settings: dict[str, Any] = {
            **{"CLEAN_SHARE": 0.0, "CHANGED_SHARE": 1.0, "JPEG_SHARE": float(change == "jpeg")},
            **{"LARGEST_NOISE": 0.0, "LARGEST_SHOT_NOISE": 1e-9},
            **{"GAUSSIAN_DEVIATIONS_PX": (1e-3, 1e-3), "DISC_RADII_PX": (0.0, 0.0)},
            **{"CONTRASTS": (1.0, 1.0), "GAINS": (1.0, 1.0)},
            **ranges,
        }
        for name, value in settings.items():
            monkeypatch.setattr(photo_degradation, name, value)

    return narrow


def many(picture: Tensor, count: int) -> Tensor:
    return torch.stack([degraded(picture, seeded_generator(0, number)) for number in range(count)])


def test_the_state_of_the_generator_decides(photo: Tensor) -> None:
    global_state = torch.get_rng_state()
    first, again = many(photo, 12), many(photo, 12)
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), global_state)
    assert len({one.numpy().tobytes() for one in first}) > 9
    assert first.shape == (12, *photo.shape) and first.dtype == torch.float32
    assert first.min() >= 0 and first.max() <= 1


def test_a_tenth_is_left_as_it_is() -> None:
    """And 0.1 % of the others have none of the changes."""
    small = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    clean = sum(torch.equal(one, small) for one in many(small, 600))
    assert 32 <= clean <= 90  # four deviations


def test_nothing_is_left_when_nothing_is_changed(photo: Tensor, only: Any) -> None:
    only("nothing")
    assert torch.allclose(many(photo, 4), photo.expand(4, -1, -1, -1), atol=2e-4)


def test_blur_spreads_a_point_as_widely_as_its_kernel(only: Any) -> None:
    point = torch.zeros(3, 21, 21)
    point[:, 10, 10] = 1
    offsets = torch.arange(21) - 10.0
    # Variance along one axis: that of a Gaussian, and a quarter of the squared radius of a disc.
    only("blur", GAUSSIAN_DEVIATIONS_PX=(1.5, 1.5), DISC_RADII_PX=(2.0, 2.0))
    spreads = set()
    for blurred in many(point, 8)[:, 0]:
        assert float(blurred.sum()) == pytest.approx(1, abs=2e-3)
        assert torch.allclose(blurred, blurred.T, atol=2e-4)
        assert torch.allclose(blurred, blurred.flip(0), atol=2e-4)
        spreads.add(round(float((blurred.sum(0) * offsets**2).sum()), 1))
    assert len(spreads) == 2
    assert min(spreads) == pytest.approx(1, abs=0.15)  # the disc
    assert max(spreads) == pytest.approx(2.25, abs=0.15)


def test_blur_keeps_a_flat_picture_and_its_borders(only: Any) -> None:
    only("blur", GAUSSIAN_DEVIATIONS_PX=(1.5, 1.5), DISC_RADII_PX=(2.0, 2.0))
    flat = torch.full((3, 12, 9), 0.4)
    assert torch.allclose(many(flat, 6), flat.expand(6, -1, -1, -1), atol=1e-4)


def test_contrast_and_brightness_are_those_of_the_equations(photo: Tensor, only: Any) -> None:
    only("contrast", CONTRASTS=(0.8, 0.8))
    expected = photo.mean() + 0.8 * (photo - photo.mean())
    assert torch.allclose(many(photo, 1)[0], expected, atol=2e-4)
    only("brightness", GAINS=(0.95, 0.95))
    assert torch.allclose(many(photo, 1)[0], 0.95 * photo, atol=2e-4)


def test_noise_has_the_variance_that_it_says(only: Any) -> None:
    """Shot noise s x, from s = 0 to its largest: half of that on average; sigma^2 / 3 else."""
    gray = torch.full((3, 32, 32), 0.5)
    only("noise", LARGEST_NOISE=0.03)
    found = (many(gray, 80) - 0.5).square().mean()
    assert float(found) == pytest.approx(0.03**2 / 3, rel=0.2)
    for value in (0.2, 0.6):
        only("noise", LARGEST_SHOT_NOISE=0.005)
        noisy = many(torch.full_like(gray, value), 80)
        assert float(noisy.mean()) == pytest.approx(value, abs=1e-3)
        assert float((noisy - value).square().mean()) == pytest.approx(0.0025 * value, rel=0.2)


def test_jpeg_leaves_what_a_file_of_that_quality_holds(photo: Tensor, only: Any) -> None:
    errors = []
    for quality in (70, 95):
        only("jpeg", JPEG_QUALITIES=(quality, quality))
        stored = many(photo, 1)[0]
        steps = (stored * 255).numpy()
        assert np.abs(steps - steps.round()).max() < 1e-3
        errors.append(float((stored - photo).square().mean()))
    assert errors[0] > 1.5 * errors[1] > 0


def test_every_change_happens_as_often_as_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by what each does alone: contrast and gain of a flat picture would not show."""
    small = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.6 + 0.2
    monkeypatch.setattr(photo_degradation, "CLEAN_SHARE", 0.0)
    off = {
        "GAUSSIAN_DEVIATIONS_PX": (1e-3, 1e-3), "DISC_RADII_PX": (0.0, 0.0),
        "CONTRASTS": (1.0, 1.0), "GAINS": (1.0, 1.0), "LARGEST_NOISE": 0.0,
        "LARGEST_SHOT_NOISE": 1e-9, "JPEG_SHARE": 0.0,
    }  # fmt: skip
    standard = {name: getattr(photo_degradation, name) for name in off}
    kinds = {
        **{("DISC_RADII_PX", "GAUSSIAN_DEVIATIONS_PX"): 0.8, ("CONTRASTS",): 0.8, ("GAINS",): 0.8},
        **{("LARGEST_NOISE", "LARGEST_SHOT_NOISE"): 0.8, ("JPEG_SHARE",): 0.3},
    }
    for names, share in kinds.items():
        for name in off:
            monkeypatch.setattr(
                photo_degradation, name, standard[name] if name in names else off[name]
            )
        count = sum(float((one - small).abs().max()) > 5e-4 for one in many(small, 200))
        deviation = math.sqrt(200 * share * (1 - share))
        assert abs(count - 200 * share) < 4 * deviation, names


def test_shapes_that_are_no_picture_are_refused() -> None:
    generator = torch.Generator()
    for shape in ((1, 3, 16, 16), (1, 16, 16), (3, 7, 16)):
        with pytest.raises(ValueError, match="wanted \\(3, H, W\\), at least 8 pixels"):
            degraded(torch.zeros(shape), generator)


def test_noise_is_a_factor() -> None:
    """Of what one state of the generator draws: noise alone differs, and grows with the factor."""
    picture = torch.rand(3, 32, 32, generator=seeded_generator(9)) * 0.5 + 0.25
    grew = 0
    for number in range(12):
        none, half, full = (
            degraded(picture, seeded_generator(7, number), noise) for noise in (0.0, 0.5, 1.0)
        )
        smaller, larger = float((half - none).std()), float((full - none).std())
        if larger > 0.005:  # without JPEG, which answers as it likes, it is twice as much
            assert smaller < larger
            grew += 1
    assert grew >= 4

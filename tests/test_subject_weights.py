"""Weights of the subject: beside the equations in loops, known subjects, unknown disparity."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bokehdiff.subject_weights import subject_share, subject_weights

HEIGHT, WIDTH = 30, 37


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=dtype)


def pair(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two photos, blurred more and more to the right, and any disparity; float64."""
    image = noise(seed, 2, 3, HEIGHT, WIDTH, dtype=torch.float64)
    change = torch.linspace(0, 0.1, WIDTH, dtype=torch.float64)
    bokeh = image + change * (noise(seed + 1, *image.shape, dtype=torch.float64) - 0.5)
    return image, bokeh, noise(seed + 2, 2, 1, HEIGHT, WIDTH, dtype=torch.float64)


def share_in_loops(image: np.ndarray, bokeh: np.ndarray, disparity: np.ndarray) -> np.ndarray:
    """(H, W) of one photo (3, H, W), pixel by pixel; NaN is unknown."""
    known = ~np.isnan(disparity)
    details = []
    for photo in (image, bokeh):
        detail = np.zeros((HEIGHT, WIDTH))
        for y in range(HEIGHT):
            for x in range(WIDTH):
                left = np.abs(photo[:, y, x] - photo[:, y, x - 1]).mean() if x else 0
                above = np.abs(photo[:, y, x] - photo[:, y - 1, x]).mean() if y else 0
                detail[y, x] = left + above
        details.append(detail[known])
    # To the hundredths of the planes, as disparity is counted.
    at = np.round(disparity[known] * 100) / 100
    kept = []
    for plane in range(101):
        near = np.exp(-(((at - plane / 100) / 0.03) ** 2))
        left = (near * details[1]).sum()
        kept.append(left / ((near * details[0]).sum() + 0.002 * details[0].sum()))
    focus = int(np.argmax(kept)) / 100
    return np.where(known, np.exp(-(((np.nan_to_num(disparity) - focus) / 0.1) ** 2)), 0)


def test_the_share_is_that_of_the_equations() -> None:
    image, bokeh, disparity = pair(0)
    disparity[1, :, 5:12, 8:] = math.nan
    share = subject_share(image, bokeh, disparity)
    assert share.shape == (2, 1, HEIGHT, WIDTH)
    for number in range(2):
        expected = share_in_loops(
            image[number].numpy(), bokeh[number].numpy(), disparity[number, 0].numpy()
        )
        assert np.abs(share[number, 0].numpy() - expected).max() < 1e-12
    single = subject_share(image.float(), bokeh.float(), disparity.float())
    assert single.dtype == torch.float32 and (single - share).abs().max() < 1e-5


def test_the_weights_are_those_of_the_equations() -> None:
    share = noise(3, 2, 1, HEIGHT, WIDTH)
    weight = subject_weights(share)
    assert torch.allclose(weight.mean((1, 2, 3)), torch.ones(2), atol=1e-6)
    # The subject weighs up to three times what has nothing of it.
    odds = weight / weight.amin((1, 2, 3), keepdim=True)
    expected = (1 + 2 * share) / (1 + 2 * share.amin((1, 2, 3), keepdim=True))
    assert torch.allclose(odds, expected, rtol=1e-5)


def test_a_flat_disparity_weighs_everything_alike() -> None:
    image, bokeh, disparity = (one.float() for one in pair(6))
    flat = torch.full_like(disparity, 0.37)
    share = subject_share(image, bokeh, flat)
    assert (share - 1).abs().max() < 1e-6
    assert (subject_weights(share) - 1).abs().max() < 1e-6


def test_without_disparity_there_is_no_subject() -> None:
    image, bokeh, disparity = (one.float() for one in pair(9))
    disparity[0] = math.nan
    share = subject_share(image, bokeh, disparity)
    assert (share[0] == 0).all() and (share[1] > 0.5).any()
    assert (subject_weights(share)[0] == 1).all()
    # One photo knows nothing of the others in its batch.
    alone = subject_share(image[1:], bokeh[1:], disparity[1:])
    assert torch.allclose(share[1:], alone)


@pytest.mark.parametrize(("depth", "elsewhere"), [(0.8, 0.1), (0.2, 0.9)])
def test_what_the_lens_left_sharp_has_the_weight(depth: float, elsewhere: float) -> None:
    """A square in focus, in front of what is blurred or behind it; its disparity varies a bit."""
    image = noise(12, 1, 3, 96, 96)
    inside = torch.zeros(1, 1, 96, 96, dtype=torch.bool)
    inside[..., 20:76, 24:80] = True
    bokeh = torch.where(inside, image, torch.full_like(image, 0.5))
    disparity = torch.where(inside, depth, elsewhere) + 0.02 * (noise(13, 1, 1, 96, 96) - 0.5)
    weight = subject_weights(subject_share(image, bokeh, disparity))
    assert weight[inside].min() > 2.5 * weight[~inside].max()


@pytest.mark.parametrize("depth", [0.8, 0.3])
def test_what_has_no_texture_is_not_taken_for_the_subject(depth: float) -> None:
    """Most of the photo is a wall without texture, which looks the same in both."""
    image = torch.full((1, 3, 96, 96), 0.5)
    inside, blurred = (torch.zeros(1, 1, 96, 96, dtype=torch.bool) for _ in range(2))
    inside[..., 40:60, 30:60] = True
    blurred[..., 5:25, 10:70] = True
    image = torch.where(inside | blurred, noise(16, 1, 3, 96, 96), image)
    bokeh = torch.where(blurred, 0.5, image)
    disparity = torch.where(inside, depth, 0.05).expand(1, 1, 96, 96)
    weight = subject_weights(subject_share(image, bokeh, disparity))
    assert weight[inside].min() > 2.5 * weight[~inside].max()


def test_pictures_of_any_size_have_weights_and_huge_changes_no_nan() -> None:
    image = torch.zeros(1, 3, 4, 5)
    share = subject_share(image, image + 1, noise(14, 1, 1, 4, 5))
    assert share.isfinite().all()
    worse = subject_share(image, image + 100, noise(14, 1, 1, 4, 5))
    assert subject_weights(worse).isfinite().all()


def test_what_is_no_pair_is_refused() -> None:
    image, bokeh, disparity = pair(15)
    with pytest.raises(ValueError, match="wanted \\(B, 3, H, W\\) both"):
        subject_share(image, bokeh[..., 1:], disparity)
    with pytest.raises(ValueError, match="disparity is of shape .* the size of the photos"):
        subject_share(image, bokeh, disparity[..., 1:])
    with pytest.raises(ValueError, match="disparity is from .* to 7"):
        disparity[0, 0, 0, 0] = 7
        subject_share(image, bokeh, disparity)
    with pytest.raises(ValueError, match="subject is of shape \\(30, 37\\)"):
        subject_weights(disparity[0, 0])

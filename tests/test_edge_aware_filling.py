"""A measured map made whole from its reliable places."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bokehdiff.edge_aware_filling as filling
from bokehdiff.edge_aware_filling import fill_unreliable


def exact(values: torch.Tensor, reliability: torch.Tensor, image: torch.Tensor) -> np.ndarray:
    """The minimum by dense linear algebra in float64, from the equation of the module alone."""
    height, width = values.shape[-2:]
    colours = image[0].numpy().astype(np.float64).reshape(3, -1)
    count = height * width
    matrix, right = np.zeros((count, count)), np.zeros(count)
    known = reliability[0, 0].numpy().astype(np.float64).ravel()
    weight = np.minimum(known / np.maximum(1 - known, 1e-6), filling.LARGEST_WEIGHT)
    matrix[range(count), range(count)] = weight
    right = weight * np.nan_to_num(values[0, 0].numpy().astype(np.float64).ravel())
    for pixel in range(count):
        for other in (pixel + 1, pixel + width):
            if other >= count or other == pixel + 1 and other % width == 0:
                continue
            squares = ((colours[:, pixel] - colours[:, other]) ** 2).sum()
            conductance = max(
                np.exp(-squares / (2 * filling.COLOUR_DEVIATION**2)), filling.SMALLEST_CONDUCTANCE
            )
            matrix[[pixel, other], [pixel, other]] += conductance
            matrix[[pixel, other], [other, pixel]] -= conductance
    return np.linalg.solve(matrix, right).reshape(height, width)


def test_is_the_minimum():
    generator = torch.Generator().manual_seed(0)
    image = (0.5 + 0.05 * torch.randn(1, 3, 13, 18, generator=generator)).clamp(0, 1)
    values = torch.rand(1, 1, 13, 18, generator=generator)
    reliability = torch.rand(1, 1, 13, 18, generator=generator)
    reliability[..., 3:9, 4:12] = 0
    filled = fill_unreliable(values, reliability, image)
    # Conjugate gradients end at a residual of 1e-6 of the data, in the norm of the matrix.
    np.testing.assert_allclose(filled[0, 0].numpy(), exact(values, reliability, image), atol=1e-4)


def test_reliable_pixels_stay():
    values = torch.rand(1, 1, 20, 30)
    filled = fill_unreliable(values, torch.ones_like(values), torch.zeros(1, 3, 20, 30))
    # Four neighbours of conductance 1, which differ by at most 1, against a weight of 100.
    assert (filled - values).abs().max() < 4 / 100


def test_holes_are_filled_over_surfaces_and_up_to_edges():
    """Two surfaces of different colour and disparity, of which only a strip far from their edge is
    known: each hole takes the value of its own surface."""
    height, width = 96, 128
    image = torch.full((1, 3, height, width), 0.2)
    image[..., 50:] = 0.6
    truth = torch.where(torch.arange(width) < 50, 0.3, 2.0).expand(1, 1, height, width)
    reliability = torch.zeros(1, 1, height, width)
    reliability[..., :8] = reliability[..., -8:] = 0.9
    values = torch.where(reliability > 0, truth, torch.nan)
    filled = fill_unreliable(values, reliability, image)
    # Through the edge leaks SMALLEST_CONDUCTANCE, over 70 pixels of 1: 0.7 % of the step of 1.7.
    torch.testing.assert_close(filled, truth, atol=0.02, rtol=0)


def test_a_plane_goes_on_through_a_hole():
    truth = torch.linspace(0.5, 1.5, 80).expand(1, 1, 60, 80)
    reliability = torch.full((1, 1, 60, 80), 0.95)
    reliability[..., 20:45, 25:55] = 0
    values = torch.where(reliability > 0, truth, 77.0)
    filled = fill_unreliable(values, reliability, torch.full((1, 3, 60, 80), 0.5))
    torch.testing.assert_close(filled, truth.contiguous(), atol=0.02, rtol=0)


def test_in_a_batch_each_has_its_own():
    values, reliability = torch.rand(2, 1, 17, 23), torch.rand(2, 1, 17, 23)
    image = torch.rand(2, 3, 17, 23)
    both = fill_unreliable(values, reliability, image)
    for number in range(2):
        part = slice(number, number + 1)
        alone = fill_unreliable(values[part], reliability[part], image[part])
        assert torch.equal(alone, both[part])


def test_no_value_leaves_the_range():
    generator = torch.Generator().manual_seed(3)
    values = torch.rand(1, 1, 33, 65, generator=generator) + 1
    reliability = (torch.rand(1, 1, 33, 65, generator=generator) > 0.9).float()
    filled = fill_unreliable(values, reliability, torch.rand(1, 3, 33, 65, generator=generator))
    known = values[reliability > 0]
    assert known.min() <= filled.min() and filled.max() <= known.max()


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (9, 1)])
def test_small_pictures(size):
    values = torch.full((1, 1, *size), 2.0)
    reliability = torch.zeros(1, 1, *size)
    reliability[..., 0, 0] = 0.5
    filled = fill_unreliable(values, reliability, torch.rand(1, 3, *size))
    torch.testing.assert_close(filled, values)


def test_mistakes():
    image = torch.zeros(1, 3, 4, 5)
    with pytest.raises(ValueError, match=r"wanted \(1, 1, 4, 5\)"):
        fill_unreliable(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 5), image)
    with pytest.raises(ValueError, match="no reliable pixel"):
        fill_unreliable(torch.ones(1, 1, 4, 5), torch.zeros(1, 1, 4, 5), image)

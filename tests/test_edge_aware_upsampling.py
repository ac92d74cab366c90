"""Coarse disparity at the size of its photograph: exact where it must be, better than bilinear."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from bokehdiff import edge_aware_upsampling
from bokehdiff.edge_aware_upsampling import upsample_to_photo
from bokehdiff.rendering import render_bokeh


def bilinear(disparity: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    return F.interpolate(disparity, image.shape[-2:], mode="bilinear", align_corners=False)


def as_a_network_sees_it(disparity: torch.Tensor, factor: int) -> torch.Tensor:
    """Shrunk, and blurred by a Gaussian of one cell."""
    taps = torch.exp(-torch.arange(-4.0, 5).square() / 2)
    taps /= taps.sum()
    cells = F.pad(F.avg_pool2d(disparity, factor), (4, 4, 4, 4), mode="replicate")
    return F.conv2d(F.conv2d(cells, taps[None, None, None]), taps[None, None, :, None])


def disc(size: int = 192) -> tuple[torch.Tensor, torch.Tensor]:
    """A photograph of a speckled orange disc before a blue slope, and its disparity."""
    rng = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(float(size)), torch.arange(float(size)), indexing="ij")
    inside = (x - 0.55 * size).square() + (y - 0.45 * size).square() < (0.28 * size) ** 2
    disparity = torch.where(inside, 0.8, 0.1 + 0.2 * y / size)[None, None]
    colours = torch.tensor([[0.8, 0.5, 0.2], [0.2, 0.3, 0.6]])
    image = torch.where(inside, colours[0, :, None, None], colours[1, :, None, None])[None]
    return image + 0.1 * (torch.rand(image.shape, generator=rng) - 0.5), disparity


def beside_edges(disparity: torch.Tensor, reach: int) -> torch.Tensor:
    span = F.max_pool2d(disparity, 3, 1, 1) + F.max_pool2d(-disparity, 3, 1, 1)
    return F.max_pool2d((span > 0.05).float(), 2 * reach + 1, 1, reach) > 0


@pytest.mark.parametrize("factor", [4, 8])
def test_edges_lie_on_the_edges_of_the_photograph(factor):
    """Where colours part the surfaces, hardly any pixel is on neither of them."""
    image, disparity = disc()
    coarse = as_a_network_sees_it(disparity, factor)
    edge = beside_edges(disparity, factor)
    ours = (upsample_to_photo(coarse, image) - disparity).abs()[edge]
    plain = (bilinear(coarse, image) - disparity).abs()[edge]
    assert ours.mean() < 0.35 * plain.mean()
    assert (plain > 0.1).float().mean() > 0.4
    assert (ours > 0.1).float().mean() < 0.1


def test_without_colours_an_edge_is_a_jump_all_the_same():
    _, disparity = disc()
    gray = torch.full((1, 3, 192, 192), 0.5)
    result = upsample_to_photo(as_a_network_sees_it(disparity, 4), gray)
    between = (result > 0.4) & (result < 0.7)
    assert between.float().mean() < 0.005
    assert (result - disparity).abs().mean() < 0.02


def test_a_smooth_map_is_interpolated_bilinearly():
    slope = torch.linspace(0, 1, 60)[None, None, None].expand(1, 1, 40, 60)
    image = torch.rand(1, 3, 123, 187, generator=torch.Generator().manual_seed(0))
    assert torch.equal(upsample_to_photo(slope, image), bilinear(slope, image))


def test_a_constant_stays_and_no_value_is_new():
    image = torch.rand(1, 3, 50, 70, generator=torch.Generator().manual_seed(0))
    constant = torch.full((1, 1, 12, 15), 0.3)
    torch.testing.assert_close(
        upsample_to_photo(constant, image), torch.full((1, 1, 50, 70), 0.3), rtol=1e-6, atol=0
    )
    coarse = torch.rand(1, 1, 12, 15, generator=torch.Generator().manual_seed(1))
    result = upsample_to_photo(coarse, image)
    assert coarse.min() - 1e-6 <= result.min() and result.max() <= coarse.max() + 1e-6


def test_the_unit_of_the_map_changes_nothing():
    image, disparity = disc()
    coarse = as_a_network_sees_it(disparity, 4)
    torch.testing.assert_close(
        upsample_to_photo(40 * coarse, image), 40 * upsample_to_photo(coarse, image)
    )


def test_the_equation_of_one_pixel():
    """Nine cells vote on a pixel, by hand in float64."""
    coarse = torch.tensor([[0.9, 0.9, 0.1], [0.9, 0.9, 0.1], [0.8, 0.1, 0.1]])[None, None]
    image = torch.rand(1, 3, 15, 15, generator=torch.Generator().manual_seed(0))
    result = upsample_to_photo(coarse, image)
    # Step 1 changes no cell: all of them are the nearest or the farthest already, but for 0.8.
    cells = coarse[0, 0].double().numpy().copy()
    cells[2, 0] = 0.9
    colours = F.avg_pool2d(image, 5)[0].double().numpy()
    pixel = image[0, :, 8, 9].double().numpy()
    row, column = (8 + 0.5) / 5 - 0.5, (9 + 0.5) / 5 - 0.5
    weights, sums = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}
    for there in range(3):
        for across in range(3):
            distance = (there - row) ** 2 + (across - column) ** 2
            contrast = float(((colours[:, there, across] - pixel) ** 2).sum())
            weight = math.exp(-distance / (2 * 0.8**2) - contrast / (2 * 0.1**2))
            side = bool(cells[there, across] > 0.5)
            weights[side] += weight
            sums[side] += weight * cells[there, across]
    side = weights[True] > weights[False]
    np.testing.assert_allclose(result[0, 0, 8, 9], sums[side] / weights[side], rtol=1e-5)


def test_bands_of_rows_change_nothing(monkeypatch):
    image, disparity = disc()
    coarse = as_a_network_sees_it(disparity, 4)
    whole = upsample_to_photo(coarse, image)
    monkeypatch.setattr(edge_aware_upsampling, "PIXELS_AT_ONCE", 700)
    assert torch.equal(upsample_to_photo(coarse, image), whole)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (7, 5), (13, 300), (100, 90)])
def test_any_size_larger_or_smaller_than_the_map(size):
    coarse = torch.rand(1, 1, 20, 28, generator=torch.Generator().manual_seed(0))
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
    result = upsample_to_photo(coarse, image)
    assert result.shape == (1, 1, *size)
    assert bool(torch.isfinite(result).all()) and 0 <= result.min() and result.max() <= 1


def test_a_ray_traced_scene_is_better_rendered_than_with_bilinear_edges(shared_root: Path):
    folder = shared_root / "bench" / "raytraced" / "data" / "s01"
    if not folder.is_dir():
        pytest.skip(f"no ray-traced scene at {folder}")
    photo = np.array(Image.open(folder / "aif.png").convert("RGB"), np.float32) / 255
    image = torch.from_numpy(photo).permute(2, 0, 1)[None]
    disparity = torch.from_numpy(np.load(folder / "disp.npz")["disp"])[None, None].float()
    disparity = (disparity - disparity.min()) / (disparity.max() - disparity.min())
    coarse = as_a_network_sees_it(disparity, 4)
    truth = render_bokeh(image, disparity, df=0.5, K=16.0)
    levels = []
    for upsample in (bilinear, upsample_to_photo):
        blurred = render_bokeh(image, upsample(coarse, image), df=0.5, K=16.0)
        levels.append(-10 * math.log10(float((blurred - truth).square().mean())))
    assert levels[1] > levels[0] + 2

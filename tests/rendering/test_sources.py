"""Sources of light: what a photograph shows, parted at its edges, and what it hides."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch

from bokehdiff.rendering.sources import (
    Sources,
    beside_jumps,
    slope_of,
    sources_of_picture,
    without_flying_pixels,
)

DOUBLE = {"dtype": torch.float64}
FRONT = torch.tensor([0.8, 0.3, 0.2], **DOUBLE)
BACK = torch.tensor([0.1, 0.4, 0.6], **DOUBLE)
NEAR, FAR = 4.0, -3.0


def pixel_places(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, y) of every pixel, (H, W) each."""
    y, x = torch.meshgrid(
        torch.arange(height, **DOUBLE), torch.arange(width, **DOUBLE), indexing="ij"
    )
    return x, y


def painted(share: torch.Tensor, front: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """(C, H, W) mixture of two colours by the share (H, W) of the first."""
    return share * front[:, None, None] + (1 - share) * back[:, None, None]


def beyond_visible(sources: Sources, pixels: int) -> Sources:
    """All but the first: silhouettes and what is hidden."""
    return Sources(*(part[pixels:] for part in sources))


def picked(sources: Sources, chosen: torch.Tensor) -> Sources:
    return Sources(*(part[chosen] for part in sources))


def seen_without_blur(sources: Sources, channels: int, height: int, width: int) -> torch.Tensor:
    """(C, H, W): at every pixel the nearest sources first, until it is full."""
    light = torch.zeros(channels, height * width, **DOUBLE)
    room = torch.ones(height * width, **DOUBLE)
    for index in sources.defocus.argsort(descending=True, stable=True).tolist():
        place = sources.place[index]
        taken = torch.minimum(sources.coverage[index], room[place])
        light[:, place] += taken * sources.light[index]
        room[place] -= taken
    assert room.abs().max() < 1e-12, "a pixel is not full"
    return light.view(channels, height, width)


class Edge(NamedTuple):
    """An anti-aliased edge of known share, with the hard disparity of pixel centres."""

    light: torch.Tensor
    defocus: torch.Tensor
    share: torch.Tensor
    sources: Sources


@pytest.fixture(params=[0.0, 0.15, -0.6], ids=["upright", "leaning", "slanted"])
def edge(request: pytest.FixtureRequest) -> Edge:
    x, y = pixel_places(20, 28)
    # 4 by 4 samples in each pixel.
    fine_x = x[..., None] + (torch.arange(16) % 4 - 1.5) / 4
    fine_y = y[..., None] + (torch.arange(16) // 4 - 1.5) / 4
    share = (fine_x < 13.3 + request.param * (fine_y - 10)).to(torch.float64).mean(-1)
    defocus = torch.where(share > 0.5, NEAR, FAR).to(torch.float64)
    light = painted(share, FRONT, BACK)
    return Edge(light, defocus, share, sources_of_picture(light, defocus))


def test_smooth_pictures_are_what_they_show() -> None:
    x, y = pixel_places(12, 15)
    light = torch.rand(3, 12, 15, generator=torch.Generator().manual_seed(0), **DOUBLE)
    defocus = -3 + 0.6 * x + 0.3 * y
    sources = sources_of_picture(light, defocus)
    assert torch.equal(sources.place, torch.arange(12 * 15))
    assert torch.equal(sources.light, light.flatten(1).T)
    assert torch.equal(sources.defocus, defocus.flatten())
    assert (sources.coverage == 1).all()
    torch.testing.assert_close(sources.slope, torch.tensor([0.6, 0.3], **DOUBLE).expand(180, 2))


def test_sources_add_up_to_the_picture(edge: Edge) -> None:
    """share * front + (1 - share) * back is what the photograph shows, at every pixel."""
    seen = seen_without_blur(edge.sources, *edge.light.shape)
    torch.testing.assert_close(seen, edge.light, atol=1e-9, rtol=0)


def test_sources_of_any_picture_add_up_to_it() -> None:
    generator = torch.Generator().manual_seed(1)
    light = torch.rand(3, 16, 18, generator=generator, **DOUBLE)
    x, y = pixel_places(16, 18)
    defocus = torch.where(torch.hypot(x - 8, y - 8) < 5, 5.0, -0.3 * y)
    seen = seen_without_blur(sources_of_picture(light, defocus), 3, 16, 18)
    # A colour would have to be negative for a few, and is cut off at 0.
    assert ((seen - light).abs() < 1e-9).double().mean() > 0.98


def test_no_defocus_has_no_edges() -> None:
    light = torch.rand(3, 9, 11, generator=torch.Generator().manual_seed(2), **DOUBLE)
    sources = sources_of_picture(light, torch.zeros(9, 11, **DOUBLE))
    assert len(sources.place) == 99
    assert torch.equal(seen_without_blur(sources, 3, 9, 11), light)


def test_mixtures_are_parted_into_the_colours_of_both_sides(edge: Edge) -> None:
    height, width = edge.share.shape
    visible = picked(edge.sources, torch.arange(height * width))
    on_front = (edge.defocus == NEAR).flatten()
    # The outline counts a little where colours decide: SMALL_CONTRAST is 0.4 % of this contrast.
    assert (visible.light[on_front] - FRONT).abs().max() < 0.004
    assert (visible.light[~on_front] - BACK).abs().max() < 0.004


def test_shares_of_mixtures_are_recovered(edge: Edge) -> None:
    height, width = edge.share.shape
    on_front = (edge.defocus == NEAR).flatten()
    coverage = edge.sources.coverage[: height * width]
    share = edge.share.flatten()
    assert ((share > 0.05) & (share < 0.95)).any(), "there are mixtures"
    assert (coverage[on_front] - share[on_front]).abs().max() < 0.004
    assert (coverage[~on_front] == 1).all()
    # On the farther side the nearer surface comes as sources of its own.
    others = beyond_visible(edge.sources, height * width)
    silhouette = picked(others, others.defocus == NEAR)
    of_front = torch.zeros(height * width, **DOUBLE)
    of_front = of_front.index_add(0, silhouette.place, silhouette.coverage)
    assert (of_front[~on_front] - share[~on_front]).abs().max() < 0.004
    assert (of_front[on_front] == 0).all()
    lit = silhouette.coverage > 0.05
    assert lit.any() or not ((share > 0.05) & ~on_front).any()
    assert ((silhouette.light[lit] - FRONT).abs() < 0.004).all()


def test_surfaces_of_one_colour_are_not_torn_apart() -> None:
    """Without contrast nothing is known of the share, and nothing depends on it."""
    x, _ = pixel_places(16, 16)
    defocus = torch.where(x < 8, NEAR, FAR).to(torch.float64)
    light = torch.full((3, 16, 16), 0.4, **DOUBLE)
    sources = sources_of_picture(light, defocus)
    torch.testing.assert_close(sources.light, torch.full_like(sources.light, 0.4))


def test_texture_is_not_taken_for_a_mixture() -> None:
    """A colour off the line between both surfaces stays as it is."""
    x, _ = pixel_places(16, 16)
    defocus = torch.where(x < 8, NEAR, FAR).to(torch.float64)
    share = (x < 8).to(torch.float64)
    light = painted(share, FRONT, BACK)
    light[:, 8, 7] = torch.tensor([0.0, 1.0, 0.0], **DOUBLE)
    sources = sources_of_picture(light, defocus)
    place = 8 * 16 + 7
    assert sources.coverage[place] == 1
    assert torch.equal(sources.light[place], light[:, 8, 7])


@pytest.mark.parametrize("slope", [(0.1, 0.0), (0.7, 0.0), (0.4, -0.5), (0.0, 0.75)])
def test_a_slanted_plane_has_no_jump(slope: tuple[float, float]) -> None:
    x, y = pixel_places(14, 16)
    defocus = -4 + slope[0] * x + slope[1] * y
    nearer, farther = beside_jumps(defocus)
    assert not nearer.any() and not farther.any()
    expected = torch.tensor(slope, **DOUBLE)[:, None, None].expand(2, 14, 16)
    torch.testing.assert_close(slope_of(defocus), expected)


@pytest.mark.parametrize("slope", [0.0, 0.5])
@pytest.mark.parametrize("across", [False, True])
def test_a_jump_is_found_on_both_sides(slope: float, across: bool) -> None:
    x, _ = pixel_places(16, 16)
    defocus = slope * (x - 8) + torch.where(x < 9, 6.0, 0.0)
    defocus = defocus.T if across else defocus
    nearer, farther = beside_jumps(defocus)
    expected_nearer, expected_farther = torch.zeros(2, 16, 16, dtype=torch.bool)
    expected_nearer[:, 8], expected_farther[:, 9] = True, True
    if across:
        expected_nearer, expected_farther = expected_nearer.T, expected_farther.T
    assert torch.equal(nearer, expected_nearer) and torch.equal(farther, expected_farther)
    # The jump is no slope, and never more than what a surface has.
    steepest = slope_of(defocus).abs().amax()
    assert steepest <= slope + 1e-9


def test_slopes_are_bounded_and_zero_at_ridges() -> None:
    x, _ = pixel_places(8, 16)
    assert slope_of(2.0 * x).abs().max() == pytest.approx(0.8)
    ridge = -0.5 * (x - 7).abs()
    assert slope_of(ridge)[0, 4, 7] == 0
    for shape in ((1, 1), (1, 6), (6, 1)):
        assert slope_of(torch.ones(shape, **DOUBLE)).shape == (2, *shape)


def occluded(background: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """light, defocus of a red square over a background with ramps of colour; and its mask."""
    height, width = background.shape
    x, y = pixel_places(height, width)
    light = torch.stack([0.2 + 0.01 * x, 0.2 + 0.01 * y, torch.full_like(x, 0.3)])
    square = (y >= 8) & (y < 30) & (x >= 10) & (x < 26)
    red = torch.tensor([0.9, 0.1, 0.1], **DOUBLE)[:, None]
    light[:, square] = red
    defocus = background.clone()
    defocus[square] = 5.0
    return light, defocus, square


@pytest.mark.parametrize("slope", [0.0, -0.1])
def test_what_is_hidden_lies_behind_and_continues_the_farther_side(slope: float) -> None:
    x, _ = pixel_places(40, 40)
    background = -4 + slope * x
    light, defocus, square = occluded(background)
    others = beyond_visible(sources_of_picture(light, defocus), 40 * 40)
    hidden = picked(others, others.defocus < 0)
    assert (hidden.coverage == 1).all()
    count = torch.bincount(hidden.place, minlength=40 * 40).view(40, 40)
    assert count.max() == 1, "one thing is hidden at a place"
    # As far as both radii reach, so everywhere behind this square.
    assert (count[square] == 1).all()
    if slope == 0:  # a slanted background has parts that are behind others of it
        grown = torch.nn.functional.max_pool2d(square[None].double(), 3, 1, 1)[0] > 0
        assert (count[~grown] == 0).all()
    row, column = hidden.place // 40, hidden.place % 40
    assert (hidden.defocus <= defocus.flatten()[hidden.place]).all()
    hidden, row, column = (
        picked(hidden, square[row, column]),
        row[square[row, column]],
        column[square[row, column]],
    )
    # It goes on from the nearer rim, half the square away at most.
    assert (hidden.defocus - background[row, column]).abs().max() <= 16 / 2 * abs(slope)
    truth = torch.stack(
        [0.2 + 0.01 * column, 0.2 + 0.01 * row, torch.full_like(row, 0.3, **DOUBLE)], 1
    )
    # Nothing of the red, and the ramps are off by no more than from the middle to the rim.
    assert (hidden.light - truth).abs().max() < 0.01 * 11
    beside = (row == 19) & ((column == 10) | (column == 25))
    assert (hidden.light - truth)[beside].abs().max() < 0.01 * 4


def test_of_two_backgrounds_each_goes_on_behind() -> None:
    """Behind the left half of a post is what is on its left."""
    x, _ = pixel_places(32, 48)
    defocus = torch.where(x < 24, -3.0, -6.0)
    light = torch.where(x < 24, 0.2, 0.8)[None].to(torch.float64)
    post = (x >= 18) & (x < 30)
    defocus[post], light[:, post] = 6.0, 0.5
    defocus = defocus.to(torch.float64)
    others = beyond_visible(sources_of_picture(light, defocus), 32 * 48)
    hidden = picked(others, others.defocus < 0)
    column = hidden.place % 48
    assert hidden.light[column <= 19, 0].mean().item() == pytest.approx(0.2, abs=0.05)
    assert hidden.light[column >= 28, 0].mean().item() == pytest.approx(0.8, abs=0.05)


def test_nothing_is_hidden_deep_inside_what_no_lens_looks_behind() -> None:
    """Beside a wall of 40 pixels with radii of 4 and 3, only 7 pixels and a cell count."""
    x, _ = pixel_places(12, 64)
    defocus = torch.where(x < 40, 4.0, -3.0)
    light = torch.where(x < 40, 0.9, 0.2)[None].to(torch.float64)
    others = beyond_visible(sources_of_picture(light, defocus.to(torch.float64)), 12 * 64)
    hidden = picked(others, others.defocus < 0)
    assert (hidden.place % 64).min() >= 40 - (4 + 3 + 3 * 2)
    # The last column would be seen by a hundredth of the lens.
    assert (hidden.place % 64).min() <= 40 - (4 + 3) + 1


def test_flying_pixels_are_given_to_a_surface() -> None:
    """A resampled map ramps along a slanted outline: hardly any of its ramp stays."""
    x, y = pixel_places(40, 40)
    fine = (x[..., None] + (torch.arange(4) - 1.5) / 4) < 25 - 0.27 * y[..., None]
    share = fine.to(torch.float64).mean(-1)
    defocus = -4 + 10 * share
    cleaned = without_flying_pixels(defocus)
    ramp = (share > 0) & (share < 1)
    assert ramp.sum() > 20
    still = (cleaned - -4).abs().minimum((cleaned - 6).abs()) > 0.5
    assert still.sum() <= ramp.sum() / 5
    assert torch.equal(cleaned[~ramp], defocus[~ramp])
    # To the closer one.
    snapped = ramp & ~still & (share != 0.5)
    assert torch.equal(cleaned[snapped] > 1, defocus[snapped] > 1)


@pytest.mark.parametrize("lean", [0.0, 0.3, 1.0, -0.7])
def test_thin_lines_of_true_depth_stay(lean: float) -> None:
    x, y = pixel_places(30, 60)
    line = (x - 28 - lean * y).round() == 0
    defocus = torch.where(line, 6.0, -4.0).to(torch.float64)
    assert torch.equal(without_flying_pixels(defocus), defocus)


def test_surfaces_keep_their_defocus() -> None:
    x, y = pixel_places(20, 24)
    for defocus in (0.7 * x - 0.6 * y, torch.where(x + 0.3 * y < 12, 5.0, -0.5 * y)):
        assert torch.equal(without_flying_pixels(defocus), defocus)


def test_gradients_reach_light_and_defocus(edge: Edge) -> None:
    light = edge.light.clone().requires_grad_()
    defocus = edge.defocus.clone().requires_grad_()
    sources = sources_of_picture(light, defocus)
    total = (sources.light * sources.coverage[:, None]).sum() + sources.defocus.square().sum()
    for gradient in torch.autograd.grad(total, (light, defocus)):
        assert torch.isfinite(gradient).all() and (gradient != 0).double().mean() > 0.9


def test_linear_in_light_between_decisions(edge: Edge) -> None:
    """Brighter light by any factor, brighter sources; shares and places stay."""
    twice = sources_of_picture(2 * edge.light, edge.defocus)
    assert torch.equal(twice.place, edge.sources.place)
    torch.testing.assert_close(twice.coverage, edge.sources.coverage, atol=4e-3, rtol=0)
    torch.testing.assert_close(twice.light, 2 * edge.sources.light, atol=0.01, rtol=0)


def test_lengths_of_all_parts_agree(edge: Edge) -> None:
    count = len(edge.sources.place)
    assert edge.sources.light.shape == (count, 3) and edge.sources.slope.shape == (count, 2)
    assert edge.sources.coverage.shape == edge.sources.defocus.shape == (count,)
    assert edge.sources.coverage.min() >= 0 and edge.sources.coverage.max() <= 1
    assert (edge.sources.light >= 0).all() and math.isfinite(edge.sources.light.sum().item())

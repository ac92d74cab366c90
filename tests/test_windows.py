"""Windows that cover a picture once, and functions of neighbourhoods computed in them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bokehdiff.grids import pooled
from bokehdiff.windows import Window, in_windows, put, windows_of


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 40), (64, 5)])
@pytest.mark.parametrize("side", [1, 8, 16, 100, None])
def test_windows_cover_each_pixel_once(size, side) -> None:
    count = torch.zeros(size)
    for window in windows_of(*size, side):
        part = window.crop(count)
        assert max(part.shape) <= (side or max(size))
        part.add_(1)
    assert (count == 1).all()


def test_a_crop_of_everything_is_the_tensor_itself() -> None:
    values = torch.rand(2, 3, 10, 7)
    (window,) = windows_of(10, 7)
    assert window.crop(values) is values
    assert window.grown(5).crop(values) is values
    assert window.crop(values[..., :3, :2], cell=4).shape[-2:] == (3, 2)


def test_margins_end_at_the_border_and_are_cut_off_again() -> None:
    values = torch.arange(100.0).view(1, 10, 10)
    window = windows_of(10, 10, 4)[1]
    outer = window.grown(3)
    assert outer == Window(0, 1, 7, 10, 10, 10)
    assert torch.equal(window.crop(outer.crop(values), origin=outer), values[..., :4, 4:8])
    assert outer.scaled(2).crop(F.interpolate(values[None], scale_factor=2)).shape[-2:] == (14, 18)


@pytest.mark.parametrize("side", [6, 12, None])
def test_a_convolution_in_windows_is_the_convolution(side) -> None:
    values = torch.rand(2, 3, 25, 31, generator=torch.Generator().manual_seed(0))
    kernel = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    whole = F.conv2d(values, kernel, padding=2)

    def convolved(outer: Window) -> torch.Tensor:
        return F.conv2d(outer.crop(values), kernel, padding=2)

    assert torch.allclose(in_windows(convolved, windows_of(25, 31, side), 2), whole, atol=1e-5)
    if side:
        too_little = in_windows(convolved, windows_of(25, 31, side), 1)
        assert (too_little - whole).abs().max() > 0.1


@pytest.mark.parametrize("side", [8, 16])
def test_cells_are_put_together_where_the_last_are_cut(side) -> None:
    values = torch.rand(1, 2, 22, 37)
    cells = None
    for window in windows_of(22, 37, side):
        cells = put(cells, window, pooled(window.crop(values), 4), 4)
    assert torch.allclose(cells, pooled(values, 4))


def test_gradients_pass_through_windows() -> None:
    values = torch.rand(1, 1, 9, 9, requires_grad=True)
    weight = torch.rand(1, 1, 9, 9)
    squares = in_windows(lambda window: window.crop(values).square(), windows_of(9, 9, 4))
    (squares * weight).sum().backward()
    assert torch.allclose(values.grad, 2 * weight * values)


def test_what_two_windows_share_and_what_holds_both() -> None:
    first, second = Window(0, 4, 8, 12, 20, 20), Window(6, 10, 14, 18, 20, 20)
    assert first.common(second) == Window(6, 10, 8, 12, 20, 20)
    assert first.around(second) == Window(0, 4, 14, 18, 20, 20)
    apart = first.common(Window(12, 0, 20, 3, 20, 20))
    assert apart.top >= apart.bottom or apart.left >= apart.right


def test_a_pooled_window_holds_every_cell_it_touches() -> None:
    assert Window(3, 8, 9, 16, 20, 18).pooled(4) == Window(0, 2, 3, 4, 5, 5)


def test_a_window_is_divided_from_its_own_corner() -> None:
    parts = Window(5, 7, 12, 10, 20, 20).divided(4)
    assert [(p.top, p.bottom, p.left, p.right) for p in parts] == [(5, 9, 7, 10), (9, 12, 7, 10)]

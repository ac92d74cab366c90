"""Parts of the lens: together they are the whole, and each knows where its light goes."""

from __future__ import annotations

import math

import pytest
import torch

from bokehdiff.rendering import Aperture
from bokehdiff.rendering.aperture import field_position
from bokehdiff.rendering.lens_parts import LensParts
from tests.apertures import SAME_EVERYWHERE as APERTURES

DOUBLE = {"dtype": torch.float64}
EVERY_APERTURE = pytest.mark.parametrize("aperture", APERTURES.values(), ids=APERTURES.keys())
EVERY_CUT = pytest.mark.parametrize("parts", [1, 2, 4])


def lens_of(aperture: Aperture, parts: int, margin: int = 0) -> LensParts:
    return LensParts(aperture, parts, (margin, 60, 80))


def offsets(kernels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, y) of the pixels of kernels (..., k, k), from their middle."""
    reach = kernels.shape[-1] // 2
    along = torch.arange(-reach, reach + 1, **DOUBLE)
    return along, along[:, None]


@EVERY_CUT
@pytest.mark.parametrize("signed", [0.4, 1.0, -3.3, 8.0, -17.5])
@EVERY_APERTURE
def test_every_part_has_a_light_of_one(aperture: Aperture, signed: float, parts: int) -> None:
    kernels = lens_of(aperture, parts).kernels(signed)
    reach = max(math.ceil(abs(signed) - 0.5), 1)
    assert kernels.shape == (parts, 3, 2 * reach + 1, 2 * reach + 1)
    assert kernels.dtype == torch.float64 and (kernels[:, 0] >= 0).all()
    torch.testing.assert_close(kernels[:, 0].sum((1, 2)), torch.ones(parts, **DOUBLE))


@EVERY_CUT
@pytest.mark.parametrize("signed", [1.0, -3.3, 8.0, -24.0])
@EVERY_APERTURE
def test_weighted_parts_add_up_to_the_whole(aperture: Aperture, signed: float, parts: int) -> None:
    lens = lens_of(aperture, parts)
    weights = lens.part_weights((60, 80))
    assert weights.shape == (parts, 1, 1, 1)
    assert weights.sum().item() == pytest.approx(1.0)
    whole = aperture.kernel(signed, **DOUBLE)
    together = (weights[:, 0] * lens.kernels(signed)[:, 0]).sum(0)
    # Weights are those of a radius of 24 px. Where a pixel is half a lens wide, a part of an uneven
    # opening has a little more or less.
    tolerance = 0.1 if abs(signed) < 2 else 0.02
    assert (together - whole).abs().sum() < (1e-9 if parts == 1 else tolerance)


@pytest.mark.parametrize("name", ["disc", "donut", "bubble"])
def test_round_openings_have_equal_parts(name: str) -> None:
    for parts in (2, 4):
        weights = lens_of(APERTURES[name], parts).part_weights((60, 80))
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / parts))


def test_parts_of_a_disc_are_where_they_should_be() -> None:
    """A quarter of a disc of radius r has its centroid 4 sqrt(2) r / (3 pi) from the middle."""
    radius = 20.0
    for signed in (radius, -radius):
        kernels = lens_of(Aperture(), 4).kernels(signed)[:, 0]
        x, y = offsets(kernels)
        centroids = torch.stack([(kernels * x).sum((1, 2)), (kernels * y).sum((1, 2))], 1)
        distance = centroids.norm(dim=1)
        expected = 4 * math.sqrt(2) * radius / (3 * math.pi)
        torch.testing.assert_close(
            distance, torch.full((4,), expected, **DOUBLE), rtol=2e-3, atol=0
        )
        torch.testing.assert_close(centroids.sum(0), torch.zeros(2, **DOUBLE), atol=1e-9, rtol=0)
        # They see through the same side of the lens in front of the focus and behind it.
        if signed > 0:
            in_front = centroids
    torch.testing.assert_close(in_front, -centroids, atol=1e-9, rtol=0)


@pytest.mark.parametrize("signed", [4.0, -11.3])
@EVERY_APERTURE
def test_second_and_third_kernels_weigh_by_the_lens_point(
    aperture: Aperture, signed: float
) -> None:
    kernels = lens_of(aperture, 4).kernels(signed)
    x, y = offsets(kernels)
    torch.testing.assert_close(kernels[:, 1], kernels[:, 0] * x / signed)
    torch.testing.assert_close(kernels[:, 2], kernels[:, 0] * y / signed)


def test_slopes_do_not_change_the_light_of_a_whole_symmetric_lens() -> None:
    for name in ("disc", "tall", "donut"):
        kernels = lens_of(APERTURES[name], 1).kernels(7.0)
        assert kernels[:, 1:].sum((2, 3)).abs().max() < 1e-9


@pytest.mark.parametrize("cell", [2, 4, 8])
@pytest.mark.parametrize("signed", [33.0, -40.0])
def test_kernels_of_cells_leave_room_for_pooling_and_enlarging(signed: float, cell: int) -> None:
    """Second moments per axis in pixels add up to r^2 / 4 (of a pixel's square: 1 / 12)."""
    kernel = lens_of(Aperture(), 1).kernels(signed, cell=cell)[0, 0]
    x, _ = offsets(kernel)
    spread = cell**2 * (kernel * x**2).sum().item()
    # Pooling spreads by (1 - 1/t^2) / 12 cells^2, enlarging by (1 - 1/t^2) / 4.
    grids = cell**2 * (1 - 1 / cell**2) / 3
    squares = cell**2 / 12
    assert spread + grids - squares == pytest.approx(signed**2 / 4, rel=5e-3)


def test_an_odd_opening_is_turned_in_front_of_the_focus() -> None:
    lens = lens_of(APERTURES["pentagon"], 4)
    in_front, behind = lens.kernels(6.0)[:, 0], lens.kernels(-6.0)[:, 0]
    torch.testing.assert_close(in_front.flip(-1, -2), behind, atol=1e-12, rtol=0)


def test_a_closed_part_is_dark_and_weighs_nothing() -> None:
    picture = torch.zeros(64, 64)
    picture[:, 52:] = 1.0  # only the right rim lets light pass
    lens = lens_of(Aperture(picture=picture), 2)
    weights = lens.part_weights((60, 80))[:, 0, 0, 0]
    kernels = lens.kernels(-12.0)
    assert sorted(weights.tolist()) == pytest.approx([0.0, 1.0])
    closed, opened = weights.argsort().tolist()
    assert (kernels[closed] == 0).all()
    torch.testing.assert_close(kernels[opened, 0], lens.aperture.kernel(-12.0, **DOUBLE))


def test_the_field_is_that_of_the_picture_without_its_margin() -> None:
    assert lens_of(Aperture(), 4).field(3, 5) == (0.0, 0.0)
    lens = lens_of(Aperture(cat_eye=0.5), 4, margin=10)
    assert lens.field(10 + 7, 10 + 31) == pytest.approx(field_position(31, 7, 60, 80))
    assert lens.field(10 + 29.5, 10 + 39.5) == pytest.approx((0, 0))


@EVERY_CUT
def test_cat_eye_weighs_its_parts_by_the_field(parts: int) -> None:
    aperture = Aperture(cat_eye=0.8)
    lens = LensParts(aperture, parts, (0, 33, 41))
    weights = lens.part_weights((33, 41))
    assert weights.shape == (parts, 1, 33, 41)
    torch.testing.assert_close(weights.sum(0), torch.ones(1, 33, 41, **DOUBLE))
    for row, column in ((0, 0), (16, 20), (32, 40), (8, 35)):
        field = field_position(column, row, 33, 41)
        whole = aperture.kernel(-24.0, field=field, **DOUBLE)
        kernels = lens.kernels(-24.0, field)[:, 0]
        together = (weights[:, 0, row, column, None, None] * kernels).sum(0)
        # Between the nine by nine places that were weighed, weights are interpolated.
        assert (together - whole).abs().sum() < 0.01


@pytest.mark.parametrize(("cat_eye", "defocus"), [(0.2, 8.0), (0.5, -20.0), (1.0, 40.0)])
def test_within_a_tile_the_second_rim_is_off_by_a_pixel_at_most(
    cat_eye: float, defocus: float
) -> None:
    height, width = 1200, 1600
    side = LensParts(Aperture(cat_eye=cat_eye), 4, (20, height, width)).tile_side(defocus)
    moved = cat_eye * abs(defocus) * (side / 2) / (math.hypot(height, width) / 2)
    assert moved <= 1.0 and side >= 32
    assert LensParts(Aperture(), 4, (20, height, width)).tile_side(defocus) >= 2 * abs(defocus)

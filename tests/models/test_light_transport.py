"""What carries the light of the embedded model, held against planes traced ray by ray."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bokehdiff.attention import PisaConfig, PisaContext
from bokehdiff.models.light_transport import (
    LightTransport,
    bands_of,
    bounding_window,
    cropped_with_zeros,
)
from bokehdiff.models.surfaces import parted_surfaces
from bokehdiff.rendering import render_layers
from bokehdiff.windows import Window, windows_of

SIDE = 64


def transport_of(lens_parts: int = 4) -> LightTransport:
    torch.manual_seed(0)
    transport = LightTransport(0.7, 2**0.5, 64.0, 5.6, lens_parts)
    processor = transport.attn.processor
    assert isinstance(processor.context, PisaContext)
    processor.context.config = PisaConfig(hardness=100, cutoff=1e-3)
    return transport


def carried(
    transport: LightTransport, light: torch.Tensor, disparity: torch.Tensor, df: float, K: float
) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return transport(light, torch.ones_like(disparity), disparity, K * (disparity - df))


def cards(
    seen: list[tuple[float, float, float]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Upright cards from the left border to a column, the nearest first, each (last column,
    disparity, light): layers for the ray tracer, and the photograph and disparity of them."""
    column = torch.arange(SIDE, dtype=torch.float64).expand(1, 1, SIDE, SIDE)
    colours, alphas, planes = [], [], []
    photo = disparity = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.float64)
    for last, depth, shade in reversed(seen):
        alpha = (column < last).double()
        photo, disparity = (
            torch.where(alpha > 0, value, values)
            for value, values in ((shade, photo), (depth, disparity))
        )
        colours.insert(0, torch.full((1, 1, 3, SIDE, SIDE), shade, dtype=torch.float64))
        alphas.insert(0, alpha[:, None])
        planes.insert(0, torch.tensor([[[0.0, 0.0, 1 / depth]]], dtype=torch.float64))
    layers = [torch.cat(values, 1) for values in (colours, alphas, planes)]
    return *layers, photo.float().repeat(1, 3, 1, 1), disparity.float()


def test_two_edges_of_one_side_hide_the_same_half_of_the_lens() -> None:
    """Behind the edge of a near card lies the edge of another: both stand before the same half of
    the lens, so the other half sees the bright ground. The whole lens at once would fill up."""
    *layers, photo, disparity = cards([(28, 0.9, 0.02), (36, 0.5, 0.1), (SIDE, 0.1, 1.0)])
    df, K = 0.1, 20.0
    truth = render_layers(*layers, df, K, samples_per_side=41).image()[..., 16:48, 16:48].float()
    errors = {}
    for parts in (1, 2, 4):
        sums = carried(transport_of(parts), photo, disparity, df, K)["composite"]
        picture = (sums[:, :3] / sums[:, 3:].clamp_min(1e-6))[..., 16:48, 16:48]
        errors[parts] = float((picture - truth).square().mean().sqrt())
    assert errors[2] < 0.6 * errors[1]
    assert errors[4] < 0.4 * errors[1]


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("axis", [-1, -2])
def test_light_of_a_slanted_surface_leans_towards_where_it_is_blurred_more(
    axis: int, sign: float
) -> None:
    """It arrives o pixels away in proportion to 1 + g . o / s, so its centre of gravity lies
    g <o^2> / s = g s / 4 away, for the mean square r^2 / 4 of a disc along each axis."""
    ramp = torch.linspace(8.2, 11.0, SIDE)  # within one slab, so that nothing lies behind anything
    defocus = sign * (ramp if axis == -1 else ramp[:, None]).expand(1, 1, SIDE, SIDE).contiguous()
    light = torch.zeros(1, 3, SIDE, SIDE)
    light[..., 32, 32] = 1.0
    sums = carried(transport_of(), light, defocus, 0.0, 1.0)
    arrived = sum(sums[name][0, 0] for name in ("nearer", "own", "farther"))
    assert isinstance(arrived, torch.Tensor)
    offset = torch.arange(SIDE) - 32.0
    along = (arrived * (offset if axis == -1 else offset[:, None])).sum() / arrived.sum()
    across = (arrived * (offset[:, None] if axis == -1 else offset)).sum() / arrived.sum()
    slope = sign * (11.0 - 8.2) / (SIDE - 1)
    assert along.item() == pytest.approx(slope * float(defocus[0, 0, 32, 32]) / 4, rel=0.1)
    assert across.item() == pytest.approx(0.0, abs=0.005)
    assert arrived.sum().item() == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_light_of_a_point_is_kept_on_both_sides_of_the_focus(sign: float) -> None:
    light = torch.zeros(1, 3, SIDE, SIDE)
    light[..., 32, 32] = 1.0
    disparity = torch.full((1, 1, SIDE, SIDE), 0.5)
    sums = carried(transport_of(), light, disparity, 0.5 - sign * 0.4, 20.0)
    # One defocus everywhere, so nothing is hidden and all of it arrives.
    assert sums["composite"][:, :3].sum().item() == pytest.approx(3.0, rel=0.01)
    spread = sums["composite"][0, 0]
    along = torch.arange(SIDE) - 32.0
    moment = (spread * (along**2 + along[:, None] ** 2)).sum() / spread.sum()
    # That of a disc of 8 pixels, r^2 / 2, whose tokens are known to a fraction.
    assert moment.item() == pytest.approx(32.0, rel=0.03)


def test_a_mixed_pixel_is_parted_into_both_surfaces() -> None:
    """A dark card before a bright ground, its edge a third of the way through a column."""
    light = torch.full((1, 3, 24, 24), 0.8)
    light[..., :10] = 0.1
    light[..., 10] = 0.1 * 0.3 + 0.8 * 0.7
    defocus = torch.full((1, 1, 24, 24), -6.0)
    defocus[..., :10] = 3.0
    (window,) = windows_of(24, 24)
    own, level, mixed = parted_surfaces(light, defocus, window)
    assert torch.equal(level, defocus)
    torch.testing.assert_close(own[..., 4:-4, 10], torch.full((1, 3, 16), 0.8), atol=0.05, rtol=0)
    there = mixed.those((mixed.column == 10) & (mixed.row >= 4) & (mixed.row < 20))
    assert len(there.row) == 16 and bool(there.in_front.all())
    assert (there.colour - 0.1).abs().max() < 0.05
    assert (there.share - 0.3).abs().max() < 0.05
    assert (there.defocus == 3.0).all()


def test_windows_part_the_same_pixels() -> None:
    generator = torch.Generator().manual_seed(4)
    steps = torch.randint(0, 4, (1, 1, 6, 6), generator=generator).float()
    steps = F.interpolate(steps, scale_factor=8)
    defocus = 5 * steps - 6
    # Each depth has its shade, and the pixels beside an edge are mixtures.
    light = F.avg_pool2d(F.pad(0.1 + 0.25 * steps, (1,) * 4, mode="replicate"), 3, 1)
    light = light.repeat(1, 3, 1, 1)
    (whole,) = windows_of(48, 48)
    colour, level, mixed = parted_surfaces(light, defocus, whole)
    assert len(mixed.row) > 50
    count = 0
    for window in windows_of(48, 48, 16):
        part, part_level, found = parted_surfaces(light, defocus, window)
        assert torch.equal(part, window.crop(colour))
        assert torch.equal(part_level, window.crop(level))
        count += len(found.row)
    assert count == len(mixed.row)


def test_bands_are_whole_rows_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = windows_of(100, 70, 16)
    monkeypatch.setattr("bokehdiff.models.light_transport.BAND_PIXELS", 40)
    bands = bands_of(windows)
    assert [(band.top, band.bottom) for band in bands] == [(0, 32), (32, 64), (64, 100)]
    assert all((band.left, band.right) == (0, 70) for band in bands)


def test_the_bounding_window_holds_all_that_is_chosen() -> None:
    window = Window(10, 20, 18, 30, 40, 40)
    mask = torch.zeros(2, 1, 8, 10, dtype=torch.bool)
    assert bounding_window(mask, window) is None
    mask[0, 0, 2, 3] = mask[1, 0, 5, 4] = True
    assert bounding_window(mask, window) == Window(12, 23, 16, 25, 40, 40)


def test_what_is_not_known_is_dark() -> None:
    values = torch.arange(1.0, 7.0).view(1, 2, 3)
    known, wanted = Window(4, 4, 6, 7, 20, 20), Window(3, 5, 6, 9, 20, 20)
    expected = torch.tensor([[[0.0, 0, 0, 0], [2, 3, 0, 0], [5, 6, 0, 0]]])
    assert torch.equal(cropped_with_zeros(values, known, wanted), expected)

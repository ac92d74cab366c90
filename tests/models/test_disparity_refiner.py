"""The refiner takes over values of the map, nothing else, and learns where the photograph's edges
are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from bokehdiff.models.disparity_refiner import (
    CANDIDATES,
    CAUTION,
    OWN_VALUE_BIAS,
    REACHES,
    DisparityRefiner,
    likeliest,
    nearby_extremes,
    tolerance_px,
    votes_of,
)
from bokehdiff.optics import signed_defocus
from data_synthesis.corruption import eroded


@pytest.fixture(autouse=True)
def every_test_on_one_thread(one_thread: None) -> None:
    """Sums in the same order."""


def small_refiner(seed: int = 0, widths: tuple[int, ...] = (8, 8)) -> DisparityRefiner:
    """A refiner whose choices are random, so that all candidates occur."""
    torch.manual_seed(seed)
    refiner = DisparityRefiner(widths)
    with torch.no_grad():
        refiner.network.conv_out.weight.normal_(std=1.0)
        refiner.network.conv_out.bias.normal_(std=1.0)
        refiner.verdict[2].weight.normal_(std=0.3)
    return refiner.eval()


def picture(height: int = 48, width: int = 64, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """A photo of noise, and smooth maps of two slanted surfaces with noise."""
    generator = torch.Generator().manual_seed(seed)
    photo = torch.rand((2, 3, height, width), generator=generator)
    disparity = 0.1 * torch.rand((2, 1, height, width), generator=generator)
    disparity[..., width // 3 :, :] += torch.linspace(0.3, 0.6, width)
    return photo, maps_of(disparity)


def maps_of(disparity: torch.Tensor, df: float = 0.3, K: float = 20.0) -> torch.Tensor:
    return torch.cat([disparity, signed_defocus(disparity, df, K)], 1)


# -- Candidates ----------------------------------------------------------------------------------


def test_candidates_are_the_extremes_of_the_squares_around_each_pixel() -> None:
    values = torch.rand((2, 20, 23), generator=torch.Generator().manual_seed(0))
    candidates = nearby_extremes(values)
    assert candidates.shape == (2, CANDIDATES, 20, 23)
    assert torch.equal(candidates[:, 0], values)
    for index, reach in enumerate(REACHES):
        size = (1, 2 * reach + 1, 2 * reach + 1)
        # "nearest" repeats pixels that are in the square anyway.
        largest = ndimage.maximum_filter(values.numpy(), size, mode="nearest")
        smallest = ndimage.minimum_filter(values.numpy(), size, mode="nearest")
        np.testing.assert_array_equal(candidates[:, 1 + 2 * index], largest)
        np.testing.assert_array_equal(candidates[:, 2 + 2 * index], smallest)


# -- The choice ----------------------------------------------------------------------------------


def test_untrained_it_changes_nothing() -> None:
    photo, maps = picture()
    assert torch.equal(DisparityRefiner()(photo, maps), maps)


def test_every_pixel_gets_a_candidate_and_defocus_goes_with_disparity() -> None:
    photo, maps = picture()
    refiner = small_refiner()
    refined = refiner(photo, maps)
    assert refined.shape == maps.shape and refined.dtype == maps.dtype
    chosen = likeliest(refiner.logits(photo, maps))
    assert len(chosen.unique()) > CANDIDATES / 2
    wanted = nearby_extremes(maps).gather(2, chosen[:, None, None].expand(-1, 2, -1, -1, -1))
    # Rounding decides where two candidates are equally likely.
    assert (refined == wanted[:, :, 0]).float().mean() > 0.99
    assert (nearby_extremes(maps) == refined[:, :, None]).any(2).all()
    assert torch.equal(refined, maps_of(refined[:, :1]))


@pytest.mark.parametrize("side", [4, 12, 16, 40])
def test_windows_change_nothing(side: int) -> None:
    photo, maps = picture()
    refiner = small_refiner()
    whole, parts = (refiner.run(photo, maps, lambda _, output: output, one) for one in (None, side))
    torch.testing.assert_close(parts, whole, atol=1e-3, rtol=1e-3)
    assert (refiner(photo, maps, side) == refiner(photo, maps)).float().mean() > 0.999


def test_the_unit_of_the_disparity_does_not_matter() -> None:
    photo, maps = picture()
    refiner = small_refiner()
    choice = refiner.logits(photo, maps)
    other_unit = torch.cat([0.25 * maps[:, :1] + 7, maps[:, 1:]], 1)
    # Seven has few digits left for the differences of a map: 2^-21 of a quarter's local range.
    torch.testing.assert_close(refiner.logits(photo, other_unit), choice, atol=1e-3, rtol=1e-3)


def test_a_network_in_half_precision_leaves_the_digits_of_the_maps() -> None:
    photo, maps = picture()
    refiner = small_refiner().to(torch.bfloat16)
    refined = refiner(photo, maps)
    assert refined.dtype == torch.float32
    assert (nearby_extremes(maps) == refined[:, :, None]).any(2).all()


@pytest.mark.parametrize(
    ("size", "side", "sentence"),
    [((46, 64), None, "multiples of 4, got 46 x 64"), ((48, 64), 6, "in windows of 6")],
)
def test_sizes_that_do_not_fit_are_refused(
    size: tuple[int, int], side: int | None, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        small_refiner()(*picture(*size), side)


def test_chances_of_a_kind_count_together_and_must_be_clear() -> None:
    """Five times as likely as the own value or not, in all and not one by one."""
    chances = torch.full((1, CANDIDATES, 1, 2), 0.01)
    chances[:, 0] = 0.1
    chances[:, 1::2] = 0.51 / len(REACHES)
    chances[:, 5] += 0.001
    chances[:, 1::2, :, 1] *= 0.9
    assert CAUTION == 5
    assert likeliest(chances.log()).flatten().tolist() == [5, 0]


def test_the_verdict_comes_from_all_pixels_where_something_is_at_stake() -> None:
    """Votes in float64 by hand; a verdict that wants the own value everywhere is heard."""
    photo, maps = (one[:1] for one in picture(16, 16))
    refiner = small_refiner()
    with torch.no_grad():
        refiner.verdict[2].weight.zero_()
    logits, candidates = refiner.logits(photo, maps).detach(), nearby_extremes(maps[:, 1])
    chances = torch.softmax(logits[0].double(), 0)
    at_stake = (candidates[0].amax(0) - candidates[0].amin(0)).clamp_max(4).double()
    votes = votes_of(logits, candidates)[0].double()
    torch.testing.assert_close(votes[:-1], (chances * at_stake).sum((1, 2)), rtol=1e-5, atol=1e-5)
    assert float(votes[-1]) == pytest.approx(float(at_stake.sum()), rel=1e-5)
    assert not torch.equal(refiner(photo, maps), maps)
    with torch.no_grad():
        refiner.verdict[2].bias[0] = 100
    assert torch.equal(refiner(photo, maps), maps)


# -- The loss ------------------------------------------------------------------------------------


def test_tolerance_is_half_a_pixel_or_a_hundredth_of_the_range() -> None:
    defocus = torch.zeros(2, 1, 4, 4)
    defocus[0, 0, 0, 0], defocus[1, 0, 0, 0] = -20, 80
    assert tolerance_px(defocus).flatten().tolist() == pytest.approx([0.5, 0.8])


def test_loss_is_the_equation() -> None:
    """Pixel by pixel in float64, from the logits."""
    photo, maps = (one[:1, :, :16, 20:36].contiguous() for one in picture())
    true_maps = maps_of(maps[:, :1].roll(3, -1))
    refiner = small_refiner()
    logits = refiner.logits(photo, maps)[0].double().detach().numpy()
    candidates = nearby_extremes(maps[0, 1]).double().numpy()
    truth = true_maps[0, 1].double().numpy()
    tolerance = max(0.5, 0.01 * np.ptp(truth))
    total = weights = 0.0
    for row in range(16):
        for column in range(16):
            errors = np.abs(candidates[:, row, column] - truth[row, column])
            good = errors <= errors.min() + tolerance
            chances = np.exp(logits[:, row, column])
            chance = (chances[0] if good[0] else chances[good].sum()) / chances.sum()
            weight = min(errors.max() - errors.min(), 4.0)
            total -= weight * math.log(chance)
            weights += weight
    loss = refiner.loss(photo, maps, true_maps).detach()
    assert float(loss) == pytest.approx(total / weights, rel=1e-4)


def test_on_an_exact_map_only_the_own_value_is_good() -> None:
    photo, maps = picture()
    refiner = DisparityRefiner((8, 8))
    untrained = math.log(math.exp(OWN_VALUE_BIAS) + CANDIDATES - 1) - OWN_VALUE_BIAS
    assert float(refiner.loss(photo, maps, maps).detach()) == pytest.approx(untrained, rel=1e-5)


def test_without_blur_there_is_nothing_to_learn() -> None:
    photo, maps = picture()
    sharp = maps_of(maps[:, :1], K=0.0)
    loss = small_refiner().loss(photo, sharp, maps_of(maps[:, :1].roll(5, -1), K=0.0))
    loss.backward()
    assert float(loss.detach()) == 0


def test_it_learns_to_move_edges_to_those_of_the_photograph() -> None:
    """A bright square before a dark wall; maps in which it is 3 px too small or too large."""
    torch.manual_seed(0)
    refiner = DisparityRefiner((16, 16))
    rng = np.random.default_rng(0)

    def scene(mistake: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        top, left = rng.integers(10, 20, 2)
        true = np.zeros((48, 48), np.float32)
        true[top : top + 18, left : left + 18] = 1
        photo = 0.2 + 0.6 * torch.from_numpy(true) + 0.02 * torch.rand(3, 48, 48)
        given = torch.from_numpy(eroded(true, mistake))
        return photo, *(maps_of(one[None, None])[0] for one in (given, torch.from_numpy(true)))

    optimizer = torch.optim.Adam(refiner.parameters(), 5e-3)
    for _ in range(100):
        scenes = [scene(mistake) for mistake in (-3, 0, 3)]
        loss = refiner.loss(*(torch.stack(part) for part in zip(*scenes, strict=True)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for mistake in (-3, 0, 3):
        photo, maps, true_maps = (part[None] for part in scene(mistake))
        wrong, still = ((one - true_maps)[:, 1].abs() > 0.5 for one in (maps, refiner(photo, maps)))
        if mistake:
            assert still.sum() < 0.1 * wrong.sum()
        else:
            assert still.float().mean() < 0.002

"""The sweep: unbiased and consistent as the equations promise, with radii and with pictures."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bokehdiff.blur_sweep import (
    disparity_from_regression,
    disparity_from_sweep,
    regress_radius,
)
from tests.waves import Waves

INSIDE = (..., slice(24, -24), slice(24, -24))

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def test_lines_by_hand() -> None:
    radius = torch.tensor([1.0, 2.5, 2.0], dtype=torch.float64).view(1, 3, 1, 1)
    K = torch.tensor([1.0, 2.0, 3.0])
    # sum(K r) = 1 + 5 + 6 = 12, sum(K^2) = 14.
    delta, error = regress_radius(radius, K)
    assert delta.item() == pytest.approx(12 / 14, rel=1e-12)
    left = [1 - 12 / 14, 2.5 - 24 / 14, 2 - 36 / 14]
    assert error.item() == pytest.approx(math.sqrt(sum(x * x for x in left) / 2 / 14), rel=1e-12)
    # About the means 2 and 11/6: sum(dK dr) = 1, sum(dK^2) = 2.
    delta, error = regress_radius(radius, K, with_offset=True)
    assert delta.item() == pytest.approx(0.5, rel=1e-12)
    left = [1 - 11 / 6 + 0.5, 2.5 - 11 / 6, 2 - 11 / 6 - 0.5]
    assert error.item() == pytest.approx(math.sqrt(sum(x * x for x in left) / 2), rel=1e-12)
    # Weights 1, 2, 4: sum(w K r) = 1 + 10 + 24 = 35, sum(w K^2) = 1 + 8 + 36 = 45.
    weight = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64).view(1, 3, 1, 1)
    delta, error = regress_radius(radius, K, weight)
    assert delta.item() == pytest.approx(35 / 45, rel=1e-12)
    assert error.item() == pytest.approx(45**-0.5, rel=1e-12)
    # Weighted means 17/7 and 14/7: sum(w dK dr) and sum(w dK^2).
    delta, error = regress_radius(radius, K, weight, with_offset=True)
    over = [1 - 17 / 7, 2 - 17 / 7, 3 - 17 / 7]
    above = [1 - 2.0, 0.5, 0.0]
    squares = sum(w * x * x for w, x in zip((1, 2, 4), over, strict=True))
    products = sum(w * x * y for w, x, y in zip((1, 2, 4), over, above, strict=True))
    assert delta.item() == pytest.approx(products / squares, rel=1e-12)
    assert error.item() == pytest.approx(squares**-0.5, rel=1e-12)


@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_estimates_are_unbiased_with_the_variance_of_the_equations(
    with_offset: bool, weighted: bool
) -> None:
    draws, delta, offset = 200 * 500, 0.3, 1.7 if with_offset else 0.0
    K = torch.tensor([4.0, 9.0, 16.0, 30.0], dtype=torch.float64)
    sigma = torch.tensor([0.3, 0.5, 0.8, 1.4] if weighted else [0.6] * 4, dtype=torch.float64)
    exact = (K * delta + offset).view(1, 4, 1, 1)
    radius = exact + sigma.view(1, 4, 1, 1) * noise(1, 4, 200, 500)
    weight = (sigma**-2).view(1, 4, 1, 1).expand_as(radius) if weighted else None
    estimate, error = regress_radius(radius, K, weight, with_offset)

    w = sigma**-2
    centre = (w * K).sum() / w.sum() if with_offset else 0.0
    variance = float(1 / (w * (K - centre) ** 2).sum())
    # Of N draws a mean has the standard deviation sqrt(variance / N), a variance sqrt(2 / N) of
    # itself; four of them are exceeded once in 16000.
    assert abs(float(estimate.mean()) - delta) < 4 * math.sqrt(variance / draws)
    spread = float(((estimate - delta) ** 2).mean())
    assert abs(spread / variance - 1) < 4 * math.sqrt(2 / draws)
    if weighted:
        assert torch.allclose(error, error.new_tensor(math.sqrt(variance)), rtol=1e-12)
    else:
        # The residual variance of 4 frames less the parameters: chi-square, whose mean of N has
        # sqrt(2 / freedom / N) of itself.
        freedom = 4 - (2 if with_offset else 1)
        mean = float((error**2).mean())
        assert abs(mean / variance - 1) < 4 * math.sqrt(2 / freedom / draws)


def test_error_falls_as_the_sum_of_squared_strengths_grows() -> None:
    sigma, draws = 0.8, 100 * 200
    for frames in (2, 8, 32):
        for widest in (10.0, 40.0):
            K = torch.linspace(widest / 2, widest, frames, dtype=torch.float64)
            radius = K.view(1, -1, 1, 1) * 0.2 + sigma * noise(1, frames, 100, 200, seed=frames)
            estimate, _ = regress_radius(radius, K)
            rms = math.sqrt(float(((estimate - 0.2) ** 2).mean()))
            assert rms == pytest.approx(
                sigma / math.sqrt(float((K**2).sum())), rel=4 / (2 * draws) ** 0.5
            )


def test_radii_cut_off_at_zero_bias_the_estimate_upward() -> None:
    """Limit (iii), said in the documentation."""
    K = torch.tensor([10.0, 20.0], dtype=torch.float64)
    radius = noise(1, 2, 100, 100).clamp_min(0)
    assert float(regress_radius(radius, K)[0].mean()) > 0.01


def test_a_single_frame_leaves_nothing_to_judge_its_error_by() -> None:
    delta, error = regress_radius(torch.full((1, 1, 2, 2), 3.0), torch.tensor([10.0]))
    assert torch.allclose(delta, torch.tensor(0.3))
    assert bool(error.isnan().all())


def aperture_stack(
    waves: Waves,
    disparity: float | torch.Tensor,
    df: float,
    K: list[float],
    deviation: float,
    seed: int,
) -> torch.Tensor:
    """(1, F, 3, 96, 112): a surface blurred exactly, with noise."""
    frames = [waves.light(96, 112, k * abs(disparity - df)) for k in K]
    stack = torch.stack(frames, 1)
    return (stack + deviation * noise(*stack.shape, seed=seed)).clamp_min(0)


@pytest.mark.parametrize(("df", "side"), [(0.5, "farther"), (0.1, "nearer")])
def test_planes_are_found_without_bias_and_with_the_error_stated(df: float, side: Any) -> None:
    K, disparity, waves = [10.0, 20.0, 30.0], 0.3, Waves(seed=1)
    sharp = waves.light(96, 112)
    errors, stated = [], []
    for seed in range(4):
        stack = aperture_stack(waves, disparity, df, K, 0.03, seed)
        result = disparity_from_sweep(sharp, stack, K, df, side=side)
        errors.append((result.disparity - disparity)[INSIDE])
        stated.append(result.standard_error[INSIDE])
    error, standard_error = torch.stack(errors), torch.stack(stated)
    typical = float((standard_error**2).mean().sqrt())
    # Windows of 4 pi 2.5^2 pixels are about independent: some 40 in each of the 4 pictures. The
    # interpolation is allowed three hundredths of a pixel in the most blurred frame.
    windows = error.numel() / (4 * math.pi * 2.5**2)
    assert abs(float(error.mean())) < 4 * typical / math.sqrt(windows) + 0.03 / K[-1]
    # A variance from 160 independent values is known to 11 %, a deviation to 6 %.
    assert float(error.std()) == pytest.approx(typical, rel=0.2)


def test_error_of_pictures_falls_with_more_frames() -> None:
    """1 / sqrt(sum K^2) over frames of the same K, whose blur is as easy to see."""
    waves, K = Waves(seed=4), 20.0
    sharp, deviations = waves.light(96, 112), []
    for frames in (1, 4):
        stack = aperture_stack(waves, 0.3, 0.5, [K] * frames, 0.03, seed=frames)
        result = disparity_from_sweep(sharp, stack, [K] * frames, 0.5, side="farther")
        deviations.append(float((result.disparity - 0.3)[INSIDE].std()))
    # Each deviation, of some 40 independent windows, is known to 11 %, their ratio to 16 %.
    assert deviations[0] / deviations[1] == pytest.approx(2, rel=0.4)


def test_slanted_surface_and_the_side_from_frames_of_different_focus() -> None:
    """Waves that a place blurs by its own radius: exact where the radius changes slowly."""
    waves = Waves(seed=6, longest=12)
    disparity = torch.linspace(0.2, 0.6, 112, dtype=torch.float64).expand(96, 112)
    K, df = [15.0, 25.0, 20.0], [0.25, 0.55, 0.4]
    frames = [
        waves.light(96, 112, k * (disparity - focus).abs()) for k, focus in zip(K, df, strict=True)
    ]
    stack = torch.stack(frames, 1) + 0.005 * noise(1, 3, 3, 96, 112)
    for dtype in (torch.float64, torch.float32):
        result = disparity_from_sweep(waves.light(96, 112).to(dtype), stack.to(dtype), K, df)
        relative = ((result.disparity - disparity) / disparity)[INSIDE].abs()
        assert float(relative.median()) < 0.01 and float(relative.max()) < 0.06
        assert float(result.reliability[INSIDE].median()) > 0.8
        assert result.disparity.dtype == dtype


def test_line_over_measured_radii_agrees_with_the_sweep() -> None:
    waves, K = Waves(seed=2), [10.0, 20.0, 30.0]
    sharp, stack = waves.light(96, 112), aperture_stack(waves, 0.3, 0.5, K, 0.01, 1)
    line = disparity_from_regression(sharp, stack, K, 0.5, side="farther")
    assert float((line.disparity - 0.3)[INSIDE].abs().median()) < 0.005
    assert float(line.reliability[INSIDE].median()) > 0.5


def test_what_hardly_differs_from_the_plane_in_focus_is_not_trusted() -> None:
    """Half a pixel of blur: nearer or farther, nobody can tell with a single plane in focus."""
    waves, K, df = Waves(seed=2), [10.0], 0.3
    near_focus = aperture_stack(waves, 0.35, df, K, 0.002, 1)
    far_from_it = aperture_stack(waves, 0.65, df, K, 0.002, 1)
    sharp = waves.light(96, 112)
    beside = disparity_from_sweep(sharp, near_focus, K, df, side="nearer").reliability[INSIDE]
    away = disparity_from_sweep(sharp, far_from_it, K, df, side="nearer").reliability[INSIDE]
    assert float(beside.median()) < 0.5 < float(away.median())


def test_disparity_beyond_the_range_is_not_trusted() -> None:
    waves, K = Waves(seed=2), [20.0]
    stack = aperture_stack(waves, 0.6, 0.1, K, 0.005, 1)
    result = disparity_from_sweep(
        waves.light(96, 112), stack, K, 0.1, side="nearer", disparity_range=(0.1, 0.4)
    )
    assert float(result.reliability[INSIDE].max()) == 0
    assert float(result.disparity.max()) <= 0.4 + 1e-12


def test_frames_that_are_not_blurred_change_nothing_and_copies_are_not_trusted() -> None:
    waves, K = Waves(seed=2), [20.0]
    sharp, stack = waves.light(64, 64), aperture_stack(waves, 0.3, 0.5, K, 0.01, 1)[..., :64, :64]
    with_sharp = torch.cat([sharp[:, None], stack], 1)
    alone = disparity_from_sweep(sharp, stack, K, 0.5, side="farther")
    together = disparity_from_sweep(sharp, with_sharp, [0.0, 20.0], 0.5, side="farther")
    assert torch.equal(alone.disparity, together.disparity)
    copies = sharp[:, None].expand(-1, 3, -1, -1, -1)
    result = disparity_from_sweep(sharp, copies, [10.0, 20.0, 30.0], 0.1, side="nearer")
    # Without blur everything is where the lens is focused: that is what copies say.
    assert torch.allclose(result.disparity, torch.full_like(result.disparity, 0.1), atol=0.01)
    assert float(result.reliability.max()) < 0.5


def test_batches_have_their_own_strengths() -> None:
    waves = Waves(seed=2)
    sharp = waves.light(96, 112)
    stacks = [aperture_stack(waves, 0.3, 0.5, [k], 0.005, 1) for k in (15.0, 30.0)]
    K = torch.tensor([[15.0], [30.0]])
    both = disparity_from_sweep(
        sharp.expand(2, -1, -1, -1), torch.cat(stacks), K, 0.5, side="farther"
    )
    for index in (0, 1):
        alone = disparity_from_sweep(sharp, stacks[index], K[index], 0.5, side="farther")
        assert torch.equal(both.disparity[index], alone.disparity[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"side": "both"}, "does not tell nearer"),
        ({"side": "behind"}, "'nearer', 'farther' or 'both'"),
        ({"K": [10.0]}, None),
        ({"K": [10.0, 20.0, 30.0]}, "2 frames"),
        ({"K": [-1.0, 2.0]}, "not negative"),
        ({"K": [0.0, 0.0]}, "K is 0"),
        ({"K": "large"}, "finite numbers"),
        ({"K": [[1.0, 2.0], [1.0, 2.0]]}, "2 rows for 1 pictures"),
        ({"df": math.nan}, "finite numbers"),
        ({"df": 0.0}, "no disparity to search"),
        ({"disparity_range": (0.4, 0.2)}, "ascending"),
        ({"disparity_range": (0.0, 50.0), "side": "nearer"}, "no disparity to search"),
        ({"stack": torch.ones(1, 2, 3, 16, 15)}, "size of the image"),
        ({"stack": torch.ones(1, 2, 3, 16, 16, dtype=torch.float64)}, "wanted the same"),
        ({"image": torch.ones(3, 16, 16)}, "wanted \\(B, C, H, W\\)"),
    ],
)
def test_mistakes_are_told(change: dict[str, Any], said: str | None) -> None:
    arguments: dict[str, Any] = {
        "image": torch.full((1, 3, 16, 16), 0.5),
        "stack": torch.full((1, 2, 3, 16, 16), 0.5),
        "K": [10.0, 20.0],
        "df": 0.3,
        "side": "farther",
        **change,
    }
    if said is None:  # one K serves all frames
        disparity_from_sweep(**arguments)
        return
    with pytest.raises(ValueError, match=said):
        disparity_from_sweep(**arguments)


def test_mistakes_of_lines_are_told() -> None:
    radius = torch.ones(1, 2, 4, 4)
    with pytest.raises(ValueError, match="two different K"):
        regress_radius(radius, torch.tensor([3.0, 3.0]), with_offset=True)
    with pytest.raises(ValueError, match="K above 0"):
        regress_radius(radius, torch.zeros(2))
    with pytest.raises(ValueError, match="1 / variance"):
        regress_radius(radius, torch.tensor([1.0, 2.0]), -radius)
    with pytest.raises(ValueError, match="F frames"):
        regress_radius(radius[0], torch.tensor([1.0, 2.0]))
    image, stack = torch.ones(1, 3, 16, 16), torch.ones(1, 2, 3, 16, 16)
    with pytest.raises(ValueError, match="single plane in focus"):
        disparity_from_regression(image, stack, [1.0, 2.0], [0.1, 0.2], side="nearer")

"""Losses of depth: the equations against float64 by hand, masks, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from bokehdiff.depth_losses import gradient_loss, scale_invariant_log_loss, valid_depth


def random_depths(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return tuple(  # type: ignore[return-value]
        0.5 + 4 * torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2)
    )


@pytest.mark.parametrize("focus", [0.0, 0.15, 0.5, 1.0])
def test_silog_is_its_equation(focus: float) -> None:
    prediction, depth = random_depths(2, 5, 6)
    valid = depth > 1.5
    errors = [
        math.log(t) - math.log(p)
        for p, t, v in zip(*(x.flatten().tolist() for x in (prediction, depth, valid)), strict=True)
        if v
    ]
    mean = sum(errors) / len(errors)
    squares = sum(error**2 for error in errors) / len(errors)
    loss = scale_invariant_log_loss(prediction, depth, valid, variance_focus=focus)
    assert float(loss) == pytest.approx(math.sqrt(squares - focus * mean**2), rel=1e-12)


def test_silog_with_full_focus_ignores_a_scale_and_with_none_does_not() -> None:
    _, depth = random_depths(1, 8, 8)
    everywhere = torch.ones_like(depth, dtype=torch.bool)
    scaled = 1.7 * depth
    assert scale_invariant_log_loss(scaled, depth, everywhere, variance_focus=1.0) < 1e-5
    loss = scale_invariant_log_loss(scaled, depth, everywhere, variance_focus=0.0)
    assert float(loss) == pytest.approx(math.log(1.7), rel=1e-12)


def test_nine_valid_pixels_are_too_few_and_ten_are_enough() -> None:
    prediction, depth = random_depths(1, 4, 4)
    prediction.requires_grad_(True)
    valid = torch.zeros(1, 4, 4, dtype=torch.bool)
    valid.view(-1)[:9] = True
    loss = scale_invariant_log_loss(prediction, depth, valid)
    loss.backward()
    assert loss == 0 and torch.equal(prediction.grad, torch.zeros_like(prediction))
    valid.view(-1)[9] = True
    assert scale_invariant_log_loss(prediction, depth, valid) > 0


@pytest.mark.parametrize("loss", [scale_invariant_log_loss, gradient_loss])
def test_unknown_depth_counts_for_nothing(loss: object) -> None:
    prediction, depth = random_depths(2, 8, 8)
    valid = torch.ones_like(depth, dtype=torch.bool)
    valid[:, 2:5, 3:6] = False
    expected = loss(prediction, depth, valid)  # type: ignore[operator]
    depth[:, 2:5, 3:6] = torch.tensor([0.0, math.inf, math.nan], dtype=torch.float64)
    prediction = prediction.clone()
    prediction[:, 2:5, 3:6] = 0.0
    prediction.requires_grad_(True)
    found = loss(prediction, depth, valid)  # type: ignore[operator]
    assert torch.equal(found, expected)
    found.backward()
    assert torch.isfinite(prediction.grad).all()
    assert torch.equal(prediction.grad[:, 2:5, 3:6], torch.zeros(2, 3, 3, dtype=torch.float64))


def test_silog_of_a_perfect_prediction_has_a_finite_gradient() -> None:
    _, depth = random_depths(1, 6, 6)
    prediction = depth.clone().requires_grad_(True)
    scale_invariant_log_loss(prediction, depth, torch.ones_like(depth, dtype=torch.bool)).backward()
    assert torch.isfinite(prediction.grad).all()


def test_gradient_loss_is_its_equation() -> None:
    prediction, depth = random_depths(2, 7, 9)
    valid = depth > 1.0
    error = (depth.log() - prediction.log()).tolist()
    known = valid.tolist()
    total = 0.0
    for scale in (0, 1):
        step = 2**scale
        for down, right in ((step, 0), (0, step)):
            found = [
                abs(error[b][y + down][x + right] - error[b][y][x])
                for b in range(2)
                for y in range(0, 7 - down, step)
                for x in range(0, 9 - right, step)
                if known[b][y][x] and known[b][y + down][x + right]
            ]
            total += sum(found) / len(found)
    loss = gradient_loss(prediction, depth, valid, scales=2)
    assert float(loss) == pytest.approx(total / 2, rel=1e-12)


def test_gradient_loss_ignores_a_scale_and_sees_a_missed_edge() -> None:
    depth = torch.ones(1, 16, 16, dtype=torch.float64)
    depth[..., 8:] = 3.0
    everywhere = torch.ones_like(depth, dtype=torch.bool)
    assert gradient_loss(1.3 * depth, depth, everywhere) < 1e-12
    assert gradient_loss(torch.full_like(depth, 2.0), depth, everywhere) > 0.01


def test_valid_depth_is_finite_and_in_range() -> None:
    depth = torch.tensor([0.0, 1e-3, 5.0, 80.0, 81.0, math.inf, math.nan, -1.0])
    assert valid_depth(depth).tolist() == [False, True, True, True, False, False, False, False]
    with pytest.raises(ValueError, match="2 to 1 m; wanted 0 < smallest < largest"):
        valid_depth(depth, 2, 1)


def test_mistakes_are_refused() -> None:
    prediction, depth = random_depths(1, 4, 4)
    valid = torch.ones_like(depth, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"wanted one shape \(B, H, W\)"):
        scale_invariant_log_loss(prediction[:, :3], depth, valid)
    with pytest.raises(ValueError, match="variance_focus is 1.5"):
        scale_invariant_log_loss(prediction, depth, valid, variance_focus=1.5)
    with pytest.raises(ValueError, match="scales is 0"):
        gradient_loss(prediction, depth, valid, scales=0)

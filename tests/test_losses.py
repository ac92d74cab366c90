"""Losses: values by hand, gradients, refusals. Golden values are in test_goldens_losses.py."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import avg_pool2d

from bokehdiff.losses import (
    EDGE_VARIANTS,
    RECONSTRUCTION_KINDS,
    extended_sobel_kernel,
    multi_scale_edge_loss,
    reconstruction,
)


def images(count: int, height: int = 12, width: int = 10) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, height, width)
    return [
        2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1 for _ in range(count)
    ]


@pytest.mark.parametrize(("kind", "expected"), [("mse", 0.25), ("l1", 0.5), ("charbonnier", 0.5)])
def test_reconstruction_of_a_constant_error(kind: str, expected: float) -> None:
    (image,) = images(1)
    assert reconstruction(image + 0.5, image, kind).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", RECONSTRUCTION_KINDS)
def test_reconstruction_is_least_at_the_target(kind: str) -> None:
    prediction, target = images(2)
    assert reconstruction(target, target, kind) < reconstruction(prediction, target, kind)


def test_charbonnier_has_a_gradient_at_zero() -> None:
    (image,) = images(1)
    prediction = image.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reconstruction(prediction, image, "charbonnier"), prediction)
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("variant", EDGE_VARIANTS)
def test_edge_loss_is_zero_at_the_target_and_blind_to_brightness(variant: str) -> None:
    target, sharp = images(2)
    assert multi_scale_edge_loss(target, target, sharp, variant=variant) == 0
    shifted = multi_scale_edge_loss(target + 0.1, target, sharp, variant=variant)
    assert shifted.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("variant", EDGE_VARIANTS)
def test_edge_loss_treats_both_axes_alike(variant: str) -> None:
    prediction, target, sharp = images(3)
    loss = multi_scale_edge_loss(prediction, target, sharp, variant=variant)
    turned = multi_scale_edge_loss(prediction.mT, target.mT, sharp.mT, variant=variant)
    torch.testing.assert_close(loss, turned)


def test_edge_loss_official_by_hand() -> None:
    prediction, target, sharp = images(3)
    expected = 0.0
    for level in (1, 2):
        p, b, f = (avg_pool2d(image, level) for image in (prediction, target, sharp))
        for axis in (-2, -1):
            gp, gb, gf = (image.diff(dim=axis) for image in (p, b, f))
            weight = 1 + torch.maximum(gb.abs(), gf.abs())
            expected += float(((gp - gb).abs() * weight).mean()) / level
    assert multi_scale_edge_loss(prediction, target, sharp, levels=2).item() == pytest.approx(
        expected
    )


def test_edge_loss_paper_ignores_smooth_regions() -> None:
    prediction, _, _ = images(3)
    flat = torch.zeros_like(prediction)
    assert multi_scale_edge_loss(prediction, flat, flat, variant="paper") == 0
    assert multi_scale_edge_loss(prediction, flat, flat, variant="official") > 0


def test_extended_sobel_is_sobel_and_measures_slope() -> None:
    sobel = torch.tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=torch.float64) / 8
    torch.testing.assert_close(extended_sobel_kernel(1), sobel)
    for half_width in (1, 2, 3):
        kernel = extended_sobel_kernel(half_width)
        ramp = torch.arange(2 * half_width + 1, dtype=torch.float64)
        assert (kernel * ramp).sum().item() == pytest.approx(1)
        assert (kernel * ramp[:, None]).sum().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("variant", EDGE_VARIANTS)
def test_edge_loss_gradient(variant: str) -> None:
    prediction, target, sharp = images(3, 8, 9)
    prediction.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda image: multi_scale_edge_loss(image, target, sharp, variant=variant), prediction
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"levels": 0}, "at least one level"),
        ({"levels": 6}, "at least 12 pixels"),
        ({"variant": "sobel"}, "Choose one of"),
    ],
)
def test_edge_loss_refuses(arguments: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        multi_scale_edge_loss(*images(3, 11, 11), **arguments)


def test_losses_refuse_images_of_other_shapes() -> None:
    prediction, target = images(2)
    with pytest.raises(ValueError, match="one shape"):
        reconstruction(prediction, target[..., 1:])
    with pytest.raises(ValueError, match="one shape"):
        multi_scale_edge_loss(prediction, target, target[:1])
    with pytest.raises(ValueError, match="unknown"):
        reconstruction(prediction, target, "l2")

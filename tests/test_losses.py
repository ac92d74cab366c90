"""Losses: values by hand, gradients, refusals. Golden values are in test_goldens_losses.py, the
perceptual loss is in test_perceptual.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d

from bokehdiff.losses import (
    EDGE_VARIANTS,
    RECONSTRUCTION_KINDS,
    discriminator_loss,
    extended_sobel_kernel,
    generator_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    multi_scale_edge_loss,
    reconstruction,
    structural_similarity_loss,
    warping_loss,
    weighted_l1,
    weighted_structural_similarity_loss,
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


@pytest.mark.parametrize("variant", EDGE_VARIANTS)
def test_edge_loss_in_float32_is_its_float64_twin(variant: str) -> None:
    results = []
    for dtype in (torch.float32, torch.float64):
        prediction, target, sharp = (image.to(dtype) for image in images(3, 40, 33))
        prediction.requires_grad_()
        loss = multi_scale_edge_loss(prediction, target, sharp, variant=variant)
        results.append((loss, *torch.autograd.grad(loss, prediction)))
    (loss, gradient), (loss64, gradient64) = results
    assert loss.item() == pytest.approx(loss64.item(), rel=1e-5)
    # No difference of derivatives is so small here that rounding would decide its sign.
    torch.testing.assert_close(
        gradient.double(), gradient64, rtol=0, atol=1e-5 * float(gradient64.abs().max())
    )


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    real, fake = 3 * torch.randn(2, 5, 4, 3, generator=generator, dtype=torch.float64)
    return real.requires_grad_(), fake.requires_grad_()


def test_adversarial_losses_by_hand() -> None:
    # The logistic function of log 3 is 3/4.
    real = torch.full((1, 1, 1), math.log(3))
    expected_real = -(0.8 * math.log(3 / 4) + 0.2 * math.log(1 / 4))
    expected_fake = -math.log(1 / 2)
    assert generator_loss(real).item() == pytest.approx(expected_real, rel=1e-6)
    assert discriminator_loss(real, 0 * real).item() == pytest.approx(
        expected_real + expected_fake, rel=1e-6
    )
    assert generator_loss(real, 1.0).item() == pytest.approx(-math.log(3 / 4), rel=1e-6)


@pytest.mark.parametrize("real_label", [0.8, 1.0])
def test_adversarial_gradients_are_probability_minus_label(real_label: float) -> None:
    real, fake = logits()
    of_real, of_fake = torch.autograd.grad(discriminator_loss(real, fake, real_label), (real, fake))
    (of_generator,) = torch.autograd.grad(generator_loss(fake, real_label), fake)
    torch.testing.assert_close(of_real, (real.sigmoid() - real_label) / real.numel())
    torch.testing.assert_close(of_fake, fake.sigmoid() / fake.numel())
    torch.testing.assert_close(of_generator, (fake.sigmoid() - real_label) / fake.numel())
    assert torch.autograd.gradcheck(
        lambda real, fake: discriminator_loss(real, fake, real_label), (real, fake)
    )


def test_a_label_of_one_is_the_log_loss_of_the_paper() -> None:
    real, fake = logits()
    of_discriminator = -(real.sigmoid().log() + (1 - fake.sigmoid()).log()).mean()
    torch.testing.assert_close(discriminator_loss(real, fake, 1.0), of_discriminator)
    torch.testing.assert_close(generator_loss(fake, 1.0), -fake.sigmoid().log().mean())


def test_adversarial_losses_do_not_depend_on_the_batch_size() -> None:
    real, fake = logits()
    torch.testing.assert_close(
        discriminator_loss(real.repeat(3, 1, 1), fake.repeat(2, 1, 1)),
        discriminator_loss(real, fake),
    )
    torch.testing.assert_close(generator_loss(fake.repeat(3, 1, 1)), generator_loss(fake))


def test_adversarial_losses_of_a_certain_discriminator_are_finite() -> None:
    # A probability of exactly 0 or 1 has no finite logarithm; a logit of 1000 has a loss.
    certain = torch.tensor([[[1000.0, -1000.0]]], requires_grad=True)
    loss = discriminator_loss(certain, certain, 1.0)
    assert loss.item() == pytest.approx(1000)
    (gradient,) = torch.autograd.grad(loss, certain)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("real_label", [0.0, -0.1, 1.1, math.nan])
def test_labels_that_are_no_probability_are_refused(real_label: float) -> None:
    real, fake = logits()
    with pytest.raises(ValueError, match="probability in .0, 1., got real_label="):
        generator_loss(fake, real_label)
    with pytest.raises(ValueError, match="probability in .0, 1., got real_label="):
        discriminator_loss(real, fake, real_label)


def ssim_by_hand(prediction: Tensor, target: Tensor) -> Tensor:
    """SSIM (B, C, windows) as Wang et al. write it, of images in [0, 1], window by window."""
    offsets = torch.arange(11, dtype=prediction.dtype) - 5
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = (window[:, None] * window) / window.sum() ** 2

    def mean(image: Tensor) -> Tensor:
        single = image.reshape(-1, 1, *image.shape[-2:])
        return conv2d(single, window[None, None]).reshape(*image.shape[:2], -1)

    x, y = mean(prediction), mean(target)
    variance_x, variance_y = mean(prediction**2) - x**2, mean(target**2) - y**2
    covariance = mean(prediction * target) - x * y
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * x * y + c1) * (2 * covariance + c2)) / (
        (x**2 + y**2 + c1) * (variance_x + variance_y + c2)
    )


def test_structural_similarity_and_its_gradient_are_those_of_the_definition() -> None:
    prediction, target = images(2, 16, 14)
    prediction.requires_grad_()
    loss = structural_similarity_loss(prediction, target)
    expected = 1 - ssim_by_hand((prediction + 1) / 2, (target + 1) / 2).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    found, wanted = (torch.autograd.grad(one, prediction)[0] for one in (loss, expected))
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-15)


def test_structural_similarity_is_zero_at_the_target_whatever_the_size() -> None:
    target = images(1, 300, 280)[0][:1]  # piq would halve it by default
    assert structural_similarity_loss(target, target).item() == pytest.approx(0, abs=1e-12)
    fine = target.clone()
    fine[..., ::2, ::2] *= -1
    assert structural_similarity_loss(fine, target) > 0.1
    assert structural_similarity_loss(3 * target, target.sign()) < 0.5  # clamped, not refused


def weighted_case(height: int = 16, width: int = 14) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction and target in [0, 1], and weights of mean 1."""
    prediction, target = ((image + 1) / 2 for image in images(2, height, width))
    weight = torch.rand(
        len(prediction), 1, height, width, generator=torch.Generator().manual_seed(8)
    ).to(prediction)
    return prediction, target, weight / weight.mean()


def test_weighted_structural_similarity_and_its_gradient_are_those_of_the_definition() -> None:
    prediction, target, weight = weighted_case()
    prediction.requires_grad_()
    loss = weighted_structural_similarity_loss(prediction, target, weight)
    of_centres = weight[..., 5:-5, 5:-5].flatten(2)
    expected = (of_centres * (1 - ssim_by_hand(prediction, target))).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    found, wanted = (torch.autograd.grad(one, prediction)[0] for one in (loss, expected))
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-15)


def test_without_weights_it_is_the_similarity_of_piq() -> None:
    prediction, target, weight = weighted_case(40, 52)
    found = weighted_structural_similarity_loss(prediction, target, torch.ones_like(weight))
    wanted = structural_similarity_loss(2 * prediction - 1, 2 * target - 1)
    assert found.item() == pytest.approx(wanted.item(), abs=1e-12)
    # Variances of flat pictures are differences of numbers near 1: rounding by 6e-8 shows beside
    # the constant 9e-4 in the denominator.
    flat = 0.9 + 0.01 * prediction
    single = weighted_structural_similarity_loss(
        *(one.float() for one in (flat, flat.flip(-1), torch.ones_like(weight)))
    )
    double = weighted_structural_similarity_loss(flat, flat.flip(-1), torch.ones_like(weight))
    assert single.item() == pytest.approx(double.item(), abs=6e-8 / 9e-4)


def test_weighted_losses_are_zero_at_the_target_with_finite_gradients() -> None:
    _, target, weight = weighted_case()
    for loss in (weighted_l1, weighted_structural_similarity_loss):
        prediction = target.clone().requires_grad_()
        value = loss(prediction, target, weight)
        assert value.item() == pytest.approx(0, abs=1e-12)
        value.backward()
        assert prediction.grad is not None and prediction.grad.isfinite().all()


def test_weighted_l1_by_hand() -> None:
    target = torch.zeros(1, 3, 1, 2)
    prediction = torch.tensor([0.1, 0.3]).expand(1, 3, 1, 2)
    weight = torch.tensor([1.5, 0.5]).view(1, 1, 1, 2)
    # (1.5 * 0.1 + 0.5 * 0.3) / 2
    assert weighted_l1(prediction, target, weight).item() == pytest.approx(0.15)


def test_weighted_losses_refuse() -> None:
    prediction, target, weight = weighted_case()
    for loss in (weighted_l1, weighted_structural_similarity_loss):
        with pytest.raises(ValueError, match="must have the shape"):
            loss(prediction, target, weight[..., :-1])
        with pytest.raises(ValueError, match="one shape"):
            loss(prediction, target[..., :-1], weight)
    small = [one[..., :10, :10] for one in weighted_case()]
    with pytest.raises(ValueError, match="at least 11 pixels a side, got 10 x 10"):
        weighted_structural_similarity_loss(*small)


def test_hinge_losses_by_hand() -> None:
    real = [torch.tensor([2.0, 0.5]), torch.tensor([[-1.0]])]
    fake = [torch.tensor([-3.0, 0.0]), torch.tensor([[1.0]])]
    # Judges: (0 + 0.5) / 2 + (0 + 1) / 2 = 0.75, and 2 + 2 = 4.
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx((0.75 + 4) / 2)
    assert hinge_generator_loss(fake).item() == pytest.approx((1.5 - 1) / 2)


def test_structural_similarity_of_images_below_its_window_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 11 pixels a side, got 12 x 10"):
        structural_similarity_loss(*images(2))


def test_warping_loss_is_the_mean_change_of_what_was_seen_before() -> None:
    (previous,) = images(1)
    motion = torch.zeros(2, 2, 12, 10, dtype=torch.float64)
    motion[:, 0] = -1.0  # everything has moved one pixel to the right
    moved = previous.roll(1, -1)
    everywhere = torch.ones(2, 1, 12, 10)
    assert warping_loss(moved, previous, motion, everywhere).item() == pytest.approx(0, abs=1e-12)
    visible = torch.zeros(2, 1, 12, 10)
    visible[:, :, 2:5, 3:7] = 1
    changed = moved + 5.0
    changed[:, :, 2:5, 3:7] = moved[:, :, 2:5, 3:7] + 0.25
    assert warping_loss(changed, previous, motion, visible).item() == pytest.approx(0.25)
    assert warping_loss(changed, previous, motion, 0 * visible) == 0


def test_warping_loss_pulls_at_the_present_alone() -> None:
    current, previous = (image.requires_grad_() for image in images(2))
    motion = torch.zeros(2, 2, 12, 10, dtype=torch.float64)
    warping_loss(current, previous, motion, torch.ones(2, 1, 12, 10)).backward()
    assert current.grad is not None and torch.isfinite(current.grad).all()
    assert (current.grad != 0).all() and previous.grad is None

"""Training losses: how far a rendered photograph is from the photograph a lens would have made.

Every loss takes display-encoded sRGB images of shape (B, 3, H, W) in [-1, 1] unless it says
otherwise, the adversarial ones what the discriminator says about such images, and returns one
scalar, a mean over all elements, so that values do not depend on the batch or the crop size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bokehdiff.backbones import (
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    lpips_network,
    vgg19_features,
)
from bokehdiff.warping import seen_before, warp

RECONSTRUCTION_KINDS = ("mse", "l1", "charbonnier")
EDGE_VARIANTS = ("official", "paper")
CHARBONNIER_EPSILON = 1e-3
SMALLEST_PERCEPTUAL_SIDE = 16
"""Pixels a side that VGG leaves one of, after it has halved the image four times."""
SSIM_WINDOW = 11
"""Pixels a side of the window of SSIM, and so of the smallest image it can judge."""
SSIM_SIGMA = 1.5
"""Pixels of its standard deviation."""


def reconstruction(prediction: Tensor, target: Tensor, kind: str = "mse") -> Tensor:
    """Return the mean pixel-wise distance of `prediction` from `target`, a scalar.

    With e = prediction - target, the mean over all elements is taken of

    - ``"mse"``: ``e^2`` (the paper's reconstruction term),
    - ``"l1"``: ``|e|``,
    - ``"charbonnier"``: ``sqrt(e^2 + 0.001^2)``, an absolute value that is smooth at zero.

    Args:
        prediction: (B, 3, H, W), not clamped, so that values outside [-1, 1] are pulled back.
        target: (B, 3, H, W) in [-1, 1].
        kind: one of ``RECONSTRUCTION_KINDS``.

    Raises:
        ValueError: shapes differ, or `kind` is unknown.
    """
    _check_same_shape(prediction=prediction, target=target)
    error = prediction - target
    if kind == "mse":
        return error.square().mean()
    if kind == "l1":
        return error.abs().mean()
    if kind == "charbonnier":
        return (error.square() + CHARBONNIER_EPSILON**2).sqrt().mean()
    raise ValueError(
        f"The reconstruction loss {kind!r} is unknown. Choose one of {RECONSTRUCTION_KINDS}."
    )


def structural_similarity_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return ``1 - SSIM``, a scalar: 0 for equal images, at most 2.

    SSIM (Wang et al. 2004) at full resolution, with a Gaussian window of 11 pixels and sigma 1.5,
    of each colour by itself, mean over the windows that lie within the image. It is computed by
    piq.

    Args:
        prediction: (B, 3, H, W); values outside [-1, 1] count as -1 or 1.
        target: (B, 3, H, W) in [-1, 1].

    Raises:
        ImportError: piq is missing.
        ValueError: shapes differ, or the images are smaller than the window.
    """
    _check_same_shape(prediction=prediction, target=target)
    _check_window(prediction)
    try:
        import piq
    except ImportError as error:
        raise ImportError("The SSIM loss needs piq: pip install 'bokehdiff[train]'.") from error
    first, second = ((image.clamp(-1, 1) + 1) / 2 for image in (prediction, target))
    # It would halve large images, and judge other images than those that are given.
    similarity: Tensor = piq.ssim(first, second, kernel_size=SSIM_WINDOW, downsample=False)
    return 1 - similarity


def weighted_l1(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Return ``mean(weight * |prediction - target|)``, a scalar.

    Args:
        prediction, target: (B, 3, H, W), in any range; the loss is in their unit.
        weight: (B, 1, H, W), of mean 1 for a loss that compares with an unweighted one.

    Raises:
        ValueError: shapes differ.
    """
    _check_same_shape(prediction=prediction, target=target)
    _check_weight(prediction, weight)
    return (weight * (prediction - target).abs()).mean()


def weighted_structural_similarity_loss(
    prediction: Tensor, target: Tensor, weight: Tensor
) -> Tensor:
    """Return 1 - SSIM, windows counted by the weight at their centre, a scalar.

    With m the map of SSIM (as in :func:`structural_similarity_loss`: Gaussian windows of 11 pixels
    and sigma 1.5 that lie within the image, each colour by itself) this is
    ``mean(weight * (1 - m))``.

    Args:
        prediction, target: (B, 3, H, W) **in [0, 1]**; values beyond count as 0 or 1.
        weight: (B, 1, H, W), of mean 1 for a loss that compares with an unweighted one.

    Raises:
        ValueError: shapes differ, or the images are smaller than the window.
    """
    _check_same_shape(prediction=prediction, target=target)
    _check_weight(prediction, weight)
    _check_window(prediction)
    similarity = _similarity_map(prediction.clamp(0, 1), target.clamp(0, 1))
    border = SSIM_WINDOW // 2
    of_centres = weight[..., border:-border, border:-border]
    return (of_centres * (1 - similarity)).mean()


def _similarity_map(first: Tensor, second: Tensor) -> Tensor:
    """(B, C, H - 10, W - 10) SSIM of the windows within the images, which are in [0, 1]."""
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    window = (window / window.sum()).to(first)

    channels = first.shape[1]
    kernel = (window[:, None] * window).expand(channels, 1, -1, -1)

    def local_mean(values: Tensor) -> Tensor:
        # In one: on a CPU one axis after the other takes ten times as long.
        return F.conv2d(values, kernel, groups=channels)

    mean, other_mean = local_mean(first), local_mean(second)
    variance = local_mean(first * first) - mean * mean
    other_variance = local_mean(second * second) - other_mean * other_mean
    covariance = local_mean(first * second) - mean * other_mean
    c1, c2 = 0.01**2, 0.03**2
    return (
        (2 * mean * other_mean + c1)
        * (2 * covariance + c2)
        / ((mean * mean + other_mean * other_mean + c1) * (variance + other_variance + c2))
    )


def warping_loss(current: Tensor, previous: Tensor, motion: Tensor, visible: Tensor) -> Tensor:
    """Return how much a film flickers from one frame to the next, a scalar.

    ``mean over V of |y_t - warp(y_(t-1), motion)|``, where V are the points that the previous frame
    shows too. Gradients reach the current frame alone, so that the past is not pulled towards
    mistakes of the present. Without such points it is 0.

    Args:
        current, previous: (B, 3, H, W), two frames of what was rendered.
        motion: (B, 2, H, W), see `bokehdiff.warping.warp`.
        visible: (B, 1, H, W), above 0 where nothing hid the point in the previous frame.

    Raises:
        ValueError: shapes differ.
    """
    _check_same_shape(current=current, previous=previous)
    valid = ((visible > 0) & seen_before(motion)).to(current.dtype)
    change = (current - warp(previous.detach(), motion)).abs().mean(1, keepdim=True)
    return (change * valid).sum() / valid.sum().clamp_min(1)


def multi_scale_edge_loss(
    prediction: Tensor,
    target: Tensor,
    all_in_focus: Tensor,
    levels: int = 3,
    variant: str = "official",
) -> Tensor:
    """Return how much the edges of `prediction` differ from those of `target`, a scalar.

    Errors count more where the target or the all-in-focus photograph has an edge, so that an edge
    left sharp and an edge blurred too much both cost. With p, b, f for the three images:

    - ``"official"``, the form the published training script uses. At level l the images are
      reduced to 1/l of their size by area averaging, and g is the forward difference along one
      axis::

          sum over l = 1..levels and both axes of
              (1 / l) * mean(|g(p_l) - g(b_l)| * (1 + max(|g(b_l)|, |g(f_l)|)))

    - ``"paper"``, Equation 10 of the BokehDiff paper. The images keep their size, and G_l is the
      extended Sobel derivative of (2 l + 1) x (2 l + 1) pixels (see `extended_sobel_kernel`)::

          sum over l = 1..levels and both axes of
              (1 / l^2) * mean(|G_l(p) - G_l(b)| * max(|G_l(b)|, |G_l(f)|))

      The paper speaks of "kernel size l", which leaves no derivative at l = 1; l is read as the
      half width.

    Args:
        prediction: (B, 3, H, W). Training clamps it to [-1, 1] first, as the authors do.
        target: (B, 3, H, W), the photograph with lens blur.
        all_in_focus: (B, 3, H, W), the photograph everything is sharp in.
        levels: number of scales, at least 1.
        variant: one of ``EDGE_VARIANTS``.

    Raises:
        ValueError: shapes differ, the image is too small for the coarsest level, or `variant` is
        unknown.
    """
    _check_same_shape(prediction=prediction, target=target, all_in_focus=all_in_focus)
    if variant not in EDGE_VARIANTS:
        raise ValueError(
            f"The edge loss variant {variant!r} is unknown. Choose one of {EDGE_VARIANTS}."
        )
    if levels < 1:
        raise ValueError(f"The edge loss needs at least one level, got levels={levels}.")
    height, width = prediction.shape[-2:]
    smallest_side = 2 * levels if variant == "official" else 2 * levels + 1
    if min(height, width) < smallest_side:
        raise ValueError(
            f"An edge loss with {levels} levels needs images of at least {smallest_side} pixels a "
            f"side, got {height} x {width}. Use fewer levels or larger crops."
        )

    total = prediction.new_zeros(())
    for level in range(1, levels + 1):
        if variant == "official":
            size = (height // level, width // level)
            gradients = [
                _forward_differences(image if level == 1 else F.adaptive_avg_pool2d(image, size))
                for image in (prediction, target, all_in_focus)
            ]
            level_weight, flat_region_weight = 1.0 / level, 1.0
        else:
            gradients = [
                _sobel_differences(image, level) for image in (prediction, target, all_in_focus)
            ]
            level_weight, flat_region_weight = 1.0 / level**2, 0.0
        for of_prediction, of_target, of_all_in_focus in zip(*gradients, strict=True):
            edge_strength = torch.maximum(of_target.abs(), of_all_in_focus.abs())
            difference = (of_prediction - of_target).abs()
            total = (
                total + level_weight * (difference * (flat_region_weight + edge_strength)).mean()
            )
    return total


def extended_sobel_kernel(half_width: int) -> Tensor:
    """Return the (2 n + 1, 2 n + 1) float64 kernel of the horizontal derivative, for half width n.

    The weight at offset (x, y) is ``x / (x^2 + y^2)``, which for n = 1 is the Sobel kernel with
    corners of a half beside a centre of one. Scaled so that an image rising by 1 per pixel gives
    1.
    """
    offsets = torch.arange(-half_width, half_width + 1, dtype=torch.float64)
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    squared_distance = x.square() + y.square()
    kernel = torch.where(squared_distance > 0, x / squared_distance.clamp_min(1), 0.0)
    return kernel / (kernel * x).sum()


class PerceptualLoss(nn.Module):
    """LPIPS: how different two photographs look to VGG-16, a scalar.

    Both images pass through the frozen network. With phi_l the features after the last ReLU before
    each of its five poolings, scaled to unit length at every location, and w_l >= 0 the weights
    that LPIPS has learned from human judgements (Zhang et al. 2018, Equation 1)::

        sum over l = 1..5 of mean over locations of sum over channels of
            w_l * (phi_l(prediction) - phi_l(target))^2

    Everything in it is frozen, and it stays in eval mode, without dropout, whatever the mode of the
    module it is a part of.

    Args:
        network: an ``lpips.LPIPS``. :meth:`from_backbone` makes it.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.train()

    @classmethod
    def from_backbone(cls, weights: str | None = None) -> PerceptualLoss:
        """Return the loss in float32 on the CPU. No random number is drawn.

        Args:
            weights: file of VGG-16 in torchvision's naming (``features.0.weight``, ...), ``.pth``
                or ``.safetensors``, whose classifier may be absent, or the folder that
                ``vgg16-397923af.pth`` lies in. None: the ImageNet weights from torch's cache,
                downloaded (528 MB) if they are not there.

        Raises:
            ImportError: the lpips package is missing.
            ValueError: the weights cannot be had, or are not those of a VGG-16.
        """
        return cls(
            lpips_network(
                "vgg",
                weights,
                "by loss.perceptual_weights, or set loss.perceptual_weight: 0 to train without the "
                "perceptual loss",
            )
        )

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return LPIPS, the mean over the batch, in float32 even under autocast.

        Args:
            prediction, target: (B, 3, H, W) in [-1, 1], at least 16 pixels a side.

        Raises:
            ValueError: shapes differ, or the images have other channels or are too small.
        """
        _check_same_shape(prediction=prediction, target=target)
        _check_perceptible(prediction)
        dtype = next(self.network.parameters()).dtype
        with torch.autocast(prediction.device.type, enabled=False):
            return self.network(prediction.to(dtype), target.to(dtype)).mean()


class VGGFeatureLoss(nn.Module):
    """How different two photographs look to the last convolutions of VGG-19, a scalar.

    ``mean((phi(prediction) - phi(target))^2)`` with phi the features after relu5_4 of images
    normalised as those of ImageNet. Everything in it is frozen, and it stays in eval mode.

    Args:
        layers: of VGG-19 up to relu5_4. :meth:`from_backbone` makes them.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(IMAGENET_DEVIATION).view(1, 3, 1, 1))
        self.train()

    @classmethod
    def from_backbone(cls, weights: str | None = None) -> VGGFeatureLoss:
        """Return the loss in float32 on the CPU. No random number is drawn.

        Args:
            weights: file of VGG-19 in torchvision's naming (``features.0.weight``, ...), ``.pth``
                or ``.safetensors``, whose classifier may be absent, or the folder that
                ``vgg19-dcbb9e9d.pth`` lies in. None: the ImageNet weights from torch's cache,
                downloaded (548 MB) if they are not there.

        Raises:
            ValueError: the weights cannot be had, or are not those of a VGG-19.
        """
        return cls(
            vgg19_features(
                weights,
                "by loss.perceptual_weights, or set loss.perceptual_weight: 0 to train without the "
                "perceptual loss",
            )
        )

    def train(self, mode: bool = True) -> VGGFeatureLoss:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean over all features of the batch, in float32 even under autocast.

        Args:
            prediction, target: (B, 3, H, W) **in [0, 1]**, at least 16 pixels a side.

        Raises:
            ValueError: shapes differ, or the images have other channels or are too small.
        """
        _check_same_shape(prediction=prediction, target=target)
        _check_perceptible(prediction)
        with torch.autocast(prediction.device.type, enabled=False):
            seen, wanted = (
                self.layers((image.float() - self.mean) / self.deviation)
                for image in (prediction, target)
            )
        return (seen - wanted).square().mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, real_label: float = 0.8) -> Tensor:
    """Return how badly a discriminator tells photographs from renderings, a scalar.

    With x its logits, s the logistic function and t the real label::

        -mean(t log s(x_real) + (1 - t) log(1 - s(x_real))) - mean(log(1 - s(x_fake)))

    The default label of 0.8 is that of the published training script, which adds up the images of
    a batch where this takes their mean: its value is B times this one. A label of 1 gives Equation
    11 of the BokehDiff paper.

    Args:
        real_logits: of photographs with lens blur, (B, h, w) or any other shape.
        fake_logits: of renderings, detached from what rendered them.
        real_label: what the discriminator shall call a photograph, in (0, 1]. Less than 1 keeps it
            from being certain.

    Raises:
        ValueError: `real_label` is out of range.
    """
    fake = F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))
    return generator_loss(real_logits, real_label) + fake


def generator_loss(fake_logits: Tensor, real_label: float = 0.8) -> Tensor:
    """Return how far renderings are from passing for photographs, a scalar.

    With x the logits of the discriminator, s the logistic function and t the real label::

        -mean(t log s(x) + (1 - t) log(1 - s(x)))

    The label is the one the discriminator learns from, so that nothing is gained by looking more
    certain than a photograph. The published training script adds up the images of a batch where
    this takes their mean: its value is B times this one. A label of 1 gives Equation 12 of the
    BokehDiff paper.

    Args:
        fake_logits: of renderings, (B, h, w) or any other shape.
        real_label: what the discriminator calls a photograph, in (0, 1].

    Raises:
        ValueError: `real_label` is out of range.
    """
    if not 0 < real_label <= 1:
        raise ValueError(
            f"The label of photographs is a probability in (0, 1], got real_label={real_label}. "
            "Use 0.8 for the published script or 1 for the paper."
        )
    return F.binary_cross_entropy_with_logits(fake_logits, torch.full_like(fake_logits, real_label))


def hinge_discriminator_loss(
    real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor]
) -> Tensor:
    """Return how badly discriminators tell photographs from renderings, a scalar.

    The mean over the discriminators of ``mean(ReLU(1 - x_real)) + mean(ReLU(1 + x_fake))``.

    Args:
        real_logits: of photographs, of each discriminator.
        fake_logits: of renderings, detached from what rendered them.
    """
    each = [
        F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        for real, fake in zip(real_logits, fake_logits, strict=True)
    ]
    return torch.stack(each).mean()


def hinge_generator_loss(fake_logits: Sequence[Tensor]) -> Tensor:
    """Return how far renderings are from passing for photographs, a scalar: the mean over the
    discriminators of ``-mean(x_fake)``.

    Args:
        fake_logits: of renderings, of each discriminator.
    """
    return -torch.stack([fake.mean() for fake in fake_logits]).mean()


def _forward_differences(image: Tensor) -> tuple[Tensor, Tensor]:
    """(vertical (B, C, H-1, W), horizontal (B, C, H, W-1)) differences of neighbouring pixels."""
    return image[..., 1:, :] - image[..., :-1, :], image[..., :, 1:] - image[..., :, :-1]


def _sobel_differences(image: Tensor, half_width: int) -> tuple[Tensor, Tensor]:
    """(vertical, horizontal) extended Sobel derivatives, each (B, C, H - 2 n, W - 2 n)."""
    kernel = extended_sobel_kernel(half_width).to(image)
    pair = torch.stack([kernel.T, kernel])[:, None]
    channels = image.shape[1]
    derivatives = F.conv2d(image, pair.repeat(channels, 1, 1, 1), groups=channels)
    return derivatives[:, 0::2], derivatives[:, 1::2]


def _check_perceptible(image: Tensor) -> None:
    _, channels, height, width = image.shape
    if channels != 3 or min(height, width) < SMALLEST_PERCEPTUAL_SIDE:
        raise ValueError(
            f"The perceptual loss needs images of 3 channels and at least "
            f"{SMALLEST_PERCEPTUAL_SIDE} pixels a side, got {channels} channels of {height} x "
            f"{width}. Use larger crops, or set loss.perceptual_weight: 0."
        )


def _check_window(image: Tensor) -> None:
    if min(image.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs images of at least {SSIM_WINDOW} pixels a side, got "
            f"{image.shape[-2]} x {image.shape[-1]}. Use larger crops, or set "
            "loss.ssim_weight: 0."
        )


def _check_weight(image: Tensor, weight: Tensor) -> None:
    wanted = (image.shape[0], 1, *image.shape[-2:])
    if tuple(weight.shape) != wanted:
        raise ValueError(
            f"The weight of images {tuple(image.shape)} must have the shape {wanted}, got "
            f"{tuple(weight.shape)}."
        )


def _check_same_shape(**images: Tensor) -> None:
    shapes = {name: tuple(image.shape) for name, image in images.items()}
    if len(set(shapes.values())) != 1 or any(len(shape) != 4 for shape in shapes.values()):
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"A loss compares images of one shape (B, 3, H, W), got {listed}.")

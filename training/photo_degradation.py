"""Photographs made worse in the ways of a camera, for a network that learns to undo it."""

from __future__ import annotations

import io
import math

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from bokehdiff.rendering.aperture import Aperture
from training.samples import draw

CLEAN_SHARE = 0.1
"""Share of the photographs that are left as they are: they have to stay so."""
CHANGED_SHARE = 0.8
"""Share of the others in which each change but that by JPEG is made."""
JPEG_SHARE = 0.3
GAUSSIAN_DEVIATIONS_PX = (0.3, 1.5)
DISC_RADII_PX = (0.5, 2.0)
CONTRASTS = (0.8, 1.0)
GAINS = (0.95, 1.02)
LARGEST_NOISE = 5 / 255
LARGEST_SHOT_NOISE = 0.005
"""Of noise whose variance is that number times the value."""
JPEG_QUALITIES = (70, 95)
SMALLEST_SIDE = 8
"""Pixels a side that the widest blur needs."""


def degraded(picture: Tensor, generator: torch.Generator, noise: float = 1.0) -> Tensor:
    """Return `picture` a little blurred, faded, noisy and compressed, (3, H, W) in [0, 1].

    A tenth is left as it is. Of the others each is changed by

    1. blur, by a Gaussian of standard deviation 0.3 to 1.5 px or, as often, a disc of radius 0.5 to
       2 px,
    2. contrast, ``mu + c (x - mu)`` with the picture's mean mu and c from 0.8 to 1,
    3. brightness, times 0.95 to 1.02,
    4. noise, Gaussian of standard deviation up to 5/255, and Poisson ``s P(x / s)`` with s up to
       0.005, both of `noise` times the standard deviation,
    5. JPEG of a quality from 70 to 95,

    in this order, each with probability 0.8, and JPEG 0.3. Numbers are uniform in their ranges.
    All of it happens to display-encoded values.

    Args:
        picture: (3, H, W) display-encoded sRGB in [0, 1], at least 8 px a side.
        generator: all that is drawn comes from it, so that the same state gives the same picture.
        noise: how much of the noise there is; 0 is none. The other changes are the same.

    Raises:
        ValueError: the picture is of another shape, or smaller.
    """
    if picture.ndim != 3 or picture.shape[0] != 3 or min(picture.shape[-2:]) < SMALLEST_SIDE:
        raise ValueError(
            f"The picture is of shape {tuple(picture.shape)}; wanted (3, H, W), at least "
            f"{SMALLEST_SIDE} pixels a side."
        )
    if _uniform(0, 1, generator) < CLEAN_SHARE:
        return picture
    blurs, fades, brightens, adds_noise = (
        _uniform(0, 1, generator) < CHANGED_SHARE for _ in range(4)
    )
    compresses = _uniform(0, 1, generator) < JPEG_SHARE
    if blurs:
        picture = _filtered(picture, _blur_kernel(generator))
    if fades:
        mean = picture.mean()
        picture = mean + _uniform(*CONTRASTS, generator) * (picture - mean)
    if brightens:
        picture = picture * _uniform(*GAINS, generator)
    if adds_noise:
        picture = picture + noise * (_with_noise(picture, generator) - picture)
    picture = picture.clamp(0, 1)
    if compresses:
        low, high = JPEG_QUALITIES
        picture = _compressed(picture, low + draw(high - low + 1, generator))
    return picture


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    """A number in [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def _blur_kernel(generator: torch.Generator) -> Tensor:
    """(2 R + 1, 2 R + 1) of sum 1."""
    if draw(2, generator):
        return Aperture().kernel(_uniform(*DISC_RADII_PX, generator))
    deviation = _uniform(*GAUSSIAN_DEVIATIONS_PX, generator)
    offsets = torch.arange(-math.ceil(3 * deviation), math.ceil(3 * deviation) + 1)
    along = torch.exp(-0.5 * (offsets / deviation) ** 2)
    kernel = along[:, None] * along
    return kernel / kernel.sum()


def _filtered(picture: Tensor, kernel: Tensor) -> Tensor:
    """The picture, mirrored at its borders, under a kernel that is symmetric."""
    reach = len(kernel) // 2
    padded = F.pad(picture[:, None], (reach,) * 4, mode="reflect")
    return F.conv2d(padded, kernel[None, None])[:, 0]


def _with_noise(picture: Tensor, generator: torch.Generator) -> Tensor:
    # Not zero, by which the values are divided.
    scale = LARGEST_SHOT_NOISE * (1 - _uniform(0, 1, generator))
    picture = scale * torch.poisson(picture.clamp_min(0) / scale, generator=generator)
    noise = torch.randn(picture.shape, generator=generator)
    return picture + _uniform(0, LARGEST_NOISE, generator) * noise


def _compressed(picture: Tensor, quality: int) -> Tensor:
    """What a JPEG file of the picture holds, colours at half resolution."""
    pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    with io.BytesIO() as file:
        PIL.Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        with PIL.Image.open(file) as stored:
            values = np.array(stored, np.float32)
    return torch.from_numpy(values).permute(2, 0, 1) / 255

"""How much a picture was blurred, measured from the pictures alone: before and after."""

from __future__ import annotations

import numpy as np

from bokehdiff.srgb import srgb_to_linear
from evaluation.regions import SMALLEST_REGION_PX

__all__ = ["measured_blur"]

LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
# The valley of the error around the true radius is about as wide as the radius: steps by a fifth
# do not miss it, and half a pixel is where a disc begins to reach the next pixel. Patterns that
# repeat, and whose contrast a growing disc turns around, make more valleys: all are looked at.
FIRST_STEP_PX = 0.5
STEP_FACTOR = 1.2
# In pixels: differences below it do not show in 8 bits.
RADIUS_TOLERANCE_PX = 0.01


def measured_blur(
    photo: np.ndarray, rendered: np.ndarray, mask: np.ndarray, largest_radius: float = 64.0
) -> float:
    """The radius in pixels of the disc that best explains `rendered` as a blurred `photo`.

    With p and q the luminances of both in linear light and D_r the uniform disc of radius r::

        argmin over r in [0, largest_radius] of sum over mask of (q - D_r * p)^2

    The convolution is made for any real r in the spectrum, where the disc is 2 J1(x) / x at
    x = 2 pi r f. Blur of another shape gives the radius of the disc most like it: a Gaussian, about
    0.9 of the root of twice its second moment. The mask should hold texture of one circle of
    confusion, and not what that circle carries across depth edges or from highlights that are cut
    off at white.

    Args:
        photo, rendered: (H, W, 3) display-encoded sRGB, float in [0, 1] or uint8.
        mask: (H, W) bool, at least 200 pixels.
        largest_radius: where the search ends.

    Raises:
        ValueError: shapes differ, the mask is too small, or what it holds has no texture.
    """
    from scipy.fft import irfft2, next_fast_len, rfft2
    from scipy.optimize import minimize_scalar

    _check(photo, rendered, mask, largest_radius)
    photo, rendered = _as_float(photo, "photo"), _as_float(rendered, "rendered picture")
    if np.ptp(photo[mask], axis=0).max() <= 1 / 255:
        raise ValueError(
            "The mask holds no texture in the photo whose loss could be measured; wanted a region "
            "with detail."
        )
    margin = int(np.ceil(largest_radius)) + 1
    rows, columns = (
        slice(max(at.min() - margin, 0), min(at.max() + 1 + margin, size))
        for at, size in zip(np.nonzero(mask), mask.shape, strict=True)
    )
    mask = mask[rows, columns]
    before = srgb_to_linear(photo[rows, columns]) @ LUMINANCE
    wanted = srgb_to_linear(rendered[rows, columns][mask]) @ LUMINANCE

    # Mirrored, so that nothing dark comes in from beyond the frame or around the other side.
    before = np.pad(before, margin, mode="symmetric")
    shape = [next_fast_len(side, real=True) for side in before.shape]
    spectrum = rfft2(before, shape)
    frequency = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1]))

    def error(radius: float) -> float:
        blurred = irfft2(spectrum * _disc_spectrum(radius * frequency), shape)
        inside = blurred[margin : margin + mask.shape[0], margin : margin + mask.shape[1]]
        return float(((inside[mask] - wanted) ** 2).mean())

    radii = [0.0, FIRST_STEP_PX]
    while radii[-1] < largest_radius:
        radii.append(min(radii[-1] * STEP_FACTOR, largest_radius))
    errors = [error(radius) for radius in radii]
    found = [(errors[0], radii[0]), (errors[-1], radii[-1])]
    walled = [np.inf, *errors, np.inf]
    for index, value in enumerate(errors):
        if value <= min(walled[index], walled[index + 2]):
            bottom = minimize_scalar(
                error,
                bounds=(radii[max(index - 1, 0)], radii[min(index + 1, len(radii) - 1)]),
                method="bounded",
                options={"xatol": RADIUS_TOLERANCE_PX},
            )
            found.append((float(bottom.fun), float(bottom.x)))
    return min(found)[1]


def _disc_spectrum(radius_times_frequency: np.ndarray) -> np.ndarray:
    """Fourier transform of the uniform disc of unit sum, of radius times cycles per pixel."""
    from scipy.special import j1

    x = 2 * np.pi * radius_times_frequency
    return np.divide(2 * j1(x), x, out=np.ones_like(x), where=x > 0)


def _as_float(image: np.ndarray, name: str) -> np.ndarray:
    """float64 in [0, 1]."""
    if image.dtype == np.uint8:
        return image / 255.0
    if image.dtype.kind != "f" or not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(
            f"The {name} is {image.dtype} from {image.min():g} to {image.max():g}; wanted "
            "display-encoded sRGB, float in [0, 1] or uint8."
        )
    return image.astype(np.float64)


def _check(
    photo: np.ndarray, rendered: np.ndarray, mask: np.ndarray, largest_radius: float
) -> None:
    if photo.shape != rendered.shape or photo.ndim != 3 or photo.shape[2:] != (3,):
        raise ValueError(
            f"The photo has shape {photo.shape}, what was rendered {rendered.shape}; wanted the "
            "same, (height, width, 3)."
        )
    if mask.shape != photo.shape[:2] or mask.dtype != bool:
        raise ValueError(
            f"The mask is {mask.dtype} of shape {mask.shape}; wanted bool of {photo.shape[:2]}."
        )
    if mask.sum() < SMALLEST_REGION_PX:
        raise ValueError(
            f"The mask holds {mask.sum()} pixels; wanted at least {SMALLEST_REGION_PX}, to measure "
            "their blur."
        )
    if not 0 < largest_radius < np.inf:
        raise ValueError(f"largest_radius must be above 0 px, got {largest_radius}.")

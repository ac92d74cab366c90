"""Depth as pictures: gray of 16 bits in a stated unit, and colours to look at.

A picture of 16 bits holds whole levels, ``value = level * unit``. 0 stands for unknown, 65535 for
65535 units and more (infinity too). The unit is the finest of a few in which 99 % of the known
pixels fit, so that a little sky does not cost the rest its precision. It is in the ``info`` of the
Pillow picture under :data:`UNIT_KEY`, for instance ``"0.001 m"``; :func:`encode_picture_with_unit`
writes it into the PNG as text under the same key.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, PngImagePlugin

__all__ = [
    "UNIT_KEY",
    "colour_picture",
    "confidence_picture",
    "depth_picture",
    "disparity_picture",
    "encode_picture_with_unit",
]

UNIT_KEY = "unit"

DEPTH_UNITS_M = (0.001, 0.01, 0.1, 1.0)
DISPARITY_UNITS_PER_M = (0.0001, 0.001, 0.01, 0.1)
CONFIDENCE_UNIT = 1 / 65535
LARGEST_LEVEL = 65535
SHARE_THAT_FITS = 0.99

# Shares of the known pixels that are darkest and brightest.
SATURATED_SHARE = 0.02
UNKNOWN_COLOUR = (128, 128, 128)
# Far to near, evenly spaced. Their lightness rises steadily, so that nearer is brighter also in
# gray, and to people who tell few colours apart.
COLOURS = np.array(
    [
        (10, 8, 40),
        (45, 25, 110),
        (105, 30, 140),
        (170, 45, 125),
        (225, 80, 90),
        (250, 140, 60),
        (253, 200, 90),
        (252, 252, 200),
    ],
    dtype=np.float64,
)


def depth_picture(depth: torch.Tensor | np.ndarray) -> Image.Image:
    """Returns a gray picture of 16 bits of (H, W) depth in metres; NaN is unknown.

    The unit is a millimetre, which reaches 65 m; or 0.01, 0.1 or 1 m where more than a hundredth of
    the known pixels lie beyond.

    Raises:
        ValueError: another shape, or a negative depth.
    """
    return _in_sixteen_bits(depth, DEPTH_UNITS_M, "m")


def disparity_picture(disparity: torch.Tensor | np.ndarray) -> Image.Image:
    """Returns a gray picture of 16 bits of (H, W) disparity in 1/metres; NaN is unknown.

    The unit is 0.0001 1/m, which reaches 6.5 1/m (15 cm); or 0.001, 0.01 or 0.1 1/m where more than
    a hundredth of the known pixels lie nearer. 0 is unknown, or infinitely far.

    Raises:
        ValueError: another shape, or a negative disparity.
    """
    return _in_sixteen_bits(disparity, DISPARITY_UNITS_PER_M, "1/m")


def confidence_picture(confidence: torch.Tensor | np.ndarray) -> Image.Image:
    """Returns a gray picture of 16 bits of (H, W) confidence in [0, 1]; white is 1.

    Raises:
        ValueError: another shape, or a negative confidence.
    """
    return _in_sixteen_bits(confidence, (CONFIDENCE_UNIT,), "of 1")


def encode_picture_with_unit(picture: Image.Image) -> bytes:
    """Returns the bytes of a PNG file of a picture, with its unit as text."""
    text = PngImagePlugin.PngInfo()
    text.add_text(UNIT_KEY, picture.info[UNIT_KEY])
    encoded = io.BytesIO()
    picture.save(encoded, format="PNG", pnginfo=text)
    return encoded.getvalue()


def colour_picture(disparity: torch.Tensor | np.ndarray) -> Image.Image:
    """Returns a colour picture of (H, W) disparity: near is light yellow, far is dark blue.

    Disparity is stretched linearly between its 2nd and 98th percentile; what is not known (NaN) is
    gray.

    Raises:
        ValueError: another shape.
    """
    values = _map(disparity)
    known = np.isfinite(values)
    low, high = 0.0, 0.0
    if known.any():
        low, high = np.quantile(values[known], (SATURATED_SHARE, 1 - SATURATED_SHARE))
    place = (np.where(known, values, low) - low) / (high - low if high > low else 1)
    place = place.clip(0, 1) * (len(COLOURS) - 1)
    anchors = np.arange(len(COLOURS))
    colours = np.stack([np.interp(place, anchors, channel) for channel in COLOURS.T], axis=-1)
    colours[~known] = UNKNOWN_COLOUR
    return Image.fromarray(colours.round().astype(np.uint8))


def _in_sixteen_bits(
    values: torch.Tensor | np.ndarray, units: tuple[float, ...], name: str
) -> Image.Image:
    numbers = _map(values)
    known = ~np.isnan(numbers)
    if (numbers[known] < 0).any():
        raise ValueError(
            f"The smallest value is {numbers[known].min():.4g}; wanted none below 0, and NaN for "
            "unknown."
        )
    fits = [
        unit
        for unit in units
        if (numbers[known] > LARGEST_LEVEL * unit).sum() <= (1 - SHARE_THAT_FITS) * known.sum()
    ]
    unit = fits[0] if fits else units[-1]
    levels = np.where(known, numbers, 0) / unit
    picture = Image.fromarray(levels.clip(0, LARGEST_LEVEL).round().astype(np.uint16))
    picture.info[UNIT_KEY] = f"{unit:.10g} {name}"
    return picture


def _map(values: torch.Tensor | np.ndarray) -> np.ndarray:
    """(H, W) float64."""
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"The map has shape {tuple(array.shape)}; wanted (H, W).")
    return np.asarray(array, dtype=np.float64)

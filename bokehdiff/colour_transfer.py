"""Colour transfer in LAB: the colours of one picture brought to the statistics of another.

CIE LAB (D65) is written in 8 bits per channel, as OpenCV's ``COLOR_RGB2LAB`` and ``COLOR_LAB2RGB``
do and as the authors of BokehDepth use it: L from 0 to 100 fills 0 to 255, a and b are shifted by
128. Both ways go through fixed-point numbers of OpenCV's numbers of bits, and every one of the 2^24
colours comes out as there; a float conversion that is rounded at the end differs by one in one
value out of ten, which in dark saturated blue is up to 20 levels of sRGB.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import numpy as np

from .srgb import linear_to_srgb, srgb_to_linear

ColourTransfer = Literal["lab", "lab_mean"]
COLOUR_TRANSFERS: tuple[ColourTransfer, ...] = ("lab", "lab_mean")
"""``"lab"`` matches mean and deviation of each LAB channel, ``"lab_mean"`` only the mean."""

# Linear RGB of sRGB primaries to XYZ, and the white of D65.
RGB_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193,
              0.950227))  # fmt: skip
WHITE = (0.950456, 1.0, 1.088754)

# A channel that does not vary cannot be stretched.
SMALLEST_DEVIATION = 1e-6

LIGHT_STEPS = 8 * 255  # linear light, encoding
MATRIX_BITS = 12
ROOT_BITS = 15  # cube roots, encoding
BASE = 1 << 14  # one, decoding
DISPLAY_STEPS = 1 << 12  # linear light, decoding


def transfer_colours(
    image: np.ndarray, reference: np.ndarray, statistics: ColourTransfer = "lab"
) -> np.ndarray:
    """Returns `image` with the LAB statistics of `reference`, uint8, of the shape of `image`.

    In each channel of 8-bit LAB, with means m and deviations s over all pixels:
    ``(x - m_image) * s_reference / s_image + m_reference``, cut off to [0, 255] and rounded down. A
    channel of `image` that is constant keeps its deviation of 0.

    Args:
        image, reference: (H, W, 3) uint8, display-encoded sRGB; their sizes may differ.
        statistics: ``"lab"``, or ``"lab_mean"`` to leave the factor out.

    Raises:
        ValueError: another shape or type, or unknown statistics.
    """
    if statistics not in COLOUR_TRANSFERS:
        raise ValueError(
            f"The statistics to transfer are {statistics!r}; wanted one of {COLOUR_TRANSFERS}."
        )
    given = rgb_to_lab(image).astype(np.float64)
    wanted = rgb_to_lab(reference).astype(np.float64)
    over_pixels = (0, 1)
    centred = given - given.mean(over_pixels)
    if statistics == "lab":
        deviation = given.std(over_pixels)
        varies = deviation > SMALLEST_DEVIATION
        stretch = wanted.std(over_pixels) / np.where(varies, deviation, 1)
        centred = centred * np.where(varies, stretch, 1)
    moved = centred + wanted.mean(over_pixels)
    return lab_to_rgb(np.clip(moved, 0, 255).astype(np.uint8))


def rgb_to_lab(image: np.ndarray) -> np.ndarray:
    """Returns 8-bit LAB, (H, W, 3) uint8, from display-encoded sRGB, (H, W, 3) uint8.

    Raises:
        ValueError: another shape or type.
    """
    _check_eight_bits(image)
    tables = _encoding_tables()
    xyz = _shifted(tables.light[image] @ tables.matrix.T, MATRIX_BITS)
    x, y, z = np.moveaxis(tables.root[xyz], -1, 0)
    one = 1 << ROOT_BITS
    # L = 116 f(Y) - 16 of 100 parts; 116 * 255 / 100 and 16 * 255 / 100 in whole numbers.
    lightness = _shifted(296 * y - (16 * 255 * one + 50) // 100, ROOT_BITS)
    green_red = _shifted(500 * (x - y) + 128 * one, ROOT_BITS)
    blue_yellow = _shifted(200 * (y - z) + 128 * one, ROOT_BITS)
    return np.stack([lightness, green_red, blue_yellow], -1).clip(0, 255).astype(np.uint8)


def lab_to_rgb(lab: np.ndarray) -> np.ndarray:
    """Returns display-encoded sRGB, (H, W, 3) uint8, from 8-bit LAB, (H, W, 3) uint8.

    Colours that no display shows are cut off channel by channel in linear light.

    Raises:
        ValueError: another shape or type.
    """
    _check_eight_bits(lab)
    tables = _decoding_tables()
    lightness, green_red, blue_yellow = np.moveaxis(lab.astype(np.int64), -1, 0)
    root = tables.root[lightness]
    # a * BASE / 500 by a factor of 13 bits, as OpenCV divides.
    x = _cubed(root + (green_red * 268435 + 128 >> 13) - 128 * BASE // 500)
    z = _cubed(root - blue_yellow * BASE // 200 + 128 * BASE // 200 - 1)
    xyz = np.stack([x, tables.luminance[lightness], z], -1)
    # The matrix times the white, with MATRIX_BITS, and BASE, which is 4 times DISPLAY_STEPS.
    light = _shifted(xyz @ tables.matrix.T, MATRIX_BITS + 2)
    displayed: np.ndarray = tables.display[light.clip(0, DISPLAY_STEPS - 1)]
    return displayed


class _EncodingTables(NamedTuple):
    light: np.ndarray  # (256,) linear light in LIGHT_STEPS of a display-encoded value
    matrix: np.ndarray  # (3, 3) linear RGB to XYZ over white
    root: np.ndarray  # f of LAB with ROOT_BITS, of XYZ over white in LIGHT_STEPS


class _DecodingTables(NamedTuple):
    root: np.ndarray  # (256,) f(Y), 1 being BASE
    luminance: np.ndarray  # (256,) Y, 1 being BASE
    matrix: np.ndarray  # (3, 3) XYZ over white to linear RGB
    display: np.ndarray  # (DISPLAY_STEPS,) uint8 of linear light


@functools.cache
def _encoding_tables() -> _EncodingTables:
    light = LIGHT_STEPS * srgb_to_linear(np.arange(256) / 255)
    matrix = np.array(RGB_TO_XYZ) / np.array(WHITE)[:, None] * (1 << MATRIX_BITS)
    # The matrix in whole numbers may lead a little beyond white. In float32, in which a few of the
    # roots round to the other side.
    xyz = np.arange(LIGHT_STEPS * 3 // 2, dtype=np.float32) / np.float32(LIGHT_STEPS)
    straight = xyz * np.float32(841 / 108) + np.float32(16 / 116)
    root = np.where(xyz < 0.008856, straight, np.cbrt(xyz)) * np.float32(1 << ROOT_BITS)
    return _EncodingTables(_whole(light), _whole(matrix), _whole(root))


@functools.cache
def _decoding_tables() -> _DecodingTables:
    lightness = np.arange(256) * 100 / 255
    straight = lightness < 8  # (29 / 3)^3 (6 / 29)^3
    luminance = lightness * (3 / 29) ** 3
    root = np.where(straight, luminance * 841 / 108 + 16 / 116, (lightness + 16) / 116)
    luminance = np.where(straight, luminance, root**3)
    matrix = np.linalg.inv(np.array(RGB_TO_XYZ)) * np.array(WHITE) * (1 << MATRIX_BITS)
    display = 255 * linear_to_srgb(np.arange(DISPLAY_STEPS) / DISPLAY_STEPS)
    return _DecodingTables(
        _whole(BASE * root), _whole(BASE * luminance), _whole(matrix), _whole(display, np.uint8)
    )


def _whole(values: np.ndarray, dtype: type = np.int64) -> np.ndarray:
    return np.rint(values).astype(dtype)


def _shifted(values: np.ndarray, bits: int) -> np.ndarray:
    """Divided by 2^bits, rounded to nearest."""
    return (values + (1 << (bits - 1))) >> bits


def _cubed(root: np.ndarray) -> np.ndarray:
    """X or Z over white from its f of LAB; 1 is BASE."""
    straight = np.trunc(root * 108 / 841).astype(np.int64) - 16 * BASE // 116 * 108 // 841
    return np.where(root <= 6 * BASE // 29 + 1, straight, root * root // BASE * root // BASE)


def _check_eight_bits(image: np.ndarray) -> None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3:
        kind = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image)
        raise ValueError(f"The picture is {kind}; wanted a uint8 array (H, W, 3).")
    if image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"The picture has shape {image.shape}; wanted (H, W, 3) with pixels.")

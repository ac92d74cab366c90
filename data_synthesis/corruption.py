"""Disparity maps as estimators make them: the true map with typical mistakes, seeded.

A disparity map is (H, W) float32 in [0, 1], larger is nearer. Every named corruption can be used
alone; :func:`corrupt_disparity` draws several. What the mistakes do to the plane in focus is said
there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from scipy import ndimage

__all__ = [
    "CorruptedDisparity",
    "CorruptionSettings",
    "blurred",
    "corrupt_disparity",
    "drifted",
    "elliptical_element",
    "eroded",
    "leaked",
    "misaligned",
    "quantised",
    "without_thin_structures",
]

# Rec. 709 luma, for the picture that edges leak from.
LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)
# What has a smaller circle of confusion counts as in focus.
IN_FOCUS_RADIUS_PX = 0.5
# The least part of [0, 1] that a rescaled map covers.
SMALLEST_RANGE = 0.3


def elliptical_element(reach: int) -> np.ndarray:
    """(2 reach + 1, 2 reach + 1) bool: the filled ellipse of OpenCV's morphology.

    Row y holds the columns ``|x| <= round(sqrt(reach^2 - y^2))``: a little fuller than the disc
    ``x^2 + y^2 <= reach^2``.
    """
    offsets = np.arange(-reach, reach + 1)
    half_width = np.rint(np.sqrt(reach**2 - offsets**2))
    return np.abs(offsets)[None, :] <= half_width[:, None]


def eroded(disparity: np.ndarray, pixels: int) -> np.ndarray:
    """Near things shrunk (``pixels`` > 0: erosion) or grown (< 0: dilation), same shape.

    Minimum (maximum) over :func:`elliptical_element` of side ``2 |pixels| + 1``: the signs and the
    element of the robustness test in the BokehDiff paper.
    """
    if pixels == 0:
        return disparity.copy()
    grey = ndimage.grey_erosion if pixels > 0 else ndimage.grey_dilation
    return grey(disparity, footprint=elliptical_element(abs(int(pixels))), mode="nearest")


def blurred(disparity: np.ndarray, sigma: float) -> np.ndarray:
    """Edges washed out: a Gaussian of ``sigma`` pixels."""
    return ndimage.gaussian_filter(disparity, sigma, mode="nearest")


def quantised(disparity: np.ndarray, levels: int) -> np.ndarray:
    """Rounded to ``levels`` evenly spaced values from 0 to 1; 256 is what an 8-bit file holds."""
    steps = np.float32(levels - 1)
    return np.rint(disparity * steps) / steps


def drifted(disparity: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A smooth error added: walls that bend, a ground that tilts.

    A random field of three to six waves across the picture, scaled so that its largest value is
    ``strength`` times the range of the disparity.
    """
    cells = int(rng.integers(3, 7))
    coarse = rng.standard_normal((cells, cells)).astype(np.float32)
    rows = np.linspace(0, cells - 1, disparity.shape[0])
    columns = np.linspace(0, cells - 1, disparity.shape[1])
    field = ndimage.map_coordinates(
        coarse, np.meshgrid(rows, columns, indexing="ij"), order=3, mode="nearest"
    )
    field *= strength * np.ptp(disparity) / max(float(np.abs(field).max()), 1e-6)
    return np.clip(disparity + field, 0, 1)


def leaked(
    disparity: np.ndarray, image: np.ndarray, radius: int, smoothness: float = 1e-3
) -> np.ndarray:
    """Disparity that follows the edges of the picture, texture included, as estimators' maps do.

    Guided filter (He et al. 2010) with the luma of ``image`` (H, W, 3), sRGB in [0, 1], as the
    guide: in every window of ``2 radius + 1`` pixels the disparity is replaced by the straight
    line of luma that fits it best, ``smoothness`` being the variance of luma that counts as flat.
    """
    guide = image.astype(np.float32) @ LUMA

    def mean(values: np.ndarray) -> np.ndarray:
        return ndimage.uniform_filter(values, 2 * radius + 1, mode="nearest")

    guide_mean, disparity_mean = mean(guide), mean(disparity)
    covariance = mean(guide * disparity) - guide_mean * disparity_mean
    variance = mean(guide * guide) - guide_mean**2
    slope = covariance / (variance + np.float32(smoothness))
    fitted = mean(slope) * guide + mean(disparity_mean - slope * guide_mean)
    return np.clip(fitted, disparity.min(), disparity.max())


def without_thin_structures(disparity: np.ndarray, pixels: int) -> np.ndarray:
    """Near things narrower than ``2 pixels + 1`` missing: a grey opening (hair, twigs, wires)."""
    return eroded(eroded(disparity, pixels), -pixels)


def misaligned(disparity: np.ndarray, right: float, down: float) -> np.ndarray:
    """The map moved over the picture by that many pixels, linearly between pixels."""
    return ndimage.shift(disparity, (down, right), order=1, mode="nearest")


@dataclass(frozen=True)
class CorruptionSettings:
    """How often each mistake is made; the strengths are those of typical estimators.

    Each field is a probability in [0, 1], drawn for itself, so a map may get several mistakes or
    (with the defaults, one in eleven) none. They are made in the order given here. Strengths in
    pixels hold for pictures of about 512 pixels a side and are scaled with the shorter one.

    Attributes:
        misaligned: by up to 2 px along each axis.
        thin: structures up to 3, 5 or 7 px wide missing.
        eroded: by 1 to 4 px, grown as often as shrunk.
        leaked: edges of the picture within 4 to 12 px.
        drifted: by 1 to 6 % of the range of disparity.
        blurred: sigma 0.5 to 4 px.
        quantised: to 256 (half of the time), 64 or 32 levels.
        rescaled: the range of the map laid over another part of [0, 1], at least 0.3 wide.
    """

    misaligned: float = 0.2
    thin: float = 0.25
    eroded: float = 0.35
    leaked: float = 0.25
    drifted: float = 0.2
    blurred: float = 0.35
    quantised: float = 0.25
    rescaled: float = 0.2

    def __post_init__(self) -> None:
        for field in fields(self):
            chance = getattr(self, field.name)
            if not 0 <= chance <= 1:
                raise ValueError(f"{field.name} is {chance!r}; wanted a probability from 0 to 1.")


class CorruptedDisparity(NamedTuple):
    """A map with mistakes, and the focus and strength that belong to it.

    ``disparity`` (H, W) float32 in [0, 1]; ``df`` and ``K`` as in the library; ``mistakes``: the
    name and strength of each, in the order they were made.
    """

    disparity: np.ndarray
    df: float
    K: float
    mistakes: list[tuple[str, float]]


def corrupt_disparity(
    disparity: np.ndarray,
    df: float,
    K: float,
    image: np.ndarray,
    rng: np.random.Generator,
    settings: CorruptionSettings | None = None,
) -> CorruptedDisparity:
    """The map with mistakes drawn as ``settings`` says, and the df and K to use with it.

    ``disparity`` (H, W) float32 in [0, 1], ``image`` (H, W, 3) sRGB in [0, 1], which is not
    changed. The same generator state gives the same map.

    df follows the map: someone who focuses by pointing at a thing reads its disparity off the map
    at hand. So df moves by the median change of the pixels in focus (radius below 0.5 px), and
    what was in focus stays so; where nothing is in focus, df stays. Rescaling is a change of unit
    and not a mistake: df goes with it and K is divided by the scale, so every radius is kept.
    All other mistakes leave K alone and do change radii.

    Raises ValueError when the shapes of map and image do not fit.
    """
    if disparity.ndim != 2 or image.shape != (*disparity.shape, 3):
        raise ValueError(
            f"The disparity has shape {disparity.shape}, the image {image.shape}; wanted (H, W) "
            "and (H, W, 3) of the same size."
        )
    chances = settings or CorruptionSettings()
    true = disparity.astype(np.float32, copy=False)
    changed = true
    mistakes: list[tuple[str, float]] = []
    pixel = min(disparity.shape) / 512

    def happens(name: str) -> bool:
        return rng.uniform() < getattr(chances, name)

    if happens("misaligned"):
        right, down = rng.uniform(-2, 2, 2) * pixel
        changed = misaligned(changed, right, down)
        mistakes.append(("misaligned", math.hypot(right, down)))
    if happens("thin"):
        reach = max(round(int(rng.integers(1, 4)) * pixel), 1)
        changed = without_thin_structures(changed, reach)
        mistakes.append(("thin", reach))
    if happens("eroded"):
        reach = max(round(int(rng.integers(1, 5)) * pixel), 1) * (1 if rng.uniform() < 0.5 else -1)
        changed = eroded(changed, reach)
        mistakes.append(("eroded", reach))
    if happens("leaked"):
        radius = max(round(int(rng.integers(4, 13)) * pixel), 1)
        changed = leaked(changed, image, radius)
        mistakes.append(("leaked", radius))
    if happens("drifted"):
        strength = rng.uniform(0.01, 0.06)
        changed = drifted(changed, strength, rng)
        mistakes.append(("drifted", strength))
    if happens("blurred"):
        sigma = rng.uniform(0.5, 4) * pixel
        changed = blurred(changed, sigma)
        mistakes.append(("blurred", sigma))
    if happens("quantised"):
        levels = int(rng.choice([256, 64, 32], p=[0.5, 0.3, 0.2]))
        changed = quantised(changed, levels)
        mistakes.append(("quantised", levels))
    in_focus = K * np.abs(true - df) < IN_FOCUS_RADIUS_PX
    if in_focus.any():
        df = df + float(np.median((changed - true)[in_focus]))
    if happens("rescaled"):
        lowest, highest = float(changed.min()), float(changed.max())
        width = rng.uniform(SMALLEST_RANGE, 1)
        start = rng.uniform(0, 1 - width)
        if highest > lowest:
            scale = width / (highest - lowest)
            changed = start + (changed - lowest) * np.float32(scale)
            df, K = start + (df - lowest) * scale, K / scale
            mistakes.append(("rescaled", scale))
    mistakes = [(name, float(strength)) for name, strength in mistakes]
    return CorruptedDisparity(np.clip(changed, 0, 1), float(df), float(K), mistakes)

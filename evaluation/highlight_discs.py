"""The discs that bright lights make out of focus: are they as large, and as even, as the lens's?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bokehdiff.srgb import srgb_to_linear
from evaluation.photographs import Photograph
from evaluation.regions import HIGHLIGHT_LEVEL, once_per_photograph

__all__ = ["Disc", "DiscShape", "disc_flatness", "disc_radius_error", "measurable_discs"]

# Smaller discs have too few pixels to tell their middle from their rim.
SMALLEST_RADIUS_PX = 5.0
# A source must be smaller than its disc by this factor for the disc to show a shape of its own.
SMALLEST_MAGNIFICATION = 2.0
# Light is looked for as far as this many radii away, so that a disc too large is seen as such.
REACH_IN_RADII = 1.6
# The outermost of these rings, in radii, show what is there without the disc.
GROUND_IN_RADII = 0.25
# What every ring around the centre must keep when the discs of other lights are cut out.
SMALLEST_SHARE_OF_RING = 0.2
# How far the truth itself may be from K * |disparity - df|: farther, something hides the disc.
TRUTH_TOLERANCE = 0.1
SMALLEST_TRUE_EVENNESS = 0.8
# Of the truth's light, below which what is there is texture and no disc.
SMALLEST_SHARE_OF_LIGHT = 0.1
# In linear light. From here on a disc is cut off at white and shows neither edge nor evenness.
LARGEST_PLATEAU = 0.95
MIDDLE, RIM = 0.5, (0.6, 0.85)


@dataclass(frozen=True)
class DiscShape:
    """What a picture shows around the place of a light.

    With e(j) the mean linear light of ring j (from j to j + 1 pixels around the centre) above that
    of the outermost rings, n(j) its number of pixels, q(j) the mean of their squared distances, and
    s the radius of the source itself::

        radius   = sqrt(2 sum_j n(j) e(j) q(j) / sum_j n(j) e(j) - s^2)
        evenness = min(rim / middle, middle / rim)

    the square root of twice the second moment, which for a disc is its radius; middle and rim are
    the means of e up to half the radius of the lens's disc and from 0.6 to 0.85 of it. An even disc
    has an evenness of 1, a Gaussian of the same second moment one of 0.4.
    """

    radius: float  # pixels
    evenness: float  # from 0 to 1
    light: float  # sum_j n(j) e(j)
    plateau: float  # middle, above black


@dataclass(frozen=True)
class Rings:
    """Pixels around a light; ring j holds those from j to j + 1 pixels from its centre."""

    window: tuple[slice, slice]  # rows and columns of the photograph
    index: np.ndarray  # window of int: ring of each pixel, -1 where it is not to be looked at
    sizes: np.ndarray  # (rings,): pixels of the whole ring, beyond the frame and behind others too
    squares: np.ndarray  # (rings,): mean of their squared distances from the centre

    def shares(self) -> np.ndarray:
        """(rings,): how much of each ring is looked at, from 0 to 1."""
        seen = np.bincount(self.index[self.index >= 0], minlength=len(self.sizes))
        return seen / np.maximum(self.sizes, 1)


@dataclass(frozen=True)
class Disc:
    """The disc of one light that shows in the truth of a photograph."""

    radius: float  # K * |disparity - df|, pixels
    source_radius: float  # sqrt of twice the second moment of the light itself, pixels
    channel: int  # the colour that the truth shows it in without cutting it off
    rings: Rings
    truth: DiscShape


def disc_radius_error(prediction: np.ndarray, photograph: Photograph) -> float | None:
    """Mean of ``|r_prediction - r_truth| / r_truth`` over the measurable discs; None without any.

    A disc with less than a tenth of the truth's light counts as none, with an error of 1.
    prediction: (H, W, 3) float, display-encoded sRGB in [0, 1].
    """
    errors = [
        1.0 if shape is None else abs(shape.radius - disc.truth.radius) / disc.truth.radius
        for disc, shape in _shapes(prediction, photograph)
    ]
    return float(np.mean(errors)) if errors else None


def disc_flatness(prediction: np.ndarray, photograph: Photograph) -> float | None:
    """Mean evenness of the measurable discs, from 0 to 1; None without any.

    A disc with less than a tenth of the truth's light counts as none, with an evenness of 0.
    prediction: (H, W, 3) float, display-encoded sRGB in [0, 1].
    """
    evenness = [
        0.0 if shape is None else shape.evenness for _, shape in _shapes(prediction, photograph)
    ]
    return float(np.mean(evenness)) if evenness else None


@once_per_photograph
def measurable_discs(photograph: Photograph) -> list[Disc]:
    """The discs of lights (linear light above 1.5) that the truth shows well enough to measure.

    Measurable is a disc of at least 5 px radius and twice the source's, of which the discs of other
    lights and surfaces nearer than the light leave a fifth of every ring, which the truth does not
    cut off at white, and whose shape in the truth is that of a disc: a radius within 10 % of
    ``K * |disparity - df|`` and an evenness of 0.8.
    Empty without ``photograph.light`` or ``photograph.K``. Found once for each photograph.
    """
    if photograph.light is None or photograph.K is None:
        return []
    from scipy.ndimage import find_objects, label

    light, disparity = photograph.light, photograph.disparity
    blur = photograph.K * np.abs(disparity - photograph.df)
    sources, _ = label(light.max(axis=2) > HIGHLIGHT_LEVEL, np.ones((3, 3)))
    lights = []
    for index, (rows, columns) in enumerate(find_objects(sources), start=1):
        # With the pixels around, which the light covers in part.
        box = (
            slice(max(rows.start - 1, 0), rows.stop + 1),
            slice(max(columns.start - 1, 0), columns.stop + 1),
        )
        lights.append(_light(sources[box] == index, light[box], blur[box], disparity[box], box))
    covers = np.zeros(disparity.shape, int)
    for one in lights:
        window, distance = one.around(one.reach, disparity.shape)
        covers[window] += distance <= one.reach

    truth = srgb_to_linear(photograph.truth / 255.0)
    discs = []
    for one in lights:
        largest_source = one.radius / SMALLEST_MAGNIFICATION
        if one.radius < SMALLEST_RADIUS_PX or one.source_radius > largest_source:
            continue
        rings = _rings_around(one, covers, disparity)
        if rings.shares().min() < SMALLEST_SHARE_OF_RING:
            continue
        colours = np.moveaxis(truth[rings.window], 2, 0)
        shapes = [_shape(colour, rings, one.radius, one.source_radius) for colour in colours]
        # The brightest colour that is not cut off stands out best from the texture around.
        plateaus = [shape.plateau if shape.plateau < LARGEST_PLATEAU else -1 for shape in shapes]
        channel = int(np.argmax(plateaus))
        seen = shapes[channel]
        if (
            plateaus[channel] > 0
            and seen.evenness >= SMALLEST_TRUE_EVENNESS
            and abs(seen.radius - one.radius) <= TRUTH_TOLERANCE * one.radius
        ):
            discs.append(Disc(one.radius, one.source_radius, channel, rings, seen))
    return discs


@dataclass(frozen=True)
class _Light:
    centre: tuple[float, float]
    radius: float
    source_radius: float
    reach: float  # of its disc from the centre, penumbra included
    nearest_disparity: float

    def around(
        self, distance: float, shape: tuple[int, ...]
    ) -> tuple[tuple[slice, slice], np.ndarray]:
        """The window that holds all pixels within `distance`, and how far each is."""
        (y, x), (height, width) = self.centre, shape
        rows = slice(max(int(y - distance), 0), min(int(y + distance) + 2, height))
        columns = slice(max(int(x - distance), 0), min(int(x + distance) + 2, width))
        down = np.arange(rows.start, rows.stop)[:, None] - y
        across = np.arange(columns.start, columns.stop) - x
        return (rows, columns), np.hypot(down, across)


def _light(
    source: np.ndarray,
    light: np.ndarray,
    blur: np.ndarray,
    disparity: np.ndarray,
    box: tuple[slice, slice],
) -> _Light:
    """What one light is, from the pixels of the box around it."""
    from scipy.ndimage import binary_dilation

    touched = binary_dilation(source, np.ones((3, 3)))
    rows, columns = np.nonzero(touched)
    weight = light[touched].astype(np.float64).mean(axis=1)
    weight -= weight.min()
    weight /= weight.sum()
    y, x = weight @ rows, weight @ columns
    distance = np.hypot(rows - y, columns - x)
    radius = float(np.median(blur[source]))
    return _Light(
        centre=(y + box[0].start, x + box[1].start),
        radius=radius,
        source_radius=float(np.sqrt(2 * weight @ distance**2)),
        reach=radius + float(distance.max()),
        nearest_disparity=float(disparity[source].max()),
    )


def _rings_around(light: _Light, covers: np.ndarray, disparity: np.ndarray) -> Rings:
    """covers (H, W): the number of discs that reach each pixel."""
    count = int(np.ceil(max(REACH_IN_RADII * light.radius, light.reach + 3)))
    window, distance = light.around(count, disparity.shape)
    index = distance.astype(int)
    alone = covers[window] == (distance <= light.reach)
    unhidden = disparity[window] <= light.nearest_disparity
    index[~(alone & unhidden) | (index >= count)] = -1

    offsets = np.arange(-count - 1, count + 2)
    down, across = (int(at) + offsets - at for at in light.centre)
    everywhere = np.hypot(down[:, None], across).ravel()
    ring = everywhere.astype(int)
    sizes = np.bincount(ring)[:count]
    return Rings(window, index, sizes, np.bincount(ring, everywhere**2)[:count] / sizes)


def _shapes(prediction: np.ndarray, photograph: Photograph) -> list[tuple[Disc, DiscShape | None]]:
    """Every measurable disc and what the prediction shows there, None for no disc."""
    pairs: list[tuple[Disc, DiscShape | None]] = []
    for disc in measurable_discs(photograph):
        light = srgb_to_linear(prediction[disc.rings.window][..., disc.channel])
        shape = _shape(light, disc.rings, disc.radius, disc.source_radius)
        visible = shape.light >= SMALLEST_SHARE_OF_LIGHT * disc.truth.light
        pairs.append((disc, shape if visible else None))
    return pairs


def _shape(light: np.ndarray, rings: Rings, radius: float, source_radius: float) -> DiscShape:
    """See :class:`DiscShape`; light: one colour of the window, linear."""
    looked_at = rings.index >= 0
    sums = np.bincount(rings.index[looked_at], light[looked_at])
    profile = sums / np.bincount(rings.index[looked_at])
    excess = profile - profile[-int(np.ceil(GROUND_IN_RADII * radius)) :].mean()
    amount = rings.sizes * excess
    total = float(amount.sum())
    moment = float(amount @ rings.squares) / total if total > 0 else 0.0
    share = (np.arange(len(profile)) + 0.5) / radius
    middle = float(excess[share <= MIDDLE].mean())
    rim = float(excess[(share >= RIM[0]) & (share <= RIM[1])].mean())
    return DiscShape(
        radius=max(2 * moment - source_radius**2, 0.0) ** 0.5,
        evenness=min(rim, middle) / max(rim, middle) if min(rim, middle) > 0 else 0.0,
        light=total,
        plateau=float(profile[share <= MIDDLE].mean()),
    )

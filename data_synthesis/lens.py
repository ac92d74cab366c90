"""Ray tracing through a lens over layered scenes: the fast path that makes the training targets.

The meaning is that of ``bokehdiff.rendering.raytraced.render_layers`` (the plain reference, tested
against it): layers front to back, bilinear look-ups, opacity under 0.01 empty, above 0.99 solid.
Here the layers are compiled loops, every pixel has its own rotated set of lens points (what would
be aliasing becomes a little noise), and small lights far brighter than white are spread exactly
instead of being found by chance. For planes at photo size see :mod:`data_synthesis.planes`.

Units: a canvas of *texels*, ``TEXELS_PER_PIXEL`` per pixel along each axis, so that one pixel is
the mean of its texels (a box filter) and bilinear look-ups add hardly any blur of their own.
A plane is ``(d0, dx, dy)``: disparity ``d0 + dx X + dy Y`` at texel (X, Y).
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import torch

try:
    from numba import njit
except ImportError as error:  # pragma: no cover - depends on the installation
    raise ImportError(
        "data_synthesis traces its scenes with numba, which is not installed; "
        "install the extra: pip install 'bokehdiff[data]'"
    ) from error

from bokehdiff.rendering.aperture import Aperture, field_position

__all__ = [
    "TEXELS_PER_PIXEL",
    "add_lights",
    "channels_by_focus",
    "field_displacement",
    "hard_disparity",
    "occupied_boxes",
    "pinhole_view",
    "spiral_lens_points",
    "trace_pixels",
    "trace_regular",
]

TEXELS_PER_PIXEL = 2
EMPTY_ALPHA = np.float32(0.01)
SOLID_ALPHA = np.float32(0.99)
GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))

# Lens points per texel: FEWEST_POINTS + POINTS_PER_RADIUS r for a radius of r pixels, at most
# MOST_POINTS; a pixel has four texels and so four times as many. Noise is then 42 to 55 dB.
FEWEST_POINTS = 6
POINTS_PER_RADIUS = 1.5
MOST_POINTS = 40
# Lens openings other than the disc: directions and shares of the light within a direction, of the
# table that spirals are drawn from; cells per side of the map that lights are spread from.
DIRECTIONS = 256
LIGHT_STEPS = 160
MAP_SIDE = 256
# The golden angle in parts of 2^16 of a turn: whole numbers are the same in every process.
GOLDEN_STEP = round(GOLDEN_ANGLE / math.tau * 2**16)


def spiral_lens_points(count: int) -> np.ndarray:
    """(count, 2) float32 points (u, v) of the unit disc: a sunflower spiral, equal areas."""
    index = np.arange(count)
    radius = np.sqrt((index + 0.5) / count)
    angle = index * GOLDEN_ANGLE
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).astype(np.float32)


def channels_by_focus(aperture: Aperture, df: float) -> list[tuple[float, list[int]]]:
    """[(disparity in focus, channels it holds for)]: one entry, or two through coloured rims."""
    focus = aperture.channel_focus(float(df))
    return [(f, [c for c in range(3) if focus[c] == f]) for f in sorted(set(focus))]


def field_displacement(
    aperture: Aperture, top: int, left: int, height: int, width: int
) -> np.ndarray:
    """(3,) float64 (x0, y0, step): where the second rim of a cat-eye lies, seen from each pixel.

    For pixel (x, y) of a canvas, of which a picture (height, width) begins at (left, top), it is
    displaced by (x0 + step x, y0 + step y) lens radii: lens points (u, v) with a sum of at most
    length 1 are kept.
    """
    start_x, start_y = field_position(-float(left), -float(top), height, width)
    step = field_position(1.0, 0.0, height, width)[0] - field_position(0.0, 0.0, height, width)[0]
    return aperture.cat_eye * np.array([start_x, start_y, step])


@functools.lru_cache(maxsize=8)
def _opening_table(opening: Aperture) -> np.ndarray:
    """(DIRECTIONS, LIGHT_STEPS, 4) float32: lens points (u, v), and what comes through them.

    Both axes divide the light evenly: between any two directions, and out to any step from the
    centre, there is the share of it that they are apart. So equal steps along both, as in a
    sunflower spiral, fill the opening evenly. The last two values are the light from behind and
    from before the focus, over their mean.
    """
    angles = (torch.arange(2 * DIRECTIONS, dtype=torch.float64) + 0.5) * (math.pi / DIRECTIONS)
    radii = (torch.arange(256, dtype=torch.float64) + 0.5) / 256
    u, v = torch.cos(angles)[:, None] * radii, torch.sin(angles)[:, None] * radii
    light = (opening.transmission(u, v) * radii).numpy()
    outwards = np.pad(np.cumsum(light, axis=1), ((0, 0), (1, 0)))
    around = np.cumsum(outwards[:, -1])
    wanted = (np.arange(DIRECTIONS) + 0.5) / DIRECTIONS * around[-1]
    rows = np.searchsorted(around, wanted)
    steps = (np.arange(LIGHT_STEPS) + 0.5) / LIGHT_STEPS
    rims = np.arange(257) / 256
    radius = np.stack([np.interp(steps * outwards[row, -1], outwards[row], rims) for row in rows])
    # Where within its sector of the fine angles a direction lies.
    within = (wanted - around[rows]) / outwards[rows, -1] + 1
    angle = (rows + within)[:, None] * (math.pi / DIRECTIONS)
    u, v = (torch.from_numpy(radius * turn(angle)) for turn in (np.cos, np.sin))
    behind, before = (opening.transmission(u, v, side) for side in (-1, 1))
    mean = ((behind + before) / 2).clamp_min(1e-6)
    return torch.stack([u, v, behind / mean, before / mean], dim=-1).numpy().astype(np.float32)


@functools.lru_cache(maxsize=8)
def _opening_map(opening: Aperture) -> np.ndarray:
    """(2, MAP_SIDE, MAP_SIDE) float32 mean transmission of cells of [-1, 1]^2, rows along v.

    [0] for light from behind, [1] for light from before the focus.
    """
    fine = torch.linspace(-1, 1, 4 * MAP_SIDE + 1, dtype=torch.float64)[1::2]
    sides = [opening.transmission(fine, fine[:, None], side) for side in (-1, 1)]
    cells = torch.stack(sides).reshape(2, MAP_SIDE, 2, MAP_SIDE, 2).mean((2, 4))
    return cells.numpy().astype(np.float32)


_DISC = Aperture()
# What stands for a plain disc, which has ways of its own.
_NO_TABLE = np.zeros((0, 0, 4), np.float32)
_NO_MAP = np.zeros((2, 0, 0), np.float32)
_NO_SHARES = np.zeros((0, 0, 2))


# For every number of points per texel, the spiral of the whole pixel; row 4 j + q belongs to
# texel q of the pixel.
_SPIRALS = np.zeros((MOST_POINTS + 1, 4 * MOST_POINTS, 2), np.float32)
for _count in range(1, MOST_POINTS + 1):
    _SPIRALS[_count, : 4 * _count] = spiral_lens_points(4 * _count)
_TURNS = np.stack(
    [np.cos(np.arange(1024) * (math.tau / 1024)), np.sin(np.arange(1024) * (math.tau / 1024))],
    axis=1,
).astype(np.float32)


@njit(cache=True, nogil=True)
def occupied_boxes(layers: np.ndarray) -> np.ndarray:
    """(L, 4) float32 (x0, x1, y0, y1): a hit outside misses the layer's opaque part.

    ``layers``: (L, H, W, 4) premultiplied colour and opacity.
    """
    count, height, width, _ = layers.shape
    boxes = np.empty((count, 4), np.float32)
    for layer in range(count):
        x0, x1, y0, y1 = width, -1, height, -1
        for y in range(height):
            for x in range(width):
                if layers[layer, y, x, 3] > 0:
                    x0 = min(x0, x)
                    x1 = max(x1, x)
                    y0 = min(y0, y)
                    y1 = max(y1, y)
        boxes[layer, 0] = max(x0 - 1, 0)
        boxes[layer, 1] = min(x1 + 1, width)
        boxes[layer, 2] = max(y0 - 1, 0)
        boxes[layer, 3] = min(y1 + 1, height)
    return boxes


@njit(cache=True, nogil=True, fastmath={"nsz", "arcp", "contract", "afn"})
def _trace_ray(layers, boxes, slopes, shifts, x, y, u, v, behind, before):
    """Red, green, blue, coverage, weight of the ray of texel (x, y) through lens point (u, v).

    ``slopes`` (L, 2): K dx, K dy. ``shifts`` (L,): K (d(x, y) - df), in texels. ``behind``,
    ``before``: what the lens point lets pass of light from behind and from before the focus.
    """
    count, height, width, _ = layers.shape
    red = np.float32(0)
    green = np.float32(0)
    blue = np.float32(0)
    coverage = np.float32(0)
    black = np.float32(0)
    light = np.float32(1)
    for layer in range(count):
        shift = shifts[layer]
        slope_x = slopes[layer, 0]
        slope_y = slopes[layer, 1]
        if slope_x != 0 or slope_y != 0:
            shift = shift / (np.float32(1) - slope_x * u - slope_y * v)
        seen = light * before
        if shift < 0:
            seen = light * behind
        elif shift == 0:
            seen = light * (np.float32(0.5) * (behind + before))
        hit_x = x + shift * u
        hit_y = y + shift * v
        if (
            hit_x < boxes[layer, 0]
            or hit_x >= boxes[layer, 1]
            or hit_y < boxes[layer, 2]
            or hit_y >= boxes[layer, 3]
        ):
            inside = 0 <= hit_x < width and 0 <= hit_y < height
            if layer == count - 1 and inside:
                black += seen
            continue
        column = int(hit_x)
        row = int(hit_y)
        right = hit_x - np.float32(column)
        down = hit_y - np.float32(row)
        column_1 = min(column + 1, width - 1)
        row_1 = min(row + 1, height - 1)
        w00 = (np.float32(1) - right) * (np.float32(1) - down)
        w01 = right * (np.float32(1) - down)
        w10 = (np.float32(1) - right) * down
        w11 = right * down
        plane = layers[layer]
        alpha = (
            w00 * plane[row, column, 3]
            + w01 * plane[row, column_1, 3]
            + w10 * plane[row_1, column, 3]
            + w11 * plane[row_1, column_1, 3]
        )
        if alpha < EMPTY_ALPHA:
            if layer == count - 1:
                black += seen
            continue
        w00 *= seen
        w01 *= seen
        w10 *= seen
        w11 *= seen
        red += (
            w00 * plane[row, column, 0]
            + w01 * plane[row, column_1, 0]
            + w10 * plane[row_1, column, 0]
            + w11 * plane[row_1, column_1, 0]
        )
        green += (
            w00 * plane[row, column, 1]
            + w01 * plane[row, column_1, 1]
            + w10 * plane[row_1, column, 1]
            + w11 * plane[row_1, column_1, 1]
        )
        blue += (
            w00 * plane[row, column, 2]
            + w01 * plane[row, column_1, 2]
            + w10 * plane[row_1, column, 2]
            + w11 * plane[row_1, column_1, 2]
        )
        coverage += seen * alpha
        if alpha > SOLID_ALPHA:
            break
        light *= np.float32(1) - alpha
    return red, green, blue, coverage, coverage + black


@njit(cache=True, nogil=True)
def trace_regular(
    layers: np.ndarray, planes: np.ndarray, df: float, K: float, lens_points: np.ndarray
) -> np.ndarray:
    """(H, W, 5) float32 sums over lens points: red, green, blue (linear), coverage, weight.

    ``layers`` (L, H, W, 4) float32 premultiplied linear colour and opacity, nearest first.
    ``planes`` (L, 3) disparities. ``K`` in texels of radius per unit of disparity.
    ``lens_points`` (S, 2) float32, the same for every texel: the reference's own sampling.
    """
    count, height, width, _ = layers.shape
    boxes = occupied_boxes(layers)
    slopes = (K * planes[:, 1:]).astype(np.float32)
    shifts = np.empty(count, np.float32)
    sums = np.zeros((height, width, 5), np.float32)
    for y in range(height):
        for x in range(width):
            for layer in range(count):
                disparity = planes[layer, 0] + planes[layer, 1] * x + planes[layer, 2] * y
                shifts[layer] = K * (disparity - df)
            for sample in range(lens_points.shape[0]):
                ray = _trace_ray(
                    layers,
                    boxes,
                    slopes,
                    shifts,
                    np.float32(x),
                    np.float32(y),
                    lens_points[sample, 0],
                    lens_points[sample, 1],
                    np.float32(1),
                    np.float32(1),
                )
                for channel in range(5):
                    sums[y, x, channel] += ray[channel]
    return sums


@njit(cache=True, nogil=True)
def _trace_pixels(
    layers, planes, boxes, df, K, margin, size, seed, spirals, turns, density, table, rim
):
    count = layers.shape[0]
    slopes = (K * planes[:, 1:]).astype(np.float32)
    most = spirals.shape[0] - 1
    shifts = np.empty((4, count), np.float32)
    picture = np.empty((size, size, 3), np.float32)
    for row in range(size):
        for column in range(size):
            widest = np.float32(0)
            for texel in range(4):
                x = margin + 2 * column + texel % 2
                y = margin + 2 * row + texel // 2
                for layer in range(count):
                    disparity = planes[layer, 0] + planes[layer, 1] * x + planes[layer, 2] * y
                    shift = np.float32(K * (disparity - df))
                    shifts[texel, layer] = shift
                    widest = max(widest, abs(shift))
            points = min(most, FEWEST_POINTS + int(density * 0.5 * widest))
            # An integer hash of the pixel: the same rotation in every process.
            mixed = (row * 73856093) ^ (column * 19349663) ^ (seed * 83492791)
            mixed = (mixed ^ (mixed >> 13)) * 1274126177 & 0x7FFFFFFF
            turn = (mixed ^ (mixed >> 16)) & 1023
            cosine = turns[turn, 0]
            sine = turns[turn, 1]
            red = np.float32(0)
            green = np.float32(0)
            blue = np.float32(0)
            weight = np.float32(0)
            rim_x = rim[0] + rim[2] * column
            rim_y = rim[1] + rim[2] * row
            if rim[2] != 0:
                # As many more as the second rim cuts off: what two discs have in common.
                half = 0.5 * math.hypot(rim_x, rim_y)
                kept = (math.acos(half) - half * math.sqrt(1 - half * half)) * 2 / math.pi
                points = min(most, int(points / kept) + 1)
            for texel in range(4):
                x = np.float32(margin + 2 * column + texel % 2)
                y = np.float32(margin + 2 * row + texel // 2)
                for sample in range(points):
                    behind = np.float32(1)
                    before = np.float32(1)
                    if len(table) == 0:
                        a = spirals[points, 4 * sample + texel, 0]
                        b = spirals[points, 4 * sample + texel, 1]
                        u = a * cosine - b * sine
                        v = a * sine + b * cosine
                    else:
                        index = 4 * sample + texel
                        direction = ((index * GOLDEN_STEP + turn * 64) & 65535) * DIRECTIONS >> 16
                        step = (2 * index + 1) * LIGHT_STEPS // (8 * points)
                        u = table[direction, step, 0]
                        v = table[direction, step, 1]
                        behind = table[direction, step, 2]
                        before = table[direction, step, 3]
                    if rim[2] != 0 and (u + rim_x) ** 2 + (v + rim_y) ** 2 > 1:
                        continue
                    ray = _trace_ray(
                        layers, boxes, slopes, shifts[texel], x, y, u, v, behind, before
                    )
                    red += ray[0]
                    green += ray[1]
                    blue += ray[2]
                    weight += ray[4]
            weight = max(weight, np.float32(1e-5))
            picture[row, column, 0] = red / weight
            picture[row, column, 1] = green / weight
            picture[row, column, 2] = blue / weight
    return picture


def trace_pixels(
    layers: np.ndarray,
    planes: np.ndarray,
    df: float,
    K: float,
    margin: int,
    size: int,
    *,
    seed: int = 0,
    density: float = POINTS_PER_RADIUS,
    aperture: Aperture | None = None,
) -> np.ndarray:
    """(size, size, 3) float32 linear-light picture through the lens, a square of the canvas.

    ``layers``, ``planes`` as in :func:`trace_regular`; ``K`` in *pixels* of radius per unit of
    disparity; ``margin``: texels of the canvas around the square on every side. ``density``:
    lens points per texel and pixel of radius. ``aperture``: the lens opening, default a disc.
    """
    aperture = aperture or _DISC
    opening = dataclasses.replace(aperture, fringe=0.0, cat_eye=0.0)
    picture = np.empty((size, size, 3), np.float32)
    boxes = occupied_boxes(layers)
    for focus, channels in channels_by_focus(aperture, df):
        traced = _trace_pixels(
            layers,
            planes,
            boxes,
            focus,
            float(K) * TEXELS_PER_PIXEL,
            int(margin),
            int(size),
            int(seed) & 0x7FFF,
            _SPIRALS,
            _TURNS,
            float(density),
            _NO_TABLE if opening.is_disc else _opening_table(opening),
            field_displacement(aperture, 0, 0, size, size),
        )
        picture[..., channels] = traced[..., channels]
    return picture


@njit(cache=True, nogil=True)
def pinhole_view(
    layers: np.ndarray, planes: np.ndarray, margin: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """All-in-focus linear picture (size, size, 3) and its blended disparity (size, size).

    Both are means over the texels of each pixel of front-to-back compositing; the disparity is
    weighted by how much each surface contributes to the pixel (anti-aliased edges).
    """
    count = layers.shape[0]
    picture = np.zeros((size, size, 3), np.float32)
    blended = np.zeros((size, size), np.float32)
    for row in range(size):
        for column in range(size):
            coverage = 0.0
            depth_sum = 0.0
            for texel in range(4):
                x = margin + 2 * column + texel % 2
                y = margin + 2 * row + texel // 2
                light = np.float32(1)
                for layer in range(count):
                    alpha = layers[layer, y, x, 3]
                    if alpha < EMPTY_ALPHA:
                        continue
                    for channel in range(3):
                        picture[row, column, channel] += light * layers[layer, y, x, channel]
                    disparity = planes[layer, 0] + planes[layer, 1] * x + planes[layer, 2] * y
                    depth_sum += light * alpha * disparity
                    coverage += light * alpha
                    if alpha > SOLID_ALPHA:
                        break
                    light *= np.float32(1) - alpha
            blended[row, column] = depth_sum / max(coverage, 1e-9)
            for channel in range(3):
                picture[row, column, channel] /= np.float32(max(coverage, 1e-9))
    return picture, blended


@njit(cache=True, nogil=True)
def hard_disparity(
    layers: np.ndarray, planes: np.ndarray, margin: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Disparity (size, size) of the nearest surface at least half opaque, and its layer index.

    One ray through each pixel centre, where the four texels of the pixel meet.
    """
    count = layers.shape[0]
    disparities = np.empty((size, size), np.float32)
    nearest = np.empty((size, size), np.int32)
    for row in range(size):
        for column in range(size):
            x = margin + 2 * column
            y = margin + 2 * row
            found = count - 1
            for layer in range(count):
                alpha = (
                    layers[layer, y, x, 3]
                    + layers[layer, y, x + 1, 3]
                    + layers[layer, y + 1, x, 3]
                    + layers[layer, y + 1, x + 1, 3]
                )
                if alpha > 2:
                    found = layer
                    break
            nearest[row, column] = found
            disparities[row, column] = (
                planes[found, 0] + planes[found, 1] * (x + 0.5) + planes[found, 2] * (y + 0.5)
            )
    return disparities, nearest


@njit(cache=True, nogil=True)
def _transmittance(layers, boxes, planes, df, K, in_front, x, y, u, v):
    """Light that passes the first ``in_front`` layers on the ray of texel (x, y) through (u, v)."""
    _, height, width, _ = layers.shape
    light = 1.0
    for layer in range(in_front):
        disparity = planes[layer, 0] + planes[layer, 1] * x + planes[layer, 2] * y
        shift = K * (disparity - df) / (1 - K * (planes[layer, 1] * u + planes[layer, 2] * v))
        hit_x = x + shift * u
        hit_y = y + shift * v
        if (
            hit_x < boxes[layer, 0]
            or hit_x >= boxes[layer, 1]
            or hit_y < boxes[layer, 2]
            or hit_y >= boxes[layer, 3]
        ):
            continue
        column = int(hit_x)
        row = int(hit_y)
        right = hit_x - column
        down = hit_y - row
        column_1 = min(column + 1, width - 1)
        row_1 = min(row + 1, height - 1)
        alpha = (1 - down) * (
            (1 - right) * layers[layer, row, column, 3] + right * layers[layer, row, column_1, 3]
        ) + down * (
            (1 - right) * layers[layer, row_1, column, 3]
            + right * layers[layer, row_1, column_1, 3]
        )
        if alpha < 0.01:
            continue
        if alpha > 0.99:
            return 0.0
        light *= 1 - alpha
    return light


@njit(cache=True, nogil=True)
def _kept_shares(points, rim, size):
    """(size, size, 2) share of the light from behind and from before that a cat-eye keeps."""
    shares = np.empty((size, size, 2))
    for row in range(size):
        for column in range(size):
            rim_x = rim[0] + rim[2] * column
            rim_y = rim[1] + rim[2] * row
            for side in range(2):
                kept = 0.0
                total = 0.0
                for point in range(len(points)):
                    light = points[point, 2 + side]
                    total += light
                    if (points[point, 0] + rim_x) ** 2 + (points[point, 1] + rim_y) ** 2 <= 1:
                        kept += light
                shares[row, column, side] = max(kept / total, 1e-2)
    return shares


@njit(cache=True, nogil=True)
def _mean_transmission(cells, u, v, half, steps, rim_x, rim_y):
    """Mean of a map of the opening over the square (u, v) +- half, from steps x steps points.

    (rim_x, rim_y): displacement of a cat-eye's second rim.
    """
    side = cells.shape[0]
    total = 0.0
    for down in range(steps):
        y = v + half * ((2 * down + 1) / steps - 1)
        row = int(math.floor((y + 1) * 0.5 * side))
        if row < 0 or row >= side:
            continue
        for right in range(steps):
            x = u + half * ((2 * right + 1) / steps - 1)
            column = int(math.floor((x + 1) * 0.5 * side))
            cut = (x + rim_x) ** 2 + (y + rim_y) ** 2 > 1 and (rim_x != 0 or rim_y != 0)
            if 0 <= column < side and not cut:
                total += cells[row, column]
    return total / (steps * steps)


@njit(cache=True, nogil=True)
def _add_lights(
    picture, layers, planes, boxes, df, K, margin, lights, spirals, opening_map, rim, kept_shares
):
    size = picture.shape[0]
    plain = opening_map.shape[1] == 0
    cell_area = 4 / max(opening_map.shape[1], 1) ** 2
    areas = (opening_map[0].sum() * cell_area, opening_map[1].sum() * cell_area)
    for index in range(lights.shape[0]):
        layer = int(lights[index, 0])
        light_radius = lights[index, 3]
        area = math.pi * light_radius * light_radius / 4  # pixels
        # The finer the blur, the more the light's own shape shows.
        centre_disparity = (
            planes[layer, 0]
            + planes[layer, 1] * lights[index, 1]
            + planes[layer, 2] * lights[index, 2]
        )
        blur = abs(K * (centre_disparity - df)) / 2
        points = 64 if blur < 2 else (24 if blur < 8 else 8)
        for point in range(points):
            x_light = lights[index, 1] + light_radius * spirals[points // 4, point, 0]
            y_light = lights[index, 2] + light_radius * spirals[points // 4, point, 1]
            disparity = planes[layer, 0] + planes[layer, 1] * x_light + planes[layer, 2] * y_light
            shift = K * (disparity - df)
            radius = abs(shift) / 2
            side = 1 if shift > 0 else 0
            # Squares of at most an eighth of the lens radius, where pixels are not finer.
            steps = min(max(int(math.ceil(8 / max(radius, 0.5))), 4), 16)
            column_light = (x_light - margin - 0.5) / 2
            row_light = (y_light - margin - 0.5) / 2
            if radius <= 0.5:
                # Smaller than a pixel: all of it in the pixel (the half-open box) it falls on.
                first_column = last_column = int(math.floor(column_light + 0.5))
                first_row = last_row = int(math.floor(row_light + 0.5))
                total = 1.0
            else:
                first_column = int(math.ceil(column_light - radius - 0.5))
                last_column = int(math.floor(column_light + radius + 0.5))
                first_row = int(math.ceil(row_light - radius - 0.5))
                last_row = int(math.floor(row_light + radius + 0.5))
                if plain:
                    total = math.pi * (radius * radius + 1.0 / 12)
                    if radius < 4:
                        total = 0.0
                        for row in range(first_row, last_row + 1):
                            for column in range(first_column, last_column + 1):
                                distance = math.hypot(column - column_light, row - row_light)
                                total += min(1.0, max(0.0, radius + 0.5 - distance))
                else:
                    total = areas[side] * radius * radius
                    if radius < 4:
                        total = 0.0
                        for row in range(first_row, last_row + 1):
                            for column in range(first_column, last_column + 1):
                                u = 2 * (column_light - column) / shift
                                v = 2 * (row_light - row) / shift
                                total += _mean_transmission(
                                    opening_map[side], u, v, 1 / abs(shift), steps, 0.0, 0.0
                                )
            for row in range(max(first_row, 0), min(last_row, size - 1) + 1):
                for column in range(max(first_column, 0), min(last_column, size - 1) + 1):
                    weight = 1.0
                    u = 0.0
                    v = 0.0
                    x = margin + 2 * column + 0.5
                    y = margin + 2 * row + 0.5
                    if radius > 0.5:
                        u = (x_light - x) / shift
                        v = (y_light - y) / shift
                        if plain:
                            distance = math.hypot(column - column_light, row - row_light)
                            weight = min(1.0, max(0.0, radius + 0.5 - distance))
                        else:
                            rim_x = rim[0] + rim[2] * column
                            rim_y = rim[1] + rim[2] * row
                            weight = _mean_transmission(
                                opening_map[side], u, v, 1 / abs(shift), steps, rim_x, rim_y
                            )
                            if rim[2] != 0:
                                # A pixel is the mean over the light that its cat-eye keeps.
                                weight /= kept_shares[row, column, side]
                        if weight == 0.0:
                            continue
                    weight *= _transmittance(layers, boxes, planes, df, K, layer, x, y, u, v)
                    weight *= area / (points * total)
                    for channel in range(3):
                        picture[row, column, channel] += weight * lights[index, 4 + channel]


def add_lights(
    picture: np.ndarray,
    layers: np.ndarray,
    planes: np.ndarray,
    df: float,
    K: float,
    margin: int,
    lights: np.ndarray,
    *,
    aperture: Aperture | None = None,
) -> None:
    """Adds small discs of light to a picture of :func:`trace_pixels` or :func:`pinhole_view`.

    ``lights`` (N, 7): layer it lies on, X, Y and radius in texels, and linear RGB radiance that
    comes *on top* of the layer's own colour. ``K`` in pixels per unit of disparity; 0 gives the
    pinhole picture. Spreads each light over its circle of confusion, in the shape of the
    ``aperture`` (default a disc; anti-aliased rim, energy kept), each lens direction dimmed by the
    layers in front: a gather by point lights, no noise.
    """
    if not len(lights):
        return
    aperture = aperture or _DISC
    opening = dataclasses.replace(aperture, fringe=0.0, cat_eye=0.0)
    rim = field_displacement(aperture, 0, 0, *picture.shape[:2])
    kept_shares = _NO_SHARES
    if aperture.varies_over_field:
        points = _opening_table(opening).reshape(-1, 4)[::61]
        kept_shares = _kept_shares(np.ascontiguousarray(points), rim, picture.shape[0])
    lights = np.asarray(lights, np.float64)
    boxes = occupied_boxes(layers)
    for focus, channels in channels_by_focus(aperture, df):
        coloured = lights.copy()
        coloured[:, [4 + channel for channel in range(3) if channel not in channels]] = 0
        _add_lights(
            picture,
            layers,
            planes,
            boxes,
            focus,
            float(K) * TEXELS_PER_PIXEL,
            int(margin),
            coloured,
            _SPIRALS,
            _NO_MAP if aperture.is_disc else _opening_map(opening),
            rim,
            kept_shares,
        )

"""Ray tracing through a lens over layered scenes: the fast path that makes the training targets.

The meaning is that of ``bokehdiff.rendering.raytraced.render_layers`` (the plain reference, tested
against it): layers front to back, bilinear look-ups, opacity under 0.01 empty, above 0.99 solid.
Here the layers are compiled loops, every pixel has its own rotated set of lens points (what would
be aliasing becomes a little noise), and small lights far brighter than white are spread exactly
instead of being found by chance.

Units: a canvas of *texels*, ``TEXELS_PER_PIXEL`` per pixel along each axis, so that one pixel is
the mean of its texels (a box filter) and bilinear look-ups add hardly any blur of their own.
A plane is ``(d0, dx, dy)``: disparity ``d0 + dx X + dy Y`` at texel (X, Y).
"""

from __future__ import annotations

import math

import numpy as np

try:
    from numba import njit
except ImportError as error:  # pragma: no cover - depends on the installation
    raise ImportError(
        "data_synthesis traces its scenes with numba, which is not installed; "
        "install the extra: pip install 'bokehdiff[data]'"
    ) from error

__all__ = [
    "TEXELS_PER_PIXEL",
    "add_lights",
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


def spiral_lens_points(count: int) -> np.ndarray:
    """(count, 2) float32 points (u, v) of the unit disc: a sunflower spiral, equal areas."""
    index = np.arange(count)
    radius = np.sqrt((index + 0.5) / count)
    angle = index * GOLDEN_ANGLE
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).astype(np.float32)


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
def _trace_ray(layers, boxes, slopes, shifts, x, y, u, v):
    """Red, green, blue, coverage, weight of the ray of texel (x, y) through lens point (u, v).

    ``slopes`` (L, 2): K dx, K dy. ``shifts`` (L,): K (d(x, y) - df), in texels.
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
                black += light
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
                black += light
            continue
        w00 *= light
        w01 *= light
        w10 *= light
        w11 *= light
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
        coverage += light * alpha
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
                )
                for channel in range(5):
                    sums[y, x, channel] += ray[channel]
    return sums


@njit(cache=True, nogil=True)
def _trace_pixels(layers, planes, boxes, df, K, margin, size, seed, spirals, turns, density):
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
            for texel in range(4):
                x = np.float32(margin + 2 * column + texel % 2)
                y = np.float32(margin + 2 * row + texel // 2)
                for sample in range(points):
                    a = spirals[points, 4 * sample + texel, 0]
                    b = spirals[points, 4 * sample + texel, 1]
                    ray = _trace_ray(
                        layers,
                        boxes,
                        slopes,
                        shifts[texel],
                        x,
                        y,
                        a * cosine - b * sine,
                        a * sine + b * cosine,
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
) -> np.ndarray:
    """(size, size, 3) float32 linear-light picture through the lens, a square of the canvas.

    ``layers``, ``planes`` as in :func:`trace_regular`; ``K`` in *pixels* of radius per unit of
    disparity; ``margin``: texels of the canvas around the square on every side. ``density``:
    lens points per texel and pixel of radius.
    """
    return _trace_pixels(
        layers,
        planes,
        occupied_boxes(layers),
        float(df),
        float(K) * TEXELS_PER_PIXEL,
        int(margin),
        int(size),
        int(seed) & 0x7FFF,
        _SPIRALS,
        _TURNS,
        float(density),
    )


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
def _add_lights(picture, layers, planes, boxes, df, K, margin, lights, spirals):
    size = picture.shape[0]
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
                total = math.pi * (radius * radius + 1.0 / 12)
                if radius < 4:
                    total = 0.0
                    for row in range(first_row, last_row + 1):
                        for column in range(first_column, last_column + 1):
                            distance = math.hypot(column - column_light, row - row_light)
                            total += min(1.0, max(0.0, radius + 0.5 - distance))
            for row in range(max(first_row, 0), min(last_row, size - 1) + 1):
                for column in range(max(first_column, 0), min(last_column, size - 1) + 1):
                    weight = 1.0
                    u = 0.0
                    v = 0.0
                    x = margin + 2 * column + 0.5
                    y = margin + 2 * row + 0.5
                    if radius > 0.5:
                        distance = math.hypot(column - column_light, row - row_light)
                        weight = min(1.0, max(0.0, radius + 0.5 - distance))
                        if weight == 0.0:
                            continue
                        u = (x_light - x) / shift
                        v = (y_light - y) / shift
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
) -> None:
    """Adds small discs of light to a picture of :func:`trace_pixels` or :func:`pinhole_view`.

    ``lights`` (N, 7): layer it lies on, X, Y and radius in texels, and linear RGB radiance that
    comes *on top* of the layer's own colour. ``K`` in pixels per unit of disparity; 0 gives the
    pinhole picture. Spreads each light over its circle of confusion (anti-aliased rim, energy
    kept), each lens direction dimmed by the layers in front: a gather by point lights, no noise.
    """
    if len(lights):
        _add_lights(
            picture,
            layers,
            planes,
            occupied_boxes(layers),
            float(df),
            float(K) * TEXELS_PER_PIXEL,
            int(margin),
            np.asarray(lights, np.float64),
            _SPIRALS,
        )

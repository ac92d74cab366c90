"""Ray tracing of textured planes at photo size: every lens sample of every pixel, in compiled code.

The meaning is that of ``bokehdiff.rendering.raytraced.render_layers``, which it is tested against,
for any :class:`~bokehdiff.rendering.Aperture`. What makes it fast: the picture is cut into tiles,
and counting tables of the opacity tell what the rays of a tile, or of one of its rows, through one
lens sample meet of a layer: nothing, something solid, or a mixture. Most meet nothing or something
solid, where a ray is at most one bilinear look-up. The look-ups follow the rows of the picture:
along them a hit moves by nearly a texel per pixel, so that whole stretches of texels are read in
order, several at a time.

A plane is ``(d0, dx, dy)``: disparity ``d0 + dx X + dy Y`` at pixel (X, Y) of the canvas, which has
one texel per pixel.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from bokehdiff.rendering.aperture import Aperture
from data_synthesis.lens import (
    EMPTY_ALPHA,
    SOLID_ALPHA,
    channels_by_focus,
    field_displacement,
    njit,
)

__all__ = ["planes_from_published", "trace_planes"]

TILE_ROWS = 16
TILE_COLUMNS = 64
# What all rays of a tile (or of a row of it) through one lens sample meet of a layer.
NOTHING, MIXTURE, SOLID = 0, 1, 2
# Which of these rays go on behind the layers met so far: all in full, some or weakened, none.
ALL, SOME, NONE = 0, 1, 2
# Stretches of texels are read in blocks of whole vectors, which may overrun the end by one block.
BLOCK = 4
# Indices that cannot be negative spare the compiled loops a test at every step.
CHANNELS = np.uint64(4)
ALPHA = np.uint64(3)
# No rearrangement of sums: the bytes must not depend on how a loop is cut.
FASTER = {"nsz", "arcp", "contract", "afn"}
# A rim of the aperture belongs to the opening, also after rounding.
RIM = (1 + 1e-6) ** 2
# Below this sum of all that counts a pixel is black.
SMALLEST_WEIGHT = np.float32(1e-5)


def planes_from_published(coefficients: np.ndarray) -> np.ndarray:
    """(L, 3) float64 planes (d0, dx, dy) from (L, 3) published coefficients (a, b, c).

    Disparity at pixel (x, y) is ``(1 - a x - b y) / c = d0 + dx x + dy y``.
    """
    a, b, c = np.asarray(coefficients, np.float64).T
    return np.stack([1 / c, -a / c, -b / c], axis=1)


def trace_planes(
    layers: np.ndarray,
    planes: np.ndarray,
    df: float,
    K: float,
    *,
    aperture: Aperture | None = None,
    samples_per_side: int = 21,
    window: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """(h, w, 3) float32 linear-light picture of textured planes through the lens.

    Args:
        layers: (L, H, W, 4) float32 premultiplied linear colour and opacity (0 to 1), nearest
            first, on a canvas with one texel per pixel.
        planes: (L, 3) disparities (d0, dx, dy), larger is nearer: ``d0 + dx X + dy Y`` at pixel
            (X, Y) of the canvas. See :func:`planes_from_published`.
        df: disparity in focus. K: pixels of blur radius per unit of disparity.
        aperture: the lens opening, default a disc. Light counts by its transmission on the side of
            the focus on which the ray meets the layer; the field of a cat-eye is the picture's.
        samples_per_side: side of the grid of lens samples, see :meth:`Aperture.lens_samples`.
        window: (top, left, height, width), the part of the canvas that is the picture; rays see
            all of the canvas. Default: the whole canvas.

    The ray of pixel (x, y) through lens point (u, v) meets a plane at ``(x, y) + s (u, v)``, with
    ``s = K (d(x, y) - df) / (1 - K (dx u + dy v))``, which is ``K (d(hit) - df)``. Look-ups are
    bilinear. Opacity under 0.01 lets the ray pass, above 0.99 stops it. A ray outside the canvas
    does not count; one that passes an empty place of the last layer counts as black. A pixel is
    the sum of light divided by that of all that counts, black where no ray does.

    One thread, the same bytes at every call; threads may call it at the same time.

    Raises:
        ValueError: arguments that do not fit each other or make no sense; a plane so steep that
            the lens sees it edge-on.
    """
    layers, planes = np.asarray(layers), np.asarray(planes, np.float64)
    _check_scene(layers, planes, df, K)
    top, left, height, width = _checked_window(window, *layers.shape[1:3])
    aperture = aperture or Aperture()
    points = aperture.lens_samples(samples_per_side, dtype=torch.float64)
    weights = torch.stack([aperture.lens_weights(points, side) for side in (-1, 0, 1)], dim=1)
    lens = points.numpy()
    denominators = 1 - K * lens @ planes[:, 1:].T
    if denominators.min() <= 0:
        steepest = float(np.hypot(planes[:, 1], planes[:, 2]).max())
        raise ValueError(
            f"A plane's disparity changes by {steepest:g} per pixel, which with K = {K:g} makes "
            "its blur radius change by a pixel or more per pixel: the lens would see it edge-on. "
            "Wanted a smaller slope or K."
        )
    texels, tables = _with_tables(np.ascontiguousarray(layers, np.float32))
    picture = np.empty((height, width, 3), np.float32)
    for focus, channels in channels_by_focus(aperture, df):
        traced = _trace(
            texels,
            tables,
            K * (planes[:, 0] - focus) / denominators,
            K * planes[:, 1:] / denominators[..., None],
            lens,
            weights.numpy().astype(np.float32),
            field_displacement(aperture, top, left, height, width),
            (top, left, height, width),
        )
        picture[..., channels] = traced[..., channels]
    return picture


def _check_scene(layers: np.ndarray, planes: np.ndarray, df: float, K: float) -> None:
    if layers.ndim != 4 or layers.shape[3] != 4 or 0 in layers.shape or layers.dtype.kind != "f":
        raise ValueError(
            f"layers has shape {layers.shape} and type {layers.dtype}; wanted (L, H, W, 4) "
            "float32: premultiplied linear colour and opacity."
        )
    if not (np.isfinite(layers.min()) and np.isfinite(layers.max())):
        raise ValueError("layers must be finite; it holds NaN or infinity.")
    # Cut-outs that were enlarged with Lanczos filters may overshoot.
    lowest, highest = layers[..., 3].min(), layers[..., 3].max()
    if lowest < -0.5 or highest > 1.5:
        raise ValueError(
            f"The opacity layers[..., 3] goes from {lowest:g} to {highest:g}; wanted 0 to 1."
        )
    if planes.shape != (len(layers), 3) or not np.isfinite(planes).all():
        raise ValueError(
            f"planes has shape {planes.shape}; wanted {(len(layers), 3)}: finite (d0, dx, dy) for "
            "each layer, a disparity of d0 + dx X + dy Y."
        )
    if not (np.isfinite(df) and np.isfinite(K) and K >= 0):
        raise ValueError(
            f"df is {df!r} and K is {K!r}; wanted the disparity in focus and zero or more pixels "
            "of blur radius per unit of disparity."
        )


def _checked_window(
    window: tuple[int, int, int, int] | None, height: int, width: int
) -> tuple[int, int, int, int]:
    if window is None:
        return 0, 0, height, width
    top, left, rows, columns = (int(value) for value in window)
    if (
        min(top, left) < 0
        or min(rows, columns) < 1
        or top + rows > height
        or left + columns > width
    ):
        raise ValueError(
            f"window is {window}; wanted (top, left, height, width) of at least one pixel within "
            f"the canvas of {height} x {width} texels."
        )
    return top, left, rows, columns


@njit(cache=True, nogil=True)
def _with_tables(layers):
    """Texels with the last row and columns repeated, and counting tables of their opacity.

    tables[l, k, y, x] counts, in the rows before y and the columns before x, the texels that are
    not empty (k = 0) and those that are not solid (k = 1).
    """
    count, height, width, _ = layers.shape
    texels = np.empty((count, height + 1, width + 2 + BLOCK, 4), np.float32)
    tables = np.zeros((count, 2, height + 2, width + 2), np.int32)
    for layer in range(count):
        for y in range(height + 1):
            row = min(y, height - 1)
            filled = 0
            passing = 0
            for x in range(width + 2 + BLOCK):
                column = min(x, width - 1)
                for channel in range(4):
                    texels[layer, y, x, channel] = layers[layer, row, column, channel]
                if x <= width:
                    alpha = layers[layer, row, column, 3]
                    filled += alpha >= EMPTY_ALPHA
                    passing += alpha <= SOLID_ALPHA
                    tables[layer, 0, y + 1, x + 1] = tables[layer, 0, y, x + 1] + filled
                    tables[layer, 1, y + 1, x + 1] = tables[layer, 1, y, x + 1] + passing
    return texels, tables


@njit(cache=True, nogil=True)
def _met(tables, layer, left, right, top, bottom):
    """What rays meet whose hits lie in this box, both ends included."""
    height = tables.shape[2] - 2
    width = tables.shape[3] - 2
    x0 = min(max(int(math.floor(left)), 0), width - 1)
    x1 = min(max(int(math.floor(right)), 0), width - 1) + 2
    y0 = min(max(int(math.floor(top)), 0), height - 1)
    y1 = min(max(int(math.floor(bottom)), 0), height - 1) + 2
    filled = tables[layer, 0]
    if filled[y1, x1] - filled[y0, x1] == filled[y1, x0] - filled[y0, x0]:
        return NOTHING
    passing = tables[layer, 1]
    if passing[y1, x1] - passing[y0, x1] == passing[y1, x0] - passing[y0, x0]:
        return SOLID
    return MIXTURE


@njit(cache=True, nogil=True, fastmath=FASTER)
def _look_up(
    colours, texels, row_length, place, start, blocks, right, down, drift_x, drift_y, ramp
):
    """Bilinear look-ups of a stretch of pixels whose hits lie in consecutive texels of one row.

    right, down: place of the first hit within its texel; it drifts from pixel to pixel.
    """
    below = place + row_length
    for i in range(blocks * np.uint64(4 * BLOCK)):
        x = right + drift_x * ramp[i]
        y = down + drift_y * ramp[i]
        left = texels[place + i]
        upper = left + x * (texels[place + CHANNELS + i] - left)
        left = texels[below + i]
        lower = left + x * (texels[below + CHANNELS + i] - left)
        colours[start + i] = upper + y * (lower - upper)


@njit(cache=True, nogil=True)
def _look_up_row(colours, texels, layer, width, height, x, y, x_step, y_step, count, ramp):
    """Look-ups at (x, y) + i (x_step, y_step), i < count, cut into stretches of one texel row."""
    row_length = 4 * (width + 2 + BLOCK)
    drift = x_step - 1
    done = 0
    while done < count:
        hit_x = x + done * x_step
        hit_y = y + done * y_step
        # Within rounding a hit may seem to lie outside, where bilinear look-ups still go on.
        column = min(max(int(math.floor(hit_x)), 0), width - 1)
        row = min(max(int(math.floor(hit_y)), 0), height - 1)
        right = hit_x - column
        down = hit_y - row
        stretch = float(count - done)
        if drift > 0:
            stretch = min(stretch, (1 - right) / drift + 1)
        elif drift < 0:
            stretch = min(stretch, right / -drift + 1)
        if y_step > 0:
            stretch = min(stretch, (1 - down) / y_step + 1)
        elif y_step < 0:
            stretch = min(stretch, down / -y_step + 1)
        pixels = max(int(stretch), 1)
        # The blocks overrun the stretch; the next one writes over that.
        _look_up(
            colours,
            texels,
            np.uint64(row_length),
            np.uint64((layer * (height + 1) + row) * row_length + 4 * column),
            np.uint64(4 * done),
            np.uint64((pixels + BLOCK - 1) // BLOCK),
            np.float32(right),
            np.float32(down),
            np.float32(drift),
            np.float32(y_step),
            ramp,
        )
        done += pixels


@njit(cache=True, nogil=True, fastmath=FASTER)
def _add(sums, pixel, colours, first, count, weight):
    """Adds the light of rays that nothing has dimmed and that stop here."""
    start = CHANNELS * pixel
    begin = CHANNELS * first
    for i in range(CHANNELS * count):
        sums[start + i] += weight * colours[begin + i]


@njit(cache=True, nogil=True, fastmath=FASTER)
def _blend(sums, light, pixel, colours, first, count, weight, is_last):
    """Adds the light that still passes, and dims it by the opacity; returns what is left."""
    left = np.float32(0)
    for i in range(count):
        here = CHANNELS * (first + i)
        there = CHANNELS * (pixel + i)
        alpha = colours[here + ALPHA]
        reaching = light[pixel + i]
        if alpha < EMPTY_ALPHA:
            if is_last:
                sums[there + ALPHA] += weight * reaching
            left += reaching
            continue
        for channel in range(CHANNELS):
            sums[there + channel] += weight * reaching * colours[here + channel]
        reaching = np.float32(0) if alpha > SOLID_ALPHA else reaching * (np.float32(1) - alpha)
        light[pixel + i] = reaching
        left += reaching
    return left


@njit(cache=True, nogil=True)
def _span_inside(x, y, x_step, y_step, count, width, height):
    """(first, last) of the hits (x, y) + i (x_step, y_step), i < count, that the canvas holds."""
    first = 0
    while first < count:
        hit_x = x + first * x_step
        hit_y = y + first * y_step
        if 0 <= hit_x < width and 0 <= hit_y < height:
            break
        first += 1
    last = count
    while last > first:
        hit_x = x + (last - 1) * x_step
        hit_y = y + (last - 1) * y_step
        if 0 <= hit_x < width and 0 <= hit_y < height:
            break
        last -= 1
    return first, last


@njit(cache=True, nogil=True)
def _open_rows(state, light, u, v, x, y, step, rows, columns):
    """Puts in `state` and `light` which pixels of a tile this lens point of a cat-eye serves.

    (x, y): displacement of the second rim at the tile's first pixel; it grows by `step`.
    """
    left = u + x
    right = left + (columns - 1) * step
    for row in range(rows):
        across = v + y + row * step
        if max(left * left, right * right) + across * across <= RIM:
            state[row] = ALL
            continue
        state[row] = NONE
        for column in range(columns):
            along = left + column * step
            is_open = along * along + across * across <= RIM
            light[row * TILE_COLUMNS + column] = is_open
            if is_open:
                state[row] = SOME


@njit(cache=True, nogil=True)
def _trace_layer(
    sums,
    light,
    state,
    colours,
    texels,
    tables,
    layer,
    met,
    rows,
    columns,
    hit,
    shift,
    weights,
    ramp,
):
    """Sends the rays of a tile through one lens sample on to one layer; whether none goes on.

    hit (6): place of the first pixel's hit x, y; change of x, y from column to column; from row to
    row. shift (3): the same for the shift of the hits.
    """
    height = tables.shape[2] - 2
    width = tables.shape[3] - 2
    is_last = layer == tables.shape[0] - 1
    x_step, y_step = hit[2], hit[3]
    done = True
    for row in range(rows):
        if state[row] == NONE:
            continue
        x = hit[0] + row * hit[4]
        y = hit[1] + row * hit[5]
        x_end = x + (columns - 1) * x_step
        y_end = y + (columns - 1) * y_step
        left, right = min(x, x_end), max(x, x_end)
        top, bottom = min(y, y_end), max(y, y_end)
        row_met = _met(tables, layer, left, right, top, bottom) if met == MIXTURE else met
        if row_met == NOTHING and not is_last:
            done = False
            continue
        first, last = 0, columns
        if left < 0 or right >= width or top < 0 or bottom >= height:
            first, last = _span_inside(x, y, x_step, y_step, columns, width, height)
            if first == last:
                done = False
                continue
        _look_up_row(
            colours,
            texels,
            layer,
            width,
            height,
            x + first * x_step,
            y + first * y_step,
            x_step,
            y_step,
            last - first,
            ramp,
        )
        whole = last - first == columns
        stops = row_met == SOLID and whole and state[row] == ALL
        if state[row] == ALL and not stops:
            light[row * TILE_COLUMNS : row * TILE_COLUMNS + columns] = 1
        # Where the plane crosses the focus, the row has a part on either side.
        begins = shift[0] + first * shift[1] + row * shift[2]
        ends = shift[0] + (last - 1) * shift[1] + row * shift[2]
        begins = ends if begins == 0 else begins
        turn = last
        if begins * ends < 0:
            turn = first + 1
            while (shift[0] + turn * shift[1] + row * shift[2]) * begins > 0:
                turn += 1
        passing = np.float32(0)
        start = first
        while start < last:
            stop = turn if start < turn else last
            side = begins if start < turn else ends
            weight = weights[1 + (side > 0) - (side < 0)]
            pixel = np.uint64(row * TILE_COLUMNS + start)
            colour = np.uint64(start - first)
            length = np.uint64(stop - start)
            if stops:
                _add(sums, pixel, colours, colour, length, weight)
            else:
                passing += _blend(sums, light, pixel, colours, colour, length, weight, is_last)
            start = stop
        state[row] = NONE if whole and passing == 0 else SOME
        done = done and state[row] == NONE
    return done


@njit(cache=True, nogil=True)
def _trace(texels, tables, shifts, slopes, lens, weights, rim, window):
    """(h, w, 3) light of a window through one lens opening.

    shifts (S, L), slopes (S, L, 2): on layer l, the ray of pixel (x, y) through lens point s is
    shifted by ``shifts + slopes (x, y)`` times the lens point. weights (S, 3): transmission for
    sources behind, in and before the focus. rim (3,): displacement of the cat-eye's second rim at
    pixel (x, y) is (rim[0] + rim[2] x, rim[1] + rim[2] y).
    """
    samples, count = shifts.shape
    height = tables.shape[2] - 2
    width = tables.shape[3] - 2
    top, left, picture_height, picture_width = window
    picture = np.empty((picture_height, picture_width, 3), np.float32)
    flat = texels.reshape(-1)
    ramp = (np.arange(4 * (TILE_COLUMNS + BLOCK)) // 4).astype(np.float32)
    colours = np.empty(4 * (TILE_COLUMNS + BLOCK), np.float32)
    sums = np.empty(4 * TILE_ROWS * TILE_COLUMNS, np.float32)
    light = np.empty(TILE_ROWS * TILE_COLUMNS, np.float32)
    state = np.empty(TILE_ROWS, np.int64)
    for tile_y in range(top, top + picture_height, TILE_ROWS):
        rows = min(TILE_ROWS, top + picture_height - tile_y)
        for tile_x in range(left, left + picture_width, TILE_COLUMNS):
            columns = min(TILE_COLUMNS, left + picture_width - tile_x)
            sums[:] = 0
            for sample in range(samples):
                u = lens[sample, 0]
                v = lens[sample, 1]
                state[:] = ALL
                if rim[2] != 0:
                    rim_x = rim[0] + rim[2] * tile_x
                    rim_y = rim[1] + rim[2] * tile_y
                    _open_rows(state, light, u, v, rim_x, rim_y, rim[2], rows, columns)
                for layer in range(count):
                    # Over the tile, hits and shift are affine in the pixel.
                    along_x = slopes[sample, layer, 0]
                    along_y = slopes[sample, layer, 1]
                    shift = shifts[sample, layer] + along_x * tile_x + along_y * tile_y
                    x = tile_x + shift * u
                    y = tile_y + shift * v
                    hit = (x, y, 1 + along_x * u, along_x * v, along_y * u, 1 + along_y * v)
                    across_x = (columns - 1) * hit[2]
                    across_y = (columns - 1) * hit[3]
                    down_x = (rows - 1) * hit[4]
                    down_y = (rows - 1) * hit[5]
                    x_first = x + min(0.0, across_x) + min(0.0, down_x)
                    x_last = x + max(0.0, across_x) + max(0.0, down_x)
                    y_first = y + min(0.0, across_y) + min(0.0, down_y)
                    y_last = y + max(0.0, across_y) + max(0.0, down_y)
                    if x_last < 0 or x_first >= width or y_last < 0 or y_first >= height:
                        continue
                    met = _met(tables, layer, x_first, x_last, y_first, y_last)
                    if met == NOTHING and layer < count - 1:
                        continue
                    done = _trace_layer(
                        sums,
                        light,
                        state,
                        colours,
                        flat,
                        tables,
                        layer,
                        met,
                        rows,
                        columns,
                        hit,
                        (shift, along_x, along_y),
                        weights[sample],
                        ramp,
                    )
                    if done:
                        break
            for row in range(rows):
                for column in range(columns):
                    pixel = 4 * (row * TILE_COLUMNS + column)
                    counted = max(sums[pixel + 3], SMALLEST_WEIGHT)
                    for channel in range(3):
                        value = max(sums[pixel + channel], np.float32(0)) / counted
                        picture[tile_y - top + row, tile_x - left + column, channel] = value
    return picture

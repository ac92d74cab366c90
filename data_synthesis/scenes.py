"""Layered scenes: rooms and walls, things that stand or hang in them, light and shadow.

A scene is a stack of textured planes. It continues behind whatever occludes it, so a lens that
looks around an edge finds true light there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numba import njit
from scipy import ndimage

from bokehdiff.images import srgb_to_linear
from data_synthesis.lens import TEXELS_PER_PIXEL, pinhole_view
from data_synthesis.shapes import soften, solid_shape, thin_shape
from data_synthesis.textures import TextureBank

__all__ = ["LayeredScene", "compose_scene"]


@dataclass
class LayeredScene:
    """Planes of linear light on one canvas, nearest first.

    ``layers`` (L, H, W, 4) float32 premultiplied colour and opacity, in texels; the last layer is
    opaque everywhere. ``planes`` (L, 3): disparity ``d0 + dx X + dy Y`` at texel (X, Y), larger is
    nearer. ``lights`` (N, 7): layer, X, Y, radius in texels, additional radiance RGB. The picture
    is the square of ``size`` pixels (two texels each) that begins ``margin`` texels from the
    canvas border.
    """

    layers: np.ndarray
    planes: np.ndarray
    lights: np.ndarray
    margin: int
    size: int


@njit(cache=True, nogil=True)
def _place(layer, mask, texture, top, left, texture_top, texture_left, gain, shade, opacity):
    """Composites a textured mask over a layer, both premultiplied; outside parts are cut off.

    ``shade`` (4): brightness slope along x and y, darkening towards the sides (a cylinder), and
    towards the rim (a ball).
    """
    height, width, _ = layer.shape
    rows, columns = mask.shape
    texture_height, texture_width, _ = texture.shape
    for row in range(max(0, -top), min(rows, height - top)):
        y = top + row
        across_y = 2.0 * row / rows - 1
        for column in range(max(0, -left), min(columns, width - left)):
            alpha = mask[row, column] * opacity
            if alpha <= np.float32(0.002):
                continue
            x = left + column
            across_x = 2.0 * column / columns - 1
            brightness = 1 + shade[0] * across_x + shade[1] * across_y
            brightness -= shade[2] * across_x * across_x
            brightness -= shade[3] * (across_x * across_x + across_y * across_y)
            brightness = np.float32(max(brightness, 0.08)) * alpha
            texture_row = (texture_top + row) % texture_height
            texture_column = (texture_left + column) % texture_width
            keep = np.float32(1) - alpha
            for channel in range(3):
                colour = texture[texture_row, texture_column, channel] * gain[channel]
                layer[y, x, channel] = brightness * colour + keep * layer[y, x, channel]
            layer[y, x, 3] = alpha + keep * layer[y, x, 3]


@njit(cache=True, nogil=True)
def _cut_where_behind(layer, plane, solid_plane):
    """Removes what lies beyond another plane, with an edge one texel wide: feet end on floors."""
    height, width, _ = layer.shape
    d0 = plane[0] - solid_plane[0]
    dx = plane[1] - solid_plane[1]
    dy = plane[2] - solid_plane[2]
    steepness = max(math.sqrt(dx * dx + dy * dy), 1e-12)
    for y in range(height):
        for x in range(width):
            inside = (d0 + dx * x + dy * y) / steepness + 0.5
            if inside < 1:
                inside = np.float32(max(inside, 0.0))
                for channel in range(4):
                    layer[y, x, channel] *= inside


@njit(cache=True, nogil=True)
def _darken(layer, shadow, step, gradient_x, gradient_y, strength):
    """Multiplies a layer's light by a shadow map (coarser by ``step``) and a brightness slope."""
    height, width, _ = layer.shape
    rows, columns = shadow.shape
    for y in range(height):
        row_position = min(max((y + 0.5) / step - 0.5, 0.0), rows - 1.001)
        row = int(row_position)
        down = np.float32(row_position - row)
        for x in range(width):
            if layer[y, x, 3] == 0:
                continue
            column_position = min(max((x + 0.5) / step - 0.5, 0.0), columns - 1.001)
            column = int(column_position)
            right = np.float32(column_position - column)
            dark = (np.float32(1) - down) * (
                shadow[row, column] * (np.float32(1) - right) + shadow[row, column + 1] * right
            ) + down * (
                shadow[row + 1, column] * (np.float32(1) - right)
                + shadow[row + 1, column + 1] * right
            )
            slope = 1 + gradient_x * (2.0 * x / width - 1) + gradient_y * (2.0 * y / height - 1)
            factor = np.float32((1 - strength * min(dark, np.float32(1))) * max(slope, 0.1))
            for channel in range(3):
                layer[y, x, channel] *= factor


@dataclass
class _Sheet:
    """What is known of one layer before it is painted."""

    plane: np.ndarray  # (3,)
    kind: str  # "wall", "floor", "side", "solid" or "thin"
    boxes: list[tuple[int, int, int, int]] = field(default_factory=list)  # top, left, rows, columns


def _plane_through(
    disparity: float, x: float, y: float, slope_x: float, slope_y: float
) -> np.ndarray:
    return np.array([disparity - slope_x * x - slope_y * y, slope_x, slope_y])


def _at(plane: np.ndarray, x: float, y: float) -> float:
    return float(plane[0] + plane[1] * x + plane[2] * y)


def _background(rng: np.random.Generator, side: int, margin: int, near: float) -> list[_Sheet]:
    """Back wall (last) and the floor, ceiling and side walls of a room, in front of it."""
    tile = side - 2 * margin
    centre = side / 2
    far = rng.uniform(0.04, 0.3)
    if rng.uniform() < 0.42:
        # One plane: flat, or slanted in any direction (a table, the ground, a façade).
        slanted = rng.uniform() < 0.8
        span = rng.uniform(0.1, 1.0) * (near - far) if slanted else 0.0
        # Ground rises towards the lower edge more often than not.
        angle = rng.normal(math.pi / 2, 0.35) if rng.uniform() < 0.6 else rng.uniform(0, math.tau)
        slope_x, slope_y = span * math.cos(angle) / tile, span * math.sin(angle) / tile
        middle = far + span / 2
        return [_Sheet(_plane_through(middle, centre, centre, slope_x, slope_y), "wall")]
    slope = rng.normal(0, 0.1, 2) * far / tile if rng.uniform() < 0.5 else np.zeros(2)
    wall = _plane_through(far, centre, centre, slope[0], slope[1])
    sheets = []
    parts = {"floor": 0.85, "left": 0.22, "right": 0.22, "ceiling": 0.15}
    for name, chance in parts.items():
        if rng.uniform() > chance:
            continue
        # The crease where it meets the wall, and how near it comes at the border of the tile.
        crease = margin + tile * rng.uniform(0.12, 0.65)
        reach = (near - far) * rng.uniform(0.4, 1.3)
        rise = reach / max(margin + tile - crease, 1.0)
        skew = rng.normal(0, 0.08)
        plane = wall.copy()
        if name == "floor":
            plane += _plane_through(0, centre, crease, rise * skew, rise)
        elif name == "ceiling":
            plane += _plane_through(0, centre, side - crease, rise * skew, -rise)
        elif name == "left":
            plane += _plane_through(0, side - crease, centre, -rise, rise * skew)
        else:
            plane += _plane_through(0, crease, centre, rise, rise * skew)
        sheets.append(_Sheet(plane, "floor" if name == "floor" else "side"))
    rng.shuffle(sheets)
    return [*sheets, _Sheet(wall, "wall")]


def _foreground(
    rng: np.random.Generator, side: int, margin: int, near: float, background: list[_Sheet]
) -> list[_Sheet]:
    """Upright or slanted planes with things on them, nearest first, that do not intersect."""
    tile = side - 2 * margin
    centre = side / 2
    wall = background[-1]
    floors = [sheet for sheet in background if sheet.kind == "floor"]
    most = 10 - len(background)
    count = int(np.clip(rng.integers(2, 10), 2, most))
    far = _at(wall.plane, centre, centre)
    disparities = far + (near - far) * rng.beta(1.0, rng.choice([1.0, 1.6]), count) * 0.96
    disparities = np.sort(disparities + 0.02 * (near - far))[::-1]
    thin_chance = rng.choice([0.1, 0.25, 0.6], p=[0.5, 0.35, 0.15])
    crowded = rng.uniform() < 0.4
    sheets = []
    for index, disparity in enumerate(disparities):
        thin = rng.uniform() < thin_chance
        sheet = _Sheet(np.zeros(3), "thin" if thin else "solid")
        objects = 1 if thin else int(rng.integers(2, 8) if crowded else rng.integers(1, 4))
        for _ in range(objects):
            if thin and rng.uniform() < 0.6:
                rows = columns = side
                top = left = 0
            else:
                smallest, largest = (0.08, 0.4) if crowded else (0.18, 1.1)
                big = math.exp(rng.uniform(math.log(smallest), math.log(largest)))
                aspect = math.exp(rng.normal(0, 0.4))
                rows = int(np.clip(big * tile * math.sqrt(aspect), 8, side))
                columns = int(np.clip(big * tile / math.sqrt(aspect), 8, side))
                left = int(margin + rng.uniform(-0.1, 1.1) * tile - columns / 2)
                top = int(margin + rng.uniform(-0.1, 1.1) * tile - rows / 2)
                if floors and rng.uniform() < 0.75:
                    # Standing: the bottom where the floor has this disparity.
                    floor = floors[0].plane
                    x = left + columns / 2
                    ground = (disparity - floor[0] - floor[1] * x) / floor[2]
                    top = int(round(ground)) - rows
            sheet.boxes.append((top, left, rows, columns))
        # Own interval of disparities: between the neighbours' middles.
        above = disparities[index - 1] if index else disparity + 0.3
        below = disparities[index + 1] if index + 1 < count else far
        room = 0.9 * min(above - disparity, disparity - below) / 2
        slope_x = slope_y = 0.0
        if rng.uniform() < 0.6:
            reach = max(
                max(abs(top + rows - centre), abs(top - centre)) + columns
                for top, left, rows, columns in sheet.boxes
            )
            left_most = min(box[1] for box in sheet.boxes)
            right_most = max(box[1] + box[3] for box in sheet.boxes)
            reach = max(reach, (right_most - left_most) / 2, tile / 4)
            size = rng.uniform(0, 1) * room / reach
            angle = rng.uniform(0, math.tau)
            slope_x, slope_y = size * math.cos(angle), size * math.sin(angle)
        x = np.mean([box[1] + box[3] / 2 for box in sheet.boxes])
        y = np.mean([box[0] + box[2] / 2 for box in sheet.boxes])
        x, y = float(np.clip(x, 0, side)), float(np.clip(y, 0, side))
        sheet.plane = _plane_through(float(disparity), x, y, slope_x, slope_y)
        sheets.append(sheet)
    return sheets


def _tint(rng: np.random.Generator) -> np.ndarray:
    """(3,) float32 factors: how an object's material differs from its texture."""
    brightness = math.exp(rng.normal(0, 0.6))
    return (brightness * np.exp(rng.normal(0, 0.12, 3))).astype(np.float32)


def _object_shade(rng: np.random.Generator) -> np.ndarray:
    style = rng.uniform()
    shade = np.zeros(4)
    if style < 0.6:
        shade[:2] = rng.normal(0, 0.2, 2)
    if 0.4 < style < 0.75:
        shade[2] = rng.uniform(0.1, 0.8)
    elif style >= 0.75:
        shade[3] = rng.uniform(0.05, 0.5)
    return shade


def _paint_foreground(
    rng: np.random.Generator, sheet: _Sheet, layer: np.ndarray, bank: TextureBank, softness: float
) -> None:
    side = layer.shape[0]
    for top, left, rows, columns in sheet.boxes:
        if top >= side or left >= side or top + rows <= 0 or left + columns <= 0:
            continue
        if sheet.kind == "thin":
            mask = thin_shape(rng, rows, columns)
        else:
            mask = solid_shape(rng, rows, columns)
            if rng.uniform() < 0.15 and min(rows, columns) > 30:
                # A window in it, or a hole.
                hole = solid_shape(rng, rows // 2, columns // 2)
                y, x = rng.integers(0, rows // 2), rng.integers(0, columns // 2)
                mask[y : y + rows // 2, x : x + columns // 2] *= 1 - hole
        opacity = 1.0
        kind = rng.uniform()
        if kind < softness:
            mask = soften(mask, math.exp(rng.uniform(math.log(1.0), math.log(8.0))))
        elif kind < softness + 0.03:
            opacity = rng.uniform(0.3, 0.9)
        _place(
            layer,
            np.ascontiguousarray(mask, np.float32),
            bank.pick(),
            top,
            left,
            int(rng.integers(side)),
            int(rng.integers(side)),
            _tint(rng),
            _object_shade(rng),
            np.float32(opacity),
        )


def _shadows(rng: np.random.Generator, layers: np.ndarray) -> None:
    """Every layer's own slope of light, and the soft shadows of the layer in front of it."""
    count, side = layers.shape[:2]
    step = 4
    usable = side // step * step
    strength = rng.choice([0.0, rng.uniform(0.2, 0.8)], p=[0.3, 0.7])
    direction = rng.normal(0, 0.04, 2) * side / step
    light = rng.normal(0, 0.2, 2)
    none = np.zeros((side // step, side // step), np.float32)
    for index in range(count):
        shadow = none
        if strength and index:
            alpha = layers[index - 1, :usable:step, :usable:step, 3]
            width = max(3, int(rng.uniform(0.01, 0.08) * side / step))
            shadow = ndimage.uniform_filter(alpha, width, mode="nearest")
            shadow = np.roll(shadow, (int(direction[1]), int(direction[0])), (0, 1))
        slope = light + rng.normal(0, 0.12, 2)
        _darken(layers[index], np.ascontiguousarray(shadow), step, slope[0], slope[1], strength)


def _contact_shadows(
    rng: np.random.Generator, floor_layer: np.ndarray, sheets: list[_Sheet]
) -> None:
    """Dark ellipses under what stands on the floor."""
    side = floor_layer.shape[0]
    step = 4
    shadow = np.zeros((side // step, side // step), np.float32)
    y, x = np.ogrid[: side // step, : side // step]
    for sheet in sheets:
        if sheet.kind != "solid":
            continue
        for top, left, rows, columns in sheet.boxes:
            bottom, centre = (top + rows) / step, (left + columns / 2) / step
            spread_x, spread_y = columns / step * 0.6, max(columns / step * 0.15, 1.0)
            distance = ((x - centre) / spread_x) ** 2 + ((y - bottom) / spread_y) ** 2
            np.maximum(shadow, np.exp(-distance, dtype=np.float32), out=shadow)
    _darken(floor_layer, shadow, step, 0.0, 0.0, rng.uniform(0.3, 0.85))


def _lights(rng: np.random.Generator, scene: LayeredScene, chance: float) -> np.ndarray:
    """(N, 7) point lights and glints on opaque parts of the scene, far brighter than white."""
    if rng.uniform() >= chance:
        return np.zeros((0, 7))
    side = scene.layers.shape[1]
    glints = rng.uniform() < 0.4
    count = int(np.exp(rng.uniform(0, math.log(60 if glints else 30))))
    favourite = int(rng.integers(len(scene.layers)))
    same_colour = srgb_to_linear((1 - rng.beta(1, 3, 3)).astype(np.float32))
    lights = []
    for _ in range(count):
        layer = favourite if rng.uniform() < 0.6 else int(rng.integers(len(scene.layers)))
        for _ in range(12):
            x, y = rng.uniform(8, side - 8, 2)
            around = scene.layers[layer, int(y) - 2 : int(y) + 4, int(x) - 2 : int(x) + 4, 3]
            if around.min() > 0.99:
                break
        else:
            continue
        if glints:
            radius, radiance = rng.uniform(0.8, 2.0), math.exp(rng.uniform(0.5, math.log(30)))
        else:
            radius, radiance = rng.uniform(1.2, 5.5), math.exp(rng.uniform(math.log(5), 4.6))
        colour = (
            same_colour
            if rng.uniform() < 0.6
            else srgb_to_linear((1 - rng.beta(0.8, 2.5, 3)).astype(np.float32))
        )
        lights.append([layer, x, y, radius, *(radiance * colour)])
    return np.array(lights, np.float64).reshape(-1, 7)


def compose_scene(
    rng: np.random.Generator, size: int, margin_pixels: int, light_chance: float = 0.25
) -> LayeredScene:
    """A random scene of 3 to 10 layers on a canvas of ``size + 2 margin_pixels`` pixels a side."""
    margin = TEXELS_PER_PIXEL * margin_pixels
    side = TEXELS_PER_PIXEL * size + 2 * margin
    near = rng.uniform(0.6, 1.0)
    background = _background(rng, side, margin, near)
    foreground = _foreground(rng, side, margin, near, background)
    sheets = foreground + background
    planes = np.stack([sheet.plane for sheet in sheets])
    layers = np.zeros((len(sheets), side, side, 4), np.float32)
    bank = TextureBank(rng, side, side, most=int(rng.integers(3, 6)))
    softness = float(rng.choice([0.03, 0.12, 0.4], p=[0.5, 0.4, 0.1]))
    whole = np.ones((side, side), np.float32)
    for index, sheet in enumerate(sheets):
        if sheet.kind in ("solid", "thin"):
            _paint_foreground(rng, sheet, layers[index], bank, softness)
        else:
            texture = bank.texture() if rng.uniform() < 0.6 else bank.pick()
            middle = side / 2
            top, bottom = _at(sheet.plane, middle, 0), _at(sheet.plane, middle, side)
            if sheet.kind == "floor" or rng.uniform() < 0.4:
                limit = 0.12 * max(top, bottom)
                texture = bank.on_floor(texture, max(top, limit), max(bottom, limit))
            tint = _tint(rng)
            _place(layers[index], whole, texture, 0, 0, 0, 0, tint, np.zeros(4), np.float32(1))
        # Everything ends where it meets the planes of the room behind it.
        for behind in background:
            if behind is sheet:
                break
            _cut_where_behind(layers[index], sheet.plane, behind.plane)
    for index, sheet in enumerate(sheets):
        if sheet.kind == "floor" and rng.uniform() < 0.6:
            _contact_shadows(rng, layers[index], foreground)
    _shadows(rng, layers)
    scene = LayeredScene(layers, planes, np.zeros((0, 7)), margin, size)
    # Exposure and white balance: from night to bright sun, sometimes partly over-exposed.
    picture, _ = pinhole_view(layers, planes, margin, size)
    key = math.exp(rng.normal(math.log(0.2), 0.6))
    brightness = max(float(picture.mean()), 1e-3)
    if rng.uniform() < 0.85:
        # Exposed so that hardly anything is clipped.
        key = min(key, brightness / max(float(np.quantile(picture, 0.99)), 1e-3))
    gain = key / brightness * np.exp(rng.normal(0, 0.06, 3))
    layers[..., :3] *= gain.astype(np.float32)
    scene.lights = _lights(rng, scene, light_chance)
    return scene

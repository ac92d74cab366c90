"""Outlines of things: opacity masks from solid blobs down to hair, drawn with sub-texel edges."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from data_synthesis.textures import PRINTABLE

__all__ = ["SOLID_SHAPES", "THIN_SHAPES", "soften", "solid_shape", "thin_shape"]

SOLID_SHAPES = (
    "blob", "polygon", "box", "ellipse", "ring", "star", "letter", "lattice", "profile",
    "person", "tree", "plant", "furniture", "cluster", "noise",
)  # fmt: skip
_SOLID_CHANCES = np.array([12, 8, 12, 9, 5, 3, 6, 5, 9, 6, 6, 6, 5, 5, 3], float)
THIN_SHAPES = ("wires", "branches", "grass", "hair", "fence", "net", "twigs")

# Masks are drawn this many times finer than the texels, then averaged.
OVERSAMPLING = 2


class _Sheet:
    """A drawing area in texels: coordinates from 0 to width and height, drawn oversampled."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.image = Image.new("L", (width * OVERSAMPLING, height * OVERSAMPLING), 0)
        self.draw = ImageDraw.Draw(self.image)
        self.leaves = False  # whether branches bear leaves

    def polygon(self, points: np.ndarray, fill: int = 255) -> None:
        scaled = np.asarray(points, float) * OVERSAMPLING
        self.draw.polygon([(float(x), float(y)) for x, y in scaled], fill=fill)

    def line(self, points: np.ndarray, width: float, fill: int = 255) -> None:
        scaled = np.asarray(points, float) * OVERSAMPLING
        self.draw.line(
            [(float(x), float(y)) for x, y in scaled],
            fill=fill,
            width=max(1, round(width * OVERSAMPLING)),
            joint="curve",
        )

    def ellipse(self, x: float, y: float, a: float, b: float, fill: int = 255) -> None:
        a, b = max(abs(a), 0.25), max(abs(b), 0.25)
        box = [(x - a), (y - b), (x + a), (y + b)]
        self.draw.ellipse([value * OVERSAMPLING for value in box], fill=fill)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: int = 255) -> None:
        self.polygon(np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]), fill)

    def mask(self) -> np.ndarray:
        reduced = self.image.reduce(OVERSAMPLING)
        return np.asarray(reduced, np.float32) * np.float32(1 / 255)


def soften(mask: np.ndarray, sigma: float) -> np.ndarray:
    """The mask blurred by a Gaussian of ``sigma`` texels: hair fringes, smoke, motion, glass."""
    return ndimage.gaussian_filter(mask, sigma, mode="constant", truncate=2.5)


def _turned(points: np.ndarray, angle: float, centre: tuple[float, float]) -> np.ndarray:
    cosine, sine = math.cos(angle), math.sin(angle)
    return points @ np.array([[cosine, sine], [-sine, cosine]]) + np.array(centre)


def solid_shape(
    rng: np.random.Generator, height: int, width: int, kind: str | None = None
) -> np.ndarray:
    """(height, width) float32 opacity of one thing that about fills the box and stands on its
    bottom edge. ``kind``: one of SOLID_SHAPES, drawn when None."""
    if kind is None:
        kind = str(rng.choice(SOLID_SHAPES, p=_SOLID_CHANCES / _SOLID_CHANCES.sum()))
    if kind not in SOLID_SHAPES:
        raise ValueError(f"kind is {kind!r}; wanted one of {SOLID_SHAPES}.")
    if kind == "noise":
        # Torn edges and islands: a fractal field above a level that rises towards the rim.
        coarse = rng.standard_normal((max(height // 8, 2), max(width // 8, 2)), np.float32)
        field = ndimage.zoom(
            ndimage.gaussian_filter(coarse, 1.0),
            (height / coarse.shape[0], width / coarse.shape[1]),
            order=1,
        )[:height, :width]
        field = field / max(float(field.std()), 1e-6)
        detail = ndimage.gaussian_filter(rng.standard_normal(field.shape, np.float32), 1.5)
        field = field + 0.3 * detail * 5
        y, x = np.ogrid[: field.shape[0], : field.shape[1]]
        rim = (2 * x / width - 1) ** 4 + (2 * y / height - 1) ** 4
        mask = np.zeros((height, width), np.float32)
        inside = np.clip((field + 0.5 - 3 * rim) * 3 + 0.5, 0, 1)
        mask[: field.shape[0], : field.shape[1]] = inside
        return mask
    sheet = _Sheet(height, width)
    globals()[f"_draw_{kind}"](rng, sheet, float(width), float(height))
    return sheet.mask()


def thin_shape(
    rng: np.random.Generator, height: int, width: int, kind: str | None = None
) -> np.ndarray:
    """(height, width) float32 opacity of thin structures all over the sheet; sizes in texels.

    ``kind``: one of THIN_SHAPES, drawn when None.
    """
    if kind is None:
        kind = str(rng.choice(THIN_SHAPES))
    if kind not in THIN_SHAPES:
        raise ValueError(f"kind is {kind!r}; wanted one of {THIN_SHAPES}.")
    sheet = _Sheet(height, width)
    globals()[f"_draw_{kind}"](rng, sheet, float(width), float(height))
    return sheet.mask()


def _draw_blob(rng, sheet, w, h):
    angle = np.linspace(0, math.tau, 96, endpoint=False)
    radius = np.ones_like(angle)
    for harmonic in range(2, int(rng.integers(3, 12))):
        amplitude = rng.normal(0, 0.35) / harmonic**1.2
        radius += amplitude * np.cos(harmonic * angle + rng.uniform(0, math.tau))
    radius = np.maximum(radius, 0.15)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    x = (x - x.min()) / (x.max() - x.min()) * w
    y = (y - y.min()) / (y.max() - y.min()) * h
    sheet.polygon(np.stack([x, y], 1))


def _draw_polygon(rng, sheet, w, h):
    corners = int(rng.integers(3, 8))
    angle = np.sort(rng.uniform(0, math.tau, corners))
    radius = rng.uniform(0.6, 1.0, corners)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    x = (x - x.min()) / max(x.max() - x.min(), 1e-3) * w
    y = (y - y.min()) / max(y.max() - y.min(), 1e-3) * h
    sheet.polygon(np.stack([x, y], 1))


def _draw_box(rng, sheet, w, h):
    angle = 0.0 if rng.uniform() < 0.5 else rng.uniform(-0.5, 0.5)
    half = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    shrink = 1 / (abs(math.cos(angle)) + abs(math.sin(angle)))
    sheet.polygon(_turned(half * np.array([w, h]) * shrink, angle, (w / 2, h / 2)))


def _draw_ellipse(rng, sheet, w, h):
    sheet.ellipse(w / 2, h / 2, w / 2, h / 2)


def _draw_ring(rng, sheet, w, h):
    thickness = rng.uniform(0.06, 0.3)
    if rng.uniform() < 0.5:
        sheet.ellipse(w / 2, h / 2, w / 2, h / 2)
        inner = 1 - 2 * thickness
        sheet.ellipse(w / 2, h / 2, w / 2 * inner, h / 2 * inner, fill=0)
    else:
        border = thickness * min(w, h)
        sheet.box(0, 0, w, h)
        sheet.box(border, border, w - border, h - border, fill=0)


def _draw_star(rng, sheet, w, h):
    points = int(rng.integers(4, 11))
    angle = np.arange(2 * points) * math.pi / points + rng.uniform(0, math.tau)
    radius = np.where(np.arange(2 * points) % 2, rng.uniform(0.25, 0.75), 1.0)
    sheet.polygon(
        np.stack([(1 + radius * np.cos(angle)) * w / 2, (1 + radius * np.sin(angle)) * h / 2], 1)
    )


def _draw_letter(rng, sheet, w, h):
    text = "".join(rng.choice(list(PRINTABLE), int(rng.integers(1, 4))))
    size = max(h * OVERSAMPLING, 8.0)
    font = ImageFont.load_default(size=size)
    x0, y0, x1, y1 = sheet.draw.textbbox((0, 0), text, font=font)
    letters = Image.new("L", (max(int(x1 - x0), 1), max(int(y1 - y0), 1)), 0)
    ImageDraw.Draw(letters).text((-x0, -y0), text, fill=255, font=font)
    sheet.image = letters.resize(sheet.image.size, Image.Resampling.BILINEAR)


def _draw_lattice(rng, sheet, w, h):
    bars = int(rng.integers(2, 7))
    thickness = rng.uniform(0.04, 0.2) * min(w, h) / bars * 2
    for index in range(bars + 1):
        x = index / bars * (w - thickness)
        sheet.box(x, 0, x + thickness, h)
    for index in range(int(rng.integers(2, 6))):
        y = index / 4 * (h - thickness)
        sheet.box(0, y, w, y + thickness)


def _draw_profile(rng, sheet, w, h):
    """A turned thing: bottle, vase, lamp, chess piece, column."""
    heights = np.linspace(0, 1, 48)
    knots = np.clip(rng.normal(0.6, 0.3, int(rng.integers(3, 8))), 0.12, 1)
    half = np.interp(heights, np.linspace(0, 1, len(knots)), knots)
    half = ndimage.uniform_filter1d(half, int(rng.choice([1, 5, 9])), mode="nearest")
    half = half / half.max() * w / 2
    x = np.concatenate([w / 2 - half, (w / 2 + half)[::-1]])
    y = np.concatenate([heights, heights[::-1]]) * h
    sheet.polygon(np.stack([x, y], 1))


def _draw_person(rng, sheet, w, h):
    head = 0.08 * h
    sheet.ellipse(w / 2 + rng.normal(0, 0.03) * w, head, min(0.25 * w, head * 0.8), head)
    shoulder, hip = rng.uniform(0.35, 0.5) * w, rng.uniform(0.2, 0.35) * w
    top, waist = 0.17 * h, rng.uniform(0.48, 0.56) * h
    centre = w / 2
    sheet.box(centre - 0.06 * w, head, centre + 0.06 * w, top + 2)
    sheet.polygon(
        np.array(
            [
                [centre - shoulder, top + 0.02 * h],
                [centre, top],
                [centre + shoulder, top + 0.02 * h],
                [centre + hip, waist],
                [centre - hip, waist],
            ]
        )
    )
    for side in (-1, 1):
        hand = centre + side * rng.uniform(0.25, 0.5) * w
        sheet.line(
            np.array(
                [
                    [centre + side * shoulder * 0.9, top + 0.03 * h],
                    [centre + side * rng.uniform(0.35, 0.48) * w, rng.uniform(0.3, 0.4) * h],
                    [hand, rng.uniform(0.25, 0.56) * h],
                ]
            ),
            0.09 * w,
        )
        foot = centre + side * rng.uniform(0.08, 0.42) * w
        sheet.line(np.array([[centre + side * hip * 0.5, waist], [foot, h]]), 0.16 * w)


def _draw_tree(rng, sheet, w, h):
    trunk = rng.uniform(0.04, 0.12) * w
    sheet.box(w / 2 - trunk, 0.4 * h, w / 2 + trunk, h)
    for _ in range(int(rng.integers(30, 160))):
        angle, distance = rng.uniform(0, math.tau), math.sqrt(rng.uniform())
        size = rng.uniform(0.02, 0.09) * w
        sheet.ellipse(
            w / 2 + distance * 0.44 * w * math.cos(angle),
            0.32 * h + distance * 0.3 * h * math.sin(angle),
            size,
            size * rng.uniform(0.5, 1.2),
        )


def _leaf(sheet, x, y, length, breadth, angle):
    along = np.linspace(0, 1, 7)
    half = np.sin(along * math.pi) * breadth / 2
    outline = np.concatenate(
        [np.stack([along * length, half], 1), np.stack([along * length, -half], 1)[::-1]]
    )
    sheet.polygon(_turned(outline, angle, (x, y)))


def _draw_plant(rng, sheet, w, h):
    for _ in range(int(rng.integers(1, 5))):
        base, tip = w * rng.uniform(0.4, 0.6), w * rng.uniform(0.1, 0.9)
        bend = rng.uniform(0.2, 0.8)
        t = np.linspace(0, 1, 12)
        x = base + (tip - base) * t ** (1 + bend)
        y = h * (1 - t * rng.uniform(0.7, 0.95))
        sheet.line(np.stack([x, y], 1), max(0.02 * w, 0.6))
        for index in range(2, 12):
            for side in (-1, 1):
                _leaf(
                    sheet,
                    x[index],
                    y[index],
                    rng.uniform(0.12, 0.32) * min(w, h),
                    rng.uniform(0.03, 0.1) * min(w, h),
                    -math.pi / 2 + side * rng.uniform(0.4, 1.5),
                )


def _draw_furniture(rng, sheet, w, h):
    leg = rng.uniform(0.04, 0.1) * w
    seat, thickness = rng.uniform(0.3, 0.6) * h, rng.uniform(0.04, 0.12) * h
    sheet.box(0, seat, w, seat + thickness)
    for x in (0.0, w - leg):
        sheet.box(x, seat, x + leg, h)
    if rng.uniform() < 0.6:
        sheet.box(0, 0, leg, seat)
        sheet.box(w - leg if rng.uniform() < 0.5 else 0, 0, w, rng.uniform(0.05, 0.3) * h)
    for _ in range(int(rng.integers(0, 4))):
        x, size = rng.uniform(0, 0.8) * w, rng.uniform(0.08, 0.25) * w
        sheet.box(x, seat - size * rng.uniform(0.4, 2), x + size, seat)


def _draw_cluster(rng, sheet, w, h):
    """Fruit, flowers, pebbles, balloons."""
    for _ in range(int(rng.integers(4, 30))):
        size = min(w, h) * np.exp(rng.uniform(math.log(0.04), math.log(0.22)))
        sheet.ellipse(
            rng.uniform(size, max(w - size, size + 0.1)),
            rng.uniform(size, max(h - size, size + 0.1)),
            size,
            size * rng.uniform(0.6, 1.0),
        )


def _curve(rng, start, end, sag, steps=24):
    t = np.linspace(0, 1, steps)[:, None]
    middle = (np.asarray(start) + np.asarray(end)) / 2 + np.asarray(sag)
    return (1 - t) ** 2 * np.asarray(start) + 2 * t * (1 - t) * middle + t**2 * np.asarray(end)


def _draw_wires(rng, sheet, w, h):
    for _ in range(int(rng.integers(1, 9))):
        steep = rng.uniform() < 0.3
        start = [rng.uniform(0, w), -4] if steep else [-4, rng.uniform(0, h)]
        end = [rng.uniform(0, w), h + 4] if steep else [w + 4, rng.uniform(0, h)]
        curve = _curve(rng, start, end, rng.normal(0, 0.15, 2) * [w, h])
        sheet.line(curve, np.exp(rng.uniform(math.log(0.5), math.log(6))))


def _branch(rng, sheet, x, y, angle, length, width, depth):
    steps = max(3, int(length / 10))
    points = [(x, y)]
    for _ in range(steps):
        angle += rng.normal(0, 0.12)
        x, y = x + math.cos(angle) * length / steps, y + math.sin(angle) * length / steps
        points.append((x, y))
    sheet.line(np.array(points), width)
    if depth > 0:
        for _ in range(int(rng.integers(2, 4))):
            px, py = points[int(rng.integers(1, len(points)))]
            _branch(
                rng, sheet, px, py, angle + rng.choice([-1, 1]) * rng.uniform(0.3, 1.0),
                length * rng.uniform(0.5, 0.8), max(width * 0.65, 0.5), depth - 1,
            )  # fmt: skip
    elif sheet.leaves:
        for px, py in points[1:]:
            size = rng.uniform(3, 11)
            _leaf(sheet, px, py, size, size * 0.4, rng.uniform(0, math.tau))


def _draw_branches(rng, sheet, w, h):
    sheet.leaves = bool(rng.uniform() < 0.5)
    for _ in range(int(rng.integers(1, 4))):
        side = rng.uniform(0, math.tau)
        x, y = w / 2 + math.cos(side) * 0.7 * w, h / 2 + math.sin(side) * 0.7 * h
        x, y = float(np.clip(x, -5, w + 5)), float(np.clip(y, -5, h + 5))
        angle = math.atan2(h / 2 - y, w / 2 - x) + rng.normal(0, 0.4)
        _branch(rng, sheet, x, y, angle, rng.uniform(0.35, 0.8) * h, rng.uniform(2, 12), 4)


def _draw_grass(rng, sheet, w, h):
    tall = rng.uniform(0.15, 0.8) * h
    broad = np.exp(rng.uniform(math.log(1), math.log(7)))
    spread = rng.uniform(0.1, 0.6)
    for _ in range(int(rng.integers(15, 130))):
        x, length = rng.uniform(-0.1, 1.1) * w, tall * rng.uniform(0.4, 1.0)
        lean = rng.normal(0, spread)
        t = np.linspace(0, 1, 9)
        bend = x + lean * length * t**2
        y = h + 3 - t * length * (1 - 0.3 * abs(lean) * t)
        half = broad * rng.uniform(0.5, 1.2) * (1 - t) * 0.5 + 0.15
        outline = np.concatenate(
            [np.stack([bend - half, y], 1), np.stack([bend + half, y], 1)[::-1]]
        )
        sheet.polygon(outline)


def _draw_hair(rng, sheet, w, h):
    for _ in range(int(rng.integers(1, 5))):
        root, tip = rng.uniform(-0.1, 1.1, 2) * [w, h], rng.uniform(-0.1, 1.1, 2) * [w, h]
        sag = rng.normal(0, 0.3, 2) * [w, h]
        for _ in range(int(rng.integers(8, 50))):
            curve = _curve(
                rng,
                root + rng.normal(0, 0.04, 2) * w,
                tip + rng.normal(0, 0.12, 2) * w,
                sag + rng.normal(0, 0.06, 2) * w,
                16,
            )
            sheet.line(curve, rng.uniform(0.4, 1.3), fill=int(rng.integers(120, 256)))


def _draw_fence(rng, sheet, w, h):
    gap, bar = rng.uniform(12, 70), rng.uniform(2, 14)
    angle = rng.normal(0, 0.15)
    reach = math.hypot(w, h)
    if rng.uniform() < 0.3:
        angle += math.pi / 2
    normal = np.array([math.cos(angle), math.sin(angle)])
    along = np.array([-normal[1], normal[0]])
    for offset in np.arange(-reach, reach, gap):
        centre = np.array([w / 2, h / 2]) + normal * offset
        sheet.line(np.array([centre - along * reach, centre + along * reach]), bar)
    for _ in range(int(rng.integers(0, 3))):
        centre = np.array([w / 2, h / 2]) + along * rng.uniform(-0.4, 0.4) * h
        sheet.line(np.array([centre - normal * reach, centre + normal * reach]), bar)


def _draw_net(rng, sheet, w, h):
    gap, wire = rng.uniform(14, 60), np.exp(rng.uniform(math.log(0.6), math.log(4)))
    reach = math.hypot(w, h)
    tilt = rng.choice([0, math.pi / 4, rng.uniform(0, math.pi)])
    for angle in (tilt, tilt + math.pi / 2 + rng.normal(0, 0.1)):
        normal = np.array([math.cos(angle), math.sin(angle)])
        along = np.array([-normal[1], normal[0]])
        for offset in np.arange(-reach, reach, gap):
            centre = np.array([w / 2, h / 2]) + normal * offset
            sheet.line(np.array([centre - along * reach, centre + along * reach]), wire)


def _draw_twigs(rng, sheet, w, h):
    """Sparse leaves, petals and stalks all over: confetti, snow, foliage seen through."""
    size = np.exp(rng.uniform(math.log(3), math.log(24)))
    for _ in range(int(min(220, 0.25 * w * h / size**2 * rng.uniform(0.2, 1.0)))):
        x, y = rng.uniform(0, w), rng.uniform(0, h)
        angle = rng.uniform(0, math.tau)
        length = size * rng.uniform(0.5, 1.6)
        if rng.uniform() < 0.3:
            tip = (x + math.cos(angle) * length * 2, y + math.sin(angle) * length * 2)
            sheet.line(np.array([[x, y], tip]), max(0.5, size * 0.07))
        _leaf(sheet, x, y, length, length * rng.uniform(0.25, 0.7), angle)

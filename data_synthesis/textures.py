"""Textures with the statistics of photographs, made from nothing but random numbers.

A texture is two scalar fields, a tone and a mixing weight, painted through two colour ramps:
fractal (1/f) noise, dead leaves with power-law sizes, patterns, print, smooth gradients. The tone
carries the luminance; the slowly varying mixing weight makes colours correlate as in photographs.
"""

from __future__ import annotations

import colorsys
import math

import numpy as np
from numba import njit
from PIL import Image, ImageDraw, ImageFont
from scipy import fft

from bokehdiff.images import srgb_to_linear

__all__ = ["TextureBank", "fractal_noise", "natural_hue", "random_ramp"]

# Kinds of texture and how often each is drawn.
TEXTURE_CHANCES = {
    "fractal": 0.2,
    "leaves": 0.2,
    "pattern": 0.17,
    "print": 0.08,
    "gradient": 0.11,
    "grain": 0.07,
    "blotches": 0.07,
    "foliage": 0.1,
}
PRINTABLE = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789&%?!.,:;+-*/()"


def fractal_noise(
    rng: np.random.Generator, height: int, width: int, exponent: float, stretch: float = 1.0
) -> np.ndarray:
    """(height, width) float32, mean 0, deviation 1, amplitude spectrum 1 / f^exponent.

    Photographs have exponents near 1. ``stretch`` > 1 draws the structures out along x (wood).
    """
    fast_height, fast_width = fft.next_fast_len(height, True), fft.next_fast_len(width, True)
    shape = (fast_height, fast_width // 2 + 1)
    # Zero frequency is replaced by one cycle: the mean is taken away afterwards in any case.
    y = fft.fftfreq(fast_height).astype(np.float32)[:, None] * fast_height
    x = fft.rfftfreq(fast_width).astype(np.float32)[None] * fast_width * stretch
    amplitude = np.maximum(y * y + x * x, 1) ** np.float32(-exponent / 2)
    spectrum = rng.standard_normal(shape, np.float32) + 1j * rng.standard_normal(shape, np.float32)
    spectrum *= amplitude
    spectrum[0, 0] = 0
    field = fft.irfft2(spectrum, s=(fast_height, fast_width), workers=1)[:height, :width]
    return ((field - field.mean()) / max(float(field.std()), 1e-9)).astype(np.float32)


def random_ramp(
    rng: np.random.Generator,
    hue: float | None = None,
    saturation: float | None = None,
    darkest: float | None = None,
    brightest: float | None = None,
) -> np.ndarray:
    """(256, 3) float32 linear colours from a dark to a bright tone of related hues.

    Saturation is mostly low, as in photographs; missing arguments are drawn.
    """
    hue = natural_hue(rng) if hue is None else hue
    if saturation is None:
        saturation = rng.beta(1.2, 4.5) if rng.uniform() < 0.8 else rng.beta(2.5, 1.5)
    darkest = rng.uniform(0.02, 0.4) if darkest is None else darkest
    brightest = rng.uniform(max(darkest + 0.15, 0.45), 1.0) if brightest is None else brightest
    stops = int(rng.integers(2, 5))
    colours = []
    for value in np.linspace(darkest, brightest, stops):
        stop_hue = (hue + rng.normal(0, 0.04)) % 1.0
        stop_saturation = float(np.clip(saturation * rng.uniform(0.6, 1.3), 0, 1))
        if rng.uniform() < 0.08:
            stop_hue = rng.uniform()
        colours.append(colorsys.hsv_to_rgb(stop_hue, stop_saturation, float(value)))
    positions = np.linspace(0, 1, stops)
    ramp = np.stack(
        [np.interp(np.linspace(0, 1, 256), positions, np.array(colours)[:, c]) for c in range(3)],
        axis=1,
    )
    return srgb_to_linear(ramp.astype(np.float32))


def natural_hue(rng: np.random.Generator) -> float:
    """Hue in [0, 1): skin, wood, brick and soil, foliage and sky more often than the others."""
    kind = rng.uniform()
    if kind < 0.45:
        return float(rng.normal(0.08, 0.035) % 1.0)
    if kind < 0.6:
        return float(rng.normal(0.26, 0.05) % 1.0)
    if kind < 0.78:
        return float(rng.normal(0.58, 0.04) % 1.0)
    return float(rng.uniform())


@njit(cache=True, nogil=True)
def _paint(tone, mix, ramp_a, ramp_b):
    height, width = tone.shape
    colours = np.empty((height, width, 3), np.float32)
    for y in range(height):
        for x in range(width):
            index = int(min(max(tone[y, x], np.float32(0)), np.float32(1)) * np.float32(255))
            weight = min(max(mix[y, x], np.float32(0)), np.float32(1))
            for channel in range(3):
                a = ramp_a[index, channel]
                colours[y, x, channel] = a + weight * (ramp_b[index, channel] - a)
    return colours


@njit(cache=True, nogil=True)
def _dead_leaves(tone, mix, leaves, detail):
    """Paints leaves (N, 11) over tone and mix, later ones on top, rims anti-aliased.

    Columns: x, y, half axes a, b, cosine, sine, shape (0 ellipse, 1 diamond, 2 box), tone, mix,
    tone slope along the leaf, amount of ``detail`` (a noise field) on it.
    """
    height, width = tone.shape
    for index in range(leaves.shape[0]):
        x0, y0, a, b, cosine, sine, shape, leaf_tone, leaf_mix, slope, rough = leaves[index]
        reach = math.hypot(a, b) + 1
        for y in range(max(int(y0 - reach), 0), min(int(y0 + reach) + 1, height)):
            for x in range(max(int(x0 - reach), 0), min(int(x0 + reach) + 1, width)):
                along = (cosine * (x - x0) + sine * (y - y0)) / a
                across = (cosine * (y - y0) - sine * (x - x0)) / b
                if shape == 0:
                    size = math.sqrt(along * along + across * across)
                elif shape == 1:
                    size = abs(along) + abs(across)
                else:
                    size = max(abs(along), abs(across))
                inside = (1 - size) * min(a, b) + 0.5
                if inside <= 0:
                    continue
                inside = min(inside, 1.0)
                value = leaf_tone + slope * along + rough * detail[y, x]
                tone[y, x] += np.float32(inside) * np.float32(value - tone[y, x])
                mix[y, x] += np.float32(inside) * np.float32(leaf_mix - mix[y, x])


@njit(cache=True, nogil=True)
def _soft_step(distance):
    return min(1.0, max(0.0, distance + 0.5))


@njit(cache=True, nogil=True)
def _pattern(kind, height, width, period, duty, cosine, sine, warp, warp_x, tones):
    """Tone and mix of a repeated pattern, edges one texel wide.

    ``kind``: 0 stripes, 1 checks, 2 bricks, 3 dots, 4 grid, 5 weave, 6 sine waves. ``period`` in
    texels; ``tones`` (64,): random tone offsets of single cells.
    """
    tone = np.empty((height, width), np.float32)
    mix = np.empty((height, width), np.float32)
    for y in range(height):
        for x in range(width):
            along = cosine * x + sine * y + warp * warp_x[y, x]
            across = cosine * y - sine * x + warp * warp_x[height - 1 - y, x]
            p = along / period
            q = across / period
            column = math.floor(p)
            row = math.floor(q)
            value = 0.0
            cell = 0
            if kind == 0:
                value = _soft_step((duty / 2 - abs(p - column - 0.5)) * period)
                cell = int(column)
            elif kind == 1:
                edge_p = (0.5 - abs(p - column - 0.5)) * period
                edge_q = (0.5 - abs(q - row - 0.5)) * period
                parity = (int(column) + int(row)) & 1
                edge = _soft_step(min(edge_p, edge_q))
                value = edge if parity else 1 - edge
                cell = int(column) * 7 + int(row)
            elif kind == 2:
                q = across / (period * 0.45)
                row = math.floor(q)
                p = p + 0.5 * (int(row) & 1)
                column = math.floor(p)
                edge_p = (0.5 - abs(p - column - 0.5)) * period
                edge_q = (0.5 - abs(q - row - 0.5)) * period * 0.45
                value = _soft_step(min(edge_p, edge_q) - 0.06 * period)
                cell = int(column) * 13 + int(row) * 5
            elif kind == 3:
                dx = p - column - 0.5
                dy = q - row - 0.5
                value = _soft_step((duty * 0.5 - math.sqrt(dx * dx + dy * dy)) * period)
                cell = int(column) * 11 + int(row) * 3
            elif kind == 4:
                edge_p = (0.5 - abs(p - column - 0.5)) * period
                edge_q = (0.5 - abs(q - row - 0.5)) * period
                value = _soft_step(min(edge_p, edge_q) - 0.5 * (1 - duty) * period * 0.3)
                cell = int(column) * 3 + int(row) * 17
            elif kind == 5:
                a = 0.5 + 0.5 * math.sin(math.tau * p)
                b = 0.5 + 0.5 * math.sin(math.tau * q)
                value = a if ((int(column) + int(row)) & 1) else b
            else:
                value = 0.5 + 0.5 * math.sin(math.tau * p)
            tone[y, x] = value
            mix[y, x] = tones[cell & 63]
    return tone, mix


@njit(cache=True, nogil=True)
def _perspective(texture, disparity_top, disparity_bottom, scale):
    """A texture lying on a plane whose disparity runs from the first row to the last."""
    height, width, channels = texture.shape
    out = np.empty_like(texture)
    nearest = max(disparity_top, disparity_bottom)
    for y in range(height):
        disparity = disparity_top + (disparity_bottom - disparity_top) * y / (height - 1)
        ratio = scale * nearest / disparity
        v = abs(ratio * height) % (2 * height - 2)
        v = v if v < height - 1 else 2 * height - 2 - v
        row = min(int(v), height - 2)
        down = np.float32(v - row)
        for x in range(width):
            u = abs((x - width / 2) * ratio * 0.7 + width * 0.5) % (2 * width - 2)
            u = u if u < width - 1 else 2 * width - 2 - u
            column = min(int(u), width - 2)
            right = np.float32(u - column)
            for channel in range(channels):
                top = texture[row, column, channel] * (1 - right)
                top += texture[row, column + 1, channel] * right
                bottom = texture[row + 1, column, channel] * (1 - right)
                bottom += texture[row + 1, column + 1, channel] * right
                out[y, x, channel] = top * (1 - down) + bottom * down
    return out


class TextureBank:
    """Random textures of one scene, all (height, width, 3) float32 linear light in [0, 1].

    The costly noise fields are drawn once and reused shifted and mirrored; ``texture()`` makes a
    new texture, ``pick()`` hands out one of those made so far or a new one.
    """

    def __init__(self, rng: np.random.Generator, height: int, width: int, most: int = 4) -> None:
        self.rng, self.height, self.width, self.most = rng, height, width, most
        # Some scenes keep to one family of hues, most mix freely.
        self.hue: float | None = natural_hue(rng) if rng.uniform() < 0.2 else None
        self._fields: dict[str, np.ndarray] = {}
        self._made: list[np.ndarray] = []

    def noise(self, kind: str = "natural") -> np.ndarray:
        """(height, width) noise of deviation 1: "smooth", "natural", "rough" or "fine"."""
        rng = self.rng
        if kind not in self._fields:
            if kind == "fine":
                field = rng.standard_normal((self.height, self.width), np.float32)
                # Half a pixel of smoothing: sensor pixels and lenses leave no more than that.
                field = field + np.roll(field, 1, 0)
                field = (field + np.roll(field, 1, 1)) * np.float32(0.5)
            else:
                low, high = {"smooth": (1.7, 2.4), "natural": (1.1, 1.5), "rough": (0.6, 1.0)}[kind]
                field = fractal_noise(rng, self.height, self.width, rng.uniform(low, high))
            self._fields[kind] = field
        field = self._fields[kind]
        field = np.roll(field, (rng.integers(self.height), rng.integers(self.width)), (0, 1))
        if rng.uniform() < 0.5:
            field = field[::-1]
        if rng.uniform() < 0.5:
            field = field[:, ::-1]
        return np.ascontiguousarray(field)

    def ramp(self, **arguments: float) -> np.ndarray:
        """(256, 3) linear colours in the scene's family of hues."""
        if "hue" not in arguments and self.hue is not None:
            arguments["hue"] = (self.hue + self.rng.normal(0, 0.04)) % 1.0
        return random_ramp(self.rng, **arguments)

    def paint(self, tone: np.ndarray, mix: np.ndarray | None = None) -> np.ndarray:
        """Colours of a tone field (0 dark, 1 bright) and a mixing field between two ramps."""
        first = self.ramp()
        second = self.ramp() if self.rng.uniform() < 0.7 else first
        if mix is None:
            mix = 0.5 + 0.35 * self.noise("smooth")
        return _paint(
            np.ascontiguousarray(tone, np.float32),
            np.ascontiguousarray(mix, np.float32),
            first,
            second,
        )

    def pick(self) -> np.ndarray:
        """A texture of this scene; shared arrays, not to be written to."""
        if len(self._made) < self.most and (
            len(self._made) < 2 or self.rng.uniform() < 1 / len(self._made)
        ):
            self._made.append(self.texture())
            return self._made[-1]
        return self._made[int(self.rng.integers(len(self._made)))]

    def texture(self, kind: str | None = None) -> np.ndarray:
        """A new texture of one of the TEXTURE_CHANCES kinds; drawn when None."""
        if kind is None:
            kind = str(self.rng.choice(list(TEXTURE_CHANCES), p=list(TEXTURE_CHANCES.values())))
        if kind not in TEXTURE_CHANCES:
            raise ValueError(f"kind is {kind!r}; wanted one of {list(TEXTURE_CHANCES)}.")
        return getattr(self, f"_{kind}")()

    def on_floor(
        self, texture: np.ndarray, disparity_top: float, disparity_bottom: float
    ) -> np.ndarray:
        """The texture foreshortened as on a plane between two (positive) disparities."""
        ratio = max(disparity_top, disparity_bottom) / min(disparity_top, disparity_bottom)
        scale = self.rng.uniform(0.25, 0.8) / math.sqrt(ratio)
        return _perspective(texture, float(disparity_top), float(disparity_bottom), float(scale))

    def _grainy(self, tone: np.ndarray) -> np.ndarray:
        """Fine and natural detail on a tone field: few surfaces in the world are blank."""
        strength = self.rng.choice([0.0, 0.03, 0.08, 0.15], p=[0.15, 0.35, 0.35, 0.15])
        if strength:
            tone = tone + np.float32(strength) * self.noise(
                str(self.rng.choice(["natural", "rough", "fine"], p=[0.45, 0.4, 0.15]))
            )
        return tone

    def _fractal(self) -> np.ndarray:
        rng = self.rng
        noise = self.noise(str(rng.choice(["natural", "rough"], p=[0.6, 0.4])))
        style = rng.integers(5)
        if style <= 2:
            tone = 0.5 + rng.uniform(0.1, 0.3) * noise
        elif style == 3:
            tone = np.abs(noise) * rng.uniform(0.3, 0.6)
        else:
            y, x = np.ogrid[: self.height, : self.width]
            angle = rng.uniform(0, math.tau)
            wave = (math.cos(angle) * x + math.sin(angle) * y) * rng.uniform(0.02, 0.2)
            tone = 0.5 + 0.4 * np.sin((wave + rng.uniform(1, 6) * noise).astype(np.float32))
        return self.paint(tone)

    def _grain(self) -> np.ndarray:
        """Wood, fur, brushed metal, rain: structures drawn out in one direction."""
        rng = self.rng
        noise = fractal_noise(
            rng, self.width, self.height, rng.uniform(0.8, 1.4), rng.uniform(4, 25)
        )
        noise = noise.T if rng.uniform() < 0.5 else noise
        noise = np.resize(noise, (self.height, self.width))
        return self.paint(0.5 + rng.uniform(0.1, 0.28) * noise + 0.08 * self.noise("natural"))

    def _blotches(self) -> np.ndarray:
        """Two tones divided by an irregular sharp border: stains, marble, camouflage, maps."""
        rng = self.rng
        field = self.noise("natural") + rng.uniform(-0.5, 0.5)
        edge = rng.uniform(2, 40)
        tone = 0.5 + rng.uniform(0.2, 0.45) * np.clip(field * edge, -1, 1)
        return self.paint(self._grainy(tone))

    def _gradient(self) -> np.ndarray:
        rng = self.rng
        y, x = np.ogrid[: self.height, : self.width]
        x, y = x / self.width - 0.5, y / self.height - 0.5
        angle = rng.uniform(0, math.tau)
        tone = 0.5 + rng.uniform(0, 0.8) * (math.cos(angle) * x + math.sin(angle) * y)
        if rng.uniform() < 0.4:
            tone = tone - rng.uniform(0, 1) * (
                (x - rng.uniform(-0.5, 0.5)) ** 2 + (y - rng.uniform(-0.5, 0.5)) ** 2
            )
        tone = tone + rng.uniform(0, 0.15) * self.noise("smooth")
        return self.paint(self._grainy(tone.astype(np.float32)))

    def _leaves(self, elongation: float = 1.0, count: int | None = None) -> np.ndarray:
        """Dead leaves: occluding shapes whose sizes follow the power law r^-3."""
        rng = self.rng
        area = self.height * self.width
        smallest = rng.uniform(1.2, 4.0)
        largest = rng.uniform(0.08, 0.35) * max(self.height, self.width)
        if count is None:
            # So that the leaves' areas sum to between one and two canvases.
            mean_area = math.tau * smallest**2 * math.log(largest / smallest)
            count = int(min(6000, rng.uniform(1, 2) * area / mean_area))
        uniform = rng.uniform(size=count)
        radius = 1 / np.sqrt(uniform * (smallest**-2 - largest**-2) + largest**-2)
        aspect = np.exp(rng.uniform(0, elongation, count))
        angle = (
            rng.uniform(0, math.tau, count)
            if rng.uniform() < 0.7
            else rng.normal(rng.uniform(0, math.tau), 0.3, count)
        )
        shapes = rng.choice(
            [0, 1, 2], count, p=[[1, 0, 0], [0.4, 0.2, 0.4], [0, 0, 1]][int(rng.integers(3))]
        )
        tone = (0.5 + 0.2 * self.noise("natural")).astype(np.float32)
        mix = (0.5 + 0.3 * self.noise("smooth")).astype(np.float32)
        leaves = np.stack(
            [
                rng.uniform(0, self.width, count),
                rng.uniform(0, self.height, count),
                radius * np.sqrt(aspect),
                radius / np.sqrt(aspect),
                np.cos(angle),
                np.sin(angle),
                shapes,
                np.clip(rng.normal(0.5, rng.uniform(0.1, 0.3), count), 0, 1),
                rng.uniform(0, 1, count),
                rng.normal(0, 0.08, count),
                rng.uniform(0, 0.12, count),
            ],
            axis=1,
        )
        # Largest first: small leaves on top keep the power law visible at every scale.
        if rng.uniform() < 0.5:
            leaves = leaves[np.argsort(-radius, kind="stable")]
        _dead_leaves(tone, mix, leaves, self.noise("rough"))
        return self.paint(tone, mix)

    def _foliage(self) -> np.ndarray:
        """Leaves, grass, gravel: elongated leaves in greens and browns."""
        rng = self.rng
        kept = self.hue
        self.hue = float(rng.choice([0.28, 0.22, 0.1, 0.06]))
        texture = self._leaves(elongation=2.0)
        self.hue = kept
        return texture

    def _pattern(self) -> np.ndarray:
        rng = self.rng
        angle = rng.choice([0.0, math.pi / 2, math.pi / 4, rng.uniform(0, math.pi)])
        spread = rng.choice([0.0, 0.15, 0.5])
        tone, mix = _pattern(
            int(rng.integers(7)),
            self.height,
            self.width,
            float(np.exp(rng.uniform(math.log(5), math.log(90)))),
            float(rng.uniform(0.15, 0.85)),
            math.cos(angle),
            math.sin(angle),
            float(rng.choice([0.0, rng.uniform(0, 12)])),
            self.noise("smooth"),
            (0.5 + spread * rng.standard_normal(64)).astype(np.float32),
        )
        if rng.uniform() < 0.5:
            tone = 1 - tone
        tone = 0.5 + rng.uniform(0.3, 0.95) * (tone - 0.5) + 0.3 * (mix - 0.5)
        return self.paint(self._grainy(tone), mix)

    def _print(self) -> np.ndarray:
        """Lines of letters on paper, cloth or a screen."""
        rng = self.rng
        side = int(math.hypot(self.height, self.width)) + 2
        page = Image.new("L", (side, side), 0)
        draw = ImageDraw.Draw(page)
        y = 0.0
        one_size = float(np.exp(rng.uniform(math.log(9), math.log(70))))
        letters = np.array(list(PRINTABLE + "      "))
        while y < side:
            size = one_size if rng.uniform() < 0.75 else one_size * rng.uniform(0.6, 1.8)
            line = "".join(rng.choice(letters, int(side / size * 1.9) + 1))
            draw.text(
                (float(rng.uniform(-size, size)), y),
                line,
                fill=int(rng.integers(150, 256)),
                font=ImageFont.load_default(size=size),
            )
            y += size * rng.uniform(1.05, 1.9)
        if rng.uniform() < 0.6:
            page = page.rotate(float(rng.uniform(-40, 40)), Image.Resampling.BILINEAR)
        top, left = (side - self.height) // 2, (side - self.width) // 2
        ink = np.asarray(page, np.float32)[top : top + self.height, left : left + self.width] / 255
        paper = rng.uniform(0.6, 1.0) if rng.uniform() < 0.7 else rng.uniform(0, 0.3)
        contrast = rng.uniform(0.35, 0.9)
        tone = paper - contrast * ink if paper > 0.5 else paper + contrast * ink
        return self.paint(self._grainy(tone))

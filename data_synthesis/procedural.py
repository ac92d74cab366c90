"""Training samples without any download: random layered scenes seen through a lens."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np
from scipy import ndimage

from bokehdiff.images import linear_to_srgb
from bokehdiff.rendering.aperture import Aperture
from data_synthesis.apertures import random_aperture
from data_synthesis.endless import EndlessScenes
from data_synthesis.lens import (
    add_lights,
    channels_by_focus,
    hard_disparity,
    pinhole_view,
    trace_pixels,
)
from data_synthesis.scenes import LayeredScene, compose_scene

__all__ = ["ProceduralScenes"]

# Raised whenever the same seed and index give another sample, so that no folder mixes both.
GENERATOR_VERSION = 1
# The parts of the canvas outside the picture must hold every light that can reach it; hidden
# surfaces may be blurred more than visible ones by this factor before K is reduced.
HIDDEN_BLUR_ALLOWANCE = 1.25
# Disparity slope times K: how much wider a circle of confusion grows across itself. Beyond this
# the lens looks at a plane edge-on.
STEEPEST_BLUR = 0.45
# Share of scenes whose disparity map is not exact.
IMPERFECT_SHARE = 0.4


class ProceduralScenes(EndlessScenes):
    """Endless data set: sample ``i`` is the same in every process, whatever was asked before.

    ``scenes[i]`` is a dict of float32 tensors:

    - ``image`` (3, H, W): all-in-focus picture, sRGB in [0, 1], quantised to 8 bits.
    - ``disparity`` (1, H, W) in [0, 1], larger = nearer. The nearest surface at each pixel centre
      with hard edges, except in ``imperfect_share`` of the scenes: half of those have
      anti-aliased edges, half the mistakes of estimated maps (borders off by a pixel or two,
      blur, 8-bit steps).
    - ``df`` (): focus disparity. ``K`` (): blur radius in pixels per unit of disparity, so that
      the circle-of-confusion radius is ``K |disparity - df|``.
    - ``target`` (3, H, W): the same scene through the lens, sRGB in [0, 1], ray traced in linear
      light with everything hidden behind edges and outside the frame; noise about 40 to 50 dB.

    ``seed``: another seed is another data set (validation). ``size``: H = W, pixels. ``radius``:
    range of the scene's largest blur radius in pixels, drawn log-uniformly; ``sharp_share`` of
    the scenes have a radius under 0.7. ``light_share`` of the scenes have lights brighter than
    white. ``imperfect_share`` of the maps are not exact; another share changes nothing else, and
    with 0 all are exact. ``aperture``: the lens opening, default a disc, whose ``fringe`` counts
    in the unit of the sample's ``disparity``; ``"random"`` draws one for every sample
    (:func:`data_synthesis.apertures.random_aperture`) of the same scenes. ``length``: makes
    ``len()`` and plain iteration finite; without it there is no length.
    """

    def __init__(
        self,
        seed: int = 0,
        size: int = 128,
        *,
        radius: tuple[float, float] = (1.5, 32.0),
        sharp_share: float = 0.05,
        light_share: float = 0.25,
        imperfect_share: float = IMPERFECT_SHARE,
        aperture: Aperture | Literal["random"] | None = None,
        length: int | None = None,
    ) -> None:
        if int(seed) != seed or seed < 0:
            raise ValueError(f"seed is {seed!r}; wanted a whole number of at least 0.")
        if int(size) != size or size < 16:
            raise ValueError(f"size is {size!r}; wanted a whole number of pixels of at least 16.")
        if not 0 < radius[0] <= radius[1] or not math.isfinite(radius[1]):
            raise ValueError(
                f"radius is {radius!r}; wanted (smallest, largest) pixels with 0 < smallest <= "
                "largest."
            )
        for name, share in (
            ("sharp_share", sharp_share),
            ("light_share", light_share),
            ("imperfect_share", imperfect_share),
        ):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share!r}; wanted a share from 0 to 1.")
        if aperture not in (None, "random") and not isinstance(aperture, Aperture):
            raise ValueError(
                f"aperture is {aperture!r}; wanted a bokehdiff.rendering.Aperture, "
                '"random", or None for a disc.'
            )
        if length is not None and length < 0:
            raise ValueError(f"length is {length!r}; wanted None (endless) or at least 0.")
        self.seed, self.size, self.radius = int(seed), int(size), radius
        self.sharp_share, self.light_share, self.length = sharp_share, light_share, length
        self.imperfect_share = imperfect_share
        self.aperture = Aperture() if aperture is None else aperture

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the samples, for the metadata of shards."""
        # Unsaid at its default: folders begun before it could be chosen are the same data set.
        share = self.imperfect_share
        chosen = {} if share == IMPERFECT_SHARE else {"imperfect_share": share}
        return {
            "generator": "procedural",
            "version": GENERATOR_VERSION,
            "seed": self.seed,
            "size": self.size,
            "radius": list(self.radius),
            "sharp_share": self.sharp_share,
            "light_share": self.light_share,
            "aperture": "random" if self.aperture == "random" else self.aperture.to_dict(),
            **chosen,
        }

    def arrays(self, index: int) -> dict[str, Any]:
        """The sample as it is stored in shards.

        image uint8, target and disparity uint16 (C, H, W); df and K as floats; aperture as its
        settings, which ``Aperture.from_dict`` reads; provenance, an empty dict, because nobody's
        pictures are in these scenes.
        """
        rng = np.random.default_rng([self.seed, index])
        if rng.uniform() < self.sharp_share:
            radius = rng.uniform(0.0, 0.7)
        else:
            radius = math.exp(rng.uniform(math.log(self.radius[0]), math.log(self.radius[1])))
        margin_pixels = math.ceil(HIDDEN_BLUR_ALLOWANCE * radius) + 2
        scene = compose_scene(rng, self.size, margin_pixels, self.light_share)
        true_disparity, _ = hard_disparity(scene.layers, scene.planes, scene.margin, scene.size)
        lowest, highest = float(true_disparity.min()), float(true_disparity.max())
        span = max(highest - lowest, 0.02)
        df = _choose_focus(rng, true_disparity)
        K = radius / max(abs(highest - df), abs(lowest - df), 0.01)
        # The scene's own range becomes [0, 1], or a part of it: radii stay the same.
        low, high = 0.0, 1.0
        if rng.uniform() < 0.15:
            low, high = np.sort(rng.uniform(0, 1, 2))
            high = max(high, low + 0.2)
            low, high = (low, high) if high <= 1 else (0.8, 1.0)
        scale = (high - low) / span
        aperture = self._aperture(index)
        in_scene = dataclasses.replace(aperture, fringe=aperture.fringe / scale)
        for focus, _ in channels_by_focus(in_scene, df):
            K = min(K, largest_strength(scene, focus, margin_pixels))

        linear, blended = pinhole_view(scene.layers, scene.planes, scene.margin, scene.size)
        add_lights(linear, scene.layers, scene.planes, df, 0.0, scene.margin, scene.lights)
        lens = (scene.layers, scene.planes, df, K, scene.margin)
        blurred = trace_pixels(*lens, scene.size, seed=index, aperture=in_scene)
        add_lights(blurred, *lens, scene.lights, aperture=in_scene)

        maps = [low + (array - lowest) * scale for array in (true_disparity, blended)]
        disparity = _as_given(rng, *maps, self.imperfect_share)
        image = np.rint(linear_to_srgb(np.clip(linear, 0, 1)) * 255).astype(np.uint8)
        target = np.rint(linear_to_srgb(np.clip(blurred, 0, 1)) * 65535).astype(np.uint16)
        stored = np.rint(np.clip(disparity, 0, 1) * 65535).astype(np.uint16)
        return {
            "image": np.ascontiguousarray(image.transpose(2, 0, 1)),
            "disparity": stored[None],
            "df": float(low + (df - lowest) * scale),
            "K": float(K / scale),
            "target": np.ascontiguousarray(target.transpose(2, 0, 1)),
            "aperture": aperture.to_dict(),
            "provenance": {},
        }

    def _aperture(self, index: int) -> Aperture:
        if isinstance(self.aperture, Aperture):
            return self.aperture
        # A generator of its own: the scene is the same through any lens.
        return random_aperture(np.random.default_rng([self.seed, index, 1]))


def _choose_focus(rng: np.random.Generator, disparity: np.ndarray) -> float:
    """Disparity of a surface seen: near, middle or far third of the range equally often."""
    lowest, highest = float(disparity.min()), float(disparity.max())
    if rng.uniform() < 0.12:
        return float(rng.uniform(lowest, highest))
    third = (highest - lowest) / 3
    start = lowest + third * int(rng.integers(3))
    candidates = disparity[(disparity >= start) & (disparity <= start + third)]
    candidates = candidates if len(candidates) else disparity.reshape(-1)
    return float(candidates[int(rng.integers(len(candidates)))])


def largest_strength(scene: LayeredScene, df: float, margin_pixels: int) -> float:
    """Largest K for which no ray leaves the canvas and no plane is met too steeply."""
    first, last = scene.margin, scene.margin + 2 * scene.size
    corners = np.array([[1, x, y] for x in (first, last) for y in (first, last)], float)
    differences = np.abs(scene.planes @ corners.T - df).max(axis=1)  # (L,)
    slopes = 2 * np.hypot(scene.planes[:, 1], scene.planes[:, 2])  # per pixel
    # A hit is at most K |d - df| / (1 - K slope) away: solve that for K.
    reach = margin_pixels - 1
    limits = reach / np.maximum(differences + reach * slopes, 1e-9)
    return float(min(limits.min(), STEEPEST_BLUR / max(slopes.max(), 1e-9)))


def _as_given(
    rng: np.random.Generator, hard: np.ndarray, blended: np.ndarray, imperfect_share: float
) -> np.ndarray:
    """The disparity map as a program would get it: exact, anti-aliased or imperfect."""
    kind = rng.uniform()
    if kind < 1 - imperfect_share:
        return hard
    if kind < 1 - imperfect_share / 2:
        return blended
    disparity = hard if rng.uniform() < 0.7 else blended
    mistake = rng.uniform()
    if mistake < 0.6:
        side = int(rng.choice([3, 5], p=[0.75, 0.25]))
        grow = ndimage.grey_dilation if rng.uniform() < 0.5 else ndimage.grey_erosion
        disparity = grow(disparity, size=(side, side))
    if mistake > 0.4:
        disparity = ndimage.gaussian_filter(disparity, rng.uniform(0.4, 1.5))
    if rng.uniform() < 0.5:
        disparity = np.rint(disparity * 255) / 255
    return disparity

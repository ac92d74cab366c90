"""Bokeh stacks with true metric depth: one layered scene through one lens at several strengths."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from bokehdiff.images import linear_to_srgb
from data_synthesis.endless import EndlessScenes
from data_synthesis.lens import hard_disparity, pinhole_view, trace_pixels
from data_synthesis.procedural import HIDDEN_BLUR_ALLOWANCE, largest_strength
from data_synthesis.scenes import LayeredScene, compose_scene

__all__ = ["StackScenes", "into_metres"]

# Raised whenever the same seed and index give another sample, so that no folder mixes both.
GENERATOR_VERSION = 1
# Strengths of one stack differ by at least this factor: equal frames would say nothing new.
SMALLEST_STRENGTH_RATIO = 1.1
# Visible surfaces span at least this share of the range of disparities.
SMALLEST_SPAN = 0.25
# Brightness of a textureless surface changes by at most this share from its middle to its border.
FAINT_GRADIENT = 0.15
# Noise of a frame, standard deviation in 8-bit steps of display-encoded sRGB: drawn up to this.
MOST_NOISE_STEPS = 1.5


class StackScenes(EndlessScenes):
    """Endless data set: stack ``i`` is the same in every process, whatever was asked before.

    ``scenes[i]`` is a dict of float32 tensors:

    - ``image`` (3, H, W): all-in-focus picture, sRGB in [0, 1], quantised to 8 bits.
    - ``depth`` (1, H, W): metres to the nearest surface at least half opaque, hard edges.
    - ``df`` (): disparity in focus, in 1/m (1 over metres).
    - ``stack`` (N, 3, H, W): the scene through the lens, sRGB in [0, 1], ray traced in linear light
      with everything hidden behind edges and outside the frame, quantised to 8 bits.
    - ``K`` (N,): strengths of the frames in px*m of this picture, rising, all different: the blur
      radius is ``K |1 / depth - df|`` pixels, as in :mod:`bokehdiff.optics`.

    Pictures do not tell the metric scale: near and far end of a scene are drawn anew from
    ``disparities``, whatever it shows. Image and frames have independent noise of up to 1.5 8-bit
    steps.

    Args:
        seed: another seed is another data set (validation).
        size: H = W, pixels.
        frames: N, frames of a stack.
        strengths: (smallest, largest) K in px*m of a picture of `size` pixels, between which the
            strengths are drawn log-uniformly. None: from 1/256 to 1/16 of the size, 2 to 32 px*m at
            512 pixels. Where a scene has surfaces too steep for the largest, all of its strengths
            are reduced by one factor.
        textureless_share: share of the surfaces that have one colour, or a faint gradient of it.
        disparities: (far, near) end of the surfaces seen, in 1/m; 0.1 to 1 is 1 to 10 m.
        df: disparity in focus, 1/m, or a range to draw it from. None: the near end of
            `disparities`, so that everything lies behind the focus and the sign of the defocus is
            known.
        length: makes ``len()`` finite; without it there is no length.

    Raises:
        ValueError: a setting is out of its range; the sentence names it.
    """

    def __init__(
        self,
        seed: int = 0,
        size: int = 128,
        *,
        frames: int = 3,
        strengths: tuple[float, float] | None = None,
        textureless_share: float = 0.3,
        disparities: tuple[float, float] = (0.1, 1.0),
        df: float | tuple[float, float] | None = None,
        length: int | None = None,
    ) -> None:
        if int(seed) != seed or seed < 0:
            raise ValueError(f"seed is {seed!r}; wanted a whole number of at least 0.")
        if int(size) != size or size < 16:
            raise ValueError(f"size is {size!r}; wanted a whole number of pixels of at least 16.")
        if int(frames) != frames or frames < 1:
            raise ValueError(f"frames is {frames!r}; wanted a whole number of at least 1.")
        if not 0 <= textureless_share <= 1:
            raise ValueError(
                f"textureless_share is {textureless_share!r}; wanted a share from 0 to 1."
            )
        if length is not None and length < 0:
            raise ValueError(f"length is {length!r}; wanted None (endless) or at least 0.")
        self.seed, self.size, self.frames, self.length = int(seed), int(size), int(frames), length
        self.textureless_share = textureless_share
        if strengths is None:
            strengths = (self.size / 256, self.size / 16)
        self.strengths = _ordered_pair("strengths", strengths, "px*m")
        self.disparities = _ordered_pair("disparities", disparities, "1/m")
        if self.disparities[0] == self.disparities[1]:
            raise ValueError(f"disparities is {disparities!r}; wanted a near end above the far.")
        if self.strengths[1] < self.strengths[0] * SMALLEST_STRENGTH_RATIO ** (4 * (frames - 1)):
            raise ValueError(
                f"strengths is {strengths!r}; wanted a range wide enough for {frames} frames that "
                "all differ. Raise the largest or ask for fewer frames."
            )
        if df is None:
            df = self.disparities[1]
        ends = tuple(df) if isinstance(df, (tuple, list)) else (df, df)
        if len(ends) != 2 or not 0 <= ends[0] <= ends[1] < math.inf:
            raise ValueError(f"df is {df!r}; wanted a disparity of at least 0 1/m, or (low, high).")
        self.df = (float(ends[0]), float(ends[1]))

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the samples, as JSON can hold it."""
        return {
            "generator": "stacks",
            "version": GENERATOR_VERSION,
            "seed": self.seed,
            "size": self.size,
            "frames": self.frames,
            "strengths": list(self.strengths),
            "textureless_share": self.textureless_share,
            "disparities": list(self.disparities),
            "df": list(self.df),
        }

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        """The sample as it is stored: image and stack uint8, depth, df and K float32."""
        rng = np.random.default_rng([self.seed, index])
        df = float(rng.uniform(*self.df))
        ratios = self._strengths(rng)
        farthest = max(abs(end - df) for end in self.disparities)
        reach = math.ceil(HIDDEN_BLUR_ALLOWANCE * self.strengths[1] * farthest) + 2
        scene = compose_scene(rng, self.size, reach, light_chance=0.0)
        _remove_texture(rng, scene, self.textureless_share)
        visible, _ = hard_disparity(scene.layers, scene.planes, scene.margin, scene.size)
        scene = into_metres(rng, scene, visible, self.disparities)
        K = ratios * min(1.0, largest_strength(scene, df, reach) / ratios[-1])

        where = (scene.layers, scene.planes)
        disparity, _ = hard_disparity(*where, scene.margin, scene.size)
        sharp, _ = pinhole_view(*where, scene.margin, scene.size)
        noise = rng.uniform(0, MOST_NOISE_STEPS)
        stack = [
            # Seeds far apart: no frame has the lens points of another.
            trace_pixels(*where, df, strength, scene.margin, scene.size, seed=7919 * index + frame)
            for frame, strength in enumerate(K)
        ]
        return {
            "image": _eight_bits(rng, sharp, noise),
            "depth": (1 / disparity[None]).astype(np.float32),
            "df": np.float32(df),
            "stack": np.stack([_eight_bits(rng, frame, noise) for frame in stack]),
            "K": K.astype(np.float32),
        }

    @staticmethod
    def as_tensors(arrays: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The sample as it is trained on: float32, its pictures in [0, 1]."""
        return {
            name: torch.from_numpy(np.asarray(value, np.float32))
            / (255 if name in ("image", "stack") else 1)
            for name, value in arrays.items()
        }

    def _strengths(self, rng: np.random.Generator) -> np.ndarray:
        """(N,) rising, each at least `SMALLEST_STRENGTH_RATIO` times the one before."""
        low, high = np.log(self.strengths)
        while True:
            logarithms = np.sort(rng.uniform(low, high, self.frames))
            if (np.diff(logarithms) >= math.log(SMALLEST_STRENGTH_RATIO)).all():
                return np.exp(logarithms)


def into_metres(
    rng: np.random.Generator,
    scene: LayeredScene,
    visible: np.ndarray,
    disparities: tuple[float, float],
) -> LayeredScene:
    """The scene with its visible disparities moved into a random part of a metric range.

    Args:
        visible: the disparities that are seen, in the unit of the scene, any shape.
        disparities: (far, near) end of the range, in 1/m; what is seen spans at least a quarter.
    """
    lowest, highest = float(visible.min()), float(visible.max())
    far, near = disparities
    span = (near - far) * rng.uniform(SMALLEST_SPAN, 1)
    low = rng.uniform(far, near - span)
    # A single wall that faces the camera has no span to stretch.
    scale = span / max(highest - lowest, 0.02)
    planes = scene.planes * scale
    planes[:, 0] += low - lowest * scale
    return dataclasses.replace(scene, planes=planes)


def _ordered_pair(name: str, pair: tuple[float, float], unit: str) -> tuple[float, float]:
    if len(pair) != 2 or not 0 < pair[0] <= pair[1] < math.inf:
        raise ValueError(f"{name} is {pair!r}; wanted (low, high) in {unit} with 0 < low <= high.")
    return float(pair[0]), float(pair[1])


def _remove_texture(rng: np.random.Generator, scene: LayeredScene, share: float) -> None:
    """Gives a share of the layers their mean colour, or a faint gradient of it."""
    side = scene.layers.shape[1]
    across = np.linspace(-1, 1, side, dtype=np.float32)
    for layer in scene.layers:
        chosen, gradient = rng.uniform() < share, rng.normal(0, FAINT_GRADIENT / 3, 2)
        gradient *= rng.uniform() < 0.5
        if not chosen:
            continue
        alpha = layer[..., 3]
        colour = layer[..., :3].sum((0, 1), np.float64) / max(float(alpha.sum(dtype=float)), 1e-9)
        slope = 1 + np.clip(
            gradient[0] * across[:, None] + gradient[1] * across, -FAINT_GRADIENT, FAINT_GRADIENT
        )
        layer[..., :3] = (alpha * slope)[..., None] * colour


def _eight_bits(rng: np.random.Generator, linear: np.ndarray, noise: float) -> np.ndarray:
    """(3, H, W) uint8 display-encoded, with noise of that many steps added before rounding."""
    steps = linear_to_srgb(np.clip(linear, 0, 1)) * 255
    steps = steps + noise * rng.standard_normal(steps.shape, np.float32)
    return np.ascontiguousarray(np.rint(np.clip(steps, 0, 255)).astype(np.uint8).transpose(2, 0, 1))

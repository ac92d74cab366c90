"""Clips with true depth, motion and lens blur: layered scenes whose layers move over the frames."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numba import njit

from bokehdiff.images import linear_to_srgb
from bokehdiff.optics import strength_from_camera
from data_synthesis.endless import EndlessScenes
from data_synthesis.lens import (
    TEXELS_PER_PIXEL,
    hard_disparity,
    pinhole_view,
    trace_pixels,
)
from data_synthesis.procedural import HIDDEN_BLUR_ALLOWANCE, largest_strength
from data_synthesis.scenes import LayeredScene, compose_scene
from data_synthesis.stack_scenes import into_metres

__all__ = ["MOTIONS", "ClipScenes"]

# Raised whenever the same seed and index give another sample, so that no folder mixes both.
GENERATOR_VERSION = 1
MOTIONS = ("still", "pan", "parallax", "moving")
"""What can happen in a clip: nothing; the camera turns; it moves sideways; things move."""
# Pixels per frame; speeds are whole texels per frame, so that no frame is resampled.
FASTEST = 4
# Visible surfaces lie between these, in 1/m; the near end of a clip is drawn between the last two.
FARTHEST, LEAST_NEAR, NEAREST = 0.1, 0.6, 3.3
# Largest blur radius of a clip in pixels, drawn log-uniformly, and the size from which on it is.
RADII = (1.5, 28.0)
SIZE_OF_RADII = 96
SENSOR_WIDTH_MM = 36.0
PHOTO_WIDTHS_PX = (384, 1920)
FOCAL_LENGTHS_MM = (24.0, 135.0)
F_NUMBERS = (0.7, 22.0)
# Share of the clips without noise, where a range of noise begins at 0.
NOISELESS_SHARE = 0.2
# Radius in pixels up to which a picture keeps its noise, and from which on it has lost it.
NOISE_KEPT, NOISE_LOST = 0.5, 2.0
# Share of the clips that are exposed so that hardly anything is clipped.
UNCLIPPED_SHARE = 0.85
# Share of the picture that a thing takes up at least, to be one that moves.
SMALLEST_THING = 0.01


class ClipScenes(EndlessScenes):
    """Endless data set: clip ``i`` is the same in every process, whatever was asked before.

    ``scenes[i]`` is a dict of float32 tensors, of T frames:

    - ``frames`` (T, 3, H, W): all-in-focus pictures with noise, sRGB in [0, 1], quantised to 8
      bits.
    - ``bokeh`` (T, 3, H, W): the same through the lens, sRGB in [0, 1], ray traced in linear light
      with everything hidden behind edges and outside the frame, quantised to 8 bits. Without
      noise, except where the blur radius is below 2 px: there the noise of the frame is faded in,
      and below 0.5 px it is all there. Lens points are the same in all frames, each an unbiased
      picture, so that what stands still stays as it is.
    - ``inverse_depth`` (T, 1, H, W): 1/metres to the nearest surface at least half opaque, hard
      edges; 0.1 to 3.3, that is 10 m to 0.3 m.
    - ``motion`` (T, 2, H, W): pixels (x, y). What is seen at pixel p of a frame was at p + motion
      in the frame before; multiples of half a pixel. 0 in the first frame.
    - ``visible`` (T, 1, H, W): 1 where it was seen there: all pixels that p + motion lies between
      are in the picture and showed the same surface. 0 elsewhere, and in the first frame.
    - ``f_number``, ``focal_length_mm``, ``focus_distance_m``, ``sensor_width_mm``,
      ``photo_width_px`` (): the camera, the same for all frames. The frames are crops of photos
      of this width: the blur radius is ``K |inverse_depth - 1 / focus_distance_m|`` pixels, with
      ``K = bokehdiff.strength_from_camera(f_number, ..., photo_width_px)``.

    Every clip is still, or a pan (everything moves alike), or the camera moves sideways while it
    turns (each layer moves as an affine function of its disparity: "parallax"), or things move in
    front of a still background ("moving"): up to 4 px per frame, at constant speed. The largest
    blur radius in a clip is drawn log-uniformly from 1.5 to 28 px (at sizes below 96 px to
    proportionally less), reduced where a scene has surfaces too steep for it.

    Args:
        seed: another seed is another data set (validation).
        size: H = W, pixels.
        frames: T.
        motions: which of :data:`MOTIONS` there are; all but "still" equally often.
        still_share: share of still clips, where `motions` has "still" and others.
        noise: standard deviation of the frames' noise in display-encoded sRGB of [0, 1],
            independent of frame and pixel, drawn per clip from this range. Of a range that begins
            at 0, a fifth of the clips have none.
        length: makes ``len()`` finite; without it there is no length.

    Raises:
        ValueError: a setting is out of its range; the sentence names it.
    """

    def __init__(
        self,
        seed: int = 0,
        size: int = 128,
        *,
        frames: int = 4,
        motions: Sequence[str] = MOTIONS,
        still_share: float = 0.25,
        noise: tuple[float, float] = (0.0, 0.05),
        length: int | None = None,
    ) -> None:
        if int(seed) != seed or seed < 0:
            raise ValueError(f"seed is {seed!r}; wanted a whole number of at least 0.")
        if int(size) != size or size < 16:
            raise ValueError(f"size is {size!r}; wanted a whole number of pixels of at least 16.")
        if int(frames) != frames or frames < 1:
            raise ValueError(f"frames is {frames!r}; wanted a whole number of at least 1.")
        if isinstance(motions, str) or not motions or not set(motions) <= set(MOTIONS):
            raise ValueError(f"motions is {motions!r}; wanted one or more of {MOTIONS}.")
        if not 0 <= still_share <= 1:
            raise ValueError(f"still_share is {still_share!r}; wanted a share from 0 to 1.")
        if len(noise) != 2 or not 0 <= noise[0] <= noise[1] <= 1:
            raise ValueError(
                f"noise is {noise!r}; wanted (low, high) standard deviations of pictures in [0, 1] "
                "with 0 <= low <= high <= 1."
            )
        if length is not None and length < 0:
            raise ValueError(f"length is {length!r}; wanted None (endless) or at least 0.")
        self.seed, self.size, self.frames, self.length = int(seed), int(size), int(frames), length
        self.motions = tuple(motion for motion in MOTIONS if motion in motions)
        self.still_share = still_share
        self.noise = (float(noise[0]), float(noise[1]))

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the samples, as JSON can hold it."""
        return {
            "generator": "clips",
            "version": GENERATOR_VERSION,
            "seed": self.seed,
            "size": self.size,
            "frames": self.frames,
            "motions": list(self.motions),
            "still_share": self.still_share,
            "noise": list(self.noise),
        }

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        """The sample as it is stored: pictures and ``visible`` uint8, ``motion`` int8 in half
        pixels, everything else float32."""
        rng = np.random.default_rng([self.seed, index])
        motion = self._motion(rng)
        largest = max(RADII[0], RADII[1] * min(1.0, self.size / SIZE_OF_RADII))
        radius = math.exp(rng.uniform(math.log(RADII[0]), math.log(largest)))
        margin_pixels = math.ceil(HIDDEN_BLUR_ALLOWANCE * radius) + 2
        travel = 0 if motion == "still" else math.ceil(FASTEST * (self.frames - 1) / 2) + 1
        scene = compose_scene(rng, self.size, margin_pixels + travel, light_chance=0.0)
        velocities = _velocities(rng, motion, scene)
        positions = _positions(velocities, 1 if motion == "still" else self.frames)

        _expose(rng, scene, positions[0])

        # From here on arrays of still clips have one frame, made once.
        visible = np.stack([_surfaces(scene, position)[0] for position in positions])
        near = math.exp(rng.uniform(math.log(LEAST_NEAR), math.log(NEAREST)))
        scene = into_metres(rng, scene, visible, (FARTHEST, near))
        disparity, layers = (
            np.stack(maps)
            for maps in zip(*(_surfaces(scene, position) for position in positions), strict=True)
        )
        margin = TEXELS_PER_PIXEL * margin_pixels
        df = _choose_focus(rng, disparity[0])
        K = radius / max(float(np.abs(disparity - df).max()), 0.01)
        for position in positions:
            moved = dataclasses.replace(
                scene, planes=_moved_planes(scene, position, margin), margin=margin
            )
            K = min(K, largest_strength(moved, df, margin_pixels))
        camera = _choose_camera(rng, K, df, self.size)
        df, K = 1 / camera["focus_distance_m"], _strength(camera)

        sharp = np.empty((len(positions), self.size, self.size, 3), np.float32)
        blurred = np.empty_like(sharp)
        for frame, position in enumerate(positions):
            where = _moved(scene, position, margin)
            sharp[frame], _ = pinhole_view(*where, margin, self.size)
            blurred[frame] = trace_pixels(*where, df, K, margin, self.size, seed=index)
        frames, bokeh = self._pictures(rng, sharp, blurred, K * np.abs(disparity - df))
        whole = (self.frames, self.size, self.size)
        flow, seen_before = _since_frame_before(velocities, np.broadcast_to(layers, whole))
        return {
            "frames": frames,
            "bokeh": bokeh,
            "inverse_depth": np.broadcast_to(disparity, whole)[:, None].copy(),
            "motion": flow,
            "visible": seen_before,
            **{name: np.float32(value) for name, value in camera.items()},
        }

    @staticmethod
    def as_tensors(arrays: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The sample as it is trained on: float32, its pictures in [0, 1], motion in pixels."""
        steps = {"frames": 255, "bokeh": 255, "motion": TEXELS_PER_PIXEL}
        return {
            name: torch.from_numpy(np.asarray(value, np.float32)) / steps.get(name, 1)
            for name, value in arrays.items()
        }

    def _motion(self, rng: np.random.Generator) -> str:
        moving = [motion for motion in self.motions if motion != "still"]
        still = rng.uniform() < self.still_share
        if not moving or (still and "still" in self.motions):
            return "still"
        return moving[int(rng.integers(len(moving)))]

    def _pictures(
        self, rng: np.random.Generator, sharp: np.ndarray, blurred: np.ndarray, radius: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(T, 3, H, W) uint8 frames and bokeh of linear light (T or 1, H, W, 3), with noise."""
        deviation = rng.uniform(*self.noise)
        if self.noise[0] == 0 and rng.uniform() < NOISELESS_SHARE:
            deviation = 0.0
        shape = (self.frames, self.size, self.size, 3)
        noise = np.float32(deviation) * rng.standard_normal(shape, np.float32)
        kept = np.clip((NOISE_LOST - radius) / (NOISE_LOST - NOISE_KEPT), 0, 1)[..., None]
        return _eight_bits(sharp, noise), _eight_bits(blurred, noise * kept.astype(np.float32))


def _velocities(rng: np.random.Generator, motion: str, scene: LayeredScene) -> np.ndarray:
    """(L, 2) whole texels per frame (x, y) of every layer, in any direction up to `FASTEST`."""
    velocities = np.zeros((len(scene.layers), 2), np.int64)
    disparity, nearest = _surfaces(scene, velocities)
    things = _things(scene, nearest)
    if motion == "pan" or (motion == "moving" and not len(things)):
        velocities[:] = _velocity(rng, rng.uniform(0, math.tau))
    elif motion == "parallax":
        lowest, highest = float(disparity.min()), float(disparity.max())
        # What the camera keeps in its place while it moves: anything seen, or what is farther.
        pivot = rng.uniform(2 * lowest - highest, highest)
        apart = _disparities(scene, disparity, nearest) - pivot
        speed = rng.uniform(1, FASTEST * TEXELS_PER_PIXEL) * rng.choice([-1, 1])
        velocities[:, 0] = np.rint(speed * apart / max(np.abs(apart).max(), 1e-9))
    elif motion == "moving":
        count = min(len(things), int(rng.choice([1, 2, 3], p=[0.6, 0.25, 0.15])))
        for layer in rng.choice(things, count, replace=False):
            # Sideways more often than not, as what stands on the ground.
            angle = float(rng.normal(0, 0.3) + math.pi * rng.integers(2))
            if rng.uniform() < 0.3:
                angle = rng.uniform(0, math.tau)
            velocities[layer] = _velocity(rng, angle)
    return velocities


def _velocity(rng: np.random.Generator, angle: float) -> np.ndarray:
    """(2,) whole texels per frame in about this direction, not zero."""
    speed = rng.uniform(1, FASTEST * TEXELS_PER_PIXEL)
    return np.rint(speed * np.array([math.cos(angle), math.sin(angle)])).astype(np.int64)


def _positions(velocities: np.ndarray, frames: int) -> np.ndarray:
    """(T, L, 2) texels by which the layers are moved; about none in the middle of the clip."""
    return velocities * np.arange(frames)[:, None, None] - velocities * (frames - 1) // 2


def _expose(rng: np.random.Generator, scene: LayeredScene, position: np.ndarray) -> None:
    """Darkens most scenes, in place, so that hardly anything of what is seen is clipped."""
    picture, _ = pinhole_view(*_moved(scene, position, 0), 0, scene.size)
    brightest = np.quantile(picture, 0.99)
    if rng.uniform() < UNCLIPPED_SHARE and brightest > 1:
        scene.layers[..., :3] /= np.float32(brightest)


def _disparities(scene: LayeredScene, disparity: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """(L,) one disparity for every layer: the mean of what is seen of it (H, W); of those that
    are hidden the one in the middle of their opaque parts, within the range that is seen."""
    count = len(scene.layers)
    side = np.arange(scene.layers.shape[1])
    alpha = scene.layers[..., 3]
    mass = np.maximum(alpha.sum((1, 2), np.float64), 1e-9)
    x = alpha.sum(1, np.float64) @ side / mass
    y = alpha.sum(2, np.float64) @ side / mass
    hidden = (scene.planes * np.stack([np.ones(count), x, y], axis=1)).sum(1)
    pixels = np.bincount(nearest.ravel(), minlength=count)
    sums = np.bincount(nearest.ravel(), disparity.ravel(), minlength=count)
    hidden = np.clip(hidden, disparity.min(), disparity.max())
    return np.where(pixels > 0, sums / np.maximum(pixels, 1), hidden)


def _things(scene: LayeredScene, nearest: np.ndarray) -> np.ndarray:
    """Indices of the layers that are seen and no part of the room: those that may move."""
    seen = np.bincount(nearest.ravel(), minlength=len(scene.layers)) / nearest.size
    alpha = scene.layers[..., 3]
    borders = np.stack([alpha[:, 0], alpha[:, -1], alpha[:, :, 0], alpha[:, :, -1]])
    # Floors and walls reach the border of the canvas along most of one side.
    inside = borders.mean(-1).max(0) < 0.5
    return np.flatnonzero(inside & (seen >= SMALLEST_THING))


@njit(cache=True, nogil=True)
def _cut_where_behind(layers, planes):
    """Empties, in place, what lies beyond a surface at least half opaque of a later layer.

    So near hides far however the layers (L, H, W, 4) have moved: feet end on the floor, and the
    parts of a room where they meet.
    """
    count, height, width, _ = layers.shape
    for y in range(height):
        for x in range(width):
            nearest = -np.inf
            for layer in range(count - 1, -1, -1):
                disparity = planes[layer, 0] + planes[layer, 1] * x + planes[layer, 2] * y
                if disparity < nearest:
                    layers[layer, y, x] = 0
                elif layers[layer, y, x, 3] > 0.5:
                    nearest = disparity


def _moved(scene: LayeredScene, position: np.ndarray, margin: int) -> tuple[np.ndarray, np.ndarray]:
    """Layers (L, H, W, 4) and planes (L, 3), moved by (L, 2) texels, with so much margin."""
    side = TEXELS_PER_PIXEL * scene.size + 2 * margin
    layers = np.empty((len(scene.layers), side, side, 4), np.float32)
    starts = scene.margin - margin - position
    for layer, (x, y) in enumerate(starts):
        layers[layer] = scene.layers[layer, y : y + side, x : x + side]
    planes = _moved_planes(scene, position, margin)
    _cut_where_behind(layers, planes)
    return layers, planes


def _moved_planes(scene: LayeredScene, position: np.ndarray, margin: int) -> np.ndarray:
    """The planes (L, 3) of :func:`_moved`: disparities move with the layers."""
    planes = scene.planes.copy()
    planes[:, 0] += (planes[:, 1:] * (scene.margin - margin - position)).sum(1)
    return planes


def _surfaces(scene: LayeredScene, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Disparity (H, W) and layer (H, W) seen at each pixel when the layers are moved so far."""
    return hard_disparity(*_moved(scene, position, 0), 0, scene.size)


def _since_frame_before(
    velocities: np.ndarray, layers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """``motion`` (T, 2, H, W) int8 in texels and ``visible`` (T, 1, H, W) uint8 of the clip.

    ``layers`` (T, H, W): which one is seen.
    """
    frames, size, _ = layers.shape
    motion = -velocities[layers]  # (T, H, W, 2)
    motion[0] = 0
    rows, columns = np.mgrid[:size, :size]
    visible = np.ones(layers.shape, bool)
    visible[0] = False
    # The pixels on both sides of p + motion, which is a whole number or halfway between two.
    for down in (0, TEXELS_PER_PIXEL - 1):
        for right in (0, TEXELS_PER_PIXEL - 1):
            x = columns + (motion[1:, ..., 0] + right) // TEXELS_PER_PIXEL
            y = rows + (motion[1:, ..., 1] + down) // TEXELS_PER_PIXEL
            inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
            row, column = np.clip(y, 0, size - 1), np.clip(x, 0, size - 1)
            before = layers[np.arange(frames - 1)[:, None, None], row, column]
            visible[1:] &= inside & (before == layers[1:])
    return (
        np.ascontiguousarray(motion.transpose(0, 3, 1, 2).astype(np.int8)),
        visible[:, None].astype(np.uint8),
    )


def _choose_focus(rng: np.random.Generator, disparity: np.ndarray) -> float:
    """Disparity of a surface seen; near and far are equally often in focus, however small."""
    wanted = rng.uniform(disparity.min(), disparity.max())
    return float(disparity.flat[np.abs(disparity - wanted).argmin()])


def _choose_camera(rng: np.random.Generator, K: float, df: float, size: int) -> dict[str, float]:
    """A camera of strength K (px*m) focused at df (1/m), each number as float32 holds it.

    The photo is at least as wide as the crop. Focal lengths are from `FOCAL_LENGTHS_MM` as long as
    the f-number stays within `F_NUMBERS` with them, and otherwise the next that let it.
    """
    low, high = (max(width, size) for width in PHOTO_WIDTHS_PX)
    photo_width_px = round(math.exp(rng.uniform(math.log(low), math.log(high))))
    # Metres: K = f^2 / (2 N (1 - f df)) * pixels per metre of sensor, for f at both ends of N.
    aperture = K / (1000 * photo_width_px / SENSOR_WIDTH_MM)
    shortest, longest = (
        1000 * (math.sqrt((N * aperture * df) ** 2 + 2 * N * aperture) - N * aperture * df)
        for N in F_NUMBERS
    )
    ends = [min(max(length, shortest), longest) for length in FOCAL_LENGTHS_MM]
    focal_length_mm = math.exp(rng.uniform(*np.log(ends)))
    camera = {
        "f_number": 1.0,
        "focal_length_mm": focal_length_mm,
        "focus_distance_m": 1 / df,
        "sensor_width_mm": SENSOR_WIDTH_MM,
        "photo_width_px": photo_width_px,
    }
    camera["f_number"] = _strength(camera) / K
    return {name: float(np.float32(value)) for name, value in camera.items()}


def _strength(camera: Mapping[str, float]) -> float:
    """K in px*m of the pictures that the camera takes."""
    return strength_from_camera(
        camera["f_number"],
        camera["focal_length_mm"],
        camera["focus_distance_m"],
        camera["sensor_width_mm"],
        camera["photo_width_px"],
    )


def _eight_bits(linear: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """(T, 3, H, W) uint8 of linear (T or 1, H, W, 3), noise added to it display-encoded."""
    steps = (linear_to_srgb(np.clip(linear, 0, 1)) + noise) * 255
    rounded = np.rint(np.clip(steps, 0, 255)).astype(np.uint8)
    return np.ascontiguousarray(rounded.transpose(0, 3, 1, 2))

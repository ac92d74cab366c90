"""Training samples as in the BokehDiff paper: cut-outs over a background, seen through a lens."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from bokehdiff.images import linear_to_srgb, srgb_to_linear
from bokehdiff.rendering.aperture import Aperture
from data_synthesis.apertures import add_aperture_argument, random_aperture
from data_synthesis.corruption import corrupt_disparity
from data_synthesis.cutouts import (
    SMALLEST_PROCEDURAL_SIDE,
    PictureFolders,
    procedural_background,
    procedural_cutout,
)
from data_synthesis.endless import EndlessScenes
from data_synthesis.planes import trace_planes

__all__ = [
    "OFFICIAL",
    "Compat",
    "ComposedScene",
    "LayerScenes",
    "add_arguments",
    "add_source_arguments",
    "from_options",
    "lens_grid_side",
]

PathLike = str | os.PathLike[str]

# Raised whenever the same seed and index give another sample, so that no folder mixes both.
GENERATOR_VERSION = 1

FOCUS_CHOICES = ("foreground", "background", "anywhere")

# Disparities: 0.001 is the farthest background, 1 the nearest foreground.
FARTHEST = 0.001
BACKGROUND_SPAN = 0.249
# Between neighbouring layers, so that nothing touches.
DISPARITY_GAP = 0.005
# For facing angles: the distance at which the picture's side is seen, in picture sides.
FOCAL_LENGTH = 1.2
# Hidden surfaces may be blurred more than visible ones by this factor before K is reduced.
HIDDEN_BLUR_ALLOWANCE = 1.25
# Disparity slope times K: beyond this the lens looks at a plane edge-on.
STEEPEST_BLUR = 0.45
# How far a file is enlarged at most.
LARGEST_ENLARGEMENT = 2.0
# A cut-out that fills this share of a side of its own picture goes on beyond it.
CUT_OFF_SHARE = 0.01

# What is less of the picture than this is not what someone focuses on.
SMALLEST_SHARE_IN_FOCUS = 0.002

# The released code draws a factor from 0.25 to 8 and multiplies its strength and lens grid by it.
RELEASED_STRENGTH = 12
RELEASED_GRID = 21


@dataclass(frozen=True)
class Compat:
    """Where the released code departs from the paper or from optics, one field for each thing.

    The defaults are what we do, :data:`OFFICIAL` what the released code does.

    Attributes:
        canvas: side of the scene that is made, of which the sample is a random crop (768); None
            makes the scene at the sample's own size.
        border: pixels of the scene beyond the canvas on each side, whatever the blur (24): larger
            circles of confusion lose the light from further out. None makes it as wide as they
            are.
        ignores_aspect: backgrounds are squeezed into the square, not cropped.
        loses_last_line: the box cut out of a foreground lacks its last row and column.
        unclipped_alpha: each channel is resized for itself and its overshoot kept, so opacity
            leaves [0, 1], and the colours hidden around a subject leak into its rim as halos.
        near_centre: one foreground, half to all of the canvas's side (the mean of its sides), at
            most a quarter of the canvas off its centre, wholly inside; cut-off subjects end in
            mid-air.
        flat_foreground: every foreground faces the camera.
        gamma: light is the display value to this power (2.2) instead of the sRGB curve.
        image_in_display_space: the all-in-focus picture blends display values, not light, so that
            it differs from the traced one on soft edges even in focus.
        blended_disparity: disparities are blended by opacity; soft edges get disparities at which
            there is nothing. Otherwise each pixel has that of the nearest surface which is more
            than half opaque there.
        strength_by_factor: ``K = 12 t / max(df, 1 - df)`` with ``t = 2^(5 u - 2)``, u uniform, and
            a lens grid of ``int(21 t)`` points a side, few for weak blur. Otherwise the largest
            radius in the picture is drawn, and K follows from it.
        understated_label: the K of the sample is ``12 r t`` with r from 2/3 to 1, which is 1 to 3
            times less than the traced one.
        changed_afterwards: finished pictures are mirrored (sideways and upside down) and their
            display values multiplied by 0.7 to 1.1 and clipped. Otherwise the sources are
            mirrored (sideways) and their light is made brighter or darker before it is traced, so
            that apertures stay as they are and highlights keep their light.
    """

    canvas: int | None = None
    border: int | None = None
    ignores_aspect: bool = False
    loses_last_line: bool = False
    unclipped_alpha: bool = False
    near_centre: bool = False
    flat_foreground: bool = False
    gamma: float | None = None
    image_in_display_space: bool = False
    blended_disparity: bool = False
    strength_by_factor: bool = False
    understated_label: bool = False
    changed_afterwards: bool = False

    def to_light(self, display: np.ndarray) -> np.ndarray:
        """Linear light of display values."""
        if self.gamma is None:
            return srgb_to_linear(display)
        return np.maximum(display, 0) ** np.float32(self.gamma)

    def to_display(self, light: np.ndarray) -> np.ndarray:
        """Display values of linear light."""
        if self.gamma is None:
            return linear_to_srgb(light)
        return np.maximum(light, 0) ** np.float32(1 / self.gamma)


OFFICIAL = Compat(
    canvas=768,
    border=24,
    ignores_aspect=True,
    loses_last_line=True,
    unclipped_alpha=True,
    near_centre=True,
    flat_foreground=True,
    gamma=2.2,
    image_in_display_space=True,
    blended_disparity=True,
    strength_by_factor=True,
    understated_label=True,
    changed_afterwards=True,
)


@dataclass
class ComposedScene:
    """Planes on one square canvas, nearest first, and the part of it that is the picture.

    ``colours`` (L, C, C, 3) straight linear light and ``alphas`` (L, C, C); the last layer is the
    background, opaque everywhere. ``planes`` (L, 3): disparity ``d0 + dx X + dy Y`` at pixel
    (X, Y) of the canvas. ``boxes``: top, left, height and width of each foreground. The picture is
    the square of ``size`` pixels that begins at row ``top`` and column ``left``. ``df``: disparity
    in focus, that of the thing ``focus``. ``provenance``: what it was made of.
    """

    colours: np.ndarray
    alphas: np.ndarray
    planes: np.ndarray
    boxes: list[tuple[int, int, int, int]]
    top: int
    left: int
    size: int
    df: float
    provenance: dict[str, Any]

    @property
    def window(self) -> tuple[int, int, int, int]:
        """The picture's rectangle on the canvas: top, left, height, width."""
        return self.top, self.left, self.size, self.size

    @cached_property
    def layers(self) -> np.ndarray:
        """(L, C, C, 4) premultiplied light and opacity."""
        alphas = self.alphas[..., None]
        return np.concatenate([self.colours * alphas, alphas], axis=-1)

    def disparities(self) -> np.ndarray:
        """(L, size, size) float32: disparity of every plane at the pixels of the picture."""
        y, x = np.ogrid[self.top : self.top + self.size, self.left : self.left + self.size]
        d0, dx, dy = self.planes[:, :, None, None].transpose(1, 0, 2, 3)
        return (d0 + dx * x + dy * y).astype(np.float32)

    def visible(self) -> np.ndarray:
        """(L, size, size) bool: where each layer is the nearest more than half opaque one."""
        rows, columns = _square(self.top, self.size), _square(self.left, self.size)
        opaque = self.alphas[:, rows, columns] > 0.5
        behind = np.cumsum(opaque, axis=0) - opaque > 0
        return opaque & ~behind

    def hard_disparity(self) -> np.ndarray:
        """(size, size) float32: disparity of the nearest surface more than half opaque."""
        return np.sum(self.disparities() * self.visible(), axis=0, dtype=np.float32)

    def blended_disparity(self) -> np.ndarray:
        """(size, size) float32: disparities blended by opacity."""
        rows, columns = _square(self.top, self.size), _square(self.left, self.size)
        return _over(self.disparities()[..., None], self.alphas[:, rows, columns])[..., 0]

    def light(
        self, K: float, aperture: Aperture | None = None, samples_per_side: int = 1
    ) -> np.ndarray:
        """(size, size, 3) float32 linear light through a lens; K = 0 is all in focus."""
        return trace_planes(
            self.layers,
            self.planes,
            self.df,
            K,
            aperture=aperture,
            samples_per_side=samples_per_side,
            window=self.window,
        )

    def reach(self) -> tuple[float, float]:
        """(largest |disparity - df| of anything on the canvas, steepest slope per pixel)."""
        side = self.alphas.shape[1]
        farthest = 0.0
        for plane, box in zip(self.planes, [*self.boxes, (0, 0, side, side)], strict=True):
            top, left, height, width = box
            y = np.clip([top, top + height - 1], 0, side - 1)
            x = np.clip([left, left + width - 1], 0, side - 1)
            corners = plane[0] + plane[1] * x[None, :] + plane[2] * y[:, None]
            farthest = max(farthest, float(np.abs(corners - self.df).max()))
        return farthest, float(np.hypot(self.planes[:, 1], self.planes[:, 2]).max())


@dataclass
class _Foreground:
    """A cut-out as it is placed on the canvas; parts of it may lie outside."""

    colours: np.ndarray  # (h, w, 3) straight linear light
    alpha: np.ndarray  # (h, w)
    top: int
    left: int
    provenance: dict[str, Any]

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.top, self.left, *self.alpha.shape

    def on_canvas(self, side: int) -> tuple[np.ndarray, np.ndarray]:
        """(side, side, 3) colours and (side, side) opacity of the layer."""
        colours = np.zeros((side, side, 3), np.float32)
        alpha = np.zeros((side, side), np.float32)
        height, width = self.alpha.shape
        rows = slice(max(self.top, 0), min(self.top + height, side))
        columns = slice(max(self.left, 0), min(self.left + width, side))
        inside = (
            slice(rows.start - self.top, rows.stop - self.top),
            slice(columns.start - self.left, columns.stop - self.left),
        )
        colours[rows, columns] = self.colours[inside]
        alpha[rows, columns] = self.alpha[inside]
        return colours, alpha


class LayerScenes(EndlessScenes):
    """Cut-outs over an all-in-focus background on slanted planes, ray traced through a lens.

    Endless, or ``length`` samples; sample ``i`` is the same in every process, whatever was asked
    before. ``scenes[i]`` is a dict of float32 tensors:

    - ``image`` (3, H, W): all-in-focus picture, sRGB in [0, 1], quantised to 8 bits, composed in
      linear light: where the lens is in focus, it equals the target. With ``stopped_down`` it is
      a little blurred as well.
    - ``disparity`` (1, H, W) in [0, 1], larger = nearer: at each pixel that of the nearest surface
      more than half opaque, with hard edges.
    - ``df`` (): focus disparity. ``K`` (): blur radius in pixels per unit of disparity.
    - ``target`` (3, H, W): the same scene through the lens, sRGB in [0, 1].

    The background's disparity rises from 0.001 in a random direction, to 0.25 at most; every
    foreground is a plane nearer than that, of random facing angle, which crosses no other.

    Args:
        seed: another seed is another data set.
        size: H = W, pixels.
        foregrounds: folder or folders of RGBA cut-outs; None makes them from nothing.
        backgrounds: folder or folders of photographs, all in focus; None makes them from nothing.
        procedural_share: share of cut-outs and of backgrounds made from nothing although there
            are folders.
        layers: fewest and most foregrounds of a scene.
        focus: shares of the scenes with "foreground" and "background" (the mean disparity of what
            is seen of it) or "anywhere" (a random pixel) in focus; default 0.4, 0.4, 0.2, and with
            ``compat="official"`` 0.5, 0.5, 0.
        radius: range of the largest blur radius in the picture in pixels, drawn log-uniformly;
            default size / 256 to size / 8.
        facing_angle: foregrounds are turned away by up to this angle in degrees, in a random
            direction, seen through a lens of focal length 1.2 picture sides; less where they
            would leave their range of disparities.
        stopped_down: ``image`` is taken through the same lens with this share of K, as a photo at a
            small aperture is: f/16 beside a target at f/1.8 is 0.1125. 0 is all in focus.
        exposure: range of the factor on all light, in stops. Light beyond white is clipped in the
            image and not before the lens.
        aperture: one opening for all samples, or "random"; default the disc.
        samples_per_side: side of the grid of lens points; default :func:`lens_grid_side`.
        corrupted_share: share of the disparity maps with the mistakes of estimators
            (:func:`~data_synthesis.corruption.corrupt_disparity`); ``df`` and ``K`` go with them.
        compat: "ours", "official" (what the released code does) or a :class:`Compat`.
        length: makes ``len()`` and plain iteration finite.

    Raises:
        ValueError: a setting is out of its range, a folder is missing or has no usable picture.
            Files that cannot be used are named in a warning and listed in ``problems``.
    """

    def __init__(
        self,
        seed: int = 0,
        size: int = 512,
        *,
        foregrounds: PathLike | Sequence[PathLike] | None = None,
        backgrounds: PathLike | Sequence[PathLike] | None = None,
        procedural_share: float = 0.0,
        layers: tuple[int, int] = (1, 3),
        focus: Mapping[str, float] | None = None,
        radius: tuple[float, float] | None = None,
        facing_angle: float = 60.0,
        stopped_down: float = 0.0,
        exposure: tuple[float, float] = (-1.0, 0.5),
        aperture: Aperture | Literal["random"] | None = None,
        samples_per_side: int | None = None,
        corrupted_share: float = 0.0,
        compat: Literal["ours", "official"] | Compat = "ours",
        length: int | None = None,
    ) -> None:
        if not isinstance(compat, Compat):
            if compat not in ("ours", "official"):
                raise ValueError(f'compat is {compat!r}; wanted "ours", "official" or a Compat.')
            compat = OFFICIAL if compat == "official" else Compat()
        if focus is None:
            anywhere = 0.0 if compat == OFFICIAL else 0.2
            focus = {"foreground": (1 - anywhere) / 2, "background": (1 - anywhere) / 2}
            focus["anywhere"] = anywhere
        _check_whole(seed=seed, size=size)
        if size < 32:
            raise ValueError(f"size is {size}; wanted at least 32 pixels.")
        if compat.canvas is not None and size > compat.canvas:
            raise ValueError(
                f"size is {size}, larger than the canvas of {compat.canvas} that it is cut from."
            )
        if compat.strength_by_factor and radius is not None:
            raise ValueError(
                "radius has no effect where the strength is drawn as a factor; leave it out, or "
                "set strength_by_factor=False."
            )
        radius = (size / 256, size / 8) if radius is None else radius
        if not 0 < radius[0] <= radius[1] or not math.isfinite(radius[1]):
            raise ValueError(
                f"radius is {radius!r}; wanted (smallest, largest) pixels with 0 < smallest <= "
                "largest."
            )
        if compat.changed_afterwards and aperture is not None:
            raise ValueError(
                "Mirroring finished pictures would mirror the aperture too, so the disc is all "
                "that goes with it; leave aperture out, or set changed_afterwards=False."
            )
        if not (isinstance(aperture, Aperture) or aperture in (None, "random")):
            raise ValueError(f'aperture is {aperture!r}; wanted an Aperture or "random".')
        for name, share in (
            ("procedural_share", procedural_share),
            ("corrupted_share", corrupted_share),
        ):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share!r}; wanted a share from 0 to 1.")
        if not 1 <= layers[0] <= layers[1]:
            raise ValueError(f"layers is {layers!r}; wanted (fewest, most) with 1 <= fewest.")
        if set(focus) - set(FOCUS_CHOICES) or min(focus.values()) < 0 or sum(focus.values()) <= 0:
            raise ValueError(
                f"focus is {dict(focus)!r}; wanted shares of {', '.join(FOCUS_CHOICES)}, not "
                "negative, for instance {'foreground': 1}."
            )
        if not 0 <= facing_angle < 90:
            raise ValueError(
                f"facing_angle is {facing_angle!r}; wanted degrees from 0 to below 90."
            )
        if not 0 <= stopped_down < 1:
            raise ValueError(
                f"stopped_down is {stopped_down!r}; wanted a share of the target's K from 0 to "
                "below 1, for instance 1.8 / 16 for f/16 beside f/1.8."
            )
        if stopped_down and compat.image_in_display_space:
            raise ValueError(
                "An image composed in display values is all in focus; leave stopped_down out, or "
                "set image_in_display_space=False."
            )
        if not -8 <= exposure[0] <= exposure[1] <= 8:
            raise ValueError(f"exposure is {exposure!r}; wanted (lowest, highest) stops, -8 to 8.")
        if samples_per_side is not None and samples_per_side < 1:
            raise ValueError(f"samples_per_side is {samples_per_side!r}; wanted at least 1.")
        if length is not None and length < 0:
            raise ValueError(f"length is {length!r}; wanted None (endless) or at least 0.")
        self.seed, self.size, self.length, self.compat = int(seed), int(size), length, compat
        self.layers, self.radius = (int(layers[0]), int(layers[1])), radius
        self.focus = {name: float(focus.get(name, 0)) for name in FOCUS_CHOICES}
        self.facing_angle, self.exposure = facing_angle, exposure
        self.stopped_down = stopped_down
        self.aperture: Aperture | Literal["random"] | None = aperture
        self.samples_per_side, self.corrupted_share = samples_per_side, corrupted_share
        self.procedural_share = procedural_share
        self._foregrounds = None if foregrounds is None else PictureFolders(foregrounds, "cutout")
        self._backgrounds = (
            None if backgrounds is None else PictureFolders(backgrounds, "background")
        )

    @property
    def problems(self) -> list[str]:
        """Every file that was left out, with the reason."""
        folders = [self._foregrounds, self._backgrounds]
        return [problem for folder in folders if folder for problem in folder.problems]

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the samples, for the metadata of shards."""
        aperture = self.aperture
        # Unsaid at its default: folders begun before it could be chosen are the same data set.
        chosen = {"stopped_down": self.stopped_down} if self.stopped_down else {}
        return {
            "generator": "layers",
            "version": GENERATOR_VERSION,
            "seed": self.seed,
            "size": self.size,
            "foregrounds": self._foregrounds.fingerprint if self._foregrounds else "procedural",
            "backgrounds": self._backgrounds.fingerprint if self._backgrounds else "procedural",
            "procedural_share": self.procedural_share,
            "layers": list(self.layers),
            "focus": self.focus,
            "radius": list(self.radius),
            "facing_angle": self.facing_angle,
            "exposure": list(self.exposure),
            "aperture": aperture.to_dict() if isinstance(aperture, Aperture) else aperture,
            "samples_per_side": self.samples_per_side,
            "corrupted_share": self.corrupted_share,
            "compat": dataclasses.asdict(self.compat),
            **chosen,
        }

    def arrays(self, index: int) -> dict[str, Any]:
        """The sample as it is stored: image uint8, target and disparity uint16 (C, H, W), df and K
        floats, ``aperture`` and ``provenance`` dicts that JSON can hold."""
        compat = self.compat
        rng = self._generator(index, 1)
        factor = 2.0 ** rng.uniform(-2, 3)
        radius = math.exp(rng.uniform(math.log(self.radius[0]), math.log(self.radius[1])))
        aperture = self._aperture(rng)
        if compat.strength_by_factor:
            scene = self.compose(index, RELEASED_STRENGTH * factor)
            K = RELEASED_STRENGTH * factor / max(scene.df, 1 - scene.df)
            side = self.samples_per_side or int(RELEASED_GRID * factor)
        else:
            scene = self.compose(index, radius)
            K = self.strength(scene, radius, aperture)
            side = self.samples_per_side or lens_grid_side(radius)
        image, disparity = self.image(scene, K, aperture, side), self.disparity(scene)
        target = compat.to_display(scene.light(K, aperture, side))
        provenance = {**scene.provenance, "traced_K": K, "samples_per_side": side}
        df = scene.df
        if compat.understated_label:
            K *= rng.uniform(2 / 3, 1) * max(df, 1 - df)
        if compat.changed_afterwards:
            image, target, disparity = _changed(rng, image, target, disparity)
        image = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
        rng = self._generator(index, 2)
        if rng.uniform() < self.corrupted_share:
            corrupted = corrupt_disparity(
                np.clip(disparity, 0, 1), df, K, image.astype(np.float32) / 255, rng
            )
            # The unit of disparity may have changed, and colour fringes are counted in it.
            aperture = dataclasses.replace(aperture, fringe=aperture.fringe * K / corrupted.K)
            disparity, df, K, provenance["mistakes"] = corrupted
        return {
            "image": np.ascontiguousarray(image.transpose(2, 0, 1)),
            "disparity": np.rint(np.clip(disparity, 0, 1) * 65535).astype(np.uint16)[None],
            "df": float(df),
            "K": float(K),
            "target": np.ascontiguousarray(_sixteen_bits(target).transpose(2, 0, 1)),
            "aperture": aperture.to_dict(),
            "provenance": provenance,
        }

    def compose(self, index: int, radius: float) -> ComposedScene:
        """Scene ``index``, on a canvas wide enough for this largest radius in pixels."""
        rng, compat = self._generator(index, 0), self.compat
        border = compat.border
        if border is None:
            border = math.ceil(HIDDEN_BLUR_ALLOWANCE * radius) + 2
        canvas = compat.canvas or self.size
        side = canvas + 2 * border
        top, left = (border + int(value) for value in rng.integers(canvas - self.size + 1, size=2))
        background, background_provenance = self._background(rng, side)
        count = 1 if compat.near_centre else int(rng.integers(self.layers[0], self.layers[1] + 1))
        foregrounds = [self._foreground(rng, side, border) for _ in range(count)]
        planes = self._planes(rng, side, [foreground.box for foreground in foregrounds])

        gain = 1.0 if compat.changed_afterwards else 2 ** rng.uniform(*self.exposure)
        placed = [foreground.on_canvas(side) for foreground in foregrounds]
        colours = np.stack([*(part for part, _ in placed), background]) * np.float32(gain)
        alphas = np.stack([*(part for _, part in placed), np.ones((side, side), np.float32)])
        scene = ComposedScene(
            colours,
            alphas,
            planes,
            [foreground.box for foreground in foregrounds],
            top,
            left,
            self.size,
            0.0,
            {},
        )
        scene.df, focus = self._focus(rng, scene)
        scene.provenance = {
            "foregrounds": [
                {
                    **foreground.provenance,
                    "box": [foreground.top - top, foreground.left - left, *foreground.alpha.shape],
                    "plane": _from_corner(plane, top, left),
                }
                for foreground, plane in zip(foregrounds, planes, strict=False)
            ],
            "background": {**background_provenance, "plane": _from_corner(planes[-1], top, left)},
            "focus": focus,
            "gain": gain,
        }
        return scene

    def strength(
        self, scene: ComposedScene, radius: float, aperture: Aperture | None = None
    ) -> float:
        """K for this largest blur radius (pixels) among the surfaces seen in the picture.

        Less where a surface hidden behind them would be blurred beyond the canvas, or a plane be
        met edge-on.
        """
        seen = float(np.abs(scene.hard_disparity() - scene.df).max())
        farthest, slope = scene.reach()
        limits = [radius / max(seen, 0.01), STEEPEST_BLUR / max(slope, 1e-9)]
        if self.compat.border is None:
            if aperture is not None:
                farthest += abs(aperture.fringe)
            limits.append((HIDDEN_BLUR_ALLOWANCE * radius + 1) / max(farthest, 1e-9))
        return min(limits)

    def image(
        self,
        scene: ComposedScene,
        K: float = 0.0,
        aperture: Aperture | None = None,
        samples_per_side: int = 1,
    ) -> np.ndarray:
        """(H, W, 3) picture through the lens stopped down, all in focus unless ``stopped_down`` is
        set; display values in [0, 1]. Arguments as of :meth:`ComposedScene.light`."""
        if self.compat.image_in_display_space:
            rows, columns = _square(scene.top, scene.size), _square(scene.left, scene.size)
            display = self.compat.to_display(scene.colours[:, rows, columns])
            return np.clip(_over(display, scene.alphas[:, rows, columns]), 0, 1)
        lens = (self.stopped_down * K, aperture, samples_per_side) if self.stopped_down else (0.0,)
        return self.compat.to_display(np.clip(scene.light(*lens), 0, 1))

    def disparity(self, scene: ComposedScene) -> np.ndarray:
        """(H, W) float32 disparity map of the picture."""
        if self.compat.blended_disparity:
            return scene.blended_disparity()
        return scene.hard_disparity()

    def _generator(self, index: int, purpose: int) -> np.random.Generator:
        # One for each purpose, so that a setting of one thing leaves the others as they were.
        return np.random.default_rng([self.seed, index, purpose])

    def _aperture(self, rng: np.random.Generator) -> Aperture:
        if self.aperture == "random":
            return random_aperture(rng)
        return self.aperture or Aperture()

    def _picture(
        self, rng: np.random.Generator, folders: PictureFolders | None, side: int
    ) -> tuple[Image.Image | None, int, dict[str, Any]]:
        """A picture of the folders, or None, a seed to make one of that side, and provenance."""
        side = max(side, SMALLEST_PROCEDURAL_SIDE)
        procedural = rng.uniform() < self.procedural_share
        seed = int(rng.integers(2**32))
        position = rng.uniform()
        if folders is None or procedural:
            return None, seed, {"procedural": seed, "side": side}
        index = min(int(position * len(folders)), len(folders) - 1)
        return folders[index], seed, folders.provenance(index)

    def _background(self, rng: np.random.Generator, side: int) -> tuple[np.ndarray, dict[str, Any]]:
        """(side, side, 3) linear light of the background layer, and its provenance."""
        compat = self.compat
        picture, seed, provenance = self._picture(rng, self._backgrounds, side)
        if picture is None:
            picture = procedural_background(seed, provenance["side"])
        if compat.ignores_aspect:
            crop = (0, 0, picture.width, picture.height)
        else:
            crop = _square_crop(rng, picture.width, picture.height, side)
        mirrored = not compat.changed_afterwards and bool(rng.uniform() < 0.5)
        if compat.unclipped_alpha:
            channels = [_resized_floats(channel, side, side, crop) for channel in picture.split()]
            light = compat.to_light(np.stack(channels, axis=-1) / np.float32(255))
        else:
            resized = picture.resize(
                (side, side), Image.Resampling.LANCZOS, box=crop, reducing_gap=3.0
            )
            light = self._light_table()[np.asarray(resized)]
        provenance = {**provenance, "crop": [float(edge) for edge in crop], "mirrored": mirrored}
        return (light[:, ::-1] if mirrored else light), provenance

    def _foreground(self, rng: np.random.Generator, side: int, border: int) -> _Foreground:
        """A cut-out, resized and placed on the canvas."""
        compat = self.compat
        picture, seed, provenance = self._picture(rng, self._foregrounds, self.size)
        if picture is None:
            picture = procedural_cutout(seed, provenance["side"])
        mirrored = not compat.changed_afterwards and bool(rng.uniform() < 0.5)
        if mirrored:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        box = picture.getchannel("A").getbbox()
        assert box is not None  # pictures without anything visible are refused on reading
        if compat.loses_last_line:
            box = (box[0], box[1], max(box[2] - 1, box[0] + 1), max(box[3] - 1, box[1] + 1))
        width, height = box[2] - box[0], box[3] - box[1]
        cut_off = (False,) * 4 if compat.near_centre else _cut_off_sides(picture)
        if compat.near_centre:
            scale = rng.uniform(0.5, 1) * math.sqrt(side**2 / (height * width))
            while max(height, width) * scale > side:
                scale *= 0.9
        else:
            scale = self._scale(rng, height, width, cut_off)
        height, width = max(round(height * scale), 2), max(round(width * scale), 2)
        cut = picture.crop(box)
        if compat.unclipped_alpha:
            whole = (0, 0, *cut.size)
            channels = [_resized_floats(part, width, height, whole) for part in cut.split()]
            straight = np.stack(channels, axis=-1) / np.float32(255)
            colours, alpha = compat.to_light(straight[..., :3]), straight[..., 3]
        else:
            # Pillow weights the colours by opacity while it resizes, and clips what overshoots.
            pixels = np.asarray(cut.resize((width, height), Image.Resampling.LANCZOS))
            colours = self._light_table()[pixels[..., :3]]
            alpha = pixels[..., 3].astype(np.float32) / 255
        if compat.near_centre:
            shift = rng.integers(-(side - 2 * border) // 4, (side - 2 * border) // 4 + 1, size=2)
            top = int(np.clip((side - height) // 2 + shift[0], 0, side - height))
            left = int(np.clip((side - width) // 2 + shift[1], 0, side - width))
        else:
            inner = side - 2 * border
            top = border + _position(rng, height, inner, *cut_off[:2])
            left = border + _position(rng, width, inner, *cut_off[2:])
            # Beyond the frame a cut-off subject goes on as it ends, for the rays that get there.
            above, below, before, after = (border * cut for cut in cut_off)
            alpha = np.pad(alpha, ((above, below), (before, after)), "edge")
            colours = np.pad(colours, ((above, below), (before, after), (0, 0)), "edge")
            top, left = top - above, left - before
        return _Foreground(colours, alpha, top, left, {**provenance, "mirrored": mirrored})

    def _scale(
        self, rng: np.random.Generator, height: int, width: int, cut_off: Sequence[bool]
    ) -> float:
        """How much a cut-out is enlarged: to 0.3 to 0.95 of the picture's side, the mean of its
        sides taken; to the whole side where both ends are cut off."""
        share = math.exp(rng.uniform(math.log(0.3), math.log(0.95)))
        scale = self.size * share / math.sqrt(height * width)
        scale = min(scale, 1.3 * self.size / max(height, width))
        if cut_off[0] and cut_off[1]:
            scale = max(scale, self.size / height)
        if cut_off[2] and cut_off[3]:
            scale = max(scale, self.size / width)
        return min(scale, LARGEST_ENLARGEMENT)

    def _light_table(self) -> np.ndarray:
        """(256,) linear light of 8-bit display values."""
        return self.compat.to_light(np.arange(256, dtype=np.float32) / 255)

    def _planes(
        self, rng: np.random.Generator, side: int, boxes: Sequence[tuple[int, int, int, int]]
    ) -> np.ndarray:
        """(L, 3) planes, nearest first, the background last; none crosses another in its box."""
        slopes = rng.uniform(-1, 1, 2)
        slopes *= rng.uniform(0, BACKGROUND_SPAN) / max(np.abs(slopes).sum() * (side - 1), 1e-9)
        lowest_corner = np.minimum(slopes, 0).sum() * (side - 1)
        background = np.array([FARTHEST - lowest_corner, *slopes])
        nearest_background = FARTHEST + np.abs(slopes).sum() * (side - 1)

        # Every foreground has a range of disparities of its own.
        count = len(boxes)
        lowest = nearest_background + DISPARITY_GAP
        middles = np.sort(rng.uniform(lowest, 1, count))[::-1]
        limits = [1.0, *((middles[:-1] + middles[1:]) / 2), lowest]
        planes = []
        for number, (top, left, height, width) in enumerate(boxes):
            middle, near, far = middles[number], limits[number], limits[number + 1]
            tilt = math.tan(math.radians(rng.uniform(0, self.facing_angle)))
            direction = rng.uniform(0, math.tau)
            slope = middle * tilt / (FOCAL_LENGTH * self.size)
            slope = slope * np.array([math.cos(direction), math.sin(direction)])
            # Half the change of disparity across the box has to stay within the range.
            change = (abs(slope[0]) * width + abs(slope[1]) * height) / 2
            slope *= min(1.0, min(near - middle, middle - far) / max(change, 1e-9))
            if self.compat.flat_foreground:
                slope *= 0
            centre_x, centre_y = left + (width - 1) / 2, top + (height - 1) / 2
            planes.append([middle - slope[0] * centre_x - slope[1] * centre_y, *slope])
        return np.array([*planes, background])

    def _focus(self, rng: np.random.Generator, scene: ComposedScene) -> tuple[float, str]:
        """Focus disparity, and what it is that is in focus."""
        shares = np.array(list(self.focus.values()))
        choice = str(rng.choice(FOCUS_CHOICES, p=shares / shares.sum()))
        row, column = rng.integers(self.size, size=2)
        pick = rng.uniform()
        if choice == "anywhere":
            return float(scene.hard_disparity()[row, column]), choice
        visible, disparities = scene.visible(), scene.disparities()
        seen = [i for i in range(len(visible) - 1) if visible[i].mean() > SMALLEST_SHARE_IN_FOCUS]
        if choice == "background" or not seen:
            layer, choice = len(visible) - 1, "background"
        else:
            layer = seen[int(pick * len(seen))]
        where = visible[layer] if visible[layer].any() else np.ones_like(visible[layer])
        return float(disparities[layer][where].mean(dtype=np.float64)), choice


def lens_grid_side(radius: float) -> int:
    """Side of the grid of lens points for a largest blur radius in pixels: 1.75 per pixel, as in
    the released code, but not less than 21.

    Neighbouring rays are then at most 1.2 pixels apart where the blur is strongest. Beside a much
    finer grid the picture is off by 55 dB or more.
    """
    return max(21, int(RELEASED_GRID * radius / RELEASED_STRENGTH))


def _check_whole(**numbers: int) -> None:
    for name, value in numbers.items():
        if int(value) != value or value < 0:
            raise ValueError(f"{name} is {value!r}; wanted a whole number of at least 0.")


def _square(start: int, size: int) -> slice:
    return slice(start, start + size)


def _over(values: np.ndarray, alphas: np.ndarray) -> np.ndarray:
    """Layers (L, H, W, C) blended by opacity (L, H, W), nearest first; the last one is opaque."""
    blended = values[-1]
    for value, alpha in zip(values[-2::-1], alphas[-2::-1], strict=True):
        blended = alpha[..., None] * value + (1 - alpha[..., None]) * blended
    return blended


def _from_corner(plane: np.ndarray, top: int, left: int) -> list[float]:
    """The plane in the picture's own pixel coordinates."""
    corner = plane[0] + plane[1] * left + plane[2] * top
    return [float(corner), float(plane[1]), float(plane[2])]


def _square_crop(
    rng: np.random.Generator, width: int, height: int, side: int
) -> tuple[float, float, float, float]:
    """A random square of the photograph (left, top, right, bottom), not enlarged without need."""
    largest = min(width, height)
    smallest = min(largest, max(side, largest / 2))
    crop = rng.uniform(smallest, largest)
    left, top = rng.uniform(0, width - crop), rng.uniform(0, height - crop)
    return left, top, left + crop, top + crop


def _resized_floats(
    channel: Image.Image, width: int, height: int, box: tuple[float, float, float, float]
) -> np.ndarray:
    """(height, width) float32, resized with the overshoot of Lanczos kept."""
    return np.asarray(
        channel.convert("F").resize((width, height), Image.Resampling.LANCZOS, box=box)
    )


def _cut_off_sides(picture: Image.Image) -> tuple[bool, bool, bool, bool]:
    """Whether the subject runs out of its own picture: above, below, left, right."""
    opaque = np.asarray(picture.getchannel("A")) > 127
    edges = (opaque[0], opaque[-1], opaque[:, 0], opaque[:, -1])
    above, below, before, after = (bool(edge.mean() > CUT_OFF_SHARE) for edge in edges)
    return above, below, before, after


def _position(
    rng: np.random.Generator, length: int, inner: int, cut_before: bool, cut_after: bool
) -> int:
    """Where a cut-out of this length begins in a picture of ``inner`` pixels, along one axis.

    A cut-off end lies at the frame or up to a quarter of the length beyond it; a whole subject
    has its middle anywhere but in the outer tenths.
    """
    beyond = rng.uniform(0, 0.25) * length
    middle = rng.uniform(0.1, 0.9) * inner
    if cut_before and cut_after:
        return (inner - length) // 2
    if cut_before:
        return -int(beyond)
    if cut_after:
        return inner - length + int(beyond)
    return int(middle - length / 2)


def _changed(
    rng: np.random.Generator, image: np.ndarray, target: np.ndarray, disparity: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finished pictures mirrored and their display values scaled, as the released code does."""
    image, target = np.clip(image, 0, 1), np.clip(target, 0, 1)
    for axis in (1, 0):
        if rng.uniform() < 0.5:
            image, target, disparity = (
                np.flip(array, axis) for array in (image, target, disparity)
            )
    if rng.uniform() < 0.75:
        brightness = np.float32(min(0.7 + rng.uniform(), 1.1))
        image, target = np.clip(image * brightness, 0, 1), np.clip(target * brightness, 0, 1)
    return image, target, disparity


def _sixteen_bits(display: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(display, 0, 1) * 65535).astype(np.uint16)


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the folders that layer scenes are made of."""
    parser.add_argument(
        "--foregrounds",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="folders of RGBA cut-outs (default: made from nothing)",
    )
    parser.add_argument(
        "--backgrounds",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="folders of photographs, all in focus (default: made from nothing)",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what is particular to layer scenes; ``--seed`` and ``--size`` belong to every kind."""
    add_source_arguments(parser)
    parser.add_argument(
        "--procedural-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of cut-outs and backgrounds made from nothing all the same (default 0)",
    )
    parser.add_argument(
        "--layers",
        type=int,
        nargs=2,
        default=(1, 3),
        metavar=("FEWEST", "MOST"),
        help="foregrounds of a scene (default 1 3)",
    )
    parser.add_argument(
        "--focus", choices=FOCUS_CHOICES, help="what is always in focus (default: it varies)"
    )
    parser.add_argument(
        "--radius",
        type=float,
        nargs=2,
        metavar=("SMALLEST", "LARGEST"),
        help="largest blur radius of a picture, pixels (default size/256 to size/8)",
    )
    parser.add_argument(
        "--facing-angle",
        type=float,
        default=60.0,
        metavar="DEGREES",
        help="how far foregrounds are turned away at most (default 60)",
    )
    parser.add_argument(
        "--stopped-down",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="the image is taken with this share of K: 0.1125 is f/16 beside f/1.8 (default 0, all "
        "in focus)",
    )
    add_aperture_argument(parser)
    parser.add_argument(
        "--samples-per-side",
        type=int,
        metavar="N",
        help="grid of lens points (default: 1.75 per pixel of radius, at least 21)",
    )
    parser.add_argument(
        "--corrupted-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of disparity maps with the mistakes of estimators (default 0)",
    )
    parser.add_argument(
        "--compat",
        choices=("ours", "official"),
        default="ours",
        help="official: as the released code makes its samples, slips included",
    )


def from_options(options: argparse.Namespace) -> LayerScenes:
    """The data set of parsed :func:`add_arguments`, ``--seed`` and ``--size``."""
    return LayerScenes(
        options.seed,
        options.size,
        foregrounds=options.foregrounds,
        backgrounds=options.backgrounds,
        procedural_share=options.procedural_share,
        layers=tuple(options.layers),
        focus=None if options.focus is None else {options.focus: 1.0},
        radius=None if options.radius is None else tuple(options.radius),
        facing_angle=options.facing_angle,
        stopped_down=options.stopped_down,
        aperture=options.aperture,
        samples_per_side=options.samples_per_side,
        corrupted_share=options.corrupted_share,
        compat=options.compat,
    )

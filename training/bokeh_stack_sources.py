"""Pictures with lens blur that a generator of bokeh stacks is trained on, on one axis of strength.

K is metric: pixels of blur radius *of the training picture* per 1/metre. Three sources give
pictures of ``size`` x ``size`` pixels with their K:

- :class:`SceneStacks`, or :class:`StoredSceneStacks` from a folder: procedural scenes, ray traced
  through a thin lens, true metric depth;
- :class:`RenderedPhotographs`: sharp photographs with metric depth, blurred by our renderer;
- :class:`PhotographPairs`: pairs of photographs of one scene, one sharp, one with lens blur.

Photographs are resized until their short side is ``size``, which multiplies K by the factor, and
cropped, which leaves K. A strength outside the range of the network is drawn again or left out,
never clipped.

Manifests are text files with one JSON object a line; paths are relative to the manifest's folder.
Of rendered photographs::

    {"image": "dog.jpg", "depth": "dog.npy", "caption": "a dog in a meadow"}

``image``: in focus everywhere. Exactly one of

- ``depth``: metres, floats (H, W) in an npy file;
- ``disparity``: 1/metres, floats in an npy or PFM file;
- ``normalised_disparity``: any map that :func:`bokehdiff.images.read_disparity` takes, in [0, 1],
  with the distances of its two ends, ``nearest_m`` and ``farthest_m`` (left out: infinity). By them
  a strength per unit of the map is converted: ``K = K_map / (1/nearest_m - 1/farthest_m)``.

``caption`` may be left out. Of pairs::

    {"image": "tree_f22.png", "target": "tree_f2.png", "K": 31.5, "caption": "a tree"}

``image`` is sharp, ``target`` the same view with lens blur, of the same size, whose K is given in
px*m of that file; or instead of K what it follows from: ``f_number``, ``focal_length_mm``,
``sensor_width_mm`` or ``focal_length_35mm``, ``focus_distance_m``, each taken from the EXIF data of
the target where left out; and ``uncropped_size``, [height, width] that the file would have without
cropping, if it was cropped.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bokehdiff.camera import Camera, subject_distance_m
from bokehdiff.focus import find_focus
from bokehdiff.images import (
    as_disparity_batch,
    linear_to_srgb,
    read_disparity,
    read_image,
    srgb_to_linear,
)
from bokehdiff.optics import depth_to_disparity, require_positive, rescale_strength
from bokehdiff.picture_files import InputRepairedWarning, load_numpy, reading
from bokehdiff.rendering import render_bokeh
from training.samples import draw

FOCUS = ("subject", "anywhere")
"""Focus of rendered photographs: the nearest large thing near the centre, or any pixel."""

LARGEST_RADIUS_SHARE = 1 / 8
"""Blur radius of rendered photographs in sides of the picture; beyond, nothing is left to see."""

SCENE_CAPTION = "flat things with patterns, one behind another"


class Source(Protocol):
    """Pictures with lens blur, by index.

    Attributes:
        count: how many scenes there are; None is endless.
        one_scene: whether it shows one scene at several K.
    """

    @property
    def count(self) -> int | None: ...

    @property
    def one_scene(self) -> bool: ...

    def sample(
        self, index: int, generator: torch.Generator, position: int, frames: int
    ) -> dict[str, Tensor] | None:
        """Return image and target (3, S, S), sRGB in [0, 1], and K (), px*m of these pictures.

        Args:
            index: of the scene.
            generator: decides the crop, the focus and the strengths, for all frames alike.
            position: which of the frames is wanted, from 0.
            frames: how many pictures of the scene there are, all at different K.

        Returns:
            None where no K within the range can be shown; another index is to be drawn.
        """

    def caption(self, index: int) -> str:
        """Return what the scene shows, or "" where nobody said it."""


class SceneStacks:
    """Procedural scenes of :class:`data_synthesis.stack_scenes.StackScenes`.

    Args:
        seed, size: of the data set; size in pixels.
        strengths: (smallest, largest) K, px*m.
        frames: most pictures of one scene.
        options: further arguments of StackScenes.

    Raises:
        ValueError: StackScenes does not take them.
    """

    count = None
    one_scene = True

    def __init__(
        self,
        seed: int,
        size: int,
        strengths: tuple[float, float],
        frames: int,
        options: Mapping[str, Any],
    ) -> None:
        # Training on photographs needs nothing of what makes scenes.
        from data_synthesis.stack_scenes import StackScenes

        self.strengths = strengths
        try:
            self.scenes = {
                number: StackScenes(seed, size, frames=number, strengths=strengths, **options)
                for number in {1, frames}
            }
        except TypeError as error:
            raise ValueError(
                f"The settings in data.options do not fit StackScenes: {error}."
            ) from error
        self._last: tuple[tuple[int, int], dict[str, Tensor]] | None = None

    def sample(
        self, index: int, generator: torch.Generator, position: int, frames: int
    ) -> dict[str, Tensor] | None:
        # The samples of a group follow each other, and tracing a scene takes time.
        if self._last is None or self._last[0] != (index, frames):
            self._last = ((index, frames), self.scenes[frames][index])
        scene = self._last[1]
        if not within(scene["K"], self.strengths):
            return None  # a scene too steep for what was drawn
        return {
            "image": scene["image"],
            "target": scene["stack"][position],
            "K": scene["K"][position],
        }

    def caption(self, index: int) -> str:
        return SCENE_CAPTION


class StoredSceneStacks:
    """Procedural scenes that ``python -m data_synthesis stacks`` wrote.

    Tracing a scene of 512 pixels takes seconds of a processor, reading it milliseconds.

    Args:
        folder: of the scenes.
        size: pixels a side that they must have.
        strengths: (smallest, largest) K, px*m; of scenes with a K outside, none is shown.
        frames: most pictures of one scene that are asked for.

    Raises:
        ValueError: no such folder, pictures of another size, or too few of each scene.
    """

    one_scene = True

    def __init__(
        self, folder: str | Path, size: int, strengths: tuple[float, float], frames: int
    ) -> None:
        from data_synthesis.stack_files import StoredStacks

        self.strengths = strengths
        self.scenes = StoredStacks(folder)
        self.count = len(self.scenes)
        self.seed = int(self.scenes.settings["seed"])
        settings = self.scenes.settings
        if settings["size"] != size or settings["frames"] < frames:
            raise ValueError(
                f"{folder} holds scenes of {settings['size']} pixels in {settings['frames']} "
                f"frames; data.size is {size}, and {frames} frames of a scene are shown together. "
                "Write others with `python -m data_synthesis stacks`, or change data.size or "
                "batch_size."
            )

    def sample(
        self, index: int, generator: torch.Generator, position: int, frames: int
    ) -> dict[str, Tensor] | None:
        scene = self.scenes[index]
        if not within(scene["K"], self.strengths):
            return None
        frame = torch.randperm(len(scene["K"]), generator=generator)[position]
        return {"image": scene["image"], "target": scene["stack"][frame], "K": scene["K"][frame]}

    def caption(self, index: int) -> str:
        return SCENE_CAPTION


class RenderedPhotographs:
    """Sharp photographs with metric depth, blurred by the layered renderer.

    Args:
        manifest: see the module.
        size: pixels a side of the training pictures.
        strengths: (smallest, largest) K, px*m of these; drawn uniformly, up to where the blur
            radius is an eighth of the side.
        focus: one of `FOCUS`.

    Raises:
        ValueError: a line of the manifest is not as it should be, or a file is missing.
    """

    one_scene = True

    def __init__(
        self,
        manifest: str | Path,
        size: int,
        strengths: tuple[float, float],
        focus: str = FOCUS[0],
    ) -> None:
        self.size, self.strengths, self.focus = size, strengths, focus
        maps = ("depth", "disparity", "normalised_disparity")
        self.entries = read_manifest(
            manifest, files=("image", *maps), others=("caption", "nearest_m", "farthest_m")
        )
        for entry in self.entries:
            given = [name for name in maps if name in entry]
            if len(given) != 1:
                raise ValueError(
                    f"{entry['where']} has {' and '.join(given) or 'no depth'}; wanted exactly "
                    f"one of {', '.join(maps)}. Without depth nothing is blurred, and a strength "
                    "beside a sharp picture teaches that strengths mean nothing."
                )
            if given == ["normalised_disparity"]:
                entry["ends"] = _ends(entry)
            short_side(entry["image"], size, entry["where"])
        self.count = len(self.entries)

    def sample(
        self, index: int, generator: torch.Generator, position: int, frames: int
    ) -> dict[str, Tensor] | None:
        entry = self.entries[index]
        image = read_image(entry["image"])
        disparity = metric_disparity(entry, *image.shape[-2:])
        image, disparity = random_crop(
            (resized(image, self.size), _resized_map(disparity, self.size)), self.size, generator
        )
        x, y = (draw(self.size, generator) for _ in range(2))
        wish = "auto" if self.focus == "subject" else (x, y)
        df = float(find_focus(disparity, wish)[0])
        farthest = float((disparity - df).abs().max())
        smallest, largest = self.strengths
        if farthest > 0:
            largest = min(largest, LARGEST_RADIUS_SHARE * self.size / farthest)
        if largest < smallest:
            return None
        shares = torch.rand(frames, generator=generator)
        K = smallest + (largest - smallest) * shares[position]
        target = render_bokeh(image, disparity, df, float(K), metric=True)
        return {"image": image[0], "target": target[0], "K": K}

    def caption(self, index: int) -> str:
        return str(self.entries[index].get("caption", ""))


class PhotographPairs:
    """Pairs of photographs, sharp and with lens blur, whose K is that of the training picture.

    Pairs whose K lies outside the range at that size are left out, with a warning.

    Args:
        manifest: see the module.
        size: pixels a side of the training pictures.
        strengths: (smallest, largest) K, px*m of these.

    Raises:
        ValueError: a line of the manifest is not as it should be, a file is missing, or no pair is
            within the range.
    """

    one_scene = False

    def __init__(self, manifest: str | Path, size: int, strengths: tuple[float, float]) -> None:
        self.size = size
        entries = read_manifest(
            manifest, files=("image", "target"), others=("caption", "K", *CAMERA_FIELDS)
        )
        for entry in entries:
            if "image" not in entry or "target" not in entry:
                raise ValueError(f"{entry['where']} lacks one of image and target; wanted both.")
            side = short_side(entry["target"], size, entry["where"])
            entry["K"] = rescale_strength(strength_of_pair(entry), side, size)
        self.entries = [entry for entry in entries if within(entry["K"], strengths)]
        left_out = [entry for entry in entries if not within(entry["K"], strengths)]
        if left_out:
            first = left_out[0]
            said = (
                f"{len(left_out)} of {len(entries)} pairs in {manifest} have a K outside "
                f"[{strengths[0]:g}, {strengths[1]:g}] px*m at {size} pixels and are left out; the "
                f"first is {first['where']}, with {first['K']:.4g}."
            )
            if not self.entries:
                raise ValueError(f"{said} Take pairs with another blur, or another data.size.")
            warnings.warn(said, InputRepairedWarning, stacklevel=2)
        self.count = len(self.entries)

    def sample(
        self, index: int, generator: torch.Generator, position: int, frames: int
    ) -> dict[str, Tensor] | None:
        entry = self.entries[index]
        image, target = read_image(entry["image"]), read_image(entry["target"])
        if image.shape != target.shape:
            raise ValueError(
                f"{entry['where']} has an image of {_size_of(image)} and a target of "
                f"{_size_of(target)}; wanted the same view at the same size."
            )
        image, target = random_crop(
            (resized(image, self.size), resized(target, self.size)), self.size, generator
        )
        return {"image": image[0], "target": target[0], "K": torch.tensor(entry["K"])}

    def caption(self, index: int) -> str:
        return str(self.entries[index].get("caption", ""))


# -- Manifests -----------------------------------------------------------------------------------

_LENS_FIELDS = ("f_number", "focal_length_mm", "sensor_width_mm", "focal_length_35mm")
CAMERA_FIELDS = (*_LENS_FIELDS, "focus_distance_m", "uncropped_size")


def read_manifest(
    manifest: str | Path, *, files: Sequence[str], others: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the entries of a manifest, with paths in place of the names of files.

    ``where`` of each says its line, for messages.

    Args:
        manifest: text file, one JSON object a line; empty lines are none.
        files: fields that name files; the first must be there.
        others: further fields that an entry may have.

    Raises:
        ValueError: there is no such manifest or it is empty; a line is no JSON object; a field is
            missing or unknown; a file does not exist.
    """
    path = Path(manifest)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The manifest {path} cannot be read: {error}.") from error
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"Line {number} of {path}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON ({error}).") from error
        if not isinstance(entry, dict) or files[0] not in entry:
            raise ValueError(f"{where} is no JSON object with the field {files[0]!r}.")
        if unknown := sorted(set(entry) - {*files, *others}):
            raise ValueError(
                f"{where} has the unknown field {unknown[0]!r}; known are "
                f"{', '.join((*files, *others))}."
            )
        for name in files:
            if name in entry:
                entry[name] = path.parent / str(entry[name])
                if not entry[name].is_file():
                    raise ValueError(f"{where} names {entry[name]} as {name}, which is no file.")
        entries.append({**entry, "where": where})
    if not entries:
        raise ValueError(f"The manifest {path} is empty.")
    return entries


def metric_disparity(entry: Mapping[str, Any], height: int, width: int) -> Tensor:
    """Return the map of an entry of rendered photographs in 1/metres, (1, 1, H, W).

    Raises:
        ValueError: not of the photograph's size, not of floats, out of range, or the same
            everywhere.
    """
    if "normalised_disparity" in entry:
        farthest, nearest = entry["ends"]
        relative = as_disparity_batch(
            read_disparity(entry["normalised_disparity"]), 1, height, width
        )
        disparity = farthest + relative * (nearest - farthest)
    else:
        name = "depth" if "depth" in entry else "disparity"
        file = entry[name]
        if file.suffix.lower() == ".npy":
            values = torch.from_numpy(load_numpy(file).copy())
        elif file.suffix.lower() == ".pfm" and name == "disparity":
            values = read_disparity(file)
        else:
            wanted = "an npy file" if name == "depth" else "an npy or PFM file"
            raise ValueError(f"{entry['where']} has the {name} {file.name}; wanted {wanted}.")
        if not values.is_floating_point():
            raise ValueError(
                f"{entry['where']} has a {name} of {values.dtype}; wanted floats in "
                f"{'metres' if name == 'depth' else '1/metres'}, because whole numbers carry no "
                "unit."
            )
        values = values.to(torch.float32)
        disparity = as_disparity_batch(
            depth_to_disparity(values) if name == "depth" else values, 1, height, width, metric=True
        )
    if bool(disparity.min() == disparity.max()):
        raise ValueError(
            f"The depth in {entry['where'][0].lower()}{entry['where'][1:]} is the same everywhere; "
            "wanted a measured or estimated map: this one blurs nothing at any strength."
        )
    return disparity


def _ends(entry: Mapping[str, Any]) -> tuple[float, float]:
    """What 0 and 1 of a normalised map are in 1/metres."""
    if "nearest_m" not in entry:
        raise ValueError(
            f"{entry['where']} has a normalised_disparity without nearest_m and farthest_m, the "
            "distances in metres of its ends 1 and 0: without them the map does not say how much a "
            "strength in px*m blurs. Give them, or depth or disparity with units."
        )
    nearest_m, farthest_m = entry["nearest_m"], entry.get("farthest_m", math.inf)
    try:
        require_positive("nearest_m", nearest_m, "1.5")
        require_positive("farthest_m", farthest_m, "20", infinity_allowed=True)
    except ValueError as error:
        raise ValueError(f"{entry['where']}: {error}") from error
    if nearest_m >= farthest_m:
        raise ValueError(
            f"{entry['where']} has nearest_m {nearest_m:g} and farthest_m {farthest_m:g}; wanted "
            "the nearer first."
        )
    return 1 / farthest_m, 1 / nearest_m


def strength_of_pair(entry: Mapping[str, Any]) -> float:
    """Return the K of an entry of pairs, px*m of the target as it is in its file.

    Raises:
        ValueError: it is given in two ways or in none, or is not a positive number.
    """
    camera_fields = [name for name in CAMERA_FIELDS if name in entry]
    if "K" in entry:
        if camera_fields:
            raise ValueError(
                f"{entry['where']} has K and {camera_fields[0]}; wanted one of the two ways to say "
                "the strength."
            )
        try:
            require_positive("K", entry["K"], "20")
        except ValueError as error:
            raise ValueError(f"{entry['where']}: {error}") from error
        return float(entry["K"])
    target = entry["target"]
    distance = entry.get("focus_distance_m")
    if distance is None:
        distance = subject_distance_m(target)
    if distance is None:
        raise ValueError(
            f"{entry['where']} says neither K nor focus_distance_m, and the EXIF data of "
            f"{target.name} lack the distance: give one of them."
        )
    with reading(target), Image.open(target) as picture:
        size = entry.get("uncropped_size", picture.size[::-1])
    try:
        require_positive("focus_distance_m", distance, "2.5", infinity_allowed=True)
        if not isinstance(size, Sequence) or len(size) != 2:
            raise ValueError(f"uncropped_size is {size!r}; wanted [height, width] in pixels.")
        camera = Camera.from_photo(target, **{name: entry.get(name) for name in _LENS_FIELDS})
        return camera.strength(size, 1 / float(distance), metric=True)
    except ValueError as error:
        raise ValueError(f"{entry['where']}: {error}") from error


def short_side(file: Path, least: int, where: str) -> int:
    """Return the short side of a picture in pixels.

    Raises:
        ValueError: no picture, or smaller than `least`.
    """
    if file.suffix.lower() == ".npy":
        raise ValueError(f"{where} names {file.name}; wanted a picture file such as PNG or JPEG.")
    with reading(file), Image.open(file) as picture:
        side = min(picture.size)
    if side < least:
        raise ValueError(
            f"{where} names {file.name}, whose short side is {side} pixels; wanted at least "
            f"data.size, {least}: enlarged pictures are blurred already."
        )
    return side


def within(K: float | Tensor, strengths: tuple[float, float]) -> bool:
    """Whether all strengths are in the range, up to rounding to float32."""
    values = torch.as_tensor(K, dtype=torch.float64)
    low, high = strengths[0] * (1 - 1e-6), strengths[1] * (1 + 1e-6)
    return bool(((values >= low) & (values <= high)).all())


# -- Pictures ------------------------------------------------------------------------------------


def resized(image: Tensor, short: int) -> Tensor:
    """Return photographs (1, 3, H, W) whose short side has `short` pixels; light is averaged."""
    size = _scaled(image.shape[-2:], short)
    if size == tuple(image.shape[-2:]):
        return image
    light = F.interpolate(srgb_to_linear(image), size, mode="bilinear", antialias=True)
    return linear_to_srgb(light).clamp(0, 1)


def _resized_map(values: Tensor, short: int) -> Tensor:
    """As `resized`, of maps, whose values between two things would be of neither."""
    return F.interpolate(values, _scaled(values.shape[-2:], short), mode="nearest-exact")


def _scaled(size: Sequence[int], short: int) -> tuple[int, int]:
    height, width = (max(round(side * short / min(size)), short) for side in size)
    return height, width


def random_crop(
    maps: Sequence[Tensor], size: int, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Return the same window of `size` x `size` pixels of each map (1, C, H, W)."""
    height, width = maps[0].shape[-2:]
    top, left = draw(height - size + 1, generator), draw(width - size + 1, generator)
    return tuple(one[..., top : top + size, left : left + size].contiguous() for one in maps)


def _size_of(image: Tensor) -> str:
    return f"{image.shape[-1]} x {image.shape[-2]} pixels"

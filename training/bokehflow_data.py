"""Samples that lens blur of films is learned from: frames, the same through a lens, and the lens.

There are three kinds, and all give the same sample, of T frames (T is 1 but for clips):

- ``frames``, ``bokeh`` (T, 3, C, C): all in focus and through the lens, sRGB in [0, 1].
- ``inverse_depth`` (T, 1, C, C): larger is nearer; NaN where unknown. In 1/metres if ``metric`` ()
  is true, else in a unit and from a zero of its own.
- ``gives_depth`` (): whether the network is given the true inverse depth; else it renders with its
  own.
- ``df``, ``K`` (): the lens, in 1/m and px*m, and ``photo_width_px`` (), the width of the photo
  that the frames are a crop of.
- ``camera`` (4,), of clips and pairs: f-number, focal length in mm, distance in focus in m, width
  of the sensor in mm.
- ``motion`` (T, 2, C, C) and ``visible`` (T, 1, C, C), of clips alone; see
  `data_synthesis.clip_scenes.ClipScenes`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from bokehdiff.models.bokehflow_lens import nominal_metres
from bokehdiff.optics import lens_strength, strength_from_camera
from training.samples import AugmentedCrops, draw, scenes_on_the_fly, seeded_generator

KINDS = ("stills", "clips", "pairs")
"""Photographs of `data_synthesis procedural`, clips of `data_synthesis clips`, and pairs of real
photographs."""
MANIFEST = "manifest.jsonl"
PHOTO_WIDTHS_PX = (384, 1920)
"""Widths of the photos that stills are taken for crops of, drawn log-uniformly."""
VALIDATION_PHOTO_WIDTH_PX = 1280
"""The width of the photo that a held-out still is taken for a crop of."""
SENSOR_WIDTH_MM = 36.0
CAMERA = ("f_number", "focal_length_mm", "focus_distance_m", "sensor_width_mm")
PICTURES = ("frames", "bokeh", "inverse_depth", "motion", "visible")
"""What of a sample lies on pixels."""

Scene = dict[str, Tensor]


class FlowCrops(AugmentedCrops):
    """Random crops of scenes, half of them mirrored left to right; `turned`, by quarter turns too.

    The lens stays as it is: a crop has the pixels of the photo it was cut from, and
    ``photo_width_px`` is the width of that. Scenes come in the order of `AugmentedCrops`. A share
    `given_share` of the samples with metric depth gives it to the network.

    Args:
        scenes: whatever `as_sample` reads, by index.
        as_sample: from a scene and a generator of the sample's own to a sample, without
            ``gives_depth``.
        turned: not for clips.
    """

    def __init__(
        self,
        scenes: Any,
        scene_count: int | None,
        crop_size: int,
        seed: int,
        *,
        as_sample: Callable[[Scene, torch.Generator | None], Scene],
        given_share: float,
        turned: bool,
    ) -> None:
        super().__init__(scenes, scene_count, crop_size, seed)
        self.as_sample = as_sample
        self.given_share = given_share
        self.turned = turned

    def __getitem__(self, sample_number: int) -> Scene:
        """Return the sample; see the head of this file."""
        generator = seeded_generator(self.seed, 1, sample_number)
        sample = self.as_sample(self.scenes[self._scene_index(sample_number)], generator)
        height, width = sample["frames"].shape[-2:]
        size = self.crop_size
        _check_crop(size, height, width)
        top, left, mirrored, quarter_turns = (
            draw(limit, generator) for limit in (height - size + 1, width - size + 1, 2, 4)
        )
        gives_depth = float(torch.rand((), generator=generator)) < self.given_share
        for name in PICTURES:
            if name in sample:
                crop = sample[name][..., top : top + size, left : left + size]
                crop = crop.flip(-1) if mirrored else crop
                crop = crop.rot90(quarter_turns, (-2, -1)) if self.turned else crop
                sample[name] = crop.contiguous()
        if mirrored and "motion" in sample:
            sample["motion"] = sample["motion"] * torch.tensor([-1.0, 1.0]).view(2, 1, 1)
        sample["gives_depth"] = sample["metric"] & gives_depth
        return sample


# -- What the kinds of scenes become -------------------------------------------------------------


def still_sample(scene: Mapping[str, Tensor], generator: torch.Generator | None) -> Scene:
    """Return the sample of a photograph with relative disparity, read as 0.1 to 1 in 1/m.

    Args:
        scene: image, target (3, H, W), disparity (1, H, W) in [0, 1], df () and K ().
        generator: draws the width of the photo; without it, the width is 1280 px.
    """
    width = float(VALIDATION_PHOTO_WIDTH_PX)
    if generator is not None:
        low, high = map(math.log, PHOTO_WIDTHS_PX)
        share = float(torch.rand((), generator=generator))
        width = math.exp(low + (high - low) * share)
    inverse_depth, df, K = nominal_metres(
        scene["disparity"], scene["df"].float(), scene["K"].float()
    )
    return {
        "frames": scene["image"][None],
        "bokeh": scene["target"][None],
        "inverse_depth": inverse_depth[None],
        "df": df,
        "K": K,
        "photo_width_px": torch.tensor(width),
        "metric": torch.tensor(True),
    }


def clip_sample(scene: Mapping[str, Tensor], generator: torch.Generator | None) -> Scene:
    """Return the sample of a clip of `data_synthesis.clip_scenes.ClipScenes`."""
    camera = [scene[name] for name in CAMERA]
    return {
        **{name: scene[name] for name in PICTURES},
        "df": 1 / scene["focus_distance_m"],
        "K": lens_strength(*camera, scene["photo_width_px"]),
        "camera": torch.stack(camera),
        "photo_width_px": scene["photo_width_px"],
        "metric": torch.tensor(True),
    }


def pair_sample(scene: Mapping[str, Tensor], generator: torch.Generator | None) -> Scene:
    """Return the sample of a pair of `PhotoPairs`."""
    return dict(scene)


AS_SAMPLE = {"stills": still_sample, "clips": clip_sample, "pairs": pair_sample}


class PhotoPairs(Dataset[Scene]):
    """Pairs of real photographs: all in focus, and the same through a lens that is known.

    A line of ``manifest.jsonl`` holds ``image`` and ``target``, names relative to the folder;
    ``f_number``, ``focal_length_mm`` and ``focus_distance_m`` of the target; ``sensor_width_mm`` if
    it is not 36, the width that the whole photo covers; and at most one of ``depth``, a ``.npy`` of
    metres (0, infinite or NaN where unknown), and ``disparity``, a ``.npy`` or a PNG in which
    larger is nearer, affine in 1/depth.

    ``pairs[i]`` is a sample; see the head of this file.

    Raises:
        ValueError: the manifest cannot be read, or a line is no pair.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = self.folder / MANIFEST
        try:
            lines = self.manifest.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ValueError(
                f"The manifest {self.manifest} cannot be read: {error.strerror}."
            ) from error
        self._pairs = [
            self._pair(number, line) for number, line in enumerate(lines, 1) if line.strip()
        ]
        if not self._pairs:
            raise ValueError(f"The manifest {self.manifest} has no lines; wanted one per pair.")

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Scene:
        pair = self._pairs[index]
        image, target = (_picture(self.folder / pair[name]) for name in ("image", "target"))
        size = image.shape[-2:]
        inverse_depth = torch.full((1, *size), math.nan)
        shown = {"target": target}
        if "depth" in pair:
            depth = _map(self.folder / pair["depth"])
            known = depth.isfinite() & (depth > 0)
            shown["depth"] = inverse_depth = (1 / depth).where(known, math.nan)
        elif "disparity" in pair:
            shown["disparity"] = inverse_depth = _map(self.folder / pair["disparity"])
        for name, values in shown.items():
            if values.shape[-2:] != size:
                raise ValueError(
                    f"{self.folder / pair[name]} is {values.shape[-1]} x {values.shape[-2]} pixels "
                    f"and {pair['image']} {size[1]} x {size[0]}; wanted the same size."
                )
        return {
            "frames": image[None],
            "bokeh": target[None],
            "inverse_depth": inverse_depth[None],
            "df": torch.tensor(1 / pair["camera"][2]),
            "K": torch.tensor(strength_from_camera(*pair["camera"], size[1])),
            "camera": torch.tensor(pair["camera"]),
            "photo_width_px": torch.tensor(float(size[1])),
            "metric": torch.tensor("depth" in pair),
        }

    def _pair(self, number: int, line: str) -> dict[str, Any]:
        """Names of files and the camera of a line."""
        try:
            entry = json.loads(line)
            pair = {name: str(entry[name]) for name in ("image", "target")}
            pair |= {name: str(entry[name]) for name in ("depth", "disparity") if name in entry}
            entry = {"sensor_width_mm": SENSOR_WIDTH_MM, **entry}
            camera = [float(entry[name]) for name in CAMERA]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"Line {number} of {self.manifest} is no pair ({error!r}); wanted JSON with image, "
                "target, f_number, focal_length_mm and focus_distance_m."
            ) from error
        if "depth" in pair and "disparity" in pair:
            raise ValueError(
                f"Line {number} of {self.manifest} has depth and disparity; wanted one of them."
            )
        try:
            strength_from_camera(*camera, 1)
        except ValueError as error:
            raise ValueError(f"Line {number} of {self.manifest}: {error}") from error
        return {**pair, "camera": camera}


def _picture(path: Path) -> Tensor:
    """(3, H, W) in [0, 1]."""
    with PIL.Image.open(path) as picture:
        array = np.array(picture.convert("RGB"), np.float32)
    return torch.from_numpy(array).permute(2, 0, 1) / 255


def _map(path: Path) -> Tensor:
    """(1, H, W), as it is stored."""
    if path.suffix == ".npy":
        values = np.load(path, allow_pickle=False).astype(np.float32)
    else:
        with PIL.Image.open(path) as picture:
            if picture.mode != "L" and not picture.mode.startswith("I"):
                raise ValueError(
                    f"{path} is of mode {picture.mode}; wanted a picture of one channel, or a .npy."
                )
            values = np.array(picture, np.float32)
    return torch.from_numpy(values.reshape(1, *values.shape[-2:]))


# -- Opening -------------------------------------------------------------------------------------


def open_scenes(folder: str | None, seed: int, args: argparse.Namespace) -> tuple[Any, int | None]:
    """Return scenes of ``data_kind`` by index and their number: those in `folder`, or endless ones.

    Args:
        folder: what the kind is stored in.
        seed: of scenes on the fly.
        args: settings of `training.bokehflow_task.add_bokehflow_settings`.
    """
    scenes: Any
    if args.data_kind == "pairs":
        assert folder is not None  # `check_bokehflow_settings` has refused it
        scenes = PhotoPairs(folder)
        return scenes, len(scenes)
    # Reading what is stored does not need what making scenes needs.
    if folder is not None:
        if args.data_kind == "stills":
            from data_synthesis.reader import ShardedScenes as Stored
        else:
            from data_synthesis.clip_files import StoredClips as Stored
        scenes = Stored(folder)
        return scenes, len(scenes)
    if args.data_kind == "stills":
        from data_synthesis.procedural import ProceduralScenes as Scenes
    else:
        from data_synthesis.clip_scenes import ClipScenes as Scenes
    return scenes_on_the_fly(Scenes, seed, args.data_size, args.data_options), None


def training_crops(args: argparse.Namespace) -> FlowCrops:
    """Return the samples of a run."""
    scenes, count = open_scenes(args.data_folder, args.data_seed, args)
    return FlowCrops(
        scenes,
        count,
        args.data_crop_size,
        args.seed,
        as_sample=AS_SAMPLE[args.data_kind],
        given_share=args.data_true_depth_share,
        turned=args.data_kind == "stills",
    )


def held_out_samples(args: argparse.Namespace) -> list[Scene]:
    """Return the first ``validation_scenes`` held-out samples, whole; of pairs, cut in the middle.

    Pairs are cut to ``data_crop_size``, as large as photographs are.
    """
    scenes, count = open_scenes(args.validation_folder, args.validation_seed, args)
    wanted = args.validation_scenes if count is None else min(args.validation_scenes, count)
    shown = tqdm(range(wanted), desc="held-out scenes", leave=False, disable=None)
    samples = [AS_SAMPLE[args.data_kind](scenes[index], None) for index in shown]
    if args.data_kind != "pairs":
        return samples
    return [central_crop(sample, args.data_crop_size) for sample in samples]


def central_crop(sample: Scene, size: int) -> Scene:
    """Return the sample of the middle `size` x `size` pixels."""
    height, width = sample["frames"].shape[-2:]
    _check_crop(size, height, width)
    top, left = (height - size) // 2, (width - size) // 2
    crops = {
        name: sample[name][..., top : top + size, left : left + size]
        for name in PICTURES
        if name in sample
    }
    return {**sample, **crops}


def _check_crop(size: int, height: int, width: int) -> None:
    if size > min(height, width):
        raise ValueError(
            f"Crops of {size} pixels do not fit pictures of {height} x {width} pixels."
        )

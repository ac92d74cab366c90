"""Samples that LiteBokeh learns from: photographs, and the same with what is not in focus blurred.

There are two kinds of data, layered scenes and pairs of real photographs. Both give the same
samples, display-encoded sRGB in [0, 1]:

- in phase ``"bokeh"``: ``image``, ``bokeh`` (3, C, C), and ``subject`` (1, C, C), what
  `bokehdiff.subject_weights.subject_share` finds in the whole photo,
- in phase ``"enhancement"``: ``image`` (3, C, C), and ``degraded`` (3, C, C), made worse by
  `training.photo_degradation.degraded`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from bokehdiff.subject_weights import subject_share
from evaluation.datasets.estimated_disparity import nearest_value, read_estimated_disparity
from evaluation.datasets.reading import MAP_SUFFIXES, PICTURE_SUFFIXES, files_by_name, map_of
from evaluation.photographs import read_picture
from training.photo_degradation import degraded
from training.samples import AugmentedCrops, draw, scenes_on_the_fly, seeded_generator
from training.validation import IN_FOCUS_RADIUS

KINDS = ("scenes", "pairs")
"""Scenes of `data_synthesis layers`, and pairs of real photographs."""
SUBJECT_SCENES = {"focus": {"foreground": 1}, "stopped_down": 1.8 / 16}
"""Of scenes on the fly unless ``data.options`` say otherwise: a subject in focus, at f/16 and
f/1.8. What the small aperture leaves blurred is all that tells a network what the subject is, but
for what the picture shows."""

Scene = dict[str, Tensor]


class PhotoCrops(AugmentedCrops):
    """Random crops of photographs, half of them mirrored left to right; never turned.

    Scenes come in the order of `AugmentedCrops`.

    Args:
        scenes: image, target (3, H, W) and disparity (1, H, W) by index.
        phase: "bokeh" or "enhancement"; what a sample is, see the head of this file.
        noise: of `training.photo_degradation.degraded`.
    """

    def __init__(
        self,
        scenes: Any,
        scene_count: int | None,
        crop_size: int,
        seed: int,
        *,
        phase: str,
        noise: float = 1.0,
    ) -> None:
        super().__init__(scenes, scene_count, crop_size, seed)
        self.phase = phase
        self.noise = noise

    def __getitem__(self, sample_number: int) -> Scene:
        """Return the sample; see the head of this file.

        Raises:
            ValueError: the photograph is smaller than a crop.
        """
        scene = self.scenes[self._scene_index(sample_number)]
        generator = seeded_generator(self.seed, 1, sample_number)
        height, width = scene["image"].shape[-2:]
        size = self.crop_size
        if size > min(height, width):
            raise ValueError(
                f"Crops of {size} pixels do not fit photographs of {height} x {width} pixels. "
                "Lower data.crop_size, or leave out the small ones."
            )
        top, left, mirrored = (
            draw(limit, generator) for limit in (height - size + 1, width - size + 1, 2)
        )

        def crop(picture: Tensor) -> Tensor:
            cut = picture[..., top : top + size, left : left + size]
            return (cut.flip(-1) if mirrored else cut).contiguous()

        image = crop(scene["image"])
        if self.phase == "enhancement":
            return {"image": image, "degraded": degraded(image, generator, self.noise)}
        # Of the whole photo: the subject may lie outside the crop.
        subject = subject_share(*(scene[name][None] for name in ("image", "target", "disparity")))
        return {"image": image, "bokeh": crop(scene["target"]), "subject": crop(subject[0])}


class PhotoPairs(Dataset[Scene]):
    """Pairs of real photographs of one view, as those of EBB! lie.

    - ``original/NAME.jpg`` (or ``input/NAME.jpg``): all in focus; ``.jpeg`` and ``.png`` too,
    - ``bokeh/NAME.jpg``: the same through a wide aperture,
    - ``depth/NAME_pred.npy``, ``NAME_disparity.*`` or ``NAME.*``, optional for each: disparity by a
      network, with ``depth/convention.json`` as `evaluation.datasets.ebb.EBB` says.

    ``pairs[i]`` is a dict of ``image``, ``target`` (3, H, W) and ``disparity`` (1, H, W) in [0, 1],
    larger is nearer; NaN everywhere if there is no map.

    Raises:
        ValueError: there are no pairs, or one lacks its partner; when a pair is read, that its
            files are damaged or of different size.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        found = [name for name in ("original", "input") if (folder / name).is_dir()]
        if len(found) != 1:
            raise ValueError(
                f"{folder} has {'both original/ and input/' if found else 'no folder original/'}; "
                "wanted original/NAME.jpg (or input/NAME.jpg), all in focus, and bokeh/NAME.jpg."
            )
        images, targets = (
            files_by_name(folder / part, PICTURE_SUFFIXES) for part in (found[0], "bokeh")
        )
        for name in sorted(images.keys() ^ targets.keys()):
            lone, other = (
                (images[name], folder / "bokeh") if name in images
                else (targets[name], folder / found[0])
            )  # fmt: skip
            raise ValueError(
                f"{lone} has no partner in {other}; wanted a picture of the same name. Add it, or "
                "take this one out."
            )
        if not images:
            raise ValueError(f"{folder} holds no pairs: {found[0]}/ and bokeh/ are empty.")
        self.folder = folder
        maps = files_by_name(folder / "depth", MAP_SUFFIXES)
        self._pairs = [
            (image, targets[name], map_of(name, maps, folder / "depth"))
            for name, image in images.items()
        ]
        self._nearest = nearest_value(folder / "depth")

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Scene:
        files = self._pairs[index]
        image, target = (
            torch.from_numpy(read_picture(file).copy()).permute(2, 0, 1).float() / 255
            for file in files[:2]
        )
        size = image.shape[-2:]
        disparity = torch.full((1, *size), math.nan)
        if files[2].is_file():
            disparity = torch.from_numpy(read_estimated_disparity(files[2], self._nearest))[None]
        for file, values in zip(files[1:], (target, disparity), strict=True):
            if values.shape[-2:] != size:
                raise ValueError(
                    f"{file} is {values.shape[-1]} x {values.shape[-2]} pixels and {files[0]} "
                    f"{size[1]} x {size[0]}; wanted the same size."
                )
        return {"image": image, "target": target, "disparity": disparity}


# -- Opening -------------------------------------------------------------------------------------


def open_scenes(folder: str | None, seed: int, args: argparse.Namespace) -> tuple[Any, int | None]:
    """Return scenes of ``data_kind`` by index and their number: those in `folder`, or endless ones.

    Args:
        folder: shards, or pairs.
        seed: of scenes on the fly.
        args: settings of `training.litebokeh_task.add_litebokeh_settings`.
    """
    scenes: Any
    if args.data_kind == "pairs":
        assert folder is not None  # `check_litebokeh_settings` has refused it
        scenes = PhotoPairs(folder)
        return scenes, len(scenes)
    # Reading what is stored does not need what making scenes needs.
    if folder is not None:
        from data_synthesis.reader import ShardedScenes

        scenes = ShardedScenes(folder)
        return scenes, len(scenes)
    from data_synthesis.layer_scenes import LayerScenes

    options = {**SUBJECT_SCENES, **args.data_options}
    return scenes_on_the_fly(LayerScenes, seed, args.data_size, options), None


def training_crops(args: argparse.Namespace) -> PhotoCrops:
    """Return the samples of a run."""
    scenes, count = open_scenes(args.data_folder, args.data_seed, args)
    return PhotoCrops(
        scenes, count, args.data_crop_size, args.seed, phase=args.phase, noise=args.data_noise
    )


def held_out_samples(args: argparse.Namespace) -> list[Scene]:
    """Return the first ``validation_scenes`` held-out photographs, whole; see `held_out_sample`."""
    scenes, count = open_scenes(args.validation_folder, args.validation_seed, args)
    wanted = args.validation_scenes if count is None else min(args.validation_scenes, count)
    shown = tqdm(range(wanted), desc="held-out scenes", leave=False, disable=None)
    return [held_out_sample(scenes[index]) for index in shown]


def held_out_sample(scene: Mapping[str, Tensor]) -> Scene:
    """Return ``image`` and ``bokeh`` (3, H, W) of a scene, and where its lens is known ``in_focus``
    (1, H, W) bool: blurred by a circle of radius below 0.5 px."""
    sample = {"image": scene["image"], "bokeh": scene["target"]}
    if "K" in scene:
        radius = scene["K"] * (scene["disparity"] - scene["df"]).abs()
        sample["in_focus"] = radius < IN_FOCUS_RADIUS
    return sample

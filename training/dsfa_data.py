"""Samples that depth is learned from: sharp pictures with bokeh stacks, strengths and depth."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from training.samples import AugmentedCrops, draw, scenes_on_the_fly, seeded_generator

REFERENCE_NAMES = ("ref", "source_rgb", "image_path")
"""What manifests call the sharp picture; the first that is there counts."""
SAMPLE_KEYS = ("image", "depth", "stack", "K")


class StackCrops(AugmentedCrops):
    """Random crops of stacks, the same of all frames, half of them mirrored left to right.

    K stays as it is: a crop has the pixels of the picture it was cut from. Nothing is turned, since
    floors are below. Scenes come in the order of `AugmentedCrops`.
    """

    def __getitem__(self, sample_number: int) -> dict[str, Tensor]:
        """Return the sample: image (3, C, C), depth (1, C, C) and stack (N, 3, C, C), K (N,).

        The frames are in an order drawn for the sample, so that the first n are a random choice.
        """
        scene = self.scenes[self._scene_index(sample_number)]
        generator = seeded_generator(self.seed, 1, sample_number)
        height, width = scene["image"].shape[-2:]
        size = self.crop_size
        if size > min(height, width):
            raise ValueError(
                f"Crops of {size} pixels do not fit pictures of {height} x {width} pixels."
            )
        top, left, mirrored = (
            draw(limit, generator) for limit in (height - size + 1, width - size + 1, 2)
        )
        order = torch.randperm(len(scene["K"]), generator=generator)
        sample = {"K": scene["K"][order]}
        for name in ("image", "depth", "stack"):
            crop = scene[name][..., top : top + size, left : left + size]
            crop = crop[order] if name == "stack" else crop
            sample[name] = (crop.flip(-1) if mirrored else crop).contiguous()
        return sample


class ManifestStacks(Dataset[dict[str, Tensor]]):
    """Stacks of real photographs: lines of JSON, each with the names of a sample's files.

    A line holds ``ref`` (or ``source_rgb``, ``image_path``), the sharp picture; ``depth``; and
    either ``stack``, a list of pictures, with ``k``, their strengths in px*m, or ``ids`` with
    ``k_values`` ({id: K}) and ``stack_dir``, the folder of the frames ``ID.png``, without which it
    is that of ``stack_index``. Names are relative to the manifest. Depth is a ``.npy`` of metres,
    or a 16-bit PNG whose values times `depth_scale` are metres; 0 is unknown.

    ``stacks[i]`` has ``image`` (3, H, W) and ``stack`` (N, 3, H, W) in [0, 1], ``depth`` (1, H, W)
    in metres and ``K`` (N,).

    Args:
        manifest: the file.
        depth_scale: metres per step of a 16-bit PNG.

    Raises:
        ValueError: a line is no sample, or stacks have different numbers of frames.
    """

    def __init__(self, manifest: str | Path, *, depth_scale: float = 1e-3) -> None:
        self.manifest = Path(manifest)
        self.depth_scale = depth_scale
        try:
            lines = self.manifest.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ValueError(
                f"The manifest {self.manifest} cannot be read: {error.strerror}."
            ) from error
        self._samples = [
            self._sample(number, line) for number, line in enumerate(lines, 1) if line.strip()
        ]
        counts = sorted({len(sample["K"]) for sample in self._samples})
        if len(counts) != 1:
            raise ValueError(
                f"The stacks of {self.manifest} have {counts or 'no'} frames; wanted the same "
                "number in each, because a batch holds several."
            )

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self._samples[index]
        image = _picture(sample["image"])
        stack = torch.stack([_picture(path) for path in sample["stack"]])
        depth = self._depth(sample["depth"])
        for name, values in (("stack", stack), ("depth", depth)):
            if values.shape[-2:] != image.shape[-2:]:
                raise ValueError(
                    f"{sample[name] if name == 'depth' else sample[name][0]} is "
                    f"{values.shape[-1]} x {values.shape[-2]} pixels and {sample['image']} "
                    f"{image.shape[-1]} x {image.shape[-2]}; wanted the same size."
                )
        return {"image": image, "depth": depth, "stack": stack, "K": torch.tensor(sample["K"])}

    def _sample(self, number: int, line: str) -> dict[str, Any]:
        """Paths and strengths of a line."""
        try:
            entry = json.loads(line)
            reference = next(entry[name] for name in REFERENCE_NAMES if name in entry)
            depth = entry["depth"]
            if "stack" in entry:
                names, K = entry["stack"], entry["k"]
            else:
                folder = Path(entry.get("stack_dir") or Path(entry["stack_index"]).parent)
                names = [folder / f"{one}.png" for one in entry["ids"]]
                K = [entry["k_values"][str(one)] for one in entry["ids"]]
            strengths = [float(value) for value in K]
            paths = [self._path(name) for name in names]
            sample = {"image": self._path(reference), "depth": self._path(depth)}
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
            raise ValueError(
                f"Line {number} of {self.manifest} is no sample ({error!r}); wanted JSON with ref, "
                "depth, stack and k, or ref, depth, ids, k_values and stack_dir."
            ) from error
        if len(strengths) != len(paths) or not all(0 < K < float("inf") for K in strengths):
            raise ValueError(
                f"Line {number} of {self.manifest} has {len(paths)} frames and the strengths "
                f"{strengths}; wanted one above 0 for each, in px*m."
            )
        return {**sample, "stack": paths, "K": strengths}

    def _path(self, name: str | Path) -> Path:
        return self.manifest.parent / name

    def _depth(self, path: Path) -> Tensor:
        """(1, H, W) metres."""
        if path.suffix == ".npy":
            depth = np.load(path, allow_pickle=False).astype(np.float32)
        else:
            with PIL.Image.open(path) as picture:
                if not picture.mode.startswith("I"):
                    raise ValueError(
                        f"{path} is of mode {picture.mode}; wanted a 16-bit PNG, or a .npy."
                    )
                depth = np.asarray(picture, np.float32) * np.float32(self.depth_scale)
        return torch.from_numpy(depth.reshape(1, *depth.shape[-2:]))


def _picture(path: Path) -> Tensor:
    """(3, H, W) in [0, 1]."""
    with PIL.Image.open(path) as picture:
        array = np.array(picture.convert("RGB"), np.float32)
    return torch.from_numpy(array).permute(2, 0, 1) / 255


def open_stacks(source: str | None, seed: int, args: argparse.Namespace) -> tuple[Any, int | None]:
    """Return stacks by index and their number: those of `source`, or endless ones on the fly.

    Args:
        source: a folder of stacks that data_synthesis wrote, or a manifest (``.jsonl``).
        seed: of stacks on the fly.
        args: settings of `training.dsfa_task.add_dsfa_settings`.
    """
    if source is not None and Path(source).suffix == ".jsonl":
        stacks: Any = ManifestStacks(source, depth_scale=args.data_depth_scale)
        return stacks, len(stacks)
    if source is not None:
        from data_synthesis.stack_files import StoredStacks

        stacks = StoredStacks(source)
        return stacks, len(stacks)
    from data_synthesis.stack_scenes import StackScenes

    return scenes_on_the_fly(StackScenes, seed, args.data_size, args.data_options), None


def held_out_stacks(args: argparse.Namespace) -> list[dict[str, Tensor]]:
    """Return the first ``validation_scenes`` held-out stacks, cut to the crop in their middle."""
    stacks, count = open_stacks(args.validation_stacks, args.validation_seed, args)
    wanted = args.validation_scenes if count is None else min(args.validation_scenes, count)
    shown = tqdm(range(wanted), desc="held-out stacks", leave=False, disable=None)
    return [central_crop(stacks[index], args.data_crop_size) for index in shown]


def central_crop(sample: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """Return image, depth, stack and K of the middle `size` x `size` pixels of a sample."""
    height, width = sample["image"].shape[-2:]
    if size > min(height, width):
        raise ValueError(
            f"Crops of {size} pixels do not fit pictures of {height} x {width} pixels."
        )
    top, left = (height - size) // 2, (width - size) // 2
    crops = {
        name: sample[name][..., top : top + size, left : left + size]
        for name in ("image", "depth", "stack")
    }
    return {**crops, "K": sample["K"]}

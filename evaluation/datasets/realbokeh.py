"""RealBokeh: photographs of one scene at f/22 and at several wider apertures."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evaluation.datasets.estimated_disparity import nearest_value, read_estimated_disparity
from evaluation.datasets.focus_in_pictures import focus_at_common_edges, focus_in_mask
from evaluation.datasets.reading import (
    MAP_SUFFIXES,
    PICTURE_SUFFIXES,
    files_by_name,
    finite_number,
    map_of,
    read_json,
    read_map,
)
from evaluation.datasets.scenes import Reader, Scene, ScenesOnDisk
from evaluation.photographs import Photograph, read_picture

__all__ = ["RealBokeh"]

DESCRIPTIONS = "metadata"


class _ManyApertures(Scene):
    """What one file of ``metadata`` describes."""

    def __init__(self, file: Path, maps: dict[str, Path], masks: dict[str, Path]) -> None:
        self.file, self.maps, self.masks = file, maps, masks
        self.folder = file.parent.parent

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        content = read_json(self.file)
        missing = [
            key for key in ("source_image", "target_images", "target_avs") if key not in content
        ]
        if missing:
            raise ValueError(f"{self.file} lacks {', '.join(missing)}.")
        pictures, f_numbers = content["target_images"], content["target_avs"]
        if not isinstance(content["source_image"], str):
            raise ValueError(f"{self.file}: source_image is no path.")
        if not isinstance(pictures, list) or not all(isinstance(path, str) for path in pictures):
            raise ValueError(f"{self.file}: target_images is no list of paths.")
        if not isinstance(f_numbers, list) or not 0 < len(f_numbers) == len(pictures):
            raise ValueError(
                f"{self.file} has {len(pictures)} target_images; wanted at least one, and as many "
                "target_avs."
            )
        for f_number in f_numbers:
            if finite_number(f_number, "an f-number in target_avs", self.file) <= 0:
                raise ValueError(f"{self.file} has the f-number {f_number}; wanted more than 0.")
        return content

    @property
    def image(self) -> Path:
        return self.folder / self.description["source_image"]

    @property
    def disparity(self) -> Path:
        return map_of(self.image.stem, self.maps, self.folder / "disparity")

    @property
    def mask(self) -> Path | None:
        return self.masks.get(self.image.stem)

    @property
    def truths(self) -> dict[float, Path]:
        """The pictures by f-number, the widest aperture first."""
        f_numbers = [float(number) for number in self.description["target_avs"]]
        pictures = [self.folder / path for path in self.description["target_images"]]
        return dict(sorted(zip(f_numbers, pictures, strict=True)))

    def settings(self) -> list[str]:
        return [f"f{f_number:g}" for f_number in self.truths]

    def files(self) -> dict[Path, Reader]:
        nearest = nearest_value(self.folder / "disparity")
        files: dict[Path, Reader] = {
            self.image: read_picture,
            self.disparity: lambda file: read_estimated_disparity(file, nearest),
            **{picture: read_picture for picture in self.truths.values()},
        }
        return files if self.mask is None else {**files, self.mask: read_map}

    def photographs(self) -> Iterator[Photograph]:
        image = self.read(self.image)
        disparity = self.read(self.disparity, image)
        widest = next(iter(self.truths.values()))
        if self.mask is not None:
            df = focus_in_mask(disparity, self.read(self.mask, image))
        else:
            df = focus_at_common_edges(disparity, image, self.read(widest, image))
        for setting, (f_number, picture) in zip(self.settings(), self.truths.items(), strict=True):
            yield Photograph(
                scene=self.file.stem,
                setting=setting,
                image=image,
                disparity=disparity,
                disparity_range=(float(disparity.min()), float(disparity.max())),
                df=df,
                K=None,
                truth=self.read(picture, image),
                labels={"f_number": f_number},
            )


class RealBokeh(ScenesOnDisk):
    """A camera on a tripod, one scene at many f-numbers (Seizinger et al., Bokehlicious, 2025).

    From huggingface.co/datasets/timseizinger/RealBokeh_3MP (CC BY-NC-SA 4.0), which has the parts
    ``train``, ``validation`` and ``test``; the folder to open is one part:

    - ``metadata/SCENE.json``: ``source_image`` and ``target_images``, paths below the part, and
      ``target_avs``, the f-number of each of these;
    - ``in/...``: the photographs at f/22, taken to be all in focus;
    - ``gt/<id>/<id>_f2.0.JPG`` and so on: the truth.

    Beside them, made by whoever evaluates, because the set has no depth; NAME is that of the
    source image:

    - ``disparity/NAME_disparity.png``, as ``bokehdiff depth part/in/*.JPG -o part/disparity`` names
      it, or NAME_pred or NAME, also ``.npy``, ``.npz``, ``.pfm``, ``.tif``; as large as the
      photograph, larger is nearer unless ``disparity/convention.json`` says ``{"nearest": 0}``;
    - ``mask/NAME.png``, optional: white on what is in focus.

    Disparity becomes [0, 1], 1 the nearest. The metadata say neither the focus nor the focal
    length: K is None, and df, one for all f-numbers of a scene, is found with the mask or by the
    edges that the photograph and that of the widest aperture both have
    (:mod:`evaluation.datasets.focus_in_pictures`). Photographs carry the label ``f_number``.
    """

    name = "realbokeh"
    layout = "the folders in, gt and metadata of one part (train, validation or test)"

    @staticmethod
    def scenes_in(folder: Path) -> dict[str, _ManyApertures]:
        descriptions = files_by_name(folder / DESCRIPTIONS, (".json",))
        maps = files_by_name(folder / "disparity", MAP_SUFFIXES)
        masks = files_by_name(folder / "mask", PICTURE_SUFFIXES)
        return {name: _ManyApertures(file, maps, masks) for name, file in descriptions.items()}

    def verify(self) -> list[str]:
        sources = set()
        for scene in self.scenes_in(self.folder).values():
            with contextlib.suppress(ValueError):  # told with the other problems of the scene
                sources.add(scene.image)
        pictures = files_by_name(self.folder / "in", PICTURE_SUFFIXES).values()
        return [
            f"{file} is the source_image of no file in {DESCRIPTIONS}."
            for file in sorted(set(pictures) - sources)
        ] + super().verify()

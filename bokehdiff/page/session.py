"""What one visitor has, and what can be made of it: previews, the full size, a film."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..cli.renderers import NETWORKS, Refocus
from ..easing import eased
from ..focus import find_focus
from ..lens import LensSetting
from ..overlay import coc_overlay
from ..photographs import PHOTOGRAPH_SUFFIXES, Photograph, write_photograph
from ..video_files import write_video
from .lens import LensControls
from .renderers import Renderers
from .scenes import FullSize, Scene, Sources, open_scene, read_full_size
from .settings import Choice

FILES_KEPT = 24
"""Files in a visitor's folder; what was shown before is deleted."""

FRAMES_PER_SECOND = 16


@dataclass(eq=False)
class Visitor:
    """One visitor: a folder of what the browser is shown, a photograph, and where its focus is.

    Args:
        folder: only this visitor is told its name.
        scene: the photograph; None before there is one.
        dropped: the files that came last, which may not have become a scene.
        df: disparity in focus.
        df_before: what was in focus before.
        request: number of the latest picture asked for; what belongs to older ones is not shown.
        awaited: lens and renderer of what is still to be made in the place of a fast preview.
        remarks: sentences that stand below the next picture too.
    """

    folder: Path
    scene: Scene | None = None
    dropped: Sources | None = None
    df: float = 0.0
    df_before: float = 0.0
    request: int = 0
    awaited: tuple[LensControls, Choice] | None = None
    remarks: list[str] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _files: list[Path] = field(default_factory=list)

    def open(self, sources: Sources, renderers: Renderers) -> Scene:
        """Takes a photograph, focused on the nearest large thing near its centre.

        Raises:
            ValueError, OSError: it cannot be used; what was there before stays.
        """
        self.dropped = sources
        self.scene = open_scene(sources, renderers)
        self.df = self.df_before = self.scene.subject_df
        return self.scene

    def opened(self) -> Scene:
        """The photograph.

        Raises:
            ValueError: there is none.
        """
        if self.scene is None:
            raise ValueError("There is no photograph yet; drop one first.")
        return self.scene

    def focus(self, x: float, y: float) -> None:
        """Focuses on a pixel of the preview.

        Raises:
            ValueError: a pixel outside.
        """
        plane, _ = find_focus(self.opened().disparity, (x, y))
        self.df_before, self.df = self.df, float(plane)

    def lens(self, controls: LensControls) -> LensSetting:
        """Focus and blur in pixels of the preview."""
        scene = self.opened()
        return controls.setting(
            self.df, scene.preview_size, metric=scene.metric, subject_df=scene.subject_df
        )

    def refocus(self, renderers: Renderers, controls: LensControls) -> Refocus:
        """What makes fast previews with this opening."""
        scene, aperture = self.opened(), controls.aperture()
        if aperture is None:
            return scene.refocus
        return renderers.fast(aperture)(scene.photo.image, scene.disparity, scene.metric, False)

    def preview(self, renderers: Renderers, controls: LensControls) -> Path:
        """A fast preview: the file of a picture."""
        return self.show(self.refocus(renderers, controls)(self.lens(controls)))

    def chosen_preview(self, renderers: Renderers, controls: LensControls, choice: Choice) -> Path:
        """A preview by what the visitor chose."""
        scene, lens = self.opened(), self.lens(controls)
        aperture = controls.aperture() if choice.shapes_openings else None
        prepare = renderers.chosen(choice, aperture)
        refocus = prepare(scene.photo.image, scene.disparity, scene.metric, False)
        return self.show(refocus(lens))

    def overlay(self, controls: LensControls) -> Path:
        """The circles of confusion painted over the photograph."""
        scene = self.opened()
        defocus = self.lens(controls).signed_defocus(scene.disparity)
        return self.show(coc_overlay(scene.photo.image, defocus))

    def show(self, picture: torch.Tensor) -> Path:
        """Writes a picture (1, 3, h, w) in the photograph's colours for the browser."""
        like = Photograph(picture, icc_profile=self.opened().photo.icc_profile)
        return write_photograph(self._new_file("picture", ".jpg"), picture, like)

    def film(self, renderers: Renderers, controls: LensControls, seconds: float) -> Path:
        """A focus pull from what was in focus before to what is now, of the size of previews.

        As of ``bokehdiff focus-pull``, the blur is that of the first frame throughout.
        """
        scene, refocus = self.opened(), self.refocus(renderers, controls)
        strength = controls.setting(
            self.df_before, scene.preview_size, metric=scene.metric, subject_df=scene.subject_df
        ).K
        first, last = torch.tensor([self.df_before]), torch.tensor([self.df])
        count = max(round(seconds * FRAMES_PER_SECOND), 2)

        def frames() -> Iterator[np.ndarray]:
            for number in range(count):
                plane = torch.lerp(first, last, eased(number / (count - 1)))
                picture = refocus(LensSetting(plane, plane, strength))[0]
                levels = (picture.permute(1, 2, 0).clamp(0, 1) * 255).round().byte()
                yield levels.cpu().numpy()

        return write_video(self._new_file("focus_pull", ".mp4"), frames(), FRAMES_PER_SECOND)

    def full_size(self, renderers: Renderers, controls: LensControls, choice: Choice) -> Path:
        """The photograph rendered at full size: a file with all that the photograph's carried.

        Raises:
            ValueError, OSError: the files are gone, or the model cannot be loaded.
        """
        scene, df = self.opened(), self.df
        limit = renderers.settings.largest_photo_megapixels
        full = read_full_size(scene.sources, renderers.depth_estimator, limit)
        lens = controls.setting(df, scene.size, metric=full.metric, subject_df=scene.subject_df)
        picture, linear = _rendered(full, lens, renderers, controls, choice)
        name = scene.sources.photo
        suffix = name.suffix if name.suffix.lower() in PHOTOGRAPH_SUFFIXES else ".png"
        target = self._new_file(f"{name.stem}_bokeh", suffix)
        return write_photograph(target, picture, full.photograph, linear=linear)

    def _new_file(self, stem: str, suffix: str) -> Path:
        """Where to write what this visitor is shown next; the oldest file goes."""
        # A folder for each, so that a download has a name of its own.
        folder = self.folder / str(next(self._numbers))
        folder.mkdir(parents=True)
        self._files.append(folder / f"{stem}{suffix}")
        while len(self._files) > FILES_KEPT:
            oldest = self._files.pop(0)
            oldest.unlink(missing_ok=True)
            oldest.parent.rmdir()
        return self._files[-1]


def _rendered(
    full: FullSize,
    lens: LensSetting,
    renderers: Renderers,
    controls: LensControls,
    choice: Choice,
) -> tuple[torch.Tensor, bool]:
    """A picture of full size, and whether it is linear light: the classical renderers keep
    highlights that are brighter than white."""
    photograph = full.photograph
    linear = photograph.linear and choice.method not in NETWORKS
    image = photograph.image if linear else full.image
    aperture = controls.aperture() if choice.shapes_openings else None
    prepare = renderers.chosen(choice, aperture)
    picture = prepare(image, full.disparity, full.metric, linear)(lens)
    return picture.clamp(min=0) if linear else picture, linear

"""The disparity maps of a film: a folder with one for each frame, or a film in gray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .disparities import DISPARITY_SUFFIXES
from .speech import Mistake

if TYPE_CHECKING:
    import torch

    from ..video_files import VideoReader


class FilmMaps:
    """Maps that were given for the frames of a film.

    Args:
        source: a folder, whose maps are taken in the order of their names, or a film.
        film: the film they are for.
        metric: whether they are in 1/metres.
    """

    def __init__(self, source: Path, film: VideoReader, metric: bool) -> None:
        from ..video_files import open_video

        self._source, self._film, self._metric = source, film, metric
        self._maps: list[Path] | VideoReader
        if source.is_dir():
            self._maps = sorted(
                file for file in source.iterdir() if file.suffix.lower() in DISPARITY_SUFFIXES
            )
            count: int | None = len(self._maps)
            if not self._maps:
                raise Mistake(
                    f"{source} has no disparity map; wanted one for each frame, ending in one of "
                    f"{' '.join(DISPARITY_SUFFIXES)}."
                )
        else:
            if metric:
                raise Mistake(
                    f"--metric goes with a folder of maps in 1/metres; {source.name} is a film, "
                    "whose grays have no unit."
                )
            self._maps = open_video(source)
            count = self._maps.frame_count
        frames = film.frame_count
        if frames is not None and count is not None and count != frames:
            raise Mistake(
                f"{source} has {count} maps for the {frames} frames of {film.path.name}; wanted "
                "one for each."
            )

    def read(self, first: int = 0) -> Iterator[torch.Tensor]:
        """The maps (1, 1, H, W) of the frames from number `first` on, checked."""
        from ..images import as_disparity_batch, read_disparity

        height, width = self._film.format.height, self._film.format.width
        count = first
        if isinstance(self._maps, list):
            for file in self._maps[first:]:
                disparity = read_disparity(file)
                yield as_disparity_batch(disparity, 1, height, width, metric=self._metric)
                count += 1
        else:
            for frame in self._maps.frames(first):
                gray = frame.picture.mean(axis=2, dtype="float32") / 255
                yield as_disparity_batch(gray, 1, height, width)
                count += 1
        raise Mistake(
            f"{self._source} has {count} maps, fewer than {self._film.path.name} has frames."
        )

"""A film that takes hours to make, kept in stretches beside its file until it is whole.

``out.mp4`` grows in the folder ``out.mp4.part``: the settings it is made with, a file for each
stretch that is finished, and what the last of them leaves to the next frame. A run that was ended,
however rudely, goes on from there, and makes the same film.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from .tensor_files import read_safetensors
from .video_files import STRETCH_SUFFIX, FilmFormat, FilmFrame, write_stretch
from .whole_files import write_whole

__all__ = ["UnfinishedFilm"]

SETTINGS, STATE = "settings.json", "state.safetensors"
FRAMES, STRETCHES = "film.frames", "film.stretches"


class UnfinishedFilm:
    """The stretches of a film that are finished; made by :meth:`begin` or :meth:`resume`.

    Args:
        folder: where they are kept.

    Attributes:
        frames_done: how many frames they hold.
        state: what the last of them left to the frame after it; empty before the first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.frames_done = 0
        self.state: dict[str, torch.Tensor] = {}
        self._stretches = 0

    @staticmethod
    def folder_of(film: Path) -> Path:
        """Where the stretches of a film are kept."""
        return film.with_name(f"{film.name}.part")

    @classmethod
    def begin(cls, film: Path, settings: Mapping[str, Any]) -> UnfinishedFilm:
        """A film without any stretch yet; what an earlier run left is removed.

        Args:
            film: the file that will be made.
            settings: all that decides how the film looks, as JSON holds it.

        Raises:
            ValueError: the folder is there, but of something else.
        """
        begun = cls(cls.folder_of(film))
        if begun.folder.exists():
            if any(begun.folder.iterdir()) and not (begun.folder / SETTINGS).is_file():
                raise ValueError(
                    f"{begun.folder} is there, but holds no unfinished film; it is where the parts "
                    "of one would be kept. Move it, or choose another name for the film."
                )
            shutil.rmtree(begun.folder)
        begun.folder.mkdir()
        write_whole(begun.folder / SETTINGS, json.dumps(settings, indent=1).encode())
        return begun

    @classmethod
    def resume(cls, film: Path, settings: Mapping[str, Any]) -> UnfinishedFilm:
        """The film as far as an earlier run came; from its beginning if there was none.

        Raises:
            ValueError: that run had other settings, or what it left is damaged.
        """
        found = cls(cls.folder_of(film))
        if not (found.folder / SETTINGS).is_file():
            return cls.begin(film, settings)
        found._check_settings(settings)
        if (found.folder / STATE).is_file():
            state, _ = read_safetensors(found.folder / STATE)
            if not {FRAMES, STRETCHES} <= set(state):
                raise ValueError(f"{found.folder / STATE} is damaged; remove {found.folder}.")
            found.frames_done = int(state.pop(FRAMES))
            found._stretches = int(state.pop(STRETCHES))
            found.state = state
        for stretch in found.stretches:
            if not stretch.is_file():
                raise ValueError(
                    f"{found.folder} lacks {stretch.name}, a finished part of the film; begin "
                    "anew: remove the folder."
                )
        return found

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        try:
            before = json.loads((self.folder / SETTINGS).read_bytes())
            different = [name for name in settings if before.get(name) != settings[name]]
        except (ValueError, AttributeError):
            raise ValueError(
                f"{self.folder / SETTINGS} is damaged; begin anew: remove {self.folder}."
            ) from None
        if different:
            name = different[0]
            raise ValueError(
                f"{self.folder} holds an unfinished film with another {name}: "
                f"{before.get(name)!r}, now {settings[name]!r}; wanted the settings it was begun "
                f"with. Give those again, or remove {self.folder} to begin anew."
            )

    @property
    def stretches(self) -> list[Path]:
        """The files of the finished stretches, in their order."""
        return [self._stretch(number) for number in range(self._stretches)]

    def _stretch(self, number: int) -> Path:
        return self.folder / f"{number:06d}{STRETCH_SUFFIX}"

    def add_stretch(self, frames: Iterable[FilmFrame], like: FilmFormat) -> int:
        """Writes the next stretch; returns how many frames it has. :meth:`keep` makes it count."""
        return write_stretch(self._stretch(self._stretches), frames, like)

    def keep(self, frames: int, state: Mapping[str, torch.Tensor]) -> None:
        """Takes the stretch that was written last as finished.

        Args:
            frames: how many it has.
            state: what it leaves to the next frame.
        """
        self.frames_done += frames
        self._stretches += 1
        counted = {
            FRAMES: torch.tensor(self.frames_done),
            STRETCHES: torch.tensor(self._stretches),
        }
        stored = {name: value.cpu().contiguous() for name, value in state.items()} | counted
        write_whole(self.folder / STATE, save(stored))

    def remove(self) -> None:
        """Removes the folder, once the film is whole."""
        shutil.rmtree(self.folder)

"""SYNBOKEH300: layer scenes of our own making, with checksums."""

from __future__ import annotations

import hashlib
from pathlib import Path

from evaluation.datasets.raytraced_scenes import RaytracedScene, RaytracedScenes
from evaluation.datasets.reading import read_json

__all__ = ["SynBokeh300"]

CHECKSUMS = "SHA256SUMS"
DESCRIPTION = "benchmark.json"


class _ChecksummedScene(RaytracedScene):
    def problems(self) -> list[str]:
        return super().problems() + self._changed_files()

    def _changed_files(self) -> list[str]:
        """A sentence for each file that is not as it was written, if the scene has checksums."""
        file = self.folder / CHECKSUMS
        if not file.is_file():
            return []
        problems = []
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            checksum, separator, name = line.partition("  ")
            listed = self.folder / name
            if not separator or Path(name).name != name:
                problems.append(f"{file}: the line {line!r} is none of sha256sum.")
            elif not listed.is_file():
                problems.append(f"{listed} is missing, but {CHECKSUMS} lists it.")
            elif hashlib.sha256(listed.read_bytes()).hexdigest() != checksum:
                problems.append(f"{listed} is not as it was written (its checksum differs).")
        return problems


class SynBokeh300(RaytracedScenes):
    """Cut-outs over backgrounds, photographed through a disc at four levels of blur.

    Our counterpart of the benchmark in the BokehDiff paper, whose pictures were not published;
    written by ``python -m data_synthesis benchmark --name synbokeh300 --out FOLDER``, the same
    bytes each time. The layout is that of :class:`RaytracedScenes`; besides, each scene has
    ``SHA256SUMS``, and the folder ``benchmark.json`` with ``name`` and ``levels``, the largest
    blur radii of every scene in pixels. Where they are present they are verified.
    """

    name = "synbokeh300"

    @staticmethod
    def scenes_in(folder: Path) -> dict[str, RaytracedScene]:
        scenes = RaytracedScenes.scenes_in(folder)
        return {name: _ChecksummedScene(scene.folder) for name, scene in scenes.items()}

    def verify(self) -> list[str]:
        return self._contradictions() + super().verify()

    def _contradictions(self) -> list[str]:
        """A sentence for each thing that benchmark.json says otherwise than the scenes."""
        file = self.folder / DESCRIPTION
        if not file.is_file():
            return []
        try:
            description = read_json(file)
        except ValueError as problem:
            return [str(problem)]
        if description.get("name") != self.name:
            return [f"{file} is of {description.get('name')!r}; wanted {self.name!r}."]
        wanted, problems = description.get("levels"), []
        found = self.scenes_in(self.folder)
        for scene in (found[name] for name in self.scenes):
            try:
                configs = scene.description["configs"]
            except ValueError:
                continue  # told with the other problems of the scene
            levels = [setting["level"] for setting in configs]
            if levels != wanted:
                problems.append(
                    f"{scene.folder / 'meta.json'} has the levels {levels}, {file} {wanted}."
                )
        return problems

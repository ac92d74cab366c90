"""What layer scenes are made of: cut-outs and photographs from folders, or made from nothing.

Every source gives 8-bit sRGB pictures: cut-outs as RGBA with straight (not premultiplied) colours,
backgrounds as RGB.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from bokehdiff.images import linear_to_srgb, read_image
from data_synthesis.scenes import compose_scene
from data_synthesis.shapes import soften, solid_shape, thin_shape
from data_synthesis.textures import TextureBank

__all__ = [
    "SMALLEST_PROCEDURAL_SIDE",
    "PictureFolders",
    "SourceFileWarning",
    "procedural_background",
    "procedural_cutout",
]

PathLike = str | os.PathLike[str]

PICTURE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
SMALLEST_SIDE = 16
# Textures need room for their largest grains.
SMALLEST_PROCEDURAL_SIDE = 64
# Of a checksum, what is kept in messages and provenance.
CHECKSUM_DIGITS = 16
PROBLEMS_SHOWN = 8


class SourceFileWarning(UserWarning):
    """Files of a folder cannot be used; the message names them and says why."""


class _SourceFile(NamedTuple):
    path: Path
    name: str  # below the folder it was found in
    checksum: str  # first digits of the SHA-256


class PictureFolders:
    """The usable pictures of folders, by index, in the order of their names below the folder.

    ``pictures[i]`` is a Pillow picture: RGBA for cut-outs, RGB for backgrounds, upright, sRGB.
    Every file is read and decoded once at the start, so that a damaged one is known before any
    work is done: ``problems`` lists, with its reason, each file that was left out, and a
    :class:`SourceFileWarning` says so. A cut-out has to have an alpha channel that is neither
    opaque nor empty everywhere.

    ``folders``: one or more, searched with their subfolders for picture files. ``kind``:
    "cutout" or "background". ``cache_bytes``: how much decoded pixels are kept in memory.

    Raises ValueError when a folder is missing or no usable picture is found.
    """

    def __init__(
        self,
        folders: PathLike | Sequence[PathLike],
        kind: Literal["cutout", "background"],
        cache_bytes: int = 1 << 28,
    ) -> None:
        self.kind = kind
        self.problems: list[str] = []
        self._files: list[_SourceFile] = []
        self._cache_bytes = cache_bytes
        self._cached: OrderedDict[int, Image.Image] = OrderedDict()
        chosen = [folders] if isinstance(folders, (str, os.PathLike)) else list(folders)
        files = _picture_files([Path(folder).expanduser() for folder in chosen], kind)
        for path, name in tqdm(files, f"checking {kind}s", leave=False, disable=None, unit="file"):
            try:
                data = path.read_bytes()
                self._decode(path, data)
            except (ValueError, OSError, Image.DecompressionBombError) as problem:
                self.problems.append(f"{path}: {problem}")
                continue
            checksum = hashlib.sha256(data).hexdigest()[:CHECKSUM_DIGITS]
            self._files.append(_SourceFile(path, name, checksum))
        where = ", ".join(map(str, chosen))
        shown = "\n  ".join(self.problems[:PROBLEMS_SHOWN])
        if len(self.problems) > PROBLEMS_SHOWN:
            shown += f"\n  and {len(self.problems) - PROBLEMS_SHOWN} more"
        if not self._files:
            raise ValueError(
                f"{where} holds no usable {kind}; wanted picture files"
                f"{' with transparency' if kind == 'cutout' else ''} "
                f"({', '.join(sorted(PICTURE_SUFFIXES))})"
                + (f". Left out:\n  {shown}" if self.problems else ".")
            )
        if self.problems:
            warnings.warn(
                f"{len(self.problems)} of {len(self.problems) + len(self._files)} files in "
                f"{where} cannot be used as {kind} and are left out:\n  {shown}",
                SourceFileWarning,
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Image.Image:
        if index in self._cached:
            self._cached.move_to_end(index)
            return self._cached[index]
        file = self._files[index]
        data = file.path.read_bytes()
        if not hashlib.sha256(data).hexdigest().startswith(file.checksum):
            raise ValueError(
                f"{file.path} has changed since this data set was opened; open it again."
            )
        self._cached[index] = self._decode(file.path, data)
        while len(self._cached) > 1 and sum(map(_bytes_of, self._cached.values())) > (
            self._cache_bytes
        ):
            self._cached.popitem(last=False)
        return self._cached[index]

    def __getstate__(self) -> dict[str, Any]:
        # Workers of a data loader decode for themselves.
        return {**self.__dict__, "_cached": OrderedDict()}

    def provenance(self, index: int) -> dict[str, Any]:
        """File name and the first digits of its SHA-256."""
        return {"file": self._files[index].name, "sha256": self._files[index].checksum}

    @property
    def fingerprint(self) -> str:
        """Changes whenever a file, its name or its place in the order does; not with the folder."""
        listing = "\n".join(f"{file.checksum} {file.name}" for file in self._files)
        return hashlib.sha256(listing.encode()).hexdigest()[:CHECKSUM_DIGITS]

    def _decode(self, path: Path, data: bytes) -> Image.Image:
        picture = _cutout(data) if self.kind == "cutout" else _background(path)
        if min(picture.size) < SMALLEST_SIDE:
            raise ValueError(
                f"is {picture.width} x {picture.height} pixels; wanted {SMALLEST_SIDE} or more."
            )
        return picture


def _picture_files(folders: list[Path], kind: str) -> list[tuple[Path, str]]:
    """(path, name below the folder) of picture files; hidden ones are not looked at."""
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"There is no folder {folder}; wanted one with {kind} pictures.")
        for path in folder.rglob("*"):
            name = path.relative_to(folder)
            hidden = any(part.startswith(".") for part in name.parts)
            if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file() and not hidden:
                found.append((path, name.as_posix()))
    return sorted(found, key=lambda file: (file[1], file[0]))


def _cutout(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        if not opened.has_transparency_data:
            raise ValueError("has no alpha channel; a cut-out needs transparency.")
        picture = ImageOps.exif_transpose(opened).convert("RGBA")
    lowest, highest = picture.getchannel("A").getextrema()
    if highest == 0:
        raise ValueError("is transparent everywhere.")
    if lowest == 255:
        raise ValueError("is opaque everywhere; a cut-out needs transparency.")
    return picture


def _background(path: Path) -> Image.Image:
    pixels = read_image(path)[0].permute(1, 2, 0).numpy()
    return Image.fromarray(np.rint(pixels * 255).astype(np.uint8))


def _bytes_of(picture: Image.Image) -> int:
    return picture.width * picture.height * 4


# --- Made from nothing ----------------------------------------------------------------------------


def procedural_background(seed: int, side: int) -> Image.Image:
    """A picture of ``side`` (64 or more) pixels square, all in focus: a random room or wall."""
    rng = np.random.default_rng(seed)
    scene = compose_scene(rng, (side + 1) // 2, 0, light_chance=0.0)
    light = np.zeros(scene.layers.shape[1:3] + (3,), np.float32)
    for layer in scene.layers[::-1]:
        light = layer[..., :3] + (1 - layer[..., 3:]) * light
    return Image.fromarray(_encode(light[:side, :side]))


def procedural_cutout(seed: int, side: int) -> Image.Image:
    """An RGBA picture whose longer side has ``side`` (64 or more) pixels: one to three things.

    Most are solid and stand free; a quarter are thin (branches, grass, nets) and run beyond the
    picture; some have soft edges.
    """
    rng = np.random.default_rng(seed)
    aspect = math.exp(rng.normal(0, 0.35))
    height = side if aspect < 1 else max(int(side / aspect), SMALLEST_SIDE)
    width = side if aspect >= 1 else max(int(side * aspect), SMALLEST_SIDE)
    bank = TextureBank(rng, height, width)
    thin = rng.uniform() < 0.25
    colours = np.zeros((height, width, 3), np.float32)
    alpha = np.zeros((height, width, 1), np.float32)
    for part in range(1 if thin else int(rng.integers(1, 4))):
        if thin:
            mask = thin_shape(rng, height, width)
        else:
            mask = _standing_part(rng, height, width, first=part == 0)
        if rng.uniform() < 0.2:
            mask = soften(mask, math.exp(rng.uniform(0, math.log(side / 64 + 1.1))))
        opacity = mask[..., None]
        # Colours are straight: under a soft edge they stay the thing's own.
        painted = _shaded(rng, bank.texture())
        fresh = alpha == 0
        colours = np.where(fresh, painted, colours + opacity * (painted - colours))
        alpha = opacity + (1 - opacity) * alpha
    rounded = np.rint(alpha * 255).astype(np.uint8)
    if rounded.max() == 0:
        # A thin shape can miss the sheet altogether.
        return procedural_cutout(seed + 1, side)
    return Image.fromarray(np.concatenate([_encode(colours), rounded], axis=2))


def _standing_part(rng: np.random.Generator, height: int, width: int, first: bool) -> np.ndarray:
    """A solid shape within the sheet, one pixel from its border."""
    share = 1.0 if first else rng.uniform(0.25, 0.7)
    rows, columns = max(int((height - 2) * share), 8), max(int((width - 2) * share), 8)
    top = 1 + int(rng.integers(height - 1 - rows))
    left = 1 + int(rng.integers(width - 1 - columns))
    mask = np.zeros((height, width), np.float32)
    mask[top : top + rows, left : left + columns] = solid_shape(rng, rows, columns)
    return mask


def _shaded(rng: np.random.Generator, texture: np.ndarray) -> np.ndarray:
    """The texture on something lit from a side, brighter or darker than its surroundings."""
    height, width = texture.shape[:2]
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    slope_x, slope_y = rng.normal(0, 0.25, 2)
    shade = 1 + slope_x * x + slope_y * y - rng.uniform(0, 0.5) * x**2
    gain = math.exp(rng.normal(0, 0.4)) * np.exp(rng.normal(0, 0.1, 3))
    return (texture * np.maximum(shade, 0.1)[..., None] * gain).astype(np.float32)


def _encode(light: np.ndarray) -> np.ndarray:
    return np.rint(linear_to_srgb(np.clip(light, 0, 1)) * 255).astype(np.uint8)

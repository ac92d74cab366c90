"""What depth networks answered, kept on disk, so that a photograph is looked at once.

A file per answer, named by a hash of all that decides it: the network's weights and settings, and
the pixels it sees. A file that is damaged is as good as none. Delete the folder whenever you like.
"""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .whole_files import PathLike, write_whole

__all__ = ["DepthCache", "cache_folder_of_user", "digest"]

ANSWER = "answer"
DIGEST = "sha256"


def cache_folder_of_user() -> Path:
    """The folder for what bokehdiff keeps to save time: ``$BOKEHDIFF_CACHE``, else ``bokehdiff`` in
    ``$XDG_CACHE_HOME`` or where this system keeps caches."""
    if chosen := os.environ.get("BOKEHDIFF_CACHE"):
        return Path(chosen).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser() / "bokehdiff"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "bokehdiff"
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "bokehdiff" / "Cache"
    return Path.home() / ".cache" / "bokehdiff"


def digest(*parts: str | torch.Tensor) -> str:
    """SHA-256 of texts and tensors, with the shape and type of each tensor."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            found.update(f"{part.dtype} {tuple(part.shape)}\n".encode())
            values = part.detach().cpu().contiguous().reshape(-1)
            found.update(values.view(torch.uint8).numpy().data)
        else:
            found.update(f"{part}\n".encode())
    return found.hexdigest()


class DepthCache:
    """Tensors by name in a folder, which is made with the first of them.

    Args:
        folder: where to.
    """

    def __init__(self, folder: PathLike) -> None:
        self.folder = Path(folder).expanduser()

    def find(self, name: str) -> torch.Tensor | None:
        """What was kept under a name; None if there is nothing, or it is damaged."""
        try:
            with safe_open(self._file(name), framework="pt") as kept:
                answer: torch.Tensor = kept.get_tensor(ANSWER)
                intact = (kept.metadata() or {}).get(DIGEST) == digest(answer)
        except (OSError, SafetensorError):
            return None
        return answer if intact else None

    def keep(self, name: str, answer: torch.Tensor) -> None:
        """Keeps a tensor under a name, or warns with a ``UserWarning`` that it cannot be kept."""
        answer = answer.detach().cpu().contiguous()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._file(name), save({ANSWER: answer}, {DIGEST: digest(answer)}))
        except OSError as error:
            warnings.warn(
                f"The estimated depth could not be kept in {self.folder} ({error}), so it will be "
                "estimated again. Name another folder by the environment variable BOKEHDIFF_CACHE "
                "or cache_folder=, or none by cache_folder=None.",
                UserWarning,
                stacklevel=2,
            )

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

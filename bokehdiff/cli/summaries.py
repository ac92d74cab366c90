"""What a summary.json says beside the result: every argument, and versions."""

from __future__ import annotations

import enum
import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import typer


def arguments_of(
    context: typer.Context, folder: Path, paths_or_names: Collection[str] = ()
) -> dict[str, Any]:
    """Every argument of the call as JSON can say it; paths are relative to the folder.

    Args:
        context: of the call.
        folder: where the summary will be.
        paths_or_names: parameters that hold either a path or the name of something on the Hub.
    """

    def plain(name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(name, one) for one in value]
        if isinstance(value, enum.Enum):
            return value.value
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        is_path = isinstance(value, Path) or (
            name in paths_or_names and value is not None and Path(value).expanduser().exists()
        )
        return relative_to(value, folder) if is_path else value

    return {name: plain(name, value) for name, value in sorted(context.params.items())}


def relative_to(path: str | os.PathLike[str], folder: Path) -> str:
    """The way from the folder to a file, so that both can be moved together."""
    try:
        return Path(os.path.relpath(Path(path).expanduser(), folder.expanduser())).as_posix()
    except ValueError:  # on another drive
        return str(path)


def versions() -> dict[str, str]:
    """Of this package and those that decide its results."""
    import platform
    from importlib.metadata import version

    from .. import __version__

    packages = ("torch", "diffusers", "transformers", "numpy", "pillow")
    return {
        "bokehdiff": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }

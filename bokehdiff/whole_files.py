"""Files that appear complete or not at all, and never over another one unasked."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

PathLike = str | os.PathLike[str]


def file_to_write(path: PathLike, suffixes: Sequence[str], overwrite: bool) -> Path:
    """Gives the path if it can be written to with one of these suffixes."""
    file = Path(path).expanduser()
    suffix = file.suffix.lower()
    if suffix not in suffixes:
        raise ValueError(
            f"{file.name} ends in {suffix or 'no suffix'}; wanted one of {', '.join(suffixes)}."
        )
    if not file.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {file.parent}; create it first.")
    if file.exists() and not overwrite:
        raise FileExistsError(
            f"{file} exists already; wanted a new file. Choose another name, or pass "
            "overwrite=True (--force on the command line)."
        )
    return file


def write_whole(file: Path, data: bytes) -> None:
    """Writes beside the target and renames, so that an interrupted write leaves no half a file."""
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem}-")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
        # mkstemp makes files private; results get the permissions any new file would have.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise

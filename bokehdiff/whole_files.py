"""Files that appear complete or not at all, and never over another one unasked."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Sequence
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


@contextlib.contextmanager
def whole_or_not_at_all(file: Path, suffix: str = "") -> Iterator[Path]:
    """A name beside `file` to write to; what is there afterwards becomes `file` in one step.

    If an error is raised, what was written is removed and `file` is as it was. The name has a
    `suffix` only for encoders that go by it: others would take it for that of a finished file.
    """
    # Without the name of the file, which may be as long as names can be.
    unfinished = file.with_name(f".{uuid.uuid4().hex}.unfinished{suffix}")
    try:
        yield unfinished
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def write_whole(file: Path, data: bytes) -> None:
    """Writes these bytes, so that an interrupted write leaves no half a file."""
    with whole_or_not_at_all(file) as unfinished:
        unfinished.write_bytes(data)

"""Checkpoint folders of a run: written whole or not at all, the oldest deleted.

A checkpoint is the folder ``checkpoint-STEP``: files that inference loads, and beside them
``trainer_state/`` with all that a run needs to go on to the same bits. It is written under another
name, flushed to disk and renamed, so that whatever kills a run leaves only whole checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STATE_FOLDER = "trainer_state"
PROGRESS_FILE = "progress.json"

_FINISHED, _UNFINISHED, _REPLACED = "checkpoint-", "unfinished-checkpoint-", "replaced-checkpoint-"


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints in `output_dir`, the latest last.

    One that was being replaced when the run was killed counts until `tidy_up` puts it back.
    """
    steps: dict[int, Path] = {}
    for prefix in (_REPLACED, _FINISHED):
        for folder in output_dir.glob(f"{prefix}*"):
            step = folder.name.removeprefix(prefix)
            if step.isdigit() and is_checkpoint(folder):
                steps[int(step)] = folder
    return [steps[step] for step in sorted(steps)]


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` holds what a run can go on from."""
    return (folder / STATE_FOLDER / PROGRESS_FILE).is_file()


def unfinished_checkpoint(output_dir: Path, step: int) -> Path:
    """The folder in which the checkpoint of `step` is to be written, for `finish_checkpoint`."""
    return output_dir / f"{_UNFINISHED}{step}"


def finish_checkpoint(
    output_dir: Path, step: int, progress: dict[str, Any], total_limit: int | None
) -> Path:
    """Turn the unfinished checkpoint of `step` into a checkpoint and return its folder.

    Args:
        output_dir: folder of the run.
        step: optimiser steps done.
        progress: what `read_progress` gives back; it is written last.
        total_limit: delete the oldest checkpoints beyond this number.
    """
    unfinished, finished = unfinished_checkpoint(output_dir, step), _folder(output_dir, step)
    (unfinished / STATE_FOLDER).mkdir(parents=True, exist_ok=True)
    path = unfinished / STATE_FOLDER / PROGRESS_FILE
    path.write_text(json.dumps(progress, indent=1), encoding="utf-8")
    _flush_to_disk(unfinished)
    replaced = output_dir / f"{_REPLACED}{step}"
    if finished.exists():
        finished.rename(replaced)
    unfinished.rename(finished)
    _flush_to_disk(output_dir, deeply=False)
    if replaced.exists():
        shutil.rmtree(replaced)
    if total_limit is not None:
        for old in find_checkpoints(output_dir)[:-total_limit]:
            delete_checkpoint(old)
    return finished


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Return what `finish_checkpoint` was given."""
    progress = json.loads((checkpoint / STATE_FOLDER / PROGRESS_FILE).read_text(encoding="utf-8"))
    assert isinstance(progress, dict)
    return progress


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, which is none from the first moment on."""
    step = folder.name.removeprefix(_FINISHED)
    unfinished = folder.with_name(f"{_UNFINISHED}{step}")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    folder.rename(unfinished)
    shutil.rmtree(unfinished)


def tidy_up(output_dir: Path) -> None:
    """Remove what a killed run left half done, and put back a checkpoint it was replacing."""
    for replaced in output_dir.glob(f"{_REPLACED}*"):
        finished = _folder(output_dir, int(replaced.name.removeprefix(_REPLACED)))
        if finished.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(finished)
    for unfinished in output_dir.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(unfinished)


def _folder(output_dir: Path, step: int) -> Path:
    return output_dir / f"{_FINISHED}{step}"


def _flush_to_disk(folder: Path, deeply: bool = True) -> None:
    """A renamed folder must not come back from a power cut with empty files."""
    for path in [*(folder.rglob("*") if deeply else ()), folder]:
        with _opened(path) as descriptor:
            os.fsync(descriptor)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)

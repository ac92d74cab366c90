"""Checkpoint folders are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training.checkpoints import (
    STATE_FOLDER,
    delete_checkpoint,
    find_checkpoints,
    finish_checkpoint,
    read_progress,
    tidy_up,
    unfinished_checkpoint,
)


def write(output_dir: Path, step: int, content: str, total_limit: int | None = None) -> None:
    tidy_up(output_dir)
    folder = unfinished_checkpoint(output_dir, step)
    (folder / STATE_FOLDER).mkdir(parents=True)
    (folder / "weights").write_text(content)
    finish_checkpoint(output_dir, step, {"step": step}, total_limit)


def found(output_dir: Path) -> dict[int, str]:
    """The content of each checkpoint by its step."""
    return {
        read_progress(folder)["step"]: (folder / "weights").read_text()
        for folder in find_checkpoints(output_dir)
    }


def test_checkpoints_come_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        write(tmp_path, step, f"{step}")
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert list(found(tmp_path)) == [9, 10, 100]


def test_the_oldest_go_first(tmp_path: Path) -> None:
    for step in range(5):
        write(tmp_path, step, f"{step}", total_limit=2)
    assert found(tmp_path) == {3: "3", 4: "4"}
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-4"}


def test_a_deleted_checkpoint_is_gone(tmp_path: Path) -> None:
    write(tmp_path, 1, "one")
    delete_checkpoint(tmp_path / "checkpoint-1")
    assert not list(tmp_path.iterdir())


def _write_and_die(output_dir: Path, change: int) -> None:
    """Replace checkpoint 2, keep two, and be gone before the given change of the disk."""
    remaining = [change]

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **options: Any) -> Any:
            remaining[0] -= 1
            if remaining[0] == 0:
                os._exit(9)
            return function(*arguments, **options)

        return changed

    Path.rename, os.fsync = deadly(Path.rename), deadly(os.fsync)
    shutil.rmtree = deadly(shutil.rmtree)
    Path.mkdir, Path.write_text = deadly(Path.mkdir), deadly(Path.write_text)
    write(output_dir, 2, "new", total_limit=2)
    os._exit(0)


@pytest.mark.parametrize("replaced", [False, True])
def test_killed_before_every_change_of_the_disk(tmp_path: Path, replaced: bool) -> None:
    fork = multiprocessing.get_context("fork")
    outcomes = []
    for change in range(1, 60):
        folder = tmp_path / str(change)
        write(folder, 0, "zero")
        write(folder, 1, "one")
        if replaced:
            write(folder, 2, "old")
        process = fork.Process(target=_write_and_die, args=(folder, change))
        process.start()
        process.join()
        after = found(folder)
        # The checkpoint that a run would go on from is the one before or the new one, and whole.
        assert after[1] == "one"
        assert after.get(2) in ("new", "old" if replaced else None)
        tidy_up(folder)
        assert found(folder) == after
        assert {path.name for path in folder.iterdir()} == {f"checkpoint-{step}" for step in after}
        write(folder, 2, "new", total_limit=2)
        assert found(folder) == {1: "one", 2: "new"}
        outcomes.append(after.get(2))
        if process.exitcode == 0:
            break
    assert process.exitcode == 0 and outcomes[-1] == "new"
    assert outcomes[0] != "new" and change > 10

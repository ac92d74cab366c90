"""The folder of a run: what is in it, what a run may go on from, and what it must not overwrite."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from training import checkpoints
from training.run_settings import ABOUT_THIS_CALL
from training.settings import plain_settings, write_in_one_step, write_settings

LOG_FILE = "log.jsonl"
SETTINGS_FILE = "training_config.yaml"
TRACKER_FOLDER = "logs"
PICTURE_FOLDER = "validation"


def checkpoint_to_resume(args: argparse.Namespace) -> Path | None:
    """Return the checkpoint to go on from, or None for a new run.

    Raises:
        ValueError: the checkpoint is none, or a new run would overwrite the files of another.
    """
    output_dir = Path(args.output_dir)
    if args.resume_from_checkpoint == "latest":
        if found := checkpoints.find_checkpoints(output_dir):
            return found[-1]
        if (output_dir / SETTINGS_FILE).is_file():
            return None  # it was stopped before its first checkpoint
    elif args.resume_from_checkpoint is not None:
        checkpoint = Path(args.resume_from_checkpoint)
        if not checkpoints.is_checkpoint(checkpoint):
            raise ValueError(
                f"{checkpoint} is no checkpoint of this script: it has no "
                f"{checkpoints.STATE_FOLDER}/{checkpoints.PROGRESS_FILE}."
            )
        if checkpoint.resolve().parent == output_dir.resolve():
            later = _later_checkpoints(output_dir, checkpoints.read_progress(checkpoint)["step"])
            if later and not args.overwrite_output_dir:
                raise ValueError(
                    f"{later[-1]} is later than {checkpoint}. Pass --resume latest to go on from "
                    "it, --overwrite_output_dir to go back and delete what is later, or another "
                    "--output_dir."
                )
            return checkpoint
        _check_unused(output_dir, args.overwrite_output_dir)
        return checkpoint
    _check_unused(output_dir, args.overwrite_output_dir)
    return None


def _check_unused(output_dir: Path, overwrite: bool) -> None:
    if output_dir.is_file():
        raise ValueError(f"The output folder {output_dir} is a file.")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not overwrite:
        raise ValueError(
            f"The output folder {output_dir} is not empty. Pass --resume latest to go on with the "
            "run in it, --overwrite_output_dir to start anew, or another folder."
        )


def _later_checkpoints(output_dir: Path, step: int) -> list[Path]:
    return [
        folder
        for folder in checkpoints.find_checkpoints(output_dir)
        if checkpoints.read_progress(folder)["step"] > step
    ]


def begin_output(
    args: argparse.Namespace, checkpoint: Path | None, step: int
) -> dict[str, list[Any]]:
    """Write ``training_config.yaml`` and return the settings it changes, as {name: [old, new]}.

    A new run removes checkpoints, logs and pictures of the run it replaces, and changes nothing. A
    run that goes on takes out what it will do again, of the log and of the checkpoints.
    """
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    checkpoints.tidy_up(output_dir)
    settings = plain_settings(args, *ABOUT_THIS_CALL)
    path = output_dir / SETTINGS_FILE
    changes: dict[str, list[Any]] = {}
    for old in _later_checkpoints(output_dir, -1 if checkpoint is None else step):
        checkpoints.delete_checkpoint(old)
    if checkpoint is None:
        (output_dir / LOG_FILE).unlink(missing_ok=True)
        for folder in (TRACKER_FOLDER, PICTURE_FOLDER):
            shutil.rmtree(output_dir / folder, ignore_errors=True)
    else:
        kept = [entry for entry in read_log(output_dir) if entry["step"] <= step]
        lines = "".join(json.dumps(entry) + "\n" for entry in kept)
        write_in_one_step(output_dir / LOG_FILE, lines)
        if path.is_file():
            before = yaml.safe_load(path.read_text(encoding="utf-8"))
            for name, value in settings.items():
                if before.get(name) != value:
                    changes[name] = [before.get(name), value]
                    print(
                        f"The run goes on with another {name}: {value} instead of "
                        f"{before.get(name)}."
                    )
    write_settings(path, settings)
    return changes


def read_log(output_dir: Path) -> list[dict[str, Any]]:
    """Return the entries of ``log.jsonl``; a line that a killed run left half written is none."""
    path = output_dir / LOG_FILE
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    return entries


def picture_name(step: int) -> str:
    """Return where the pictures of a validation lie in the output folder."""
    return f"{PICTURE_FOLDER}/step-{step:06d}.png"

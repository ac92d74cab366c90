"""What one file for each photograph asks for: targets that are free, and a failure that stops no
other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import typer

from .speech import Mistake, say_error


def check_targets(
    photos: Sequence[Path],
    targets: Sequence[Path],
    force: bool,
    do: str,
    done: str,
    more: Sequence[Path] = (),
) -> None:
    """Refuses, before any work, to write over a photograph, another result, or what is there.

    Args:
        photos, targets: what is read, and what is written for each.
        force: whether results that exist are replaced.
        do, done: what happens to a photograph, for the sentences: "Render", "rendered".
        more: files that are written beside the targets.
    """
    seen: dict[Path, Path] = {}
    for photo, target in zip(photos, targets, strict=True):
        if target in seen:
            raise Mistake(
                f"{seen[target]} and {photo} would both be written to {target}; wanted different "
                f"names. {do} them in two calls with two folders."
            )
        seen[target] = photo
    for file in more:
        if file in seen:
            raise Mistake(
                f"{file} would be written twice, as the result of {seen[file]} too; wanted "
                f"different names. {do} them in two calls with two folders."
            )
    existing = [file for file in [*targets, *more] if file.exists()]
    for file in existing:
        if any(file.samefile(photo) for photo in photos):
            raise Mistake(f"{file} is the photograph itself; wanted another file or folder.")
    if existing and not force:
        others = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise Mistake(
            f"{existing[0]}{others} exists already; nothing was {done}. Choose another -o, or add "
            "--force to overwrite."
        )


def one_by_one(photos: Sequence[Path], work: Callable[[int], str]) -> int:
    """Does the work of each photograph, past any that fail; returns how many failed.

    Args:
        photos: their files.
        work: of the number of a photograph; returns what is said about its result.
    """
    from tqdm import tqdm

    failures = 0
    with tqdm(total=len(photos), unit="photo", file=sys.stderr) as bar:
        for number, photo in enumerate(photos):
            bar.set_description(photo.name)
            try:
                sentence = work(number)
            except (ValueError, OSError) as mistake:
                failures += 1
                with bar.external_write_mode(file=sys.stderr):
                    say_error(f"{photo}: {mistake}")
            else:
                with bar.external_write_mode(file=sys.stderr):
                    typer.echo(sentence)
            bar.update()
    return failures

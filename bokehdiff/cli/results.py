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


def plan_outputs(
    photos: list[Path], linear: list[bool], output: Path, force: bool, coc: bool
) -> list[Path]:
    """Decides every output file, and refuses before anything is rendered.

    Args:
        photos: what is read; one, or several for a folder.
        linear: of each, whether its result is kept as linear light.
        output: the file, or the folder.
        force: whether results that exist are replaced.
        coc: whether the circles of confusion are shown beside each (:func:`overlay_file`).
    """
    from ..linear_images import LINEAR_LIGHT_SUFFIXES
    from ..photographs import PHOTOGRAPH_SUFFIXES
    from ..picture_encoding import check_encoder

    suffix = output.suffix.lower()
    into_folder = output.is_dir() or suffix == "" or len(photos) > 1
    if len(photos) > 1 and suffix in PHOTOGRAPH_SUFFIXES and not output.is_dir():
        raise Mistake(
            f"-o {output} is one file for {len(photos)} photographs; wanted a folder, for instance "
            f"-o {output.with_suffix('')}."
        )
    if not into_folder and suffix not in PHOTOGRAPH_SUFFIXES:
        raise Mistake(
            f"-o {output} ends in {suffix}; wanted a folder, or a file ending in one of "
            f"{' '.join(PHOTOGRAPH_SUFFIXES)}."
        )
    if into_folder and output.is_file():
        raise Mistake(f"-o {output} is a file; wanted a folder for the results.")
    if not into_folder and not output.parent.is_dir():
        raise Mistake(f"-o {output}: there is no folder {output.parent}; create it first.")
    targets = [output]
    if into_folder:
        targets = []
        for photo, is_linear in zip(photos, linear, strict=True):
            kept = photo.suffix.lower() in PHOTOGRAPH_SUFFIXES
            if photo.suffix.lower() in (*LINEAR_LIGHT_SUFFIXES, ".npy"):
                kept = is_linear
            targets.append(output / (photo.name if kept else f"{photo.stem}.png"))
    overlays = [overlay_file(target) for target in targets] if coc else []
    check_targets(photos, targets, force, do="Render", done="rendered", more=overlays)
    for target in targets:
        check_encoder(target)
    return targets


def overlay_file(target: Path) -> Path:
    """Where the circles of confusion of a result are shown."""
    return target.with_name(f"{target.stem}_coc.png")


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

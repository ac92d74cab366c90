"""A bokeh stack in a folder: a sharp picture, the blurred ones, and how strong each is blurred.

:func:`write_stack_folder` writes ``ref.png``, ``0.png``, ``1.png``, ... and ``summary.json``, in
which all file names are relative, so that the folder can be moved. :func:`read_stack_folder` reads
it back, and the folders of BokehDepth's authors too (``manifest.jsonl``, ``stack_index.json``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .images import as_image_batch, read_image, write_image
from .stack_strengths import check_strengths
from .whole_files import PathLike, write_whole

SUMMARY_FILE = "summary.json"
REFERENCE_FILE = "ref.png"
INDEX_FILES = (SUMMARY_FILE, "manifest.jsonl", "stack_index.json", "defocus_stack/stack_index.json")
"""What may describe a folder; the first that is there is read."""

REFERENCE_NAMES = ("ref", "source_rgb", "image_path", "ref_image")


class StackFolder(NamedTuple):
    """What :func:`read_stack_folder` returns.

    Args:
        image: the sharp picture, float32 (1, 3, H, W), display sRGB in [0, 1].
        stack: the blurred ones, (N, 3, H, W).
        K: N blur strengths of these pictures, pixels of blur radius per 1/metre.
        df: disparity of the plane in focus, 1/metres: one number, or N for a stack with several;
            None where the folder does not say.
    """

    image: torch.Tensor
    stack: torch.Tensor
    K: list[float]
    df: float | list[float] | None


def stack_files(folder: PathLike, count: int) -> list[Path]:
    """The files of a stack of `count` blurred pictures: sharp picture, blurred ones, summary."""
    names = [REFERENCE_FILE, *(f"{number}.png" for number in range(count)), SUMMARY_FILE]
    return [Path(folder) / name for name in names]


def check_stack_folder(folder: PathLike, count: int, overwrite: bool) -> None:
    """Raises ``FileExistsError`` if a stack would be written over something, unless wanted.

    Raises:
        ValueError: the folder is a file.
    """
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"{folder} is a file; wanted a folder for the stack.")
    existing = [file for file in stack_files(folder, count) if file.exists()]
    if existing and not overwrite:
        raise FileExistsError(
            f"{existing[0]} exists already; wanted a new folder. Choose another one, or pass "
            "overwrite=True (--force on the command line)."
        )


def write_stack_folder(
    folder: PathLike,
    image: Any,
    stack: Any,
    K: Sequence[float],
    *,
    df: float | None = None,
    details: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Writes a stack as PNG of 8 bits, and ``summary.json`` last; returns the files.

    Args:
        folder: where to; made if it is not there.
        image: the sharp picture, of any kind that
            :func:`~bokehdiff.images.as_image_batch` takes.
        stack: N blurred ones of its size.
        K: N blur strengths of these pictures, pixels of blur radius per 1/metre.
        df: disparity of the plane in focus, 1/metres, if it is known.
        details: what else the summary says, as JSON can.
        overwrite: replace files that are there.

    Raises:
        FileExistsError: files are there, and `overwrite` is False.
        ValueError: numbers or sizes that do not belong together.
    """
    image, stack = as_image_batch(image), as_image_batch(stack)
    strengths = check_strengths(K)
    if len(image) != 1 or len(stack) != len(strengths) or image.shape[1:] != stack.shape[1:]:
        raise ValueError(
            f"The sharp picture has shape {tuple(image.shape)}, the stack {tuple(stack.shape)}, "
            f"and there are {len(strengths)} K; wanted one sharp picture, and blurred ones of its "
            "size with a K for each."
        )
    check_stack_folder(folder, len(stack), overwrite)
    height, width = image.shape[-2:]
    reference_file, *frames, summary_file = files = stack_files(folder, len(stack))
    summary = {
        "ref": reference_file.name,
        "stack": [frame.name for frame in frames],
        "k": strengths,
        "df": df,
        "size": [width, height],
        **(details or {}),
    }
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    Path(folder).mkdir(parents=True, exist_ok=True)
    # While pictures are replaced no summary speaks of them.
    summary_file.unlink(missing_ok=True)
    for file, picture in zip([reference_file, *frames], [image[0], *stack], strict=True):
        write_image(file, picture, overwrite=overwrite)
    write_whole(summary_file, text.encode())
    return files


def read_stack_folder(folder: PathLike) -> StackFolder:
    """Returns the stack in a folder.

    The folder is one that :func:`write_stack_folder` wrote, or has a ``manifest.jsonl`` of one line
    or a ``stack_index.json`` of BokehDepth. Of their names ``ref``, ``source_rgb``, ``image_path``
    or ``ref_image`` is the sharp picture; ``stack`` with ``k``, or ``ids`` with ``k_values``, are
    the blurred ones, which a ``stack_index`` may tell too. Files are looked for in the folder
    first, so that a folder with paths of another machine is read as well.

    Raises:
        FileNotFoundError: there is no such folder, or a picture is missing.
        ValueError: no stack in it, more than one, or pictures and strengths that do not belong
            together.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root}; wanted one with a bokeh stack.")
    found = [root / name for name in INDEX_FILES if (root / name).is_file()]
    if not found:
        raise ValueError(
            f"{root} holds no bokeh stack; wanted a folder with one of {', '.join(INDEX_FILES)}, "
            "for instance one that `bokehdiff stack` wrote."
        )
    entry = _entry(found[0])
    frames, strengths = _frames(entry, found[0])
    name = next((entry[name] for name in REFERENCE_NAMES if entry.get(name)), None)
    if not isinstance(name, str):
        raise ValueError(
            f"{found[0]} names no sharp picture; wanted one of {', '.join(REFERENCE_NAMES)}."
        )
    image = read_image(_file(found[0].parent, name))
    pictures = [read_image(frame) for frame in frames]
    for frame, picture in zip(frames, pictures, strict=True):
        if picture.shape != image.shape:
            raise ValueError(
                f"{frame} is {picture.shape[3]} x {picture.shape[2]} pixels and {name} is "
                f"{image.shape[3]} x {image.shape[2]}; wanted one size."
            )
    return StackFolder(image, torch.cat(pictures), strengths, _focus(entry, found[0], len(frames)))


def _entry(file: Path) -> dict[str, Any]:
    """The one description in a JSON file, or in one with a line for each."""
    text = file.read_text(encoding="utf-8")
    texts = [text]
    if file.suffix == ".jsonl":
        texts = [line for line in text.splitlines() if line.strip()]
    if len(texts) != 1:
        raise ValueError(f"{file} tells of {len(texts)} stacks; wanted one.")
    try:
        entry = json.loads(texts[0])
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); wanted JSON.") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{file} holds {type(entry).__name__}; wanted the JSON object of a stack.")
    return entry


def _frames(entry: Mapping[str, Any], file: Path) -> tuple[list[Path], list[float]]:
    """Files and strengths of the blurred pictures."""
    if "stack" in entry and "k" in entry:
        names, strengths = entry["stack"], entry["k"]
    elif "ids" in entry and "k_values" in entry:
        folder = str(entry.get("stack_dir", ""))
        names = [str(Path(folder, f"{one}.png")) for one in entry["ids"]]
        by_id = entry["k_values"]
        if isinstance(by_id, dict):
            missing = [one for one in entry["ids"] if str(one) not in by_id]
            if missing:
                raise ValueError(f"{file} has no k_values for {missing}; wanted one for each id.")
            by_id = [by_id[str(one)] for one in entry["ids"]]
        strengths = by_id
    elif isinstance(entry.get("stack_index"), str):
        index = _file(file.parent, entry["stack_index"])
        return _frames({**_entry(index), "stack_index": None}, index)
    else:
        raise ValueError(f"{file} tells of no stack; wanted stack and k, or ids and k_values.")
    if not isinstance(names, list) or not names or not all(isinstance(one, str) for one in names):
        raise ValueError(f"{file} has a stack of {names!r}; wanted a list of at least one file.")
    if not isinstance(strengths, list) or len(strengths) != len(names):
        raise ValueError(f"{file} has {len(names)} pictures and k {strengths!r}; wanted as many.")
    return [_file(file.parent, name) for name in names], check_strengths(strengths)


def _file(folder: Path, name: str) -> Path:
    """The file of that name in a folder; else near it; else wherever the name leads."""
    given = Path(name)
    inside = folder / given.parent.name / given.name
    places = [folder / given.name, folder.parent / given.name, folder / given]
    for place in [inside, *places]:
        if place.is_file():
            return place
    raise FileNotFoundError(f"{folder} speaks of {name}, and there is no such file.")


def _focus(entry: Mapping[str, Any], file: Path, count: int) -> float | list[float] | None:
    value = entry.get("df")
    if value is None:
        return None
    planes = check_strengths(value)
    if isinstance(value, list):
        if len(planes) != count:
            raise ValueError(
                f"{file} has {count} pictures and df {value!r}; wanted one or as many."
            )
        return planes
    return planes[0]

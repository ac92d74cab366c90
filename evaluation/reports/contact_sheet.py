"""Contact sheets: the worst, the median and the best photograph, by every method, with its error.

The photographs are chosen by one method and one metric, so that its failures cannot be left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evaluation.photographs import Photograph, read_picture
from evaluation.reports.tables import IDENTITY, Results, methods_in_order, shown

__all__ = ["Choice", "Sheet", "choose", "error_map", "make_contact_sheet"]

# Width of a picture on the sheet, pixels.
CELL_WIDTH = 288
GAP = 6
TEXT_SIZE = 15
TEXT_LINE = 24
BACKGROUND, INK = "white", "black"
# An error of so many of the 255 levels has the brightest colour. Few pixels of a good picture are
# so wrong, and a scale that is the same everywhere lets sheets be compared.
BRIGHTEST_ERROR = 64
COLOURS_OF_ERRORS = "inferno"


@dataclass(frozen=True)
class Choice:
    """One photograph of the sheet: why it was chosen, and its row of results."""

    why: str
    scene: str
    setting: str

    @property
    def name(self) -> str:
        return f"{self.scene}_{self.setting}"


@dataclass(frozen=True)
class Sheet:
    """A contact sheet, and what can be seen on it in words."""

    picture: Image.Image
    words: str


def choose(results: Results, method: str, metric: str) -> list[Choice]:
    """The worst, the median and the best photograph of a method; fewer if there are fewer.

    Raises:
        ValueError: a method or metric that the results do not have.
    """
    if method not in results["methods"]:
        raise ValueError(
            f"The results have no method {method}; wanted one of {', '.join(results['methods'])}."
        )
    rows = [row for row in results["methods"][method]["rows"] if row.get(metric) is not None]
    if not rows:
        raise ValueError(
            f"The results have no figures of {method} for {metric}; wanted one of "
            f"{', '.join(results['metrics'])}."
        )
    rows.sort(key=lambda row: row[metric], reverse=results["metrics"][metric]["better"] == "lower")
    places = {"worst": 0, "best": len(rows) - 1, "median": len(rows) // 2}
    taken = {place: name for name, place in reversed(places.items())}
    return [
        Choice(
            f"{taken[place]} of {method} by {metric}", rows[place]["scene"], rows[place]["setting"]
        )
        for place in sorted(taken)
    ]


def make_contact_sheet(
    results: Results,
    photographs: Iterable[Photograph],
    pictures: str | Path,
    method: str,
    metric: str,
) -> Sheet:
    """The sheet for results whose pictures were kept.

    Two lines for each chosen photograph: the photograph, the truth and what every method made of
    it; below each its error, the mean over the colours of |sRGB - truth|, in colours from 0
    (black) to `BRIGHTEST_ERROR` of 255 levels or more (yellow), averaged where a pixel of the
    sheet covers several. Below the truth lies the scale.

    Args:
        results: a comparison.
        photographs: of the data set; those not chosen are passed over.
        pictures: where ``compare --save`` put them: ``<method>/<scene>_<setting>.png``.
        method, metric: which choose the photographs, see :func:`choose`.

    Raises:
        ValueError: a picture or photograph is missing, or of another size than the truth.
    """
    choices = choose(results, method, metric)
    wanted = {choice.name for choice in choices}
    found = {photograph.name: photograph for photograph in photographs if photograph.name in wanted}
    missing = sorted(wanted - set(found))
    if missing:
        raise ValueError(
            f"The data set has no photograph {', '.join(missing)}; wanted the one that the results "
            "were measured on."
        )
    methods = [name for name in methods_in_order(results) if name != IDENTITY]
    blocks = [
        _block(results, choice, found[choice.name], Path(pictures), methods, metric)
        for choice in choices
    ]
    width = max(block.width for block in blocks)
    height = sum(block.height for block in blocks)
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    top = 0
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    described = "; ".join(f"{choice.name}, the {choice.why}" for choice in choices)
    return Sheet(
        sheet,
        f"Photographs in rows: {described}. In columns the photograph, the truth, "
        f"{', '.join(methods)}; below each its error, from 0 (black) to {BRIGHTEST_ERROR} of 255 "
        "levels or more (yellow).",
    )


def error_map(picture: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 colours of the mean over channels of |picture - truth|, both uint8."""
    from matplotlib import colormaps

    error = np.abs(picture.astype(np.float64) - truth).mean(axis=2) / BRIGHTEST_ERROR
    colours = colormaps[COLOURS_OF_ERRORS](np.clip(error, 0, 1))[..., :3]
    return np.rint(colours * 255).astype(np.uint8)


def _block(
    results: Results,
    choice: Choice,
    photograph: Photograph,
    pictures: Path,
    methods: Sequence[str],
    metric: str,
) -> Image.Image:
    """The lines of one photograph."""
    columns: list[tuple[str, np.ndarray]] = [
        (_heading(results, IDENTITY, "photograph", choice, metric), photograph.image),
        ("truth", photograph.truth),
    ]
    for name in methods:
        file = pictures / name / f"{choice.name}.png"
        picture = read_picture(file)
        if picture.shape != photograph.truth.shape:
            raise ValueError(
                f"{file} has shape {picture.shape}, the truth {photograph.truth.shape}; wanted the "
                "same size."
            )
        columns.append((_heading(results, name, name, choice, metric), picture))

    height = round(CELL_WIDTH * photograph.truth.shape[0] / photograph.truth.shape[1])
    block = Image.new(
        "RGB",
        (len(columns) * (CELL_WIDTH + GAP) + GAP, 2 * TEXT_LINE + 2 * (height + GAP) + GAP),
        BACKGROUND,
    )
    draw, font = ImageDraw.Draw(block), ImageFont.load_default(TEXT_SIZE)
    draw.text((GAP, 4), f"{choice.name}: the {choice.why}", INK, font)
    for number, (heading, picture) in enumerate(columns):
        left, top = GAP + number * (CELL_WIDTH + GAP), TEXT_LINE
        draw.text((left, top), _shortened(heading, font), INK, font)
        block.paste(_scaled(picture, height), (left, top + TEXT_LINE))
        below = (left, top + TEXT_LINE + height + GAP)
        if number == 1:  # the truth has no error
            block.paste(_scale_of_errors(height), below)
        else:
            block.paste(_scaled(error_map(picture, photograph.truth), height), below)
    return block


def _heading(results: Results, method: str, words: str, choice: Choice, metric: str) -> str:
    """The words, and the method's figure for this photograph."""
    unit = results["metrics"][metric]["unit"]
    for row in results["methods"].get(method, {"rows": []})["rows"]:
        if (row["scene"], row["setting"]) == (choice.scene, choice.setting):
            return f"{words}  {shown(row.get(metric), unit)} {unit}".rstrip()
    return words


def _shortened(text: str, font: Any) -> str:
    """The text, cut so that it fits over a picture."""
    if font.getlength(text) <= CELL_WIDTH:
        return text
    while text and font.getlength(text + "...") > CELL_WIDTH:
        text = text[:-1]
    return text + "..."


def _scaled(picture: np.ndarray, height: int) -> Image.Image:
    # Averaging shows an error of one pixel as small as it is; an interpolation may jump over it.
    return Image.fromarray(picture).resize((CELL_WIDTH, height), Image.Resampling.BOX)


def _scale_of_errors(height: int) -> Image.Image:
    """A bar with the colours of errors and their levels."""
    cell = Image.new("RGB", (CELL_WIDTH, height), BACKGROUND)
    levels = np.linspace(0, BRIGHTEST_ERROR, CELL_WIDTH - 2 * GAP)
    bar = np.broadcast_to(levels[None, :, None], (TEXT_LINE, len(levels), 3))
    cell.paste(Image.fromarray(error_map(bar, np.zeros(bar.shape))), (GAP, GAP))
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default(TEXT_SIZE)
    under = GAP + TEXT_LINE + 4
    draw.text((GAP, under), "0", INK, font)
    most = f"{BRIGHTEST_ERROR} levels of 255"
    draw.text((CELL_WIDTH - GAP - font.getlength(most), under), most, INK, font)
    draw.text((GAP, under + TEXT_LINE), "error", INK, font)
    return cell

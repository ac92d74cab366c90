"""Blocks of Markdown that are made from measurements: found, compared and replaced.

A block is what lies between two comments that nobody sees when the file is shown::

    <!-- numbers: raytraced -->
    | | PSNR |
    ...
    <!-- end -->
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

__all__ = ["Difference", "QuotedBlock", "blocks_in", "compare", "with_blocks"]

COMMENT = re.compile(r"^<!-- (?:numbers: (?P<name>\S+)|(?P<end>end)) -->$")
# Whole numbers (images, pixels, settings) are counted, not measured: they belong to the words.
MEASURED = re.compile(r"[-+]?\d+\.\d+")
BOLD = "**"


@dataclass(frozen=True)
class QuotedBlock:
    """What a file says between the comments, and the number of its first line."""

    text: str
    line: int


@dataclass(frozen=True)
class Difference:
    """A place where what is quoted is not what was measured.

    Attributes:
        place: file, line and block.
        quoted, measured: the words or the figure.
        rounding: only the last printed digit differs, and by one.
    """

    place: str
    quoted: str
    measured: str
    rounding: bool = False


def blocks_in(text: str, file: str) -> dict[str, QuotedBlock]:
    """The blocks of a file by name.

    Raises:
        ValueError: a block that does not end, an end without a beginning, or a name used twice;
            ``file`` is what the sentence calls the file.
    """
    found: dict[str, QuotedBlock] = {}
    name, lines, first = None, [], 0
    for number, line in enumerate(text.splitlines(), start=1):
        comment = COMMENT.match(line.strip())
        if comment is None:
            lines.append(line)
        elif comment["end"]:
            if name is None:
                raise ValueError(
                    f"{file}:{number} ends a block that does not begin; wanted "
                    "<!-- numbers: NAME --> before it."
                )
            found[name] = QuotedBlock("\n".join(lines), first)
            name = None
        else:
            if name is not None:
                raise ValueError(
                    f"{file}:{number} begins the block {comment['name']} inside the block {name}; "
                    "wanted <!-- end --> before it."
                )
            name, lines, first = comment["name"], [], number + 1
            if name in found:
                raise ValueError(f"{file}:{number} has a second block {name}; wanted one.")
    if name is not None:
        raise ValueError(f"{file}:{first - 1}: the block {name} has no <!-- end -->.")
    return found


def with_blocks(text: str, new: Mapping[str, str]) -> str:
    """The file's text with new texts in the blocks of those names; all else as it is."""
    kept: list[str] = []
    name = ""
    for line in text.splitlines(keepends=True):
        comment = COMMENT.match(line.strip())
        if comment is not None and comment["end"]:
            if name in new:
                kept.append(f"{new[name]}\n")
            name = ""
        if name not in new:
            kept.append(line)
        if comment is not None and comment["name"]:
            name = comment["name"]
    return "".join(kept)


def compare(name: str, file: str, quoted: QuotedBlock, measured: str) -> list[Difference]:
    """Where the quoted block does not say what was measured; [] if it does.

    Figures are compared as they are printed: what has decimals may differ by one unit of its last
    place, as sums in another order round otherwise on other processors; that is a difference with
    ``rounding``. Words and whole numbers have to be the same; where lines break does not matter.
    Bold type is compared where no figure differs: after rounding another one may be the best.
    """
    told, new = _words(quoted.text), _words(measured)
    differences = []
    matcher = difflib.SequenceMatcher(
        None, [_skeleton(word) for _, word in told], [_skeleton(word) for _, word in new], False
    )
    for kind, start, end, new_start, new_end in matcher.get_opcodes():
        line = told[min(start, len(told) - 1)][0] if told else 0
        if kind == "equal":
            for (line, word), (_, other) in zip(
                told[start:end], new[new_start:new_end], strict=True
            ):
                differences += _figures(_place(file, quoted, line, name), word, other)
        else:
            differences.append(
                Difference(
                    _place(file, quoted, line, name),
                    " ".join(word for _, word in told[start:end]),
                    " ".join(word for _, word in new[new_start:new_end]),
                )
            )
    if not differences:
        differences = [
            Difference(_place(file, quoted, line, name), word, other)
            for (line, word), (_, other) in zip(told, new, strict=True)
            if word != other
        ]
    return differences


def _words(text: str) -> list[tuple[int, str]]:
    """(line within the text, word)."""
    return [(i, word) for i, line in enumerate(text.splitlines()) for word in line.split()]


def _skeleton(word: str) -> str:
    return MEASURED.sub("#", word.replace(BOLD, ""))


def _figures(place: str, quoted: str, measured: str) -> list[Difference]:
    """The figures that differ in two words that are the same without them."""
    differences = []
    for told, new in zip(MEASURED.findall(quoted), MEASURED.findall(measured), strict=True):
        if told != new:
            a, b = Decimal(told), Decimal(new)
            same_places = a.as_tuple().exponent == b.as_tuple().exponent
            unit = Decimal(1).scaleb(int(a.as_tuple().exponent))
            differences.append(Difference(place, told, new, same_places and abs(a - b) <= unit))
    return differences


def _place(file: str, quoted: QuotedBlock, line: int, name: str) -> str:
    return f"{file}:{quoted.line + line} ({name})"

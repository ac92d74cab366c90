"""What the README and the documentation hold: blocks of code, commands, and text."""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = {
    str(path.relative_to(REPOSITORY)): path
    for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md")))
}
"""Every page by its path from the repository."""

FENCE = re.compile(r"^( *)```([\w-]*)[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
SHELL = ("", "sh", "bash", "console")
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
ADDRESS = re.compile(r"\]\([^)\s]+\)")
INLINE = re.compile(r"`([^`]+)`")
PROGRAMS = ("bokehdiff", "python", "accelerate")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        page: path from the repository.
        line: number of its first line of code.
        language: the word after the fence; empty without one.
        code: without indentation.
    """

    page: str
    line: int
    language: str
    code: str


@dataclass(frozen=True)
class Command:
    """A command of a shell block or of the running text.

    Args:
        page: path from the repository.
        line: number of its first line.
        words: without comments and variables of the environment.
        in_text: it stands in a sentence, where what goes without saying may be left out.
    """

    page: str
    line: int
    words: tuple[str, ...]
    in_text: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page in their order."""
    text = PAGES[page].read_text("utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start(3)) + 1,
            found[2],
            textwrap.dedent(found[3]),
        )
        for found in FENCE.finditer(text)
    ]


def prose(page: str) -> str:
    """The text of a page without code and addresses; lines keep their numbers."""

    def blanked(found: re.Match[str]) -> str:
        return "\n" * found[0].count("\n")

    text = FENCE.sub(blanked, PAGES[page].read_text("utf-8"))
    return ADDRESS.sub("]", INLINE.sub(blanked, COMMENT.sub(blanked, text)))


def commands(page: str) -> list[Command]:
    """The commands of the shell blocks of a page, one for each line, and those in its text."""
    found = []
    for block in blocks(page):
        if block.language in SHELL:
            line = block.line
            for command in re.split(r"(?<!\\)\n", block.code):
                if words := _words(command.replace("\\\n", " ")):
                    found.append(Command(page, line, words, in_text=False))
                line += command.count("\n") + 1
    return found + _commands_in_text(page)


def _commands_in_text(page: str) -> list[Command]:
    def blanked(fence: re.Match[str]) -> str:
        return "\n" * fence[0].count("\n")

    text = COMMENT.sub(blanked, FENCE.sub(blanked, PAGES[page].read_text("utf-8")))
    found = []
    for span in INLINE.finditer(text):
        try:
            words = _words(" ".join(span[1].split()))
        except ValueError:  # a quotation mark that is no pair: no command
            continue
        if len(words) > 1 and words[0] in PROGRAMS:
            line = text.count("\n", 0, span.start()) + 1
            found.append(Command(page, line, words, in_text=True))
    return found


def _words(command: str) -> tuple[str, ...]:
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        del words[0]
    return tuple(words)

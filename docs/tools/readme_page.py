"""What the documentation takes from the README, for mkdocs: the whole as a page, and its numbers.

Numbers stand once, in the README, where ``python -m evaluation report`` checks them. A page gets a
block of them where it says ``<!-- numbers of the README: NAME -->``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parents[2]
README = REPOSITORY / "README.md"
PAGE = "readme.md"

BLOCK = re.compile(r"<!-- numbers: (\w+) -->\n(.*?)\n<!-- end -->", re.DOTALL)
PLACE = re.compile(r"<!-- numbers of the README: (\w+) -->")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the README to the pages."""
    files.append(File.generated(config, PAGE, content=readme_page(README.read_text("utf-8"))))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts the README's numbers where a page asks for them."""
    try:
        return with_numbers(markdown, README.read_text("utf-8"))
    except KeyError as missing:
        raise PluginError(f"{page.file.src_uri}: {missing.args[0]}") from missing


def readme_page(readme: str) -> str:
    """The README with links as they are in the documentation; where they lead to files of the
    repository, which are no pages, their words alone are left."""

    def mended(link: re.Match[str]) -> str:
        exclamation, words, target = link.groups()
        if target.startswith("docs/"):
            return f"{exclamation}[{words}]({target.removeprefix('docs/')})"
        if target.startswith("#") or "://" in target:
            return link[0]
        return words

    return LINK.sub(mended, BLOCK.sub(r"\2", readme))


def with_numbers(markdown: str, readme: str) -> str:
    """A page with the README's blocks in it.

    Raises:
        KeyError: the README has no block of that name.
    """
    blocks = dict(BLOCK.findall(readme))

    def block(place: re.Match[str]) -> str:
        if place[1] not in blocks:
            raise KeyError(
                f"The README has no numbers called {place[1]!r}; it has {', '.join(blocks)}."
            )
        return blocks[place[1]]

    return PLACE.sub(block, markdown)

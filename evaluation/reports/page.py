"""One HTML file with tables, plots and contact sheets in it, which opens without a network."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from bokehdiff.whole_files import write_whole
from evaluation.reports.contact_sheet import Sheet
from evaluation.reports.plots import plots_of, svg_of
from evaluation.reports.tables import Results, Table, descriptions, hardware_words, tables_of

__all__ = ["Section", "page", "section_of", "write_page"]

TEMPLATE = Path(__file__).with_name("page.html")
# Photographs on a sheet are looked at, not measured: JPEG makes the page a fifth as large.
SHEET_QUALITY = 90


@dataclass(frozen=True)
class EmbeddedPicture:
    """A picture of the page: its heading, the words for those who cannot see it, its bytes."""

    title: str
    words: str
    data_uri: str


@dataclass(frozen=True)
class Section:
    """What the page says about one file of results."""

    title: str
    tables: list[Table]
    pictures: list[EmbeddedPicture]
    protocol: str
    described: list[tuple[str, str]]  # metrics and methods, and what they are
    command: str
    hardware: str


def section_of(results: Results, sheets: Sequence[Sheet] = ()) -> Section:
    """Tables, plots and sheets of results of any kind.

    Raises:
        ValueError: a kind of results that has no table.
    """
    pictures = [
        EmbeddedPicture(plot.title, plot.words, _data_uri(svg_of(plot), "image/svg+xml"))
        for plot in plots_of(results)
    ]
    pictures += [
        EmbeddedPicture("Worst, median and best", sheet.words, _jpeg_uri(sheet.picture))
        for sheet in sheets
    ]
    return Section(
        results["title"],
        tables_of(results),
        pictures,
        results["protocol"],
        descriptions(results),
        results["command"],
        hardware_words(results),
    )


def page(title: str, introduction: Sequence[str], sections: Sequence[Section]) -> str:
    """The HTML. Whatever comes from files is escaped, and the page forbids itself any network.

    ``introduction``: paragraphs under the title.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, introduction=introduction, sections=sections)


def write_page(
    file: Path, title: str, introduction: Sequence[str], sections: Sequence[Section]
) -> None:
    """Writes :func:`page`, which appears whole."""
    write_whole(file, page(title, introduction, sections).encode())


def _data_uri(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def _jpeg_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=SHEET_QUALITY)
    return _data_uri(file.getvalue(), "image/jpeg")

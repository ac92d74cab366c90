"""The page: well formed, complete, readable without eyes, without a network, and safe."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from evaluation.reports.contact_sheet import Sheet
from evaluation.reports.page import page, section_of, write_page
from tests.evaluation.reports import example_results

VOID = {"meta", "img", "br", "link"}


class Reader(HTMLParser):
    """Reads a page as a browser does, and fails where tags do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(html)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append((self.open[-1] if self.open else "", data.strip()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def texts(self, tag: str) -> list[str]:
        return [text for inside, text in self.text if inside == tag]


@pytest.fixture(scope="module")
def whole_page() -> str:
    sheet = Sheet(Image.new("RGB", (60, 40), "red"), "A red sheet.")
    sections = [section_of(example_results.comparison(), [sheet])]
    sections += [section_of(make()) for make in example_results.EVERY_KIND[1:]]
    return page("Lens blur", ["Measured here."], sections)


def test_page_holds_every_table_plot_sheet_protocol_and_command(whole_page: str) -> None:
    reader = Reader(whole_page)
    assert reader.texts("h1") == ["Lens blur"]
    assert reader.texts("h2") == [
        "Two scenes",
        "Corrupted disparities",
        "Parts taken away",
        "Control",
    ]
    assert len(reader.all("table")) == 4
    assert {"35.00 (33.00 to 36.50)", "0.100"} <= set(reader.texts("strong"))
    assert "19.50 (19.00 to 20.00)" in reader.texts("td")
    assert reader.texts("pre") == ["python -m evaluation compare raytraced DATA --method tiny"] * 4
    assert "Each method is given the photograph." in reader.texts("p")
    assert "A red sheet." in reader.texts("figcaption")
    assert len(reader.all("img")) == 2 + 1 + 1 + 1 + 1  # plots of each kind, and the sheet


def test_page_needs_no_network(whole_page: str) -> None:
    reader = Reader(whole_page)
    pictures = [image["src"] or "" for image in reader.all("img")]
    for source in pictures:
        media_type, data = re.fullmatch(r"data:image/(svg\+xml|jpeg);base64,(.+)", source).groups()
        start = {"svg+xml": b"<?xml", "jpeg": b"\xff\xd8"}[media_type]
        assert base64.b64decode(data, validate=True).startswith(start)
    for tag, attributes in reader.tags:
        assert tag not in {"script", "link", "iframe", "object"}
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#"))
    policy = next(a for a in reader.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'")


def test_page_can_be_read_without_eyes(whole_page: str) -> None:
    reader = Reader(whole_page)
    assert reader.all("html")[0]["lang"] == "en" and reader.texts("title") == ["Lens blur"]
    assert all(image["alt"] for image in reader.all("img"))
    assert all(head["scope"] in ("col", "row") for head in reader.all("th"))
    assert len(reader.texts("caption")) == len(reader.all("table"))
    levels = [int(tag[1]) for tag, _ in reader.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    identifiers = [a["id"] for _, a in reader.tags if "id" in a]
    assert len(set(identifiers)) == len(identifiers)
    assert {a["href"] for a in reader.all("a")} <= {f"#{name}" for name in identifiers}
    assert {a["aria-labelledby"] for a in reader.all("section")} <= set(identifiers)


def test_what_comes_from_files_is_text() -> None:
    evil = '"><script>alert(1)</script>'
    results = example_results.comparison()
    results |= {"title": evil, "protocol": evil, "command": evil}
    results["hardware"] = {"processor": evil}
    results["dataset"]["scenes"] = [evil, evil]
    results["metrics"] = {evil: {"better": "higher", "unit": evil, "description": evil}}
    for method in results["methods"].values():
        method["mean"][evil] = 1.0
    results["methods"][evil] = {**results["methods"].pop("tiny"), "description": evil}
    sheet = Sheet(Image.new("RGB", (4, 4)), evil)
    reader = Reader(page(evil, [evil], [section_of(results, [sheet])]))
    assert not reader.all("script")
    assert evil in reader.texts("h1") and evil in reader.texts("th") and evil in reader.texts("pre")
    assert reader.all("img")[-1]["alt"] == evil


def test_page_appears_whole(tmp_path: Path) -> None:
    file = tmp_path / "index.html"
    write_page(file, "Lens blur", [], [section_of(example_results.comparison())])
    assert file.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert list(tmp_path.iterdir()) == [file]

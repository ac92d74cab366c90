"""The documentation is built without a warning, and nothing in it is fetched from elsewhere."""

from __future__ import annotations

import html.parser
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import bokehdiff
from tests.docs.pages import PAGES, REPOSITORY

pytest.importorskip("mkdocstrings", reason="needs mkdocs-material and mkdocstrings")
pytest.importorskip("material", reason="needs mkdocs-material and mkdocstrings")

# The theme's line in the footer may be clicked; it is not loaded.
LINKS_THAT_ARE_LOADED = {"stylesheet", "icon", "preload", "preconnect", "prefetch", "manifest"}


def load(path: str) -> ModuleType:
    """A script of the documentation as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPOSITORY / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Loaded(html.parser.HTMLParser):
    """Collects what a browser loads with a page, and the anchors in it."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if found.get("id"):
            self.anchors.add(found["id"] or "")
        if tag == "link" and not LINKS_THAT_ARE_LOADED & set((found.get("rel") or "").split()):
            return
        for name in ("src", "srcset", "data") + (("href",) if tag == "link" else ()):
            if tag != "a" and found.get(name):
                self.addresses.append(found[name] or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "WARNING -" not in built.stderr
    return folder


def parsed(page: Path) -> Loaded:
    loaded = Loaded()
    loaded.feed(page.read_text("utf-8"))
    return loaded


def test_every_page_is_there(site: Path):
    pages = [Path(page) for page in PAGES if page.startswith("docs/")]
    assert pages
    for page in pages:
        assert (site / page.relative_to("docs").with_suffix(".html")).is_file(), page


def test_nothing_is_loaded_from_elsewhere(site: Path):
    pages = list(site.rglob("*.html"))
    assert pages
    for page in pages:
        for address in parsed(page).addresses:
            assert not address.startswith(("http:", "https:", "//")), f"{page.name}: {address}"
            local = address.partition("?")[0].partition("#")[0]
            if page.name != "404.html" and not local.startswith("data:"):
                assert (page.parent / local).exists(), f"{page.name} lacks {address}"
    for style in site.rglob("*.css"):
        text = style.read_text("utf-8")
        assert "url(http" not in text and "url(//" not in text, style.name


def test_every_public_name_has_an_entry(site: Path):
    anchors = {anchor for page in (site / "api").glob("*.html") for anchor in parsed(page).anchors}
    missing = {name for name in bokehdiff.__all__ if f"bokehdiff.{name}" not in anchors} - {
        "__version__"
    }
    assert not missing


def test_docstrings_have_no_references_left_as_text(site: Path):
    for page in (site / "api").glob("*.html"):
        text = page.read_text("utf-8")
        for role in (":class:", ":func:", ":meth:", ":mod:", ":attr:", ":data:"):
            assert role not in text, f"{page.name}: {role}"

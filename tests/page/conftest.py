"""One page for all tests of it, and a fresh browser window for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .running import CHROMIUM, running_page


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the page is."""
    pytest.importorskip("gradio", reason="the page needs gradio")
    pytest.importorskip("skimage", reason="the sample photograph comes with scikit-image")
    with running_page(tmp_path_factory.mktemp("page")) as found:
        yield found


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="drives the browser")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no browser at {CHROMIUM}")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"]
        )
        yield started
        started.close()


@pytest.fixture
def window(browser: Any) -> Iterator[Any]:
    """A window of a visitor without cookies."""
    visitor = browser.new_context(viewport={"width": 1400, "height": 1250})
    visitor.set_default_timeout(120_000)
    yield visitor.new_page()
    visitor.close()

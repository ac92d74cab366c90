"""A page that runs as people start it, and a browser to look at it."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
CHROMIUM = Path("/usr/bin/chromium")
PATIENCE_S = 250
# On the sample's preview: the headlight, near, and the shelf behind the motorcycle, far.
NEAR, FAR = (371, 108), (290, 62)
SENTENCE = "document.querySelector('#said textarea').value"


@contextlib.contextmanager
def running_page(folder: Path, options: Sequence[str] | None = None) -> Iterator[str]:
    """The address of a page, stopped afterwards.

    Args:
        folder: an empty one, for its log and temporary files.
        options: of ``bokehdiff app``, which then starts it; else the repository's app.py does.
    """
    port = free_port()
    command = [str(REPOSITORY / "app.py")]
    if options is not None:
        command = ["-m", "bokehdiff", "app", "--port", str(port), *options]
    surroundings = {
        **os.environ,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(folder),
    }
    log = folder / "log.txt"
    with open(log, "w") as output:
        server = subprocess.Popen(
            [sys.executable, *command],
            env=surroundings, stdout=output, stderr=subprocess.STDOUT, cwd=REPOSITORY,
        )  # fmt: skip
        address = f"http://127.0.0.1:{port}/"
        try:
            wait_until_it_answers(address, server, log)
            yield address
        finally:
            server.terminate()
            server.wait(30)
    assert not list(folder.glob("bokehdiff-page-*")), "files of visitors were left behind"
    errors = [line for line in log.read_text().splitlines() if "Error" in line]
    assert not errors, log.read_text()


def free_port() -> int:
    """A port of this computer at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_until_it_answers(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for a server that starts; fails with its log if it ends, or takes too long."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)


def drop(page: Any, where: str, file: Path) -> None:
    """Gives a file to one of the page's fields for files."""
    page.set_input_files(f"{where} input[type=file]", str(file))


def picture_shown(page: Any, where: str = "#picture img") -> np.ndarray:
    """(H, W, 3) in [0, 1], as the browser has it."""
    answer = page.request.get(page.locator(where).first.get_attribute("src"))
    assert answer.ok
    return np.asarray(Image.open(io.BytesIO(answer.body())).convert("RGB")) / 255


def wait_for_sentence(page: Any, part: str) -> str:
    """What the page says, once it has this part in it."""
    page.wait_for_function(
        "part => document.querySelector('#said textarea').value.includes(part)",
        arg=part, timeout=1000 * PATIENCE_S,
    )  # fmt: skip
    return page.input_value("#said textarea")


def wait_for_picture(page: Any, width: int) -> None:
    """Waits for a picture of this width."""
    page.wait_for_function(
        "width => { const shown = document.querySelector('#picture img');"
        " return shown && shown.complete && shown.naturalWidth === width; }",
        arg=width, timeout=1000 * PATIENCE_S,
    )  # fmt: skip


def click(page: Any, x: float, y: float) -> np.ndarray:
    """Clicks on a pixel of the picture, where the disparity is another than in focus; returns the
    picture (H, W, 3) that follows."""
    before = page.evaluate(f"{SENTENCE}.split('In focus')[1]")
    box = page.locator("#picture img").bounding_box()
    height, width = picture_shown(page).shape[:2]
    place = {"x": x * box["width"] / width, "y": y * box["height"] / height}
    page.locator("#picture img").click(position=place)
    page.wait_for_function(
        f"before => {SENTENCE}.includes('In focus') && {SENTENCE}.split('In focus')[1] !== before",
        arg=before, timeout=1000 * PATIENCE_S,
    )  # fmt: skip
    return picture_shown(page)


def detail(picture: np.ndarray, x: int, y: int, radius: int = 12) -> float:
    """How much a picture changes from pixel to pixel around a place."""
    gray = picture.mean(axis=2)[y - radius : y + radius, x - radius : x + radius]
    return float(np.abs(np.diff(gray, axis=0)).mean() + np.abs(np.diff(gray, axis=1)).mean())

"""The controls of the page in a real browser: opening, shape of the aperture, models, depth."""

from __future__ import annotations

import re
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.tiny_depth import save_tiny_depth
from tests.trained_pipelines import base_pipeline

from .running import (
    FAR,
    NEAR,
    click,
    detail,
    drop,
    picture_shown,
    running_page,
    wait_for_picture,
    wait_for_sentence,
)

# A server and a browser take longer to start than most tests take.
pytestmark = pytest.mark.slow


def open_page(window: Any, address: str) -> None:
    window.goto(address)
    wait_for_picture(window, 512)
    wait_for_sentence(window, "at preview size")


def choose(window: Any, renderer: str) -> None:
    window.locator("#method input").click()
    window.get_by_role("option", name=re.compile(f"^{re.escape(renderer)}")).click()
    wait_for_sentence(window, f"{renderer}, ")


def strength(window: Any) -> float:
    """The K that the page shows."""
    return float(window.input_value("#strength textarea").split("K = ")[1].split(" px")[0])


def set_f_number(window: Any, f_number: float) -> np.ndarray:
    """Types an f-number; returns the picture by BokehFlow that follows."""
    before = window.evaluate("document.querySelector('#strength textarea').value")
    window.fill("#f_number input[type=number]", str(f_number))
    window.press("#f_number input[type=number]", "Enter")
    window.wait_for_function(
        "before => document.querySelector('#strength textarea').value !== before", arg=before
    )
    return picture_shown(window)


def test_a_smaller_opening_blurs_less(address: str, window: Any) -> None:
    open_page(window, address)
    choose(window, "BokehFlow")
    click(window, *NEAR)
    wide = set_f_number(window, 2.0)
    wide_strength = strength(window)
    narrow = set_f_number(window, 16.0)
    # K is shown with three digits.
    assert wide_strength / strength(window) == pytest.approx(8, rel=0.02)
    assert detail(narrow, *FAR) > 2 * detail(wide, *FAR)


def test_blades_are_for_the_classical_renderers(address: str, window: Any) -> None:
    open_page(window, address)
    assert window.locator("#blades input").first.is_disabled()
    choose(window, "scatter")
    window.wait_for_function("() => !document.querySelector('#blades input').disabled")
    round_opening = picture_shown(window)
    source = window.get_attribute("#picture img", "src")
    window.locator("#blades label", has_text="5").click()
    window.wait_for_function(
        "before => document.querySelector('#picture img').src !== before", arg=source
    )
    assert np.abs(picture_shown(window) - round_opening).max() > 0.02


def test_circles_of_confusion_are_green_where_one_clicked(address: str, window: Any) -> None:
    open_page(window, address)
    click(window, *NEAR)
    window.get_by_role("tab", name="Circles of confusion").click()
    overlay = picture_shown(window, "#overlay img")

    def colour(x: int, y: int) -> np.ndarray:
        return overlay[y - 4 : y + 4, x - 4 : x + 4].mean(axis=(0, 1))

    assert colour(*NEAR).argmax() == 1, "green in focus"
    assert colour(*FAR).argmax() == 0, "red behind"


def test_a_refocus_is_answered_at_once(address: str, window: Any) -> None:
    open_page(window, address)
    choose(window, "BokehFlow")
    waits = []
    for number in range(10):
        start = time.perf_counter()
        click(window, *(NEAR, FAR)[number % 2])
        waits.append(time.perf_counter() - start)
    print(f"a click is answered in {statistics.median(waits):.2f} s (median of 10)")
    assert statistics.median(waits) < 3


def test_a_phone_has_no_horizontal_scroll(address: str, browser: Any) -> None:
    phone = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
    window = phone.new_page()
    open_page(window, address)
    assert window.evaluate("document.documentElement.scrollWidth") <= 390
    click(window, *NEAR)
    phone.close()


def test_disparity_is_estimated_and_a_model_of_ones_own_is_offered(
    browser: Any, tmp_path: Path
) -> None:
    save_tiny_depth(tmp_path / "depth")
    base_pipeline().save_pretrained(tmp_path / "mine")
    samples = np.full((96, 128, 3), 40, np.uint8)
    samples[:, 64:] = 220  # to this network bright is near
    samples[::4] //= 2
    Image.fromarray(samples).save(tmp_path / "photo.png")
    options = ["--depth-model", str(tmp_path / "depth"), "--model", str(tmp_path / "mine")]
    folder = tmp_path / "page"
    folder.mkdir()
    with running_page(folder, options) as address:
        visitor = browser.new_context(viewport={"width": 1400, "height": 1250})
        visitor.set_default_timeout(120_000)
        window = visitor.new_page()
        open_page(window, address)
        choose(window, "BokehFlow")
        drop(window, "#photo", tmp_path / "photo.png")
        wait_for_picture(window, 128)
        dark, bright = click(window, 20, 48), click(window, 100, 48)
        assert detail(bright, 100, 48) > 1.2 * detail(dark, 100, 48)
        choose(window, "mine (diffusion)")
        visitor.close()

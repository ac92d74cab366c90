"""The page in a real browser."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from .running import (
    FAR,
    NEAR,
    click,
    detail,
    drop,
    picture_shown,
    wait_for_picture,
    wait_for_sentence,
)

# A server and a browser take longer to start than most tests take.
pytestmark = pytest.mark.slow


def open_page(window: Any, address: str) -> None:
    window.goto(address)
    wait_for_picture(window, 512)


def striped_photo(file: Path, colour: tuple[int, int, int]) -> Path:
    """Stripes of one colour, with the name of an author in the EXIF data."""
    samples = np.zeros((120, 160, 3), np.uint8)
    samples[:, ::4] = samples[:, 1::4] = colour
    exif = Image.Exif()
    exif[0x013B] = "A. Author"
    Image.fromarray(samples).save(file, exif=exif, quality=95)
    return file


def half_and_half(file: Path) -> Path:
    """A map: left near, right far."""
    disparity = np.full((120, 160), 0.9, np.float32)
    disparity[:, 80:] = 0.1
    np.save(file, disparity)
    return file


def test_the_clicked_region_is_sharp_and_nothing_comes_from_outside(
    address: str, window: Any
) -> None:
    requested: list[str] = []
    window.on("request", lambda request: requested.append(request.url))
    open_page(window, address)
    photo = picture_shown(window, "#compared img")
    focused = {}
    for place in (NEAR, FAR):
        focused[place] = click(window, *place)
    assert detail(focused[NEAR], *NEAR) > 0.9 * detail(photo, *NEAR)
    assert detail(focused[FAR], *FAR) > 0.9 * detail(photo, *FAR)
    assert detail(focused[FAR], *NEAR) < 0.3 * detail(photo, *NEAR)
    assert detail(focused[NEAR], *FAR) < 0.3 * detail(photo, *FAR)
    outside = [url for url in requested if not url.startswith((address, "data:", "blob:"))]
    assert not outside


def test_the_chosen_model_takes_the_place_of_the_preview(address: str, window: Any) -> None:
    open_page(window, address)
    wait_for_sentence(window, "TINY, ")
    click(window, *NEAR)
    wait_for_sentence(window, "; the picture by TINY follows.")
    wait_for_sentence(window, "TINY, ")
    assert "K = " in window.input_value("#strength textarea")
    picture = picture_shown(window)
    assert detail(picture, *NEAR) > 0.9 * detail(picture_shown(window, "#compared img"), *NEAR)
    if file := os.environ.get("BOKEHDIFF_SCREENSHOT"):
        window.screenshot(path=file)


def test_a_photograph_comes_back_at_full_size_with_its_metadata(
    address: str, window: Any, tmp_path: Path
) -> None:
    open_page(window, address)
    drop(window, "#photo", striped_photo(tmp_path / "stripes.jpg", (200, 60, 60)))
    wait_for_sentence(window, "--depth-model")  # there is none, and no network to fetch one by
    drop(window, "#disparity", half_and_half(tmp_path / "stripes.npy"))
    wait_for_picture(window, 160)
    right = click(window, 120, 60)
    left = click(window, 40, 60)
    assert detail(left, 40, 60) > 1.5 * detail(right, 40, 60)
    assert detail(right, 120, 60) > 1.5 * detail(left, 120, 60)
    window.click("#full")
    wait_for_sentence(window, "ready to be downloaded")
    with window.expect_download() as download:
        window.click("#download")
    assert download.value.suggested_filename == "stripes_bokeh.jpg"
    with Image.open(download.value.path()) as picture:
        assert picture.size == (160, 120)
        assert picture.getexif()[0x013B] == "A. Author"
    window.get_by_role("tab", name="Focus pull").click()
    window.click("#pull")
    wait_for_sentence(window, "The focus pull is ready.")
    window.wait_for_function(
        "() => { const film = document.querySelector('#film video');"
        " return film && film.duration > 1.5; }"
    )


def test_a_broken_file_is_told_in_a_sentence_and_changes_nothing(
    address: str, window: Any, tmp_path: Path
) -> None:
    open_page(window, address)
    wait_for_sentence(window, "TINY, ")
    shown = window.evaluate("document.querySelector('#picture img').src")
    whole = striped_photo(tmp_path / "whole.jpg", (90, 90, 200)).read_bytes()
    (tmp_path / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "letter.jpg").write_text("Dear photograph")
    drop(window, "#photo", tmp_path / "broken.jpg")
    wait_for_sentence(window, "broken.jpg is damaged or truncated")
    drop(window, "#photo", tmp_path / "letter.jpg")
    wait_for_sentence(window, "letter.jpg is not a picture")
    assert window.evaluate("document.querySelector('#picture img').src") == shown
    click(window, *NEAR)


def test_two_visitors_see_what_is_theirs(
    address: str, browser: Any, window: Any, tmp_path: Path
) -> None:
    other = browser.new_context().new_page()
    visitors = {"red": (window, (220, 30, 30)), "green": (other, (30, 220, 30))}
    map_file = half_and_half(tmp_path / "map.npy")
    for name, (page, colour) in visitors.items():
        open_page(page, address)
        drop(page, "#photo", striped_photo(tmp_path / f"{name}.png", colour))
    for page, _ in visitors.values():
        wait_for_sentence(page, "--depth-model")
        drop(page, "#disparity", map_file)
    for page, _ in visitors.values():
        wait_for_picture(page, 160)
    for x in (120, 40):
        for page, _ in visitors.values():
            click(page, x, 60)
        for name, (page, _) in visitors.items():
            red, green, _ = picture_shown(page).mean(axis=(0, 1))
            assert (red > 2 * green) == (name == "red")
    other.context.close()

"""Photographs and maps as people have them, in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from .running import click, detail, drop, wait_for_picture, wait_for_sentence

# A server and a browser take longer to start than most tests take.
pytestmark = pytest.mark.slow

ORIENTATION, TURN_RIGHT = 0x0112, 6


def near_above_far(file: Path, unit: float) -> Path:
    """A map for an upright photograph of 160 x 240 pixels: near above, far below."""
    disparity = np.full((240, 160), 0.9, np.float32)
    disparity[120:] = 0.1
    np.save(file, disparity * unit)
    return file


def turned_photo(file: Path) -> Path:
    """Stripes, 160 x 240 pixels and red above when upright, that are stored lying on their side."""
    samples = np.zeros((240, 160, 3), np.uint8)
    samples[:, ::4, 2] = samples[:, 1::4, 2] = 200
    samples[:120, :, 0] = 255 - samples[:120, :, 2]
    exif = Image.Exif()
    exif[ORIENTATION] = TURN_RIGHT
    Image.fromarray(np.rot90(samples)).save(file, exif=exif, quality=95)
    return file


def test_a_turned_photograph_is_shown_clicked_and_saved_upright(
    address: str, window: Any, tmp_path: Path
) -> None:
    window.goto(address)
    wait_for_picture(window, 512)
    drop(window, "#photo", turned_photo(tmp_path / "turned.jpg"))
    wait_for_sentence(window, "--depth-model")  # there is none, and no network to fetch one by
    drop(window, "#disparity", near_above_far(tmp_path / "map.npy", 1))
    wait_for_picture(window, 160)
    below, above = click(window, 80, 200), click(window, 80, 40)
    assert detail(above, 80, 40) > 1.5 * detail(below, 80, 40)
    assert detail(below, 80, 200) > 1.5 * detail(above, 80, 200)
    window.click("#full")
    wait_for_sentence(window, "ready to be downloaded")
    with window.expect_download() as download:
        window.click("#download")
    with Image.open(download.value.path()) as picture:
        assert picture.size == (160, 240) and picture.getexif().get(ORIENTATION, 1) == 1
        red = np.asarray(picture)[..., 0]
        assert red[:110].mean() > 4 * red[130:].mean()


def test_a_map_is_read_anew_in_the_unit_that_is_chosen_for_it(
    address: str, window: Any, tmp_path: Path
) -> None:
    window.goto(address)
    wait_for_picture(window, 512)
    drop(window, "#photo", turned_photo(tmp_path / "turned.jpg"))
    wait_for_sentence(window, "--depth-model")
    drop(window, "#disparity", near_above_far(tmp_path / "map.npy", 4))
    wait_for_sentence(window, "values from 0.4 to 3.6; wanted [0, 1]")
    window.locator("#unit label", has_text="1/metres").click()
    wait_for_picture(window, 160)
    click(window, 80, 200)
    wait_for_sentence(window, "In focus: 2.5 m.")

"""Of many things asked for in quick succession, the newest is shown in the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
    wait_for_sentence(window, "TINY, ")


def test_the_last_of_quick_clicks_is_rendered_by_the_chosen_model(
    address: str, window: Any
) -> None:
    open_page(window, address)
    click(window, *NEAR)
    window.wait_for_timeout(1500)  # TINY is at work on it
    for place in (FAR, NEAR, FAR):
        click(window, *place)
    wait_for_sentence(window, "TINY, ")
    picture, photo = picture_shown(window), picture_shown(window, "#compared img")
    assert detail(picture, *FAR) > 0.9 * detail(photo, *FAR)
    assert detail(picture, *NEAR) < 0.3 * detail(photo, *NEAR)


def test_a_mistake_is_still_told_when_the_chosen_model_is_done(
    address: str, window: Any, tmp_path: Path
) -> None:
    open_page(window, address)
    click(window, *NEAR)
    np.save(tmp_path / "other.npy", np.zeros((10, 20), np.float32))
    drop(window, "#disparity", tmp_path / "other.npy")
    wait_for_sentence(window, "The disparity map is 20 x 10 pixels")
    assert "The disparity map is 20 x 10 pixels" in wait_for_sentence(window, "TINY, ")


def test_the_opening_follows_the_mouse_and_the_keys(address: str, window: Any) -> None:
    open_page(window, address)
    slider = window.locator("#f_number input[type=range]")

    def strength_after(move: Any) -> float:
        before = window.input_value("#strength textarea")
        move()
        number = window.input_value("#f_number input[type=number]")
        window.wait_for_function(
            "before => document.querySelector('#strength textarea').value !== before", arg=before
        )
        wait_for_sentence(window, "TINY, ")  # nothing is on its way any more
        strength = window.input_value("#strength textarea").split("K = ")[1].split(" px")[0]
        return float(strength) * float(number)

    def drag() -> None:
        box = slider.bounding_box()
        middle = box["y"] + box["height"] / 2
        window.mouse.move(box["x"] + 0.6 * box["width"], middle)
        window.mouse.down()
        window.mouse.move(box["x"] + 0.1 * box["width"], middle, steps=6)
        window.mouse.up()

    def keys() -> None:
        slider.focus()
        for _ in range(5):
            slider.press("ArrowRight")

    # K is the opening times what the scene fixes; it is shown with three digits.
    assert strength_after(drag) == pytest.approx(strength_after(keys), rel=0.02)

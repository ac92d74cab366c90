"""The pictures of the page of optics are what its script draws, and show true optics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bokehdiff.optics import circle_of_confusion, strength_from_camera
from tests.docs.pages import PAGES, REPOSITORY
from tests.docs.test_build import load

pytest.importorskip("matplotlib", reason="needs pip install 'bokehdiff[data]'")

SCRIPT = "docs/plots/optics_plots.py"
# Levels of 255, of pictures drawn with another version of matplotlib's fonts.
LARGEST_MEAN_DIFFERENCE = 3.0


def test_the_drawing_of_the_lens_is_to_scale():
    plots = load(SCRIPT)
    # A focal length of 1 m, and a sensor with a pixel per mm.
    f_number = 1 / (2 * plots.LENS_RADIUS)
    K = strength_from_camera(f_number, 1000.0, plots.FOCUS, 36, 36)
    for distance in (plots.NEARER, plots.FOCUS, plots.FARTHER):
        expected_mm = circle_of_confusion(1 / distance, 1 / plots.FOCUS, K)
        assert 1000 * plots.disc_on_sensor(distance) == pytest.approx(expected_mm, abs=1e-9)


def test_every_picture_is_shown_and_every_shown_picture_is_there():
    plots = load(SCRIPT)
    text = PAGES["docs/optics.md"].read_text("utf-8")
    assert set(plots.PLOTS) == {path.name for path in plots.PICTURES.iterdir()}
    for name in plots.PLOTS:
        assert f"](pictures/{name})" in text, name


def test_neglected_occlusion_gives_a_halo_and_the_renderer_does_not():
    plots = load(SCRIPT)
    photo, disparity = plots.post_before_tiles(90)
    wall_only = disparity[0, 0] < 0.5
    wrong = plots.blurred_each_by_itself(photo, disparity, 0.9, 16.0)
    right = plots.render_bokeh(photo, disparity, 0.9, 16.0)
    # Of the post's colour, red is where the wall has blue.
    redness = [float((one[0, 0] - one[0, 2])[wall_only].max()) for one in (photo, wrong, right)]
    assert redness[1] > 0.1 > redness[2]


def test_pictures_are_those_of_the_script(tmp_path: Path):
    plots = load(SCRIPT)
    plots.draw(tmp_path)
    for name in plots.PLOTS:
        if name.endswith(".png"):
            drawn, kept = (
                np.asarray(Image.open(folder / name).convert("RGB")).astype(float)
                for folder in (tmp_path, REPOSITORY / "docs" / "pictures")
            )
            assert drawn.shape == kept.shape
            assert np.abs(drawn - kept).mean() < LARGEST_MEAN_DIFFERENCE, name
        else:
            assert (tmp_path / name).read_text("utf-8").lstrip().startswith("<?xml")


@pytest.mark.slow
def test_the_photograph_at_the_head_of_the_readme_is_that_of_its_script():
    picture = load("docs/plots/refocused_photo.py")
    drawn = np.asarray(picture.draw()).astype(float)
    kept = np.asarray(Image.open(picture.FILE)).astype(float)
    assert drawn.shape == kept.shape
    assert np.abs(drawn - kept).mean() < LARGEST_MEAN_DIFFERENCE

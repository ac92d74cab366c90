"""Where the focus goes by itself: on drawn scenes, on photographs, and back to a known plane."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bokehdiff.autofocus import central_subject, sharpest_disparity
from bokehdiff.focus import find_focus
from bokehdiff.images import fill_holes, read_disparity, read_image
from bokehdiff.optics import normalise_disparity
from bokehdiff.rendering import render_bokeh

HEIGHT, WIDTH = 240, 320


def background(farthest: float = 0.0, nearest: float = 0.15) -> torch.Tensor:
    return torch.linspace(farthest, nearest, HEIGHT)[:, None].repeat(1, WIDTH)


def draw(disparity: torch.Tensor, centre: tuple[int, int], radius: int, value: float) -> None:
    """A round thing at (x, y)."""
    rows, columns = torch.arange(HEIGHT)[:, None], torch.arange(WIDTH)
    inside = (columns - centre[0]) ** 2 + (rows - centre[1]) ** 2 <= radius**2
    disparity[inside] = value


def auto(disparity: torch.Tensor) -> float:
    return float(find_focus(disparity[None, None], "auto")[0])


# --- "auto" on drawn scenes -----------------------------------------------------------------------


def test_a_person_before_a_background():
    scene = background()
    draw(scene, (140, 130), 50, 0.6)
    assert auto(scene) == pytest.approx(0.6)
    assert central_subject(scene).unique().tolist() == pytest.approx([0.6])


def test_a_floor_that_comes_near_at_the_bottom_is_not_the_subject():
    scene = background()
    scene[HEIGHT // 2 :] = torch.linspace(0.15, 1, HEIGHT // 2)[:, None]
    draw(scene, (170, 120), 45, 0.5)
    assert auto(scene) == pytest.approx(0.5, abs=0.03)


def test_a_near_twig_is_not_the_subject():
    scene = background()
    draw(scene, (160, 130), 50, 0.5)
    scene[:, 150:154] = 1.0
    assert auto(scene) == pytest.approx(0.5)


def test_the_nearer_of_two_alike_and_the_one_in_the_middle():
    near_and_far = background()
    draw(near_and_far, (110, 120), 40, 0.9)
    draw(near_and_far, (210, 120), 40, 0.5)
    assert auto(near_and_far) == pytest.approx(0.9)
    middle_and_corner = background()
    draw(middle_and_corner, (160, 120), 40, 0.6)
    draw(middle_and_corner, (20, 20), 40, 0.8)
    assert auto(middle_and_corner) == pytest.approx(0.6)


def test_things_at_one_depth_that_do_not_touch_are_two():
    scene = background()
    for x in (10, 310):  # together larger than the one in the middle
        draw(scene, (x, 120), 60, 0.9)
    draw(scene, (160, 120), 40, 0.6)
    assert auto(scene) == pytest.approx(0.6)


def test_a_flat_scene_is_one_region():
    assert auto(torch.full((HEIGHT, WIDTH), 0.3)) == pytest.approx(0.3)
    assert auto(torch.tensor([[0.25]])) == 0.25


def test_the_unit_of_the_map_the_side_and_the_size_do_not_matter():
    scene = background()
    draw(scene, (130, 130), 50, 0.6)
    scene += 0.01 * torch.sin(torch.arange(WIDTH) / 9)
    df = auto(scene)
    assert auto(7 * scene + 3) == pytest.approx(7 * df + 3, rel=1e-5)
    assert auto(scene.flip(-1)) == pytest.approx(df, abs=0.01)
    assert auto(scene.T.contiguous()) == pytest.approx(df, abs=0.01)
    twice = scene.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert auto(twice) == pytest.approx(df, abs=0.01)
    assert auto(scene) == df


def test_unknown_pixels_belong_to_nothing():
    scene = background()
    draw(scene, (160, 120), 50, 0.6)
    scene[:, 155:170] = float("nan")
    assert auto(scene) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="no known pixel to focus on"):
        auto(torch.full((4, 5), float("nan")))


def test_a_whole_subject_that_auto_finds():
    scene = background()
    draw(scene, (160, 120), 60, 1.0)
    inside = scene == 1
    scene[inside] = (0.65 + 0.1 * torch.linspace(0, 1, WIDTH).repeat(HEIGHT, 1))[inside]
    low, high = find_focus(scene[None, None], "auto", whole=True)
    assert low == pytest.approx(float(scene[inside].min()), abs=0.01)
    assert high == pytest.approx(float(scene[inside].max()), abs=0.01)


# --- "auto" on photographs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("map_file", "subject"),
    [
        ("photos/mpib_new11_disp.png", (1000, 150, 1250, 800)),  # the man in front
        (
            "photos/bokehme_21_disp.png",
            (600, 650, 800, 850),
        ),  # the woman, not the branch before her
        ("stereo/motorcycle_disp16.png", (290, 190, 440, 330)),  # the engine, not the floor
        ("stereo/aloe_disp16.png", (260, 260, 320, 350)),  # the pot of the plant
        ("video/a2b_couple/000_disp.png", (250, 250, 380, 400)),  # a person, not the table
    ],
)
def test_auto_finds_who_is_photographed(
    shared_root: Path, map_file: str, subject: tuple[int, int, int, int]
):
    measured = read_disparity(shared_root / "data" / map_file, invalid=0)
    disparity, _, _ = normalise_disparity(fill_holes(measured))
    df, _ = find_focus(disparity, "auto")
    low, high = find_focus(disparity, subject, whole=True)
    assert low - 0.03 <= df <= high + 0.03


# --- "sharpest" -----------------------------------------------------------------------------------


def textured_scene() -> tuple[torch.Tensor, torch.Tensor]:
    """Fine texture on a slope, a block before it, and a part without texture; the map in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    photo = 0.5 + 0.15 * torch.randn(1, 3, 120, 160, generator=generator)
    photo[..., 100:] = photo[..., 100:] * 0.4 + 0.2  # half the contrast
    photo[..., :20, :] = 0.6
    disparity = torch.linspace(0, 0.8, 160).expand(1, 1, 120, 160).clone()
    disparity[..., 50:100, 60:90] = 1.0
    return photo.clamp(0, 1), disparity


@pytest.mark.parametrize("df", [0.15, 0.5, 0.7, 1.0])
def test_the_plane_a_photo_was_rendered_at_is_found(df: float):
    """Within a radius of half a pixel, which still is in focus."""
    photo, disparity = textured_scene()
    K = 20.0
    shallow = render_bokeh(photo, disparity, df, K)
    found, same = find_focus(disparity, "sharpest", image=shallow)
    assert found == same and K * abs(float(found) - df) < 0.5


@pytest.mark.parametrize(("scene", "share"), [("motorcycle", 0.2), ("art", 0.2), ("art", 0.8)])
def test_the_plane_is_found_in_photographs(shared_root: Path, scene: str, share: float):
    """Within a pixel of radius, grain included; the texture is where it happens to be."""
    folder = shared_root / "data" / "stereo"
    photo = read_image(folder / f"{scene}.png")
    measured = read_disparity(folder / f"{scene}_disp16.png", invalid=0)
    disparity, _, _ = normalise_disparity(fill_holes(measured))
    # A plane in which something lies; at others nothing can be sharp.
    K, df = 15.0, float(disparity.flatten().quantile(share))
    shallow = render_bokeh(photo, disparity, df, K, method="scatter")
    grain = 0.01 * torch.randn(shallow.shape, generator=torch.Generator().manual_seed(0))
    found, _ = find_focus(disparity, "sharpest", image=(shallow + grain).clamp(0, 1))
    assert K * abs(float(found) - df) < 1


def test_each_photo_of_a_batch_has_its_own_sharp_plane():
    photo, disparity = textured_scene()
    shallow = render_bokeh(photo.repeat(2, 1, 1, 1), disparity, torch.tensor([0.2, 0.7]), 20.0)
    found, _ = find_focus(disparity.expand(2, -1, -1, -1), "sharpest", image=shallow)
    assert found.tolist() == pytest.approx([0.2, 0.7], abs=0.025)


def test_contrast_is_not_sharpness():
    """A soft half of great contrast beside a sharp half of little."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 3, 80, 160, generator=generator)
    soft = torch.nn.functional.avg_pool2d(noise, 7, 1, 3)
    photo = (0.5 + torch.cat([2 * soft[..., :80], 0.1 * noise[..., 80:]], dim=-1)).clamp(0, 1)
    disparity = torch.cat([torch.full((80, 80), 0.3), torch.full((80, 80), 0.8)], dim=-1)
    assert sharpest_disparity(disparity, photo[0]) == pytest.approx(0.8)


def test_unknown_pixels_are_not_answered():
    photo, disparity = textured_scene()
    shallow = render_bokeh(photo, disparity, 0.5, 20.0)
    disparity[..., ::3, :] = float("nan")
    assert float(find_focus(disparity, "sharpest", image=shallow)[0]) == pytest.approx(
        0.5, abs=0.03
    )


def test_a_photo_without_texture_has_no_sharp_plane():
    smooth = torch.linspace(0, 1, 160).expand(1, 3, 120, 160)
    disparity = torch.rand(1, 1, 120, 160)
    for photo in (smooth, torch.full((1, 3, 120, 160), 0.5)):
        with pytest.raises(ValueError, match="next to no texture.*a pixel, a box, a mask or df"):
            find_focus(disparity, "sharpest", image=photo)

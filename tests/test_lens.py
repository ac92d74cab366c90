"""Focus and blur from what a person says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bokehdiff import Camera
from bokehdiff.lens import LensSetting, check_lens_arguments, choose_lens
from bokehdiff.optics import circle_of_confusion


def two_things() -> torch.Tensor:
    """(1, 1, 20, 30): a near slope from 0.6 to 0.8 on the left, before a far wall at 0.2."""
    disparity = torch.full((1, 1, 20, 30), 0.2)
    disparity[..., 4:16, 2:12] = torch.linspace(0.6, 0.8, 12)[:, None]
    return disparity


def test_a_plane_is_the_one_formula() -> None:
    disparity = two_things()
    lens = choose_lens(disparity, df=0.3, K=12.0)
    expected = circle_of_confusion(disparity, 0.3, 12.0)
    torch.testing.assert_close(lens.signed_defocus(disparity).abs(), expected, rtol=0, atol=0)
    assert lens.count == 1


def test_strength_is_twenty_where_nothing_is_said() -> None:
    assert choose_lens(two_things(), df=0.3).K.tolist() == [20.0]


def test_a_range_is_sharp_and_the_rest_keeps_its_distance_to_the_nearer_end() -> None:
    disparity = torch.tensor([0.0, 0.3, 0.4, 0.5, 0.6, 0.9]).reshape(1, 1, 1, 6)
    lens = choose_lens(disparity, focus_range=(0.4, 0.6), K=10.0)
    expected = torch.tensor([-4.0, -1.0, 0.0, 0.0, 0.0, 3.0])
    torch.testing.assert_close(lens.signed_defocus(disparity).flatten(), expected)


def test_a_point_focuses_its_plane_and_a_whole_subject_all_of_it() -> None:
    disparity = two_things()
    wall = choose_lens(disparity, focus=(25, 3))
    assert wall.df.item() == wall.df_nearer.item() == pytest.approx(0.2)
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[4:16, 2:12] = True
    whole = choose_lens(disparity, focus=mask, whole_subject=True, K=50.0)
    sharp = whole.signed_defocus(disparity)[0, 0][mask].abs() < 0.5
    # Percentiles leave out the outermost rows of the slope.
    assert sharp.float().mean() > 0.85
    assert float(whole.signed_defocus(disparity).min()) < -15


def test_one_photo_with_many_settings_gives_many_pictures() -> None:
    disparity = two_things()
    lens = choose_lens(disparity, df=[0.2, 0.5, 0.7], K=10.0)
    assert lens.count == 3
    assert lens.signed_defocus(disparity).shape == (3, 1, 20, 30)
    points = choose_lens(disparity, focus=[(25, 3), (6, 10)], K=[5.0, 9.0])
    assert points.df[0] == pytest.approx(0.2) and points.df[1] == pytest.approx(0.7, abs=0.02)
    assert points.K.tolist() == [5.0, 9.0]
    parts = [lens.part(number, number + 1).df.item() for number in range(3)]
    assert parts == pytest.approx([0.2, 0.5, 0.7])


def test_each_photo_of_a_batch_has_its_own_setting() -> None:
    disparity = torch.cat([two_things(), two_things().flip(-1)])
    lens = choose_lens(disparity, focus=[(6, 10), (6, 10)], K=10.0)
    assert lens.df[0] == pytest.approx(0.7, abs=0.02) and lens.df[1] == pytest.approx(0.2)
    with pytest.raises(ValueError, match="fits neither one image nor this batch of 2"):
        choose_lens(disparity, df=[0.1, 0.2, 0.3])


def test_a_camera_gives_the_strength() -> None:
    camera = Camera(f_number=1.4, focal_length_mm=85)
    metric = choose_lens(two_things(), df=0.5, camera=camera, metric=True)
    # f^2 s / (2 N (s - f)) at s = 2 m, on 36 mm for 30 pixels.
    expected = 0.085**2 * 2 / (2 * 1.4 * (2 - 0.085)) * 1000 * 30 / 36
    assert metric.K.item() == pytest.approx(expected, rel=1e-6)
    # 0.2 of the map at 5 m and 0 at infinity makes the map 1/metres.
    relative = choose_lens(two_things(), df=0.5, camera=camera, focus_distance_m=2.0)
    assert relative.K.item() == pytest.approx(expected, rel=1e-6)
    nearer = choose_lens(
        two_things(), df=0.5, camera=camera, focus_distance_m=2.0, farthest_distance_m=4.0
    )
    assert nearer.K.item() == pytest.approx(expected / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "none was given"),
        (dict(df=0.5, focus="auto"), "df and focus were given"),
        (dict(df=0.5, whole_subject=True), "whole_subject goes with focus"),
        (dict(df=0.5, K=3, camera=Camera(2, 50)), "K and a camera were both given"),
        (dict(df=0.5, camera="Canon"), "bokehdiff.Camera"),
        (dict(df=0.5, focus_distance_m=2.0), "goes with a camera"),
        (dict(focus_range=(0.6, 0.4)), "from the smaller to the larger"),
        (dict(focus_range=0.5), "two disparities"),
        (dict(focus_range="0.2,0.4"), "two disparities"),
        (dict(df=1.5), "df is 1.5"),
        (dict(df=0.5, K=-1), "K is -1"),
        (dict(df="near"), "df is 'near'"),
        (dict(df=math.nan), "df is nan"),
        (dict(df=np.zeros((2, 2))), "df has shape"),
    ],
)
def test_mistakes(arguments: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        choose_lens(two_things(), **arguments)


def test_arguments_can_be_checked_without_a_picture() -> None:
    check_lens_arguments(focus=(3, 4))
    with pytest.raises(ValueError, match="none was given"):
        check_lens_arguments(K=3.0)


def test_a_setting_moves_between_devices_as_a_whole() -> None:
    lens = LensSetting(torch.zeros(2), torch.zeros(2), torch.ones(2)).to("meta")
    assert {part.device.type for part in (lens.df, lens.df_nearer, lens.K)} == {"meta"}

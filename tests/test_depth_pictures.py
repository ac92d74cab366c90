"""Depth as pictures of 16 bits in a stated unit, and in colours."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from bokehdiff.depth_pictures import (
    UNIT_KEY,
    colour_picture,
    confidence_picture,
    depth_picture,
    disparity_picture,
    encode_picture_with_unit,
)
from bokehdiff.srgb import srgb_to_linear

LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


def levels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(np.int64)


@pytest.mark.parametrize(
    "farthest, unit", [(0.3, 0.001), (65.0, 0.001), (66.0, 0.01), (700.0, 0.1), (7000.0, 1.0)]
)
def test_depth_is_rounded_to_levels_of_the_stated_unit(farthest, unit):
    depth = torch.rand(40, 50, dtype=torch.float64) * farthest * 0.98 + 0.02 * farthest
    depth[:20] = farthest  # more than a hundredth of the pixels
    picture = depth_picture(depth)
    assert picture.mode == "I;16" and picture.size == (50, 40)
    assert picture.info[UNIT_KEY] == f"{unit:g} m"
    np.testing.assert_allclose(levels(picture) * unit, depth.numpy(), atol=0.5001 * unit, rtol=0)


def test_a_little_sky_does_not_cost_the_rest_its_precision():
    depth = torch.full((10, 100), 3.0)
    depth[0, :10] = torch.tensor([math.inf, 100.0] * 5)  # a hundredth
    picture = depth_picture(depth)
    assert picture.info[UNIT_KEY] == "0.001 m"
    assert set(levels(picture)[0, :10]) == {65535} and levels(picture)[1, 1] == 3000
    depth[0, 10] = 100.0  # and one more
    assert depth_picture(depth).info[UNIT_KEY] == "0.01 m"


def test_what_is_unknown_is_0():
    depth = torch.full((4, 5), 2.0)
    depth[1, 2] = math.nan
    picture = levels(depth_picture(depth))
    assert picture[1, 2] == 0 and (picture == 2000).sum() == 19
    assert (levels(depth_picture(torch.full((2, 2), math.nan))) == 0).all()
    assert (levels(depth_picture(torch.full((2, 2), math.inf))) == 65535).all()


@pytest.mark.parametrize("nearest, unit", [(0.8, 0.0001), (7.0, 0.001), (100.0, 0.01)])
def test_disparity(nearest, unit):
    disparity = np.linspace(0, nearest, 200).reshape(10, 20)
    picture = disparity_picture(disparity)
    assert picture.info[UNIT_KEY] == f"{unit:g} 1/m"
    np.testing.assert_allclose(levels(picture) * unit, disparity, atol=0.5001 * unit, rtol=0)


def test_confidence():
    picture = confidence_picture(torch.tensor([[0.0, 0.5, 1.0]]))
    assert levels(picture).tolist() == [[0, 32768, 65535]]  # half of 65535, to even


def test_a_file_says_its_unit_and_loses_nothing(tmp_path):
    depth = torch.rand(30, 40) * 20
    picture = depth_picture(depth)
    data = encode_picture_with_unit(picture)
    assert b"tEXtunit\x000.001 m" in data
    with Image.open(io.BytesIO(data)) as read:
        assert read.mode == "I;16" and read.text == {UNIT_KEY: "0.001 m"}
        assert np.array_equal(levels(read), levels(picture))


def test_near_is_brighter_all_along():
    """Also in gray: the colours of a steady change of disparity grow steadily in luminance."""
    picture = np.asarray(colour_picture(torch.linspace(0, 3, 512).expand(4, -1))) / 255
    luminance = srgb_to_linear(torch.from_numpy(picture[0])).numpy() @ LUMINANCE
    ends = int(0.02 * 512) + 1  # where the percentiles cut off
    assert (np.diff(luminance) > -0.002).all()  # 8 bits
    assert (np.diff(luminance[ends:-ends:8]) > 0).all()
    assert luminance[0] < 0.02 and luminance[-1] > 0.9


def test_colours_do_not_depend_on_the_unit_and_few_odd_pixels():
    disparity = torch.rand(60, 80)
    picture = np.asarray(colour_picture(disparity)).astype(int)
    scaled = np.asarray(colour_picture(disparity * 7 + 3)).astype(int)
    assert np.abs(picture - scaled).max() <= 1
    odd = disparity.clone()
    odd[0, :5] = 1e6
    assert np.abs(np.asarray(colour_picture(odd)).astype(int)[1:] - picture[1:]).max() <= 8


def test_colours_of_what_is_flat_or_unknown():
    flat = np.asarray(colour_picture(torch.full((3, 4), 0.7)))
    assert flat.shape == (3, 4, 3) and len(np.unique(flat.reshape(-1, 3), axis=0)) == 1
    holes = torch.tensor([[0.1, 0.5, math.nan]])
    assert np.asarray(colour_picture(holes))[0, 2].tolist() == [128, 128, 128]
    assert (np.asarray(colour_picture(torch.full((2, 2), math.nan))) == 128).all()


@pytest.mark.parametrize("draw", [depth_picture, disparity_picture, colour_picture])
def test_shapes_that_are_no_map(draw):
    for shape in ((3,), (1, 4, 5), (0, 5)):
        with pytest.raises(ValueError, match="wanted \\(H, W\\)"):
            draw(torch.ones(shape))


def test_negative_depth_is_refused():
    with pytest.raises(ValueError, match="smallest value is -1; wanted none below 0"):
        depth_picture(torch.tensor([[1.0, -1.0]]))

"""The checkpoint that ships inside the package keeps the promises of the pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bokehdiff
from tests.tiny_models import photo_and_disparity

LEVEL = 1 / 255


@pytest.fixture(scope="module")
def pipe() -> bokehdiff.BokehDiffPipeline:
    return bokehdiff.BokehDiffPipeline.from_pretrained(bokehdiff.TINY)


@pytest.mark.parametrize("size", [(64, 64), (61, 93)])
def test_no_blur_returns_the_photo(pipe: bokehdiff.BokehDiffPipeline, size) -> None:
    photo, disparity = photo_and_disparity(*size)
    rendered = pipe(photo, disparity, 0.3, 0.0, output_type="np").images[0]
    assert np.abs(rendered - photo / 255).max() <= LEVEL


def test_a_scene_in_focus_returns_the_photo(pipe: bokehdiff.BokehDiffPipeline) -> None:
    photo, _ = photo_and_disparity()
    disparity = np.full((64, 64), 0.6, np.float32)
    rendered = pipe(photo, disparity, 0.6, 30.0, output_type="np").images[0]
    assert np.abs(rendered - photo / 255).max() <= LEVEL


def test_what_is_in_focus_stays_and_the_rest_blurs(pipe: bokehdiff.BokehDiffPipeline) -> None:
    photo, disparity = photo_and_disparity(96, 96)
    scene = pipe.prepare(photo, disparity)
    near, far = (pipe.render(scene, df, 12.0, output_type="np").images[0] for df in (0.8, 0.2))
    original = photo / 255
    inside, outside = (slice(32, 40), slice(32, 40)), (slice(60, 90), slice(60, 90))
    error = np.sqrt(((near - original)[inside] ** 2).mean())
    assert -20 * np.log10(error + 1e-9) >= 44
    for picture, blurred in ((near, outside), (far, inside)):
        assert picture[blurred].std() < 0.5 * original[blurred].std()


def test_more_strength_gives_more_blur(pipe: bokehdiff.BokehDiffPipeline) -> None:
    scene = pipe.prepare(*photo_and_disparity(96, 96))
    spread = [
        pipe.render(scene, 0.8, strength, output_type="np").images[0][60:90, 60:90].std()
        for strength in (0.0, 4.0, 12.0, 24.0)
    ]
    assert all(more < less for less, more in zip(spread, spread[1:], strict=False))


def test_refocusing_equals_a_fresh_call(pipe: bokehdiff.BokehDiffPipeline) -> None:
    photo, disparity = photo_and_disparity()
    scene = pipe.prepare(photo, disparity)
    pipe.render(scene, 0.2, 8.0)
    again = pipe.render(scene, 0.8, 8.0).images[0]
    assert again.tobytes() == pipe(photo, disparity, 0.8, 8.0).images[0].tobytes()


def test_same_bytes_twice(pipe: bokehdiff.BokehDiffPipeline) -> None:
    photo, disparity = photo_and_disparity()
    first, second = (pipe(photo, disparity, 0.8, 15.0).images[0] for _ in range(2))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("size", [(1, 1), (17, 50), (33, 47), (65, 64)])
def test_output_has_the_size_of_the_input(pipe: bokehdiff.BokehDiffPipeline, size) -> None:
    photo, disparity = photo_and_disparity(*size)
    (picture,) = pipe(photo, disparity, 0.7, 10.0).images
    assert picture.size == size[::-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(
    pipe: bokehdiff.BokehDiffPipeline, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = bokehdiff.BokehDiffPipeline.from_pretrained(bokehdiff.TINY, dtype=dtype)
    # The light itself is summed in float32; eight bits of mantissa in its way would band it.
    assert half.unet.light_transport.attn.to_v.weight.dtype == torch.float32
    assert half.unet.refiner.network.conv_in.weight.dtype == torch.float32
    # What the refiner chooses may turn with the last bit of a rounded map; all else is continuous.
    for one in (pipe, half):
        monkeypatch.setattr(one.unet.refiner, "forward", lambda photo, maps, side=None: maps)
    photo, disparity = photo_and_disparity(64, 80)
    arguments = {"df": 0.2, "K": 12.0, "output_type": "pt"}
    exact = pipe(photo, disparity, **arguments).images
    rounded = half(photo, disparity, **arguments).images
    # bfloat16 latents in [-1, 1] are rounded by up to 2^-9, a quarter of a level of the image.
    assert (rounded - exact).abs().max() < 2 * LEVEL
    assert (rounded - exact).abs().mean() < LEVEL / 4

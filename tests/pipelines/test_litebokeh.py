"""LiteBokehPipeline around tiny networks of the real classes."""

from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import UNet2DModel

from bokehdiff.pipelines.litebokeh import LENS_ARGUMENTS, LiteBokehPipeline, read_litebokeh
from tests.tiny_litebokeh import tiny_glass, tiny_unet
from tests.tiny_models import photo_and_disparity

HEIGHT, WIDTH = 48, 64
PHOTO, _ = photo_and_disparity(HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def pipe() -> LiteBokehPipeline:
    return LiteBokehPipeline(tiny_unet())


def random_photo(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(3))


# -- What is rendered ----------------------------------------------------------------------------


def test_the_picture_is_that_of_the_network(pipe):
    image = torch.from_numpy(PHOTO).permute(2, 0, 1)[None] / 255
    picture = pipe(PHOTO, output_type="pt").images
    torch.testing.assert_close(picture, pipe.model(image).bokeh)
    plain = pipe(PHOTO, enhance=False, output_type="pt").images
    torch.testing.assert_close(plain, pipe.model(image).rendered)


@pytest.mark.parametrize("size", [(1, 1), (7, 50), (48, 64), (45, 83)])
def test_any_size(pipe, size):
    (picture,) = pipe(photo_and_disparity(*size)[0]).images
    assert isinstance(picture, PIL.Image.Image) and picture.size == size[::-1]


def test_output_types_agree(pipe, tmp_path):
    tensors = pipe(PHOTO, output_type="pt").images
    arrays = pipe(PHOTO, output_type="np").images
    (picture,) = pipe(PIL.Image.fromarray(PHOTO)).images
    assert np.array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(picture), np.rint(arrays[0] * 255).astype(np.uint8))
    assert pipe(PHOTO, return_dict=False)[0][0].tobytes() == picture.tobytes()
    PIL.Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    assert pipe(tmp_path / "photo.png").images[0].tobytes() == picture.tobytes()


@pytest.mark.parametrize("make", [tiny_unet, tiny_glass])
def test_a_photo_comes_out_of_a_batch_as_it_does_alone(make):
    pipe = LiteBokehPipeline(make())
    photos = torch.cat([random_photo(32, 40), random_photo(32, 40).flip(-1)])
    together = pipe(photos, output_type="pt").images
    alone = torch.cat([pipe(one, output_type="pt").images for one in photos.split(1)])
    assert torch.equal(together, alone)


# -- Tiles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile_size", [8, 64, 136])
@pytest.mark.parametrize("size", [(210, 333), (96, 250)])
def test_tiles_give_the_picture_of_the_whole(pipe, size, tile_size):
    photo = random_photo(*size)
    if tile_size == 8:
        photo = photo[..., :40, :72]  # many tiles
    whole = pipe(photo, output_type="pt").images
    tiled = pipe(photo, tile_size=tile_size, output_type="pt").images
    # Of values in [0, 1] that are sums in another order: no more than rounding.
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-6)


def test_tiles_without_their_overlap_would_show(pipe):
    photo = random_photo(128, 128)
    whole = pipe(photo, output_type="pt").images
    alone = pipe(photo[..., :64, :64], output_type="pt").images
    assert (alone - whole[..., :64, :64]).abs().max() > 1e-3


# -- Refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LENS_ARGUMENTS)
def test_a_lens_is_refused(pipe, name):
    with pytest.raises(ValueError, match=f"{name} was given.*cannot be chosen.*BokehFlowPipeline"):
        pipe(PHOTO, **{name: 1.0})


def test_what_else_is_refused(pipe):
    with pytest.raises(TypeError, match="'sharpness'"):
        pipe(PHOTO, sharpness=1)
    with pytest.raises(ValueError, match="output_type is 'latent'"):
        pipe(PHOTO, output_type="latent")
    for tile_size in (0, -8, 100):
        with pytest.raises(ValueError, match=f"tile_size is {tile_size}; wanted a multiple of 8"):
            pipe(PHOTO, tile_size=tile_size)
    with pytest.raises(ValueError, match="depends on the whole photo"):
        LiteBokehPipeline(tiny_glass())(PHOTO, tile_size=64)
    with pytest.raises(ValueError, match="model is a UNet2DModel; wanted a TinyUnet or a Glass"):
        LiteBokehPipeline(UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",),
                                      up_block_types=("UpBlock2D",)))  # fmt: skip


# -- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_unet, tiny_glass])
def test_saved_and_read_back(make, tmp_path):
    pipe = LiteBokehPipeline(make())
    pipe.save_pretrained(tmp_path / "pipeline")
    pipe.model.save_pretrained(tmp_path / "network")
    wanted = pipe(PHOTO, output_type="pt").images
    for folder in ("pipeline", "network"):
        again = LiteBokehPipeline.from_pretrained(tmp_path / folder)
        assert torch.equal(again(PHOTO, output_type="pt").images, wanted)
        assert not again.model.training


def test_half_precision(tmp_path):
    LiteBokehPipeline(tiny_unet()).save_pretrained(tmp_path)
    half = LiteBokehPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    picture = half(PHOTO, output_type="pt").images
    whole = LiteBokehPipeline.from_pretrained(tmp_path)(PHOTO, output_type="pt").images
    assert picture.dtype == torch.float32
    assert 0 < (picture - whole).abs().max() < 0.1


def test_refused_folders(tmp_path):
    with pytest.raises(ValueError, match="There is no folder.*COMPACT_TINY"):
        read_litebokeh(str(tmp_path / "nothing"))
    tiny_unet().save_pretrained(tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "UNet"}))
    with pytest.raises(ValueError, match="type 'UNet'; wanted 'TinyUnet' or 'GlassEncNet'"):
        read_litebokeh(str(tmp_path / "other"))

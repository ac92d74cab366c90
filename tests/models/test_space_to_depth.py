"""The lossless codec: exact, with the call surface of AutoencoderKL, saved and loaded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from bokehdiff.models import AutoencoderSpaceToDepth


@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
def test_round_trip_is_exact(block_size: int) -> None:
    codec = AutoencoderSpaceToDepth(block_size)
    image = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = codec.encode(image).latent_dist.mode()
    assert latents.shape == (2, 3 * block_size**2, 16 // block_size, 24 // block_size)
    assert torch.equal(codec.decode(latents).sample, image)
    assert torch.equal(codec(image).sample, image)


def test_channel_order_is_that_of_pixel_unshuffle() -> None:
    image = torch.arange(3 * 4 * 4, dtype=torch.float32).view(1, 3, 4, 4)
    latents = AutoencoderSpaceToDepth(2).encode(image).latent_dist.mode()
    assert torch.equal(latents, F.pixel_unshuffle(image, 2))
    colour, row, column = 2, 1, 0
    channel = latents[0, colour * 4 + row * 2 + column]
    assert torch.equal(channel, image[0, colour, row::2, column::2])


def test_sampling_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    posterior = AutoencoderSpaceToDepth(2).encode(torch.rand(1, 3, 4, 4)).latent_dist
    assert torch.equal(posterior.sample(generator), posterior.mode())
    assert torch.equal(generator.get_state(), state)


def test_tuples_and_positional_arguments_as_in_autoencoder_kl() -> None:
    codec = AutoencoderSpaceToDepth(2)
    image = torch.rand(1, 3, 4, 4)
    (posterior,) = codec.encode(image, False)
    (decoded,) = codec.decode(posterior.mode(), False)
    assert torch.equal(decoded, image)


@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
def test_scale_rule_of_diffusers_gives_the_block_size(block_size: int) -> None:
    config = AutoencoderSpaceToDepth(block_size).config
    assert 2 ** (len(config.block_out_channels) - 1) == config.block_size == block_size
    assert config.latent_channels == 3 * block_size**2
    assert config.scaling_factor == 1.0
    assert config.force_upcast is False


def test_has_every_config_value_that_pipelines_read_from_autoencoder_kl() -> None:
    ours, theirs = AutoencoderSpaceToDepth(2).config, AutoencoderKL().config
    for name in ("scaling_factor", "force_upcast", "latent_channels", "block_out_channels"):
        assert name in ours and name in theirs


def test_save_and_load(tmp_path) -> None:
    AutoencoderSpaceToDepth(4).save_pretrained(tmp_path)
    loaded = AutoencoderSpaceToDepth.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert loaded.config.block_size == 4
    assert loaded.dtype == torch.float16
    assert loaded.device == torch.device("cpu")


def test_gradients_pass_through_unchanged() -> None:
    image = torch.rand(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    codec = AutoencoderSpaceToDepth(2)
    assert torch.autograd.gradcheck(
        lambda x: codec.decode(codec.encode(x).latent_dist.mode()).sample, image
    )


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: AutoencoderSpaceToDepth(3), "power of two"),
        (lambda: AutoencoderSpaceToDepth(0), "power of two"),
        (lambda: AutoencoderSpaceToDepth(2, latent_channels=4), "have 12 values"),
        (lambda: AutoencoderSpaceToDepth(2, block_out_channels=[3]), "needs 2"),
        (lambda: AutoencoderSpaceToDepth(2).encode(torch.rand(1, 3, 5, 4)), "multiples of 2"),
        (lambda: AutoencoderSpaceToDepth(2).encode(torch.rand(1, 4, 4, 4)), "needs"),
        (lambda: AutoencoderSpaceToDepth(2).encode(torch.rand(3, 4, 4)), "needs"),
        (lambda: AutoencoderSpaceToDepth(2).decode(torch.rand(1, 4, 4, 4)), "12"),
    ],
)
def test_refuses(make, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()

"""The physics the tiny model starts at, before any training, and what its calibration promises."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from bokehdiff.attention import PisaConfig, PisaGeometry, install_pisa, remove_pisa
from bokehdiff.grids import enlarged, pooled
from bokehdiff.images import linear_to_srgb, srgb_to_linear
from bokehdiff.models import light_transport
from bokehdiff.models.light_transport import slab_edges
from bokehdiff.models.light_transport_unet import LightTransportUNet
from bokehdiff.models.surfaces import hidden_surfaces
from bokehdiff.models.token_circles import (
    calibrated_token_radius,
    pisa_kernel_second_moment,
    reach_in_tokens,
    slope_per_token,
)
from bokehdiff.optics import signed_defocus

ROUNDING = 5e-6
"""A few roundings of float32 at 1, which sums in another order leave."""

SLOPE = slope_per_token(PisaConfig.preset("paper"))


@pytest.fixture(scope="module")
def untrained() -> LightTransportUNet:
    torch.manual_seed(0)
    return LightTransportUNet(block_out_channels=(8, 8), layers_per_block=1).eval()


def render(unet, photo, disparity, df, K, timestep=499, window_pixels=None):
    """Photo (B, 3, H, W) in [0, 1] through the network and the closed-form step, no codec."""
    defocus = signed_defocus(disparity, df, K)
    sample = F.pixel_unshuffle(torch.cat([photo * 2 - 1, disparity, defocus], 1), 2)
    noise = unet(sample, timestep, window_pixels=window_pixels).sample
    alpha_bar = unet.alphas_cumprod[timestep]
    clean = (sample[:, :12] - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
    return F.pixel_shuffle(clean, 2) / 2 + 0.5


def textured(height=64, width=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 3, height, width, generator=generator)


def test_schedule_is_the_published_one(untrained):
    assert untrained.alphas_cumprod[499].item() == pytest.approx(0.27766943, abs=1e-6)


def test_slabs_are_symmetric_and_grow_by_the_ratio():
    edges = slab_edges(2.0, math.sqrt(2), 64.0)
    assert torch.equal(edges, -edges.flip(0))
    positive = edges[edges > 0]
    assert positive[0] == 2.0 and positive[-1] >= 64.0
    assert torch.allclose(positive[1:] / positive[:-1], torch.tensor(2.0**0.5).double())


@pytest.mark.parametrize("radius", [0.0, 1.5, 4.0, 5.9, 6.1, 13.0, 40.0, 64.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_circles_of_confusion_are_a_few_tokens_wide(untrained, radius, sign):
    transport = untrained.light_transport
    slab = int(torch.bucketize(torch.tensor(sign * radius), transport.edges))
    tokens = radius / transport.token_size(slab)
    assert tokens <= 2 * 2.82 * math.sqrt(2)
    if radius > 6:
        assert tokens >= 2.8


@pytest.mark.parametrize("token_size", [1, 2, 4, 8])
@pytest.mark.parametrize("radius", [1.5, 2.8, 3.3, 5.0, 7.7])  # tokens
def test_calibration_gives_the_spread_of_a_disc(token_size, radius):
    """Second moment of pooled light + PISA + enlargement = that of a disc, r^2/2."""
    pixels = torch.tensor([radius * token_size])
    tokens = calibrated_token_radius(pixels, token_size, SLOPE).double()
    moment = pisa_kernel_second_moment(tokens, SLOPE).item()
    # One lit pixel, pooled and enlarged again; its place in the token does not matter on average.
    size = 16 * token_size
    spread = []
    for place in range(size // 2, size // 2 + token_size):
        lit = torch.zeros(1, 1, 1, size)
        lit[..., place] = token_size
        lit = pooled(lit.expand(1, 1, token_size, size), token_size)
        row = enlarged(lit, token_size)[0, 0, 0].double()
        spread.append((row * (torch.arange(size) - place) ** 2).sum() / row.sum())
    pooling_and_enlargement = 2 * torch.stack(spread).mean().item() / token_size**2
    # The moment is a staircase where circles pass between tokens, so 1 % remains.
    assert moment + pooling_and_enlargement == pytest.approx(radius**2 / 2, rel=0.01, abs=0.01)


def test_no_defocus_returns_the_photo(untrained):
    photo = textured()
    disparity = textured(seed=1)[:, :1]
    assert (render(untrained, photo, disparity, 0.3, 0.0) - photo).abs().max() < 2e-4


def test_uniform_picture_stays_uniform(untrained):
    photo = torch.full((1, 3, 48, 64), 0.37)
    disparity = textured(48, 64, seed=2)[:, :1]
    # Whatever the defocus, there is nothing to mix but one colour.
    assert (render(untrained, photo, disparity, 0.5, 30.0) - 0.37).abs().max() < 1e-3


@pytest.mark.parametrize("radius", [3.0, 8.0, 12.0])
def test_a_point_of_light_becomes_a_disc_of_equal_energy(untrained, radius):
    """Energy is kept, and the spread is that of a disc, wherever in its token the point lies."""
    positions = torch.arange(48, 56)
    photo = torch.zeros(8, 3, 96, 96)
    photo[torch.arange(8), :, positions, positions] = 0.9
    disparity = torch.full((8, 1, 96, 96), 0.2)
    with torch.no_grad():
        disc = srgb_to_linear(render(untrained, photo, disparity, 0.2 + radius / 40, 40.0))[:, 0]
    energy = disc.sum((1, 2))
    # Dark pixels carry rounding errors, so energy is compared within a percent.
    assert torch.allclose(energy, srgb_to_linear(torch.tensor(0.9)), rtol=0.01)
    places = torch.arange(96.0)
    squared = (places[None, :] - positions[:, None]) ** 2
    spread = (disc.sum(2) * squared + disc.sum(1) * squared).sum(1) / energy
    assert spread.mean().item() == pytest.approx(radius**2 / 2, rel=0.02)


def test_blurred_foreground_covers_and_blurred_background_does_not_leak(untrained):
    photo = torch.zeros(1, 3, 64, 64)
    photo[:, 0, :, :32] = 1  # red at the left and near
    photo[:, 1, :, 32:] = 1  # green at the right and far
    disparity = torch.zeros(1, 1, 64, 64)
    disparity[..., :32] = 1
    far_focus = srgb_to_linear(render(untrained, photo, disparity, 0.0, 8.0))
    assert far_focus[0, 0, 32, 34] > 0.2  # blurred red veils the sharp green
    # The lens looks around the blurred edge: half of the hidden green shows through just inside it.
    assert far_focus[0, 1, 32, 31].item() == pytest.approx(0.5, abs=0.1)
    assert far_focus[0, 0, 32, 20] > 0.95
    near_focus = srgb_to_linear(render(untrained, photo, disparity, 1.0, 8.0))
    assert near_focus[0, 1, 32, 29] < 1e-3  # blurred green stays behind the sharp red


def test_hidden_surfaces_continue_what_lies_farther_around_them():
    light = torch.zeros(1, 3, 32, 32)
    light[:, 1] = 0.7  # a green wall
    light[..., 12:20, 12:20] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]  # before it a red box
    defocus = torch.full((1, 1, 32, 32), -6.0)
    defocus[..., 12:20, 12:20] = 5.0
    slabs = torch.bucketize(defocus, slab_edges(1.0, math.sqrt(2), 64.0).float())
    behind, _, behind_defocus, seen = hidden_surfaces(light, defocus, defocus, slabs)
    box = (0, slice(None), slice(12, 20), slice(12, 20))
    assert seen[box].all() and not seen[..., :8, :].any()
    assert torch.allclose(behind[box][1], torch.tensor(0.7), atol=1e-5)
    assert behind[box][0].abs().max() < 1e-5
    assert torch.allclose(behind_defocus[box], torch.tensor(-6.0), atol=1e-4)


def test_logits_can_learn_although_they_start_at_zero(untrained):
    photo, disparity = textured(32, 32), textured(32, 32, seed=3)[:, :1]
    untrained.zero_grad()
    render(untrained, photo, disparity, 0.5, 8.0).square().mean().backward()
    attention = untrained.light_transport.attn
    assert attention.to_k.weight.grad.abs().sum() > 0
    assert attention.to_v.weight.grad.abs().sum() > 0
    assert untrained.emission[2].weight.grad.abs().sum() > 0
    assert untrained.correction.conv_out.weight.grad.abs().sum() > 0


def test_batch_equals_one_by_one(untrained):
    photos = torch.cat([textured(seed=4), textured(seed=5)])
    disparity = torch.cat([textured(seed=6), textured(seed=7)])[:, :1]
    df, K = torch.tensor([0.2, 0.8]), torch.tensor([5.0, 14.0])
    with torch.no_grad():
        together = render(untrained, photos, disparity, df, K)
        apart = [
            render(untrained, photos[i : i + 1], disparity[i : i + 1], df[i : i + 1], K[i : i + 1])
            for i in range(2)
        ]
    assert (together - torch.cat(apart)).abs().max() < 1e-4


def test_save_and_load(untrained, tmp_path):
    with torch.no_grad():
        for parameter in untrained.correction.conv_out.parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        untrained.save_pretrained(tmp_path)
        loaded = LightTransportUNet.from_pretrained(tmp_path)
        photo, disparity = textured(), textured(seed=8)[:, :1]
        arguments = (photo, disparity, 0.5, 10.0)
        assert torch.equal(render(untrained, *arguments), render(loaded, *arguments))
        for parameter in untrained.correction.conv_out.parameters():
            parameter.zero_()


def test_refuses_to_run_without_pisa():
    unet = LightTransportUNet(block_out_channels=(8,), layers_per_block=1)
    remove_pisa(unet)
    with pytest.raises(RuntimeError, match="install_pisa"):
        render(unet, textured(), textured()[:, :1], 0.5, 5.0)


def test_refuses_a_sample_without_conditioning(untrained):
    with pytest.raises(ValueError, match="Concatenate disparity and defocus"):
        untrained(torch.zeros(1, 12, 8, 8), 499)


def test_refuses_channels_that_do_not_fit_the_codec():
    with pytest.raises(ValueError, match="block_size 4 needs in_channels 80"):
        LightTransportUNet(block_size=4)


def test_display_encoding_round_trip_of_the_test_helpers():
    values = torch.linspace(0, 1, 256)
    assert (linear_to_srgb(srgb_to_linear(values)) - values).abs().max() < 1e-6


def test_a_picture_does_not_depend_on_its_companions(untrained):
    """What lies behind an edge is a mean of surfaces, at a depth that nothing visible may have."""
    photos = torch.cat([textured(seed=seed) for seed in range(4)])
    generator = torch.Generator().manual_seed(1)
    # Patches of 8 pixels at three to sixteen depths each.
    depths = [torch.rand(count, generator=generator) for count in (3, 4, 8, 16)]
    disparity = torch.stack(
        [one[torch.randint(len(one), (1, 8, 8), generator=generator)] for one in depths]
    )
    disparity = F.interpolate(disparity, scale_factor=8)
    df, K = torch.full((4,), 0.5), torch.full((4,), 40.0)
    with torch.no_grad():
        together = render(untrained, photos, disparity, df, K)
        for index in range(4):
            one = slice(index, index + 1)
            alone = render(untrained, photos[one], disparity[one], df[one], K[one])
            torch.testing.assert_close(together[one], alone, atol=2e-6, rtol=0)


@pytest.fixture(scope="module")
def outspoken() -> LightTransportUNet:
    """All convolutions and logits say something, so that nothing can go wrong unseen, and none
    enlarges an error."""
    torch.manual_seed(0)
    unet = LightTransportUNet(block_out_channels=(8, 8, 8, 8), layers_per_block=1).eval()
    for name, parameter in unet.named_parameters():
        if "to_v" not in name and "to_out" not in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return unet


def patches(height, width, batch=1, seed=0):
    """Photo with clipped highlights, and a disparity of patches of 16 pixels."""
    generator = torch.Generator().manual_seed(seed)
    photo = (1.3 * torch.rand(batch, 3, height, width, generator=generator)).clamp(max=1)
    depths = torch.rand(batch, 1, height // 16 + 1, width // 16 + 1, generator=generator)
    disparity = F.interpolate(depths, scale_factor=16)[..., :height, :width]
    return photo, disparity


@pytest.mark.parametrize("size", [(64, 48), (48, 96)])
@pytest.mark.parametrize("K", [3.0, 30.0, 500.0])
def test_windows_give_the_same_picture(outspoken, size, K, monkeypatch):
    """Circles of confusion of one window, of several, and wider than the picture."""
    monkeypatch.setattr(light_transport, "TOKENS_AT_ONCE", 12)
    monkeypatch.setattr(light_transport, "BAND_PIXELS", 1)
    photo, disparity = patches(*size, batch=2)
    df, strength = torch.tensor([0.1, 0.7]), torch.tensor([K, K / 3])
    with torch.no_grad():
        whole = render(outspoken, photo, disparity, df, strength)
        # Where light goes everywhere, small windows make it travel many times.
        for side in (16, 32) if K < 100 else (32,):
            parts = render(outspoken, photo, disparity, df, strength, window_pixels=side)
            assert (parts - whole).abs().max() < ROUNDING


def test_windows_of_a_lone_highlight_and_of_an_empty_half(outspoken, monkeypatch):
    """Slabs that only one window has, whose light reaches into others; hidden surfaces guessed
    from the far side of a wide occluder."""
    monkeypatch.setattr(light_transport, "TOKENS_AT_ONCE", 12)
    monkeypatch.setattr(light_transport, "BAND_PIXELS", 1)
    photo, disparity = torch.full((1, 3, 64, 160), 0.1), torch.full((1, 1, 64, 160), 0.5)
    photo[..., 30:34, 30:34] = 1.0
    disparity[..., 30:34, 30:34] = 1.0
    disparity[..., 96:] = 0.9
    photo[..., 96:] = 0.6
    disparity[..., :8] = 0.0
    with torch.no_grad():
        whole = render(outspoken, photo, disparity, 0.5, 60.0)
        parts = render(outspoken, photo, disparity, 0.5, 60.0, window_pixels=16)
    # The light that is summed is up to 24 times that of white, and its roundings too; where a dark
    # place receives a little of it, display encoding makes the most of them.
    assert (parts - whole).abs().max() < 4 * ROUNDING


def test_windows_keep_gradients(outspoken):
    photo, disparity = patches(48, 32)
    gradients = []
    for side in (None, 16):
        outspoken.zero_grad()
        leaf = photo.clone().requires_grad_()
        weight = torch.rand(photo.shape, generator=torch.Generator().manual_seed(2))
        (
            weight * render(outspoken, leaf, disparity, 0.4, 12.0, window_pixels=side)
        ).sum().backward()
        parameters = [parameter.grad.clone() for parameter in outspoken.parameters()]
        gradients.append([leaf.grad, *parameters])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


def test_windows_do_not_cut_tokens(outspoken):
    transport = outspoken.light_transport
    sizes = [transport.token_size(slab) for slab in range(len(transport.edges) + 1)]
    assert outspoken.window_multiple == max(sizes) == 16
    assert LightTransportUNet(block_out_channels=(8,) * 6).window_multiple == 64


@pytest.mark.parametrize("side", [0, -16, 100])
def test_refuses_windows_that_cut_tokens(untrained, side):
    with pytest.raises(ValueError, match="window_pixels is .* multiple of 16"):
        untrained(torch.zeros(1, 20, 8, 8), 499, window_pixels=side)


@pytest.mark.parametrize("radius", [0.0, 0.7, 3.0, 11.0])
def test_no_light_of_pisa_lands_beyond_its_reach(untrained, radius):
    config = PisaConfig.preset("paper")
    reach = reach_in_tokens(radius, config)
    geometry = PisaGeometry.build(torch.full((1, 1, 40, 40), radius), config=config)
    received = geometry.log_soft_mask()[0, :, 20 * 40 + 20].view(40, 40) > -math.inf
    rows, columns = received.nonzero(as_tuple=True)
    assert max((rows - 20).abs().max(), (columns - 20).abs().max()) <= reach < radius + 3
    assert reach_in_tokens(radius, config.replace(cutoff=0.0)) == math.inf
    assert reach_in_tokens(radius, config.replace(token_spacing=None)) == math.inf


def test_a_lens_without_cutoff_still_works_in_windows(outspoken):
    """Light then reaches every token, as do the windows' margins."""
    unet = copy.deepcopy(outspoken)
    config = PisaConfig.preset("paper").replace(cutoff=0.0)
    install_pisa(unet, ["light_transport.attn"], config)
    photo, disparity = patches(32, 48)
    with torch.no_grad():
        whole = render(unet, photo, disparity, 0.4, 12.0)
        parts = render(unet, photo, disparity, 0.4, 12.0, window_pixels=16)
    assert (parts - whole).abs().max() < ROUNDING

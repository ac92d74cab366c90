"""TinyUnet, GlassEncNet and their enhancement: sizes, order of operations, folding, padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from bokehdiff.models.litebokeh import (
    VARIANTS,
    EnhancementBlock,
    GlassEncNet,
    InstanceNorm,
    TinyUnet,
)
from tests.tiny_litebokeh import tiny_glass, tiny_unet

NETWORKS = {"tiny_unet": tiny_unet, "glass": tiny_glass}


def photo(height: int = 40, width: int = 56, batch: int = 1, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, height, width, generator=generator)


def multiplications(network: nn.Module, height: int, width: int) -> int:
    """Of convolutions, counted from their shapes."""
    with FlopCounterMode(display=False) as counter:
        network.to("meta")(torch.empty(1, 3, height, width, device="meta"))
    return counter.get_total_flops() // 2


# -- Sizes ---------------------------------------------------------------------------------------

PUBLISHED = {
    "pico": (92_670, 4.63),
    "nano": (206_626, 8.39),
    "tiny": (365_958, 13.58),
    "wide": (820_750, 28.23),
    "large": (1_457_046, 48.56),
}


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_and_multiplications(name, norm):
    parameters, billions = PUBLISHED[name]
    network = TinyUnet.from_variant(name, norm=norm)
    assert sum(value.numel() for value in network.parameters()) == parameters
    assert multiplications(network, 1024, 1536) / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize(
    ("residual_blocks", "millions", "billions"), [(9, 5.86, 641), (6, 4.09, 467)]
)
def test_parameters_and_multiplications_of_glass_enc_net(residual_blocks, millions, billions):
    network = GlassEncNet(residual_blocks=residual_blocks)
    count = sum(value.numel() for value in network.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.005)
    assert multiplications(network, 1024, 1536) / 1e9 == pytest.approx(billions, abs=0.5)


@pytest.mark.parametrize("kind", [TinyUnet, GlassEncNet])
def test_multiplications_per_pixel_do_not_grow(kind):
    small, large = (
        multiplications(kind(), height, width) / (height * width)
        for height, width in ((256, 384), (1024, 1536))
    )
    assert large / small == pytest.approx(1, abs=1e-3)


# -- The order of operations ---------------------------------------------------------------------


def test_tiny_unet_in_plain_operations():
    network = tiny_unet().double()
    image = photo().double()
    weights = dict(network.state_dict())

    def convolved(name, values, **options):
        return F.conv2d(values, weights[f"{name}.weight"], weights[f"{name}.bias"], **options)

    def raised(name, values):
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return F.relu(F.conv_transpose2d(values, weight, bias, stride=2, padding=1))

    e1 = F.relu(convolved("down.0", image, stride=2, padding=1))
    e2 = F.relu(convolved("down.1", e1, stride=2, padding=1))
    e3 = F.relu(convolved("down.2", e2, stride=2, padding=1))
    for number in range(4):
        place = f"blocks.{number}"
        inner = F.relu(convolved(f"{place}.first", e3, padding=1))
        mean, variance, scale, shift = (
            weights[f"{place}.norm.{name}"].view(1, -1, 1, 1)
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        inner = (inner - mean) / (variance + 1e-5).sqrt() * scale + shift
        e3 = e3 + F.relu(convolved(f"{place}.second", inner, padding=1))
    d1 = raised("up.0", e3) + e2
    d2 = raised("up.1", d1) + e1
    d3 = raised("up.2", d2)
    rendered = torch.sigmoid(convolved("out", d3, padding=1))
    corrected = convolved(
        "enhancement.correct",
        F.relu(convolved("enhancement.widen", rendered, padding=1)),
        padding=1,
    )
    output = network(image)
    torch.testing.assert_close(output.rendered, rendered, rtol=0, atol=1e-12)
    torch.testing.assert_close(output.bokeh, (rendered + corrected).clamp(0, 1), rtol=0, atol=1e-12)
    assert output.first_rendered is None


def test_the_second_hourglass_sees_the_photo_and_the_first_picture():
    network = tiny_glass()
    image = photo()
    output = network(image)
    torch.testing.assert_close(output.first_rendered, network.first(image))
    seen = torch.cat([image, output.first_rendered], dim=1)
    torch.testing.assert_close(output.rendered, network.second(seen))
    torch.testing.assert_close(output.bokeh, network.enhancement(output.rendered))


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_without_enhancement(make):
    network = make()
    image = photo()
    with_it, without = network(image), network(image, enhance=False)
    assert torch.equal(without.bokeh, without.rendered)
    assert torch.equal(without.rendered, with_it.rendered)
    assert (with_it.bokeh - without.bokeh).abs().max() > 0.01
    assert torch.equal(network(image, return_dict=False)[0], with_it.bokeh)


def test_an_untrained_enhancement_changes_nothing():
    picture = photo()
    assert torch.equal(EnhancementBlock()(picture), picture)


def test_the_enhancement_can_darken():
    block = EnhancementBlock()
    nn.init.constant_(block.correct.bias, -0.2)
    torch.testing.assert_close(block(photo()), (photo() - 0.2).clamp(0, 1))


def test_instance_norm_is_that_of_torch():
    features = 3 + 2 * photo(7, 9, batch=2).double()
    ours = InstanceNorm(3).double()
    theirs = nn.InstanceNorm2d(3, affine=True).double()
    with torch.no_grad():
        ours.weight.copy_(torch.tensor([0.5, -1.0, 2.0]).view(1, 3, 1, 1))
        ours.bias.copy_(torch.tensor([0.1, 0.0, -3.0]).view(1, 3, 1, 1))
        theirs.weight.copy_(ours.weight.flatten())
        theirs.bias.copy_(ours.bias.flatten())
    torch.testing.assert_close(ours(features), theirs(features), rtol=0, atol=1e-12)


def test_three_pixels_wide_kernels_and_no_skips():
    network = tiny_unet(up_kernel=3, skip="none", norm="none")
    assert network(photo()).bokeh.shape == (1, 3, 40, 56)
    with_skips = tiny_unet(up_kernel=3, skip="add", norm="none")
    with_skips.load_state_dict(network.state_dict())
    assert (with_skips(photo()).rendered - network(photo()).rendered).abs().max() > 1e-3


# -- Folding -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=str
)
def test_folded_batch_norms_give_the_same_picture(dtype, largest):
    network = tiny_unet(output="blend").to(dtype)
    scales = torch.cat([block.norm.weight for block in network.blocks])
    assert (scales < 0).any() and (scales > 0).any()
    folded = network.fused()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert folded.dtype == dtype and folded.config.norm == "shift"
    image = photo(45, 61).to(dtype)
    # The frame matters: beyond it the convolution after a batch norm sees zeros.
    difference = (folded(image).bokeh - network(image).bokeh).abs().max()
    assert difference < largest


def test_a_scale_of_zero_folds_too():
    network = tiny_unet()
    network.blocks[0].norm.weight.data[:4] = 0
    difference = (network.fused()(photo()).bokeh - network(photo()).bokeh).abs().max()
    assert difference < 1e-6


def test_folding_leaves_the_network_alone():
    network = tiny_unet().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    folded = network.fused()
    with torch.no_grad():
        for value in folded.parameters():
            value.add_(1)
    assert network.training and not folded.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("norm", ["instance", "none", "shift"])
def test_networks_without_batch_norm_are_copied(norm):
    network = tiny_unet(norm=norm)
    assert torch.equal(network.fused()(photo()).bokeh, network(photo()).bokeh)


# -- Sizes of photos -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("size", [(16, 16), (17, 31), (40, 57), (63, 24)])
def test_any_size(make, size):
    image = photo(*size)
    picture = make()(image).bokeh
    assert picture.shape == image.shape
    below, right = (-side % 8 for side in size)
    padded = F.pad(image, (0, right, 0, below), mode="reflect")
    whole = make()(padded).bokeh
    torch.testing.assert_close(picture, whole[..., : size[0], : size[1]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("residual_blocks", [0, 1, 4])
def test_the_overlap_of_tiles_is_what_decides_a_pixel(residual_blocks):
    network = TinyUnet((2, 2, 2), residual_blocks=residual_blocks, norm="none").double()
    for value in network.parameters():
        nn.init.constant_(value, 0.01)  # every ReLU is open, and nothing clips
    overlap = network.tile_overlap
    side = 2 * (overlap // 8 + 2) * 8
    farthest = 0
    # Of the eight places that a pixel can have in a cell, some see farther than others.
    for middle in range(side // 2, side // 2 + 8):
        image = photo(side, side).double().requires_grad_()
        network(image).bokeh[0, :, middle, middle].sum().backward()
        rows = (image.grad[0] != 0).any(0).any(1).nonzero().flatten()
        farthest = max(farthest, middle - int(rows.min()), int(rows.max()) - middle)
    # Tiles begin at whole cells, so the overlap is one of whole cells.
    assert overlap - 8 < farthest <= overlap and overlap % 8 == 0


def test_networks_that_see_the_whole_photo_have_no_tiles():
    assert tiny_unet(norm="instance").tile_overlap is None
    assert tiny_glass().tile_overlap is None


def test_saved_and_read_back(tmp_path):
    for number, network in enumerate((tiny_unet(), tiny_unet().fused(), tiny_glass())):
        network.save_pretrained(tmp_path / str(number))
        again = type(network).from_pretrained(tmp_path / str(number))
        torch.testing.assert_close(again(photo()).bokeh, network(photo()).bokeh)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"norm": "layer"}, "norm is 'layer'"),
        ({"skip": "cat"}, "skip is 'cat'"),
        ({"up_kernel": 2}, "up_kernel is 2"),
        ({"output": "mix"}, "output is 'mix'"),
        ({"channels": (4, 8)}, "three numbers"),
    ],
)
def test_refused_options(options, told):
    with pytest.raises(ValueError, match=told):
        TinyUnet(**options)


def test_refused_sizes_and_pictures():
    with pytest.raises(ValueError, match="'huge'.*'pico'"):
        TinyUnet.from_variant("huge")
    for shape in ((3, 32, 32), (1, 4, 32, 32), (1, 3, 15, 32)):
        with pytest.raises(ValueError, match="image has the shape"):
            tiny_unet()(torch.zeros(shape))


def test_a_blend_is_the_photo_where_the_share_is_one():
    network = tiny_unet(output="blend")
    image = photo()
    painted, _ = tiny_unet(output="blend").render(image)
    for bias, wanted in ((40.0, image), (-40.0, None)):
        with torch.no_grad():
            network.share.weight.zero_()
            network.share.bias.fill_(bias)
        rendered = network(image).rendered
        if wanted is None:
            # All is painted, as by the network without a share.
            plain = tiny_unet()
            plain.load_state_dict(
                {name: one for name, one in network.state_dict().items() if "share" not in name}
            )
            wanted = plain(image).rendered
        torch.testing.assert_close(rendered, wanted, rtol=0, atol=1e-6)
    assert (painted - image).abs().max() > 0.05


def test_what_a_blend_costs():
    plain, blend = TinyUnet(), TinyUnet(output="blend")
    extra = {sum(value.numel() for value in one.parameters()) for one in (plain, blend)}
    assert extra == {365_958, 365_958 + 145}
    ratio = multiplications(blend, 256, 384) / multiplications(plain, 256, 384)
    assert ratio == pytest.approx(1.017, abs=1e-3)

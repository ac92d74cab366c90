"""Pictures in parts: the same picture from a local network, the authors' tiles, and windows that
see enough from the others."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler

from bokehdiff.models.light_transport_unet import LightTransportUNet
from bokehdiff.models.space_to_depth import AutoencoderSpaceToDepth
from bokehdiff.models.stored_prompt import StoredPrompt
from bokehdiff.pipelines.bokehdiff import BokehDiffPipeline
from bokehdiff.pipelines.tiling import (
    check_tiling,
    official_origins,
    official_tiles,
    overlapping_windows,
    tiles_for,
    window_pixels_for,
)
from bokehdiff.windows import Window
from tests.tiny_models import PROMPT_CHANNELS, tiny_unet, tiny_vae

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sdxl() -> BokehDiffPipeline:
    """Tiny SDXL that is told at which crop it looks, and blurs by PISA."""
    generator = torch.Generator().manual_seed(3)
    stored = StoredPrompt.from_embeddings(
        "stored",
        torch.randn(1, 77, 2 * PROMPT_CHANNELS, generator=generator),
        torch.randn(1, PROMPT_CHANNELS, generator=generator),
    )
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return BokehDiffPipeline(
        vae=tiny_vae(), unet=tiny_unet(), scheduler=scheduler, stored_prompt=stored
    )


@pytest.fixture(scope="module")
def local() -> BokehDiffPipeline:
    """Our own network with convolutions that say something, behind the lossless codec."""
    torch.manual_seed(0)
    unet = LightTransportUNet(block_out_channels=(8, 8, 8)).eval()
    for parameter in unet.correction.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    stored = StoredPrompt.from_embeddings("stored", torch.zeros(1, 1, 8), torch.zeros(1, 8))
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return BokehDiffPipeline(
        vae=AutoencoderSpaceToDepth(2),
        unet=unet,
        scheduler=scheduler,
        stored_prompt=stored,
        pisa_layers="light_transport.attn",
    )


def scene(height: int, width: int, batch: int = 1, channels: int = 4, scale: int = 8, seed=0):
    """Latents, disparity of near patches over a slope, and signed defocus of up to 20 pixels."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, channels, height, width, generator=generator)
    disparity = torch.linspace(0.1, 0.4, height * scale)[:, None].repeat(1, width * scale)
    disparity = disparity.repeat(batch, 1, 1, 1)
    for one in disparity:
        top, left = (
            int(torch.randint(side // 2, (), generator=generator)) for side in one.shape[1:]
        )
        one[:, top : top + height * scale // 3, left : left + width * scale // 3] = 0.9
    return latents, disparity, 25 * (disparity - 0.3)


# -- The argument ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tiling", ["whole", "", 0, -512, 512.0, True, False, [512]])
def test_refuses_what_is_no_tiling(tiling, sdxl) -> None:
    with pytest.raises(ValueError, match="'auto', None .* 'official'"):
        check_tiling(tiling)
    with torch.no_grad(), pytest.raises(ValueError, match="tiling is"):
        sdxl.predict_latents(*scene(4, 4), tiling=tiling)


def test_only_local_networks_have_windows_by_default(sdxl, local) -> None:
    assert window_pixels_for(sdxl.unet, "auto", CPU) is None
    assert window_pixels_for(sdxl.unet, 512, CPU) is None
    assert tiles_for("auto", 500, 750, 2, 8, 20.0) == []
    multiple = local.unet.window_multiple
    assert window_pixels_for(local.unet, "auto", CPU) % multiple == 0
    assert window_pixels_for(local.unet, 1, CPU) == multiple
    assert window_pixels_for(local.unet, 10 * multiple + 1, CPU) == 11 * multiple
    assert window_pixels_for(local.unet, None, CPU) is None
    assert window_pixels_for(local.unet, "official", CPU) is None


# -- A local network: the same picture ------------------------------------------------------------


@pytest.mark.parametrize("size", [(104, 72), (61, 131)])
@pytest.mark.parametrize("K", [6.0, 60.0, 400.0])
def test_windows_of_a_local_network_leave_no_trace(local, size, K) -> None:
    generator = torch.Generator().manual_seed(1)
    photo = torch.rand(2, 3, *size, generator=generator)
    depths = torch.rand(2, 1, -(-size[0] // 16), -(-size[1] // 16), generator=generator)
    disparity = depths.repeat_interleave(16, 2).repeat_interleave(16, 3)[..., : size[0], : size[1]]
    df, strength = torch.tensor([0.2, 0.8]), torch.tensor([K, K / 2])
    arguments = dict(preserve_detail=False, output_type="pt")
    whole = local(photo, disparity, df, strength, tiling=None, **arguments).images
    for tiling in (32, 48):
        image = local(photo, disparity, df, strength, tiling=tiling, **arguments).images
        # A few roundings of float32 at 1, which sums in another order leave.
        assert (image - whole).abs().max() < 5e-6


def test_training_takes_the_picture_whole(local) -> None:
    """Gradients do not depend on the tiling that rendering would use."""
    latents, disparity, defocus = scene(32, 32, channels=12, scale=2)
    gradients = []
    for tiling in (None, 32, "official"):
        leaf = latents.clone().requires_grad_()
        local.predict_latents(leaf, disparity, defocus, tiling=tiling).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


# -- The authors' tiles ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length, origins",
    [
        (40, [0]),
        (64, [0]),
        (65, [0, 1]),
        (112, [0, 24, 48]),
        (128, [0, 32, 64]),
        (160, [0, 32, 64, 96]),
    ],
)
def test_origins_are_the_authors(length, origins) -> None:
    assert official_origins(length) == origins


def test_official_tiles_begin_above_two_tiles() -> None:
    assert official_tiles(64, 128) == []
    assert len(official_tiles(65, 128)) == 2 * 3


def test_official_blending_equals_the_formula(sdxl) -> None:
    """A side shorter than a tile, and tiles that overlap; the sum in float64."""
    latents, disparity, defocus = scene(48, 176, seed=2)
    with torch.no_grad():
        predicted = sdxl.predict_latents(latents, disparity, defocus, tiling="official")
        noise = torch.zeros(4, 48, 176, dtype=torch.float64)
        total = torch.zeros(48, 176, dtype=torch.float64)
        prompt, pooled = sdxl.bokeh_prompt()
        for left in (0, 37, 74, 112):  # int(linspace(0, 112, 4))
            columns, pixels = slice(left, left + 64), slice(8 * left, 8 * (left + 64))
            context = sdxl.verify_pisa()
            context.set_scene(disparity[..., pixels], defocus[..., pixels].abs(), 48, 64, 8)
            part = sdxl.unet(
                latents[..., columns],
                torch.tensor([499]),
                encoder_hidden_states=prompt,
                added_cond_kwargs={
                    "text_embeds": pooled,
                    "time_ids": torch.tensor([[384.0, 1408, 0, left, 384, 1408]]),
                },
            ).sample[0]
            context.clear()
            for row in range(48):
                for column in range(64):
                    u, v = -2 + 4 * row / 47, -2 + 4 * column / 63
                    weight = math.exp(-(u**2 + v**2))
                    noise[:, row, left + column] += weight * part[:, row, column].double()
                    total[row, left + column] += weight
    a, b = sdxl.closed_form_step()
    wanted = a * latents.double() - b * noise / total
    assert (predicted - wanted).abs().max() < 1e-5


# -- Windows of other networks --------------------------------------------------------------------


@pytest.mark.parametrize("radius", [0.0, 2.5, 30.0])
@pytest.mark.parametrize("size", [(48, 120), (64, 34), (90, 90)])
def test_windows_see_all_that_reaches_them_and_weights_sum_to_one(size, radius) -> None:
    tiles = overlapping_windows(*size, side=32, multiple=2, largest_radius=radius)
    total = torch.zeros(size)
    for tile, weight in tiles:
        assert tile.top % 2 == tile.left % 2 == 0
        tile.crop(total).add_(weight)
        rows, columns = (weight > 0).nonzero(as_tuple=True)
        assert tile.top == 0 or rows.min() >= radius
        assert tile.left == 0 or columns.min() >= radius
        assert tile.bottom == size[0] or weight.shape[0] - 1 - rows.max() >= radius
        assert tile.right == size[1] or weight.shape[1] - 1 - columns.max() >= radius
    assert (total - 1).abs().max() < 1e-6


def test_a_picture_of_one_window_stays_whole(sdxl) -> None:
    with torch.no_grad():
        whole = sdxl.predict_latents(*scene(16, 12), tiling=None)
        assert torch.equal(sdxl.predict_latents(*scene(16, 12), tiling=128), whole)
        assert torch.equal(sdxl.predict_latents(*scene(16, 12), tiling="auto"), whole)
        assert torch.equal(sdxl.predict_latents(*scene(16, 12), tiling="official"), whole)


def test_windows_keep_pisa_and_forget_the_scene(sdxl) -> None:
    latents, disparity, defocus = scene(48, 32)
    with torch.no_grad():
        blurred = sdxl.predict_latents(latents, disparity, defocus, tiling=128)
        sharp = sdxl.predict_latents(latents, disparity, 0 * defocus, tiling=128)
    assert torch.isfinite(blurred).all()
    assert (blurred - sharp).abs().max() > 1e-4, "PISA had no effect"
    assert not sdxl.verify_pisa().has_scene


def test_a_picture_in_windows_does_not_depend_on_its_companions(sdxl) -> None:
    latents, disparity, defocus = scene(48, 32, batch=2)
    defocus = defocus * torch.tensor([1.0, 9.0]).view(2, 1, 1, 1)
    with torch.no_grad():
        together = sdxl.predict_latents(latents, disparity, defocus, tiling=128)
        for index in range(2):
            one = slice(index, index + 1)
            alone = sdxl.predict_latents(latents[one], disparity[one], defocus[one], tiling=128)
            assert torch.equal(together[one], alone)


def test_windows_tell_the_network_where_they_lie(sdxl) -> None:
    """The same latents at another place of a picture give other noise: the crop is an input."""
    maps = scene(16, 16)
    with torch.no_grad():
        first = sdxl.predict_noise(*maps, tile=Window(0, 0, 16, 16, 64, 64))
        second = sdxl.predict_noise(*maps, tile=Window(0, 48, 16, 64, 64, 64))
    assert (first - second).abs().max() > 1e-5

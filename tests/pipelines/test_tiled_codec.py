"""The codec in strips against the untiled codec: values, seams, memory, work, switches."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import AutoencoderKL, AutoencoderTiny
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bokehdiff.models.space_to_depth import AutoencoderSpaceToDepth
from bokehdiff.pipelines.tiled_codec import (
    DEFAULT_TILE_PIXELS,
    codec_strip_for,
    decode_in_tiles,
    encode_in_tiles,
    tiled_codec_bytes,
)
from tests.conftest import REPOSITORY
from tests.tiny_models import tiny_vae

SDXL: dict[str, Any] = dict(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32
)
AS_SDXL: dict[str, Any] = dict(block_out_channels=(8, 16, 32, 32), layers_per_block=2)
"""The proportions of SDXL, a sixteenth of the channels: the same activations are too large to be
kept."""


@pytest.fixture(autouse=True)
def without_gradients(one_thread: None) -> Iterator[None]:
    with torch.no_grad():
        yield


def codec(**changes: Any) -> AutoencoderKL:
    """An untrained codec whose normalisations, unlike those of a new one, scale and shift."""
    vae = tiny_vae(**changes)
    generator = torch.Generator().manual_seed(1)
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.bias.uniform_(-0.5, 0.5, generator=generator)
    return vae


def picture(height: int, width: int, batch: int = 1) -> Tensor:
    """A slope with noise, darker at one side, so that strips have moments of their own."""
    generator = torch.Generator().manual_seed(height + width)
    slope = torch.linspace(-1, 1, height, dtype=torch.float64)[:, None]
    noise = torch.rand(batch, 3, height, width, generator=generator, dtype=torch.float64)
    return 0.7 * slope * slope.abs() + 0.6 * (noise - 0.5)


def encoded(vae: AutoencoderKL, image: Tensor) -> Tensor:
    return vae.encode(image).latent_dist.mode()


def decoded(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    return vae.decode(latents).sample


def difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape and one.dtype == other.dtype
    return float((one - other).abs().max())


def assert_equal_to_untiled(
    vae: AutoencoderKL, image: Tensor, tile_pixels: int, tolerance: float
) -> None:
    latents = encoded(vae, image)
    assert difference(encode_in_tiles(vae, image, tile_pixels), latents) < tolerance
    decoded_whole = decoded(vae, latents)
    assert difference(decode_in_tiles(vae, latents, tile_pixels), decoded_whole) < tolerance


# -- Values --------------------------------------------------------------------------------------

# In double precision nothing but the order of sums differs, and a seam of one part in a billion
# would show.
EXACT = 1e-11


@pytest.mark.parametrize(
    ("size", "tile_pixels"),
    [
        ((88, 40), 100),
        ((88, 40), 650),
        ((88, 40), 3519),
        ((40, 104), 600),
        ((8, 200), 300),
        ((200, 8), 100),
        ((24, 16), 1),
    ],
)
def test_values_of_the_untiled_codec(size: tuple[int, int], tile_pixels: int) -> None:
    assert_equal_to_untiled(codec(**AS_SDXL).double(), picture(*size), tile_pixels, EXACT)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers_per_block": 3},
        {"block_out_channels": (16, 8, 8, 24)},
        {"norm_num_groups": 1},
        {"norm_num_groups": 8},
        {"use_quant_conv": False, "use_post_quant_conv": False},
        {"mid_block_add_attention": False},
        {
            "block_out_channels": (8, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
        {
            "block_out_channels": (8,),
            "down_block_types": ("DownEncoderBlock2D",),
            "up_block_types": ("UpDecoderBlock2D",),
        },
    ],
)
def test_values_for_other_codecs(changes: dict[str, Any]) -> None:
    assert_equal_to_untiled(codec(**changes).double(), picture(72, 56), 700, EXACT)


def test_photos_of_a_batch_do_not_see_each_other() -> None:
    vae = codec(**AS_SDXL).double()
    photos = picture(48, 40, batch=3)
    photos[1] *= 5
    assert_equal_to_untiled(vae, photos, 500, EXACT)


def test_a_picture_no_larger_than_a_strip_is_left_whole() -> None:
    vae, image = codec(), picture(48, 40).float()
    latents = encoded(vae, image)
    assert torch.equal(encode_in_tiles(vae, image, 48 * 40), latents)
    assert torch.equal(decode_in_tiles(vae, latents, 48 * 40), decoded(vae, latents))


def test_values_far_from_zero_keep_their_precision() -> None:
    """Moments from sums of squares would lose the small variance beside the large mean."""
    vae = codec(**AS_SDXL)
    vae.encoder.conv_in.bias += 1000
    image = picture(64, 48)
    exact = encoded(vae.double(), image)
    vae.float()
    untiled = difference(encoded(vae, image.float()).double(), exact)
    tiled = difference(encode_in_tiles(vae, image.float(), 500).double(), exact)
    assert tiled < 2 * untiled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_that_of_the_untiled_codec(dtype: torch.dtype) -> None:
    """Both are compared with double precision, by the root mean square of their errors."""
    vae = codec(**AS_SDXL).to(dtype)
    image = picture(96, 72).to(dtype)
    latents = encoded(vae, image)
    found = encode_in_tiles(vae, image, 600), decode_in_tiles(vae, latents, 600)
    untiled = latents, decoded(vae, latents)
    vae.double()
    exact = encoded(vae, image.double()), decoded(vae, latents.double())
    for one, other, wanted in zip(found, untiled, exact, strict=True):
        assert one.dtype == dtype
        assert (one - wanted).square().mean() < 1.3**2 * (other - wanted).square().mean()


def test_values_of_the_codec_of_sdxl() -> None:
    vae = codec(**SDXL)
    assert_equal_to_untiled(vae, picture(64, 48).float(), 16 * 48, 1e-4)


@pytest.mark.slow
def test_values_of_the_codec_of_sdxl_in_many_strips() -> None:
    vae = codec(**SDXL)
    assert_equal_to_untiled(vae, picture(256, 192).float(), 64 * 64, 1e-4)


def test_no_seams() -> None:
    """At the rows where strips meet nothing differs more than elsewhere; control: diffusers."""
    vae = codec(**AS_SDXL)
    latents = encoded(vae, picture(256, 64).float())
    wanted = decoded(vae, latents)

    def at_borders_and_inside(found: Tensor, rows: int) -> tuple[float, float]:
        per_row = (found - wanted).abs().mean((0, 1, 3))
        at_border = torch.zeros(256, dtype=torch.bool)
        for border in range(rows, 256, rows):
            at_border[border - 1 : border + 1] = True
        return float(per_row[at_border].mean()), float(per_row[~at_border].mean())

    border, inside = at_borders_and_inside(decode_in_tiles(vae, latents, 32 * 64), 32)
    assert border < 1.5 * inside and inside < 1e-6
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 64, 8
    assert min(at_borders_and_inside(decoded(vae, latents), 32)) > 1e-3


# -- Switches ------------------------------------------------------------------------------------


def assert_switch_keeps_values(vae: Any, before: AutoencoderKL) -> None:
    """Twice, since what brings weights in may forget to take them away, or the reverse."""
    image = picture(48, 40).float()
    latents = encoded(before, image)
    decoded_whole = decoded(before, latents)
    for _ in range(2):
        found = encode_in_tiles(vae, image, 500)
        assert difference(found, latents) < 1e-5 * latents.abs().max()
        found = decode_in_tiles(vae, latents, 500)
        assert difference(found, decoded_whole) < 1e-5 * decoded_whole.abs().max()


def test_adapters() -> None:
    vae = codec(**AS_SDXL)
    modules = ["conv_in", "conv1", "conv2", "conv_shortcut", "conv_out", "to_q", "quant_conv"]
    vae.add_adapter(LoraConfig(r=2, target_modules=modules, init_lora_weights=False))
    image = picture(48, 40).float()
    assert difference(encoded(vae, image), encoded(codec(**AS_SDXL), image)) > 1e-2
    assert_switch_keeps_values(vae, vae)


def test_model_cpu_offload_moves_the_codec_first() -> None:
    calls = []

    class Noticing(ModelHook):
        def pre_forward(self, module: nn.Module, *given: Any, **options: Any) -> Any:
            calls.append(module)
            return given, options

    vae = codec()
    add_hook_to_module(vae, Noticing())
    assert_switch_keeps_values(vae, codec())
    assert calls == 4 * [vae]


def test_sequential_cpu_offload() -> None:
    vae = codec(**AS_SDXL)
    accelerate.cpu_offload(vae, torch.device("cpu"))
    assert_switch_keeps_values(vae, codec(**AS_SDXL))
    assert all(one.is_meta for one in vae.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"offload_type": "leaf_level"},
        {"offload_type": "block_level", "num_blocks_per_group": 1},
        {"offload_type": "block_level", "num_blocks_per_group": 2},
    ],
)
def test_group_offload(options: dict[str, Any], tmp_path: Path) -> None:
    """To disk, so that the weights are really gone between the uses."""
    vae = codec(**AS_SDXL)
    vae.enable_group_offload(
        torch.device("cpu"), torch.device("cpu"), offload_to_disk_path=str(tmp_path), **options
    )
    assert_switch_keeps_values(vae, codec(**AS_SDXL))


def test_layerwise_casting() -> None:
    vae, before = codec(**AS_SDXL), codec(**AS_SDXL)
    for one in (vae, before):
        one.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert_switch_keeps_values(vae, before)


def test_a_compiled_codec_is_taken_apart() -> None:
    assert_switch_keeps_values(torch.compile(codec()), codec())


def test_lossless_codec_needs_no_strips() -> None:
    vae, image = AutoencoderSpaceToDepth(), picture(24, 32).float()
    latents = encode_in_tiles(vae, image, 1)
    assert torch.equal(latents, vae.encode(image).latent_dist.mode())
    assert torch.equal(decode_in_tiles(vae, latents, 1), image)


@pytest.mark.gpu
@pytest.mark.parametrize("storage_device", [None, torch.device("cuda"), torch.device("cpu")])
def test_storage_beside_the_gpu(storage_device: torch.device | None) -> None:
    vae = codec(**AS_SDXL).double().cuda()
    image = picture(88, 56).cuda()
    latents = encoded(vae, image)
    found = encode_in_tiles(vae, image, 600, storage_device)
    assert found.device == image.device and difference(found, latents) < EXACT
    found = decode_in_tiles(vae, latents, 600, storage_device)
    assert found.device == image.device
    assert difference(found, decoded(vae, latents)) < EXACT


# -- Mistakes ------------------------------------------------------------------------------------


def test_gradients_are_refused() -> None:
    vae, image = codec(), picture(16, 16).float()
    latents = encoded(vae, image)
    with torch.enable_grad():
        with pytest.raises(ValueError, match="records no gradients. Call it under torch.no_grad"):
            encode_in_tiles(vae, image)
        with pytest.raises(ValueError, match="records no gradients"):
            decode_in_tiles(vae, latents)


def test_other_codecs_are_refused() -> None:
    image, latents = picture(16, 16).float(), torch.zeros(1, 4, 2, 2)
    tiny = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    attending = tiny_vae(down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",))
    for vae, kind in [(tiny, "AutoencoderTiny"), (attending, "AttnDownEncoderBlock2D")]:
        with pytest.raises(ValueError, match=f"{kind}.*Encode and decode the whole picture"):
            encode_in_tiles(vae, image)
        with pytest.raises(ValueError, match=kind):
            decode_in_tiles(vae, latents)


def test_sizes_that_do_not_fit_are_refused() -> None:
    vae = codec()
    with pytest.raises(ValueError, match="20 x 16 pixels .* multiples of 8. Pad it first"):
        encode_in_tiles(vae, torch.zeros(1, 3, 20, 16))
    with pytest.raises(ValueError, match="tile_pixels is 0; it must be 1 or more"):
        encode_in_tiles(vae, torch.zeros(1, 3, 16, 16), tile_pixels=0)
    with pytest.raises(ValueError, match="tile_pixels is -3"):
        decode_in_tiles(vae, torch.zeros(1, 4, 2, 2), tile_pixels=-3)


# -- Work and memory -----------------------------------------------------------------------------


def multiplications(function: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_multiplications_beside_those_of_the_untiled_codec() -> None:
    """Attention, the same in both, left out. In one strip and a bit, and in strips of 64 rows."""
    vae = codec(**AS_SDXL, mid_block_add_attention=False)
    image, latents = picture(512, 16).float(), torch.randn(1, 4, 64, 2)
    encode = multiplications(lambda: encoded(vae, image))
    decode = multiplications(lambda: decoded(vae, latents))
    for rows, most_encode, most_decode in [(511, 1.15, 1.46), (64, 1.2, 1.6)]:
        tile = rows * 16
        found = multiplications(lambda tile=tile: encode_in_tiles(vae, image, tile))
        assert found < most_encode * encode
        found = multiplications(lambda tile=tile: decode_in_tiles(vae, latents, tile))
        assert found < most_decode * decode


def storages_alive() -> dict[int, int]:
    """Address and bytes of what the tensors that the garbage collector sees hold."""
    tensors = (one for one in gc.get_objects() if type(one) is Tensor)
    storages = (one.untyped_storage() for one in tensors)
    return {one.data_ptr(): one.nbytes() for one in storages}


@contextlib.contextmanager
def most_alive() -> Iterator[list[int]]:
    """Bytes of the tensors made within that are alive after any layer; the largest comes last."""
    peaks = [0]
    before = storages_alive()

    def look(*_: Any) -> None:
        alive = storages_alive().items()
        peaks.append(max(peaks[-1], sum(size for at, size in alive if at not in before)))

    gc.collect()
    gc.freeze()  # the collector need not show again what was there before
    hook = nn.modules.module.register_module_forward_hook(look)
    try:
        yield peaks
    finally:
        hook.remove()
        gc.unfreeze()


def test_one_activation_of_the_picture_and_some_strips_are_alive() -> None:
    vae = codec(**AS_SDXL, mid_block_add_attention=False)
    image, latents = picture(1600, 32).float(), torch.randn(1, 4, 200, 4)
    one_activation = 4 * 8 * 1600 * 32
    expected = tiled_codec_bytes(vae, 1600, 32, 64 * 32)
    with most_alive() as peaks:
        encode_in_tiles(vae, image, 64 * 32)
    assert one_activation < peaks[-1] < expected
    with most_alive() as peaks:
        decode_in_tiles(vae, latents, 64 * 32)
    assert one_activation < peaks[-1] < expected
    with most_alive() as peaks:
        decoded(vae, latents)
    assert peaks[-1] > 2 * expected


MEASURE = """
import json, resource, sys, time
import torch
from bokehdiff.pipelines.tiled_codec import *
from tests.tiny_models import tiny_vae

task, way, height, width, tile_pixels, changes = json.loads(sys.argv[1])
torch.set_grad_enabled(False)
vae = tiny_vae(**changes)

def run(height, width):
    image = torch.rand(1, 3, height, width)
    latents = torch.randn(1, 4, height // 8, width // 8)
    if way == "tiled":
        whole = encode_in_tiles if task == "encode" else decode_in_tiles
        return whole(vae, image if task == "encode" else latents, tile_pixels)
    return vae.encode(image) if task == "encode" else vae.decode(latents)

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

run(64, 64)
before, start = peak(), time.process_time()
run(height, width)
print(json.dumps({
    "bytes": peak() - before,
    "seconds": time.process_time() - start,
    "expected": tiled_codec_bytes(vae, height, width, tile_pixels),
}))
"""


def measured(*given: Any) -> dict[str, float]:
    """Bytes at the peak and seconds of processor time, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(given)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts kilobytes as Linux does")
@pytest.mark.parametrize("task", ["encode", "decode"])
def test_memory_at_the_peak(task: str) -> None:
    """A quarter of the channels of SDXL at 2 megapixels, where strips are beyond what malloc
    keeps for itself; without attention, whose time grows with the square of the pixels."""
    changes = {**SDXL, "block_out_channels": (32, 64, 128, 128), "mid_block_add_attention": False}
    tiled = measured(task, "tiled", 1536, 1536, 2**19, changes)
    assert tiled["bytes"] < 1.1 * tiled["expected"]
    untiled = measured(task, "untiled", 1536, 1536, 2**19, changes)
    assert tiled["bytes"] < 0.6 * untiled["bytes"]


def test_which_pictures_are_cut() -> None:
    vae = tiny_vae()
    assert codec_strip_for(vae, "auto", 1024, 1024) is None
    assert codec_strip_for(vae, "auto", 4000, 6000) == DEFAULT_TILE_PIXELS
    assert codec_strip_for(vae, "official", 4000, 6000) == DEFAULT_TILE_PIXELS
    assert codec_strip_for(vae, 64, 128, 128) == 64**2
    assert codec_strip_for(vae, None, 4000, 6000) is None
    with_attention = tiny_vae(down_block_types=("AttnDownEncoderBlock2D",) * 4)
    assert codec_strip_for(with_attention, "auto", 4000, 6000) is None
    vae.enable_tiling()
    assert codec_strip_for(vae, "auto", 4000, 6000) is None
    vae.disable_tiling()
    with torch.enable_grad():
        assert codec_strip_for(vae, "auto", 4000, 6000) is None

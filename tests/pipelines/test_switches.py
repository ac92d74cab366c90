"""The switches of diffusers: what they change, that PISA outlives them, and what is refused.

``docs/switches.md`` is the table of these tests. "sdxl" is a tiny Stable Diffusion XL of real
classes with random weights, "tiny" the checkpoint inside the package.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from diffusers import (
    PipelineQuantizationConfig,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.callbacks import PipelineCallback, SDXLCFGCutoffCallback
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from bokehdiff import TINY, BokehDiffPipeline
from bokehdiff.attention import PisaAttnProcessor, PisaConfig, install_pisa, remove_pisa
from tests.conftest import REPOSITORY
from tests.tiny_models import photo_and_disparity, tiny_sdxl_components, tiny_stock_pipeline

DF, K = 0.8, 20.0
ROUNDING = 1e-4
"""Sums in another order differ by some 1e-7; random networks amplify that a hundredfold."""

Make = Callable[[], BokehDiffPipeline]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Make:
    folder = tmp_path_factory.mktemp("vocabulary")
    return lambda: BokehDiffPipeline(**tiny_sdxl_components(folder))


def tiny() -> BokehDiffPipeline:
    return BokehDiffPipeline.from_pretrained(TINY)


@pytest.fixture(params=["sdxl", "tiny"])
def make(request: pytest.FixtureRequest, sdxl: Make) -> Make:
    return sdxl if request.param == "sdxl" else tiny


@pytest.fixture(autouse=True)
def single_thread(one_thread: None) -> None:
    """Every test runs on one thread: the pictures are small."""


def render(pipe: BokehDiffPipeline, size: tuple[int, int] = (32, 48), **changes: Any) -> Tensor:
    photo, disparity = photo_and_disparity(*size, seed=changes.pop("seed", 0))
    options = {"df": DF, "K": K, "output_type": "pt", **changes}
    return pipe(photo, disparity, **options).images


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def processors(unet: nn.Module, layers: str) -> tuple[set[type], set[type]]:
    """The classes of the processors in the layers with PISA, and in all others."""
    found: tuple[set[type], set[type]] = (set(), set())
    for name, processor in unet.attn_processors.items():
        inside = any(one in name for one in layers.split(",")) and "attn2" not in name
        found[0 if inside else 1].add(type(processor))
    return found


@contextlib.contextmanager
def pisa_outlives(pipe: BokehDiffPipeline) -> Iterator[None]:
    """PISA, its backend and its settings are the same before and after, and by name in place."""
    context = pipe.verify_pisa()
    context.backend = "local"
    context.set_hardness(300)
    settings = context.config
    yield
    assert pipe.verify_pisa() is context
    assert context.backend == "local" and context.config == settings
    assert processors(pipe.unet, pipe.config.pisa_layers)[0] == {PisaAttnProcessor}


# -- Processors ----------------------------------------------------------------------------------


def test_attention_slicing(sdxl: Make) -> None:
    pipe = sdxl()
    layers = pipe.config.pisa_layers
    before = render(pipe)
    with pisa_outlives(pipe):
        pipe.enable_attention_slicing("max")
    assert processors(pipe.unet, layers)[1] == {SlicedAttnProcessor}
    pipe.install_pisa()
    assert difference(render(pipe), before) < ROUNDING
    with pisa_outlives(pipe):
        pipe.disable_attention_slicing()
    assert processors(pipe.unet, layers)[1] == {AttnProcessor2_0}


def test_attention_slicing_has_nothing_to_slice_in_tiny() -> None:
    pipe = tiny()
    before = render(pipe)
    with pisa_outlives(pipe):
        pipe.enable_attention_slicing()
    assert torch.equal(render(tiny()), before)


def test_what_a_switch_wants_of_a_pisa_layer_comes_to_light_when_pisa_goes(sdxl: Make) -> None:
    pipe = sdxl()
    pipe.enable_attention_slicing(1)
    remove_pisa(pipe.unet)
    assert {type(one) for one in pipe.unet.attn_processors.values()} == {SlicedAttnProcessor}
    pipe.install_pisa()
    pipe.disable_attention_slicing()
    remove_pisa(pipe.unet)
    assert {type(one) for one in pipe.unet.attn_processors.values()} == {AttnProcessor2_0}
    assert {type(one) for one in pipe.unet.modules() if "Pisa" in type(one).__name__} == set()


def test_set_attn_processor(make: Make) -> None:
    pipe = make()
    before = render(pipe)
    with pisa_outlives(pipe):
        pipe.unet.set_attn_processor(AttnProcessor())
    assert processors(pipe.unet, pipe.config.pisa_layers)[1] <= {AttnProcessor}
    pipe.install_pisa()
    assert difference(render(pipe), before) < ROUNDING


def test_set_default_attn_processor_is_refused_by_diffusers(sdxl: Make) -> None:
    pipe = sdxl()
    before = pipe.unet.attn_processors
    with pytest.raises(ValueError, match="Cannot call `set_default_attn_processor`.*Pisa"):
        pipe.unet.set_default_attn_processor()
    assert pipe.unet.attn_processors == before


@pytest.mark.skipif(importlib.util.find_spec("xformers") is not None, reason="xformers is there")
def test_xformers_missing(make: Make) -> None:
    pipe = make()
    before = pipe.unet.attn_processors
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'bokehdiff\[xformers\]'"):
        pipe.enable_xformers_memory_efficient_attention()
    assert pipe.unet.attn_processors == before
    with pisa_outlives(pipe):
        pipe.disable_xformers_memory_efficient_attention()


@pytest.mark.gpu
def test_xformers(sdxl: Make) -> None:
    pytest.importorskip("xformers")
    pipe = sdxl().to("cuda")
    before = render(pipe)
    try:
        with pisa_outlives(pipe):
            pipe.enable_xformers_memory_efficient_attention()
    except NotImplementedError as error:
        pytest.skip(f"no kernels of xformers for this GPU: {error}")
    pipe.install_pisa()
    assert difference(render(pipe), before) < 1e-2  # kernels of half precision multiply-adds


def test_set_attention_backend_does_nothing_to_these_networks(make: Make) -> None:
    pipe = make()
    before, installed = render(pipe), pipe.unet.attn_processors
    default = _AttentionBackendRegistry._active_backend
    try:
        with pisa_outlives(make()):
            pipe.unet.set_attention_backend("_native_math")
        # What it does change is the default of the process, for networks of other kinds.
        assert _AttentionBackendRegistry._active_backend.value == "_native_math"
        assert pipe.unet.attn_processors == installed
        assert torch.equal(render(pipe), before)
    finally:
        _AttentionBackendRegistry.set_active_backend(default)


def test_fused_projections(sdxl: Make) -> None:
    pipe = sdxl()
    layers = pipe.config.pisa_layers
    before = render(pipe)
    with pisa_outlives(pipe):
        pipe.fuse_qkv_projections()
    assert processors(pipe.unet, layers)[1] == {FusedAttnProcessor2_0}
    pipe.install_pisa()
    assert difference(render(pipe), before) < ROUNDING
    pipe.fuse_qkv_projections()
    with pisa_outlives(pipe):
        pipe.unfuse_qkv_projections()
    pipe.install_pisa()
    assert difference(render(pipe), before) < ROUNDING


def test_unfused_projections_leave_the_processors_of_before(sdxl: Make) -> None:
    pipe = sdxl()
    pipe.fuse_qkv_projections()
    pipe.unfuse_qkv_projections()
    remove_pisa(pipe.unet)
    assert {type(one) for one in pipe.unet.attn_processors.values()} == {AttnProcessor2_0}


@pytest.mark.parametrize(
    ("switch", "arguments", "message"),
    [
        ("fuse_qkv_projections", (), "LightTransportUNet has no such layers"),
        ("enable_freeu", (0.9, 0.2, 1.2, 1.4), "LightTransportUNet has no such layers"),
        ("disable_freeu", (), "LightTransportUNet has no such layers"),
        ("load_ip_adapter", ("owner/adapter", "models", "one.bin"), "no second picture"),
        ("set_ip_adapter_scale", (0.5,), "no scale to set"),
    ],
)
def test_tiny_refuses_before_anything_changes(
    switch: str, arguments: tuple[Any, ...], message: str
) -> None:
    pipe = tiny()
    before = pipe.unet.attn_processors
    with pytest.raises(ValueError, match=message):
        getattr(pipe, switch)(*arguments)
    assert pipe.unet.attn_processors == before
    with pytest.raises(ValueError, match="AutoencoderSpaceToDepth has no attention"):
        pipe.fuse_qkv_projections(unet=False)


def test_freeu_changes_the_picture_and_can_be_undone(sdxl: Make) -> None:
    pipe = sdxl()
    before = render(pipe)
    with pisa_outlives(pipe):
        pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    pipe.install_pisa()
    assert difference(render(pipe), before) > ROUNDING
    pipe.disable_freeu()
    assert torch.equal(render(pipe), before)


# -- IP-Adapters ---------------------------------------------------------------------------------


def ip_adapter(unet: UNet2DConditionModel) -> dict[str, dict[str, Tensor]]:
    """An IP-Adapter of the original kind, four tokens per picture, with random weights."""
    torch.manual_seed(0)
    channels = unet.config.cross_attention_dim
    cross = [one for name, one in unet.named_modules() if name.endswith("attn2")]
    return {
        "image_proj": {
            "proj.weight": torch.randn(4 * channels, 24),
            "proj.bias": torch.zeros(4 * channels),
            "norm.weight": torch.ones(channels),
            "norm.bias": torch.zeros(channels),
        },
        "ip_adapter": {
            f"{2 * index + 1}.to_{which}_ip.weight": torch.randn(layer.inner_dim, channels)
            # The adapter numbers layers in the order in which the UNet lists its processors.
            for index, layer in enumerate(cross)
            for which in "kv"
        },
    }


def tiny_image_encoder() -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            projection_dim=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
    ).eval()


def test_ip_adapters_are_refused_before_anything_changes(sdxl: Make) -> None:
    pipe = sdxl()
    pipe.register_modules(image_encoder=tiny_image_encoder())
    before, installed = render(pipe), pipe.unet.attn_processors
    with pytest.raises(ValueError, match="BokehDiffPipeline takes no IP-Adapter"):
        pipe.load_ip_adapter(ip_adapter(pipe.unet), subfolder="", weight_name="")
    with pytest.raises(ValueError, match="no scale to set"):
        pipe.set_ip_adapter_scale(0.5)
    assert pipe.unet.attn_processors == installed
    assert torch.equal(render(pipe), before)


def test_an_ip_adapter_in_a_shared_unet_is_noticed_and_can_be_taken_out(
    sdxl: Make, tmp_path: Path
) -> None:
    stock = tiny_stock_pipeline(tmp_path)
    pipe = BokehDiffPipeline.from_pipe(stock)
    before = render(pipe)
    stock.register_modules(image_encoder=tiny_image_encoder())
    with pisa_outlives(pipe):
        stock.load_ip_adapter(ip_adapter(stock.unet), subfolder="", weight_name="")
    kinds = processors(pipe.unet, pipe.config.pisa_layers)[1]
    assert kinds == {AttnProcessor2_0, IPAdapterAttnProcessor2_0}
    with pytest.raises(ValueError, match=r"Call unload_ip_adapter\(\) first"):
        render(pipe)
    with pisa_outlives(pipe):
        pipe.unload_ip_adapter()
    pipe.install_pisa()
    assert torch.equal(render(pipe), before)


# -- The codec -----------------------------------------------------------------------------------


def test_vae_slicing_changes_nothing(sdxl: Make) -> None:
    pipe = sdxl()
    photo, disparity = photo_and_disparity(32, 48)
    before = pipe([photo] * 2, [disparity] * 2, DF, K, output_type="pt").images
    pipe.vae.enable_slicing()
    after = pipe([photo] * 2, [disparity] * 2, DF, K, output_type="pt").images
    assert difference(after, before) < ROUNDING


def test_vae_tiling_changes_nothing_up_to_the_size_of_a_tile(sdxl: Make) -> None:
    pipe = sdxl()
    before = {size: render(pipe, size) for size in ((32, 32), (80, 64))}
    pipe.vae.enable_tiling()
    assert pipe.vae.tile_sample_min_size == 32
    assert torch.equal(render(pipe, (32, 32)), before[32, 32])
    tiled = render(pipe, (80, 64))
    assert tiled.isfinite().all() and tiled.shape == before[80, 64].shape
    # Tiles of diffusers have statistics of their own: larger pictures are not the same.
    assert difference(tiled, before[80, 64]) > 0
    assert not hasattr(tiny().vae, "enable_tiling"), "the codec of TINY has no layers to tile"


# -- Memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.skipif(
    torch.accelerator.is_available(), reason="there is a device for diffusers to offload from"
)
def test_cpu_offload_without_a_device_is_refused_by_diffusers(make: Make, switch: str) -> None:
    pipe = make()
    with pytest.raises(RuntimeError, match=f"`{switch}` requires accelerator"):
        getattr(pipe, switch)()
    assert torch.equal(render(pipe), render(make()))


def test_model_cpu_offload_with_the_cpu_as_device(make: Make) -> None:
    pipe = make()
    before = render(make())
    with pisa_outlives(pipe):
        pipe.enable_model_cpu_offload(device="cpu")
    pipe.install_pisa()
    for _ in range(2):
        assert difference(render(pipe), before) < ROUNDING
    assert pipe._all_hooks, "hooks are put back after every call"
    pipe.remove_all_hooks()
    pipe.maybe_free_model_hooks()
    assert difference(render(pipe), before) < ROUNDING
    assert not any(hasattr(part, "_hf_hook") for part in pipe.components.values())


def test_sequential_cpu_offload_with_the_cpu_as_device(make: Make) -> None:
    """The hooks of enable_sequential_cpu_offload, which asks for another device than the CPU."""
    pipe = make()
    before = render(make())
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            accelerate.cpu_offload(
                part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0
            )
    assert all(one.is_meta for one in pipe.unet.parameters())
    for _ in range(2):
        assert difference(render(pipe), before) < ROUNDING
    assert pipe.verify_pisa()
    pipe.remove_all_hooks()
    assert not any(one.is_meta for one in pipe.unet.parameters())
    assert difference(render(pipe), before) < ROUNDING


@pytest.mark.gpu
@pytest.mark.parametrize("switch", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_cpu_offload_on_the_gpu(make: Make, switch: str) -> None:
    before = render(make().to("cuda")).cpu()
    pipe = make()
    with pisa_outlives(pipe):
        getattr(pipe, switch)()
    pipe.install_pisa()
    for _ in range(2):
        assert difference(render(pipe).cpu(), before) < 1e-3


GROUPS = [
    {"offload_type": "leaf_level"},
    {"offload_type": "block_level", "num_blocks_per_group": 1},
]


@pytest.mark.parametrize("options", GROUPS, ids=["leaf", "block"])
def test_group_offload(make: Make, options: dict[str, Any]) -> None:
    pipe = make()
    before = render(make())
    with pisa_outlives(pipe):
        pipe.enable_group_offload(torch.device("cpu"), **options)
    pipe.install_pisa()
    for _ in range(2):
        assert difference(render(pipe), before) < ROUNDING


@pytest.mark.parametrize("options", GROUPS, ids=["leaf", "block"])
def test_group_offload_to_disk(make: Make, options: dict[str, Any], tmp_path: Path) -> None:
    """On disk the weights are really gone between the uses: a forgotten one would show."""
    pipe = make()
    before = render(make())
    with pisa_outlives(pipe):
        pipe.enable_group_offload(
            torch.device("cpu"), offload_to_disk_path=tmp_path / "weights", **options
        )
    pipe.install_pisa()
    for _ in range(2):
        assert difference(render(pipe), before) < ROUNDING
    assert {one.name for one in (tmp_path / "weights").iterdir()} >= {"unet", "stored_prompt"} & {
        name for name, part in pipe.components.items() if part is not None
    }


@pytest.mark.parametrize("options", GROUPS, ids=["leaf", "block"])
def test_a_stored_prompt_outlives_offloading(
    sdxl: Make, options: dict[str, Any], tmp_path: Path
) -> None:
    """Its values are used after it has run, when they are on disk again."""
    whole = sdxl()
    parts = {name: whole.components[name] for name in ("vae", "unet", "scheduler")}
    pipe = BokehDiffPipeline(**parts, stored_prompt=whole.make_stored_prompt())
    pipe.enable_group_offload(torch.device("cpu"), offload_to_disk_path=tmp_path, **options)
    for _ in range(2):
        assert difference(render(pipe), render(sdxl())) < ROUNDING


def test_group_offload_leaves_out_what_is_excluded(sdxl: Make, tmp_path: Path) -> None:
    pipe = sdxl()
    pipe.enable_group_offload(
        torch.device("cpu"),
        offload_type="leaf_level",
        offload_to_disk_path=tmp_path,
        exclude_modules=["vae", "text_encoder", "text_encoder_2"],
    )
    assert {one.name for one in tmp_path.iterdir()} == {"unet"}
    assert difference(render(pipe), render(sdxl())) < ROUNDING
    with pytest.raises(ValueError, match="is not empty"):
        sdxl().enable_group_offload(
            torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=tmp_path
        )


def test_group_offload_of_the_unet_alone(make: Make) -> None:
    pipe = make()
    with pisa_outlives(pipe):
        pipe.unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    pipe.install_pisa()
    assert difference(render(pipe), render(make())) < ROUNDING


@pytest.mark.gpu
@pytest.mark.parametrize("options", [*GROUPS, {**GROUPS[0], "use_stream": True}])
def test_group_offload_on_the_gpu(make: Make, options: dict[str, Any]) -> None:
    before = render(make().to("cuda")).cpu()
    pipe = make()
    pipe.enable_group_offload(torch.device("cuda"), **options)
    for _ in range(2):
        assert difference(render(pipe).cpu(), before) < 1e-3


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_layerwise_casting(make: Make, part: str) -> None:
    """Stored in 8 bits, computed in 32: the same as if the weights had been rounded once."""
    pipe, rounded = make(), make()
    with pisa_outlives(pipe):
        getattr(pipe, part).enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    pipe.install_pisa()
    values = getattr(pipe, part).state_dict()
    stored = [name for name, value in values.items() if value.dtype == torch.float8_e4m3fn]
    assert bool(stored) == bool(list(getattr(pipe, part).parameters(recurse=True))[1:])
    assert not [name for name in stored if name.startswith("light_transport")]
    getattr(rounded, part).load_state_dict({name: one.float() for name, one in values.items()})
    assert difference(render(pipe), render(rounded)) < ROUNDING
    assert getattr(pipe, part).state_dict().keys() == values.keys()


def test_quantization_config(make: Make, tmp_path: Path) -> None:
    """Eight bits per weight: each is off by at most 1/254 of the largest of its row."""
    pytest.importorskip("torchao")
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    make().save_pretrained(tmp_path)
    wanted = BokehDiffPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    mapping = {"unet": TorchAoConfig(Int8WeightOnlyConfig())}
    pipe = BokehDiffPipeline.from_pretrained(
        tmp_path,
        dtype=torch.bfloat16,
        quantization_config=PipelineQuantizationConfig(quant_mapping=mapping),
    )
    linear = [one for one in pipe.unet.modules() if isinstance(one, nn.Linear)]
    kinds = {type(one.weight).__name__ for one in linear}
    # TINY has no linear layers but those of the light transport, which keep their float32.
    assert ("Int8Tensor" in kinds) == isinstance(pipe.unet, UNet2DConditionModel)
    assert pipe.verify_pisa()
    assert float((render(pipe) - render(wanted)).abs().mean()) < 0.02


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bitsandbytes_without_a_gpu_is_refused_by_diffusers() -> None:
    config = PipelineQuantizationConfig(
        quant_backend="bitsandbytes_8bit",
        quant_kwargs={"load_in_8bit": True},
        components_to_quantize=["unet"],
    )
    with pytest.raises((RuntimeError, ImportError), match="GPU|bitsandbytes"):
        BokehDiffPipeline.from_pretrained(TINY, quantization_config=config)


def test_device_maps(make: Make, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    wanted = render(BokehDiffPipeline.from_pretrained(tmp_path))
    for device_map in ("cpu", "balanced") if not torch.cuda.is_available() else ("cpu",):
        pipe = BokehDiffPipeline.from_pretrained(tmp_path, device_map=device_map)
        assert torch.equal(render(pipe), wanted)
        pipe.reset_device_map()
        assert pipe.hf_device_map is None
        assert torch.equal(render(pipe), wanted)


# -- Precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["to", "from_pretrained"])
def test_half_precision(make: Make, dtype: torch.dtype, way: str, tmp_path: Path) -> None:
    """Some sixty layers round in turn: independent errors of eps / 2 add up to eight of them."""
    exact = render(make(), preserve_detail=False)
    if way == "to":
        pipe = make()
        with pisa_outlives(pipe):
            pipe.to(dtype)
        pipe.install_pisa()
    else:
        make().save_pretrained(tmp_path)
        pipe = BokehDiffPipeline.from_pretrained(tmp_path, dtype=dtype)
    rounded = render(pipe, preserve_detail=False)
    assert pipe.unet.dtype == pipe.vae.dtype == dtype and rounded.dtype == torch.float32
    error = float((rounded - exact).square().mean().sqrt())
    assert error < 8 * torch.finfo(dtype).eps * float(exact.square().mean().sqrt())


# -- Compiling -----------------------------------------------------------------------------------

SCENES = [
    {"size": (32, 48), "df": 0.8, "seed": 0},
    {"size": (32, 48), "df": 0.2, "seed": 1},
    {"size": (48, 32), "df": 0.5, "seed": 2},
]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_compile_is_one_graph_for_every_scene(sdxl: Make, fresh_compiler: None) -> None:
    pipe = sdxl()
    before = [render(pipe, **scene) for scene in SCENES]
    counter = CompileCounterWithBackend("eager")
    with pisa_outlives(pipe):
        pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend=counter)
    pipe.install_pisa()
    for scene, wanted in zip(SCENES, before, strict=True):
        assert difference(render(pipe, **scene), wanted) < ROUNDING
    # One graph for the first size, one for any: never one for a scene.
    assert counter.frame_count <= 2
    remove_pisa(pipe.unet)
    with pytest.raises(RuntimeError, match="PISA is missing"):
        render(pipe)


@pytest.mark.slow
def test_unet_compile_in_place(sdxl: Make, fresh_compiler: None) -> None:
    pipe = sdxl()
    before = render(pipe)
    with pisa_outlives(pipe):
        pipe.unet.compile(fullgraph=True, backend="eager")
    pipe.install_pisa()
    assert difference(render(pipe), before) < ROUNDING


def test_compile_repeated_blocks(make: Make, fresh_compiler: None) -> None:
    pipe = make()
    before = [render(pipe, **scene) for scene in SCENES]
    counter = CompileCounterWithBackend("eager")
    with pisa_outlives(pipe):
        pipe.unet.compile_repeated_blocks(fullgraph=True, backend=counter)
    pipe.install_pisa()
    for scene, wanted in zip(SCENES, before, strict=True):
        assert difference(render(pipe, **scene), wanted) < ROUNDING
    assert counter.frame_count > 0


@pytest.mark.slow
def test_tiny_compiles_around_the_light_transport(fresh_compiler: None) -> None:
    pipe = tiny()
    before = [render(pipe, **scene) for scene in SCENES]
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    for scene, wanted in zip(SCENES, before, strict=True):
        assert difference(render(pipe, **scene), wanted) < ROUNDING


def test_tiny_is_no_single_graph(fresh_compiler: None) -> None:
    pipe = tiny()
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="slabs"):
        render(pipe)


# -- Pipelines that share a UNet -----------------------------------------------------------------


def test_from_pipe_of_stock_sdxl_and_back(tmp_path: Path) -> None:
    stock = tiny_stock_pipeline(tmp_path)
    options = {"num_inference_steps": 1, "height": 32, "width": 32, "output_type": "np"}

    def picture(pipe: StableDiffusionXLPipeline) -> np.ndarray:
        return pipe("a", generator=torch.Generator().manual_seed(0), **options).images

    wanted = picture(stock)
    pipe = BokehDiffPipeline.from_pipe(stock)
    before = render(pipe)
    back = StableDiffusionXLPipeline.from_pipe(pipe)
    assert back.unet is pipe.unet is stock.unet
    for other in (stock, back):
        with pytest.raises(RuntimeError, match=r"in a stock pipeline.*remove_pisa\(unet\)"):
            picture(other)
    remove_pisa(back.unet)
    for other in (stock, back):
        assert np.array_equal(picture(other), wanted)
    with pytest.raises(
        RuntimeError, match=r"remove_pisa took it out.*install_pisa\(\) of the pipe"
    ):
        render(pipe)
    pipe.install_pisa()
    assert torch.equal(render(pipe), before)


def test_a_stock_pipeline_may_switch_the_shared_unet(tmp_path: Path) -> None:
    stock = tiny_stock_pipeline(tmp_path)
    pipe = BokehDiffPipeline.from_pipe(stock)
    before = render(pipe)
    with pisa_outlives(pipe):
        stock.enable_attention_slicing()
        stock.fuse_qkv_projections()
    pipe.install_pisa()
    assert difference(render(pipe), before) < ROUNDING


def test_settings_without_a_scene_leave_stock_sdxl_as_it_is(tmp_path: Path) -> None:
    stock = tiny_stock_pipeline(tmp_path)
    options = {"num_inference_steps": 1, "height": 32, "width": 32, "output_type": "np"}
    wanted = stock("a", generator=torch.Generator().manual_seed(0), **options).images
    settings = PisaConfig.preset("paper").replace(missing_conditioning="vanilla")
    BokehDiffPipeline.from_pipe(stock, pisa=settings.to_dict())
    found = stock("a", generator=torch.Generator().manual_seed(0), **options).images
    assert np.array_equal(found, wanted)


def test_our_own_network_does_not_convert_to_stock_sdxl() -> None:
    with pytest.raises(ValueError, match="expected"):
        StableDiffusionXLPipeline.from_pipe(tiny())


def test_pipelines_with_different_settings_share_a_unet(make: Make) -> None:
    pipe = make()
    settings = PisaConfig.preset("paper").replace(hardness=4.0)
    alone = make()
    alone.verify_pisa().config = settings
    wanted = render(pipe), render(alone)
    assert difference(*wanted) > ROUNDING
    other = BokehDiffPipeline.from_pipe(pipe, pisa=settings.to_dict())
    assert other.unet is pipe.unet
    for _ in range(2):
        assert torch.equal(render(other), wanted[1])
        assert torch.equal(render(pipe), wanted[0])


def test_pisa_installed_by_hand_is_in_force(make: Make) -> None:
    pipe = make()
    settings = PisaConfig.preset("paper").replace(hardness=4.0)
    context = install_pisa(pipe.unet, pipe.pisa_layer_names, settings)
    assert pipe.verify_pisa() is context


def test_another_unet_is_noticed(make: Make) -> None:
    pipe, other = make(), make()
    before = render(pipe)
    remove_pisa(other.unet)
    pipe.unet = other.unet
    with pytest.raises(RuntimeError, match="or the UNet is another one"):
        render(pipe)
    pipe.install_pisa()
    assert torch.equal(render(pipe), before)
    pipe.register_modules(unet=make().unet)  # that of another pipeline, with its PISA
    assert torch.equal(render(pipe), before)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_are_pipelines_of_their_own(make: Make, way: Callable[[Any], Any]) -> None:
    pipe = make()
    # Before the first call: transformers cannot pickle a text encoder that has run.
    other = way(pipe)
    before = render(pipe)
    assert other.verify_pisa() is not pipe.verify_pisa()
    assert torch.equal(render(other), before)
    other.enable_attention_slicing()
    other.verify_pisa().set_hardness(2)
    assert difference(render(other), before) > 0
    assert torch.equal(render(pipe), before)
    assert difference(render(copy.deepcopy(other)), render(other)) == 0


def test_save_and_load_after_the_switches(make: Make, tmp_path: Path) -> None:
    pipe = make()
    pipe.enable_attention_slicing()
    before = render(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = BokehDiffPipeline.from_pretrained(tmp_path)
    assert loaded.config.pisa == pipe.config.pisa
    assert loaded.components.keys() == pipe.components.keys()
    assert difference(render(loaded), before) < ROUNDING
    again = BokehDiffPipeline(
        **pipe.components, pisa_layers=pipe.config.pisa_layers, pisa=pipe.config.pisa
    )
    assert difference(render(again), before) < ROUNDING


def test_threads_do_not_see_each_others_scenes(make: Make) -> None:
    pipe = make()
    other = BokehDiffPipeline.from_pipe(pipe)
    wanted = [render(pipe, **scene) for scene in SCENES]
    found: list[list[Tensor]] = [[] for _ in SCENES]

    def work(index: int) -> None:
        for turn in range(4):
            found[index].append(render((pipe, other)[turn % 2], **SCENES[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(SCENES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, rendered in zip(wanted, found, strict=True):
        assert len(rendered) == 4
        assert all(difference(other, one) < ROUNDING for other in rendered)


# -- The call ------------------------------------------------------------------------------------


def test_output_types(make: Make) -> None:
    pipe = make()
    options = {"preserve_detail": False}
    tensor = render(pipe, (30, 42), **options)
    array = render(pipe, (30, 42), output_type="np", **options)
    assert torch.equal(torch.from_numpy(array).permute(0, 3, 1, 2), tensor)
    (picture,) = render(pipe, (30, 42), output_type="pil", **options)
    assert np.array_equal(np.asarray(picture), np.rint(255 * array[0]))
    latents = render(pipe, (30, 42), output_type="latent", **options)
    decoded = pipe.decode_latents(latents)[..., :30, :42] / 2 + 0.5
    assert torch.equal(decoded.clamp(0, 1), tensor)


def test_a_batch_of_different_focus_and_blur_is_its_single_calls(make: Make) -> None:
    pipe = make()
    photos, maps = zip(*(photo_and_disparity(32, 48, seed=seed) for seed in range(3)), strict=True)
    focus, strength = [0.1, 0.5, 0.8], [3.0, 30.0, 0.0]
    together = pipe(list(photos), list(maps), focus, strength, output_type="pt").images
    for index, one in enumerate(together):
        alone = pipe(
            photos[index], maps[index], focus[index], strength[index], output_type="pt"
        ).images[0]
        assert difference(one, alone) < ROUNDING


def test_callback_sees_and_replaces_the_latents(make: Make) -> None:
    pipe = make()
    latents = render(pipe, output_type="latent")
    seen: list[tuple[Any, ...]] = []

    def look(*given: Any) -> dict[str, Any]:
        seen.append(given)
        return {"latents": 2 * given[3]["latents"]}

    assert torch.equal(pipe.call_back(latents, look, ["latents"]), 2 * latents)
    ((given_pipe, step, timestep, values),) = seen
    assert given_pipe is pipe and step == 0 and int(timestep) == pipe.config.timestep
    assert torch.equal(values["latents"], latents) and list(values) == ["latents"]
    assert pipe.call_back(latents, None, ["latents"]) is latents
    assert pipe.call_back(latents, lambda pipe, step, timestep, values: values, []) is latents
    assert pipe.num_timesteps == 1 and pipe.interrupt is False


class Halving(PipelineCallback):
    """A callback in the form of a class of diffusers."""

    tensor_inputs = ["latents"]

    def callback_fn(
        self, pipeline: Any, step_index: int, timesteps: Tensor, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        return {"latents": callback_kwargs["latents"] / 2}


def test_callback_objects_of_diffusers(make: Make) -> None:
    pipe = make()
    latents = render(pipe, output_type="latent")
    pipe.check_callback(Halving(), [])
    assert torch.equal(pipe.call_back(latents, Halving(), []), latents / 2)
    with pytest.raises(ValueError, match="asks for prompt_embeds"):
        pipe.check_callback(SDXLCFGCutoffCallback(), ["latents"])


def test_callbacks_that_cannot_be_meant() -> None:
    pipe = tiny()
    latents = torch.zeros(1, 12, 4, 4)
    with pytest.raises(ValueError, match="callback_on_step_end is a str"):
        pipe.check_callback("print", ["latents"])
    with pytest.raises(ValueError, match="asks for noise_pred"):
        pipe.check_callback(print, ["latents", "noise_pred"])
    with pytest.raises(ValueError, match="returned a NoneType"):
        pipe.call_back(latents, lambda *given: None, ["latents"])
    with pytest.raises(ValueError, match=r"latents of shape \(1, 12, 2, 2\)"):
        pipe.call_back(latents, lambda *given: {"latents": latents[..., :2, :2]}, ["latents"])


# -- The table -----------------------------------------------------------------------------------


def test_every_row_of_the_table_names_its_tests() -> None:
    lines = (REPOSITORY / "docs" / "switches.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert len(rows) > 20
    named: set[str] = set()
    for row in rows:
        tests = re.findall(r"`(test_\w+)`", row.rsplit("|", 2)[-2])
        assert tests, f"no test: {row}"
        named.update(tests)
    here = {name for name in globals() if name.startswith("test_")}
    beside = {
        name
        for file in Path(__file__).parent.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.M)
    }
    assert named <= beside
    assert here - named == {"test_every_row_of_the_table_names_its_tests"}

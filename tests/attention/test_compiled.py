"""A UNet with PISA under torch.compile: one graph, without breaks, for every scene."""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from bokehdiff.attention import PisaConfig, PisaContext, PisaGeometry, install_pisa, pisa_attention
from bokehdiff.attention.backends import Backend
from bokehdiff.attention.compiled import pisa_attention_in_graph

LATENT = (8, 12)
"""Latent pixels; the layer has half as many tokens on each side."""
TOLERANCE = 1e-5
"""Compilers sum in another order; between equal graphs of `aot_eager` nothing differs."""

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler on the CPU, and there is no g++ or clang++",
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before counts, and scenes that would need another graph are errors."""
    torch._dynamo.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def _unet() -> UNet2DConditionModel:
    """A UNet of two blocks with `down_blocks.1.attentions.0`: what is quick to compile."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def _compile(model: Callable[..., Any], backend: str = "aot_eager") -> tuple[Any, Any]:
    """The model compiled as one graph, and the counter of its graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter), counter


def _set_scene(context: PisaContext, seed: int) -> None:
    disparity, coc_pixels = _disparity_and_coc(seed)
    context.set_scene(disparity, coc_pixels, *LATENT, vae_scale_factor=8)


def _disparity_and_coc(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    disparity, coc = torch.rand(2, 1, 1, 8 * LATENT[0], 8 * LATENT[1], generator=generator)
    # Circles of all sizes: which tiles reach which is not the same in any two scenes.
    return disparity, 60 * coc**seed


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    latent = torch.randn(1, 4, *LATENT, generator=generator)
    return latent, torch.tensor([499]), torch.randn(1, 3, 8, generator=generator)


def _run(unet: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return unet(*_inputs(), **options).sample


def _gradients(unet: Any, parameters: list[Tensor]) -> list[Tensor]:
    latent, *others = _inputs()
    latent.requires_grad_()
    loss = unet(latent, *others).sample.square().sum()
    return list(torch.autograd.grad(loss, [latent, *parameters]))


def _pisa_parameters(unet: UNet2DConditionModel) -> list[Tensor]:
    """The weights of the layer that PISA is in, which LoRA trains."""
    layer = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1
    return list(layer.parameters())


def test_one_graph_serves_all_scenes() -> None:
    unet = _unet()
    context = install_pisa(unet)
    compiled, counter = _compile(unet)
    outputs = []
    for seed in range(1, 4):
        _set_scene(context, seed)
        outputs.append(_run(compiled))
        torch.testing.assert_close(outputs[-1], _run(unet), rtol=0, atol=TOLERANCE)
    assert counter.frame_count == 1
    assert min(float((one - outputs[0]).abs().max()) for one in outputs[1:]) > 1e-4


def test_the_graph_follows_the_settings_of_the_context() -> None:
    """Hardness grows in training, and the backend may change."""
    unet = _unet()
    context = install_pisa(unet)
    _set_scene(context, 1)
    compiled, counter = _compile(unet)
    sharp = _run(compiled)
    context.set_hardness(1)
    soft = _run(compiled)
    assert (soft - sharp).abs().max() > 1e-4
    torch.testing.assert_close(soft, _run(unet), rtol=0, atol=TOLERANCE)
    context.backend = "reference"
    torch.testing.assert_close(_run(compiled), soft, rtol=0, atol=TOLERANCE)
    assert counter.frame_count == 1


def _scene_by_keyword(keyword: str, seed: int) -> dict[str, Any]:
    disparity, coc_pixels = _disparity_and_coc(seed)
    if keyword == "disp_coc":
        return {"disp_coc": torch.cat([disparity, coc_pixels / 10], dim=1)}
    return {"pisa_geometry": PisaGeometry.build(coc_pixels[..., ::16, ::16] / 16, disparity)}


@pytest.mark.parametrize("keyword", ["pisa_geometry", "disp_coc"])
def test_one_graph_of_a_layer_serves_all_scenes_passed_by_keyword(keyword: str) -> None:
    unet = _unet()
    install_pisa(unet)
    layer = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1
    compiled, counter = _compile(layer)
    states = torch.randn(1, LATENT[0] * LATENT[1] // 4, 16)
    outputs = []
    for seed in (1, 2):
        options = _scene_by_keyword(keyword, seed)
        with torch.no_grad():
            outputs.append(compiled(states, **options))
            expected = layer(states, **options)
        torch.testing.assert_close(outputs[-1], expected, rtol=0, atol=TOLERANCE)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4
    assert counter.frame_count == 1


@pytest.mark.parametrize("keyword", ["pisa_geometry", "disp_coc"])
def test_scenes_may_be_passed_to_a_compiled_unet_by_keyword(keyword: str) -> None:
    """In several graphs: diffusers logs that other layers do not know the keyword."""
    unet = _unet()
    install_pisa(unet)
    compiled = torch.compile(unet, backend="aot_eager")
    outputs = []
    for seed in (1, 2):
        options = {"cross_attention_kwargs": _scene_by_keyword(keyword, seed)}
        with torch._dynamo.config.patch(error_on_recompile=False):
            outputs.append(_run(compiled, **options))
        expected = _run(unet, **options)
        torch.testing.assert_close(outputs[-1], expected, rtol=0, atol=TOLERANCE)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4


def test_gradients_are_those_of_eager_mode() -> None:
    unet = _unet()
    context = install_pisa(unet)
    compiled, counter = _compile(unet)
    gradients = []
    for seed in (1, 2):
        _set_scene(context, seed)
        gradients.append(_gradients(compiled, _pisa_parameters(unet)))
        expected = _gradients(unet, _pisa_parameters(unet))
        for found, one in zip(gradients[-1], expected, strict=True):
            largest = float(one.abs().max())
            assert largest > 0 or one is expected[-1]
            assert (found - one).abs().max() <= TOLERANCE * max(largest, 1.0)
    assert (gradients[0][0] - gradients[1][0]).abs().max() > 1e-4
    assert counter.frame_count == 1


def test_gradient_checkpointing_changes_nothing() -> None:
    unet = _unet().train()
    context = install_pisa(unet)
    _set_scene(context, 1)
    expected = _gradients(unet, _pisa_parameters(unet))
    unet.enable_gradient_checkpointing()
    assert all(map(torch.equal, _gradients(unet, _pisa_parameters(unet)), expected))
    compiled, _ = _compile(unet)
    for found, one in zip(_gradients(compiled, _pisa_parameters(unet)), expected, strict=True):
        assert (found - one).abs().max() <= TOLERANCE * max(float(one.abs().max()), 1.0)


@pytest.mark.parametrize("backend", ["auto", "stream", "local", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backend_computes_inside_a_graph_what_it_does_outside(
    backend: Backend, dtype: torch.dtype
) -> None:
    context = PisaContext(backend=backend)
    _set_scene(context, 1)
    tokens = LATENT[0] * LATENT[1] // 4
    tensors = torch.randn(3, 2, 2, tokens, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    geometry = context.geometry_for(tokens)
    assert geometry is not None

    def in_graph(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pisa_attention_in_graph(q, k, v, context.handle, None, 0.5)

    def outside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pisa_attention(q, k, v, geometry, scale=0.5, backend=backend)

    results = []
    for function in (outside, in_graph, _compile(in_graph)[0]):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert [result.dtype for result in results[0]] == [dtype] * 4
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))


def test_copies_are_owners_of_their_own() -> None:
    """Copies and pickles of geometry, context and whole UNet answer for themselves."""
    geometry = PisaGeometry.build(2 * torch.rand(1, 1, 6, 7), torch.rand(1, 1, 12, 14))
    q, k, v = torch.randn(3, 1, 2, 42, 4)
    expected = pisa_attention(q, k, v, geometry, scale=0.5)
    copies = [copy.copy(geometry), copy.deepcopy(geometry), pickle.loads(pickle.dumps(geometry))]
    handles = {int(one.handle) for one in [geometry, *copies]}
    assert len(handles) == 4
    del geometry
    for one in copies:
        found = pisa_attention_in_graph(q, k, v, one.handle, None, 0.5)
        assert torch.equal(found, expected)

    context = PisaContext(PisaConfig(hardness=50.0))
    _set_scene(context, 1)
    for other in (copy.deepcopy(context), pickle.loads(pickle.dumps(context))):
        assert int(other.handle) != int(context.handle)
        assert other.config == context.config and other.has_scene


def test_a_copied_unet_has_a_scene_of_its_own() -> None:
    unet = _unet()
    context = install_pisa(unet)
    _set_scene(context, 1)
    other = copy.deepcopy(unet)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor"
    other_context = other.attn_processors[name].context
    assert other_context is not context
    _set_scene(other_context, 2)
    compiled, _ = _compile(unet)
    first = _run(compiled)
    torch._dynamo.reset()
    other_compiled, _ = _compile(other)
    torch.testing.assert_close(_run(other_compiled), _run(other), rtol=0, atol=TOLERANCE)
    assert (_run(other) - first).abs().max() > 1e-4


def test_a_handle_whose_owner_is_gone_is_refused() -> None:
    geometry = PisaGeometry.build(torch.ones(1, 1, 3, 4))
    handle = geometry.handle
    q = torch.randn(1, 1, 12, 4)
    assert pisa_attention_in_graph(q, q, q, handle, None, 0.5).isfinite().all()
    del geometry
    gc.collect()
    with pytest.raises(RuntimeError, match="is gone; compile the model again after install_pisa"):
        pisa_attention_in_graph(q, q, q, handle, None, 0.5)


def test_without_a_scene_the_error_is_the_usual_one() -> None:
    unet = _unet()
    context = install_pisa(unet)
    compiled, _ = _compile(unet)
    with pytest.raises(RuntimeError, match="PISA needs the scene: call context.set_scene"):
        _run(compiled)
    _set_scene(context, 1)
    torch.testing.assert_close(_run(compiled), _run(unet), rtol=0, atol=TOLERANCE)
    context.clear()
    with pytest.raises(RuntimeError, match="PISA needs the scene: call context.set_scene"):
        _run(compiled)


@pytest.mark.parametrize(
    "changes", [{"missing_conditioning": "vanilla"}, {"dropout": 0.5, "dropout_at_inference": True}]
)
def test_what_a_graph_cannot_do_is_refused(changes: dict[str, Any]) -> None:
    unet = _unet()
    context = install_pisa(unet, config=PisaConfig(**changes))
    if "dropout" in changes:
        _set_scene(context, 1)
    compiled, _ = _compile(unet)
    with pytest.raises(ValueError, match="'vanilla' and dropout are for eager mode"):
        _run(compiled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["heads first", "heads inside tokens"])
def test_the_operator_keeps_the_rules_of_torch(dtype: torch.dtype, layout: str) -> None:
    """Schema, shapes, strides and dtypes, and the gradient, as torch itself checks them."""
    geometry = PisaGeometry.build(2 * torch.rand(2, 1, 4, 5), torch.rand(2, 1, 8, 10))
    if layout == "heads first":
        tensors = torch.randn(3, 2, 2, 20, 4).to(dtype)
    else:
        tensors = torch.randn(3, 2, 20, 2, 4).to(dtype).transpose(2, 3)
    q, k, v = (tensor.requires_grad_() for tensor in tensors.unbind())
    torch.library.opcheck(pisa_attention_in_graph, (q, k, v, geometry.handle, None, 0.5))


@pytest.mark.slow
@needs_compiler
def test_compiled_to_machine_code() -> None:
    unet = _unet()
    context = install_pisa(unet)
    compiled, counter = _compile(unet, "inductor")
    parameters = _pisa_parameters(unet)
    for seed in (1, 2):
        _set_scene(context, seed)
        gradients = _gradients(compiled, parameters), _gradients(unet, parameters)
        for found, expected in zip(*gradients, strict=True):
            largest = max(float(expected.abs().max()), 1.0)
            assert (found - expected).abs().max() <= TOLERANCE * largest
    assert counter.frame_count == 1

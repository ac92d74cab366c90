from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bokehdiff.models.bokeh_adapter import (
    UNCONDITIONAL_STRENGTH,
    BokehAdapter,
    BokehCondition,
    BokehGrounding,
)
from tests.tiny_flux import WIDTH, tiny_flux_inputs, tiny_flux_transformer

RANK, CONTEXT_WIDTH = 4, 12
FLOAT64_TOLERANCE = 1e-12
"""Some hundred roundings of float64 on values of a few units."""

FLOAT32_TOLERANCE = 2e-6
"""Some ten roundings of float32 on values of a few units."""


def trained_adapter(
    transformer: FluxTransformer2DModel, *, alpha: float = 2.0, seed: int = 1
) -> BokehAdapter:
    """An adapter whose branches do something."""
    generator = torch.Generator().manual_seed(seed)
    adapter = BokehAdapter.for_transformer(
        transformer, rank=RANK, alpha=alpha, context_width=CONTEXT_WIDTH, generator=generator
    )
    with torch.no_grad():
        for block in adapter.blocks:
            for layer in block.layers():
                layer.up.weight.normal_(generator=generator)
    return adapter


def condition(adapter: BokehAdapter, *K: float, **options: Any) -> BokehCondition:
    return BokehCondition(adapter.embed(torch.tensor(K) / 30), **options)


def prediction(
    transformer: nn.Module, inputs: dict[str, Tensor], bokeh: BokehCondition | None = None
) -> Tensor:
    options = {} if bokeh is None else {"joint_attention_kwargs": {"bokeh": bokeh}}
    return transformer(**inputs, **options).sample


@functools.cache
def stock_prediction() -> Tensor:
    transformer = tiny_flux_transformer()
    with torch.no_grad():
        return prediction(transformer, tiny_flux_inputs(transformer))


# -- In float64, by hand -------------------------------------------------------------------------


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(..., tokens, channels) with each pair of channels turned by the angle of its token."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, 0::2], sin[:, 0::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def plain_attention(
    attention: FluxAttention,
    x: Tensor,
    text: Tensor | None,
    adapter: BokehAdapter,
    block: int,
    embedding: Tensor,
    *,
    lora_scale: float = 1.0,
    bokeh_scale: float = 1.0,
    pivot: list[int] | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Section 3.3 as it is written, with a real cross-attention to the one token of K."""
    values = dict(adapter.blocks[block].named_parameters())
    ratio = adapter.config.alpha / adapter.config.rank

    def low_rank(name: str, given: Tensor) -> Tensor:
        return ratio * given @ values[f"{name}.down.weight"].T @ values[f"{name}.up.weight"].T

    def linear(name: str, given: Tensor) -> Tensor:
        layer = attention.get_submodule(name)
        return given @ layer.weight.T + layer.bias

    def heads(given: Tensor) -> Tensor:
        return given.unflatten(-1, (attention.heads, -1)).transpose(1, 2)

    def normalised(name: str, given: Tensor) -> Tensor:
        norm = attention.get_submodule(name)
        return given / (given.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        return torch.softmax(logits, -1) @ value

    query, key, value = (linear(name, x) for name in ("to_q", "to_k", "to_v"))
    query = query + lora_scale * low_rank("to_q_adp", query)
    key = key + lora_scale * low_rank("to_k_adp", key)
    query = normalised("norm_q", heads(query))
    key, value = normalised("norm_k", heads(key)), heads(value)
    if text is not None:
        of_text = [heads(linear(f"add_{name}_proj", text)) for name in "qkv"]
        query = torch.cat([normalised("norm_added_q", of_text[0]), query], 2)
        key = torch.cat([normalised("norm_added_k", of_text[1]), key], 2)
        value = torch.cat([of_text[2], value], 2)
    if rotary is not None:
        query, key = turned(query, *rotary), turned(key, *rotary)
    if pivot is None:
        gathered = attend(query, key, value)
    else:
        gathered = torch.stack(
            [
                attend(
                    query[other],
                    torch.cat([key[own], key[other]], 1),
                    torch.cat([value[own], value[own]], 1),
                )
                for own, other in enumerate(pivot)
            ]
        )
    token = embedding[:, None]
    gathered = gathered + bokeh_scale * attend(
        query, heads(low_rank("to_k_dof", token)), heads(low_rank("to_v_dof", token))
    )
    gathered = gathered.transpose(1, 2).flatten(2)
    if text is None:
        return gathered, None
    of_text, of_image = gathered[:, : text.shape[1]], gathered[:, text.shape[1] :]
    return linear("to_out.0", of_image), linear("to_add_out", of_text)


class InFloat64:
    """One attention module, its inputs, and everything that has a gradient."""

    def __init__(self, kind: str, batch: int = 3) -> None:
        transformer = tiny_flux_transformer(num_layers=1, num_single_layers=1).double()
        self.adapter = trained_adapter(transformer).double()
        for parameter in self.adapter.parameters():
            parameter.requires_grad_(True)
        self.adapter.install(transformer)
        transformer.requires_grad_(False)
        self.block = 0 if kind == "double" else 1
        blocks = [transformer.transformer_blocks, transformer.single_transformer_blocks]
        self.attention = blocks[self.block][0].attn
        generator = torch.Generator().manual_seed(2)

        def normal(*shape: int) -> Tensor:
            made = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return made.requires_grad_()

        with torch.no_grad():
            for name, parameter in self.attention.named_parameters():
                if "norm" in name:  # all ones otherwise
                    parameter.uniform_(0.5, 1.5, generator=generator)
        self.x = normal(batch, 5, WIDTH)
        self.text = normal(batch, 3, WIDTH) if kind == "double" else None
        self.embedding = normal(batch, CONTEXT_WIDTH)
        tokens = 8 if kind == "double" else 5
        angles = normal(tokens, 8).detach().repeat_interleave(2, -1)
        self.rotary = angles.cos(), angles.sin()

    def ours(self, *, rotary: bool = False, **options: Any) -> tuple[Tensor, Tensor | None]:
        if pivot := options.pop("pivot", None):
            options["grounding"] = BokehGrounding(torch.tensor(pivot))
        answer = self.attention(
            self.x,
            self.text,
            image_rotary_emb=self.rotary if rotary else None,
            bokeh=BokehCondition(self.embedding, **options),
        )
        return answer if isinstance(answer, tuple) else (answer, None)

    def plain(self, *, rotary: bool = False, **options: Any) -> tuple[Tensor, Tensor | None]:
        return plain_attention(
            self.attention,
            self.x,
            self.text,
            self.adapter,
            self.block,
            self.embedding,
            rotary=self.rotary if rotary else None,
            **options,
        )

    def gradients(self, answer: tuple[Tensor, Tensor | None]) -> dict[str, Tensor]:
        """Of a weighted sum of what comes out, by everything that goes in; zero if unused."""
        given = dict(self.adapter.blocks[self.block].named_parameters())
        given |= {"x": self.x, "embedding": self.embedding}
        if self.text is not None:
            given["text"] = self.text
        total = sum(
            (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum()
            for out in answer
            if out is not None
        )
        found = torch.autograd.grad(total, list(given.values()), allow_unused=True)
        return {
            name: torch.zeros_like(value) if gradient is None else gradient
            for (name, value), gradient in zip(given.items(), found, strict=True)
        }


@pytest.mark.parametrize("kind", ["double", "single"])
@pytest.mark.parametrize(
    "options", [{}, {"lora_scale": 0.3, "bokeh_scale": -1.7}, {"pivot": [1, 1, 0]}]
)
def test_outputs_and_gradients_of_the_equation(kind: str, options: dict[str, Any]) -> None:
    case = InFloat64(kind)
    ours, plain = case.ours(**options), case.plain(**options)
    for out, wanted in zip(ours, plain, strict=True):
        if wanted is not None:
            torch.testing.assert_close(out, wanted, rtol=0, atol=FLOAT64_TOLERANCE)
    gradients, wanted_gradients = case.gradients(ours), case.gradients(plain)
    for name, wanted in wanted_gradients.items():
        largest = float(wanted.abs().max())
        tolerance = FLOAT64_TOLERANCE * max(largest, 1)
        torch.testing.assert_close(gradients[name], wanted, rtol=0, atol=tolerance, msg=name)
        # The softmax over one token is 1: its key has no say, in the twin either.
        assert (largest < 1e-14) == name.startswith("to_k_dof"), name


@pytest.mark.parametrize("kind", ["double", "single"])
def test_text_comes_first_and_all_tokens_are_turned(kind: str) -> None:
    case = InFloat64(kind)
    with torch.no_grad():
        ours, plain = case.ours(rotary=True), case.plain(rotary=True)
    for out, wanted in zip(ours, plain, strict=True):
        if wanted is not None:  # diffusers turns in float32
            torch.testing.assert_close(out, wanted, rtol=0, atol=FLOAT32_TOLERANCE)


def test_embedding_by_hand() -> None:
    adapter = trained_adapter(tiny_flux_transformer()).double()
    k = torch.tensor([1 / 30, 0.5, 1.0, UNCONDITIONAL_STRENGTH], dtype=torch.float64)
    state = adapter.state_dict()
    hidden = k[:, None] * state["embedding_layer.0.weight"][:, 0] + state["embedding_layer.0.bias"]
    wanted = hidden.clamp_min(0) @ state["embedding_layer.2.weight"].T
    wanted = wanted + state["embedding_layer.2.bias"]
    torch.testing.assert_close(adapter.embed(k), wanted, rtol=0, atol=FLOAT64_TOLERANCE)
    assert torch.equal(adapter(k), adapter.embed(k))


# -- In the transformer --------------------------------------------------------------------------


@torch.no_grad()
def test_without_a_condition_it_is_stock_flux_bit_by_bit() -> None:
    transformer = tiny_flux_transformer()
    adapter, inputs = trained_adapter(transformer), tiny_flux_inputs(transformer)
    adapter.install(transformer)
    assert torch.equal(prediction(transformer, inputs), stock_prediction())
    off = condition(adapter, 10, 30, lora_scale=0, bokeh_scale=0)
    assert torch.equal(prediction(transformer, inputs, off), stock_prediction())
    changed = prediction(transformer, inputs, condition(adapter, 10, 30))
    assert not torch.allclose(changed, stock_prediction(), atol=0.1)
    adapter.remove(transformer)
    assert torch.equal(prediction(transformer, inputs), stock_prediction())
    assert {type(one) for one in transformer.attn_processors.values()} == {FluxAttnProcessor}


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing_whatever_it_is_told() -> None:
    transformer = tiny_flux_transformer()
    adapter = BokehAdapter.for_transformer(transformer, rank=RANK)
    adapter.install(transformer)
    told = prediction(transformer, tiny_flux_inputs(transformer), condition(adapter, 1, 30))
    assert torch.equal(told, stock_prediction())
    assert adapter.config.alpha == RANK and adapter.config.context_width == 768


def test_nothing_of_the_adapter_becomes_the_transformers(tmp_path: Path) -> None:
    transformer = tiny_flux_transformer()
    names, parameters = set(transformer.state_dict()), sum(1 for _ in transformer.parameters())
    adapter = trained_adapter(transformer)
    adapter.install(transformer)
    assert set(transformer.state_dict()) == names
    assert sum(1 for _ in transformer.parameters()) == parameters
    transformer.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "diffusion_pytorch_model.safetensors")) == names
    transformer.requires_grad_(False)
    assert sum(p.requires_grad for p in adapter.parameters()) == len(adapter.state_dict()) - 2 * 4
    transformer.to(torch.float64)
    assert adapter.dtype == torch.float32


@torch.no_grad()
def test_calls_leave_no_trace_for_one_another() -> None:
    transformer = tiny_flux_transformer()
    adapter, inputs = trained_adapter(transformer), tiny_flux_inputs(transformer)
    adapter.install(transformer)
    processors = list(transformer.attn_processors.values())
    before = [dict(vars(one)) for one in processors]
    weak, strong = condition(adapter, 1, 1), condition(adapter, 30, 30)
    first = prediction(transformer, inputs, weak)
    other = prediction(transformer, inputs, strong)
    assert not torch.equal(first, other)
    with pytest.raises(ValueError, match="batch of 3.*batch of 2"):
        prediction(transformer, inputs, condition(adapter, 1, 2, 3))
    assert torch.equal(prediction(transformer, inputs, weak), first)
    assert torch.equal(prediction(transformer, inputs), stock_prediction())
    assert [dict(vars(one)) for one in processors] == before


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_samples_of_a_batch_do_not_see_each_other(batch: int) -> None:
    transformer = tiny_flux_transformer()
    adapter, inputs = trained_adapter(transformer), tiny_flux_inputs(transformer, batch)
    adapter.install(transformer)
    K = [3.0, 30.0, 11.0][:batch]
    together = prediction(transformer, inputs, condition(adapter, *K))
    for index in range(batch):
        alone = {
            name: value if name.endswith("ids") else value[index : index + 1]
            for name, value in inputs.items()
        }
        wanted = prediction(transformer, alone, condition(adapter, K[index]))
        torch.testing.assert_close(together[index : index + 1], wanted, rtol=0, atol=1e-5)
    shared = prediction(transformer, inputs, condition(adapter, 7.0))
    repeated = prediction(transformer, inputs, condition(adapter, *[7.0] * batch))
    torch.testing.assert_close(shared, repeated, rtol=0, atol=1e-5)


@torch.no_grad()
def test_grounding_in_oneself_is_ordinary_attention() -> None:
    transformer = tiny_flux_transformer()
    adapter, inputs = trained_adapter(transformer), tiny_flux_inputs(transformer)
    adapter.install(transformer)

    def grounded(*pivot: int, blocks: str = "all") -> Tensor:
        grounding = BokehGrounding(torch.tensor(pivot), blocks)
        return prediction(transformer, inputs, condition(adapter, 10, 20, grounding=grounding))

    # Keys and values twice: every weight is halved, and counted twice.
    alone = prediction(transformer, inputs, condition(adapter, 10, 20))
    torch.testing.assert_close(grounded(0, 1), alone, rtol=0, atol=1e-5)
    everywhere, single_blocks = grounded(0, 0), grounded(0, 0, blocks="single")
    torch.testing.assert_close(everywhere[0], alone[0], rtol=0, atol=1e-5)
    for one, other in ((everywhere, alone), (single_blocks, alone), (everywhere, single_blocks)):
        assert (one[1] - other[1]).abs().max() > 0.01


@torch.no_grad()
def test_layers_compute_in_their_own_dtype() -> None:
    transformer = tiny_flux_transformer(num_layers=1, num_single_layers=1)
    adapter = trained_adapter(transformer)
    adapter.install(transformer)
    transformer.to(torch.bfloat16)
    layer = adapter.blocks[0].to_q_adp
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x), layer(x.float()).bfloat16())

    inputs = tiny_flux_inputs(transformer, dtype=torch.bfloat16)
    # Exact in bfloat16, and a thousand times as much too: the sines of other values are others.
    inputs["timestep"] = torch.tensor([0.25, 0.5], dtype=torch.bfloat16)
    inputs["guidance"] = torch.full((2,), 8.0, dtype=torch.bfloat16)
    mixed = prediction(transformer, inputs, condition(adapter, 10, 30))
    stock = prediction(transformer, inputs)
    adapter.to(torch.bfloat16)
    half = prediction(transformer, inputs, condition(adapter, 10, 30))
    assert mixed.dtype == half.dtype == torch.bfloat16

    transformer.float()
    adapter.float()
    inputs = {name: value.float() for name, value in inputs.items()}
    exact = prediction(transformer, inputs, condition(adapter, 10, 30))
    exact_stock = prediction(transformer, inputs)
    # The adapter adds rounding of the kind that the stock transformer has, and no more of it.
    cost_of_stock = (stock - exact_stock).norm()
    for one in (mixed, half):
        assert (one - exact).norm() < 2 * cost_of_stock
    assert (exact - exact_stock).norm() > 5 * cost_of_stock
    print(
        cost_of_stock, (mixed - exact).norm(), (half - exact).norm(), (exact - exact_stock).norm()
    )


def test_gradient_checkpointing_changes_no_gradient() -> None:
    transformer = tiny_flux_transformer().requires_grad_(False)
    adapter, inputs = trained_adapter(transformer), tiny_flux_inputs(transformer)
    adapter.install(transformer)

    def gradients() -> dict[str, Tensor]:
        adapter.zero_grad()
        prediction(
            transformer.train(), inputs, condition(adapter, 10, 30)
        ).square().sum().backward()
        return {n: p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None}

    plain = gradients()
    trained = {name for name in adapter.state_dict() if "to_k_dof" not in name}
    assert set(plain) == trained
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    transformer.enable_gradient_checkpointing()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-6, msg=name)


@torch.no_grad()
def test_one_graph_for_torch_compile() -> None:
    transformer = tiny_flux_transformer(num_layers=1, num_single_layers=1)
    adapter = trained_adapter(transformer)
    adapter.install(transformer)
    attention = transformer.transformer_blocks[0].attn
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(2, tokens, WIDTH, generator=generator) for tokens in (5, 3))
    for grounding in (None, BokehGrounding(torch.tensor([0, 0]))):
        told = condition(adapter, 10, 30, grounding=grounding)
        answers = (one(x, text, bokeh=told) for one in (compiled, attention))
        assert all(torch.equal(*pair) for pair in zip(*answers, strict=True))


@pytest.mark.slow
@torch.no_grad()
def test_one_graph_of_the_whole_transformer() -> None:
    transformer = tiny_flux_transformer(num_layers=1, num_single_layers=1)
    adapter, inputs = trained_adapter(transformer), tiny_flux_inputs(transformer)
    adapter.install(transformer)
    compiled = torch.compile(transformer, backend="eager", fullgraph=True)
    for told in (condition(adapter, 10, 30), condition(adapter, 20, 5), None):
        wanted = prediction(transformer, inputs, told)
        assert torch.equal(prediction(compiled, inputs, told), wanted)


def test_a_compiled_transformer_is_taken_for_what_it_wraps() -> None:
    transformer = tiny_flux_transformer(num_layers=1, num_single_layers=1)
    compiled = torch.compile(transformer, backend="eager")
    adapter = BokehAdapter.for_transformer(compiled, rank=RANK)
    adapter.install(compiled)
    assert adapter.is_installed(transformer) and adapter.is_installed(compiled)
    adapter.remove(compiled)
    assert not adapter.is_installed(transformer)


@torch.no_grad()
def test_a_copy_of_the_transformer_has_an_adapter_of_its_own() -> None:
    transformer = tiny_flux_transformer()
    adapter, inputs = trained_adapter(transformer), tiny_flux_inputs(transformer)
    adapter.install(transformer)
    told = condition(adapter, 10, 30)
    wanted = prediction(transformer, inputs, told)
    twin, twin_adapter = copy.deepcopy((transformer, adapter))
    assert twin_adapter.is_installed(twin) and not adapter.is_installed(twin)
    for parameter in adapter.parameters():
        parameter.zero_()
    assert torch.equal(prediction(twin, inputs, told), wanted)
    assert torch.equal(prediction(transformer, inputs, told), stock_prediction())


@torch.no_grad()
def test_beside_what_diffusers_does_to_a_transformer() -> None:
    transformer = tiny_flux_transformer()
    adapter, inputs = trained_adapter(transformer), tiny_flux_inputs(transformer)
    adapter.install(transformer)
    told = condition(adapter, 10, 30)
    wanted = prediction(transformer, inputs, told)

    transformer.set_attention_backend("native")
    torch.testing.assert_close(prediction(transformer, inputs, told), wanted, rtol=0, atol=1e-5)
    adapter.remove(transformer)
    backends = {one._attention_backend for one in transformer.attn_processors.values()}
    assert backends == {"native"}
    adapter.install(transformer)
    assert {one._attention_backend for one in transformer.attn_processors.values()} == backends

    fused = copy.deepcopy(transformer)
    fused.fuse_qkv_projections()
    for name, parameter in fused.named_parameters():
        if ".attn.to_q." in name or ".attn.add_q_proj." in name:  # stay, without a use
            parameter.zero_()
    torch.testing.assert_close(prediction(fused, inputs, told), wanted, rtol=0, atol=1e-5)

    lora = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    transformer.add_adapter(lora)
    with_lora = prediction(transformer, inputs, told)
    assert (with_lora - wanted).abs().max() > 0.01
    both = {"scale": 0.0, "bokeh": told}
    without = transformer(**inputs, joint_attention_kwargs=both).sample
    torch.testing.assert_close(without, wanted, rtol=0, atol=1e-5)
    transformer.disable_adapters()
    assert torch.equal(prediction(transformer, inputs, told), wanted)
    transformer.enable_adapters()
    stock_with_lora = prediction(transformer, inputs)
    adapter.remove(transformer)
    assert torch.equal(prediction(transformer, inputs), stock_with_lora)


# -- In and out ----------------------------------------------------------------------------------


def test_a_generator_decides_the_whole_adapter_and_torchs_own_is_left_alone() -> None:
    transformer = tiny_flux_transformer()
    before = torch.get_rng_state()
    one, same, other = (
        BokehAdapter.for_transformer(
            transformer, rank=RANK, generator=torch.Generator().manual_seed(seed)
        ).state_dict()
        for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in one.items():
        assert torch.equal(value, same[name]), name
        assert torch.equal(value, other[name]) == name.endswith("up.weight"), name
    down = one["adapter_modules.0.to_q_adp.down.weight"]
    # 128 draws: their deviation is within 4 / sqrt(2 * 128) of the distribution's.
    assert down.std() == pytest.approx(1 / RANK, rel=0.25)


def test_shapes_alone_take_no_memory() -> None:
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    adapter = BokehAdapter.for_transformer(transformer)
    assert {parameter.device.type for parameter in adapter.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 145_736_576


def test_saved_and_loaded(tmp_path: Path) -> None:
    adapter = trained_adapter(tiny_flux_transformer())
    adapter.save_pretrained(tmp_path)
    again = BokehAdapter.from_pretrained(tmp_path)
    assert dict(again.config) | {"_name_or_path": None} == dict(adapter.config) | {
        "_name_or_path": None
    }
    for name, value in adapter.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    frozen = {name for name, value in again.named_parameters() if not value.requires_grad}
    assert frozen == {name for name in adapter.state_dict() if "to_k_dof" in name}
    assert (
        BokehAdapter.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    )


@pytest.mark.parametrize("damage", ["missing", "unexpected", "mismatched"])
def test_files_that_do_not_fit_their_config_are_refused(tmp_path: Path, damage: str) -> None:
    adapter = trained_adapter(tiny_flux_transformer())
    adapter.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = "adapter_modules.3.to_v_dof.up.weight"
    # diffusers itself refuses other shapes.
    if damage == "missing":
        del tensors[name]
    elif damage == "unexpected":
        tensors["adapter_modules.4.to_v_dof.up.weight"] = tensors[name].clone()
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match="to_v_dof.up.weight"):
        BokehAdapter.from_pretrained(tmp_path)


# -- Mistakes ------------------------------------------------------------------------------------


def test_transformers_that_the_adapter_does_not_fit() -> None:
    transformer = tiny_flux_transformer()
    adapter = trained_adapter(transformer)
    larger = tiny_flux_transformer(num_single_layers=3)
    with pytest.raises(ValueError, match="2 double and 2 single blocks of 32.*has 2 and 3 of 32"):
        adapter.install(larger)
    with pytest.raises(ValueError, match="FluxTransformer2DModel, got Linear"):
        adapter.install(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got Linear"):
        BokehAdapter.for_transformer(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="rank of a BokehAdapter must be positive, got 0"):
        BokehAdapter.for_transformer(transformer, rank=0)
    assert {type(one) for one in larger.attn_processors.values()} == {FluxAttnProcessor}


def test_processors_of_others_are_not_overwritten() -> None:
    transformer = tiny_flux_transformer()
    adapter, other = trained_adapter(transformer), trained_adapter(transformer, seed=5)
    adapter.install(transformer)
    adapter.install(transformer)
    with pytest.raises(ValueError, match=r"BokehAdapter.remove\(transformer\)"):
        other.install(transformer)
    assert adapter.is_installed(transformer) and not other.is_installed(transformer)
    other.remove(transformer)
    other.install(transformer)
    assert other.is_installed(transformer)
    other.remove(transformer)
    image = FluxIPAdapterAttnProcessor(WIDTH, WIDTH)
    transformer.transformer_blocks[1].attn.set_processor(image)
    with pytest.raises(ValueError, match=r"FluxIPAdapterAttnProcessor.*unload_ip_adapter\(\)"):
        adapter.install(transformer)
    adapter.remove(transformer)
    assert transformer.transformer_blocks[1].attn.processor is image
    assert type(transformer.transformer_blocks[0].attn.processor) is FluxAttnProcessor


def test_conditions_that_make_no_sense() -> None:
    adapter = trained_adapter(tiny_flux_transformer())
    embedding = adapter.embed(torch.tensor([0.5, 1.0]))
    for k in (torch.tensor(0.5), torch.tensor([[0.5]]), torch.tensor([1, 1])):
        with pytest.raises(ValueError, match=r"k_normalised is torch.*K / 30 for each sample"):
            adapter.embed(k)
    with pytest.raises(ValueError, match=r"embedding has shape \(2, 1, 12\)"):
        BokehCondition(embedding[:, None])
    with pytest.raises(ValueError, match="bokeh_scale is nan"):
        BokehCondition(embedding, bokeh_scale=float("nan"))
    with pytest.raises(
        ValueError, match="embedding is of 2 samples and the pivot of grounding of 3"
    ):
        BokehCondition(embedding, grounding=BokehGrounding(torch.tensor([0, 0, 0])))
    with pytest.raises(ValueError, match="samples 0 to 1"):
        BokehGrounding(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="torch.long"):
        BokehGrounding(torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="'double'.*'all', 'single'"):
        BokehGrounding(torch.tensor([0, 0]), "double")


@torch.no_grad()
def test_grounding_for_another_batch_or_with_a_mask() -> None:
    transformer = tiny_flux_transformer()
    adapter, inputs = trained_adapter(transformer), tiny_flux_inputs(transformer)
    adapter.install(transformer)
    three = BokehGrounding(torch.tensor([0, 0, 0]))
    with pytest.raises(ValueError, match="pivot of grounding is for a batch of 3"):
        prediction(transformer, inputs, condition(adapter, 10, grounding=three))
    case = InFloat64("single")
    with pytest.raises(ValueError, match="takes no attention_mask"):
        case.attention(
            case.x,
            attention_mask=torch.zeros(5, 5, dtype=torch.float64),
            bokeh=BokehCondition(case.embedding, grounding=three),
        )

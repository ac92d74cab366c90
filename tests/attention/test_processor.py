"""PISA inside real diffusers layers: which layers change, what they compute, what takes it out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    SlicedAttnProcessor,
)
from torch import Tensor

from bokehdiff.attention import (
    PisaAttnProcessor,
    PisaConfig,
    PisaContext,
    PisaGeometry,
    install_pisa,
    pisa_attention,
    remove_pisa,
    verify_pisa,
)
from bokehdiff.attention.processor import (
    latent_grid,
    pisa_contexts,
    pisa_layer_names,
    reinstall_pisa,
    token_grid,
)
from tests.tiny_models import tiny_unet

LATENT = (16, 24)
"""Latent pixels; the layer has half as many tokens on each side, of 16 image pixels each."""


def _run(unet: UNet2DConditionModel, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    channels = unet.config.cross_attention_dim
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * 8
    with torch.no_grad():
        return unet(
            torch.randn(2, 4, *LATENT, generator=generator),
            499,
            torch.randn(2, 5, channels, generator=generator),
            added_cond_kwargs={
                "text_embeds": torch.randn(2, pooled, generator=generator),
                "time_ids": torch.tensor([[128, 192, 0, 0, 128, 192]] * 2),
            },
            **options,
        ).sample


def _scene(batch: int = 2) -> tuple[Tensor, Tensor]:
    """Disparity, and a circle of confusion of up to 40 pixels."""
    disparity = torch.rand(
        batch, 1, 8 * LATENT[0], 8 * LATENT[1], generator=torch.Generator().manual_seed(1)
    )
    return disparity, 40 * disparity


def _set_scene(context: PisaContext, **changes: Tensor) -> None:
    disparity, coc = _scene()
    values = {"disparity": disparity, "coc_pixels": coc, **changes}
    context.set_scene(**values, latent_height=LATENT[0], latent_width=LATENT[1], vae_scale_factor=8)


def test_only_self_attention_of_the_named_layer_changes() -> None:
    unet = tiny_unet()
    before = dict(unet.attn_processors)
    install_pisa(unet)
    changed = {
        name
        for name, processor in unet.attn_processors.items()
        if isinstance(processor, PisaAttnProcessor)
    }
    prefix = "down_blocks.1.attentions.0.transformer_blocks"
    assert changed == {f"{prefix}.{block}.attn1.processor" for block in (0, 1)}
    for name, processor in unet.attn_processors.items():
        assert name in changed or processor is before[name]
    assert len({id(unet.attn_processors[name].context) for name in changed}) == 1


def test_the_layer_grid_and_its_units() -> None:
    unet = tiny_unet()
    context = install_pisa(unet)
    _set_scene(context, coc_pixels=torch.full((2, 1, 128, 192), 24.0))
    _run(unet)
    (geometry,) = context._geometries.values()
    assert (geometry.height, geometry.width, geometry.batch) == (8, 12, 2)
    # 24 pixels are one and a half tokens of 16 pixels.
    assert torch.allclose(geometry.radius, torch.tensor(1.5 * 1.6))


def test_the_render_depends_on_the_scene_and_is_restored_by_removal() -> None:
    unet = tiny_unet()
    stock = _run(unet)
    processors = dict(unet.attn_processors)
    context = install_pisa(unet)
    _set_scene(context)
    blurred = _run(unet)
    assert (blurred - stock).abs().max() > 1e-4
    assert torch.equal(blurred, _run(unet))
    _set_scene(context, coc_pixels=torch.zeros(2, 1, 128, 192))
    assert (_run(unet) - blurred).abs().max() > 1e-4
    remove_pisa(unet)
    assert unet.attn_processors == processors
    assert torch.equal(_run(unet), stock)
    remove_pisa(unet)


def test_the_authors_keyword_gives_the_same_as_the_scene() -> None:
    unet = tiny_unet()
    context = install_pisa(unet, config=PisaConfig.preset("official_weights"))
    disparity, coc = _scene()
    _set_scene(context)
    expected = _run(unet)
    context.clear()
    assert not context.has_scene
    disp_coc = torch.cat([disparity, coc / 10], dim=1)
    assert torch.allclose(
        _run(unet, cross_attention_kwargs={"disp_coc": disp_coc}), expected, atol=1e-6
    )
    # A changed tensor is noticed, whether it is new or the same.
    disp_coc[:, 1] = 0
    changed = _run(unet, cross_attention_kwargs={"disp_coc": disp_coc})
    assert (changed - expected).abs().max() > 1e-4


def test_geometry_is_built_once_and_shared() -> None:
    unet = tiny_unet()
    context = install_pisa(unet)
    _set_scene(context)
    _run(unet)
    (geometry,) = context._geometries.values()
    _run(unet)
    assert list(context._geometries.values()) == [geometry]
    context.set_hardness(100)
    assert context.config.hardness == 101
    _run(unet)
    assert len(context._geometries) == 2


def test_render_without_scene_is_an_error_unless_asked_for() -> None:
    unet = tiny_unet()
    stock = _run(unet)
    context = install_pisa(unet)
    with pytest.raises(RuntimeError, match="set_scene"):
        _run(unet)
    context.config = context.config.replace(missing_conditioning="vanilla")
    assert torch.equal(_run(unet), stock)


def test_verify_notices_what_takes_pisa_out() -> None:
    unet = tiny_unet()
    with pytest.raises(RuntimeError, match="install_pisa"):
        verify_pisa(unet)
    context = install_pisa(unet)
    assert verify_pisa(unet) is context
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    unet.get_submodule(name).processor = AttnProcessor2_0()  # past set_processor
    with pytest.raises(RuntimeError, match=f"1 of 2 layers .{name} has AttnProcessor2_0"):
        verify_pisa(unet)
    context = install_pisa(unet)
    assert verify_pisa(unet) is context
    processors = dict(unet.attn_processors)
    name = next(name for name in processors if "down_blocks.1.attentions.0" in name)
    processors[name] = PisaAttnProcessor(PisaContext())
    unet.set_attn_processor(processors)
    with pytest.raises(RuntimeError, match="share one context"):
        verify_pisa(unet)


def test_install_twice_then_remove_gives_the_first_processors_back() -> None:
    unet = tiny_unet()
    before = dict(unet.attn_processors)
    first, second = install_pisa(unet), install_pisa(unet)
    assert verify_pisa(unet) is second is not first
    remove_pisa(unet)
    assert unet.attn_processors == before


def test_processors_set_later_change_all_layers_but_those_of_pisa() -> None:
    unet = tiny_unet()
    context = install_pisa(unet)
    _set_scene(context)
    blurred = _run(unet)
    sliced = SlicedAttnProcessor(1)
    unet.set_attn_processor(sliced)
    assert verify_pisa(unet) is context
    others = [one for one in unet.attn_processors.values() if one is not sliced]
    assert [type(one) for one in others] == [PisaAttnProcessor] * 2
    torch.testing.assert_close(_run(unet), blurred, rtol=0, atol=1e-5)
    remove_pisa(unet)
    assert set(unet.attn_processors.values()) == {sliced}


def test_processors_that_were_looked_up_can_be_put_back() -> None:
    """As `unfuse_qkv_projections` and other pipelines do it."""
    unet = tiny_unet()
    stock = dict(unet.attn_processors)
    context = install_pisa(unet)
    looked_up = dict(unet.attn_processors)
    unet.set_attn_processor(SlicedAttnProcessor(1))
    unet.set_attn_processor(dict(looked_up))
    assert unet.attn_processors == looked_up and verify_pisa(unet) is context
    remove_pisa(unet)
    assert unet.attn_processors == stock


def test_processors_made_anew_from_their_class_lose_nothing() -> None:
    """As `load_ip_adapter` and `unload_ip_adapter` do it with self-attention."""
    unet = tiny_unet()
    context = install_pisa(unet)
    unet.set_attn_processor({name: type(one)() for name, one in unet.attn_processors.items()})
    assert verify_pisa(unet) is context


def test_only_layers_with_pisa_change_their_class() -> None:
    unet = tiny_unet()
    install_pisa(unet)
    kinds = {name: type(one) for name, one in unet.named_modules() if isinstance(one, Attention)}
    changed = [name for name, kind in kinds.items() if kind is not Attention]
    assert changed == pisa_layer_names(unet)
    copied = copy.deepcopy(unet)
    remove_pisa(unet)
    assert {type(one) for one in unet.modules() if isinstance(one, Attention)} == {Attention}
    remove_pisa(copied)
    assert {type(one) for one in copied.modules() if isinstance(one, Attention)} == {Attention}


def test_a_compiled_unet_has_the_layers_of_the_one_inside() -> None:
    unet = tiny_unet()
    compiled = torch.compile(unet, backend="eager")
    context = install_pisa(compiled)
    assert verify_pisa(unet) is verify_pisa(compiled) is context
    assert pisa_contexts(compiled) == [context]
    remove_pisa(compiled)
    assert pisa_contexts(unet) == []


def test_a_context_can_be_put_back() -> None:
    unet = tiny_unet()
    first, second = install_pisa(unet), install_pisa(unet, ["mid_block"])
    assert verify_pisa(unet, ["mid_block"]) is second
    assert reinstall_pisa(unet, ["down_blocks.1.attentions.0"], first) is first
    assert verify_pisa(unet) is first and pisa_contexts(unet) == [first]


def test_without_a_scene_the_ordinary_processor_works_where_that_is_allowed() -> None:
    unet = tiny_unet()
    install_pisa(unet, config=PisaConfig(missing_conditioning="vanilla"))
    seen: list[int] = []

    class Counting(AttnProcessor2_0):
        def __call__(self, attn: Attention, hidden_states: Tensor, *more: Any, **named: Any) -> Any:
            seen.append(1)
            return super().__call__(attn, hidden_states, *more, **named)

    stock = _run(unet)
    unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.set_processor(Counting())
    assert torch.equal(_run(unet), stock) and len(seen) == 1


def test_layers_are_chosen_by_name() -> None:
    unet = tiny_unet()
    install_pisa(unet, ["down_blocks.2", "mid_block"])
    verify_pisa(unet, ["down_blocks.2"])
    with pytest.raises(RuntimeError, match="missing"):
        verify_pisa(unet)
    with pytest.raises(ValueError, match="no self-attention layer"):
        install_pisa(unet, ["down_blocks.7"])


def test_processor_adds_nothing_to_the_saved_weights() -> None:
    unet = tiny_unet()
    names = set(unet.state_dict())
    install_pisa(unet)
    assert set(unet.state_dict()) == names


def _stock_and_pisa(attention: Attention, geometry: PisaGeometry, states: Tensor) -> list[Tensor]:
    outputs = []
    for processor, options in (
        (AttnProcessor2_0(), {}),
        (PisaAttnProcessor(), {"pisa_geometry": geometry}),
    ):
        attention.set_processor(processor)
        outputs.append(attention(states, **options).detach())
    return outputs


def test_honours_the_settings_of_the_layer() -> None:
    """Where each token keeps its light, PISA returns the values; everything around must remain."""
    torch.manual_seed(0)
    options = {
        "heads": 2,
        "dim_head": 8,
        "norm_num_groups": 4,
        "residual_connection": True,
        "rescale_output_factor": 2.0,
        "qk_norm": "layer_norm",
        "bias": True,
    }
    attention = Attention(query_dim=16, **options)
    sharp = PisaGeometry.build(torch.zeros(1, 1, 4, 6))
    for shape in ((2, 16, 4, 6), (2, 24, 16)):
        states = torch.randn(shape)
        stock, found = _stock_and_pisa(attention, sharp, states)
        tokens = states.flatten(2).transpose(1, 2) if states.ndim == 4 else states
        normed = attention.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        expected = attention.to_out[0](attention.to_v(normed))
        if states.ndim == 4:
            expected = expected.transpose(1, 2).reshape(shape)
        assert found.shape == stock.shape == shape
        assert torch.allclose(found, (expected + states) / 2, atol=1e-5)


def test_logits_use_the_normed_queries_and_keys_and_the_scale() -> None:
    torch.manual_seed(0)
    attention = Attention(query_dim=16, heads=2, dim_head=8, qk_norm="layer_norm")
    geometry = PisaGeometry.build(torch.full((1, 1, 4, 6), 2.0), torch.rand(1, 1, 4, 6))
    states = torch.randn(2, 24, 16)
    _, found = _stock_and_pisa(attention, geometry, states)

    def heads(layer: torch.nn.Module) -> Tensor:
        return layer(states).unflatten(-1, (2, 8)).transpose(1, 2)

    query, key = attention.norm_q(heads(attention.to_q)), attention.norm_k(heads(attention.to_k))
    light = pisa_attention(query, key, heads(attention.to_v), geometry, backend="reference")
    expected = attention.to_out[0](light.transpose(1, 2).flatten(2))
    assert torch.allclose(found, expected, atol=1e-5)


def test_cross_attention_of_equal_width_stays_ordinary() -> None:
    """The authors tell the two apart by their weights' shapes; here the call decides."""
    torch.manual_seed(0)
    attention = Attention(query_dim=16, cross_attention_dim=16, heads=2, dim_head=8)
    states, context = torch.randn(2, 24, 16), torch.randn(2, 5, 16)
    expected = attention(states, encoder_hidden_states=context)
    attention.set_processor(PisaAttnProcessor())
    geometry = PisaGeometry.build(torch.ones(1, 1, 4, 6))
    found = attention(states, encoder_hidden_states=context, pisa_geometry=geometry)
    assert torch.equal(found, expected)
    with pytest.raises(RuntimeError, match="no context"):
        attention(states)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    attention = Attention(query_dim=16, heads=2, dim_head=8)
    config = PisaConfig.preset("official_weights")
    geometry = PisaGeometry.build(torch.ones(1, 1, 4, 6), config=config)
    states = torch.randn(2, 24, 16)
    attention.set_processor(PisaAttnProcessor())
    training = attention.train()(states, pisa_geometry=geometry)
    evaluated = attention.eval()(states, pisa_geometry=geometry)
    sure = PisaGeometry.build(torch.ones(1, 1, 4, 6), config=config.replace(dropout=0.0))
    assert torch.allclose(attention(states, pisa_geometry=sure), evaluated)
    assert not torch.allclose(training, evaluated)


def test_half_precision_features_with_float32_scene() -> None:
    unet = tiny_unet()
    context = install_pisa(unet)
    _set_scene(context)
    attention = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1
    states = torch.randn(2, 96, 32)
    exact = attention(states)
    assert torch.allclose(attention.bfloat16()(states.bfloat16()).float(), exact, atol=0.05)


def test_odd_latents_keep_their_alignment() -> None:
    context = PisaContext()
    coc = torch.zeros(1, 1, 8 * 5, 8 * 7)
    coc[..., -8:] = 16.0
    context.set_scene(torch.zeros_like(coc), coc, 5, 7, 8)
    geometry = context.geometry_for(12)
    assert geometry is not None and (geometry.height, geometry.width) == (3, 4)
    # The last token is half outside; what it covers of the image is blurred by one token.
    assert geometry.radius.view(3, 4)[:, -1].min() == pytest.approx(1.6)
    assert geometry.radius.view(3, 4)[:, :-1].max() == 0


def test_token_grids() -> None:
    assert latent_grid(96, 16, 24) == (8, 12, 2)
    assert latent_grid(33 * 34, 65, 67) == (33, 34, 2)
    assert token_grid(96, 128, 192) == (8, 12)
    assert token_grid(33 * 33, 520, 520) == (33, 33)
    assert token_grid(30, 480, 16) == (30, 1)
    assert token_grid(96, 24, 36, rule="integer_stride") == (8, 12)
    with pytest.raises(ValueError, match="authors' rule"):
        token_grid(33 * 33, 520, 520, rule="integer_stride")
    with pytest.raises(ValueError, match="aspect"):
        token_grid(97, 128, 192)
    with pytest.raises(ValueError, match="another image size"):
        latent_grid(100, 16, 24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coc_pixels": torch.zeros(2, 1, 64, 96)}, r"\(B, 1, 128, 192\)"),
        ({"disparity": torch.zeros(2, 3, 128, 192)}, r"\(B, 1, 128, 192\)"),
        ({"disparity": torch.zeros(3, 1, 128, 192)}, "batch 3"),
    ],
)
def test_refuses_scenes_of_another_shape(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _set_scene(PisaContext(), **changes)


def test_scene_of_another_size_is_noticed_by_the_layer() -> None:
    unet = tiny_unet()
    context = install_pisa(unet)
    zeros = torch.zeros(1, 1, 64, 64)
    context.set_scene(zeros, zeros, 8, 8, 8)
    with pytest.raises(ValueError, match="another image size"):
        _run(unet)


def test_self_attention_masks_are_refused() -> None:
    attention = Attention(query_dim=16, heads=2, dim_head=8, processor=PisaAttnProcessor())
    geometry = PisaGeometry.build(torch.ones(1, 1, 4, 6))
    with pytest.raises(ValueError, match="attention_mask"):
        attention(
            torch.randn(1, 24, 16), attention_mask=torch.zeros(1, 1, 24), pisa_geometry=geometry
        )

"""Depth Anything with a bokeh stack: the same network without one, another depth with another."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForDepthEstimation,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
)

from bokehdiff.models.depth_anything_dsfa import (
    DepthAnythingDSFAConfig,
    DepthAnythingDSFAForDepthEstimation,
)

HEIGHT, WIDTH = 70, 98
STRENGTHS = torch.tensor([[10.0, 20.0, 30.0]])


def plain_network(**changes: Any) -> DepthAnythingForDepthEstimation:
    """A tiny metric Depth Anything whose depth depends on the picture."""
    backbone = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=70,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8,
        head_hidden_size=4,
        **{"depth_estimation_type": "metric", "max_depth": 20, **changes},
    )
    torch.manual_seed(0)
    return with_strong_weights(DepthAnythingForDepthEstimation(config).eval())


def with_strong_weights(network: nn.Module) -> Any:
    """transformers starts so small that every picture has the same depth."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(module.weight)
    return network


def network_of(**options: Any) -> DepthAnythingDSFAForDepthEstimation:
    plain = plain_network()
    torch.manual_seed(1)
    return DepthAnythingDSFAForDepthEstimation.from_depth_anything(
        plain, **{"initial_gate": 0.5, **options}
    )


def pictures(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 3, HEIGHT, WIDTH, generator=generator)


def spread(depth: Tensor) -> float:
    return float(depth.max() - depth.min())


# -- Depth Anything without a stack, or with fresh blocks ----------------------------------------


@torch.no_grad()
def test_fresh_network_is_depth_anything_whatever_the_stack() -> None:
    plain = plain_network()
    network = DepthAnythingDSFAForDepthEstimation.from_depth_anything(plain)
    wanted = plain(pictures(2)).predicted_depth
    assert spread(wanted) > 1
    assert torch.equal(network(pictures(2)).predicted_depth, wanted)
    with_stack = network(pictures(2), pictures(2, 3, seed=1), STRENGTHS.repeat(2, 1))
    assert torch.equal(with_stack.predicted_depth, wanted)


@torch.no_grad()
def test_trained_blocks_change_nothing_without_a_stack() -> None:
    network, plain = network_of(), plain_network()
    wanted = plain(pictures(1)).predicted_depth
    assert torch.equal(network(pictures(1)).predicted_depth, wanted)
    empty = network(pictures(1), pictures(1, 0), torch.zeros(1, 0)).predicted_depth
    assert torch.equal(empty, wanted)
    seen = network(pictures(1), pictures(1, 3, seed=1), STRENGTHS).predicted_depth
    assert (seen - wanted).abs().max() > 0.1


def test_network_is_a_copy_in_dtype_and_evaluation_mode(tmp_path: Path) -> None:
    plain = plain_network().to(torch.bfloat16)
    network = DepthAnythingDSFAForDepthEstimation.from_depth_anything(plain)
    assert network.dtype == torch.bfloat16 and not network.training
    with torch.no_grad():
        network.head.conv1.weight.zero_()
    assert plain.head.conv1.weight.abs().max() > 0
    plain.save_pretrained(tmp_path)
    stored = DepthAnythingDSFAForDepthEstimation.from_depth_anything(tmp_path)
    assert torch.equal(stored.neck.convs[0].weight, network.neck.convs[0].weight)


def test_relative_weights_can_start_a_metric_network() -> None:
    plain = plain_network(depth_estimation_type="relative", max_depth=1)
    network = DepthAnythingDSFAForDepthEstimation.from_depth_anything(
        plain, depth_estimation_type="metric", max_depth=50
    )
    depth = network(pictures(1)).predicted_depth
    assert 0 < depth.min() and 20 < depth.max() <= 50
    assert plain.config.depth_estimation_type == "relative"


def test_weights_of_another_size_or_kind_are_refused() -> None:
    plain = plain_network()
    with pytest.raises(ValueError, match="would not fit"):
        DepthAnythingDSFAForDepthEstimation.from_depth_anything(plain, fusion_hidden_size=16)
    with pytest.raises(ValueError, match="has DSFA blocks already"):
        DepthAnythingDSFAForDepthEstimation.from_depth_anything(network_of())


# -- The stack is seen ---------------------------------------------------------------------------


def change_by_another_stack(largest_strength: float) -> float:
    """Largest change of depth at K = 10, 20, 30, over the spread of depth in the picture."""
    network = network_of(largest_strength=largest_strength)
    one, other = (
        network(pictures(1), pictures(1, 3, seed=seed), STRENGTHS).predicted_depth
        for seed in (1, 2)
    )
    return float((one - other).abs().max()) / spread(one)


@torch.no_grad()
def test_stack_is_seen_unless_strengths_are_raw() -> None:
    """With raw strengths, as published, the bias of e^-10 makes the frames invisible."""
    assert change_by_another_stack(30.0) > 0.02
    assert change_by_another_stack(1.0) < 2e-4


@torch.no_grad()
def test_strength_is_seen() -> None:
    network, stack = network_of(), pictures(1, 3, seed=1)
    one = network(pictures(1), stack, STRENGTHS).predicted_depth
    other = network(pictures(1), stack, STRENGTHS.flip(1)).predicted_depth
    assert (one - other).abs().max() > 0.01 * spread(one)


@pytest.mark.parametrize("frames", [1, 2, 5])
@torch.no_grad()
def test_any_number_of_frames_in_any_order(frames: int) -> None:
    network, stack = network_of().double(), pictures(2, frames, seed=1).double()
    K = torch.arange(1.0, 1 + 2 * frames).view(2, frames)
    depth = network(pictures(2).double(), stack, K).predicted_depth
    assert depth.shape == (2, HEIGHT, WIDTH)
    other = network(pictures(2).double(), stack.flip(1), K.flip(1)).predicted_depth
    torch.testing.assert_close(other, depth, rtol=1e-10, atol=1e-10)
    alone = network(pictures(2)[1:].double(), stack[1:], K[1:]).predicted_depth
    torch.testing.assert_close(alone[0], depth[1], rtol=1e-10, atol=1e-10)


# -- Options of the backbone ---------------------------------------------------------------------


@torch.no_grad()
def test_positions_on_the_native_grid_have_no_offset() -> None:
    square = pictures(1)[..., :70, :70]
    one, other = (network_of(interpolate_offset=offset) for offset in (0.0, 0.1))
    assert torch.equal(one(square).predicted_depth, other(square).predicted_depth)
    assert not torch.equal(one(pictures(1)).predicted_depth, other(pictures(1)).predicted_depth)


def bicubic_weights(native: int, wanted: int, factor: float) -> Tensor:
    """(wanted, native): Keys' kernel with a = -0.75 at the place (i + 1/2) / factor - 1/2."""
    weights = torch.zeros(wanted, native, dtype=torch.float64)
    for i in range(wanted):
        place = (i + 0.5) / factor - 0.5
        for j in range(math.floor(place) - 1, math.floor(place) + 3):
            x, a = abs(place - j), -0.75
            if x <= 1:
                weight = (a + 2) * x**3 - (a + 3) * x**2 + 1
            else:
                weight = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            weights[i, min(max(j, 0), native - 1)] += weight
    return weights


@torch.no_grad()
def test_positions_are_resized_with_the_offset_in_the_factors() -> None:
    embeddings = network_of(interpolate_offset=0.1).backbone.embeddings.double()
    native, rows, columns = 5, 7, 9
    positions = torch.randn(1, 1 + native**2, 32, dtype=torch.float64)
    embeddings.position_embeddings.copy_(positions)
    found = embeddings.interpolate_pos_encoding(
        torch.zeros(1, 1 + rows * columns, 32), 14 * rows, 14 * columns
    )
    down = bicubic_weights(native, rows, (rows + 0.1) / native)
    across = bicubic_weights(native, columns, (columns + 0.1) / native)
    grid = positions[0, 1:].unflatten(0, (native, native))
    wanted = torch.einsum("ri,cj,ijd->rcd", down, across, grid)
    torch.testing.assert_close(found[0, 1:], wanted.flatten(0, 1), rtol=1e-9, atol=1e-9)
    assert torch.equal(found[0, 0], positions[0, 0])


@torch.no_grad()
def test_double_attention_scale_is_that_of_queries_scaled_before() -> None:
    single = network_of().double()
    double = network_of(backbone_attention_scale="double").double()
    image = pictures(1).double()
    wanted = double(image).predicted_depth
    assert not torch.allclose(single(image).predicted_depth, wanted, atol=1e-3)
    head = 32 // 4
    for layer in single.backbone.encoder.layer:
        for value in layer.attention.q_proj.parameters():
            value.mul_(head**-0.5)
    torch.testing.assert_close(single(image).predicted_depth, wanted, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_sdpa_and_eager_attention_agree() -> None:
    network = network_of(backbone_attention_scale="double").double()
    values = pictures(1).double(), pictures(1, 2, seed=1).double(), STRENGTHS[:, :2]
    depths = []
    for attention in ("sdpa", "eager"):
        network.backbone.set_attn_implementation(attention)
        depths.append(network(*values).predicted_depth)
    torch.testing.assert_close(*depths, rtol=1e-9, atol=1e-9)


# -- transformers' habits ------------------------------------------------------------------------


@torch.no_grad()
def test_save_and_load_brings_every_option_back(tmp_path: Path) -> None:
    options: dict[str, Any] = dict(
        fusion_levels=[0, 3],
        fusion_heads=2,
        space_attention_scale="double",
        backbone_attention_scale="double",
        interpolate_offset=0.1,
        alibi_scale=0.5,
        learn_alibi_scale=True,
        largest_strength=12.0,
        initial_gate=0.25,
    )
    network = network_of(**options)
    network.fusion.block(3).log_alibi_scale.fill_(0.3)
    network.save_pretrained(tmp_path)
    values = pictures(1), pictures(1, 3, seed=1), STRENGTHS
    wanted = network(*values).predicted_depth

    loaded, notes = DepthAnythingDSFAForDepthEstimation.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {name: getattr(loaded.config, name) for name in options} == options
    assert torch.equal(loaded(*values).predicted_depth, wanted)

    automatic = AutoModelForDepthEstimation.from_pretrained(tmp_path)
    assert type(automatic) is DepthAnythingDSFAForDepthEstimation
    assert type(AutoConfig.from_pretrained(tmp_path)) is DepthAnythingDSFAConfig
    half = DepthAnythingDSFAForDepthEstimation.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.fusion.block(0).gamma_focus_attn.dtype == torch.bfloat16


def test_fresh_blocks_start_as_the_block_does_and_not_as_transformers_layers_do(
    tmp_path: Path,
) -> None:
    """Also where weights of a plain Depth Anything leave the blocks out."""
    plain_network().save_pretrained(tmp_path)
    config = DepthAnythingDSFAConfig.from_dict(
        {**plain_network().config.to_dict(), "model_type": "depth_anything_dsfa"}
    )
    for network in (
        DepthAnythingDSFAForDepthEstimation(config),
        DepthAnythingDSFAForDepthEstimation.from_pretrained(tmp_path, config=config),
    ):
        block = network.fusion.block(2)
        assert not block.gamma_space_attn.any() and not block.focus_film.weight.any()
        # torch's start of a layer of one input is uniform in (-1, 1), transformers' 0.02 wide.
        assert block.k_embed[0].weight.abs().max() > 0.5
        assert block.k_embed[0].bias.abs().max() > 0


def test_gradients_reach_everything_and_checkpointing_keeps_them() -> None:
    network = network_of(learn_alibi_scale=True).train()
    values = pictures(1), pictures(1, 2, seed=1), STRENGTHS[:, :2]

    def gradients() -> dict[str, Tensor]:
        network.zero_grad()
        network(*values).predicted_depth.log().square().mean().backward()
        return {
            name: value.grad.clone()
            for name, value in network.named_parameters()
            if value.grad is not None
        }

    plain = gradients()
    without = {name for name, _ in network.named_parameters()} - plain.keys()
    # The mask is for training DINOv2; the deepest level of the neck has nothing to add to.
    assert without == {"backbone.embeddings.mask_token"} | {
        f"neck.fusion_stage.layers.0.residual_layer1.convolution{i}.{part}"
        for i in (1, 2)
        for part in ("weight", "bias")
    }
    network.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in network.backbone.encoder.layer)
    saved = gradients()
    assert saved.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-6, msg=name)


@torch.no_grad()
def test_half_precision_is_near() -> None:
    network = network_of()
    values = pictures(1), pictures(1, 2, seed=1), STRENGTHS[:, :2]
    wanted = network(*values).predicted_depth
    with torch.autocast("cpu", torch.bfloat16):
        automatic = network(*values).predicted_depth
    half = network.to(torch.bfloat16)(*(v.bfloat16() for v in values[:2]), values[2])
    for depth in (automatic, half.predicted_depth):
        assert depth.isfinite().all()
        assert (depth.float() - wanted).abs().mean() < 0.05 * spread(wanted)


@torch.no_grad()
def test_tuples_and_hidden_states_are_those_of_the_picture() -> None:
    network = network_of()
    network.backbone.set_attn_implementation("eager")
    values = pictures(1), pictures(1, 2, seed=1), STRENGTHS[:, :2]
    output = network(*values, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 5 and output.hidden_states[0].shape == (1, 36, 32)
    assert len(output.attentions) == 4 and output.attentions[0].shape == (1, 4, 36, 36)
    (depth,) = network(*values, return_dict=False)
    assert torch.equal(depth, output.predicted_depth)
    assert network(*values).hidden_states is None


# -- Mistakes ------------------------------------------------------------------------------------


def test_stack_and_strengths_go_together() -> None:
    network = network_of()
    with pytest.raises(ValueError, match="There is a stack and no K"):
        network(pictures(1), pictures(1, 2))
    with pytest.raises(ValueError, match="There is K and no stack"):
        network(pictures(1), K=STRENGTHS)
    with pytest.raises(ValueError, match=r"K has the shape \(1, 3\); wanted \(1, 2\)"):
        network(pictures(1), pictures(1, 2), STRENGTHS)
    with pytest.raises(ValueError, match="finite strengths"):
        network(pictures(1), pictures(1, 2), torch.tensor([[1.0, math.nan]]))


@pytest.mark.parametrize("shape", [(1, 2, 3, 70, 70), (2, 2, 3, 70, 98), (2, 3, 70, 98)])
def test_frames_of_other_sizes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="frames of the size of the picture"):
        network_of()(pictures(1), torch.zeros(shape), STRENGTHS[:, :2])


def test_loss_is_computed_elsewhere() -> None:
    network = network_of()
    with pytest.raises(NotImplementedError):
        network(pictures(1), labels=torch.zeros(1, HEIGHT, WIDTH))
    with pytest.raises(NotImplementedError):
        network(pictures(1), pictures(1, 3), STRENGTHS, labels=torch.zeros(1, HEIGHT, WIDTH))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"fusion_levels": [4]}, "0 to 3"),
        ({"fusion_levels": []}, "at least one"),
        ({"backbone_attention_scale": "triple"}, "'triple'"),
        ({"space_attention_scale": "triple"}, "'triple'"),
        ({"largest_strength": -1.0}, "largest_strength is -1.0"),
        ({"fusion_heads": 5}, "number of heads"),
    ],
)
def test_options_that_make_no_network(options: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=words):
        network_of(**options)

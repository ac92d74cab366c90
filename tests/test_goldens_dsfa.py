"""Divided space-focus attention against recorded outputs of the authors' code.

The folder is `bokehdepth` under $BOKEHDIFF_FIXTURES (by default shared/fixtures beside the
repository). Its `index.json` names the cases; what a case is, its tensors say. The lists of names
and shapes of the authors' files are `*_manifest.json` there.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Dinov2Config

from bokehdiff.dsfa_files import (
    ENCODERS,
    depth_anything_from_official,
    depth_anything_to_official,
    official_config,
    read_depth_anything_dsfa,
    unidepth_to_official,
)
from bokehdiff.models.depth_anything_dsfa import (
    DepthAnythingDSFAConfig,
    DepthAnythingDSFAForDepthEstimation,
)
from bokehdiff.models.dsfa import DSFABlock
from bokehdiff.models.unidepth_dsfa import PUBLISHED_OPTIONS, DSFAPixelEncoder, UniDepthGeometry
from tests.tiny_unidepth import FINAL_NORM_EPSILON, UniDepthBackbone

DEFAULT_FIXTURES = Path(__file__).resolve().parent.parent.parent / "shared" / "fixtures"
FOLDER = Path(os.environ.get("BOKEHDIFF_FIXTURES") or DEFAULT_FIXTURES) / "bokehdepth"

TOLERANCE = 1e-5
"""Relative and absolute, in float32. The recordings are rounded themselves: in float64 the blocks
are 1.7e-6 from them and depths of up to 74 m 7e-5, so nothing much below could be asked."""

BACKBONE_SCALES = {"cpu": "single", "cuda_sdpa": "double"}
"""Of the attention in the recordings of Depth Anything, by the names of their variants."""


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _cases(is_one: Callable[[dict[str, Any]], bool]) -> list[Any]:
    """Names of the recordings of a kind; one skipped entry if there are none."""
    index = FOLDER / "index.json"
    names = sorted(_json(index)) if index.is_file() else []
    return [name for name in names if is_one(_json(FOLDER / f"{name}.json"))] or _none()


def _manifests(part: str) -> list[Any]:
    """Names of the manifests with tensors of this beginning."""
    paths = sorted(FOLDER.glob("*_manifest.json"))
    return [
        path.stem for path in paths if any(key.startswith(part) for key in _json(path)["shapes"])
    ] or _none()


def _none() -> list[Any]:
    reason = f"no such recordings in {FOLDER}; set BOKEHDIFF_FIXTURES to the folder of fixtures"
    return [pytest.param("none", marks=pytest.mark.skip(reason=reason))]


def _has(*patterns: str) -> Callable[[dict[str, Any]], bool]:
    return lambda case: all(
        any(re.fullmatch(pattern, name) for name in case.get("tensors", ())) for pattern in patterns
    )


class Recording:
    """What one case holds: its settings, its inputs and outputs, and the authors' weights."""

    def __init__(self, name: str) -> None:
        self.case = _json(FOLDER / f"{name}.json")
        self.config = self.case["config"]
        tensors = load_file(FOLDER / f"{name}.safetensors")
        self.state = {
            key.removeprefix("state/"): value
            for key, value in tensors.items()
            if key.startswith("state/")
        }
        self.tensors = {k: v for k, v in tensors.items() if not k.startswith("state/")}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def check(self, name: str, found: Tensor) -> None:
        torch.testing.assert_close(
            found, self.tensors[name], rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m: f"{name}: {m}"
        )


# -- The block -----------------------------------------------------------------------------------

BLOCKS = _cases(_has("in/ref", "in/stack", "in/k", "out/sdpa"))


def _block(recording: Recording, space_attention_scale: str, **options: Any) -> DSFABlock:
    config = recording.config
    block = DSFABlock(
        config["embed_dim"],
        config["num_heads"],
        config["mlp_ratio"],
        space_attention_scale=space_attention_scale,
        **{"alibi_scale": config["alibi_scale"], **options},
    )
    # Depth Anything's blocks have the layer of the shift and scale in a list of one.
    block.load_state_dict(
        {name.replace("focus_film.0.", "focus_film."): v for name, v in recording.state.items()}
    )
    return block


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_golden_block(name: str) -> None:
    recording = Recording(name)
    reference, stack, K = recording["in/ref"], recording["in/stack"], recording["in/k"]
    assert len(recording.state) == recording.case["n_state_tensors"] == 34
    block = _block(recording, "double")
    assert block.ln_focus_ffn.eps == recording.config["layernorm_eps"]

    recording.check("out/sdpa", block(reference, stack, K))
    recording.check("out/sdpa", block(reference, stack, K.unsqueeze(-1)))
    recording.check("out/sdpa_k_none", block(reference, stack))
    recording.check("out/sdpa_k_norm30", block(reference, stack, K / 30))
    recording.check("out/manual", _block(recording, "single")(reference, stack, K))


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_golden_block_with_another_unit_of_strength(name: str) -> None:
    """K over 30 inside the block is the recording of K over 30 outside it."""
    recording = Recording(name)
    block = _block(recording, "double", largest_strength=30.0)
    recording.check(
        "out/sdpa_k_norm30", block(recording["in/ref"], recording["in/stack"], recording["in/k"])
    )


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_golden_steps_of_the_block(name: str) -> None:
    recording = Recording(name)
    reference, stack, K = recording["in/ref"], recording["in/stack"], recording["in/k"]
    block = _block(recording, "double")
    strengths = block.strengths(K, reference)
    tokens = block.strength_tokens(strengths, reference)
    recording.check("mid/k_tokens", tokens)
    scale, shift = block.film(tokens)
    recording.check("mid/film_scale", scale)
    recording.check("mid/film_shift", shift)
    frames = block.attend_space(torch.cat([reference.unsqueeze(1), stack], 1), tokens)
    recording.check("mid/after_space", frames)
    frames = block.modulate(frames, tokens)
    recording.check("mid/after_focus", block.attend_focus(frames, frames, strengths, strengths))


# -- Depth Anything ------------------------------------------------------------------------------

DEPTH_ANYTHINGS = _cases(_has("in/k", r"out/.+/depth", r"out/.+/depth_single"))


def _depth_anything(
    recording: Recording, backbone_attention_scale: str, folder: Path
) -> DepthAnythingDSFAForDepthEstimation:
    """The network, by way of a checkpoint as training on several devices leaves it."""
    config = recording.config
    backbone = Dinov2Config(
        hidden_size=config["dim"],
        num_hidden_layers=config["depth"],
        num_attention_heads=config["vheads"],
        image_size=config["img"],
        patch_size=config["patch_size"],
        layer_norm_eps=config["vit_layernorm_eps"],
        out_indices=[index + 1 for index in config["out_idx"]],
        reshape_hidden_states=False,
    )
    path = folder / "checkpoint.pth"
    state = {f"module.{name}": value for name, value in recording.state.items()}
    torch.save({"model": state, "epoch": 3, "args": {"save": folder, "lr": 5e-6}}, path)
    return read_depth_anything_dsfa(
        path,
        DepthAnythingDSFAConfig(
            backbone_config=backbone,
            reassemble_hidden_size=config["dim"],
            neck_hidden_sizes=config["outch"],
            fusion_hidden_size=config["feats"],
            depth_estimation_type="metric",
            max_depth=int(config["max_depth"]),
            fusion_levels=config["fusion"],
            fusion_heads=config["fheads"],
            space_attention_scale="double",
            backbone_attention_scale=backbone_attention_scale,
            interpolate_offset=config["interpolate_offset"],
            alibi_scale=config["alibi"],
            largest_strength=1.0,
        ),
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", BACKBONE_SCALES)
@pytest.mark.parametrize("name", DEPTH_ANYTHINGS)
@torch.no_grad()
def test_golden_depth_anything(name: str, variant: str, attention: str, tmp_path: Path) -> None:
    recording = Recording(name)
    network = _depth_anything(recording, BACKBONE_SCALES[variant], tmp_path)
    network.backbone.set_attn_implementation(attention)
    sizes = [f"{rows}x{columns}" for rows, columns in recording.case["hw"]]
    assert sizes
    for size in sizes:
        image, stack = recording[f"in/{size}/image"], recording[f"in/{size}/stack"]
        depth = network(image, stack, recording["in/k"]).predicted_depth
        recording.check(f"out/{size}/{variant}/depth", depth)
        recording.check(f"out/{size}/{variant}/depth_single", network(image).predicted_depth)
        features = network.backbone(image).feature_maps
        for level, tokens in enumerate(features):
            if f"out/{size}/{variant}/feature{level}" in recording.tensors:
                recording.check(f"out/{size}/{variant}/feature{level}", tokens[:, 1:])


@pytest.mark.parametrize("name", DEPTH_ANYTHINGS)
@torch.no_grad()
def test_golden_depth_anything_after_save_pretrained(name: str, tmp_path: Path) -> None:
    """Both overrides of the backbone are in the configuration and come back with it."""
    recording = Recording(name)
    _depth_anything(recording, "double", tmp_path).save_pretrained(tmp_path / "network")
    network = DepthAnythingDSFAForDepthEstimation.from_pretrained(tmp_path / "network")
    for rows, columns in recording.case["hw"]:
        size = f"{rows}x{columns}"
        image, stack = recording[f"in/{size}/image"], recording[f"in/{size}/stack"]
        depth = network(image, stack, recording["in/k"]).predicted_depth
        recording.check(f"out/{size}/cuda_sdpa/depth", depth)


@pytest.mark.parametrize("name", DEPTH_ANYTHINGS)
def test_golden_depth_anything_back_to_official(name: str, tmp_path: Path) -> None:
    recording = Recording(name)
    network = _depth_anything(recording, "single", tmp_path)
    back = depth_anything_to_official(network.state_dict())
    assert back.keys() == recording.state.keys()
    assert len(back) == recording.case["n_state_tensors"]
    assert all(torch.equal(back[key], value) for key, value in recording.state.items())


# -- UniDepthV2 ----------------------------------------------------------------------------------

UNIDEPTHS = _cases(_has("in/image", "in/k", r"out/stage\d+/fused", r"out/stage\d+/cls"))


def _unidepth_encoder(recording: Recording) -> DSFAPixelEncoder:
    """DINOv2 of transformers with our blocks, with all of the authors' weights but the registers,
    of which their backbone has one that it does not use."""
    config = recording.config
    assert config["final_norm_eps"] == FINAL_NORM_EPSILON
    backbone = UniDepthBackbone(
        config["embed_dim"], config["depth"], config["num_heads"], config["img_size"]
    )
    levels = [layer - 1 for layer in config["output_idx"]]
    encoder = DSFAPixelEncoder(
        backbone,
        config["embed_dim"],
        levels,
        **{**PUBLISHED_OPTIONS, "num_heads": config["fusion_num_heads"]},
    )
    state = dict(recording.state)
    assert state.pop("backbone.register_tokens").shape == (1, 1, config["embed_dim"])
    names = {
        unidepth_to_official(f"pixel_encoder.{name}", levels).removeprefix("pixel_encoder."): name
        for name in encoder.state_dict()
        if name.startswith("fusion.")
    }
    fusion = {ours: state.pop(theirs) for theirs, ours in names.items()}
    theirs = {name.replace("backbone.", "pretrained.", 1): value for name, value in state.items()}
    prefixed = {f"backbone.{name}": value for name, value in backbone.vit.state_dict().items()}
    vit = depth_anything_from_official(theirs, prefixed)
    encoder.load_state_dict(
        fusion | {f"backbone.vit.{name.removeprefix('backbone.')}": v for name, v in vit.items()}
    )
    return encoder


@pytest.mark.parametrize("name", UNIDEPTHS)
@torch.no_grad()
def test_golden_unidepth_encoder(name: str) -> None:
    recording = Recording(name)
    encoder = _unidepth_encoder(recording)
    image, stack, K = recording["in/image"], recording["in/stack"], recording["in/k"]
    fused, class_tokens = encoder(image, stack, K)
    without_strength, _ = encoder(image, stack, torch.zeros_like(K))
    single, _ = encoder(image)
    for stage, layer in enumerate(recording.config["output_idx"]):
        recording.check(f"out/stage{stage}/fused", fused[layer - 1])
        recording.check(f"out/stage{stage}/fused_k_none", without_strength[layer - 1])
        recording.check(f"out/stage{stage}/single", single[layer - 1])
        recording.check(f"out/stage{stage}/cls", class_tokens[layer - 1])


GEOMETRIES = _cases(lambda case: bool(case.get("geometry")))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_golden_geometry_of_unidepth(name: str) -> None:
    for wanted in _json(FOLDER / f"{name}.json")["geometry"]:
        found = UniDepthGeometry.of(*wanted["hw"])
        assert list(found.pads) == wanted["unidepth_pads_lrtb"]
        assert list(found.padded) == wanted["unidepth_padded_hw"]
        assert math.isclose(found.factor, wanted["unidepth_resize_factor"], rel_tol=1e-12)
        assert list(found.network) == wanted["unidepth_network_hw"]


# -- Full sizes, without numbers -----------------------------------------------------------------


@pytest.mark.parametrize("name", _manifests("encoder_fusion.layers."))
def test_golden_manifest_of_depth_anything(name: str) -> None:
    manifest = _json(FOLDER / f"{name}.json")
    theirs = manifest["config"]
    with torch.device("meta"):
        network = DepthAnythingDSFAForDepthEstimation(
            official_config(
                theirs["encoder"],
                fusion_levels=theirs["fusion_layers"],
                fusion_heads=theirs["num_heads"],
                max_depth=theirs["max_depth"],
            )
        )
        file = {key: torch.empty(shape) for key, shape in manifest["shapes"].items()}
    assert network.config.max_depth == theirs["max_depth"]
    sizes = ENCODERS[theirs["encoder"]]
    assert (sizes["features"], sizes["channels"]) == (theirs["features"], theirs["out_channels"])

    state = network.state_dict()
    official = depth_anything_to_official(state)
    shapes = {key: list(value.shape) for key, value in official.items()}
    assert shapes == manifest["shapes"]
    assert len(official) == manifest["n_tensors"]
    assert sum(value.numel() for value in network.parameters()) == manifest["n_params"]

    ours = depth_anything_from_official(file, state)
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in state.items()
    }
    back = depth_anything_to_official(ours)
    assert {key: list(value.shape) for key, value in back.items()} == manifest["shapes"]


@pytest.mark.parametrize("name", _manifests("pixel_encoder.fusion_blocks."))
def test_golden_manifest_of_unidepth(name: str) -> None:
    """Encoder, fusion and decoder together are all of the file, and the first two are ours."""
    manifest = _json(FOLDER / f"{name}.json")
    shapes = {key: tuple(shape) for key, shape in manifest["shapes"].items()}
    width = shapes["pixel_encoder.backbone.cls_token"][-1]
    layers = 1 + max(
        int(match[1])
        for key in shapes
        if (match := re.match(r"pixel_encoder\.backbone\.blocks\.(\d+)\.", key))
    )
    levels = [layers * stage // 4 - 1 for stage in (1, 2, 3, 4)]
    with torch.device("meta"):
        backbone = UniDepthBackbone(width, layers, width // 64, 518)
        encoder = DSFAPixelEncoder(backbone, width, levels, **PUBLISHED_OPTIONS)

    fusion = {
        unidepth_to_official(f"pixel_encoder.{key}", levels): tuple(value.shape)
        for key, value in encoder.state_dict().items()
        if key.startswith("fusion.")
    }
    vit = depth_anything_to_official(
        {f"backbone.{key}": value for key, value in backbone.vit.state_dict().items()}
    )
    vit_shapes = {
        key.replace("pretrained.", "pixel_encoder.backbone.", 1): tuple(value.shape)
        for key, value in vit.items()
    }
    vit_shapes["pixel_encoder.backbone.register_tokens"] = (1, 1, width)
    decoder = {key: shape for key, shape in shapes.items() if key.startswith("pixel_decoder.")}
    assert fusion | vit_shapes | decoder == shapes
    assert len(fusion) + len(vit_shapes) + len(decoder) == manifest["n_tensors"] == len(shapes)
    assert sum(math.prod(shape) for shape in shapes.values()) == manifest["n_params"]

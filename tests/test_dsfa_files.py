"""Checkpoints of the authors of DSFA: in and back out, strictly, and without running code."""

from __future__ import annotations

import argparse
import pathlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Dinov2Config

from bokehdiff.dsfa_files import (
    depth_anything_to_official,
    load_unidepth_dsfa,
    official_config,
    read_depth_anything,
    read_depth_anything_dsfa,
    read_official_tensors,
    unidepth_to_official,
    write_depth_anything_dsfa,
)
from bokehdiff.models.depth_anything_dsfa import DepthAnythingDSFAForDepthEstimation
from bokehdiff.models.unidepth_dsfa import PUBLISHED_OPTIONS, add_dsfa
from tests.tiny_unidepth import TinyUniDepth, tiny_unidepth

HEADS = 2


def config_of(**options: Any) -> Any:
    """The published configuration, of a tiny size."""
    swiglu = options.pop("swiglu", False)
    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        use_swiglu_ffn=swiglu,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    sizes = dict(reassemble_hidden_size=16, neck_hidden_sizes=[4] * 4, fusion_hidden_size=4)
    return official_config(
        **{"backbone_config": backbone, "fusion_heads": HEADS, "max_depth": 10, **sizes, **options}
    )


def network_of(**options: Any) -> DepthAnythingDSFAForDepthEstimation:
    torch.manual_seed(0)
    return DepthAnythingDSFAForDepthEstimation(config_of(**options)).eval()


def official_of(network: DepthAnythingDSFAForDepthEstimation) -> dict[str, Tensor]:
    return depth_anything_to_official(network.state_dict())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint as it is given and returns its path."""

    def write(stored: Any) -> Path:
        path = tmp_path / "checkpoint.pth"
        torch.save(stored, path)
        return path

    return write


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


# -- Depth Anything ------------------------------------------------------------------------------


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state},
        lambda state: {"state_dict": state, "epoch": 1},
        lambda state: {"model": {f"module.{k}": v for k, v in state.items()}, "optimizer": {}},
    ],
    ids=["bare", "model", "state_dict", "module"],
)
def test_every_wrapping_is_read(
    wrap: Callable[[dict[str, Tensor]], Any], swiglu: bool, checkpoint: Callable[..., Path]
) -> None:
    network = network_of(swiglu=swiglu)
    official = official_of(network)
    assert ("pretrained.blocks.0.mlp.w12.weight" in official) == swiglu
    path = checkpoint(wrap(official))
    found = read_depth_anything_dsfa(path, network.config)
    assert same(found, network) and not found.training


def test_halves_of_joined_layers_are_where_the_authors_have_them() -> None:
    network = network_of(swiglu=True)
    layer, official = network.backbone.encoder.layer[1], official_of(network)
    qkv = official["pretrained.blocks.1.attn.qkv.weight"]
    assert torch.equal(qkv[:16], layer.attention.q_proj.weight)
    assert torch.equal(qkv[16:32], layer.attention.k_proj.weight)
    assert torch.equal(qkv[32:], layer.attention.v_proj.weight)
    both = official["pretrained.blocks.1.mlp.w12.weight"]
    assert torch.equal(both[: len(both) // 2], layer.mlp.gate_proj.weight)
    # The deepest level of the neck is the authors' fourth.
    assert torch.equal(
        official["depth_head.scratch.refinenet4.resConfUnit2.conv1.weight"],
        network.neck.fusion_stage.layers[0].residual_layer2.convolution1.weight,
    )


def test_only_the_beginning_module_goes(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint({"module.a.module.b": torch.zeros(1)})
    assert list(read_official_tensors(path)) == ["a.module.b"]
    path = checkpoint({"a": torch.zeros(1), "module.a": torch.zeros(1)})
    with pytest.raises(ValueError, match="with and without 'module.'"):
        read_official_tensors(path)


@pytest.mark.parametrize("kind", [pathlib.PosixPath, pathlib.PurePosixPath])
def test_paths_in_the_arguments_are_read(kind: type, checkpoint: Callable[..., Path]) -> None:
    network = network_of()
    args = {"save_path": kind("/somewhere/else"), "max_depth": 10.0, "lr": 5e-6}
    path = checkpoint({"model": official_of(network), "args": args, "epoch": 2})
    assert same(read_depth_anything_dsfa(path, network.config), network)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # the list of what is allowed is as it was


def test_paths_of_another_system_or_python_are_read(tmp_path: Path) -> None:
    """What Windows, and Python 3.13, write for a path; only its module is said otherwise."""
    network = network_of()
    for spelling in (b"cpathlib\nWindowsPath\n", b"cpathlib._local\nPosixPath\n"):
        path = tmp_path / "checkpoint.pth"
        torch.save(
            {"model": official_of(network), "args": {"p": pathlib.PosixPath("a")}},
            path,
            pickle_protocol=2,
        )
        _replace_in_pickle(path, b"cpathlib\nPosixPath\n", spelling)
        assert same(read_depth_anything_dsfa(path, network.config), network)


def _replace_in_pickle(path: Path, old: bytes, new: bytes) -> None:
    import zipfile

    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in contents if name.endswith("data.pkl"))
    assert old in contents[pickled]
    contents[pickled] = contents[pickled].replace(old, new)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, value in contents.items():
            archive.writestr(name, value)


class _Mischief:
    """Makes a file where it is read by whoever runs the code in pickles."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("where", ["model", "args"])
def test_pickle_with_code_is_refused_and_not_run(
    where: str, tmp_path: Path, checkpoint: Callable[..., Path]
) -> None:
    target = tmp_path / "made"
    network = network_of()
    stored: dict[str, Any] = {"model": official_of(network), "args": {}}
    stored[where]["mischief"] = _Mischief(target)
    path = checkpoint(stored)
    for read in (
        lambda: read_depth_anything_dsfa(path, network.config),
        lambda: read_depth_anything(path),
        lambda: load_unidepth_dsfa(tiny_unidepth(), path),
    ):
        with pytest.raises(ValueError, match="wants to run code"):
            read()
        assert not target.exists()
    # The file is one that does harm where care is not taken.
    torch.load(path, weights_only=False)
    assert target.exists()


@pytest.mark.parametrize(
    "stored, words",
    [
        ([torch.zeros(1)], "holds a list"),
        ({"model": {"a": 3.0}}, "holds 'a', a float"),
        ({"args": argparse.Namespace(a=1), "model": {}}, "wants to run code"),
        ({"model": {"pretrained.cls_token": torch.zeros(1, 1, 384)}}, "holds no DSFA blocks"),
        ({"encoder_fusion.layers.2.block.gamma": torch.zeros(3)}, "no pretrained.cls_token"),
    ],
)
def test_files_of_something_else(stored: Any, words: str, checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=words):
        read_depth_anything_dsfa(checkpoint(stored))


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no file"):
        read_depth_anything_dsfa(tmp_path / "none.pth")
    damaged = tmp_path / "damaged.pth"
    torch.save({"a": torch.zeros(1000)}, damaged)
    damaged.write_bytes(damaged.read_bytes()[:1500])
    with pytest.raises(ValueError, match="cannot be read"):
        read_depth_anything_dsfa(damaged)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop("pretrained.norm.weight"), "missing: pretrained.norm.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "not in the model: extra"),
        (lambda s: s.update({"pretrained.norm.bias": torch.zeros(3)}), "of another shape"),
    ],
)
def test_a_tensor_too_many_or_too_few(
    change: Callable[[dict[str, Tensor]], Any], words: str, checkpoint: Callable[..., Path]
) -> None:
    network = network_of()
    official = official_of(network)
    change(official)
    with pytest.raises(ValueError, match=words):
        read_depth_anything_dsfa(checkpoint({"model": official}), network.config)


def test_published_configuration() -> None:
    config = official_config("vitg")
    assert config.backbone_config.use_swiglu_ffn
    assert config.backbone_config.out_indices == [10, 20, 30, 40]
    assert (config.space_attention_scale, config.backbone_attention_scale) == ("double", "double")
    assert (config.interpolate_offset, config.largest_strength) == (0.1, 1.0)
    assert official_config(max_depth=20.0).max_depth == 20
    with pytest.raises(ValueError, match="vits, vitb, vitl, vitg"):
        official_config("vitx")
    for wrong in (20.5, "far", -1):
        with pytest.raises(ValueError, match="whole number of metres"):
            official_config(max_depth=wrong)


@pytest.mark.slow
def test_size_levels_and_depth_are_those_of_the_file(checkpoint: Callable[..., Path]) -> None:
    torch.manual_seed(0)
    network = DepthAnythingDSFAForDepthEstimation(official_config("vits", fusion_levels=[1, 3]))
    path = checkpoint({"model": official_of(network), "args": {"max_depth": 20.0}})
    found = read_depth_anything_dsfa(path)
    assert same(found, network)
    assert found.config.max_depth == 20 and list(found.config.fusion_levels) == [1, 3]
    assert found.config.backbone_config.num_attention_heads == 6
    path = checkpoint({"model": official_of(network)})
    assert read_depth_anything_dsfa(path).config.max_depth == 80


@pytest.mark.slow
@torch.no_grad()
def test_plain_depth_anything_is_read_with_fresh_blocks(checkpoint: Callable[..., Path]) -> None:
    torch.manual_seed(0)
    network = DepthAnythingDSFAForDepthEstimation(official_config("vits"))
    plain = {
        name: value
        for name, value in official_of(network).items()
        if not name.startswith("encoder_fusion.")
    }
    found = read_depth_anything(checkpoint(plain), max_depth=20, learn_alibi_scale=True)
    assert (found.config.backbone_attention_scale, found.config.interpolate_offset) == (
        "single",
        0.1,
    )
    assert found.config.largest_strength == 30 and found.config.max_depth == 20
    back = official_of_plain(found)
    assert all(torch.equal(back[name], value) for name, value in plain.items())
    image, stack = torch.randn(1, 3, 28, 42), torch.randn(1, 2, 3, 28, 42)
    wanted = found(image).predicted_depth
    assert torch.equal(found(image, stack, torch.tensor([[5.0, 9.0]])).predicted_depth, wanted)

    with pytest.raises(ValueError, match="missing"):
        read_depth_anything(checkpoint({k: v for k, v in plain.items() if "norm1" not in k}))
    with pytest.raises(ValueError, match="holds DSFA blocks"):
        read_depth_anything(checkpoint(official_of(network)))


def official_of_plain(network: DepthAnythingDSFAForDepthEstimation) -> dict[str, Tensor]:
    state = network.state_dict()
    return depth_anything_to_official({k: v for k, v in state.items() if "fusion.blocks" not in k})


# -- Back ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_written_network_is_read_back_with_its_configuration(tmp_path: Path) -> None:
    network = network_of(alibi_scale=0.25, backbone_attention_scale="single")
    write_depth_anything_dsfa(network, tmp_path / "network.pth")
    stored = torch.load(tmp_path / "network.pth", weights_only=True)
    assert stored["model"].keys() == official_of(network).keys()
    found = read_depth_anything_dsfa(tmp_path / "network.pth")
    assert same(found, network)
    for option in ("alibi_scale", "backbone_attention_scale", "fusion_heads", "max_depth"):
        assert getattr(found.config, option) == getattr(network.config, option)


@torch.no_grad()
def test_written_network_takes_strengths_as_they_are(tmp_path: Path) -> None:
    network = network_of(learn_alibi_scale=True, largest_strength=30.0, initial_gate=0.5).double()
    for level in network.fusion.levels:
        network.fusion.block(level).log_alibi_scale.fill_(0.4)
    write_depth_anything_dsfa(network, tmp_path / "network.pth")
    found = read_depth_anything_dsfa(tmp_path / "network.pth")
    assert found.config.largest_strength == 1 and not found.config.learn_alibi_scale
    assert not any("alibi" in name for name in found.state_dict())
    K = torch.tensor([[10.0, 20.0]], dtype=torch.float64)
    reference = torch.randn(1, 4, 16, dtype=torch.float64)
    stack = torch.randn(1, 2, 4, 16, dtype=torch.float64)
    for level in network.fusion.levels:
        torch.testing.assert_close(
            found.fusion.block(level)(reference, stack, K),
            network.fusion.block(level)(reference, stack, K),
            rtol=1e-10,
            atol=1e-10,
        )
    assert network.config.largest_strength == 30


@torch.no_grad()
def test_scales_that_differ_have_no_place(tmp_path: Path) -> None:
    network = network_of(learn_alibi_scale=True)
    network.fusion.block(3).log_alibi_scale.fill_(1.0)
    with pytest.raises(ValueError, match="has one for all"):
        write_depth_anything_dsfa(network, tmp_path / "network.pth")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "network.pth"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write_depth_anything_dsfa(network_of(), path)
    assert path.read_bytes() == b"mine"
    write_depth_anything_dsfa(network_of(), path, overwrite=True)
    assert same(read_depth_anything_dsfa(path), network_of())
    with pytest.raises(ValueError, match=r"\.safetensors"):
        write_depth_anything_dsfa(network_of(), tmp_path / "network.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["network.pth"]


# -- UniDepthV2 ----------------------------------------------------------------------------------


def unidepth_official(model: TinyUniDepth) -> dict[str, Tensor]:
    levels = model.pixel_encoder.fusion.levels
    return {unidepth_to_official(k, levels): v for k, v in model.state_dict().items()}


def unidepth_trained() -> TinyUniDepth:
    model = tiny_unidepth()
    torch.manual_seed(5)
    add_dsfa(model, **PUBLISHED_OPTIONS)
    return model


@pytest.mark.parametrize("prepared", [False, True])
def test_unidepth_is_loaded_into_a_model_with_or_without_dsfa(
    prepared: bool, checkpoint: Callable[..., Path]
) -> None:
    trained, model = unidepth_trained(), TinyUniDepth()
    official = unidepth_official(trained)
    assert "pixel_encoder.fusion_blocks.3.focus_film.weight" in official
    if prepared:
        add_dsfa(model, learn_alibi_scale=True, largest_strength=1.0)
    load_unidepth_dsfa(model, checkpoint({"model": official, "config": {"a": 1}}))
    found = {k: v for k, v in model.state_dict().items() if "alibi" not in k}
    assert all(torch.equal(found[k], v) for k, v in trained.state_dict().items())
    assert found.keys() == trained.state_dict().keys()
    block = model.pixel_encoder.fusion.block(0)
    assert block.largest_strength == 1
    assert block.space_attn.scale == (16 / 8) ** (-0.5 if prepared else -1)


def test_unidepth_takes_the_moving_average_that_fits(checkpoint: Callable[..., Path]) -> None:
    official = unidepth_official(unidepth_trained())
    average = [value + 1 for value in official.values()]

    def first(ema: Any) -> Tensor:
        path = checkpoint({"model": official, "ema": ema})
        return next(iter(read_official_tensors(path).values()))

    plain = next(iter(official.values()))
    assert torch.equal(first({"shadow_params": average, "decay": 0.99}), plain + 1)
    assert torch.equal(first({"shadow_params": average[1:]}), plain)
    assert torch.equal(first(None), plain)
    with pytest.raises(ValueError, match="does not fit"):
        first({"shadow_params": [*average[:-1], torch.zeros(7, 7, 7)]})


def test_unidepth_of_another_size_leaves_the_model_as_it_was(
    checkpoint: Callable[..., Path],
) -> None:
    official = unidepth_official(unidepth_trained())
    official.pop("pixel_decoder.bias")
    model = tiny_unidepth()
    encoder, before = model.pixel_encoder, {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="missing: pixel_decoder.bias"):
        load_unidepth_dsfa(model, checkpoint({"model": official}))
    assert model.pixel_encoder is encoder
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())

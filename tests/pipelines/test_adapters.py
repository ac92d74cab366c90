"""The calls of diffusers that switch adapters, on pipelines with trained weights: what is rendered,
what becomes of the codec, and which settings are in force."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers.utils import logging

from bokehdiff import BokehDiffPipeline
from bokehdiff.attention import PisaConfig, remove_pisa
from bokehdiff.checkpoints import (
    BokehWeights,
    codec_parameters,
    read_bokeh_weights,
    write_bokeh_weights,
)
from tests.tiny_models import tiny_sdxl_components
from tests.trained_pipelines import (
    DISPARITY,
    PHOTO,
    SETTINGS,
    assert_unchanged,
    base_pipeline,
    rendered,
    state_of,
    trained_pipeline,
    usual_weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# (W + B A) x is W x + B (A x) up to rounding, 2^-24 of each of some hundred layers.
FUSED = dict(rtol=0.0, atol=1e-3)

OTHER_SETTINGS: dict[str, Any] = {
    "pisa": PisaConfig.preset("paper").replace(segments=3).to_dict(),
    "timestep": 299,
}


@functools.cache
def other_weights() -> BokehWeights:
    """A set that differs from ``usual_weights()`` in everything; two settings are its own."""
    usual = usual_weights()
    return dataclasses.replace(
        usual,
        unet_lora={
            name: -value if "lora_B" in name else value for name, value in usual.unet_lora.items()
        },
        vae={name: 1.5 * value.detach() for name, value in usual.vae.items()},
        settings=OTHER_SETTINGS,
    )


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of sets: "full" and "other" replace parts of the codec, "lora" has adapters there."""
    folder = tmp_path_factory.mktemp("sets")
    write_bokeh_weights(usual_weights(), folder / "full")
    write_bokeh_weights(other_weights(), folder / "other")
    write_bokeh_weights(usual_weights("lora"), folder / "lora")
    return folder


def style(seed: int = 7) -> dict[str, torch.Tensor]:
    """Ordinary adapters of an SDXL UNet, of other layers than the sets have."""
    generator = torch.Generator().manual_seed(seed)
    layer = "unet.mid_block.resnets.0.conv2"
    other = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    return {
        f"{layer}.lora_A.weight": torch.randn(2, 32, 3, 3, generator=generator),
        f"{layer}.lora_B.weight": torch.randn(32, 2, 1, 1, generator=generator),
        f"{other}.lora_A.weight": torch.randn(2, 32, generator=generator),
        f"{other}.lora_B.weight": torch.randn(32, 2, generator=generator),
    }


def loaded(*folders: Path) -> BokehDiffPipeline:
    """The base model with sets in it, named as their folders; the last one is active."""
    pipe = base_pipeline()
    for folder in folders:
        pipe.load_bokeh_weights(folder, adapter_name=folder.name)
    return pipe


@functools.cache
def picture(kind: str) -> torch.Tensor:
    """What pipelines of one set, or of none, render that no call has switched."""
    if kind == "base":
        return rendered(base_pipeline())
    if kind == "base with the settings":
        return rendered(base_pipeline(**SETTINGS))
    return rendered(trained_pipeline(kind))


def codec_of(pipe: BokehDiffPipeline) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in codec_parameters(pipe.vae).items()}


def assert_like_base(pipe: BokehDiffPipeline) -> None:
    """Picture, codec, and settings are those of the base model, to the last bit."""
    base = base_pipeline()
    assert torch.equal(rendered(pipe), picture("base"))
    for name, value in codec_of(base).items():
        assert torch.equal(codec_of(pipe)[name], value), name
    assert {name: pipe.config[name] for name in SETTINGS} == {
        name: base.config[name] for name in SETTINGS
    }
    assert pipe.verify_pisa().config == base.verify_pisa().config


def assert_like_trained(pipe: BokehDiffPipeline, vae: str = "full") -> None:
    assert torch.equal(rendered(pipe), picture(vae))
    for name, value in usual_weights(vae).vae.items():
        assert torch.equal(codec_of(pipe)[name], value), name
    assert {name: pipe.config[name] for name in SETTINGS} == SETTINGS
    assert pipe.verify_pisa().config == PisaConfig.from_dict(SETTINGS["pisa"])


# -- Weights of adapters -------------------------------------------------------------------------


@pytest.mark.parametrize("vae", ["full", "lora"])
def test_nothing_is_left_at_weight_zero_but_the_settings(sets: Path, vae: str) -> None:
    pipe = loaded(sets / vae)
    pipe.set_adapters(vae, 0.0)
    # x + 0 is x.
    assert torch.equal(rendered(pipe), picture("base with the settings"))
    assert {name: pipe.config[name] for name in SETTINGS} == SETTINGS
    pipe.set_adapters(vae)
    assert_like_trained(pipe, vae)


def test_a_weight_counts_for_adapters_and_codec_alike(sets: Path, tmp_path: Path) -> None:
    pipe = loaded(sets / "full")
    pipe.set_adapters("full", [0.5])
    weights, before = usual_weights(), codec_of(base_pipeline())
    # Half of B, half way of the codec; halves are exact.
    half = dataclasses.replace(
        weights,
        unet_lora={
            name: value / 2 if "lora_B" in name else value
            for name, value in weights.unet_lora.items()
        },
        vae={
            name: value + (weights.vae[name].detach() - value) / 2 for name, value in before.items()
        },
    )
    write_bokeh_weights(half, tmp_path / "halved")
    for name, value in codec_of(pipe).items():
        assert torch.allclose(value, half.vae[name], rtol=1e-6, atol=1e-7), name
    assert torch.allclose(rendered(pipe), rendered(loaded(tmp_path / "halved")), rtol=0, atol=1e-4)
    assert (rendered(pipe) - picture("full")).abs().max() > 0.01
    # What is saved has its whole weight.
    pipe.save_bokeh_weights(tmp_path / "saved", adapter_name="full")
    assert torch.equal(rendered(loaded(tmp_path / "saved")), picture("full"))


def test_weights_by_parts(sets: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = loaded(sets / "full")
    logging.enable_propagation()
    try:
        pipe.set_adapters("full", {"unet": 0.0, "vae": 1.0})
    finally:
        logging.disable_propagation()
    assert caplog.records == []  # diffusers would say that the codec's is ignored
    only_codec = rendered(pipe)
    assert torch.equal(codec_of(pipe)["encoder.conv_in.weight"], usual_weights().vae[CONV_IN])
    assert (only_codec - picture("base with the settings")).abs().max() > 1e-3
    pipe.set_adapters("full", {"unet": {"down": 0.5}})
    assert torch.equal(codec_of(pipe)["encoder.conv_in.weight"], usual_weights().vae[CONV_IN])
    before = state_of(pipe)
    with pytest.raises(ValueError, match="'full' for the codec is .'block': 0.5.*one number"):
        pipe.set_adapters("full", {"vae": {"block": 0.5}})
    with pytest.raises(ValueError, match="not in the list"):
        pipe.set_adapters("ful")
    with pytest.raises(ValueError, match="not equal to the length"):
        pipe.set_adapters("full", [1.0, 2.0])
    assert_unchanged(pipe, before)


CONV_IN = "encoder.conv_in.weight"


@pytest.mark.parametrize("vae", ["full", "lora"])
def test_disabled_and_enabled(sets: Path, vae: str) -> None:
    pipe = loaded(sets / vae)
    pipe.disable_lora()
    assert_like_base(pipe)
    pipe.enable_lora()
    assert_like_trained(pipe, vae)
    parts = ["unet", "vae"] if vae == "lora" else ["unet"]
    assert pipe.get_list_adapters() == {part: [vae] for part in parts}
    assert pipe.get_active_adapters() == [vae]


def test_what_is_loaded_is_in_effect_even_if_others_were_disabled(sets: Path) -> None:
    pipe = loaded(sets / "other")
    pipe.disable_lora()
    pipe.load_bokeh_weights(sets / "full", adapter_name="full")
    assert_like_trained(pipe)


# -- Several sets --------------------------------------------------------------------------------


def test_sets_are_swapped_whole(sets: Path, tmp_path: Path) -> None:
    alone = loaded(sets / "other")
    wanted = rendered(alone)
    assert (wanted - picture("full")).abs().max() > 0.01
    pipe = loaded(sets / "full", sets / "lora", sets / "other")
    for _ in range(2):
        assert torch.equal(rendered(pipe), wanted)
        assert dict(pipe.config) == dict(alone.config)
        assert pipe.verify_pisa().config == alone.verify_pisa().config
        pipe.set_adapters("full")
        assert_like_trained(pipe)
        pipe.set_adapters("lora")
        assert torch.equal(rendered(pipe), picture("lora"))
        assert torch.equal(codec_of(pipe)[CONV_IN], codec_of(base_pipeline())[CONV_IN])
        pipe.set_adapters("other")

    # Each is saved as itself, whichever is active.
    for name in ("full", "lora", "other"):
        pipe.save_bokeh_weights(tmp_path / name, adapter_name=name)
        saved, given = read_bokeh_weights(tmp_path / name), read_bokeh_weights(sets / name)
        for kind in ("unet_lora", "vae", "vae_lora"):
            one, two = getattr(saved, kind), getattr(given, kind)
            assert one.keys() == two.keys()
            assert all(torch.equal(one[key], value) for key, value in two.items())
        assert saved.settings == {**base_settings(), **given.settings}

    pipe.delete_adapters(["other", "lora"])
    assert pipe.get_list_adapters()["unet"] == ["full"]
    pipe.set_adapters("full")
    assert_like_trained(pipe)
    pipe.unload_lora_weights()
    assert_like_base(pipe)


def base_settings() -> dict[str, Any]:
    pipe = base_pipeline()
    return {name: pipe.config[name] for name in SETTINGS}


def test_two_sets_are_never_active_at_once(sets: Path) -> None:
    pipe = loaded(sets / "full", sets / "other")
    before = state_of(pipe)
    with pytest.raises(ValueError, match="'full' and 'other' are trained weights.*Only one"):
        pipe.set_adapters(["full", "other"])
    with pytest.raises(ValueError, match="named 'full' already.*delete_adapters"):
        pipe.load_bokeh_weights(sets / "full", adapter_name="full")
    for name in ("half", "v1.0", ""):
        with pytest.raises(ValueError, match=f"adapter_name '{name}' cannot be used"):
            pipe.load_bokeh_weights(sets / "full", adapter_name=name)
    assert_unchanged(pipe, before)
    pipe.unet.set_adapters(["full", "other"])  # behind the pipeline's back
    with pytest.raises(ValueError, match="Only one of .*'full', 'other'"):
        pipe.enable_lora()


def test_a_scene_belongs_to_the_codec_it_was_prepared_with(sets: Path) -> None:
    pipe = loaded(sets / "full")
    scene = pipe.prepare(PHOTO, DISPARITY)
    pipe.disable_lora()
    with pytest.raises(ValueError, match="Prepare it again"):
        pipe.render(scene, 0.8, 20.0)
    pipe.enable_lora()
    again = pipe.render(scene, 0.8, 20.0, preserve_detail=False, output_type="pt").images
    assert torch.equal(again, picture("full"))


def test_the_kept_codecs_are_copies(sets: Path) -> None:
    pipe = loaded(sets / "full", sets / "other")
    with torch.no_grad():
        for value in codec_parameters(pipe.vae).values():
            value.fill_(7.0)
    pipe.set_adapters("full")
    assert_like_trained(pipe)
    pipe.unload_lora_weights()
    assert_like_base(pipe)


# -- Beside ordinary adapters --------------------------------------------------------------------


def test_an_ordinary_adapter_beside_a_set(sets: Path) -> None:
    pipe = loaded(sets / "full")
    pipe.set_adapters("full", 0.5)
    codec = codec_of(pipe)
    pipe.load_lora_weights(style(), adapter_name="style")
    assert pipe.get_active_adapters() == ["full", "style"]
    assert all(torch.equal(codec_of(pipe)[name], value) for name, value in codec.items())
    pipe.set_adapters(["style", "full"], [0.0, 1.0])
    assert_like_trained(pipe)
    pipe.set_adapters(["full", "style"])
    both = rendered(pipe)
    assert (both - picture("full")).abs().max() > 0.01
    assert {name: pipe.config[name] for name in SETTINGS} == SETTINGS

    # Alone, it is an adapter of the base model.
    pipe.set_adapters("style")
    only_style = base_pipeline()
    only_style.load_lora_weights(style(), adapter_name="style")
    assert torch.equal(rendered(pipe), rendered(only_style))
    assert torch.equal(codec_of(pipe)[CONV_IN], codec_of(base_pipeline())[CONV_IN])

    pipe.set_adapters(["full", "style"])
    assert torch.equal(rendered(pipe), both)
    pipe.delete_adapters("style")
    assert_like_trained(pipe)
    pipe.load_lora_weights(style(), adapter_name="style")
    assert torch.equal(rendered(pipe), both)
    pipe.delete_adapters("full")
    assert torch.equal(rendered(pipe), rendered(only_style))
    pipe.unload_lora_weights()
    assert_like_base(pipe)


def test_adapters_of_the_text_encoders_change_the_prompt(tmp_path: Path) -> None:
    pipe = BokehDiffPipeline(**tiny_sdxl_components(tmp_path))
    before = pipe.bokeh_prompt()[0]
    generator = torch.Generator().manual_seed(0)
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    lora = {
        f"{layer}.lora_A.weight": torch.randn(2, 32, generator=generator),
        f"{layer}.lora_B.weight": torch.randn(32, 2, generator=generator),
    }
    pipe.load_lora_weights({**style(), **lora}, adapter_name="style")
    assert (pipe.bokeh_prompt()[0] - before).abs().max() > 1e-3
    pipe.disable_lora()
    assert torch.equal(pipe.bokeh_prompt()[0], before)
    pipe.enable_lora()
    assert (pipe.bokeh_prompt()[0] - before).abs().max() > 1e-3
    pipe.delete_adapters("style")
    assert torch.equal(pipe.bokeh_prompt()[0], before)


def test_a_file_of_which_nothing_fits_is_refused(sets: Path) -> None:
    pipe = loaded(sets / "full")
    before = state_of(pipe)
    unprefixed = dict(usual_weights().unet_lora)  # as the authors' file has them
    with pytest.raises(ValueError, match="No adapters were loaded.*load_bokeh_weights"):
        pipe.load_lora_weights(unprefixed, adapter_name="style")
    with pytest.raises(ValueError, match="'full' is a set.*cannot be hot-swapped"):
        pipe.load_lora_weights(style(), adapter_name="full", hotswap=True)
    assert_unchanged(pipe, before)


# -- Fused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("vae", ["full", "lora"])
def test_fused_and_taken_out_again(sets: Path, vae: str) -> None:
    pipe = loaded(sets / vae)
    pipe.fuse_lora()
    for part in [pipe.unet, *([pipe.vae] if vae == "lora" else [])]:
        assert all(layer.merged for layer in part.modules() if hasattr(layer, "merged"))
    assert pipe.num_fused_loras == 1
    assert torch.allclose(rendered(pipe), picture(vae), **FUSED)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    assert torch.allclose(rendered(pipe), picture(vae), **FUSED)
    pipe.unload_lora_weights()
    assert torch.allclose(rendered(pipe), picture("base"), **FUSED)
    assert pipe.config.timestep == 499


def test_half_is_fused(sets: Path) -> None:
    pipe = loaded(sets / "full")
    pipe.set_adapters("full", 0.5)
    half = rendered(pipe)
    pipe.set_adapters("full")
    pipe.fuse_lora(lora_scale=0.5)
    assert torch.allclose(rendered(pipe), half, **FUSED)
    pipe.unload_lora_weights()
    assert torch.allclose(rendered(pipe), half, **FUSED)


def test_fused_weights_are_saved_with_their_codec_and_settings(sets: Path, tmp_path: Path) -> None:
    pipe = loaded(sets / "full")
    pipe.load_lora_weights(style(), adapter_name="style")
    both = rendered(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert torch.allclose(rendered(pipe), both, **FUSED)
    assert {name: pipe.config[name] for name in SETTINGS} == SETTINGS
    pipe.save_pretrained(tmp_path)
    again = BokehDiffPipeline.from_pretrained(tmp_path)
    assert torch.equal(rendered(again), rendered(pipe))
    # It is a base model like any other.
    fused = rendered(pipe)
    pipe.load_bokeh_weights(sets / "other")
    assert pipe.config.timestep == 299
    pipe.unload_lora_weights()
    assert torch.equal(rendered(pipe), fused)


def test_disabling_takes_out_what_is_fused(sets: Path) -> None:
    pipe = loaded(sets / "lora")
    pipe.fuse_lora()
    pipe.disable_lora()
    assert torch.allclose(rendered(pipe), picture("base"), **FUSED)
    assert pipe.config.timestep == 499


REFUSED_WHILE_FUSED: dict[str, Callable[[BokehDiffPipeline, Path], Any]] = {
    "set_adapters": lambda pipe, sets: pipe.set_adapters("other"),
    "another weight": lambda pipe, sets: pipe.set_adapters("full", 0.5),
    "delete_adapters": lambda pipe, sets: pipe.delete_adapters("full"),
    "load_bokeh_weights": lambda pipe, sets: pipe.load_bokeh_weights(sets / "lora"),
    "load_lora_weights": lambda pipe, sets: pipe.load_lora_weights(style(), adapter_name="style"),
}


def test_what_would_have_no_effect_while_fused_is_refused(sets: Path) -> None:
    pipe = loaded(sets / "other", sets / "full")
    pipe.fuse_lora()
    before = state_of(pipe)
    for call in REFUSED_WHILE_FUSED.values():
        with pytest.raises(ValueError, match=r"'full' are fused.*Call unfuse_lora\(\) first"):
            call(pipe, sets)
    assert_unchanged(pipe, before)
    pipe.unfuse_lora()
    pipe.set_adapters("other")
    assert pipe.config.timestep == 299
    for names in (["full"], ["other", "full"], []):
        with pytest.raises(ValueError, match="'other' is active.*fuse_lora.. without names"):
            pipe.fuse_lora(adapter_names=names)
    pipe.disable_lora()
    with pytest.raises(ValueError, match="none is active"):
        pipe.fuse_lora(adapter_names=["other"])


# -- Out again, and to disk ----------------------------------------------------------------------


@pytest.mark.parametrize("vae", ["full", "lora"])
def test_a_deleted_set_leaves_nothing(sets: Path, tmp_path: Path, vae: str) -> None:
    pipe = loaded(sets / vae)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.delete_adapters(vae)
    assert_like_base(pipe)
    assert_unchanged(
        pipe, {**state_of(base_pipeline()), "processors": state_of(pipe)["processors"]}
    )
    pipe.load_bokeh_weights(sets / vae)
    assert_like_trained(pipe, vae)


def test_a_pipeline_with_adapters_in_it_is_not_saved(sets: Path, tmp_path: Path) -> None:
    pipe = loaded(sets / "lora")
    with pytest.raises(ValueError, match=r"adapters in vae, unet.*fuse_lora.*save_bokeh_weights"):
        pipe.save_pretrained(tmp_path / "saved")
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="adapters in"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    pipe.unfuse_lora()
    pipe.delete_adapters("lora")
    pipe.save_pretrained(tmp_path / "saved")
    again = BokehDiffPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(rendered(again), rendered(pipe))


CALLS: dict[str, Callable[[BokehDiffPipeline], Any]] = {
    "set_adapters": lambda pipe: pipe.set_adapters("full"),
    "disable_lora": lambda pipe: pipe.disable_lora(),
    "enable_lora": lambda pipe: pipe.enable_lora(),
    "fuse_lora": lambda pipe: pipe.fuse_lora(lora_scale=0.5),
    "delete_adapters": lambda pipe: pipe.delete_adapters("other"),
    "unload_lora_weights": lambda pipe: pipe.unload_lora_weights(),
    "load_lora_weights": lambda pipe: pipe.load_lora_weights(style(), adapter_name="style"),
}


def test_codec_and_settings_that_could_not_follow(sets: Path) -> None:
    pipe = loaded(sets / "full", sets / "other")
    adapters = pipe.get_list_adapters()
    cpu_offload(pipe.vae, torch.device("cpu"))
    for call in CALLS.values():
        with pytest.raises(ValueError, match=r"codec is offloaded.*remove_all_hooks\(\)"):
            call(pipe)
    pipe.remove_all_hooks()
    remove_pisa(pipe.unet)
    for call in CALLS.values():
        with pytest.raises(RuntimeError, match=r"install_pisa\(\)"):
            call(pipe)
    assert pipe.get_list_adapters() == adapters and pipe.get_active_adapters() == ["other"]
    pipe.install_pisa()
    pipe.set_adapters("full")
    assert_like_trained(pipe)

"""Trained weights into a pipeline and out of it: to the last bit, and nothing halfway."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from bokehdiff import TINY, BokehDiffPipeline
from bokehdiff.attention import PisaConfig, remove_pisa
from bokehdiff.checkpoints import (
    BOKEH_PROMPT,
    LAYOUTS,
    LORA_FILE,
    OFFICIAL_VAE_FILE,
    UNET_LORA_TARGETS,
    VAE_FILE,
    BokehWeights,
    codec_parameters,
    read_bokeh_weights,
    write_bokeh_weights,
)
from bokehdiff.models import StoredPrompt
from tests.tiny_models import (
    PROMPT_CHANNELS,
    photo_and_disparity,
    tiny_stock_pipeline,
    tiny_unet,
    tiny_vae,
)

PISA = PisaConfig.preset("official_weights").to_dict()
SETTINGS: dict[str, Any] = {
    "pisa": PISA,
    "timestep": 399,
    "prompt": BOKEH_PROMPT,
    "pisa_layers": "down_blocks.1.attentions.0,mid_block.attentions.0",
}
# A linear layer of either attention, convolutions, and a projection: peft takes a while for all.
TARGETS = ["to_q", "conv1", "proj_in"]
VAE_TARGETS = ["encoder.conv_in", "encoder.mid_block.attentions.0.to_q", "encoder.conv_out"]


def base_pipeline(**changes: Any) -> BokehDiffPipeline:
    """The untrained tiny SDXL, always the same, without text encoders."""
    generator = torch.Generator().manual_seed(3)
    parts: dict[str, Any] = dict(
        vae=tiny_vae(),
        unet=tiny_unet(),
        scheduler=DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        stored_prompt=StoredPrompt.from_embeddings(
            BOKEH_PROMPT,
            torch.randn(1, 77, 2 * PROMPT_CHANNELS, generator=generator),
            torch.randn(1, PROMPT_CHANNELS, generator=generator),
        ),
    )
    pipe = BokehDiffPipeline(**{**parts, **changes})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def trained_pipeline(vae: str = "full", **lora: Any) -> BokehDiffPipeline:
    """As training leaves it: adapters with random B, a changed codec (or adapters in it)."""
    pipe = base_pipeline(**SETTINGS)
    generator = torch.Generator().manual_seed(5)
    options: dict[str, Any] = dict(r=4, lora_alpha=4, init_lora_weights="gaussian")
    pipe.unet.add_adapter(LoraConfig(**{**options, "target_modules": TARGETS, **lora}))
    if vae == "lora":
        pipe.vae.add_adapter(LoraConfig(**options, target_modules=VAE_TARGETS))
    for model in (pipe.unet, pipe.vae):
        for name, value in model.named_parameters():
            if ".lora_" in name:
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
        model.eval()
    if vae == "full":
        for value in codec_parameters(pipe.vae).values():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return pipe


def weights_of(pipe: BokehDiffPipeline, vae: str = "full") -> BokehWeights:
    weights = BokehWeights(
        unet_lora=get_peft_model_state_dict(pipe.unet),
        vae={},
        vae_lora={},
        unet_lora_config=pipe.unet.peft_config["default"].to_dict(),
        vae_lora_config=None,
        settings=dict(SETTINGS),
    )
    if vae == "full":
        weights.vae = dict(codec_parameters(pipe.vae))
    elif vae == "lora":
        weights.vae_lora = get_peft_model_state_dict(pipe.vae)
        weights.vae_lora_config = pipe.vae.peft_config["default"].to_dict()
    return weights


@functools.cache
def usual_weights(vae: str = "full") -> BokehWeights:
    """Of ``trained_pipeline(vae)``. Not to be changed."""
    return weights_of(trained_pipeline(vae), vae)


@functools.cache
def usual_picture() -> torch.Tensor:
    """By ``trained_pipeline()``."""
    return rendered(trained_pipeline())


def written(folder: Path, vae: str = "full", layout: str = "diffusers") -> Path:
    write_bokeh_weights(usual_weights(vae), folder, layout)
    return folder


PHOTO, DISPARITY = photo_and_disparity(48, 64)


def rendered(pipe: BokehDiffPipeline) -> torch.Tensor:
    """With the codec's losses, since detail put back would hide the codec."""
    return pipe(PHOTO, DISPARITY, 0.8, 20.0, preserve_detail=False, output_type="pt").images


def state_of(pipe: BokehDiffPipeline) -> dict[str, Any]:
    """Everything that loading could have changed."""
    tensors = {
        f"{part}.{name}": value.clone()
        for part in ("unet", "vae")
        for name, value in getattr(pipe, part).state_dict().items()
    }
    return {
        "tensors": tensors,
        "config": json.dumps(dict(pipe.config), default=str),
        "processors": {name: id(one) for name, one in pipe.unet.attn_processors.items()},
        "adapters": pipe.get_list_adapters(),
        "pisa": pipe.verify_pisa().config,
    }


def assert_unchanged(pipe: BokehDiffPipeline, before: dict[str, Any]) -> None:
    after = state_of(pipe)
    tensors = before.pop("tensors")
    found = after.pop("tensors")
    assert after == before
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) for name, value in one.items()
    )


# -- In, out, and back ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vae", "layout"),
    [("full", "diffusers"), ("full", "official"), ("none", "official"), ("lora", "diffusers")],
)
def test_a_loaded_pipeline_renders_as_the_trained_one(
    tmp_path: Path, vae: str, layout: str
) -> None:
    trained = trained_pipeline(vae)
    write_bokeh_weights(weights_of(trained, vae), tmp_path / "set", layout)
    pipe = base_pipeline()
    untrained = rendered(pipe)
    random_state = torch.get_rng_state()
    assert pipe.load_bokeh_weights(tmp_path / "set") is None
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(rendered(pipe), rendered(trained))
    assert (rendered(pipe) - untrained).abs().max() > 0.01
    parts = ["unet", "vae"] if vae == "lora" else ["unet"]
    assert pipe.get_list_adapters() == {part: ["bokehdiff"] for part in parts}
    assert {name: pipe.config[name] for name in SETTINGS} == SETTINGS
    assert pipe.verify_pisa().config == PisaConfig.from_dict(PISA)

    # What is saved again is the same, in every layout that can hold it.
    read = read_bokeh_weights(tmp_path / "set")
    for other in LAYOUTS if vae != "lora" else ["diffusers"]:
        pipe.save_bokeh_weights(tmp_path / other, layout=other)
        again = read_bokeh_weights(tmp_path / other)
        for name in ("unet_lora", "vae", "vae_lora"):
            assert same_tensors(getattr(again, name), getattr(read, name))
        assert again.settings == read.settings
        fresh = base_pipeline()
        fresh.load_bokeh_weights(tmp_path / other)
        assert torch.equal(rendered(fresh), rendered(trained))

    # And out again, to the last bit.
    pipe.unload_lora_weights()
    assert torch.equal(rendered(pipe), untrained)
    assert_unchanged(
        pipe, {**state_of(base_pipeline()), "processors": state_of(pipe)["processors"]}
    )
    pipe.load_bokeh_weights(str(tmp_path), subfolder="set")
    assert torch.equal(rendered(pipe), rendered(trained))


def test_what_is_rendered_depends_on_each_part(tmp_path: Path) -> None:
    """The comparisons above would notice a part that was left behind."""
    weights = usual_weights()
    pictures: list[torch.Tensor] = []
    no_adapters = {name: 0 * value for name, value in weights.unet_lora.items()}
    for changes in ({}, {"vae": {}}, {"settings": {}}, {"unet_lora": no_adapters}):
        write_bokeh_weights(dataclasses.replace(weights, **changes), tmp_path)
        pipe = base_pipeline()
        pipe.load_bokeh_weights(tmp_path)
        pictures.append(rendered(pipe))
    for other in pictures[1:]:
        assert (pictures[0] - other).abs().max() > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_alpha_other_than_the_rank(tmp_path: Path, layout: str) -> None:
    lora = dict(lora_alpha=8, rank_pattern={"to_q": 2}, alpha_pattern={"conv1": 16})
    trained = trained_pipeline(**lora)
    write_bokeh_weights(weights_of(trained), tmp_path, layout)
    pipe = base_pipeline()
    pipe.load_bokeh_weights(tmp_path)
    # Scales are powers of two here, so that it does not matter where they are multiplied in.
    assert torch.equal(rendered(pipe), rendered(trained))


def test_stock_diffusers_loads_the_unet_half(tmp_path: Path) -> None:
    folder = written(tmp_path / "set", vae="lora")
    ours = base_pipeline()
    ours.load_bokeh_weights(folder)
    remove_pisa(ours.unet)
    stock = tiny_stock_pipeline(tmp_path / "vocabulary")
    stock.unet = tiny_unet()
    inputs = unet_inputs()
    untrained = stock.unet(**inputs)[0]
    stock.load_lora_weights(folder)
    assert list(stock.get_list_adapters()) == ["unet"]
    assert torch.equal(stock.unet(**inputs)[0], ours.unet(**inputs)[0])
    assert (stock.unet(**inputs)[0] - untrained).abs().max() > 1e-3


def unet_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return dict(
        sample=torch.randn(1, 4, 8, 8, generator=generator),
        timestep=499,
        encoder_hidden_states=torch.randn(1, 77, 2 * PROMPT_CHANNELS, generator=generator),
        added_cond_kwargs={
            "text_embeds": torch.randn(1, PROMPT_CHANNELS, generator=generator),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
        },
        return_dict=False,
    )


def test_a_stock_folder_takes_weights_and_settings(tmp_path: Path) -> None:
    tiny_stock_pipeline(tmp_path / "vocabulary").save_pretrained(tmp_path / "base")
    settings = {**SETTINGS, "prompt": "wide open"}
    weights = dataclasses.replace(usual_weights(), settings=settings)
    write_bokeh_weights(weights, tmp_path / "set")
    pipe = BokehDiffPipeline.from_pretrained(tmp_path / "base")
    before = pipe.bokeh_prompt()[0]
    pipe.load_bokeh_weights(tmp_path / "set")
    assert not torch.equal(pipe.bokeh_prompt()[0], before)
    assert pipe.make_stored_prompt().config.prompt == "wide open"
    pipe.save_config(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert {name: saved[name] for name in SETTINGS} == settings
    pipe.unload_lora_weights()
    assert torch.equal(pipe.bokeh_prompt()[0], before)


def test_the_authors_weights_bring_the_authors_settings(tmp_path: Path) -> None:
    targets = list(UNET_LORA_TARGETS)
    trained = trained_pipeline(target_modules=targets)
    weights = weights_of(trained)
    save_file(weights.unet_lora, tmp_path / LORA_FILE, metadata={"format": "pt"})
    torch.save(
        {name: value.detach() for name, value in weights.vae.items()}, tmp_path / OFFICIAL_VAE_FILE
    )
    pipe = base_pipeline(**{**SETTINGS, "pisa": None})
    pipe.load_bokeh_weights(tmp_path)
    assert pipe.config.pisa == PISA
    assert (pipe.config.timestep, pipe.config.prompt) == (499, BOKEH_PROMPT)
    assert pipe.config.pisa_layers == "down_blocks.1.attentions.0"
    pipe.verify_pisa()
    assert same_tensors(
        get_peft_model_state_dict(pipe.unet, adapter_name="bokehdiff"),
        get_peft_model_state_dict(trained.unet),
    )


def test_settings_given_to_from_pretrained_win_over_the_folders(tmp_path: Path) -> None:
    tiny_stock_pipeline(tmp_path / "vocabulary").save_pretrained(tmp_path / "stock")
    for folder in ("stock", "ours"):
        pipe = BokehDiffPipeline.from_pretrained(tmp_path / folder, pisa=PISA)
        assert pipe.config.pisa == PISA
        assert pipe.verify_pisa().config == PisaConfig.preset("official_weights")
        pipe.register_to_config(pisa=PisaConfig.preset("paper").to_dict())
        pipe.save_pretrained(tmp_path / "ours")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_take_the_dtype_of_the_pipeline(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = written(tmp_path / "set")
    pipe = base_pipeline()
    pipe.unet.to(dtype)
    pipe.vae.to(dtype)
    before = {name: value.clone() for name, value in codec_parameters(pipe.vae).items()}
    pipe.load_bokeh_weights(folder)
    assert {value.dtype for value in pipe.unet.parameters()} == {dtype}
    assert {value.dtype for value in pipe.vae.parameters()} == {dtype}
    trained = usual_weights().vae
    for name, value in codec_parameters(pipe.vae).items():
        assert torch.equal(value, trained[name].to(dtype))
    pipe.save_bokeh_weights(tmp_path / "again")
    assert load_file(tmp_path / "again" / VAE_FILE)["encoder.conv_in.weight"].dtype == dtype
    pipe.unload_lora_weights()
    assert same_tensors(codec_parameters(pipe.vae), before)


def test_adapters_trained_with_dropout_drop_nothing_when_rendering(tmp_path: Path) -> None:
    trained = trained_pipeline(lora_dropout=0.5)
    write_bokeh_weights(weights_of(trained), tmp_path)
    pipe = base_pipeline()
    pipe.load_bokeh_weights(tmp_path)
    assert torch.equal(rendered(pipe), rendered(trained))
    assert torch.equal(rendered(pipe), rendered(pipe))


def test_the_backend_stays_the_chosen_one(tmp_path: Path) -> None:
    pipe = base_pipeline()
    pipe.verify_pisa().backend = "reference"
    pipe.load_bokeh_weights(written(tmp_path))
    assert pipe.verify_pisa().backend == "reference"
    pipe.unload_lora_weights()
    assert pipe.verify_pisa().backend == "reference"


# -- Beside other adapters -----------------------------------------------------------------------


def test_the_methods_of_diffusers_reach_both_parts(tmp_path: Path) -> None:
    pipe = base_pipeline()
    folder = written(tmp_path, vae="lora")
    pipe.load_bokeh_weights(folder)
    trained, untrained = rendered(pipe), rendered(base_pipeline(**SETTINGS))
    pipe.set_adapters("bokehdiff", 0.0)
    # x + 0 is x.
    assert torch.equal(rendered(pipe), untrained)
    pipe.set_adapters("bokehdiff")
    assert torch.equal(rendered(pipe), trained)
    pipe.disable_lora()
    assert torch.equal(rendered(pipe), untrained)
    pipe.enable_lora()
    assert pipe.get_active_adapters() == ["bokehdiff"]
    pipe.fuse_lora(components=["unet", "vae"])
    # (W + BA) x is W x + B (A x) up to rounding, 2^-24 of each of some hundred layers.
    assert torch.allclose(rendered(pipe), trained, atol=1e-3)
    pipe.unfuse_lora(components=["unet", "vae"])
    assert torch.allclose(rendered(pipe), trained, atol=1e-3)
    pipe.delete_adapters("bokehdiff")
    assert pipe.get_list_adapters() == {}


def test_fused_adapters_keep_their_codec_and_settings(tmp_path: Path) -> None:
    pipe = base_pipeline()
    pipe.load_bokeh_weights(written(tmp_path))
    trained = rendered(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert not any("lora" in name for name, _ in pipe.unet.named_parameters())
    assert torch.allclose(rendered(pipe), trained, atol=1e-3)
    assert pipe.config.timestep == 399


def test_loaded_adapters_become_the_active_ones(tmp_path: Path) -> None:
    pipe = base_pipeline()
    pipe.load_lora_weights(written(tmp_path / "style", vae="none"), adapter_name="style")
    assert pipe.config.timestep == 499  # the stock method loads adapters alone
    pipe.load_bokeh_weights(written(tmp_path / "set"))
    assert pipe.get_active_adapters() == ["bokehdiff"]
    assert torch.equal(rendered(pipe), usual_picture())
    pipe.save_bokeh_weights(tmp_path / "saved", adapter_name="style")
    assert not read_bokeh_weights(tmp_path / "saved").vae


def test_a_pipeline_without_adapters_or_codec_weights() -> None:
    for pipe in (BokehDiffPipeline.from_pretrained(TINY), base_pipeline()):
        before = rendered(pipe)
        assert pipe.get_list_adapters() == {}
        pipe.disable_lora()
        pipe.unload_lora_weights()
        assert torch.equal(rendered(pipe), before)


# -- Mistakes ------------------------------------------------------------------------------------

LAYER = "mid_block.resnets.0.conv1"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
VAE_A = "encoder.conv_in.lora_A.weight"


def without(name: str, *keys: str) -> Callable[[BokehWeights], None]:
    def take_away(weights: BokehWeights) -> None:
        for key in keys:
            del getattr(weights, name)[key]

    return take_away


def with_values(name: str, **values: Any) -> Callable[[BokehWeights], None]:
    def put_in(weights: BokehWeights) -> None:
        found = getattr(weights, name)
        found.update({key.replace("__", "."): value for key, value in values.items()})

    return put_in


def without_configuration(weights: BokehWeights) -> None:
    del weights.unet_lora[B]
    weights.unet_lora_config = None


# name: what of the codec is trained, what is changed, and a part of the sentence.
MISFITS: dict[str, tuple[str, Callable[[BokehWeights], None], str]] = {
    "a layer less": ("full", without("unet_lora", A, B), f"UNet2D.*missing: {A}, {B}"),
    "half a layer less": ("full", without("unet_lora", B), f"missing: {B}"),
    "half a layer less and no configuration": ("full", without_configuration, f"missing: {B}"),
    "a layer more": (
        "full",
        lambda it: it.unet_lora.update({"conv_out.lora_A.weight": torch.zeros(4, 16, 3, 3)}),
        "not in the model: conv_out.lora_A.weight",
    ),
    "adapters of a text encoder": (
        "full",
        lambda it: it.unet_lora.update(
            {f"text_encoder.layers.{i}.lora_A.weight": torch.zeros(4, 8) for i in range(9)}
        ),
        "not in the model: text_encoder.layers.0.*and 6 more",
    ),
    "another width": (
        "full",
        lambda it: it.unet_lora.update({A: torch.zeros(4, 31, 3, 3)}),
        rf"{A} \(4, 31, 3, 3\), wanted \(4, 32, 3, 3\)",
    ),
    "another rank": (
        "full",
        lambda it: it.unet_lora.update({A: torch.zeros(3, 32, 3, 3), B: torch.zeros(32, 3, 1, 1)}),
        r"wanted \(32, 4, 1, 1\)",
    ),
    "a rank that the configuration denies": (
        "full",
        lambda it: it.unet_lora_config.update(r=8),
        "lora_A.weight .*and [0-9]+ more",
    ),
    "a parameter of the codec less": (
        "full",
        without("vae", "encoder.conv_in.bias"),
        "AutoencoderKL.*missing: encoder.conv_in.bias",
    ),
    "a parameter of the codec more": (
        "full",
        lambda it: it.vae.update({"decoder.conv_in.bias": torch.zeros(8)}),
        "not in the model: decoder.conv_in.bias",
    ),
    "a codec of another width": (
        "full",
        lambda it: it.vae.update({"encoder.conv_in.bias": torch.zeros(9)}),
        r"encoder.conv_in.bias \(9,\), wanted \(8,\)",
    ),
    "an adapter of the codec less": (
        "lora",
        without("vae_lora", VAE_A),
        f"AutoencoderKL.*missing: {VAE_A}",
    ),
    "an adapter of the codec of another width": (
        "lora",
        lambda it: it.vae_lora.update({VAE_A: torch.zeros(4, 4, 3, 3)}),
        r"wanted \(4, 3, 3, 3\)",
    ),
    "layers that are not there": (
        "full",
        with_values("settings", pisa_layers="down_blocks.7"),
        "down_blocks.7",
    ),
    "layers as a list": ("full", with_values("settings", pisa_layers=["mid"]), "must be a text"),
    "a timestep beyond the schedule": (
        "full",
        with_values("settings", timestep=1000),
        "timestep 1000.*0 to 999",
    ),
    "half a timestep": ("full", with_values("settings", timestep=1.5), "timestep 1.5"),
    "a prompt that cannot be encoded": (
        "full",
        with_values("settings", prompt="a photo"),
        "'a photo'.*no text encoders",
    ),
    "PISA settings of the future": (
        "full",
        with_values("settings", pisa={**PISA, "photons": 3}),
        "photons",
    ),
    "PISA settings of the wrong kind": (
        "full",
        with_values("settings", pisa={**PISA, "hardness": "high"}),
        "PISA settings of the weights cannot be used",
    ),
}


@pytest.fixture(scope="module")
def shared_pipe() -> BokehDiffPipeline:
    """One pipeline for all misfits: each must leave it as it was."""
    return base_pipeline()


@pytest.mark.parametrize("misfit", MISFITS)
def test_weights_that_do_not_fit_change_nothing(
    tmp_path: Path, misfit: str, shared_pipe: BokehDiffPipeline
) -> None:
    vae, spoil, sentence = MISFITS[misfit]
    copies = {
        name: dict(value) if isinstance(value, dict) else value
        for name, value in vars(usual_weights(vae)).items()
    }
    weights = BokehWeights(**copies)
    spoil(weights)
    write_bokeh_weights(weights, tmp_path)
    before = state_of(shared_pipe)
    with pytest.raises(ValueError, match=sentence):
        shared_pipe.load_bokeh_weights(tmp_path)
    assert_unchanged(shared_pipe, before)


def test_one_set_at_a_time(tmp_path: Path) -> None:
    folder = written(tmp_path)
    pipe = base_pipeline()
    pipe.load_bokeh_weights(folder)
    before = state_of(pipe)
    for name in ("bokehdiff", "another"):
        with pytest.raises(ValueError, match=r"'bokehdiff'.*unload_lora_weights\(\)"):
            pipe.load_bokeh_weights(folder, adapter_name=name)
    assert_unchanged(pipe, before)
    pipe.unload_lora_weights()
    pipe.load_bokeh_weights(folder, adapter_name="another")
    assert pipe.get_list_adapters() == {"unet": ["another"]}


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    folder = written(tmp_path)
    pipe = base_pipeline()
    pipe.load_lora_weights(folder, adapter_name="bokehdiff")
    before = state_of(pipe)
    with pytest.raises(ValueError, match="another|choose"):
        pipe.load_bokeh_weights(folder)
    assert_unchanged(pipe, before)


def test_without_pisa_nothing_is_loaded(tmp_path: Path) -> None:
    pipe = base_pipeline()
    remove_pisa(pipe.unet)
    with pytest.raises(RuntimeError, match="PISA is missing"):
        pipe.load_bokeh_weights(written(tmp_path))
    assert pipe.get_list_adapters() == {}


def test_another_network_takes_no_weights(tmp_path: Path) -> None:
    pipe = BokehDiffPipeline.from_pretrained(TINY)
    write_bokeh_weights(dataclasses.replace(usual_weights(), settings={}), tmp_path)
    with pytest.raises(ValueError, match="do not fit the LightTransportUNet"):
        pipe.load_bokeh_weights(tmp_path)
    assert pipe.get_list_adapters() == {}


def test_nothing_to_save(tmp_path: Path) -> None:
    pipe = base_pipeline()
    with pytest.raises(ValueError, match="no adapter 'bokehdiff'; it has none"):
        pipe.save_bokeh_weights(tmp_path)
    pipe.load_bokeh_weights(written(tmp_path / "set", vae="lora"))
    with pytest.raises(ValueError, match="no adapter 'x'; it has .'bokehdiff'"):
        pipe.save_bokeh_weights(tmp_path / "out", adapter_name="x")
    with pytest.raises(ValueError, match="no place for adapters of the codec"):
        pipe.save_bokeh_weights(tmp_path / "out", layout="official")
    assert not (tmp_path / "out").exists()


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    pipe = base_pipeline()
    folder = written(tmp_path / "set")
    with pytest.raises(ValueError, match="is a file"):
        pipe.load_bokeh_weights(folder / LORA_FILE)
    with pytest.raises(ValueError, match="There is no folder"):
        pipe.load_bokeh_weights(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no trained weights"):
        pipe.load_bokeh_weights(tmp_path)
    with pytest.raises(ValueError, match="holds no trained weights"):
        pipe.load_bokeh_weights(tmp_path, subfolder="nowhere")


# -- From the Hub --------------------------------------------------------------------------------


def test_weights_fetched_before_load_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--owner--bokeh"
    written(repository / "snapshots" / commit / "small")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    pipe = base_pipeline()
    pipe.load_bokeh_weights("owner/bokeh", subfolder="small")
    assert torch.equal(rendered(pipe), usual_picture())
    pipe.unload_lora_weights()
    pipe.load_bokeh_weights("owner/bokeh", subfolder="small/", revision=commit)
    pipe.unload_lora_weights()
    with pytest.raises(ValueError, match="holds no trained weights"):
        pipe.load_bokeh_weights("owner/bokeh")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ValueError, match="'owner/bokeh'.*fetched from the Hub"):
        pipe.load_bokeh_weights("owner/bokeh", subfolder="small")
    with pytest.raises(ValueError, match="'no name'.*fetched from the Hub"):
        pipe.load_bokeh_weights("no name")


# -- The codec under autocast --------------------------------------------------------------------


def test_autocast_leaves_the_codec_its_digits() -> None:
    pipe = base_pipeline()
    image = 2 * torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
    with torch.no_grad():
        latents = pipe.encode_latents(image)
        decoded = pipe.decode_latents(latents)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(pipe.encode_latents(image), latents)
            assert torch.equal(pipe.decode_latents(latents), decoded)
            # Without that, they would not be the same.
            mode = pipe.vae.encode(image).latent_dist.mode()
        assert not torch.equal(mode.float() * pipe.vae.config.scaling_factor, latents)


def test_stock_pipeline_has_no_codec_among_its_adapters() -> None:
    assert "vae" in BokehDiffPipeline._lora_loadable_modules
    assert "vae" not in StableDiffusionXLPipeline._lora_loadable_modules

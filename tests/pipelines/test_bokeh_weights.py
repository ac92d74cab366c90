"""Trained weights into a pipeline and out of it: to the last bit, and nothing halfway."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from huggingface_hub import constants
from peft import get_peft_model_state_dict
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
from tests.hub_server import HubServer, Repository
from tests.tiny_models import PROMPT_CHANNELS, tiny_stock_pipeline, tiny_unet
from tests.trained_pipelines import (
    PISA,
    SETTINGS,
    assert_unchanged,
    base_pipeline,
    rendered,
    state_of,
    trained_pipeline,
    usual_weights,
    weights_of,
)


@functools.cache
def usual_picture() -> torch.Tensor:
    """By ``trained_pipeline()``."""
    return rendered(trained_pipeline())


def written(folder: Path, vae: str = "full", layout: str = "diffusers") -> Path:
    write_bokeh_weights(usual_weights(vae), folder, layout)
    return folder


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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on this machine, with an empty cache."""
    with HubServer() as server:
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


def upload(hub: HubServer, name: str, folder: Path) -> None:
    """All files of a folder, as if they had been committed."""
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    hub.repositories[name] = Repository(files=files)


def authors_repository(folder: Path) -> Path:
    """Two files in a folder ``small/``, and others around them."""
    weights = usual_weights()
    (folder / "small").mkdir(parents=True)
    save_file(weights.unet_lora, folder / "small" / LORA_FILE, metadata={"format": "pt"})
    codec = {name: value.detach() for name, value in weights.vae.items()}
    torch.save(codec, folder / "small" / OFFICIAL_VAE_FILE)
    (folder / "README.md").write_text("# BokehDiff")
    save_file({"weight": torch.zeros(3)}, folder / "depth.safetensors")
    save_file({"weight": torch.zeros(3)}, folder / "small" / "optimizer.safetensors")
    return folder


def test_the_authors_repository(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # They have layers that are not trained here, so the adapters say themselves which they are.
    folder = authors_repository(tmp_path / "repository")
    lora = load_file(folder / "small" / LORA_FILE)
    settings = {"pisa": PISA, "timestep": 499, "vae_file": OFFICIAL_VAE_FILE}
    header = {"format": "pt", "bokehdiff": json.dumps(settings)}
    save_file(lora, folder / "small" / LORA_FILE, metadata=header)
    upload(hub, "owner/bokehdiff", folder)

    pipe = base_pipeline()
    before = state_of(pipe)
    # Without the folder, the sentence says where the weights are.
    for options in ({}, {"subfolder": "large"}):
        with pytest.raises(ValueError, match="no trained weights.*subfolder='small'"):
            pipe.load_bokeh_weights("owner/bokehdiff", **options)
    with pytest.raises(ValueError, match="'owner/nothing'.*could be fetched.*no such repository"):
        pipe.load_bokeh_weights("owner/nothing", subfolder="small")
    with pytest.raises(ValueError, match="could be fetched.*no revision 'v2'"):
        pipe.load_bokeh_weights("owner/bokehdiff", subfolder="small", revision="v2")
    assert_unchanged(pipe, before)

    pipe.load_bokeh_weights("owner/bokehdiff", subfolder="small")
    wanted = rendered(pipe)
    assert pipe.config.timestep == 499 and pipe.config.pisa == PISA
    fetched = {path.partition("/main/")[2] or path for _, path, _ in hub.requests}
    assert not any("depth" in path or "README" in path or "optimizer" in path for path in fetched)

    # Again without the Hub: switched off, or gone.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = base_pipeline()
    again.load_bokeh_weights("owner/bokehdiff", subfolder="small")
    assert torch.equal(rendered(again), wanted)
    with pytest.raises(ValueError, match="'owner/bokehdiff' on the Hub holds no trained weights"):
        base_pipeline().load_bokeh_weights("owner/bokehdiff")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    again.unload_lora_weights()
    again.load_bokeh_weights("owner/bokehdiff", subfolder="small")
    assert torch.equal(rendered(again), wanted)


def test_a_repository_without_its_codec(tmp_path: Path, hub: HubServer) -> None:
    folder = authors_repository(tmp_path / "repository")
    (folder / "small" / OFFICIAL_VAE_FILE).unlink()
    upload(hub, "owner/bokehdiff", folder)
    pipe = base_pipeline()
    with pytest.raises(ValueError, match=f"lacks {OFFICIAL_VAE_FILE}.*Copy or download both"):
        pipe.load_bokeh_weights("owner/bokehdiff", subfolder="small")
    assert pipe.get_list_adapters() == {}


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

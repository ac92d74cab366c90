"""Base models from folders and single files: the same pictures, and other models refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file, save_file

from bokehdiff import TINY, BokehDiffPipeline
from tests.single_files import sdxl_components, write_single_file
from tests.trained_pipelines import rendered

pytestmark = pytest.mark.usefixtures("one_thread")

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
# Tensors of two files lie at other addresses, by which matrix products round differently:
# 2^-24 of values around 1, a few hundred times.
ADDRESSES = dict(rtol=0.0, atol=1e-4)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return sdxl_components(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def folder(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock SDXL pipeline, as diffusers saves it."""
    folder = tmp_path_factory.mktemp("folder")
    StableDiffusionXLPipeline(**parts, add_watermarker=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def picture(folder: Path) -> torch.Tensor:
    return rendered(BokehDiffPipeline.from_pretrained(folder))


def assert_same_parts(one: BokehDiffPipeline, other: BokehDiffPipeline) -> None:
    for part in PARTS:
        tensors = getattr(one, part).state_dict()
        others = getattr(other, part).state_dict()
        assert tensors.keys() == others.keys()
        for name, value in tensors.items():
            assert torch.equal(value, others[name]), f"{part}.{name}"


# -- Folders -------------------------------------------------------------------------------------

BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
SCHEDULERS = {
    "DDPM that clips": DDPMScheduler(**BETAS, clip_sample=True, thresholding=True),
    "DDIM that clips": DDIMScheduler(**BETAS, clip_sample=True, set_alpha_to_one=False),
    "DPM-Solver": DPMSolverMultistepScheduler(
        **BETAS, use_karras_sigmas=True, timestep_spacing="trailing"
    ),
    "Euler": EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", use_karras_sigmas=True),
    "Euler, ancestral": EulerAncestralDiscreteScheduler(**BETAS),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_of_any_scheduler_only_the_noise_levels_count(
    tmp_path: Path, folder: Path, picture: torch.Tensor, name: str
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    scheduler = SCHEDULERS[name]
    scheduler.save_pretrained(tmp_path / "model" / "scheduler")
    index = tmp_path / "model" / "model_index.json"
    values = json.loads(index.read_text())
    values["scheduler"] = ["diffusers", type(scheduler).__name__]
    # As published pipelines have them.
    values |= {"force_zeros_for_empty_prompt": True, "add_watermarker": None}
    index.write_text(json.dumps(values))
    pipe = BokehDiffPipeline.from_pretrained(tmp_path / "model")
    assert type(pipe.scheduler) is type(scheduler)
    assert torch.allclose(rendered(pipe), picture, **ADDRESSES)
    assert pipe.watermark is None


def test_half_precision_files_of_a_variant(
    tmp_path: Path, parts: dict[str, Any], picture: torch.Tensor
) -> None:
    stock = StableDiffusionXLPipeline(**sdxl_components(tmp_path / "vocabulary"))
    stock.to(torch.float16)
    stock.save_pretrained(tmp_path / "model", variant="fp16")
    assert (tmp_path / "model/unet/diffusion_pytorch_model.fp16.safetensors").is_file()
    for dtype in (torch.float32, torch.float16):
        pipe = BokehDiffPipeline.from_pretrained(tmp_path / "model", variant="fp16", dtype=dtype)
        for part in PARTS:
            for name, value in getattr(pipe, part).state_dict().items():
                wanted = parts[part].state_dict()[name]
                if wanted.is_floating_point():
                    assert value.dtype == dtype
                    wanted = wanted.half().to(dtype)
                assert torch.equal(value, wanted), f"{part}.{name}"
        # Weights lose the last 13 bits: 2^-11 of each, in some hundred layers.
        assert (rendered(pipe) - picture).abs().max() < 0.02
    with pytest.raises(ValueError, match=r"only as variant fp16.*variant='fp16'"):
        BokehDiffPipeline.from_pretrained(tmp_path / "model")
    # A part that comes from elsewhere is not looked for.
    with pytest.raises(ValueError, match="weights of vae"):
        BokehDiffPipeline.from_pretrained(tmp_path / "model", unet=parts["unet"])


def test_diffusers_does_not_know_our_class() -> None:
    """What our documentation warns of. If diffusers has learnt to say more, so should it."""
    with pytest.raises(AttributeError, match="diffusers has no attribute BokehDiffPipeline"):
        DiffusionPipeline.from_pretrained(TINY)


# -- Single files --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single_file(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    write_single_file(parts, path)
    return path


@pytest.fixture(scope="module")
def config(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small files of a stock folder, without weights."""
    config = tmp_path_factory.mktemp("config") / "sdxl"
    shutil.copytree(folder, config, ignore=shutil.ignore_patterns("*.safetensors"))
    return config


def test_a_single_file_is_the_same_model(
    tmp_path: Path, folder: Path, single_file: Path, config: Path, picture: torch.Tensor
) -> None:
    pipe = BokehDiffPipeline.from_single_file(single_file, config=config)
    assert type(pipe) is BokehDiffPipeline
    assert_same_parts(pipe, BokehDiffPipeline.from_pretrained(folder))
    assert torch.allclose(rendered(pipe), picture, **ADDRESSES)
    assert not any(getattr(pipe, part).training for part in PARTS)
    # Saved, it is a folder like any other.
    pipe.save_pretrained(tmp_path)
    assert_same_parts(BokehDiffPipeline.from_pretrained(tmp_path), pipe)


def test_settings_dtype_and_parts_given_with_a_single_file(
    single_file: Path, config: Path, parts: dict[str, Any]
) -> None:
    pipe = BokehDiffPipeline.from_single_file(
        str(single_file),
        config=str(config),
        dtype=torch.bfloat16,
        vae=parts["vae"],
        pisa_layers="mid_block.attentions.0",
        timestep=399,
    )
    assert pipe.unet.dtype == pipe.text_encoder_2.dtype == torch.bfloat16
    assert pipe.vae is parts["vae"]
    assert pipe.pisa_layer_names == ["mid_block.attentions.0"] and pipe.config.timestep == 399
    pipe.verify_pisa()


def test_a_file_without_a_codec_takes_another(
    tmp_path: Path, single_file: Path, config: Path, parts: dict[str, Any]
) -> None:
    tensors = {k: v for k, v in load_file(single_file).items() if "first_stage_model" not in k}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds no vae: no names.*first_stage_model.*vae=\.\.\."):
        BokehDiffPipeline.from_single_file(tmp_path / "model.safetensors", config=config)
    pipe = BokehDiffPipeline.from_single_file(
        tmp_path / "model.safetensors", config=config, vae=parts["vae"]
    )
    assert pipe.vae is parts["vae"]


ONE = torch.zeros(1)
FIRST = "model.diffusion_model.input_blocks.0.0.weight"


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return rename


def replaced(**values: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], Any]:
    def replace(tensors: dict[str, torch.Tensor]) -> None:
        tensors.clear()
        tensors.update({name.replace("__", "."): value for name, value in values.items()})

    return replace


# name: what is done to the tensors of the file, and a part of the sentence.
OTHER_MODELS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "inpainting": (
        lambda it: it.update({FIRST: torch.zeros(16, 9, 3, 3)}),
        "inpainting or editing model, whose UNet takes 9 channels",
    ),
    "the refiner": (
        renamed("conditioner.embedders.1.model.", "conditioner.embedders.0.model."),
        "the SDXL refiner",
    ),
    "Stable Diffusion 1.5": (
        renamed("conditioner.embedders.0.", "cond_stage_model."),
        "Stable Diffusion 1 or 2",
    ),
    "velocity": (lambda it: it.update(v_pred=ONE), "velocity .v_pred."),
    "EDM": (lambda it: it.update(edm_mean=ONE), "EDM schedule"),
    "adapters": (
        replaced(lora_unet_input_blocks_1_0__lora_down__weight=ONE),
        "adapters .LoRA.*load_bokeh_weights or load_lora_weights",
    ),
    "a UNet of diffusers": (replaced(conv_in__weight=ONE), "UNet in the layout of diffusers"),
    "a codec": (replaced(first_stage_model__encoder__conv_in__weight=ONE), "a codec alone"),
    "something else": (replaced(a__b=ONE), r"no model that is known here \(a.b\)"),
    "nothing": (lambda it: it.clear(), "nothing at all"),
    "a layer less": (
        lambda it: it.pop("model.diffusion_model.middle_block.0.in_layers.2.weight"),
        "lacks tensors of the UNet or the codec",
    ),
    "a layer of the codec less": (
        lambda it: it.pop("first_stage_model.encoder.conv_in.weight"),
        "lacks tensors of the UNet or the codec",
    ),
    "a layer of a text encoder less": (
        lambda it: it.pop("conditioner.embedders.1.model.ln_final.weight"),
        "lacks tensors of text_encoder_2.*final_layer_norm.weight",
    ),
    "a layer of another width": (
        lambda it: it.update({"model.diffusion_model.out.2.weight": torch.zeros(4, 8, 3, 3)}),
        "conv_out.weight expected shape",
    ),
}


@pytest.mark.parametrize("model", OTHER_MODELS)
def test_files_of_other_models_are_refused(
    tmp_path: Path, single_file: Path, config: Path, model: str
) -> None:
    change, sentence = OTHER_MODELS[model]
    tensors = load_file(single_file)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=sentence):
        BokehDiffPipeline.from_single_file(tmp_path / "model.safetensors", config=config)


class Code:
    """What must not run when a model is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.mkdir, (Path("code-ran"),))


def test_files_that_are_no_safetensors_are_not_opened(
    tmp_path: Path, config: Path, single_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {FIRST: Code()}}, "model.ckpt")
    Path("cut.safetensors").write_bytes(single_file.read_bytes()[:1000])
    for name in ("model.ckpt", "cut.safetensors"):
        with pytest.raises(ValueError, match="no safetensors file.*can hold code"):
            BokehDiffPipeline.from_single_file(name, config=config)
    assert not Path("code-ran").exists()


def test_places_that_hold_no_single_file(
    tmp_path: Path, folder: Path, single_file: Path, config: Path
) -> None:
    load = BokehDiffPipeline.from_single_file
    with pytest.raises(ValueError, match="is a folder.*from_pretrained loads it"):
        load(folder)
    with pytest.raises(ValueError, match="is a file.*from_single_file"):
        BokehDiffPipeline.from_pretrained(single_file)
    with pytest.raises(ValueError, match="There is no file"):
        load(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no model_index.json"):
        load(single_file, config=tmp_path)
    # Offline, and nothing was fetched before.
    with pytest.raises(ValueError, match="could not be fetched from the Hub.*give config="):
        load(single_file, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="could not be fetched"):
        load(
            "https://huggingface.co/owner/name/blob/main/model.safetensors",
            config=config,
            cache_dir=tmp_path,
        )

"""Training BokehDiff: adapters and their files, losses, PISA over the run, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from bokehdiff import BokehDiffPipeline
from bokehdiff.attention import PisaConfig
from bokehdiff.checkpoints import LORA_FILE, OFFICIAL_VAE_FILE, VAE_FILE, VAE_TRAINED_PARTS
from data_synthesis import write_shards
from data_synthesis.layer_scenes import LayerScenes
from tests.tiny_models import tiny_stock_pipeline
from tests.training.runs import (
    REPOSITORY,
    arguments,
    assert_same_tensors,
    logged,
    scene,
    train,
)
from training import bokehdiff_task, finetune
from training.bokehdiff_task import BokehDiffTask, build_pipeline

# Files of the other trainings begin with what they train.
CONFIGS = [
    path
    for path in sorted((REPOSITORY / "training" / "configs").glob("*.yaml"))
    if not path.name.startswith(("bokeh_stack_", "bokehflow_", "dsfa_", "litebokeh_"))
]
PAPER = REPOSITORY / "training" / "configs" / "paper.yaml"
OFFICIAL = REPOSITORY / "training" / "configs" / "official.yaml"

# What makes a recipe for one GPU and twelve hours one for a processor and a test.
SCALED_DOWN = {
    "data_size": 64,
    "data_crop_size": 64,
    "data_workers": 0,
    "warmup_steps": 2,
    "log_steps": 1,
    "mixed_precision": "no",
    "validation_scenes": 0,
    "report_to": "none",
}


def train_recipe(config: Path, output_dir: Path, *flags: str, **settings: Any) -> None:
    values = {"config": config, "output_dir": output_dir, **SCALED_DOWN, **settings}
    finetune.main(
        finetune.parse_args(
            [part for name, value in values.items() for part in (f"--{name}", str(value))]
            + list(flags)
        )
    )


@pytest.fixture
def trained_pipes(monkeypatch: pytest.MonkeyPatch) -> list[BokehDiffPipeline]:
    """The pipelines that runs in this process train, one after the other."""
    pipes: list[BokehDiffPipeline] = []

    def build_and_keep(args: Any) -> BokehDiffPipeline:
        pipes.append(build_pipeline(args))
        return pipes[-1]

    monkeypatch.setattr(bokehdiff_task, "build_pipeline", build_and_keep)
    return pipes


def assert_same_course(first: Path, second: Path, rel: float) -> None:
    """The losses of two runs agree to `rel`, their gradients, which add up more, to 10 `rel`."""
    for one, other in zip(logged(first, "train"), logged(second, "train"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=rel)
        norm = other["gradient_norm_unet"]
        assert one["gradient_norm_unet"] == pytest.approx(norm, rel=10 * rel)


@torch.no_grad()
def rendered(pipe: BokehDiffPipeline) -> torch.Tensor:
    return pipe.render_tensors(*scene())


# -- The recipe of the paper ---------------------------------------------------------------------


def test_the_paper_scaled_down_with_every_loss_on(
    tmp_path: Path,
    tiny_sdxl: str,
    judges: dict[str, str],
    trained_pipes: list[BokehDiffPipeline],
) -> None:
    # The same two pictures again and again, so that the losses can be seen to fall.
    write_shards(LayerScenes(1, size=64), tmp_path / "scenes", count=2)
    output = tmp_path / "out"
    train_recipe(
        PAPER,
        output,
        *("--export", "official"),
        pretrained=tiny_sdxl,
        max_train_steps=30,
        learning_rate=1e-2,
        loss_adversarial_weight="0.5",
        data_shards=tmp_path / "scenes",
        **judges,
    )
    course = logged(output, "train")
    assert len(course) == 30
    parts = {"reconstruction", "perceptual", "edge", "adversarial", "discriminator"}
    assert all(parts <= set(entry) for entry in course)
    norms = {name for name in course[-1] if name.startswith("gradient_norm")}
    assert norms == {f"gradient_norm_{part}" for part in ("unet", "vae", "discriminator")}
    # All that is seen of the rendering improves. The judge, whose opponent improves too, need not.
    falls = {"loss": 0.985, "reconstruction": 0.95, "perceptual": 0.985, "edge": 0.985}
    for name, share in falls.items():
        before, after = (sum(entry[name] for entry in part) for part in (course[:6], course[-6:]))
        assert after < share * before, name
    assert (output / "checkpoint-30" / "trainer_state" / "discriminator.safetensors").is_file()

    # A fresh pipeline renders with what was trained, from either layout, to the last bit.
    (trained,) = trained_pipes
    trained.unet.eval()
    trained.install_pisa()  # with the final hardness, as a fresh one
    base = BokehDiffPipeline.from_pretrained(tiny_sdxl)
    untrained = rendered(base)
    base.load_bokeh_weights(output)
    assert torch.equal(rendered(base), rendered(trained))
    assert (rendered(base) - untrained).abs().max() > 1e-3
    other = BokehDiffPipeline.from_pretrained(tiny_sdxl)
    other.load_bokeh_weights(output / "official")
    assert torch.equal(rendered(other), rendered(trained))

    # The files are those of the manifests: the same tensors on a smaller network.
    ours = load_file(output / LORA_FILE)
    theirs = load_file(output / "official" / LORA_FILE)
    assert {name.removeprefix("unet.") for name in ours} == set(theirs)
    assert all(name.startswith("unet.") for name in ours)
    suffixes = {name.rsplit(".lora_", 1)[1] for name in theirs}
    assert suffixes == {"A.weight", "B.weight"}
    codec = torch.load(output / "official" / OFFICIAL_VAE_FILE, weights_only=True)
    assert set(codec) == set(load_file(output / VAE_FILE))
    assert {name.split(".")[1] for name in codec} == {"conv_in", "mid_block", "conv_out"}

    card = (output / "README.md").read_text()
    assert "load_bokeh_weights" in card and "TODO" not in card


def test_stock_diffusers_loads_the_unet_half(
    tmp_path: Path, trained_pipes: list[BokehDiffPipeline]
) -> None:
    stock = tiny_stock_pipeline(tmp_path / "vocabulary")
    stock.save_pretrained(tmp_path / "base")
    model = ["--pretrained", str(tmp_path / "base"), "--mode", "lora", "--vae_mode", "full"]
    train(tmp_path / "out", model=model, learning_rate=0.05, warmup_steps=0)
    (trained,) = trained_pipes
    assert trained.text_encoder is None  # the prompt is embedded once

    stock = StableDiffusionXLPipeline.from_pretrained(tmp_path / "base")
    stock.load_lora_weights(tmp_path / "out")
    ours = BokehDiffPipeline.from_pretrained(tmp_path / "base")
    ours.load_bokeh_weights(tmp_path / "out")
    for name, value in ours.unet.state_dict().items():
        if "lora" in name:
            (adapter,) = stock.unet.peft_config
            theirs = stock.unet.state_dict()[name.replace("bokehdiff", adapter)]
            assert torch.equal(value, theirs), name
    assert torch.equal(rendered(ours), rendered(_at_the_end(trained)))


def _at_the_end(pipe: BokehDiffPipeline) -> BokehDiffPipeline:
    """A pipeline that was trained, with the final hardness and without dropout."""
    pipe.unet.eval()
    pipe.install_pisa()
    return pipe


def test_adapters_of_the_vae(
    tmp_path: Path, tiny_sdxl: str, trained_pipes: list[BokehDiffPipeline]
) -> None:
    model = ["--pretrained", tiny_sdxl, "--mode", "lora", "--vae_mode", "lora"]
    train(tmp_path, model=model, learning_rate=0.05, warmup_steps=0, lora_rank=2)
    fresh = BokehDiffPipeline.from_pretrained(tiny_sdxl)
    fresh.load_bokeh_weights(tmp_path)
    assert torch.equal(rendered(fresh), rendered(_at_the_end(trained_pipes[0])))
    keys = load_file(tmp_path / LORA_FILE)
    assert {name.split(".")[0] for name in keys} == {"unet", "vae"}
    trained_parts = {".".join(name.split(".")[1:3]) for name in keys if name.startswith("vae.")}
    assert trained_parts == {"encoder.conv_in", "encoder.mid_block", "encoder.conv_out"}
    assert not (tmp_path / VAE_FILE).exists()
    assert {"gradient_norm_unet", "gradient_norm_vae"} <= set(logged(tmp_path, "train")[0])


def test_a_checkpoint_is_a_folder_that_loads(
    tmp_path: Path, tiny_sdxl: str, trained_pipes: list[BokehDiffPipeline]
) -> None:
    model = ["--pretrained", tiny_sdxl, "--mode", "lora", "--vae_mode", "full"]
    train(tmp_path, model=model, learning_rate=0.05, warmup_steps=0)
    fresh = BokehDiffPipeline.from_pretrained(tiny_sdxl)
    fresh.load_bokeh_weights(tmp_path / "checkpoint-2")
    assert torch.equal(rendered(fresh), rendered(_at_the_end(trained_pipes[0])))


def test_the_authors_recipe_is_deterministic_and_resumes_exactly(
    tmp_path: Path, tiny_sdxl: str, judges: dict[str, str]
) -> None:
    # With dropout, adversary and all; gradients checkpointed in one of the pieces only.
    settings = dict(
        pretrained=tiny_sdxl,
        max_train_steps=4,
        checkpoint_steps=2,
        learning_rate=1e-2,
        loss_adversarial_weight="0.1",
        **judges,
    )
    train_recipe(OFFICIAL, tmp_path / "whole", **settings)
    flags = ("--resume", str(tmp_path / "whole" / "checkpoint-2"))
    train_recipe(OFFICIAL, tmp_path / "pieces", *flags, **settings)
    for file in (
        LORA_FILE,
        VAE_FILE,
        "checkpoint-4/trainer_state/discriminator.safetensors",
    ):
        assert_same_tensors(tmp_path / "whole" / file, tmp_path / "pieces" / file)
    config = BokehDiffPipeline.from_pretrained(tiny_sdxl)
    config.load_bokeh_weights(tmp_path / "whole")
    assert config.config.pisa["name"] == "official_weights"


def test_dropout_is_drawn_anew_for_each_batch_and_the_same_when_recomputed(
    tmp_path: Path, tiny_sdxl: str
) -> None:
    pisa = "{preset: official_weights, dropout: 0.5}"
    model = ["--pretrained", tiny_sdxl, "--model_pisa", pisa]
    seeds = []
    original = PisaConfig.replace

    def note(self: PisaConfig, **changes: Any) -> PisaConfig:
        if "seed" in changes:
            seeds.append(changes["seed"])
        return original(self, **changes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PisaConfig, "replace", note)
        train(tmp_path / "plain", model=model)
    assert len(set(seeds)) == 2
    train(tmp_path / "checkpointed", "--gradient_checkpointing", model=model)
    assert_same_course(tmp_path / "plain", tmp_path / "checkpointed", rel=1e-5)


def test_the_adversary_is_heard_from_its_step_on_and_learns_before(
    tmp_path: Path, judges: dict[str, str]
) -> None:
    backbone = judges["loss_adversarial_backbone"]
    weight = "{1: 0.0, 2: 0.5}"
    train(
        tmp_path,
        loss_adversarial_weight=weight,
        loss_adversarial_backbone=backbone,
        max_train_steps=4,
    )
    course = logged(tmp_path, "train")
    # Steps are counted from 0, so that step 2 is the third.
    assert [entry["step"] for entry in course if "adversarial" in entry] == [3, 4]
    assert all(entry["gradient_norm_discriminator"] > 0 for entry in course)


# -- The networks over the run -------------------------------------------------------------------


def test_hardness_follows_the_step_and_is_final_in_validation(
    tmp_path: Path, tiny_sdxl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    render = BokehDiffTask.render

    def note_hardness(self: BokehDiffTask, **inputs: torch.Tensor) -> torch.Tensor:
        seen.append((torch.is_grad_enabled(), self.pipe.verify_pisa().config.hardness))
        return render(self, **inputs)

    monkeypatch.setattr(BokehDiffTask, "render", note_hardness)
    train(tmp_path, model=["--pretrained", tiny_sdxl], validation_scenes=1, validation_steps=1)
    assert [hardness for training, hardness in seen if training] == [1, 2]
    assert {hardness for training, hardness in seen if not training} == {1e6}
    assert BokehDiffPipeline.from_pretrained(tmp_path).config.pisa["hardness"] == 1e6


def test_frozen_networks_stay_as_they_were(
    tmp_path: Path, tiny_sdxl: str, trained_pipes: list[BokehDiffPipeline]
) -> None:
    before = BokehDiffPipeline.from_pretrained(tiny_sdxl)
    model = ["--pretrained", tiny_sdxl, "--mode", "lora", "--vae_mode", "full"]
    train(tmp_path, model=model, learning_rate=0.05, warmup_steps=0)
    after = dict(trained_pipes[0].vae.named_parameters())
    changed = {
        name.rsplit(".", 1)[0]
        for name, value in before.vae.named_parameters()
        if not torch.equal(value, after[name])
    }
    assert changed and all(name.startswith(VAE_TRAINED_PARTS) for name in changed)
    base = {
        name.replace(".base_layer", ""): value
        for name, value in trained_pipes[0].unet.named_parameters()
        if "lora" not in name
    }
    assert all(torch.equal(base[name], value) for name, value in before.unet.named_parameters())


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, tiny_sdxl: str) -> None:
    model = ["--pretrained", tiny_sdxl]
    train(tmp_path / "plain", model=model)
    train(tmp_path / "checkpointed", "--gradient_checkpointing", model=model)
    assert_same_course(tmp_path / "plain", tmp_path / "checkpointed", rel=1e-5)


def test_bfloat16_trains_adapters_in_float32(
    tmp_path: Path, tiny_sdxl: str, trained_pipes: list[BokehDiffPipeline]
) -> None:
    model = ["--pretrained", tiny_sdxl, "--mode", "lora", "--vae_mode", "full"]
    for precision in ("no", "bf16"):
        train(tmp_path / precision, model=model, mixed_precision=precision)
    exact, rough = (logged(tmp_path / name, "train") for name in ("no", "bf16"))
    # bfloat16 has 8 bits: a relative 2^-8 for each of a few dozen layers.
    assert rough[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.05)
    assert rough[0]["loss"] != exact[0]["loss"]
    pipe = trained_pipes[1]
    kinds = {("lora" in name, value.dtype) for name, value in pipe.unet.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert {value.dtype for value in pipe.vae.parameters()} == {torch.float32}


@pytest.mark.slow
def test_a_compiled_unet_trains_alike(tmp_path: Path, tiny_sdxl: str) -> None:
    model = ["--pretrained", tiny_sdxl, "--mode", "lora"]
    train(tmp_path / "eager", model=model)
    train(tmp_path / "compiled", "--compile", model=model)
    assert_same_course(tmp_path / "eager", tmp_path / "compiled", rel=1e-4)


# -- Settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_shipped_settings_are_valid(config: Path) -> None:
    args = finetune.parse_args(["--config", str(config)])
    assert args.output_dir == f"outputs/{config.stem}"


def test_there_is_a_recipe_of_the_paper_of_the_code_and_of_the_embedded_checkpoint() -> None:
    stems = {config.stem for config in CONFIGS}
    assert stems == {"official", "paper", "tiny", "tiny_disparity"}


LORA = ["--output_dir", "x", "--pretrained", "y", "--mode", "lora"]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--model_unet", "{}"], "no output folder"),
        (["--output_dir", "x"], "Say where the model comes from"),
        (["--output_dir", "x", "--model_unet", "{}", "--pretrained", "y"], "not both"),
        (["--output_dir", "x", "--model_unet", "{}", "--mode", "lora"], "Set pretrained"),
        (["--output_dir", "x", "--model_unet", "{}", "--vae_mode", "full"], "vae_mode none"),
        (["--output_dir", "x", "--pretrained", "y", "--vae_mode", "lora"], "or mode lora"),
        ([*LORA, "--vae_mode", "lora", "--export", "official"], "The authors' layout"),
        (["--output_dir", "x", "--pretrained", "y", "--export", "official"], "The authors' layout"),
    ],
)
def test_contradictions_are_refused(flags: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        finetune.parse_args(flags)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"loss_border": 16}, "leaves nothing of crops"),
        ({"data_crop_size": 64}, "do not fit procedural scenes of 40"),
        ({"validation_seed": 0}, "validated on scenes it has trained on"),
        ({"loss_real_label": 1.5}, r"loss_real_label must be in \(0, 1\]"),
        ({"loss_reconstruction_weight": 0, "loss_edge_weight": 0}, "Nothing tells the rendering"),
    ],
)
def test_impossible_settings_are_refused(
    tmp_path: Path, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        finetune.parse_args(arguments(tmp_path, **settings))


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--model_unet", "{depth: 3}"], "do not fit LightTransportUNet: .*depth"),
        (["--model_pisa", "{hardnes: 3}"], "hardnes"),
        (["--model_pisa", "{preset: papr}"], "no PISA preset 'papr'"),
        (["--pisa_in_training", "{hardnes: 3}"], "hardnes"),
        (["--lr_scale", "{to_z: 0.1}"], "'to_z', which is in no trained parameter.*unet"),
        (["--data_options", "{sise: 3}"], "do not fit ProceduralScenes: .*sise"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, flags: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        finetune.main(finetune.parse_args([*arguments(tmp_path), *flags]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"loss_perceptual_weight": 1, "loss_perceptual_weights": "nowhere.pth"}, "nowhere.pth"),
        ({"loss_adversarial_weight": 1, "loss_adversarial_backbone": "./nowhere"}, "nowhere"),
    ],
)
def test_missing_judges_are_named_before_anything_is_written(
    tmp_path: Path, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint) as raised:
        train(tmp_path, **settings)
    assert "weight" in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_resuming_with_other_layers_is_refused(tmp_path: Path, tiny_sdxl: str) -> None:
    model = ["--pretrained", tiny_sdxl, "--mode", "lora"]
    train(tmp_path, model=model)
    with pytest.raises(ValueError, match="other layers. Resume with its lora.targets"):
        train(tmp_path, "--resume", "latest", "--lora_targets", "to_q", model=model)
    with pytest.raises(ValueError, match="other layers. Resume with its vae_mode"):
        train(tmp_path, "--resume", "latest", "--vae_mode", "full", model=model)
    with pytest.raises(ValueError, match="no weights of mode full"):
        train(tmp_path, "--resume", "latest", model=["--pretrained", tiny_sdxl])

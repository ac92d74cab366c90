"""Training runs of a few steps with real tiny models: results, exact resume, stops, refusals."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from bokehdiff import BokehDiffPipeline
from data_synthesis import ProceduralScenes, write_shards
from tests.tiny_models import PROMPT_CHANNELS, tiny_unet, tiny_vae
from training import finetune
from training.samples import AugmentedCrops

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = sorted((REPOSITORY / "training" / "configs").glob("*.yaml"))
NETWORK_FROM_NOTHING = "{block_out_channels: [8, 8], layers_per_block: 1}"
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an untrained SDXL with a stored prompt."""
    from diffusers import DDPMScheduler

    from bokehdiff.models import StoredPrompt

    folder = tmp_path_factory.mktemp("tiny_sdxl")
    prompt = StoredPrompt(
        tokens=4, embedding_channels=2 * PROMPT_CHANNELS, pooled_channels=PROMPT_CHANNELS
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    BokehDiffPipeline(
        vae=tiny_vae(), unet=tiny_unet(), scheduler=scheduler, stored_prompt=prompt
    ).save_pretrained(folder)
    return str(folder)


def arguments(output_dir: Path, model: list[str] | None = None, **settings: Any) -> list[str]:
    """Command-line arguments of a short run; `model` defaults to a tiny network from nothing."""
    values = {
        "data_size": 40,
        "data_crop_size": 32,
        "max_train_steps": 2,
        "warmup_steps": 1,
        "learning_rate": 1e-3,
        "log_steps": 1,
        "validation_scenes": 0,
        **settings,
    }
    from_nothing = ["--model_unet", NETWORK_FROM_NOTHING, "--no-pisa_hardness_by_step"]
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    return ["--output_dir", str(output_dir), *(from_nothing if model is None else model), *flags]


def train(output_dir: Path, *flags: str, model: list[str] | None = None, **settings: Any) -> None:
    finetune.main(finetune.parse_args([*arguments(output_dir, model, **settings), *flags]))


def logged(output_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (output_dir / "log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def assert_same_tensors(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def scene(size: int = 32) -> tuple[torch.Tensor, ...]:
    """image (1, 3, H, W) in [-1, 1], disparity, df, K."""
    generator = torch.Generator().manual_seed(3)
    image = 2 * torch.rand((1, 3, size, size), generator=generator) - 1
    disparity = torch.linspace(0, 0.9, size).expand(1, 1, size, size).contiguous()
    return image, disparity, torch.tensor([0.2]), torch.tensor([6.0])


# -- What a run leaves ---------------------------------------------------------------------------


def test_full_run_leaves_a_pipeline_a_log_and_a_card(tmp_path: Path) -> None:
    train(tmp_path, validation_scenes=2, loss_border=4, validation_steps=1)

    assert [entry["step"] for entry in logged(tmp_path, "train")] == [1, 2]
    assert {"loss", "reconstruction", "edge", "learning_rate", "gradient_norm"} <= set(
        logged(tmp_path, "train")[0]
    )
    validations = logged(tmp_path, "validation")
    assert [entry["step"] for entry in validations] == [0, 1, 2]
    assert {"psnr", "psnr_identity", "scenes"} <= set(validations[-1])

    pipe = BokehDiffPipeline.from_pretrained(tmp_path)
    saved = load_file(tmp_path / UNET_FILE)
    for name, value in pipe.unet.state_dict().items():
        if name in saved:
            assert torch.equal(value, saved[name])
    assert torch.isfinite(pipe.render_tensors(*scene())).all()

    card = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "diffusers"
    assert "| optimiser steps | 2 |" in card
    assert "accelerate launch training/finetune.py --output_dir" in card
    assert f"| after training | {validations[-1]['psnr']:.2f} |" in card
    assert f"| before training | {validations[0]['psnr']:.2f} |" in card


def test_run_on_shards(tmp_path: Path) -> None:
    for name, seed, count in (("train", 0, 3), ("held_out", 1, 2)):
        write_shards(ProceduralScenes(seed, size=32), tmp_path / name, count=count)
    output = tmp_path / "out"
    folders = dict(data_shards=tmp_path / "train", validation_shards=tmp_path / "held_out")
    train(output, **folders, max_train_steps=4, data_workers=1, validation_scenes=8)
    assert logged(output, "validation")[-1]["scenes"] == 2
    assert f"the shards in `{tmp_path / 'train'}`" in (output / "README.md").read_text()


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    # one scene, again and again
    options = "{light_share: 0.0}"
    settings = dict(data_size=32, max_train_steps=30, learning_rate=3e-3, data_options=options)
    args = finetune.parse_args(arguments(tmp_path, loss_edge_weight=0, **settings))
    training = finetune.Training(args)
    training.output_dir.mkdir(exist_ok=True)
    scenes, _ = finetune.open_scenes(None, 0, args)
    training.crops = AugmentedCrops(scenes, 1, 32, 0)
    assert training.run(finetune.StopRequest())
    course = [entry["loss"] for entry in logged(tmp_path, "train")]
    assert sum(course[-8:]) < 0.9 * sum(course[:8])


def test_saved_settings_start_the_same_run(tmp_path: Path) -> None:
    train(tmp_path / "first", lr_scale="{conv_in: 0.1}")
    config = str(tmp_path / "first" / "training_config.yaml")
    again = ["--config", config, "--output_dir", str(tmp_path / "second")]
    finetune.main(finetune.parse_args(again))
    assert_same_tensors(tmp_path / "first" / UNET_FILE, tmp_path / "second" / UNET_FILE)


def test_accumulated_samples_weigh_as_in_one_batch(tmp_path: Path) -> None:
    train(tmp_path / "batch", max_train_steps=1, batch_size=2)
    train(tmp_path / "parts", max_train_steps=1, gradient_accumulation_steps=2)
    one, other = (logged(tmp_path / name, "train")[0] for name in ("batch", "parts"))
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)


def test_averaged_weights_are_saved_and_the_run_goes_on_from_the_last(tmp_path: Path) -> None:
    train(tmp_path, ema_decay=0.9, max_train_steps=3)
    checkpoint = tmp_path / "checkpoint-3"
    saved, last = load_file(tmp_path / UNET_FILE), load_file(checkpoint / UNET_FILE)
    average = load_file(checkpoint / finetune.AVERAGE_FILE)
    assert all(torch.equal(average[name], saved[name]) for name in average)
    assert any(not torch.equal(last[name], saved[name]) for name in average)


def test_minutes_end_a_run_early_with_a_result(tmp_path: Path) -> None:
    train(tmp_path, max_train_steps=1000, max_train_minutes=0)
    assert "| optimiser steps | 1 |" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "model_index.json").is_file()


def test_hardness_follows_the_step_and_is_final_in_validation(
    tmp_path: Path, tiny_sdxl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    render = finetune.BokehRenderer.forward

    def note_hardness(self: finetune.BokehRenderer, *inputs: torch.Tensor) -> torch.Tensor:
        seen.append((torch.is_grad_enabled(), self.pipe.verify_pisa().config.hardness))
        return render(self, *inputs)

    monkeypatch.setattr(finetune.BokehRenderer, "forward", note_hardness)
    train(tmp_path, model=["--pretrained", tiny_sdxl], validation_scenes=1, validation_steps=1)
    assert [hardness for training, hardness in seen if training] == [1, 2]
    assert {hardness for training, hardness in seen if not training} == {1e6}
    assert BokehDiffPipeline.from_pretrained(tmp_path).config.pisa["hardness"] == 1e6


# -- Adapters ------------------------------------------------------------------------------------


def test_adapters_load_into_a_fresh_pipeline(
    tmp_path: Path, tiny_sdxl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipes = []
    build = finetune.build_pipeline
    monkeypatch.setattr(
        finetune, "build_pipeline", lambda args: pipes.append(build(args)) or pipes[-1]
    )
    model = ["--pretrained", tiny_sdxl, "--mode", "lora", "--lora_rank", "2"]
    train(tmp_path, model=model, learning_rate=0.05, warmup_steps=0)

    fresh = BokehDiffPipeline.from_pretrained(tiny_sdxl)
    with torch.no_grad():
        untrained = fresh.render_tensors(*scene())
        fresh.load_lora_weights(tmp_path)
        loaded = fresh.render_tensors(*scene())
        trained_pipe = pipes[0]
        trained_pipe.unet.eval()
        trained_pipe.install_pisa()  # with the final hardness, as the fresh one
        trained = trained_pipe.render_tensors(*scene())
    assert torch.equal(loaded, trained)
    assert (loaded - untrained).abs().max() > 1e-3

    keys = load_file(tmp_path / finetune.LORA_FILE).keys()
    assert all(key.startswith("unet.") and "lora" in key for key in keys)
    assert not (tmp_path / "unet").exists()


def test_adapters_resume_exactly(tmp_path: Path, tiny_sdxl: str) -> None:
    model = ["--pretrained", tiny_sdxl, "--mode", "lora", "--lora_rank", "2"]
    settings = dict(model=model, max_train_steps=4)
    train(tmp_path / "whole", **settings, checkpoint_steps=2)
    train(
        tmp_path / "pieces",
        *("--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-2")),
        **settings,
    )
    assert_same_tensors(
        tmp_path / "whole" / finetune.LORA_FILE, tmp_path / "pieces" / finetune.LORA_FILE
    )


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, tiny_sdxl: str) -> None:
    model = ["--pretrained", tiny_sdxl]
    train(tmp_path / "plain", model=model)
    train(tmp_path / "checkpointed", "--gradient_checkpointing", model=model)
    for one, other in zip(
        logged(tmp_path / "plain", "train"), logged(tmp_path / "checkpointed", "train"), strict=True
    ):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)


# -- Stop and resume -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_and_resume_is_bitwise_the_uninterrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    settings = dict(max_train_steps=6, ema_decay=0.5, batch_size=2, validation_scenes=1)
    train(tmp_path / "whole", **settings)

    pieces = tmp_path / "pieces"
    step = finetune.Training.train_step

    def stop_after_three(self: finetune.Training, samples: Any) -> dict[str, Any]:
        record = step(self, samples)
        if self.step == 3:
            signal.raise_signal(number)
        return record

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(finetune.Training, "train_step", stop_after_three)
        train(pieces, **settings)
    assert signal.getsignal(number) is handler
    assert [path.name for path in finetune.find_checkpoints(pieces)] == ["checkpoint-3"]
    assert not (pieces / "README.md").exists()

    torch.manual_seed(12345)  # whatever happened in between
    train(pieces, "--resume_from_checkpoint", "latest", **settings)
    for file in (UNET_FILE, f"checkpoint-6/{UNET_FILE}", "checkpoint-6/ema.safetensors"):
        assert_same_tensors(tmp_path / "whole" / file, pieces / file)
    first, second = (
        torch.load(tmp_path / name / "checkpoint-6" / "optimizer.bin", weights_only=True)
        for name in ("whole", "pieces")
    )
    for index, state in first["state"].items():
        assert all(torch.equal(value, second["state"][index][key]) for key, value in state.items())
    losses = [entry["loss"] for entry in logged(tmp_path / "whole", "train")]
    assert [entry["loss"] for entry in logged(pieces, "train")] == losses
    assert "| optimiser steps | 6 |" in (pieces / "README.md").read_text()


def test_settings_changed_on_resuming_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path)
    train(tmp_path, "--resume_from_checkpoint", "latest", max_train_steps=3)
    assert "another max_train_steps: 3 instead of 2" in capsys.readouterr().out
    (resumed,) = logged(tmp_path, "resume")
    assert resumed["changed_settings"] == {"max_train_steps": [2, 3]}


def test_old_checkpoints_are_deleted_and_half_written_ones_ignored(tmp_path: Path) -> None:
    train(tmp_path, max_train_steps=12, checkpoint_steps=3, checkpoints_total_limit=2)
    (tmp_path / "checkpoint-99").mkdir()
    found = [path.name for path in finetune.find_checkpoints(tmp_path)]
    assert found == ["checkpoint-9", "checkpoint-12"]


def test_latest_without_a_checkpoint_starts_anew(tmp_path: Path) -> None:
    train(tmp_path / "new", "--resume_from_checkpoint", "latest")
    assert (tmp_path / "new" / "README.md").is_file()


def test_used_folders_are_refused_or_replaced(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(ValueError, match="is not empty. Pass --resume_from_checkpoint"):
        train(tmp_path)
    train(tmp_path, "--overwrite_output_dir", max_train_steps=1)
    assert [entry["step"] for entry in logged(tmp_path, "train")] == [1]
    assert [path.name for path in finetune.find_checkpoints(tmp_path)] == ["checkpoint-1"]
    with pytest.raises(ValueError, match="is no checkpoint of this script"):
        train(tmp_path, "--resume_from_checkpoint", str(tmp_path / "unet"))
    with pytest.raises(ValueError, match="holds no averaged weights"):
        train(tmp_path, "--resume_from_checkpoint", "latest", ema_decay=0.9)


def test_a_lost_run_says_so(tmp_path: Path) -> None:
    settings = dict(learning_rate=1e30, warmup_steps=0, max_gradient_norm=0, data_workers=1)
    with pytest.raises(RuntimeError, match="(loss|reconstruction) is .* Lower learning_rate"):
        train(tmp_path, **settings, max_train_steps=20, log_steps=20, checkpoint_steps=3)
    assert not multiprocessing.active_children()
    assert not finetune.find_checkpoints(tmp_path)


def test_accelerate_launch_trains(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launch, "training/finetune.py", *arguments(tmp_path), "--data_workers", "1"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert "after 2 steps" in result.stdout
    assert (tmp_path / UNET_FILE).is_file()


# -- Settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_shipped_settings_are_valid(config: Path) -> None:
    args = finetune.parse_args(["--config", str(config)])
    assert args.output_dir == f"outputs/{config.stem}"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--model_unet", "{}"], "no output folder"),
        (["--output_dir", "x"], "Say where the model comes from"),
        (["--output_dir", "x", "--model_unet", "{}", "--pretrained", "y"], "not both"),
        (["--output_dir", "x", "--pretrained", "y", "--model_pisa", "{segments: 1}"], "its own"),
        (["--output_dir", "x", "--model_unet", "{}", "--mode", "lora"], "Set pretrained"),
    ],
)
def test_contradictions_are_refused(flags: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        finetune.parse_args(flags)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": -1}, "learning_rate must be at least 0"),
        ({"learning_rate": "nan"}, "learning_rate must be at least 0, got nan"),
        ({"ema_decay": 1}, r"ema_decay must be in \[0, 1\)"),
        ({"loss_border": 16}, "leaves nothing of crops"),
        ({"data_crop_size": 64}, "do not fit procedural scenes of 40"),
        ({"validation_seed": 0}, "validated on scenes it has trained on"),
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
        (["--lr_scale", "{to_z: 0.1}"], "'to_z', which is in no trained parameter"),
    ],
)
def test_settings_that_do_not_fit_the_model(
    tmp_path: Path, flags: list[str], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        finetune.main(finetune.parse_args([*arguments(tmp_path), *flags]))
    assert not list(tmp_path.iterdir())


def test_learning_rate_rises_and_falls() -> None:
    factors = [finetune.learning_rate_factor(step, 4, 14) for step in range(15)]
    assert factors[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert factors[9] == pytest.approx(0.5)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert factors[14] == pytest.approx(0)


def test_parameter_groups_follow_the_first_fragment() -> None:
    parameters = {
        name: torch.nn.Parameter(torch.zeros(1)) for name in ("a.to_q", "a.to_q.bias", "b.conv")
    }
    groups = finetune.parameter_groups(parameters, {"bias": 0.0, "to_q": 0.1})
    assert [(group["scale"], len(group["params"])) for group in groups] == [
        (0.1, 1),
        (0.0, 1),
        (1.0, 1),
    ]

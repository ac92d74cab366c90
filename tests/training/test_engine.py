"""The loop: what a run leaves, stopping and going on, several processes, refusals."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from bokehdiff import BokehDiffPipeline
from data_synthesis import ProceduralScenes, write_shards
from tests.hub_server import HubServer
from tests.training.runs import (
    UNET_FILE,
    arguments,
    assert_same_tensors,
    launch,
    logged,
    scene,
    train,
)
from training import engine, finetune
from training.bokehdiff_task import BokehDiffTask, open_scenes
from training.checkpoints import find_checkpoints
from training.optimization import learning_rate_factor, parameter_groups
from training.run_settings import command_line
from training.samples import AugmentedCrops

OPTIMIZER_FILE = "trainer_state/optimizer.bin"


# -- What a run leaves ---------------------------------------------------------------------------


def test_full_run_leaves_a_pipeline_a_log_and_a_card(tmp_path: Path) -> None:
    train(tmp_path, validation_scenes=2, loss_border=4, validation_steps=1)

    assert [entry["step"] for entry in logged(tmp_path, "train")] == [1, 2]
    assert {"loss", "reconstruction", "edge", "learning_rate", "gradient_norm_unet"} <= set(
        logged(tmp_path, "train")[0]
    )
    validations = logged(tmp_path, "validation")
    assert [entry["step"] for entry in validations] == [0, 1, 2]
    assert {"psnr", "psnr_identity", "scenes"} <= set(validations[-1])
    for step in (0, 1, 2):
        assert (tmp_path / "validation" / f"step-{step:06d}.png").is_file()

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


def test_pace_and_waiting_are_logged(tmp_path: Path) -> None:
    train(tmp_path, batch_size=2, gradient_accumulation_steps=2)
    for entry in logged(tmp_path, "train"):
        assert entry["samples_per_second"] * entry["seconds_per_step"] == pytest.approx(4)
        # Without workers, scenes are made while the loop waits.
        assert 0 < entry["waiting_for_data"] < 1


def test_tensorboard_gets_numbers_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, "--report-to", "tensorboard", validation_scenes=1, max_train_steps=3)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    course = [(event.step, event.value) for event in events.Scalars("train/loss")]
    logged_course = [(entry["step"], entry["loss"]) for entry in logged(tmp_path, "train")]
    assert course == [(step, pytest.approx(loss)) for step, loss in logged_course]
    assert [event.step for event in events.Images("validation")] == [0, 3]


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
    training = engine.Training(args, BokehDiffTask)
    training.output_dir.mkdir(exist_ok=True)
    scenes, _ = open_scenes(None, 0, args)
    training.data = AugmentedCrops(scenes, 1, 32, 0)
    assert training.run(engine.StopRequest())
    course = [entry["loss"] for entry in logged(tmp_path, "train")]
    assert sum(course[-8:]) < 0.9 * sum(course[:8])


def test_saved_settings_start_the_same_run(tmp_path: Path) -> None:
    train(tmp_path / "first", lr_scale="{conv_in: 0.1}", loss_edge_weight="{0: 0.5, 4: 0.1}")
    config = str(tmp_path / "first" / "training_config.yaml")
    again = ["--config", config, "--output_dir", str(tmp_path / "second")]
    finetune.main(finetune.parse_args(again))
    assert_same_tensors(tmp_path / "first" / UNET_FILE, tmp_path / "second" / UNET_FILE)


def test_accumulated_samples_weigh_as_in_one_batch(tmp_path: Path) -> None:
    train(tmp_path / "batch", max_train_steps=1, batch_size=2)
    train(tmp_path / "parts", max_train_steps=1, gradient_accumulation_steps=2)
    one, other = (logged(tmp_path / name, "train")[0] for name in ("batch", "parts"))
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert one["gradient_norm_unet"] == pytest.approx(other["gradient_norm_unet"], rel=1e-3)


def test_averaged_weights_are_saved_and_the_run_goes_on_from_the_last(tmp_path: Path) -> None:
    train(tmp_path, ema_decay=0.9, max_train_steps=3)
    checkpoint = tmp_path / "checkpoint-3"
    saved, last = load_file(tmp_path / UNET_FILE), load_file(checkpoint / UNET_FILE)
    average = load_file(checkpoint / "trainer_state" / engine.AVERAGE_FILE)
    assert {f"unet.{name}" for name in saved} >= set(average)
    for name, value in average.items():
        assert torch.equal(value, saved[name.removeprefix("unet.")])
    assert any(not torch.equal(last[name], saved[name]) for name in saved)


def test_minutes_end_a_run_early_with_a_result(tmp_path: Path) -> None:
    train(tmp_path, max_train_steps=1000, max_train_minutes=0)
    assert "| optimiser steps | 1 |" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "model_index.json").is_file()


# -- Stop and resume -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_and_resume_is_bitwise_the_uninterrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    settings = dict(max_train_steps=6, ema_decay=0.5, batch_size=2, validation_scenes=1)
    train(tmp_path / "whole", **settings)

    pieces = tmp_path / "pieces"
    step = engine.Training.train_step

    def stop_after_three(self: engine.Training, *arguments: Any) -> None:
        step(self, *arguments)
        if self.step == 3:
            signal.raise_signal(number)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(engine.Training, "train_step", stop_after_three)
        train(pieces, **settings)
    assert signal.getsignal(number) is handler
    assert [path.name for path in find_checkpoints(pieces)] == ["checkpoint-3"]
    assert not (pieces / "README.md").exists()

    torch.manual_seed(12345)  # whatever happened in between
    train(pieces, "--resume", "latest", **settings)
    for file in (
        UNET_FILE,
        f"checkpoint-6/{UNET_FILE}",
        "checkpoint-6/trainer_state/ema.safetensors",
    ):
        assert_same_tensors(tmp_path / "whole" / file, pieces / file)
    assert_same_optimizers(tmp_path / "whole" / "checkpoint-6", pieces / "checkpoint-6")
    losses = [entry["loss"] for entry in logged(tmp_path / "whole", "train")]
    assert [entry["loss"] for entry in logged(pieces, "train")] == losses
    assert "| optimiser steps | 6 |" in (pieces / "README.md").read_text()


def assert_same_optimizers(one: Path, other: Path) -> None:
    """The optimisers of two checkpoints hold the same bits."""
    first, second = (
        torch.load(folder / OPTIMIZER_FILE, weights_only=True)["state"] for folder in (one, other)
    )
    assert first.keys() == second.keys() and first
    for index, state in first.items():
        assert all(torch.equal(value, second[index][key]) for key, value in state.items())


def _train_quietly(output_dir: Path, settings: dict[str, Any]) -> None:
    """Train in a process of its own, until it is done or killed."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    torch.set_num_threads(1)
    train(output_dir, "--resume", "latest", **settings)


def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    steps = 60
    settings = dict(
        max_train_steps=steps, checkpoint_steps=1, checkpoints_total_limit=2, ema_decay=0.5
    )
    # The server has imported everything, so that most of a piece of the run is training.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.training.runs"])
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def start(folder: Path) -> Any:
        process = server.Process(target=_train_quietly, args=(folder, settings))
        process.start()
        return process

    def latest() -> int:
        return max((int(path.name.split("-")[-1]) for path in find_checkpoints(killed)), default=0)

    process = start(whole)
    process.join()
    assert process.exitcode == 0

    moments, kills = random.Random(3), 0
    for _ in range(20):
        wanted = latest() + moments.choice((0, 1, 2, 3))
        process = start(killed)
        while process.is_alive() and latest() < wanted:
            time.sleep(0.002)
        # A step takes about a tenth of a second, half of it to write the checkpoint.
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills == 20 and 0 < latest() < steps
    process = start(killed)
    process.join()
    assert process.exitcode == 0
    for file in (UNET_FILE, f"checkpoint-{steps}/{UNET_FILE}"):
        assert_same_tensors(whole / file, killed / file)
    assert_same_optimizers(whole / f"checkpoint-{steps}", killed / f"checkpoint-{steps}")
    course, pieces = (
        [(entry["step"], entry["loss"]) for entry in logged(folder, "train")]
        for folder in (whole, killed)
    )
    assert pieces == course
    assert not list(killed.glob("unfinished-*"))


def test_a_run_killed_before_its_first_checkpoint_starts_anew(tmp_path: Path) -> None:
    train(tmp_path / "whole")
    train(tmp_path / "killed")
    for checkpoint in find_checkpoints(tmp_path / "killed"):
        (checkpoint / "trainer_state" / "progress.json").unlink()
    with (tmp_path / "killed" / "log.jsonl").open("a") as log:
        log.write('{"kind": "train", "st')
    train(tmp_path / "killed", "--resume", "latest")
    assert_same_tensors(tmp_path / "whole" / UNET_FILE, tmp_path / "killed" / UNET_FILE)
    assert [entry["step"] for entry in logged(tmp_path / "killed", "train")] == [1, 2]


def test_settings_changed_on_resuming_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path)
    train(tmp_path, "--resume_from_checkpoint", "latest", max_train_steps=3)
    assert "another max_train_steps: 3 instead of 2" in capsys.readouterr().out
    (resumed,) = logged(tmp_path, "resume")
    assert resumed["changed_settings"] == {"max_train_steps": [2, 3]}


def test_going_back_to_an_older_checkpoint_deletes_later_ones_if_told_so(tmp_path: Path) -> None:
    train(tmp_path, max_train_steps=4, checkpoint_steps=2)
    back = ("--resume", str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="checkpoint-4 is later than .*--overwrite_output_dir"):
        train(tmp_path, *back, max_train_steps=3)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    train(tmp_path, *back, "--overwrite_output_dir", max_train_steps=3)
    assert [entry["step"] for entry in logged(tmp_path, "train")] == [1, 2, 3]
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]


def test_a_checkpoint_of_elsewhere_does_not_overwrite_another_run(tmp_path: Path) -> None:
    for name in ("one", "other"):
        train(tmp_path / name)
    with pytest.raises(ValueError, match="is not empty"):
        train(tmp_path / "other", "--resume", str(tmp_path / "one" / "checkpoint-2"))
    assert (tmp_path / "other" / "README.md").is_file()


def test_old_checkpoints_are_deleted_and_half_written_ones_ignored(tmp_path: Path) -> None:
    train(tmp_path, "--checkpoints-total-limit", "2", max_train_steps=12, checkpoint_steps=3)
    (tmp_path / "checkpoint-99").mkdir()
    found = [path.name for path in find_checkpoints(tmp_path)]
    assert found == ["checkpoint-9", "checkpoint-12"]


def test_latest_without_a_checkpoint_starts_anew(tmp_path: Path) -> None:
    train(tmp_path / "new", "--resume_from_checkpoint", "latest")
    assert (tmp_path / "new" / "README.md").is_file()


def test_used_folders_are_refused_or_replaced(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(ValueError, match="is not empty. Pass --resume latest"):
        train(tmp_path)
    train(tmp_path, "--overwrite_output_dir", max_train_steps=1)
    assert [entry["step"] for entry in logged(tmp_path, "train")] == [1]
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-1"]
    with pytest.raises(ValueError, match="is no checkpoint of this script"):
        train(tmp_path, "--resume_from_checkpoint", str(tmp_path / "unet"))
    with pytest.raises(ValueError, match="holds no averaged weights"):
        train(tmp_path, "--resume_from_checkpoint", "latest", ema_decay=0.9)


def test_a_folder_of_something_else_is_refused_even_with_latest(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is not empty"):
        train(tmp_path, "--resume", "latest")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_lost_run_says_so(tmp_path: Path) -> None:
    settings = dict(learning_rate=1e30, warmup_steps=0, max_gradient_norm=0, data_workers=1)
    with pytest.raises(RuntimeError, match="is (nan|inf) at step .* Lower learning_rate"):
        train(tmp_path, **settings, max_train_steps=20, log_steps=20, checkpoint_steps=3)
    assert not multiprocessing.active_children()
    assert not find_checkpoints(tmp_path)


# -- Processes -----------------------------------------------------------------------------------


def test_accelerate_launch_trains_and_uploads(tmp_path: Path) -> None:
    flags = [*arguments(tmp_path / "soft"), "--data_workers", "1", "--push-to-hub"]
    with HubServer() as hub:
        result = launch(flags, environment=hub.environment())
        assert result.returncode == 0, result.stderr
        (repository,) = hub.repositories.values()
    assert "after 2 steps" in result.stdout and "Uploaded to" in result.stdout
    assert repository.files[UNET_FILE] == (tmp_path / "soft" / UNET_FILE).read_bytes()
    assert {"README.md", "model_index.json", "training_config.yaml"} <= set(repository.files)
    assert not [name for name in repository.files if name.startswith("checkpoint")]


def test_a_hub_that_refuses_is_noticed_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="hf auth login|HF_HUB_OFFLINE|cannot be reached"):
        train(tmp_path / "out", "--push_to_hub")
    assert not (tmp_path / "out").exists()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    settings = dict(max_train_steps=20, checkpoint_steps=10, ema_decay=0.5, data_seed=1)
    train(tmp_path / "one", **settings, batch_size=4)
    result = launch(arguments(tmp_path / "two", **settings, batch_size=2), processes=2)
    assert result.returncode == 0, result.stderr
    one, two = (logged(tmp_path / name, "train") for name in ("one", "two"))
    assert len(one) == len(two) == 20
    for first, second in zip(one, two, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], abs=1e-5)
    # Both took part, and one that goes on alone would see other samples.
    with pytest.raises(ValueError, match="was saved by 2 processes"):
        train(tmp_path / "two", "--resume", "latest", **settings, batch_size=2)
    again = [*arguments(tmp_path / "again", **settings, batch_size=2), "--resume"]
    result = launch([*again, str(tmp_path / "two" / "checkpoint-10")], processes=2)
    assert result.returncode == 0, result.stderr
    assert_same_tensors(tmp_path / "two" / UNET_FILE, tmp_path / "again" / UNET_FILE)


@pytest.mark.slow
def test_two_processes_train_adapters_against_every_judge_as_one(
    tmp_path: Path, tiny_sdxl: str, judges: dict[str, str]
) -> None:
    model = ["--pretrained", tiny_sdxl, "--mode", "lora", "--vae_mode", "full"]
    settings = dict(
        max_train_steps=5,
        learning_rate=1e-4,
        loss_perceptual_weight=5,
        loss_adversarial_weight=0.5,
        **judges,
    )
    train(tmp_path / "one", model=model, **settings, batch_size=4)
    flags = arguments(tmp_path / "two", model, **settings, batch_size=2)
    result = launch(flags, processes=2)
    assert result.returncode == 0, result.stderr
    one, two = (logged(tmp_path / name, "train") for name in ("one", "two"))
    # A term that was added up instead of averaged would be off by a factor of two. Networks that
    # judge turn a rounding of 1e-7 into one of 1e-4 of the gradient, which grows step by step.
    for first, second in zip(one, two, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=5e-5)
    for part in ("unet", "vae", "discriminator"):
        name = f"gradient_norm_{part}"
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-3)


# -- Optimiser -----------------------------------------------------------------------------------


def test_learning_rate_rises_and_falls() -> None:
    factors = [learning_rate_factor(step, 4, 14) for step in range(15)]
    assert factors[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert factors[9] == pytest.approx(0.5)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert factors[14] == pytest.approx(0)
    constant = [learning_rate_factor(step, 4, 14, "constant") for step in range(15)]
    assert constant[:4] == factors[:4] and set(constant[4:]) == {1.0}


def test_parameter_groups_follow_the_first_fragment() -> None:
    parameters = {
        name: torch.nn.Parameter(torch.zeros(1)) for name in ("a.to_q", "a.to_q.bias", "b.conv")
    }
    groups = parameter_groups(parameters, {"bias": 0.0, "to_q": 0.1})
    assert [(group["scale"], len(group["params"])) for group in groups] == [
        (0.1, 1),
        (0.0, 1),
        (1.0, 1),
    ]


def test_moments_in_eight_bits_resume_exactly(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = dict(optimizer="adamw_8bit", max_train_steps=4, checkpoint_steps=2)
    train(tmp_path / "whole", **settings)
    train(tmp_path / "pieces", "--resume", str(tmp_path / "whole" / "checkpoint-2"), **settings)
    assert_same_tensors(tmp_path / "whole" / UNET_FILE, tmp_path / "pieces" / UNET_FILE)


def test_moments_in_eight_bits_need_bitsandbytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        train(tmp_path, optimizer="adamw_8bit")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": -1}, "learning_rate must be at least 0"),
        ({"learning_rate": "nan"}, "learning_rate must be at least 0, got nan"),
        ({"ema_decay": 1}, r"ema_decay must be in \[0, 1\)"),
        ({"report_to": "tensorbored"}, "report_to names .'tensorbored'"),
    ],
)
def test_impossible_settings_are_refused(
    tmp_path: Path, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        finetune.parse_args(arguments(tmp_path, **settings))


def test_the_command_on_the_card_keeps_tokens_to_itself() -> None:
    shown = command_line("x.py", ["--hub_token", "secret", "--seed", "3"])
    assert shown == "accelerate launch x.py --hub_token ... --seed 3"
    assert "secret" not in command_line("x.py", ["--hub-token=secret"])

"""The adapter of bokeh stacks: its loss by hand, what is trained, runs, files, refusals."""

from __future__ import annotations

import copy
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from bokehdiff.bokeh_adapter_files import read_bokeh_adapter
from bokehdiff.images import write_image
from bokehdiff.models.bokeh_adapter import BokehAdapter, BokehCondition, BokehGrounding
from bokehdiff.pipelines.bokeh_stack import BokehStackPipeline
from data_synthesis.stack_files import write_stacks
from data_synthesis.stack_scenes import StackScenes
from tests.tiny_flux import tiny_flux_transformer, tiny_kontext_components
from tests.training.runs import assert_same_tensors, launch, logged
from training import engine, train_bokeh_stack
from training.bokeh_stack_task import BokehStackTask
from training.checkpoints import find_checkpoints
from training.samples import seeded_generator

ADAPTER_FILE = "diffusion_pytorch_model.safetensors"
TINY_CONFIG = "training/configs/bokeh_stack_tiny.yaml"
DEAD = "to_k_dof"


@pytest.fixture(scope="session")
def tiny_kontext(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an untrained FLUX.1-Kontext of a few thousand parameters."""
    folder = tmp_path_factory.mktemp("tiny_kontext")
    pipe = BokehStackPipeline(**tiny_kontext_components(folder / "parts"))
    pipe.save_pretrained(folder / "pipeline")
    return str(folder / "pipeline")


def arguments(output_dir: Path, pretrained: str, **settings: Any) -> list[str]:
    """Command-line arguments of a short run."""
    values = {
        "pretrained": pretrained,
        "adapter_rank": 4,
        "prompt_tokens": 16,
        "data_size": 32,
        "data_seed": 1,
        "data_largest_K": 4,
        "batch_size": 2,
        "max_train_steps": 2,
        "warmup_steps": 1,
        "learning_rate": 1e-3,
        "log_steps": 1,
        "validation_scenes": 0,
        "report_to": "none",
        **settings,
    }
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    return ["--output_dir", str(output_dir), *flags]


def train(output_dir: Path, pretrained: str, *flags: str, **settings: Any) -> None:
    """Run the training script in this process."""
    args = [*arguments(output_dir, pretrained, **settings), *flags]
    train_bokeh_stack.main(train_bokeh_stack.parse_args(args))


def make_task(pretrained: str, **settings: Any) -> BokehStackTask:
    """A task whose adapter does something: no matrix of it is zero."""
    args = train_bokeh_stack.parse_args(arguments(Path("unused"), pretrained, **settings))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        task = BokehStackTask(args)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in task.adapter.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return task


def group(task: BokehStackTask, number: int) -> dict[str, Tensor]:
    """A batch, as the loader stacks it."""
    samples, size = task.training_samples(), task.args.batch_size
    members = [samples[number * size + position] for position in range(size)]
    return {name: torch.stack([one[name] for one in members]) for name in members[0]}


# -- The loss ------------------------------------------------------------------------------------


def tokens_by_hand(latents: Tensor) -> Tensor:
    """(C, h, w) as tokens of 2 x 2 latents in rows, each with its channels first."""
    channels, height, width = latents.shape
    return torch.stack(
        [
            torch.stack(
                [
                    latents[channel, 2 * row + down, 2 * column + across]
                    for channel in range(channels)
                    for down in range(2)
                    for across in range(2)
                ]
            )
            for row in range(height // 2)
            for column in range(width // 2)
        ]
    )


def ids_by_hand(latents: Tensor, first: int) -> list[list[int]]:
    rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
    return [[first, row, column] for row in range(rows) for column in range(columns)]


def loss_by_hand(task: BokehStackTask, batch: dict[str, Tensor]) -> float:
    """mean((v - (noise - z0))^2) in float64, from the equation and the networks alone."""
    args, config = task.args, task.vae.config
    transformer = tiny_flux_transformer().double()
    transformer.load_state_dict(task.transformer.state_dict())
    adapter = copy.deepcopy(task.adapter).double()
    adapter.install(transformer)
    vae = copy.deepcopy(task.vae).double()

    def encoded(picture: Tensor, drawn: Tensor | float) -> Tensor:
        given = vae.encode(2 * picture[None].double() - 1).latent_dist
        latents = given.mean[0] + drawn * given.std[0]
        return (latents - config.shift_factor) * config.scaling_factor

    with_reference = bool(batch["with_reference"][0])
    noisy, wanted, shares, told = [], [], [], []
    for position, number in enumerate(batch["number"].tolist()):
        shape = (4, 4, 4)
        drawn = torch.randn(shape, generator=seeded_generator(args.seed, 5, number))
        z0 = encoded(batch["target"][position], drawn.double())
        shared = int(batch["number"][int(batch["pivot"][position])])
        generator = seeded_generator(args.seed, 4, shared)
        s = (1 + int(torch.randint(1000, (), generator=generator))) / 1000
        noise = torch.randn(shape, generator=generator).double()
        noise += args.noise_offset * torch.randn((4, 1, 1), generator=generator).double()
        tokens = tokens_by_hand((1 - s) * z0 + s * noise)
        ids = ids_by_hand(z0, 0)
        if with_reference:
            sharp = encoded(batch["image"][position], 0.0)
            tokens, ids = torch.cat([tokens, tokens_by_hand(sharp)]), ids + ids_by_hand(sharp, 1)
        noisy.append(tokens)
        wanted.append(tokens_by_hand(noise - z0))
        shares.append(s)
        told.append(float(batch["K"][position]) / 30 if batch["tells_K"][position] else -1.0)
    text, pooled, text_ids = task.pipe.encode_prompt(
        task.samples.prompts(batch), None, max_sequence_length=args.prompt_tokens
    )
    velocity = transformer(
        hidden_states=torch.stack(noisy),
        encoder_hidden_states=text.double(),
        pooled_projections=pooled.double(),
        timestep=torch.tensor(shares, dtype=torch.float64),
        guidance=torch.full((len(shares),), args.guidance, dtype=torch.float64),
        img_ids=torch.tensor(ids, dtype=torch.float64),
        txt_ids=text_ids.double(),
        joint_attention_kwargs={
            "bokeh": BokehCondition(
                adapter.embed(torch.tensor(told, dtype=torch.float64)),
                grounding=BokehGrounding(batch["pivot"], "single"),
            )
        },
    ).sample
    count = wanted[0].shape[0]
    return float((velocity[:, :count] - torch.stack(wanted)).square().mean())


@pytest.mark.parametrize("reference_share", [0, 1])
@torch.no_grad()
def test_the_loss_is_the_equation(tiny_kontext: str, reference_share: int) -> None:
    settings = {"pivot_share": 1.0, "drop_K": 0.5, "noise_offset": 0.3, "guidance": 2.5}
    task = make_task(tiny_kontext, reference_share=reference_share, batch_size=3, **settings)
    batches = [group(task, number) for number in range(4)]
    for batch in batches:
        # Of the order of 100 sums of float32 in a row.
        assert float(task(batch, 0)["loss"]) == pytest.approx(loss_by_hand(task, batch), rel=1e-5)
    if not reference_share:
        assert any(not batch["tells_K"].all() for batch in batches)
        assert any((batch["pivot"] != torch.arange(3)).any() for batch in batches)


def test_noise_and_timesteps_are_those_of_numbers(tiny_kontext: str) -> None:
    task = make_task(tiny_kontext, noise_offset=0.5)
    numbers = torch.arange(600)
    noise, shares = task.noise(numbers, (4, 4, 4))
    again, same = task.noise(torch.tensor([7, 7, 3]), (4, 4, 4))
    assert torch.equal(again, noise[[7, 7, 3]]) and torch.equal(same, shares[[7, 7, 3]])
    # Uniform over 0.001 to 1: mean and deviation, within four standard errors of 600 draws.
    assert abs(float(shares.mean()) - 0.5005) < 4 * (1 / 12 / 600) ** 0.5
    assert float(shares.min()) >= 0.001 and float(shares.max()) <= 1
    assert abs(float((shares > 0.9).float().mean()) - 0.1) < 4 * (0.09 / 600) ** 0.5
    # A channel's mean has variance 1/16 of its values and 0.25 of the offset.
    variance = float(noise.mean((2, 3)).var())
    assert variance == pytest.approx(1 / 16 + 0.25, rel=4 * (2 / 2400) ** 0.5)


def test_pivots_share_noise_and_the_others_do_not(tiny_kontext: str) -> None:
    task = make_task(tiny_kontext, reference_share=0, pivot_share=0.5, batch_size=3)
    seen = {True: 0, False: 0}
    for number in range(6):
        batch = group(task, number)
        noise, shares = task.noise(batch["number"][batch["pivot"]], (4, 4, 4))
        for one in range(3):
            shared = int(batch["pivot"][one])
            seen[shared != one] += 1
            assert torch.equal(noise[one], noise[shared]) and shares[one] == shares[shared]
            assert torch.equal(batch["image"][one], batch["image"][0])
    assert all(seen.values())


# -- What is trained -----------------------------------------------------------------------------


def test_the_adapter_alone_learns_and_all_of_it_that_counts(tiny_kontext: str) -> None:
    args = train_bokeh_stack.parse_args(arguments(Path("unused"), tiny_kontext))
    torch.manual_seed(0)
    task = BokehStackTask(args)
    before = copy.deepcopy(
        {name: getattr(task, name).state_dict() for name in ("transformer", "vae", "text_encoder")}
    )
    trained = [value for value in task.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    for number in range(3):
        optimizer.zero_grad()
        task(group(task, number), number)["loss"].backward()
        if number < 2:
            optimizer.step()
    for name, value in task.named_parameters():
        if name.startswith("adapter.") and DEAD not in name:
            assert value.grad is not None and bool(value.grad.any()), name
        else:
            assert value.grad is None, name
    for name, state in before.items():
        now = getattr(task, name).state_dict()
        assert now.keys() == state.keys()
        assert all(torch.equal(now[key], value) for key, value in state.items()), name


def test_training_lowers_the_loss_and_follows_K(tiny_kontext: str) -> None:
    """One picture and one noise, and targets that K alone tells apart."""
    task = make_task(tiny_kontext)
    told = torch.tensor([1 / 30, 1 / 3, 2 / 3, 1.0])
    target = (2 * told - 1).reshape(-1, 1, 1, 1).expand(4, 4, 4, 4)
    noise = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0)).expand(
        4, -1, -1, -1
    )
    reference = torch.full((4, 3, 32, 32), 0.5)

    def loss(told: Tensor) -> Tensor:
        shares = torch.full((4,), 0.98)
        return task.squared_errors(
            target, noise, shares, told, ["a walk"] * 4, reference=reference
        ).mean()

    optimizer = torch.optim.AdamW([v for v in task.parameters() if v.requires_grad], lr=1e-2)
    course = []
    for _ in range(40):
        now = loss(told)
        now.backward()
        optimizer.step()
        optimizer.zero_grad()
        course.append(float(now.detach()))
    with torch.no_grad():
        other = float(loss(told.flip(0)))
    assert course[-1] < 0.8 * course[0]
    # Without K the best is the mean of the targets, and another K costs nothing.
    assert other > 1.2 * course[-1], (course, other)


def test_checkpointed_gradients_are_the_same(tiny_kontext: str) -> None:
    gradients = []
    for flag in ([], ["--gradient_checkpointing"]):
        flags = [*arguments(Path("unused"), tiny_kontext), *flag]
        torch.manual_seed(0)
        task = BokehStackTask(train_bokeh_stack.parse_args(flags))
        task(group(task, 0), 0)["loss"].backward()
        gradients.append([value.grad for value in task.adapter.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_half_precision_is_for_what_stays_as_it_is(tiny_kontext: str) -> None:
    full = make_task(tiny_kontext)
    half = make_task(tiny_kontext, mixed_precision="bf16")
    assert half.transformer.dtype == torch.bfloat16 and half.adapter.dtype == torch.float32
    losses = []
    for task in (full, half):
        loss = task(group(task, 0), 0)["loss"]
        loss.backward()
        losses.append(float(loss.detach()))
        assert all(
            value.grad.dtype == torch.float32
            for value in task.adapter.parameters()
            if value.requires_grad
        )
    # bfloat16 keeps three digits.
    assert losses[1] == pytest.approx(losses[0], rel=2e-2) and losses[1] != losses[0]


# -- Runs ----------------------------------------------------------------------------------------


def test_a_run_leaves_an_adapter_a_log_and_a_card(tmp_path: Path, tiny_kontext: str) -> None:
    flags = ("--export", "official")
    settings = {"validation_scenes": 1, "validation_sampling_steps": 1}
    train(tmp_path, tiny_kontext, *flags, **settings)
    assert [entry["step"] for entry in logged(tmp_path, "train")] == [1, 2]
    assert {"loss", "learning_rate", "gradient_norm_adapter"} <= set(logged(tmp_path, "train")[0])
    first, last = logged(tmp_path, "validation")
    assert {"loss", "loss_other_K", "loss_K_1_10", "psnr", "psnr_identity"} <= set(last)
    assert first["loss"] != last["loss"] and first["psnr_identity"] == last["psnr_identity"]
    for step in (0, 2):
        assert (tmp_path / "validation" / f"step-{step:06d}.png").is_file()
    card = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "diffusers"
    assert "| optimiser steps | 2 |" in card and f"| after training | {last['loss']:.5f} |" in card
    assert "load_bokeh_adapter" in card and "K from 1 to 4 px*m" in card

    pipe = BokehStackPipeline.from_pretrained(tiny_kontext)
    for saved in (tmp_path, tmp_path / "official" / "bokeh_lora.bin", tmp_path / "checkpoint-2"):
        pipe.load_bokeh_adapter(saved)
        for name, value in load_file(tmp_path / ADAPTER_FILE).items():
            assert torch.equal(pipe.bokeh_adapter.state_dict()[name], value), name


def test_a_saved_adapter_predicts_the_same(tmp_path: Path, tiny_kontext: str) -> None:
    task = make_task(tiny_kontext)
    task.save_result(tmp_path, {})
    again = make_task(tiny_kontext)
    with torch.no_grad():
        for parameter in again.adapter.parameters():
            parameter.zero_()
    again.load_weights(tmp_path)
    started = BokehStackTask(
        train_bokeh_stack.parse_args(
            arguments(Path("unused"), tiny_kontext, adapter_start=tmp_path)
        )
    )
    with torch.no_grad():
        batch = group(task, 0)
        expected = task(batch, 0)["loss"]
        assert torch.equal(again(batch, 0)["loss"], expected)
        assert torch.equal(started(batch, 0)["loss"], expected)
    assert {name for name, value in started.named_parameters() if value.requires_grad} == {
        name for name, value in task.named_parameters() if value.requires_grad
    }
    adapter = BokehAdapter.from_pretrained(tmp_path)
    assert adapter.config.rank == 4 and adapter.config.alpha == 4


def test_stop_and_resume_is_bitwise_the_uninterrupted_run(
    tmp_path: Path, tiny_kontext: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_train_steps": 6, "drop_K": 0.5, "ema_decay": 0.5}
    train(tmp_path / "whole", tiny_kontext, **settings)
    pieces = tmp_path / "pieces"
    step = engine.Training.train_step

    def stop_after_three(self: engine.Training, *arguments: Any) -> None:
        step(self, *arguments)
        if self.step == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Training, "train_step", stop_after_three)
        train(pieces, tiny_kontext, **settings)
    assert [path.name for path in find_checkpoints(pieces)] == ["checkpoint-3"]
    torch.manual_seed(12345)  # whatever happened in between
    train(pieces, tiny_kontext, "--resume", "latest", **settings)
    average = f"checkpoint-6/trainer_state/{engine.AVERAGE_FILE}"
    for file in (ADAPTER_FILE, f"checkpoint-6/{ADAPTER_FILE}", average):
        assert_same_tensors(tmp_path / "whole" / file, pieces / file)
    losses = [entry["loss"] for entry in logged(tmp_path / "whole", "train")]
    assert [entry["loss"] for entry in logged(pieces, "train")] == losses
    assert len(set(losses)) == 6


def test_every_source_trains(tmp_path: Path, tiny_kontext: str) -> None:
    for name in ("sharp.png", "blurred.png"):
        write_image(tmp_path / name, torch.rand(1, 3, 40, 48))
    np.save(tmp_path / "depth.npy", np.linspace(1, 4, 40 * 48, dtype=np.float32).reshape(40, 48))
    for name, entry in {
        "photographs": {"image": "sharp.png", "depth": "depth.npy"},
        "pairs": {"image": "sharp.png", "target": "blurred.png", "K": 3.0},
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(entry))
    train(
        tmp_path / "run",
        tiny_kontext,
        data_weights="{scenes: 1, photographs: 1, pairs: 2}",
        data_photographs=tmp_path / "photographs.jsonl",
        data_pairs=tmp_path / "pairs.jsonl",
        max_train_steps=8,
        data_workers=1,
    )
    assert len(logged(tmp_path / "run", "train")) == 8
    card = (tmp_path / "run" / "README.md").read_text()
    assert "25% procedural scenes" in card and "50% pairs of photographs" in card


def test_saved_settings_start_the_same_run(tmp_path: Path, tiny_kontext: str) -> None:
    train(tmp_path / "first", tiny_kontext)
    config = str(tmp_path / "first" / "training_config.yaml")
    again = ["--config", config, "--output_dir", str(tmp_path / "second")]
    train_bokeh_stack.main(train_bokeh_stack.parse_args(again))
    assert_same_tensors(tmp_path / "first" / ADAPTER_FILE, tmp_path / "second" / ADAPTER_FILE)


@pytest.mark.slow
def test_two_processes_train_as_one_that_accumulates(tmp_path: Path, tiny_kontext: str) -> None:
    """Both have groups 2 i and 2 i + 1 in step i."""
    settings = {"max_train_steps": 6}
    train(tmp_path / "one", tiny_kontext, gradient_accumulation_steps=2, **settings)
    result = launch(
        arguments(tmp_path / "two", tiny_kontext, **settings),
        processes=2,
        script="training/train_bokeh_stack.py",
    )
    assert result.returncode == 0, result.stderr
    one, two = (logged(tmp_path / name, "train") for name in ("one", "two"))
    for first, second in zip(one, two, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)


@pytest.mark.slow
def test_the_command_of_the_readme_runs(tmp_path: Path, tiny_kontext: str) -> None:
    flags = ["--config", TINY_CONFIG, "--pretrained", tiny_kontext, "--report_to", "none"]
    result = launch([*flags, "--output_dir", str(tmp_path)], script="training/train_bokeh_stack.py")
    assert result.returncode == 0, result.stderr
    assert read_bokeh_adapter(tmp_path).config.rank == 4


# -- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"reference_share": 1.5}, "reference_share must be a share from 0 to 1, got 1.5"),
        ({"batch_size": 1}, "a batch_size of 1 has no others"),
        ({"data_largest_K": 40}, "data.largest_K 40 must rise within 1 to 30"),
        ({"data_smallest_K": 4}, "data.smallest_K 4 and data.largest_K 4 must rise"),
        ({"data_weights": "{scenes: 1, pairs: 1}"}, "data_pairs is None .* needs both"),
        ({"data_pairs": "pairs.jsonl"}, "source pairs needs both, a manifest and a weight"),
        (
            {"data_stacks": "scenes", "data_weights": "{pairs: 1}", "data_pairs": "pairs.jsonl"},
            "give scenes a weight, or leave out data.stacks",
        ),
        ({"data_stacks": "scenes", "data_options": "{df: 1}"}, "on the fly, and this run makes"),
        ({"data_weights": "{photos: 1}"}, "names 'photos'; the sources are scenes"),
        ({"data_weights": "{scenes: 0}"}, "gives scenes 0; wanted a number above 0"),
        ({"validation_scenes": 1, "validation_seed": 1}, "validation_seed equals data.seed"),
        ({"prompt_tokens": 600}, "prompt_tokens must be at most 512"),
        ({"adapter_alpha": 0}, "adapter_alpha must be above 0"),
        ({"guidance": -1}, "guidance must be at least 0"),
    ],
)
def test_settings_that_contradict_are_refused(
    tmp_path: Path, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        train_bokeh_stack.parse_args(arguments(tmp_path, "somewhere", **settings))


def test_ways_that_do_not_work_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = arguments(tmp_path, "somewhere")
    with pytest.raises(ValueError, match="Leave out compile"):
        train_bokeh_stack.parse_args([*flags, "--compile"])
    with pytest.raises(ValueError, match="Set pretrained to its folder or hub id"):
        train_bokeh_stack.parse_args(["--output_dir", str(tmp_path)])
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="Use DDP"):
        train_bokeh_stack.parse_args(flags)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"data_size": 40}, "a token of this model is 16 x 16 pixels"),
        ({"pretrained": "no/such/folder"}, "no/such/folder"),
        ({"adapter_start": "no/such/adapter"}, "no/such/adapter"),
        ({"data_options": "{colour: 1}"}, "data.options do not fit StackScenes"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    tmp_path: Path, tiny_kontext: str, settings: dict[str, Any], complaint: str
) -> None:
    pretrained = settings.pop("pretrained", tiny_kontext)
    with pytest.raises(ValueError, match=complaint):
        train(tmp_path, pretrained, **settings)
    assert not list(tmp_path.iterdir())


def test_stored_scenes_of_the_held_out_seed_are_refused(tmp_path: Path, tiny_kontext: str) -> None:
    write_stacks(StackScenes(5, 32, frames=2, strengths=(1, 4)), tmp_path / "stacks", count=1)
    settings = {"data_stacks": tmp_path / "stacks", "validation_scenes": 1}
    with pytest.raises(ValueError, match="have the seed 5, and so has validation_seed"):
        train(tmp_path / "run", tiny_kontext, **settings, validation_seed=5)
    train(tmp_path / "run", tiny_kontext, **settings, validation_seed=6)
    assert "procedural scenes of `" in (tmp_path / "run" / "README.md").read_text()


def test_an_adapter_of_another_size_is_refused(tmp_path: Path, tiny_kontext: str) -> None:
    make_task(tiny_kontext).save_result(tmp_path / "start", {})
    with pytest.raises(ValueError, match="adapter.start .* rank 4; model and settings want 8"):
        train(tmp_path / "run", tiny_kontext, adapter_start=tmp_path / "start", adapter_rank=8)
    assert not (tmp_path / "run").exists()


def test_the_recipe_is_read(tmp_path: Path) -> None:
    flags = ["--config", "training/configs/bokeh_stack_paper.yaml", "--pretrained", "somewhere"]
    args = train_bokeh_stack.parse_args(flags)
    assert (args.adapter_rank, args.noise_offset, args.guidance) == (128, 0.05, 1.0)
    assert (args.reference_share, args.pivot_share, args.keep_caption) == (0.5, 0.2, 0.35)

"""The loop every model here is trained with: exact resume, several processes, logs, validation.

A model brings a :class:`TrainingTask`, which knows its networks, its losses and its files;
:func:`run` does the rest. Samples, augmentation, learning rate and everything else that changes
over a run are functions of the seed and the optimiser step. A run that is killed at any moment and
goes on with ``--resume latest`` therefore ends with the bits of an unbroken run.
"""

from __future__ import annotations

import abc
import argparse
import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import PIL.Image
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    ProjectConfiguration,
    broadcast_object_list,
    set_seed,
)
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from training import checkpoints, publishing
from training.checkpoints import STATE_FOLDER
from training.model_card import CardText, RunReport, model_card
from training.optimization import (
    OPTIMIZERS,
    clip_gradients,
    learning_rate_factor,
    make_optimizer,
    parameter_groups,
)
from training.samples import ConsecutiveBatches, sample_loader
from training.settings import (
    check_at_least,
    mapping,
    names,
    plain_settings,
    setting_adder,
    write_settings,
)
from training.validation import Validation

TRACKERS = ("tensorboard", "wandb")
AVERAGE_FILE = "ema.safetensors"
LOG_FILE = "log.jsonl"
SETTINGS_FILE = "training_config.yaml"
TRACKER_FOLDER = "logs"
PICTURE_FOLDER = "validation"

_ABOUT_THIS_CALL = (
    "config",
    "command",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "hub_token",
)


class TrainingTask(nn.Module, abc.ABC):
    """What is trained. A module, so that one call of it is one forward pass in every process.

    Its children are the networks, and those of their parameters that require gradients are trained.
    Learning rates, clipping and logs tell networks apart by the child's name.
    """

    @abc.abstractmethod
    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Return ``loss``, a scalar that is a mean over the batch, and its parts for the log.

        Args:
            batch: samples of :meth:`training_samples`, stacked, on the device of the task.
            step: optimiser steps done.
        """

    @abc.abstractmethod
    def training_samples(self) -> Dataset[dict[str, Tensor]]:
        """Return samples by number, endless, each a function of the seed and its number alone."""

    @abc.abstractmethod
    def begin_step(self, step: int) -> None:
        """Set what changes over the run to the values of optimiser step `step`."""

    @abc.abstractmethod
    def as_saved(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the networks are as inference has them."""

    @abc.abstractmethod
    def validate(self) -> Validation | None:
        """Return scores on held-out samples, if there are any. No gradients are recorded."""

    @abc.abstractmethod
    def validation_summary(self, scores: Mapping[str, Any]) -> str:
        """Return one line about `scores` for people who watch."""

    @abc.abstractmethod
    def save_weights(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """Save what inference loads from a checkpoint.

        Args:
            folder: it exists.
            trained: all trained parameters by name; those of the networks may be spread over
                several processes.
        """

    @abc.abstractmethod
    def load_weights(self, folder: Path) -> None:
        """Load what `save_weights` saved, strictly."""

    def save_training_state(self, folder: Path) -> None:  # noqa: B027 - most have none
        """Save what training needs to go on and inference does not: networks that judge, say."""

    def load_training_state(self, folder: Path) -> None:  # noqa: B027
        """Load what `save_training_state` saved."""

    @abc.abstractmethod
    def save_result(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """Save the result of the run, under `as_saved`; arguments as of `save_weights`."""

    @abc.abstractmethod
    def card_text(self, scores: Mapping[str, Any], log: list[dict[str, Any]]) -> CardText:
        """Return what the model card says about this model."""


# -- Settings ------------------------------------------------------------------------------------


def add_output_settings(parser: argparse.ArgumentParser) -> None:
    """Add the settings that say where a run writes and what it goes on from."""
    add, flag = setting_adder(parser), argparse.BooleanOptionalAction
    add("config", help="YAML file of settings, named as the flags are; flags win over the file")
    add("output_dir", help="folder for weights, checkpoints, log and model card")
    add("overwrite_output_dir", action=flag, default=False, help="start anew in a used folder")
    add(
        "resume_from_checkpoint",
        "resume",
        help="a checkpoint, or 'latest', which starts anew where there is none",
    )


def add_engine_settings(parser: argparse.ArgumentParser) -> None:
    """Add the settings every model is trained with."""
    flag = argparse.BooleanOptionalAction
    add = setting_adder(
        parser.add_argument_group("optimiser: AdamW, warm-up, half a cosine to zero")
    )
    add("max_train_steps", type=int, default=10_000, help="optimiser steps of the whole run")
    add("max_train_minutes", type=float, help="end earlier, after this time over all pieces")
    add("batch_size", type=int, default=1, help="samples per process and forward pass")
    add("gradient_accumulation_steps", type=int, default=1, help="forward passes per step")
    add("learning_rate", type=float, default=1e-4, help="the highest")
    add("lr_scale", type=mapping, default={}, help="factors by name fragment: '{to_q: 0.1}'")
    add("warmup_steps", type=int, default=500, help="steps of linear rise")
    add("optimizer", choices=OPTIMIZERS, default="adamw", help="with moments in 32 or 8 bits")
    add("adam_beta1", type=float, default=0.9, help="memory of the gradient")
    add("adam_beta2", type=float, default=0.95, help="memory of its square")
    add("adam_epsilon", type=float, default=1e-7, help="floor of the divisor")
    add("weight_decay", type=float, default=0.01, help="pull of the weights to zero")
    add("max_gradient_norm", type=float, default=1.0, help="clip each network's; 0 does not")
    add("ema_decay", type=float, default=0.0, help="save averaged weights; 0 saves the last")
    add("gradient_checkpointing", action=flag, default=False, help="less memory, more time")
    add("mixed_precision", choices=("no", "fp16", "bf16"), default="no", help="of the UNet")
    add("compile", action=flag, default=False, help="torch.compile the UNet")
    add("seed", type=int, default=0, help="of initial weights, sample order, augmentation")
    add("threads", type=int, help="CPU threads of the main process")
    add("data_workers", type=int, default=0, help="processes that prepare samples")

    add = setting_adder(parser.add_argument_group("checkpoints, log and validation"))
    add("checkpoint_steps", type=int, help="save a checkpoint every so many steps")
    add("checkpoint_minutes", type=float, default=10.0, help="and whenever this time has passed")
    add("checkpoints_total_limit", type=int, help="delete the oldest beyond this number")
    add("log_steps", type=int, default=10, help="steps per line of log.jsonl")
    add("report_to", type=names, default=["tensorboard"], help="tensorboard, wandb, none or all")
    add("validation_steps", type=int, help="steps between validations; without it, at the ends")

    add = setting_adder(parser.add_argument_group("Hugging Face Hub"))
    add("push_to_hub", action=flag, default=False, help="upload the result")
    add("hub_model_id", help="repository, 'owner/name'; without it, the output folder's name")
    add("hub_private", action=flag, default=False, help="make a new repository private")
    add("hub_token", help="access token; without it, the one of `hf auth login`")


def check_engine_settings(args: argparse.Namespace) -> None:
    """Raise ValueError for settings that cannot work, before anything is written."""
    if args.output_dir is None:
        raise ValueError("There is no output folder. Set --output_dir, or output_dir in the file.")
    check_at_least(
        args,
        {
            **dict.fromkeys(("max_train_steps", "batch_size", "gradient_accumulation_steps"), 1),
            **dict.fromkeys(("threads", "checkpoint_steps", "checkpoints_total_limit"), 1),
            **dict.fromkeys(("log_steps", "validation_steps"), 1),
            **dict.fromkeys(("data_workers", "max_train_minutes", "learning_rate"), 0),
            **dict.fromkeys(("warmup_steps", "weight_decay", "max_gradient_norm", "seed"), 0),
            **dict.fromkeys(("checkpoint_minutes",), 0),
        },
    )
    if not 0 <= args.ema_decay < 1:
        raise ValueError(f"The setting ema_decay must be in [0, 1), got {args.ema_decay}.")
    if unknown := set(args.report_to) - {*TRACKERS, "none", "all"}:
        raise ValueError(
            f"The setting report_to names {sorted(unknown)}; choose from {', '.join(TRACKERS)}, "
            "all, or none."
        )


def command_line(script: str, input_args: Sequence[str] | None) -> str:
    """Return what was typed to start `script`, for the model card; tokens are left out."""
    arguments = list(sys.argv[1:] if input_args is None else input_args)
    shown = []
    for index, argument in enumerate(arguments):
        flag, equals, _ = argument.replace("-", "_").partition("=")
        if flag == "__hub_token":
            shown += [argument.partition("=")[0] + "=..."] if equals else [argument, "..."]
        elif not (index and arguments[index - 1].replace("-", "_") == "__hub_token"):
            shown.append(argument)
    return shlex.join(["accelerate", "launch", script, *shown])


# -- The run -------------------------------------------------------------------------------------


class StopRequest:
    """Notes the first SIGTERM or Ctrl-C instead of dying of it; a second Ctrl-C interrupts."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __enter__(self) -> StopRequest:
        wanted = (signal.SIGINT, signal.SIGTERM)
        self._handlers = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name


def run_script(
    name: str,
    parse_args: Callable[[], argparse.Namespace],
    make_task: Callable[[argparse.Namespace], TrainingTask],
) -> None:
    """Do what the command line says; settings that cannot work end the script with a sentence.

    Args:
        name: of the script, to begin the sentence with.
        parse_args: reads the command line.
        make_task: see `run`.
    """
    try:
        args = parse_args()
        checkpoint = checkpoint_to_resume(args)
        training = Training(args, make_task)
        training.begin(checkpoint)
    except (ValueError, ImportError) as error:
        sys.exit(f"{name}: {error}")
    training.carry_out(checkpoint)


def run(args: argparse.Namespace, make_task: Callable[[argparse.Namespace], TrainingTask]) -> None:
    """Train as `args` say, and leave the results in ``args.output_dir``.

    Args:
        args: the settings of `add_output_settings`, `add_engine_settings` and the task, and
            ``command`` (see `command_line`).
        make_task: makes the task; called once the random generators are seeded.

    Raises:
        ValueError: the output folder is in use, there is no such checkpoint or data, or the
            settings do not fit the model.
        ImportError: a package is missing.
        RuntimeError: the loss is no longer a finite number.
    """
    checkpoint = checkpoint_to_resume(args)
    training = Training(args, make_task)
    training.begin(checkpoint)
    training.carry_out(checkpoint)


class Training:
    """One run: the task, its optimiser, its data, and how far it has come.

    Attributes:
        step: optimiser steps done, over all pieces of the run.
        parameters: what is trained, by name.
        hub_repository: where the main process uploads the result, if anywhere.
    """

    def __init__(
        self, args: argparse.Namespace, make_task: Callable[[argparse.Namespace], TrainingTask]
    ) -> None:
        self.args = args
        self.output_dir = Path(args.output_dir)
        self.step = 0
        self.hub_repository: str | None = None
        self._seconds_before = 0.0
        self._started = time.monotonic()
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        self.accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            # The task casts what may be cast. In fp16 accelerate scales the gradients besides.
            mixed_precision="fp16" if args.mixed_precision == "fp16" else "no",
            log_with=wanted_trackers(args.report_to) or None,
            project_config=ProjectConfiguration(
                project_dir=str(self.output_dir), logging_dir=str(self.output_dir)
            ),
        )
        # Parameters, gradients or optimiser live in pieces, each process holding some of them.
        self.sharded = self.accelerator.distributed_type in (
            DistributedType.FSDP,
            DistributedType.DEEPSPEED,
        )
        if self.sharded and args.ema_decay:
            raise ValueError("Weights are not averaged under FSDP or DeepSpeed; set ema_decay 0.")
        if self.sharded and args.mixed_precision == "fp16":
            raise ValueError("Under FSDP or DeepSpeed use mixed_precision bf16 or no, not fp16.")
        set_seed(args.seed)

        self.task = make_task(args)
        self.task.to(self.accelerator.device)
        optimizer = make_optimizer(
            args.optimizer,
            parameter_groups(trained_parameters(self.task), args.lr_scale),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            deepspeed = self.accelerator.state.deepspeed_plugin.deepspeed_config
            deepspeed["train_micro_batch_size_per_gpu"] = args.batch_size
        self.model, self.optimizer = self.accelerator.prepare(self.task, optimizer)
        self.parameters = trained_parameters(self.task)  # sharding replaces them
        self.average: EMAModel | None = None
        if args.ema_decay:
            self.average = EMAModel(self.parameters.values(), decay=args.ema_decay)
        # The task writes the weights; accelerate would save the frozen networks too. Weights in
        # pieces are accelerate's to save and load, and the task's are for inference.
        self.accelerator.register_save_state_pre_hook(
            lambda models, weights, folder: weights.clear()
        )
        self.accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
        self.data = self.task.training_samples()

    def begin(self, checkpoint: Path | None) -> None:
        """Make the repository and the output folder ready, or go on from `checkpoint`.

        Nothing of an earlier run is touched before all that may be refused has been.
        """
        args, main_process = self.args, self.accelerator.is_main_process
        if args.push_to_hub and main_process:
            # Missing rights are found before the work, not after it.
            self.hub_repository = publishing.create_hub_repository(
                args.hub_model_id, self.output_dir, args.hub_token, args.hub_private
            )
        if checkpoint is not None:
            self.resume(checkpoint)
        self.accelerator.wait_for_everyone()
        changes = begin_output(args, checkpoint, self.step) if main_process else {}
        self.accelerator.wait_for_everyone()
        self.start_trackers()
        if checkpoint is not None:
            self.log("resume", checkpoint=str(checkpoint), changed_settings=changes)

    def carry_out(self, checkpoint: Path | None) -> None:
        """Validate, train, and save and upload the result; or stop when asked to.

        Args:
            checkpoint: what `begin` was given. A run that goes on was validated at its start.
        """
        args, accelerator = self.args, self.accelerator
        with StopRequest() as stop_request:
            if checkpoint is None:
                self.log_validation()
            finished = self.run(stop_request)
        if finished:
            self.save_result(self.log_validation())
            accelerator.print(
                f"Saved {args.output_dir} after {self.step} steps and "
                f"{self.seconds / 3600:.2f} hours."
            )
            if self.hub_repository is not None:
                url = publishing.upload_result(
                    self.hub_repository, self.output_dir, args.hub_token, self.step
                )
                accelerator.print(f"Uploaded to {url}.")
        else:
            accelerator.print(
                f"Stopped by {stop_request.signal_name} after step {self.step}. To go on, run the "
                "same command with --resume latest."
            )
        accelerator.wait_for_everyone()
        accelerator.end_training()

    @property
    def seconds(self) -> float:
        """Wall-clock time of the run with validation and checkpoints, over all its pieces."""
        return self._seconds_before + time.monotonic() - self._started

    # -- The loop --------------------------------------------------------------------------------

    def run(self, stop_request: StopRequest) -> bool:
        """Train until steps or minutes are used up (True) or a stop is requested (False)."""
        args = self.args
        checkpoint_seconds = self.seconds
        record = StepRecord()
        stopped = out_of_time = False
        # Workers outlive the signals that end a run, so they are told when it is over.
        with contextlib.closing(self.samples()) as samples, self.progress_bar() as bar:
            while self.step < args.max_train_steps and not (stopped or out_of_time):
                began = time.monotonic()
                self.train_step(samples, record)
                bar.update()
                log_due = self.step % args.log_steps == 0 or self.step == args.max_train_steps
                means = self.finite_means(record) if log_due else {}  # waits for the device
                record.seconds += time.monotonic() - began
                if log_due:
                    rate = self.learning_rate(self.step - 1)
                    pace = record.pace(self.accelerator.num_processes)
                    self.log("train", **means, learning_rate=rate, **pace)
                    bar.set_postfix_str(
                        f"loss {means['loss']:.5f}, {pace['seconds_per_step']:.2f} s/step, "
                        f"lr {rate:.2e}"
                    )
                    record = StepRecord()

                minutes = self.seconds / 60
                stopped, out_of_time, save_due = self.agreed(
                    stop_request.signal_name is not None,
                    args.max_train_minutes is not None and minutes >= args.max_train_minutes,
                    (args.checkpoint_steps is not None and self.step % args.checkpoint_steps == 0)
                    or minutes - checkpoint_seconds / 60 >= args.checkpoint_minutes,
                )
                done = out_of_time or self.step == args.max_train_steps
                if stopped or save_due or done:
                    if record.steps:
                        self.finite_means(record)  # keep no lost weights
                    self.save_checkpoint()
                    checkpoint_seconds = self.seconds
                if args.validation_steps and self.step % args.validation_steps == 0:
                    if not (stopped or done):  # the end of a run is validated anyway
                        self.log_validation()
        return not stopped

    def progress_bar(self) -> tqdm:
        return tqdm(
            desc="training",
            unit="step",
            initial=self.step,
            total=self.args.max_train_steps,
            disable=not self.accelerator.is_local_main_process,
        )

    def samples(self) -> Generator[dict[str, Tensor], None, None]:
        """The batches of this process from the coming step to the last."""
        accumulation = self.args.gradient_accumulation_steps
        batches = ConsecutiveBatches(
            self.step * accumulation,
            self.args.max_train_steps * accumulation,
            self.args.batch_size,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        device = self.accelerator.device
        pin_memory = device.type == "cuda"
        for batch in sample_loader(self.data, batches, self.args.data_workers, pin_memory):
            yield {name: value.to(device, non_blocking=True) for name, value in batch.items()}

    def train_step(self, samples: Iterator[dict[str, Tensor]], record: StepRecord) -> None:
        """Do one optimiser step, and note its loss, the parts of it and gradient norms."""
        args, accelerator = self.args, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step) * group["scale"]
        self.task.begin_step(self.step)
        for _ in range(args.gradient_accumulation_steps):
            asked = time.monotonic()
            batch = next(samples)
            record.waiting_seconds += time.monotonic() - asked
            with accelerator.accumulate(self.model):
                terms = self.model(batch, self.step)
                accelerator.backward(terms["loss"])
                if accelerator.sync_gradients:
                    record.add(clip_gradients(accelerator, self.parameters, args.max_gradient_norm))
                self.optimizer.step()
                self.optimizer.zero_grad()
            record.add(terms, 1 / args.gradient_accumulation_steps)
        self.step += 1
        if self.average is not None:
            self.average.step(self.parameters.values())
        record.steps += 1
        record.samples += args.batch_size * args.gradient_accumulation_steps

    def learning_rate(self, step: int) -> float:
        """The learning rate in step `step`, counted from 0, of parameters without a factor."""
        args = self.args
        factor = learning_rate_factor(step, args.warmup_steps, args.max_train_steps)
        return args.learning_rate * factor

    def finite_means(self, record: StepRecord) -> dict[str, float]:
        """Return what `record` holds as means over its steps and the processes.

        Raises:
            RuntimeError: one is infinite or no number; the weights are lost then.
        """
        means = {
            name: float(self.accelerator.reduce(value / record.steps, "mean"))
            for name, value in record.sums.items()
        }
        for name, mean in means.items():
            # In fp16, gradients that overflow are part of finding the right scale.
            overflowing = name.startswith("gradient") and self.args.mixed_precision == "fp16"
            if not (math.isfinite(mean) or overflowing):
                found = checkpoints.find_checkpoints(self.output_dir)
                kept = f" The last checkpoint is {found[-1]}." if found else ""
                raise RuntimeError(
                    f"The {name.replace('_', ' ')} is {mean} at step {self.step}. Lower "
                    f"learning_rate or max_gradient_norm.{kept}"
                )
        return means

    def agreed(self, *decisions: bool) -> list[bool]:
        """The decisions of the main process, in all processes; their clocks and signals differ."""
        shared = list(decisions)
        if self.accelerator.num_processes > 1:
            broadcast_object_list(shared)
        return shared

    # -- Checkpoints -----------------------------------------------------------------------------

    def trained_state(self) -> dict[str, Tensor]:
        """What is trained, whole, by name; all processes must ask."""
        if self.sharded:
            whole = self.accelerator.get_state_dict(self.model)
            return {name: whole[name] for name in self.parameters} if whole else {}
        return {name: value.detach() for name, value in self.parameters.items()}

    def save_checkpoint(self) -> None:
        """Save what the run needs to go on as if it had not stopped, in ``checkpoint-STEP``."""
        folder = checkpoints.unfinished_checkpoint(self.output_dir, self.step)
        trained = self.trained_state()
        if self.accelerator.is_main_process:
            checkpoints.tidy_up(self.output_dir)
            (folder / STATE_FOLDER).mkdir(parents=True)
            self.task.save_weights(folder, trained)
            if not self.sharded:
                self.task.save_training_state(folder / STATE_FOLDER)
            if self.average is not None:
                shadows = zip(self.parameters, self.average.shadow_params, strict=True)
                save_file(dict(shadows), folder / STATE_FOLDER / AVERAGE_FILE)
        self.accelerator.wait_for_everyone()
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        unsaved = {"exclude_frozen_parameters": True} if deepspeed else {}
        self.accelerator.save_state(str(folder / STATE_FOLDER), **unsaved)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            accumulation = self.args.gradient_accumulation_steps
            per_batch = self.args.batch_size * self.accelerator.num_processes
            progress = {
                "step": self.step,
                "seconds": self.seconds,
                "next_sample": self.step * accumulation * per_batch,
                "processes": self.accelerator.num_processes,
            }
            checkpoints.finish_checkpoint(
                self.output_dir, self.step, progress, self.args.checkpoints_total_limit
            )
        self.accelerator.wait_for_everyone()

    def resume(self, checkpoint: Path) -> None:
        """Take weights, optimiser, average, random state, step and time from `checkpoint`."""
        state = checkpoint / STATE_FOLDER
        progress = checkpoints.read_progress(checkpoint)
        processes = self.accelerator.num_processes
        if progress["processes"] != processes:
            raise ValueError(
                f"{checkpoint} was saved by {progress['processes']} processes and cannot go on "
                f"with {processes}: each has its share of the samples. Start as many again."
            )
        if not self.sharded:
            self.task.load_weights(checkpoint)
            self.task.load_training_state(state)
        if self.average is not None:
            if not (state / AVERAGE_FILE).is_file():
                raise ValueError(
                    f"{checkpoint} holds no averaged weights. Resume with ema_decay 0."
                )
            shadows = load_file(state / AVERAGE_FILE)
            self.average.shadow_params = [
                shadows[name].to(value.device) for name, value in self.parameters.items()
            ]
            self.average.optimization_step = progress["step"]
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        missing = {"load_module_strict": False} if deepspeed else {}
        self.accelerator.load_state(str(state), **missing)
        self.step, self._seconds_before = progress["step"], progress["seconds"]
        self._started = time.monotonic()

    # -- What the run reports --------------------------------------------------------------------

    def start_trackers(self) -> None:
        """Open the trackers; after a resume they go on from the step of the checkpoint."""
        settings = plain_settings(self.args, *_ABOUT_THIS_CALL)
        kwargs = {
            "tensorboard": {"purge_step": self.step + 1},
            "wandb": {"config": settings, "dir": str(self.output_dir)},
        }
        self.accelerator.init_trackers(TRACKER_FOLDER, init_kwargs=kwargs)

    def log(self, kind: str, **values: Any) -> None:
        """Add a line to ``log.jsonl``, and the numbers in it to the trackers."""
        numbers = {
            f"{kind}/{name}": value
            for name, value in values.items()
            if isinstance(value, (int, float))
        }
        self.accelerator.log(numbers, step=self.step)
        if self.accelerator.is_main_process:
            entry = {"kind": kind, "step": self.step, "hours": self.seconds / 3600, **values}
            with (self.output_dir / LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def log_validation(self) -> Validation | None:
        """Score the weights that would be saved on held-out scenes; log and return the scores."""
        validation = None
        # Sharded networks compute in all processes or in none.
        if self.accelerator.is_main_process or self.sharded:
            with self.as_saved(), torch.no_grad():
                validation = self.task.validate()
        if validation is not None and self.accelerator.is_main_process:
            self.log("validation", **validation.scores)
            tqdm.write(f"step {self.step}: {self.task.validation_summary(validation.scores)}")
            if validation.grid is not None:
                path = self.output_dir / picture_name(self.step)
                path.parent.mkdir(exist_ok=True)
                validation.grid.save(path)
                show_picture(self.accelerator, validation.grid, self.step)
        self.accelerator.wait_for_everyone()
        return validation

    @contextlib.contextmanager
    def as_saved(self) -> Iterator[None]:
        """The task as inference has it, with averaged weights."""
        if self.average is not None:
            self.average.store(self.parameters.values())
            self.average.copy_to(self.parameters.values())
        try:
            with self.task.as_saved():
                yield
        finally:
            if self.average is not None:
                self.average.restore(self.parameters.values())

    def save_result(self, validation: Validation | None) -> None:
        """Save what inference loads, and the model card."""
        scores = validation.scores if validation is not None else {}
        with self.as_saved():
            trained = self.trained_state()
            if self.accelerator.is_main_process:
                self.task.save_result(self.output_dir, trained)
        if not self.accelerator.is_main_process:
            return
        log = read_log(self.output_dir)
        precision = self.args.mixed_precision
        paces = [entry["samples_per_second"] for entry in log if "samples_per_second" in entry]
        report = RunReport(
            args=self.args,
            step=self.step,
            seconds=self.seconds,
            processes=self.accelerator.num_processes,
            device=self.accelerator.device,
            precision="float32" if precision == "no" else precision,
            trained_parameters=sum(value.numel() for value in trained.values()),
            scores=scores,
            samples_per_second=sorted(paces)[len(paces) // 2] if paces else None,
            log=log,
            pictures=picture_name(self.step) if validation and validation.grid else None,
        )
        card = model_card(report, self.task.card_text(scores, log))
        card.save(self.output_dir / "README.md")


class StepRecord:
    """Sums over the steps since the last line of the log.

    Attributes:
        steps: how many there were.
        samples: those that this process computed.
        seconds: the time they took.
        waiting_seconds: the part of it in which there was no sample to compute.
        sums: of losses and gradient norms, by name.
    """

    def __init__(self) -> None:
        self.steps = self.samples = 0
        self.seconds = self.waiting_seconds = 0.0
        self.sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], share: float = 1.0) -> None:
        for name, value in values.items():
            part = value.detach() * share
            self.sums[name] = self.sums[name] + part if name in self.sums else part

    def pace(self, processes: int) -> dict[str, float]:
        """Seconds per step, samples per second of all processes, share of time without samples."""
        return {
            "seconds_per_step": self.seconds / self.steps,
            "samples_per_second": processes * self.samples / self.seconds,
            "waiting_for_data": self.waiting_seconds / self.seconds,
        }


def trained_parameters(task: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of `task` that require gradients, by name."""
    return {name: value for name, value in task.named_parameters() if value.requires_grad}


def wanted_trackers(report_to: Sequence[str]) -> list[str]:
    """Return the names of the trackers to report to.

    Raises:
        ValueError: one that is asked for by name is not installed.
    """
    from accelerate.utils import is_tensorboard_available, is_wandb_available

    installed = {"tensorboard": is_tensorboard_available(), "wandb": is_wandb_available()}
    if "all" in report_to:
        return [name for name in TRACKERS if installed[name]]
    wanted = [name for name in TRACKERS if name in report_to]
    for name in wanted:
        if not installed[name]:
            raise ValueError(
                f"report_to names {name}, which is not installed: pip install {name}, or set "
                "report_to none."
            )
    return wanted


def picture_name(step: int) -> str:
    """Return where the pictures of a validation lie in the output folder."""
    return f"{PICTURE_FOLDER}/step-{step:06d}.png"


def show_picture(accelerator: Accelerator, picture: PIL.Image.Image, step: int) -> None:
    """Show a picture in the trackers."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            array = np.asarray(picture.convert("RGB"))[None]
            tracker.log_images({PICTURE_FOLDER: array}, step, dataformats="NHWC")
        else:
            tracker.log_images({PICTURE_FOLDER: [picture]}, step)


# -- Files ---------------------------------------------------------------------------------------


def checkpoint_to_resume(args: argparse.Namespace) -> Path | None:
    """Return the checkpoint to go on from, or None for a new run.

    Raises:
        ValueError: the checkpoint is none, or a new run would overwrite the files of another.
    """
    output_dir = Path(args.output_dir)
    if args.resume_from_checkpoint == "latest":
        if found := checkpoints.find_checkpoints(output_dir):
            return found[-1]
        if (output_dir / SETTINGS_FILE).is_file():
            return None  # it was stopped before its first checkpoint
    elif args.resume_from_checkpoint is not None:
        checkpoint = Path(args.resume_from_checkpoint)
        if not checkpoints.is_checkpoint(checkpoint):
            raise ValueError(
                f"{checkpoint} is no checkpoint of this script: it has no "
                f"{STATE_FOLDER}/{checkpoints.PROGRESS_FILE}."
            )
        return checkpoint
    if output_dir.is_file():
        raise ValueError(f"The output folder {output_dir} is a file.")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not args.overwrite_output_dir:
        raise ValueError(
            f"The output folder {output_dir} is not empty. Pass --resume latest to go on with the "
            "run in it, --overwrite_output_dir to start anew, or another folder."
        )
    return None


def begin_output(
    args: argparse.Namespace, checkpoint: Path | None, step: int
) -> dict[str, list[Any]]:
    """Write ``training_config.yaml`` and return the settings it changes, as {name: [old, new]}.

    A new run removes checkpoints, logs and pictures of the run it replaces, and changes nothing. A
    run that goes on takes out of the log what it will do again.
    """
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    checkpoints.tidy_up(output_dir)
    settings = plain_settings(args, *_ABOUT_THIS_CALL)
    path = output_dir / SETTINGS_FILE
    changes: dict[str, list[Any]] = {}
    if checkpoint is None:
        for old in checkpoints.find_checkpoints(output_dir):
            checkpoints.delete_checkpoint(old)
        (output_dir / LOG_FILE).unlink(missing_ok=True)
        for folder in (TRACKER_FOLDER, PICTURE_FOLDER):
            shutil.rmtree(output_dir / folder, ignore_errors=True)
    else:
        kept = [entry for entry in read_log(output_dir) if entry["step"] <= step]
        unfinished = output_dir / f"unfinished-{LOG_FILE}"
        unfinished.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        os.replace(unfinished, output_dir / LOG_FILE)
        if path.is_file():
            before = yaml.safe_load(path.read_text(encoding="utf-8"))
            for name, value in settings.items():
                if before.get(name) != value:
                    changes[name] = [before.get(name), value]
                    print(
                        f"The run goes on with another {name}: {value} instead of "
                        f"{before.get(name)}."
                    )
    write_settings(path, settings)
    return changes


def read_log(output_dir: Path) -> list[dict[str, Any]]:
    """Return the entries of ``log.jsonl``; a line that a killed run left half written is none."""
    path = output_dir / LOG_FILE
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    return entries

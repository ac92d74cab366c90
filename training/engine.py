"""The loop every model here is trained with: exact resume, several processes, logs, validation.

A model brings a :class:`training.task.TrainingTask`, which knows its networks, its losses and its
files; :func:`run` does the rest. Samples, augmentation, learning rate and everything else that
changes over a run are functions of the seed and the optimiser step. A run that is killed at any
moment and goes on with ``--resume latest`` therefore ends with the bits of an unbroken run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    ProjectConfiguration,
    broadcast_object_list,
    set_seed,
)
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from training import checkpoints, publishing
from training.checkpoints import STATE_FOLDER
from training.model_card import RunReport, model_card
from training.optimization import (
    clip_gradients,
    learning_rate_factor,
    make_optimizer,
    parameter_groups,
)
from training.output_folder import (
    LOG_FILE,
    PICTURE_FOLDER,
    TRACKER_FOLDER,
    begin_output,
    checkpoint_to_resume,
    picture_name,
    read_log,
)
from training.run_settings import ABOUT_THIS_CALL, wanted_trackers
from training.samples import ConsecutiveBatches, sample_loader
from training.settings import plain_settings
from training.task import TrainingTask, trained_parameters
from training.validation import Validation

AVERAGE_FILE = "ema.safetensors"


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
        training = ready_to_run(parse_args(), make_task)
    except (ValueError, ImportError) as error:
        sys.exit(f"{name}: {error}")
    training.carry_out()


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
    ready_to_run(args, make_task).carry_out()


def ready_to_run(
    args: argparse.Namespace, make_task: Callable[[argparse.Namespace], TrainingTask]
) -> Training:
    """Return the run that `args` describe, at its start or where it goes on; see `run`."""
    checkpoint = checkpoint_to_resume(args)
    training = Training(args, make_task)
    training.begin(checkpoint)
    return training


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
        kind = self.accelerator.distributed_type
        self.deepspeed = kind == DistributedType.DEEPSPEED
        # Parameters, gradients or optimiser live in pieces, each process holding some of them.
        self.sharded = self.deepspeed or kind == DistributedType.FSDP
        if self.sharded and args.ema_decay:
            raise ValueError("Weights are not averaged under FSDP or DeepSpeed; set ema_decay 0.")
        if self.sharded and args.mixed_precision == "fp16":
            raise ValueError("Under FSDP or DeepSpeed use mixed_precision bf16 or no, not fp16.")
        set_seed(args.seed)

        self.task = make_task(args)
        self.task.to(self.accelerator.device)
        optimizer = make_optimizer(
            args.optimizer,
            parameter_groups(trained_parameters(self.task), args.lr_scale, self.task.decays),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
        if self.deepspeed:
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

    def carry_out(self) -> None:
        """Validate, train, and save and upload the result; or stop when asked to."""
        args, accelerator = self.args, self.accelerator
        with StopRequest() as stop_request:
            if self.step == 0:  # a run that goes on was validated at its start
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
        factor = learning_rate_factor(
            step, args.warmup_steps, args.max_train_steps, args.learning_rate_schedule
        )
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
        unsaved = {"exclude_frozen_parameters": True} if self.deepspeed else {}
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
        missing = {"load_module_strict": False} if self.deepspeed else {}
        self.accelerator.load_state(str(state), **missing)
        self.step, self._seconds_before = progress["step"], progress["seconds"]
        self._started = time.monotonic()

    # -- What the run reports --------------------------------------------------------------------

    def start_trackers(self) -> None:
        """Open the trackers; after a resume they go on from the step of the checkpoint."""
        settings = plain_settings(self.args, *ABOUT_THIS_CALL)
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


def show_picture(accelerator: Accelerator, picture: PIL.Image.Image, step: int) -> None:
    """Show a picture in the trackers."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            array = np.asarray(picture.convert("RGB"))[None]
            tracker.log_images({PICTURE_FOLDER: array}, step, dataformats="NHWC")
        else:
            tracker.log_images({PICTURE_FOLDER: [picture]}, step)

"""Train BokehDiff: one UNet step at T = 499 from an all-in-focus photograph to one with lens blur.

    accelerate launch training/finetune.py --config training/configs/tiny.yaml

trains the checkpoint that ships with bokehdiff, from nothing, on procedural scenes. Every setting
of the file is a flag too, and the flag wins. With ``--pretrained`` the run starts from a folder or
a hub id, and with ``--mode lora`` it trains low-rank adapters instead of all weights.

The run can stop at any time (Ctrl-C, SIGTERM, a power cut) and go on with
``--resume_from_checkpoint latest``; under a launcher, send SIGTERM to its process group. Samples,
augmentation, learning rate and the hardness of PISA are functions of the seed and the step, so a
run in pieces ends with the weights of an unbroken run.

The output folder holds the pipeline (or ``pytorch_lora_weights.safetensors``),
``training_config.yaml`` with all settings, ``log.jsonl`` with one line per logged step or
validation, and a model card with measured numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.training_utils import EMAModel, cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from bokehdiff import losses
from bokehdiff.attention import PisaConfig
from bokehdiff.models import AutoencoderSpaceToDepth, LightTransportUNet, StoredPrompt
from bokehdiff.pipelines import BokehDiffPipeline
from training.model_card import RunReport, model_card
from training.samples import AugmentedCrops, ConsecutiveBatches, sample_loader
from training.settings import mapping, names, parse_settings, write_settings
from training.validation import validate, without_border

SDXL_LORA_TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
    "time_emb_proj",
]
LORA_FILE = "pytorch_lora_weights.safetensors"
STATE_FILE = "trainer_state.json"
AVERAGE_FILE = "ema.safetensors"


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the settings in `input_args` (default: the command line) over those of ``--config``.

    Raises:
        ValueError: the settings file is unreadable or holds unknown settings, or settings
            contradict each other.
    """
    parser = argparse.ArgumentParser(
        description="Train BokehDiff, from nothing or from a pretrained pipeline.",
        epilog="example: accelerate launch training/finetune.py "
        "--config training/configs/tiny.yaml",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--config", help="YAML file of settings, named as the flags are; flags win over the file")
    add("--output_dir", help="folder for weights, checkpoints, log and model card")
    add("--overwrite_output_dir", action=flag, default=False, help="start anew in a used folder")
    add("--resume_from_checkpoint", help="a checkpoint, or 'latest', which may start anew")

    add = parser.add_argument_group("model: pretrained, or made from nothing").add_argument
    add("--pretrained", help="pipeline folder or hub id to start from")
    add("--model_unet", type=mapping, help="arguments of a LightTransportUNet made from nothing")
    add("--model_block_size", type=int, default=2, help="pixels a side of its lossless latents")
    add("--model_pisa", type=mapping, default={}, help="its departures from PISA's preset 'paper'")
    add("--pisa_hardness_by_step", action=flag, default=True, help="harden circles step by step")
    add("--mode", choices=("full", "lora"), default="full", help="train all weights, or adapters")
    add("--lora_rank", type=int, default=8, help="rank of the adapters")
    add("--lora_alpha", type=float, default=8.0, help="adapters are scaled by alpha / rank")
    add("--lora_targets", type=names, default=SDXL_LORA_TARGETS, help="endings of layer names")

    add = parser.add_argument_group(
        "data: shards, or procedural scenes made on the fly"
    ).add_argument
    add("--data_shards", help="folder of shards written by data_synthesis")
    add("--data_size", type=int, default=128, help="pixels a side of procedural scenes")
    add("--data_seed", type=int, default=0, help="seed of procedural scenes")
    add("--data_options", type=mapping, default={}, help="further arguments of ProceduralScenes")
    add("--data_crop_size", type=int, default=128, help="pixels a side of the crops trained on")
    add("--data_workers", type=int, default=0, help="processes that prepare samples")

    add = parser.add_argument_group("loss, on display-encoded sRGB in [-1, 1]").add_argument
    add("--loss_reconstruction", choices=losses.RECONSTRUCTION_KINDS, default="mse", help="kind")
    add("--loss_reconstruction_weight", type=float, default=1.0, help="its weight")
    add("--loss_edge_weight", type=float, default=1.0, help="weight of the multi-scale edge loss")
    add("--loss_edge_variant", choices=losses.EDGE_VARIANTS, default="official", help="its form")
    add("--loss_border", type=int, default=0, help="pixels at the border that count for nothing")

    add = parser.add_argument_group("optimiser: AdamW, warm-up, half a cosine to zero").add_argument
    add("--max_train_steps", type=int, default=10_000, help="optimiser steps of the whole run")
    add("--max_train_minutes", type=float, help="end earlier, after this time over all pieces")
    add("--batch_size", type=int, default=1, help="samples per process and forward pass")
    add("--gradient_accumulation_steps", type=int, default=1, help="forward passes per step")
    add("--learning_rate", type=float, default=1e-4, help="the highest")
    add("--lr_scale", type=mapping, default={}, help="factors by name fragment: '{to_q: 0.1}'")
    add("--warmup_steps", type=int, default=500, help="steps of linear rise")
    add("--adam_beta1", type=float, default=0.9, help="memory of the gradient")
    add("--adam_beta2", type=float, default=0.95, help="memory of its square")
    add("--adam_epsilon", type=float, default=1e-7, help="floor of the divisor")
    add("--weight_decay", type=float, default=0.01, help="pull of the weights to zero")
    add("--max_gradient_norm", type=float, default=1.0, help="clip gradients; 0 does not")
    add("--ema_decay", type=float, default=0.0, help="save averaged weights; 0 saves the last")
    add("--gradient_checkpointing", action=flag, default=False, help="less memory, more time")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), default="no", help="of the UNet")
    add("--seed", type=int, default=0, help="of initial weights, sample order, augmentation")
    add("--threads", type=int, help="CPU threads of the main process")

    add = parser.add_argument_group("checkpoints, log and validation").add_argument
    add("--checkpoint_steps", type=int, help="save a checkpoint every so many steps")
    add("--checkpoint_minutes", type=float, default=10.0, help="and whenever this time has passed")
    add("--checkpoints_total_limit", type=int, help="delete the oldest beyond this number")
    add("--log_steps", type=int, default=10, help="steps per line of log.jsonl")
    add("--validation_steps", type=int, help="steps between validations; without it, at the ends")
    add("--validation_scenes", type=int, default=8, help="held-out scenes; 0 does not validate")
    add("--validation_shards", help="folder of held-out shards; without it, procedural scenes")
    add("--validation_seed", type=int, default=1_000_003, help="seed of held-out scenes")

    args = parse_settings(parser, input_args)
    check_settings(args)
    arguments = sys.argv[1:] if input_args is None else input_args
    args.command = shlex.join(["accelerate", "launch", "training/finetune.py", *arguments])
    return args


def check_settings(args: argparse.Namespace) -> None:
    """Raise ValueError for settings that cannot work, before anything is written."""
    if args.output_dir is None:
        raise ValueError("There is no output folder. Set --output_dir, or output_dir in the file.")
    if (args.pretrained is None) == (args.model_unet is None):
        raise ValueError(
            "Say where the model comes from: either pretrained (a folder or hub id), or model.unet "
            "(the arguments of a network made from nothing), not both."
        )
    if args.pretrained is not None and args.model_pisa:
        raise ValueError("A pretrained pipeline brings its own PISA settings; remove model.pisa.")
    if args.mode == "lora" and args.pretrained is None:
        raise ValueError("Adapters (mode lora) need trained weights under them. Set pretrained.")
    if args.mode == "lora" and args.ema_decay:
        raise ValueError("Weights are averaged in mode full only. Remove ema_decay, or mode lora.")
    least: dict[str, int] = {
        **dict.fromkeys(("model_block_size", "lora_rank", "data_size", "data_crop_size"), 1),
        **dict.fromkeys(("max_train_steps", "batch_size", "gradient_accumulation_steps"), 1),
        **dict.fromkeys(("threads", "checkpoint_steps", "checkpoints_total_limit"), 1),
        **dict.fromkeys(("log_steps", "validation_steps"), 1),
        **dict.fromkeys(("data_seed", "data_workers", "loss_border", "max_train_minutes"), 0),
        **dict.fromkeys(("loss_reconstruction_weight", "loss_edge_weight", "learning_rate"), 0),
        **dict.fromkeys(("warmup_steps", "weight_decay", "max_gradient_norm", "seed"), 0),
        **dict.fromkeys(("checkpoint_minutes", "validation_scenes", "validation_seed"), 0),
    }
    for name, lowest in least.items():
        value = getattr(args, name)
        if value is not None and not lowest <= value < math.inf:
            raise ValueError(f"The setting {name} must be at least {lowest}, got {value}.")
    if not 0 <= args.ema_decay < 1:
        raise ValueError(f"The setting ema_decay must be in [0, 1), got {args.ema_decay}.")
    if 2 * args.loss_border >= args.data_crop_size:
        raise ValueError(
            f"A loss.border of {args.loss_border} pixels on each side leaves nothing of crops of "
            f"{args.data_crop_size} pixels. Lower loss.border or raise data.crop_size."
        )
    if args.data_shards is None:
        if args.data_crop_size > args.data_size:
            raise ValueError(
                f"Crops of {args.data_crop_size} pixels do not fit procedural scenes of "
                f"{args.data_size} pixels. Lower data.crop_size or raise data.size."
            )
        if args.validation_shards is None and args.validation_seed == args.data_seed:
            raise ValueError(
                "validation_seed equals data.seed, so the run would be validated on scenes it has "
                "trained on. Change one of them."
            )


class BokehRenderer(nn.Module):
    """The networks of a pipeline behind one forward pass, so that accelerate can wrap it."""

    def __init__(self, pipe: BokehDiffPipeline) -> None:
        super().__init__()
        self.pipe = pipe
        self.unet = pipe.unet
        self.vae = pipe.vae

    def forward(self, image: Tensor, disparity: Tensor, df: Tensor, K: Tensor) -> Tensor:
        """Return the photograph with lens blur, (B, 3, H, W) in [-1, 1] but not clamped.

        Args:
            image: (B, 3, H, W) all-in-focus photograph, display-encoded sRGB in [0, 1].
            disparity: (B, 1, H, W) in [0, 1], larger is nearer.
            df: (B,) disparity in focus.
            K: (B,) circle-of-confusion radius in pixels of `image` per unit of disparity.
        """
        return self.pipe.render_tensors(2 * image - 1, disparity, df, K)


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


class Training:
    """One run: the pipeline, its optimiser, its data, and how far it has come.

    Attributes:
        step: optimiser steps done, over all pieces of the run.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.output_dir = Path(args.output_dir)
        self.step = 0
        self._seconds_before = 0.0
        self._started = time.monotonic()
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        self.accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
        )
        set_seed(args.seed)

        self.pipe = build_pipeline(args)
        self.pipe.to(self.accelerator.device)
        self.parameters = select_trained_parameters(self.pipe, args)
        optimizer = torch.optim.AdamW(
            parameter_groups(self.parameters, args.lr_scale),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
        self.renderer, self.optimizer = self.accelerator.prepare(
            BokehRenderer(self.pipe), optimizer
        )
        self.average: EMAModel | None = None
        if args.ema_decay:
            self.average = EMAModel(self.parameters.values(), decay=args.ema_decay)
        self.accelerator.register_save_state_pre_hook(self._save_weights_and_progress)
        self.accelerator.register_load_state_pre_hook(self._load_weights_and_progress)

        self.crops = training_crops(args)
        self.held_out = validation_scenes(args) if self.accelerator.is_main_process else []

    @property
    def seconds(self) -> float:
        """Wall-clock time of the run with validation and checkpoints, over all its pieces."""
        return self._seconds_before + time.monotonic() - self._started

    # -- The loop --------------------------------------------------------------------------------

    def run(self, stop_request: StopRequest) -> bool:
        """Train until steps or minutes are used up (True) or a stop is requested (False)."""
        args = self.args
        checkpoint_seconds = self.seconds
        logged_step = self.step
        sums: dict[str, Tensor] = {}
        seconds_of_steps = 0.0
        stopped = out_of_time = False
        self.pipe.unet.train()
        # Workers outlive the signals that end a run, so they are told when it is over.
        with contextlib.closing(self.samples()) as samples, self.progress_bar() as bar:
            while self.step < args.max_train_steps and not (stopped or out_of_time):
                step_began = self.seconds
                for name, value in self.train_step(samples).items():
                    sums[name] = sums[name] + value if name in sums else value
                bar.update()

                if self.step % args.log_steps == 0 or self.step == args.max_train_steps:
                    steps = self.step - logged_step
                    means = self.finite_means(sums, steps)
                    pace = (seconds_of_steps + self.seconds - step_began) / steps
                    rate = self.learning_rate(self.step - 1)
                    self.log("train", **means, learning_rate=rate, seconds_per_step=pace)
                    loss = means["loss"]
                    bar.set_postfix_str(f"loss {loss:.5f}, {pace:.2f} s/step, lr {rate:.2e}")
                    sums, seconds_of_steps, logged_step = {}, 0.0, self.step
                else:
                    seconds_of_steps += self.seconds - step_began

                minutes = self.seconds / 60
                stopped, out_of_time, save_due = self.agreed(
                    stop_request.signal_name is not None,
                    args.max_train_minutes is not None and minutes >= args.max_train_minutes,
                    (args.checkpoint_steps is not None and self.step % args.checkpoint_steps == 0)
                    or minutes - checkpoint_seconds / 60 >= args.checkpoint_minutes,
                )
                done = out_of_time or self.step == args.max_train_steps
                if stopped or save_due or done:
                    self.finite_means(sums, self.step - logged_step)  # keep no lost weights
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
        for batch in sample_loader(self.crops, batches, self.args.data_workers, pin_memory):
            yield {name: value.to(device, non_blocking=True) for name, value in batch.items()}

    def train_step(self, samples: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Do one optimiser step; return its loss, the parts of it, and the gradient norm."""
        args, accelerator = self.args, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step) * group["scale"]
        if args.pisa_hardness_by_step:
            self.pipe.verify_pisa().set_hardness(self.step)
        record: dict[str, Tensor] = {}
        for _ in range(args.gradient_accumulation_steps):
            with accelerator.accumulate(self.renderer):
                terms = self.loss_terms(next(samples))
                accelerator.backward(terms["loss"])
                if accelerator.sync_gradients and args.max_gradient_norm:
                    record["gradient_norm"] = accelerator.clip_grad_norm_(
                        self.parameters.values(), args.max_gradient_norm
                    )
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, term in terms.items():
                share = term.detach() / args.gradient_accumulation_steps
                record[name] = record[name] + share if name in record else share
        self.step += 1
        if self.average is not None:
            self.average.step(self.parameters.values())
        return record

    def learning_rate(self, step: int) -> float:
        """The learning rate in step `step`, counted from 0, of parameters without a factor."""
        args = self.args
        factor = learning_rate_factor(step, args.warmup_steps, args.max_train_steps)
        return args.learning_rate * factor

    def loss_terms(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weighted sum ``loss`` and its unweighted parts ``reconstruction`` and ``edge``."""
        args = self.args
        prediction = self.renderer(batch["image"], batch["disparity"], batch["df"], batch["K"])
        prediction, target, all_in_focus = (
            without_border(image, args.loss_border)
            for image in (prediction.float(), 2 * batch["target"] - 1, 2 * batch["image"] - 1)
        )
        reconstruction = losses.reconstruction(prediction, target, args.loss_reconstruction)
        terms = {"reconstruction": reconstruction}
        loss = args.loss_reconstruction_weight * reconstruction
        if args.loss_edge_weight:
            terms["edge"] = losses.multi_scale_edge_loss(
                prediction.clamp(-1, 1), target, all_in_focus, variant=args.loss_edge_variant
            )
            loss = loss + args.loss_edge_weight * terms["edge"]
        return {"loss": loss, **terms}

    def finite_means(self, sums: dict[str, Tensor], steps: int) -> dict[str, float]:
        """Return the sums over `steps` steps as means over steps and processes.

        Raises:
            RuntimeError: one is infinite or no number; the weights are lost then.
        """
        means = {
            name: float(self.accelerator.reduce(value / steps, "mean"))
            for name, value in sums.items()
        }
        # In fp16, gradients that overflow are part of finding the right scale.
        checked = means if self.args.mixed_precision != "fp16" else {"loss": means.get("loss", 0.0)}
        for name, mean in checked.items():
            if not math.isfinite(mean):
                checkpoints = find_checkpoints(self.output_dir)
                kept = f" The last checkpoint is {checkpoints[-1]}." if checkpoints else ""
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

    def save_checkpoint(self) -> None:
        """Save what the run needs to go on as if it had not stopped, in ``checkpoint-STEP``."""
        folder = self.output_dir / f"checkpoint-{self.step}"
        unfinished = self.output_dir / f"unfinished-checkpoint-{self.step}"
        self.accelerator.save_state(str(unfinished))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            if folder.exists():
                shutil.rmtree(folder)
            unfinished.rename(folder)
            if self.args.checkpoints_total_limit is not None:
                kept = self.args.checkpoints_total_limit
                for old in find_checkpoints(self.output_dir)[:-kept]:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def resume(self, checkpoint: Path) -> None:
        """Take weights, optimiser, average, random state, step and time from `checkpoint`."""
        self.accelerator.load_state(str(checkpoint))

    def _save_weights_and_progress(
        self, models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str
    ) -> None:
        weights.clear()  # accelerate would save the frozen networks too
        if not self.accelerator.is_main_process:
            return
        save_weights(self.pipe, Path(folder), self.args.mode)
        if self.average is not None:
            shadows = zip(self.parameters, self.average.shadow_params, strict=True)
            save_file(dict(shadows), Path(folder, AVERAGE_FILE))
        progress = {"step": self.step, "seconds": self.seconds}
        Path(folder, STATE_FILE).write_text(json.dumps(progress), encoding="utf-8")

    def _load_weights_and_progress(self, models: list[nn.Module], folder: str) -> None:
        models.clear()
        load_weights(self.pipe, Path(folder), self.args.mode)
        progress = json.loads(Path(folder, STATE_FILE).read_text(encoding="utf-8"))
        self.step, self._seconds_before = progress["step"], progress["seconds"]
        self._started = time.monotonic()
        if self.average is not None:
            if not Path(folder, AVERAGE_FILE).is_file():
                raise ValueError(f"{folder} holds no averaged weights. Resume with ema_decay 0.")
            shadows = load_file(Path(folder, AVERAGE_FILE), device=str(self.accelerator.device))
            self.average.shadow_params = [shadows[name] for name in self.parameters]
            self.average.optimization_step = self.step

    # -- What the run reports --------------------------------------------------------------------

    def log(self, kind: str, **values: Any) -> None:
        """Add a line to ``log.jsonl``."""
        if self.accelerator.is_main_process:
            entry = {"kind": kind, "step": self.step, "hours": self.seconds / 3600, **values}
            with (self.output_dir / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def log_validation(self) -> dict[str, Any]:
        """Score the weights that would be saved on held-out scenes; log and return the scores."""
        scores: dict[str, Any] = {}
        if self.held_out:
            renderer = self.accelerator.unwrap_model(self.renderer, keep_fp32_wrapper=True)
            with self.as_saved():
                scores = validate(
                    renderer, self.held_out, self.args.loss_border, self.accelerator.device
                )
            self.log("validation", **scores)
            tqdm.write(
                f"step {self.step}: PSNR {scores['psnr']:.2f} dB "
                f"(photograph as it is {scores['psnr_identity']:.2f}), "
                f"blurred {scores.get('psnr_blurred', math.nan):.2f}, "
                f"in focus {scores.get('psnr_in_focus', math.nan):.2f}; "
                f"more K blurs more in {scores.get('control', math.nan):.0%} of scenes"
            )
        self.accelerator.wait_for_everyone()
        return scores

    @contextlib.contextmanager
    def as_saved(self) -> Iterator[None]:
        """The pipeline as inference has it: averaged weights, final hardness, no dropout."""
        context = self.pipe.verify_pisa()
        config_in_training = context.config
        context.config = PisaConfig.from_dict(dict(self.pipe.config.pisa))
        if self.average is not None:
            self.average.store(self.parameters.values())
            self.average.copy_to(self.parameters.values())
        self.pipe.unet.eval()
        try:
            yield
        finally:
            self.pipe.unet.train()
            if self.average is not None:
                self.average.restore(self.parameters.values())
            context.config = config_in_training

    def save_result(self, scores: dict[str, Any]) -> None:
        """Save what inference loads, and the model card."""
        with self.as_saved():
            if self.args.mode == "full":
                self.pipe.save_pretrained(self.output_dir)
            else:
                save_weights(self.pipe, self.output_dir, "lora")
        precision = self.accelerator.mixed_precision
        card = model_card(
            RunReport(
                args=self.args,
                step=self.step,
                seconds=self.seconds,
                processes=self.accelerator.num_processes,
                device=self.accelerator.device,
                precision="float32" if precision == "no" else precision,
                trained_parameters=sum(value.numel() for value in self.parameters.values()),
                scores=scores,
            )
        )
        (self.output_dir / "README.md").write_text(card, encoding="utf-8")


# -- Model and optimiser -------------------------------------------------------------------------


def build_pipeline(args: argparse.Namespace) -> BokehDiffPipeline:
    """Return the pipeline to train: a pretrained one, or one made from nothing.

    From nothing, a LightTransportUNet is put on a lossless codec, with the schedule of SDXL and an
    empty prompt. Its weights come from torch's global generator, which the caller seeds.
    """
    if args.pretrained is not None:
        return BokehDiffPipeline.from_pretrained(args.pretrained)
    block_size = args.model_block_size
    channels = {"in_channels": 5 * block_size**2, "out_channels": 3 * block_size**2}
    try:
        unet = LightTransportUNet(block_size=block_size, **{**channels, **args.model_unet})
    except TypeError as error:
        raise ValueError(
            f"The settings in model.unet do not fit LightTransportUNet: {error}."
        ) from error
    return BokehDiffPipeline(
        vae=AutoencoderSpaceToDepth(block_size=block_size),
        unet=unet,
        scheduler=DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
        ),
        stored_prompt=StoredPrompt(tokens=1, embedding_channels=8, pooled_channels=8),
        pisa_layers="light_transport.attn",
        pisa=PisaConfig.from_dict(args.model_pisa).to_dict(),
    )


def select_trained_parameters(
    pipe: BokehDiffPipeline, args: argparse.Namespace
) -> dict[str, nn.Parameter]:
    """Freeze what is not trained and return the rest by name, in float32.

    Mode "full" trains the UNet, mode "lora" adapters added to it. The codec is differentiated
    through and not trained.
    """
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            component.requires_grad_(name == "unet" and args.mode == "full")
            component.eval()
    if args.mixed_precision == "fp16" and pipe.vae.config.get("force_upcast"):
        raise ValueError(
            "The codec of this model overflows in fp16. Use mixed_precision bf16 or no."
        )
    if args.mode == "lora":
        if args.mixed_precision != "no":
            pipe.unet.to({"fp16": torch.float16, "bf16": torch.bfloat16}[args.mixed_precision])
        pipe.unet.add_adapter(
            LoraConfig(
                r=args.lora_rank,
                lora_alpha=args.lora_alpha,
                init_lora_weights="gaussian",
                target_modules=args.lora_targets,
            )
        )
    cast_training_params(pipe.unet)
    if args.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    return {name: value for name, value in pipe.unet.named_parameters() if value.requires_grad}


def parameter_groups(
    parameters: dict[str, nn.Parameter], scales: dict[str, float]
) -> list[dict[str, Any]]:
    """Return a group of parameters per factor; the first fragment that a name contains decides."""
    for fragment in scales:
        if not any(fragment in name for name in parameters):
            raise ValueError(
                f"lr_scale names {fragment!r}, which is in no trained parameter's name."
            )
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        scale = next((float(scales[part]) for part in scales if part in name), 1.0)
        groups.setdefault(scale, []).append(parameter)
    return [{"params": members, "scale": scale} for scale, members in groups.items()]


def learning_rate_factor(step: int, warmup_steps: int, max_train_steps: int) -> float:
    """Return the share of the highest learning rate in step `step`, counted from 0.

    It rises linearly over the warm-up and falls by half a cosine to zero at the last step.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(max_train_steps - warmup_steps, 1)
    return 0.5 + 0.5 * math.cos(math.pi * progress)


# -- Data ----------------------------------------------------------------------------------------


def open_scenes(shards: str | None, seed: int, args: argparse.Namespace) -> tuple[Any, int | None]:
    """Return scenes by index and their number: those in `shards`, or endless procedural ones."""
    # Reading shards does not need what making scenes needs.
    if shards is not None:
        from data_synthesis.reader import ShardedScenes

        scenes = ShardedScenes(shards)
        return scenes, len(scenes)
    from data_synthesis.procedural import ProceduralScenes

    return ProceduralScenes(seed, size=args.data_size, **args.data_options), None


def training_crops(args: argparse.Namespace) -> AugmentedCrops:
    """Return the samples to train on, by sample number."""
    scenes, count = open_scenes(args.data_shards, args.data_seed, args)
    return AugmentedCrops(scenes, count, args.data_crop_size, args.seed)


def validation_scenes(args: argparse.Namespace) -> list[dict[str, Tensor]]:
    """Return the first ``validation_scenes`` scenes of the held-out shards or seed."""
    if args.validation_scenes == 0:
        return []
    scenes, count = open_scenes(args.validation_shards, args.validation_seed, args)
    wanted = args.validation_scenes if count is None else min(args.validation_scenes, count)
    return [scenes[index] for index in tqdm(range(wanted), desc="held-out scenes", leave=False)]


# -- Files ---------------------------------------------------------------------------------------


def checkpoint_to_resume(args: argparse.Namespace) -> Path | None:
    """Return the checkpoint to go on from, or None for a new run.

    Raises:
        ValueError: the checkpoint is none, or a new run would overwrite the files of another.
    """
    output_dir = Path(args.output_dir)
    if args.resume_from_checkpoint == "latest":
        if checkpoints := find_checkpoints(output_dir):
            return checkpoints[-1]
    elif args.resume_from_checkpoint is not None:
        checkpoint = Path(args.resume_from_checkpoint)
        if not (checkpoint / STATE_FILE).is_file():
            raise ValueError(
                f"{checkpoint} is no checkpoint of this script: it has no {STATE_FILE}."
            )
        return checkpoint
    if output_dir.is_file():
        raise ValueError(f"The output folder {output_dir} is a file.")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not args.overwrite_output_dir:
        raise ValueError(
            f"The output folder {output_dir} is not empty. Pass --resume_from_checkpoint latest to "
            "go on with the run in it, --overwrite_output_dir to start anew, or another folder."
        )
    return None


def begin_output(args: argparse.Namespace, checkpoint: Path | None) -> dict[str, list[Any]]:
    """Write ``training_config.yaml`` and return the settings it changes, as {name: [old, new]}.

    A new run removes checkpoints and log of the run it replaces, and changes nothing.
    """
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    about_this_call = ("config", "command", "resume_from_checkpoint", "overwrite_output_dir")
    settings = {name: value for name, value in vars(args).items() if name not in about_this_call}
    path = output_dir / "training_config.yaml"
    changes: dict[str, list[Any]] = {}
    if checkpoint is None:
        for old in find_checkpoints(output_dir):
            shutil.rmtree(old)
        (output_dir / "log.jsonl").unlink(missing_ok=True)
    elif path.is_file():
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if before.get(name) != value:
                changes[name] = [before.get(name), value]
                print(
                    f"The run goes on with another {name}: {value} instead of {before.get(name)}."
                )
    write_settings(path, settings)
    return changes


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints in `output_dir`, the latest last."""
    steps = {
        int(path.parent.name.removeprefix("checkpoint-")): path.parent
        for path in output_dir.glob(f"checkpoint-*/{STATE_FILE}")
        if path.parent.name.removeprefix("checkpoint-").isdigit()
    }
    return [steps[step] for step in sorted(steps)]


def save_weights(pipe: BokehDiffPipeline, folder: Path, mode: str) -> None:
    """Save what is trained: ``unet/`` in mode "full", the adapters' file in mode "lora"."""
    if mode == "full":
        pipe.unet.save_pretrained(folder / "unet")
        return
    StableDiffusionXLPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
    )


def load_weights(pipe: BokehDiffPipeline, folder: Path, mode: str) -> None:
    """Load into the UNet what `save_weights` saved.

    Raises:
        ValueError: the folder holds weights of another mode or of other layers.
    """
    if not (folder / ("unet" if mode == "full" else LORA_FILE)).exists():
        raise ValueError(
            f"{folder} holds no weights of mode {mode}. Resume in the mode it was saved in."
        )
    if mode == "full":
        saved = type(pipe.unet).from_pretrained(folder / "unet")
        pipe.unet.load_state_dict(saved.state_dict())
        return
    stored = load_file(folder / LORA_FILE)
    adapters = {name.removeprefix("unet."): value for name, value in stored.items()}
    if adapters.keys() != get_peft_model_state_dict(pipe.unet).keys():
        raise ValueError(f"{folder} holds adapters of other layers. Resume with its lora.targets.")
    set_peft_model_state_dict(pipe.unet, adapters)


def main(args: argparse.Namespace) -> None:
    """Train as `args` (from `parse_args`) say, and leave the results in ``args.output_dir``.

    Raises:
        ValueError: the output folder is in use, there is no such checkpoint or data, or the
            settings do not fit the model.
        RuntimeError: the loss is no longer a finite number.
    """
    checkpoint = checkpoint_to_resume(args)
    training = Training(args)
    if checkpoint is not None:
        training.resume(checkpoint)
    changes = begin_output(args, checkpoint) if training.accelerator.is_main_process else {}
    training.accelerator.wait_for_everyone()

    with StopRequest() as stop_request:
        if checkpoint is None:
            training.log_validation()
        else:
            training.log("resume", checkpoint=str(checkpoint), changed_settings=changes)
        finished = training.run(stop_request)
    if finished:
        scores = training.log_validation()
        if training.accelerator.is_main_process:
            training.save_result(scores)
        training.accelerator.print(
            f"Saved {args.output_dir} after {training.step} steps and "
            f"{training.seconds / 3600:.2f} hours."
        )
    else:
        training.accelerator.print(
            f"Stopped by {stop_request.signal_name} after step {training.step}. To go on, run the "
            "same command with --resume_from_checkpoint latest."
        )
    training.accelerator.wait_for_everyone()
    training.accelerator.end_training()


if __name__ == "__main__":
    try:
        settings = parse_args()
    except ValueError as error:
        sys.exit(f"finetune.py: {error}")
    main(settings)

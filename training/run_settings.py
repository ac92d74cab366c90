"""The settings that every run has, whatever it trains."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence

from accelerate.utils import is_tensorboard_available, is_wandb_available

from training.optimization import OPTIMIZERS, SCHEDULES
from training.settings import check_at_least, mapping, names, parse_settings, setting_adder

TRACKERS = ("tensorboard", "wandb")
ABOUT_THIS_CALL = (
    "config",
    "command",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "hub_token",
)
"""Settings that say nothing about the run itself, or that must not be written down."""


def parse_run(
    input_args: Sequence[str] | None,
    *,
    script: str,
    description: str,
    config: str,
    add_task_settings: Callable[[argparse.ArgumentParser], None],
    check_task_settings: Callable[[argparse.Namespace], None],
) -> argparse.Namespace:
    """Return the settings in `input_args` (default: the command line) over those of ``--config``.

    Args:
        input_args: what was typed after the name of the script.
        script: its path in the repository.
        description: what it does, for ``--help``.
        config: arguments of the example that ``--help`` shows.
        add_task_settings, check_task_settings: the settings of what is trained.

    Raises:
        ValueError: the settings file is unreadable or holds unknown settings, or settings
            contradict each other.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"example: accelerate launch {script} {config}",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_output_settings(parser)
    add_task_settings(parser)
    add_engine_settings(parser)
    args = parse_settings(parser, input_args)
    check_engine_settings(args)
    check_task_settings(args)
    args.command = command_line(script, input_args)
    return args


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
    add(
        "learning_rate_schedule",
        choices=SCHEDULES,
        default="cosine",
        help="whether it falls by half a cosine to zero, or stays",
    )
    add("warmup_steps", type=int, default=500, help="steps of linear rise")
    add("optimizer", choices=OPTIMIZERS, default="adamw", help="with moments in 32 or 8 bits")
    add("adam_beta1", type=float, default=0.9, help="memory of the gradient")
    add("adam_beta2", type=float, default=0.95, help="memory of its square")
    add("adam_epsilon", type=float, default=1e-7, help="floor of the divisor")
    add("weight_decay", type=float, default=0.01, help="pull of the weights to zero")
    add("max_gradient_norm", type=float, default=1.0, help="clip each network's; 0 does not")
    add("ema_decay", type=float, default=0.0, help="save averaged weights; 0 saves the last")
    add("gradient_checkpointing", action=flag, default=False, help="less memory, more time")
    add(
        "mixed_precision",
        choices=("no", "fp16", "bf16"),
        default="no",
        help="of the trained network",
    )
    add("compile", action=flag, default=False, help="torch.compile the trained network")
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


def wanted_trackers(report_to: Sequence[str]) -> list[str]:
    """Return the names of the trackers to report to.

    Raises:
        ValueError: one that is asked for by name is not installed.
    """
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

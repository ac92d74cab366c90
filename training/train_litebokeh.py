"""Train LiteBokeh: lens blur on phones, from the photo alone.

    accelerate launch training/train_litebokeh.py --config training/configs/litebokeh_tiny.yaml

trains the network that blurs, and

    accelerate launch training/train_litebokeh.py \
        --config training/configs/litebokeh_tiny_enhancement.yaml

goes on with its result and trains the enhancement block alone. ``litebokeh_glass.yaml`` is the
larger network, for quality, and ``litebokeh_paper.yaml`` the published recipe on pairs of real
photographs. Every setting of the files is a flag too, and the flag wins.

The run can stop at any time and go on with ``--resume latest``, see ``training/finetune.py``.

The output folder holds the pipeline (``LiteBokehPipeline.from_pretrained`` reads it, and every
``checkpoint-STEP`` in it), ``training_config.yaml``, ``log.jsonl``, pictures in ``validation/`` and
a model card.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from training.engine import run, run_script
from training.litebokeh_task import (
    LiteBokehTask,
    add_litebokeh_settings,
    check_litebokeh_settings,
)
from training.run_settings import parse_run


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the settings in `input_args` (default: the command line) over those of ``--config``.

    Raises:
        ValueError: the settings file is unreadable or holds unknown settings, or settings
            contradict each other.
    """
    return parse_run(
        input_args,
        script="training/train_litebokeh.py",
        description="Train lens blur on phones, from the photo alone.",
        config="--config training/configs/litebokeh_tiny.yaml",
        add_task_settings=add_litebokeh_settings,
        check_task_settings=check_litebokeh_settings,
    )


def main(args: argparse.Namespace) -> None:
    """Train as `args` (from `parse_args`) say, and leave the results in ``args.output_dir``.

    Raises:
        ValueError: the output folder is in use, there is no such checkpoint or data, or the
            settings do not fit the model.
        RuntimeError: the loss is no longer a finite number.
    """
    run(args, LiteBokehTask)


if __name__ == "__main__":
    run_script("train_litebokeh.py", parse_args, LiteBokehTask)

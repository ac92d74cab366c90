"""Train BokehDiff: one UNet step at T = 499 from an all-in-focus photograph to one with lens blur.

    accelerate launch training/finetune.py --config training/configs/tiny.yaml

trains the checkpoint that ships with bokehdiff, from nothing, on procedural scenes, and

    accelerate launch training/finetune.py --config training/configs/paper.yaml

the low-rank adapters of the paper on Stable Diffusion XL. Every setting of the file is a flag too,
and the flag wins.

The run can stop at any time (Ctrl-C, SIGTERM, kill -9, a power cut) and go on with
``--resume latest``; under a launcher, send SIGTERM to its process group. Samples, augmentation,
learning rate and the hardness of PISA are functions of the seed and the step, so a run in pieces
ends with the weights of an unbroken run.

The output folder holds the pipeline (or ``pytorch_lora_weights.safetensors`` and
``vae_encoder.safetensors``, for ``BokehDiffPipeline.load_bokeh_weights``),
``training_config.yaml`` with all settings, ``log.jsonl`` with one line per logged step or
validation, pictures in ``validation/``, and a model card with measured numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from training.bokehdiff_task import (
    BokehDiffTask,
    add_bokehdiff_settings,
    check_bokehdiff_settings,
)
from training.engine import run, run_script
from training.run_settings import parse_run


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the settings in `input_args` (default: the command line) over those of ``--config``.

    Raises:
        ValueError: the settings file is unreadable or holds unknown settings, or settings
            contradict each other.
    """
    return parse_run(
        input_args,
        script="training/finetune.py",
        description="Train BokehDiff, from nothing or from a pretrained pipeline.",
        config="--config training/configs/tiny.yaml",
        add_task_settings=add_bokehdiff_settings,
        check_task_settings=check_bokehdiff_settings,
    )


def main(args: argparse.Namespace) -> None:
    """Train as `args` (from `parse_args`) say, and leave the results in ``args.output_dir``.

    Raises:
        ValueError: the output folder is in use, there is no such checkpoint or data, or the
            settings do not fit the model.
        RuntimeError: the loss is no longer a finite number.
    """
    run(args, BokehDiffTask)


if __name__ == "__main__":
    run_script("finetune.py", parse_args, BokehDiffTask)

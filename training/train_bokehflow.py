"""Train BokehFlow: lens blur and depth for photographs and films.

    accelerate launch training/train_bokehflow.py --config training/configs/bokehflow_nano.yaml

trains the smallest network from nothing on procedural photographs, and

    accelerate launch training/train_bokehflow.py \
        --config training/configs/bokehflow_nano_clips.yaml

goes on with its result on clips, for what is carried from frame to frame. ``bokehflow_paper.yaml``
is the published recipe on pairs of real photographs. Every setting of the files is a flag too, and
the flag wins.

The run can stop at any time and go on with ``--resume latest``, see ``training/finetune.py``.

The output folder holds the pipeline (``BokehFlowPipeline.from_pretrained`` and
``BokehFlowVideoPipeline.from_pretrained`` read it), ``training_config.yaml``, ``log.jsonl``,
pictures in ``validation/`` and a model card.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from training.bokehflow_task import (
    BokehFlowTask,
    add_bokehflow_settings,
    check_bokehflow_settings,
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
        script="training/train_bokehflow.py",
        description="Train lens blur and depth for photographs and films.",
        config="--config training/configs/bokehflow_nano.yaml",
        add_task_settings=add_bokehflow_settings,
        check_task_settings=check_bokehflow_settings,
    )


def main(args: argparse.Namespace) -> None:
    """Train as `args` (from `parse_args`) say, and leave the results in ``args.output_dir``.

    Raises:
        ValueError: the output folder is in use, there is no such checkpoint or data, or the
            settings do not fit the model.
        RuntimeError: the loss is no longer a finite number.
    """
    run(args, BokehFlowTask)


if __name__ == "__main__":
    run_script("train_bokehflow.py", parse_args, BokehFlowTask)

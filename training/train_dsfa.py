"""Train depth from a bokeh stack: Depth Anything with DSFA blocks, on stacks with metric depth.

    accelerate launch training/train_dsfa.py --config training/configs/dsfa_small.yaml

trains a small network from nothing on procedural scenes, and

    accelerate launch training/train_dsfa.py --config training/configs/dsfa_depth_anything.yaml

a Depth Anything V2 as the paper does. Every setting of the file is a flag too, and the flag wins.

The run can stop at any time and go on with ``--resume latest``, see ``training/finetune.py``.

The output folder holds the network (``DepthAnythingDSFAForDepthEstimation.from_pretrained`` reads
it), ``training_config.yaml``, ``log.jsonl``, pictures in ``validation/`` and a model card.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from training.dsfa_task import DSFATask, add_dsfa_settings, check_dsfa_settings
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
        script="training/train_dsfa.py",
        description="Train metric depth from a photograph and its bokeh stack.",
        config="--config training/configs/dsfa_small.yaml",
        add_task_settings=add_dsfa_settings,
        check_task_settings=check_dsfa_settings,
    )


def main(args: argparse.Namespace) -> None:
    """Train as `args` (from `parse_args`) say, and leave the results in ``args.output_dir``.

    Raises:
        ValueError: the output folder is in use, there is no such checkpoint or data, or the
            settings do not fit the model.
        RuntimeError: the loss is no longer a finite number.
    """
    run(args, DSFATask)


if __name__ == "__main__":
    run_script("train_dsfa.py", parse_args, DSFATask)

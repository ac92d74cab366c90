"""Train the adapter of BokehStackPipeline: FLUX.1-Kontext learns to follow a blur strength K.

    accelerate launch training/train_bokeh_stack.py \\
        --config training/configs/bokeh_stack_paper.yaml \\
        --pretrained black-forest-labs/FLUX.1-Kontext-dev

trains a :class:`bokehdiff.models.bokeh_adapter.BokehAdapter` beside the frozen transformer, with
the rectified-flow loss of FLUX. K is metric in all data, pixels of blur radius of the training
picture per 1/metre; :mod:`training.bokeh_stack_sources` describes the sources and their files.
Every setting of the configuration is a flag too, and the flag wins.

The run can stop at any time and go on with ``--resume latest``; samples, noise and timesteps are
functions of the seed and the sample's number, so a run in pieces ends with the weights of an
unbroken run.

The output folder holds the adapter (``config.json``, ``diffusion_pytorch_model.safetensors``) for
``BokehStackPipeline.load_bokeh_adapter``, with ``--export official`` also ``official/`` in the
authors' layout, ``training_config.yaml`` with all settings, ``log.jsonl`` with one line per logged
step or validation, pictures in ``validation/`` if stacks are sampled there, and a model card with
measured numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from training.bokeh_stack_task import (
    BokehStackTask,
    add_bokeh_stack_settings,
    check_bokeh_stack_settings,
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
        script="training/train_bokeh_stack.py",
        description="Train the adapter that makes FLUX.1-Kontext follow a blur strength.",
        config="--config training/configs/bokeh_stack_paper.yaml --pretrained FLUX_KONTEXT_FOLDER",
        add_task_settings=add_bokeh_stack_settings,
        check_task_settings=check_bokeh_stack_settings,
    )


def main(args: argparse.Namespace) -> None:
    """Train as `args` (from `parse_args`) say, and leave the results in ``args.output_dir``.

    Raises:
        ValueError: the output folder is in use, there is no such checkpoint or data, or the
            settings do not fit the model.
        RuntimeError: the loss is no longer a finite number.
    """
    run(args, BokehStackTask)


if __name__ == "__main__":
    run_script("train_bokeh_stack.py", parse_args, BokehStackTask)

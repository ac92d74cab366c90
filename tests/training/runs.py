"""Short training runs of tiny real models, and what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from transformers import ConvNextConfig

from bokehdiff import BokehDiffPipeline
from bokehdiff.models import StoredPrompt
from tests.tiny_models import PROMPT_CHANNELS, tiny_unet, tiny_vae
from training import finetune
from training.speed import write_random_judges

REPOSITORY = Path(__file__).resolve().parents[2]
NETWORK_FROM_NOTHING = "{block_out_channels: [8, 8], layers_per_block: 1}"
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def save_tiny_sdxl(folder: Path) -> str:
    """Save an untrained SDXL of a few thousand parameters, with a stored prompt of zeros."""
    prompt = StoredPrompt(
        tokens=4, embedding_channels=2 * PROMPT_CHANNELS, pooled_channels=PROMPT_CHANNELS
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    BokehDiffPipeline(
        vae=tiny_vae(), unet=tiny_unet(), scheduler=scheduler, stored_prompt=prompt
    ).save_pretrained(folder)
    return str(folder)


def save_random_judges(folder: Path) -> dict[str, str]:
    """Save a VGG-16 and a tiny ConvNeXt with seeded random weights; return settings naming them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny = ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1])
        return write_random_judges(folder, tiny)


def arguments(output_dir: Path, model: list[str] | None = None, **settings: Any) -> list[str]:
    """Command-line arguments of a short run; `model` defaults to a tiny network from nothing."""
    values = {
        "data_size": 40,
        "data_crop_size": 32,
        "max_train_steps": 2,
        "warmup_steps": 1,
        "learning_rate": 1e-3,
        "log_steps": 1,
        "validation_scenes": 0,
        "report_to": "none",
        **settings,
    }
    from_nothing = ["--model_unet", NETWORK_FROM_NOTHING, "--no-pisa_hardness_by_step"]
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    return ["--output_dir", str(output_dir), *(from_nothing if model is None else model), *flags]


def train(output_dir: Path, *flags: str, model: list[str] | None = None, **settings: Any) -> None:
    """Run the training script in this process."""
    finetune.main(finetune.parse_args([*arguments(output_dir, model, **settings), *flags]))


def launch(
    flags: list[str],
    processes: int = 1,
    environment: dict[str, str] | None = None,
    script: str = "training/finetune.py",
    launcher: Sequence[str] | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Run the training script under ``accelerate launch`` on CPUs, with one thread a process.

    Args:
        flags: of the script.
        processes: their number, unless `launcher` says it.
        environment: variables beside those there are.
        script: what is launched.
        launcher: options of the launcher, instead of those for `processes`.
        timeout: seconds.
    """
    if launcher is None:
        # `--cpu` would start one process whatever the number.
        several = ["--multi_gpu"] if processes > 1 else ["--cpu"]
        launcher = [*several, "--num_processes", str(processes), "--num_machines", "1"]
        launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", *launcher),
            *("--main_process_port", "0", script, *flags),
        ],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "CUDA_VISIBLE_DEVICES": "",
            **(environment or {}),
        },
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def logged(output_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The entries of this kind in the log of a run."""
    lines = (output_dir / "log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def assert_same_tensors(one: Path, other: Path) -> None:
    """Two safetensors files hold the same bits under the same names."""
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def scene(size: int = 32) -> tuple[torch.Tensor, ...]:
    """image (1, 3, H, W) in [-1, 1], disparity, df, K."""
    generator = torch.Generator().manual_seed(3)
    image = 2 * torch.rand((1, 3, size, size), generator=generator) - 1
    disparity = torch.linspace(0, 0.9, size).expand(1, 1, size, size).contiguous()
    return image, disparity, torch.tensor([0.2]), torch.tensor([6.0])

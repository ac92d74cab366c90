"""How fast, and in how much memory, BokehDiff trains on the machine at hand.

    python -m training.speed --mixed_precision bf16
    python -m training.speed --mixed_precision bf16 --gradient_checkpointing

Networks of the full size of Stable Diffusion XL, VGG-16 and ConvNeXt-Base with random weights, all
losses of ``configs/paper.yaml`` switched on from the first step, and noise for pictures: what the
machine has to do is that of a real run, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import ConvNextConfig, ConvNextModel

from bokehdiff.models import StoredPrompt
from bokehdiff.pipelines import BokehDiffPipeline
from evaluation.memory import resident_bytes, restart_peak
from training import finetune
from training.bokehdiff_task import BokehDiffTask
from training.engine import StepRecord, Training
from training.model_card import hardware, versions
from training.samples import seeded_generator

PAPER_CONFIG = Path(__file__).parent / "configs" / "paper.yaml"
CONVNEXT_BASE = ConvNextConfig(hidden_sizes=[128, 256, 512, 1024], depths=[3, 3, 27, 3])
PAPER_CROP = 512
UNTIMED_STEPS = 2

SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
SDXL_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}


class NoisePhotographs(Dataset[dict[str, Tensor]]):
    """Noise in the place of photographs, over a slope of disparity; sample n depends on n alone."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        image, target = torch.rand(
            (2, 3, self.size, self.size), generator=seeded_generator(0, number)
        )
        return {
            "image": image,
            "target": target,
            "disparity": torch.linspace(0, 0.95, self.size).expand(1, self.size, -1).contiguous(),
            "df": torch.tensor(0.4),
            "K": torch.tensor(20.0),
            "number": torch.tensor(number),
        }


class SpeedTask(BokehDiffTask):
    """BokehDiff on noise."""

    def training_samples(self) -> Dataset[dict[str, Tensor]]:
        return NoisePhotographs(self.args.data_crop_size)


def random_pipeline(channel_share: float = 1.0) -> BokehDiffPipeline:
    """Return the networks of Stable Diffusion XL with random weights, and a prompt of zeros.

    Args:
        channel_share: share of the channels of each level, for a rehearsal on a small machine.
    """

    def fewer(channels: Sequence[int]) -> tuple[int, ...]:
        return tuple(max(32, round(number * channel_share / 32) * 32) for number in channels)

    unet = {**SDXL_UNET, "block_out_channels": fewer(SDXL_UNET["block_out_channels"])}
    unet["attention_head_dim"] = tuple(
        max(number // 64, 1) for number in unet["block_out_channels"]
    )
    vae = {**SDXL_VAE, "block_out_channels": fewer(SDXL_VAE["block_out_channels"])}
    return BokehDiffPipeline(
        vae=AutoencoderKL(**vae),
        unet=UNet2DConditionModel(**unet),
        scheduler=DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
        ),
        stored_prompt=StoredPrompt(),
    )


def random_vgg16() -> dict[str, Tensor]:
    """Return random weights for the convolutions of VGG-16, named as torchvision names them."""
    weights = {}
    channels, index = 3, 0
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            weight = torch.randn(width, channels, 3, 3) * (2 / (9 * channels)) ** 0.5
            weights[f"features.{index}.weight"] = weight
            weights[f"features.{index}.bias"] = torch.zeros(width)
            channels, index = width, index + 2
        index += 1
    return weights


def write_random_judges(folder: Path, backbone: ConvNextConfig) -> dict[str, str]:
    """Write VGG-16 and a ConvNeXt with random weights; return the settings that name them."""
    save_file(random_vgg16(), folder / "vgg16.safetensors")
    ConvNextModel(backbone).save_pretrained(folder / "convnext")
    return {
        "loss_perceptual_weights": str(folder / "vgg16.safetensors"),
        "loss_adversarial_backbone": str(folder / "convnext"),
    }


def measure(
    size: int, steps: int, channel_share: float, flags: Sequence[str]
) -> dict[str, str | float]:
    """Train for `steps` timed steps and return the measurements by name.

    Args:
        size: pixels a side of the crops.
        steps: number of timed steps, after `UNTIMED_STEPS`.
        channel_share: see `random_pipeline`.
        flags: settings of ``finetune.py`` that depart from ``configs/paper.yaml``.
    """
    with tempfile.TemporaryDirectory() as folder:
        judges = write_random_judges(Path(folder), CONVNEXT_BASE)
        settings = {
            "config": str(PAPER_CONFIG),
            "output_dir": folder,
            "data_crop_size": size,
            "loss_adversarial_weight": 0.5,
            "report_to": "none",
            **judges,
        }
        args = finetune.parse_args(
            [part for name, value in settings.items() for part in (f"--{name}", str(value))]
            + ["--data_workers", "0", "--no-gradient_checkpointing", *flags]
        )
        torch.manual_seed(0)
        pipe = random_pipeline(channel_share)
        training = Training(args, lambda args: SpeedTask(args, pipe))
    device = training.accelerator.device
    samples = training.samples()
    for _ in range(UNTIMED_STEPS):
        training.train_step(samples, StepRecord())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        restart_peak()
    record = StepRecord()
    with timer(device) as seconds:
        for _ in range(steps):
            training.train_step(samples, record)
    losses = training.finite_means(record)
    peak = (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else resident_bytes(peak=True)
    )
    per_step = seconds[0] / steps
    measured: dict[str, str | float] = {
        "hardware": hardware(training.accelerator.num_processes, device),
        "versions": versions("torch", "diffusers", "peft"),
        "parameters": sum(value.numel() for value in pipe.unet.parameters()),
        "trained_parameters": sum(value.numel() for value in training.parameters.values()),
        "crop": size,
        "batch_size": args.batch_size,
        "mixed_precision": args.mixed_precision,
        "gradient_checkpointing": str(args.gradient_checkpointing),
        "loss": losses["loss"],
        "seconds_per_step": per_step,
        "steps_per_second": 1 / per_step,
        "peak_gigabytes": peak / 1e9,
    }
    if size == PAPER_CROP and channel_share == 1:
        measured[f"hours_for_{args.max_train_steps}_steps"] = args.max_train_steps * per_step / 3600
    return measured


@contextlib.contextmanager
def timer(device: torch.device) -> Iterator[list[float]]:
    """Give a list that holds the seconds of wall-clock time once the device has finished."""
    seconds: list[float] = []
    began = time.perf_counter()
    yield seconds
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds.append(time.perf_counter() - began)


def main(input_args: Sequence[str] | None = None) -> None:
    """Print the measurements as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m training.speed",
        description="Measure training at the size of SDXL, with random weights. Further flags are "
        "those of training/finetune.py.",
    )
    parser.add_argument("--size", type=int, default=PAPER_CROP, help="pixels a side of the crops")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument(
        "--channel_share", type=float, default=1.0, help="share of SDXL's channels, for a rehearsal"
    )
    own, flags = parser.parse_known_args(input_args)
    try:
        measured = measure(own.size, own.steps, own.channel_share, flags)
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()

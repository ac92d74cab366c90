"""How long BokehFlow takes to train: whole steps, and recurrences beside loops over tokens."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bokehdiff.losses import structural_similarity_loss
from bokehdiff.models.bokehflow import PIXELS_PER_TOKEN, BokehFlowModel
from evaluation.pipeline_speed import in_words, markdown, milliseconds_of
from evaluation.recurrence_speed import CHUNKS, LOOP, METHODS, TUNED_LOOP

__all__ = ["CAMERA", "TrainingSpeed", "training_speed", "training_table"]

CAMERA = (2.0, 50.0, 2.0)
"""f-number, focal length in mm and focus in metres of every photo whose time is taken."""
DIRECTIONS = 4
"""Of the recurrence of a block."""


@dataclass(frozen=True)
class TrainingSpeed:
    """A step of training: forward, backward and AdamW.

    Attributes:
        network: its name.
        side, batch: of the photos.
        step_seconds: of the whole step as it is, median.
        sequences, tokens: that a recurrence of one block works on; 0 without recurrences.
        chunked_seconds: of one block's recurrence as it is, forward and backward.
        loop_seconds: of the same, one token after the other, as the equations are published.
        tuned_loop_seconds: of the fastest such loop that we could write.
        loop_step_seconds, tuned_loop_step_seconds: of a step with such loops; not measured, but the
            step with the loops of all blocks in the place of what they have.
    """

    network: str
    side: int
    batch: int
    step_seconds: float
    sequences: int = 0
    tokens: int = 0
    chunked_seconds: float | None = None
    loop_seconds: float | None = None
    tuned_loop_seconds: float | None = None
    loop_step_seconds: float | None = None
    tuned_loop_step_seconds: float | None = None


def training_speed(
    name: str, network: BokehFlowModel, side: int, batch: int, repeats: int, loop: bool = True
) -> TrainingSpeed:
    """Time steps of training on noise, after one that does not count.

    Args:
        name: of the network.
        network: on the device that is measured; stays as it is.
        side, batch: of the photos.
        repeats: steps that count.
        loop: also a block's recurrence, chunked and as loops, once each; only with recurrences.
    """
    device = network.device.type
    step = _training_step(copy.deepcopy(network), side, batch)
    step()
    rounds = tqdm(range(repeats), unit="step", desc=name, leave=False, disable=None)
    seconds = statistics.median(milliseconds_of(step, device) / 1000 for _ in rounds)
    options = network.config
    if options.mixer != "bigdr" or not loop:
        return TrainingSpeed(name, side, batch, seconds)
    tokens, sequences = (side // PIXELS_PER_TOKEN) ** 2, batch * options.heads * DIRECTIONS
    scan = _scan_inputs(
        sequences, tokens, options.key_channels, options.value_channels, network.device
    )
    _forward_and_backward(METHODS[CHUNKS], scan)
    chunked, one_by_one, tuned = (
        milliseconds_of(lambda rule=METHODS[way]: _forward_and_backward(rule, scan), device) / 1000
        for way in (CHUNKS, LOOP, TUNED_LOOP)
    )
    blocks = 2 * options.blocks
    return TrainingSpeed(
        name,
        side,
        batch,
        seconds,
        sequences,
        tokens,
        chunked,
        one_by_one,
        tuned,
        seconds + blocks * (one_by_one - chunked),
        seconds + blocks * (tuned - chunked),
    )


def _training_step(network: BokehFlowModel, side: int, batch: int) -> Callable[[], None]:
    network.train().requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    photo, target = torch.rand(2, batch, 3, side, side, generator=generator).to(network.device)
    true_depth = 0.1 + torch.rand(batch, 1, side, side, generator=generator).to(network.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4)

    def step() -> None:
        output = network(photo, *CAMERA)
        loss = (output.bokeh - target).abs().mean()
        loss = loss + structural_similarity_loss(2 * output.bokeh - 1, 2 * target - 1)
        loss = loss + (output.inverse_depth.log() - true_depth.log()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _scan_inputs(
    sequences: int, tokens: int, key_channels: int, value_channels: int, device: torch.device
) -> list[Tensor]:
    """q, k, v, alpha and beta that a block could have."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(sequences, tokens, *shape, generator=generator)

    q, k = (F.normalize(random(key_channels), dim=-1) for _ in range(2))
    gates = (0.9 + 0.1 * torch.sigmoid(random()), torch.sigmoid(random()))
    values = (q, k, random(value_channels), *gates)
    return [value.to(device).requires_grad_() for value in values]


def _forward_and_backward(rule: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    torch.autograd.grad(rule(*inputs).sum(), inputs)


def training_table(rows: Sequence[TrainingSpeed]) -> str:
    """One line for each network, in Markdown."""
    lines = [["network", "batch of", "step, s", "sequences x tokens", "recurrence of a block, s",
              "loop, s", "ratio", "tuned loop, s", "ratio", "step with loops (reckoned), s",
              "with tuned loops, s"]]  # fmt: skip
    for row in rows:
        line = [row.network, f"{row.batch} x {row.side} px", f"{row.step_seconds:.2f}"]
        if row.chunked_seconds is None:
            line += ["-"] * 8
        else:
            line += [f"{row.sequences} x {row.tokens}", f"{row.chunked_seconds:.2f}"]
            for seconds in (row.loop_seconds, row.tuned_loop_seconds):
                assert seconds is not None
                line += [f"{seconds:.2f}", f"{seconds / row.chunked_seconds:.1f}"]
            line += [
                in_words(row.loop_step_seconds, ".0f"),
                in_words(row.tuned_loop_step_seconds, ".0f"),
            ]
        lines.append(line)
    return markdown(lines)

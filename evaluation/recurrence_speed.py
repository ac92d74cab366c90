"""How fast the gated delta rule is in chunks, beside a loop over tokens: ``speed recurrence``.

Four walks over a square grid of tokens with four heads each are 16 sequences. Two loops are the
yardsticks: the reference, which is the equations of the rule as they are published, one token
after the other; and the fastest loop that we could write of the same steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bokehdiff.models.gated_delta_rule import gated_delta_rule, gated_delta_rule_reference
from evaluation.memory import peak_bytes_of

CHUNKS, LOOP, TUNED_LOOP = "chunks", "loop", "tuned loop"
FORWARD, BOTH = "forward", "forward + backward"


@dataclass(frozen=True)
class Case:
    """What is computed.

    Attributes:
        side: of the square grid of tokens.
        sequences: walks times heads.
        channels: of keys and of values.
        device: "cpu" or "cuda".
    """

    side: int
    sequences: int = 16
    channels: int = 24
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        """Of one sequence."""
        return self.side**2


@dataclass(frozen=True)
class RecurrenceSpeed:
    """Time and memory of one method on one grid.

    Attributes:
        side, tokens: of the grid.
        method: "chunks", "loop" or "tuned loop".
        direction: "forward" or "forward + backward".
        milliseconds: of one call, median.
        nanoseconds_per_token: of one token of one sequence.
        bytes_per_token: largest memory of a call on top of its inputs, results included; None
            where it was not measured.
        times_faster: the chunks than this method; None for the chunks, and where there is no loop.
        time_growth: time per token as a multiple of that of the grid before; None for the first.
        memory_growth: the same of the memory.
        error: of the output, and of all gradients, the largest relative to the largest value of
            the loop in float64; None where there is no loop.
    """

    side: int
    tokens: int
    method: str
    direction: str
    milliseconds: float
    nanoseconds_per_token: float
    bytes_per_token: float | None
    times_faster: float | None
    time_growth: float | None
    memory_growth: float | None
    error: float | None


def tuned_loop(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """The outputs of the reference by fewer and cheaper operations.

    Slices are made once, so that the backward pass does not fill a whole tensor for each, and
    products are batched matrix products.
    """
    h = k.new_zeros(k.shape[0], k.shape[2], v.shape[2])
    slices = [x[:, :, None].unbind(1) for x in (q, k, v, alpha[..., None], beta[..., None])]
    outputs = []
    for q_t, k_t, v_t, alpha_t, beta_t in zip(*slices, strict=True):
        h = alpha_t * h
        surprise = beta_t * (v_t - k_t @ h)
        h = h + k_t.transpose(1, 2) * surprise
        outputs.append(q_t @ h)
    return torch.cat(outputs, 1)


METHODS: dict[str, Callable[..., Tensor]] = {
    CHUNKS: lambda *inputs: gated_delta_rule(*inputs)[0],
    LOOP: lambda *inputs: gated_delta_rule_reference(*inputs)[0],
    TUNED_LOOP: tuned_loop,
}


class Walks:
    """The inputs of a case, seeded, and the calls that are measured."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (case.sequences, case.tokens, case.channels)
        q, k, v, out_gradient = (torch.randn(shape, generator=generator) for _ in range(4))
        alpha, beta = (torch.rand(shape[:2], generator=generator) for _ in range(2))
        drawn = (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, 0.9 + 0.1 * alpha, beta)
        self.inputs = [x.to(case.device, dtype).requires_grad_() for x in drawn]
        self.out_gradient = out_gradient.to(case.device, dtype)

    def call(self, method: str, direction: str) -> tuple[Tensor, ...]:
        """The output, and the gradients of all inputs where the direction asks for them."""
        if direction == FORWARD:
            with torch.no_grad():
                return (METHODS[method](*self.inputs),)
        out = METHODS[method](*self.inputs)
        return (out.detach(), *torch.autograd.grad(out, self.inputs, self.out_gradient))


def milliseconds_of(work: Callable[[], object], device: str) -> float:
    """Processor time of one thread, else wall-clock time; a GPU's work is waited for."""
    one_thread = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if one_thread else time.perf_counter
    begin = clock()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return 1000 * (clock() - begin)


def measure(
    sides: Sequence[int], loop_side: int, repeats: int, sequences: int, channels: int, device: str
) -> list[RecurrenceSpeed]:
    """The chunks on every grid, and the loops beside them on one.

    All take turns, so that they meet the same state of the machine; the first round does not
    count. A loop forward and backward takes seconds and has one turn.
    """
    grids = sorted({*sides, loop_side})
    cases = {side: Case(side, sequences, channels, device) for side in grids}
    walks = {side: Walks(case) for side, case in cases.items()}
    calls = [
        (side, method, direction)
        for direction in (FORWARD, BOTH)
        for side in grids
        for method in METHODS
        if method == CHUNKS or side == loop_side
    ]
    measured: dict[tuple[int, str, str], list[float]] = {call: [] for call in calls}
    with tqdm(total=(1 + repeats) * len(calls), unit="call", leave=False, disable=None) as progress:
        for turn in range(1 + repeats):
            for side, method, direction in calls:
                if method == CHUNKS or direction == FORWARD or turn == repeats:
                    work = walks[side]
                    measured[side, method, direction].append(
                        milliseconds_of(lambda: work.call(method, direction), device)  # noqa: B023
                    )
                progress.update()
    median = {call: statistics.median(times[len(times) > 1 :]) for call, times in measured.items()}
    errors = {direction: _error(cases[loop_side], direction) for direction in (FORWARD, BOTH)}

    rows: list[RecurrenceSpeed] = []
    before: dict[str, RecurrenceSpeed] = {}
    for side, method, direction in calls:
        tokens = sequences * side**2
        time_per_token = 1e6 * median[side, method, direction] / tokens
        memory = last = None
        if method == CHUNKS:
            peak = peak_bytes_of(lambda: walks[side].call(CHUNKS, direction), device)  # noqa: B023
            memory = None if peak is None else peak / tokens
            last = before.get(direction)
        row = RecurrenceSpeed(
            side=side,
            tokens=side**2,
            method=method,
            direction=direction,
            milliseconds=median[side, method, direction],
            nanoseconds_per_token=time_per_token,
            bytes_per_token=memory,
            times_faster=None
            if method == CHUNKS
            else median[side, method, direction] / median[side, CHUNKS, direction],
            time_growth=None if last is None else time_per_token / last.nanoseconds_per_token,
            memory_growth=memory / last.bytes_per_token
            if memory and last is not None and last.bytes_per_token
            else None,
            error=errors[direction] if method == CHUNKS and side == loop_side else None,
        )
        if method == CHUNKS:
            before[direction] = row
        rows.append(row)
    return rows


def _error(case: Case, direction: str) -> float:
    """Largest error of the chunks in float32, relative to the largest value in float64."""
    # The tuned loop is the reference in float64 too, and its backward pass takes seconds less.
    truth = Walks(case, torch.float64).call(TUNED_LOOP, direction)
    results = Walks(case).call(CHUNKS, direction)
    return max(
        float((one - other).abs().max() / other.abs().max())
        for one, other in zip(results, truth, strict=True)
    )


def table(rows: Sequence[RecurrenceSpeed]) -> str:
    """The rows for people."""
    lines = [
        f"{'tokens':>9s}  {'method':10s}  {'direction':18s}  {'ms':>9s}  {'ns/token':>8s}  "
        f"{'x chunks':>8s}  {'growth':>6s}  {'B/token':>7s}  {'growth':>6s}  {'error':>7s}"
    ]
    for row in rows:
        lines.append(
            f"{f'{row.side} x {row.side}':>9s}  {row.method:10s}  {row.direction:18s}  "
            f"{row.milliseconds:9.1f}  {row.nanoseconds_per_token:8.0f}  "
            f"{_cell(row.times_faster, '.1f'):>8s}  {_cell(row.time_growth, '.2f'):>6s}  "
            f"{_cell(row.bytes_per_token, '.0f'):>7s}  {_cell(row.memory_growth, '.2f'):>6s}  "
            f"{_cell(row.error, '.0e'):>7s}"
        )
    return "\n".join(lines)


def _cell(value: float | None, shape: str) -> str:
    return "-" if value is None else format(value, shape)


def protocol(sequences: int, channels: int, repeats: int, device: str) -> str:
    """What the columns mean and how they were measured."""
    if device == "cpu" and torch.get_num_threads() == 1:
        clock = "processor time of one thread"
    else:
        clock = "wall-clock time, which other programs disturb"
    return (
        f"gated_delta_rule on {sequences} sequences (walks times heads) of a square grid of tokens,"
        f" {channels} channels of keys and of values, float32. loop: the published equations, token"
        " after token. tuned loop: the fastest loop we could write. ms: one call, "
        f"{clock}; median of {repeats} after one warm-up, all in turns; loops forward + backward "
        "once. ns/token, B/token: time, and memory on top of the inputs, of one token of one "
        "sequence. x chunks: how many times as long as the chunks. growth: ns/token and B/token as "
        "multiples of those of the grid before. error: of output and gradients, against a loop in "
        "float64, relative to the largest value."
    )

"""How fast, how small and how exact PISA is beside ordinary attention: ``speed pisa``.

The yardstick is torch's ``scaled_dot_product_attention`` (SDPA below) of the same q, k and v, in
the same process and in turns with PISA, so that only ratios have to be trusted. Lengths are in
tokens. A *key* token sends light, a *query* token receives it.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bokehdiff.attention import PisaConfig, PisaGeometry, available_backends, pisa_attention
from evaluation.memory import resident_bytes, restart_peak

SDPA = "SDPA"
DENSE_FORMULA = "dense formula"
"""What the authors compute, by our dense reference: all N^2 pairs, made anew in every call."""

FOCUS_DISPARITY = 0.45
DISPARITY_SAMPLES_PER_TOKEN = 3
DENSE_TRUTH_TOKENS = 4096
"""Up to so many tokens (of one image) every output is checked; beyond, a sample of them."""
SAMPLED_RUNS, SAMPLED_RUN_LENGTH = 8, 8
SMALLEST_GRID = 64
PLOT_SUFFIXES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Case:
    """One attention layer on one picture.

    Attributes:
        height, width: the grid, tokens.
        radius: largest circle-of-confusion radius, tokens.
        heads, channels, batch: q, k and v are (batch, heads, height * width, channels).
        logit_std: standard deviation of q k^T / sqrt(channels).
        dtype: name of the torch dtype of q, k and v.
        scene: "slope", or "uniform" for the largest radius everywhere.
        supersampling: rays per pair of tokens.
        backward: time forward and backward together.
        device: "cpu" or "cuda".
        threads: CPU threads.
    """

    height: int
    width: int
    radius: float
    heads: int = 10
    channels: int = 64
    batch: int = 1
    logit_std: float = 1.0
    dtype: str = "float32"
    scene: str = "slope"
    supersampling: int = 2
    backward: bool = False
    device: str = "cpu"
    threads: int = 1

    @property
    def tokens(self) -> int:
        """N, the tokens of one image."""
        return self.height * self.width

    @property
    def samples_errors(self) -> bool:
        """Whether dense float64 tables would be too large to check every output."""
        return self.batch * self.tokens**2 > DENSE_TRUTH_TOKENS**2


@dataclass(frozen=True)
class PisaSpeed:
    """One row: one backend on one :class:`Case`, beside SDPA.

    Attributes:
        tokens, height, width: of the grid; tokens = height * width.
        radius: largest circle-of-confusion radius, tokens.
        radius_share: the same as a share of the width.
        backend: as `pisa_attention` calls it, or "dense formula".
        direction: "forward" or "forward + backward".
        time_ratio: time of one call as a multiple of SDPA's.
        milliseconds, sdpa_milliseconds: medians.
        geometry_ratio: time to build the geometry and its tables, as a multiple of one forward;
            None where `milliseconds` includes it.
        geometry_megabytes: memory (10^6 bytes) that the geometry and its tables keep; None where
            the system cannot tell it from that of a call.
        peak_megabytes: largest memory of one call on top of the inputs and the geometry.
        peak_ratio: the same as a multiple of SDPA's; None where SDPA's is too small to measure.
        sdpa_extrapolated: SDPA was measured on fewer tokens and scaled, time by N^2, memory by N.
        error: largest error of the output against float64, relative to its largest value.
        gradient_error: the same for the gradients of q, k and v, the worst; None for forward.
        error_sampled: the errors come from 64 tokens, not from all.
    """

    tokens: int
    height: int
    width: int
    radius: float
    radius_share: float
    backend: str
    direction: str
    time_ratio: float
    milliseconds: float
    sdpa_milliseconds: float
    geometry_ratio: float | None
    geometry_megabytes: float | None
    peak_megabytes: float
    peak_ratio: float | None
    sdpa_extrapolated: bool
    error: float
    gradient_error: float | None
    error_sampled: bool


# -- what is measured ------------------------------------------------------------------------------


def scene_maps(case: Case) -> tuple[Tensor, Tensor]:
    """Radius (B, 1, h, w) in tokens, and disparity (B, 1, 3 h, 3 w) in [0, 1), larger is nearer.

    A background that slopes towards the viewer, and five near discs; each image has its own.
    """
    rows = DISPARITY_SAMPLES_PER_TOKEN * case.height
    columns = DISPARITY_SAMPLES_PER_TOKEN * case.width
    y = torch.linspace(0, 1, rows)[:, None]
    x = torch.linspace(0, 1, columns) * (columns / rows)
    images = []
    for image in range(case.batch):
        generator = torch.Generator().manual_seed(image)
        disparity = (0.1 + 0.3 * y).repeat(1, columns)
        for place_y, place_x, size, nearness in torch.rand(5, 4, generator=generator).tolist():
            squared_distance = (y - place_y) ** 2 + (x - place_x * columns / rows) ** 2
            disparity[squared_distance < (0.05 + 0.1 * size) ** 2] = 0.5 + 0.45 * nearness
        images.append(disparity)
    disparity = torch.stack(images)[:, None]

    at_tokens = F.interpolate(disparity, size=(case.height, case.width), mode="bilinear")
    defocus = (at_tokens - FOCUS_DISPARITY).abs()
    if case.scene == "uniform":
        defocus = torch.ones_like(defocus)
    radius = defocus * (case.radius / defocus.max())
    return radius.to(case.device), disparity.to(case.device)


def build_geometry(case: Case, maps: tuple[Tensor, Tensor]) -> PisaGeometry:
    """The geometry of a case; its tables are made in the first call that needs them."""
    return PisaGeometry.build(*maps, config=PisaConfig(supersampling=case.supersampling))


def layer_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of the output: seeded, normal, (B, H, N, d)."""
    generator = torch.Generator(case.device).manual_seed(0)
    shape = (case.batch, case.heads, case.tokens, case.channels)
    dtype = getattr(torch, case.dtype)
    # Drawn in the final precision: a copy would raise the peak of memory that is measured later.
    tensors = [
        torch.empty(shape, dtype=dtype, device=case.device).normal_(generator=generator)
        for _ in range(4)
    ]
    tensors[0] *= case.logit_std
    for tensor in tensors[:3]:
        tensor.requires_grad_(case.backward)
    return tuple(tensors)


class Layer:
    """The inputs of a case, and the calls that are measured."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.q, self.k, self.v, self.out_gradient = layer_inputs(case)
        self.maps = scene_maps(case)

    def build_geometry(self) -> PisaGeometry:
        """A new geometry of the case."""
        return build_geometry(self.case, self.maps)

    def forward(self, backend: str, geometry: PisaGeometry | None = None) -> Tensor:
        """The output (B, H, N, d) of SDPA or a backend; builds the geometry if there is none."""
        if backend == SDPA:
            return F.scaled_dot_product_attention(self.q, self.k, self.v)
        geometry = geometry or self.build_geometry()
        name = "reference" if backend == DENSE_FORMULA else backend
        return pisa_attention(self.q, self.k, self.v, geometry, backend=name)

    def call(self, backend: str, geometry: PisaGeometry | None = None) -> tuple[Tensor, ...]:
        """The output, and the gradients of q, k and v where the case asks for them."""
        out = self.forward(backend, geometry)
        if not self.case.backward:
            return (out,)
        gradients = torch.autograd.grad(out, (self.q, self.k, self.v), self.out_gradient)
        return (out.detach(), *gradients)


# -- time ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Milliseconds: one call, one forward, and a forward that also builds its geometry."""

    call: float
    forward: float
    first_forward: float


def milliseconds_of(work: Callable[[], Any], case: Case) -> float:
    """Time of one call: the GPU's, or the processor's for one thread, or else wall-clock time."""
    if case.device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(case.device)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(case.device)
        return start.elapsed_time(end)
    clock = time.process_time if case.threads == 1 else time.perf_counter
    begin = clock()
    work()
    return 1000 * (clock() - begin)


def clock_in_words(case: Case) -> str:
    """What `milliseconds_of` reads."""
    if case.device == "cuda":
        return "GPU time between two events"
    if case.threads == 1:
        return "processor time of one thread, which other programs hardly disturb"
    return f"wall-clock time of {case.threads} threads, which other programs disturb"


def time_backend(layer: Layer, backend: str, geometry: PisaGeometry) -> Times:
    """One measurement of a backend; `geometry` has been used before, so that its tables exist."""
    case = layer.case
    if backend == DENSE_FORMULA:
        call = milliseconds_of(lambda: layer.call(backend), case)
        return Times(call, forward=call, first_forward=call)
    with torch.no_grad():
        first_forward = milliseconds_of(lambda: layer.forward(backend), case)
        forward = milliseconds_of(lambda: layer.forward(backend, geometry), case)
    call = forward
    if case.backward:
        call = milliseconds_of(lambda: layer.call(backend, geometry), case)
    return Times(call, forward, first_forward)


def time_in_turns(
    layer: Layer,
    sdpa_layer: Layer,
    backends: Sequence[str],
    repeats: int,
    after_round: Callable[[], Any],
) -> tuple[float, dict[str, Times]]:
    """Medians: milliseconds of SDPA, and the times of each backend.

    SDPA and every backend take turns, so that all meet the same state of the machine. The first
    round warms up and does not count.
    """
    sdpa: list[float] = []
    measured: dict[str, list[Times]] = {backend: [] for backend in backends}
    geometries = {backend: layer.build_geometry() for backend in backends}
    for _ in range(1 + repeats):
        sdpa.append(milliseconds_of(lambda: sdpa_layer.call(SDPA), layer.case))
        for backend in backends:
            measured[backend].append(time_backend(layer, backend, geometries[backend]))
        after_round()
    medians = {
        backend: Times(
            *(statistics.median(values) for values in zip(*map(astuple, times[1:]), strict=True))
        )
        for backend, times in measured.items()
    }
    return statistics.median(sdpa[1:]), medians


# -- memory ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Megabytes (10^6 bytes): what a geometry keeps, and the peak of a call on top of that.

    `geometry` is None where the two cannot be told apart; then `call` is the sum.
    """

    geometry: float | None
    call: float


def memory_of_calls(case: Case, backend: str) -> Memory:
    """What a backend needs on top of libraries and inputs.

    On the CPU this is right only in a process that has done nothing else; see `memory_needed`.
    """
    torch.set_num_threads(case.threads)
    # A tiny call first, so that what libraries load when they are first used is not counted.
    Layer(replace(case, height=8, width=8, radius=min(case.radius, 1.0))).call(backend)
    layer = Layer(case)
    geometry = None if backend in (SDPA, DENSE_FORMULA) else layer.build_geometry()
    if case.device == "cuda":
        before = torch.cuda.memory_allocated(case.device)
        layer.call(backend, geometry)
        torch.cuda.synchronize(case.device)
        with_geometry = torch.cuda.memory_allocated(case.device)
        torch.cuda.reset_peak_memory_stats(case.device)
        layer.call(backend, geometry)
        torch.cuda.synchronize(case.device)
        peak = torch.cuda.max_memory_allocated(case.device)
        return Memory((with_geometry - before) / 1e6, (peak - with_geometry) / 1e6)
    if not restart_peak():
        before = resident_bytes(peak=True)
        layer.call(backend, geometry)
        return Memory(None, (resident_bytes(peak=True) - before) / 1e6)
    before = resident_bytes(peak=False)
    layer.call(backend, geometry)
    with_geometry = resident_bytes(peak=False)
    restart_peak()
    layer.call(backend, geometry)
    peak = resident_bytes(peak=True)
    # The kernel counts in batches, so that nothing at all may read as a little less than nothing.
    return Memory(max(0, with_geometry - before) / 1e6, max(0, peak - with_geometry) / 1e6)


@functools.cache
def memory_needed(case: Case, backend: str) -> Memory:
    """`memory_of_calls` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(memory_of_calls, case, backend).result()
        except BrokenProcessPool as problem:
            raise ValueError(
                f"The process that measures the memory of {backend} at {case.tokens} tokens was "
                "ended, most likely for want of memory; take fewer --tokens or --heads."
            ) from problem


def free_bytes(device: str) -> int:
    """Memory that a program could still take, on the GPU or in the machine."""
    if device == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    information = Path("/proc/meminfo")
    if information.is_file():
        return int(re.search(r"MemAvailable:\s+(\d+) kB", information.read_text())[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_dense_tables_fit(case: Case, backend: str) -> None:
    """Raises ValueError when the N^2 tables of the dense backend exceed the free memory."""
    # Measured: somewhat less than three for each head, the rest for mask and visibility.
    tables = case.batch * (3 * case.heads + (8 if case.backward else 5))
    wanted, free = tables * case.tokens**2 * 4, free_bytes(case.device)
    if wanted > free:
        raise ValueError(
            f"{backend} at {case.tokens} tokens and {case.heads} heads would make dense tables of "
            f"about {wanted / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free; take fewer --tokens "
            f"or --heads, or leave {backend} out."
        )


# -- exactness -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExactPiece:
    """Float64 truth of some tokens of one head.

    Attributes:
        image: index into the batch, or all of it.
        head: index.
        tokens: (T,) token numbers, or all.
        values: output and, where asked for, gradients of q, k and v, each (T, d), or (B, N, d).
    """

    image: int | slice
    head: int
    tokens: Tensor | slice
    values: tuple[Tensor, ...]


def exact_head(layer: Layer, geometry: PisaGeometry, head: int) -> ExactPiece:
    """All tokens of one head by the dense reference; memory grows with N^2."""
    q, k, v, out_gradient = (
        tensor[:, head : head + 1].detach().double()
        for tensor in (layer.q, layer.k, layer.v, layer.out_gradient)
    )
    inputs = tuple(tensor.requires_grad_(layer.case.backward) for tensor in (q, k, v))
    out = pisa_attention(*inputs, geometry, backend="reference")
    gradients = torch.autograd.grad(out, inputs, out_gradient) if layer.case.backward else ()
    values = tuple(value.detach()[:, 0] for value in (out, *gradients))
    return ExactPiece(slice(None), head, slice(None), values)


def exact_tokens(
    layer: Layer, geometry: PisaGeometry, image: int, head: int, tokens: Tensor
) -> ExactPiece:
    """Some tokens of one head from plain float64 formulas, without a table of all N^2 pairs.

    Of the whole attention, only the keys whose light reaches `tokens` and all queries that these
    keys reach are worked out. That is enough for the output and the gradients of `tokens`: every
    key that matters is there, and the softmax over the queries of each is complete.

    Args:
        layer: q, k, v.
        geometry: of the layer's case.
        image, head: indices.
        tokens: (T,) token numbers, ascending; neighbours share most of the work.
    """
    case, first = layer.case, image * layer.case.tokens
    everyone = torch.arange(case.tokens, device=tokens.device)
    reaches = geometry.log_mask_of_pairs(
        first + everyone, first + tokens[:, None], torch.float64
    ).isfinite()
    key = everyone[reaches.any(0)]

    # No light of these keys leaves this rectangle.
    reach = (geometry.radius[image, key].max().item() + geometry.margin) / min(geometry.spacing)
    rows, columns = (
        torch.arange(
            max(int(place.min() - reach), 0),
            min(int(place.max() + reach) + 1, size),
            device=tokens.device,
        )
        for place, size in ((key // case.width, case.height), (key % case.width, case.width))
    )
    query = (rows[:, None] * case.width + columns).flatten()
    is_token = torch.isin(query, tokens)

    q, k, v = (
        tensor.detach()[image, head, of].double().requires_grad_(case.backward)
        for tensor, of in ((layer.q, query), (layer.k, key), (layer.v, key))
    )
    log_mask = geometry.log_mask_of_pairs(first + key, first + query[:, None], torch.float64)
    weights = torch.softmax(q @ k.T / math.sqrt(case.channels) + log_mask, dim=0)
    if not case.backward:
        # Rays are slow; the output needs those to `tokens` only.
        query, weights, log_mask = query[is_token], weights[is_token], log_mask[is_token]
    rays = geometry.visible_rays_of_pairs(
        first + key, first + query[:, None], wanted=log_mask.isfinite()
    )
    out = (weights * geometry.visible_share(rays)) @ v
    if not case.backward:
        return ExactPiece(image, head, tokens, (out,))
    out_gradient = layer.out_gradient[image, head, query].double()
    of_q, of_k, of_v = torch.autograd.grad(out, (q, k, v), out_gradient)
    is_key = torch.isin(key, tokens)
    values = (out.detach()[is_token], of_q[is_token], of_k[is_key], of_v[is_key])
    return ExactPiece(image, head, tokens, values)


def sampled_truth(layer: Layer) -> list[ExactPiece]:
    """Eight runs of eight neighbouring tokens, drawn from all images, heads and places."""
    case, geometry = layer.case, layer.build_geometry()
    generator = torch.Generator().manual_seed(0)
    pieces = []
    for _ in range(SAMPLED_RUNS):
        image, head, start = (
            int(torch.randint(size, (), generator=generator))
            for size in (case.batch, case.heads, case.tokens - SAMPLED_RUN_LENGTH + 1)
        )
        tokens = torch.arange(start, start + SAMPLED_RUN_LENGTH, device=case.device)
        pieces.append(exact_tokens(layer, geometry, image, head, tokens))
    return pieces


def float64_truth(layer: Layer) -> list[ExactPiece]:
    """The truth of all tokens where a dense table can be made, else of a sample."""
    if layer.case.samples_errors:
        return sampled_truth(layer)
    geometry = layer.build_geometry()
    return [exact_head(layer, geometry, head) for head in range(layer.case.heads)]


def largest_errors(results: Sequence[Tensor], truth: Sequence[ExactPiece]) -> list[float]:
    """Largest deviation of each result (B, H, N, d), relative to the largest value of its truth."""
    errors = []
    for index, result in enumerate(results):
        wrong, size = [], []
        for piece in truth:
            exact = piece.values[index]
            found = result[piece.image, piece.head][..., piece.tokens, :].double()
            wrong.append((found - exact).abs().max())
            size.append(exact.abs().max())
        errors.append(float(torch.stack(wrong).max() / torch.stack(size).max()))
    return errors


# -- the measurement -------------------------------------------------------------------------------


def measure_case(
    case: Case,
    backends: Sequence[str],
    repeats: int,
    sdpa_limit: int | None,
    after_step: Callable[[], Any],
) -> list[PisaSpeed]:
    """One row for each backend; `after_step` is called `steps_of_case` times."""
    # Grid and blur are nothing to SDPA, and one measurement of its memory serves them all.
    sdpa_tokens = min(case.tokens, sdpa_limit or case.tokens)
    sdpa_case = replace(case, height=1, width=sdpa_tokens, radius=0.0)
    growth = case.tokens / sdpa_tokens
    layer = Layer(case)
    truth = float64_truth(layer)
    after_step()
    errors = {name: largest_errors(layer.call(name), truth) for name in backends}
    after_step()
    sdpa_milliseconds, times = time_in_turns(layer, Layer(sdpa_case), backends, repeats, after_step)
    sdpa_milliseconds *= growth**2
    del layer, truth
    sdpa_megabytes = memory_needed(sdpa_case, SDPA).call * growth
    after_step()
    rows = []
    for name in backends:
        spent = times[name]
        memory = memory_needed(case, name)
        after_step()
        building = max(0.0, spent.first_forward - spent.forward)
        rows.append(
            PisaSpeed(
                tokens=case.tokens,
                height=case.height,
                width=case.width,
                radius=case.radius,
                radius_share=case.radius / case.width,
                backend=name,
                direction="forward + backward" if case.backward else "forward",
                time_ratio=spent.call / sdpa_milliseconds,
                milliseconds=spent.call,
                sdpa_milliseconds=sdpa_milliseconds,
                geometry_ratio=None if name == DENSE_FORMULA else building / spent.forward,
                geometry_megabytes=memory.geometry,
                peak_megabytes=memory.call,
                peak_ratio=memory.call / sdpa_megabytes if sdpa_megabytes else None,
                sdpa_extrapolated=growth > 1,
                error=errors[name][0],
                gradient_error=float(np.max(errors[name][1:])) if case.backward else None,
                error_sampled=case.samples_errors,
            )
        )
    return rows


def steps_of_case(backends: Sequence[str], repeats: int) -> int:
    """How often `measure_case` reports progress."""
    return 2 + (1 + repeats) + (1 + len(backends))


def measure(
    cases: Sequence[Case],
    backends: Sequence[Sequence[str]],
    repeats: int,
    sdpa_limit: int | None,
) -> list[PisaSpeed]:
    """The rows of every case, each with its own backends."""
    total = sum(steps_of_case(names, repeats) for names in backends)
    rows = []
    with tqdm(
        total=total, unit="step", desc="speed pisa", leave=False, disable=None, delay=2
    ) as progress:
        for case, names in zip(cases, backends, strict=True):
            progress.set_postfix_str(f"{case.tokens} tokens, radius {case.radius:g}")
            rows += measure_case(case, names, repeats, sdpa_limit, progress.update)
    return rows


# -- what the user asks for ------------------------------------------------------------------------


def check_device(device: str) -> None:
    """Raises ValueError for a device whose clock and memory are not read here."""
    if device not in ("cpu", "cuda"):
        raise ValueError(
            f"--device must be cpu or cuda here, got {device}; "
            "CUDA_VISIBLE_DEVICES chooses among GPUs."
        )


def numbers(text: str, option: str, kind: type = float) -> list[Any]:
    """The numbers of a list "a,b,c", all finite. Raises ValueError with the option's name."""
    try:
        values = [kind(word) for word in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        wanted = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{option} takes {wanted} with commas between them, got {text!r}.")
    return values


def grids(arguments: argparse.Namespace) -> list[tuple[int, int]]:
    """Height and width of every grid, from --tokens or --grid."""
    if arguments.grid:
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", arguments.grid)
        if not found:
            raise ValueError(f"--grid takes HEIGHTxWIDTH, e.g. 48x96, got {arguments.grid!r}.")
        sizes = [(int(found[1]), int(found[2]))]
    else:
        counts = numbers(arguments.tokens, "--tokens", int)
        for count in counts:
            if count < 1 or math.isqrt(count) ** 2 != count:
                raise ValueError(
                    f"--tokens takes square numbers, e.g. 4096, got {count}; "
                    "for other grids there is --grid HEIGHTxWIDTH."
                )
        sizes = [(math.isqrt(count), math.isqrt(count)) for count in counts]
    for height, width in sizes:
        if height * width < SMALLEST_GRID:
            raise ValueError(
                f"{height} x {width} tokens are too few to measure; "
                f"take at least {SMALLEST_GRID} tokens."
            )
    return sizes


def cases(arguments: argparse.Namespace) -> list[Case]:
    """A case for every grid and radius. Raises ValueError for numbers that cannot be."""
    for option in ("heads", "channels", "batch", "repeats", "threads", "sdpa_limit"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} must be at least 1, got {value}.")
    if not 1 <= arguments.supersampling <= 255:
        raise ValueError(f"--supersampling must be 1 to 255, got {arguments.supersampling}.")
    if not 0 < arguments.logit_std < math.inf:
        raise ValueError(f"--logit-std must be positive, got {arguments.logit_std:g}.")
    check_device(arguments.device)
    option = "--radius" if arguments.radius else "--radius-share"
    blurs = numbers(arguments.radius or arguments.radius_share, option)
    for blur in blurs:
        if blur < 0:
            raise ValueError(f"{option} must be at least 0, got {blur:g}.")
    return [
        Case(
            height=height,
            width=width,
            radius=blur if arguments.radius else blur * width,
            heads=arguments.heads,
            channels=arguments.channels,
            batch=arguments.batch,
            logit_std=arguments.logit_std,
            dtype=arguments.dtype,
            scene=arguments.scene,
            supersampling=arguments.supersampling,
            backward=arguments.backward,
            device=arguments.device,
            threads=arguments.threads,
        )
        for height, width in grids(arguments)
        for blur in blurs
    ]


def reasons_against(case: Case) -> dict[str, str | None]:
    """Every backend, and why it cannot run this case; None where it can."""
    shape = (case.batch, case.heads, case.tokens, case.channels)
    q = torch.empty((), dtype=getattr(torch, case.dtype), device=case.device).expand(shape)
    return available_backends(build_geometry(case, scene_maps(case)), q)


def choose_backends(
    case: Case, asked: Sequence[str], official: bool
) -> tuple[list[str], dict[str, str]]:
    """The backends to measure, and why others are left out.

    Raises ValueError for a backend that was asked for and does not exist, cannot run here, or
    would not fit into memory.
    """
    reasons = reasons_against(case)
    for name in asked:
        if name not in reasons:
            raise ValueError(f"There is no backend {name!r}; choose from {', '.join(reasons)}.")
        if reasons[name]:
            raise ValueError(
                f"--backend {name} cannot run {case.tokens} tokens here: {reasons[name]}"
            )
    left_out = {}
    chosen = list(dict.fromkeys(asked))
    if not chosen:
        left_out = {name: reason for name, reason in reasons.items() if reason}
        left_out["reference"] = "it is dense; ask for it with --backend reference."
        chosen = [name for name in reasons if name not in left_out]
    if official:
        chosen.append(DENSE_FORMULA)
    for name in ("reference", DENSE_FORMULA):
        if name in chosen:
            check_dense_tables_fit(case, name)
    return chosen, left_out


# -- what the user sees ----------------------------------------------------------------------------


def table(rows: Sequence[PisaSpeed]) -> str:
    """The rows for people; `~` marks what rests on an extrapolated SDPA, `*` sampled errors."""
    backward = any(row.gradient_error is not None for row in rows)
    headings = ["tokens", "grid", "largest radius", "backend", "direction", "time/SDPA", "ms"]
    headings += ["SDPA ms", "geometry/forward", "MB kept", "peak MB", "peak/SDPA", "error"]
    headings += ["gradient error"] if backward else []
    lines = [headings]
    for row in rows:
        about = "~" if row.sdpa_extrapolated else ""
        sampled = "*" if row.error_sampled else ""
        lines.append(
            [
                str(row.tokens),
                f"{row.height} x {row.width}",
                f"{row.radius:.3g} ({row.radius_share:.1%})",
                row.backend,
                row.direction,
                f"{about}{row.time_ratio:.3f}",
                f"{row.milliseconds:.1f}",
                f"{about}{row.sdpa_milliseconds:.1f}",
                "included" if row.geometry_ratio is None else f"{row.geometry_ratio:.2f}",
                "-" if row.geometry_megabytes is None else f"{row.geometry_megabytes:.1f}",
                f"{row.peak_megabytes:.1f}",
                "-" if row.peak_ratio is None else f"{about}{row.peak_ratio:.2f}",
                f"{row.error:.1e}{sampled}",
                *([f"{row.gradient_error:.1e}{sampled}"] if backward else []),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def protocol(case: Case, repeats: int, rows: Sequence[PisaSpeed]) -> str:
    """What the columns mean and how they were measured."""
    sentences = [
        f"Scene {case.scene}, {case.supersampling} ray(s) per pair; batch {case.batch}, "
        f"{case.heads} heads of {case.channels} channels, {case.dtype}, standard deviation of the "
        f"logits {case.logit_std:g}.",
        f"Time: {clock_in_words(case)}; median of {repeats} turns after one warm-up, beside "
        "scaled_dot_product_attention (SDPA) of the same q, k, v in the same process.",
        "geometry/forward: time to build the geometry and its tables, once per picture and grid, "
        "as a multiple of one layer's forward.",
        "MB kept: memory of the geometry and its tables; peak MB: of one call on top of that, "
        + (
            "as torch allocates it on the GPU."
            if case.device == "cuda"
            else "growth of the resident memory of a fresh process."
        ),
        "Error: largest deviation from float64, relative to the largest value.",
    ]
    if any(row.error_sampled for row in rows):
        sentences.append(
            f"* error of {SAMPLED_RUNS * SAMPLED_RUN_LENGTH} sampled tokens, not of all."
        )
    if any(row.sdpa_extrapolated for row in rows):
        sentences.append(
            "~ extrapolated: SDPA was measured on --sdpa-limit tokens and scaled, "
            "its time by tokens^2, its peak by tokens."
        )
    if any(row.backend == DENSE_FORMULA for row in rows):
        sentences.append(
            f"{DENSE_FORMULA}: all N^2 scores, masks and rays, made anew in every call."
        )
    return "\n".join(sentences)


def as_json(rows: Sequence[PisaSpeed]) -> list[dict[str, Any]]:
    """The rows as plain values; JSON has no NaN, so such an error becomes None."""
    return [
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(row).items()
        }
        for row in rows
    ]


def plot(rows: Sequence[PisaSpeed], file: str | Path, in_tokens: bool) -> None:
    """Draws time / SDPA against tokens, a line for each backend and blur.

    Args:
        rows: all of one direction.
        file: picture to write; its suffix is one of `PLOT_SUFFIXES`.
        in_tokens: a line joins equal radii in tokens, not equal shares of the width.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    lines: dict[str, list[PisaSpeed]] = {}
    for row in rows:
        radius = f"{row.radius:.3g} tokens" if in_tokens else f"{row.radius_share:.1%} of the width"
        lines.setdefault(f"{row.backend}, radius {radius}", []).append(row)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens", ylabel=f"time / SDPA, {rows[0].direction}")
    for label, members in lines.items():
        members = sorted(members, key=lambda row: row.tokens)
        axes.loglog(
            [row.tokens for row in members],
            [row.time_ratio for row in members],
            marker="o",
            label=label,
        )
    axes.axhline(1, color="black", linewidth=0.8, linestyle="dashed", label="SDPA")
    ratios = [1.0, *(row.time_ratio for row in rows)]
    axes.set_ylim(min(ratios) / 2, max(ratios) * 2)
    counts = sorted({row.tokens for row in rows})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)

"""How long each stage of the pipeline takes, with networks of the shapes of Stable Diffusion XL.

Weights are random, made on the device that is measured: what there is to compute is that of the
published networks, and nothing is downloaded. The yardstick is one call of the same UNet without
physics-inspired self-attention (PISA), in the same process and in turns with it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm

from bokehdiff import BokehDiffPipeline
from bokehdiff.attention import pisa_attention
from bokehdiff.attention.processor import pisa_layer_names
from bokehdiff.images import crop_to, pad_to_multiple
from bokehdiff.models import StoredPrompt
from bokehdiff.optics import signed_defocus
from bokehdiff.pipelines.bokehdiff import BokehScene
from bokehdiff.pipelines.detail import put_back_detail
from bokehdiff.pipelines.picture_output import pictures_as
from evaluation.memory import resident_bytes, restart_peak
from evaluation.pisa_speed import DENSE_FORMULA, Case, check_dense_tables_fit
from training.speed import SDXL_UNET, SDXL_VAE

TINY_UNET: dict[str, Any] = {
    **SDXL_UNET,
    "block_out_channels": (16, 32, 32),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 2, 1),
    "attention_head_dim": (2, 4, 4),
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
}
TINY_VAE: dict[str, Any] = {
    **SDXL_VAE,
    "block_out_channels": (8, 8, 8, 8),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
SHAPES = {"sdxl": (SDXL_UNET, SDXL_VAE), "tiny": (TINY_UNET, TINY_VAE)}
"""UNet and VAE by name; ``tiny`` has the blocks of SDXL with few channels, for rehearsals."""

FOCUS_DISPARITY = 0.3
WARM_UPS = 2
SWEEP = 8
"""Blur strengths that ``refocus_speed`` renders at once."""

STAGES = {
    "encode": "encode",
    "unet": "UNet, with geometry and PISA",
    "geometry": "of it, geometry of PISA",
    "pisa": "of it, PISA in all its layers",
    "decode": "decode",
    "detail": "put detail back",
    "output": "output to PIL",
    "rest": "rest of a refocus: checks, prompt, closed form",
    "refocus": "refocus: render",
    "first": "first picture: prepare and render",
    "stock_unet": "stock UNet",
    "dense_unet": "UNet, with the dense formula",
}
"""What is timed, and how the table calls it."""


# -- what is measured ------------------------------------------------------------------------------


def random_pipeline(shapes: str, device: str, dtype: torch.dtype) -> BokehDiffPipeline:
    """The pipeline with random weights, made on the device, and a prompt of zeros.

    Args:
        shapes: name in `SHAPES`.
        device: "cpu" or "cuda"; "meta" makes no weights at all.
        dtype: of UNet, VAE and prompt.
    """
    unet, vae = SHAPES[shapes]
    torch.manual_seed(0)
    with torch.device(device):
        parts = {
            "unet": UNet2DConditionModel(**unet),
            "vae": AutoencoderKL(**vae),
            "stored_prompt": StoredPrompt(
                embedding_channels=unet["cross_attention_dim"],
                pooled_channels=unet["projection_class_embeddings_input_dim"]
                - 6 * unet["addition_time_embed_dim"],
            ),
        }
    for part in parts.values():
        # Not their own `to`, which warns of modules that stay in float32 even if there are none.
        nn.Module.to(part, dtype).eval().requires_grad_(False)
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
    )
    pipe = BokehDiffPipeline(scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def without_pisa(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A stock UNet that shares the weights."""
    with torch.device("meta"):
        stock = UNet2DConditionModel.from_config(unet.config)
    stock.load_state_dict(unet.state_dict(), assign=True)
    return stock.eval().requires_grad_(False)


def photograph(height: int, width: int) -> tuple[Tensor, Tensor]:
    """A photo (1, 3, H, W) in [0, 1] and its disparity (1, 1, H, W) in [0, 1], larger is nearer.

    Noise over a ground that slopes towards the viewer, with three near discs.
    """
    generator = torch.Generator().manual_seed(0)
    photo = torch.rand(1, 3, height, width, generator=generator)
    y = torch.linspace(0, 1, height)[:, None]
    x = torch.linspace(0, width / height, width)
    disparity = (0.1 + 0.4 * y).repeat(1, width)
    for row, share_of_width, nearness in ((0.3, 0.25, 0.6), (0.5, 0.5, 0.75), (0.7, 0.8, 0.9)):
        inside = (y - row) ** 2 + (x - share_of_width * width / height) ** 2 < 0.12**2
        disparity[inside] = nearness
    return photo, disparity[None, None]


@dataclass(frozen=True)
class LayerShape:
    """Self-attention of one layer: q, k and v are (batch, heads, tokens, channels)."""

    heads: int
    tokens: int
    channels: int


def pisa_layer_shapes(
    unet: nn.Module, layers: Sequence[str], call: Callable[[], Any]
) -> list[LayerShape]:
    """The shapes that the self-attentions named by `layers` see while `call` runs the UNet."""
    shapes = []

    def look(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        channels = layer.to_q.out_features // layer.heads
        shapes.append(LayerShape(layer.heads, inputs[0].shape[1], channels))

    names = pisa_layer_names(unet, layers)
    hooks = [unet.get_submodule(name).register_forward_pre_hook(look) for name in names]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


class Photographed:
    """One photo in the pipeline, and each stage of its way as a call that can be timed.

    Args:
        pipe: the pipeline.
        height, width: of the photo, pixels.
        radius: of its largest circle of confusion, pixels.
    """

    def __init__(self, pipe: BokehDiffPipeline, height: int, width: int, radius: float) -> None:
        self.pipe = pipe
        device = pipe.device
        self.photo, self.disparity = photograph(height, width)
        self.K = radius / float((self.disparity - FOCUS_DISPARITY).abs().max())
        self.context = pipe.verify_pisa()
        self.scene = pipe.prepare(self.photo, self.disparity)
        self.rendered = pipe.render(self.scene, FOCUS_DISPARITY, self.K, output_type="pt").images
        self.padded_photo, _ = pad_to_multiple(self.scene.image, pipe.image_multiple)
        self.padded_disparity, _ = pad_to_multiple(self.scene.disparity, pipe.image_multiple)
        focus, strength = (torch.tensor([n], device=device) for n in (FOCUS_DISPARITY, self.K))
        self.defocus = signed_defocus(self.padded_disparity, focus, strength)
        prompt, pooled = pipe.bokeh_prompt(1, device)
        size = [float(side) for side in self.padded_photo.shape[-2:]]
        self.unet_inputs: dict[str, Any] = {
            "sample": self.scene.latents.to(pipe.unet.dtype),
            "timestep": torch.full((1,), pipe.config.timestep, device=device),
            "encoder_hidden_states": prompt,
            "added_cond_kwargs": {
                "text_embeds": pooled,
                "time_ids": torch.tensor([(*size, 0, 0, *size)], device=device),
            },
        }
        self.layers = pisa_layer_shapes(pipe.unet, pipe.pisa_layer_names, self.unet)
        layer = self.layers[0]
        generator = torch.Generator(device).manual_seed(0)
        self.qkv = torch.randn(
            (3, 1, layer.heads, layer.tokens, layer.channels), generator=generator, device=device
        ).to(pipe.unet.dtype)
        self.set_scene()
        self.geometry = self.context.geometry_for(layer.tokens)
        self.context.clear()

    def set_scene(self) -> None:
        latent_size = self.scene.latents.shape[-2:]
        self.context.set_scene(
            self.padded_disparity, self.defocus.abs(), *latent_size, self.pipe.vae_scale_factor
        )

    def encode(self) -> Tensor:
        return self.pipe.encode_latents(2 * self.padded_photo - 1)

    def unet(self) -> Tensor:
        """As the pipeline calls it: the scene is told, and its geometry made, in every call."""
        self.set_scene()
        try:
            return self.pipe.unet(**self.unet_inputs, return_dict=False)[0]
        finally:
            self.context.clear()

    def dense_unet(self) -> Tensor:
        """The same by the dense formula: all pairs of tokens, and the rays of all of them."""
        usual, self.context.backend = self.context.backend, "reference"
        try:
            return self.unet()
        finally:
            self.context.backend = usual

    def one_pisa_layer(self) -> Tensor:
        """PISA of one layer, on a geometry that has been used before."""
        return pisa_attention(*self.qkv, self.geometry, backend=self.context.backend)

    def first_pisa_layer(self) -> Tensor:
        """PISA of one layer, with the making of its geometry."""
        self.set_scene()
        geometry = self.context.geometry_for(self.layers[0].tokens)
        self.context.clear()
        return pisa_attention(*self.qkv, geometry, backend=self.context.backend)

    def decode(self) -> Tensor:
        return self.pipe.decode_latents(self.scene.latents)

    def detail(self) -> Tensor:
        defocus = crop_to(self.defocus, self.scene.size)
        return put_back_detail(self.rendered, self.scene.image, self.scene.codec_image, defocus)

    def output(self) -> Any:
        return pictures_as(self.rendered, "pil")

    def first(self) -> Any:
        return self.pipe(self.photo, self.disparity, FOCUS_DISPARITY, self.K)

    def refocus(self) -> Any:
        return self.pipe.render(self.scene, FOCUS_DISPARITY, self.K)


# -- time and memory -------------------------------------------------------------------------------


def milliseconds_of(work: Callable[[], Any], device: str) -> float:
    """Time between two events of the GPU; else of one thread's processor, or of the clock."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    work()
    return 1000 * (clock() - begin)


def clock_in_words(device: str) -> str:
    """What `milliseconds_of` reads."""
    if device == "cuda":
        return "time between two events of the GPU"
    if torch.get_num_threads() == 1:
        return "processor time of one thread, which other programs hardly disturb"
    return f"wall-clock time of {torch.get_num_threads()} threads, which other programs disturb"


@torch.no_grad()
def time_in_turns(
    works: dict[str, Callable[[], Any]], repeats: int, device: str, words: str
) -> dict[str, float]:
    """Median milliseconds of each; they take turns, so that all meet the same state of the machine.

    The first `WARM_UPS` rounds do not count.
    """
    spent: dict[str, list[float]] = {name: [] for name in works}
    rounds = WARM_UPS + repeats
    with tqdm(total=rounds, unit="round", desc=words, leave=False, disable=None, delay=2) as bar:
        for _ in range(rounds):
            for name, work in works.items():
                spent[name].append(milliseconds_of(work, device))
            bar.update()
    return {name: statistics.median(times[WARM_UPS:]) for name, times in spent.items()}


def peak_megabytes_of(work: Callable[[], Any], device: str) -> float:
    """Largest memory (10^6 bytes) while it runs: what torch holds on the GPU, or the process."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) / 1e6
    restart_peak()
    work()
    return resident_bytes(peak=True) / 1e6


# -- stages ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageSpeed:
    """Time and memory of one photo.

    Attributes:
        width, height: of the photo, pixels.
        largest_radius, mean_radius: of its circles of confusion, pixels.
        pisa_layers, pisa_tokens: layers with PISA, and the tokens that each of them sees.
        milliseconds: by the names of `STAGES`; ``dense_unet`` only where its tables fit.
        overhead: of the UNet with geometry and PISA over the stock UNet, as a share of the latter.
        dense_overhead: the same of the dense formula; None where it was not measured.
        pisa_share: geometry and PISA, as a share of the UNet with both.
        weights_megabytes: memory of the weights, 10^6 bytes.
        peak_megabytes: largest memory during a first picture, weights included.
    """

    width: int
    height: int
    largest_radius: float
    mean_radius: float
    pisa_layers: int
    pisa_tokens: int
    milliseconds: dict[str, float]
    overhead: float
    dense_overhead: float | None
    pisa_share: float
    weights_megabytes: float
    peak_megabytes: float


def stage_speed(
    pipe: BokehDiffPipeline,
    height: int,
    width: int,
    radius: float,
    repeats: int,
    compiled: bool = False,
) -> StageSpeed:
    """Time every stage on one photo.

    Args:
        pipe: from `random_pipeline`, or any.
        height, width: of the photo, pixels.
        radius: of its largest circle of confusion, pixels.
        repeats: rounds that count.
        compiled: compile the UNets and both halves of the codec. The pipeline stays compiled.

    Raises:
        ValueError: when the picture that comes out is not finite.
    """
    device = pipe.device.type
    photo = Photographed(pipe, height, width, radius)
    if not bool(torch.isfinite(photo.unet()).all()):
        raise ValueError(
            f"The UNet's noise is not finite at {width} x {height} in {pipe.unet.dtype}; times of "
            "such a network tell nothing. Take another --dtype."
        )
    stock = without_pisa(pipe.unet)
    if compiled:
        torch.compiler.reset()
        for module in (pipe.unet, stock, pipe.vae.encoder, pipe.vae.decoder):
            module.compile(fullgraph=True)
        photo.first()
    peak = peak_megabytes_of(photo.first, device)
    works = {
        "encode": photo.encode,
        "unet": photo.unet,
        "stock_unet": lambda: stock(**photo.unet_inputs, return_dict=False),
        "first_pisa_layer": photo.first_pisa_layer,
        "one_pisa_layer": photo.one_pisa_layer,
        "decode": photo.decode,
        "detail": photo.detail,
        "output": photo.output,
        "first": photo.first,
        "refocus": photo.refocus,
    }
    dense = dense_formula_fits(photo.layers[0], device)
    if dense:
        works["dense_unet"] = photo.dense_unet
    spent = time_in_turns(works, repeats, device, f"{width} x {height}")
    one, first = spent.pop("one_pisa_layer"), spent.pop("first_pisa_layer")
    spent["pisa"] = one * len(photo.layers)
    spent["geometry"] = max(0.0, first - one)
    parts_of_refocus = ("unet", "decode", "detail", "output")
    spent["rest"] = spent["refocus"] - sum(spent[name] for name in parts_of_refocus)
    parts = (pipe.unet, pipe.vae, pipe.stored_prompt)
    return StageSpeed(
        width=width,
        height=height,
        largest_radius=radius,
        mean_radius=float(crop_to(photo.defocus, (height, width)).abs().mean()),
        pisa_layers=len(photo.layers),
        pisa_tokens=photo.layers[0].tokens,
        milliseconds={name: spent[name] for name in STAGES if name in spent},
        overhead=spent["unet"] / spent["stock_unet"] - 1,
        dense_overhead=spent["dense_unet"] / spent["stock_unet"] - 1 if dense else None,
        pisa_share=(spent["geometry"] + spent["pisa"]) / spent["unet"],
        weights_megabytes=sum(
            value.numel() * value.element_size() for part in parts for value in part.parameters()
        )
        / 1e6,
        peak_megabytes=peak,
    )


def dense_formula_fits(layer: LayerShape, device: str) -> bool:
    """Whether the dense formula's tables of all pairs of tokens fit into the free memory."""
    grid = Case(1, layer.tokens, 0.0, layer.heads, layer.channels, device=device)
    try:
        check_dense_tables_fit(grid, DENSE_FORMULA)
    except ValueError:
        return False
    return True


def stage_table(rows: Sequence[StageSpeed]) -> str:
    """One column for each size, in Markdown."""
    lines = [["ms", *(f"{row.width} x {row.height}" for row in rows)]]
    lines += [
        [words, *(in_words(row.milliseconds.get(name), ".2f") for row in rows)]
        for name, words in STAGES.items()
    ]
    for words, name, form in (
        ("overhead of PISA over the stock UNet", "overhead", "+.1%"),
        ("overhead of the dense formula", "dense_overhead", "+.1%"),
        ("geometry and PISA in the UNet's call", "pisa_share", ".1%"),
        ("weights, MB", "weights_megabytes", ".0f"),
        ("peak memory, MB", "peak_megabytes", ".0f"),
    ):
        lines.append([words, *(in_words(getattr(row, name), form) for row in rows)])
    return markdown(lines)


def in_words(value: float | None, form: str) -> str:
    """A number, or a dash for none."""
    return "-" if value is None else format(value, form)


def stage_protocol(rows: Sequence[StageSpeed], shapes: str, repeats: int, device: str) -> str:
    """What the lines mean and how they were measured."""
    circles = ", ".join(
        f"{row.width} x {row.height}: radii up to {row.largest_radius:.3g} px, on average "
        f"{row.mean_radius:.3g} px, {row.pisa_layers} PISA layers of {row.pisa_tokens} tokens"
        for row in rows
    )
    memory = "as torch allocates it on the GPU" if device == "cuda" else "of the process"
    return (
        f"Networks of the shapes {shapes!r}, random weights, batch 1; {circles}. Time: "
        f"{clock_in_words(device)}; median of {repeats} rounds after {WARM_UPS} that warm up. "
        "Geometry: what the first PISA layer of a picture takes more than the others. A first "
        "picture encodes once and decodes twice, the second time to learn what the codec loses. "
        "Stock UNet: the same weights without PISA. Dense formula: all pairs of tokens and all "
        "their rays, made anew in every call. Peak memory: during a first picture, weights "
        f"included, {memory}."
    )


# -- refocusing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RefocusSpeed:
    """What a prepared scene saves.

    Attributes:
        width, height: of the photo, pixels.
        prepare_milliseconds, first_render_milliseconds, second_render_milliseconds: of a photo that
            is new to the pipeline; the second render is at another focus.
        ratio: the second render over both before it.
        sweep_milliseconds: `SWEEP` blur strengths rendered at once.
        singles_milliseconds: the same ones after the other.
        sweep_ratio: the former over the latter.
    """

    width: int
    height: int
    prepare_milliseconds: float
    first_render_milliseconds: float
    second_render_milliseconds: float
    ratio: float
    sweep_milliseconds: float
    singles_milliseconds: float
    sweep_ratio: float


def refocus_speed(
    pipe: BokehDiffPipeline, height: int, width: int, radius: float, repeats: int
) -> RefocusSpeed:
    """Time a first picture beside a refocus, and blur strengths at once beside one by one."""
    photo = Photographed(pipe, height, width, radius)
    scenes: list[BokehScene] = []
    strengths = [photo.K * (1 + number) / SWEEP for number in range(SWEEP)]
    works: dict[str, Callable[[], Any]] = {
        "prepare": lambda: scenes.append(pipe.prepare(photo.photo, photo.disparity)),
        "first_render": lambda: pipe.render(scenes[-1], FOCUS_DISPARITY, photo.K),
        "second_render": lambda: pipe.render(scenes.pop(), FOCUS_DISPARITY + 0.2, photo.K),
        "sweep": lambda: pipe.render(photo.scene, FOCUS_DISPARITY, strengths),
        "singles": lambda: [pipe.render(photo.scene, FOCUS_DISPARITY, K) for K in strengths],
    }
    spent = time_in_turns(works, repeats, pipe.device.type, f"{width} x {height}")
    return RefocusSpeed(
        width=width,
        height=height,
        **{f"{name}_milliseconds": milliseconds for name, milliseconds in spent.items()},
        ratio=spent["second_render"] / (spent["prepare"] + spent["first_render"]),
        sweep_ratio=spent["sweep"] / spent["singles"],
    )


def refocus_table(rows: Sequence[RefocusSpeed]) -> str:
    """One line for each size, in Markdown."""
    lines = [
        ["size", "prepare, ms", "first render", "second render", "second / first picture"]
        + [f"{SWEEP} K at once, ms", f"{SWEEP} K one by one", "at once / one by one"]
    ]
    for row in rows:
        lines.append(
            [
                f"{row.width} x {row.height}",
                f"{row.prepare_milliseconds:.1f}",
                f"{row.first_render_milliseconds:.1f}",
                f"{row.second_render_milliseconds:.1f}",
                f"{row.ratio:.2f}",
                f"{row.sweep_milliseconds:.1f}",
                f"{row.singles_milliseconds:.1f}",
                f"{row.sweep_ratio:.2f}",
            ]
        )
    return markdown(lines)


def refocus_protocol(shapes: str, radius: float, repeats: int, device: str) -> str:
    """What the columns mean and how they were measured."""
    return (
        f"Networks of the shapes {shapes!r}, random weights; radii up to {radius:.3g} px. First "
        "picture: prepare and first render of a new photo. Second render: of the prepared scene, "
        f"at another focus. Time: {clock_in_words(device)}; median of {repeats} rounds after "
        f"{WARM_UPS} that warm up."
    )


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table whose first line is its heading; columns are aligned, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (cell.ljust(w) if n == 0 else cell.rjust(w)
                        for n, (cell, w) in enumerate(zip(cells, widths, strict=True)))  # fmt: skip
        return f"| {' | '.join([first, *rest])} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(lines[0]), line(rule), *map(line, lines[1:])])

"""What a bokeh stack by FLUX.1-Kontext costs: parameters, arithmetic, and seconds on a device.

Parameters and arithmetic are counted on torch's ``meta`` device, where tensors have shapes and no
content. With a device, networks of the same shapes with random weights are also run.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from bokehdiff.models.bokeh_adapter import BokehAdapter, BokehCondition
from bokehdiff.pipelines.bokeh_stack import BokehStackPipeline
from evaluation import report
from evaluation.pipeline_flops import PROMPT_TOKENS, flops_of
from evaluation.pipeline_speed import (
    clock_in_words,
    markdown,
    milliseconds_of,
    peak_megabytes_of,
    time_in_turns,
)

__all__ = ["add_arguments", "run", "stack_flops", "stack_speed"]

STEPS = 50
GUIDANCE = 7.0
K_RANGE = 10.0, 30.0
"""Of the stack that is painted; the cost does not depend on it."""

SHAPES: dict[str, dict[str, Any]] = {
    "flux": {
        "transformer": dict(guidance_embeds=True),
        "adapter": dict(rank=128),
        "vae": dict(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        "clip": dict(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        ),
        "t5": dict(
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        ),
        "text_tokens": 512,
    },
    "tiny": {
        "transformer": dict(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
        "adapter": dict(rank=4, context_width=12),
        "vae": dict(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        "clip": dict(
            hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4
        ),
        "t5": dict(
            vocab_size=99,
            d_model=24,
            d_kv=6,
            d_ff=37,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        ),
        "text_tokens": 16,
    },
}
"""Networks by name: those of FLUX.1-Kontext [dev], or the same blocks with few channels."""

PARTS = {
    "transformer": "transformer",
    "adapter": "adapter for K",
    "adapter_unused": "of it, keys of K, which no result depends on",
    "vae": "VAE",
    "clip": "text encoder CLIP-L",
    "t5": "text encoder T5-XXL",
}
"""What has parameters, and how the table calls it."""


@dataclass(frozen=True)
class StackFlops:
    """Floating-point operations of one stack; a multiplication and an addition are two.

    Attributes:
        width, height: of each picture, pixels.
        frames, steps: pictures in the stack, and denoising steps.
        target_tokens, reference_tokens, text_tokens: of each picture, in the transformer.
        parameters: by the names of `PARTS`.
        stock_step, step: one call of the transformer for all frames, without the adapter and with.
        prompts: both text encoders for all frames.
        encode: the VAE, once for the photo.
        decode: the VAE for all frames.
        embedding: of K, once for all frames.
        stock_stack, stack: all of it without the adapter and with.
    """

    width: int
    height: int
    frames: int
    steps: int
    target_tokens: int
    reference_tokens: int
    text_tokens: int
    parameters: dict[str, int]
    stock_step: float
    step: float
    prompts: float
    encode: float
    decode: float
    embedding: float
    stock_stack: float
    stack: float


@dataclass(frozen=True)
class StackSpeed:
    """Time and memory of one stack.

    Attributes:
        prompts_ms: both text encoders for all frames, milliseconds.
        stock_step_ms, step_ms: one call of the transformer for all frames, without the adapter and
            with.
        stack_s: the pipeline from photo to stack, without text encoders, seconds.
        weights_megabytes: memory of all weights, 10^6 bytes.
        peak_megabytes: largest memory during the stack, weights included.
    """

    prompts_ms: float
    stock_step_ms: float
    step_ms: float
    stack_s: float
    weights_megabytes: float
    peak_megabytes: float


class Networks:
    """The networks of a stack, with random weights made on the device.

    Args:
        shapes: name in `SHAPES`.
        device: "cpu" or "cuda"; "meta" makes no weights at all.
        dtype: of all weights.
    """

    def __init__(self, shapes: str, device: str, dtype: torch.dtype) -> None:
        values = SHAPES[shapes]
        self.device, self.dtype, self.text_tokens = device, dtype, values["text_tokens"]
        torch.manual_seed(0)
        with torch.device(device), _default_dtype(dtype):
            self.transformer = FluxTransformer2DModel(**values["transformer"])
            self.adapter = BokehAdapter.for_transformer(self.transformer, **values["adapter"])
            self.vae = AutoencoderKL(**values["vae"])
            self.clip = CLIPTextModel(CLIPTextConfig(**values["clip"]))
            self.t5 = T5EncoderModel(T5Config(**values["t5"]))
        for network in self.all():
            network.eval().requires_grad_(False)
        self.adapter.install(self.transformer)

    def all(self) -> list[nn.Module]:
        return [self.transformer, self.adapter, self.vae, self.clip, self.t5]

    def parameters(self) -> dict[str, int]:
        """Numbers of parameters by the names of `PARTS`."""
        unused = [block.to_k_dof for block in self.adapter.blocks]
        return {
            "transformer": _count(self.transformer),
            "adapter": _count(self.adapter),
            "adapter_unused": sum(map(_count, unused)),
            "vae": _count(self.vae),
            "clip": _count(self.clip),
            "t5": _count(self.t5),
        }

    def tokens(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of a picture: two by two latents in each."""
        scale = 2 ** len(self.vae.config.block_out_channels)
        if height % scale or width % scale:
            raise ValueError(
                f"--size is {width}x{height}; wanted multiples of {scale} pixels, the size of a "
                "token."
            )
        return height // scale, width // scale

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, device=self.device, dtype=dtype or self.dtype)

    def step(self, frames: int, height: int, width: int) -> Callable[[bool], Tensor]:
        """What calls the transformer once for all frames, with the adapter or without."""
        config = self.transformer.config
        rows, columns = self.tokens(height, width)
        tokens = 2 * rows * columns  # target and reference
        embedding = self.empty(frames, self.adapter.config.context_width)
        inputs = dict(
            hidden_states=self.empty(frames, tokens, config.in_channels),
            encoder_hidden_states=self.empty(frames, self.text_tokens, config.joint_attention_dim),
            pooled_projections=self.empty(frames, config.pooled_projection_dim),
            timestep=self.empty(frames),
            guidance=self.empty(frames),
            img_ids=self.empty(tokens, 3),
            txt_ids=self.empty(self.text_tokens, 3),
        )

        def call(adapted: bool) -> Tensor:
            told = {"bokeh": BokehCondition(embedding)} if adapted else None
            return self.transformer(**inputs, joint_attention_kwargs=told).sample

        return call

    def prompts(self, frames: int) -> tuple[Tensor, Tensor]:
        """Embeddings of so many prompts of no meaning, and their pooled ones."""
        words = self.empty(frames, self.text_tokens, dtype=torch.long)
        letters = self.empty(frames, PROMPT_TOKENS, dtype=torch.long)
        return self.t5(words).last_hidden_state, self.clip(letters).pooler_output

    def pipeline(self) -> BokehStackPipeline:
        """The pipeline without its text encoders: there are no words for random ones."""
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        pipe = BokehStackPipeline(
            scheduler=scheduler,
            vae=self.vae,
            transformer=self.transformer,
            bokeh_adapter=self.adapter,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Of weights that are made: twelve thousand millions would not fit in float32 first."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# -- what is measured ------------------------------------------------------------------------------


def stack_flops(shapes: str, height: int, width: int, frames: int, steps: int) -> StackFlops:
    """Count one stack.

    Args:
        shapes: name in `SHAPES`.
        height, width: of the photo, pixels; multiples of the size of a token.
        frames: pictures in the stack, all painted at once.
        steps: denoising steps.
    """
    networks = Networks(shapes, "meta", torch.float32)
    rows, columns = networks.tokens(height, width)
    step = networks.step(frames, height, width)
    latents = networks.empty(frames, networks.vae.config.latent_channels, 2 * rows, 2 * columns)
    strengths = networks.empty(frames)
    photo = networks.empty(1, 3, height, width)
    stock_step, adapted_step = (flops_of(lambda on=on: step(on)) for on in (False, True))
    prompts = flops_of(lambda: networks.prompts(frames))
    encode = flops_of(lambda: networks.vae.encode(photo))
    decode = flops_of(lambda: networks.vae.decode(latents))
    embedding = flops_of(lambda: networks.adapter.embed(strengths))
    stock_stack = prompts + encode + steps * stock_step + decode
    return StackFlops(
        width=width,
        height=height,
        frames=frames,
        steps=steps,
        target_tokens=rows * columns,
        reference_tokens=rows * columns,
        text_tokens=networks.text_tokens,
        parameters=networks.parameters(),
        stock_step=stock_step,
        step=adapted_step,
        prompts=prompts,
        encode=encode,
        decode=decode,
        embedding=embedding,
        stock_stack=stock_stack,
        stack=stock_stack + steps * (adapted_step - stock_step) + embedding,
    )


@torch.no_grad()
def stack_speed(
    shapes: str,
    height: int,
    width: int,
    frames: int,
    steps: int,
    repeats: int,
    device: str,
    dtype: torch.dtype,
) -> StackSpeed:
    """Run one stack; arguments as of :func:`stack_flops`, and on what."""
    networks = Networks(shapes, device, dtype)
    step = networks.step(frames, height, width)
    milliseconds = time_in_turns(
        {
            "prompts": lambda: networks.prompts(frames),
            "stock_step": lambda: step(False),
            "step": lambda: step(True),
        },
        repeats,
        device,
        "steps",
    )
    pipe = networks.pipeline()
    prompt_embeds, pooled_prompt_embeds = networks.prompts(frames)
    photo = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))

    def paint(number: int) -> None:
        pipe(
            photo,
            K=torch.linspace(*K_RANGE, frames),
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            num_inference_steps=number,
            guidance_scale=GUIDANCE,
            max_area=height * width,
            output_type="pt",
        )

    paint(1)  # warms up the codec
    spent: list[float] = []
    peak = peak_megabytes_of(
        lambda: spent.append(milliseconds_of(lambda: paint(steps), device)), device
    )
    weights = sum(
        tensor.numel() * tensor.element_size()
        for network in networks.all()
        for tensor in network.parameters()
    )
    return StackSpeed(
        prompts_ms=milliseconds["prompts"],
        stock_step_ms=milliseconds["stock_step"],
        step_ms=milliseconds["step"],
        stack_s=spent[0] / 1000,
        weights_megabytes=weights / 1e6,
        peak_megabytes=peak,
    )


# -- tables ----------------------------------------------------------------------------------------


def table(counted: StackFlops, measured: StackSpeed | None) -> str:
    """Parameters, arithmetic and, where it was measured, time and memory, in Markdown."""
    parameters = [["parameters", "millions"]]
    parameters += [
        [words, f"{counted.parameters[name] / 1e6:.1f}"] for name, words in PARTS.items()
    ]
    rows = [
        ("prompts", counted.prompts, counted.prompts),
        ("encode the photo", counted.encode, counted.encode),
        ("embed K", None, counted.embedding),
        ("one step", counted.stock_step, counted.step),
        (f"{counted.steps} steps", counted.steps * counted.stock_step,
         counted.steps * counted.step),
        ("decode", counted.decode, counted.decode),
        ("stack", counted.stock_stack, counted.stack),
    ]  # fmt: skip
    flops = [[f"TFLOP for {counted.frames} frames", "stock", "with adapter", "more"]]
    for words, stock, adapted in rows:
        more = "" if stock is None else f"{adapted / stock - 1:+.2%}"
        flops.append([words, "" if stock is None else _tera(stock), _tera(adapted), more])
    tables = [markdown(parameters), markdown(flops)]
    if measured is not None:
        overhead = measured.step_ms / measured.stock_step_ms - 1
        tables.append(
            markdown(
                [
                    [f"measured, {counted.frames} frames", ""],
                    ["prompts, ms", f"{measured.prompts_ms:.1f}"],
                    ["one step, stock, ms", f"{measured.stock_step_ms:.1f}"],
                    ["one step with adapter, ms", f"{measured.step_ms:.1f}"],
                    ["... more", f"{overhead:+.2%}"],
                    [f"stack of {counted.steps} steps, s", f"{measured.stack_s:.2f}"],
                    ["weights, GB", f"{measured.weights_megabytes / 1e3:.2f}"],
                    ["peak memory, GB", f"{measured.peak_megabytes / 1e3:.2f}"],
                ]
            )
        )
    return "\n\n".join(tables)


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.4g}"


def protocol(counted: StackFlops, shapes: str, device: str | None, repeats: int) -> str:
    """What was counted and timed, and what was assumed."""
    words = (
        f"Networks of the shapes {shapes!r}, {counted.frames} frames of {counted.width} x "
        f"{counted.height} at once: {counted.target_tokens} tokens of the target, "
        f"{counted.reference_tokens} of the reference and {counted.text_tokens} of text in each. "
        "Arithmetic: on the meta device by torch.utils.flop_counter: matrix products, convolutions "
        "and attention, two operations for a multiplication and an addition; no normalisation, "
        "activation or softmax. One prompt for each frame; the photo is encoded once."
    )
    if device is not None:
        words += (
            f" Time: random weights; {clock_in_words(device)}; prompts and steps are medians of "
            f"{repeats} rounds after those that warm up; the stack is one run of the pipeline with "
            "given prompts, after one of a single step."
        )
    return words


# -- command ---------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``cost bokeh-stack``."""
    parser.add_argument(
        "--size",
        default="1024x1024",
        metavar="WxH",
        help="width and height of the photo in pixels, default %(default)s",
    )
    parser.add_argument("--frames", type=int, default=3, help="default %(default)s")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="denoising steps, default %(default)s"
    )
    parser.add_argument(
        "--shapes",
        choices=list(SHAPES),
        default="flux",
        help="networks: flux (default), or tiny, the same blocks with few channels",
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="also run random weights there; default: count"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        default="bfloat16",
        help="of weights and activations that are run, default %(default)s",
    )
    parser.add_argument("--repeats", type=int, default=5, help="default %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, default %(default)s")
    parser.add_argument("--out", metavar="FILE", help="write the figures to this JSON file")


def run(arguments: argparse.Namespace) -> int:
    """Counts and measures a stack, prints the tables and writes the JSON; returns 0.

    Raises:
        ValueError: arguments out of range.
    """
    width, times, height = arguments.size.partition("x")
    if not (times and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f"--size is {arguments.size!r}; wanted WxH in pixels, such as 1024x1024.")
    for name in ("frames", "steps", "repeats", "threads"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}.")
    what = (arguments.shapes, int(height), int(width), arguments.frames, arguments.steps)
    counted, measured = stack_flops(*what), None
    torch.set_num_threads(arguments.threads)
    if arguments.device:
        dtype = getattr(torch, arguments.dtype)
        measured = stack_speed(*what, arguments.repeats, arguments.device, dtype)
    machine = {**report.hardware(arguments.device or "cpu"), "dtype": arguments.dtype}
    described = protocol(counted, arguments.shapes, arguments.device, arguments.repeats)
    print(table(counted, measured))
    print()
    print(described)
    if measured is not None:
        print(report.hardware_sentence(machine))
    if arguments.out:
        report.write_json(
            arguments.out,
            {
                "benchmark": "cost bokeh-stack",
                "protocol": described,
                "hardware": machine if measured is not None else None,
                "counted": asdict(counted),
                "measured": None if measured is None else asdict(measured),
            },
        )
        print(f"All figures: {arguments.out}")
    return 0

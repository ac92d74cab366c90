"""``cost bokeh-stack``: arithmetic of FLUX.1's shapes is counted, that of tiny ones is done."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from evaluation import bokeh_stack_cost
from evaluation.bokeh_stack_cost import SHAPES, StackFlops, stack_flops, stack_speed


@pytest.fixture(scope="module")
def full_size() -> StackFlops:
    return stack_flops("flux", 1024, 1024, frames=3, steps=50)


@pytest.fixture(scope="module")
def tiny() -> StackFlops:
    return stack_flops("tiny", 64, 96, frames=2, steps=4)


def transformer_by_hand(counted: StackFlops, **config: int) -> float:
    """Operations of one call of a FLUX transformer for all frames, layer by layer."""
    width, double, single = config["width"], config["double"], config["single"]
    image, text = counted.target_tokens + counted.reference_tokens, counted.text_tokens
    everything = image + text
    # q, k, v and out, and a feed-forward layer four times as wide; in single blocks q, k, v, the
    # same feed-forward layer, and one output layer for both.
    in_blocks = 12 * width**2 * everything * (double + single)
    modulation = width**2 * (double * (6 + 6) + single * 3 + 2)
    embedded = 2 * (256 * width + width**2) + config["pooled"] * width + width**2
    ends = image * 2 * config["channels"] * width + text * config["text_channels"] * width
    attention = 2 * everything**2 * width * (double + single)
    multiplications = in_blocks + modulation + embedded + ends + attention
    return 2.0 * counted.frames * multiplications


def adapter_by_hand(counted: StackFlops, **config: int) -> float:
    """What the adapter adds to it: two low-rank layers on tokens, and one on the embedding of K."""
    width, double, single = config["width"], config["double"], config["single"]
    rank, context_width = config["rank"], config["context_width"]
    image, text = counted.target_tokens + counted.reference_tokens, counted.text_tokens
    tokens = double * image + single * (image + text)
    on_tokens = 2 * tokens * 2 * width * rank
    on_embedding = (double + single) * rank * (context_width + width)
    return 2.0 * counted.frames * (on_tokens + on_embedding)


FLUX = dict(
    width=3072,
    double=19,
    single=38,
    channels=64,
    text_channels=4096,
    pooled=768,
    rank=128,
    context_width=768,
)
TINY = dict(
    width=32,
    double=1,
    single=2,
    channels=16,
    text_channels=24,
    pooled=32,
    rank=4,
    context_width=12,
)


def assert_as_by_hand(counted: StackFlops, config: dict[str, int]) -> None:
    assert counted.stock_step == transformer_by_hand(counted, **config)
    assert counted.step - counted.stock_step == adapter_by_hand(counted, **config)
    assert counted.embedding == 2 * counted.frames * 64 * (1 + config["context_width"])
    once = counted.prompts + counted.encode + counted.decode
    assert counted.stock_stack == once + counted.steps * counted.stock_step
    assert counted.stack == once + counted.steps * counted.step + counted.embedding


def test_the_arithmetic_of_flux_by_hand(full_size: StackFlops) -> None:
    assert full_size.target_tokens == full_size.reference_tokens == 64 * 64
    assert full_size.text_tokens == 512
    assert_as_by_hand(full_size, FLUX)


def test_the_arithmetic_of_another_size_by_hand(tiny: StackFlops) -> None:
    assert tiny.target_tokens == 4 * 6
    assert_as_by_hand(tiny, TINY)


def test_parameters_of_flux(full_size: StackFlops) -> None:
    # The published checkpoint of the adapter, and 57 layers for keys in it.
    assert full_size.parameters["adapter"] == 145_736_576
    assert full_size.parameters["adapter_unused"] == 57 * 128 * (768 + 3072)
    # T5-XXL: 4.7 thousand millions; FLUX.1: 12 thousand millions.
    assert full_size.parameters["t5"] == pytest.approx(4.7e9, rel=0.02)
    assert full_size.parameters["transformer"] == pytest.approx(12e9, rel=0.02)


def test_frames_and_codec_are_counted_each(tiny: StackFlops) -> None:
    more = stack_flops("tiny", 64, 96, frames=4, steps=4)
    for name in ("stock_step", "step", "prompts", "decode", "embedding"):
        assert getattr(more, name) == 2 * getattr(tiny, name), name
    assert more.encode == tiny.encode > 0


@pytest.mark.usefixtures("one_thread")
def test_a_tiny_stack_is_run() -> None:
    measured = stack_speed("tiny", 64, 96, 2, 2, 1, "cpu", torch.float32)
    for name, value in vars(measured).items():
        assert value > 0, name
    assert measured.peak_megabytes > measured.weights_megabytes
    # Steps on their own, and in the pipeline with what is around them.
    assert 1000 * measured.stack_s > measured.step_ms


@pytest.mark.usefixtures("one_thread")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    bokeh_stack_cost.add_arguments(parser)
    file = tmp_path / "cost.json"
    options = ["--shapes", "tiny", "--size", "64x96", "--frames", "2", "--steps", "2"]
    assert bokeh_stack_cost.run(parser.parse_args([*options, "--out", str(file)])) == 0
    printed = capsys.readouterr().out
    assert "adapter for K" in printed and "measured" not in printed
    written = json.loads(file.read_text())
    assert written["measured"] is None and written["hardware"] is None
    assert written["counted"]["width"] == 64 and written["counted"]["height"] == 96

    run = ["--device", "cpu", "--dtype", "bfloat16", "--repeats", "1", "--out", str(file)]
    assert bokeh_stack_cost.run(parser.parse_args([*options, *run])) == 0
    assert "stack of 2 steps, s" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert written["measured"]["stack_s"] > 0 and written["hardware"]["dtype"] == "bfloat16"

    for wrong, sentence in (
        (["--size", "64"], "--size is '64'; wanted WxH"),
        (["--size", "60x64"], "wanted multiples of 16 pixels"),
        (["--frames", "0"], "--frames must be at least 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            bokeh_stack_cost.run(parser.parse_args([*options, *wrong]))


def test_both_shapes_are_of_the_same_kind() -> None:
    assert SHAPES["tiny"].keys() == SHAPES["flux"].keys()

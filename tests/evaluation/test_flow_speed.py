"""Speed and memory of BokehFlow, on networks of a few thousand parameters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bokehdiff.models.bokehflow import BokehFlowModel
from evaluation import flow_speed, flow_training_speed
from evaluation.__main__ import main
from evaluation.flow_networks import random_network

REPOSITORY = Path(__file__).resolve().parents[2]


def small_network(mixer: str = "gated_conv") -> BokehFlowModel:
    options = {"channels": 8, "stem_channels": 8, "head_channels": 8, "blocks": 2}
    if mixer == "bigdr":
        options |= {"heads": 2, "key_channels": 6, "value_channels": 4}
    torch.manual_seed(0)
    return BokehFlowModel(mixer=mixer, **options).eval().requires_grad_(False)


def test_frames_per_second_and_memory_of_a_film(one_thread: None) -> None:
    network = small_network()
    row = flow_speed.film_speed("small", network, 32, 48, repeats=2)
    assert row.parameters == sum(value.numel() for value in network.parameters())
    assert row.weights_megabytes == pytest.approx(4 * row.parameters / 1e6)
    assert row.milliseconds > 0
    assert row.frames_per_second == pytest.approx(1000 / row.milliseconds)
    # Three tensors of tokens at least, each 8 channels of 8 x 12.
    assert row.state_megabytes > 3 * 8 * 8 * 12 * 4 / 1e6
    assert row.peak_megabytes is None or row.peak_megabytes >= row.weights_megabytes
    assert "| 32" not in flow_speed.film_table([row]) and "48 x 32" in flow_speed.film_table([row])
    assert next(network.parameters()).dtype == torch.float32, "the network stays as it is"
    half = flow_speed.film_speed("small", network, 32, 48, repeats=1, dtype=torch.bfloat16)
    assert half.weights_megabytes == pytest.approx(row.weights_megabytes / 2)


@pytest.mark.parametrize("mixer", ["gated_conv", "bigdr"])
def test_arithmetic_per_token_does_not_grow_with_the_photo(one_thread: None, mixer: str) -> None:
    # Of smaller networks camera and renderer, which does not end at the border, are a larger part.
    row = flow_speed.growth(mixer, random_network("nano", mixer), 64, repeats=1)
    one, other = row.flops_per_token
    assert other == pytest.approx(one, rel=1e-3)
    assert row.double_side == 128 and min(row.nanoseconds_per_pixel) > 0
    assert "64, 128" in flow_speed.growth_table([row])


def test_arithmetic_per_token_is_that_of_the_layers(one_thread: None) -> None:
    """Two operations for every weight that a token meets; the renderer comes on top."""
    network = random_network("nano", "gated_conv")
    one, _ = flow_speed.growth("nano", network, 64, repeats=1).flops_per_token
    C, stem, head, pixels = 40, 24, 16, 16
    stem_weights = 4 * 49 * 3 * stem + 9 * stem + stem * C
    block = 2 * 49 * C + 2 * C * C + 2 * C * 3 * C
    heads = 2 * 9 * C * head + pixels * 9 * (head + (head + 7) * head + head * 3)
    by_hand = 2 * (stem_weights + 12 * block + 6 * C * C + heads)
    assert 1 < one / by_hand < 1.03


def test_training_with_and_without_recurrences(one_thread: None) -> None:
    pytest.importorskip("piq", reason="SSIM is computed by piq (pip install '.[train]')")
    network = small_network("bigdr")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    row = flow_training_speed.training_speed("small", network, 32, batch=2, repeats=1)
    assert (row.sequences, row.tokens) == (2 * 2 * 4, 64)
    assert min(row.step_seconds, row.chunked_seconds, row.tuned_loop_seconds) > 0
    more = row.loop_seconds - row.chunked_seconds
    assert row.loop_step_seconds == pytest.approx(row.step_seconds + 4 * more)
    assert row.loop_step_seconds > row.tuned_loop_step_seconds
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    without = flow_training_speed.training_speed("small", small_network(), 32, 1, 1)
    assert without.step_seconds > 0 and without.loop_seconds is None
    table = flow_training_speed.training_table([row, without])
    assert "2 x 32 px" in table and "16 x 64" in table


@pytest.mark.skipif(sys.platform != "linux", reason="no peak that can be started anew")
def test_a_film_that_leaks_is_found_out(one_thread: None) -> None:
    sound = flow_speed.stream_memory("sound", small_network(), 32, 48, frames=30)
    assert sound.frames == 30 and sound.peak_megabytes >= sound.settled_megabytes > 0
    assert sound.growth_percent < 3
    leaking, kept = small_network(), []
    leaking.stem.register_forward_hook(lambda *_: kept.append(torch.ones(2_000_000)))
    leak = flow_speed.stream_memory("leaking", leaking, 32, 48, frames=30)
    # 8 MB for each of 20 frames.
    assert leak.peak_megabytes - leak.settled_megabytes > 0.9 * 160
    assert leak.growth_percent > 5
    assert "30" in flow_speed.stream_table([sound, leak])


def test_command_line_measures_a_film_in_a_process_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    words = ["--option", "channels=8", "--size", "64x64", "--repeats", "1", "--out", str(out)]
    finished = subprocess.run(
        [sys.executable, "-m", "evaluation", "speed", "flow", *words],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "| gated_conv nano" in finished.stdout and "One frame at a time" in finished.stdout
    figures = json.loads(out.read_text())
    assert figures["rows"][0]["width"] == 64 and figures["rows"][0]["frames_per_second"] > 0
    assert figures["command"].startswith("python -m evaluation speed flow --option")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--repeats 0", "--repeats must be at least 1"),
        ("--size 64", "--size takes WIDTHxHEIGHT"),
        ("--linearity --size 64x128", "wanted a square"),
        ("--training-step --dtype bfloat16", "--dtype and --compile are for films"),
        ("--stream 10 --size 64x64", "--stream must be more than 10 frames"),
        ("--mixer swin", "with the mixer 'swin'"),
    ],
)
def test_mistakes_get_a_sentence(
    words: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["speed", "flow", *words.split()]) == 2
    assert sentence in capsys.readouterr().err

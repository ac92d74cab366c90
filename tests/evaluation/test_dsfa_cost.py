"""What DSFA costs, beside sums by hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from bokehdiff.models.dsfa import DSFABlock
from evaluation import dsfa_cost
from evaluation.pipeline_flops import flops_of


def block_flops(width: int, patches: int, frames: int) -> float:
    """Of a block for one picture and its frames, the picture being all that is asked for.

    A layer from a to b channels takes 2 a b of each token. Space: q, k, v, output and an MLP of
    four times the width for each patch and the strength's token; focus: all that for the picture,
    keys and values for every frame.
    """
    seen, square = frames + 1, width**2
    strengths = seen * (2 * width / 4 + 2 * square / 4 + 4 * square)
    tokens = seen * (patches + 1)
    space = tokens * (6 + 2 + 16) * square + seen * 4 * (patches + 1) ** 2 * width
    focus = patches * ((2 + 2 + 16) * square + seen * 4 * square + 4 * seen * width)
    return strengths + space + focus


@pytest.mark.parametrize("frames", [1, 3])
def test_block_is_counted_as_by_hand(frames: int) -> None:
    with torch.device("meta"):
        block = DSFABlock(64, 8)
        reference, stack = torch.empty(1, 12, 64), torch.empty(1, frames, 12, 64)
        K = torch.empty(1, frames)
    assert flops_of(lambda: block(reference, stack, K)) == block_flops(64, 12, frames)


def test_cost_of_a_small_depth_anything() -> None:
    cost = dsfa_cost.count_cost("vits", 56, 84, 3)
    assert cost.parameters + cost.fusion_parameters == 32_552_257
    assert cost.fusion == 2 * block_flops(384, 24, 3)
    assert cost.with_stack == cost.single + cost.backbone + cost.fusion
    # Every frame costs what the backbone takes of the picture, without neck and head.
    tokens = 24 + 1
    layer = tokens * 24 * 384**2 + 4 * tokens**2 * 384
    assert cost.backbone == 3 * (12 * layer + 24 * 2 * 3 * 14**2 * 384)
    assert cost.single > cost.backbone / 3
    two = dsfa_cost.count_cost("vits", 56, 84, 2)
    assert (two.single, two.backbone) == (cost.single, cost.backbone * 2 / 3)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    dsfa_cost.add_arguments(parser)
    return parser.parse_args(words)


def test_table_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cost.json"
    size = ["--size", "42x28", "--encoder", "vits", "--frames", "2"]
    run = ["--device", "cpu", "--dtype", "bfloat16", "--repeats", "1"]
    before = torch.get_default_dtype()
    assert dsfa_cost.run(arguments(*size, *run, "--out", str(out))) == 0
    assert torch.get_default_dtype() == before
    printed = capsys.readouterr().out
    assert "| vits" in printed and "42 x 28" in printed and "bfloat16" in printed
    (figures,) = json.loads(out.read_text())["costs"]
    assert figures["frames"] == 2 and figures["width"] == 42
    assert figures["seconds"] > 0 and figures["seconds_single"] > 0
    assert figures["with_stack"] == figures["single"] + figures["backbone"] + figures["fusion"]


def test_nothing_is_measured_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    dsfa_cost.run(arguments("--size", "42x28", "--encoder", "vits"))
    assert "alone, s" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["--size", "500x500"], ["--size", "518"], ["--frames", "0"], ["--repeats", "0"]]
)
def test_mistakes(words: list[str]) -> None:
    with pytest.raises(ValueError, match="wanted WxH|at least 1"):
        dsfa_cost.run(arguments(*words))

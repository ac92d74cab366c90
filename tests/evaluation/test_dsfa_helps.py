"""What a stack is worth to depth: what networks are given, and figures that can be worked out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Dinov2Config
from transformers.modeling_outputs import DepthEstimatorOutput

from bokehdiff.models.depth_anything_dsfa import (
    DepthAnythingDSFAConfig,
    DepthAnythingDSFAForDepthEstimation,
)
from data_synthesis.stack_files import write_stacks
from data_synthesis.stack_scenes import StackScenes
from evaluation import dsfa_helps
from evaluation.dsfa_helps import (
    SINGLE,
    STACKS,
    best_factor,
    calibrated,
    local_contrast,
    measure,
    shuffled_strengths,
    stacks_to_give,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class BlurReader(torch.nn.Module):
    """Reads the contrast of frames over K: a network that does what one with DSFA should.

    Frames here are grey with contrast ``depth K``; without them it answers 3 m.
    """

    def forward(
        self, pixels: Tensor, stack: Tensor | None = None, K: Tensor | None = None
    ) -> DepthEstimatorOutput:
        shape = (len(pixels), *pixels.shape[-2:])
        if stack is None or K is None:
            return DepthEstimatorOutput(predicted_depth=torch.full(shape, 3.0))
        level = (stack[:, :, :1] * 0.229 + 0.485).mean((2, 3, 4))
        depth = (level / (0.1 * K)).mean(1)
        return DepthEstimatorOutput(predicted_depth=depth[:, None, None].expand(shape))


def scenes_at(*depths: float) -> list[dict[str, Tensor]]:
    """Flat walls; the levels of the frames are 0.1 K depth, that of the sharp picture is 0."""
    K = torch.tensor([0.5, 1.0, 2.0])
    return [
        {
            "image": torch.zeros(3, 8, 8),
            "depth": torch.full((1, 8, 8), depth),
            "stack": (0.1 * depth * K)[:, None, None, None].expand(3, 3, 8, 8),
            "K": K * (1 + 0.1 * number),
        }
        for number, depth in enumerate(depths)
    ]


def test_figures_of_a_reader_of_blur_are_those_worked_out_by_hand() -> None:
    scenes = scenes_at(2.0, 3.0)
    for scene, factor in zip(scenes, (1.0, 1.1), strict=True):
        scene["stack"] = scene["stack"] * factor
    found = measure(BlurReader(), BlurReader(), scenes)
    assert set(found) == {SINGLE, *STACKS}
    assert found["stack"]["mean"]["abs_rel"] == pytest.approx(0, abs=1e-5)
    assert found["stack"]["mean"]["delta1"] == 1
    # 3 m instead of 2 m, and right for the second wall.
    assert found["single"]["mean"]["abs_rel"] == pytest.approx(0.25)
    assert found["stack"]["change"]["relative"] == pytest.approx(-1, abs=1e-4)
    assert found["no_stack"]["mean"] == found["single"]["mean"]
    # Nothing is blurred in copies: 0 m, as near as can be.
    assert found["copies"]["mean"]["abs_rel"] == pytest.approx(1, abs=1e-3)
    # K 0.5, 1, 2 read as 1, 2, 0.5: the mean of 1/2, 1/2 and 4 of the depth.
    assert found["K_shuffled"]["mean"]["abs_rel"] == pytest.approx(5 / 3 - 1, rel=1e-4)
    # The strengths of the other scene are 1.1 times, or that part, of the right ones.
    expected = ((1 - 1 / 1.1) + 0.1) / 2
    assert found["K_of_others"]["mean"]["abs_rel"] == pytest.approx(expected, rel=1e-3)
    assert [row["abs_rel"] for row in found["single"]["rows"]] == pytest.approx([0.5, 0])
    # Two scenes drawn twice: 0, 0.25 or 0.5.
    assert found["single"]["interval"]["abs_rel"] == pytest.approx([0, 0.5])


def test_a_network_that_does_not_look_is_found_out() -> None:
    class Blind(BlurReader):
        def forward(self, pixels: Tensor, *frames: Tensor) -> DepthEstimatorOutput:
            return super().forward(pixels)

    found = measure(Blind(), BlurReader(), scenes_at(2.0, 3.0, 4.0))
    for name in STACKS:
        assert found[name]["change"] == {"mean": 0.0, "relative": 0.0, "interval": [0.0, 0.0]}


def test_the_best_factor_is_the_one_a_search_finds() -> None:
    rng = np.random.default_rng(2)
    depth, predicted = rng.uniform(1, 10, (5, 6, 7)), rng.uniform(1, 10, (5, 6, 7))
    factors = np.linspace(0.2, 2, 20001)
    errors = [np.mean(np.abs(one * predicted - depth) / depth) for one in factors]
    found = best_factor(predicted, depth)
    assert np.mean(np.abs(found * predicted - depth) / depth) <= min(errors)
    assert best_factor(depth / 1.7, depth) == pytest.approx(1.7)


def test_a_wrong_scale_is_taken_out_by_calibration_on_other_scenes() -> None:
    class TwiceTooFar(BlurReader):
        def forward(self, *given: Tensor) -> DepthEstimatorOutput:
            return DepthEstimatorOutput(predicted_depth=2 * super().forward(*given).predicted_depth)

    others = [{**scene, "K": scenes_at(1.0)[0]["K"]} for scene in scenes_at(1.5, 3.0, 3.0, 3.0)]
    factors = calibrated(TwiceTooFar(), BlurReader(), others)
    assert factors == pytest.approx({"stack": 0.5, "single": 1.0, "constant": 3.0}, rel=1e-5)
    scenes = [{**scene, "K": scenes_at(1.0)[0]["K"]} for scene in scenes_at(2.0, 4.0)]
    found = measure(TwiceTooFar(), BlurReader(), scenes, factors)
    assert found["stack"]["mean"]["abs_rel"] == pytest.approx(0, abs=1e-5)
    assert found["no_stack"]["mean"]["abs_rel"] == pytest.approx((0.5 + 0.25) / 2)
    assert found["constant"]["mean"]["abs_rel"] == pytest.approx((0.5 + 0.25) / 2)


def test_what_the_network_is_given() -> None:
    generator = torch.Generator().manual_seed(0)
    image, stack = (
        torch.rand(size, generator=generator) for size in ((2, 3, 4, 4), (2, 3, 3, 4, 4))
    )
    K = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])
    others = K.flip(0)
    given = stacks_to_give(image, stack, K, others, 5)
    assert set(given) == set(STACKS)
    assert torch.equal(given["stack"][0], stack) and torch.equal(given["stack"][1], K)
    for frame in range(3):
        assert torch.equal(given["copies"][0][:, frame], image)
    assert torch.equal(given["copies"][1], K)
    noise = given["noise"][0]
    assert noise.shape == stack.shape and not torch.equal(noise, stack)
    assert torch.equal(noise, stacks_to_give(image, stack, K, others, 5)["noise"][0])
    assert torch.equal(given["K_of_others"][1], others)
    assert given["no_stack"] == ()


@pytest.mark.parametrize("frames", [2, 3, 4])
def test_shuffled_strengths_are_the_same_ones_and_none_stays(frames: int) -> None:
    K = torch.arange(1.0, frames + 1).expand(3, frames)
    shuffled = shuffled_strengths(K)
    assert torch.equal(shuffled.sort(dim=1).values, K)
    assert (shuffled != K).all()


def test_local_contrast_is_the_deviation_in_the_window() -> None:
    image = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    found = local_contrast(image)[0, 0].numpy()
    luminance = np.tensordot([0.2126, 0.7152, 0.0722], image[0].double().numpy(), 1)
    assert found[10, 9] == pytest.approx(luminance[6:15, 5:14].std(), rel=1e-9)
    assert found[0, 1] == pytest.approx(luminance[:5, :6].std(), rel=1e-9)
    assert local_contrast(torch.full((1, 3, 12, 12), 0.3)).max() < 1e-7


def save_network(folder: Path, seed: int) -> str:
    backbone = Dinov2Config(
        **{"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 16},
        **{"patch_size": 4, "out_indices": [1, 2, 3, 4]},
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    torch.manual_seed(seed)
    config = DepthAnythingDSFAConfig(
        **{"backbone_config": backbone, "patch_size": 4, "reassemble_hidden_size": 16},
        **{"neck_hidden_sizes": [4, 4, 8, 8], "fusion_hidden_size": 4, "head_hidden_size": 4},
        **{"depth_estimation_type": "metric", "max_depth": 12, "fusion_heads": 2},
        **{"largest_strength": 2.0, "initial_gate": 0.5, "initializer_range": 0.2},
    )
    DepthAnythingDSFAForDepthEstimation(config).save_pretrained(folder)
    return str(folder)


def test_the_command_prints_tables_and_writes_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_stacks(StackScenes(2, 24, frames=3, strengths=(0.5, 2.0)), tmp_path / "mixed", count=3)
    networks = {name: save_network(tmp_path / name, n) for n, name in enumerate(("a", "b"))}
    parser = argparse.ArgumentParser()
    dsfa_helps.add_arguments(parser)
    flags = ["--stack", networks["a"], "--single", networks["b"]]
    flags += ["--crop", "16", "--out", str(tmp_path / "results.json")]
    assert dsfa_helps.run(parser.parse_args([str(tmp_path / "mixed"), *flags])) == 0
    printed = capsys.readouterr().out
    assert "mixed: 3 scenes, 3 frames, 16 x 16 pixels" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    methods = results["datasets"]["mixed"]["methods"]
    assert f"{methods['stack']['mean']['abs_rel']:.4f}" in printed
    assert len(methods["single"]["rows"]) == 3
    assert results["datasets"]["mixed"]["settings"]["seed"] == 2

    write_stacks(StackScenes(3, 24, frames=3, strengths=(0.5, 2.0)), tmp_path / "other", count=2)
    more = [*flags, "--calibration", str(tmp_path / "other")]
    assert dsfa_helps.run(parser.parse_args([str(tmp_path / "mixed"), *more])) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["factors"]) == {"stack", "single", "constant"}
    assert f"{results['factors']['constant']:.2f} m everywhere" in printed
    with pytest.raises(ValueError, match="--calibration is one of the folders measured"):
        dsfa_helps.run(parser.parse_args([str(tmp_path / "other"), *more]))

    arguments = parser.parse_args([str(tmp_path / "mixed"), *flags, "--frames", "1"])
    with pytest.raises(ValueError, match="--frames is 1 and the stacks of mixed have 3"):
        dsfa_helps.run(arguments)
    arguments = parser.parse_args([str(tmp_path / "mixed"), *flags])
    arguments.single = str(tmp_path / "mixed")
    with pytest.raises(ValueError, match="holds no depth network with DSFA"):
        dsfa_helps.run(arguments)

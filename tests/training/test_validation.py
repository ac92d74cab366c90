"""Validation scores of renderers whose quality is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.validation import validate, without_border


def scene(size: int = 12) -> dict[str, Tensor]:
    """Left half in focus, right half 10 pixels of blur; the target is grey where blurred."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((3, size, size), generator=generator)
    disparity = torch.zeros(1, size, size)
    disparity[..., size // 2 :] = 0.5
    target = torch.where(disparity > 0, 0.5, image)
    return {
        "image": image,
        "disparity": disparity,
        "target": target,
        "df": torch.tensor(0.0),
        "K": torch.tensor(20.0),
    }


def leave_as_it_is(image: Tensor, disparity: Tensor, df: Tensor, K: Tensor) -> Tensor:
    return 2 * image - 1


def turn_grey(image: Tensor, disparity: Tensor, df: Tensor, K: Tensor) -> Tensor:
    share = ((disparity - df).abs() * K / 10).reshape(1, 1, *image.shape[-2:]).clamp(0, 1)
    return 2 * (image + share * (0.5 - image)) - 1


def test_identity_scores_as_identity() -> None:
    scores = validate(leave_as_it_is, [scene(), scene()], 0, torch.device("cpu"))
    assert scores["scenes"] == 2
    assert scores["psnr"] == scores["psnr_identity"]
    assert scores["psnr_blurred"] == scores["psnr_blurred_identity"]
    assert scores["psnr_in_focus"] == pytest.approx(120, abs=10)  # round trip to [-1, 1]
    assert scores["control"] == 0


def test_a_perfect_renderer() -> None:
    scores = validate(turn_grey, [scene()], 2, torch.device("cpu"))
    assert min(scores["psnr"], scores["psnr_blurred"]) > 100 > scores["psnr_identity"]
    assert scores["control"] == 1


def test_regions_that_no_scene_has_are_absent() -> None:
    sharp = {**scene(), "K": torch.tensor(0.0)}
    scores = validate(turn_grey, [sharp], 0, torch.device("cpu"))
    assert "psnr_blurred" not in scores and "control" not in scores
    assert "psnr_in_focus" in scores


def test_without_border() -> None:
    image = torch.arange(25.0).reshape(1, 5, 5)
    assert torch.equal(without_border(image, 0), image)
    assert torch.equal(without_border(image, 2), image[:, 2:3, 2:3])

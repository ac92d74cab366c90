"""Shares of mended and spoilt pixels, counted by hand for refiners that always choose alike."""

from __future__ import annotations

import pytest
import torch

from bokehdiff.models.disparity_refiner import PIXELS_PER_SIDE, DisparityRefiner
from training.refiner_validation import MISTAKES_PX, refiner_scores

CPU = torch.device("cpu")


def square(
    size: int, height: int = 50, width: int = 60, K: float = 20.0
) -> dict[str, torch.Tensor]:
    """A near square of `size` pixels before a wall. The picture is no multiple of anything."""
    disparity = torch.zeros(1, height, width)
    disparity[:, 12 : 12 + size, 12 : 12 + size] = 1
    numbers = {"df": torch.tensor(1.0), "K": torch.tensor(K)}
    return {"image": torch.rand(3, height, width), "disparity": disparity, **numbers}


def refiner_that_chooses(candidate: int) -> DisparityRefiner:
    refiner = DisparityRefiner((8, 8))
    with torch.no_grad():
        area = PIXELS_PER_SIDE**2
        refiner.network.conv_out.bias[candidate * area : (candidate + 1) * area] = 10
    return refiner


def test_an_untrained_refiner_mends_and_spoils_nothing() -> None:
    scores = refiner_scores(DisparityRefiner((8, 8)), [square(20)], CPU)
    names = [f"{kind}_{pixels}px" for kind in ("mended", "spoilt") for pixels in MISTAKES_PX]
    assert scores == dict.fromkeys([*names, "spoilt_exact"], 0)


def test_shares_are_of_the_pixels_of_all_scenes() -> None:
    """The largest within 2 px: it undoes what erosion by 2 px has done to squares, and no more."""
    sizes = (20, 24)
    scores = refiner_scores(refiner_that_chooses(3), [square(size) for size in sizes], CPU)
    pixels = 50 * 60 * len(sizes)
    # Of the true map, a ring 2 px wide becomes near.
    ring = sum((size + 4) ** 2 - size**2 for size in sizes)
    far = pixels - sum(size**2 for size in sizes)
    assert scores["spoilt_exact"] == pytest.approx(ring / pixels)
    # Shrunk, a square lacks a ring 2 px wide, all of which comes back. Grown by the ellipse, which
    # leaves out the corners, it stays so, or becomes still larger.
    shrunk = sum(size**2 - (size - 4) ** 2 for size in sizes)
    grown = 0
    for size in sizes:
        mask = torch.zeros(60, 60)
        mask[20 : 20 + size, 20 : 20 + size] = 1
        ellipse = torch.tensor([[0, 0, 1, 0, 0], *[[1] * 5] * 3, [0, 0, 1, 0, 0]])
        near = torch.nn.functional.conv2d(mask[None, None], ellipse[None, None].float(), padding=2)
        grown += int((near > 0).sum()) - size**2
    assert scores["mended_2px"] == pytest.approx(shrunk / (shrunk + grown))
    assert 0 < scores["spoilt_2px"] < far / pixels


def test_a_mistake_that_cannot_be_seen_is_none() -> None:
    """With 0.4 px between near and far nothing is ever wrong."""
    scores = refiner_scores(refiner_that_chooses(3), [square(20, K=0.4)], CPU)
    assert scores == dict.fromkeys(["spoilt_2px", "spoilt_4px", "spoilt_8px", "spoilt_exact"], 0)

"""Validation scores of renderers whose quality is known, and the pictures beside them."""

from __future__ import annotations

import math

import numpy as np
import PIL.Image
import pytest
import scipy.stats
import torch
from torch import Tensor

from evaluation.metrics import structural_similarity_map
from training.validation import (
    CONTROL_SHARES,
    LARGEST_PICTURE_SIDE,
    PICTURE_GAP,
    Validation,
    picture_grid,
    spearman_correlation,
    validate,
    without_border,
)

CPU = torch.device("cpu")


def scene(size: int = 12, width: int | None = None) -> dict[str, Tensor]:
    """Left half in focus, right half 10 pixels of blur; the target is grey where blurred."""
    width = size if width is None else width
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((3, size, width), generator=generator)
    disparity = torch.zeros(1, size, width)
    disparity[..., width // 2 :] = 0.5
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


def turn_grey_at_half_strength_already(
    image: Tensor, disparity: Tensor, df: Tensor, K: Tensor
) -> Tensor:
    return turn_grey(image, disparity, df, 2 * K)


def turn_sharp(image: Tensor, disparity: Tensor, df: Tensor, K: Tensor) -> Tensor:
    return turn_grey(image, disparity, df, 20 - K)


# -- Scores --------------------------------------------------------------------------------------


def test_identity_scores_as_identity() -> None:
    scores = validate(leave_as_it_is, [scene(), scene()], 0, CPU).scores
    assert scores["scenes"] == 2
    assert scores["psnr"] == scores["psnr_identity"]
    assert scores["psnr_blurred"] == scores["psnr_blurred_identity"]
    assert scores["psnr_in_focus"] == pytest.approx(120, abs=10)  # round trip to [-1, 1]
    assert scores["psnr_in_focus_identity"] == pytest.approx(120)  # no error at all
    assert scores["ssim"] == pytest.approx(scores["ssim_identity"], abs=1e-5)
    # What ignores K controls nothing.
    assert scores["control"] == 0 and scores["control_correlation"] == 0


def test_a_perfect_renderer() -> None:
    scores = validate(turn_grey, [scene(16)], 2, CPU).scores
    assert min(scores["psnr"], scores["psnr_blurred"]) > 100 > scores["psnr_identity"]
    assert scores["ssim"] == pytest.approx(1, abs=1e-5) and scores["ssim_identity"] < 0.9
    assert scores["control"] == 1 and scores["control_correlation"] == pytest.approx(1)


def test_control_that_is_partly_there_or_reversed() -> None:
    scores = validate(turn_grey_at_half_strength_already, [scene()], 0, CPU).scores
    # Blur of ranks 1, 2, 4, 4, 4 as K has ranks 1 to 5: 8 / sqrt(10 * 8).
    assert scores["control"] == 0
    assert scores["control_correlation"] == pytest.approx(8 / math.sqrt(80))
    scores = validate(turn_sharp, [scene()], 0, CPU).scores
    assert scores["control"] == 0 and scores["control_correlation"] == pytest.approx(-1)


def test_control_is_a_mean_over_scenes() -> None:
    def control_small_scenes(image: Tensor, disparity: Tensor, df: Tensor, K: Tensor) -> Tensor:
        renderer = turn_grey if image.shape[-1] == 12 else turn_sharp
        return renderer(image, disparity, df, K)

    scores = validate(control_small_scenes, [scene(12)] * 3 + [scene(14)], 0, CPU).scores
    assert scores["control"] == pytest.approx(3 / 4)
    assert scores["control_correlation"] == pytest.approx((3 - 1) / 4)


def test_every_share_of_K_is_rendered_once_and_in_order() -> None:
    strengths = []

    def note(image: Tensor, disparity: Tensor, df: Tensor, K: Tensor) -> Tensor:
        strengths.append(float(K))
        return turn_grey(image, disparity, df, K)

    validate(note, [scene()], 0, CPU)
    assert strengths == [0, 5, 10, 15, 20] == [20 * share for share in CONTROL_SHARES]


def test_similarity_is_that_of_the_evaluation() -> None:
    # Above 384 pixels, where piq left to itself would score a smaller picture.
    for one in (scene(40, width=50), scene(400)):
        scores = validate(leave_as_it_is, [one], 0, CPU).scores
        image, target = (
            one[name].permute(1, 2, 0).numpy().astype(np.float64) for name in ("image", "target")
        )
        # float32 sums of 121 products against float64.
        assert scores["ssim_identity"] == pytest.approx(
            structural_similarity_map(image, target)[0], abs=1e-4
        )


def test_perceptual_scores_see_photographs_in_the_range_of_losses() -> None:
    def mean_difference(prediction: Tensor, target: Tensor) -> Tensor:
        assert prediction.shape == target.shape == (1, 3, 8, 8)
        return (prediction - target).abs().mean()

    scores = validate(turn_grey, [scene()], 2, CPU, perceptual=mean_difference).scores
    image, target = (without_border(scene()[name], 2) for name in ("image", "target"))
    assert scores["lpips"] == pytest.approx(0, abs=1e-6)
    # Twice as far apart in [-1, 1] as in [0, 1].
    assert scores["lpips_identity"] == pytest.approx(2 * float((image - target).abs().mean()))
    assert "lpips" not in validate(turn_grey, [scene()], 2, CPU).scores


def test_regions_that_no_scene_has_are_absent() -> None:
    sharp = {**scene(), "K": torch.tensor(0.0)}
    scores = validate(turn_grey, [sharp], 0, CPU).scores
    assert not {"psnr_blurred", "psnr_blurred_identity", "control", "control_correlation"} & set(
        scores
    )
    assert "psnr_in_focus" in scores
    assert "ssim" not in validate(turn_grey, [scene()], 1, CPU).scores  # 10 pixels a side


def test_a_renderer_gone_astray_has_no_scores_but_is_reported() -> None:
    def astray(image: Tensor, disparity: Tensor, df: Tensor, K: Tensor) -> Tensor:
        return torch.full_like(image, math.nan)

    validation = validate(astray, [scene()], 0, CPU, pictures=1)
    assert math.isnan(validation.scores["psnr"]) and math.isnan(validation.scores["ssim"])
    assert validation.scores["control"] == 0 == validation.scores["control_correlation"]
    assert validation.grid is not None


def test_nothing_is_random() -> None:
    state = torch.get_rng_state()
    first, second = (validate(turn_grey, [scene(20)], 0, CPU, pictures=1) for _ in range(2))
    assert first.scores == second.scores
    assert first.grid is not None and second.grid is not None
    assert first.grid.tobytes() == second.grid.tobytes()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([0, 1, 2, 3, 4], [0.1, 0.3, 0.2, 0.9, 0.5]),
        ([0, 1, 2, 3, 4], [5, 5, 3, 3, 1]),
        ([2, 1, 1], [1e-9, 2e-9, -1]),
    ],
)
def test_spearman_correlation(first: list[float], second: list[float]) -> None:
    expected = scipy.stats.spearmanr(first, second).statistic
    assert spearman_correlation(first, second) == pytest.approx(expected, abs=1e-12)


def test_spearman_correlation_with_a_constant_is_none() -> None:
    assert spearman_correlation([0, 1, 2], [3, 3, 3]) == 0


# -- Pictures ------------------------------------------------------------------------------------


def shown(validation: Validation) -> np.ndarray:
    assert validation.grid is not None
    return np.asarray(validation.grid)


def occurrences(grid: np.ndarray, picture: np.ndarray) -> int:
    """How often `picture` (H, W, 3) lies in `grid`, to the last level."""
    height, width = picture.shape[:2]
    corners = np.argwhere((grid == picture[0, 0]).all(2))
    return sum(
        np.array_equal(grid[top : top + height, left : left + width], picture)
        for top, left in corners
    )


def levels(image: Tensor) -> np.ndarray:
    return image.expand(3, -1, -1).mul(255).round().byte().permute(1, 2, 0).numpy()


def test_the_grid_shows_every_part_of_a_scene() -> None:
    one = {**scene(14), "df": torch.tensor(0.1)}
    grid = shown(validate(leave_as_it_is, [one], 1, CPU, pictures=1))
    photograph, disparity, target = (
        without_border(one[name], 1) for name in ("image", "disparity", "target")
    )
    radius = (disparity - 0.1).abs() / 0.4  # white where the blur is largest
    for picture in (disparity, radius, target):
        assert occurrences(grid, levels(picture)) == 1
    # The renderer leaves the photograph as it is, which is therefore there twice.
    assert occurrences(grid, levels(photograph)) == 2


def test_scenes_of_different_sizes_share_a_grid() -> None:
    scenes = [scene(12), scene(150, width=200), scene(20)]
    two = validate(turn_grey, scenes, 0, CPU, pictures=2)
    three = validate(turn_grey, scenes, 0, CPU, pictures=5)
    assert three.scores == two.scores
    assert two.grid is not None and three.grid is not None
    assert two.grid.width == three.grid.width == 5 * 200 + 6 * PICTURE_GAP
    assert three.grid.height - two.grid.height > 20 + PICTURE_GAP  # a row with its titles
    # Rendered and ground truth are one picture here.
    assert occurrences(shown(three), levels(scenes[2]["target"])) == 2
    assert occurrences(shown(two), levels(scenes[2]["target"])) == 0
    assert validate(turn_grey, scenes, 0, CPU).grid is None
    assert validate(turn_grey, [], 0, CPU, pictures=2) == Validation({"scenes": 0}, None)


def test_large_pictures_are_shown_smaller() -> None:
    grid = validate(turn_grey, [scene(8, width=1000)], 0, CPU, pictures=1).grid
    assert grid is not None and grid.width == 5 * LARGEST_PICTURE_SIDE + 6 * PICTURE_GAP


def test_titles_do_not_overlap() -> None:
    titles = ("wider than the picture below", "another")
    pictures = {title: PIL.Image.new("RGB", (4, 4), "blue") for title in titles}
    grid = picture_grid([pictures])
    lone = [picture_grid([{title: pictures[title]}]) for title in titles]
    assert grid.width == sum(one.width for one in lone) - PICTURE_GAP
    joined = np.concatenate([np.asarray(lone[0])[:, :-PICTURE_GAP], np.asarray(lone[1])], axis=1)
    assert np.array_equal(np.asarray(grid), joined)


def test_without_border() -> None:
    image = torch.arange(25.0).reshape(1, 5, 5)
    assert torch.equal(without_border(image, 0), image)
    assert torch.equal(without_border(image, 2), image[:, 2:3, 2:3])

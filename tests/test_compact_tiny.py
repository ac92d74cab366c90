"""The trained network for phones inside the package: small, whole, and good on scenes it has not
seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bokehdiff import COMPACT_TINY, LiteBokehPipeline
from data_synthesis.layer_scenes import LayerScenes
from evaluation.compact_quality import IDENTITY, WITHOUT, compact_quality

HELD_OUT_SEED = 4242
LARGEST_FILES = 1_500_000
NAME = "compact"


@pytest.fixture(scope="module")
def pipe() -> LiteBokehPipeline:
    return LiteBokehPipeline.from_pretrained(COMPACT_TINY)


@pytest.fixture(scope="module")
def means(pipe: LiteBokehPipeline) -> dict[str, dict[str, float]]:
    """Scores on scenes like those it was trained with, by method and metric."""
    scenes = LayerScenes(
        HELD_OUT_SEED, 256, focus={"foreground": 1}, layers=(1, 2), radius=(8, 16),
        stopped_down=0.1125,
    )  # fmt: skip
    results = compact_quality({NAME: pipe.model}, [scenes[number] for number in range(6)])
    return {name: about["mean"] for name, about in results["methods"].items()}


def test_it_is_small_and_all_there() -> None:
    files = [file for file in Path(COMPACT_TINY).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= LARGEST_FILES
    assert {file.name for file in files} >= {"model_index.json", "README.md", "config.json"}


def test_it_is_nearer_to_the_truth_than_the_photo(means) -> None:
    assert means[NAME]["psnr"] > means[IDENTITY]["psnr"] + 2
    assert means[NAME]["ssim"] > means[IDENTITY]["ssim"] + 0.1


def test_it_blurs_the_background_and_not_the_subject(means) -> None:
    """In the truth both are 1; in the photo the background has four times the contrast."""
    ours, photo = means[NAME], means[IDENTITY]
    assert ours["background_contrast"] < 0.6 * photo["background_contrast"]
    assert ours["sharpness"] > 0.5


def test_the_enhancement_makes_the_subject_sharper_and_leaves_the_rest(means) -> None:
    assert means[NAME]["sharpness"] > means[NAME + WITHOUT]["sharpness"]
    assert means[NAME]["background_error"] < 1.05 * means[NAME + WITHOUT]["background_error"]


def test_real_photographs_keep_their_colours(pipe, shared_root: Path) -> None:
    """Over large areas a lens moves no light away."""
    photo = shared_root / "data" / "photos" / "bokehme_21.jpg"
    blurred = pipe(photo, output_type="pt").images
    from bokehdiff import read_image

    image = read_image(photo)
    assert blurred.shape == image.shape
    areas, wanted = (
        torch.nn.functional.adaptive_avg_pool2d(one, 4).numpy() for one in (blurred, image)
    )
    assert np.abs(areas - wanted).mean() < 0.03

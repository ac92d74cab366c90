"""A photograph through a pipeline: the same circles of confusion in the unit that it takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from bokehdiff import BokehDiffPipeline
from evaluation.methods import method_by_name
from evaluation.pipeline_rendering import render_with
from tests.evaluation.three_planes import three_planes
from tests.trained_pipelines import base_pipeline


def test_as_the_method_of_its_folder(tmp_path: Path) -> None:
    base_pipeline().save_pretrained(tmp_path)
    pipeline = BokehDiffPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    photograph = three_planes()
    picture = render_with(pipeline, photograph)
    assert picture.shape == (120, 240, 3) and picture.dtype == np.float64
    np.testing.assert_array_equal(picture, method_by_name(str(tmp_path)).render(photograph))


def test_the_unit_of_disparity_does_not_matter() -> None:
    photograph = three_planes(df=0.5)
    # The same scene in another unit: 2 d + 1, so K halves.
    stretched = dataclasses.replace(
        photograph,
        disparity=2 * photograph.disparity + 1,
        disparity_range=(1.4, 2.6),
        df=2.0,
        K=10.0,
    )
    pipeline = base_pipeline()
    np.testing.assert_allclose(
        render_with(pipeline, stretched), render_with(pipeline, photograph), atol=1e-4
    )


def test_a_focus_outside_of_the_scene_is_kept() -> None:
    # df 0.9 in front of everything: the range is widened to it, and nothing is in focus.
    pipeline, photograph = base_pipeline(), three_planes(df=0.9)
    wide = dataclasses.replace(photograph, disparity_range=(0.2, 0.9))
    np.testing.assert_array_equal(render_with(pipeline, photograph), render_with(pipeline, wide))

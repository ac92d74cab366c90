"""Contact sheets: the right photographs in the right cells, and errors in colours of their size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.photographs import Photograph
from evaluation.reports.contact_sheet import (
    BRIGHTEST_ERROR,
    CELL_WIDTH,
    GAP,
    TEXT_LINE,
    choose,
    error_map,
    make_contact_sheet,
)
from tests.evaluation.reports import example_results

HEIGHT, WIDTH = 30, 40
SHOWN_HEIGHT = CELL_WIDTH * HEIGHT // WIDTH


def flat(colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((HEIGHT, WIDTH, 3), colour, np.uint8)


def photograph(scene: str, setting: str, number: int) -> Photograph:
    return Photograph(
        scene=scene,
        setting=setting,
        image=flat((200, number, 0)),
        disparity=np.zeros((HEIGHT, WIDTH), np.float32),
        disparity_range=(0.0, 1.0),
        df=0.5,
        K=20.0,
        truth=flat((0, 200, number)),
    )


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """tiny is right but for 16 levels, scatter 255 levels off in one channel of three."""
    for row in example_results.comparison()["methods"]["tiny"]["rows"]:
        name = f"{row['scene']}_{row['setting']}.png"
        for method, colour in (("tiny", (16, 216, 16)), ("scatter", (255, 200, 0))):
            (tmp_path / method).mkdir(exist_ok=True)
            Image.fromarray(flat(colour)).save(tmp_path / method / name)
    return tmp_path


def photographs() -> list[Photograph]:
    rows = example_results.comparison()["methods"]["tiny"]["rows"]
    return [photograph(row["scene"], row["setting"], i) for i, row in enumerate(rows)]


def test_worst_median_and_best_are_chosen_whichever_way_the_metric_points() -> None:
    results = example_results.comparison()
    assert [(c.why, c.name) for c in choose(results, "tiny", "psnr")] == [
        ("worst of tiny by psnr", "s02_f0_r06"),
        ("median of tiny by psnr", "s01_f1_r14"),
        ("best of tiny by psnr", "s02_f1_r14"),
    ]
    assert choose(results, "tiny", "lpips")[0].name == "s02_f0_r06"
    results["methods"]["tiny"]["rows"] = results["methods"]["tiny"]["rows"][:1]
    assert [c.why for c in choose(results, "tiny", "psnr")] == ["worst of tiny by psnr"]


def test_mistakes_are_named(pictures: Path) -> None:
    results = example_results.comparison()
    with pytest.raises(ValueError, match="no method layered; wanted one of tiny, identity"):
        choose(results, "layered", "psnr")
    with pytest.raises(ValueError, match="no figures of tiny for ssim; wanted one of psnr, lpips"):
        choose(results, "tiny", "ssim")
    with pytest.raises(ValueError, match="no photograph s02_f0_r06, s02_f1_r14; wanted the one"):
        make_contact_sheet(results, photographs()[:2], pictures, "tiny", "lpips")
    (pictures / "scatter" / "s02_f0_r06.png").unlink()
    with pytest.raises(ValueError, match="scatter/s02_f0_r06.png is missing"):
        make_contact_sheet(results, photographs(), pictures, "tiny", "psnr")
    Image.fromarray(flat((0, 0, 0))[:20]).save(pictures / "scatter" / "s02_f0_r06.png")
    with pytest.raises(ValueError, match="wanted the same size"):
        make_contact_sheet(results, photographs(), pictures, "tiny", "psnr")


def test_sheet_shows_photo_truth_methods_and_errors(pictures: Path) -> None:
    sheet = make_contact_sheet(
        example_results.comparison(), iter(photographs()), pictures, "tiny", "psnr"
    )
    shown = np.asarray(sheet.picture).astype(int)
    block = 2 * TEXT_LINE + 2 * (SHOWN_HEIGHT + GAP) + GAP
    assert shown.shape == (3 * block, 4 * (CELL_WIDTH + GAP) + GAP, 3)

    def cell(row: int, column: int, below: bool) -> np.ndarray:
        """The middle of a cell."""
        top = row * block + 2 * TEXT_LINE + (SHOWN_HEIGHT + GAP) * below
        left = GAP + column * (CELL_WIDTH + GAP)
        return shown[top + SHOWN_HEIGHT // 2, left + CELL_WIDTH // 2]

    # s02_f0_r06 is photograph 2, s01_f1_r14 is 1, s02_f1_r14 is 3.
    for row, number in enumerate((2, 1, 3)):
        assert tuple(cell(row, 0, False)) == (200, number, 0)
        assert tuple(cell(row, 1, False)) == (0, 200, number)
        assert tuple(cell(row, 2, False)) == (16, 216, 16)
        assert tuple(cell(row, 3, False)) == (255, 200, 0)
        expected = error_map(flat((16, 216, 16)), flat((0, 200, number)))[0, 0]
        assert tuple(cell(row, 2, True)) == tuple(expected)
        assert tuple(cell(row, 3, True)) == tuple(
            error_map(flat((255, 0, 0)), flat((0, 0, 0)))[0, 0]
        )
    assert "s02_f0_r06, the worst of tiny by psnr" in sheet.words
    assert "identity" not in sheet.words, "the photograph is shown once"


def test_error_map_grows_brighter_up_to_its_end() -> None:
    truth = flat((0, 0, 0))
    brightness = [
        error_map(flat((level, level, level)), truth).astype(int).sum()
        for level in (0, 8, 16, 32, 48, BRIGHTEST_ERROR)
    ]
    assert brightness == sorted(set(brightness))
    brightest = error_map(flat((BRIGHTEST_ERROR,) * 3), truth)
    assert (error_map(flat((255, 255, 255)), truth) == brightest).all()
    # An error of one channel counts a third, and its sign does not count.
    one, third = flat((30, 0, 0)), flat((10, 10, 10))
    assert (error_map(one, truth) == error_map(truth, third)).all()

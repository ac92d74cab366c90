"""Results as files, and the differences of methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.report import printed
from evaluation.results import (
    KINDS,
    add_differences,
    read_results,
    summary_of_rows,
    write_results,
)


def row(scene: str, setting: str, **figures: Any) -> dict[str, Any]:
    return {
        "scene": scene,
        "setting": setting,
        "K": 20.0,
        "seconds": 0.5,
        "peak_memory_bytes": None,
        **figures,
    }


def results() -> dict[str, Any]:
    rows = {
        "identity": [row("a", "f0", psnr=20.0), row("b", "f0", psnr=21.0), row("b", "f1")],
        "mine": [row("a", "f0", psnr=30.0), row("b", "f0", psnr=32.0), row("b", "f1", psnr=1.0)],
    }
    metrics = {"psnr": {"better": "higher", "unit": "dB", "description": "on sRGB"}}
    return {
        "kind": "comparison",
        "title": "Two scenes",
        "protocol": "As it says.",
        "command": "python -m evaluation compare ...",
        "dataset": {"name": "triples", "scenes": ["a", "b"], "images": 3},
        "hardware": {
            "processor": "A processor", "torch_threads": 1, "dtype": "float32", "torch": "2",
        },
        "metrics": metrics,
        "methods": {
            name: {"description": f"what {name} is", "rows": own, **summary_of_rows(own, metrics)}
            for name, own in rows.items()
        },
    }  # fmt: skip


def test_means_are_over_the_photographs_that_have_the_metric() -> None:
    rows = [row("a", "f0", psnr=20.0), row("b", "f0", psnr=30.0), row("b", "f1")]
    rows[1] |= {"seconds": 1.5, "peak_memory_bytes": 7}
    rows[2] |= {"seconds": None, "peak_memory_bytes": 5}
    summary = summary_of_rows(rows, ["psnr", "ssim"])
    assert summary["mean"] == {"psnr": 25.0}
    assert summary["interval"] == {"psnr": [20.0, 30.0], "ssim": None}
    assert summary["seconds_per_image"] == 1.0 and summary["peak_memory_bytes"] == 7
    untimed = summary_of_rows([rows[2]], [])
    assert untimed["seconds_per_image"] is None and untimed["peak_memory_bytes"] == 5


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    for kind in KINDS:
        write_results(file, {**results(), "kind": kind})
        assert read_results(file) == {**results(), "kind": kind}
    assert [one.name for one in tmp_path.iterdir()] == ["results.json"]


def test_a_figure_that_is_no_number_leaves_the_older_file(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    write_results(file, results())
    broken = results()
    broken["methods"]["mine"]["mean"]["psnr"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results(file, broken)
    assert read_results(file) == results()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "There is no file"),
        ("{", "not valid JSON"),
        ("[]", "holds no results"),
        ('{"kind": "recipe"}', "holds no results of comparison, robustness"),
        ('{"benchmark": "raytraced", "results": {}}', "holds no results"),
        ('{"kind": "comparison", "title": ""}', "lacks protocol, command, dataset"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str | None, words: str) -> None:
    file = tmp_path / "other.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=words) as refusal:
        read_results(file)
    assert "other.json" in str(refusal.value) and "--out of" in str(refusal.value)


def test_differences_are_photograph_by_photograph() -> None:
    compared = results()
    add_differences(compared, "identity")
    # The third photograph has a figure of one method only.
    assert compared["methods"]["mine"]["difference"] == {
        "psnr": {"mean": 10.5, "interval": [10.0, 11.0]}
    }
    assert "difference" not in compared["methods"]["identity"]
    assert compared["against"] == "identity"
    json.dumps(compared, allow_nan=False)
    with pytest.raises(ValueError, match="no method theirs; wanted one of identity, mine"):
        add_differences(compared, "theirs")


def test_printed_results_say_everything() -> None:
    compared = results()
    add_differences(compared, "identity")
    text = printed(compared)
    lines = text.splitlines()
    assert lines[0] == "Two scenes"
    (heading, mine) = (
        next(line for line in lines if line.startswith(start)) for start in ("|  ", "| mine")
    )
    assert "psnr, dB" in heading and "21.00 (16.50 to 30.00)" in mine
    assert len(heading) == len(mine), "columns stand under each other"
    assert "+10.50 (+10.00 to +11.00)" in text
    for words in ("what mine is.", "on sRGB.", "As it says.", "A processor, 1 thread(s)"):
        assert words in text
    assert lines[-1] == "python -m evaluation compare ..."

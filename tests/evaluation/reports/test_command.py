"""``report`` as it is called: a page of results, and documents checked against measurements."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_synthesis.benchmark import write_benchmark
from evaluation.reports.command import add_arguments, check_numbers, difference_table, run
from evaluation.reports.documented_numbers import RAYTRACED_DATA
from evaluation.reports.markers import Difference
from evaluation.reports.measuring import Measurement
from evaluation.reports.quoted_numbers import Block, QuotedNumbers
from tests.evaluation.reports import example_results


def parsed(*arguments: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(list(map(str, arguments)))


def saved(folder: Path, results: dict[str, Any], name: str = "") -> Path:
    file = folder / f"{name or results['kind']}.json"
    file.write_text(json.dumps(results))
    return file


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    write_benchmark("synbokeh300", folder, count=1, size=128)
    return folder


# --- Results ------------------------------------------------------------------------------------


def test_results_of_every_kind_become_tables_plots_and_one_page(tmp_path: Path) -> None:
    files = [saved(tmp_path, make()) for make in example_results.EVERY_KIND]
    out = tmp_path / "out"
    assert run(parsed(*files, "--out", out)) == 0
    made = {file.name for file in out.iterdir()}
    for file in files:
        assert {f"{file.stem}.md", f"{file.stem}.summary.json"} <= made
        assert any(name.startswith(f"{file.stem}_") and name.endswith(".png") for name in made)
    page = (out / "index.html").read_text(encoding="utf-8")
    assert all(make()["title"] in page for make in example_results.EVERY_KIND)
    assert run(parsed(files[-1], "--out", out)) == 0, "a report is replaced by the next"


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    file = saved(tmp_path, example_results.comparison())
    with pytest.raises(ValueError, match="holds files that no report wrote; wanted a new folder"):
        run(parsed(file, "--out", tmp_path))
    with pytest.raises(ValueError, match="is a file; wanted a folder"):
        run(parsed(file, "--out", file))
    assert list(tmp_path.iterdir()) == [file]


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path, example_results.comparison())
    out = tmp_path / "out"
    other = saved(tmp_path, example_results.robustness())
    (tmp_path / "more").mkdir()
    twin = saved(tmp_path / "more", example_results.comparison())
    for arguments, message in [
        ([file, "--write"], "--write means nothing with RESULTS; leave it out"),
        ([file, "--only", "raytraced"], "--only means nothing with RESULTS"),
        (["--pictures", tmp_path], "--pictures means nothing without RESULTS"),
        ([file, "--pictures", tmp_path], "wants the RESULTS of one .* 1 RESULTS were .*no --data"),
        ([file, other, "--metric", "psnr"], "2 RESULTS were given, no --pictures, no --data"),
        ([file, twin], "Two files of results are called comparison"),
        ([tmp_path / "none.json"], "none.json"),
        (["--processes", "0"], "--processes is 0; wanted at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(parsed(*arguments, "--out", out))
    assert not out.exists()


def test_contact_sheet_of_a_data_set(benchmark: Path, tmp_path: Path) -> None:
    settings = json.loads((benchmark / "s000" / "meta.json").read_text())["configs"]
    results = example_results.comparison()
    results["dataset"] = {"name": "synbokeh300", "scenes": ["s000"], "images": len(settings)}
    for name, method in results["methods"].items():
        method["rows"] = [
            example_results.row("s000", setting["id"], 30.0 + number, 0.1)
            for number, setting in enumerate(settings)
        ]
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for setting in settings:
            picture = Image.open(benchmark / "s000" / "aif.png")
            picture.save(tmp_path / "pictures" / name / f"s000_{setting['id']}.png")
    file = saved(tmp_path, results)
    out = tmp_path / "out"
    options = ["--pictures", tmp_path / "pictures", "--data", benchmark, "--method", "tiny"]
    assert run(parsed(file, *options, "--out", out)) == 0
    with Image.open(out / "comparison_sheet.png") as sheet:
        assert np.asarray(sheet.convert("L")).std() > 5
    page = (out / "index.html").read_text(encoding="utf-8")
    assert f"s000_{settings[0]['id']}, the worst of tiny by psnr" in page


# --- Numbers ------------------------------------------------------------------------------------


@pytest.fixture
def numbers(tmp_path: Path) -> QuotedNumbers:
    """A document that quotes two decimals of two measurements, all wrong."""
    block = "<!-- numbers: {} -->\n0.00 dB\n<!-- end -->\n"
    (tmp_path / "a.md").write_text("# A\n" + block.format("scatter") + block.format("gaussian"))

    def command(*more: str) -> tuple[str, ...]:
        return ("compare", "synbokeh300", RAYTRACED_DATA, *more, "--metric", "psnr")

    def text(method: str) -> Any:
        return lambda results: f"{results['methods'][method]['mean']['psnr']:.2f} dB"

    return QuotedNumbers(
        tmp_path,
        {
            "scatter": Block("a.md", "scatter", text("scatter")),
            "gaussian": Block("a.md", "gaussian", text("gaussian")),
        },
        {
            "scatter": Measurement("a scatter", 1, command("--method", "scatter")),
            "gaussian": Measurement("the best Gaussian", 1, command("--method", "gaussian")),
        },
    )


@pytest.mark.slow
def test_what_differs_fails_and_can_be_written(
    numbers: QuotedNumbers, benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def check(*options: str) -> int:
        arguments = parsed("--raytraced", benchmark, "--processes", "1", *options)
        return check_numbers(arguments, out, numbers)

    assert check() == 1
    said = capsys.readouterr().out
    assert (
        "a.md:3 (scatter)" in said
        and "a.md:6 (gaussian)" in said
        and "Places that differ: 2." in said
    )
    assert "scatter: a scatter (about 1 min on one thread). python -m evaluation compare" in said
    assert (out / "scatter.json").is_file() and (out / "index.html").is_file()

    document = tmp_path / "a.md"
    before = document.read_text()
    assert before.count("0.00 dB") == 2, "without --write nothing is rewritten"
    assert check("--write") == 0
    assert "Rewritten: a.md" in capsys.readouterr().out
    assert document.read_text().count("0.00 dB") == 0
    assert check() == 0
    assert "What is quoted is what was measured. 2 blocks" in capsys.readouterr().out


@pytest.mark.slow
def test_processes_measure_the_same(
    numbers: QuotedNumbers, benchmark: Path, tmp_path: Path
) -> None:
    arguments = parsed("--raytraced", benchmark, "--processes", "2", "--write")
    assert check_numbers(arguments, tmp_path / "out", numbers) == 0
    arguments = parsed("--raytraced", benchmark, "--processes", "1")
    assert check_numbers(arguments, tmp_path / "out", numbers) == 0


def test_a_measurement_that_fails_says_why(
    numbers: QuotedNumbers, benchmark: Path, tmp_path: Path
) -> None:
    broken = Measurement(
        "nothing", 1, ("compare", "synbokeh300", RAYTRACED_DATA, "--method", "none")
    )
    numbers = QuotedNumbers(numbers.folder, numbers.blocks, {"scatter": broken})
    arguments = parsed("--raytraced", benchmark)
    arguments.only = ["scatter"]
    with pytest.raises(ValueError, match="The measurement scatter failed .*--method none"):
        check_numbers(arguments, tmp_path / "out", numbers)


def test_missing_benchmark_is_named(tmp_path: Path) -> None:
    arguments = parsed("--only", "raytraced", "--raytraced", tmp_path / "none")
    numbers = QuotedNumbers(
        tmp_path,
        {"raytraced": Block("a.md", "raytraced", lambda results: "")},
        {"raytraced": Measurement("it", 1, ("compare", RAYTRACED_DATA))},
    )
    (tmp_path / "a.md").write_text("<!-- numbers: raytraced -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="There is no ray-traced benchmark at .*none; wanted"):
        check_numbers(arguments, tmp_path / "out", numbers)


def test_differences_are_a_table() -> None:
    lines = difference_table(
        [
            Difference("a.md:3 (x)", "36.17", "36.10"),
            Difference("a.md:40 (x)", "", "| new |"),
            Difference("a.md:3 (x)", "1.00", "1.01", rounding=True),
        ]
    ).splitlines()
    assert lines == [
        "place        quoted   measured",
        "a.md:3 (x)   36.17    36.10",
        "a.md:40 (x)  nothing  | new |",
        "a.md:3 (x)   1.00     1.01      rounding",
    ]

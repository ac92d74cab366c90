"""Tables: what is printed, what is bold, and that nothing from a file can break them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from evaluation.reports.tables import (
    as_document,
    as_markdown,
    comparison_table,
    methods_in_order,
    shown,
    signed,
    summary,
    tables_of,
)
from tests.evaluation.reports import example_results


def test_comparison_says_means_intervals_and_the_best() -> None:
    table = comparison_table(example_results.comparison())
    assert as_markdown(table).splitlines() == [
        "|  | psnr, dB ↑ | lpips ↓ | s per image ↓ |",
        "| --- | --- | --- | --- |",
        "| identity | 19.50 (19.00 to 20.00) | 0.400 | 0.001 |",
        "| tiny | **35.00 (33.00 to 36.50)** | 0.130 | 0.8 |",
        "| scatter | 34.00 | **0.100** | 0.2 |",
    ]
    assert "4 images of 2 scenes" in table.caption


def test_the_identity_comes_first_and_the_others_as_they_were_given() -> None:
    assert methods_in_order(example_results.comparison()) == ["identity", "tiny", "scatter"]


def test_what_prints_the_same_is_best_together_and_a_column_of_equals_has_no_best() -> None:
    results = example_results.comparison()
    results["methods"]["scatter"]["mean"]["psnr"] = 34.996
    best = [[cell.best for cell in row] for row in comparison_table(results, ["psnr"]).rows]
    assert [row[1] for row in best] == [False, True, True]
    for name in results["methods"]:
        results["methods"][name]["mean"]["psnr"] = 30.0
    assert not any(cell.best for row in comparison_table(results).rows for cell in row[:2])


def test_a_figure_that_is_not_defined_is_a_dash() -> None:
    results = example_results.comparison()
    del results["methods"]["scatter"]["mean"]["psnr"]
    results["methods"]["scatter"]["interval"]["psnr"] = None
    assert comparison_table(results).rows[2][1].text == "-"


def test_differences_from_one_method_have_a_table_of_their_own() -> None:
    results = example_results.comparison()
    results["against"] = "scatter"
    results["methods"]["tiny"]["difference"] = {
        "psnr": {"mean": 1.0, "interval": [-0.5, 1.25]},
        "lpips": {"mean": 0.03, "interval": None},
    }
    results["methods"]["identity"]["difference"] = {"psnr": {"mean": -14.5, "interval": None}}
    _, table = tables_of(results)
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["identity", "-14.50", "-"],
        ["tiny", "+1.00 (-0.50 to +1.25)", "+0.030"],
    ]
    assert table.caption.startswith("Difference from scatter, image by image")


def test_robustness_has_ascending_levels_and_quartiles() -> None:
    (table,) = tables_of(example_results.robustness())
    assert table.headings == [
        "",
        *(f"eroded {level} ↓" for level in ("1 px", "2 px", "4 px", "8 px")),
        *(f"dilated {level} ↓" for level in ("1 px", "2 px", "4 px", "8 px")),
    ]
    tiny, scatter = table.rows
    assert tiny[4].text == "0.80 (0.40 to 1.60)" and tiny[4].best
    assert scatter[8].text == "3.20 (1.60 to 6.40)" and not scatter[8].best


def test_ablations_say_what_changes() -> None:
    results = example_results.ablations()
    (table,) = tables_of(results)
    assert [cell.text for cell in table.rows[1]] == [
        "no_occlusion", "34.00", "-1.00", "0.100", "-0.030",
    ]  # fmt: skip
    assert table.rows[2][2].text == "0.00", "a change that prints as zero has no sign"
    results["methods"]["no_occlusion"]["difference"] = {
        "psnr": {"mean": -1.0, "interval": [-1.5, 0.001]}
    }
    (table,) = tables_of(results)
    assert table.rows[1][2].text == "-1.00 (-1.50 to 0.00)"


def test_controllability() -> None:
    (table,) = tables_of(example_results.controllability())
    assert [cell.text for cell in table.rows[0]] == ["tiny", "0.9987", "0.9910", "1.0000"]


def test_numbers_have_two_decimals_with_a_unit_and_three_without() -> None:
    assert shown(36.166, "dB") == "36.17" and shown(0.95649, "") == "0.956"
    assert shown(None, "dB") == "-" == signed(None, "dB")
    assert signed(0.126, "dB") == "+0.13" and signed(-0.004, "dB") == "0.00"
    assert shown(-0.004, "dB") == "0.00" and shown(-0.006, "dB") == "-0.01"


@pytest.mark.parametrize("make", example_results.EVERY_KIND)
def test_document_says_protocol_metrics_methods_and_command(
    make: Callable[[], dict[str, Any]],
) -> None:
    results = make()
    document = as_document(results)
    assert document.startswith(f"# {results['title']}\n")
    for words in (results["protocol"], results["command"], "A processor, 1 thread(s), float32"):
        assert words in document
    for name in [*results["metrics"], *results["methods"]]:
        assert f"- {name}: " in document
    widths = {line.count("|") for line in document.splitlines() if line.startswith("|")}
    assert len(widths) == 1, "every row of a table has the same number of cells"


def test_names_from_files_cannot_break_the_table() -> None:
    results = example_results.comparison()
    results["methods"]["a|b\n<b>*x*"] = results["methods"].pop("scatter")
    lines = as_markdown(comparison_table(results)).splitlines()
    assert len(lines) == 5
    assert lines[-1].startswith(r"| a\|b &lt;b>\*x\* | ")


def test_summary_is_everything_but_the_rows_and_is_plain_json() -> None:
    results = example_results.comparison()
    short = json.loads(json.dumps(summary(results), allow_nan=False))
    assert short["methods"]["tiny"]["mean"] == results["methods"]["tiny"]["mean"]
    assert "rows" not in short["methods"]["tiny"] and "rows" in results["methods"]["tiny"]
    assert short["protocol"] == results["protocol"]


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind 'speed'; wanted comparison, robustness"):
        tables_of({**example_results.comparison(), "kind": "speed"})

"""The texts of the blocks of documents, made of results written by hand."""

from __future__ import annotations

from typing import Any

from evaluation.metrics import METRICS
from evaluation.reports.documented_numbers import (
    ABLATION_METRICS,
    BLOCKS,
    MEASUREMENTS,
    RAYTRACED_METRICS,
    SYNBOKEH_METRICS,
)
from tests.evaluation.reports import example_results

Results = dict[str, Any]


def comparison(metrics: tuple[str, ...], methods: dict[str, float]) -> Results:
    """Every metric in dB is the method's number, at level 14 one more, at 28 one less; every
    metric without a unit is a hundredth of it."""
    results = example_results.comparison()
    results["metrics"] = {
        name: {"better": METRICS[name].better, "unit": METRICS[name].unit, "description": ""}
        for name in metrics
    }
    results["methods"] = {}
    for name, number in methods.items():
        rows = []
        for index, (level, change) in enumerate([(6, 0), (14, 1), (28, -1)]):
            figures = {m: number + change if METRICS[m].unit else number / 100 for m in metrics}
            rows.append({"scene": f"s0{index}", "setting": "f0", "level": level, **figures})
        results["methods"][name] = {
            "description": name,
            "rows": rows,
            "mean": {m: number if METRICS[m].unit else number / 100 for m in metrics},
            "interval": {},
            "seconds_per_image": 1.0,
        }
    return results


RAYTRACED = {
    "identity": 40.0,
    "gaussian": 25.0,
    "scatter": 35.09,
    "tiny": 36.5,
    "pyramid": 36.4,
    "layered": 37.0,
    "layered+boost": 36.0,
}


def test_raytraced_table() -> None:
    lines = BLOCKS["raytraced"].text(comparison(RAYTRACED_METRICS, RAYTRACED)).splitlines()
    assert len(lines) == 2 + len(RAYTRACED)
    assert lines[0].startswith("|  | all | SSIM | radius 6 | 14 | 28 | near depth edges |")
    assert lines[2].startswith("| the photo itself | 40.00 | 0.400 | 40.00 | 41.00 | 39.00 | 40.00")
    assert (
        '| `render_bokeh(method="scatter")` | 35.09 | 0.351 | 35.09 | 36.09 | 34.09 |' in lines[4]
    )
    assert "**" not in lines[2], "the photo itself takes no part in being the best"
    assert lines[7].count("**37.00**") == 7 and lines[7].count("**38.00**") == 1
    assert sum(line.count("**") for line in lines) == 2 * 11, "one best in each column"


def test_headline_has_the_same_methods_in_fewer_columns() -> None:
    lines = BLOCKS["headline"].text(comparison(RAYTRACED_METRICS, RAYTRACED)).splitlines()
    assert len(lines) == 2 + len(RAYTRACED)
    assert lines[0] == "|  | PSNR, dB | near depth edges | in focus | SSIM |"
    assert lines[3] == ("| best Gaussian, chosen with the truth | 25.00 | 25.00 | 25.00 | 0.250 |")


def test_model_card_paragraph() -> None:
    text = BLOCKS["tiny_card"].text(comparison(RAYTRACED_METRICS, RAYTRACED))
    assert "4 images of 2 scenes" in text and "36.50 (depth-ordered\nscatter 35.09" in text
    assert "SSIM 0.365 (0.351, 0.400)." in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100


def test_linear_sentence() -> None:
    text = BLOCKS["raytraced_linear"].text(comparison(("psnr",), RAYTRACED))
    assert " ".join(text.split()).endswith("layered 37.00 dB, pyramid 36.40, scatter 35.09.")


def test_synbokeh_says_which_is_the_worst() -> None:
    names = ("identity", "scatter", "tiny", "pyramid", "layered")
    results = comparison(SYNBOKEH_METRICS, {name: RAYTRACED[name] for name in names})
    table, sentence = BLOCKS["synbokeh"].text(results).split("\n\n")
    assert len(table.splitlines()) == 2 + 5
    assert " ".join(sentence.split()) == (
        "The worst of these 4 pictures of `TINY` is s02_f0, 35.50 dB."
    )


def test_robustness_table() -> None:
    results = example_results.robustness()
    for method in results["methods"].values():
        for levels in method["drops"].values():
            for figures in levels.values():
                figures["psnr_nohl"] = figures.pop("psnr")
    for name, start in (("tiny", 36.0), ("scatter", 35.0)):
        results["methods"][name]["rows"] = [
            {"corruption": corruption, "corruption_level": level, "psnr_nohl": start - level + more}
            for corruption in ("erode", "dilate")
            for level in (1, 2, 4, 8)
            for more in (-1, 1)
        ]
    lines = BLOCKS["robustness"].text(results).splitlines()
    assert len(lines) == 2 + 8
    assert lines[2] == (
        "| eroded by 1 px | **0.10 (0.05 to 0.20)** | 0.20 (0.10 to 0.40) | **35.00** | 34.00 |"
    )
    assert lines[9].startswith("| dilated by 8 px | **1.60 (0.80 to 3.20)** |")
    assert lines[9].endswith("| **28.00** | 27.00 |")


def test_ablation_table_says_the_whole_and_then_changes() -> None:
    results = example_results.ablations()
    for name, method in results["methods"].items():
        change = method.pop("change")["psnr"]
        method["mean"] = {metric: 35.0 + change for metric in ABLATION_METRICS}
        if name != "full":
            method["change"] = {metric: change for metric in ABLATION_METRICS}
    lines = BLOCKS["ablations"].text(results).splitlines()
    assert lines[2] == "| full | the method tiny | 35.00 | 35.00 | 35.00 |"
    assert lines[3] == "| no_occlusion | the method scatter | -1.00 | -1.00 | -1.00 |"
    assert lines[4] == "| T_249 | the method tiny | 0.00 | 0.00 | 0.00 |"


def test_control_sentence() -> None:
    text = BLOCKS["controllability"].text(example_results.controllability())
    assert "is 0.9987 (at least 0.9910 in each photograph)" in " ".join(text.split())
    assert "the sharpest in 100.0 % of the scenes." in " ".join(text.split())


def test_every_metric_that_is_asked_for_exists() -> None:
    for measurement in MEASUREMENTS.values():
        words = measurement.arguments
        for option, value in zip(words, words[1:], strict=False):
            assert option != "--metric" or value in METRICS


def test_no_text_has_trailing_spaces_or_markers() -> None:
    text = BLOCKS["raytraced"].text(comparison(RAYTRACED_METRICS, RAYTRACED))
    assert "<!--" not in text and not text.endswith("\n")
    assert all(line == line.rstrip() for line in text.splitlines())

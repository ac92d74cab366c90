"""The numbers that README, documentation and model card quote: how each is measured and written.

Blocks between ``<!-- numbers: NAME -->`` and ``<!-- end -->`` hold what :data:`BLOCKS` makes of
:data:`MEASUREMENTS`. Seconds depend on the machine and stand in no block.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evaluation.reports.measuring import Measurement
from evaluation.reports.quoted_numbers import Block, QuotedNumbers
from evaluation.reports.tables import (
    CORRUPTED,
    IDENTITY,
    Cell,
    Results,
    Table,
    as_markdown,
    marked_cells,
    shown,
    signed,
)

__all__ = [
    "BLOCKS",
    "MEASUREMENTS",
    "RAYTRACED_DATA",
    "SYNBOKEH_DATA",
    "SYNBOKEH_SCENES",
    "SYNBOKEH_SIZE",
    "DOCUMENTED_NUMBERS",
]

REPOSITORY = Path(__file__).resolve().parents[2]
README = "README.md"
EVALUATION_PAGE = "docs/evaluation.md"
MODEL_CARD = "bokehdiff/assets/tiny/README.md"
LINE_LENGTH = 100

RAYTRACED_DATA = "DATA"
"""Word of commands for the folder of the ray-traced benchmark."""
SYNBOKEH_DATA = "SYNBOKEH300"
"""Word of commands for the folder of our SYNBOKEH300."""
SYNBOKEH_SCENES = 12
"""How many of its scenes are made and measured: the first ones."""
SYNBOKEH_SIZE = 256
"""Their height and width in pixels: half of the benchmark's, so that more scenes fit the time."""

RAYTRACED_METRICS = (
    "psnr_nohl",
    "ssim_nohl",
    "psnr_edge_nohl",
    "psnr_blurred_nohl",
    "psnr_infocus",
    "psnr",
    "ssim",
    "psnr_edge",
)
ABLATION_METRICS = ("psnr_nohl", "psnr_edge_nohl", "psnr")
SYNBOKEH_METRICS = ("psnr", "ssim", "psnr_edge", "psnr_blurred", "psnr_infocus")

BOKEHME = "evaluation.other_systems:bokehme_scatter"

NAMES = {
    IDENTITY: "the photo itself",
    "gaussian": "best Gaussian, chosen with the truth",
    BOKEHME: "classical renderer of BokehMe, from its equations",
    "scatter": '`render_bokeh(method="scatter")`',
    "tiny": "`bokehdiff.TINY`",
    "pyramid": '`render_bokeh(method="pyramid")`, a preview',
    "layered": '`render_bokeh(method="layered")`',
    "layered+boost": 'the same with `highlights="boost"`',
}
"""How documents call the methods."""


def _options(option: str, values: Sequence[str]) -> tuple[str, ...]:
    return tuple(word for value in values for word in (option, value))


MEASUREMENTS: dict[str, Measurement] = {
    "raytraced": Measurement(
        "every renderer on the ray-traced benchmark",
        3,
        (
            "compare",
            "raytraced",
            RAYTRACED_DATA,
            *_options(
                "--method",
                ["gaussian", BOKEHME, "scatter", "tiny", "pyramid", "layered", "layered+boost"],
            ),
            *_options("--metric", RAYTRACED_METRICS),
        ),
        sheet=("tiny", "psnr_nohl"),
    ),
    "raytraced_linear": Measurement(
        "the classical renderers on linear light that is not cut off at white",
        1,
        (
            "compare",
            "raytraced",
            RAYTRACED_DATA,
            *_options("--method", ["layered", "pyramid", "scatter"]),
            *("--input", "linear", "--metric", "psnr"),
        ),
    ),
    "robustness": Measurement(
        "what is lost when the disparity is eroded or dilated",
        10,
        (
            "robustness",
            "raytraced",
            RAYTRACED_DATA,
            *_options("--method", ["tiny", "scatter"]),
            *("--metric", "psnr_nohl", "--corruption", "erode", "--corruption", "dilate"),
            *("--levels", "1,2,4,8"),
        ),
    ),
    "ablations": Measurement(
        "what each part of PISA is worth to the embedded model",
        6,
        ("ablations", "raytraced", RAYTRACED_DATA, *_options("--metric", ABLATION_METRICS)),
    ),
    "controllability": Measurement(
        "whether blur follows K and focus follows df",
        6,
        ("controllability", "raytraced", RAYTRACED_DATA, "--method", "tiny"),
    ),
    "synbokeh": Measurement(
        "the renderers on layer scenes (python -m data_synthesis benchmark --count "
        f"{SYNBOKEH_SCENES} --size {SYNBOKEH_SIZE} --out {SYNBOKEH_DATA})",
        3,
        (
            "compare",
            "synbokeh300",
            SYNBOKEH_DATA,
            "--scenes",
            ",".join(f"s{index:03d}" for index in range(SYNBOKEH_SCENES)),
            *_options("--method", ["scatter", "tiny", "pyramid", "layered"]),
            *_options("--metric", SYNBOKEH_METRICS),
        ),
        sheet=("tiny", "psnr"),
    ),
}
"""Commands of the evaluation by the name of their results."""


# --- Texts ----------------------------------------------------------------------------------------


def raytraced_text(results: Results) -> str:
    """The table of every renderer."""
    columns = [
        ("all", "psnr_nohl", None),
        ("SSIM", "ssim_nohl", None),
        ("radius 6", "psnr_nohl", 6),
        ("14", "psnr_nohl", 14),
        ("28", "psnr_nohl", 28),
        ("near depth edges", "psnr_edge_nohl", None),
        ("blurred", "psnr_blurred_nohl", None),
        ("in focus", "psnr_infocus", None),
        ("with the lights: all", "psnr", None),
        ("SSIM", "ssim", None),
        ("near depth edges", "psnr_edge", None),
    ]
    return _table(results, columns)


def headline_text(results: Results) -> str:
    """The README's table: the same methods, and what matters most."""
    columns = [
        ("PSNR, dB", "psnr_nohl", None),
        ("near depth edges", "psnr_edge_nohl", None),
        ("in focus", "psnr_infocus", None),
        ("SSIM", "ssim_nohl", None),
    ]
    return _table(results, columns)


def synbokeh_text(results: Results) -> str:
    """The table of layer scenes, and each method's worst picture."""
    columns = [
        ("all", "psnr", None),
        ("SSIM", "ssim", None),
        ("near depth edges", "psnr_edge", None),
        ("blurred", "psnr_blurred", None),
        ("in focus", "psnr_infocus", None),
    ]
    worst = min(results["methods"]["tiny"]["rows"], key=lambda row: row["psnr"])
    return f"{_table(results, columns)}\n\n" + _paragraph(
        f"The worst of these {results['dataset']['images']} pictures of `TINY` is "
        f"{worst['scene']}_{worst['setting']}, {worst['psnr']:.2f} dB."
    )


def raytraced_linear_text(results: Results) -> str:
    """The sentence about methods that see linear light."""
    first, *others = (
        f"{name} {results['methods'][name]['mean']['psnr']:.2f}"
        for name in ("layered", "pyramid", "scatter")
    )
    return _paragraph(
        "With `--input linear` the methods see linear light that is not cut off at white, and all "
        "pixels can be scored, the discs of point lights included: "
        f"{first} dB, {', '.join(others)}."
    )


def robustness_text(results: Results) -> str:
    """Drops and what is left by corruption and level: rows are the disparities, columns the
    methods. A drop alone would favour a method that has little to lose."""
    methods = ["tiny", "scatter"]
    drops = {name: results["methods"][name]["drops"] for name in methods}
    rows = []
    for corruption in ("erode", "dilate"):
        for level in ("1", "2", "4", "8"):
            found = [drops[name][corruption][level]["psnr_nohl"] for name in methods]
            texts = [
                f"{shown(drop['median'], 'dB')} ({shown(drop['lower_quartile'], 'dB')} to "
                f"{shown(drop['upper_quartile'], 'dB')})"
                for drop in found
            ]
            left = [
                float(
                    np.mean(
                        [
                            row["psnr_nohl"]
                            for row in results["methods"][name]["rows"]
                            if row["corruption"] == corruption
                            and row["corruption_level"] == int(level)
                            and "psnr_nohl" in row
                        ]
                    )
                )
                for name in methods
            ]
            cells = [
                *marked_cells(texts, [drop["median"] for drop in found], "dB", "lower"),
                *marked_cells([shown(value, "dB") for value in left], left, "dB", "higher"),
            ]
            rows.append([Cell(f"{CORRUPTED[corruption]} by {level} px"), *cells])
    names = [NAMES[name] for name in methods]
    headings = ["", *(f"drop, {name}" for name in names), *(f"PSNR left, {name}" for name in names)]
    return as_markdown(Table("", headings, rows))


def ablations_text(results: Results) -> str:
    """The PSNR of the model as it is, and what changes without each part."""
    rows = []
    for name, about in results["methods"].items():
        figures = (
            [signed(about["change"].get(metric), "dB") for metric in ABLATION_METRICS]
            if "change" in about
            else [shown(about["mean"].get(metric), "dB") for metric in ABLATION_METRICS]
        )
        rows.append([Cell(name), Cell(about["description"]), *map(Cell, figures)])
    headings = ["", "", "all", "near depth edges", "with the lights"]
    return as_markdown(Table("", headings, rows))


def controllability_text(results: Results) -> str:
    """The sentence about control."""
    tiny = results["methods"]["tiny"]
    return _paragraph(
        f"The correlation of `K` with the measured blur of `TINY` is {tiny['K_correlation']:.4f} "
        f"(at least {tiny['K_correlation_minimum']:.4f} in each photograph), and the plane at `df` "
        f"is the sharpest in {100 * tiny['focus_follows']:.1f} % of the scenes."
    )


def tiny_card_text(results: Results) -> str:
    """The model card's paragraph on the ray-traced benchmark."""
    tiny, scatter, identity = (
        results["methods"][name]["mean"] for name in ("tiny", "scatter", IDENTITY)
    )

    def beside(metric: str) -> str:
        return f"{tiny[metric]:.2f} ({scatter[metric]:.2f}, {identity[metric]:.2f})"

    dataset = results["dataset"]
    return _paragraph(
        f"{dataset['images']} images of {len(dataset['scenes'])} scenes, PSNR in dB over pixels "
        f"that no clipped highlight reaches: {tiny['psnr_nohl']:.2f} (depth-ordered scatter "
        f"{scatter['psnr_nohl']:.2f}, the photograph as it is {identity['psnr_nohl']:.2f}); near "
        f"depth edges {beside('psnr_edge_nohl')}; in focus {beside('psnr_infocus')}; over all "
        f"pixels {beside('psnr')}; SSIM {tiny['ssim_nohl']:.3f} ({scatter['ssim_nohl']:.3f}, "
        f"{identity['ssim_nohl']:.3f})."
    )


BLOCKS: dict[str, Block] = {
    "raytraced": Block(EVALUATION_PAGE, "raytraced", raytraced_text),
    "raytraced_linear": Block(EVALUATION_PAGE, "raytraced_linear", raytraced_linear_text),
    "synbokeh": Block(EVALUATION_PAGE, "synbokeh", synbokeh_text),
    "robustness": Block(EVALUATION_PAGE, "robustness", robustness_text),
    "ablations": Block(EVALUATION_PAGE, "ablations", ablations_text),
    "controllability": Block(EVALUATION_PAGE, "controllability", controllability_text),
    "headline": Block(README, "raytraced", headline_text),
    "tiny_card": Block(MODEL_CARD, "raytraced", tiny_card_text),
}
"""Every block of numbers by its name."""

DOCUMENTED_NUMBERS = QuotedNumbers(REPOSITORY, BLOCKS, MEASUREMENTS)


def _table(results: Results, columns: Sequence[tuple[str, str, int | None]]) -> str:
    """Methods against (heading, metric, level of blur or None for all).

    The best of each column is bold; the photo itself takes no part, as it is sharp for nothing.
    """
    methods = list(results["methods"])
    cells = []
    for _, metric, level in columns:
        about = results["metrics"][metric]
        means = [_mean(results, name, metric, level) for name in methods]
        running = [None if n == IDENTITY else m for n, m in zip(methods, means, strict=True)]
        texts = [shown(mean, about["unit"]) for mean in means]
        cells.append(marked_cells(texts, running, about["unit"], about["better"]))
    rows = [[Cell(NAMES[name]), *row] for name, *row in zip(methods, *cells, strict=True)]
    return as_markdown(Table("", ["", *(heading for heading, _, _ in columns)], rows))


def _mean(results: Results, method: str, metric: str, level: int | None) -> float | None:
    """Over all photographs, or over those whose largest radius is ``level``."""
    about = results["methods"][method]
    if level is None:
        return about["mean"].get(metric)
    figures = [row[metric] for row in about["rows"] if row["level"] == level and metric in row]
    return float(np.mean(figures)) if figures else None


def _paragraph(text: str) -> str:
    return textwrap.fill(text, LINE_LENGTH, break_long_words=False, break_on_hyphens=False)

"""Plots: what is drawn where, units on the axes, and the words for those who cannot see them."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluation.reports.plots import COLOURS, plots_of, style, svg_of, write_plot
from tests.evaluation.reports import example_results


def test_comparison_draws_each_mean_on_its_line() -> None:
    means, against_time = plots_of(example_results.comparison())
    psnr, lpips = means.figure.axes
    assert psnr.get_xlabel() == "psnr (dB)\nhigher is better"
    assert lpips.get_xlabel() == "lpips\nlower is better"
    assert [label.get_text() for label in psnr.get_yticklabels()] == ["identity", "tiny", "scatter"]
    dots = [line for line in psnr.lines if len(line.get_xdata()) == 1]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in dots] == [
        (19.5, 0),
        (35.0, 1),
        (34.0, 2),
    ]
    intervals = [line for line in psnr.lines if len(line.get_xdata()) == 2]
    assert [list(line.get_xdata()) for line in intervals] == [[19.0, 20.0], [33.0, 36.5]]
    assert psnr.get_ylim()[0] > psnr.get_ylim()[1], "the first method is at the top"
    assert "Best psnr: tiny, 35.00 dB. Best lpips: scatter, 0.100." in means.words

    (panel,) = against_time.figure.axes
    assert panel.get_xscale() == "log" and "seconds per image" in panel.get_xlabel()
    assert against_time.words.endswith("tiny 35.00 dB in 0.8 s; scatter 34.00 dB in 0.2 s.")


def test_without_seconds_there_is_no_plot_against_them() -> None:
    results = example_results.comparison()
    results["methods"]["tiny"]["seconds_per_image"] = None
    assert [plot.name for plot in plots_of(results)] == ["means"]


def test_robustness_draws_medians_and_quartiles_in_the_order_of_levels() -> None:
    (plot,) = plots_of(example_results.robustness())
    eroded, dilated = plot.figure.axes
    assert eroded.get_title() == "disparity eroded" and dilated.get_title() == "disparity dilated"
    assert eroded.get_xlabel() == "level (px)"
    assert eroded.get_ylabel() == "drop of psnr (dB), less is better"
    tiny = next(line for line in eroded.lines if line.get_label() == "tiny")
    np.testing.assert_allclose(tiny.get_xdata(), [1, 2, 4, 8])
    np.testing.assert_allclose(tiny.get_ydata(), [0.1, 0.2, 0.4, 0.8])
    band = eroded.collections[0].get_paths()[0].vertices
    at_eight = band[band[:, 0] == 8][:, 1]
    np.testing.assert_allclose([at_eight.min(), at_eight.max()], [0.4, 1.6])
    assert "At dilate 8: tiny 1.60 dB, scatter 3.20 dB." in plot.words


def test_control_draws_measured_against_asked_blur() -> None:
    (plot,) = plots_of(example_results.controllability())
    (panel,) = plot.figure.axes
    line, diagonal = panel.lines
    np.testing.assert_allclose(line.get_xdata(), [0, 2, 4, 6, 8])
    np.testing.assert_allclose(line.get_ydata(), [1, 3, 5, 7, 9])
    assert diagonal.get_slope() == 1
    assert panel.get_xlabel() == "radius asked for (px)"
    assert plot.words.endswith("tiny correlates by 0.999.")


def test_methods_differ_in_colour_and_mark() -> None:
    names = ["identity", *(f"m{i}" for i in range(len(COLOURS)))]
    styles = [style(names, name) for name in names]
    assert len({colour for colour, _ in styles}) == len(names)
    assert len({mark for _, mark in styles[1:]}) == len(names) - 1
    assert style(["a", "identity", "b"], "b") == style(["identity", "a", "b"], "b")


@pytest.mark.parametrize("make", example_results.EVERY_KIND)
def test_every_plot_is_a_picture_with_words(
    make: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    plots, again = plots_of(make()), plots_of(make())
    assert plots
    for plot, same in zip(plots, again, strict=True):
        svg = svg_of(plot)
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert svg == svg_of(same), "the same results give the same bytes"
        assert plot.title and plot.words.endswith(".")
        file = tmp_path / f"{plot.name}.png"
        write_plot(plot, file)
        with Image.open(file) as picture:
            assert np.asarray(picture.convert("L")).std() > 5, "not empty"
    assert len(list(tmp_path.iterdir())) == len(plots)

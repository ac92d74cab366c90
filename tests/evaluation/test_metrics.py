"""Metrics by name: by hand, against the benchmark's own scorer, which way they point, mistakes."""

from __future__ import annotations

import dataclasses
import importlib.util
from argparse import ArgumentParser
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from evaluation import metric_list
from evaluation.metrics import (
    METRICS,
    measure_all,
    metric_by_name,
    metric_names,
    psnr,
    quantise_to_8_bit,
    structural_similarity_map,
)
from evaluation.photographs import Photograph
from evaluation.regions import regions_of

NEED_NETWORKS = ("lpips", "lpips_alex", "dists")
OTHERS = [name for name in METRICS if name not in NEED_NETWORKS]
HEIGHT, WIDTH = 170, 180
RADIUS = 12.0


def photograph(**changes: Any) -> Photograph:
    """A textured far half behind a near half in focus, and in it a light, which makes a disc."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    near = x >= 110
    grain = gaussian_filter(rng.normal(size=(HEIGHT, WIDTH, 3)), (1.5, 1.5, 0))
    picture = 0.35 + 0.1 * grain / grain.std()
    picture[~near] = gaussian_filter(picture, (5, 5, 0))[~near]
    disparity = np.where(near, 0.5, 0.1).astype(np.float32)
    light = np.repeat(np.where(near, 0.2, 0.1)[..., None], 3, axis=2).astype(np.float32)
    distance = np.hypot(y - 80, x - 50)
    light[distance <= 2] = 20.0
    picture[distance <= RADIUS] += 0.4
    truth = (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)
    made = Photograph(
        scene="halves",
        setting="f0",
        image=truth,
        disparity=disparity,
        disparity_range=(0.1, 0.5),
        df=0.5,
        K=RADIUS / 0.4,
        truth=truth,
        light=light,
    )
    return dataclasses.replace(made, **changes)


def noisy(given: Photograph, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(1).normal(size=given.truth.shape)
    return quantise_to_8_bit(given.truth / 255 + sigma * noise)


# -- Figures -------------------------------------------------------------------------------------


def test_psnr() -> None:
    assert psnr(0.01) == pytest.approx(20)
    assert psnr(0.0) == 100
    given = photograph(truth=np.full((HEIGHT, WIDTH, 3), 100, np.uint8))
    prediction = np.full((HEIGHT, WIDTH, 3), 100.0)
    prediction[:, :, 1] += 6
    measured = metric_by_name("psnr").measure(prediction / 255, given)
    assert measured == pytest.approx(10 * np.log10(255**2 / (36 / 3)))


def test_quantising_rounds_as_a_png_does() -> None:
    given = np.array([-0.2, 0.0, 0.4999 / 255, 0.5001 / 255, 254.4 / 255, 1.7], np.float32)
    wanted = np.array([0, 0, 0, 1, 254, 255]) / 255
    assert np.array_equal(quantise_to_8_bit(given), wanted)


def test_ssim_is_its_equation() -> None:
    """Wang et al. 2004, Equation 13, at one pixel of one channel after the other."""
    given = photograph()
    prediction, truth = noisy(given, 0.05), given.truth / 255
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    row, column = 60, 90
    similarities = []
    for channel in range(3):
        x, y = (
            image[row - 5 : row + 6, column - 5 : column + 6, channel]
            for image in (prediction, truth)
        )
        mean_x, mean_y = (window * x).sum(), (window * y).sum()
        variance_x = (window * x**2).sum() - mean_x**2
        variance_y = (window * y**2).sum() - mean_y**2
        covariance = (window * x * y).sum() - mean_x * mean_y
        similarities.append(
            (2 * mean_x * mean_y + 0.01**2)
            * (2 * covariance + 0.03**2)
            / ((mean_x**2 + mean_y**2 + 0.01**2) * (variance_x + variance_y + 0.03**2))
        )
    mean, similarity = structural_similarity_map(prediction, truth)
    assert similarity[row, column] == pytest.approx(np.mean(similarities), abs=1e-9)
    assert mean == pytest.approx(similarity[5:-5, 5:-5].mean(), abs=1e-9)
    assert metric_by_name("ssim").measure(prediction, given) == mean


def test_ms_ssim_is_what_its_package_says_in_float64() -> None:
    piq = pytest.importorskip("piq", reason="ms_ssim needs bokehdiff[train]")
    given = photograph()
    prediction = noisy(given, 0.1)
    images = (
        torch.from_numpy(image).permute(2, 0, 1)[None] for image in (prediction, given.truth / 255)
    )
    wanted = piq.multi_scale_ssim(*images).item()
    assert 0.5 < wanted < 0.95
    measured = metric_by_name("ms_ssim").measure(prediction, given)
    # float32 rounds a mean square below 1 by 6e-8, which C2 = 0.03^2 magnifies.
    assert measured == pytest.approx(wanted, abs=6e-8 / 0.03**2)


def test_a_region_counts_only_its_pixels() -> None:
    given = photograph()
    regions = {**regions_of(given), "highlight": ~regions_of(given)["nohl"]}
    truth = given.truth / 255
    for name, mask in regions.items():
        assert 200 <= mask.sum() < mask.size, name
        prediction = truth.copy()
        prediction[~mask] = 1 - prediction[~mask]
        metric = metric_by_name(f"psnr_{name}")
        assert metric.measure(prediction, given) == 100
        prediction[mask] = quantise_to_8_bit(prediction[mask] - 0.1)
        error = ((prediction - truth)[mask] ** 2).mean()
        assert metric.measure(prediction, given) == pytest.approx(-10 * np.log10(error))
        if name != "highlight":
            wanted = structural_similarity_map(prediction, truth)[1][mask].mean()
            measured = metric_by_name(f"ssim_{name}").measure(prediction, given)
            assert measured == pytest.approx(wanted)


def test_sharpness_is_the_share_of_detail_that_is_kept() -> None:
    given = photograph()
    metric = metric_by_name("sharpness_infocus")
    truth = given.truth / 255
    for contrast in (0.5, 0.9, 1.05):
        assert metric.measure(contrast * truth, given) == pytest.approx(abs(1 - contrast), abs=1e-9)


def test_sharpness_tells_lost_detail_from_errors_that_psnr_takes_for_the_same() -> None:
    given = photograph()
    sharpness, in_focus = (metric_by_name(f"{kind}_infocus") for kind in ("sharpness", "psnr"))
    truth = given.truth / 255
    offset = quantise_to_8_bit(truth + 4 / 255)
    smeared = quantise_to_8_bit(gaussian_filter(truth, (0.78, 0.78, 0)))
    grainy = noisy(given, 4 / 255)
    for other in (smeared, grainy):
        alike = [in_focus.measure(image, given) for image in (offset, other)]
        assert alike[0] == pytest.approx(alike[1], abs=0.1)
    assert sharpness.measure(smeared, given) > 0.2
    assert sharpness.measure(offset, given) == 0
    assert sharpness.measure(grainy, given) < 0.01


@pytest.mark.parametrize("name", OTHERS)
def test_they_point_where_they_say(name: str) -> None:
    given = photograph()
    metric = metric_by_name(name)
    truth = given.truth / 255
    blurred = quantise_to_8_bit(gaussian_filter(truth, (6, 6, 0)))
    best, worse = metric.measure(truth, given), metric.measure(blurred, given)
    assert {"higher": best > worse, "lower": best < worse}[metric.better]
    if name.startswith("psnr"):
        assert best == 100
    elif name.startswith(("ssim", "ms_ssim")):
        assert best == pytest.approx(1)
    elif metric.better == "lower":
        assert best == 0


def test_same_figures_as_the_ray_traced_benchmarks_own_scorer(shared_root: Path) -> None:
    from evaluation.datasets import open_dataset

    folder = shared_root / "bench" / "raytraced"
    if not (folder / "score.py").is_file():
        pytest.skip(f"no scorer in {folder}")
    scorer: Any = load_scorer(folder / "score.py")
    scorer.SCENES = ["s08"]
    theirs = scorer.run(str(folder / "data"), {"identity": lambda *scene: scene[3] / 255.0})
    names = [name for name in OTHERS if name.startswith(("psnr", "ssim"))]
    chosen = [metric_by_name(name) for name in names if name != "psnr_highlight"]
    photographs = open_dataset("raytraced", folder / "data", ["s08"]).photographs()
    for given, row in zip(photographs, theirs["identity"]["rows"], strict=True):
        figures = measure_all(chosen, given.image / 255, given)
        assert given.setting == row["id"]
        for name, figure in figures.items():
            assert (figure is None) == (name not in row), name
            assert figure is None or figure == pytest.approx(row[name], abs=1e-9), name


def load_scorer(file: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location("benchmark_scorer", file)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


# -- When there is none --------------------------------------------------------------------------


def test_many_metrics_at_once_are_the_same() -> None:
    given = photograph()
    prediction = noisy(given, 0.03)
    chosen = [metric_by_name(name) for name in OTHERS]
    figures = measure_all(chosen, prediction, given)
    assert list(figures) == OTHERS
    for metric in chosen:
        assert figures[metric.name] == metric.measure(prediction, given)


def without_figure(given: Photograph) -> set[str]:
    figures = measure_all([metric_by_name(name) for name in OTHERS], given.truth / 255, given)
    return {name for name, figure in figures.items() if figure is None}


def test_what_a_photograph_lacks_has_no_figure() -> None:
    everywhere = {"psnr", "ssim", "ms_ssim"}
    needs_light = {
        f"{kind}_{region}"
        for kind in ("psnr", "ssim")
        for region in ("nohl", "edge_nohl", "blurred_nohl")
    } | {"psnr_highlight", "disc_radius_error", "disc_flatness"}
    assert without_figure(photograph()) == set()
    assert without_figure(photograph(light=None)) == needs_light
    assert without_figure(photograph(K=None)) == set(OTHERS) - everywhere
    in_focus = photograph(K=0.0, light=None)
    assert {"psnr_blurred", "ssim_blurred"} <= without_figure(in_focus)
    assert "psnr_infocus" not in without_figure(in_focus)


def test_regions_of_fewer_than_200_pixels_have_no_figure() -> None:
    for rows, defined in [(10, True), (9, False)]:
        # 20 columns of so many rows are in focus, and too little nearer than the rest to be edges.
        disparity = np.full((60, 60), 0.1, np.float32)
        disparity[:rows, :20] = 0.1 + np.float32(0.005)
        truth = np.zeros((60, 60, 3), np.uint8)
        given = photograph(
            disparity=disparity, truth=truth, image=truth, light=None, df=0.105, K=200.0
        )
        disparity[-1] = np.linspace(0.1, 1.0, 60)
        assert regions_of(given)["infocus"].sum() == 20 * rows
        assert (metric_by_name("psnr_infocus").measure(truth / 255, given) is not None) == defined


def test_ms_ssim_needs_five_scales() -> None:
    metric = metric_by_name("ms_ssim")
    for side, defined in [(161, True), (160, False)]:
        given = photograph()
        given = dataclasses.replace(given, truth=given.truth[:side, :side])
        figure = metric.measure(given.truth / 255, given)
        assert (figure is not None) == defined
    assert "161 px" in metric.description


# -- Names and mistakes --------------------------------------------------------------------------


def test_every_metric_says_what_it_is() -> None:
    assert metric_names() == list(METRICS)
    for name in ("psnr", "ssim", "ms_ssim", "lpips", "dists", "psnr_edge_nohl", "ssim_infocus"):
        assert name in METRICS
    for name in OTHERS:
        metric, recipe = metric_by_name(name), METRICS[name]
        assert metric.name == name and metric.better in ("higher", "lower")
        assert (metric.better, metric.unit, metric.description) == (
            recipe.better,
            recipe.unit,
            recipe.description,
        )


def test_the_table_lists_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    metric_list.add_arguments(parser)
    assert metric_list.run(parser.parse_args([])) == 0
    lines = capsys.readouterr().out.splitlines()
    starts = [line.split() for line in lines if not line.startswith(" ")]
    assert [start[0] for start in starts] == ["metric", *METRICS]
    for start in starts[1:]:
        assert start[1:3] == [METRICS[start[0]].better, METRICS[start[0]].unit or "-"]
    assert max(map(len, lines)) <= 110


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda truth: truth[:-1], r"shape \(169, 180, 3\), the truth \(170, 180, 3\)"),
        (lambda truth: truth * np.nan, "NaN"),
        (lambda truth: truth * 255.0, "wanted display-encoded sRGB in"),
        (lambda truth: truth - 1.0, "wanted display-encoded sRGB in"),
    ],
)
def test_predictions_that_are_none_are_refused(change: Any, words: str) -> None:
    given = photograph()
    prediction = change(given.truth / 255)
    with pytest.raises(ValueError, match=words):
        metric_by_name("psnr").measure(prediction, given)
    with pytest.raises(ValueError, match=words):
        measure_all([], prediction, given)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no metric 'psrn'; wanted one of psnr, ssim, ms_ssim"):
        metric_by_name("psrn")

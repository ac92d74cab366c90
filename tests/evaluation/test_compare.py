"""The one loop, on a small folder of triples: rows, searches, exposure, memory, mistakes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluation import compare as loop
from evaluation.compare import compare, with_identity
from evaluation.datasets import open_dataset
from evaluation.memory import peak_bytes_of, restart_peak
from evaluation.methods import Method, method_by_name, predictions_in
from evaluation.metrics import metric_by_name, quantise_to_8_bit
from evaluation.photographs import Photograph
from tests.evaluation.datasets.miniatures import WRITERS
from tests.evaluation.triples_folder import NAMES, write_triples
from tests.evaluation.triples_folder import K as TRUE_K

METRICS = [metric_by_name(name) for name in ("psnr", "ssim", "psnr_edge", "psnr_nohl")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_triples(tmp_path_factory.mktemp("known") / "triples")


@pytest.fixture(scope="module")
def without_K(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_triples(tmp_path_factory.mktemp("unknown") / "triples", known_K=False)


@pytest.fixture(scope="module")
def compared(folder: Path) -> dict[str, Any]:
    scatter, gaussian = method_by_name("scatter"), method_by_name("gaussian")
    return compare(open_dataset("triples", folder), [scatter, gaussian], METRICS)


def darker(name: str = "darker") -> Method:
    """A method that is fast."""
    return Method(name, "the photograph at half the level", lambda one: one.image / 510)


def test_rows_are_those_of_the_photographs(compared: dict[str, Any], folder: Path) -> None:
    assert list(compared["methods"]) == ["identity", "scatter", "gaussian"]
    dataset = open_dataset("triples", folder)
    assert compared["dataset"] == {"name": "triples", "scenes": ["a", "b"], "images": 3}
    for name, about in compared["methods"].items():
        assert [f"{row['scene']}_{row['setting']}" for row in about["rows"]] == NAMES
        for row, photograph in zip(about["rows"], dataset.photographs(), strict=True):
            prediction = quantise_to_8_bit(method_by_name(name).render(photograph))
            for metric in METRICS[:3]:
                assert row[metric.name] == metric.measure(prediction, photograph)
            assert "psnr_nohl" not in row, "there is no light here to tell highlights by"
            assert row["K"] == TRUE_K and row["seconds"] > 0
        figures = [row["psnr"] for row in about["rows"]]
        assert about["mean"]["psnr"] == np.mean(figures) and "psnr_nohl" not in about["mean"]
        low, high = about["interval"]["psnr"]
        assert low <= about["mean"]["psnr"] <= high
        assert about["interval"]["psnr_nohl"] is None
    # The truth is the scatter's own, but for two roundings to 8 bits that agree.
    assert compared["methods"]["scatter"]["mean"]["psnr"] > 58
    means = [compared["methods"][name]["mean"]["psnr"] for name in ("identity", "gaussian")]
    assert means[0] < means[1] < 40


def test_results_say_what_they_are(compared: dict[str, Any]) -> None:
    assert compared["kind"] == "comparison" and compared["title"] == "triples"
    assert compared["metrics"]["psnr"]["better"] == "higher"
    assert compared["metrics"]["psnr"]["unit"] == "dB"
    assert "K is the data set's." in compared["protocol"]
    assert "drawn again" in compared["protocol"] and "Peak memory" in compared["protocol"]
    assert compared["hardware"]["torch_threads"] >= 1
    assert "given 8-bit sRGB" in compared["methods"]["scatter"]["description"]


def test_the_identity_is_first_and_once() -> None:
    scatter, identity = method_by_name("scatter"), method_by_name("identity")
    for methods in ([scatter], [scatter, identity], [identity, scatter]):
        assert [method.name for method in with_identity(methods)] == ["identity", "scatter"]


@pytest.mark.slow
def test_without_a_known_K_it_is_searched(without_K: Path) -> None:
    dataset = open_dataset("triples", without_K, ["b"])
    methods = [method_by_name("scatter"), method_by_name("gaussian")]
    with pytest.raises(ValueError, match="scatter, b_b_near: .*wanted --K searched"):
        compare(dataset, methods, METRICS)
    compare(dataset, methods[1:], METRICS)  # needs none

    found = compare(dataset, methods, METRICS, K="searched")
    (row,) = found["methods"]["scatter"]["rows"]
    assert row["K"] == pytest.approx(TRUE_K, rel=0.03)
    assert row["ssim"] > 0.99
    assert found["methods"]["gaussian"]["rows"][0]["K"] is None
    assert "psnr_edge" not in row, "regions need a K that is no method's"
    assert found["title"] == "triples, K searched per photograph"
    assert "golden-section search" in found["protocol"] and "10 % of the width" in found["protocol"]


def picky(right_at: dict[str, float]) -> Method:
    """A method that is right at one K, another for each scene, and too dark at all others."""

    def render(photograph: Photograph) -> np.ndarray:
        off = abs(np.log(max(photograph.K or 0, 1e-3) / right_at[photograph.scene]))
        return photograph.truth / 255 * np.exp(-off)

    return Method("picky", "", render)


def test_one_K_for_the_data_set_is_that_of_the_best_mean(folder: Path) -> None:
    dataset = open_dataset("triples", folder)
    method = picky({"a": 7.0, "b": 14.0})
    found = compare(dataset, [method], METRICS[:2], K="searched_per_method")
    about = found["methods"]["picky"]
    (K,) = {row["K"] for row in about["rows"]}

    def mean_similarity(K: float) -> float:
        photographs = [dataclasses.replace(one, K=K) for one in dataset.photographs()]
        pictures = [(quantise_to_8_bit(method.render(one)), one) for one in photographs]
        return float(np.mean([METRICS[1].measure(picture, one) for picture, one in pictures]))

    assert 7 < K < 14, "what suits one scene does not suit the other"
    assert mean_similarity(K) > max(mean_similarity(1.03 * K), mean_similarity(K / 1.03))
    assert about["mean"]["ssim"] == pytest.approx(mean_similarity(K))
    # Every disparity ranges from 0.2 to 0.8.
    assert about["range_px"] == pytest.approx(0.6 * K)
    assert found["title"] == "triples, K searched per method"
    assert "one number for each method and the whole data set" in found["protocol"]


def test_photographs_that_do_not_fit_into_memory_are_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for share in (loop.KEPT_SHARE_OF_MEMORY, 0.0):
        monkeypatch.setattr(loop, "KEPT_SHARE_OF_MEMORY", share)
        replay = loop._Replay(open_dataset("triples", folder), "aligned")
        twice = [list(replay.photographs()) for _ in range(2)]
        assert (twice[0][0] is twice[1][0]) == (share > 0)
        found += twice
    for photographs in found:
        assert [one.name for one in photographs] == NAMES
        for one, other in zip(photographs, found[0], strict=True):
            assert np.array_equal(one.image, other.image)


def test_each_photograph_has_a_search_of_its_own(folder: Path) -> None:
    right_at = {"a": 5.0, "b": 15.0}
    dataset = open_dataset("triples", folder)
    found = compare(dataset, [picky(right_at)], METRICS[:2], K="searched")
    for row in found["methods"]["picky"]["rows"]:
        assert row["K"] == pytest.approx(right_at[row["scene"]], rel=0.02)


def test_aligned_exposure_is_given_to_every_method(tmp_path: Path) -> None:
    folder = write_triples(tmp_path / "triples")
    for file in (folder / "bokeh").iterdir():
        half_as_red = np.asarray(Image.open(file)) * np.array([0.5, 1, 1])
        Image.fromarray(half_as_red.round().astype(np.uint8)).save(file)
    dataset = open_dataset("triples", folder, ["b"])
    scatter = [method_by_name("scatter")]
    plain = compare(dataset, scatter, METRICS)
    aligned = compare(dataset, scatter, METRICS, exposure="aligned")
    for name in ("identity", "scatter"):
        gain = aligned["methods"][name]["mean"]["psnr"] - plain["methods"][name]["mean"]["psnr"]
        assert gain > 2, name
    # But for blur in linear light, which is not quite that of a scaled picture, nothing is left.
    assert aligned["methods"]["scatter"]["mean"]["psnr"] > 35
    assert "scaled to the mean that the truth has" in aligned["protocol"]
    assert aligned["title"] == "triples, exposure aligned"


def test_saved_pictures_score_the_same(folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset("triples", folder)
    pictures = tmp_path / "pictures"
    first = compare(dataset, [darker()], METRICS, save_to=pictures)
    for name in ("identity", "darker"):
        files = sorted(file.name for file in (pictures / name).iterdir())
        assert files == sorted(f"{one}.png" for one in NAMES)
    again = compare(dataset, [predictions_in(pictures / "darker", "theirs")], METRICS)
    theirs, ours = again["methods"]["theirs"], first["methods"]["darker"]
    assert theirs["mean"] == ours["mean"] and theirs["interval"] == ours["interval"]
    assert theirs["seconds_per_image"] is None and theirs["peak_memory_bytes"] is None
    assert {row["seconds"] for row in theirs["rows"]} == {None}
    with pytest.raises(ValueError, match="pictures/identity is there already; wanted a new folder"):
        compare(dataset, [darker()], METRICS, save_to=pictures)


def test_memory_is_that_of_the_hardest_photograph(folder: Path) -> None:
    if not restart_peak():
        pytest.skip("this system does not let the peak of resident memory start anew")
    megabytes = 60

    def render(photograph: Photograph) -> np.ndarray:
        radius = photograph.K * np.abs(photograph.disparity - photograph.df).max()
        # Only strong blur is greedy; writing makes the memory resident.
        size = megabytes if radius > 5.9 else 1
        np.ones(size * 10**6, np.uint8).sum()
        return photograph.image / 255

    found = compare(open_dataset("triples", folder), [Method("greedy", "", render)], METRICS[:1])
    about = found["methods"]["greedy"]
    assert about["peak_memory_bytes"] == pytest.approx(megabytes * 1e6, rel=0.1)
    assert [row["peak_memory_bytes"] is not None for row in about["rows"]].count(True) == 1
    assert found["methods"]["identity"]["peak_memory_bytes"] < 10e6


def test_memory_that_earlier_work_freed_counts_again() -> None:
    if not restart_peak():
        pytest.skip("this system does not let the peak of resident memory start anew")
    # So small that the allocator keeps them for later.
    work = lambda: [np.ones(30_000, np.uint8) for _ in range(2000)] and None  # noqa: E731
    for _ in range(3):
        assert peak_bytes_of(work) == pytest.approx(60e6, rel=0.2)


def test_mistakes_are_named(folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset("triples", folder)
    identity = method_by_name("identity")
    with pytest.raises(ValueError, match="share the name mine.py:f; .*--method other_mine.py_f="):
        compare(dataset, [darker("mine.py:f"), darker("mine.py:f")], METRICS)
    with pytest.raises(ValueError, match="share the name identity"):
        compare(dataset, [identity, identity], METRICS)
    with pytest.raises(ValueError, match="no metric"):
        compare(dataset, [identity], [])
    with pytest.raises(ValueError, match="K is 'best'; wanted one of given, searched"):
        compare(dataset, [identity], METRICS, K="best")
    with pytest.raises(ValueError, match="exposure is 'good'; wanted one of as_is, aligned"):
        compare(dataset, [identity], METRICS, exposure="good")
    broken = Method("broken", "", lambda one: one.image * np.nan)
    with pytest.raises(ValueError, match="broken, a_a_far: .*NaN"):
        compare(dataset, [broken], METRICS)
    Image.new("RGB", (10, 10)).save(tmp_path / "a_a_far.png")
    with pytest.raises(ValueError, match="theirs, a_a_far: .*same size"):
        compare(dataset, [predictions_in(tmp_path, "theirs")], METRICS)
    Image.fromarray(next(dataset.photographs()).truth).save(tmp_path / "a_a_far.png")
    with pytest.raises(ValueError, match="theirs, a_a_near: .*a_a_near.png is missing; .*--scenes"):
        compare(dataset, [predictions_in(tmp_path, "theirs")], METRICS)
    with pytest.raises(ValueError, match="strict: it cannot"):
        compare(dataset, [Method("strict", "", refuse)], METRICS, K="searched_per_method")


def refuse(photograph: Photograph) -> np.ndarray:
    raise ValueError("it cannot")


def test_the_protocol_says_how_far_the_search_goes() -> None:
    words = loop.STRENGTHS["searched"]
    assert "0.25 px" in words and "10 % of the width" in words and "to 2 %" in words
    assert "15 or 16 strengths" in words


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_every_data_set_goes_through_the_loop(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    dataset = open_dataset(name, tmp_path)
    # Units and zeros of disparity differ, some K are unknown, and a light field's is below 0.
    found = compare(dataset, [method_by_name("scatter")], METRICS[:2], K="searched_per_method")
    about = found["methods"]["scatter"]
    assert len(about["rows"]) == len(dataset) == found["dataset"]["images"]
    assert about["mean"]["ssim"] >= found["methods"]["identity"]["mean"]["ssim"] - 1e-9
    assert {row["scene"] for row in about["rows"]} == set(dataset.scenes)

"""Each reader gives exactly what a miniature of its layout put in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bokehdiff.images import write_linear_image
from data_synthesis.benchmark import write_benchmark
from evaluation.datasets import DATASETS, open_dataset
from evaluation.exposure import align_exposure
from tests.evaluation.datasets import miniatures
from tests.evaluation.datasets.miniatures import WRITERS, steps


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_keeps_the_promises_of_its_base(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    dataset = open_dataset(name, tmp_path)
    assert dataset.name == name and dataset.verify() == []
    assert dataset.scenes == sorted(dataset.scenes)
    photographs = list(dataset.photographs())
    assert len(dataset) == len(photographs) > 0
    assert len({photograph.name for photograph in photographs}) == len(photographs)
    scenes = [photograph.scene for photograph in photographs]
    assert list(dict.fromkeys(scenes)) == dataset.scenes, "scene by scene"
    for photograph in photographs:
        height, width, _ = photograph.image.shape
        for picture in (photograph.image, photograph.truth):
            assert picture.shape == (height, width, 3) and picture.dtype == np.uint8
        assert photograph.disparity.shape == (height, width)
        assert photograph.disparity.dtype == np.float32
        assert np.isfinite(photograph.disparity).all() and np.isfinite(photograph.df)
        low, high = photograph.disparity_range
        assert low <= photograph.disparity.min() < photograph.disparity.max() <= high
        assert photograph.light is None or photograph.light.dtype == np.float32
        assert json.loads(json.dumps(photograph.labels)) == photograph.labels
    only = dataset.scenes[-1]
    chosen = list(open_dataset(name, tmp_path, [only]).photographs())
    assert [one.name for one in chosen] == [one.name for one in photographs if one.scene == only]


@pytest.mark.parametrize("name", DATASETS)
def test_wrong_folders_get_a_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no benchmark folder .*nowhere"):
        open_dataset(name, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"empty holds no scene; wanted .*\.$"):
        open_dataset(name, tmp_path / "empty")
    data = tmp_path / "above" / "data"
    data.mkdir(parents=True)
    WRITERS[name](data)
    with pytest.raises(ValueError, match=rf"holds no scene; .*Did you mean {data}\?"):
        open_dataset(name, data.parent)
    inside = next(entry for entry in data.iterdir() if entry.is_dir())
    with pytest.raises(ValueError, match=rf"holds no scene; .*Did you mean {data}\?"):
        open_dataset(name, inside)
    scenes = ", ".join(open_dataset(name, data).scenes)
    with pytest.raises(ValueError, match=f"has no scene s77; it has {scenes}"):
        open_dataset(name, data, ["s77"])


def test_an_unknown_data_set_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data set 'ebb!'; wanted one of raytraced, synbokeh"):
        open_dataset("ebb!", tmp_path)
    assert all(kind.__doc__ for kind in DATASETS.values())


def test_hundreds_of_scenes_are_not_all_listed(tmp_path: Path) -> None:
    for number in range(25):
        miniatures.write_json(tmp_path / f"s{number:02d}" / "meta.json", {})
    with pytest.raises(ValueError, match="s18, s19 and 5 more"):
        open_dataset("raytraced", tmp_path, ["t00"])


def test_raytraced(tmp_path: Path) -> None:
    put_in = miniatures.write_raytraced(tmp_path)
    photographs = list(open_dataset("raytraced", tmp_path).photographs())
    assert [one.name for one in photographs] == ["s01_f0_r14", "s02_f0_r14", "s02_f0_r06"]
    for one, index in zip(photographs, (0, 0, 1), strict=True):
        scene = put_in[one.scene]
        setting = scene["settings"][index]
        assert np.array_equal(one.image, scene["image"])
        assert one.light is not None and np.array_equal(one.light, scene["light"])
        assert one.light.max() > 1.5
        assert np.array_equal(one.disparity, scene["disparity"]), "not its anti-aliased sibling"
        assert np.array_equal(one.truth, scene["truths"][index])
        assert (one.df, one.K, one.setting) == (setting["df"], setting["K"], setting["id"])
        assert one.disparity_range == (scene["disparity"].min(), scene["disparity"].max())
        assert one.labels == {
            "level": setting["level"],
            "id": setting["id"],
            "alpha": one.scene == "s01",
            "lights": one.scene == "s02",
        }


def test_the_benchmark_itself_opens(shared_root: Path) -> None:
    data = shared_root / "bench" / "raytraced" / "data"
    if not data.is_dir():
        pytest.skip(f"no ray-traced benchmark at {data}")
    dataset = open_dataset("raytraced", data)
    assert len(dataset) == 21 and dataset.scenes == ["s01", "s03", "s06", "s08", "s11"]
    assert dataset.verify() == []
    photographs = list(open_dataset("raytraced", data, ["s08", "s11"]).photographs())
    assert [one.setting for one in photographs] == 2 * ["f1_r28", "f0_r14", "f2_r06"]
    for one in photographs:
        meta = json.loads((data / one.scene / "meta.json").read_text())
        wanted = next(each for each in meta["configs"] if each["id"] == one.setting)
        assert (one.df, one.K, one.labels["level"]) == (wanted["df"], wanted["K"], wanted["level"])
        assert one.disparity_range == pytest.approx((one.disparity.min(), one.disparity.max()))
        radius = one.K * np.abs(one.disparity - one.df)
        # The level is the largest radius but for the outermost thousandth of the disparities.
        assert np.quantile(radius, 0.998) <= one.labels["level"] + 0.1


def test_synbokeh300_as_it_is_written(tmp_path: Path) -> None:
    write_benchmark("synbokeh300", tmp_path / "data", count=1, size=128)
    dataset = open_dataset("synbokeh300", tmp_path / "data")
    assert dataset.verify() == [] and dataset.scenes == ["s000"]
    photographs = list(dataset.photographs())
    assert [one.labels["level"] for one in photographs] == [2, 3, 6, 12]
    assert all(one.labels["alpha"] and not one.labels["lights"] for one in photographs)


@pytest.mark.parametrize("nearest", [1, 0])
@pytest.mark.parametrize("name", ["ebb", "ebb_aligned"])
def test_ebb(tmp_path: Path, name: str, nearest: int) -> None:
    put_in = miniatures.write_ebb(tmp_path, nearest)
    photographs = list(open_dataset(name, tmp_path).photographs())
    assert [one.name for one in photographs] == ["IMG_1_wide", "IMG_2_wide"]
    for one in photographs:
        scene = put_in[one.scene]
        assert np.array_equal(one.truth, scene["truth"])
        image = scene["image"]
        if name == "ebb_aligned":
            image = align_exposure(image, scene["truth"])
        assert np.array_equal(one.image, image)
        # 16-bit files hold multiples of 1/65535, here of a range of a half.
        assert one.disparity == pytest.approx(scene["disparity"], abs=2e-5)
        assert one.disparity_range == (0, 1)
        # The mask lies on columns 44 to 47, in the step from 42 to 48.
        assert one.df == pytest.approx(6 / 7, abs=2e-5)
        assert one.K is None


def test_ebb_without_masks_focuses_on_edges_of_both_pictures(tmp_path: Path) -> None:
    miniatures.write_ebb(tmp_path, masks=False)
    sharp = np.full((miniatures.HEIGHT, miniatures.WIDTH, 3), 30, np.uint8)
    sharp[::8, 3:21] = 220
    sharp[::8, 44:47] = 220
    blurred = sharp.copy()
    blurred[:, :28] = 70
    for folder, image in (("input", sharp), ("bokeh", blurred)):
        miniatures.save(tmp_path / folder / "IMG_2.png", image)
    second = list(open_dataset("ebb", tmp_path).photographs())[1]
    # Columns 44 to 46, in the step from 42 to 48.
    assert second.df == pytest.approx(6 / 7, abs=2e-5)


def test_blb(tmp_path: Path) -> None:
    put_in = miniatures.write_blb(tmp_path)["277"]
    photographs = list(open_dataset("blb", tmp_path).photographs())
    assert [one.name for one in photographs] == [f"277_focus_0{index}" for index in range(3)]
    for one, truth, distance in zip(
        photographs, put_in["truths"], put_in["focus_distances"], strict=True
    ):
        assert one.light is not None and np.array_equal(one.light, put_in["light"])
        for shown, light in ((one.image, put_in["light"]), (one.truth, truth)):
            wanted = np.minimum(light.astype(np.float64), 1) ** (1 / 2.2) * 255
            assert np.abs(shown - wanted).max() <= 0.5 + 1e-3
            red, _, blue = shown.mean(axis=(0, 1))
            assert red > 2 * blue, "red stays red"
        wanted = 1 / (put_in["depth"].astype(np.float64) + 1e-10)
        assert wanted[0, 0] == 0 == one.disparity[0, 0], "the sky"
        assert one.disparity == pytest.approx(wanted, rel=1e-6)
        assert one.disparity_range == (0, 1)
        assert one.df == 1 / distance and one.K == 30.0
        assert one.labels == {"level": 5, "focus_distance": distance}


def test_blb_takes_the_depth_that_is_stored_first(tmp_path: Path) -> None:
    miniatures.write_blb(tmp_path)
    depth = 2 + steps()
    channels = {"R": depth + 5, "G": depth + 7, "B": depth}
    miniatures.write_channels(tmp_path / "277" / "depth.exr", channels)
    one = next(open_dataset("blb", tmp_path).photographs())
    assert one.disparity == pytest.approx(1 / depth, rel=1e-6)


def test_blb_counts_files_by_their_number(tmp_path: Path) -> None:
    put_in = miniatures.write_blb(tmp_path)["277"]
    for index in range(3):
        file = tmp_path / "277" / f"bokeh_04_{index:02d}.exr"
        file.rename(file.with_name(f"bokeh_04_{index}.exr"))
    # Another level, which is not read.
    wrong = torch.from_numpy(put_in["light"]).permute(2, 0, 1)
    write_linear_image(tmp_path / "277" / "bokeh_03_00.exr", wrong)
    dataset = open_dataset("blb", tmp_path)
    first = next(dataset.photographs())
    assert dataset.verify() == []
    wanted = np.minimum(put_in["truths"][0], 1) ** (1 / 2.2) * 255
    assert np.abs(first.truth - wanted).max() <= 0.5 + 1e-3


def test_realbokeh(tmp_path: Path) -> None:
    put_in = miniatures.write_realbokeh(tmp_path)
    photographs = list(open_dataset("realbokeh", tmp_path).photographs())
    assert [one.name for one in photographs] == ["12_f2.8", "7_f2", "7_f11"]
    for one, f_number in zip(photographs, (2.8, 2.0, 11), strict=True):
        scene = put_in[one.scene]
        assert np.array_equal(one.image, scene["image"])
        assert np.array_equal(one.truth, scene["truths"][f_number])
        assert one.disparity == pytest.approx(scene["disparity"], abs=2e-5)
        assert one.labels == {"f_number": f_number} and one.K is None
    assert [one.df for one in photographs[1:]] == pytest.approx([3 / 7, 3 / 7], abs=2e-5)


@pytest.mark.parametrize("settings", ["settings.json", "settings.csv"])
def test_triples(tmp_path: Path, settings: str) -> None:
    put_in = miniatures.write_triples(tmp_path, settings)
    dataset = open_dataset("triples", tmp_path)
    assert dataset.scenes == ["kitchen", "sill"]
    photographs = list(dataset.photographs())
    assert [one.name for one in photographs] == ["kitchen_pan", "kitchen_pot", "sill_bokeh"]
    for one, name in zip(photographs, ("pan", "pot", "sill"), strict=True):
        wanted = put_in[name]
        assert np.array_equal(one.image, wanted["image"])
        assert np.array_equal(one.truth, wanted["truth"])
        assert np.array_equal(one.disparity, wanted["disparity"]), "in its own unit"
        assert (one.df, one.K) == (wanted["df"], wanted["K"])
        assert one.disparity_range == (wanted["disparity"].min(), wanted["disparity"].max())


def test_maps_go_by_three_names(tmp_path: Path) -> None:
    miniatures.write_triples(tmp_path)
    maps = tmp_path / "disparity"
    (maps / "pan.npy").rename(maps / "pan_pred.npy")
    (maps / "pot.npy").rename(maps / "pot_disparity.npy")
    assert open_dataset("triples", tmp_path).verify() == []
    (maps / "pan.npy").write_bytes((maps / "pan_pred.npy").read_bytes())
    with pytest.raises(ValueError, match="pan_pred.npy and pan.npy; wanted one map of pan"):
        open_dataset("triples", tmp_path)

"""Samples come back as they were written, or are named as damaged; other readers agree."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_synthesis import ShardedScenes, verify_shards, write_shards
from data_synthesis.reader import DamagedSampleWarning
from data_synthesis.shards import DamagedSample, find_samples
from tests.data_synthesis.noise_scenes import NoiseScenes

SHARD = "shard-00001-of-00003.tar"  # holds samples 4 to 7


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(NoiseScenes(seed=3), folder, count=12, num_shards=3)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "shards"))


def expected(index: int) -> dict[str, Any]:
    """The sample in float64, and df and K."""
    arrays = NoiseScenes(seed=3).arrays(index)
    return {
        "image": arrays["image"] / 255,
        "target": arrays["target"] / 65535,
        "disparity": arrays["disparity"] / 65535,
        "df": arrays["df"],
        "K": arrays["K"],
    }


def assert_sample(item: dict[str, torch.Tensor], index: int) -> None:
    wanted = expected(index)
    assert set(item) == set(wanted)
    for name, value in wanted.items():
        assert item[name].dtype == torch.float32
        np.testing.assert_array_equal(item[name].numpy(), np.float32(value), name)


def opened(folder: Path, **options: Any) -> ShardedScenes:
    """The data set, of which damage is expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedSampleWarning)
        return ShardedScenes(folder, **options)


# --- Whole data sets ------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [True, False])
def test_round_trip_is_exact_in_any_order(written: Path, verify: bool) -> None:
    scenes = ShardedScenes(written, verify=verify)
    assert len(scenes) == 12 and scenes.problems == []
    assert scenes.settings == NoiseScenes(seed=3).settings
    for index in (11, 0, 4, 3, 7):
        assert_sample(scenes[index], index)
    assert_sample(scenes[-1], 11)
    assert_sample(pickle.loads(pickle.dumps(scenes))[5], 5)
    for index in (12, -13):
        with pytest.raises(IndexError, match="12 samples"):
            scenes[index]


def test_record_tells_aperture_and_provenance(written: Path) -> None:
    scenes = ShardedScenes(written)
    for index in (2, 7):
        arrays = NoiseScenes(seed=3).arrays(index)
        record = scenes.record(index)
        assert (record["index"], record["seed"]) == (index, 3)
        for name in ("df", "K", "aperture", "provenance"):
            assert record[name] == arrays[name]


def test_data_loader_with_workers_gives_what_direct_reading_gives(written: Path) -> None:
    scenes = ShardedScenes(written)
    scenes[0]  # before the workers are forked
    order = [7, 0, 11, 4, 5, 2, 9, 1]
    loader = torch.utils.data.DataLoader(
        scenes, batch_size=2, sampler=order, num_workers=2, multiprocessing_context="fork"
    )
    for number, batch in enumerate(loader):
        for place, index in enumerate(order[2 * number : 2 * number + 2]):
            assert_sample({name: value[place] for name, value in batch.items()}, index)


# --- Damage ---------------------------------------------------------------------------------------


def test_any_flipped_byte_costs_one_sample_and_is_told(folder: Path) -> None:
    shard = folder / SHARD
    whole = shard.read_bytes()
    with shard.open("rb") as archive:
        places = list(find_samples(archive))
    assert [index for index, _, _ in places] == [4, 5, 6, 7]
    rng = np.random.default_rng(1)
    # Of every header the name, size and checksum, and places everywhere.
    headers = [start + offset for _, start, _ in places for offset in (0, 7, 130, 150)]
    lost = 0
    for position in [*headers, *rng.integers(0, len(whole), 60).tolist()]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        shard.write_bytes(damaged)
        hit = [index for index, start, stop in places if start <= position < stop]
        scenes = opened(folder)
        indices = [scenes.record(number)["index"] for number in range(len(scenes))]
        missing = sorted(set(range(12)) - set(indices))
        # What pads a file to whole blocks carries nothing.
        assert missing in ([], hit)
        for number, index in enumerate(indices):
            if index in hit:
                assert_sample(scenes[number], index)
        if missing:
            lost += 1
            assert scenes.problems == [f"{SHARD}: damaged or missing are samples {hit[0]:08d}"]
        assert len(verify_shards(folder)) == 1
    assert lost > 60


@pytest.mark.parametrize("verify", [True, False])
def test_truncated_shard_keeps_what_is_before_the_cut(folder: Path, verify: bool) -> None:
    shard = folder / SHARD
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.warns(DamagedSampleWarning) as warned:
        scenes = ShardedScenes(folder, verify=verify)
    message = str(warned[0].message)
    assert "2 of 12 samples" in message and f"{SHARD}: damaged or missing are samples" in message
    assert "00000006 to 00000007" in message
    assert len(scenes) == 10
    assert_sample(scenes[5], 5)
    assert_sample(scenes[6], 8)
    assert verify_shards(folder) == scenes.problems


def test_unverified_damage_is_an_error_when_it_is_met(folder: Path) -> None:
    shard = folder / SHARD
    with shard.open("r+b") as archive:
        _, start, stop = list(find_samples(archive))[1]
        archive.seek((start + stop) // 2)
        archive.write(b"damaged")
    scenes = ShardedScenes(folder, verify=False)
    assert_sample(scenes[4], 4)
    with pytest.raises(DamagedSample, match=rf"{SHARD}: sample 00000005 .*verify=True"):
        scenes[5]
    assert len(opened(folder)) == 11


def test_missing_shards_are_named(folder: Path) -> None:
    (folder / SHARD).unlink()
    with pytest.warns(DamagedSampleWarning, match=f"{SHARD} is missing, with samples 00000004 to"):
        scenes = ShardedScenes(folder)
    assert len(scenes) == 8
    assert_sample(scenes[4], 8)
    assert verify_shards(folder) == [f"{SHARD} is missing, with samples 00000004 to 00000007"]


def test_verify_names_every_bad_shard(folder: Path) -> None:
    assert verify_shards(folder) == []
    (folder / "shard-00000-of-00003.tar").write_bytes(b"")
    last = folder / "shard-00002-of-00003.tar"
    last.write_bytes(last.read_bytes() + b"\0")
    assert verify_shards(folder) == [
        "shard-00000-of-00003.tar: damaged or missing are samples 00000000 to 00000003",
        "shard-00002-of-00003.tar: its SHA-256 differs, though every sample is whole",
    ]


def test_folders_that_are_no_data_set(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no data set: it has no manifest.json"):
        ShardedScenes(tmp_path / "nothing")
    write_shards(NoiseScenes(), tmp_path / "part", count=6, num_shards=3, world_size=2)
    with pytest.raises(ValueError, match="not finished: 2 shards are there"):
        ShardedScenes(tmp_path / "part")
    for shard in folder.glob("*.tar"):
        shard.write_bytes(b"")
    with pytest.raises(ValueError, match="holds no whole sample"):
        ShardedScenes(folder)
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        ShardedScenes(folder)
    manifest.write_bytes(manifest.read_bytes()[:50])
    with pytest.raises(ValueError, match="manifest.json cannot be read"):
        ShardedScenes(folder)


# --- Other readers --------------------------------------------------------------------------------


def assert_json(record: dict[str, Any], index: int) -> None:
    arrays = NoiseScenes(seed=3).arrays(index)
    assert (record["index"], record["seed"]) == (index, 3)
    assert (record["df"], record["K"]) == (arrays["df"], arrays["K"])
    assert json.loads(record["aperture"]) == arrays["aperture"]
    assert json.loads(record["provenance"]) == arrays["provenance"]


def test_webdataset_reads_the_shards(written: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    shards = sorted(map(str, written.glob("shard-*.tar")))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("torchrgb"))
    assert [sample["__key__"] for sample in samples] == [f"{index:08d}" for index in range(12)]
    for index, sample in enumerate(samples):
        arrays = NoiseScenes(seed=3).arrays(index)
        wanted = np.float32(expected(index)["image"])
        np.testing.assert_array_equal(sample["image.png"].numpy(), wanted)
        for name in ("target", "disparity"):
            np.testing.assert_array_equal(sample[f"{name}.npy"], arrays[name])
        assert_json(sample["json"], index)


@pytest.mark.parametrize("streaming", [True, False])
def test_hugging_face_datasets_reads_the_shards(
    written: Path, tmp_path: Path, streaming: bool
) -> None:
    datasets = pytest.importorskip("datasets")
    rows = list(
        datasets.load_dataset(
            "webdataset",
            data_files=str(written / "shard-*.tar"),
            split="train",
            streaming=streaming,
            cache_dir=str(tmp_path),
        )
    )
    assert len(rows) == 12
    for index, row in enumerate(rows):
        arrays = NoiseScenes(seed=3).arrays(index)
        image = np.asarray(row["image.png"]).transpose(2, 0, 1)
        np.testing.assert_array_equal(image, arrays["image"])
        for name in ("target", "disparity"):
            np.testing.assert_array_equal(np.array(row[f"{name}.npy"]), arrays[name])
        assert_json(row["json"], index)

"""The depth estimator, around a real Depth Anything whose answers are known."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import DPTImageProcessorPil, ViTConfig

from bokehdiff.depth import DEFAULT_DEPTH_MODEL, DepthEstimator
from bokehdiff.depth_cache import DepthCache, cache_folder_of_user
from tests.tiny_depth import (
    known_answer,
    save_tiny_depth,
    tiny_depth_network,
    tiny_depth_processor,
)

KINDS = ("relative", "metric")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a tiny model of each kind; not to be written to."""
    return {kind: save_tiny_depth(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture
def damaged(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the relative model, to be damaged."""
    return Path(shutil.copytree(folders["relative"], tmp_path / "model"))


def estimator_of(folder: Path, **settings: object) -> DepthEstimator:
    return DepthEstimator.from_pretrained(folder, **{"cache_folder": None, **settings})


def ramp(height: int = 70, width: int = 70) -> np.ndarray:
    """A picture uint8 (H, W, 3), black on the left, white on the right."""
    levels = np.linspace(0, 255, width).round().astype(np.uint8)
    return np.broadcast_to(levels[None, :, None], (height, width, 3)).copy()


def test_relative_disparity_is_the_answer_stretched_to_the_unit_range():
    photo = ramp(518, 518)
    network = tiny_depth_network("relative")
    processor = tiny_depth_processor(size={"height": 518, "width": 518})
    estimate = DepthEstimator(network, processor)(photo)
    assert not estimate.metric
    assert estimate.disparity.shape == (1, 1, 518, 518)
    assert estimate.disparity.dtype == torch.float32
    # At the network's own size nothing is resampled, and a slow ramp has no edges to be sharpened.
    pixels = processor(images=Image.fromarray(photo), return_tensors="pt").pixel_values
    with torch.no_grad():
        answer = network(pixel_values=pixels).predicted_depth[0].double().numpy()
    low, high = np.quantile(answer, [0.001, 0.999])
    wanted = np.clip((answer - low) / (high - low), 0, 1)
    np.testing.assert_allclose(estimate.disparity[0, 0], wanted, atol=1e-5)
    assert estimate.disparity.min() == 0 and estimate.disparity.max() == 1


@pytest.mark.parametrize("brightness", [26, 128, 230])
def test_metric_disparity_is_one_by_metres(folders, brightness):
    photo = np.full((40, 60, 3), brightness, np.uint8)
    estimate = estimator_of(folders["metric"])(photo)
    assert estimate.metric
    wanted = 1 / known_answer(brightness / 255, "metric")
    # Float32 through ten layers that pass a number on.
    np.testing.assert_allclose(estimate.disparity, np.full((1, 1, 40, 60), wanted), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bright_is_near_in_both_kinds(folders, kind):
    photo = np.full((420, 630, 3), 50, np.uint8)
    photo[126:294, 210:420] = 220
    disparity = estimator_of(folders[kind])(photo).disparity[0, 0]
    near, far = disparity[190:230, 290:340], disparity[:, :60]
    assert near.min() > 2 * far.max()
    if kind == "metric":
        bright, dark = (1 / known_answer(level / 255, kind) for level in (220, 50))
        assert near.max() <= bright * 1.001 and abs(float(far.mean()) / dark - 1) < 0.01


def test_a_few_odd_cells_do_not_take_the_range():
    network, processor = tiny_depth_network("relative"), tiny_depth_processor()
    photo = ramp()
    usual = DepthEstimator(network, processor)(photo).disparity
    # The head's last bias only shifts; a spike of one cell is added behind it.
    watching = network.head.register_forward_hook(
        lambda module, given, answer: answer.index_put(
            (torch.tensor(0), torch.tensor(0), torch.tensor(0)), torch.tensor(1e6)
        )
    )
    spiked = DepthEstimator(network, processor)(photo).disparity
    watching.remove()
    torch.testing.assert_close(spiked[..., 3:, 3:], usual[..., 3:, 3:], atol=0.01, rtol=0)
    assert spiked.max() == 1


@pytest.mark.parametrize(
    "size, seen",
    [
        ((518, 518), (518, 518)),
        ((300, 400), (392, 518)),  # enlarged as little as possible: the long side
        ((1000, 1500), (518, 784)),  # shrunk as little as possible: the short side
        ((1500, 1000), (784, 518)),
        ((32, 48), (350, 518)),
        ((1, 1), (518, 518)),
        ((3, 700), (70, 518)),  # continued to 88 x 700 pixels
    ],
)
def test_what_the_network_sees_with_the_published_settings(size, seen):
    """518, multiples of 14, aspect kept."""
    network = tiny_depth_network("relative")
    processor = tiny_depth_processor(size={"height": 518, "width": 518})
    shapes = []
    network.register_forward_pre_hook(
        lambda module, given, named: shapes.append(tuple(named["pixel_values"].shape)),
        with_kwargs=True,
    )
    estimate = DepthEstimator(network, processor)(np.zeros((*size, 3), np.uint8))
    assert shapes == [(1, 3, *seen)]
    assert estimate.disparity.shape == (1, 1, *size)


def test_every_kind_of_image(folders, tmp_path):
    estimator = estimator_of(folders["relative"])
    photo = ramp(48, 64)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    wanted = estimator(photo).disparity
    tensor = torch.from_numpy(photo).permute(2, 0, 1)
    for image in (
        tmp_path / "photo.png", Image.fromarray(photo), photo[..., 0], tensor, tensor[None],
        tensor / 255, (photo / 255).astype(np.float32),
    ):  # fmt: skip
        assert torch.equal(estimator(image).disparity, wanted)


def test_a_batch_gives_what_its_photographs_give_alone(folders):
    estimator = estimator_of(folders["metric"])
    photos = np.random.default_rng(0).integers(0, 256, (3, 50, 64, 3), dtype=np.uint8)
    alone = torch.cat([estimator(photo).disparity for photo in photos])
    assert torch.equal(estimator(photos).disparity, alone)
    assert torch.equal(estimator(list(photos)).disparity, alone)


def test_a_picture_without_any_difference():
    """All cells answer the same, so nothing can be stretched: everything is the farthest."""
    network = tiny_depth_network("relative")
    with torch.no_grad():
        network.head.conv3.weight.zero_()
    disparity = DepthEstimator(network, tiny_depth_processor())(ramp(9, 13)).disparity
    assert torch.equal(disparity, torch.zeros(1, 1, 9, 13))


def test_nearer_than_a_centimetre_is_a_centimetre():
    network = tiny_depth_network("metric")
    with torch.no_grad():
        network.head.conv3.bias.fill_(-200)  # a depth of 0 in float32
    disparity = DepthEstimator(network, tiny_depth_processor())(ramp(9, 13)).disparity
    assert torch.equal(disparity, torch.full((1, 1, 9, 13), 100.0))


def test_half_precision_is_close(folders):
    photo = ramp(60, 80)
    full = estimator_of(folders["metric"])(photo).disparity
    half = estimator_of(folders["metric"], dtype=torch.bfloat16)(photo).disparity
    assert half.dtype == torch.float32
    # Eight bits through about ten layers, before an exponential; an edge may move by a pixel.
    assert float(((half / full - 1).abs() > 0.05).float().mean()) < 0.05


def test_nothing_global_changes_and_the_same_comes_twice(folders):
    def state() -> tuple[object, ...]:
        return (
            torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(),
            torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
        )  # fmt: skip

    before = state()
    estimator = estimator_of(folders["relative"])
    first = estimator(ramp(50, 60)).disparity
    assert torch.equal(estimator(ramp(50, 60)).disparity, first)
    assert state() == before
    assert not estimator.network.training
    assert not first.requires_grad


# --- The cache ------------------------------------------------------------------------------------


class Looks:
    """How often a network looked at a picture."""

    def __init__(self, estimator: DepthEstimator) -> None:
        self.count = 0
        estimator.network.register_forward_hook(self)

    def __call__(self, *call: object) -> None:
        self.count += 1


@pytest.fixture
def cached(folders, tmp_path) -> Iterator[tuple[DepthEstimator, Looks, Path]]:
    estimator = estimator_of(folders["relative"], cache_folder=tmp_path / "cache")
    yield estimator, Looks(estimator), tmp_path / "cache"


def test_a_photograph_is_looked_at_once(cached, folders):
    estimator, looks, folder = cached
    photo = ramp(50, 60)
    first = estimator(photo).disparity
    assert torch.equal(estimator(photo).disparity, first) and looks.count == 1
    assert torch.equal(first, estimator_of(folders["relative"])(photo).disparity)
    assert [file.suffix for file in folder.iterdir()] == [".safetensors"]
    estimator(255 - photo)
    assert looks.count == 2


def test_the_same_model_elsewhere_finds_it_and_another_does_not(cached, folders, tmp_path):
    estimator, _, folder = cached
    photo = ramp(50, 60)
    estimator(photo)
    elsewhere = shutil.copytree(folders["relative"], tmp_path / "elsewhere")
    for model, dtype, wanted in (
        (elsewhere, torch.float32, 0),
        (elsewhere, torch.bfloat16, 1),
        (folders["metric"], torch.float32, 1),
    ):
        other = estimator_of(model, dtype=dtype, cache_folder=folder)
        looks = Looks(other)
        other(photo)
        assert looks.count == wanted, (model, dtype)


def test_the_settings_of_the_network_belong_to_the_key(cached, tmp_path, folders):
    """The same weights, told to answer in metres up to 80 instead of 20."""
    _, _, folder = cached
    far = Path(shutil.copytree(folders["metric"], tmp_path / "far"))
    config = json.loads((far / "config.json").read_text())
    (far / "config.json").write_text(json.dumps({**config, "max_depth": 80}))
    photo = ramp(50, 60)
    near_disparity = estimator_of(folders["metric"], cache_folder=folder)(photo).disparity
    far_disparity = estimator_of(far, cache_folder=folder)(photo).disparity
    torch.testing.assert_close(far_disparity, near_disparity / 4)


@pytest.mark.parametrize("damage", ["empty", "cut short", "a bit", "another file", "a folder"])
def test_a_damaged_entry_is_made_again(cached, damage):
    estimator, looks, folder = cached
    photo = ramp(50, 60)
    first = estimator(photo).disparity
    (entry,) = folder.iterdir()
    data = entry.read_bytes()
    if damage == "a folder":
        entry.unlink()
        entry.mkdir()
        with pytest.warns(UserWarning, match="could not be kept"):
            assert torch.equal(estimator(photo).disparity, first)
        return
    entry.write_bytes({
        "empty": b"",
        "cut short": data[:-5],
        "a bit": data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
        "another file": b"not at all" * 100,
    }[damage])  # fmt: skip
    assert torch.equal(estimator(photo).disparity, first) and looks.count == 2
    assert entry.read_bytes() == data
    assert torch.equal(estimator(photo).disparity, first) and looks.count == 2


def test_a_cache_that_cannot_be_written_warns_and_no_cache_writes_nothing(folders, tmp_path):
    (tmp_path / "file").write_text("")
    estimator = estimator_of(folders["relative"], cache_folder=tmp_path / "file" / "cache")
    with pytest.warns(UserWarning, match="BOKEHDIFF_CACHE"):
        estimator(ramp(20, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimator_of(folders["relative"], cache_folder=None)(ramp(20, 20))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_where_the_cache_of_a_user_is(monkeypatch, tmp_path, folders):
    monkeypatch.setenv("BOKEHDIFF_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder_of_user() == tmp_path / "mine"
    estimator = DepthEstimator.from_pretrained(folders["relative"])
    assert estimator.cache.folder == tmp_path / "mine" / "depth"
    monkeypatch.delenv("BOKEHDIFF_CACHE")
    assert cache_folder_of_user() == tmp_path / "xdg" / "bokehdiff"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder_of_user() == tmp_path / "home" / ".cache" / "bokehdiff"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_folder_of_user() == tmp_path / "home" / "Library" / "Caches" / "bokehdiff"


def test_a_cache_keeps_bits(tmp_path):
    cache = DepthCache(tmp_path / "cache")
    answer = torch.tensor([[0.1, 1e-30], [3e38, 0.0]])
    assert cache.find("one") is None
    cache.keep("one", answer)
    assert torch.equal(cache.find("one"), answer)
    assert cache.find("two") is None


# --- Models that do not load ----------------------------------------------------------------------


def test_published_names_of_tensors_load(damaged, folders):
    """The published checkpoints call the projections of the attention by their older names."""
    weights = load_file(damaged / "model.safetensors")
    older = {
        "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
    }
    for name in list(weights):
        for new, old in older.items():
            if new in name:
                weights[name.replace(new, old)] = weights.pop(name)
    assert "backbone.encoder.layer.0.attention.attention.query.weight" in weights
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    photo = ramp(50, 60)
    wanted = estimator_of(folders["relative"])(photo).disparity
    assert torch.equal(estimator_of(damaged)(photo).disparity, wanted)


def refusal(folder: object, **settings: object) -> str:
    with pytest.raises(ValueError) as caught:
        estimator_of(folder, **settings)
    sentence = str(caught.value)
    assert "\n" not in sentence and "--disparity" in sentence
    return sentence


def test_a_name_that_leads_nowhere(tmp_path):
    sentence = refusal("somebody/no-such-depth-model")
    assert "somebody/no-such-depth-model could not be fetched" in sentence
    assert "hf download somebody/no-such-depth-model --local-dir FOLDER" in sentence
    assert f"There is no folder {tmp_path}/none; wanted" in refusal(tmp_path / "none")
    (tmp_path / "file.safetensors").write_bytes(b"1")
    assert "file.safetensors is a file; wanted the folder" in refusal(tmp_path / "file.safetensors")
    (tmp_path / "empty").mkdir()
    sentence = refusal(tmp_path / "empty")
    assert f"{tmp_path}/empty could not be loaded" in sentence and DEFAULT_DEPTH_MODEL in sentence


def test_a_model_of_another_architecture(tmp_path):
    ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    assert "holds a model of type 'vit'; wanted a Depth Anything model" in refusal(tmp_path)


@pytest.mark.parametrize("damage", ["config", "config of another shape", "processor"])
def test_damaged_settings(damaged, damage):
    if damage == "config of another shape":
        config = json.loads((damaged / "config.json").read_text())
        (damaged / "config.json").write_text(json.dumps({**config, "fusion_hidden_size": 6}))
    else:
        name = "preprocessor_config.json" if damage == "processor" else "config.json"
        (damaged / name).write_text('{"size": ')
    refusal(damaged)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_missing_file(damaged, name):
    (damaged / name).unlink()
    refusal(damaged)


def test_damaged_weights(damaged):
    file = damaged / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert "could not be loaded as a depth model" in refusal(damaged)
    file.write_bytes(b"garbage" * 9)
    assert "could not be loaded as a depth model" in refusal(damaged)

    file.write_bytes(whole)
    weights = load_file(file)
    missing = {name: value for name, value in weights.items() if name != "head.conv3.bias"}
    save_file(missing, file, metadata={"format": "pt"})
    assert "1 tensors are missing, among them head.conv3.bias" in refusal(damaged)
    save_file({**weights, "surplus": torch.ones(2)}, file, metadata={"format": "pt"})
    assert "1 tensors are unexpected, among them surplus" in refusal(damaged)


def test_a_pickle_is_not_opened(damaged):
    weights = load_file(damaged / "model.safetensors")
    (damaged / "model.safetensors").unlink()
    torch.save(weights, damaged / "pytorch_model.bin")
    assert "safetensors" in refusal(damaged)


def test_weights_that_are_no_numbers(damaged):
    weights = load_file(damaged / "model.safetensors")
    weights["head.conv3.bias"].fill_(float("nan"))
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"answered NaN or infinity in torch.float32"):
        estimator_of(damaged)(ramp(20, 20))


def test_a_processor_of_another_network(damaged):
    DPTImageProcessorPil().save_pretrained(damaged)
    with pytest.raises(ValueError, match="multiples of 1 pixels.*patches of 14"):
        estimator_of(damaged)

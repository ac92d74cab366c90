"""LPIPS and DISTS with seeded random networks: by their packages and equations, and by file."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from evaluation.metrics import metric_by_name, quantise_to_8_bit
from evaluation.perceptual_metrics import dists_distance, lpips_distance
from evaluation.photographs import Photograph

lpips = pytest.importorskip("lpips", reason="LPIPS needs bokehdiff[train]")
pytest.importorskip("piq", reason="DISTS needs bokehdiff[train]")

VGG = {
    # index in torchvision's `features`: (input channels, output channels, side of the kernel)
    0: (3, 64, 3),
    2: (64, 64, 3),
    5: (64, 128, 3),
    7: (128, 128, 3),
    10: (128, 256, 3),
    12: (256, 256, 3),
    14: (256, 256, 3),
    17: (256, 512, 3),
    19: (512, 512, 3),
    21: (512, 512, 3),
    24: (512, 512, 3),
    26: (512, 512, 3),
    28: (512, 512, 3),
}
ALEX = {0: (3, 64, 11), 3: (64, 192, 5), 6: (192, 384, 3), 8: (384, 256, 3), 10: (256, 256, 3)}
VGG_NAME, ALEX_NAME = "vgg16-397923af", "alexnet-owt-7be5be79"
NAMES = ("lpips", "lpips_alex", "dists")
LAST_RELU_BEFORE_EACH_POOLING = (3, 8, 15, 22, 29)
CHANNELS = (3, 64, 128, 256, 512, 512)
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_backbone(layers: dict[int, tuple[int, int, int]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for index, (before, after, side) in layers.items():
        weight = torch.randn(after, before, side, side, generator=generator)
        state[f"features.{index}.weight"] = weight * (2 / (side * side * before)) ** 0.5
        state[f"features.{index}.bias"] = 0.1 * torch.randn(after, generator=generator)
    return state


def random_dists() -> dict[str, Tensor]:
    """alpha and beta, which do not sum to 1."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(1, sum(CHANNELS), 1, 1, generator=generator) for name in ("alpha", "beta")
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that is published, with random values; one file of each kind that is read."""
    folder = tmp_path_factory.mktemp("weights")
    # A whole classifier is published; of its other tensors nothing is read.
    torch.save(
        {**random_backbone(ALEX), "classifier.6.bias": torch.zeros(1000)},
        folder / f"{ALEX_NAME}.pth",
    )
    save_file(random_backbone(VGG), folder / f"{VGG_NAME}.safetensors")
    torch.save(random_dists(), folder / "dists_weights.pt")
    return folder


def images(side: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """A smooth picture and noise to lay over it, float64 (side, side, 3)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    truth = np.stack([0.5 + 0.3 * np.sin(9 * x + 3 * c) * np.cos(7 * y) for c in range(3)], 2)
    return quantise_to_8_bit(truth), rng.normal(size=truth.shape)


def distorted(strength: float, side: int = 48) -> tuple[np.ndarray, np.ndarray]:
    truth, noise = images(side)
    return quantise_to_8_bit(truth + strength * noise), truth


def photograph(truth: np.ndarray) -> Photograph:
    picture = (truth * 255).round().astype(np.uint8)
    flat = np.zeros(truth.shape[:2], np.float32)
    return Photograph("scene", "f0", picture, flat, (0.0, 1.0), 0.0, None, picture)


# -- What they are -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_identical_images_give_0_and_more_distortion_more(name: str, folder: Path) -> None:
    metric = metric_by_name(name, folder)
    truth, _ = images()
    given = photograph(truth)
    figures = [metric.measure(distorted(s)[0], given) for s in (0.0, 0.02, 0.06, 0.2)]
    assert figures[0] == pytest.approx(0, abs=1e-6)
    assert all(less < more for less, more in zip(figures, figures[1:], strict=False))
    assert metric.better == "lower"


def feature_maps(image: Tensor, until: int, pool: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """float64 activations of the random VGG-16 after the last ReLU before each pooling."""
    state = {name: value.double() for name, value in random_backbone(VGG).items()}
    maps = []
    for index in range(until + 1):
        if index in VGG:
            weight, bias = (state[f"features.{index}.{kind}"] for kind in ("weight", "bias"))
            image = torch.nn.functional.conv2d(image, weight, bias, padding=1)
        elif index - 1 in VGG:
            image = image.clamp(min=0)
        else:
            image = pool(image)
        if index in LAST_RELU_BEFORE_EACH_POOLING:
            maps.append(image)
    return maps


def as_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None]


@pytest.mark.parametrize("backbone", ["vgg", "alex"])
def test_lpips_is_what_its_package_says_in_float64(backbone: str, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net=backbone, pnet_rand=True, verbose=False)
    state = random_backbone(VGG if backbone == "vgg" else ALEX)
    for name, parameter in network.net.named_parameters():
        parameter.data = state["features." + ".".join(name.split(".")[-2:])]
    prediction, truth = distorted(0.1)
    wanted = network.double()(as_tensor(prediction), as_tensor(truth), normalize=True)
    assert wanted > 0.01
    measured = lpips_distance(backbone, folder)(prediction, truth)
    assert measured == pytest.approx(wanted.item(), rel=1e-5)


def test_dists_is_its_equation_in_float64(folder: Path) -> None:
    """Ding et al. 2020, equations 1, 5 to 8, with the constants of piq."""
    window = torch.hann_window(4, dtype=torch.float64)[1:]
    window = window[:, None] * window / window.sum() ** 2

    def smooth_pool(image: Tensor) -> Tensor:
        channels = image.shape[1]
        mean = torch.nn.functional.conv2d(
            image.square(), window.expand(channels, 1, 3, 3), stride=2, padding=1, groups=channels
        )
        return (mean + 1e-12).sqrt()

    deviation, mean = (
        torch.tensor(values, dtype=torch.float64)[:, None, None]
        for values in (IMAGENET_DEVIATION, IMAGENET_MEAN)
    )
    prediction, truth = distorted(0.1)
    stacks = []
    for image in (prediction, truth):
        standardised = (as_tensor(image) - mean) / deviation
        stacks.append([standardised, *feature_maps(standardised, 29, smooth_pool)])
    weights = {name: value.double() for name, value in random_dists().items()}
    total = sum(value.sum() for value in weights.values())
    alphas, betas = (torch.split(weights[name] / total, CHANNELS, 1) for name in ("alpha", "beta"))
    similarity = 0.0
    for x, y, alpha, beta in zip(*stacks, alphas, betas, strict=True):
        mean_x, mean_y = (one.mean((2, 3), keepdim=True) for one in (x, y))
        variances = sum(one.var((2, 3), correction=0, keepdim=True) for one in (x, y))
        covariance = ((x - mean_x) * (y - mean_y)).mean((2, 3), keepdim=True)
        luminance = (2 * mean_x * mean_y + 1e-6) / (mean_x**2 + mean_y**2 + 1e-6)
        structure = (2 * covariance + 1e-6) / (variances + 1e-6)
        similarity += float((alpha * luminance + beta * structure).sum())
    assert 1 - similarity > 0.01
    assert dists_distance(folder)(prediction, truth) == pytest.approx(1 - similarity, rel=1e-4)


def test_dists_scales_large_images_down(folder: Path) -> None:
    prediction, truth = distorted(0.1, side=272)
    small = [
        torch.nn.functional.interpolate(as_tensor(image), scale_factor=256 / 272, mode="bilinear")
        for image in (prediction, truth)
    ]
    measure = dists_distance(folder)
    measured = measure(*(image[0].permute(1, 2, 0).numpy() for image in small))
    assert measure(prediction, truth) == pytest.approx(measured, rel=1e-4)


def test_too_small_images_have_no_figure(folder: Path) -> None:
    for name, side in [("lpips", 16), ("lpips_alex", 31)]:
        metric = metric_by_name(name, folder)
        for wanted, size in [(True, side), (False, side - 1)]:
            prediction, truth = distorted(0.1, size)
            assert (metric.measure(prediction, photograph(truth)) is not None) == wanted


@pytest.mark.parametrize("name", NAMES)
def test_making_them_says_nothing_and_draws_no_random_number(
    name: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric_by_name(name, folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")


# -- Where their weights come from ---------------------------------------------------------------


def test_a_backbone_is_named_by_its_file_too(folder: Path) -> None:
    prediction, truth = distorted(0.1)
    for make, file in [
        (lambda weights: lpips_distance("vgg", weights), f"{VGG_NAME}.safetensors"),
        (lambda weights: lpips_distance("alex", weights), f"{ALEX_NAME}.pth"),
        (dists_distance, f"{VGG_NAME}.safetensors"),
    ]:
        by_folder = make(folder)(prediction, truth)
        assert make(str(folder / file))(prediction, truth) == by_folder


def test_without_a_file_the_cache_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(random_backbone(VGG), cache / f"{VGG_NAME}.pth")
    for name in (f"{ALEX_NAME}.pth", "dists_weights.pt"):
        (cache / name).symlink_to(folder / name)
    prediction, truth = distorted(0.1)
    for name in NAMES:
        given = photograph(truth)
        wanted = metric_by_name(name, folder).measure(prediction, given)
        assert metric_by_name(name).measure(prediction, given) == wanted


@pytest.mark.parametrize(
    ("name", "file"),
    [("lpips", f"{VGG_NAME}.pth"), ("lpips_alex", f"{ALEX_NAME}.pth"), ("dists", VGG_NAME)],
)
def test_a_failing_download_says_what_to_do(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # where nobody listens
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ValueError) as raised:
        metric_by_name(name)
    for part in (f"https://download.pytorch.org/models/{file}", str(tmp_path), "--weights"):
        assert part in str(raised.value)


def test_weights_of_dists_are_asked_for_beside_the_backbone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "vgg.safetensors").symlink_to(folder / f"{VGG_NAME}.safetensors")
    with pytest.raises(ValueError) as raised:
        metric_by_name("dists", tmp_path / "vgg.safetensors")
    for part in (f"{tmp_path} holds no dists_weights.pt", "github.com/photosynthesis-team/piq"):
        assert part in str(raised.value)


def without_a_layer() -> dict[str, Tensor]:
    return {name: value for name, value in random_backbone(ALEX).items() if ".8." not in name}


def with_a_narrow_layer() -> dict[str, Tensor]:
    return {**random_backbone(ALEX), "features.3.weight": torch.zeros(192, 32, 5, 5)}


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.safetensors", without_a_layer, "features.8.weight is missing, features.8.bias is miss"),
        ("a.pth", without_a_layer, "features.8.weight is missing, features.8.bias is missing"),
        ("a.pth", with_a_narrow_layer, r"features.3.weight is \(192, 32, 5, 5\)"),
        ("a.pth", lambda: {"state_dict": {}}, "of its 10 tensors 10 do not fit"),
        ("a.pth", lambda: {"features.0.weight": 3}, "features.0.weight is missing"),
        ("a.pth", lambda: [1, 2], "holds a list"),
        ("a.pth", lambda: b"rubbish", "cannot be read"),
        ("a.safetensors", lambda: b"rubbish", "cannot be read"),
        ("a.pth", lambda: None, "There is no file or folder"),
        (".", lambda: None, f"holds no {ALEX_NAME}.pth"),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, name: str, content: Callable[[], Any], complaint: str
) -> None:
    path, values = tmp_path / name, content()
    if isinstance(values, bytes):
        path.write_bytes(values)
    elif path.suffix == ".safetensors":
        save_file(values, path)
    elif values is not None:
        torch.save(values, path)
    with pytest.raises(ValueError, match=complaint) as raised:
        metric_by_name("lpips_alex", path)
    for part in (str(path), f"https://download.pytorch.org/models/{ALEX_NAME}.pth", "--weights"):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("name", "package"), [("lpips", "lpips"), ("dists", "piq"), ("ms_ssim", "piq")]
)
def test_a_missing_package_is_named(
    name: str, package: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'bokehdiff\[train\]'"):
        metric_by_name(name, folder)

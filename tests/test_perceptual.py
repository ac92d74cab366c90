"""The perceptual loss: LPIPS of known weights by its equation, what is frozen, what is refused."""

from __future__ import annotations

import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bokehdiff import losses
from bokehdiff.losses import PerceptualLoss

pytest.importorskip("lpips", reason="the perceptual loss needs bokehdiff[train]")

VGG_LAYERS = {
    # index in torchvision's `features`: (input channels, output channels)
    0: (3, 64),
    2: (64, 64),
    5: (64, 128),
    7: (128, 128),
    10: (128, 256),
    12: (256, 256),
    14: (256, 256),
    17: (256, 512),
    19: (512, 512),
    21: (512, 512),
    24: (512, 512),
    26: (512, 512),
    28: (512, 512),
}
LAST_RELU_BEFORE_EACH_POOLING = (3, 8, 15, 22, 29)


def random_vgg(bias: float = 0.1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for index, (before, after) in VGG_LAYERS.items():
        weight = torch.randn(after, before, 3, 3, generator=generator) * (2 / (9 * before)) ** 0.5
        state[f"features.{index}.weight"] = weight
        state[f"features.{index}.bias"] = bias * torch.randn(after, generator=generator)
    return state


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file(random_vgg(), path)
    return str(path)


@pytest.fixture(scope="module")
def loss(vgg_file: str) -> PerceptualLoss:
    return PerceptualLoss.from_backbone(vgg_file)


def images(batch: int = 2, height: int = 32, width: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = 2 * torch.rand(2, batch, 3, height, width, generator=generator) - 1
    return first, second


def lpips_by_its_equation(prediction: Tensor, target: Tensor) -> Tensor:
    """LPIPS of torchvision's own VGG-16, and of the linear weights in the wheel of lpips."""
    import lpips
    from torchvision.models import vgg16

    with torch.device("meta"):
        features = vgg16(weights=None).features
    state = {name.removeprefix("features."): value for name, value in random_vgg().items()}
    features.load_state_dict(
        {name: value.to(prediction) for name, value in state.items()}, assign=True
    )
    linear = torch.load(
        Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth", map_location="cpu"
    )
    mean = prediction.new_tensor([-0.030, -0.088, -0.188])[:, None, None]
    deviation = prediction.new_tensor([0.458, 0.448, 0.450])[:, None, None]
    first, second = ((image - mean) / deviation for image in (prediction, target))
    total = prediction.new_zeros(())
    for index, layer in enumerate(features):
        first, second = layer(first.clone()), layer(second.clone())
        if index in LAST_RELU_BEFORE_EACH_POOLING:
            scale = LAST_RELU_BEFORE_EACH_POOLING.index(index)
            difference = torch.nn.functional.normalize(first) - torch.nn.functional.normalize(
                second
            )
            weight = linear[f"lin{scale}.model.1.weight"].to(prediction)
            assert weight.min() >= 0
            total = total + (weight * difference.square()).sum(1).mean()
    return total


def test_it_is_lpips_of_the_weights_in_the_file(loss: PerceptualLoss) -> None:
    prediction, target = images()
    prediction.requires_grad_()
    value = loss(prediction, target)
    (gradient,) = torch.autograd.grad(value, prediction)

    prediction64 = prediction.detach().double().requires_grad_()
    value64 = lpips_by_its_equation(prediction64, target.double())
    (gradient64,) = torch.autograd.grad(value64, prediction64)

    assert value.shape == () and value.dtype == torch.float32
    assert value64 > 0.1
    assert value.item() == pytest.approx(value64.item(), rel=1e-5)
    torch.testing.assert_close(
        gradient.double(), gradient64, rtol=0, atol=1e-4 * float(gradient64.abs().max())
    )


def test_it_is_the_mean_over_the_batch(loss: PerceptualLoss) -> None:
    prediction, target = images()
    alone = [loss(prediction[i : i + 1], target[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(loss(prediction, target), torch.stack(alone).mean())
    assert alone[0] != alone[1]


def test_it_is_zero_at_the_target_with_a_finite_gradient(loss: PerceptualLoss) -> None:
    target, other = images()
    prediction = target.clone().requires_grad_()
    value = loss(prediction, target)
    (gradient,) = torch.autograd.grad(value, prediction)
    assert value == 0
    assert gradient.abs().max() == 0
    assert loss(other, target) > 0


def test_features_that_are_zero_everywhere_have_a_finite_gradient(tmp_path: Path) -> None:
    # The norm of a zero vector has no derivative.
    state = random_vgg()
    state["features.28.bias"] -= 1e4
    save_file(state, tmp_path / "dead.safetensors")
    loss = PerceptualLoss.from_backbone(str(tmp_path / "dead.safetensors"))
    prediction, target = images(1)
    prediction.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(prediction, target), prediction)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_autocast_and_half_precision_change_nothing(loss: PerceptualLoss) -> None:
    prediction, target = (image.bfloat16() for image in images())
    wanted = loss(prediction.float(), target.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(prediction, target), wanted)


def test_nothing_in_it_is_trained_or_drops_out(loss: PerceptualLoss) -> None:
    prediction, target = images()
    wanted = loss(prediction, target)
    torch.nn.Sequential(loss).train()
    assert not any(module.training for module in loss.modules())
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert torch.equal(loss(prediction, target), wanted)


def test_a_whole_state_dict_of_torchvision_is_read(
    tmp_path: Path, vgg_file: str, loss: PerceptualLoss
) -> None:
    state = {**random_vgg(), "classifier.6.bias": torch.zeros(1000)}
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "vgg16.pth")
    from_pth = PerceptualLoss.from_backbone(str(tmp_path / "vgg16.pth"))
    assert from_pth.state_dict().keys() == loss.state_dict().keys()
    for name, value in from_pth.state_dict().items():
        assert value.dtype == torch.float32
        # Half precision keeps 11 bits.
        torch.testing.assert_close(value, loss.state_dict()[name], rtol=2**-11, atol=1e-6)


def test_making_it_says_nothing_and_draws_no_random_number(
    vgg_file: str, capfd: pytest.CaptureFixture[str]
) -> None:
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PerceptualLoss.from_backbone(vgg_file)
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")


def test_a_missing_package_is_named_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("lpips", "torchvision"):
        monkeypatch.setitem(sys.modules, package, None)
    module = runpy.run_path(losses.__file__)
    with pytest.raises(ImportError, match=r"pip install 'bokehdiff\[train\]'"):
        module["PerceptualLoss"].from_backbone()


# -- The file of VGG-16 --------------------------------------------------------------------------


def test_without_a_file_the_cache_of_torchvision_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: PerceptualLoss
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(random_vgg(), folder / "vgg16-397923af.pth")
    assert torch.equal(PerceptualLoss.from_backbone()(*images()), loss(*images()))


def test_a_failing_download_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError) as raised:
        PerceptualLoss.from_backbone()
    for part in (
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        str(tmp_path),
        "loss.perceptual_weights",
        "loss.perceptual_weight: 0",
    ):
        assert part in str(raised.value)


def without_a_layer() -> dict[str, Tensor]:
    return {name: value for name, value in random_vgg().items() if ".17." not in name}


def with_a_narrow_layer() -> dict[str, Tensor]:
    return {**random_vgg(), "features.2.weight": torch.zeros(64, 32, 3, 3)}


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.safetensors", without_a_layer, "17.weight is missing, features.17.bias is missing"),
        ("a.pth", without_a_layer, "17.weight is missing, features.17.bias is missing"),
        ("a.pth", with_a_narrow_layer, r"features.2.weight is \(64, 32, 3, 3\)"),
        ("a.pth", lambda: {"state_dict": {}}, "of its 26 tensors 26 do not fit"),
        ("a.pth", lambda: [1, 2], "holds a list"),
        ("a.pth", lambda: b"rubbish", "cannot be read"),
        ("a.safetensors", lambda: b"rubbish", "cannot be read"),
        ("a.pth", lambda: b"", "cannot be read"),
        ("a.pth", lambda: None, "There is no file"),
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
        PerceptualLoss.from_backbone(str(path))
    for part in (str(path), "loss.perceptual_weights", "loss.perceptual_weight: 0"):
        assert part in str(raised.value)


# -- Images --------------------------------------------------------------------------------------


def test_the_smallest_images_work(loss: PerceptualLoss) -> None:
    assert loss(*images(1, 16, 16)) > 0


@pytest.mark.parametrize("shape", [(1, 3, 15, 32), (1, 3, 32, 8), (1, 1, 32, 32), (1, 4, 32, 32)])
def test_other_images_are_refused(loss: PerceptualLoss, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="3 channels and at least 16 pixels"):
        loss(torch.zeros(shape), torch.zeros(shape))


def test_images_of_two_shapes_are_refused(loss: PerceptualLoss) -> None:
    prediction, target = images()
    with pytest.raises(ValueError, match="one shape"):
        loss(prediction, target[:1])
    with pytest.raises(ValueError, match="one shape"):
        loss(prediction[0], target[0])

"""The loss of features of VGG-19: its equation with known weights, what is frozen or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d, relu

from bokehdiff.losses import VGGFeatureLoss

CONVOLUTIONS = {
    # index in torchvision's `features`: (input channels, output channels)
    0: (3, 64), 2: (64, 64),
    5: (64, 128), 7: (128, 128),
    10: (128, 256), 12: (256, 256), 14: (256, 256), 16: (256, 256),
    19: (256, 512), 21: (512, 512), 23: (512, 512), 25: (512, 512),
    28: (512, 512), 30: (512, 512), 32: (512, 512), 34: (512, 512),
}  # fmt: skip
BEGIN_AFTER_POOLING = (5, 10, 19, 28)


def random_vgg19() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for index, (before, after) in CONVOLUTIONS.items():
        weight = torch.randn(after, before, 3, 3, generator=generator) * (2 / (9 * before)) ** 0.5
        state[f"features.{index}.weight"] = weight
        state[f"features.{index}.bias"] = 0.1 * torch.randn(after, generator=generator)
    return state


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vgg")
    save_file(random_vgg19(), folder / "vgg19.safetensors")
    # As torchvision publishes it, with a classifier behind.
    classifier = {"classifier.6.bias": torch.zeros(1000)}
    torch.save({**random_vgg19(), **classifier}, folder / "vgg19-dcbb9e9d.pth")
    return {"safetensors": folder / "vgg19.safetensors", "folder": folder}


@pytest.fixture(scope="module")
def loss(files: dict[str, Path]) -> VGGFeatureLoss:
    return VGGFeatureLoss.from_backbone(str(files["safetensors"]))


def images(batch: int = 2, height: int = 32, width: int = 40) -> tuple[Tensor, Tensor]:
    first, second = torch.rand(
        2, batch, 3, height, width, generator=torch.Generator().manual_seed(0)
    )
    return first, second


def by_its_equation(prediction: Tensor, target: Tensor) -> Tensor:
    state = random_vgg19()
    mean, deviation = (
        prediction.new_tensor(one).view(1, 3, 1, 1)
        for one in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )

    def features(image: Tensor) -> Tensor:
        values = (image - mean) / deviation
        for index in CONVOLUTIONS:
            if index in BEGIN_AFTER_POOLING:
                values = max_pool2d(values, 2)
            weight, bias = (
                state[f"features.{index}.{kind}"].to(values) for kind in ("weight", "bias")
            )
            values = relu(conv2d(values, weight, bias, padding=1))
        return values

    return ((features(prediction) - features(target)) ** 2).mean()


def test_it_is_the_difference_of_the_features_of_relu5_4(loss: VGGFeatureLoss) -> None:
    prediction, target = images()
    prediction.requires_grad_()
    value = loss(prediction, target)
    (gradient,) = torch.autograd.grad(value, prediction)
    prediction64 = prediction.detach().double().requires_grad_()
    value64 = by_its_equation(prediction64, target.double())
    (gradient64,) = torch.autograd.grad(value64, prediction64)
    assert value.shape == () and value64 > 1e-3
    assert value.item() == pytest.approx(value64.item(), rel=1e-5)
    torch.testing.assert_close(
        gradient.double(), gradient64, rtol=0, atol=1e-4 * float(gradient64.abs().max())
    )
    assert loss(target, target) == 0


def test_files_and_folders_are_read_alike(files: dict[str, Path], loss: VGGFeatureLoss) -> None:
    again = VGGFeatureLoss.from_backbone(str(files["folder"]))
    assert torch.equal(again(*images()), loss(*images()))


def test_everything_is_frozen(loss: VGGFeatureLoss) -> None:
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    loss.train()
    assert not any(module.training for module in loss.modules())


def test_it_is_computed_in_float32_under_autocast(loss: VGGFeatureLoss) -> None:
    alone = loss(*images())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(*images()), alone)


def test_refusals(loss: VGGFeatureLoss, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 16 pixels a side"):
        loss(*images(height=15))
    with pytest.raises(ValueError, match="one shape"):
        loss(images()[0], images()[1][..., :-1])
    state = random_vgg19()
    del state["features.34.weight"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="features.34.weight is missing"):
        VGGFeatureLoss.from_backbone(str(tmp_path / "part.safetensors"))
    with pytest.raises(ValueError, match="no file or folder.*perceptual_weights"):
        VGGFeatureLoss.from_backbone(str(tmp_path / "nothing.pth"))

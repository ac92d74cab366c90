"""The discriminator: what it computes, whom its gradients reach, what changes its state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    ResNetConfig,
    ResNetModel,
)

from bokehdiff.losses import discriminator_loss, generator_loss
from bokehdiff.models import BokehDiscriminator


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random ConvNeXt whose blocks count for something, and drop paths in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ConvNextConfig(
            hidden_sizes=[8, 8, 8, 16],
            depths=[1, 1, 1, 1],
            layer_scale_init_value=1.0,
            drop_path_rate=0.5,
            initializer_range=0.3,
        )
        model = ConvNextModel(config)
    folder = tmp_path_factory.mktemp("convnext")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def new_discriminator(backbone_folder: str) -> Callable[..., BokehDiscriminator]:
    def new(seed: int = 0) -> BokehDiscriminator:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return BokehDiscriminator.from_backbone(backbone_folder)

    return new


@pytest.fixture
def discriminator(new_discriminator: Callable[..., BokehDiscriminator]) -> BokehDiscriminator:
    return new_discriminator()


def images(batch: int = 2, height: int = 64, width: int = 96, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(batch, 3, height, width, generator=generator) - 1


def snapshot(discriminator: BokehDiscriminator) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in discriminator.state_dict().items()}


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    changed = [name for name in first if not torch.equal(first[name], second[name])]
    assert not changed


def twin(discriminator: BokehDiscriminator, pixels: Tensor, *head: Tensor) -> Tensor:
    """Logits (B, h, w) of images in [-1, 1] in float64, by the equations.

    `head`: weight, bias, u, v of one linear layer after another.
    """
    backbone = copy.deepcopy(discriminator.backbone).double().eval()
    features = backbone((pixels + 1) / 2).last_hidden_state
    first_weight, first_bias, first_u, first_v, last_weight, last_bias, last_u, last_v = head
    first_weight = first_weight / (first_u @ first_weight @ first_v)
    last_weight = last_weight / (last_u @ last_weight @ last_v)
    hidden = torch.einsum("oc,bchw->bohw", first_weight, features) + first_bias[:, None, None]
    hidden = torch.where(hidden > 0, hidden, 0.2 * hidden)
    return torch.einsum("oc,bchw->bohw", last_weight, hidden)[:, 0] + last_bias


def head_in_float64(discriminator: BokehDiscriminator) -> list[Tensor]:
    state = {name: value.double() for name, value in discriminator.head_state_dict().items()}
    return [
        state[name].clone()
        for layer in (0, 2)
        for name in (
            f"{layer}.parametrizations.weight.original",
            f"{layer}.bias",
            f"{layer}.parametrizations.weight.0._u",
            f"{layer}.parametrizations.weight.0._v",
        )
    ]


def head_gradients(discriminator: BokehDiscriminator) -> list[Tensor | None]:
    return [parameter.grad for parameter in discriminator.head.parameters()]


# -- What it computes ----------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(32, 32), (63, 32), (64, 96), (90, 130)])
def test_one_logit_for_each_32_pixels(
    discriminator: BokehDiscriminator, height: int, width: int
) -> None:
    assert discriminator.stride == 32
    logits = discriminator(images(3, height, width))
    assert logits.shape == (3, height // 32, width // 32)
    assert logits.dtype == torch.float32


def test_logits_and_the_gradient_of_images_follow_the_equations(
    discriminator: BokehDiscriminator,
) -> None:
    pixels = images().requires_grad_()
    logits = discriminator(pixels)
    (gradient,) = torch.autograd.grad(generator_loss(logits), pixels)

    pixels64 = images().double().requires_grad_()
    logits64 = twin(discriminator, pixels64, *head_in_float64(discriminator))
    cross_entropy = -(0.8 * logits64.sigmoid().log() + 0.2 * (-logits64).sigmoid().log()).mean()
    (gradient64,) = torch.autograd.grad(cross_entropy, pixels64)

    # Float32 through a few dozen layers: 1e-5 of the largest.
    for ours, wanted in ((logits, logits64), (gradient, gradient64)):
        largest = wanted.abs().max().item()
        assert largest > 0
        torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=1e-5 * largest)


def test_gradient_of_the_head_follows_the_equations(discriminator: BokehDiscriminator) -> None:
    real, fake = discriminator(images(4), update=True).chunk(2)
    discriminator_loss(real, fake).backward()

    # The power iteration of this very step comes first, and is no part of the gradient.
    head = head_in_float64(discriminator)
    trained = [head[index].requires_grad_() for index in (1, 0, 5, 4)]
    real64, fake64 = twin(discriminator, images(4).double(), *head).chunk(2)
    loss64 = (
        -(0.8 * real64.sigmoid().log() + 0.2 * (-real64).sigmoid().log()).mean()
        - torch.log((-fake64).sigmoid()).mean()
    )
    wanted = torch.autograd.grad(loss64, trained)

    names = [name for name, _ in discriminator.head.named_parameters()]
    assert names == [
        "0.bias",
        "0.parametrizations.weight.original",
        "2.bias",
        "2.parametrizations.weight.original",
    ]
    for gradient, gradient64 in zip(head_gradients(discriminator), wanted, strict=True):
        assert gradient is not None
        tolerance = 1e-5 * max(value.abs().max().item() for value in wanted)
        torch.testing.assert_close(gradient.double(), gradient64, rtol=0, atol=tolerance)


def test_each_location_is_judged_alone(discriminator: BokehDiscriminator) -> None:
    # Without its residual blocks the backbone sees 32 x 32 pixels at each location.
    for name, parameter in discriminator.backbone.named_parameters():
        if "layer_scale_parameter" in name:
            torch.nn.init.zeros_(parameter)
    pixels = images()
    changed = pixels.clone()
    changed[1, :, 32:64, 64:96] *= -1
    difference = discriminator(changed) != discriminator(pixels)
    assert difference.nonzero().tolist() == [[1, 1, 2]]


def test_autocast_and_half_precision_images_change_nothing(
    discriminator: BokehDiscriminator,
) -> None:
    pixels = images().bfloat16()
    for update in (False, True):
        state = snapshot(discriminator)
        wanted = discriminator(pixels.float(), update=update)
        discriminator.load_state_dict(state)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(discriminator(pixels, update=update), wanted)


# -- Whom gradients reach ------------------------------------------------------------------------


def test_only_the_head_is_trained(discriminator: BokehDiscriminator) -> None:
    asking = [name for name, value in discriminator.named_parameters() if value.requires_grad]
    assert asking == [f"head.{name}" for name, _ in discriminator.head.named_parameters()]
    assert len(asking) == 4


def test_without_update_gradients_reach_the_images_alone(
    discriminator: BokehDiscriminator,
) -> None:
    assert not discriminator(images()).requires_grad
    pixels = images().requires_grad_()
    generator_loss(discriminator(pixels)).backward()
    assert pixels.grad is not None and pixels.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in discriminator.parameters())


def test_with_update_gradients_reach_the_head_alone(discriminator: BokehDiscriminator) -> None:
    pixels = images().requires_grad_()
    generator_loss(discriminator(pixels, update=True)).backward()
    assert pixels.grad is None
    for gradient in head_gradients(discriminator):
        assert gradient is not None and gradient.abs().max() > 0
    assert all(parameter.grad is None for parameter in discriminator.backbone.parameters())


@pytest.mark.parametrize("generator_first", [True, False])
def test_one_backward_of_both_terms_is_each_term_alone(
    new_discriminator: Callable[..., BokehDiscriminator], generator_first: bool
) -> None:
    real = images(seed=1)

    def generator_term(discriminator: BokehDiscriminator, fake: Tensor) -> Tensor:
        return generator_loss(discriminator(fake))

    def discriminator_term(discriminator: BokehDiscriminator, fake: Tensor) -> Tensor:
        return discriminator_loss(
            *discriminator(torch.cat([real, fake.detach()]), update=True).chunk(2)
        )

    together, fake = new_discriminator(), images().requires_grad_()
    order = (generator_term, discriminator_term)
    terms = [term(together, fake) for term in (order if generator_first else order[::-1])]
    sum(terms, torch.zeros(())).backward()

    alone, fake_alone = new_discriminator(), images().requires_grad_()
    if generator_first:
        generator_term(alone, fake_alone).backward()
        discriminator_term(alone, fake_alone).backward()
    else:
        discriminator_term(alone, fake_alone).backward()
        generator_term(alone, fake_alone).backward()

    assert fake.grad is not None and fake_alone.grad is not None
    assert torch.equal(fake.grad, fake_alone.grad)
    for ours, wanted in zip(head_gradients(together), head_gradients(alone), strict=True):
        assert ours is not None and wanted is not None
        assert torch.equal(ours, wanted)
    assert_same_bits(snapshot(together), snapshot(alone))


# -- What changes its state ----------------------------------------------------------------------


def test_without_update_no_state_changes(discriminator: BokehDiscriminator) -> None:
    state, random_state = snapshot(discriminator), torch.get_rng_state()
    pixels = images().requires_grad_()
    first, second = discriminator(pixels), discriminator(pixels)
    assert torch.equal(first, second)
    assert_same_bits(snapshot(discriminator), state)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_an_update_moves_the_vectors_of_the_power_iteration_alone(
    discriminator: BokehDiscriminator,
) -> None:
    before = snapshot(discriminator)
    discriminator(images(), update=True)
    after = snapshot(discriminator)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    # The last layer has one row, whose singular vectors are known after one step.
    assert {f"head.0.parametrizations.weight.0.{vector}" for vector in ("_u", "_v")} <= moved
    assert all(name.endswith(("_u", "_v")) for name in moved)


def test_the_mode_of_the_module_around_it_does_not_count(
    discriminator: BokehDiscriminator,
) -> None:
    parent = torch.nn.Sequential(discriminator)
    parent.eval()
    wanted = discriminator(images())
    parent.train()
    assert not any(module.training for module in discriminator.modules())
    state = snapshot(discriminator)
    assert torch.equal(discriminator(images()), wanted)
    assert_same_bits(snapshot(discriminator), state)
    # Nor does an update leave it in training mode, or drop a path.
    discriminator(images(), update=True)
    assert not any(module.training for module in discriminator.modules())
    first = discriminator(images(), update=True)
    discriminator.load_state_dict(state)
    discriminator(images(), update=True)
    assert torch.equal(discriminator(images(), update=True), first)


def test_drop_path_of_the_backbone_would_be_seen(discriminator: BokehDiscriminator) -> None:
    wanted = discriminator(images(16))
    discriminator.backbone.train()
    assert not torch.equal(discriminator(images(16)), wanted)


def test_many_updates_find_the_spectral_norm(discriminator: BokehDiscriminator) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in discriminator.head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    layers = [discriminator.head[0], discriminator.head[2]]
    norms = [torch.linalg.matrix_norm(layer.weight, 2) for layer in layers]
    assert max(abs(norm - 1) for norm in norms) > 1e-2
    # Errors of a power iteration shrink by the squared ratio of the two largest singular values,
    # here about 0.9 at a time.
    for _ in range(100):
        discriminator(images(1, 32, 32), update=True)
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, abs=1e-5)


def test_it_learns_to_tell_smooth_from_rough(discriminator: BokehDiscriminator) -> None:
    rough = images(4, 32, 32)
    smooth = rough.mean((2, 3), keepdim=True).expand_as(rough)
    optimizer = torch.optim.AdamW(
        [value for value in discriminator.parameters() if value.requires_grad], lr=0.02
    )
    losses = []
    for _ in range(40):
        real, fake = discriminator(torch.cat([smooth, rough]), update=True).chunk(2)
        loss = discriminator_loss(real, fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert discriminator(smooth).min() > discriminator(rough).max()


# -- Saving and loading --------------------------------------------------------------------------


def test_training_goes_on_exactly_from_a_saved_head(
    tmp_path: Path, new_discriminator: Callable[..., BokehDiscriminator]
) -> None:
    def train(discriminator: BokehDiscriminator, steps: range) -> None:
        parameters = list(discriminator.head.parameters())
        for step in steps:
            real, fake = discriminator(images(4, seed=step), update=True).chunk(2)
            gradients = torch.autograd.grad(discriminator_loss(real, fake), parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.sub_(gradient)

    uninterrupted = new_discriminator()
    train(uninterrupted, range(3))
    save_file(uninterrupted.head_state_dict(), tmp_path / "head.safetensors")
    train(uninterrupted, range(3, 6))

    resumed = new_discriminator(seed=1)
    assert not torch.equal(resumed(images()), uninterrupted(images()))
    resumed.load_head_state_dict(load_file(tmp_path / "head.safetensors"))
    train(resumed, range(3, 6))
    assert_same_bits(snapshot(resumed), snapshot(uninterrupted))


def test_a_head_that_does_not_fit_is_refused(discriminator: BokehDiscriminator) -> None:
    state = snapshot(discriminator)
    head = discriminator.head_state_dict()
    assert not any("backbone" in name for name in head)
    for wrong in (
        {name: value for name, value in head.items() if name != "0.bias"},
        {**head, "3.bias": head["0.bias"]},
        {**head, "0.parametrizations.weight.original": torch.zeros(256, 24)},
    ):
        with pytest.raises(ValueError, match="loss.adversarial_backbone it was trained with"):
            discriminator.load_head_state_dict(wrong)
    assert_same_bits(snapshot(discriminator), state)


def test_a_classifier_saved_in_half_precision_is_loaded_in_float32(tmp_path: Path) -> None:
    config = ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1])
    ConvNextForImageClassification(config).half().save_pretrained(tmp_path)
    discriminator = BokehDiscriminator.from_backbone(str(tmp_path))
    assert {value.dtype for value in discriminator.state_dict().values()} == {torch.float32}


def test_a_backbone_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nowhere"), str(tmp_path), "facebook/no-such-convnext"):
        with pytest.raises(ValueError, match="could not be loaded") as raised:
            BokehDiscriminator.from_backbone(name)
        for part in (name, "loss.adversarial_backbone", "loss.adversarial_weight: 0"):
            assert part in str(raised.value)


def test_another_network_is_no_backbone(tmp_path: Path) -> None:
    config = ResNetConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], embedding_size=8)
    ResNetModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a whole ConvNeXt: .*missing"):
        BokehDiscriminator.from_backbone(str(tmp_path))


@pytest.mark.parametrize("shape", [(1, 3, 31, 64), (1, 3, 64, 16), (1, 1, 64, 64), (3, 64, 64)])
def test_other_images_are_refused(
    discriminator: BokehDiscriminator, shape: tuple[int, ...]
) -> None:
    state = snapshot(discriminator)
    for update in (False, True):
        with pytest.raises(ValueError, match=r"at least 32 pixels a side, got \("):
            discriminator(torch.zeros(shape), update=update)
    assert_same_bits(snapshot(discriminator), state)

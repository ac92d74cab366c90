"""The judges of patches: what they see, and that they remember nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bokehdiff.losses import hinge_discriminator_loss, hinge_generator_loss
from bokehdiff.models.patch_discriminator import PatchDiscriminators


def judges(seed: int = 0) -> PatchDiscriminators:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PatchDiscriminators(channels=4)


def picture(side: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_patches_are_of_70_and_34_pixels():
    network = judges().double()
    # An instance norm sees the whole picture; what remains without it is the patch.
    norms = [name for name, one in network.named_modules() if isinstance(one, nn.InstanceNorm2d)]
    for name in norms:
        network.set_submodule(name, nn.Identity())
    assert norms
    image = picture(160).double().requires_grad_()
    for number, side in enumerate((70, 34)):
        logits = network(image)[number]
        middle = logits.shape[-1] // 2
        (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], image)
        seen = (gradient[0] != 0).any(0)
        assert seen.any(0).sum() == side and seen.any(1).sum() == side


def test_nothing_is_remembered():
    network = judges()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first = network(picture(64))
    network(picture(64, seed=2))
    assert all(map(torch.equal, network(picture(64)), first))
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    network.eval()
    assert all(map(torch.equal, network(picture(64)), first))


@pytest.mark.parametrize("shape", [(1, 3, 31, 64), (1, 3, 64, 16), (1, 1, 64, 64), (3, 64, 64)])
def test_other_pictures_are_refused(shape):
    with pytest.raises(ValueError, match=r"at least 32 pixels a side, got \("):
        judges()(torch.zeros(shape))
    assert all(logits.isfinite().all() for logits in judges()(picture(32)))


def test_they_learn_to_tell_pictures_apart():
    network = judges()
    optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
    noise = picture(48)
    smooth = nn.functional.avg_pool2d(noise, 5, 1, 2)
    first = hinge_discriminator_loss(network(noise), network(smooth)).item()
    for _ in range(30):
        loss = hinge_discriminator_loss(network(noise), network(smooth))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.5 * first
    assert hinge_generator_loss(network(noise)) < hinge_generator_loss(network(smooth))

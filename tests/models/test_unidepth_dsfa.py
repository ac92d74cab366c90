"""A network with the outside of UniDepthV2 that sees a bokeh stack."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bokehdiff.models.unidepth_dsfa import UniDepthGeometry, add_dsfa, infer_from_stack
from tests.tiny_unidepth import TinyUniDepth, tiny_unidepth

K = torch.tensor([[10.0, 20.0, 30.0]])


def pictures(*shape: int, seed: int = 0, size: tuple[int, int] = (60, 90)) -> Tensor:
    return torch.rand(*shape, 3, *size, generator=torch.Generator().manual_seed(seed))


def seeing(**options: Any) -> TinyUniDepth:
    model = tiny_unidepth()
    torch.manual_seed(3)
    add_dsfa(model, **{"initial_gate": 0.5, **options})
    return model


def alone(model: TinyUniDepth, image: Tensor) -> Tensor:
    """Depth of the network as it is, of the picture as it is prepared."""
    geometry = UniDepthGeometry.of(*image.shape[-2:], (0.5, 2.5), (2_000, 6_000))
    inputs = {"image": geometry.prepare(image), "camera": None}
    return geometry.restore(model.encode_decode(inputs, [])[1]["depth"])


@torch.no_grad()
def test_fresh_encoder_changes_nothing() -> None:
    model = tiny_unidepth()
    wanted = alone(model, pictures(1))
    assert float(wanted.max() - wanted.min()) > 0.5
    encoder = add_dsfa(model)
    assert model.pixel_encoder is encoder and not encoder.training
    assert encoder.fusion.levels == [0, 1, 2, 3]
    assert encoder.fusion.block(0).largest_strength == 30
    assert torch.equal(alone(model, pictures(1)), wanted)
    found = infer_from_stack(model, pictures(1), pictures(1, 3, seed=1), K)
    torch.testing.assert_close(found["depth"], wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="has DSFA already"):
        add_dsfa(model)


@torch.no_grad()
def test_stack_and_strengths_are_seen_and_not_kept() -> None:
    model = seeing()
    before = alone(model, pictures(1))
    one, other = (infer_from_stack(model, pictures(1), pictures(1, 3, seed=s), K) for s in (1, 2))
    assert one["depth"].shape == one["confidence"].shape == (1, 1, 60, 90)
    assert (one["depth"] - other["depth"]).abs().max() > 0.02
    flipped = infer_from_stack(model, pictures(1), pictures(1, 3, seed=1), K.flip(1))
    assert (one["depth"] - flipped["depth"]).abs().max() > 1e-3
    assert torch.equal(alone(model, pictures(1)), before)


@torch.no_grad()
def test_strengths_are_those_of_the_picture_given() -> None:
    """A picture of half the size, with K of half the size, looks the same to the network."""
    model = seeing()
    geometry = UniDepthGeometry.of(112, 168, (0.5, 2.5), (2_000, 6_000))
    assert geometry.network == (70, 98)
    image, stack = pictures(1, size=(112, 168)), pictures(1, 3, seed=1, size=(112, 168))
    found = infer_from_stack(model, image, stack, K)["depth"]
    encoder = model.pixel_encoder
    frames = geometry.prepare(stack[0]).unsqueeze(0)
    features, _ = encoder(geometry.prepare(image), frames, K * (98 / 168))
    answer = model.pixel_decoder(sum(features)).movedim(-1, 1)
    answer = F.interpolate(answer, (70, 98), mode="bilinear").sigmoid()
    torch.testing.assert_close(found, geometry.restore(1 + 9 * answer[:, :1]))


@pytest.mark.parametrize("size", [(40, 160), (160, 40), (60, 90)])
@torch.no_grad()
def test_depth_has_the_size_of_the_picture(size: tuple[int, int]) -> None:
    image = pictures(2, size=size)
    found = infer_from_stack(seeing(), image, image.unsqueeze(1), torch.ones(2, 1))
    assert found["depth"].shape == (2, 1, *size)


def test_padding_comes_off_where_it_went_on() -> None:
    geometry = UniDepthGeometry.of(300, 1200)
    image = torch.rand(1, 3, 300, 1200)
    kept = geometry.restore(F.pad(image, geometry.pads))
    torch.testing.assert_close(kept, image)


@torch.no_grad()
def test_level_of_resolution_is_heard() -> None:
    model, sizes = seeing(), []
    model.pixel_encoder.backbone.register_forward_hook(
        lambda module, given, result: sizes.append(given[0].shape[-2] * given[0].shape[-1])
    )
    for level in (0, 9):
        model.resolution_level = level
        image = pictures(1, size=(40, 60))
        infer_from_stack(model, image, image.unsqueeze(1), torch.ones(1, 1))
    assert 2_000 < sizes[0] < 4_000 and 5_600 < sizes[-1] < 8_000


class Camera:
    """A camera as far as it is used, which says how it was cropped and resized."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def crop(self, **sides: int) -> Camera:
        return Camera([*self.log, sides])

    def resize(self, factor: float) -> Camera:
        return Camera([*self.log, factor])

    def get_rays(self, shapes: tuple[int, ...]) -> float:
        factor = math.sqrt(6_000 / (64 * 160))
        assert self.log == [dict(left=0, right=0, top=-12, bottom=-12), factor]
        assert shapes == (1, 56, 126)
        return 2.0


@torch.no_grad()
def test_camera_follows_the_picture() -> None:
    image = pictures(1, size=(40, 160))
    stack = image.unsqueeze(1)
    model = seeing()
    plain = infer_from_stack(model, image, stack, torch.ones(1, 1))["depth"]
    found = infer_from_stack(model, image, stack, torch.ones(1, 1), Camera([]))["depth"]
    torch.testing.assert_close(found, 2 * plain)


def test_mistakes() -> None:
    model, image, stack = seeing(), pictures(1), pictures(1, 3)
    with pytest.raises(ValueError, match="after add_dsfa"):
        infer_from_stack(tiny_unidepth(), image, stack, K)
    with pytest.raises(ValueError, match="N of 1 or more"):
        infer_from_stack(model, image, stack[:, :0], K[:, :0])
    with pytest.raises(ValueError, match="with the sizes of the picture"):
        infer_from_stack(model, image, stack[..., :50], K)
    with pytest.raises(ValueError, match=r"\(1, 3\); wanted \(1, 2\)"):
        infer_from_stack(model, image, stack[:, :2], K)
    with pytest.raises(ValueError, match="go together"):
        model.pixel_encoder(image, stack)
    with pytest.raises(ValueError, match="with the sizes of the picture"):
        model.pixel_encoder(image, stack[..., :28, :28], K)

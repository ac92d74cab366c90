"""Warping by known motion: whole and half pixels, borders, gradients, and what clips say of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bokehdiff.warping import seen_before, warp
from data_synthesis.clip_scenes import ClipScenes


def picture(height: int = 6, width: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand((2, 3, height, width), generator=generator, dtype=torch.float64)


def constant_motion(x: float, y: float, like: Tensor) -> Tensor:
    motion = torch.zeros_like(like[:, :2])
    motion[:, 0], motion[:, 1] = x, y
    return motion


def test_what_stands_still_stays_as_it_is() -> None:
    image = picture()
    assert torch.allclose(warp(image, constant_motion(0, 0, image)), image, rtol=0, atol=1e-14)


def test_motion_by_whole_pixels_moves_the_picture() -> None:
    """What is at column 3 now was at column 5, two to the right, and one up."""
    image = picture()
    moved = warp(image, constant_motion(2, -1, image))
    assert torch.allclose(moved[..., 1:, :-2], image[..., :-1, 2:], rtol=0, atol=1e-13)


def test_between_pixels_is_their_mean_and_beyond_the_border_is_the_border() -> None:
    image = picture()
    half = warp(image, constant_motion(0.5, 0, image))
    assert torch.allclose(half[..., :-1], (image[..., 1:] + image[..., :-1]) / 2, atol=1e-13)
    beyond = warp(image, constant_motion(0, 100, image))
    assert torch.allclose(beyond, image[..., -1:, :].expand_as(image), atol=1e-13)


def test_seen_before_is_where_the_point_was_in_the_picture() -> None:
    motion = 6 * torch.rand((2, 2, 5, 7), generator=torch.Generator().manual_seed(1)) - 3
    found = seen_before(motion)
    for b in range(2):
        for y in range(5):
            for x in range(7):
                column, row = x + float(motion[b, 0, y, x]), y + float(motion[b, 1, y, x])
                assert bool(found[b, 0, y, x]) == (0 <= column <= 6 and 0 <= row <= 4)
    assert seen_before(torch.zeros(1, 2, 4, 4)).all()


def test_gradients_are_those_of_finite_differences() -> None:
    image = picture(4, 5)[:1, :1].requires_grad_()
    generator = torch.Generator().manual_seed(2)
    motion = (torch.rand((1, 2, 4, 5), generator=generator, dtype=torch.float64) + 0.1) / 1.5
    assert torch.autograd.gradcheck(warp, (image, motion.requires_grad_()))


def test_motions_of_another_shape_are_refused() -> None:
    image = picture()
    for motion in (torch.zeros(2, 3, 6, 9), torch.zeros(1, 2, 6, 9), torch.zeros(2, 2, 9, 6)):
        with pytest.raises(ValueError, match="wanted \\(B, 2, H, W\\)"):
            warp(image, motion.double())
    with pytest.raises(ValueError, match="wanted \\(B, 2, H, W\\)"):
        seen_before(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize(("motion", "index", "largest"), [("pan", 3, 1e-6), ("moving", 2, 0.002)])
def test_clips_without_noise_look_alike_once_warped(
    motion: str, index: int, largest: float
) -> None:
    """Clips mean motion as `warp` reads it; the edges of things that move are mixed with others."""
    clip = ClipScenes(3, 48, motions=(motion,), noise=(0.0, 0.0))[index]
    field, visible = clip["motion"][1:2], clip["visible"][1:2] > 0
    # Half a pixel of motion blurs what is warped.
    whole = visible & (field % 1 == 0).all(1, keepdim=True) & (field != 0).any(1, keepdim=True)
    assert whole.sum() > 400

    def difference(how: Tensor) -> float:
        change = (clip["frames"][1:2] - warp(clip["frames"][:1], how)).abs().mean(1, keepdim=True)
        return float(change[whole].mean())

    assert difference(field) < largest
    assert min(difference(0 * field), difference(-field)) > 10 * largest

"""Where the lens changes nothing: weights of the codec's residual and of the photo itself."""

from __future__ import annotations

import pytest
import torch

from bokehdiff.pipelines import detail
from bokehdiff.pipelines.detail import (
    blurred_light_depth,
    put_back_detail,
    residual_weight,
    untouched_weight,
)


def exact_depth(signed_defocus: torch.Tensor) -> torch.Tensor:
    """max over blurred pixels of (radius if nearer than the focal plane else 0) - distance."""
    height, width = signed_defocus.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    positions = torch.stack([rows, columns], -1).reshape(-1, 2).float()
    radius = signed_defocus.reshape(-1)
    depth = radius.clamp(min=0)[None] - torch.cdist(positions, positions)
    depth[:, radius.abs() <= 0.5] = -torch.inf
    return depth.amax(1).view(1, 1, height, width)


def test_residual_weight_by_own_blur() -> None:
    radius = torch.tensor([0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 9.0])
    weight = residual_weight(radius)
    assert weight[:2].tolist() == [1, 1]
    assert weight[-2:].tolist() == [0, 0]
    assert weight[3] == pytest.approx(0.5)
    assert (weight.diff() <= 0).all()


def test_nothing_out_of_focus_is_untouched_everywhere() -> None:
    assert (untouched_weight(torch.zeros(2, 1, 37, 53)) == 1).all()
    assert (untouched_weight(torch.full((1, 1, 37, 53), -0.5)) == 1).all()


@pytest.mark.parametrize("radius", [0.7, 3.0, 12.0, 40.0, 300.0])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("window_pixels", [16, 256])
def test_light_is_never_missed_and_not_overestimated_much(
    radius: float, seed: int, window_pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detail, "WINDOW_PIXELS", window_pixels)
    generator = torch.Generator().manual_seed(seed)
    defocus = torch.zeros(1, 1, 61, 83)
    flat = defocus.view(-1)
    places = torch.randint(0, flat.numel(), (4,), generator=generator)
    flat[places] = radius * (2 * torch.rand(4, generator=generator) - 1)
    flat[places[0]] = radius
    exact, depth = exact_depth(defocus), blurred_light_depth(defocus)
    assert (depth >= torch.where(exact > -4, exact, -torch.inf) - 1e-4).all()
    cell = max(2, -(-int(radius + 3) // 8))
    assert (depth[exact < -0.42 * radius - 4 * cell - 4] < -3).all()


def test_in_focus_pixels_far_from_near_blur_are_untouched() -> None:
    defocus = torch.zeros(1, 1, 96, 96)
    defocus[..., :20] = 8.0
    weight = untouched_weight(defocus)
    assert (weight[..., :28] == 0).all()
    assert (weight[..., 60:] == 1).all()
    assert (weight.diff(dim=-1) >= 0).all()


def test_a_subject_in_focus_hides_the_blur_behind_it() -> None:
    defocus = torch.full((1, 1, 96, 96), -30.0)
    defocus[..., 24:72, 24:72] = 0.0
    weight = untouched_weight(defocus)
    assert (weight[..., 44:52, 44:52] == 1).all()
    assert (weight[..., 24, 24:72] == 0).all(), "mixed pixels of the silhouette"
    in_front = untouched_weight(defocus.abs())
    assert (in_front[..., 26:70, 26:70] == 0).all()


def test_weights_do_not_depend_on_the_rest_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(1, 1, 40, 40, generator=generator)
    wide = 30 * torch.randn(1, 1, 40, 40, generator=generator)
    together = untouched_weight(torch.cat([small, wide]))
    assert torch.equal(together[:1], untouched_weight(small))
    assert torch.equal(together[1:], untouched_weight(wide))


def test_photo_comes_back_exactly_even_from_a_broken_render() -> None:
    image = torch.rand(1, 3, 16, 16)
    broken = torch.full_like(image, torch.nan)
    assert torch.equal(put_back_detail(broken, image, broken, torch.zeros(1, 1, 16, 16)), image)


def test_blurred_pixels_are_left_to_the_network() -> None:
    image, rendered, codec = torch.rand(3, 1, 3, 16, 16)
    defocus = torch.full((1, 1, 16, 16), 4.0)
    assert torch.equal(put_back_detail(rendered, image, codec, defocus), rendered)


def test_residual_returns_where_light_arrives_at_a_sharp_pixel() -> None:
    image, rendered, codec = torch.rand(3, 1, 3, 16, 16)
    defocus = torch.zeros(1, 1, 16, 16)
    defocus[..., 0, 0] = 60.0  # one near light that reaches every pixel
    result = put_back_detail(rendered, image, codec, defocus)
    wanted = rendered + image - codec
    assert torch.allclose(result[..., 1:, 1:], wanted[..., 1:, 1:], atol=1e-6)


@pytest.mark.parametrize("radius", [1.0, 9.0, 70.0])
def test_windows_leave_no_trace(radius: float, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    defocus = radius * torch.randn(2, 1, 9, 11, generator=generator).clamp(min=-1)
    defocus[:, :, 2:6] = 0
    defocus = torch.nn.functional.interpolate(defocus, size=(77, 90))
    image, rendered, codec = torch.rand(3, 2, 3, 77, 90, generator=generator)
    pictures = []
    for window_pixels in (256, 16):
        monkeypatch.setattr(detail, "WINDOW_PIXELS", window_pixels)
        pictures.append(put_back_detail(rendered, image, codec, defocus))
    # Places of pixels between cells are rounded differently, and the fade is steep.
    assert (pictures[1] - pictures[0]).abs().max() < 1e-4

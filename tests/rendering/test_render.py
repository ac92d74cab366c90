"""render_bokeh: the door of the classical renderers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bokehdiff.images import linear_to_srgb, srgb_to_linear
from bokehdiff.rendering import Aperture, depth_ordered_scatter, render_bokeh


@pytest.fixture
def scene() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.rand(2, 3, 20, 26, generator=generator),
        "disparity": torch.rand(2, 1, 20, 26, generator=generator),
        "df": 0.5,
        "K": 6.0,
    }


def test_blurs_in_linear_light(scene: dict[str, Any]) -> None:
    blurred = render_bokeh(**scene, aperture=Aperture(7))
    defocus = scene["K"] * (scene["disparity"] - scene["df"])
    light = depth_ordered_scatter(srgb_to_linear(scene["image"]), defocus, aperture=Aperture(7))
    torch.testing.assert_close(blurred, linear_to_srgb(light).clamp(0, 1))
    assert blurred.shape == scene["image"].shape and blurred.dtype == torch.float32


def test_no_blur_returns_the_photograph_exactly(scene: dict[str, Any]) -> None:
    assert torch.equal(render_bokeh(**{**scene, "K": 0.0}), scene["image"])
    in_focus = {**scene, "disparity": torch.full((2, 1, 20, 26), 0.5)}
    assert torch.equal(render_bokeh(**in_focus), scene["image"])


def test_focus_and_strength_for_each_image(scene: dict[str, Any]) -> None:
    df, K = torch.tensor([0.2, 0.9]), torch.tensor([0.0, 8.0])
    together = render_bokeh(scene["image"], scene["disparity"], df, K)
    assert torch.equal(together[0], scene["image"][0])
    alone = render_bokeh(scene["image"][1:], scene["disparity"][1:], 0.9, 8.0)
    # Vectorised powers round differently at the end of a tensor.
    torch.testing.assert_close(together[1:], alone, atol=1e-6, rtol=0)


def test_takes_what_a_person_has(scene: dict[str, Any]) -> None:
    pixels = (scene["image"][0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    disparity = scene["disparity"][0, 0].numpy()
    from_picture = render_bokeh(Image.fromarray(pixels), disparity, 0.5, 6.0)
    from_array = render_bokeh(pixels, torch.from_numpy(disparity), 0.5, 6.0)
    assert torch.equal(from_picture, from_array) and from_picture.shape == (1, 3, 20, 26)


def test_metric_disparity_may_exceed_one(scene: dict[str, Any]) -> None:
    metric = render_bokeh(scene["image"], 4 * scene["disparity"], 2.0, 1.5, metric=True)
    torch.testing.assert_close(metric, render_bokeh(**scene))


def test_gradient_reaches_the_photograph(scene: dict[str, Any]) -> None:
    image = scene["image"].requires_grad_()
    render_bokeh(**{**scene, "image": image}).square().sum().backward()
    assert image.grad is not None and bool(torch.isfinite(image.grad).all())
    assert (image.grad != 0).double().mean() > 0.99


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "gathering"}, "wanted one of 'scatter'"),
        ({"aperture": "hexagon"}, "Aperture"),
        ({"image": torch.rand(2, 3, 20, 26) * 255}, "0"),
        ({"image": torch.rand(20, 26)}, "shape"),
        ({"disparity": torch.rand(2, 1, 10, 13)}, "same size"),
        ({"disparity": torch.full((2, 1, 20, 26), math.nan)}, "no known pixel"),
        ({"disparity": torch.rand(2, 1, 20, 26) * 1000}, "metric"),
        ({"df": 1.5}, "df"),
        ({"K": -3.0}, "K"),
        ({"K": math.inf}, "finite"),
        ({"K": 1e6}, "circle of confusion"),
        ({"df": torch.rand(3)}, "df"),
    ],
)
def test_mistakes_are_refused(scene: dict[str, Any], change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        render_bokeh(**{**scene, **change})

"""The classical renderers agree with the authors' on every stored case."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bokehdiff.rendering import Aperture, render_layers, scatter_bokehme

FIXTURES = Path(
    os.environ.get(
        "BOKEHDIFF_FIXTURES", Path(__file__).resolve().parents[2] / "shared" / "fixtures"
    )
)
INDEX = FIXTURES / "bokehdiff" / "renderer" / "renderer.json"

pytestmark = pytest.mark.skipif(
    not INDEX.is_file(), reason=f"no {INDEX}; point BOKEHDIFF_FIXTURES at the folder of fixtures"
)


def cases() -> dict[str, Any]:
    """The cases of the index: a dict of settings if ray-traced, a description if scattered."""
    return json.loads(INDEX.read_text())["cases"] if INDEX.is_file() else {}


RAY_TRACED = sorted(name for name, case in cases().items() if isinstance(case, dict))
SCATTERED = sorted(name for name, case in cases().items() if isinstance(case, str))


def tensors_of(case: str) -> dict[str, torch.Tensor]:
    safetensors = pytest.importorskip("safetensors.torch")
    stored = safetensors.load_file(INDEX.with_suffix(".safetensors"))
    prefix = f"{case}."
    return {name[len(prefix) :]: stored[name] for name in stored if name.startswith(prefix)}


def hits(planes: torch.Tensor, case: dict[str, Any]) -> Iterator[torch.Tensor]:
    """For each layer (B, S, H, W, 2) places (x, y) where the rays meet it, in float64."""
    height, width = case["hw"]
    lens = Aperture().lens_samples(case["side"], dtype=torch.float64)
    u, v = lens.view(1, -1, 1, 1, 2).unbind(-1)
    y = torch.arange(height, dtype=torch.float64).view(1, 1, -1, 1)
    x = torch.arange(width, dtype=torch.float64).view(1, 1, 1, -1)
    for a, b, c in planes.double().permute(1, 2, 0)[..., None, None, None]:
        s = (1 - a * x - b * y - c * case["focus"]) / (a * u + b * v + c / case["K"] + 1e-5)
        yield torch.stack(torch.broadcast_tensors(x + s * u, y + s * v), dim=-1)


def near_the_frame(planes: torch.Tensor, case: dict[str, Any]) -> torch.Tensor:
    """(B, 1, H, W) pixels with a ray that meets a layer within rounding of the frame."""
    height, width = case["hw"]
    far_side = torch.tensor([width, height], dtype=torch.float64)
    uncertain = torch.zeros(len(planes), 1, height, width, dtype=torch.bool)
    for hit in hits(planes, case):
        close = (hit.abs() < 1e-5) | ((hit - far_side).abs() < 1e-5)
        uncertain |= close.any(-1).any(1, keepdim=True)
    return uncertain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", RAY_TRACED)
def test_golden_ray_traced(name: str, dtype: torch.dtype) -> None:
    case, stored = cases()[name], tensors_of(name)
    render = render_layers(
        stored["images"].to(dtype),
        stored["alphas"].to(dtype),
        stored["coffs"].to(dtype),
        case["focus"],
        case["K"],
        samples_per_side=case["side"],
        vignetting=case["eta"],
    )
    if "lens_samples" in case:
        assert len(Aperture().lens_samples(case["side"])) == case["lens_samples"]
    wanted_image = stored["bokeh_cum"][:, :3] / stored["weight_cum"].clamp_min(1e-5)
    certain = ~near_the_frame(stored["coffs"], case)
    assert certain.double().mean() > 0.5

    def error(ours: torch.Tensor, wanted: torch.Tensor) -> float:
        return ((ours - wanted).abs() * certain).max().item()

    rays = stored["weight_cum"].max().item()
    assert error(render.image(), wanted_image.clamp_min(0)) < 2e-5
    assert error(render.coverage, stored["bokeh_cum"][:, 3:]) < 2e-5 * rays
    assert error(render.weight, stored["weight_cum"]) < 2e-5 * rays


@pytest.mark.parametrize("name", SCATTERED)
def test_golden_scatter(name: str) -> None:
    stored = tensors_of(name)
    bokeh, dilated, weight = scatter_bokehme(stored["image"], stored["defocus"])
    torch.testing.assert_close(bokeh, stored["bokeh"], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(weight, stored["weight"], atol=2e-6, rtol=1e-5)
    assert torch.equal(dilated, stored["defocus_dilate"])


def test_golden_index_names_cases() -> None:
    assert RAY_TRACED and SCATTERED, f"{INDEX} lists no ray-traced or no scattered case"

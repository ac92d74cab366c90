"""The edge loss and its gradient agree with the authors' code on every stored case."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from bokehdiff.losses import multi_scale_edge_loss

FIXTURES = Path(
    os.environ.get(
        "BOKEHDIFF_FIXTURES", Path(__file__).resolve().parents[2] / "shared" / "fixtures"
    )
)
INDEX = FIXTURES / "bokehdiff" / "losses" / "losses.json"


def edge_cases() -> list[str]:
    """Names of the cases in the index whose images the safetensors file beside it holds."""
    if not INDEX.is_file():
        return []
    names = json.loads(INDEX.read_text())["values"]
    return sorted(name for name in names if name.startswith("edge"))


pytestmark = pytest.mark.skipif(
    not INDEX.is_file(), reason=f"no {INDEX}; point BOKEHDIFF_FIXTURES at the folder of fixtures"
)


@pytest.mark.parametrize("case", edge_cases())
def test_golden_edge_loss(case: str) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = safetensors.load_file(INDEX.with_suffix(".safetensors"))
    value = json.loads(INDEX.read_text())["values"][case]
    prediction = tensors[f"{case}.pred"].requires_grad_()

    loss = multi_scale_edge_loss(
        prediction, tensors[f"{case}.bokeh"], tensors[f"{case}.aif"], variant="official"
    )
    (gradient,) = torch.autograd.grad(loss, prediction)

    assert loss.item() == pytest.approx(value, rel=1e-6)
    torch.testing.assert_close(gradient, tensors[f"{case}.grad_pred"], atol=1e-8, rtol=1e-5)


def test_golden_index_names_edge_cases() -> None:
    assert edge_cases(), f"{INDEX} lists no edge case"

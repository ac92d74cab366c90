"""The edge loss, its gradient, and the adversarial losses agree with the authors' code on every
stored case."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from bokehdiff.losses import discriminator_loss, generator_loss, multi_scale_edge_loss

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


def adversarial_cases() -> list[tuple[str, str]]:
    """(name of the logits, term) of the adversarial cases in the index."""
    if not INDEX.is_file():
        return []
    names = json.loads(INDEX.read_text())["values"]
    return sorted(tuple(name.rsplit(".", 1)) for name in names if name.startswith("gan"))


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


@pytest.mark.parametrize(("case", "term"), adversarial_cases())
def test_golden_adversarial_loss(case: str, term: str) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    logits = safetensors.load_file(INDEX.with_suffix(".safetensors"))[f"{case}.logits"]
    value = json.loads(INDEX.read_text())["values"][f"{case}.{term}"]
    logits.requires_grad_()

    # A discriminator that is certain and right about the other half of its loss adds nothing.
    certain = torch.full_like(logits, 1e4)
    terms = {
        "real": lambda: (discriminator_loss(logits, -certain), 0.8),
        "fake": lambda: (discriminator_loss(certain, logits, real_label=1.0), 0.0),
        "generator": lambda: (generator_loss(logits), 0.8),
    }
    loss, label = terms[term]()
    (gradient,) = torch.autograd.grad(loss, logits)

    # The authors add up the images of a batch. They stored no gradient, which has a closed form.
    assert loss.item() * len(logits) == pytest.approx(value, abs=1e-6)
    of_probability = (logits.detach().double().sigmoid() - label) / logits.numel()
    torch.testing.assert_close(gradient.double(), of_probability, rtol=0, atol=1e-8)


def test_golden_index_names_cases_of_both_losses() -> None:
    assert edge_cases(), f"{INDEX} lists no edge case"
    terms = {term for _, term in adversarial_cases()}
    assert terms == {"real", "fake", "generator"}, f"{INDEX} lists the adversarial terms {terms}"

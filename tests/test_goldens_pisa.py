"""PISA against recorded outputs of the authors' code, for every case in a folder's index.

The folder is `bokehdiff/pisa` under $BOKEHDIFF_FIXTURES (by default shared/fixtures beside the
repository). Its `cases.json` lists the cases and their settings; each has one safetensors file.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file
from torch import Tensor

from bokehdiff.attention import PisaAttnProcessor, PisaConfig, PisaContext, PisaGeometry
from bokehdiff.attention.processor import token_grid
from bokehdiff.attention.reference import pisa_weights_reference

DEFAULT_FIXTURES = Path(__file__).resolve().parent.parent.parent / "shared" / "fixtures"
FOLDER = Path(os.environ.get("BOKEHDIFF_FIXTURES") or DEFAULT_FIXTURES) / "bokehdiff" / "pisa"

OUTPUT_TOLERANCE = 2e-5
WEIGHT_TOLERANCE = 2e-6
LARGEST_OCCLUSION_MISMATCH = 1e-3
LINEARITY_TOLERANCE = 4e-6
STATISTICAL_RUNS = 200


def _index() -> dict[str, dict[str, Any]]:
    path = FOLDER / "cases.json"
    return json.loads(path.read_text())["cases"] if path.is_file() else {}


def _names(*, jittered: bool) -> list[Any]:
    """Names of the deterministic or of the jittered cases; one skipped entry if there are none."""
    names = [
        name
        for name, case in _index().items()
        if (int(case.get("supersampling_num", 1)) > 1 and int(case["segment_num"]) > 0) == jittered
    ]
    reason = f"no such cases in {FOLDER}; set BOKEHDIFF_FIXTURES to the folder of fixtures"
    return names or [pytest.param("none", marks=pytest.mark.skip(reason=reason))]


class Case:
    """One recorded call, and the same call through our processor."""

    def __init__(self, name: str) -> None:
        self.settings = _index()[name]
        tensors = load_file(FOLDER / f"{self.settings.get('name', name)}.safetensors")
        self.weights = {
            key.removeprefix("weights."): tensors.pop(key)
            for key in list(tensors)
            if key.startswith("weights.")
        }
        self.recorded = tensors
        self.hidden_states, self.disp_coc = tensors["hidden_states"], tensors["disp_coc"]
        # The recordings replaced dropout by the identity.
        self.config = PisaConfig.preset(
            "official_exact",
            hardness=float(self.settings["hard"]),
            segments=int(self.settings["segment_num"]),
            supersampling=int(self.settings.get("supersampling_num", 1)),
            dropout=0.0,
        )
        self.heads = int(self.settings["heads"])
        self.attention = Attention(
            query_dim=int(self.settings["query_dim"]),
            heads=self.heads,
            dim_head=int(self.settings["dim_head"]),
            bias="to_q.bias" in self.weights,
            out_bias="to_out.0.bias" in self.weights,
        ).eval()
        self.attention.load_state_dict(self.weights)

    def geometry(self, seed: int | None = None) -> PisaGeometry:
        grid = token_grid(
            self.hidden_states.shape[1], *self.disp_coc.shape[-2:], rule=self.config.grid_rule
        )
        assert list(grid) == list(self.settings["grid"])
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return PisaGeometry.from_disp_coc(
            self.disp_coc, *grid, config=self.config, generator=generator
        )

    @torch.no_grad()
    def output(self, seed: int | None = None) -> Tensor:
        """The whole processor: projections, PISA, output projection."""
        context = PisaContext(self.config)
        if seed is not None:
            context.generator = torch.Generator().manual_seed(seed)
        self.attention.set_processor(PisaAttnProcessor(context))
        return self.attention(self.hidden_states, disp_coc=self.disp_coc)

    @torch.no_grad()
    def column_weights(self, geometry: PisaGeometry) -> Tensor:
        """A^(QC) (B, H, N, N) before the occlusion."""
        query, key = (
            layer(self.hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.attention.to_q, self.attention.to_k)
        )
        return pisa_weights_reference(query, key, geometry, self.attention.scale)

    @torch.no_grad()
    def output_from(self, weights: Tensor) -> Tensor:
        """The output projection of weights (B, H, N, N) applied to the values, in float64."""
        project = {name: value.double() for name, value in self.weights.items()}
        value = F.linear(
            self.hidden_states.double(), project["to_v.weight"], project.get("to_v.bias")
        )
        value = value.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        received = (weights.double() @ value).transpose(1, 2).flatten(2)
        return F.linear(received, project["to_out.0.weight"], project.get("to_out.0.bias"))


@functools.lru_cache(maxsize=2)
def _case(name: str) -> Case:
    return Case(name)


@pytest.mark.parametrize("name", _names(jittered=False))
def test_golden_output(name: str) -> None:
    case = _case(name)
    assert (case.output() - case.recorded["output"]).abs().max() <= OUTPUT_TOLERANCE


@pytest.mark.parametrize("name", _names(jittered=False))
def test_golden_column_weights(name: str) -> None:
    case = _case(name)
    geometry = case.geometry()
    weights = case.column_weights(geometry)
    step = int(case.settings["A_QC_query_step"])
    error = (weights[0, 0, ::step] - case.recorded["A_QC_b0_h0"]).abs().max()
    assert error <= WEIGHT_TOLERANCE
    final = weights * geometry.visibility()[:, None]
    for sums, dim in (("A_final_row_sums", -1), ("A_final_col_sums", -2)):
        assert (final.sum(dim) - case.recorded[sums]).abs().max() <= OUTPUT_TOLERANCE


@pytest.mark.parametrize("name", _names(jittered=False))
def test_golden_occlusion(name: str) -> None:
    case = _case(name)
    occlusion = 1 - case.geometry().visibility()
    bits = np.unpackbits(case.recorded["occ_map_bits"].numpy(), axis=-1)
    recorded = torch.from_numpy(bits[..., : occlusion.shape[-1]]).float()[:, 0]
    recorded = recorded * max(case.settings["occ_map_values"])
    mismatch = ((occlusion - recorded).abs() > 1e-6).float().mean()
    assert mismatch <= LARGEST_OCCLUSION_MISMATCH


@pytest.mark.parametrize("name", _names(jittered=False) + _names(jittered=True))
def test_golden_geometry(name: str) -> None:
    case = _case(name)
    geometry = case.geometry()
    tokens = case.recorded["disp_coc_tokens"]
    assert (geometry.radius - tokens[:, 1]).abs().max() <= 1e-5
    if geometry.token_disparity is not None:
        assert (geometry.token_disparity - tokens[:, 0]).abs().max() <= 1e-6
    assert (geometry.distances()[0] - case.recorded["distance_row0"]).abs().max() <= 2e-5


@pytest.mark.parametrize("name", _names(jittered=True))
def test_golden_seeded_run(name: str) -> None:
    """The same seed draws the same noise as in the recorded run."""
    case = _case(name)
    if "torch_manual_seed_of_seeded_run" not in case.settings:
        pytest.skip("this case records no seeded run")
    seed = int(case.settings["torch_manual_seed_of_seeded_run"])
    occlusion = 1 - case.geometry(seed).visibility()
    fifths = (occlusion * case.config.supersampling).round()
    mismatch = (fifths != case.recorded["occ_map_seeded_x5"][:, 0]).float().mean()
    assert mismatch <= LARGEST_OCCLUSION_MISMATCH
    if mismatch == 0:
        error = (case.output(seed) - case.recorded["output_seeded"]).abs().max()
        assert error <= OUTPUT_TOLERANCE


@pytest.mark.parametrize("name", _names(jittered=True))
def test_golden_mean_output_follows_from_mean_occlusion(name: str) -> None:
    case = _case(name)
    weights = case.column_weights(case.geometry()) * (1 - case.recorded["occ_map_mean"])
    error = (case.output_from(weights) - case.recorded["output_mean"]).abs().max()
    assert error <= LINEARITY_TOLERANCE


@pytest.mark.parametrize("name", _names(jittered=True))
def test_golden_mean_occlusion(name: str) -> None:
    """Our mean over many runs agrees with the recorded mean within five standard errors."""
    case = _case(name)
    ours = torch.zeros_like(case.recorded["occ_map_mean"][:, 0])
    for run in range(STATISTICAL_RUNS):
        ours += (1 - case.geometry(seed=run).visibility()) / STATISTICAL_RUNS
    runs, rays = int(case.settings["runs"]), case.config.supersampling
    bound = 5 * (0.25 / rays * (1 / runs + 1 / STATISTICAL_RUNS)) ** 0.5
    assert (ours - case.recorded["occ_map_mean"][:, 0]).abs().max() < bound

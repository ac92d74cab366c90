"""PisaConfig: presets, round trip, growth of the hardness, refusals."""

from __future__ import annotations

import json

import pytest

from bokehdiff.attention import PisaConfig


def test_defaults_are_the_paper() -> None:
    assert PisaConfig() == PisaConfig.preset("paper")


@pytest.mark.parametrize("name", PisaConfig.preset_names())
def test_survives_json(name: str) -> None:
    config = PisaConfig.preset(name, seed=7)
    assert PisaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_presets_differ_as_described() -> None:
    weights, exact = PisaConfig.preset("official_weights"), PisaConfig.preset("official_exact")
    assert weights.sample_depth == exact.sample_depth == "query"
    assert weights.token_enumeration == "row_major" and exact.token_enumeration == "column_major"
    assert not weights.dropout_at_inference and exact.dropout_at_inference
    assert weights.token_spacing == pytest.approx(51.2 / 31) and exact.token_spacing is None
    assert (PisaConfig().hardness, weights.hardness, exact.hardness) == (1e6, 1e7, 1e7)


def test_hardness_grows_with_optimiser_steps() -> None:
    paper, official = PisaConfig(), PisaConfig.preset("official_weights")
    assert [paper.at_step(step).hardness for step in (0, 10, 5_000_000)] == [1, 11, 1e6]
    assert [official.at_step(step).hardness for step in (0, 1)] == [3, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hardness": 0.0}, "at least 1"),
        ({"hardness": float("nan")}, "at least 1"),
        ({"segments": -1}, "segments"),
        ({"supersampling": 0}, "supersampling"),
        ({"jitter": "gaussian"}, "jitter must be one of"),
        ({"dropout": 1.0}, "dropout"),
        ({"token_spacing": 0.0}, "token_spacing"),
    ],
)
def test_refuses(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PisaConfig().replace(**changes)


def test_refuses_unknown_names() -> None:
    with pytest.raises(ValueError, match="no PISA preset"):
        PisaConfig.preset("offical")
    with pytest.raises(ValueError, match="Unknown PISA settings"):
        PisaConfig.from_dict({"softness": 1})
    with pytest.raises(ValueError, match="step"):
        PisaConfig().at_step(-1)

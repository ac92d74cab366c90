"""BokehFlow beside its own physics rendering: an untrained network is nothing else."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from bokehdiff.models.bokehflow import BokehFlowModel
from evaluation import flow_quality
from tests.evaluation.datasets.miniatures import write_raytraced


def small_network() -> BokehFlowModel:
    torch.manual_seed(0)
    return BokehFlowModel(channels=8, stem_channels=8, head_channels=8, blocks=2).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    write_raytraced(folder)
    return folder


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    flow_quality.add_arguments(parser)
    parsed = parser.parse_args(words)
    parsed.command_line = " ".join(words)
    return parsed


def test_an_untrained_network_is_its_physics(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_network().save_pretrained(tmp_path / "untrained")
    out = tmp_path / "quality.json"
    words = ["raytraced", str(data), "--model", f"{tmp_path / 'untrained'}", "--out", str(out)]
    assert flow_quality.run(arguments(*words)) == 0
    results = json.loads(out.read_text())
    names = ["identity", "untrained", "untrained-physics", "pyramid", "layered"]
    assert list(results["methods"]) == names
    assert results["against"] == "untrained-physics"
    network = results["methods"]["untrained"]
    assert network["mean"] == results["methods"]["untrained-physics"]["mean"]
    assert {one["mean"] for one in network["difference"].values()} == {0.0}
    assert results["methods"]["layered"]["difference"]["psnr"]["mean"] != 0
    # The other regions are too small in these miniatures.
    assert set(results["metrics"]) == {"psnr", "psnr_edge"}
    printed = capsys.readouterr().out
    assert "untrained-physics" in printed and "before it adds anything of its own" in printed


def test_what_a_network_adds_is_not_in_its_physics(data: Path, tmp_path: Path) -> None:
    network = small_network()
    with torch.no_grad():
        network.bokeh_head.answer.bias.fill_(0.1)
    network.save_pretrained(tmp_path / "brighter")
    out = tmp_path / "quality.json"
    words = ["raytraced", str(data), "--model", f"{tmp_path / 'brighter'}/", "--method", "scatter"]
    words += ["--metric", "psnr", "--out", str(out), "--save", str(tmp_path / "pictures")]
    flow_quality.run(arguments(*words))
    results = json.loads(out.read_text())
    assert list(results["methods"]) == ["identity", "brighter", "brighter-physics", "scatter"]
    assert results["methods"]["brighter"]["difference"]["psnr"]["mean"] != 0
    assert sorted(file.name for file in (tmp_path / "pictures").iterdir()) == sorted(
        results["methods"]
    )


def test_mistakes(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        flow_quality.run(arguments("raytraced", str(data), "--model", str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="no metric"):
        small_network().save_pretrained(tmp_path / "small")
        words = ("raytraced", str(data), "--model", str(tmp_path / "small"), "--metric", "beauty")
        flow_quality.run(arguments(*words))

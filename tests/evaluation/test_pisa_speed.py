"""``python -m evaluation speed pisa`` compares PISA with ordinary attention; here tiny ones."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from evaluation import pisa_speed
from evaluation.__main__ import main
from evaluation.pisa_speed import Case, Layer

TINY = Case(height=16, width=16, radius=2.5, heads=2, channels=8, batch=2)


def test_the_command_writes_table_json_and_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need pip install '.[data]'")
    out, picture = tmp_path / "pisa.json", tmp_path / "pisa.png"
    command = [sys.executable, "-m", "evaluation", "speed", "pisa", "--tokens", "256,1024"]
    command += ["--heads", "2", "--backend", "local", "--backward", "--repeats", "1"]
    command += ["--sdpa-limit", "256", "--out", str(out), "--plot", str(picture)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr

    report = json.loads(out.read_text())
    assert report["hardware"]["torch_threads"] == 1 and report["hardware"]["dtype"] == "float32"
    small, large = report["pisa"]
    assert (small["tokens"], large["tokens"]) == (256, 1024)
    for row in (small, large):
        assert row["backend"] == "local" and row["direction"] == "forward + backward"
        assert row["radius_share"] == pytest.approx(0.05)
        assert row["radius"] == pytest.approx(0.05 * row["width"])
        for figure in ("time_ratio", "milliseconds", "sdpa_milliseconds"):
            assert row[figure] > 0
        # So few tokens may find all the memory they need where others left it.
        assert row["peak_megabytes"] >= 0
        assert row["peak_ratio"] is None or row["peak_ratio"] >= 0
        assert row["geometry_ratio"] >= 0
        assert 0 < row["error"] < 1e-5 and 0 < row["gradient_error"] < 1e-5
    assert not small["sdpa_extrapolated"] and large["sdpa_extrapolated"]

    table, explained = finished.stdout.split("\n\n")
    first, second = table.splitlines()[1:]
    assert "~" not in first and f"~{large['time_ratio']:.3f}" in second
    assert "~ extrapolated: " in explained
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--tokens 4096,1000", "--tokens takes square numbers, e.g. 4096, got 1000"),
        ("--tokens many", "--tokens takes whole numbers with commas between them, got 'many'"),
        ("--tokens 16", "4 x 4 tokens are too few to measure; take at least 64"),
        ("--grid 48", "--grid takes HEIGHTxWIDTH, e.g. 48x96, got '48'"),
        ("--radius=-1", "--radius must be at least 0, got -1"),
        ("--radius-share 0.05,nan", "--radius-share takes numbers with commas between them"),
        ("--heads 0", "--heads must be at least 1, got 0"),
        ("--sdpa-limit 0", "--sdpa-limit must be at least 1, got 0"),
        ("--supersampling 300", "--supersampling must be 1 to 255, got 300"),
        ("--logit-std 0", "--logit-std must be positive, got 0"),
        ("--device meta", "--device must be cpu or cuda here, got meta"),
        ("--device abacus", "--device abacus cannot be used here"),
        ("--backend abacus", "There is no backend 'abacus'; choose from "),
        ("--plot pisa.bmp", "--plot writes .png, .pdf, .svg, got pisa.bmp"),
        ("--plot no/such/folder/pisa.png", "There is no folder no/such/folder for --plot"),
        ("--tokens 262144 --backend reference", "would make dense tables of about 9"),
        ("--tokens 262144 --official", "or leave dense formula out"),
    ],
)
def test_mistakes_get_a_sentence_before_any_work(arguments, sentence, capsys, monkeypatch):
    monkeypatch.setattr(pisa_speed, "measure", None)
    assert main(["speed", "pisa", *arguments.split()]) == 2
    assert sentence in capsys.readouterr().err


def test_a_backend_that_cannot_run_is_left_out_unless_asked_for(monkeypatch):
    reasons = {"reference": None, "local": None, "triton": "it needs a GPU"}
    monkeypatch.setattr(pisa_speed, "available_backends", lambda geometry, q: reasons)
    chosen, left_out = pisa_speed.choose_backends(TINY, [], official=True)
    assert chosen == ["local", pisa_speed.DENSE_FORMULA]
    assert left_out["triton"] == "it needs a GPU" and "--backend reference" in left_out["reference"]
    with pytest.raises(ValueError, match="triton cannot run 256 tokens here: it needs a GPU"):
        pisa_speed.choose_backends(TINY, ["triton"], official=False)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (8, 32)])
def test_sampled_truth_is_the_dense_truth(size, backward):
    height, width = size
    layer = Layer(dataclasses.replace(TINY, height=height, width=width, backward=backward))
    dense = pisa_speed.float64_truth(layer)
    sampled = pisa_speed.sampled_truth(layer)
    assert len(dense) == 2 and len(sampled) == 8
    assert len({(piece.image, piece.head) for piece in sampled}) > 1
    results = [torch.stack(heads, 1) for heads in zip(*(p.values for p in dense), strict=True)]
    assert len(results) == (4 if backward else 1)
    assert max(pisa_speed.largest_errors(results, sampled)) < 1e-9


def test_errors_see_a_wrong_output():
    layer = Layer(TINY)
    (right,) = layer.call("reference")
    swapped = right.flip(1)  # the heads
    for truth in (pisa_speed.float64_truth(layer), pisa_speed.sampled_truth(layer)):
        assert pisa_speed.largest_errors([right], truth)[0] < 1e-5
        assert pisa_speed.largest_errors([1.01 * right], truth)[0] == pytest.approx(0.01, rel=1e-3)
        assert pisa_speed.largest_errors([swapped], truth)[0] > 0.1


def test_the_scene_has_the_stated_radius():
    radius, disparity = pisa_speed.scene_maps(TINY)
    assert radius.shape == (2, 1, 16, 16) and disparity.shape == (2, 1, 48, 48)
    assert float(radius.max()) == pytest.approx(2.5) and float(radius.min()) < 1
    assert 0 <= float(disparity.min()) and float(disparity.max()) < 1
    uniform, same_disparity = pisa_speed.scene_maps(dataclasses.replace(TINY, scene="uniform"))
    assert torch.equal(uniform, torch.full_like(uniform, 2.5))
    assert torch.equal(disparity, same_disparity)


def test_memory_is_that_of_the_call_alone():
    """SDPA must hold its output at least, and far less than a table of N^2 scores."""
    case = dataclasses.replace(TINY, height=64, width=64, heads=4, channels=64, batch=1)
    output = 4 * 4 * 64 * 64 * 64 / 1e6
    memory = pisa_speed.memory_needed(case, pisa_speed.SDPA)
    assert 0.9 * output <= memory.call < 4 * output


def test_the_dense_formula_is_timed_with_its_rays(monkeypatch):
    nothing = pisa_speed.Memory(geometry=None, call=1.0)
    monkeypatch.setattr(pisa_speed, "memory_needed", lambda case, backend: nothing)
    names, steps = ["reference", pisa_speed.DENSE_FORMULA], []
    rows = pisa_speed.measure_case(TINY, names, 3, None, lambda: steps.append(1))
    assert len(steps) == pisa_speed.steps_of_case(names, 3)
    reference, formula = rows
    assert reference.geometry_ratio > 0 and formula.geometry_ratio is None
    assert formula.milliseconds > reference.milliseconds
    assert max(reference.error, formula.error) < 1e-5
    assert "included" in pisa_speed.table(rows)

"""The ray-traced benchmark: end to end on a small scene made here, and against its own scorer."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from bokehdiff.images import linear_to_srgb
from bokehdiff.rendering import render_layers
from evaluation.__main__ import main
from evaluation.datasets import open_dataset
from evaluation.methods import Method, method_by_name, predictions_in
from evaluation.raytraced import METRICS, evaluate, summarise

REPOSITORY = Path(__file__).resolve().parents[2]
WIDTH, HEIGHT, MARGIN = 200, 150, 16
NEAR, FAR = 0.5, 0.2


def write_png(file: Path, light: torch.Tensor) -> None:
    """Writes linear light (1, 3, H, W) as 8-bit sRGB."""
    shown = linear_to_srgb(light.clamp(0, 1))[0].permute(1, 2, 0).numpy()
    Image.fromarray((shown * 255).round().astype(np.uint8)).save(file)


def write_scene(folder: Path, seed: int) -> None:
    """A slanted far plane behind a near disc with a clipped highlight, in the benchmark's layout.

    The canvas is larger than the photograph, so the truth knows what lies beyond the frame.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = HEIGHT + 2 * MARGIN, WIDTH + 2 * MARGIN
    textures = torch.zeros(2, 3, height, width)
    for cells in (4, 12, 40, 120):
        noise = torch.rand(2, 3, cells, cells, generator=generator)
        textures += F.interpolate(noise, size=(height, width), mode="bilinear") / 4
    textures = (2 * textures - 0.5).clamp(0.02, 1)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    disc = ((x - 0.4 * width) ** 2 + (y - 0.5 * height) ** 2 < 45**2).float()
    textures[1, :, 30:32, width - 40 : width - 38] = 20.0

    colours, alphas = textures[None], torch.stack([disc, torch.ones_like(disc)])[None, :, None]
    slope = 0.1 * FAR / width
    planes = torch.tensor([[[0.0, 0.0, 1 / NEAR], [slope / FAR, 0.0, 1 / FAR]]])
    disparity = torch.where(disc > 0, NEAR, FAR * (1 - slope / FAR * x))
    aif = torch.where(disc > 0, textures[0], textures[1])[None]
    inside = (..., slice(MARGIN, -MARGIN), slice(MARGIN, -MARGIN))

    folder.mkdir(parents=True)
    write_png(folder / "aif.png", aif[inside])
    linear = aif[inside][0].permute(1, 2, 0).numpy().astype(np.float16)
    np.savez(folder / "aif_lin.npz", aif=linear)
    np.savez(folder / "disp.npz", disp=disparity[inside].numpy())
    settings = []
    for name, df, radius in [("f0_r14", NEAR, 14), ("f2_r06", FAR, 6)]:
        K = radius / (NEAR - FAR)
        truth = render_layers(colours, alphas, planes, df, K, samples_per_side=21).image()
        write_png(folder / f"gt_{name}.png", truth[inside])
        settings.append({"id": name, "level": radius, "df": df, "K": K})
    shown = disparity[inside]
    low, high = shown.min().item(), shown.max().item()
    meta = {
        "scene": folder.name,
        "alpha_cards": False,
        "n_lights": 1,
        "disp_min": low,
        "disp_max": high,
        "disp_p001": low,
        "disp_p999": high,
        "configs": settings,
    }
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("benchmark")
    write_scene(data / "s01", seed=1)
    write_scene(data / "s02", seed=2)
    return data


def test_command_line_scores_the_scatter(benchmark: Path, tmp_path: Path) -> None:
    out, pictures = tmp_path / "out.json", tmp_path / "pictures"
    command = [sys.executable, "-m", "evaluation", "raytraced", str(benchmark)]
    options = ["--method", "scatter", "--out", str(out), "--save", str(pictures)]
    run = subprocess.run(command + options, cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "identity" in run.stdout and "scatter" in run.stdout and "nohl" in run.stdout
    assert "circle of confusion" in run.stdout, "the protocol is told in words"

    report = json.loads(out.read_text())
    identity, scatter = report["results"]["identity"], report["results"]["scatter"]
    assert scatter["images"] == 4 and scatter["scenes"] == 2
    assert scatter["overall"]["psnr_nohl"] > identity["overall"]["psnr_nohl"] + 6
    assert scatter["overall"]["psnr_infocus"] > 40
    low, high = scatter["psnr_nohl_interval"]
    assert low <= scatter["overall"]["psnr_nohl"] <= high
    assert set(scatter) >= {"level_06", "level_14", "common3", "description", "rows"}
    assert scatter["seconds_per_image"] > 0
    assert report["protocol"] and report["hardware"]["torch_threads"] >= 1
    assert report["scenes"] == ["s01", "s02"]

    # The pictures it saved give the same figures.
    again = evaluate(open_dataset("raytraced", benchmark), [predictions_in(pictures / "scatter")])
    assert again["predictions"]["overall"] == scatter["overall"]
    assert again["predictions"]["seconds_per_image"] is None


def test_linear_light_shows_how_bright_the_highlight_is(
    benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    options = ["--method", "scatter", "--input", "linear", "--out", str(out)]
    assert main(["raytraced", str(benchmark), *options]) == 0
    assert "highlights not cut off" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["input"] == "linear" and "highlights not cut off" in report["protocol"]
    linear = report["results"]
    encoded = evaluate(
        open_dataset("raytraced", benchmark),
        [method_by_name("identity"), method_by_name("scatter")],
    )
    # Where no highlight reaches, only the rounding to 8 bits and that to half floats differ.
    for name in ("identity", "scatter"):
        difference = linear[name]["overall"]["psnr_nohl"] - encoded[name]["overall"]["psnr_nohl"]
        assert abs(difference) < 0.05
    assert linear["scatter"]["overall"]["psnr"] > encoded["scatter"]["overall"]["psnr"] + 0.5


def test_boosted_highlights_have_a_name_of_their_own(benchmark: Path) -> None:
    plain, boosted = method_by_name("scatter"), method_by_name("scatter+boost")
    assert boosted.name == "scatter+boost" and "highlights='boost'" in boosted.description
    photograph = next(open_dataset("raytraced", benchmark).photographs())
    lit = np.full_like(photograph.image, 40)
    lit[70:73, 150:153] = 255
    photograph = dataclasses.replace(photograph, image=lit)
    assert boosted.render(photograph).max() > 1.3 * plain.render(photograph).max()


def test_only_the_scenes_asked_for(benchmark: Path) -> None:
    results = evaluate(open_dataset("raytraced", benchmark, ["s02"]), [method_by_name("identity")])
    rows = results["identity"]["rows"]
    assert [(row["scene"], row["id"]) for row in rows] == [("s02", "f0_r14"), ("s02", "f2_r06")]
    assert results["identity"]["psnr_nohl_interval"] is None, "one scene has no spread"


def test_the_best_gaussian_beats_the_identity(benchmark: Path) -> None:
    methods = [method_by_name("identity"), method_by_name("gaussian")]
    results = evaluate(open_dataset("raytraced", benchmark, ["s01"]), methods)
    assert results["gaussian"]["overall"]["psnr"] > results["identity"]["overall"]["psnr"]
    assert "truth" in results["gaussian"]["description"]


def test_the_embedded_checkpoint_is_scored(benchmark: Path) -> None:
    methods = [method_by_name("identity"), method_by_name("tiny")]
    results = evaluate(open_dataset("raytraced", benchmark, ["s01"]), methods)
    tiny, identity = results["tiny"]["overall"], results["identity"]["overall"]
    assert tiny["psnr_nohl"] > identity["psnr_nohl"] + 3


def test_truth_scores_perfectly(benchmark: Path) -> None:
    truth = Method("truth", "", lambda photograph: photograph.truth / 255)
    results = evaluate(open_dataset("raytraced", benchmark, ["s01"]), [truth])
    overall = results["truth"]["overall"]
    assert set(overall) == set(METRICS)
    assert overall["psnr"] == overall["psnr_nohl"] == 100
    assert overall["ssim"] == pytest.approx(1) and overall["ssim_edge"] == pytest.approx(1)


def test_means_skip_photographs_without_the_region() -> None:
    labels = {"scene": "s01", "id": "f0_r14", "level": 14, "alpha": False, "lights": False}
    summary = summarise([{**labels, "psnr": 20.0}, {**labels, "psnr": 30.0, "psnr_edge": 7.0}])
    assert summary["overall"] == {"psnr": 25.0, "psnr_edge": 7.0}
    assert summary["alpha_scenes"] == {}


def load_scorer(file: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location("benchmark_scorer", file)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("given", ["srgb8", "linear"])
def test_same_figures_as_the_benchmarks_own_scorer(shared_root: Path, given: str) -> None:
    folder = shared_root / "bench" / "raytraced"
    if not (folder / "score.py").is_file():
        pytest.skip(f"no scorer in {folder}")
    scorer: Any = load_scorer(folder / "score.py")
    scorer.SCENES = ["s08"]
    # The arguments are: folder, meta, configuration, 8-bit photograph, linear light, ...
    shown = {
        "srgb8": lambda *scene: scene[3] / 255.0,
        "linear": lambda *scene: scorer.enc(scene[4].astype(np.float64)),
    }[given]
    theirs = scorer.run(str(folder / "data"), {"identity": shown})["identity"]
    identity = method_by_name("identity", given=given)
    ours = evaluate(open_dataset("raytraced", folder / "data", ["s08"]), [identity])["identity"]
    for row, wanted in zip(ours["rows"], theirs["rows"], strict=True):
        figures = {name for name in wanted if name.startswith(("psnr", "ssim"))}
        assert figures == {name for name in row if name.startswith(("psnr", "ssim"))}
        for name in figures:
            assert row[name] == pytest.approx(wanted[name], abs=1e-9), name
    for group in ("overall", "level_06", "level_14", "level_28", "common3", "alpha_scenes"):
        assert ours[group] == pytest.approx(theirs[group], abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["NOWHERE", "--method", "scatter"], "no benchmark folder"),
        (["EMPTY", "--method", "scatter"], "holds no scene"),
        (["PARENT", "--method", "scatter"], "Did you mean"),
        (["DATA"], "--method NAME or --predictions"),
        (["DATA", "--method", "lens"], "nor a folder with a model"),
        (["DATA", "--method", "EMPTY"], "holds no model"),
        (["DATA", "--method", "scatter+bost"], "layered+boost or another with boosted"),
        (["DATA", "--method", "tiny", "--input", "linear"], "that are cut off at white; wanted"),
        (["DATA", "--method", "EMPTY", "--input", "linear"], "that are cut off at white; wanted"),
        (["DATA", "--method", "scatter+boost", "--input", "linear"], "wanted --method scatter, or"),
        (["DATA", "--method", "scatter", "--scenes", "s01,s77"], "no scene s77"),
        (["DATA", "--method", "scatter", "--device", "abacus"], "abacus"),
        (["DATA", "--method", "scatter", "--out", "NOWHERE/out.json"], "no folder"),
        (["DATA", "--predictions", "NOWHERE"], "with predictions"),
        (["DATA", "--predictions", "EMPTY"], "s01_f0_r14.png is missing"),
        (["DATA", "--predictions", "SMALL"], "same size"),
        (["DATA", "--predictions", "BROKEN"], "cannot be read"),
        (["DAMAGED", "--method", "scatter"], "not valid JSON"),
        (["INCOMPLETE", "--method", "scatter"], "lacks disp_min"),
        (["TRUTHLESS", "--method", "scatter"], "gt_f0_r14.png is missing"),
    ],
)
def test_mistakes_get_a_sentence(
    benchmark: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    for folder in ("EMPTY", "SMALL", "BROKEN"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (10, 10)).save(tmp_path / "SMALL" / "s01_f0_r14.png")
    (tmp_path / "BROKEN" / "s01_f0_r14.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    meta = json.loads((benchmark / "s01" / "meta.json").read_text())
    incomplete = {key: value for key, value in meta.items() if key != "disp_min"}
    for name, text in [("DAMAGED", "{"), ("INCOMPLETE", json.dumps(incomplete))]:
        (tmp_path / name / "s01").mkdir(parents=True)
        (tmp_path / name / "s01" / "meta.json").write_text(text)
    truthless = tmp_path / "TRUTHLESS" / "s01"
    truthless.mkdir(parents=True)
    for name in ("meta.json", "aif.png", "aif_lin.npz", "disp.npz"):
        (truthless / name).write_bytes((benchmark / "s01" / name).read_bytes())
    places = {"DATA": benchmark, "PARENT": benchmark.parent}
    here = [
        str(places[word])
        if word in places
        else str(tmp_path / word)
        if word.split("/")[0].isupper()
        else word
        for word in arguments
    ]
    assert main(["raytraced", *here]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and words in message
    assert "Traceback" not in message


def test_a_method_that_returns_nonsense_is_named(benchmark: Path) -> None:
    broken = Method("broken", "returns NaN", lambda photograph: photograph.image * np.nan)
    with pytest.raises(ValueError, match="broken, s01_f0_r14: .*NaN"):
        evaluate(open_dataset("raytraced", benchmark, ["s01"]), [broken])
    with pytest.raises(ValueError, match="share the name broken"):
        evaluate(open_dataset("raytraced", benchmark), [broken, broken])


@pytest.mark.slow
def test_the_embedded_checkpoint_passes_the_classical_renderer(shared_root: Path) -> None:
    data = shared_root / "bench" / "raytraced" / "data"
    if not data.is_dir():
        pytest.skip(f"no ray-traced benchmark at {data}")
    methods = [method_by_name(name) for name in ("scatter", "tiny")]
    # One scene of alpha cards, one with lights and thin depth: six of the twenty-one images.
    results = evaluate(open_dataset("raytraced", data, ["s06", "s08"]), methods)
    scatter, tiny = (results[name]["overall"] for name in ("scatter", "tiny"))
    assert tiny["psnr_nohl"] > scatter["psnr_nohl"] + 0.5
    assert tiny["psnr_edge_nohl"] > scatter["psnr_edge_nohl"] + 1
    assert tiny["psnr_infocus"] > 42

"""The command line of the evaluation: comparisons in a process of their own, and mistakes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.__main__ import PROTOCOLS, main, parser
from evaluation.results import read_results
from tests.evaluation.triples_folder import NAMES, write_triples

REPOSITORY = Path(__file__).resolve().parents[2]
FUNCTION = "def half(image, disparity, df, K):\n    return image // 2\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_triples(tmp_path_factory.mktemp("known") / "triples")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=240
    )


def test_a_comparison_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FUNCTION)
    out, pictures = tmp_path / "out.json", tmp_path / "pictures"
    arguments = ["compare", "triples", str(folder), "--method", "scatter", "--against", "identity"]
    arguments += ["--method", f"mine={tmp_path / 'mine.py'}:half"]
    finished = python("-m", "evaluation", *arguments, "--out", str(out), "--save", str(pictures))
    assert finished.returncode == 0, finished.stderr

    results = read_results(out)
    assert list(results["methods"]) == ["identity", "scatter", "mine"]
    # There is no linear light, so no highlights to tell regions by.
    assert list(results["metrics"]) == [
        "psnr", "ssim", "psnr_edge", "psnr_blurred", "psnr_infocus",
    ]  # fmt: skip
    assert results["methods"]["scatter"]["mean"]["psnr"] > 58
    assert results["methods"]["scatter"]["difference"]["psnr"]["mean"] > 25
    assert results["command"] == " ".join(
        ["python -m evaluation", *arguments, "--out", str(out), "--save", str(pictures)]
    )
    assert sorted(file.stem for file in (pictures / "mine").iterdir()) == sorted(NAMES)

    text = finished.stdout
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:5]] == ["identity", "scatter", "mine"]
    low, high = results["methods"]["mine"]["interval"]["psnr"]
    assert f"({low:.2f} to {high:.2f})" in table[4]
    for words in ("circle of confusion", "drawn again", "thread(s)", results["command"], str(out)):
        assert words in text

    # Its pictures as another system's, and metrics by name.
    again = [
        "--predictions",
        f"theirs={pictures / 'mine'}",
        "--predictions",
        str(pictures / "mine"),
    ]
    arguments = ["compare", "triples", str(folder), "--scenes", "b", "--metric", "ssim", *again]
    assert main([*arguments, "--out", str(out)]) == 0
    results = read_results(out)
    assert list(results["methods"]) == ["identity", "theirs", "mine"]
    assert list(results["metrics"]) == ["ssim"] and results["dataset"]["scenes"] == ["b"]


def test_help_imports_nothing_heavy() -> None:
    finished = python(
        "-c",
        "import sys; from evaluation.__main__ import parser\n"
        "parser('').format_help(); print('torch' in sys.modules, 'scipy' in sys.modules)",
    )
    assert finished.stdout.strip() == "False False", finished.stderr


def test_every_protocol_has_arguments_and_can_run() -> None:
    for protocol in PROTOCOLS.values():
        module = importlib.import_module(protocol.module)
        assert callable(module.add_arguments) and callable(module.run)
    parser()  # no two of them disagree with argparse


def test_metrics_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics"]) == 0
    assert "psnr" in capsys.readouterr().out


def test_a_data_set_is_verified(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "triples", str(folder)]) == 0
    broken = write_triples(tmp_path / "triples")
    (broken / "bokeh" / "a_near.png").unlink()
    assert main(["verify", "triples", str(broken)]) == 1
    said = capsys.readouterr()
    assert "a_near.png is missing" in said.out + said.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("compare", "Nothing to evaluate"),
        ("compare --method lens", "nor a folder with a model, nor a Python function"),
        ("compare --method mine.py:blur", "There is no file"),
        ("compare --method scatter --method scatter --metric psnr --scenes c", "has no scene c"),
        ("compare --method scatter --metric beauty", "There is no metric 'beauty'"),
        ("compare --method scatter --weights nowhere --metric dists", "--weights"),
        ("compare --method scatter --against tiny", "--against tiny is no method here"),
        ("compare --method a=scatter --method a=layered", "share the name a"),
        ("compare --method scatter --device abacus", "--device abacus cannot be used here"),
        ("compare --method scatter --out nowhere/out.json", "no folder nowhere for --out"),
        ("compare --method scatter --input linear", "has no linear light"),
        ("compare --method scatter --input linear --exposure aligned", "is for 8-bit photographs"),
        ("compare --predictions identity=FOLDER", "would be called identity"),
        ("compare --predictions theirs=FOLDER", "theirs, a_a_far: The prediction"),
        ("compare --method scatter --K searched --save FOLDER/../taken", "is there already"),
    ],
)
def test_mistakes_get_a_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: str, words: str
) -> None:
    taken = folder.parent / "taken" / "scatter"
    taken.mkdir(parents=True, exist_ok=True)
    (taken / "a.png").touch()
    protocol, *options = arguments.replace("FOLDER", str(folder)).split()
    assert main([protocol, "triples", str(folder), *options]) == 2
    message = capsys.readouterr().err
    assert message.splitlines()[-1].startswith("error: ") and words in message


def test_an_unknown_K_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unknown = write_triples(tmp_path / "triples", known_K=False)
    assert main(["compare", "triples", str(unknown), "--method", "scatter"]) == 2
    assert "--K searched" in capsys.readouterr().err
    out = tmp_path / "out.json"
    options = ["--method", "gaussian", "--metric", "psnr", "--out", str(out)]
    assert main(["compare", "triples", str(unknown), *options]) == 0
    assert json.loads(out.read_text())["methods"]["gaussian"]["rows"][0]["K"] is None

"""Speed of LiteBokeh, on small photos and networks."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bokehdiff.compact_export import export_compact
from bokehdiff.models.litebokeh import TinyUnet
from evaluation import compact_speed
from evaluation.__main__ import main
from tests.tiny_litebokeh import tiny_glass, tiny_unet

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime", reason="the environment of TFLite files has none")
    file = tmp_path_factory.mktemp("compact") / "compact.onnx"
    export_compact(tiny_unet(), file)
    return file


def test_runtimes_side_by_side(one_thread: None, onnx_file: Path) -> None:
    in_torch, in_onnxruntime = compact_speed.runtime_speed(
        "small", tiny_unet(), 32, 48, 2, {"onnx": onnx_file}, mean_opinion_score=3.0
    )
    assert (in_torch.runtime, in_onnxruntime.runtime) == ("torch", "onnxruntime")
    assert in_torch.ratio == 1
    for row in (in_torch, in_onnxruntime):
        assert row.milliseconds > 0 and (row.width, row.height) == (48, 32)
        assert row.ratio == pytest.approx(row.milliseconds / in_torch.milliseconds)
        assert row.score == pytest.approx(64 / row.milliseconds)
        assert row.peak_megabytes is None or row.peak_megabytes >= 0
    table = compact_speed.runtime_table([in_torch, in_onnxruntime])
    assert "48 x 32" in table and "onnxruntime" in table and " 1.00 " in table


def test_multiplications_are_those_of_the_layers() -> None:
    """By hand, of a photo whose sides are multiples of 8."""
    by_hand = (
        9 * (3 * 16 / 4 + 16 * 32 / 16 + 32 * 64 / 64)  # down
        + 8 * 9 * 64 * 64 / 64  # residual blocks
        + 16 * (64 * 32 / 64 + 32 * 16 / 16 + 16 * 16 / 4)  # up
        + 9 * 16 * 3
        + 9 * 2 * 3 * 16  # enhancement
    )
    network = TinyUnet.from_variant("tiny")
    assert compact_speed.macs_of(network, 64, 96) == by_hand * 64 * 96
    # The published size: 13.58 GMAC.
    assert round(compact_speed.macs_of(network, 1024, 1536) / 1e9, 2) == 13.58
    assert network.device.type == "cpu", "the network stays where it is"


@pytest.mark.parametrize("network", [tiny_unet(), tiny_glass()], ids=["tiny", "glass"])
def test_multiplications_per_pixel_do_not_grow_with_the_photo(one_thread, network) -> None:
    sizes = [(32, 48), (64, 96), (128, 192)]
    rows = compact_speed.linearity("small", network, sizes, repeats=1)
    for row, (height, width) in zip(rows, sizes, strict=True):
        assert (row.height, row.width) == (height, width)
        assert row.macs_ratio == pytest.approx(1, abs=1e-3)
        assert row.nanoseconds_per_pixel > 0
    assert rows[0].time_ratio == 1
    assert "192 x 128" in compact_speed.linearity_table(rows)


def test_files_are_of_one_size_of_photo(tmp_path: Path) -> None:
    pytest.importorskip("litert_torch", reason="TFLite files have an environment of their own")
    export_compact(tiny_unet(), tmp_path / "a.tflite", size=(48, 32))
    rows = compact_speed.runtime_speed(
        "small", tiny_unet(), 32, 48, 1, {"tflite": tmp_path / "a.tflite"}
    )
    assert [row.runtime for row in rows] == ["torch", "LiteRT"]
    with pytest.raises(ValueError, match="for photos of 48x32 pixels, --size is 64x32"):
        compact_speed.runtime_speed(
            "small", tiny_unet(), 32, 64, 1, {"tflite": tmp_path / "a.tflite"}
        )


def test_command_line_in_a_process_of_its_own(tmp_path: Path, onnx_file: Path) -> None:
    tiny_unet().save_pretrained(tmp_path / "small")
    out = tmp_path / "speed.json"
    words = [
        *("--model", str(tmp_path / "small"), "--size", "64x64", "--repeats", "1"),
        *("--onnx", str(onnx_file), "--mean-opinion-score", "6.5", "--out", str(out)),
    ]
    finished = subprocess.run(
        [sys.executable, "-m", "evaluation", "speed", "compact", *words],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "| small" in finished.stdout and "| onnxruntime |" in finished.stdout
    assert "Opinions are given by people" in finished.stdout
    figures = json.loads(out.read_text())
    assert [row["runtime"] for row in figures["rows"]] == ["torch", "onnxruntime"]
    assert figures["rows"][0]["score"] > 0 and figures["files"] == {"onnx": "compact.onnx"}
    assert figures["command"].startswith("python -m evaluation speed compact --model")


def test_a_runtime_that_is_not_there_is_left_out_with_a_word(
    one_thread: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("ai_edge_litert"):
        pytest.skip("LiteRT is there")
    (tmp_path / "a.tflite").write_bytes(b"")
    words = f"--variant pico --size 64x64 --repeats 1 --tflite {tmp_path / 'a.tflite'}"
    assert main(["speed", "compact", *words.split()]) == 0
    said = capsys.readouterr().out
    assert "No row for LiteRT: ai_edge_litert is not installed here." in said
    assert "| pico" in said and "score" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--repeats 0", "--repeats must be at least 1"),
        ("--size 64", "--size takes WIDTHxHEIGHT"),
        ("--variant huge", "There is no size 'huge'"),
        ("--model tiny --variant tiny", "leave out --variant"),
        ("--linearity --mean-opinion-score 6", "--linearity measures torch alone"),
        ("--onnx no.onnx", "There is no file no.onnx; `bokehdiff export compact` writes one"),
        ("--onnx no.onnx --variant tiny --variant pico", "files of one network"),
    ],
)
def test_mistakes_get_a_sentence(
    words: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["speed", "compact", *words.split()]) == 2
    assert sentence in capsys.readouterr().err

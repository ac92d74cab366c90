"""``python -m evaluation speed render`` measures a real photograph in a process of its own."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("skimage", reason="the photograph is in scikit-image (pip install '.[data]')")


def run(*arguments):
    command = [sys.executable, "-m", "evaluation", "speed", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_speed_of_a_small_photograph(tmp_path):
    out = tmp_path / "speed.json"
    finished = run("render", "--megapixels", "0.05", "--repeats", "2", "--out", str(out))
    assert finished.returncode == 0, finished.stderr
    assert "peak memory" in finished.stdout
    measured = json.loads(out.read_text())["render"]
    assert measured["width"] * measured["height"] == pytest.approx(0.05e6, rel=0.02)
    assert measured["largest_radius"] == pytest.approx(0.03 * measured["width"])
    # A process that has imported torch is never below 100 MB, and this photo needs no gigabytes.
    assert 100 < measured["peak_megabytes"] < 4000
    for name in ("prepare_seconds", "first_render_seconds", "refocus_seconds"):
        assert 0 < measured[name] < 200


def test_speed_of_the_recurrence(tmp_path):
    out = tmp_path / "recurrence.json"
    shape = ("--side", "4,8", "--loop-side", "4", "--sequences", "2", "--channels", "4")
    finished = run("recurrence", *shape, "--repeats", "1", "--out", str(out))
    assert finished.returncode == 0, finished.stderr
    assert "tuned loop" in finished.stdout and "processor time" in finished.stdout
    measured = json.loads(out.read_text())
    chunks = [row for row in measured["recurrence"] if row["method"] == "chunks"]
    assert [row["tokens"] for row in chunks] == [16, 64, 16, 64]
    assert all(row["milliseconds"] > 0 for row in measured["recurrence"])
    assert measured["command"].startswith("python -m evaluation speed recurrence --side 4,8")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("render", "--megapixels", "0"), "--megapixels must be in [0.01, 100], got 0"),
        (("render", "--repeats", "0"), "--repeats must be at least 1, got 0"),
        (("render", "--device", "abacus"), "--device abacus cannot be used here"),
        (("recurrence", "--side", "0,4"), "--side takes whole numbers of at least 1, got 0,4"),
        (("recurrence", "--loop-side", "0"), "--loop-side must be at least 1, got 0"),
        (("render", "--out", "no/such/folder/speed.json"), "There is no folder no/such/folder"),
    ],
)
def test_mistakes_get_a_sentence(arguments, sentence):
    finished = run(*arguments)
    assert finished.returncode == 2
    assert sentence in finished.stderr and "Traceback" not in finished.stderr

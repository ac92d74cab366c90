"""``python -m evaluation speed start`` measures processes from their start to their end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluation import start_speed
from evaluation.__main__ import main

pytest.importorskip("skimage", reason="the photograph is in scikit-image (pip install '.[data]')")


def test_memory_and_time_are_those_of_the_process_alone():
    bare = start_speed.start_of("bare", ["-c", "pass"])
    # This process has torch, hundreds of megabytes of it.
    assert 1 < bare.peak_megabytes < 50
    assert bare.stages == {}
    large = start_speed.start_of("large", ["-c", "data = bytes([1]) * 200_000_000"])
    assert 200 < large.peak_megabytes < 250
    # Waiting takes time, and no processor.
    waiting = start_speed.start_of("waiting", ["-c", "import time; time.sleep(0.5)"])
    assert waiting.wall_seconds > 0.5 > 2 * waiting.processor_seconds > 0
    busy = start_speed.start_of("busy", ["-c", "sum(range(10_000_000))"])
    assert busy.wall_seconds > 0.5 * busy.processor_seconds > bare.processor_seconds / 2


def test_stages_are_the_time_between_moments():
    script = (
        "import time; now = lambda: f'{time.monotonic()}={time.process_time()}'; "
        "print('what libraries say'); python = now(); time.sleep(0.2); "
        "print(f'stages python={python} render={now()}')"
    )
    row = start_speed.start_of("stages", ["-c", script])
    assert list(row.stages) == ["python", "render"]
    wall, processor = row.stages["render"]
    assert wall >= 0.2 > 10 * processor
    whole = [sum(seconds) for seconds in zip(*row.stages.values(), strict=True)]
    assert 0 < whole[0] < row.wall_seconds and 0 < whole[1] <= row.processor_seconds + 0.01
    for of_processor in (False, True):
        _, _, line = start_speed.stage_table([row], of_processor).splitlines()
        assert line.split("|")[3].strip() == "-"  # no such stage
        assert line.split("|")[-2].strip() == f"{whole[of_processor]:.2f}"


def test_the_median_is_taken_of_each_figure():
    rows = [
        start_speed.StartSpeed("a", wall, wall / 2, 10 * wall, {"render": (wall, 3 - wall)})
        for wall in (1.0, 4.0, 2.0)
    ]
    assert start_speed.median_of(rows) == start_speed.StartSpeed(
        "a", 2.0, 1.0, 20.0, {"render": (2.0, 1.0)}
    )


def test_a_process_that_fails_says_why():
    with pytest.raises(ValueError, match=r"abacus could not be started: .*No module named 'abac"):
        start_speed.start_of("abacus", ["-c", "import abacus"])


@pytest.mark.slow
def test_the_command_writes_tables_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "start.json"
    command = "speed start --repeats 1 --megapixels 0.02 --out"
    assert main([*command.split(), str(out)]) == 0
    report = json.loads(out.read_text())
    rows = {row["process"]: row for row in report["rows"]}
    pictures = [f"first picture, {by}" for by in start_speed.PICTURES]
    assert list(rows) == [*start_speed.PROCESSES, *pictures]
    assert rows["python"]["peak_megabytes"] < rows["import bokehdiff"]["peak_megabytes"] < 30
    for name in pictures:
        stages = rows[name]["stages"]
        assert set(stages) <= set(start_speed.STAGES)
        assert min(min(seconds) for seconds in stages.values()) >= 0
        assert ("load" in stages) == (name != "first picture, layered")
        assert sum(wall for wall, _ in stages.values()) < rows[name]["wall_seconds"]
        assert rows[name]["peak_megabytes"] > rows["import torch"]["peak_megabytes"]
    assert 0 < report["import_seconds"] < start_speed.LARGEST_IMPORT_SECONDS

    processes, stages, words = capsys.readouterr().out.split("\n\n")
    assert [line.split("|")[1].strip() for line in processes.splitlines()[2:]] == list(rows)
    assert [line.split("|")[1].strip() for line in stages.splitlines()[2:]] == pictures
    assert words.startswith(f"import bokehdiff: {report['import_seconds']:.3f} s")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--megapixels 0", "--megapixels must be in [0.01, 100], got 0"),
        ("--repeats 0", "--repeats must be at least 1, got 0"),
        ("--threads 0", "--threads must be at least 1, got 0"),
        ("--first-picture abacus", "--first-picture abacus is none of layered, flow_nano, tiny"),
        ("--out no/such/folder/start.json", "There is no folder no/such/folder"),
    ],
)
def test_mistakes_get_a_sentence(
    arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["speed", "start", *arguments.split()]) == 2
    assert sentence in capsys.readouterr().err

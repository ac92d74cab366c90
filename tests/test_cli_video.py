"""`bokehdiff video` on films of a few frames, with a tiny network of the real class."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from bokehdiff.cli import app
from bokehdiff.video_files import open_video
from tests.tiny_depth import save_tiny_depth
from tests.tiny_films import shown_frames, sound_packets, square_frames, square_maps, tiny_film
from tests.tiny_flow import tiny_flow, untrained_flow

# Not from bokehdiff.cli, where `video` is the verb.
video = importlib.import_module("bokehdiff.cli.video")

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: object):
    return CliRunner().invoke(app, ["video", *map(str, arguments)])


def said(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """film.mp4 (24 frames of 64 x 48, a tone), maps/, and networks: flow/, physics/, depth/."""
    folder = tmp_path_factory.mktemp("made")
    tiny_film(folder / "film.mp4", square_frames(24))
    (folder / "maps").mkdir()
    for number, disparity in enumerate(square_maps(24)):
        np.save(folder / "maps" / f"{number:03d}.npy", disparity)
    tiny_flow().save_pretrained(folder / "flow")
    untrained_flow().save_pretrained(folder / "physics")
    save_tiny_depth(folder / "depth")
    return folder


@pytest.fixture
def films(made: Path, tmp_path: Path) -> Path:
    """The same in a folder of the test's own."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def contrasts(file: Path) -> tuple[list[float], list[float]]:
    """Of each frame, contrast on the moving square and on the wall: blur takes it away."""
    square, wall = [], []
    for number, frame in enumerate(open_video(file).frames()):
        picture = frame.picture.astype(float)
        left = 4 + number % 40
        square.append(picture[14:26, left + 3 : left + 13].std())
        wall.append(picture[36:46, 4:60].std())
    return square, wall


# --- What comes out -------------------------------------------------------------------------------


def test_a_film_keeps_its_sound_times_and_tags(films: Path) -> None:
    result = run(films / "film.mp4", "-o", films / "out.mp4", "--model", films / "flow",
                 "--f-number", 2, "--focus", "auto")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "out.mp4 (24 frames)" in result.stdout
    assert "50 mm was assumed" in said(result.stderr)
    # The bar shows frames per second and the time that is left.
    assert "24/24" in result.stderr and "frame/s" in result.stderr
    assert sound_packets(films / "out.mp4") == sound_packets(films / "film.mp4")
    written, source = open_video(films / "out.mp4"), open_video(films / "film.mp4")
    assert written.format == source.format
    assert list(written.times()) == list(source.times())
    assert not (films / "out.mp4.part").exists()


def test_what_was_pointed_at_stays_sharp_and_the_rest_is_blurred(films: Path) -> None:
    result = run(films / "film.mp4", "-o", films / "out.mp4", "--model", films / "physics",
                 "--disparity", films / "maps", "--focus", "12,20", "--K", 12)  # fmt: skip
    assert result.exit_code == 0, result.output
    before, after = contrasts(films / "film.mp4"), contrasts(films / "out.mp4")
    for number in range(24):
        assert after[0][number] > 0.85 * before[0][number]
        assert after[1][number] < 0.6 * before[1][number]


def test_the_focus_is_pulled_between_keyframes(films: Path) -> None:
    keyframes: list[dict[str, Any]] = [
        {"frame": 4, "focus": [16, 20], "K": 12},
        {"time": 0.72, "focus": {"df": 0.2}},
    ]
    (films / "pull.json").write_text(json.dumps(keyframes))
    result = run(films / "film.mp4", "-o", films / "out.mp4", "--model", films / "physics",
                 "--disparity", films / "maps", "--focus", films / "pull.json")  # fmt: skip
    assert result.exit_code == 0, result.output
    before, after = contrasts(films / "film.mp4"), contrasts(films / "out.mp4")
    square = np.array(after[0]) / before[0]
    wall = np.array(after[1]) / before[1]
    assert square[:4].min() > 0.85 and wall[:4].max() < 0.6
    assert square[19:].max() < 0.6 and wall[19:].min() > 0.85
    assert (np.diff(wall[4:19]) > -0.03).all()


def test_maps_as_a_film_do_as_well_as_maps_in_a_folder(films: Path) -> None:
    grays = [
        np.repeat((255 * disparity).round().astype(np.uint8)[..., None], 3, axis=2)
        for disparity in square_maps(24)
    ]
    tiny_film(films / "maps.mp4", grays, sound=None)
    words = ["--model", films / "physics", "--focus", "12,20", "--K", 8]
    for name, maps in (("one.mp4", "maps"), ("other.mp4", "maps.mp4")):
        result = run(films / "film.mp4", "-o", films / name, "--disparity", films / maps, *words)
        assert result.exit_code == 0, result.output
    pairs = zip(shown_frames(films / "one.mp4"), shown_frames(films / "other.mp4"), strict=True)
    for one, other in pairs:
        assert np.abs(one.astype(int) - other).mean() < 2


def test_a_depth_model_is_asked_for_every_frame(films: Path) -> None:
    result = run(films / "film.mp4", "-o", films / "out.mp4", "--model", films / "physics",
                 "--depth-model", films / "depth", "--f-number", 2)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert said(result.stderr).count("assumed to be 2 m away") == 1  # not once per frame
    assert not list(Path(os.environ["BOKEHDIFF_CACHE"]).glob("*.safetensors"))


def test_a_distance_says_what_is_in_focus_where_depth_is_in_metres(films: Path) -> None:
    words = ["--model", films / "flow", "--f-number", 2, "--focal-length", 50]
    result = run(films / "film.mp4", "-o", films / "a.mp4", *words, "--focus-distance", 2)
    assert result.exit_code == 0, result.output
    result = run(films / "film.mp4", "-o", films / "b.mp4", *words, "--df", 0.5)
    assert result.exit_code == 0, result.output
    pairs = zip(shown_frames(films / "a.mp4"), shown_frames(films / "b.mp4"), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)


# --- Ended runs -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_goes_on_and_makes_the_same_film(films: Path) -> None:
    # Long enough to be killed on the way, at the size of the other tests.
    tiny_film(films / "long.mp4", square_frames(130))
    words = ["--model", str(films / "flow"), "--depth-model", str(films / "depth")]
    words += ["--focus", "12,20", "--f-number", "2", "--device", "cpu"]
    ended = films / "ended.mp4"
    process = subprocess.Popen(
        [sys.executable, "-m", "bokehdiff", "video", films / "long.mp4", "-o", ended, *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    state = films / "ended.mp4.part" / "state.safetensors"
    while not state.exists():
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stderr is not None
    process.stderr.close()
    assert not ended.exists() and state.exists()
    stretches = len(list(state.parent.glob("*.nut")))
    assert 1 <= stretches < 130 // video.FRAMES_PER_STRETCH + 1

    again = run(films / "long.mp4", "-o", ended, *words)
    assert again.exit_code == 1 and "add --resume" in said(again.stderr)
    other = run(films / "long.mp4", "-o", ended, *words[:-4], "--f-number", 4, "--resume")
    assert other.exit_code == 1 and "unfinished film with another lens" in said(other.stderr)
    assert state.exists()

    resumed = run(films / "long.mp4", "-o", ended, *words, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "130/130" in resumed.stderr and " 0/130" not in resumed.stderr
    whole = run(films / "long.mp4", "-o", films / "whole.mp4", *words)
    assert whole.exit_code == 0, whole.output
    assert not state.parent.exists()
    frames = list(zip(shown_frames(ended), shown_frames(films / "whole.mp4"), strict=True))
    assert len(frames) == 130
    assert all(np.array_equal(one, other) for one, other in frames)
    assert sound_packets(ended) == sound_packets(films / "long.mp4")


def test_a_run_that_breaks_off_goes_on_and_makes_the_same_film(
    films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "FRAMES_PER_STRETCH", 10)
    words = [films / "film.mp4", "--model", films / "flow", "--disparity", films / "maps"]
    words += ["--focus", "12,20", "--K", 8]
    whole = run(*words, "-o", films / "whole.mp4")
    assert whole.exit_code == 0, whole.output

    broken = films / "maps" / "015.npy"
    data, state = broken.read_bytes(), broken.stat()

    def write(content: bytes) -> None:
        broken.write_bytes(content)
        os.utime(broken, ns=(state.st_atime_ns, state.st_mtime_ns))

    write(b"x" * len(data))
    result = run(*words, "-o", films / "out.mp4")
    assert result.exit_code == 1 and "015.npy" in said(result.stderr)
    part = films / "out.mp4.part"
    assert sorted(one.name for one in part.iterdir()) == [
        "000000.nut", "settings.json", "state.safetensors",
    ]  # fmt: skip
    assert not (films / "out.mp4").exists()
    write(data)
    result = run(*words, "-o", films / "out.mp4", "--resume")
    assert result.exit_code == 0, result.output
    pairs = zip(shown_frames(films / "out.mp4"), shown_frames(films / "whole.mp4"), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)
    assert not part.exists()


def test_a_run_with_other_maps_is_not_gone_on_with_but_begun_anew(
    films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "FRAMES_PER_STRETCH", 10)
    (films / "maps" / "015.npy").write_bytes(b"no map")
    words = [films / "film.mp4", "-o", films / "out.mp4", "--model", films / "physics"]
    words += ["--disparity", films / "maps", "--focus", "12,20", "--K", 8]
    assert run(*words).exit_code == 1
    np.save(films / "maps" / "015.npy", square_maps(24)[15])
    changed = run(*words, "--resume")
    assert changed.exit_code == 1 and "another disparity" in said(changed.stderr)
    result = run(*words, "--force")
    assert result.exit_code == 0, result.output
    assert len(shown_frames(films / "out.mp4")) == 24
    assert not (films / "out.mp4.part").exists()


def test_resume_without_an_earlier_run_begins(films: Path) -> None:
    result = run(films / "film.mp4", "-o", films / "out.mkv", "--model", films / "physics",
                 "--df", 0.5, "--K", 2, "--resume")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert len(shown_frames(films / "out.mkv")) == 24


def test_a_folder_of_somebody_else_is_left_alone(films: Path) -> None:
    part = films / "out.mp4.part"
    part.mkdir()
    (part / "diary.txt").write_text("mine")
    result = run(films / "film.mp4", "-o", films / "out.mp4", "--model", films / "physics",
                 "--df", 0.5, "--force")  # fmt: skip
    assert result.exit_code == 1 and "holds no unfinished film" in said(result.stderr)
    assert (part / "diary.txt").read_text() == "mine"


# --- Mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--focus", "a,b"], "--focus is 'a,b'"),
        (["--focus", "1,2,3,4"], "wanted a pixel X,Y of the first frame"),
        (["--focus", "sharpest"], "wanted a pixel X,Y of the first frame"),
        (["--focus", "100,3"], "outside the picture"),
        (["--focus", "nothing.json"], "nothing.json"),
        (["--focus", "3,3", "--df", "0.5"], "--focus and --df both came"),
        (["--K", "3", "--f-number", "2"], "--K and options of a camera both came"),
        (["--focal-length", "85"], "without its f-number"),
        (["--f-number", "2", "--focal-length-35mm", "26"], "goes with --focal-length"),
        (["--f-number", "0"], "f_number is 0"),
        (["--focus", "3,3", "--focus-distance", "2", "--f-number", "2"], "came beside another"),
        (["--df", "-1"], "df is -1"),
        (["--disparity", "maps", "--df", "2"], "df is 2"),
        (["--disparity", "maps", "--depth-model", "depth"], "both came"),
        (["--disparity", "maps", "--focus-distance", "2"], "go with a camera"),
        (["--disparity", "flow"], "has no disparity map"),
        (["--disparity", "film.mp4", "--metric"], "have no unit"),
        (["--depth-model", "depth", "--metric"], "without a unit"),
        (["--depth-model", "nothing/at/all"], "There is no folder"),
        (["--model", "nothing/at/all"], "There is no folder"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["-o", "film.mp4", "--force"], "is the film itself"),
        (["-o", "out.avi"], "ends in .avi"),
        (["-o", "nowhere/out.mp4"], "create it first"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(
    films: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    monkeypatch.chdir(films)
    before = sorted(films.rglob("*"))
    given = {"--model": "physics", "-o": "out.mp4"}
    words = [word for name, value in given.items() if name not in arguments
             for word in (name, value)]  # fmt: skip
    result = run("film.mp4", *words, *arguments)
    assert result.exit_code == 1, result.output
    assert sentence in said(result.stderr), result.stderr
    assert sorted(films.rglob("*")) == before


def test_nothing_is_overwritten_unasked(films: Path) -> None:
    (films / "out.mp4").write_bytes(b"an older film")
    result = run(films / "film.mp4", "-o", films / "out.mp4", "--model", films / "physics")
    assert result.exit_code == 1 and "exists already" in said(result.stderr)
    assert (films / "out.mp4").read_bytes() == b"an older film"


def test_maps_have_to_fit_the_film(films: Path) -> None:
    words = [films / "film.mp4", "-o", films / "out.mp4", "--model", films / "physics"]
    (films / "maps" / "023.npy").unlink()
    result = run(*words, "--disparity", films / "maps")
    assert result.exit_code == 1
    assert "has 23 maps for the 24 frames of film.mp4" in said(result.stderr)
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(films / "maps" / "023.png")
    result = run(*words, "--disparity", films / "maps", "--df", 0.5)
    assert result.exit_code == 1 and not (films / "out.mp4").exists()


def test_keyframes_have_to_fit_the_film(films: Path) -> None:
    words = [films / "film.mp4", "-o", films / "out.mp4", "--model", films / "physics", "--focus",
             films / "keys.json"]  # fmt: skip
    (films / "keys.json").write_text('[{"time": 5, "focus": "auto"}]')
    result = run(*words)
    assert result.exit_code == 1 and "the film is over" in said(result.stderr)
    (films / "keys.json").write_text('[{"time": 0, "focus": {"distance_m": 2}}]')
    result = run(*words, "--disparity", films / "maps")
    assert result.exit_code == 1 and "disparity has no unit" in said(result.stderr)
    (films / "keys.json").write_text('[{"time": 0, "focus": "auto", "f_number": 2}]')
    result = run(*words, "--K", 3)
    assert result.exit_code == 1 and "wanted one of them" in said(result.stderr)
    assert not (films / "out.mp4.part").exists()


# --- Memory ---------------------------------------------------------------------------------------

MEASURE = """
import sys
from bokehdiff.cli import app
from evaluation.memory import resident_bytes
app(sys.argv[1:], standalone_mode=False)
print(resident_bytes(peak=True))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_film(films: Path) -> None:
    used = []
    for count in (60, 240):
        tiny_film(films / f"{count}.mp4", square_frames(count, 144, 192))
        result = subprocess.run(
            [sys.executable, "-c", MEASURE, "video", films / f"{count}.mp4", "-o",
             films / f"out{count}.mp4", "--model", films / "flow", "--f-number", "2"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        used.append(int(result.stdout.split()[-1]))
    # The frames between would be 60 MB as float32, of some 900.
    assert used[1] < 1.02 * used[0]

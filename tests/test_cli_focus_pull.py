"""`bokehdiff focus-pull`, and focus and camera on the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from bokehdiff.cli import app
from bokehdiff.cli.focus_pull import Easing, eased
from bokehdiff.video_files import open_video


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """photo.png (64 x 48), noise, and photo.npy: a near square on the left before a far wall."""
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    disparity = np.full((48, 64), 0.1, np.float32)
    disparity[8:40, 4:30] = 0.8
    exif = Image.Exif()
    # FNumber, FocalLength, FocalLengthIn35mmFilm
    exif[0x8769] = {0x829D: 2.0, 0x920A: 50.0, 0xA405: 50}
    Image.fromarray(photo).save(tmp_path / "photo.png", exif=exif)
    np.save(tmp_path / "photo.npy", disparity)
    return tmp_path


def contrast(frame: np.ndarray) -> tuple[float, float]:
    """Standard deviation within the near square and on the wall: noise that is blurred loses it."""
    frame = np.asarray(frame, dtype=float)
    return frame[14:34, 10:24].std(), frame[10:38, 44:60].std()


@pytest.mark.parametrize("method", ["model", "scatter"])
def test_the_focus_moves_from_one_thing_to_the_other(scene: Path, method: str) -> None:
    result = run(
        "focus-pull", scene / "photo.png", "--disparity", scene / "photo.npy", "--from", "16,24",
        "--to", "50,20", "--seconds", 0.5, "--fps", 12, "--K", 8, "--method", method, "-o",
        scene / "pull.mp4",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "pull.mp4 (6 frames, df 0.8 to 0.1, K 8)" in result.stdout
    frames = [frame.picture for frame in open_video(scene / "pull.mp4").frames()]
    assert len(frames) == 6 and frames[0].shape == (48, 64, 3)
    near, far = zip(*map(contrast, frames), strict=True)
    assert near[0] > 2 * near[-1] and far[-1] > 2 * far[0]
    assert all(first > last - 2 for first, last in zip(near, near[1:], strict=False))


def test_disparities_and_words_say_where_too(scene: Path) -> None:
    result = run(
        "focus-pull", scene / "photo.png", "--disparity", scene / "photo.npy", "--from", "0.3",
        "--to", "auto", "--seconds", 0.2, "--fps", 10, "--f-number", 1.4, "--focus-distance", 2,
        "--method", "pyramid", "--easing", "linear", "-o", scene / "pull.mkv",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "df 0.3 to 0.8" in result.stdout


def test_easing_starts_and_stops_gently() -> None:
    times = np.linspace(0, 1, 11)
    smooth = np.array([eased(time, Easing.smooth) for time in times])
    assert [eased(time, Easing.linear) for time in times] == times.tolist()
    assert smooth[0] == 0 and smooth[-1] == 1
    steps = np.diff(smooth)
    assert (steps > 0).all() and steps[0] < 0.05 and steps[-1] < 0.05 < steps[5]
    np.testing.assert_allclose(smooth + smooth[::-1], 1)


def test_a_camera_and_a_range_on_the_command_line(scene: Path) -> None:
    photo, map_file = scene / "photo.png", scene / "photo.npy"
    common = ["render", photo, "--disparity", map_file, "--method", "scatter"]
    result = run(*common, "--focus", "16,24", "--f-number", 1.4, "--focal-length", 85,
                 "--focus-distance", 2, "-o", scene / "camera.png", "--coc")  # fmt: skip
    assert result.exit_code == 0, result.output
    # f^2 s / (2 N (s - f)) per 1/metre, of which 0.8 is 0.5, on 36 mm for 64 pixels.
    strength = 0.085**2 * 2 / (2 * 1.4 * 1.915) * 1000 * 64 / 36 * 0.5 / 0.8
    assert f"K {strength:.4g}" in result.stdout
    overlay = np.asarray(Image.open(scene / "camera_coc.png")).astype(int)
    assert overlay.shape == (48, 64, 3)
    assert overlay[24, 16, 1] >= overlay[24, 16, 2]  # in focus: green
    assert overlay[24, 56, 0] > overlay[24, 56, 2]  # behind: red
    result = run(*common, "--focus-range", "0.05,0.9", "-o", scene / "range.png")
    assert result.exit_code == 0, result.output
    assert "df 0.05 to 0.9, K 20" in result.stdout
    sharp = [np.asarray(Image.open(scene / name)) for name in ("photo.png", "range.png")]
    assert np.array_equal(*sharp)


def test_an_overlay_takes_the_place_of_nothing(scene: Path) -> None:
    photos = scene / "photos"
    photos.mkdir()
    for name in ("a.png", "a_coc.png"):
        (photos / name).write_bytes((scene / "photo.png").read_bytes())
        np.save(scene / f"{Path(name).stem}.npy", np.load(scene / "photo.npy"))
    both = [photos / "a.png", photos / "a_coc.png"]
    words = ["--df", 0.5, "--method", "scatter", "--coc", "--force"]
    pattern = f"{scene}/{{stem}}.npy"
    result = run("render", *both, "--disparity", pattern, *words, "-o", scene / "out")
    assert result.exit_code == 1 and "would be written twice" in " ".join(result.stderr.split())
    before = both[1].read_bytes()
    result = run("render", *both, "--disparity", pattern, *words, "-o", photos)
    assert result.exit_code == 1 and both[1].read_bytes() == before
    assert not (scene / "out").exists()


def test_a_mask_on_the_command_line(scene: Path) -> None:
    mask = np.zeros((48, 64), np.uint8)
    mask[8:40, 4:30] = 255
    Image.fromarray(mask).save(scene / "mask.png")
    result = run(
        "render", scene / "photo.png", "--disparity", scene / "photo.npy", "--focus-mask",
        scene / "mask.png", "--whole-subject", "--method", "pyramid", "-o", scene / "out.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "df 0.8, K 20" in result.stdout


def test_relative_disparity_and_a_camera_need_a_distance_which_is_assumed_aloud(
    scene: Path,
) -> None:
    result = run(
        "render", scene / "photo.png", "--disparity", scene / "photo.npy", "--df", 0.8,
        "--f-number", 4, "--method", "pyramid", "-o", scene / "out.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "assumed to be 2 m away" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--from", "a,b", "--to", "0.5"], "--from is 'a,b'"),
        (["--from", "0.5", "--to", "1.5"], "df is 1.5"),
        (["--from", "0.5", "--to", "3,4,5"], "--to is '3,4,5'"),
        (["--from", "0.5", "--to", "0.1", "--seconds", "0"], "--seconds is 0"),
        (["--from", "0.5", "--to", "0.1", "--K", "3", "--f-number", "2"], "both came"),
        (["--from", "0.5", "--to", "100,3"], "outside the picture"),
        (["--from", "0.5", "--to", "0.1", "-o", "pull.avi"], "ends in .avi"),
        (["--from", "0.5", "--to", "0.1", "--metric", "--normalise"], "has no unit"),
    ],
)
def test_mistakes_of_a_focus_pull(scene: Path, arguments: list[str], sentence: str) -> None:
    before = sorted(scene.iterdir())
    if "-o" not in arguments:
        arguments = [*arguments, "-o", str(scene / "pull.mp4")]
    result = run("focus-pull", scene / "photo.png", "--disparity", scene / "photo.npy", *arguments)
    assert result.exit_code == 1
    assert sentence in " ".join(result.stderr.split()), result.stderr
    assert sorted(scene.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "none of them was given"),
        (["--df", "0.5", "--focus", "3,4"], "--df and --focus were given"),
        (["--focus", "3,4", "--focus-mask", "mask.png"], "both came"),
        (["--focus-range", "0.5"], "wanted two disparities"),
        (["--df", "0.5", "--whole-subject"], "--whole-subject goes with"),
        (["--df", "0.5", "--K", "4", "--focal-length", "50"], "both came"),
        (["--df", "0.5", "--metric", "--normalise"], "has no unit"),
        (["--df", "0.5", "--tiling", "big"], "tiling is 'big'"),
    ],
)
def test_mistakes_about_the_lens(scene: Path, arguments: list[str], sentence: str) -> None:
    result = run(
        "render", scene / "photo.png", "--disparity", scene / "photo.npy", *arguments, "-o",
        scene / "out.png",
    )  # fmt: skip
    assert result.exit_code == 1
    assert sentence in " ".join(result.stderr.split()), result.stderr
    assert not (scene / "out.png").exists()

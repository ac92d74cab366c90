"""Moving pictures into a file, read back by ffmpeg."""

from __future__ import annotations

from pathlib import Path

import imageio.v2
import numpy as np
import pytest

from bokehdiff.video_files import write_video


def gray_frames(count: int, height: int = 32, width: int = 48) -> list[np.ndarray]:
    return [np.full((height, width, 3), 10 * number, np.uint8) for number in range(count)]


def test_frames_come_back_in_order_and_in_time(tmp_path: Path) -> None:
    file = write_video(tmp_path / "film.mp4", gray_frames(12), 24)
    with imageio.v2.get_reader(file) as video:
        frames = [np.asarray(frame) for frame in video]
        assert video.get_meta_data()["fps"] == 24
    assert len(frames) == 12
    for number, frame in enumerate(frames):
        # Two roundings to 8 bits of limited range, and a codec of high quality on flat gray.
        assert np.abs(frame.astype(int) - 10 * number).max() <= 3
    assert sorted(tmp_path.iterdir()) == [file]


def test_an_odd_last_row_and_column_are_left_out(tmp_path: Path) -> None:
    frame = np.zeros((33, 47, 3), np.uint8)
    frame[:, :10] = 200
    file = write_video(tmp_path / "film.mkv", [frame, frame], 10)
    with imageio.v2.get_reader(file) as video:
        read = np.asarray(video.get_data(0)).astype(int)
    assert read.shape == (32, 46, 3)
    assert np.abs(read[:, :8] - 200).max() <= 3 and read[:, 12:].max() <= 3


def test_a_frame_that_fails_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "film.mp4"
    file.write_bytes(b"an older film")

    def failing():
        yield from gray_frames(2)
        raise RuntimeError("the third frame")

    with pytest.raises(RuntimeError, match="the third frame"):
        write_video(file, failing(), 24, overwrite=True)
    assert file.read_bytes() == b"an older film"
    assert sorted(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("name", "frames", "rate", "sentence"),
    [
        ("film.avi", gray_frames(1), 24, "ends in .avi; wanted a video"),
        ("film.mp4", [], 24, "no frames"),
        ("film.mp4", gray_frames(1), 0, "more than 0"),
        ("film.mp4", [np.zeros((8, 8, 3), np.float32)], 24, "float32"),
        ("film.mp4", [np.zeros((8, 1, 3), np.uint8)], 24, "at least 2 x 2"),
    ],
)
def test_mistakes(tmp_path: Path, name: str, frames: list, rate: float, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        write_video(tmp_path / name, frames, rate)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(b"an older film")
    with pytest.raises(FileExistsError, match="exists already"):
        write_video(tmp_path / "film.mp4", gray_frames(2), 24)
    with pytest.raises(FileNotFoundError, match="create it first"):
        write_video(tmp_path / "nowhere" / "film.mp4", gray_frames(2), 24)

"""Films in and out, read and written with PyAV."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from bokehdiff.video_files import (
    FilmFrame,
    check_sound_fits,
    join_stretches,
    open_video,
    write_stretch,
    write_video,
)
from tests.tiny_films import (
    FULL,
    LIMITED,
    heard_samples,
    shown_frames,
    sound_packets,
    square_frames,
    tiny_film,
)

# Primaries, transfer, matrix, range as of H.273.
HD = (1, 1, 1, LIMITED)
PAL = (5, 6, 5, LIMITED)
WIDE = (9, 14, 9, LIMITED)
PHONE = (12, 13, 6, FULL)


def gray_frames(count: int, height: int = 32, width: int = 48) -> list[np.ndarray]:
    return [np.full((height, width, 3), 10 * number, np.uint8) for number in range(count)]


def colour_frames(count: int = 4) -> list[np.ndarray]:
    """Large areas of strong colours, whose numbers tell matrices and ranges apart."""
    frame = np.zeros((48, 64, 3), np.uint8)
    for number, colour in enumerate(
        [(200, 30, 40), (40, 180, 50), (30, 60, 220), (255, 255, 255), (0, 0, 0), (200, 200, 40)]
    ):
        row, column = divmod(number, 3)
        frame[24 * row : 24 * row + 24, 22 * column : 22 * column + 22] = colour
    return [frame] * count


def apart(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Differences in the middles of the areas of :func:`colour_frames`."""
    difference = np.abs(first.astype(int) - second.astype(int))
    return difference[8:40:22, 8:60:22]


def brightness(picture: np.ndarray) -> np.ndarray:
    """Without colour, which is stored at half the resolution and blurs at edges."""
    return picture @ np.array([0.299, 0.587, 0.114])


def rewritten(film: Path, folder: Path, suffix: str = ".mp4") -> Path:
    """A film read and written again, in two stretches."""
    source = open_video(film)
    frames = list(source.frames())
    half = len(frames) // 2
    stretches = [folder / "first.nut", folder / "second.nut"]
    assert write_stretch(stretches[0], frames[:half], source.format) == half
    assert write_stretch(stretches[1], frames[half:], source.format) == len(frames) - half
    written = folder / f"written{suffix}"
    join_stretches(written, stretches, source)
    return written


# --- Reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tags", [HD, PAL, WIDE, PHONE, (2, 2, 2, LIMITED)])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p", "yuv420p10le"])
def test_colours_come_by_the_films_own_matrix_and_range(
    tmp_path: Path, tags: tuple[int, int, int, int], pixel_format: str
) -> None:
    frames = colour_frames()
    film = tiny_film(tmp_path / "film.mp4", frames, tags=tags, pixel_format=pixel_format)
    source = open_video(film)
    found = source.format
    assert (found.width, found.height) == (64, 48)
    assert (found.primaries, found.transfer, found.matrix) == tags[:3]
    assert found.full_range == (tags[3] == FULL)
    assert source.frame_count == 4 and found.frames_per_second == 25
    read = list(source.frames())
    assert len(read) == 4 and read[0].picture.dtype == np.uint8
    for frame in read:
        # Three roundings to 8 bits, of which chroma weighs up to 1.9, and a fine codec.
        assert apart(frame.picture, frames[0]).max() <= 4


def test_a_wrong_matrix_or_range_would_be_seen(tmp_path: Path) -> None:
    frames = colour_frames()
    film = tiny_film(tmp_path / "film.mp4", frames, tags=(1, 1, 1, LIMITED))
    as_601 = tiny_film(tmp_path / "other.mp4", frames, tags=(2, 2, 5, LIMITED))
    stored = [shown_frames(one)[0].astype(int) for one in (film, as_601)]
    assert np.abs(stored[0] - stored[1]).max() > 10


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_films_of_phones_come_upright(tmp_path: Path, rotation: int) -> None:
    frames = square_frames(3)
    film = tiny_film(tmp_path / "film.mp4", frames, rotation=rotation, pixel_aspect=Fraction(4, 3))
    source = open_video(film)
    turned = np.rot90(frames[0], rotation // 90)
    assert (source.format.height, source.format.width) == turned.shape[:2]
    expected = Fraction(4, 3) if rotation == 180 else Fraction(3, 4)
    assert source.format.pixel_aspect == expected
    picture = next(source.frames()).picture
    assert np.abs(brightness(picture) - brightness(turned)).mean() < 4
    written = open_video(rewritten(film, tmp_path))
    assert written.format.pixel_aspect == expected
    again = next(written.frames()).picture
    assert np.abs(brightness(again) - brightness(picture)).mean() < 4


def test_times_of_uneven_frames_are_kept(tmp_path: Path) -> None:
    times = [0, 1500, 9000, 9010, 30_000, 31_001, 80_000]
    film = tiny_film(tmp_path / "film.mp4", square_frames(7), times=times)
    source = open_video(film)
    assert [frame.time_stamp for frame in source.frames()] == times
    assert np.allclose(list(source.times()), np.array(times) / 90_000)
    written = open_video(rewritten(film, tmp_path))
    assert [frame.time_stamp for frame in written.frames()] == times
    later = [frame.time_stamp for frame in source.frames(5)]
    assert later == times[5:]


@pytest.mark.parametrize(
    ("transfer", "words"), [(16, "HDR"), (18, "HDR"), (8, "linear"), (9, "logarithmic")]
)
def test_hdr_and_its_likes_are_refused(tmp_path: Path, transfer: int, words: str) -> None:
    film = tiny_film(
        tmp_path / "film.mp4",
        square_frames(2),
        tags=(9, transfer, 9, LIMITED),
        pixel_format="yuv420p10le",
    )
    with pytest.raises(ValueError, match=words):
        open_video(film)


def test_what_is_no_film_is_refused_in_a_sentence(tmp_path: Path) -> None:
    film = tiny_film(tmp_path / "film.mp4", square_frames(30))
    with pytest.raises(FileNotFoundError, match="nothing.mp4"):
        open_video(tmp_path / "nothing.mp4")
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        open_video(empty)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(film.read_bytes()[:3000])
    with pytest.raises(ValueError, match="cannot be read as a film"):
        open_video(cut)
    words = tmp_path / "words.mp4"
    words.write_text("no film at all")
    with pytest.raises(ValueError, match="cannot be read as a film"):
        open_video(words)
    with pytest.raises(ValueError, match="one frame"):
        open_video(tiny_film(tmp_path / "short.mp4", square_frames(1)))
    with pytest.raises(ValueError, match="is interlaced"):
        open_video(tiny_film(tmp_path / "tv.mp4", square_frames(3), interlaced=True))
    with pytest.raises(ValueError, match="only sound"):
        open_video(only_sound(tmp_path / "sound.m4a"))


def only_sound(file: Path) -> Path:
    import av

    with av.open(str(file), "w", format="mp4") as container:
        tone = container.add_stream("aac", rate=16_000, layout="mono")
        heard = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        heard.sample_rate, heard.pts = 16_000, 0
        container.mux([*tone.encode(heard), *tone.encode(None)])
    return file


def test_a_film_that_changes_its_size_is_refused_there(tmp_path: Path) -> None:
    import av

    # Two streams of different size behind each other, as a bare stream may have them.
    bare = tmp_path / "film.h264"
    data = b""
    for name, size in (("a", (48, 64)), ("b", (32, 48))):
        film = tiny_film(tmp_path / f"{name}.mp4", square_frames(3, *size), sound=None)
        with av.open(str(film)) as source, av.open(str(tmp_path / f"{name}.h264"), "w") as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
        data += (tmp_path / f"{name}.h264").read_bytes()
    bare.write_bytes(data)
    with pytest.raises(ValueError, match="changes from 64 x 48 to 48 x 32"):
        list(open_video(bare).frames())


# --- Writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_sound_and_tags_come_out_as_they_went_in(tmp_path: Path, suffix: str) -> None:
    film = tiny_film(tmp_path / f"film{suffix}", square_frames(25), tags=PHONE)
    written = rewritten(film, tmp_path, suffix)
    before, after = sound_packets(film), sound_packets(written)
    assert len(after) >= 10 and [one for _, one in after] == [one for _, one in before]
    # Matroska counts milliseconds.
    assert np.allclose([time for time, _ in after], [time for time, _ in before], atol=1e-3)
    assert np.array_equal(heard_samples(written), heard_samples(film))
    read, source = open_video(written), open_video(film)
    for name in ("width", "height", "primaries", "transfer", "matrix", "full_range"):
        assert getattr(read.format, name) == getattr(source.format, name), name
    pairs = list(zip(read.frames(), source.frames(), strict=True))
    for one, other in pairs:
        assert one.time_stamp * read.format.time_base == pytest.approx(
            float(other.time_stamp * source.format.time_base), abs=1e-3
        )
        assert np.abs(brightness(one.picture) - brightness(other.picture)).mean() < 4


@pytest.mark.parametrize("tags", [HD, PAL, WIDE, PHONE, (2, 2, 2, LIMITED)])
def test_colours_survive(tmp_path: Path, tags: tuple[int, int, int, int]) -> None:
    film = tiny_film(tmp_path / "film.mp4", colour_frames(), tags=tags)
    first = next(open_video(film).frames()).picture
    again = next(open_video(rewritten(film, tmp_path)).frames()).picture
    assert apart(first, again).max() <= 6


def test_a_silent_film_stays_silent(tmp_path: Path) -> None:
    film = tiny_film(tmp_path / "film.mp4", square_frames(4), sound=None)
    assert sound_packets(rewritten(film, tmp_path)) == []


def test_stretches_decode_as_the_film_does(tmp_path: Path) -> None:
    film = tiny_film(tmp_path / "film.mp4", square_frames(8), sound=None)
    written = rewritten(film, tmp_path)
    parts = [shown_frames(tmp_path / name) for name in ("first.nut", "second.nut")]
    for one, other in zip(parts[0] + parts[1], shown_frames(written), strict=True):
        assert np.array_equal(one, other)


def test_sound_that_does_not_fit_is_refused_before_any_work(tmp_path: Path) -> None:
    film = open_video(tiny_film(tmp_path / "film.mkv", square_frames(4), sound="flac"))
    check_sound_fits(film, tmp_path / "out.mkv")
    with pytest.raises(ValueError, match=r"\.mov file; wanted one that holds it.*out\.mkv"):
        check_sound_fits(film, tmp_path / "out.mov")


def test_no_frames_leave_no_stretch(tmp_path: Path) -> None:
    source = open_video(tiny_film(tmp_path / "film.mp4", square_frames(4)))
    before = sorted(tmp_path.iterdir())
    assert write_stretch(tmp_path / "none.nut", [], source.format) == 0
    wrong = FilmFrame(np.zeros((10, 10, 3), np.uint8), 0)
    with pytest.raises(ValueError, match="10 x 10 pixels, the film 64 x 48"):
        write_stretch(tmp_path / "wrong.nut", [wrong], source.format)
    assert sorted(tmp_path.iterdir()) == before


# --- Frames into a film ---------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [24, 30_000 / 1001])
def test_frames_come_back_in_order_and_in_time(tmp_path: Path, rate: float) -> None:
    file = write_video(tmp_path / "film.mp4", gray_frames(12), rate)
    assert sorted(tmp_path.iterdir()) == [file]
    film = open_video(file)
    assert float(film.format.frames_per_second) == pytest.approx(rate, rel=1e-9)
    frames = list(film.frames())
    assert len(frames) == 12
    for number, frame in enumerate(frames):
        # Two roundings to 8 bits of limited range, and a codec of high quality on flat gray.
        assert np.abs(frame.picture.astype(int) - 10 * number).max() <= 3
    assert np.allclose(list(film.times()), np.arange(12) / rate)


def test_colours_of_frames_are_tagged(tmp_path: Path) -> None:
    frames = colour_frames()
    film = open_video(write_video(tmp_path / "film.mp4", frames, 25))
    assert (film.format.primaries, film.format.transfer, film.format.matrix) == (1, 1, 1)
    assert apart(next(film.frames()).picture, frames[0]).max() <= 4


def test_an_odd_last_row_and_column_are_left_out(tmp_path: Path) -> None:
    frame = np.zeros((33, 47, 3), np.uint8)
    frame[:, :10] = 200
    file = write_video(tmp_path / "film.mkv", [frame, frame], 10)
    read = next(open_video(file).frames()).picture.astype(int)
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
        ("film.mp4", [*gray_frames(1), *gray_frames(1, 16)], 24, "one size"),
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

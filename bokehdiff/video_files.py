"""Films in and out: frames with their times, colours and sound, through FFmpeg's libraries (PyAV).

A film keeps what it says about itself. Frames come upright, converted by the film's own matrix and
range, at the times it shows them; what is written carries the same tags and times, and the sound is
copied packet by packet.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .picture_files import existing_file
from .tensor_files import first_line
from .whole_files import PathLike, file_to_write, whole_or_not_at_all

if TYPE_CHECKING:
    import av
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.packet import Packet

__all__ = [
    "STRETCH_SUFFIX",
    "VIDEO_SUFFIXES",
    "FilmFormat",
    "FilmFrame",
    "VideoReader",
    "check_sound_fits",
    "check_video_file",
    "join_stretches",
    "open_video",
    "write_stretch",
    "write_video",
]

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv")
STRETCH_SUFFIX = ".nut"
"""Of a stretch of a film: the one container that keeps times exactly, in any unit."""

# Numbers of ITU-T H.273, which files and FFmpeg share.
RGB_MATRIX, BT709, UNSPECIFIED, BT601, SMPTE170M = 0, 1, 2, 5, 6
# 4 FCC, 7 SMPTE 240M, 9 BT.2020 of non-constant luminance.
KNOWN_MATRICES = (BT709, 4, BT601, SMPTE170M, 7, 9)
STRANGE_TRANSFERS = {
    8: "linear light", 9: "a logarithmic curve", 10: "a logarithmic curve",
    16: "HDR (PQ)", 18: "HDR (HLG)",
}  # fmt: skip
LIMITED_RANGE, FULL_RANGE = 1, 2
# Without a tag players take larger pictures for BT.709, smaller ones for BT.601.
LEAST_HEIGHT_OF_BT709 = 720

# Flags of swscale: bicubic, accurate rounding, all of the chroma. Else results are up to 3 of 255
# levels off.
EXACT_CONVERSION = 0x4 | 0x40000 | 0x2000

# x264: where most people see no difference.
QUALITY = "16"

FINE_CLOCK = 90_000
"""Parts of a second in which the times of a film without clock are counted."""


class FilmFrame(NamedTuple):
    """A frame and when it is shown.

    Args:
        picture: uint8 (H, W, 3) display-encoded RGB, upright.
        time_stamp: in units of the film's ``time_base``.
    """

    picture: np.ndarray
    time_stamp: int


@dataclass(frozen=True)
class FilmFormat:
    """What a film says about its frames.

    Args:
        width, height: of an upright frame, in pixels.
        frames_per_second: on average.
        time_base: seconds per unit of time stamps.
        primaries, transfer, matrix: numbers of ITU-T H.273; 2 is not said.
        full_range: black is 0 and white 255, not 16 and 235.
        pixel_aspect: width of a pixel over its height.
    """

    width: int
    height: int
    frames_per_second: Fraction
    time_base: Fraction
    primaries: int = BT709
    transfer: int = BT709
    matrix: int = BT709
    full_range: bool = False
    pixel_aspect: Fraction = Fraction(1)

    @property
    def matrix_of_conversion(self) -> int:
        """The matrix between RGB and what is stored, said or taken for granted."""
        if self.matrix == UNSPECIFIED:
            return BT709 if self.height >= LEAST_HEIGHT_OF_BT709 else BT601
        return BT601 if self.matrix == SMPTE170M else self.matrix


# --- Reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VideoReader:
    """A film whose first frame could be read; made by :func:`open_video`.

    Args:
        path: its file.
        format: size, rate and colours of its frames.
        frame_count: how many frames it has by its own account; None if it does not say.
        start: time stamp of the first frame.
    """

    path: Path
    format: FilmFormat
    frame_count: int | None
    start: int

    def frames(self, first: int = 0) -> Iterator[FilmFrame]:
        """The frames in the order they are shown, from number `first` on, as often as asked.

        Of several frames for one moment the first is shown.

        Raises:
            ValueError: the film is damaged, or its frames change.
        """
        for decoded, time_stamp in itertools.islice(_decoded(self.path, self.format), first, None):
            yield FilmFrame(_picture(decoded, self.format), time_stamp)

    def times(self) -> Iterator[float]:
        """When each frame is shown, in seconds after the first one; no picture is made."""
        for _, time_stamp in _decoded(self.path, self.format):
            yield float((time_stamp - self.start) * self.format.time_base)


def open_video(path: PathLike) -> VideoReader:
    """A film to read, after a look at its first frames.

    Pictures of 8 to 16 bits per channel are read, in standard dynamic range.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the package is missing; no film, no picture in it, damage, or colours that are
            not display-encoded (HDR, logarithmic).
    """
    file = existing_file(path, "film")
    with _opened(file) as container:
        stream = _picture_stream(container, file)
        seen = list(itertools.islice(_frames_of(container, stream, file), 2))
        if len(seen) < 2:
            raise ValueError(
                f"{file.name} has {'one frame' if seen else 'no frame'} that can be read; wanted a "
                "film of two or more."
            )
        decoded = seen[0]
        codec = stream.codec_context
        if decoded.interlaced_frame:
            raise ValueError(
                f"{file.name} is interlaced: each frame holds two moments. Make it progressive "
                f"first, for instance by `ffmpeg -i {file.name} -vf bwdif progressive.mp4`."
            )
        quarters, remainder = divmod(decoded.rotation, 90)
        if remainder:
            raise ValueError(
                f"{file.name} is turned by {decoded.rotation} degrees; wanted quarters of a turn."
            )
        size, pixel_aspect = (decoded.width, decoded.height), stream.sample_aspect_ratio
        pixel_aspect = pixel_aspect or Fraction(1)
        if quarters % 2:
            size, pixel_aspect = size[::-1], 1 / pixel_aspect
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        is_rgb = decoded.format.is_rgb
        found = FilmFormat(
            *size,
            frames_per_second=rate,
            time_base=stream.time_base or Fraction(1, FINE_CLOCK),
            primaries=_told(decoded.color_primaries, codec.color_primaries),
            transfer=_told(decoded.color_trc, codec.color_trc),
            matrix=BT709 if is_rgb else _told(decoded.colorspace, codec.colorspace),
            full_range=not is_rgb
            and (FULL_RANGE in (decoded.color_range, codec.color_range) or _is_jpeg(decoded)),
            pixel_aspect=pixel_aspect,
        )
        _check_colours(found, file)
        return VideoReader(file, found, stream.frames or None, decoded.pts or 0)


def _told(*values: int) -> int:
    """The first number that says something."""
    return next((value for value in values if value != UNSPECIFIED), UNSPECIFIED)


def _is_jpeg(decoded: av.VideoFrame) -> bool:
    """Whether the name of the format says full range."""
    return decoded.format.name.startswith("yuvj")


def _check_colours(found: FilmFormat, file: Path) -> None:
    if found.transfer in STRANGE_TRANSFERS:
        raise ValueError(
            f"{file.name} is encoded as {STRANGE_TRANSFERS[found.transfer]}; wanted a film for "
            "ordinary screens (BT.709, sRGB, BT.601 or BT.2020 in standard dynamic range). Convert "
            "it with a program that maps its brightness."
        )
    if found.matrix not in (*KNOWN_MATRICES, UNSPECIFIED):
        raise ValueError(
            f"{file.name} has colours by matrix number {found.matrix} of H.273; wanted BT.601, "
            "BT.709 or BT.2020. Convert it first, for instance by `ffmpeg -i "
            f"{file.name} -vf scale=out_color_matrix=bt709 converted.mp4`."
        )


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[InputContainer]:
    """A container to read; what FFmpeg refuses is said in a sentence."""
    av = _pyav(file)
    if file.stat().st_size == 0:
        raise ValueError(f"{file.name} is empty; wanted a film.")
    try:
        container = av.open(str(file))
    except av.FFmpegError as error:
        raise ValueError(
            f"{file.name} cannot be read as a film ({_reason(error)}); it is damaged, was cut off, "
            "or is of another kind. Copy or download it again."
        ) from None
    with container:
        yield container


def _pyav(file: Path):  # type: ignore[no-untyped-def]  # the module av
    try:
        import av
    except ImportError:
        raise ValueError(
            f"{file.name} needs the av package (PyAV), which brings FFmpeg: pip install "
            "'bokehdiff[video]'."
        ) from None
    return av


def _reason(error: Exception) -> str:
    """What FFmpeg says, without numbers and names of files."""
    return getattr(error, "strerror", None) or first_line(error)


def _picture_stream(container: InputContainer, file: Path) -> av.VideoStream:
    """The moving pictures of a file; the cover of an album is none."""
    import av.stream

    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            stream.thread_type = "AUTO"
            return stream
    what = "only sound" if container.streams.audio else "no moving pictures"
    raise ValueError(f"{file.name} has {what}; wanted a film.")


def _frames_of(
    container: InputContainer, stream: av.VideoStream, file: Path
) -> Iterator[av.VideoFrame]:
    import av

    count = 0
    try:
        for decoded in container.decode(stream):
            yield decoded
            count += 1
    except av.FFmpegError as error:
        raise ValueError(
            f"{file.name} is damaged after frame {count} ({_reason(error)}); copy or download it "
            "again."
        ) from None


def _decoded(file: Path, wanted: FilmFormat) -> Iterator[tuple[av.VideoFrame, int]]:
    """Frames as they are stored, with their time stamps, which rise."""
    last = None
    with _opened(file) as container:
        stream = _picture_stream(container, file)
        for decoded in _frames_of(container, stream, file):
            time_stamp = decoded.pts
            if time_stamp is None:  # a bare stream, which has no clock
                step = 1 / (wanted.frames_per_second * wanted.time_base)
                time_stamp = 0 if last is None else last + max(round(step), 1)
            if last is not None and time_stamp <= last:
                continue
            last = time_stamp
            yield decoded, time_stamp


def _picture(decoded: av.VideoFrame, wanted: FilmFormat) -> np.ndarray:
    """uint8 (H, W, 3), upright."""
    is_full = wanted.full_range or decoded.format.is_rgb
    decoded.colorspace = wanted.matrix_of_conversion
    decoded.color_range = FULL_RANGE if is_full else LIMITED_RANGE
    converted = decoded.reformat(
        format="rgb24", dst_color_range=FULL_RANGE, interpolation=EXACT_CONVERSION
    )
    # The angle is counted against the clock, as rot90 counts.
    picture = np.rot90(converted.to_ndarray(), decoded.rotation // 90)
    if picture.shape[:2] != (wanted.height, wanted.width):
        height, width = picture.shape[:2]
        raise ValueError(
            f"The film changes from {wanted.width} x {wanted.height} to {width} x {height} pixels "
            "(width x height); wanted one size. Cut it there."
        )
    return np.ascontiguousarray(picture)


# --- Writing --------------------------------------------------------------------------------------


def check_video_file(path: PathLike, overwrite: bool = False) -> Path:
    """The path, if a video can be written there.

    Raises:
        FileExistsError: the file is there, and `overwrite` is False.
        FileNotFoundError: the folder does not exist.
        ValueError: another suffix, or the package is missing.
    """
    file = Path(path).expanduser()
    if file.suffix.lower() not in VIDEO_SUFFIXES:
        raise ValueError(
            f"{file.name} ends in {file.suffix or 'no suffix'}; wanted a video, one of "
            f"{', '.join(VIDEO_SUFFIXES)}."
        )
    file_to_write(file, VIDEO_SUFFIXES, overwrite)
    _pyav(file)
    return file


def write_video(
    path: PathLike,
    frames: Iterable[np.ndarray],
    frames_per_second: float,
    overwrite: bool = False,
) -> Path:
    """Writes frames as H.264 video, as they come; returns its path.

    H.264 with players' usual colour format needs even sides: an odd last row or column is left out.
    The file appears complete or not at all.

    Args:
        path: where to; its suffix is one of ``VIDEO_SUFFIXES``.
        frames: uint8 (H, W, 3) display-encoded sRGB, all of one size, at least 2 x 2.
        frames_per_second: how fast they are shown.
        overwrite: replace a file that is there.

    Raises:
        FileExistsError, FileNotFoundError: as of :func:`check_video_file`.
        ValueError: no frame, frames of another kind, or as of :func:`check_video_file`.
    """
    file = check_video_file(path, overwrite)
    if not frames_per_second > 0:
        raise ValueError(f"frames_per_second is {frames_per_second}; wanted more than 0.")
    # A decimal of a rate such as 30000/1001 is close to the fraction, but not equal.
    rate = Fraction(frames_per_second).limit_denominator(FINE_CLOCK)
    numbered = (FilmFrame(frame, number) for number, frame in enumerate(frames))
    first = next(numbered, None)
    if first is None:
        raise ValueError("There are no frames; wanted at least one.")
    height, width = first.picture.shape[0], first.picture.shape[-2]
    like = FilmFormat(width, height, frames_per_second=rate, time_base=1 / rate)
    with whole_or_not_at_all(file, file.suffix) as unfinished:
        _encode(unfinished, itertools.chain([first], numbered), like)
    return file


def write_stretch(file: Path, frames: Iterable[FilmFrame], like: FilmFormat) -> int:
    """Writes frames of a film, to be joined with others; returns how many.

    Every stretch can be decoded by itself. The file appears complete or not at all, and not if
    there are no frames.

    Args:
        file: where to; its suffix is ``STRETCH_SUFFIX``.
        frames: with time stamps in units of ``like.time_base``.
        like: the film's format.

    Raises:
        ValueError: frames of another kind.
    """
    coming = iter(frames)
    first = next(coming, None)
    if first is None:
        return 0
    with whole_or_not_at_all(file, file.suffix) as unfinished:
        return _encode(unfinished, itertools.chain([first], coming), like)


def _encode(file: Path, frames: Iterable[FilmFrame], like: FilmFormat) -> int:
    import av

    count = 0
    with av.open(str(file), "w") as container:
        # No frame refers to a later one, so that stretches follow each other in one order.
        options = {"crf": QUALITY, "bf": "0"}
        stream = container.add_stream("libx264", rate=like.frames_per_second, options=options)
        stream.width, stream.height = like.width // 2 * 2, like.height // 2 * 2
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.time_base = stream.time_base = like.time_base
        codec.color_primaries, codec.color_trc = like.primaries, like.transfer
        codec.colorspace = like.matrix
        codec.color_range = FULL_RANGE if like.full_range else LIMITED_RANGE
        codec.sample_aspect_ratio = like.pixel_aspect
        for frame in frames:
            container.mux(stream.encode(_to_store(frame, like)))
            count += 1
        container.mux(stream.encode(None))
    return count


def _to_store(frame: FilmFrame, like: FilmFormat) -> av.VideoFrame:
    import av

    picture = frame.picture
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"A frame is {picture.dtype} {picture.shape}; wanted uint8 (H, W, 3).")
    height, width = picture.shape[:2]
    if min(height, width) < 2:
        raise ValueError(f"A frame is {width} x {height}; wanted at least 2 x 2.")
    if (width, height) != (like.width, like.height):
        raise ValueError(
            f"A frame is {width} x {height} pixels, the film {like.width} x {like.height}; wanted "
            "one size."
        )
    even = np.ascontiguousarray(picture[: height - height % 2, : width - width % 2])
    shown = av.VideoFrame.from_ndarray(even, format="rgb24")
    shown.colorspace, shown.color_range = like.matrix_of_conversion, FULL_RANGE
    stored_range = FULL_RANGE if like.full_range else LIMITED_RANGE
    stored = shown.reformat(
        format="yuv420p", dst_color_range=stored_range, interpolation=EXACT_CONVERSION
    )
    stored.pts, stored.time_base = frame.time_stamp, like.time_base
    stored.colorspace, stored.color_range = like.matrix, stored_range
    stored.color_primaries, stored.color_trc = like.primaries, like.transfer
    return stored


def check_sound_fits(film: VideoReader, file: Path) -> None:
    """Refuses a kind of file that cannot hold the sound of a film as it is.

    Args:
        film: whose sound is to be copied.
        file: to be written; its suffix says the kind.

    Raises:
        ValueError: it cannot.
    """
    import io

    av = _pyav(file)
    kind = {".mkv": "matroska"}.get(file.suffix.lower(), file.suffix.lower()[1:])
    with _opened(film.path) as source, av.open(io.BytesIO(), "w", format=kind) as trial:
        for stream in source.streams.audio:
            try:
                trial.add_stream_from_template(stream)
                trial.start_encoding()
            except (av.FFmpegError, ValueError):
                raise ValueError(
                    f"The sound of {film.path.name} ({stream.codec_context.name}) cannot be kept "
                    f"as it is in a {file.suffix} file; wanted one that holds it, for instance "
                    f"{file.with_suffix('.mkv').name}."
                ) from None


def join_stretches(
    file: Path, stretches: Sequence[Path], sound_of: VideoReader, overwrite: bool = False
) -> None:
    """Joins stretches of one film, in their order, and puts its sound to it, without encoding.

    The file appears complete or not at all.

    Args:
        file: where to; its suffix is one of ``VIDEO_SUFFIXES``.
        stretches: written by :func:`write_stretch`.
        sound_of: the film whose sound, and title and date, are copied.
        overwrite: replace a file that is there.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: as of :func:`check_video_file`; damage.
    """
    av = _pyav(file)
    check_video_file(file, overwrite)
    with (
        whole_or_not_at_all(file, file.suffix) as unfinished,
        _opened(sound_of.path) as source,
        av.open(str(unfinished), "w") as container,
    ):
        kept = {"title", "artist", "comment", "copyright", "creation_time", "date", "location"}
        container.metadata.update(
            {name: text for name, text in source.metadata.items() if name in kept}
        )
        with _opened(stretches[0]) as start:
            picture = container.add_stream_from_template(start.streams.video[0])
        sound: dict[int, AudioStream] = {}
        for stream in source.streams.audio:
            sound[stream.index] = container.add_stream_from_template(stream)
            sound[stream.index].metadata.update(stream.metadata)
        # In the order of their times, so that none waits for the others in memory.
        packets = heapq.merge(
            _picture_packets(stretches, picture),
            _sound_packets(source, sound),
            key=operator.itemgetter(0),
        )
        for _, packet in packets:
            container.mux(packet)


def _picture_packets(
    stretches: Sequence[Path], target: av.VideoStream
) -> Iterator[tuple[float, Packet]]:
    """Packets of one stretch after the other, each after its time in seconds."""
    for stretch in stretches:
        with _opened(stretch) as container:
            for packet in container.demux(container.streams.video[0]):
                if packet.dts is not None and packet.time_base is not None:
                    time = float(packet.dts * packet.time_base)
                    packet.stream = target
                    yield time, packet


def _sound_packets(
    source: InputContainer, targets: dict[int, AudioStream]
) -> Iterator[tuple[float, Packet]]:
    """Packets of all sound, each after its time in seconds."""
    if not targets:
        return
    for packet in source.demux(source.streams.audio):
        if packet.dts is not None and packet.time_base is not None:
            time = float(packet.dts * packet.time_base)
            packet.stream = targets[packet.stream.index]
            yield time, packet

"""Moving pictures into a file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .whole_files import PathLike, file_to_write, whole_or_not_at_all

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv")


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
    try:
        import imageio.v2  # noqa: F401
        import imageio_ffmpeg  # noqa: F401
    except ImportError:
        raise ValueError(
            f"{file.name} needs the imageio package with ffmpeg: pip install 'bokehdiff[video]'."
        ) from None
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
    import imageio.v2

    count = 0
    with whole_or_not_at_all(file, file.suffix) as unfinished:
        video = imageio.v2.get_writer(
            unfinished,
            format="FFMPEG",
            mode="I",
            fps=frames_per_second,
            codec="libx264",
            quality=9,
            pixelformat="yuv420p",
            macro_block_size=1,
            ffmpeg_log_level="error",
        )
        # Not `with`, which leaves ffmpeg running when a frame fails.
        with contextlib.closing(video):
            for frame in frames:
                if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                    raise ValueError(
                        f"A frame is {frame.dtype} {frame.shape}; wanted uint8 (H, W, 3)."
                    )
                height, width = frame.shape[:2]
                if min(height, width) < 2:
                    raise ValueError(f"A frame is {width} x {height}; wanted at least 2 x 2.")
                video.append_data(frame[: height - height % 2, : width - width % 2])
                count += 1
        if not count:
            raise ValueError("There are no frames; wanted at least one.")
    return file

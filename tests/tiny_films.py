"""Films of a few frames, with a tone, written by FFmpeg's own encoders, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CLOCK = Fraction(1, 90_000)
LIMITED, FULL = 1, 2


def square_frames(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """A square with coarse texture that moves to the right by a pixel per frame, before another."""
    rng = np.random.default_rng(0)

    def texture(rows: int, columns: int) -> np.ndarray:
        blocks = rng.integers(30, 220, (-(-rows // 4), -(-columns // 4), 3), dtype=np.uint8)
        return blocks.repeat(4, axis=0).repeat(4, axis=1)[:rows, :columns]

    wall, square = texture(height, width), texture(20, 16)
    frames = []
    for number in range(count):
        frame = wall.copy()
        left = 4 + number % (width - 24)
        frame[10:30, left : left + 16] = square
        frames.append(frame)
    return frames


def square_maps(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Disparity of :func:`square_frames`: 0.8 and 0.2."""
    maps = []
    for number in range(count):
        disparity = np.full((height, width), 0.2, np.float32)
        left = 4 + number % (width - 24)
        disparity[10:30, left : left + 16] = 0.8
        maps.append(disparity)
    return maps


def tiny_film(
    file: Path,
    frames: Sequence[np.ndarray],
    *,
    times: Sequence[int] | None = None,
    sound: str | None = "aac",
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    tags: tuple[int, int, int, int] = (1, 1, 1, LIMITED),
    rotation: int = 0,
    pixel_aspect: Fraction = Fraction(1),
    interlaced: bool = False,
) -> Path:
    """Writes a film of 25 frames per second; returns its path.

    Args:
        file: where to.
        frames: uint8 (H, W, 3).
        times: time stamps in 1/90000 s.
        sound: codec of a tone; None for a silent film.
        codec, pixel_format: of the pictures.
        tags: primaries, transfer, matrix and range as of H.273.
        rotation: degrees against the clock by which players turn it.
        pixel_aspect: width of a pixel over its height.
        interlaced: each frame holds two moments, by libx264.
    """
    primaries, transfer, matrix, colour_range = tags
    used_matrix = {2: 5, 6: 5}.get(matrix, matrix)
    with av.open(str(file), "w") as container:
        options = {"crf": "4"} if codec == "libx264" else {}
        if interlaced:
            options["x264-params"] = "interlaced=1"
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixel_format
        context = stream.codec_context
        context.time_base = stream.time_base = CLOCK
        context.color_primaries, context.color_trc = primaries, transfer
        context.colorspace, context.color_range = matrix, colour_range
        context.sample_aspect_ratio = pixel_aspect
        if rotation:
            stream.set_display_rotation(rotation)
        if sound is not None:
            tone = container.add_stream(sound, rate=16_000, layout="mono")
            seconds = np.arange(16_000 * len(frames) // 25) / 16_000
            wave = 0.3 * np.sin(2 * np.pi * 440 * seconds)
            kind = "s16" if sound == "flac" else "fltp"
            samples = (wave * 32767).astype(np.int16) if kind == "s16" else wave.astype(np.float32)
            heard = av.AudioFrame.from_ndarray(samples[None], format=kind, layout="mono")
            heard.sample_rate, heard.pts = 16_000, 0
            container.mux([*tone.encode(heard), *tone.encode(None)])
        for number, frame in enumerate(frames):
            shown = av.VideoFrame.from_ndarray(frame, format="rgb24")
            shown.colorspace, shown.color_range = used_matrix, FULL
            stored = shown.reformat(
                format=pixel_format, dst_color_range=colour_range, interpolation="BICUBIC"
            )
            stored.pts = 3600 * number if times is None else times[number]
            stored.time_base = CLOCK
            container.mux(stream.encode(stored))
        container.mux(stream.encode(None))
    return file


def sound_packets(file: Path) -> list[tuple[float, bytes]]:
    """Time in seconds and bytes of every packet of sound."""
    with av.open(str(file)) as container:
        if not container.streams.audio:
            return []
        return [
            (float(packet.pts * packet.time_base), bytes(packet))
            for packet in container.demux(container.streams.audio)
            if packet.pts is not None and packet.size
        ]


def heard_samples(file: Path) -> np.ndarray:
    """The decoded sound."""
    with av.open(str(file)) as container:
        return np.concatenate([one.to_ndarray() for one in container.decode(audio=0)], axis=-1)


def shown_frames(file: Path) -> list[np.ndarray]:
    """The pictures as they are stored, decoded: (H * 3 / 2, W) of the luma and both chromas."""
    with av.open(str(file)) as container:
        return [one.to_ndarray() for one in container.decode(video=0)]

"""What a folder of shards holds: samples as files in tar archives, in the layout of WebDataset.

A folder holds one data set: ``shard-00000-of-00016.tar`` and so on, and ``manifest.json``, which
says what the samples were made with and lists the shards with their SHA-256. A sample is four
files of an archive, named by its index:

- ``00000012.image.png``: all in focus, 8-bit sRGB.
- ``00000012.target.npy``: the same through the lens, sRGB as uint16 (3, H, W).
- ``00000012.disparity.npy``: uint16 (1, H, W), larger is nearer.
- ``00000012.json``: ``index``, ``seed``, ``df``, ``K``, ``aperture`` and ``provenance`` (JSON
  text each), and ``sha256`` of the whole sample.

Integers span [0, 1] by their largest value. Nothing else enters the bytes, neither time nor user,
so the same samples and libraries give the same files.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

__all__ = [
    "DamagedSample",
    "Shard",
    "StoredSample",
    "check_sample",
    "decode_sample",
    "encode_sample",
    "file_sha256",
    "find_samples",
    "read_manifest",
    "sample_key",
    "shard_layout",
]

# Raised whenever folders written before can no longer be read.
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
# What a writer keeps beside the shards until all of them are there.
UNFINISHED = ".unfinished"
# Arrays of 16 bits are no PNGs: Pillow, by which others decode them, reads colours as 8 bits, and
# webdataset turns gray levels into white, neither with a word. A PNG would save a sixth of the
# target.
MEMBERS = ("image.png", "target.npy", "disparity.npy", "json")
MEMBER_NAME = re.compile(rf"(\d{{8,}})\.({'|'.join(map(re.escape, MEMBERS))})")
# Level 6 takes twice as long and saves a hundredth.
PNG_COMPRESSION = 3
END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)


class DamagedSample(ValueError):
    """The bytes of a sample are not those that were written."""


class Shard(NamedTuple):
    """An archive by its name, and the indices of its samples."""

    name: str
    indices: range


class StoredSample(NamedTuple):
    """A sample as it is stored; ``record`` is its JSON with aperture and provenance as dicts."""

    image: np.ndarray  # uint8 (3, H, W)
    target: np.ndarray  # uint16 (3, H, W)
    disparity: np.ndarray  # uint16 (1, H, W)
    record: dict[str, Any]


def shard_layout(count: int, num_shards: int) -> list[Shard]:
    """The shards of a data set of ``count`` samples: runs of indices, equally long up to one.

    Raises ValueError when there are more shards than samples, or none.
    """
    if not 1 <= num_shards <= count:
        raise ValueError(
            f"{count} samples in {num_shards} shards; wanted at least one shard and at least one "
            "sample in each."
        )
    starts = [shard * count // num_shards for shard in range(num_shards + 1)]
    return [
        Shard(f"shard-{shard:05d}-of-{num_shards:05d}.tar", range(*starts[shard : shard + 2]))
        for shard in range(num_shards)
    ]


def sample_key(index: int) -> str:
    """The name of a sample in its archive, in messages too."""
    return f"{index:08d}"


def encode_sample(index: int, seed: int, arrays: Mapping[str, Any]) -> bytes:
    """The four files of a sample as a piece of a tar archive.

    ``arrays``: image uint8 (3, H, W), target uint16 (3, H, W), disparity uint16 (1, H, W), df and
    K as floats, aperture and provenance as JSON-able dicts, either of which may be missing.

    Raises ValueError when an array has another type or shape, or a number is not finite.
    """
    height, width = np.shape(arrays["image"])[-2:]
    for name, dtype, channels in (
        ("image", np.uint8, 3),
        ("target", np.uint16, 3),
        ("disparity", np.uint16, 1),
    ):
        array = arrays[name]
        if array.dtype != dtype or array.shape != (channels, height, width):
            raise ValueError(
                f"{name} of sample {index} is {array.dtype} {array.shape}; wanted "
                f"{np.dtype(dtype)} {(channels, height, width)}."
            )
    # Libraries that make tables of JSON take the fields of the first few samples for those of all
    # and drop others without a word; text keeps a dict whole.
    record = {
        "index": index,
        "seed": seed,
        "df": float(arrays["df"]),
        "K": float(arrays["K"]),
        "aperture": _json(arrays.get("aperture", {})),
        "provenance": _json(arrays.get("provenance", {})),
    }
    contents = {
        "image.png": _png(arrays["image"]),
        "target.npy": _npy(arrays["target"]),
        "disparity.npy": _npy(arrays["disparity"]),
    }
    record["sha256"] = _sample_sha256(contents, record)
    contents["json"] = _json(record).encode()
    block = io.BytesIO()
    for member in MEMBERS:
        header = tarfile.TarInfo(f"{sample_key(index)}.{member}")
        header.size = len(contents[member])
        block.write(header.tobuf(tarfile.USTAR_FORMAT))
        block.write(contents[member])
        block.write(bytes(_padding(header.size)))
    return block.getvalue()


def decode_sample(index: int, block: bytes) -> StoredSample:
    """The sample in a piece of a tar archive; raises DamagedSample if any of it has changed."""
    contents, record = check_sample(index, block)
    image = np.asarray(Image.open(io.BytesIO(contents["image.png"])))
    for name in ("aperture", "provenance"):
        record[name] = json.loads(record[name])
    return StoredSample(
        np.ascontiguousarray(image.transpose(2, 0, 1)),
        np.load(io.BytesIO(contents["target.npy"])),
        np.load(io.BytesIO(contents["disparity.npy"])),
        record,
    )


def check_sample(index: int, block: bytes) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The contents of a sample's files but the last, and that one's JSON.

    Raises DamagedSample if any of it has changed; the pictures are not decoded.
    """
    contents = {}
    position = 0
    try:
        for member in MEMBERS:
            start = position + tarfile.BLOCKSIZE
            header = tarfile.TarInfo.frombuf(block[position:start], "ascii", "replace")
            if header.name != f"{sample_key(index)}.{member}":
                raise ValueError(f"it lacks {member}")
            contents[member] = block[start : start + header.size]
            position = start + header.size + _padding(header.size)
        record = json.loads(contents.pop("json"))
        written = record.pop("sha256")
        if record["index"] != index or written != _sample_sha256(contents, record):
            raise ValueError("its SHA-256 differs")
    except (KeyError, TypeError, ValueError, tarfile.TarError) as error:
        raise DamagedSample(f"sample {sample_key(index)} is damaged: {error}") from error
    return contents, record


def find_samples(archive: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """(index, start, stop) of samples in an archive, by the headers of its files.

    Unlike other readers this one goes on behind a damaged header: it looks for the next.
    """
    size = archive.seek(0, os.SEEK_END)
    position, start, index = 0, 0, None
    while position < size:
        archive.seek(position)
        try:
            header = tarfile.TarInfo.frombuf(archive.read(tarfile.BLOCKSIZE), "ascii", "replace")
        except tarfile.HeaderError:
            position += tarfile.BLOCKSIZE
            continue
        stop = position + tarfile.BLOCKSIZE + header.size + _padding(header.size)
        match = MEMBER_NAME.fullmatch(header.name)
        if match and match[2] == MEMBERS[0]:
            start, index = position, int(match[1])
        elif match and match[2] == MEMBERS[-1] and index == int(match[1]) and stop <= size:
            yield index, start, stop
        position = stop


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """What ``manifest.json`` of a folder says.

    Raises ValueError when there is none, because the folder is no data set or is not finished, or
    when it was written in another format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["format_version"]
    except FileNotFoundError:
        if not (folder / UNFINISHED).is_dir():
            raise ValueError(
                f"{folder} holds no data set: it has no {MANIFEST}. Write one with "
                "`python -m data_synthesis procedural --count N --out FOLDER`."
            ) from None
        there = sum(1 for _ in folder.glob("shard-*.tar"))
        raise ValueError(
            f"The data set in {folder} is not finished: {there} shards are there. Give the "
            "command that writes it again; it goes on where it stopped."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error!r}). Copy it anew from where the folder came from, or "
            "write the data set again to another folder."
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version!r}; this program reads {FORMAT_VERSION}. Write "
            "the data set again."
        )
    return manifest


def _sample_sha256(contents: Mapping[str, bytes], record: Mapping[str, Any]) -> str:
    """Over the other files in their order and the JSON without this checksum."""
    digest = hashlib.sha256()
    for member in MEMBERS[:-1]:
        digest.update(contents[member])
    digest.update(_json(record).encode())
    return digest.hexdigest()


def _padding(size: int) -> int:
    """Bytes from the end of a file to that of its last block."""
    return -size % tarfile.BLOCKSIZE


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    picture.save(stream, "PNG", compress_level=PNG_COMPRESSION)
    return stream.getvalue()


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    # Little-endian on every machine.
    np.save(stream, np.ascontiguousarray(array, "<u2"), allow_pickle=False)
    return stream.getvalue()

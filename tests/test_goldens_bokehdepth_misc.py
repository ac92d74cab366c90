"""LAB colour transfer, K from EXIF data and the size on which Depth Anything works agree with the
authors' code on every stored case."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import DPTImageProcessorPil

from bokehdiff.camera import Camera
from bokehdiff.colour_transfer import transfer_colours
from bokehdiff.optics import sensor_width_from_equivalent, strength_from_camera
from bokehdiff.stack_strengths import strengths_of_camera

FIXTURES = Path(
    os.environ.get(
        "BOKEHDIFF_FIXTURES", Path(__file__).resolve().parents[2] / "shared" / "fixtures"
    )
)
FOLDER = FIXTURES / "bokehdepth"
COLOUR_OUTPUTS = {"lab/out_mean_std": "lab", "lab/out_mean_only": "lab_mean"}


def records() -> dict[str, dict[str, Any]]:
    """What every JSON file of the folder says, by its name."""
    files = sorted(FOLDER.glob("*.json")) if FOLDER.is_dir() else []
    read = {file.stem: json.loads(file.read_text()) for file in files}
    return {name: record for name, record in read.items() if isinstance(record, dict)}


def colour_cases() -> list[tuple[str, str]]:
    """(name, tensor) of the colour transfers."""
    return [
        (name, tensor)
        for name, record in records().items()
        for tensor in COLOUR_OUTPUTS
        if tensor in record.get("tensors", {})
    ]


def rows(key: str) -> list[Any]:
    """The rows of the tables of that key, of all files that have one."""
    return [
        pytest.param(row, id=f"{name}-{number}")
        for name, record in records().items()
        if isinstance(record.get(key), list)
        for number, row in enumerate(record[key])
    ]


pytestmark = pytest.mark.skipif(
    not records(), reason=f"no cases in {FOLDER}; point BOKEHDIFF_FIXTURES at the fixtures"
)


@pytest.mark.parametrize(("name", "output"), colour_cases())
def test_golden_colour_transfer(name: str, output: str) -> None:
    """Bit by bit: both are 8-bit numbers."""
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = safetensors.load_file(FOLDER / f"{name}.safetensors")
    moved = transfer_colours(tensors["lab/target"], tensors["lab/source"], COLOUR_OUTPUTS[output])
    np.testing.assert_array_equal(moved, tensors[output])


@pytest.mark.parametrize("row", rows("exif_to_K"))
def test_golden_strength_of_exif_data(row: dict[str, float], tmp_path: Path) -> None:
    width, height = row["width_px"], row["height_px"]
    sensor = sensor_width_from_equivalent(row["f_mm"], row["f35_mm"], width, height)
    assert sensor == pytest.approx(row["sensor_width_mm"], rel=1e-5)
    strength = strength_from_camera(row["N"], row["f_mm"], row["s1_m"], sensor, width)
    assert strength == pytest.approx(row["K"], rel=1e-5)
    # A photograph with these data, and a camera that is given, say the same.
    exif = Image.Exif()
    tags = {0x829D: row["N"], 0x920A: row["f_mm"], 0xA405: row["f35_mm"], 0x9206: row["s1_m"]}
    for tag, value in tags.items():
        exif.get_ifd(0x8769)[tag] = value
    Image.new("RGB", (width, height)).save(tmp_path / "photo.jpg", exif=exif.tobytes())
    (of_photo,) = strengths_of_camera(tmp_path / "photo.jpg", (height, width))
    assert of_photo == pytest.approx(row["K"], rel=1e-5)
    camera = Camera.from_equivalent(row["N"], row["f_mm"], row["f35_mm"], (height, width))
    stopped_down = dataclasses.replace(camera, f_number=22.0)
    (of_camera,) = strengths_of_camera(None, (height, width), stopped_down, row["N"], row["s1_m"])
    assert of_camera == pytest.approx(row["K"], rel=1e-5)


def is_enlarged(height: int, width: int) -> bool:
    """Whether the processor of transformers brings the short side to 518, as the authors always do.

    It brings that side to 518 which is nearer to it, so a photo with a short side well below and a
    long side a little above is shrunk; of photos with a short side of 518 or more, none.
    """
    short, long = min(height, width), max(height, width)
    return abs(1 - 518 / short) <= abs(1 - 518 / long)


@pytest.mark.parametrize("row", rows("geometry"))
def test_golden_size_on_which_depth_anything_works(row: dict[str, Any]) -> None:
    """The processor of transformers, as published checkpoints set it up."""
    processor = DPTImageProcessorPil(
        size={"height": 518, "width": 518}, ensure_multiple_of=14, keep_aspect_ratio=True
    )
    picture = np.zeros((*row["hw"], 3), np.uint8)
    shape = processor(picture, return_tensors="np")["pixel_values"].shape
    assert (list(shape[-2:]) == row["dav2_network_hw"]) == is_enlarged(*row["hw"])
    # Told the size, it makes it.
    rows, columns = row["dav2_network_hw"]
    told = processor(
        picture, size={"height": rows, "width": columns}, keep_aspect_ratio=False,
        return_tensors="np",
    )["pixel_values"]  # fmt: skip
    assert list(told.shape[-2:]) == row["dav2_network_hw"]

"""What the code in the documentation finds: photographs, films, and models in place of downloads.

A model that a block names and that is not in the package is replaced by a tiny one of the same
class, made here, so that the block runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bokehdiff import BokehStackPipeline, LiteBokehPipeline, render_bokeh, write_image
from tests.tiny_bokeh_stack import trained_adapter
from tests.tiny_depth import save_tiny_depth
from tests.tiny_depth_dsfa import save_tiny_dsfa
from tests.tiny_films import square_frames, square_maps, tiny_film
from tests.tiny_flux import tiny_kontext_components
from tests.tiny_litebokeh import tiny_unet
from tests.trained_pipelines import base_pipeline, trained_pipeline

HEIGHT, WIDTH = 48, 64


def write_files(folder: Path) -> None:
    """Every file that pages read, by the names that they use; 64 x 48 pixels."""
    photo, disparity = square_frames(1)[0], square_maps(1)[0]
    picture = Image.fromarray(photo)
    exif = Image.Exif()
    exif.get_ifd(0x8769).update({0x829D: 2.0, 0x920A: 50.0, 0xA405: 50})
    for name in ("photo.jpg", "IMG_0001.jpg", "portrait.jpg"):
        picture.save(folder / name, quality=95, exif=exif)
    _write_heic(picture, folder / "IMG_0001.HEIC")
    Image.fromarray((65535 * disparity).astype(np.uint16)).save(folder / "disparity.png")
    np.save(folder / "disparity.npy", disparity)
    np.save(folder / "metric.npy", disparity)
    np.save(folder / "depth.npy", 1 / disparity)
    np.save(folder / "lamps.npy", disparity)
    sharp = torch.from_numpy(photo).permute(2, 0, 1)[None] / 255
    for name, K in (("f4.jpg", 4.0), ("f2.jpg", 8.0), ("k10.png", 4.0), ("k20.png", 8.0)):
        blurred = render_bokeh(sharp, disparity, df=0.8, K=K)
        write_image(folder / name, blurred)
    for name in ("photos", "disparities", "maps", "shots", "cutouts"):
        (folder / name).mkdir()
    for number in (1, 2):
        for place in ("photos", "shots", "cutouts"):
            picture.save(folder / place / f"{number}.jpg")
        np.save(folder / "disparities" / f"{number}.npy", disparity)
    for number, one in enumerate(square_maps(4)):
        np.save(folder / "maps" / f"{number:04d}.npy", one)
    keyframes = [{"time": 0, "focus": [12, 18]}, {"time": 0.08, "focus": "auto"}]
    (folder / "keyframes.json").write_text(json.dumps(keyframes))
    tiny_film(folder / "film.mp4", square_frames(4))


def _write_heic(picture: Image.Image, path: Path) -> None:
    import pillow_heif

    pillow_heif.from_pillow(picture).save(path)


# --- Models ---------------------------------------------------------------------------------------


def _sdxl(folder: Path) -> None:
    base_pipeline().save_pretrained(folder)


def _bokeh_weights(folder: Path) -> None:
    trained_pipeline().save_bokeh_weights(folder, adapter_name="default")


def _published_weights(folder: Path) -> None:
    trained_pipeline().save_bokeh_weights(
        folder / "small", layout="official", adapter_name="default"
    )


def _kontext(folder: Path) -> None:
    BokehStackPipeline(**tiny_kontext_components(folder / "parts")).save_pretrained(folder)


def _adapter(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    parts = tiny_kontext_components(file.parent / "parts")
    BokehStackPipeline(**parts, bokeh_adapter=trained_adapter()).save_bokeh_adapter(file)


def _litebokeh(folder: Path) -> None:
    LiteBokehPipeline(tiny_unet()).save_pretrained(folder)


def _metric_depth(folder: Path) -> None:
    save_tiny_depth(folder, "metric")


DEFAULT_DEPTH_MODEL = "depth-anything/Depth-Anything-V2-Small-hf"

MODELS: dict[str, Callable[[Path], object]] = {
    "stabilityai/stable-diffusion-xl-base-1.0": _sdxl,
    "outputs/first": _sdxl,
    "zcx65535/bokehdiff": _published_weights,
    "outputs/paper": _bokeh_weights,
    "black-forest-labs/FLUX.1-Kontext-dev": _kontext,
    "weights/bokeh_lora.bin": _adapter,
    "depth-anything/Depth-Anything-V2-Metric-Outdoor-Small-hf": _metric_depth,
    DEFAULT_DEPTH_MODEL: save_tiny_depth,
    "FOLDER": save_tiny_depth,
    "outputs/dsfa": save_tiny_dsfa,
    "outputs/litebokeh/tiny": _litebokeh,
}
"""What pages name, and how a tiny one is made. A folder is looked for before the Hub is."""


def make_models(named_in: str, folder: Path) -> None:
    """Makes the models that a text names, and the depth model that needs no name, in a folder."""
    for name, make in MODELS.items():
        if name in named_in or name == DEFAULT_DEPTH_MODEL:
            make(folder / name)


NEEDS_A_GPU = {', dtype=torch.bfloat16).to("cuda")': ")", '.to("cuda")': ""}
"""Words that are left out where there is no GPU, and what stands there instead."""

PLACES = {
    "512, 300": "20, 18",
    "512,300": "20,18",
    "900,420": "50,40",
    "1200, 800": "20, 18",
    "640, 300": "20, 18",
    "640,300": "20,18",
}
"""Places in photographs of the size that people have, and where they are in those of 64 x 48."""


def names_given(code: str, folder: Path) -> dict[str, Any]:
    """Objects that pages take for granted: those whose names are in their code."""
    makers: dict[str, Callable[[], Any]] = {
        "frames": lambda: square_frames(3),
        "disparities": lambda: square_maps(3),
        "show": lambda: lambda picture: None,
        "stack_pipeline": lambda: BokehStackPipeline(
            **tiny_kontext_components(folder / "stack_pipeline"), bokeh_adapter=trained_adapter()
        ),
    }
    return {name: make() for name, make in makers.items() if name in code}

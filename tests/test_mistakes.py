"""Mistakes people make, and the sentence each gets: what came, what was wanted, what to do.

``python -m pytest tests/test_mistakes.py -v`` lists them; ``python tests/test_mistakes.py`` prints
the sentences.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import bokehdiff
from bokehdiff import images, optics, photographs, rendering
from bokehdiff.cli import app

HEIGHT, WIDTH = 6, 8
PHOTO = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
DISPARITY = np.linspace(0, 1, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)


class Mistake(NamedTuple):
    """What was done (given a scratch folder), and a pattern of the sentence."""

    name: str
    make: Callable[[Path], object]
    sentence: str
    error: type[Exception] = ValueError


def image(given: object) -> object:
    return images.as_image_batch(given)


def disparity(given: object, metric: bool = False) -> object:
    return images.as_disparity_batch(given, 1, HEIGHT, WIDTH, metric=metric)


def file_of(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def truncated(folder: Path, suffix: str) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = folder / f"photo{suffix}"
    Image.fromarray(noise).save(path)
    return file_of(folder, path.name, path.read_bytes()[: path.stat().st_size // 2])


def saved(folder: Path, name: str, values: np.ndarray, **more: np.ndarray) -> Path:
    if name.endswith(".npz"):
        np.savez(folder / name, **more)
    elif name.endswith(".npy"):
        np.save(folder / name, values)
    else:
        Image.fromarray(values).save(folder / name)
    return folder / name


def with_holes(values: np.ndarray, hole: float) -> np.ndarray:
    values = values.astype(np.float32).copy()
    values[1:3, 2:4] = hole
    return values


IMAGE_MISTAKES = [
    Mistake(
        "photo that is not there",
        lambda folder: images.read_image(folder / "photo.png"),
        r"There is no file .*photo\.png; wanted the photograph",
        FileNotFoundError,
    ),
    Mistake("photo is a folder", images.read_image, r"is a folder; wanted one photograph file"),
    Mistake(
        "empty file",
        lambda folder: images.read_image(file_of(folder, "photo.jpg", b"")),
        r"photo\.jpg is empty \(0 bytes\).*Copy the file again",
    ),
    Mistake(
        "text file named jpg",
        lambda folder: images.read_image(file_of(folder, "photo.jpg", b"hello")),
        r"photo\.jpg is not a picture that can be read here.*export it as PNG",
    ),
    Mistake(
        "camera raw",
        lambda folder: images.read_image(file_of(folder, "photo.NEF", b"II*")),
        r"camera raw file; wanted a developed photograph: export it",
    ),
    Mistake(
        "truncated JPEG",
        lambda folder: images.read_image(truncated(folder, ".jpg")),
        r"photo\.jpg is damaged or truncated .* wanted a complete picture",
    ),
    Mistake(
        "truncated PNG",
        lambda folder: images.read_image(truncated(folder, ".png")),
        r"photo\.png is damaged or truncated",
    ),
    Mistake(
        "truncated TIFF",
        lambda folder: images.read_image(truncated(folder, ".tif")),
        r"photo\.tif is damaged or truncated",
    ),
    Mistake(
        "truncated picture opened by the caller",
        lambda folder: image(Image.open(truncated(folder, ".png"))),
        r"photo\.png is damaged or truncated",
    ),
    Mistake(
        "None for an image", lambda _: image(None), r"of type NoneType; wanted a path, a Pillow"
    ),
    Mistake("no images", lambda _: image([]), r"list of images is empty; wanted at least one"),
    Mistake(
        "photographs of different sizes in one batch",
        lambda _: image([PHOTO, PHOTO[:4]]),
        r"different sizes .*\(4, 8\), \(6, 8\); wanted one size per batch. Render them one by one",
    ),
    Mistake(
        "array without pixels", lambda _: image(PHOTO[:0]), r"shape \(0, 8, 3\), without a pixel"
    ),
    Mistake(
        "tensor without pixels",
        lambda _: image(torch.zeros(1, 3, 0, 4)),
        r"shape \(1, 3, 0, 4\), without a pixel",
    ),
    Mistake(
        "array with channels first",
        lambda _: image(PHOTO.transpose(2, 0, 1)),
        r"shape \(3, 6, 8\); wanted \(H, W, 3\).*array\.transpose\(1, 2, 0\)",
    ),
    Mistake(
        "tensor with channels last",
        lambda _: image(torch.from_numpy(PHOTO)),
        r"shape \(6, 8, 3\); wanted \(3, H, W\) or \(B, 3, H, W\).*movedim\(-1, -3\)",
    ),
    Mistake(
        "tensor without channels",
        lambda _: image(torch.rand(6, 8)),
        r"shape \(6, 8\); wanted \(3, H, W\)",
    ),
    Mistake(
        "floats in 0..255",
        lambda _: image(PHOTO.astype(np.float32)),
        r"values from 0 to 249; wanted .*\[0, 1\].*image / 255",
    ),
    Mistake(
        "floats in 0..65535",
        lambda _: image(PHOTO * 256.0),
        r"wanted .*\[0, 1\].*image / 65535",
    ),
    Mistake(
        "floats in [-1, 1]",
        lambda _: image(torch.linspace(-1, 1, 12).reshape(1, 3, 2, 2)),
        r"values from -1 to 1; wanted .*pass \(image \+ 1\) / 2",
    ),
    Mistake(
        "photo with NaN",
        lambda _: image(with_holes(PHOTO[:, :, 0] / 255, np.nan)),
        r"has 4 NaN or infinite values; wanted finite values in \[0, 1\]",
    ),
    Mistake(
        "32-bit whole numbers",
        lambda _: image(PHOTO.astype(np.int32)),
        r"holds int32 values; wanted uint8, uint16, or floats in \[0, 1\]",
    ),
]

DISPARITY_MISTAKES = [
    Mistake("None for disparity", lambda _: disparity(None), r"of type NoneType; wanted a path"),
    Mistake(
        "disparity that is not there",
        lambda folder: images.read_disparity(folder / "map.npy"),
        r"There is no file .*map\.npy; wanted the disparity map",
        FileNotFoundError,
    ),
    Mistake(
        "truncated npy",
        lambda folder: images.read_disparity(
            file_of(folder, "map.npy", saved(folder, "map.npy", DISPARITY).read_bytes()[:140])
        ),
        r"map\.npy cannot be read as a numpy file",
    ),
    Mistake(
        "truncated PFM",
        lambda folder: images.read_disparity(file_of(folder, "map.pfm", b"Pf\n8 6\n-1\n1234")),
        r"map\.pfm is damaged or truncated: 4 bytes of samples for 8 x 6 pixels",
    ),
    Mistake(
        "PFM of another kind",
        lambda folder: images.read_disparity(file_of(folder, "map.pfm", b"P5\n8 6\n255\n")),
        r"no PFM header; wanted a portable float map",
    ),
    Mistake(
        "npz with several arrays",
        lambda folder: images.read_disparity(
            saved(folder, "map.npz", DISPARITY, left=DISPARITY, right=DISPARITY)
        ),
        r"holds the arrays left, right; wanted one array, or one named disparity",
    ),
    Mistake(
        "npz with depth",
        lambda folder: images.read_disparity(saved(folder, "map.npz", DISPARITY, depth=DISPARITY)),
        r"holds the arrays depth; .*bokehdiff\.depth_to_disparity",
    ),
    Mistake(
        "colour-mapped view of a disparity map",
        lambda folder: images.read_disparity(saved(folder, "map.png", PHOTO)),
        r"map\.png is a colour picture .* cannot be turned back: export the map as 16-bit gray",
    ),
    Mistake(
        "disparity of another size",
        lambda _: disparity(DISPARITY[::2, ::2]),
        r"4 x 3 pixels \(width x height\), the photograph 8 x 6; wanted the same size\. "
        r"Resize it .*size=\(6, 8\)",
    ),
    Mistake(
        "disparity of the unturned photograph",
        lambda _: disparity(DISPARITY.T),
        r"6 x 8 pixels .* sides are swapped.*turn it by 90 degrees",
    ),
    Mistake(
        "disparity of another picture",
        lambda _: disparity(DISPARITY[:, :5]),
        r"5 x 6 pixels .* seems to belong to another picture or crop",
    ),
    Mistake(
        "more maps than photographs",
        lambda _: disparity([DISPARITY] * 2),
        r"2 disparity maps for 1 photographs; wanted one for each, or one for all",
    ),
    Mistake(
        "colour array as disparity",
        lambda _: disparity(PHOTO),
        r"shape \(6, 8, 3\), a colour picture; wanted one disparity per pixel",
    ),
    Mistake(
        "disparity in pixels",
        lambda _: disparity(DISPARITY * 59.3),
        r"values from 0 to 59\.3; wanted \[0, 1\], larger is nearer\..*normalise_disparity",
    ),
    Mistake(
        "disparity in 0..255 as floats",
        lambda _: disparity(np.round(DISPARITY * 255)),
        r"If it is in 0\.\.255, divide by 255",
    ),
    Mistake(
        "depth in millimetres",
        lambda _: disparity(500 + 4000 * DISPARITY),
        r"values from 500 to 4500; wanted \[0, 1\].*depth_to_disparity",
    ),
    Mistake(
        "depth in millimetres as metric disparity",
        lambda _: disparity(500 + 4000 * DISPARITY, metric=True),
        r"wanted 1/metres.*depth in millimetres, pass 1000 / depth",
    ),
    Mistake(
        "inverted disparity",
        lambda _: disparity(-DISPARITY),
        r"values from -1 to 0; wanted no negative values.*larger-is-nearer",
    ),
    Mistake(
        "-1 for unknown",
        lambda _: disparity(with_holes(DISPARITY, -1)),
        r"If -1 marks unknown pixels, set them to NaN",
    ),
    Mistake(
        "nothing but holes",
        lambda _: disparity(np.full((HEIGHT, WIDTH), np.nan)),
        r"no known pixel at all",
    ),
    Mistake(
        "one map of a batch is all holes",
        lambda _: optics.normalise_disparity(np.stack([DISPARITY, DISPARITY * np.nan])[:, None]),
        r"no known pixel at all",
    ),
    Mistake(
        "64-bit whole numbers as disparity",
        lambda _: disparity((DISPARITY * 9).astype(np.int64)),
        r"holds int64 values; wanted floats in \[0, 1\], uint8 or uint16",
    ),
    Mistake(
        "8 bits as metric disparity",
        lambda _: disparity((DISPARITY * 9).astype(np.uint8), metric=True),
        r"holds uint8 values; wanted floats in 1/metres, because whole numbers carry no unit",
    ),
]


def image_io() -> Any:
    return pytest.importorskip("OpenImageIO", reason="pip install '.[hdr]'")


def hdr_file(folder: Path, name: str, channels: tuple[str, ...] = ("R", "G", "B")) -> Path:
    """A file of floats in 0..1000, 64 x 64 pixels."""
    samples = 10 ** (3 * np.random.default_rng(0).random((64, 64, len(channels)), dtype=np.float32))
    description = image_io().ImageSpec(64, 64, len(channels), image_io().FLOAT)
    description.channelnames = channels
    output = image_io().ImageOutput.create(str(folder / name))
    assert output.open(str(folder / name), description)
    assert output.write_image(samples) and output.close()
    return folder / name


def truncated_hdr(folder: Path, name: str) -> Path:
    whole = hdr_file(folder, name).read_bytes()
    return file_of(folder, name, whole[: len(whole) // 2])


LIGHT_MISTAKES = [
    Mistake(
        "linear light as an ordinary photograph",
        lambda folder: images.read_image(saved(folder, "night.npy", 30 * DISPARITY)),
        r"night\.npy has values from 0 to 30; wanted .*\[0, 1\].*beyond white, render it with "
        r'render_bokeh and highlights="hdr"',
    ),
    Mistake(
        "ordinary photograph as linear light",
        lambda folder: images.read_linear_image(saved(folder, "photo.png", PHOTO)),
        r"photo\.png has no highlights beyond white; wanted linear light in a file ending in \.exr",
    ),
    Mistake(
        "linear light that is not there",
        lambda folder: images.read_linear_image(folder / "night.exr"),
        r"There is no file .*night\.exr; wanted the photograph",
        FileNotFoundError,
    ),
    Mistake(
        "whole numbers as linear light",
        lambda folder: images.read_linear_image(saved(folder, "photo.npy", PHOTO)),
        r"photo\.npy holds uint8 values; wanted linear light as floats",
    ),
    Mistake(
        "8-bit TIFF as linear light",
        lambda folder: image_io() and images.read_linear_image(saved(folder, "photo.tif", PHOTO)),
        r"photo\.tif holds uint8 values; wanted linear light as floats",
    ),
    Mistake(
        "linear light with NaN",
        lambda folder: images.read_linear_image(
            saved(folder, "night.npy", with_holes(DISPARITY, np.nan))
        ),
        r"night\.npy has 4 NaN or infinite values; wanted finite linear light",
    ),
    Mistake(
        "linear light with channels first",
        lambda folder: images.read_linear_image(
            saved(folder, "night.npy", np.ones((3, HEIGHT, WIDTH), np.float32))
        ),
        r"night\.npy has shape \(3, 6, 8\); wanted linear light \(H, W, 3\)",
    ),
    Mistake(
        "text file named exr",
        lambda folder: (
            image_io() and images.read_linear_image(file_of(folder, "night.exr", b"hello"))
        ),
        r"night\.exr is damaged, truncated or of another format \(.*\); wanted a complete \.exr",
    ),
    Mistake(
        "truncated OpenEXR",
        lambda folder: images.read_linear_image(truncated_hdr(folder, "night.exr")),
        r"night\.exr is damaged, truncated .* Copy or export it again",
    ),
    Mistake(
        "truncated Radiance",
        lambda folder: images.read_linear_image(truncated_hdr(folder, "night.hdr")),
        r"night\.hdr is damaged, truncated .* Copy or export it again",
    ),
    Mistake(
        "OpenEXR without a picture",
        lambda folder: images.read_linear_image(hdr_file(folder, "night.exr", ("motion.X", "Z"))),
        r"night\.exr has the channels Z, motion\.X; wanted R, G and B, or Y",
    ),
    Mistake(
        "linear light into a file that cuts it off",
        lambda folder: images.write_linear_image(folder / "out.png", torch.ones(1, 3, 4, 4)),
        r"out\.png ends in \.png; wanted one of \.exr, \.hdr, \.tif",
    ),
    Mistake(
        "overwriting with linear light",
        lambda folder: images.write_linear_image(
            saved(folder, "out.npy", DISPARITY), torch.ones(1, 3, 4, 4)
        ),
        r"out\.npy exists already; wanted a new file.*overwrite=True",
        FileExistsError,
    ),
    Mistake(
        "two pictures of linear light in one file",
        lambda folder: images.write_linear_image(folder / "out.npy", torch.ones(2, 3, 4, 4)),
        r"light is \(2, 3, 4, 4\) of float32; wanted one picture of floats, \(1, 3, H, W\)",
    ),
    Mistake(
        "negative linear light",
        lambda folder: images.write_linear_image(folder / "out.npy", -torch.ones(1, 3, 4, 4)),
        r"light has NaN, infinite or negative values; wanted finite values from 0 up",
    ),
]


def focus(df: object, K: object = 20.0, metric: bool = False) -> object:
    return optics.check_focus_and_strength(df, K, batch_size=2, metric=metric)  # type: ignore


def camera(**changes: float) -> float:
    lens = dict(f_number=2, focal_length_mm=50, focus_distance_m=2, sensor_width_mm=36)
    return optics.strength_from_camera(**{**lens, "image_width_px": 4000, **changes})


OPTICS_MISTAKES = [
    Mistake("df above 1", lambda _: focus(1.5), r"df is 1\.5; wanted .* within \[0, 1\]"),
    Mistake(
        "df below 0", lambda _: focus([0.5, -0.25]), r"df is \[-0\.25, 0\.5\]; wanted .*\[0, 1\]"
    ),
    Mistake("df is NaN", lambda _: focus(float("nan")), r"df is nan; wanted .*finite"),
    Mistake(
        "no df", lambda _: focus(None), r"df is None; wanted the disparity of the plane in focus"
    ),
    Mistake("df is text", lambda _: focus("near"), r"df is 'near'; wanted .* one number"),
    Mistake(
        "three df for two images",
        lambda _: focus([0.1, 0.2, 0.3]),
        r"df has shape \(3,\), which fits neither one image nor this batch of 2",
    ),
    Mistake(
        "negative metric df",
        lambda _: focus(-0.5, metric=True),
        r"df is -0\.5; metric disparity is 1/metres.*df=0\.5, at infinity df=0",
    ),
    Mistake("negative K", lambda _: focus(0.5, -3), r"K is -3; wanted zero or more pixels"),
    Mistake("K is NaN", lambda _: focus(0.5, float("nan")), r"K is nan; wanted .*finite"),
    Mistake("K is infinite", lambda _: focus(0.5, torch.inf), r"K is inf; wanted .*finite"),
    Mistake(
        "df of another batch",
        lambda _: optics.signed_defocus(torch.rand(2, 1, 4, 4), torch.rand(3), 1.0),
        r"df has 3 values but the disparity \(2, 1, 4, 4\) is a batch of 2",
    ),
    Mistake("f-number 0", lambda _: camera(f_number=0), r"f_number is 0; wanted a positive number"),
    Mistake(
        "focus distance within the lens",
        lambda _: camera(focus_distance_m=0.03),
        r"within the focal length of 50 mm, where no lens forms an image: .*metres",
    ),
    Mistake(
        "focus outside the picture",
        lambda _: bokehdiff.focus_disparity_at(torch.rand(1, 1, 6, 8), 8, 2),
        r"\(8, 2\) lies outside the picture of 8 x 6 pixels; wanted x \(column\) from 0 to 7",
    ),
    Mistake(
        "focus on a hole",
        lambda _: bokehdiff.focus_disparity_at(torch.full((1, 1, 6, 8), torch.nan), 3, 2),
        r"focus point \(3, 2\) is unknown; choose a point with a known disparity",
    ),
    Mistake(
        "padding to a multiple of 0",
        lambda _: images.pad_to_multiple(torch.rand(1, 3, 4, 4), 0),
        r"multiple is 0; wanted a whole number of at least 1",
    ),
    Mistake(
        "crop larger than the picture",
        lambda _: images.crop_to(torch.rand(1, 3, 4, 4), (5, 4)),
        r"wanted at least 5 x 4 to crop",
    ),
]

WRITING_MISTAKES = [
    Mistake(
        "overwriting",
        lambda folder: images.write_image(saved(folder, "out.png", PHOTO), PHOTO),
        r"out\.png exists already; wanted a new file.*overwrite=True",
        FileExistsError,
    ),
    Mistake(
        "format without a writer",
        lambda folder: images.write_image(folder / "out.gif", PHOTO),
        r"out\.gif ends in \.gif; wanted one of \.png",
    ),
    Mistake(
        "folder that is not there",
        lambda folder: images.write_image(folder / "results" / "out.png", PHOTO),
        r"There is no folder .*results; create it first",
        FileNotFoundError,
    ),
    Mistake(
        "a batch into one file",
        lambda folder: images.write_image(folder / "out.png", [PHOTO, PHOTO]),
        r"2 images for one file; wanted one for each",
    ),
]


def photograph(**changes: Any) -> photographs.Photograph:
    return photographs.Photograph(**{"image": torch.full((1, 3, 6, 8), 0.5), **changes})


def write(folder: Path, name: str, image: object = None, **options: Any) -> Path:
    like = options.pop("like", photograph())
    image = like.image if image is None else image
    return photographs.write_photograph(folder / name, image, like, **options)


PHOTOGRAPH_MISTAKES = [
    Mistake(
        "photograph that is not there",
        lambda folder: photographs.read_photograph(folder / "photo.tif"),
        r"There is no file .*photo\.tif; wanted the photograph",
        FileNotFoundError,
    ),
    Mistake(
        "camera raw as a photograph",
        lambda folder: photographs.read_photograph(file_of(folder, "photo.CR3", b"II*")),
        r"camera raw file; wanted a developed photograph: export it as 16-bit TIFF",
    ),
    *(
        Mistake(
            f"truncated photograph, {suffix}",
            lambda folder, suffix=suffix: photographs.read_photograph(truncated(folder, suffix)),
            r"is damaged or truncated|is damaged, truncated or",
        )
        for suffix in (".jpg", ".png", ".tif", ".webp")
    ),
    Mistake(
        "whole numbers as linear light in a photograph",
        lambda folder: photographs.read_photograph(saved(folder, "a.png", PHOTO), linear=True),
        r"a\.png holds uint8 values, which are display-encoded; wanted linear light as floats",
    ),
    Mistake(
        "64-bit whole numbers as a photograph",
        lambda folder: photographs.read_photograph(saved(folder, "a.npy", PHOTO.astype(np.int64))),
        r"a\.npy holds int64 values; wanted uint8, uint16 or floats",
    ),
    Mistake(
        "seven channels as a photograph",
        lambda folder: photographs.read_photograph(saved(folder, "a.npy", np.ones((4, 4, 7)))),
        r"a\.npy has shape \(4, 4, 7\); wanted \(H, W, C\), of 1 to 4 channels",
    ),
    Mistake(
        "floats in 0..255 as a photograph",
        lambda folder: photographs.read_photograph(
            saved(folder, "a.npy", PHOTO.astype(np.float32))
        ),
        r"a\.npy has values from 0 to 249; wanted display-encoded values in \[0, 1\]",
    ),
    Mistake(
        "photograph into an unknown format",
        lambda folder: write(folder, "out.psd"),
        r"out\.psd ends in \.psd; wanted one of \.png, \.jpg",
    ),
    Mistake(
        "photograph into no folder",
        lambda folder: write(folder / "none", "out.png"),
        r"no folder .*none; create it first",
        FileNotFoundError,
    ),
    Mistake(
        "16 bits in a JPEG",
        lambda folder: write(folder, "out.jpg", bits=16),
        r"out\.jpg holds 8 bits per channel, not 16; wanted one of \.png, \.tif, \.tiff",
    ),
    Mistake(
        "12 bits",
        lambda folder: write(folder, "out.png", bits=12),
        r"bits is 12; wanted 8, 16 or 32 \(floats\)",
    ),
    Mistake(
        "rendering of another size than the opacity",
        lambda folder: write(
            folder, "out.png", torch.rand(1, 3, 5, 8), like=photograph(alpha=torch.ones(1, 1, 6, 8))
        ),
        r"image is 8 x 5 pixels .*opacity of the photograph 8 x 6; wanted the same size",
    ),
    Mistake(
        "two renderings for one file",
        lambda folder: write(folder, "out.png", torch.rand(2, 3, 6, 8)),
        r"2 images for one file; wanted one for each",
    ),
    Mistake(
        "rendering in 0..255",
        lambda folder: write(folder, "out.png", torch.full((1, 3, 6, 8), 200.0)),
        r"wanted display-encoded values in \[0, 1\]",
    ),
    Mistake(
        "negative light as a rendering",
        lambda folder: write(folder, "out.tif", -torch.ones(1, 3, 6, 8), linear=True),
        r"NaN, infinite or negative values; wanted linear light, finite and from 0 up",
    ),
    Mistake(
        "light as an array",
        lambda folder: write(folder, "out.tif", PHOTO / 255, linear=True),
        r"image is ndarray; wanted linear light as a tensor of floats, \(1, 3, H, W\)",
    ),
    Mistake(
        "colour profile that is none",
        lambda folder: write(folder, "out.png", like=photograph(icc_profile=b"none")),
        r"icc_profile of the photograph cannot be used \(it has no ICC header\)",
    ),
    Mistake(
        "picture too wide for WebP",
        lambda folder: write(
            folder, "out.webp", like=photograph(image=torch.zeros(1, 3, 2, 20000))
        ),
        r"out\.webp could not be encoded, 20000 x 2 pixels as WEBP .*; write another format",
    ),
]


def flow(**lens: object) -> object:
    from bokehdiff.pipelines.bokehflow import BokehFlowPipeline
    from tests.tiny_flow import untrained_flow

    return BokehFlowPipeline(untrained_flow())(PHOTO, DISPARITY, **lens)


def flow_film() -> Any:
    from bokehdiff.pipelines.bokehflow_video import BokehFlowVideoPipeline
    from tests.tiny_flow import untrained_flow

    return BokehFlowVideoPipeline(untrained_flow())


def flow_frames(*frames: torch.Tensor) -> object:
    return list(flow_film().stream(frames, df=0.5, K=1.0))


LIGHT, DEFOCUS = torch.full((1, 3, 8, 8), 0.5), torch.full((1, 1, 8, 8), 0.5)

FLOW_MISTAKES = [
    Mistake(
        "shape of the opening for a network that blurs with Gaussians",
        lambda _: flow(df=0.5, aperture=bokehdiff.Aperture(blades=7)),
        r"aperture was given, but this network blurs with Gaussians .*; leave it out, take",
    ),
    Mistake(
        "film by its name",
        lambda _: flow_film().stream("film.mp4", df=0.5),
        r"stream got a str; wanted the frames of a film.*`bokehdiff video` reads films",
    ),
    Mistake(
        "frame of another size",
        lambda _: flow_frames(torch.zeros(3, 16, 24), torch.zeros(3, 16, 20)),
        r"Frame 1 is 20 x 16 pixels .*, the frames before it 24 x 16; .*Call reset\(\)",
    ),
    Mistake(
        "fewer lens settings than frames",
        lambda _: list(flow_film().stream(torch.zeros(2, 3, 16, 24), df=[0.5], K=1.0)),
        r"df has 1 values, and there is another frame; wanted one for each frame, or one for all",
    ),
    Mistake(
        "state of another clip",
        lambda _: flow_film().start().load_state_dict({}),
        r"The state of a clip has frame_number, cuts, size .*Give what state_dict\(\) returned",
    ),
    Mistake(
        "BokehFlow folder that is not there",
        lambda folder: bokehdiff.BokehFlowPipeline.from_pretrained(folder / "none"),
        r"There is no folder .*Give a folder written by save_pretrained.*FLOW_NANO",
    ),
    Mistake(
        "bins without width",
        lambda _: rendering.binned_blur(LIGHT, DEFOCUS, bin_px=0),
        r"bin_px is 0; wanted the pixels of radius .* for instance 2",
    ),
    Mistake(
        "two layers",
        lambda _: rendering.painted_layers_blur(LIGHT, DEFOCUS, layers=2),
        r"layers is 2; wanted at least 3",
    ),
    Mistake(
        "cat-eye in layers",
        lambda _: rendering.painted_layers_blur(
            LIGHT, DEFOCUS, aperture=bokehdiff.Aperture(cat_eye=0.5)
        ),
        r"differs between places .* leave cat_eye out",
    ),
]


def compact(**lens: object) -> object:
    from bokehdiff.pipelines.litebokeh import LiteBokehPipeline
    from tests.tiny_litebokeh import tiny_unet

    return LiteBokehPipeline(tiny_unet())(PHOTO, **lens)


def compact_file(file: Path, size: tuple[int, int] | None, precision: str = "float32") -> object:
    from bokehdiff.compact_export import compact_file_to_write

    return compact_file_to_write(file, size, precision, overwrite=False)


def subject_of(disparity: torch.Tensor) -> object:
    from bokehdiff.subject_weights import subject_share

    return subject_share(LIGHT, LIGHT, disparity)


def score(*runtimes_ms: float) -> object:
    from bokehdiff.compact_score import compact_score

    return compact_score(6.5, runtimes_ms)


COMPACT_MISTAKES = [
    Mistake(
        "aperture for the network for phones",
        lambda _: compact(f_number=1.8),
        r"f_number was given.* cannot be chosen. Leave it out, or take BokehFlowPipeline",
    ),
    Mistake(
        "tiles between cells",
        lambda _: compact(tile_size=100),
        r"tile_size is 100; wanted a multiple of 8 pixels, for instance 2048",
    ),
    Mistake(
        "LiteBokeh folder that is not there",
        lambda folder: bokehdiff.LiteBokehPipeline.from_pretrained(folder / "none"),
        r"There is no folder .*Give a folder written by save_pretrained.*COMPACT_TINY",
    ),
    Mistake(
        "ONNX file of one size",
        lambda folder: compact_file(folder / "a.onnx", (64, 64)),
        r"ONNX file takes photos of any size; leave it out",
    ),
    Mistake(
        "TFLite file of any size",
        lambda folder: compact_file(folder / "a.tflite", None),
        r"wanted its width and height, for instance 1536x1024",
    ),
    Mistake(
        "TFLite file of a size between cells",
        lambda folder: compact_file(folder / "a.tflite", (1500, 1000)),
        r"1500x1000; wanted multiples of 8",
    ),
    Mistake(
        "ONNX file of 8 bits",
        lambda folder: compact_file(folder / "a.onnx", None, "int8"),
        r"int8 was asked for, which is for TFLite files; wanted a .tflite file, or float16",
    ),
    Mistake(
        "subject by disparity in pixels",
        lambda _: subject_of(torch.full_like(LIGHT[:, :1], 5.0)),
        r"The disparity is from 5 to 5; wanted \[0, 1\]",
    ),
    Mistake(
        "score without a phone",
        lambda _: score(),
        r"wanted the milliseconds of at least one device",
    ),
]

ALL_MISTAKES = (
    IMAGE_MISTAKES
    + DISPARITY_MISTAKES
    + LIGHT_MISTAKES
    + OPTICS_MISTAKES
    + WRITING_MISTAKES
    + PHOTOGRAPH_MISTAKES
    + FLOW_MISTAKES
    + COMPACT_MISTAKES
)


@pytest.mark.parametrize("mistake", ALL_MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_gets_its_sentence(mistake: Mistake, tmp_path: Path):
    with pytest.raises(mistake.error, match=re.compile(mistake.sentence, re.DOTALL)):
        mistake.make(tmp_path)


def render(folder: Path, *changes: object, photo: str = "photo.png", model: bool = False) -> str:
    """Runs `bokehdiff render` on a good scene with changed arguments; gives its stderr."""
    saved(folder, "photo.png", PHOTO)
    saved(folder, "photo.npy", DISPARITY)
    (folder / "night.exr").write_bytes(b"not read")
    arguments = ["render", folder / photo]
    given = [str(change) for change in changes]
    if "--disparity" not in given:
        arguments += ["--disparity", folder / "photo.npy"]
    if "--df" not in given and "--focus" not in given:
        arguments += ["--df", 0.5]
    if "-o" not in given:
        arguments += ["-o", folder / "out.png"]
    if not model:
        arguments += ["--method", "scatter"]
    result = CliRunner().invoke(app, [*map(str, arguments), *given])
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), "a traceback reached the person"
    assert not (folder / "out.png").exists()
    return result.stderr


COMMAND_LINE_MISTAKES = [
    (
        "photo that is not there",
        dict(photo="none.png"),
        (),
        r"none\.png does not exist; wanted a ph",
    ),
    ("disparity that is not there", {}, ("--disparity", "x.npy"), r"no disparity map x\.npy"),
    ("df out of range", {}, ("--df", "20"), r"df is 20; wanted .*\[0, 1\]"),
    ("negative strength", {}, ("--K", "-1"), r"K is -1; wanted zero or more"),
    (
        "df and focus",
        {},
        ("--df", "0.5", "--focus", "1,1"),
        r"is said by one of --df, --focus .*--df and --focus were given",
    ),
    ("focus in words", {}, ("--focus", "middle"), r"'middle'; wanted column and row .*512,300"),
    ("focus outside", {}, ("--focus", "99,1"), r"photo\.png: .*outside the picture of 8 x 6"),
    (
        "output of unknown kind",
        {},
        ("-o", "out.gif"),
        r"-o out\.gif ends in \.gif; wanted a folder",
    ),
    ("output folder missing", {}, ("-o", "no/out.png"), r"there is no folder no; create it first"),
    (
        "output is the photo",
        {},
        ("-o", "{folder}/photo.png", "--force"),
        r"is the photograph itself",
    ),
    ("unknown device", {}, ("--device", "gpu"), r"--device gpu cannot be used .*--device cpu"),
    ("model with scatter", {}, ("--model", "x"), r"--model goes with --method model"),
    (
        "weights of no model",
        dict(model=True),
        ("--method", "model", "--weights", "x"),
        r"--weights goes with --model",
    ),
    (
        "aperture with the model",
        dict(model=True),
        ("--method", "model", "--cat-eye", "0.4"),
        r"--cat-eye does not go with --method model, .*circular opening; wanted --method layered, ",
    ),
    (
        "aperture picture with the model",
        dict(model=True),
        ("--method", "model", "--aperture-picture", "star.png"),
        r"--aperture-picture does not go with --method model",
    ),
    (
        "highlights with the model",
        dict(model=True),
        ("--method", "model", "--highlights", "boost"),
        r"--highlights boost does not go with --method model, .*cut off at white; wanted --method",
    ),
    ("two blades", {}, ("--blades", "2"), r"blades is 2; an opening needs at least 3 blades"),
    ("cat-eye beyond 1", {}, ("--cat-eye", "1.5"), r"cat_eye is 1\.5; wanted 0 \(none\) to 1"),
    ("no aperture picture", {}, ("--aperture-picture", "star.png"), r"star\.png' cannot be read"),
    (
        "gain without a boost",
        {},
        ("--highlight-gain", "10"),
        r"--highlight-gain goes with --highlights boost",
    ),
    (
        "gain below 1",
        {},
        ("--highlights", "boost", "--highlight-gain", "0.5"),
        r"gain is 0\.5; wanted how many times as bright .* 1 or more",
    ),
    (
        "boost of an HDR photograph",
        dict(photo="night.exr"),
        ("--highlights", "boost", "--disparity", "{folder}/photo.npy"),
        r"night\.exr holds its highlights, so there is nothing to boost; leave --highlights out",
    ),
    (
        "ordinary photograph as HDR",
        {},
        ("--highlights", "hdr"),
        r"photo\.png holds uint8 values, which are display-encoded; .*without .*--highlights hdr",
    ),
    (
        "folder that is no model",
        dict(model=True),
        ("--model", "{folder}"),
        r"is no model: it has no model_index\.json; wanted a folder written by save_pretrained",
    ),
    (
        "two photographs, one map",
        {},
        ("{folder}/photo.png", "-o", "{folder}/results"),
        r"2 photographs but one disparity map, photo\.npy; wanted a folder",
    ),
    (
        "two photographs, one output file",
        {},
        ("{folder}/photo.png", "--disparity", "{folder}", "-o", "{folder}/out.png"),
        r"one file for 2 photographs; wanted a folder, for instance -o .*out\.",
    ),
    (
        "two photographs of one name",
        {},
        ("{folder}/photo.png", "--disparity", "{folder}", "-o", "{folder}/results"),
        r"would both be written to .*wanted different names",
    ),
    (
        "folder without the map",
        {},
        ("--disparity", "tests"),
        r"tests has no disparity map for photo\.png; wanted photo, photo_disp, photo_disparity",
    ),
    (
        "pattern without the map",
        {},
        ("--disparity", "maps/{stem}.png"),
        r"photo\.png has no disparity map: there is no file maps/photo\.png",
    ),
]


@pytest.mark.parametrize(
    ("options", "changes", "sentence"),
    [case[1:] for case in COMMAND_LINE_MISTAKES],
    ids=[case[0] for case in COMMAND_LINE_MISTAKES],
)
def test_command_line_mistake_gets_its_sentence(tmp_path, monkeypatch, options, changes, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    changes = [change.replace("{folder}", str(tmp_path)) for change in changes]
    said = render(tmp_path, *changes, **options)
    last = [line for line in said.splitlines() if line.startswith("bokehdiff: ")]
    assert len(last) == 1, said
    assert re.search(sentence, last[0]), said


def test_neither_df_nor_focus(tmp_path):
    saved(tmp_path, "photo.png", PHOTO)
    result = CliRunner().invoke(
        app, ["render", str(tmp_path / "photo.png"), "--disparity", "x", "-o", "y.png"]
    )
    assert result.exit_code == 1
    assert "none of them was given" in result.stderr


def test_several_maps_of_one_name(tmp_path):
    saved(tmp_path, "photo_disp.png", (DISPARITY * 255).astype(np.uint8))
    said = render(tmp_path, "--disparity", tmp_path)
    assert re.search(r"several disparity maps .*: photo\.npy, photo_disp\.png; wanted one", said)
    assert "--disparity '" in said and "{stem}.npy'" in said


def print_table() -> None:
    """Prints every mistake and its sentence as a Markdown table."""
    print("| mistake | sentence |\n|---|---|")
    for mistake in ALL_MISTAKES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                mistake.make(Path(folder))
            except mistake.error as error:
                print(f"| {mistake.name} | {str(error).replace(folder + '/', '')} |")


if __name__ == "__main__":
    print_table()

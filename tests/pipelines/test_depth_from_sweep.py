"""Depth by measuring blur, on stacks that were rendered and ray-traced."""

from __future__ import annotations

import functools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bokehdiff import render_bokeh
from bokehdiff.images import read_image
from bokehdiff.pipelines.depth_from_sweep import depth_from_sweep

HEIGHT, WIDTH = 96, 128
FOCUS_M = 1.0
K = [8.0, 16.0]


def texture(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    """(1, 3, H, W) with contrast at every scale from a pixel to a dozen, of 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    octaves = [
        F.interpolate(
            torch.rand(1, 3, height // size, width // size, generator=generator) - 0.5,
            (height, width),
            mode="bilinear",
        )
        for size in (1, 2, 4, 8)
    ]
    return ((0.5 + 0.4 * sum(octaves)).clamp(0.05, 0.95) * 255).round() / 255


@functools.cache
def slanted_plane() -> dict[str, torch.Tensor]:
    """Depth from 1.25 m at the left to 5 m at the right, so disparity 0.8 to 0.2 1/m, seen with the
    lens focused at 1 m: up to 13 pixels of blur radius. Our renderer draws the frames, in 8 bits.
    """
    photo = texture()
    disparity = torch.linspace(0.8, 0.2, WIDTH).expand(1, 1, HEIGHT, WIDTH)
    frames = [render_bokeh(photo, disparity, 1 / FOCUS_M, k, metric=True) for k in K]
    return dict(photo=photo, disparity=disparity, stack=_eight_bits(torch.cat(frames)))


def _eight_bits(pictures: torch.Tensor) -> torch.Tensor:
    return (pictures * 255).round() / 255


def relative_error(depth: Any, disparity: torch.Tensor) -> torch.Tensor:
    return (depth * disparity - 1).abs()


def test_a_slanted_plane():
    """What limits it: the radius is measured to some tenths of 5 to 13 pixels, and on a slope discs
    of different sizes overlap. 5 % of depth is 0.4 px at K = 16 in the middle of the plane."""
    plane = slanted_plane()
    out = depth_from_sweep(plane["photo"], plane["stack"], K, FOCUS_M)
    assert out.depth.shape == (1, 1, HEIGHT, WIDTH) and out.depth.dtype == torch.float32
    assert float(relative_error(out.depth, plane["disparity"]).median()) < 0.05
    torch.testing.assert_close(out.depth * out.disparity, torch.ones(1, 1, HEIGHT, WIDTH))
    assert 0 <= float(out.confidence.min()) and float(out.confidence.max()) <= 1
    assert out.network_K is None and out.changes is None
    # The test could tell: strengths half as large put it all at other distances.
    wrong = depth_from_sweep(plane["photo"], plane["stack"], [k / 2 for k in K], FOCUS_M)
    assert float(relative_error(wrong.depth, plane["disparity"]).median()) > 0.2


def test_a_place_without_texture_is_filled_from_around():
    """A quarter of the plane is blank: there confidence is low, and depth that of the plane."""
    plane = slanted_plane()
    blank = (slice(None), slice(None), slice(16, 80), slice(40, 88))
    photo = plane["photo"].clone()
    photo[blank] = 128 / 255
    frames = [render_bokeh(photo, plane["disparity"], 1.0, k, metric=True) for k in K]
    out = depth_from_sweep(photo, _eight_bits(torch.cat(frames)), K, FOCUS_M)
    middle = (slice(None), slice(None), slice(36, 60), slice(58, 70))
    assert float(out.confidence[middle].max()) < 0.5 < float(out.confidence.median())
    error = relative_error(out.depth, plane["disparity"])
    # Twice that of places that are measured.
    assert float(error[middle].median()) < 0.10


def test_nearer_than_the_plane_in_focus():
    photo = texture()
    disparity = torch.linspace(0.5, 0.95, WIDTH).expand(1, 1, HEIGHT, WIDTH)
    frames = torch.cat([render_bokeh(photo, disparity, 0.25, k, metric=True) for k in K])
    out = depth_from_sweep(photo, frames, K, 4.0, side="nearer")
    assert float(relative_error(out.depth, disparity).median()) < 0.05
    # Farther, which it is not, there is nothing that is blurred so much.
    with pytest.raises(ValueError, match="Nothing could be measured"):
        depth_from_sweep(photo, frames, K, 4.0)


def test_a_focal_stack_knows_the_side():
    photo = texture()
    disparity = torch.linspace(0.2, 1.0, WIDTH).expand(1, 1, HEIGHT, WIDTH)
    focus, strengths = [5.0, 1.0, math.inf], [12.0, 12.0, 8.0]
    frames = [
        render_bokeh(photo, disparity, 1 / metres, k, metric=True)
        for metres, k in zip(focus, strengths, strict=True)
    ]
    out = depth_from_sweep(photo, [frame[0] for frame in frames], strengths, focus)
    assert float(relative_error(out.depth, disparity).median()) < 0.05


def test_large_photos_are_measured_smaller():
    """Four times as many pixels: measured on a quarter of them, K of which is half."""
    photo = F.interpolate(texture(), scale_factor=2, mode="bilinear")
    disparity = torch.linspace(0.8, 0.2, 2 * WIDTH).expand(1, 1, 2 * HEIGHT, 2 * WIDTH)
    strengths = [2 * k for k in K]
    frames = [render_bokeh(photo, disparity, 1.0, k, metric=True) for k in strengths]
    out = depth_from_sweep(photo, torch.cat(frames), strengths, 1.0, max_area=HEIGHT * WIDTH)
    assert out.depth.shape == out.confidence.shape == (1, 1, 2 * HEIGHT, 2 * WIDTH)
    assert float(relative_error(out.depth, disparity).median()) < 0.05


def test_alone_or_in_a_batch():
    plane = slanted_plane()
    photos = torch.cat([plane["photo"], plane["photo"].flip(3)])
    stacks = torch.stack([plane["stack"], plane["stack"].flip(3)])
    strengths = [K, [1.1 * k for k in K]]
    both = depth_from_sweep(photos, stacks, strengths, FOCUS_M)
    for number in range(2):
        alone = depth_from_sweep(photos[number], stacks[number], strengths[number], FOCUS_M)
        assert torch.equal(alone.depth, both.depth[number : number + 1])


def test_output_types():
    plane = slanted_plane()
    some = (slice(None), slice(None), slice(48), slice(64))
    arguments = (plane["photo"][some], plane["stack"][some], K, FOCUS_M)
    out = depth_from_sweep(*arguments, output_type="np")
    assert out.depth.shape == out.confidence.shape == (1, 48, 64)
    assert isinstance(out.depth, np.ndarray)
    pictures = depth_from_sweep(*arguments, output_type="pil")
    assert pictures.confidence[0].size == (64, 48)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(K=[8.0]), "1 strengths K for 2 frames"),
        (dict(K=[0.0, 0.0]), "K is 0 in every frame"),
        (dict(focus_distance_m=-1.0), "above 0"),
        (dict(focus_distance_m=[1.0, 2.0, 3.0]), "3 numbers for 2 frames"),
        (dict(focus_distance_m="near"), "focus_distance_m is 'near'"),
        (dict(side="both"), "does not tell nearer from farther"),
        (dict(side="left"), "side is 'left'"),
        (dict(max_area=0), "max_area is 0"),
        (dict(output_type="mm"), "output_type is 'mm'"),
        (dict(stack=torch.zeros(2, 3, 10, 10)), "Frame 1 is 10 x 10 pixels"),
    ],
)
def test_mistakes(changes, sentence):
    plane = slanted_plane()
    arguments = dict(image=plane["photo"], stack=plane["stack"], K=K, focus_distance_m=FOCUS_M)
    with pytest.raises(ValueError, match=sentence):
        depth_from_sweep(**{**arguments, **changes})


def test_a_photo_without_texture_is_refused():
    blank = torch.full((3, 3, 40, 60), 0.5)
    with pytest.raises(ValueError, match="Nothing could be measured"):
        depth_from_sweep(blank[:1], blank[1:], K, FOCUS_M)


@pytest.mark.slow
def test_a_scene_ray_traced_through_a_thin_lens(shared_root):
    """Frames of 8 bits, each in focus elsewhere, by another renderer than ours. Where
    there is texture (it is measured with some confidence) half of the pixels are right to 5 %; the
    rest lies around edges in depth."""
    scenes = sorted((shared_root / "bench" / "raytraced" / "data").glob("*/meta.json"))
    if not scenes:
        pytest.skip("no ray-traced scenes")
    folder = min(scenes, key=lambda file: len(json.loads(file.read_text())["configs"])).parent
    depth, confidence, disparity = raytraced(folder)
    error = np.abs(depth * disparity - 1)
    assert np.median(error[confidence > 0.5]) < 0.05
    assert np.median(error) < 0.05


def raytraced(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Depth and confidence found, and true disparity, each (H, W)."""
    settings = json.loads((folder / "meta.json").read_text())["configs"]
    out = depth_from_sweep(
        folder / "aif.png",
        [read_image(folder / f"gt_{one['id']}.png") for one in settings],
        [one["K"] for one in settings],
        [one["zf"] for one in settings],
        output_type="np",
    )
    return out.depth[0], out.confidence[0], np.load(folder / "disp.npz")["disp"]


@pytest.mark.slow
def test_the_example_finds_the_motorcycle_again(tmp_path: Path) -> None:
    example = Path(__file__).resolve().parents[2] / "examples" / "stack_and_depth.py"
    command = [sys.executable, str(example), "--out", str(tmp_path / "pictures")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    trusted, error, _ = (float(text) for text in re.findall(r"([\d.]+)%", ended.stdout))
    assert trusted > 75 and error < 2
    names = {file.name for file in (tmp_path / "pictures").iterdir()}
    assert names == {"sharp.png", "K_20.png", "K_40.png", "measured.png", "found.png"}

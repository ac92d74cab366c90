"""Samples of bokeh stacks: functions of their number, in groups, on one metric axis of K."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from bokehdiff.focus import find_focus
from bokehdiff.images import InputRepairedWarning, read_image, write_image
from bokehdiff.optics import strength_from_camera
from bokehdiff.rendering import render_bokeh
from data_synthesis.stack_files import write_stacks
from data_synthesis.stack_scenes import StackScenes
from training.bokeh_stack_data import (
    INSTRUCTIONS,
    SCENES,
    BokehStackSamples,
    instruction,
)
from training.bokeh_stack_sources import (
    LARGEST_RADIUS_SHARE,
    SCENE_CAPTION,
    PhotographPairs,
    RenderedPhotographs,
    SceneStacks,
    StoredSceneStacks,
    metric_disparity,
    read_manifest,
    resized,
)

SIZE = 32
STRENGTHS = (1.0, 4.0)


class NumberedStacks:
    """Scene i is i everywhere; frame f of it has K = 1 + f."""

    count = None

    def __init__(self, one_scene: bool = True) -> None:
        self.one_scene = one_scene

    def sample(
        self, index: int, generator: torch.Generator, position: int, frames: int
    ) -> dict[str, Tensor]:
        picture = torch.full((3, 2, 2), float(index))
        return {"image": picture, "target": picture, "K": torch.tensor(1.0 + position)}

    def caption(self, index: int) -> str:
        return f"scene {index}"


def samples(source: Any = None, batch_size: int = 4, **settings: Any) -> BokehStackSamples:
    source = NumberedStacks() if source is None else source
    return BokehStackSamples(
        {SCENES: source}, {SCENES: 1}, batch_size=batch_size, seed=0, **settings
    )


def group(data: BokehStackSamples, number: int) -> dict[str, Tensor]:
    """A batch, as the loader stacks it."""
    size = data.batch_size
    members = [data[number * size + position] for position in range(size)]
    return {name: torch.stack([one[name] for one in members]) for name in members[0]}


def scene_stacks(frames: int = 2) -> SceneStacks:
    return SceneStacks(3, SIZE, STRENGTHS, frames, {})


# -- Groups --------------------------------------------------------------------------------------


def test_samples_depend_on_their_number_only() -> None:
    numbers = range(4)
    forwards = samples(scene_stacks(), batch_size=2)
    backwards = samples(scene_stacks(), batch_size=2)
    first = [forwards[number] for number in numbers]
    again = [backwards[number] for number in reversed(numbers)][::-1]
    for one, other in zip(first, again, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name


def test_groups_with_a_reference_are_of_scenes_of_their_own() -> None:
    data = samples(scene_stacks(), batch_size=2, reference_share=1)
    for number in range(3):
        batch = group(data, number)
        assert batch["with_reference"].all() and batch["tells_K"].all()
        assert not torch.equal(batch["image"][0], batch["image"][1])
        assert batch["pivot"].tolist() == [0, 1]
        assert not torch.equal(batch["image"], batch["target"])


def test_groups_without_a_reference_are_of_one_scene_at_several_K() -> None:
    data = samples(scene_stacks(frames=3), batch_size=3, reference_share=0)
    for number in range(3):
        batch = group(data, number)
        assert not batch["with_reference"].any()
        assert torch.equal(batch["image"][0], batch["image"][2])
        assert len(set(batch["K"].tolist())) == 3
        assert ((batch["K"] >= 1) & (batch["K"] <= 4)).all()


def test_pairs_are_never_grouped_as_one_scene() -> None:
    data = samples(NumberedStacks(one_scene=False), reference_share=0, pivot_share=1)
    batch = group(data, 5)
    assert len(set(batch["index"].tolist())) == 4
    assert batch["pivot"].tolist() == [0, 1, 2, 3]
    assert len({*data.prompts(batch)}) > 1


def test_shares_of_steps_pivots_and_dropped_K() -> None:
    data = samples()
    batches = [group(data, number) for number in range(400)]
    without = [batch for batch in batches if not batch["with_reference"][0]]
    for batch in batches:
        assert batch["with_reference"].unique().numel() == 1
    # Four standard deviations of 400 draws of one half.
    assert abs(len(without) / 400 - 0.5) < 4 * (0.25 / 400) ** 0.5
    drawn = 4 * len(without)
    untold = sum(int((~batch["tells_K"]).sum()) for batch in without)
    assert abs(untold / drawn - 0.1) < 4 * (0.09 / drawn) ** 0.5
    # One in four that share has itself for a pivot.
    shared = sum(int((batch["pivot"] != torch.arange(4)).sum()) for batch in without)
    assert abs(shared / drawn - 0.15) < 4 * (0.1275 / drawn) ** 0.5


def test_all_who_share_a_layout_share_that_of_one_pivot() -> None:
    data = samples(reference_share=0, pivot_share=0.7)
    pivots = set()
    for number in range(60):
        pivot = group(data, number)["pivot"]
        others = set(pivot[pivot != torch.arange(4)].tolist())
        assert len(others) <= 1
        pivots |= others
        for one in others:
            assert pivot[one] == one
    assert pivots == {0, 1, 2, 3}


def test_prompts_say_the_caption_or_K() -> None:
    data = samples(reference_share=1)
    said = [prompt for number in range(100) for prompt in data.prompts(group(data, number))]
    captions = [prompt for prompt in said if prompt.startswith("scene ")]
    assert abs(len(captions) / 400 - 0.35) < 4 * (0.35 * 0.65 / 400) ** 0.5
    assert set(said) - set(captions) == {instruction(1.0, which) for which in range(4)}
    assert all("{K}" in text for text in INSTRUCTIONS) and "1.00" in instruction(1.0)
    without = samples(reference_share=0)
    groups = [without.prompts(group(without, number)) for number in range(200)]
    assert all(len(set(prompts)) == 1 for prompts in groups)
    empty = sum(prompts[0] == "" for prompts in groups)
    assert abs(empty / 200 - 0.1) < 4 * (0.09 / 200) ** 0.5
    assert all(prompts[0][:6] in ("", "scene ") for prompts in groups)


def test_sources_are_chosen_by_weight() -> None:
    data = BokehStackSamples(
        {"pairs": NumberedStacks(), SCENES: NumberedStacks()},
        {SCENES: 3, "pairs": 1},
        batch_size=1,
        seed=0,
        pivot_share=0,
    )
    chosen = [int(data[number]["source"]) for number in range(400)]
    assert abs(sum(chosen) / 400 - 0.75) < 4 * (0.1875 / 400) ** 0.5


# -- Scenes --------------------------------------------------------------------------------------


def test_scenes_give_the_frames_that_were_traced() -> None:
    source = scene_stacks()
    scene = source.scenes[2][7]
    found = [source.sample(7, torch.Generator(), position, 2) for position in range(2)]
    for position, sample in enumerate(found):
        assert sample is not None
        assert torch.equal(sample["target"], scene["stack"][position])
        assert torch.equal(sample["K"], scene["K"][position])
    assert source.caption(7) == SCENE_CAPTION


def test_scenes_too_steep_for_the_range_are_drawn_again() -> None:
    """Where a surface is seen edge-on, StackScenes lowers all K; none may leave the range."""
    options = {"disparities": [0.1, 8.0]}
    source = SceneStacks(3, SIZE, (3.0, 4.0), 1, options)
    lowered = [index for index in range(12) if float(source.scenes[1][index]["K"][0]) < 3]
    assert lowered
    assert source.sample(lowered[0], torch.Generator(), 0, 1) is None
    data = samples(source, batch_size=1, pivot_share=0)
    assert all(3 <= float(data[number]["K"]) <= 4 for number in range(6))


def test_a_range_that_no_scene_can_show_ends_with_a_sentence() -> None:
    class Nothing(NumberedStacks):
        def sample(self, *arguments: Any) -> None:  # type: ignore[override]
            return None

    with pytest.raises(ValueError, match="None of 100 pictures .* Widen the range"):
        samples(Nothing())[0]


def test_options_that_scenes_do_not_take_are_refused() -> None:
    with pytest.raises(ValueError, match="data.options do not fit StackScenes"):
        SceneStacks(0, SIZE, STRENGTHS, 2, {"colour": 1})


def test_stored_scenes_are_read_and_all_their_frames_are_shown(tmp_path: Path) -> None:
    scenes = StackScenes(3, SIZE, frames=3, strengths=STRENGTHS)
    write_stacks(scenes, tmp_path, count=2)
    written = scenes[1]
    source = StoredSceneStacks(tmp_path, SIZE, STRENGTHS, 2)
    assert source.count == 2 and source.seed == 3
    shown = set()
    for seed in range(12):
        frames = [
            source.sample(1, torch.Generator().manual_seed(seed), position, 2)
            for position in range(2)
        ]
        for sample in frames:
            assert sample is not None
            (frame,) = (written["K"] == sample["K"]).nonzero().flatten().tolist()
            assert torch.equal(sample["target"], written["stack"][frame])
            assert torch.equal(sample["image"], written["image"])
            shown.add(frame)
        assert frames[0]["K"] != frames[1]["K"]  # type: ignore[index]
    assert shown == {0, 1, 2}
    narrow = StoredSceneStacks(tmp_path, SIZE, (1.0, 1.01), 2)
    assert narrow.sample(1, torch.Generator(), 0, 1) is None
    for size, frames_wanted in ((64, 2), (SIZE, 4)):
        with pytest.raises(ValueError, match="holds scenes of 32 pixels in 3 frames"):
            StoredSceneStacks(tmp_path, size, STRENGTHS, frames_wanted)


# -- Photographs rendered here -------------------------------------------------------------------


def photograph(folder: Path, name: str, height: int, width: int) -> Tensor:
    """Write a PNG of soft blotches; return it as it is read again."""
    generator = torch.Generator().manual_seed(height)
    coarse = torch.rand((1, 3, height // 4, width // 4), generator=generator)
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    write_image(folder / name, image, overwrite=True)
    return read_image(folder / name)


def two_walls(height: int, width: int, near_m: float = 1.0, far_m: float = 4.0) -> np.ndarray:
    """Depth in metres: something near the centre, and what is behind it."""
    depth = np.full((height, width), far_m, np.float32)
    depth[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = near_m
    return depth


def manifest(folder: Path, *entries: Mapping[str, Any]) -> Path:
    path = folder / "manifest.jsonl"
    path.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n")
    return path


def rendered(folder: Path, entry: Mapping[str, Any], size: int = SIZE) -> RenderedPhotographs:
    return RenderedPhotographs(manifest(folder, entry), size, STRENGTHS)


def test_a_rendered_photograph_is_blurred_by_its_K(tmp_path: Path) -> None:
    image = photograph(tmp_path, "photo.png", SIZE, SIZE)
    depth = two_walls(SIZE, SIZE)
    np.save(tmp_path / "depth.npy", depth)
    source = rendered(tmp_path, {"image": "photo.png", "depth": "depth.npy", "caption": "walls"})
    sample = source.sample(0, torch.Generator().manual_seed(0), 0, 1)
    assert sample is not None and source.caption(0) == "walls"
    assert torch.equal(sample["image"], image[0])
    disparity = torch.from_numpy(1 / depth)[None, None]
    df = float(find_focus(disparity, "auto")[0])
    assert df == 1.0  # the nearer wall
    expected = render_bokeh(image, disparity, df, float(sample["K"]), metric=True)
    assert torch.equal(sample["target"], expected[0])
    assert not torch.equal(sample["target"], sample["image"])


def test_K_is_that_of_the_picture_after_resizing(tmp_path: Path) -> None:
    """Twice as many pixels, of which the training picture keeps half: the same blur in its pixels.

    Between the two walls lies no depth, and the map has none after resizing, though the walls end
    within a pixel of it.
    """
    image = photograph(tmp_path, "photo.png", 2 * SIZE, 2 * SIZE)
    np.save(tmp_path / "depth.npy", np.roll(two_walls(2 * SIZE, 2 * SIZE), 1, axis=(0, 1)))
    source = rendered(tmp_path, {"image": "photo.png", "depth": "depth.npy"})
    sample = source.sample(0, torch.Generator().manual_seed(0), 0, 1)
    assert sample is not None
    small = resized(image, SIZE)
    disparity = torch.from_numpy(1 / two_walls(SIZE, SIZE))[None, None]
    expected = render_bokeh(small, disparity, 1.0, float(sample["K"]), metric=True)
    assert torch.equal(sample["image"], small[0])
    assert torch.equal(sample["target"], expected[0])


def test_depth_disparity_and_a_normalised_map_with_distances_mean_the_same(tmp_path: Path) -> None:
    photograph(tmp_path, "photo.png", SIZE, SIZE)
    depth = two_walls(SIZE, SIZE, 1.5, 6.0)
    np.save(tmp_path / "depth.npy", depth)
    np.save(tmp_path / "disparity.npy", 1 / depth)
    write_image(tmp_path / "map.png", torch.from_numpy((depth == 1.5).astype(np.float32))[None])
    entries = (
        {"depth": "depth.npy"},
        {"disparity": "disparity.npy"},
        {"normalised_disparity": "map.png", "nearest_m": 1.5, "farthest_m": 6.0},
    )
    found = []
    for entry in entries:
        source = rendered(tmp_path, {"image": "photo.png", **entry})
        sample = source.sample(0, torch.Generator().manual_seed(0), 0, 1)
        assert sample is not None
        found.append(sample)
    for sample in found[1:]:
        # The maps differ by a rounding of float32.
        torch.testing.assert_close(sample, found[0], rtol=1e-5, atol=1e-5)


def test_frames_of_a_photograph_differ_in_K_alone(tmp_path: Path) -> None:
    photograph(tmp_path, "photo.png", 40, 56)
    np.save(tmp_path / "depth.npy", two_walls(40, 56))
    source = rendered(tmp_path, {"image": "photo.png", "depth": "depth.npy"})
    frames = [source.sample(0, torch.Generator().manual_seed(1), one, 3) for one in range(3)]
    assert all(torch.equal(frame["image"], frames[0]["image"]) for frame in frames)  # type: ignore[index]
    assert len({float(frame["K"]) for frame in frames}) == 3  # type: ignore[index]


def test_strengths_stop_where_nothing_is_left_to_see(tmp_path: Path) -> None:
    """A macro photograph at 5 cm and 10 cm: 10 1/m apart, of which a K of 1 makes 10 pixels."""
    photograph(tmp_path, "photo.png", SIZE, SIZE)
    np.save(tmp_path / "macro.npy", two_walls(SIZE, SIZE, 0.05, 0.1))
    np.save(tmp_path / "near.npy", two_walls(SIZE, SIZE, 0.25, 0.5))
    macro = rendered(tmp_path, {"image": "photo.png", "depth": "macro.npy"})
    assert macro.sample(0, torch.Generator(), 0, 1) is None
    near = rendered(tmp_path, {"image": "photo.png", "depth": "near.npy"})
    for seed in range(10):
        sample = near.sample(0, torch.Generator().manual_seed(seed), 0, 1)
        assert sample is not None
        assert 1 <= float(sample["K"]) <= LARGEST_RADIUS_SHARE * SIZE / 2 + 1e-6


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({}, "no depth; wanted exactly one of depth, disparity, normalised_disparity"),
        ({"depth": "a.npy", "disparity": "a.npy"}, "has depth and disparity; wanted exactly one"),
        ({"normalised_disparity": "a.npy"}, "without nearest_m and farthest_m"),
        (
            {"normalised_disparity": "a.npy", "nearest_m": 4, "farthest_m": 2},
            "nearest_m 4 and farthest_m 2; wanted the nearer first",
        ),
        ({"normalised_disparity": "a.npy", "nearest_m": "4"}, "Line 1 of .*nearest_m is '4'"),
        ({"depth": "b.npy"}, "b.npy as depth, which is no file"),
        ({"depth": "a.npy", "K": 3}, "unknown field 'K'; known are image, depth"),
    ],
)
def test_photographs_without_metric_depth_are_refused(
    tmp_path: Path, entry: dict[str, Any], complaint: str
) -> None:
    photograph(tmp_path, "photo.png", SIZE, SIZE)
    np.save(tmp_path / "a.npy", two_walls(SIZE, SIZE))
    with pytest.raises(ValueError, match=complaint):
        rendered(tmp_path, {"image": "photo.png", **entry})


@pytest.mark.parametrize(
    ("name", "values", "complaint"),
    [
        ("depth", np.full((SIZE, SIZE), 2.0, np.float32), "the same everywhere"),
        ("depth", two_walls(SIZE, SIZE).astype(np.uint16), "whole numbers carry no unit"),
        ("depth", two_walls(SIZE, 2 * SIZE), "wanted the same size"),
        ("disparity", 1000 * two_walls(SIZE, SIZE), "wanted 1/metres"),
        ("depth", np.zeros((SIZE, SIZE), np.float32), "no known pixel"),
    ],
)
def test_maps_that_measure_nothing_are_refused(
    tmp_path: Path, name: str, values: np.ndarray, complaint: str
) -> None:
    np.save(tmp_path / "map.npy", values)
    with pytest.raises(ValueError, match=complaint):
        metric_disparity({name: tmp_path / "map.npy", "where": "Line 1"}, SIZE, SIZE)


def test_small_photographs_are_not_enlarged(tmp_path: Path) -> None:
    photograph(tmp_path, "photo.png", SIZE - 4, SIZE)
    np.save(tmp_path / "depth.npy", two_walls(SIZE - 4, SIZE))
    with pytest.raises(ValueError, match="short side is 28 pixels; wanted at least data.size, 32"):
        rendered(tmp_path, {"image": "photo.png", "depth": "depth.npy"})


# -- Pairs ---------------------------------------------------------------------------------------


def pair(folder: Path, height: int = 128, width: int = 128, K: float = 16.0) -> dict[str, Any]:
    """Write a sharp and a blurred photograph of two walls, in focus on the nearer."""
    image = photograph(folder, "sharp.png", height, width)
    disparity = torch.from_numpy(1 / two_walls(height, width))[None, None]
    target = render_bokeh(image, disparity, 1.0, K, metric=True)
    write_image(folder / "blurred.png", target, overwrite=True)
    return {"image": "sharp.png", "target": "blurred.png", "K": K}


def psnr(one: Tensor, other: Tensor) -> float:
    return -10 * math.log10(float((one - other).square().mean()))


def test_K_of_a_pair_follows_its_size(tmp_path: Path) -> None:
    """At half the size the real target is what half the K renders there."""
    path = manifest(tmp_path, pair(tmp_path))
    strengths = {}
    for size in (64, 32):
        source = PhotographPairs(path, size, (1.0, 30.0))
        sample = source.sample(0, torch.Generator(), 0, 1)
        assert sample is not None
        strengths[size] = float(sample["K"])
        disparity = torch.from_numpy(1 / two_walls(size, size))[None, None]
        same, other = (
            render_bokeh(sample["image"][None], disparity, 1.0, K, metric=True)[0]
            for K in (float(sample["K"]), 2 * float(sample["K"]))
        )
        assert psnr(sample["target"], same) > psnr(sample["target"], other) + 6
    assert strengths == {64: 8.0, 32: 4.0}


def test_the_target_of_a_pair_is_its_file_and_crops_are_aligned(tmp_path: Path) -> None:
    entry = pair(tmp_path, 40, 64)
    source = PhotographPairs(manifest(tmp_path, entry), 40, (1.0, 30.0))
    sharp, blurred = read_image(tmp_path / "sharp.png"), read_image(tmp_path / "blurred.png")
    lefts = set()
    for seed in range(8):
        sample = source.sample(0, torch.Generator().manual_seed(seed), 0, 1)
        assert sample is not None and float(sample["K"]) == 16
        (left,) = (
            start
            for start in range(25)
            if torch.equal(sample["target"], blurred[0, :, :, start : start + 40])
        )
        assert torch.equal(sample["image"], sharp[0, :, :, left : left + 40])
        lefts.add(left)
    assert len(lefts) > 2


def test_K_of_a_pair_can_come_from_its_camera(tmp_path: Path) -> None:
    """A camera: f/2, 50 mm, its sensor 43.27 mm across, 1.8 m, 1920 x 1080."""
    picture = torch.zeros(1, 3, 1080, 1920)
    for name in ("sharp.png", "blurred.png"):
        write_image(tmp_path / name, picture)
    camera = {"f_number": 2.0, "focal_length_mm": 50.0, "focus_distance_m": 1.8}
    entry = {"image": "sharp.png", "target": "blurred.png", **camera}
    path = manifest(tmp_path, {**entry, "focal_length_35mm": 50.0})
    source = PhotographPairs(path, 540, (1.0, 30.0))
    assert source.entries[0]["K"] == pytest.approx(32.7283 / 2, rel=1e-5)
    # Cropped from 3840 pixels of a sensor of 36 mm.
    sensor = {"sensor_width_mm": 36.0, "uncropped_size": [2160, 3840]}
    cropped = PhotographPairs(manifest(tmp_path, {**entry, **sensor}), 270, (1.0, 30.0))
    expected = strength_from_camera(2.0, 50.0, 1.8, 36.0, 3840) / 4
    assert cropped.entries[0]["K"] == pytest.approx(expected, rel=1e-6)


def test_K_of_a_pair_can_come_from_its_exif_data(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    camera = exif.get_ifd(0x8769)
    camera.update({0x829D: 2.0, 0x920A: 50.0, 0xA405: 50, 0x9206: 1.8})
    for name in ("sharp.jpg", "blurred.jpg"):
        PIL.Image.new("RGB", (480, 270)).save(tmp_path / name, exif=exif)
    path = manifest(tmp_path, {"image": "sharp.jpg", "target": "blurred.jpg"})
    source = PhotographPairs(path, 270, (1.0, 30.0))
    assert source.entries[0]["K"] == pytest.approx(32.7283 / 4, rel=1e-5)


def test_pairs_outside_the_range_are_left_out_and_never_clipped(tmp_path: Path) -> None:
    entry = pair(tmp_path)
    path = manifest(tmp_path, entry, {**entry, "K": 200.0}, {**entry, "K": 1.5})
    with pytest.warns(InputRepairedWarning, match="2 of 3 pairs .* Line 2 .* with 50"):
        source = PhotographPairs(path, 32, (1.0, 30.0))
    assert [one["K"] for one in source.entries] == [4.0] and source.count == 1
    alone = manifest(tmp_path, {**entry, "K": 200.0})
    with pytest.raises(ValueError, match="1 of 1 pairs .* Take pairs with another blur"):
        PhotographPairs(alone, 32, (1.0, 30.0))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"K": None}, "K is None; wanted a positive number"),
        ({"K": 0}, "K is 0; wanted a positive number"),
        ({"f_number": 2.0}, "has K and f_number; wanted one of the two ways"),
        ({"target": None}, "which is no file"),
        ({"blur": 3}, "unknown field 'blur'"),
    ],
)
def test_pairs_without_a_strength_are_refused(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        PhotographPairs(manifest(tmp_path, {**pair(tmp_path), **changes}), 32, (1.0, 30.0))


def test_a_pair_that_says_nothing_of_its_blur_is_refused(tmp_path: Path) -> None:
    entry = pair(tmp_path)
    del entry["K"]
    with pytest.raises(ValueError, match="neither K nor focus_distance_m"):
        PhotographPairs(manifest(tmp_path, entry), 32, (1.0, 30.0))
    with pytest.raises(ValueError, match="Line 1 of .*lack the f-number"):
        path = manifest(tmp_path, {**entry, "focus_distance_m": 2.0})
        PhotographPairs(path, 32, (1.0, 30.0))
    with pytest.raises(ValueError, match="focus_distance_m is 0; wanted a positive number"):
        path = manifest(tmp_path, {**entry, "focus_distance_m": 0})
        PhotographPairs(path, 32, (1.0, 30.0))
    camera = {"focus_distance_m": 2.0, "f_number": 2, "focal_length_mm": 50}
    with pytest.raises(ValueError, match=r"uncropped_size is 300; wanted \[height, width\]"):
        path = manifest(tmp_path, {**entry, **camera, "uncropped_size": 300})
        PhotographPairs(path, 32, (1.0, 30.0))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty"),
        ("{image: 3}", "Line 1 of .* is not JSON"),
        ('\n["photo.png"]', "Line 2 of .* is no JSON object with the field 'image'"),
    ],
)
def test_manifests_that_are_none_are_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        read_manifest(path, files=("image",), others=())
    with pytest.raises(ValueError, match="cannot be read"):
        read_manifest(tmp_path / "none.jsonl", files=("image",), others=())


def test_light_and_not_its_encoding_is_averaged() -> None:
    """A fine black and white check becomes the grey of half the light, not of half the number."""
    check = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    small = resized(check.float().expand(1, 3, 64, 64), 16)
    middle = small[..., 4:-4, 4:-4]
    torch.testing.assert_close(middle, torch.full_like(middle, 0.7354), atol=2e-3, rtol=0)


def test_another_seed_draws_other_scenes() -> None:
    one, other = samples(), samples()
    other.seed = 1
    assert [int(one[n]["index"]) for n in range(8)] != [int(other[n]["index"]) for n in range(8)]

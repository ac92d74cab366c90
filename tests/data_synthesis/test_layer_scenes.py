"""Properties of layer scenes, and of every slip of the released code in both modes."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bokehdiff.images import linear_to_srgb, srgb_to_linear
from bokehdiff.rendering.aperture import Aperture
from data_synthesis.cutouts import SourceFileWarning
from data_synthesis.layer_scenes import (
    OFFICIAL,
    Compat,
    LayerScenes,
    add_arguments,
    from_options,
    lens_grid_side,
)

REPOSITORY = Path(__file__).resolve().parents[2]
SIZE = 48
# As the released code does it, on a canvas that tests can afford.
SMALL_OFFICIAL = dataclasses.replace(OFFICIAL, canvas=96)
SHARP = {"radius": (1e-6, 1e-6), "exposure": (0.0, 0.0)}


def save_cutout(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path.parent


def soft_disc(side: int = 48, colour: tuple[int, int, int] = (250, 240, 230)) -> np.ndarray:
    """A disc with a broad soft rim, whose hidden colours (outside) are black."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    alpha = np.clip((side * 0.45 - np.hypot(x, y)) / (side * 0.2), 0, 1)
    pixels = np.zeros((side, side, 4), np.uint8)
    pixels[alpha > 0, :3] = colour
    pixels[..., 3] = np.rint(alpha * 255)
    return pixels


@pytest.fixture
def discs(tmp_path: Path) -> Path:
    return save_cutout(tmp_path / "discs" / "disc.png", soft_disc())


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """One photograph, twice as wide as high, that brightens from left to right."""
    ramp = np.tile(np.linspace(0, 255, 200).astype(np.uint8)[None, :, None], (100, 1, 3))
    folder = tmp_path / "photographs"
    folder.mkdir()
    Image.fromarray(ramp).save(folder / "ramp.png")
    return folder


def flat_photograph(folder: Path, level: int) -> Path:
    folder.mkdir()
    Image.new("RGB", (64, 64), (level,) * 3).save(folder / "flat.png")
    return folder


def digest(arrays: dict[str, Any]) -> str:
    stored = b"".join(arrays[name].tobytes() for name in ("image", "disparity", "target"))
    rest = json.dumps([arrays[name] for name in ("df", "K", "aperture", "provenance")])
    return hashlib.sha256(stored + rest.encode()).hexdigest()


def as_floats(arrays: dict[str, Any], name: str) -> np.ndarray:
    values = arrays[name]
    return (values / np.iinfo(values.dtype).max).transpose(1, 2, 0)


# --- The data set ---------------------------------------------------------------------------------


def test_shapes_types_and_ranges() -> None:
    scenes = LayerScenes(1, SIZE)
    radii = []
    for index in range(12):
        item = scenes[index]
        assert set(item) == {"image", "disparity", "df", "K", "target"}
        assert item["image"].shape == item["target"].shape == (3, SIZE, SIZE)
        assert item["disparity"].shape == (1, SIZE, SIZE)
        assert item["df"].shape == item["K"].shape == ()
        for name, value in item.items():
            assert value.dtype == torch.float32 and torch.isfinite(value).all(), name
            if name != "K":
                assert value.min() >= 0 and value.max() <= 1, name
        radii.append(float((item["K"] * (item["disparity"] - item["df"]).abs()).max()))
    # One part in 65535 of disparity is all that storing costs.
    assert min(radii) > SIZE / 256 * 0.5 and max(radii) < SIZE / 8 * 1.001
    assert max(radii) > 4 * min(radii)


def test_same_sample_in_any_order_and_process(discs: Path, photographs: Path) -> None:
    settings = {"foregrounds": discs, "backgrounds": photographs, "procedural_share": 0.5}
    settings |= {"aperture": "random", "corrupted_share": 0.5}
    scenes = LayerScenes(5, SIZE, **settings)
    expected = [digest(scenes.arrays(index)) for index in (3, 0, 1)]
    assert len(set(expected)) == 3
    again = pickle.loads(pickle.dumps(scenes))
    assert [digest(again.arrays(index)) for index in (1, 0, 3)] == expected[::-1]
    program = (
        "import sys; sys.path.insert(0, 'tests/data_synthesis')\n"
        "from test_layer_scenes import LayerScenes, digest\n"
        f"scenes = LayerScenes(5, {SIZE}, foregrounds=sys.argv[1], backgrounds=sys.argv[2],\n"
        "    procedural_share=0.5, aperture='random', corrupted_share=0.5)\n"
        "print(digest(scenes.arrays(3)))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, str(discs), str(photographs)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.split()[-1] == expected[0]


def test_no_global_random_state_is_used() -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    torch_before = torch.get_rng_state()
    LayerScenes(2, SIZE, aperture="random", corrupted_share=1.0)[0]
    assert (np.random.get_state()[1] == before).all()
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_length_and_indices() -> None:
    endless = LayerScenes(size=SIZE)
    with pytest.raises(TypeError, match="endless"):
        len(endless)
    finite = LayerScenes(size=SIZE, length=2)
    assert len(finite) == len(list(finite)) == 2
    with pytest.raises(IndexError, match="less than 2"):
        finite[2]
    with pytest.raises(IndexError, match="at least 0"):
        endless[-1]


def test_settings_and_provenance_are_json_and_tell_the_sources(
    discs: Path, photographs: Path
) -> None:
    scenes = LayerScenes(0, SIZE, foregrounds=discs, backgrounds=photographs)
    settings = json.loads(json.dumps(scenes.settings))
    assert settings == LayerScenes(0, SIZE, foregrounds=discs, backgrounds=photographs).settings
    assert settings != LayerScenes(0, SIZE, foregrounds=discs).settings
    provenance = json.loads(json.dumps(scenes.arrays(0)["provenance"]))
    assert str(discs.parent) not in json.dumps([settings, provenance])
    first = provenance["foregrounds"][0]
    assert first["file"] == "disc.png"
    checksum = hashlib.sha256((discs / "disc.png").read_bytes()).hexdigest()
    assert checksum.startswith(first["sha256"]) and len(first["sha256"]) >= 16
    assert provenance["background"]["file"] == "ramp.png"
    made = LayerScenes(0, SIZE).arrays(0)["provenance"]
    assert "procedural" in made["foregrounds"][0] and "procedural" in made["background"]


def test_folders_and_pictures_made_from_nothing_are_mixed(discs: Path, photographs: Path) -> None:
    scenes = LayerScenes(0, SIZE, foregrounds=discs, backgrounds=photographs, procedural_share=0.5)
    made = [
        ["procedural" in part for part in (*provenance["foregrounds"], provenance["background"])]
        for provenance in (scenes.compose(index, 1.0).provenance for index in range(20))
    ]
    share = np.mean([value for values in made for value in values])
    assert 0.25 < share < 0.75  # 60 draws or so


def test_unusable_files_are_listed(discs: Path) -> None:
    Image.new("RGB", (32, 32)).save(discs / "photo.jpg")
    with pytest.warns(SourceFileWarning, match=r"photo\.jpg"):
        scenes = LayerScenes(0, SIZE, foregrounds=discs)
    assert len(scenes.problems) == 1 and "photo.jpg" in scenes.problems[0]


# --- Optics ---------------------------------------------------------------------------------------


def test_without_blur_the_target_is_the_image(discs: Path) -> None:
    """Soft edges included: picture and target are composed in the same light."""
    for scenes in (LayerScenes(3, SIZE, foregrounds=discs, **SHARP), LayerScenes(3, SIZE, **SHARP)):
        for index in range(4):
            arrays = scenes.arrays(index)
            difference = as_floats(arrays, "image") - as_floats(arrays, "target")
            assert np.abs(difference).max() * 255 <= 0.51


def test_the_image_is_the_layers_over_one_another_in_linear_light(discs: Path) -> None:
    scenes = LayerScenes(4, SIZE, foregrounds=discs)
    for index in range(4):
        scene = scenes.compose(index, 2.0)
        inside = (slice(None), slice(scene.top, scene.top + SIZE))
        inside += (slice(scene.left, scene.left + SIZE),)
        light = np.zeros((SIZE, SIZE, 3))
        colours, alphas = (
            array[inside].astype(np.float64) for array in (scene.colours, scene.alphas)
        )
        for colour, alpha in zip(colours[::-1], alphas[::-1], strict=True):
            light = alpha[..., None] * colour + (1 - alpha[..., None]) * light
        # Opacity below 0.01 counts as 0 and above 0.99 as 1: 0.01 of light for each foreground.
        error = np.abs(srgb_to_linear(scenes.image(scene)) - np.clip(light, 0, 1))
        assert error.max() < 0.01 * (len(scene.boxes) + 1)


def test_what_is_in_focus_stays_sharp_and_the_rest_does_not(discs: Path) -> None:
    """A disc that faces the camera, in focus before a strongly blurred background."""
    scenes = LayerScenes(
        6, 64, foregrounds=discs, focus={"foreground": 1}, layers=(1, 1), facing_angle=0,
        radius=(8.0, 8.0), exposure=(0.0, 0.0),
    )  # fmt: skip
    for index in range(4):
        arrays = scenes.arrays(index)
        scene = scenes.compose(index, 8.0)
        rows, columns = slice(scene.top, scene.top + 64), slice(scene.left, scene.left + 64)
        alpha = scene.alphas[0, rows, columns]
        difference = np.abs(as_floats(arrays, "image") - as_floats(arrays, "target")).max(axis=2)
        if (alpha > 0.99).any():
            assert difference[alpha > 0.99].max() * 255 <= 0.51
        assert difference[alpha == 0].max() > 0.1


def test_white_stays_white_up_to_the_frame(tmp_path: Path) -> None:
    """No black borders, no halo around the cut-out: white on white is white however blurred."""
    discs = save_cutout(tmp_path / "discs" / "disc.png", soft_disc(colour=(255, 255, 255)))
    white = flat_photograph(tmp_path / "white", 255)
    for aperture in (None, "random"):
        scenes = LayerScenes(
            7, 64, foregrounds=discs, backgrounds=white, exposure=(0, 0), aperture=aperture,
            radius=(4.0, 24.0),
        )  # fmt: skip
        for index in range(6):
            arrays = scenes.arrays(index)
            assert arrays["image"].min() == 255
            assert as_floats(arrays, "target").min() > 0.998


def test_radius_of_the_nearest_and_farthest_surface_is_the_one_drawn() -> None:
    scenes = LayerScenes(8, SIZE, radius=(5.0, 5.0))
    for index in range(8):
        scene = scenes.compose(index, 5.0)
        K = scenes.strength(scene, 5.0)
        largest = K * np.abs(scene.hard_disparity() - scene.df).max()
        assert largest <= 5.0 + 1e-4
        # Only hidden surfaces that would be blurred beyond the canvas, steep planes and scenes
        # that are flat where they are seen leave less.
        assert largest > 3.0


def test_planes_are_slanted_and_never_cross_where_both_are_seen() -> None:
    scenes = LayerScenes(9, 64)
    slanted = 0
    for index in range(20):
        scene = scenes.compose(index, 2.0)
        side = scene.alphas.shape[1]
        y, x = np.mgrid[:side, :side]
        disparities = [d0 + dx * x + dy * y for d0, dx, dy in scene.planes]
        background = disparities[-1]
        assert abs(background.min() - 0.001) < 1e-9 and background.max() <= 0.25 + 1e-9
        for layer, disparity in enumerate(disparities[:-1]):
            there = scene.alphas[layer] > 0
            assert disparity[there].max() <= 1 + 1e-9
            slanted += np.hypot(*scene.planes[layer, 1:]) * 64 > 0.01
            for behind in range(layer + 1, len(disparities)):
                both = there & (scene.alphas[behind] > 0)
                if both.any():
                    assert (disparity - disparities[behind])[both].min() > 0
            # tan(facing angle) is the slope relative to the disparity, at 1.2 sides' distance.
            slope = np.hypot(*scene.planes[layer, 1:]) * 1.2 * 64
            assert slope <= math.tan(math.radians(60)) * disparity[there].max() + 1e-9
    assert slanted > 10


def test_focus_lies_on_what_was_asked_for() -> None:
    for choice in ("foreground", "background", "anywhere"):
        scenes = LayerScenes(10, SIZE, focus={choice: 1})
        for index in range(6):
            scene = scenes.compose(index, 2.0)
            visible, disparity = scene.visible(), scene.hard_disparity()
            focus = scene.provenance["focus"]
            assert focus == choice or (choice == "foreground" and focus == "background")
            if focus == "anywhere":
                assert np.abs(disparity - scene.df).min() < 1e-6
            elif focus == "background":
                expected = disparity[visible[-1]].mean() if visible[-1].any() else scene.df
                assert abs(scene.df - expected) < 1e-4
            else:
                means = [disparity[layer].mean() for layer in visible[:-1] if layer.any()]
                assert np.abs(np.array(means) - scene.df).min() < 1e-4


def test_a_cut_off_subject_ends_beyond_the_frame(tmp_path: Path) -> None:
    """A portrait that ends with its own picture: nowhere does one see below its edge."""
    pixels = np.zeros((60, 40, 4), np.uint8)
    pixels[10:, 8:-8] = (200, 100, 50, 255)
    portraits = save_cutout(tmp_path / "portraits" / "portrait.png", pixels)
    scenes = LayerScenes(11, 64, foregrounds=portraits, layers=(1, 1))
    for index in range(6):
        scene = scenes.compose(index, 6.0)
        assert (scene.alphas[0, -1] > 0.5).any()
        assert scene.alphas[0, 0].max() == 0


def test_mirrored_sources_and_exposure_keep_the_lens_upright(tmp_path: Path) -> None:
    """A slit of an aperture, broad and low, blurs sideways in every sample."""
    rng = np.random.default_rng(0)
    (tmp_path / "noise").mkdir()
    noise = rng.integers(0, 256, (160, 160, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise" / "noise.png")
    scenes = LayerScenes(
        12, 64, backgrounds=tmp_path / "noise", layers=(1, 1), radius=(6.0, 6.0),
        focus={"foreground": 1}, aperture=Aperture(squeeze=4.0), exposure=(-1.0, 0.0),
    )  # fmt: skip
    for index in range(4):
        arrays = scenes.arrays(index)
        background = scenes.compose(index, 6.0).visible()[-1]
        target = as_floats(arrays, "target").mean(axis=2)
        across, down = np.abs(np.diff(target, axis=1)), np.abs(np.diff(target, axis=0))
        assert across[background[:, 1:]].mean() < 0.8 * down[background[1:]].mean()
        assert Aperture.from_dict(arrays["aperture"]) == Aperture(squeeze=4.0)


def test_exposure_brightens_light_before_the_lens(tmp_path: Path) -> None:
    gray = flat_photograph(tmp_path / "gray", 100)
    scenes = LayerScenes(13, SIZE, backgrounds=gray, exposure=(-1.0, 1.0))
    gains = []
    for index in range(6):
        scene = scenes.compose(index, 2.0)
        expected = srgb_to_linear(np.array([100 / 255])) * 2.0 ** np.array([-1, 1])
        assert expected[0] - 1e-5 <= scene.colours[-1].mean() <= expected[1] + 1e-5
        gains.append(scene.provenance["gain"])
        assert scene.colours[-1].std() < 1e-6
    assert np.std(gains) > 0.1


def test_a_lens_stopped_down_blurs_the_image_a_little(discs: Path) -> None:
    """As a photo at a small aperture is blurred behind what is in focus, a share as wide."""
    options: dict[str, Any] = dict(foregrounds=discs, focus={"foreground": 1}, facing_angle=0)
    options |= dict(radius=(SIZE / 8, SIZE / 8), exposure=(-1.0, -1.0))
    sharp, stopped = (LayerScenes(7, SIZE, **options, stopped_down=share) for share in (0, 0.25))
    assert "stopped_down" not in sharp.settings and stopped.settings["stopped_down"] == 0.25
    for index in range(3):
        scene, other = sharp[index], stopped[index]
        for name in ("target", "disparity", "df", "K"):
            assert torch.equal(scene[name], other[name]), name
        in_focus = (scene["disparity"] - scene["df"]).abs() * scene["K"] < 0.1
        assert in_focus.any() and not in_focus.all()
        # Soft edges of what is in focus let the background through.
        inside = -torch.nn.functional.max_pool2d(-in_focus.float()[None], 7, 1, 3)[0] > 0
        difference = ((scene["image"] - other["image"]).abs() * inside).max()
        assert difference <= 1.5 / 255
        composed = stopped.compose(index, SIZE / 8)
        taken = linear_to_srgb(composed.light(0.25 * float(other["K"]), None, 21).clip(0, 1))
        assert np.abs(taken.transpose(2, 0, 1) - other["image"].numpy()).max() <= 1 / 255
        contrasts = [
            float(picture.diff(dim=-1).abs().mean())
            for picture in (scene["target"], other["image"], scene["image"])
        ]
        assert contrasts == sorted(contrasts) and len(set(contrasts)) == 3


def test_random_apertures_vary_and_belong_to_their_sample() -> None:
    scenes = LayerScenes(14, SIZE, aperture="random")
    arrays = [scenes.arrays(index) for index in range(5)]
    assert len({json.dumps(sample["aperture"], sort_keys=True) for sample in arrays}) > 2
    plain = LayerScenes(14, SIZE).arrays(0)
    assert np.array_equal(arrays[0]["image"], plain["image"])
    assert plain["aperture"] == {}


def test_corrupted_maps_leave_the_pictures_alone() -> None:
    clean = LayerScenes(15, SIZE, aperture="random")
    corrupted = LayerScenes(15, SIZE, aperture="random", corrupted_share=1.0)
    changed = 0
    for index in range(8):
        one, other = clean.arrays(index), corrupted.arrays(index)
        assert np.array_equal(one["image"], other["image"])
        assert np.array_equal(one["target"], other["target"])
        assert "mistakes" not in one["provenance"]
        changed += bool(other["provenance"]["mistakes"])
        fringe = [Aperture.from_dict(sample["aperture"]).fringe for sample in (one, other)]
        # Colour fringes are counted in disparity: the same pixels in either unit.
        assert math.isclose(one["K"] * fringe[0], other["K"] * fringe[1], abs_tol=1e-9)
    assert changed >= 5


# --- The slips of the released code ---------------------------------------------------------------


def scene_of(
    compat: Compat, index: int = 0, radius: float = 2.0, size: int = SIZE, **settings: Any
):
    return LayerScenes(20, size, compat=compat, **settings).compose(index, radius)


def test_canvas_and_border(discs: Path, photographs: Path) -> None:
    """768 + 2 * 24 pixels whatever the blur, of which a part is cut; ours grows with the blur."""
    settings = {"foregrounds": discs, "backgrounds": photographs}
    for radius in (3.0, 96.0):
        assert scene_of(OFFICIAL, radius=radius, **settings).alphas.shape[1:] == (816, 816)
        side = scene_of(Compat(), radius=radius, **settings).alphas.shape[1]
        assert SIZE + 2 * radius < side < SIZE + 2 * 1.3 * radius + 10
    corners = [scene_of(OFFICIAL, index, **settings).window[:2] for index in range(8)]
    assert np.std(corners) > 50 and np.min(corners) >= 24 and np.max(corners) <= 24 + 768 - SIZE


def test_background_aspect(discs: Path, photographs: Path) -> None:
    settings = {"foregrounds": discs, "backgrounds": photographs, "exposure": (0, 0)}
    for index in range(5):
        squeezed = scene_of(Compat(ignores_aspect=True), index, **settings).colours[-1]
        assert np.ptp(linear_to_srgb(squeezed)) > 0.95
        kept = scene_of(Compat(), index, **settings).colours[-1]
        # At most the middle half of the ramp fits in a square.
        assert 0.2 < np.ptp(linear_to_srgb(kept)) < 0.55


def test_last_row_and_column(tmp_path: Path) -> None:
    """A blue square whose last row and column are red."""
    pixels = np.zeros((40, 40, 4), np.uint8)
    pixels[5:35, 5:35] = (0, 0, 255, 255)
    pixels[34, 5:35, :3] = pixels[5:35, 34, :3] = (255, 0, 0)
    squares = save_cutout(tmp_path / "squares" / "square.png", pixels)
    for lost in (False, True):
        scene = scene_of(Compat(loses_last_line=lost), foregrounds=squares, exposure=(0, 0))
        red = scene.colours[0, ..., 0][scene.alphas[0] > 0.5]
        assert (red.max() > 0.1) is not lost


def test_alpha_and_halos(tmp_path: Path) -> None:
    hard = soft_disc(colour=(255, 255, 255))
    hard[..., 3] = np.where(hard[..., 3] > 127, 255, 0)
    hard[hard[..., 3] == 0, :3] = 0
    discs = save_cutout(tmp_path / "discs" / "disc.png", hard)
    for unclipped in (False, True):
        scene = scene_of(
            Compat(unclipped_alpha=unclipped), foregrounds=discs, exposure=(0, 0), layers=(1, 1)
        )
        alpha, colours = scene.alphas[0], scene.colours[0]
        edge = colours[(alpha > 0.3) & (alpha < 0.7)]
        if unclipped:
            assert alpha.min() < -0.01 and alpha.max() > 1.01
            assert edge.min() < 0.6  # the black that is hidden around the disc
        else:
            assert alpha.min() == 0 and alpha.max() <= 1
            assert edge.min() > 0.95


def test_placement() -> None:
    """Released: one cut-out wholly inside; ours: several, anywhere."""
    released = [scene_of(Compat(near_centre=True), index) for index in range(8)]
    ours = [scene_of(Compat(), index) for index in range(8)]
    for scene in released:
        side = scene.alphas.shape[1]
        ((top, left, height, width),) = scene.boxes
        assert top >= 0 and left >= 0 and top + height <= side and left + width <= side
        # The box covers U(0.5, 1)^2 of the canvas unless it has to be shrunk to fit.
        assert height * width <= side**2 and max(height, width) > 0.45 * side
    assert max(len(scene.boxes) for scene in ours) > 1
    assert any(
        top < 0 or left < 0 or top + height > len(scene.alphas[0])
        for scene in ours
        for top, left, height, width in scene.boxes
    )


def test_foreground_facing_the_camera() -> None:
    for index in range(5):
        assert np.abs(scene_of(Compat(flat_foreground=True), index).planes[:-1, 1:]).max() == 0
    slopes = [np.hypot(*scene_of(Compat(), index).planes[0, 1:]) for index in range(5)]
    assert max(slopes) * SIZE > 0.02


def test_gamma(tmp_path: Path) -> None:
    """The light of a dark gray: 0.02^2.2 = 0.00018, where sRGB has 0.02 / 12.92 = 0.0015."""
    dark = flat_photograph(tmp_path / "dark", 5)
    settings = {"backgrounds": dark, "exposure": (0, 0)}
    value = 5 / 255
    assert np.allclose(scene_of(Compat(gamma=2.2), **settings).colours[-1], value**2.2, rtol=1e-4)
    assert np.allclose(scene_of(Compat(), **settings).colours[-1], value / 12.92, rtol=1e-4)
    scenes = LayerScenes(20, SIZE, compat=Compat(gamma=2.2), **settings, **{"radius": (1, 1)})
    arrays = scenes.arrays(0)
    background = scenes.compose(0, 1.0).visible()[-1]
    assert np.median(arrays["image"][:, background]) == 5


def test_image_in_display_space_disagrees_with_the_target(discs: Path, tmp_path: Path) -> None:
    black = flat_photograph(tmp_path / "black", 0)
    scenes = LayerScenes(
        21, SIZE, foregrounds=discs, backgrounds=black, compat=Compat(image_in_display_space=True),
        layers=(1, 1), **SHARP,
    )  # fmt: skip
    arrays, scene = scenes.arrays(0), scenes.compose(0, 1e-6)
    alpha = scene.alphas[0, scene.top : scene.top + SIZE, scene.left : scene.left + SIZE]
    difference = (as_floats(arrays, "target") - as_floats(arrays, "image"))[..., 0]
    # Half of white light over black is 0.735 on the display, half of the display value 0.5.
    assert difference[(alpha > 0.4) & (alpha < 0.6)].min() > 0.15
    assert np.abs(difference[(alpha == 0) | (alpha == 1)]).max() < 0.01


def test_blended_and_hard_disparity(discs: Path) -> None:
    for blended in (False, True):
        scenes = LayerScenes(
            22, SIZE, foregrounds=discs, compat=Compat(blended_disparity=blended), layers=(1, 1)
        )
        scene = scenes.compose(0, 1.0)
        disparity, planes = scenes.disparity(scene), scene.disparities()
        between = np.abs(disparity - planes).min(axis=0) > 0.01
        assert between.any() == blended
        alpha = scene.alphas[0, scene.top : scene.top + SIZE, scene.left : scene.left + SIZE]
        expected = alpha * planes[0] + (1 - alpha) * planes[1] if blended else planes[0]
        where = alpha > (0 if blended else 0.5)
        assert np.allclose(disparity[where], expected[where], atol=1e-6)


def test_strength_by_factor_and_its_label() -> None:
    """K = 12 t / max(df, 1 - df), t from 0.25 to 8, int(21 t) points a side; the label is less."""
    scenes = LayerScenes(
        23, 32, compat=dataclasses.replace(SMALL_OFFICIAL, understated_label=False)
    )
    labelled = LayerScenes(23, 32, compat=SMALL_OFFICIAL)
    factors, ratios = [], []
    for index in range(8):
        arrays = scenes.arrays(index)
        df, provenance = arrays["df"], arrays["provenance"]
        assert arrays["K"] == provenance["traced_K"]
        factor = arrays["K"] * max(df, 1 - df) / 12
        assert provenance["samples_per_side"] == int(21 * factor + 1e-9)
        factors.append(factor)
        label = labelled.arrays(index)
        assert label["provenance"]["traced_K"] == arrays["K"]
        assert 2 / 3 - 1e-9 <= label["K"] / (12 * factor) <= 1 + 1e-9
        ratios.append(arrays["K"] / label["K"])
    assert 0.25 <= min(factors) < 1 < max(factors) <= 8
    assert min(ratios) >= 1 and max(ratios) <= 3 and max(ratios) > 1.2
    ours = LayerScenes(23, 32)
    for index in range(4):
        arrays = ours.arrays(index)
        assert arrays["K"] == arrays["provenance"]["traced_K"]
    assert [lens_grid_side(radius) for radius in (0.5, 12, 24, 96)] == [21, 21, 42, 168]


def test_finished_pictures_are_mirrored_and_brightened(tmp_path: Path) -> None:
    """A sky that is bright above: ours is never upside down, the released code's half the time."""
    ramp = np.tile(np.linspace(230, 20, 96).astype(np.uint8)[:, None, None], (1, 96, 3))
    folder = tmp_path / "sky"
    folder.mkdir()
    Image.fromarray(ramp).save(folder / "sky.png")
    settings: dict[str, Any] = {"backgrounds": folder, "focus": {"background": 1}}
    upright, brightness = [], []
    for compat in (Compat(changed_afterwards=True), Compat()):
        scenes = LayerScenes(24, SIZE, compat=compat, radius=(1.0, 1.0), **settings)
        for index in range(16):
            arrays = scenes.arrays(index)
            scene = scenes.compose(index, 1.0)
            nearly_far = as_floats(arrays, "disparity")[..., 0] < 0.25
            image = np.where(nearly_far, as_floats(arrays, "image").mean(axis=2), np.nan)
            upright.append(np.nanmean(image[:24]) > np.nanmean(image[-24:]))
            before = scenes.image(scene).mean()
            brightness.append(as_floats(arrays, "image").mean() / before)
    assert 2 <= sum(upright[:16]) <= 14
    assert all(upright[16:])
    changed = np.array(brightness[:16])
    assert changed.min() < 0.95 and changed.max() > 1.05
    assert changed.min() > 0.69 and changed.max() < 1.11
    assert np.allclose(brightness[16:], 1, atol=0.01)


def test_official_is_every_slip_and_ours_is_none() -> None:
    for field in dataclasses.fields(Compat):
        assert getattr(OFFICIAL, field.name) not in (None, False)
        assert getattr(Compat(), field.name) in (None, False)
    assert LayerScenes(0, SIZE, compat="official").compat == OFFICIAL
    assert LayerScenes(0, SIZE).compat == Compat()
    focus = LayerScenes(0, SIZE, compat="official").focus
    assert focus == {"foreground": 0.5, "background": 0.5, "anywhere": 0.0}


# --- Mistakes, options, real cut-outs -------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"size": 16}, "at least 32"),
        ({"size": 800, "compat": "official"}, "larger than the canvas"),
        ({"compat": "theirs"}, "compat is 'theirs'"),
        ({"compat": "official", "radius": (1, 2)}, "radius has no effect"),
        ({"compat": "official", "aperture": "random"}, "mirror the aperture"),
        ({"aperture": "hexagon"}, "aperture is 'hexagon'"),
        ({"radius": (4.0, 2.0)}, "radius is"),
        ({"corrupted_share": 1.5}, "corrupted_share is 1.5"),
        ({"procedural_share": -0.1}, "procedural_share is -0.1"),
        ({"layers": (0, 2)}, "layers is"),
        ({"focus": {"nose": 1}}, "wanted shares of foreground, background, anywhere"),
        ({"focus": {"foreground": 0}}, "focus is"),
        ({"facing_angle": 90}, "facing_angle is 90"),
        ({"stopped_down": 1.0}, "stopped_down is 1.0"),
        ({"stopped_down": -0.1}, "stopped_down is -0.1"),
        ({"stopped_down": 0.1, "compat": "official"}, "is all in focus"),
        ({"exposure": (1, 0)}, "exposure is"),
        ({"samples_per_side": 0}, "samples_per_side is 0"),
        ({"length": -3}, "length is -3"),
        ({"foregrounds": "no/such/folder"}, "There is no folder"),
    ],
)
def test_mistakes_are_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LayerScenes(**{"size": SIZE, **arguments})


def test_command_line_options_make_the_same_data_set(
    discs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int)
    parser.add_argument("--size", type=int)
    add_arguments(parser)
    plain = from_options(parser.parse_args(["--seed", "3", "--size", "64"]))
    assert plain.settings == LayerScenes(3, 64).settings
    line = f"--seed 3 --size 64 --foregrounds {discs} --layers 1 2 --focus anywhere --radius 1 4"
    line += " --stopped-down 0.2 --facing-angle 30 --samples-per-side 9 --corrupted-share 0.5"
    chosen = from_options(parser.parse_args([*line.split(), "--aperture", '{"blades": 6}']))
    expected = LayerScenes(
        3, 64, foregrounds=discs, layers=(1, 2), focus={"anywhere": 1}, radius=(1, 4),
        facing_angle=30, stopped_down=0.2, samples_per_side=9, corrupted_share=0.5,
        aperture=Aperture(blades=6),
    )  # fmt: skip
    assert chosen.settings == expected.settings
    official = from_options(parser.parse_args(["--seed", "0", "--size", "64", "--compat=official"]))
    assert official.compat == OFFICIAL
    with pytest.raises(SystemExit):
        parser.parse_args(["--seed", "0", "--size", "64", "--aperture", "hexagon"])
    assert "'hexagon' is neither random nor the fields of an opening" in capsys.readouterr().err


def test_real_cut_outs(shared_root: Path) -> None:
    """Fur over a photograph: in focus the target is the image, soft edges included."""
    sources = {
        "foregrounds": shared_root / "data" / "cutouts",
        "backgrounds": shared_root / "data" / "backgrounds",
    }
    scenes = LayerScenes(25, 96, **sources, **SHARP)
    assert scenes.problems == []
    arrays = scenes.arrays(0)
    difference = as_floats(arrays, "image") - as_floats(arrays, "target")
    assert np.abs(difference).max() * 255 <= 0.51

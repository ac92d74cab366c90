"""What one visitor has, without a browser."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bokehdiff import Camera
from bokehdiff.page.files import new_visitor_folder
from bokehdiff.page.lens import LensControls
from bokehdiff.page.renderers import Renderers
from bokehdiff.page.scenes import PREVIEW_SIDE, Scene, Sources, Unit, open_scene
from bokehdiff.page.session import FILES_KEPT, Visitor
from bokehdiff.page.settings import BUILT_IN_CHOICES, PageSettings

LAYERED = BUILT_IN_CHOICES[2]


def two_planes(folder: Path, width: int = 96, height: int = 64) -> Sources:
    """A near square before a far wall."""
    generator = np.random.default_rng(0)
    samples = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(samples).save(folder / "planes.png")
    disparity = np.full((height, width), 0.2, np.float32)
    disparity[height // 4 : -height // 4, width // 4 : -width // 4] = 0.8
    np.save(folder / "planes.npy", disparity)
    return Sources(folder / "planes.png", folder / "planes.npy")


@pytest.fixture(scope="module")
def renderers() -> Renderers:
    return Renderers(PageSettings(largest_photo_megapixels=1), "cpu")


def visitor_of(folder: Path, sources: Sources, renderers: Renderers) -> tuple[Visitor, Scene]:
    visitor = Visitor(new_visitor_folder(folder))
    with torch.inference_mode():
        return visitor, visitor.open(sources, renderers)


def test_the_subject_distance_is_that_of_a_camera() -> None:
    controls = LensControls(f_number=1.4, focal_length_mm=85, subject_distance_m=3)
    lens = controls.setting(0.6, (300, 400), metric=False, subject_df=0.6)
    camera = Camera(f_number=1.4, focal_length_mm=85)
    assert float(lens.K) == pytest.approx(camera.strength((300, 400), 0.6, focus_distance_m=3))


def test_the_scene_keeps_its_depth_wherever_the_focus_goes() -> None:
    controls = LensControls(focal_length_mm=20)
    # The lens moves by little, so K of one scene changes by little; 0 is infinitely far.
    near, far = (
        float(controls.setting(df, (300, 400), metric=False, subject_df=0.5).K) for df in (0.9, 0.0)
    )
    assert far == pytest.approx(near, rel=0.03)


def test_blur_is_the_same_share_of_small_and_large_pictures() -> None:
    small, large = (
        float(LensControls().setting(0.5, size, metric=True, subject_df=0.5).K)
        for size in ((300, 400), (1500, 2000))
    )
    assert large == pytest.approx(5 * small)


def test_preview_and_full_size(tmp_path: Path, renderers: Renderers) -> None:
    sources = two_planes(tmp_path, 2 * PREVIEW_SIDE, 640)
    visitor, scene = visitor_of(tmp_path, sources, renderers)
    assert scene.size == (640, 1024)
    assert scene.preview_size == (320, 512)
    assert scene.subject_df == pytest.approx(0.8)
    with torch.inference_mode():
        visitor.focus(256, 160)
        with Image.open(visitor.preview(renderers, LensControls())) as preview:
            assert preview.size == (512, 320)
        with Image.open(visitor.full_size(renderers, LensControls(), LAYERED)) as full:
            photo = Image.open(sources.photo)
            assert full.size == (1024, 640) and full.format == "PNG"
            middle = (312, 240, 712, 400)
            in_focus = np.abs(
                np.asarray(full.crop(middle), int) - np.asarray(photo.crop(middle), int)
            )
            assert in_focus.max() <= 1


def test_opening_and_blades_change_the_picture(tmp_path: Path, renderers: Renderers) -> None:
    visitor, _ = visitor_of(tmp_path, two_planes(tmp_path), renderers)
    strong = {"f_number": 1.0, "focal_length_mm": 200}
    with torch.inference_mode():
        visitor.focus(48, 32)
        pictures = [
            np.asarray(Image.open(visitor.preview(renderers, LensControls(**opening))), float)
            for opening in (strong, {"f_number": 16.0}, {**strong, "blades": 5})
        ]
    corner = [picture[:12, :12].std() for picture in pictures]
    assert corner[0] < 0.7 * corner[1]
    assert np.abs(pictures[0] - pictures[2])[:12].mean() > 1


def test_files_that_are_shown_do_not_pile_up(tmp_path: Path, renderers: Renderers) -> None:
    visitor, scene = visitor_of(tmp_path, two_planes(tmp_path), renderers)
    shown = [visitor.show(scene.photo.image) for _ in range(2 * FILES_KEPT)]
    assert len(set(shown)) == 2 * FILES_KEPT
    assert [file.exists() for file in shown] == [False] * FILES_KEPT + [True] * FILES_KEPT
    assert len(list(visitor.folder.iterdir())) == FILES_KEPT


def test_folders_of_visitors_cannot_be_guessed(tmp_path: Path) -> None:
    folders = {new_visitor_folder(tmp_path).name for _ in range(20)}
    assert len(folders) == 20 and all(len(name) == 32 for name in folders)


def test_mistakes_are_told(tmp_path: Path, renderers: Renderers) -> None:
    sources = two_planes(tmp_path)
    Image.new("L", (1200, 1000)).save(tmp_path / "large.png")
    np.savez_compressed(tmp_path / "map.npz", np.zeros((64, 96), np.float32))
    np.save(tmp_path / "metres.npy", np.full((64, 96), 3.0, np.float32))
    for wrong, sentence in (
        (Sources(tmp_path / "large.png", sources.disparity), "1.2 megapixels; this page takes"),
        (Sources(sources.photo, tmp_path / "large.png"), "1.2 megapixels; this page takes"),
        (Sources(tmp_path / "gone.png", sources.disparity), "Drop it again"),
        (Sources(sources.photo, tmp_path / "map.npz"), "map.npz is no disparity map"),
        (Sources(sources.photo, tmp_path / "metres.npy"), "wanted"),
        (Sources(sources.photo), "--depth-model"),
    ):
        with pytest.raises((ValueError, OSError), match=sentence):
            open_scene(wrong, renderers)
    with torch.inference_mode():
        metric = open_scene(Sources(sources.photo, tmp_path / "metres.npy", Unit.metric), renderers)
    assert metric.metric
    with pytest.raises(ValueError, match="drop one first"):
        Visitor(tmp_path).focus(1, 1)


def test_models_are_offered_without_the_folders_they_lie_in() -> None:
    settings = PageSettings(models=("/home/someone/secret/portraits", "owner/sdxl"))
    labels = [choice.label for choice in settings.choices]
    assert labels[0].startswith("TINY")
    assert labels[-2:] == ["portraits (diffusion)", "sdxl (diffusion)"]
    assert settings.choice(labels[-1]).model == "owner/sdxl"
    with pytest.raises(ValueError, match="one name in the menu"):
        PageSettings(models=("a/same", "b/same"))
    with pytest.raises(ValueError, match="no method"):
        settings.choice("/etc")

"""What a photographer says to the pipeline: focus, cameras, ranges, stacks, overlays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.callbacks import PipelineCallback

from bokehdiff import TINY, BokehDiffPipeline, Camera
from bokehdiff.images import InputRepairedWarning
from tests.tiny_models import photo_and_disparity, tiny_sdxl_components

PHOTO, DISPARITY = photo_and_disparity(64, 96)
NEAR_POINT, FAR_POINT = (30, 20), (80, 60)


@pytest.fixture(scope="module")
def pipe() -> BokehDiffPipeline:
    return BokehDiffPipeline.from_pretrained(TINY)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> BokehDiffPipeline:
    return BokehDiffPipeline(**tiny_sdxl_components(tmp_path_factory.mktemp("vocabulary")))


def rendered(pipe: BokehDiffPipeline, *arguments: Any, **settings: Any) -> torch.Tensor:
    return pipe(PHOTO, DISPARITY, *arguments, output_type="pt", **settings).images


def test_a_point_is_its_disparity(pipe: BokehDiffPipeline) -> None:
    near = rendered(pipe, focus=NEAR_POINT, K=6.0)
    assert torch.equal(near, rendered(pipe, 0.8, 6.0))
    # The disparity is the median of a window of five rows of a slope.
    far = rendered(pipe, focus=FAR_POINT, K=6.0)
    assert torch.equal(far, rendered(pipe, float(np.median(DISPARITY[58:63, 80])), 6.0))


def test_a_mask_a_box_and_auto_find_the_near_thing(pipe: BokehDiffPipeline) -> None:
    expected = rendered(pipe, 0.8, 6.0)
    mask = DISPARITY > 0.5
    assert torch.equal(rendered(pipe, focus=mask, K=6.0), expected)
    assert torch.equal(rendered(pipe, focus=(24, 16, 48, 32), K=6.0), expected)
    assert torch.equal(rendered(pipe, focus="auto", K=6.0), expected)


def test_a_range_is_kept_and_the_rest_is_blurred(pipe: BokehDiffPipeline) -> None:
    photo = torch.from_numpy(PHOTO).permute(2, 0, 1) / 255
    picture = rendered(pipe, focus_range=(0.1, 0.3), K=12.0)[0]
    # Below the block and its blur of 6 pixels all of the slope lies in the range.
    assert torch.equal(picture[:, 46:], photo[:, 46:])
    assert (rendered(pipe, 0.1, 12.0)[0] - photo)[:, 46:].abs().max() > 0.1
    assert (picture - photo)[:, 18:30, 28:44].abs().max() > 0.1
    everything = rendered(pipe, focus_range=(0.0, 1.0), K=12.0)[0]
    assert torch.equal(everything, photo)


def test_a_whole_subject_is_kept(pipe: BokehDiffPipeline) -> None:
    photo = torch.from_numpy(PHOTO).permute(2, 0, 1) / 255
    slope = np.zeros((64, 96), bool)
    slope[40:] = True
    kept = rendered(pipe, focus=slope, whole_subject=True, K=40.0)[0]
    one_plane = rendered(pipe, focus=slope, K=40.0)[0]
    # Well beyond the reach of the light of the block, a radius of 20 pixels.
    apart = (slice(None), slice(46, 64), slice(86, 96))
    assert torch.equal(kept[apart], photo[apart])
    assert (one_plane - photo)[apart].abs().max() > 0.1


def test_a_camera_is_a_strength(pipe: BokehDiffPipeline) -> None:
    camera = Camera(f_number=4.0, focal_length_mm=50)
    by_camera = pipe(PHOTO, DISPARITY, 0.5, camera=camera, metric=True, output_type="pt").images
    by_parts = pipe(
        PHOTO, DISPARITY, 0.5, f_number=4.0, focal_length_mm=50, metric=True, output_type="pt"
    ).images
    # f^2 s / (2 N (s - f)) metres per 1/metre, focused at 2 m, on 36 mm for 96 pixels.
    strength = 0.05**2 * 2 / (2 * 4 * 1.95) * 1000 * 96 / 36
    by_strength = pipe(PHOTO, DISPARITY, 0.5, strength, metric=True, output_type="pt").images
    assert torch.equal(by_camera, by_parts)
    torch.testing.assert_close(by_camera, by_strength, rtol=0, atol=1e-5)


def test_a_camera_on_relative_disparity_says_what_it_assumes(pipe: BokehDiffPipeline) -> None:
    camera = Camera(f_number=4.0, focal_length_mm=50)
    with pytest.warns(InputRepairedWarning, match="2 m"):
        assumed = rendered(pipe, 0.5, camera=camera)
    assert torch.equal(assumed, rendered(pipe, 0.5, camera=camera, focus_distance_m=2.0))


def test_a_camera_is_read_from_the_photograph(pipe: BokehDiffPipeline, tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    # FNumber, FocalLength, FocalLengthIn35mmFilm
    exif[0x8769] = {0x829D: 4.0, 0x920A: 50.0, 0xA405: 50}
    PIL.Image.fromarray(PHOTO).save(tmp_path / "photo.png", exif=exif)
    settings = dict(focus_distance_m=2.0, output_type="pt")
    read = pipe(tmp_path / "photo.png", DISPARITY, 0.5, f_number=2.8, **settings).images
    sensor = Camera.from_photo(tmp_path / "photo.png", f_number=2.8).sensor_width_mm
    camera = Camera(2.8, 50, sensor)
    assert torch.equal(read, rendered(pipe, 0.5, camera=camera, focus_distance_m=2.0))


def test_many_settings_of_one_scene_are_one_batch(
    pipe: BokehDiffPipeline, sdxl: BokehDiffPipeline
) -> None:
    for model in (pipe, sdxl):
        scene = model.prepare(PHOTO, DISPARITY)
        strengths = [float(K) for K in range(8)]
        sweep = model.render(scene, 0.3, strengths, output_type="pt").images
        assert sweep.shape == (8, 3, 64, 96)
        single = [model.render(scene, 0.3, K, output_type="pt").images for K in strengths]
        # Sums over a batch may be taken in another order; a level of 8 bits is 4e-3.
        torch.testing.assert_close(sweep, torch.cat(single), rtol=0, atol=1e-4)


def test_a_focus_stack_is_its_pictures(pipe: BokehDiffPipeline) -> None:
    encoded: list[int] = []
    encode = pipe.vae.encode
    pipe.vae.encode = lambda *arguments, **words: encoded.append(1) or encode(*arguments, **words)
    try:
        stack = pipe.focus_stack(PHOTO, DISPARITY, [0.1, 0.5, 0.8], [4.0, 5.0, 6.0])
    finally:
        pipe.vae.encode = encode
    assert len(encoded) == 1
    for picture, df, K in zip(stack.images, (0.1, 0.5, 0.8), (4.0, 5.0, 6.0), strict=True):
        expected = pipe(PHOTO, DISPARITY, df, K).images[0]
        assert picture.tobytes() == expected.tobytes()
    for kind in ("pt", "np", "latent"):
        settings = dict(focus=[NEAR_POINT, FAR_POINT, "auto"], Ks=5.0, output_type=kind)
        one_by_one = pipe.focus_stack(PHOTO, DISPARITY, **settings, return_coc=True)
        together = pipe.focus_stack(PHOTO, DISPARITY, **settings, batch_size=8, return_coc=True)
        for name in ("images", "coc"):
            one, all_ = (torch.as_tensor(getattr(out, name)) for out in (one_by_one, together))
            assert len(one) == 3
            torch.testing.assert_close(one, all_, rtol=0, atol=1e-4)


def test_circles_of_confusion_are_painted_over_the_photo(pipe: BokehDiffPipeline) -> None:
    photo = np.full((64, 96, 3), 128, np.uint8)
    output = pipe(photo, DISPARITY, 0.2, 20.0, return_coc=True, output_type="np")
    assert output.coc.shape == output.images.shape == (1, 64, 96, 3)
    block, above, below = output.coc[0, 24, 36], output.coc[0, 1, 90], output.coc[0, 62, 90]
    assert block[2] > block[0] and block[2] > block[1]  # in front: blue
    in_focus = output.coc[0, np.abs(DISPARITY[:, 90] - 0.2).argmin(), 90]
    assert in_focus[1] > in_focus[0] and in_focus[1] > in_focus[2]  # green
    assert above[0] > above[1] and above[0] > above[2]  # behind: red
    assert below[2] > below[0]  # the slope comes nearer than the plane in focus
    assert pipe(photo, DISPARITY, 0.2, return_coc=True, return_dict=False)[1][0].size == (96, 64)
    assert pipe(photo, DISPARITY, 0.2).coc is None


def test_a_callback_sees_and_replaces_the_latents(pipe: BokehDiffPipeline) -> None:
    seen: list[Any] = []

    def doubled(pipeline: Any, step: int, timestep: int, tensors: dict) -> dict:
        seen.append((pipeline, step, timestep, set(tensors)))
        return {"latents": 0.5 * tensors["latents"]}

    plain = rendered(pipe, 0.8, 6.0, preserve_detail=False)
    changed = rendered(pipe, 0.8, 6.0, preserve_detail=False, callback_on_step_end=doubled)
    assert seen == [(pipe, 0, 499, {"latents"})]
    # TINY's codec is linear around mid gray; what is black or white was cut off.
    inside = (plain > 0) & (plain < 1)
    expected = 0.5 * (plain - 0.5)[inside]
    torch.testing.assert_close((changed - 0.5)[inside], expected, rtol=0, atol=1e-6)

    class Watching(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline: Any, step: int, timestep: int, tensors: dict) -> dict:
            seen.append(step)
            return tensors

    watched = rendered(pipe, 0.8, 6.0, preserve_detail=False, callback_on_step_end=Watching(1.0))
    assert torch.equal(watched, plain)
    with pytest.raises(ValueError, match="asks for noise"):
        rendered(
            pipe,
            0.8,
            callback_on_step_end=doubled,
            callback_on_step_end_tensor_inputs=["noise"],
        )


def test_without_disparity_and_without_a_depth_model_a_sentence_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="disparity"):
        BokehDiffPipeline.from_pretrained(TINY)(PHOTO, df=0.5)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(df=0.5, f_number=2.0, camera=Camera(2.0, 50)), "parts of another"),
        (dict(df=0.5, f_number=2.0), "focal"),
        (dict(df=0.5, f_number=-2.0, focal_length_mm=50), "f_number"),
        (dict(df=0.5, focus="auto"), "df and focus"),
        (dict(focus=(200, 3)), "outside"),
        (dict(focus=np.zeros((64, 96), bool)), "empty|no pixel|marks nothing"),
        (dict(focus="nearest"), "nearest"),
        (dict(df=0.5, tiling="large"), "tiling is 'large'"),
    ],
)
def test_mistakes(pipe: BokehDiffPipeline, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        pipe(PHOTO, DISPARITY, **settings)
    if "camera" not in settings and "tiling" not in settings and "f_number" not in settings:
        with pytest.raises(ValueError, match=sentence):
            pipe.render(pipe.prepare(PHOTO, DISPARITY), **settings)


def test_a_stack_is_of_one_photo(pipe: BokehDiffPipeline) -> None:
    with pytest.raises(ValueError, match="2 photos"):
        pipe.focus_stack([PHOTO, PHOTO], DISPARITY, 0.5)
    with pytest.raises(ValueError, match="batch_size is 0"):
        pipe.focus_stack(PHOTO, DISPARITY, 0.5, batch_size=0)

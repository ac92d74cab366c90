"""BokehFlowPipeline around a tiny network of the real class."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import DiffusionPipeline
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from bokehdiff import Aperture, Camera
from bokehdiff.depth import DepthEstimator
from bokehdiff.images import InputRepairedWarning, linear_to_srgb, srgb_to_linear
from bokehdiff.pipelines.bokehflow import (
    BokehFlowPipeline,
    BokehFlowPipelineOutput,
    BokehFlowScene,
)
from bokehdiff.pipelines.bokehflow_video import BokehFlowVideoPipeline
from bokehdiff.rendering.gaussian_pyramid import gaussian_pyramid_blur, levels_for
from bokehdiff.rendering.painted_layers import painted_layers_blur
from tests.hub_server import HubServer, Repository
from tests.tiny_depth import tiny_depth_network, tiny_depth_processor
from tests.tiny_flow import tiny_flow, untrained_flow
from tests.tiny_models import photo_and_disparity

HEIGHT, WIDTH = 48, 64
PHOTO, DISPARITY = photo_and_disparity(HEIGHT, WIDTH)
TENSOR = torch.from_numpy(PHOTO).permute(2, 0, 1)[None] / 255
MAP = torch.from_numpy(DISPARITY)[None, None]
DF, K = 0.8, 12.0


@pytest.fixture(scope="module")
def pipe() -> BokehFlowPipeline:
    return BokehFlowPipeline(tiny_flow())


@pytest.fixture(scope="module")
def physics() -> BokehFlowPipeline:
    return BokehFlowPipeline(untrained_flow())


def rendered(pipe: BokehFlowPipeline, *arguments: Any, **options: Any) -> torch.Tensor:
    return pipe(PHOTO, DISPARITY, *arguments, output_type="pt", **options).images


# -- What is rendered ----------------------------------------------------------------------------


def test_an_untrained_network_renders_physics(physics):
    picture = rendered(physics, DF, K, preserve_detail=False)
    blurred = gaussian_pyramid_blur(srgb_to_linear(TENSOR), K * (MAP - DF), levels=levels_for(12.0))
    torch.testing.assert_close(picture, linear_to_srgb(blurred).clamp(0, 1), rtol=0, atol=1e-6)


def test_the_network_corrects(pipe, physics):
    difference = (rendered(pipe, DF, K) - rendered(physics, DF, K)).abs()
    assert difference.max() > 0.05


@pytest.mark.parametrize("size", [(48, 64), (45, 83), (1, 1), (7, 50), (16, 16), (33, 17)])
def test_no_blur_returns_the_photo_of_any_size(pipe, size):
    photo, disparity = photo_and_disparity(*size)
    (picture,) = pipe(photo, disparity, 0.3, 0.0).images
    assert np.array_equal(np.asarray(picture), photo)
    (picture,) = pipe(photo, disparity, DF, 0.1 * size[1]).images
    assert picture.size == size[::-1]


def test_a_scene_wholly_in_focus_returns_the_photo(pipe):
    flat = np.full((HEIGHT, WIDTH), 0.4, np.float32)
    (picture,) = pipe(PHOTO, flat, 0.4, 30.0).images
    assert np.array_equal(np.asarray(picture), PHOTO)
    # A circle within its own pixel changes nothing either; a Gaussian in its place would.
    nearly = flat + 0.015 * np.sign(np.random.default_rng(0).normal(size=flat.shape))
    kept = pipe(PHOTO, nearly, 0.4, 30.0, output_type="pt").images
    assert torch.equal(kept, TENSOR)
    raw = pipe(PHOTO, nearly, 0.4, 30.0, preserve_detail=False, output_type="pt").images
    assert (raw - TENSOR).abs().max() > 0.01


def test_more_strength_gives_more_blur(physics):
    roughness = [
        float(rendered(physics, DF, strength).diff(dim=-1).abs().mean()) for strength in (0, 3, 12)
    ]
    assert roughness[0] > roughness[1] > roughness[2]


def test_turning_the_photo_changes_nothing(physics):
    """The largest radius and the camera's strength are of the long side, whichever way it lies."""
    camera = Camera(f_number=1.4, focal_length_mm=200)
    photo, metres = TENSOR, MAP / 0.8
    with pytest.warns(InputRepairedWarning):
        lying = physics(photo, metres, 1.0, camera=camera, metric=True, output_type="pt")
    turned = (photo.transpose(-1, -2), metres.transpose(-1, -2))
    with pytest.warns(InputRepairedWarning):
        standing = physics(*turned, 1.0, camera=camera, metric=True, output_type="pt")
    assert float(lying.clamped_share) > 0.1 and torch.equal(lying.K, standing.K)
    torch.testing.assert_close(standing.clamped_share, lying.clamped_share)
    torch.testing.assert_close(standing.images.transpose(-1, -2), lying.images, rtol=0, atol=1e-5)


# -- Depth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, dict(fusion="both", radius_tokens=False)])
def test_without_disparity_the_network_sees_metres(changes):
    pipe = BokehFlowPipeline(tiny_flow(**changes))
    estimated = pipe(PHOTO, df=0.5, K=4.0, output_type="pt")
    assert estimated.metric and estimated.disparity.shape == (1, 1, HEIGHT, WIDTH)
    assert 1 / 100 <= estimated.disparity.min() and estimated.disparity.max() <= 1 / 0.3
    assert estimated.disparity.std() > 0.01, "or the test could not tell"
    with torch.no_grad():
        found = pipe.model.blur(TENSOR, 0.5, 0.0).inverse_depth
    if not changes:
        assert torch.equal(estimated.disparity, found)
    given = pipe(PHOTO, estimated.disparity, 0.5, 4.0, metric=True, output_type="pt")
    assert torch.equal(given.images, estimated.images)
    by_point = pipe(PHOTO, focus=(20, 30), K=4.0)
    plane = estimated.disparity[0, 0, 28:33, 18:23].median()
    torch.testing.assert_close(by_point.df, plane[None])


def test_the_network_estimates_small_photos(pipe):
    estimated = pipe(PHOTO[:5, :9], df=0.5, K=1.0)
    assert estimated.disparity.shape == (1, 1, 5, 9)


@pytest.mark.parametrize("kind", ["relative", "metric"])
def test_a_depth_estimator_is_asked_instead(kind):
    pipe = BokehFlowPipeline(tiny_flow())
    pipe.depth_estimator = DepthEstimator(tiny_depth_network(kind), tiny_depth_processor())
    found = pipe.depth_estimator(PHOTO)
    output = pipe(PHOTO, focus=(20, 30), K=2.0, output_type="pt")
    assert output.metric is (kind == "metric")
    assert torch.equal(output.disparity, found.disparity)
    given = pipe(
        PHOTO, found.disparity, focus=(20, 30), K=2.0, metric=found.metric, output_type="pt"
    )
    assert torch.equal(output.images, given.images)
    if kind == "relative":
        with pytest.raises(ValueError, match="metric=True, but the depth model"):
            pipe(PHOTO, focus=(20, 30), metric=True)


def test_relative_disparity_keeps_every_radius(physics):
    """Nominal metres are what the network is told; the blur is K * |disparity - df| as always."""
    relative = rendered(physics, DF, K, preserve_detail=False)
    metric = physics(
        PHOTO, 2 * MAP, 2 * DF, K / 2, metric=True, preserve_detail=False, output_type="pt"
    ).images
    torch.testing.assert_close(relative, metric, rtol=0, atol=1e-5)


# -- The lens ------------------------------------------------------------------------------------


def test_what_is_in_focus_is_said_in_many_ways(pipe):
    expected = rendered(pipe, DF, 6.0)
    near_block = (16, 12, 32, 24)
    for focus in ((24, 18), near_block, DISPARITY > 0.5, "auto"):
        output = pipe(PHOTO, DISPARITY, focus=focus, K=6.0, output_type="pt")
        assert torch.equal(output.images, expected)
        torch.testing.assert_close(output.df, torch.tensor([DF]))
    sharpest = pipe(PHOTO, DISPARITY, focus="sharpest", K=6.0)
    assert 0.1 <= float(sharpest.df) <= 0.8


def test_a_range_and_a_whole_subject_are_kept(pipe):
    # Below the block and the reach of its blur all of the slope lies in the range.
    below = (slice(None), slice(34, None))
    in_range = rendered(pipe, focus_range=(0.1, 0.3), K=12.0)[0]
    assert torch.equal(in_range[below], TENSOR[0][below])
    assert (rendered(pipe, 0.1, 12.0)[0] - TENSOR[0])[below].abs().max() > 0.1
    assert torch.equal(rendered(pipe, focus_range=(0.0, 1.0), K=12.0), TENSOR)
    slope = np.zeros((HEIGHT, WIDTH), bool)
    slope[30:] = True
    kept = rendered(pipe, focus=slope, whole_subject=True, K=12.0)[0]
    assert torch.equal(kept[below], TENSOR[0][below])


def test_a_camera_is_a_strength(pipe, tmp_path):
    metres = MAP / 2
    camera = Camera(f_number=8.0, focal_length_mm=50)
    by_camera = pipe(PHOTO, metres, 0.4, camera=camera, metric=True, output_type="pt")
    # f^2 s / (2 N (s - f)) metres per 1/metre, focused at 2.5 m, on 36 mm for 64 pixels.
    strength = 0.05**2 * 2.5 / (2 * 8 * 2.45) * 1000 * WIDTH / 36
    torch.testing.assert_close(by_camera.K, torch.tensor([strength]))
    by_parts = pipe(
        PHOTO, metres, 0.4, f_number=8.0, focal_length_mm=50, metric=True, output_type="pt"
    )
    assert torch.equal(by_camera.images, by_parts.images)
    exif = PIL.Image.Exif()
    # FNumber, FocalLength, FocalLengthIn35mmFilm
    exif[0x8769] = {0x829D: 4.0, 0x920A: 50.0, 0xA405: 50}
    PIL.Image.fromarray(PHOTO).save(tmp_path / "photo.png", exif=exif)
    read = pipe(tmp_path / "photo.png", focus=(20, 30), f_number=8.0)
    wanted = Camera.from_photo(tmp_path / "photo.png", f_number=8.0)
    again = pipe(PHOTO, focus=(20, 30), camera=wanted)
    assert np.array_equal(np.asarray(read.images[0]), np.asarray(again.images[0]))
    with pytest.warns(InputRepairedWarning, match="2 m"):
        assumed = pipe(PHOTO, DISPARITY, DF, camera=camera)
    said = pipe(PHOTO, DISPARITY, DF, camera=camera, focus_distance_m=2.0)
    assert torch.equal(assumed.K, said.K)


def test_prepare_once_and_render_often(pipe):
    looks: list[int] = []
    handle = pipe.model.stem.register_forward_hook(lambda *_: looks.append(1))
    try:
        scene = pipe.prepare(PHOTO, DISPARITY)
        assert isinstance(scene, BokehFlowScene) and scene.size == (HEIGHT, WIDTH)
        settings = [(0.8, 12.0), (0.2, 12.0), (0.2, 5.0)]
        pictures = [pipe.render(scene, *one, output_type="pt").images for one in settings]
        planes, strengths = (list(values) for values in zip(*settings, strict=True))
        stack = pipe.render(scene, planes, strengths, output_type="pt")
    finally:
        handle.remove()
    assert len(looks) == 1
    assert torch.equal(stack.images, torch.cat(pictures))
    assert stack.df.shape == stack.K.shape == stack.clamped_share.shape == (3,)
    for picture, one in zip(pictures, settings, strict=True):
        assert torch.equal(picture, rendered(pipe, *one))


def test_alone_or_in_a_batch(pipe):
    other_photo, other_map = photo_and_disparity(HEIGHT, WIDTH, seed=1)
    maps = [DISPARITY, other_map[::-1].copy()]
    for given in (maps, None):
        together = pipe([PHOTO, other_photo], given, [0.8, 0.2], [12.0, 7.0], output_type="pt")
        assert together.images.shape == (2, 3, HEIGHT, WIDTH)
        for number, photo in enumerate((PHOTO, other_photo)):
            alone = pipe(
                photo, None if given is None else given[number], [0.8, 0.2][number],
                [12.0, 7.0][number], output_type="pt",
            )  # fmt: skip
            assert torch.equal(alone.images[0], together.images[number])
            assert torch.equal(alone.disparity[0], together.disparity[number])


def test_clamped_radii_are_told(pipe, recwarn):
    """12 px is the largest radius of a photo 64 pixels wide: the slope lies beyond, below 0.2."""
    beyond = float((MAP < 0.2).float().mean())
    assert 0.3 < beyond < 0.9
    output = pipe(PHOTO, DISPARITY, DF, 20.0)
    torch.testing.assert_close(output.clamped_share, torch.tensor([beyond]))
    (warning,) = [one for one in recwarn if one.category is InputRepairedWarning]
    sentence = str(warning.message)
    assert sentence.startswith(f"{100 * beyond:.3g} % of the pixels should be blurred wider")
    assert "12 px here" in sentence and "smaller K" in sentence
    recwarn.clear()
    barely = DISPARITY.clip(0.25)
    barely[0, :5] = 0.1  # 5 of 3072 pixels
    assert 0 < float(pipe(PHOTO, barely, DF, 20.0).clamped_share) < 0.01
    assert not recwarn.list


def test_an_aperture_has_a_shape():
    pipe = BokehFlowPipeline(untrained_flow(renderer="layered"))
    blades = Aperture(blades=5)
    picture = rendered(pipe, DF, K, aperture=blades, preserve_detail=False)
    blurred = painted_layers_blur(srgb_to_linear(TENSOR), K * (MAP - DF), aperture=blades)
    torch.testing.assert_close(picture, linear_to_srgb(blurred).clamp(0, 1), rtol=0, atol=1e-5)
    assert (picture - rendered(pipe, DF, K, preserve_detail=False)).abs().max() > 0.01


# -- Inputs and outputs --------------------------------------------------------------------------


def test_same_picture_from_every_kind_of_input(pipe, tmp_path):
    PIL.Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    np.save(tmp_path / "disparity.npy", DISPARITY)
    wanted = rendered(pipe, DF, K)
    for image, disparity in (
        (PIL.Image.fromarray(PHOTO), DISPARITY),
        (PHOTO.astype(np.float32) / 255, DISPARITY[..., None]),
        (TENSOR[0], MAP[0, 0]),
        (TENSOR, MAP),
        (tmp_path / "photo.png", str(tmp_path / "disparity.npy")),
        ([PHOTO], [DISPARITY]),
    ):
        picture = pipe(image, disparity, DF, K, output_type="pt").images
        torch.testing.assert_close(picture, wanted, rtol=0, atol=1e-6)


def test_output_types_agree(pipe):
    output = pipe(PHOTO, DISPARITY, DF, K, return_coc=True)
    assert isinstance(output, BokehFlowPipelineOutput)
    tensors = pipe(PHOTO, DISPARITY, DF, K, return_coc=True, output_type="pt")
    arrays = pipe(PHOTO, DISPARITY, DF, K, return_coc=True, output_type="np")
    for name in ("images", "coc"):
        (picture,), tensor, array = (getattr(one, name) for one in (output, tensors, arrays))
        assert isinstance(picture, PIL.Image.Image) and picture.size == (WIDTH, HEIGHT)
        assert array.shape == (1, HEIGHT, WIDTH, 3) and array.dtype == np.float32
        assert tensor.dtype == torch.float32 and 0 <= tensor.min() and tensor.max() <= 1
        assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
        assert np.array_equal(np.asarray(picture), np.rint(array[0] * 255))
    assert torch.equal(tensors.disparity, MAP) and not tensors.metric
    parts = pipe(PHOTO, DISPARITY, DF, K, output_type="pt", return_dict=False)
    assert torch.equal(parts[0], tensors.images) and torch.equal(parts[1], MAP) and len(parts) == 6
    assert pipe(PHOTO, DISPARITY, DF, K).coc is None


def test_circles_of_confusion_are_painted(pipe):
    photo = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    coc = pipe(photo, DISPARITY, 0.2, 12.0, return_coc=True, output_type="np").coc[0]
    block, above = coc[18, 24], coc[1, 60]
    assert block[2] > max(block[:2]), "in front: blue"
    assert above[0] > max(above[1:]), "behind: red"


def test_calls_change_nothing_and_draw_nothing(pipe):
    before = {name: value.clone() for name, value in pipe.model.state_dict().items()}
    state = torch.random.get_rng_state()
    first = pipe(PHOTO, df=0.5, K=5.0, output_type="pt").images
    assert torch.equal(pipe(PHOTO, df=0.5, K=5.0, output_type="pt").images, first)
    assert torch.equal(torch.random.get_rng_state(), state) and not first.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in pipe.model.state_dict().items())


def test_light_is_summed_in_float32_whatever_the_network(tmp_path):
    untrained_flow().save_pretrained(tmp_path)
    pipes = [
        BokehFlowPipeline.from_pretrained(tmp_path, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]
    assert [pipe.model.dtype for pipe in pipes] == [torch.float32, torch.bfloat16, torch.float16]
    whole, *halves = (rendered(pipe, DF, K) for pipe in pipes)
    for half in halves:
        assert half.dtype == torch.float32 and torch.equal(half, whole)


def test_half_precision_is_close(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    half = BokehFlowPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wanted = pipe(PHOTO, df=0.5, K=5.0, output_type="pt")
    found = half(PHOTO, df=0.5, K=5.0, output_type="pt")
    torch.testing.assert_close(found.disparity, wanted.disparity, rtol=0.1, atol=0.05)
    assert (found.images - wanted.images).abs().mean() < 0.02


@pytest.mark.gpu
def test_on_a_gpu(pipe):
    moved = BokehFlowPipeline(tiny_flow()).to("cuda")
    wanted = pipe(PHOTO, df=0.5, K=5.0, output_type="pt")
    found = moved(PHOTO, df=0.5, K=5.0, output_type="pt")
    assert found.images.device.type == "cuda"
    torch.testing.assert_close(found.images.cpu(), wanted.images, rtol=0, atol=5e-3)
    offloaded = BokehFlowPipeline(tiny_flow())
    offloaded.enable_model_cpu_offload()
    again = offloaded(PHOTO, df=0.5, K=5.0, output_type="pt").images
    assert torch.equal(again, found.images)
    assert offloaded.model.device.type == "cpu"


def test_offloaded_networks_are_brought_in():
    """Hooks act before forward only, and this pipeline calls other methods."""
    brought: list[int] = []

    class Counting(ModelHook):
        def pre_forward(self, module, *arguments, **words):
            brought.append(1)
            return arguments, words

    pipe = BokehFlowPipeline(tiny_flow())
    add_hook_to_module(pipe.model, Counting())
    try:
        scene = pipe.prepare(PHOTO)
        assert len(brought) == 1
        pipe.render(scene, 0.5, 5.0)
        assert len(brought) == 2
    finally:
        remove_hook_from_module(pipe.model)


# -- Mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(), "none was given"),
        (dict(df=0.5, focus="auto"), "df and focus"),
        (dict(df=0.5, f_number=2.0, camera=Camera(2.0, 50)), "parts of another"),
        (dict(df=0.5, f_number=2.0), "focal"),
        (dict(df=0.5, K=3.0, camera=Camera(2.0, 50)), "K and a camera"),
        (dict(df=1.5), r"df is 1\.5"),
        (dict(df=0.5, K=-1.0), "K is -1"),
        (dict(df=0.5, output_type="latent"), "output_type is 'latent'"),
        (dict(df=0.5, aperture=Aperture(blades=5)), "blurs with Gaussians .*leave it out"),
        (dict(df=0.5, aperture=5), "aperture is a int; wanted a bokehdiff.Aperture"),
        (dict(df=[0.1, 0.2], K=[1.0, 2.0, 3.0]), "df has shape"),
    ],
)
def test_mistakes(pipe, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        pipe(PHOTO, DISPARITY, **settings)


def test_other_mistakes(pipe):
    with pytest.raises(ValueError, match="render got a ndarray"):
        pipe.render(PHOTO, 0.5)
    with pytest.raises(ValueError, match="64 x 40 pixels"):
        pipe(PHOTO, DISPARITY[:40], 0.5)
    with pytest.raises(ValueError, match="NaN"):
        pipe(TENSOR * torch.nan, df=0.5)
    with pytest.raises(ValueError, match="model is a Linear; wanted a bokehdiff"):
        BokehFlowPipeline(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="generator"):
        pipe(PHOTO, DISPARITY, 0.5, generator=torch.Generator())


# -- Files ---------------------------------------------------------------------------------------


def test_saved_and_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipeline")
    pipe.model.save_pretrained(tmp_path / "network")
    wanted = pipe(PHOTO, df=0.5, K=5.0, output_type="pt").images
    for folder in ("pipeline", "network"):
        loaded = BokehFlowPipeline.from_pretrained(tmp_path / folder)
        assert isinstance(loaded, DiffusionPipeline) and not loaded.model.training
        assert torch.equal(loaded(PHOTO, df=0.5, K=5.0, output_type="pt").images, wanted)
        sibling = BokehFlowVideoPipeline.from_pretrained(tmp_path / folder)
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == "BokehFlowPipeline"
    assert index["model"] == ["bokehdiff.models.bokehflow", "BokehFlowModel"]
    sibling.save_pretrained(tmp_path / "sibling")
    again = BokehFlowPipeline.from_pretrained(tmp_path / "sibling")
    assert torch.equal(again(PHOTO, df=0.5, K=5.0, output_type="pt").images, wanted)
    shared = BokehFlowVideoPipeline.from_pipe(pipe)
    assert shared.model is pipe.model


def test_the_way_of_diffusers_loads_it_too(pipe, tmp_path):
    """Its index and folders are the usual ones."""
    pipe.save_pretrained(tmp_path)
    plain = DiffusionPipeline.from_pretrained.__func__(BokehFlowPipeline, tmp_path)
    wanted = pipe(PHOTO, df=0.5, K=5.0, output_type="pt").images
    found = plain(PHOTO, df=0.5, K=5.0, output_type="pt").images
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_folders_that_cannot_be(pipe, tmp_path):
    load = BokehFlowPipeline.from_pretrained
    with pytest.raises(ValueError, match="There is no folder"):
        load(tmp_path / "none")
    (tmp_path / "weights.pth").write_bytes(b"\x80\x02.")
    with pytest.raises(ValueError, match="is a file; wanted a folder.*FLOW_NANO"):
        load(tmp_path / "weights.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="could not be loaded as a network of BokehFlow"):
        load(tmp_path / "empty")
    with pytest.raises(ValueError, match="'nobody/nothing' could not be loaded"):
        load("nobody/nothing")

    def damaged(name: str) -> Path:
        pipe.model.save_pretrained(tmp_path / name)
        return tmp_path / name

    weights = "diffusion_pytorch_model.safetensors"
    folder = damaged("lacking")
    tensors = load_file(folder / weights)
    del tensors["depth_head.answer.bias"]
    save_file(tensors, folder / weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="depth_head.answer.bias"):
        load(folder)
    folder = damaged("too_much")
    save_file({**load_file(folder / weights), "more": torch.zeros(1)}, folder / weights,
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(ValueError, match="1 tensors are unexpected, among them more"):
        load(folder)
    folder = damaged("cut")
    (folder / weights).write_bytes((folder / weights).read_bytes()[:2000])
    with pytest.raises(ValueError, match="could not be loaded"):
        load(folder)
    folder = damaged("pickled")
    torch.save(load_file(folder / weights), folder / "diffusion_pytorch_model.bin")
    (folder / weights).unlink()
    with pytest.raises(ValueError, match="could not be loaded"):
        load(folder)
    folder = damaged("config")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="could not be loaded"):
        load(folder)
    folder = damaged("other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "UNet"}))
    with pytest.raises(ValueError, match="holds a model of type 'UNet'; wanted 'BokehFlowModel'"):
        load(folder)
    pipe.save_pretrained(tmp_path / "pipeline")
    shutil.rmtree(tmp_path / "pipeline" / "model")
    with pytest.raises(ValueError, match="could not be loaded"):
        load(tmp_path / "pipeline")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on this machine, with an empty cache."""
    with HubServer() as server:
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


def test_from_the_hub(pipe, tmp_path, hub):
    pipe.save_pretrained(tmp_path / "saved")
    for name, folder in (("owner/pipeline", "saved"), ("owner/network", "saved/model")):
        files = {
            str(path.relative_to(tmp_path / folder)): path.read_bytes()
            for path in (tmp_path / folder).rglob("*")
            if path.is_file()
        }
        hub.repositories[name] = Repository(files=files)
        loaded = BokehFlowPipeline.from_pretrained(name)
        wanted = pipe(PHOTO, df=0.5, K=5.0, output_type="pt").images
        assert torch.equal(loaded(PHOTO, df=0.5, K=5.0, output_type="pt").images, wanted)
    with pytest.raises(ValueError, match="'owner/nothing' could not be loaded"):
        BokehFlowPipeline.from_pretrained("owner/nothing")


def test_warnings_are_no_surprise(pipe):
    """An ordinary call says nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(PHOTO, DISPARITY, DF, 5.0)

"""What a person may give by mistake, and the sentence that the pipeline answers with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from bokehdiff import BokehDiffPipeline
from tests.tiny_models import photo_and_disparity, tiny_sdxl_components, tiny_unet

PHOTO, DISPARITY = photo_and_disparity(32, 48)


def with_value(value: float) -> np.ndarray:
    disparity = DISPARITY.copy()
    disparity[3, 5] = value
    return disparity


GOOD: dict[str, Any] = dict(image=PHOTO, disparity=DISPARITY, df=0.5, K=10.0)

# name: what differs from a good call, and a part of the sentence.
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no photo": (dict(image=None), "wanted"),
    "a number as photo": (dict(image=3), "wanted"),
    "an empty list of photos": (dict(image=[]), "(?i)empty|no photo|no image|at least one"),
    "photos of two sizes": (
        dict(image=[PHOTO, PHOTO[:, :40]], disparity=[DISPARITY, DISPARITY[:, :40]]),
        "same size|one size",
    ),
    "a photo of no pixels": (dict(image=np.zeros((0, 48, 3), np.uint8)), "0"),
    "a photo of five channels": (dict(image=PHOTO[..., [0, 1, 2, 0, 1]]), "wanted"),
    "a photo in [0, 255] as floats": (dict(image=PHOTO.astype(np.float32)), "255"),
    "a photo in [-1, 1]": (
        dict(image=torch.from_numpy(PHOTO).permute(2, 0, 1) / 127.5 - 1),
        r"\[0, 1\]",
    ),
    "NaN in the photo": (dict(image=np.full((32, 48, 3), np.nan, np.float32)), "NaN|finite"),
    "no disparity": (dict(disparity=None), "disparity"),
    "disparity of another size": (dict(disparity=DISPARITY[:16, :24]), "24 x 16"),
    "disparity turned by 90 degrees": (dict(disparity=DISPARITY.T.copy()), "swapped"),
    "disparity in [0, 255]": (dict(disparity=np.rint(DISPARITY * 255)), "divide by 255"),
    "depth in millimetres": (dict(disparity=1000 / (DISPARITY + 0.1)), r"wanted \[0, 1\]"),
    "negative disparity": (dict(disparity=with_value(-1.0)), "negative"),
    "disparity without a known pixel": (dict(disparity=DISPARITY * np.nan), "known|measured"),
    "a colour picture as disparity": (dict(disparity=PHOTO), "colour"),
    "two maps for one photo": (dict(disparity=[DISPARITY, DISPARITY]), "2"),
    "one map for two photos": (
        dict(image=[PHOTO, PHOTO, PHOTO], disparity=[DISPARITY, DISPARITY]),
        "2",
    ),
    "focus beyond the range": (dict(df=1.5), "df is 1.5"),
    "negative focus": (dict(df=-0.1), "df is -0.1"),
    "focus as a pixel position": (dict(df=(20, 10)), r"df is \[10, 20\]"),
    "focus unknown": (dict(df=float("nan")), "df is nan"),
    "no focus": (dict(df=None), "none was given"),
    "focus as text": (dict(df="near"), "df is 'near'"),
    "negative strength": (dict(K=-5.0), "K is -5"),
    "infinite strength": (dict(K=float("inf")), "K is inf"),
    "three strengths for two photos": (
        dict(image=[PHOTO, PHOTO], disparity=[DISPARITY, DISPARITY], K=[1.0, 2.0, 3.0]),
        "K has",
    ),
    "negative metric focus": (dict(df=-0.5, metric=True), "1/metres"),
    "metric disparity in millimetres": (dict(disparity=DISPARITY * 5000, metric=True), "1/metres"),
    "unknown output type": (dict(output_type="jpg"), "output_type is 'jpg'.*'pil'"),
    "a seed as generator": (dict(generator=42), "torch.Generator"),
    "a file that is not there": (dict(image="no_such_photo.jpg"), "no_such_photo.jpg"),
}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> BokehDiffPipeline:
    return BokehDiffPipeline(**tiny_sdxl_components(tmp_path_factory.mktemp("vocabulary")))


def test_the_good_call_is_good(pipe: BokehDiffPipeline) -> None:
    pipe(**GOOD)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused_before_any_work(pipe: BokehDiffPipeline, name: str) -> None:
    change, sentence = MISTAKES[name]
    work: list[int] = []
    handle = pipe.vae.encoder.register_forward_hook(lambda *_: work.append(1))
    try:
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            pipe(**{**GOOD, **change})
    finally:
        handle.remove()
    assert not work


def test_a_truncated_file_is_refused(pipe: BokehDiffPipeline, tmp_path: Path) -> None:
    PIL.Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    whole = (tmp_path / "photo.png").read_bytes()
    (tmp_path / "photo.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="photo.png is damaged or truncated"):
        pipe(tmp_path / "photo.png", DISPARITY, 0.5)


def test_render_takes_a_scene_not_a_photo(pipe: BokehDiffPipeline) -> None:
    with pytest.raises(ValueError, match="prepare"):
        pipe.render(PHOTO, 0.5)  # type: ignore[arg-type]
    scene = pipe.prepare(PHOTO, DISPARITY)
    with pytest.raises(ValueError, match="df is 2"):
        pipe.render(scene, 2.0)
    with pytest.raises(ValueError, match="K is -1"):
        pipe.render(scene, 0.5, -1.0)
    with pytest.raises(ValueError, match="output_type is 'tensor'"):
        pipe.render(scene, 0.5, output_type="tensor")


def an_empty_folder(folder: Path) -> Path:
    return folder


def a_folder_of_photos(folder: Path) -> Path:
    PIL.Image.fromarray(PHOTO).save(folder / "photo.png")
    return folder


def a_file(folder: Path) -> Path:
    (folder / "weights.safetensors").write_bytes(b"")
    return folder / "weights.safetensors"


def a_missing_folder(folder: Path) -> Path:
    return folder / "nothing"


def a_damaged_index(folder: Path) -> Path:
    (folder / "model_index.json").write_text('{"_class_name": "BokehDiff')
    return folder


def a_pipeline_of_another_kind(folder: Path) -> Path:
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def an_index_that_is_a_list(folder: Path) -> Path:
    (folder / "model_index.json").write_text("[]")
    return folder


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (an_empty_folder, "holds no pipeline.*it is empty"),
        (a_folder_of_photos, "holds no pipeline.*photo.png"),
        (a_file, "is a file"),
        (a_missing_folder, "There is no folder"),
        (a_damaged_index, "is damaged"),
        (a_pipeline_of_another_kind, "holds FluxPipeline, without vae, unet, scheduler"),
        (an_index_that_is_a_list, "holds no pipeline, without vae"),
    ],
)
def test_a_folder_that_is_no_model(
    make: Callable[[Path], Path], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        BokehDiffPipeline.from_pretrained(make(tmp_path))


def sdxl_parts(folder: Path, **changes: Any) -> dict[str, Any]:
    return {**tiny_sdxl_components(folder), **changes}


def test_a_unet_for_inpainting_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes 9 channels.*must take 4, or 132"):
        BokehDiffPipeline(**sdxl_parts(tmp_path, unet=tiny_unet(in_channels=9)))


def test_layers_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="middle_block"):
        BokehDiffPipeline(**sdxl_parts(tmp_path), pisa_layers="middle_block")


def test_unknown_pisa_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sharpness"):
        BokehDiffPipeline(**sdxl_parts(tmp_path), pisa={"sharpness": 3})


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_a_scheduler_of_another_prediction_is_refused(kind: str, tmp_path: Path) -> None:
    pipe = BokehDiffPipeline(**sdxl_parts(tmp_path, scheduler=DDPMScheduler(prediction_type=kind)))
    with pytest.raises(ValueError, match=f"{kind}.*'epsilon'"):
        pipe(**GOOD)


def test_a_scheduler_without_betas_is_refused(tmp_path: Path) -> None:
    pipe = BokehDiffPipeline(**sdxl_parts(tmp_path, scheduler=FlowMatchEulerDiscreteScheduler()))
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no noise schedule"):
        pipe(**GOOD)


def test_a_timestep_outside_the_schedule_is_refused(tmp_path: Path) -> None:
    pipe = BokehDiffPipeline(**sdxl_parts(tmp_path), timestep=1000)
    with pytest.raises(ValueError, match="timestep is 1000.*0 to 999"):
        pipe(**GOOD)


def test_a_pipeline_without_any_prompt_is_refused(tmp_path: Path) -> None:
    parts = sdxl_parts(tmp_path, text_encoder=None)
    with pytest.raises(ValueError, match="prompt embedding"):
        BokehDiffPipeline(**parts)(**GOOD)

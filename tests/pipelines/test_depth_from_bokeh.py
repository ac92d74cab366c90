"""DepthFromBokehPipeline around a tiny Depth Anything with DSFA of real classes."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from bokehdiff import TINY, BokehDiffPipeline, render_bokeh
from bokehdiff.depth import DepthEstimator
from bokehdiff.edge_aware_upsampling import upsample_to_photo
from bokehdiff.images import write_image
from bokehdiff.models.bokeh_adapter import BokehAdapter
from bokehdiff.models.depth_anything_dsfa import DepthAnythingDSFAForDepthEstimation
from bokehdiff.pipelines.bokeh_stack import BokehStackPipeline
from bokehdiff.pipelines.depth_from_bokeh import DepthFromBokehPipeline
from tests.tiny_depth import (
    known_answer,
    save_tiny_depth,
    tiny_depth_network,
    tiny_depth_processor,
)
from tests.tiny_depth_dsfa import save_tiny_dsfa, tiny_dsfa_network
from tests.tiny_flux import tiny_kontext_components

# Products in another order, in float32, over some layers; depths are up to 20 m.
ROUNDING = dict(rtol=1e-5, atol=1e-5)
HEIGHT, WIDTH = 105, 140
NETWORK_HEIGHT, NETWORK_WIDTH = 70, 98
"""The short side of 105 pixels becomes 70; the long one 93.3, to the nearest multiple of 14."""


@pytest.fixture(scope="module")
def pipe() -> DepthFromBokehPipeline:
    return DepthFromBokehPipeline(tiny_dsfa_network(), tiny_depth_processor())


def picture(seed: int, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """(1, 3, H, W): smooth blobs of 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 6, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (fine * 255).round() / 255


PHOTO = picture(0)
FRAMES = torch.cat([picture(seed) for seed in (1, 2, 3)])
K = [10.0, 20.0, 30.0]


def by_hand(
    network: Any, photo: torch.Tensor, frames: torch.Tensor, told: list[float]
) -> torch.Tensor:
    """Disparity (1, 1, H, W), from the network called as its documentation says."""
    levels = (torch.cat([photo, frames]) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    pixels = tiny_depth_processor()(
        [Image.fromarray(one) for one in levels], return_tensors="pt"
    ).pixel_values
    with torch.no_grad():
        depth = network(pixels[:1], pixels[None, 1:], torch.tensor([told])).predicted_depth
    return upsample_to_photo(1 / depth[:, None], photo)


def test_what_the_network_is_shown_and_told(pipe):
    out = pipe(PHOTO, FRAMES, K)
    told = [k * NETWORK_WIDTH / WIDTH for k in K]
    torch.testing.assert_close(out.network_K, torch.tensor([told]))
    assert out.network_size == (NETWORK_HEIGHT, NETWORK_WIDTH)
    wanted = by_hand(pipe.depth_model, PHOTO, FRAMES, told)
    torch.testing.assert_close(out.disparity, wanted, **ROUNDING)
    assert out.depth.shape == (1, 1, HEIGHT, WIDTH) and out.depth.dtype == torch.float32
    torch.testing.assert_close(out.depth, 1 / wanted, **ROUNDING)
    assert out.confidence is None and out.changes is None
    # The test could tell: strengths of the photo, or another order, give other depths.
    for other in (K, told[::-1]):
        assert not torch.allclose(
            by_hand(pipe.depth_model, PHOTO, FRAMES, other), wanted, rtol=1e-4
        )


def test_order_of_frames_does_not_matter_and_all_count(pipe):
    out = pipe(PHOTO, FRAMES, K).depth
    turned = pipe(PHOTO, FRAMES.flip(0), K[::-1]).depth
    torch.testing.assert_close(turned, out, **ROUNDING)
    for number in range(3):
        changed = FRAMES.clone()
        changed[number] = picture(9)
        assert (pipe(PHOTO, changed, K).depth / out - 1).abs().max() > 1e-3


@pytest.mark.parametrize("gray", [30, 128, 220])
def test_depth_is_in_metres(gray):
    """With its gates closed the network answers what is known of the photo alone."""
    pipe = DepthFromBokehPipeline(tiny_dsfa_network(gate=0), tiny_depth_processor())
    out = pipe(torch.full((1, 3, 60, 90), gray / 255), FRAMES[:1, :, :60, :90], K=5)
    metres = float(known_answer(gray / 255, "metric"))
    torch.testing.assert_close(out.depth, torch.full((1, 1, 60, 90), metres), **ROUNDING)
    torch.testing.assert_close(out.disparity, torch.full((1, 1, 60, 90), 1 / metres), **ROUNDING)


def test_without_a_stack_it_is_the_estimator_of_single_photos(pipe):
    plain = DepthEstimator(tiny_depth_network("metric"), tiny_depth_processor())
    out = pipe(PHOTO)
    torch.testing.assert_close(out.disparity, plain(PHOTO).disparity, **ROUNDING)
    assert out.network_K is None


def test_long_pictures_are_continued(pipe):
    """Beyond 8 to 1 the short side of the network's picture would vanish."""
    height, width, missing = 50, 1200, 100
    long, *frames = (picture(seed, height, width) for seed in (0, 1, 2))
    out = pipe(long, torch.cat(frames), [40, 80])
    assert out.depth.shape == (1, 1, height, width)
    assert out.network_size == (70, 560)  # of 150 x 1200
    torch.testing.assert_close(out.network_K, torch.tensor([[40.0, 80.0]]) * 560 / 1200)
    continued = [
        torch.cat([one, one[:, :, -1:].expand(-1, -1, missing, -1)], 2)
        for one in (long, torch.cat(frames))
    ]
    wanted = by_hand(pipe.depth_model, *continued, out.network_K[0].tolist())
    torch.testing.assert_close(out.disparity, wanted[:, :, :height], **ROUNDING)


def test_alone_or_in_a_batch(pipe):
    photos = torch.cat([PHOTO, picture(5)])
    stacks = torch.stack([FRAMES, FRAMES.flip(0)])
    both = [[10.0, 20, 30], [5.0, 6, 7]]
    out = pipe(photos, stacks, both)
    same = pipe(list(photos), [list(FRAMES), FRAMES.flip(0)], torch.tensor(both))
    assert torch.equal(out.depth, same.depth)
    for number in range(2):
        alone = pipe(photos[number], stacks[number], both[number])
        assert torch.equal(alone.depth, out.depth[number : number + 1])
        assert torch.equal(alone.network_K, out.network_K[number : number + 1])
    one_row = pipe(photos, stacks, K)
    assert torch.equal(one_row.network_K[0], one_row.network_K[1])


def test_files_of_every_kind(pipe, tmp_path):
    write_image(tmp_path / "photo.png", PHOTO)
    for number, frame in enumerate(FRAMES):
        write_image(tmp_path / f"{number}.png", frame)
    files = [tmp_path / "0.png", str(tmp_path / "1.png"), Image.open(tmp_path / "2.png")]
    out = pipe(tmp_path / "photo.png", files, K)
    torch.testing.assert_close(out.depth, pipe(PHOTO, FRAMES, K).depth, **ROUNDING)


def test_output_types(pipe):
    out = pipe(PHOTO, FRAMES, K)
    arrays = pipe(PHOTO, FRAMES, K, output_type="np")
    assert arrays.depth.shape == (1, HEIGHT, WIDTH) and arrays.depth.dtype == np.float32
    assert np.array_equal(arrays.disparity[0], out.disparity[0, 0].numpy())
    pictures = pipe(PHOTO, FRAMES, K, output_type="pil")
    assert pictures.depth[0].info["unit"] == "0.001 m"
    levels = torch.from_numpy(np.asarray(pictures.depth[0]).astype(np.float32))
    torch.testing.assert_close(levels / 1000, out.depth[0, 0], atol=0.51e-3, rtol=0)
    assert pictures.disparity[0].info["unit"] == "0.0001 1/m"
    depth, disparity, *_ = pipe(PHOTO, FRAMES, K, return_dict=False)
    assert torch.equal(depth, out.depth) and torch.equal(disparity, out.disparity)


def test_calls_change_nothing_and_draw_nothing(pipe):
    before = {name: value.clone() for name, value in pipe.depth_model.state_dict().items()}
    state = torch.random.get_rng_state()
    first = pipe(PHOTO, K=K, stack_from="pyramid", focus_distance_m=5).depth
    assert torch.equal(pipe(PHOTO, K=K, stack_from="pyramid", focus_distance_m=5).depth, first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(
        torch.equal(value, before[name]) for name, value in pipe.depth_model.state_dict().items()
    )
    assert not first.requires_grad


# -- Stacks that are made ------------------------------------------------------------------------


def test_a_rendered_stack_is_one_of_the_last_depth(pipe):
    disparity, changes = pipe(PHOTO).disparity, []
    for _ in range(2):
        frames = [render_bokeh(PHOTO, disparity, 0.25, k, method="scatter", metric=True) for k in K]
        before, disparity = disparity, pipe(PHOTO, torch.cat(frames), K).disparity
        changes.append((before / disparity - 1).abs().median())
    out = pipe(
        PHOTO, K=K, stack_from="scatter", focus_distance_m=4, iterations=2,
        stack_options={"highlights": None},
    )  # fmt: skip
    torch.testing.assert_close(out.disparity, disparity, **ROUNDING)
    torch.testing.assert_close(out.changes, torch.stack(changes)[:, None], **ROUNDING)
    assert float(out.changes[0]) > 1e-3


def test_a_rendered_stack_adds_nothing_to_a_network_that_sees_none():
    pipe = DepthFromBokehPipeline(tiny_dsfa_network(gate=0), tiny_depth_processor())
    photos = torch.cat([PHOTO, picture(4)])[..., :40, :56]
    out = pipe(photos, K=[8, 16], stack_from="layered", focus_distance_m=math.inf, iterations=2)
    assert torch.equal(out.changes, torch.zeros(2, 2))
    assert torch.equal(out.depth, pipe(photos).depth)


def test_a_stack_rendered_by_bokehdiff(pipe):
    renderer = BokehDiffPipeline.from_pretrained(TINY)
    renderer.set_progress_bar_config(disable=True)
    photo, options = PHOTO[..., :48, :64], {"preserve_detail": False}
    disparity = pipe(photo).disparity
    frames = renderer(
        photo, disparity, df=0.2, K=[8, 16], metric=True, output_type="pt", **options
    ).images
    out = pipe(photo, K=[8, 16], stack_from=renderer, focus_distance_m=5.0, stack_options=options)
    torch.testing.assert_close(out.depth, pipe(photo, frames, [8, 16]).depth, **ROUNDING)


def test_a_painted_stack(pipe, tmp_path):
    generator = torch.Generator().manual_seed(0)
    adapter = BokehAdapter(2, 2, width=32, context_width=8, rank=4, alpha=4.0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    painter = BokehStackPipeline(**tiny_kontext_components(tmp_path), bokeh_adapter=adapter.eval())
    painter.set_progress_bar_config(disable=True)
    photo, options = PHOTO[..., :32, :48], dict(num_inference_steps=2, max_sequence_length=32)

    def noise() -> torch.Generator:
        return torch.Generator().manual_seed(7)

    frames = painter(photo, K=[5, 9], generator=noise(), output_type="pt", **options).images
    out = pipe(photo, K=[5, 9], stack_from=painter, generator=noise(), stack_options=options)
    torch.testing.assert_close(out.depth, pipe(photo, frames, [5, 9]).depth, **ROUNDING)
    other = pipe(photo, K=[5, 9], stack_from=painter, stack_options=options)
    assert not torch.equal(other.depth, out.depth)


# -- Files ---------------------------------------------------------------------------------------


def test_saved_and_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipeline")
    loaded = DepthFromBokehPipeline.from_pretrained(tmp_path / "pipeline")
    wanted = pipe(PHOTO, FRAMES, K).depth
    assert torch.equal(loaded(PHOTO, FRAMES, K).depth, wanted)
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == "DepthFromBokehPipeline"
    assert isinstance(loaded, DiffusionPipeline)
    half = DepthFromBokehPipeline.from_pretrained(tmp_path / "pipeline", dtype=torch.bfloat16)
    assert half.depth_model.dtype == torch.bfloat16
    again = DepthFromBokehPipeline.from_pipe(loaded)
    assert torch.equal(again(PHOTO, FRAMES, K).depth, wanted)


def test_loaded_from_the_folder_of_a_network(pipe, tmp_path):
    loaded = DepthFromBokehPipeline.from_pretrained(save_tiny_dsfa(tmp_path))
    assert torch.equal(loaded(PHOTO, FRAMES, K).depth, pipe(PHOTO, FRAMES, K).depth)
    assert not loaded.depth_model.training


def test_folders_that_cannot_be(tmp_path):
    plain = save_tiny_depth(tmp_path / "plain", "metric")
    with pytest.raises(ValueError, match="'depth_anything', which sees no stack; wanted"):
        DepthFromBokehPipeline.from_pretrained(plain)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="could not be loaded as a depth network with DSFA"):
        DepthFromBokehPipeline.from_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="There is no folder"):
        DepthFromBokehPipeline.from_pretrained(tmp_path / "none" / "there" / "is")
    with pytest.raises(ValueError, match="'nobody/nothing' could not be loaded as a depth network"):
        DepthFromBokehPipeline.from_pretrained("nobody/nothing")
    (tmp_path / "weights.pth").write_bytes(b"\x80\x02.")
    with pytest.raises(ValueError, match=r"is a file; wanted a folder.*read_depth_anything_dsfa"):
        DepthFromBokehPipeline.from_pretrained(tmp_path / "weights.pth")
    folder = save_tiny_dsfa(tmp_path / "lacking")
    tensors = load_file(folder / "model.safetensors")
    del tensors["fusion.blocks.0.gamma_focus_attn"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 tensors are missing, among them fusion.blocks.0.gamma"):
        DepthFromBokehPipeline.from_pretrained(folder)
    folder = save_tiny_dsfa(tmp_path / "without_processor")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        DepthFromBokehPipeline.from_pretrained(folder)


def test_networks_that_cannot_be():
    with pytest.raises(ValueError, match="DepthAnythingForDepthEstimation, which sees no stack"):
        DepthFromBokehPipeline(tiny_depth_network("metric"), tiny_depth_processor())
    relative = DepthAnythingDSFAForDepthEstimation.from_depth_anything(
        tiny_depth_network("relative"), fusion_levels=[0], fusion_heads=2
    )
    with pytest.raises(ValueError, match="answers disparity without a unit"):
        DepthFromBokehPipeline(relative, tiny_depth_processor())
    with pytest.raises(ValueError, match="multiples of 16"):
        DepthFromBokehPipeline(tiny_dsfa_network(), tiny_depth_processor(ensure_multiple_of=16))


def test_an_answer_that_is_no_number():
    network = tiny_dsfa_network()
    with torch.no_grad():
        network.head.conv3.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="answered NaN or infinity"):
        DepthFromBokehPipeline(network, tiny_depth_processor())(PHOTO, FRAMES, K)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (dict(stack=FRAMES), "K is missing"),
        (dict(stack_from="layered", focus_distance_m=2), "K is missing"),
        (dict(K=K), "K was given without a stack"),
        (dict(stack=FRAMES, K=[10, 20]), "2 strengths K for 3 frames"),
        (dict(stack=FRAMES, K=[10, 20, math.nan]), "K is"),
        (dict(stack=FRAMES, K=[10, 20, -1]), "K is"),
        (dict(stack=FRAMES, K=[[10, 20, 30]] * 2), "2 rows of strengths for 1 photos"),
        (dict(stack=FRAMES, K=[[10, 20], [30]]), "K is"),
        (dict(stack=FRAMES, K="10"), "K is '10'"),
        (dict(stack=[FRAMES[0], FRAMES[1, :, :50]], K=[1, 2]), "Frame 2 is 140 x 50 pixels"),
        (dict(stack=[], K=[1]), "The stack is empty"),
        (dict(stack=FRAMES[None].expand(2, -1, -1, -1, -1), K=K), "2 stacks for 1 photos"),
        (dict(stack=FRAMES * math.nan, K=K), "NaN"),
        (dict(stack=FRAMES, K=K, stack_from="layered"), "both given"),
        (dict(K=K, stack_from="blender"), "stack_from is 'blender'; wanted a BokehStackPipeline"),
        (dict(K=K, stack_from="layered"), "focus_distance_m is missing"),
        (dict(K=K, stack_from="layered", focus_distance_m=0), "above 0"),
        (dict(K=K, stack_from="layered", focus_distance_m=[1, 2]), "2 numbers for 1 frames"),
        (dict(K=K, stack_from="layered", focus_distance_m=1, iterations=0), "iterations is 0"),
        (dict(stack=FRAMES, K=K, focus_distance_m=2), "not told at which distance"),
        (dict(stack=FRAMES, K=K, iterations=2), "iterations 2"),
        (dict(stack=FRAMES, K=K, stack_options={}), "give stack_from too"),
        (dict(stack=FRAMES, K=K, output_type="latent"), "output_type is 'latent'"),
    ],
)
def test_mistakes(pipe, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        pipe(PHOTO, **arguments)


def test_frames_in_files_are_named(pipe, tmp_path):
    write_image(tmp_path / "small.png", FRAMES[:1, :, :50])
    with pytest.raises(ValueError, match=r"small\.png is 140 x 50 pixels .*the photo 140 x 105"):
        pipe(PHOTO, [FRAMES[0], tmp_path / "small.png"], [1, 2])
    with pytest.raises(FileNotFoundError, match="none.png"):
        pipe(PHOTO, [tmp_path / "none.png"], 1)
    with pytest.raises(ValueError, match="one stack for 2 photos"):
        pipe(torch.cat([PHOTO, PHOTO]), FRAMES, K)

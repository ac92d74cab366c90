"""BokehStackPipeline around a tiny FLUX.1-Kontext of real classes and a random adapter."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxKontextPipeline

from bokehdiff import TINY
from bokehdiff.camera import Camera
from bokehdiff.colour_transfer import transfer_colours
from bokehdiff.models.bokeh_adapter import BokehAdapter, BokehCondition
from bokehdiff.optics import strength_from_camera
from bokehdiff.pipelines.bokeh_stack import BokehStackPipeline
from bokehdiff.pipelines.stack_inputs import working_size
from tests.tiny_bokeh_stack import trained_adapter
from tests.tiny_flux import tiny_kontext_components

STEPS = 2
TOKENS = 32
"""Of the text, one for each letter: its beginning, in which K stands."""
# Sums in another order, in float32, over a dozen layers and two steps of values around 1.
ROUNDING = dict(atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_kontext_components(tmp_path_factory.mktemp("kontext"))


def pipeline(parts: dict[str, Any], **changes: Any) -> BokehStackPipeline:
    pipe = BokehStackPipeline(**{**parts, "bokeh_adapter": trained_adapter(), **changes})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(parts: dict[str, Any]) -> BokehStackPipeline:
    return pipeline(parts)


def photo(width: int = 40, height: int = 24, seed: int = 0) -> torch.Tensor:
    """(1, 3, H, W): a gradient with noise, of 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0.2, 0.7, width).expand(1, 3, height, width)
    noisy = ramp + 0.1 * torch.randn(1, 3, height, width, generator=generator)
    return (noisy.clamp(0, 1) * 255).round() / 255


def stack(pipe: BokehStackPipeline, image: Any, K: Any = None, **options: Any) -> torch.Tensor:
    """The pictures as they were painted, (N, 3, H, W)."""
    values: dict[str, Any] = dict(
        num_inference_steps=STEPS,
        max_sequence_length=TOKENS,
        output_type="pt",
        colour_transfer=None,
        **options,
    )
    return pipe(image, K, **values).images


# -- Shapes and sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height"), [(48, 32), (37, 51), (51, 37), (5, 7), (1, 40), (200, 100), (90, 170)]
)
def test_a_stack_has_the_size_and_aspect_of_the_photo(
    pipe: BokehStackPipeline, width: int, height: int
) -> None:
    output = pipe(
        photo(width, height),
        K=[0, 30],
        num_inference_steps=1,
        max_sequence_length=TOKENS,
        max_area=64 * 64,
        output_type="pil",
    )
    assert [image.size for image in output.images] == [(width, height)] * 2
    rows, columns = output.network_size
    assert output.network_K == pytest.approx([0, 30 * columns / width])
    # The area holds the padding too; the shape is kept to within half a pixel of one side.
    assert math.prod(-(-side // 16) * 16 for side in (rows, columns)) <= 64 * 64
    assert abs(columns - width * rows / height) <= max(0.5, 0.5 * width / height) + 1e-9


@pytest.mark.parametrize("size", [(1024, 1024), (1920, 1080), (6000, 4000), (333, 2000), (16, 9)])
@pytest.mark.parametrize("max_area", [1024 * 1024, 512 * 512, 300_000])
def test_the_working_size_uses_the_area_and_keeps_the_shape(
    size: tuple[int, int], max_area: int
) -> None:
    width, height = size
    columns, rows = working_size(width, height, max_area, 16)

    def padded(*sides: int) -> int:
        return math.prod(-(-side // 16) * 16 for side in sides)

    assert padded(columns, rows) <= max_area
    assert columns <= width and rows <= height
    scale = max(columns / width, rows / height)
    assert min(abs(columns - width * rows / height), abs(rows - height * columns / width)) <= 0.5
    if scale < 1:
        # A multiple on one side, so nothing is wasted; one step larger would not fit.
        assert columns % 16 == 0 or rows % 16 == 0
        larger = min((columns // 16 + 1) * 16 / width, (rows // 16 + 1) * 16 / height)
        assert larger > 1 or padded(round(width * larger), round(height * larger)) > max_area


def test_padding_repeats_the_edge_and_is_cropped(pipe: BokehStackPipeline) -> None:
    """A photo whose sides are no multiples is the crop of the same photo with its edge repeated."""
    small = photo(40, 24)
    padded = F.pad(small, (0, 8, 0, 8), mode="replicate")
    torch.testing.assert_close(stack(pipe, small, 10.0), stack(pipe, padded, 10.0)[..., :24, :40])


@pytest.mark.parametrize("kind", ["path", "pil", "np", "pt", "list"])
def test_the_photo_may_be_of_any_kind(pipe: BokehStackPipeline, tmp_path: Path, kind: str) -> None:
    tensor = photo()
    array = (tensor[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    PIL.Image.fromarray(array).save(tmp_path / "photo.png")
    image = {
        "path": tmp_path / "photo.png",
        "pil": PIL.Image.fromarray(array),
        "np": array,
        "pt": tensor[0],
        "list": [array],
    }[kind]
    assert torch.equal(stack(pipe, image, 10), stack(pipe, tensor, 10))


def test_several_photos_are_refused(pipe: BokehStackPipeline) -> None:
    with pytest.raises(ValueError, match="There are 2 photos.*once for each"):
        pipe(torch.cat([photo(), photo()]), K=10)


def test_output_types_agree(pipe: BokehStackPipeline) -> None:
    image = photo(21, 19)
    options = dict(K=[0, 10, 30], num_inference_steps=STEPS, max_sequence_length=TOKENS)
    tensors = pipe(image, output_type="pt", **options).images
    arrays = pipe(image, output_type="np", **options).images
    pictures = pipe(image, **options).images
    assert tensors.shape == (3, 3, 19, 21) and tensors.dtype == torch.float32
    assert 0 <= tensors.min() and tensors.max() <= 1
    np.testing.assert_array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    for picture, array in zip(pictures, arrays, strict=True):
        np.testing.assert_array_equal(np.asarray(picture), np.rint(array * 255).astype(np.uint8))
    as_tuple = pipe(image, return_dict=False, output_type="pt", **options)
    assert torch.equal(as_tuple[0], tensors) and as_tuple[1] == [0.0, 10.0, 30.0]


# -- K ---------------------------------------------------------------------------------------------


def test_k_zero_returns_the_photo_itself(pipe: BokehStackPipeline) -> None:
    image = photo(37, 29)
    pictures = stack(pipe, image, [20, 0, 10, 0])
    assert torch.equal(pictures[1:2], image) and torch.equal(pictures[3:4], image)
    # The others do not know of them.
    torch.testing.assert_close(pictures[[0, 2]], stack(pipe, image, [20, 10]), **ROUNDING)
    assert torch.equal(pipe(image, 0.0, output_type="pt").images, image)  # nothing is painted


@pytest.mark.parametrize("K", [12.0, 12, np.float32(12), torch.tensor(12.0), [12], (12.0,)])
def test_one_strength_may_be_a_number(pipe: BokehStackPipeline, K: Any) -> None:
    output = pipe(photo(), K, num_inference_steps=1, max_sequence_length=TOKENS)
    assert output.K == [12.0] and len(output.images) == 1


@pytest.mark.parametrize(
    "K", [-1, [10, -0.5], math.nan, math.inf, [], "10", True, [[10, 20]], {"K": 10}, [10, None]]
)
def test_strengths_that_cannot_be_meant_are_refused(pipe: BokehStackPipeline, K: Any) -> None:
    with pytest.raises(ValueError, match=r"K is .*wanted one number or a list"):
        pipe(photo(), K)


def test_k_is_that_of_the_photo(pipe: BokehStackPipeline) -> None:
    """A photo of twice the size with twice the K is the same scene to the network."""
    large = photo(96, 64)
    output = pipe(
        large, [20.0, 40.0], max_area=48 * 32, num_inference_steps=STEPS,
        max_sequence_length=TOKENS, output_type="pt", colour_transfer=None,
    )  # fmt: skip
    assert output.network_size == (32, 48)
    assert output.network_K == [10.0, 20.0] and output.K == [20.0, 40.0]
    assert "dof_cond = 10.00 " in output.prompts[0] and "dof_cond = 20.00 " in output.prompts[1]
    small = F.interpolate(large, (32, 48), mode="bicubic", antialias=True).clamp(0, 1)
    painted = stack(pipe, small, [10.0, 20.0])
    wanted = F.interpolate(painted, (64, 96), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(output.images, wanted, **ROUNDING)


def test_strengths_beyond_the_training_are_refused_with_what_is_possible(
    pipe: BokehStackPipeline,
) -> None:
    large = photo(96, 64)
    for K in (1.9, 60.1, [10, 90]):
        with pytest.raises(ValueError, match=r"photo of 96 x 64; wanted 2 to 60.*at 48 x 32"):
            pipe(large, K, max_area=48 * 32)
    for K in (2.0, 60.0):
        pipe(large, K, max_area=48 * 32, num_inference_steps=1, max_sequence_length=TOKENS)
    # A ratio of widths that is no binary number: the limit itself is within the limits.
    output = pipe(
        photo(49, 33),
        30 * 49 / 48,
        max_area=48 * 32,
        num_inference_steps=1,
        max_sequence_length=TOKENS,
    )
    assert output.network_K[0] == pytest.approx(30 * 49 / 48 * output.network_size[1] / 49)


# -- K from a camera -------------------------------------------------------------------------------


def test_k_of_a_camera(pipe: BokehStackPipeline) -> None:
    camera = Camera(f_number=1.8, focal_length_mm=50)
    output = pipe(
        photo(40, 24), camera=camera, f_numbers=[0.1, 0.4, 0.9], focus_distance_m=2,
        num_inference_steps=1, max_sequence_length=TOKENS,
    )  # fmt: skip
    assert output.K == pytest.approx(
        [strength_from_camera(number, 50, 2, 36, 40) for number in (0.1, 0.4, 0.9)]
    )
    own = pipe(photo(40, 24), camera=Camera(0.9, 50), focus_distance_m=math.inf,
               num_inference_steps=1, max_sequence_length=TOKENS)  # fmt: skip
    assert own.K == pytest.approx([1000 * 0.05**2 / (2 * 0.9) * 40 / 36])


def photo_with_exif(path: Path, tags: dict[int, Any]) -> Path:
    exif = PIL.Image.Exif()
    for tag, value in tags.items():
        exif.get_ifd(0x8769)[tag] = value
    PIL.Image.new("RGB", (40, 24), (90, 120, 40)).save(path, exif=exif.tobytes())
    return path


def test_k_of_exif_data(pipe: BokehStackPipeline, tmp_path: Path) -> None:
    # FNumber, FocalLength, FocalLengthIn35mmFilm, SubjectDistance
    tags = {0x829D: 1.4, 0x920A: 85.0, 0xA405: 85, 0x9206: 2.5}
    path = photo_with_exif(tmp_path / "photo.jpg", tags)
    width_mm = 43.27 / math.sqrt(1 + (24 / 40) ** 2)  # of a 35 mm frame of the photo's shape
    wanted = strength_from_camera(1.4, 85, 2.5, width_mm, 40)
    assert pipe(path, num_inference_steps=1, max_sequence_length=TOKENS).K == pytest.approx(
        [wanted], rel=1e-4
    )
    both = pipe(
        path,
        f_numbers=[1.4, 0.7],
        focus_distance_m=2.5,
        num_inference_steps=1,
        max_sequence_length=TOKENS,
    )
    assert both.K == pytest.approx([wanted, 2 * wanted], rel=1e-4)
    silent = photo_with_exif(tmp_path / "silent.jpg", {0x829D: 1.4, 0x920A: 85.0, 0xA405: 85})
    with pytest.raises(ValueError, match="focus_distance_m"):
        pipe(silent)
    with pytest.raises(ValueError, match="no EXIF data"):
        pipe(photo())
    with pytest.raises(ValueError, match="f_number is 0"):
        pipe(path, f_numbers=[2.8, 0])
    with pytest.raises(ValueError, match="focus_distance_m is -1"):
        pipe(path, focus_distance_m=-1)
    with pytest.raises(ValueError, match="K was given, and a camera"):
        pipe(path, K=10, f_numbers=[2.8])


# -- Noise, batches and determinism ----------------------------------------------------------------


def test_the_same_call_gives_the_same_stack_and_touches_no_global_randomness(
    pipe: BokehStackPipeline,
) -> None:
    before = torch.get_rng_state()
    first = stack(pipe, photo(), [10, 30])
    again = stack(pipe, photo(), [10, 30])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    seeded = stack(pipe, photo(), [10, 30], generator=torch.Generator().manual_seed(42))
    assert torch.equal(seeded, first)
    other = stack(pipe, photo(), [10, 30], generator=torch.Generator().manual_seed(43))
    assert (other - first).abs().mean() > 0.01


def test_one_generator_gives_every_strength_the_same_noise_and_a_list_its_own(
    pipe: BokehStackPipeline,
) -> None:
    def seeds(*numbers: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(number) for number in numbers]

    same = stack(pipe, photo(), [10, 10], prompt="blur")
    torch.testing.assert_close(same[0], same[1], **ROUNDING)
    own = stack(pipe, photo(), [10, 0, 10], generator=seeds(1, 2, 3), prompt="blur")
    for number, seed in ((0, 1), (2, 3)):
        alone = stack(pipe, photo(), 10, generator=seeds(seed)[0], prompt="blur")
        torch.testing.assert_close(own[number], alone[0], **ROUNDING)
    assert (own[0] - own[2]).abs().mean() > 0.01
    with pytest.raises(ValueError, match="one for each of the 2 K"):
        stack(pipe, photo(), [10, 20], generator=seeds(1, 2, 3))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 9])
@pytest.mark.parametrize("own_noise", [False, True])
def test_batches_change_nothing(pipe: BokehStackPipeline, batch_size: int, own_noise: bool) -> None:
    K = [5, 0, 10, 20, 30]

    def generator() -> Any:
        return [torch.Generator().manual_seed(one) for one in range(5)] if own_noise else None

    at_once = stack(pipe, photo(), K, generator=generator())
    in_batches = stack(pipe, photo(), K, generator=generator(), batch_size=batch_size)
    torch.testing.assert_close(in_batches, at_once, **ROUNDING)


# -- What the adapter does -------------------------------------------------------------------------


def test_it_is_stock_kontext_and_the_adapter_told_a_thirtieth_of_k(
    pipe: BokehStackPipeline, parts: dict[str, Any]
) -> None:
    image, text = photo(48, 32), "a blurred background"

    def stock(**options: Any) -> torch.Tensor:
        kontext = FluxKontextPipeline(**parts)
        kontext.set_progress_bar_config(disable=True)
        painted: torch.Tensor = kontext(
            image=image, prompt=text, height=32, width=48, max_area=48 * 32, _auto_resize=False,
            num_inference_steps=STEPS, max_sequence_length=TOKENS, guidance_scale=7.0,
            output_type="pt", generator=torch.Generator().manual_seed(42), **options,
        ).images  # fmt: skip
        return painted

    silent = stack(pipe, image, 10, prompt=text, lora_scale=0.0, bokeh_scale=0.0)
    torch.testing.assert_close(silent, stock(), **ROUNDING)
    embedding = pipe.bokeh_adapter.embed(torch.tensor([10 / 30])).detach()
    for scales in (dict(), dict(lora_scale=0.5, bokeh_scale=0.25)):
        condition = BokehCondition(embedding, **scales)
        wanted = stock(joint_attention_kwargs={"bokeh": condition})
        told = stack(pipe, image, 10, prompt=text, **scales)
        torch.testing.assert_close(told, wanted, **ROUNDING)
        assert (told - silent).abs().mean() > 1e-3


def test_the_network_follows_k_through_the_adapter_alone(pipe: BokehStackPipeline) -> None:
    """With one text for all, pictures differ by K; more K moves them farther from the least."""
    pictures = stack(pipe, photo(), [1, 10, 20, 30], prompt="blur")
    distances = [float((one - pictures[0]).abs().mean()) for one in pictures[1:]]
    assert 1e-4 < distances[0] < distances[1] < distances[2]
    deaf = stack(pipe, photo(), [1, 30], prompt="blur", bokeh_scale=0.0)
    torch.testing.assert_close(deaf[0], deaf[1], **ROUNDING)


def test_a_fresh_adapter_changes_nothing(parts: dict[str, Any]) -> None:
    fresh = BokehAdapter.for_transformer(
        parts["transformer"], rank=4, generator=torch.Generator().manual_seed(0)
    )
    with_fresh = pipeline(parts, bokeh_adapter=fresh)
    told = stack(with_fresh, photo(), [1, 30], prompt="blur")
    torch.testing.assert_close(told[0], told[1], **ROUNDING)


def test_without_an_adapter_nothing_is_painted(parts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="load_bokeh_adapter"):
        pipeline(parts, bokeh_adapter=None)(photo(), 10)


def test_pipelines_that_share_a_transformer_keep_their_adapters(parts: dict[str, Any]) -> None:
    first = pipeline(parts, bokeh_adapter=trained_adapter(0))
    of_first = stack(first, photo(), 10)
    second = pipeline(parts, bokeh_adapter=trained_adapter(1))
    of_second = stack(second, photo(), 10)
    assert (of_first - of_second).abs().mean() > 1e-3
    assert torch.equal(stack(first, photo(), 10), of_first)
    assert torch.equal(stack(second, photo(), 10), of_second)


def test_there_is_no_true_guidance(pipe: BokehStackPipeline) -> None:
    """Its negative branch would be told the K of the positive one."""
    with pytest.raises(TypeError, match="true_cfg_scale"):
        pipe(photo(), 10, true_cfg_scale=4.0)  # type: ignore[call-arg]


# -- Text ------------------------------------------------------------------------------------------


def test_texts_say_k_and_may_be_of_ones_own(pipe: BokehStackPipeline) -> None:
    output = pipe(photo(), [10, 20.126], num_inference_steps=1, max_sequence_length=TOKENS)
    assert output.prompts == [
        f"Set dof_cond = {K} (stronger background defocus); preserve subject sharpness; keep "
        "composition, lighting, and colors unchanged."
        for K in ("10.00", "20.13")
    ]
    own = pipe(
        photo(), [10, 20], prompt=["a {K}", "b"], num_inference_steps=1, max_sequence_length=TOKENS
    )
    assert own.prompts == ["a 10.00", "b"]
    said = stack(pipe, photo(), 10, prompt="abc")
    assert (said - stack(pipe, photo(), 10, prompt="xyz")).abs().max() > 1e-4
    with pytest.raises(ValueError, match="one for each of the 2 K"):
        pipe(photo(), [10, 20], prompt=["a", "b", "c"])
    with pytest.raises(ValueError, match="wanted one of the two ways"):
        pipe(photo(), [10, 20], prompt_embeds=torch.zeros(1, 4, 24))


def test_embeddings_take_the_place_of_the_text_encoders(
    pipe: BokehStackPipeline, parts: dict[str, Any], tmp_path: Path
) -> None:
    texts = ["a 10", "b", "a 30"]
    embeds, pooled, _ = pipe.encode_prompt(texts, max_sequence_length=TOKENS)
    wanted = stack(pipe, photo(), [10, 0, 30], prompt=texts)
    absent = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipeline(parts, **absent).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "text_encoder_2").exists()
    small = BokehStackPipeline.from_pretrained(tmp_path / "saved")
    given = dict(prompt_embeds=embeds, pooled_prompt_embeds=pooled)
    torch.testing.assert_close(stack(small, photo(), [10, 0, 30], **given), wanted, **ROUNDING)
    # One embedding for all K.
    shared = {name: value[:1] for name, value in given.items()}
    both = stack(small, photo(), [10, 30], **shared)
    torch.testing.assert_close(both[0], wanted[0], **ROUNDING)
    with pytest.raises(ValueError, match="no text encoders"):
        small(photo(), 10)
    with pytest.raises(ValueError, match="first is 1 or the number of K, 2"):
        small(photo(), [10, 30], **given)


# -- Colours ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", ["lab", "lab_mean"])
def test_the_colours_of_the_photo_are_put_back(pipe: BokehStackPipeline, statistics: Any) -> None:
    image = photo()
    plain = pipe(
        image, [10, 0], num_inference_steps=STEPS, max_sequence_length=TOKENS, colour_transfer=None
    ).images
    moved = pipe(
        image,
        [10, 0],
        num_inference_steps=STEPS,
        max_sequence_length=TOKENS,
        colour_transfer=statistics,
    ).images
    reference = (image[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    wanted = transfer_colours(np.asarray(plain[0]), reference, statistics)
    np.testing.assert_array_equal(np.asarray(moved[0]), wanted)
    np.testing.assert_array_equal(np.asarray(moved[1]), reference)
    if statistics == "lab":  # the default
        by_default = pipe(
            image, [10], num_inference_steps=STEPS, max_sequence_length=TOKENS
        ).images[0]
        np.testing.assert_array_equal(np.asarray(by_default), wanted)


# -- Files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bokeh_lora.bin", "adapter.safetensors"])
def test_an_adapter_comes_and_goes(parts: dict[str, Any], tmp_path: Path, name: str) -> None:
    pipe = pipeline(parts)
    wanted = stack(pipe, photo(), [10, 30])
    pipe.save_bokeh_adapter(tmp_path / name)
    with pytest.raises(FileExistsError):
        pipe.save_bokeh_adapter(tmp_path / name)
    pipe.unload_bokeh_adapter()
    assert pipe.bokeh_adapter is None
    assert not any(
        "Bokeh" in type(one).__name__ for one in pipe.transformer.attn_processors.values()
    )
    with pytest.raises(ValueError, match="load_bokeh_adapter"):
        pipe.save_bokeh_adapter(tmp_path / "none.safetensors")
    pipe.load_bokeh_adapter(tmp_path / name)
    assert torch.equal(stack(pipe, photo(), [10, 30]), wanted)


def test_an_adapter_that_does_not_fit_changes_nothing(
    parts: dict[str, Any], tmp_path: Path
) -> None:
    pipe = pipeline(parts)
    wanted = stack(pipe, photo(), 10)
    wide = BokehAdapter(2, 2, width=48, context_width=8, rank=4, alpha=4.0)
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="48 channels"):
        pipe.load_bokeh_adapter(tmp_path / "wide")
    with pytest.raises(ValueError, match="no file or folder"):
        pipe.load_bokeh_adapter(tmp_path / "nowhere" / "bokeh_lora.bin")
    assert torch.equal(stack(pipe, photo(), 10), wanted)
    with pytest.raises(ValueError, match="48 channels"):
        pipeline(parts, bokeh_adapter=wide)


def test_the_adapter_takes_the_dtype_of_the_transformer(
    parts: dict[str, Any], tmp_path: Path
) -> None:
    pipe = pipeline(parts)
    pipe.save_pretrained(tmp_path / "saved")
    pipe.save_bokeh_adapter(tmp_path / "adapter.safetensors")
    half = BokehStackPipeline.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert half.bokeh_adapter.dtype == torch.bfloat16
    half.load_bokeh_adapter(tmp_path / "adapter.safetensors")
    assert half.bokeh_adapter.dtype == torch.bfloat16
    pictures = stack(half, photo(), [10, 30])
    assert pictures.dtype == torch.float32 and bool(torch.isfinite(pictures).all())
    # Eight bits of mantissa through four blocks and two steps.
    assert (pictures - stack(pipe, photo(), [10, 30])).abs().mean() < 0.05


def test_a_saved_pipeline_brings_its_adapter_along(
    parts: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pipe = pipeline(parts)
    wanted = stack(pipe, photo(), [10, 30])
    pipe.save_pretrained(tmp_path / "ours")
    loaded = BokehStackPipeline.from_pretrained(tmp_path / "ours")
    assert torch.equal(stack(loaded, photo(), [10, 30]), wanted)
    # The transformer's own files stay those of the base model.
    assert not any("adapter" in name for name in loaded.transformer.state_dict())

    stock = FluxKontextPipeline.from_pretrained(tmp_path / "ours")
    assert "bokeh_adapter" not in stock.components
    stock.save_pretrained(tmp_path / "stock")
    without = BokehStackPipeline.from_pretrained(tmp_path / "stock")
    assert without.bokeh_adapter is None
    with_adapter = BokehStackPipeline.from_pretrained(
        tmp_path / "stock", bokeh_adapter=loaded.bokeh_adapter
    )
    assert torch.equal(stack(with_adapter, photo(), [10, 30]), wanted)


def test_from_pipe_shares_the_parts(parts: dict[str, Any]) -> None:
    pipe = pipeline(parts)
    wanted = stack(pipe, photo(), 10)
    copy = BokehStackPipeline.from_pipe(pipe)
    assert copy.transformer is pipe.transformer and copy.bokeh_adapter is pipe.bokeh_adapter
    assert torch.equal(stack(copy, photo(), 10), wanted)
    stock = FluxKontextPipeline.from_pipe(pipe)
    of_stock = BokehStackPipeline.from_pipe(stock, bokeh_adapter=pipe.bokeh_adapter)
    assert torch.equal(stack(of_stock, photo(), 10), wanted)


def test_folders_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no folder"):
        BokehStackPipeline.from_pretrained("./nowhere")
    with pytest.raises(ValueError, match="no model_index.json"):
        BokehStackPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BokehDiffPipeline, without transformer"):
        BokehStackPipeline.from_pretrained(TINY)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        BokehStackPipeline.from_pretrained(tmp_path)


# -- Switches and state ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload_paints_the_same(parts: dict[str, Any], tmp_path: Path, kind: str) -> None:
    pipeline(parts).save_pretrained(tmp_path)
    pipe = BokehStackPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    wanted = stack(pipe, photo(), [10, 30])
    pipe.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type=kind,
        num_blocks_per_group=1 if kind == "block_level" else None,
    )  # fmt: skip
    torch.testing.assert_close(stack(pipe, photo(), [10, 30]), wanted, **ROUNDING)
    # Hooks on the adapter would wait for a call of the whole.
    assert any(hasattr(one, "_diffusers_hook") for one in pipe.transformer.modules())
    assert not any(hasattr(one, "_diffusers_hook") for one in pipe.bokeh_adapter.modules())


@pytest.mark.gpu
@pytest.mark.parametrize("switch", ["none", "model", "sequential", "group"])
def test_the_adapter_is_where_the_transformer_computes(
    parts: dict[str, Any], tmp_path: Path, switch: str
) -> None:
    pipeline(parts).save_pretrained(tmp_path)
    pipe = BokehStackPipeline.from_pretrained(tmp_path)
    pipe.save_bokeh_adapter(tmp_path / "adapter.safetensors")
    wanted = stack(pipe, photo(), [10, 30])
    if switch == "none":
        pipe.to("cuda")
    elif switch == "model":
        pipe.enable_model_cpu_offload()
    elif switch == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        pipe.enable_group_offload(torch.device("cuda"), offload_type="leaf_level")
    # Another device rounds differently.
    torch.testing.assert_close(stack(pipe, photo(), [10, 30]).cpu(), wanted, atol=1e-3, rtol=0)
    # One that comes later is brought there too.
    pipe.load_bokeh_adapter(tmp_path / "adapter.safetensors")
    torch.testing.assert_close(stack(pipe, photo(), [10, 30]).cpu(), wanted, atol=1e-3, rtol=0)


def test_a_batch_that_does_not_fit_says_what_to_do(pipe: BokehStackPipeline) -> None:
    def full(*_: Any) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError, match="2 pictures of 48 x 32.*smaller batch_size"):
        stack(pipe, photo(), [10, 20], callback_on_step_end=full)


def test_fused_projections_paint_the_same(parts: dict[str, Any]) -> None:
    pipe = pipeline({**parts, "transformer": type(parts["transformer"]).from_config(
        parts["transformer"].config)})  # fmt: skip
    pipe.transformer.load_state_dict(parts["transformer"].state_dict())
    pipe.transformer.eval()
    wanted = stack(pipe, photo(), [10, 30])
    pipe.transformer.fuse_qkv_projections()
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(stack(pipe, photo(), [10, 30]), wanted, **ROUNDING)


def test_a_call_leaves_nothing_behind_even_if_it_fails(pipe: BokehStackPipeline) -> None:
    wanted = stack(pipe, photo(), [10, 30])
    steps: list[tuple[int, tuple[int, ...]]] = []

    def interrupted(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append((step, tuple(tensors["latents"].shape)))
        if step == 1:
            raise RuntimeError("no more")
        return tensors

    with pytest.raises(RuntimeError, match="no more"):
        stack(pipe, photo(), [10, 30], callback_on_step_end=interrupted, batch_size=1)
    assert [step for step, _ in steps] == [0, 1] and steps[0][1][0] == 1
    assert pipe.joint_attention_kwargs is None
    assert torch.equal(stack(pipe, photo(), [10, 30]), wanted)
    assert pipe.joint_attention_kwargs is None


def test_the_steps_are_shown(parts: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    pipe = pipeline(parts)
    pipe.set_progress_bar_config(disable=False)
    with contextlib.redirect_stdout(None):
        stack(pipe, photo(), [10, 30], batch_size=1)
    assert capfd.readouterr().err.count("2/2") == 2


@pytest.mark.parametrize(
    "options",
    [
        dict(output_type="latent"),
        dict(colour_transfer="rgb"),
        dict(num_inference_steps=0),
        dict(batch_size=0),
        dict(max_area=2.5),
        dict(max_area=100),
        dict(generator=3),
        dict(lora_scale=math.nan),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    pipe: BokehStackPipeline, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        pipe(photo(), 10, **options)

"""BokehDiffPipeline around a tiny SDXL of real classes and around the tiny network of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline

from bokehdiff import BokehDiffPipeline, BokehDiffPipelineOutput
from bokehdiff.attention import PisaAttnProcessor, PisaConfig, install_pisa, remove_pisa
from bokehdiff.models import AutoencoderSpaceToDepth, LightTransportUNet, StoredPrompt
from bokehdiff.optics import signed_defocus
from bokehdiff.pipelines import BokehScene
from tests.tiny_models import (
    PROMPT_CHANNELS,
    photo_and_disparity,
    tiny_sdxl_components,
    tiny_stock_pipeline,
    tiny_unet,
    tiny_vae,
)

DF, K = 0.8, 20.0
LEVEL = 1 / 255


def stored_prompt() -> StoredPrompt:
    generator = torch.Generator().manual_seed(3)
    return StoredPrompt.from_embeddings(
        "stored",
        torch.randn(1, 77, 2 * PROMPT_CHANNELS, generator=generator),
        torch.randn(1, PROMPT_CHANNELS, generator=generator),
    )


def small_pipeline(**changes: Any) -> BokehDiffPipeline:
    """Tiny SDXL without text encoders."""
    parts: dict[str, Any] = dict(
        vae=tiny_vae(),
        unet=tiny_unet(),
        scheduler=DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        stored_prompt=stored_prompt(),
    )
    pipe = BokehDiffPipeline(**{**parts, **changes})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def light_transport_pipeline() -> BokehDiffPipeline:
    """Our own network, untrained, behind the lossless codec."""
    torch.manual_seed(0)
    return small_pipeline(
        vae=AutoencoderSpaceToDepth(2),
        unet=LightTransportUNet(block_size=2, block_out_channels=(8, 8, 8)).eval(),
        pisa_layers="light_transport.attn",
    )


@pytest.fixture(scope="module")
def pipe() -> BokehDiffPipeline:
    return small_pipeline()


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain SDXL folder, written by diffusers' own pipeline."""
    folder = tmp_path_factory.mktemp("sdxl")
    tiny_stock_pipeline(folder / "vocabulary").save_pretrained(folder / "model")
    return folder / "model"


def render(pipe: BokehDiffPipeline, *arguments: Any, **options: Any) -> torch.Tensor:
    return pipe(*arguments, output_type="pt", **options).images


# -- The single step ---------------------------------------------------------------------------


def test_closed_form_factors_of_sdxl(pipe: BokehDiffPipeline) -> None:
    of_latents, of_noise = pipe.closed_form_step()
    alpha_bar = 0.27766943
    assert of_latents == pytest.approx(alpha_bar**-0.5, rel=1e-6)
    assert of_noise == pytest.approx((1 - alpha_bar) ** 0.5 / alpha_bar**0.5, rel=1e-6)


def test_closed_form_is_the_step_of_an_unclipped_ddpm_scheduler(pipe: BokehDiffPipeline) -> None:
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    scheduler.set_timesteps(timesteps=[499])
    latents, noise = 5 * torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    wanted = scheduler.step(noise, 499, latents, generator=generator).prev_sample
    of_latents, of_noise = pipe.closed_form_step()
    assert torch.allclose(of_latents * latents - of_noise * noise, wanted, atol=1e-5)


def test_nothing_of_the_scheduler_but_its_betas_matters(pipe: BokehDiffPipeline) -> None:
    euler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    assert small_pipeline(scheduler=euler).closed_form_step() == pipe.closed_form_step()


def test_latents_are_the_scaled_mode_of_the_posterior(pipe: BokehDiffPipeline) -> None:
    image = 2 * torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
    with torch.no_grad():
        wanted = pipe.vae.encode(image).latent_dist.mode() * 0.13025
        assert torch.equal(pipe.encode_latents(image), wanted)
        assert torch.allclose(
            pipe.decode_latents(wanted), pipe.vae.decode(wanted / 0.13025).sample, atol=1e-4
        )


def test_latent_statistics_of_a_codec_are_honoured() -> None:
    mean, deviation = [0.5, -1.0, 2.0, 0.0], [2.0, 3.0, 0.5, 1.0]
    pipe = small_pipeline(vae=tiny_vae(latents_mean=mean, latents_std=deviation))
    image = 2 * torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
    with torch.no_grad():
        mode = pipe.vae.encode(image).latent_dist.mode()
        shift, scale = (torch.tensor(one).view(1, 4, 1, 1) for one in (mean, deviation))
        latents = pipe.encode_latents(image)
        assert torch.allclose(latents, (mode - shift) * 0.13025 / scale, atol=1e-6)
        decoded = pipe.decode_latents(latents)
        assert torch.allclose(decoded, pipe.vae.decode(mode).sample, atol=1e-4)


def test_the_unet_is_told_timestep_size_prompt_and_scene(pipe: BokehDiffPipeline) -> None:
    seen: dict[str, Any] = {}

    def look(module: torch.nn.Module, positional: tuple, named: dict[str, Any]) -> None:
        seen.update(named, sample=positional[0], timestep=positional[1])

    handle = pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
    try:
        pipe(*photo_and_disparity(50, 70), DF, K)
    finally:
        handle.remove()
    assert seen["sample"].shape == (1, 4, 8, 10)
    assert seen["timestep"].tolist() == [499]
    conditions = seen["added_cond_kwargs"]
    assert conditions["time_ids"].tolist() == [[64, 80, 0, 0, 64, 80]]
    embeds, pooled = pipe.stored_prompt()
    assert torch.equal(seen["encoder_hidden_states"], embeds)
    assert torch.equal(conditions["text_embeds"], pooled)


def test_a_unet_with_more_channels_gets_disparity_and_defocus_concatenated() -> None:
    pipe = light_transport_pipeline()
    photo, disparity = photo_and_disparity(32, 48)
    seen: list[torch.Tensor] = []
    pipe.unet.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    pipe(photo, disparity, DF, K)
    maps = torch.nn.functional.pixel_shuffle(seen[0], 2)[0]
    assert torch.equal(maps[:3], torch.from_numpy(photo).permute(2, 0, 1) / 255 * 2 - 1)
    assert torch.equal(maps[3], torch.from_numpy(disparity))
    assert torch.equal(maps[4], signed_defocus(torch.from_numpy(disparity), DF, K))


def test_the_nearest_disparity_stays_below_one_for_the_occlusion_test() -> None:
    pipe = light_transport_pipeline()
    photo, _ = photo_and_disparity(16, 16)
    disparity = np.ones((16, 16), np.float32)
    seen: list[torch.Tensor] = []
    pipe.unet.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    pipe(photo, disparity, 0.5, 4.0)
    assert seen[0][:, 12:16].max() == pytest.approx(1 - 1e-3)
    assert seen[0][:, 16:].unique().tolist() == [2.0], "the blur knows the true disparity"


# -- K = 0, focus, blur ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [small_pipeline, light_transport_pipeline])
@pytest.mark.parametrize("size", [(64, 64), (45, 83)])
def test_no_blur_returns_the_photo(make, size: tuple[int, int]) -> None:
    photo, disparity = photo_and_disparity(*size)
    result = make()(photo, disparity, 0.3, 0.0, output_type="np").images[0]
    assert np.abs(result - photo / 255).max() <= LEVEL
    (picture,) = make()(photo, disparity, 0.3, 0.0).images
    assert np.array_equal(np.asarray(picture), photo)


def test_a_scene_wholly_in_focus_returns_the_photo(pipe: BokehDiffPipeline) -> None:
    photo, _ = photo_and_disparity()
    (picture,) = pipe(photo, np.full((64, 64), 0.4, np.float32), 0.4, 200.0).images
    assert np.array_equal(np.asarray(picture), photo)


def test_without_detail_the_codec_shows(pipe: BokehDiffPipeline) -> None:
    photo, disparity = photo_and_disparity()
    result = pipe(photo, disparity, DF, 0.0, preserve_detail=False, output_type="np").images[0]
    assert np.abs(result - photo / 255).max() > 10 * LEVEL


def test_blurred_regions_are_the_networks_own(pipe: BokehDiffPipeline) -> None:
    photo, _ = photo_and_disparity()
    disparity = np.full((64, 64), 0.2, np.float32)
    kept = render(pipe, photo, disparity, 0.9, 20.0)
    assert torch.equal(kept, render(pipe, photo, disparity, 0.9, 20.0, preserve_detail=False))


def test_more_strength_gives_more_blur() -> None:
    pipe = light_transport_pipeline()
    photo, disparity = photo_and_disparity(48, 48)
    roughness = [
        float(render(pipe, photo, disparity, 0.8, strength).diff(dim=-1).abs().mean())
        for strength in (0.0, 3.0, 9.0)
    ]
    assert roughness[0] > roughness[1] > roughness[2]


# -- prepare and render ------------------------------------------------------------------------


def test_prepare_then_render_is_the_call(pipe: BokehDiffPipeline) -> None:
    photo, disparity = photo_and_disparity(40, 56)
    scene = pipe.prepare(photo, disparity)
    assert isinstance(scene, BokehScene)
    assert scene.size == (40, 56) and scene.batch_size == 1
    for df, strength in ((0.8, 20.0), (0.2, 20.0), (0.2, 5.0)):
        rendered = pipe.render(scene, df, strength, output_type="pt").images
        assert torch.equal(rendered, render(pipe, photo, disparity, df, strength))


def test_refocusing_encodes_nothing_again() -> None:
    pipe = small_pipeline()
    encodings: list[int] = []
    # Codecs are called through encode(), which no forward hook of theirs sees.
    pipe.vae.encoder.register_forward_hook(lambda *_: encodings.append(1))
    scene = pipe.prepare(*photo_and_disparity())
    for df in (0.1, 0.5, 0.8):
        pipe.render(scene, df, K)
    assert len(encodings) == 1


def test_the_codecs_own_picture_is_decoded_once() -> None:
    pipe = small_pipeline()
    decodings: list[int] = []
    pipe.vae.decoder.register_forward_hook(lambda *_: decodings.append(1))
    scene = pipe.prepare(*photo_and_disparity())
    assert scene.codec_image is None and not decodings
    for df in (0.1, 0.8, 0.8):
        pipe.render(scene, df, K)
    assert len(decodings) == 4


def test_rendering_leaves_the_scene_as_it_was(pipe: BokehDiffPipeline) -> None:
    scene = pipe.prepare(*photo_and_disparity())
    before = [scene.image.clone(), scene.disparity.clone(), scene.latents.clone()]
    first = pipe.render(scene, DF, K, output_type="pt").images
    pipe.render(scene, 0.1, 50.0)
    assert torch.equal(pipe.render(scene, DF, K, output_type="pt").images, first)
    for one, other in zip(before, (scene.image, scene.disparity, scene.latents), strict=True):
        assert torch.equal(one, other)


# -- Inputs and outputs ------------------------------------------------------------------------


def test_same_picture_from_every_kind_of_input(pipe: BokehDiffPipeline, tmp_path: Path) -> None:
    photo, disparity = photo_and_disparity()
    PIL.Image.fromarray(photo).save(tmp_path / "photo.png")
    np.save(tmp_path / "disparity.npy", disparity)
    wanted = render(pipe, photo, disparity, DF, K)
    floats = torch.from_numpy(photo).permute(2, 0, 1) / 255
    for image, depth in (
        (PIL.Image.fromarray(photo), disparity),
        (photo.astype(np.float32) / 255, disparity[..., None]),
        (floats, torch.from_numpy(disparity)),
        (floats[None], torch.from_numpy(disparity)[None, None]),
        (tmp_path / "photo.png", tmp_path / "disparity.npy"),
        (str(tmp_path / "photo.png"), [disparity]),
        ([photo], [torch.from_numpy(disparity)]),
    ):
        assert torch.allclose(render(pipe, image, depth, DF, K), wanted, atol=1e-6)


def test_output_types_agree(pipe: BokehDiffPipeline) -> None:
    photo, disparity = photo_and_disparity(40, 56)
    output = pipe(photo, disparity, DF, K)
    assert isinstance(output, BokehDiffPipelineOutput)
    (picture,) = output.images
    assert isinstance(picture, PIL.Image.Image) and picture.size == (56, 40)
    array = pipe(photo, disparity, DF, K, output_type="np").images
    tensor = render(pipe, photo, disparity, DF, K)
    assert array.shape == (1, 40, 56, 3) and array.dtype == np.float32
    assert tensor.shape == (1, 3, 40, 56) and tensor.dtype == torch.float32
    assert 0 <= tensor.min() and tensor.max() <= 1
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(picture), np.rint(array[0] * 255))
    latents = pipe(photo, disparity, DF, K, output_type="latent").images
    assert latents.shape == (1, 4, 6, 8)


def test_tuple_output(pipe: BokehDiffPipeline) -> None:
    photo, disparity = photo_and_disparity()
    (images,) = pipe(photo, disparity, DF, K, output_type="pt", return_dict=False)
    assert torch.equal(images, render(pipe, photo, disparity, DF, K))


@pytest.mark.parametrize("size", [(1, 1), (7, 50), (16, 16), (33, 47), (64, 65)])
@pytest.mark.parametrize("make", [small_pipeline, light_transport_pipeline])
def test_output_has_the_size_of_the_input(make, size: tuple[int, int]) -> None:
    photo, disparity = photo_and_disparity(*size)
    (picture,) = make()(photo, disparity, DF, K).images
    assert picture.size == size[::-1]


@pytest.mark.parametrize("make", [small_pipeline, light_transport_pipeline])
def test_batch_of_two_equals_two_calls(make) -> None:
    pipe = make()
    first, second = photo_and_disparity(seed=0), photo_and_disparity(seed=1)
    maps = [first[1], second[1][::-1].copy()]
    together = render(pipe, [first[0], second[0]], maps, [0.8, 0.2], [20.0, 7.0])
    assert together.shape[0] == 2
    for one, image, disparity, df, strength in zip(
        together, (first[0], second[0]), maps, (0.8, 0.2), (20.0, 7.0), strict=True
    ):
        assert torch.allclose(one, render(pipe, image, disparity, df, strength)[0], atol=1e-4)


def test_same_bytes_twice(pipe: BokehDiffPipeline) -> None:
    photo, disparity = photo_and_disparity()
    first, second = (
        pipe(photo, disparity, DF, K, generator=torch.Generator().manual_seed(5)).images[0]
        for _ in range(2)
    )
    assert first.tobytes() == second.tobytes()
    assert first.tobytes() == pipe(photo, disparity, DF, K).images[0].tobytes()


def test_metric_disparity_gives_the_same_radii_as_its_normalised_form() -> None:
    pipe = light_transport_pipeline()
    photo, disparity = photo_and_disparity(32, 32)
    disparity = (disparity - disparity.min()) / (disparity.max() - disparity.min())
    metric = 0.05 + 2.5 * disparity
    rendered = render(pipe, photo, metric, 0.05 + 2.5 * 0.6, 8.0, metric=True)
    wanted = render(pipe, photo, disparity, 0.6, 20.0)
    assert torch.allclose(rendered, wanted, atol=1e-3)


def test_holes_in_the_disparity_are_filled_with_a_note(pipe: BokehDiffPipeline) -> None:
    photo, disparity = photo_and_disparity()
    disparity[3:6, 3:6] = np.nan
    with pytest.warns(UserWarning, match="filled"):
        images = render(pipe, photo, disparity, DF, K)
    assert torch.isfinite(images).all()


# -- PISA --------------------------------------------------------------------------------------


def test_pisa_sits_in_the_configured_self_attentions_only(pipe: BokehDiffPipeline) -> None:
    with_pisa = [
        name.removesuffix(".processor")
        for name, processor in pipe.unet.attn_processors.items()
        if isinstance(processor, PisaAttnProcessor)
    ]
    block = "down_blocks.1.attentions.0.transformer_blocks"
    assert {f"{block}.0.attn1", f"{block}.1.attn1"} <= set(with_pisa)
    assert all(name.startswith(block) for name in with_pisa)


def test_a_render_without_pisa_never_happens_silently() -> None:
    pipe = small_pipeline()
    photo, disparity = photo_and_disparity()
    scene = pipe.prepare(photo, disparity)
    before = pipe.render(scene, DF, K, output_type="pt").images
    remove_pisa(pipe.unet)
    with pytest.raises(RuntimeError, match="PISA"):
        pipe(photo, disparity, DF, K)
    with pytest.raises(RuntimeError, match="PISA"):
        pipe.render(scene, DF, K)
    with pytest.raises(RuntimeError, match="PISA"):
        pipe.render_tensors(
            torch.zeros(1, 3, 16, 16), torch.zeros(1, 1, 16, 16), torch.zeros(1), torch.zeros(1)
        )
    pipe.install_pisa()
    assert torch.equal(pipe.render(scene, DF, K, output_type="pt").images, before)


def test_the_scene_is_forgotten_after_the_call() -> None:
    pipe = small_pipeline()
    pipe(*photo_and_disparity(), DF, K)
    embeds, pooled = pipe.bokeh_prompt()
    conditions = {"text_embeds": pooled, "time_ids": torch.zeros(1, 6)}
    with pytest.raises(RuntimeError):
        pipe.unet(torch.zeros(1, 4, 8, 8), 499, embeds, added_cond_kwargs=conditions)


def test_disparity_and_radius_reach_pisa(pipe: BokehDiffPipeline) -> None:
    photo, disparity = photo_and_disparity()
    ordinary = render(pipe, photo, disparity, 0.9, 40.0, preserve_detail=False)
    for other in (
        render(pipe, photo, disparity, 0.9, 10.0, preserve_detail=False),
        render(pipe, photo, disparity[::-1].copy(), 0.9, 40.0, preserve_detail=False),
    ):
        assert not torch.allclose(other, ordinary, atol=1e-5)


def test_pisa_settings_are_kept_in_the_config(tmp_path: Path) -> None:
    settings = PisaConfig.preset("official_weights").to_dict()
    layers = ["down_blocks.1.attentions.0", "mid_block"]
    pipe = small_pipeline(pisa=settings, pisa_layers=layers, timestep=249)
    pipe.save_pretrained(tmp_path)
    loaded = BokehDiffPipeline.from_pretrained(tmp_path)
    assert loaded.pisa_layer_names == layers
    assert loaded.verify_pisa().config == PisaConfig.preset("official_weights")
    assert loaded.config.timestep == 249
    assert loaded.image_multiple == 32
    index = json.loads((tmp_path / "model_index.json").read_text())
    lists = [name for name, value in index.items() if isinstance(value, list)]
    assert set(lists) <= set(loaded.components), "diffusers takes each list for a component"


# -- Saving, loading, converting ---------------------------------------------------------------


def test_save_and_load(tmp_path: Path) -> None:
    photo, disparity = photo_and_disparity()
    pipe = small_pipeline()
    pipe.save_pretrained(tmp_path)
    loaded = BokehDiffPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.stored_prompt, StoredPrompt)
    assert torch.equal(
        render(loaded, photo, disparity, DF, K), render(pipe, photo, disparity, DF, K)
    )


def test_save_and_load_our_own_network(tmp_path: Path) -> None:
    photo, disparity = photo_and_disparity(32, 32)
    pipe = light_transport_pipeline()
    pipe.save_pretrained(tmp_path)
    loaded = BokehDiffPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.vae, AutoencoderSpaceToDepth)
    assert isinstance(loaded.unet, LightTransportUNet)
    assert torch.equal(
        render(loaded, photo, disparity, DF, K), render(pipe, photo, disparity, DF, K)
    )


def test_a_plain_sdxl_folder_loads(sdxl_folder: Path) -> None:
    pipe = BokehDiffPipeline.from_pretrained(sdxl_folder)
    assert pipe.stored_prompt is None
    assert pipe.config.timestep == 499
    assert pipe.image_multiple == 16
    photo, disparity = photo_and_disparity(60, 44)
    (picture,) = pipe(photo, disparity, DF, K).images
    assert picture.size == (44, 60)


def test_a_part_given_by_hand_need_not_be_in_the_folder(tmp_path: Path) -> None:
    small_pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["unet"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    unet = tiny_unet()
    assert BokehDiffPipeline.from_pretrained(tmp_path, unet=unet).unet is unet
    with pytest.raises(ValueError, match="without unet"):
        BokehDiffPipeline.from_pretrained(tmp_path)


def test_ours_loads_into_stock_sdxl(sdxl_folder: Path, tmp_path: Path) -> None:
    ours = BokehDiffPipeline.from_pretrained(sdxl_folder)
    ours.save_pretrained(tmp_path)
    stock = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    for name, tensor in ours.unet.state_dict().items():
        assert torch.equal(stock.unet.state_dict()[name], tensor)
    images = stock("a photo", num_inference_steps=1, height=32, width=32, output_type="np").images
    assert images.shape == (1, 32, 32, 3)


def test_from_pipe(tmp_path: Path) -> None:
    stock = tiny_stock_pipeline(tmp_path)
    pipe = BokehDiffPipeline.from_pipe(stock)
    assert pipe.unet is stock.unet
    photo, disparity = photo_and_disparity()
    wanted = render(pipe, photo, disparity, DF, K)
    again = BokehDiffPipeline.from_pipe(pipe)
    assert torch.equal(render(again, photo, disparity, DF, K), wanted)
    assert torch.equal(render(pipe, photo, disparity, DF, K), wanted)


def test_from_pipe_keeps_our_own_parts_and_settings() -> None:
    pipe = light_transport_pipeline()
    again = BokehDiffPipeline.from_pipe(pipe)
    assert again.vae is pipe.vae and again.unet is pipe.unet
    assert again.stored_prompt is pipe.stored_prompt
    assert again.pisa_layer_names == pipe.pisa_layer_names


def test_remove_pisa_gives_the_unet_back_to_other_pipelines(tmp_path: Path) -> None:
    stock = tiny_stock_pipeline(tmp_path)
    before = {name: type(one) for name, one in stock.unet.attn_processors.items()}
    pipe = BokehDiffPipeline.from_pipe(stock)
    remove_pisa(pipe.unet)
    assert {name: type(one) for name, one in stock.unet.attn_processors.items()} == before


# -- The prompt --------------------------------------------------------------------------------


def test_the_prompt_is_encoded_once(tmp_path: Path) -> None:
    pipe = BokehDiffPipeline(**tiny_sdxl_components(tmp_path))
    encodings: list[int] = []
    pipe.text_encoder.register_forward_hook(lambda *_: encodings.append(1))
    for _ in range(3):
        pipe(*photo_and_disparity(), DF, K)
    assert len(encodings) == 1
    wanted, _, pooled, _ = pipe.encode_prompt(
        "an excellent photo with a large aperture", do_classifier_free_guidance=False
    )
    ours, ours_pooled = pipe.bokeh_prompt()
    assert torch.equal(ours, wanted) and torch.equal(ours_pooled, pooled)


def test_the_stored_prompt_replaces_the_text_encoders(tmp_path: Path) -> None:
    photo, disparity = photo_and_disparity()
    pipe = BokehDiffPipeline(**tiny_sdxl_components(tmp_path / "vocabulary"))
    wanted = render(pipe, photo, disparity, DF, K)
    lean = BokehDiffPipeline(
        vae=pipe.vae,
        unet=pipe.unet,
        scheduler=pipe.scheduler,
        stored_prompt=pipe.make_stored_prompt(),
    )
    lean.save_pretrained(tmp_path / "lean")
    assert not (tmp_path / "lean" / "text_encoder").exists()
    loaded = BokehDiffPipeline.from_pretrained(tmp_path / "lean")
    assert loaded.stored_prompt.config.prompt == "an excellent photo with a large aperture"
    assert torch.allclose(render(loaded, photo, disparity, DF, K), wanted, atol=1e-6)


# -- Precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [small_pipeline, light_transport_pipeline])
def test_half_precision(make, dtype: torch.dtype, tmp_path: Path) -> None:
    photo, disparity = photo_and_disparity(32, 32)
    pipe = make()
    wanted = render(pipe, photo, disparity, DF, 6.0)
    pipe.save_pretrained(tmp_path)
    half = BokehDiffPipeline.from_pretrained(tmp_path, dtype=dtype)
    assert half.unet.dtype == half.vae.dtype == dtype
    result = render(half, photo, disparity, DF, 6.0)
    assert result.dtype == torch.float32
    assert half.unet.dtype == half.vae.dtype == dtype, "left as found"
    assert float((result - wanted).abs().mean()) < 0.03


def test_a_codec_that_overflows_in_half_precision_runs_in_float32(tmp_path: Path) -> None:
    pipe = small_pipeline()
    assert pipe.vae.config.force_upcast
    pipe.save_pretrained(tmp_path)
    half = BokehDiffPipeline.from_pretrained(tmp_path, dtype=torch.float16)
    seen: list[torch.dtype] = []
    for part in (half.vae.encoder, half.vae.decoder):
        part.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    half(*photo_and_disparity(), DF, K)
    assert set(seen) == {torch.float32}


# -- Training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [small_pipeline, light_transport_pipeline])
def test_gradients_flow_through_render_tensors(make) -> None:
    pipe = make()
    image = torch.rand(1, 3, 20, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    image.requires_grad_(True)
    disparity = torch.from_numpy(photo_and_disparity(20, 28)[1])[None, None]
    rendered = pipe.render_tensors(image, disparity, torch.tensor([0.8]), torch.tensor([6.0]))
    assert rendered.shape == image.shape
    rendered.square().mean().backward()
    assert image.grad is not None and torch.isfinite(image.grad).all()
    assert image.grad.abs().max() > 0
    gradients = [one.grad for one in pipe.unet.parameters() if one.grad is not None]
    assert gradients and any(float(one.abs().max()) > 0 for one in gradients)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    disparity = torch.from_numpy(photo_and_disparity(32, 32)[1])[None, None]
    found = []
    for checkpointing in (False, True):
        pipe = small_pipeline()
        pipe.unet.train()
        if checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        rendered = pipe.render_tensors(image, disparity, torch.tensor([0.8]), torch.tensor([20.0]))
        rendered.square().mean().backward()
        found.append(pipe.unet.conv_in.weight.grad)
    assert torch.allclose(*found, atol=1e-6)


def test_call_and_render_tensors_share_one_way(pipe: BokehDiffPipeline) -> None:
    photo, disparity = photo_and_disparity(40, 56)
    image = torch.from_numpy(photo).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        tensors = pipe.render_tensors(
            2 * image - 1,
            torch.from_numpy(disparity)[None, None],
            torch.tensor([DF]),
            torch.tensor([K]),
        )
    wanted = render(pipe, photo, disparity, DF, K, preserve_detail=False)
    assert torch.equal((tensors / 2 + 0.5).clamp(0, 1), wanted)


def test_the_call_records_no_gradient(pipe: BokehDiffPipeline) -> None:
    assert not render(pipe, *photo_and_disparity(), DF, K).requires_grad


def test_hardness_of_the_context_is_in_force() -> None:
    pipe = small_pipeline()
    photo, disparity = photo_and_disparity()
    sharp = render(pipe, photo, disparity, DF, K, preserve_detail=False)
    context = install_pisa(pipe.unet, pipe.pisa_layer_names, PisaConfig.preset("paper"))
    context.set_hardness(2)
    soft = render(pipe, photo, disparity, DF, K, preserve_detail=False)
    assert not torch.allclose(sharp, soft, atol=1e-6)


# -- Memory ------------------------------------------------------------------------------------


def test_group_offload_changes_nothing() -> None:
    photo, disparity = photo_and_disparity()
    wanted = render(small_pipeline(), photo, disparity, DF, K)
    pipe = small_pipeline()
    pipe.unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(render(pipe, photo, disparity, DF, K), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("switch", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.parametrize("make", [small_pipeline, light_transport_pipeline])
def test_cpu_offload_changes_nothing(make, switch: str) -> None:
    photo, disparity = photo_and_disparity()
    wanted = render(make().to("cuda"), photo, disparity, DF, K).cpu()
    pipe = make()
    getattr(pipe, switch)()
    for _ in range(2):
        assert torch.allclose(render(pipe, photo, disparity, DF, K).cpu(), wanted, atol=1e-4)


@pytest.mark.gpu
def test_same_picture_on_the_gpu() -> None:
    photo, disparity = photo_and_disparity()
    for make in (small_pipeline, light_transport_pipeline):
        wanted = render(make(), photo, disparity, DF, K)
        on_gpu = render(make().to("cuda"), photo, disparity, DF, K).cpu()
        assert torch.allclose(on_gpu, wanted, atol=2e-2)

"""Parts switched off and on again: the picture changes, and the pipeline afterwards has not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bokehdiff import BokehDiffPipeline
from bokehdiff.checkpoints import write_bokeh_weights
from bokehdiff.models import StoredPrompt, light_transport
from bokehdiff.models.light_transport_unet import LightTransportUNet
from bokehdiff.models.space_to_depth import AutoencoderSpaceToDepth
from evaluation.ablation_variants import FULL, Variant, variants_of
from tests.trained_pipelines import (
    assert_unchanged,
    base_pipeline,
    rendered,
    state_of,
    usual_weights,
)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> BokehDiffPipeline:
    folder = tmp_path_factory.mktemp("weights")
    write_bokeh_weights(usual_weights(), folder)
    pipe = base_pipeline()
    pipe.load_bokeh_weights(folder, adapter_name="trained")
    return pipe


@pytest.fixture(scope="module")
def local() -> BokehDiffPipeline:
    """The embedded checkpoint's kind, with layers that say something, behind a lossless codec."""
    torch.manual_seed(0)
    unet = LightTransportUNet(
        block_out_channels=(8, 8, 8), refiner_block_out_channels=(8, 8, 8)
    ).eval()
    # Of what each of the four pixels of a block may choose, its own value comes first.
    with torch.no_grad():
        unet.refiner.network.conv_out.bias[:4] = -50
    for part in (unet.correction, unet.emission, unet.light_transport.attn.to_k):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    return base_pipeline(
        vae=AutoencoderSpaceToDepth(2),
        unet=unet,
        stored_prompt=StoredPrompt.from_embeddings("p", torch.zeros(1, 1, 8), torch.zeros(1, 8)),
        pisa_layers="light_transport.attn",
    )


def photo_with_lamps() -> tuple[np.ndarray, np.ndarray]:
    """A near block, with a light on it and one behind, over a slanted far plane."""
    photo = np.random.default_rng(0).integers(0, 200, (64, 96, 3), dtype=np.uint8)
    photo[28:31, 40:43] = photo[20:22, 80:82] = 255
    disparity = np.linspace(0.1, 0.3, 96, dtype=np.float32)[None].repeat(64, 0)
    disparity[16:48, 24:64] = 0.8
    return photo, disparity


def local_rendered(pipe: BokehDiffPipeline) -> torch.Tensor:
    return pipe(*photo_with_lamps(), 0.6, 14.0, output_type="pt").images


def check_each(
    pipe: BokehDiffPipeline, variants: list[Variant], picture: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor]:
    full, before = picture(pipe), state_of(pipe)
    found = {}
    for variant in variants:
        with variant.applied(pipe):
            found[variant.name] = picture(pipe)
        assert_unchanged(pipe, dict(before))
        assert torch.equal(picture(pipe), full), f"{variant.name} leaves something behind"
        with pytest.raises(KeyboardInterrupt), variant.applied(pipe):
            raise KeyboardInterrupt
        assert_unchanged(pipe, dict(before))
    assert torch.equal(found.pop(FULL), full)
    for name, one in found.items():
        assert one.isfinite().all() and not torch.equal(one, full), f"{name} changes nothing"
    return found


def test_parts_of_a_stable_diffusion_xl(sdxl: BokehDiffPipeline, one_thread: None) -> None:
    variants, missing = variants_of(sdxl, "trained")
    found = check_each(sdxl, variants, rendered)
    assert missing == {}
    # These weights were made for T = 399, so that all three timesteps are others.
    names = ["no query softmax", "no CoC", "no occlusion"]
    assert list(found) == [*names, "T = 249", "T = 499", "T = 749", "fixed encoder"]
    pictures = list(found.values())
    for index, one in enumerate(pictures):
        assert not any(torch.equal(one, other) for other in pictures[:index])


def test_the_fixed_encoder_is_the_base_models(sdxl: BokehDiffPipeline, one_thread: None) -> None:
    variants, _ = variants_of(sdxl, "trained")
    photo = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    base = base_pipeline().encode_latents(photo)
    assert not torch.equal(sdxl.encode_latents(photo), base)
    with variants[-1].applied(sdxl):
        assert torch.equal(sdxl.encode_latents(photo), base)
        assert sdxl.config.timestep == 399, "all else is as trained"


def test_why_an_encoder_cannot_be_fixed(sdxl: BokehDiffPipeline, tmp_path: Path) -> None:
    assert "--bokeh-weights" in variants_of(sdxl)[1]["fixed encoder"]
    weights = usual_weights()
    weights = type(weights)(**{**vars(weights), "vae": {}})
    write_bokeh_weights(weights, tmp_path)
    pipe = base_pipeline()
    pipe.load_bokeh_weights(tmp_path, adapter_name="trained")
    assert variants_of(pipe, "trained")[1]["fixed encoder"] == "the encoder was not trained"


def test_parts_of_the_embedded_checkpoint(local: BokehDiffPipeline, one_thread: None) -> None:
    variants, missing = variants_of(local)
    guess = light_transport.hidden_surfaces
    own = [set(vars(local.unet)), set(vars(local.unet.light_transport))]
    found = check_each(local, variants, local_rendered)
    assert light_transport.hidden_surfaces is guess
    assert [set(vars(local.unet)), set(vars(local.unet.light_transport))] == own
    names = ["no query softmax", "no CoC", "no occlusion", "no lens parts", "no slopes"]
    names += ["no hidden surfaces", "no highlights", "no correction", "no refinement"]
    assert list(found) == names
    assert list(missing) == ["T = 249", "T = 749", "fixed encoder"]
    pictures = list(found.values())
    for index, one in enumerate(pictures):
        assert not any(torch.equal(one, other) for other in pictures[:index])


def test_its_timestep_cancels(local: BokehDiffPipeline) -> None:
    full = local_rendered(local)
    local.register_to_config(timestep=249)
    try:
        # Rounding of float32 latents, which the closed form multiplies by at most 2.
        torch.testing.assert_close(local_rendered(local), full, rtol=0, atol=2e-6)
    finally:
        local.register_to_config(timestep=499)


def test_a_network_without_refiner_says_so(local: BokehDiffPipeline) -> None:
    refiner, local.unet.refiner = local.unet.refiner, None
    try:
        variants, missing = variants_of(local)
    finally:
        local.unet.refiner = refiner
    assert "no refinement" in missing and "no refinement" not in [one.name for one in variants]


def variant(pipe: BokehDiffPipeline, name: str) -> Variant:
    return next(one for one in variants_of(pipe)[0] if one.name == name)


def test_highlights_matter_at_clipped_pixels_only(local: BokehDiffPipeline) -> None:
    photo, disparity = photo_with_lamps()
    photo = photo.clip(0, 200)
    picture = local(photo, disparity, 0.6, 14.0, output_type="pt").images
    with variant(local, "no highlights").applied(local):
        assert torch.equal(local(photo, disparity, 0.6, 14.0, output_type="pt").images, picture)


def test_on_one_plane_nothing_is_hidden_and_all_circles_are_one(local: BokehDiffPipeline) -> None:
    photo, _ = photo_with_lamps()
    flat = np.full((64, 96), 0.2, np.float32)
    picture = local(photo, flat, 0.6, 14.0, output_type="pt").images
    for name in ("no CoC", "no hidden surfaces"):
        with variant(local, name).applied(local):
            found = local(photo, flat, 0.6, 14.0, output_type="pt").images
        # The mean of equal numbers is one of them up to rounding.
        torch.testing.assert_close(found, picture, rtol=0, atol=1e-5)


def test_without_correction_an_untrained_network_is_left(local: BokehDiffPipeline) -> None:
    with variant(local, "no correction").applied(local):
        found = local_rendered(local)
    kept = {name: value.clone() for name, value in local.unet.correction.state_dict().items()}
    try:
        for parameter in local.unet.correction.conv_out.parameters():
            torch.nn.init.zeros_(parameter)
        assert torch.equal(local_rendered(local), found)
    finally:
        local.unet.correction.load_state_dict(kept)

"""LayerDiffuse: names and shapes of the published files, strict loading, generation end to end."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers
from PIL import Image
from safetensors.torch import load_file, save_file

from data_synthesis import foregrounds
from data_synthesis.transparent_decoder import (
    TransparentDecoder,
    merge_attention_offsets,
    offset_keys,
)
from data_synthesis.transparent_generators import LayerDiffuseGenerator, Sampling
from tests.conftest import REPOSITORY
from tests.tiny_models import tiny_stock_pipeline, tiny_unet

OFFSETS_FILE = "layer_xl_transparent_attn.safetensors"
DECODER_FILE = "vae_transparent_decoder.safetensors"
SIZE = 64

SDXL_UNET: dict[str, Any] = dict(
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
    use_linear_projection=True,
)


def published_decoder_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the decoder's tensors, as the public programs that read them do."""
    channels = [32, 32, 64, 128, 256, 512, 512]
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, inputs: int, outputs: int, side: int = 3) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs, side, side)
        shapes[f"{name}.bias"] = (outputs,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def residual(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        convolution(f"{name}.conv1", inputs, outputs)
        norm(f"{name}.norm2", outputs)
        convolution(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            convolution(f"{name}.conv_shortcut", inputs, outputs, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.group_norm", width)
        for layer in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes[f"{name}.{layer}.weight"] = (width, width)
            shapes[f"{name}.{layer}.bias"] = (width,)

    convolution("conv_in", 3, 32)
    convolution("latent_conv_in", 4, 64, 1)
    skipped = [32]
    width = 32
    for level, outputs in enumerate(channels):
        for layer in range(2):
            residual(f"down_blocks.{level}.resnets.{layer}", width, outputs)
            if level >= 4:
                attention(f"down_blocks.{level}.attentions.{layer}", outputs)
            width = outputs
            skipped.append(width)
        if level < 6:
            convolution(f"down_blocks.{level}.downsamplers.0.conv", width, width)
            skipped.append(width)
    for layer in range(2):
        residual(f"mid_block.resnets.{layer}", 512, 512)
    attention("mid_block.attentions.0", 512)
    for level, outputs in enumerate(reversed(channels)):
        for layer in range(3):
            residual(f"up_blocks.{level}.resnets.{layer}", width + skipped.pop(), outputs)
            if level < 3:
                attention(f"up_blocks.{level}.attentions.{layer}", outputs)
            width = outputs
        if level < 6:
            convolution(f"up_blocks.{level}.upsamplers.0.conv", width, width)
    norm("conv_norm_out", 32)
    convolution("conv_out", 32, 4)
    return shapes


def test_decoder_has_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        decoder = TransparentDecoder()
    shapes = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    assert shapes == published_decoder_shapes()
    assert sum(np.prod(shape) for shape in shapes.values()) == 104_104_804


def test_offsets_of_sdxl_have_the_published_names_and_size() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL_UNET)
    keys = offset_keys(unet)
    assert len(keys) == len(set(keys.values())) == 560
    assert "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight" in (
        keys.values()
    )
    # diffusers' own conversion of such names is the second opinion.
    names = {
        "lora_unet_" + key.removeprefix("diffusion_model.").replace(".", "_"): name
        for name, key in keys.items()
    }
    converted = _maybe_map_sgm_blocks_to_diffusers({name: name for name in names}, unet.config)
    assert len(converted) == 560
    for new, old in converted.items():
        for sgm, ours in (("input", "down"), ("output", "up")):
            new = new.replace(f"{sgm}_blocks", f"{ours}_blocks")
        new = new.replace("middle_block", "mid_block").removeprefix("lora_unet_")
        assert new == names[old].replace(".", "_")
    # Factors of rank 256 in half precision fill the published file's 709 MiB.
    weights = dict(unet.named_parameters())
    numbers = sum(256 * sum(weights[name].shape) for name in keys)
    assert round(2 * numbers / 2**20) == 709


def tiny_decoder(seed: int = 0) -> TransparentDecoder:
    torch.manual_seed(seed)
    decoder = TransparentDecoder([8] * 7)
    # A contrast that makes alpha vary over its whole range.
    decoder.conv_out.weight.data *= 6
    decoder.conv_out.bias.data = torch.tensor([1.0, 0.5, 0.5, 0.5])
    return decoder.eval()


def tiny_offsets(unet: UNet2DConditionModel, rank: int = 3) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(7)
    weights = dict(unet.named_parameters())
    offsets = {}
    for name, key in offset_keys(unet).items():
        outputs, inputs = weights[name].shape
        offsets[f"{key}::lora::0"] = 0.1 * torch.randn(outputs, rank, generator=random)
        offsets[f"{key}::lora::1"] = 0.1 * torch.randn(rank, inputs, generator=random)
    return offsets


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny SDXL in ``tiny-sdxl`` and both LayerDiffuse files in ``transparent``."""
    folder = tmp_path_factory.mktemp("models")
    pipeline = tiny_stock_pipeline(folder / "vocabulary")
    pipeline.save_pretrained(folder / "tiny-sdxl")
    (folder / "transparent").mkdir()
    save_file(tiny_offsets(pipeline.unet), folder / "transparent" / OFFSETS_FILE)
    save_file(tiny_decoder().state_dict(), folder / "transparent" / DECODER_FILE)
    return folder


# --- Decoder --------------------------------------------------------------------------------------


def test_decoder_is_read_back_at_its_width(models: Path) -> None:
    decoder = TransparentDecoder.from_file(models / "transparent" / DECODER_FILE)
    for name, tensor in tiny_decoder().state_dict().items():
        assert torch.equal(decoder.state_dict()[name], tensor)


def test_latents_reach_the_decoder_at_an_eighth_of_the_size() -> None:
    decoder = tiny_decoder()
    pixels, latents = torch.rand(1, 3, 64, 128), torch.zeros(1, 4, 8, 16)
    with torch.no_grad():
        base = decoder(pixels, latents)
        assert base.shape == (1, 4, 64, 128)
        latents[0, :, 2, 3] = 5
        changed = (decoder(pixels, latents) - base).abs().amax(dim=(0, 1))
    top, left = divmod(int(changed.argmax()), 128)
    assert changed.max() > 1e-3 and abs(top - 20) < 16 and abs(left - 28) < 16


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_decode_turns_with_its_input(turns: int) -> None:
    decoder = tiny_decoder()
    random = torch.Generator().manual_seed(1)
    pixels = torch.rand(1, 3, 64, 64, generator=random)
    latents = torch.randn(1, 4, 8, 8, generator=random)

    def turned(tensor: torch.Tensor) -> torch.Tensor:
        return torch.rot90(tensor, turns, (2, 3)).flip(3)

    with torch.no_grad():
        one = decoder.decode(pixels, latents)
        other = decoder.decode(turned(pixels), turned(latents))
        single = decoder(pixels, latents).clamp(0, 1)
    # The median over all flips and quarter turns does not know which came first; one pass does.
    torch.testing.assert_close(other, turned(one), rtol=0, atol=1e-5)
    assert (
        decoder(turned(pixels), turned(latents)).clamp(0, 1) - turned(single)
    ).abs().max() > 0.01
    assert one.min() >= 0 and one.max() <= 1


def test_decode_takes_the_lower_median_of_eight_views() -> None:
    class CornerDecoder(TransparentDecoder):
        """Paints the value of the top left pixel everywhere: eight views see four corners."""

        def forward(self, pixels: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
            return pixels[:, :1, :1, :1].expand(-1, 4, *pixels.shape[2:])

    pixels = torch.zeros(1, 3, 2, 2)
    pixels[0, 0] = torch.tensor([[0.1, 0.4], [0.3, 0.2]])
    out = CornerDecoder([8] * 7).decode(pixels, torch.zeros(1, 4, 1, 1))
    assert out.unique().tolist() == pytest.approx([0.2])  # of 0.1 0.1 0.2 0.2 0.3 0.3 0.4 0.4


# --- Strict loading -------------------------------------------------------------------------------


def test_merging_adds_the_products_and_nothing_else(models: Path) -> None:
    unet = tiny_unet()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    merge_attention_offsets(unet, models / "transparent" / OFFSETS_FILE)
    offsets = load_file(models / "transparent" / OFFSETS_FILE)
    keys = offset_keys(unet)
    for name, tensor in unet.state_dict().items():
        expected = before[name].double()
        if name in keys:
            up, down = (offsets[f"{keys[name]}::lora::{i}"].double() for i in (0, 1))
            assert (up @ down).abs().max() > 1e-3
            expected = expected + up @ down
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)
    attention = [name for name in before if ".attn" in name and name.endswith("weight")]
    assert set(keys) == set(attention)


def changed_file(source: Path, target: Path, change: Any) -> Path:
    tensors = load_file(source)
    change(tensors)
    save_file(tensors, target)
    return target


def test_offsets_that_do_not_fit_change_nothing(models: Path, tmp_path: Path) -> None:
    source = models / "transparent" / OFFSETS_FILE
    unet = tiny_unet()
    key = next(iter(offset_keys(unet).values()))

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        a, b = f"{key}::lora::0", f"{key}::lora::1"
        tensors[a], tensors[b] = tensors[b], tensors[a]

    changes = {
        "lacks 1: .*::lora::1": lambda tensors: tensors.pop(f"{key}::lora::1"),
        "holds unknown 1: more::diff::0": lambda t: t.update({"more::diff::0": torch.ones(1)}),
        r"has factors \(3, 16\) and \(16, 3\)|has factors \(3, 32\) and \(32, 3\)": swap,
    }
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    for words, change in changes.items():
        file = changed_file(source, tmp_path / OFFSETS_FILE, change)
        with pytest.raises(ValueError, match=words):
            merge_attention_offsets(unet, file)
    for name, tensor in unet.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_decoders_that_do_not_fit_are_named(models: Path, tmp_path: Path) -> None:
    source = models / "transparent" / DECODER_FILE
    changes = {
        "lacks 1: conv_out.bias": lambda tensors: tensors.pop("conv_out.bias"),
        "holds unknown 1: time_embedding": lambda t: t.update(time_embedding=torch.ones(1)),
        r"conv_out.bias is \(3,\); wanted \(4,\)": lambda t: t.update(
            {"conv_out.bias": torch.ones(3)}
        ),
        "lacks 7": lambda tensors: [tensors.pop(name) for name in list(tensors) if "down" in name],
        "multiples of 8": lambda t: t.update(
            {"down_blocks.3.resnets.0.conv1.bias": torch.ones(12)}
        ),
    }
    for words, change in changes.items():
        file = changed_file(source, tmp_path / DECODER_FILE, change)
        with pytest.raises(ValueError, match=words):
            TransparentDecoder.from_file(file)
    (tmp_path / "broken.safetensors").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="download it again"):
        TransparentDecoder.from_file(tmp_path / "broken.safetensors")


# --- Generation -----------------------------------------------------------------------------------


def command(models: Path, out: Path, *more: str) -> list[str]:
    words = ["--model", str(models / "tiny-sdxl"), "--layerdiffuse", str(models / "transparent")]
    words += ["--size", str(SIZE), "--steps", "2", "--n", "3", "--seed", "5", "--out", str(out)]
    words += ["--device", "cpu", "--prompts", str(prompts(models))]
    # Untrained networks make noise all over the frame.
    words += ["--largest-border", "1", "--largest-soft", "1", "--largest-area", "1"]
    return [*words, "--smallest-difference", "0", *more]


def prompts(models: Path) -> Path:
    file = models / "prompts.txt"
    file.write_text("a red fox\na glass bottle\n")
    return file


def run(words: list[str]) -> int:
    parser = argparse.ArgumentParser()
    foregrounds.add_arguments(parser)
    return foregrounds.run(parser.parse_args(words))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def written(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("layerdiffuse") / "out"
    assert run(command(models, out)) == 0
    return out


def test_pictures_and_their_provenance(models: Path, written: Path) -> None:
    pictures = sorted(written.glob("*.png"))
    assert [path.name for path in pictures] == [f"{i:08d}-prompts.png" for i in range(3)]
    alphas = []
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.mode == "RGBA" and picture.size == (SIZE, SIZE)
            alphas.append(np.asarray(picture)[..., 3])
    assert not np.array_equal(alphas[0], alphas[2])  # the same prompt with another seed
    assert np.ptp(alphas[0]) > 50

    record = json.loads((written / "00000001-prompts.json").read_text())
    assert record["category"] == "prompts" and record["index"] == 1
    generator = record["generator"]
    assert generator["class"] == "LayerDiffuseGenerator" and generator["model"] == "tiny-sdxl"
    assert generator["num_inference_steps"] == 2 and generator["revision"] is None
    for name in (OFFSETS_FILE, DECODER_FILE):
        data = (models / "transparent" / name).read_bytes()
        assert generator["weights_sha256"][name] == hashlib.sha256(data).hexdigest()
    assert "unet/diffusion_pytorch_model.safetensors" in generator["weights_sha256"]
    assert {"torch", "diffusers", "bokehdiff"} <= set(record["versions"])


def test_the_picture_is_what_the_networks_give_for_its_record(models: Path, written: Path) -> None:
    record = json.loads((written / "00000001-prompts.json").read_text())
    pipeline = StableDiffusionXLPipeline.from_pretrained(models / "tiny-sdxl")
    pipeline.set_progress_bar_config(disable=True)
    merge_attention_offsets(pipeline.unet, models / "transparent" / OFFSETS_FILE)
    # The stock pipeline's own decoding, and its latents again.
    arguments = dict(
        prompt=record["prompt"],
        negative_prompt=record["generator"]["negative_prompt"],
        height=SIZE,
        width=SIZE,
        num_inference_steps=2,
        guidance_scale=7.0,
    )
    pixels, latents = (
        pipeline(
            **arguments,
            generator=torch.Generator().manual_seed(record["seed"]),
            output_type=kind,
        ).images
        for kind in ("pt", "latent")
    )
    with torch.no_grad():
        argb = tiny_decoder().decode(pixels, latents / pipeline.vae.config.scaling_factor)[0]
    expected = torch.cat([argb[1:], argb[:1]]).permute(1, 2, 0).numpy()
    with Image.open(written / "00000001-prompts.png") as picture:
        difference = np.abs(np.asarray(picture) / 255 - expected)
    assert difference.max() < 1.01 / 255


def test_offsets_change_the_picture(models: Path, written: Path, tmp_path: Path) -> None:
    other = tmp_path / "transparent"
    shutil.copytree(models / "transparent", other)
    changed_file(
        models / "transparent" / OFFSETS_FILE,
        other / OFFSETS_FILE,
        lambda tensors: [tensor.zero_() for tensor in tensors.values()],
    )
    words = command(models, tmp_path / "out", "--layerdiffuse", str(other), "--n", "1")
    assert run(words) == 0
    name = "00000000-prompts.png"
    assert (tmp_path / "out" / name).read_bytes() != (written / name).read_bytes()


def test_a_real_process_writes_the_same_bytes(models: Path, written: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    # What an interrupted run had finished.
    for name in ("00000000-prompts.png", "00000000-prompts.json", "foregrounds.json"):
        shutil.copy2(written / name, out / name)
    time = (out / "00000000-prompts.png").stat().st_mtime_ns
    done = subprocess.run(
        [sys.executable, "-m", "data_synthesis", "foregrounds", *command(models, out)],
        cwd=REPOSITORY,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 new pictures" in done.stdout and "1 were there" in done.stdout
    assert contents(out) == contents(written)
    assert (out / "00000000-prompts.png").stat().st_mtime_ns == time


def test_what_is_missing_is_named_with_its_download(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def says(*more: str) -> str:
        assert run(command(models, tmp_path / "out", *more)) == 2
        return capsys.readouterr().err

    message = says("--model", "someone/no-such-model", "--variant", "fp16")
    assert "DiffusionPipeline.download('someone/no-such-model', variant='fp16')" in message
    message = says("--layerdiffuse", "someone/no-weights")
    assert f"hf download someone/no-weights {OFFSETS_FILE} {DECODER_FILE}" in message
    assert "--generator backdrop" in message
    assert "there is no such folder" in says("--model", "./no/such/folder")
    assert "there is no such folder" in says("--layerdiffuse", "./no/such/folder")
    (tmp_path / "empty").mkdir()
    assert "no diffusers pipeline" in says("--model", str(tmp_path / "empty"))
    message = says("--layerdiffuse", str(tmp_path / "empty"))
    assert "lacks layer_xl_transparent_attn" in message and "--local-dir" in message
    assert "multiple of 64" in says("--size", "72")
    assert not (tmp_path / "out").exists()

    broken = tmp_path / "broken"
    shutil.copytree(models / "tiny-sdxl", broken)
    index = broken / "model_index.json"
    index.write_text(index.read_text().replace("XLPipeline", "Pipeline"))
    assert "LayerDiffuse was made for" in says("--model", str(broken))
    index.write_text(index.read_text().replace("DiffusionPipeline", "DiffusionXLPipeline"))
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "cannot be loaded" in says("--model", str(broken))


def test_models_in_the_local_cache_are_found_by_their_hub_id(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name, source in (("sdxl", "tiny-sdxl"), ("transparent", "transparent")):
        cached = tmp_path / f"models--someone--{name}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text(commit)
        shutil.copytree(models / source, cached / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    generator = LayerDiffuseGenerator.load(
        "someone/sdxl", Sampling(SIZE, 1), layerdiffuse="someone/transparent"
    )
    assert generator.provenance["model"] == "someone/sdxl"
    assert generator.provenance["revision"] == commit

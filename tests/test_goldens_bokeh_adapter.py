"""The adapter of FLUX against recorded outputs of the authors' code, for every case in the index.

The folder is `bokehdepth` under $BOKEHDIFF_FIXTURES (by default shared/fixtures beside the
repository). Its `index.json` lists the cases; of each, `<name>.json` says what was recorded, in
`<name>.safetensors`.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from bokehdiff.bokeh_adapter_files import read_bokeh_adapter, write_bokeh_adapter
from bokehdiff.models.bokeh_adapter import (
    LARGEST_STRENGTH,
    SMALLEST_STRENGTH,
    UNCONDITIONAL_STRENGTH,
    BokehAdapter,
    BokehCondition,
    BokehGrounding,
)

DEFAULT_FIXTURES = Path(__file__).resolve().parent.parent.parent / "shared" / "fixtures"
FOLDER = Path(os.environ.get("BOKEHDIFF_FIXTURES") or DEFAULT_FIXTURES) / "bokehdepth"

TOLERANCE = 1e-5
"""Of the largest recorded value."""


def _cases() -> list[Any]:
    """Names of the recorded adapters; one skipped entry if there are none."""
    path = FOLDER / "index.json"
    index = json.loads(path.read_text()) if path.is_file() else {}
    names = [name for name, case in index.items() if "bokeh adapter" in case.get("what", "")]
    reason = f"no such cases in {FOLDER}; set BOKEHDIFF_FIXTURES to the folder of fixtures"
    return names or [pytest.param("none", marks=pytest.mark.skip(reason=reason))]


class Case:
    """A recorded transformer with the authors' adapter, and the same with ours."""

    def __init__(self, name: str) -> None:
        self.settings = json.loads((FOLDER / f"{name}.json").read_text())
        self.recorded = load_file(FOLDER / f"{name}.safetensors")
        config = self.settings["config"]
        self.transformer = FluxTransformer2DModel(
            patch_size=config["patch_size"],
            in_channels=config["in_channels"],
            num_layers=config["num_layers"],
            num_single_layers=config["num_single_layers"],
            attention_head_dim=config["attention_head_dim"],
            num_attention_heads=config["num_attention_heads"],
            joint_attention_dim=config["joint_attention_dim"],
            pooled_projection_dim=config["pooled_projection_dim"],
            guidance_embeds=config["guidance_embeds"],
            axes_dims_rope=tuple(config["axes_dims_rope"]),
        ).eval()
        self.transformer.load_state_dict(self.part("base/"))
        self.adapter = BokehAdapter.for_transformer(
            self.transformer,
            rank=config["lora_rank"],
            alpha=config["lora_alpha"],
            context_width=config["context_dim"],
        )
        self.adapter.load_state_dict(self.part("state/"))
        self.adapter.install(self.transformer)

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {
            key.removeprefix(prefix): value
            for key, value in self.recorded.items()
            if key.startswith(prefix)
        }

    @property
    def batch(self) -> int:
        return len(self.recorded["in/k_norm"])

    def condition(self, k_normalised: Tensor | None = None, **options: Any) -> BokehCondition:
        config = self.settings["config"]
        if k_normalised is None:
            k_normalised = self.recorded["in/k_norm"][:, 0]
        scales = {name: config[name] for name in ("lora_scale", "bokeh_scale")}
        return BokehCondition(self.adapter.embed(k_normalised), **scales, **options)

    def grounded(self, pivot: int, blocks: str) -> BokehCondition:
        pivots = torch.full((self.batch,), pivot)
        return self.condition(grounding=BokehGrounding(pivots, blocks))

    @torch.no_grad()
    def noise(self, condition: BokehCondition | None) -> Tensor:
        config, recorded = self.settings["config"], self.recorded
        text = recorded["in/encoder_hidden_states"]
        return self.transformer(
            hidden_states=recorded["in/hidden_states"],
            encoder_hidden_states=text,
            pooled_projections=recorded["in/pooled_projections"],
            timestep=torch.full((self.batch,), config["timestep"]),
            guidance=torch.full((self.batch,), config["guidance"]),
            img_ids=recorded["in/img_ids"],
            txt_ids=torch.zeros(text.shape[1], 3),
            joint_attention_kwargs=None if condition is None else {"bokeh": condition},
        ).sample

    def assert_as_recorded(self, name: str, out: Tensor) -> None:
        wanted = self.recorded[name]
        error = float((out.detach() - wanted).abs().max() / wanted.abs().max())
        assert error <= TOLERANCE, f"{name}: {error:.1e} of the largest value"


case_of = functools.cache(Case)


@pytest.mark.parametrize("name", _cases())
def test_golden_embedding(name: str) -> None:
    case = case_of(name)
    recorded = case.recorded["in/k_norm"]
    k = torch.tensor(case.settings["k_values"]).clamp(SMALLEST_STRENGTH, LARGEST_STRENGTH)
    torch.testing.assert_close(k / LARGEST_STRENGTH, recorded[:, 0])
    case.assert_as_recorded("mid/bokeh_embeds", case.condition().embedding)


@pytest.mark.parametrize("name", _cases())
def test_golden_predictions(name: str) -> None:
    case = case_of(name)
    unconditional = torch.full((case.batch,), UNCONDITIONAL_STRENGTH)
    last = case.batch - 1  # the pivot of the recorded swap is the last of the batch
    conditions = {
        "noise_pred": case.condition(),
        "noise_pred_k_uncond": case.condition(unconditional),
        "noise_pred_adapter_off": None,
        "noise_pred_grounded_i2i": case.grounded(0, "all"),
        "noise_pred_grounded_t2i": case.grounded(last, "single"),
        "bokehdiffusion_noise_pred": case.condition(),
        "bokehdiffusion_noise_pred_grounded": case.grounded(last, "all"),
    }
    recorded = case.part("out/")
    assert recorded
    for output in recorded:
        case.assert_as_recorded(f"out/{output}", case.noise(conditions[output]))


@pytest.mark.parametrize("name", _cases())
@torch.no_grad()
def test_golden_attention(name: str) -> None:
    case = case_of(name)
    recorded = case.recorded
    rotary = recorded["in/rope_cos"], recorded["in/rope_sin"]
    kinds = {
        "double": case.transformer.transformer_blocks,
        "single": case.transformer.single_transformer_blocks,
    }
    modules = {key.split("/")[1] for key in recorded if key.startswith("attn/")}
    assert modules
    for module in modules:
        kind, index = module[:6], int(module[6:])
        answer = kinds[kind][index].attn(
            recorded[f"attn/{module}/in"],
            recorded.get(f"attn/{module}/in_text"),
            image_rotary_emb=rotary,
            bokeh=case.condition(),
        )
        if kind == "double":
            answer, of_text = answer
            case.assert_as_recorded(f"attn/{module}/out_text", of_text)
        case.assert_as_recorded(f"attn/{module}/out", answer)


@pytest.mark.parametrize("name", _cases())
@torch.no_grad()
def test_golden_key_of_the_strength_has_no_say(name: str) -> None:
    case = Case(name)
    before = case.noise(case.condition())
    for block in case.adapter.blocks:
        for parameter in block.to_k_dof.parameters():
            parameter.add_(1.0)
    assert torch.equal(case.noise(case.condition()), before)
    assert case.settings["max_abs_change_when_to_k_dof_is_perturbed"] == 0


@pytest.mark.parametrize("name", _cases())
@pytest.mark.parametrize("layout", ["bokeh_lora.bin", "bokehdiffusion", "without prefix"])
def test_golden_checkpoints(name: str, layout: str, tmp_path: Path) -> None:
    case = case_of(name)
    config, official = case.settings["config"], case.part("state/")
    path = tmp_path / "bokeh_lora.bin"
    if layout == "bokehdiffusion":
        path = tmp_path / "model.safetensors"
        named = {key.replace("_dof.", "_bokeh."): value for key, value in official.items()}
        save_file(named, path)
        entries = {key: config[key] for key in ("lora_rank", "lora_alpha", "blocks")}
        (tmp_path / "config.json").write_text(json.dumps(entries))
        adapter = read_bokeh_adapter(tmp_path)
    else:
        if layout == "without prefix":
            official = {key.removeprefix("adapter_modules."): v for key, v in official.items()}
        torch.save(official, path)
        adapter = read_bokeh_adapter(path, transformer=case.transformer)
    assert {k: v for k, v in adapter.config.items() if not k.startswith("_")} == {
        k: v for k, v in case.adapter.config.items() if not k.startswith("_")
    }
    write_bokeh_adapter(adapter, tmp_path / "again.safetensors")
    written, wanted = load_file(tmp_path / "again.safetensors"), case.part("state/")
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[key], value) for key, value in wanted.items())


@pytest.mark.parametrize("file", ["bokeh_lora_manifest.json", "bokehdiffusion_flux_manifest.json"])
def test_golden_manifests(file: str, fixtures_root: Path, tmp_path: Path) -> None:
    manifest = json.loads((fixtures_root / "bokehdepth" / file).read_text())
    with torch.device("meta"):
        adapter = BokehAdapter()
    shapes = {name: list(value.shape) for name, value in adapter.state_dict().items()}
    assert list(shapes) == [key.replace("_bokeh.", "_dof.") for key in manifest["shapes"]]
    assert list(shapes.values()) == list(manifest["shapes"].values())
    assert len(shapes) == manifest["n_tensors"]
    assert sum(value.numel() for value in adapter.parameters()) == manifest["n_params"]
    # The whole file there and back, every number of a tensor the same one, which takes no room.
    stored = {
        key: torch.full((1,), index / 7).expand(shape)
        for index, (key, shape) in enumerate(manifest["shapes"].items())
    }
    torch.save(stored, tmp_path / "pytorch_model.bin")
    read = read_bokeh_adapter(tmp_path)
    assert read.config.num_layers == 19 and read.config.num_single_layers == 38
    for (given, wanted), (name, value) in zip(
        stored.items(), read.state_dict().items(), strict=True
    ):
        assert name == given.replace("_bokeh.", "_dof.")
        assert value.shape == wanted.shape and value.flatten()[-1] == wanted.flatten()[0]

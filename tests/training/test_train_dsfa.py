"""Training depth from a bokeh stack: data, what a step sees, exact resume, files, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

from bokehdiff import DepthFromBokehPipeline
from bokehdiff.depth_losses import gradient_loss, scale_invariant_log_loss
from bokehdiff.models.depth_anything_dsfa import DepthAnythingDSFAForDepthEstimation
from data_synthesis.stack_files import write_stacks
from data_synthesis.stack_scenes import StackScenes
from tests.training.runs import REPOSITORY, assert_same_tensors, launch, logged
from training import train_dsfa
from training.dsfa_data import ManifestStacks, StackCrops, central_crop, open_stacks
from training.dsfa_task import DSFATask, cosine_filters

BACKBONE = {
    **{"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2},
    **{"image_size": 16, "patch_size": 4, "out_indices": [1, 2, 3, 4]},
}
NETWORK: dict[str, Any] = {
    **{"backbone_config": BACKBONE, "neck_hidden_sizes": [4, 4, 8, 8]},
    **{"fusion_hidden_size": 4, "head_hidden_size": 4, "initializer_range": 0.2},
    **{"max_depth": 12, "fusion_heads": 2, "largest_strength": 2.0, "initial_gate": 0.5},
}
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def stacks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six stacks of three frames, 24 pixels a side."""
    folder = tmp_path_factory.mktemp("stacks") / "stacks"
    write_stacks(StackScenes(2, 24, frames=3, strengths=(0.5, 2.0)), folder, count=6)
    return folder


def arguments(output_dir: Path, data: Path, *flags: str, **settings: Any) -> list[str]:
    """Command-line arguments of a short run of a tiny network from nothing."""
    values = {
        **{"model_network": NETWORK, "data_stacks": data, "data_crop_size": 16},
        **{"max_train_steps": 2, "warmup_steps": 1, "learning_rate": 1e-3, "batch_size": 2},
        **{"log_steps": 1, "validation_scenes": 0, "report_to": "none", "stack_drop": 0.0},
        **settings,
    }
    named = [
        part
        for name, value in values.items()
        if value is not None
        for part in (f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value))
    ]
    return ["--output_dir", str(output_dir), *named, *flags]


def train(output_dir: Path, data: Path, *flags: str, **settings: Any) -> None:
    train_dsfa.main(train_dsfa.parse_args(arguments(output_dir, data, *flags, **settings)))


def task(tmp_path: Path, data: Path, **settings: Any) -> DSFATask:
    torch.manual_seed(0)
    return DSFATask(train_dsfa.parse_args(arguments(tmp_path, data, **settings)))


def batch_of(one: DSFATask) -> dict[str, torch.Tensor]:
    samples = [one.training_samples()[number] for number in range(2)]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


# -- What a run leaves ---------------------------------------------------------------------------


def test_a_run_leaves_a_network_a_log_and_a_card(tmp_path: Path, stacks_folder: Path) -> None:
    held_out = {"validation_scenes": 3, "validation_stacks": stacks_folder}
    train(tmp_path, stacks_folder, validation_steps=1, validation_pictures=2, **held_out)
    assert {"loss", "silog", "gradient", "gradient_norm_network"} <= set(
        logged(tmp_path, "train")[0]
    )
    validations = logged(tmp_path, "validation")
    assert [entry["step"] for entry in validations] == [0, 1, 2]
    assert {"abs_rel", "delta1", "abs_rel_single", "abs_rel_copies", "stack_effect"} <= set(
        validations[-1]
    )
    assert validations[-1]["scenes"] == 3 and validations[-1]["stack_effect"] > 0
    assert (tmp_path / "validation" / "step-000002.png").is_file()

    network = DepthAnythingDSFAForDepthEstimation.from_pretrained(tmp_path)
    pixels = torch.zeros(1, 3, 16, 16)
    depth = network(pixels, pixels[:, None], torch.ones(1, 1)).predicted_depth
    assert depth.shape == (1, 16, 16) and torch.isfinite(depth).all()

    photo = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    out = DepthFromBokehPipeline.from_pretrained(tmp_path)(photo, [photo], K=[3.0])
    assert out.depth.shape == (1, 1, 24, 40) and torch.isfinite(out.depth).all()

    card = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "depth-estimation"
    assert f"| after training | {validations[-1]['abs_rel']:.4f} |" in card
    assert "2 to 3 frames, drawn for every step" in card


def test_a_run_in_pieces_ends_with_the_weights_of_an_unbroken_one(
    tmp_path: Path, stacks_folder: Path
) -> None:
    settings = {"stack_drop": 0.3, "max_train_steps": 4}
    train(tmp_path / "whole", stacks_folder, **settings)
    train(tmp_path / "pieces", stacks_folder, checkpoint_steps=2, **settings)
    whole, pieces = (tmp_path / name / WEIGHTS for name in ("whole", "pieces"))
    assert_same_tensors(whole, pieces)
    for name in ("checkpoint-4", WEIGHTS):  # as if it had been killed after step 2
        path = tmp_path / "pieces" / name
        path.unlink() if path.is_file() else path.rename(tmp_path / "away")
    train(tmp_path / "pieces", stacks_folder, "--resume", "latest", **settings)
    assert_same_tensors(whole, pieces)
    assert [entry["step"] for entry in logged(tmp_path / "pieces", "train")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_two_processes_train_with_steps_that_see_no_stack(
    tmp_path: Path, stacks_folder: Path
) -> None:
    flags = arguments(tmp_path / "out", stacks_folder, stack_drop=0.6, max_train_steps=4)
    done = launch(flags, processes=2, script="training/train_dsfa.py")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / WEIGHTS).is_file()


def test_a_checkpoint_of_other_parts_is_refused(tmp_path: Path, stacks_folder: Path) -> None:
    train(tmp_path / "out", stacks_folder)
    with pytest.raises(ValueError, match="holds weights of other parts, or of another size"):
        train(
            *(tmp_path / "out", stacks_folder, "--resume", "latest"),
            **{"trained_parts": "head", "max_train_steps": 3},
        )


# -- What a step sees ----------------------------------------------------------------------------


def test_loss_is_that_of_the_network_with_the_frames_and_their_strengths(
    tmp_path: Path, stacks_folder: Path
) -> None:
    one = task(tmp_path, stacks_folder, loss_gradient_weight="{0: 0.25, 10: 0.5}")
    batch = batch_of(one)
    terms = one(batch, 4)
    count = one.frames_of(4)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels, frames = (
        (values - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
        for values in (batch["image"], batch["stack"][:, :count])
    )
    depth = one.network(pixels, frames, batch["K"][:, :count]).predicted_depth
    true = batch["depth"][:, 0]
    everywhere = torch.ones_like(true, dtype=torch.bool)
    silog = scale_invariant_log_loss(depth, true, everywhere)
    gradient = gradient_loss(depth, true, everywhere)
    assert torch.allclose(terms["silog"], silog, rtol=1e-6)
    assert torch.allclose(terms["gradient"], gradient, rtol=1e-6)
    assert torch.allclose(terms["loss"], silog + 0.35 * gradient, rtol=1e-6)


def test_strengths_reach_the_network_and_learn(tmp_path: Path, stacks_folder: Path) -> None:
    one = task(tmp_path, stacks_folder)
    batch = batch_of(one)
    first = one(batch, 0)["loss"]
    first.backward()
    for block in one.network.fusion.blocks.values():
        assert block.k_embed[0].weight.grad.abs().max() > 0
    assert one({**batch, "K": 0.5 * batch["K"]}, 0)["loss"] != first


def test_numbers_of_frames_are_drawn_from_seed_and_step(
    tmp_path: Path, stacks_folder: Path
) -> None:
    one = task(tmp_path, stacks_folder, stack_fewest=1, stack_most=3, stack_drop=0.25)
    drawn = [one.frames_of(step) for step in range(400)]
    assert drawn == [one.frames_of(step) for step in range(400)]
    shares = [drawn.count(count) / 400 for count in range(4)]
    # A binomial share of 400 has a deviation of at most 0.022; four of them.
    assert shares == pytest.approx([0.25] * 4, abs=0.09)
    other = task(tmp_path, stacks_folder, seed=1, stack_fewest=1, stack_most=3, stack_drop=0.25)
    assert drawn != [other.frames_of(step) for step in range(400)]


def test_a_step_without_a_stack_gives_the_fusion_zero_gradients(
    tmp_path: Path, stacks_folder: Path
) -> None:
    one = task(tmp_path, stacks_folder, stack_drop=0.9)
    step = next(step for step in range(99) if one.frames_of(step) == 0)
    one(batch_of(one), step)["loss"].backward()
    for value in one.network.fusion.parameters():
        assert torch.equal(value.grad, torch.zeros_like(value))
    assert one.network.head.conv3.weight.grad.abs().max() > 0


def test_every_trained_parameter_is_reached(tmp_path: Path, stacks_folder: Path) -> None:
    one = task(tmp_path, stacks_folder)
    one(batch_of(one), 0)["loss"].backward()
    unreached = [
        name for name, value in one.named_parameters() if value.requires_grad and value.grad is None
    ]
    assert unreached == []


def test_without_stacks_the_fusion_stays_as_it_was(tmp_path: Path, stacks_folder: Path) -> None:
    single = {"stack_fewest": 0, "stack_most": 0}
    train(tmp_path, stacks_folder, validation_scenes=2, validation_stacks=stacks_folder, **single)
    assert "stack_effect" not in logged(tmp_path, "validation")[-1]
    torch.manual_seed(0)
    before = task(tmp_path, stacks_folder, **single).network.state_dict()
    after = DepthAnythingDSFAForDepthEstimation.from_pretrained(tmp_path).state_dict()
    assert after.keys() == before.keys()
    same = {name for name in after if torch.equal(after[name], before[name])}
    assert {name for name in after if name.startswith("fusion.")} <= same
    assert "head.conv1.weight" not in same


def test_trained_parts_and_learning_rates_by_part(tmp_path: Path, stacks_folder: Path) -> None:
    one = task(tmp_path, stacks_folder, trained_parts="fusion,head")
    parts = {name.split(".")[1] for name, value in one.named_parameters() if value.requires_grad}
    assert parts == {"fusion", "head"}
    train(tmp_path / "out", stacks_folder, lr_scale={"fusion": 1.0, "backbone": 0.01, "": 0.5})


def test_cosine_filters_are_orthogonal_and_the_first_is_brightness() -> None:
    filters = cosine_filters(20, 4).flatten(1).double()
    assert torch.allclose(filters[0], filters[0, 0].expand(48), atol=1e-6)
    products = filters @ filters.T
    assert (products - products.diag().diag()).abs().max() < 1e-6
    assert (products.diag()[:20] > 0).all()
    assert torch.equal(cosine_filters(50, 4)[48:], torch.zeros(2, 3, 4, 4))


def test_a_network_from_nothing_starts_at_its_initial_depth(
    tmp_path: Path, stacks_folder: Path
) -> None:
    one = task(tmp_path, stacks_folder, model_initial_depth=2.0)
    assert torch.sigmoid(one.network.head.conv3.bias).item() * 12 == pytest.approx(2.0)


# -- Pretrained networks -------------------------------------------------------------------------


def save_depth_anything(folder: Path, kind: str = "metric") -> str:
    options = {name: value for name, value in NETWORK.items() if name != "backbone_config"}
    for name in ("fusion_heads", "largest_strength", "initial_gate"):
        options.pop(name)
    backbone = Dinov2Config(**BACKBONE, apply_layernorm=True, reshape_hidden_states=False)
    config = DepthAnythingConfig(
        **{"backbone_config": backbone, "patch_size": 4, "reassemble_hidden_size": 16, **options},
        depth_estimation_type=kind,
    )
    torch.manual_seed(1)
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    return str(folder)


def test_a_depth_anything_is_trained_further_and_the_result_once_more(
    tmp_path: Path, stacks_folder: Path
) -> None:
    base = save_depth_anything(tmp_path / "base")
    settings = {"model_network": None, "model_fusion": {"fusion_heads": 2}}
    one = task(tmp_path, stacks_folder, pretrained=base, **settings)
    image = batch_of(one)["image"]
    plain = DepthAnythingForDepthEstimation.from_pretrained(base)
    expected = plain((image - one.mean) / one.deviation).predicted_depth
    none = torch.zeros(2, 0, 3, 16, 16)
    assert torch.equal(one.depth(image, none, torch.zeros(2, 0)), expected.clamp_min(1e-4))

    train(tmp_path / "out", stacks_folder, pretrained=base, **settings)
    again = {"model_network": None, "pretrained": str(tmp_path / "out")}
    train(tmp_path / "again", stacks_folder, **again)
    with pytest.raises(ValueError, match="has DSFA blocks already"):
        train(tmp_path / "other", stacks_folder, **again, model_fusion={"fusion_heads": 2})


def test_relative_depth_is_refused_and_a_metric_head_helps(
    tmp_path: Path, stacks_folder: Path
) -> None:
    base = save_depth_anything(tmp_path / "base", "relative")
    settings = {"model_network": None, "pretrained": base}
    fusion = {"fusion_heads": 2}
    with pytest.raises(ValueError, match="gives relative depth"):
        task(tmp_path, stacks_folder, **settings, model_fusion=fusion)
    metric = {**fusion, "depth_estimation_type": "metric", "max_depth": 20}
    assert task(tmp_path, stacks_folder, **settings, model_fusion=metric).network.head is not None


# -- Data ----------------------------------------------------------------------------------------


def test_crops_are_the_same_of_picture_frames_and_depth(
    tmp_path: Path, stacks_folder: Path
) -> None:
    args = train_dsfa.parse_args(arguments(tmp_path, stacks_folder))
    stacks, count = open_stacks(str(stacks_folder), 0, args)
    assert count == 6
    crops = StackCrops(stacks, count, 16, seed=4)
    mirrored = 0
    for number in range(12):
        sample = crops[number]
        assert torch.equal(sample["stack"], crops[number]["stack"])
        scene = next(
            scene
            for scene in (stacks[index] for index in range(count))
            if torch.equal(scene["K"], sample["K"].sort().values)
        )
        order = torch.searchsorted(scene["K"], sample["K"])
        places = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            if torch.equal(_cut(scene["image"], top, left, flip), sample["image"])
        ]
        assert any(
            torch.equal(_cut(scene["depth"], *place), sample["depth"])
            and torch.equal(_cut(scene["stack"][order], *place), sample["stack"])
            for place in places
        )
        mirrored += any(flip for *_, flip in places)
    assert 0 < mirrored < 12


def _cut(values: torch.Tensor, top: int, left: int, flip: bool) -> torch.Tensor:
    crop = values[..., top : top + 16, left : left + 16]
    return crop.flip(-1) if flip else crop


def test_every_pass_sees_every_scene_once(stacks_folder: Path, tmp_path: Path) -> None:
    args = train_dsfa.parse_args(arguments(tmp_path, stacks_folder))
    stacks, count = open_stacks(str(stacks_folder), 0, args)
    crops = StackCrops(stacks, count, 16, seed=4)
    for first in (0, 6):
        seen = {tuple(crops[first + n]["K"].sort().values.tolist()) for n in range(6)}
        assert seen == {tuple(stacks[index]["K"].tolist()) for index in range(6)}


def test_scenes_on_the_fly(tmp_path: Path, stacks_folder: Path) -> None:
    settings = {
        **{"data_stacks": None, "data_size": 16, "data_seed": 9},
        "data_options": {"frames": 3, "strengths": [0.5, 2.0]},
    }
    one = task(tmp_path, stacks_folder, **settings)
    expected = StackScenes(9, 16, frames=3, strengths=(0.5, 2.0))[1]
    sample = one.training_samples()[1]
    assert torch.equal(sample["K"].sort().values, expected["K"])
    settings["data_options"] = {"frame": 3}
    with pytest.raises(ValueError, match="data.options do not fit StackScenes"):
        task(tmp_path, stacks_folder, **settings).training_samples()


def write_manifest(folder: Path, line: dict[str, Any]) -> Path:
    """A manifest of one line, with the pictures ``sharp``, ``1`` and ``2`` and two depth files."""
    rng = np.random.default_rng(0)
    (folder / "frames").mkdir(parents=True)
    for name in ("sharp.png", "frames/1.png", "frames/2.png"):
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / name)
    millimetres = rng.integers(0, 9000, (20, 24), dtype=np.uint16)
    PIL.Image.fromarray(millimetres).save(folder / "depth.png")
    np.save(folder / "depth.npy", millimetres.astype(np.float64) / 1000)
    manifest = folder / "manifest.jsonl"
    manifest.write_text(json.dumps(line) + "\n\n")
    return manifest


LISTED = {"ref": "sharp.png", "stack": ["frames/1.png", "frames/2.png"], "k": [10, 20]}
NAMED = {"source_rgb": "sharp.png", "ids": ["1", "2"], "k_values": {"1": 10.0, "2": 20.0}}


@pytest.mark.parametrize(
    "line",
    [
        {**LISTED, "depth": "depth.png"},
        {**LISTED, "depth": "depth.npy"},
        {**NAMED, "depth": "depth.npy", "stack_dir": "frames"},
        {**NAMED, "depth": "depth.npy", "stack_index": "frames/stack_index.json"},
    ],
)
def test_manifests_name_real_stacks(tmp_path: Path, line: dict[str, Any]) -> None:
    manifest = write_manifest(tmp_path, line)
    sample = ManifestStacks(manifest)[0]
    read = {
        name: np.array(PIL.Image.open(tmp_path / name), np.float32)
        for name in ("sharp.png", "frames/1.png", "frames/2.png", "depth.png")
    }
    assert torch.equal(
        sample["image"] * 255, torch.from_numpy(read["sharp.png"]).permute(2, 0, 1) / 255 * 255
    )
    assert np.allclose(sample["stack"][1].permute(1, 2, 0) * 255, read["frames/2.png"], atol=1e-4)
    assert np.allclose(sample["depth"][0], read["depth.png"] / 1000, rtol=1e-6)
    assert sample["K"].tolist() == [10, 20]
    train(tmp_path / "out", manifest, stack_most=2, batch_size=1)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({**LISTED}, "Line 1 of .* is no sample"),
        ({**LISTED, "depth": "depth.npy", "k": [10]}, "has 2 frames and the strengths"),
        ({**LISTED, "depth": "depth.npy", "k": [10, 0]}, "wanted one above 0 for each"),
        ({"depth": "depth.npy", "stack": [], "k": []}, "is no sample"),
    ],
)
def test_lines_that_are_no_samples_are_refused(
    tmp_path: Path, line: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        ManifestStacks(write_manifest(tmp_path, line))


def test_manifests_of_unequal_stacks_and_8_bit_depths_are_refused(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, {**LISTED, "depth": "frames/1.png"})
    with pytest.raises(ValueError, match="is of mode RGB; wanted a 16-bit PNG"):
        ManifestStacks(manifest)[0]
    shorter = {**LISTED, "depth": "depth.npy", "stack": ["frames/1.png"], "k": [3]}
    lines = [{**LISTED, "depth": "depth.npy"}, shorter]
    manifest.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=r"have \[1, 2\] frames; wanted the same"):
        ManifestStacks(manifest)
    with pytest.raises(ValueError, match="cannot be read"):
        ManifestStacks(tmp_path / "none.jsonl")


def test_central_crops_are_central(stacks_folder: Path, tmp_path: Path) -> None:
    args = train_dsfa.parse_args(arguments(tmp_path, stacks_folder))
    scene = open_stacks(str(stacks_folder), 0, args)[0][0]
    crop = central_crop(scene, 16)
    assert torch.equal(crop["stack"], scene["stack"][..., 4:20, 4:20])
    with pytest.raises(ValueError, match="Crops of 32 pixels do not fit"):
        central_crop(scene, 32)


# -- Refusals and configurations -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_network": None}, "Say where the model comes from"),
        ({"pretrained": "x"}, "Say where the model comes from"),
        ({"model_network": {"max_depth": 3}}, "model.network lacks backbone_config"),
        ({"model_fusion": {"fusion_heads": 2}}, "model.fusion adds DSFA blocks to a pretrained"),
        ({"model_initial_depth": 12}, "model.initial_depth is 12"),
        ({"stack_fewest": 4}, "stack.fewest is 4 and stack.most 3"),
        ({"stack_drop": 1.0}, "share from 0 to less than 1"),
        ({"loss_silog_weight": 0}, "Without loss.silog_weight"),
        ({"loss_largest_depth": 1e-4}, "wanted 0 < smallest < largest"),
        (
            {"data_stacks": None, "data_seed": 1, "validation_seed": 1, "validation_scenes": 1},
            "validation_seed equals data.seed",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, stacks_folder: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        train_dsfa.parse_args(arguments(tmp_path, stacks_folder, **settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_network": {**NETWORK, "neck": 3}}, "DepthAnythingDSFAConfig has no neck"),
        ({"model_network": {**NETWORK, "fusion_heads": 3}}, "model.network do not fit"),
        (
            {"model_network": {**NETWORK, "backbone_config": {**BACKBONE, "depth": 3}}},
            "Dinov2Config has no depth",
        ),
        ({"trained_parts": "neck,tail"}, "trained_parts names 'tail'"),
        (
            {"trained_parts": "fusion", "stack_fewest": 0, "stack_most": 0},
            "no step sees a stack",
        ),
    ],
)
def test_settings_that_do_not_fit_the_network_are_refused(
    tmp_path: Path, stacks_folder: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        task(tmp_path, stacks_folder, **settings)


def test_stacks_of_too_few_frames_are_refused(tmp_path: Path, stacks_folder: Path) -> None:
    one = task(tmp_path, stacks_folder, stack_most=4)
    with pytest.raises(ValueError, match="The stacks have 3 frames and stack.most is 4"):
        one(batch_of(one), 0)


@pytest.mark.parametrize("name", ["dsfa_small", "dsfa_small_single", "dsfa_depth_anything"])
def test_configurations_are_read(name: str) -> None:
    args = train_dsfa.parse_args(["--config", str(REPOSITORY / f"training/configs/{name}.yaml")])
    assert args.output_dir == f"outputs/{name}"


def test_small_configurations_differ_in_the_stack_alone() -> None:
    with_stack, single = (
        vars(train_dsfa.parse_args(["--config", str(REPOSITORY / f"training/configs/{name}.yaml")]))
        for name in ("dsfa_small", "dsfa_small_single")
    )
    different = {name for name in with_stack if str(with_stack[name]) != str(single[name])} - {
        "config",
        "command",
        "output_dir",
    }
    assert different == {"stack_fewest", "stack_most", "stack_drop"}

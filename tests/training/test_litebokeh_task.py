"""The task of LiteBokeh: its losses, what each phase trains and leaves alone, scores, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bokehdiff import losses
from bokehdiff.models.litebokeh import LiteBokehOutput, TinyUnet
from bokehdiff.subject_weights import subject_weights
from tests.test_vgg_feature_loss import random_vgg19
from tests.tiny_litebokeh import tiny_unet
from tests.training.litebokeh_runs import GLASS, arguments
from training import train_litebokeh
from training.litebokeh_task import LiteBokehTask, silence_dead_channels
from training.litebokeh_validation import validate_litebokeh
from training.optimization import learning_rate_factor, make_optimizer, parameter_groups
from training.task import trained_parameters

FROM_DISK: dict[str, Any] = {"model_kind": None, "model_options": None}


def task(tmp_path: Path, *flags: str, **settings: Any) -> LiteBokehTask:
    torch.manual_seed(0)
    return LiteBokehTask(train_litebokeh.parse_args(arguments(tmp_path, *flags, **settings)))


def pretrained_task(tmp_path: Path, **settings: Any) -> LiteBokehTask:
    """One whose network has statistics, and an enhancement that does something."""
    tiny_unet().save_pretrained(tmp_path / "network")
    return task(tmp_path, pretrained=tmp_path / "network", **FROM_DISK, **settings)


def batch_of(one: LiteBokehTask, *numbers: int) -> dict[str, Tensor]:
    samples = [one.training_samples()[number] for number in numbers or (0, 1)]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def descend(one: LiteBokehTask, batch: dict[str, Tensor], steps: int, rate: float) -> None:
    """Train on one batch, with some steps of warm-up and then half a cosine, as runs do."""
    groups = parameter_groups(trained_parameters(one), {}, one.decays)
    optimizer = make_optimizer("adamw", groups, lr=rate, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * learning_rate_factor(step, steps // 10, steps)
        optimizer.zero_grad()
        one(batch, step)["loss"].backward()
        optimizer.step()


def changed(before: dict[str, Tensor], after: nn.Module) -> set[str]:
    """What is not the same to the last bit, by name."""
    return {
        name for name, value in after.state_dict().items() if not torch.equal(value, before[name])
    }


def copy_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


# -- Losses --------------------------------------------------------------------------------------


def test_loss_is_the_weighted_sum_of_its_parts(tmp_path: Path) -> None:
    one = task(tmp_path, loss_l1_weight=3, loss_ssim_weight="{0: 2, 10: 4}")
    batch = batch_of(one)
    generator = torch.Generator().manual_seed(1)
    batch["subject"] = torch.rand(batch["subject"].shape, generator=generator)
    terms = one(batch, 5)
    rendered = one.network(batch["image"], enhance=False).rendered
    weight = 1 + 2 * batch["subject"]
    weight = weight / weight.mean((1, 2, 3), keepdim=True)
    l1 = (weight * (rendered - batch["bokeh"]).abs()).mean()
    ssim = losses.weighted_structural_similarity_loss(rendered, batch["bokeh"], weight)
    assert terms.keys() == {"loss", "l1", "ssim"}
    assert torch.allclose(terms["l1"], l1, rtol=1e-5)
    assert torch.allclose(terms["loss"], 3 * l1 + 3 * ssim, rtol=1e-5)


def test_the_first_hourglass_has_the_same_loss(tmp_path: Path) -> None:
    one = task(tmp_path, **GLASS, loss_first_weight=0.25)
    batch = batch_of(one)
    terms = one(batch, 0)
    out = one.network(batch["image"], enhance=False)
    weight = subject_weights(batch["subject"])
    first, second = (
        10 * losses.weighted_l1(picture, batch["bokeh"], weight)
        + 10 * losses.weighted_structural_similarity_loss(picture, batch["bokeh"], weight)
        for picture in (out.first_rendered, out.rendered)
    )
    assert torch.allclose(terms["first"], first, rtol=1e-5)
    assert torch.allclose(terms["loss"], second + 0.25 * first, rtol=1e-5)
    without = task(tmp_path, **GLASS, loss_first_weight=0)
    assert torch.allclose(without(batch, 0)["loss"], second, rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_a_subject_that_is_everywhere_weighs_as_much_as_none(tmp_path: Path, share: float) -> None:
    weighted, plain = task(tmp_path), task(tmp_path, "--no-loss_depth_weighted")
    batch = batch_of(weighted)
    batch["subject"] = torch.full_like(batch["subject"], share)
    losses_of = [float(one(batch, 0)["loss"].detach()) for one in (weighted, plain)]
    assert losses_of[0] == pytest.approx(losses_of[1], rel=1e-6)
    batch["subject"][..., :20] = 1 - share
    assert float(weighted(batch, 0)["loss"].detach()) != pytest.approx(losses_of[1], rel=1e-4)


def test_network_and_judges_each_learn_from_their_own_losses(tmp_path: Path) -> None:
    one = task(tmp_path, loss_adversarial_weight=0.5)
    terms = one(batch_of(one), 0)
    expected = 10 * (terms["l1"] + terms["ssim"]) + 0.5 * terms["adversarial"]
    assert torch.allclose(terms["loss"], expected + terms["discriminator"], rtol=1e-5)

    def reached(term: str) -> set[str]:
        trained = trained_parameters(one)
        gradients = torch.autograd.grad(
            terms[term], [*trained.values()], retain_graph=True, allow_unused=True
        )
        return {
            name.split(".")[0]
            for name, gradient in zip(trained, gradients, strict=True)
            if gradient is not None and gradient.abs().max() > 0
        }

    assert reached("adversarial") == {"network"}
    assert reached("discriminator") == {"discriminator"}
    assert reached("loss") == {"network", "discriminator"}


def test_features_of_vgg_count_and_are_not_trained(tmp_path: Path) -> None:
    save_file(random_vgg19(), tmp_path / "vgg19.safetensors")
    weights = {"loss_perceptual_weights": tmp_path / "vgg19.safetensors"}
    one = task(tmp_path, loss_perceptual_weight=0.1, **weights)
    batch = batch_of(one)
    terms = one(batch, 0)
    rendered = one.network(batch["image"], enhance=False).rendered
    judge = losses.VGGFeatureLoss.from_backbone(str(tmp_path / "vgg19.safetensors"))
    assert torch.allclose(terms["perceptual"], judge(rendered, batch["bokeh"]), rtol=1e-4)
    expected = 10 * (terms["l1"] + terms["ssim"]) + 0.1 * terms["perceptual"]
    assert torch.allclose(terms["loss"], expected, rtol=1e-5)
    assert all(name.startswith("network.") for name in trained_parameters(one))


# -- What the phases train -----------------------------------------------------------------------


def test_phase_bokeh_leaves_the_enhancement_as_it_is(tmp_path: Path) -> None:
    one = pretrained_task(tmp_path)
    before = copy_of(one.network)
    descend(one, batch_of(one), 2, 1e-2)
    others = {name for name in before if not name.startswith("enhancement.")}
    assert changed(before, one.network) == others


def test_phase_enhancement_leaves_all_else_as_it_is(tmp_path: Path) -> None:
    one = pretrained_task(tmp_path, phase="enhancement", validation_scenes=1)
    before = copy_of(one.network)
    with one.as_saved():
        one.validate()
    descend(one, batch_of(one), 2, 1e-2)
    enhancement = {name for name in before if name.startswith("enhancement.")}
    assert changed(before, one.network) == enhancement


def test_the_loss_of_the_enhancement_is_the_mean_difference(tmp_path: Path) -> None:
    one = pretrained_task(tmp_path, phase="enhancement")
    batch = batch_of(one)
    difference = one.network.enhancement(batch["degraded"]) - batch["image"]
    assert torch.allclose(one(batch, 0)["loss"], difference.abs().mean())


def test_validation_changes_no_statistics(tmp_path: Path) -> None:
    one = task(tmp_path, validation_scenes=1)
    batch = batch_of(one)
    one(batch, 0)
    before = copy_of(one.network)
    with one.as_saved():
        first, second = one.validate(), one.validate()
    assert first is not None and second is not None and first.scores == second.scores
    assert not changed(before, one.network)
    one(batch, 1)
    assert {name.rsplit(".", 1)[1] for name in changed(before, one.network)} == {
        *("running_mean", "running_var", "num_batches_tracked")
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_crops_are_learned_by_heart(tmp_path: Path) -> None:
    model = {"model_options": None, "model_variant": "tiny"}
    blurred = {"data_size": 128, "data_crop_size": 128, "data_options": {"radius": [8, 8]}}
    one = task(tmp_path, **model, **blurred)
    batch = batch_of(one, 0, 1, 2, 3)
    assert (batch["image"] - batch["bokeh"]).abs().mean() > 0.03
    descend(one, batch, 299, 3e-3)
    for rendered in (
        one.render(batch["image"]).rendered,
        one.eval().render(batch["image"]).rendered,
    ):
        assert (rendered - batch["bokeh"]).abs().mean() < 0.02


# -- Scores --------------------------------------------------------------------------------------


def test_scores_tell_the_subject_from_the_background() -> None:
    generator = torch.Generator().manual_seed(0)
    image, other = torch.rand((2, 3, 24, 32), generator=generator) * 0.8 + 0.1
    in_focus = torch.zeros(1, 24, 32, dtype=torch.bool)
    in_focus[:, 4:16, 8:20] = True
    alike = torch.zeros_like(in_focus)  # a pixel more on each side, for contrasts at the border
    alike[:, 3:17, 7:21] = True
    bokeh = torch.where(alike, image, other)

    def render(photo: Tensor) -> LiteBokehOutput:
        """Half the contrast; the enhancement gives it back and adds a hundredth."""
        return LiteBokehOutput(photo + 0.01, 0.5 * photo + 0.25)

    sample = {"image": image, "bokeh": bokeh}
    known = validate_litebokeh(
        render, [{**sample, "in_focus": in_focus}], torch.device("cpu"), pictures=1
    )
    scores = known.scores
    assert known.grid is not None and scores["scenes"] == 1
    assert scores["sharpness_subject"] == pytest.approx(1, abs=1e-4)
    assert scores["sharpness_subject_plain"] == pytest.approx(0.25, abs=1e-4)
    assert scores["sharpness_subject_identity"] == 1
    assert scores["psnr_subject"] == pytest.approx(40, abs=1e-3)
    assert scores["psnr_subject_identity"] > 100
    for suffix, picture in (("", image + 0.01), ("_plain", image / 2 + 0.25), ("_identity", image)):
        error = (picture - bokeh).square().mean(0)
        for name, region in (("psnr", error), ("psnr_background", error[~in_focus[0]])):
            expected = -10 * float(region.mean().log10())
            assert scores[name + suffix] == pytest.approx(expected, abs=1e-3)
        similarity = 1 - losses.structural_similarity_loss(
            *(2 * one[None] - 1 for one in (picture, bokeh))
        )
        assert scores[f"ssim{suffix}"] == pytest.approx(float(similarity), abs=1e-4)

    unknown = validate_litebokeh(render, [sample], torch.device("cpu"))
    assert unknown.grid is None
    assert not any("subject" in name or "background" in name for name in unknown.scores)


def test_the_enhancement_is_scored_by_itself(tmp_path: Path) -> None:
    one = pretrained_task(tmp_path, phase="enhancement", validation_scenes=4)
    with one.as_saved():
        first, second = one.validate(), one.validate()
    assert first is not None and second is not None and first.scores == second.scores
    enhancement = {"psnr_degraded", "psnr_enhanced", "psnr_clean", "background_error_rise"}
    assert enhancement <= first.scores.keys()
    assert first.scores["psnr_enhanced"] != first.scores["psnr_degraded"]
    # One that changes nothing: as good as what it is given, and no harm done.
    network = TinyUnet((4, 8, 8))
    network.save_pretrained(tmp_path / "untrained")
    settings = {"pretrained": tmp_path / "untrained", "validation_scenes": 4}
    identity = task(tmp_path, phase="enhancement", **settings, **FROM_DISK)
    with identity.as_saved():
        validation = identity.validate()
    assert validation is not None
    scores = validation.scores
    assert scores["psnr_enhanced"] == scores["psnr_degraded"]
    assert scores["psnr_clean"] > 100 and scores["background_error_rise"] == 0
    assert scores["psnr_degraded"] < 60


# -- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_kind": None}, "Say where the model comes from"),
        ({"pretrained": "somewhere"}, "Say where the model comes from"),
        ({"pretrained": "somewhere", "model_kind": None}, "a pretrained one has its own"),
        ({"phase": "enhancement"}, "goes on with the result of phase bokeh"),
        ({**GLASS, "model_variant": "nano"}, "model.variant is a size of tiny_unet"),
        ({"loss_l1_weight": 0, "loss_ssim_weight": 0}, "Nothing tells the picture"),
        ({"data_crop_size": 80}, "Crops of 80 pixels do not fit"),
        ({"data_crop_size": 24, "loss_adversarial_weight": 0.1}, "judge crops of at least 32"),
        ({"data_crop_size": 8}, "data_crop_size must be at least 16"),
        ({"data_seed": 5, "validation_seed": 5}, "scenes it has trained on"),
        ({"data_kind": "pairs"}, "data_kind pairs needs a folder"),
        ({"data_kind": "pairs", "data_folder": "x", "validation_scenes": 1}, "validation_folder"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train_litebokeh.parse_args(arguments(tmp_path, **settings))


def test_the_enhancement_has_no_other_losses_and_some_engine_settings_are_refused(
    tmp_path: Path,
) -> None:
    base = {"pretrained": "somewhere", "phase": "enhancement", **FROM_DISK}
    for name in ("perceptual", "adversarial"):
        with pytest.raises(ValueError, match=f"leave out loss.{name}_weight"):
            train_litebokeh.parse_args(arguments(tmp_path, **base, **{f"loss_{name}_weight": 1}))
    for flag in ("gradient_checkpointing", "compile"):
        with pytest.raises(ValueError, match=f"not trained with {flag}"):
            train_litebokeh.parse_args(arguments(tmp_path, f"--{flag}"))


@pytest.mark.parametrize("kind", ["tiny_unet", "glass_enc_net"])
def test_options_that_the_network_does_not_have_are_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ValueError, match=f"model.options do not fit {kind}"):
        task(tmp_path, model_kind=kind, model_options={"depth": 3})


def test_dead_channels_are_silenced_and_nothing_else() -> None:
    network = tiny_unet()
    norm = network.blocks[0].norm
    before = {name: value.clone() for name, value in network.state_dict().items()}
    # What was never active has no mean either.
    norm.running_var[:2], norm.running_mean[:2] = 0.0, 0.0
    silence_dead_channels(network)
    after = network.state_dict()
    assert (norm.weight[:2] == 0).all()
    assert torch.equal(norm.weight[2:], before["blocks.0.norm.weight"][2:])
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {
        f"blocks.0.norm.{name}" for name in ("weight", "running_var", "running_mean")
    }

"""The task of BokehFlow: losses, what is rendered with which depth, films, scores, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bokehdiff.depth_losses import scale_invariant_log_loss
from bokehdiff.losses import structural_similarity_loss
from bokehdiff.warping import warp
from tests.training.bokehflow_runs import CLIPS, TINY, arguments
from training import train_bokehflow
from training.bokehflow_task import BokehFlowTask, laid_on
from training.bokehflow_validation import near_depth_edges
from training.optimization import make_optimizer, parameter_groups
from training.task import trained_parameters

TINY_RECURRENT = {
    **{"channels": 8, "stem_channels": 8, "head_channels": 8, "camera_channels": 8, "blocks": 4},
    **{"heads": 2, "key_channels": 4, "value_channels": 4, "renderer": "pyramid"},
}


def task(tmp_path: Path, **settings: Any) -> BokehFlowTask:
    torch.manual_seed(0)
    return BokehFlowTask(train_bokehflow.parse_args(arguments(tmp_path, **settings)))


def batch_of(one: BokehFlowTask, *numbers: int) -> dict[str, Tensor]:
    samples = [one.training_samples()[number] for number in numbers or (0, 1)]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def with_random_weights(one: BokehFlowTask) -> BokehFlowTask:
    """The layers that begin at zero say something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in one.network.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
    return one


# -- Losses --------------------------------------------------------------------------------------


def test_loss_is_the_weighted_sum_of_its_parts(tmp_path: Path) -> None:
    weights = {"loss_ssim_weight": 0.5, "loss_depth_weight": "{0: 0.2, 10: 0.4}", "loss_border": 2}
    one = with_random_weights(task(tmp_path, loss_physics_weight=0.3, **weights))
    batch = batch_of(one)
    batch["gives_depth"] = torch.tensor([True, False])
    terms = one(batch, 5)

    image, true = batch["frames"][:, 0], batch["inverse_depth"][:, 0]
    own = one.network.observe(image).inverse_depth
    out = one.network.blur(
        *(image, batch["df"], batch["K"]),
        disparity=torch.cat([true[:1], own[1:]]),
        metric=True,
        photo_width_px=batch["photo_width_px"],
        return_physics=True,
    )
    inner = (..., slice(2, -2), slice(2, -2))
    target = batch["bokeh"][:, 0][inner]
    everywhere = torch.ones_like(true[:, 0], dtype=torch.bool)
    expected = {
        "reconstruction": 2 * (out.bokeh[inner] - target).abs().mean(),
        "ssim": structural_similarity_loss(2 * out.bokeh[inner] - 1, 2 * target - 1),
        "physics": 2 * (out.physics[inner] - target).abs().mean(),
        "depth": scale_invariant_log_loss(1 / own[:, 0], 1 / true[:, 0], everywhere),
    }
    assert terms.keys() == {"loss", *expected}
    for name, value in expected.items():
        assert torch.allclose(terms[name], value, rtol=1e-4, atol=1e-6), name
    total = (
        *(expected["reconstruction"], 0.5 * expected["ssim"]),
        *(0.3 * expected["physics"], 0.3 * expected["depth"]),
    )
    assert torch.allclose(terms["loss"], sum(total), rtol=1e-4)


def test_films_are_rendered_with_the_state_that_the_frame_before_left(tmp_path: Path) -> None:
    one = with_random_weights(task(tmp_path, loss_warping_weight=0.7, **CLIPS))
    batch = batch_of(one)
    batch["gives_depth"][:] = True
    terms = one(batch, 0)
    frames, state = [], None
    for number in range(3):
        out = one.network(
            *(batch["frames"][:, number], *batch["camera"].unbind(1)),
            state=state,
            inverse_depth=batch["inverse_depth"][:, number],
            photo_width_px=batch["photo_width_px"],
        )
        state = out.state
        frames.append(out.bokeh)
    distance = 2 * (torch.stack(frames, 1) - batch["bokeh"]).abs().mean()
    assert torch.allclose(terms["reconstruction"], distance, rtol=1e-4)
    changes = []
    for number in (1, 2):
        motion, visible = batch["motion"][:, number], batch["visible"][:, number] > 0
        change = 2 * (frames[number] - warp(frames[number - 1], motion)).abs()
        height, width = motion.shape[-2:]
        x = motion[:, 0] + torch.arange(width)
        y = motion[:, 1] + torch.arange(height)[:, None]
        inside = ((x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1))[:, None]
        changes.append(change.mean(1, keepdim=True)[visible & inside].mean())
    assert torch.allclose(terms["warping"], sum(changes) / 2, rtol=1e-4)
    alone = one.network(
        *(batch["frames"][:, 2], *batch["camera"].unbind(1)),
        inverse_depth=batch["inverse_depth"][:, 2],
        photo_width_px=batch["photo_width_px"],
    )
    assert not torch.allclose(alone.bokeh, frames[2], atol=1e-5)


def test_depth_that_is_not_given_is_learned_and_not_seen(tmp_path: Path) -> None:
    one = with_random_weights(task(tmp_path))
    batch = batch_of(one)
    batch["gives_depth"] = torch.tensor([True, False])
    out, own = one.render(batch, 0, None)
    batch["inverse_depth"] = batch["inverse_depth"].flip(-1)
    changed, own_again = one.render(batch, 0, None)
    assert torch.equal(own, own_again)
    assert not torch.equal(out.bokeh[0], changed.bokeh[0])
    assert torch.equal(out.bokeh[1], changed.bokeh[1])
    assert torch.equal(out.inverse_depth[1], own[1])

    batch["inverse_depth"][0, :, :, :5] = torch.nan  # holes are filled with the network's own
    holes, _ = one.render(batch, 0, None)
    assert torch.equal(holes.inverse_depth[0, :, :5], own[0, :, :5])
    assert torch.equal(holes.inverse_depth[0, :, 5:], batch["inverse_depth"][0, 0, :, 5:])
    terms = one(batch, 0)
    terms["loss"].backward()
    for name, value in trained_parameters(one).items():
        assert value.grad is None or torch.isfinite(value.grad).all(), name


def test_relative_depth_is_laid_on_the_networks_own() -> None:
    generator = torch.Generator().manual_seed(0)
    own = 0.2 + torch.rand((3, 1, 6, 8), generator=generator, dtype=torch.float64)
    relative = torch.stack([40 * own[0] - 7, -own[1], own[2]])
    relative[2, 0, 0, 0] = torch.nan
    found = laid_on(own, relative)
    assert torch.allclose(found[0], own[0])
    known = relative[2].isfinite()
    assert torch.allclose(found[2][known], own[2][known]) and found[2, 0, 0, 0].isnan()
    # Near and far swapped: the order of the map counts, spread a little.
    assert torch.allclose(found[1].std(correction=0), torch.tensor(0.05, dtype=torch.float64))
    assert torch.allclose(found[1].mean(), own[1].mean())
    order = torch.corrcoef(torch.stack([found[1].flatten(), relative[1].flatten()]))[0, 1]
    assert float(order) == pytest.approx(1)


# -- What is trained -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        CLIPS,
        {**CLIPS, "model_options": {**TINY, "fusion": "both", "radius_tokens": False}},
        {"model_mixer": "bigdr", "model_options": TINY_RECURRENT},
        {"model_mixer": "bigdr", "model_options": {**TINY_RECURRENT, "temporal": "final"}, **CLIPS},
        {
            **{"model_mixer": "bigdr", "loss_coarse_depth_weight": 0},
            "model_options": {**TINY_RECURRENT, "fusion": "depth_to_bokeh"},
        },
    ],
    ids=["stills", "clips", "both", "bigdr", "bigdr final", "bigdr without coarse depth"],
)
def test_gradients_reach_all_that_is_trained(tmp_path: Path, settings: dict[str, Any]) -> None:
    one = with_random_weights(task(tmp_path, **settings))
    batch = batch_of(one)
    batch["gives_depth"] = torch.tensor([True, False])
    one(batch, 0)["loss"].backward()
    for name, value in trained_parameters(one).items():
        assert value.grad is not None, name
        assert torch.isfinite(value.grad).all() and value.grad.abs().max() > 0, name


def test_norms_biases_and_gates_do_not_decay(tmp_path: Path) -> None:
    one = task(tmp_path, **CLIPS)
    parameters = trained_parameters(one)
    groups = parameter_groups(parameters, {"depth_head": 0.5}, one.decays)
    optimizer = make_optimizer("adamw", groups, lr=1e-3, weight_decay=0.1)
    decay = {
        id(value): (group["weight_decay"], group["scale"])
        for group in optimizer.param_groups
        for value in group["params"]
    }
    assert len(decay) == len(parameters)
    for name, value in parameters.items():
        weight_decay, scale = decay[id(value)]
        assert scale == (0.5 if "depth_head" in name else 1.0)
        unpulled = name.endswith("bias") or "norm" in name or "stillness" in name
        if not name.startswith("network.stem"):
            assert weight_decay == (0.0 if unpulled else 0.1), name
        else:
            assert weight_decay == (0.1 if value.ndim > 1 else 0.0), name


@pytest.mark.parametrize("settings", [{}, CLIPS], ids=["stills", "clips"])
def test_loss_falls_on_one_batch(tmp_path: Path, settings: dict[str, Any]) -> None:
    one = task(tmp_path, loss_depth_weight=0.3, **settings)
    batch = batch_of(one)
    optimizer = torch.optim.AdamW(trained_parameters(one).values(), lr=5e-3)
    course = []
    for step in range(20 if settings else 50):
        terms = one(batch, step)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        course.append({name: float(value.detach()) for name, value in terms.items()})
    first, last = course[0], course[-1]
    assert last["loss"] < 0.75 * first["loss"]
    assert last["depth"] < 0.75 * first["depth"]
    assert last["reconstruction"] < first["reconstruction"]


# -- Scores --------------------------------------------------------------------------------------


def test_near_depth_edges_is_within_two_radii_of_a_jump() -> None:
    radius = torch.full((20, 30), -2.0)
    radius[:, 12:] = 3.0  # a jump between columns 11 and 12
    near = near_depth_edges(radius)
    columns = near.any(0).nonzero().flatten().tolist()
    assert near.all(0).nonzero().flatten().tolist() == columns
    assert columns == list(range(11 - 6, 12 + 6 + 1))
    slope = torch.linspace(-5, 5, 30).expand(20, 30)  # steep, but nothing hides anything
    assert not near_depth_edges(slope).any()


@pytest.mark.parametrize("settings", [{}, CLIPS], ids=["stills", "clips"])
def test_untrained_scores_are_those_of_the_physics(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    one = task(tmp_path, validation_scenes=3, validation_pictures=2, **settings)
    with one.as_saved(), torch.no_grad():
        validation = one.validate()
    assert validation is not None and validation.grid is not None
    scores = validation.scores
    assert scores["scenes"] == 3 and 0 <= scores["control"] <= 1
    if not settings:
        for name in ("psnr", "psnr_edges", "ssim"):
            assert scores[name] == pytest.approx(scores[f"{name}_physics"], abs=1e-4)
        assert "warping_error" not in scores
    else:
        assert scores["warping_error_single"] > 0 and scores["warping_error_target"] > 0
        # Features and blur are carried from the first step on.
        assert scores["warping_error"] < scores["warping_error_single"]
    assert scores["psnr"] > scores["psnr_own_depth"] and scores["abs_rel"] > 0
    line = one.validation_summary(scores)
    assert f"PSNR {scores['psnr']:.2f} dB" in line
    # Scores are a function of the weights: nothing random, nothing left over.
    again = one.validate()
    assert again is not None and again.scores == scores


# -- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_variant": None}, "Say where the model comes from"),
        ({"pretrained": "x"}, "Say where the model comes from"),
        ({"model_variant": None, "pretrained": "x"}, "model.options are of a network made from"),
        ({"data_true_depth_share": 1.2}, "share from 0 to 1"),
        ({"loss_reconstruction_weight": 0, "loss_ssim_weight": 0}, "Nothing tells the rendering"),
        ({"loss_border": 7}, "leaves less than 11 of crops of 24"),
        ({"data_kind": "pairs"}, "data_kind pairs needs a folder"),
        (
            {"data_kind": "pairs", "data_folder": "x", "validation_scenes": 1},
            "Held-out photographs are not made on the fly",
        ),
        ({"data_crop_size": 40}, "Crops of 40 pixels do not fit stills of 32"),
        ({"data_seed": 1, "validation_seed": 1}, "validation_seed equals data.seed"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        train_bokehflow.parse_args(arguments(tmp_path, **settings))


@pytest.mark.parametrize("flag", ["--compile", "--gradient_checkpointing"])
def test_what_it_is_not_trained_with_is_refused(tmp_path: Path, flag: str) -> None:
    with pytest.raises(ValueError, match=f"not trained with {flag[2:]}"):
        train_bokehflow.parse_args(arguments(tmp_path, flag))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"chanels": 8}, "model.options do not fit BokehFlowModel"),
        ({"fusion": "none"}, "fusion is 'none'; wanted one of"),
    ],
)
def test_options_that_do_not_fit_the_network_are_refused(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        task(tmp_path, model_options=options)

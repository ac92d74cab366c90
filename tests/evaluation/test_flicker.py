"""The flicker metric on films whose flicker is known, and the command on an untrained network."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evaluation import flicker
from evaluation.flicker import (
    MovingSquare,
    frame_difference,
    ghosting,
    largest_change,
    seed_spread,
    static_flicker,
    warping_errors,
)

GREY = torch.full((1, 3, 24, 32), 0.5)


def as_it_is(frame: Tensor, number: int, state: Any) -> tuple[dict[str, Tensor], Any]:
    """A film that carries nothing."""
    return {"bokeh": frame}, None


def exponential_mean(carry: float) -> flicker.Film:
    """``z_t = carry z_(t-1) + (1 - carry) y_t``."""

    def film(frame: Tensor, number: int, state: Any) -> tuple[dict[str, Tensor], Any]:
        mean = frame if state is None else carry * state + (1 - carry) * frame
        return {"bokeh": mean}, mean

    return film


# -- the metric ------------------------------------------------------------------------------------


def test_what_carries_nothing_has_ratios_of_one() -> None:
    found = static_flicker(as_it_is, GREY, noise=0.05)["bokeh"]
    assert found["difference"] == found["difference_alone"] > 0
    assert found["spread"] == found["spread_alone"] > 0


def test_noise_is_measured_as_large_as_it_is() -> None:
    found = static_flicker(as_it_is, GREY, noise=0.04, seeds=16)["bokeh"]
    # Of two independent Gaussians the mean distance is 2 / sqrt(pi) of the standard deviation, and
    # of n samples the standard deviation comes out too small by about 1 - 1 / (4 (n - 1)).
    assert found["difference"] == pytest.approx(0.04 * 2 / math.sqrt(math.pi), rel=0.01)
    assert found["spread"] == pytest.approx(0.04 * (1 - 1 / 60), rel=0.01)


@pytest.mark.parametrize("carry", [0.3, 0.6, 0.85])
def test_an_exponential_mean_has_the_ratios_of_theory(carry: float) -> None:
    found = static_flicker(exponential_mean(carry), GREY, noise=0.03, frames=40, dropped=30)
    one = found["bokeh"]
    difference = one["difference"] / one["difference_alone"]
    assert difference == pytest.approx((1 - carry) / math.sqrt(1 + carry), rel=0.02)
    spread = one["spread"] / one["spread_alone"]
    assert spread == pytest.approx(math.sqrt((1 - carry) / (1 + carry)), rel=0.03)


def test_a_still_film_without_noise_does_not_flicker() -> None:
    generator = torch.Generator().manual_seed(0)
    still = torch.rand(1, 3, 20, 28, generator=generator)
    found = static_flicker(exponential_mean(0.5), still, noise=0.0)["bokeh"]
    assert found["difference"] == found["spread"] == 0
    assert largest_change(exponential_mean(0.5), still, 5) == {"bokeh": 0.0}


def test_the_largest_change_of_any_pixel_and_frame_is_found() -> None:
    def drifting(frame: Tensor, number: int, state: Any) -> tuple[dict[str, Tensor], Any]:
        moved = frame.clone()
        moved[0, 1, 3, 4] += {2: -0.3, 3: 0.2}.get(number, 0.0)
        return {"bokeh": moved}, None

    assert largest_change(drifting, GREY, 5)["bokeh"] == pytest.approx(0.3)


def test_only_the_pixels_asked_for_count() -> None:
    left = torch.zeros(1, 1, 24, 32, dtype=torch.bool)
    left[..., :16] = True

    def noisy_on_the_right(frame: Tensor, number: int, state: Any) -> tuple[dict[str, Tensor], Any]:
        return {"bokeh": torch.where(left, GREY, frame), "coc": frame}, None

    found = static_flicker(noisy_on_the_right, GREY, noise=0.05, where={"bokeh": left})
    assert found["bokeh"]["difference"] == found["bokeh"]["spread"] == 0
    assert found["coc"]["difference"] > 0.01
    before, now = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 2.0], [3.0, -8.0]]]])
    assert frame_difference(now, before) == pytest.approx(3.5)
    assert frame_difference(now, before, now < 2.5) == pytest.approx((1 + 2 + 8) / 3)
    two = torch.tensor([[[[1.0, 5.0]]], [[[3.0, 5.0]]]])
    assert seed_spread(two) == pytest.approx(math.sqrt(2) / 2)


@pytest.mark.parametrize("changes", [{"seeds": 1}, {"frames": 7}])
def test_too_few_films_or_frames(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 2 films and 2 frames that count"):
        static_flicker(as_it_is, GREY, noise=0.05, **changes)


# -- what moves ------------------------------------------------------------------------------------


def pan(step: int, frames: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """A camera that turns by so many pixels per frame: frames, motion, visible."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.rand(3, 24, 40 + step * frames, generator=generator)
    pictures = torch.stack([wide[..., step * t : step * t + 40] for t in range(frames)])
    motion = torch.zeros(frames, 2, 24, 40)
    motion[1:, 0] = step
    visible = torch.ones(frames, 1, 24, 40)
    visible[..., 40 - step :] = 0
    visible[0] = 0
    return pictures, motion, visible


def test_what_only_moves_has_no_warping_error() -> None:
    pictures, motion, visible = pan(3)
    found = warping_errors(as_it_is, pictures, pictures, motion, visible)
    assert found["error"] == found["error_alone"] == 0
    for name in ("warping", "warping_alone", "warping_truth"):
        assert found[name] < 1e-6
    moved = warping_errors(as_it_is, pictures, pictures, torch.zeros_like(motion), visible)
    assert moved["warping"] > 0.1, "without the motion everything has changed"


def test_what_lags_behind_is_wrong_and_what_is_noisy_flickers() -> None:
    pictures, motion, visible = pan(3)
    lagging = warping_errors(exponential_mean(0.5), pictures, pictures, motion, visible)
    assert lagging["error"] > 0.05 and lagging["error_alone"] == 0
    noise = 0.05 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
    noisy = warping_errors(as_it_is, pictures + noise, pictures, motion, visible)
    assert noisy["warping"] == pytest.approx(0.1 / math.sqrt(math.pi), rel=0.05)
    assert noisy["warping_truth"] < 1e-6
    above = torch.zeros(visible.shape, dtype=torch.bool)
    above[:, :, :12] = True
    half_noisy = pictures + noise * ~above
    parts = (half_noisy, pictures, motion, visible)
    assert warping_errors(as_it_is, *parts, where=above)["warping"] < 1e-6
    assert warping_errors(as_it_is, *parts, where=above)["error"] == 0
    assert warping_errors(as_it_is, *parts, where=~above)["warping"] > 0.05


def test_the_ghost_of_a_constant_mean_is_that_of_a_constant_mean() -> None:
    square = MovingSquare.of_size(64, 6)
    alone = ghosting(as_it_is, square.frames, square.swept, 0.7)["bokeh"]
    assert alone["carried"] == 0 and alone["constant"] > 0.001
    constant = ghosting(exponential_mean(0.7), square.frames, square.swept, 0.7)["bokeh"]
    assert constant["carried"] == pytest.approx(constant["constant"], rel=1e-5)
    less = ghosting(exponential_mean(0.2), square.frames, square.swept, 0.7)["bokeh"]
    assert less["carried"] < 0.5 * less["constant"]


def test_the_square_moves_over_a_ground_that_stands_still() -> None:
    square = MovingSquare.of_size(128, 5)
    near = square.inverse_depth > 0.5
    assert near.sum((1, 2, 3)).tolist() == [32 * 32] * 5
    assert torch.equal(near[1:, ..., 2:], near[:-1, ..., :-2])
    assert torch.equal(square.swept[-1], near.any(0))
    still = ~square.swept[-1].expand(3, -1, -1)
    assert torch.equal(square.frames[0][still], square.frames[-1][still])
    moved = square.frames[1][near[1].expand(3, -1, -1)]
    assert torch.equal(moved, square.frames[0][near[0].expand(3, -1, -1)])
    radii = square.lens.K * (square.inverse_depth - square.lens.df)
    assert radii.max() == pytest.approx(8, abs=1e-4) and radii.min() == pytest.approx(-8, abs=1e-4)


# -- the command -----------------------------------------------------------------------------------

TINY = "--size 64 --static-clips 1 --moving-clips 1 --frames 5 --dropped 2 --seeds 2"
TINY += " --moving-frames 3 --noise 0.05"


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    flicker.add_arguments(parser)
    parsed = parser.parse_args(words)
    parsed.command_line = " ".join(words)
    return parsed


def test_an_untrained_network_flickers_less_when_it_carries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "flicker.json"
    assert flicker.run(arguments(*TINY.split(), "--out", str(out))) == 0
    printed = capsys.readouterr().out
    assert "| gated_conv nano" in printed and "constant mean" in printed
    figures = json.loads(out.read_text())
    own, given = figures["results"]
    assert (own["depth"], given["depth"]) == ("own", "given")
    for row in own["static"]:
        assert 0 < row["difference_ratio"] < 0.7, row
    (blurred,) = (row for row in given["static"] if row["quantity"] == "bokeh")
    assert 0 < blurred["difference_ratio"] < 0.7
    # Depth that is given does not flicker, and so there is no ratio to tell.
    assert {row["difference_ratio"] for row in given["static"] if row is not blurred} == {None}
    for result in (own, given):
        assert max(result["unchanged"].values()) <= 1e-6
        (moving,) = result["moving"]
        assert moving["warping"] < moving["warping_alone"]
        assert 0 <= moving["warping_truth"] and 0 < moving["error"]
        square = result["square"]["bokeh"]
        assert square["carried"] < square["constant"]


def test_without_carrying_there_is_nothing_to_gain(tmp_path: Path) -> None:
    out = tmp_path / "flicker.json"
    words = [*TINY.split(), "--option", "temporal=none", "--depth", "own", "--out", str(out)]
    flicker.run(arguments(*words))
    (own,) = json.loads(out.read_text())["results"]
    assert {row["difference_ratio"] for row in own["static"]} == {1.0}
    assert own["moving"][0]["warping"] == own["moving"][0]["warping_alone"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--noise 0", "numbers above 0"),
        ("--frames 5 --dropped 4", "leaves too few"),
        ("--seeds 1", "--seeds must be at least 2"),
        ("--size 8", "--size must be at least 32"),
        ("--option channel=8", "wanted NAME=VALUE with one of .*channels"),
        ("--model nowhere --variant nano", "leave out --variant"),
        ("--model nowhere/at/all", "nowhere/at/all"),
        ("--variant pico", "no 'pico'"),
    ],
)
def test_mistakes(words: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        flicker.run(arguments(*words.split()))

"""Clips: what a sample is, that depth, motion and blur agree with the pictures, and the camera."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bokehdiff.optics import strength_from_camera
from bokehdiff.rendering import render_bokeh
from data_synthesis.clip_scenes import MOTIONS, ClipScenes

SIZE = 48
CAMERA = ("f_number", "focal_length_mm", "focus_distance_m", "sensor_width_mm", "photo_width_px")
Clip = dict[str, torch.Tensor]


def strength(clip: Clip) -> float:
    return strength_from_camera(*(clip[name].item() for name in CAMERA))


def radius(clip: Clip) -> torch.Tensor:
    """(T, 1, H, W) pixels."""
    return strength(clip) * (clip["inverse_depth"] - 1 / clip["focus_distance_m"]).abs()


def eroded(mask: torch.Tensor) -> torch.Tensor:
    """(..., H, W) bool: all of the 3 x 3 pixels around."""
    whole = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    return (1 - torch.nn.functional.max_pool2d(1 - whole, 3, 1, 1)).reshape(mask.shape) > 0


def before(clip: Clip, name: str, t: int, sign: int = 1) -> torch.Tensor:
    """(C, H, W) the frame before, each pixel taken bilinearly from p + motion."""
    size = clip["motion"].shape[-1]
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    there = torch.stack([x, y], dim=-1) + sign * clip["motion"][t].permute(1, 2, 0)
    return torch.nn.functional.grid_sample(
        clip[name][t - 1 : t].double(),
        (there.double() * 2 / (size - 1) - 1)[None],
        align_corners=True,
        padding_mode="border",
    )[0]


@pytest.fixture(scope="module")
def clips() -> dict[str, list[Clip]]:
    """Clips without noise, by motion."""
    return {
        motion: [
            ClipScenes(3, SIZE, frames=3, motions=(motion,), noise=(0, 0))[index]
            for index in range(10)
        ]
        for motion in MOTIONS
    }


def test_a_sample_is_what_it_says() -> None:
    scenes = ClipScenes(1, SIZE, frames=3)
    for index in range(6):
        clip = scenes[index]
        assert {name: tuple(value.shape) for name, value in clip.items()} == {
            "frames": (3, 3, SIZE, SIZE),
            "bokeh": (3, 3, SIZE, SIZE),
            "inverse_depth": (3, 1, SIZE, SIZE),
            "motion": (3, 2, SIZE, SIZE),
            "visible": (3, 1, SIZE, SIZE),
            **dict.fromkeys(CAMERA, ()),
        }
        assert all(value.dtype == torch.float32 for value in clip.values())
        for name in ("frames", "bokeh"):
            steps = clip[name] * 255
            assert clip[name].min() >= 0 and clip[name].max() <= 1
            assert torch.allclose(steps, steps.round(), atol=1e-4)
        assert clip["inverse_depth"].min() > 0.0999 and clip["inverse_depth"].max() < 3.3001
        assert torch.equal(clip["motion"] * 2, (clip["motion"] * 2).round())
        assert clip["motion"].abs().max() <= 4
        assert set(clip["visible"].unique().tolist()) <= {0.0, 1.0}
        assert not clip["motion"][0].any() and not clip["visible"][0].any()
    assert scenes.settings["frames"] == 3
    picture = ClipScenes(1, 16, frames=1)[0]
    assert picture["frames"].shape == (1, 3, 16, 16) and not picture["visible"].any()


def test_samples_depend_on_seed_and_index_alone() -> None:
    first, again = ClipScenes(1, 16, frames=2), ClipScenes(1, 16, frames=2)
    later = again[2]
    for name, value in first[2].items():
        assert torch.equal(value, later[name]), name
    assert not torch.equal(first[0]["frames"], first[1]["frames"])
    assert not torch.equal(first[0]["frames"], ClipScenes(2, 16, frames=2)[0]["frames"])


def test_the_camera_is_a_real_one_and_blurs_as_far_as_drawn(clips: dict[str, list[Clip]]) -> None:
    largest = []
    for clip in sum(clips.values(), []):
        f_number, focal_length_mm, focus_distance_m, width, photo_width_px = (
            clip[name].item() for name in CAMERA
        )
        assert 0.7 * (1 - 1e-5) <= f_number <= 22 * (1 + 1e-5)
        at_an_end = min(abs(f_number / 0.7 - 1), abs(f_number / 22 - 1)) < 1e-5
        assert 24 * (1 - 1e-5) <= focal_length_mm <= 135 * (1 + 1e-5) or at_an_end
        assert width == 36 and 384 <= photo_width_px <= 1920 and photo_width_px % 1 == 0
        # In focus is a surface that is seen in the first frame, to the rounding of float32.
        nearest = (clip["inverse_depth"][0] * focus_distance_m - 1).abs().min()
        assert nearest < 1e-6
        largest.append(radius(clip).max().item())
    # At 48 pixels half of 28, which steep surfaces reduce.
    assert max(largest) <= 14 * (1 + 1e-4)
    assert sum(value > 1.5 * (1 - 1e-4) for value in largest) > 0.7 * len(largest)
    assert max(largest) > 8


def test_strength_and_focus_are_those_of_the_blur(clips: dict[str, list[Clip]]) -> None:
    """The library's own renderer comes nearest with the K and df of the camera."""
    errors = np.zeros((len(clips["still"]), 5))
    for row, clip in zip(errors, clips["still"], strict=True):
        rho, K, df = clip["inverse_depth"][:1], strength(clip), 1 / clip["focus_distance_m"]
        span = (rho.max() - rho.min()) / 8
        settings = ((K, df), (0.75 * K, df), (1.33 * K, df), (K, df + span), (K, df - span))
        for column, (strength_there, focus) in enumerate(settings):
            shown = render_bokeh(
                clip["frames"][:1], rho, focus.clamp_min(0), strength_there, metric=True
            )
            row[column] = (shown - clip["bokeh"][:1]).abs().mean()
    assert (errors.mean(0)[0] < 0.8 * errors.mean(0)[1:]).all(), errors.mean(0)


def test_still_clips_do_not_change(clips: dict[str, list[Clip]]) -> None:
    for clip in clips["still"]:
        for name in ("frames", "bokeh", "inverse_depth"):
            assert torch.equal(clip[name], clip[name][:1].expand_as(clip[name])), name
        assert not clip["motion"].any() and clip["visible"][1:].all()


@pytest.mark.parametrize("motion", ["pan", "parallax", "moving"])
def test_motion_takes_the_frame_before_to_the_next(
    clips: dict[str, list[Clip]], motion: str
) -> None:
    """Where the pixels around move alike and are visible: no other surface is in the pixel.

    Whole pixels of motion: the same light, exactly. Half pixels: the frame before is blurred by
    the look-up, so that only a wrong motion is ruled out, by being worse.
    """
    same = whole = 0
    right, wrong, changed, bokeh = 0.0, 0.0, 0.0, [0.0]
    for clip in clips[motion]:
        for t in (1, 2):
            steps = clip["motion"][t]
            alike = torch.stack(
                [
                    (steps == steps.roll((y, x), (1, 2))).all(0)
                    for y in (-1, 0, 1)
                    for x in (-1, 0, 1)
                ]
            ).all(0)
            alone = alike & eroded(clip["visible"][t, 0] > 0)
            moved = alone & steps.any(0)
            change = (before(clip, "frames", t) - clip["frames"][t]).abs().mean(0)
            opposite = (before(clip, "frames", t, sign=-1) - clip["frames"][t]).abs().mean(0)
            exact = moved & (steps % 1 == 0).all(0)
            whole += int(exact.sum())
            changed += change[exact].sum().item()
            same += int((change[exact] < 1e-6).sum())
            right += change[moved].sum().item()
            wrong += opposite[moved].sum().item()
            if motion == "pan" and exact.any():
                difference = (before(clip, "bokeh", t) - clip["bokeh"][t])[:, alone]
                bokeh.append(difference.square().mean().item())
    # A transparent thing in front may move otherwise; most clips have none.
    assert whole > 300 and same > 0.85 * whole and changed / whole < 1 / 255
    assert right < 0.5 * wrong
    # Through other lens points: two pictures of 40 dB or better.
    assert max(bokeh) < 2e-4


def test_what_was_hidden_is_not_visible(clips: dict[str, list[Clip]]) -> None:
    """Visible means seen at the same depth; what the picture's border or a thing hid is not."""
    hidden = 0
    for clip in clips["moving"] + clips["parallax"]:
        for t in (1, 2):
            seen = clip["visible"][t, 0] > 0
            change = (before(clip, "inverse_depth", t) - clip["inverse_depth"][t])[0].abs()
            span = clip["inverse_depth"].max() - clip["inverse_depth"].min()
            assert (change[seen] < 0.05 * span).float().mean() > 0.995
            hidden += int((~seen).sum())
    assert hidden > 1000
    pan = next(clip for clip in clips["pan"] if clip["motion"][1, 0].min() >= 1)
    # What came in at the right was outside.
    assert not pan["visible"][1, 0, :, -int(pan["motion"][1, 0].min()) :].any()


def test_near_things_hide_far_ones(clips: dict[str, list[Clip]]) -> None:
    """Where a moving thing comes over the still background, the surface comes nearer."""
    nearer = total = 0
    for clip in clips["moving"]:
        moves = clip["motion"].any(1)
        if moves[1:].all():
            continue
        covered = moves[2] & ~moves[1]
        rho = clip["inverse_depth"][:, 0]
        total += int(covered.sum())
        nearer += int((rho[2] >= rho[1])[covered].sum())
    assert total > 200 and nearer > 0.99 * total


def test_parallax_is_an_affine_function_of_disparity(clips: dict[str, list[Clip]]) -> None:
    found = 0
    for clip in clips["parallax"]:
        steps, rho = clip["motion"][1, 0], clip["inverse_depth"][1, 0]
        assert not clip["motion"][:, 1].any()
        speeds = steps.unique()
        if len(speeds) < 3:
            continue
        found += 1
        means = torch.stack([rho[steps == speed].mean() for speed in speeds])
        assert abs(np.corrcoef(speeds.numpy(), means.numpy())[0, 1]) > 0.9
    assert found >= 4


def test_what_is_in_focus_stays_as_it_is(clips: dict[str, list[Clip]]) -> None:
    """Where no circle of confusion of more than a third of a pixel reaches."""
    changes = []
    for clip in sum(clips.values(), []):
        r = radius(clip)[0, 0]
        y, x = (r > 0.35).nonzero(as_tuple=True)
        rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
        apart = torch.hypot((rows[..., None] - y).float(), (columns[..., None] - x).float())
        alone = (apart > r[y, x] + 1).all(-1) & (r < 0.35)
        changes.append((clip["bokeh"][0] - clip["frames"][0]).abs()[:, alone].flatten())
    change = torch.cat(changes)
    # Discs within a pixel change little more than the rounding to 8 bits.
    assert len(change) > 1000 and change.mean() < 1.5 / 255


def test_noise_is_that_of_the_sensor_and_fades_out_with_the_blur() -> None:
    settings: dict[str, Any] = {"seed": 3, "size": SIZE, "frames": 4, "motions": ("still",)}
    clean, noisy = (
        [ClipScenes(**settings, noise=noise)[index] for index in range(6)]
        for noise in ((0.0, 0.0), (0.03, 0.03))
    )
    for without, with_noise in zip(clean, noisy, strict=True):
        assert torch.equal(without["inverse_depth"], with_noise["inverse_depth"])
        noise = with_noise["frames"] - without["frames"]
        kept = with_noise["bokeh"] - without["bokeh"]
        # Four deviations from the ends of [0, 1], where nothing is clipped.
        free = ((without["frames"] - 0.5).abs() < 0.38) & ((without["bokeh"] - 0.5).abs() < 0.38)
        where = free.all(0)
        if where.sum() < 1000:
            continue
        assert noise[:, where].std() == pytest.approx(0.03, rel=0.05)
        assert np.abs(np.corrcoef(noise[:, where].numpy()) - np.eye(4)).max() < 0.1
        r = radius(without).expand_as(noise)
        step = 1.01 / 255  # both are rounded
        share = ((2 - r) / 1.5).clamp(0, 1)
        assert (kept - share * noise).abs()[free].max() <= 2 * step
        assert not kept[r >= 2].any()


def test_a_fifth_of_the_clips_have_no_noise() -> None:
    scenes = ClipScenes(5, 16, frames=2, motions=("still",))
    still = [torch.equal(*scenes[index]["frames"]) for index in range(60)]
    assert 4 <= sum(still) <= 22  # binomial: 12 +- 3.1


def test_motions_can_be_chosen() -> None:
    def moving(**settings: Any) -> int:
        scenes = ClipScenes(7, 16, frames=2, noise=(0, 0), **settings)
        return sum(bool(scenes[index]["motion"].any()) for index in range(40))

    assert moving(motions=("still",)) == 0 and moving(still_share=1.0) == 0
    assert moving(motions=("pan",)) == 40
    assert 8 <= moving(motions=("still", "pan"), still_share=0.5) <= 32


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"size": 8}, "size is 8"),
        ({"frames": 0}, "frames is 0"),
        ({"motions": ()}, r"motions is \(\); wanted one or more of"),
        ({"motions": "still"}, "motions is 'still'"),
        ({"motions": ("zoom",)}, "motions is"),
        ({"still_share": 1.5}, "still_share is 1.5"),
        ({"noise": (0.1, 0.0)}, r"noise is \(0.1, 0.0\); wanted \(low, high\)"),
        ({"noise": (0.0, 2.0)}, "noise is"),
        ({"length": -1}, "length is -1"),
    ],
)
def test_mistakes_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ClipScenes(**settings)


def test_length_makes_it_finite() -> None:
    with pytest.raises(TypeError, match="endless"):
        len(ClipScenes())
    scenes = ClipScenes(length=2, size=16)
    assert len(scenes) == 2
    with pytest.raises(IndexError, match="less than 2"):
        scenes[2]

"""Subjects followed through synthetic films: textured things before a textured wall."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from bokehdiff.images import InputRepairedWarning
from bokehdiff.subject_tracking import CentralSubject, SteadyPlane, TrackedSubject

HEIGHT, WIDTH, RATE = 108, 192, 25.0
SIDE = 26


def texture(height: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    cells = torch.rand(1, 3, height // 6 + 2, width // 6 + 2, generator=generator)
    return F.interpolate(cells, (height, width), mode="bilinear")


WALL, SUBJECT, OTHER = texture(HEIGHT, WIDTH, 0), texture(SIDE, SIDE, 1), texture(SIDE, SIDE, 2)
POST = texture(HEIGHT, 24, 3)


def scene(
    things: list[tuple[torch.Tensor, float, float, float]], noise: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A photo and its map.

    Args:
        things: texture, column and row of the left top corner, and disparity; the last is in front.
        noise: of grain (0.02), of the map (0.02) and of its scale (3 %).
    """
    photo = WALL.clone()
    disparity = 0.1 + torch.linspace(0, 0.2, HEIGHT)[:, None].expand(1, 1, HEIGHT, WIDTH).clone()
    for picture, left, top, near in things:
        x, y = round(left), round(top)
        x0, x1 = max(x, 0), min(x + picture.shape[-1], WIDTH)
        y1 = min(y + picture.shape[-2], HEIGHT)
        if x0 < x1:
            photo[..., y:y1, x0:x1] = picture[..., : y1 - y, x0 - x : x1 - x]
            disparity[..., y:y1, x0:x1] = near
    if noise is not None:
        photo = photo + 0.02 * torch.randn(photo.shape, generator=noise)
        scale = 1 + 0.03 * torch.randn((), generator=noise)
        disparity = scale * disparity + 0.02 * torch.randn(disparity.shape, generator=noise)
    return photo.clamp(0, 1), disparity.clamp(0, 1)


def way(number: int) -> tuple[float, float, float]:
    """Left top corner and disparity of a subject that comes nearer on a wavy way."""
    return 20 + 1.7 * number, 40 + 10 * math.sin(number / 8), 0.5 + 0.004 * number


def place_error(subject: TrackedSubject, number: int) -> float:
    """Pixels between where the subject is and where it is seen."""
    x, y, _ = way(number)
    column, row = subject.place
    return math.hypot(column * WIDTH - x - SIDE / 2, row * HEIGHT - y - SIDE / 2)


def test_a_subject_is_followed_though_maps_flicker_and_another_looks_on() -> None:
    noise = torch.Generator().manual_seed(0)
    planes, depths, measured = [], [], []
    for number in range(70):
        x, y, near = way(number)
        photo, disparity = scene([(OTHER, 150, 8, 0.35), (SUBJECT, x, y, near)], noise)
        centre = (int(x + SIDE / 2), int(y + SIDE / 2))
        if number == 0:
            subject = TrackedSubject(photo, disparity, *centre)
            continue
        planes.append(subject.follow(photo, disparity, 1 / RATE))
        depths.append(near)
        measured.append(float(disparity[..., centre[1] - 2 : centre[1] + 3, centre[0]].median()))
        assert subject.in_sight and place_error(subject, number) < 2
    error = (torch.tensor(planes) - torch.tensor(depths))[10:]
    raw = (torch.tensor(measured) - torch.tensor(depths))[10:]
    # The filter alone leaves 0.38 of the spread of noise at 25 frames per second.
    assert error.std() < 0.6 * raw.std() and error.abs().max() < 0.03
    # A filter that lags by its 0.3 s would be 0.03 behind.
    assert abs(float(error.mean())) < 0.005
    steps = torch.tensor(planes).diff().abs().mean() / torch.tensor(measured).diff().abs().mean()
    assert steps < 0.3


def test_what_passes_in_front_does_not_take_the_focus() -> None:
    hidden = 0
    for number in range(70):
        x, y, near = way(number)
        post = (POST, 130 - 2.5 * number, 0, 0.95)
        photo, disparity = scene([(SUBJECT, x, y, near), post])
        if number == 0:
            subject = TrackedSubject(photo, disparity, x + SIDE / 2, y + SIDE / 2)
            continue
        plane = subject.follow(photo, disparity, 1 / RATE)
        assert abs(plane - near) < 0.05
        hidden += not subject.in_sight
    assert 0 < hidden < 10 and place_error(subject, 69) < 2


def test_a_lost_subject_holds_the_focus_and_says_so_once() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for number in range(90):
            x, y, near = way(number)
            gone = 30 <= number < 75
            photo, disparity = scene([] if gone else [(SUBJECT, x, y, 0.6)])
            if number == 0:
                subject = TrackedSubject(photo, disparity, x + SIDE / 2, y + SIDE / 2)
                continue
            plane = subject.follow(photo, disparity, 1 / RATE)
            assert plane == pytest.approx(0.6, abs=1e-4)
            assert subject.in_sight != gone
    sentences = [str(one.message) for one in told if one.category is InputRepairedWarning]
    assert len(sentences) == 1 and "out of sight for 1 s" in sentences[0]
    assert place_error(subject, 89) < 2


def test_after_a_cut_the_subject_may_be_anywhere() -> None:
    photo, disparity = scene([(SUBJECT, 20, 40, 0.5)])
    subject = TrackedSubject(photo, disparity, 33, 53)
    photo, disparity = scene([(OTHER, 20, 40, 0.5), (SUBJECT, 140, 60, 0.9)])
    assert subject.follow(photo, disparity, 1 / RATE, cut=True) == pytest.approx(0.9)
    assert subject.in_sight
    photo, disparity = scene([(OTHER, 20, 40, 0.5)])
    assert subject.follow(photo, disparity, 1 / RATE, cut=True) == pytest.approx(0.9)
    assert not subject.in_sight


def test_a_subject_without_texture_is_followed_by_its_colour_and_distance() -> None:
    plain = torch.tensor([0.8, 0.2, 0.1]).reshape(1, 3, 1, 1).expand(1, 3, SIDE, SIDE)
    for number in range(30):
        photo, disparity = scene([(plain, 20 + 2 * number, 40, 0.6)])
        if number == 0:
            subject = TrackedSubject(photo, disparity, 33, 53)
        else:
            assert subject.follow(photo, disparity, 1 / RATE) == pytest.approx(0.6, abs=1e-3)
    column = subject.place[0] * WIDTH
    assert 78 <= column <= 78 + SIDE


def test_the_point_has_to_be_in_the_picture() -> None:
    photo, disparity = scene([])
    with pytest.raises(ValueError, match="outside the picture"):
        TrackedSubject(photo, disparity, WIDTH, 3)


# --- The plane ------------------------------------------------------------------------------------


def test_a_plane_is_calm_and_does_not_lag() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 0.01 * torch.randn(2000, generator=generator)
    still, ramp = SteadyPlane(0.5), SteadyPlane(0.0)
    held, behind = [], []
    for number in range(2000):
        still.follow(0.5 + float(noise[number]), 1 / RATE, tolerance=0.1)
        ramp.follow(0.001 * (number + 1), 1 / RATE, tolerance=0.1)
        held.append(still.disparity)
        behind.append(0.001 * (number + 1) - ramp.disparity)
    # (1 - t)(5 + 4 t + t^2) / (1 + t)^3 of the variance, t = exp(-1 / (25 * 0.3)).
    fading = math.exp(-1 / (RATE * 0.3))
    share = (1 - fading) * (5 + 4 * fading + fading**2) / (1 + fading) ** 3
    assert torch.tensor(held[100:]).std() == pytest.approx(0.01 * math.sqrt(share), rel=0.15)
    assert max(map(abs, behind[100:])) < 1e-6


def test_a_plane_is_pulled_where_it_has_to_jump() -> None:
    plane = SteadyPlane(0.2)
    seen = []
    for _ in range(30):
        plane.follow(0.8, 1 / RATE, tolerance=0.1)
        seen.append(plane.disparity)
    assert seen[0] == pytest.approx(0.2) and seen[-1] == pytest.approx(0.8)
    steps = [later - earlier for earlier, later in zip(seen, seen[1:], strict=False)]
    # Half a second, 12.5 frames, at most 1.5 times as fast as on average; no overshoot.
    assert min(steps) > -1e-9 and max(steps) < 1.6 * 0.6 / 12.5 and max(seen) <= 0.8 + 1e-9


# --- What stands in the middle --------------------------------------------------------------------


def followed(there: Callable[[int], bool], frames: int = 60) -> list[float]:
    """The focus on a thing at 0.5, before which another one at 0.9 may be."""
    planes = []
    for number in range(frames):
        things = [(SUBJECT, 70, 40, 0.5)]
        if there(number):
            things.append((OTHER, 95, 40, 0.9))
        disparity = scene(things)[1][..., ::4, ::4]
        if number == 0:
            subject = CentralSubject(disparity)
            planes.append(subject.plane.disparity)
        else:
            planes.append(subject.follow(disparity, 1 / RATE))
    return planes


def test_what_appears_for_a_moment_does_not_take_the_focus() -> None:
    planes = followed(lambda number: 10 <= number < 24)
    assert max(planes) == min(planes) == pytest.approx(0.5)


def test_what_stays_is_pulled_into_focus() -> None:
    planes = followed(lambda number: number >= 10)
    assert max(planes[:25]) == pytest.approx(0.5) and planes[-1] == pytest.approx(0.9)
    steps = [later - earlier for earlier, later in zip(planes, planes[1:], strict=False)]
    assert min(steps) > -1e-6 and max(steps) < 0.06


def test_after_a_cut_its_subject_is_in_focus_at_once() -> None:
    subject = CentralSubject(scene([(SUBJECT, 70, 40, 0.5)])[1])
    _, disparity = scene([(OTHER, 80, 40, 0.9)])
    assert subject.follow(disparity, 1 / RATE, cut=True) == pytest.approx(0.9)

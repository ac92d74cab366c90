"""Keyframes of the focus: read, refused, and pulled between."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bokehdiff.easing import eased
from bokehdiff.film_focus import FilmFocus
from bokehdiff.focus_keyframes import FocusKeyframe, keyframes_at, read_focus_keyframes

PHOTO = torch.full((1, 3, 48, 64), 0.5)


def written(folder: Path, keyframes: Any) -> Path:
    file = folder / "keyframes.json"
    file.write_text(keyframes if isinstance(keyframes, str) else json.dumps(keyframes))
    return file


def pulled(
    focus: FilmFocus, maps: list[torch.Tensor], first: int = 0, rate: float = 25.0
) -> list[tuple[float, float]]:
    """(df, strength) of each frame."""
    return [
        focus(number, number / rate, PHOTO, disparity)
        for number, disparity in enumerate(maps, first)
    ]


def flat(disparity: float) -> torch.Tensor:
    return torch.full((1, 1, 48, 64), disparity)


def test_easing_starts_and_stops_gently_and_stays_within() -> None:
    values = [eased(time / 100) for time in range(-20, 121)]
    assert values[:21] == [0.0] * 21 and values[120:] == [1.0] * 21
    steps = [later - earlier for earlier, later in zip(values, values[1:], strict=False)]
    assert min(steps) >= 0 and steps[20] < 0.001 < 0.014 < steps[70]
    assert eased(0.5) == 0.5


def test_every_kind_of_keyframe_is_read(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        [
            {"time": 0, "focus": [12, 30.5], "f_number": 1.4},
            {"time": 1.5, "focus": "auto"},
            {"frame": 60, "focus": {"df": 0.25}, "f_number": 4},
            {"frame": 90, "focus": {"distance_m": 2}},
        ],
    )
    assert read_focus_keyframes(file) == [
        FocusKeyframe(time=0.0, point=(12.0, 30.5), f_number=1.4),
        FocusKeyframe(time=1.5, auto=True),
        FocusKeyframe(frame=60, df=0.25, f_number=4.0),
        FocusKeyframe(frame=90, distance_m=2.0),
    ]


@pytest.mark.parametrize(
    ("keyframes", "sentence"),
    [
        ("no json", "is no JSON file"),
        ("[]", "no list of keyframes"),
        ({"time": 0, "focus": "auto"}, "no list of keyframes"),
        (["auto"], "Keyframe 1 .* wanted a keyframe such as"),
        ([{"time": 0}], "wanted focus and one of time and frame"),
        ([{"focus": "auto"}], "wanted focus and one of time and frame"),
        ([{"time": 0, "frame": 0, "focus": "auto"}], "one of time and frame"),
        ([{"time": 0, "focus": "auto", "fnumber": 2}], "it has 'fnumber'"),
        ([{"time": -1, "focus": "auto"}], "time is -1; wanted a number, 0 or more"),
        ([{"time": "1 s", "focus": "auto"}], 'time is "1 s"'),
        ([{"time": True, "focus": "auto"}], "time is true"),
        ([{"time": math.nan, "focus": "auto"}], "time is NaN"),
        ([{"frame": 1.5, "focus": "auto"}], "frame is 1.5; wanted the number of a frame"),
        ([{"time": 0, "focus": "sharpest"}], 'focus is "sharpest"; wanted a pixel'),
        ([{"time": 0, "focus": [1, 2, 3]}], "wanted a pixel"),
        ([{"time": 0, "focus": {"metres": 3}}], "wanted a pixel"),
        ([{"time": 0, "focus": {"distance_m": 0}}], "distance_m is 0; wanted a number, above 0"),
        ([{"time": 0, "focus": "auto", "f_number": 0}], "f_number is 0"),
        (
            [{"time": 2, "focus": "auto"}, {"time": 1, "focus": "auto"}],
            "at 1 s after one at 2 s; wanted them in the order",
        ),
        (
            [{"time": 0, "focus": "auto", "K": 3}, {"time": 1, "focus": "auto", "f_number": 2}],
            "by K here and by f_number there",
        ),
    ],
)
def test_broken_keyframes_are_refused(tmp_path: Path, keyframes: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_focus_keyframes(written(tmp_path, keyframes))


def test_there_has_to_be_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="keyframes.json"):
        read_focus_keyframes(tmp_path / "keyframes.json")


def test_keyframes_fall_on_frames() -> None:
    times = [0.0, 0.04, 0.1, 0.15, 0.2]
    keyframes = [FocusKeyframe(time=0.0), FocusKeyframe(time=0.05), FocusKeyframe(frame=4)]
    assert keyframes_at(keyframes, times) == [0, 2, 4]
    # Written with three decimals, frame 7 of 30000/1001 per second is still frame 7.
    assert keyframes_at([FocusKeyframe(time=0.234)], [at * 1001 / 30_000 for at in range(9)]) == [7]
    with pytest.raises(ValueError, match=r"at 9 s, when the film is over: it has 5 frames"):
        keyframes_at([FocusKeyframe(time=9.0)], times)
    with pytest.raises(ValueError, match="at frame 2, not after the one before"):
        keyframes_at([FocusKeyframe(frame=2), FocusKeyframe(time=0.06)], times)


def test_focus_and_blur_move_from_keyframe_to_keyframe() -> None:
    keyframes = [FocusKeyframe(frame=5, df=0.8), FocusKeyframe(frame=25, df=0.2)]
    focus = FilmFocus(keyframes, [5, 25], [0.2, 1.0], [0.8, 0.2], [10.0, 30.0])
    found = pulled(focus, [flat(0.5)] * 40)
    planes, strengths = zip(*found, strict=True)
    assert planes[:6] == (0.8,) * 6 and planes[25:] == (0.2,) * 15
    assert strengths[:6] == (10.0,) * 6 and strengths[25:] == (30.0,) * 15
    assert all(later < earlier for earlier, later in zip(planes[5:25], planes[6:26], strict=True))
    for number in range(5, 26):
        share = eased((number - 5) / 20)
        assert planes[number] == pytest.approx(0.8 - 0.6 * share)
        assert strengths[number] == pytest.approx(10 + 20 * share)


def test_a_subject_that_is_not_where_it_was_expected_is_reached_gently() -> None:
    keyframes = [FocusKeyframe(frame=0, df=0.9), FocusKeyframe(frame=20, auto=True)]
    # A look at frame 20 alone said 0.5, but what comes is 0.4.
    focus = FilmFocus(keyframes, [0, 20], [0.0, 0.8], [0.9, 0.5], [1.0, 1.0])
    planes = [plane for plane, _ in pulled(focus, [flat(0.4)] * 60)]
    assert planes[20] == pytest.approx(0.5)
    assert all(later <= earlier for earlier, later in zip(planes, planes[1:], strict=False))
    assert max(abs(a - b) for a, b in zip(planes, planes[1:], strict=False)) < 0.05
    assert planes[-1] == pytest.approx(0.4)


@pytest.mark.parametrize("stop", [3, 12, 20, 30])
def test_the_focus_goes_on_from_its_state(stop: int) -> None:
    generator = torch.Generator().manual_seed(0)
    photos = torch.rand(40, 1, 3, 48, 64, generator=generator)
    maps = []
    for number in range(40):
        disparity = flat(0.2)
        disparity[..., 10:30, 4 + number : 20 + number] = 0.5 + 0.01 * number
        photos[number, ..., 10:30, 4 + number : 20 + number] = photos[0, ..., 10:30, 4:20]
        maps.append(disparity)

    def begun() -> FilmFocus:
        keyframes = [
            FocusKeyframe(frame=0, point=(12.0, 20.0)),
            FocusKeyframe(frame=12, auto=True),
            FocusKeyframe(frame=20, df=0.3),
        ]
        return FilmFocus(keyframes, [0, 12, 20], [0.0, 0.48, 0.8], [math.nan, 0.6, 0.3], [1, 2, 3])

    def some(focus: FilmFocus, numbers: range) -> list[tuple[float, float]]:
        return [focus(one, one / 25, photos[one], maps[one]) for one in numbers]

    whole = some(begun(), range(40))
    first, second = begun(), begun()
    parts = some(first, range(stop))
    second.load_state_dict({name: one.clone() for name, one in first.state_dict().items()})
    assert parts + some(second, range(stop, 40)) == whole

"""What is in focus at which moment of a film, as people write it down.

A file of keyframes is a JSON list, in the order of the film::

    [{"time": 0, "focus": [512, 300], "f_number": 1.4},
     {"time": 2.5, "focus": "auto"},
     {"frame": 120, "focus": {"distance_m": 3}, "f_number": 4}]

Between two of them the focus moves from one to the other, starting and stopping gently.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .picture_files import existing_file
from .whole_files import PathLike

__all__ = ["FocusKeyframe", "keyframes_at", "read_focus_keyframes"]

EXAMPLE = '{"time": 2.5, "focus": [512, 300]}'
KINDS_OF_FOCUS = (
    'a pixel [x, y], "auto", {"df": a disparity} or {"distance_m": metres from the camera}'
)
NAMES = {"time", "frame", "focus", "f_number", "K"}


@dataclass(frozen=True)
class FocusKeyframe:
    """What is in focus from a moment on; one of time and frame, and one kind of focus, is given.

    Args:
        time: seconds after the first frame.
        frame: number of the frame, from 0.
        point: column and row of a pixel in that frame: the thing there is in focus, and is
            followed.
        auto: the nearest large thing near the centre is in focus.
        df: disparity of the plane in focus, in the unit of the maps.
        distance_m: metres from the camera to the plane in focus.
        f_number, K: how strong the blur is; None: as at the keyframe before.
    """

    time: float | None = None
    frame: int | None = None
    point: tuple[float, float] | None = None
    auto: bool = False
    df: float | None = None
    distance_m: float | None = None
    f_number: float | None = None
    K: float | None = None

    @property
    def is_seen(self) -> bool:
        """Whether its disparity has to be looked for in the picture."""
        return self.auto or self.point is not None

    @property
    def moment(self) -> str:
        """When it is, in words."""
        return f"{self.time:g} s" if self.time is not None else f"frame {self.frame}"


def read_focus_keyframes(path: PathLike) -> list[FocusKeyframe]:
    """The keyframes of a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no list of keyframes, or not in the order of the film.
    """
    file = existing_file(path, "file of keyframes")
    try:
        written = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{file.name} is no JSON file ({error}); wanted a list of keyframes such as {EXAMPLE}."
        ) from None
    if not isinstance(written, list) or not written:
        raise ValueError(
            f"{file.name} holds no list of keyframes; wanted one, or more, such as [{EXAMPLE}]."
        )
    found = []
    for number, one in enumerate(written):
        try:
            found.append(_keyframe(one))
        except ValueError as error:
            raise ValueError(f"Keyframe {number + 1} of {file.name}: {error}") from None
    for earlier, later in zip(found, found[1:], strict=False):
        for name in ("time", "frame"):
            first, second = getattr(earlier, name), getattr(later, name)
            if first is not None and second is not None and second <= first:
                raise ValueError(
                    f"{file.name} has a keyframe at {later.moment} after one at {earlier.moment}; "
                    "wanted them in the order of the film, each at a moment of its own."
                )
    if any(one.K is not None for one in found) and any(one.f_number is not None for one in found):
        raise ValueError(
            f"{file.name} says the blur by K here and by f_number there; wanted one of them."
        )
    return found


def _keyframe(written: Any) -> FocusKeyframe:
    if not isinstance(written, Mapping):
        raise ValueError(f"it is {written!r}; wanted a keyframe such as {EXAMPLE}.")
    if unknown := sorted(set(written) - NAMES):
        raise ValueError(f"it has {unknown[0]!r}; wanted {', '.join(sorted(NAMES))}.")
    if ("time" in written) == ("frame" in written) or "focus" not in written:
        raise ValueError(f"it is {dict(written)}; wanted focus and one of time and frame.")
    values: dict[str, Any] = _focus(written["focus"])
    for name in ("time", "frame", "f_number", "K"):
        if name in written:
            least = "above 0" if name == "f_number" else "0 or more"
            values[name] = _number(written[name], name, least)
    if values.get("frame", 0) != int(values.get("frame", 0)):
        raise ValueError(f"frame is {written['frame']}; wanted the number of a frame, from 0.")
    if "frame" in values:
        values["frame"] = int(values["frame"])
    return FocusKeyframe(**values)


def _focus(written: Any) -> dict[str, Any]:
    if written == "auto":
        return {"auto": True}
    if isinstance(written, list) and len(written) == 2:
        column, row = (_number(one, "focus", "0 or more") for one in written)
        return {"point": (column, row)}
    if isinstance(written, Mapping) and len(written) == 1:
        ((name, value),) = written.items()
        if name in ("df", "distance_m"):
            least = "above 0" if name == "distance_m" else "0 or more"
            return {name: _number(value, name, least)}
    raise ValueError(f"focus is {json.dumps(written)}; wanted {KINDS_OF_FOCUS}.")


def _number(value: Any, name: str, least: str) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0 or (least == "above 0" and not value):
        raise ValueError(f"{name} is {json.dumps(value)}; wanted a number, {least}.")
    return float(value)


def keyframes_at(keyframes: list[FocusKeyframe], times: list[float]) -> list[int]:
    """The number of the frame at which each keyframe is.

    Args:
        keyframes: in the order of the film.
        times: when the frames of the film are shown, in seconds after the first one.

    Raises:
        ValueError: the film is over by then, or two keyframes fall on one frame.
    """
    numbers: list[int] = []
    for keyframe in keyframes:
        if keyframe.frame is not None:
            number = keyframe.frame
        else:
            assert keyframe.time is not None
            # Times are written with few decimals, and a frame is shown until the next one comes.
            nearest = keyframe.time - 1e-3
            number = next((at for at, time in enumerate(times) if time >= nearest), len(times))
        if number >= len(times):
            raise ValueError(
                f"There is a keyframe at {keyframe.moment}, when the film is over: it has "
                f"{len(times)} frames, the last at {times[-1]:.4g} s. Give an earlier moment."
            )
        if numbers and number <= numbers[-1]:
            raise ValueError(
                f"The keyframe at {keyframe.moment} is at frame {number}, not after the one before "
                f"it, at frame {numbers[-1]}; wanted them in the order of the film, at least a "
                "frame apart."
            )
        numbers.append(number)
    return numbers

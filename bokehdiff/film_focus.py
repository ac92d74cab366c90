"""The focus of a film, frame by frame: pulled between keyframes, following their subjects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .easing import eased
from .focus_keyframes import FocusKeyframe
from .subject_tracking import CentralSubject, TrackedSubject

__all__ = ["FilmFocus"]

SUBJECT = "subject."
"""With what the names of the tensors of the subject begin in :meth:`FilmFocus.state_dict`."""


class FilmFocus:
    """The plane in focus and the strength of the blur of every frame of a film, in their order.

    At a keyframe its plane is reached; a subject is followed from there. On the way to the next
    keyframe both give ``here + (there - here) eased(t)``, t the share of the time between them.
    Where the next subject will be is said by a look at that frame alone; when it is reached, what
    is left of the difference is pulled in half a second.

    Args:
        keyframes: in the order of the film.
        frames: the number of the frame of each.
        times: when each is shown, in seconds after the first frame.
        planes: disparity of each: what is known before, or was found in that frame alone.
        strengths: of the blur at each, in any unit that is proportional to K.
    """

    def __init__(
        self,
        keyframes: Sequence[FocusKeyframe],
        frames: Sequence[int],
        times: Sequence[float],
        planes: Sequence[float],
        strengths: Sequence[float],
    ) -> None:
        self._keyframes = keyframes
        self._frames, self._times = frames, times
        self._planes, self._strengths = planes, strengths
        self._subject: TrackedSubject | CentralSubject | None = None
        self._at, self._last_time = -1, 0.0

    def __call__(
        self,
        number: int,
        time: float,
        photo: torch.Tensor,
        disparity: torch.Tensor,
        cut: bool = False,
    ) -> tuple[float, float]:
        """(df, strength) of the next frame.

        Args:
            number, time: of the frame; seconds after the first frame.
            photo: (1, 3, H, W) display-encoded in [0, 1].
            disparity: (1, 1, H, W), larger is nearer, finite.
            cut: the frame begins another scene.
        """
        seconds, self._last_time = time - self._last_time, time
        if self._at + 1 < len(self._frames) and number >= self._frames[self._at + 1]:
            self._at += 1
            self._begin(photo, disparity, cut or number == 0)
            here = self._here
        else:
            here = self._follow(photo, disparity, seconds, cut)
        now, coming = max(self._at, 0), self._at + 1
        strength = self._strengths[now]
        if 0 < coming < len(self._frames):
            lasts = self._times[coming] - self._times[now]
            share = eased((time - self._times[now]) / lasts)
            here += (self._planes[coming] - here) * share
            strength += (self._strengths[coming] - strength) * share
        return here, strength

    def _begin(self, photo: torch.Tensor, disparity: torch.Tensor, at_once: bool) -> None:
        """Looks at what the keyframe that is reached now has in focus."""
        keyframe = self._keyframes[self._at]
        coming_from = None if at_once else self._planes[self._at]
        if keyframe.point is not None:
            self._subject = TrackedSubject(photo, disparity, *keyframe.point, coming_from)
        elif keyframe.auto:
            self._subject = CentralSubject(disparity, coming_from)
        else:
            self._subject = None

    @property
    def _here(self) -> float:
        """The plane of the keyframe that was reached last."""
        return (
            self._planes[max(self._at, 0)]
            if self._subject is None
            else self._subject.plane.disparity
        )

    def _follow(
        self, photo: torch.Tensor, disparity: torch.Tensor, seconds: float, cut: bool
    ) -> float:
        if isinstance(self._subject, TrackedSubject):
            return self._subject.follow(photo, disparity, seconds, cut)
        if isinstance(self._subject, CentralSubject):
            return self._subject.follow(disparity, seconds, cut)
        return self._here

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What the frames so far leave to the next."""
        subject = {} if self._subject is None else self._subject.state_dict()
        return {
            "at": torch.tensor(self._at),
            "last_time": torch.tensor(self._last_time, dtype=torch.float64),
            **{SUBJECT + name: value for name, value in subject.items()},
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on where :meth:`state_dict` was called."""
        self._at, self._last_time = int(state["at"]), float(state["last_time"])
        kept = {
            name.removeprefix(SUBJECT): value
            for name, value in state.items()
            if name.startswith(SUBJECT)
        }
        self._subject = None
        if kept:
            keyframe = self._keyframes[self._at]
            kind = CentralSubject if keyframe.auto else TrackedSubject
            self._subject = kind.from_state_dict(kept)

"""The thing in focus followed through a film: by what it looks like, and by how far away it is.

:class:`TrackedSubject` follows what was pointed at, :class:`CentralSubject` what stands nearest in
the middle. Both answer the disparity of the plane in focus, calm where maps flicker, without
falling behind what moves steadily, and by a gentle pull where it has to jump. Plain and
deterministic: no network.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from .autofocus import SLAB_DEPTH, central_subject
from .easing import eased
from .focus import focus_disparity_at
from .picture_files import InputRepairedWarning

__all__ = ["CentralSubject", "SteadyPlane", "TrackedSubject"]

# --- The plane ------------------------------------------------------------------------------------

SMOOTHING_SECONDS = 0.3
PULL_SECONDS = 0.5


class SteadyPlane:
    """A plane in focus that follows what is measured, frame by frame.

    A filter of second order with fading memory: with ``theta = exp(-dt / 0.3 s)`` and the residual
    r of the measurement, ``level += trend dt + (1 - theta^2) r`` and
    ``trend += (1 - theta)^2 r / dt``. It has no lag behind what moves steadily. What differs by
    more than a tolerance is a jump: the plane is pulled there in half a second.

    Args:
        disparity: where it starts.
        coming_from: where it is pulled there from; None if it starts there.

    Attributes:
        level: where it is, or is being pulled to.
    """

    def __init__(self, disparity: float, coming_from: float | None = None) -> None:
        self.level, self._trend = disparity, 0.0
        self._behind = 0.0 if coming_from is None else coming_from - disparity
        self._since = 0.0

    @property
    def disparity(self) -> float:
        """Where the plane is."""
        return self.level + self._behind * (1 - eased(self._since / PULL_SECONDS))

    def follow(self, measured: float, seconds: float, tolerance: float) -> None:
        """Goes on by one frame.

        Args:
            measured: disparity of the subject in it.
            seconds: since the last frame, above 0.
            tolerance: a larger difference is a jump.
        """
        self._since += seconds
        expected = self.level + self._trend * seconds
        residual = measured - expected
        if abs(residual) > tolerance:
            self._behind = self.disparity - measured
            self.level, self._trend, self._since = measured, 0.0, 0.0
            return
        fading = math.exp(-seconds / SMOOTHING_SECONDS)
        self.level = expected + (1 - fading**2) * residual
        self._trend += (1 - fading) ** 2 * residual / seconds

    def hold(self, seconds: float) -> None:
        """Goes on by one frame in which nothing could be measured."""
        self._since += seconds
        self._trend = 0.0

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that decides how it goes on."""
        values = (self.level, self._trend, self._behind, self._since)
        return {"plane": torch.tensor(values, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on where :meth:`state_dict` was called."""
        self.level, self._trend, self._behind, self._since = state["plane"].tolist()


# --- What was pointed at --------------------------------------------------------------------------

# Subjects are followed in pictures of this long side, by a patch of this part of the short side.
LONG_SIDE = 256
PATCH_SHARE, LEAST_PATCH = 1 / 7, 7
# Of the search, in patches. It grows while the subject is out of sight.
REACH = 1.5
# What looks less alike is not the subject.
ALIKE, SURELY_ALIKE = 0.5, 0.7
# How fast the memory of its looks follows the subject, per frame.
LEARNING = 0.15
# Difference of brightness, of [0, 1], at which two patches are alike to 0.61 only.
BRIGHTNESS_DEVIATION = 0.15
# Variance of what is only grain.
GRAIN = 0.02**2
LEAST_SHARE_AT_DISTANCE = 0.3
LOST_AFTER_SECONDS = 1.0


class Look(NamedTuple):
    """What a subject looks like: a patch (3, p, p), and which pixels of it count, (p, p)."""

    patch: torch.Tensor
    weight: torch.Tensor


class TrackedSubject:
    """The thing at a point of one frame, followed from there.

    It is looked for around its last place: where the picture is most like it (structural
    similarity with its looks at first or lately, over the pixels that are its own) and as far away
    as it was. Its disparity is the median over these pixels. Hidden or lost, the focus
    stays where it was, and after a second a warning says so.

    Args:
        photo: (1, 3, H, W) display-encoded in [0, 1].
        disparity: (1, 1, H, W), larger is nearer, finite.
        x, y: column and row of the point, from 0 at the top left.
        coming_from: disparity from which the focus is pulled there; None to start there.

    Raises:
        ValueError: the point lies outside the picture.
    """

    def __init__(
        self,
        photo: torch.Tensor,
        disparity: torch.Tensor,
        x: float,
        y: float,
        coming_from: float | None = None,
    ) -> None:
        level = focus_disparity_at(disparity, x, y)
        self.plane = SteadyPlane(level, coming_from)
        self._level = level
        self._out_of_sight = 0.0
        small, near = _small(photo, disparity)
        height, width = near.shape
        column = min(int(x * width / photo.shape[-1]), width - 1)
        row = min(int(y * height / photo.shape[-2]), height - 1)
        self._place = (row, column)
        self._first = self._late = self._look(small, near, _gate(near))

    @property
    def place(self) -> tuple[float, float]:
        """Column and row where it was seen last, as shares of width and height."""
        height, width = self._size
        return (self._place[1] + 0.5) / width, (self._place[0] + 0.5) / height

    @property
    def in_sight(self) -> bool:
        """Whether it was found in the last frame."""
        return self._out_of_sight == 0

    def follow(
        self, photo: torch.Tensor, disparity: torch.Tensor, seconds: float, cut: bool = False
    ) -> float:
        """The disparity of the plane in focus in the next frame.

        Args:
            photo, disparity: the frame and its map, as large as the first.
            seconds: since the last frame, above 0.
            cut: the frame begins another scene, in which the subject may be anywhere.
        """
        small, near = _small(photo, disparity)
        gate = _gate(near)
        if self._find(small, near, gate, cut):
            values = near[_window(self._place, self._side, near.shape)]
            own = (values - self._level).abs() <= gate
            measured = float(values[own].median()) if not cut else self._level
            if cut:
                self.plane = SteadyPlane(measured)
            else:
                self.plane.follow(measured, seconds, gate)
            self._level, self._out_of_sight = measured, 0.0
            return self.plane.disparity
        before = self._out_of_sight
        self._out_of_sight += seconds
        if before < LOST_AFTER_SECONDS <= self._out_of_sight:
            warnings.warn(
                f"What was in focus has been out of sight for {LOST_AFTER_SECONDS:g} s; the focus "
                "stays where it was until it is seen again.",
                InputRepairedWarning,
                stacklevel=2,
            )
        self.plane.hold(seconds)
        return self.plane.disparity

    @property
    def _side(self) -> int:
        return self._first.patch.shape[-1]

    def _find(self, small: torch.Tensor, near: torch.Tensor, gate: float, cut: bool) -> bool:
        """Moves to where the subject is; whether it is anywhere."""
        height, width = near.shape
        self._size = (height, width)
        reach = max(height, width)
        if not cut:
            lost = 1 + 2 * self._out_of_sight / LOST_AFTER_SECONDS
            reach = min(math.ceil(REACH * self._side * lost), reach)
        rows, columns = (
            slice(max(place - reach, 0), min(place + reach + 1, side))
            for place, side in zip(self._place, near.shape, strict=True)
        )
        half = self._side // 2
        area = F.pad(small, (half,) * 4, mode="replicate")[
            ..., rows.start : rows.stop + 2 * half, columns.start : columns.stop + 2 * half
        ]
        alike = torch.maximum(_alike(area, self._first), _alike(area, self._late))
        score = alike
        if not cut:
            at_distance = ((near - self._level).abs() <= gate).to(small)[None, None]
            at_distance = F.pad(at_distance, (half,) * 4, mode="replicate")[
                ..., rows.start : rows.stop + 2 * half, columns.start : columns.stop + 2 * half
            ]
            share = F.conv2d(at_distance, self._late.weight[None, None])[0, 0]
            apart = [
                (torch.arange(one.start, one.stop) - place).square()
                for one, place in zip((rows, columns), self._place, strict=True)
            ]
            distance = apart[0][:, None] + apart[1]
            nearby = torch.exp(-distance / (2 * (reach * 1.5) ** 2))
            possible = share >= LEAST_SHARE_AT_DISTANCE
            score = torch.where(possible, alike * (0.5 + 0.5 * share) * nearby, 0.0)
        best = int(score.argmax())
        row, column = divmod(best, score.shape[1])
        # The more places are looked at, the more of them are alike by chance.
        far = cut or self._out_of_sight > LOST_AFTER_SECONDS
        least = SURELY_ALIKE if far else ALIKE
        if float(score.max()) <= 0 or float(alike[row, column]) < least:
            return False
        self._place = (rows.start + row, columns.start + column)
        if cut:
            self._level = float(near[_window(self._place, LEAST_PATCH, near.shape)].median())
        if float(alike[row, column]) >= SURELY_ALIKE:
            now = self._look(small, near, gate)
            self._late = Look(
                torch.lerp(self._late.patch, now.patch, LEARNING),
                torch.lerp(self._late.weight, now.weight, LEARNING),
            )
        return True

    def _look(self, small: torch.Tensor, near: torch.Tensor, gate: float) -> Look:
        """What is at the place, and which pixels are as far away as the subject."""
        self._size = (near.shape[0], near.shape[1])
        side = max(int(min(near.shape) * PATCH_SHARE) // 2 * 2 + 1, LEAST_PATCH)
        half = side // 2
        row, column = self._place
        patch = F.pad(small, (half,) * 4, mode="replicate")[
            0, :, row : row + side, column : column + side
        ]
        around = F.pad(near[None, None], (half,) * 4, mode="replicate")[
            0, 0, row : row + side, column : column + side
        ]
        offset = (torch.arange(side) - half) / half
        bell = torch.exp(-(offset.square()[:, None] + offset.square()))
        weight = bell * ((around - self._level).abs() <= gate)
        # The point itself may lie on a pixel that the map has wrong.
        weight[half, half] = 1
        return Look(patch, weight / weight.sum())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that decides how the subject is followed from here on."""
        return {
            **self.plane.state_dict(),
            "place": torch.tensor([*self._place, *self._size]),
            "level": torch.tensor([self._level, self._out_of_sight], dtype=torch.float64),
            "first.patch": self._first.patch.clone(),
            "first.weight": self._first.weight.clone(),
            "late.patch": self._late.patch.clone(),
            "late.weight": self._late.weight.clone(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor]) -> TrackedSubject:
        """The subject as it was when :meth:`state_dict` was called."""
        subject = cls.__new__(cls)
        subject.plane = SteadyPlane(0.0)
        subject.plane.load_state_dict(state)
        row, column, height, width = state["place"].tolist()
        subject._place, subject._size = (row, column), (height, width)
        subject._level, subject._out_of_sight = state["level"].tolist()
        subject._first = Look(state["first.patch"].clone(), state["first.weight"].clone())
        subject._late = Look(state["late.patch"].clone(), state["late.weight"].clone())
        return subject


def _small(photo: torch.Tensor, disparity: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The photo (1, 3, h, w), averaged, and its map (h, w), of which averages would invent depths
    between two things, on the CPU."""
    height, width = photo.shape[-2:]
    shrink = max(max(height, width) / LONG_SIDE, 1)
    size = (max(round(height / shrink), 1), max(round(width / shrink), 1))
    small = F.interpolate(photo.float(), size, mode="area")
    near = F.interpolate(disparity.float(), size, mode="nearest-exact")[0, 0]
    return small.cpu(), near.cpu()


def _gate(near: torch.Tensor) -> float:
    """How far in depth one subject reaches: an eighth of the scene."""
    low, high = np.quantile(near.numpy(), (0.01, 0.99))
    return max(float(high - low) * SLAB_DEPTH, 1e-6)


def _window(place: tuple[int, int], side: int, size: torch.Size) -> tuple[slice, slice]:
    rows, columns = (
        slice(max(at - side // 2, 0), min(at + side // 2 + 1, end))
        for at, end in zip(place, size, strict=True)
    )
    return rows, columns


def _alike(area: torch.Tensor, look: Look) -> torch.Tensor:
    """How like a look each place of an area (1, 3, h + p - 1, w + p - 1) is: (h, w), at most 1.

    Structural similarity over the weighted pixels, ``(2 cov + c) / (var + var' + c)``, times
    ``exp(-(mean - mean')^2 / 2 s^2)``; mean of the channels. Patches without texture are alike if
    they have one colour.
    """
    weight = look.weight[None]
    mean = (weight * look.patch).sum((1, 2))
    apart = look.patch - mean[:, None, None]
    variance = (weight * apart.square()).sum((1, 2))

    def weighted(values: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        return F.conv2d(values, kernels[:, None], groups=3)[0]

    # Around the mean of the look, where squares are small and differences of them exact.
    centred = area - mean[None, :, None, None]
    shift = weighted(centred, weight.expand(3, -1, -1))
    power = weighted(centred.square(), weight.expand(3, -1, -1))
    covariance = weighted(centred, weight * apart)
    spread = (power - shift.square()).clamp(min=0)
    along = (-1, 1, 1)
    structure = (2 * covariance + GRAIN) / (spread + variance.reshape(along) + GRAIN)
    brightness = torch.exp(-shift.square() / (2 * BRIGHTNESS_DEVIATION**2))
    return (structure * brightness).mean(0)


# --- What stands in the middle --------------------------------------------------------------------

RECONSIDER_SECONDS = 0.7


class CentralSubject:
    """The nearest large thing near the centre, which the focus leaves only after a while.

    Each frame has one (:func:`~bokehdiff.autofocus.central_subject`). While it is about as far away
    as the focus, the focus follows it; another one has to stay for 0.7 s before the focus is pulled
    there.

    Args:
        disparity: (1, 1, H, W) of the first frame, larger is nearer, finite.
        coming_from: disparity from which the focus is pulled there; None to start there.
    """

    def __init__(self, disparity: torch.Tensor, coming_from: float | None = None) -> None:
        self.plane = SteadyPlane(_central(disparity)[0], coming_from)
        self._other, self._other_for = 0.0, 0.0

    def follow(self, disparity: torch.Tensor, seconds: float, cut: bool = False) -> float:
        """The disparity of the plane in focus in the next frame.

        Args:
            disparity: its map.
            seconds: since the last frame, above 0.
            cut: the frame begins another scene, whose subject is in focus at once.
        """
        found, gate = _central(disparity)
        if cut:
            self.plane = SteadyPlane(found)
            self._other_for = 0.0
            return self.plane.disparity
        focus = self.plane.level
        if abs(found - focus) <= gate:
            self._other_for = 0.0
            self.plane.follow(found, seconds, gate)
            return self.plane.disparity
        same = self._other_for > 0 and abs(found - self._other) <= gate
        self._other = found
        self._other_for = self._other_for + seconds if same else seconds
        if self._other_for >= RECONSIDER_SECONDS:
            self._other_for = 0.0
            self.plane.follow(found, seconds, 0.0)
        else:
            self.plane.hold(seconds)
        return self.plane.disparity

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that decides how the subject is followed from here on."""
        other = torch.tensor([self._other, self._other_for], dtype=torch.float64)
        return {**self.plane.state_dict(), "other": other}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor]) -> CentralSubject:
        """The subject as it was when :meth:`state_dict` was called."""
        subject = cls.__new__(cls)
        subject.plane = SteadyPlane(0.0)
        subject.plane.load_state_dict(state)
        subject._other, subject._other_for = state["other"].tolist()
        return subject


def _central(disparity: torch.Tensor) -> tuple[float, float]:
    """Disparity of the central subject of a map (1, 1, H, W), and how deep a subject is."""
    near = disparity[0, 0].detach().to("cpu", torch.float32)
    low, high = np.quantile(near.numpy()[::4, ::4], (0.01, 0.99))
    return float(central_subject(near).median()), max(float(high - low) * SLAB_DEPTH, 1e-6)

"""Disparity of a film that was estimated frame by frame, without its flicker.

A network that looks at one frame answers with a scale and an offset of its own each time, and with
noise. :class:`SteadyDepth` brings every map to the scale of the maps before it, and where the
picture stands still keeps most of what was there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

__all__ = ["SteadyDepth"]

LARGEST_CARRY = 0.85
"""Share that is kept of the last map where nothing has changed: noise falls to 0.28 of itself."""

CARRIED_NOISE = (1 - LARGEST_CARRY) / (1 + LARGEST_CARRY)
"""Variance of the noise in a carried map, of that in a new one."""

NEIGHBOURHOOD = 5
"""Pixels per side over which a change of the picture is averaged."""

# The change of the picture that is only noise: this many times that of its quietest fifth, within
# bounds, of [0, 1].
QUIET_SHARE, NOISE_FACTOR = 0.2, 2.5
LEAST_TOLERANCE, LARGEST_TOLERANCE = 0.008, 0.04

LARGEST_SHIFT = 1 / 8
"""Of the camera between two frames, in sides of the picture."""

# Cells per side on which scale and offset are found.
GRID_CELLS = 96
# With fewer that stand still, scale and offset are those of the frame before.
LEAST_STILL_SHARE = 0.02
FITTING_STEPS = 6
LARGEST_SCALE = 2.0
"""A map that would have to be stretched by more belongs to another scene."""

# How long it takes until scale and offset have given way to those of the network by 1 - 1/e.
# Matching each map to the one before would else wander off, by a random walk, in a long film.
LEAK_SECONDS = 4.0


class SteadyDepth:
    """Maps of one film, one after the other, steadied.

    The last map is moved as the picture has moved as a whole, when the camera turns. Each map is
    brought to its scale by ``a d + b``, found where the picture stands still and where both maps
    agree; then ``map = aligned + carry (last - aligned)``, with
    ``carry = 0.85 exp(-(change / tolerance)^4)`` per pixel, where the change is that of the
    picture, mean over 5 x 5 pixels, and the tolerance follows its noise. What moves is not mixed
    with what was there before.

    Args:
        metric: maps are in 1/metres; else they stay within [0, 1].
        device: where the maps are.
    """

    def __init__(self, metric: bool = False, device: torch.device | str = "cpu") -> None:
        self.metric = metric
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Forgets the film; the next map, after a cut, is taken as it is."""
        self._map: torch.Tensor | None = None
        self._photo: torch.Tensor | None = None
        self._line = (1.0, 0.0)

    def __call__(
        self, disparity: torch.Tensor, photo: torch.Tensor, seconds: float
    ) -> torch.Tensor:
        """The map (1, 1, H, W) of a frame, steadied; larger is nearer.

        Args:
            disparity: (1, 1, H, W) as it was estimated from this frame alone, finite.
            photo: (1, 3, H, W) the frame, display-encoded in [0, 1].
            seconds: since the last frame; ignored for the first.

        Raises:
            ValueError: a map or a photo of another shape than the other, or than the last.
        """
        if disparity.shape[:2] != (1, 1) or photo.shape != (1, 3, *disparity.shape[2:]):
            raise ValueError(
                f"The map has shape {tuple(disparity.shape)} and the photo {tuple(photo.shape)}; "
                "wanted (1, 1, H, W) and (1, 3, H, W)."
            )
        if self._map is None or self._photo is None:
            steady = disparity
        elif self._map.shape != disparity.shape:
            raise ValueError(
                f"The map has shape {tuple(disparity.shape)}, the last one "
                f"{tuple(self._map.shape)}; wanted one size. Call reset() before another film."
            )
        else:
            last, still = self._map, _stillness(photo, self._photo)
            rows, columns = _camera_shift(photo, self._photo)
            if rows or columns:
                moved = _stillness(photo, _shifted(self._photo, rows, columns))
                if moved.mean() > still.mean():
                    last, still = _shifted(last, rows, columns).nan_to_num(0.0), moved
            self._line = _alignment(disparity, last, still) or self._line
            leak = math.exp(-seconds / LEAK_SECONDS)
            self._line = self._line[0] ** leak, self._line[1] * leak
            aligned = disparity * self._line[0] + self._line[1]
            if not self.metric:
                aligned = aligned.clamp(0, 1)
            steady = aligned + LARGEST_CARRY * still * (last - aligned)
            steady = steady.clamp(min=0)
        self._map, self._photo = steady, photo
        return steady

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What the frames so far leave to the next, on the CPU; empty before the first."""
        if self._map is None or self._photo is None:
            return {}
        return {
            "map": self._map.to("cpu", copy=True).contiguous(),
            "photo": self._photo.to("cpu", copy=True).contiguous(),
            "line": torch.tensor(self._line, dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on where :meth:`state_dict` was called."""
        self.reset()
        if state:
            self._map = state["map"].to(self._device, copy=True)
            self._photo = state["photo"].to(self._device, copy=True)
            scale, offset = state["line"].tolist()
            self._line = (scale, offset)


def _stillness(photo: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """(1, 1, H, W), 1 where the picture is as it was and 0 where it has changed, or where the last
    one is not known (NaN)."""
    difference = (photo - last).abs().mean(1, keepdim=True)
    known = torch.isfinite(difference)
    change = F.avg_pool2d(
        difference.nan_to_num(1.0), NEIGHBOURHOOD, 1, NEIGHBOURHOOD // 2, count_include_pad=False
    )
    noise = torch.quantile(_sampled(change).reshape(-1), QUIET_SHARE)
    tolerance = (NOISE_FACTOR * noise).clamp(LEAST_TOLERANCE, LARGEST_TOLERANCE)
    return torch.exp(-(change / tolerance).pow(4)) * known


def _camera_shift(photo: torch.Tensor, last: torch.Tensor) -> tuple[int, int]:
    """Rows and columns by which all of the picture has moved since the last one.

    By phase correlation. (0, 0) if it seems to be by more than an eighth of a side.
    """
    height, width = photo.shape[-2:]
    window = torch.hann_window(height, device=photo.device)[:, None] * torch.hann_window(
        width, device=photo.device
    )
    now, before = (
        torch.fft.rfft2((gray - gray.mean()) * window)
        for gray in (photo[0].mean(0), last[0].mean(0))
    )
    together = now * before.conj()
    peaks = torch.fft.irfft2(together / (together.abs() + 1e-9), s=(height, width))
    row, column = divmod(int(peaks.argmax()), width)
    rows = row - height if row > height // 2 else row
    columns = column - width if column > width // 2 else column
    if abs(rows) > height * LARGEST_SHIFT or abs(columns) > width * LARGEST_SHIFT:
        return 0, 0
    return rows, columns


def _shifted(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """(1, C, H, W) moved down and to the right; NaN where nothing comes from."""
    height, width = values.shape[-2:]
    moved = torch.full_like(values, math.nan)
    (top, left), (from_top, from_left) = [
        [slice(max(by, 0), side + min(by, 0)) for by, side in ((y, height), (x, width))]
        for y, x in ((rows, columns), (-rows, -columns))
    ]
    moved[..., top, left] = values[..., from_top, from_left]
    return moved


def _alignment(
    disparity: torch.Tensor, last: torch.Tensor, still: torch.Tensor
) -> tuple[float, float] | None:
    """Scale and offset that bring a map to the last one; None if too little stands still.

    Both maps are noisy, the last one less, so the line is Deming's: that of least squares is less
    steep the more noise there is, and a film would lose its depth, frame by frame. Cells that do
    not fit count less: ``1 / (1 + (r / 2 s)^2)``, s the robust spread of the residuals r.
    """
    new, old, weight = (_sampled(one).reshape(-1).double() for one in (disparity, last, still))
    if float(weight.mean()) < LEAST_STILL_SHARE:
        return None
    trusted = weight
    scale, offset = 1.0, 0.0
    for _ in range(FITTING_STEPS):
        total = trusted.sum()
        mean_new, mean_old = (trusted * new).sum() / total, (trusted * old).sum() / total
        apart_new, apart_old = new - mean_new, old - mean_old
        spread_new = float((trusted * apart_new.square()).sum())
        spread_old = float((trusted * apart_old.square()).sum())
        shared = float((trusted * apart_new * apart_old).sum())
        if min(spread_new, spread_old) < 1e-9 * float(total):  # a flat scene
            return 1.0, float(mean_old - mean_new)
        if shared <= 0:
            return None
        excess = spread_old - CARRIED_NOISE * spread_new
        root = math.sqrt(excess**2 + 4 * CARRIED_NOISE * shared**2)
        scale = (excess + root) / (2 * shared)
        offset = float(mean_old - scale * mean_new)
        residual = (scale * new + offset - old).abs()
        typical = 1.4826 * residual.median() + 1e-6
        trusted = weight / (1 + (residual / (2 * typical)).square())
    if not 1 / LARGEST_SCALE <= scale <= LARGEST_SCALE:
        return None
    return scale, offset


def _sampled(values: torch.Tensor) -> torch.Tensor:
    """(h, w) of (1, 1, H, W): every so many pixels."""
    height, width = values.shape[-2:]
    rows, columns = (
        torch.linspace(0, side - 1, min(side, GRID_CELLS), device=values.device).round().long()
        for side in (height, width)
    )
    return values[0, 0][rows][:, columns]

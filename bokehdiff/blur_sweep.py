"""Depth from bokeh by physics alone: a sharp picture, and frames of it at known blur strengths.

A frame of strength K, focused at disparity df, blurs a point of disparity d over a disc of radius
``r = K |d - df|`` (:mod:`bokehdiff.optics`). Two ways lead from frames to disparity:

- :func:`disparity_from_regression`: measure the radius in each frame
  (:mod:`bokehdiff.blur_radius`), then fit a straight line over K in each pixel
  (:func:`regress_radius`). Its slope is ``delta = |d - df|``.
- :func:`disparity_from_sweep`: for each disparity of a list, compare all frames at once with the
  radii that it implies, and keep the disparity that explains them best. Frames may differ in focus.
  The more accurate of the two.

What no such estimator escapes:

1. K has to be metric, pixels of radius per 1/metre. With the K of a disparity that was stretched to
   [0, 1] the result is in that unit.
2. The distance of the plane in focus has to be known; radii tell only how far from it a point is,
   in disparity, and not on which side.
3. Radii are not negative, so near the plane in focus, where noise would make half of them so, the
   estimate is biased away from it.
4. The picture's own blur adds roughly in quadrature. Here radii are relative to the sharp picture,
   so this only matters where frames differ from it otherwise than by the lens.
5. Where there is no texture, blur changes nothing and nothing is measured: the reliability says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from bokehdiff.blur_radius import (
    WINDOW_DEVIATION,
    check_light,
    check_window,
    measure_blur_radius,
    minimum_of_costs,
    reliability,
)

__all__ = [
    "SweepResult",
    "disparity_from_regression",
    "disparity_from_sweep",
    "range_to_search",
    "regress_radius",
]

Numbers = float | Sequence[float] | Sequence[Sequence[float]] | torch.Tensor
Side = Literal["nearer", "farther", "both"]

# Without a range, disparities are searched up to this blur, as a share of the picture's shorter
# side.
LARGEST_BLUR = 1 / 8
# Distance of the disparities compared, in pixels of radius in the frame of the largest K.
RADIUS_STEP = 0.5
# Distance in pixels of the radii compared in a single frame.
MEASURED_STEP = 0.25
# Relative spread of the disparity at which its reliability is one half.
ALLOWED_SPREAD = 0.1
# Blur in pixels, in the frame of the largest K, below which a single plane in focus cannot be told
# from what is next to it, nor one side of it from the other.
LEAST_RADIUS = 1.0
# Keep divisions finite: pixels of a radius that cannot be measured better, and a disparity.
SMALLEST_SPREAD, SMALLEST_DISPARITY = 1e-3, 1e-9


@dataclass(frozen=True)
class SweepResult:
    """Disparity by place.

    Attributes:
        disparity: (B, 1, H, W) in the unit of df: 1/metres, for metric K. Zero or more.
        standard_error: (B, 1, H, W) in the same unit. Of a sweep: what white noise in the pictures
            explains, infinite where nothing was measured; where one radius does not hold for the
            whole disc, so around edges in depth, errors are larger: go by the reliability.
        reliability: (B, 1, H, W) in [0, 1]. 0.5 where the disparities that may be right differ
            (standard deviation) by a tenth of the disparity, more where they differ less; 0 where
            the best one is the last of those searched. With a single plane in focus also less
            than that within a pixel of blur of it, which could as well lie on its other side.
    """

    disparity: torch.Tensor
    standard_error: torch.Tensor
    reliability: torch.Tensor


def regress_radius(
    radius: torch.Tensor,
    K: torch.Tensor,
    weight: torch.Tensor | None = None,
    with_offset: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(delta, standard_error), each (B, 1, H, W): the slope of the blur radius over K.

    With ``r_f = K_f delta + noise``, independent and of mean zero, the least-squares slope

    - through the origin: ``sum(w K r) / sum(w K^2)``, of variance ``1 / sum(w K^2)``,
    - with an offset r0: ``sum(w (K - Kbar)(r - rbar)) / sum(w (K - Kbar)^2)``, of variance ``1 /
      sum(w (K - Kbar)^2)``, where bars are weighted means,

    has mean delta, and its error vanishes as the denominator grows, by more frames or a wider range
    of K. ``delta = |d - df|``, so the disparity is ``df + delta`` nearer than the plane in focus,
    ``df - delta`` farther. Depth of a standard error s of delta has one of ``depth^2 s``.

    Measured radii have no noise of mean zero near the plane in focus, where they cannot be
    negative: delta is then too large.

    Args:
        radius: (B, F, H, W) pixels, of one frame each.
        K: (B, F) or (F,) pixels of radius per unit of disparity, of the pictures measured.
        weight: (B, F, H, W) ``1 / variance`` of each radius. Without it, all count the same, and
            the variance is estimated from what the line leaves: NaN where no frame is left over.
            Where every weight is 0, both results are NaN.
        with_offset: fit an offset too, for frames that are all blurred a little more than known.

    Raises:
        ValueError: shapes that do not fit, a K or weight that is negative or not finite, or too
            few different K for a line.
    """
    if radius.ndim != 4 or 0 in radius.shape or not radius.is_floating_point():
        raise ValueError(
            f"radius is {radius.dtype} of shape {tuple(radius.shape)}; wanted (B, F, H, W) of "
            "floating point, F frames."
        )
    batch, frames = radius.shape[:2]
    strength = _per_frame(K, batch, frames, "K")[:, :, None, None].to(radius)
    if weight is not None and (
        weight.shape != radius.shape or not bool(((weight >= 0) & torch.isfinite(weight)).all())
    ):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; wanted 1 / variance of each radius, finite "
            f"and not negative, {tuple(radius.shape)}."
        )
    different = min(len(set(one)) for one in strength.flatten(1).tolist())
    if float(strength.amax(1).min()) == 0 or (with_offset and different < 2):
        raise ValueError(
            f"K is {strength.flatten(1).tolist()}; wanted "
            + ("at least two different K" if with_offset else "a K above 0")
            + " for each picture, or no line can be fitted."
        )
    weights = torch.ones_like(radius) if weight is None else weight.to(radius)
    above, over = radius, strength.expand_as(radius)
    if with_offset:
        total = weights.sum(1, keepdim=True)
        above = above - (weights * radius).sum(1, keepdim=True) / total
        over = over - (weights * strength).sum(1, keepdim=True) / total
    denominator = (weights * over**2).sum(1, keepdim=True)
    delta = (weights * over * above).sum(1, keepdim=True) / denominator
    variance = 1 / denominator
    if weight is None:
        left_over = frames - (2 if with_offset else 1)
        squares = ((above - over * delta) ** 2).sum(1, keepdim=True)
        variance = variance * (squares / left_over if left_over else math.nan)
    return delta, variance.sqrt()


def disparity_from_sweep(
    image: torch.Tensor,
    stack: torch.Tensor,
    K: Numbers,
    df: Numbers,
    *,
    side: Side = "both",
    disparity_range: tuple[float, float] | None = None,
    window: float = WINDOW_DEVIATION,
) -> SweepResult:
    """Disparity at which the frames of a stack look as they do, given the sharp picture.

    Args:
        image: (B, C, H, W) the sharp picture in **linear light**
            (:func:`bokehdiff.srgb.srgb_to_linear`), float32 or float64; 1 is where it clips.
        stack: (B, F, C, H, W) frames of the same view, likewise.
        K: pixels of radius, of these pictures, per 1/metre: (F,), or (B, F).
        df: 1/metres in focus: one number, or one for each frame, (F,) or (B, F).
        side: of the plane in focus on which everything lies, ``nearer`` or ``farther`` than it (of
            the nearest plane for ``farther`` and of the farthest for ``nearer``, where frames
            differ in focus). ``both`` needs frames that differ in focus: they tell the side.
        disparity_range: (lowest, highest) 1/metres to search. By default from 0 to where a frame
            would be blurred by an eighth of the picture's shorter side.
        window: standard deviation in pixels of the window that is compared.

    A frame of K = 0 tells nothing and may be there. Memory does not grow with the picture, apart
    from arguments and result; time grows with the picture, the frames, and the largest K.

    Raises:
        ValueError: shapes or numbers that do not fit, ``both`` sides with a single plane in
            focus, or an empty range.
    """
    strengths, focus = _checked(image, stack, K, df, side, window)
    results = [
        _sweep(one, its_frames, strength, its_focus, side, disparity_range, window)
        for one, its_frames, strength, its_focus in zip(image, stack, strengths, focus, strict=True)
    ]
    disparity, standard_error, trusted = torch.stack(results).unsqueeze(2).unbind(1)
    return SweepResult(disparity, standard_error, trusted)


def disparity_from_regression(
    image: torch.Tensor,
    stack: torch.Tensor,
    K: Numbers,
    df: Numbers,
    *,
    side: Literal["nearer", "farther"],
    disparity_range: tuple[float, float] | None = None,
    window: float = WINDOW_DEVIATION,
) -> SweepResult:
    """Disparity from the radius measured in each frame and a line over K through the origin.

    Radii weigh as ``1 / spread^2`` of their measurement, which also gives the standard error.
    Arguments and errors as for :func:`disparity_from_sweep`, but all frames of a picture are
    focused at the same df.
    """
    strengths, focus = _checked(image, stack, K, df, side, window)
    if side == "both" or bool((focus != focus[:, :1]).any()):
        raise ValueError(
            f"df is {focus.tolist()}, side {side!r}; wanted a single plane in focus and a side. "
            "disparity_from_sweep takes frames that differ in focus."
        )
    results = []
    for one, frames, strength, (df_of_all, *_) in zip(
        image, stack, strengths, focus.tolist(), strict=True
    ):
        frames, strength = _blurred_frames(frames, strength)
        at = torch.full_like(strength, df_of_all)
        low, high = range_to_search(strength, at, side, min(one.shape[-2:]), disparity_range)
        measured = []
        for frame, its_strength in zip(frames, strength.tolist(), strict=True):
            largest = its_strength * (high - low)
            radii = torch.linspace(
                0, largest, max(math.ceil(largest / MEASURED_STEP), 2) + 1, dtype=torch.float64
            )
            measured.append(measure_blur_radius(one[None], frame[None], radii, window=window))
        delta, error = regress_radius(
            torch.cat([each.radius for each in measured], 1),
            strength,
            torch.cat([each.spread for each in measured], 1).clamp_min(SMALLEST_SPREAD) ** -2,
        )
        disparity = (df_of_all + delta if side == "nearer" else df_of_all - delta).clamp_min(0)
        spread = _with_unseen_blur(error, disparity, strength, at)
        trusted = reliability(spread, ALLOWED_SPREAD * disparity.clamp_min(SMALLEST_DISPARITY))
        results.append(torch.cat([disparity, error, trusted], 1)[0])
    disparity, standard_error, trusted = torch.stack(results).unsqueeze(2).unbind(1)
    return SweepResult(disparity, standard_error, trusted)


def _checked(
    image: torch.Tensor, stack: torch.Tensor, K: Numbers, df: Numbers, side: str, window: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(K, df), each (B, F); ValueError for arguments that do not fit."""
    check_light(image, "image")
    check_window(window)
    batch, channels, height, width = image.shape
    if stack.ndim != 5 or stack.shape[:1] + stack.shape[2:] != image.shape or not stack.shape[1]:
        raise ValueError(
            f"stack has shape {tuple(stack.shape)}; wanted ({batch}, F, {channels}, {height}, "
            f"{width}): F frames of the size of the image."
        )
    if stack.dtype != image.dtype:
        raise ValueError(f"stack is {stack.dtype}, the image {image.dtype}; wanted the same.")
    check_light(stack.flatten(0, 1), "stack")
    frames = stack.shape[1]
    strengths = _per_frame(K, batch, frames, "K")
    focus = _per_frame(df, batch, frames, "df")
    if side not in ("nearer", "farther", "both"):
        raise ValueError(f"side is {side!r}; wanted 'nearer', 'farther' or 'both'.")
    return strengths, focus


def _blurred_frames(
    stack: torch.Tensor, strengths: torch.Tensor, *others: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """What belongs to frames of K above 0: the others tell nothing."""
    blurred = strengths > 0
    if not bool(blurred.any()):
        raise ValueError("K is 0 in every frame; wanted a frame that is blurred.")
    return stack[blurred.to(stack.device)], strengths[blurred], *(one[blurred] for one in others)


def _with_unseen_blur(
    spread: torch.Tensor, disparity: torch.Tensor, strengths: torch.Tensor, focus: torch.Tensor
) -> torch.Tensor:
    """The spread of disparities, which is at least as large as reaches beyond the blur that a
    single plane in focus hides."""
    hidden = LEAST_RADIUS / float(strengths.max()) - (disparity - float(focus[0])).abs()
    return torch.maximum(spread, hidden)


def _sweep(
    image: torch.Tensor,
    stack: torch.Tensor,
    strengths: torch.Tensor,
    focus: torch.Tensor,
    side: Side,
    disparity_range: tuple[float, float] | None,
    window: float,
) -> torch.Tensor:
    """(3, H, W): the fields of :class:`SweepResult` for one picture (C, H, W)."""
    stack, strengths, focus = _blurred_frames(stack, strengths, focus)
    single_plane = len(set(focus.tolist())) == 1
    if side == "both" and single_plane:
        raise ValueError(
            f"Every frame is focused at df = {float(focus[0]):g}, and blur does not tell nearer "
            "from farther; wanted side='nearer' or 'farther', or frames that differ in focus."
        )
    low, high = range_to_search(strengths, focus, side, min(image.shape[-2:]), disparity_range)
    steps = max(math.ceil((high - low) * float(strengths.max()) / RADIUS_STEP), 4)
    candidates = torch.linspace(low, high, steps + 1, dtype=torch.float64)
    radii = strengths[:, None] * (candidates - focus[:, None]).abs()
    minimum = minimum_of_costs(image, stack, candidates, radii, window)
    disparity = minimum.place.clamp_min(0)
    spread = minimum.spread
    if single_plane:
        spread = _with_unseen_blur(spread, disparity, strengths, focus)
    trusted = reliability(spread, ALLOWED_SPREAD * disparity.clamp_min(SMALLEST_DISPARITY))
    # Nothing lies beyond infinity, and beyond the plane in focus if the side is known.
    bounds = {0.0, *([] if side == "both" else focus.tolist())}
    if low not in bounds:
        trusted = trusted * (1 - minimum.at_first)
    if high not in bounds:
        trusted = trusted * (1 - minimum.at_last)
    return torch.stack([disparity, minimum.standard_error, trusted])


def range_to_search(
    strengths: torch.Tensor,
    focus: torch.Tensor,
    side: Side,
    shorter_side: int,
    disparity_range: tuple[float, float] | None = None,
) -> tuple[float, float]:
    """(lowest, highest) disparity that the functions here search.

    Args:
        strengths, focus: (F,) K and df of the frames of one picture that are blurred, K above 0.
        side, disparity_range: as of :func:`disparity_from_sweep`.
        shorter_side: of the picture, pixels.

    Raises:
        ValueError: an empty range, or one that takes more blur than the picture is large.
    """
    if disparity_range is None:
        reach = LARGEST_BLUR * shorter_side / strengths
        low, high = max(float((focus - reach).max()), 0.0), float((focus + reach).min())
    else:
        low, high = map(float, disparity_range)
        if not 0 <= low < high < math.inf:
            raise ValueError(
                f"disparity_range is {disparity_range!r}; wanted (lowest, highest) in 1/metres, "
                "finite, ascending, not negative."
            )
    if side == "nearer":
        low = max(low, float(focus.max()))
    if side == "farther":
        high = min(high, float(focus.min()))
    largest = float((strengths * torch.maximum((high - focus).abs(), (low - focus).abs())).max())
    if not low < high or largest > shorter_side:
        raise ValueError(
            f"There is no disparity to search from {low:g} to {high:g} (blurred by up to "
            f"{largest:.0f} px in a picture of {shorter_side} px): check K, df, the side and their "
            "unit, or give another disparity_range."
        )
    return low, high


def _per_frame(value: Numbers, batch: int, frames: int, name: str) -> torch.Tensor:
    """(B, F) float64 from one number, one for each frame, or one for each frame and picture."""
    wanted = f"wanted finite numbers, not negative: one for each of {frames} frames"
    try:
        numbers = torch.as_tensor(value).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} is {value!r}; {wanted}.") from None
    if numbers.ndim > 2 or numbers.shape[-1:] not in ((), (1,), (frames,)):
        raise ValueError(f"{name} has shape {tuple(numbers.shape)}; {wanted}.")
    if numbers.ndim == 2 and len(numbers) not in (1, batch):
        raise ValueError(f"{name} has {len(numbers)} rows for {batch} pictures; {wanted}.")
    if not bool(((numbers >= 0) & torch.isfinite(numbers)).all()):
        raise ValueError(f"{name} is {numbers.tolist()}; {wanted}.")
    return numbers.expand(batch, frames)

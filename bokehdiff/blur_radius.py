"""How wide each place of a photograph is blurred, measured against its sharp twin.

The sharp picture is blurred evenly by every radius that comes into question, and around each pixel
the blurred photograph is compared with all of them. The mean squared difference in a small Gaussian
window is the variance s^2(r) of the noise that radius r would have to be excused with. Over n
independent values its likelihood is ``s(r)^-n``, so radii are judged by ``cost(r) = log s^2(r)``,
and the costs of several frames are added. A variance of its own for every frame and place keeps
frames in proportion: where one cannot be explained by any radius, it hardly takes part.

One radius for the whole disc is wrong within a disc's reach of an edge in depth, where the light of
one surface spreads over the other: no radius explains the frame well there, the variance stays
large, and the reliability falls. Within a disc's reach of clipped pixels, whose light is unknown,
frames are left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bokehdiff.windows import Window, put, windows_of

__all__ = ["WINDOW_DEVIATION", "BlurMeasurement", "measure_blur_radius"]

# Standard deviation in pixels of the window that is compared.
WINDOW_DEVIATION = 2.5
# The window is cut off at so many standard deviations.
WINDOW_REACH = 2.5
# Linear light from which a pixel counts as clipped: that of 254 of 255 in 8-bit sRGB.
CLIPPED_LIGHT = 0.99
# Share of a disc filled by clipped pixels at which a frame counts 1/e.
CLIPPED_SHARE = 0.005
# Added to the squared difference, summed over channels: what rounding to 8 bits leaves.
ROUNDING_VARIANCE = 1e-5
# Weight of the frame's own variance, beside that of a window that is known: where nothing is known
# a radius explains nothing.
UNKNOWN_WEIGHT = 1e-4
# Light is blurred by discs whose radii are so far apart in pixels, a fine step, then a share of the
# radius, then a coarse step, and interpolated between them in the square of the radius.
FINE_STEP, STEP_SHARE, COARSE_STEP = 0.25, 1 / 24, 0.5
# Pixels beyond the rim of a disc over which the waves that hard edges make of it have died down.
RIPPLES = 8
# Independent values to which a window is worth in telling radii apart when what keeps the model
# from fitting is the same all over the window, as it is at edges.
VALUES_WHERE_MODEL_FAILS = 4
# Numbers in the costs of one tile (candidates x pixels), and bounds of its side in pixels.
NUMBERS_AT_ONCE = 1 << 25
SMALLEST_TILE, LARGEST_TILE = 128, 512


@dataclass(frozen=True)
class BlurMeasurement:
    """Blur radius by place.

    Attributes:
        radius: (B, 1, H, W) pixels, within the range of the radii compared.
        spread: (B, 1, H, W) pixels: standard deviation, about ``radius``, of the radii that may be
            right.
        reliability: (B, 1, H, W) in [0, 1]: ``1 / (1 + (spread / allowed)^2)``, where half a pixel
            and a tenth of the radius are allowed.
    """

    radius: torch.Tensor
    spread: torch.Tensor
    reliability: torch.Tensor


def measure_blur_radius(
    sharp: torch.Tensor,
    blurred: torch.Tensor,
    radii: torch.Tensor | Sequence[float],
    *,
    window: float = WINDOW_DEVIATION,
) -> BlurMeasurement:
    """The radius of the disc by which each place of ``blurred`` is blurred more than ``sharp``.

    The disc is even and round. The radius is relative to ``sharp``: blur of its own adds in
    quadrature, and is in both.

    Args:
        sharp: (B, C, H, W) linear light, float32 or float64; 1 is where the camera clips.
        blurred: the same view through an opening, of the same shape and dtype.
        radii: (R,) pixels, at least 3, ascending, not negative: what is compared. Between them the
            minimum is that of a parabola in the squared radius: half a pixel apart, it is off by
            some hundredths of a pixel.
        window: standard deviation in pixels of the window that is compared.

    Raises:
        ValueError: shapes or dtypes that do not fit, light that is negative or not finite, radii
            that do not ascend from 0 or more or exceed the longer side of the picture.
    """
    check_light(sharp, "sharp")
    if blurred.shape != sharp.shape or blurred.dtype != sharp.dtype:
        raise ValueError(
            f"blurred is {blurred.dtype} of shape {tuple(blurred.shape)}; wanted {sharp.dtype} of "
            f"shape {tuple(sharp.shape)}, like sharp."
        )
    check_light(blurred, "blurred")
    check_window(window)
    compared = torch.as_tensor(radii, dtype=torch.float64, device="cpu")
    if (
        compared.ndim != 1
        or len(compared) < 3
        or not bool(torch.isfinite(compared).all())
        or not bool((compared.diff() > 0).all())
        or float(compared[0]) < 0
    ):
        raise ValueError(
            f"radii is {compared.tolist()}; wanted at least 3 blur radii in pixels, ascending, the "
            "smallest 0 or more."
        )
    found = []
    for one_sharp, one_blurred in zip(sharp, blurred, strict=True):
        minimum = minimum_of_costs(
            one_sharp, one_blurred[None], compared, compared[None], window, squared=True
        )
        found.append(torch.stack([minimum.place, minimum.spread]))
    radius, spread = torch.stack(found).unsqueeze(2).unbind(1)
    return BlurMeasurement(radius, spread, reliability(spread, 0.5 + radius / 10))


@dataclass(frozen=True)
class CostMinimum:
    """Where the costs of candidates are smallest, each (H, W) in the unit of the candidates.

    Attributes:
        place: the candidate, interpolated.
        standard_error: of white noise alone.
        spread: standard deviation, about ``place``, of the candidates that may be right, counting
            each window as :data:`VALUES_WHERE_MODEL_FAILS` values.
        at_first, at_last: 1 where the first or last candidate is the best, so that a better one
            may lie beyond.
    """

    place: torch.Tensor
    standard_error: torch.Tensor
    spread: torch.Tensor
    at_first: torch.Tensor
    at_last: torch.Tensor


def reliability(spread: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """In [0, 1], one half where the spread is all that is allowed."""
    return 1 / (1 + (spread / allowed) ** 2)


def minimum_of_costs(
    sharp: torch.Tensor,
    frames: torch.Tensor,
    candidates: torch.Tensor,
    radii: torch.Tensor,
    window: float,
    squared: bool = False,
) -> CostMinimum:
    """The best of the candidates for each pixel, in tiles so that memory holds at any size.

    sharp: (C, H, W) linear light. frames: (F, C, H, W). candidates: (D,) float64, ascending: the
    number sought. radii: (F, D) float64: blur radius of each frame for each candidate. squared:
    interpolate between the squares of candidates, for candidates that are radii: blur is a smooth
    function of the square of its radius.
    """
    height, width = sharp.shape[-2:]
    side = math.isqrt(NUMBERS_AT_ONCE // len(candidates))
    side = min(max(side, SMALLEST_TILE), LARGEST_TILE)
    reach = _window_reach(window)
    nodes = _nodes(float(radii.max()))
    disc = math.ceil(nodes[-1]) + RIPPLES
    whole = None
    for tile in windows_of(height, width, side):
        compared = tile.grown(reach)
        seen = compared.grown(disc)
        costs = _costs(
            seen.crop(sharp), compared.crop(frames), radii, nodes, window, compared, seen
        )
        values = sharp.shape[0] * 4 * math.pi * window**2
        minimum = _minimum(
            tile.crop(costs, origin=compared), candidates, len(frames), values, squared
        )
        whole = put(whole, tile, minimum)
    assert whole is not None, "no tiles"
    return CostMinimum(*whole)


def _costs(
    sharp: torch.Tensor,  # (C, h, w) of the window `seen`
    frames: torch.Tensor,  # (F, C, H, W) of the window `compared` within it
    radii: torch.Tensor,  # (F, D)
    nodes: Sequence[float],  # ascending, the radii between the first and the last
    window: float,
    compared: Window,
    seen: Window,
) -> torch.Tensor:
    """(D, H, W) sum over frames of the logarithm of the variance that each candidate leaves."""
    costs = sharp.new_zeros(radii.shape[1], *frames.shape[-2:])
    unclipped = [(frame.amax(0) < CLIPPED_LIGHT).to(sharp.dtype) for frame in frames]
    own = [_variance(frame, window) * UNKNOWN_WEIGHT for frame in frames]
    blurs = (compared.crop(blur, origin=seen) for blur in _even_blurs(sharp, nodes))
    for (inner, outer), (low, high) in zip(
        itertools.pairwise(nodes), itertools.pairwise(blurs), strict=True
    ):
        last = outer == nodes[-1]
        between = (radii >= inner) & ((radii < outer) | last)
        for frame, candidate in between.nonzero().tolist():
            radius = float(radii[frame, candidate])
            blur = torch.lerp(low, high, (radius**2 - inner**2) / (outer**2 - inner**2))
            light, inside, clipped = blur[:-2], blur[-2], blur[-1]
            # The square: what lies beyond the frame is not only less light but other light.
            weight = inside**2 * torch.exp(-clipped / CLIPPED_SHARE) * unclipped[frame]
            squared = (light - frames[frame]).square_().sum(0)
            difference, known = gaussian_mean(torch.stack([weight * squared, weight]), window)
            variance = (difference + own[frame]) / (known + UNKNOWN_WEIGHT)
            costs[candidate] += torch.log(variance + ROUNDING_VARIANCE)
    return costs


def _nodes(largest: float) -> list[float]:
    """Radii from 0 to the largest or beyond, between which blurs are interpolated."""
    nodes = [0.0]
    while nodes[-1] < largest or len(nodes) == 1:
        nodes.append(nodes[-1] + min(max(nodes[-1] * STEP_SHARE, FINE_STEP), COARSE_STEP))
    return nodes


def _even_blurs(sharp: torch.Tensor, radii: Sequence[float]) -> Iterator[torch.Tensor]:
    """(C + 2, h, w) for each radius: light as if the picture went on as it is around each place,
    the share of the disc within the picture, and the share on clipped pixels.

    Waves of ``f`` periods per pixel keep ``2 J1(2 pi r f) / (2 pi r f)`` of themselves under a disc
    of radius r. A kernel of pixels would spread light by the pixel too, which is in both pictures.
    """
    inside = torch.ones_like(sharp[:1])
    clipped = (sharp.amax(0, keepdim=True) >= CLIPPED_LIGHT).to(sharp.dtype)
    channels = torch.cat([sharp, inside, clipped])
    height, width = sharp.shape[-2:]
    # Zeros as far as a disc reaches, so that nothing comes round from the other side, and at
    # lengths that a Fourier transform is fast for.
    reach = math.ceil(max(radii)) + RIPPLES
    size = [-(-(length + reach) // 32) * 32 for length in (height, width)]
    spectrum = torch.fft.rfft2(channels, s=size)
    frequency = torch.hypot(
        torch.fft.fftfreq(size[0], dtype=torch.float64)[:, None],
        torch.fft.rfftfreq(size[1], dtype=torch.float64),
    )
    for radius in radii:
        phase = (2 * math.pi * radius * frequency).clamp_min(1e-6)
        passed = 2 * torch.special.bessel_j1(phase) / phase
        blur = torch.fft.irfft2(spectrum * passed.to(sharp), s=size)[:, :height, :width]
        share = blur[-2:-1].clamp(1e-3, 1)
        yield torch.cat([blur[:-2] / share, share, (blur[-1:] / share).clamp_min(0)])


def _variance(frame: torch.Tensor, window: float) -> torch.Tensor:
    """(H, W) variance of (C, H, W) within the window, summed over channels."""
    mean = gaussian_mean(frame, window)
    return (
        gaussian_mean((frame**2).sum(0, keepdim=True), window)[0].sub((mean**2).sum(0)).clamp_min(0)
    )


def _window_reach(window: float) -> int:
    return math.ceil(WINDOW_REACH * window)


def gaussian_mean(values: torch.Tensor, deviation: float) -> torch.Tensor:
    """(N, H, W) Gaussian means over windows; the outermost pixels are repeated beyond the frame."""
    reach = _window_reach(deviation)
    offsets = torch.arange(-reach, reach + 1, dtype=values.dtype, device=values.device)
    weights = torch.exp(-0.5 * (offsets / deviation) ** 2)
    weights = weights / weights.sum()
    wide = F.pad(values[:, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(wide, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))[:, 0]


def _minimum(
    costs: torch.Tensor, candidates: torch.Tensor, frames: int, values: float, squared: bool
) -> torch.Tensor:
    """(5, H, W): the fields of :class:`CostMinimum`.

    values: independent values in a window of one frame.
    """
    at = candidates.to(costs) ** (2 if squared else 1)
    lowest, best = costs.min(0)
    middle = best.clamp(1, len(at) - 2)
    # The variance itself, not its logarithm, is a parabola around its minimum.
    before, centre, after = (
        torch.exp((costs.gather(0, (middle + step)[None])[0] - lowest) / frames)
        for step in (-1, 0, 1)
    )
    left, right = at[middle] - at[middle - 1], at[middle + 1] - at[middle]
    falling, rising = (centre - before) / left, (after - centre) / right
    curvature = 2 * (rising - falling) / (left + right)
    bent = curvature > 0
    slope = (falling * right + rising * left) / (left + right)
    shift = torch.where(bent, -slope / torch.where(bent, curvature, 1), 0)
    place = at[middle] + shift.clamp(-left, right)
    place = torch.where(bent, place, at[best])
    bottom = torch.where(bent, centre - slope**2 / (2 * torch.where(bent, curvature, 1)), centre)
    # Half of `values` times the second derivative of the cost is the information.
    information = values / 2 * frames * curvature / bottom.clamp_min(0.1)
    standard_error = torch.where(bent, information.clamp_min(1e-30).rsqrt(), math.inf)
    if squared:
        at = at.sqrt()
        place = place.clamp_min(0).sqrt()
        standard_error = standard_error / (2 * place)
    likely = torch.softmax(-VALUES_WHERE_MODEL_FAILS / 2 * (costs - lowest), 0)
    spread = torch.zeros_like(lowest)
    for candidate, probability in zip(at, likely, strict=True):
        spread += probability * (candidate - place) ** 2
    return torch.stack(
        [
            place,
            standard_error,
            spread.sqrt(),
            (best == 0).to(costs),
            (best == len(at) - 1).to(costs),
        ]
    )


def check_light(light: torch.Tensor, name: str) -> None:
    """Raises ValueError unless this is (B, C, H, W) of finite linear light, not negative."""
    if light.ndim != 4 or 0 in light.shape:
        raise ValueError(f"{name} has shape {tuple(light.shape)}; wanted (B, C, H, W).")
    if light.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} is {light.dtype}; wanted linear light, float32 or float64.")
    # The reversed comparison also catches NaN.
    if not (float(light.min()) >= 0 and math.isfinite(float(light.max()))):
        raise ValueError(
            f"{name} has values from {float(light.min()):g} to {float(light.max()):g}; wanted "
            "linear light, finite and not negative."
        )


def check_window(window: float) -> None:
    """Raises ValueError unless this is a standard deviation of a pixel or so, or more."""
    if not 0.5 <= window <= 100:
        raise ValueError(
            f"window is {window!r}; wanted the standard deviation in pixels of the window that is "
            "compared, 0.5 to 100."
        )

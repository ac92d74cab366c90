"""Moves the edges of a disparity map onto the edges of the photograph.

The edges of an estimated map lie some pixels beside those of the photograph, or are washed out. A
renderer that takes such a map at its word blurs a rim of the sharp subject, or leaves a rim of the
background sharp. What belongs to which surface can be seen in the photograph.

This network does not paint a new map. For each pixel it chooses one of a few values that the map
has there or close by: its own, the largest or the smallest within 1 to 8 pixels. So surfaces keep
their disparity, no ramp appears between them, and an edge that was washed out becomes hard again.

A map mostly has one kind of mistake everywhere, or none. What each pixel says about itself is a
guess; what all of them say together is a verdict on the map, and that is heard in every choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..windows import Window, in_windows, windows_of
from .convolutional_unet import ConvolutionalUNet

__all__ = ["DisparityRefiner", "nearby_extremes", "tolerance_px"]

REACHES = (1, 2, 3, 4, 6, 8)
"""Pixels to each side within which the largest and the smallest value are candidates."""

CANDIDATES = 1 + 2 * len(REACHES)
"""The own value, then the largest and the smallest of each reach."""

PIXELS_PER_SIDE = 2
"""Of the blocks on which the network works, to be fast."""

SURROUNDINGS_PX = 16
"""Pixels to each side over which the colours of the near and the far surface are means."""

SMALLEST_COLOUR_DEVIATION = 0.03
"""Of the colours of a surface, so that a plain one does not exclude its own noise."""

EVIDENCE_CHANNELS = 9
"""Photo (3), map (4) and what the one says about the other (2)."""

OWN_VALUE_BIAS = 3.0
"""Added to the logit of the own value: an untrained network leaves the map as it is."""

VERDICT_CHANNELS = 32

CAUTION = 5.0
"""How many times likelier than the own value another one must be: a right map must stay right."""

TOLERANCE_PX = 0.5
TOLERANCE_SHARE = 0.01
"""See :func:`tolerance_px`."""

MOST_AT_STAKE_PX = 4.0
"""Pixels of radius beyond which an error counts no more in training: wrong is wrong."""


def nearby_extremes(values: torch.Tensor) -> torch.Tensor:
    """The candidates of every pixel, (..., 1 + 2 R, H, W) for (..., H, W).

    First the value itself, then for each of the R :data:`REACHES` r the largest and the smallest of
    the ``2 r + 1`` x ``2 r + 1`` pixels around it, as far as the picture reaches.
    """
    candidates = [values]
    largest, smallest = values, values
    for reach in range(1, REACHES[-1] + 1):  # the largest of the largest is the largest
        largest = with_neighbours(largest, torch.maximum)
        smallest = with_neighbours(smallest, torch.minimum)
        if reach in REACHES:
            candidates += [largest, smallest]
    return torch.stack(candidates, -3)


def with_neighbours(
    values: torch.Tensor, choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """What ``choose`` makes of each of the values (..., H, W) and its eight neighbours."""
    for dim in (-1, -2):
        first, last = (values.narrow(dim, start, values.shape[dim] - 1) for start in (0, 1))
        chosen = values.clone()
        count = values.shape[dim] - 1
        for start, other in ((1, first), (0, last)):
            part = chosen.narrow(dim, start, count)
            part.copy_(choose(part, other))
        values = chosen
    return values


def tolerance_px(true_defocus: torch.Tensor) -> torch.Tensor:
    """Pixels of radius by which defocus may be wrong unseen, (B, 1, 1, 1): half a pixel, or 1 % of
    the range in the picture if that is more.

    Args:
        true_defocus: (B, 1, H, W), signed, pixels.
    """
    lowest, highest = (
        end((1, 2, 3), keepdim=True) for end in (true_defocus.amin, true_defocus.amax)
    )
    return (TOLERANCE_SHARE * (highest - lowest)).clamp_min(TOLERANCE_PX)


class DisparityRefiner(nn.Module):
    """Chooses for each pixel one of the values that a disparity map has around it.

    Choosing is not differentiable, so the network is trained for itself, by :meth:`loss`, with the
    true map as the target. Untrained, it changes nothing.

    Distances are in pixels of the picture at hand. In a larger picture the same mistake is wider,
    and beyond the largest of :data:`REACHES` only a part of it can be mended.

    Args:
        block_out_channels: width of the convolutional U-Net at each resolution, finest first; the
            finest has half the resolution of the picture.
        layers_per_block: residual blocks per resolution and direction.
    """

    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (32, 48, 64, 96),
        layers_per_block: int = 1,
    ):
        super().__init__()
        area = PIXELS_PER_SIDE**2
        self.network = ConvolutionalUNet(
            EVIDENCE_CHANNELS * area, CANDIDATES * area, tuple(block_out_channels), layers_per_block
        )
        self.verdict = nn.Sequential(
            nn.Linear(CANDIDATES, VERDICT_CHANNELS),
            nn.SiLU(),
            nn.Linear(VERDICT_CHANNELS, CANDIDATES),
        )
        for parameter in self.verdict[2].parameters():
            nn.init.zeros_(parameter)

    @property
    def size_multiple(self) -> int:
        """Height and width of the pictures must be multiples of this, in pixels."""
        return PIXELS_PER_SIDE * 2 ** (len(self.network.down) - 1)

    def forward(
        self, photo: torch.Tensor, maps: torch.Tensor, side: int | None = None
    ) -> torch.Tensor:
        """The refined maps, (B, 2, H, W): at each pixel a value that the map has nearby.

        Args:
            photo: (B, 3, H, W), all in focus, display-encoded sRGB in [0, 1].
            maps: (B, 2, H, W), disparity, larger is nearer, in any unit, and signed defocus
                ``K (disparity - df)`` in pixels, positive nearer than the plane in focus.
            side: side of the windows in which large pictures are worked on, a multiple of
                :attr:`size_multiple`; None for the whole picture at once. The result is the same
                up to rounding.

        Raises:
            ValueError: the sides of the picture or of the windows are no such multiples.
        """

        # Kept for the whole picture, as the verdict comes before the first choice.
        output = self.run(photo, maps, lambda _, output: output.half(), side)
        windows = windows_of(maps.shape[-2], maps.shape[-1], side)

        def logits_in(window: Window) -> torch.Tensor:
            return candidate_logits(window.crop(output, PIXELS_PER_SIDE))

        votes = torch.stack(
            [votes_of(logits_in(one), candidates_in(one, maps[:, 1:])[:, 0]) for one in windows]
        )
        verdict = self.verdict_on(votes.sum(0))

        def chosen(window: Window) -> torch.Tensor:
            choice = likeliest(logits_in(window) + verdict)
            values = candidates_in(window, maps)
            return values.gather(2, choice[:, None, None].expand(-1, 2, -1, -1, -1)).squeeze(2)

        return in_windows(chosen, windows)

    def loss(
        self, photo: torch.Tensor, maps: torch.Tensor, true_maps: torch.Tensor
    ) -> torch.Tensor:
        """Minus log of the probability of a good choice, a mean over pixels, a scalar.

        A candidate is good if its defocus is as right as that of the best one, up to
        :func:`tolerance_px`. Where the own value is good, it alone is: what is right stays
        untouched. A pixel weighs as much as the worst candidate would cost there, in pixels of
        defocus up to 4; so the few pixels at edges count, and where all candidates are alike,
        nothing does.

        Args:
            photo, maps: as of :meth:`forward`.
            true_maps: (B, 2, H, W), the true disparity, and the defocus it has with the same K and
                df.
        """
        logits = self.logits(photo, maps)
        true_defocus = true_maps[:, 1:2]
        errors = (nearby_extremes(maps[:, 1]) - true_defocus).abs()
        least = errors.amin(1, keepdim=True)
        good = errors <= least + tolerance_px(true_defocus)
        good[:, 1:] &= ~good[:, :1]
        chance = logits.masked_fill(~good, -torch.inf).logsumexp(1) - logits.logsumexp(1)
        at_stake = (errors.amax(1) - least[:, 0]).clamp_max(MOST_AT_STAKE_PX)
        return -(at_stake * chance).sum() / at_stake.sum().clamp_min(1)

    def logits(self, photo: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        """Of the candidates of :func:`nearby_extremes`, (B, 1 + 2 R, H, W); arguments as of
        :meth:`forward`."""
        logits = candidate_logits(self.run(photo, maps, lambda _, output: output))
        return logits + self.verdict_on(votes_of(logits, nearby_extremes(maps[:, 1])))

    def verdict_on(self, votes: torch.Tensor) -> torch.Tensor:
        """What is added to the logits of all pixels, (B, 1 + 2 R, 1, 1), for the :func:`votes_of`
        the picture."""
        shares = votes[:, :-1] / votes[:, -1:].clamp_min(1)
        dtype = self.network.conv_in.weight.dtype
        verdict: torch.Tensor = self.verdict((shares + 1e-3).log().to(dtype))
        return verdict.float()[:, :, None, None]

    def run(
        self,
        photo: torch.Tensor,
        maps: torch.Tensor,
        result: Callable[[Window, torch.Tensor], torch.Tensor],
        side: int | None = None,
    ) -> torch.Tensor:
        """What ``result`` makes of the network's output; see :class:`ConvolutionalUNet`."""
        height, width = maps.shape[-2:]
        multiple = self.size_multiple
        if height % multiple or width % multiple or (side or 0) % multiple:
            windows = f" in windows of {side}" if side else ""
            raise ValueError(
                f"Expected a picture whose sides are multiples of {multiple}, got {height} x "
                f"{width} pixels{windows}. Pad it."
            )
        dtype = self.network.conv_in.weight.dtype

        def evidence(window: Window) -> torch.Tensor:
            pixels = window.scaled(PIXELS_PER_SIDE)
            outer = pixels.grown(SURROUNDINGS_PX)
            colour, map_seen = outer.crop(photo), map_evidence(candidates_in(outer, maps))
            seen = torch.cat([colour, map_seen, colour_evidence(colour, map_seen[:, :1])], 1)
            seen = pixels.crop(seen, origin=outer)
            return F.pixel_unshuffle(seen, PIXELS_PER_SIDE).to(dtype)

        size = (height // PIXELS_PER_SIDE, width // PIXELS_PER_SIDE)
        return self.network(evidence, result, size, side and side // PIXELS_PER_SIDE)


def candidates_in(window: Window, maps: torch.Tensor) -> torch.Tensor:
    """The candidates (B, 2, 1 + 2 R, rows, columns) of the pixels of a window of ``maps``."""
    outer = window.grown(REACHES[-1])
    return window.crop(nearby_extremes(outer.crop(maps)), origin=outer)


def map_evidence(candidates: torch.Tensor) -> torch.Tensor:
    """What the network sees of the maps, (B, 4, H, W) for candidates (B, 2, 1 + 2 R, H, W).

    Disparity has no unit that maps of all kinds share: of it, only the place in the local range is
    seen. Defocus, and how far it is to both ends of its local range, are in pixels.
    """
    own, largest, smallest = candidates[:, :, 0], candidates[:, :, -2], candidates[:, :, -1]
    local_range = (largest - smallest)[:, :1]
    flat = local_range <= 0
    place = (own - smallest)[:, :1] / torch.where(flat, 1, local_range)
    near, far = (largest - own)[:, 1:], (own - smallest)[:, 1:]
    return torch.cat([place, *(torch.asinh(one) for one in (own[:, 1:], near, far))], 1)


def colour_evidence(photo: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Whether a pixel looks like the near or like the far surface around it, (B, 2, H, W).

    The colours of both are taken for normally distributed, each channel for itself. The first
    channel is the logarithm of how much likelier the near surface has the colour of the pixel than
    the far one. The second says where along the line from the mean of the far colours (0) to that
    of the near ones (1) it lies. An edge of the map that is some pixels off changes the means a
    little and the colour of the pixel not at all.

    Args:
        photo: (B, 3, H, W) in [0, 1], sides even.
        place: (B, 1, H, W), place in the local range of disparity, 0 the far and 1 the near end.
    """
    colours = torch.cat([torch.ones_like(place), photo, photo.square()], 1)
    sums = F.avg_pool2d(torch.cat([colours * place, colours * (1 - place)], 1), PIXELS_PER_SIDE)
    reach = SURROUNDINGS_PX // PIXELS_PER_SIDE
    for across, down in ((reach, 0), (0, reach)):
        sums = F.avg_pool2d(sums, (2 * down + 1, 2 * across + 1), 1, (down, across))
    surfaces = []
    for weight, mean, square in (one.split((1, 3, 3), 1) for one in sums.chunk(2, 1)):
        mean, square = mean / weight.clamp_min(1e-3), square / weight.clamp_min(1e-3)
        variance = (square - mean.square()).clamp_min(0) + SMALLEST_COLOUR_DEVIATION**2
        surfaces.append(
            [F.interpolate(one, scale_factor=PIXELS_PER_SIDE) for one in (mean, variance)]
        )
    (near, near_variance), (far, far_variance) = surfaces
    unlikely_far = (photo - far).square() / far_variance + far_variance.log()
    unlikely_near = (photo - near).square() / near_variance + near_variance.log()
    likelier_near = (unlikely_far - unlikely_near).sum(1, keepdim=True) / 2
    axis = near - far
    squared_length = axis.square().sum(1, keepdim=True) + 1e-3
    along = ((photo - far) * axis).sum(1, keepdim=True) / squared_length
    return torch.cat([torch.asinh(likelier_near), along.clamp(-2, 3)], 1)


def candidate_logits(output: torch.Tensor) -> torch.Tensor:
    """The logits (B, 1 + 2 R, H, W) that the output of the network stands for."""
    logits = F.pixel_shuffle(output.float(), PIXELS_PER_SIDE)
    return torch.cat([logits[:, :1] + OWN_VALUE_BIAS, logits[:, 1:]], 1)


def votes_of(logits: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """How often the pixels of a picture or window want each candidate, and their number, (B, 2 + 2
    R), both times what is at stake: a pixel without an edge nearby has no say.

    Args:
        logits: (B, 1 + 2 R, H, W).
        candidates: (B, 1 + 2 R, H, W), of the defocus, in pixels.
    """
    at_stake = (candidates[:, -2:-1] - candidates[:, -1:]).clamp_max(MOST_AT_STAKE_PX)
    wanted = torch.cat([logits.softmax(1), torch.ones_like(at_stake)], 1)
    return (wanted * at_stake).sum((2, 3))


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The candidate to take, (B, H, W), for logits (B, 1 + 2 R, H, W).

    First whether it is the own value, a larger or a smaller one: all reaches of a kind count
    together, as they mostly are the same surface, and a chance that is spread over them must not
    lose against the own value, but for :data:`CAUTION`. Then the reach.
    """
    kinds = (logits[:, :1] + math.log(CAUTION), logits[:, 1::2], logits[:, 2::2])
    kind = torch.stack([one.logsumexp(1) for one in kinds], 1).argmax(1)
    larger, smaller = (2 * one.argmax(1) for one in kinds[1:])
    return torch.where(kind == 0, 0, torch.where(kind == 1, 1 + larger, 2 + smaller))

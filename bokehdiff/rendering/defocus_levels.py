"""A picture shared out among levels of defocus, each spread over its circle of confusion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from bokehdiff.rendering.aperture import Aperture
from bokehdiff.rendering.frame import continued
from bokehdiff.rendering.layered import next_fast_length

__all__ = ["DefocusLevels", "share_of_level"]

# A pixel gets this much of its own light beside what arrives. It decides only where next to nothing
# arrives, as on a lone pixel of a wide circle between sharp ones.
OWN_LIGHT = 1e-4
# Values that are transformed at once.
VALUES_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 26}


def share_of_level(
    signed_defocus: torch.Tensor, levels: Sequence[float], number: int
) -> torch.Tensor:
    """Share in [0, 1] of every pixel that belongs to ``levels[number]``; over all they sum to 1.

    A pixel between two levels is shared by them linearly in ``r |r|``, so that the mixture of both
    discs has the variance (r^2 / 4 along each axis) of the disc of the pixel. Beyond the outermost
    levels all belongs to them. ``levels`` ascend, and 0 is one of them if their signs differ.
    """
    square = signed_defocus * signed_defocus.abs()
    squares = [level * abs(level) for level in levels]
    share = torch.ones_like(square)
    if number > 0:
        share = (square - squares[number - 1]) / (squares[number] - squares[number - 1])
        share = share.clamp(0, 1)
    if number < len(levels) - 1:
        beyond = (square - squares[number]) / (squares[number + 1] - squares[number])
        share = share - beyond.clamp(0, 1)
    return share


class DefocusLevels:
    """Light and coverage of a picture at levels of signed defocus, spread by Fourier transforms.

    On a CPU transforms are faster than direct convolutions of a whole picture even for circles of
    one pixel, and they keep their precision where the code around runs in half precision.

    Args:
        light: (B, C, H, W) linear light, float32 or float64.
        signed_defocus: (B, 1, H, W) in pixels. Beyond the frame both are repeated.
        levels: signed defocus of the levels, ascending.
        aperture: the opening; None for a disc.

    Raises:
        ValueError: an opening that differs between places of the picture.
    """

    def __init__(
        self,
        light: torch.Tensor,
        signed_defocus: torch.Tensor,
        levels: Sequence[float],
        aperture: Aperture | None,
    ) -> None:
        aperture = aperture or Aperture()
        if aperture.varies_over_field:
            raise ValueError(
                f"{aperture!r} differs between places of the picture, and here one kernel serves "
                "all of a level: leave cat_eye out, or take bokehdiff.render_bokeh."
            )
        self.light, self.levels = light, levels
        self.kernels = [aperture.kernel(level, dtype=torch.float64) for level in levels]
        self.reach = max(len(kernel) // 2 for kernel in self.kernels)
        self.defocus = continued(signed_defocus.to(light.dtype), self.reach)
        # What is uniform needs no transform and gets no rounding error from it.
        self.mean = light.detach().mean((2, 3), keepdim=True)
        coverage = torch.ones_like(light[:, :1])
        self.channels = continued(torch.cat([light - self.mean, coverage], 1), self.reach)
        self.size = tuple(next_fast_length(length) for length in self.channels.shape[-2:])

    def spectra(self) -> Iterator[torch.Tensor]:
        """(B, n, C + 1, h, w) transforms of n levels at a time, spread; coverage is last."""
        values = self.channels.shape[0] * self.channels.shape[1] * self.size[0] * self.size[1]
        at_once = max(1, VALUES_AT_ONCE.get(self.light.device.type, 1 << 22) // values)
        for start in range(0, len(self.levels), at_once):
            some = range(start, min(start + at_once, len(self.levels)))
            shares = [share_of_level(self.defocus, self.levels, number) for number in some]
            shared = torch.stack(shares, 1) * self.channels[:, None]
            kernels = torch.stack([self._kernel(number) for number in some]).to(self.light)
            spread = torch.fft.rfft2(kernels, s=self.size)[:, None]
            yield torch.fft.rfft2(shared, s=self.size) * spread

    def _kernel(self, number: int) -> torch.Tensor:
        """The kernel of a level in the middle of one as large as the largest."""
        kernel = self.kernels[number]
        return torch.nn.functional.pad(kernel, (self.reach - len(kernel) // 2,) * 4)

    def picture(self, spectra: torch.Tensor) -> torch.Tensor:
        """(..., C + 1, H, W) light less its mean, and coverage, from transforms."""
        # Kernels have their middle at `reach`, and so has the picture its first pixel.
        first, (height, width) = 2 * self.reach, self.light.shape[-2:]
        spread = torch.fft.irfft2(spectra, s=self.size)
        return spread[..., first : first + height, first : first + width]

    def divided(self, spread: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) light from (B, C + 1, H, W) light less its mean, and coverage."""
        light, coverage = spread[:, :-1], spread[:, -1:]
        own = OWN_LIGHT * (self.light - self.mean)
        return self.mean + (light + own) / (coverage + OWN_LIGHT)

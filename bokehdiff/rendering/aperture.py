"""The shape of the lens opening: one object shared by every classical renderer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["Aperture"]


@dataclass(frozen=True)
class Aperture:
    """A lens opening inscribed in the unit disc of lens coordinates (u, v), v pointing down.

    The default is a circular opening. With ``blades >= 3`` the opening is a regular polygon whose
    corners lie on the unit circle, so that the circle-of-confusion radius is the distance from the
    centre to a corner. ``rotation`` turns the polygon (degrees, clockwise on the screen; at 0 one
    corner points to the right). ``roundness`` bends straight blades (0) towards the circle (1).

    A scene point nearer than the focus plane shows the opening turned by 180 degrees, a farther
    one shows it upright; only openings with an odd number of blades reveal the difference.
    """

    blades: int = 0
    rotation: float = 0.0
    roundness: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.blades, bool) or int(self.blades) != self.blades:
            raise ValueError(f"blades must be a whole number, got {self.blades!r}.")
        if self.blades != 0 and self.blades < 3:
            raise ValueError(
                f"blades is {self.blades}; an opening needs at least 3 blades, or 0 for a disc."
            )
        if not math.isfinite(self.rotation):
            raise ValueError(f"rotation must be a finite angle in degrees, got {self.rotation!r}.")
        if not 0.0 <= self.roundness <= 1.0:
            raise ValueError(
                f"roundness is {self.roundness!r}; wanted 0 (straight blades) to 1 (circle)."
            )

    @property
    def is_disc(self) -> bool:
        """Whether the opening is a circle."""
        return self.blades == 0 or self.roundness == 1.0

    @property
    def is_symmetric(self) -> bool:
        """Whether the opening looks the same turned by 180 degrees."""
        return self.is_disc or self.blades % 2 == 0

    def signed_distance(
        self, x: torch.Tensor, y: torch.Tensor, radius: float | torch.Tensor
    ) -> torch.Tensor:
        """Distance to the rim of the opening scaled to ``radius``, negative inside.

        ``x``, ``y`` and ``radius`` share one unit (lens units, or pixels of the image blurred) and
        broadcast. Exact for the disc and for the inside of straight blades; rounded blades take
        the mean of both, weighted by ``roundness``.
        """
        to_circle = torch.sqrt(x * x + y * y) - radius
        if self.is_disc:
            return to_circle
        half_angle = math.pi / self.blades
        to_blades = torch.full_like(to_circle, -math.inf)
        for blade in range(self.blades):
            normal = math.radians(self.rotation) + (2 * blade + 1) * half_angle
            to_blades = torch.maximum(to_blades, x * math.cos(normal) + y * math.sin(normal))
        to_blades = to_blades - radius * math.cos(half_angle)
        return torch.lerp(to_blades, to_circle, self.roundness)

    def lens_samples(
        self,
        samples_per_side: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """Points (S, 2) = (u, v) of a regular grid on [-1, 1]^2 that lie inside the opening.

        ``samples_per_side`` is the grid's side before masking; the rim belongs to the opening, so
        21 samples per side give 317 points of the disc. Raises ValueError if no point is inside.
        """
        if int(samples_per_side) != samples_per_side or samples_per_side < 1:
            raise ValueError(
                f"samples_per_side is {samples_per_side!r}; wanted a whole number of at least 1."
            )
        # A single sample is a pinhole at the centre, where linspace would return the rim.
        axis = torch.linspace(-1, 1, int(samples_per_side), dtype=torch.float64)
        axis = axis if samples_per_side > 1 else torch.zeros(1, dtype=torch.float64)
        v, u = torch.meshgrid(axis, axis, indexing="ij")
        # The slack keeps points such as (0.6, 0.8), which rounding may push off the rim.
        inside = self.signed_distance(u, v, 1.0) <= 1e-9
        points = torch.stack([u[inside], v[inside]], dim=-1)
        if points.shape[0] == 0:
            raise ValueError(
                f"A grid of {samples_per_side} lens samples per side has no point inside the "
                "opening; use 1, 3 or more samples per side."
            )
        return points.to(dtype=dtype, device=device)

    def kernel(
        self,
        signed_radius: float,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """Blur kernel (2R+1, 2R+1) of sum 1: what one point of light becomes on the sensor.

        ``signed_radius`` is the signed defocus in pixels of the image blurred: positive (nearer
        than the focus) shows the opening turned by 180 degrees, negative (farther) upright.
        Weight of a pixel at distance t outside the rim: ``clip(0.5 - t, 0, 1)``, divided by the
        sum of all weights. R = ceil(|signed_radius| + 0.5) - 1 (at least 0), so nothing is cut off
        and a radius up to 0.5 returns the single weight 1.
        """
        if not math.isfinite(signed_radius):
            raise ValueError(f"signed_radius must be finite, got {signed_radius!r}.")
        radius = abs(float(signed_radius))
        reach = max(math.ceil(radius + 0.5) - 1, 0)
        axis = torch.arange(-reach, reach + 1, dtype=torch.float64)
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        if signed_radius > 0:
            x, y = -x, -y
        weights = (0.5 - self.signed_distance(x, y, radius)).clamp(0, 1)
        # A polygon narrower than half a pixel can miss every pixel centre but its own.
        weights[reach, reach] = weights[reach, reach].clamp_min(1e-6)
        return (weights / weights.sum()).to(dtype=dtype, device=device)

"""The lens cut into parts: what each of them makes of a point of light."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from bokehdiff.lens_cuts import shares_of_parts
from bokehdiff.rendering.aperture import Aperture, field_position

__all__ = ["LensParts"]

# The radius whose kernel tells how much light each part lets pass.
WEIGHING_RADIUS = 24.0
# A part that passes less than this share of the light is closed.
SMALLEST_PART = 1e-6
# Within a tile the kernel of its middle serves all: a second rim may be off by so many cells.
RIM_ERROR = 1.0
SMALLEST_TILE = 96
SMALLEST_FIELD_TILE = 32
TILE_RADII = 3
# Field positions along each side at which the parts' light is weighed.
FIELD_SAMPLES = 9


class LensParts:
    """An aperture cut through its middle: 1 part, 2 halves or 4 quarters.

    ``frame``: margin, height and width in pixels: the field is that of the picture without the
    margin around it.
    """

    def __init__(self, aperture: Aperture, parts: int, frame: tuple[int, int, int]) -> None:
        self.aperture, self.parts, self.frame = aperture, parts, frame
        self._memory: dict[str, torch.Tensor] = {}

    def zeros(self, purpose: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """Zeros of that shape; without gradients in the same memory for every slice.

        New memory costs more than the additions that are done in it.
        """
        if torch.is_grad_enabled():
            return like.new_zeros(shape)
        size = math.prod(shape)
        memory = self._memory.get(purpose)
        if memory is None or memory.numel() < size:
            memory = self._memory[purpose] = like.new_empty(size)
        return memory[:size].zero_().view(shape)

    def reach(self, defocus: float) -> int:
        """Pixels from the middle of a kernel to its border."""
        return max(math.ceil(abs(defocus) - 0.5), 1) if defocus else 0

    def field(self, row: float, column: float) -> tuple[float, float]:
        """Field position of a place on the canvas; everywhere the same unless it matters."""
        if not self.aperture.varies_over_field:
            return 0.0, 0.0
        margin, height, width = self.frame
        # Pixels repeated beyond the frame are seen from where they were repeated.
        inside_x = min(max(float(column) - margin, 0.0), width - 1.0)
        inside_y = min(max(float(row) - margin, 0.0), height - 1.0)
        return field_position(inside_x, inside_y, height, width)

    def kernels(
        self, defocus: float, field: tuple[float, float] = (0.0, 0.0), cell: int = 1
    ) -> torch.Tensor:
        """(parts, 3, k, k) float64: kernel of each part, and the same times x and y, as below.

        The kernels of a part sum to 1. With o the offset of a pixel, the source at a signed defocus
        s shines through the lens point ``u = -o / s``; on a surface of slope g its light arrives in
        proportion to ``1 - g . u``, so the second and third kernels, which the slopes multiply, are
        the first times ``o / s``. On a grid of cells that is enlarged afterwards the radius is
        smaller by what pooling and enlarging add to the second moment.
        """
        if defocus == 0:
            sharp = torch.zeros(self.parts, 3, 1, 1, dtype=torch.float64)
            sharp[:, 0] = 1
            return sharp
        scaled = defocus / cell
        if cell > 1:
            # Second moments: disc r^2/2; pooling (1 - 1/t^2)/6, enlarging (1 - 1/t^2)/2 cells^2.
            squared = scaled**2 - 4 / 3 * (1 - 1 / cell**2)
            scaled = math.copysign(math.sqrt(max(squared, 0.01)), defocus)
        whole = self.aperture.kernel(scaled, field=field, dtype=torch.float64)
        reach = self.reach(defocus / cell)
        # A smaller radius has a smaller kernel: the border stays dark.
        whole = F.pad(whole, (reach - whole.shape[0] // 2,) * 4)
        offset = torch.arange(-reach, reach + 1, dtype=torch.float64)
        x, y = offset.expand_as(whole), offset[:, None].expand_as(whole)
        u, v = (-x, -y) if scaled > 0 else (x, y)
        parts = whole * shares_of_parts(u, v, self.parts)
        light = parts.sum((1, 2), keepdim=True)
        parts = torch.where(light > SMALLEST_PART, parts / light.clamp_min(SMALLEST_PART), 0)
        return torch.stack([parts, parts * x / scaled, parts * y / scaled], 1)

    def part_weights(self, canvas: tuple[int, int]) -> torch.Tensor:
        """(parts, 1, H, W) or (parts, 1, 1, 1) float64 share of the light each part lets pass."""
        height, width = canvas
        count = FIELD_SAMPLES if self.aperture.varies_over_field else 1
        weights = torch.zeros(self.parts, count, count, dtype=torch.float64)
        reach = math.ceil(WEIGHING_RADIUS - 0.5)
        offset = torch.arange(-reach, reach + 1, dtype=torch.float64)
        x, y = offset.expand(len(offset), -1), offset[:, None].expand(-1, len(offset))
        for i in range(count):
            for j in range(count):
                place = (i / max(count - 1, 1) * (height - 1), j / max(count - 1, 1) * (width - 1))
                kernel = self.aperture.kernel(
                    -WEIGHING_RADIUS, field=self.field(*place), dtype=torch.float64
                )
                weights[:, i, j] = (kernel * shares_of_parts(x, y, self.parts)).sum((1, 2))
        weights = torch.where(weights > SMALLEST_PART, weights, 0)
        if count == 1:
            return weights[:, None]
        return F.interpolate(weights[:, None], canvas, mode="bilinear", align_corners=True)

    def tile_side(self, defocus: float, cell: int = 1) -> int:
        """Side in cells of tiles whose sources may share a kernel, and that transform well."""
        side = max(SMALLEST_TILE, math.ceil(TILE_RADII * abs(defocus) / cell))
        if not self.aperture.varies_over_field:
            return side
        _, height, width = self.frame
        # Pixels that the second rim moves per pixel of the picture, so cells per cell as well.
        moves = self.aperture.cat_eye * abs(defocus) / (math.hypot(height, width) / 2)
        finest = 2 * RIM_ERROR / max(moves, 1e-9)
        return int(min(side, max(SMALLEST_FIELD_TILE, finest)))

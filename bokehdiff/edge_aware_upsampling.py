"""A coarse disparity map brought to the size of its photograph, edges on the photograph's edges.

A depth network answers on a grid of some 500 cells a side, and crosses from one surface to the next
over two or three cells. Enlarged bilinearly to a photograph of thousands of pixels, that is a ramp
dozens of pixels wide, on which a lens would blur by amounts that belong to no surface. Here every
edge becomes a jump, and the colours of the photograph say where it lies:

1. On the grid, a cell between two surfaces takes the disparity of the closer one: with the largest
   and smallest values n and f of the 3 x 3 cells around it, its value v becomes n if
   n - v < v - f, else f, wherever n - f is a jump.
2. A pixel p whose 3 x 3 cells q hold a jump lets them vote. Cell q has the weight
   ``w = exp(-|p - q|^2 / 2 s^2 - |I(p) - I(q)|^2 / 2 c^2)``, where distances are in cells and
   I(q) is the mean colour of the cell. The cells nearer than midway between n and f stand against
   the farther ones, and the pixel takes the weighted mean of the heavier side.
3. Every other pixel is interpolated bilinearly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["upsample_to_photo"]

# What counts as a jump within 3 x 3 cells, as a share of the whole range of the map: more than a
# surface changes there that could be seen at all, less than the gap between two things.
JUMP_SHARE = 0.05
# s, in cells, and c, in display-encoded colour: chosen on rendered scenes and stereo pairs of known
# disparity, shrunk four times, where half and twice of c are hardly worse.
DISTANCE_DEVIATION = 0.8
COLOUR_DEVIATION = 0.1
# Where no cell has the colour of the pixel, distance alone decides.
COLOURLESS_SHARE = 1e-8
# Pixels worked on at once, so that memory holds at any size.
PIXELS_AT_ONCE = 1 << 20


def upsample_to_photo(disparity: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Returns (1, 1, H, W): a coarse disparity map at the size of its photograph.

    No value lies outside the range of ``disparity``. A map without jumps is interpolated
    bilinearly; one larger than the photograph is averaged first.

    Args:
        disparity: (1, 1, h, w) float32, finite, that covers the same view in any unit.
        image: (1, 3, H, W) photograph, display-encoded in [0, 1], on the same device.
    """
    height, width = image.shape[-2:]
    size = (min(disparity.shape[-2], height), min(disparity.shape[-1], width))
    cells = F.interpolate(disparity, size, mode="area")
    jump = JUMP_SHARE * (cells.max() - cells.min())
    cells = _without_ramps(cells, jump)
    nearest, farthest = _around(cells)
    steep = nearest - farthest > jump
    result = F.interpolate(cells, (height, width), mode="bilinear", align_corners=False)
    if not bool(steep.any()):
        return result

    colours = F.interpolate(image, size, mode="area")
    rows, columns = (
        ((torch.arange(pixels, device=image.device) + 0.5) * cell_count / pixels - 0.5)
        for pixels, cell_count in zip((height, width), size, strict=True)
    )
    band = max(PIXELS_AT_ONCE // width, 1)
    for top in range(0, height, band):
        some_rows = rows[top : top + band]
        cell_row, cell_column = some_rows.round().long(), columns.round().long()
        votes = steep[0, 0][cell_row[:, None], cell_column]
        y, x = votes.nonzero(as_tuple=True)
        result[0, 0, top + y, x] = _of_the_heavier_side(
            cells[0, 0],
            colours[0],
            (nearest + farthest)[0, 0] / 2,
            image[0][:, top + y, x],
            some_rows[y],
            columns[x],
        )
    return result


def _without_ramps(cells: torch.Tensor, jump: torch.Tensor) -> torch.Tensor:
    """The map (1, 1, h, w) in which cells between two surfaces belong to the closer one."""
    nearest, farthest = _around(cells)
    closer = torch.where(nearest - cells < cells - farthest, nearest, farthest)
    return torch.where(nearest - farthest > jump, closer, cells)


def _around(cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest and the smallest value of the 3 x 3 cells around each."""
    return F.max_pool2d(cells, 3, 1, padding=1), -F.max_pool2d(-cells, 3, 1, padding=1)


def _of_the_heavier_side(
    cells: torch.Tensor,
    colours: torch.Tensor,
    midway: torch.Tensor,
    colour: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
) -> torch.Tensor:
    """(N,) disparity of N pixels beside a jump.

    Args:
        cells, colours, midway: (h, w), (3, h, w) and (h, w) of the grid.
        colour: (3, N) of the pixels.
        row, column: (N,) where the pixels lie on the grid, in cells; 0 is the centre of the first.
    """
    height, width = cells.shape
    home_row, home_column = row.round().long(), column.round().long()
    border = midway[home_row, home_column]
    # Weight, and weight times disparity, of the farther and the nearer side.
    weights, sums = torch.zeros(2, 2, len(row), device=cells.device).unbind()
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            there, across = home_row + down, home_column + right
            distance = (there - row).square() + (across - column).square()
            there, across = there.clamp(0, height - 1), across.clamp(0, width - 1)
            value = cells[there, across]
            contrast = (colours[:, there, across] - colour).square().sum(dim=0)
            alike = torch.exp(-contrast / (2 * COLOUR_DEVIATION**2)) + COLOURLESS_SHARE
            weight = torch.exp(-distance / (2 * DISTANCE_DEVIATION**2)) * alike
            nearer = value > border
            for side, belongs in enumerate((~nearer, nearer)):
                weights[side] += weight * belongs
                sums[side] += weight * belongs * value
    heavier = (weights[1] > weights[0]).long()[None]
    return (sums.gather(0, heavier) / weights.gather(0, heavier))[0]

"""Rectangles of a picture that are worked on one after the other, so that memory and caches hold.

What a window needs from around it is its *margin*. A function whose values depend on nothing
beyond the margin gives the same picture in windows as at once, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

__all__ = ["Window", "in_windows", "put", "windows_of"]


@dataclass(frozen=True)
class Window:
    """Rows ``top`` to ``bottom`` and columns ``left`` to ``right``, the last of each excluded, of a
    picture of ``height`` x ``width`` pixels."""

    top: int
    left: int
    bottom: int
    right: int
    height: int
    width: int

    def grown(self, margin: int) -> Window:
        """The window with this many pixels around it, as far as the picture reaches."""
        return Window(
            max(self.top - margin, 0),
            max(self.left - margin, 0),
            min(self.bottom + margin, self.height),
            min(self.right + margin, self.width),
            self.height,
            self.width,
        )

    def scaled(self, factor: int) -> Window:
        """The same window of the picture enlarged so many times."""
        return Window(
            self.top * factor,
            self.left * factor,
            self.bottom * factor,
            self.right * factor,
            self.height * factor,
            self.width * factor,
        )

    def overlaps(self, other: Window) -> bool:
        """Whether the two have a pixel in common."""
        return (
            self.top < other.bottom
            and other.top < self.bottom
            and self.left < other.right
            and other.left < self.right
        )

    def common(self, other: Window) -> Window:
        """The pixels that are in both; empty where the two do not overlap."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        return Window(
            top,
            left,
            max(min(self.bottom, other.bottom), top),
            max(min(self.right, other.right), left),
            self.height,
            self.width,
        )

    def around(self, other: Window) -> Window:
        """The smallest window that holds both."""
        return Window(
            min(self.top, other.top),
            min(self.left, other.left),
            max(self.bottom, other.bottom),
            max(self.right, other.right),
            self.height,
            self.width,
        )

    def pooled(self, cell: int) -> Window:
        """The same window of the picture in cells of ``cell`` x ``cell`` pixels: every cell that
        it touches."""
        return Window(
            self.top // cell,
            self.left // cell,
            -(-self.bottom // cell),
            -(-self.right // cell),
            -(-self.height // cell),
            -(-self.width // cell),
        )

    def divided(self, side: int) -> list[Window]:
        """Windows of ``side`` x ``side`` pixels that cover this one, the last of each row and
        column as small as what remains."""
        return [
            Window(
                top,
                left,
                min(top + side, self.bottom),
                min(left + side, self.right),
                self.height,
                self.width,
            )
            for top in range(self.top, self.bottom, side)
            for left in range(self.left, self.right, side)
        ]

    def crop(
        self, values: torch.Tensor, cell: int = 1, origin: Window | None = None
    ) -> torch.Tensor:
        """This part of ``values``, a view of it.

        Args:
            values: (..., rows, columns) of cells of ``cell`` x ``cell`` pixels. The window starts
                at a whole cell; a cell that it cuts at its end belongs to it.
            cell: side of a cell, pixels.
            origin: the window that ``values`` cover, by default the whole picture.

        Returns:
            (..., rows, columns) of the window; ``values`` themselves if that is all of them.
        """
        top, left = (origin.top, origin.left) if origin else (0, 0)
        rows = slice((self.top - top) // cell, -((top - self.bottom) // cell))
        columns = slice((self.left - left) // cell, -((left - self.right) // cell))
        height, width = values.shape[-2:]
        if rows.start == columns.start == 0 and rows.stop >= height and columns.stop >= width:
            return values  # a view would cost training a copy of every gradient
        return values[..., rows, columns]


def windows_of(height: int, width: int, side: int | None = None) -> list[Window]:
    """Windows of ``side`` x ``side`` pixels that cover a picture, the last of each row and column
    as small as what remains; one window of the whole picture without ``side``."""
    whole = Window(0, 0, height, width, height, width)
    return whole.divided(side) if side else [whole]


def put(
    whole: torch.Tensor | None, window: Window, part: torch.Tensor, cell: int = 1
) -> torch.Tensor:
    """The picture ``whole`` (..., rows, columns) of cells with ``part`` written into the window.

    ``whole`` is written in place, and made if it is None; a part that is all of it takes its place.
    """
    rows, columns = -(-window.height // cell), -(-window.width // cell)
    if tuple(part.shape[-2:]) == (rows, columns):
        return part
    if whole is None:
        whole = part.new_empty(*part.shape[:-2], rows, columns)
    window.crop(whole, cell).copy_(part)
    return whole


def in_windows(
    function: Callable[[Window], torch.Tensor], windows: Iterable[Window], margin: int = 0
) -> torch.Tensor:
    """The picture put together of what ``function`` gives for each window with its margin.

    Args:
        function: of a window that has its margin; returns (..., rows, columns) pixels of it.
        windows: windows that cover the picture.
        margin: pixels around a window without which its values would be others.

    Returns:
        (..., height, width).
    """
    whole = None
    for window in windows:
        outer = window.grown(margin)
        whole = put(whole, window, window.crop(function(outer), origin=outer))
    assert whole is not None, "no windows"
    return whole

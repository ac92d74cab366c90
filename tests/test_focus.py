"""Which plane is in focus."""

from __future__ import annotations

import torch

from bokehdiff.focus import focus_disparity_at


def test_focus_disparity_is_the_median_of_a_window():
    disparity = torch.zeros(1, 1, 20, 30)
    disparity[..., 5:10, 10:20] = 0.75
    disparity[..., 7, 15] = 0.1  # an outlier under the finger
    assert focus_disparity_at(disparity, 15, 7) == 0.75
    assert focus_disparity_at(disparity, 29, 19) == 0
    disparity[..., 7, 14] = float("nan")
    assert focus_disparity_at(disparity[0, 0], 15.4, 7.9) == 0.75

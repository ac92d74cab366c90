"""How far light goes: nothing that is reached is left out, and little is counted that is not."""

from __future__ import annotations

import torch

from bokehdiff.rendering.circle_reach import change_within_reach, reaching_radius


def test_reach_is_never_too_short_and_at_most_twice_too_long() -> None:
    for radius_px in (1.0, 5.0, 11.0, 23.0, 60.0):
        radius = torch.zeros(1, 1, 256, 256)
        radius[..., 128, 128] = radius_px
        reached = reaching_radius(radius, 6, 4)[0, 0] > 0
        rows = torch.arange(64)
        distance = ((rows - 32).abs() * 4 - 3).clamp_min(0)  # from the nearest pixels of the tokens
        far = torch.maximum(distance[:, None], distance)
        assert bool(reached[far < radius_px].all()), radius_px
        assert not bool(reached[far > 2 * radius_px + 8].any()), radius_px


def test_a_change_counts_as_far_as_its_light_goes() -> None:
    change = torch.zeros(1, 1, 32, 32)
    change[..., 16, 16] = 1.0
    sharp = change_within_reach(change, torch.zeros(1, 1, 128, 128), 5, 4)
    assert torch.equal(sharp, change)
    blurred = change_within_reach(change, torch.full((1, 1, 128, 128), 12.0), 5, 4)
    assert float(blurred[0, 0, 16, 13:20].min()) == 1 and float(blurred[0, 0, 16, 25]) == 0

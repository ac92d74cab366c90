"""Samples depend on seed and number only; all maps of a sample are cropped and turned alike."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
import torch

from training.samples import (
    AugmentedCrops,
    ConsecutiveBatches,
    sample_loader,
    seeded_generator,
    with_mistakes,
)


class NumberedScenes:
    """Scene i: every pixel of all maps tells its position, and df tells i."""

    def __init__(self, size: int = 8) -> None:
        position = torch.arange(float(size * size)).reshape(1, size, size)
        self.maps = {
            "image": position.repeat(3, 1, 1),
            "disparity": position,
            "target": position.repeat(3, 1, 1),
        }

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**self.maps, "df": torch.tensor(float(index)), "K": torch.tensor(5.0)}


def crops(scene_count: int | None = None, crop_size: int = 5, seed: int = 0) -> AugmentedCrops:
    return AugmentedCrops(NumberedScenes(), scene_count, crop_size, seed)


def test_samples_depend_on_their_number_only() -> None:
    forwards, backwards = crops(scene_count=3), crops(scene_count=3)
    first = [forwards[number] for number in range(10)]
    again = [backwards[number] for number in reversed(range(10))][::-1]
    for one, other in zip(first, again, strict=True):
        for key in one:
            assert torch.equal(one[key], other[key])


def test_maps_of_a_sample_stay_aligned() -> None:
    for number in range(20):
        sample = crops()[number]
        assert sample["image"].shape == (3, 5, 5)
        assert torch.equal(sample["image"][:1], sample["disparity"])
        assert torch.equal(sample["image"], sample["target"])


def test_all_crops_and_turns_occur() -> None:
    corners = set()
    for number in range(200):
        disparity = crops(crop_size=7)[number]["disparity"][0]
        corners.add((disparity[0, 0].item(), disparity[0, 1].item() - disparity[0, 0].item()))
    # 2 x 2 positions; 8 orientations show as 4 corners times 2 directions of reading
    assert {step for _, step in corners} == {1.0, -1.0, 8.0, -8.0}
    assert len(corners) == 4 * 8


# -- Mistakes of estimated maps ------------------------------------------------------------------


class SlantedScenes:
    """Scene i: two surfaces before a wall, in focus at the nearer one."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        disparity = torch.full((1, 64, 64), 0.2)
        disparity[:, 20:, 10:30] = torch.linspace(0.4, 0.5, 44)[:, None]
        disparity[:, 30:, 22:50] = 0.8
        image = torch.rand((3, 64, 64), generator=generator)
        numbers = {"df": torch.tensor(0.8), "K": torch.tensor(20.0)}
        return {"image": image, "disparity": disparity, "target": image, **numbers}


def corrupted_crops(share: float, crop_size: int = 48) -> AugmentedCrops:
    return AugmentedCrops(SlantedScenes(), None, crop_size, seed=0, corruption=share)


def test_without_corruption_the_disparity_is_true() -> None:
    sample = crops()[3]
    assert torch.equal(sample["true_disparity"], sample["disparity"])


def test_corruption_changes_disparity_and_df_alone() -> None:
    changed = 0
    for number in range(20):
        plain, corrupted = corrupted_crops(0.0)[number], corrupted_crops(1.0)[number]
        for key in ("image", "target", "K", "number", "true_disparity"):
            assert torch.equal(plain[key], corrupted[key]), key
        disparity = corrupted["disparity"]
        assert disparity.shape == (1, 48, 48) and disparity.dtype == torch.float32
        assert corrupted["df"].shape == () and corrupted["df"].dtype == torch.float32
        assert disparity.min() >= 0 and disparity.max() <= 1
        changed += not torch.equal(disparity, corrupted["true_disparity"])
    assert changed >= 19  # in the mildest of cases nothing need happen


def test_corrupted_samples_depend_on_their_number_only() -> None:
    forwards, backwards = corrupted_crops(0.7), corrupted_crops(0.7)
    first = [forwards[number] for number in range(8)]
    again = [backwards[number] for number in reversed(range(8))][::-1]
    for one, other in zip(first, again, strict=True):
        for key in one:
            assert torch.equal(one[key], other[key])


def test_a_share_of_the_samples_is_corrupted() -> None:
    samples = [corrupted_crops(0.5, 24)[number] for number in range(200)]
    corrupted = [not torch.equal(one["disparity"], one["true_disparity"]) for one in samples]
    # Four standard deviations of 200 draws; some crops show one surface, which nothing changes.
    assert 0.3 < sum(corrupted) / 200 < 0.5 + 4 * (0.25 / 200) ** 0.5


def test_edges_are_moved_by_up_to_eight_pixels_either_way() -> None:
    """A disc of radius 20: its area tells by how much it has shrunk or grown."""
    rows, columns = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    disc = ((rows - 48) ** 2 + (columns - 48) ** 2 <= 20**2).float()[None]
    sample = {"image": torch.zeros(3, 96, 96), "disparity": disc}
    sample |= {"df": torch.tensor(0.0), "K": torch.tensor(20.0)}
    moved = set()
    for seed in range(150):
        changed = with_mistakes(sample, numpy.random.default_rng(seed))["disparity"]
        if set(changed.unique().tolist()) == {0.0, 1.0}:  # edges have moved, and nothing else
            moved.add(round((float(changed.sum()) / math.pi) ** 0.5 - 20))
    assert {-8, -4, -1, 1, 4, 8} <= moved <= set(range(-12, 13))


def test_df_follows_what_was_in_focus() -> None:
    """Everything is in focus and drifts: df goes with the median of it."""
    ramp = torch.linspace(0.49, 0.51, 64).expand(1, 64, 64).contiguous()
    sample = {"image": torch.rand(3, 64, 64), "disparity": ramp}
    sample |= {"df": torch.tensor(0.5), "K": torch.tensor(20.0)}
    for seed in range(10):
        changed = with_mistakes(sample, numpy.random.default_rng(seed))
        shift = float((changed["disparity"] - ramp).median())
        assert float(changed["df"]) == pytest.approx(0.5 + shift, abs=1e-3)


# -- Order and batches ---------------------------------------------------------------------------


def test_endless_scenes_follow_the_sample_number() -> None:
    assert [int(crops()[number]["df"]) for number in (0, 5, 1000)] == [0, 5, 1000]


def test_every_pass_sees_each_scene_once_in_a_new_order() -> None:
    order = [int(crops(scene_count=6)[number]["df"]) for number in range(18)]
    passes = [tuple(order[start : start + 6]) for start in (0, 6, 12)]
    assert all(sorted(one) == list(range(6)) for one in passes)
    assert len(set(passes)) > 1


def test_seeds_differ() -> None:
    assert not torch.equal(crops(seed=0)[0]["image"], crops(seed=1)[0]["image"])
    draws = {
        torch.rand((), generator=seeded_generator(*numbers)).item()
        for numbers in itertools.product((0, 1, 2), repeat=3)
    }
    assert len(draws) == 27


def test_crops_larger_than_scenes_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit scenes of 8 x 8"):
        crops(crop_size=9)[0]


def test_batches_of_all_processes_are_the_batches_of_one() -> None:
    alone = list(ConsecutiveBatches(2, 5, batch_size=4))
    assert alone[0] == [8, 9, 10, 11] and len(alone) == 3
    shared = [list(ConsecutiveBatches(2, 5, 2, process, 2)) for process in (0, 1)]
    assert [a + b for a, b in zip(*shared, strict=True)] == alone


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_the_numbered_samples_and_draws_nothing(workers: int) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    loader = sample_loader(crops(), ConsecutiveBatches(3, 6, 2), workers, pin_memory=False)
    numbers = [batch["df"].int().tolist() for batch in loader]
    assert numbers == [[6, 7], [8, 9], [10, 11]]
    assert torch.equal(torch.get_rng_state(), state)

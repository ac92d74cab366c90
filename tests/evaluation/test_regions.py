"""Where a photograph is measured: the masks by hand, and what they need to exist."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from evaluation.photographs import Photograph
from evaluation.regions import once_per_photograph, regions_from_radius, regions_of

STEP_AT = 40


def photograph(K: float | None = 19.0, light: bool = True) -> Photograph:
    """A far half and a near half in focus, with one bright light in the far half."""
    disparity = np.full((60, 80), 0.2, np.float32)
    disparity[:, STEP_AT:] = 0.6
    linear = np.full((60, 80, 3), 0.5, np.float32)
    linear[30, 10] = 9.0
    picture = np.full((60, 80, 3), 128, np.uint8)
    return Photograph(
        scene="halves",
        setting="f0",
        image=picture,
        disparity=disparity,
        disparity_range=(0.2, 0.6),
        df=0.6,
        K=K,
        truth=picture,
        light=linear if light else None,
    )


def test_the_masks_by_hand() -> None:
    regions = regions_of(photograph())
    edge = np.zeros((60, 80), bool)
    edge[:, 33:47] = True
    assert np.array_equal(regions["edge"], edge)
    assert regions["infocus"][:, 47:].all() and not regions["infocus"][:, :47].any()
    assert np.array_equal(regions["blurred"], ~edge & ~regions["infocus"])
    # A highlight of radius 7.6 px counts as one of 8 px, with 1.5 px to spare.
    assert np.flatnonzero(~regions["nohl"][30]).tolist() == list(range(1, 20))
    assert np.array_equal(regions["blurred_nohl"], regions["blurred"] & regions["nohl"])
    assert np.array_equal(regions["edge_nohl"], regions["edge"] & regions["nohl"])


@pytest.mark.parametrize(("share", "is_edge"), [(0.029, False), (0.031, True)])
def test_an_edge_is_a_step_of_3_percent_of_the_range(share: float, is_edge: bool) -> None:
    # A slope without steps spans the range; a thousandth of the pixels at either end is left out.
    disparity = np.linspace(0.0, 1.0, 100 * 100, dtype=np.float32).reshape(100, 100).T.copy()
    disparity[0, 0], disparity[-1, -1] = -7.0, 8.0
    disparity[:, 50:] += share * 0.998
    disparity[:, 50:] -= disparity[:, 50].mean() - disparity[:, 49].mean() - share * 0.998
    step = np.abs(np.diff(disparity, axis=1))[10, 49]
    low, high = np.quantile(disparity, [0.001, 0.999])
    assert (step > 0.03 * (high - low)) == is_edge, "the picture is what the test is about"
    made = photograph()
    other = Photograph(
        **{
            **vars(made),
            "disparity": disparity,
            "image": np.zeros((100, 100, 3), np.uint8),
            "truth": np.zeros((100, 100, 3), np.uint8),
            "light": None,
        }
    )
    assert regions_of(other)["edge"][20:80, 45:55].any() == is_edge


def test_the_three_share_out_the_pixels() -> None:
    regions = regions_of(photograph())
    total = sum(regions[name].astype(int) for name in ("infocus", "blurred", "edge"))
    assert (total == 1).all()


def test_without_light_there_are_no_highlight_regions() -> None:
    with_light, without = regions_of(photograph()), regions_of(photograph(light=False))
    assert list(without) == ["infocus", "blurred", "edge"]
    for name, mask in without.items():
        assert np.array_equal(mask, with_light[name])


def test_without_K_there_are_no_regions() -> None:
    assert regions_of(photograph(K=None)) == {}


def test_a_scene_without_steps_has_no_edges() -> None:
    flat = np.full((20, 30), 0.5, np.float32)
    regions = regions_from_radius(flat, 4 * flat, None, disparity_step=0.0)
    assert not regions["edge"].any() and regions["blurred"].all()


def test_they_are_found_once_and_forgotten_with_the_photograph() -> None:
    calls = []

    @once_per_photograph
    def find(one: Photograph) -> dict[str, np.ndarray]:
        calls.append(one.scene)
        return {"mask": np.zeros((2, 2), bool)}

    first, second = photograph(), photograph()
    found = find(first)
    assert find(first) is found and len(calls) == 1
    assert find(second) is not found and len(calls) == 2, "equal photographs are two"
    remembered = weakref.ref(found["mask"])
    del first, found
    gc.collect()
    assert remembered() is None, "nothing outlives the photograph"
    find(photograph())
    assert len(calls) == 3

    one = photograph()
    assert regions_of(one) is regions_of(one)

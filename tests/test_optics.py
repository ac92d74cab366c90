"""The circle of confusion, K from a camera, unit conventions. What is refused: test_mistakes.py."""

from __future__ import annotations

import json
import math
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch

from bokehdiff import optics


def test_sign_and_size_of_defocus():
    disparity = torch.tensor([0.9, 0.5, 0.2])
    signed = optics.signed_defocus(disparity, 0.5, 10.0)
    assert torch.allclose(signed, torch.tensor([4.0, 0.0, -3.0]))
    assert torch.equal(optics.circle_of_confusion(disparity, 0.5, 10.0), signed.abs())


def test_numbers_arrays_and_tensors_agree():
    values = np.random.default_rng(0).random((2, 1, 3, 4))
    focus, strength = [0.2, 0.7], [3.0, 5.0]
    wanted = np.stack([strength[i] * (values[i] - focus[i]) for i in range(2)])
    for df, K in (
        (focus, strength),
        (np.array(focus), np.array(strength)),
        (torch.tensor(focus), torch.tensor(strength)),
        (torch.tensor(focus).reshape(2, 1, 1, 1), torch.tensor(strength).reshape(2, 1, 1, 1)),
    ):
        array = optics.signed_defocus(values, df, K)
        tensor = optics.signed_defocus(torch.from_numpy(values), df, K)
        assert isinstance(array, np.ndarray) and isinstance(tensor, torch.Tensor)
        assert np.allclose(array, wanted, atol=1e-6)
        assert np.allclose(tensor.numpy(), wanted, atol=1e-6)
    assert optics.signed_defocus(0.75, 0.25, 8) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_is_kept_and_gradients_flow(dtype):
    disparity = torch.rand(2, 1, 3, 4).to(dtype).requires_grad_()
    df = torch.tensor([0.1, 0.6], dtype=torch.float64, requires_grad=True)
    radius = optics.circle_of_confusion(disparity, df, 4.0)
    assert radius.dtype == dtype
    radius.sum().backward()
    assert disparity.grad is not None and df.grad is not None


def test_whole_number_disparity_does_not_round_the_focus():
    assert optics.signed_defocus(torch.tensor([1]), 0.25, 2.0).item() == 1.5
    assert optics.signed_defocus(np.array([[1], [0]]), [0.25, 0.5], 2.0).tolist() == [[1.5], [-1]]


def test_depth_and_disparity_are_inverse():
    depth = torch.tensor([0.5, 2.0, math.inf, 0.0, -1.0, math.nan])
    for kind in (depth, depth.numpy()):
        disparity = optics.depth_to_disparity(kind)
        assert type(disparity) is type(kind)
        assert np.array_equal(
            np.asarray(disparity), [2, 0.5, 0, math.nan, math.nan, math.nan], equal_nan=True
        )
        back = optics.disparity_to_depth(disparity)
        assert np.array_equal(np.asarray(back)[:3], [0.5, 2, math.inf])
        assert np.isnan(np.asarray(back)[3:]).all()
    assert optics.depth_to_disparity(4.0) == 0.25 and optics.disparity_to_depth(0.0) == math.inf
    assert optics.depth_to_disparity(np.array([4])).dtype.kind == "f"
    assert math.isnan(optics.depth_to_disparity(0.0))


@pytest.mark.parametrize("kind", [torch.from_numpy, lambda array: array], ids=["torch", "numpy"])
def test_normalising_keeps_every_radius(kind):
    values = np.random.default_rng(0).uniform(7, 60, (2, 1, 5, 6))
    values[0, 0, 0, 0] = np.nan
    disparity = kind(values)
    stretched, df, K = optics.normalise_disparity(disparity, 20.0, 0.3)
    known = np.isfinite(values)
    for image in range(2):
        finite = np.asarray(stretched[image])[known[image]]
        assert finite.min() == 0 and finite.max() == 1
    before = np.asarray(optics.circle_of_confusion(disparity, 20.0, 0.3))
    after = np.asarray(optics.circle_of_confusion(stretched, df, K))
    assert np.allclose(before[known], after[known]) and np.isnan(after[0, 0, 0, 0])


def test_normalising_one_image_with_plain_numbers_gives_plain_numbers():
    stretched, df, K = optics.normalise_disparity(torch.tensor([[2.0, 6.0]]), 4.0, 5.0)
    assert stretched.tolist() == [[0, 1]] and (df, K) == (0.5, 20.0)
    assert isinstance(df, float) and isinstance(K, float)


def test_constant_disparity_is_only_shifted():
    stretched, df, K = optics.normalise_disparity(np.full((3, 4), 7.0), 9.0, 2.0)
    assert (stretched == 0).all() and K * abs(0 - df) == 2.0 * 2


@pytest.mark.parametrize("kind", [torch.from_numpy, lambda array: array], ids=["torch", "numpy"])
def test_a_range_in_focus_leaves_the_distance_to_its_nearest_end(kind):
    disparity = np.random.default_rng(0).random((2, 1, 30, 40))
    low, high, K = np.array([0.2, 0.5]), np.array([0.6, 0.55]), 30.0
    collapsed = optics.collapse_focus_range(kind(disparity), low, high)
    assert type(collapsed) is type(kind(disparity))
    values = np.asarray(collapsed)
    ends = [low.reshape(2, 1, 1, 1), high.reshape(2, 1, 1, 1)]
    wanted = K * (disparity - np.clip(disparity, *ends))
    np.testing.assert_allclose(optics.signed_defocus(values, low, K), wanted, atol=1e-12)
    assert 0 <= values.min() and values.max() <= 1
    in_range = (disparity >= ends[0]) & (disparity <= ends[1])
    assert (values == ends[0])[in_range].all() and in_range.any()
    for image in range(2):  # what was nearer is never farther
        order = np.argsort(disparity[image].ravel())
        assert (np.diff(values[image].ravel()[order]) >= 0).all()


def test_a_range_of_one_plane_changes_nothing():
    disparity = torch.rand(1, 1, 30, 40)
    plane = disparity[0, 0, 3, 4].item()  # with a pixel exactly there
    disparity.requires_grad_()
    collapsed = optics.collapse_focus_range(disparity, plane, plane)
    assert torch.equal(collapsed, disparity)
    collapsed.sum().backward()
    assert torch.equal(disparity.grad, torch.ones_like(disparity))


def test_gradients_of_a_range_in_focus():
    disparity = torch.tensor([[0.1, 0.35, 0.5, 0.8]], dtype=torch.float64, requires_grad=True)
    low = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    high = torch.tensor([0.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(optics.collapse_focus_range, (disparity, low, high))


def test_a_range_in_focus_keeps_unknown_pixels_and_is_in_order():
    collapsed = optics.collapse_focus_range(torch.tensor([math.nan, 0.5, 1.0]), 0.4, 0.6)
    assert math.isnan(collapsed[0]) and collapsed[1:].tolist() == pytest.approx([0.4, 0.8])
    assert optics.collapse_focus_range(np.array([0, 1]), 0.25, 0.5).tolist() == [0, 0.75]
    with pytest.raises(ValueError, match="goes from 0.6 to 0.4; wanted the farther end"):
        optics.collapse_focus_range(torch.rand(1, 1, 2, 2), 0.6, 0.4)
    with pytest.raises(ValueError, match="low has 3 values"):
        optics.collapse_focus_range(torch.rand(2, 1, 2, 2), [0.1, 0.2, 0.3], 0.4)


def test_strength_from_camera_by_hand():
    # 50 mm at f/2 focused at 2.05 m: 0.0025 * 2.05 / (4 * 2) m^2, on 36 mm for 3600 pixels.
    wanted = 0.0025 * 2.05 / 8 * 1000 * 100
    assert optics.strength_from_camera(2, 50, 2.05, 36, 3600) == pytest.approx(wanted)
    at_infinity = optics.strength_from_camera(2, 50, math.inf, 36, 3600)
    assert at_infinity == pytest.approx(0.0025 / 4 * 1000 * 100)
    assert optics.strength_from_camera(2, 50, 1e9, 36, 3600) == pytest.approx(at_infinity)


def test_strength_from_camera_scales_as_a_lens_does():
    base = optics.strength_from_camera(2, 50, 3, 36, 3000)
    assert optics.strength_from_camera(4, 50, 3, 36, 3000) == pytest.approx(base / 2)
    half_size = optics.strength_from_camera(2, 50, 3, 36, 1500)
    assert half_size == pytest.approx(optics.rescale_strength(base, 3000, 1500))


def test_blur_of_a_thin_lens_traced_through_the_aperture():
    """A point at depth z, two rays through the rim of the lens, their distance on the sensor."""
    f, N, s, z, pixels_per_m = 0.085, 1.8, 2.5, 6.0, 4000 / 0.036
    sensor = 1 / (1 / f - 1 / s)
    image_of_point = 1 / (1 / f - 1 / z)
    rim = f / N / 2
    radius = rim * abs(sensor - image_of_point) / image_of_point * pixels_per_m
    K = optics.strength_from_camera(N, 85, s, 36, 4000)
    assert optics.circle_of_confusion(1 / z, 1 / s, K) == pytest.approx(radius)


LENSES = pytest.mark.parametrize(
    ("f_number", "focal_length_mm", "focus_distance_m", "image_width_px", "radius_at_infinity"),
    [
        (2, 50, 2, 1280, 11.4),
        (2, 50, 2, 1920, 17.1),
        (1.4, 85, 1.5, 1920, 97.3),
        (1.4, 200, 3, 1920, 272),
    ],
)


@LENSES
def test_lens_strength_of_well_known_lenses(
    f_number, focal_length_mm, focus_distance_m, image_width_px, radius_at_infinity
):
    """On a sensor 36 mm wide; the half of ``F^2 / (N (S - F))`` in mm, times the pixels per mm."""
    lens = (f_number, focal_length_mm, focus_distance_m, 36, image_width_px)
    K = optics.lens_strength(*lens)
    assert K == pytest.approx(optics.strength_from_camera(*lens), rel=1e-12)
    df = 1 / focus_distance_m
    tolerance = 0.1 if radius_at_infinity < 100 else 0.5
    assert optics.signed_defocus(0.0, df, K) == pytest.approx(-radius_at_infinity, abs=tolerance)
    F, S = focal_length_mm, 1000 * focus_distance_m
    by_hand = F**2 / (2 * f_number * (S - F)) * image_width_px / 36
    assert optics.circle_of_confusion(0.0, df, K) == pytest.approx(by_hand, rel=1e-12)
    # Half as far as the focus a thing is as blurred as infinity, twice as far half as much.
    assert optics.signed_defocus(2 * df, df, K) == pytest.approx(by_hand, rel=1e-12)
    assert optics.signed_defocus(df / 2, df, K) == pytest.approx(-by_hand / 2, rel=1e-12)


def test_lens_strength_at_infinity_is_the_limit_of_strength_from_camera():
    far = torch.tensor([math.inf, 1e9], dtype=torch.float64)
    strengths = optics.lens_strength(2.0, 50.0, far, 36.0, 3600.0)
    wanted = optics.strength_from_camera(2, 50, math.inf, 36, 3600)
    assert strengths.tolist() == pytest.approx([wanted, wanted])


def test_lens_strength_takes_tensors_and_has_their_gradients():
    lens = [
        torch.tensor(values, dtype=torch.float64, requires_grad=True)
        for values in ([2.0, 1.4], [50.0, 85.0], [2.0, 1.5], [36.0, 23.5], [1280.0, 1920.0])
    ]
    strengths = optics.lens_strength(*lens)
    assert strengths.shape == (2,) and strengths.dtype == torch.float64
    for number in range(2):
        one = [float(values[number].detach()) for values in lens]
        assert float(strengths[number].detach()) == pytest.approx(optics.strength_from_camera(*one))
    assert torch.autograd.gradcheck(optics.lens_strength, lens)


def test_metres_and_millimetres_are_told_apart_by_the_names():
    """What takes a length says its unit, so that swapping units is visible where it is written."""
    for function in (optics.lens_strength, optics.strength_from_camera):
        lengths = [name for name in signature(function).parameters if name != "f_number"]
        assert all(name.endswith(("_mm", "_m", "_px")) for name in lengths)
    lens = {"f_number": 2, "sensor_width_mm": 36, "image_width_px": 1280}
    with pytest.raises(ValueError, match="within the focal length of 50 mm.*distance in metres"):
        optics.strength_from_camera(focal_length_mm=50, focus_distance_m=0.05, **lens)
    with pytest.raises(ValueError, match="within the focal length of 5000 mm"):
        optics.strength_from_camera(focal_length_mm=5000, focus_distance_m=2, **lens)


@pytest.mark.parametrize("focus_distance_m", [0.049, 0.05, 1e-9])
def test_no_lens_focuses_within_its_focal_length(focus_distance_m):
    with pytest.raises(ValueError, match="where no lens forms an image"):
        optics.strength_from_camera(2, 50, focus_distance_m, 36, 1280)
    assert optics.strength_from_camera(2, 50, 0.0501, 36, 1280) > 0


def test_golden_strength_from_exif(fixtures_root: Path):
    """Every EXIF table under the fixtures: K and the sensor width from the 35 mm equivalent."""
    rows = []
    for file in sorted(fixtures_root.rglob("*.json")):
        content = json.loads(file.read_text())
        if isinstance(content, dict):
            rows += content.get("exif_to_K", [])
    if not rows:
        pytest.skip(f"no exif_to_K table under {fixtures_root}")
    for row in rows:
        sensor = optics.sensor_width_from_equivalent(
            row["f_mm"], row["f35_mm"], row["width_px"], row["height_px"]
        )
        assert sensor == pytest.approx(row["sensor_width_mm"], rel=1e-9)
        K = optics.strength_from_camera(row["N"], row["f_mm"], row["s1_m"], sensor, row["width_px"])
        assert K == pytest.approx(row["K"], rel=1e-9)


def test_check_focus_and_strength_shapes():
    for df, K in (
        (0.5, 20),
        ([0.5, 0.5], np.float64(20)),
        (torch.tensor([0.5]), torch.full((2, 1, 1, 1), 20.0)),
        (np.array(0.5), [20.0, 20.0]),
    ):
        focus, strength = optics.check_focus_and_strength(df, K, 2)
        assert focus.shape == strength.shape == (2,)
        assert focus.dtype == strength.dtype == torch.float32
        assert focus.tolist() == [0.5, 0.5] and strength.tolist() == [20, 20]


def test_check_focus_and_strength_keeps_float64_and_gradient():
    df = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    focus, _ = optics.check_focus_and_strength(df, 1.0, 3)
    assert focus.dtype == torch.float64
    focus.sum().backward()
    assert df.grad == 3


def test_metric_focus_may_be_nearer_than_one_metre():
    focus, _ = optics.check_focus_and_strength(4.0, 1.0, 1, metric=True)
    assert focus.item() == 4
    assert optics.check_focus_and_strength(0.0, 0.0, 1, metric=True)[1].item() == 0

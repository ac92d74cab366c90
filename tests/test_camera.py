"""A camera makes the blur that rays through its lens make; what it is comes from EXIF data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

from bokehdiff import optics
from bokehdiff.camera import Camera, subject_distance_m
from bokehdiff.images import InputRepairedWarning, read_image

WIDTH, HEIGHT = 80, 60  # the shape of a phone's sensor
F_NUMBER, FOCAL_LENGTH, FOCAL_LENGTH_35MM, SUBJECT_DISTANCE = 0x829D, 0x920A, 0xA405, 0x9206
RESOLUTION, RESOLUTION_UNIT, PIXEL_WIDTH, PIXEL_HEIGHT = 0xA20E, 0xA210, 0xA002, 0xA003
ORIENTATION = 0x0112
PHONE = {F_NUMBER: 1.8, FOCAL_LENGTH: 5.7, FOCAL_LENGTH_35MM: 26}


def photo_with(
    folder: Path,
    tags: dict[int, Any],
    size: tuple[int, int] = (WIDTH, HEIGHT),
    name: str = "photo.jpg",
    orientation: int = 1,
) -> Path:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    for tag, value in tags.items():
        exif.get_ifd(0x8769)[tag] = value
    # As bytes: Pillow's TIFF writer leaves the camera's folder of an Exif object out.
    Image.new("RGB", size, (90, 120, 40)).save(folder / name, exif=exif.tobytes())
    return folder / name


def traced_radius_px(camera: Camera, focus_m: float, depth_m: float, long_side_px: int) -> float:
    """Two rays from a point on the axis through the rim of a thin lens, and how far apart they
    meet the sensor; float64."""
    focal = camera.focal_length_mm / 1000
    rim = focal / camera.f_number / 2
    # Where rays from the plane in focus meet, there is the sensor: two of them, traced.
    heights = []
    for height in (rim, -rim):
        slope = height / focus_m - height / focal  # of the ray, then bent by the lens
        heights.append((height, slope))
    sensor = -(heights[0][0] - heights[1][0]) / (heights[0][1] - heights[1][1])
    ends = [height + (height / depth_m - height / focal) * sensor for height in (rim, -rim)]
    return abs(ends[0] - ends[1]) / 2 * 1000 * long_side_px / camera.sensor_width_mm


CAMERAS = [
    Camera(1.4, 85),
    Camera(f_number=2.8, focal_length_mm=35, sensor_width_mm=23.5),
    Camera.from_equivalent(1.8, 5.7, 26, (3024, 4032)),
]


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize("focus_m", [0.4, 2.0, 37.0])
def test_metric_blur_is_that_of_traced_rays(camera: Camera, focus_m: float):
    depth = torch.tensor([0.3, 0.39, 0.7, 2.0, 11.0, 1e6], dtype=torch.float64)
    K = camera.strength((3000, 4000), 1 / focus_m, metric=True)
    radius = optics.circle_of_confusion(1 / depth, 1 / focus_m, K)
    traced = [traced_radius_px(camera, focus_m, float(z), 4000) for z in depth]
    # K is worked out in float64 from a df rounded to float32.
    np.testing.assert_allclose(radius.numpy(), traced, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize("farthest_m", [math.inf, 9.0])
def test_relative_blur_is_that_of_traced_rays(camera: Camera, farthest_m: float):
    depth = torch.tensor([0.5, 0.8, 1.5, 3.0, 9.0], dtype=torch.float64)
    # A map as a network gives it: affine in 1/depth, 0 at the farthest, 1 at the nearest thing.
    disparity = (1 / depth - 1 / farthest_m) / (1 / 0.5 - 1 / farthest_m)
    df = float(disparity[2])
    K = camera.strength((3000, 4000), df, focus_distance_m=1.5, farthest_distance_m=farthest_m)
    traced = [traced_radius_px(camera, 1.5, float(z), 4000) for z in depth]
    radius = optics.circle_of_confusion(disparity, df, K)
    np.testing.assert_allclose(radius.numpy(), traced, rtol=1e-6, atol=1e-5)


def test_focus_at_infinity():
    K = Camera(2, 50).strength((2400, 3600), 0.0, metric=True)
    assert K == pytest.approx(0.05**2 / 4 * 1000 * 100)


def test_turning_camera_and_photo_changes_nothing(tmp_path: Path):
    camera = Camera(1.8, 50)
    for metric in (True, False):
        settings = {"metric": metric} | ({} if metric else {"focus_distance_m": 2.0})
        landscape = camera.strength((3024, 4032), 0.5, **settings)
        assert landscape == camera.strength((4032, 3024), 0.5, **settings)
    equivalent = Camera.from_equivalent(1.8, 5.7, 26, (3024, 4032))
    assert equivalent == Camera.from_equivalent(1.8, 5.7, 26, (4032, 3024))
    # The same photo stored lying with a note to turn it, and stored upright.
    stored_lying = photo_with(tmp_path, PHONE, (80, 60), "lying.jpg", orientation=6)
    stored_upright = photo_with(tmp_path, PHONE, (60, 80), "upright.jpg")
    assert read_image(stored_lying).shape[-2:] == read_image(stored_upright).shape[-2:] == (80, 60)
    assert Camera.from_photo(stored_lying) == Camera.from_photo(stored_upright)


def test_half_the_pixels_half_the_radius_and_a_stop_is_a_stop():
    full = Camera(2, 50).strength((2000, 3000), 0.5, metric=True)
    assert Camera(2, 50).strength((1000, 1500), 0.5, metric=True) == pytest.approx(full / 2)
    assert Camera(4, 50).strength((2000, 3000), 0.5, metric=True) == pytest.approx(full / 2)


def test_each_image_of_a_batch_has_its_own_strength():
    camera, df = Camera(1.4, 85), torch.tensor([0.2, 0.5, 0.9], requires_grad=True)
    metric = camera.strength((200, 300), df, metric=True)
    relative = camera.strength((200, 300), df, focus_distance_m=3.0, farthest_distance_m=30.0)
    assert metric.shape == relative.shape == (3,) and metric.dtype == torch.float32
    for i, one in enumerate(df.tolist()):
        assert metric[i] == pytest.approx(camera.strength((200, 300), one, metric=True))
        assert relative[i] == pytest.approx(
            camera.strength((200, 300), one, focus_distance_m=3.0, farthest_distance_m=30.0)
        )
    assert camera.strength((200, 300), df.double(), metric=True).dtype == torch.float64
    assert camera.strength((200, 300), [0.2, 0.5], metric=True).tolist() == metric[:2].tolist()


def test_relative_disparity_without_a_distance_is_assumed_at_two_metres():
    with pytest.warns(InputRepairedWarning, match="assumed to be 2 m away. focus_distance_m") as w:
        assumed = Camera(1.8, 50).strength((200, 300), torch.tensor([0.4, 0.6]))
    assert len(w) == 1 and w[0].filename == __file__
    given = Camera(1.8, 50).strength((200, 300), torch.tensor([0.4, 0.6]), focus_distance_m=2.0)
    assert torch.equal(assumed, given)


@pytest.mark.filterwarnings("error")
def test_a_phone_blurs_like_a_full_frame_camera_stopped_down_by_the_crop():
    phone = Camera.from_equivalent(1.8, 5.7, 26, (3000, 4500))
    crop = 26 / 5.7
    full_frame = Camera(1.8 * crop, 26, optics.FULL_FRAME_DIAGONAL_MM * 3 / math.sqrt(13))
    far_focus = {"df": 1e-6, "metric": True}  # where s / (s - f) is 1 for both
    assert phone.strength((3000, 4500), **far_focus) == pytest.approx(
        full_frame.strength((3000, 4500), **far_focus), rel=1e-6
    )


# --- From a photograph ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_a_phone_photo_says_it_all(tmp_path: Path, suffix: str):
    file = photo_with(tmp_path, PHONE, name=f"photo{suffix}")
    camera = Camera.from_photo(file)
    assert (camera.f_number, camera.focal_length_mm) == pytest.approx((1.8, 5.7))
    assert camera == Camera.from_equivalent(
        camera.f_number, camera.focal_length_mm, 26, (HEIGHT, WIDTH)
    )
    with Image.open(file) as picture:
        assert Camera.from_photo(picture) == camera


def test_what_is_given_wins(tmp_path: Path):
    file = photo_with(tmp_path, PHONE)
    assert Camera.from_photo(file, f_number=1.2).f_number == 1.2
    assert Camera.from_photo(file, sensor_width_mm=9.6).sensor_width_mm == 9.6
    twice = Camera.from_photo(file, focal_length_35mm=52).sensor_width_mm
    assert twice == pytest.approx(Camera.from_photo(file).sensor_width_mm / 2)
    # Another lens is another camera: the sensor of the phone is not behind it.
    assert Camera.from_photo(file, f_number=1.4, focal_length_mm=85) == Camera(1.4, 85)
    same = Camera.from_photo(file, focal_length_mm=5.7)
    assert same.sensor_width_mm == pytest.approx(Camera.from_photo(file).sensor_width_mm)


def test_sensor_from_pixels_per_length_of_the_focal_plane(tmp_path: Path):
    lens = {F_NUMBER: 2.8, FOCAL_LENGTH: 35.0, PIXEL_WIDTH: 6000, PIXEL_HEIGHT: 4000}
    for unit, per_unit in ((2, 25.4), (3, 10.0), (4, 1.0), (5, 0.001)):
        tags = lens | {RESOLUTION: 6000 / 23.5 * per_unit, RESOLUTION_UNIT: unit}
        assert Camera.from_photo(photo_with(tmp_path, tags)).sensor_width_mm == pytest.approx(
            23.5, rel=1e-3
        )
    # Inches where no unit is named; the pixels of the picture where no others are.
    silent = {F_NUMBER: 2.8, FOCAL_LENGTH: 35.0, RESOLUTION: WIDTH / 23.5 * 25.4}
    upright = photo_with(tmp_path, silent, (HEIGHT, WIDTH))
    assert Camera.from_photo(upright).sensor_width_mm == pytest.approx(23.5, rel=1e-3)
    # A lens without contacts: the camera knows its sensor, the person the lens.
    manual = photo_with(tmp_path, tags | {F_NUMBER: 0, FOCAL_LENGTH: 0})
    by_hand = Camera.from_photo(manual, f_number=2, focal_length_mm=50)
    assert (by_hand.f_number, by_hand.focal_length_mm) == (2, 50)
    assert by_hand.sensor_width_mm == pytest.approx(23.5, rel=1e-3)


def test_pixels_per_length_that_a_resize_made_wrong_lose_to_the_equivalent(tmp_path: Path):
    lens = {F_NUMBER: 2.8, FOCAL_LENGTH: 35.0, RESOLUTION_UNIT: 4, RESOLUTION: 6000 / 23.5}
    size = {PIXEL_WIDTH: 6000, PIXEL_HEIGHT: 4500}
    kept = photo_with(tmp_path, lens | size | {FOCAL_LENGTH_35MM: 52})
    by_equivalent = optics.sensor_width_from_equivalent(35, 52, 4, 3)
    assert abs(by_equivalent / 23.5 - 1) < 0.05
    assert Camera.from_photo(kept).sensor_width_mm == pytest.approx(23.5, rel=1e-3)
    resized = photo_with(
        tmp_path, lens | {PIXEL_WIDTH: 600, PIXEL_HEIGHT: 450, FOCAL_LENGTH_35MM: 52}
    )
    assert Camera.from_photo(resized).sensor_width_mm == pytest.approx(by_equivalent)


def test_pixels_per_length_of_no_sensor_are_missing(tmp_path: Path):
    for resolution in (72, 1e6):  # of a print, in inches, as some programs write; and nonsense
        tags = {F_NUMBER: 2.8, FOCAL_LENGTH: 35.0, PIXEL_WIDTH: 6000, RESOLUTION: resolution}
        with pytest.raises(ValueError, match="lack the size of the sensor"):
            Camera.from_photo(photo_with(tmp_path, tags))


@pytest.mark.parametrize("broken", [IFDRational(0, 0), IFDRational(1, 0), IFDRational(0, 1)])
def test_broken_numbers_are_missing(tmp_path: Path, broken: IFDRational):
    file = photo_with(tmp_path, {F_NUMBER: broken, FOCAL_LENGTH: broken, FOCAL_LENGTH_35MM: 0})
    with pytest.raises(ValueError, match=r"photo.jpg lack the f-number \(f_number.* and the real"):
        Camera.from_photo(file)
    assert Camera.from_photo(file, f_number=2, focal_length_mm=50) == Camera(2, 50)


@pytest.mark.parametrize(
    ("tags", "given", "sentence"),
    [
        ({}, {}, r"lack the f-number \(f_number; --f-number.*focal length \(focal_length_mm; --fo"),
        ({FOCAL_LENGTH: 5.7}, {"f_number": 2}, r"lack the size of the sensor \(sensor_width_mm"),
        (PHONE, {"sensor_width_mm": 9, "focal_length_35mm": 26}, "both given"),
        (PHONE, {"f_number": 0}, "f_number is 0; wanted a positive number"),
        (PHONE, {"focal_length_35mm": -3}, "wanted a positive number"),
        (PHONE, {"sensor_width_mm": "wide"}, "sensor_width_mm is 'wide'; wanted a positive"),
    ],
)
def test_what_is_missing_or_wrong_is_named(
    tmp_path: Path, tags: dict[int, Any], given: dict[str, Any], sentence: str
):
    with pytest.raises(ValueError, match=sentence):
        Camera.from_photo(photo_with(tmp_path, tags), **given)


def test_pictures_without_exif(tmp_path: Path):
    gray = np.full((60, 80, 3), 128, np.uint8)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    np.save(tmp_path / "photo.npy", gray)
    for photo in (
        gray,
        torch.zeros(1, 3, 60, 80),
        Image.fromarray(gray),
        tmp_path / "broken.jpg",
        tmp_path / "photo.npy",
    ):
        assert Camera.from_photo(photo, f_number=2, focal_length_mm=50) == Camera(2, 50)
        with pytest.raises(ValueError, match="lack the f-number"):
            Camera.from_photo(photo, focal_length_mm=50)
    phone = {"f_number": 1.8, "focal_length_mm": 5.7, "focal_length_35mm": 26}
    for photo in (gray, torch.zeros(1, 3, 60, 80), np.stack([gray, gray])):
        assert Camera.from_photo(photo, **phone) == Camera.from_equivalent(1.8, 5.7, 26, (60, 80))
    with pytest.raises(ValueError, match=r"shape of photo.npy is not known.*sensor_width_mm"):
        Camera.from_photo(tmp_path / "photo.npy", **phone)
    with pytest.raises(FileNotFoundError, match="photograph"):
        Camera.from_photo(tmp_path / "missing.jpg", f_number=2, focal_length_mm=50)
    with pytest.raises(ValueError, match="is a list; wanted one photograph"):
        Camera.from_photo([gray, gray], f_number=2, focal_length_mm=50)


def test_subject_distance(tmp_path: Path):
    for stored, wanted in (
        (IFDRational(25, 10), 2.5),
        (IFDRational(0xFFFFFFFF, 1), math.inf),
        (IFDRational(0, 1), None),
        (IFDRational(0, 0), None),
    ):
        assert subject_distance_m(photo_with(tmp_path, {SUBJECT_DISTANCE: stored})) == wanted
    assert subject_distance_m(photo_with(tmp_path, PHONE)) is None


# --- What cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((0, 50), "f_number is 0"),
        ((math.nan, 50), "f_number is nan"),
        ((2, math.inf), "focal_length_mm is inf"),
        ((2, 50, -36), "sensor_width_mm is -36"),
        (("fast", 50), "f_number is 'fast'"),
    ],
)
def test_cameras_that_cannot_be(arguments: tuple[Any, ...], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        Camera(*arguments)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"df": 25.0, "metric": True}, "df is 25 1/metres, a distance of 40 mm, within the focal"),
        ({"df": 0.5, "focus_distance_m": 0.04}, "focus_distance_m is 0.04 m, within the focal"),
        ({"df": 0.5, "focus_distance_m": 0}, "focus_distance_m is 0; wanted a positive"),
        ({"df": 0.5, "focus_distance_m": 8, "farthest_distance_m": 8}, "wanted what is in focus"),
        ({"df": 0.5, "focus_distance_m": math.inf}, "nearer than what has disparity 0"),
        ({"df": 0.0, "focus_distance_m": 3}, "df is 0, which is the farthest thing.*3 m away"),
        ({"df": [0.5, 0.0], "focus_distance_m": 3}, "df is 0"),
        ({"df": 0.01, "focus_distance_m": 2}, r"nearest things.*20 mm away.*focus_distance_m"),
        ({"df": 0.5, "metric": True, "focus_distance_m": 2}, "says by itself"),
        ({"df": 0.5, "metric": True, "farthest_distance_m": 9}, "says by itself"),
        ({"df": 1.5, "focus_distance_m": 2}, r"df is 1.5; wanted .* within \[0, 1\]"),
        ({"df": None, "focus_distance_m": 2}, "df is None"),
        ({"df": 0.5, "focus_distance_m": "far"}, "focus_distance_m is 'far'"),
    ],
)
def test_distances_that_cannot_be(settings: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        Camera(2, 50).strength((200, 300), **settings)


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="height of the image is 0"):
        Camera(2, 50).strength((0, 300), 0.5, metric=True)

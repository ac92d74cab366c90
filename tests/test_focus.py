"""Which plane, or which range, is in focus: what people point at, in every form of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bokehdiff.focus import find_focus, focus_disparity_at

HEIGHT, WIDTH = 40, 60
FACE = (slice(10, 30), slice(20, 45))  # rows and columns


def portrait() -> torch.Tensor:
    """A face from 0.7 to 0.8, evenly sloping, before a wall at 0.2."""
    disparity = torch.full((1, 1, HEIGHT, WIDTH), 0.2)
    disparity[0, 0][FACE] = torch.linspace(0.7, 0.8, 25)
    return disparity


def face_mask() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[FACE] = True
    return mask


def cutout() -> np.ndarray:
    """A bright picture of which only the face is opaque."""
    return np.dstack([np.full((HEIGHT, WIDTH, 3), 240, np.uint8), face_mask() * np.uint8(255)])


def test_focus_disparity_is_the_median_of_a_window():
    disparity = torch.zeros(1, 1, 20, 30)
    disparity[..., 5:10, 10:20] = 0.75
    disparity[..., 7, 15] = 0.1  # an outlier under the finger
    assert focus_disparity_at(disparity, 15, 7) == 0.75
    assert focus_disparity_at(disparity, 29, 19) == 0
    disparity[..., 7, 14] = float("nan")
    assert focus_disparity_at(disparity[0, 0], 15.4, 7.9) == 0.75


def test_a_pixel_is_one_plane():
    low, high = find_focus(portrait(), (3, 5))
    assert low.shape == high.shape == (1,) and low.dtype == high.dtype == torch.float32
    assert low == high == pytest.approx(0.2)
    assert find_focus(portrait().double(), (np.int64(32), 20.5))[0].dtype == torch.float32


def test_a_box_is_focused_at_its_median():
    disparity = portrait()
    inside = disparity[..., 10:30, 20:45].median()
    assert find_focus(disparity, (20, 10, 45, 30))[0] == inside
    # The wall in a third of the box moves the plane within the face, not out of it.
    loose = find_focus(disparity, (17, 7, 48, 33))[0]
    assert 0.7 <= float(loose) < float(inside)
    # A part of a pixel is that pixel; beyond the border there is nothing.
    assert find_focus(disparity, (20.2, 10.7, 44.5, 29.1))[0] == inside
    corner = disparity[..., :12, :25].median()
    assert find_focus(disparity, (-9, -4, 25, 12))[0] == corner


@pytest.mark.parametrize(
    "mask",
    [
        face_mask(),
        face_mask().astype(np.uint8),
        face_mask() * np.uint8(255),
        face_mask() * np.uint16(65535),
        np.where(face_mask(), 0.9, 0.2),
        np.where(face_mask(), 0.3, np.nan),
        torch.from_numpy(face_mask()),
        torch.from_numpy(face_mask())[None, None].float(),
        face_mask()[..., None],
        Image.fromarray(face_mask()),
        Image.fromarray(face_mask() * np.uint8(255)),
        Image.fromarray(face_mask() * np.uint8(255)).convert("RGB"),
        Image.fromarray(cutout()),
    ],
    ids=lambda mask: f"{type(mask).__name__}-{getattr(mask, 'dtype', getattr(mask, 'mode', ''))}",
)
def test_masks_of_every_kind(mask: Any):
    disparity = portrait()
    wanted = disparity[0, 0][FACE].median()
    assert find_focus(disparity, mask)[0] == wanted
    assert find_focus(disparity, [mask])[0] == wanted


def test_masks_in_files(tmp_path: Path):
    wanted = portrait()[0, 0][FACE].median()
    Image.fromarray(face_mask() * np.uint8(255)).save(tmp_path / "mask.png")
    Image.fromarray(cutout()).save(tmp_path / "cutout.png")
    np.save(tmp_path / "mask.npy", face_mask())
    for name in ("mask.png", "cutout.png", "mask.npy"):
        assert find_focus(portrait(), tmp_path / name)[0] == wanted
        assert find_focus(portrait(), str(tmp_path / name))[0] == wanted
    with pytest.raises(FileNotFoundError, match="wanted the focus mask"):
        find_focus(portrait(), str(tmp_path / "missing.png"))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="broken.png is not a picture"):
        find_focus(portrait(), tmp_path / "broken.png")


# --- A whole subject ------------------------------------------------------------------------------


def test_a_whole_subject_is_its_range():
    low, high = find_focus(portrait(), face_mask(), whole=True)
    assert low.shape == high.shape == (1,)
    assert (float(low), float(high)) == (pytest.approx(0.7), pytest.approx(0.8))


def test_a_twentieth_of_wrong_pixels_on_each_side_does_not_widen_the_range():
    disparity = portrait()
    disparity[0, 0, 10, 20:44] = 0.2  # a row of the face, 4.8 %, that is the wall's
    disparity[0, 0, 29, 20:44] = 1.0
    low, high = find_focus(disparity, face_mask(), whole=True)
    # The percentiles may at worst be the ends of the face, from where they move by an 18th.
    most = 0.1 / 18 + 1e-6
    assert 0.7 - most <= float(low) < 0.71 and 0.79 < float(high) <= 0.8 + most


def test_the_whole_of_a_box_is_without_the_wall_beside_the_face():
    low, high = find_focus(portrait(), (17, 7, 48, 33), whole=True)
    assert (float(low), float(high)) == (pytest.approx(0.7), pytest.approx(0.8))


def test_a_mask_of_two_people_keeps_both():
    disparity = portrait()
    disparity[..., 12:28, 2:16] = 0.5
    mask = face_mask()
    mask[12:28, 2:16] = True
    low, high = find_focus(disparity, mask, whole=True)
    assert float(low) == pytest.approx(0.5) and float(high) > 0.79


def test_the_whole_of_something_flat_is_a_plane():
    low, high = find_focus(portrait(), (0, 0, 15, 15), whole=True)
    assert low == high == pytest.approx(0.2)


# --- Batches --------------------------------------------------------------------------------------


def test_one_focus_for_all_and_one_for_each():
    batch = torch.cat([portrait(), portrait().flip(-1), 0.5 * portrait()])
    low, high = find_focus(batch, (3, 5))
    assert low.tolist() == high.tolist() == pytest.approx([0.2, 0.2, 0.1])
    flipped = torch.from_numpy(face_mask()).flip(-1)
    low, high = find_focus(batch, [(20, 10, 45, 30), flipped, (17, 7, 48, 33)], whole=True)
    assert low.tolist() == pytest.approx([0.7, 0.7, 0.35])
    assert high.tolist() == pytest.approx([0.8, 0.8, 0.4])
    planes, _ = find_focus(batch, [(3, 5), flipped, "auto"])
    assert planes[:2].tolist() == pytest.approx([0.2, 0.75]) and 0.35 <= float(planes[2]) <= 0.4
    masks = torch.stack([torch.from_numpy(face_mask()), flipped, torch.ones_like(flipped)])
    for stacked in (masks, masks[:, None], masks.numpy()):
        assert find_focus(batch, stacked)[0].tolist() == pytest.approx([0.75, 0.75, 0.1])


def test_unknown_pixels_are_left_out():
    disparity = portrait()
    disparity[..., 10:30, 20:30] = float("nan")
    low, high = find_focus(disparity, (20, 10, 45, 30), whole=True)
    assert float(low) > 0.7 and float(high) == pytest.approx(0.8)


# --- Mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("focus", "sentence"),
    [
        ((200, 3), r"point \(200, 3\) lies outside the picture of 60 x 40"),
        ((70, 10, 90, 20), r"box .* lies outside the picture of 60 x 40 pixels"),
        ((-20, 10, 0, 20), "lies outside the picture"),
        ((45, 30, 20, 10), r"ends before it begins.*\(x, y, x \+ width, y \+ height\)"),
        ((20, 10, 20, 30), "ends before it begins"),
        ((0.2, 0.1, 0.8, 0.6), "smaller than a pixel.*multiply shares"),
        ((1, 2, 3), "tuple of 3 numbers; wanted a pixel"),
        ((1, "2"), r"wanted columns and rows of the photograph as numbers"),
        ((1, float("nan")), "as numbers"),
        ((True, 2), "as numbers"),
        ([30, 20], r"list \[30, 20\].*tuple \(x, y\)"),
        ([(1, 2), (3, 4)], "list of 2 for 1 photographs"),
        ("nearest", "focus is 'nearest'; wanted a pixel"),
        (None, "focus is a NoneType; wanted a pixel"),
        (0.5, "focus is 0.5; wanted a pixel"),
        (np.zeros((HEIGHT, WIDTH), bool), "empty: it marks no pixel"),
        (np.full((HEIGHT, WIDTH), np.nan), "empty: it marks no pixel"),
        (np.ones((WIDTH, HEIGHT)), r"shape \(60, 40\); wanted .*40 x 60.*sides are swapped"),
        (np.ones((20, 30)), r"shape \(20, 30\); wanted that of the photograph"),
        (np.ones((HEIGHT, WIDTH, 3)), r"shape \(40, 60, 3\)"),
        (np.full((HEIGHT, WIDTH), "x"), "holds <U1 values"),
        ("sharpest", "pass it as image"),
    ],
    ids=lambda value: str(value)[:24] if isinstance(value, (tuple, list, str)) else "",
)
def test_mistakes(focus: Any, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        find_focus(portrait(), focus)


def test_more_mistakes():
    disparity, photo = portrait(), torch.rand(1, 3, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="a pixel is one plane.*a box or a mask"):
        find_focus(disparity, (3, 4), whole=True)
    with pytest.raises(ValueError, match="where it is sharp is one plane"):
        find_focus(disparity, "sharpest", image=photo, whole=True)
    with pytest.raises(ValueError, match="as large as the disparity, 40 x 60"):
        find_focus(disparity, "sharpest", image=photo[..., :30])
    with pytest.raises(ValueError, match="2 photographs for 1 disparity maps"):
        find_focus(disparity, "sharpest", image=photo.expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match=r"shape \(40, 60\); wanted \(B, 1, H, W\)"):
        find_focus(disparity[0, 0], (3, 4))
    disparity[..., 10:30, 20:45] = float("nan")
    with pytest.raises(ValueError, match="within the box is unknown"):
        find_focus(disparity, (20, 10, 45, 30))
    with pytest.raises(ValueError, match="within the mask is unknown"):
        find_focus(disparity, face_mask())

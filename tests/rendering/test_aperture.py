"""The aperture: kernels that hold the area, lens samples, every shape, orientation, mistakes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bokehdiff.rendering import Aperture
from bokehdiff.rendering.aperture import FADE_RADIUS, field_position

DOUBLE = {"dtype": torch.float64}
# A picture without any symmetry: bright at the top left, dark at the bottom, a gap on the right.
PICTURE = torch.linspace(1, 0.2, 9)[:, None] * torch.linspace(1, 0.5, 12)
PICTURE[3:5, 8:] = 0

SHAPES = {
    "disc": Aperture(),
    "pentagon": Aperture(5),
    "turned hexagon": Aperture(6, rotation=20.0),
    "rounded heptagon": Aperture(7, roundness=0.5),
    "tall": Aperture(squeeze=0.5),
    "wide pentagon": Aperture(5, rotation=7.0, squeeze=2.5),
    "donut": Aperture(obstruction=0.5),
    "thin donut": Aperture(obstruction=0.9),
    "cat-eye": Aperture(cat_eye=0.8),
    "all rims": Aperture(5, roundness=0.2, squeeze=0.7, obstruction=0.3, cat_eye=0.9),
    "bubble": Aperture(spherical=0.9),
    "cream": Aperture(spherical=-1.0),
    "picture": Aperture(rotation=25.0, picture=PICTURE),
}
EVERY_SHAPE = pytest.mark.parametrize("aperture", SHAPES.values(), ids=SHAPES.keys())
OFF_CENTRE = (0.6, 0.45)


def moments(kernel: torch.Tensor) -> tuple[float, float]:
    """Second moments of a kernel of sum 1 about its middle: (along x, along y), square pixels."""
    reach = kernel.shape[0] // 2
    squares = torch.arange(-reach, reach + 1, **DOUBLE) ** 2
    return (kernel.sum(0) @ squares).item(), (kernel.sum(1) @ squares).item()


def overlap(aperture: Aperture, signed_radius: float, field: tuple[float, float]) -> torch.Tensor:
    """The kernel by brute force: the transmission at a hundred points across a small pixel."""
    per_pixel = max(24, round(150 / abs(signed_radius)))
    reach = math.ceil(abs(signed_radius) - 0.5)
    side = 2 * reach + 1
    offsets = (torch.arange(side * per_pixel, **DOUBLE) + 0.5) / per_pixel - 0.5 - reach
    v, u = torch.meshgrid(-offsets / signed_radius, -offsets / signed_radius, indexing="ij")
    light = aperture.transmission(u, v, math.copysign(1, signed_radius), field)
    weights = light.view(side, per_pixel, side, per_pixel).mean((1, 3))
    return weights / weights.sum()


@EVERY_SHAPE
@pytest.mark.parametrize("radius", [0.0, 0.3, 0.51, 1.0, 2.7, -2.7, 15.2])
def test_kernel_spreads_energy_one(aperture: Aperture, radius: float) -> None:
    kernel = aperture.kernel(radius, field=OFF_CENTRE, dtype=torch.float64)
    assert kernel.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert (kernel >= 0).all()
    assert kernel.shape[0] == kernel.shape[1] and kernel.shape[0] % 2 == 1


@EVERY_SHAPE
@pytest.mark.parametrize("signed_radius", [0.7, 1.0, -1.5, 2.2, -3.0, 8.1, -16.0])
def test_kernel_is_the_light_on_every_pixel(aperture: Aperture, signed_radius: float) -> None:
    kernel = aperture.kernel(signed_radius, field=OFF_CENTRE, **DOUBLE)
    wanted = overlap(aperture, signed_radius, OFF_CENTRE)
    assert kernel.shape == wanted.shape
    # The finest shapes at a radius of one pixel are the worst; a disc is right to 0.1 %.
    assert (kernel - wanted).abs().sum() < (0.0015 if aperture.is_disc else 0.015)
    assert moments(kernel) == pytest.approx(moments(wanted), rel=0.02, abs=5e-4)


@pytest.mark.parametrize("radius", [0.75, 0.9, 1.0, 1.4, 2.0, 2.6, 3.0, 11.0, 40.0])
def test_disc_kernel_has_the_area_of_the_disc(radius: float) -> None:
    kernel = Aperture().kernel(radius, **DOUBLE)
    # The pixel in the middle is covered entirely, so its weight is one over the area.
    assert 1 / kernel.max().item() == pytest.approx(math.pi * radius**2, rel=0.002)
    segment = radius**2 * math.acos(0.5 / radius) - 0.5 * math.sqrt(radius**2 - 0.25)
    columns = kernel.sum(0)
    reach = len(columns) // 2
    beyond_the_middle = columns[reach + 1 :].sum().item()
    assert beyond_the_middle == pytest.approx(segment / (math.pi * radius**2), rel=0.002)


@pytest.mark.parametrize("radius", [7.3, 20.0])
@pytest.mark.parametrize("squeeze", [1.0, 0.4])
def test_kernel_spreads_as_widely_as_the_ellipse(radius: float, squeeze: float) -> None:
    across, down = moments(Aperture(squeeze=squeeze).kernel(radius, **DOUBLE))
    # The squares of pixels add a twelfth, the variance of a square.
    assert across - 1 / 12 == pytest.approx((squeeze * radius) ** 2 / 4, rel=0.01)
    assert down - 1 / 12 == pytest.approx(radius**2 / 4, rel=0.01)


@pytest.mark.parametrize("radius", [0.05, 0.2, 0.4, 0.5, 0.6])
def test_small_discs_fade_into_the_single_pixel(radius: float) -> None:
    kernel = Aperture().kernel(radius, **DOUBLE)
    assert kernel.shape == (3, 3)
    assert moments(kernel) == pytest.approx((radius**2 / 4, radius**2 / 4), rel=0.005)


@EVERY_SHAPE
def test_kernel_is_continuous_down_to_the_single_pixel(aperture: Aperture) -> None:
    below, above = (aperture.kernel(FADE_RADIUS * scale, **DOUBLE) for scale in (0.9999, 1.0001))
    torch.testing.assert_close(below, above, atol=2e-3, rtol=0)
    assert aperture.kernel(1e-4)[1, 1] == pytest.approx(1.0, abs=1e-6)
    assert aperture.kernel(0.0).tolist() == aperture.kernel(-0.0).tolist() == [[1.0]]


@EVERY_SHAPE
def test_kernels_of_several_places_are_those_of_each(aperture: Aperture) -> None:
    places = torch.tensor([[0.0, 0.0], [0.8, -0.6], [-0.2, 0.1]], **DOUBLE)
    for radius in (0.4, -3.7):
        together = aperture.kernel(radius, field=places, **DOUBLE)
        for place, kernel in zip(places.tolist(), together, strict=True):
            alone = aperture.kernel(radius, field=place, **DOUBLE)
            torch.testing.assert_close(kernel, alone, atol=1e-15, rtol=1e-12)


@pytest.mark.parametrize(("side", "count"), [(1, 1), (11, 81), (15, 149), (21, 317)])
def test_lens_samples_of_the_disc(side: int, count: int) -> None:
    points = Aperture().lens_samples(side, dtype=torch.float64)
    assert points.shape == (count, 2)
    assert points.square().sum(1).max() <= 1 + 1e-9
    torch.testing.assert_close(points.mean(0), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("blades", [3, 5, 6, 9])
def test_blades_cut_the_area_of_a_polygon(blades: int) -> None:
    area = blades / 2 * math.sin(2 * math.pi / blades)
    kernel = Aperture(blades, rotation=13.0).kernel(20.0, **DOUBLE)
    assert 1 / kernel.max().item() == pytest.approx(area * 20**2, rel=0.002)
    polygon = Aperture(blades, rotation=13.0).lens_samples(401)
    disc = Aperture().lens_samples(401)
    assert len(polygon) / len(disc) == pytest.approx(area / math.pi, rel=0.02)


def test_roundness_goes_from_blades_to_disc() -> None:
    straight, bent, full = (
        len(Aperture(5, roundness=r).lens_samples(201)) for r in (0.0, 0.5, 1.0)
    )
    assert straight < bent < full == len(Aperture().lens_samples(201))


@pytest.mark.parametrize("name", ["pentagon", "picture", "wide pentagon"])
def test_near_side_shows_the_opening_turned_around(name: str) -> None:
    near, far = SHAPES[name].kernel(9.0), SHAPES[name].kernel(-9.0)
    torch.testing.assert_close(near, far.flip(0, 1))
    assert not torch.allclose(near, far, atol=1e-4)


@EVERY_SHAPE
def test_symmetric_means_that_near_and_far_blur_alike(aperture: Aperture) -> None:
    near, far = (aperture.kernel(sign * 9.0, field=OFF_CENTRE) for sign in (1, -1))
    assert torch.allclose(near, far, atol=1e-6) == aperture.is_symmetric


def test_a_corner_points_where_the_rotation_says() -> None:
    points = Aperture(3, rotation=90.0).lens_samples(201, dtype=torch.float64)
    lowest_on_screen = points[points[:, 1].argmax()]
    torch.testing.assert_close(lowest_on_screen, torch.tensor([0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize(("squeeze", "half_axes"), [(0.5, (0.5, 1.0)), (4.0, (1.0, 0.25))])
def test_squeeze_is_width_over_height(squeeze: float, half_axes: tuple[float, float]) -> None:
    points = Aperture(squeeze=squeeze).lens_samples(161, dtype=torch.float64)
    assert points.amax(0).tolist() == pytest.approx(half_axes)


def test_obstruction_is_a_share_of_the_radius() -> None:
    aperture = Aperture(obstruction=0.5)
    distance = aperture.lens_samples(81, dtype=torch.float64).square().sum(1).sqrt()
    assert distance.min() == pytest.approx(0.5) and distance.max() == pytest.approx(1.0)
    kernel = aperture.kernel(20.0, **DOUBLE)
    assert kernel[20, 20] == 0
    assert 1 / kernel.max().item() == pytest.approx(0.75 * math.pi * 20**2, rel=0.002)


@pytest.mark.parametrize("field", [(1.0, 0.0), (-0.3, 0.4), (0.0, 0.0)])
def test_cat_eye_is_where_two_discs_overlap(field: tuple[float, float]) -> None:
    aperture = Aperture(cat_eye=0.8)
    distance = 0.8 * math.hypot(*field)
    overlapping = 2 * math.acos(distance / 2) - distance / 2 * math.sqrt(4 - distance**2)
    kernel = aperture.kernel(-20.0, field=field, **DOUBLE)
    assert 1 / kernel.max().item() == pytest.approx(overlapping * 20**2, rel=0.002)
    # Its centre lies half way between those of the two discs, towards the picture's centre.
    offsets = torch.arange(-20, 21, **DOUBLE)
    centre = (kernel.sum(0) @ offsets / 20).item(), (kernel.sum(1) @ offsets / 20).item()
    assert centre == pytest.approx((-0.4 * field[0], -0.4 * field[1]), abs=1e-3)


def test_the_field_is_one_in_the_corners_of_the_picture() -> None:
    assert field_position(149.5, 99.5, 200, 300) == (0.0, 0.0)
    corner = field_position(299.5, 199.5, 200, 300)
    assert math.hypot(*corner) == pytest.approx(1.0)
    assert corner == pytest.approx((1.5 * corner[1], corner[1]))


@pytest.mark.parametrize("amount", [-1.0, 0.6])
def test_spherical_aberration_moves_light_to_the_rim_of_one_side(amount: float) -> None:
    aperture = Aperture(spherical=amount)
    places = torch.tensor([0.0, 0.5, 1.0], **DOUBLE)
    for side in (-1, 0, 1):
        passing = aperture.transmission(places, torch.zeros_like(places), side)
        edge = 1 - side * amount
        wanted = torch.tensor([2 - edge, (2 - edge) * 0.75 + edge * 0.25, edge], **DOUBLE)
        torch.testing.assert_close(passing, wanted)
    points = Aperture().lens_samples(801, dtype=torch.float64)
    assert aperture.lens_weights(points, 1).mean().item() == pytest.approx(1, abs=2e-3)
    behind, in_front = aperture.kernel(-30.0), aperture.kernel(30.0)
    bubble = behind if amount > 0 else in_front
    assert bubble[30, 2] > 1.5 * bubble[30, 30]


def test_picture_is_bilinear_between_the_centres_of_its_pixels() -> None:
    aperture = Aperture(picture=torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    points = torch.tensor([[-0.5, -0.5], [0.0, -0.5], [0.5, 0.5], [-0.25, 0.25], [0.9, 0.9]])
    passing = aperture.lens_weights(points.double(), -1)
    # The last point lies outside the unit circle.
    torch.testing.assert_close(
        passing, torch.tensor([0.0, 0.5, 1.0, 1 - 0.75 * 0.25, 0.0]).double()
    )


def test_picture_is_upright_behind_the_focus_and_turns_with_the_rotation() -> None:
    top_left = torch.zeros(8, 8)
    top_left[:4, :4] = 1
    for rotation, row, column in ((0.0, -4, -4), (90.0, -4, 4), (180.0, 4, 4)):
        kernel = Aperture(rotation=rotation, picture=top_left).kernel(-10.0)
        assert kernel[10 + row, 10 + column] == kernel.max() > 0
        assert kernel[10 - row, 10 - column] == 0


def test_a_fine_picture_is_averaged_not_missed() -> None:
    lattice = torch.zeros(1000, 1000)
    lattice[500::1000, 500::1000] = 1
    lattice[::10, ::10] = 1
    kernel = Aperture(picture=lattice).kernel(2.0, **DOUBLE)
    torch.testing.assert_close(kernel, Aperture().kernel(2.0, **DOUBLE), atol=5e-3, rtol=0)


def test_colours_have_their_own_focus() -> None:
    assert Aperture(fringe=0.02).channel_focus(0.5) == (0.48, 0.5, 0.48)
    red, green, _ = Aperture(fringe=-0.1).channel_focus(torch.tensor([0.5, 0.7]))
    torch.testing.assert_close(red - green, torch.tensor([0.1, 0.1]))


@pytest.mark.parametrize(
    ("aperture", "disc", "flat", "varies"),
    [
        (Aperture(), True, True, False),
        (Aperture(5, roundness=1.0, fringe=0.1), True, True, False),
        (Aperture(5), False, True, False),
        (Aperture(squeeze=2.0), False, True, False),
        (Aperture(obstruction=0.1), False, True, False),
        (Aperture(cat_eye=0.1), False, True, True),
        (Aperture(spherical=0.1), False, False, False),
        (Aperture(picture=PICTURE), False, False, False),
    ],
)
def test_what_an_aperture_says_of_itself(
    aperture: Aperture, disc: bool, flat: bool, varies: bool
) -> None:
    assert (aperture.is_disc, aperture.is_flat, aperture.varies_over_field) == (disc, flat, varies)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@EVERY_SHAPE
def test_lens_samples_are_the_points_that_let_light_pass(
    aperture: Aperture, dtype: torch.dtype
) -> None:
    points = aperture.lens_samples(21, dtype=dtype)
    assert points.dtype == dtype and (aperture.lens_weights(points, 0) > 0).all()
    axis = torch.linspace(-1, 1, 21, dtype=dtype)
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    assert len(points) == (aperture.transmission(u, v) > 0).sum()


@EVERY_SHAPE
def test_apertures_survive_json_and_are_keys(aperture: Aperture) -> None:
    settings = json.loads(json.dumps(aperture.to_dict()))
    again = Aperture.from_dict(settings)
    assert again == aperture and hash(again) == hash(aperture) and len({again, aperture}) == 1
    assert torch.equal(again.kernel(3.0), aperture.kernel(3.0))
    assert sum(aperture == other for other in SHAPES.values()) == 1


def test_settings_and_repr_name_only_what_differs() -> None:
    assert Aperture().to_dict() == {} and repr(Aperture()) == "Aperture()"
    assert (
        repr(Aperture(np.int64(5), rotation=np.float32(0.5))) == "Aperture(blades=5, rotation=0.5)"
    )
    aperture = Aperture(5, picture=torch.tensor([[1.0, 0.5]]))
    assert aperture.to_dict() == {"blades": 5, "picture": [[255, 128]]}
    assert repr(aperture) == "Aperture(blades=5, picture=<1 x 2 pixels>)"


def test_the_picture_is_the_apertures_own() -> None:
    given = torch.ones(4, 4)
    aperture = Aperture(picture=given)
    given[0] = 0
    assert aperture == Aperture(picture=np.full((4, 4), 255, np.uint8))
    assert aperture != Aperture(picture=given) and aperture != Aperture()


def test_from_picture_fits_a_picture_into_the_circle(tmp_path: Path) -> None:
    wide = Image.new("L", (40, 20), 255)
    wide.save(tmp_path / "wide.png")
    aperture = Aperture.from_picture(tmp_path / "wide.png", spherical=0.5)
    assert aperture.spherical == 0.5
    points = aperture.lens_samples(201, dtype=torch.float64)
    half_width, half_height = points.amax(0).tolist()
    assert half_width / half_height == pytest.approx(2, rel=0.1)
    assert points.square().sum(1).max() == pytest.approx(1, rel=0.05)
    same = (wide, np.ones((20, 40)), np.full((20, 40, 3), 255, np.uint8), torch.ones(20, 40))
    assert all(Aperture.from_picture(form, spherical=0.5) == aperture for form in same)


def test_from_picture_keeps_what_fits_and_takes_transparent_for_black() -> None:
    drawn = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    drawn.paste((255, 255, 255, 255), (20, 30, 44, 34))
    picture = Aperture.from_picture(drawn).picture
    assert picture is not None and picture.shape == (64, 64)
    lit = torch.zeros(64, 64)
    lit[30:34, 20:44] = 1
    assert torch.equal(picture, lit)


def test_from_picture_makes_large_pictures_small() -> None:
    aperture = Aperture.from_picture(Image.new("L", (900, 600), 255))
    assert aperture.picture is not None and aperture.picture.shape == (256, 256)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"blades": 2}, "at least 3"),
        ({"blades": 5.5}, "whole number"),
        ({"blades": True}, "blades is True"),
        ({"blades": -5}, "at least 3"),
        ({"blades": 5, "roundness": 1.5}, "roundness"),
        ({"blades": 5, "rotation": math.nan}, "finite angle"),
        ({"squeeze": 0.1}, "0.25 to 4"),
        ({"squeeze": "2"}, "squeeze is '2'"),
        ({"obstruction": 1.0}, "obstruction is 1.0"),
        ({"obstruction": -0.1}, "obstruction"),
        ({"blades": 3, "obstruction": 0.999}, "lets no light pass"),
        ({"cat_eye": 1.2}, "cat_eye"),
        ({"spherical": math.nan}, "spherical"),
        ({"fringe": math.inf}, "fringe"),
        ({"picture": torch.zeros(4, 4)}, "black everywhere"),
        ({"picture": torch.ones(3, 4, 4)}, r"shape \(3, 4, 4\)"),
        ({"picture": torch.ones(0, 4)}, r"shape \(0, 4\)"),
        ({"picture": torch.full((4, 4), 1.5)}, "from 1.5 to 1.5"),
        ({"picture": torch.full((4, 4), math.nan)}, "from nan to nan"),
        ({"picture": "heart.png"}, "from_picture reads files"),
        ({"picture": torch.eye(100)[:, :1] * torch.eye(100)[:1]}, "lets no light pass"),
        ({"picture": torch.eye(3)[:, :1].expand(3, 3), "cat_eye": 1.0}, "in a corner"),
    ],
)
def test_impossible_openings_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Aperture(**arguments)


def test_impossible_samples_and_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="whole number"):
        Aperture().lens_samples(0)
    with pytest.raises(ValueError, match="no point inside"):
        Aperture().lens_samples(2)
    with pytest.raises(ValueError, match="use more samples"):
        Aperture(obstruction=0.9).lens_samples(4)
    with pytest.raises(ValueError, match="finite"):
        Aperture().kernel(math.inf)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("disc", "wanted a dict"),
        ({"blade": 5}, "has no blade; its settings are blades"),
        ({"picture": [[0.5]]}, "integers, 0 to 255"),
        ({"picture": [[300]]}, "integers, 0 to 255"),
        ({"picture": [[1, 2], [3]]}, "rows of equal length"),
        ({"picture": []}, "rows of equal length"),
        ({"squeeze": 9}, "0.25 to 4"),
    ],
)
def test_impossible_settings_are_refused(settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Aperture.from_dict(settings)


def test_impossible_pictures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for picture, words in (
        (tmp_path / "missing.png", "cannot be read"),
        (tmp_path / "text.png", "cannot be read"),
        (np.ones((4, 4, 2)), "wanted a file"),
        (np.full((4, 4), 3.0), "from 3 to 3"),
        (np.zeros((4, 4)), "all black"),
    ):
        with pytest.raises(ValueError, match=words):
            Aperture.from_picture(picture)


def test_the_example_draws_every_aperture(tmp_path: Path) -> None:
    """One sheet, in which no two tiles are the same; a second run leaves the file alone."""
    example = Path(__file__).resolve().parents[2] / "examples" / "apertures.py"
    sheet = tmp_path / "apertures.png"
    command = [sys.executable, str(example), "-o", str(sheet), "--tile-width", "72"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"12 apertures: {sheet}\n"
    with Image.open(sheet) as opened:
        picture = np.asarray(opened)
    height, strip, gap = 45, 12, 2
    tiles = [
        picture[top : top + height, left : left + 72].tobytes()
        for top in range(gap, 4 * (height + strip + gap), height + strip + gap)
        for left in range(gap, 3 * (72 + gap), 72 + gap)
    ]
    assert len(set(tiles)) == len(tiles) == 12
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "exists already" in again.stderr

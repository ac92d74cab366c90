"""The lens opening: one object shared by every classical renderer.

Lens coordinates (u, v) run over the unit disc, u to the right and v down, as on the screen. The
opening lies inside the unit circle, and the circle-of-confusion radius is what its rim becomes on
the sensor: a source of signed defocus s (pixels, positive nearer than the focus) sends the light of
lens point (u, v) to the offset ``-s (u, v)``. So a source farther than the focus shows the opening
upright, a nearer one shows it turned by 180 degrees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

__all__ = ["Aperture", "field_position"]

Number = TypeVar("Number", float, torch.Tensor)

# What rounding may push a lens point beyond a rim and still count as on it.
RIM_SLACK = 1e-6
# A kernel's pixels on a rim are cut into squares of about this share of its radius, within bounds.
SQUARES_PER_RADIUS = 32
FEWEST_SQUARES, MOST_SQUARES = 3, 24
# The radius in pixels at which the overlap of a disc with the squares of pixels spreads light (its
# second moment) as the disc does: smaller discs spread more than their overlap, which is all in
# one pixel up to a radius of 0.5.
FADE_RADIUS = 0.6154
# The longer side of the pictures that `from_picture` makes: enough for a radius of 128 pixels.
LARGEST_PICTURE = 256
# An opening that lets less than this share of the disc's light pass counts as closed.
SMALLEST_LIGHT = 1e-4


@dataclass(frozen=True, eq=False, repr=False)
class Aperture:
    """A lens opening, by default a disc that lets light pass evenly.

    Args:
        blades: 0 for a disc, else at least 3: a regular polygon whose corners lie on the unit
            circle, so that the circle-of-confusion radius is the distance from centre to corner.
        rotation: degrees by which blades and picture are turned, clockwise on the screen. At 0 one
            corner of the polygon points to the right.
        roundness: bends the blades from straight (0) to the circle (1).
        squeeze: anamorphic lenses: width of the opening over its height, 0.25 to 4. The longer
            half-axis stays 1. Everything but the cat-eye is squeezed together.
        obstruction: mirror lenses: radius of the disc in the middle that stops light, over the
            radius of the opening, in [0, 1).
        cat_eye: optical vignetting, in [0, 1]: how far a second rim (a unit disc) is displaced
            towards the centre of the picture at the picture's corner, in lens radii; in
            proportion in between. What lies outside of either rim stops light.
        spherical: spherical aberration, in [-1, 1]: light passes in proportion to ``1 - side *
            spherical * (2 rho^2 - 1)``, with rho the distance from the centre (1 on the rim of the
            disc) and side +1 for sources nearer than the focus, -1 for farther ones. Positive
            values give bright-rimmed discs (soap bubbles) behind the focus and creamy ones in front
            of it, negative values the reverse. The mean over a disc is 1.
        fringe: longitudinal chromatic aberration in units of disparity: green is in focus at df,
            red and blue at ``df - fringe`` (the secondary spectrum of an achromat), which gives
            magenta rims in front of the focus and green ones behind it.
        picture: (H, W) transmission over [-1, 1]^2 in lens coordinates, row 0 at the top (v = -1),
            between pixel centres bilinear: tensor or array in [0, 1], or uint8. Kept as float32 in
            steps of 1/255. It is seen *through* the opening, so what lies outside the unit circle
            is cut off; :meth:`from_picture` makes any picture fit.

    Raises:
        ValueError: a value that is no such number, or an opening that no light passes.
    """

    blades: int = 0
    rotation: float = 0.0
    roundness: float = 0.0
    squeeze: float = 1.0
    obstruction: float = 0.0
    cat_eye: float = 0.0
    spherical: float = 0.0
    fringe: float = 0.0
    picture: torch.Tensor | None = None

    def __post_init__(self) -> None:
        _check_number("blades", self.blades, 0, math.inf, "0 for a disc, or at least 3")
        if int(self.blades) != self.blades:
            raise ValueError(f"blades must be a whole number, got {self.blades!r}.")
        if self.blades in (1, 2):
            raise ValueError(
                f"blades is {self.blades}; an opening needs at least 3 blades, or 0 for a disc."
            )
        _check_number("rotation", self.rotation, -math.inf, math.inf, "a finite angle in degrees")
        _check_number("roundness", self.roundness, 0, 1, "0 (straight blades) to 1 (circle)")
        _check_number("squeeze", self.squeeze, 0.25, 4, "width over height, 0.25 to 4")
        _check_number(
            "obstruction", self.obstruction, 0, 1, "0 (none) to less than 1, in lens radii"
        )
        _check_number("cat_eye", self.cat_eye, 0, 1, "0 (none) to 1 lens radius at the corner")
        _check_number("spherical", self.spherical, -1, 1, "-1 to 1, where 0 is an even disc")
        _check_number(
            "fringe", self.fringe, -math.inf, math.inf, "a finite difference of disparity"
        )
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "picture":
                plain: Any = None if value is None else _as_picture(value)
            else:
                plain = int(value) if field.name == "blades" else float(value)
            object.__setattr__(self, field.name, plain)
        self._check_open()

    def _check_open(self) -> None:
        corners = [(0.0, 0.0)]
        if self.picture is not None and self.varies_over_field:
            # Along a direction of the field the opening only shrinks: the last is the smallest.
            angles = [math.pi * step / 8 for step in range(16)]
            corners += [(math.cos(angle), math.sin(angle)) for angle in angles]
        elif self.obstruction == 0 and self.picture is None:
            return  # the centre is open
        light = self._weights(32.0, 0, torch.tensor(corners, dtype=torch.float64)).sum((1, 2))
        if float(light.min()) < SMALLEST_LIGHT * math.pi * 32.0**2:
            raise ValueError(
                f"{self!r} lets no light pass"
                + ("" if float(light[0]) == float(light.min()) else " in a corner of the picture")
                + ": make the obstruction or the cat-eye smaller, or take a picture whose light "
                "parts lie within the opening."
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Aperture) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        shown = [
            f"{name}=<{' x '.join(map(str, value.shape))} pixels>"
            if isinstance(value, torch.Tensor)
            else f"{name}={value!r}"
            for name, value in self._differing().items()
        ]
        return f"Aperture({', '.join(shown)})"

    def _differing(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        defaults = {field.name: field.default for field in fields(self)}
        return {
            name: value
            for name, value in values.items()
            if isinstance(value, torch.Tensor) or value != defaults[name]
        }

    def _identity(self) -> tuple[Any, ...]:
        values = [getattr(self, field.name) for field in fields(self) if field.name != "picture"]
        if self.picture is None:
            return (*values, None)
        return (*values, tuple(self.picture.shape), _to_8_bit(self.picture).numpy().tobytes())

    @classmethod
    def from_picture(
        cls, picture: str | Path | Image.Image | np.ndarray | torch.Tensor, **others: Any
    ) -> Aperture:
        """An aperture in the shape of a picture, whose white lets light pass and black stops it.

        picture: a file, a Pillow image, or an array or tensor (H, W), or (H, W, 3) with colours,
            uint8 or in [0, 1]. Colours become their luma, what is transparent stops light.
        others: further settings of the :class:`Aperture`.

        The picture keeps its proportions and its centre. It gets black borders until it is square
        and nothing lit lies outside the unit circle, and is made smaller when a side exceeds 256
        pixels. Raises ValueError for a file that cannot be read, and as :class:`Aperture` does.
        """
        grey = _grey_picture(picture)
        height, width = grey.shape
        rows, columns = np.nonzero(grey)
        if len(rows) == 0:
            raise ValueError("The picture of the opening is all black: no light would pass.")
        # From the centre to the farthest corner of a pixel.
        right = np.abs(columns + 0.5 - width / 2) + 0.5
        down = np.abs(rows + 0.5 - height / 2) + 0.5
        side = max(height, width, 2 * math.ceil(np.hypot(right, down).max()))
        square = Image.new("L", (side, side))
        square.paste(Image.fromarray(grey), ((side - width) // 2, (side - height) // 2))
        if side > LARGEST_PICTURE:
            square = square.resize((LARGEST_PICTURE,) * 2, Image.Resampling.BOX)
        return cls(picture=torch.from_numpy(np.array(square)), **others)

    def to_dict(self) -> dict[str, Any]:
        """What differs from the default, in types of JSON; the picture as rows of 0 to 255."""
        return {
            name: _to_8_bit(value).tolist() if isinstance(value, torch.Tensor) else value
            for name, value in self._differing().items()
        }

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Aperture:
        """The aperture that :meth:`to_dict` described. Raises ValueError as the class does."""
        if not isinstance(settings, Mapping):
            raise ValueError(f"settings is {settings!r}; wanted a dict of aperture settings.")
        known = [field.name for field in fields(cls)]
        unknown = sorted(str(name) for name in settings if name not in known)
        if unknown:
            raise ValueError(
                f"An aperture has no {', '.join(unknown)}; its settings are {', '.join(known)}."
            )
        settings = dict(settings)
        if settings.get("picture") is not None:
            try:
                levels = np.asarray(settings["picture"])
                whole = levels.dtype.kind in "iu" and levels.min() >= 0 and levels.max() <= 255
            except ValueError:  # rows of different lengths, or none
                whole = False
            if not whole:
                raise ValueError(
                    "The picture of these settings is no picture; wanted rows of equal length of "
                    "integers, 0 to 255, as to_dict writes them."
                )
            settings["picture"] = torch.from_numpy(levels.astype(np.uint8))
        return cls(**settings)

    @property
    def is_disc(self) -> bool:
        """Whether the opening is a full disc of even light, everywhere in the picture."""
        return (
            (self.blades == 0 or self.roundness == 1)
            and self.squeeze == 1
            and self.obstruction == 0
            and self.is_flat
            and not self.varies_over_field
        )

    @property
    def is_symmetric(self) -> bool:
        """Whether sources as far in front of the focus as others behind it show the same kernel."""
        if self.spherical != 0 or self.varies_over_field:
            return False
        if self.picture is not None and not torch.equal(self.picture, self.picture.flip(0, 1)):
            return False
        return self.blades % 2 == 0 or self.roundness == 1

    @property
    def varies_over_field(self) -> bool:
        """Whether the opening differs between places of the picture."""
        return self.cat_eye > 0

    @property
    def is_flat(self) -> bool:
        """Whether all that lets light pass lets the same amount pass (no profile, no picture)."""
        return self.spherical == 0 and self.picture is None

    def channel_focus(self, df: Number) -> tuple[Number, Number, Number]:
        """(red, green, blue) disparities in focus where the lens is focused at disparity ``df``."""
        return df - self.fringe, df, df - self.fringe

    def transmission(
        self,
        u: torch.Tensor,
        v: torch.Tensor,
        side: float | torch.Tensor = 0,
        field: Sequence[float | torch.Tensor] | torch.Tensor = (0.0, 0.0),
    ) -> torch.Tensor:
        """Light that passes at lens points (u, v), not negative; 0 outside the opening.

        side: +1 for a source nearer than the focus, -1 for a farther one, 0 for the mean of both;
            only ``spherical`` asks for it.
        field: (x, y) place in the picture from :func:`field_position`; only ``cat_eye`` asks for
            it, and keeps the points with ``|(u, v) + cat_eye * field| <= 1``.

        All arguments broadcast. Inside, a flat opening has 1. The rim belongs to the opening.
        """
        x, y = self._unsqueezed(u, v)
        inside = self._outline(x, y)[0] <= RIM_SLACK
        if self.obstruction > 0:
            inside = inside & (torch.hypot(x, y) >= self.obstruction - RIM_SLACK)
        if self.varies_over_field:
            inside = inside & (self._second_rim(u, v, field[0], field[1]) <= RIM_SLACK)
        return inside * self._brightness(x, y, side, self.picture)

    def lens_samples(
        self,
        samples_per_side: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """Points (S, 2) = (u, v) of a regular grid on [-1, 1]^2 that lie inside the opening.

        ``samples_per_side`` is the grid's side before masking; the rim belongs to the opening, so
        21 samples per side give 317 points of the disc. The cat-eye, which depends on the place in
        the picture, takes no points away, a picture those where it is black. Raises ValueError if
        no point is inside.
        """
        if int(samples_per_side) != samples_per_side or samples_per_side < 1:
            raise ValueError(
                f"samples_per_side is {samples_per_side!r}; wanted a whole number of at least 1."
            )
        # A single sample is a pinhole at the centre, where linspace would return the rim.
        axis = torch.linspace(-1, 1, int(samples_per_side), dtype=torch.float64)
        axis = axis if samples_per_side > 1 else torch.zeros(1, dtype=torch.float64)
        v, u = torch.meshgrid(axis, axis, indexing="ij")
        inside = self.transmission(u, v) > 0
        points = torch.stack([u[inside], v[inside]], dim=-1)
        if points.shape[0] == 0:
            raise ValueError(
                f"A grid of {samples_per_side} lens samples per side has no point inside the "
                "opening; use 1, 3 or more samples per side."
                if self.is_disc
                else f"A grid of {samples_per_side} lens samples per side has no point inside "
                f"{self!r}; use more samples per side."
            )
        return points.to(dtype=dtype, device=device)

    def lens_weights(self, points: torch.Tensor, side: float) -> torch.Tensor:
        """(S,) light that passes at ``points`` (S, 2) of :meth:`lens_samples`, without cat-eye.

        side: +1 for a source nearer than the focus, -1 for a farther one.
        """
        exact = points.to(torch.float64)
        return self.transmission(exact[:, 0], exact[:, 1], side).to(points.dtype)

    def kernel(
        self,
        signed_radius: float,
        *,
        field: Sequence[float] | torch.Tensor = (0.0, 0.0),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """Blur kernel (2R+1, 2R+1) of sum 1: what one point of light becomes on the sensor.

        signed_radius: signed defocus in pixels of the image blurred, positive nearer than the
            focus. The weight of the pixel at offset o is the light that the opening, scaled to
            this radius, brings to the pixel's square: the mean of the transmission of the lens
            points ``-o / signed_radius`` over the square. For a flat opening that is the area of
            the square it covers, to about 1 % of a pixel.
        field: (x, y) place of the source in the picture, from :func:`field_position`; or (M, 2)
            places, which give (M, 2R+1, 2R+1).

        R = ceil(|signed_radius| - 0.5), at least 1, so nothing is cut off. Below a radius of 0.615
        px the kernel of that radius fades into the single pixel with the square of the radius, so
        that light spreads as widely (second moment) as from the opening; a radius of 0 gives [[1]].
        """
        if not math.isfinite(signed_radius):
            raise ValueError(f"signed_radius must be finite, got {signed_radius!r}.")
        places = torch.as_tensor(field, dtype=torch.float64, device="cpu")
        radius, side = abs(float(signed_radius)), math.copysign(1, signed_radius)
        if radius == 0:
            kernels = places.new_ones(places.numel() // 2, 1, 1)
        else:
            weights = self._weights(max(radius, FADE_RADIUS), side, places.reshape(-1, 2))
            kernels = weights / weights.sum((1, 2), keepdim=True)
        if 0 < radius < FADE_RADIUS:
            kernels *= (radius / FADE_RADIUS) ** 2
            kernels[:, 1, 1] += 1 - (radius / FADE_RADIUS) ** 2
        return kernels.view(*places.shape[:-1], *kernels.shape[1:]).to(dtype=dtype, device=device)

    def _weights(self, radius: float, side: float, places: torch.Tensor) -> torch.Tensor:
        """(M, 2R+1, 2R+1) light on the squares of pixels, for M places in the field (M, 2)."""
        reach = math.ceil(radius - 0.5)
        offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
        # Lens coordinates of pixels: turned by 180 degrees for sources nearer than the focus.
        scale = -1 / radius if side > 0 else 1 / radius
        squares = min(max(math.ceil(SQUARES_PER_RADIUS / radius), FEWEST_SQUARES), MOST_SQUARES)
        picture = self.picture
        if picture is not None:
            # A fine picture is averaged, so that nothing of it falls between the samples.
            finest = math.ceil(2 * radius * squares)
            size = (min(picture.shape[0], finest), min(picture.shape[1], finest))
            picture = F.adaptive_avg_pool2d(picture[None, None].double(), size)[0, 0]

        # Pixels that no rim crosses are empty or full.
        u, v = offsets * scale, offsets[:, None] * scale
        half_diagonal = 0.75 / radius
        x, y = self._unsqueezed(u, v)
        shorter = min(self._half_axes())
        outside = self._outline(x, y)[0] * shorter
        if self.obstruction > 0:
            to_hole = (self.obstruction - torch.hypot(x, y)) * shorter
            outside = torch.maximum(outside, to_hole)
        full, touched = (outside < -half_diagonal)[None], (outside < half_diagonal)[None]
        if self.varies_over_field:
            moved_u, moved_v = self.cat_eye * places[:, :1] + u, self.cat_eye * places[:, 1:] + v.T
            squared = moved_u[:, None, :] ** 2 + moved_v[:, :, None] ** 2
            full = full & (squared < max(1 - half_diagonal, 0) ** 2)
            touched = touched & (squared < (1 + half_diagonal) ** 2)
        weights = full * self._brightness(x, y, side, None, 1 / radius)
        partly = touched & ~full if picture is None else touched
        weights = weights.expand(len(places), -1, -1).clone()
        place, row, column = partly.expand_as(weights).nonzero(as_tuple=True)

        # The others are cut into squares, each a straight cut through its rims.
        steps = (torch.arange(squares, dtype=torch.float64) + 0.5) / squares - 0.5
        u = ((offsets[column, None] + steps) * scale)[:, None, :]
        v = ((offsets[row, None] + steps) * scale)[:, :, None]
        pixels = radius * squares  # from lens units to sides of a square
        x, y = self._unsqueezed(u, v)
        value, slope_x, slope_y = self._outline(x, y)
        share = (0.5 - pixels * self._true_length(value, slope_x, slope_y)).clamp(0, 1)
        if self.varies_over_field:
            second = self._second_rim(u, v, places[place, :1, None], places[place, 1:, None])
            share = torch.minimum(share, (0.5 - pixels * second).clamp(0, 1))
        if self.obstruction > 0:
            from_centre = torch.hypot(x, y).clamp_min(1e-9)
            to_hole = self._true_length(
                from_centre - self.obstruction, x / from_centre, y / from_centre
            )
            share = (share - (0.5 - pixels * to_hole).clamp(0, 1)).clamp_min(0)
        if not self.is_flat:
            share = share * self._brightness(x, y, side, picture, 1 / pixels)
        weights[place, row, column] = share.mean((1, 2))
        return weights

    def _half_axes(self) -> tuple[float, float]:
        return min(self.squeeze, 1.0), min(1 / self.squeeze, 1.0)

    def _unsqueezed(self, u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The place in the opening before it was squeezed, where its rim is the unit circle."""
        half_width, half_height = self._half_axes()
        return u / half_width, v / half_height

    def _true_length(
        self, value: torch.Tensor, slope_x: torch.Tensor, slope_y: torch.Tensor
    ) -> torch.Tensor:
        """Distance in lens units to where ``value`` is 0, to first order.

        ``value`` has the given slopes in the unsqueezed place.
        """
        half_width, half_height = self._half_axes()
        return value / torch.hypot(slope_x / half_width, slope_y / half_height).clamp_min(1e-9)

    def _outline(
        self, x: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(value, slope along x, slope along y): value is negative inside the unsqueezed opening.

        The value is the distance to the rim for the disc and inside of straight blades; rounded
        blades take the mean of both, weighted by ``roundness``. It never exceeds the distance.
        """
        from_centre = torch.hypot(x, y)
        scale = 1 / from_centre.clamp_min(1e-9)
        to_circle = from_centre - 1
        if self.blades == 0 or self.roundness == 1:
            return to_circle, x * scale, y * scale
        sector = 2 * math.pi / self.blades
        first_corner = math.fmod(math.radians(self.rotation), sector)
        nearest = torch.floor((torch.atan2(y, x) - first_corner) / sector) + 0.5
        normal = nearest * sector + first_corner
        normal_x, normal_y = torch.cos(normal), torch.sin(normal)
        to_blades = x * normal_x + y * normal_y - math.cos(sector / 2)
        return (
            torch.lerp(to_blades, to_circle, self.roundness),
            torch.lerp(normal_x, x * scale, self.roundness),
            torch.lerp(normal_y, y * scale, self.roundness),
        )

    def _second_rim(
        self,
        u: torch.Tensor,
        v: torch.Tensor,
        field_x: float | torch.Tensor,
        field_y: float | torch.Tensor,
    ) -> torch.Tensor:
        """Distance to the rim of the cat-eye at a place in the field, negative inside."""
        return torch.hypot(u + self.cat_eye * field_x, v + self.cat_eye * field_y) - 1

    def _brightness(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        side: float | torch.Tensor,
        picture: torch.Tensor | None,
        square: float = 0.0,
    ) -> torch.Tensor:
        """Profile of the spherical aberration times the picture, at unsqueezed places.

        The profile is the mean over squares of this side in lens units.
        """
        half_width, half_height = self._half_axes()
        rho_squared = x * x + y * y + square**2 / 12 * (half_width**-2 + half_height**-2)
        brightness = (1 - side * self.spherical * (2 * rho_squared - 1)).clamp_min(0)
        if picture is None:
            return brightness
        angle = math.radians(self.rotation)
        x, y = torch.broadcast_tensors(x, y)
        upright = torch.stack(
            [
                x * math.cos(angle) + y * math.sin(angle),
                y * math.cos(angle) - x * math.sin(angle),
            ],
            dim=-1,
        )
        seen = F.grid_sample(
            picture[None, None].to(upright),
            upright.reshape(1, 1, -1, 2),
            padding_mode="border",
            align_corners=False,
        )
        return brightness * seen.view(x.shape)


def field_position(x: Number, y: Number, height: int, width: int) -> tuple[Number, Number]:
    """(x, y) place of a pixel in the field of a picture (height, width): what ``cat_eye`` asks for.

    ``((x, y) - centre) / half the diagonal``, with the centre at ((width - 1) / 2, (height - 1) /
    2): (0, 0) in the middle, of length 1 in the picture's corners.
    """
    half_diagonal = math.hypot(width, height) / 2
    return (x - (width - 1) / 2) / half_diagonal, (y - (height - 1) / 2) / half_diagonal


def _check_number(name: str, value: Any, low: float, high: float, wanted: str) -> None:
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(
        value, bool
    )
    excluded = name == "obstruction" and value == 1
    if not number or not math.isfinite(value) or not low <= value <= high or excluded:
        raise ValueError(f"{name} is {value!r}; wanted {wanted}.")


def _to_8_bit(picture: torch.Tensor) -> torch.Tensor:
    return (picture * 255).round().to(torch.uint8)


def _as_picture(picture: Any) -> torch.Tensor:
    """(H, W) float32 in steps of 1/255, on the CPU, a copy."""
    wanted = "wanted the transmission of the opening: a (H, W) tensor in [0, 1], or uint8"
    try:
        values = torch.as_tensor(picture).detach().cpu()
        if values.is_complex():
            raise TypeError
    except (TypeError, ValueError, RuntimeError):
        kind = type(picture).__name__
        raise ValueError(
            f"picture is of type {kind}; {wanted}. Aperture.from_picture reads files and images."
        ) from None
    if values.dim() != 2 or 0 in values.shape:
        raise ValueError(
            f"picture has shape {tuple(values.shape)}; {wanted}. Aperture.from_picture takes "
            "colours."
        )
    values = values / 255 if values.dtype == torch.uint8 else values.to(torch.float32)
    low, high = float(values.min()), float(values.max())
    # The reversed comparison also catches NaN.
    if not (low >= 0 and high <= 1):
        raise ValueError(f"picture has values from {low:g} to {high:g}; {wanted}.")
    levels = _to_8_bit(values)
    if not bool(levels.any()):
        raise ValueError("picture is black everywhere, so that no light passes the opening.")
    return levels / 255


def _grey_picture(picture: Any) -> np.ndarray:
    """(H, W) uint8 luma of a file, an image or an array; transparent is black."""
    if isinstance(picture, (str, Path)):
        try:
            with Image.open(picture) as opened:
                image = opened.convert("RGBA")
        except OSError as problem:
            raise ValueError(
                f"The picture of the opening {str(picture)!r} cannot be read: {problem}"
            ) from problem
    elif isinstance(picture, Image.Image):
        image = picture.convert("RGBA")
    else:
        values = picture.detach().cpu().numpy() if isinstance(picture, torch.Tensor) else picture
        values = np.asarray(values)
        colours = values.ndim == 3 and values.shape[2] == 3
        if (
            values.dtype.kind not in "buif"
            or 0 in values.shape
            or not (values.ndim == 2 or colours)
        ):
            raise ValueError(
                f"The picture of the opening has shape {values.shape} and type {values.dtype}; "
                "wanted a file, a Pillow image, or an array (H, W) or (H, W, 3)."
            )
        if values.dtype != np.uint8:
            if not (values.min() >= 0 and values.max() <= 1):
                raise ValueError(
                    f"The picture of the opening has values from {values.min():g} to "
                    f"{values.max():g}; wanted [0, 1], or uint8."
                )
            values = np.round(values.astype(np.float64) * 255).astype(np.uint8)
        image = Image.fromarray(values).convert("RGBA")
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return np.array(Image.alpha_composite(black, image).convert("L"))

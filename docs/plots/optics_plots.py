"""Draw the pictures of docs/optics.md, with the optics and the renderers of the library.

python docs/plots/optics_plots.py                 # anew into docs/pictures
python docs/plots/optics_plots.py -o FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bokehdiff import render_bokeh
from bokehdiff.images import linear_to_srgb
from bokehdiff.optics import circle_of_confusion, signed_defocus, strength_from_camera
from bokehdiff.rendering import layered_blur

PICTURES = Path(__file__).resolve().parents[1] / "pictures"

# Distances in the drawing of the lens, in units of the focal length; no real lens is so short.
FOCUS, NEARER, FARTHER = 3.0, 2.0, 7.0
LENS_RADIUS = 0.5


def image_distance(distance: float) -> float:
    """Where a thin lens of focal length 1 makes the image of a point: 1/v = 1 - 1/z."""
    return distance / (distance - 1)


def disc_on_sensor(distance: float) -> float:
    """Radius of the disc that the cone of a point leaves on the sensor, by similar triangles."""
    sensor, image = image_distance(FOCUS), image_distance(distance)
    return LENS_RADIUS * abs(sensor / image - 1)


def thin_lens() -> Figure:
    """Three points, one in focus, and what becomes of them on the sensor."""
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    axes = figure.subplots()
    sensor = image_distance(FOCUS)
    points = (
        (NEARER, 0.55, "tab:red", "nearer"),
        (FOCUS, 0.0, "tab:green", "in focus"),
        (FARTHER, -1.3, "tab:blue", "farther"),
    )
    for distance, height, colour, name in points:
        image = image_distance(distance)
        image_height = -height * image / distance
        ends = []
        for edge in (LENS_RADIUS, -LENS_RADIUS):
            behind = edge + (image_height - edge) * sensor / image
            ends.append(behind)
            axes.plot([-distance, 0, sensor], [height, edge, behind], color=colour, linewidth=1)
            if image > sensor:
                axes.plot([sensor, image], [behind, image_height], ":", color=colour, linewidth=1)
        axes.plot([sensor, sensor], ends, color=colour, linewidth=5, solid_capstyle="butt")
        axes.plot(-distance, height, "o", color=colour)
        axes.annotate(name, (-distance, height), (0, 7), textcoords="offset points", ha="center")
    axes.plot([0, 0], [-LENS_RADIUS, LENS_RADIUS], color="black", linewidth=4)
    axes.plot([sensor, sensor], [-1, 1], color="black", linewidth=1)
    axes.axvline(-FOCUS, color="tab:green", linestyle="--", linewidth=0.8)
    axes.text(0, 0.6, "lens", ha="center")
    axes.text(sensor, 1.07, "sensor", ha="center")
    axes.text(-FOCUS, 1.07, "plane in focus", ha="center")
    axes.set_ylim(-1.55, 1.3)
    axes.set_axis_off()
    return figure


def radius_by_distance() -> Figure:
    """The circle of confusion of a real lens, over distance and over disparity."""
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    by_distance, by_disparity = figure.subplots(1, 2, sharey=True)
    focal_length_mm, focus_distance_m, sensor_width_mm, width_px = 85, 2.0, 36, 1500
    distances = np.geomspace(0.8, 40, 400)
    for f_number in (1.4, 2.8, 5.6, 11):
        K = strength_from_camera(
            f_number, focal_length_mm, focus_distance_m, sensor_width_mm, width_px
        )
        radii = circle_of_confusion(1 / distances, 1 / focus_distance_m, K)
        label = f"f/{f_number:g}: K = {K:.0f}"
        by_distance.plot(distances, radii, label=label)
        by_disparity.plot(1 / distances, radii, label=label)
    by_distance.set(xlabel="distance, m", ylabel="radius of the circle of confusion, px")
    by_distance.set_xscale("log", base=2)
    ticks = [1, 2, 4, 8, 16, 32]
    by_distance.set_xticks(ticks, [str(tick) for tick in ticks])
    by_disparity.set(xlabel="disparity, 1/m (larger is nearer)")
    by_disparity.legend(frameon=False)
    for axes in (by_distance, by_disparity):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    by_distance.set_ylim(0, 90)
    figure.suptitle("85 mm, full frame, focused at 2 m, photo 1500 px wide", fontsize="medium")
    return figure


def post_before_tiles(side: int = 180) -> tuple[torch.Tensor, torch.Tensor]:
    """A striped post before a wall of tiles: photo (1, 3, H, W), disparity (1, 1, H, W)."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    tile = (rows // 15 + columns // 15) % 2
    wall = torch.stack([0.25 + 0.3 * tile, 0.35 + 0.35 * tile, 0.55 + 0.3 * tile])
    stripe = ((rows + columns) // 9) % 2
    post = torch.stack([0.95 - 0.1 * stripe, 0.25 + 0.6 * stripe, 0.15 + 0.15 * stripe])
    near = (columns - side / 2).abs() < 27
    return torch.where(near, post, wall)[None], torch.where(near, 0.9, 0.2)[None, None]


def blurred_each_by_itself(
    photo: torch.Tensor, disparity: torch.Tensor, df: float, K: float
) -> torch.Tensor:
    """Every pixel the mean of the photo over its own circle, whatever lies there."""
    result = photo
    for depth in disparity.unique():
        everywhere = torch.full_like(disparity, float(depth))
        result = torch.where(disparity == depth, render_bokeh(photo, everywhere, df, K), result)
    return result


def occlusion() -> Figure:
    """Focus behind and on a near thing, and what comes of ignoring what hides what."""
    photo, disparity = post_before_tiles()
    K = 16.0
    return in_a_row(
        {
            "all in focus": photo,
            "focus on the wall": render_bokeh(photo, disparity, 0.2, K),
            "focus on the post": render_bokeh(photo, disparity, 0.9, K),
            "on the post, each pixel\nblurred by itself": blurred_each_by_itself(
                photo, disparity, 0.9, K
            ),
        }
    )


def lamps(side: int = 180) -> torch.Tensor:
    """Linear light (1, 3, H, W) of lamps many times brighter than white, in the dark."""
    random = np.random.default_rng(3)
    light = torch.full((3, side, side), 0.01)
    light += 0.03 * torch.linspace(0, 1, side)[None, :, None]
    colours = torch.tensor([[1.0, 0.55, 0.2], [1.0, 0.8, 0.6], [0.4, 0.7, 1.0], [1.0, 0.3, 0.25]])
    for number in range(14):
        x, y = random.integers(14, side - 14, 2)
        strength = float(random.uniform(25, 90))
        light[:, y - 1 : y + 2, x - 1 : x + 2] = strength * colours[number % 4][:, None, None]
    return light[None]


def highlights() -> Figure:
    """Lamps out of focus, with their light and without it."""
    light = lamps()
    photo = linear_to_srgb(light.clamp(0, 1))
    disparity = torch.full_like(light[:, :1], 0.1)
    df, K = 0.6, 22.0
    shown = linear_to_srgb(render_bokeh(light, disparity, df, K, highlights="hdr").clamp(0, 1))
    encoded = layered_blur(photo, signed_defocus(disparity, df, K)).clamp(0, 1)
    return in_a_row(
        {
            "the light of the lamps": shown,
            "photo, values averaged\nas they are stored": encoded,
            "photo, in linear light": render_bokeh(photo, disparity, df, K),
            'in linear light,\nhighlights="boost"': render_bokeh(
                photo, disparity, df, K, highlights="boost"
            ),
        }
    )


def in_a_row(pictures: dict[str, torch.Tensor]) -> Figure:
    """Pictures (1, 3, H, W) side by side under their titles."""
    figure = Figure(figsize=(8.4, 2.6), layout="constrained")
    row: list[Axes] = list(figure.subplots(1, len(pictures)))
    for axes, (title, picture) in zip(row, pictures.items(), strict=True):
        axes.imshow(picture[0].permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(title, fontsize="small")
        axes.set_axis_off()
    return figure


PLOTS = {
    "thin_lens.svg": thin_lens,
    "radius_by_distance.svg": radius_by_distance,
    "occlusion.png": occlusion,
    "highlights.png": highlights,
}


def draw(folder: Path) -> None:
    """Writes every plot into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    # The same bytes every time.
    with matplotlib.rc_context({"svg.hashsalt": "bokehdiff", "font.size": 9}):
        for name, plot in PLOTS.items():
            metadata = {"Date": None} if name.endswith(".svg") else {}
            plot().savefig(folder / name, dpi=140, facecolor="white", metadata=metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "-o", "--output", type=Path, default=PICTURES, help="folder; default docs/pictures"
    )
    draw(parser.parse_args().output)


if __name__ == "__main__":
    main()

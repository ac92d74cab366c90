"""Draw one scene of point lights through a dozen lens openings, in one labelled picture.

Strings of lamps run from in front of the focus (left) through it (middle, where they are sharp
points) to far behind it (right), so that every tile shows both sides of the focus. The icon beside
each name is the opening itself. Run ``python examples/apertures.py --help`` for the options.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from bokehdiff.images import linear_to_srgb
from bokehdiff.optics import signed_defocus
from bokehdiff.rendering import Aperture, depth_ordered_scatter

FOCUS_DISPARITY = 0.5
# Disparity of the first and the last lamp of a string, and of the night behind them all.
NEAREST, FARTHEST, BACKGROUND = 0.95, 0.1, 0.05
# Radius of the largest disc as a share of the width of a tile.
LARGEST_RADIUS = 1 / 15
COLUMNS = 3
INK, PAPER = (226, 226, 232), (17, 18, 24)


def heart() -> Image.Image:
    """White heart on black, 200 x 200 pixels."""
    angle = np.linspace(0, 2 * math.pi, 400)
    x = 16 * np.sin(angle) ** 3
    y = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
    image = Image.new("L", (200, 200))
    outline = [(100 + 5.6 * right, 88 - 5.6 * up) for right, up in zip(x, y, strict=True)]
    ImageDraw.Draw(image).polygon(outline, fill=255)
    return image


APERTURES = {
    "disc": Aperture(),
    "5 blades, turned by 18°": Aperture(blades=5, rotation=18.0),
    "7 blades": Aperture(blades=7, rotation=12.0),
    "7 rounded blades": Aperture(blades=7, rotation=12.0, roundness=0.6),
    "cat-eye": Aperture(cat_eye=0.9),
    "anamorphic": Aperture(squeeze=0.55),
    "mirror lens (donut)": Aperture(obstruction=0.5),
    "soap bubbles behind": Aperture(spherical=0.7),
    "creamy behind": Aperture(spherical=-0.7),
    "colour fringes": Aperture(fringe=0.035),
    "heart (a picture)": Aperture.from_picture(heart()),
    "an old lens": Aperture(8, 10.0, roundness=0.5, cat_eye=0.6, spherical=0.6, fringe=0.02),
}


def scene(width: int, height: int, largest_radius: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear light (1, 3, H, W) and disparity (1, 1, H, W) of lamps at night."""
    random = np.random.default_rng(7)
    dusk = torch.linspace(0.0, 1.0, height)[:, None, None]
    sky = torch.lerp(torch.tensor([0.003, 0.004, 0.012]), torch.tensor([0.022, 0.012, 0.016]), dusk)
    light = sky.permute(2, 0, 1).expand(3, height, width).clone()
    disparity = torch.full((height, width), BACKGROUND)
    colours = torch.tensor(
        [[1.0, 0.5, 0.12], [1.0, 0.24, 0.12], [1.0, 0.74, 0.4], [0.2, 0.5, 1.0], [0.3, 1.0, 0.45]]
    )
    strings, lamps = 4, 9
    for string in range(strings):
        for lamp in range(lamps):
            # Strings hang through a little, and nothing hangs quite regularly.
            along = lamp / (lamps - 1)
            right = 0.08 + 0.84 * along + random.uniform(-0.025, 0.025)
            down = (string + 0.38) / strings + 0.24 * along * (1 - along)
            down += random.uniform(-0.035, 0.035)
            nearness = NEAREST + (FARTHEST - NEAREST) * along + random.uniform(-0.04, 0.04)
            radius = largest_radius * abs(nearness - FOCUS_DISPARITY) / (NEAREST - FOCUS_DISPARITY)
            # As much light as makes every disc about as bright, whatever its size.
            energy = random.uniform(0.3, 0.5) * math.pi * (radius + 2) ** 2
            colour = colours[int(random.integers(len(colours)))]
            x, y = int(right * (width - 1)), int(down * (height - 1))
            # A lamp is a small cross, so that it is seen where it is sharp.
            for beside_x, beside_y in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)):
                light[:, y + beside_y, x + beside_x] = energy / 5 * colour
                disparity[y + beside_y, x + beside_x] = nearness
    return light[None], disparity[None, None]


def photograph(
    light: torch.Tensor, disparity: torch.Tensor, K: float, aperture: Aperture
) -> torch.Tensor:
    """The scene through an aperture, linear light (1, 3, H, W): each colour at its own focus."""
    colours = [
        depth_ordered_scatter(
            light[:, channel : channel + 1], signed_defocus(disparity, focus, K), aperture=aperture
        )
        for channel, focus in enumerate(aperture.channel_focus(FOCUS_DISPARITY))
    ]
    return torch.cat(colours, dim=1)


def tile(light: torch.Tensor) -> Image.Image:
    """Linear light (1, 3, H, W) as a picture in sRGB."""
    levels = linear_to_srgb(light[0].clamp(0, 1)).mul(255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def icon(aperture: Aperture, side: int) -> Image.Image:
    """What an aperture makes of a point behind the focus in the corner at the right."""
    kernel = aperture.kernel(-side / 2 + 0.5, field=(0.6, 0.4))
    levels = linear_to_srgb(kernel / kernel.max()).mul(255).round().to(torch.uint8)
    return Image.fromarray(levels.numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("apertures.png"), help="picture (%(default)s)"
    )
    parser.add_argument(
        "--tile-width", type=int, default=480, help="pixels across one tile (%(default)s)"
    )
    arguments = parser.parse_args()
    width = arguments.tile_width
    if width < 60:
        parser.error(f"--tile-width is {width}; wanted at least 60 pixels.")
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists already; name another file, or remove it.")

    height, gap = round(width * 0.62), max(width // 40, 2)
    largest_radius = width * LARGEST_RADIUS
    K = largest_radius / (NEAREST - FOCUS_DISPARITY)
    light, disparity = scene(width, height, largest_radius)

    strip = max(width // 11, 12)
    rows = -(-len(APERTURES) // COLUMNS)
    step_x, step_y = width + gap, height + strip + gap
    sheet = Image.new("RGB", (gap + COLUMNS * step_x, gap + rows * step_y + strip), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(strip * 0.55)
    for number, (name, aperture) in enumerate(APERTURES.items()):
        left, top = gap + number % COLUMNS * step_x, gap + number // COLUMNS * step_y
        sheet.paste(tile(photograph(light, disparity, K, aperture)), (left, top))
        opening = icon(aperture, round(strip * 0.8))
        middle = top + height + strip // 2
        sheet.paste(opening, (left + strip // 4, middle - opening.height // 2))
        draw.text((left + strip * 1.4, middle), name, INK, font, anchor="lm")
    middle = sheet.height - gap - strip // 2
    words = (
        "lamps in front of the focus on the left, in focus in the middle, behind it on the right"
    )
    draw.text((sheet.width / 2, middle), words, INK, font, anchor="mm")
    sheet.save(arguments.output)
    print(f"{len(APERTURES)} apertures: {arguments.output.resolve()}")


if __name__ == "__main__":
    main()

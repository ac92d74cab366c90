"""Draw the picture at the head of the README: one photograph, as it is and focused twice.

The photograph is the Middlebury motorcycle with its measured disparity, which scikit-image carries.

python docs/plots/refocused_photo.py                 # anew: docs/images/refocused.jpg
python docs/plots/refocused_photo.py -o FILE
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from PIL import Image
from skimage.data import stereo_motorcycle

from bokehdiff import TINY, BokehDiffPipeline, normalise_disparity

FILE = Path(__file__).resolve().parents[1] / "images" / "refocused.jpg"

# What is in focus, by its place in the photograph: the headlight, and the shelves behind.
PLACES = ((537, 157), (60, 60))
K = 30.0
WIDTH, GAP = 494, 8


def draw() -> Image.Image:
    """The three pictures side by side."""
    photo, _, measured = stereo_motorcycle()
    pipe = BokehDiffPipeline.from_pretrained(TINY)
    pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*unknown.*filled")
        scene = pipe.prepare(photo, normalise_disparity(measured)[0])
    focused = [pipe.render(scene, focus=place, K=K).images[0] for place in PLACES]
    pictures = [Image.fromarray(photo), *focused]
    height = round(WIDTH * photo.shape[0] / photo.shape[1])
    whole = Image.new("RGB", (3 * WIDTH + 2 * GAP, height), "white")
    for number, picture in enumerate(pictures):
        small = picture.resize((WIDTH, height), Image.Resampling.LANCZOS)
        whole.paste(small, (number * (WIDTH + GAP), 0))
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=FILE, help="file (%(default)s)")
    draw().save(parser.parse_args().output, quality=88)


if __name__ == "__main__":
    main()

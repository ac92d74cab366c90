"""Blur a photograph by the model inside the package.

    python examples/render.py
    python examples/render.py --photo photo.jpg --focus 512 300 --K 25 --out blurred

Without --photo it takes the Middlebury motorcycle with its measured disparity, which scikit-image
carries. Without --disparity that of your photo is estimated.
"""

import argparse
from pathlib import Path

from skimage.data import stereo_motorcycle

import bokehdiff


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photo", type=Path, help="a photograph, all in focus")
    parser.add_argument("--disparity", type=Path, help="its map, larger is nearer, in [0, 1]")
    parser.add_argument("--focus", type=int, nargs=2, metavar=("X", "Y"), default=(537, 157))
    parser.add_argument("--K", type=float, default=30, help="pixels of blur radius per disparity")
    parser.add_argument("--out", type=Path, default=Path("outputs/render"), help="folder")
    asked = parser.parse_args()

    if asked.photo is not None:
        photo, disparity = asked.photo, asked.disparity
    else:
        photo, _, measured = stereo_motorcycle()
        disparity = bokehdiff.normalise_disparity(measured)[0]

    pipe = bokehdiff.BokehDiffPipeline.from_pretrained(bokehdiff.TINY)
    result = pipe(photo, disparity, focus=tuple(asked.focus), K=asked.K, return_coc=True)

    asked.out.mkdir(parents=True, exist_ok=True)
    result.images[0].save(asked.out / "blurred.png")
    result.coc[0].save(asked.out / "circles_of_confusion.png")  # green is in focus
    print(f"Pictures: {asked.out.resolve()}")


if __name__ == "__main__":
    main()

"""Blur a photograph by the model inside the package.

    python examples/render.py
    python examples/render.py --photo photo.jpg --focus 512 300 --K 25 --out blurred

Without --photo it takes the Middlebury motorcycle with its measured disparity, which scikit-image
carries. Without --disparity that of your photo is estimated, without --focus its subject is found.
"""

import argparse
import sys
import time
from pathlib import Path

import bokehdiff


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photo", type=Path, help="a photograph, all in focus")
    parser.add_argument("--disparity", type=Path, help="its map, larger is nearer, in [0, 1]")
    parser.add_argument("--focus", type=int, nargs=2, metavar=("X", "Y"), help="a pixel")
    parser.add_argument("--K", type=float, default=30, help="pixels of blur radius per disparity")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/render"), help="folder; replaces earlier results"
    )
    asked = parser.parse_args()
    if asked.disparity is not None and asked.photo is None:
        parser.error("--disparity goes with --photo, the photograph that it belongs to.")
    started = time.perf_counter()
    asked.out.mkdir(parents=True, exist_ok=True)

    focus = None if asked.focus is None else tuple(asked.focus)
    if asked.photo is not None:
        photo, disparity = asked.photo, asked.disparity
        focus = focus or "auto"
    else:
        from skimage.data import stereo_motorcycle

        photo, _, measured = stereo_motorcycle()
        disparity = bokehdiff.normalise_disparity(measured)[0]
        focus = focus or (537, 157)

    pipe = bokehdiff.BokehDiffPipeline.from_pretrained(bokehdiff.TINY)
    result = pipe(photo, disparity, focus=focus, K=asked.K, return_coc=True)

    result.images[0].save(asked.out / "blurred.png")
    result.coc[0].save(asked.out / "circles_of_confusion.png")  # green is in focus
    print(f"Pictures: {asked.out.resolve()} ({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as mistake:
        sys.exit(f"render.py: {mistake}")

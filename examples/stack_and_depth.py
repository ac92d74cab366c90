"""Make a bokeh stack of a photograph, and find its depth again in the blur.

    python examples/stack_and_depth.py
    python examples/stack_and_depth.py --photo photo.jpg --disparity metric.npy --K 10 20

The stack is focused on the nearest thing; depth is then measured from the pictures alone, without a
network. Without --photo it takes the Middlebury motorcycle with its measured disparity, which
scikit-image carries.
"""

import argparse
from pathlib import Path

import numpy as np
from skimage.data import stereo_motorcycle

import bokehdiff
from bokehdiff.depth_pictures import colour_picture
from bokehdiff.images import as_disparity_batch, as_image_batch

# Calibration of the stereo pair, from scikit-image's description of it: pixels, metres, pixels.
FOCAL_LENGTH, BASELINE, OFFSET = 994.978, 0.193001, 31.086


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photo", type=Path, help="a photograph, all in focus")
    parser.add_argument("--disparity", type=Path, help="its map in 1/metres")
    parser.add_argument("--K", type=float, nargs="+", default=[20, 40], help="pixels per 1/metre")
    parser.add_argument("--out", type=Path, default=Path("outputs/stack_and_depth"), help="folder")
    asked = parser.parse_args()

    if asked.photo is not None:
        photo, disparity = asked.photo, asked.disparity
    else:
        photo, _, measured = stereo_motorcycle()
        disparity = (measured + OFFSET) / (FOCAL_LENGTH * BASELINE)
    photo = as_image_batch(photo)
    truth = as_disparity_batch(disparity, 1, *photo.shape[-2:], metric=True)

    df = float(truth.max())
    stack = [bokehdiff.render_bokeh(photo, truth, df, K, metric=True) for K in asked.K]
    found = bokehdiff.depth_from_sweep(photo, stack, asked.K, focus_distance_m=1 / df)

    error = (found.disparity / truth - 1).abs().numpy()
    trusted = found.confidence.numpy() >= 0.5
    print(
        f"{trusted.mean():.0%} of the pixels can be trusted. Median error of inverse depth: "
        f"{np.median(error[trusted]):.1%} of those, {np.median(error):.1%} of all."
    )
    asked.out.mkdir(parents=True, exist_ok=True)
    for K, frame in zip(asked.K, stack, strict=True):
        bokehdiff.write_image(asked.out / f"K_{K:g}.png", frame, overwrite=True)
    for name, disparity in (("measured", truth), ("found", found.disparity)):
        colour_picture(disparity[0, 0]).save(asked.out / f"{name}.png")
    print(f"Pictures: {asked.out.resolve()}")


if __name__ == "__main__":
    main()

"""Make a bokeh stack of a photograph, and find its depth again in the blur.

    python examples/stack_and_depth.py
    python examples/stack_and_depth.py --photo photo.jpg --disparity metric.npy --K 10 20

The stack is focused on the nearest thing; depth is then measured from the pictures alone, without a
network. Without --photo it takes the Middlebury motorcycle with its measured disparity, which
scikit-image carries.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

import bokehdiff


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photo", type=Path, help="a photograph, all in focus")
    parser.add_argument("--disparity", type=Path, help="its map in 1/metres")
    parser.add_argument("--K", type=float, nargs="+", default=[20, 40], help="pixels per 1/metre")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/stack_and_depth"), help="replaces earlier results"
    )
    asked = parser.parse_args()
    if (asked.photo is None) != (asked.disparity is None):
        parser.error("--photo and --disparity, its map in 1/metres, go together.")
    started = time.perf_counter()
    asked.out.mkdir(parents=True, exist_ok=True)

    from bokehdiff.depth_pictures import colour_picture
    from bokehdiff.images import as_disparity_batch, as_image_batch

    if asked.photo is not None:
        photo, inverse_depth = asked.photo, bokehdiff.read_disparity(asked.disparity).numpy()
    else:
        from skimage.data import stereo_motorcycle

        # Calibration of the pair, from scikit-image's description of it: pixels, metres, pixels.
        focal_length, baseline, offset = 994.978, 0.193001, 31.086
        photo, _, measured = stereo_motorcycle()
        inverse_depth = (measured + offset) / (focal_length * baseline)
    photo = as_image_batch(photo)
    truth = as_disparity_batch(inverse_depth, 1, *photo.shape[-2:], metric=True)

    df = float(truth.max())
    stack = [bokehdiff.render_bokeh(photo, truth, df, K, metric=True) for K in asked.K]
    found = bokehdiff.depth_from_sweep(photo, stack, asked.K, focus_distance_m=1 / df)

    known = np.isfinite(inverse_depth).reshape(truth.shape)  # the holes of the map were filled
    error = (found.disparity / truth - 1).abs().numpy()[known]
    trusted = found.confidence.numpy()[known] >= 0.5
    print(
        f"{trusted.mean():.0%} of the pixels can be trusted. Median error of inverse depth: "
        f"{np.median(error[trusted]):.1%} of those, {np.median(error):.1%} of all."
    )
    pictures = {"sharp": photo, **{f"K_{K:g}": one for K, one in zip(asked.K, stack, strict=True)}}
    for name, picture in pictures.items():
        bokehdiff.write_image(asked.out / f"{name}.png", picture, overwrite=True)
    for name, disparity in (("measured", truth), ("found", found.disparity)):
        colour_picture(disparity[0, 0]).save(asked.out / f"{name}.png")
    print(f"Pictures: {asked.out.resolve()} ({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as mistake:
        sys.exit(f"stack_and_depth.py: {mistake}")

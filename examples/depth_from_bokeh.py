"""Find the depth of a real photograph again in pictures of it with known lens blur.

The photograph is the Middlebury motorcycle with its measured disparity, which scikit-image carries
in its wheel. Blur is rendered here, at two strengths and focused on the nearest thing; depth is
then measured from the pictures alone, without a network. Run
``python examples/depth_from_bokeh.py --help`` for the options.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np

# Calibration of the stereo pair, from scikit-image's description of it: pixels, metres, pixels.
FOCAL_LENGTH, BASELINE, OFFSET = 994.978, 0.193001, 31.086


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--K",
        default="20,40",
        help="strengths, pixels of blur radius per 1/metre, separated by commas (%(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/depth_from_bokeh"),
        help="folder to write to (%(default)s)",
    )
    arguments = parser.parse_args()

    from skimage.data import stereo_motorcycle

    import bokehdiff
    from bokehdiff.depth_pictures import colour_picture
    from bokehdiff.images import as_disparity_batch, as_image_batch

    strengths = [float(text) for text in arguments.K.split(",")]
    picture, _, measured = stereo_motorcycle()
    known = np.isfinite(measured)
    inverse_depth = np.where(known, measured + OFFSET, np.nan) / (FOCAL_LENGTH * BASELINE)
    photo = as_image_batch(picture)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of holes in the measurement, known here
        truth = as_disparity_batch(inverse_depth, 1, *photo.shape[-2:], metric=True)
    df = float(truth.max())
    stack = [bokehdiff.render_bokeh(photo, truth, df, K, metric=True) for K in strengths]

    found = bokehdiff.depth_from_sweep(photo, stack, strengths, focus_distance_m=1 / df)

    error = (found.disparity / truth - 1).abs()[0, 0].numpy()[known]
    trusted = (found.confidence[0, 0].numpy() >= 0.5)[known]
    print(
        f"{trusted.mean():.0%} of the pixels can be trusted. Median error of inverse depth: "
        f"{np.median(error[trusted]):.1%} of those, {np.median(error):.1%} of all."
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    bokehdiff.write_image(arguments.output / "sharp.png", photo)
    for K, frame in zip(strengths, stack, strict=True):
        bokehdiff.write_image(arguments.output / f"K_{K:g}.png", frame)
    for name, disparity in (("measured", truth), ("found", found.disparity)):
        colour_picture(disparity[0, 0]).save(arguments.output / f"{name}.png")
    print(f"Pictures: {arguments.output.resolve()}")


if __name__ == "__main__":
    main()

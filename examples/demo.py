"""Refocus a real photograph at three distances and save one picture that shows how.

The photograph is the Middlebury motorcycle with its measured disparity, which scikit-image carries
in its wheel, so nothing is downloaded. Run ``python examples/demo.py --help`` for the options.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def timed(what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"{what:<44s} {time.perf_counter() - start:6.2f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default=None, help="folder or hub id; default: the checkpoint inside the package"
    )
    parser.add_argument(
        "--K",
        type=float,
        default=30.0,
        help="blur radius in pixels per unit of disparity (%(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/demo"), help="folder to write to (%(default)s)"
    )
    arguments = parser.parse_args()

    with timed("import"):
        import matplotlib
        from diffusers.utils import logging

        logging.disable_progress_bar()
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        import torch
        from skimage.data import stereo_motorcycle

        import bokehdiff

    with timed("read the photograph and its disparity"):
        photo, _, measured = stereo_motorcycle()
        disparity = bokehdiff.normalise_disparity(measured)[0]
    with timed("load the model"):
        pipe = bokehdiff.BokehDiffPipeline.from_pretrained(arguments.model or bokehdiff.TINY)
    with (
        warnings.catch_warnings(record=True) as notes,
        timed("prepare the scene (encode, fill holes)"),
    ):
        warnings.simplefilter("always")
        scene = pipe.prepare(photo, disparity)
    for note in notes:
        if issubclass(note.category, UserWarning):
            print(f"  note: {note.message}")

    # Three things a photographer would focus on, by their place in the picture (x, y).
    subjects = {"headlight": (537, 157), "rear wheel": (190, 330), "back wall": (60, 60)}
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = {}
    for subject, (x, y) in subjects.items():
        df = bokehdiff.focus_disparity_at(scene.disparity, x, y)
        with timed(f"render, focus on the {subject} (df = {df:.2f})"):
            results[subject] = (df, pipe.render(scene, df, arguments.K).images[0])
        results[subject][1].save(arguments.output / f"focus_{subject.replace(' ', '_')}.png")

    with timed("draw the overview"):
        figure, axes = plt.subplots(2, 3, figsize=(16.5, 8.6), layout="constrained")
        filled = scene.disparity[0, 0].cpu().numpy()
        axes[0, 0].imshow(photo)
        axes[0, 0].set_title("photograph, all in focus")
        shown = axes[0, 1].imshow(filled, cmap="magma")
        axes[0, 1].set_title("disparity (1 = nearest), holes filled")
        figure.colorbar(shown, ax=axes[0, 1], location="bottom", shrink=0.7, aspect=40)
        df = results["headlight"][0]
        radius = bokehdiff.optics.circle_of_confusion(torch.from_numpy(filled), df, arguments.K)
        shown = axes[0, 2].imshow(radius, cmap="viridis")
        axes[0, 2].set_title("circle of confusion, focus on the headlight (px)")
        figure.colorbar(shown, ax=axes[0, 2], location="bottom", shrink=0.7, aspect=40)
        for axis, (subject, (df, result)) in zip(axes[1], results.items(), strict=True):
            axis.imshow(result)
            axis.plot(*subjects[subject], "+", color="white", markersize=12, markeredgewidth=2)
            axis.set_title(f"focus on the {subject}: df = {df:.2f}, K = {arguments.K:g}")
        figure.get_layout_engine().set(h_pad=0.12)
        for axis in axes.flat:
            axis.set_axis_off()
        overview = arguments.output / "overview.png"
        figure.savefig(overview, dpi=110)
    print(f"\noverview:  {overview.resolve()}\nfull size: {arguments.output.resolve()}/focus_*.png")


if __name__ == "__main__":
    main()

"""Score a method of your own beside the model inside the package, on scenes with a known truth.

    python examples/evaluate_method.py
    python examples/evaluate_method.py --scenes 12 --size 256

Replace ``blur`` by your method, or name another: --method path/to/file.py:function.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from data_synthesis.__main__ import main as synthesize
from evaluation.__main__ import main as evaluate


def blur(image: np.ndarray, disparity: np.ndarray, df: float, K: float) -> np.ndarray:
    """(H, W, 3) in [0, 1], as the uint8 image (H, W, 3) is blurred: each pixel by a Gaussian as
    wide as its circle of confusion. It lets the blur of near things end at their edges."""
    photo = image / 255
    radius = K * np.abs(disparity - df)
    widths = np.linspace(0, radius.max(), 9)
    blurred = [gaussian_filter(photo, (width / 2, width / 2, 0)) for width in widths]
    nearest = np.abs(radius[..., None] - widths).argmin(axis=-1)
    return np.choose(nearest[..., None], blurred)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default=f"gaussians={__file__}:blur", help="NAME=file.py:name")
    parser.add_argument("--scenes", default="3", help="number of them, each at 4 levels of blur")
    parser.add_argument("--size", default="128", help="pixels of their sides")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/evaluate_method"), help="replaces earlier results"
    )
    asked = parser.parse_args()
    started = time.perf_counter()

    data, results = str(asked.out / "data"), str(asked.out / "results.json")
    benchmark = ["benchmark", "--count", asked.scenes, "--size", asked.size, "--out", data]
    methods = ["--method", asked.method, "--method", "tiny", "--method", "scatter"]
    failed = (
        synthesize(benchmark)
        or evaluate(["compare", "synbokeh300", data, *methods, "--out", results])
        or evaluate(["report", results, "--out", str(asked.out / "report")])
    )
    if not failed:
        print(f"Results: {asked.out.resolve()} ({time.perf_counter() - started:.0f} s)")
    return failed


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, ImportError) as mistake:
        sys.exit(f"evaluate_method.py: {mistake}")

"""The photograph that the page starts with: Middlebury's motorcycle, from scikit-image's wheel."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..images import write_image

NO_SAMPLE = (
    "Drop a photograph to begin. (The sample photograph needs scikit-image: pip install "
    "'bokehdiff[data]'.)"
)


def write_sample(folder: Path) -> tuple[Path, Path] | None:
    """Files of the sample, the photograph and its measured disparity with holes; None without it.

    Args:
        folder: where they are written.
    """
    try:
        from skimage.data import stereo_motorcycle

        photo, _, measured = stereo_motorcycle()
    except (ImportError, OSError):  # not installed, or a package without its pictures
        return None
    disparity = np.where(np.isfinite(measured), measured, np.nan).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    map_file = folder / "motorcycle_disparity.npy"
    np.save(map_file, disparity)
    return write_image(folder / "motorcycle.png", photo), map_file

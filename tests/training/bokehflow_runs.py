"""Short runs of tiny BokehFlows, and pairs of photographs to run on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

TINY = {
    **{"channels": 8, "stem_channels": 8, "head_channels": 8, "camera_channels": 8, "blocks": 2},
    **{"fusion": "depth_to_bokeh", "radius_tokens": True, "max_coc_radius": 96},
}
CLIPS = {"data_kind": "clips", "data_options": {"frames": 3, "motions": ["parallax"]}}
LINE = {
    **{"image": "sharp.png", "target": "blurred.png"},
    **{"f_number": 2.0, "focal_length_mm": 50, "focus_distance_m": 2.0},
}
HEIGHT, WIDTH = 30, 40


def arguments(output_dir: Path, *flags: str, **settings: Any) -> list[str]:
    """Command-line arguments of a short run of a tiny network from nothing, on the fly."""
    values = {
        **{"model_variant": "nano", "model_options": TINY},
        **{"data_size": 32, "data_crop_size": 24, "batch_size": 2, "max_train_steps": 2},
        **{"warmup_steps": 1, "learning_rate": 1e-3, "log_steps": 1, "validation_scenes": 0},
        **{"report_to": "none"},
        **settings,
    }
    named = [
        part
        for name, value in values.items()
        if value is not None
        for part in (f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value))
    ]
    return ["--output_dir", str(output_dir), *named, *flags]


def write_pairs(folder: Path, *lines: dict[str, Any]) -> Path:
    """A folder with two pictures, a depth with holes, a disparity of 8 bits, and these lines."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for name in ("sharp", "blurred"):
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{name}.png")
    depth = rng.uniform(0.5, 9, (HEIGHT, WIDTH))
    depth[0, :3] = 0, math.inf, math.nan
    np.save(folder / "depth.npy", depth)
    levels = rng.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
    PIL.Image.fromarray(levels).save(folder / "disparity.png")
    PIL.Image.fromarray(levels[1:]).save(folder / "small.png")
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return folder

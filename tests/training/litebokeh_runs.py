"""Short runs of tiny LiteBokehs on scenes made on the fly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GLASS = {
    **{"model_kind": "glass_enc_net", "model_options": {"channels": 4, "residual_blocks": 1}},
}


def arguments(output_dir: Path, *flags: str, **settings: Any) -> list[str]:
    """Command-line arguments of a short run of a tiny network from nothing, on the fly."""
    values = {
        **{"model_kind": "tiny_unet", "model_options": {"channels": [4, 8, 8]}},
        **{"data_size": 64, "data_crop_size": 48, "batch_size": 2, "max_train_steps": 2},
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

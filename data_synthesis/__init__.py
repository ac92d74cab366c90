"""Data synthesis: training scenes with true disparity and ray-traced lens blur."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_synthesis.layer_scenes import LayerScenes
    from data_synthesis.procedural import ProceduralScenes
    from data_synthesis.reader import ShardedScenes, verify_shards
    from data_synthesis.writer import write_shards

# Lazy: reading shards needs no numba, tracing scenes does.
MODULES = {
    "LayerScenes": "layer_scenes",
    "ProceduralScenes": "procedural",
    "ShardedScenes": "reader",
    "verify_shards": "reader",
    "write_shards": "writer",
}

__all__ = ["LayerScenes", "ProceduralScenes", "ShardedScenes", "verify_shards", "write_shards"]


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module 'data_synthesis' has no attribute {name!r}")
    return getattr(importlib.import_module(f"data_synthesis.{MODULES[name]}"), name)

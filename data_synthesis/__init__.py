"""Data synthesis: training scenes with true disparity and ray-traced lens blur."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_synthesis.procedural import ProceduralScenes
    from data_synthesis.shards import ShardedScenes, write_shards

__all__ = ["ProceduralScenes", "ShardedScenes", "write_shards"]


def __getattr__(name: str) -> Any:
    # Lazy: reading shards needs no numba, tracing scenes does.
    if name == "ProceduralScenes":
        from data_synthesis.procedural import ProceduralScenes

        return ProceduralScenes
    if name in ("ShardedScenes", "write_shards"):
        from data_synthesis import shards

        return getattr(shards, name)
    raise AttributeError(f"module 'data_synthesis' has no attribute {name!r}")

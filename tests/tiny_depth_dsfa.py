"""The Depth Anything of :mod:`tests.tiny_depth` with divided space-focus attention, for tests.

Without a stack its answers are known: bright is near.
"""

from __future__ import annotations

from pathlib import Path

import torch

from bokehdiff.models.depth_anything_dsfa import DepthAnythingDSFAForDepthEstimation
from tests.tiny_depth import tiny_depth_network, tiny_depth_processor


def tiny_dsfa_network(gate: float = 0.5) -> DepthAnythingDSFAForDepthEstimation:
    """A metric network whose one level that matters sees the stack; with ``gate`` 0 it does not."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return DepthAnythingDSFAForDepthEstimation.from_depth_anything(
            tiny_depth_network("metric"), fusion_levels=[0], fusion_heads=2, initial_gate=gate
        )


def save_tiny_dsfa(folder: Path, gate: float = 0.5) -> Path:
    """The folder, as ``DepthFromBokehPipeline.from_pretrained`` wants it."""
    tiny_dsfa_network(gate).save_pretrained(folder)
    tiny_depth_processor().save_pretrained(folder)
    return folder

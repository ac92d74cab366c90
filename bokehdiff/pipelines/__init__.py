"""Pipelines: the whole way from a photograph to a picture."""

from .bokeh_stack import BokehStackOutput, BokehStackPipeline
from .bokehdiff import BokehDiffPipeline, BokehDiffPipelineOutput, BokehScene
from .depth_from_bokeh import DepthFromBokehPipeline
from .depth_from_sweep import depth_from_sweep
from .depth_output import DepthFromBokehOutput

__all__ = [
    "BokehDiffPipeline",
    "BokehDiffPipelineOutput",
    "BokehScene",
    "BokehStackOutput",
    "BokehStackPipeline",
    "DepthFromBokehOutput",
    "DepthFromBokehPipeline",
    "depth_from_sweep",
]

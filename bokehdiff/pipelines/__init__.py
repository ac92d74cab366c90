"""Pipelines: the whole way from a photograph to a picture."""

from .bokeh_stack import BokehStackOutput, BokehStackPipeline
from .bokehdiff import BokehDiffPipeline, BokehDiffPipelineOutput, BokehScene
from .bokehflow import BokehFlowPipeline, BokehFlowPipelineOutput, BokehFlowScene
from .bokehflow_video import BokehFlowVideoPipeline, VideoBlur
from .depth_from_bokeh import DepthFromBokehPipeline
from .depth_from_sweep import depth_from_sweep
from .depth_output import DepthFromBokehOutput
from .litebokeh import LiteBokehPipeline

__all__ = [
    "BokehDiffPipeline",
    "BokehDiffPipelineOutput",
    "BokehFlowPipeline",
    "BokehFlowPipelineOutput",
    "BokehFlowScene",
    "BokehFlowVideoPipeline",
    "BokehScene",
    "BokehStackOutput",
    "BokehStackPipeline",
    "DepthFromBokehOutput",
    "DepthFromBokehPipeline",
    "LiteBokehPipeline",
    "VideoBlur",
    "depth_from_sweep",
]

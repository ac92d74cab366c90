"""Pipelines: the whole way from a photograph to a picture."""

from .bokehdiff import BokehDiffPipeline, BokehDiffPipelineOutput, BokehScene

__all__ = ["BokehDiffPipeline", "BokehDiffPipelineOutput", "BokehScene"]

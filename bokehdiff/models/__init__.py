"""Networks and codecs that a pipeline is made of, and the judge one is trained against; each can be
saved and loaded on its own."""

from .bokeh_adapter import BokehAdapter
from .bokehflow import BokehFlowModel, BokehFlowOutput
from .depth_anything_dsfa import DepthAnythingDSFAConfig, DepthAnythingDSFAForDepthEstimation
from .discriminator import BokehDiscriminator
from .dsfa import DSFABlock, DSFAEncoder
from .light_transport_unet import LightTransportUNet
from .litebokeh import GlassEncNet, LiteBokehOutput, TinyUnet
from .space_to_depth import AutoencoderSpaceToDepth
from .stored_prompt import StoredPrompt

__all__ = [
    "AutoencoderSpaceToDepth",
    "BokehAdapter",
    "BokehDiscriminator",
    "BokehFlowModel",
    "BokehFlowOutput",
    "DSFABlock",
    "DSFAEncoder",
    "DepthAnythingDSFAConfig",
    "DepthAnythingDSFAForDepthEstimation",
    "GlassEncNet",
    "LightTransportUNet",
    "LiteBokehOutput",
    "StoredPrompt",
    "TinyUnet",
]

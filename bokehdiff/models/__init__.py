"""Networks and codecs that a pipeline is made of; each can be saved and loaded on its own."""

from .light_transport_unet import LightTransportUNet
from .space_to_depth import AutoencoderSpaceToDepth
from .stored_prompt import StoredPrompt

__all__ = ["AutoencoderSpaceToDepth", "LightTransportUNet", "StoredPrompt"]

"""Networks and codecs that a pipeline is made of, and the judge one is trained against; each can be
saved and loaded on its own."""

from .discriminator import BokehDiscriminator
from .light_transport_unet import LightTransportUNet
from .space_to_depth import AutoencoderSpaceToDepth
from .stored_prompt import StoredPrompt

__all__ = ["AutoencoderSpaceToDepth", "BokehDiscriminator", "LightTransportUNet", "StoredPrompt"]

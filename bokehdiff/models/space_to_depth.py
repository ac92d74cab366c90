"""A lossless image codec with the call surface of ``diffusers.AutoencoderKL``.

``AutoencoderSpaceToDepth`` turns every block of ``block_size`` x ``block_size`` pixels into one
latent position with ``3 * block_size**2`` channels, and back. Nothing is learned and nothing is
lost, so a small network behind it can be sharp to the pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

IMAGE_CHANNELS = 3


class DeterministicLatents:
    """A distribution that is one point: the latents themselves.

    It answers the calls that pipelines make on the posterior of a variational autoencoder, so that
    a codec without randomness fits in the same place.

    Args:
        latents: (B, C, h, w), the only value of the distribution.
    """

    def __init__(self, latents: torch.Tensor) -> None:
        self.mean = latents

    def mode(self) -> torch.Tensor:
        """The latents, (B, C, h, w)."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """The latents, (B, C, h, w); ``generator`` is accepted and nothing is drawn from it."""
        return self.mean


@dataclass
class SpaceToDepthEncoderOutput(BaseOutput):
    """What :meth:`AutoencoderSpaceToDepth.encode` returns.

    Args:
        latent_dist: the latents (B, 3 * block_size**2, H / block_size, W / block_size), behind the
            ``mode()`` and ``sample(generator)`` of a distribution.
    """

    latent_dist: DeterministicLatents


class AutoencoderSpaceToDepth(ModelMixin, ConfigMixin):
    """Lossless codec: pixels of a block become channels of one latent position.

    The channel order is that of ``torch.nn.functional.pixel_unshuffle``: channel
    ``c * block_size**2 + y * block_size + x`` holds colour ``c`` of the pixel at row ``y`` and
    column ``x`` inside its block. ``decode(encode(image))`` returns the image bit for bit.

    Args:
        block_size: pixels per latent position along each axis; a power of two (1, 2, 4, ...).
        latent_channels: always ``3 * block_size**2``; stored for those who read configurations.
        scaling_factor: factor between codec latents and the latents that the UNet sees.
        force_upcast: whether the codec must run in float32; it never needs to.
        block_out_channels: one entry per resolution, so that the rule by which diffusers computes
            the scale of a VAE, ``2 ** (len(block_out_channels) - 1)``, gives ``block_size``.

    Raises:
        ValueError: ``block_size`` is no power of two, or a stored value contradicts it.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        block_size: int = 2,
        latent_channels: int | None = None,
        scaling_factor: float = 1.0,
        force_upcast: bool = False,
        block_out_channels: list[int] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(block_size, int) or block_size < 1 or block_size & (block_size - 1):
            raise ValueError(
                f"block_size is {block_size!r}; it must be a power of two (1, 2, 4, 8, ...)."
            )
        needed_channels = IMAGE_CHANNELS * block_size**2
        if latent_channels not in (None, needed_channels):
            raise ValueError(
                f"latent_channels is {latent_channels}, but blocks of {block_size} x {block_size} "
                f"RGB pixels have {needed_channels} values. Leave latent_channels out."
            )
        resolutions = block_size.bit_length()
        if block_out_channels is not None and len(block_out_channels) != resolutions:
            raise ValueError(
                f"block_out_channels has {len(block_out_channels)} entries, but block_size "
                f"{block_size} needs {resolutions}. Leave block_out_channels out."
            )
        self.register_to_config(
            latent_channels=needed_channels,
            block_out_channels=[IMAGE_CHANNELS * 4**level for level in range(resolutions)],
        )
        # A module without any parameter has no device and no dtype, which pipelines and offloading
        # ask for, and save_pretrained would write no weights file, without which from_pretrained
        # refuses.
        self.placement = torch.nn.Parameter(torch.zeros(()), requires_grad=False)

    @apply_forward_hook
    def encode(
        self, x: torch.Tensor, return_dict: bool = True
    ) -> SpaceToDepthEncoderOutput | tuple[DeterministicLatents]:
        """Latents of an image.

        Args:
            x: (B, 3, H, W), any range; H and W multiples of ``block_size``.
            return_dict: return a plain tuple when false.

        Returns:
            ``latent_dist`` whose ``mode()`` is (B, 3 * block_size**2, H / block_size,
            W / block_size).

        Raises:
            ValueError: ``x`` has another number of channels, or a side that is no multiple.
        """
        block_size = self.config.block_size
        if x.ndim != 4 or x.shape[1] != IMAGE_CHANNELS:
            raise ValueError(
                f"encode got a tensor of shape {tuple(x.shape)}; it needs (batch, "
                f"{IMAGE_CHANNELS}, height, width)."
            )
        if x.shape[-2] % block_size or x.shape[-1] % block_size:
            raise ValueError(
                f"encode got an image of {x.shape[-2]} x {x.shape[-1]} pixels (height x width); "
                f"both must be multiples of {block_size}. Pad it first, for instance with "
                "bokehdiff.images.pad_to_multiple."
            )
        latent_dist = DeterministicLatents(F.pixel_unshuffle(x, block_size))
        if not return_dict:
            return (latent_dist,)
        return SpaceToDepthEncoderOutput(latent_dist=latent_dist)

    @apply_forward_hook
    def decode(
        self,
        z: torch.Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Image of the latents, the inverse of :meth:`encode`.

        Args:
            z: (B, 3 * block_size**2, h, w).
            return_dict: return a plain tuple when false.
            generator: accepted for the sake of the common signature; nothing is random here.

        Returns:
            ``sample``, (B, 3, h * block_size, w * block_size).

        Raises:
            ValueError: ``z`` has another number of channels.
        """
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"decode got a tensor of shape {tuple(z.shape)}; it needs (batch, "
                f"{self.config.latent_channels}, height, width)."
            )
        image = F.pixel_shuffle(z, self.config.block_size)
        if not return_dict:
            return (image,)
        return DecoderOutput(sample=image)

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """``decode(encode(sample))``: the same image, (B, 3, H, W)."""
        posterior = self.encode(sample).latent_dist
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(latents, return_dict=return_dict, generator=generator)

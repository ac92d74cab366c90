"""LayerDiffuse for Stable Diffusion XL: its transparent decoder and its attention offsets.

Zhang and Agrawala, Transparent Image Layer Diffusion using Latent Transparency (SIGGRAPH 2024).
A low-rank offset of the UNet's attention weights makes SDXL write transparency into the latent;
a second network reads it back: it takes the picture that SDXL's own VAE decodes, and the latent,
and gives alpha and colours.

Both files are published at ``LayerDiffusion/layerdiffusion-v1`` on the Hugging Face hub:
``layer_xl_transparent_attn.safetensors`` and ``vae_transparent_decoder.safetensors``.

What this module knows of them, it knows from public code that loads them; no published weights
have been run through it.

- Decoder: the published loader fills, strictly, a U-Net of diffusers' blocks: seven levels of 32,
  32, 64, 128, 256, 512, 512 channels, two residual blocks each on the way down, three on the way
  up, attention with heads of 8 channels in the lowest three levels, groups of 4; a 1 x 1
  convolution of the latent is added to what enters the fourth level. A second program, for the
  same network on FLUX's latents, reads its tensors one by one and names the same ones. Alpha comes
  first, then red, green and blue; eight flips and quarter turns are decoded and their (lower)
  median taken.
- Offsets: ``diffusion_model.BLOCK.1.transformer_blocks.N.attnN.to_X.weight::lora::0`` is the
  factor (outputs, rank), ``::1`` the factor (rank, inputs); the product is added as it is. The
  factors are of rank 256 and cover query, key, value and output of all 140 attention layers: this
  follows from the file's listed size, 709 MiB in half precision, not from a list of its keys.
  Whatever the file holds, it is applied completely or refused.

Public listings give these SHA-256, which the provenance of a picture can be compared with: offsets
b7919c5b4837fb64f24c97a7abdf1a9c6e8d60de080a5dae089dde098266df95, decoder
59dc8feefe40d26b6cb7186aed7af70c60d94ac4f9db8ebe7f121a01ba27a2fc.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_blocks import (
    AttnDownBlock2D,
    AttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2D,
    UpBlock2D,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

__all__ = ["TransparentDecoder", "merge_attention_offsets", "offset_keys", "read_weights"]

LEVELS = 7
ATTENTION_LEVELS = 3  # the lowest ones
LATENT_LEVEL = 3  # 8 pixels per latent
HEAD_CHANNELS = 8
NORM_GROUPS = 4
SIZE_MULTIPLE = 2 ** (LEVELS - 1)


class TransparentDecoder(nn.Module):
    """Alpha and colours from a decoded picture and its latent.

    ``channels``: of each of the seven levels, multiples of 8; the published width by default.
    """

    def __init__(self, channels: Iterable[int] = (32, 32, 64, 128, 256, 512, 512)) -> None:
        super().__init__()
        channels = tuple(channels)
        if len(channels) != LEVELS or any(width < 1 or width % HEAD_CHANNELS for width in channels):
            raise ValueError(
                f"channels are {channels}; wanted {LEVELS} multiples of {HEAD_CHANNELS}."
            )
        bottom = LEVELS - 1
        blocks = dict(temb_channels=None, resnet_eps=1e-5, resnet_groups=NORM_GROUPS)
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.latent_conv_in = nn.Conv2d(4, channels[LATENT_LEVEL - 1], 1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(channels):
            above, below = channels[max(level - 1, 0)], channels[min(level + 1, bottom)]
            down = dict(blocks, in_channels=above, out_channels=width, num_layers=2)
            up = dict(down, prev_output_channel=below, num_layers=3)
            if level >= LEVELS - ATTENTION_LEVELS:
                heads = {"attention_head_dim": HEAD_CHANNELS}
                lower = "conv" if level < bottom else None
                self.down_blocks.append(AttnDownBlock2D(**down, **heads, downsample_type=lower))
                self.up_blocks.insert(0, AttnUpBlock2D(**up, **heads, upsample_type="conv"))
            else:
                self.down_blocks.append(DownBlock2D(**down, add_downsample=True))
                self.up_blocks.insert(0, UpBlock2D(**up, add_upsample=level > 0))
        self.mid_block = UNetMidBlock2D(
            in_channels=channels[-1], attention_head_dim=HEAD_CHANNELS, **blocks
        )
        self.conv_norm_out = nn.GroupNorm(NORM_GROUPS, channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[0], 4, 3, padding=1)

    @classmethod
    def from_file(cls, path: Path) -> TransparentDecoder:
        """The decoder in a file of the published layout; narrower ones are recognised.

        Raises ValueError naming tensors that lack, are unknown, or have another shape.
        """
        weights = read_weights(path)
        names = [f"down_blocks.{level}.resnets.0.conv1.bias" for level in range(LEVELS)]
        _compare_keys(set(names), set(names) & set(weights), path.name)
        decoder = cls(len(weights[name]) for name in names)
        wanted = decoder.state_dict()
        _compare_keys(set(wanted), set(weights), path.name)
        for name, tensor in wanted.items():
            if tensor.shape != weights[name].shape:
                raise ValueError(
                    f"{path.name}: {name} is {tuple(weights[name].shape)}; wanted "
                    f"{tuple(tensor.shape)}."
                )
        decoder.load_state_dict(weights)
        return decoder.eval().requires_grad_(False)

    def forward(self, pixels: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """(B, 4, H, W): alpha, red, green, blue, about [0, 1], not clamped.

        ``pixels`` (B, 3, H, W) in [0, 1], height and width multiples of 64; ``latents``
        (B, 4, H/8, W/8) as SDXL's VAE decodes them, that is, divided by its scaling factor.
        """
        sample = self.conv_in(pixels)
        skipped = [sample]
        for level, block in enumerate(self.down_blocks):
            if level == LATENT_LEVEL:
                sample = sample + self.latent_conv_in(latents)
            sample, outputs = block(sample)
            skipped.extend(outputs)
        sample = self.mid_block(sample)
        for block in self.up_blocks:
            count = len(block.resnets)  # type: ignore[arg-type]
            sample = block(sample, tuple(skipped[-count:]))
            del skipped[-count:]
        return self.conv_out(nn.functional.silu(self.conv_norm_out(sample)))

    def decode(self, pixels: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """As ``forward``, in [0, 1]: the lower median over eight flips and quarter turns."""
        views = []
        for flipped in (False, True):
            for turns in range(4):
                view = self(_turned(pixels, flipped, turns), _turned(latents, flipped, turns))
                view = torch.rot90(view.clamp(0, 1), -turns, (2, 3))
                views.append(view.flip(3) if flipped else view)
        return torch.stack(views).median(dim=0).values


def _turned(tensor: torch.Tensor, flipped: bool, turns: int) -> torch.Tensor:
    return torch.rot90(tensor.flip(3) if flipped else tensor, turns, (2, 3))


def offset_keys(unet: UNet2DConditionModel) -> dict[str, str]:
    """The published name of every attention weight's offset, by the weight's name in the UNet.

    Without the ending ``::lora::0`` or ``::lora::1``. Counts blocks as the original SDXL code
    does: the layers of all levels and what lies between two levels in one sequence.
    """
    layers = unet.config.layers_per_block
    attention = re.compile(
        r"(?:down_blocks\.(\d+)\.attentions\.(\d+)|up_blocks\.(\d+)\.attentions\.(\d+)"
        r"|mid_block\.attentions\.0)\.(.*\.attn[12]\.to_(?:q|k|v|out\.0)\.weight)"
    )
    keys = {}
    for name in unet.state_dict():
        match = attention.fullmatch(name)
        if match is None:
            continue
        down, down_layer, up, up_layer, weight = match.groups()
        if down is not None:
            # After the first convolution; a level is its layers and one downsampling.
            block = f"input_blocks.{1 + int(down) * (layers + 1) + int(down_layer)}.1"
        elif up is not None:
            block = f"output_blocks.{int(up) * (layers + 1) + int(up_layer)}.1"
        else:
            block = "middle_block.1"
        keys[name] = f"diffusion_model.{block}.{weight}"
    return keys


def merge_attention_offsets(unet: UNet2DConditionModel, path: Path) -> None:
    """Adds the low-rank offsets in a file of the published layout to the UNet's weights, in place.

    All of the file is applied to all attention layers, or none of it: ValueError names what the
    file lacks, holds in excess, or holds in another shape.
    """
    offsets = read_weights(path)
    keys = offset_keys(unet)
    _compare_keys(
        {f"{key}::lora::{factor}" for key in keys.values() for factor in (0, 1)},
        set(offsets),
        path.name,
    )
    weights = dict(unet.named_parameters())
    for name, key in keys.items():
        up, down = offsets[f"{key}::lora::0"], offsets[f"{key}::lora::1"]
        outputs, inputs = weights[name].shape
        rank = up.shape[-1]
        if up.shape != (outputs, rank) or down.shape != (rank, inputs):
            raise ValueError(
                f"{path.name}: {key} has factors {tuple(up.shape)} and {tuple(down.shape)}; wanted "
                f"({outputs}, rank) and (rank, {inputs})."
            )
    with torch.no_grad():
        for name, key in keys.items():
            weight = weights[name]
            up, down = (
                offsets[f"{key}::lora::{factor}"].to(weight.device, torch.float32)
                for factor in (0, 1)
            )
            weight.copy_(weight.float() + up @ down)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name; ValueError where it is none."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path.name} cannot be read as safetensors ({error}); download it again."
        ) from None


def _compare_keys(wanted: set[str], given: set[str], name: str) -> None:
    missing, extra = sorted(wanted - given), sorted(given - wanted)
    if missing or extra:
        parts = [
            f"{what} {len(names)}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
            for what, names in (("lacks", missing), ("holds unknown", extra))
            if names
        ]
        raise ValueError(
            f"{name} is not in the layout of the published LayerDiffuse file for SDXL: it "
            f"{'; it '.join(parts)}."
        )

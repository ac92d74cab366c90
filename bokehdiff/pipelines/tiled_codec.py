"""A variational autoencoder in strips of the picture: little memory, and the result of the whole.

Independent tiles of an ``AutoencoderKL`` cannot give its result, however much they overlap, because
its group normalisations look at the whole picture, and so does the attention in its middle block.
Here every layer is finished for the whole picture before the next one begins:

1. A convolution is computed strip by strip, with the rows that it sees above and below; zeros are
   padded at the border of the picture only.
2. A group normalisation gets mean and variance of the whole picture, which are gathered strip by
   strip before it is applied.
3. What has an eighth of the picture's resolution goes through the middle block as a whole. Its
   attention is that of torch, which holds no matrix of all pairs of positions.

Between layers lies one activation of the picture. None is kept that has more values than the first
one of the encoder, ``block_out_channels[0]`` in full resolution: what is larger, or needed beside
another one, is computed again from what is kept. For SDXL that makes 1.4 times the multiplications
of the untiled decoder, 1.15 times those of the encoder, and half a kilobyte per pixel in float32.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..attention.processor import uncompiled
from ..models.space_to_depth import AutoencoderSpaceToDepth
from ..windows import Window

DEFAULT_TILE_PIXELS = 2**19
"""Pixels of a strip. The rows that neighbouring strips both compute cost more in smaller ones."""

WHOLE_PIXELS = 2**21
"""Pixels up to which a picture stays whole: the untiled decoder of SDXL takes 8 GB for them in
float32 on a CPU."""

# Activations of the size of a strip that are there at once while one is computed, with what a
# convolution lays out anew for itself.
STRIPS_AT_ONCE = 10


def codec_strip_for(vae: nn.Module, tiling: Any, height: int, width: int) -> int | None:
    """Pixels of a strip with which a picture goes through the codec; None for the whole picture.

    Pictures of up to ``WHOLE_PIXELS`` stay whole with ``"auto"``, as do those of other codecs, of
    one whose own tiling is on (``vae.enable_tiling()``), and all while gradients are recorded.

    Args:
        vae: any codec.
        tiling: of the pipeline's call; a strip has the area of a square of so many pixels.
        height, width: of the picture, pixels.
    """
    codec = uncompiled(vae)
    if tiling is None or torch.is_grad_enabled() or not _can_be_cut(codec) or codec.use_tiling:
        return None
    if isinstance(tiling, int):
        return tiling**2
    return DEFAULT_TILE_PIXELS if height * width > WHOLE_PIXELS else None


def encode_in_tiles(
    vae: AutoencoderKL | AutoencoderSpaceToDepth,
    image: Tensor,
    tile_pixels: int = DEFAULT_TILE_PIXELS,
    storage_device: torch.device | None = None,
) -> Tensor:
    """``vae.encode(image).latent_dist.mode()`` up to rounding, with the memory of strips.

    Gradients are not recorded. The photos of a batch are encoded one after the other.

    Args:
        vae: the codec. A codec without weights, ``AutoencoderSpaceToDepth``, needs no strips.
        image: (B, 3, H, W) in [-1, 1], of the dtype of the codec, on the device where it computes;
            sides multiples of the pixels per latent.
        tile_pixels: pixels of the image in a strip.
        storage_device: where activations of the whole picture lie; by default the device of the
            image, or the CPU if they would not fit there.

    Returns:
        (B, C, H / s, W / s), unscaled latents.

    Raises:
        ValueError: gradients would be recorded, or a codec of another kind, a side that is no
            multiple, ``tile_pixels`` below 1.
    """
    if isinstance(vae, AutoencoderSpaceToDepth):
        return vae.encode(image).latent_dist.mode()
    codec = _check(vae, tile_pixels)
    height, width = image.shape[-2:]
    scale = 2 ** (len(codec.config.block_out_channels) - 1)
    if height % scale or width % scale:
        raise ValueError(
            f"The image has {height} x {width} pixels (height x width); both must be multiples of "
            f"{scale}. Pad it first, for instance with bokehdiff.images.pad_to_multiple."
        )
    if height * width <= tile_pixels:
        return torch.cat([vae.encode(one).latent_dist.mode() for one in image.split(1)])
    strips = _strips(codec, (height, width), tile_pixels, image.device, storage_device)
    _bring_in(vae)
    return torch.cat([_encode(codec, one, strips) for one in image.split(1)])


def decode_in_tiles(
    vae: AutoencoderKL | AutoencoderSpaceToDepth,
    latents: Tensor,
    tile_pixels: int = DEFAULT_TILE_PIXELS,
    storage_device: torch.device | None = None,
) -> Tensor:
    """``vae.decode(latents).sample`` up to rounding, with the memory of strips.

    Gradients are not recorded. The pictures of a batch are decoded one after the other.

    Args:
        vae: the codec. A codec without weights, ``AutoencoderSpaceToDepth``, needs no strips.
        latents: (B, C, h, w), unscaled, of the dtype of the codec, on the device where it computes.
        tile_pixels: pixels of the decoded picture in a strip.
        storage_device: where activations of the whole picture lie; by default the device of the
            latents, or the CPU if they would not fit there.

    Returns:
        (B, 3, h * s, w * s) around [-1, 1].

    Raises:
        ValueError: gradients would be recorded, or a codec of another kind, ``tile_pixels`` below
            1.
    """
    if isinstance(vae, AutoencoderSpaceToDepth):
        return vae.decode(latents).sample
    codec = _check(vae, tile_pixels)
    scale = 2 ** (len(codec.config.block_out_channels) - 1)
    height, width = (side * scale for side in latents.shape[-2:])
    if height * width <= tile_pixels:
        return torch.cat([vae.decode(one).sample for one in latents.split(1)])
    strips = _strips(codec, (height, width), tile_pixels, latents.device, storage_device)
    _bring_in(vae)
    return torch.cat([_decode(codec, one, strips) for one in latents.split(1)])


def tiled_codec_bytes(
    vae: AutoencoderKL, height: int, width: int, tile_pixels: int = DEFAULT_TILE_PIXELS
) -> int:
    """Memory that :func:`decode_in_tiles` and :func:`encode_in_tiles` take at most, about.

    One activation of the whole picture, which ``storage_device`` holds, and a few strips.
    """
    pixels = height * width + STRIPS_AT_ONCE * min(tile_pixels, height * width)
    return vae.config.block_out_channels[0] * pixels * vae.dtype.itemsize


# -- The codec, layer by layer ---------------------------------------------------------------------


def _encode(codec: AutoencoderKL, image: Tensor, strips: _Strips) -> Tensor:
    """(1, 3, H, W) to the mode of the posterior, (1, C, h, w)."""
    encoder = codec.encoder
    with _brought_in(encoder, *encoder.down_blocks):
        channels = codec.config.block_out_channels[0]
        picture = _stored(_Convolved(encoder.conv_in, _Stored.whole(image, strips), channels))
        for block in encoder.down_blocks:
            for resnet in block.resnets:
                picture = _stored(_Resnet(resnet, picture))
            for downsampler in block.downsamplers or ():
                picture = _stored(_Downsampled(downsampler, picture))
        values = encoder.mid_block(picture.read(picture.window))
        values = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(values)))
    if codec.quant_conv is not None:
        values = codec.quant_conv(values)
    return DiagonalGaussianDistribution(values).mode()


def _decode(codec: AutoencoderKL, latents: Tensor, strips: _Strips) -> Tensor:
    """(1, C, h, w) to the picture (1, 3, H, W)."""
    decoder = codec.decoder
    if codec.post_quant_conv is not None:
        latents = codec.post_quant_conv(latents)
    with _brought_in(decoder, *decoder.up_blocks):
        picture: _Activation = _Stored.whole(decoder.mid_block(decoder.conv_in(latents)), strips)
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                picture = _stored(_Resnet(resnet, picture))
            for upsampler in block.upsamplers or ():
                picture = _Upsampled(upsampler, picture)
                if picture.values <= strips.most_stored:
                    picture = _stored(picture)
        output = _Convolved(
            decoder.conv_out,
            picture,
            codec.config.out_channels,
            decoder.conv_norm_out,
            decoder.conv_act,
        )
        return _stored(output).read(output.window)


# -- Activations that are read by strips -----------------------------------------------------------


@dataclass(frozen=True)
class _Strips:
    """How activations are cut and where they are.

    Args:
        values: largest number of values in a strip.
        most_stored: values of the whole picture that may be stored at once.
        compute_device: where the layers compute.
        storage_device: where activations of the whole picture lie.
    """

    values: int
    most_stored: int
    compute_device: torch.device
    storage_device: torch.device


class _Moments:
    """Mean and variance of each channel over the whole picture, gathered part by part."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.means: list[Tensor] = []
        self.variances: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """Takes in a part (1, C, rows, columns) of the picture; each pixel comes once."""
        wide = torch.promote_types(values.dtype, torch.float32)
        variance, mean = torch.var_mean(values.to(wide), dim=(0, 2, 3), correction=0)
        self.counts.append(values.shape[-2] * values.shape[-1])
        self.means.append(mean)
        self.variances.append(variance)

    def of_groups(self, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance, float64 (groups,) on the CPU, of equal groups of the channels.

        From the means m and variances v of parts of n values, N in all: mean = sum(n m) / N,
        variance = sum(n (v + (m - mean)^2)) / N.
        """
        counts = torch.tensor(self.counts, dtype=torch.float64)
        shares = (counts / counts.sum())[:, None, None]
        means, variances = (
            torch.stack(parts).cpu().double().unflatten(1, (groups, -1))
            for parts in (self.means, self.variances)
        )
        mean = (shares * means).sum(0).mean(1)
        spread = variances + (means - mean[:, None]) ** 2
        return mean, (shares * spread).sum(0).mean(1)


class _NormOfWholePicture(TorchFunctionMode):
    """Within it, a ``GroupNorm`` that is called with a part of the picture uses these moments.

    The module itself is called, so that whatever brings its weights in, or casts them, acts.
    """

    def __init__(self, moments: _Moments) -> None:
        super().__init__()
        self.moments = moments

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.group_norm:
            func = self.group_norm
        return func(*args, **(kwargs or {}))

    def group_norm(
        self, values: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        """``F.group_norm`` of a part (1, C, rows, columns) of the picture."""
        mean, variance = self.moments.of_groups(groups)
        factor = (variance + eps).rsqrt()
        wide = torch.promote_types(values.dtype, torch.float32)
        factor, offset = (
            one.repeat_interleave(values.shape[1] // groups).to(values.device, wide)
            for one in (factor, -mean * factor)
        )
        factor, offset = (
            one.view(1, -1, 1, 1) for one in (weight * factor, bias + weight * offset)
        )
        return torch.addcmul(offset, values.to(wide), factor).to(values.dtype)


class _Activation:
    """An activation (1, channels, height, width) of the whole picture, read by windows.

    Args:
        channels, height, width: its shape.
        strips: how it is cut.
        source_values: number of values of what it is computed from.
    """

    def __init__(
        self, channels: int, height: int, width: int, strips: _Strips, source_values: int = 0
    ) -> None:
        self.channels = channels
        self.window = Window(0, 0, height, width, height, width)
        self.strips = strips
        self.source_values = source_values

    @property
    def values(self) -> int:
        """Number of values."""
        return self.channels * self.window.height * self.window.width

    def read(self, window: Window) -> Tensor:
        """The values in a window, (1, channels, rows, columns), on the computing device."""
        raise NotImplementedError

    def forget_above(self, row: int) -> None:
        """Lets go of what is stored and not needed for this row and those below."""
        raise NotImplementedError

    def windows(self) -> Iterator[Window]:
        """Strips of rows, so small that neither they nor what they come from has more than
        ``strips.values`` values."""
        height, width = self.window.height, self.window.width
        most = max(self.values, self.source_values)
        rows = math.ceil(height / math.ceil(most / self.strips.values))
        for top in range(0, height, rows):
            yield Window(top, 0, min(top + rows, height), width, height, width)

    @functools.cached_property
    def moments(self) -> _Moments:
        """Mean and variance of the channels."""
        moments = _Moments()
        for window in self.windows():
            moments.add(self.read(window))
        return moments


class _Stored(_Activation):
    """An activation in memory. Each strip is a tensor of its own, so that its memory returns."""

    def __init__(self, channels: int, height: int, width: int, strips: _Strips) -> None:
        super().__init__(channels, height, width, strips)
        self.moments = _Moments()
        self.parts: list[tuple[Window, Tensor]] = []

    @classmethod
    def whole(cls, values: Tensor, strips: _Strips) -> _Stored:
        """An activation that is there, (1, channels, height, width)."""
        _, channels, height, width = values.shape
        stored = cls(channels, height, width, strips)
        stored.append(stored.window, values)
        return stored

    def append(self, window: Window, values: Tensor) -> None:
        """Stores the next strip."""
        self.moments.add(values)
        # A view of a strip with its surroundings would keep those in memory.
        self.parts.append((window, values.to(self.strips.storage_device).contiguous()))

    def read(self, window: Window) -> Tensor:
        parts = [
            Window(
                max(window.top, part.top),
                window.left,
                min(window.bottom, part.bottom),
                window.right,
                window.height,
                window.width,
            )
            .crop(values, origin=part)
            .to(self.strips.compute_device)
            for part, values in self.parts
            if part.overlaps(window)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def forget_above(self, row: int) -> None:
        self.parts = [(part, values) for part, values in self.parts if part.bottom > row]


class _Convolved(_Activation):
    """A convolution with kernels of 3 x 3, after a normalisation and a nonlinearity if given."""

    def __init__(
        self,
        convolution: nn.Module,
        source: _Activation,
        channels: int,
        norm: nn.Module | None = None,
        nonlinearity: nn.Module | None = None,
    ) -> None:
        super().__init__(
            channels, source.window.height, source.window.width, source.strips, source.values
        )
        self.source = source
        self.convolution = convolution
        self.norm = norm
        self.nonlinearity = nonlinearity

    def read(self, window: Window) -> Tensor:
        outer = window.grown(1)
        return self.of(self.source.read(outer), outer, window)

    def of(self, values: Tensor, origin: Window, window: Window) -> Tensor:
        """The window, from the values of the source in ``origin``, the window and a row around."""
        if self.norm is not None:
            with _NormOfWholePicture(self.source.moments):
                values = self.norm(values)
        if self.nonlinearity is not None:
            values = self.nonlinearity(values)
        return window.crop(self.convolution(values), origin=origin)

    def forget_above(self, row: int) -> None:
        self.source.forget_above(row - 1)


class _Resnet(_Activation):
    """A residual block: the source, and what two normalised convolutions make of it, added."""

    def __init__(self, resnet: ResnetBlock2D, source: _Activation) -> None:
        height, width = source.window.height, source.window.width
        super().__init__(resnet.out_channels, height, width, source.strips, source.values)
        self.resnet = resnet
        self.source = source
        self.first = _Convolved(
            resnet.conv1, source, resnet.out_channels, resnet.norm1, resnet.nonlinearity
        )
        self.hidden: _Activation = self.first
        if source.values + self.first.values <= source.strips.most_stored:
            self.hidden = _stored(self.first, forget=False)
        self.second = _Convolved(
            resnet.conv2, self.hidden, resnet.out_channels, resnet.norm2, resnet.nonlinearity
        )

    def read(self, window: Window) -> Tensor:
        middle, outer = window.grown(1), window.grown(2)
        if self.hidden is self.first:
            values = self.source.read(outer)
            hidden = self.first.of(values, outer, middle)
            values = window.crop(values, origin=outer)
        else:
            values = self.source.read(window)
            hidden = self.hidden.read(middle)
        hidden = self.second.of(hidden, middle, window)
        if self.resnet.conv_shortcut is not None:
            values = self.resnet.conv_shortcut(values)
        return (values + hidden) / self.resnet.output_scale_factor

    def forget_above(self, row: int) -> None:
        self.source.forget_above(row - 2)
        if self.hidden is not self.first:
            self.hidden.forget_above(row - 1)


class _Downsampled(_Activation):
    """Half the resolution, by a convolution with kernels of 3 x 3 in steps of two."""

    def __init__(self, downsampler: Downsample2D, source: _Activation) -> None:
        height, width = source.window.height // 2, source.window.width // 2
        super().__init__(downsampler.out_channels, height, width, source.strips, source.values)
        self.source = source
        self.downsampler = downsampler

    def read(self, window: Window) -> Tensor:
        outer = window.grown(1)
        return window.crop(self.downsampler(self.source.read(outer.scaled(2))), origin=outer)

    def forget_above(self, row: int) -> None:
        self.source.forget_above(2 * (row - 1))


class _Upsampled(_Activation):
    """Twice the resolution: every value four times, and a convolution."""

    def __init__(self, upsampler: Upsample2D, source: _Activation) -> None:
        height, width = 2 * source.window.height, 2 * source.window.width
        super().__init__(upsampler.out_channels, height, width, source.strips, source.values)
        self.source = source
        self.upsampler = upsampler

    def read(self, window: Window) -> Tensor:
        height, width = self.source.window.height, self.source.window.width
        outer = Window(
            window.top // 2, 0, math.ceil(window.bottom / 2), width, height, width
        ).grown(1)
        return window.crop(self.upsampler(self.source.read(outer)), origin=outer.scaled(2))

    def forget_above(self, row: int) -> None:
        self.source.forget_above(row // 2 - 1)


def _stored(activation: _Activation, forget: bool = True) -> _Stored:
    """The activation, computed strip by strip and stored.

    Args:
        activation: what is to be computed.
        forget: lets go of what it is computed from, strip by strip; not if that is needed again.
    """
    height, width = activation.window.height, activation.window.width
    stored = _Stored(activation.channels, height, width, activation.strips)
    for window in activation.windows():
        stored.append(window, activation.read(window))
        if forget:
            activation.forget_above(window.bottom)
    return stored


# -- Checks, devices, precision --------------------------------------------------------------------


def _kinds(codec: Any) -> set[str]:
    """The kinds of the codec's blocks."""
    config = codec.config
    return {*config.get("down_block_types", ()), *config.get("up_block_types", ())}


def _can_be_cut(codec: Any) -> bool:
    """Whether nothing but the middle block looks at the whole picture, norms aside."""
    plain = {"DownEncoderBlock2D", "UpDecoderBlock2D"}
    return isinstance(codec, AutoencoderKL) and _kinds(codec) == plain


def _check(vae: nn.Module, tile_pixels: int) -> AutoencoderKL:
    """The codec itself, of a kind that can be cut into strips, or ``ValueError``."""
    codec: Any = uncompiled(vae)
    if not _can_be_cut(codec):
        raise ValueError(
            f"The codec is {type(codec).__name__} with blocks {sorted(_kinds(codec))}. Strips are "
            "for AutoencoderKL with DownEncoderBlock2D and UpDecoderBlock2D alone, as in SDXL. "
            "Encode and decode the whole picture with this one."
        )
    if tile_pixels < 1:
        raise ValueError(
            f"tile_pixels is {tile_pixels}; it must be 1 or more, 524288 for instance."
        )
    if torch.is_grad_enabled():
        raise ValueError(
            "A codec in strips records no gradients. Call it under torch.no_grad(), or encode and "
            "decode the whole picture."
        )
    return codec


def _strips(
    codec: AutoencoderKL,
    size: tuple[int, int],
    tile_pixels: int,
    compute_device: torch.device,
    storage_device: torch.device | None,
) -> _Strips:
    """How activations of a picture of ``size`` (height, width) are cut, and where they lie."""
    if storage_device is None:
        needed = tiled_codec_bytes(codec, *size, tile_pixels)
        fits = compute_device.type != "cuda" or needed <= _free_bytes(compute_device)
        storage_device = compute_device if fits else torch.device("cpu")
    channels = codec.config.block_out_channels[0]
    return _Strips(
        channels * tile_pixels, channels * math.prod(size), compute_device, storage_device
    )


def _free_bytes(device: torch.device) -> int:
    """Memory of a CUDA device that is free, or held by torch and not in use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _bring_in(vae: nn.Module) -> None:
    """Moves a codec that ``enable_model_cpu_offload`` has put away to where it computes."""
    hook = getattr(vae, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(vae)


@contextlib.contextmanager
def _brought_in(*blocks: nn.Module) -> Iterator[None]:
    """The weights of the blocks where they compute, as with ``enable_group_offload`` for a call.

    The parts of a block are called one by one, so that its own call, which brings them in and takes
    them away, never comes.
    """
    hooks = [
        (block, hook)
        for block in blocks
        if (registry := getattr(block, "_diffusers_hook", None))
        and (hook := registry.get_hook("group_offloading"))
    ]
    for block, hook in hooks:
        hook.pre_forward(block)
    try:
        yield
    finally:
        for block, hook in hooks:
            hook.post_forward(block, None)

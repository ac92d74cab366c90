"""A small one-step denoiser that starts at the physics of a lens: PISA carries the light,
convolutions mend it.

Untrained, this network already renders. Light is linear, energy is conserved by PISA's softmax over
queries, and nearer surfaces cover farther ones. Training adds what such a renderer cannot know:
where the edges of an imperfect disparity map belong, the radiance of clipped highlights, what
hidden surfaces look like.

The order of the computation, which is also the order of this file:

1. The latents are turned back into light; the conditioning gives disparity and signed defocus of
   each pixel. Edges of the disparity are moved onto those of the photo
   (:mod:`bokehdiff.models.disparity_refiner`).
2. Clipped highlights are given back light: at first the guess of
   :func:`bokehdiff.rendering.recover_highlights`, times what is learned.
3. PISA spreads the light of all surfaces over their circles of confusion, and they are composited
   front to back (:mod:`bokehdiff.models.light_transport`).
4. A convolutional U-Net sees the composite, what it was made of, and the photo, and corrects the
   composite.
5. The clean prediction is written as the noise that the closed-form step of the pipeline will
   remove.

Every step can be done in windows, one after the other, and then needs little memory beside what it
reads and writes: each window gets the margin that the step looks around itself, so the picture is
the same up to rounding. What reaches across the whole picture, the coarse grids on which hidden
surfaces are guessed and the light of wide circles of confusion, is small enough to be kept whole.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from ..grids import enlarged, pooled
from ..images import linear_to_srgb, srgb_to_linear
from ..rendering.frame import continued, frame_margin
from ..rendering.highlights import (
    HighlightBoost,
    clipped_and_bright,
    lamp_surroundings,
    neighbourhood,
)
from ..rendering.layered import continued_defocus
from ..windows import Window, in_windows, put, windows_of
from .convolutional_unet import ConvolutionalUNet, start_at_zero
from .disparity_refiner import DisparityRefiner
from .light_transport import GROUPS, LightTransport
from .surfaces import HIDDEN_CELL

LAMP_CELL = 2
"""Pixels per side of the cells on which the surroundings of clipped pixels are judged."""


class LightTransportUNet(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin):
    """Predicts the noise whose removal at one timestep turns an all-in-focus latent into one with
    lens blur.

    It has the call surface of ``UNet2DConditionModel`` and works on the latents of
    ``AutoencoderSpaceToDepth``. Its input is the latent with disparity and signed defocus (pixels)
    concatenated, both rearranged by ``pixel_unshuffle``.

    Args:
        block_size: pixels per latent side; must be that of the codec.
        block_out_channels: width of the convolutional U-Net at each resolution, finest first.
        layers_per_block: residual blocks per resolution and direction.
        focal_slab_radius, slab_ratio, largest_radius, tokens_per_radius, lens_parts: see
            :class:`~bokehdiff.models.light_transport.LightTransport`.
        refiner_block_out_channels: width of the network that mends the disparity first, see
            :class:`~bokehdiff.models.disparity_refiner.DisparityRefiner`; None takes it as it is.
        beta_start, beta_end, num_train_timesteps: the ``scaled_linear`` schedule the prediction is
            expressed in.
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = False
    _no_split_modules = ["LightTransport"]
    _repeated_blocks = ["ConvolutionBlock"]
    _keep_in_fp32_modules = ["light_transport", "refiner"]

    @register_to_config
    def __init__(
        self,
        block_size: int = 2,
        in_channels: int = 20,
        out_channels: int = 12,
        block_out_channels: tuple[int, ...] = (48, 64, 96),
        layers_per_block: int = 1,
        focal_slab_radius: float = 1.0,
        slab_ratio: float = math.sqrt(2.0),
        largest_radius: float = 64.0,
        tokens_per_radius: float = 2.8,
        lens_parts: int = 4,
        refiner_block_out_channels: tuple[int, ...] | None = None,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
    ):
        super().__init__()
        area = block_size**2
        if in_channels != 5 * area or out_channels != 3 * area:
            raise ValueError(
                f"block_size {block_size} needs in_channels {5 * area} (colour, disparity and "
                f"defocus of {area} pixels) and out_channels {3 * area}, but got {in_channels} "
                f"and {out_channels}."
            )
        # No buffer: a cast to half precision would shift every result.
        self.alphas_cumprod = DDPMScheduler(
            num_train_timesteps, beta_start, beta_end, beta_schedule="scaled_linear"
        ).alphas_cumprod
        width = block_out_channels[0]
        self.refiner: DisparityRefiner | None = None
        if refiner_block_out_channels is not None:
            self.refiner = DisparityRefiner(tuple(refiner_block_out_channels), layers_per_block)
        self.emission = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1),
            nn.SiLU(),
            start_at_zero(nn.Conv2d(width, area, 3, padding=1)),
        )
        self.light_transport = LightTransport(
            focal_slab_radius, slab_ratio, largest_radius, tokens_per_radius, lens_parts
        )
        # composite, photo, three differences from the composite, four coverages, disparity, defocus
        evidence_channels = 3 + 3 + 9 + 4 + 2
        self.correction = ConvolutionalUNet(
            evidence_channels * area, (3 + 3) * area, tuple(block_out_channels), layers_per_block
        )

    @property
    def token_multiple(self) -> int:
        """Height and width of the latents must be multiples of this."""
        own = 2 ** (len(self.config["block_out_channels"]) - 1)
        if self.refiner is None:
            return own
        block, of_refiner = self.config["block_size"], self.refiner.size_multiple
        return math.lcm(own, of_refiner // math.gcd(of_refiner, block))

    @property
    def window_multiple(self) -> int:
        """The side of windows must be a multiple of this, in pixels: no token, no cell and no pixel
        of the coarsest resolution is cut."""
        slabs = range(len(self.light_transport.edges) + 1)
        largest_token = max(self.light_transport.token_size(slab) for slab in slabs)
        coarsest_pixel = self.config["block_size"] * self.token_multiple
        return math.lcm(largest_token, 2 * HIDDEN_CELL, coarsest_pixel)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        window_pixels: int | None = None,
        **unused: Any,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        """Noise prediction (B, 3 block_size^2, h, w) for ``sample`` (B, 5 block_size^2, h, w) at
        ``timestep``.

        The prompt is accepted and has no effect: there is one prompt and one timestep, so what they
        would add is constant.

        Args:
            window_pixels: side of the windows in which large pictures are worked on, a multiple of
                :attr:`window_multiple`; None for the whole picture at once. It changes memory and
                time, and the result by no more than rounding.
        """
        block, area = self.config["block_size"], self.config["block_size"] ** 2
        rows, columns = sample.shape[-2:]
        if (
            sample.shape[1] != 5 * area
            or rows % self.token_multiple
            or columns % self.token_multiple
        ):
            raise ValueError(
                f"Expected a sample of {5 * area} channels whose sides are multiples of "
                f"{self.token_multiple}, got {tuple(sample.shape)}. Concatenate disparity and "
                "defocus to the latents and pad the picture."
            )
        if window_pixels is not None and (
            window_pixels <= 0 or window_pixels % self.window_multiple
        ):
            raise ValueError(
                f"window_pixels is {window_pixels!r}; it must be a multiple of "
                f"{self.window_multiple}, or None for the whole picture at once."
            )
        windows = windows_of(rows * block, columns * block, window_pixels)

        def pixels_of(window: Window, first: int = 0, last: int = 5) -> torch.Tensor:
            """Some of the colour, disparity and defocus of each pixel, (B, 5, rows, columns)."""
            channels = window.crop(sample, block)[:, first * area : last * area]
            return F.pixel_shuffle(channels.float(), block)

        photo = in_windows(lambda window: shown_photo(pixels_of(window, 0, 3)), windows)
        maps = in_windows(lambda window: pixels_of(window, 3, 5), windows)
        if self.refiner is not None:
            with torch.no_grad():  # what it chooses depends on its weights in steps
                maps = self.refiner(photo, maps, window_pixels)
        emission = self.emission_of(photo, maps, windows, sample.dtype)
        framed = [
            with_frame(*(values[image : image + 1] for values in (photo, emission, maps)))
            for image in range(len(photo))
        ]
        del photo, emission  # a large picture needs their memory
        transported = self.transport(framed, (rows * block, columns * block), window_pixels)

        def candidates_of(
            window: Window, photo_light: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
            """The composite, its coverage, and what the pixel may be instead."""
            composite, coverage = normalise(window.crop(transported["composite"]), photo_light)
            groups = [window.crop(transported[name]) for name in GROUPS]
            return composite, coverage, [normalise(group, composite)[0] for group in groups]

        def evidence(latent_window: Window) -> torch.Tensor:
            window = latent_window.scaled(block)
            photo = shown_photo(pixels_of(window, 0, 3))
            disparity, defocus = window.crop(maps).split(1, 1)
            composite, coverage, candidates = candidates_of(window, srgb_to_linear(photo))
            shown = linear_to_srgb(composite.clamp(0, 1))
            differences = [linear_to_srgb(one.clamp(0, 1)) - shown for one in candidates]
            coverages = [window.crop(transported[name])[:, 3:4] for name in GROUPS]
            squashed = torch.asinh(defocus)
            seen = [shown, photo, *differences, *coverages, coverage, disparity, squashed]
            return F.pixel_unshuffle(torch.cat(seen, 1), block).to(sample.dtype)

        timestep = torch.as_tensor(timestep).long().cpu()
        alpha_bar = self.alphas_cumprod[timestep].reshape(-1, 1, 1, 1).to(sample.device)

        def noise_of(latent_window: Window, correction: torch.Tensor) -> torch.Tensor:
            window = latent_window.scaled(block)
            photo_light = srgb_to_linear(shown_photo(pixels_of(window, 0, 3)))
            composite, _, candidates = candidates_of(window, photo_light)
            correction = F.pixel_shuffle(correction, block).float()
            blend, residual = correction[:, :3], correction[:, 3:]
            for index, candidate in enumerate(candidates):
                composite = composite + blend[:, index : index + 1] * (candidate - composite)
            clean = linear_to_srgb(composite.clamp(0, 1)) + residual
            clean_latents = F.pixel_unshuffle(clean * 2 - 1, block)
            latents = latent_window.crop(sample)[:, : 3 * area].float()
            noise = (latents - alpha_bar.sqrt() * clean_latents) / (1 - alpha_bar).sqrt()
            return noise.to(sample.dtype)

        side = None if window_pixels is None else window_pixels // block
        noise = self.correction(evidence, noise_of, (rows, columns), side)
        return UNet2DConditionOutput(sample=noise) if return_dict else (noise,)

    def emission_of(
        self, photo: torch.Tensor, maps: torch.Tensor, windows: list[Window], dtype: torch.dtype
    ) -> torch.Tensor:
        """(B, 1, H, W): how many times brighter than it looks each pixel is.

        Only a clipped highlight is, everything else shows its radiance. It starts at the guess of
        :func:`~bokehdiff.rendering.recover_highlights` and learns a factor from 1/e to e^6.

        Args:
            photo: (B, 3, H, W) display colour in [0, 1].
            maps: (B, 2, H, W) disparity and signed defocus.
            windows: of the picture.
            dtype: in which the convolutions compute.
        """
        block, boost = self.config["block_size"], HighlightBoost()

        def cells_of(window: Window) -> torch.Tensor:
            known = clipped_and_bright(window.crop(photo), boost.threshold)
            return pooled(torch.cat(known, 1), LAMP_CELL)

        height, width = photo.shape[-2:]
        cells = None
        for window in windows:
            cells = put(cells, window, cells_of(window), LAMP_CELL)
        assert cells is not None, "no windows"
        reach = max(1, round(neighbourhood(height, width) / LAMP_CELL))
        surroundings = lamp_surroundings(cells[:, :1], cells[:, 1:], reach)

        def emission_in(outer: Window) -> torch.Tensor:
            colour = outer.crop(photo)
            disparity, defocus = outer.crop(maps).split(1, 1)
            known = torch.cat([colour, disparity, torch.asinh(defocus)], 1)
            known = F.pixel_unshuffle(known, block).to(dtype)
            gain = F.pixel_shuffle(self.emission(known), block).float()
            # One cell more on each side, by which the enlargement is smooth across windows.
            around = outer.grown(2 * LAMP_CELL)
            lamp = outer.crop(
                enlarged(around.crop(surroundings, LAMP_CELL), LAMP_CELL), origin=around
            )
            clipped, _ = clipped_and_bright(colour, boost.threshold)
            whitish = ((colour.amax(1, keepdim=True) - 0.96) / 0.04).clamp(0, 1)
            lamp = 1 + (boost.gain - 1) * clipped * lamp
            return lamp * torch.exp(whitish * gain.clamp(-1, 6))

        return in_windows(emission_in, windows, margin=2 * block)  # two convolutions of latents

    def transport(
        self,
        framed: list[tuple[torch.Tensor, ...]],
        size: tuple[int, int],
        window_pixels: int | None,
    ) -> dict[str, torch.Tensor]:
        """What :class:`~bokehdiff.models.light_transport.LightTransport` makes of pictures that go
        on a little beyond their frame: without that the border would be a one-sided mean of the
        inside. Each picture is rendered on its own, by its own slabs.

        Args:
            framed: what :func:`with_frame` gives for each picture; emptied on the way, as a large
                picture needs the memory.
            size: height and width of the pictures without margin.
            window_pixels: as in :meth:`forward`.
        """
        rendered: dict[str, list[torch.Tensor]] = {}
        height, width = size
        while framed:
            photo, emission, disparity, defocus = framed.pop(0)
            rows, columns = photo.shape[-2:]
            margin = (rows - height) // 2
            frame = Window(margin, margin, margin + height, margin + width, rows, columns)
            windows = windows_of(rows, columns, window_pixels)
            # Eight bits would band the light.
            with torch.autocast(photo.device.type, enabled=False):
                light = srgb_to_linear(photo)
                del photo
                sums = self.light_transport(light, emission, disparity, defocus, windows)
            for name, values in sums.items():
                rendered.setdefault(name, []).append(frame.crop(values))
        return {
            name: torch.cat(values) if len(values) > 1 else values[0]
            for name, values in rendered.items()
        }


def with_frame(
    photo: torch.Tensor, emission: torch.Tensor, maps: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Photo, emission, disparity and defocus of one picture, (1, ., H + 2 m, W + 2 m): colours are
    repeated beyond the frame, and surfaces go on straight."""
    disparity, defocus = maps.split(1, 1)
    margin = frame_margin(defocus)
    wide = [continued(values, margin) for values in (photo, emission, disparity)]
    return *wide, continued_defocus(defocus[0, 0], margin)[None, None]


def shown_photo(pixels: torch.Tensor) -> torch.Tensor:
    """Display colour in [0, 1] (B, 3, H, W) of pixels whose first channels hold it in [-1, 1]."""
    return (pixels[:, :3] / 2 + 0.5).clamp(0, 1)


def normalise(
    premultiplied: torch.Tensor, fallback: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(linear colour (B, 3, H, W), coverage (B, 1, H, W)); the fallback colour takes over as
    coverage vanishes."""
    coverage = premultiplied[:, 3:4].clamp_min(0)
    presence = (coverage / 0.02).clamp(0, 1)
    colour = premultiplied[:, :3] / coverage.clamp_min(1e-4)
    return colour * presence + fallback * (1 - presence), coverage

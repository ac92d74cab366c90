"""A small one-step denoiser that starts at the physics of a lens: PISA carries the light,
convolutions mend it.

Untrained, this network already renders. Light is linear, energy is conserved by PISA's softmax over
queries, and nearer surfaces cover farther ones. Training adds what such a renderer cannot know:
what hidden surfaces look like, partly covered pixels, the radiance of clipped highlights, errors
of the disparity.

The order of the computation, which is also the order of this file:

1. The latents are turned back into linear light; the conditioning gives disparity and signed
   defocus of each pixel.
2. Pixels are sorted into *slabs* of similar signed defocus. What an occluder hides is guessed from
   the farther surfaces around it, because a lens sees a part of it. A slab with wide blur is pooled
   to coarse tokens, so that a circle of confusion is always a few tokens wide and the cost of PISA
   does not grow with the blur.
3. One PISA self-attention, shared by all slabs, spreads the light of each slab over its circles of
   confusion.
4. The slabs are composited from the nearest to the farthest: a pixel accepts light until it is
   full.
5. A convolutional U-Net sees the composite, what it was made of, and the photo, and corrects the
   composite.
6. The clean prediction is written as the noise that the closed-form step of the pipeline will
   remove.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from ..attention import PisaAttnProcessor, PisaConfig, PisaContext, PisaGeometry
from ..attention.config import COC_UNITS_PER_TOKEN
from ..grids import enlarged, filled_from_surroundings, pooled
from ..images import linear_to_srgb, srgb_to_linear

GROUPS = ("nearer", "own", "farther")  # light by where it comes from, seen from the pixel's surface
LIGHT_CHANNELS = 4  # red, green, blue and the column of ones that counts how much light arrived


def slab_edges(focal_slab_radius: float, slab_ratio: float, largest_radius: float) -> torch.Tensor:
    """Signed defocus in pixels at which one slab ends and the next begins, ascending.

    The focal slab reaches from ``-focal_slab_radius`` to ``focal_slab_radius``; each further slab
    is ``slab_ratio`` times wider than the one before. The outermost two are open and take all that
    is blurred beyond ``largest_radius``.
    """
    count = (
        math.ceil(math.log(max(largest_radius / focal_slab_radius, 1.0)) / math.log(slab_ratio)) + 1
    )
    positive = focal_slab_radius * slab_ratio ** torch.arange(count, dtype=torch.float64)
    return torch.cat([-positive.flip(0), positive])


def pisa_kernel_second_moment(radius_tokens: torch.Tensor, slope: float) -> torch.Tensor:
    """Mean squared distance, in tokens^2, over which PISA with equal logits spreads one token of a
    given radius."""
    reach = math.ceil(float(radius_tokens.max()) + 28.0 / slope)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    squared = (offsets[:, None] ** 2 + offsets[None, :] ** 2).flatten()
    weights = torch.sigmoid(slope * (radius_tokens[:, None].double() - squared.sqrt()))
    return (weights * squared).sum(1) / weights.sum(1)


def slope_per_token(config: PisaConfig) -> float:
    """Slope of the edge of PISA's soft circle, per token of distance."""
    return math.log(config.hardness) * (config.token_spacing or COC_UNITS_PER_TOKEN)


@functools.lru_cache(maxsize=8)
def calibration_table(slope: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Radii from 0 to 12 tokens in steps of 0.01, and the second moment PISA gives each of them."""
    radius = torch.arange(0, 12, 0.01, dtype=torch.float64)
    moment = pisa_kernel_second_moment(radius, slope).cummax(0).values
    return radius.to(device), moment.to(device)


def calibrated_token_radius(
    radius_pixels: torch.Tensor, token_size: int, slope: float
) -> torch.Tensor:
    """Radius in tokens whose rendered spread equals that of a uniform disc of ``radius_pixels``.

    A disc has the second moment r^2/2. What is rendered on tokens is wider than PISA's own kernel
    by the spread of :func:`pooled`, (1 - 1/t^2) / 12 tokens^2 on each axis, and of
    :func:`enlarged`, (1 - 1/t^2) / 4. The radius is chosen so that the sum is right.
    """
    table_radius, table_moment = calibration_table(slope, radius_pixels.device)
    wanted = radius_pixels.double() ** 2 / (2 * token_size**2)
    wanted = (wanted - 2 / 3 * (1 - 1 / token_size**2)).clamp_min(0)
    above = torch.searchsorted(table_moment, wanted.contiguous()).clamp(1, len(table_moment) - 1)
    low, high = table_moment[above - 1], table_moment[above]
    fraction = ((wanted - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    inside = table_radius[above - 1] + fraction * 0.01
    wide = (2 * wanted).sqrt()  # a wide token disc is a disc
    return torch.where(wanted > table_moment[-1], wide, inside).to(radius_pixels.dtype)


def surface_channels(
    light: torch.Tensor, disparity: torch.Tensor, defocus: torch.Tensor
) -> torch.Tensor:
    """(B, 7, H, W): colour and a column of ones, radius; disparity and squashed defocus, by which
    queries and keys know where they lie."""
    return torch.cat(
        [light, torch.ones_like(defocus), defocus.abs(), disparity, torch.asinh(defocus)], 1
    )


def hidden_surfaces(
    light: torch.Tensor, disparity: torch.Tensor, defocus: torch.Tensor, slab_of_pixel: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What probably lies behind each visible surface: the farther surfaces around it, continued.

    A lens looks around the edge of an occluder. How much of the hidden surface it sees is known,
    what is there is not; the nearest visible part of anything farther is the best guess.

    Args:
        light: (B, 3, H, W) linear light of the photo.
        disparity, defocus: (B, 1, H, W), of the visible surface.
        slab_of_pixel: (B, 1, H, W) number of its slab, 0 the farthest.

    Returns:
        light (B, 3, H, W), disparity and defocus (B, 1, H, W) of the surface behind, and where the
        lens can see that far behind the edge (B, 1, H, W).
    """
    cell = 4  # pixels; a guess needs no more detail
    height, width = defocus.shape[-2:]
    visible = torch.cat([light, disparity, defocus, torch.ones_like(defocus)], 1)
    hidden = torch.zeros_like(visible[:, :-1])
    distance = torch.full_like(defocus, math.inf)
    slabs = torch.unique(slab_of_pixel).tolist()
    cells = {slab: pooled(visible * (slab_of_pixel == slab), cell) for slab in slabs}
    for slab in slabs:
        # The slabs just behind may hold the same slanted surface: the first does not count, and
        # the farther away the more.
        behind = [cells[other] * (slab - 1 - other) for other in slabs if other < slab - 1]
        if not behind:
            continue
        values, steps = filled_from_surroundings(torch.stack(behind).sum(0))
        values = F.interpolate(values, scale_factor=cell, mode="bilinear", align_corners=False)
        steps = F.interpolate(steps, scale_factor=cell)
        here = slab_of_pixel == slab
        hidden = torch.where(here, values[..., :height, :width], hidden)
        distance = torch.where(here, cell * steps[..., :height, :width], distance)
    light, disparity, hidden_defocus = hidden[:, :3], hidden[:, 3:4], hidden[:, 4:5]
    seen = distance <= defocus.abs() + hidden_defocus.abs() + cell
    return light, disparity, hidden_defocus, seen


def start_at_zero(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer, its output zero until it is trained."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ConvolutionBlock(nn.Module):
    """Two 3x3 convolutions around a residual connection; the second starts at zero, so the block
    starts as identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        start_at_zero(self.conv2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.conv2(F.silu(self.conv1(F.silu(hidden))))


class ConvolutionalUNet(nn.Module):
    """Plain U-Net: one entry of ``channels`` per resolution, ``blocks`` residual blocks on the way
    down and up."""

    def __init__(self, in_channels: int, out_channels: int, channels: tuple[int, ...], blocks: int):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down = nn.ModuleList(
            nn.Sequential(*(ConvolutionBlock(width) for _ in range(blocks))) for width in channels
        )
        self.up = nn.ModuleList(
            nn.Sequential(*(ConvolutionBlock(width) for _ in range(blocks)))
            for width in channels[:-1]
        )
        pairs = list(zip(channels[:-1], channels[1:], strict=True))
        self.downsamplers = nn.ModuleList(nn.Conv2d(4 * fine, coarse, 1) for fine, coarse in pairs)
        self.upsamplers = nn.ModuleList(nn.Conv2d(coarse, 4 * fine, 1) for fine, coarse in pairs)
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)
        start_at_zero(self.conv_out)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.conv_in(hidden)
        skips = []
        for level, block in enumerate(self.down):
            hidden = block(hidden)
            if level < len(self.downsamplers):
                skips.append(hidden)
                hidden = self.downsamplers[level](F.pixel_unshuffle(hidden, 2))
        for level in reversed(range(len(self.up))):
            hidden = skips[level] + F.pixel_shuffle(self.upsamplers[level](hidden), 2)
            hidden = self.up[level](hidden)
        return self.conv_out(F.silu(hidden))


class LightTransport(nn.Module):
    """Spreads the light of slabs over their circles of confusion with PISA and composites them
    front to back.

    Args:
        focal_slab_radius, slab_ratio, largest_radius: see :func:`slab_edges`, pixels.
        tokens_per_radius: a slab is pooled to tokens of twice the size as soon as its smallest
            circle of confusion is still this many tokens wide.
    """

    edges: torch.Tensor

    def __init__(
        self,
        focal_slab_radius: float,
        slab_ratio: float,
        largest_radius: float,
        tokens_per_radius: float,
    ):
        super().__init__()
        # Two more channels, disparity and defocus, are seen by queries and keys only.
        self.attn: Attention = Attention(
            query_dim=LIGHT_CHANNELS + 2,
            heads=1,
            dim_head=LIGHT_CHANNELS,
            bias=False,
            out_bias=False,
            out_dim=LIGHT_CHANNELS,
            processor=PisaAttnProcessor(PisaContext()),
        )
        self.register_buffer(
            "edges",
            slab_edges(focal_slab_radius, slab_ratio, largest_radius).float(),
            persistent=False,
        )
        self.tokens_per_radius = tokens_per_radius
        # Zero logits: PISA starts as an even spread. Only one factor is zero, or neither would get
        # a gradient.
        nn.init.normal_(self.attn.to_q.weight, std=0.1)
        nn.init.zeros_(self.attn.to_k.weight)
        with torch.no_grad():
            self.attn.to_v.weight.copy_(torch.eye(LIGHT_CHANNELS, LIGHT_CHANNELS + 2))
            self.attn.to_out[0].weight.copy_(torch.eye(LIGHT_CHANNELS))

    def token_size(self, slab: int) -> int:
        """Pixels per token side for one slab (0 is the farthest), a power of two."""
        edges = self.edges.tolist()
        if slab in (0, len(edges)):
            nearest = abs(edges[0])
        else:
            low, high = edges[slab - 1], edges[slab]
            nearest = 0.0 if low < 0 < high else min(abs(low), abs(high))
        size = 1
        while 2 * size * self.tokens_per_radius <= nearest * 1.0001:
            size *= 2
        return size

    def spread(self, surface: torch.Tensor, slab: int, member: torch.Tensor) -> torch.Tensor:
        """What the light of one slab leaves at every pixel: (B, 4, H, W), colour times coverage,
        and coverage.

        Args:
            surface: (B, 7, H, W), see :func:`surface_channels`.
            slab: its number.
            member: (B, 1, H, W), pixels whose surface lies in it.
        """
        processor = self.attn.processor
        if not isinstance(processor, PisaAttnProcessor) or processor.context is None:
            raise RuntimeError(
                f"The light transport attention runs {type(processor).__name__} instead of PISA: "
                "something replaced the attention processors. Put it back with "
                "bokehdiff.attention.install_pisa(unet, ['light_transport.attn'])."
            )
        height, width = surface.shape[-2:]
        size = self.token_size(slab)
        # Only members send light; where a token lies is asked of every token.
        lit, placed = surface[:, : LIGHT_CHANNELS + 1], surface[:, LIGHT_CHANNELS + 1 :]
        tokens = pooled(torch.cat([lit * member, placed], 1), size)
        carried, radius, placed = tokens.split([LIGHT_CHANNELS, 1, 2], 1)
        coverage = carried[:, -1:]
        radius = radius / coverage.clamp_min(1e-6)
        config = processor.context.config
        geometry = PisaGeometry.build(
            calibrated_token_radius(radius, size, slope_per_token(config)).detach(),
            None,  # one slab lies at one depth; what covers what is settled by the compositing
            config=config,
            emitters=coverage > 0,
            byte_budget=0,  # tables that serve one layer once are not worth keeping
        )
        tokens = torch.cat([carried, placed], 1)
        tokens = tokens.flatten(2).transpose(1, 2).to(self.attn.to_q.weight.dtype)
        arrived = self.attn(tokens, pisa_geometry=geometry).to(surface.dtype)
        arrived = arrived.transpose(1, 2).unflatten(2, carried.shape[-2:])
        return enlarged(arrived, size)[..., :height, :width]

    def forward(
        self, light: torch.Tensor, disparity: torch.Tensor, defocus: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Render (B, 3, H, W) linear light.

        Returns premultiplied (B, 4, H, W) sums: ``composite`` (light accepted front to
        back, coverage at most 1) and, relative to the pixel's own surface, all that arrived from
        ``nearer``, ``own`` and ``farther`` slabs.
        """
        slab_of_pixel = torch.bucketize(defocus.contiguous(), self.edges)
        behind_light, behind_disparity, behind_defocus, seen = hidden_surfaces(
            light, disparity, defocus, slab_of_pixel
        )
        slab_behind = torch.bucketize(behind_defocus.contiguous(), self.edges).clamp(
            max=slab_of_pixel - 1
        )
        slab_behind = torch.where(seen, slab_behind, -1)
        visible = surface_channels(light, disparity, defocus)
        hidden = surface_channels(behind_light, behind_disparity, behind_defocus)
        composite = torch.zeros_like(visible[:, :LIGHT_CHANNELS])
        groups = {name: torch.zeros_like(composite) for name in GROUPS}
        # A hidden surface may lie in a slab in which nothing is visible.
        inhabited = torch.unique(torch.cat([slab_of_pixel, slab_behind]))
        for slab in inhabited[inhabited >= 0].flip(0).tolist():  # the nearest first
            behind = slab_behind == slab
            surface = torch.where(behind, hidden, visible)
            arrived = self.spread(surface, slab, (slab_of_pixel == slab) | behind)
            coverage = arrived[:, 3:4].clamp_min(0)
            room = (1 - composite[:, 3:4]).clamp_min(0)
            composite = composite + arrived * (
                torch.minimum(coverage, room) / coverage.clamp_min(1e-6)
            )
            step = slab - slab_of_pixel
            groups["nearer"] = groups["nearer"] + arrived * (step > 1)
            groups["own"] = groups["own"] + arrived * (step.abs() <= 1)
            groups["farther"] = groups["farther"] + arrived * (step < -1)
        return {"composite": composite, **groups}


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
        beta_start, beta_end, num_train_timesteps: the ``scaled_linear`` schedule the prediction is
            expressed in.
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = False
    _no_split_modules = ["LightTransport"]
    _keep_in_fp32_modules = ["light_transport"]

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
        self.emission = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1),
            nn.SiLU(),
            start_at_zero(nn.Conv2d(width, area, 3, padding=1)),
        )
        self.light_transport = LightTransport(
            focal_slab_radius, slab_ratio, largest_radius, tokens_per_radius
        )
        # composite, photo, three differences from the composite, four coverages, disparity, defocus
        evidence_channels = 3 + 3 + 9 + 4 + 2
        self.correction = ConvolutionalUNet(
            evidence_channels * area, (3 + 3) * area, tuple(block_out_channels), layers_per_block
        )

    @property
    def token_multiple(self) -> int:
        """Height and width of the latents must be multiples of this."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        **unused: Any,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        """Noise prediction (B, 3 block_size^2, h, w) for ``sample`` (B, 5 block_size^2, h, w) at
        ``timestep``.

        The prompt is accepted and has no effect: there is one prompt and one timestep, so what they
        would add is constant.
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
        latents = sample[:, : 3 * area]
        pixels = F.pixel_shuffle(sample.float(), block)  # colour, disparity, defocus of each pixel
        photo = (pixels[:, :3] / 2 + 0.5).clamp(0, 1)
        disparity, defocus = pixels[:, 3:4], pixels[:, 4:5]

        squashed = torch.asinh(defocus)
        known = F.pixel_unshuffle(torch.cat([photo, disparity, squashed], 1), block)
        gain = F.pixel_shuffle(self.emission(known.to(sample.dtype)), block).float()
        # Only a clipped highlight may be brighter than it looks: everything else shows its
        # radiance.
        clipped = ((photo.amax(1, keepdim=True) - 0.96) / 0.04).clamp(0, 1)
        photo_light = srgb_to_linear(photo)
        light = photo_light * torch.exp(clipped * gain.clamp(-1, 6))
        with torch.autocast(sample.device.type, enabled=False):  # eight bits would band the light
            transported = self.light_transport(light, disparity, defocus)

        composite, coverage = normalise(transported["composite"], photo_light)
        shown = linear_to_srgb(composite.clamp(0, 1))
        candidates = [normalise(transported[name], composite)[0] for name in GROUPS]
        differences = [linear_to_srgb(candidate.clamp(0, 1)) - shown for candidate in candidates]
        coverages = [transported[name][:, 3:4] for name in GROUPS]
        evidence = [shown, photo, *differences, *coverages, coverage, disparity, squashed]
        correction = self.correction(
            F.pixel_unshuffle(torch.cat(evidence, 1), block).to(sample.dtype)
        )
        correction = F.pixel_shuffle(correction, block).float()
        blend, residual = correction[:, :3], correction[:, 3:]
        for index, candidate in enumerate(candidates):
            composite = composite + blend[:, index : index + 1] * (candidate - composite)
        clean = linear_to_srgb(composite.clamp(0, 1)) + residual

        clean_latents = F.pixel_unshuffle(clean * 2 - 1, block)
        timestep = torch.as_tensor(timestep).long().cpu()
        alpha_bar = self.alphas_cumprod[timestep].reshape(-1, 1, 1, 1).to(sample.device)
        noise = (latents.float() - alpha_bar.sqrt() * clean_latents) / (1 - alpha_bar).sqrt()
        noise = noise.to(sample.dtype)
        return UNet2DConditionOutput(sample=noise) if return_dict else (noise,)


def normalise(
    premultiplied: torch.Tensor, fallback: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(linear colour (B, 3, H, W), coverage (B, 1, H, W)); the fallback colour takes over as
    coverage vanishes."""
    coverage = premultiplied[:, 3:4].clamp_min(0)
    presence = (coverage / 0.02).clamp(0, 1)
    colour = premultiplied[:, :3] / coverage.clamp_min(1e-4)
    return colour * presence + fallback * (1 - presence), coverage

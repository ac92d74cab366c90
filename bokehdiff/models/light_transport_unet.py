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

Every step can be done in windows, one after the other, and then needs little memory beside what it
reads and writes: each window gets the margin that the step looks around itself, so the picture is
the same up to rounding. What reaches across the whole picture, the coarse grids on which hidden
surfaces are guessed and the light of wide circles of confusion, is small enough to be kept whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
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
from ..grids import enlarged, filled_from_coarser, filled_from_surroundings, pooled
from ..images import linear_to_srgb, srgb_to_linear
from ..windows import Window, in_windows, put, windows_of
from .convolutional_unet import ConvolutionalUNet, start_at_zero

GROUPS = ("nearer", "own", "farther")  # light by where it comes from, seen from the pixel's surface
LIGHT_CHANNELS = 4  # red, green, blue and the column of ones that counts how much light arrived

HIDDEN_CELL = 4
"""Pixels per side of the cells on which hidden surfaces are guessed; a guess has no more detail."""

TOKENS_AT_ONCE = 512
"""Rows and columns of tokens that PISA works on together where there are windows."""


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


def reach_in_tokens(radius_tokens: float, config: PisaConfig) -> float:
    """Tokens from which on PISA's soft circle of this radius is exactly 0; infinite without cutoff,
    or where the length of a token depends on the size of the grid."""
    slope = math.log(config.hardness)
    if config.token_spacing is None or config.cutoff <= 0 or slope <= 0:
        return math.inf
    beyond = -math.log(config.cutoff) / slope
    return math.ceil((radius_tokens * COC_UNITS_PER_TOKEN + beyond) / config.token_spacing)


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


def numbers_in(values: torch.Tensor) -> set[int]:
    """The different whole numbers from -1 up in a tensor."""
    return {number - 1 for number in (values.flatten() + 1).bincount().nonzero()[:, 0].tolist()}


def hidden_surfaces(
    light: torch.Tensor,
    disparity: torch.Tensor,
    defocus: torch.Tensor,
    slab_of_pixel: torch.Tensor,
    windows: list[Window] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What probably lies behind each visible surface: the farther surfaces around it, continued.

    A lens looks around the edge of an occluder. How much of the hidden surface it sees is known,
    what is there is not; the nearest visible part of anything farther is the best guess.

    Args:
        light: (B, 3, H, W) linear light of the photo.
        disparity, defocus: (B, 1, H, W), of the visible surface.
        slab_of_pixel: (B, 1, H, W) number of its slab, 0 the farthest.
        windows: windows of the picture, whose sides are multiples of two cells; by default one.

    Returns:
        light (B, 3, H, W), disparity and defocus (B, 1, H, W) of the surface behind, and where the
        lens can see that far behind the edge (B, 1, H, W).
    """
    height, width = defocus.shape[-2:]
    windows = windows or windows_of(height, width)
    slabs_of_windows = [numbers_in(window.crop(slab_of_pixel)) for window in windows]
    farthest, nearest = min(map(min, slabs_of_windows)), max(map(max, slabs_of_windows))

    def cells_of(slab: int) -> torch.Tensor:
        """What is visible of one slab, times how much of each cell it fills, and that share."""
        rows, columns = -(-height // HIDDEN_CELL), -(-width // HIDDEN_CELL)
        cells = light.new_zeros(light.shape[0], 6, rows, columns)
        for window, slabs in zip(windows, slabs_of_windows, strict=True):
            if slab in slabs:
                here = window.crop(slab_of_pixel) == slab
                maps = [window.crop(values) * here for values in (light, disparity, defocus)]
                part = pooled(torch.cat([*maps, here.to(light.dtype)], 1), HIDDEN_CELL)
                cells = put(cells, window, part, HIDDEN_CELL)
        return cells

    hidden = light.new_zeros(light.shape[0], 5, height, width)
    seen = torch.zeros_like(slab_of_pixel, dtype=torch.bool)
    # The slabs just behind may hold the same slanted surface: the first does not count, and the
    # farther away the more. `farther` is the sum of all slabs behind, `known` the weighted sum.
    farther = cells_of(farthest)
    known = torch.zeros_like(farther)
    for slab in range(farthest + 1, nearest + 1):
        if slab > farthest + 1 and any(slab in slabs for slabs in slabs_of_windows):
            coarse, coarse_steps = filled_from_surroundings(pooled(known, 2))
            for window, slabs in zip(windows, slabs_of_windows, strict=True):
                if slab not in slabs:
                    continue
                outer = window.grown(2 * HIDDEN_CELL)
                values, steps = filled_from_coarser(
                    outer.crop(known, HIDDEN_CELL),
                    outer.crop(coarse, 2 * HIDDEN_CELL),
                    outer.crop(coarse_steps, 2 * HIDDEN_CELL),
                )
                values = F.interpolate(
                    values, scale_factor=HIDDEN_CELL, mode="bilinear", align_corners=False
                )
                steps = F.interpolate(steps, scale_factor=HIDDEN_CELL)
                values, steps = (window.crop(one, origin=outer) for one in (values, steps))
                here = window.crop(slab_of_pixel) == slab
                reach = window.crop(defocus).abs() + values[:, 4:5].abs() + HIDDEN_CELL
                in_sight = here & (HIDDEN_CELL * steps <= reach)
                seen = put(seen, window, window.crop(seen) | in_sight)
                hidden = put(hidden, window, torch.where(here, values, window.crop(hidden)))
        known = known + farther
        farther = farther + cells_of(slab)
    return hidden[:, :3], hidden[:, 3:4], hidden[:, 4:5], seen


class SlabTokens:
    """The tokens of one slab, each window of them made when it is first looked at.

    Args:
        make: of a window; gives (B, 7, rows, columns): colour, a column of ones and radius in
            pixels of what lies in the slab, all times coverage; disparity and squashed defocus of
            all that is there, by which queries and keys know where they lie.
        windows: of the picture, in pixels.
        size: pixels per token side.
    """

    def __init__(
        self, make: Callable[[Window], torch.Tensor], windows: list[Window], size: int
    ) -> None:
        self.size = size
        self._make, self._missing = make, list(windows)
        self._tokens: torch.Tensor | None = None

    def crop(self, wanted: Window) -> torch.Tensor:
        """(B, 7, rows, columns) of a window of the grid of tokens."""
        pixels = wanted.scaled(self.size)
        for window in [one for one in self._missing if one.overlaps(pixels)]:
            self._tokens = put(self._tokens, window, self._make(window), self.size)
            self._missing.remove(window)
        assert self._tokens is not None, "no windows"
        return wanted.crop(self._tokens)


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

    def slab_of(self, defocus: torch.Tensor) -> torch.Tensor:
        """Number of the slab in which surfaces of this signed defocus lie, int16."""
        return torch.bucketize(defocus.contiguous(), self.edges, out_int32=True).short()

    def spread(self, tokens: SlabTokens, block: Window) -> tuple[Window, torch.Tensor] | None:
        """What the light that one block of tokens sends leaves at all tokens that it reaches.

        Args:
            tokens: those of a slab.
            block: a window of their grid.

        Returns:
            The window reached and, on it, (B, 4, rows, columns) colour times coverage, and
            coverage; None where nothing sends light.
        """
        processor = self.attn.processor
        if not isinstance(processor, PisaAttnProcessor) or processor.context is None:
            raise RuntimeError(
                f"The light transport attention runs {type(processor).__name__} instead of PISA: "
                "something replaced the attention processors. Put it back with "
                "bokehdiff.attention.install_pisa(unet, ['light_transport.attn'])."
            )
        config = processor.context.config
        column = tokens.crop(block)[:, LIGHT_CHANNELS - 1 : LIGHT_CHANNELS + 1].detach()
        coverage, pixels = column.split(1, 1)
        sends = coverage > 0
        if not bool(sends.any()):
            return None
        pixels = pixels[sends] / coverage[sends].clamp_min(1e-6)
        radius = torch.zeros_like(coverage)
        radius[sends] = calibrated_token_radius(pixels, tokens.size, slope_per_token(config))

        reach = reach_in_tokens(float(radius.max()), config)
        outer = block.grown(int(min(reach, max(block.height, block.width))))
        around = tokens.crop(outer)
        maps = [torch.zeros_like(around[:, :1]), torch.zeros_like(around[:, :1], dtype=torch.bool)]
        for outer_map, block_map in zip(maps, (radius, sends), strict=True):
            block.crop(outer_map, origin=outer).copy_(block_map)
        geometry = PisaGeometry.build(
            maps[0],
            None,  # one slab lies at one depth; what covers what is settled by the compositing
            config=config,
            emitters=maps[1],
            byte_budget=0,  # tables that serve one layer once are not worth keeping
        )
        carried, _, placed = around.split([LIGHT_CHANNELS, 1, 2], 1)
        states = torch.cat([carried, placed], 1).flatten(2).transpose(1, 2)
        arrived = self.attn(states.to(self.attn.to_q.weight.dtype), pisa_geometry=geometry)
        arrived = arrived.to(around.dtype).transpose(1, 2)
        return outer, arrived.unflatten(2, around.shape[-2:])

    def spread_all(
        self, tokens: SlabTokens, grid: tuple[int, int], senders: list[Window], at_once: int | None
    ) -> tuple[torch.Tensor, list[Window]]:
        """What the light of a whole slab leaves at each token, and where any arrives.

        Args:
            tokens: those of the slab.
            grid: rows and columns of tokens.
            senders: windows of pixels outside of which nothing sends light.
            at_once: rows and columns of tokens that send their light together; None for all.

        Returns:
            (B, 4, *grid) as of :meth:`spread`, and windows of the grid.
        """
        arrived, reached = None, []
        for block in windows_of(*grid, at_once):
            pixels = block.scaled(tokens.size)
            if not any(pixels.overlaps(sender) for sender in senders):
                continue
            found = self.spread(tokens, block)
            if found is None:
                continue
            outer, part = found
            reached.append(outer)
            if at_once is None:
                return part, reached
            if arrived is None:
                arrived = part.new_zeros(*part.shape[:2], *grid)
            outer.crop(arrived).add_(part)
        assert arrived is not None, "a slab without light"
        return arrived, reached

    @torch.compiler.disable(reason="Which slabs there are depends on the scene.")
    def forward(
        self,
        light: torch.Tensor,
        disparity: torch.Tensor,
        defocus: torch.Tensor,
        windows: list[Window] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Render (B, 3, H, W) linear light.

        Args:
            light: (B, 3, H, W).
            disparity, defocus: (B, 1, H, W); defocus signed, in pixels.
            windows: windows of the picture, whose sides are multiples of :attr:`window_multiple`;
                by default one.

        Returns premultiplied (B, 4, H, W) sums: ``composite`` (light accepted front to
        back, coverage at most 1) and, relative to the pixel's own surface, all that arrived from
        ``nearer``, ``own`` and ``farther`` slabs.
        """
        height, width = defocus.shape[-2:]
        windows = windows or windows_of(height, width)
        slab_of_pixel = in_windows(lambda window: self.slab_of(window.crop(defocus)), windows)
        *hidden, seen = hidden_surfaces(light, disparity, defocus, slab_of_pixel, windows)

        def slab_behind_in(window: Window) -> torch.Tensor:
            slab = self.slab_of(window.crop(hidden[2]))
            slab = torch.minimum(slab, window.crop(slab_of_pixel) - 1)
            return torch.where(window.crop(seen), slab, -1)

        slab_behind = in_windows(slab_behind_in, windows)
        shown = {window: numbers_in(window.crop(slab_of_pixel)) for window in windows}
        concealed = {window: numbers_in(window.crop(slab_behind)) for window in windows}

        def tokens_of(slab: int, size: int, window: Window) -> torch.Tensor:
            surface = [window.crop(values) for values in (light, disparity, defocus)]
            member = window.crop(slab_of_pixel) == slab
            if slab in concealed[window]:
                behind = window.crop(slab_behind) == slab
                member = member | behind
                surface = [
                    torch.where(behind, window.crop(values), visible)
                    for values, visible in zip(hidden, surface, strict=True)
                ]
            colour, depth, blur = surface
            # Only members send light; where a token lies is asked of every token.
            placed = torch.cat([depth, torch.asinh(blur)], 1)
            if slab not in shown[window] | concealed[window]:
                placed = pooled(placed, size)
                return F.pad(placed, (0, 0, 0, 0, LIGHT_CHANNELS + 1, 0))
            carried = torch.cat([colour, torch.ones_like(blur), blur.abs()], 1) * member
            return pooled(torch.cat([carried, placed], 1), size)

        names = ("composite", *GROUPS)
        sums = {name: light.new_zeros(len(light), LIGHT_CHANNELS, height, width) for name in names}
        at_once = TOKENS_AT_ONCE if len(windows) > 1 else None
        # A hidden surface may lie in a slab in which nothing is visible.
        inhabited = set().union(*shown.values(), *concealed.values()) - {-1}
        for slab in sorted(inhabited, reverse=True):  # the nearest first
            size = self.token_size(slab)
            grid = (-(-height // size), -(-width // size))
            tokens = SlabTokens(functools.partial(tokens_of, slab, size), windows, size)
            senders = [window for window in windows if slab in shown[window] | concealed[window]]
            arrived, reached = self.spread_all(tokens, grid, senders, at_once)
            for window in windows:
                outer = window.grown(size if size > 1 else 0)
                if not any(outer.overlaps(there.scaled(size)) for there in reached):
                    continue
                part = window.crop(enlarged(outer.crop(arrived, size), size), origin=outer)
                self.add_arrived(
                    {name: window.crop(values) for name, values in sums.items()},
                    part,
                    slab,
                    window.crop(slab_of_pixel),
                )
        return sums

    def add_arrived(
        self,
        sums: dict[str, torch.Tensor],
        arrived: torch.Tensor,
        slab: int,
        slab_of_pixel: torch.Tensor,
    ) -> None:
        """Adds the light of a slab to the sums of :meth:`forward`, in place.

        Args:
            sums: (B, 4, rows, columns) of a window, of all nearer slabs.
            arrived: (B, 4, rows, columns), what the slab leaves there.
            slab: its number.
            slab_of_pixel: (B, 1, rows, columns).
        """
        composite = sums["composite"]
        coverage = arrived[:, 3:4].clamp_min(0)
        room = (1 - composite[:, 3:4]).clamp_min(0)
        composite += arrived * (torch.minimum(coverage, room) / coverage.clamp_min(1e-6))
        step = slab - slab_of_pixel
        lowest, highest = step.aminmax()
        for name, first, last in (
            ("nearer", 2, math.inf),
            ("own", -1, 1),
            ("farther", -math.inf, -2),
        ):
            if first <= lowest and highest <= last:
                sums[name] += arrived
            elif first <= highest and lowest <= last:
                sums[name] += arrived * ((step >= first) & (step <= last))


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
    _repeated_blocks = ["ConvolutionBlock"]
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

    @property
    def window_multiple(self) -> int:
        """The side of windows must be a multiple of this, in pixels: no token, no cell and no pixel
        of the coarsest resolution is cut."""
        slabs = range(len(self.light_transport.edges) + 1)
        largest_token = max(self.light_transport.token_size(slab) for slab in slabs)
        return max(largest_token, 2 * HIDDEN_CELL, self.config["block_size"] * self.token_multiple)

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

        def light_of(outer: Window) -> torch.Tensor:
            pixels = pixels_of(outer)
            photo, disparity, defocus = shown_photo(pixels), pixels[:, 3:4], pixels[:, 4:5]
            known = torch.cat([photo, disparity, torch.asinh(defocus)], 1)
            known = F.pixel_unshuffle(known, block).to(sample.dtype)
            gain = F.pixel_shuffle(self.emission(known), block).float()
            # Only a clipped highlight may be brighter than it looks: everything else shows its
            # radiance.
            clipped = ((photo.amax(1, keepdim=True) - 0.96) / 0.04).clamp(0, 1)
            return srgb_to_linear(photo) * torch.exp(clipped * gain.clamp(-1, 6))

        light = in_windows(light_of, windows, margin=2 * block)  # two convolutions of latents
        maps = in_windows(lambda window: pixels_of(window, 3, 5), windows)
        disparity, defocus = maps.split(1, 1)
        with torch.autocast(sample.device.type, enabled=False):  # eight bits would band the light
            transported = self.light_transport(light, disparity, defocus, windows)
        del light, maps, disparity, defocus  # a large picture needs their memory

        def candidates_of(
            window: Window, photo_light: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
            """The composite, its coverage, and what the pixel may be instead."""
            composite, coverage = normalise(window.crop(transported["composite"]), photo_light)
            groups = [window.crop(transported[name]) for name in GROUPS]
            return composite, coverage, [normalise(group, composite)[0] for group in groups]

        def evidence(latent_window: Window) -> torch.Tensor:
            window = latent_window.scaled(block)
            pixels = pixels_of(window)
            photo = shown_photo(pixels)
            composite, coverage, candidates = candidates_of(window, srgb_to_linear(photo))
            shown = linear_to_srgb(composite.clamp(0, 1))
            differences = [linear_to_srgb(one.clamp(0, 1)) - shown for one in candidates]
            coverages = [window.crop(transported[name])[:, 3:4] for name in GROUPS]
            squashed = torch.asinh(pixels[:, 4:5])
            seen = [shown, photo, *differences, *coverages, coverage, pixels[:, 3:4], squashed]
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

"""Light through a lens: surfaces of similar defocus, spread by PISA and composited.

1. Pixels are sorted into *slabs* of similar signed defocus, together with what they hide and what
   else they show (:mod:`bokehdiff.models.surfaces`). A slab with wide blur is pooled to coarse
   tokens, so that a circle of confusion is always a few tokens wide and the cost of PISA does not
   grow with the blur.
2. One PISA self-attention, shared by all slabs, spreads the light of each slab over its circles of
   confusion. Each of its heads sees a part of the lens: an occluder hides what is behind it from
   one side of the lens only.
3. For each part of the lens the slabs are composited from the nearest to the farthest: a pixel
   accepts light until it is full.

On a slanted surface the defocus s changes within a circle of confusion, by the slope g from pixel
to pixel. Then the light of a source arrives o pixels away in proportion to ``1 + g . o / s``, the
Jacobian of the map from sources to points of the lens. Being linear in o, that takes no kernel of
its own: besides its light every token carries the light times ``g / s``, and times ``g . k / s``
for its own place k, so that the sum is right for every place q = k + o at which it is received.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention

from ..attention import PisaAttnProcessor, PisaConfig, PisaContext, PisaGeometry
from ..grids import enlarged, pooled
from ..rendering.sources import slope_of
from ..windows import Window, in_windows, put, windows_of
from .surfaces import MixedPixels, hidden_surfaces, numbers_in, parted_surfaces
from .token_circles import calibrated_token_radius, reach_in_tokens, slope_per_token

__all__ = ["GROUPS", "LightTransport", "slab_edges"]

GROUPS = ("nearer", "own", "farther")  # light by where it comes from, seen from the pixel's surface
LIGHT_CHANNELS = 4  # red, green, blue and the column of ones that counts how much light arrived
SEEN_CHANNELS = LIGHT_CHANNELS + 2  # and disparity and squashed defocus, for queries and keys
MOMENTS = 4  # light; the same times the tilt along x and along y; times the tilt at its own place

TOKENS_AT_ONCE = 512
"""Rows and columns of tokens that PISA works on together where there are windows."""

BAND_PIXELS = 1024
"""Rows of the picture that are composited together where there are windows, or one window."""

SMALLEST_TILT_DEFOCUS = 1.0
"""Below this defocus in pixels a circle of confusion is a point, and has no tilt."""

BORROWED = 1e-3
"""A part of the lens that accepted little borrows so much from what the whole lens saw."""

NOTHING = 1e-6


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


class SlabTokens:
    """The tokens of one slab, each window of them made when it is first looked at.

    Args:
        make: of a window and the part of it that is wanted; gives (B, 9, rows, columns): colour, a
            column of ones, radius and tilt (along x and y, per pixel) of what lies in the slab, all
            times coverage; disparity and squashed defocus of all that is there.
        windows: of the picture, in pixels.
        size: pixels per token side.
        extent: the part of the grid of tokens that will be looked at.
    """

    def __init__(
        self,
        make: Callable[[Window, Window], torch.Tensor],
        windows: list[Window],
        size: int,
        extent: Window,
    ) -> None:
        self.size, self.extent = size, extent
        self._make, self._missing = make, list(windows)
        self._tokens: torch.Tensor | None = None

    def crop(self, wanted: Window) -> torch.Tensor:
        """(B, 9, rows, columns) of a window of the grid of tokens."""
        for window in [one for one in self._missing if one.pooled(self.size).overlaps(wanted)]:
            part = window.common(self.extent.scaled(self.size))
            tokens, place = self._make(window, part), part.pooled(self.size)
            if place == self.extent:
                self._tokens = tokens
            else:
                if self._tokens is None:
                    rows = self.extent.bottom - self.extent.top
                    columns = self.extent.right - self.extent.left
                    self._tokens = tokens.new_empty(*tokens.shape[:2], rows, columns)
                place.crop(self._tokens, origin=self.extent).copy_(tokens)
            self._missing.remove(window)
        assert self._tokens is not None, "no windows"
        return wanted.crop(self._tokens, origin=self.extent)


class Scene:
    """The surfaces of a picture, sorted into slabs.

    Args:
        light: (B, 3, H, W) linear light of the photo.
        emission: (B, 1, H, W) how many times brighter than it looks each pixel is.
        disparity, defocus: (B, 1, H, W); defocus signed, in pixels.
        windows: windows of the picture.
        slab_of: the slabs of a defocus, like `LightTransport.slab_of`.
        slab_count: how many there are.
    """

    def __init__(
        self,
        light: torch.Tensor,
        emission: torch.Tensor,
        disparity: torch.Tensor,
        defocus: torch.Tensor,
        windows: list[Window],
        slab_of: Callable[[torch.Tensor], torch.Tensor],
        slab_count: int,
    ) -> None:
        self.windows, self.emission, self.disparity = windows, emission, disparity
        colour = level = None
        mixed: dict[Window, MixedPixels] = {}
        for window in windows:
            own, own_defocus, mixed[window] = parted_surfaces(light, defocus, window)
            colour = put(colour, window, own)
            level = put(level, window, own_defocus)
        assert colour is not None and level is not None, "no windows"
        self.light, self.defocus = colour, level
        self.slab = in_windows(lambda window: slab_of(window.crop(level)), windows)
        *self.hidden, seen = hidden_surfaces(colour, disparity, level, self.slab, windows)
        self.mixed = {window: pixels.those(pixels.in_front) for window, pixels in mixed.items()}
        self.covering = {window: pixels.those(~pixels.in_front) for window, pixels in mixed.items()}
        for window, pixels in self.covering.items():
            # What shows beside the edge is known better than what was guessed.
            place = (pixels.image, slice(None), pixels.row, pixels.column)
            for values, known in zip(
                self.hidden,
                (
                    pixels.colour,
                    window.crop(disparity)[place],
                    pixels.defocus[:, None],
                ),
                strict=True,
            ):
                window.crop(values)[place] = known
            window.crop(seen)[place] = True

        def slab_behind_in(window: Window) -> torch.Tensor:
            slab = slab_of(window.crop(self.hidden[2]))
            slab = torch.minimum(slab, window.crop(self.slab) - 1)
            return torch.where(window.crop(seen), slab, -1)

        self.slab_behind = in_windows(slab_behind_in, windows)
        self.slab_of_mixed = {}
        for window, pixels in self.mixed.items():
            own_slab = window.crop(self.slab)[pixels.image, 0, pixels.row, pixels.column]
            nearer = torch.maximum(slab_of(pixels.defocus), own_slab + 1)
            self.slab_of_mixed[window] = nearer.clamp(max=slab_count - 1)
        self.slabs_in = {
            window: numbers_in(window.crop(self.slab))
            | numbers_in(window.crop(self.slab_behind)) - {-1}
            | numbers_in(self.slab_of_mixed[window])
            for window in windows
        }

    def largest_radius(self, slab: int) -> float:
        """Radius in pixels of the widest circle of confusion in a slab."""
        largest = 0.0
        for window in self.windows:
            if slab not in self.slabs_in[window]:
                continue
            for defocus, slabs in (
                (window.crop(self.defocus), window.crop(self.slab)),
                (window.crop(self.hidden[2]), window.crop(self.slab_behind)),
                (self.mixed[window].defocus, self.slab_of_mixed[window]),
            ):
                inside = defocus.detach()[slabs == slab]
                if inside.numel():
                    largest = max(largest, float(inside.abs().max()))
        return largest

    def tokens(self, slab: int, size: int, window: Window, part: Window) -> torch.Tensor:
        """(B, 9, rows, columns) tokens of ``size`` pixels of a part of a window; see SlabTokens."""
        defocus = part.crop(self.defocus)
        hidden = [part.crop(values) for values in self.hidden]
        behind = part.crop(self.slab_behind) == slab
        # Where a token lies is asked of every token, also of those that send no light.
        placed = torch.cat([part.crop(self.disparity), torch.asinh(defocus)], 1)
        placed_behind = torch.cat([hidden[1], torch.asinh(hidden[2])], 1)
        placed = torch.where(behind, placed_behind, placed)
        if slab not in self.slabs_in[window]:
            return F.pad(pooled(placed, size), (0, 0, 0, 0, LIGHT_CHANNELS + 3, 0))

        coverage = (part.crop(self.slab) == slab).to(defocus.dtype)
        whole_part = part == window
        edge = self.covering[window]
        if len(edge.row):
            row, column = edge.row + window.top - part.top, edge.column + window.left - part.left
            inside = ... if whole_part else _within(row, column, part)
            coverage[edge.image[inside], 0, row[inside], column[inside]] *= edge.share[inside]
        light = part.crop(self.light) * part.crop(self.emission)
        ones, no_tilt = torch.ones_like(defocus), torch.zeros_like(defocus).repeat(1, 2, 1, 1)
        carried = torch.cat([light, ones, defocus.abs(), self.tilt(part)], 1) * coverage
        carried = carried + torch.cat([hidden[0], ones, hidden[2].abs(), no_tilt], 1) * behind
        front = self.mixed[window].those(self.slab_of_mixed[window] == slab)
        if len(front.row):
            row, column = front.row + window.top - part.top, front.column + window.left - part.left
            if not whole_part:
                inside = _within(row, column, part)
                front, row, column = front.those(inside), row[inside], column[inside]
            brightness = part.crop(self.emission)[front.image, 0, row, column]
            sent = torch.cat(
                [
                    front.colour * brightness[:, None],
                    torch.ones_like(front.defocus)[:, None],
                    front.defocus.abs()[:, None],
                ],
                1,
            )
            sent = F.pad(sent * front.share[:, None], (0, 2))
            channel = torch.arange(carried.shape[1], device=row.device)
            place = (front.image[:, None], channel, row[:, None], column[:, None])
            carried = carried.index_put(place, sent, accumulate=True)
        return pooled(torch.cat([carried, placed], 1), size)

    def tilt(self, part: Window) -> torch.Tensor:
        """(B, 2, rows, columns): change of the defocus per pixel along x and y, relative to it."""
        outer = part.grown(1)
        slope = torch.stack([slope_of(blur[0]) for blur in outer.crop(self.defocus)])
        defocus = part.crop(self.defocus)
        away = torch.where(defocus < 0, -1.0, 1.0) * defocus.abs().clamp_min(SMALLEST_TILT_DEFOCUS)
        return part.crop(slope, origin=outer) / away


def _within(row: torch.Tensor, column: torch.Tensor, part: Window) -> torch.Tensor:
    """Mask of the places that lie in a window, of which row and column are counted."""
    return (
        (row >= 0)
        & (row < part.bottom - part.top)
        & (column >= 0)
        & (column < part.right - part.left)
    )


class LightTransport(nn.Module):
    """Spreads the light of slabs over their circles of confusion with PISA and composites them
    front to back, for each part of the lens.

    Args:
        focal_slab_radius, slab_ratio, largest_radius: see :func:`slab_edges`, pixels.
        tokens_per_radius: a slab is pooled to tokens of twice the size as soon as its smallest
            circle of confusion is still this many tokens wide.
        lens_parts: 1, 2 or 4: into how many parts the lens is cut, each of them a head.
    """

    edges: torch.Tensor

    def __init__(
        self,
        focal_slab_radius: float,
        slab_ratio: float,
        largest_radius: float,
        tokens_per_radius: float,
        lens_parts: int,
    ):
        super().__init__()
        self.lens_parts = lens_parts
        self.attn: Attention = Attention(
            query_dim=SEEN_CHANNELS,
            heads=lens_parts,
            dim_head=LIGHT_CHANNELS,
            bias=False,
            out_bias=False,
            processor=PisaAttnProcessor(PisaContext()),
        )
        # All heads are given the same light, and what they let pass is not mixed again.
        self.attn.to_v = nn.Linear(SEEN_CHANNELS, LIGHT_CHANNELS, bias=False)
        self.attn.to_out = nn.ModuleList([nn.Identity(), nn.Identity()])
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
            self.attn.to_v.weight.copy_(torch.eye(LIGHT_CHANNELS, SEEN_CHANNELS))

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

    @property
    def pisa(self) -> PisaAttnProcessor:
        """What computes the attention; RuntimeError if something took PISA out."""
        processor = self.attn.processor
        if not isinstance(processor, PisaAttnProcessor) or processor.context is None:
            raise RuntimeError(
                f"The light transport attention runs {type(processor).__name__} instead of PISA: "
                "something replaced the attention processors. Put it back with "
                "bokehdiff.attention.install_pisa(unet, ['light_transport.attn'])."
            )
        return processor

    @property
    def pisa_config(self) -> PisaConfig:
        """The settings of the attention."""
        context = self.pisa.context
        assert context is not None, "the processor of a layer with a scene of its own"
        return context.config

    def attend(
        self, seen: torch.Tensor, tilts: torch.Tensor, geometry: PisaGeometry
    ) -> torch.Tensor:
        """Light and its moments as they arrive, (B, heads, N, MOMENTS, 4).

        Args:
            seen: (B, N, 6) light times coverage, coverage, disparity, squashed defocus.
            tilts: (B, N, 3) tilt along x and y, and tilt at the token's own place.
            geometry: of the tokens, with a part of the lens for each head.
        """
        attn, dtype = self.attn, seen.dtype
        seen = seen.to(attn.to_q.weight.dtype)
        query, key = (
            layer(seen).unflatten(-1, (self.lens_parts, -1)).transpose(1, 2)
            for layer in (attn.to_q, attn.to_k)
        )
        light = attn.to_v(seen).unsqueeze(-2)
        values = torch.cat([light, light * tilts.to(light.dtype).unsqueeze(-1)], -2).flatten(-2)
        values = values.unsqueeze(1).expand(-1, self.lens_parts, -1, -1)
        arrived = self.pisa.attend(attn, query, key, values, geometry)
        return arrived.to(dtype).unflatten(-1, (MOMENTS, LIGHT_CHANNELS))

    def spread(self, tokens: SlabTokens, block: Window) -> tuple[Window, torch.Tensor] | None:
        """What the light that one block of tokens sends leaves at all tokens that it reaches.

        Args:
            tokens: those of a slab.
            block: a window of their grid.

        Returns:
            The window reached and, on it, (B, heads * 4, rows, columns) colour times coverage, and
            coverage; None where nothing sends light.
        """
        config = self.pisa_config
        column = tokens.crop(block)[:, LIGHT_CHANNELS - 1 : LIGHT_CHANNELS + 1].detach()
        within = bounding_window(column[:, :1] > 0, block)
        if within is None:
            return None
        coverage, pixels = within.crop(column, origin=block).split(1, 1)
        sends = coverage > 0
        pixels = pixels[sends] / coverage[sends].clamp_min(NOTHING)
        radius = torch.zeros_like(coverage)
        radius[sends] = calibrated_token_radius(pixels, tokens.size, slope_per_token(config))

        reach = reach_in_tokens(float(radius.max()), config)
        outer = within.grown(int(min(reach, max(block.height, block.width))))
        outer = outer.common(tokens.extent)
        around = tokens.crop(outer)
        maps = [torch.zeros_like(around[:, :1]), torch.zeros_like(around[:, :1], dtype=torch.bool)]
        for outer_map, own_map in zip(maps, (radius, sends), strict=True):
            within.crop(outer_map, origin=outer).copy_(own_map)
        geometry = PisaGeometry.build(
            maps[0],
            None,  # one slab lies at one depth; what covers what is settled by the compositing
            config=config,
            emitters=maps[1],
            lens_parts=self.lens_parts,
            byte_budget=0,  # tables that serve one layer once are not worth keeping
        )
        carried, _, tilt, placed = around.split([LIGHT_CHANNELS, 1, 2, 2], 1)
        tilt = tilt * tokens.size / carried[:, -1:].clamp_min(NOTHING)  # per token
        rows, columns = around.shape[-2:]
        y = torch.arange(rows, device=around.device, dtype=around.dtype)[:, None] - rows // 2
        x = torch.arange(columns, device=around.device, dtype=around.dtype) - columns // 2
        own_place = tilt[:, :1] * x + tilt[:, 1:] * y
        arrived = self.attend(
            torch.cat([carried, placed], 1).flatten(2).transpose(1, 2),
            torch.cat([tilt, own_place], 1).flatten(2).transpose(1, 2),
            geometry,
        )
        moments = arrived.unflatten(2, (rows, columns)).unbind(-2)
        light, tilted_x, tilted_y, from_own_place = moments
        x, y = x[:, None], y[..., None]
        arrived = torch.addcmul(torch.addcmul(light, tilted_x, x), tilted_y, y) - from_own_place
        return outer, arrived.permute(0, 1, 4, 2, 3).flatten(1, 2)

    def spread_all(
        self,
        tokens: SlabTokens,
        receivers: Window,
        senders: list[Window],
        reach: int,
        at_once: int | None,
    ) -> tuple[Window, torch.Tensor] | None:
        """What the light of a slab leaves at some of the tokens.

        Args:
            tokens: those of the slab.
            receivers: the window of their grid that is asked for.
            senders: windows of pixels outside of which nothing sends light.
            reach: tokens that light can travel.
            at_once: rows and columns of tokens that send their light together; None for all.

        Returns:
            The window in which light arrives and, on it, (B, heads * 4, rows, columns) as of
            :meth:`spread`; None where none does.
        """
        arrived = where = None
        region = receivers.grown(reach)
        for block in region.divided(at_once) if at_once else [region]:
            pixels = block.scaled(tokens.size)
            if not any(pixels.overlaps(sender) for sender in senders):
                continue
            found = self.spread(tokens, block)
            if found is None or not found[0].overlaps(receivers):
                continue
            outer, part = found
            common = outer.common(receivers)
            part = common.crop(part, origin=outer)
            if at_once is None:
                return common, part
            if arrived is None or where is None:
                rows, columns = receivers.bottom - receivers.top, receivers.right - receivers.left
                arrived, where = part.new_zeros(*part.shape[:2], rows, columns), common
            where = where.around(common)
            common.crop(arrived, origin=receivers).add_(part)
        if arrived is None or where is None:
            return None
        return where, where.crop(arrived, origin=receivers)

    @torch.compiler.disable(reason="Which slabs there are depends on the scene.")
    def forward(
        self,
        light: torch.Tensor,
        emission: torch.Tensor,
        disparity: torch.Tensor,
        defocus: torch.Tensor,
        windows: list[Window] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Render (B, 3, H, W) linear light.

        Args:
            light: (B, 3, H, W) of the photo.
            emission: (B, 1, H, W) how many times brighter than it looks each pixel is.
            disparity, defocus: (B, 1, H, W); defocus signed, in pixels.
            windows: windows of the picture, whose sides are multiples of the largest token; by
                default one.

        Returns premultiplied (B, 4, H, W) sums: ``composite`` (light accepted front to
        back, coverage at most 1) and, relative to the pixel's own surface, all that arrived from
        ``nearer``, ``own`` and ``farther`` slabs.
        """
        windows = windows or windows_of(*defocus.shape[-2:])
        slab_count = len(self.edges) + 1
        scene = Scene(light, emission, disparity, defocus, windows, self.slab_of, slab_count)
        slabs = sorted(set().union(*scene.slabs_in.values()), reverse=True)  # the nearest first
        radii = {slab: scene.largest_radius(slab) for slab in slabs}
        sums: dict[str, torch.Tensor] = {}
        for band in bands_of(windows):
            for name, values in self.composite(scene, band, radii).items():
                sums[name] = put(sums.get(name), band, values)
        return sums

    def composite(
        self, scene: Scene, band: Window, radii: dict[int, float]
    ) -> dict[str, torch.Tensor]:
        """The sums of :meth:`forward` on a band of the picture.

        Args:
            scene: the surfaces.
            band: rows of the picture, whole windows.
            radii: every slab that holds light, the nearest first, with its largest radius.
        """
        rows, columns = band.bottom - band.top, band.right - band.left
        batch, like = len(scene.light), scene.light
        accepted = like.new_zeros(batch, self.lens_parts, LIGHT_CHANNELS, rows, columns)
        groups = {name: like.new_zeros(batch, LIGHT_CHANNELS, rows, columns) for name in GROUPS}
        at_once = TOKENS_AT_ONCE if len(scene.windows) > 1 else None
        mine = [window for window in scene.windows if window.overlaps(band)]
        for slab, radius in radii.items():
            size = self.token_size(slab)
            reach = reach_in_tokens(radius / size + 1, self.pisa_config)
            receivers = band.pooled(size).grown(1 if size > 1 else 0)
            whole = max(receivers.height, receivers.width)
            reach = int(min(reach, whole))
            tokens = SlabTokens(
                functools.partial(scene.tokens, slab, size),
                scene.windows,
                size,
                receivers.grown(2 * reach),
            )
            senders = [window for window in scene.windows if slab in scene.slabs_in[window]]
            found = self.spread_all(tokens, receivers, senders, reach, at_once)
            if found is None:
                continue
            where, arrived = found
            # Enlarging looks at the tokens next to a token.
            edge = 1 if size > 1 else 0
            lit = where.grown(edge).scaled(size)
            for window in mine:
                target = window.common(lit)
                if target.top >= target.bottom or target.left >= target.right:
                    continue
                outer = target.grown(edge * size)
                part = cropped_with_zeros(arrived, where, outer.pooled(size))
                part = target.crop(enlarged(part, size), origin=outer)
                # What one side of the lens sends to one side from behind the plane in focus, it
                # sends to the other from before it.
                part = part.unflatten(1, (self.lens_parts, LIGHT_CHANNELS))
                if slab > len(self.edges) // 2:
                    part = part.flip(1)
                self.add_arrived(
                    target.crop(accepted, origin=band),
                    {name: target.crop(values, origin=band) for name, values in groups.items()},
                    part,
                    slab - target.crop(scene.slab),
                )
        return {"composite": of_whole_lens(accepted), **groups}

    def add_arrived(
        self,
        accepted: torch.Tensor,
        groups: dict[str, torch.Tensor],
        arrived: torch.Tensor,
        step: torch.Tensor,
    ) -> None:
        """Adds the light of a slab to what all nearer slabs left, in place.

        Args:
            accepted: (B, parts, 4, rows, columns) of a window.
            groups: (B, 4, rows, columns) by name.
            arrived: (B, parts, 4, rows, columns), what the slab leaves there.
            step: (B, 1, rows, columns) number of the slab minus that of the pixel.
        """
        coverage = arrived[:, :, 3:4].clamp_min(0)
        room = (1 - accepted[:, :, 3:4]).clamp_min(0)
        accepted += arrived * (torch.minimum(coverage, room) / coverage.clamp_min(NOTHING))
        of_lens = arrived.mean(1)
        lowest, highest = step.aminmax()
        for name, first, last in (
            ("nearer", 2, math.inf),
            ("own", -1, 1),
            ("farther", -math.inf, -2),
        ):
            if first <= lowest and highest <= last:
                groups[name] += of_lens
            elif first <= highest and lowest <= last:
                groups[name] += of_lens * ((step >= first) & (step <= last))


def bounding_window(mask: torch.Tensor, window: Window) -> Window | None:
    """The smallest window that holds all that a mask (B, 1, rows, columns) of a window chooses."""
    rows = mask.any(-1).flatten(0, 1).any(0).nonzero()
    if not len(rows):
        return None
    columns = mask.any(-2).flatten(0, 1).any(0).nonzero()
    return dataclasses.replace(
        window,
        top=window.top + int(rows[0]),
        bottom=window.top + int(rows[-1]) + 1,
        left=window.left + int(columns[0]),
        right=window.left + int(columns[-1]) + 1,
    )


def cropped_with_zeros(values: torch.Tensor, window: Window, wanted: Window) -> torch.Tensor:
    """``values`` (..., rows, columns) of a window on another one, zero where they are not known."""
    sides = (
        max(window.left - wanted.left, 0),
        max(wanted.right - window.right, 0),
        max(window.top - wanted.top, 0),
        max(wanted.bottom - window.bottom, 0),
    )
    values = window.common(wanted).crop(values, origin=window)
    return F.pad(values, sides) if any(sides) else values


def bands_of(windows: list[Window]) -> list[Window]:
    """Bands of whole rows of windows, of about :data:`BAND_PIXELS` rows of the picture."""
    bands: list[Window] = []
    for window in windows:
        band = Window(window.top, 0, window.bottom, window.width, window.height, window.width)
        if bands and (band.top < bands[-1].bottom or band.bottom - bands[-1].top <= BAND_PIXELS):
            first = bands.pop()
            band = Window(first.top, 0, band.bottom, band.width, band.height, band.width)
        bands.append(band)
    return bands


def of_whole_lens(accepted: torch.Tensor) -> torch.Tensor:
    """(B, 4, H, W) colour times coverage, and coverage, from those of the parts of the lens
    (B, parts, 4, H, W): each part counts as much as the others, however little it accepted."""
    light, coverage = accepted[:, :, :3], accepted[:, :, 3:4]
    covered = coverage.mean(1, keepdim=True)
    whole = light.mean(1, keepdim=True) / covered.clamp_min(NOTHING)
    colour = ((light + BORROWED * whole) / (coverage + BORROWED)).mean(1)
    return torch.cat([colour * covered[:, 0], covered[:, 0]], 1)

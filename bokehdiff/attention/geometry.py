"""The geometry of PISA: who may receive light from whom.

Words used here: a *key* token is a light source, a *query* token receives light. Lengths are in
circle-of-confusion units (see `PisaConfig`); grids are row-major; positions of tokens are written
as in `torch.nn.functional.grid_sample`, from -1 to 1 across the image.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..lens_cuts import PART_COUNTS, shares_of_parts
from .compiled import GraphOwner
from .config import COC_UNITS_PER_TOKEN, OFFICIAL_GRID_SPAN, PIXELS_PER_COC_UNIT, PisaConfig
from .visibility import (
    count_visible_rays,
    keys_at_risk,
    nearest_anywhere,
    nearest_within_circles,
    ray_direction,
)

if TYPE_CHECKING:
    from .backends import Backend

DEFAULT_BYTE_BUDGET = 1 << 30
"""Bytes of tables that each backend may keep; `stream` and `local` compute again what is beyond."""

UNREPEATABLE_RAYS = (
    "jitter='location_random' draws new noise for each pair of tokens. Use backend='reference', or "
    "jitter='location_table'."
)
"""Why only the dense formula can take such a geometry; see `PisaGeometry.has_repeatable_rays`."""

_LARGEST_EXPONENT = 80.0
"""The exponential function of a little more overflows float32."""

PAIRS_TRACED_AT_ONCE = 1 << 15
"""Pairs of tokens whose rays are traced at a time; more would only cost memory."""


def log_soft_mask(radius: Tensor, distance: Tensor, slope: float, cutoff: float) -> Tensor:
    """Return log C, the soft circle of confusion (Eq. 5-6), broadcast over the arguments.

    `C = sigmoid(slope * (radius - distance))`: light of a source with this circle-of-confusion
    radius reaches this far. Values of C below `cutoff` are exactly 0 (log C is minus infinity).
    The mask at distance 0 is at least one half, so no source is ever without a receiver.
    """
    log_mask = F.logsigmoid(slope * (radius - distance))
    if cutoff > 0:
        log_mask = F.threshold(log_mask, math.log(cutoff), -math.inf)
    return log_mask


def _resize(maps: Tensor, height: int, width: int) -> Tensor:
    """Return (B, C, height, width): bilinear, without antialiasing, as the authors resize."""
    if maps.shape[-2:] == (height, width):
        return maps
    return F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)


def _check_map(name: str, value: Tensor, batch: int | None = None) -> Tensor:
    """Return `value` as float32 or float64 after checking that it is a finite (B, 1, H, W)."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor (B, 1, H, W), got {type(value).__name__}.")
    if value.ndim != 4 or value.shape[1] != 1 or value.numel() == 0:
        raise ValueError(f"{name} must have shape (B, 1, H, W), got {tuple(value.shape)}.")
    if batch is not None and value.shape[0] not in (1, batch):
        raise ValueError(f"{name} has batch {value.shape[0]}; expected 1 or {batch}.")
    if value.dtype not in (torch.float32, torch.float64):
        value = value.float()
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} contains NaN or infinite values; fill them first.")
    return value


def _pick(value: Tensor, shape: torch.Size, places: Tensor) -> Tensor:
    """Return `value.expand(shape).flatten()[places]` without making the expanded tensor."""
    own_sides = [1] * (len(shape) - value.ndim) + list(value.shape)
    index, stride = torch.zeros_like(places), 1
    for side, own_side in zip(reversed(shape), reversed(own_sides), strict=True):
        if own_side > 1:
            index += places % side * stride
            stride *= own_side
        places = places // side
    return value.reshape(-1)[index]


@dataclass(frozen=True, eq=False)
class PisaGeometry(GraphOwner):
    """Circles of confusion and visibility of one batch of images on one token grid.

    Immutable, and free of anything that depends on heads, features or layers: build it once per
    image and resolution with `build` and pass it to every layer.

    Attributes:
        radius: (B, N) circle-of-confusion radius of each key, in units. Keeps its gradient.
        height, width: the token grid; N = height * width.
        spacing: units from one token to the next, vertically and horizontally.
        config: the settings, `config.hardness` included.
        token_disparity: (B, N) in [0, 1], larger is nearer; None when nothing occludes.
        occlusion_map: (B, 1, rows, columns) disparity in which occluders are looked up.
        emitters: (B, N) bool, keys that emit light; None when all do.
        lens_parts: 1; or 2 or 4, into how many parts the lens is cut. Head h then spreads light
            through part ``h % lens_parts`` alone, so into that half or quarter of each circle.
        generator: source of the noise of `jitter="location_random"`; None uses `config.seed`.
        byte_budget: see `DEFAULT_BYTE_BUDGET`.
    """

    radius: Tensor
    height: int
    width: int
    spacing: tuple[float, float]
    config: PisaConfig
    token_disparity: Tensor | None = None
    occlusion_map: Tensor | None = None
    emitters: Tensor | None = None
    lens_parts: int = 1
    generator: torch.Generator | None = None
    byte_budget: int = DEFAULT_BYTE_BUDGET
    # Derived tables, filled on first use; they never change what is computed.
    _derived: dict[str, object] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.take_handle()

    def find_geometry(self, q: Tensor, disp_coc: Tensor | None) -> tuple[PisaGeometry, Backend]:
        """Return itself, for layers inside a compiled graph."""
        return self, "auto"

    @classmethod
    def build(
        cls,
        coc_tokens: Tensor,
        disparity: Tensor | None = None,
        *,
        config: PisaConfig | None = None,
        hardness: float | None = None,
        emitters: Tensor | None = None,
        lens_parts: int = 1,
        generator: torch.Generator | None = None,
        byte_budget: int = DEFAULT_BYTE_BUDGET,
    ) -> PisaGeometry:
        """Return the geometry of a token grid.

        Args:
            coc_tokens: (B, 1, h, w) circle-of-confusion *radius* in tokens, at least 0.
            disparity: (B or 1, 1, Hd, Wd) in [0, 1], larger is nearer, any resolution; None for
                light that nothing stops.
            config: settings, by default the preset `paper`.
            hardness: replaces `config.hardness`.
            emitters: (B or 1, 1, h, w) bool; other keys give nothing to any query.
            lens_parts: see the attribute.
            generator: random numbers for `jitter="location_random"`.
            byte_budget: see the attribute.

        Raises:
            ValueError: for shapes that do not agree, negative radii, disparity outside [0, 1],
                NaN or infinite values.
        """
        return cls._assemble(
            _check_map("coc_tokens", coc_tokens) * COC_UNITS_PER_TOKEN,
            disparity,
            config=config,
            hardness=hardness,
            emitters=emitters,
            lens_parts=lens_parts,
            generator=generator,
            byte_budget=byte_budget,
        )

    @classmethod
    def from_disp_coc(
        cls, disp_coc: Tensor, height: int, width: int, *, config: PisaConfig, **options: Any
    ) -> PisaGeometry:
        """Return the geometry of the authors' conditioning tensor.

        Args:
            disp_coc: (B, 2, H, W) at image resolution: disparity in [0, 1], and the radius of the
                circle of confusion in units of ten pixels.
            height, width: token grid.
            config: settings.
            options: `hardness`, `emitters`, `lens_parts`, `generator`, `byte_budget` of `build`.
        """
        if disp_coc.ndim != 4 or disp_coc.shape[1] != 2:
            raise ValueError(
                "disp_coc must have shape (B, 2, H, W): disparity, then circle of confusion / 10 "
                f"pixels; got {tuple(disp_coc.shape)}."
            )
        disparity = _check_map("the disparity in disp_coc", disp_coc[:, :1])
        radius = _check_map("the circle of confusion in disp_coc", disp_coc[:, 1:])
        radius = _resize(radius, height, width)
        if config.token_spacing is not None:
            # Units follow the token, so a radius in pixels must be told how wide a token is here.
            pixels_per_token = disp_coc.shape[2] / height
            radius = radius * (PIXELS_PER_COC_UNIT / pixels_per_token * COC_UNITS_PER_TOKEN)
        return cls._assemble(radius, disparity, config=config, **options)

    @classmethod
    def _assemble(
        cls,
        radius: Tensor,
        disparity: Tensor | None,
        *,
        config: PisaConfig | None = None,
        hardness: float | None = None,
        emitters: Tensor | None = None,
        lens_parts: int = 1,
        generator: torch.Generator | None = None,
        byte_budget: int = DEFAULT_BYTE_BUDGET,
    ) -> PisaGeometry:
        if lens_parts not in PART_COUNTS:
            raise ValueError(f"lens_parts is {lens_parts!r}; it must be one of {PART_COUNTS}.")
        config = config or PisaConfig()
        if hardness is not None:
            config = config.replace(hardness=float(hardness))
        batch, _, height, width = radius.shape
        smallest = float(radius.detach().min())
        if smallest < 0:
            raise ValueError(
                "The radius of the circle of confusion must be at least 0, got "
                f"{smallest:g}; take the absolute value of the signed defocus."
            )
        if config.token_spacing is not None:
            spacing = (config.token_spacing, config.token_spacing)
        else:
            spacing = (
                OFFICIAL_GRID_SPAN / max(height - 1, 1),
                OFFICIAL_GRID_SPAN / max(width - 1, 1),
            )

        token_disparity = occlusion_map = None
        if disparity is not None and config.segments > 0:
            disparity = _check_map("disparity", disparity.detach(), batch)
            lowest, highest = float(disparity.min()), float(disparity.max())
            if lowest < 0 or highest > 1:
                raise ValueError(
                    f"disparity must lie in [0, 1] with 1 nearest, got {lowest:g} to {highest:g}; "
                    "see bokehdiff.optics for the map that keeps the radii."
                )
            token_disparity = _resize(disparity, height, width).flatten(1).expand(batch, -1)
            samples = config.occlusion_map_scale
            rows, columns = samples * height, samples * width
            if not config.resample_occlusion_map:
                rows = min(max(disparity.shape[2], height), rows)
                columns = min(max(disparity.shape[3], width), columns)
            occlusion_map = _resize(disparity, rows, columns).expand(batch, -1, -1, -1)

        if emitters is not None:
            if emitters.dtype != torch.bool or emitters.shape[1:] != (1, height, width):
                raise ValueError(
                    f"emitters must be bool (B, 1, {height}, {width}), got {emitters.dtype} "
                    f"{tuple(emitters.shape)}."
                )
            emitters = emitters.flatten(1).expand(batch, -1)

        return cls(
            radius=radius.flatten(1),
            height=height,
            width=width,
            spacing=spacing,
            config=config,
            token_disparity=token_disparity,
            occlusion_map=occlusion_map,
            emitters=emitters,
            lens_parts=lens_parts,
            generator=generator,
            byte_budget=byte_budget,
        )

    # -- sizes ------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """Return the number of images; 1 serves any batch."""
        return self.radius.shape[0]

    @property
    def token_count(self) -> int:
        """Return N, the tokens of one image."""
        return self.height * self.width

    @property
    def slope(self) -> float:
        """Return the slope of the circle's edge, per unit of length."""
        return math.log(self.config.hardness)

    @property
    def margin(self) -> float:
        """Return how far beyond its radius a source's mask stays above the cutoff, in units."""
        if self.config.cutoff <= 0 or self.slope <= 0:
            return math.inf
        return -math.log(self.config.cutoff) / self.slope

    def to(self, device: torch.device | str) -> PisaGeometry:
        """Return the same geometry on `device`."""
        if self.radius.device == torch.device(device):
            return self
        moved = {
            name: value.to(device)
            for name in ("radius", "token_disparity", "occlusion_map", "emitters")
            if (value := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **moved)

    # -- dense tables, for the reference backend ---------------------------------------------------

    def distances(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (N, N) distances between tokens, in units."""
        number = torch.arange(self.token_count, device=self.radius.device)
        return self.distances_of_pairs(number[:, None], number, dtype)

    def distances_of_pairs(self, key: Tensor, query: Tensor, dtype: torch.dtype) -> Tensor:
        """Return distances in units between tokens of one image; numbers broadcast."""
        device = self.radius.device
        if self.config.token_spacing is None:
            # In the order of the authors' roundings: the edge multiplies them by the slope.
            y = torch.linspace(0, 1, self.height, dtype=dtype, device=device)
            x = torch.linspace(0, 1, self.width, dtype=dtype, device=device)
            unit, length = (1.0, 1.0), OFFICIAL_GRID_SPAN
        else:
            y = torch.arange(self.height, dtype=dtype, device=device)
            x = torch.arange(self.width, dtype=dtype, device=device)
            unit, length = self.spacing, 1.0
        rows = y[key // self.width % self.height] - y[query // self.width % self.height]
        columns = x[key % self.width] - x[query % self.width]
        # In place: new memory is what costs most here.
        columns.mul_(unit[1]).square_()
        return rows.mul_(unit[0]).square_().add_(columns).sqrt_().mul_(length)

    def log_soft_mask(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return log C (B, N queries, N keys)."""
        precision = self.precision_of_distances(dtype)
        radius = self.radius.to(precision)[:, None, :]
        distance = self.distances(precision)
        return log_soft_mask(radius, distance, self.slope, self.config.cutoff).to(dtype)

    def visibility(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return M (B, N queries, N keys) in [0, 1]: the share of rays that arrive (Eq. 8-9).

        Columns of keys that do not emit are 0.
        """
        cached = self._derived.get("visibility")
        if cached is None:
            cached = self._dense_visibility()
            self._derived["visibility"] = cached
        assert isinstance(cached, Tensor)
        return cached.to(dtype)

    def _dense_visibility(self) -> Tensor:
        tokens, device = self.token_count, self.radius.device
        visible = torch.ones(self.batch, tokens, tokens, device=device)
        if self.token_disparity is not None:
            number = torch.arange(tokens, device=device)
            nearest = nearest_anywhere(self)
            noise_source = self.generator
            if noise_source is None:
                noise_source = torch.Generator().manual_seed(self.config.seed)
            for image in range(self.batch):
                noise = None
                if not self.has_repeatable_rays:
                    # Laid out as in the authors' code, so that a seed gives their numbers.
                    noise = torch.rand(
                        self.config.supersampling - 1, self.config.segments, tokens, tokens, 2,
                        generator=noise_source, device=noise_source.device,
                    ).to(device)  # fmt: skip
                for queries in number.split(max(1, PAIRS_TRACED_AT_ONCE // tokens)):
                    key, query = number.repeat(queries.numel()), queries.repeat_interleave(tokens)
                    rays = count_visible_rays(
                        self,
                        image,
                        key,
                        query,
                        nearest[image, key, 0],
                        None if noise is None else noise[:, :, queries].flatten(2, 3),
                    )
                    if self.config.source_always_visible:
                        rays.masked_fill_(key == query, self.config.supersampling)
                    visible[image, queries] = self.visible_share(rays).view(-1, tokens)
        if self.emitters is not None:
            visible = visible * self.emitters[:, None, :]
        return visible

    # -- single pairs of tokens, for every other backend -------------------------------------------

    @property
    def has_repeatable_rays(self) -> bool:
        """Return whether visibility depends on the pair alone, so that it can be traced piecewise.

        `jitter="location_random"` draws new noise for every pair; only the dense backend does that.
        """
        noisy = self.config.jitter == "location_random" and self.config.supersampling > 1
        return self.token_disparity is None or not noisy

    def log_mask_of_pairs(self, key: Tensor, query: Tensor, dtype: torch.dtype) -> Tensor:
        """Return log C of pairs of tokens, minus infinity where C is 0.

        Args:
            key, query: numbers in the whole batch, `image * N + token`; they broadcast.
            dtype: of the result.
        """
        distance = self.distances_of_pairs(key, query, self.precision_of_distances(dtype))
        return self.log_mask_at(key, distance, torch.empty_like(distance, dtype=dtype))

    def log_lens_shares(self, key: Tensor, query: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (lens_parts, ...) logarithms of the share of each pair in each part of the lens.

        A token counts as a square: one that a cut passes through is shared. No key is without a
        receiver, because every part holds the key's own place.

        Args:
            key, query: numbers in the whole batch, both of one image; they broadcast.
            dtype: of the result.
        """
        table = self._lens_share_table(dtype)
        height, width = table.shape[1:]
        rows = query // self.width % self.height - key // self.width % self.height
        columns = query % self.width - key % self.width
        # Beyond the table no light arrives, so any share will do.
        rows = (rows + height // 2).clamp_(0, height - 1)
        columns = (columns + width // 2).clamp_(0, width - 1)
        places = rows.mul_(width).add_(columns)
        shares = table.flatten(1).index_select(1, places.flatten())
        return shares.unflatten(1, places.shape)

    def _lens_share_table(self, dtype: torch.dtype) -> Tensor:
        """Return (lens_parts, 2 R + 1, 2 C + 1) logarithms for all offsets that light can take, up
        to R rows and C columns, made once: logarithms of 0 are slow."""
        name = f"lens_shares_{dtype}"
        table = self._derived.get(name)
        if table is None:
            farthest = float(self.radius.detach().max()) + self.margin
            reach = [
                int(min(math.ceil(farthest / spacing), side)) if math.isfinite(farthest) else side
                for spacing, side in zip(self.spacing, (self.height, self.width), strict=True)
            ]
            rows, columns = (
                torch.arange(-side, side + 1, dtype=dtype, device=self.radius.device)
                for side in reach
            )
            shape = (len(rows), len(columns))
            table = shares_of_parts(
                columns.expand(shape), rows[:, None].expand(shape), self.lens_parts
            ).log_()
            self._derived[name] = table
        assert isinstance(table, Tensor)
        return table

    def precision_of_distances(self, dtype: torch.dtype) -> torch.dtype:
        """Return the precision in which distances must be known for a mask of this dtype.

        The edge's slope multiplies their error. Only the authors' roundings are kept as they are.
        """
        return dtype if self.config.token_spacing is None else self.widest_dtype

    @property
    def widest_dtype(self) -> torch.dtype:
        """Return float64, or float32 on a device that has nothing wider."""
        return torch.float32 if self.radius.device.type == "mps" else torch.float64

    def log_mask_at(self, key: Tensor, distance: Tensor, out: Tensor) -> Tensor:
        """Return log C of keys at distances from them: `log_soft_mask`, written to `out`.

        Args:
            key: numbers in the whole batch; broadcasts against `distance`.
            distance: in units, in the precision of `precision_of_distances`; overwritten.
            out: memory for the result.
        """
        radius = self.radius.detach().to(out.dtype).reshape(-1)[key]
        cutoff = self.config.cutoff
        if cutoff < math.exp(-_LARGEST_EXPONENT):
            return out.copy_(log_soft_mask(radius, distance, self.slope, cutoff))
        # In place: new memory is what would cost most here.
        rounded = distance.to(out.dtype)
        torch.sub(rounded, radius, out=out)
        if distance.dtype != out.dtype:
            out += distance.sub_(rounded).to(out.dtype)
        out.mul_(self.slope).clamp_(-_LARGEST_EXPONENT, _LARGEST_EXPONENT).exp_().log1p_().neg_()
        return torch.threshold_(out, math.log(cutoff), -math.inf)

    def visible_rays_of_pairs(
        self, key: Tensor, query: Tensor, wanted: Tensor | None = None
    ) -> Tensor:
        """Return how many of the `supersampling` rays from key to query arrive, uint8.

        Args:
            key, query: numbers in the whole batch, `image * N + token`, both of one image; they
                broadcast.
            wanted: bool, pairs inside their circle of confusion (C > 0). Only these are traced,
                which is what makes this cheap; the others, and pairs of keys that do not emit,
                count as visible.

        Raises:
            ValueError: when rays are drawn anew for every pair.
        """
        shape = torch.broadcast_shapes(key.shape, query.shape)
        device = self.radius.device
        visible = torch.full(shape, self.config.supersampling, dtype=torch.uint8, device=device)
        if self.token_disparity is None:
            return visible
        traced = self.may_be_hindered(key, within_circles=wanted is not None)
        if wanted is not None:
            traced = traced & wanted
        where = traced.expand(shape).reshape(-1).nonzero().squeeze(1)
        key, query = _pick(key, shape, where), _pick(query, shape, where)
        counts = self.visible_rays(key, query, within_circles=wanted is not None)
        visible.view(-1).scatter_(0, where, counts)
        return visible

    def visible_rays(self, key: Tensor, query: Tensor, *, within_circles: bool = True) -> Tensor:
        """Return (pairs,) uint8 like `visible_rays_of_pairs`, for a list of pairs.

        Args:
            key, query: (pairs,) numbers in the whole batch.
            within_circles: every query lies inside the circle of its key (C > 0).
        """
        count = self.config.supersampling
        visible = torch.full(key.shape, count, dtype=torch.uint8, device=key.device)
        if self.token_disparity is None:
            return visible
        if not self.has_repeatable_rays:
            raise ValueError(
                f"This backend needs the same rays in every call, but {UNREPEATABLE_RAYS}"
            )
        nearest = self._nearest(within_circles).reshape(-1)
        nearest = nearest.index_select(0, 4 * key + ray_direction(self, key, query))
        disparity = self.token_disparity.reshape(-1).index_select(0, key)
        traced = keys_at_risk(self, disparity, nearest)
        if self.config.source_always_visible:
            traced &= key != query
        for image in range(self.batch):
            first, last = image * self.token_count, (image + 1) * self.token_count
            mine = (traced & (key >= first) & (key < last)) if self.batch > 1 else traced
            for pairs in mine.nonzero().squeeze(1).split(PAIRS_TRACED_AT_ONCE):
                of_key, of_query, bound = (
                    value.index_select(0, pairs) for value in (key, query, nearest)
                )
                visible[pairs] = count_visible_rays(
                    self, image, of_key - first, of_query - first, bound
                )
        return visible

    def visible_share(self, visible_rays: Tensor) -> Tensor:
        """Return the visibility in [0, 1] from a count of rays that arrive."""
        share = visible_rays.float() / self.config.supersampling
        if self.config.hardness < self.config.occlusion_ceiling_until:
            share = share.clamp(min=1.0 - self.config.occlusion_ceiling)
        return share

    def may_be_hindered(self, key: Tensor, *, within_circles: bool = True) -> Tensor:
        """Return bool like `key`: it emits, and something may stop its light.

        Args:
            key: numbers in the whole batch.
            within_circles: light that stays inside its circle is meant, not all light.
        """
        if self.token_disparity is None:
            return torch.zeros_like(key, dtype=torch.bool)
        name = f"hindered_within_circles_{within_circles}"
        hindered = self._derived.get(name)
        if hindered is None:
            nearest = self._nearest(within_circles).amax(2).reshape(-1)
            hindered = keys_at_risk(self, self.token_disparity.reshape(-1), nearest)
            if self.emitters is not None:
                hindered &= self.emitters.reshape(-1)
            self._derived[name] = hindered
        assert isinstance(hindered, Tensor)
        return hindered[key]

    def _nearest(self, within_circles: bool) -> Tensor:
        """Return bounds of disparity (B, N, 4) as from `nearest_within_circles`, made once."""
        if not within_circles:
            return nearest_anywhere(self)
        cached = self._derived.get("nearest_within_circles")
        if cached is None:
            cached = self._derived["nearest_within_circles"] = nearest_within_circles(self)
        assert isinstance(cached, Tensor)
        return cached

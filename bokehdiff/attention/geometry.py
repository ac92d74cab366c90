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

from .config import COC_UNITS_PER_TOKEN, OFFICIAL_GRID_SPAN, PIXELS_PER_COC_UNIT, PisaConfig

if TYPE_CHECKING:
    from .local import LocalPlan

DEFAULT_VISIBILITY_BYTES = 1 << 30
"""Largest stored visibility of the local backend; beyond, it is computed again in every call."""


def log_soft_mask(radius: Tensor, distance: Tensor, slope: float, cutoff: float) -> Tensor:
    """Return log C, the soft circle of confusion (Eq. 5-6), broadcast over the arguments.

    `C = sigmoid(slope * (radius - distance))`: light of a source with this circle-of-confusion
    radius reaches this far. Values of C below `cutoff` are exactly 0 (log C is minus infinity).
    The mask at distance 0 is at least one half, so no source is ever without a receiver.
    """
    log_mask = F.logsigmoid(slope * (radius - distance))
    if cutoff > 0:
        log_mask = log_mask.masked_fill(log_mask < math.log(cutoff), -math.inf)
    return log_mask


def jitter_table(config: PisaConfig, *entries: int) -> Tensor:
    """Return offsets (supersampling, *entries, 2) in tokens, x then y; the first is zero.

    The others are stratified: random points of an additive low-discrepancy sequence, which fill
    the token evenly for any number of rays. The same config gives the same table.
    """
    generator = torch.Generator().manual_seed(config.seed)
    table = torch.zeros(config.supersampling, *entries, 2)
    rays = config.supersampling - 1
    if rays:
        # Roberts' R2 sequence: the two-dimensional relative of the golden ratio.
        ratio = 1.32471795724474602596
        steps = torch.tensor([1 / ratio, 1 / ratio**2], dtype=torch.float64)
        counts = torch.arange(rays, dtype=torch.float64).view(rays, *([1] * len(entries)), 1)
        start = torch.rand(*entries, 2, generator=generator, dtype=torch.float64)
        table[1:] = ((start + counts * steps) % 1.0 - 0.5) * config.jitter_width
    return table


def _resize(maps: Tensor, height: int, width: int) -> Tensor:
    """Return (B, C, height, width): bilinear, without antialiasing, as the authors resize."""
    if maps.shape[-2:] == (height, width):
        return maps
    return F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)


def _slide_max(maps: Tensor, axis: int, reach: int) -> Tensor:
    """Return the maximum over `reach` samples to either side along an axis of (B, C, H, W)."""
    kernel, padding = [1, 1], [0, 0]
    kernel[axis - 2], padding[axis - 2] = 2 * reach + 1, reach
    return F.max_pool2d(maps, kernel, stride=1, padding=padding)


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


@dataclass(frozen=True, eq=False)
class PisaGeometry:
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
        generator: source of the noise of `jitter="location_random"`; None uses `config.seed`.
        visibility_byte_budget: see `DEFAULT_VISIBILITY_BYTES`.
    """

    radius: Tensor
    height: int
    width: int
    spacing: tuple[float, float]
    config: PisaConfig
    token_disparity: Tensor | None = None
    occlusion_map: Tensor | None = None
    emitters: Tensor | None = None
    generator: torch.Generator | None = None
    visibility_byte_budget: int = DEFAULT_VISIBILITY_BYTES
    # Derived tables, filled on first use; they never change what is computed.
    _derived: dict[str, object] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        coc_tokens: Tensor,
        disparity: Tensor | None = None,
        *,
        config: PisaConfig | None = None,
        hardness: float | None = None,
        emitters: Tensor | None = None,
        generator: torch.Generator | None = None,
        visibility_byte_budget: int = DEFAULT_VISIBILITY_BYTES,
    ) -> PisaGeometry:
        """Return the geometry of a token grid.

        Args:
            coc_tokens: (B, 1, h, w) circle-of-confusion *radius* in tokens, at least 0.
            disparity: (B or 1, 1, Hd, Wd) in [0, 1], larger is nearer, any resolution; None for
                light that nothing stops.
            config: settings, by default the preset `paper`.
            hardness: replaces `config.hardness`.
            emitters: (B or 1, 1, h, w) bool; other keys give nothing to any query.
            generator: random numbers for `jitter="location_random"`.
            visibility_byte_budget: see the attribute.

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
            generator=generator,
            visibility_byte_budget=visibility_byte_budget,
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
            options: `hardness`, `emitters`, `generator`, `visibility_byte_budget` of `build`.
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
        generator: torch.Generator | None = None,
        visibility_byte_budget: int = DEFAULT_VISIBILITY_BYTES,
    ) -> PisaGeometry:
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
            generator=generator,
            visibility_byte_budget=visibility_byte_budget,
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
        return dataclasses.replace(self, **moved, _derived={})

    # -- dense tables, for the reference backend ---------------------------------------------------

    def distances(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (N, N) distances between tokens, in units."""
        device, length = self.radius.device, 1.0
        if self.config.token_spacing is None:
            # In the order of the authors' roundings: the edge multiplies them by the slope.
            length = OFFICIAL_GRID_SPAN
            y = torch.linspace(0, 1, self.height, dtype=dtype, device=device)
            x = torch.linspace(0, 1, self.width, dtype=dtype, device=device)
        else:
            y = torch.arange(self.height, dtype=dtype, device=device) * self.spacing[0]
            x = torch.arange(self.width, dtype=dtype, device=device) * self.spacing[1]
        y = y.repeat_interleave(self.width)
        x = x.repeat(self.height)
        return ((y[:, None] - y) ** 2 + (x[:, None] - x) ** 2).sqrt() * length

    def log_soft_mask(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return log C (B, N queries, N keys)."""
        radius = self.radius.to(dtype)[:, None, :]
        return log_soft_mask(radius, self.distances(dtype), self.slope, self.config.cutoff)

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
            row, column = number // self.width, number % self.width
            noise_source = self.generator
            if noise_source is None:
                noise_source = torch.Generator().manual_seed(self.config.seed)
            queries_at_once = max(1, (1 << 20) // tokens)
            for image in range(self.batch):
                noise = None
                if self.config.jitter == "location_random" and self.config.supersampling > 1:
                    # Laid out as in the authors' code, so that a seed gives their numbers.
                    noise = torch.rand(
                        self.config.supersampling - 1, self.config.segments, tokens, tokens, 2,
                        generator=noise_source, device=noise_source.device,
                    ).to(device)  # fmt: skip
                for query in number.split(queries_at_once):
                    rays = self.visible_rays(
                        image,
                        number,
                        row[query, None] - row,
                        column[query, None] - column,
                        noise=None if noise is None else noise[:, :, query],
                    )
                    visible[image, query] = self.visible_share(rays)
        if self.emitters is not None:
            visible = visible * self.emitters[:, None, :]
        return visible

    # -- visibility of pairs, shared by every backend ----------------------------------------------

    def visible_share(self, visible_rays: Tensor) -> Tensor:
        """Return the visibility in [0, 1] from a count of rays that arrive."""
        share = visible_rays.float() / self.config.supersampling
        if self.config.hardness < self.config.occlusion_ceiling_until:
            share = share.clamp(min=1.0 - self.config.occlusion_ceiling)
        return share

    def positions(self) -> tuple[Tensor, Tensor]:
        """Return x (N,) and y (N,) of the token centres, from -1 to 1 across the image."""
        cached = self._derived.get("positions")
        if cached is None:
            device, dtype = self.radius.device, self.occlusion_dtype
            rows = (2 * torch.arange(self.height, device=device, dtype=dtype) + 1) / self.height - 1
            columns = (2 * torch.arange(self.width, device=device, dtype=dtype) + 1) / self.width
            columns = columns - 1
            if self.config.token_enumeration == "column_major":
                # The authors let the axis with `height` values run fastest and use it as x.
                cached = (rows.repeat(self.width), columns.repeat_interleave(self.height))
            else:
                cached = (columns.repeat(self.height), rows.repeat_interleave(self.width))
            self._derived["positions"] = cached
        return cached  # type: ignore[return-value]

    @property
    def occlusion_dtype(self) -> torch.dtype:
        """Return the precision in which rays are traced."""
        return torch.float32 if self.occlusion_map is None else self.occlusion_map.dtype

    def ray_depths(self) -> Tensor:
        """Return p (segments,): a sample of a key with disparity d lies at p d + (1 - p)."""
        return torch.linspace(
            0.1, 0.9, self.config.segments, dtype=self.occlusion_dtype, device=self.radius.device
        )

    def visible_rays(
        self,
        image: int,
        key: Tensor,
        step_y: Tensor,
        step_x: Tensor,
        *,
        nearest: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Return how many of the `supersampling` rays from key to query arrive (Eq. 7-8).

        A ray is stopped when, at any of its samples, the scene is strictly nearer than the sample.

        Args:
            image: index into the batch.
            key: (keys,) token numbers.
            step_y, step_x: (steps, 1) or (steps, keys), whole tokens from key to query. Queries
                off the grid are allowed; what is said of them means nothing.
            nearest: (keys,) bound of the disparity that the rays of a key can meet, from
                `NearestDisparity`. Samples that nothing can stop are then not looked up, which
                does not change the result.
            noise: (supersampling - 1, segments, steps, keys, 2) in [0, 1), for
                `jitter="location_random"`.

        Returns:
            (steps, keys) uint8.
        """
        assert self.token_disparity is not None and self.occlusion_map is not None
        config = self.config
        rays, keys = config.supersampling, key.numel()
        disparity = self.token_disparity[image, key]
        order = risk = None
        if nearest is not None:
            # Keys at greater risk first: those with a sample at risk are the first ones, at any p.
            risk, order = self.least_depth_at_risk(disparity, nearest).sort()
            key, disparity = key[order], disparity[order]
        entries = (config.segments,) if config.jitter == "location_table" else ()
        offsets = jitter_table(config, *entries).to(self.occlusion_map)
        width_x, width_y = self._jitter_widths()
        stopped = torch.zeros(rays, step_x.shape[0], keys, dtype=torch.bool, device=key.device)
        for segment, share in enumerate(self.ray_depths()):
            count = keys if risk is None else int(torch.searchsorted(risk, share))
            if count == 0:
                continue
            depth = share * disparity[:count] + (1 - share)
            sample, fraction = self._ray_samples(
                image, key[:count], step_y[:, :count], step_x[:, :count], share
            )
            moved = torch.empty_like(sample)
            for ray in range(rays):
                if ray and config.jitter == "location_random":
                    assert noise is not None
                    offset = noise[ray - 1, segment, :, :count] - 0.5
                elif ray and config.jitter == "location_table":
                    offset = offsets[ray, segment]
                elif ray:
                    offset = fraction[..., None] * offsets[ray]
                if ray:
                    torch.add(sample[..., 0], offset[..., 0] * width_x, out=moved[..., 0])
                    torch.add(sample[..., 1], offset[..., 1] * width_y, out=moved[..., 1])
                met = F.grid_sample(
                    self.occlusion_map[image : image + 1],
                    (moved if ray else sample)[None],
                    mode="bilinear",
                    padding_mode="zeros",
                    align_corners=False,
                )[0, 0]
                stopped[ray, :, :count] |= met - depth > 0
        visible = rays - stopped.sum(0, dtype=torch.uint8)
        if config.source_always_visible:
            visible.masked_fill_((step_y == 0) & (step_x == 0), rays)
        if order is not None:
            visible = torch.empty_like(visible).index_copy_(1, order, visible)
        return visible

    def least_depth_at_risk(self, disparity: Tensor, nearest: Tensor) -> Tensor:
        """Return p from which on the samples of keys may be stopped; above 0.9 none may.

        A sample lies at p d + 1 - p, so something at `nearest` can stop it only if
        p > (1 - nearest) / (1 - d). Slightly less is returned, to be safe from rounding.
        """
        return (1 - nearest) / (1 - disparity).clamp(min=1e-9) * (1 - 1e-5) - 1e-6

    def _jitter_widths(self) -> Tensor:
        """Return (2,) full width of the jitter in x and y, in positions from -1 to 1."""
        # The authors, who move the samples, scale both axes by the number of rows.
        columns = self.width if self.config.jitter == "source_table" else self.height
        widths = torch.tensor([2.0 / columns, 2.0 / self.height], dtype=self.occlusion_dtype)
        return widths.to(self.radius.device) * self.config.jitter_width

    def _ray_samples(
        self, image: int, key: Tensor, step_y: Tensor, step_x: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the samples at p = `share` without jitter, and their place on the ray (Eq. 7).

        Samples are (steps, keys, 2), x and y from -1 to 1; the place t is 0 at the query, 1 at the
        key, and broadcasts to (steps, keys).
        """
        assert self.token_disparity is not None
        config, disparity = self.config, self.token_disparity[image]
        query = None
        if config.sample_depth == "query" or config.token_enumeration != "row_major":
            query = (key + step_y * self.width + step_x).clamp(0, self.token_count - 1)
        of_key = disparity[key]
        if config.sample_depth == "key":
            # Eq. 7 with 1 - depth = p (1 - d) put in: no division by zero at d = 1.
            fraction = share * of_key / (share * of_key + (1 - share))
        else:
            assert query is not None
            depth = share * disparity[query] + (1 - share)
            fraction = (1 - depth) * of_key / (depth * (1 - of_key))

        sample = disparity.new_empty(step_x.shape[0], key.numel(), 2)
        tokens = (2.0 / self.width, 2.0 / self.height)
        for axis, (centre, step) in enumerate(zip(self.positions(), (step_x, step_y), strict=True)):
            place = sample[..., axis]
            if query is None:
                torch.mul(step, (1 - fraction) * tokens[axis], out=place)
                place += centre[key]
            else:
                torch.mul(fraction, centre[key] - centre[query], out=place)
                place += centre[query]
        return sample, fraction

    def local_plan(self) -> LocalPlan:
        """Return the tiles, offsets and stored visibility of the local backend, made once."""
        plan = self._derived.get("local_plan")
        if plan is None:
            from .local import LocalPlan

            plan = LocalPlan.make(self)
            self._derived["local_plan"] = plan
        return plan  # type: ignore[return-value]


class NearestDisparity:
    """Upper bounds of the disparity that the rays of each key can meet; widened step by step."""

    def __init__(self, geometry: PisaGeometry) -> None:
        assert geometry.occlusion_map is not None
        self.geometry, config = geometry, geometry.config
        # Samples may leave the segment between the tokens; then only the whole image bounds them.
        self.on_segment = config.sample_depth == "key" and config.token_enumeration == "row_major"
        # Beyond the segment: half the jitter, and interpolation with the next sample of the map.
        half_jitter = float(geometry._jitter_widths()[0]) / 2 * geometry.width / 2
        self.slack = math.ceil(max(half_jitter, 0.5) + 0.5 - 1e-6)
        size = (geometry.height, geometry.width)
        self._within = {0: F.adaptive_max_pool2d(geometry.occlusion_map, size)}

    def within(self, reach: int) -> Tensor:
        """Return (B, N) for rays to queries at most so many tokens away on each axis."""
        reach += self.slack
        if not self.on_segment or reach >= max(self.geometry.height, self.geometry.width):
            nearest = self._within[0].amax(dim=(2, 3), keepdim=True).expand_as(self._within[0])
            return nearest.flatten(1)
        if reach not in self._within:
            start = max(known for known in self._within if known < reach)
            wider = _slide_max(self._within[start], 3, reach - start)
            self._within[reach] = _slide_max(wider, 2, reach - start)
        return self._within[reach].flatten(1)

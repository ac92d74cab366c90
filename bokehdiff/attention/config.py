"""Settings of physics-inspired self-attention (PISA), and the three presets."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

PIXELS_PER_COC_UNIT = 10.0
"""Image pixels in one unit of the authors' circle-of-confusion channel (`K / 10`)."""

COC_UNITS_PER_TOKEN = 1.6
"""Units in one 16-pixel token, the token of the layer that the authors replace."""

OFFICIAL_GRID_SPAN = 51.2
"""Units that the authors give to each side of the token grid, whatever its size."""


@dataclass(frozen=True)
class PisaConfig:
    """What PISA computes, independent of image and model.

    The soft circle of confusion is `C = sigmoid(ln(hardness) * (radius - distance))`, lengths in
    circle-of-confusion units. A token is 1.6 units of radius wide; `token_spacing` is the length of
    the same token when distances are measured (only the authors' code makes them differ).

    The class defaults are the preset `paper`. Where the authors' code departs from their paper, one
    field holds the choice; the letters are those used in the interoperability notes:

    | item | field |
    |---|---|
    | D1 order in which tokens are placed | `token_enumeration` |
    | D2 depth used along the ray | `sample_depth` |
    | D3 final hardness | `hardness` |
    | D4 dropout of attention weights | `dropout`, `dropout_at_inference` |
    | D5, D6 growth of the hardness | `initial_hardness`, `hardness_per_step`, `maximum_hardness` |
    | D7 jitter of the rays | `jitter`, `jitter_width`, `supersampling`, `seed` |
    | D8 unit of distance | `token_spacing` |
    | D9 token grid of a picture | `grid_rule` |
    | D11 no conditioning given | `missing_conditioning` |
    | clamp of the occlusion while soft | `occlusion_ceiling`, `occlusion_ceiling_until` |
    | a source seen from its own position | `source_always_visible` |

    D10, D12, D13, D14, D16 and D17 are crashes, overflows or wasted work with one right answer, so
    there is nothing to choose; D15 is kept as the paper has it; D18 concerns the LoRA.

    Attributes:
        name: preset the settings started from, for messages only.
        hardness: the paper's k, at least 1; `ln(hardness)` is the slope of the edge per unit.
            1 gives a constant mask, so plain softmax over the queries.
        initial_hardness: hardness at optimiser step 0.
        hardness_per_step: growth per optimiser step.
        maximum_hardness: growth stops here.
        cutoff: mask values below are exactly 0. 0 keeps every pair.
        segments: samples along each ray; 0 switches occlusion off.
        supersampling: rays per pair of tokens, the first one unjittered.
        jitter: `source_table` moves the source by a fixed stratified table; `location_table` moves
            every sample by a fixed table; `location_random` moves every sample of every pair by
            fresh noise (dense backend only).
        jitter_width: full width of the jitter, in tokens.
        seed: seed of tables, noise and dropout where the caller passes no generator.
        sample_depth: token whose disparity places the samples along the ray.
        occlusion_map_scale: occluders are looked up in a disparity map of this many samples per
            token and axis; see `resample_occlusion_map`.
        resample_occlusion_map: True always resizes to that size. False keeps a map that has between
            one sample per token and that size.
        occlusion_ceiling: largest share of occlusion while hardness < `occlusion_ceiling_until`.
        occlusion_ceiling_until: see above.
        source_always_visible: a token sees itself, whatever its disparity.
        token_enumeration: `row_major`, or `column_major` for the authors' mismatch, which matters
            on grids that are not square.
        token_spacing: distance units from one token to the next; None divides the authors' span
            of 51.2 by the number of tokens less one, on each axis.
        grid_rule: `aspect` finds the grid with as many tokens as there are and the closest aspect
            ratio; `integer_stride` is the authors' rule, which fails on odd latents.
        dropout: probability of dropping an attention weight, in training.
        dropout_at_inference: drop at inference too.
        missing_conditioning: `error`, or `vanilla` for ordinary attention.
    """

    name: str = "paper"
    hardness: float = 1e6
    initial_hardness: float = 1.0
    hardness_per_step: float = 1.0
    maximum_hardness: float = 1e6
    cutoff: float = 1e-12
    segments: int = 7
    supersampling: int = 5
    jitter: Literal["source_table", "location_table", "location_random"] = "source_table"
    jitter_width: float = 1.0
    seed: int = 0
    sample_depth: Literal["key", "query"] = "key"
    occlusion_map_scale: int = 3
    resample_occlusion_map: bool = False
    occlusion_ceiling: float = 1.0
    occlusion_ceiling_until: float = 1e6
    source_always_visible: bool = True
    token_enumeration: Literal["row_major", "column_major"] = "row_major"
    token_spacing: float | None = COC_UNITS_PER_TOKEN
    grid_rule: Literal["aspect", "integer_stride"] = "aspect"
    dropout: float = 0.0
    dropout_at_inference: bool = False
    missing_conditioning: Literal["error", "vanilla"] = "error"

    def __post_init__(self) -> None:
        choices = {
            "jitter": ("source_table", "location_table", "location_random"),
            "sample_depth": ("key", "query"),
            "token_enumeration": ("row_major", "column_major"),
            "grid_rule": ("aspect", "integer_stride"),
            "missing_conditioning": ("error", "vanilla"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        for name in ("hardness", "initial_hardness", "maximum_hardness"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 1):
                raise ValueError(
                    f"{name} must be finite and at least 1 (its logarithm is the slope of the "
                    f"circle's edge), got {value}."
                )
        ranges: dict[str, tuple[float, float]] = {
            "hardness_per_step": (0.0, math.inf),
            "cutoff": (0.0, 0.1),
            "segments": (0, math.inf),
            "supersampling": (1, 255),
            "jitter_width": (0.0, 1.0),
            "occlusion_map_scale": (1, math.inf),
            "occlusion_ceiling": (0.0, 1.0),
            "dropout": (0.0, 0.999),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must lie between {low} and {high}, got {value}.")
        if self.token_spacing is not None and not self.token_spacing > 0:
            raise ValueError(f"token_spacing must be positive or None, got {self.token_spacing}.")

    @classmethod
    def preset_names(cls) -> tuple[str, ...]:
        """Return the names that `preset` accepts."""
        return tuple(_PRESETS)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> PisaConfig:
        """Return the settings called `name`, with `changes` applied.

        `paper`: the published equations, what we train. `official_weights`: what the published
        weights were trained under, made deterministic. `official_exact`: every quirk, dropout
        and noise included, for comparisons with the authors' code.
        """
        if name not in _PRESETS:
            raise ValueError(f"There is no PISA preset {name!r}; choose one of {tuple(_PRESETS)}.")
        return cls(**{"name": name, **_PRESETS[name], **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PisaConfig:
        """Return the settings that `to_dict` wrote; unknown names are refused."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"Unknown PISA settings {unknown}; known are {sorted(known)}.")
        return cls(**values)

    def replace(self, **changes: Any) -> PisaConfig:
        """Return a copy with `changes` applied."""
        return dataclasses.replace(self, **changes)

    def at_step(self, step: int) -> PisaConfig:
        """Return the settings for optimiser step `step`, counted from 0."""
        if step < 0:
            raise ValueError(f"The optimiser step must be at least 0, got {step}.")
        grown = self.initial_hardness + self.hardness_per_step * step
        return self.replace(hardness=min(grown, self.maximum_hardness))


_OFFICIAL: dict[str, Any] = {
    "hardness": 1e7,
    "initial_hardness": 3.0,
    "hardness_per_step": 2.0,
    "sample_depth": "query",
    "resample_occlusion_map": True,
    "occlusion_ceiling": 0.99,
    "source_always_visible": False,
    "dropout": 0.1,
}

_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "official_weights": {
        **_OFFICIAL,
        "jitter": "location_table",
        "token_spacing": OFFICIAL_GRID_SPAN / 31,
    },
    "official_exact": {
        **_OFFICIAL,
        "jitter": "location_random",
        "cutoff": 0.0,
        "token_enumeration": "column_major",
        "token_spacing": None,
        "grid_rule": "integer_stride",
        "dropout_at_inference": True,
    },
}

"""BokehFlow: lens blur for films, in time and memory linear in the pixels.

Two streams of tokens, of 4 x 4 pixels each, see the photo: one finds depth, the other mends the
blur. Physics does most of the work: depth and camera give every pixel its circle of confusion, and
a classical renderer blurs the photo with it. The bokeh stream corrects that rendering, at first not
at all. It cannot paint: it says which share of three other pictures each pixel takes, of the photo,
of what lies in front of the plane in focus, and of what lies behind it. So colours come from the
photo, uniform surfaces stay uniform, and what no circle of confusion reaches stays as it is.

The order of the computation, which is also the order of this file: ``observe`` (the stem and, if it
sees no camera, the depth stream), the lens, the bokeh stream, the rendering.

Tokens are mixed by one of two blocks: ``gated_conv``
(:class:`~bokehdiff.models.gated_convolution.GatedConvolutionBlock`) or ``bigdr``
(:class:`~bokehdiff.models.bidirectional_recurrence.BidirectionalRecurrenceBlock`). Neither compares
all pairs of tokens. Over a film, features are carried from frame to frame
(:mod:`bokehdiff.models.temporal_state`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput

from ..optics import lens_strength, signed_defocus
from ..rendering.aperture import Aperture
from ..rendering.circle_reach import change_within_reach, reaching_radius
from ..rendering.front_and_behind import front_and_behind
from ..rendering.gaussian_pyramid import gaussian_pyramid_blur, levels_for
from ..rendering.painted_layers import painted_layers_blur
from ..rendering.radius_bins import binned_blur
from ..srgb import linear_to_srgb, srgb_to_linear
from .bidirectional_recurrence import BidirectionalRecurrenceBlock, GateFloors
from .bokehflow_heads import (
    PIXELS_PER_TOKEN,
    BokehHead,
    DepthHead,
    as_pixels,
    radius_scale,
    radius_tokens,
)
from .bokehflow_lens import (
    Lens,
    PerPhoto,
    camera_vector,
    check_camera,
    nominal_camera,
    nominal_metres,
    per_photo,
)
from .convolutional_unet import start_at_zero
from .gated_convolution import GROUPS, FilmScaleAndShift, GatedConvolutionBlock
from .temporal_state import (
    CUT,
    BokehFlowState,
    FeatureCarry,
    Stillness,
    as_cells,
    carried,
    remembered,
)

__all__ = ["VARIANTS", "BokehFlowModel", "BokehFlowOutput", "DepthFindings", "Observation"]

SMALLEST_SIDE = 16

REFERENCE_WIDTH = 1280
"""Width in pixels of the photo in which ``max_coc_radius`` is counted."""

BLURRED_PX = (1.0, 4.0)
"""Radii between which a pixel begins to keep its blur over time; what is sharp keeps its noise."""

COARSE_DEPTH_BLOCKS = 2
"""Blocks of the depth stream after which the recurrent gates first hear how blurred it will be."""

GATE_HALF_LIVES = (8.0, 256.0)
"""Tokens, of the first and of the last block: how long the gates of a recurrence must remember."""

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "gated_conv": {
        "nano": dict(channels=40, stem_channels=24),
        "small": dict(channels=96, stem_channels=48),
        "base": dict(channels=200, stem_channels=96),
    },
    "bigdr": {
        "nano": dict(channels=80, stem_channels=40, heads=4, key_channels=16, value_channels=20),
        "small": dict(channels=160, stem_channels=80, heads=5, key_channels=32, value_channels=32),
        "base": dict(channels=256, stem_channels=128, heads=8, key_channels=32, value_channels=32),
    },
}
"""The published sizes by mixer and name, as arguments of :class:`BokehFlowModel`."""


@dataclass
class BokehFlowOutput(BaseOutput):
    """What BokehFlow says of B photos.

    Args:
        bokeh: (B, 3, H, W) the photos with lens blur, display-encoded sRGB in [0, 1].
        depth: (B, 1, H, W) metres; nominal ones (:func:`nominal_metres`) of relative disparity.
        inverse_depth: (B, 1, H, W) 1/metres, what was rendered with.
        coc: (B, 1, H, W) radius of the circle of confusion in pixels, positive in front of the
            plane in focus, negative behind it, clamped to the largest radius.
        clamped_share: (B,) share of the pixels whose circle was larger.
        state: for the next frame.
        physics: (B, 3, H, W) the rendering alone, if it was asked for.
        coarse_inverse_depth: (B, 1, H/4, W/4) of the padded photo, 1/metres: a first guess, of the
            recurrent network alone.
    """

    bokeh: torch.Tensor
    depth: torch.Tensor
    inverse_depth: torch.Tensor
    coc: torch.Tensor
    clamped_share: torch.Tensor
    state: BokehFlowState | None = None
    physics: torch.Tensor | None = None
    coarse_inverse_depth: torch.Tensor | None = None


@dataclass
class Observation:
    """What a photo shows before a lens is chosen.

    Args:
        photo: (B, 3, H', W') padded.
        size: (H, W) of the photo given.
        stem: (B, C, H'/4, W'/4) tokens.
        picture: (B, 3, H'/2, W'/2) what will be remembered of it.
        change: (B, 1, H'/4, W'/4) since the last frame, see
            :class:`~bokehdiff.models.temporal_state.Stillness`; None for a first frame.
        last: state of the last frame.
        depth: what the depth stream found; None where it has to see the camera first.
    """

    photo: torch.Tensor
    size: tuple[int, int]
    stem: torch.Tensor
    picture: torch.Tensor
    change: torch.Tensor | None
    last: BokehFlowState | None
    depth: DepthFindings | None = None

    @property
    def begins_scene(self) -> bool:
        """Whether the picture of the film has changed as at a cut; a first frame has not."""
        return self.change is not None and float(self.change.mean()) > CUT

    @property
    def inverse_depth(self) -> torch.Tensor | None:
        """(B, 1, H, W) 1/metres, the network's own; None where it depends on the camera."""
        if self.depth is None:
            return None
        return self.depth.inverse_depth[..., : self.size[0], : self.size[1]]


class DepthFindings(NamedTuple):
    """Ends of the depth stream: 1/metres (B, 1, H', W'), a first guess of it (B, 1, H'/4, W'/4),
    tokens, and those that the bokeh stream hears of."""

    inverse_depth: torch.Tensor
    coarse: torch.Tensor | None
    features: torch.Tensor
    told: list[torch.Tensor]
    memories: dict[str, Any]


class BokehFlowModel(ModelMixin, ConfigMixin):
    """Blurs photos, or the frames of a film, as a lens would, and finds their depth.

    Sizes as published: :meth:`from_variant`. Untrained it returns the physics rendering.

    Args:
        mixer: ``"gated_conv"``, fast, sees 73 tokens (292 pixels) across; or ``"bigdr"``, a
            recurrence in four directions, sees the whole picture.
        channels: of a token, a multiple of 8.
        stem_channels: after the first convolution, a multiple of 8.
        head_channels: of both heads at full resolution, a multiple of 8.
        camera_channels: of the embedding of the camera.
        blocks: of each stream.
        fusion_every: after so many blocks the streams hear of each other.
        fusion: ``"both"``: each hears of the other, as published, so that depth depends on the
            camera; ``"depth_to_bokeh"``: depth is found once for all cameras.
        radius_tokens: the bokeh stream sees the circles of confusion, not at its end alone; needs
            ``fusion="depth_to_bokeh"``.
        renderer: ``"pyramid"``, ``"binned"`` or ``"layered"``, see ``bokehdiff.rendering``; None:
            the pyramid for ``gated_conv``, layers for ``bigdr``.
        max_coc_radius: largest radius, in pixels of a photo 1280 pixels wide.
        nearest_m, farthest_m: between which the network finds depth.
        heads, key_channels, value_channels, shared_projections: of the recurrence, see
            :class:`~bokehdiff.models.bidirectional_recurrence.BidirectionalRecurrenceBlock`.
        temporal: what is carried over a film: ``"feature"`` (tokens, where the picture stands
            still), ``"none"``; or with ``bigdr`` ``"final"`` (the state at the end of every scan,
            as published) and ``"chunk"`` (at many places of it).
        largest_carry: how much of the last frame a picture that stands still keeps.

    Raises:
        ValueError: options that do not exist or do not go together.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ["GatedConvolutionBlock", "BidirectionalRecurrenceBlock"]

    @register_to_config
    def __init__(
        self,
        mixer: str = "gated_conv",
        channels: int = 40,
        stem_channels: int = 24,
        head_channels: int = 16,
        camera_channels: int = 32,
        blocks: int = 6,
        fusion_every: int = 2,
        fusion: str = "both",
        radius_tokens: bool = False,
        renderer: str | None = None,
        max_coc_radius: float = 31.0,
        nearest_m: float = 0.3,
        farthest_m: float = 100.0,
        heads: int = 4,
        key_channels: int = 16,
        value_channels: int = 20,
        shared_projections: bool = False,
        temporal: Literal["feature", "none", "final", "chunk"] = "feature",
        largest_carry: float = 0.85,
    ) -> None:
        super().__init__()
        _check_options(
            mixer, channels, stem_channels, head_channels, fusion, radius_tokens, renderer, temporal
        )
        self.renderer = renderer or ("pyramid" if mixer == "gated_conv" else "layered")
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem_channels, 7, stride=2, padding=3),
            nn.GroupNorm(GROUPS, stem_channels),
            nn.SiLU(),
            nn.Conv2d(stem_channels, stem_channels, 3, stride=2, padding=1, groups=stem_channels),
            nn.Conv2d(stem_channels, channels, 1),
            nn.GroupNorm(GROUPS, channels),
        )
        self.camera_embedding = nn.Sequential(
            nn.Linear(3, camera_channels), nn.SiLU(), nn.Linear(camera_channels, camera_channels)
        )
        self.films = nn.ModuleList(
            start_at_zero(nn.Linear(camera_channels, 2 * channels)) for _ in range(blocks)
        )

        def block() -> nn.Module:
            if mixer == "gated_conv":
                return GatedConvolutionBlock(channels)
            return BidirectionalRecurrenceBlock(
                channels,
                heads,
                key_channels,
                value_channels,
                shared_projections=shared_projections,
                temporal="none" if temporal == "feature" else temporal,
            )

        self.depth_blocks = nn.ModuleList(block() for _ in range(blocks))
        self.bokeh_blocks = nn.ModuleList(block() for _ in range(blocks))
        meetings = blocks // fusion_every
        self.depth_to_bokeh = nn.ModuleList(
            start_at_zero(nn.Conv2d(channels, channels, 1)) for _ in range(meetings)
        )
        self.bokeh_to_depth = nn.ModuleList(
            start_at_zero(nn.Conv2d(channels, channels, 1))
            for _ in range(meetings if fusion == "both" else 0)
        )
        self.radius_embedding = (
            start_at_zero(nn.Conv2d(2 * PIXELS_PER_TOKEN**2, channels, 1))
            if radius_tokens
            else None
        )
        if mixer == "bigdr":
            half_lives = geometric(*GATE_HALF_LIVES, blocks)
            self.depth_floors = GateFloors(blocks, half_lives, with_blur=False)
            self.bokeh_floors = GateFloors(blocks, half_lives, with_blur=True)
            self.coarse_depth = nn.Conv2d(channels, 1, 1)
        self.depth_head = DepthHead(channels, head_channels)
        self.bokeh_head = BokehHead(channels, head_channels)
        if temporal == "feature":
            self.stillness = Stillness(largest_carry)
            self.depth_carry, self.bokeh_carry = FeatureCarry(channels), FeatureCarry(channels)

    @classmethod
    def from_variant(
        cls, variant: str, mixer: str = "gated_conv", **overrides: Any
    ) -> BokehFlowModel:
        """An untrained network of a published size: ``"nano"``, ``"small"`` or ``"base"``.

        Random weights come from torch's global generator.

        Args:
            variant: the size.
            mixer: ``"gated_conv"`` or ``"bigdr"``, which have sizes of their own.
            overrides: further arguments of the class.

        Raises:
            ValueError: there is no such size.
        """
        if mixer not in VARIANTS or variant not in VARIANTS[mixer]:
            raise ValueError(
                f"There is no {variant!r} with the mixer {mixer!r}; wanted one of "
                f"{', '.join(VARIANTS['bigdr'])} with {' or '.join(VARIANTS)}."
            )
        size = VARIANTS[mixer][variant]
        if mixer == "bigdr":
            size = {"head_channels": 32, "camera_channels": 64, **size}
        return cls(**{"mixer": mixer, **size, **overrides})

    # -- What is asked -----------------------------------------------------------------------------

    def forward(
        self,
        image: torch.Tensor | Observation,
        f_number: PerPhoto,
        focal_length_mm: PerPhoto,
        focus_distance_m: PerPhoto,
        sensor_width_mm: PerPhoto = 36.0,
        state: BokehFlowState | None = None,
        *,
        inverse_depth: torch.Tensor | None = None,
        photo_width_px: PerPhoto | None = None,
        aperture: Aperture | None = None,
        return_physics: bool = False,
        return_dict: bool = True,
    ) -> BokehFlowOutput | tuple[Any, ...]:
        """The photos as a camera would take them.

        The radius of the circle of confusion is ``K |1/z - 1/s|`` with K of
        :func:`bokehdiff.optics.lens_strength`.

        Args:
            image: (B, 3, H, W) display-encoded sRGB in [0, 1], sides of at least 16 pixels; or what
                :meth:`observe` made of it, for another lens on the same photo.
            f_number, focal_length_mm, focus_distance_m: of the lens; the focus in **metres**, from
                beyond the focal length to infinity. One number or one per photo.
            sensor_width_mm: what ``photo_width_px`` pixels cover.
            state: of the frame before, for films; None begins one. Not with an observation, which
                has it.
            inverse_depth: (B, 1, H, W) 1/metres; None: the network's own.
            photo_width_px: width of the uncropped photo in pixels of ``image``; None: W.
            aperture: of the renderers ``"binned"`` and ``"layered"``.
            return_physics: also return the rendering alone.
            return_dict: return a plain tuple when false.

        Raises:
            ValueError: what does not fit, or a focus within the focal length.
        """
        observation = self._seen(image, state)
        photo = observation.photo
        batch, width = photo.shape[0], observation.size[1]
        f_number, focal_length_mm, focus_distance_m, sensor_width_mm, photo_width = (
            per_photo(name, value, batch, photo.device)
            for name, value in (
                ("f_number", f_number),
                ("focal_length_mm", focal_length_mm),
                ("focus_distance_m", focus_distance_m),
                ("sensor_width_mm", sensor_width_mm),
                ("photo_width_px", width if photo_width_px is None else photo_width_px),
            )
        )
        check_camera(f_number, focal_length_mm, focus_distance_m, sensor_width_mm, photo_width)
        K = lens_strength(f_number, focal_length_mm, focus_distance_m, sensor_width_mm, photo_width)
        output = self._blur(
            observation,
            self._lens(
                1 / focus_distance_m,
                K,
                photo_width,
                camera_vector(f_number, focal_length_mm, focus_distance_m),
                self._levels(photo_width_px, width),
            ),
            inverse_depth,
            aperture,
            return_physics,
        )
        return output if return_dict else output.to_tuple()

    def blur(
        self,
        image: torch.Tensor | Observation,
        df: PerPhoto,
        K: PerPhoto,
        *,
        disparity: torch.Tensor | None = None,
        metric: bool = False,
        state: BokehFlowState | None = None,
        photo_width_px: PerPhoto | None = None,
        aperture: Aperture | None = None,
        return_physics: bool = False,
    ) -> BokehFlowOutput:
        """The photos with the blur ``K |disparity - df|``, whatever camera that may be.

        Args:
            image: as of :meth:`forward`.
            df: disparity of the plane in focus; one number or one per photo.
            K: pixels of radius per unit of disparity; one number or one per photo.
            disparity: (B, 1, H, W), larger is nearer, in [0, 1], or 1/metres with `metric`; None:
                the network's own, and then df and K are metric.
            metric: disparity, df and K count in 1/metres.
            state, photo_width_px, aperture, return_physics: as of :meth:`forward`.

        Raises:
            ValueError: what does not fit.
        """
        observation = self._seen(image, state)
        photo = observation.photo
        batch, width = photo.shape[0], observation.size[1]
        df, K, photo_width = (
            per_photo(name, value, batch, photo.device)
            for name, value in (
                ("df", df),
                ("K", K),
                ("photo_width_px", width if photo_width_px is None else photo_width_px),
            )
        )
        if not torch.compiler.is_compiling() and bool(((df < 0) | (K < 0)).any()):
            raise ValueError(
                f"df is {df.tolist()} and K {K.tolist()}; wanted neither below zero: a disparity, "
                "and pixels of radius per unit of it."
            )
        if disparity is not None and not metric:
            disparity, df, K = nominal_metres(disparity, df, K)
        camera = nominal_camera(df, K, photo_width)
        lens = self._lens(df, K, photo_width, camera, self._levels(photo_width_px, width))
        return self._blur(observation, lens, disparity, aperture, return_physics)

    def _seen(self, image: torch.Tensor | Observation, state: BokehFlowState | None) -> Observation:
        if not isinstance(image, Observation):
            return self.observe(image, state=state)
        if state is not None:
            raise ValueError(
                "state goes with observe, which made this observation; leave it out here."
            )
        return image

    def observe(self, image: torch.Tensor, *, state: BokehFlowState | None = None) -> Observation:
        """What photos show before a lens is chosen: most of the work, if depth sees no camera.

        Args:
            image: (B, 3, H, W) as of :meth:`forward`.
            state: of the frame before.

        Raises:
            ValueError: no such photo, or a state of another size.
        """
        if (
            image.dim() != 4
            or image.shape[1] != 3
            or not image.is_floating_point()
            or min(image.shape[-2:]) < SMALLEST_SIDE
        ):
            raise ValueError(
                f"image is {tuple(image.shape)} {image.dtype}; wanted (B, 3, H, W) floats in [0, 1]"
                f", sides of at least {SMALLEST_SIDE} pixels."
            )
        height, width = image.shape[-2:]
        photo = F.pad(
            image.float(),
            (0, -width % PIXELS_PER_TOKEN, 0, -height % PIXELS_PER_TOKEN),
            mode="replicate",
        )
        # Depthwise convolutions of this layout take half the time on a processor.
        stem = self.stem(photo.to(self.dtype, memory_format=torch.channels_last))
        picture = remembered(photo)
        last = None if state is None else state.picture
        if last is not None and last.shape != picture.shape:
            raise ValueError(
                f"The state belongs to {last.shape[0]} film(s) of about {2 * last.shape[-2]} x "
                f"{2 * last.shape[-1]} pixels, here are {image.shape[0]} of {height} x {width}; "
                "begin with state=None."
            )
        change = None
        if self.config.temporal == "feature" and last is not None:
            change = self.stillness.change(picture, last)
            picture = carried(picture, last, as_cells(self.stillness(change)))
        observation = Observation(photo, (height, width), stem, picture, change, state)
        if self.config.fusion == "depth_to_bokeh":
            observation.depth = self._find_depth(observation)
        return observation

    # -- The depth stream --------------------------------------------------------------------------

    def _find_depth(self, seen: Observation) -> DepthFindings:
        """The depth stream on its own, without any camera."""
        memories: dict[str, Any] = {}
        features, coarse, told = seen.stem, None, []
        floors = self._floors(self.depth_floors, seen) if self.config.mixer == "bigdr" else None
        for number in range(len(self.depth_blocks)):
            features = self._block("depth", number, features, None, floors, seen.last, memories)
            if number + 1 == COARSE_DEPTH_BLOCKS and self.config.mixer == "bigdr":
                coarse = self.inverse_depth_of(self.coarse_depth(features))
            if (number + 1) % self.config.fusion_every == 0:
                told.append(features)
        return self._depth_findings(seen, features, coarse, told, memories)

    def _depth_findings(
        self,
        seen: Observation,
        features: torch.Tensor,
        coarse: torch.Tensor | None,
        told: list[torch.Tensor],
        memories: dict[str, Any],
    ) -> DepthFindings:
        if seen.change is not None:
            assert seen.last is not None and seen.last.depth_features is not None
            stillness = self.stillness(seen.change)
            features = self.depth_carry(features, seen.last.depth_features, stillness)
        inverse_depth = self.inverse_depth_of(self.depth_head(features))
        return DepthFindings(inverse_depth, coarse, features, told, memories)

    def inverse_depth_of(self, answer: torch.Tensor) -> torch.Tensor:
        """1/metres between those of the farthest and the nearest, from any number."""
        far, near = 1 / self.config.farthest_m, 1 / self.config.nearest_m
        return far + torch.sigmoid(answer.float()) * (near - far)

    def _floors(
        self, floors: GateFloors, seen: Observation, blur_share: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """How much a recurrence must remember, (B,) per block."""
        batch = seen.stem.shape[0]
        if blur_share is None:
            blur_share = seen.stem.new_zeros(batch, dtype=torch.float32)
        return [floor.expand(batch) for floor in floors(blur_share)]

    def _block(
        self,
        stream: str,
        number: int,
        features: torch.Tensor,
        film: FilmScaleAndShift | None,
        floors: list[torch.Tensor] | None,
        last: BokehFlowState | None,
        memories: dict[str, Any],
    ) -> torch.Tensor:
        """One block of a stream; what a recurrence remembers goes into ``memories``."""
        block = (self.depth_blocks if stream == "depth" else self.bokeh_blocks)[number]
        if floors is None:
            return block(features, film)
        name = f"{stream}_{number}"
        before = None if last is None else last.memories.get(name)
        features, memory = block(features, film, floors[number], before)
        if memory is not None:
            memories[name] = memory
        return features

    # -- The lens, and the bokeh stream ------------------------------------------------------------

    def _levels(self, photo_width_px: PerPhoto | None, width: int) -> int:
        """Levels of the pyramid for the largest circles that there may be."""
        if isinstance(photo_width_px, torch.Tensor):
            photo_width_px = photo_width_px.flatten().tolist()
        widths = photo_width_px if isinstance(photo_width_px, Sequence) else [photo_width_px]
        widest = max(width if one is None else float(one) for one in widths)
        return levels_for(self.config.max_coc_radius * widest / REFERENCE_WIDTH)

    def _lens(
        self,
        df: torch.Tensor,
        K: torch.Tensor,
        photo_width: torch.Tensor,
        camera: torch.Tensor,
        levels: int,
    ) -> Lens:
        largest_radius = self.config.max_coc_radius * photo_width / REFERENCE_WIDTH
        return Lens(
            df.view(-1, 1, 1, 1),
            K.view(-1, 1, 1, 1),
            largest_radius.view(-1, 1, 1, 1),
            camera,
            levels,
        )

    def _blur(
        self,
        seen: Observation,
        lens: Lens,
        inverse_depth: torch.Tensor | None,
        aperture: Aperture | None,
        return_physics: bool,
    ) -> BokehFlowOutput:
        """The bokeh stream and the rendering, cropped."""
        if aperture is not None and self.renderer == "pyramid":
            raise ValueError(
                "The pyramid of Gaussians has no aperture; leave it out, or take a network with "
                "the renderer 'layered' or 'binned'."
            )
        given = self._given(seen, inverse_depth)
        film_vector = self.camera_embedding(lens.camera.to(self.dtype))
        films = [self._film(layer, film_vector) for layer in self.films]
        if seen.depth is not None:
            depth = seen.depth
            rho = depth.inverse_depth if given is None else given
            defocus, radius = self._defocus(rho, lens)
            tokens, memories = self._bokeh_stream(seen, depth, films, radius, lens)
        else:
            tokens, depth, memories = self._both_streams(seen, films, given, lens)
            rho = depth.inverse_depth if given is None else given
            defocus, radius = self._defocus(rho, lens)
        if seen.change is not None:
            assert seen.last is not None and seen.last.bokeh_features is not None
            stillness = self.stillness(seen.change) * self._same_lens(seen, lens)
            tokens = self.bokeh_carry(tokens, seen.last.bokeh_features, stillness)
        physics, bokeh = self._render(seen.photo, radius, tokens, lens, aperture)
        if seen.change is not None:
            bokeh = self._carried_blur(seen, lens, bokeh, radius)
        height, width = seen.size
        inside = (..., slice(height), slice(width))
        clamped = (defocus.abs() > lens.largest_radius)[inside].float().mean((1, 2, 3))
        state = BokehFlowState(seen.picture, memories=depth.memories | memories)
        if self.config.temporal == "feature":
            state.depth_features, state.bokeh_features = depth.features, tokens
            state.bokeh, state.lens = bokeh, lens.as_row()
        return BokehFlowOutput(
            bokeh=bokeh[inside],
            depth=(1 / rho.clamp_min(1e-6))[inside],
            inverse_depth=rho[inside],
            coc=radius[inside],
            clamped_share=clamped,
            state=state,
            physics=physics[inside] if return_physics else None,
            coarse_inverse_depth=depth.coarse,
        )

    def _given(self, seen: Observation, inverse_depth: torch.Tensor | None) -> torch.Tensor | None:
        """The caller's inverse depth, padded as the photo is."""
        if inverse_depth is None:
            return None
        batch, (height, width) = seen.photo.shape[0], seen.size
        if inverse_depth.shape != (batch, 1, height, width):
            raise ValueError(
                f"The inverse depth is {tuple(inverse_depth.shape)}; wanted {(batch, 1)} x the "
                f"size of the photo, {(height, width)}."
            )
        padding = (0, -width % PIXELS_PER_TOKEN, 0, -height % PIXELS_PER_TOKEN)
        return F.pad(inverse_depth.float(), padding, mode="replicate")

    def _defocus(self, rho: torch.Tensor, lens: Lens) -> tuple[torch.Tensor, torch.Tensor]:
        """Signed radius in pixels, as it is and clamped."""
        defocus = signed_defocus(rho, lens.df, lens.K)
        return defocus, torch.maximum(
            torch.minimum(defocus, lens.largest_radius), -lens.largest_radius
        )

    def _film(self, layer: nn.Module, camera: torch.Tensor) -> FilmScaleAndShift:
        scale, shift = layer(camera)[:, :, None, None].chunk(2, 1)
        return scale, shift

    def _bokeh_stream(
        self,
        seen: Observation,
        depth: DepthFindings,
        films: list[FilmScaleAndShift],
        radius: torch.Tensor,
        lens: Lens,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        memories: dict[str, Any] = {}
        features, floors = seen.stem, None
        if self.radius_embedding is not None:
            features = features + self.radius_embedding(radius_tokens(radius).to(self.dtype))
        if self.config.mixer == "bigdr":
            blur_share = (radius.abs() / lens.largest_radius).mean((1, 2, 3)).detach()
            floors = self._floors(self.bokeh_floors, seen, blur_share)
        for number in range(len(self.bokeh_blocks)):
            features = self._block(
                "bokeh", number, features, films[number], floors, seen.last, memories
            )
            if (number + 1) % self.config.fusion_every == 0:
                meeting = (number + 1) // self.config.fusion_every - 1
                features = features + self.depth_to_bokeh[meeting](depth.told[meeting])
        return features, memories

    def _both_streams(
        self,
        seen: Observation,
        films: list[FilmScaleAndShift],
        given: torch.Tensor | None,
        lens: Lens,
    ) -> tuple[torch.Tensor, DepthFindings, dict[str, Any]]:
        """Both streams side by side, each hearing of the other."""
        memories: dict[str, Any] = {}
        recurrent = self.config.mixer == "bigdr"
        depth = bokeh = seen.stem
        coarse = None
        depth_floors = self._floors(self.depth_floors, seen) if recurrent else None
        bokeh_floors = self._floors(self.bokeh_floors, seen) if recurrent else None
        for number in range(len(self.depth_blocks)):
            depth = self._block("depth", number, depth, None, depth_floors, seen.last, memories)
            if number + 1 == COARSE_DEPTH_BLOCKS and recurrent:
                coarse = self.inverse_depth_of(self.coarse_depth(depth))
            bokeh = self._block(
                "bokeh", number, bokeh, films[number], bokeh_floors, seen.last, memories
            )
            if number + 1 == COARSE_DEPTH_BLOCKS and recurrent:
                assert coarse is not None
                _, radius = self._defocus(coarse if given is None else given, lens)
                blur_share = (radius.abs() / lens.largest_radius).mean((1, 2, 3)).detach()
                bokeh_floors = self._floors(self.bokeh_floors, seen, blur_share)
            if (number + 1) % self.config.fusion_every == 0:
                meeting = (number + 1) // self.config.fusion_every - 1
                depth, bokeh = (
                    depth + self.bokeh_to_depth[meeting](bokeh),
                    bokeh + self.depth_to_bokeh[meeting](depth),
                )
        return bokeh, self._depth_findings(seen, depth, coarse, [], {}), memories

    # -- The picture -------------------------------------------------------------------------------

    def _render(
        self,
        photo: torch.Tensor,
        radius: torch.Tensor,
        tokens: torch.Tensor,
        lens: Lens,
        aperture: Aperture | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The physics rendering, and what the network makes of it; both display-encoded.

        Light is summed in float32, whatever surrounds it.
        """
        light = srgb_to_linear(photo)
        if self.renderer == "pyramid":
            blurred = gaussian_pyramid_blur(light, radius, levels=lens.levels)
        else:
            blurred = RENDERERS[self.renderer](light, radius, aperture=aperture)
        physics = linear_to_srgb(blurred).clamp(0, 1)
        sides = front_and_behind(light, radius, blurred, levels=lens.levels)
        shares = self.bokeh_head(
            tokens,
            torch.cat(
                [
                    photo,
                    physics,
                    radius_scale(radius, lens.largest_radius),
                    sides.front_coverage,
                    sides.behind_coverage,
                ],
                1,
            ),
        )
        reached = reaching_radius(radius.abs(), lens.levels, PIXELS_PER_TOKEN).clamp(max=1)
        shares = (shares.float().clamp(-1, 1) * as_pixels(reached)).unsqueeze(2)
        others = torch.stack([light, sides.front, sides.behind], 1)
        mixed = blurred + (shares * (others - blurred[:, None])).sum(1)
        return physics, linear_to_srgb(mixed.clamp(0, 1))

    def _same_lens(self, seen: Observation, lens: Lens) -> torch.Tensor:
        """(B, 1, 1, 1): 1 where the lens is that of the last frame, else 0."""
        assert seen.last is not None and seen.last.lens is not None
        same = (lens.as_row() == seen.last.lens).all(1)
        return same.view(-1, 1, 1, 1).to(seen.photo)

    def _carried_blur(
        self, seen: Observation, lens: Lens, bokeh: torch.Tensor, radius: torch.Tensor
    ) -> torch.Tensor:
        """What is blurred keeps its light over time, unless something moves within its reach."""
        assert seen.last is not None and seen.last.bokeh is not None and seen.change is not None
        change = change_within_reach(seen.change, radius.abs(), lens.levels, PIXELS_PER_TOKEN)
        stillness = self.stillness(change) * self._same_lens(seen, lens)
        sharp, blurred = BLURRED_PX
        share = as_pixels(stillness) * ((radius.abs() - sharp) / (blurred - sharp)).clamp(0, 1)
        return carried(bokeh, seen.last.bokeh, share)


RENDERERS: dict[str, Callable[..., torch.Tensor]] = {
    "pyramid": gaussian_pyramid_blur,
    "binned": binned_blur,
    "layered": painted_layers_blur,
}
"""(linear light, signed radius) to blurred light."""


def geometric(first: float, last: float, count: int) -> list[float]:
    """``count`` numbers from the first to the last, each by the same factor larger."""
    steps = max(count - 1, 1)
    return [first * (last / first) ** (number / steps) for number in range(count)]


def _check_options(
    mixer: str,
    channels: int,
    stem_channels: int,
    head_channels: int,
    fusion: str,
    radius_tokens: bool,
    renderer: str | None,
    temporal: str,
) -> None:
    """Raises ValueError for options of the network that do not exist or do not go together."""
    for name, value, wanted in (
        ("mixer", mixer, tuple(VARIANTS)),
        ("fusion", fusion, ("both", "depth_to_bokeh")),
        ("renderer", renderer, (None, *RENDERERS)),
        ("temporal", temporal, ("feature", "none", "final", "chunk")),
    ):
        if value not in wanted:
            raise ValueError(f"{name} is {value!r}; wanted one of {', '.join(map(repr, wanted))}.")
    for name, count in (
        ("channels", channels),
        ("stem_channels", stem_channels),
        ("head_channels", head_channels),
    ):
        if count < GROUPS or count % GROUPS:
            raise ValueError(f"{name} is {count}; wanted a multiple of {GROUPS}.")
    if radius_tokens and fusion != "depth_to_bokeh":
        raise ValueError(
            "radius_tokens needs fusion='depth_to_bokeh': with fusion='both' depth is known only "
            "after the bokeh stream."
        )
    if temporal in ("final", "chunk") and mixer != "bigdr":
        raise ValueError(
            f"temporal is {temporal!r}, which carries the state of a recurrence; wanted 'feature' "
            "or 'none' with the mixer 'gated_conv'."
        )

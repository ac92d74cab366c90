"""PISA inside a diffusers UNet: the attention processor, and putting it in and out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from .backends import Backend
from .compiled import GraphOwner, pisa_attention_in_graph
from .config import PIXELS_PER_COC_UNIT, PisaConfig
from .geometry import PisaGeometry
from .pisa import pisa_attention

DEFAULT_PISA_LAYERS = ("down_blocks.1.attentions.0",)
"""Name fragments of the layers whose self-attention the paper replaces."""


class PisaContext(GraphOwner):
    """What all PISA processors of one UNet share: the settings, and the scene of the moment.

    Attributes:
        config: the settings; assign to change them.
        backend: see `pisa_attention`.
        generator: random numbers of dropout and of `jitter="location_random"`; None uses
            `config.seed`, the same for every call.
        of_pipeline: whether a pipeline installed it, which puts it back in when another pipeline
            that shares the UNet has put in its own.
    """

    def __init__(self, config: PisaConfig | None = None, *, backend: Backend = "auto") -> None:
        self.config = config or PisaConfig()
        self.backend: Backend = backend
        self.generator: torch.Generator | None = None
        self.take_handle()
        self._scene: tuple[Tensor, int, int, int] | None = None
        self._geometries: dict[tuple[int, int, PisaConfig], PisaGeometry] = {}
        self._conditioning: tuple[Tensor, int] | None = None
        self.of_pipeline = False

    def set_hardness(self, step: int) -> None:
        """Set the hardness of optimiser step `step`, counted from 0."""
        self.config = self.config.at_step(step)

    def set_scene(
        self,
        disparity: Tensor,
        coc_pixels: Tensor,
        latent_height: int,
        latent_width: int,
        vae_scale_factor: int,
    ) -> None:
        """Tell the layers what the UNet is about to look at. Replaces an earlier scene.

        Args:
            disparity: (B or 1, 1, H, W) in [0, 1], larger is nearer.
            coc_pixels: (B or 1, 1, H, W) radius of the circle of confusion in pixels of that image.
            latent_height, latent_width: size of the UNet's input, so that
                H = latent_height * vae_scale_factor, W likewise.
            vae_scale_factor: image pixels per latent pixel.
        """
        size = (latent_height * vae_scale_factor, latent_width * vae_scale_factor)
        for name, value in (("disparity", disparity), ("coc_pixels", coc_pixels)):
            if value.ndim != 4 or value.shape[1] != 1 or tuple(value.shape[-2:]) != size:
                raise ValueError(
                    f"{name} must have shape (B, 1, {size[0]}, {size[1]}), the size of the padded "
                    f"image that belongs to a {latent_height} x {latent_width} latent; got "
                    f"{tuple(value.shape)}."
                )
        batch = max(disparity.shape[0], coc_pixels.shape[0])
        if not {disparity.shape[0], coc_pixels.shape[0]} <= {1, batch}:
            raise ValueError(
                f"disparity has batch {disparity.shape[0]}, coc_pixels {coc_pixels.shape[0]}."
            )
        dtype = torch.promote_types(disparity.dtype, torch.float32)
        disp_coc = torch.cat(
            [
                disparity.to(dtype).expand(batch, -1, -1, -1),
                coc_pixels.to(dtype).expand(batch, -1, -1, -1) / PIXELS_PER_COC_UNIT,
            ],
            dim=1,
        )
        self.clear()
        self._scene = (disp_coc, latent_height, latent_width, vae_scale_factor)

    def clear(self) -> None:
        """Forget the scene and everything computed from it."""
        self._scene = self._conditioning = None
        self._geometries.clear()

    @property
    def has_scene(self) -> bool:
        """Return whether `set_scene` was called since the last `clear`."""
        return self._scene is not None

    def find_geometry(self, q: Tensor, disp_coc: Tensor | None) -> tuple[PisaGeometry, Backend]:
        """Return geometry and backend for a layer inside a compiled graph.

        Raises:
            ValueError: when the settings ask for ordinary attention or dropout there.
        """
        geometry = self.geometry_for(q.shape[2], disp_coc)
        if geometry is None or geometry.config.dropout_at_inference:
            raise ValueError(
                "Inside torch.compile PISA needs a scene, and draws no random numbers: "
                "missing_conditioning='vanilla' and dropout are for eager mode."
            )
        return geometry, self.backend

    def geometry_for(self, tokens: int, disp_coc: Tensor | None = None) -> PisaGeometry | None:
        """Return the geometry for a layer with so many tokens, made once per grid and settings.

        Args:
            tokens: N of the layer.
            disp_coc: the authors' conditioning (B, 2, H, W) at image resolution; wins over the
                scene.

        Returns None when there is neither, and `config.missing_conditioning` is `vanilla`.
        """
        if disp_coc is not None:
            version = disp_coc._version
            if self._conditioning is None or not (
                self._conditioning[0] is disp_coc and self._conditioning[1] == version
            ):
                self._geometries.clear()
                self._conditioning = (disp_coc, version)
            maps = disp_coc
            height, width = token_grid(tokens, *disp_coc.shape[-2:], rule=self.config.grid_rule)
        elif self._scene is not None:
            maps, latent_height, latent_width, vae_scale_factor = self._scene
            height, width, stride = latent_grid(tokens, latent_height, latent_width)
            # An odd latent is halved upwards; its last tokens see past the edge of the image.
            pixels = stride * vae_scale_factor
            missing = height * pixels - maps.shape[-2], width * pixels - maps.shape[-1]
            if any(missing):
                maps = F.pad(maps, (0, missing[1], 0, missing[0]), mode="replicate")
        elif self.config.missing_conditioning == "vanilla":
            return None
        else:
            raise RuntimeError(
                "PISA needs the scene: call context.set_scene(disparity, coc_pixels, ...) before "
                "the UNet, or pass cross_attention_kwargs={'disp_coc': ...}. For a UNet without "
                "PISA, in a stock pipeline that shares it for instance, call "
                "bokehdiff.attention.remove_pisa(unet)."
            )
        key = (height, width, self.config)
        if key not in self._geometries:
            self._geometries[key] = PisaGeometry.from_disp_coc(
                maps, height, width, config=self.config, generator=self.generator
            )
        return self._geometries[key]


def latent_grid(tokens: int, latent_height: int, latent_width: int) -> tuple[int, int, int]:
    """Return height, width and stride of the UNet level that has so many tokens.

    Every level halves the one before, rounding up.
    """
    height, width, stride = latent_height, latent_width, 1
    while True:
        if height * width == tokens:
            return height, width, stride
        if height * width < tokens or (height, width) == (1, 1):
            raise ValueError(
                f"No level of a {latent_height} x {latent_width} latent has {tokens} tokens; the "
                "scene was set for another image size."
            )
        height, width, stride = (height + 1) // 2, (width + 1) // 2, stride * 2


def token_grid(tokens: int, height: int, width: int, *, rule: str = "aspect") -> tuple[int, int]:
    """Return the token grid of an image of this height and width; see `PisaConfig.grid_rule`."""
    if rule == "integer_stride":
        stride = max(int(math.sqrt(height * width / tokens)), 1)
        grid = (height // stride, width // stride)
        if grid[0] * grid[1] != tokens:
            raise ValueError(
                f"The authors' rule gives a {grid[0]} x {grid[1]} grid for {tokens} tokens of a "
                f"{height} x {width} image. Pad the image to a multiple of 16, or use "
                "grid_rule='aspect'."
            )
        return grid
    grids = [
        (rows, tokens // rows)
        for divisor in range(1, math.isqrt(tokens) + 1)
        if tokens % divisor == 0
        for rows in (divisor, tokens // divisor)
    ]

    def stretch(grid: tuple[int, int]) -> float:
        return abs(math.log(grid[0] * width / (grid[1] * height)))

    best = min(grids, key=stretch)
    # Rounding up an odd side of a small grid changes the aspect by less than one part in its side.
    if stretch(best) > math.log1p(1.5 / min(best)):
        raise ValueError(
            f"No grid of {tokens} tokens has the aspect ratio of a {height} x {width} image; the "
            "conditioning belongs to another image."
        )
    return best


class PisaAttnProcessor:
    """Attention processor of diffusers that makes a self-attention layer spread light.

    It has no parameters and no state but the shared context.

    For `torch.compile(unet, fullgraph=True)` give the scene to the context: of keywords that only
    these layers know, diffusers warns in all others, and a warning breaks the graph.

    Args:
        context: settings and scene; None for layers that are always given `pisa_geometry`.
        ordinary: the processor of the layer without PISA; None is `AttnProcessor2_0()`. It computes
            cross-attention, and attention without a scene where the settings allow that;
            `remove_pisa` gives it back to the layer.
    """

    def __init__(self, context: PisaContext | None = None, ordinary: Any = None) -> None:
        self.context = context
        self.ordinary = AttnProcessor2_0() if ordinary is None else ordinary

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        pisa_geometry: PisaGeometry | None = None,
        disp_coc: Tensor | None = None,
    ) -> Tensor:
        """Return the layer's output in the shape of `hidden_states`, (B, N, C) or (B, C, h, w).

        Args:
            attn: the layer.
            hidden_states: its input.
            encoder_hidden_states: given for cross-attention, which stays ordinary.
            attention_mask: for cross-attention only.
            temb: for layers with a spatial norm.
            pisa_geometry: wins over `disp_coc`, and that over the context's scene.
            disp_coc: the authors' keyword, (B, 2, H, W) at image resolution: disparity, and radius
                of the circle of confusion in units of ten pixels.
        """
        if encoder_hidden_states is not None:
            return self.ordinary(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if self.context is None and pisa_geometry is None:
            raise RuntimeError(
                "This PISA layer has no context: pass pisa_geometry=PisaGeometry.build(...)."
            )
        geometry = pisa_geometry
        if geometry is None and not torch.compiler.is_compiling():
            assert self.context is not None
            tokens = math.prod(hidden_states.shape[2:] if hidden_states.ndim == 4 else
                               hidden_states.shape[1:2])  # fmt: skip
            geometry = self.context.geometry_for(tokens, disp_coc)
            if geometry is None:
                return self.ordinary(attn, hidden_states, None, attention_mask, temb)
        if attention_mask is not None:
            raise ValueError("PISA does not take an attention_mask in self-attention.")

        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query, key = heads(attn.to_q(hidden_states)), heads(attn.to_k(hidden_states))
        value = heads(attn.to_v(hidden_states))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)

        if torch.compiler.is_compiling():
            owner = self.context if geometry is None else geometry
            assert owner is not None
            received = pisa_attention_in_graph(
                query, key, value, owner.handle, disp_coc, float(attn.scale)
            )
        else:
            assert geometry is not None
            received = self.attend(attn, query, key, value, geometry)
        hidden_states = received.transpose(1, 2).flatten(2).to(query.dtype)
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def attend(
        self, attn: Attention, query: Tensor, key: Tensor, value: Tensor, geometry: PisaGeometry
    ) -> Tensor:
        """Return what arrives, (B, heads, N, dv), of queries and keys (B, heads, N, d).

        Args:
            attn: the layer, of which the scale counts, and whether it trains.
            query, key, value: its projections; values may have other channels than queries.
            geometry: of the tokens.
        """
        dropping = geometry.config.dropout_at_inference or attn.training
        return pisa_attention(
            query,
            key,
            value,
            geometry.to(query.device),
            scale=attn.scale,
            backend="auto" if self.context is None else self.context.backend,
            dropout=geometry.config.dropout if dropping else 0.0,
            generator=None if self.context is None else self.context.generator,
        )


class PisaAttention(Attention):
    """The class of a layer while PISA is installed in it: whatever processor is set, PISA stays.

    Slicing, xformers, fused projections and IP-Adapters set processors on all layers of a UNet. One
    that is set here becomes the layer's ordinary processor, which `remove_pisa` brings to light.
    """

    def set_processor(self, processor: Any) -> None:
        """Set PISA processors with a context as they are, and keep others for `remove_pisa`."""
        installed = self.processor
        if isinstance(installed, PisaAttnProcessor):
            if not isinstance(processor, PisaAttnProcessor):
                processor = PisaAttnProcessor(installed.context, processor)
            elif processor.context is None:
                # IP-Adapters make the processors of self-attention anew, from their class alone.
                processor = installed
        super().set_processor(processor)


def pisa_layer_names(unet: nn.Module, layers: Sequence[str] = DEFAULT_PISA_LAYERS) -> list[str]:
    """Return the names of the self-attention layers whose names contain one of `layers`."""
    names = []
    for name, module in uncompiled(unet).named_modules():
        if isinstance(module, Attention) and any(fragment in name for fragment in layers):
            if not module.is_cross_attention and module.added_kv_proj_dim is None:
                names.append(name)
    if not names:
        raise ValueError(
            f"This UNet has no self-attention layer whose name contains one of {list(layers)}."
        )
    return names


def uncompiled(unet: nn.Module) -> nn.Module:
    """Return the module that `torch.compile(unet)` wraps; its layers have their own names."""
    module: nn.Module = getattr(unet, "_orig_mod", unet)
    return module


def install_pisa(
    unet: nn.Module,
    layers: Sequence[str] = DEFAULT_PISA_LAYERS,
    config: PisaConfig | None = None,
) -> PisaContext:
    """Put PISA into the self-attention of the matching layers and return their shared context.

    Other layers, and cross-attention, keep the processors they have. Processors that the switches
    of diffusers set later take effect in the other layers. `remove_pisa` undoes it.

    Raises:
        ValueError: when no layer matches.
    """
    return reinstall_pisa(unet, layers, PisaContext(config))


def reinstall_pisa(unet: nn.Module, layers: Sequence[str], context: PisaContext) -> PisaContext:
    """Put PISA of this context into the matching layers, and only there; see `install_pisa`."""
    names = pisa_layer_names(unet, layers)
    remove_pisa(unet)
    for name in names:
        layer = uncompiled(unet).get_submodule(name)
        assert isinstance(layer, Attention)
        layer.set_processor(PisaAttnProcessor(context, layer.processor))
        if type(layer) is Attention:
            layer.__class__ = PisaAttention
    return context


def remove_pisa(unet: nn.Module) -> None:
    """Give every layer its ordinary processor back; without PISA do nothing.

    That is the processor it had before `install_pisa`, or the one that was set since.
    """
    for layer in unet.modules():
        if type(layer) is PisaAttention:
            layer.__class__ = Attention
        if isinstance(layer, Attention) and isinstance(layer.processor, PisaAttnProcessor):
            layer.set_processor(layer.processor.ordinary)


def pisa_contexts(unet: nn.Module) -> list[PisaContext]:
    """Return the contexts of all PISA layers of a UNet, each once."""
    processors = [layer.processor for layer in unet.modules() if isinstance(layer, Attention)]
    contexts = [one.context for one in processors if isinstance(one, PisaAttnProcessor)]
    return list({id(one): one for one in contexts if one is not None}.values())


def verify_pisa(unet: nn.Module, layers: Sequence[str] = DEFAULT_PISA_LAYERS) -> PisaContext:
    """Return the shared context after checking that every matching layer has PISA.

    Raises:
        RuntimeError: when PISA was taken out, or only part of it is there.
    """
    installed: dict[str, Any] = {
        name: uncompiled(unet).get_submodule(name).processor
        for name in pisa_layer_names(unet, layers)
    }
    lost = [name for name, value in installed.items() if not isinstance(value, PisaAttnProcessor)]
    if lost:
        kind = type(installed[lost[0]]).__name__
        raise RuntimeError(
            f"PISA is missing in {len(lost)} of {len(installed)} layers ({lost[0]} has {kind}): "
            "remove_pisa took it out, or the UNet is another one. Put it in with "
            "install_pisa(unet, layers, config), or install_pisa() of the pipeline."
        )
    contexts = {id(value.context): value.context for value in installed.values()}
    context = next(iter(contexts.values()))
    if len(contexts) != 1 or context is None:
        raise RuntimeError(
            "The PISA layers do not share one context; call install_pisa(unet, layers, config) "
            "once for all layers."
        )
    return context

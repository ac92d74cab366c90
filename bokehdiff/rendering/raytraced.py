"""Ray-traced renderer of layered scenes: the reference every faster renderer is held against."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from bokehdiff.rendering.aperture import Aperture, field_position

__all__ = ["LayerRender", "render_layers"]

# Thresholds of the published renderer: opacity below the first counts as empty, above the second
# as solid; rays whose vignetted lens position leaves this squared radius are lost.
EMPTY_ALPHA = 0.01
SOLID_ALPHA = 0.99
VIGNETTE_SQUARED_RADIUS = 1.1
# Keeps the ray parameter finite where a ray runs parallel to a plane.
PARALLEL_RAY_GUARD = 1e-5


class LayerRender(NamedTuple):
    """Sums over lens samples of a layered scene, in linear light.

    ``rgb``: (B, 3, H, W) sum of linear light. ``coverage``: (B, 1, H, W) sum of opacity met.
    ``weight``: (B, 1, H, W) number of rays that count; through an aperture that is not flat, the
    sum of what it lets pass. ``weight - coverage`` is the black behind the last layer. Through an
    aperture with ``fringe`` every colour has its own rays: ``coverage`` and ``weight`` are then (B,
    3, H, W). The picture is ``rgb / weight``: see :meth:`image`.
    """

    rgb: torch.Tensor
    coverage: torch.Tensor
    weight: torch.Tensor

    def image(self, smallest_weight: float = 1e-5) -> torch.Tensor:
        """(B, 3, H, W) picture in linear light, not negative; black where no ray counts."""
        return self.rgb.clamp_min(0) / self.weight.clamp_min(smallest_weight)


def render_layers(
    colours: torch.Tensor,
    alphas: torch.Tensor,
    planes: torch.Tensor,
    df: float | torch.Tensor,
    K: float | torch.Tensor,
    *,
    aperture: Aperture | None = None,
    samples_per_side: int = 21,
    vignetting: float = 0.0,
    rays_at_once: int | None = None,
) -> LayerRender:
    """Trace every lens sample of every pixel through textured planes; returns sums over samples.

    colours: (B, L, 3, H, W) linear light, layer 0 nearest (not premultiplied by alpha).
    alphas: (B, L, 1, H, W) opacity in [0, 1].
    planes: (B, L, 3) = (a, b, c): disparity ``d(x, y) = (1 - a x - b y) / c`` at pixel (x, y).
    df: focus disparity. K: blur radius in pixels per unit of disparity. Float or (B,) tensor.
    aperture: the opening (default disc), sampled on a grid of ``samples_per_side``. A ray counts as
        much as its lens point lets pass: seen from its pixel's place in the picture (``cat_eye``),
        and on the side of the focus where it meets a layer (``spherical``). With ``fringe`` red
        with blue are traced apart from green, at their own focus.
    vignetting: cat's-eye strength eta per pixel from the image centre, as published; 0 switches it
        off. The ``cat_eye`` of the aperture is measured in sizes of the picture instead.
    rays_at_once: bound on pixels times lens samples held in memory at a time (about 80 bytes
        each); the default suits the cache of a CPU or fills a GPU.

    The ray of pixel (x, y) through lens point (u, v) meets a plane at ``(x + s u, y + s v)`` with
    ``s = (1 - a x - b y - c df) / (a u + b v + c / K + 1e-5)``, which is ``K (d(hit) - df)``.
    A hit outside [0, W) x [0, H) misses the layer. Opacity under 0.01 lets the ray pass (a ray
    that reaches nothing behind the last layer counts as black), above 0.99 stops it.

    Differentiable in ``colours`` (and in ``alphas`` away from the two thresholds); with gradients
    the rays are traced again in the backward pass instead of being stored. dtype and device of
    ``colours`` are kept.
    """
    _check_layers(colours, alphas, planes)
    batch, layers, _, height, width = colours.shape
    dtype, device = colours.dtype, colours.device
    focus = _per_item(df, "df", batch, dtype, device)
    strength = _per_item(K, "K", batch, dtype, device)
    if bool((strength < 0).any()):
        raise ValueError(f"K must not be negative, got {strength.flatten().tolist()}.")
    aperture = aperture or Aperture()
    lens = aperture.lens_samples(samples_per_side, dtype=dtype, device=device)
    planes = planes.to(dtype=dtype, device=device)
    alphas = alphas.to(dtype=dtype, device=device)
    if rays_at_once is None:
        rays_at_once = 1 << 17 if device.type == "cpu" else 1 << 24
    samples_at_once = max(1, min(len(lens), rays_at_once // (batch * height * width)))

    def trace(colours: torch.Tensor, focus: torch.Tensor) -> torch.Tensor:
        """(B, C + 2, H, W): sums of C colours, coverage and weight over the whole lens."""
        premultiplied = torch.cat([alphas * colours, alphas], dim=2)
        keep_graph = torch.is_grad_enabled() and premultiplied.requires_grad
        total = premultiplied.new_zeros(batch, colours.shape[2] + 2, height, width)
        for some_of_lens in lens.split(samples_at_once):
            arguments = (premultiplied, planes, focus, strength, some_of_lens, aperture, vignetting)
            if keep_graph:
                total = total + checkpoint(_trace, *arguments, use_reentrant=False)
            else:
                total += _trace(*arguments)
        return total

    if aperture.fringe == 0:
        total = trace(colours, focus)
        return LayerRender(total[:, :3], total[:, 3:4], total[:, 4:5])
    red_and_blue_focus, green_focus, _ = aperture.channel_focus(focus)
    red_and_blue = trace(colours[:, :, [0, 2]], red_and_blue_focus)
    green = trace(colours[:, :, [1]], green_focus)
    # Both hold colours, then coverage, then weight.
    red, blue, coverage, weight = red_and_blue.split(1, dim=1)
    green, green_coverage, green_weight = green.split(1, dim=1)
    return LayerRender(
        torch.cat([red, green, blue], dim=1),
        torch.cat([coverage, green_coverage, coverage], dim=1),
        torch.cat([weight, green_weight, weight], dim=1),
    )


def _trace(
    premultiplied: torch.Tensor,  # (B, L, C + 1, H, W), opacity last
    planes: torch.Tensor,  # (B, L, 3)
    focus: torch.Tensor,  # (B, 1, 1, 1)
    strength: torch.Tensor,  # (B, 1, 1, 1)
    lens: torch.Tensor,  # (S, 2)
    aperture: Aperture,
    vignetting: float,
) -> torch.Tensor:
    """(B, C + 2, H, W): colours, coverage and weight summed over the given lens samples."""
    batch, layers, channels, height, width = premultiplied.shape
    samples = len(lens)
    x = torch.arange(width).to(premultiplied).view(1, 1, 1, width)
    y = torch.arange(height).to(premultiplied).view(1, 1, height, 1)
    u, v = lens.view(1, samples, 1, 1, 2).unbind(-1)

    light = premultiplied.new_zeros(batch, channels, height, width)
    black = premultiplied.new_zeros(batch, 1, height, width)
    # Light that still reaches the sensor from behind the layers met so far: (B, S, H, W). It starts
    # with what the lens point lets pass, the mean of both sides of the focus.
    passing = aperture.lens_weights(lens, 0)
    transmittance = passing.view(1, samples, 1, 1).expand(batch, -1, height, width).clone()
    # What it lets pass of the nearer side above that mean; of the farther side it lacks as much.
    surplus = (aperture.lens_weights(lens, 1) - passing) / passing.clamp_min(1e-12)
    if aperture.varies_over_field:
        field = field_position(x, y, height, width)
        transmittance *= aperture.transmission(u, v, field=field) > 0
    if vignetting != 0.0:
        shifted_u = u + vignetting * (x - (width - 1) / 2)
        shifted_v = v + vignetting * (y - (height - 1) / 2)
        transmittance *= shifted_u**2 + shifted_v**2 <= VIGNETTE_SQUARED_RADIUS
    for layer in range(layers):
        a, b, c = planes[:, layer].view(batch, 3, 1, 1, 1).unbind(1)
        shift = (1 - a * x - b * y - c * focus) / (
            a * u + b * v + c / strength + PARALLEL_RAY_GUARD
        )
        hit_x, hit_y = x + shift * u, y + shift * v
        met = (hit_x >= 0) & (hit_x < width) & (hit_y >= 0) & (hit_y < height)
        # grid_sample with aligned corners puts -1 and 1 on the centres of the outermost pixels,
        # and border padding repeats the last pixel for hits between W - 1 and W.
        grid = premultiplied.new_empty(batch, samples, height, width, 2)
        grid[..., 0] = hit_x * (2 / max(width - 1, 1)) - 1
        grid[..., 1] = hit_y * (2 / max(height - 1, 1)) - 1
        sampled = F.grid_sample(
            premultiplied[:, layer],
            grid.view(batch, samples * height, width, 2),
            mode="bilinear",
            padding_mode="border",
            align_corners=True,
        ).view(batch, channels, samples, height, width)
        alpha = sampled[:, -1]
        arriving = transmittance
        if aperture.spherical != 0:
            arriving = transmittance * (1 + surplus.view(1, samples, 1, 1) * shift.sign())
        empty = alpha < EMPTY_ALPHA
        light = light + (sampled * (arriving * (met & ~empty)).unsqueeze(1)).sum(2)
        if layer == layers - 1:
            black = (arriving * (met & empty)).sum(1, keepdim=True)
        else:
            remaining = torch.where(alpha > SOLID_ALPHA, 0, 1 - alpha)
            transmittance = torch.where(met & ~empty, transmittance * remaining, transmittance)
    return torch.cat([light, light[:, -1:] + black], dim=1)


def _check_layers(colours: torch.Tensor, alphas: torch.Tensor, planes: torch.Tensor) -> None:
    if colours.dim() != 5 or colours.shape[2] != 3 or 0 in colours.shape:
        raise ValueError(
            f"colours has shape {tuple(colours.shape)}; wanted (B, L, 3, H, W) in linear light."
        )
    if colours.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"colours is {colours.dtype}; wanted float32 or float64.")
    batch, layers, _, height, width = colours.shape
    if alphas.shape != (batch, layers, 1, height, width):
        raise ValueError(
            f"alphas has shape {tuple(alphas.shape)}; wanted {(batch, layers, 1, height, width)} "
            "to match colours."
        )
    if planes.shape != (batch, layers, 3):
        raise ValueError(
            f"planes has shape {tuple(planes.shape)}; wanted {(batch, layers, 3)}: one (a, b, c) "
            "for each layer."
        )
    if not bool(torch.isfinite(planes).all()) or bool((planes[..., 2] == 0).any()):
        raise ValueError(
            "planes must be finite with c different from 0; a fronto-parallel layer of disparity "
            "d is (0, 0, 1 / d)."
        )


def _per_item(
    value: float | torch.Tensor, name: str, batch: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """(B, 1, 1, 1) finite values from a number or one number for each image of the batch."""
    tensor = torch.as_tensor(value, dtype=dtype, device=device).flatten()
    if len(tensor) not in (1, batch):
        raise ValueError(f"{name} has {len(tensor)} values; wanted 1 or {batch}, one per image.")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} must be finite, got {tensor.tolist()}.")
    return tensor.expand(batch).reshape(batch, 1, 1, 1)

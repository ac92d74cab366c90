"""How good a renderer is on held-out scenes, and whether its controls do what they say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from torch import Tensor

from bokehdiff.optics import circle_of_confusion

BLURRED_RADIUS = 2.0
"""Pixels of circle-of-confusion radius above which a pixel counts as blurred."""
IN_FOCUS_RADIUS = 0.5
"""Pixels of circle-of-confusion radius below which a pixel counts as in focus."""
CONTROL_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of a scene's K that must give more and more blur."""
SSIM_WINDOW = 11
"""Pixels a side of the window of SSIM."""
LARGEST_PICTURE_SIDE = 512
"""Pixels a side above which a picture is shown smaller than it is."""
PICTURE_GAP = 8
"""Pixels between pictures that are shown together."""

Renderer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From image (1, 3, H, W) in [0, 1], disparity (1, 1, H, W), df and K (1,) to (1, 3, H, W) in
about [-1, 1], not clamped."""


@dataclass
class Validation:
    """What a validation found.

    Attributes:
        scores: means over scenes by name, and ``scenes``, their number; see `validate`.
        grid: the first scenes, one in a row: photograph, disparity, blur radius, rendered, ground
            truth. None if no pictures were asked for.
    """

    scores: dict[str, float | int]
    grid: PIL.Image.Image | None


@torch.no_grad()
def validate(
    renderer: Renderer,
    scenes: Sequence[dict[str, Tensor]],
    border: int,
    device: torch.device,
    *,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    pictures: int = 0,
) -> Validation:
    """Render held-out scenes and return their scores, and pictures of the first of them.

    Args:
        renderer: what is scored. No random numbers are drawn here.
        scenes: image (3, H, W), disparity (1, H, W), df (), K () and target (3, H, W) of each,
            which may differ in size.
        border: pixels at the border that count for nothing, because a photograph does not show the
            light that comes from beyond it.
        device: where the renderer computes.
        perceptual: LPIPS of two photographs (1, 3, H, W) in [-1, 1], a scalar, on `device`.
        pictures: how many scenes the grid shows.

    Returns:
        Means over scenes, on display-encoded sRGB in [0, 1], without the border.

        - ``psnr``, ``psnr_blurred``, ``psnr_in_focus``: in dB, everywhere, and where the circle of
          confusion has a radius above 2 pixels or below half a pixel,
        - ``ssim``: in [-1, 1], Gaussian window of 11 pixels with sigma 1.5, at full resolution,
        - ``lpips``: only with `perceptual`; smaller is better,
        - all of these with ``_identity`` added: of the photograph left as it is,
        - ``control``: share of scenes whose blurred region loses contrast each time K grows, from 0
          by quarters to all of the scene's K,
        - ``control_correlation``: Spearman's rank correlation in [-1, 1] between K and the blur
          (less contrast is more blur) of that region; 0 where K changes nothing,
        - ``scenes``: their number.

        A score that no scene has a region for is absent; so is SSIM where all are smaller than its
        window.

    Raises:
        ImportError: piq is missing.
    """
    scores: dict[str, list[float]] = {}
    rows: list[dict[str, PIL.Image.Image]] = []
    for scene in scenes:
        image, disparity, target = (
            scene[name][None].to(device) for name in ("image", "disparity", "target")
        )
        df, K = (scene[name].reshape(1).to(device) for name in ("df", "K"))
        renders = [
            renderer(image, disparity, df, K * share).float().div(2).add(0.5).clamp(0, 1)
            for share in CONTROL_SHARES
        ]
        image, disparity, target, radius, *renders = (
            without_border(picture, border)
            for picture in (
                *(image, disparity, target, circle_of_confusion(disparity, df, K)),
                *renders,
            )
        )
        blurred, in_focus = radius > BLURRED_RADIUS, radius < IN_FOCUS_RADIUS
        everywhere = torch.ones_like(blurred)
        for picture, suffix in ((renders[-1], ""), (image, "_identity")):
            found = {
                f"psnr{name}": psnr(picture, target, region)
                for name, region in (
                    ("", everywhere),
                    ("_blurred", blurred),
                    ("_in_focus", in_focus),
                )
                if region.any()
            }
            if min(picture.shape[-2:]) >= SSIM_WINDOW:
                found["ssim"] = _ssim(picture, target)
            if perceptual is not None:
                found["lpips"] = float(perceptual(2 * picture - 1, 2 * target - 1))
            for name, value in found.items():
                scores.setdefault(name + suffix, []).append(value)
        if blurred.any():
            contrasts = [neighbour_contrast(render, blurred) for render in renders]
            falls = all(
                sharper > softer for sharper, softer in zip(contrasts, contrasts[1:], strict=False)
            )
            scores.setdefault("control", []).append(float(falls))
            blur = [-contrast for contrast in contrasts]
            scores.setdefault("control_correlation", []).append(
                spearman_correlation(CONTROL_SHARES, blur)
            )
        if len(rows) < pictures:
            largest = float(radius.max())
            rows.append(
                {
                    "photograph": as_picture(image),
                    f"disparity, focus at {float(df):.2f}": as_picture(disparity),
                    f"blur radius, white is {largest:.1f} px": as_picture(
                        radius / max(largest, 1e-6)
                    ),
                    f"rendered, {scores['psnr'][-1]:.1f} dB": as_picture(renders[-1]),
                    "ground truth": as_picture(target),
                }
            )
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    return Validation({"scenes": len(scenes), **means}, picture_grid(rows) if rows else None)


def without_border(image: Tensor, border: int) -> Tensor:
    """Return `image` (..., H, W) without `border` pixels on each side."""
    height, width = image.shape[-2:]
    return image[..., border : height - border, border : width - border]


def spearman_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the correlation in [-1, 1] of the ranks of two series; 0 if one is constant.

    Equal values share the mean of their ranks.
    """
    ranks = torch.stack([_ranks(first), _ranks(second)])
    deviations = ranks - ranks.mean(1, keepdim=True)
    variances = deviations.square().sum(1)
    if not variances.all():
        return 0.0
    return float((deviations[0] * deviations[1]).sum() / variances.prod().sqrt())


def _ranks(values: Sequence[float]) -> Tensor:
    series = torch.tensor(values, dtype=torch.float64)
    smaller = (series < series[:, None]).sum(1)
    equal = (series == series[:, None]).sum(1)
    return smaller + (equal.double() + 1) / 2


def picture_grid(rows: Sequence[dict[str, PIL.Image.Image]]) -> PIL.Image.Image:
    """Return pictures in rows and columns on white, each below its title.

    Args:
        rows: at least one; the pictures of each by title, of the same number in all rows.
    """
    font = PIL.ImageFont.load_default()
    title_height = math.ceil(font.getbbox("Ag")[3]) + 2
    columns = zip(*(row.items() for row in rows), strict=True)
    widths = [
        max(max(math.ceil(font.getlength(title)), picture.width) for title, picture in column)
        for column in columns
    ]
    heights = [title_height + max(picture.height for picture in row.values()) for row in rows]
    grid = PIL.Image.new(
        "RGB",
        (
            sum(widths) + PICTURE_GAP * (len(widths) + 1),
            sum(heights) + PICTURE_GAP * (len(heights) + 1),
        ),
        "white",
    )
    draw = PIL.ImageDraw.Draw(grid)
    top = PICTURE_GAP
    for row, height in zip(rows, heights, strict=True):
        left = PICTURE_GAP
        for (title, picture), width in zip(row.items(), widths, strict=True):
            draw.text((left, top), title, "black", font)
            grid.paste(picture, (left, top + title_height))
            left += width + PICTURE_GAP
        top += height + PICTURE_GAP
    return grid


def as_picture(values: Tensor) -> PIL.Image.Image:
    """Values (1, 1 or 3, H, W) in [0, 1] as a picture of at most 512 pixels a side."""
    levels = values[0].clamp(0, 1).nan_to_num(0).mul(255).round().byte()
    pixels = levels.expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy()
    picture = PIL.Image.fromarray(pixels)
    picture.thumbnail((LARGEST_PICTURE_SIDE, LARGEST_PICTURE_SIDE))
    return picture


def psnr(picture: Tensor, target: Tensor, region: Tensor) -> float:
    """PSNR in dB of (1, 3, H, W) pictures in [0, 1], over a region (1, 1, H, W)."""
    squares = (picture - target).square().mean(1, keepdim=True)[region]
    return float(-10 * squares.mean().clamp_min(1e-12).log10())


def _ssim(picture: Tensor, target: Tensor) -> float:
    """SSIM of (1, 3, H, W) pictures in [0, 1], mean over the whole windows and the colours."""
    try:
        import piq
    except ImportError as error:
        raise ImportError("Validation needs piq: pip install 'bokehdiff[train]'.") from error
    if picture.isnan().any():
        return math.nan  # which piq refuses, and which the other scores are too
    # It would halve large pictures, and score another picture than the one that is rendered.
    return float(piq.ssim(picture, target, kernel_size=SSIM_WINDOW, downsample=False))


def neighbour_contrast(picture: Tensor, region: Tensor) -> float:
    """Mean squared difference of neighbours in (1, 3, H, W), inside a region (1, 1, H, W)."""
    across = (picture[..., :, 1:] - picture[..., :, :-1]).square().mean(1, keepdim=True)
    down = (picture[..., 1:, :] - picture[..., :-1, :]).square().mean(1, keepdim=True)
    return float(torch.cat([across[region[..., 1:]], down[region[..., 1:, :]]]).mean())
